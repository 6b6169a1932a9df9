"""What every command shares: how errors and Ctrl-C end it, and where it prints."""

import functools
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atoll.errors import AtollError, Interrupted

if TYPE_CHECKING:
    from rich.console import Console

USER_ERROR, INTERRUPTED = 2, 130

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """End a command with one clear line instead of a traceback: code 2 for an error, 130 for Ctrl-C."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with _plain_warnings():
                command(*args, **kwargs)
        except AtollError as error:
            if kwargs.get("debug"):
                raise
            say(f"error: {error}", "bold red")
            raise typer.Exit(USER_ERROR) from None
        except Interrupted as error:
            say(str(error), "yellow")
            raise typer.Exit(INTERRUPTED) from None
        except KeyboardInterrupt:
            say("interrupted.", "yellow")
            raise typer.Exit(INTERRUPTED) from None

    return run


def console() -> "Console":
    """Where results go."""
    from rich.console import Console

    return Console(highlight=False)


def say(text: str, style: str = "") -> None:
    """A line on standard error, taken literally and never cut."""
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(text, style=style or None, markup=False)


@contextmanager
def _plain_warnings() -> Generator[None]:
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, UserWarning):
            say(f"warning: {message}", "yellow")
        else:
            shown(message, category, *rest, **more)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
