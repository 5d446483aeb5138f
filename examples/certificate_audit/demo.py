"""
Three agents audit every certificate of this machine's CA bundle, over mutual TLS.

A control plane and three agents start as processes of their own, each with its own
identity, on free ports and in a temporary directory; nothing is left behind. While they
work, every certificate is replaced by another one, with another key, and no task notices.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.utils import CryptographyDeprecationWarning
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from auditors import AUDITORS
from parallax.sdk import ParallaxClient, Result
from parallax.security import Identity, MTLSConfig, ParallaxError
from rotation import Certificates, RotationFailed

IN_FLIGHT = 32
START_S = 30.0
STOP_S = 10.0


@dataclass(frozen=True)
class Judgement:
    """What one auditor said of one certificate, or why it said nothing."""

    auditor: str
    subject: str
    result: Result | None
    error: str = ""


def load_bundle() -> tuple[str, list[x509.Certificate]]:
    """This machine's CA certificates and where they come from; certifi's if it has none."""
    paths = ssl.get_default_verify_paths()
    candidates = [paths.cafile, "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"]
    for candidate in filter(None, candidates):
        if Path(candidate).is_file() and (certificates := parse(Path(candidate).read_bytes())):
            return candidate, certificates
    import certifi

    return "certifi", parse(Path(certifi.where()).read_bytes())


def parse(pem: bytes) -> list[x509.Certificate]:
    """All certificates in *pem*, those that break RFC 5280 included: that is for the auditors to say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)
        return x509.load_pem_x509_certificates(pem)


def make_identities(directory: Path) -> Certificates:
    """A throw-away CA, and a certificate for everybody who takes part."""
    agents = (f"agent/auditor-{name}" for name in AUDITORS)
    everybody = ("service/control-plane", "client/cli", "client/admin", *agents)
    certificates = Certificates(directory, [Identity.parse_short(short) for short in everybody])
    certificates.issue()
    return certificates


@contextmanager
def process(
    arguments: list[str], environment: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A child process that is stopped, in order if possible, at the end of the block."""
    with log.open("wb") as output:
        child = subprocess.Popen(arguments, env={**os.environ, **environment}, stdout=output, stderr=output)
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def ports_of(child: subprocess.Popen[bytes], log: Path) -> tuple[int, int]:
    """The ports that the control plane chose, from its own log."""
    deadline = time.monotonic() + START_S
    while child.poll() is None and time.monotonic() < deadline:
        for line in log.read_text().splitlines():
            if line.startswith("{") and (record := json.loads(line))["event"] == "control plane ready":
                return record["port"], record["metrics_port"]
        time.sleep(0.05)
    raise SystemExit(f"the control plane did not start:\n{log.read_text()}")


async def audit(
    client: ParallaxClient,
    certificates: list[x509.Certificate],
    rotation: asyncio.Task[None],
    console: Console,
) -> list[Judgement]:
    """Every certificate judged by every auditor, again and again until *rotation* has ended."""
    judgements: list[Judgement] = []
    with Progress(console=console) as progress:
        bar = progress.add_task("auditing, while every certificate is replaced", total=None)
        while not judgements or not rotation.done():
            judgements += await audit_once(client, certificates, partial(progress.advance, bar))
    await rotation
    return judgements


async def audit_once(
    client: ParallaxClient, certificates: list[x509.Certificate], advance: Callable[[], None]
) -> list[Judgement]:
    """Every certificate judged by every auditor, a few dozen at a time."""
    slots = asyncio.Semaphore(IN_FLIGHT)

    async def judge(auditor: str, certificate: x509.Certificate) -> Judgement:
        der = certificate.public_bytes(Encoding.DER)
        subject = certificate.subject.rfc4514_string()
        async with slots:
            try:
                result = await client.analyze(
                    f"capability:audit-{auditor}", "judge", der, wait_for_agent=START_S
                )
            except ParallaxError as exc:
                return Judgement(auditor, subject, None, str(exc))
            finally:
                advance()
        return Judgement(auditor, subject, result)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(judge(name, each)) for each in certificates for name in AUDITORS]
    return [task.result() for task in tasks]


def sessions_at(metrics_port: int) -> int:
    """How many agents hold an mTLS session, as Prometheus would see it."""
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=5) as response:
        lines = response.read().decode().splitlines()
    return next(int(float(line.split()[1])) for line in lines if line.startswith("parallax_sessions "))


def show(judgements: list[Judgement], console: Console) -> None:
    """One row per auditor, then what they found most often."""
    table = Table(title="What the auditors say")
    for column in ("auditor", "ok", "warn", "fail", "no answer"):
        table.add_column(column, justify="left" if column == "auditor" else "right")
    findings: Counter[tuple[str, str]] = Counter()
    for auditor in AUDITORS:
        verdicts: Counter[str] = Counter()
        for judgement in (each for each in judgements if each.auditor == auditor):
            verdicts[judgement.result.value["verdict"] if judgement.result else "no answer"] += 1
            findings.update(
                (auditor, text) for text in (judgement.result.value["findings"] if judgement.result else ())
            )
        table.add_row(auditor, *(str(verdicts[column]) for column in ("ok", "warn", "fail", "no answer")))
    console.print(table)
    for (auditor, text), count in findings.most_common(8):
        console.print(f"  {count:4} {auditor}: {text}")
    for judgement in [each for each in judgements if each.error][:5]:
        console.print(f"  failed: {judgement.auditor} on {judgement.subject}: {judgement.error}")


async def rotate(identities: Certificates, port: int, environment: Mapping[str, str]) -> None:
    """Replace every certificate once all of them are in use, and wait until all new ones are."""
    await identities.until_in_use(port, environment)
    await asyncio.to_thread(identities.issue)
    await identities.until_in_use(port, environment)


def show_serials(identities: Certificates, console: Console) -> None:
    """One row per identity."""
    table = Table(title="Replaced while they were in use")
    for column in ("identity", "old serial", "new serial"):
        table.add_column(column)
    for identity, (old, new) in identities.serials.items():
        table.add_row(identity.short, f"{old[:12]}…", f"{new[:12]}…")
    console.print(table)


async def main() -> int:
    """Run the whole demo; 0 if every task was answered."""
    for name in [name for name in os.environ if name.startswith("PARALLAX_")]:
        del os.environ[name]  # what this shell has set for a fleet of its own is not for the demo
    console = Console()
    source, certificates = load_bundle()
    console.print(f"{len(certificates)} certificates from {source}")
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="parallax-demo-")))
        certs = scratch / "certs"
        identities = make_identities(certs)
        common = {
            "PARALLAX_TLS_ENABLED": "true",
            "PARALLAX_TLS_VERIFY_CLIENT": "true",
            "PARALLAX_TLS_ALLOW_INSECURE": "false",
            "PARALLAX_CERTS_DIR": str(certs),
            "PARALLAX_LOG_FORMAT": "json",
            "LOG_LEVEL": "info",
        }
        log = scratch / "control-plane.log"
        free = {
            "PARALLAX_LISTEN": "127.0.0.1:0",
            "PARALLAX_HTTP_LISTEN": "none",
            "PARALLAX_METRICS_LISTEN": "127.0.0.1:0",
            "PARALLAX_DATA_DIR": str(scratch / "data"),
        }
        plane = stack.enter_context(
            process([sys.executable, "-m", "parallax.control_plane"], {**common, **free}, log)
        )
        port, metrics_port = ports_of(plane, log)
        address = f"localhost:{port}"
        for name in AUDITORS:
            script = str(Path(__file__).with_name("auditors.py"))
            environment = {**common, "PARALLAX_CONTROL_PLANE": address, "PARALLAX_METRICS_LISTEN": ""}
            stack.enter_context(process([sys.executable, script, name], environment, scratch / f"{name}.log"))
        tls = MTLSConfig(enabled=True, certs_dir=certs, verify_client=True, allow_insecure=False)
        async with ParallaxClient(address, tls, identity="client/cli") as client:
            environment = {**os.environ, **common, "PARALLAX_CONTROL_PLANE": address}
            rotation = asyncio.create_task(rotate(identities, port, environment))
            judgements = await audit(client, certificates, rotation, console)
            connections = await asyncio.to_thread(sessions_at, metrics_port) + 1  # this client's own
    show(judgements[-len(certificates) * len(AUDITORS) :], console)
    show_serials(identities, console)
    failures = sum(each.result is None for each in judgements)
    console.print(
        f"{len(judgements)} tasks, {failures} failures, {connections} mTLS connections", highlight=False
    )
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main()))
    except RotationFailed as exc:
        sys.exit(f"the demo failed: {exc}")
