"""
What is wrong with a set-up, decided from facts alone.

A check is a function from the facts to a finding. The checks stand in the order in which one fault
hides the next: so the first that fails is where to begin. What certificates are worth is decided by
`parallax.security`, here as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from parallax.sdk.cli import host_checks, peer_checks
from parallax.sdk.cli.case import Case, Finding, Status
from parallax.sdk.exits import CONFIG, NO_PERMISSION, UNAVAILABLE

Check = Callable[[Case], Finding]

CHECKS: Final[Mapping[str, Sequence[tuple[str, Check, int]]]] = {
    "setup": (
        ("settings", host_checks.check_settings, CONFIG),
        ("variables", host_checks.check_variables, CONFIG),
        ("agreement", host_checks.check_agreement, CONFIG),
    ),
    "material": (
        ("files", host_checks.check_files, CONFIG),
        ("permissions", host_checks.check_permissions, CONFIG),
        ("content", host_checks.check_content, CONFIG),
        ("key pair", host_checks.check_pair, CONFIG),
        ("chain", host_checks.check_chain, CONFIG),
        ("validity", host_checks.check_validity, CONFIG),
        ("clock", host_checks.check_clock, CONFIG),
        ("identity", host_checks.check_identity, CONFIG),
        ("credentials", host_checks.check_credentials, CONFIG),
    ),
    "way": (
        ("address", peer_checks.check_address, CONFIG),
        ("name", peer_checks.check_name, UNAVAILABLE),
        ("port", peer_checks.check_port, UNAVAILABLE),
    ),
    "served": (
        ("protocol", peer_checks.check_protocol, UNAVAILABLE),
        ("handshake", peer_checks.check_handshake, UNAVAILABLE),
        ("server chain", peer_checks.check_server_chain, NO_PERMISSION),
        ("server validity", peer_checks.check_server_validity, NO_PERMISSION),
        ("server identity", peer_checks.check_server_identity, NO_PERMISSION),
    ),
    "answers": (
        ("authentication", peer_checks.check_authentication, NO_PERMISSION),
        ("authorization", peer_checks.check_authorization, NO_PERMISSION),
    ),
}
"""The facts that a check is the first to need → name, check, and the exit code if it fails first."""


def diagnose(case: Case, section: str) -> Iterator[Finding]:
    """What the checks of *section* say, in order."""
    for name, check, code in CHECKS[section]:
        finding = check(case)
        yield replace(finding, name=name, code=finding.code if finding.code != CONFIG else code)


def first_failed(findings: Sequence[Finding]) -> Finding | None:
    """Where to begin."""
    return next((finding for finding in findings if finding.status is Status.FAILED), None)
