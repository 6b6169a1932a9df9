"""Who passes the conformance problems: Atoll on its engines, and other frameworks in environments of their own.

python benchmarks/speed/environments.py flower fedjax fluke pfl     # once
python benchmarks/conformance/run.py
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "speed")]

from environments import interpreter, ready
from reporting import RESULTS, Findings, Table, finish, parser

from atoll import conformance
from atoll.conformance import Outcome
from atoll.conformance.own import adapter
from atoll.engines import Loop, Vectorized

FRAMEWORKS = {
    "Flower": ("flower", "flower_.py"),
    "FedJAX": ("fedjax", "fedjax_.py"),
    "fluke": ("fluke", "fluke_.py"),
    "pfl-research": ("pfl", "pfl_.py"),
}
# Where failures come from, found in the sources of the versions that environments.py installs.
READ = {
    "fluke": "fluke 0.8.1 as its source reads: fednova's x is sum w_i y_i with w_i = p_i (sum p_j K_j) / K_i, which "
    "sum to one where the K_i are equal alone; fedavgm's x stays as it is in the first round; fedadagrad, fedadam "
    "and fedyogi multiply d by the server's rate, and begin with v = 0.",
    "pfl-research": "pfl 0.6.0 as its source reads: scaffold's c_i <- c_i - c + (y - x) / (K eta), and -a_i (x - b_i) "
    "under option I, have the opposite sign; under option I users whose state is in memory share one tensor, too; "
    "fedadam is torch's optimiser, which corrects bias and begins with v = 0.",
}
ENGINES = {"loop": lambda: Loop(), "rows": lambda: Vectorized("rows"), "single": lambda: Vectorized("single")}
MINUTES = 15


def other(environment: str, script: str) -> tuple[list[Outcome], dict[str, str]] | str:
    """A framework's outcomes and versions, or why there are none."""
    if not ready(environment):
        return f"no environment: python benchmarks/speed/environments.py {environment}"
    command = [str(interpreter(environment)), str(HERE / script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("OUTCOMES "):
            found = json.loads(line.removeprefix("OUTCOMES "))
            return [Outcome(**o) for o in found["outcomes"]], found["versions"]
    last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
    return f"its adapter ended without outcomes: {last}"


def cell(outcome: Outcome) -> str:
    """What the table says."""
    if outcome.verdict == "fails":
        return f"**{outcome.detail}**"
    if outcome.verdict in ("raises", "not offered"):
        return f"{outcome.verdict}: {outcome.detail}"
    return outcome.verdict


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser((__doc__ or "").partition("\n")[0]).parse_args(arguments)
    chosen = dict(list(ENGINES.items())[:1]) if options.quick else ENGINES
    outcomes = {f"Atoll, {name}": conformance.run(adapter(build())) for name, build in chosen.items()}
    own, versions, absent = list(outcomes), {}, []
    for name, (environment, script) in {} if options.quick else FRAMEWORKS.items():
        found = other(environment, script)
        if isinstance(found, str):
            absent.append(f"{name} was not run: {found}.")
            continue
        outcomes[name], told = found
        versions |= told
        print(f"{name} done", file=sys.stderr)
    rows = [
        [each[0].method, each[0].problem, *(cell(o) for o in each)] for each in zip(*outcomes.values(), strict=True)
    ]
    counts = "; ".join(
        f"{name}: {sum(o.verdict == 'passes' for o in each)} pass, {sum(o.verdict == 'fails' for o in each)} fail, "
        f"{sum(o.verdict == 'raises' for o in each)} raise, "
        f"{sum(o.verdict == 'not offered' for o in each)} are not offered"
        for name, each in outcomes.items()
    )
    passed = all(o.verdict == "passes" for name in own for o in outcomes[name])
    found = Findings(
        title="Who passes the conformance problems",
        setting=[
            "The problems, their derivations and expected numbers are in docs/conformance.md. A failure says by how "
            "much the furthest number was off, and after which round. Other frameworks run through the adapters beside "
            "the script, in double precision, with the settings a problem names; what pfl-research hands from a client "
            "to the server is in single precision always. Where a framework means something else by a setting (a "
            "server optimiser that corrects bias, or whose second moment begins at another value) the difference shows "
            "as a failure: it is not the formula of the paper that the problem cites, and need not be a defect. In "
            "Flower the client is its user's code: of fedprox its strategy alone is tried.",
            "Versions: " + (", ".join(f"{n} {v}" for n, v in versions.items()) or "none of another framework") + ".",
        ],
        tables=[Table("Outcomes", ["method", "problem", *outcomes], rows)],
        remarks=[counts + ".", *(READ[name] for name in outcomes if name in READ), *absent],
        passed=passed,
        numbers={
            "versions": versions,
            "outcomes": {
                name: [[o.method, o.problem, o.verdict, None if o.off != o.off else o.off, o.detail] for o in each]
                for name, each in outcomes.items()
            },
        },
    )
    out = options.out or (None if options.quick else RESULTS / "conformance")
    return finish("conformance/run", found, quick=options.quick, out=out, arguments=arguments)


if __name__ == "__main__":
    raise SystemExit(main())
