"""What sites say of a model: the very metrics of a simulation, and nothing that is not sums."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from deployed import deploy
from torch import Tensor, nn

import atoll
from atoll import aggregators, transforms
from atoll.algorithms import Algorithm, apfl, ditto, fedavg, fedbn, fedper, ifca
from atoll.data import FederatedDataset
from atoll.errors import InvalidArgument, NonFiniteError, RunError
from atoll.evaluation import Evaluation
from atoll.local import local_sgd
from atoll.net import evaluating
from atoll.net.agent import Trainer
from atoll.net.buffers import Buffer
from atoll.net.control import Deliver, Work, content_hash
from atoll.net.coordinator import Plan
from atoll.net.evaluating import LARGEST, NOTHING, added, examine, fault_of, schema
from atoll.net.frames import Limits, decode, encode
from atoll.net.packing import pack_task
from atoll.net.policy import inspect_evaluation
from atoll.net.service import Service
from atoll.net.spool import Spool
from atoll.net.storage import Content
from atoll.rounds import Process

PLAN = local_sgd(0.1, epochs=2, batch_size=3)
ROUNDS = 3


def clients(sizes: tuple[int, ...] = (5, 8, 6)) -> FederatedDataset:
    """Clients of whom the first has no test examples, and the last no validation examples."""
    draw = torch.Generator().manual_seed(3)

    def some(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 5, generator=draw), torch.randint(0, 3, (n,), generator=draw)

    names = [f"c{i}" for i in range(len(sizes))]
    return FederatedDataset.from_arrays(
        {c: some(n) for c, n in zip(names, sizes, strict=True)},
        validation={c: some(n) for c, n in zip(names, (4, 3, 0), strict=True)},
        test={c: some(n) for c, n in zip(names, (0, 7, 2), strict=True)},
    )


def network(norm: bool = False) -> atoll.Model:
    torch.manual_seed(1)
    between = nn.BatchNorm1d(6) if norm else nn.Tanh()
    layers = nn.Sequential(nn.Linear(5, 6), between, nn.Linear(6, 3))
    return atoll.Model(layers, "cross_entropy", metrics=("accuracy", "balanced_accuracy"))


METHODS: dict[str, tuple[Callable[[], Algorithm], bool]] = {
    "fedavg": (lambda: fedavg(PLAN), False),
    "buffers": (lambda: fedavg(PLAN), True),
    "fedbn": (lambda: fedbn(PLAN), True),
    "fedper": (lambda: fedper(PLAN, private=("2.*",)), False),
    "ditto": (lambda: ditto(PLAN, lam=0.2), False),
    "apfl": (lambda: apfl(PLAN), False),
    "ifca": (lambda: ifca(PLAN, clusters=2), False),
}


def same(found: Evaluation, expected: Evaluation) -> None:
    """Values of the clients that have examples, and over all of them."""
    assert found.names == expected.names and found.better == expected.better
    there = [i for i, n in enumerate(expected.examples.tolist()) if n]
    assert found.clients == tuple(expected.clients[i] for i in there)
    torch.testing.assert_close(found.examples, expected.examples[there], rtol=0, atol=0)
    torch.testing.assert_close(found.values, expected.values[there], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.overall, expected.overall, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_sites_say_what_a_simulation_finds(name: str) -> None:
    build, norm = METHODS[name]
    data = clients()

    def made() -> Process:
        return Process(network(norm), build(), engine="loop")

    process = made()
    state, expected = process.init(), dict[int, tuple[Any, ...]]()
    for number in range(1, ROUNDS + 1):
        state, _ = process.next(state, data)
        if number in (2, ROUNDS):
            looked = [process.evaluate(state, data, split=s) for s in evaluating.SPLITS]
            if process.personalised:
                looked += [process.evaluate(state, data, split=s, personal=True) for s in evaluating.SPLITS]
            expected[number] = tuple(looked)
    training = {c: Trainer(made(), data.select([c])) for c in data.clients}
    world = deploy(made, data, ROUNDS, training, evaluate=2)
    assert world.server is not None and not world.notices
    assert torch.equal(process.vector(state), world.server.process.vector(world.server.model))
    assert sorted(world.said) == [2, ROUNDS]
    names = [*evaluating.SPLITS, *(f"personal/{s}" for s in evaluating.SPLITS)]
    for number, looked in expected.items():
        splits = world.said[number].splits
        assert list(splits) == names[: len(looked)]
        for split, one in zip(names, looked, strict=False):
            same(splits[split], one)
    assert ("personal/test" in world.said[ROUNDS].splits) == process.personalised


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"transforms": (transforms.clip_norm(0.5), transforms.gaussian_noise(1.0))}, "not protected"),
        ({"channel": transforms.secure_sum(clip=0.5, weight_cap=8.0)}, "sums alone"),
    ],
)
def test_nothing_is_asked_where_what_is_said_would_not_be_protected(options: dict[str, Any], why: str) -> None:
    private = "transforms" in options
    if private:
        options = options | {"aggregator": aggregators.mean(weights="uniform", denominator="expected")}
    process = Process(network(), fedavg(PLAN), engine="loop", **options)
    assert why in evaluating.why_not(process)
    assert evaluating.why_not(Process(network(), fedavg(PLAN))) == ""
    if private:
        plan = Plan("r", 2, cohort=3, least=3, evaluate=1)
        with pytest.raises(InvalidArgument, match=rf"evaluate=1.*{why}"):
            Service(process, plan, Files(), now=0.0)  # type: ignore[arg-type]
    data = clients().select(["c1"])
    task = process.open_global(process.init(), ("c1",), 1)
    values, frame = pack_task(task)
    content = b"".join(bytes(part) for part in frame)
    work = Work("r", 1, 0, content_hash(content), len(content), "evaluate", 0, ("c1",), 1, values, None)
    with pytest.raises(RunError, match=why):
        Trainer(process, data)(work, bytearray(content), b"")


class Files:
    """No folder: what is refused before it is looked at."""

    def journal(self, name: str) -> Any:
        raise AssertionError(name)


def sums(**changes: Any) -> dict[str, Tensor]:
    """An answer about a model of three outputs, whose metrics are accuracy and balanced accuracy."""
    own = torch.tensor([[3.0, 4.0, 2.0, 4.0, *[1.0] * 6]], dtype=torch.float64)
    none = torch.zeros(1, 2, dtype=torch.float64)
    found = {"outputs": torch.tensor([3]), "validation": none, "test": own}
    return found | {"personal/validation": none, "personal/test": none} | changes


WRONG: dict[str, dict[str, Tensor]] = {
    "not finite": sums(test=torch.tensor([[float("nan"), 4.0]], dtype=torch.float64)),
    "infinite": sums(test=torch.tensor([[float("inf"), 4.0]], dtype=torch.float64)),
    "half an example": sums(test=torch.tensor([[1.0, 4.5]], dtype=torch.float64)),
    "fewer than none": sums(test=torch.tensor([[1.0, -1.0]], dtype=torch.float64)),
    "too many": sums(test=torch.tensor([[1.0, 1e300]], dtype=torch.float64)),
    "one number": sums(test=torch.tensor([[1.0]], dtype=torch.float64)),
    "two rows": sums(test=torch.ones(2, 4, dtype=torch.float64)),
    "single precision": sums(test=torch.ones(1, 4)),
    "no outputs": sums(outputs=torch.tensor([0])),
    "far too many outputs": sums(outputs=torch.tensor([2**40])),
    "an example": sums() | {"x": torch.ones(1, 5)},
    "nothing": {},
    "too long": sums(test=torch.zeros(1, LARGEST // 8 + 1, dtype=torch.float64)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_not_sums_neither_leaves_nor_counts(wrong: str) -> None:
    frame = encode(WRONG[wrong])
    assert fault_of(frame)
    with pytest.raises(InvalidArgument, match="not sums"):
        inspect_evaluation(frame)
    assert examine(deliver(frame), frame).fault == "content"


def deliver(frame: bytes, site: str = "a", **changes: Any) -> Deliver:
    options = {"sha256": content_hash(frame), "size": len(frame), "parts": NOTHING} | changes
    return Deliver("r", site, 1, 0, "b" * 64, bytes=len(frame), **options)


def test_what_is_sums_leaves_with_its_shapes_and_counts() -> None:
    frame = encode(sums())
    assert fault_of(frame) == "" and examine(deliver(frame), frame).fault == ""
    assert {s.name: s.shape for s in inspect_evaluation(frame)}["test"] == (1, 10)
    assert examine(deliver(frame, parts=(1, 0, 0)), frame).fault == "content"
    assert examine(deliver(frame, sha256="0" * 64), frame).fault == "transport"
    assert examine(deliver(frame), frame + b"\0").fault == "transport"
    assert examine(deliver(frame), frame, 4.0).fault == ""
    assert examine(deliver(frame), frame, 3.0).fault == "content", "more examples than a site's word is taken for"
    assert fault_of(b"no frame")


def asked(process: Process, data: FederatedDataset, **more: Any) -> dict[str, Tensor]:
    """What a site answers to an evaluation of the first model."""
    task = process.open_global(process.init(), tuple(data.clients), 1)
    values, parts = pack_task(task)
    content = b"".join(bytes(part) for part in parts)
    work = Work("r", 1, 0, content_hash(content), len(content), "evaluate", 0, task.clients, 1, values, None)
    return decode(Trainer(process, data, **more)(work, bytearray(content), b"").frame, schema(), Limits(bytes=LARGEST))


def test_nothing_is_said_of_a_split_that_was_not_asked_for() -> None:
    process, data = Process(network(), fedavg(PLAN), engine="loop"), clients().select(["c1"])
    both, one = asked(process, data), asked(process, data, splits=("validation",))
    assert (both["validation"][0, 1], both["test"][0, 1]) == (3, 7)
    assert torch.equal(one["validation"], both["validation"]) and one["test"].tolist() == [[0, 0]]


def test_metrics_of_more_sums_than_an_answer_has_are_told_of() -> None:
    model = atoll.Model(nn.Linear(5, 2), "cross_entropy", metrics=(atoll.metrics.auc(bins=2**15),))
    with pytest.raises(RunError, match=f"more than the {LARGEST} of an answer"):
        asked(Process(model, fedavg(PLAN), engine="loop"), two_classes())


def test_outputs_that_are_not_finite_are_told_as_such() -> None:
    some = (torch.full((1, 5), 1e25), torch.zeros(1, 1))
    data, model = FederatedDataset.from_arrays({"a": some}, test={"a": some}), atoll.Model(nn.Linear(5, 1), "mse")
    with pytest.raises(NonFiniteError, match="on test examples are not finite"):
        asked(Process(model, fedavg(PLAN), engine="loop"), data)


def two_classes() -> FederatedDataset:
    some = (torch.ones(4, 5), torch.tensor([0, 1, 0, 1]))
    return FederatedDataset.from_arrays({"a": some}, validation={"a": some}, test={"a": some})


def test_a_site_that_tells_of_another_model_is_left_out_and_named() -> None:
    from world import Disk

    spool, claims = Spool(Disk()), list[Deliver]()
    other = {"outputs": torch.tensor([7]), "test": torch.ones(1, 30, dtype=torch.float64)}
    for site, answer in {"a": sums(**other), "b": sums(), "c": sums(), "d": sums(test=sums()["validation"])}.items():
        frame = encode(answer)
        claims.append(deliver(frame, site))
        spool.put(claims[-1], Content(frame))
    process = Process(network(), fedavg(PLAN))
    said = added(process, spool, claims, personal=True)
    assert list(said.splits) == ["test"] and said.splits["test"].clients == ("b", "c")
    assert said.splits["test"].metrics["loss"] == 0.75 and said.splits["test"].metrics["accuracy"] == 0.5
    (note,) = (n for n in said.notes if "left out" in n)
    assert note.startswith("What a said")
    assert added(process, spool, claims[3:], personal=True) == ({}, ())
    frame = encode(sums(**{"personal/test": sums()["test"]}))
    spool.put(deliver(frame, "e"), Content(frame))
    assert list(added(process, spool, [deliver(frame, "e")], personal=True).splits) == ["test", "personal/test"]
    assert list(added(process, spool, [deliver(frame, "e")], personal=False).splits) == ["test"]


def test_metrics_that_break_do_not_stop_the_run() -> None:
    class Broken:
        """A metric that breaks where it is added up, at the server alone."""

        name, size, kind, higher_is_better = "broken", 1, "classification", True
        spec = {"name": "broken"}  # noqa: RUF012

        def check(self, output: Tensor, target: Tensor) -> None:
            return

        def accumulate(self, output: Tensor, target: Tensor, client: Tensor, clients: int) -> Tensor:
            return torch.ones(clients, 1, dtype=torch.float64)

        def finish(self, sums: Tensor) -> Tensor:
            raise ZeroDivisionError("by nought")

        def undefined(self, sums: Tensor) -> None:
            return

    def made() -> Process:
        torch.manual_seed(1)
        model = atoll.Model(nn.Linear(5, 3), "cross_entropy", metrics=(Broken(),))
        return Process(model, fedavg(PLAN), engine="loop")

    whole = clients()
    world = deploy(made, whole, 2, {c: Trainer(made(), whole.select([c])) for c in whole.clients}, evaluate=1)
    assert not world.said and [n for n in world.notices if "not evaluated" in n and "nought" in n]


def made() -> Process:
    return Process(network(), fedavg(PLAN), engine="loop")


class Silent(Trainer):
    """Trains, and raises this error when it is asked what a model is worth."""

    error: Exception

    def __call__(self, work: Work, content: Buffer, memory: Buffer) -> Any:
        if work.kind == "evaluate":
            raise self.error
        return super().__call__(work, content, memory)


def silent(data: FederatedDataset, error: Exception) -> Trainer:
    trainer = Silent(made(), data)
    trainer.error = error
    return trainer


def test_an_evaluation_that_nobody_answers_is_told_of() -> None:
    whole = clients()
    training = {c: silent(whole.select([c]), RunError("it tells nothing.")) for c in whole.clients}
    world = deploy(made, whole, 2, training, evaluate=1)
    told = [n for n in world.notices if "not evaluated" in n]
    why = "no site answered (c0: it tells nothing; c1: it tells nothing; c2: it tells nothing)."
    assert told == [f"the model after round {number} is not evaluated: {why}" for number in (1, 2)] and not world.said


def test_who_is_not_in_an_evaluation_is_named_in_it() -> None:
    whole = clients()
    training = {c: Trainer(made(), whole.select([c])) for c in whole.clients}
    training["c1"] = silent(whole.select(["c1"]), NonFiniteError("not finite."))
    said = deploy(made, whole, 1, training, evaluate=1).said[1]
    assert said.splits["test"].clients == ("c2",)
    assert said.notes[-1] == "1 of 3 sites said nothing of the model (c1: not finite)."
