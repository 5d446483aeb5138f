"""Whether peers would accept a certificate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from parallax.sdk.cli.inventory import find, read_chain
from parallax.security.bundle import TrustBundle
from parallax.security.errors import ConfigError, ParallaxError
from parallax.security.files import read_file, show
from parallax.security.verification import Usage, authenticate


@dataclass(frozen=True, slots=True)
class Report:
    """
    The verdict on one certificate.

    Attributes:
        causes: For each usage that was asked about why it is refused; empty where it is not.
    """

    certificate: Path
    ca: Path
    identity: str | None
    causes: Mapping[Usage, str]

    @property
    def is_ok(self) -> bool:
        """Whether it is accepted for all usages that were asked about."""
        return not any(self.causes.values())

    def as_json(self) -> dict[str, object]:
        """For programs."""
        return {
            "certificate": self.certificate,
            "ca": self.ca,
            "identity": self.identity,
            "ok": self.is_ok,
            "purposes": {
                usage: {"ok": not cause, "cause": cause or None} for usage, cause in self.causes.items()
            },
        }

    def as_lines(self) -> list[str]:
        """For people."""
        name = show(self.certificate)
        lines = [f"{name}: {usage}: {cause or 'OK'}" for usage, cause in self.causes.items()]
        return [*lines, f"{name}: {self.identity or 'nobody'}, by the CA in {show(self.ca)}"]


def check(
    directory: Path, trust_domain: str, target: str, ca: Path | None, usages: Sequence[Usage], now: datetime
) -> Report:
    """
    The verdict on *target*, a file or a name in *directory*.

    Args:
        ca: The roots to trust; by default those beside the certificate, else the CA in *directory*.

    Raises:
        ConfigError: The certificate or the CA cannot be read: there is no verdict.
    """
    paths = find(directory, target)
    chain = read_chain(paths.cert)
    roots = ca or paths.ca
    pem = read_file(roots, remedy="name the file with the CA's certificate with --ca")
    try:
        bundle = TrustBundle.parse(pem)
    except ConfigError as exc:
        raise ConfigError(f"{show(roots)}: {exc}: name the file with the CA's certificate with --ca") from exc
    causes, identity = {}, None
    for usage in usages:
        try:
            identity = str(authenticate(chain, bundle, trust_domain, now, usage).identity)
            causes[usage] = ""
        except ParallaxError as exc:
            causes[usage] = str(exc)
    return Report(paths.cert, roots, identity, causes)
