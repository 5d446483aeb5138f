"""What a scrape and a probe show of the certificates that a process holds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from prometheus_client import CollectorRegistry, generate_latest

from parallax.runtime.metrics import MAX_SHOWN, certificate_detail, watch_transport
from parallax.runtime.renewal import Ask, Renewer, Result
from parallax.sdk.testing import ThrowawayPKI
from parallax.security.authority import CertificateAuthority, Issued
from parallax.security.bundle import TrustBundle, certificates_to_pem
from parallax.security.config import MTLSConfig
from parallax.security.credentials import Credentials, CredentialStore
from parallax.security.errors import Unavailable
from parallax.security.identity import Identity
from parallax.security.profiles import lifetime_of
from parallax.security.provider import MTLSCredentialsProvider
from parallax.security.rotation import RESULTS, CertificateRotator

NOW = datetime.now(UTC)
NOT_AFTER = "parallax_certificate_not_after_timestamp_seconds"
NOT_BEFORE = "parallax_certificate_not_before_timestamp_seconds"

Provide = Callable[..., MTLSCredentialsProvider]


@pytest.fixture
def pki() -> ThrowawayPKI:
    return ThrowawayPKI()


@pytest.fixture
def provide(pki: ThrowawayPKI, tmp_path: Path) -> Provide:
    def provide(short: str = "service/control-plane") -> MTLSCredentialsProvider:
        pki.save(tmp_path, short, lifetime=timedelta(days=1), now=NOW)
        config = MTLSConfig(enabled=True, certs_dir=tmp_path, verify_client=True)
        return MTLSCredentialsProvider(config, identity=Identity.parse_short(short))

    return provide


def rotator_of(provider: MTLSCredentialsProvider) -> CertificateRotator:
    rotator = provider.rotator(timedelta(hours=1))
    assert rotator is not None
    return rotator


def scrape(*arguments: object) -> CollectorRegistry:
    registry = CollectorRegistry()
    watch_transport(registry, *arguments)  # type: ignore[arg-type]
    return registry


def names(registry: CollectorRegistry, metric: str) -> set[str]:
    return {
        sample.labels["name"]
        for family in registry.collect()
        for sample in family.samples
        if sample.name == metric
    }


def test_the_validity_of_each_leaf_and_root_is_shown(provide: Provide, pki: ThrowawayPKI) -> None:
    registry = scrape([provide(), provide("service/agent-proxy")])
    root = f"root:{pki.authority.certificate.fingerprint(hashes.SHA256()).hex()[:8]}"
    for metric in (NOT_AFTER, NOT_BEFORE):
        assert names(registry, metric) == {"control-plane", "agent-proxy", root}
    ends = registry.get_sample_value(NOT_AFTER, {"name": "control-plane"})
    assert ends == pytest.approx((NOW + timedelta(days=1)).timestamp(), abs=2)
    begins = registry.get_sample_value(NOT_BEFORE, {"name": root})
    assert begins == pki.authority.certificate.not_valid_before_utc.timestamp()


def test_what_is_shown_is_what_is_in_force_at_the_scrape(provide: Provide, pki: ThrowawayPKI) -> None:
    provider = provide()
    rotator = rotator_of(provider)
    registry = scrape([provider], [rotator])
    before = registry.get_sample_value(NOT_AFTER, {"name": "control-plane"})
    assert provider.source is not None
    directory = Path(str(provider.source.cert)).parent.parent
    pki.save(directory, "service/control-plane", lifetime=timedelta(days=2), now=NOW)
    asyncio.run(rotator.look())
    after = registry.get_sample_value(NOT_AFTER, {"name": "control-plane"})
    assert after is not None
    assert before is not None
    assert after - before == pytest.approx(86_400, abs=2)
    labels = {"name": "control-plane", "result": "success"}
    assert registry.get_sample_value("parallax_certificate_rotations_total", labels) == 1


def test_an_issuer_in_the_chain_is_shown(provide: Provide, pki: ThrowawayPKI) -> None:
    provider = provide()
    assert provider.store is not None
    current = provider.store.current
    object.__setattr__(current, "chain", (current.leaf, pki.authority.certificate))
    found = names(scrape([provider]), NOT_AFTER)
    assert sorted(name.partition(":")[0] for name in found) == ["control-plane", "issuer", "root"]


def test_of_many_roots_those_that_end_first_are_shown(provide: Provide) -> None:
    provider = provide()
    assert provider.store is not None
    roots = [
        CertificateAuthority.create(now=NOW - timedelta(days=day)).certificate for day in range(2 * MAX_SHOWN)
    ]
    bundle = TrustBundle.parse(certificates_to_pem(roots))
    object.__setattr__(provider.store.current, "bundle", bundle)
    shown = names(scrape([provider]), NOT_AFTER) - {"control-plane"}
    oldest = sorted(roots, key=lambda root: root.not_valid_after_utc)[:MAX_SHOWN]
    assert shown == {f"root:{root.fingerprint(hashes.SHA256()).hex()[:8]}" for root in oldest}


@pytest.mark.parametrize("result", RESULTS)
def test_every_result_is_there_before_the_first(result: str, provide: Provide) -> None:
    provider = provide()
    registry = scrape([provider], [rotator_of(provider)])
    labels = {"name": "control-plane", "result": result}
    assert registry.get_sample_value("parallax_certificate_rotations_total", labels) == 0


def test_a_failure_is_counted_and_dated_and_readiness_names_it(provide: Provide) -> None:
    provider = provide()
    before = datetime.now(UTC)
    rotator = rotator_of(provider)
    registry = scrape([provider], [rotator])
    own = {"name": "control-plane"}
    failure = "parallax_certificate_rotation_last_failure_timestamp_seconds"
    success = "parallax_certificate_rotation_last_success_timestamp_seconds"
    assert registry.get_sample_value(failure, own) == 0
    began = registry.get_sample_value(success, own)
    assert began is not None
    assert before.timestamp() <= began <= datetime.now(UTC).timestamp()
    assert certificate_detail([rotator]) == {"certificate control-plane": "in force"}
    assert provider.source is not None
    key = Path(str(provider.source.key))
    key.chmod(0o644)
    asyncio.run(rotator.look())
    assert registry.get_sample_value(failure, own) == rotator.status.since.timestamp()
    labels = {"name": "control-plane", "result": "open_to_others"}
    assert registry.get_sample_value("parallax_certificate_rotations_total", labels) == 1
    detail = certificate_detail([rotator])["certificate control-plane"]
    assert detail.startswith("the last good one is in force, files open_to_others since ")
    assert str(key) not in detail  # probes are answered to anybody


class TestRenewals:
    def renewer(self, provider: MTLSCredentialsProvider, age: timedelta, ask: Ask | None = None) -> Renewer:
        """As it is *age* after it was issued."""
        assert provider.store is not None
        keep = partial(_keep, provider.store)
        return Renewer(provider.store, ask, keep, clock=lambda: datetime.now(UTC) + age)

    def test_the_plan_and_every_result_are_there_before_the_first(self, provide: Provide) -> None:
        renewer = self.renewer(provide(), timedelta(), _ask)
        registry = scrape([], [], [renewer])
        for result in Result:
            labels = {"name": "control-plane", "result": result}
            assert registry.get_sample_value("parallax_certificate_renewals_total", labels) == 0
        planned = registry.get_sample_value(
            "parallax_certificate_renewal_timestamp_seconds", {"name": "control-plane"}
        )
        assert planned == renewer.due.timestamp()

    def test_what_others_renew_has_no_series(self, provide: Provide) -> None:
        registry = scrape([], [], [self.renewer(provide(), timedelta())])
        assert names(registry, "parallax_certificate_renewal_timestamp_seconds") == set()

    @pytest.mark.parametrize(
        ("share", "ours", "others"),
        [
            (0.0, "in force, to be renewed at 2", "in force, not renewed here"),
            (0.7, "in force, renewal due", "in force, not renewed here, renewal due"),
            (0.95, "in force, renewal critical", "in force, not renewed here, renewal critical"),
            (1.1, "in force, but expired", "in force, but expired"),
        ],
    )
    def test_readiness_says_how_urgent_it_is(
        self, share: float, ours: str, others: str, provide: Provide
    ) -> None:
        provider = provide()
        assert provider.store is not None
        age = lifetime_of(provider.store.current.leaf) * share
        detail = certificate_detail([], [self.renewer(provider, age, _ask)])
        assert detail["certificate control-plane"].startswith(ours)
        detail = certificate_detail([], [self.renewer(provider, age)])
        assert detail == {"certificate control-plane": others}

    async def test_readiness_names_why_it_is_late(self, provide: Provide) -> None:
        provider = provide()
        assert provider.store is not None
        age = lifetime_of(provider.store.current.leaf) * 0.85
        renewer = self.renewer(provider, age, _ask)
        running = asyncio.create_task(renewer.run())
        async with asyncio.timeout(10):
            while not renewer.counts[Result.UNREACHABLE]:
                await asyncio.sleep(0.01)
        running.cancel()
        detail = certificate_detail([], [renewer])
        assert detail == {"certificate control-plane": "in force, renewal late: unreachable"}


async def _ask(csr: bytes) -> Issued:
    raise Unavailable("away")


async def _keep(store: CredentialStore, new: Credentials, replacing: Credentials) -> None:
    store.publish(new, datetime.now(UTC))


def test_in_plaintext_there_is_no_certificate_to_show() -> None:
    provider = MTLSCredentialsProvider(MTLSConfig(), identity=Identity.parse_short("agent/agent-1"))
    registry = scrape([provider])
    assert registry.get_sample_value("parallax_insecure_mode") == 1
    assert names(registry, NOT_AFTER) == set()


def test_every_metric_has_a_text(provide: Provide) -> None:
    provider = provide()
    lines = generate_latest(scrape([provider], [rotator_of(provider)])).decode().splitlines()
    for line in lines:
        if line.startswith("# HELP"):
            assert line.endswith(".")
    series = {line.partition("{")[0].partition(" ")[0] for line in lines if not line.startswith("#")}
    assert "parallax_certificate_observer_restarts_total" in series
