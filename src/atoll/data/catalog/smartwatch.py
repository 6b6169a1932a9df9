"""Shoulder exercises from smart-watches, cut into windows."""

import io
import zipfile
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from atoll import random
from atoll.data.arrays import GROUP, TARGET
from atoll.data.dataset import FederatedDataset
from atoll.errors import invalid

EXERCISES = ("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW")
"""Pendulum, abduction, forward elevation, internal and external rotation with a band, trapezius and bent-over row."""

CHANNELS = ("ax", "ay", "az", "wx", "wy", "wz")
"""Acceleration and rotation along the three axes of the watch, 50 times a second."""


def smartwatch(*, window: int = 128, step: int = 64, test: float = 0.3, seed: int = 0) -> FederatedDataset:
    """Seven shoulder exercises of ten wearers: which one is being done?

    Every wearer did every exercise once with each arm. Of each of these 140 recordings one stretch, at a place drawn by
    the seed, is the test; windows are cut inside the stretches, so that no sample is in training and in test. The field
    "cut_group" numbers the stretches: what `split` cuts from training, for validation, is whole ones.

    Args:
        window: samples in a window, at 50 Hz.
        step: samples from the beginning of a window to that of the next.
        test: fraction of each recording for test, in (0, 0.5].
        seed: of where the test stretches lie.

    Returns:
        The dataset, clients "wearer-01" to "wearer-10": x float32 [n, 6, window] as recorded, y int64 [n] in 0..6,
        cut_group int64 [n].

    Raises:
        InvalidArgument: arguments that leave some wearer without examples.

    Source: Burns et al. 2018, "Shoulder physiotherapy exercise recognition", arXiv:1802.01489, by way of seglearn
    (BSD 3-Clause).
    """
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        raise invalid("step", step, "a number of samples of at least 1")
    if not 0 < test <= 0.5:
        raise invalid("test", test, "a fraction in (0, 0.5]")
    signals, lengths, labels, wearers = _recordings("signals", "lengths", "exercise", "subject")
    shortest = int(test * int(lengths.min()))
    if isinstance(window, bool) or not isinstance(window, int) or not 1 <= window <= shortest:
        raise invalid("window", window, f"a number of samples from 1 to {shortest}", f"test={test:g} of a recording.")
    ends = np.cumsum(lengths)
    places = random.uniforms(random.key(seed, "smartwatch"), 0, np.arange(len(lengths), dtype=np.uint64), 1)[:, 0]
    train, held = ({n: list[_Stretch]() for n in sorted(set(wearers.tolist()))} for _ in range(2))
    for number, (end, length, place) in enumerate(zip(ends.tolist(), lengths.tolist(), places.tolist(), strict=True)):
        recording, wearer = signals[end - length : end], int(wearers[number])
        count = int(test * length)
        begin = round(place * (length - count))
        before, inside, behind = np.split(recording, (begin, begin + count))
        for third, (into, part) in enumerate(((train, before), (train, behind), (held, inside))):
            into[wearer].append(_Stretch(_windows(part, window, step), int(labels[number]), 3 * number + third))
    return FederatedDataset.from_arrays(
        {_name(n): _joined(v) for n, v in train.items()},
        test={_name(n): _joined(v) for n, v in held.items()},
        name="smartwatch",
    )


class _Stretch(NamedTuple):
    """The windows [n, 6, window] of one stretch, the exercise, and the number of the stretch among all."""

    windows: NDArray[np.float32]
    label: int
    number: int


def _recordings(*names: str) -> list[NDArray[Any]]:
    """Arrays of the bundled file; it holds no objects, and none would be made."""
    content = files("atoll.data.catalog").joinpath("files", "smartwatch_exercises.npz").read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        read = [io.BytesIO(archive.read(f"{name}.npy")) for name in names]
    return [np.lib.format.read_array(file, allow_pickle=False) for file in read]


def _windows(samples: NDArray[np.float32], window: int, step: int) -> NDArray[np.float32]:
    """[n, 6, window], whole ones only."""
    if len(samples) < window:
        return np.zeros((0, samples.shape[1], window), dtype=np.float32)
    return np.lib.stride_tricks.sliding_window_view(samples, window, axis=0)[::step]


def _joined(found: list[_Stretch]) -> dict[str, NDArray[Any]]:
    sizes = [len(stretch.windows) for stretch in found]
    return {
        "x": np.concatenate([stretch.windows for stretch in found]),
        TARGET: np.repeat(np.array([stretch.label for stretch in found], dtype=np.int64), sizes),
        GROUP: np.repeat(np.array([stretch.number for stretch in found], dtype=np.int64), sizes),
    }


def _name(number: int) -> str:
    return f"wearer-{number:02d}"
