"""Pictures of a federated dataset."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from atoll.data.dataset import FederatedDataset

_MOST_BARS = 40
_MOST_CLASSES = 20
_INK, _SOFT = "#22313a", "#d9e0e3"


def distribution(data: "FederatedDataset", path: str | Path | None) -> "Figure":
    """Draw label counts per client as stacked bars, or the histogram of sizes above forty clients.

    Args:
        data: the dataset.
        path: where to save the picture, or None.

    Returns:
        The figure.
    """
    import matplotlib
    from matplotlib.figure import Figure

    few = len(data) <= _MOST_BARS
    figure: Any = Figure(figsize=(8.0, 1.6 + 0.3 * len(data) if few else 4.2), layout="constrained")
    axes: Any = figure.subplots()
    if few:
        _bars(axes, data, matplotlib)
    else:
        sizes = data.train.sizes.numpy()
        axes.hist(sizes, bins=min(40, max(20, int(np.sqrt(len(sizes))))), color="#2a7f9e", edgecolor="white")
        axes.axvline(float(np.median(sizes)), color=_INK, linewidth=1.2, linestyle="--")
        axes.annotate(
            f"median {np.median(sizes):g}",
            (float(np.median(sizes)), 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(6, 0),
            textcoords="offset points",
            va="top",
            color=_INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )
        axes.margins(y=0.12)
        axes.set_xlabel("training examples of a client")
        axes.set_ylabel("clients")
    total = f"{len(data):,} clients, {len(data.train):,} training examples"
    axes.set_title(f"{data.name}: {total}" if data.name else total, loc="left", color=_INK, fontsize=11)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_SOFT)
    axes.tick_params(colors=_INK, length=0)
    axes.set_axisbelow(True)
    axes.grid(axis="x" if few else "y", color=_SOFT, linewidth=0.8)
    if path is not None:
        figure.savefig(Path(path), dpi=160)
    return figure


def _bars(axes: Any, data: "FederatedDataset", matplotlib: Any) -> None:
    places = np.arange(len(data))
    counted = data.class_counts()
    if counted is None or len(counted[0]) > _MOST_CLASSES:
        axes.barh(places, data.train.sizes.numpy(), color="#2a7f9e", height=0.72)
    else:
        names, counts = counted
        palette = matplotlib.colormaps["viridis"](np.linspace(0.12, 0.92, max(len(names), 2)))
        left = np.zeros(len(data))
        for column, label in enumerate(names):
            axes.barh(
                places, counts[:, column], left=left, color=palette[column], height=0.72, label=label, linewidth=0
            )
            left += counts[:, column]
        axes.legend(
            title="class", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, reverse=False, fontsize=9
        )
    axes.set_yticks(places, list(data.clients))
    axes.invert_yaxis()
    axes.set_xlabel("training examples")
