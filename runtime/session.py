"""An agent's side of its session: dial, say hello, take tasks, answer, come back when the line drops."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Final

from grpc import aio

from parallax.protos import link_pb2, session_pb2_grpc
from parallax.runtime import wire
from parallax.runtime.description import AgentDescription
from parallax.runtime.link import End, Link, Said
from parallax.runtime.link_stream import Call, converse
from parallax.runtime.outcome import Failure, OutcomeCode
from parallax.runtime.protocol import hello
from parallax.runtime.worker import Bench, Worker
from parallax.security.errors import (
    ConfigError,
    IdentityError,
    InvalidRequest,
    InvalidTransition,
    NotAuthorized,
    ParallaxError,
    Superseded,
    Unavailable,
)

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S: Final = 0.2
LONGEST_BACKOFF_S: Final = 30.0
SHORTEST_BEAT_S: Final = 0.1  # a third of the shortest lease is three times as long
STEADY_S: Final = 5.0  # a session that held this long resets the back-off
LAST_WORDS_S: Final = 5.0  # after draining, for the last outcomes to leave

_TORN: Final = Failure(
    OutcomeCode.INVALID_RESULT,
    "the agent's connection broke while the answer came in parts, and some may be lost; ask again",
)
# Trying again cannot mend these.
_FINAL: Final = (ConfigError, IdentityError, InvalidRequest, InvalidTransition, NotAuthorized, Superseded)


def backoff_s(attempt: int, spread: float) -> float:
    """Seconds before reconnect *attempt*, from 0: doubling, of which *spread* in [0, 1] decides one half."""
    longest: float = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** min(attempt, 16))
    return longest * (1 + spread) / 2


class AgentSession(Worker):
    """
    Keeps one agent connected.

    Outcomes wait here while there is no stream and go out on the next one: the control
    plane takes them as long as it still waits for that task.

    Args:
        dial: Opens a channel to the control plane, with the credentials then current.
        agent_id: Stated in the hello; what counts is the certificate.
        drain_timeout: For the tasks held when it is stopped.
        instance_id: Of this process, on whatever links it has.
        is_sole: Whether the control plane has no other link to this agent.
    """

    def __init__(
        self,
        dial: Callable[[], aio.Channel],
        agent_id: str,
        description: AgentDescription,
        bench: Bench,
        drain_timeout: timedelta,
        instance_id: bytes | None = None,
        is_sole: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__(bench)
        self.executor = bench.executor
        self._drain_timeout = drain_timeout
        self._dial = dial
        self._agent_id = agent_id
        self._description = description
        self._instance_id = instance_id or secrets.token_bytes(16)
        self._is_sole = is_sole
        self._stopping = asyncio.Event()
        self._goodbye: link_pb2.Goodbye | None = None
        self.connected = asyncio.Event()
        self.link = Link(End.WORKER, Said.WELCOME, self)  # of the next stream, or the open one

    async def run(self) -> None:
        """
        Stay connected until stopped or taken out of the registry.

        Raises:
            Superseded: Another instance with the same identity took over.
            ParallaxError: The control plane refuses this agent for a reason that stays.
        """
        attempt = 0
        loop = asyncio.get_running_loop()
        while not self._stopping.is_set():
            began = loop.time()
            try:
                if await self._connect():
                    return
                problem = "the control plane ended the session"
            except _FINAL:
                raise
            except ParallaxError as exc:
                problem = f"{type(exc).__name__}: {exc}"
            finally:
                self.connected.clear()
            if loop.time() - began > STEADY_S:
                attempt = 0
            pause = backoff_s(attempt, random.random())  # noqa: S311 - spreads load, hides nothing
            attempt += 1
            logger.warning(
                "not connected",
                extra={"agent": self._agent_id, "cause": problem, "retry_in_s": round(pause, 2)},
            )
            try:
                async with asyncio.timeout(pause):
                    await self._stopping.wait()
            except TimeoutError:
                continue

    def stop(self) -> None:
        """Let `run` take no new task, finish those held, and return."""
        self._stopping.set()

    async def _connect(self) -> bool:
        """Hold one session from dialling to its end; True if there is to be no other."""
        link, self._goodbye = self.link, None
        channel = self._dial()
        try:
            call = session_pb2_grpc.SessionServiceStub(channel).Connect()
            link.greet(link_pb2.LinkFrame(hello=self._hello(link)))
            try:
                await converse(link, call, partial(self._drain, link, call))
            finally:
                call.cancel()
                self._renew_link()
        finally:
            await channel.close()
        return self._is_final() or self._stopping.is_set()

    def _renew_link(self) -> None:
        """
        Have a link for the next stream, with what could not be sent on the last one.

        An answer in parts ends with its stream: nobody knows which of them arrived.
        """
        unsent = self.link.unsent()
        self.link.close()
        torn = {*self.withdraw_streams(), *(o.task_id for o in unsent if o.WhichOneof("result") == "parts")}
        self.link = Link(End.WORKER, Said.WELCOME, self)
        self.link.repeat(outcome for outcome in unsent if outcome.task_id not in torn)
        for task_id in torn:
            self.link.answer(task_id, _TORN)

    def on_greeting(self, frame: link_pb2.LinkFrame) -> None:
        """The control plane takes the agent."""
        welcome = frame.welcome
        logger.info("connected", extra={"agent": welcome.agent_id, "generation": welcome.generation})
        self.max_payload_bytes = welcome.max_payload_bytes
        self.link.beat_s = max(SHORTEST_BEAT_S, welcome.heartbeat_ms / 1000)
        self.connected.set()

    def on_goodbye(self, goodbye: link_pb2.Goodbye) -> None:
        """The control plane ends the session."""
        self._goodbye = goodbye
        self.link.close()

    def _is_final(self) -> bool:
        match self._goodbye:
            case None:
                return False
            case link_pb2.Goodbye(reason=link_pb2.GOODBYE_REASON_SUPERSEDED, message=cause):
                raise Superseded(f"{self._agent_id}: {cause}; this one stops")
            case link_pb2.Goodbye(reason=link_pb2.GOODBYE_REASON_DEREGISTERED, message=cause):
                logger.warning("stopping", extra={"agent": self._agent_id, "cause": cause})
                return True
            case goodbye:
                raise Unavailable(goodbye.message)

    async def _drain(self, link: Link, call: Call) -> None:
        """Once stopped: say so, finish what is held, and end the stream in order, or in the end without."""
        await self._stopping.wait()
        link.drain()
        await self.executor.drain(self._drain_timeout)
        link.close()
        await asyncio.sleep(LAST_WORDS_S)
        call.cancel()

    def _hello(self, link: Link) -> link_pb2.Hello:
        message = hello()
        message.instance_id = self._instance_id
        message.description.CopyFrom(wire.description_to_proto(self._description, self._agent_id))
        message.sole = self._is_sole()
        message.held_task_ids.extend((*self.held, *(outcome.task_id for outcome in link.unsent())))
        return message
