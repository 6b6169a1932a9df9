"""The machine of an asynchronous run: who is asked when, which updates a step is made of, and what sites are told."""

from typing import Any

import pytest
from msgspec.structs import replace

from atoll.errors import InvalidArgument
from atoll.net import coordinator as core
from atoll.net.admission import Finding
from atoll.net.buffering import TABLE, Job, Plan, State, handle, replay
from atoll.net.control import Decline, Deliver, Ended, Received, Refused, Wait
from atoll.net.coordinator import Offer, Open, Phase, Reduce, Reply

PLAN = Plan("r", 3, least=4, size=2, concurrency=3, attempts=2)
NAMES = ("a", "b", "c", "d")


def base(version: int) -> str:
    return f"{version:064d}"


class Run:
    """A run that is told things."""

    def __init__(self, plan: Plan = PLAN, sites: tuple[str, ...] = NAMES) -> None:
        self.plan, self.state, self.entries, self.now = plan, State(), list[core.Entry](), 0.0
        self.does(core.Started("m"))
        for site in sites:
            self.does(core.Joined(site))

    def does(self, event: core.Event) -> list[Any]:
        """The effects of an event, of which those that are recorded are kept."""
        self.state, effects = handle(self.plan, self.state, event, self.now)
        self.entries += [e.entry for e in effects if isinstance(e, core.Record)]
        return [e for e in effects if not isinstance(e, core.Record)]

    def opened(self) -> "Run":
        self.does(core.Opened(self.state.round, 1, base(self.state.round)))
        return self

    def claim(self, site: str, sha256: str = "", stamp: tuple[int, int] | None = None) -> Deliver:
        version, attempt = stamp or self.state.at_work[site].stamp
        told = sha256 or f"{site}{version}"
        return Deliver("r", site, version, attempt, base(version), told, 1, (1, 0, 0), 1)

    def delivers(self, site: str, claim: Deliver | None = None, fault: Any = "") -> Any:
        """The answer."""
        finding = Finding(fault, "bad") if fault else Finding("", "", 1.0, 1.0)
        effects = self.does(core.Submitted(site, claim or self.claim(site), finding))
        self.last = effects
        (reply,) = [e for e in effects if isinstance(e, Reply)]
        return reply.answer

    def asks(self, site: str, at: tuple[int, int] | None = None) -> Any:
        (effect,) = self.does(core.Asked(site, at))
        return effect.answer if isinstance(effect, Reply) else effect

    def steps(self) -> list[Any]:
        return self.does(core.Reduced(self.state.round, 1, "m"))

    def same(self) -> bool:
        return replay(self.plan, self.entries) == self.state


def test_places_are_given_to_as_many_as_may_work_and_to_another_when_one_is_done() -> None:
    run = Run()
    assert run.state.phase is Phase.OPENING and not run.state.at_work
    run.opened()
    first = set(run.state.at_work)
    assert len(first) == 3 and {j.round for j in run.state.at_work.values()} == {0}
    (idle,) = set(NAMES) - first
    (done, *others) = sorted(first)
    assert isinstance(run.asks(done), Offer) and run.asks(idle) == Wait("r", 0, None)
    assert run.asks(done, run.state.at_work[done].stamp) == Wait("r", 0, None), "it has it"
    assert isinstance(run.delivers(done), Received)
    assert set(run.state.at_work) == {*others, idle} and run.state.at_work[idle] == Job(0, 4, None)
    assert list(run.state.accepted) == [done] and run.same()


def test_a_step_is_made_of_the_first_updates_and_what_comes_meanwhile_waits_for_the_next() -> None:
    run = Run().opened()
    one, two, three = sorted(run.state.at_work, key=lambda s: -run.state.at_work[s].attempt)
    late = run.state.at_work[three].stamp
    run.delivers(one)
    run.delivers(two)
    (step,) = [e for e in run.last if isinstance(e, Reduce)]
    assert [u.claim.site for u in step.updates] == sorted([one, two]), "by version and site"
    assert run.state.phase is Phase.REDUCING
    assert isinstance(run.delivers(three), Received), "nobody waits until the step is made"
    assert run.asks(three).round == 0 and run.asks(three).counted is None
    opening = run.steps()
    assert Open(1, 1, (), 4, "") in opening and run.state.phase is Phase.OPENING
    assert run.asks(one).counted == run.state.sites[one].counted == (0, 3)
    assert list(run.state.accepted) == [three]
    run.opened()
    assert {j.round for s, j in run.state.at_work.items() if s in (one, two)} == {1}
    run.delivers(one)
    assert run.state.phase is Phase.REDUCING
    run.steps()
    assert run.state.sites[three].counted == late and run.state.round == 2 and run.same()


def test_a_site_is_never_told_that_its_task_is_over_while_it_counts() -> None:
    run = Run(replace(PLAN, rounds=9)).opened()
    slow = sorted(run.state.at_work)[0]
    stamp = run.state.at_work[slow].stamp
    for _ in range(3):
        while run.state.phase is Phase.COLLECTING:
            run.delivers(next(s for s in run.state.at_work if s != slow))
        run.steps()
        run.opened()
        assert run.asks(slow, stamp) == Wait("r", 0, None)
    used = {j.round for j in run.state.at_work.values()} | {3}
    assert run.state.models.keys() == used and 1 not in used, "models that nobody needs are let go of"
    assert isinstance(run.delivers(slow), Received) and run.state.accepted[slow].claim.round == 0
    assert run.state.round == 3


def test_what_is_too_old_is_refused_and_its_site_told_before_it_is_done() -> None:
    run = Run(replace(PLAN, rounds=9, limit=0)).opened()
    slow, *fast = sorted(run.state.at_work)
    claim = run.claim(slow)
    for site in fast:
        run.delivers(site)
    told = run.delivers(slow, claim)
    assert isinstance(told, Refused) and told.cause == "stale" and "1 steps old" in told.detail
    assert slow not in run.state.accepted and slow not in run.state.at_work
    run = Run(replace(PLAN, rounds=9, limit=0)).opened()
    slow, *fast = sorted(run.state.at_work)
    claim = run.claim(slow)
    for site in fast:
        run.delivers(site)
    run.steps()
    assert slow not in run.state.at_work and run.asks(slow, (0, 1)) == Wait("r", 1, None), "it need not go on"
    assert run.delivers(slow, claim).cause == "stale" and run.same()


def test_a_silent_sites_place_is_given_to_another_and_what_it_sends_later_is_told_to_be_late() -> None:
    run = Run(replace(PLAN, deadline=5.0)).opened()
    silent = dict(run.state.at_work)
    (idle,) = set(NAMES) - set(silent)
    claims = {s: run.claim(s) for s in silent}
    run.now = 4.9
    assert run.does(core.Ticked()) == []
    run.now = 5.0
    run.does(core.Ticked())
    assert set(run.state.at_work) == {idle} and set(run.state.excluded) == set(silent)
    late = next(iter(silent))
    assert run.delivers(late, claims[late]).cause == "stale"
    run.delivers(idle)
    assert run.state.at_work and idle not in run.state.at_work, "where nobody else is left they are asked again"
    run.now = 20.0
    run.does(core.Ticked())
    assert run.state.phase is Phase.PAUSED and "nobody is left to ask" in run.state.reason
    run.does(core.Resume())
    assert len(run.state.at_work) == 3 and run.state.at_work[late].attempt > 4 and run.same()


def test_the_same_update_is_acknowledged_again_and_another_is_refused() -> None:
    run = Run().opened()
    site, other = sorted(run.state.at_work)[:2]
    claim = run.claim(site)
    run.delivers(site)
    assert isinstance(run.delivers(site, claim), Received) and len(run.state.accepted) == 1
    assert run.delivers(site, replace(claim, sha256="x")).cause == "conflict"
    run.delivers(other)
    run.steps()
    assert run.delivers(site, claim) == Received("r", 0, claim.attempt, (0, claim.attempt))
    run.opened()
    new = next(s for s, job in run.state.at_work.items() if job.round == 1)
    assert run.delivers(new, replace(run.claim(new), base=base(7))).cause == "base"
    assert run.delivers(new, fault="transport").cause == "transport" and new in run.state.at_work
    assert run.delivers(new, fault="content").cause == "content" and new in run.state.excluded
    assert run.same()


def test_nothing_is_acknowledged_that_no_step_is_left_for() -> None:
    run = Run(replace(PLAN, rounds=1)).opened()
    one, two, three = sorted(run.state.at_work)
    stamp = run.state.at_work[three].stamp
    run.delivers(one)
    run.delivers(two)
    assert run.delivers(three).cause == "busy"
    run.steps()
    assert run.state.phase is Phase.FINISHED and not run.state.accepted
    assert run.asks(three, stamp) == Ended("r", 1, "all 1 steps are made.", None)


def test_everybody_says_once_what_a_model_is_worth_before_it_is_trained_on() -> None:
    run = Run(replace(PLAN, rounds=4, evaluate=1, deadline=9.0)).opened()
    slow, one, two = sorted(run.state.at_work)
    run.delivers(one)
    run.delivers(two)
    effects = run.steps()
    assert Open(1, 0, NAMES, 4, "") in effects
    run.opened()
    assert not set(run.state.at_work) - {slow, *set(NAMES) - {slow, one, two}}, "they are asked for that first"
    run.does(core.Opened(1, 0, base(99)))
    assert run.state.task(one) == (1, 0) and run.state.task(slow) == (0, run.state.at_work[slow].attempt)
    claim = Deliver("r", one, 1, 0, base(99), "e", 1, (0, 0, 0), 1)
    assert isinstance(run.delivers(one, claim), Received) and run.state.at_work[one].round == 1
    run.does(core.Declined(two, Decline("r", two, 1, 0, "no examples")))
    assert run.state.poll is not None and run.state.poll.out == {two: "no examples"}
    run.now = 9.0
    adding = run.does(core.Ticked())
    assert [e.updates[0].claim for e in adding if isinstance(e, Reduce)] == [claim]
    run.does(core.Evaluated(1))
    assert run.state.evaluated == 1 and run.state.poll is None and run.same()


def test_who_leaves_gives_its_place_back_and_who_is_shut_out_does_not_count_unless_it_is_being_combined() -> None:
    run = Run().opened()
    one, two, three = sorted(run.state.at_work)
    run.does(core.Left(three))
    assert three not in run.state.at_work and len(run.state.at_work) == 3
    run.does(core.Joined(three))
    run.delivers(one)
    run.does(core.Revoked(one))
    assert not run.state.accepted
    run.delivers(two)
    last = next(iter(run.state.at_work))
    run.delivers(last)
    assert run.state.phase is Phase.REDUCING
    run.does(core.Revoked(two))
    assert set(run.state.accepted) == {two, last} and run.same()


def test_a_pause_holds_everything_and_a_discard_gives_up_what_waits() -> None:
    run = Run(replace(PLAN, deadline=5.0)).opened()
    one, two, three = sorted(run.state.at_work)
    run.delivers(one)
    run.delivers(two)
    run.does(core.Failed(0, 1, "it cannot be combined"))
    assert run.state.phase is Phase.PAUSED
    assert run.delivers(three).cause == "busy"
    resumed = run.does(core.Resume())
    assert [type(e) for e in resumed] == [Open, Reduce] and run.state.phase is Phase.REDUCING
    run.does(core.Pause("a rest"))
    run.now = 100.0
    assert run.does(core.Ticked()) == []
    run.does(core.Discard("again"))
    assert not run.state.accepted and not run.state.taken
    run.does(core.Resume())
    assert run.state.phase is Phase.COLLECTING and run.state.at_work[three].deadline == 105.0
    assert isinstance(run.delivers(three), Received) and run.same()
    run.does(core.Stop("enough"))
    assert isinstance(run.asks(one), Ended)


def test_every_event_has_an_entry() -> None:
    assert set(TABLE) == set(core.Event.__args__)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "told"),
    [({"size": 0}, "size=0"), ({"limit": -1}, "limit=-1"), ({"cohort": 2}, "cohort=2"), ({"over": 2.0}, "over=2.0"),
     ({"quorum": 1}, "quorum=1"), ({"keep": False}, "sums")],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidArgument, match=told):
        replace(PLAN, **given)
