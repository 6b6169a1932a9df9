"""Where the recipes are: beside the package in a checkout, inside it when installed."""

from pathlib import Path

from atoll.errors import unknown


def recipe_path(name: str) -> Path:
    """The app file of a recipe, such as "healthcare".

    Raises:
        InvalidArgument: there is no such recipe; the message names those there are.
    """
    found = recipe_names()
    if name not in found:
        raise unknown("recipe", name, found)
    return next(folder / name / "app.py" for folder in _folders() if (folder / name / "app.py").is_file())


def recipe_names() -> list[str]:
    """Names of the recipes that come with this installation."""
    return sorted({path.parent.name for folder in _folders() for path in folder.glob("*/app.py")})


def _folders() -> list[Path]:
    package = Path(__file__).resolve().parents[1]
    installed, checkout = package / "_recipes", package.parents[1] / "recipes"
    return [
        f
        for f in (installed, checkout)
        if f.is_dir() and (f is installed or (package.parents[1] / "pyproject.toml").is_file())
    ]
