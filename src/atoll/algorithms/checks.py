"""What methods refuse before any work, each with the argument, its value, what is allowed and the way out."""

from math import inf, nan
from numbers import Integral, Real

from atoll.errors import InvalidArgument, invalid
from atoll.local import Plan


def check_plan(plan: object, argument: str = "plan") -> None:
    """Refuse anything but a plan of local training."""
    if not isinstance(plan, Plan):
        example = "fedavg(atoll.local_sgd(lr=0.1))" if argument == "plan" else f"{argument}=atoll.local_sgd(lr=0.1)"
        raise invalid(argument, plan, "local training", f"Write for instance {example}.")


def check_plain(method: str, plan: Plan, reason: str, remedy: str = "") -> None:
    """Refuse local training whose steps are not `y - rate * gradient`."""
    if not plan.plain:
        raise InvalidArgument(
            f"{method} needs plain sgd steps, but plan has optimizer={plan.optimizer!r}, momentum={plan.momentum:g}, "
            f"weight_decay={plan.weight_decay:g}, clip={plan.clip}: {reason}. Use local_sgd(lr=...) without these."
            f" {remedy}".rstrip()
        )


def check_number(name: str, value: object, *, least: float = 0.0, most: float = inf, strict: bool = False) -> float:
    """A finite number in a range, NumPy's too, as a Python number; anything else is refused.

    Args:
        name: of the argument.
        value: its value.
        least: lower end.
        most: upper end, which is allowed.
        strict: the lower end is not allowed.
    """
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else nan
    if not least <= number <= most or number == inf or (strict and number == least):
        if most < inf:
            allowed = f"in {'(' if strict else '['}{least:g}, {most:g}]"
        else:
            allowed = f"a finite number {'above' if strict else 'of at least'} {least:g}"
        raise invalid(name, value, allowed)
    return value if isinstance(value, int | float) else number


def check_count(name: str, value: object, least: int = 1) -> int:
    """An integer of at least `least`, NumPy's too, as a Python number; anything else is refused."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise invalid(name, value, f"an integer of at least {least}")
    return int(value)


def check_pull(name: str, value: float, plan: Plan) -> float:
    """The strength of a pull, as a Python number; refused when negative, or when its steps overshoot ever further."""
    number = check_number(name, value)
    bound, told = 2 * (1 + plan.momentum) / plan.lr - plan.weight_decay, "2 (1 + momentum) / lr"
    if plan.optimizer == "sgd" and plan.schedule is None and number and number >= bound:
        told += " - weight_decay" if plan.weight_decay else ""
        raise invalid(
            name, value, f"below {told} = {bound:g}, else the pull's own steps overshoot ever further",
            f"Lower lr, or {name}.",
        )  # fmt: skip
    return number
