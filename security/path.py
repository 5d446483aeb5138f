"""The way from a leaf to a root of the trust bundle (RFC 5280 §6)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509 import verification

from parallax.security.certificate import (
    MALFORMED,
    check_ca,
    check_validity,
    find_extension,
    is_signed_by,
    issuer_of,
    subject_of,
)
from parallax.security.errors import UntrustedChain, VerificationError
from parallax.security.identity import clip
from parallax.security.keys import check_strength

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from parallax.security.bundle import TrustBundle

MAX_SERIAL: Final = 20  # octets (RFC 5280 §4.1.2.2): who lists certificates relies on it
MAX_CHAIN: Final = 8  # leaf and intermediates; enough for any real PKI, and it bounds the work
SOUND_HASHES: Final = (hashes.SHA256, hashes.SHA384, hashes.SHA512)


def find_path(
    chain: Sequence[x509.Certificate], bundle: TrustBundle, now: datetime, *usages: x509.ObjectIdentifier
) -> tuple[x509.Certificate, ...]:
    """
    The certificates that prove *chain*'s leaf: leaf first, a root of *bundle* last.

    Signatures, names, validity, path length, name constraints, unknown critical extensions and
    the strength of every CA's key are checked by cryptography's verifier. Its defaults are the
    web's, which certificates made by hand with openssl do not meet; so the rules on extensions of
    CAs are ours: `check_ca`. Those on the leaf are the caller's.

    Args:
        chain: Leaf first, then intermediates in any order; the root may be there or not. Never empty.
        usages: The extended key usages of which no CA on the path may exclude any.

    Raises:
        UntrustedChain: There is no such path; the text names the link that fails.
        Expired: There would be one if a CA on it were within its validity.
    """
    if len(chain) > MAX_CHAIN:
        raise UntrustedChain(f"a chain of {len(chain)} certificates: {MAX_CHAIN} at most")
    try:
        _check_hash(chain[0])
        if chain[0].version is x509.Version.v1:
            return _path_of_v1(chain[0], bundle, now, usages)
        verified = _verifier(bundle, now, usages).verify(chain[0], list(chain[1:]))
    except (verification.VerificationError, *MALFORMED) as exc:
        raise _cause(chain, bundle, now, usages, str(exc)) from exc
    return tuple(verified.chain)


def _check_hash(leaf: x509.Certificate) -> None:
    used = leaf.signature_hash_algorithm
    if not isinstance(used, SOUND_HASHES):
        raise UntrustedChain(f"signed with {used.name if used else 'no hash'}: SHA-256, 384 or 512 is needed")


def _verifier(
    bundle: TrustBundle, now: datetime, usages: Sequence[x509.ObjectIdentifier]
) -> verification.ClientVerifier:
    """One that lets every leaf extension pass, and asks `check_ca` about each candidate CA."""

    def check(_: verification.Policy, candidate: x509.Certificate, __: x509.BasicConstraints) -> None:
        try:
            check_ca(candidate, usages)
        except VerificationError as exc:
            raise ValueError(str(exc)) from exc  # makes the verifier try the next candidate

    authorities = verification.ExtensionPolicy.permit_all().require_present(
        x509.BasicConstraints, verification.Criticality.AGNOSTIC, check
    )
    return (
        verification.PolicyBuilder()
        .store(verification.Store(list(bundle.roots)))
        .time(now)
        .extension_policies(ee_policy=verification.ExtensionPolicy.permit_all(), ca_policy=authorities)
        .build_client_verifier()
    )


def _path_of_v1(
    leaf: x509.Certificate, bundle: TrustBundle, now: datetime, usages: Sequence[x509.ObjectIdentifier]
) -> tuple[x509.Certificate, ...]:
    """
    The path of an X.509 v1 leaf, which cryptography's verifier never accepts.

    `openssl x509 -req` without an extension file makes one (OpenSSL 3.0). It must come from a root
    directly: so there is nothing to build, and what is left of RFC 5280 §6 is checked here.
    """
    if len(leaf.extensions):
        raise ValueError("an X.509 v1 certificate with extensions")
    if leaf.serial_number.bit_length() > 8 * MAX_SERIAL:
        raise ValueError(f"a serial number of more than {MAX_SERIAL} octets")
    for root in bundle.roots:
        if is_signed_by(leaf, root) and _may_issue(root, now, usages):
            return (leaf, root)
    raise ValueError("an X.509 v1 certificate that no root of the trust bundle issued itself")


def _may_issue(root: x509.Certificate, now: datetime, usages: Sequence[x509.ObjectIdentifier]) -> bool:
    try:
        check_validity(root, now)
        check_ca(root, usages)
        check_strength(root.public_key())
    except VerificationError:
        return False
    return True


def _cause(
    chain: Sequence[x509.Certificate],
    bundle: TrustBundle,
    now: datetime,
    usages: Sequence[x509.ObjectIdentifier],
    refusal: str,
) -> VerificationError:
    """
    Why there is no path, in words. Decides nothing: *chain* has been refused, as *refusal* says.

    Walks up from the leaf as far as names and signatures carry, roots first.
    """
    child, what = chain[0], ""
    known = [*bundle.roots, *chain[1:]]
    for depth in range(len(chain)):
        namesakes = [other for other in known if other.subject == child.issuer and other != child]
        signers = [other for other in namesakes if is_signed_by(child, other)]
        if not signers:
            why = "has another key there" if namesakes else "is not there"
            return UntrustedChain(f"{what}not issued by a CA of the trust bundle: {issuer_of(child)} {why}")
        issuer = signers[0]
        try:
            check_validity(issuer, now)
            check_ca(issuer, usages)
            _check_path_length(issuer, depth)
        except VerificationError as exc:
            return type(exc)(f"issuer {subject_of(issuer)}: {exc}")
        if issuer in bundle.roots:
            break
        child, what = issuer, f"intermediate {subject_of(issuer)}: "
    return UntrustedChain(f"no valid path to the trust bundle: {clip(refusal, 200)}")


def _check_path_length(issuer: x509.Certificate, below: int) -> None:
    constraints = find_extension(issuer, x509.BasicConstraints)
    limit = constraints.path_length if constraints else None
    if limit is not None and below > limit:
        raise UntrustedChain(f"path length {limit} exceeded")
