"""The client's synchronous face, for scripts and notebooks."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from typing_extensions import TypeVar

from parallax.runtime.loop import has_uvloop
from parallax.sdk.agents import AgentInfo, Labels, Several
from parallax.sdk.client import DEFAULT_TIMEOUT, NO_LABELS, Duration, ParallaxClient
from parallax.sdk.result import Result

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal

    from parallax.security.config import MTLSConfig

T = TypeVar("T", default=Any)


class SyncParallaxClient:
    """
    The same client for code without an event loop: `with SyncParallaxClient() as client:`.

    It runs the asynchronous client in a thread of its own; arguments, results and
    errors are the same.
    """

    def __init__(
        self, address: str | None = None, tls: MTLSConfig | None = None, *, identity: str | None = None
    ) -> None:
        self._client = ParallaxClient(address, tls, identity=identity)
        self._stack = ExitStack()
        self._portal: BlockingPortal | None = None

    def __enter__(self) -> Self:
        """Connect; raises what stands in the way."""
        from anyio.from_thread import start_blocking_portal

        with ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal(backend_options={"use_uvloop": has_uvloop()}))
            context: AbstractContextManager[ParallaxClient] = portal.wrap_async_context_manager(self._client)
            stack.enter_context(context)
            self._portal = portal
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the connection and end the thread."""
        self._portal = None
        self._stack.__exit__(kind, exc, traceback)

    def analyze(
        self,
        target: str,
        task: str,
        data: Any = None,
        *,
        timeout: Duration = DEFAULT_TIMEOUT,
        wait_for_agent: Duration = 0,
        idempotent: bool = False,
        allow_unverified: bool = False,
        returns: type[T] = Any,  # type: ignore[assignment]  # what says nothing
    ) -> Result[T]:
        """Have one task done: see `ParallaxClient.analyze`."""

        async def call() -> Result[T]:
            return await self._client.analyze(
                target,
                task,
                data,
                timeout=timeout,
                wait_for_agent=wait_for_agent,
                idempotent=idempotent,
                allow_unverified=allow_unverified,
                returns=returns,
            )

        return self._entered.call(call)

    def stream(
        self,
        target: str,
        task: str,
        data: Any = None,
        *,
        timeout: Duration = DEFAULT_TIMEOUT,
        wait_for_agent: Duration = 0,
        idempotent: bool = False,
        allow_unverified: bool = False,
        returns: type[T] = Any,  # type: ignore[assignment]  # what says nothing
    ) -> Generator[Result[T], None, None]:
        """Have one task done, and take its answer part by part: see `ParallaxClient.stream`."""
        parts = self._client.stream(
            target,
            task,
            data,
            timeout=timeout,
            wait_for_agent=wait_for_agent,
            idempotent=idempotent,
            allow_unverified=allow_unverified,
            returns=returns,
        )
        portal = self._entered
        try:
            while True:
                try:
                    yield portal.call(parts.__anext__)
                except StopAsyncIteration:
                    return
        finally:
            portal.call(parts.aclose)

    def agents(
        self,
        *,
        capability: Several = (),
        labels: Labels = NO_LABELS,
        state: Several = (),
        verified: bool | None = None,
    ) -> list[AgentInfo]:
        """The registered agents that fulfil everything stated: see `ParallaxClient.agents`."""

        async def call() -> list[AgentInfo]:
            return await self._client.agents(
                capability=capability, labels=labels, state=state, verified=verified
            )

        return self._entered.call(call)

    def agent(self, agent_id: str) -> AgentInfo:
        """One registered agent; raises NoSuchAgent."""
        return self._entered.call(self._client.agent, agent_id)

    def remove_agent(self, agent_id: str) -> bool:
        """Take an agent out for good: see `ParallaxClient.remove_agent`."""
        return self._entered.call(self._client.remove_agent, agent_id)

    @property
    def _entered(self) -> BlockingPortal:
        if self._portal is None:
            raise RuntimeError("use it as a context manager: with SyncParallaxClient() as client: ...")
        return self._portal
