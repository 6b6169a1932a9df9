"""Experiments as objects and as files."""

from pathlib import Path
from typing import Literal

import pandas
import pytest
import torch
from torch import nn

import atoll
from atoll.errors import AtollError
from atoll.experiment import configure, convert, load_app, parameters

APP = """
import torch
from torch import nn
import atoll

def experiment(*, rounds: int = 3, lr: float = 0.1, hidden: int | None = None) -> atoll.Experiment:
    torch.manual_seed(0)
    return atoll.Experiment(
        model=atoll.Model(nn.Linear(2, 2), "cross_entropy", ("accuracy",)),
        data=atoll.table(client="site", target="ill"),
        algorithm=atoll.fedavg(atoll.local_sgd(lr)),
        rounds=rounds,
    )
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    path = tmp_path / "app.py"
    path.write_text(APP)
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, generator=draw)
    frame = pandas.DataFrame({"a": x[:, 0], "b": x[:, 1], "ill": x[:, 0] > 0, "site": ["n", "s"] * 20})
    path = tmp_path / "table.csv"
    frame.to_csv(path, index=False)
    return path


def test_an_app_is_configured_bound_and_run(app: Path, table: Path) -> None:
    factory = load_app(app)
    assert list(parameters(factory)) == ["rounds", "lr", "hidden"]
    experiment = configure(factory, {"rounds": "2", "lr": "0.5", "hidden": "none"})
    assert experiment.rounds == 2
    result = experiment.bind(table).simulate(progress=False)
    assert len(result.history) == 2
    assert set(result.clients["global"]) == {"n", "s"}
    direct = atoll.simulate(
        experiment.model, experiment.bind(table).data, algorithm=experiment.algorithm, rounds=2, progress=False
    )  # type: ignore[arg-type]
    assert torch.equal(direct.vector, result.vector)


def test_a_recipe_without_a_source_is_refused(app: Path) -> None:
    with pytest.raises(AtollError, match=r"no source yet.*--data PATH"):
        configure(load_app(app), {}).simulate(progress=False)


def test_own_data_takes_no_source(table: Path) -> None:
    data = atoll.FederatedDataset.from_arrays({"a": (torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))})
    experiment = atoll.Experiment(
        model=atoll.Model(nn.Linear(2, 2), "cross_entropy"),
        data=data,
        algorithm=atoll.fedavg(atoll.local_sgd(0.1)),
        rounds=1,
    )
    assert len(experiment.simulate(progress=False).history) == 1
    with pytest.raises(AtollError, match="brings its own data"):
        experiment.bind(table)


def test_bad_apps_and_settings(app: Path, tmp_path: Path) -> None:
    with pytest.raises(AtollError, match="app="):
        load_app(tmp_path / "none.py")
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1\n")
    with pytest.raises(AtollError, match=r"defines no experiment\(\)"):
        load_app(empty)
    with pytest.raises(AtollError, match=r"'round' is unknown.*Did you mean 'rounds'"):
        configure(load_app(app), {"round": "2"})
    with pytest.raises(AtollError, match=r"--set rounds='many'.*type int"):
        configure(load_app(app), {"rounds": "many"})
    empty.write_text("def experiment():\n    return 3\n")
    with pytest.raises(AtollError, match="returned int"):
        configure(load_app(empty), {})


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("3", int, 3),
        ("3", float, 3.0),
        ("1e-3", float, 1e-3),
        ("yes", bool, True),
        ("False", bool, False),
        ("none", int | None, None),
        ("4", int | None, 4),
        ("b", Literal["a", "b"], "b"),
        ("none", str, "none"),
    ],
)
def test_text_becomes_the_annotated_type(text: str, kind: object, value: object) -> None:
    assert convert("x", text, kind) == value


@pytest.mark.parametrize(("text", "kind"), [("x", int), ("maybe", bool), ("c", Literal["a", "b"]), ("1.5", int)])
def test_text_of_another_type_is_refused(text: str, kind: object) -> None:
    with pytest.raises(AtollError, match="--set x="):
        convert("x", text, kind)
