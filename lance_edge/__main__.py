"""The `lance-edge` command, also as `python -m lance_edge`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line. An interrupt while it is still loading ends it in one line, too."""
    try:
        from lance_edge.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("lance-edge: interrupted\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
