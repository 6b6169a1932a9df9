"""Rules and attacks against an independent library, where it is installed: ByzFL 0.0.11.

`pip install --no-deps byzfl==0.0.11` in an environment of its own. What the package imports for training and plots of
its own is not needed: only its rules and attacks are loaded.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Generator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from atoll import aggregators, attacks
from atoll.aggregators import Aggregator
from atoll.attacks import Attack, apply, chosen

if importlib.util.find_spec("byzfl") is None:
    pytest.skip("byzfl is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def byzfl() -> Generator[Any]:
    """Its rules and attacks, under a package that imports nothing else."""
    found = importlib.util.find_spec("byzfl")
    assert found is not None and found.submodule_search_locations is not None
    package = ModuleType("byzfl")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["byzfl"] = package
    try:
        for part in ("aggregators", "attacks"):
            for name, value in vars(importlib.import_module(f"byzfl.{part}")).items():
                if not name.startswith("_"):
                    setattr(package, name, value)
        yield package
    finally:
        for name in [n for n in sys.modules if n == "byzfl" or n.startswith("byzfl.")]:
            del sys.modules[name]


def drawn(seed: int, count: int, length: int) -> np.ndarray:
    """Rows of which two stand far out."""
    rows = np.random.default_rng(seed).normal(size=(count, length))
    rows[:2] *= 7.0
    return rows


RULES: dict[str, tuple[Callable[[int], Aggregator], Callable[[Any, int, int], Callable[[np.ndarray], np.ndarray]]]] = {
    "mean": (lambda f: aggregators.mean(), lambda b, n, f: b.Average()),
    "median": (lambda f: aggregators.median(), lambda b, n, f: b.Median()),
    "trimmed mean": (lambda f: aggregators.trimmed_mean(drop=f), lambda b, n, f: b.TrMean(f=f)),
    "meamed": (lambda f: aggregators.meamed(byzantine=f), lambda b, n, f: b.Meamed(f=f)),
    # ByzFL takes n - f - 1 neighbours where the paper takes n - f - 2: told of one more, it takes as many.
    "krum": (lambda f: aggregators.krum(byzantine=f), lambda b, n, f: b.Krum(f=f + 1)),
    "mda": (lambda f: aggregators.mda(byzantine=f), lambda b, n, f: b.MDA(f=f)),
    # Three steps are its default; it is let run until it stands still.
    "geometric median": (
        lambda f: aggregators.geometric_median(),
        lambda b, n, f: b.GeometricMedian(nu=1e-9, T=5000),
    ),
    "centred clipping": (
        lambda f: aggregators.centered_clipping(radius=1.5, iterations=3),
        lambda b, n, f: b.CenteredClipping(L=3, tau=1.5),
    ),
    "norm bound": (
        lambda f: aggregators.norm_bound(2.0),
        lambda b, n, f: lambda rows: b.Clipping(c=2.0)(rows.copy()).mean(axis=0),
    ),
    "nnm, trimmed mean": (
        lambda f: aggregators.nnm(byzantine=f, then=aggregators.trimmed_mean(drop=f)),
        lambda b, n, f: lambda rows: b.TrMean(f=f)(b.NNM(f=f)(rows)),
    ),
    "nnm, krum": (
        lambda f: aggregators.nnm(byzantine=f, then=aggregators.krum(byzantine=f)),
        lambda b, n, f: lambda rows: b.Krum(f=f + 1)(b.NNM(f=f)(rows)),
    ),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("count", "f"), [(9, 2), (12, 3), (13, 1)])
@pytest.mark.parametrize("seed", range(4))
def test_rules_agree(byzfl: Any, name: str, count: int, f: int, seed: int) -> None:
    own, other = RULES[name]
    if name == "mda" and f > 2:
        pytest.skip("once both rows that stand out are gone, several subsets have the least diameter")
    rows = drawn(seed, count, 17)
    expected = other(byzfl, count, f)(rows.copy())
    found = own(f)(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6 if name == "geometric median" else 1e-11, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_multi_krum_keeps_the_same_rows(byzfl: Any, seed: int) -> None:
    rows = drawn(seed, 11, 5)
    own = aggregators.multi_krum(byzantine=2, keep=8)(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(own, byzfl.MultiKrum(f=3)(rows), rtol=1e-11)


def test_whole_buckets_are_means(byzfl: Any) -> None:
    rows = drawn(0, 9, 5)
    own = aggregators.bucketing(size=9, then=aggregators.median())(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(own, byzfl.Bucketing(s=9)(rows)[0], rtol=1e-11)


def test_attacks_agree(byzfl: Any) -> None:
    rows = torch.from_numpy(drawn(5, 10, 6))
    bad = torch.tensor([str(i) in chosen([str(i) for i in range(10)], 0.3) for i in range(10)])
    honest = rows[~bad].numpy()

    def sent(attack: Attack) -> np.ndarray:
        return apply(rows, attack, fraction=0.3)[bad][0].numpy()

    np.testing.assert_allclose(sent(attacks.ipm(0.7)), byzfl.InnerProductManipulation(tau=0.7)(honest), rtol=1e-11)
    # It goes as many sample deviations to the other side of the mean.
    mirrored = 2 * honest.mean(axis=0) - sent(attacks.alie(1.5 * (7 / 6) ** 0.5))
    np.testing.assert_allclose(mirrored, byzfl.ALittleIsEnough(tau=1.5)(honest), rtol=1e-11)
