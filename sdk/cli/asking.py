"""One question to the control plane, as the identity that the command acts as."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from parallax.sdk.cli.options import quiet_grpc, serve_no_metrics

if TYPE_CHECKING:
    from parallax.sdk.client import ParallaxClient

_T = TypeVar("_T")


def ask(question: Callable[[ParallaxClient], Awaitable[_T]]) -> _T:
    """The answer to *question*; the settings have been adopted before."""
    quiet_grpc()
    serve_no_metrics()
    import asyncio

    from parallax.sdk.client import ParallaxClient

    async def answer() -> _T:
        async with ParallaxClient() as client:
            return await question(client)

    return asyncio.run(answer())
