"""
How soon a revocation tells, and what asking for it costs: `python benchmarks/revocation.py`.

A control plane, bystanders with open streams, and those who are revoked one after the other, all in one
process: from the acknowledgement until their stream has ended. Then what one question and one more entry cost
beside those that are there.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import grpc
from cryptography import x509
from grpc import aio
from rich.console import Console
from rich.table import Table

from measuring import percentile
from parallax.protos import certificate_pb2, certificate_pb2_grpc, revocation_pb2, revocation_pb2_grpc
from parallax.runtime.watches import MAX_WATCHES
from parallax.sdk.testing import Fleet, ThrowawayPKI, fleet
from parallax.security.bundle import certificates_to_pem
from parallax.security.identity import Identity, control_plane
from parallax.security.keys import generate_key, key_to_pem
from parallax.security.profiles import LeafProfile
from parallax.security.revocation import WITHDRAWN, Revocations
from parallax.security.verification import CertificateId, Peer, authenticate

TARGET_MS: Final = 250.0
QUESTIONS: Final = 100_000
ADDED: Final = 10_000


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a question and of one more entry, in microseconds, beside so many; and the longest addition."""

    entries: int
    question_us: float
    addition_us: float
    longest_us: float


async def ended(fleet: Fleet, bystanders: int, times: int) -> list[float]:
    """Milliseconds from each acknowledgement to the end of the stream, ascending."""
    took = []
    async with AsyncExitStack() as stack:
        for first in range(0, bystanders, MAX_WATCHES):
            channel = await stack.enter_async_context(dial(fleet, f"client/bystander-{first}"))
            streams = [watch(channel) for _ in range(min(MAX_WATCHES, bystanders - first))]
            await asyncio.gather(*(stream.read() for stream in streams))
        admin = await stack.enter_async_context(dial(fleet, "client/admin"))
        stub = revocation_pb2_grpc.RevocationServiceStub(admin)
        for number in range(times):
            async with dial(fleet, f"client/thief-{number}") as channel:
                stream = watch(channel)
                await stream.read()
                at = asyncio.ensure_future(end_of(stream))
                await stub.Revoke(revocation_pb2.RevokeRequest(identity=f"client/thief-{number}"))
                acknowledged = time.perf_counter()
                took.append(max(0.0, await at - acknowledged) * 1000)
    return sorted(took)


def dial(fleet: Fleet, short: str) -> aio.Channel:
    """A connection of its own, as somebody new."""
    key, authority = generate_key(), fleet.pki.authority
    issued = authority.issue(Identity.parse_short(short), key.public_key(), LeafProfile(), datetime.now(UTC))
    credentials = grpc.ssl_channel_credentials(
        issued.bundle.pem, key_to_pem(key), certificates_to_pem(issued.chain)
    )
    options = [("grpc.ssl_target_name_override", control_plane().dns_name)]
    return aio.secure_channel(fleet.address, credentials, options)


def watch(channel: aio.Channel) -> Any:
    """A stream that stays open."""
    request = certificate_pb2.WatchTrustBundleRequest()
    return certificate_pb2_grpc.CertificateServiceStub(channel).WatchTrustBundle(request)


async def end_of(stream: Any) -> float:
    """When *stream* has ended as it should."""
    try:
        while await stream.read() is not aio.EOF:
            pass
    except aio.AioRpcError as exc:
        if exc.code() is grpc.StatusCode.UNAUTHENTICATED:
            return time.perf_counter()
        raise
    raise SystemExit("the stream ended in order")


def costs(sizes: Sequence[int]) -> Iterator[Cost]:
    """What the index takes, at each size."""
    peer, revocations = a_peer(), Revocations()
    for size in sizes:
        while len(revocations) < size:
            revocations.revoke(CertificateId(peer.issuer_key, x509.random_serial_number()))
        revocations.cut(Identity.parse_short("agent/somebody-else"), WITHDRAWN)
        began = time.perf_counter()
        for _ in range(QUESTIONS):
            revocations.check(peer)
        question_s = (time.perf_counter() - began) / QUESTIONS
        took = []
        for _ in range(ADDED):
            one = CertificateId(peer.issuer_key, x509.random_serial_number())
            began = time.perf_counter()
            revocations.revoke(one)
            took.append(time.perf_counter() - began)
        yield Cost(size, question_s * 1e6, sum(took) / ADDED * 1e6, max(took) * 1e6)


def a_peer() -> Peer:
    """Somebody who is not revoked."""
    authority, now = ThrowawayPKI().authority, datetime.now(UTC)
    issued = authority.issue(
        Identity.parse_short("client/cli"), generate_key().public_key(), LeafProfile(), now
    )
    return authenticate(issued.chain, authority.bundle, "parallax.local", now)


async def measure(bystanders: int, times: int) -> list[float]:
    """As `ended`, in a fleet that is made for it."""
    async with fleet() as running:
        return await ended(running, bystanders, times)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=200, help="revocations (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=1_000, help="of bystanders (default: %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="*", default=[0, 10_000, 1_000_000], help="of the index")
    arguments = parser.parse_args(argv)
    logging.disable(logging.WARNING)  # each of whom is revoked is two lines
    took = asyncio.run(measure(arguments.streams, arguments.times))
    p50, p99 = percentile(took, 0.5), percentile(took, 0.99)
    verdict = "met" if p99 <= TARGET_MS else "missed"
    table = Table("revocations", "open streams", "p50 ms", "p99 ms", "longest", f"p99 ≤ {TARGET_MS:g} ms")
    table.add_row(
        *(str(len(took)), str(arguments.streams), f"{p50:.1f}", f"{p99:.1f}", f"{took[-1]:.1f}", verdict)
    )
    Console().print(table)
    table = Table("entries", "one question µs", "one more entry µs", "longest")
    for cost in costs(arguments.sizes):
        table.add_row(
            *(f"{cost.entries:,}", f"{cost.question_us:.2f}"),
            *(f"{cost.addition_us:.2f}", f"{cost.longest_us:,.0f}"),
        )
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
