"""Imports point downwards, stay cheap, and nothing unpickles."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "atoll"

# From the bottom up; a module may import what stands in a lower row or in its own package.
LAYERS = (
    ("errors",),
    ("spec", "random", "secret", "tree", "mapped", "space", "database"),
    ("vectors", "losses", "rate", "analytics", "history", "privacy", "secagg"),
    ("local", "server", "sampling", "stopping", "memory", "journal", "metrics", "messages"),
    ("schedule", "model", "data", "report"),
    ("partition", "datasets", "cohort", "keras"),
    ("algorithms", "transforms", "aggregators", "evaluation"),
    ("engines", "attacks", "composition", "collecting"),
    ("rounds",),
    ("asynchronous",),
    ("result", "net", "releases", "example_releases", "client_releases"),
    ("simulation",),
    ("experiment", "transfer"),
    ("study", "bench", "conformance", "deployment"),
    ("tuning",),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


UNSAFE = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml"}
"""Modules that make objects of anybody's choice from bytes."""


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules imported at run time, anywhere in a file: what stands under TYPE_CHECKING does not count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            if node.module == "atoll":
                yield from (f"atoll.{alias.name}" for alias in node.names)
        else:
            yield from imports(node)


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    here = room(path)
    if here == "__init__":
        return
    assert here in RANK, f"{here} has no place in LAYERS"
    for name in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "atoll" and len(parts) > 1 and parts[1] != "__version__" and parts[1] != here:
            assert RANK[parts[1]] < RANK[here], f"{path.name} imports {name} upwards"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_unpickles_or_evaluates(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not UNSAFE & {name.split(".")[0] for name in imports(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "torch.load", "numpy.load", "np.load", "pandas.read_pickle"), called


NETWORK = ("net/server", "net/hub", "net/client", "net/site", "deployment/runner", "deployment/worker")


LOADERS = ("exec_module", "load_module")
LOADING = ("experiment.py",)
"""The file that loads an app file."""


@pytest.mark.parametrize("start", NETWORK)
def test_no_object_is_made_from_bytes_where_the_network_reaches(start: str) -> None:
    """From every program of the road on, through all that it imports of the package: no unpickling, no evaluation.

    An author's file is the one exception: `experiment` loads it, in processes without keys, once its hash is approved.
    """
    seen, left = set[Path](), [PACKAGE / f"{start}.py"]
    while left:
        path = left.pop()
        if path in seen or not path.exists():
            continue
        seen.add(path)
        tree = ast.parse(path.read_text())
        found = {name for name in imports(tree) if name.split(".")[0] != "atoll"}
        assert not {n for n in found if n.split(".")[0] in UNSAFE}, path
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                executes = called in ("eval", "exec", "__import__", "compile") or called.endswith(LOADERS)
                loads_app = called.endswith(LOADERS) and path.name in LOADING
                assert not executes or loads_app, f"{path}: {called}"
                assert not any(ast.unparse(k) == "shell=True" for k in node.keywords), path
                assert called not in ("os.system", "os.popen", "torch.load", "torch.jit.load"), path
        for name in imports(tree):
            if name.startswith("atoll."):
                way = PACKAGE.joinpath(*name.split(".")[1:])
                left += [way.with_suffix(".py"), way / "__init__.py"]
    assert len(seen) > 10


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import atoll",
        "import atoll, atoll.cli",
        "import atoll.net.server, atoll.cli.serving, atoll.cli.operating",
        "from typer.testing import CliRunner\nimport atoll.cli\n"
        "assert CliRunner().invoke(atoll.cli.app, ['--help']).exit_code == 0",
    ],
)
def test_importing_is_cheap(code: str) -> None:
    assert not {"torch", "pandas", "matplotlib", "numpy", "sqlalchemy"} & modules_after(code)


def test_a_servers_process_has_its_state_and_no_tensors() -> None:
    assert not {"torch", "pandas", "numpy"} & modules_after("import atoll.net.server, atoll.net.state")


def test_every_public_name_exists() -> None:
    import atoll

    for name in atoll.__all__:
        assert getattr(atoll, name) is not None
    assert set(atoll.__all__) <= set(dir(atoll))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = atoll.nothing
