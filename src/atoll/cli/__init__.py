"""The command line: `atoll run`, `atoll demo` and the rest. Nothing heavy is imported before a command needs it."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command that `sys.argv` names, and leave with its exit code."""
    from atoll.cli.app import app

    try:
        app()
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        sys.exit(130)
