"""Enrollment tokens: what one is made of, and whom it admits. Pure: nothing is stored here."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Final, Self

from parallax.security.errors import EnrollmentError, InvalidRequest
from parallax.security.identity import Identity, Kind, check_name, check_trust_domain, clip

PREFIX: Final = "plxt"  # by which scanners find one that was published by mistake
SECRET_BYTES: Final = 32
SHORTEST: Final = timedelta(seconds=1)
LONGEST: Final = timedelta(days=30)
MAX_USES: Final = 1_000  # one record remembers them all
MAX_LABELS: Final = 64  # as an agent may state
ALLOTTED: Final = "#"  # in place of a name: the control plane chooses one

_TOKEN: Final = re.compile(rf"{PREFIX}_(?P<id>[a-z0-9]{{12}})_[A-Za-z0-9_-]{{43}}", re.ASCII)
_LABEL: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]{0,62})", re.ASCII)
_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz0123456789"

REFUSED: Final = "this token does not admit; ask whoever gave it to you for another one"
"""Whatever is wrong with a token: who guesses learns nothing."""


@dataclass(frozen=True, slots=True)
class Token:
    """
    A secret of 256 bits, `plxt_<id>_<secret>`, with an id that may be shown.

    Its digest is what is stored. A plain SHA-256 is right for that: a slow hash protects what people
    choose, and nobody finds one of 2^256 random secrets, however fast a guess is checked.
    """

    id: str
    text: str = field(repr=False)

    @classmethod
    def generate(cls) -> Self:
        """A new one."""
        token_id = "".join(secrets.choice(_ALPHABET) for _ in range(12))
        return cls(token_id, f"{PREFIX}_{token_id}_{secrets.token_urlsafe(SECRET_BYTES)}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """The token spelled *text*; raises EnrollmentError, as one that is not known does."""
        match = _TOKEN.fullmatch(text)
        if match is None:
            raise EnrollmentError(REFUSED)
        return cls(match["id"], text)

    @property
    def digest(self) -> str:
        """SHA-256 of the whole, lower-case hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Grant:
    """
    What whoever holds a token may become.

    Args:
        names: A name; the beginning of one and `*`; or `ALLOTTED`.
        labels: Granted to each identity that comes of it.
        uses: How many identities may.

    Raises:
        InvalidRequest: It grants what nothing grants.
        IdentityError: *names* is no name.
    """

    trust_domain: str
    kind: Kind
    names: str
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    uses: int = 1

    def __post_init__(self) -> None:
        check_trust_domain(self.trust_domain)
        if self.kind is Kind.SERVICE:
            raise InvalidRequest(
                "a service is not enrolled: issue its certificate with 'parallax certs issue'"
            )
        if self.is_allotted:
            if self.kind is not Kind.AGENT:
                raise InvalidRequest(f"a name is allotted to agents alone: state that of the {self.kind}")
        elif self.is_pattern:
            check_name(f"{self.names[:-1]}0")
        else:
            Identity(self.trust_domain, self.kind, self.names)
        if not 1 <= self.uses <= MAX_USES:
            raise InvalidRequest(f"a token admits 1 to {MAX_USES:,} times, not {self.uses:,}")
        if self.uses > 1 and not (self.is_pattern or self.is_allotted):
            raise InvalidRequest(f"a token for {self.names} alone is used once: several uses need a pattern")
        check_labels(self.labels)

    @property
    def is_allotted(self) -> bool:
        """Whether those who enroll are given names, and bring none."""
        return self.names == ALLOTTED

    @property
    def is_pattern(self) -> bool:
        """Whether it is for more than one name."""
        return len(self.names) > 1 and self.names.endswith("*")

    def admits(self, identity: Identity) -> bool:
        """Whether *identity* is one that is meant; where names are allotted, each may be."""
        if identity.trust_domain != self.trust_domain or identity.kind is not self.kind:
            return False
        if self.is_pattern:
            return identity.name.startswith(self.names[:-1])
        return self.is_allotted or identity.name == self.names


@dataclass(frozen=True, slots=True)
class Admission:
    """
    A token as it is kept: what it grants, until when, and to whom it was given.

    Attributes:
        digest: `Token.digest`.
        created_by: An identity, as a URI.
        redeemed: The fingerprint of the key by the name that it was redeemed for.
        allotted: The same by the name that it allots, whether redeemed for it or not yet.
    """

    id: str
    digest: str = field(repr=False)
    grant: Grant
    created_by: str
    created_at: datetime
    expires_at: datetime
    redeemed: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    allotted: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def check(self, token: Token, now: datetime) -> None:
        """
        Pass if *token* is this one and it can be redeemed still, if only again.

        Raises:
            EnrollmentError: With the text that there is for all causes.
        """
        is_right = hmac.compare_digest(self.digest, token.digest)
        if not is_right or now >= self.expires_at:
            raise EnrollmentError(REFUSED)

    def redeem(self, identity: Identity, key_fingerprint: str) -> Mapping[str, str]:
        """
        To whom it will be given, with *identity* and its key among them.

        The same identity may come again with the same key: its answer may have been lost. Whether it has
        used it already is for the caller to know.

        Raises:
            EnrollmentError: It is spent, or for somebody else.
        """
        known = self.redeemed.get(identity.name) or self.allotted.get(identity.name)
        is_its = known is not None and hmac.compare_digest(known, key_fingerprint)
        is_new = known is None and not self.grant.is_allotted and not self.is_spent
        if not self.grant.admits(identity) or not (is_its or is_new):
            raise EnrollmentError(REFUSED)
        return {**self.redeemed, identity.name: key_fingerprint}

    def name_of(self, key_fingerprint: str) -> str | None:
        """The name that was allotted to the holder of that key; None: none yet."""
        return next((name for name, key in self.allotted.items() if key == key_fingerprint), None)

    def allot(self, name: str, key_fingerprint: str) -> Mapping[str, str]:
        """
        What it will have allotted, with *name* for the holder of that key among it.

        Raises:
            EnrollmentError: It is spent, or allots no names.
        """
        if not self.grant.is_allotted or self.is_spent:
            raise EnrollmentError(REFUSED)
        return {**self.allotted, name: key_fingerprint}

    @property
    def names(self) -> tuple[str, ...]:
        """The names that it was redeemed for, or that it has allotted."""
        return tuple(self.allotted or self.redeemed)

    @property
    def is_spent(self) -> bool:
        """Whether it admits nobody new."""
        return len(self.names) >= self.grant.uses


def new_name() -> str:
    """A name to allot, of eight digits; whether it is free is for the caller to know."""
    return f"{secrets.randbelow(10**8):08}"


def check_ttl(ttl: timedelta) -> timedelta:
    """*ttl* itself, if a token may last so long; raises InvalidRequest."""
    if not SHORTEST <= ttl <= LONGEST:
        raise InvalidRequest(f"a token lasts a second to {LONGEST.days} days, not {ttl}")
    return ttl


def check_labels(labels: Mapping[str, str]) -> Mapping[str, str]:
    """*labels* themselves, if they can be granted; raises InvalidRequest."""
    if len(labels) > MAX_LABELS:
        raise InvalidRequest(f"{len(labels)} labels, where {MAX_LABELS} are the most")
    for key, value in labels.items():
        if not _LABEL.fullmatch(key) or not (value == "" or _LABEL.fullmatch(value)):
            raise InvalidRequest(
                f"not a label: {clip(f'{key}={value}')} (letters, digits, then also . _ / -, at most 63)"
            )
    return labels
