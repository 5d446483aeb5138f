"""Asking for a certificate (PKCS#10, RFC 2986): what a request proves, and what it may not ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from parallax.security.certificate import MALFORMED
from parallax.security.errors import (
    IdentityError,
    InvalidRequest,
    NotAuthorized,
    VerificationError,
)
from parallax.security.identity import clip
from parallax.security.issuance_policy import IssuancePolicy
from parallax.security.keys import NEEDED, check_cost, check_strength, key_id
from parallax.security.profiles import names_of, parse_san

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parallax.security.identity import Identity
    from parallax.security.keys import PrivateKey, PublicKey

MAX_REQUEST_BYTES: Final = 16 * 1024  # with a key of RSA-4096 and a hundred names it has 6 KiB

_HASHES: Final = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
_USAGES: Final = frozenset(
    oid.dotted_string for oid in (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)
)
_NEVER: Final = {  # RFC 5280 §4.2.1.3: what a leaf's key is not for
    "nonRepudiation": "content_commitment",
    "dataEncipherment": "data_encipherment",
    "keyAgreement": "key_agreement",
    "keyCertSign": "key_cert_sign",
    "cRLSign": "crl_sign",
}
# Where extensions are asked for: PKCS#9, and Microsoft's own.
_EXTENSION_REQUESTS: Final = frozenset({"1.2.840.113549.1.9.14", "1.3.6.1.4.1.311.2.1.14"})


def new_request(identity: Identity, key: PrivateKey, sans: Sequence[str] = ()) -> bytes:
    """A request for a certificate of *identity* for *key*, DER; *sans* are names and addresses beside it."""
    names = names_of(identity, sans)
    builder = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.name)]))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def check_request(
    der: bytes,
    identity: Identity,
    sans: Sequence[str],
    taken: object,
    policy: IssuancePolicy = IssuancePolicy(),  # noqa: B008 - frozen
) -> PublicKey:
    """
    The key that a certificate of *identity* is asked for; that its holder has the private half is proved.

    Whether the sender is *identity* is for the caller to know. Nothing in the request grants anything:
    what it names must be granted already. Attributes that ask for nothing, as a challenge password, are
    passed over.

    Args:
        sans: The names and addresses that the certificate will have beside those of *identity*.
        taken: A public key that the sender has a certificate for, which must not be used on; None if none.
        policy: What the certificate may be like.

    Raises:
        InvalidRequest: It is no request, is not signed with its own key, asks for what is not given, or
            its key or signature is too weak.
        NotAuthorized: It names somebody else, or a name that is not granted; or the policy does not admit
            its key, or one of *sans*.
    """
    if len(der) > MAX_REQUEST_BYTES:
        raise InvalidRequest(f"the request has {len(der):,} bytes, more than {MAX_REQUEST_BYTES:,}")
    rule = policy.rule_for(identity)
    rule.check_sans(sans)
    try:
        request = x509.load_der_x509_csr(der)
        key = _key_of(request)
        if key == taken:
            raise InvalidRequest("the request is for the key of the certificate in force; make a new key")
        rule.check_key(key)
        _check_signature(request)
        _check_subject(request, identity)
        _check_extensions(request, identity, sans)
    except (*MALFORMED, UserWarning) as exc:  # parts are parsed at first use; of odd names cryptography warns
        raise InvalidRequest("not a certificate request (PKCS#10, DER), or a damaged one") from exc
    return key


def _key_of(request: x509.CertificateSigningRequest) -> PublicKey:
    """Its key, looked at before anything is verified with it."""
    try:
        return check_cost(check_strength(request.public_key()))
    except VerificationError as exc:
        raise InvalidRequest(f"the request is for a key that no certificate is issued for: {exc}") from None
    except UnsupportedAlgorithm:
        raise InvalidRequest(f"the request is for a key of an unknown algorithm: {NEEDED}") from None


def _check_signature(request: x509.CertificateSigningRequest) -> None:
    """Pass if the holder of its key has signed it, in a way that nobody else can have."""
    wanted = "sign it with SHA-256, SHA-384 or SHA-512"
    try:
        algorithm = request.signature_hash_algorithm
    except UnsupportedAlgorithm:
        raise InvalidRequest(f"the request is signed with an unknown algorithm; {wanted}") from None
    if not isinstance(algorithm, _HASHES):
        name = algorithm.name.upper() if algorithm else "no hash"
        raise InvalidRequest(f"the request is signed with {name}; {wanted}")
    if not request.is_signature_valid:
        raise InvalidRequest("the request is not signed with the key that it is for")


def _check_subject(request: x509.CertificateSigningRequest, identity: Identity) -> None:
    for attribute in request.subject:
        if attribute.oid != NameOID.COMMON_NAME or attribute.value != identity.name:
            raise NotAuthorized(f"{identity} may not ask for the subject {clip(str(attribute.value))}")


def _check_extensions(
    request: x509.CertificateSigningRequest, identity: Identity, sans: Sequence[str]
) -> None:
    """Pass if nothing is asked for but what a leaf has anyway: the issuer decides about all of it."""
    if sum(each.oid.dotted_string in _EXTENSION_REQUESTS for each in request.attributes) > 1:
        raise InvalidRequest("the request asks for extensions in more than one place; make it one")
    granted = set(names_of(identity, sans))
    for extension in request.extensions:
        if isinstance(extension.value, x509.SubjectAlternativeName):
            for name in extension.value:
                if _folded(name) not in granted:
                    raise NotAuthorized(f"{identity} may not ask for the name {clip(str(name.value))}")
        elif beyond := _beyond(extension.value):
            raise InvalidRequest(f"the request asks for {beyond}; leave it out")


def parse_request(pem: str) -> bytes:
    """The DER of the request in *pem* (RFC 7468), unchecked; raises InvalidRequest if there is none."""
    try:
        return x509.load_pem_x509_csr(pem.encode()).public_bytes(Encoding.DER)
    except MALFORMED:
        raise InvalidRequest("not a certificate request (PKCS#10, PEM), or a damaged one") from None


def request_to_pem(der: bytes) -> str:
    """The request *der* as PEM."""
    return x509.load_der_x509_csr(der).public_bytes(Encoding.PEM).decode()


def fingerprint_of(der: bytes) -> str:
    """SHA-256 of the SubjectPublicKeyInfo that *der* is for, lower-case hex; "" if there is no usable one."""
    if len(der) > MAX_REQUEST_BYTES:
        return ""
    try:
        return key_id(_key_of(x509.load_der_x509_csr(der))).hex()
    except (*MALFORMED, UserWarning, InvalidRequest):
        return ""


def _beyond(asked: x509.ExtensionType) -> str:
    """What no leaf has of that which is *asked* for; tools put some that each has in by themselves."""
    match asked:
        case x509.BasicConstraints():
            return "a CA (CA:TRUE), which no leaf is" if asked.ca else ""
        case x509.KeyUsage():
            usages = [name for name, field in _NEVER.items() if getattr(asked, field)]
            return f"the key usage {', '.join(usages)}" if usages else ""
        case x509.ExtendedKeyUsage():
            oids = sorted({oid.dotted_string for oid in asked} - _USAGES)
            return f"the extended key usage {oids[0]}" if oids else ""
        case x509.SubjectKeyIdentifier():
            return ""
    return f"extension {asked.oid.dotted_string}"


def _folded(name: x509.GeneralName) -> x509.GeneralName:
    """*name* as `parse_san` writes it; one that is none stays as it is, and is granted to nobody."""
    if isinstance(name, x509.DNSName):
        try:
            return parse_san(name.value)
        except IdentityError:
            return name
    return name
