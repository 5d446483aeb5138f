"""The gRPC service of certificates: whose call it is, and the translation."""

from __future__ import annotations

import asyncio
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from grpc import aio

from parallax.control_plane.issuance import Issuance
from parallax.control_plane.watch import shutting_down
from parallax.protos import certificate_pb2, certificate_pb2_grpc
from parallax.runtime.gate import current_caller
from parallax.security.bundle import TrustBundle, parse_certificates
from parallax.security.credentials import CredentialStore
from parallax.security.errors import ConfigError, VerificationError
from parallax.security.verification import Peer

Context = aio.ServicerContext[Any, Any]


class CertificateService(certificate_pb2_grpc.CertificateServiceServicer):
    """
    Certificates over gRPC.

    Args:
        store: The control plane's own credentials, whose roots are those of the fleet; None in plaintext.
    """

    def __init__(self, issuance: Issuance, store: CredentialStore | None) -> None:
        self._issuance = issuance
        self._store = store
        self._closing = asyncio.Event()

    async def Renew(
        self, request: certificate_pb2.RenewRequest, context: Context
    ) -> certificate_pb2.RenewResponse:
        caller = current_caller()
        if not isinstance(caller, Peer):
            raise ConfigError(_UNAUTHENTICATED)
        issued = await self._issuance.renew(caller.identity, _presented(context), request.csr)
        chain = [each.public_bytes(Encoding.DER) for each in issued.chain]
        return certificate_pb2.RenewResponse(chain=chain, bundle=_to_proto(issued.bundle))

    async def GetTrustBundle(
        self, request: certificate_pb2.GetTrustBundleRequest, context: Context
    ) -> certificate_pb2.GetTrustBundleResponse:
        bundle = self._stored().current.bundle
        return certificate_pb2.GetTrustBundleResponse(bundle=_to_proto(bundle))

    async def WatchTrustBundle(  # type: ignore[override]  # a coroutine that writes, which grpc.aio takes too
        self, request: certificate_pb2.WatchTrustBundleRequest, context: Context
    ) -> None:
        """Tell the roots, now and when they are others."""
        store = self._stored()
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            told: TrustBundle | None = None
            while not closing.done():
                seen = store.current
                if seen.bundle != told:
                    told = seen.bundle
                    await context.write(certificate_pb2.WatchTrustBundleResponse(bundle=_to_proto(told)))
                changed = asyncio.ensure_future(store.changed(seen))
                try:
                    await asyncio.wait({changed, closing}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    changed.cancel()
        finally:
            closing.cancel()
        raise shutting_down()

    def close(self) -> None:
        """End all watches."""
        self._closing.set()

    def _stored(self) -> CredentialStore:
        if self._store is None:
            raise ConfigError(_UNAUTHENTICATED)
        return self._store


_UNAUTHENTICATED = (
    "the control plane knows nobody's identity here: "
    "start it with PARALLAX_TLS_ENABLED=true and PARALLAX_TLS_VERIFY_CLIENT=true"
)


def _presented(context: Context) -> x509.Certificate:
    """The leaf that the caller's connection was made with; the gate has verified it."""
    pem: Any = context.auth_context().get("x509_pem_cert")
    if not pem:
        raise VerificationError("the caller showed no certificate")
    return parse_certificates(pem[0])[0]


def _to_proto(bundle: TrustBundle) -> certificate_pb2.TrustBundle:
    return certificate_pb2.TrustBundle(
        roots=[root.public_bytes(Encoding.DER) for root in bundle.roots], hash=bundle.hash
    )
