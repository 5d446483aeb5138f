"""What a port shows in its handshakes, and what it is to show from the next one on."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

import grpc

from parallax.security.tls import certificate_configuration

if TYPE_CHECKING:
    from collections.abc import Callable

    from parallax.security.credentials import Served


@dataclass(frozen=True, slots=True)
class _Armed:
    """What the next handshake puts in force, unless it comes too late."""

    served: Served
    configuration: grpc.ServerCertificateConfiguration
    until: float


class ServerSwap:
    """
    The credentials of one TLS port and whom it lets in, which change only while they may.

    gRPC core frees a TLS context as soon as it has another, though a handshake on another thread may be
    about to use it (grpc/grpc#36693). So nothing changes but what is armed, once, and for as long
    as somebody sees to it that the old context stays: see `ServerPort`.

    Args:
        verify_client: Refuse a client that presents no certificate of the trust bundle. Otherwise gRPC does
            not even ask for one, so nobody has an identity (both measured).
        clock: Seconds, monotonic.

    Attributes:
        in_force: What a handshake that begins now uses; connections keep what they began with.
        grpc_credentials: For one port, and for one only: gRPC takes each configuration once.
    """

    def __init__(
        self, initial: Served, *, verify_client: bool, clock: Callable[[], float] = monotonic
    ) -> None:
        self.in_force = initial
        self._clock = clock
        self._armed: _Armed | None = None
        self._lock = threading.Lock()  # between our thread and gRPC's; nobody waits for anything else in it
        self.grpc_credentials = grpc.dynamic_ssl_server_credentials(
            certificate_configuration(initial),
            self.fetch,  # type: ignore[arg-type]  # the stub forgets that None is an answer
            require_client_authentication=verify_client,
        )

    def arm(self, new: Served, until: float) -> None:
        """Let the next handshake put *new* in force, in place of what was armed; not after *until*."""
        armed = _Armed(new, certificate_configuration(new), until)
        with self._lock:
            self._armed = armed

    def disarm(self) -> Served:
        """What is in force, and stays so from here on."""
        with self._lock:
            self._armed = None
            return self.in_force

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """For gRPC, on its own thread before every handshake, one at a time; None keeps its TLS context."""
        return None if self._armed is None else self._take()

    def _take(self) -> grpc.ServerCertificateConfiguration | None:
        with self._lock:
            armed, self._armed = self._armed, None
            if armed is None or self._clock() > armed.until:
                return None
            self.in_force = armed.served
            return armed.configuration
