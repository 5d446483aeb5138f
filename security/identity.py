"""Who somebody is: one value with a URI, a DNS and a short spelling."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from parallax.security.errors import IdentityError

DEFAULT_TRUST_DOMAIN: Final = "parallax.local"
AGENT_PROXY: Final = "agent-proxy"  # the service as which the control plane dials agents
RESERVED_NAMES: Final = frozenset({"ca"})  # the issuer's own place in a certificate directory

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)
_LABEL: Final = r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?"  # RFC 1123 §2.1
_TRUST_DOMAIN: Final = re.compile(rf"(?=.{{1,63}}\Z){_LABEL}(?:\.{_LABEL})*", re.ASCII)


class Kind(StrEnum):
    """What an identity is for; it decides what the built-in policy lets it do."""

    SERVICE = "service"
    AGENT = "agent"
    CLIENT = "client"


# The label that stands between name and trust domain in the DNS spelling.
_DNS_LABEL: Final = {Kind.SERVICE: "", Kind.AGENT: "agents.", Kind.CLIENT: "clients."}


@dataclass(frozen=True, slots=True, order=True)
class Identity:
    """
    A SPIFFE ID: who a certificate says its holder is (SPIFFE-ID §2).

    Only a well-formed one can be built, so that a name taken from here is safe in
    a path, a log line and a certificate.

    Raises:
        IdentityError: The trust domain or the name is not in canonical form.
    """

    trust_domain: str
    kind: Kind
    name: str

    def __post_init__(self) -> None:
        check_trust_domain(self.trust_domain)
        object.__setattr__(self, "kind", _kind(self.kind))  # a plain "service" would pass by `is` below
        check_name(self.name)
        if self.kind is Kind.SERVICE and "." in self.name:
            raise IdentityError(f"a service's name has no dot: {self.name!r}")
        if self.name in RESERVED_NAMES:
            raise IdentityError(f"the name {self.name!r} is reserved")

    @classmethod
    def parse(cls, uri: str) -> Identity:
        """The identity spelled *uri*, `spiffe://<trust domain>/<kind>/<name>`; canonical form only."""
        scheme, _, rest = uri.partition("://")
        parts = rest.split("/")
        if scheme != "spiffe" or len(parts) != 3:
            raise IdentityError(f"not spiffe://<trust domain>/<kind>/<name>: {clip(uri)}")
        return cls(parts[0], _kind(parts[1]), parts[2])

    @classmethod
    def parse_short(cls, text: str, trust_domain: str = DEFAULT_TRUST_DOMAIN) -> Identity:
        """The identity spelled `<kind>/<name>` within *trust_domain*."""
        kind, slash, name = text.partition("/")
        if not slash:
            raise IdentityError(f"not <kind>/<name>, such as client/cli: {clip(text)}")
        return cls(trust_domain, _kind(kind), name)

    @classmethod
    def from_dns(cls, name: str, trust_domain: str) -> Identity | None:
        """The identity of *trust_domain* that the DNS name *name* spells, or None."""
        suffix = f".{trust_domain}"
        stem = fold_dns(name).removesuffix(suffix)
        if stem == fold_dns(name):
            return None
        kind = Kind.SERVICE
        for candidate in (Kind.AGENT, Kind.CLIENT):
            tail = f".{_DNS_LABEL[candidate]}".removesuffix(".")
            if stem.endswith(tail):
                kind, stem = candidate, stem.removesuffix(tail)
                break
        try:
            return cls(trust_domain, kind, stem)
        except IdentityError:
            return None

    @property
    def dns_name(self) -> str:
        """The DNS spelling, which whoever dials this identity verifies (RFC 9525)."""
        return f"{self.name}.{_DNS_LABEL[self.kind]}{self.trust_domain}"

    @property
    def short(self) -> str:
        """`<kind>/<name>`: unambiguous within the trust domain."""
        return f"{self.kind}/{self.name}"

    def __str__(self) -> str:
        return f"spiffe://{self.trust_domain}/{self.kind}/{self.name}"


def control_plane(trust_domain: str = DEFAULT_TRUST_DOMAIN) -> Identity:
    """The identity every agent and client expects of the control plane."""
    return Identity(trust_domain, Kind.SERVICE, "control-plane")


def agent_proxy(trust_domain: str = DEFAULT_TRUST_DOMAIN) -> Identity:
    """The identity as which the control plane dials agents."""
    return Identity(trust_domain, Kind.SERVICE, AGENT_PROXY)


def check_name(name: str) -> str:
    """*name* itself, if it is `[a-z0-9]` then up to 62 of `[a-z0-9._-]`, without `..` or a trailing dot."""
    if not _NAME.fullmatch(name) or ".." in name or name.endswith("."):
        raise IdentityError(
            f"not a name: {clip(name)} "
            "(1 to 63 characters: a-z, 0-9, then also . _ -, no '..', no trailing dot)"
        )
    return name


def check_trust_domain(name: str) -> str:
    """*name* itself, if it is a lower-case DNS name of at most 63 characters."""
    if not _TRUST_DOMAIN.fullmatch(name):
        raise IdentityError(f"not a trust domain: {clip(name)} (lower-case DNS name, at most 63 characters)")
    return name


def fold_dns(name: str) -> str:
    """
    *name* as those who dial compare it: case and a trailing dot do not count (RFC 4343, RFC 1034 §3.1).

    Only ASCII has case here. Python would also fold the Kelvin sign to a k.
    """
    return (name.lower() if name.isascii() else name).removesuffix(".")


def clip(text: str, limit: int = 80) -> str:
    """*text* quoted and cut for a message: hostile input must not fill or forge a log line."""
    return ascii(text if len(text) <= limit else text[:limit] + "…")


def _kind(text: str) -> Kind:
    try:
        return Kind(text)
    except ValueError:
        raise IdentityError(f"not a kind: {clip(text)} (service, agent or client)") from None
