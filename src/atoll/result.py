"""What a run gives back: the model, its history, and ways to look at both."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from atoll.errors import InvalidArgument, RunError, invalid
from atoll.evaluation import Evaluation, evaluate
from atoll.history import Record, plain
from atoll.journal import atomically, write_atomically
from atoll.model import Model
from atoll.spec import Spec

if TYPE_CHECKING:
    import pandas

    from atoll.data import FederatedDataset, LazyDataset
    from atoll.rounds import Process, State


PERSONAL_BYTES = 2 * 2**30
"""Personal models are saved with a result up to this size."""

PERSONAL_CLIENTS = 1_000
"""Of methods that make a model for whoever asks, the models of all clients are saved up to so many; more are not drawn
at once for it either."""


Saved = Literal["none", "visited", "all", "not"]
"""Whose personal models a result has: there are none, of all who were visited, of all clients, or not saved."""


@dataclass(slots=True)
class Result:
    """A run's outcome.

    Attributes:
        vector: the global model's parameters, [P].
        buffers: its floating buffers, [B].
        history: one record per round.
        spec: everything that decides the result.
        engine: which path ran, and why.
        privacy: a statement for each privacy guarantee; empty without differential privacy.
        clients: final test metrics of every client, of the global model ("global") and the personal ones ("personal").
        notes: what a reader should know.
        directory: the run directory, if there is one.
        model: the model; None after `load` without one.
    """

    vector: Tensor
    buffers: Tensor
    history: list[Record]
    spec: Spec
    engine: dict[str, Any]
    privacy: list[dict[str, Any]] = field(default_factory=list)
    clients: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    directory: Path | None = None
    model: Model | None = None
    _process: "Process | None" = None
    _state: "State | None" = None
    _data: "FederatedDataset | LazyDataset | None" = None
    _personal: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _saved: Saved = "none"

    # --- the model ----------------------------------------------------------------------------------------------------

    def module(self, client: str | None = None) -> nn.Module:
        """The trained module, in eval mode: the global one, or a client's personal one."""
        if client is None:
            return self._model("module").module(self.vector, self.buffers)
        vector, buffers = self._own(client)
        return self._model("module").module(vector, buffers)

    def personal(self, client: str) -> Tensor:
        """The parameters [P] this client would use: its personal model, or the global one where there is none.

        Raises:
            RunError: the result was loaded, and this client's model was not saved with it.
        """
        return self._own(client)[0]

    @property
    def personalised(self) -> bool:
        """Whether clients have models of their own; of a loaded result, whether they were saved with it."""
        return self._process.personalised if self._process is not None else bool(self._personal)

    def predict(self, x: Any, client: str | None = None) -> Tensor:
        """Outputs [n, ...] for inputs x [n, ...] (a tensor or array), or for a mapping of fields."""
        model = self._model("predict")
        fields: dict[str, Any] = dict(x) if isinstance(x, dict) else {"x": x}  # pyright: ignore[reportUnknownArgumentType]
        batch = {n: torch.as_tensor(t) for n, t in fields.items()}
        batch = {n: t.to(model.dtype) if t.is_floating_point() else t for n, t in batch.items()}
        vector, buffers = (self.vector, self.buffers) if client is None else self._own(client)
        with torch.no_grad():
            return model.call(model.layout.view(vector), model.buffer_layout.view(buffers), batch, train=False)

    def evaluate(
        self, data: "FederatedDataset | LazyDataset", *, split: str = "test", personal: bool = False
    ) -> Evaluation:
        """Metrics per client and overall on a split: of the global model, or of each client's personal one."""
        if not personal:
            model = self._model("evaluate")
            return evaluate(model, self.vector, data, split=split, buffers=self.buffers)
        if self._process is None or self._state is None:
            raise InvalidArgument("personal models of a loaded result cannot be evaluated: resume the run instead.")
        return self._process.evaluate(self._state, data, split=split, personal=True)

    # --- the history --------------------------------------------------------------------------------------------------

    def to_frame(self) -> "pandas.DataFrame":
        """The history as a table: one row per round, one column per metric."""
        import pandas

        return pandas.DataFrame([record.flat() for record in self.history]).set_index("round")  # pyright: ignore

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the history; returns the matplotlib figure, and saves it when a path is given."""
        from atoll.report import plot_history

        return plot_history(self.history, path, title=str(self.spec.get("title", "")))

    def report(self, path: str | Path) -> Path:
        """Write a self-contained HTML page about the run; returns its path."""
        from atoll.report import write_report

        return write_report(self, Path(path))

    # --- files --------------------------------------------------------------------------------------------------------

    def save(self, directory: str | Path) -> Path:
        """Write parameters (safetensors) and history (JSON) to a directory; returns it.

        Personal models are saved of the clients that were visited; of methods that keep nothing and make a model for
        whoever asks, of all clients, up to 1,000 of them; of a run with differential privacy only those that its
        epsilon covers. A note says where they were not saved.
        """
        from safetensors.torch import save_file

        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        self._keep_personal()
        tensors = {"vector": self.vector.cpu().contiguous(), "buffers": self.buffers.cpu().clone()}
        for name, (vector, buffers) in self._personal.items():
            tensors[f"personal/{name}"] = vector.cpu().clone()
            tensors[f"personal_buffers/{name}"] = buffers.cpu().clone()
        with atomically(folder / "result.safetensors") as temporary:
            save_file(tensors, temporary)
        body = {
            "history": [r.to_dict() for r in self.history],
            "spec": self.spec,
            "engine": self.engine,
            "privacy": self.privacy,
            "clients": plain(self.clients),
            "notes": self.notes,
            "personal": self._saved,
        }
        write_atomically(folder / "result.json", json.dumps(body, allow_nan=False, indent=1).encode())
        return folder

    @staticmethod
    def load(directory: str | Path, model: Model | None = None) -> "Result":
        """Read what `save` wrote.

        Args:
            directory: of the result; a run directory of a finished run is one.
            model: the model it belongs to, for `module`, `predict` and `evaluate`.

        Raises:
            RunError: there is no result, or it belongs to another model.
        """
        from safetensors.torch import load_file

        folder = Path(directory)
        if not (folder / "result.json").exists():
            hint = " The run is unfinished: resume it." if (folder / "journal.sqlite").exists() else ""
            raise RunError(f"{folder} holds no result.json.{hint}")
        body = json.loads((folder / "result.json").read_text())
        tensors = load_file(folder / "result.safetensors")
        if model is not None and len(tensors["vector"]) != model.size:
            raise RunError(f"{folder} holds {len(tensors['vector'])} parameters, but the model has {model.size}.")
        result = Result(
            tensors["vector"],
            tensors["buffers"],
            [Record.from_dict(r) for r in body["history"]],
            body["spec"],
            body["engine"],
            body["privacy"],
            clients_of(body["clients"]),
            body["notes"],
            folder,
            model,
        )
        prefix = "personal/"
        result._personal = {
            n.removeprefix(prefix): (t, tensors[f"personal_buffers/{n.removeprefix(prefix)}"])
            for n, t in tensors.items()
            if n.startswith(prefix)
        }
        result._saved = body["personal"]
        return result

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _keep_personal(self) -> None:
        """Hold the personal models of the clients that have one, apart from the memory a later run goes on with."""
        process, state, data = self._process, self._state, self._data
        if process is None or state is None or data is None or not process.personalised or self._personal:
            return
        # Who was never visited keeps nothing and uses the global model; but some methods make one for whoever asks.
        anybody = process.algorithm.personal is not None and process.algorithm.client_init is None
        count = len(data) if anybody else len(state.memory)
        size = count * (self.vector.nbytes + self.buffers.nbytes)
        # Whole clients' secrets are their models and who was visited; models that are made anew are releases that
        # nobody counts.
        uncounted = process.chain.protects_clients or (anybody and process.protects_examples)
        if uncounted or size > PERSONAL_BYTES or (anybody and count > PERSONAL_CLIENTS):
            self._saved = "not"
            note = (
                "the clients' personal models were not saved: the privacy that is told of this run does not cover them."
                if uncounted
                else f"the personal models of {count:,} clients ({size / 2**30:.1f} GiB) were not saved: resume the "
                "run, or save those of some clients with result.personal(client)."
            )
            if note not in self.notes:
                self.notes.append(note)
            return
        self._saved = "all" if anybody else "visited"
        wanted = list(data.clients) if anybody else list(state.memory.index)
        for begin in range(0, count, PERSONAL_CLIENTS):  # a lazy population draws their examples
            some = wanted[begin : begin + PERSONAL_CLIENTS]
            found = process.personal(state, data, some)
            assert found.buffers is not None
            self._personal |= dict(zip(some, zip(found.rows, found.buffers, strict=True), strict=True))

    def _model(self, what: str) -> Model:
        if self.model is None:
            raise InvalidArgument(f"{what} needs the model: load the result with Result.load(directory, model=...).")
        return self.model

    def _own(self, client: str) -> tuple[Tensor, Tensor]:
        if client in self._personal:
            return self._personal[client]
        if self._data is not None and client not in self._data:
            raise invalid("client", client, "the name of a client in the data")
        if self._process is None or self._state is None or self._data is None:
            if self._saved in ("not", "all"):
                why = "no personal models" if self._saved == "not" else f"no personal model of client {client!r}"
                raise RunError(
                    f"this result was saved with {why}: resume the run, by atoll.simulate with the same arguments, "
                    "directory= and resume=True, and ask the result it returns."
                )
            return self.vector, self.buffers
        if self._saved == "visited":  # a client that was never visited uses the model it would receive
            return self.vector, self.buffers
        found = self._process.personal(self._state, self._data, [client])
        assert found.buffers is not None
        return found.rows[0], found.buffers[0]


def clients_of(body: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Metrics of clients as they are written down, where what is undefined is None, as they are told."""
    return {
        kind: {c: {m: float("nan") if v is None else v for m, v in values.items()} for c, values in of.items()}
        for kind, of in body.items()
    }
