"""Atoll, through its public API alone: `atoll.process` round by round, or `atoll.simulate` as one run."""

import inspect
from typing import Any

from harness import begin, reader

if __name__ == "__main__":
    parser = reader(__doc__)
    parser.add_argument("--engine", help="the engine; default Atoll's own choice")
    parser.add_argument("--workers", help='a number of workers or "auto"; default Atoll\'s own choice')
    parser.add_argument("--api", choices=("process", "simulate"), default="process", help="round by round, or one run")
    options = parser.parse_args()

    import torch

    import atoll

    # Only where it is asked for: by default the engine decides how many threads it works with.
    if options.threads > 1:
        torch.set_num_threads(options.threads)
    race = begin("atoll", options)
    from modules import module, tensors

    load = race.load
    x, y = tensors(race.data)
    data = atoll.FederatedDataset.from_packed({"x": x, "y": y}, race.data.offsets)
    algorithm = atoll.fedavg(
        atoll.local_sgd(lr=0.1, epochs=1, batch_size=load.batch, shuffle=not options.fixed),
    )
    model = atoll.Model(module(load), loss="cross_entropy")
    how: dict[str, Any] = {}
    if options.engine is not None:
        how["engine"] = options.engine
    if options.workers is not None:
        if "workers" not in inspect.signature(atoll.process).parameters:
            raise SystemExit("this version of Atoll has no workers")
        how["workers"] = options.workers if options.workers == "auto" else int(options.workers)
    names = data.clients
    cohorts = [[names[i] for i in clients] for clients in race.cohorts()]

    if options.api == "process":
        process = atoll.process(model, algorithm, **how)
        state = process.init(0)

        def turn(number: int, clients: list[int]) -> None:
            """One round."""
            global state
            state, _ = process.next(state, data, cohorts[number])

        race.play(turn)
        vector, engine = process.vector(state), process.engine
        described = engine.describe() if hasattr(engine, "describe") else str(engine)
    else:
        race.start()
        result = atoll.simulate(
            model,
            data,
            algorithm=algorithm,
            rounds=race.total,
            cohort=atoll.sampling.sequence(cohorts),
            evaluate_every=0,
            callbacks=(lambda record: race.stop(),),
            **how,
        )
        vector, described = result.vector, result.engine
    variant = " ".join(f"--{key} {value}" for key, value in {**how, "api": options.api}.items())
    race.report(vector.numpy(), variant, ("torch", "numpy", "atoll"), engine=described)
