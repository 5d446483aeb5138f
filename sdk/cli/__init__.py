"""The `parallax` command."""

from __future__ import annotations

import os
import sys
from typing import Final, NoReturn

INTERRUPTED: Final = 130  # 128 + SIGINT, as a shell reports it
READER_GONE: Final = 141  # 128 + SIGPIPE: whoever read our output has had enough of it


def main() -> NoReturn:
    """Run the command line of this process, and end the process with its exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    try:
        # Inside, so that Ctrl-C during the imports is as quiet as later.
        from parallax.sdk.cli.app import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        from parallax.sdk.cli.render import abandon_output

        abandon_output()
        code = READER_GONE
    sys.exit(code)
