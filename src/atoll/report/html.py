"""Self-contained HTML pages: a run, a comparison of runs, a study. No scripts, nothing fetched from elsewhere."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.errors import InvalidArgument
from atoll.history import Record
from atoll.privacy import explain
from atoll.report import numbers, plot
from atoll.report.numbers import UNDEFINED, amount, signed, size, span, words
from atoll.report.runs import Run, read_run, run_of
from atoll.report.svg import themed

if TYPE_CHECKING:
    from atoll.result import Result
    from atoll.study import Study

LISTED = 200
"""Clients listed in full; of more, the weakest and the strongest are."""

_FEW = 30
_NO_PRIVACY = "No differential privacy was used."


@dataclass(frozen=True, slots=True)
class Tile:
    """A headline: what, its value, and a word on it."""

    name: str
    value: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture with its title; `svg` is markup."""

    title: str
    svg: Any


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table of text; the first column names the row."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


# --- a run ------------------------------------------------------------------------------------------------------------


def write_report(result: "Result", path: str | Path) -> Path:
    """Write a page about a result.

    Args:
        result: of a run; a loaded one without a model will do.
        path: of the .html file.

    Returns:
        The path.

    Raises:
        InvalidArgument: the result has no finished round.
    """
    return _write_run(run_of(result), Path(path))


def report_run(directory: str | Path, path: str | Path) -> Path:
    """Write a page about a run directory, finished or not.

    Args:
        directory: of the run.
        path: of the .html file.

    Returns:
        The path.

    Raises:
        RunError: the directory holds no run.
        InvalidArgument: the run has no finished round yet.
    """
    return _write_run(read_run(directory), Path(path))


def _write_run(run: Run, path: Path) -> Path:
    if not run.history:
        raise InvalidArgument(f"{run.name or 'the run'} has no finished round yet: there is nothing to report.")
    pictures = [Picture(p.title, _panel(p)) for p in plot.history_panels(run.history)]
    everyone = _client_pictures(run.clients)
    page = {
        "title": run.name or "A run",
        "state": run.state,
        "error": run.error,
        "facts": _facts(run),
        "tiles": _tiles(run.history),
        "pictures": pictures,
        "client_pictures": everyone,
        "clients": _client_sheet(run.clients),
        "spread": _spread_sheet(run.history),
        "refused": refused_sheet(run.history),
        "seconds": _seconds_sheet(run.history),
        "privacy": [explain(s) for s in run.privacy] or [_NO_PRIVACY],
        "notes": _notes(run),
        "spec": json.dumps(run.spec, indent=2, ensure_ascii=False, sort_keys=False),
    }
    return _write("run.html", page, path)


def _facts(run: Run) -> list[tuple[str, str]]:
    experiment: Mapping[str, Any] = run.spec.get("experiment", {})
    last = run.history[-1]
    facts = [("Algorithm", call(experiment.get("algorithm")))]
    transforms = [call(t) for t in experiment.get("transforms", ())]
    if transforms:
        facts.append(("Transforms", ", then ".join(transforms)))
    if experiment.get("downlink"):
        facts.append(("Downlink", ", then ".join(call(t) for t in experiment["downlink"]["stages"])))
    for name, key, usual in (("Channel", "channel", "plain"), ("Aggregator", "aggregator", "")):
        text = call(experiment.get(key))
        if text and text != usual:
            facts.append((name, text))
    model = experiment.get("model")
    if isinstance(model, Mapping):
        count = sum(math.prod(p[1]) for p in model.get("parameters", ()))
        module = str(model.get("module", "")).split("\n")[0].split("(")[0]
        facts.append(("Model", f"{module or 'module'}, {count:,} trainable parameters"))
    clients = next((len(c) for c in run.clients.values()), 0)
    facts.append(("Clients", f"{clients:,}" if clients else f"{max(r.clients for r in run.history):,} in a round"))
    facts.append(("Cohort", call(experiment.get("cohort")) or UNDEFINED))
    facts.append(("Rounds", f"{last.round:,}"))
    if run.engine:
        reason = run.engine.get("reason")
        path = ", ".join(str(run.engine[k]) for k in ("engine", "strategy") if run.engine.get(k))
        facts.append(("Engine", f"{path}: {reason}" if reason else path))
    facts.append(("Seed", str(experiment.get("seed", UNDEFINED))))
    if run.versions:
        facts.append(("Versions", ", ".join(f"{k} {v}" for k, v in run.versions.items())))
    if run.began is not None:
        facts.append(("Began", moment(run.began)))
    return facts


def call(spec: Any) -> str:
    """A part's spec as the call that makes it, with what is left at nothing left out: `fedavg(local_sgd(lr=0.1))`."""
    if not isinstance(spec, Mapping):
        return "" if spec is None else str(spec)
    shown: list[str] = []
    for name, value in spec.items():
        if name == "name" or value is None or value in ((), [], {}, ""):
            continue
        if isinstance(value, Mapping):
            if "name" not in value:
                continue
            if name == "server" and value.get("name") == "sgd" and value.get("lr") == 1.0 and not value.get("momentum"):
                continue
            text = call(value)
            shown.append(text if name == "plan" else f"{name}={text}")
        elif name in _USUAL and _USUAL[name] == value:
            continue
        else:
            shown.append(f"{name}={value}")
    return f"{spec.get('name', 'object')}({', '.join(shown)})" if shown else str(spec.get("name", "object"))


_USUAL: Mapping[str, object] = {
    "shuffle": True,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "betas": [0.9, 0.999],
    "eps": 1e-08,
    "optimizer": "sgd",
    "denominator": "realised",
    "cap": 1e7,
}
"""Arguments at their defaults say nothing in a headline; the spec has them all."""


def _tiles(history: Sequence[Record]) -> list[Tile]:
    tiles: list[Tile] = []
    record = numbers.last_evaluated(history)
    if record is not None:
        for part, label in (
            ("personal", "test, clients' own models"), ("test", "test, global model"),
            ("holdout", "holdout"), ("validation", "validation"),
        ):  # fmt: skip
            values: dict[str, float] = getattr(record, part)
            if part == "validation" and tiles:
                continue
            for name, value in values.items():
                if name != "loss" or len(values) == 1:
                    tiles.append(Tile(_upper(words(name)), amount(value), label))
    tiles.append(Tile("Training loss", amount(history[-1].loss), f"round {history[-1].round:,}"))
    up, down = sum(r.bytes_up for r in history), sum(r.bytes_down for r in history)
    tiles.append(Tile("Sent by clients", size(up), f"received: {size(down)}"))
    total = sum(sum(r.seconds.values()) for r in history)
    tiles.append(Tile("Time in rounds", span(total), f"{span(total / len(history))} a round"))
    if history[-1].epsilon is not None:
        tiles.append(Tile("Epsilon", amount(history[-1].epsilon), "privacy spent"))
    return tiles


def _spread_sheet(history: Sequence[Record]) -> Sheet | None:
    record = next((r for r in reversed(history) if r.spread or r.personal_spread), None)
    if record is None:
        return None
    rows: list[tuple[str, ...]] = []
    own = bool(record.personal_spread)
    parts = [("global model", record.test, record.spread), ("own models", record.personal, record.personal_spread)]
    for label, pooled, spread in parts:
        for name, over in spread.items():
            row = f"{_upper(words(name))}, {label}" if own else _upper(words(name))
            values = [pooled.get(name), *(over.get(k) for k in ("mean", "worst_decile", "std"))]
            undefined = int(over.get("undefined", 0) or 0)
            rows.append((row, *(amount(v) for v in values), f"{undefined:,}" if undefined else "0"))
    columns = ("", "all examples", "mean over clients", "worst decile", "standard deviation", "undefined at")
    return Sheet(columns, tuple(rows), f"On the clients' test examples after round {record.round:,}.")


def refused_sheet(history: Sequence[Record]) -> Sheet | None:
    """Clients whose updates had no part in a round, the most often refused first; None where there are none.

    Args:
        history: records of the run.
    """
    told: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for record in history:
        for client, why in record.refused.items():
            told.setdefault(client, []).append((record.round, why))
    if not told:
        return None
    names = sorted(told, key=lambda client: (-len(told[client]), client))
    rows: list[tuple[str, ...]] = []
    for client in names[:LISTED]:
        last, why = told[client][-1]
        numbers = (amount(why.get("norm")), amount(why.get("distance")))
        rows.append((client, f"{len(told[client]):,}", f"{last:,}", *numbers, str(why.get("reason", ""))))
    note = "Updates that had no part in a round. Norm and distance from the round's result are those of the last time."
    if len(names) > LISTED:
        note += f" Of {len(names):,} clients, the {LISTED} that were refused most often are listed."
    untold = sum(max(record.refusals - len(record.refused), 0) for record in history)
    if untold:
        note += f" And {untold:,} more refusals, in rounds with more of them than are named."
    return Sheet(("client", "rounds", "last", "norm", "distance", "reason"), tuple(rows), note)


def _seconds_sheet(history: Sequence[Record]) -> Sheet:
    phases = dict.fromkeys(phase for r in history for phase in r.seconds)
    rows: list[tuple[str, ...]] = []
    for phase in phases:
        spent = sorted(r.seconds[phase] for r in history if phase in r.seconds)
        rows.append((phase, span(sum(spent)), span(spent[len(spent) // 2]), span(spent[-1])))
    return Sheet(("phase", "in all", "median round", "longest round"), tuple(rows))


def _client_sheet(clients: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Sheet | None:
    if not clients:
        return None
    kinds = list(clients)
    metrics = list(dict.fromkeys(m for of in clients.values() for values in of.values() for m in values))
    metrics = [m for m in metrics if m != "loss"] + [m for m in metrics if m == "loss"]
    columns = [(kind, m) for kind in kinds for m in metrics]
    heads = tuple(f"{words(m)}, {_KINDS.get(k, k)}" if len(kinds) > 1 else words(m) for k, m in columns)
    names = list(clients[kinds[0]])
    note = ""
    if len(names) > LISTED:
        first = clients[kinds[-1]]
        worth = {n: first.get(n, {}).get(metrics[0], math.nan) for n in names}
        ordered = sorted((n for n in names if math.isfinite(worth[n])), key=worth.__getitem__)
        names = [*ordered[: LISTED // 2], *ordered[-(LISTED // 2) :]]
        note = (
            f"Of {len(first):,} clients, the {LISTED // 2} with the lowest and the {LISTED // 2} with the highest "
            f"{words(metrics[0])} are listed."
        )
    rows = tuple((n, *(amount(clients[k].get(n, {}).get(m)) for k, m in columns)) for n in names)
    return Sheet(("client", *heads), rows, note)


_KINDS: Mapping[str, str] = {"global": "global model", "personal": "own model"}


def _client_pictures(clients: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[Picture]:
    if not clients:
        return []
    names = list(next(iter(clients.values())))
    metrics = list(dict.fromkeys(m for of in clients.values() for values in of.values() for m in values if m != "loss"))
    pictures: list[Picture] = []
    for metric in metrics:
        table = {
            n: {
                _KINDS.get(k, k): of[n][metric]
                for k, of in clients.items()
                if math.isfinite(of.get(n, {}).get(metric, math.nan))
            }
            for n in names
        }
        if len(names) <= _FEW:
            picture = _clients(table, metric)
        else:
            picture = _histogram(table, metric)
        pictures.append(Picture(_upper(words(metric)), picture))
    return pictures


def _notes(run: Run) -> list[str]:
    notes = dict.fromkeys(run.notes)
    latest = [r for r in run.history if r.notes]
    if latest:
        notes |= dict.fromkeys(f"Round {latest[-1].round:,}: {note}" for note in latest[-1].notes)
    return list(notes)


# --- several runs -----------------------------------------------------------------------------------------------------


def write_comparison(runs: Mapping[str, Run], differences: Mapping[str, Sequence[str]], path: str | Path) -> Path:
    """Write a page that puts runs side by side.

    Args:
        runs: by name, in order.
        differences: by name of a run, where its spec differs from the first one's.
        path: of the .html file.

    Returns:
        The path.
    """
    histories = {name: run.history for name, run in runs.items() if run.history}
    if not histories:
        raise InvalidArgument("none of the runs has a finished round yet: there is nothing to compare.")
    metrics = list(dict.fromkeys(m for h in histories.values() for m in numbers.metric_names(h)))
    pictures: list[Picture] = []
    for metric in [*metrics, "train_loss"]:
        figure = plot.new_figure(5.2, 3.4)
        plot.draw_comparison(figure.add_subplot(1, 1, 1), histories, metric)
        title = "Training loss" if metric == "train_loss" else _upper(words(metric))
        pictures.append(Picture(title, _markup(figure, f"{title} of {len(histories)} runs over rounds")))
    page = {
        "title": f"{len(runs)} runs compared",
        "pictures": pictures,
        "sheet": comparison_sheet(runs),
        "differences": {name: list(lines) for name, lines in differences.items()},
        "first": next(iter(runs)),
    }
    return _write("comparison.html", page, Path(path))


def comparison_sheet(runs: Mapping[str, Run]) -> Sheet:
    """The final metrics of runs, one column each."""
    finals = {name: _final(run.history) for name, run in runs.items()}
    rows: list[tuple[str, ...]] = [
        ("state", *(run.state for run in runs.values())),
        ("rounds", *(f"{run.history[-1].round:,}" if run.history else "0" for run in runs.values())),
    ]
    for name in dict.fromkeys(n for final in finals.values() for n in final):
        rows.append((name, *(amount(final.get(name)) for final in finals.values())))
    for label, unit in (("bytes up", "bytes_up"), ("bytes down", "bytes_down")):
        rows.append((label, *(size(sum(getattr(r, unit) for r in run.history)) for run in runs.values())))
    rows.append(("time", *(span(sum(sum(r.seconds.values()) for r in run.history)) for run in runs.values())))
    return Sheet(("", *runs), tuple(rows))


def _final(history: Sequence[Record]) -> dict[str, float]:
    if not history:
        return {}
    found = {"training loss": history[-1].loss}
    record = numbers.last_evaluated(history)
    if record is None:
        return found
    for part, label in (
        ("test", "test"),
        ("personal", "own models"),
        ("validation", "validation"),
        ("holdout", "holdout"),
    ):
        found |= {f"{label} {words(n)}": v for n, v in getattr(record, part).items()}
    for label, spread in (("test", record.spread), ("own models", record.personal_spread)):
        found |= {
            f"{label} {words(n)}, worst decile": over["worst_decile"]
            for n, over in spread.items()
            if "worst_decile" in over
        }
    if history[-1].epsilon is not None:
        found["epsilon"] = history[-1].epsilon
    return found


# --- a study ----------------------------------------------------------------------------------------------------------


def write_study(
    study: "Study",
    path: str | Path,
    *,
    title: str,
    arm: str,
    baseline: str,
    introduction: Sequence[str] = (),
    cautions: Sequence[str] = (),
) -> Path:
    """Write a page about a study: each client under each arm, and what one arm brought over another.

    Args:
        study: from `atoll.study.study`.
        path: of the .html file.
        title: of the page.
        arm: whose gain is told in words.
        baseline: over which other arm.
        introduction: paragraphs before the results.
        cautions: what a reader should keep in mind, one paragraph each.

    Returns:
        The path.
    """
    pictures: list[Picture] = []
    tables: list[tuple[str, Sheet]] = []
    for metric in study.metrics:
        if metric == "loss":
            continue
        table = study.table(metric)
        pictures.append(Picture(_upper(words(metric)), _clients(table, metric)))
        rows: list[tuple[str, ...]] = []
        for client, values in table.items():
            change = study.difference(arm, baseline, metric, client)
            rows.append((client, *(interval(v) for v in values.values()), interval(change, sign=True)))
        average = {a: study.interval(a, metric) for a in study.arms}
        change = study.difference(arm, baseline, metric)
        rows.append(("mean over clients", *(interval(v) for v in average.values()), interval(change, sign=True)))
        tables.append((_upper(words(metric)), Sheet(("client", *study.arms, f"{arm} − {baseline}"), tuple(rows))))
    page = {
        "title": title,
        "introduction": list(introduction),
        "verdicts": study.verdicts(arm, baseline),
        "pictures": pictures,
        "tables": tables,
        "cautions": [*study.cautions(), *cautions],
        "facts": [
            ("Arms", ", ".join(study.arms)),
            ("Seeds", ", ".join(map(str, study.seeds))),
            ("Intervals", f"{study.confidence:.0%}"),
        ],
        "specs": {a: json.dumps(s, indent=2, ensure_ascii=False) for a, s in study.specs.items()},
    }
    return _write("study.html", page, Path(path))


def interval(value: tuple[float, float, float], *, sign: bool = False) -> str:
    """A mean with half the width of its symmetric interval: `0.812 ± 0.021`."""
    mean, low, high = value
    show = signed if sign else amount
    if not math.isfinite(mean):
        return UNDEFINED
    if not math.isfinite(low):
        return show(mean)
    return f"{show(mean)} ± {amount((high - low) / 2)}"


# --- pictures ---------------------------------------------------------------------------------------------------------


def _panel(panel: plot.Panel) -> Any:
    figure = plot.new_figure(5.2, 3.4)
    panel.draw(figure.add_subplot(1, 1, 1))
    return _markup(figure, f"{panel.title} over rounds")


def _clients(table: Mapping[str, Mapping[str, plot.Value]], metric: str) -> Any:
    arms = list(dict.fromkeys(arm for values in table.values() for arm in values))
    figure = plot.new_figure(5.2, 1.1 + len(table) * max(0.34, 0.22 * len(arms)))
    handles = plot.draw_clients(figure.add_subplot(1, 1, 1), table, metric)
    if len(handles) > 1:
        figure.legend(
            list(handles.values()), [plot.literal(h) for h in handles], loc="outside lower center",
            ncols=min(3, len(handles)), frameon=False, labelcolor=plot.INK, fontsize=9.5,
        )  # fmt: skip
    return _markup(figure, f"{words(metric)} of each client")


def _histogram(table: Mapping[str, Mapping[str, float]], metric: str) -> Any:
    figure = plot.new_figure(5.2, 3.0)
    axes = figure.add_subplot(1, 1, 1)
    plot.draw_histogram(axes, table, metric)
    return _markup(figure, f"{words(metric)} over clients")


def _markup(figure: Any, label: str) -> Any:
    from markupsafe import Markup

    return Markup(themed(figure, label))


# --- the file ---------------------------------------------------------------------------------------------------------


def _write(template: str, page: Mapping[str, Any], path: Path) -> Path:
    import atoll

    text = _environment().get_template(template).render(**page, version=atoll.__version__, written=moment(time.time()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("atoll.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def moment(seconds: float) -> str:
    """A time as `2026-11-22 21:05 UTC`."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
