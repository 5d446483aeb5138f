"""The issuance policy that is in force, as its file is now."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Final

from parallax.security.errors import ConfigError
from parallax.security.files import read_file, show
from parallax.security.issuance_policy import IssuancePolicy, parse_issuance

logger = logging.getLogger(__name__)

LOOK_S: Final = 0.4  # twice that, and what an operator has saved is in force


class IssuanceFile:
    """
    Follows the policy in *path*: a file that cannot be used changes nothing.

    Args:
        path: None: there is no policy, and everything is as without a rule.

    Attributes:
        current: In force.
        problem: Why the file is not what is in force; empty if it is.

    Raises:
        ConfigError: It cannot be used at the start: there is nothing to go on with.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.current = IssuancePolicy()
        self.problem = ""
        self._text = ""
        if path is not None:
            self._text = _read(path)
            self.current = _parse(path, self._text)

    @property
    def detail(self) -> str:
        """How it stands, for `/readyz`; the log has the whole reason."""
        if self.problem:
            return "not usable, the one before is in force"
        return "in force" if self.path is not None else "none"

    async def run(self) -> None:
        """Look for changes until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    async def look(self) -> None:
        """
        Put in force what is in the file by now, if it can be used, and was the same at the look before.

        Of a file that is being written the beginning alone may be a policy, with rules missing.
        """
        if self.path is None:
            return
        try:
            text = await asyncio.to_thread(_read, self.path)
            if text != self._text:
                self._text = text
                return
            policy = _parse(self.path, text)
        except ConfigError as exc:
            self._note(str(exc))
            return
        if policy != self.current:
            logger.info("issuance policy in force", extra={"rules": len(policy.rules)})
        self.current = policy
        self._note("")

    def _note(self, problem: str) -> None:
        """Say what has become of the file, once for each state."""
        if problem and problem != self.problem:
            logger.warning("issuance policy not usable, the one before is in force", extra={"cause": problem})
        elif self.problem and not problem:
            logger.info("issuance policy usable again")
        self.problem = problem


def _read(path: Path) -> str:
    content = read_file(path, remedy="put the issuance policy there, or unset PARALLAX_ISSUANCE_FILE")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{show(path)} is not UTF-8, as a policy has to be: write it anew") from None


def _parse(path: Path, text: str) -> IssuancePolicy:
    try:
        return parse_issuance(text)
    except ConfigError as exc:
        raise ConfigError(f"{show(path)}: {exc}") from None


def load_issuance(path: Path | None) -> IssuancePolicy:
    """The policy in *path*, or the one without a rule; raises ConfigError."""
    return IssuanceFile(path).current
