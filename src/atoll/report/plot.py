"""Pictures: how a run got on, runs side by side, and what each client got. Drawn without any global figure state."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.errors import InvalidArgument, invalid, unknown
from atoll.history import Record
from atoll.report.numbers import metric_names, words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Value = float | tuple[float, float, float]
"""A number, or a mean with the lower and upper end of its interval."""

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b0478c", "#c78500", "#4a93c7", "#7a5c3e", "#5b6670")
"""After Okabe and Ito (2008), darkened a little for lines; told apart with every common colour vision."""

MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p")
INK, SOFT, FAINT = "#22313a", "#66757e", "#dfe5e8"

POINTS = 400
"""A curve is thinned to about so many points; a screen shows no more."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture of a history.

    Attributes:
        title: what is shown.
        draw: draws it into matplotlib axes.
    """

    title: str
    draw: Callable[[Any], None]


# --- pictures ---------------------------------------------------------------------------------------------------------


def plot_history(history: Sequence[Record], path: str | Path | None = None, *, title: str = "") -> "Figure":
    """Draw a run: losses, each metric with its spread over clients, and bytes, over rounds.

    Args:
        history: one record per round.
        path: where to save the picture, by its suffix as .svg, .png or .pdf; None: nowhere.
        title: above the picture.

    Returns:
        The figure.

    Raises:
        InvalidArgument: an empty history, or a path with another suffix.
    """
    panels = history_panels(history)
    columns = min(len(panels), 3 if len(panels) != 4 else 2)
    lines = math.ceil(len(panels) / columns)
    figure = new_figure(4.7 * columns, 3.3 * lines + (0.4 if title else 0.0))
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(lines, columns, place + 1)
        panel.draw(axes)
        _title(axes, panel.title)
    if title:
        figure.suptitle(literal(title), x=0.012, ha="left", color=INK, fontsize=14, fontweight="bold")
    return _saved(figure, path)


def plot_comparison(
    named: Mapping[str, Sequence[Record]], metric: str, path: str | Path | None = None, *, title: str = ""
) -> "Figure":
    """Draw one metric of several runs over rounds.

    Args:
        named: histories by the name of the run.
        metric: a metric's name, taken from the clients' personal models where a run has them and from the global model
            elsewhere; or a column of `Record.flat`, such as "train_loss" or "test_accuracy_worst_decile".
        path: where to save the picture; None: nowhere.
        title: above the picture; default the metric's name.

    Returns:
        The figure.

    Raises:
        InvalidArgument: no run has such a metric; the message names those there are.
    """
    figure = new_figure(7.2, 4.2)
    axes = figure.add_subplot(1, 1, 1)
    draw_comparison(axes, named, metric)
    _title(axes, title or words(metric))
    return _saved(figure, path)


def plot_clients(
    table: Mapping[str, Mapping[str, Value]],
    path: str | Path | None = None,
    *,
    metric: str = "",
    title: str = "",
) -> "Figure":
    """Draw a value of every client under each of several arms, with intervals where they are given.

    Args:
        table: client -> arm -> a number or (mean, low, high); an arm that a client lacks is left out there.
        path: where to save the picture; None: nowhere.
        metric: what the values are.
        title: above the picture.

    Returns:
        The figure.

    Raises:
        InvalidArgument: an empty table.
    """
    return plot_client_panels({metric: table}, path, title=title)


def plot_client_panels(
    tables: Mapping[str, Mapping[str, Mapping[str, Value]]], path: str | Path | None = None, *, title: str = ""
) -> "Figure":
    """Draw `plot_clients` for several metrics side by side, with one legend."""
    if not tables or not all(tables.values()):
        raise invalid("table", tables, "a table with at least one client")
    clients = max(len(t) for t in tables.values())
    arms = max(len(v) for t in tables.values() for v in t.values())
    figure = new_figure(4.6 * len(tables) + 1.6, 1.5 + clients * max(0.5, 0.2 * arms) + (0.35 if title else 0.0))
    parts: dict[str, Any] = {}
    axes: Any = None
    for place, (metric, table) in enumerate(tables.items()):
        axes = figure.add_subplot(1, len(tables), place + 1, sharey=axes)
        parts |= draw_clients(axes, table, metric)
        if place:
            axes.tick_params(labelleft=False)
    if len(parts) > 1:
        figure.legend(
            list(parts.values()),
            [_clipped(arm, 40) for arm in parts],
            loc="outside lower center",
            ncols=min(len(parts), 4),
            frameon=False,
            labelcolor=INK,
            fontsize=10.5,
        )
    if title:
        figure.suptitle(literal(title), x=0.012, ha="left", color=INK, fontsize=13.5, fontweight="bold")
    return _saved(figure, path)


# --- what is drawn into axes ------------------------------------------------------------------------------------------


def history_panels(history: Sequence[Record]) -> list[Panel]:
    """The pictures a history gives: those for which it has numbers.

    Raises:
        InvalidArgument: the history is empty.
    """
    if not history:
        raise InvalidArgument("history is empty: there is no finished round to draw yet.")
    panels = [Panel("Loss", lambda axes: _losses(axes, history))]
    for name in metric_names(history):
        panels.append(Panel(_upper(words(name)), lambda axes, name=name: _metric(axes, history, name)))
    if any(r.bytes_up or r.bytes_down for r in history):
        panels.append(Panel("Bytes sent, all rounds so far", lambda axes: _bytes(axes, history)))
    if any(r.epsilon is not None for r in history):
        panels.append(Panel("Privacy spent (epsilon)", lambda axes: _epsilon(axes, history)))
    return panels


def draw_comparison(axes: Any, named: Mapping[str, Sequence[Record]], metric: str) -> None:
    """Draw one metric of several histories; see `plot_comparison`."""
    drawn, known = 0, dict[str, None]()
    for place, (name, history) in enumerate(named.items()):
        own = [_compared(r, metric) for r in history]
        for record in history:
            known |= dict.fromkeys([*metric_names([record]), "loss", *record.flat()])
        drawn += _line(axes, history, own, name, PALETTE[place % len(PALETTE)], dashed=place >= len(PALETTE))
    if not drawn:
        raise unknown("metric", metric, list(known))
    _rounds(axes)
    _legend(axes)


def draw_clients(axes: Any, table: Mapping[str, Mapping[str, Value]], metric: str) -> dict[str, Any]:
    """Draw a point for every client and arm; returns the legend's handle of each arm."""
    arms = list(dict.fromkeys(arm for values in table.values() for arm in values))
    step = min(0.24, 0.72 / max(len(arms), 1))
    handles: dict[str, Any] = {}
    for row, values in enumerate(table.values()):
        if row % 2 == 0:
            axes.axhspan(row - 0.5, row + 0.5, color=FAINT, alpha=0.35, linewidth=0, zorder=0)
        for place, arm in enumerate(arms):
            value = values.get(arm)
            if value is None:
                continue
            mean, low, high = value if isinstance(value, tuple) else (value, value, value)
            if not math.isfinite(mean):
                continue
            y, colour = row + (place - (len(arms) - 1) / 2) * step, PALETTE[place % len(PALETTE)]
            if math.isfinite(low) and math.isfinite(high) and high > low:
                axes.plot(
                    [low, high], [y, y], color=colour, linewidth=2.0, alpha=0.55, solid_capstyle="round", zorder=2
                )
            marker = MARKERS[place % len(MARKERS)]
            (handle,) = axes.plot(
                [mean], [y], marker=marker, color=colour, markersize=6.5, linestyle="none", markeredgecolor="white",
                markeredgewidth=0.8, zorder=3,
            )  # fmt: skip
            handles.setdefault(arm, handle)
    axes.set_yticks(range(len(table)), [_clipped(name) for name in table])
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.set_xlabel(literal(_upper(words(metric))))
    _frame(axes, grid="x")
    axes.spines["left"].set_visible(False)
    return {arm: handles[arm] for arm in arms if arm in handles}


def draw_histogram(axes: Any, table: Mapping[str, Mapping[str, float]], metric: str) -> None:
    """Draw how a value spreads over many clients, one outline for each arm."""
    arms = list(dict.fromkeys(arm for values in table.values() for arm in values))
    every = [v for values in table.values() for v in values.values() if math.isfinite(v)]
    if not every:
        return
    low, high = min(every), max(every)
    if low == high:
        low, high = low - 0.5, high + 0.5
    for place, arm in enumerate(arms):
        own = [values[arm] for values in table.values() if math.isfinite(values.get(arm, math.nan))]
        colour = PALETTE[place % len(PALETTE)]
        axes.hist(own, bins=30, range=(low, high), histtype="stepfilled", color=colour, alpha=0.18)
        axes.hist(own, bins=30, range=(low, high), histtype="step", color=colour, linewidth=1.6, label=_clipped(arm))
    axes.set_xlabel(literal(_upper(words(metric))))
    axes.set_ylabel("clients")
    _frame(axes, grid="y")
    _legend(axes)


def _losses(axes: Any, history: Sequence[Record]) -> None:
    _line(axes, history, [r.train.get("loss") for r in history], "training", PALETTE[0])
    _parts(axes, history, "loss")
    _rounds(axes)
    _legend(axes)


def _metric(axes: Any, history: Sequence[Record], name: str) -> None:
    own = any(name in r.personal_spread for r in history)
    spreads = [(r.personal_spread if own else r.spread).get(name, {}) for r in history]
    places = [i for i, s in enumerate(spreads) if math.isfinite(s.get("mean", math.nan)) and "worst_decile" in s]
    places = [i for i in places if math.isfinite(spreads[i]["worst_decile"])]
    if len(places) > 1:
        places = [places[i] for i in thinned([spreads[i]["worst_decile"] for i in places])]
        axes.fill_between(
            [history[i].round for i in places],
            [spreads[i]["worst_decile"] for i in places],
            [spreads[i]["mean"] for i in places],
            color=PALETTE[2 if own else 1], alpha=0.16, linewidth=0,
            label="clients: worst decile to mean",
        )  # fmt: skip
    if any(name in r.train for r in history):
        _line(axes, history, [r.train.get(name) for r in history], "training", PALETTE[0])
    _parts(axes, history, name)
    _rounds(axes)
    _legend(axes)


def _parts(axes: Any, history: Sequence[Record], name: str) -> None:
    own = any(r.personal for r in history)
    labels = {"test": "test, global model" if own else "test", "personal": "test, personal models"}
    for place, part in enumerate(("test", "personal", "validation", "holdout"), start=1):
        values = [getattr(r, part).get(name) for r in history]
        _line(axes, history, values, labels.get(part, part), PALETTE[place])


def _bytes(axes: Any, history: Sequence[Record]) -> None:
    up, down, total_up, total_down = list[float](), list[float](), 0, 0
    for record in history:
        total_up, total_down = total_up + record.bytes_up, total_down + record.bytes_down
        up.append(total_up)
        down.append(total_down)
    most, unit, divisor = max(total_up, total_down), "B", 1.0
    for name in ("kB", "MB", "GB", "TB"):
        if most / divisor >= 1000:
            unit, divisor = name, divisor * 1000
    _line(axes, history, [v / divisor for v in up], "clients to server", PALETTE[0])
    _line(axes, history, [v / divisor for v in down], "server to clients", PALETTE[1], dashed=True)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(unit)
    _rounds(axes)
    _legend(axes)


def _epsilon(axes: Any, history: Sequence[Record]) -> None:
    _line(axes, history, [r.epsilon for r in history], "epsilon", PALETTE[3])
    axes.set_ylim(bottom=0)
    _rounds(axes)


def _line(
    axes: Any,
    history: Sequence[Record],
    values: Sequence[float | None],
    label: str,
    colour: str,
    *,
    dashed: bool = False,
) -> bool:
    """Draw a curve through the rounds that have a value; returns whether there is one."""
    points = [(r.round, v) for r, v in zip(history, values, strict=True) if v is not None and math.isfinite(v)]
    if not points:
        return False
    keep = thinned([v for _, v in points])
    marker = "o" if len(points) <= 12 else None
    axes.plot(
        [points[i][0] for i in keep],
        [points[i][1] for i in keep],
        label=_clipped(label, 40),
        color=colour,
        linewidth=1.8,
        marker=marker,
        markersize=4,
        linestyle="--" if dashed else "-",
        solid_joinstyle="round",
    )
    return True


def thinned(values: Sequence[float], points: int = POINTS) -> list[int]:
    """Places of the values to draw: all of a short curve, of a long one each stretch's lowest and highest.

    Args:
        values: of the curve, in order.
        points: about how many to keep.
    """
    if len(values) <= points:
        return list(range(len(values)))
    stretches, keep = points // 2, {0, len(values) - 1}
    for stretch in range(stretches):
        inside = range(stretch * len(values) // stretches, (stretch + 1) * len(values) // stretches)
        keep |= {min(inside, key=values.__getitem__), max(inside, key=values.__getitem__)}
    return sorted(keep)


def _compared(record: Record, metric: str) -> float | None:
    for part in (record.personal, record.test, record.holdout, record.validation):
        if metric in part:
            return part[metric]
    return record.flat().get(metric)


# --- looks ------------------------------------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Any:
    """An empty figure that belongs to no window; width and height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _saved(figure: Any, path: str | Path | None) -> Any:
    if path is not None:
        file = Path(path)
        if file.suffix.lower() not in (".svg", ".png", ".pdf"):
            raise invalid("path", str(path), "the name of a .svg, .png or .pdf file")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=160, facecolor="white")
    return figure


def _frame(axes: Any, *, grid: str) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(colors=INK, length=0, labelsize=10)
    axes.xaxis.label.set(color=SOFT, fontsize=10)
    axes.yaxis.label.set(color=SOFT, fontsize=10)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=FAINT, linewidth=0.8)


def _rounds(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.set_xlabel("round")
    axes.margins(x=0.02)
    _frame(axes, grid="y")


def _legend(axes: Any) -> None:
    handles, _ = axes.get_legend_handles_labels()
    if len(handles) > 1:
        axes.legend(frameon=False, fontsize=9.5, labelcolor=INK, handlelength=1.6)


def _title(axes: Any, text: str) -> None:
    axes.set_title(literal(text), loc="left", color=INK, fontsize=11.5, fontweight="bold", pad=8)


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _clipped(name: str, most: int = 28) -> str:
    return literal(name if len(name) <= most else name[: most - 1] + "…")


def literal(text: str) -> str:
    """Text that is drawn as it stands: a dollar sign would start a formula."""
    return text.replace("$", r"\$")
