"""What a diagnosis goes by, the facts of one set-up, and what it says, findings. No I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Final

from cryptography import x509

from parallax.sdk.exits import CONFIG
from parallax.security.bundle import TrustBundle
from parallax.security.config import MTLSConfig
from parallax.security.errors import ParallaxError
from parallax.security.identity import Identity
from parallax.security.keys import PrivateKey

_REMEDY: Final = re.compile(r"(?P<cause>.*?): (?P<remedy>(?:[^:`]|:(?! )|`[^`]*`)+)", re.DOTALL)


class Status(StrEnum):
    """How a check ended."""

    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """
    What one check says.

    Attributes:
        remedy: What to do; beside `ok`, advice.
        command: What to type for it; empty where no one command does. Capitals stand for what we cannot know.
        code: The exit code, if this is the first that failed.
    """

    status: Status
    detail: str
    remedy: str = ""
    command: str = ""
    name: str = ""
    code: int = CONFIG

    def as_json(self) -> dict[str, str | None]:
        """For programs."""
        return {
            "name": self.name,
            "status": self.status,
            "detail": self.detail,
            "remedy": self.remedy or None,
            "command": self.command or None,
        }


@dataclass(frozen=True, slots=True)
class Setup:
    """
    What this process was told.

    Attributes:
        problems: Of settings that cannot be used, as their readers say it.
        variables: The names of the environment's variables that look like ours.
        known: Those that mean something.
        tls, identity, address: None where they cannot be told.
    """

    problems: tuple[str, ...] = ()
    variables: frozenset[str] = frozenset()
    known: frozenset[str] = frozenset()
    tls: MTLSConfig | None = None
    identity: Identity | None = None
    address: str | None = None
    config_file: Path | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One of certificate, key and CA: where it is, and what came of reading it."""

    name: str = ""
    path: Path | None = None
    problem: str = ""
    is_denied: bool = False
    defect: str = ""
    is_encrypted: bool = False


@dataclass(frozen=True, slots=True)
class Material:
    """
    What lies where the credentials should be.

    Attributes:
        problem: Why nothing can be looked for.
        verdict: What a process that starts says to them; empty if it takes them.
        authority: The CA's certificate in the same directory, if there is one.
    """

    problem: str = ""
    is_flat: bool = False
    cert: Part = Part()
    key: Part = Part()
    ca: Part = Part()
    chain: tuple[x509.Certificate, ...] = ()
    private: PrivateKey | None = field(default=None, repr=False)
    bundle: TrustBundle | None = None
    verdict: str = ""
    authority: x509.Certificate | None = None
    authority_path: Path | None = None


@dataclass(frozen=True, slots=True)
class Way:
    """How far towards the control plane the network carries."""

    resolved: tuple[str, ...] = ()
    name_problem: str = ""
    reached: str = ""
    port_problem: str = ""


class Speech(StrEnum):
    """What the other end speaks."""

    TLS = "TLS"
    HTTP2 = "plaintext HTTP/2"
    OTHER = "something else"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Served:
    """
    What the other end showed.

    Attributes:
        heard: The first bytes, where they are neither TLS nor HTTP/2.
        problem: Why the handshake failed although it speaks TLS.
        asks: Whether it asked for a client's certificate.
        presented: Whether we had one to show.
        refusal: How it ended the connection after the handshake; empty if it went on.
    """

    speech: Speech
    heard: bytes = b""
    problem: str = ""
    version: str = ""
    alpn: str = ""
    chain: tuple[x509.Certificate, ...] = ()
    asks: bool = False
    presented: bool = False
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Answers:
    """What real calls came to; `agents` is each one's state and whether it is verified, None if not asked."""

    health: ParallaxError | None = None
    listing: ParallaxError | None = None
    agents: tuple[tuple[str, bool], ...] | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """All facts; those not collected, because they could not be, are None."""

    now: datetime
    setup: Setup = Setup()
    material: Material | None = None
    way: Way | None = None
    served: Served | None = None
    answers: Answers | None = None


def ok(detail: str, remedy: str = "", command: str = "") -> Finding:
    """It is as it should be; *remedy* is advice."""
    return Finding(Status.OK, detail, remedy, command)


def failed(detail: str, remedy: str, command: str = "") -> Finding:
    """It is wrong."""
    return Finding(Status.FAILED, detail, remedy, command)


def skipped(detail: str) -> Finding:
    """It cannot be checked."""
    return Finding(Status.SKIPPED, detail)


def split(message: str) -> tuple[str, str, str]:
    """Cause, remedy and command of one of our messages, `<cause>: <remedy>` with the command in backticks."""
    found = _REMEDY.fullmatch(message)
    if found is None:
        return message, "", ""
    remedy = found["remedy"]
    typed = re.findall(r"`([^`]*)`", remedy)
    return found["cause"], remedy.replace("`", "'"), typed[-1] if typed else ""
