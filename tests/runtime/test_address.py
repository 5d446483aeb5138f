"""Where a peer is, as gRPC spells it."""

from __future__ import annotations

import pytest

from parallax.runtime.address import host_of


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:127.0.0.1:5", "127.0.0.1"),
        ("ipv6:%5B::1%5D:5", "::1"),
        ("ipv6:[::1]:5", "::1"),
        ("ipv6:%5Bfe80::1%25eth0%5D:65535", "fe80::1%eth0"),
        ("unix:", "unix:"),
        ("unix:/tmp/socket", "unix:/tmp/socket"),
        ("", ""),
    ],
)
def test_an_address_is_told_without_its_port(peer: str, host: str) -> None:
    assert host_of(peer) == host
