"""Groups of a cohort, each with a sum of its own, and what two sums tell together."""

import secrets
from collections.abc import Iterable, Sequence

from atoll.errors import invalid


def deal(clients: int, size: int, order: Sequence[int] | None = None) -> list[list[int]]:
    """Random groups of nearly equal size, as many as can have `size` members.

    Args:
        clients: in the cohort.
        size: fewest members of a group, at least 3.
        order: a permutation of the places that says who goes where; None: from the secure source.

    Returns:
        Places of each group, in order; sizes differ by one at most.

    Raises:
        InvalidArgument: a size below 3, or above the number of clients.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 3:
        raise invalid("size", size, "an integer of at least 3", "A sum of two shows each the other's vector.")
    if clients < size:
        raise invalid(
            "size", size, f"at most the cohort, {clients} clients", "Ask more clients, or make groups smaller."
        )
    places = list(order) if order is not None else list(range(clients))
    if order is None:
        secrets.SystemRandom().shuffle(places)
    count = clients // size
    return [sorted(places[i::count]) for i in range(count)]


def differing(before: Iterable[frozenset[str]], after: Iterable[frozenset[str]]) -> list[str]:
    """Warnings where a set of clients that is summed differs from an earlier one by a single client.

    The difference of two such sums is nearly that client's vector, once the model moves little. Only noise
    (differential privacy) or a cohort that stays the same helps.
    """
    earlier, found = list(before), list[str]()
    for group in after:
        for other in earlier:
            odd = group ^ other
            if other and len(odd) == 1:
                word = "with" if odd <= group else "without"
                found.append(
                    f"this sum is that of a round before {word} {next(iter(odd))}: the two together show much of that "
                    "client. Keep the cohort the same, draw groups anew, or add noise (differential privacy)."
                )
    return found
