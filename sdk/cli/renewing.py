"""Renewing what lies in the certificate directory, through the control plane."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Final

from parallax.runtime.certificates import Dial, asker
from parallax.runtime.channel import channel_options
from parallax.runtime.renewal import Ask, attempt_renewal
from parallax.runtime.settings import NO_CONTROL_PLANE, Settings
from parallax.runtime.trust import acknowledge
from parallax.sdk.cli.facts import Facts, facts_of
from parallax.sdk.cli.inventory import ISSUER, read_chain, scan
from parallax.sdk.cli.render import instant
from parallax.sdk.enrolling import Edge
from parallax.sdk.exchanging import exchanger
from parallax.security.authority import Issued
from parallax.security.config import MTLSConfig
from parallax.security.errors import ConfigError, ParallaxError, Unavailable
from parallax.security.files import show
from parallax.security.identity import check_name, control_plane
from parallax.security.layouts import WITH_ISSUER, find_layout, leaf_paths
from parallax.security.pinned import is_self_signed
from parallax.security.provider import MTLSCredentialsProvider
from parallax.security.verification import identity_of

_NEVER: Final = timedelta(days=1)  # between two looks at files that nobody follows here


@dataclass(frozen=True, slots=True)
class Renewed:
    """
    What became of the certificate that lies in the place of one name.

    Attributes:
        old: What was there; None if it cannot be used.
        new: What is there now; None if there is a *problem*.
    """

    name: str
    old: Facts | None = None
    new: Facts | None = None
    problem: ParallaxError | None = None

    def as_json(self) -> dict[str, object]:
        """For programs; `problem` is null where there is none."""
        return {
            "name": self.name,
            "identity": self.old.identity if self.old else None,
            "old": _as_json(self.old),
            "new": _as_json(self.new),
            "problem": None if self.problem is None else str(self.problem),
        }

    def as_cells(self) -> tuple[str, ...]:
        """For people: whose, the serial before, the serial now, from when, until when."""
        if self.new is None or self.old is None:
            return (self.name, self.old.serial if self.old else "", "not renewed", "", "")
        new = self.new
        return (new.name, self.old.serial, new.serial, instant(new.not_before), instant(new.not_after))


def plan_renewals(tls: MTLSConfig, names: Sequence[str]) -> list[tuple[str, Path]]:
    """
    The names to renew, *names* or all in the certificate directory that have a key there, and their files.

    Raises:
        ConfigError: One of *names* is not there, or none is; or the files are named one by one.
    """
    if tls.is_explicit:
        raise ConfigError(
            "PARALLAX_TLS_*_FILE or _PEM says which certificate to use, and whoever put it there renews it: "
            "name a directory with --certs-dir"
        )
    if names:
        return [(name, _place_of(name, tls.certs_dir)) for name in dict.fromkeys(names)]
    found = [
        (entry.name, entry.path)
        for entry in scan(tls.certs_dir)
        if entry.name != ISSUER and entry.layout in WITH_ISSUER and entry.key.exists()
    ]
    if not found:
        raise ConfigError(f"{show(tls.certs_dir)} holds no certificate with its key: use --certs-dir")
    return found


async def renew_all(
    places: Sequence[tuple[str, Path]], tls: MTLSConfig, settings: Settings, url: str | None = None
) -> AsyncIterator[Renewed]:
    """
    What becomes of each, one after the other; where nobody answers, nothing more is asked for.

    TLS is spoken whether it is enabled or not: in plaintext nobody could prove anything.

    Args:
        url: Where a self-signed certificate is exchanged that the control plane's port does not let in;
            None: at the usual one beside it.

    Raises:
        ConfigError: There is no control plane to ask.
        InvalidRequest: *url* is none.
    """
    if settings.control_plane == NO_CONTROL_PLANE:
        raise ConfigError("PARALLAX_CONTROL_PLANE is none, and one has to be asked: give --control-plane")
    tls = tls.model_copy(update={"enabled": True, "allow_insecure": False})
    edge = Edge.find(url or settings.enroll_url, settings.control_plane)
    for name, path in places:
        renewed = await _renew(name, path, tls, settings, edge)
        yield renewed
        if isinstance(renewed.problem, Unavailable):
            return


async def _renew(name: str, path: Path, tls: MTLSConfig, settings: Settings, edge: Edge) -> Renewed:
    now = datetime.now(UTC)
    try:
        identity = identity_of(read_chain(path)[0], tls.trust_domain)
        if identity.name != name:
            raise ConfigError(f"{show(path)} belongs to {identity}, not to {name}: move it to its own place")
        provider = MTLSCredentialsProvider(tls, identity=identity)
    except ParallaxError as exc:
        return Renewed(name, problem=exc)
    store, keep = provider.store, provider.keeper(provider.rotator(_NEVER))
    assert store is not None, "TLS is enabled"  # noqa: S101
    old = facts_of(store.current.leaf, tls.trust_domain, now)
    if keep is None:
        text = f"{show(path)} is Kubernetes' to write: let whoever issues its secret renew it"
        return Renewed(name, old, problem=ConfigError(text))
    dial = _dial(provider, settings)
    ask = asker(dial)
    if is_self_signed(store.current.leaf):
        ask = _either(ask, exchanger(store, edge))
    done = await attempt_renewal(store, ask, keep)
    if done.problem is not None:
        return Renewed(name, old, problem=done.problem)
    try:
        await acknowledge(dial, store)
    except ParallaxError as exc:
        text = f"renewed, but the control plane was not shown the new certificate: {exc}"
        return Renewed(
            name, old, problem=Unavailable(text) if isinstance(exc, Unavailable) else type(exc)(text)
        )
    return Renewed(name, old, facts_of(store.current.leaf, tls.trust_domain, now))


def _either(ask: Ask, exchange: Ask) -> Ask:
    """Who asks as *ask* does, and by *exchange* if the port does not let in what is held."""

    async def ask_either(csr: bytes) -> Issued:
        try:
            return await ask(csr)
        except Unavailable as exc:  # all that one sees of a handshake that was refused
            try:
                return await exchange(csr)
            except Unavailable as beside:
                text = f"{exc}; nor can it be exchanged, if that is why: {beside}: --url says where"
                raise Unavailable(text, retry_after=beside.retry_after) from exc

    return ask_either


def _place_of(name: str, directory: Path) -> Path:
    """The certificate of *name*: in *directory*, or else in the home, where a device keeps its own."""
    return leaf_paths(directory, find_layout(directory, check_name(name)), name).cert


def _dial(provider: MTLSCredentialsProvider, settings: Settings) -> Dial:
    expected = control_plane(provider.identity.trust_domain)
    return partial(
        provider.channel, settings.control_plane, expected, channel_options(settings.max_payload_bytes)
    )


def _as_json(facts: Facts | None) -> dict[str, object] | None:
    if facts is None:
        return None
    return {"serial": facts.serial, "not_before": facts.not_before, "not_after": facts.not_after}
