"""Certificates expire by the wall clock, timers run by another."""

from __future__ import annotations

import asyncio

import pytest

from parallax.runtime.expiry import until_expiry


class Certificate:
    """One whose time left is what the test says."""

    def __init__(self, left_s: float | None) -> None:
        self.left_s = left_s
        self.asked = 0

    def remaining(self) -> float | None:
        self.asked += 1
        return self.left_s


async def test_the_block_ends_when_the_time_is_over() -> None:
    with pytest.raises(TimeoutError):
        async with until_expiry(Certificate(0.01).remaining) as ends:
            await asyncio.Event().wait()
    assert ends.expired()


async def test_a_clock_that_jumps_is_noticed_at_the_next_look() -> None:
    certificate = Certificate(3600.0)
    with pytest.raises(TimeoutError):
        async with until_expiry(certificate.remaining, recheck_s=0.01):
            certificate.left_s = -1.0
            await asyncio.Event().wait()


async def test_time_that_grows_is_believed() -> None:
    """A clock that was ahead when the call began, and is set right."""
    certificate = Certificate(0.05)
    async with until_expiry(certificate.remaining, recheck_s=0.01):
        certificate.left_s = 3600.0
        while certificate.asked < 5:
            await asyncio.sleep(0.005)


async def test_without_a_certificate_there_is_no_end_and_no_timer() -> None:
    certificate = Certificate(None)
    async with until_expiry(certificate.remaining, recheck_s=0.001) as ends:
        await asyncio.sleep(0.01)
    assert (ends.when(), certificate.asked) == (None, 1)


async def test_a_timeout_of_the_block_itself_passes_through() -> None:
    with pytest.raises(TimeoutError, match="its own"):
        async with until_expiry(Certificate(3600.0).remaining) as ends:
            raise TimeoutError("its own")
    assert not ends.expired()
