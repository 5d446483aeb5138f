"""Asking for a certificate (PKCS#10, RFC 2986): what a request proves, and what it may not ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtensionOID, NameOID

from parallax.security.certificate import MALFORMED
from parallax.security.errors import IdentityError, InvalidRequest, NotAuthorized, VerificationError
from parallax.security.identity import clip
from parallax.security.keys import check_strength
from parallax.security.profiles import names_of, parse_san

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parallax.security.identity import Identity
    from parallax.security.keys import PrivateKey, PublicKey

MAX_REQUEST_BYTES: Final = 16 * 1024  # with a key of RSA-4096 and a hundred names it has 6 KiB

# What tools put into a request by themselves; the issuer decides about all of them.
_IGNORED: Final = frozenset(
    {
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,  # which is looked at
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_KEY_IDENTIFIER,
    }
)


def new_request(identity: Identity, key: PrivateKey, sans: Sequence[str] = ()) -> bytes:
    """A request for a certificate of *identity* for *key*, DER; *sans* are names and addresses beside it."""
    names = names_of(identity, sans)
    builder = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.name)]))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def check_request(der: bytes, identity: Identity, sans: Sequence[str], taken: object) -> PublicKey:
    """
    The key that a certificate of *identity* is asked for; that its holder has the private half is proved.

    Whether the sender is *identity* is for the caller to know. Nothing in the request grants anything:
    what it names must be granted already.

    Args:
        sans: The names and addresses that the certificate will have beside those of *identity*.
        taken: A public key that the sender has a certificate for, which must not be used on.

    Raises:
        InvalidRequest: It is no request, is not signed with its own key, or asks for what is not given.
        NotAuthorized: It names somebody else, or a name that is not granted.
        VerificationError: The key is too weak.
    """
    request = _parse(der)
    key = check_strength(request.public_key())
    if key == taken:
        raise InvalidRequest("the request is for the key of the certificate in force; make a new key")
    for attribute in request.subject:
        if attribute.oid != NameOID.COMMON_NAME or attribute.value != identity.name:
            raise NotAuthorized(f"{identity} may not ask for the subject {clip(str(attribute.value))}")
    granted = set(names_of(identity, sans))
    for extension in request.extensions:
        if isinstance(extension.value, x509.SubjectAlternativeName):
            for name in extension.value:
                if _folded(name) not in granted:
                    raise NotAuthorized(f"{identity} may not ask for the name {clip(str(name.value))}")
        elif extension.oid not in _IGNORED:
            raise InvalidRequest(
                f"the request asks for extension {extension.oid.dotted_string}; leave it out"
            )
    return key


def _parse(der: bytes) -> x509.CertificateSigningRequest:
    if len(der) > MAX_REQUEST_BYTES:
        raise InvalidRequest(f"the request has {len(der):,} bytes, more than {MAX_REQUEST_BYTES:,}")
    try:
        request = x509.load_der_x509_csr(der)
        if not request.is_signature_valid:
            raise InvalidRequest("the request is not signed with the key that it is for")
        request.public_key(), request.subject, request.extensions
    except VerificationError:
        raise
    except (*MALFORMED, TypeError) as exc:
        raise InvalidRequest("not a certificate request (PKCS#10, DER), or a damaged one") from exc
    return request


def _folded(name: x509.GeneralName) -> x509.GeneralName:
    """*name* as `parse_san` writes it; one that is none stays as it is, and is granted to nobody."""
    if isinstance(name, x509.DNSName):
        try:
            return parse_san(name.value)
        except IdentityError:
            return name
    return name
