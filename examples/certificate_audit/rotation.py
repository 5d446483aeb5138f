"""Every certificate of the demo replaced while it works, and the proof that the new ones are in use."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from parallax.security import CertificateAuthority, Identity
from parallax.security.keys import generate_key
from parallax.security.layouts import Layout, save_leaf
from parallax.security.profiles import LeafProfile

WITHIN_S = 30.0


class RotationFailed(Exception):
    """A certificate did not come into use."""


@dataclass
class Certificates:
    """
    The certificates of everybody who takes part, in one directory, issued by a CA that only this process has.

    Attributes:
        serials: Of each, those it has had, oldest first.
    """

    directory: Path
    everybody: list[Identity]
    authority: CertificateAuthority = field(
        default_factory=lambda: CertificateAuthority.create(now=datetime.now(UTC))
    )
    serials: dict[Identity, list[str]] = field(default_factory=dict)

    def issue(self) -> None:
        """A certificate for each, with a new key, in place of the one it has."""
        for identity in self.everybody:
            key = generate_key()
            issued = self.authority.issue(identity, key.public_key(), LeafProfile(), datetime.now(UTC))
            save_leaf(self.directory, Layout.PARALLAX, identity, issued.chain, key, issued.bundle)
            self.serials.setdefault(identity, []).append(f"{issued.chain[0].serial_number:x}")

    async def until_in_use(self, port: int, environment: Mapping[str, str]) -> None:
        """Wait until the newest of each is in use, as the control plane and its ledger say."""
        deadline = time.monotonic() + WITHIN_S
        missing = {identity: serials[-1] for identity, serials in self.serials.items()}
        while missing:
            if time.monotonic() > deadline:
                late = ", ".join(identity.short for identity in missing)
                raise RotationFailed(f"not in use after {WITHIN_S:g} s: the certificates of {late}")
            served, seen = await asyncio.gather(
                asyncio.to_thread(serial_at, port), asyncio.to_thread(serials_seen, environment)
            )
            missing = {whose: each for whose, each in missing.items() if each not in {served, *seen}}


def serial_at(port: int) -> str:
    """Of the certificate that a new connection to *port* is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # it is looked at, and nothing is said
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), WITHIN_S) as plain,
        context.wrap_socket(plain) as secured,
    ):
        der = secured.getpeercert(binary_form=True)
    return f"{x509.load_der_x509_certificate(der or b'').serial_number:x}"


def serials_seen(environment: Mapping[str, str]) -> set[str]:
    """Of the certificates with which somebody has called the control plane, by its ledger."""
    command = [sys.executable, "-m", "parallax.sdk.cli", "certs", "list", "--ledger", "--json"]
    command += ["--identity", "client/admin"]
    done = subprocess.run(
        command, env=dict(environment), capture_output=True, text=True, timeout=WITHIN_S, check=False
    )
    if done.returncode:
        raise RotationFailed(done.stderr.strip())
    return {entry["serial"] for entry in json.loads(done.stdout) if entry["seen_at"]}
