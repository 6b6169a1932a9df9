"""An empty stand-in for torchvision.

fluke imports torchvision for data sets and networks that are not used here, and torchvision's wheel does not fit the
build of torch that everybody shares.
"""

import sys
import types
from importlib.machinery import ModuleSpec


def torchvision() -> None:
    """Modules named torchvision whose every attribute is an empty class."""

    def missing(name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})

    for part in ("", ".datasets", ".datasets.utils", ".models", ".transforms"):
        made = types.ModuleType(f"torchvision{part}")
        made.__spec__ = ModuleSpec(made.__name__, None)
        made.__getattr__ = missing  # type: ignore[method-assign]
        sys.modules[made.__name__] = made
