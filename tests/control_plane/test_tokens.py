"""What is kept of tokens, and for how long."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest

from parallax.control_plane.audit import AuditLog
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.tokens import KEPT, TOKENS, Tokens, decode, encode
from parallax.security.errors import EnrollmentError
from parallax.security.identity import DEFAULT_TRUST_DOMAIN, Kind
from parallax.security.tokens import REFUSED, Grant, Token
from tests.control_plane.clock import Clock

ADMIN = "spiffe://parallax.local/client/admin"
HOUR = timedelta(hours=1)


@pytest.fixture
def tokens(engine: SqliteEngine, clock: Clock) -> Tokens:
    return Tokens(engine, AuditLog(engine, clock), clock)


def contents(directory: Path) -> bytes:
    """Of all files there, one after the other."""
    return b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())


def grant(names: str = "agent-7", uses: int = 1) -> Grant:
    return Grant(DEFAULT_TRUST_DOMAIN, Kind.AGENT, names, {"zone": "a"}, uses)


async def test_what_is_kept_is_read_again(tokens: Tokens, clock: Clock) -> None:
    token, admission = await tokens.create(grant("edge-*", 3), HOUR, ADMIN)
    assert decode(encode(admission)) == admission
    assert (await tokens.admission(token, clock.now))[0] == admission
    assert await tokens.page() == ([admission], "")


async def test_the_secret_is_nowhere_on_disk(tokens: Tokens, tmp_path: Path) -> None:
    token, _ = await tokens.create(grant(), HOUR, ADMIN)
    content = await asyncio.to_thread(contents, tmp_path)
    assert token.id.encode() in content
    assert token.text.rpartition(f"{token.id}_")[2].encode() not in content


@pytest.mark.parametrize("wrong", ["unknown", "ended", "revoked", "other secret"])
async def test_whatever_is_wrong_reads_the_same(tokens: Tokens, clock: Clock, wrong: str) -> None:
    token, _ = await tokens.create(grant(), HOUR, ADMIN)
    match wrong:
        case "unknown":
            token = Token.generate()
        case "ended":
            clock.now += HOUR
        case "revoked":
            assert await tokens.revoke(token.id, ADMIN)
        case "other secret":
            token = Token(token.id, Token.generate().text)
    with pytest.raises(EnrollmentError) as refused:
        await tokens.admission(token, clock.now)
    assert str(refused.value) == REFUSED


async def test_all_tokens_are_found_page_by_page(tokens: Tokens) -> None:
    made = {(await tokens.create(grant(f"agent-{number}"), HOUR, ADMIN))[0].id for number in range(5)}
    first, more = await tokens.page(limit=3)
    last, end = await tokens.page(more, 3)
    assert (len(first), len(last), end) == (3, 2, "")
    assert {each.id for each in (*first, *last)} == made


async def test_a_token_is_revoked_once(tokens: Tokens) -> None:
    token, _ = await tokens.create(grant(), HOUR, ADMIN)
    assert await tokens.revoke(token.id, ADMIN)
    assert not await tokens.revoke(token.id, ADMIN)


async def test_what_ended_a_day_ago_is_dropped(tokens: Tokens, engine: SqliteEngine, clock: Clock) -> None:
    for number in range(120):  # more than one batch
        await tokens.create(grant(f"agent-{number}"), HOUR, ADMIN)
    clock.now += HOUR + KEPT
    assert await tokens.sweep() == 0
    _, last = await tokens.create(grant(), HOUR, ADMIN)
    clock.now += timedelta(seconds=1)
    assert await tokens.sweep() == 120
    assert [record.key for record in await engine.scan(TOKENS)] == [f"{TOKENS}{last.id}"]
