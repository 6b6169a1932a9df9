"""Atoll, through its public API alone: `atoll.process` round by round, or `atoll.simulate` as one run."""

from harness import begin, reader

if __name__ == "__main__":
    parser = reader(__doc__)
    parser.add_argument("--engine", default="auto", help="the engine")
    parser.add_argument("--workers", default="auto", help='a number of workers or "auto"')
    parser.add_argument("--api", choices=("process", "simulate"), default="process", help="round by round, or one run")
    options = parser.parse_args()

    import torch

    from atoll.bench.timing import played

    # Only where it is asked for: by default the engine decides how many threads it works with.
    if options.threads > 1:
        torch.set_num_threads(options.threads)
    race = begin("atoll", options)
    asked = {"engine": options.engine, "workers": options.workers}
    with played(
        race.load,
        race.data,
        race.cohorts(),
        start=race.start,
        stop=race.stop,
        whole=options.api == "simulate",
        shuffle=not options.fixed,
        engine=options.engine,
        workers="auto" if options.workers == "auto" else int(options.workers),
    ) as found:
        how = {key: value for key, value in asked.items() if value != "auto"} | {"api": options.api}
        variant = " ".join(f"--{key} {value}" for key, value in how.items())
        race.report(found.vector.numpy(), variant, ("torch", "numpy", "atoll"), engine=found.engine)
