"""A server that follows its credentials says so, and its own handshakes are no failures."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

import pytest

from parallax.sdk.testing import ThrowawayPKI

SERVER: Final = Path(__file__).with_name("swapping_server.py")
SWAPS: Final = 5


class Swapping:
    """The running child; it has changed its certificate, and holds nothing any more."""

    def __init__(self, said: IO[str], asked: IO[str], log: Path) -> None:
        self._said, self._asked, self.log = said, asked, log
        self.port = int(self.hear()["port"])

    def hear(self) -> dict[str, Any]:
        heard: dict[str, Any] = json.loads(self._said.readline())
        return heard

    def ask(self) -> dict[str, Any]:
        self._asked.write("?\n")
        self._asked.flush()
        return self.hear()


@pytest.fixture(scope="module")
def swapping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swapping]:
    directory = tmp_path_factory.mktemp("swapping")
    ThrowawayPKI().save(directory / "certs", "service/control-plane")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("GRPC_", "PARALLAX_"))}
    environment = {
        **clean,
        "PARALLAX_TLS_ENABLED": "true",
        "PARALLAX_TLS_VERIFY_CLIENT": "true",
        "PARALLAX_CERTS_DIR": str(directory / "certs"),
    }
    log = directory / "log"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, SERVER, str(SWAPS)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        assert process.stdin
        assert process.stdout
        yield Swapping(process.stdout, process.stdin, log)
        process.stdin.close()
        assert process.wait(10) == 0


def test_pins_are_no_failed_handshakes(swapping: Swapping) -> None:
    assert swapping.ask()["failures"] == {}
    assert swapping.log.read_text() == ""
    with socket.create_connection(("127.0.0.1", swapping.port), timeout=10) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        while stranger.recv(4096):  # which does fail
            pass
    while not (failures := swapping.ask()["failures"]):
        pass
    assert failures == {"plaintext_peer": 1}


def test_each_change_is_counted(swapping: Swapping) -> None:
    series = swapping.ask()["series"]
    counted = {name: value for name, value in series.items() if "swaps_total" in name}
    assert counted == {
        'parallax_server_credential_swaps_total{result="pinned"}': f"{SWAPS:.1f}",
        'parallax_server_credential_swaps_total{result="unpinned"}': "0.0",
    }
