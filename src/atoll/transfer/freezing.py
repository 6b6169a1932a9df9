"""Frozen parts of a module: constants of the model, which no round trains, sends or changes."""

from fnmatch import fnmatchcase

from torch import nn

from atoll.errors import invalid


def freeze(module: nn.Module, *names: str) -> nn.Module:
    """Make submodules constants: no gradients, and eval mode, so that dropout rests and statistics do not move.

    Args:
        module: changed in place, as by `requires_grad_`, and put in train mode but for the named parts.
        names: names or shell-style patterns of submodules, for instance "backbone" or "blocks.[0-8]".

    Returns:
        The module.

    Raises:
        InvalidArgument: no name, a pattern that matches no submodule, or nothing left to train.
    """
    known = [name for name, _ in module.named_modules() if name]
    if not names:
        raise invalid("names", names, "names of submodules", f"The module has {_some(known)}.")
    chosen: set[str] = set()
    for pattern in names:
        found = {name for name in known if fnmatchcase(name, pattern)}
        if not found:
            raise invalid("names", pattern, f"a pattern that matches submodules: {_some(known)}")
        chosen |= found
    held = {id(p) for name in chosen for p in module.get_submodule(name).parameters()}
    if not any(p.requires_grad and id(p) not in held for p in module.parameters()):
        raise invalid("names", names, "names that leave parameters to train", "Leave the head out.")
    module.train()
    for name in chosen:
        module.get_submodule(name).requires_grad_(False).eval()
    return module


def _some(names: list[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
