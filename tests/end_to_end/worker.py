"""An agent as a process of its own, `python worker.py NAME`; the task's name says what it does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

from parallax.sdk import SecureAgent


class Worker(SecureAgent):
    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        match task:
            case "hold":  # until somebody removes the file
                held = Path(data)
                held.touch()  # noqa: ASYNC240
                while held.exists():  # noqa: ASYNC240
                    await asyncio.sleep(0.01)
            case "block":  # the loop, for so many seconds
                time.sleep(data)  # noqa: ASYNC251
            case "cling":  # to its slot, whatever it is told, until somebody removes the file
                while Path(data).exists():  # noqa: ASYNC240
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.sleep(0.01)
        return data, 1.0

    def check_health(self) -> bool:
        """What a file says: none is well, `ill` is not, and anything else is a bug."""
        path = Path(os.environ.get("HEALTH_FILE", "none"))
        return {"well": True, "ill": False}[path.read_text() if path.exists() else "well"]


if __name__ == "__main__":
    Worker(sys.argv[1], "Worker", ["worker"], session=os.environ.get("SESSION") != "no").run()
