"""
A server that changes its certificate, with a `HandshakeLog`: a process of its own, for descriptor 2.

Its environment says where the certificates are, its argument how often to change them. When nothing is held
any more it says its port, and then answers each line of standard input with what has been counted.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, generate_latest

from parallax.runtime.caller import Caller
from parallax.runtime.handshake_log import HandshakeLog
from parallax.runtime.metrics import watch_transport
from parallax.runtime.server import new_server, serving
from parallax.security.config import get_mtls_config
from parallax.security.credentials import Credentials
from parallax.security.identity import control_plane
from parallax.security.port import HOLD_S, Swapped
from parallax.security.provider import MTLSCredentialsProvider


def nobody(caller: Caller, method: str) -> None:
    raise AssertionError(f"{caller} called {method}")


def tell(**what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


async def main(times: int) -> None:
    counts: Counter[str] = Counter()
    registry = CollectorRegistry()
    provider = MTLSCredentialsProvider(get_mtls_config(), identity=control_plane())
    store = provider.store
    assert store
    watch_transport(registry, [provider])
    counted, swaps = provider.on_swap, asyncio.Queue[Swapped]()

    def on_swap(how: Swapped) -> None:
        counted(how)
        swaps.put_nowait(how)

    provider.on_swap = on_swap
    async with HandshakeLog(lambda reason, number: counts.update({reason.value: number})):
        server = new_server(provider, nobody, lambda _: None, 1 << 20)
        async with serving(server, provider, "127.0.0.1:0", 1.0) as port:
            for _ in range(times):
                now = store.current
                store.publish(Credentials(now.chain, now.key, now.bundle), datetime.now(UTC))
                await swaps.get()
            await asyncio.sleep(HOLD_S + 0.5)
            tell(port=port)
            while await asyncio.to_thread(sys.stdin.readline):
                lines = generate_latest(registry).decode().splitlines()
                series = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
                tell(failures=counts, series=series)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
