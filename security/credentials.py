"""What this process proves its identity with, as one value that is swapped whole."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cryptography import x509

from parallax.security.bundle import certificates_to_pem
from parallax.security.certificate import find_extension
from parallax.security.errors import UntrustedChain, WrongIdentity
from parallax.security.identity import Kind
from parallax.security.keys import fits, key_to_pem
from parallax.security.pinned import NO_PINS, check_self_signed, is_self_signed
from parallax.security.verification import Usage, authenticate

if TYPE_CHECKING:
    from datetime import datetime

    from cryptography.x509 import Certificate

    from parallax.security.bundle import TrustBundle
    from parallax.security.identity import Identity
    from parallax.security.keys import PrivateKey
    from parallax.security.pinned import Pins


@dataclass(frozen=True, slots=True, eq=False)
class Credentials:
    """
    One snapshot of chain, key and trust bundle; two are equal only if they are the same object.

    Whether the parts belong together is for `check_usable` to say.

    Attributes:
        chain: Leaf first, then intermediates; no root (RFC 8446 §4.4.2 lets it be omitted).
        bundle: The roots that peers are verified against.
        chain_pem, key_pem: As gRPC takes them: PEM, the key PKCS#8 and not encrypted.
    """

    chain: tuple[Certificate, ...]
    key: PrivateKey = field(repr=False)
    bundle: TrustBundle
    chain_pem: bytes = field(init=False, repr=False)
    key_pem: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Made here, not at first use: gRPC's thread asks for them in the middle of a handshake.
        object.__setattr__(self, "chain_pem", certificates_to_pem(self.chain))
        object.__setattr__(self, "key_pem", key_to_pem(self.key))

    @property
    def leaf(self) -> Certificate:
        """The certificate that names us."""
        return self.chain[0]

    @property
    def bundle_pem(self) -> bytes:
        """The roots, PEM, never empty."""
        return self.bundle.pem

    @property
    def parts(self) -> tuple[bytes, bytes, bytes]:
        """Chain, key and roots as PEM: equal where the material is, whatever files it came from."""
        return self.chain_pem, self.key_pem, self.bundle_pem


@dataclass(frozen=True, slots=True)
class Served:
    """What a server shows in a handshake, and whom it lets in: by the bundle, and by name."""

    credentials: Credentials
    pins: Pins = NO_PINS

    @property
    def roots_pem(self) -> bytes:
        """What gRPC is to let in by, never empty. Whom that really is, is for the gate to find out."""
        return self.credentials.bundle_pem + self.pins.pem


def has_another_leaf(used: Credentials | None, in_force: Credentials | None) -> bool:
    """Whether the certificate *used* is not the one *in_force*; never in plaintext, which has none."""
    return used is not None and in_force is not None and used.chain != in_force.chain


def gives_way(used: Credentials | None, in_force: Credentials | None) -> bool:
    """
    Whether what was made with *used* is to be made again, with what is *in_force*.

    Not where roots were added alone: it was proved then what would be proved now.
    """
    if used is None or in_force is None:
        return False
    return has_another_leaf(used, in_force) or not set(used.bundle.roots) <= set(in_force.bundle.roots)


def may_stay(used: Credentials | None, in_force: Credentials | None) -> bool:
    """
    Whether what was made with *used* may stay in use where a peer does not let in what is *in_force*.

    Not if some roots were taken out and others stay: the peer may be whom we are to trust no longer. Where
    all roots are others, the files are rather somebody else's.
    """
    if used is None or in_force is None:
        return False
    before, after = set(used.bundle.roots), set(in_force.bundle.roots)
    return before <= after or not before & after


def serves_only(leaf: Certificate) -> bool:
    """Whether *leaf* is good for the server's end of a connection alone."""
    extended = find_extension(leaf, x509.ExtendedKeyUsage)
    return extended is not None and Usage.CLIENT.oid not in extended


def check_usable(credentials: Credentials, identity: Identity, now: datetime) -> None:
    """
    Pass if *credentials* prove *identity* at *now*, to whoever trusts the same bundle or has pinned the leaf.

    A leaf that is self-signed is a device's, which its peers pin: whether they do, only they know. Another
    leaf must be good for the client's end of a connection, a service's for either end: a certificate for
    servers alone (cert-manager's default) is enough to serve with.

    Raises:
        VerificationError: The key does not fit, or the certificate would be refused.
        WrongIdentity: It proves somebody else.
        IdentityError: It does not name exactly one identity.
    """
    if not credentials.chain:
        raise UntrustedChain("there is no certificate")
    if not fits(credentials.key, credentials.leaf):
        raise UntrustedChain("the key does not fit the certificate")
    if len(credentials.chain) == 1 and is_self_signed(credentials.leaf):
        proved = check_self_signed(credentials.leaf, identity.trust_domain, now)
    else:
        proved = _authenticate(credentials, identity, now)
    if proved != identity:
        raise WrongIdentity(f"it belongs to {proved}, not to {identity}")


def _authenticate(credentials: Credentials, identity: Identity, now: datetime) -> Identity:
    only_serves = identity.kind is Kind.SERVICE and serves_only(credentials.leaf)
    usage = Usage.SERVER if only_serves else Usage.CLIENT
    return authenticate(credentials.chain, credentials.bundle, identity.trust_domain, now, usage).identity


class CredentialStore:
    """
    The credentials in force, replaced whole and only by usable ones; and whom a server lets in beside.

    Args:
        identity: Whose credentials these are, for ever: replacements must prove the same.

    Attributes:
        current: A plain attribute, because gRPC's own thread reads it at every handshake; set by
            `publish` alone.
        pins: Likewise, set by `pin`. What we dial trusts the bundle alone.

    Raises:
        VerificationError, IdentityError: *initial* is not usable, see `check_usable`.
    """

    def __init__(self, identity: Identity, initial: Credentials, now: datetime) -> None:
        check_usable(initial, identity, now)
        self.identity = identity
        self.current = initial
        self.pins = NO_PINS
        self._changed = asyncio.Event()

    def publish(self, new: Credentials, now: datetime) -> None:
        """
        Put *new* in force for every handshake from here on. Call it in the loop that waits in `changed`.

        Raises:
            VerificationError, IdentityError: *new* is not usable; what was in force stays so.
        """
        check_usable(new, self.identity, now)
        self.current = new
        self._wake()

    def pin(self, pins: Pins) -> None:
        """Let *pins* in from here on, in place of those before. Call it in the loop of `publish`."""
        self.pins = pins
        self._wake()

    async def changed(self, seen: Credentials | None) -> Credentials:
        """The current credentials, once they are others than *seen*; changes in between may go unseen."""
        while self.current is seen:
            await self._changed.wait()
        return self.current

    @property
    def served(self) -> Served:
        """What a server shows now, and whom it lets in."""
        return Served(self.current, self.pins)

    async def served_other(self, seen: Served) -> Served:
        """The same, once it is other than *seen*; see `changed`."""
        while self.served == seen:
            await self._changed.wait()
        return self.served

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()  # the old one has woken its waiters; nobody waits on this yet
