"""What somebody asks about a policy: may this one call that, of whom?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from parallax.runtime.methods import method_of
from parallax.runtime.policy import ANONYMOUS
from parallax.runtime.policy_text import check_asked
from parallax.security.identity import Identity


@dataclass(frozen=True, slots=True)
class Question:
    """
    About one call.

    Args:
        caller: None: somebody whom no certificate vouches for.
        method: Its full name.
        target: `agent-1`, `capability:audit`, or empty: whether the method may be called at all.
    """

    caller: Identity | None
    method: str
    target: str

    @classmethod
    def read(cls, caller: str, method: str, target: str, trust_domain: str) -> Self:
        """The question as people put it; raises IdentityError or InvalidRequest if it is none."""
        return cls(
            None if caller in ("", ANONYMOUS) else Identity.parse_short(caller, trust_domain),
            method_of(method),
            check_asked(target) if target else "",
        )
