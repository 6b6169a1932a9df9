"""Engines execute cohorts.

`loop` is the specification, `vectorized` the fast path on one device, `workers` spreads tiles over processes, `ray`
over the actors of a cluster.
"""

from typing import Literal

from atoll.engines.base import Engine
from atoll.engines.loop import Loop
from atoll.engines.placing import CPU, resolve_device
from atoll.engines.ray import Ray
from atoll.engines.spread import Spread
from atoll.engines.vectorized import Vectorized
from atoll.engines.workers import Workers
from atoll.errors import invalid, unknown


def resolve(engine: "str | Engine", workers: int | Literal["auto"] = "auto", device: str = "auto") -> Engine:
    """The engine meant by `engine=`, `workers=` and `device=`.

    Args:
        engine: "auto" and "vectorized" for the fast path, "ray" for the fast path on a cluster, "loop" for the
            specification, or an engine.
        workers: processes that share the work; the loop is one process unless a number is given.
        device: where clients train; another than the CPU is for the fast path in one process.
    """
    where = resolve_device(device)
    if device != "auto" and isinstance(engine, Engine):
        raise invalid("device", device, "left out with an engine", f"Build it there: Vectorized(device={device!r}).")
    if where != CPU:
        if engine not in ("auto", "vectorized"):
            raise invalid(
                "device", device, f'"cpu" with engine={engine!r}', 'Other devices are for engine="vectorized".'
            )
        if workers not in ("auto", 1):
            raise invalid("workers", workers, f'1 or "auto" with device={device!r}', "One process feeds the device.")
        return Vectorized(device=where)
    if isinstance(engine, Spread):
        if workers != "auto":
            raise invalid("workers", workers, "left out with an engine that has workers of its own")
        return engine
    if isinstance(engine, Engine):
        return engine if workers == "auto" else Workers(engine, workers)
    if engine in ("auto", "vectorized"):
        return Workers(Vectorized(), workers)
    if engine == "ray":
        return Ray(Vectorized(), workers)
    if engine == "loop":
        return Loop() if workers == "auto" else Workers(Loop(), workers)
    raise unknown("engine", engine, ("auto", "vectorized", "ray", "loop"))


def own_engine(engine: Engine) -> Engine:
    """An engine of the same kind for work that one process does by itself beside the rounds."""
    return (engine.inner if isinstance(engine, Spread) else engine).fresh()


__all__ = ["Engine", "Loop", "Ray", "Vectorized", "Workers", "own_engine", "resolve"]
