"""
How long a user waits before anything happens: `python benchmarks/startup.py`.

Prints median and range over a few rounds, interleaved, beside the target and beside
what a bare interpreter takes on the same machine at the same time.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from parallax.security import CertificateAuthority, Identity
from parallax.security.keys import generate_key
from parallax.security.layouts import Layout, save_leaf
from parallax.security.profiles import LeafProfile

ROUNDS = 7


def run(*arguments: str) -> float:
    """Seconds that `python *arguments` takes."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - began


def ready(certs: Path) -> float:
    """Seconds from starting a control plane, mutual TLS on, to the moment it serves."""
    environment = {
        **os.environ,
        "PARALLAX_TLS_ENABLED": "true",
        "PARALLAX_TLS_VERIFY_CLIENT": "true",
        "PARALLAX_CERTS_DIR": str(certs),
        "PARALLAX_DATA_DIR": str(certs / "data"),
        "PARALLAX_LISTEN": "127.0.0.1:0",
        "PARALLAX_HTTP_LISTEN": "none",
        "PARALLAX_METRICS_LISTEN": "127.0.0.1:0",
        "PARALLAX_LOG_FORMAT": "json",
    }
    began = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "parallax.control_plane"], env=environment, stderr=subprocess.PIPE
    )
    try:
        for line in child.stderr or ():
            if line.startswith(b"{") and json.loads(line)["event"] == "control plane ready":
                return time.perf_counter() - began
        raise SystemExit("the control plane did not start")
    finally:
        child.terminate()
        child.communicate()


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as scratch:
        certs = Path(scratch)
        now = datetime.now(UTC)
        identity = Identity.parse_short("service/control-plane")
        key = generate_key()
        issued = CertificateAuthority.create(now=now).issue(identity, key.public_key(), LeafProfile(), now)
        save_leaf(certs, Layout.PARALLAX, identity, issued.chain, key, issued.bundle)
        cases: dict[str, tuple[float | None, Callable[[], float]]] = {
            "python -c pass": (None, lambda: run("-c", "pass")),
            "import parallax.sdk": (0.5, lambda: run("-c", "import parallax.sdk")),
            "… and SecureAgent": (0.5, lambda: run("-c", "from parallax.sdk import SecureAgent")),
            "… and ParallaxClient": (0.5, lambda: run("-c", "from parallax.sdk import ParallaxClient")),
            "parallax --help": (0.5, lambda: run("-m", "parallax.sdk.cli", "--help")),
            "control plane ready": (1.5, lambda: ready(certs)),
        }
        measured: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(ROUNDS):
            for name, (_, measure) in cases.items():
                measured[name].append(measure())
    table = Table(title=f"Start-up, seconds, {ROUNDS} interleaved rounds")
    for column in ("what", "median", "min", "max", "target"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, (target, _) in cases.items():
        times = measured[name]
        row = (statistics.median(times), min(times), max(times))
        table.add_row(name, *(f"{value:.2f}" for value in row), f"≤ {target}" if target else "")
    Console().print(table)


if __name__ == "__main__":
    main()
