"""FLTrust: answers worked out by hand, what malicious clients can do at most, and the server's own data in a run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import quadratics, scalar_model
from torch import Tensor

import atoll
from atoll import aggregators, attacks
from atoll.aggregators import bucketing, fltrust, median, nnm, norm_bound
from atoll.aggregators.rows import PIECE
from atoll.algorithms import fedavg, scaffold
from atoll.errors import CompositionError, DataError, InvalidArgument, NonFiniteError
from atoll.local import local_sgd
from atoll.rounds import Process
from atoll.transforms import clip_norm, error_feedback, half, secure_sum

ONE_STEP = local_sgd(0.1, steps=1, batch_size=None)
engines = pytest.mark.parametrize("engine", ["loop", "auto"])


def drawn(count: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(count, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(b: float) -> tuple[Tensor, Tensor]:
    """Examples of the server whose mean loss is (x - b)^2 / 2 and a constant."""
    data = quadratics((1.0,), (b,))["c0"].train
    return data["x"], data["y"]


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_rows_are_weighed_by_how_far_they_point_where_the_root_does() -> None:
    """Root (2, 0). (3, 0) has trust 1 and counts as (2, 0); (5, 5) sqrt(1/2), as sqrt(2) (1, 1); the others none."""
    rows = torch.tensor([[3.0, 0.0], [5.0, 5.0], [-9.0, 1.0], [0.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    ruling = fltrust(root=torch.tensor([2.0, 0.0])).combine(rows)
    half = 0.5**0.5
    assert ruling.row.tolist() == pytest.approx([(2 + 1) / (1 + half), 1 / (1 + half)], rel=1e-14)
    assert ruling.share is not None
    assert ruling.share.tolist() == pytest.approx([1 / (1 + half), half / (1 + half), 0, 0, 0], rel=1e-14, abs=0)


def test_where_nobody_points_with_the_root_nothing_moves() -> None:
    rule = fltrust(root=torch.ones(3))
    for rows in (-torch.ones(4, 3), torch.zeros(2, 3)):
        ruling = rule.combine(rows)
        assert ruling.row.tolist() == [0.0] * 3 and ruling.share is not None and not bool(ruling.share.any())
    assert fltrust(root=torch.zeros(3))(torch.ones(4, 3)).tolist() == [0.0] * 3


def test_the_root_may_come_with_the_rows() -> None:
    rows, root = drawn(7, 5), drawn(1, 5, 1)[0]
    rule = fltrust(root="server")
    assert torch.equal(rule.combine(rows, root=root).row, fltrust(root=root)(rows))
    for then in (nnm(byzantine=1, then=rule), bucketing(size=2, then=rule), norm_bound(then=rule)):
        assert then.rooted and bool(torch.isfinite(then.combine(rows, root=root).row).all())
        with pytest.raises(InvalidArgument, match=rf"root=None.*{then.name} judges by.*server_data="):
            then(rows)
    with pytest.raises(InvalidArgument, match=r"root=\(4,\).*length 5"):
        rule.combine(rows, root=root[:4])
    with pytest.raises(NonFiniteError, match="server's own data is not finite"):
        rule.combine(rows, root=root * torch.nan)


# --- whoever sends whatever -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e30, 1e200])
def test_clients_can_neither_lengthen_the_result_nor_turn_it_against_the_root(scale: float) -> None:
    root = drawn(1, 6, 9)[0]
    for seed in range(5):
        rows = drawn(8, 6, seed) * scale
        found = fltrust(root=root)(rows)
        assert float(found.norm()) <= float(root.norm()) * (1 + 1e-12) and float(found @ root) >= 0
        torch.testing.assert_close(found, fltrust(root=root)(drawn(8, 6, seed)), rtol=1e-9, atol=1e-12)


def test_the_order_of_clients_and_blocks_of_memory_do_not_change_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, root = drawn(9, 2 * PIECE + 11).float(), drawn(1, 2 * PIECE + 11, 4)[0].float()
    expected = fltrust(root=root).combine(rows)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    found = fltrust(root=root).combine(rows[order])
    assert torch.equal(found.row, expected.row) and found.share is not None and expected.share is not None
    assert torch.equal(found.share, expected.share[order])
    monkeypatch.setattr("atoll.aggregators.rows.BLOCK", 1)
    assert torch.equal(fltrust(root=root)(rows), expected.row)


def test_rows_that_are_not_finite_are_left_out() -> None:
    rows, root = drawn(5, 3).abs(), torch.ones(3, dtype=torch.float64)
    broken = torch.cat((rows, torch.full((2, 3), torch.nan)))
    ruling = fltrust(root="server").combine(broken, root=root)
    assert torch.equal(ruling.row, fltrust(root=root)(rows))
    assert ruling.share is not None and ruling.share[5:].tolist() == [0.0, 0.0]


# --- in a run ---------------------------------------------------------------------------------------------------------


@engines
def test_a_majority_of_attackers_cannot_turn_a_round(engine: str) -> None:
    """Clients pull by 0.1 b; the server's own pull is 0.3. Whoever points with it counts as 0.3."""
    data = quadratics((1.0,) * 5, (1.0, 2.0, -50.0, -60.0, -70.0))
    process = Process(scalar_model(), fedavg(ONE_STEP), aggregator=fltrust(root="server"), server_data=at(3.0),
                      engine=engine)  # fmt: skip
    state, metrics = process.next(process.init(), data)
    assert float(process.vector(state)) == pytest.approx(0.3, abs=1e-15)
    assert list(metrics["refused"]) == ["c4", "c3", "c2"] and metrics["clients"] == 5
    told = metrics["refused"]["c4"]
    assert told["norm"] == pytest.approx(7.0) and told["distance"] == pytest.approx(7.3)


@engines
@pytest.mark.parametrize("kind", ["scaffold", "error feedback"])
def test_the_server_remembers_like_a_client_and_is_none(kind: str, engine: str) -> None:
    """A client with the server's examples, given the same messages, sends the same rows."""
    algorithm = scaffold(ONE_STEP) if kind == "scaffold" else fedavg(ONE_STEP)
    stages = () if kind == "scaffold" else (error_feedback(half("bfloat16")),)
    data, alone = quadratics((1.0, 2.0), (3.3, 4.1)), quadratics((1.0,), (5.2,), names=["server"])
    process = Process(scalar_model(), algorithm, aggregator=fltrust(root="server"), server_data=at(5.2),
                      transforms=stages, engine=engine)  # fmt: skip
    twin = Process(scalar_model(), algorithm, transforms=stages, aggregator=median(), engine="loop")
    state, other, rows = process.init(), twin.init(), list[float]()
    for _ in range(3):
        task = process.open(state, data.clients, len(data))
        own = replace(task, clients=("server",))
        root = process.serve(task, state.memory)
        state.memory.discard()
        state, metrics = process.next(state, data)
        assert metrics["clients"] == 2 and metrics["examples"] == 4
        twin.engine.prepare(twin, alone)
        (tile,) = twin.engine.tiles(twin, own, alone, other.memory)
        report = twin.work(own, *tile)
        partial = twin.combine(own, report)
        assert partial.rows is not None
        torch.testing.assert_close(partial.rows[0], root, rtol=1e-14, atol=0)
        other.memory.stage(report.clients, report.memory)
        other.memory.commit()
        rows.append(float(root[0]))
    assert "server" in state.memory and len(state.memory) == 3
    assert len(set(rows)) == 3


def test_a_step_may_read_what_the_servers_data_gave() -> None:
    plain, seen = fedavg(ONE_STEP), list[Any]()

    def step(state: Any, aggregate: Any) -> Any:
        seen.append(aggregate.root)
        return plain.step(state, replace(aggregate, mean=aggregate.mean + aggregate.root))

    process = Process(scalar_model(), replace(plain, step=step, rooted=True), server_data=at(3.0))
    state, _ = process.next(process.init(), quadratics((1.0,), (1.0,)))
    assert seen[0].tolist() == pytest.approx([0.3]) and float(process.vector(state)) == pytest.approx(0.4)
    ruled = Process(scalar_model(), fedavg(ONE_STEP), aggregator=median())
    ruled.next(ruled.init(), quadratics((1.0,), (1.0,)))


def test_a_run_with_the_servers_data_resumes_with_the_same_bits(tmp_path: Path) -> None:
    def run(rounds: int, b: float = 2.0, **options: Any) -> atoll.Result:
        return atoll.Experiment(
            model=scalar_model(), data=quadratics((1.0, 2.0, 3.0), (1.0, 2.0, 90.0)), rounds=rounds,
            algorithm=scaffold(ONE_STEP), aggregator=fltrust(root="server"), server_data=at(b),
        ).simulate(progress=False, **options)  # fmt: skip

    whole = run(5)
    run(2, directory=tmp_path)
    assert torch.equal(run(5, directory=tmp_path, resume=True).vector, whole.vector)
    with pytest.raises(atoll.errors.RunError, match="server_data"):
        run(6, 2.5, directory=tmp_path, resume=True)


def test_an_attack_stands_before_the_rule_and_not_before_the_root() -> None:
    data = quadratics((1.0,) * 5, (1.0, 1.1, 1.2, 1.3, 1.4))
    rule = attacks.apply(fltrust(root="server"), attacks.sign_flip(1e3), fraction=0.8)
    process = Process(scalar_model(), fedavg(ONE_STEP), aggregator=rule, server_data=at(1.0))
    state, metrics = process.next(process.init(), data)
    assert float(process.vector(state)) == pytest.approx(0.1) and len(metrics["refused"]) == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"server_data": at(1.0)}, r"nobody looks at server_data.*mean nor fedavg.*fltrust\(root=.server.\)"),
        ({"server_data": at(1.0), "aggregator": median()}, "nobody looks at server_data.*median"),
        ({"server_data": at(1.0), "channel": secure_sum(clip=1.0)}, "server_data cannot stand beside.*secure_sum"),
    ],
)
def test_server_data_that_do_not_fit(options: Any, said: str) -> None:
    with pytest.raises(CompositionError, match=said):
        Process(scalar_model(), fedavg(ONE_STEP), **options)


def test_what_the_server_lacks_is_told_before_any_work() -> None:
    data, rule = quadratics((1.0,), (1.0,)), fltrust(root="server")
    plan = {"algorithm": fedavg(ONE_STEP), "aggregator": rule, "rounds": 1, "progress": False}
    with pytest.raises(CompositionError, match=r"fltrust looks at what training.*server_data=\(x, y\)"):
        atoll.simulate(scalar_model(), data, **plan)
    named = quadratics((1.0,), (1.0,), names=["server"])
    with pytest.raises(CompositionError, match=r"client is called 'server'.*rename"):
        atoll.simulate(scalar_model(), named, server_data=at(1.0), **plan)
    with pytest.raises(InvalidArgument, match=r"server_data=.*FederatedDataset of 1 clients.*data\[.a.\]\.train"):
        atoll.simulate(scalar_model(), data, server_data=data, **plan)
    with pytest.raises(DataError):
        atoll.simulate(scalar_model(), data, server_data=(torch.zeros(3, 1), torch.zeros(2)), **plan)
    with pytest.raises(NonFiniteError, match=r"round 1: training on server_data became non-finite.*halve lr"):
        atoll.simulate(scalar_model(), data, server_data=at(1e200), **plan)


def test_stages_treat_the_servers_row_like_a_clients() -> None:
    process = Process(scalar_model(), fedavg(ONE_STEP), aggregator=fltrust(root="server"), server_data=at(50.0),
                      transforms=(clip_norm(0.25),))  # fmt: skip
    state, _ = process.next(process.init(), quadratics((1.0, 1.0), (1.0, 90.0)))
    assert float(process.vector(state)) == pytest.approx(0.25)


@pytest.mark.parametrize("root", ["client", 3, torch.ones(2, 2), torch.tensor([1.0, torch.inf])])
def test_what_is_no_root(root: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"root=.*a (finite )?vector \[L\]"):
        aggregators.fltrust(root=root)
