"""
How long new files take to be in the next handshake: `python benchmarks/pickup.py`.

A control plane runs in a process of its own. Its files are replaced in one rename, or by hand, the
certificate before its key. From the last write on, new connections are made until one is shown the new one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cryptography import x509
from rich.console import Console
from rich.progress import track
from rich.table import Table

from measuring import percentile
from parallax.sdk.testing import ThrowawayPKI

SERVICE: Final = "service/control-plane"
TARGET_MS: Final = 250.0
WITHIN_S: Final = 30.0
DICE: Final = random.Random()  # noqa: S311 - decides when to begin, hides nothing

Write = Callable[[ThrowawayPKI, Path], None]


def in_one_rename(pki: ThrowawayPKI, certs: Path) -> None:
    """As our own commands write."""
    pki.save(certs, SERVICE)


def by_hand(pki: ThrowawayPKI, certs: Path) -> None:
    """Over the files that are there, one after the other."""
    made, own = pki.issue(SERVICE), certs / "control-plane"
    (own / "cert.pem").write_text(made.cert_pem or "")
    (own / "key.pem").write_text(made.key_pem.get_secret_value() if made.key_pem else "")


@contextmanager
def control_plane(certs: Path, **environment: str) -> Iterator[int]:
    """One that runs; its port."""
    settings = {
        "PARALLAX_TLS_ENABLED": "true",
        "PARALLAX_TLS_VERIFY_CLIENT": "true",
        "PARALLAX_CERTS_DIR": str(certs),
        "PARALLAX_DATA_DIR": str(certs.parent / "data"),
        "PARALLAX_LISTEN": "127.0.0.1:0",
        "PARALLAX_HTTP_LISTEN": "none",
        "PARALLAX_METRICS_LISTEN": "127.0.0.1:0",
        "PARALLAX_LOG_FORMAT": "json",
    }
    log = certs.parent / "log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "parallax.control_plane"]
        child = subprocess.Popen(command, env=os.environ | settings | environment, stderr=output)
    try:
        deadline = time.monotonic() + WITHIN_S
        while child.poll() is None and time.monotonic() < deadline:
            for line in log.read_text().splitlines():
                if line.startswith("{") and json.loads(line)["event"] == "control plane ready":
                    yield json.loads(line)["port"]
                    return
            time.sleep(0.05)
        raise SystemExit(f"the control plane did not start:\n{log.read_text()}")
    finally:
        child.terminate()
        child.wait()


def shown(port: int) -> bytes:
    """The certificate that a new connection is shown, DER."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    plain = socket.create_connection(("127.0.0.1", port), WITHIN_S)
    with plain, context.wrap_socket(plain) as secured:
        return secured.getpeercert(binary_form=True) or b""


def measure(write: Write, times: int, console: Console) -> list[float]:
    """Milliseconds from the end of each *write* to the first handshake that shows it, ascending."""
    took = []
    with tempfile.TemporaryDirectory() as scratch:
        pki, certs = ThrowawayPKI(), Path(scratch) / "certs"
        pki.save(certs, SERVICE)
        with control_plane(certs) as port:
            for _ in track(range(times), write.__name__.replace("_", " "), console=console, transient=True):
                time.sleep(DICE.uniform(0.3, 0.6))
                write(pki, certs)
                began = time.perf_counter()
                new = x509.load_pem_x509_certificate((certs / "control-plane" / "cert.pem").read_bytes())
                while x509.load_der_x509_certificate(shown(port)) != new:
                    if time.perf_counter() - began > WITHIN_S:
                        raise SystemExit("the new certificate is not shown")
                took.append((time.perf_counter() - began) * 1000)
    return sorted(took)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and say whether it is fast enough."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=200, help="of each kind (default: %(default)s)")
    arguments = parser.parse_args(argv)
    console = Console()
    table = Table("files replaced", "times", "p50 ms", "p99 ms", "longest", f"p99 ≤ {TARGET_MS:g} ms")
    for write in (in_one_rename, by_hand):
        took = measure(write, arguments.times, console)
        p50, p99 = percentile(took, 0.5), percentile(took, 0.99)
        verdict = "met" if p99 <= TARGET_MS else "missed"
        name = write.__name__.replace("_", " ")
        table.add_row(name, str(len(took)), f"{p50:.0f}", f"{p99:.0f}", f"{took[-1]:.0f}", verdict)
    console.print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
