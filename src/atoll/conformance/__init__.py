"""Problems with answers worked out by hand, for any implementation of federated methods.

    from atoll import conformance
    outcomes = conformance.run(adapter)         # adapter: (Problem) -> the model after every round
    print(conformance.table({"mine": outcomes}))

Problems and answers need nothing but Python, so that they can be run where torch is not: `docs/conformance.md` has all
of them. `python -m atoll.conformance` runs Atoll itself, on every engine.
"""

from atoll.conformance.problems import PROBLEMS, Client, Factors, Problem
from atoll.conformance.running import Adapter, Outcome, Unsupported, page, run, table

__all__ = ["PROBLEMS", "Adapter", "Client", "Factors", "Outcome", "Problem", "Unsupported", "page", "run", "table"]
