"""How fast codecs encode and decode: megabytes of float32 for each second of one core.

Seconds are the processor's, which a busy machine stretches less than the clock; a plain copy of the same row is timed
in the same turns, for what the machine gave at that time.
"""

import time
from collections.abc import Callable, Sequence

import torch
from reporting import Findings, Table, finish, parser

from atoll import random
from atoll.transforms import (
    Transform,
    eden,
    entropy_code,
    half,
    plain,
    power_sgd,
    quantize,
    rand_k,
    rotate,
    sign,
    top_k,
)
from atoll.transforms.chain import Chain, compose, keys_of
from atoll.vectors import Layout

NUMBERS = 10_000_000
LEAST = 100.0
"""Megabytes of float32 a second that `HELD` must encode and decode."""
HELD = ("quantize 4", "eden 1")

CODECS: dict[str, Callable[[], tuple[Transform, ...]]] = {
    "half": lambda: (half(),),
    "bfloat16": lambda: (half("bfloat16"),),
    **{f"quantize {b}": lambda b=b: (quantize(b),) for b in (1, 2, 4, 8, 12)},
    **{f"eden {b}": lambda b=b: (eden(b),) for b in (1, 2, 4)},
    "sign": lambda: (sign(),),
    "top 1 %": lambda: (top_k(0.01),),
    "random 1 %": lambda: (rand_k(0.01),),
    "rotate": lambda: (rotate(),),
    "PowerSGD 4": lambda: (power_sgd(4),),
    "quantize 4, coded": lambda: (quantize(4), entropy_code()),
}
"""coded: entropy_code behind it."""


def measure(chain: Chain, row: torch.Tensor, turns: int) -> dict[str, float]:
    """Least seconds of the processor over turns, and bytes."""
    length = row.shape[1]
    keys = keys_of(0, 0, random.client_keys(["a"]), length)
    shared = chain.share(chain.init(length, length))
    least = {"copy": float("inf"), "encode": float("inf"), "decode": float("inf")}
    size = 0
    for _ in range(turns):
        marks = [time.process_time()]
        row.clone()
        marks.append(time.process_time())
        wire, _ = chain.encode(row, {}, shared, keys)
        marks.append(time.process_time())
        chain.decode_each(wire, shared, length, keys, row.dtype)
        marks.append(time.process_time())
        for name, before, after in zip(least, marks, marks[1:], strict=False):
            least[name] = min(least[name], after - before)
        tensors = [wire] if isinstance(wire, torch.Tensor) else list(wire.values())
        size = sum(t.numel() * t.element_size() for t in tensors)
    return {**least, "bytes": float(size)}


def main(arguments: Sequence[str] | None = None) -> int:
    reader = parser(__doc__ or "")
    options = reader.parse_args(arguments)
    torch.set_num_threads(1)
    side = 64 if options.quick else int(NUMBERS**0.5)
    row = torch.randn(1, side * side, generator=torch.Generator().manual_seed(0))
    layout, size = Layout(("weight",), ((side, side),)), 4 * side * side
    found = {
        name: measure(compose(build(), plain()).bind(layout), row, 1 if options.quick else 3)
        for name, build in CODECS.items()
    }
    speeds = {n: {k: size / max(f[k], 1e-9) / 1e6 for k in ("copy", "encode", "decode")} for n, f in found.items()}
    slowest = min(min(speeds[n]["encode"], speeds[n]["decode"]) for n in HELD)
    findings = Findings(
        title="Speed of the codecs",
        setting=[
            f"One row of {side * side:,} normal float32 numbers, one thread; the best of three turns, in seconds of "
            "the processor. Megabytes of float32 a second; `copy` is a copy of the row between these turns."
        ],
        tables=[
            Table(
                "Megabytes of float32 a second",
                ["codec", "encode", "decode", "copy", "times smaller"],
                [
                    [
                        name,
                        *(f"{speeds[name][k]:,.0f}" for k in ("encode", "decode", "copy")),
                        f"{size / run['bytes']:.1f}",
                    ]
                    for name, run in found.items()
                ],
            )
        ],
        remarks=[
            f"{' and '.join(f'`{n}`' for n in HELD)} must encode and decode at least {LEAST:g} MB/s; the slowest of "
            f"these was {slowest:.0f} MB/s here. A machine that does other work is slower, also in the processor's "
            "seconds: see the load below."
        ],
        passed=slowest >= LEAST,
        numbers={"seconds": found, "megabytes a second": speeds},
    )
    return finish("compression_speed", findings, quick=options.quick, out=options.out, arguments=arguments)


if __name__ == "__main__":
    raise SystemExit(main())
