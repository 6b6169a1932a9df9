"""What a run records about each round, and how it is written down."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

Metrics = dict[str, float]
"""Values by metric name; nan where undefined."""


@dataclass(frozen=True, slots=True)
class Record:
    """One round of a run.

    Attributes:
        round: from 1.
        clients: clients whose updates were aggregated.
        train: "loss" over the examples of local training (nan for an empty cohort); other metrics of the new global
            model on the training examples where they were asked for.
        validation: metrics of the global model over all validation examples, or of what a rule for stopping looks at;
            empty when not evaluated.
        test: metrics of the global model over all test examples; empty when not evaluated.
        spread: each test metric over clients: mean, weighted, worst_decile, std, undefined.
        personal: metrics of the clients' personal models over all test examples; empty without personalisation.
        personal_spread: their spread over clients.
        holdout: metrics of the global model on the examples that are no client's.
        bytes_up: bytes all clients sent, tensors and scalars.
        bytes_down: bytes all clients received.
        seconds: by phase ("train", "evaluate", "save").
        simulated: seconds a round takes by its schedule, or the clock of an asynchronous run; None without either.
        epsilon: privacy spent so far; None without differential privacy.
        notes: what a reader should know, such as why a metric is undefined.
        refused: clients whose updates had no part in the round: "reason", and where they are known the "norm" of the
            update and its "distance" from the round's result. The first hundred are named.
        refusals: how many clients that are, named or not.
        staleness: steps between the models of its updates and its own, on average; None in a synchronous run.
    """

    round: int
    clients: int
    train: Metrics
    validation: Metrics = field(default_factory=dict)
    test: Metrics = field(default_factory=dict)
    spread: dict[str, Metrics] = field(default_factory=dict)
    personal: Metrics = field(default_factory=dict)
    personal_spread: dict[str, Metrics] = field(default_factory=dict)
    holdout: Metrics = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: Metrics = field(default_factory=dict)
    epsilon: float | None = None
    notes: tuple[str, ...] = ()
    refused: dict[str, dict[str, Any]] = field(default_factory=dict)
    refusals: int = 0
    simulated: float | None = None
    staleness: float | None = None

    @property
    def loss(self) -> float:
        """Mean loss over the examples of local training."""
        return self.train["loss"]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; nan becomes None."""
        return plain(asdict(self))

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Record":
        """Undo `to_dict`."""
        bare = ("epsilon", "simulated", "staleness")
        restored: dict[str, Any] = {k: v if k in bare else _restored(v) for k, v in values.items()}
        restored["notes"] = tuple(values.get("notes", ()))
        restored.setdefault("refusals", len(values.get("refused", ())))
        return Record(**restored)

    def flat(self) -> dict[str, float]:
        """One row of a table: `test_accuracy`, `test_accuracy_worst_decile`, `seconds_train`, ..."""
        row: dict[str, float] = {"round": self.round, "clients": self.clients}
        for part in ("train", "validation", "test", "personal", "holdout"):
            row |= {f"{part}_{name}": value for name, value in getattr(self, part).items()}
        for part, spread in (("test", self.spread), ("personal", self.personal_spread)):
            row |= {f"{part}_{name}_{kind}": v for name, over in spread.items() for kind, v in over.items()}
        row |= {"bytes_up": self.bytes_up, "bytes_down": self.bytes_down}
        row |= {f"seconds_{name}": value for name, value in self.seconds.items()}
        if self.simulated is not None:
            row["simulated"] = self.simulated
        if self.staleness is not None:
            row["staleness"] = self.staleness
        if self.refusals:
            row["refused"] = self.refusals
        if self.epsilon is not None:
            row["epsilon"] = self.epsilon
        return row


def plain(value: Any) -> Any:
    """JSON values of nested mappings, sequences and numbers; what is not finite becomes None."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]  # pyright: ignore[reportUnknownVariableType]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _restored(v) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType]
    return math.nan if value is None else value
