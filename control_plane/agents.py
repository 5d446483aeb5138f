"""The agents at work: who is registered, connected or dialled, and what each is asked."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, Self

from parallax.control_plane.agent_link import Fleet
from parallax.control_plane.agent_proxy import AgentProxies
from parallax.control_plane.dispatch import Dispatcher
from parallax.control_plane.registry import AgentRecord, AgentRef, Registry
from parallax.control_plane.sessions import Sessions
from parallax.control_plane.views import Views
from parallax.control_plane.watch import Changes, Watched
from parallax.runtime.clock import utc_now
from parallax.runtime.deadlines import GRAIN_S
from parallax.runtime.dialling import Dialling
from parallax.runtime.handshakes import Side
from parallax.security.errors import Revoked as RevokedError

if TYPE_CHECKING:
    from parallax.control_plane.metrics import ControlPlaneMetrics
    from parallax.control_plane.own_identities import OwnIdentities
    from parallax.control_plane.revocations import RevocationLog
    from parallax.control_plane.revoked import Revoked
    from parallax.control_plane.supervision import Loop
    from parallax.runtime.settings import Settings
    from parallax.security.identity import Identity
    from parallax.security.revocation import Revocations


@dataclass(frozen=True, slots=True)
class Agents:
    """
    Whoever works, wired: each part hears from the others what concerns it.

    Args:
        changes: What those are told who watch.
        proxies: Keep links to agents that listen.
        dialling: How these come about.
        revocations: In force.
    """

    fleet: Fleet
    changes: Changes
    proxies: AgentProxies
    dialling: Dialling
    revocations: Revocations

    @classmethod
    def new(
        cls,
        settings: Settings,
        own: OwnIdentities,
        revocations: RevocationLog,
        metrics: ControlPlaneMetrics,
    ) -> Self:
        """Nobody yet."""
        registry = Registry(settings.lease)
        dispatcher = Dispatcher(queue_limit=settings.queue_limit, on_result=metrics.task_ended)
        roster = Watched(dispatcher)
        sessions = Sessions(registry, roster, lambda _: metrics.take_overs.inc())
        changes = Changes(Views(registry, sessions), secrets.randbits(64))
        fleet = Fleet(registry, sessions, dispatcher, utc_now, settings.max_payload_bytes, settings.drain)
        dialling = Dialling()
        if len(own.providers) > 1:  # else nobody is dialled, or without TLS
            dialling.on_let_in = metrics.handshakes.timer(Side.PEER)
        proxies = AgentProxies(fleet, own.dialler, dialling)
        agents = cls(fleet, changes, proxies, dialling, revocations.current)
        roster.note = changes.note
        registry.on_change = agents._note
        dispatcher.why_absent = proxies.why_absent
        dispatcher.on_answered = sessions.settle
        revocations.follow(agents._revoked)
        return agents

    @property
    def identities(self) -> frozenset[Identity]:
        """Who is registered, as far as a certificate says."""
        return frozenset(record.identity for record in self.fleet.registry.records() if record.identity)

    @property
    def loops(self) -> tuple[Loop, ...]:
        """What ends leases and tasks in time, and dials, until cancelled."""
        return (self._expire_leases, self._expire_tasks, self.proxies.run)

    async def dismiss(self) -> None:
        """End all sessions: the control plane stops."""
        self.changes.close()  # first: that all agents leave now is no news about them
        self.fleet.sessions.end_all()
        await self.proxies.close()

    def _note(self, ref: AgentRef) -> None:
        self.changes.note(ref)
        self.proxies.note(ref)

    def _revocation(self, record: AgentRecord) -> RevokedError | None:
        """How what proved the registration in *record* is revoked, if it is."""
        proof = record.registration.proof if record.registration is not None else None
        try:
            if proof is not None:
                self.revocations.check(proof)
        except RevokedError as exc:
            return exc.with_traceback(None)
        return None

    def _revoked(self, entry: Revoked) -> None:
        """Forget the registrations that *entry* disproves: nobody sees the certificate of whom he dials."""
        registry = self.fleet.registry
        if entry.identity is None:
            records = registry.records()
        else:
            found = registry.find(AgentRef(entry.identity.name))
            records = [found] if found is not None and found.identity == entry.identity else []
        for record in records:
            cause = self._revocation(record)
            if cause is not None:
                self.proxies.revoke(record.ref, cause)
                registry.unregister(record.ref)

    async def _expire_leases(self) -> None:
        pause = min(1.0, self.fleet.registry.lease / timedelta(seconds=10))
        while True:
            await asyncio.sleep(pause)
            self.fleet.sessions.expire(monotonic())

    async def _expire_tasks(self) -> None:
        while True:
            await asyncio.sleep(GRAIN_S)
            self.fleet.dispatcher.expire(monotonic())
