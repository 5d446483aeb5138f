"""The policy of a file, kept in force like it: a good one at once, a bad one never."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from parallax.runtime.policy import Policy
from parallax.runtime.policy_text import MAX_BYTES, built_in_policy, parse_policy
from parallax.security.errors import ConfigError
from parallax.security.files import show
from parallax.security.lookout import Lookout

logger = logging.getLogger(__name__)

SUCCESS: Final = "success"
FAILURE: Final = "failure"


def load_policy(path: Path | None) -> Policy:
    """
    The policy of the file *path*; None: the one that is built in.

    Raises:
        ConfigError: The file cannot be read, or is no policy.
    """
    return built_in_policy() if path is None else parse_policy(read_text(path), show(path))


def read_text(path: Path) -> str:
    """What *path* holds, more than a policy may have included; raises ConfigError."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1).decode()
    except OSError as exc:
        cause = (exc.strerror or "").lower()
        raise ConfigError(f"cannot read the policy {show(path)}: {cause}; see PARALLAX_POLICY_FILE") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{show(path)}: a policy is TOML in UTF-8, which this is not") from None


class PolicyFile:
    """
    Follows the file *path*, and tells what to put in force.

    Args:
        path: None: there is none to follow.
        on_change: Told each policy that replaces the one before.
        poll: How often to look without being told of a change.

    Attributes:
        policy: In force.
        problem: Why the file, as it is now, is not; empty if it is.

    Raises:
        ConfigError: What the file holds now is no policy.
    """

    def __init__(self, path: Path | None, on_change: Callable[[Policy], None], poll: timedelta) -> None:
        self.path = path
        self.policy = load_policy(path)
        self.problem = ""
        self._on_change = on_change
        self._poll = poll
        self._loads = {SUCCESS: 0, FAILURE: 0}

    @property
    def loads(self) -> Mapping[str, int]:
        """Attempts to put a changed file in force, by result."""
        return MappingProxyType(self._loads)

    @property
    def detail(self) -> str:
        """How it stands, for `/readyz`; the log has the whole reason."""
        if self.path is None:
            return "built in"
        return "the file cannot be used, the one before is in force" if self.problem else "as in the file"

    async def run(self) -> None:
        """Follow it until cancelled; its owner's task, once."""
        if self.path is not None:
            await Lookout([self.path], self._poll).run(self.look)

    async def look(self) -> None:
        """Read the file now, and put in force what it holds if that is another policy, and a good one."""
        try:
            policy = await asyncio.to_thread(load_policy, self.path)
        except ConfigError as exc:
            self._keep(str(exc))
            return
        if policy.text != self.policy.text:
            self.policy = policy
            self._loads[SUCCESS] += 1
            self._on_change(policy)
            logger.info("policy in force", extra={"rules": len(policy.rules), "hash": policy.hash.hex()[:16]})
        elif self.problem:
            logger.info("the policy's file holds again what is in force")
        self.problem = ""

    def _keep(self, problem: str) -> None:
        if problem != self.problem:  # looking again at what was found before is no news
            self.problem = problem
            self._loads[FAILURE] += 1
            logger.warning("the policy cannot be used, what was in force stays so", extra={"cause": problem})


class PolicyMetrics(Collector):
    """How *file* fares."""

    def __init__(self, file: PolicyFile) -> None:
        self._file = file

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """What a scrape shows."""
        loads = CounterMetricFamily(
            "parallax_policy_loads",
            "Attempts to put a changed policy in force, by result.",
            labels=["result"],
        )
        for result, count in self._file.loads.items():
            loads.add_metric([result], count)
        is_stale = GaugeMetricFamily(
            "parallax_policy_stale",
            "1 while the policy's file cannot be used, and the one before is in force.",
        )
        is_stale.add_metric([], bool(self._file.problem))
        yield from (loads, is_stale)
