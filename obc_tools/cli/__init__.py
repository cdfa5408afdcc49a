"""The command line. Ctrl-C leaves one line whenever it comes, also while the commands themselves are loaded."""

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command, as `commands.main` does."""
    try:
        from .commands import main as run

        run(arguments)
    except KeyboardInterrupt:
        print("\nobc: stopped", file=sys.stderr)
        sys.exit(130)
