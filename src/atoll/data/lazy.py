"""Populations that are too large to hold: a cohort's examples are made when a round asks for them.

A `Source` knows whose examples it can make and makes them for the clients it is given. `LazyDataset` puts names, cuts
and checks around it: `draw(cohort)` is an ordinary packed dataset of exactly these clients.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Never, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll.data.arrays import fields_of
from atoll.data.cutting import check_fractions
from atoll.data.dataset import ClientData, FederatedDataset
from atoll.data.files import Seen, check_files
from atoll.data.names import Numbered, PackedNames, Population, named, some
from atoll.data.packed import Split, check_finite, digest_fields, offsets_of, same_fields
from atoll.errors import DataError, invalid

CHUNK = 4096
"""Clients whose examples are held at once when the whole population is gone through."""

SAMPLE = 16
"""Clients that are drawn to try a model on, spread over the population."""

_UNKNOWN = -1


class Source(Protocol):
    """Where examples come from."""

    @property
    def files(self) -> tuple[Seen, ...]:
        """What the files it reads looked like; empty for one that reads none."""
        ...

    def read(self, places: NDArray[np.int64]) -> Split:
        """The examples of the clients at places int64 [k], at least one, in the order given."""
        ...

    def identity(self) -> str:
        """What tells this source from others, beside names, sizes and a sample of its examples."""
        ...


class Loaded:
    """A source that calls a function once for each client.

    Args:
        clients: the names.
        load: client -> (x, y) or a mapping of named fields, each [n, ...].
        version: of what it returns.
    """

    files: tuple[Seen, ...] = ()

    def __init__(self, clients: Sequence[str], load: Callable[[str], Any], version: str) -> None:
        if not callable(load):
            raise invalid("load", load, "a function of a client's name that returns its (x, y)")
        self._clients, self._load, self._version = clients, load, version
        self._like: dict[str, Tensor] | None = None
        self._first = ""

    def read(self, places: NDArray[np.int64]) -> Split:
        """Call `load` for each client and pack what it returns.

        Raises:
            DataError: when it returns something else than for the first client.
        """
        owned: list[dict[str, Tensor]] = []
        for client in names_at(self._clients, places):
            fields = fields_of(self._load(client), f"load({client!r})")
            if self._like is None:
                self._like, self._first = {name: tensor[:0] for name, tensor in fields.items()}, client
            same_fields(self._like, fields, f"load({client!r})", f"load({self._first!r})")
            owned.append(fields)
        sizes = torch.tensor([len(next(iter(fields.values()))) for fields in owned], dtype=torch.int64)
        return Split({name: torch.cat([fields[name] for fields in owned]) for name in owned[0]}, offsets_of(sizes))

    def identity(self) -> str:
        """The version; a function has no contents to be known by."""
        return f"load;{self._version}"


class LazyDataset(Population):
    """A population of clients whose examples are drawn cohort by cohort.

    Made by `FederatedDataset.from_source` and `FederatedDataset.from_parquet`. It holds no examples but those given
    as `validation`, `test` and `holdout`; what `draw` returns belongs to the caller.

    Attributes:
        clients: the names, in order.
        sizes: int64 [clients], examples the source has for each client, before any are cut off; -1 where unknown
            until it is drawn.
        validation: validation examples of all clients, where they were given; None too where they are cut when drawn.
        test: the same for test examples.
        holdout: examples that belong to no client, or None.
        name: what the data are.
        features: names of the columns of "x", or empty.
        preprocessing: None; for the sake of those who read it of a packed dataset.
    """

    __slots__ = (
        "_fingerprint",
        "_fractions",
        "_like",
        "_sample",
        "_seed",
        "_source",
        "_stratify",
        "features",
        "holdout",
        "name",
        "preprocessing",
        "sizes",
        "test",
        "validation",
    )

    def __init__(
        self,
        clients: Sequence[str],
        source: Source,
        *,
        sizes: Any = None,
        validation: Split | float | None = None,
        test: Split | float | None = None,
        seed: int = 0,
        stratify: bool = False,
        holdout: Mapping[str, Tensor] | None = None,
        name: str = "",
        features: Sequence[str] = (),
    ) -> None:
        """Check and hold what is known before anything is drawn; the first client is drawn to learn the form.

        Args:
            clients: names, all different.
            source: makes the examples.
            sizes: int64 [clients], each at least 1; None: learned as clients are drawn.
            validation: a split of all clients, or the fraction to cut from each client.
            test: a split of all clients, or the fraction to cut from each client.
            seed: of the cut.
            stratify: whether the cut keeps each client's label shares.
            holdout: fields [n, ...] of examples that belong to no client.
            name: what the data are, for reports.
            features: names of the columns of "x".

        Raises:
            DataError: when names, sizes or the first client's examples cannot be used.
        """
        if isinstance(clients, str) or len(clients) == 0:
            raise invalid("clients", clients, "at least one client name, or a number of clients of at least 1")
        self.clients = clients if isinstance(clients, Numbered | PackedNames) else tuple(clients)
        self._places = None
        self._source, self._seed, self._stratify = source, seed, stratify
        self.holdout = None if holdout is None else dict(holdout)
        self.name, self.features, self.preprocessing = name, tuple(features), None
        self._fingerprint: str | None = None
        self._sample: FederatedDataset | None = None
        # Names that are packed come from readers, which count each once.
        if isinstance(self.clients, tuple):
            for client in self.clients:
                named(client)
            index = self._index()
            if len(index) < len(self.clients):
                twice = next(name for place, name in enumerate(self.clients) if index[name] != place)
                raise DataError(f"client {twice!r} appears more than once. Give every client a name of its own.")
        self.sizes = _sizes(sizes, len(self))
        self._fractions = {
            label: 0.0 if given is None or isinstance(given, Split) else given
            for label, given in (("test", test), ("validation", validation))
        }
        check_fractions(self._fractions["test"], self._fractions["validation"])
        self.validation = validation if isinstance(validation, Split) else None
        self.test = test if isinstance(test, Split) else None
        self._like = {n: t[:0] for n, t in self._read(np.zeros(1, dtype=np.int64)).fields.items()}
        for label, split in (("validation", self.validation), ("test", self.test)):
            if split is not None:
                if len(split.offsets) - 1 != len(self):
                    raise DataError(
                        f"{label} has {len(split.offsets) - 1} clients, the population has {len(self)}. Give one pair "
                        "of offsets per client; equal offsets mean no examples."
                    )
                same_fields(self._like, split.fields, label, f"client {self.clients[0]!r}")
                check_finite(label, split.fields, split.offsets, self.clients, self.features)
        if self.holdout is not None:
            same_fields(self._like, self.holdout, "holdout", f"client {self.clients[0]!r}")
            check_finite("holdout", self.holdout, None, self.clients, self.features)

    # --- in a round --------------------------------------------------------------------------------------------------

    def draw(self, clients: Sequence[str]) -> FederatedDataset:
        """Make the examples of a cohort.

        Args:
            clients: names, all different; none gives a dataset without clients.

        Returns:
            A packed dataset of exactly these clients, in the order given, with the splits the population has and its
            holdout, checked like any other.

        Raises:
            InvalidArgument: when a name is unknown or repeated.
            DataError: when a client has no or non-finite examples, when they differ in form from the first client's,
                or in number from the last time, or when a file changed.
        """
        places = self.places(clients)
        if not len(places):
            nothing = Split(self._like, torch.zeros(1, dtype=torch.int64))
            parts: dict[str, Split | None] = {
                label: nothing if self._planned(label) else None for label in ("validation", "test")
            }
            return self._assembled((), nothing, parts["validation"], parts["test"])
        # The constructor checks what was drawn, and only that: the holdout is not gone through in every round.
        drawn = FederatedDataset(tuple(clients), self._read(places), name=self.name, features=self.features)
        if any(self._fractions.values()):
            drawn = drawn.split(**self._fractions, seed=self._seed, stratify=self._stratify)
        rows = torch.from_numpy(places)
        return self._assembled(
            drawn.clients,
            drawn.train,
            drawn.validation if self.validation is None else self.validation.take(rows),
            drawn.test if self.test is None else self.test.take(rows),
        )

    def sample(self) -> FederatedDataset:
        """A few clients spread over the population, packed, to try a model on; drawn once and kept."""
        if self._sample is None:
            places = np.unique(np.linspace(0, len(self) - 1, SAMPLE).astype(np.int64))
            self._sample = self.draw(names_at(self.clients, places))
        return self._sample

    def has(self, split: str) -> bool:
        """Whether there are examples for "train", "validation" or "test", at hand or cut when drawn."""
        part = {"validation": self.validation, "test": self.test}.get(split)
        return split == "train" or (len(part) > 0 if part is not None else self._planned(split))

    def chunks(self, split: str) -> Iterator[tuple[Sequence[str], Split]]:
        """All clients and their examples of a split, in the order of the clients, piece by piece.

        A split that was given comes in one piece; any other is drawn, some thousand clients at a time: as much work as
        one round with everybody.

        Args:
            split: "train", "validation" or "test", one the population has.
        """
        given = {"validation": self.validation, "test": self.test}.get(split)
        if given is not None:
            yield self.clients, given
            return
        if split != "train" and not self._planned(split):
            raise invalid("split", split, "one the data have", f"Give {split}= a fraction or a split of all clients.")
        for drawn in self._all():
            part = {"train": drawn.train, "validation": drawn.validation, "test": drawn.test}[split]
            assert part is not None
            yield drawn.clients, part

    def check_unchanged(self) -> None:
        """Refuse to go on when a file of the population is not as it was; a few microseconds for each file.

        Raises:
            DataError: naming the file, what changed and the way out.
        """
        check_files(self._source.files)

    def __getitem__(self, client: str) -> ClientData:
        return self.draw([client])[client]

    def __repr__(self) -> str:
        title = f"{self.name!r}, " if self.name else ""
        given = [label for label in ("validation", "test") if self.has(label)]
        if self.holdout is not None:
            given.append("holdout")
        return f"LazyDataset({title}clients={len(self)}{', with ' + ' and '.join(given) if given else ''})"

    # --- deriving and identity ---------------------------------------------------------------------------------------

    def select(self, clients: Sequence[str]) -> FederatedDataset:
        """The packed dataset of some clients; what `draw` makes."""
        if len(clients) == 0:
            raise invalid("clients", clients, "a sequence of at least one client name", 'For example ["a", "b"].')
        return self.draw(clients)

    def pooled(self) -> Never:
        """Refused: everybody's examples at once are what a lazy population does without.

        Raises:
            DataError: always, with the way out.
        """
        raise DataError(
            f"a population drawn lazily ({len(self)} clients) cannot be pooled: its examples are never together. Save "
            "it with data.save(directory) and use FederatedDataset.open(directory), or data.draw(clients).pooled()."
        )

    def fingerprint(self) -> str:
        """The identity of the population: BLAKE2b over names, sizes, cuts, files and the examples of a few clients.

        Contents are not read as a whole. What a function returns is known by the sample and by `version=`; Parquet
        files are known by their length and their footer, which holds the place and the statistics of every column.
        """
        if self._fingerprint is None:
            digest = hashlib.blake2b(digest_size=32)
            cuts = (self._fractions, self._seed, self._stratify) if any(self._fractions.values()) else ()
            digest.update(f"lazy;{len(self)};{self._source.identity()};{cuts};".encode())
            digest.update(self.sample().fingerprint().encode())
            names = self.clients if isinstance(self.clients, PackedNames) else None
            if not isinstance(self.clients, Numbered):
                for array in (names or PackedNames.of(self.clients)).packed:
                    digest.update(np.ascontiguousarray(array).data)
            for split in (self.validation, self.test):
                if split is not None:
                    digest.update(split.offsets.contiguous().numpy().data)
                    digest_fields(digest, split.fields)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def save(self, directory: Any) -> None:
        """Draw the whole population once, some thousand clients at a time, and write it packed.

        `FederatedDataset.open(directory)` maps it: the faster form where a population is used for many rounds.

        Args:
            directory: where; must not exist, or be empty. It appears when everything is written.

        Raises:
            InvalidArgument: when the directory holds something.
            DataError: when a client's examples cannot be used.
        """
        from atoll.data.storage import write

        splits = ("train", *(label for label in ("validation", "test") if self._planned(label)))

        def parts() -> Iterator[dict[str, Split]]:
            for drawn in self._all():
                made = {"train": drawn.train, "validation": drawn.validation, "test": drawn.test}
                yield {label: split for label, split in made.items() if split is not None}

        write(
            directory,
            self.clients,
            parts(),
            splits,
            holdout=self.holdout,
            name=self.name,
            features=self.features,
            preprocessing=None,
            fingerprint=lambda stored: FederatedDataset.restored(stored).fingerprint(),
        )

    def _assembled(
        self, clients: Sequence[str], train: Split, validation: Split | None, test: Split | None
    ) -> FederatedDataset:
        return FederatedDataset.trusted(
            clients,
            train,
            validation=validation,
            test=test,
            holdout=self.holdout,
            name=self.name,
            features=self.features,
        )

    def _planned(self, split: str) -> bool:
        return self._fractions.get(split, 0.0) > 0 or (
            {"validation": self.validation, "test": self.test}.get(split) is not None
        )

    def _all(self) -> Iterator[FederatedDataset]:
        for start in range(0, len(self), CHUNK):
            yield self.draw(self.clients[start : start + CHUNK])

    def _read(self, places: NDArray[np.int64]) -> Split:
        self.check_unchanged()
        found = self._source.read(places)
        sizes, known = found.sizes.numpy(), self.sizes[places]
        empty = np.flatnonzero(sizes == 0)
        if len(empty):
            names = names_at(self.clients, places[empty[:3]])
            raise DataError(f"{some(names, len(empty))} no examples. One is enough; leave clients without any out.")
        wrong = np.flatnonzero((known != _UNKNOWN) & (known != sizes))
        if len(wrong):
            first = int(wrong[0])
            raise DataError(
                f"client {self.clients[int(places[first])]!r} has {sizes[first]} examples, but {known[first]} were "
                "promised by sizes= or drawn before. A client's examples must be the same whenever they are asked for: "
                "seed random numbers by the client's name, and put them into one order."
            )
        self.sizes[places] = sizes
        return found


def names_at(clients: Sequence[str], places: NDArray[np.int64]) -> tuple[str, ...]:
    """The names at places int64 [k], in the order given."""
    if isinstance(clients, Numbered | PackedNames):
        return clients.take(places)
    return tuple([clients[int(place)] for place in places.tolist()])


def _sizes(sizes: Any, count: int) -> NDArray[np.int64]:
    if sizes is None:
        return np.full(count, _UNKNOWN, dtype=np.int64)
    given = np.array(sizes)
    if given.shape != (count,) or given.dtype.kind not in "iu":
        raise invalid("sizes", f"{given.dtype} {list(given.shape)}", f"whole numbers, one for each of {count} clients")
    if int(given.min()) < 1:
        place = int(np.flatnonzero(given < 1)[0])
        raise invalid("sizes", int(given[place]), f"at least 1 (client {place})", "Leave clients without any out.")
    return given.astype(np.int64)
