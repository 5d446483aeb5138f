"""An agent as a process of its own, `python worker.py NAME`; the task's name says what it does."""

from __future__ import annotations

import asyncio
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
        return data, 1.0


if __name__ == "__main__":
    Worker(sys.argv[1], "Worker", ["worker"]).run()
