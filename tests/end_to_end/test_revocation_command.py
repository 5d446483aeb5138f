"""`parallax certs revoke`, `reinstate` and `revoked` against a running control plane."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest

from parallax.sdk import exits
from parallax.sdk.cli.revocation import ReasonName
from parallax.security.errors import Revoked
from parallax.security.revocation import Reason

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Fleet, Pki, Until

AS_ADMIN = ("--identity", "client/admin")


async def run(fleet: Fleet, *arguments: str) -> tuple[int, str, str]:
    """`parallax certs …` against *fleet*: exit code, stdout, stderr."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "parallax.sdk.cli", "certs", *arguments),
        env=os.environ | fleet.pki.environment | {"PARALLAX_CONTROL_PLANE": fleet.address, "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    async with asyncio.timeout(20):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def shown_serial(certificate: Path) -> str:
    """As openssl shows it."""
    command = ["openssl", "x509", "-in", str(certificate), "-noout", "-serial"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return shown.strip().removeprefix("serial=")


def test_every_reason_can_be_stated() -> None:
    assert set(get_args(ReasonName)) == set(Reason)


async def test_a_name_of_whom_nothing_is_known_is_revoked_and_said_to_be_that(fleet: Fleet) -> None:
    """As one that is misspelt: the one that was meant goes on."""
    assert await run(fleet, "revoke", "client/clo", *AS_ADMIN) == (
        exits.OK,
        "client/clo, with all it holds, is revoked\n",
        "no certificate of client/clo is known: is that how it is spelled?\n",
    )


@pytest.mark.timeout(90)  # seven processes start one after the other, each within seconds
async def test_an_identity_is_revoked_listed_and_reinstated(fleet: Fleet, until: Until) -> None:
    assert await run(fleet, "revoked", *AS_ADMIN) == (exits.OK, "", "nothing is revoked\n")
    async with fleet.client():
        await until(lambda: fleet.plane.ledger._seen and not len(fleet.plane.ledger))
    for said in ("is revoked", "was revoked before"):
        assert await run(fleet, "revoke", "client/cli", "--reason", "key-compromise", *AS_ADMIN) == (
            exits.OK,
            f"client/cli, with all it holds, {said}\n",
            "",
        )
    with pytest.raises(Revoked, match="parallax certs reinstate client/cli"):
        async with fleet.client():
            pass
    code, out, err = await run(fleet, "revoked", *AS_ADMIN)
    assert (code, err) == (exits.OK, "")
    header, row = out.splitlines()
    assert header.split() == ["IDENTITY", "WHAT", "REASON", "SINCE", "BY"]
    assert row.split() == [
        *("client/cli", "all", "key-compromise"),
        *("less", "than", "a", "minute", "ago", "client/admin"),
    ]
    assert await run(fleet, "reinstate", "client/cli", *AS_ADMIN) == (
        exits.OK,
        "client/cli is reinstated; issue it a new certificate\n",
        "",
    )
    code, out, _ = await run(fleet, "revoked", "--json", *AS_ADMIN)
    [entry] = json.loads(out)
    assert entry["identity"] == "spiffe://parallax.local/client/cli"
    assert entry["reason"] == "key-compromise"
    assert entry["reinstated_at"] > entry["revoked_at"]
    assert (entry["serial"], entry["issuer"], entry["not_after"]) == (None, None, None)
    code, _, err = await run(fleet, "reinstate", "client/cli", *AS_ADMIN)
    assert (code, "nothing to reinstate" in err) == (exits.CONFIG, True)


async def entered(fleet: Fleet) -> list[dict[str, Any]]:
    """Clients that the ledger has: the administrator alone, who is entered soon after his first call."""
    async with asyncio.timeout(10):
        while True:
            code, out, err = await run(fleet, "list", "--ledger", "--json", "--holder", "client", *AS_ADMIN)
            assert (code, err) == (exits.OK, "")
            found: list[dict[str, Any]] = json.loads(out)
            if found:
                return found


async def test_a_certificate_is_revoked_by_what_openssl_shows_and_the_ledger_says_so(
    fleet: Fleet, pki: Pki
) -> None:
    [admin] = await entered(fleet)
    assert not admin["revoked"]
    serial = await asyncio.to_thread(shown_serial, pki.directory / "cli" / "cert.pem")
    code, out, err = await run(
        fleet, "revoke", "--serial", serial, "--issuer", admin["issuer"].upper(), *AS_ADMIN
    )
    assert (code, err) == (exits.OK, "")
    assert out == (
        f"the certificate {serial.lower().lstrip('0')} of somebody the ledger does not know is revoked\n"
    )
    with pytest.raises(Revoked, match="have another one issued"):
        async with fleet.client():
            pass
    code, out, err = await run(fleet, "revoke", "--fingerprint", admin["fingerprint"], "--json", *AS_ADMIN)
    assert (code, out) == (exits.CONFIG, "")
    assert "you are spiffe://parallax.local/client/admin" in err
    assert "--force" in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["client/cli", "--serial", "ab"],
        ["client/cli", "--issuer", "ab"],
        ["--serial", "ab", "--fingerprint", "ab"],
    ],
)
async def test_one_thing_at_a_time_is_revoked(fleet: Fleet, arguments: list[str]) -> None:
    code, out, err = await run(fleet, "revoke", *arguments, *AS_ADMIN)
    assert (code, out) == (exits.CONFIG, "")
    assert err.startswith("parallax: name one thing to revoke")


async def test_nobody_but_the_administrator_may(fleet: Fleet) -> None:
    for arguments in (["revoke", "agent/agent-1"], ["reinstate", "agent/agent-1"], ["revoked"]):
        code, out, err = await run(fleet, *arguments)
        assert (code, out) == (exits.NO_PERMISSION, "")
        assert "act as --identity client/admin" in err
