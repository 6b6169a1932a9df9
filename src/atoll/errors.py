"""Errors users meet: each says what was wrong, what is allowed, and the way out."""

from typing import Any


class AtollError(Exception):
    """Base of every error Atoll raises on purpose."""


class InvalidArgument(AtollError, ValueError):
    """An argument was refused before any work started."""


class DataError(AtollError, ValueError):
    """A client's data cannot be used as asked."""


class CompositionError(AtollError, ValueError):
    """Two parts of an experiment do not fit together."""


class RunError(AtollError, RuntimeError):
    """A run directory, journal or checkpoint cannot be used as asked."""


class NonFiniteError(AtollError, ArithmeticError):
    """Training produced a NaN or an infinity; `result` holds the run up to the last finite state."""

    result: Any = None


class BudgetSpent(AtollError, RuntimeError):
    """The next release would exceed a privacy budget; it was not made."""


class Interrupted(KeyboardInterrupt):
    """A run was stopped by Ctrl-C after a whole round; `result` holds it so far."""

    result: Any = None


def invalid(argument: str, value: object, allowed: str, remedy: str = "") -> InvalidArgument:
    """Build the error for a refused argument: its name, its value, what is allowed and the remedy."""
    text = f"{argument}={_short(value)} is not allowed: {argument} must be {allowed}."
    return InvalidArgument(f"{text} {remedy}".rstrip())


def unknown(argument: str, value: object, names: "list[str] | tuple[str, ...]", remedy: str = "") -> InvalidArgument:
    """Build the error for a name that is not in a registry, with the closest known name."""
    import difflib

    close = difflib.get_close_matches(str(value), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    text = f"{argument}={_short(value)} is unknown. Known: {', '.join(sorted(names))}.{hint}"
    return InvalidArgument(f"{text} {remedy}".rstrip())


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
