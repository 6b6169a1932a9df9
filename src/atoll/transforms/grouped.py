"""Random groups with a secure sum each, and a robust rule over the groups' means: some robustness and some secrecy.

A rule needs more than one row to judge by, a secure sum shows only one. With groups of g clients the server sees n / g
rows, each the mean of a group, and the rule bears as many groups with a malicious client in them as it bears malicious
rows. m malicious clients are in at most m groups: where f groups are borne, f clients are. What hides a client is now
its g - 1 fellows, not n - 1. Groups are drawn anew in every round.

NNM or bucketing over group means is bucketing with buckets of g.

Source: reviewed in Karimireddy, He & Jaggi 2022, "Byzantine-robust learning on heterogeneous datasets via bucketing";
groups under secure sums: Velicheti, Xia & Koyejo 2021, "Secure Byzantine-robust distributed learning via clustering".
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from atoll.errors import CompositionError, invalid
from atoll.secagg import Void
from atoll.secagg.groups import deal
from atoll.spec import record
from atoll.transforms.base import Codes, Keys
from atoll.transforms.channel import Channel, Gathering, Group, Opened

if TYPE_CHECKING:
    from atoll.aggregators import Aggregator

SMALLEST = 3
"""Clients in a group."""


def grouped(channel: Channel, rule: "Aggregator", *, size: int = 8) -> Channel:
    """A sum of each random group, and a rule over the groups' means.

    Args:
        channel: a `secure_sum`.
        rule: from `atoll.aggregators`, such as `median()`: it judges groups as if they were clients.
        size: fewest clients in a group, at least 3; there are as many groups as can have them. From 8 on a client is
            hidden among enough others to speak of secrecy.

    Raises:
        InvalidArgument: a channel that does not sum, a mean as the rule, a size below 3.
    """
    base_seal, base_gather, base_unseal = channel.seal, channel.gather, channel.unseal
    if not isinstance(channel, Channel) or base_seal is None or base_gather is None or base_unseal is None:
        raise invalid("channel", channel, "a secure_sum", "Write grouped(secure_sum(clip=1.0), aggregators.median()).")
    if channel.rule is not None:
        raise invalid("channel", channel.name, "a secure_sum that is not grouped already")
    if not hasattr(rule, "combine") or rule.averages:
        raise invalid(
            "rule", getattr(rule, "name", rule), "a rule such as aggregators.median()",
            "The mean of groups is the mean of clients: use the secure_sum alone.",
        )  # fmt: skip
    if isinstance(size, bool) or not isinstance(size, int) or size < SMALLEST:
        raise invalid("size", size, "an integer of at least 3", "A sum of two shows each the other's row.")

    def largest(count: int) -> int:
        """Clients in the largest group."""
        return -(-count // max(count // size, 1))

    def check(count: int) -> None:
        groups = count // size
        needed = rule.least(groups) if groups else 1
        if groups < max(needed, 2):
            raise CompositionError(
                f"grouped(size={size}) makes {groups} groups of a cohort of {count}, but the rule {rule.name} needs "
                f"{max(needed, 2)}: enlarge the cohort, or make groups smaller."
            )
        channel.check(count // groups)
        channel.check(largest(count))

    def seal(rows: Tensor, split: int, weights: Tensor, metrics: Tensor, count: int, keys: Keys) -> Codes:
        return base_seal(rows, split, weights, metrics, largest(count), keys)

    def unseal(total: Codes, split: int, count: int, summed: int) -> Opened:
        return base_unseal(total, split, largest(count), summed)

    def gather(clients: tuple[str, ...], keys: Keys) -> Gathering:
        order = np.argsort(keys.uniform("groups", 1)[:, 0].numpy(), kind="stable").tolist()
        dealt = deal(len(clients), size, order)
        made = [
            base_gather(
                tuple(clients[p] for p in places),
                Keys(keys.seed, keys.stage, keys.round, keys.clients[places], keys.split),
            )
            for places in dealt
        ]
        return _Groups({clients[p]: i for i, places in enumerate(dealt) for p in places}, made, channel.each)

    spec = record("grouped", channel=channel, rule=rule, size=size)
    return Channel(spec, True, channel.weight_cap, check, seal, gather, unseal, True, channel.leaving, rule)


class _Groups:
    """One machine for each group; a group that is void is left out."""

    def __init__(self, place: dict[str, int], groups: Sequence[Gathering], each: bool) -> None:
        self._place, self._groups, self._each = place, groups, each

    def add(self, clients: tuple[str, ...], codes: Codes) -> None:
        for i, client in enumerate(clients):
            own = {n: t[i : i + 1] if self._each else t[i].long() for n, t in codes.items()}
            self._groups[self._place[client]].add((client,), own)

    def finish(self) -> list[Group]:
        found: list[Group] = []
        void: Void | None = None
        for group in self._groups:
            try:
                found += group.finish()
            except Void as error:
                void = error
        if not found:
            assert void is not None
            raise void
        return found
