"""From credentials to gRPC: what a server presents and demands, whom a client accepts."""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING, Final

import grpc

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parallax.security.credentials import Credentials, Served
    from parallax.security.identity import Identity

Option = tuple[str, str | int]
"""A channel option as gRPC takes it."""

# One host:port as gRPC reads it; the port may be missing, IPv6 needs the brackets. Not `dns://server/name`,
# which asks another host what the name means, and not several addresses.
_ADDRESS: Final = re.compile(
    r"(?:dns:(?:///)?|ipv4:|ipv6:)?(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<name>[a-zA-Z0-9.-]+))(?::[0-9]{1,5})?"
)
_PORT: Final = re.compile(r"(?:\[[^\[\]/]+\]|[^:\[\]/]*):(?P<port>[0-9]{1,5})")
_SOCKETS: Final = ("unix:", "unix-abstract:")


def certificate_configuration(served: Served) -> grpc.ServerCertificateConfiguration:
    """What a server presents and demands, for one port to take once."""
    # Never without roots: gRPC takes none at all, and then asks the system's.
    own = served.credentials
    return grpc.ssl_server_certificate_configuration(
        [(own.key_pem, own.chain_pem)], root_certificates=served.roots_pem
    )


def channel_credentials(credentials: Credentials) -> grpc.ChannelCredentials:
    """Mutual TLS for a client; fixed for the life of a channel, so a rotation needs a new one."""
    return grpc.ssl_channel_credentials(credentials.bundle_pem, credentials.key_pem, credentials.chain_pem)


def identity_options(expected: Identity) -> tuple[Option, ...]:
    """
    Channel options that make the handshake accept *expected* alone, wherever the endpoint is.

    The server's leaf must carry the DNS SAN of *expected* (RFC 9525); the address is not compared.
    """
    return (
        ("grpc.ssl_target_name_override", expected.dns_name),
        ("grpc.default_authority", expected.dns_name),
    )


def is_loopback(address: str) -> bool:
    """
    Whether *address*, to bind or to dial, never leaves this host.

    True only of `localhost`, 127.0.0.0/8, `::1` and Unix sockets, in the spellings of gRPC; anything
    else, other names of this host included, is False.
    """
    if address.startswith(_SOCKETS):
        return True
    host = host_of(address)
    if host is None:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def host_of(address: str) -> str | None:
    """The one host, without brackets, that *address* names in a spelling of gRPC; None if it is not that."""
    found = _ADDRESS.fullmatch(address)
    return None if found is None else found["v6"] or found["name"]


def names_port(address: str) -> bool:
    """
    Whether *address* is `host:port` (or a Unix socket), and the port is one.

    gRPC itself binds 443 if there is none, and 34463 for 99999 (measured).
    """
    found = _PORT.fullmatch(address)
    return address.startswith(_SOCKETS) or (found is not None and int(found["port"]) < 1 << 16)


def replace_options(given: Sequence[Option], ours: Sequence[Option]) -> list[Option]:
    """*given* without those that *ours* are about, then *ours*: nobody turns them off by passing his own."""
    names = {name for name, _ in ours}
    return [*(option for option in given if option[0] not in names), *ours]
