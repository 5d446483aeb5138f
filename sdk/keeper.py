"""Our credentials kept like their files, once for all who use the same."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from collections.abc import Hashable
    from datetime import timedelta

    from grpc import aio

    from parallax.runtime.certificates import Dial
    from parallax.runtime.connection import Connection
    from parallax.runtime.trust import BundleFollower
    from parallax.security.provider import MTLSCredentialsProvider
    from parallax.security.rotation import CertificateRotator

logger = logging.getLogger(__name__)

# To watch files costs 10 ms and some threads: a command that is over in a moment does without.
WATCH_AFTER_S: Final = 1.0


class Keeper:
    """
    Keeps the credentials of one identity like their files, while anybody in this event loop uses them.

    All who have the same files share one: each would take several threads and one of the 128 inotify
    instances that a user has, and a program may ask hundreds of agents.

    Attributes:
        provider: Makes channels with the credentials then in force.
    """

    def __init__(self, provider: MTLSCredentialsProvider, poll: timedelta) -> None:
        self.provider = provider
        self._poll = poll
        self._rotator: CertificateRotator | None = None
        self._users = 0
        self._keeping: asyncio.Task[None] | None = None
        self._dials: list[Dial] = []
        self._can_dial = asyncio.Event()
        self._follower: asyncio.Future[BundleFollower] = asyncio.get_running_loop().create_future()

    @classmethod
    def of(cls, provider: MTLSCredentialsProvider, poll: timedelta) -> Keeper:
        """
        The one for the files of *provider*, which has read them just now.

        Args:
            poll: How often to look at the files without being told of a change.
        """
        store = provider.store
        if store is None:
            return cls(provider, poll)
        key = asyncio.get_running_loop(), provider.identity, provider.source
        found = _keepers.get(key)
        if found is None:
            found = _keepers[key] = cls(provider, poll)
            return found
        shared = found.provider.store
        if shared is not None and shared.current.parts != store.current.parts:
            shared.publish(store.current, datetime.now(UTC))
        return found

    @property
    def problem(self) -> str:
        """What is wrong with the files, in a line with a remedy; empty while nothing is."""
        return self._rotator.status.reason if self._rotator is not None else ""

    def join(self, dial: Dial | None = None) -> None:
        """
        Use it, until `leave`.

        Args:
            dial: Opens a channel to a control plane that may renew the certificate, from then on.
        """
        self._users += 1
        if dial is not None:
            self._dials.append(dial)
            self._can_dial.set()
        if self._keeping is None and self.provider.store is not None:
            self._follower = asyncio.get_running_loop().create_future()
            self._keeping = asyncio.create_task(self._keep())  # ended by the last to leave

    async def leave(self, dial: Dial | None = None) -> None:
        """Use it no longer, as it was joined; the last to leave ends what it does."""
        self._users -= 1
        if dial is not None and len(self._dials) > 1:  # who goes on may know no other control plane
            self._dials.remove(dial)
        keeping = self._keeping
        if not self._users and keeping is not None:
            self._keeping = None
            keeping.cancel()
            await asyncio.wait({keeping})

    async def adopt(self, connection: Connection) -> None:
        """Keep the roots like those that are told on *connection*, to a control plane, until cancelled."""
        follower = await asyncio.shield(self._follower)
        await follower.run(connection)

    async def _keep(self) -> None:
        await asyncio.sleep(WATCH_AFTER_S)
        self._rotator = self.provider.rotator(self._poll)
        try:
            async with asyncio.TaskGroup() as group:
                if self._rotator is not None:
                    group.create_task(self._rotator.run())
                group.create_task(self._renew())
        except Exception:  # a bug of ours must not end what still works
            logger.exception("the certificate is neither followed nor renewed any more")

    async def _renew(self) -> None:
        """Have the certificate renewed, as soon as somebody knows a control plane."""
        await self._can_dial.wait()
        # Slow, and not for a command that is over soon.
        from parallax.runtime.certificates import new_renewer
        from parallax.runtime.trust import new_follower

        renewer = new_renewer(self.provider, self._rotator, self._dial_next)
        follower = new_follower(self.provider, self._rotator, renewer)
        if renewer is not None and follower is not None:
            self._follower.set_result(follower)
            await renewer.run()

    def _dial_next(self) -> aio.Channel:
        """To one control plane after the other: one of them may be away, and another be there."""
        self._dials.append(self._dials.pop(0))
        return self._dials[-1]()


_keepers: WeakValueDictionary[Hashable, Keeper] = WeakValueDictionary()
