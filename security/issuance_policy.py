"""What a certificate may be like, and for whom: its lifetime, its key, its further names; pure."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, fields
from datetime import timedelta
from enum import StrEnum
from fnmatch import fnmatchcase
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from parallax.security.errors import ConfigError, IdentityError, NotAuthorized
from parallax.security.identity import Kind, clip
from parallax.security.profiles import LEAF_LIFETIME, LeafProfile, parse_san

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from parallax.security.identity import Identity
    from parallax.security.keys import PublicKey

SHORTEST: Final = timedelta(minutes=1)
MOST: Final = timedelta(days=36_500)  # a hundred years; the CA's own end comes sooner
TABLE: Final = "issue"
# Tables of the same file that somebody else reads: one file may hold all that is policy.
OTHER_TABLES: Final = frozenset({"allow"})

_DURATION: Final = re.compile(r"(\d{1,9})([smhd])", re.ASCII)
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_PATTERN: Final = re.compile(r"[a-z0-9*][a-z0-9._*-]{0,62}", re.ASCII)
_HEADER: Final = re.compile(rf"^[ \t]*\[\[[ \t]*{TABLE}[ \t]*\]\]", re.MULTILINE)

SanPattern: TypeAlias = str | IPv4Network | IPv6Network
"""A DNS name, `*` before its first dot for all below it or `*` alone for all; or a network of addresses."""


class KeySort(StrEnum):
    """A sort of key that a certificate may be for; of RSA, one of so many bits at least."""

    P256 = "p256"
    P384 = "p384"
    RSA2048 = "rsa-2048"
    RSA3072 = "rsa-3072"
    RSA4096 = "rsa-4096"

    def admits(self, key: PublicKey) -> bool:
        """Whether *key* is of this sort."""
        if isinstance(key, ec.EllipticCurvePublicKey):
            return key.curve.name == _CURVES.get(self)
        return self not in _CURVES and key.key_size >= self.bits

    def covers(self, sort: KeySort) -> bool:
        """Whether every key of *sort* is of this one as well."""
        return self is sort or (self not in _CURVES and sort not in _CURVES and sort.bits >= self.bits)

    @property
    def bits(self) -> int:
        """Of RSA, how long it is at the least."""
        return int(self.removeprefix("rsa-"))


_CURVES: Final = {KeySort.P256: ec.SECP256R1.name, KeySort.P384: ec.SECP384R1.name}


@dataclass(frozen=True, slots=True)
class IssuanceRule:
    """
    What certificates of some holders may be like. Left out, it says what holds without any rule.

    Attributes:
        holder: `<kind>` or `<kind>/<name>`, with `*` in the name for whatever is there; "" means everybody.
        lifetime: Where nothing else says how long.
        shortest, longest: Between which every lifetime lies.
        keys: The sorts of key that are admitted.
        sans: The names and addresses that may stand beside the holder's own; None: all that were granted.

    Raises:
        ConfigError: It contradicts itself; the text is the cause alone.
    """

    holder: str = ""
    lifetime: timedelta = LEAF_LIFETIME
    shortest: timedelta = SHORTEST
    longest: timedelta = LEAF_LIFETIME
    keys: tuple[KeySort, ...] = (KeySort.P256, KeySort.P384, KeySort.RSA2048)
    sans: tuple[SanPattern, ...] | None = None

    def __post_init__(self) -> None:
        if not timedelta(seconds=1) <= self.shortest <= self.lifetime <= self.longest <= MOST:
            raise ConfigError(
                f"shortest = {spell(self.shortest)}, lifetime = {spell(self.lifetime)}, "
                f"longest = {spell(self.longest)} are not in this order, from 1s to {spell(MOST)}"
            )
        if not self.keys:
            raise ConfigError(
                "keys is empty, so that nobody could have a certificate: name one, or leave it out"
            )

    def covers(self, short: str) -> bool:
        """Whether this is about *short*, the `<kind>/<name>` of an identity or of another rule."""
        kind, _, name = self.holder.partition("/")
        other_kind, _, other_name = short.partition("/")
        return not kind or (kind == other_kind and fnmatchcase(other_name or "*", name or "*"))

    def admits(self, san: str) -> bool:
        """Whether *san*, a name or an address, may stand beside the holder's; raises IdentityError."""
        name = parse_san(san)
        if self.sans is None:
            return True
        if isinstance(name, x509.IPAddress):
            return any(not isinstance(each, str) and name.value in each for each in self.sans)
        return any(isinstance(each, str) and _matches(each, name.value) for each in self.sans)

    def check_key(self, key: PublicKey) -> None:
        """Pass if a certificate may be for *key*; raises NotAuthorized."""
        if not any(sort.admits(key) for sort in self.keys):
            raise self._refusal(describe(key))

    def check_lifetime(self, lifetime: timedelta) -> None:
        """Pass if a certificate may last so long; raises NotAuthorized."""
        if not self.shortest <= lifetime <= self.longest:
            raise NotAuthorized(
                f"the issuance policy admits {spell(self.shortest)} to {spell(self.longest)} "
                f"for {self.holder or 'anybody'}, not {spell(lifetime)}"
            )

    def check_profile(self, profile: LeafProfile) -> None:
        """Pass if a leaf may be asked for that is like *profile*; raises NotAuthorized."""
        self.check_lifetime(profile.lifetime)
        if not any(sort.covers(KeySort(profile.key_type)) for sort in self.keys):
            raise self._refusal(f"key of the sort {profile.key_type}")
        self.check_sans(profile.sans)

    def check_sans(self, sans: Iterable[str]) -> None:
        """Pass if all of *sans* may stand beside the holder's own name; raises NotAuthorized."""
        for san in sans:
            if not self.admits(san):
                raise NotAuthorized(
                    f"the issuance policy admits no {clip(san)} for {self.holder}: leave it out, "
                    f"or add it to its sans ({', '.join(map(str, self.sans or ())) or 'none'})"
                )

    def profile(self, sans: Sequence[str] = (), lifetime: timedelta | None = None) -> LeafProfile:
        """A leaf as like *sans* and *lifetime* as it may be: the names admitted, the nearest lifetime."""
        wanted = self.lifetime if lifetime is None else lifetime
        return LeafProfile(
            lifetime=min(max(wanted, self.shortest), self.longest), sans=tuple(filter(self.admits, sans))
        )

    def _refusal(self, key: str) -> NotAuthorized:
        return NotAuthorized(
            f"the issuance policy admits no {key} for {self.holder or 'anybody'}: "
            f"make one of {', '.join(self.keys)}"
        )


@dataclass(frozen=True, slots=True)
class IssuancePolicy:
    """
    The rules in their order: the first that covers an identity decides, and no other adds to it.

    Raises:
        ConfigError: A rule can never decide, for one before it covers all that it does.
    """

    rules: tuple[IssuanceRule, ...] = ()

    def __post_init__(self) -> None:
        for number, rule in enumerate(self.rules):
            for earlier in self.rules[:number]:
                if earlier.covers(rule.holder):
                    raise ConfigError(
                        f"the rule for {clip(rule.holder)} never decides, for {clip(earlier.holder)} "
                        "comes first: put the narrower one before it, or take one out"
                    )

    def rule_for(self, identity: Identity) -> IssuanceRule:
        """What holds for *identity*."""
        return next((rule for rule in self.rules if rule.covers(identity.short)), IssuanceRule())


def parse_issuance(text: str) -> IssuancePolicy:
    """
    The policy that *text*, TOML, holds in its tables `[[issue]]`.

    Raises:
        ConfigError: Something in it cannot be used, so nothing of it is: which rule, in which line.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"not TOML: {exc}") from None
    if not document:  # more likely cut off than meant: it would loosen what the rules in force say
        raise ConfigError(
            "it is empty, as when not written to its end: for the usual limits unset PARALLAX_ISSUANCE_FILE"
        )
    unknown = sorted(document.keys() - OTHER_TABLES - {TABLE})
    if unknown:
        raise ConfigError(
            f"{clip(unknown[0])} is nothing that a policy has: write [[{TABLE}]] above each rule"
        )
    tables = document.get(TABLE, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{TABLE} is no list of tables: write [[{TABLE}]] above each rule")
    lines = [text.count("\n", 0, found.start()) + 1 for found in _HEADER.finditer(text)]
    rules = []
    for number, table in enumerate(tables):
        try:
            rules.append(_rule(table))
            IssuancePolicy(tuple(rules))
        except ConfigError as exc:
            line = f", line {lines[number]}" if len(lines) == len(tables) else ""
            raise ConfigError(f"rule {number + 1}{line}: {exc}") from None
    return IssuancePolicy(tuple(rules))


def spell(duration: timedelta) -> str:
    """*duration* as a policy file has it, in the largest unit that leaves no rest."""
    seconds = int(duration.total_seconds())
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds and seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def describe(key: PublicKey) -> str:
    """What sort of key *key* is, for people."""
    if isinstance(key, rsa.RSAPublicKey):
        return f"RSA key of {key.key_size} bits"
    return f"key on the curve {key.curve.name}"


def _rule(table: Mapping[str, Any]) -> IssuanceRule:
    known = [field.name for field in fields(IssuanceRule)]
    unknown = sorted(table.keys() - known)
    if unknown:
        raise ConfigError(f"{clip(unknown[0])} is nothing that a rule has: use {', '.join(known)}")
    if "holder" not in table:
        raise ConfigError('holder is missing: holder = "agent", or "agent/gpu-*"')
    read: dict[str, Any] = {"holder": _holder(table["holder"])}
    for name in ("lifetime", "shortest", "longest"):
        if name in table:
            read[name] = _duration(name, table[name])
    read.setdefault("longest", max(LEAF_LIFETIME, read.get("lifetime", SHORTEST)))
    read.setdefault("shortest", min(SHORTEST, read["longest"], read.get("lifetime", SHORTEST)))
    read.setdefault("lifetime", max(min(LEAF_LIFETIME, read["longest"]), read["shortest"]))
    if "keys" in table:
        read["keys"] = tuple(map(_sort, _texts("keys", table["keys"])))
    if "sans" in table:
        read["sans"] = tuple(map(_pattern, _texts("sans", table["sans"])))
    return IssuanceRule(**read)


def _holder(value: object) -> str:
    kind, slash, name = value.partition("/") if isinstance(value, str) else ("", "", "")
    if kind not in set(Kind) or (slash and not _PATTERN.fullmatch(name)):
        raise ConfigError(
            f'holder = {clip(str(value))} is none: "service", "agent" or "client", '
            'then perhaps a name, "agent/gpu-*"'
        )
    return str(value)


def _duration(name: str, value: object) -> timedelta:
    found = _DURATION.fullmatch(value) if isinstance(value, str) else None
    try:
        if found:
            return timedelta(**{_UNITS[found[2]]: int(found[1])})
    except OverflowError:
        pass
    raise ConfigError(f'{name} = {clip(str(value))} is no duration: "90d", "12h", "10m" or "30s"')


def _texts(name: str, value: object) -> Iterator[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ConfigError(f'{name} is no list of texts: {name} = ["…"]')
    yield from value


def _sort(text: str) -> KeySort:
    try:
        return KeySort(text)
    except ValueError:
        raise ConfigError(f"keys has {clip(text)}, which is none: use {', '.join(KeySort)}") from None


def _pattern(text: str) -> SanPattern:
    try:
        if text == "*":
            return text
        if "/" in text:
            return ip_network(text)
        name = parse_san(text.removeprefix("*."))
    except (IdentityError, ValueError):
        raise ConfigError(
            f'sans has {clip(text)}, which is none: "localhost", "*.example.com", "*" for every name, '
            '"127.0.0.1", "10.0.0.0/8"'
        ) from None
    if isinstance(name, x509.DNSName):
        return f"{'*.' if text.startswith('*.') else ''}{name.value}"
    if text.startswith("*."):
        raise ConfigError(f"sans has {clip(text)}: a network is written 10.0.0.0/8")
    return ip_network(name.value)


def _matches(pattern: str, name: str) -> bool:
    """Whether the DNS name *name* is what *pattern* says, or below it."""
    if pattern.startswith("*"):
        return name.endswith(pattern[1:])
    return name == pattern
