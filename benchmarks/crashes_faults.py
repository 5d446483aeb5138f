"""What is wrong with what a crash has left; pure."""

from __future__ import annotations

import hashlib
import json
from base64 import b64decode
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

from cryptography.x509 import load_der_x509_certificate

from parallax.control_plane import tokens
from parallax.control_plane.audit import ENTRIES, HEAD, START, Entry, Head
from parallax.control_plane.audit_chain import Chain
from parallax.control_plane.crl import RECORDS
from parallax.control_plane.issued import CERTIFICATES, HOLDERS, KEYS, LOOKUPS, IssuedCertificate, KeyUse
from parallax.control_plane.revoked import RevokedCertificate, decode
from parallax.control_plane.root_rotation import RootRotation, Stage
from parallax.security.errors import ChainBroken
from parallax.security.keys import key_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from parallax.control_plane.audit import Deed
    from parallax.control_plane.engines.engine import Record

Effects: TypeAlias = dict[str, str | None]
Standing: TypeAlias = dict[str, str]

_COUNTED: Final = {  # what goes without its name, and the kind of thing that it is
    "certificate/dropped": ("certificate", "count"),
    "revocation/dropped": ("revoked", "count"),
    "enrollment/pruned": ("approval", "approvals"),
}


@dataclass(frozen=True, slots=True)
class Found:
    """
    What there is after a crash.

    Args:
        lists: The number of the list that each issuer's file holds.
    """

    records: Mapping[str, Record]
    lists: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Story:
    """
    What there has to be, by all that the audit log has ever told.

    Attributes:
        head: Of what was heard.
        actions: How often each was heard.
        told: What there is by that, and how it stands: `token 7f3a…` was redeemed by these.
    """

    head: Head = START
    actions: Counter[str] = field(default_factory=Counter)
    told: dict[str, str] = field(default_factory=dict)
    _gone: Counter[str] = field(default_factory=Counter)

    def find_faults(self, found: Found, acknowledged: Head, there: Iterable[str]) -> list[str]:
        """
        Hear on, and compare: what was acknowledged is there, and nothing by half.

        Each entry of the log has its records and each record its entry; where there is none, a record has
        those that belong to it.

        Args:
            acknowledged: How far the log had come at least.
            there: Records that were acknowledged, and of which the log does not tell.
        """
        faults = [*self._hear(found.records)]
        if acknowledged.sequence > self.head.sequence:
            faults.append(f"entry {acknowledged.sequence} was acknowledged; the last is {self.head.sequence}")
        faults += [f"{key} was acknowledged and is gone" for key in there if key not in found.records]
        faults += self._compare(_kept(found.records))
        faults += torn_certificates(found.records)
        for issuer, number in found.lists.items():
            record = found.records.get(f"{RECORDS}{issuer}")
            if record is None or json.loads(record.value or b"{}")["number"] < number:
                faults.append(f"list {number} of {issuer} is shown, and no record has its number")
        return faults

    def _hear(self, records: Mapping[str, Record]) -> Iterator[str]:
        """Take in what is new in the log, which has to be whole and to go on from what was heard."""
        chain, head = Chain(self.head if self.head != START else None), records.get(HEAD)
        try:
            for key in sorted(key for key in records if key.startswith(ENTRIES)):
                entry = chain.add(int(key.removeprefix(ENTRIES)), records[key].value or b"")
                if entry.sequence > self.head.sequence:
                    if entry.sequence > self.head.sequence + 1:
                        yield f"entry {self.head.sequence + 1} went before anybody saw it"
                    self._take(entry)
            chain.finish(Head.parse((head.value or b"").decode()) if head else START)
        except ChainBroken as exc:
            yield str(exc)

    def _take(self, entry: Entry) -> None:
        """What *entry* has changed."""
        self.head, deed = entry.head, entry.deed
        self.actions[deed.action] += 1
        for what, how in _EFFECTS.get(deed.action, _nothing)(deed).items():
            if how is None:
                self.told.pop(what, None)
            else:
                self.told[what] = how
        if deed.action in _COUNTED:
            kind, name = _COUNTED[deed.action]
            self._gone[kind] += int(deed.detail[name])

    def _compare(self, kept: Mapping[str, str]) -> Iterator[str]:
        """What is told and not kept, or kept and not told, or not as it is told."""
        for kind, missing in _by_kind(self.told.keys() - kept.keys()).items():
            gone = self._gone.pop(kind, 0)
            if len(missing) != gone:
                yield f"{len(missing)} are missing where {gone} have gone, {missing[0]} for one"
            for each in missing:
                del self.told[each]
        yield from (f"{what} is told of nowhere" for what in kept.keys() - self.told.keys())
        for what in kept.keys() & self.told.keys():
            if kept[what] != self.told[what]:
                yield f"{what} is {kept[what]!r}, where the log tells {self.told[what]!r}"


def _by_kind(things: Iterable[str]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for each in sorted(things):
        kinds.setdefault(each.partition(" ")[0], []).append(each)
    return kinds


# What a deed says of things: how they stand from then on; None: they go.


def _nothing(_: Deed) -> Effects:
    return {}


def _enrolled(deed: Deed) -> Effects:
    key, name = deed.detail["key"], deed.subject.rpartition("/")[2]
    by = {f"approval {key}": "given"} if deed.by == "approval" else {deed.by: f"{name}={key}"}
    return {f"certificate {deed.detail['serial']}": "", f"labels {deed.subject}": "", **by}


def _pins(how: str | None) -> Callable[[Deed], Effects]:
    return lambda deed: dict.fromkeys(
        (f"pin {deed.subject}/{each}" for each in deed.detail["fingerprint"].split()), how
    )


_EFFECTS: Final[Mapping[str, Callable[[Deed], Effects]]] = {
    "benchmarks/done": lambda deed: {f"deed {deed.subject}/{half}": "" for half in "ab"},
    "certificate/renewed": lambda deed: {f"certificate {deed.detail['serial']}": ""},
    "certificate/enrolled": _enrolled,
    "certificate/revoked": lambda deed: {f"revoked {deed.detail['issuer']}/{deed.detail['serial']}": ""},
    "identity/labelled": lambda deed: {f"labels {deed.subject}": ""},
    "name/allotted": lambda deed: {f"labels {deed.subject}": ""},
    "identity/revoked": lambda deed: {f"identity {deed.subject}": "revoked", f"labels {deed.subject}": ""},
    "identity/reinstated": lambda deed: {f"identity {deed.subject}": "reinstated"},
    "token/created": lambda deed: {deed.subject: ""},
    "token/revoked": lambda deed: {deed.subject: None},
    "token/pruned": lambda deed: {f"token {each}": None for each in deed.detail["tokens"].split()},
    "enrollment/approved": lambda deed: {f"approval {deed.detail['key']}": "open"},
    "enrollment/rejected": lambda deed: {f"approval {deed.detail['key']}": None},
    "pin/added": _pins("added"),
    "pin/exchanged": _pins("exchanged"),
    "pin/removed": _pins(None),
    "pin/replaced": _pins(None),
    "pin/ended": _pins(None),
    **{f"root/{stage}": lambda deed: {"root": deed.action.removeprefix("root/")} for stage in Stage},
    f"root/{Stage.IDLE}": lambda _: {"root": None},
}

# The same by the records of each area, whose keys are without that.


def _token(key: str, value: bytes) -> Standing:
    redeemed = tokens.decode(value).redeemed.items()
    return {f"token {key}": " ".join(f"{name}={fingerprint}" for name, fingerprint in redeemed)}


def _certificate(key: str, value: bytes) -> Standing:
    entry = IssuedCertificate.decode(key, value)
    return {f"certificate {entry.serial}": ""} if entry.requested_by is not None else {}


def _revocation(_: str, value: bytes) -> Standing:
    revoked = decode(value)
    if isinstance(revoked, RevokedCertificate):
        issuer, serial = revoked.certificate
        return {f"revoked {issuer.hex()}/{serial:x}": ""}
    return {f"identity {revoked.identity}": "reinstated" if revoked.reinstated_at else "revoked"}


def _pinned(_: str, value: bytes) -> Standing:
    return {
        f"pin {each['identity']}/{hashlib.sha256(b64decode(each['certificate'])).hexdigest()}": (
            "exchanged" if each["exchanged_for"] else "added"
        )
        for each in json.loads(value)
    }


_STANDING: Final[Mapping[str, Callable[[str, bytes], Standing]]] = {
    "deeds": lambda key, _: {f"deed {key}": ""},
    "certificates": _certificate,
    "tokens": _token,
    "approvals": lambda key, value: {f"approval {key}": "given" if json.loads(value)["is_given"] else "open"},
    "grants": lambda key, _: {f"labels spiffe://{key}": ""},
    "revocations": _revocation,
    "pins": _pinned,
    "roots": lambda key, value: {"root": RootRotation.decode(value).stage} if key == "rotation" else {},
}


def _kept(records: Mapping[str, Record]) -> Standing:
    """How all things stand by *records*."""
    standing: Standing = {}
    for record in records.values():
        area, _, key = record.key.partition("/")
        if area in _STANDING:
            standing |= _STANDING[area](key, record.value or b"")
    return standing


def torn_certificates(records: Mapping[str, Record]) -> Iterator[str]:
    """Certificates without what leads to them, and what leads to none."""
    entries = [
        IssuedCertificate.decode(key, record.value or b"")
        for key, record in records.items()
        if key.startswith(CERTIFICATES)
    ]
    whole = {key for each in entries for key in (each.key, *each.keys)}
    last: dict[str, str] = {}
    for each in entries:
        last[each.use_key] = max(each.key, last.get(each.use_key, ""))
    pinned = _pinned_keys(records)
    for key, record in records.items():
        if key.startswith(KEYS):
            use = KeyUse.decode(record.value or b"")
            if last.pop(key, "") != use.certificate:
                yield f"{key} does not lead to the last certificate for that key"
            if use.is_pinned is not (key in pinned):
                yield f"{key} is pinned, or not, as the pins do not have it"
        elif key.startswith((CERTIFICATES, HOLDERS, LOOKUPS)) and key not in whole:
            yield f"{key} is of no certificate"
    yield from (f"{key} is missing" for key in whole if key not in records)
    yield from (f"{key} is missing" for key in (*last, *(pinned - records.keys())))


def _pinned_keys(records: Mapping[str, Record]) -> set[str]:
    """The records of the keys of what is pinned."""
    pins = [json.loads(each.value or b"") for key, each in records.items() if key.startswith("pins/")]
    ders = [b64decode(each["certificate"]) for held in pins for each in held]
    return {f"{KEYS}{key_id(load_der_x509_certificate(der).public_key()).hex()}" for der in ders}
