"""Certificates that others made, with the commands of the guide and real openssl."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from parallax.security.bundle import TrustBundle, parse_certificates
from parallax.security.errors import UntrustedChain
from parallax.security.keys import fits, parse_key
from parallax.security.verification import Usage, authenticate

if TYPE_CHECKING:
    from tests.security.conftest import Forge

DOMAIN = "parallax.local"
SUBJECT = "/C=US/ST=CA/L=San Francisco/O=Parallax/CN="

# The guide's `<(cat <<EOF …)`, as a file.
SERVICE_EXTENSIONS = """\
[v3_req]
subjectAltName = @alt_names
[alt_names]
DNS.1 = control-plane.parallax.local
DNS.2 = localhost
IP.1 = 127.0.0.1
"""


@dataclass(frozen=True)
class ByHand:
    """A directory in which the manual commands are run."""

    openssl: str
    directory: Path

    def run(self, *arguments: str) -> str:
        return subprocess.run(
            [self.openssl, *arguments], cwd=self.directory, check=True, capture_output=True, text=True
        ).stdout

    def read(self, name: str) -> bytes:
        return (self.directory / name).read_bytes()

    @property
    def bundle(self) -> TrustBundle:
        return TrustBundle.parse(self.read("ca.pem"))

    def leaf(self, common_name: str, *extensions: str, subject: str = SUBJECT, days: str = "365") -> bytes:
        """The PEM of a new leaf of this CA, made with `req -new` and `x509 -req`."""
        self.run("req", "-new", "-key", "key.pem", "-out", "csr.pem", "-subj", f"{subject}{common_name}")
        sign = ("-CA", "ca.pem", "-CAkey", "ca-key.pem", "-CAcreateserial", "-days", days)
        self.run("x509", "-req", "-in", "csr.pem", *sign, "-out", "cert.pem", *extensions)
        return self.read("cert.pem")


@pytest.fixture(scope="module")
def guide(require_tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> ByHand:
    """The guide's CA (RSA-4096, ten years) and one service key (RSA-2048)."""
    by_hand = ByHand(require_tool("openssl"), tmp_path_factory.mktemp("by-hand"))
    by_hand.run("genrsa", "-out", "ca-key.pem", "4096")
    by_hand.run(
        *("req", "-new", "-x509", "-days", "3650", "-key", "ca-key.pem", "-out", "ca.pem"),
        *("-subj", f"{SUBJECT}Parallax Root CA"),
    )
    by_hand.run("genrsa", "-out", "key.pem", "2048")
    (by_hand.directory / "service.cnf").write_text(SERVICE_EXTENSIONS)
    return by_hand


@pytest.mark.parametrize("usage", list(Usage))
def test_the_guides_service_certificate(guide: ByHand, usage: Usage) -> None:
    pem = guide.leaf(
        "control-plane.parallax.local",
        "-extensions",
        "v3_req",
        "-extfile",
        str(guide.directory / "service.cnf"),
    )
    chain = parse_certificates(pem)
    peer = authenticate(chain, guide.bundle, DOMAIN, datetime.now(UTC), usage)
    assert peer.identity.short == "service/control-plane"
    assert fits(parse_key(guide.read("key.pem")), chain[0])


@pytest.mark.parametrize("usage", list(Usage))
@pytest.mark.parametrize("name", ["agente_py", "07048933"])
def test_bare_certificate_without_an_extension_file(guide: ByHand, usage: Usage, name: str) -> None:
    """X.509 v1 with OpenSSL 3.0, v3 with later ones."""
    chain = parse_certificates(guide.leaf(name))
    assert (
        authenticate(chain, guide.bundle, DOMAIN, datetime.now(UTC), usage).identity.short == f"agent/{name}"
    )


def test_bare_common_name_with_other_extensions(guide: ByHand) -> None:
    (guide.directory / "plain.cnf").write_text("subjectKeyIdentifier = hash\n")
    chain = parse_certificates(guide.leaf("agente_py", "-extfile", "plain.cnf"))
    assert authenticate(chain, guide.bundle, DOMAIN, datetime.now(UTC)).identity.short == "agent/agente_py"


def test_a_certificate_of_another_hand_made_ca_is_refused(guide: ByHand, bundle: TrustBundle) -> None:
    """The guide's root has our root's CN, and another key."""
    chain = parse_certificates(guide.leaf("agente_py"))
    with pytest.raises(UntrustedChain, match=r"^not issued by a CA of the trust bundle: "):
        authenticate(chain, bundle, DOMAIN, datetime.now(UTC))


def test_a_self_signed_device_certificate_is_nobodys(guide: ByHand) -> None:
    """As `req -x509` makes it: it says CA:TRUE, and no CA of ours has signed it."""
    guide.run(
        *("req", "-new", "-x509", "-days", "365", "-key", "key.pem", "-out", "device.pem"),
        *("-subj", "/C=BR/ST=SP/L=SaoPaulo/O=AutonomyLogic/OU=Development/CN=07048933"),
    )
    with pytest.raises(UntrustedChain):
        authenticate(parse_certificates(guide.read("device.pem")), guide.bundle, DOMAIN, datetime.now(UTC))


@pytest.mark.parametrize("usage", list(Usage))
def test_certificate_as_cert_manager_makes_it(
    forge: Forge, bundle: TrustBundle, now: datetime, usage: Usage
) -> None:
    """CN and two DNS SANs; keyUsage of an RSA leaf; no extendedKeyUsage unless asked for."""
    leaf = forge(
        uris=[],
        common_names=["control-plane.parallax.local"],
        dns=["control-plane.parallax.local", "control-plane"],
        usages=None,
        key_usage=["digital_signature", "key_encipherment"],
    ).certificate
    assert authenticate([leaf], bundle, DOMAIN, now, usage).identity.short == "service/control-plane"
