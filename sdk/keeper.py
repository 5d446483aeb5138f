"""Our credentials kept like their files, once for all who use the same."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias
from weakref import WeakValueDictionary

from parallax.runtime.channel import channel_options
from parallax.runtime.connection import Connection
from parallax.runtime.dialling import Dialling
from parallax.runtime.following import Followers
from parallax.runtime.outcome import MAX_PAYLOAD_BYTES
from parallax.security.errors import ConfigError, Unavailable
from parallax.security.identity import control_plane

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable

    from grpc import aio

    from parallax.runtime.certificates import Dial
    from parallax.runtime.following import Follows
    from parallax.runtime.renewal import Renewer
    from parallax.runtime.revocations import RevocationFollower
    from parallax.runtime.telemetry import MetricsListener
    from parallax.runtime.trust import BundleFollower
    from parallax.security.credentials import CredentialStore
    from parallax.security.provider import MTLSCredentialsProvider
    from parallax.security.rotation import CertificateRotator

logger = logging.getLogger(__name__)

# To watch files costs 10 ms and some threads: a command that is over in a moment does without.
WATCH_AFTER_S: Final = 1.0
SILENCE: Final = timedelta(minutes=5)  # until a control plane is asked once more what is revoked

Heed: TypeAlias = "Callable[[RevocationFollower], None]"


class Keeper:
    """
    Keeps the credentials of one identity like their files, while anybody in this event loop uses them.

    All who have the same files share one: each would take several threads and one of the 128 inotify
    instances that a user has, and a program may ask hundreds of agents.

    Attributes:
        provider: Makes channels with the credentials then in force.
        dialling: How connections fare that present them.
    """

    def __init__(
        self, provider: MTLSCredentialsProvider, poll: timedelta, metrics_listen: str | None = None
    ) -> None:
        self.provider = provider
        self.dialling = Dialling()
        self._poll = poll
        self._metrics_listen = metrics_listen
        self._rotator: CertificateRotator | None = None
        self._renewers: list[Renewer] = []  # one, while it renews
        self._users = 0
        self._keeping: asyncio.Task[None] | None = None
        self._followed: dict[str, _Followed] = {}  # by address
        self._can_dial = asyncio.Event()
        self._follower: asyncio.Future[BundleFollower] = asyncio.get_running_loop().create_future()

    @classmethod
    def of(
        cls, provider: MTLSCredentialsProvider, poll: timedelta, metrics_listen: str | None = None
    ) -> Keeper:
        """
        The one for the files of *provider*, which has read them just now.

        Args:
            poll: How often to look at the files without being told of a change.
            metrics_listen: Where to show how it stands with them, while it is kept; None: nowhere.
        """
        store = provider.store
        if store is None:
            return cls(provider, poll)
        key = asyncio.get_running_loop(), provider.identity, provider.source
        found = _keepers.get(key)
        if found is None:
            found = _keepers[key] = cls(provider, poll, metrics_listen)
            return found
        shared = found.provider.store
        if shared is not None and shared.current.parts != store.current.parts:
            shared.publish(store.current, datetime.now(UTC))
        return found

    @property
    def problem(self) -> str:
        """What is wrong with the files, in a line with a remedy; empty while nothing is."""
        return self._rotator.status.reason if self._rotator is not None else ""

    def join(
        self,
        address: str | None = None,
        connection: Connection | None = None,
        heed: Heed | None = None,
    ) -> Callable[[], Awaitable[None]]:
        """
        Use it, until what this gives is called; the last to leave ends what it does.

        Args:
            address: Of a control plane that renews the certificate and tells whom to trust, if there is one.
            connection: A client's own to it, to be told on; without any, all who name it share another.
            heed: Called with what is known to be revoked, now and after each change.
        """
        self._users += 1
        store = self.provider.store
        if self._keeping is None and store is not None:
            self._follower = asyncio.get_running_loop().create_future()
            if self._metrics_listen is not None:
                self.dialling.expect()
            self._keeping = asyncio.create_task(self._keep(store))  # ended by the last to leave
        if address is None or store is None:
            return self._leave
        followed = self._followed.get(address)
        if followed is None:
            options = channel_options(MAX_PAYLOAD_BYTES)
            expected = control_plane(self.provider.identity.trust_domain)
            dial = partial(self.provider.channel, address, expected, options)
            followed = self._followed[address] = _Followed(dial, store, self._follower)
            self._can_dial.set()
        user = followed.join(connection, heed)

        async def leave() -> None:
            if followed.is_last:
                del self._followed[address]
            await followed.leave(user)
            await self._leave()

        return leave

    async def _leave(self) -> None:
        self._users -= 1
        keeping = self._keeping
        if not self._users and keeping is not None:
            self._keeping = None
            keeping.cancel()
            await asyncio.wait({keeping})

    async def _keep(self, store: CredentialStore) -> None:
        await asyncio.sleep(WATCH_AFTER_S)
        self._rotator = self.provider.rotator(self._poll)
        try:
            async with asyncio.TaskGroup() as group:
                if self._rotator is not None:
                    group.create_task(self._rotator.run())
                group.create_task(self._renew())
                if self._metrics_listen is not None:
                    group.create_task(self._show(self._metrics_listen, store))
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
            self._renewers.append(renewer)
            try:
                await renewer.run()
            finally:
                self._renewers.remove(renewer)

    async def _show(self, address: str, store: CredentialStore) -> None:
        """Serve metrics at *address*; where that cannot be, calls go on without."""
        new_listener = await asyncio.to_thread(_import_showing)
        rotators = [self._rotator] if self._rotator is not None else []
        listener = new_listener(address, self.provider, store, rotators, self._renewers, self.dialling)
        extra = {"identity": str(self.provider.identity)}
        try:
            async with listener:
                logger.info("metrics ready", extra=extra | {"metrics_port": listener.port})
                await asyncio.get_running_loop().create_future()
        except ConfigError as exc:  # another process here has the same setting, or this one has an agent
            logger.warning("metrics are not served", extra=extra | {"cause": str(exc)})

    def _dial_next(self) -> aio.Channel:
        """To one control plane after the other: one of them may be away, and another be there."""
        for address in self._followed:
            followed = self._followed[address] = self._followed.pop(address)
            return followed.dial()
        raise Unavailable("there is no control plane to ask any more")


@dataclass(frozen=True, slots=True, eq=False)
class _User:
    """Who names a control plane; see `Keeper.join`."""

    connection: Connection | None
    heed: Heed | None


class _Followed:
    """
    One control plane that tells whom to trust, for all who name it: on one connection.

    That is a client's, while there is one. Else it is another, with no call on it that would have to end
    in order: a new certificate gets a new one. What is revoked is asked for while somebody heeds it.

    Attributes:
        dial: Opens a channel to it with the credentials then in force.
    """

    def __init__(self, dial: Dial, store: CredentialStore, follower: asyncio.Future[BundleFollower]) -> None:
        self.dial = dial
        self._store = store
        self._follower = follower
        self._users: list[_User] = []
        self._revocations: RevocationFollower | None = None  # once somebody has wanted to know
        self._following: asyncio.Task[None] | None = None
        self._running: asyncio.Task[None] | None = asyncio.create_task(self._run())  # ended by the last

    @property
    def is_last(self) -> bool:
        """Whether nobody but one names it any more."""
        return len(self._users) == 1

    def join(self, connection: Connection | None, heed: Heed | None) -> _User:
        """Use it, until what this gives leaves."""
        user = _User(connection, heed)
        is_first = heed is not None and not self._is_heeded
        self._users.append(user)
        if heed is not None and self._revocations is not None:
            heed(self._revocations)
        if connection is not None or is_first:
            self._choose_again()
        return user

    async def leave(self, user: _User) -> None:
        """Use it no longer, as *user*; nothing is told on its connection any more."""
        self._users.remove(user)
        running = self._running
        if not self._users and running is not None:
            running.cancel()
            await asyncio.wait({running})
            self._running = self._following = None  # their tracebacks hold calls, and these a channel
        elif user.connection is not None and (following := self._choose_again()) is not None:
            await asyncio.wait({following})

    @property
    def _is_heeded(self) -> bool:
        return any(user.heed is not None for user in self._users)

    def _choose_again(self) -> asyncio.Task[None] | None:
        """Have `_run` follow on what is the best now; what ends, if it has begun."""
        following = self._following
        if following is not None and not following.cancelling():  # twice, and it would not close in order
            following.cancel()
        return following

    async def _run(self) -> None:
        try:
            follower = await asyncio.shield(self._follower)
            while True:
                self._following = following = asyncio.create_task(self._follow(follower))
                try:
                    await asyncio.wait({following})
                finally:
                    self._choose_again()
                    await asyncio.wait({following})
                if not following.cancelled():
                    following.result()
        except Exception:  # a bug of ours must not end what still works
            logger.exception("the roots are not followed any more")

    async def _follow(self, roots: BundleFollower) -> None:
        """On the best connection now, until cancelled."""
        told: Follows = roots
        if self._is_heeded:
            told = Followers((roots, self._known()))
        lent = next(filter(None, (user.connection for user in self._users)), None)
        if lent is not None:
            await told.run(lent)
        while True:
            seen = self._store.current
            own = Connection(self.dial, None, "the control plane")
            async with own.following(), told.following(own):
                await self._store.changed(seen)

    def _known(self) -> RevocationFollower:
        """What is known to be revoked."""
        from parallax.runtime.revocations import RevocationFollower  # slow, as above

        if self._revocations is None:
            self._revocations = known = RevocationFollower(SILENCE, identities_only=True)
            known.on_change = self._tell
        return self._revocations

    def _tell(self) -> None:
        for user in self._users:
            if user.heed is not None and self._revocations is not None:
                user.heed(self._revocations)


def _import_showing() -> Callable[..., MetricsListener]:
    from parallax.sdk.showing import new_listener  # a quarter of a second, in which calls go on

    return new_listener


_keepers: WeakValueDictionary[Hashable, Keeper] = WeakValueDictionary()
