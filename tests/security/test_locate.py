"""Which files count where several could, and what is written into a home."""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import TrustBundle
from parallax.security.credentials import Credentials
from parallax.security.errors import ConfigError, IdentityError
from parallax.security.identity import Identity
from parallax.security.keys import generate_key
from parallax.security.layouts import (
    Layout,
    Paths,
    find_authority,
    find_layout,
    leaf_paths,
    locate,
    save_authority,
    save_leaf,
    system_roots,
)
from parallax.security.material import load_credentials
from parallax.security.profiles import LeafProfile

AGENT = Identity.parse_short("agent/agent-1")
Put = Callable[[Layout], Paths]


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    directory = tmp_path / "me"
    directory.mkdir()
    monkeypatch.setenv("HOME", str(directory))
    return directory / ".mtls"


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    return tmp_path / "certs"


@pytest.fixture(scope="module")
def good(authority: CertificateAuthority, now: datetime) -> Credentials:
    key = generate_key()
    issued = authority.issue(AGENT, key.public_key(), LeafProfile(), now)
    return Credentials(issued.chain, key, issued.bundle)


@pytest.fixture
def put(certs: Path, home: Path, good: Credentials) -> Put:
    """Lays agent-1's files out by hand."""

    def put(layout: Layout) -> Paths:
        paths = leaf_paths(certs, layout, AGENT.name)
        paths.cert.parent.mkdir(parents=True, exist_ok=True)
        paths.cert.write_bytes(good.chain_pem)
        paths.key.write_bytes(good.key_pem)
        paths.key.chmod(0o600)
        paths.ca.write_bytes(good.bundle_pem)
        return paths

    return put


def save(certs: Path, credentials: Credentials, layout: Layout = Layout.HOME) -> Paths:
    return save_leaf(certs, layout, AGENT, credentials.chain, credentials.key, credentials.bundle)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("layout", Layout)
def test_every_layout_alone_is_found_and_loads(
    layout: Layout, certs: Path, put: Put, good: Credentials, now: datetime
) -> None:
    paths = put(layout)
    assert find_layout(certs, "agent-1") is layout
    assert locate(certs, "agent-1") == paths
    assert load_credentials(paths, AGENT, now).chain_pem == good.chain_pem


def test_the_names_are_the_documented_ones(certs: Path, home: Path) -> None:
    kubernetes = leaf_paths(certs, Layout.KUBERNETES, "agent-1")
    assert kubernetes == Paths(certs / "tls.crt", certs / "tls.key", certs / "ca.crt")
    own = leaf_paths(certs, Layout.HOME, "agent-1")
    assert own == Paths(home / "client.crt", home / "client.key", home / "ca.crt")


@pytest.mark.parametrize("layout", Layout)
def test_no_layout_takes_a_name_that_is_none(layout: Layout) -> None:
    with pytest.raises(IdentityError):
        leaf_paths(Path("certs"), layout, "../x")


@pytest.mark.parametrize("others", [(Layout.FLAT,), (Layout.KUBERNETES,), (Layout.FLAT, Layout.KUBERNETES)])
def test_a_directory_of_its_own_wins(others: tuple[Layout, ...], certs: Path, put: Put) -> None:
    for layout in (*others, Layout.HOME, Layout.PARALLAX):
        put(layout)
    assert find_layout(certs, "agent-1") is Layout.PARALLAX


@pytest.mark.parametrize("layout", [Layout.FLAT, Layout.KUBERNETES])
def test_the_certificate_directory_wins_over_the_home(layout: Layout, certs: Path, put: Put) -> None:
    put(Layout.HOME)
    put(layout)
    assert find_layout(certs, "agent-1") is layout


def test_flat_beside_kubernetes_is_no_guess(certs: Path, put: Put) -> None:
    flat, kubernetes = put(Layout.FLAT), put(Layout.KUBERNETES)
    with pytest.raises(ConfigError) as refused:
        locate(certs, "agent-1")
    assert str(refused.value).startswith(f"two layouts in one directory, {flat.cert} and {kubernetes.cert}: ")


def test_the_flat_files_of_somebody_else_are_no_second_layout(certs: Path, put: Put) -> None:
    put(Layout.FLAT)
    kubernetes = put(Layout.KUBERNETES)
    assert locate(certs, "agent-2") == kubernetes


def test_a_secret_with_a_key_alone_counts_and_then_does_not_load(
    certs: Path, put: Put, now: datetime
) -> None:
    put(Layout.HOME)
    paths = put(Layout.KUBERNETES)
    paths.cert.unlink()
    with pytest.raises(ConfigError, match=r"tls\.crt is missing"):
        load_credentials(locate(certs, "agent-1"), AGENT, now)


def test_without_a_home_nothing_is_looked_for_there(certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "")
    with pytest.raises(ConfigError, match="holds no certificate of agent-1"):
        locate(certs, "agent-1")


def test_no_ca_is_looked_for_in_a_home_or_a_secret(certs: Path, put: Put) -> None:
    put(Layout.KUBERNETES)
    put(Layout.HOME)
    assert find_authority(certs) is None


def test_a_home_without_ca_trusts_what_the_system_trusts(
    certs: Path, put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: datetime
) -> None:
    paths = put(Layout.HOME)
    system = tmp_path / "system.pem"
    paths.ca.rename(system)
    monkeypatch.setenv("SSL_CERT_FILE", str(system))
    assert ssl.get_default_verify_paths().cafile == str(system)
    found = locate(certs, "agent-1")
    assert found == Paths(paths.cert, paths.key, system)
    load_credentials(found, AGENT, now)


def test_a_home_with_a_ca_trusts_nobody_else(
    certs: Path, put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = put(Layout.HOME)
    monkeypatch.setenv("SSL_CERT_FILE", str(paths.cert))
    assert locate(certs, "agent-1").ca == paths.ca


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")  # odd serials
def test_the_roots_of_this_system_make_a_bundle() -> None:
    path = system_roots()
    if path is None:
        pytest.skip("this host trusts nobody")
    assert len(TrustBundle.parse(path.read_bytes()).roots) > 1


def test_a_new_home_is_private_and_loads(certs: Path, home: Path, good: Credentials, now: datetime) -> None:
    paths = save(certs, good)
    assert locate(certs, "agent-1") == paths
    assert load_credentials(paths, AGENT, now).chain_pem == good.chain_pem
    assert (mode(home), mode(paths.key), mode(paths.cert), mode(paths.ca)) == (0o700, 0o600, 0o644, 0o644)
    assert paths.cert.readlink() == Path("..data/client.crt")
    assert not certs.exists()


def test_hand_made_files_in_a_home_are_replaced(certs: Path, put: Put, good: Credentials) -> None:
    paths = put(Layout.HOME)
    paths.key.write_bytes(b"torn")
    save(certs, good)
    assert paths.key.read_bytes() == good.key_pem
    assert mode(paths.key) == 0o600


def test_a_home_that_trusts_the_system_goes_on_so(certs: Path, put: Put, good: Credentials) -> None:
    paths = put(Layout.HOME)
    paths.ca.unlink()
    for _ in range(2):
        save(certs, good)
        assert not os.path.lexists(paths.ca)


def test_a_home_of_somebody_else_is_left_alone(
    certs: Path, put: Put, authority: CertificateAuthority, now: datetime
) -> None:
    paths = put(Layout.HOME)
    before = paths.cert.read_bytes()
    other, key = Identity.parse_short("client/cli"), generate_key()
    issued = authority.issue(other, key.public_key(), LeafProfile(), now)
    with pytest.raises(ConfigError, match="belongs to spiffe://"):
        save_leaf(certs, Layout.HOME, other, issued.chain, key, issued.bundle)
    assert paths.cert.read_bytes() == before


def test_a_secret_is_not_ours_to_write(certs: Path, put: Put, good: Credentials) -> None:
    paths = put(Layout.KUBERNETES)
    before = {path: path.read_bytes() for path in certs.iterdir()}
    with pytest.raises(ConfigError) as refused:
        save(certs, good, Layout.KUBERNETES)
    assert str(refused.value) == (f"{paths.cert} is Kubernetes' to write: let cert-manager renew its secret")
    assert {path: path.read_bytes() for path in certs.iterdir()} == before


@pytest.mark.parametrize("layout", [Layout.KUBERNETES, Layout.HOME])
def test_a_ca_has_no_place_in_a_layout_for_one(
    layout: Layout, certs: Path, home: Path, authority: CertificateAuthority
) -> None:
    with pytest.raises(ConfigError, match=f"the layout {layout} holds no CA"):
        save_authority(certs, layout, authority)
    assert not certs.exists()
