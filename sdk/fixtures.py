"""The pytest fixtures of `parallax.sdk.testing`, which pytest loads with it; nobody else imports this."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from parallax.sdk.testing import Fleet, ThrowawayPKI, fleet

try:
    from pytest_asyncio import fixture as asyncio_fixture
except ImportError:  # then anyio's plugin runs the tests; it comes with anyio, which we need anyway
    asyncio_fixture = pytest.fixture  # type: ignore[assignment]  # it is used in the one way that both have


@pytest.fixture(scope="session")
def parallax_pki() -> ThrowawayPKI:
    """A CA for the whole test run; override it for a trust domain of your own."""
    return ThrowawayPKI()


@pytest.fixture
def parallax_fleet(request: pytest.FixtureRequest) -> Fleet:
    """A control plane for one test, in the test's event loop."""
    runner = "anyio" if "anyio_backend" in request.fixturenames else "asyncio"
    running: Fleet = request.getfixturevalue(f"_parallax_fleet_in_{runner}")
    return running


@asyncio_fixture
async def _parallax_fleet_in_asyncio(parallax_pki: ThrowawayPKI) -> AsyncIterator[Fleet]:
    async with fleet(parallax_pki) as running:
        yield running


@pytest.fixture
async def _parallax_fleet_in_anyio(parallax_pki: ThrowawayPKI) -> AsyncIterator[Fleet]:
    async with fleet(parallax_pki) as running:
        yield running
