"""Keyed dropout: right in distribution, the same from every engine, different where it must be."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from atoll import random
from atoll.engines.dropout import Draw, KeyedDropout, SeededDraws


def keyed(client: str = "a", *, seed: int = 0, purpose: str = "train", round: int = 0, step: int = 0) -> KeyedDropout:
    return KeyedDropout(Draw(seed, purpose, round, random.client_keys([client]), np.array([step])))


def test_kept_values_are_scaled_and_as_many_as_promised() -> None:
    with keyed():
        out = functional.dropout(torch.ones(200, 100), 0.3)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    share = (out > 0).double().mean().item()
    assert abs(share - 0.7) < 5 * (0.21 / 20000) ** 0.5


def test_every_part_of_the_key_matters_and_nothing_else() -> None:
    def mask(mode: KeyedDropout) -> torch.Tensor:
        torch.rand(3)
        with mode:
            return functional.dropout(torch.ones(64), 0.5)

    base = mask(keyed())
    assert torch.equal(base, mask(keyed()))
    for other in (keyed("b"), keyed(seed=1), keyed(purpose="tune"), keyed(round=1), keyed(step=1)):
        assert not torch.equal(base, mask(other))


def test_two_calls_in_one_step_draw_two_masks() -> None:
    with keyed():
        first, second = functional.dropout(torch.ones(64)), functional.dropout(torch.ones(64))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("function", "shape", "axes"),
    [
        (functional.dropout1d, (3, 8, 5), 1),
        (functional.dropout2d, (3, 8, 4, 4), 2),
        (functional.dropout3d, (2, 8, 2, 2, 2), 3),
    ],
)
def test_featurewise_kinds_drop_whole_channels(function: object, shape: tuple[int, ...], axes: int) -> None:
    with keyed():
        out = function(torch.ones(shape), 0.5)  # type: ignore[operator]
    flat = out.flatten(out.ndim - axes)
    assert torch.equal(flat.amin(-1), flat.amax(-1))
    assert set(out.unique().tolist()) == {0.0, 2.0}


def test_eval_and_rate_zero_leave_the_input_alone_and_rate_one_nothing_of_it() -> None:
    x = torch.randn(8, generator=torch.Generator().manual_seed(0))
    with keyed():
        assert functional.dropout(x, 0.5, training=False) is x and functional.dropout(x, 0.0) is x
        assert torch.equal(functional.dropout(x, 1.0), torch.zeros(8))
        changed = x.clone()
        assert functional.dropout(changed, 0.5, inplace=True) is changed and not torch.equal(changed, x)


def test_rows_draw_what_single_clients_draw() -> None:
    names, steps = ["a", "b", "c"], np.array([0, 3, 5])
    mode = KeyedDropout(Draw(7, "train", 2, random.client_keys(names), steps))

    def one(x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        mode.row = row
        with mode:
            return functional.dropout(x, 0.5)

    together = torch.vmap(one)(torch.ones(3, 4, 5), torch.arange(3))
    for i, name in enumerate(names):
        with KeyedDropout(Draw(7, "train", 2, random.client_keys([name]), steps[i : i + 1])):
            assert torch.equal(together[i], functional.dropout(torch.ones(4, 5), 0.5))


def test_seeded_draws_put_torchs_generator_back() -> None:
    before = torch.default_generator.get_state()
    with SeededDraws(0, "train", 0, 5, 1):
        first = torch.rand(4)
    assert torch.equal(before, torch.default_generator.get_state())
    with SeededDraws(0, "train", 0, 5, 1):
        assert torch.equal(first, torch.rand(4))
    with pytest.raises(ZeroDivisionError), SeededDraws(0, "train", 0, 5, 2):
        assert not torch.equal(first, torch.rand(4))
        raise ZeroDivisionError
    assert torch.equal(before, torch.default_generator.get_state())
