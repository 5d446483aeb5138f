"""What certificates are issued with: the CA, the policy, and what enters each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from parallax.control_plane.crl import Issuers
from parallax.control_plane.issuance import Issuance
from parallax.control_plane.issuance_file import IssuanceFile
from parallax.control_plane.issuer import IssuerFiles
from parallax.runtime.clock import utc_now
from parallax.runtime.passphrase import given_passphrase

if TYPE_CHECKING:
    from pathlib import Path

    from parallax.control_plane.metrics import ControlPlaneMetrics
    from parallax.control_plane.own_identities import OwnIdentities
    from parallax.control_plane.records import Records
    from parallax.runtime.settings import Settings
    from parallax.security.authority import CertificateAuthority
    from parallax.security.bundle import TrustBundle


@dataclass(frozen=True, slots=True)
class Issuing:
    """
    What issues.

    Args:
        certs_dir: Where the CA lies.
        files: What is read of it.
        issuers: Who may have signed what is in use.
        policy: What certificates may be like.
    """

    certs_dir: Path
    files: IssuerFiles
    issuers: Issuers
    policy: IssuanceFile
    issuance: Issuance

    @classmethod
    def new(
        cls,
        settings: Settings,
        certs_dir: Path,
        own: OwnIdentities,
        records: Records,
        metrics: ControlPlaneMetrics,
        authority: Callable[[], CertificateAuthority] | None,
    ) -> Self:
        """
        By the CA in *certs_dir*, unless *authority* is another; *own* trust what the fleet trusts.

        Raises:
            ConfigError: The policy cannot be used.
        """
        files = IssuerFiles(certs_dir, lambda: given_passphrase(settings.ca_passphrase_file))
        issuers = Issuers(authority, tuple) if authority else Issuers(files.current, files.beside)
        policy = IssuanceFile(settings.issuance_file)

        def bundle() -> TrustBundle:
            store = own.provider.store
            assert store is not None, "nobody is authenticated in plaintext"  # noqa: S101
            return store.current.bundle

        issuance = Issuance(
            issuers.in_force,
            bundle,
            records.ledger.record,
            utc_now,
            check_identity=records.revocations.current.check_identity,
            policy=lambda: policy.current,
            on_duplicate=lambda _: metrics.duplicates.inc(),
            crl_url=settings.crl_url,
        )
        return cls(certs_dir, files, issuers, policy, issuance)
