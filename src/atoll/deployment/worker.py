"""The process of a run at a site: the author's code, on the site's own data, told what to do by the site's agent.

It has neither the site's key nor a line to the server. What it replies, its agent reads as a stranger's.
"""

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from atoll.data import FederatedDataset
from atoll.data.cells import Raw
from atoll.data.table import Table
from atoll.deployment.prepare import experiment_of, identity_of, process_of, splits_of, unevaluated
from atoll.deployment.survey import agreed, first_answer, second_answer
from atoll.errors import DataError, RunError
from atoll.experiment import Experiment
from atoll.net.agent import Trainer
from atoll.net.buffers import Buffer
from atoll.net.children import (
    Begin,
    Broken,
    Channel,
    Prepare,
    Ready,
    Spread,
    Survey,
    Train,
    Trained,
    WorkerCall,
    WorkerReply,
    limit,
    worker_calls,
)
from atoll.net.control import content_hash
from atoll.net.sums import summing
from atoll.rounds import Process


class Worker:
    """An experiment at a site."""

    def __init__(self, begin: Begin) -> None:
        limit(begin.memory, begin.files)
        app = Path(begin.app)
        if content_hash(app.read_bytes()) != begin.charter.code:
            raise RunError(f"{app} is not what was approved: it changed on this disk.")
        self._begin = begin
        self._experiment = experiment_of(app, begin.charter.settings)
        self._process = process_of(self._experiment, begin.charter.engine)
        self._cells: Raw | None = None
        self._trainer: Trainer | None = None
        self.ready = ready_of(self._experiment, self._process)

    def carry_out(self, call: WorkerCall, blob: Buffer) -> tuple[WorkerReply, tuple[Buffer, ...]]:
        """Do what the agent says."""
        match call:
            case Survey():
                return self.ready, (first_answer(self._raw()),)
            case Spread():
                return self.ready, (second_answer(self._raw(), bytes(blob)),)
            case Prepare():
                self._trainer = Trainer(self._process, self._bound(bytes(blob)), splits=splits_of(self._experiment))
                self._cells = None
                return self.ready, ()
            case Train(work, length):
                if self._trainer is None:
                    raise RunError("the data is not bound yet.")
                if work.kind == "evaluate" and self.ready.silent:
                    raise RunError(f"an evaluation was asked for, and {self.ready.silent}.")
                done = self._trainer(work, blob[:length], blob[length:])
                return Trained(done.parts, done.sent, len(done.frame)), (done.frame, done.memory)
            case Begin():
                raise RunError("this process has an experiment already.")

    def _raw(self) -> Raw:
        if self._cells is None:
            self._cells = self._recipe().training(self._begin.data, self._begin.site)
        return self._cells

    def _recipe(self) -> Table:
        table = self._experiment.data
        if not isinstance(table, Table):
            raise DataError("the experiment brings its own data: there is no table to ask about.")
        if not self._begin.data:
            raise DataError("the experiment is about a table, and this site was given none: join with --data PATH.")
        return table

    def _bound(self, agreement: bytes) -> FederatedDataset:
        """This site's examples, as the only client's."""
        data, site = self._experiment.data, self._begin.site
        if isinstance(data, Table):
            return self._recipe().bind(self._begin.data, preprocessing=agreed(agreement), client=site)
        if self._begin.data:
            raise DataError(
                "the experiment brings its own data and has no recipe (atoll.table) that could be bound to this site's."
            )
        if not isinstance(data, FederatedDataset):
            raise DataError("the experiment's data is made when it is asked for: that can be simulated only.")
        if site not in data.clients:
            raise DataError(f"the experiment brings its own data, and none of it belongs to {site!r}.")
        return data.select([site])


def ready_of(experiment: Experiment, process: Process) -> Ready:
    """What the agent is told of an experiment, and goes by from then on."""
    recipe = isinstance(experiment.data, Table)
    return Ready(identity_of(process), recipe, summing(process), unevaluated(experiment, process))


def main(arguments: Sequence[str]) -> None:
    """Serve the parent on the socket that the command line names, until it is gone."""
    channel = Channel(int(arguments[0]))
    worker: Worker | None = None
    while (said := channel.receive()) is not None:
        content, blob = said
        try:
            call = worker_calls.decode(content)
            reply: WorkerReply
            blobs: tuple[Buffer, ...] = ()
            if isinstance(call, Begin) and worker is None:
                worker = Worker(call)
                reply = worker.ready
            elif worker is None:
                raise RunError("there is no experiment yet.")
            else:
                reply, blobs = worker.carry_out(call, blob)
        except Exception as error:  # the author's code may raise anything; the agent is told, and lives on
            traceback.print_exc()
            reply, blobs = Broken(type(error).__name__[:100], str(error)[:2000]), ()
        channel.reply(reply, *blobs)


if __name__ == "__main__":
    main(sys.argv[1:])
