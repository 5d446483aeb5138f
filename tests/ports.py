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

# Each of the workers of a run has its own, in an order of that run: never the same for two that ask, and runs
# beside one another seldom meet.
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_own = range(_FROM + _worker, _EPHEMERAL_FROM, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
_candidates = itertools.cycle(random.sample(_own, len(_own)))


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens and that nobody is given by chance."""
    for port in _candidates:
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
    raise AssertionError
