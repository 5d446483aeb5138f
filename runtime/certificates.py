"""Asking the control plane for another certificate."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias

from cryptography import x509
from grpc import aio

from parallax.protos import certificate_pb2, certificate_pb2_grpc
from parallax.runtime.renewal import Ask, Renewer
from parallax.runtime.status import error_of
from parallax.security.authority import Issued
from parallax.security.bundle import TrustBundle
from parallax.security.certificate import MALFORMED
from parallax.security.errors import ConfigError, UntrustedChain

if TYPE_CHECKING:
    from parallax.security.provider import MTLSCredentialsProvider
    from parallax.security.rotation import CertificateRotator

Dial: TypeAlias = Callable[[], aio.Channel]

CALL_S: Final = 10.0  # it takes milliseconds; a record that is written first may take longer


def new_renewer(
    provider: MTLSCredentialsProvider, rotator: CertificateRotator | None, dial: Dial | None
) -> Renewer | None:
    """
    What renews *provider*'s certificate through the control plane; None in plaintext.

    Args:
        rotator: Of this provider's; its owner's to run.
        dial: Opens a channel to the control plane with the credentials then current; None: there is none.
    """
    if provider.store is None:
        return None
    return Renewer(provider.store, None if dial is None else asker(dial), provider.keeper(rotator))


def asker(dial: Dial) -> Ask:
    """Who asks on a connection of its own, which proves the certificate in force at that moment."""

    async def ask(csr: bytes) -> Issued:
        async with dial() as channel:
            return await renew(channel, csr)

    return ask


async def renew(channel: aio.Channel, csr: bytes, timeout_s: float = CALL_S) -> Issued:
    """
    Another certificate for whom *channel* speaks for, and the key that *csr* is signed with.

    What comes back is read, not checked.

    Args:
        csr: PKCS#10, DER.

    Raises:
        ConfigError: The control plane has no CA, or does not authenticate callers.
        Unavailable: There was no answer in time.
        ParallaxError: It refuses, or its answer cannot be read.
    """
    stub = certificate_pb2_grpc.CertificateServiceStub(channel)
    try:
        response = await stub.Renew(certificate_pb2.RenewRequest(csr=csr), timeout=timeout_s)
    except aio.AioRpcError as exc:
        raise error_of(exc.code(), exc.details(), tuple(exc.trailing_metadata() or ())) from None
    try:
        chain = tuple(map(x509.load_der_x509_certificate, response.chain))
        roots = dict.fromkeys(map(x509.load_der_x509_certificate, response.bundle.roots))
        return Issued(chain, TrustBundle(tuple(roots)))
    except (ConfigError, *MALFORMED) as exc:
        raise UntrustedChain(f"the control plane's answer cannot be read: {exc}") from exc
