"""The command line. Ctrl-C leaves one line whenever it comes, also while the commands themselves are loaded."""

import os
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command, as `commands.main` does; end without a word when who reads along has gone: `obc runs | head`."""
    try:
        from .commands import main as run

        try:
            run(arguments)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nobc: stopped", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # of printing: commands tell all others
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"obc: error: nothing can be printed ({error.strerror})", file=sys.stderr)
        sys.exit(2)
