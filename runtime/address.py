"""Where something listens or is dialled: `host:port`, read the same way everywhere."""

from __future__ import annotations

import asyncio
import os
import re
import socket
from contextlib import suppress
from ipaddress import IPv6Address
from typing import Final
from urllib.parse import unquote

from parallax.security.errors import ConfigError
from parallax.security.identity import clip

_BACKLOG: Final = 128
_MAX_PORT: Final = 65535
_ALL_INTERFACES: Final = ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
_ADDRESS: Final = re.compile(r"(?:\[(?P<v6>[^]]*)\]|(?P<host>[^:]*)):(?P<port>[0-9]{1,5})", re.ASCII)
_HOST: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252})", re.ASCII)
_PEER: Final = re.compile(r"ipv[46]:(.*):\d+")


def parse_address(text: str) -> tuple[str, int]:
    """
    Host and port of `host:port` or `[IPv6 address]:port`; the host without brackets.

    Port 0 is allowed: for a listener it means any free one.

    Raises:
        ConfigError: *text* is neither.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"{clip(text)} is not an address: write host:port, such as localhost:50051 or [::1]:50051"
        )
    port = int(match["port"])
    if port > _MAX_PORT:
        raise ConfigError(f"{clip(text)} is not an address: a port is a number from 0 to {_MAX_PORT}")
    if match["v6"] is not None:
        return _ipv6(match["v6"], text), port
    if not _HOST.fullmatch(match["host"]):
        raise ConfigError(
            f"{clip(text)} is not an address: the host is missing or malformed (all interfaces: 0.0.0.0)"
        )
    return match["host"], port


def parse_url(url: str) -> tuple[str, int]:
    """Host and port of `https://host:port`, where a control plane enrolls; raises ConfigError."""
    if url.startswith("https://"):
        with suppress(ConfigError):
            return parse_address(url.removeprefix("https://"))
    raise ConfigError(
        f"not where one enrolls: {clip(url)} (https://host:port, such as https://localhost:8080)"
    )


def host_of(peer: str) -> str:
    """The address of *peer*, as gRPC spells it, without the port, which each connection has anew."""
    found = _PEER.fullmatch(peer)
    return unquote(found[1]).strip("[]") if found else peer


def advertised(address: str, port: int, advertise: str | None = None) -> str:
    """
    Where others reach what listens on *address*, `host:port`.

    Args:
        port: That it really has; stands for port 0.
        advertise: What the operator says. Otherwise *address* itself, or for one that means all interfaces
            the name of this host.
    """
    host, stated = parse_address(advertise or address)
    if advertise is None and host in _ALL_INTERFACES:
        host = socket.gethostname()
    return f"[{host}]:{stated or port}" if ":" in host else f"{host}:{stated or port}"


async def listen(address: str, variable: str) -> socket.socket:
    """
    A TCP socket that listens on *address*; port 0 is any free one.

    Raises:
        ConfigError: Nobody can listen there: one line that names *variable* and the system's reason.
    """
    try:
        host, port = parse_address(address)
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, *_, where = found[0]
        return socket.create_server(where, family=family, backlog=_BACKLOG)
    except ConfigError as exc:
        raise ConfigError(f"{variable}: {exc}") from None
    except (OSError, OverflowError) as exc:
        raise ConfigError(
            f"{variable}={address}: cannot listen there: {_reason(exc)}; choose another address"
        ) from exc


def _reason(exc: OSError | OverflowError) -> str:
    """What the system says; asyncio and `socket` add the address to it, which the message names already."""
    if isinstance(exc, OSError) and exc.errno is not None and exc.errno > 0:
        return os.strerror(exc.errno).lower()
    return str(getattr(exc, "strerror", None) or exc).lower()  # of a name that cannot be looked up


def _ipv6(host: str, text: str) -> str:
    try:
        return str(IPv6Address(host))
    except ValueError:
        raise ConfigError(
            f"{clip(text)} is not an address: no IPv6 address stands between the brackets"
        ) from None
