"""FedMD and FedDF: degeneracies, one step by hand, and what travels."""

from typing import Any

import pytest
import torch
from registry import stack
from torch import Tensor, nn

import atoll
from atoll.algorithms import fedavg, local_only
from atoll.data import FederatedDataset
from atoll.errors import DataError, InvalidArgument
from atoll.local import local_sgd
from atoll.model import Model

PLAN = local_sgd(0.2, epochs=2, batch_size=4)
NOTHING = local_sgd(0.2, steps=0)
DIGEST = local_sgd(0.3, epochs=1, batch_size=8)
GROUPS = {"c0": "wide", "c1": "linear", "c2": "wide", "c3": "linear"}


def linear(metrics: tuple[str, ...] = ("accuracy",)) -> Model:
    torch.manual_seed(1)
    return Model(stack(head=nn.Linear(4, 3)).double(), "cross_entropy", metrics)


def wide() -> Model:
    torch.manual_seed(2)
    return Model(
        stack(body=nn.Linear(4, 8), norm=nn.BatchNorm1d(8), act=nn.Tanh(), head=nn.Linear(8, 3)).double(),
        "cross_entropy", ("accuracy",),
    )  # fmt: skip


def two() -> Model:
    """A model of two classes."""
    return Model(stack(head=nn.Linear(4, 2)).double(), "cross_entropy", ("accuracy",))


MODELS = {"wide": wide(), "linear": linear()}


def data(sizes: tuple[int, ...] = (12, 20, 8, 16)) -> FederatedDataset:
    draw = torch.Generator().manual_seed(3)
    clients: dict[str, tuple[Tensor, Tensor]] = {}
    for i, n in enumerate(sizes):
        y = torch.arange(n) % 3
        clients[f"c{i}"] = (torch.randn(n, 4, generator=draw, dtype=torch.float64) + y[:, None], y)
    return FederatedDataset.from_arrays(clients, test=clients)


def public(n: int = 24) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64) + 1


def run(method: Any, models: Any = None, groups: Any = None, rounds: int = 2, **options: Any) -> Any:
    chosen = {"plan": PLAN, "digest": DIGEST, "public": public(), **options}
    return atoll.distill(models or MODELS, data(), groups=groups or GROUPS, rounds=rounds, method=method, **chosen)


def test_feddf_of_one_group_that_digests_nothing_is_federated_averaging() -> None:
    for model in (linear(), wide()):
        found = run("feddf", {"all": model}, dict.fromkeys(GROUPS, "all"), rounds=3, digest=NOTHING)
        expected = atoll.simulate(model, data(), algorithm=fedavg(PLAN), rounds=3, progress=False)
        torch.testing.assert_close(found.groups_held["all"].vector, expected.vector, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.groups_held["all"].buffers, expected.buffers, rtol=0, atol=1e-12)
        for own, other in zip(found.history, expected.history, strict=True):
            assert own.train["loss"] == pytest.approx(other.train["loss"], abs=1e-12)
            assert own.test == pytest.approx(other.test, abs=1e-12)


def test_fedmd_that_digests_nothing_is_everybody_alone() -> None:
    found = run("fedmd", {"all": wide()}, dict.fromkeys(GROUPS, "all"), digest=NOTHING)
    expected = atoll.simulate(wide(), data(), algorithm=local_only(PLAN), rounds=2, progress=False)
    for client in GROUPS:
        torch.testing.assert_close(found.held(client).vector, expected.personal(client), rtol=0, atol=1e-12)


def kl_gradient(weight: Tensor, bias: Tensor, x: Tensor, p: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Of T^2 KL(p || softmax(z / T)) averaged over examples: T (softmax(z / T) - p) for z."""
    slope = t * (torch.softmax((x @ weight.T + bias) / t, 1) - p) / len(x)
    return slope.T @ x, slope.sum(0)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_feddf_teaches_with_the_mean_answer_of_all_groups(temperature: float) -> None:
    """One whole step of the server on a linear student, by hand."""
    options: dict[str, Any] = {"temperature": temperature, "rounds": 1}
    before = run("feddf", digest=NOTHING, **options)
    after = run("feddf", digest=local_sgd(0.5, steps=1, batch_size=None), **options)
    answers: list[Tensor] = []
    for client, group in GROUPS.items():
        single = atoll.distill(
            {group: MODELS[group]}, data().select([client]), groups={client: group}, public=public(), plan=PLAN,
            digest=NOTHING, rounds=1, method="feddf",
        )  # fmt: skip
        answers.append(single.predict(public(), client))
    p = torch.softmax(sum(answers) / len(answers) / temperature, 1)  # type: ignore[arg-type]
    views = MODELS["linear"].layout.view(before.groups_held["linear"].vector)
    slope, shift = kl_gradient(views["head.weight"], views["head.bias"], public(), p, temperature)
    found = MODELS["linear"].layout.view(after.groups_held["linear"].vector)
    torch.testing.assert_close(found["head.weight"], views["head.weight"] - 0.5 * slope, rtol=0, atol=1e-12)
    torch.testing.assert_close(found["head.bias"], views["head.bias"] - 0.5 * shift, rtol=0, atol=1e-12)


def test_fedmd_teaches_with_the_mean_answer_of_the_cohort() -> None:
    start = {g: m.init(5) for g, m in MODELS.items()}
    found = run(
        "fedmd", plan=NOTHING, digest=local_sgd(0.5, steps=1, batch_size=None), rounds=1, initial=start,
        cohort=atoll.sampling.sequence([["c0", "c1"]]),
    )  # fmt: skip
    answers = [MODELS[g].module(start[g])(public()) for g in ("wide", "linear")]
    p = torch.softmax(sum(answers) / 2, 1).detach()  # type: ignore[arg-type]
    views = MODELS["linear"].layout.view(start["linear"])
    slope, shift = kl_gradient(views["head.weight"], views["head.bias"], public(), p, 1.0)
    own = MODELS["linear"].layout.view(found.held("c1").vector)
    torch.testing.assert_close(own["head.weight"], views["head.weight"] - 0.5 * slope, rtol=0, atol=1e-12)
    torch.testing.assert_close(own["head.bias"], views["head.bias"] - 0.5 * shift, rtol=0, atol=1e-12)
    assert torch.equal(found.held("c3").vector, start["linear"]), "who was not asked stays"


def test_a_student_that_is_its_own_teacher_learns_nothing() -> None:
    options: dict[str, Any] = {"public": public(), "plan": PLAN, "rounds": 2, "groups": {"c1": "linear"}}
    one = data().select(["c1"])
    found = [atoll.distill({"linear": linear()}, one, digest=d, method="feddf", **options) for d in (NOTHING, DIGEST)]
    torch.testing.assert_close(
        found[1].groups_held["linear"].vector, found[0].groups_held["linear"].vector, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("method", ["fedmd", "feddf"])
def test_engines_agree_and_seeds_repeat(method: str) -> None:
    loop, fast, again = (run(method, engine=e) for e in ("loop", "auto", "auto"))
    for client in GROUPS:
        torch.testing.assert_close(fast.held(client).vector, loop.held(client).vector, rtol=0, atol=1e-11)
        assert torch.equal(fast.held(client).vector, again.held(client).vector)
    assert not torch.equal(run(method, seed=1).held("c0").vector, fast.held("c0").vector)


def test_different_architectures_come_to_answer_alike() -> None:
    apart, together = (run("fedmd", rounds=6, digest=d) for d in (NOTHING, local_sgd(0.3, epochs=4, batch_size=8)))

    def distance(found: Any) -> float:
        said = [torch.softmax(found.predict(public(), c), 1) for c in GROUPS]
        mean = sum(said) / len(said)  # type: ignore[arg-type]
        return float(sum((s - mean).abs().sum() for s in said))

    assert distance(together) < 0.8 * distance(apart)


def test_what_travels_is_answers_or_models() -> None:
    fedmd, feddf = run("fedmd", rounds=1).history[0], run("feddf", rounds=1).history[0]
    assert fedmd.bytes_up == fedmd.bytes_down == 4 * 24 * 3 * 8
    sizes = sum(MODELS[g].size + MODELS[g].buffer_layout.size for g in GROUPS.values())
    assert feddf.bytes_up == feddf.bytes_down == 8 * sizes


def test_history_evaluation_and_modules_speak_of_the_same_models() -> None:
    seen: list[int] = []
    for method in ("fedmd", "feddf"):
        found = run(method, callbacks=(lambda r: seen.append(r.round),))
        assert found.history[-1].test == found.evaluate(data()).metrics
        assert found.evaluate(data()).clients == ("c0", "c1", "c2", "c3")
        x = public()
        torch.testing.assert_close(found.module("c2")(x), found.predict(x, "c2"), rtol=0, atol=1e-12)
    assert seen == [1, 2, 1, 2]
    with pytest.raises(InvalidArgument, match="client of the run"):
        found.module("c9")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "feddx"}, '"fedmd" or "feddf"'),
        ({"groups": {"c0": "wide"}}, "'c1' has none"),
        ({"groups": {**GROUPS, "c3": "lineal"}}, "Did you mean 'linear'.*'c3'"),
        ({"groups": dict.fromkeys(GROUPS, "wide")}, "models='linear'.*groups that have clients"),
        ({"models": {}}, "mapping of group names"),
        ({"models": {**MODELS, "linear": linear(())}}, "same metrics"),
        ({"models": {**MODELS, "linear": two()}}, "each of the same classes"),
        ({"public": public()[:, :3]}, r"fails on the public inputs \(x \(24, 3\)"),
        ({"public": {"x": public(), "y": torch.zeros(24)}}, "leave y out"),
        ({"public": public()[:0]}, "tensor x"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"rounds": 0}, "rounds=0"),
        ({"plan": 0.1}, r"local_sgd\(lr="),
        ({"digest": None}, r"local_sgd\(lr="),
        ({"initial": {"wide": torch.zeros(3).double()}}, "finite vector of"),
        ({"initial": {"narrow": torch.zeros(3)}}, "initial='narrow' is unknown"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], said: str) -> None:
    given = {"method": "feddf", **options}
    if given.get("models") == {}:
        with pytest.raises(InvalidArgument, match=said):
            atoll.distill({}, data(), groups=GROUPS, public=public(), plan=PLAN, digest=DIGEST, rounds=1)
        return
    with pytest.raises(InvalidArgument, match=said):
        run(**given)


def test_public_inputs_that_are_not_finite() -> None:
    x = public()
    x[3, 1] = torch.nan
    with pytest.raises(DataError, match="NaN or infinite"):
        run("fedmd", public=x)


def test_private_plans_are_refused() -> None:
    """No ledger would count them."""
    layer = atoll.Model(torch.nn.Linear(2, 2), "cross_entropy")
    data = atoll.FederatedDataset.from_arrays({"a": (torch.randn(6, 2), torch.arange(6) % 2)})
    private = atoll.privacy.example_level(clip=1.0, noise_multiplier=1.0)
    plain, noisy = atoll.local_sgd(0.1), atoll.local_sgd(0.1, privacy=private)
    for name, plans in (("plan", (noisy, plain)), ("digest", (plain, noisy))):
        with pytest.raises(atoll.errors.InvalidArgument, match=f"{name}=.*No ledger"):
            atoll.distill(
                {"g": layer}, data, groups={"a": "g"}, public=torch.randn(4, 2), plan=plans[0], digest=plans[1],
                rounds=1,
            )  # fmt: skip
