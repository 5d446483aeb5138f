"""All pins of a fleet, by age and by what is asked of them; nothing is kept for good here."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from datetime import datetime

from parallax.control_plane.pinned import Pinned
from parallax.security.identity import Identity
from parallax.security.pinned import MAX_ON_PORT, Pin


class PinIndex:
    """
    Who holds which pins, and which of these are on the port.

    They are the oldest, so that each that goes makes room for the next, after a restart as before. A change
    costs about the same however many there are.
    """

    def __init__(self) -> None:
        self._by_age: list[Pinned] = []
        self._by_holder: dict[Identity, tuple[Pinned, ...]] = {}
        self._holders: dict[bytes, Identity] = {}
        self._by_subject: dict[str, tuple[Pin, ...]] = {}

    def __len__(self) -> int:
        return len(self._by_age)

    def __iter__(self) -> Iterator[Pinned]:
        """All, the oldest first."""
        return iter(self._by_age)

    def put(self, holder: Identity, pinned: tuple[Pinned, ...]) -> None:
        """Have *holder* hold *pinned* in place of what he has."""
        for gone in self._by_holder.pop(holder, ()):
            del self._by_age[bisect_left(self._by_age, _age(gone), key=_age)]
            del self._holders[gone.pin.fingerprint]
            beside = tuple(pin for pin in self.beside(gone.pin) if pin != gone.pin)
            if beside:
                self._by_subject[_subject(gone.pin)] = beside
            else:
                del self._by_subject[_subject(gone.pin)]
        for new in pinned:
            insort(self._by_age, new, key=_age)
            self._holders[new.pin.fingerprint] = holder
            self._by_subject[_subject(new.pin)] = (*self.beside(new.pin), new.pin)
        if pinned:
            self._by_holder[holder] = pinned

    def moment(self, now: datetime) -> datetime:
        """When what is pinned *now* counts as pinned: after all others, though a clock was set back."""
        return max(now, self._by_age[-1].at + datetime.resolution) if self._by_age else now

    @property
    def holders(self) -> list[Identity]:
        """Who has a pin, by name."""
        return sorted(self._by_holder, key=str)

    def held_by(self, holder: Identity) -> tuple[Pinned, ...]:
        """What is pinned for *holder*."""
        return self._by_holder.get(holder, ())

    def holder_of(self, fingerprint: bytes) -> Identity | None:
        """For whom the certificate with this SHA-256 is pinned; None: it is not."""
        return self._holders.get(fingerprint)

    def beside(self, pin: Pin) -> tuple[Pin, ...]:
        """Those with the subject of *pin*, which a handshake could take for it; it may be one of them."""
        return self._by_subject.get(_subject(pin), ())

    @property
    def on_port(self) -> tuple[Pin, ...]:
        """Those that a handshake lets in, and since when."""
        return tuple(each.dated for each in self._by_age[:MAX_ON_PORT])

    def is_on_port(self, pinned: Pinned) -> bool:
        """Whether a handshake lets *pinned*, which is one of these, in."""
        return bisect_left(self._by_age, _age(pinned), key=_age) < MAX_ON_PORT


def _age(pinned: Pinned) -> tuple[datetime, bytes]:
    return pinned.at, pinned.pin.fingerprint


def _subject(pin: Pin) -> str:
    """What is alike where subjects are alike, and may be where they are not."""
    return pin.certificate.subject.rfc4514_string()
