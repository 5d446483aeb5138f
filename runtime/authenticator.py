"""Who a caller is, by the certificate of his connection: verified once, and looked at with each call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from cryptography.x509 import Certificate
from grpc import aio

from parallax.runtime.caller import Anonymous, Caller
from parallax.security.bundle import TrustBundle, parse_certificates
from parallax.security.credentials import CredentialStore
from parallax.security.errors import ConfigError, Expired, IdentityError, VerificationError
from parallax.security.identity import Identity
from parallax.security.pinned import NO_PINS, authenticate_pinned, is_self_signed
from parallax.security.verification import Peer, Usage, authenticate

MAX_KNOWN_LEAVES: Final = 10_000  # what the cache of verified leaves may hold; about 1.5 KiB each
MAX_COPIES: Final = 32  # of one identity: processes that share it, and what each has had before

Context = aio.ServicerContext[Any, Any]
OnVerified = Callable[[Peer, Certificate], bool]
CheckRevoked = Callable[[Peer], None]


class Authenticator:
    """
    Finds the peer of a call in the certificate of its connection.

    A leaf is verified once and then known by its PEM bytes until the roots of the trust bundle or the pins
    change, or its identity has come with `MAX_COPIES` others. Its validity is compared at every call, for
    connections outlive it.

    Args:
        store: What this server trusts; None where client certificates are not asked for.
        on_verified: Told whenever a leaf that was not known has been verified, one that is revoked, too;
            False: tell it again.
        check_revoked: Asked at every call, for a revocation has no time to lose; raises Revoked.
    """

    def __init__(
        self,
        store: CredentialStore | None,
        trust_domain: str,
        clock: Callable[[], datetime],
        on_verified: OnVerified = lambda _peer, _leaf: True,
        check_revoked: CheckRevoked = lambda _peer: None,
    ) -> None:
        self.check_revoked = check_revoked
        self._store = store
        self._trust_domain = trust_domain
        self._clock = clock
        self._on_verified = on_verified
        self._bundle: TrustBundle | None = None
        self._pins = NO_PINS
        self._known: dict[bytes, Peer] = {}
        self._copies: dict[Identity, list[bytes]] = {}  # the leaves known, the oldest first

    def authenticate(self, context: Context) -> Caller:
        """
        The caller behind *context*, who need not be let in: see `check`.

        Raises:
            VerificationError: There is no certificate, it must not be trusted, or it names no one identity.
        """
        if self._store is None:
            return Anonymous()
        connection: Mapping[str, Sequence[bytes]] = context.auth_context()  # type: ignore[assignment]
        leaf = connection.get("x509_pem_cert")
        if not leaf:
            raise VerificationError("the caller showed no certificate")
        bundle = self._store.current.bundle
        if bundle is not self._bundle:  # as after every rotation; most leave the roots as they were
            if bundle != self._bundle:
                self._forget()
            self._bundle = bundle
        if self._store.pins is not self._pins:
            self._pins = self._store.pins
            self._forget()
        peer = self._known.get(leaf[0])
        if peer is None:
            above = connection.get("x509_pem_cert_chain", ())
            peer, certificate = self._verify(leaf[0], above, bundle, self._clock())
            if self._on_verified(peer, certificate):
                self._remember(leaf[0], peer)
        return peer

    def check(self, caller: Caller) -> None:
        """
        Pass if the certificate of *caller* is good at this moment.

        Raises:
            Revoked: It is withdrawn.
            Expired: It has ended.
        """
        if not isinstance(caller, Peer):
            return
        self.check_revoked(caller)
        if self._clock() > caller.not_after:
            raise Expired(
                f"the certificate of {caller.identity} expired at {caller.not_after:%Y-%m-%dT%H:%M:%SZ}"
            )

    def _remember(self, leaf: bytes, peer: Peer) -> None:
        if len(self._known) >= MAX_KNOWN_LEAVES:
            self._forget()
        copies = self._copies.setdefault(peer.identity, [])
        if len(copies) >= MAX_COPIES:
            del self._known[copies.pop(0)]
        copies.append(leaf)
        self._known[leaf] = peer

    def _forget(self) -> None:
        self._known.clear()
        self._copies.clear()

    def _verify(
        self, leaf: bytes, above: Sequence[bytes], bundle: TrustBundle, now: datetime
    ) -> tuple[Peer, Certificate]:
        """
        Who *leaf* says it is; *above* are the intermediates, which gRPC hands out without the leaf.

        The handshake took pinned certificates for CAs. Here only the bundle has CAs, and who signed for
        himself is looked for among the pins alone.
        """
        try:
            certificates = parse_certificates(b"\n".join(pem for pem in (leaf, *above) if pem))
            if len(certificates) == 1 and is_self_signed(certificates[0]):
                peer = authenticate_pinned(certificates[0], self._pins, self._trust_domain, now)
            else:
                peer = authenticate(certificates, bundle, self._trust_domain, now, Usage.CLIENT)
        except (ConfigError, IdentityError) as exc:
            # Here it is the peer's proof that is unusable, not our deployment nor a request.
            raise VerificationError(f"the caller's certificate: {exc}") from exc
        return peer, certificates[0]
