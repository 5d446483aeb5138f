"""Who makes a call: the one that is handled, and what it goes by in a log."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from parallax.runtime.address import host_of
from parallax.security.verification import Peer


@dataclass(frozen=True, slots=True)
class Anonymous:
    """A caller that no certificate vouches for: client certificates are not asked for."""

    def __str__(self) -> str:
        return "anonymous"


Caller = Peer | Anonymous


def name_of(caller: Caller | None) -> str:
    """*caller* for a log line."""
    return str(caller.identity) if isinstance(caller, Peer) else str(caller or "unknown")


_caller: ContextVar[Caller] = ContextVar("caller")


def current_caller() -> Caller:
    """Who makes the call that is being handled; set by the gate, from the certificate alone."""
    return _caller.get()


_source: ContextVar[str] = ContextVar("source", default="")


def current_source() -> str:
    """The address, without a port, from which the call that is being handled comes; "" outside of one."""
    return host_of(_source.get())


def set_current(caller: Caller, source: str) -> None:
    """Take note that *caller* makes this call, from *source*, the address as gRPC spells it."""
    _caller.set(caller)
    _source.set(source)
