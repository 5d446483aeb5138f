"""Who may ask the HTTPS listener for something now: so often, and not after too many refusals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Final

from fastapi import Request

from parallax.control_plane.edge.allowance import Allowance, Limits, source_of
from parallax.runtime.http import Scope
from parallax.security.errors import EnrollmentError
from parallax.security.identity import Identity

_EVERYBODY: Final = ""


class Reception:
    """Lets in who asks for a name or a certificate, within *limits*, and remembers for whom that is."""

    def __init__(self, limits: Limits, trust_domain: str) -> None:
        self._trust_domain = trust_domain
        self._refusals = Allowance(limits.refusals)
        self._requests = Allowance(limits.requests)
        self._everybodys = Allowance(limits.everybody)

    @contextmanager
    def admitted(self, request: Request) -> Iterator[str]:
        """
        The address that *request* comes from, unless that is too often; a token that does not admit counts.

        Raises:
            Unavailable: It is.
        """
        host = host_of(request.scope)
        source, now = source_of(host), monotonic()
        self._refusals.check(source, now)
        self._requests.take(source, now)  # so that one source cannot use up what there is for all
        self._everybodys.take(_EVERYBODY, now)
        try:
            yield host
        except EnrollmentError:
            self._refusals.spend(source, monotonic())
            raise

    def named(self, short: str, request: Request) -> Identity:
        """The identity that *request* is for, in our trust domain; raises IdentityError."""
        identity = Identity.parse_short(short, self._trust_domain)
        request.state.wanted = str(identity)
        return identity

    def nameless(self, request: Request) -> None:
        """Remember that *request* is from a device that has no name."""
        request.state.wanted = "a device"


def host_of(scope: Scope) -> str:
    """The address that a request comes from."""
    return scope["client"][0] if scope.get("client") else ""


def wanted_of(scope: Scope) -> str:
    """For whom a request is, once a rate has limited it; "" before."""
    return str(scope.get("state", {}).get("wanted", ""))
