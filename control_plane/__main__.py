"""`python -m parallax.control_plane`: `parallax control-plane start` without the command line's libraries."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from parallax.control_plane.process import run
from parallax.security.errors import ParallaxError


def main() -> int:
    """Start the control plane; 0 after an orderly stop, 2 if the deployment is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m parallax.control_plane",
        description="Serve until SIGTERM or Ctrl-C, then finish what is held and stop. "
        "All else is set by PARALLAX_* variables or in the file.",
    )
    parser.add_argument("--config", type=Path, help="a parallax.toml; environment variables win over it")
    parser.add_argument("--listen", help="host:port to serve on (PARALLAX_LISTEN)")
    arguments = parser.parse_args()
    try:
        run(arguments.config, {"listen": arguments.listen} if arguments.listen else None)
    except ParallaxError as exc:
        sys.stderr.write(f"parallax: {exc}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
