"""Making certificates: one, or the set that a fleet starts with, again and again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, TypeAlias

from cryptography import x509

from parallax.sdk.cli.facts import Facts, facts_of, key_type_of
from parallax.sdk.cli.inventory import ISSUER, Entry, scan
from parallax.security.authority import CertificateAuthority
from parallax.security.certificate import is_signed_by
from parallax.security.errors import ConfigError, Expired, ParallaxError
from parallax.security.files import show
from parallax.security.identity import Identity, Kind
from parallax.security.issuance_policy import IssuanceRule
from parallax.security.keys import KeyType, generate_key
from parallax.security.layouts import (
    Layout,
    Paths,
    authority_paths,
    find_authority,
    leaf_paths,
    load_authority,
    save_authority,
    save_leaf,
)
from parallax.security.profiles import LOCAL_SANS, LeafProfile, lifetime_of, parse_san, sans_of
from parallax.security.verification import identity_of

FIRST_SET: Final = (
    (Kind.SERVICE, "control-plane"),
    (Kind.SERVICE, "agent-proxy"),
    (Kind.AGENT, "agent-1"),
    (Kind.CLIENT, "cli"),
    (Kind.CLIENT, "admin"),
)
_DAY: Final = timedelta(days=1)

Passphrase: TypeAlias = Callable[[Path], bytes]
"""Given the path of a key that is encrypted, its passphrase; it may ask somebody."""


@dataclass(frozen=True, slots=True)
class Order:
    """A leaf to be made; *replaces* says that one of the same identity is there."""

    identity: Identity
    profile: LeafProfile
    replaces: bool


@dataclass(frozen=True, slots=True)
class Changes:
    """What is to differ from a leaf that is there, or from the usual one; None leaves it."""

    lifetime: timedelta | None = None
    key_type: KeyType | None = None

    def apply(self, profile: LeafProfile) -> LeafProfile:
        """*profile* with these changes."""
        return replace(
            profile,
            lifetime=profile.lifetime if self.lifetime is None else self.lifetime,
            key_type=profile.key_type if self.key_type is None else self.key_type,
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """Leaves to be made, and the CA for it, which has yet to be written if it *is_new*."""

    directory: Path
    layout: Layout
    authority: CertificateAuthority
    orders: Sequence[Order]
    now: datetime
    is_new: bool = False
    passphrase: bytes | None = None

    @property
    def authority_paths(self) -> Paths:
        """Where the CA lies, or will."""
        return authority_paths(self.directory, self.layout)


@dataclass(frozen=True, slots=True)
class Made:
    """A leaf that was made, where it lies and what it says."""

    order: Order
    paths: Paths
    facts: Facts


def plan_profile(
    rule: IssuanceRule, lifetime: timedelta | None, key_type: KeyType, sans: Sequence[str]
) -> LeafProfile:
    """
    A leaf as asked for; where nothing is, of the lifetime that *rule* has, with the local names it admits.

    Raises:
        NotAuthorized: What is asked for is not admitted.
        IdentityError: A requested SAN is none.
    """
    usual = rule.profile(LOCAL_SANS)
    profile = LeafProfile(lifetime or usual.lifetime, key_type, tuple(sans) or usual.sans)
    rule.check_profile(profile)
    return profile


def plan_one(
    directory: Path,
    layout: Layout | None,
    identity: Identity,
    profile: LeafProfile,
    passphrase: Passphrase,
    now: datetime,
) -> Batch:
    """
    One leaf of *identity*, by the CA in *directory*.

    Args:
        layout: Another one than the CA's is refused: who loads from there could not tell which counts.

    Raises:
        IdentityError: A requested SAN is none.
        ConfigError: The CA is missing, damaged, expired or of another layout, or the passphrase is wrong.
    """
    for san in profile.sans:
        parse_san(san)  # before anybody is asked for a passphrase
    found = find_authority(directory)
    if found is not None and layout not in {None, found}:
        raise ConfigError(
            f"the CA in {show(directory)} has the layout {found}: "
            "leave --layout out, or use another directory"
        )
    authority = _open(directory, found, passphrase, now)
    layout = found or Layout.PARALLAX
    there = os.path.lexists(leaf_paths(directory, layout, identity.name).cert)
    return Batch(directory, layout, authority, (Order(identity, profile, there),), now)


def plan_set(
    directory: Path,
    trust_domain: str,
    changes: Changes,
    passphrase: Passphrase,
    new_passphrase: Callable[[], bytes | None],
    now: datetime,
) -> Batch:
    """
    The first set, and every other leaf of the CA in *directory*; without a CA, that too.

    A leaf that is there keeps the names beside its identity, its kind of key and its lifetime.

    Args:
        passphrase: Of the CA that is there.
        new_passphrase: For one that is not; None leaves its key unencrypted.

    Raises:
        ConfigError: The CA is damaged, expired or a part of it missing, or the passphrase is wrong; or
            something else than the leaf to be replaced lies in its place.
    """
    layout = find_authority(directory)
    if layout is not None:
        authority = _open(directory, layout, passphrase, now)
        orders = _orders(directory, layout, trust_domain, authority.certificate, changes)
        return Batch(directory, layout, authority, orders, now)
    orders = _orders(directory, Layout.PARALLAX, trust_domain, None, changes)
    protection = new_passphrase()
    authority = CertificateAuthority.create(now=now, key_type=changes.key_type or KeyType.P256)
    return Batch(directory, Layout.PARALLAX, authority, orders, now, is_new=True, passphrase=protection)


def make(batch: Batch) -> Iterator[Made]:
    """Write the CA if it is new, then make one leaf after the other, each with a key of its own."""
    if batch.is_new:
        save_authority(batch.directory, batch.layout, batch.authority, batch.passphrase)
    for order in batch.orders:
        key = generate_key(order.profile.key_type)
        issued = batch.authority.issue(order.identity, key.public_key(), order.profile, batch.now)
        paths = save_leaf(batch.directory, batch.layout, order.identity, issued.chain, key, issued.bundle)
        yield Made(order, paths, facts_of(issued.chain[0], order.identity.trust_domain, batch.now))


def _open(
    directory: Path, layout: Layout | None, passphrase: Passphrase, now: datetime
) -> CertificateAuthority:
    key = authority_paths(directory, layout or Layout.PARALLAX).key
    authority = load_authority(directory, layout, lambda: passphrase(key))
    try:
        authority.check_usable(now)
    except Expired as exc:
        raise ConfigError(
            f"{exc}: check this host's clock, or make a new CA in another directory with 'parallax ca init'"
        ) from exc
    return authority


def _orders(
    directory: Path, layout: Layout, trust_domain: str, issuer: x509.Certificate | None, changes: Changes
) -> list[Order]:
    """
    The first set and every other leaf of *issuer*; no issuer means that nothing may be there yet.

    Otherwise the wrong directory would do: a host that has been given its certificate and nothing
    else would lose it to a CA that nobody trusts.
    """
    there = {
        entry.name: entry for entry in scan(directory) if entry.layout is layout and entry.name != ISSUER
    }
    orders = []
    for kind, name in FIRST_SET:
        identity = Identity(trust_domain, kind, name)
        entry = there.pop(name, None)
        if entry is not None and issuer is None:
            raise ConfigError(
                f"{show(entry.path)} is there but no CA that could replace it: "
                "restore the CA, or use another directory"
            )
        profile = LeafProfile() if entry is None else _profile_of(entry, identity)
        orders.append(Order(identity, changes.apply(profile), entry is not None))
    for entry in there.values():
        owner = None if issuer is None else _owner(entry, issuer, trust_domain)
        if owner is not None:
            orders.append(Order(owner, changes.apply(_profile_of(entry, owner)), replaces=True))
    return orders


def _owner(entry: Entry, issuer: x509.Certificate, trust_domain: str) -> Identity | None:
    """
    Whose leaf of *issuer* lies in *entry*, in its own place and with its key; else None.

    A certificate without its key is a copy: its holder made the key elsewhere.
    """
    if entry.problem or not is_signed_by(entry.chain[0], issuer) or not entry.key.exists():
        return None
    try:
        identity = identity_of(entry.chain[0], trust_domain)
    except ParallaxError:
        return None
    return identity if identity.name == entry.name else None


def _profile_of(entry: Entry, identity: Identity) -> LeafProfile:
    """How the leaf of *identity* in *entry* was made."""
    if entry.problem:
        raise ConfigError(f"{entry.problem}; or move it away and run this again")
    leaf, place = entry.chain[0], show(entry.path)
    try:
        owner = identity_of(leaf, identity.trust_domain)
        sans = sans_of(leaf, identity)
    except ParallaxError as exc:
        raise ConfigError(f"{place}: {exc}: move it away and run this again") from exc
    if owner != identity:
        raise ConfigError(f"{place} belongs to {owner}, not to {identity}: move it away and run this again")
    key_type = key_type_of(leaf)
    return LeafProfile(
        lifetime=max(round(lifetime_of(leaf) / _DAY), 1) * _DAY,
        key_type=KeyType(key_type) if key_type in set(KeyType) else KeyType.P256,
        sans=sans,
    )
