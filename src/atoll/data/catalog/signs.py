"""German traffic signs, as a fleet of vehicles drives past them."""

import io
import re
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from atoll import random
from atoll.data.arrays import GROUP, TARGET
from atoll.data.catalog.dealing import owners
from atoll.data.catalog.fetching import locate
from atoll.data.dataset import FederatedDataset
from atoll.errors import DataError, invalid

FILE = "gtsrb-third.zip"
CHECKSUMS: Mapping[str, str] = MappingProxyType(
    {FILE: "18a94937361b0d21c78bec1c1bc012dcc66079d9dce09076915bd41b67266c89"}
)

CLASSES = 43
SIDE = 32

_HEADER = re.compile(rb"P6\s(?:#[^\n]*\n)*%d\s%d\s255\s" % (SIDE, SIDE))


def traffic_signs(vehicles: int = 20, *, alpha: float = 1.0, test: float = 0.2, seed: int = 0) -> FederatedDataset:
    """43 kinds of German traffic signs, seen by vehicles that drive on different roads.

    A track is one physical sign, photographed several times as a car comes nearer. All pictures of a track belong to
    one vehicle, and either to its training or to its test; the field "cut_group" numbers tracks, so that `split` cuts
    whole ones for validation. Which signs stand on a vehicle's roads is drawn as in a Dirichlet partition. The
    official test pictures, other signs again, are the holdout.

    Args:
        vehicles: how many clients.
        alpha: concentration: small means that vehicles see few kinds of signs, large that all see the same.
        test: fraction of each vehicle's tracks for test, in (0, 1).
        seed: of the roads and of the cut.

    Returns:
        The dataset, clients "vehicle-00" and so on: x float32 [n, 3, 32, 32] in [0, 1], y int64 [n], cut_group
        int64 [n] (-1 in the holdout, whose tracks are not known). Every third picture of GTSRB, scaled to 32 x 32.

    Raises:
        DataError: the archive is not at hand, or is not that of the data set.

    Source: Stallkamp et al. 2012, "Man vs. computer", doi:10.1016/j.neunet.2012.02.016; free for research.
    """
    if not 0 < test < 1:
        raise invalid("test", test, "a fraction in (0, 1)")
    content = locate(
        "traffic_signs", CHECKSUMS, source="the authors of GTSRB (every third frame, 32 x 32, as one zip)"
    )[FILE]
    x, tracks, held, held_labels = _decoded(content)
    places = {track: number for number, track in enumerate(sorted(set(tracks)))}
    of_track = torch.tensor([label for label, _ in places])
    owner = owners("dirichlet", of_track, vehicles, seed=seed, options={"alpha": alpha})
    names = sorted(set(owner.tolist()))
    number = np.array([places[t] for t in tracks])
    y = np.array([label for label, _ in tracks])
    train, own = dict[str, dict[str, torch.Tensor]](), dict[str, dict[str, torch.Tensor]]()
    for place, name in enumerate(names):
        mine = np.flatnonzero(owner == name)
        if len(mine) < 2:
            raise invalid("vehicles", vehicles, f"fewer, or a larger alpha than {alpha:g}", "Some see a single sign.")
        drawn = random.numpy_generator(seed, "signs", place).permutation(mine)
        count = min(len(mine) - 1, max(1, round(test * len(mine))))
        for into, chosen in ((own, drawn[:count]), (train, drawn[count:])):
            rows = np.isin(number, chosen)
            into[f"vehicle-{place:02d}"] = {
                "x": _scaled(x[rows]),
                TARGET: torch.from_numpy(y[rows]),
                GROUP: torch.from_numpy(number[rows]),
            }
    official = {
        "x": _scaled(held),
        TARGET: torch.tensor(held_labels),
        GROUP: torch.full((len(held),), -1),
    }
    return FederatedDataset.from_arrays(train, test=own, holdout=official, name="traffic_signs")


@lru_cache(maxsize=1)
def _decoded(content: bytes) -> tuple[NDArray[np.uint8], list[tuple[int, int]], NDArray[np.uint8], list[int]]:
    """Pictures and (class, track) of the training set, pictures and classes of the official test."""
    images, tracks = list[NDArray[np.uint8]](), list[tuple[int, int]]()
    held, held_labels = list[NDArray[np.uint8]](), list[int]()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        known = _official(archive.read("GTSRB/Final_Test/GT-final_test.csv"))
        for name in sorted(archive.namelist()):
            if not name.endswith(".ppm"):
                continue
            image, (*_, folder, file) = decode_ppm(archive.read(name), name), name.split("/")
            if "Final_Training" in name:
                images.append(image)
                tracks.append((int(folder), int(file.split("_")[0])))
            else:
                held.append(image)
                held_labels.append(known[file])
    return np.stack(images), tracks, np.stack(held), held_labels


def _official(content: bytes) -> dict[str, int]:
    """The class of each official test picture, from its table."""
    lines = content.decode("ascii").split()
    place = lines[0].split(";").index("ClassId")
    return {line.split(";")[0]: int(line.split(";")[place]) for line in lines[1:]}


def decode_ppm(content: bytes, name: str) -> NDArray[np.uint8]:
    """A picture of 32 x 32 pixels in the binary PPM format: uint8 [3, 32, 32].

    Raises:
        DataError: it is something else.
    """
    header = _HEADER.match(content)
    if header is None or len(content) - header.end() != 3 * SIDE * SIDE:
        raise DataError(f"{name} is not a PPM picture of {SIDE} x {SIDE} pixels.")
    pixels = np.frombuffer(content, dtype=np.uint8, offset=header.end())
    return pixels.reshape(SIDE, SIDE, 3).transpose(2, 0, 1)


def _scaled(images: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).to(torch.float32).div_(255.0)
