"""What the adapters share: they run in another framework's environment, and print their outcomes as JSON."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from atoll.conformance import Adapter, run


def report(adapter: Adapter, versions: dict[str, str]) -> None:
    """Run all problems and print what came of them."""
    outcomes = [asdict(outcome) for outcome in run(adapter)]
    print("OUTCOMES " + json.dumps({"versions": versions, "outcomes": outcomes}))
