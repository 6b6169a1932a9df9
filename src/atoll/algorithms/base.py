"""The algorithm record: a federated method as pure functions on one tile of clients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import Tensor

from atoll.cohort import Cohort
from atoll.local import Plan
from atoll.model import Model
from atoll.sampling import Sampler
from atoll.spec import Spec
from atoll.vectors import Aggregate, Personal, Update

if TYPE_CHECKING:
    from atoll.data import FederatedDataset

Memory = dict[str, Tensor]
"""A client's own named tensors; rows [C, ...] when they belong to a tile."""


class Message(NamedTuple):
    """The least a server sends: the shared parameters [D] clients start from. Other messages add fields."""

    vector: Tensor


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A federated method. Functions are pure; `vector [D]` holds the parameters shared with the server.

    Attributes:
        spec: name and arguments.
        init: (vector [D]) -> the server's state.
        broadcast: (state) -> message, a record whose first field is `vector [D]`.
        local: (message, memory rows, cohort) -> (Update, memory rows).
        step: (state, Aggregate) -> state.
        client_init: (vector [D], buffers [B]) -> a client's memory at its first visit.
        model: (state) -> the global model's shared parameters [D].
        personal: (message, memory rows, cohort) -> the models the clients would use; None: the global model with
            each client's private parameters and buffers.
        private: (Model) -> names of the parameters that never leave a client; the framework keeps them there.
        buffers: "local" when floating buffers stay with the client whatever the model's rule says.
        pooled: the clients' examples are put together first (the centralised baseline; never in a deployment).
        sampler: the order of clients the method prescribes, if it does.
        asynchronous: whether updates may be applied to a newer state than they were computed from.
        sums: (D) -> length of the updates' summed part.
        scalars: the summed part holds numbers of other units than the update (losses, lengths, counts), so that stages
            which clip or quantise a row as one vector are refused, and channels that cut every number alike.
        additive: the summed part is only right when it is added up: rules that choose among clients are refused.
        statistics: the summed part holds statistics of the clients' examples that are only right when they are exact:
            it is float64 whatever the model is, stages that would change it are refused, and so is a round in which a
            channel had to cut a number.
        plans: the local training it will do, once for each, for checks before any work; under example-level privacy
            what is not listed is refused, for nobody would count it.
        rooted: whether the step reads what training on the server's own data gave (`Aggregate.root`).
        bind: (Model) -> the algorithm for this model, whose functions then count; refuses models the method is not made
            for, when a process is built. None: it takes any.
        accepts: (Model, data) -> None; refuses what only the data tell, before any work.
    """

    spec: Spec
    init: Callable[[Tensor], Any]
    broadcast: Callable[[Any], Any]
    local: Callable[[Any, Memory, Cohort], tuple[Update, Memory]]
    step: Callable[[Any, Aggregate], Any]
    client_init: Callable[[Tensor, Tensor], Memory] | None = None
    model: Callable[[Any], Tensor] = lambda state: state.vector
    personal: Callable[[Any, Memory, Cohort], Personal] | None = None
    private: Callable[[Model], frozenset[str]] | None = None
    buffers: Literal["local"] | None = None
    pooled: bool = False
    sampler: Sampler | None = None
    asynchronous: bool = False
    sums: Callable[[int], int] = lambda size: 0
    scalars: bool = False
    additive: bool = False
    statistics: bool = False
    plans: tuple[Plan, ...] = ()
    rooted: bool = False
    bind: "Callable[[Model], Algorithm] | None" = None
    accepts: "Callable[[Model, FederatedDataset], None] | None" = None

    @property
    def name(self) -> str:
        """The method's name."""
        return str(self.spec["name"])
