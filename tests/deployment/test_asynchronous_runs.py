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
from atoll.database import sqlite
from atoll.deployment.prepare import experiment_of, plan_of, process_of
from atoll.deployment.runner import Runner
from atoll.deployment.telling import Teller
from atoll.errors import CompositionError, InvalidArgument
from atoll.experiment import Experiment
from atoll.net import buffering, control, coordinator
from atoll.net.agent import Trainer
from atoll.net.calls import Charter, Closed, InBuffer, SiteView, View
from atoll.net.children import Do, Finish, Happen, Host, Receive, Summary
from atoll.net.children import Place as Standing
from atoll.net.control import content_hash

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
            work = [Work(0.0, SITES.index(u.claim.site), u.claim.site, u.claim.round) for u in taken]
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


# --- a run's process, without a process ------------------------------------------------------------------------------

BROUGHT = """
import torch
from torch import nn
import atoll


def experiment() -> atoll.Experiment:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, generator=draw)
    y = (x[:, 0] > 0).float()
    sites = {f"hospital-{n}": (x[i::3], y[i::3]) for i, n in enumerate("abc")}
    return atoll.Experiment(
        model=atoll.Model(nn.Linear(2, 1), loss="binary_cross_entropy"),
        data=atoll.FederatedDataset.from_arrays(sites),
        algorithm=atoll.fedavg(atoll.local_sgd(lr=0.1, epochs=1, batch_size=4)),
        schedule=atoll.schedule.buffered(size=2, concurrency=3),
        rounds=4,
    )
"""


class Hall:
    """A runner with its sites in one process."""

    def __init__(self, folder: Path) -> None:
        code = BROUGHT.encode()
        app = folder / "run" / "objects" / content_hash(code)
        app.parent.mkdir(parents=True)
        app.write_bytes(code)
        (folder / "app.py").write_bytes(code)
        (folder / "run" / "uploads").mkdir()
        self.experiment = experiment_of(folder / "app.py", {})
        charter = Charter("heart", content_hash(code), {}, least=3)
        self.host = Host(str(folder / "run"), charter, 0.0, sqlite(folder / "state.sqlite"), "process")
        self.folder, self.runner = folder / "run", Runner(self.host)
        self.process, self.data = process_of(self.experiment, "loop"), self.experiment.data
        assert isinstance(self.data, atoll.FederatedDataset)
        self.training = {s: Trainer(process_of(self.experiment, "loop"), self.data.select([s])) for s in SITES}
        for site in SITES:
            self.runner.carry_out(Happen("joined", site, "", 0.0), b"")
        self.works: dict[str, control.Work] = {}

    def work(self) -> Summary:
        while self.runner.told().summary.busy:
            self.runner.carry_out(Do(0.0), b"")
        return self.runner.told().summary

    def says(self, site: str, message: control.Request, upload: str = "") -> control.Answer:
        return control.decode_answer(self.runner.carry_out(Receive(site, upload, 0.0), control.encode(message)))

    def takes(self, site: str) -> None:
        work = self.says(site, control.Ask("heart", site))
        assert isinstance(work, control.Work) and work.clients == (site,), work
        self.works[site] = work

    def delivers(self, site: str) -> None:
        work = self.works.pop(site)
        done = self.training[site](work, (self.folder / "task" / work.base).read_bytes(), b"")
        (self.folder / "uploads" / site).write_bytes(done.frame)
        claim = control.Deliver(
            "heart", site, work.round, work.attempt, work.base, content_hash(done.frame), len(done.frame),
            done.parts, done.sent,
        )  # fmt: skip
        answer = self.says(site, claim, site)
        assert isinstance(answer, control.Received), answer


def test_a_run_goes_on_after_its_process_died_and_its_record_tells_how_old_updates_were(tmp_path: Path) -> None:
    hall, (slow, *fast) = Hall(tmp_path), SITES
    hall.work()
    hall.takes(slow)
    told = hall.runner.told().summary
    assert told.buffer == InBuffer(2, 3, 3, 0)
    for _ in range(2):
        for site in fast:
            hall.takes(site)
            hall.delivers(site)
        hall.work()
    assert len(list((hall.folder / "task").iterdir())) == 2, "the slow site's model, and the newest"
    hall.runner.service._log.close()
    hall.runner._journal.close()
    hall.runner = Runner(hall.host)
    assert isinstance(hall.says(slow, control.Ask("heart", slow)), control.Refused), "its task is being made again"
    hall.work()
    first = hall.works[slow]
    hall.takes(slow)
    assert hall.works[slow].base == first.base and hall.works[slow].values == first.values
    hall.delivers(slow)
    hall.takes(fast[0])
    hall.delivers(fast[0])
    hall.work()
    for site in (slow, fast[1]):
        if site not in hall.works:
            hall.takes(site)
        hall.delivers(site)
    assert hall.work().phase == "finished"
    hall.runner.carry_out(Finish(), b"")
    result = atoll.Result.load(hall.folder)
    assert [r.staleness for r in result.history] == [0.0, 0.0, 1.0, 0.5]
    steps = [[(0, f) for f in fast], [(1, f) for f in fast], [(0, slow), (2, fast[0])], [(3, slow), (2, fast[1])]]
    how, state, tasks = scheduled(hall.experiment), hall.process.init(0), dict[int, Any]()
    hall.process.engine.prepare(hall.process, hall.data)
    for taken in steps:
        tasks[state.round] = hall.process.open(state, (), len(SITES))
        work = [Work(0.0, SITES.index(site), site, version) for version, site in taken]
        state, _ = stepped(hall.process, hall.data, how, state, tasks, work)
    assert torch.equal(result.vector, hall.process.vector(state)), "the bits of the in-process machine"


def scheduled(experiment: Experiment) -> schedule.Buffered:
    assert isinstance(experiment.schedule, schedule.Buffered)
    return experiment.schedule


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
        ("rounds=rounds,", "rounds=rounds, transforms=[atoll.transforms.clip_norm(1.0)],", "clip_norm cannot run"),
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


def test_explain_tells_that_a_step_waits_for_sites_that_are_not_there() -> None:
    view = viewed("collecting", [], None)
    assert "are ready" not in explained(view), "somebody is at work"
    done = SiteView("a", "ready", "", "delivered", "", None, 1.0, None)
    assert "1 of 2 are ready" in explained(msgspec.structs.replace(view, sites=[done]))


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
