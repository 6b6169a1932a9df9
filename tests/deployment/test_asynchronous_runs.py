"""Asynchronous runs over sites: real programs whose model is the in-process machine's, and what is refused before."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from processes import Place, place

import atoll
from atoll import schedule
from atoll.asynchronous import Work, stepped
from atoll.cli.explaining import explained
from atoll.cli.operating import buffered, changes
from atoll.cli.run import build
from atoll.deployment.prepare import experiment_of, plan_of, process_of
from atoll.deployment.telling import Teller
from atoll.errors import CompositionError, InvalidArgument
from atoll.experiment import Experiment
from atoll.net import buffering, coordinator
from atoll.net.calls import Charter, Closed, InBuffer, SiteView, View
from atoll.net.children import Place as Standing

SITES = ("hospital-a", "hospital-b", "hospital-c")
STEPS = 8

APP = """
from torch import nn
import atoll


def experiment(*, rounds: int = 8) -> atoll.Experiment:
    import time

    def forward(module, batch):
        time.sleep(0.02)
        return module(batch["x"])

    return atoll.Experiment(
        model=atoll.Model(nn.Linear(2, 1), loss="binary_cross_entropy", metrics=("auc",), forward=forward),
        data=atoll.table(client="hospital", target="disease"),
        algorithm=atoll.fedavg(atoll.local_sgd(lr=0.1, epochs=1, batch_size=4)),
        schedule=atoll.schedule.buffered(size=2, concurrency=2, staleness=0.5),
        rounds=rounds,
        evaluate_every=4,
    )
"""


def in_process(found: Place, name: str) -> torch.Tensor:
    """The model that the in-process machine makes of the updates that the run's journal says each step has."""
    experiment = build(found.folder / "app.py", {}, str(found.folder / "all.csv"))
    process, how, data = process_of(experiment, "loop"), experiment.schedule, experiment.data
    assert isinstance(how, schedule.Buffered) and isinstance(data, atoll.FederatedDataset)
    charter = Charter(name, "0" * 64, {}, least=len(SITES))
    plan: Any = plan_of(experiment_of(found.folder / "app.py", {}), process, charter)
    process.engine.prepare(process, data)
    told, made, tasks = buffering.State(), process.init(experiment.seed, experiment.initial), dict[int, Any]()
    with found.state() as state:
        records = list(state.records(f"runs/{name}/journal"))
    for record in records:
        before = told
        entry = msgspec.json.decode(record, type=coordinator.Entry)
        told, _ = buffering.handle(plan, told, entry.event, entry.now)
        if told.round > before.round:
            tasks[made.round] = process.open(made, (), len(SITES))
            taken = list(before.accepted.values())[: before.taken]
            work = [Work(0.0, u.claim.attempt, u.claim.site, u.claim.round) for u in taken]
            made, _ = stepped(process, data, how, made, tasks, work)
    assert told.phase is coordinator.Phase.FINISHED
    return process.vector(made)


@pytest.mark.slow
def test_over_real_programs_of_which_some_are_killed_the_model_is_the_in_process_machines(tmp_path: Path) -> None:
    with place(tmp_path, app=APP, names=SITES) as found:
        found.join(SITES)
        found.atoll("submit", "app.py", "--engine", "loop", "--name", "heart", "--quiet", "--attempts", "50")
        for site in SITES:
            waiting = found.folder / f"atoll-{site}" / "waiting"
            found.until(lambda w=waiting: list(w.glob("*.json")) != [], f"{site} is asked")
            (mark,) = waiting.glob("*.json")
            found.atoll("approve", mark.stem[:12], "--home", f"atoll-{site}")
        models = found.run("heart") / "models"
        found.until(lambda: (models / "00000002").exists(), "two steps are made")
        found.kill("server")
        found.start("server")
        found.until(lambda: (models / "00000004").exists(), "two more steps are made")
        found.kill("hospital-a")
        found.start("hospital-a")
        found.kill_children("server")
        told = found.atoll("watch", "heart")
        assert f"step {STEPS}/{STEPS}: 2 updates" in told and "steps old on average" in told and "finished" in told
        result = atoll.Result.load(found.run("heart"))
        assert torch.equal(result.vector, in_process(found, "heart")), "the very bits, given the order in the journal"
        assert [r.clients for r in result.history] == [2] * STEPS
        assert result.history[0].staleness == 0.0 and all(r.staleness is not None for r in result.history)
        assert set(result.history[-1].test) == {"loss", "auc"}, "the last model was evaluated"


# --- what is asked for ------------------------------------------------------------------------------------------------


def planned(experiment: Experiment, **options: Any) -> Any:
    process = process_of(experiment, "loop")
    return plan_of(experiment, process, Charter("heart", "0" * 64, {}, **options))


def test_the_plan_is_the_schedules(tmp_path: Path) -> None:
    app = tmp_path / "app.py"
    app.write_text(APP)
    experiment = experiment_of(app, {})
    plan = planned(experiment, least=3, deadline=9.0)
    assert isinstance(plan, buffering.Plan)
    assert (plan.size, plan.concurrency, plan.limit, plan.least, plan.deadline) == (2, 2, None, 3, 9.0)
    other = planned(experiment_of(app, {}), least=3)
    assert other.weighing == plan.weighing
    for option, told in (
        ({"least": 1}, r"--sites=1.*size=2"), ({"over": 1.5}, "--over=1.5"), ({"quorum": 2}, "--quorum=2"),
    ):  # fmt: skip
        with pytest.raises(InvalidArgument, match=told):
            planned(experiment, **option)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("rounds=rounds,", "rounds=rounds, cohort=2,", "cohort=2"),
        ("rounds=rounds,", "rounds=rounds, transforms=[atoll.transforms.clip(1.0)],", "clip cannot run asynchronously"),
        ("rounds=rounds,", "rounds=rounds, channel=atoll.transforms.secure_sum(clip=4.0, weight_cap=64.0),", "channel"),
        ("rounds=rounds,", "rounds=rounds, aggregator=atoll.aggregators.median(),", "aggregator"),
        ("atoll.fedavg(", "atoll.scaffold(", "scaffold cannot run asynchronously"),
        ("buffered(size=2, concurrency=2, staleness=0.5)", "rounds(over=1.5)", "schedule"),
    ],
)  # fmt: skip
def test_what_a_simulation_refuses_is_refused_over_sites(tmp_path: Path, old: str, new: str, told: str) -> None:
    app = tmp_path / "app.py"
    app.write_text(APP.replace(old, new))
    with pytest.raises((InvalidArgument, CompositionError), match=told):
        planned(experiment_of(app, {}), least=3)


# --- what is told -----------------------------------------------------------------------------------------------------


def viewed(phase: str, closed: list[Closed], behind: int | None) -> View:
    site = SiteView("a", "ready", "", "asked", "", None, 1.0, behind)
    return View(
        1, "heart", "", phase, "", 4, 8, 1, 2, 2, [site], closed, [], "ada", 0.0, None, InBuffer(2, 3, 3, 1)
    )  # fmt: skip


def test_watch_and_explain_tell_of_steps_and_of_how_old_models_are() -> None:
    view = viewed("collecting", [Closed(3, 2, None, 10, 1.0, {}, 1.5)], 2)
    assert "step 3/8: 2 updates, 1.5 steps old on average" in "\n".join(changes(None, view))
    assert view.buffer is not None
    assert buffered(view.buffer) == "1 of 2 updates are there, 3 of 3 places at work"
    told = explained(view)
    assert "after 3 of 8 steps" in told and "step 4 has 1 of 2 updates" in told and "2 steps old" in told


def test_a_server_is_told_what_each_site_is_asked_for() -> None:
    teller, plan = Teller(), buffering.Plan("r", 3, least=2, size=2, concurrency=1)
    state = buffering.State()

    def happens(event: coordinator.Event) -> dict[str, Standing]:
        nonlocal state
        state, _ = buffering.handle(plan, state, event, 0.0)
        return teller.tell(state)

    happens(coordinator.Started("m"))
    happens(coordinator.Joined("a"))
    assert happens(coordinator.Joined("b")) == {"b": Standing("active")}
    asked = happens(coordinator.Opened(0, 1, "0" * 64))
    ((site, told),) = asked.items()
    assert told == Standing("active", None, "asked", task=(0, 1))
    other = "b" if site == "a" else "a"
    claim = buffering.Deliver("r", site, 0, 1, "0" * 64, "x", 1, (1, 0, 0), 1)
    now = happens(coordinator.Submitted(site, claim, coordinator.Finding()))
    assert now == {site: Standing("active", None, "delivered"), other: Standing("active", None, "asked", task=(0, 2))}
