"""`python -m atoll.conformance`: Atoll on every engine; `--problems` prints the problems instead."""

import sys

from atoll.conformance import page, run, table


def main() -> int:
    """Print the table; 1 when something does not pass."""
    if "--problems" in sys.argv[1:]:
        sys.stdout.write(page())
        return 0
    from atoll.conformance.own import adapter
    from atoll.engines import Loop, Vectorized

    engines = {"loop": Loop(), "rows": Vectorized("rows"), "single": Vectorized("single")}
    outcomes = {name: run(adapter(engine)) for name, engine in engines.items()}
    sys.stdout.write(table(outcomes) + "\n")
    return 0 if all(o.verdict == "passes" for each in outcomes.values() for o in each) else 1


if __name__ == "__main__":
    raise SystemExit(main())
