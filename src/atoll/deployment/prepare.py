"""An experiment as the process and the plan of a run over sites, or why it cannot be one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from atoll import asynchronous, sampling
from atoll.data import FederatedDataset
from atoll.data.table import Table
from atoll.errors import CompositionError, InvalidArgument, invalid
from atoll.experiment import Experiment, configure, load_app
from atoll.net import buffering, evaluating, noise
from atoll.net.admission import Rules
from atoll.net.calls import Charter
from atoll.net.coordinator import Plan
from atoll.net.sums import summing
from atoll.rounds import Process
from atoll.schedule import Buffered
from atoll.spec import identity

STEP = 600.0
"""Seconds that a step of a secure sum waits for a site that does not answer, where the run has no deadline."""


def experiment_of(app: Path, settings: Mapping[str, str]) -> Experiment:
    """The experiment of an app file, as every party of a run builds it: one that can run over sites.

    Raises:
        InvalidArgument: as from `load_app` and `configure`; a cohort that sites cannot make; an app that must see
            pooled data to build its model.
        CompositionError: its algorithm needs what no site can give.
    """
    factory = load_app(app)
    experiment = configure(factory, settings)
    algorithm = experiment.algorithm
    if algorithm.pooled:
        raise CompositionError(f"{algorithm.name} puts all examples into one place: it can be simulated only.")
    if algorithm.sampler is not None:
        raise CompositionError(f"{algorithm.name} prescribes an order of clients: it can be simulated only.")
    cohort_of(experiment)
    if "data" in settings:
        raise InvalidArgument(
            f"{app} looks at its data before it builds its model, which no server can: give the experiment a recipe, "
            "data=atoll.table(...), and build the model from what the recipe declares."
        )
    return experiment


def process_of(experiment: Experiment, engine: str) -> Process:
    """What is trained and how.

    Raises:
        InvalidArgument, CompositionError: what a run over sites would leave out in silence, or not protect.
    """
    if experiment.splits is not None and "train" in experiment.splits:
        raise invalid(
            "splits", tuple(experiment.splits), 'of "validation" and "test" in a run over sites',
            "Sites evaluate on held-out examples alone.",
        )  # fmt: skip
    for name, value in (
        ("downlink", tuple(experiment.downlink) if isinstance(experiment.downlink, Sequence) else experiment.downlink),
        ("server_data", experiment.server_data),
        ("schedule", None if isinstance(experiment.schedule, Buffered) else experiment.schedule),
        ("stop", experiment.stop),
    ):
        if value is not None and value != ():
            raise invalid(name, "given", "left out in a run over sites", "It acts in a simulation only.")
    process = Process(
        experiment.model,
        experiment.algorithm,
        transforms=experiment.transforms,
        channel=experiment.channel,
        aggregator=experiment.aggregator,
        engine=engine,
        workers=1,
        precision=experiment.precision,
    )
    if isinstance(experiment.schedule, Buffered):
        asynchronous.check(process)
    summing(process)
    noise.check(process)
    return process


def identity_of(process: Process) -> str:
    """What must be the same at the server and at every site."""
    return identity(process.spec)


def cohort_of(experiment: Experiment) -> int | None:
    """The number of sites of a round; None: all that are there.

    Raises:
        InvalidArgument: the experiment asks for another kind of cohort.
    """
    cohort = experiment.cohort
    if cohort is None or (isinstance(cohort, int) and not isinstance(cohort, bool)):
        return cohort
    if isinstance(cohort, sampling.Sampler):
        if cohort.spec["name"] == "everyone":
            return None
        if cohort.spec["name"] == "fixed":
            return int(cohort.spec["size"])
    told = cohort.spec["name"] if isinstance(cohort, sampling.Sampler) else cohort
    raise invalid("cohort", told, "a number of sites, or None for all, in a run over sites")


def plan_of(experiment: Experiment, process: Process, charter: Charter) -> Plan:
    """What the coordinator is asked for.

    Raises:
        InvalidArgument: options that contradict each other or the experiment.
    """
    terms, cohort = summing(process), cohort_of(experiment)
    if cohort is None and process.chain.noise is not None:
        cohort = max(1, charter.least)  # by which a sum is divided, whoever joins later
    sums = 0 if terms is None else terms.least
    if 0 < charter.least < sums:  # 0 is told when the run is submitted: all there are
        raise invalid("--sites", charter.least, f"at least {sums}", "The experiment's secure sum is of no fewer.")
    evaluate = 0 if unevaluated(experiment, process) else experiment.evaluate_every
    if isinstance(experiment.schedule, Buffered):
        return _buffered(experiment, experiment.schedule, charter, evaluate)
    return Plan(
        charter.run,
        experiment.rounds,
        seed=experiment.seed,
        cohort=cohort,
        least=max(1, charter.least),
        over=charter.over,
        quorum=charter.quorum,
        deadline=charter.deadline,
        attempts=charter.attempts,
        keep=terms is None,
        sums=sums,
        step=STEP if charter.deadline is None else charter.deadline,
        evaluate=evaluate,
    )


def _buffered(experiment: Experiment, schedule: Buffered, charter: Charter, evaluate: int) -> buffering.Plan:
    """The plan of an asynchronous run.

    Raises:
        InvalidArgument: a cohort, or an option that asks for one; fewer sites than the schedule is for.
    """
    if experiment.cohort is not None:
        raise invalid(
            "cohort", experiment.cohort, "left out with schedule.buffered", "concurrency= says how many are at work."
        )
    why = "A step of an asynchronous run is made of as many updates as its schedule says."
    for name, value, own in (("--over", charter.over, 1.0), ("--quorum", charter.quorum, None)):
        if value != own:
            raise invalid(name, value, "left out with schedule.buffered", why)
    for name, value in (("size", schedule.size), ("concurrency", schedule.concurrency)):
        if 0 < charter.least < value:  # 0 is told when the run is submitted: all there are
            raise invalid(
                "--sites", charter.least, f"at least {value}", f"The experiment's schedule has {name}={value}."
            )
    return buffering.Plan(
        charter.run,
        experiment.rounds,
        seed=experiment.seed,
        least=max(1, charter.least),
        deadline=charter.deadline,
        attempts=charter.attempts,
        evaluate=evaluate,
        size=schedule.size,
        concurrency=schedule.concurrency,
        limit=schedule.limit,
        weighing=identity(replace(schedule, durations=None).spec),
    )


def unevaluated(experiment: Experiment, process: Process) -> str:
    """Why sites never say what a model of the run is worth; "": they do."""
    if why := evaluating.why_not(process):
        return why
    if not held_out(experiment):
        return "the experiment holds no examples out"
    if not splits_of(experiment):
        return f"the experiment asks for no held-out examples (splits={tuple(experiment.splits or ())})"
    return "" if experiment.evaluate_every else "the experiment asks for no evaluation (evaluate_every=0)"


def splits_of(experiment: Experiment) -> tuple[str, ...]:
    """The held-out examples on which the experiment has its model evaluated."""
    asked = evaluating.SPLITS if experiment.splits is None else experiment.splits
    return tuple(split for split in evaluating.SPLITS if split in asked)


def held_out(experiment: Experiment) -> bool:
    """Whether sites have examples apart from those they train on."""
    data = experiment.data
    if isinstance(data, Table):
        return data.test > 0 or data.validation > 0
    return isinstance(data, FederatedDataset) and (data.validation is not None or data.test is not None)


def rules_of(process: Process, charter: Charter) -> Rules:
    """What an update may be.

    Raises:
        CompositionError: a bound on what the channel seals.
    """
    rules = Rules(charter.weight_cap, charter.norm_bound)
    rules.check(process)
    return rules
