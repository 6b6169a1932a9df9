"""Bucketing. Karimireddy, He & Jaggi 2022, "Byzantine-robust learning on heterogeneous datasets via bucketing",
algorithm 1.

    a random order of the rows, cut into buckets of s; the means of the buckets; then another rule
"""

from typing import Any

import torch
from torch import Tensor

from atoll import random
from atoll.aggregators.base import Aggregator, Ruling, check_then, composed, spared
from atoll.aggregators.rows import Rows
from atoll.errors import invalid
from atoll.spec import record


def bucketing(*, size: int, then: Aggregator, seed: int = 0) -> Aggregator:
    """Average the rows in random buckets, then apply another rule to the buckets; unweighted.

    Bears as many malicious clients as `then` bears of ceil(n / size) buckets: each may spoil one. `then` is given the
    number of buckets to expect spoilt. The last bucket may be smaller than the others.

    Args:
        size: rows in a bucket.
        then: the rule behind it.
        seed: of the order, which is another in every round.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise invalid("size", size, "an integer of at least 1")
    check_then(then)

    def rule(rows: Rows, weights: Tensor, state: Any) -> Ruling:
        order = torch.randperm(len(rows), generator=random.generator(seed, "bucketing", state["round"]))
        mix = torch.zeros(-(-len(rows) // size), len(rows), dtype=torch.float64, device=rows.matrix.device)
        for i, bucket in enumerate(order.split(size)):
            mix[i, bucket] = 1 / len(bucket)
        ruling = composed(then, rows.mixed(mix), weights.new_ones(len(mix)), state["then"])
        share = None if ruling.share is None else ruling.share @ mix
        return Ruling(ruling.row, share, {"round": state["round"] + 1, "then": ruling.state})

    def least(count: int) -> int:
        buckets = -(-count // size)
        needed = then.least(buckets)
        return 1 if buckets >= needed else size * (needed - 1) + 1

    return Aggregator(
        record("bucketing", size=size, then=then, seed=seed),
        rule,
        "uniform",
        least=least,
        bears=lambda count: then.bears(-(-count // size)),
        needs=f" (buckets of {size}{'; then' + then.needs if then.needs else ''})",
        spared=lambda count, found: bucketing(size=size, then=spared(then, -(-count // size), found), seed=seed),
        init=lambda row: {"round": 0, "then": then.init(row)},
        rooted=then.rooted,
    )
