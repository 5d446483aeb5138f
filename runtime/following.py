"""Following what the control plane tells, for as long as there is a connection to it."""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from parallax.runtime.backoff import backoff_s

if TYPE_CHECKING:
    from parallax.runtime.connection import Connection, Line


class Follows(ABC):
    """Somebody who listens to what is told, as beside a session or a registration."""

    @abstractmethod
    async def follow(self, line: Line) -> None:
        """Follow what is told on *line*, until it is retired."""

    async def run(self, connection: Connection) -> None:
        """Follow what is told on *connection*, until cancelled."""
        while True:
            await self.follow(connection.use())

    @asynccontextmanager
    async def following(self, connection: Connection) -> AsyncGenerator[None]:
        """The same for as long as the block."""
        task = asyncio.create_task(self.run(connection))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})


class Follower(Follows):
    """Listens to one stream of the control plane's, again and again."""

    def __init__(self) -> None:
        self._one_at_a_time = asyncio.Lock()

    async def follow(self, line: Line) -> None:
        """
        Follow what is told on *line*, until it is retired.

        Of several lines at once one is listened to, for as long as somebody speaks there.
        """
        if line.is_retired:
            return
        with line:
            following = asyncio.create_task(self._ask_again(line))
            stays = line.on_retire(following.cancel)
            try:
                await asyncio.wait({following})
            finally:
                stays()
                following.cancel()
                await asyncio.wait({following})

    async def _ask_again(self, line: Line) -> None:
        """Until cancelled; a control plane that is away is asked again, ever more rarely."""
        attempt = 0
        while True:
            async with self._one_at_a_time:
                if await self._listen(line):
                    attempt = 0
            await asyncio.sleep(backoff_s(attempt, random.random()))  # noqa: S311 - spreads load, hides nothing
            attempt += 1

    @abstractmethod
    async def _listen(self, line: Line) -> bool:
        """Follow what is told until that ends; whether it went well once: what never does is tried rarely."""


class Followers(Follows):
    """Several at once, on one connection."""

    def __init__(self, followers: Sequence[Follower]) -> None:
        self._followers = followers

    async def follow(self, line: Line) -> None:
        """See `Follows.follow`."""
        async with asyncio.TaskGroup() as group:
            for each in self._followers:
                group.create_task(each.follow(line))
