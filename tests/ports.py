"""Ports for servers that must be told theirs before they start."""

from __future__ import annotations

import itertools
import os
import random
import socket
from pathlib import Path

# Outgoing connections and binds of port 0 take theirs from here up (Linux): such a port stays free by chance.
_EPHEMERAL_FROM = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
_FROM = 10_000

# Of these, the workers of a run (pytest-xdist) have each their own.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _WORKERS
_PORTS = range(_FROM + _WORKER, _EPHEMERAL_FROM, _WORKERS)

# In an order of this run: never the same for two that ask, and runs beside one another seldom meet.
_candidates = itertools.cycle(random.sample(_PORTS, len(_PORTS)))


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens and that nobody is given by chance."""
    for port in _candidates:
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
    raise AssertionError
