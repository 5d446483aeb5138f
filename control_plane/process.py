"""The control plane as a process of its own: settings in, signals handled, an exit code out."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parallax.control_plane.server import ControlPlane
from parallax.runtime.handshake_log import HandshakeLog
from parallax.runtime.log_writer import process_log
from parallax.runtime.loop import run as run_loop
from parallax.runtime.settings import load_settings
from parallax.security.config import get_mtls_config


def run(config_file: Path | None = None, overrides: Mapping[str, Any] | None = None) -> None:
    """
    Serve until SIGTERM or SIGINT, then drain and return.

    Args:
        config_file: A `parallax.toml`; environment variables win over it.
        overrides: Settings that win over both.

    Raises:
        ConfigError: The settings, the key material or an address cannot be used.
    """
    settings = load_settings(config_file, **(overrides or {}))
    tls = get_mtls_config(config_file=config_file)
    with process_log(settings.log_level, settings.log_format):
        run_loop(_serve(ControlPlane(settings, tls)))


async def _serve(control_plane: ControlPlane) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with HandshakeLog(control_plane.handshake_failed), control_plane.serving():
        await stop.wait()
