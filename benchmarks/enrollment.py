"""
What an enrollment costs: `python benchmarks/enrollment.py`.

A good token each, which is found, compared and spent; the request checked, the certificate signed, checked,
and written with all that belongs to it, on the disk. The same behind the HTTPS listener, whose clients share
this process and its core: a connection, its handshake and a request each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from issuing import Pace, Work, pace
from parallax.control_plane.approvals import Approvals
from parallax.control_plane.audit import AuditLog
from parallax.control_plane.edge.allowance import Limits, Rate
from parallax.control_plane.edge.app import new_app
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.enrollment import Application, Enrollment
from parallax.control_plane.exchange import Exchange
from parallax.control_plane.grants import Grants
from parallax.control_plane.issuance import Issuance
from parallax.control_plane.ledger import Ledger
from parallax.control_plane.pins import Pinning
from parallax.control_plane.tokens import Tokens
from parallax.runtime.http import HttpPort
from parallax.security import CertificateAuthority, Credentials, CredentialStore, Identity, LeafProfile
from parallax.security.https import client_context, server_context
from parallax.security.identity import DEFAULT_TRUST_DOMAIN, control_plane
from parallax.security.keys import generate_key
from parallax.security.request import new_request, request_to_pem
from parallax.security.revocation import Revocations
from parallax.security.tokens import Grant

TARGET: Final = 300.0  # enrolled in a second of one core
BY: Final = "spiffe://parallax.local/client/admin"
HOUR: Final = timedelta(hours=1)
UNLIMITED: Final = Limits(Rate(1e9, 1e9), Rate(1e9, 1e9), Rate(1e9, 1e9))  # one source asks for all


class Enrolling:
    """A control plane's part in it, and newcomers that were prepared."""

    def __init__(self, engine: SqliteEngine) -> None:
        def now() -> datetime:
            return datetime.now(UTC)

        self.authority = CertificateAuthority.create(now=now())
        audit = AuditLog(engine, now)
        ledger = Ledger(engine, audit, now)
        issuance = Issuance(lambda: self.authority, lambda: self.authority.bundle, ledger.record, now)
        self._tokens = Tokens(engine, audit, now)
        approvals = Approvals(engine, audit, HOUR, now)
        key = generate_key()
        own = self.authority.issue(control_plane(), key.public_key(), LeafProfile(), now())
        self.store = CredentialStore(control_plane(), Credentials(own.chain, key, own.bundle), now())
        pinning = Pinning(engine, audit, ledger, self.store, HOUR, now)
        self.enrollment = Enrollment(
            self._tokens, approvals, issuance, ledger, Grants(engine), pinning, audit, Revocations(), now
        )
        self.exchange = Exchange(pinning, issuance, DEFAULT_TRUST_DOMAIN)
        self._ready: list[tuple[str, Identity, bytes]] = []
        self._made = 0
        self.port = 0

    async def prepare(self, newcomers: int) -> None:
        """So many tokens, and as many keys and requests."""
        for _ in range(newcomers):
            identity = Identity.parse_short(f"agent/agent-{self._made}")
            self._made += 1
            grant = Grant(DEFAULT_TRUST_DOMAIN, identity.kind, identity.name)
            token, _ = await self._tokens.create(grant, HOUR, BY)
            self._ready.append((token.text, identity, new_request(identity, generate_key())))

    async def redeem(self) -> None:
        """One of them, without HTTP."""
        token, identity, request = self._ready.pop()
        await self.enrollment.redeem(token, Application(identity, request, "192.0.2.7"))

    async def over_https(self) -> None:
        """One of them, over a connection of its own."""
        token, identity, request = self._ready.pop()
        said = {"token": token, "identity": identity.short, "request": request_to_pem(request)}
        body = json.dumps(said).encode()
        reader, writer = await asyncio.open_connection(
            "127.0.0.1",
            self.port,
            ssl=client_context(self.authority.bundle.roots),
            server_hostname=control_plane().dns_name,
        )
        head = "POST /v1/enrollments HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.read()
        writer.close()
        if not answer.startswith(b"HTTP/1.1 200"):
            raise SystemExit(answer.decode(errors="replace"))


async def measure(directory: Path, rounds: int, newcomers: int, in_flight: int) -> dict[str, list[Pace]]:
    """Both ways in turn, as often as there are rounds."""
    measured: dict[str, list[Pace]] = {}
    async with SqliteEngine(directory) as engine:
        enrolling = Enrolling(engine)
        app = new_app(enrolling.enrollment, enrolling.exchange, DEFAULT_TRUST_DOMAIN, limits=UNLIMITED)
        async with HttpPort(app, "127.0.0.1:0", "address", context=server_context(enrolling.store)) as port:
            enrolling.port = port.port
            ways: dict[str, Work] = {
                "redeem": enrolling.redeem,
                "over HTTPS, both ends": enrolling.over_https,
            }
            for _ in range(rounds):
                for name, work in ways.items():
                    await enrolling.prepare(newcomers)
                    measured.setdefault(name, []).append(await pace(work, newcomers, in_flight))
    return measured


def show(measured: dict[str, list[Pace]], in_flight: int) -> bool:
    """Print medians and ranges; whether the target is met."""
    table = Table(title=f"Enrollments, P-256, {in_flight} at once")
    for column in ("what", "per second", "per core second", "min", "max"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, paces in measured.items():
        each = [pace.per_cpu_s for pace in paces]
        per_s = statistics.median(pace.per_s for pace in paces)
        numbers = (per_s, statistics.median(each), min(each), max(each))
        table.add_row(name, *(f"{number:,.0f}" for number in numbers))
    Console().print(table)
    path = statistics.median(pace.per_cpu_s for pace in measured["redeem"])
    print(f"target: {TARGET:,.0f} per core second; {path:,.0f}: {'met' if path >= TARGET else 'missed'}")
    return path >= TARGET


def main() -> int:
    """Measure and print; 1 if the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--newcomers", type=int, default=500, help="in each round of each way")
    parser.add_argument("--in-flight", type=int, default=16, help="at once")
    parser.add_argument("--directory", type=Path, help="where the data is written: on the disk that is meant")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        measured = asyncio.run(
            measure(Path(scratch), arguments.rounds, arguments.newcomers, arguments.in_flight)
        )
    return 0 if show(measured, arguments.in_flight) else 1


if __name__ == "__main__":
    raise SystemExit(main())
