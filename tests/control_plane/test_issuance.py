"""Who has a certificate is issued another one: of what is it made, and when is there none."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest
from cryptography import x509

from parallax.control_plane.issuance import MAX_RENEWALS, Issuance
from parallax.control_plane.issuer import IssuerFiles
from parallax.security.authority import CertificateAuthority, Issued
from parallax.security.bundle import TrustBundle
from parallax.security.errors import ConfigError, NotAuthorized, ParallaxError, Unavailable
from parallax.security.identity import Identity, Kind
from parallax.security.keys import KeyType, PrivateKey, generate_key, key_id
from parallax.security.layouts import Layout, save_authority
from parallax.security.profiles import LeafProfile, lifetime_of, sans_of
from parallax.security.request import new_request
from parallax.security.verification import identity_of

AGENT_1: Final = Identity("parallax.local", Kind.AGENT, "agent-1")
AGENT_2: Final = Identity("parallax.local", Kind.AGENT, "agent-2")
NOW: Final = datetime(2026, 6, 1, tzinfo=UTC)
CA: Final = CertificateAuthority.create(now=NOW - timedelta(days=30))


class Desk:
    """An issuance with a clock set by hand, and what became of it."""

    def __init__(
        self,
        authority: CertificateAuthority = CA,
        bundle: TrustBundle | None = None,
        crl_url: str | None = None,
    ) -> None:
        self.now = NOW
        self.recorded: list[tuple[x509.Certificate, Identity, x509.Certificate, str]] = []
        self.duplicates: list[Identity] = []
        self.problem: ParallaxError | None = None
        self.issuance = Issuance(
            lambda: authority,
            lambda: bundle or authority.bundle,
            self._enter,
            lambda: self.now,
            on_duplicate=self.duplicates.append,
            crl_url=crl_url,
        )

    async def _enter(
        self, leaf: x509.Certificate, identity: Identity, issuer: x509.Certificate, requested_by: str
    ) -> None:
        if self.problem is not None:
            raise self.problem
        self.recorded.append((leaf, identity, issuer, requested_by))

    async def renew(
        self, presented: x509.Certificate, key: PrivateKey | None = None, identity: Identity = AGENT_1
    ) -> Issued:
        key = key or generate_key()
        return await self.issuance.renew(identity, presented, new_request(identity, key))


def leaf(profile: LeafProfile | None = None, identity: Identity = AGENT_1) -> x509.Certificate:
    return CA.issue(identity, generate_key().public_key(), profile or LeafProfile(), NOW).chain[0]


async def test_it_is_of_the_same_identity_for_the_new_key_and_was_recorded_first() -> None:
    desk, key = Desk(), generate_key()
    issued = await desk.renew(leaf(), key)
    new = issued.chain[0]
    assert identity_of(new, "parallax.local") == AGENT_1
    assert new.public_key() == key.public_key()
    assert desk.recorded == [(new, AGENT_1, CA.certificate, str(AGENT_1))]
    assert issued.bundle == CA.bundle


@pytest.mark.parametrize("sans", [(), ("localhost",), ("agents.example", "10.1.2.3", "::1")])
async def test_it_names_what_the_one_before_did(sans: tuple[str, ...]) -> None:
    issued = await Desk().renew(leaf(LeafProfile(sans=sans)))
    assert sans_of(issued.chain[0], AGENT_1) == sans


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (timedelta(minutes=1), timedelta(minutes=1)),
        (timedelta(hours=6), timedelta(hours=6)),
        (timedelta(days=365), timedelta(days=365)),
        (timedelta(seconds=5), timedelta(minutes=1)),
        (timedelta(days=900), timedelta(days=365)),
    ],
)
async def test_it_lasts_as_long_as_the_one_before_from_a_minute_to_a_year(
    before: timedelta, after: timedelta
) -> None:
    issued = await Desk().renew(leaf(LeafProfile(lifetime=before)))
    assert lifetime_of(issued.chain[0]) == after


async def test_it_says_where_the_list_of_its_issuer_is_if_that_is_known() -> None:
    new = (await Desk(crl_url="http://crl.example.com/crl/").renew(leaf())).chain[0]
    (point,) = new.extensions.get_extension_for_class(x509.CRLDistributionPoints).value
    name = key_id(CA.certificate.public_key()).hex()
    assert [each.value for each in point.full_name or ()] == [f"http://crl.example.com/crl/{name}.crl"]
    without = (await Desk().renew(new)).chain[0]
    with pytest.raises(x509.ExtensionNotFound):
        without.extensions.get_extension_for_class(x509.CRLDistributionPoints)


async def test_what_cannot_be_recorded_is_not_handed_out() -> None:
    desk = Desk()
    desk.problem = Unavailable("the disk is full")
    with pytest.raises(Unavailable, match="the disk is full"):
        await desk.renew(leaf())


async def test_the_roots_of_the_fleet_are_handed_out_and_not_those_of_the_issuer_alone() -> None:
    other = CertificateAuthority.create(now=NOW)
    both = TrustBundle((*CA.bundle.roots, *other.bundle.roots))
    assert (await Desk(bundle=both).renew(leaf())).bundle == both


async def test_a_ca_that_the_fleet_does_not_trust_issues_nothing() -> None:
    other = CertificateAuthority.create(now=NOW)
    desk = Desk(other, CA.bundle)
    with pytest.raises(ConfigError, match="none of those that this control plane trusts"):
        await desk.renew(leaf())
    assert not desk.recorded


async def test_a_request_that_names_somebody_else_is_refused() -> None:
    request = new_request(AGENT_2, generate_key())
    with pytest.raises(NotAuthorized, match="may not ask for the subject 'agent-2'"):
        await Desk().issuance.renew(AGENT_1, leaf(), request)


async def test_one_identity_does_not_keep_the_issuer_busy() -> None:
    desk, presented = Desk(), leaf()
    for _ in range(MAX_RENEWALS):
        await desk.renew(presented)
    with pytest.raises(Unavailable, match="within a minute") as refused:
        await desk.renew(presented)
    assert refused.value.retry_after == timedelta(minutes=1)
    await desk.renew(leaf(identity=AGENT_2), identity=AGENT_2)
    desk.now += timedelta(seconds=20)
    with pytest.raises(Unavailable) as refused:
        await desk.renew(presented)
    assert refused.value.retry_after == timedelta(seconds=40)
    desk.now += refused.value.retry_after
    await desk.renew(presented)


async def test_a_clock_that_was_set_back_keeps_nobody_away() -> None:
    desk, presented = Desk(), leaf()
    for _ in range(MAX_RENEWALS):
        await desk.renew(presented)
    desk.now -= timedelta(seconds=1)
    for _ in range(MAX_RENEWALS):
        await desk.renew(presented)
    with pytest.raises(Unavailable, match="within a minute"):
        await desk.renew(presented)


async def test_two_holders_of_one_certificate_are_both_served_and_reported_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    desk, shared = Desk(), leaf()
    ours, theirs = await desk.renew(shared), await desk.renew(shared)
    desk.now += timedelta(minutes=1)
    await desk.renew(ours.chain[0])
    assert not desk.duplicates
    desk.now += timedelta(minutes=1)
    await desk.renew(theirs.chain[0])
    assert desk.duplicates == [AGENT_1]
    assert sum("two copies of one certificate" in record.message for record in caplog.records) == 1


# The files of the CA.


def test_the_ca_is_read_once_and_again_when_it_is_another(tmp_path: Path) -> None:
    files = IssuerFiles(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no CA in .* to renew certificates with"):
        files.current()
    paths = save_authority(tmp_path, Layout.PARALLAX, CA)
    first = files.current()
    assert first.certificate == CA.certificate
    assert files.current() is first
    for path in (paths.cert, paths.key):
        path.unlink()
    other = CertificateAuthority.create(now=NOW)
    save_authority(tmp_path, Layout.PARALLAX, other)
    assert files.current().certificate == other.certificate


def missing(key: Path) -> None:
    key.unlink()


def torn(key: Path) -> None:
    key.write_bytes(key.read_bytes()[:40])


def open_to_others(key: Path) -> None:
    key.chmod(0o644)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (missing, r"there is no .*key\.pem to renew"),
        (torn, "key.pem"),
        (open_to_others, "chmod 600"),
    ],
)
def test_a_ca_that_cannot_be_used_says_which_file_it_is_and_is_used_once_it_is_mended(
    tmp_path: Path, spoil: Callable[[Path], None], why: str
) -> None:
    paths = save_authority(tmp_path, Layout.PARALLAX, CA)
    good = paths.key.read_bytes()
    files = IssuerFiles(tmp_path)
    spoil(paths.key)
    with pytest.raises(ConfigError, match=why):
        files.current()
    paths.key.unlink(missing_ok=True)
    paths.key.touch(0o600)
    paths.key.write_bytes(good)
    assert files.current().certificate == CA.certificate
    spoil(paths.key)
    with pytest.raises(ConfigError, match=why):
        files.current()


def test_an_encrypted_key_needs_its_passphrase(tmp_path: Path) -> None:
    save_authority(tmp_path, Layout.PARALLAX, CA, b"secret")
    with pytest.raises(ConfigError, match="needs a passphrase: set PARALLAX_CA_PASSPHRASE_FILE"):
        IssuerFiles(tmp_path).current()
    with pytest.raises(ConfigError, match="give the right passphrase"):
        IssuerFiles(tmp_path, lambda: b"wrong").current()
    assert IssuerFiles(tmp_path, lambda: b"secret").current().certificate == CA.certificate


def test_an_intermediate_needs_no_key_of_its_root(tmp_path: Path) -> None:
    """The root's may be in a safe."""
    key = generate_key(KeyType.P256)
    intermediate = _below(CA, key)
    save_authority(tmp_path, Layout.PARALLAX, intermediate)
    loaded = IssuerFiles(tmp_path).current()
    issued = loaded.issue(AGENT_1, generate_key().public_key(), LeafProfile(), NOW)
    assert issued.chain[1:] == (intermediate.certificate,)
    assert issued.bundle == CA.bundle


def _below(root: CertificateAuthority, key: PrivateKey) -> CertificateAuthority:
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import NameOID

    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Issuing CA")]))
        .issuer_name(root.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=900))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(root.key, hashes.SHA256())
    )
    return CertificateAuthority(certificate, key, root.bundle)
