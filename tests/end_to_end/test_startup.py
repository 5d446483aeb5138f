"""A process whose TLS material or settings are wrong says so in one line and does not run."""

from __future__ import annotations

import os
import re
import shlex
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from parallax.sdk import ParallaxClient
from parallax.security.authority import CertificateAuthority
from parallax.security.config import MTLSConfig
from parallax.security.keys import key_to_pem

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Child, Children, Leaf, Pki

CONFIG = 2  # the exit code
NOBODY = 65534
PROCESSES = {"service/control-plane": "control-plane", "agent/agent-1": "agent-1"}

# Takes a good set of files of the identity and makes one thing wrong with it.
Fault = Callable[["Pki", str, Path], None]


def write(directory: Path, leaf: Leaf) -> None:
    """Put the three files there, as if made by hand."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "key.pem").touch(0o600)
    contents = {"cert.pem": leaf.chain_pem, "key.pem": leaf.key_pem, "ca.pem": leaf.bundle_pem}
    for name, content in contents.items():
        (directory / name).write_bytes(content)


def missing(name: str) -> Fault:
    return lambda _, __, directory: (directory / name).unlink()


def torn(name: str) -> Fault:
    def tear(_: Pki, __: str, directory: Path) -> None:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: len(content) // 2])

    return tear


def unreadable(name: str) -> Fault:
    """Somebody else's and closed; or, if we may not give it away, closed to ourselves."""

    def close(_: Pki, __: str, directory: Path) -> None:
        if os.geteuid() == 0:
            os.chown(directory / name, NOBODY, NOBODY)
        (directory / name).chmod(0o600 if os.geteuid() == 0 else 0)

    return close


def encrypted_key(pki: Pki, short: str, directory: Path) -> None:
    leaf = pki.issue(short)
    write(directory, leaf)
    (directory / "key.pem").write_bytes(key_to_pem(leaf.key, b"secret"))


def open_key(_: Pki, __: str, directory: Path) -> None:
    (directory / "key.pem").chmod(0o644)


def expired(pki: Pki, short: str, directory: Path) -> None:
    write(directory, pki.issue(short, now=pki.now - timedelta(minutes=2), lifetime=timedelta(minutes=1)))


def for_another_name(pki: Pki, short: str, directory: Path) -> None:
    write(directory, pki.issue(f"{short}-x"))


def key_of_another_pair(pki: Pki, short: str, directory: Path) -> None:
    (directory / "key.pem").write_bytes(pki.issue(short).key_pem)


def another_ca(pki: Pki, _: str, directory: Path) -> None:
    other = CertificateAuthority.create(now=pki.now, name="Other")
    (directory / "ca.pem").write_bytes(other.bundle.pem)


ISSUE = r"issue it with `parallax certs issue NAME --kind (service|agent)`"
UNREADABLE = r"not readable by this process .*: `(chown \d+|chmod u\+r) FILE`"

FAULTS: dict[str, tuple[Fault, str, str]] = {
    "key missing": (missing("key.pem"), "key.pem", f"missing: {ISSUE}"),
    "certificate missing": (missing("cert.pem"), "cert.pem", f"missing: {ISSUE}"),
    "CA missing": (missing("ca.pem"), "ca.pem", "missing: copy the CA's certificate there"),
    "key torn": (torn("key.pem"), "key.pem", f"not a private key .*{ISSUE}"),
    "certificate torn": (torn("cert.pem"), "cert.pem", f"damaged.*{ISSUE}"),
    "CA torn": (torn("ca.pem"), "ca.pem", "damaged.*put the CA's certificate there"),
    "key unreadable": (unreadable("key.pem"), "key.pem", UNREADABLE),
    "certificate unreadable": (unreadable("cert.pem"), "cert.pem", UNREADABLE),
    "CA unreadable": (unreadable("ca.pem"), "ca.pem", UNREADABLE),
    "key encrypted": (encrypted_key, "key.pem", "encrypted.*decrypt it with `openssl pkey`"),
    "key too open": (open_key, "key.pem", "open to others .*: `chmod 600 FILE`"),
    "key of another pair": (key_of_another_pair, "key.pem", f"does not fit .*{ISSUE}"),
    "certificate expired": (expired, "cert.pem", f"expired at .*{ISSUE}"),
    "certificate of another name": (for_another_name, "cert.pem", f"is not for spiffe://.*{ISSUE}"),
    "certificate of another CA": (another_ca, "ca.pem", f"not issued by a CA of the trust bundle.*{ISSUE}"),
}


@pytest.fixture
def without_privileges(require_tool: Callable[[str], str]) -> list[str]:
    """What to put before a command so that file modes bind it even if we are root."""
    if os.geteuid() != 0:
        return []
    less = "-dac_override,-dac_read_search"
    return [require_tool("setpriv"), f"--inh-caps={less}", f"--bounding-set={less}"]


@pytest.fixture
def nobody_dials() -> Iterator[str]:
    """The address of a listener; nobody may have connected to it by the end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield "localhost:{1}".format(*listener.getsockname())
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()


async def the_line(child: Child) -> str:
    """The one line that *child* ended with, code 2; it holds no key."""
    code = await child.ended()
    assert (code, len(child.lines)) == (CONFIG, 1), child.lines
    (line,) = child.lines
    assert line.startswith("parallax: ")
    assert "PRIVATE" not in line
    return line


@pytest.mark.parametrize("fault", FAULTS)
async def test_unusable_material_ends_the_process_with_one_line_that_names_file_and_remedy(
    pki: Pki,
    tmp_path: Path,
    children: Children,
    without_privileges: list[str],
    nobody_dials: str,
    fault: str,
) -> None:
    break_it, file, remedy = FAULTS[fault]
    environment = pki.environment | {
        "PARALLAX_CERTS_DIR": str(tmp_path),
        "PARALLAX_CONTROL_PLANE": nobody_dials,
    }
    for short, name in PROCESSES.items():
        write(tmp_path / name, pki.issue(short))
        break_it(pki, short, tmp_path / name)
    prefix = without_privileges if "unreadable" in fault else []
    started = {
        "control-plane": children.start_control_plane(environment, *prefix),
        "agent-1": children.start_agent(environment, *prefix),
    }
    for name, child in started.items():
        line = await the_line(child)
        path = str(tmp_path / name / file)
        assert path in line
        expected = remedy.replace("NAME", name).replace("FILE", re.escape(shlex.quote(path)))
        assert re.search(expected, line), line


async def test_a_certificate_directory_without_the_identity_ends_the_process(
    pki: Pki, tmp_path: Path, children: Children, nobody_dials: str
) -> None:
    environment = pki.environment | {
        "PARALLAX_CERTS_DIR": str(tmp_path / "nowhere"),
        "PARALLAX_CONTROL_PLANE": nobody_dials,
    }
    started = [children.start_control_plane(environment), children.start_agent(environment)]
    for child, words in zip(started, ("control-plane --kind service", "agent-1 --kind agent"), strict=True):
        line = await the_line(child)
        assert f"{tmp_path}/nowhere holds no certificate" in line
        assert f"`parallax certs issue {words}`" in line


async def test_a_key_given_by_value_never_appears_in_the_line(
    pki: Pki, children: Children, nobody_dials: str
) -> None:
    leaf = pki.issue("service/control-plane")
    torn_pem = leaf.key_pem.decode()[:120]
    environment = {
        "PARALLAX_TLS_ENABLED": "true",
        "PARALLAX_TLS_KEY_PEM": torn_pem,
        "PARALLAX_TLS_CERT_PEM": leaf.chain_pem.decode(),
        "PARALLAX_TLS_CA_PEM": leaf.bundle_pem.decode(),
        "PARALLAX_CONTROL_PLANE": nobody_dials,
    }
    for child in (children.start_control_plane(environment), children.start_agent(environment)):
        line = await the_line(child)
        assert "PARALLAX_TLS_KEY_PEM: not a private key" in line
        assert not any(part in line for part in torn_pem.splitlines())


async def test_a_misspelt_boolean_ends_the_process(pki: Pki, children: Children, nobody_dials: str) -> None:
    environment = pki.environment | {
        "PARALLAX_TLS_ENABLED": "ture",
        "PARALLAX_CONTROL_PLANE": nobody_dials,
    }
    for child in (children.start_control_plane(environment), children.start_agent(environment)):
        assert re.search(
            "PARALLAX_TLS_ENABLED=ture .*use true, false, 1, 0, yes or no", await the_line(child)
        )


async def test_plaintext_does_not_leave_loopback(children: Children) -> None:
    plane = children.start_control_plane({"PARALLAX_LISTEN": "0.0.0.0:0"})
    agent = children.start_agent({"PARALLAX_CONTROL_PLANE": "192.0.2.1:50051"})
    for child, address in ((plane, "0.0.0.0:0"), (agent, "192.0.2.1:50051")):
        line = await the_line(child)
        assert f"'{address}': set PARALLAX_TLS_ENABLED=true, or use a loopback address" in line


@pytest.mark.parametrize("variable", ["PARALLAX_LISTEN", "PARALLAX_HTTP_LISTEN", "PARALLAX_METRICS_LISTEN"])
async def test_a_port_that_is_taken_ends_the_process(pki: Pki, children: Children, variable: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = "127.0.0.1:{1}".format(*taken.getsockname())
        line = await the_line(children.start_control_plane(pki.environment | {variable: address}))
    assert re.search(f"{address}.*(choose|use) a.*(address|port)", line), line


async def test_without_client_certificates_one_warning_says_so(pki: Pki, children: Children) -> None:
    child, _ = await children.fleet(pki, PARALLAX_TLS_VERIFY_CLIENT="")
    assert child.records("control plane ready", mode="server-only")
    (warning,) = [line for line in child.lines if '"warning"' in line]
    assert "PARALLAX_TLS_VERIFY_CLIENT=true" in warning


async def test_the_insecure_fallback_is_loopback_plaintext_that_warns_and_shows_in_the_metrics(
    pki: Pki, tmp_path: Path, children: Children
) -> None:
    environment = pki.environment | {
        "PARALLAX_TLS_ALLOW_INSECURE": "true",
        "PARALLAX_CERTS_DIR": str(tmp_path / "nowhere"),
    }
    child, fleet = await children.fleet(pki, **environment)
    agent = await children.agent(fleet, **environment)
    assert child.records("control plane ready", mode="plaintext")
    for process in (child, agent):
        (warning,) = [line for line in process.lines if '"warning"' in line]
        assert "plaintext, loopback only" in warning
        assert "nowhere holds no certificate" in warning
    assert (await fleet.metrics())["parallax_insecure_mode"] == 1
    async with ParallaxClient(fleet.address, MTLSConfig(enabled=False)) as client:
        result = await client.analyze("anonymous/agent-1", "echo", 1)
    assert result.value == 1


async def test_the_insecure_fallback_does_not_leave_loopback(
    pki: Pki, tmp_path: Path, children: Children
) -> None:
    environment = pki.environment | {
        "PARALLAX_TLS_ALLOW_INSECURE": "true",
        "PARALLAX_CERTS_DIR": str(tmp_path / "nowhere"),
    }
    plane = children.start_control_plane(environment | {"PARALLAX_LISTEN": "0.0.0.0:0"})
    agent = children.start_agent(environment | {"PARALLAX_CONTROL_PLANE": "192.0.2.1:50051"})
    for child in (plane, agent):
        assert await child.ended() == CONFIG
        *_, last = child.lines
        assert re.search("^parallax: plaintext does not .*mend the TLS material", last), child.lines


async def test_with_usable_material_the_insecure_fallback_is_not_taken(pki: Pki, children: Children) -> None:
    child, fleet = await children.fleet(pki, PARALLAX_TLS_ALLOW_INSECURE="true")
    assert child.records("control plane ready", mode="mutual")
    assert (await fleet.metrics())["parallax_insecure_mode"] == 0
