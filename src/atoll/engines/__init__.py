"""Engines execute cohorts: `loop` is the specification, `vectorized` the fast path on one device."""

from atoll.engines.base import Engine
from atoll.engines.loop import Loop
from atoll.engines.vectorized import Vectorized
from atoll.errors import unknown


def resolve(engine: "str | Engine") -> Engine:
    """The engine meant by `engine=`: "auto" and "vectorized" for the fast path, "loop" for the specification."""
    if isinstance(engine, Engine):
        return engine
    if engine in ("auto", "vectorized"):
        return Vectorized()
    if engine == "loop":
        return Loop()
    raise unknown("engine", engine, ("auto", "vectorized", "loop"))


__all__ = ["Engine", "Loop", "Vectorized", "resolve"]
