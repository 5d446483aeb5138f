"""`parallax agents` and `parallax call`: what the fleet looks like, and giving it work."""

from __future__ import annotations

import base64
import json
import math
import os
import shlex
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias, TypedDict

import typer

from parallax.sdk.cli.asking import ask
from parallax.sdk.cli.options import ActAs, AsJson, CertsDir, ConfigFile, ControlPlane, adopt_settings
from parallax.sdk.cli.render import (
    distance,
    instant,
    live_table,
    say,
    write_bytes,
    write_json,
    write_json_line,
    write_lines,
    write_table,
)
from parallax.security.errors import ConfigError, InvalidRequest
from parallax.security.identity import clip

if TYPE_CHECKING:
    from parallax.sdk.agents import AgentEvent, AgentInfo
    from parallax.sdk.client import ParallaxClient
    from parallax.sdk.result import Result

_LONGEST_S: Final = 86_400.0  # as on the wire
_MAX_SHOWN: Final = 60

agents_app = typer.Typer(help="The agents that the control plane knows.", no_args_is_help=True)


def _seconds(least: float) -> Callable[[float], float]:
    def check(value: float) -> float:
        if not (math.isfinite(value) and least <= value <= _LONGEST_S):
            raise typer.BadParameter(f"{value} is not a number of seconds from {least:g} to {_LONGEST_S:g}")
        return value

    return check


Timeout: TypeAlias = Annotated[
    float,
    typer.Option(metavar="S", callback=_seconds(0.001), help="Seconds for everything, waiting included."),
]
Wait: TypeAlias = Annotated[
    float,
    typer.Option(
        metavar="S",
        callback=_seconds(0),
        help="Seconds to wait for an agent if there is none; 0: fail at once.",
    ),
]


class Wanted(TypedDict):
    """Which agents are meant, as the client takes it."""

    capability: list[str]
    labels: dict[str, str | None]
    state: list[str]
    verified: bool | None


class Terms(TypedDict):
    """On what terms a task is to be done, as the client takes them."""

    timeout: timedelta
    wait_for_agent: timedelta
    idempotent: bool
    allow_unverified: bool


@agents_app.command("list")
def list_all(
    *,
    capability: Annotated[
        list[str] | None,
        typer.Option("--capability", metavar="NAME", help="Only agents that have it; repeat for several."),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label", metavar="KEY[=VALUE]", help="Only agents with this stated label; repeat for several."
        ),
    ] = None,
    state: Annotated[
        list[str] | None,
        typer.Option(
            "--state",
            metavar="STATE",
            help="Only agents that are ready, draining or registered; repeat for any of several.",
        ),
    ] = None,
    verified: Annotated[
        bool | None,
        typer.Option(
            "--verified/--unverified", help="Only agents that a certificate vouches for, or only others."
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on: show every change until interrupted.")
    ] = False,
    identity: ActAs = None,
    control_plane: ControlPlane = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """List the registered agents, all of them or those that fulfil every condition."""
    adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)
    wanted = Wanted(
        capability=capability or [], labels=_labels(label or []), state=state or [], verified=verified
    )
    if watch:
        ask(lambda client: _watch(client, wanted, as_json=as_json))
        return
    agents = ask(lambda client: client.agents(**wanted))
    if as_json:
        write_json([_agent_as_json(agent) for agent in agents])
        return
    if not agents:
        none = "no agent is registered: start one with 'parallax agent run my_agent:MyAgent --id agent-1'"
        say(none if wanted == Wanted(capability=[], labels={}, state=[], verified=None) else "no such agent")
        return
    now = datetime.now(UTC)
    write_table(
        ("AGENT", "IDENTITY", "STATE", "BUSY", "REGISTERED", "NAME", "CAPABILITIES", "LABELS"),
        (_agent_as_cells(agent, now) for agent in agents),
        ("" if agent.state == "ready" else "yellow" for agent in agents),
        long=3,
    )


@agents_app.command("remove")
def remove(
    agent_ids: Annotated[list[str], typer.Argument(metavar="AGENT...", help="The ids of agents.")],
    *,
    identity: ActAs = None,
    control_plane: ControlPlane = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    Take agents out: their sessions end, and their processes stop with exit code 0.

    Only client/admin may (--identity client/admin). One that is not registered is no error.
    Its certificate stays valid: an agent that is started again is back.
    """
    from parallax.control_plane.registry import AgentRef

    adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)
    refs = list(dict.fromkeys(map(AgentRef.parse, agent_ids)))  # all of them, before any is taken out

    async def remove_all(client: ParallaxClient) -> list[dict[str, object]]:
        outcomes: list[dict[str, object]] = []
        for ref in refs:
            removed = await client.remove_agent(str(ref))
            outcomes.append({"agent_id": str(ref), "removed": removed})
            if not as_json:
                write_lines(f"{ref} {'removed' if removed else 'is not registered'}")
        return outcomes

    outcomes = ask(remove_all)
    if as_json:
        write_json(outcomes)


def call(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="An agent's id, or capability:NAME.")],
    task: Annotated[str, typer.Argument(metavar="TASK", help="What to do, in the agent's own words.")],
    data: Annotated[
        str | None, typer.Argument(metavar="DATA", help="""What to do it with, as JSON: '{"text": "hi"}'""")
    ] = None,
    *,
    data_file: Annotated[
        Path | None, typer.Option(metavar="FILE|-", help="Take DATA from a file, or from stdin.")
    ] = None,
    as_bytes: Annotated[
        bool, typer.Option("--bytes", help="Send DATA as bytes as they are, not as JSON.")
    ] = False,
    in_parts: Annotated[
        bool, typer.Option("--stream", help="Show the answer part by part, as the agent makes it.")
    ] = False,
    timeout: Timeout = 60,
    wait_for_agent: Wait = 0,
    idempotent: Annotated[
        bool, typer.Option("--idempotent", help="It may run twice: try elsewhere if its agent is lost.")
    ] = False,
    allow_unverified: Annotated[
        bool, typer.Option("--allow-unverified", help="An agent that no certificate vouches for will do.")
    ] = False,
    identity: ActAs = None,
    control_plane: ControlPlane = None,
    certs_dir: CertsDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """
    Have one task done, and show the value and the confidence.

    A value of bytes goes to stdout as it is, unless that is a terminal.
    The exit code is 1 if the task failed, also after some of its parts.
    """
    for text in (target, task):
        if not text.isprintable():
            raise InvalidRequest(f"{clip(text)} has characters that cannot be shown: check the spelling")
    settings = adopt_settings(config, certs_dir, identity=identity, control_plane=control_plane)
    value = _value(_read(data, data_file, settings.max_payload_bytes), data, is_bytes=as_bytes)
    terms = Terms(
        timeout=timedelta(seconds=timeout),
        wait_for_agent=timedelta(seconds=wait_for_agent),
        idempotent=idempotent,
        allow_unverified=allow_unverified,
    )
    if in_parts:
        ask(lambda client: _show_parts(client.stream(target, task, value, **terms), as_json=as_json))
        return
    result: Result[Any] = ask(lambda client: client.analyze(target, task, value, **terms))
    if as_json:
        write_json(_result_as_json(result))
    else:
        _write_result(result)


async def _show_parts(parts: AsyncGenerator[Result[Any]], *, as_json: bool) -> None:
    """Write each part as it comes; the task is cancelled where that ends early."""
    import asyncio

    def write(part: Result[Any]) -> None:
        if as_json:
            write_json_line(_result_as_json(part))
        else:
            _write_result(part)

    async with aclosing(parts):
        async for part in parts:
            # On a thread: where nobody reads our output, the link is still looked after, and Ctrl-C heard.
            await asyncio.to_thread(write, part)


def _labels(stated: list[str]) -> dict[str, str | None]:
    labels: dict[str, str | None] = {}
    for each in stated:
        key, equals, value = each.partition("=")
        if key in labels:
            raise InvalidRequest(f"--label {clip(key)} is given twice: keep one")
        labels[key] = value if equals else None
    return labels


async def _watch(client: ParallaxClient, wanted: Wanted, *, as_json: bool) -> None:
    """Show what becomes of the agents: as a table to people, as lines to whoever else reads."""
    shown: dict[str, AgentInfo] = {}

    def rows() -> list[tuple[str, ...]]:
        now = datetime.now(UTC)
        agents = sorted(shown.values(), key=lambda agent: agent.agent_id)
        return [_without_load(_agent_as_cells(agent, now)) for agent in agents]

    live = sys.stdout.isatty() and not as_json
    headers = ("AGENT", "IDENTITY", "STATE", "REGISTERED", "NAME", "CAPABILITIES", "LABELS")
    with live_table(headers, rows) if live else nullcontext():
        async for event in client.watch_agents(**wanted):
            if event.agent is not None and event.kind == "removed":
                shown.pop(event.agent.agent_id, None)
            elif event.agent is not None:
                shown[event.agent.agent_id] = event.agent
            if as_json:
                agent = {"agent": _agent_as_json(event.agent)} if event.agent else {}
                write_json_line({"event": event.kind, **agent})
            elif not live:
                write_lines(_event_as_line(event, len(shown)))


def _read(data: str | None, file: Path | None, limit: int) -> bytes | None:
    """What is to be sent, not looked into yet, at most *limit* bytes; None if nothing was given."""
    if file is None:
        return None if data is None else os.fsencode(data)
    if data is not None:
        raise InvalidRequest("DATA and --data-file are both given: keep one")
    try:
        stream = sys.stdin.buffer if str(file) == "-" else file.open("rb")
        with stream:
            content = stream.read(limit + 1)
    except OSError as exc:
        reason = (exc.strerror or type(exc).__name__).lower()
        raise ConfigError(f"--data-file {clip(str(file))} cannot be read: {reason}") from None
    if len(content) > limit:
        raise InvalidRequest(
            f"--data-file {clip(str(file))} has more than {limit} bytes (PARALLAX_MAX_PAYLOAD_BYTES): "
            "send less of it"
        )
    return content


def _value(content: bytes | None, typed: str | None, *, is_bytes: bool) -> object:
    from parallax.runtime.outcome import JSON, Payload
    from parallax.sdk.payload import decode

    if content is None:
        return b"" if is_bytes else None
    if is_bytes:
        return content
    try:
        return decode(Payload(content, JSON))
    except InvalidRequest as exc:
        cause = str(exc).removeprefix("the payload is not JSON: ")
        raise InvalidRequest(f"DATA is not JSON ({cause}): {_remedy(typed)}; bytes need --bytes") from None


def _remedy(typed: str | None) -> str:
    """How the shell would have to be told what *typed* was meant to be."""
    if typed and typed.lstrip().startswith(("{", "[")):
        return """quote the whole of it, with double quotes inside: '{"text": "hi"}'"""
    example = typed if typed and len(typed) <= _MAX_SHOWN and typed.isprintable() else "text"
    return f"a text needs its quotes, {shlex.quote(json.dumps(example, ensure_ascii=False))}"


def _result_as_json(result: Result[Any]) -> dict[str, object]:
    value = (
        {"value_base64": base64.b64encode(result.value).decode()}
        if isinstance(result.value, bytes)
        else {"value": result.value}
    )
    return {**value, "confidence": result.confidence, "agent": result.agent_id}


def _write_result(result: Result[Any]) -> None:
    verdict = f"confidence {result.confidence:g}, by {result.agent_id}"
    if not isinstance(result.value, bytes):
        write_json(result.value)
        write_lines(verdict)
        return
    if sys.stdout.isatty():
        write_lines(f"{len(result.value)} bytes: lead the output into a file to have them", verdict)
        return
    write_bytes(result.value)
    say(verdict)


def _agent_as_json(agent: AgentInfo) -> dict[str, Any]:
    return {
        "agent_id": agent.agent_id,
        "identity": agent.identity or None,
        "verified": agent.verified,
        "name": agent.name,
        "state": agent.state,
        "capabilities": list(agent.capabilities),
        "labels": dict(agent.labels),
        "metadata": dict(agent.metadata),
        "max_concurrency": agent.max_concurrency,
        "in_flight": agent.in_flight,
        "endpoint": agent.endpoint or None,
        "generation": agent.generation,
        "registered_at": agent.registered_at,
    }


def _event_as_line(event: AgentEvent, count: int) -> str:
    agent = event.agent
    if agent is None:
        return f"{instant(datetime.now(UTC))} {event.kind}: {count} agent{'s' * (count != 1)}"
    facts = (
        ("capabilities", ",".join(agent.capabilities)),
        ("labels", ",".join(f"{key}={value}" for key, value in agent.labels.items())),
        ("endpoint", agent.endpoint),
    )
    words = [f"{name}={text}" for name, text in facts if text]
    return " ".join([instant(datetime.now(UTC)), event.kind, agent.agent_id, agent.state, *words])


def _without_load(cells: tuple[str, ...]) -> tuple[str, ...]:
    """Of a watch, which is not told of it."""
    return (*cells[:3], *cells[4:])


def _agent_as_cells(agent: AgentInfo, now: datetime) -> tuple[str, ...]:
    return (
        agent.agent_id,
        agent.identity if agent.verified else "unverified",
        agent.state,
        f"{agent.in_flight}/{agent.max_concurrency}",
        distance(agent.registered_at, now),
        agent.name,
        ", ".join(agent.capabilities),
        ", ".join(f"{key}={value}" for key, value in agent.labels.items()),
    )
