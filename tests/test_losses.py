"""Losses against torch's own means, values by hand, and the refusals of `check`."""

import functools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from atoll import losses
from atoll.errors import AtollError, DataError, InvalidArgument


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _labels(*shape: int, classes: int, seed: int = 1) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def _batch(name: str) -> tuple[Tensor, Tensor]:
    if name == "cross_entropy":
        return _normal(6, 4), _labels(6, classes=4)
    if name == "nll":
        return _normal(6, 4).log_softmax(1), _labels(6, classes=4)
    if name == "binary_cross_entropy":
        return _normal(6, 1), _labels(6, classes=2)
    if name == "poisson":
        return _normal(6), _labels(6, classes=5)
    return _normal(6, 3), _normal(6, 3, seed=2)


MEANS = {
    "cross_entropy": functional.cross_entropy,
    "nll": functional.nll_loss,
    "binary_cross_entropy": lambda o, t: functional.binary_cross_entropy_with_logits(o.flatten(), t.double()),
    "mse": functional.mse_loss,
    "mae": functional.l1_loss,
    "huber": functional.huber_loss,
    "poisson": functional.poisson_nll_loss,
}


def test_every_name_is_tested():
    assert set(losses.names()) == set(MEANS)


@pytest.mark.parametrize("name", losses.names())
def test_mean_of_losses_is_torchs_mean(name: str):
    output, target = _batch(name)
    loss = losses.get(name)
    loss.check(output, target)
    values = loss.per_example(output, target)
    assert values.shape == (6,)
    torch.testing.assert_close(values.mean(), MEANS[name](output, target))
    torch.testing.assert_close(loss.mean(output, target), values.mean())


@pytest.mark.parametrize("name", losses.names())
def test_a_loss_depends_on_its_own_example_alone(name: str):
    output, target = _batch(name)
    function = losses.get(name).per_example
    alone = torch.cat([function(output[i : i + 1], target[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(function(output, target), alone)


@pytest.mark.parametrize("name", losses.names())
def test_vmap_over_clients_and_its_gradient(name: str):
    output, target = _batch(name)
    function = losses.get(name).per_example
    rows, truth = torch.stack([output, 0.5 * output]), torch.stack([target, target])
    if name == "nll":
        rows = rows.log_softmax(-1)
    torch.testing.assert_close(
        torch.func.vmap(function)(rows, truth), torch.stack([function(a, b) for a, b in zip(rows, truth, strict=True)])
    )
    slope = torch.func.vmap(torch.func.grad(lambda a, b: function(a, b).sum()))(rows, truth)
    leaf = rows.clone().requires_grad_()
    sum(function(a, b).sum() for a, b in zip(leaf, truth, strict=True)).backward()
    torch.testing.assert_close(slope, leaf.grad)


@pytest.mark.parametrize("name", losses.names())
def test_an_empty_batch_gives_no_losses(name: str):
    output, target = (tensor[:0] for tensor in _batch(name))
    losses.get(name).check(output, target)
    assert losses.get(name).per_example(output, target).shape == (0,)


def test_values_by_hand():
    half = torch.tensor(0.5, dtype=torch.float64)
    zero = torch.zeros(2, 1, dtype=torch.float64)
    bce = losses.get("binary_cross_entropy").per_example
    torch.testing.assert_close(bce(zero, torch.tensor([0, 1])), -half.log().expand(2))
    error = torch.tensor([[0.5], [3.0]])
    assert losses.get("huber").per_example(error, torch.zeros(2)).tolist() == [0.125, 2.5]
    assert losses.get("mae").per_example(error, torch.zeros(2)).tolist() == [0.5, 3.0]
    assert losses.get("mse").per_example(error, torch.zeros(2)).tolist() == [0.25, 9.0]
    assert losses.get("poisson").per_example(torch.zeros(2), torch.tensor([0, 7])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["cross_entropy", "nll"])
def test_further_axes_are_averaged_per_example(name: str):
    output, target = _normal(3, 4, 2, 5).log_softmax(1), _labels(3, 2, 5, classes=4)
    loss = losses.get(name)
    loss.check(output, target)
    values = loss.per_example(output, target)
    assert values.shape == (3,)
    torch.testing.assert_close(values.mean(), MEANS[name](output, target))


@pytest.mark.parametrize("first", [(5,), (5, 1)])
@pytest.mark.parametrize("second", [(5,), (5, 1)])
@pytest.mark.parametrize("name", ["binary_cross_entropy", "mse", "mae", "huber", "poisson"])
def test_a_trailing_one_never_broadcasts(name: str, first: tuple[int, ...], second: tuple[int, ...]):
    output, target = _normal(5), _labels(5, classes=2).double()
    loss = losses.get(name)
    loss.check(output.reshape(first), target.reshape(second))
    values = loss.per_example(output.reshape(first), target.reshape(second))
    torch.testing.assert_close(values, loss.per_example(output, target))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64])
def test_binary_targets_of_any_dtype(dtype: torch.dtype):
    output, target = _normal(8, 1), _labels(8, classes=2).to(dtype)
    loss = losses.get("binary_cross_entropy")
    loss.check(output, target)
    torch.testing.assert_close(loss.per_example(output, target), loss.per_example(output, target.double()))


@pytest.mark.parametrize("name", losses.names())
def test_losses_keep_the_outputs_dtype(name: str):
    output, target = _batch(name)
    for dtype in (torch.float32, torch.float64):
        assert losses.get(name).per_example(output.to(dtype), target).dtype == dtype


REFUSED = {
    "one output for classes": ("cross_entropy", (4, 1), torch.zeros(4, dtype=torch.int64), r"\(4, 1\).*\[4\].*binary"),
    "one-hot": ("cross_entropy", (4, 3), torch.zeros(4, 3, dtype=torch.int64), r"argmax"),
    "column of labels": ("cross_entropy", (4, 3), torch.zeros(4, 1, dtype=torch.int64), r"squeeze"),
    "rows differ": ("cross_entropy", (4, 3), torch.zeros(5, dtype=torch.int64), r"\(4, 3\).*\[5\]"),
    "float labels": ("cross_entropy", (4, 3), torch.zeros(4), r"float32.*long"),
    "label too large": ("cross_entropy", (4, 3), torch.tensor([0, 3, 9, 2]), r"3, 9 \(2 of 4\).*0\.\.2"),
    "label negative": ("nll", (4, 3), torch.tensor([0, -1, -1, 2]), r"-1 \(2 of 4\).*0\.\.2"),
    "many wrong labels": ("cross_entropy", (9, 2), torch.arange(9), r"2, 3, 4, 5, 6, \.\.\. \(7 of 9\)"),
    "logits for nll": ("nll", (4, 3), torch.zeros(4, dtype=torch.int64), r"log_softmax"),
    "two outputs for binary": ("binary_cross_entropy", (4, 2), torch.zeros(4), r"\(4, 2\).*cross_entropy"),
    "binary labels 1, 2": ("binary_cross_entropy", (4,), torch.tensor([1, 2, 2, 1]), r"2 \(2 of 4\).*0 and 1"),
    "binary half": ("binary_cross_entropy", (2,), torch.tensor([0.5, 1.0]), r"0\.5"),
    "binary nan": ("binary_cross_entropy", (2,), torch.tensor([torch.nan, 1.0]), r"nan"),
    "two numbers for one": ("mse", (4, 2), torch.zeros(4), r"\(4, 2\).*\[4\].*as many outputs"),
    "square of numbers": ("mae", (4, 4), torch.zeros(4, 1), r"\(4, 4\).*\[4, 1\]"),
    "boolean numbers": ("huber", (4,), torch.zeros(4, dtype=torch.bool), r"bool"),
    "nan target": ("mse", (2,), torch.tensor([torch.nan, 1.0]), r"1 NaN or infinite"),
    "negative counts": ("poisson", (2,), torch.tensor([-2, 1]), r"-2 \(1 of 2\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_check_refuses_with_the_reason(case: str):
    name, shape, target, message = REFUSED[case]
    with pytest.raises(AtollError, match=message):
        losses.get(name).check(torch.ones(shape), target)


def test_wrong_values_are_errors_of_the_data():
    with pytest.raises(DataError):
        losses.get("cross_entropy").check(torch.zeros(2, 2), torch.tensor([0, 2]))


def test_check_refuses_outputs_that_are_no_float_tensor():
    loss = losses.get("mse")
    with pytest.raises(InvalidArgument, match="float dtype"):
        loss.check(torch.zeros(3, dtype=torch.int64), torch.zeros(3))
    with pytest.raises(InvalidArgument, match="first axis"):
        loss.check(torch.tensor(0.0), torch.tensor(0.0))
    with pytest.raises(InvalidArgument, match="a tensor"):
        loss.check((torch.zeros(3),), torch.zeros(3))  # type: ignore[arg-type]


def test_unknown_names_suggest_the_closest():
    with pytest.raises(InvalidArgument, match=r"cross_entopy.*Did you mean 'cross_entropy'"):
        losses.get("cross_entopy")
    with pytest.raises(InvalidArgument, match="callable"):
        losses.get(3)  # type: ignore[arg-type]


def _losses(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().sum(1)


def test_callables_are_told_apart_by_trial():
    output, target = _normal(4, 3), _normal(4, 3, seed=5)
    assert losses.classify(_losses, output, target) == "per_example"
    assert losses.classify(lambda o, t: _losses(o, t).mean(), output, target) == "mean"
    loss = losses.Loss.from_callable(_losses, output, target)
    assert (loss.name, loss.kind, loss.returns) == ("_losses", "any", "per_example")
    torch.testing.assert_close(loss.mean(output, target), _losses(output, target).mean())


def test_a_mean_has_no_losses_per_example():
    output, target = _normal(4, 3), _normal(4, 3, seed=5)
    loss = losses.get(torch.nn.MSELoss(), output, target)
    assert (loss.name, loss.returns) == ("MSELoss", "mean")
    torch.testing.assert_close(loss.mean(output, target), functional.mse_loss(output, target))
    with pytest.raises(InvalidArgument, match="reduction='none'"):
        _ = loss.per_example


def test_an_untried_callable_is_tried_before_use():
    output, target = _normal(4, 3), _normal(4, 3, seed=5)
    loss = losses.get(functools.partial(_losses))
    assert (loss.name, loss.returns) == ("_losses", None)
    with pytest.raises(InvalidArgument, match="tried"):
        _ = loss.per_example
    with pytest.raises(InvalidArgument, match="tried"):
        loss.mean(output, target)
    assert loss.tried(output, target).per_example(output, target).shape == (4,)
    loss.check(output, target)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda o, t: (o - t).square(), r"\[4, 3\]"),
        (lambda o, t: (o - t).square().sum(), "a sum"),
        (lambda o, t: (o - t).square().mean(1)[:3], r"\[3\]"),
        (lambda o, t: 1.0, "float"),
        (lambda o, t: (o > t).sum(), "int64"),
    ],
)
def test_other_results_are_refused(function: losses.LossFunction, message: str):
    with pytest.raises(InvalidArgument, match=message):
        losses.classify(function, _normal(4, 3), _normal(4, 3, seed=5))


def test_a_trial_needs_two_examples():
    with pytest.raises(InvalidArgument, match="two examples"):
        losses.classify(_losses, _normal(1, 3), _normal(1, 3))


def test_a_loss_with_parameters_is_refused():
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return self.scale * (output - target).square().mean(1)

    with pytest.raises(InvalidArgument, match="without parameters"):
        losses.get(Scaled())


def test_a_loss_comes_back_as_it_is():
    loss = losses.get("mse")
    assert losses.get(loss) is loss
