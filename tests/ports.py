"""Ports for servers that must be told theirs before they start."""

from __future__ import annotations

import itertools
import random
import socket
from pathlib import Path

# Outgoing connections and binds of port 0 take theirs from here up (Linux): such a port stays free by chance.
_EPHEMERAL_FROM = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
_FROM = 10_000

# In an order of this run: never the same for two that ask, and runs beside one another seldom meet.
_candidates = itertools.cycle(random.sample(range(_FROM, _EPHEMERAL_FROM), _EPHEMERAL_FROM - _FROM))


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens and that nobody is given by chance."""
    for port in _candidates:
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
    raise AssertionError
