"""Time of robust rules on a matrix of 50 clients x 1 million parameters, beside `torch.median` and inner products."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from reporting import Findings, Table, finish, parser
from torch import Tensor

from atoll import aggregators
from atoll.aggregators import Aggregator

CLIENTS, BAD = 50, 10
MEDIAN = 2.0
"""How many times as long as `torch.median` the median may take."""
PRODUCTS = 5.0
"""How many times as long as all inner products of the rows, in double precision, krum and the geometric median may
take: they need them twice, the second time relative to a row among the others, and read the rows once more."""

RULES: dict[str, Callable[[Tensor], Aggregator]] = {
    "mean": lambda root: aggregators.mean(weights="uniform"),
    "median": lambda root: aggregators.median(),
    "trimmed mean": lambda root: aggregators.trimmed_mean(drop=BAD),
    "meamed": lambda root: aggregators.meamed(byzantine=BAD),
    "krum": lambda root: aggregators.krum(byzantine=BAD),
    "multi-krum": lambda root: aggregators.multi_krum(byzantine=BAD),
    "bulyan": lambda root: aggregators.bulyan(byzantine=BAD),
    "mda": lambda root: aggregators.mda(byzantine=BAD),
    "geometric median": lambda root: aggregators.geometric_median(),
    "centred clipping": lambda root: aggregators.centered_clipping(radius=float(root.norm()), iterations=3),
    "norm bound": lambda root: aggregators.norm_bound(),
    "fltrust": lambda root: aggregators.fltrust(root=root),
    "buckets of 2, median": lambda root: aggregators.bucketing(size=2, then=aggregators.median()),
    "nnm, trimmed mean": lambda root: aggregators.nnm(byzantine=BAD, then=aggregators.trimmed_mean(drop=BAD)),
}


def matrix(length: int) -> Tensor:
    """Honest rows around a common one, and malicious rows at twenty times their distance."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(CLIENTS, length, generator=draw)
    rows[:BAD] *= 20.0
    return rows.add_(torch.randn(length, generator=draw))


def inner_products(rows: Tensor) -> Tensor:
    """All inner products of the rows [n, n] in double precision, without a wide copy of the matrix."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for piece in rows.split(4096, dim=1):
        wide = piece.double()
        total += wide @ wide.T
    return total


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> int:
    reader = parser(__doc__ or "")
    reader.add_argument("--length", type=int, default=1_000_000, help="parameters")
    reader.add_argument("--turns", type=int, default=5, help="of which the median ratio is taken")
    options = reader.parse_args(arguments)
    length, turns = (20_000, 1) if options.quick else (options.length, options.turns)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = matrix(length)
        root, ratios = rows[-1].clone(), dict[str, list[tuple[float, float, float]]]()
        for turn in range(turns + 1):  # the first warms up
            for name, build in RULES.items():
                rule = build(root)
                # Neighbours in time: what else the machine does weighs on all three alike.
                gram, sort = seconds(lambda: inner_products(rows)), seconds(lambda: rows.median(dim=0))
                took = seconds(lambda rule=rule: rule(rows))
                if turn or options.quick:
                    ratios.setdefault(name, []).append((took, took / sort, took / gram))
            print(f"turn {turn} of {turns}", file=sys.stderr)
    finally:
        torch.set_num_threads(threads)
    found = {n: tuple(statistics.median(column) for column in zip(*each, strict=True)) for n, each in ratios.items()}
    passed = found["median"][1] <= MEDIAN and all(found[n][2] <= PRODUCTS for n in ("krum", "geometric median"))
    return finish(
        "rules",
        Findings(
            title="Time of robust rules",
            setting=[
                f"{CLIENTS} rows of {length:,} numbers in single precision, {BAD} of them malicious and far out; one "
                "thread. Every turn times `torch.median`, the inner products of all rows in double precision and the "
                f"rule one after the other; ratios are medians over {turns} turns.",
            ],
            tables=[
                Table(
                    "Times",
                    ["rule", "seconds", "times torch.median", "times inner products"],
                    [[n, *(f"{value:.2f}" for value in each)] for n, each in found.items()],
                )
            ],
            remarks=[
                f"Held to: the median within {MEDIAN:g} times `torch.median`, krum and the geometric median within "
                f"{PRODUCTS:g} times the inner products. {'Met.' if passed else 'Not met.'}",
                "Seconds depend on what else the machine does; ratios less so.",
            ],
            passed=passed,
            numbers={"ratios": {n: [list(turn) for turn in each] for n, each in ratios.items()}},
        ),
        quick=options.quick,
        out=options.out,
        arguments=arguments,
    )


if __name__ == "__main__":
    raise SystemExit(main())
