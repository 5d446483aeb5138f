"""`parallax ca` against a control plane: a rotation shown, waited for, interrupted and taken back."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from parallax.protos import root_pb2
from parallax.sdk.cli import INTERRUPTED
from parallax.sdk.exits import NO_PERMISSION
from tests.end_to_end.rotations import Echo, Member, reached, rotate, serving, signer, start, status

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Fleet, Pki, Serve

# Each runs several programs one after the other, which can take seconds each on a busy machine.
pytestmark = pytest.mark.timeout(120)
WITHIN_S = 40.0


async def run(fleet: Fleet, *arguments: str, who: str = "client/admin") -> tuple[int | None, str, str]:
    process = await start(fleet, *arguments, "--identity", who)
    async with asyncio.timeout(WITHIN_S):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_the_command_waits_and_can_be_interrupted_and_taken_up_again(
    serve: Serve, own_pki: Pki, tmp_path: Path
) -> None:
    async with serving(serve, own_pki, tmp_path) as fleet:
        async with Member(fleet, "client/cli").following(renews=False):  # whom it waits for
            process = await start(fleet, "ca", "rotate", "--identity", "client/admin")
            assert process.stdout is not None
            async with asyncio.timeout(WITHIN_S):
                while b"active: waiting for client/cli" not in (line := await process.stdout.readline()):
                    assert line  # the command itself adopts the roots and renews
            process.send_signal(signal.SIGINT)
            _, said = await asyncio.wait_for(process.communicate(), WITHIN_S)
            assert process.returncode == INTERRUPTED
            assert b"parallax ca status --wait" in said
            code, out, _ = await run(fleet, "ca", "status")
            assert code == 0
            assert "active: the new CA signs" in out
            assert "client/cli" in out
            code, _, err = await run(fleet, "ca", "abort")
            assert code != 0
            assert "can be aborted while it is prepared only" in err
        async with Member(fleet, "client/cli").following():
            code, out, _ = await run(fleet, "ca", "rotate", "--json")
        assert code == 0
        assert json.loads(out.splitlines()[-1])["stage"] == "idle"


async def test_a_rotation_under_way_is_seen_through_and_no_other_is_begun(
    serve: Serve, own_pki: Pki, tmp_path: Path
) -> None:
    async with serving(serve, own_pki, tmp_path) as fleet, fleet.agent(Echo, "agent-1"):
        await rotate(fleet)
        waiting = await start(fleet, "ca", "status", "--wait", "--identity", "client/admin")
        out, err = await asyncio.wait_for(waiting.communicate(), WITHIN_S)  # which takes part itself
        assert (waiting.returncode, err) == (0, b"")
        stages = [line.partition(":")[0] for line in out.decode().splitlines()]
        assert stages[0] == "prepared"
        assert stages[-1] == "idle"
        after = signer(own_pki)
        code, json_lines, _ = await run(fleet, "ca", "status", "--wait", "--json")
        (last,) = json_lines.splitlines()
        assert (code, json.loads(last)["stage"]) == (0, "idle")
        assert (await status(fleet)).stage == root_pb2.ROOT_STAGE_IDLE
        assert signer(own_pki) == after


async def test_who_waits_may_be_interrupted_or_not_be_allowed_to(
    serve: Serve, own_pki: Pki, tmp_path: Path
) -> None:
    async with serving(serve, own_pki, tmp_path) as fleet:
        code, out, err = await run(fleet, "ca", "status", "--wait", who="client/cli")
        assert (code, out) == (NO_PERMISSION, "")
        assert "act as --identity client/admin" in err
        async with fleet.agent(Echo, "agent-1"):
            pass  # who keeps it from going on
        await rotate(fleet)
        waiting = await start(fleet, "ca", "status", "--wait", "--identity", "client/admin")
        assert waiting.stdout is not None
        assert b"prepared: waiting for" in await asyncio.wait_for(waiting.stdout.readline(), WITHIN_S)
        waiting.send_signal(signal.SIGINT)
        await asyncio.wait_for(waiting.communicate(), WITHIN_S)
        assert waiting.returncode == INTERRUPTED


async def test_the_command_shows_json_and_takes_it_back(serve: Serve, own_pki: Pki, tmp_path: Path) -> None:
    async with serving(serve, own_pki, tmp_path) as fleet, fleet.agent(Echo, "agent-1"):
        code, out, _ = await run(fleet, "ca", "rotate", "--no-wait", "--json")
        assert (code, json.loads(out)["stage"]) == (0, "prepared")
        code, _, err = await run(fleet, "ca", "rotate", "--no-wait", "--without", "agent/agent-1")
        assert code != 0
        assert "--force" in err
        code, out, _ = await run(fleet, "ca", "abort", "--json")
        assert (code, json.loads(out)["stage"]) == (0, "aborting")
        await reached(fleet, root_pb2.ROOT_STAGE_IDLE)
        code, out, _ = await run(fleet, "ca", "status", "--json")
        assert "agent/agent-1" in json.loads(out)["cannot_renew"]
        code, out, _ = await run(fleet, "ca", "status")
        [row] = [line for line in out.splitlines() if line.startswith("agent/agent-1")]
        assert row.split(maxsplit=1)[1].strip() == "has never asked for a certificate"


async def test_the_command_is_for_the_administrator(serve: Serve, own_pki: Pki, tmp_path: Path) -> None:
    async with serving(serve, own_pki, tmp_path) as fleet:
        code, out, err = await run(fleet, "ca", "rotate", who="client/cli")
        assert code != 0
        assert out == ""
        assert "act as --identity client/admin" in err
