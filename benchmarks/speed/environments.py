"""Builds an environment for each framework in the speed benchmark: one command, from nothing.

    python benchmarks/speed/environments.py            # all of them
    python benchmarks/speed/environments.py fedjax     # one of them

Each is a virtual environment of its own below the cache folder, with a constraints file that pins torch, so that no
framework brings another build of it. What was installed is recorded beside it as `NAME.txt`. Atoll and the hand-written
contestants run in the environment that runs the benchmark.
"""

import argparse
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CACHE = Path.home() / ".cache" / "atoll-bench"
TORCH = "torch==2.13.0"


@dataclass(frozen=True, slots=True)
class Environment:
    """What a framework's environment holds.

    Attributes:
        name: its folder.
        packages: requirements, in the order in which they are installed.
        proof: a line of Python that shows that it works.
    """

    name: str
    packages: tuple[str, ...]
    proof: str


ENVIRONMENTS = {
    made.name: made
    for made in (
        Environment("flower", (TORCH, "numpy>=2", "flwr[simulation]==1.41.0"), "import torch, ray, flwr.simulation"),
        Environment("pfl", (TORCH, "numpy>=2", "pfl[pytorch]==0.6.0"), "import torch, pfl.model.pytorch"),
        Environment(
            "fedjax",
            ("numpy>=2", "jax==0.10.2", "jaxlib==0.10.2", "fedjax==0.0.17"),
            "import jax; jax.tree_map = jax.tree_util.tree_map; import fedjax",
        ),
        # fluke imports torchvision, whose wheels do not fit every build of torch: contestants/stand_in.py stands in.
        Environment("fluke", (TORCH, "fluke-fl==0.8.1"), "import torch, omegaconf"),
    )
}


def interpreter(name: str, cache: Path = CACHE) -> Path:
    """The Python of an environment, whether it exists or not."""
    return cache / name / "bin" / "python"


def ready(name: str, cache: Path = CACHE) -> bool:
    """Whether an environment was built to its end."""
    return interpreter(name, cache).exists() and (cache / f"{name}.txt").exists()


def build(made: Environment, cache: Path) -> None:
    """Build an environment, replacing what is there."""
    cache.mkdir(parents=True, exist_ok=True)
    record = cache / f"{made.name}.txt"
    record.unlink(missing_ok=True)
    constraints = cache / "constraints.txt"
    constraints.write_text(TORCH + "\n")
    venv.create(cache / made.name, clear=True, with_pip=True)
    python = str(interpreter(made.name, cache))
    for package in made.packages:
        print(f"{made.name}: {package}", flush=True)
        install = (python, "-m", "pip", "install", "--quiet", "--constraint", str(constraints), package)
        subprocess.run(install, check=True)
    subprocess.run((python, "-c", made.proof), check=True)
    frozen = subprocess.run((python, "-m", "pip", "freeze"), check=True, capture_output=True, text=True)
    record.write_text(frozen.stdout)  # last: its presence says that the environment is whole


def main(arguments: Sequence[str] | None = None) -> int:
    reader = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    reader.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(ENVIRONMENTS)}; default all")
    reader.add_argument("--cache", type=Path, default=CACHE, help="where they are")
    reader.add_argument("--again", action="store_true", help="build those that are ready, too")
    options = reader.parse_args(arguments)
    unknown = set(options.names) - set(ENVIRONMENTS)
    if unknown:
        reader.error(f"no environment {', '.join(sorted(unknown))}; there are {', '.join(ENVIRONMENTS)}")
    failed = list[str]()
    for name in options.names or ENVIRONMENTS:
        if ready(name, options.cache) and not options.again:
            print(f"{name}: ready")
            continue
        try:
            build(ENVIRONMENTS[name], options.cache)
        except subprocess.CalledProcessError as error:
            print(f"{name}: failed: {error}", file=sys.stderr)
            failed.append(name)
        else:
            print(f"{name}: ready")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
