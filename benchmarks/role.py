"""One process of a subject: `python role.py SUBJECT ROLE CERTS ADDRESS`."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run *work* on the event loop that the benchmark was told to use."""
    if os.environ.get("PARALLAX_BENCH_LOOP", "uvloop") == "uvloop":
        import uvloop

        uvloop.run(work)
    else:
        asyncio.run(work)


def ready(address: str = "") -> None:
    """Tell the benchmark that this process serves, and where."""
    print(address, flush=True)


if __name__ == "__main__":
    from subject import load

    name, role, certs, address = sys.argv[1:]
    load(name).roles[role](Path(certs), address)
