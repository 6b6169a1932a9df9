"""What methods refuse before any work, each with the argument, its value, what is allowed and the way out."""

from math import inf, nan

from atoll.errors import InvalidArgument, invalid
from atoll.local import Plan


def check_plan(plan: object, argument: str = "plan") -> None:
    """Refuse anything but a plan of local training."""
    if not isinstance(plan, Plan):
        raise invalid(argument, plan, "local training", "Write for instance fedavg(atoll.local_sgd(lr=0.1)).")


def check_plain(method: str, plan: Plan, reason: str, remedy: str = "") -> None:
    """Refuse local training whose steps are not `y - rate * gradient`."""
    if not plan.plain:
        raise InvalidArgument(
            f"{method} needs plain sgd steps, but plan has optimizer={plan.optimizer!r}, momentum={plan.momentum:g}, "
            f"weight_decay={plan.weight_decay:g}: {reason}. Use local_sgd(lr=..., momentum=0, weight_decay=0)."
            f" {remedy}".rstrip()
        )


def check_number(name: str, value: object, *, least: float = 0.0, most: float = inf, strict: bool = False) -> None:
    """Refuse what is not a finite number in a range.

    Args:
        name: of the argument.
        value: its value.
        least: lower end.
        most: upper end, which is allowed.
        strict: the lower end is not allowed.
    """
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else nan
    if not least <= number <= most or number == inf or (strict and number == least):
        if most < inf:
            allowed = f"in {'(' if strict else '['}{least:g}, {most:g}]"
        else:
            allowed = f"a finite number {'above' if strict else 'of at least'} {least:g}"
        raise invalid(name, value, allowed)


def check_count(name: str, value: object, least: int = 1) -> None:
    """Refuse what is not an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise invalid(name, value, f"an integer of at least {least}")


def check_pull(name: str, value: float, plan: Plan) -> None:
    """Refuse the strength of a pull that is negative, or whose own steps would overshoot ever further."""
    check_number(name, value)
    bound = 2 * (1 + plan.momentum) / plan.lr
    if plan.optimizer == "sgd" and plan.schedule is None and value >= bound:
        raise invalid(
            name, value, f"below 2 (1 + momentum) / lr = {bound:g}, else the pull's own steps overshoot ever further",
            f"Lower lr, or {name}.",
        )  # fmt: skip
