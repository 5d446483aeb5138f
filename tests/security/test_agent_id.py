"""Which agent this host is, by its one certificate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from parallax.security.agent_id import get_agent_id
from parallax.security.bundle import certificates_to_pem
from parallax.security.config import MTLSConfig
from parallax.security.errors import ConfigError
from tests.security.conftest import Forge

BARE = {"common_names": ("07048933",), "uris": (), "dns": ()}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`~/.mtls`; beside it nothing, and no settings."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("PARALLAX_")]:
        monkeypatch.delenv(name)
    return Path.home() / ".mtls"


def pem(forge: Forge, **wrong: Any) -> bytes:
    return certificates_to_pem([forge(**wrong).certificate])


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize(("wrong", "agent_id"), [({}, "agent-1"), (BARE, "07048933")])
def test_it_is_the_name_in_the_certificate_at_home(
    home: Path, forge: Forge, wrong: dict[str, Any], agent_id: str
) -> None:
    """The CN where there is no URI SAN, as with certificates that devices make themselves."""
    write(home / "client.crt", pem(forge, self_signed=True, **wrong))
    assert get_agent_id() == agent_id


def test_what_the_settings_name_comes_before_a_mounted_secret_and_that_before_home(
    home: Path, forge: Forge, tmp_path: Path
) -> None:
    def of(name: str) -> bytes:
        return pem(forge, common_names=(name,), uris=(), dns=())

    write(home / "client.crt", of("at-home"))
    assert get_agent_id() == "at-home"
    write(Path("certs/tls.crt"), of("mounted"))
    assert get_agent_id() == "mounted"
    for part in ("named", "key", "ca"):
        write(tmp_path / part, of("named"))
    named = {
        f"{part}_file": tmp_path / file for part, file in (("cert", "named"), ("key", "key"), ("ca", "ca"))
    }
    assert get_agent_id(MTLSConfig(**named)) == "named"  # type: ignore[arg-type]
    contained = {f"{part}_pem": of("contained").decode() for part in ("cert", "key", "ca")}
    assert get_agent_id(MTLSConfig(**contained)) == "contained"  # type: ignore[arg-type]


def test_in_a_directory_of_many_it_would_be_a_guess(home: Path, forge: Forge) -> None:
    write(Path("certs/agent-1/cert.pem"), pem(forge))
    write(Path("certs/agent-1-cert.pem"), pem(forge))
    with pytest.raises(ConfigError, match=r"neither certs/tls\.crt nor .*client\.crt: state its id"):
        get_agent_id()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a certificate"),
        (
            {"uris": ("spiffe://parallax.local/client/ci",), "dns": (), "common_names": ()},
            "which is no agent",
        ),
        ({"common_names": (), "uris": (), "dns": ()}, "state the agent's id"),
        ({"uris": ("spiffe://elsewhere/agent/agent-1",), "dns": ()}, "elsewhere"),
    ],
    ids=["damaged", "a client", "nobody", "another trust domain"],
)
def test_where_it_cannot_be_read_nobody_has_one(home: Path, forge: Forge, content: Any, said: str) -> None:
    """And what lies at home does not take the place of a mounted one that is damaged."""
    write(home / "client.crt", pem(forge))
    write(Path("certs/tls.crt"), content if isinstance(content, bytes) else pem(forge, **content))
    with pytest.raises(ConfigError, match=said) as told:
        get_agent_id()
    assert "certs/tls.crt" in str(told.value)
    assert "\n" not in str(told.value)
