"""Secure aggregation as a channel: the server sees the sum of the cohort's rows and nothing else.

What a client sends is one vector of integers modulo 2^32 or 2^64 (`atoll.secagg.encoding`), and everything is in it:

    [ w v_j / (W c) ... | s_k / c ... | w / W | w l / (W l_max) | cut ]

for the averaged part v, the summed part s, the weight w of at most W, the mean loss l and the number of values that had
to be cut to the range, with the clip c. With M = floor((2^(bits-1) - 1) / n) for n clients, each of these numbers x in
[-1, 1] enters as an integer within one of x M, rounded without bias, so that no sum can wrap and the error of a sum of
k clients is below k / M.

Rows that are integers already (`discrete_gaussian`, `skellam`) are added up modulo 2^bits as they are, without weights
and losses, which their noise does not protect.

Two grades, with the same result to the last bit: "exact" adds up the integers; "full" lets every client's and the
server's own state machine run (`atoll.secagg`), with fresh keys, masks and shares. Both draw which clients drop out,
and in which phase. Over sites the protocol always runs, whatever the grade (`atoll.net`), and gives the very sum that a
simulation with the same survivors gives: rounding is keyed like everything that is not secret.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from atoll.errors import CompositionError, InvalidArgument, invalid, unknown
from atoll.secagg import Parameters, Policy, Scale, SecAggError, Void
from atoll.secagg.encoding import decode, decode_counts, encode, encode_counts
from atoll.secagg.policy import check_threshold
from atoll.secagg.session import PHASES, Session, lost, roster_of
from atoll.spec import record
from atoll.transforms.base import Codes, Keys
from atoll.transforms.channel import Channel, Gathering, Group, Opened, merge

EXTRA = 2
"""Numbers beside the row: weight and loss."""


def secure_sum(
    *,
    clip: float,
    weight_cap: float = 1.0,
    loss_cap: float = 10.0,
    bits: int = 32,
    grade: Literal["exact", "full"] = "exact",
    server: Literal["lying", "curious"] = "lying",
    threshold: tuple[int, int] = (2, 3),
    degree: int = 64,
    least: int = 3,
    dropouts: Mapping[str, float] | None = None,
) -> Channel:
    """The server sees nothing but sums: of rows, weights and losses together.

    The bytes a round tells are those of the vectors; keys and shares of grade "full" come to some hundreds of bytes for
    every neighbour.

    Put `transforms.clip_norm(c)` before it with c <= clip and no value of a row is ever cut; with `rand_k(fraction)`
    between, which scales what it sends up, c <= fraction clip. After `rotate()` all coordinates are of one scale, about
    the row's norm / sqrt(length), whatever their layers were: one clip of a few times that fits them all.

    Args:
        clip: largest absolute value of a coordinate of the row; larger ones are cut and counted.
        weight_cap: largest weight of a client. Larger weights are refused, not cut.
        loss_cap: largest mean loss of a client; larger ones are cut and counted.
        bits: of the sum, 8 to 48; up to 32 a number travels in 4 bytes, else in 8.
        grade: of a simulation. "exact": the arithmetic alone, which hides nothing, to study accuracy at any scale;
            "full": the whole protocol by every client, in this process.
        server: what thresholds must bear: "lying" or "curious".
        threshold: share of a group (numerator, denominator) of which more must be there to the end.
        degree: keepers of a client's shares, in cohorts of more than 64.
        least: fewest clients of a sum, at least 3.
        dropouts: share of the clients that drop out in each phase: "join", "reveal", "share", "mask", "confirm",
            "unmask". Where too few are left the round gives nothing, and the model stays as it is. Of a simulation:
            sites drop out by themselves.

    Raises:
        InvalidArgument: an argument outside its range; a threshold that the server could get around.
    """
    for name, value in (("clip", clip), ("weight_cap", weight_cap), ("loss_cap", loss_cap)):
        if isinstance(value, bool) or not 0 < value < float("inf"):
            raise invalid(name, value, "a finite number above 0")
    if grade not in ("exact", "full"):
        raise unknown("grade", grade, ["exact", "full"])
    policy = Policy(server=server, least=least)
    check_threshold(threshold, server)
    Scale(1, bits)
    shares = dict(dropouts or {})
    for phase, share in shares.items():
        if phase not in PHASES:
            raise unknown("dropouts", phase, PHASES)
        if not 0 <= share <= 1 or sum(shares.values()) > 1:
            raise invalid("dropouts", shares, "shares of the clients from 0 to 1, at most 1 together")

    def parameters(length: int) -> Parameters:
        return Parameters(length, bits, float(clip), float(weight_cap), threshold, degree)

    def check(count: int) -> None:
        if count < least:
            raise CompositionError(
                f"secure_sum(least={least}) needs {least} clients in a sum, but there are {count}: enlarge the cohort. "
                "A sum of fewer than three hides nothing."
            )
        try:
            Scale(count, bits)
            policy.admit_roll(count, count, parameters(1))
        except InvalidArgument as error:
            raise CompositionError(f"secure_sum with {count} clients: {error}") from None
        except SecAggError as error:
            raise CompositionError(f"secure_sum with {count} clients: {error} Use a larger degree.") from None

    def seal(rows: Tensor, split: int, weights: Tensor, metrics: Tensor, count: int, keys: Keys) -> Codes:
        heaviest = float(weights.max()) if len(weights) else 0.0
        if heaviest > weight_cap:
            raise CompositionError(
                f"secure_sum(weight_cap={weight_cap}) met a weight of {heaviest:g}: raise weight_cap to the largest "
                'weight a client may have, or use aggregators.mean(weights="uniform").'
            )
        scale = Scale(count, bits)
        share = weights.double().clamp(min=0) / weight_cap
        loss = metrics[:, :1].double() / metrics[:, 1:].double().clamp(min=1) / loss_cap
        # A client that is not finite is told of by itself, and its numbers are not used.
        values = torch.cat((rows[:, :split].double() / clip * share, rows[:, split:].double() / clip, share), dim=1)
        values = torch.nan_to_num(torch.cat((values, loss.clamp(max=1) * share), dim=1))
        ring, cut = encode(values.cpu().numpy(), scale, keys.uniform("round", values.shape[1]).numpy())
        cut = cut + (loss[:, 0].cpu().numpy() > 1)
        whole = np.concatenate((ring, encode_counts(cut, rows.shape[1] + EXTRA, scale)), axis=1)
        return {"ring": torch.from_numpy(whole.view(np.int32 if scale.ring == 32 else np.int64))}

    def unseal(total: Codes, split: int, count: int, summed: int) -> Opened:
        scale = Scale(count, bits)
        ring = total["ring"].cpu().long().numpy().astype(scale.dtype)
        width = _width(len(ring), scale)
        values = torch.from_numpy(decode(ring[:width], scale, summed))
        return Opened(
            weighted=values[:split] * (clip * weight_cap),
            sums=values[split:-EXTRA] * clip,
            weight=float(values[-2]) * weight_cap,
            loss=float(values[-1]) * weight_cap * loss_cap,
            saturated=decode_counts(ring[width:], scale),
        )

    def ends(keys: Keys) -> list[int]:
        """The phase each client drops out in, by number; that after the last: none."""
        bounds = np.cumsum([shares.get(phase, 0.0) for phase in PHASES])
        draws = keys.uniform("dropout", 1)[:, 0].double().numpy()
        return np.searchsorted(bounds, draws, side="right").tolist()

    def leaving(keys: Keys) -> Sequence[bool]:
        return [end <= PHASES.index("mask") for end in ends(keys)]

    def gather(clients: tuple[str, ...], keys: Keys) -> Gathering:
        phases = ends(keys) if shares else [len(PHASES)] * len(clients)
        if grade == "full":
            out = {c: PHASES[end] for c, end in zip(clients, phases, strict=True) if end < len(PHASES)}
            return _Machines(clients, parameters, policy, out, keys.round)
        return _Running(phases, parameters(1), least)

    spec = record(
        "secure_sum", clip=clip, weight_cap=weight_cap, loss_cap=loss_cap, bits=bits, grade=grade, server=server,
        threshold=list(threshold), degree=degree, least=least, dropouts=shares,
    )  # fmt: skip
    channel = Channel(
        spec, True, weight_cap, check, seal, gather, unseal, grade == "full", leaving if shares else None, ring=bits,
        least=least, parameters=parameters(1), server=server,
    )  # fmt: skip
    return replace(channel, whole=replace(channel, seal=_integers(bits), unseal=_summed(bits)))


def _integers(bits: int) -> Callable[[Tensor, int, Tensor, Tensor, int, Keys], Codes]:
    """The client half for rows of integers, which are added up as they are, with neither weight nor loss."""

    def seal(rows: Tensor, split: int, weights: Tensor, metrics: Tensor, count: int, keys: Keys) -> Codes:
        if bits > 32:
            return {"ring": rows}
        return {"ring": ((rows + (1 << 31)) % (1 << 32) - (1 << 31)).to(torch.int32)}

    return seal


def _summed(bits: int) -> Callable[[Codes, int, int, int], Opened]:
    """The server half for them: their sum modulo 2^bits."""

    def unseal(total: Codes, split: int, count: int, summed: int) -> Opened:
        ring = total["ring"].cpu().long() % (1 << bits)
        exact = torch.where(ring >= 1 << (bits - 1), ring - (1 << bits), ring).double()
        return Opened(exact[:split], exact[split:], float(summed), float("nan"), 0)

    return unseal


class _Running:
    """Grade "exact": a running sum.

    In cohorts of more than 64 it asks for the threshold of the whole cohort, where the protocol asks for every group's.
    """

    def __init__(self, phases: Sequence[int], parameters: Parameters, least: int) -> None:
        self._phases, self._parameters, self._least = phases, parameters, least
        self._members: list[str] = []
        self._total: Codes | None = None

    def add(self, clients: tuple[str, ...], codes: Codes) -> None:
        self._members += clients
        self._total = codes if self._total is None else merge(self._total, codes)

    def finish(self) -> list[Group]:
        why = lost(self._phases, self._parameters.threshold, self._least)
        if why or self._total is None:
            raise Void("few", why or "no client sent a vector.", {})
        return [Group(tuple(self._members), self._total)]


class _Machines:
    """Grade "full": every client's machine and the server's."""

    def __init__(
        self,
        clients: tuple[str, ...],
        parameters: Callable[[int], Parameters],
        policy: Policy,
        leaving: Mapping[str, str],
        round: int,
    ) -> None:
        self._clients, self._parameters, self._policy = clients, parameters, policy
        self._leaving, self._round = leaving, round
        self._session: Session | None = None
        self._void: Void | None = None

    def add(self, clients: tuple[str, ...], codes: Codes) -> None:
        rows = codes["ring"].cpu().numpy()
        if self._session is None and self._void is None:
            identities, roster = roster_of(self._clients)
            asked = self._parameters(rows.shape[1])
            try:
                self._session = Session(identities, roster, asked, self._leaving, self._policy, round=self._round)
            except Void as error:
                self._void = error
        if self._session is None:
            return
        for client, row in zip(clients, rows, strict=True):
            self._session.add(client, row.view(Scale(1, self._parameters(1).bits).dtype))

    def finish(self) -> list[Group]:
        if self._session is None:
            raise self._void or Void("few", "no client sent a vector.", {})
        found = self._session.finish()
        signed = found.total.view(np.int32 if found.total.itemsize == 4 else np.int64)
        return [Group(found.survivors, {"ring": torch.from_numpy(signed)})]


def _width(length: int, scale: Scale) -> int:
    """Numbers in a sealed row of this length; behind them come the digits of a count up to their number."""
    return next(n for n in range(length - 1, 0, -1) if n + scale.digits(n) == length)
