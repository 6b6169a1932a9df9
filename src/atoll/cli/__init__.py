"""The command line: `atoll run`, `atoll demo` and the rest. Nothing heavy is imported before a command needs it."""

import sys

from atoll.cli.commands import app

__all__ = ["app", "main"]


def main() -> None:
    """Run the command that `sys.argv` names, and leave with its exit code."""
    try:
        app()
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        sys.exit(130)
