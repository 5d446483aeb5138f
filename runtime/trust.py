"""Following the roots that the fleet trusts: taking them over, and saying so."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, TypeAlias

from cryptography import x509
from grpc import aio

from parallax.protos import certificate_pb2, certificate_pb2_grpc
from parallax.runtime.backoff import backoff_s
from parallax.runtime.following import Follower
from parallax.runtime.status import error_of
from parallax.security.bundle import TrustBundle
from parallax.security.certificate import MALFORMED, is_signed_by
from parallax.security.credentials import Credentials, check_usable
from parallax.security.errors import ConfigError, ParallaxError, UntrustedChain
from parallax.security.files import MAX_BYTES
from parallax.security.keys import key_id
from parallax.security.pinned import is_self_signed

if TYPE_CHECKING:
    from parallax.runtime.certificates import Dial
    from parallax.runtime.connection import Line
    from parallax.runtime.renewal import Renewer
    from parallax.security.credentials import CredentialStore
    from parallax.security.identity import Identity
    from parallax.security.provider import Keep, MTLSCredentialsProvider
    from parallax.security.rotation import CertificateRotator

logger = logging.getLogger(__name__)

Stub: TypeAlias = "certificate_pb2_grpc.CertificateServiceAsyncStub"

CALL_S: Final = 10.0


def accept_bundle(
    bundle: TrustBundle, in_force: Credentials, identity: Identity, now: datetime
) -> Credentials:
    """
    What is *in_force*, with the roots of *bundle*.

    Raises:
        VerificationError: *bundle* has no root of those in force, is too large for a file, or does not vouch
            for the certificate in force: who took it over would be on its own.
    """
    if not set(bundle.roots) & set(in_force.bundle.roots):
        raise UntrustedChain("it has none of the roots in force: put the new roots beside the old ones first")
    if len(bundle.pem) > MAX_BYTES:
        raise UntrustedChain(f"it has more than {MAX_BYTES} bytes")
    new = Credentials(in_force.chain, in_force.key, bundle)
    check_usable(new, identity, now)
    return new


class BundleFollower(Follower):
    """
    Keeps the roots in *store* like those that the control plane tells, and tells it once they are.

    A bundle that shares no root with the one in force, or does not vouch for our own certificate, is not
    taken over: whoever stands behind it. So is none where the files are somebody else's, until these change.

    Args:
        store: What is in force, and whose it is.
        keep: See `MTLSCredentialsProvider.keeper`; None: the files are somebody else's to write.
        renew: Has another certificate issued and put in force, once the one there is of an issuer that is to
            go; None: somebody else sees to it.
        clock: Aware UTC.
    """

    def __init__(
        self,
        store: CredentialStore,
        keep: Keep | None,
        renew: Callable[[], Awaitable[None]] | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = store
        self._keep = keep
        self._renew = renew
        self._clock = clock
        super().__init__()
        self._said = ""  # what keeps us from adopting the roots that are told

    async def _listen(self, line: Line) -> bool:
        stub, went_well = line.stub(_certificates), False
        known = self._store.current.bundle.hash  # to the control plane, as what is in force here
        try:
            async with aclosing(self._told(stub, known)) as messages:
                async for told in messages:
                    await self._take(told.bundle)
                    if self._store.current.bundle.hash != known:
                        known = await _acknowledge(stub, self._store)
                    if self._renew is not None and _is_of_another(told.issuer, self._store.current):
                        await self._renew()
                    went_well = True
        except aio.AioRpcError as exc:
            error = error_of(exc.code(), exc.details(), tuple(exc.trailing_metadata() or ()))
            logger.debug("the roots are not told", extra={"cause": str(error)})
        except ParallaxError as exc:
            logger.debug("the roots are not told", extra={"cause": str(exc)})
        except Exception:  # a bug of ours must not end what still works
            logger.exception("the roots cannot be followed")
        return went_well

    async def _told(
        self, stub: Stub, bundle_hash: bytes
    ) -> AsyncGenerator[certificate_pb2.WatchTrustBundleResponse]:
        """
        What is told, as soon as it is, to somebody who trusts the bundle with *bundle_hash*.

        The same again when what is in force has changed; and ever more rarely while it cannot be adopted, for
        a full disk is mended without a word to us.
        """
        watch = stub.WatchTrustBundle(certificate_pb2.WatchTrustBundleRequest(hash=bundle_hash))
        reading = asyncio.ensure_future(watch.read())
        changed = asyncio.ensure_future(self._store.changed(self._store.current))
        last: certificate_pb2.WatchTrustBundleResponse | None = None
        attempt = 0
        try:
            while True:
                again_s = backoff_s(attempt, random.random()) if self._said else None  # noqa: S311
                attempt = attempt + 1 if self._said else 0
                await asyncio.wait({reading, changed}, timeout=again_s, return_when=asyncio.FIRST_COMPLETED)
                if changed.done():
                    changed = asyncio.ensure_future(self._store.changed(self._store.current))
                if reading.done():
                    message = reading.result()
                    if not isinstance(message, certificate_pb2.WatchTrustBundleResponse):
                        return
                    last, reading = message, asyncio.ensure_future(watch.read())
                if last is not None:
                    yield last
        finally:
            reading.cancel()
            changed.cancel()
            watch.cancel()

    async def _take(self, told: certificate_pb2.TrustBundle) -> None:
        """Take over what was *told* if that can be."""
        try:
            bundle = _read(told)
            in_force = self._store.current
            if in_force.bundle.hash != bundle.hash:
                new = accept_bundle(bundle, in_force, self._store.identity, self._clock())
                if self._keep is None:
                    raise ConfigError(
                        "the file with the roots is somebody else's: put the control plane's there, too"
                    )
                await self._keep(new, in_force)
                logger.info(
                    "roots adopted", extra={"identity": str(self._store.identity), "count": len(bundle.roots)}
                )
            self._said = ""
        except ParallaxError as exc:
            if str(exc) != self._said:
                self._said = str(exc)
                logger.warning(
                    "the roots that the fleet is to trust cannot be adopted",
                    extra={"identity": str(self._store.identity), "cause": str(exc)},
                )


def new_follower(
    provider: MTLSCredentialsProvider, rotator: CertificateRotator | None, renewer: Renewer | None
) -> BundleFollower | None:
    """
    What keeps *provider*'s roots like the fleet's; None in plaintext.

    Args:
        rotator, renewer: Of this provider's; their owner's to run.
    """
    if provider.store is None:
        return None
    renew = renewer.renew if renewer is not None and renewer.is_ours else None
    return BundleFollower(provider.store, provider.keeper(rotator), renew)


async def acknowledge(dial: Dial, store: CredentialStore) -> None:
    """
    Tell the control plane that *dial* leads to which roots are in force in *store*.

    It has then seen the certificate that *dial* uses, too, which a rotation of the root waits for.

    Raises:
        ParallaxError: It was not told.
    """
    async with dial() as channel:
        try:
            await _acknowledge(_certificates(channel), store)
        except aio.AioRpcError as exc:
            raise error_of(exc.code(), exc.details(), tuple(exc.trailing_metadata() or ())) from None


async def _acknowledge(stub: Stub, store: CredentialStore) -> bytes:
    """Tell which bundle is in force: its hash."""
    bundle_hash = store.current.bundle.hash
    request = certificate_pb2.AcknowledgeTrustBundleRequest(hash=bundle_hash)
    await stub.AcknowledgeTrustBundle(request, timeout=CALL_S)
    return bundle_hash


def _certificates(channel: aio.Channel) -> certificate_pb2_grpc.CertificateServiceAsyncStub:
    return certificate_pb2_grpc.CertificateServiceStub(channel)


def _is_of_another(issuer: bytes, credentials: Credentials) -> bool:
    """
    Whether the leaf is signed by a key other than that with the id *issuer*; not if that is empty.

    Nor if it is self-signed: it is pinned, and needs no root.
    """
    if not issuer or is_self_signed(credentials.leaf):
        return False
    above = (*credentials.chain[1:], *credentials.bundle.roots)
    return not any(
        key_id(each.public_key()) == issuer and is_signed_by(credentials.leaf, each) for each in above
    )


def _read(told: certificate_pb2.TrustBundle) -> TrustBundle:
    try:
        return TrustBundle(tuple(dict.fromkeys(map(x509.load_der_x509_certificate, told.roots))))
    except (ConfigError, *MALFORMED) as exc:
        raise UntrustedChain(f"what the control plane tells cannot be read: {exc}") from exc
