"""The gRPC service of certificates: whose call it is, and the translation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from grpc import aio

from parallax.control_plane.issuance import Issuance
from parallax.control_plane.pins import Pinning
from parallax.control_plane.roots import Roots
from parallax.control_plane.watch import shutting_down
from parallax.protos import certificate_pb2, certificate_pb2_grpc
from parallax.runtime.authenticator import CheckRevoked
from parallax.runtime.caller import current_caller
from parallax.runtime.refusal import Refusal
from parallax.runtime.watches import Watches
from parallax.security.bundle import TrustBundle, parse_certificates
from parallax.security.credentials import CredentialStore
from parallax.security.errors import ConfigError, InvalidRequest, VerificationError
from parallax.security.identity import Identity
from parallax.security.verification import Peer

RENEW: Final = f"/{certificate_pb2.DESCRIPTOR.services_by_name['CertificateService'].full_name}/Renew"
HASH_BYTES: Final = 32  # SHA-256

Context = aio.ServicerContext[Any, Any]


class CertificateService(certificate_pb2_grpc.CertificateServiceServicer):
    """
    Certificates over gRPC.

    Args:
        store: The control plane's own credentials, whose roots are those of the fleet; None in plaintext.
        roots: Told whose bundle has which hash; None where nobody is authenticated.
        pinning: Told which certificate was presented, and which is about to be handed out for it; likewise.
        check_revoked: Passes if a caller is not revoked; raises Revoked.
        on_refusal: Told of each request that was not granted for what it is; the gate tells of others.
    """

    def __init__(
        self,
        issuance: Issuance,
        store: CredentialStore | None,
        roots: Roots | None,
        pinning: Pinning | None,
        check_revoked: CheckRevoked,
        on_refusal: Callable[[Refusal], None] = lambda _: None,
    ) -> None:
        self._issuance = issuance
        self._store = store
        self._roots = roots
        self._pinning = pinning
        self._check_revoked = check_revoked
        self._on_refusal = on_refusal
        self._watches = Watches("the roots")
        self._closing = asyncio.Event()

    async def Renew(
        self, request: certificate_pb2.RenewRequest, context: Context
    ) -> certificate_pb2.RenewResponse:
        caller = current_caller()
        if not isinstance(caller, Peer):
            raise ConfigError(UNAUTHENTICATED)
        presented = _presented(context)
        try:
            issued = await self._issuance.renew(caller.identity, presented, request.csr)
        except InvalidRequest as exc:
            self._on_refusal(Refusal(RENEW, caller, context.peer(), exc))
            raise
        if self._pinning is not None:
            await self._pinning.renewed(presented, issued.chain[0])
        self._check_revoked(caller)  # once more: it takes a while, and what is handed out stays good
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
        """
        Tell the roots, now and when they are others; first note which the caller says it trusts.

        Raises:
            Unavailable: The caller is told so often already.
            StorageFailed: That cannot be noted. So nobody misses new roots: who had to be noted has them.
        """
        store = self._stored()
        with self._watches.one_more():
            if request.hash:
                await self._note(request.hash)
            closing = asyncio.ensure_future(self._closing.wait())
            try:
                told: tuple[TrustBundle, bytes] | None = None
                while not closing.done():
                    seen = store.current
                    if (seen.bundle, self._issuer) != told:
                        told = seen.bundle, self._issuer
                        response = certificate_pb2.WatchTrustBundleResponse(
                            bundle=_to_proto(seen.bundle), issuer=told[1]
                        )
                        await context.write(response)
                    changed = asyncio.ensure_future(store.changed(seen))
                    try:
                        await asyncio.wait({changed, closing}, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        changed.cancel()
            finally:
                closing.cancel()
        raise shutting_down()

    async def AcknowledgeTrustBundle(
        self, request: certificate_pb2.AcknowledgeTrustBundleRequest, context: Context
    ) -> certificate_pb2.AcknowledgeTrustBundleResponse:
        await self._note(request.hash)
        return certificate_pb2.AcknowledgeTrustBundleResponse()

    @property
    def watchers(self) -> frozenset[Identity]:
        """Who is told of changes."""
        return self._watches.watchers

    def close(self) -> None:
        """End all watches."""
        self._closing.set()

    async def _note(self, bundle_hash: bytes) -> None:
        """Note that the caller trusts the bundle with that hash."""
        caller = current_caller()
        if not isinstance(caller, Peer):
            raise ConfigError(UNAUTHENTICATED)
        if len(bundle_hash) != HASH_BYTES:
            raise InvalidRequest(f"a bundle's hash has {HASH_BYTES} bytes, not {len(bundle_hash)}")
        if self._roots is not None:
            await self._roots.acknowledge(caller.identity, bundle_hash)

    @property
    def _issuer(self) -> bytes:
        """
        From whom everybody should have a certificate by now; empty if that does not matter.

        It changes before the store does.
        """
        return self._roots.successor if self._roots is not None else b""

    def _stored(self) -> CredentialStore:
        if self._store is None:
            raise ConfigError(UNAUTHENTICATED)
        return self._store


UNAUTHENTICATED = (
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
