"""A run with noise as it is watched, and as its result tells of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import APP, place

import atoll
from atoll.cli.explaining import explained
from atoll.cli.operating import changes
from atoll.cli.run import build
from atoll.database import sqlite
from atoll.deployment.prepare import experiment_of, process_of
from atoll.deployment.runner import Runner
from atoll.errors import BudgetSpent, CompositionError
from atoll.net import control
from atoll.net.agent import Trainer
from atoll.net.calls import Charter, SiteView, Spent, View
from atoll.net.children import Do, Finish, Happen, Host, Receive, Summary
from atoll.net.control import content_hash
from atoll.report.runs import read_run

SITES = ("hospital-a", "hospital-b", "hospital-c")
NOISY = """
import torch
from torch import nn
import atoll


def experiment(*, rounds: int = 3, seed: int = 0, epsilon: float = 0.0, budget: float = 0.0) -> atoll.Experiment:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, generator=draw)
    y = (x[:, 0] > 0).float()
    sites = {f"hospital-{n}": (x[i::3], y[i::3]) for i, n in enumerate("abc")}
    more = {"epsilon": epsilon} if epsilon else {"noise_multiplier": 2.0, "budget": budget or None}
    return atoll.Experiment(
        model=atoll.Model(nn.Linear(2, 1), loss="binary_cross_entropy"),
        data=atoll.FederatedDataset.from_arrays(sites),
        algorithm=atoll.fedavg(atoll.local_sgd(lr=0.1, epochs=1, batch_size=4)),
        transforms=(atoll.transforms.clip_norm(0.5), atoll.transforms.gaussian_noise(seed=seed or None, **more)),
        aggregator=atoll.aggregators.mean(weights="uniform", denominator="expected"),
        rounds=rounds,
        title="Heart disease",
    )
"""


class Hall:
    """A runner with its sites in one process."""

    def __init__(self, folder: Path, **settings: object) -> None:
        code = NOISY.encode()
        app = folder / "run" / "objects" / content_hash(code)
        app.parent.mkdir(parents=True, exist_ok=True)
        app.write_bytes(code)
        told = {name: str(value) for name, value in settings.items()}
        self.charter = Charter("heart", content_hash(code), told, least=3)
        (folder / "app.py").write_bytes(code)
        self.experiment = experiment_of(folder / "app.py", told)
        self.folder, self.runner = folder / "run", Runner(self.host(folder))
        self.training = {
            site: Trainer(process_of(self.experiment, "loop"), self.experiment.data.select([site])) for site in SITES
        }
        for site in SITES:
            self.runner.carry_out(Happen("joined", site, "", 0.0), b"")

    def host(self, folder: Path) -> Host:
        return Host(str(folder / "run"), self.charter, 0.0, sqlite(folder / "state.sqlite"), "process")

    def work(self) -> Summary:
        while self.runner.told().summary.busy:
            self.runner.carry_out(Do(0.0), b"")
        return self.runner.told().summary

    def deliver(self) -> None:
        """Every site takes the task and delivers."""
        for site in SITES:
            run = self.runner
            work = control.decode_answer(
                run.carry_out(Receive(site, "", 0.0), control.encode(control.Ask("heart", site)))
            )
            assert isinstance(work, control.Work), work
            done = self.training[site](work, (self.folder / "task" / work.base).read_bytes(), b"")
            (self.folder / "uploads").mkdir(exist_ok=True)
            (self.folder / "uploads" / site).write_bytes(done.frame)
            claim = control.Deliver(
                "heart", site, work.round, work.attempt, work.base, content_hash(done.frame), len(done.frame),
                done.parts, done.sent,
            )  # fmt: skip
            answer = control.decode_answer(run.carry_out(Receive(site, site, 0.0), control.encode(claim)))
            assert isinstance(answer, control.Received), answer

    def over(self) -> Summary:
        told = self.work()
        while told.phase == "collecting":
            self.deliver()
            told = self.work()
        self.runner.carry_out(Finish(), b"")
        return told


pytestmark = pytest.mark.usefixtures("unsynced")


def test_the_result_has_the_ledger_and_the_model_of_the_simulation(tmp_path: Path) -> None:
    hall = Hall(tmp_path, seed=7, epsilon=5.0)
    told = hall.over()
    assert (told.phase, told.round) == ("finished", 3)
    result = atoll.Result.load(hall.folder)
    simulated = hall.experiment.simulate(engine="loop", progress=False)
    assert float((result.vector - simulated.vector).abs().max()) < 1e-6
    (said,), (same,) = result.privacy, simulated.privacy
    for key in ("epsilon", "delta", "neighbours", "accountant", "budget", "releases", "events", "expected_cohort"):
        assert said[key] == same[key], key
    assert [r.epsilon for r in result.history] == [r.epsilon for r in simulated.history]
    assert [r.clients for r in result.history] == [3] * 3
    assert all(r.loss != r.loss for r in result.history), "losses are told of no site"
    assert "NOT PRIVATE" in atoll.privacy.explain(result)
    assert told.privacy == Spent(said["epsilon"], said["delta"], 5.0, False)


def test_a_budget_ends_the_run_with_a_reason_and_everybody_is_told(tmp_path: Path) -> None:
    allowed = atoll.privacy.epsilon(noise_multiplier=2.0, steps=2, delta=1e-5, sampling="none")
    hall = Hall(tmp_path, rounds=5, budget=3.0)  # three releases would take 3.7
    told = hall.over()
    assert (told.phase, told.round) == ("finished", 2)
    assert told.privacy is not None and told.privacy.private
    assert told.privacy.epsilon == pytest.approx(allowed, abs=1e-9)
    result = atoll.Result.load(hall.folder)
    (said,) = result.privacy
    assert (said["unit"], said["releases"], said["epsilon"]) == ("site", 2, told.privacy.epsilon)
    assert any("budget" in note for note in result.notes)
    words = atoll.privacy.explain(result)
    assert (
        "each site that takes part, with all of its examples" in words
        and "every round counted for every site" in words
        and "the server" in words
    )
    view = View(
        1, "heart", "", told.phase, told.reason, 3, 5, 0, 0, 3,
        [SiteView("hospital-a", "ready", "", "", "", (1, 1), 1.0)], told.closed, [], "ada", 0.0, told.privacy,
    )  # fmt: skip
    assert "privacy budget of epsilon" in explained(view)
    lines = "\n".join(changes(None, view))
    assert f"privacy: epsilon {allowed:.4g} of 3 is spent at delta 1e-05, for each site" in lines
    assert "finished: the privacy budget" in lines


def test_a_run_that_goes_on_is_looked_at_with_all_that_it_released(tmp_path: Path) -> None:
    hall = Hall(tmp_path)
    hall.work()
    hall.deliver()
    hall.work()
    first = hall.runner.told().summary
    assert first.round == 1 and first.privacy is not None

    def looked() -> dict[str, Any]:
        (said,) = read_run(hall.folder).privacy
        return said

    assert (looked()["releases"], looked()["unit"], looked()["epsilon"]) == (1, "site", first.privacy.epsilon)
    append = hall.runner.service._log.append

    def dies(record: bytes) -> None:  # the process, between the noised sum and its record
        if b"Reduced" in record:
            raise SystemExit
        append(record)

    hall.deliver()
    hall.runner.service._log.append = dies  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        hall.work()
    assert looked()["releases"] == 2, "never less than what left, and more for a moment"
    hall.runner._journal.close()
    hall.runner.service._log.close()
    hall.runner = Runner(hall.host(tmp_path))
    assert hall.runner.told().summary.privacy == first.privacy, "nothing has left"
    told = hall.over()
    result = atoll.Result.load(hall.folder)
    assert told.round == 3 and result.privacy[0]["releases"] == 3
    entries = [json.loads(r) for r in hall.runner.service._log]
    assert sum(e["event"]["type"] == "Reduced" and e["event"]["multiplier"] == 2.0 for e in entries) == 3
    (said,) = read_run(hall.folder).privacy
    assert said["releases"] == 3


def test_what_was_released_outlives_power_whatever_the_server_is_told(tmp_path: Path) -> None:
    hall = Hall(tmp_path)  # a server that is told that nothing need outlive the machine
    files = hall.runner.service.files
    assert (files._durability, files._state.durability) == ("power", "power")  # type: ignore[attr-defined]


def test_what_cannot_be_counted_is_refused_when_the_run_is_submitted(tmp_path: Path) -> None:
    with pytest.raises(BudgetSpent, match="privacy budget is spent"):
        Hall(tmp_path / "a", budget=0.01)
    app = tmp_path / "app.py"
    app.write_text(NOISY.replace("atoll.transforms.gaussian_noise(", "atoll.transforms.correlated_noise("))
    with pytest.raises(CompositionError, match="correlated_noise is not counted over sites yet"):
        process_of(experiment_of(app, {}), "loop")


@pytest.mark.slow
def test_the_server_is_killed_between_rounds_with_noise(tmp_path: Path) -> None:
    """Real programs: the ledger has every round once, whatever was killed."""
    app = APP.replace("atoll.scaffold(", "atoll.fedavg(").replace(
        "        rounds=rounds,",
        "        transforms=(atoll.transforms.clip_norm(0.5), "
        "atoll.transforms.gaussian_noise(4.0, budget=9.0, seed=1)),\n"
        '        aggregator=atoll.aggregators.mean(weights="uniform", denominator="expected"),\n        rounds=rounds,',
    )
    names = ("hospital-a", "hospital-b")
    with place(tmp_path, app, names) as found:
        found.serve()
        words = found.atoll("invite", *names, "--quiet").split()
        for name, word in zip(names, words, strict=True):
            found.start(name, "join", word, "--data", f"{name}.csv")
            found.until(lambda name=name: "takes part" in found.log(name), f"{name} joins")
        found.atoll("submit", "app.py", "--engine", "loop", "--name", "heart", "--quiet", "--set", "rounds=4")
        for name in names:
            waiting = found.folder / f"atoll-{name}" / "waiting"
            found.until(lambda w=waiting: list(w.glob("*.json")) != [], f"{name} is asked")
            found.atoll("approve", next(waiting.glob("*.json")).stem[:12], "--home", f"atoll-{name}")
        models = found.run("heart") / "models"
        found.until(lambda: (models / "00000001").exists(), "the first round", every=0.002)
        found.kill_children("server")
        found.until(lambda: (models / "00000003").exists(), "the third round", every=0.002)
        found.kill("server")
        found.start("server")
        shown = found.atoll("watch", "heart")
        assert "finished" in shown and "privacy: NONE, since the noise is seeded" in shown
        result = atoll.Result.load(found.run("heart"))
        assert (result.privacy[0]["releases"], result.privacy[0]["unit"]) == (4, "site")
        experiment = build(found.folder / "app.py", {"rounds": "4"}, str(found.folder / "all.csv"))
        same = experiment.simulate(engine="loop", progress=False)
        assert torch.allclose(result.vector, same.vector, atol=1e-6)
        assert result.privacy[0]["epsilon"] == same.privacy[0]["epsilon"]
