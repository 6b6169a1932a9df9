"""A site that sends what must not count: it is left out, told of once, and the round goes on without it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from problems import quadratics, scalar_model
from torch import Tensor

from atoll import aggregators, transforms
from atoll.aggregators import Aggregator
from atoll.algorithms import fedavg, scaffold
from atoll.errors import CompositionError
from atoll.local import local_sgd
from atoll.net import control, frames
from atoll.net.agent import Agent, Trainer
from atoll.net.coordinator import Joined, Phase, Plan
from atoll.net.packing import report_schema
from atoll.net.service import Service
from atoll.net.storage import Disk
from atoll.rounds import Process

ONE_STEP = local_sgd(0.1, steps=1, batch_size=None)
CENTRES = {"a": 1.0, "b": 3.0, "c": 90.0}

Tensors = dict[str, Tensor]
Spoil = Callable[[Tensors, dict[str, Any]], None]


def put(name: str, value: float) -> Spoil:
    """Write a value into a tensor of the update."""

    def spoil(tensors: Tensors, claim: dict[str, Any]) -> None:
        tensors[name][0, 0] = value

    return spoil


def reshape(change: Callable[[Tensor], Tensor]) -> Spoil:
    """Change the row."""

    def spoil(tensors: Tensors, claim: dict[str, Any]) -> None:
        tensors["wire"] = change(tensors["wire"])

    return spoil


def parts(tensors: Tensors, claim: dict[str, Any]) -> None:
    """Say that the row is laid out in another way."""
    claim["parts"] = (0, 0, 1)


BAD: dict[str, tuple[Spoil, str]] = {
    "another shape": (reshape(lambda row: row.repeat(1, 2)), "shape"),
    "two rows": (reshape(lambda row: row.repeat(2, 1)), "shape"),
    "another dtype": (reshape(lambda row: row.float()), "expected torch.float64"),
    "another layout": (parts, "parts are (0, 0, 1)"),
    "a negative weight": (put("weight", -1.0), "its weight is not finite, or negative"),
    "an infinite weight": (put("weight", float("inf")), "its weight is not finite, or negative"),
    "a weight that is no number": (put("weight", float("nan")), "its weight is not finite, or negative"),
    "an absurd weight": (put("weight", 1e12), "weight 1e+12 is above the cap of 1e+07"),
    "an update that is not finite": (put("wire", float("nan")), "not finite"),
    "a loss that is not finite": (put("metrics", float("inf")), "loss"),
}


def served(
    tmp_path: Path, spoil: Spoil | None, process: Callable[[], Process], *, raw: Callable[[bytes], bytes] | None = None
) -> Service:
    """A server after a round in which the site c spoils what it sends."""
    server = Service(process(), Plan("r", 1, least=3, quorum=2), Disk(tmp_path / "server"), now=0.0)
    for name in CENTRES:
        server.happen(Joined(name), 0.0)
    server.work(0.0)
    schema = report_schema(server.process, server.process.open(server.model, tuple(CENTRES), 3))
    for name, centre in CENTRES.items():
        mine = Trainer(process(), quadratics((1.0,), (centre,), names=[name]))
        agent = Agent(name, "r", mine, Disk(tmp_path / name))
        answer, content = server.receive(name, control.encode(control.Ask("r", name)), b"", 0.0)
        agent.heard(answer, content.whole())
        for message, content in agent.train():
            assert isinstance(message, control.Deliver)
            claim, frame = {n: getattr(message, n) for n in message.__struct_fields__}, content
            if name == "c":
                tensors = dict(frames.decode(content, schema))
                tensors = {n: t.clone() for n, t in tensors.items()}
                if spoil is not None:
                    spoil(tensors, claim)
                frame = frames.encode(tensors)
                frame = frame if raw is None else raw(frame)
            claim |= {"sha256": frames.content_hash(frame), "size": len(frame)}
            sent = control.Deliver(**claim)
            for _ in range(2 if name == "c" else 1):  # whoever insists is told of once all the same
                server.receive(name, control.encode(sent), frame, 0.0)
    while server.busy:
        server.work(0.0)
    return server


def scalar(aggregator: Aggregator | None = None, **more: Any) -> Callable[[], Process]:
    return lambda: Process(scalar_model(), fedavg(ONE_STEP), aggregator=aggregator, engine="loop", **more)


@pytest.mark.parametrize("rule", [None, aggregators.median()], ids=["mean", "median"])
@pytest.mark.parametrize("name", BAD)
def test_whatever_must_not_count_is_left_out_and_told(name: str, rule: Aggregator | None, tmp_path: Path) -> None:
    spoil, said = BAD[name]
    if rule is not None and "absurd" in name:
        pytest.skip("a rule without weights hears no claims: any finite one of at least 0 will do")
    server = served(tmp_path, spoil, scalar(rule))
    assert server.state.phase is Phase.FINISHED and server.state.round == 1
    assert float(server.process.vector(server.model)) == pytest.approx(0.2, abs=1e-15), "the mean of 0.1 and 0.3"
    told = [str(entry) for entry in server._log]
    assert sum(said in line for line in told) == 1, "reported once"


@pytest.mark.parametrize(
    "raw",
    [lambda frame: frame[:-8], lambda frame: frame[:8], lambda frame: b"\x80\x04." + frame, lambda frame: b""],
    ids=["cut short", "a header alone", "something else", "nothing"],
)
def test_a_damaged_payload_is_left_out(raw: Callable[[bytes], bytes], tmp_path: Path) -> None:
    server = served(tmp_path, None, scalar(), raw=raw)
    assert server.state.phase is Phase.FINISHED
    assert float(server.process.vector(server.model)) == pytest.approx(0.2, abs=1e-15)


@pytest.mark.parametrize("field", ["round", "attempt"])
def test_an_update_for_another_round_is_refused(field: str, tmp_path: Path) -> None:
    def spoil(tensors: Tensors, claim: dict[str, Any]) -> None:
        claim[field] += 1

    server = served(tmp_path, spoil, scalar())
    assert "c" not in server.state.accepted and server.state.round == 0, "c may still send the right one"
    assert set(server.state.accepted) == {"a", "b"}


def test_stages_that_judge_do_so_at_a_server(tmp_path: Path) -> None:
    server = served(tmp_path, None, scalar(transforms=(transforms.norm_bound(5.0),)))
    assert float(server.process.vector(server.model)) == pytest.approx(0.2, abs=1e-15)
    assert sum("its norm 9 is above the bound of 5" in str(entry) for entry in server._log) == 1


def test_a_server_with_data_of_its_own(tmp_path: Path) -> None:
    """It pulls by 0.25; a and b point there with it, and so does c, however long its update is."""
    own = quadratics((1.0,), (2.5,))["c0"].train

    def process() -> Process:
        return Process(scalar_model(), fedavg(ONE_STEP), aggregator=aggregators.fltrust(root="server"), engine="loop",
                       server_data=(own["x"], own["y"]))  # fmt: skip

    server = served(tmp_path, put("wire", -1e6), process)
    assert float(server.process.vector(server.model)) == pytest.approx(0.25, abs=1e-15)
    lacking = scalar(aggregators.fltrust(root="server"))
    with pytest.raises(CompositionError, match="server_data="):
        Service(lacking(), Plan("r", 1, least=2), Disk(tmp_path / "lacking"), now=0.0)
    remembering = Process(scalar_model(), scaffold(ONE_STEP), aggregator=aggregators.fltrust(root="server"),
                          engine="loop", server_data=(own["x"], own["y"]))  # fmt: skip
    with pytest.raises(CompositionError, match="not kept in a deployment yet"):
        Service(remembering, Plan("r", 1, least=2), Disk(tmp_path / "remembering"), now=0.0)
