"""Whose certificate was renewed from which, so that two copies of one identity are noticed."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from parallax.security.identity import Identity

MAX_IDENTITIES: Final = 10_000
MAX_ISSUED: Final = 16  # for one certificate: so often its holder does not get the answer


@dataclass(slots=True)
class _Tip:
    """
    How far one identity has come.

    Attributes:
        presented: The fingerprint of the certificate that was renewed last.
        issued: The fingerprints of those that were issued for it: more than one if an answer got lost.
        at: When it was renewed last.
    """

    presented: bytes
    issued: deque[bytes]
    at: datetime


class Lineages:
    """
    Remembers from which certificate each identity went on to which.

    Whoever is alone with it renews what it was given last, or, if the answer got lost, the same
    again. A certificate that is neither, and was there before the last renewal, is another copy's:
    both were renewed from one, and both are in use. One that was made later came from elsewhere: an
    operator has issued it.
    """

    def __init__(self, most: int = MAX_IDENTITIES) -> None:
        self._most = most
        self._tips: OrderedDict[Identity, _Tip] = OrderedDict()  # least recent first

    def renewed(
        self, identity: Identity, presented: bytes, made: datetime, issued: bytes, now: datetime
    ) -> bool:
        """
        Note that *presented* was renewed to *issued*; whether that shows that there are two copies.

        Args:
            presented, issued: Fingerprints.
            made: When *presented* was issued.
        """
        tip = self._tips.pop(identity, None)
        if tip is not None and presented == tip.presented:
            tip.issued.append(issued)
            tip.at = now
            is_copy = False
        else:
            is_copy = tip is not None and presented not in tip.issued and made < tip.at
            tip = _Tip(presented, deque([issued], MAX_ISSUED), now)
        self._tips[identity] = tip
        if len(self._tips) > self._most:
            self._tips.popitem(last=False)
        return is_copy
