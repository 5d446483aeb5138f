"""Files: what is understood, what is refused in one line, and what a reader and a crash see of a swap."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import certificates_to_pem
from parallax.security.credentials import Credentials
from parallax.security.errors import ConfigError, IdentityError
from parallax.security.identity import Identity, Kind
from parallax.security.keys import KeyType, generate_key, key_to_pem
from parallax.security.layouts import (
    WITH_ISSUER,
    Layout,
    Paths,
    authority_paths,
    find_authority,
    leaf_paths,
    load_authority,
    locate,
    save_authority,
    save_leaf,
)
from parallax.security.material import Sources, load_credentials
from parallax.security.profiles import LeafProfile
from parallax.security.snapshot import Content

AGENT = Identity.parse_short("agent/agent-1")
ISSUE = "`parallax certs issue agent-1 --kind agent`"
WRITER = Path(__file__).with_name("torn_writer.py")

Make = Callable[..., Credentials]
Save = Callable[..., Paths]
layouts = pytest.mark.parametrize("layout", WITH_ISSUER)


@pytest.fixture(scope="module")
def make(authority: CertificateAuthority, now: datetime) -> Make:
    def make(identity: Identity = AGENT, by: CertificateAuthority = authority) -> Credentials:
        key = generate_key()
        issued = by.issue(identity, key.public_key(), LeafProfile(), now)
        return Credentials(issued.chain, key, issued.bundle)

    return make


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    return tmp_path / "certs"


@pytest.fixture
def by_hand(certs: Path, make: Make) -> Callable[..., Paths]:
    """Plain files as somebody leaves them who uses openssl."""

    def write(layout: Layout = Layout.PARALLAX, credentials: Credentials | None = None) -> Paths:
        credentials = credentials or make()
        paths = leaf_paths(certs, layout, AGENT.name)
        paths.cert.parent.mkdir(parents=True, exist_ok=True)
        paths.cert.write_bytes(credentials.chain_pem)
        paths.key.write_bytes(credentials.key_pem)
        paths.key.chmod(0o600)
        paths.ca.write_bytes(credentials.bundle_pem)
        return paths

    return write


@pytest.fixture
def save(certs: Path) -> Save:
    def save(credentials: Credentials, layout: Layout = Layout.PARALLAX, identity: Identity = AGENT) -> Paths:
        return save_leaf(certs, layout, identity, credentials.chain, credentials.key, credentials.bundle)

    return save


def refused(act: Callable[..., object], *arguments: Any, **named: Any) -> str:
    """The one line that *act* is refused with."""
    with pytest.raises(ConfigError) as exc:
        act(*arguments, **named)
    text = str(exc.value)
    assert "\n" not in text
    assert "PRIVATE KEY" not in text
    return text


def tree(directory: Path) -> dict[str, object]:
    """All that is there: contents, links and modes."""
    return {
        str(path.relative_to(directory)): (
            stat.S_IMODE(path.lstat().st_mode),
            path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None,
        )
        for path in sorted(directory.rglob("*"))
    }


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class TestNames:
    def test_parallax_layout_is_the_documented_one(self) -> None:
        paths = leaf_paths(Path("certs"), Layout.PARALLAX, "agent-1")
        assert paths == Paths(
            Path("certs/agent-1/cert.pem"), Path("certs/agent-1/key.pem"), Path("certs/agent-1/ca.pem")
        )
        authority = authority_paths(Path("certs"), Layout.PARALLAX)
        assert (authority.cert, authority.key) == (Path("certs/ca/cert.pem"), Path("certs/ca/key.pem"))

    def test_flat_layout_is_the_documented_one(self) -> None:
        paths = leaf_paths(Path("certs"), Layout.FLAT, "agente_py")
        assert paths == Paths(
            Path("certs/agente_py-cert.pem"), Path("certs/agente_py-key.pem"), Path("certs/ca-cert.pem")
        )
        authority = authority_paths(Path("certs"), Layout.FLAT)
        assert (authority.cert, authority.key) == (Path("certs/ca-cert.pem"), Path("certs/ca-key.pem"))

    @pytest.mark.parametrize("name", ["ca", "..", "a/b", "a\0b", "A", "", "x" * 300, "ä", "/etc", "a\nb"])
    @layouts
    def test_a_name_that_could_lead_elsewhere_never_becomes_a_path(self, name: str, layout: Layout) -> None:
        with pytest.raises(IdentityError):
            leaf_paths(Path("certs"), layout, name)
        with pytest.raises(IdentityError):
            locate(Path("certs"), name)

    def test_the_own_directory_wins_over_flat_files(self, certs: Path, by_hand: Any) -> None:
        flat = by_hand(Layout.FLAT)
        assert locate(certs, "agent-1") == flat
        own = by_hand(Layout.PARALLAX)
        assert locate(certs, "agent-1") == own

    def test_half_an_identity_is_located_so_that_the_error_names_the_missing_file(
        self, certs: Path, by_hand: Any, now: datetime
    ) -> None:
        paths = by_hand(Layout.FLAT)
        paths.cert.unlink()
        assert locate(certs, "agent-1") == paths
        assert f"{paths.cert} is missing" in refused(load_credentials, paths, AGENT, now)

    def test_nothing_there_names_the_directory_and_the_command(self, certs: Path) -> None:
        text = refused(locate, certs, "agent-1", Kind.AGENT)
        missing = f"{certs} holds no certificate of agent-1: issue it with {ISSUE}"
        assert text.startswith(f"{missing}; there is no CA either: set PARALLAX_CERTS_DIR")

    def test_beside_a_ca_the_command_that_issues_is_all_that_is_named(
        self, certs: Path, authority: CertificateAuthority
    ) -> None:
        save_authority(certs, Layout.PARALLAX, authority)
        text = refused(locate, certs, "agent-1", Kind.AGENT)
        assert text == f"{certs} holds no certificate of agent-1: issue it with {ISSUE}"

    def test_a_file_in_place_of_the_directory_is_named(self, certs: Path) -> None:
        certs.write_text("mine")
        assert (
            refused(locate, certs, "agent-1") == f"{certs} is not a directory: set PARALLAX_CERTS_DIR to one"
        )

    def test_the_command_fits_a_flat_directory(self, certs: Path, authority: CertificateAuthority) -> None:
        save_authority(certs, Layout.FLAT, authority)
        assert "--kind KIND --layout flat`" in refused(locate, certs, "agent-1")


class TestLoad:
    """Hand-made and our own files load; each thing that can be wrong names its file and its remedy."""

    @layouts
    def test_plain_files_load(self, layout: Layout, by_hand: Any, certs: Path, now: datetime) -> None:
        paths = by_hand(layout)
        loaded = load_credentials(locate(certs, "agent-1"), AGENT, now)
        assert loaded.chain_pem == paths.cert.read_bytes()
        assert loaded.key_pem == paths.key.read_bytes()
        assert loaded.bundle_pem == paths.ca.read_bytes()

    def test_files_load_through_links_wherever_they_lead(
        self, by_hand: Any, tmp_path: Path, now: datetime
    ) -> None:
        paths = by_hand()
        links = Paths(*(tmp_path / f"link-{path.name}" for path in (paths.cert, paths.key, paths.ca)))
        for link, path in zip(
            (links.cert, links.key, links.ca), (paths.cert, paths.key, paths.ca), strict=True
        ):
            link.symlink_to(path)
        assert load_credentials(links, AGENT, now).chain_pem == paths.cert.read_bytes()

    def test_contents_load_as_files_do(self, make: Make, now: datetime) -> None:
        good = make()
        sources = Sources(
            Content("CERT_PEM", good.chain_pem),
            Content("KEY_PEM", good.key_pem),
            Content("CA_PEM", good.bundle_pem),
        )
        assert load_credentials(sources, AGENT, now).chain == good.chain
        assert "PRIVATE" not in repr(sources)

    def test_a_file_and_a_content_may_be_mixed(self, by_hand: Any, make: Make, now: datetime) -> None:
        good = make()
        paths = by_hand(credentials=good)
        mixed = Sources(paths.cert, Content("KEY_PEM", good.key_pem), paths.ca)
        assert load_credentials(mixed, AGENT, now).chain == good.chain

    def test_a_wrong_content_names_its_setting(self, make: Make, now: datetime) -> None:
        good = make()
        for wrong in ("cert", "key", "ca"):
            parts = {"cert": good.chain_pem, "key": good.key_pem, "ca": good.bundle_pem} | {wrong: b"SECRET?"}
            sources = Sources(**{part: Content(f"THE_{part}_PEM", data) for part, data in parts.items()})
            text = refused(load_credentials, sources, AGENT, now)
            assert text.startswith(f"THE_{wrong}_PEM: not a ")
            assert "SECRET?" not in text

    @pytest.mark.parametrize("part", ["cert", "key", "ca"])
    def test_missing(self, part: str, by_hand: Any, now: datetime) -> None:
        paths = by_hand()
        getattr(paths, part).unlink()
        text = refused(load_credentials, paths, AGENT, now)
        assert text.startswith(f"{getattr(paths, part)} is missing: ")
        assert (ISSUE in text) is (part != "ca")

    @pytest.mark.parametrize("part", ["cert", "key", "ca"])
    @pytest.mark.parametrize(
        "damage",
        [
            lambda _: b"",
            lambda pem: pem[:150],
            lambda _: b"\0" * 9,
            lambda pem: pem[:99] + b"!" + pem[99:],
        ],
    )
    def test_torn_or_not_pem(self, part: str, damage: Any, by_hand: Any, now: datetime) -> None:
        paths = by_hand()
        path = getattr(paths, part)
        path.write_bytes(damage(path.read_bytes()))
        text = refused(load_credentials, paths, AGENT, now)
        assert text.startswith(f"{path}: not a ")
        assert (ISSUE in text) is (part != "ca")

    @pytest.mark.parametrize("part", ["cert", "key", "ca"])
    def test_a_directory_in_its_place(self, part: str, by_hand: Any, now: datetime) -> None:
        paths = by_hand()
        getattr(paths, part).unlink()
        getattr(paths, part).mkdir()
        assert refused(load_credentials, paths, AGENT, now).startswith(
            f"{getattr(paths, part)} is not a regular file"
        )

    def test_a_pipe_without_a_writer_does_not_hang(self, by_hand: Any, now: datetime) -> None:
        paths = by_hand()
        paths.cert.unlink()
        os.mkfifo(paths.cert)
        assert "is not a regular file" in refused(load_credentials, paths, AGENT, now)

    def test_an_endless_file_is_not_read(self, by_hand: Any, now: datetime) -> None:
        paths = by_hand()
        os.truncate(paths.ca, 1 << 40)
        assert f"{paths.ca} is larger than" in refused(load_credentials, paths, AGENT, now)

    def test_a_link_in_a_circle(self, by_hand: Any, now: datetime) -> None:
        paths = by_hand()
        paths.key.unlink()
        paths.key.symlink_to(paths.key)
        assert refused(load_credentials, paths, AGENT, now).startswith(f"{paths.key} cannot be opened")

    def test_encrypted_key(self, by_hand: Any, make: Make, now: datetime) -> None:
        paths = by_hand(credentials=(good := make()))
        paths.key.write_bytes(key_to_pem(good.key, b"secret"))
        text = refused(load_credentials, paths, AGENT, now)
        assert text.startswith(f"{paths.key}: encrypted and no passphrase: decrypt it with `openssl pkey`")

    def test_key_of_another_certificate(self, by_hand: Any, make: Make, now: datetime) -> None:
        paths = by_hand()
        paths.key.write_bytes(make().key_pem)
        text = refused(load_credentials, paths, AGENT, now)
        assert text.startswith(f"{paths.key} does not fit {paths.cert}: ")
        assert ISSUE in text

    def test_ca_of_somebody_else(self, by_hand: Any, now: datetime) -> None:
        paths = by_hand()
        paths.ca.write_bytes(CertificateAuthority.create(now=now, name="Other CA").bundle.pem)
        text = refused(load_credentials, paths, AGENT, now)
        assert text.startswith(f"{paths.cert} cannot be used with {paths.ca}: ")
        assert ISSUE in text

    def test_leaf_in_place_of_the_ca(self, by_hand: Any, now: datetime) -> None:
        paths = by_hand()
        paths.ca.write_bytes(paths.cert.read_bytes())
        text = refused(load_credentials, paths, AGENT, now)
        assert text.startswith(f"{paths.ca}: ")
        assert "not a CA" in text

    def test_ca_in_place_of_the_leaf(
        self, by_hand: Any, authority: CertificateAuthority, now: datetime
    ) -> None:
        paths = by_hand()
        paths.cert.write_bytes(authority.bundle.pem)
        paths.key.write_bytes(key_to_pem(authority.key))
        assert refused(load_credentials, paths, AGENT, now).startswith(
            f"{paths.cert} cannot be used with {paths.ca}"
        )

    def test_expired(self, by_hand: Any, now: datetime) -> None:
        paths = by_hand()
        text = refused(load_credentials, paths, AGENT, now + timedelta(days=366))
        assert text.startswith(f"{paths.cert}: expired at 2")
        assert ISSUE in text

    def test_not_yet_valid(self, by_hand: Any, now: datetime) -> None:
        paths = by_hand()
        text = refused(load_credentials, paths, AGENT, now - timedelta(days=1))
        assert text.startswith(f"{paths.cert}: not valid before 2")
        assert "check this host's clock" in text

    def test_for_another_identity(self, by_hand: Any, make: Make, now: datetime) -> None:
        paths = by_hand(credentials=make(Identity.parse_short("agent/agent-2")))
        text = refused(load_credentials, paths, AGENT, now)
        assert text.startswith(f"{paths.cert} is not for {AGENT}: ")
        assert "agent/agent-2" in text
        assert ISSUE in text

    def test_for_nobody_in_particular(
        self, by_hand: Any, forge: Any, authority: CertificateAuthority, now: datetime
    ) -> None:
        made = forge(common_names=("Some Body",), uris=(), dns=())
        paths = by_hand(credentials=Credentials((made.certificate,), made.key, authority.bundle))
        assert refused(load_credentials, paths, AGENT, now).startswith(f"{paths.cert} is not for {AGENT}: ")

    def test_without_client_authentication(
        self, by_hand: Any, forge: Any, authority: CertificateAuthority, now: datetime
    ) -> None:
        made = forge(usages=[ExtendedKeyUsageOID.SERVER_AUTH])
        paths = by_hand(credentials=Credentials((made.certificate,), made.key, authority.bundle))
        text = refused(load_credentials, paths, AGENT, now)
        assert text.startswith(f"{paths.cert} cannot be used with {paths.ca}: ")
        assert "clientAuth" in text

    @pytest.mark.parametrize("wide", [0o644, 0o640, 0o604, 0o602, 0o620, 0o660, 0o610, 0o601, 0o777])
    def test_key_open_to_others(self, wide: int, by_hand: Any, now: datetime) -> None:
        paths = by_hand()
        os.chown(paths.key, os.geteuid(), -1)
        paths.key.chmod(wide)
        if wide == 0o640 and os.geteuid() == 0:
            os.chown(paths.key, -1, 54321)  # not one of our groups
        text = refused(load_credentials, paths, AGENT, now)
        assert text == f"{paths.key} is open to others (mode {wide:04o}): `chmod 600 {paths.key}`"

    @pytest.mark.parametrize("narrow", [0o600, 0o400, 0o700])
    def test_key_for_its_owner_alone_is_fine(self, narrow: int, by_hand: Any, now: datetime) -> None:
        paths = by_hand()
        paths.key.chmod(narrow)
        load_credentials(paths, AGENT, now)

    def test_the_advice_can_be_pasted_whatever_the_path(
        self, tmp_path: Path, make: Make, now: datetime
    ) -> None:
        good, directory = make(), tmp_path / "it's; a\ndir"
        directory.mkdir()
        paths = Paths(directory / "c", directory / "k", directory / "a")
        paths.cert.write_bytes(good.chain_pem)
        paths.key.write_bytes(good.key_pem)
        paths.key.chmod(0o644)
        text = refused(load_credentials, paths, AGENT, now)
        assert "\\n" in text


class TestUnprivileged:
    """
    What root cannot see, because it may read everything.

    As root the files belong to uid 12345 and a child of that uid loads them; else they are ours.
    """

    UID = 12345 if os.geteuid() == 0 else os.geteuid()
    only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")

    @pytest.fixture
    def outside(self) -> Iterator[Path]:
        """A directory that everybody can enter; pytest's own are private."""
        directory = Path(tempfile.mkdtemp())
        directory.chmod(0o755)
        yield directory
        for path in (directory, *directory.iterdir()):
            path.chmod(0o755)
        shutil.rmtree(directory)

    @pytest.fixture
    def paths(self, outside: Path, make: Make) -> Paths:
        good, inner = make(), outside / "agent-1"
        inner.mkdir()
        paths = Paths(inner / "cert.pem", inner / "key.pem", inner / "ca.pem")
        paths.cert.write_bytes(good.chain_pem)
        paths.key.write_bytes(good.key_pem)
        paths.ca.write_bytes(good.bundle_pem)
        paths.key.chmod(0o400)
        for path in (inner, paths.cert, paths.key, paths.ca):
            os.chown(path, self.UID, -1)
        return paths

    def load(self, paths: Paths, groups: Sequence[int] = ()) -> str:
        """What a process of that uid gets: "fine", or the error."""
        files = [str(paths.cert), str(paths.key), str(paths.ca)]
        code = f"""
import os
from datetime import UTC, datetime
from pathlib import Path
from parallax.security.errors import ConfigError
from parallax.security.identity import Identity
from parallax.security.layouts import Paths
from parallax.security.material import load_credentials
def load():
    try:
        load_credentials(Paths(*map(Path, {files})), Identity.parse_short("agent/agent-1"), datetime.now(UTC))
    except ConfigError as exc:
        return str(exc)
    return "fine"
load()  # imports all it needs while it still may
if os.geteuid() == 0:
    os.setgroups({list(groups)})
    os.setgid({self.UID})
    os.setuid({self.UID})
print(load(), end="")
"""
        return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout

    def test_its_own_files_load(self, paths: Paths) -> None:
        assert self.load(paths) == "fine"

    @pytest.mark.parametrize("part", ["cert", "key", "ca"])
    def test_a_file_it_may_not_read_is_named_with_the_command(self, part: str, paths: Paths) -> None:
        path = getattr(paths, part)
        path.chmod(0o000)
        assert self.load(paths) == (
            f"{path} is not readable by this process (uid {self.UID}): `chmod u+r {path}`"
        )

    @only_root
    def test_a_certificate_directory_of_somebody_else_is_named_with_the_command(self, outside: Path) -> None:
        outside.chmod(0o700)
        code = f"""
import os
from pathlib import Path
from parallax.security.errors import ConfigError
from parallax.security.layouts import locate
os.setuid({self.UID})
try:
    locate(Path("{outside}"), "agent-2")
except ConfigError as exc:
    print(exc, end="")
"""
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        assert done.stdout == f"{outside} cannot be entered: `chown {self.UID} {outside}`"

    @only_root
    @pytest.mark.parametrize("part", ["cert", "key", "ca"])
    def test_a_file_of_somebody_else_is_named_with_the_command(self, part: str, paths: Paths) -> None:
        path = getattr(paths, part)
        path.chmod(0o600)
        os.chown(path, 0, 0)
        assert self.load(paths) == (
            f"{path} is not readable by this process (uid {self.UID}): `chown {self.UID} {path}`"
        )

    def test_a_directory_it_may_not_enter_is_named(self, paths: Paths) -> None:
        paths.cert.parent.chmod(0o000)
        text = self.load(paths)
        us = f"this process (uid {self.UID})"
        assert text == f"{paths.cert} is not readable by {us}: let it enter {paths.cert.parent}"

    @only_root
    def test_a_key_for_its_group_is_allowed_if_root_owns_it(self, paths: Paths) -> None:
        """Kubernetes' `fsGroup`: root:<group> 0440 or 0640."""
        os.chown(paths.key, 0, 777)
        for allowed in (0o440, 0o640):
            paths.key.chmod(allowed)
            assert self.load(paths, groups=(777,)) == "fine"

    @only_root
    def test_a_key_for_its_group_is_refused_if_root_does_not_own_it(self, paths: Paths) -> None:
        os.chown(paths.key, self.UID, 777)
        paths.key.chmod(0o640)
        assert "is open to others (mode 0640)" in self.load(paths, groups=(777,))

    @only_root
    def test_a_key_that_its_group_may_write_is_refused(self, paths: Paths) -> None:
        os.chown(paths.key, 0, 777)
        paths.key.chmod(0o660)
        assert "is open to others (mode 0660)" in self.load(paths, groups=(777,))


class TestSave:
    @layouts
    def test_what_was_saved_is_located_and_loads(
        self, layout: Layout, certs: Path, make: Make, save: Save, now: datetime
    ) -> None:
        good = make()
        assert save(good, layout) == locate(certs, "agent-1")
        loaded = load_credentials(locate(certs, "agent-1"), AGENT, now)
        assert (loaded.chain_pem, loaded.key_pem, loaded.bundle_pem) == (
            good.chain_pem,
            good.key_pem,
            good.bundle_pem,
        )

    @layouts
    def test_modes_are_as_promised(self, layout: Layout, certs: Path, make: Make, save: Save) -> None:
        paths = save(make(), layout)
        assert [mode(path) for path in (paths.key, paths.cert, paths.ca)] == [0o600, 0o644, 0o644]
        assert mode(certs) == mode(paths.key.resolve().parent) == 0o700
        assert {mode(path) for path in certs.rglob("*") if path.is_dir()} == {0o700}

    @pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o177, 0o777])
    @layouts
    def test_modes_do_not_depend_on_the_umask(
        self, umask: int, layout: Layout, certs: Path, make: Make, save: Save, authority: CertificateAuthority
    ) -> None:
        before = os.umask(umask)
        try:
            save_authority(certs, layout, authority)
            paths = save(make(), layout)
        finally:
            os.umask(before)
        secret = authority_paths(certs, layout).key
        assert [mode(path) for path in (paths.key, paths.cert, paths.ca, secret)] == [
            0o600,
            0o644,
            0o644,
            0o600,
        ]
        assert {mode(path) for path in (certs, paths.key.parent, secret.parent)} == {0o700}

    @layouts
    def test_a_directory_that_exists_keeps_its_mode(
        self, layout: Layout, certs: Path, make: Make, save: Save
    ) -> None:
        certs.mkdir(mode=0o755)
        paths = save(make(), layout)
        assert mode(certs) == 0o755
        assert mode(paths.key) == 0o600

    @layouts
    def test_a_wide_key_is_replaced_by_a_narrow_one(
        self, layout: Layout, by_hand: Any, make: Make, save: Save
    ) -> None:
        paths = by_hand(layout)
        paths.key.chmod(0o644)
        save(make(), layout)
        assert mode(paths.key) == 0o600

    @layouts
    def test_saving_again_replaces_the_set_and_leaves_one_version(
        self, layout: Layout, certs: Path, make: Make, save: Save, now: datetime
    ) -> None:
        for _ in range(3):
            good = make()
            paths = save(good, layout)
            assert load_credentials(paths, AGENT, now).chain == good.chain
        assert len(list(certs.rglob("*@*"))) == 1

    def test_kubernetes_style_links(self, make: Make, save: Save) -> None:
        paths = save(make())
        assert paths.cert.readlink() == Path("..data/cert.pem")
        assert paths.cert.parent.joinpath("..data").readlink().name.startswith("..data@")

    def test_two_flat_identities_live_side_by_side(
        self, certs: Path, make: Make, save: Save, now: datetime
    ) -> None:
        """The versions of `a` must not be taken for those of `a.b`, nor the other way round."""
        people = [Identity.parse_short(f"agent/{name}") for name in ("a", "a.b", "a-cert.pem", "data")]
        for _ in range(2):
            for person in people:
                save(make(person), Layout.FLAT, person)
        for person in people:
            load_credentials(locate(certs, person.name), person, now)

    @layouts
    def test_files_made_by_hand_are_replaced(
        self, layout: Layout, by_hand: Any, make: Make, save: Save, now: datetime
    ) -> None:
        paths, new = by_hand(layout), make()
        (paths.cert.parent / "csr.pem").write_text("mine")
        save(new, layout)
        assert load_credentials(paths, AGENT, now).chain == new.chain
        assert (paths.cert.parent / "csr.pem").read_text() == "mine"

    def test_one_file_put_by_hand_over_our_links_is_replaced(
        self, make: Make, save: Save, now: datetime
    ) -> None:
        paths, new = save(make()), make()
        paths.cert.unlink()
        paths.cert.write_bytes(make().chain_pem)
        save(new)
        assert load_credentials(paths, AGENT, now).chain == new.chain
        assert paths.cert.is_symlink()

    def test_an_expired_certificate_of_the_same_identity_is_replaced(
        self, by_hand: Any, make: Make, save: Save, forge: Any, authority: CertificateAuthority, now: datetime
    ) -> None:
        made = forge(not_before=timedelta(days=-9), not_after=timedelta(days=-1))
        paths = by_hand(credentials=Credentials((made.certificate,), made.key, authority.bundle))
        save(new := make())
        assert load_credentials(paths, AGENT, now).chain == new.chain

    def test_a_flat_ca_certificate_is_shared_and_never_changed(
        self, certs: Path, make: Make, save: Save, authority: CertificateAuthority, now: datetime
    ) -> None:
        save_authority(certs, Layout.FLAT, authority)
        before = tree(certs)
        save(make(), Layout.FLAT)
        assert before.items() <= tree(certs).items()
        other = CertificateAuthority.create(now=now)
        text = refused(save, make(by=other), Layout.FLAT)
        assert text.startswith(f"{certs / 'ca-cert.pem'}: is of another CA")

    def test_two_writers_at_once_leave_one_whole_set(
        self, certs: Path, make: Make, save: Save, now: datetime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "fsync", lambda _: None)  # on a slow disk one waits long for the others
        sets = [make() for _ in range(4)]
        failures: list[ConfigError] = []

        def write(credentials: Credentials) -> None:
            try:
                for _ in range(10):
                    save(credentials)
            except ConfigError as exc:
                failures.append(exc)

        threads = [threading.Thread(target=write, args=(each,)) for each in sets]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert load_credentials(locate(certs, "agent-1"), AGENT, now).chain in [each.chain for each in sets]
        assert len(list(certs.rglob("*@*"))) == 1


class TestSaveRefuses:
    """One line, and nothing on disk changes."""

    @pytest.fixture(autouse=True)
    def unchanged(self, tmp_path: Path) -> Iterator[Callable[[], None]]:
        """Call it when everything is laid out; the tree must be the same at the end."""
        before: list[dict[str, object]] = []
        yield lambda: before.append(tree(tmp_path))
        assert before == [tree(tmp_path)]

    @pytest.mark.parametrize("whose", ["agent/agent-2", "client/agent-1", "service/agent-1"])
    @layouts
    def test_where_another_identity_lies(
        self, whose: str, layout: Layout, by_hand: Any, make: Make, save: Save, unchanged: Any
    ) -> None:
        paths = by_hand(layout, make(Identity.parse_short(whose)))
        unchanged()
        text = refused(save, make(), layout)
        assert text.startswith(f"{paths.cert}: belongs to spiffe://parallax.local/{whose}")
        assert "move it away" in text

    @layouts
    def test_where_another_trust_domain_lies(
        self, layout: Layout, by_hand: Any, make: Make, save: Save, unchanged: Any
    ) -> None:
        paths = by_hand(layout, make(Identity.parse_short("agent/agent-1", "example.org")))
        unchanged()
        assert refused(save, make(), layout).startswith(f"{paths.cert}: ")

    @pytest.mark.parametrize("content", [b"", b"notes", b"-----BEGIN CERTIFICATE-----\n"])
    def test_where_something_lies_that_is_no_certificate(
        self, content: bytes, by_hand: Any, make: Make, save: Save, unchanged: Any
    ) -> None:
        paths = by_hand()
        paths.cert.write_bytes(content)
        unchanged()
        assert refused(save, make()).startswith(f"{paths.cert}: not a certificate")

    def test_where_a_key_lies_alone(self, by_hand: Any, make: Make, save: Save, unchanged: Any) -> None:
        """Somebody has just made it with openssl and waits for the certificate."""
        paths = by_hand()
        paths.cert.unlink()
        unchanged()
        assert refused(save, make()) == (
            f"{paths.key} has no certificate, so it may be anybody's: move it away"
        )

    def test_a_certificate_of_somebody_else(
        self, certs: Path, make: Make, save: Save, unchanged: Any
    ) -> None:
        certs.mkdir()
        unchanged()
        other = Identity.parse_short("agent/agent-2")
        assert "not a pair of" in refused(save, make(), identity=other)

    def test_a_key_that_does_not_fit(self, certs: Path, make: Make, unchanged: Any) -> None:
        certs.mkdir()
        unchanged()
        good = make()
        text = refused(save_leaf, certs, Layout.PARALLAX, AGENT, good.chain, generate_key(), good.bundle)
        assert "not a pair of" in text

    def test_when_the_certificate_directory_is_a_file(
        self, certs: Path, make: Make, save: Save, unchanged: Any
    ) -> None:
        certs.write_text("mine")
        unchanged()
        for layout in WITH_ISSUER:
            assert str(certs) in refused(save, make(), layout)

    def test_when_the_identity_directory_is_a_file(
        self, certs: Path, make: Make, save: Save, unchanged: Any
    ) -> None:
        certs.mkdir()
        (certs / "agent-1").write_text("mine")
        unchanged()
        assert str(certs / "agent-1") in refused(save, make())

    @pytest.mark.parametrize("target", ["../elsewhere", "agent-2", "missing", "."])
    def test_an_identity_directory_that_is_a_link(
        self, target: str, tmp_path: Path, certs: Path, make: Make, save: Save, unchanged: Any
    ) -> None:
        certs.mkdir()
        (certs / "agent-2").mkdir()
        (tmp_path / "elsewhere").mkdir()
        (certs / "agent-1").symlink_to(target)
        unchanged()
        assert refused(save, make()).startswith(
            f"cannot write to {certs / 'agent-1'}: not a directory, or a link"
        )

    @pytest.mark.parametrize("name", ["cert.pem", "key.pem", "ca.pem"])
    @pytest.mark.parametrize("target", ["../../victim", "..data/other.pem", "../agent-2/key.pem"])
    def test_a_file_that_is_a_link_of_somebody(
        self, name: str, target: str, tmp_path: Path, by_hand: Any, make: Make, save: Save, unchanged: Any
    ) -> None:
        paths = by_hand()
        (tmp_path / "victim").write_bytes(paths.cert.read_bytes())
        path = paths.cert.parent / name
        path.unlink()
        path.symlink_to(target)
        unchanged()
        assert str(path) in refused(save, make())

    @pytest.mark.parametrize(
        "target", ["../agent-2", "/usr", "..2026_01_01", "..data@x/../../elsewhere", "..other@x"]
    )
    def test_a_data_link_that_is_not_ours(
        self, target: str, by_hand: Any, make: Make, save: Save, unchanged: Any
    ) -> None:
        """A mounted Kubernetes secret among them: the kubelet would undo what we write."""
        paths = by_hand()
        (paths.cert.parent / "..data").symlink_to(target)
        unchanged()
        assert "was not made by this program" in refused(save, make())

    def test_a_data_directory_that_is_not_ours(
        self, by_hand: Any, make: Make, save: Save, unchanged: Any
    ) -> None:
        paths = by_hand()
        (paths.cert.parent / "..data").mkdir()
        unchanged()
        assert "was not made by this program" in refused(save, make())

    @pytest.mark.parametrize("link", ["agent-1-cert.pem", "agent-1-key.pem", "..agent-1"])
    def test_a_flat_link_of_somebody(
        self, link: str, tmp_path: Path, certs: Path, by_hand: Any, make: Make, save: Save, unchanged: Any
    ) -> None:
        paths = by_hand(Layout.FLAT)
        paths.ca.unlink()
        paths.cert.rename(tmp_path / "victim")
        (certs / link).unlink(missing_ok=True)
        (certs / link).symlink_to("../victim")
        unchanged()
        assert str(certs) in refused(save, make(), Layout.FLAT)

    def test_a_directory_in_place_of_a_file(
        self, by_hand: Any, make: Make, save: Save, unchanged: Any
    ) -> None:
        paths = by_hand()
        paths.ca.unlink()
        paths.ca.mkdir()
        unchanged()
        assert f"{paths.ca} is neither a file nor our own link" in refused(save, make())


class TestSwap:
    """What a reader and a crash see; each in a program that forks, kills and looks, see `torn_writer.py`."""

    @staticmethod
    def run(*arguments: object) -> dict[str, int]:
        done = subprocess.run(
            [sys.executable, str(WRITER), *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=25,
        )
        assert done.returncode == 0, done.stderr
        result: dict[str, int] = json.loads(done.stdout)
        return result

    @layouts
    def test_a_writer_killed_at_random_never_leaves_a_torn_set(self, layout: Layout, certs: Path) -> None:
        seen = self.run("killed", layout, certs, 50)
        assert seen["reads"] > 50
        assert seen["new"], "every writer was killed before it wrote anything"
        assert seen["left"] == 1

    @layouts
    def test_a_writer_killed_before_any_call_leaves_the_old_set_or_the_new(
        self, layout: Layout, certs: Path
    ) -> None:
        assert self.run("stepwise", layout, certs)["steps"] > 40

    @layouts
    def test_no_key_is_wide_for_an_instant(self, layout: Layout, certs: Path) -> None:
        assert self.run("modes", layout, certs)["seen"] > 50

    @layouts
    def test_a_full_disk_leaves_the_old_set_and_nothing_of_the_new(self, layout: Layout, certs: Path) -> None:
        assert self.run("full", layout, certs) == {"refused": 2}

    def test_a_reader_who_is_overtaken_reads_again(
        self, certs: Path, make: Make, save: Save, now: datetime
    ) -> None:
        """A writer in a tight loop; each load gives one whole set."""
        sets = [make() for _ in range(2)]
        paths = save(sets[0])
        chains = {each.chain for each in sets}
        stop = threading.Event()

        def write() -> None:
            while not stop.is_set():
                for each in sets:
                    save(each)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(100):
                assert load_credentials(paths, AGENT, now).chain in chains
        finally:
            stop.set()
            writer.join()


class TestAuthority:
    @layouts
    @pytest.mark.parametrize("passphrase", [None, b"correct horse"])
    @pytest.mark.parametrize("key_type", [KeyType.P256, KeyType.RSA2048])
    def test_what_was_saved_loads(
        self, layout: Layout, passphrase: bytes | None, key_type: KeyType, certs: Path, now: datetime
    ) -> None:
        saved = CertificateAuthority.create(now=now, key_type=key_type)
        paths = save_authority(certs, layout, saved, passphrase)
        assert find_authority(certs) is layout
        for given in (layout, None):
            loaded = load_authority(certs, given, passphrase)
            assert (loaded.certificate, loaded.bundle) == (saved.certificate, saved.bundle)
            loaded.issue(AGENT, generate_key().public_key(), LeafProfile(), now)
        assert (b"ENCRYPTED" in paths.key.read_bytes()) is (passphrase is not None)
        assert [mode(paths.key), mode(paths.cert), mode(paths.key.parent)] == [0o600, 0o644, 0o700]

    def test_an_intermediate_keeps_its_chain(self, certs: Path, forge: Any, now: datetime) -> None:
        root = forge.authority("Root")
        middle = forge.authority("Middle", issuer=root)
        lower = forge.authority("Lower", issuer=middle)
        from parallax.security.bundle import TrustBundle

        saved = CertificateAuthority(
            lower.certificate, lower.key, TrustBundle((root.certificate,)), (middle.certificate,)
        )
        save_authority(certs, Layout.PARALLAX, saved)
        loaded = load_authority(certs)
        assert loaded.intermediates == saved.intermediates
        assert loaded.bundle == saved.bundle
        issued = loaded.issue(AGENT, generate_key().public_key(), LeafProfile(), now)
        assert len(issued.chain) == 3

    def test_somebody_is_asked_for_the_passphrase_only_if_the_key_is_encrypted(
        self, certs: Path, tmp_path: Path, authority: CertificateAuthority
    ) -> None:
        def never() -> bytes:
            raise AssertionError

        save_authority(certs, Layout.FLAT, authority)
        load_authority(certs, passphrase=never)
        save_authority(tmp_path / "other", Layout.FLAT, authority, b"secret")
        load_authority(tmp_path / "other", passphrase=lambda: b"secret")

    @layouts
    def test_files_made_by_openssl_load(
        self, layout: Layout, certs: Path, require_tool: Callable[[str], str]
    ) -> None:
        """The guide's manual commands, and the traditional encrypted form that older scripts write."""
        openssl, paths = require_tool("openssl"), authority_paths(certs, layout)
        paths.key.parent.mkdir(parents=True)
        for command in (
            f"genrsa -traditional -aes256 -passout pass:secret -out {paths.key} 2048",
            f"req -new -x509 -key {paths.key} -passin pass:secret -out {paths.cert} -subj /O=P/CN=Root",
        ):
            subprocess.run([openssl, *command.split()], check=True, capture_output=True)
        loaded = load_authority(certs, passphrase=b"secret")
        loaded.issue(AGENT, generate_key().public_key(), LeafProfile(), datetime.now(UTC))

    def test_two_authorities_in_one_directory_are_not_guessed_between(
        self, certs: Path, tmp_path: Path, authority: CertificateAuthority
    ) -> None:
        save_authority(certs, Layout.FLAT, authority)
        save_authority(tmp_path / "other", Layout.PARALLAX, authority)
        shutil.move(tmp_path / "other" / "ca", certs / "ca")
        for act in (find_authority, load_authority):
            assert "two CAs in one directory" in refused(act, certs)
        load_authority(certs, Layout.FLAT)

    def test_none_is_there(self, certs: Path) -> None:
        assert find_authority(certs) is None
        assert refused(load_authority, certs) == f"{certs} holds no CA: make one with `parallax ca init`"
        assert not certs.exists()


class TestAuthorityIsNeverReplaced:
    """Every partial state is one line that names the file, and not a byte on disk changes."""

    @staticmethod
    def damage(paths: Paths, state: str, now: datetime) -> Path:  # noqa: C901 - one case for each state
        """Bring *paths* into *state*; the file that the error must name."""
        other = CertificateAuthority.create(now=now)
        match state:
            case "certificate without key":
                paths.key.unlink()
                return paths.key
            case "key without certificate":
                paths.cert.unlink()
                return paths.cert
            case "torn certificate":
                paths.cert.write_bytes(paths.cert.read_bytes()[:200])
                return paths.cert
            case "empty certificate":
                paths.cert.write_bytes(b"")
                return paths.cert
            case "torn key":
                paths.key.write_bytes(paths.key.read_bytes()[:100])
                return paths.key
            case "key of another CA":
                paths.key.write_bytes(key_to_pem(other.key, b"secret"))
                return paths.key
            case "certificate of another CA":
                paths.cert.write_bytes(other.bundle.pem)
                return paths.cert
            case "leaf in place of the CA":
                leaf = other.issue(AGENT, generate_key().public_key(), LeafProfile(), now)
                paths.cert.write_bytes(certificates_to_pem(leaf.chain))
                return paths.cert
            case "key open to others":
                paths.key.chmod(0o644)
                return paths.key
            case "dangling link":
                paths.key.unlink()
                paths.key.symlink_to("nowhere")
                return paths.key
        raise AssertionError(state)

    @layouts
    @pytest.mark.parametrize(
        "state",
        [
            "certificate without key",
            "key without certificate",
            "torn certificate",
            "empty certificate",
            "torn key",
            "key of another CA",
            "certificate of another CA",
            "leaf in place of the CA",
            "key open to others",
            "dangling link",
        ],
    )
    def test_damaged(
        self, layout: Layout, state: str, certs: Path, authority: CertificateAuthority, now: datetime
    ) -> None:
        paths = save_authority(certs, layout, authority, b"secret")
        named = self.damage(paths, state, now)
        before = tree(certs)
        text = refused(load_authority, certs, passphrase=b"secret")
        assert str(named) in text
        assert "restore" in text or "chmod 600" in text
        assert "exists already" in refused(
            save_authority, certs, layout, CertificateAuthority.create(now=now)
        )
        assert tree(certs) == before

    @layouts
    @pytest.mark.parametrize(
        ("passphrase", "cause"),
        [
            (b"wrong", "wrong passphrase"),
            (b"", "encrypted and no passphrase"),
            (None, "encrypted and no passphrase"),
            (lambda: b"wrong", "wrong passphrase"),
        ],
    )
    def test_wrong_passphrase(
        self, layout: Layout, passphrase: Any, cause: str, certs: Path, authority: CertificateAuthority
    ) -> None:
        paths = save_authority(certs, layout, authority, b"secret")
        before = tree(certs)
        text = refused(load_authority, certs, passphrase=passphrase)
        assert text.startswith(f"{paths.key}: {cause}: ")
        assert "PARALLAX_CA_PASSPHRASE_FILE" in text
        assert tree(certs) == before

    @layouts
    def test_whole(self, layout: Layout, certs: Path, authority: CertificateAuthority, now: datetime) -> None:
        save_authority(certs, layout, authority)
        before = tree(certs)
        for other in WITH_ISSUER:
            text = refused(save_authority, certs, other, CertificateAuthority.create(now=now))
            assert "exists already: a CA is never replaced" in text
        assert tree(certs) == before

    def test_an_empty_passphrase_protects_nothing_and_is_refused(
        self, certs: Path, authority: CertificateAuthority
    ) -> None:
        assert "empty passphrase" in refused(save_authority, certs, Layout.FLAT, authority, b"")
        assert not certs.exists()

    def test_a_ca_directory_that_is_a_link_is_refused(
        self, certs: Path, tmp_path: Path, authority: CertificateAuthority
    ) -> None:
        (tmp_path / "elsewhere").mkdir()
        certs.mkdir()
        (certs / "ca").symlink_to(tmp_path / "elsewhere")
        assert "not a directory, or a link" in refused(save_authority, certs, Layout.PARALLAX, authority)
        assert not list((tmp_path / "elsewhere").iterdir())

    def test_what_a_crash_left_of_a_key_is_removed_by_the_next_attempt(
        self, certs: Path, authority: CertificateAuthority
    ) -> None:
        certs.mkdir()
        (certs / "..ca-key.pem@0123").write_text("half a key")
        save_authority(certs, Layout.FLAT, authority)
        assert sorted(path.name for path in certs.iterdir()) == ["ca-cert.pem", "ca-key.pem"]
