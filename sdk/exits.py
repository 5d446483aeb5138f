"""What the exit codes of an agent and of the command mean."""

from __future__ import annotations

from typing import Final

from parallax.security import errors
from parallax.security.errors import ParallaxError

OK: Final = 0
FAILED: Final = 1  # what was asked for was done, and the answer is no
CONFIG: Final = 2  # usage or deployment
UNAVAILABLE: Final = 69  # EX_UNAVAILABLE of sysexits.h: nobody can answer, try again
NO_PERMISSION: Final = 77  # EX_NOPERM: not authenticated or not authorized
SUPERSEDED: Final = 78  # another instance took over; a supervisor should not restart this one

_CODES: Final[tuple[tuple[type[ParallaxError], int], ...]] = (
    (errors.Superseded, SUPERSEDED),
    (errors.Unavailable, UNAVAILABLE),
    (errors.VerificationError, NO_PERMISSION),
    (errors.NotAuthorized, NO_PERMISSION),
    (errors.EnrollmentError, NO_PERMISSION),
    (errors.TaskFailed, FAILED),
    (errors.NoSuchAgent, FAILED),
    (errors.ChainBroken, FAILED),
    (ParallaxError, CONFIG),
)


def exit_code(exc: ParallaxError) -> int:
    """The code with which a process ends because of *exc*."""
    return next(code for cls, code in _CODES if isinstance(exc, cls))
