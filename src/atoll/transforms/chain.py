"""The pipeline: transforms composed, checked once when it is built, and ended by a channel."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll.errors import CompositionError, invalid
from atoll.privacy.client_noise import ClientNoise
from atoll.privacy.noise import Noise
from atoll.transforms.base import Coder, Codes, Form, Keys, PayloadError, Transform, Wire
from atoll.transforms.channel import Channel
from atoll.tree import nbytes
from atoll.vectors import Layout


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a row after the whole chain.

    Attributes:
        sums: whether rows may be added up before they are decoded.
        unbiased: whether the decoded row has the client's row as its expectation.
        bound: L2 bound on the decoded row; None where there is none.
        fixed_size: whether the bytes do not depend on the values.
        memory: whether clients keep something for a stage.
        shared: whether the server must draw a stage's random numbers again.
    """

    sums: bool
    unbiased: bool
    bound: float | None
    fixed_size: bool
    memory: bool
    shared: bool


@dataclass(frozen=True, slots=True)
class Chain:
    """Transforms in client order and the channel behind them.

    Raises:
        CompositionError: two stages do not fit; the text names both and the way out.
    """

    stages: tuple[Transform, ...]
    channel: Channel

    def __post_init__(self) -> None:
        codec = feedback = on_rows = moving = None
        for stage in self.stages:
            if codec is not None and (codec.coder is not None or stage.coder is None):
                raise CompositionError(
                    f"{stage.name} cannot stand after {codec.name}: {codec.name} gives codes, {stage.name} needs rows. "
                    f"Put {stage.name} before {codec.name}."
                )
            if feedback is not None and not stage.lossless:
                raise CompositionError(
                    f"{stage.name} cannot stand after {feedback.name}: {feedback.name} would not see what {stage.name} "
                    f"loses. Put {stage.name} before {feedback.name}, or inside it."
                )
            if stage.remembers and moving is not None:
                raise CompositionError(
                    f"{stage.name} cannot stand after {moving.name}: in the next round {moving.name} puts other "
                    f"numbers where {stage.name} remembers them. Put {moving.name} inside {stage.name}, or leave it "
                    "out."
                )
            if stage.bind is not None and moving is not None:
                raise CompositionError(
                    f"{stage.name} cannot stand after {moving.name}: {moving.name} puts other numbers where "
                    f"{stage.name} looks for the model's matrices. Put {stage.name} before {moving.name}, or leave one "
                    "out."
                )
            if stage.decode_sum is not None and stage.decode_each is None and on_rows is not None:
                raise CompositionError(
                    f"{stage.name} cannot stand after {on_rows.name}: {stage.name} is undone on the sum, "
                    f"{on_rows.name} only on each row. Put {stage.name} before {on_rows.name}."
                )
            if stage.gives == "codes":
                codec = stage
            if stage.feedback:
                feedback = stage
            if not stage.aligned:
                moving = stage
            if stage.decode_each is not None and stage.decode_sum is None:
                on_rows = stage
        self._check_client_noise()
        self._check_noise()
        for i, stage in enumerate(self.stages):
            if stage.integers is not None and i + 1 < len(self.stages):
                raise CompositionError(
                    f"{self.stages[i + 1].name} cannot stand after {stage.name}, which gives integers with noise for "
                    f"the channel to add up. Put {self.stages[i + 1].name} before {stage.name}, or leave it out."
                )
            if stage.integers is not None and (self.channel.ring or 0) < stage.integers:
                raise CompositionError(
                    f"{stage.name} cannot stand before the channel {self.channel.name}: it needs one that shows the "
                    f"server nothing but sums of integers modulo 2^{stage.integers} or more, such as "
                    f"atoll.transforms.secure_sum(clip=1.0, bits={max(stage.integers, 32)})."
                )
            if stage.client_noise is not None and self.channel.least < stage.client_noise.survivors > 1:
                raise CompositionError(
                    f"{stage.name}(survivors={stage.client_noise.survivors}) cannot stand before the channel "
                    f"{self.channel.name}(least={self.channel.least}), which would show sums of fewer clients than the "
                    f"noise is sized for: use {self.channel.name}(least={stage.client_noise.survivors}, ...)."
                )
        if self.channel.sums_only:
            for stage in self.stages:
                if stage.judge is not None:
                    raise CompositionError(
                        f"{stage.name} cannot stand before the channel {self.channel.name}, which only adds: "
                        f"{stage.name} judges every client's row, which the server does not see. Leave {stage.name} "
                        'out (clip_norm bounds what an honest client sends), or use channel="plain".'
                    )
                if not stage.sums or stage.gives == "codes":
                    raise CompositionError(
                        f"{stage.name} cannot stand before the channel {self.channel.name}, which only adds: what "
                        f"{stage.name} sends does not sum. Leave {stage.name} out ({self.channel.name} has a fixed "
                        'point of its own), or use channel="plain".'
                    )

    def _check_noise(self) -> None:
        """Refuse noise that does not hide what one client adds to the sum."""
        noisy = next((stage for stage in self.stages if stage.noise is not None), None)
        if noisy is None:
            return
        for stage in self.stages:
            if stage.feedback or stage.settle is not None or stage.remembers:
                raise CompositionError(
                    f"{stage.name} cannot stand in one pipeline with {noisy.name}: what it keeps of a client's data "
                    f"comes back in later rounds, beyond the clip norm and uncounted. Use stages without memory, such "
                    f"as rand_k or rotate, or leave it out."
                )
            if not stage.fixed_size:
                raise CompositionError(
                    f"{stage.name} cannot stand in one pipeline with {noisy.name}: the number of bytes it sends tells "
                    "something of the data that no noise hides. Leave it out."
                )
            if stage.decode_each is not None and stage.decode_sum is None:
                raise CompositionError(
                    f"{stage.name} cannot stand in one pipeline with {noisy.name}: it is undone on each row, while "
                    f"noise is added to the sum of clipped rows. Use rand_k or rotate, or leave it out."
                )
        bound, passed = None, False
        correlated = noisy.noise is not None and noisy.noise.strategy is not None
        for stage in self.stages:
            if correlated and stage.learn is not None:
                raise CompositionError(
                    f"{stage.name} cannot stand in one pipeline with {noisy.name}: noise of one round takes back that "
                    f"of others only where all are clipped at the same norm. Use clip_norm, or gaussian_noise."
                )
            if correlated and not stage.aligned and not passed:
                raise CompositionError(
                    f"{stage.name} cannot stand before {noisy.name}: a number of the row would be another one in every "
                    f"round, and the noise of one round would not take back that of others. Put {stage.name} behind "
                    f"{noisy.name}, or leave it out."
                )
            if passed and stage.learn is not None:
                raise CompositionError(
                    f"{stage.name} cannot stand after {noisy.name}: what it learns from the sum of a round, and tells "
                    f"everybody, would have no noise yet. Put {stage.name} before {noisy.name}."
                )
            if stage.noise is not None and passed:
                raise CompositionError(
                    f"{stage.name} cannot stand after {noisy.name}: the sum would be noised twice and counted once. "
                    f"Keep one of them, with the noise you want."
                )
            if stage.noise is not None and bound is None:
                raise CompositionError(
                    f"{stage.name} needs clipped rows before it: without a bound on what one client adds to the sum no "
                    f"noise hides it. Write transforms=(atoll.transforms.clip_norm(1.0), {stage.name}(...)), with "
                    "clip_norm or adaptive_clip behind all that may lengthen a row."
                )
            before, bound = bound, stage.bound(bound)
            if passed and bound is None and before is not None:
                raise CompositionError(
                    f"{stage.name} cannot stand after {noisy.name}: what the server decodes from it may be longer than "
                    f"the clip norm, and the noise would no longer hide it. Leave {stage.name} out under noise."
                )
            passed |= stage is noisy

    def _check_client_noise(self) -> None:
        """Refuse what clients would send beside the rows that their noise protects."""
        found = next(((i, stage) for i, stage in enumerate(self.stages) if stage.client_noise is not None), None)
        if found is None:
            return
        where, noisy = found
        for i, stage in enumerate(self.stages):
            if i != where and stage.protects:
                raise CompositionError(
                    f"{stage.name} cannot stand in one pipeline with {noisy.name}: a run keeps one ledger for clients. "
                    "Keep one of them."
                )
            if i < where and stage.codes(8, 8):
                raise CompositionError(
                    f"{noisy.name} cannot stand after {stage.name}: what {stage.name} sends beside the row tells of "
                    f"the update, and no noise hides it. Put {stage.name} after {noisy.name}, or leave it out."
                )

    @property
    def noise(self) -> Noise | None:
        """What is added to the sum of the clients' rows."""
        return next((stage.noise for stage in self.stages if stage.noise is not None), None)

    @property
    def client_noise(self) -> ClientNoise | None:
        """What clients add to their own rows."""
        return next((stage.client_noise for stage in self.stages if stage.client_noise is not None), None)

    @property
    def protects_clients(self) -> bool:
        """Whether noise hides what a client sends, so that nothing else of it may be told."""
        return any(stage.protects for stage in self.stages)

    def noised_size(self, length: int, split: int) -> tuple[int, int]:
        """Length of the rows that clients add noise to, and where their summed part begins."""
        stages = zip(self.stages, self.sizes(length, split), strict=False)
        return next(size for stage, size in stages if stage.client_noise is not None)

    def calibrated(self, multiplier: float) -> "Chain":
        """The same chain with this noise multiplier for the noise that clients add."""
        return Chain(tuple(s if s.calibrate is None else s.calibrate(multiplier) for s in self.stages), self.channel)

    def seen_size(self, length: int, split: int) -> tuple[int, int]:
        """Length of the rows that `decode_each` gives and `decode_sum` takes, and where their summed part begins."""
        return self.sizes(length, split)[self._summed]

    @property
    def facts(self) -> Facts:
        """Facts propagated through the stages."""
        bound: float | None = None
        for stage in self.stages:
            bound = stage.bound(bound)
        return Facts(
            all(s.sums for s in self.stages),
            all(s.unbiased for s in self.stages),
            bound,
            all(s.fixed_size for s in self.stages),
            any(s.remembers for s in self.stages),
            any(s.randomness == "shared" for s in self.stages),
        )

    def sizes(self, length: int, split: int) -> list[tuple[int, int]]:
        """Length of the rows that enter each stage and where their summed part begins; last, of those that leave."""
        found = [(length, split)]
        for stage in self.stages:
            found.append(stage.size(*found[-1]))
        return found

    def bind(self, layout: Layout) -> "Chain":
        """The same chain for a layout of the averaged parameters, which stages may ask for."""
        return Chain(tuple(s if s.bind is None else s.bind(layout) for s in self.stages), self.channel)

    @property
    def coder(self) -> Coder | None:
        """What codes everything at the end, if anything does."""
        return self.stages[-1].coder if self.stages else None

    def form(self, length: int, split: int, dtype: torch.dtype) -> Form:
        """What a client's encoded row is made of, before bytes are coded, when numbers of the model have this type."""
        sizes, found = self.sizes(length, split), dict[str, tuple[torch.dtype, int]]()
        for i, (stage, size) in enumerate(zip(self.stages, sizes, strict=False)):
            found |= {f"{i}/{n}": part for n, part in stage.codes(*size).items()}
        if all(stage.gives == "rows" for stage in self.stages if stage.coder is None):
            found["rows"] = (dtype, sizes[-1][0])
        return found

    def bytes(self, length: int, split: int, dtype: torch.dtype) -> int:
        """Bytes of the encoded row of a client, before bytes are coded."""
        return sum(kind.itemsize * count for kind, count in self.form(length, split, dtype).values())

    def init(self, length: int, split: int) -> tuple[Any, ...]:
        """Server state of every stage for rows of this length."""
        return tuple(stage.init(n) for stage, (n, _) in zip(self.stages, self.sizes(length, split), strict=False))

    def share(self, state: Sequence[Any]) -> tuple[Any, ...]:
        """What clients must know of every stage."""
        return tuple(stage.share(s) for stage, s in zip(self.stages, state, strict=True))

    def update(
        self, state: Sequence[Any], aggregate: Any, seen: Mapping[int, Tensor] | None = None, expected: float = 0.0
    ) -> tuple[Any, ...]:
        """State of every stage after a round; `seen` as `decode_sum` left it, in an expected cohort of so many."""
        renewed: list[Any] = []
        for i, (stage, own) in enumerate(zip(self.stages, state, strict=True)):
            if stage.learn is not None and seen is not None and i in seen:
                own = stage.learn(own, seen[i], expected)
            renewed.append(stage.update(own, aggregate))
        return tuple(renewed)

    def settle(self, state: Sequence[Any], row: Tensor, share: float) -> tuple[Tensor, tuple[Any, ...]]:
        """What the algorithm is given instead of the round's combined row [length], and the state of every stage."""
        renewed = list(state)
        for i, stage in reversed(list(enumerate(self.stages))):
            if stage.settle is not None:
                row, renewed[i] = stage.settle(state[i], row, share)
        return row, tuple(renewed)

    def memory(self, length: int, split: int) -> dict[str, Tensor]:
        """A client's memory of every stage at its first visit, by `stage number/name`."""
        sizes = self.sizes(length, split)
        return {f"{i}/{n}": t for i, stage in enumerate(self.stages) for n, t in stage.memory(sizes[i][0]).items()}

    def encode(
        self, rows: Tensor, memory: dict[str, Tensor], shared: Sequence[Any], keys: Keys
    ) -> tuple[Wire, dict[str, Tensor]]:
        """Client halves, in order. Codes are called `stage number/name`, and rows that are left at the end "rows"."""
        last: Tensor | None = rows
        codes, renewed = dict[str, Tensor](), dict[str, Tensor]()
        for i, (stage, own_keys) in enumerate(zip(self.stages, self._keys(rows.shape[1], keys), strict=True)):
            if stage.coder is not None:
                continue
            wire, own = stage.encode(last, _own(memory, i), shared[i], own_keys)
            if isinstance(wire, Tensor):
                last = wire
            else:
                last = wire.get("rows")
                codes |= {f"{i}/{n}": t for n, t in wire.items() if n != "rows"}
            renewed |= {f"{i}/{n}": t for n, t in own.items()}
        if last is not None:
            codes["rows"] = last
        if self.coder is not None:
            return coded(codes, self.coder), renewed
        return (last if last is not None and len(codes) == 1 else codes), renewed

    def scaled(self, sizes: Tensor) -> Tensor | None:
        """Factors [C, 1] by which rows of these L2 norms [C, 1] leave the chain; None: it does more than scale them."""
        factor = torch.ones_like(sizes)
        for stage in self.stages:
            if stage.scale is None:
                return None
            factor = factor * stage.scale(sizes * factor)
        return factor

    def opened(self, wire: Wire, length: int, split: int, dtype: torch.dtype) -> Codes:
        """The codes of a tile's clients, in the form of this chain; rows are called "rows".

        Raises:
            PayloadError: they are damaged, or were made for another layout.
        """
        form = self.form(length, split, dtype)
        codes: Codes = {"rows": wire} if isinstance(wire, Tensor) else wire
        if self.coder is not None:
            codes = expanded(codes, form, self.coder)
        if codes.keys() != form.keys():
            odd = ", ".join(sorted(codes.keys() ^ form.keys()))
            raise PayloadError(f"the payload is for other stages: {odd} is missing, or was not asked for.")
        for name, (kind, count) in form.items():
            found = codes[name]
            if found.ndim != 2 or found.shape[1] != count or found.dtype != kind:
                raise PayloadError(
                    f"the payload is for another layout: {name} has {tuple(found.shape[1:])} numbers of {found.dtype}, "
                    f"expected {count} of {kind}."
                )
        return codes

    def decode_each(self, wire: Wire, shared: Sequence[Any], length: int, keys: Keys, dtype: torch.dtype) -> Tensor:
        """Server halves on clients' rows, in reverse, down to the last stage that is undone on the sum."""
        codes = self.opened(wire, length, _split(length, keys), dtype)
        rows, sizes, own_keys = codes.get("rows"), self.sizes(length, _split(length, keys)), self._keys(length, keys)
        for i in reversed(range(self._summed, len(self.stages))):
            decode = self.stages[i].decode_each
            if decode is not None:
                own = _own(codes, i) | ({} if rows is None else {"rows": rows})
                rows = decode(own, shared[i], sizes[i][0], own_keys[i])
        assert rows is not None
        return rows.to(dtype)

    @property
    def judges(self) -> bool:
        """Whether a stage may leave clients out of a round."""
        return any(stage.judge is not None for stage in self.stages)

    def judge(self, rows: Tensor, finite: Tensor) -> list[str]:
        """Why each client is left out of the round, "" for none.

        Args:
            rows: decoded, [C, L].
            finite: whether all that a client reports is, [C].
        """
        found = [""] * len(rows)
        for stage in self.stages:
            if stage.judge is not None:
                found = [old or new for old, new in zip(found, stage.judge(rows, finite), strict=True)]
        return found

    def decode_sum(
        self,
        total: Tensor,
        shared: Sequence[Any],
        length: int,
        keys: Keys,
        *,
        release: Callable[[Tensor], Tensor] | None = None,
        seen: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """Server halves on the combined row, in reverse: [length]. Those that were undone on each row are left out.

        Args:
            total: the combined row.
            shared: what clients know of every stage.
            length: of the row that entered the first stage.
            keys: of the round.
            release: adds the noise; needed where a stage asks for it.
            seen: takes in what stages that learn from it see, by their number.
        """
        last = len(self.stages) if self.channel.sums_only else self._summed
        return self._undone(total, shared, length, keys, last, release, seen)

    def undo_sum(self, total: Tensor, shared: Sequence[Any], length: int, keys: Keys) -> Tensor:
        """Server halves of all stages, on a sum that none of them was undone on."""
        return self._undone(total, shared, length, keys, len(self.stages), None, None)

    def _undone(
        self,
        total: Tensor,
        shared: Sequence[Any],
        length: int,
        keys: Keys,
        last: int,
        release: Callable[[Tensor], Tensor] | None,
        seen: dict[int, Tensor] | None,
    ) -> Tensor:
        own_keys, sizes = self._keys(length, keys), self.sizes(length, _split(length, keys))
        for i in reversed(range(last)):
            stage = self.stages[i]
            if stage.noise is not None:
                if release is None:
                    raise CompositionError(
                        f"{stage.name} adds noise that somebody must count: run it by atoll.simulate or Process.next."
                    )
                total = release(total)
            if stage.learn is not None and seen is not None:
                seen[i] = total
            decode = stage.decode_sum
            if decode is not None:
                total = decode(total, shared[i], sizes[i][0], own_keys[i])
        return total

    @property
    def _summed(self) -> int:
        """Stages, from the first, that the server undoes on the sum although it sees rows."""
        on_sum = (s.noise is not None or (s.decode_sum is not None and s.decode_each is None) for s in self.stages)
        last = [i for i, needed in enumerate(on_sum) if needed]
        return last[-1] + 1 if last else 0

    def _keys(self, length: int, keys: Keys) -> list[Keys]:
        sizes = self.sizes(length, _split(length, keys))
        return [
            Keys(keys.seed, f"{keys.stage}/{i}", keys.round, keys.clients, sizes[i][1]) for i in range(len(self.stages))
        ]


HEADER = 4
"""Bytes of a coded payload that tell the length of what follows; what stands behind that fills up a tile."""


def coded(codes: Codes, coder: Coder) -> Codes:
    """All codes of each client as one payload [C, longest], uint8; the bytes of a number's place lie side by side."""
    payloads = list[bytes]()
    for i in range(len(next(iter(codes.values())))):
        raw = [codes[n][i].detach().cpu().contiguous().view(torch.uint8) for n in sorted(codes)]
        widths = [codes[n].element_size() for n in sorted(codes)]
        planes = [t.view(-1, w).T.contiguous().numpy().tobytes() for t, w in zip(raw, widths, strict=True)]
        packed = coder.compress(b"".join(planes))
        payloads.append(len(packed).to_bytes(HEADER, "little") + packed)
    longest = max((len(p) for p in payloads), default=0)
    filled = b"".join(p.ljust(longest, b"\0") for p in payloads)
    return {"payload": _bytes(filled).view(len(payloads), longest)}


def expanded(codes: Codes, form: Form, coder: Coder) -> Codes:
    """Undo `coded`.

    Raises:
        PayloadError: a payload that does not hold exactly such codes.
    """
    if set(codes) != {"payload"} or codes["payload"].dtype != torch.uint8 or codes["payload"].ndim != 2:
        raise PayloadError("the payload is for other stages: expected coded bytes.")
    names = sorted(form)
    sizes = [form[n][0].itemsize * form[n][1] for n in names]
    clients = list[Tensor]()
    for row in codes["payload"].cpu().numpy():
        content = row.tobytes()
        length = int.from_bytes(content[:HEADER], "little")
        if len(content) < HEADER + length:
            raise PayloadError(f"the payload was cut off: {length} bytes were announced, {len(content) - HEADER} came.")
        raw = coder.expand(content[HEADER : HEADER + length], sum(sizes))
        clients.append(_bytes(raw))
    rows = torch.stack(clients)
    found, at = dict[str, Tensor](), 0
    for name, size in zip(names, sizes, strict=True):
        kind, count = form[name]
        planes = rows[:, at : at + size].reshape(len(rows), kind.itemsize, count)
        numbers = torch.empty(len(rows), count, dtype=kind)
        if size:
            numbers.view(torch.uint8).view(len(rows), count, kind.itemsize)[:] = planes.transpose(1, 2)
        found[name] = numbers
        at += size
    return found


def _bytes(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)


def sent(wire: Wire) -> int:
    """Bytes that the clients of a tile send: what fills up their coded payloads is not sent."""
    if not isinstance(wire, Tensor) and set(wire) == {"payload"}:
        heads = wire["payload"][:, :HEADER].cpu().numpy()
        return sum(HEADER + int.from_bytes(head.tobytes(), "little") for head in heads)
    return nbytes(wire)


def _split(length: int, keys: Keys) -> int:
    return length if keys.split is None else keys.split


def _own(named: Codes, stage: int) -> dict[str, Tensor]:
    return {n.split("/", 1)[1]: t for n, t in named.items() if n.startswith(f"{stage}/")}


def keys_of(seed: int, round: int, clients: NDArray[np.uint64], split: int) -> Keys:
    """Keys a whole chain is used with."""
    return Keys(seed, "transforms", round, clients, split)


def compose(transforms: Sequence[Transform], channel: Channel) -> Chain:
    """The chain of these transforms and this channel."""
    if isinstance(transforms, Transform):
        raise invalid("transforms", transforms.name, "a sequence", f"Write transforms=({transforms.name}(...),).")
    for stage in transforms:
        if not isinstance(stage, Transform):
            raise invalid("transforms", stage, "a sequence of transforms such as atoll.transforms.clip_norm(1.0)")
    if transforms and transforms[-1].integers is not None and channel.whole is not None:
        channel = channel.whole
    return Chain(tuple(transforms), channel)
