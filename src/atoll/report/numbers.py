"""Numbers as people read them, and which of a record's numbers is the one to look at first."""

import math
from collections.abc import Iterable, Sequence

from atoll.history import Record

UNDEFINED = "–"
"""Shown for a value that does not exist or is not a number."""

_BYTES = ("B", "kB", "MB", "GB", "TB", "PB")


def amount(value: float | None, digits: int = 3) -> str:
    """A metric, with `digits` decimals between 0.001 and 1000, else in scientific notation."""
    if value is None or not math.isfinite(value):
        return UNDEFINED
    if value == 0 or 10**-digits <= abs(value) < 1000:
        return f"{value:.{digits}f}"
    return f"{value:.{max(digits - 1, 1)}e}"


def signed(value: float | None, digits: int = 3) -> str:
    """A difference with its sign."""
    if value is None or not math.isfinite(value):
        return UNDEFINED
    return f"{value:+.{digits}f}".replace("-", "−")


def span(seconds: float | None) -> str:
    """A duration: `0.32 s`, `12 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds is None or not math.isfinite(seconds):
        return UNDEFINED
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 0.1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 9.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """A number of bytes in decimal units: `1.2 MB`."""
    place = 0
    while abs(count) >= 999.5 and place < len(_BYTES) - 1:
        count, place = count / 1000, place + 1
    return f"{count:.0f} B" if place == 0 else f"{count:.3g} {_BYTES[place]}"


def rate(per_second: float) -> str:
    """Rounds in a second, or seconds for a round where that reads better."""
    if not math.isfinite(per_second) or per_second <= 0:
        return UNDEFINED
    if per_second < 0.5:
        return f"{span(1 / per_second)}/round"
    return f"{per_second:.0f} rounds/s" if per_second >= 100 else f"{per_second:.1f} rounds/s"


def words(name: str) -> str:
    """A metric's name in running text: `average precision`, `AUC`."""
    return {"auc": "AUC", "r2": "R²", "mse": "MSE", "mae": "MAE", "rmse": "RMSE"}.get(name, name.replace("_", " "))


def headline(record: Record) -> tuple[str, str, float] | None:
    """Which metric says most about a round.

    Args:
        record: of the round.

    Returns:
        Part of the record ("personal", "test", "holdout" or "validation"), metric and value: the model's first metric
        where it has one, else the loss; of the clients' own models where they have them. None when the round was not
        evaluated.
    """
    for part in ("personal", "test", "holdout", "validation"):
        values: dict[str, float] = getattr(record, part)
        if values:
            name = next((n for n in values if n != "loss"), "loss")
            return part, name, values[name]
    return None


def last_evaluated(history: Sequence[Record]) -> Record | None:
    """The newest record that has metrics of an evaluation."""
    return next((r for r in reversed(history) if headline(r) is not None), None)


def metric_names(records: Iterable[Record]) -> list[str]:
    """Names of all metrics that were evaluated, loss left out, in the order in which they first occur."""
    found: dict[str, None] = {}
    for record in records:
        for part in (record.test, record.personal, record.holdout, record.validation):
            found |= dict.fromkeys(part)
    return [name for name in found if name != "loss"]
