"""Early stopping: a run ends when its validation metric has not improved for a number of rounds.

Prechelt 1998, "Early stopping - but when?": stop when the best value is `patience` evaluations old. Whether to stop is
a function of the values so far alone, so that a run that was resumed stops where an uninterrupted one does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

from atoll.errors import invalid
from atoll.spec import Spec, record

if TYPE_CHECKING:
    from atoll.data import FederatedDataset


@dataclass(frozen=True, slots=True)
class EarlyStopping:
    """When to stop; built by `early_stopping`.

    Attributes:
        patience: evaluations without improvement.
        metric: which metric.
        least: how much better a value must be to count as an improvement.
        clients: clients that only validate; None: the validation examples of those that train.
        personal: whether the clients' personal models are looked at instead of the global one.
    """

    patience: int
    metric: str
    least: float
    clients: "FederatedDataset | None"
    personal: bool

    def best(self, values: Sequence[float], better: int) -> int:
        """The place of the best value: one that was improved upon by less than `least` stays the best.

        Args:
            values: of the metric, in the order of evaluations; what is not finite never is the best.
            better: +1 where higher is better, -1 where lower is.

        Returns:
            -1 when no value is finite.
        """
        place = -1
        for i, value in enumerate(values):
            if isfinite(value) and (place < 0 or better * (value - values[place]) > self.least):
                place = i
        return place

    def done(self, values: Sequence[float], better: int) -> bool:
        """Whether the run should end after these values."""
        return len(values) - 1 - self.best(values, better) >= self.patience

    @property
    def spec(self) -> Spec:
        """Name and arguments."""
        held = None if self.clients is None else self.clients.fingerprint()
        return record(
            "early_stopping",
            patience=self.patience, metric=self.metric, least=self.least, clients=held, personal=self.personal,
        )  # fmt: skip


def early_stopping(
    patience: int,
    metric: str = "loss",
    *,
    least: float = 0.0,
    clients: "FederatedDataset | None" = None,
    personal: bool = False,
) -> EarlyStopping:
    """Stop a run when a validation metric has not improved for some evaluations; for `simulate(stop=...)`.

    Test examples have no say: a number that decided when to stop says nothing about new examples any more. The result
    is the model of the last round; a note names the best one, and a run of so many rounds gives its model, to the bit.

    Args:
        patience: evaluations without improvement before the run ends, at least 1.
        metric: "loss", or the name of one of the model's metrics.
        least: improvements must be larger than this.
        clients: a dataset of clients that do not train, all of whose training examples validate; default the validation
            examples of the clients that train, which `data.split(validation=0.2)` cuts.
        personal: look at the clients' personal models instead of the global one.

    Raises:
        InvalidArgument: an argument outside its range.
    """
    if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
        raise invalid("patience", patience, "a number of evaluations of at least 1")
    if not isinstance(metric, str) or not metric:
        raise invalid("metric", metric, 'the name of a metric, such as "loss"')
    if isinstance(least, bool) or not isinstance(least, int | float) or not 0 <= least < float("inf"):
        raise invalid("least", least, "a finite number of at least 0")
    if clients is not None and not hasattr(clients, "fingerprint"):
        raise invalid("clients", clients, "a FederatedDataset", "Take data.select([...]) of clients that do not train.")
    return EarlyStopping(patience, metric, float(least), clients, personal)
