"""A secure sum over real programs, with a site and the server's processes killed in the middle of it."""

from contextlib import closing
from pathlib import Path

import pytest
import torch
from processes import APP, Place, place

import atoll
from atoll.cli.run import build
from atoll.errors import CompositionError, InvalidArgument
from atoll.net.policy import departed
from atoll.net.storage import state_of

SITES = ("hospital-a", "hospital-b", "hospital-c", "hospital-d")
SECURE = APP.replace(
    "        rounds=rounds,",
    "        channel=atoll.transforms.secure_sum(clip=4.0, weight_cap=64.0),\n        rounds=rounds,",
)
ROUNDS = 4


def approved(found: Place) -> None:
    for name in SITES:
        waiting = found.folder / f"atoll-{name}" / "waiting"
        found.until(lambda w=waiting: list(w.glob("*.json")) != [], f"{name} is asked")
        mark = next(waiting.glob("*.json")).stem[:12]
        found.atoll("approve", mark, "--home", f"atoll-{name}")


def masked(found: Place, round: int) -> list[Path]:
    """Masked vectors of a round that are at the server."""
    return [p for p in (found.run("heart") / "spool").glob(f"{round:08d}/*") if not p.name.endswith(".part")]


def left(found: Place, site: str) -> list[str]:
    with closing(state_of(found.folder / f"atoll-{site}")) as state:
        return [entry.what for entry in departed(state.records("left"))]


@pytest.mark.slow
def test_a_site_and_the_server_are_killed_in_a_sum(tmp_path: Path) -> None:
    """Whose vector is there is in the sum, whoever is killed then; the others wait for nobody who forgot its keys."""
    with place(tmp_path, SECURE, SITES) as found:
        found.join(SITES)
        found.atoll(
            "submit", "app.py", "--engine", "loop", "--name", "heart", "--quiet", "--attempts", "50", "--quorum", "3",
            "--set", f"rounds={ROUNDS}",
        )  # fmt: skip
        approved(found)
        found.until(lambda: masked(found, 1) != [], "vectors come in the second round", every=0.002)
        found.kill("hospital-d")
        found.start("hospital-d")
        found.until(lambda: masked(found, 2) != [], "vectors come in the third round", every=0.002)
        found.kill_children("server")
        found.until(lambda: masked(found, 3) != [], "vectors come in the last round", every=0.002)
        found.kill("server")
        found.start("server")
        assert "finished" in found.atoll("watch", "heart")
        result = atoll.Result.load(found.run("heart"))
        counts = [record.clients for record in result.history]
        assert len(counts) == ROUNDS and all(count >= 3 for count in counts) and counts[0] == 4
        if counts == [4] * ROUNDS:
            experiment = build(found.folder / "app.py", {"rounds": str(ROUNDS)}, str(found.folder / "all.csv"))
            same = experiment.simulate(engine="loop", progress=False).vector
            assert torch.equal(result.vector, same), "the very bits of the simulation"
        for site in SITES:
            what = left(found, site)
            assert "update" not in what, "nothing leaves but under masks"
            assert what[:8] == ["survey", "spread", "join", "reveal", "share", "mask", "confirm", "unmask"]
            assert what.count("mask") <= ROUNDS, "no vector leaves twice"
        shown = found.atoll("audit", "--home", "atoll-hospital-a")
        assert "wire/ring" in shown and "unmask" in shown
        pinned = found.atoll("peers", "--home", "atoll-hospital-a")
        assert all(site in pinned for site in SITES)
        listed = found.atoll("sites")
        for line in pinned.splitlines():
            assert line.split()[1][:16] in listed, "the fingerprints that the server shows"


def test_a_sum_of_too_few_sites_is_refused_when_it_is_submitted(tmp_path: Path) -> None:
    from atoll.deployment.prepare import experiment_of, plan_of, process_of
    from atoll.net.calls import Charter

    app = tmp_path / "app.py"
    app.write_text(SECURE)
    experiment = experiment_of(app, {})
    process = process_of(experiment, "loop")
    plan = plan_of(experiment, process, Charter("heart", "0" * 64, {}, least=3, deadline=9.0))
    assert (plan.sums, plan.keep, plan.step) == (3, False, 9.0)
    with pytest.raises(InvalidArgument, match=r"--sites=2.*at least 3"):
        plan_of(experiment, process, Charter("heart", "0" * 64, {}, least=2))
    for bad, why in (
        (SECURE.replace("clip=4.0", "clip=4.0, dropouts={'mask': 0.1}"), "dropouts"),
        (SECURE.replace("atoll.transforms.secure_sum(clip=4.0, weight_cap=64.0)", "atoll.transforms.grouped("
         "atoll.transforms.secure_sum(clip=4.0, weight_cap=64.0), atoll.aggregators.median(), size=3)"), "grouped"),
    ):  # fmt: skip
        app = tmp_path / f"{why}.py"
        app.write_text(bad)
        with pytest.raises(CompositionError, match=why):
            process_of(experiment_of(app, {}), "loop")
