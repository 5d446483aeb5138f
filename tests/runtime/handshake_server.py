"""
A gRPC server over mTLS with a `HandshakeLog`: a process of its own, for that takes over descriptor 2.

Reads commands from standard input, one a line, and answers each with a line of JSON. Its
directory holds `server.pem`, `server-key.pem` and `ca.pem`; then come, in seconds, how often a reason
is logged, and how long a child that has been stopped is waited for.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path

import grpc
import grpc.aio

from parallax.runtime import handshake_log
from parallax.runtime.handshake_log import HandshakeLog
from parallax.runtime.logs import LogFormat, LogLevel, configure_logging


async def echo(request: bytes, context: object) -> bytes:
    return request


class Echo(grpc.GenericRpcHandler):
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        return grpc.unary_unary_rpc_method_handler(echo)


class Bench:
    """What the commands do."""

    def __init__(self, log: HandshakeLog, counts: Counter[str]) -> None:
        self.log = log
        self.counts = counts
        self.before = (os.fstat(2), sys.stderr)

    async def do(self, command: str, argument: str) -> object:
        match command:
            case "counts":
                return self.counts
            case "say":  # as native code would
                return os.write(2, argument.encode().decode("unicode_escape").encode("latin-1"))
            case "print":  # as Python code would
                return sys.stderr.write(f"{argument}\n")
            case "fill":
                return fill()
            case "signal":
                assert self.log._child is not None
                self.log._child.send_signal(signal.Signals[argument])
                return None
            case "close":
                await self.log.__aexit__(None, None, None)
                return self.state()
            case _:
                return self.state()

    def state(self) -> dict[str, object]:
        stat, stderr = self.before
        return {
            "descriptor_2_is_the_real_one": os.path.samestat(stat, os.fstat(2)),
            "sys_stderr_is_the_original": sys.stderr is stderr,
            "verbosity": os.environ.get("GRPC_VERBOSITY"),
            "child_ended_with": self.log._child and self.log._child.returncode,
        }


def tell(answer: object) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def fill() -> int:
    """Write to descriptor 2 until it takes no more; how many bytes."""
    written = 0
    for size in (4096, 1):
        while True:
            try:
                written += os.write(2, b"." * (size - 1) + b"\n")
            except BlockingIOError:
                break
    return written


async def main(directory: Path, interval_s: float, close_s: float) -> None:
    handshake_log._CLOSE_TIMEOUT = timedelta(seconds=close_s)  # type: ignore[misc]
    configure_logging(LogLevel.INFO, LogFormat.JSON)
    counts: Counter[str] = Counter()
    log = HandshakeLog(
        lambda reason, times: counts.update({reason.value: times}), interval=timedelta(seconds=interval_s)
    )
    bench = Bench(log, counts) if sys.__stderr__ else None
    async with log:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((Echo(),))
        certificate, key, root = (
            (directory / name).read_bytes() for name in ("server.pem", "server-key.pem", "ca.pem")
        )
        credentials = grpc.ssl_server_credentials([(key, certificate)], root, require_client_auth=True)
        port = server.add_secure_port("127.0.0.1:0", credentials)
        await server.start()
        tell(port)
        while line := await asyncio.to_thread(sys.stdin.readline):
            command, _, argument = line.rstrip("\n").partition(" ")
            tell(await bench.do(command, argument) if bench else None)
        await server.stop(0)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), *map(float, sys.argv[2:])))
