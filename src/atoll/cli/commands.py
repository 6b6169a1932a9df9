"""The commands, and what each takes; the work is done by the module of the same name."""

from pathlib import Path
from typing import Annotated

import typer

from atoll.cli.guard import Debug, guarded

app = typer.Typer(
    name="atoll",
    help="Federated learning over data that stays with its owners.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


Home = Annotated[
    Path | None, typer.Option(help="The folder of the party to act for; default the only fitting one here.")
]
Named = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.")]
Reason = Annotated[str, typer.Option(help="What those who watch are told.")]


def _version(asked: bool) -> None:
    if asked:
        import atoll

        typer.echo(f"atoll {atoll.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Federated learning over data that stays with its owners."""


@app.command()
@guarded
def demo(
    seeds: Annotated[
        int, typer.Option(min=1, max=100, help="Divisions into training and test, one run of each arm.")
    ] = 5,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of each run; default the recipe's own.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the table, the picture and the report.")] = Path("atoll-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Two seeds and few rounds, to see that it works.")] = False,
    debug: Debug = False,
) -> None:
    """What federation brings four hospitals: each alone, federated, and all data pooled, side by side."""
    from atoll.cli.demo import demo as show

    show(seeds=2 if quick else seeds, rounds=(rounds or 5) if quick else rounds, out=out)


@app.command()
@guarded
def run(
    app: Annotated[str, typer.Argument(metavar="APP", help="Path of an app.py, or the name of a recipe.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the app; repeat for more.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="The table the app's data recipe is bound to.")] = None,
    directory: Annotated[Path | None, typer.Option(help="Run directory; default runs/NAME-TIME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --directory.")] = False,
    engine: Annotated[str, typer.Option(help='"auto", "vectorized", "ray" or "loop".')] = "auto",
    report: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html into the directory.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the run directory and nothing else.")] = False,
    sites: Annotated[
        int | None, typer.Option(min=1, help="Over so many sites on this machine, each a program of its own.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Run an experiment that an app file defines."""
    if sites is not None:
        from atoll.cli.run import run_over_sites

        run_over_sites(app, sites, settings=settings or [], data=data, directory=directory, engine=engine, quiet=quiet)
        return
    from atoll.cli.run import run as start

    start(
        app, settings=settings or [], data=data, directory=directory, resume=resume, engine=engine, report=report,
        quiet=quiet,
    )  # fmt: skip


@app.command()
@guarded
def runs(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that holds run directories.")] = Path(
        "runs"
    ),
    server: Annotated[bool, typer.Option("--server", help="List the runs of the server instead.")] = False,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """List runs: state, rounds, last metric."""
    if server:
        from atoll.cli.operating import server_runs

        server_runs(home)
        return
    from atoll.cli.runs import runs as show

    show(directory)


@app.command()
@guarded
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, finished or not.")],
    out: Annotated[Path | None, typer.Option(help="The page; default report.html in the run directory.")] = None,
    debug: Debug = False,
) -> None:
    """Write a page about a run."""
    from atoll.cli.runs import report as write

    write(run, out)


@app.command()
@guarded
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run directories, two or more.")],
    out: Annotated[Path | None, typer.Option(help="A page (.html) or a picture (.png, .svg, .pdf).")] = None,
    metric: Annotated[str | None, typer.Option(help="What a picture shows; default the first metric.")] = None,
    debug: Debug = False,
) -> None:
    """Put runs side by side: final metrics, and where they differ."""
    from atoll.cli.runs import compare as show

    show(runs, out, metric=metric)


@app.command()
@guarded
def data(
    name: Annotated[str | None, typer.Argument(help="A data set; default: list them.")] = None,
    debug: Debug = False,
) -> None:
    """The data sets that come with Atoll or are fetched by name."""
    from atoll.cli.data import data as show

    show(name)


@app.command()
@guarded
def bench(
    workloads: Annotated[
        list[str] | None,
        typer.Option(metavar="W1,W2...", help="W1 to W6, W4E, N1 to N6; repeat or separate by commas. [W1,W2,W3]"),
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds to time; default the workload's own.")] = None,
    workers: Annotated[str, typer.Option(help='A number of processes, or "auto".')] = "auto",
    engine: Annotated[str, typer.Option(help='"auto", "vectorized", "ray" or "loop".')] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="Two rounds of smaller workloads, to see that it works.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Time Atoll's part of the speed benchmark on this machine, beside the figures that were recorded."""
    from atoll.cli.bench import bench as measure

    measure(workloads or ["W1", "W2", "W3"], rounds=rounds, workers=workers, engine=engine, quick=quick)


# --- over real sites --------------------------------------------------------------------------------------------------


@app.command()
@guarded
def server(
    state: Annotated[Path, typer.Option(help="Folder of the server's key and its runs' files.")] = Path("atoll-server"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")] = 8443,
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="How sites reach this server; default this machine's name.")
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="ATOLL_DATABASE",
            help="Database of members, runs and journals, such as postgresql://USER@HOST/DATABASE; default "
            "state.sqlite in the folder.",
        ),
    ] = None,
    objects: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="ATOLL_OBJECTS",
            help="Store of updates, models and results that outlives this machine, such as s3://BUCKET/PREFIX or "
            "file:///PATH; default the folder alone.",
        ),
    ] = None,
    durability: Annotated[
        str,
        typer.Option(help='What is acknowledged survives loss of "power", or, sooner, the end of the "process" alone.'),
    ] = "power",
    metrics: Annotated[
        str | None, typer.Option(metavar="[HOST:]PORT", help="Tell a Prometheus, in the clear; default this machine.")
    ] = None,
    among: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Be one of several servers with the same PostgreSQL and folder; the others reach this one there.",
        ),
    ] = None,
    proxy: Annotated[
        str | None,
        typer.Option(help='A proxy ends TLS at --address, and speaks "plain" HTTP or "tls" to this server.'),
    ] = None,
    ca: Annotated[
        str | None, typer.Option(metavar="FILE", help="Who signed the proxy's certificate; default public authorities.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Serve runs to sites over HTTPS, from one folder, until stopped."""
    from atoll.cli.serving import server as serve

    serve(
        state, host=host, port=port, address=address, database=database, durability=durability, metrics=metrics,
        among=among, objects=objects, proxy=proxy, ca=ca,
    )  # fmt: skip


@app.command()
@guarded
def unit(
    role: Annotated[str, typer.Argument(metavar="ROLE", help='"server" or "site".')],
    folder: Annotated[Path, typer.Option(help="The server's state, or a site's folder that `atoll join` made.")],
    user: Annotated[str, typer.Option(help="Who the program runs as.")] = "atoll",
    data: Annotated[str | None, typer.Option(metavar="PATH", help="The table that this site's owner keeps.")] = None,
    container: Annotated[
        bool, typer.Option("--container", help="A container file, with the folder as /state.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Print a systemd unit, or a container file, that keeps a server or a site running."""
    from atoll.cli.units import unit as print_unit

    print_unit(role, folder=folder, user=user, data=data, container=container)


@app.command()
@guarded
def invite(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of the newcomers.")],
    role: Annotated[str, typer.Option(help='"site", "researcher", "admin" or "viewer".')] = "site",
    hours: Annotated[float, typer.Option(help="How long the invites hold.")] = 24.0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the invites and nothing else.")] = False,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Make invites, each of which lets one newcomer in, once."""
    from atoll.cli.serving import invite as make

    make(names, role=role, hours=hours, home=home, quiet=quiet)


@app.command()
@guarded
def join(
    word: Annotated[
        str | None, typer.Argument(metavar="INVITE", help='The invite; "-" reads it from standard input.')
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="PATH", help="The table that this site's owner keeps.")] = None,
    home: Annotated[Path | None, typer.Option(help="Folder for its key and records; default atoll-NAME.")] = None,
    task_limit: Annotated[float, typer.Option(help="Seconds a task may take.")] = 3600.0,
    memory: Annotated[float, typer.Option(help="GiB of data a task's process may have; 0: no limit.")] = 0.0,
    sum_least: Annotated[int, typer.Option(min=3, help="Fewest sites of a secure sum to take part in.")] = 3,
    sum_again: Annotated[
        bool, typer.Option("--sum-again", help="Give a second sum of the same when the first came to nothing.")
    ] = False,
    stay: Annotated[bool, typer.Option("--stay/--no-stay", help="Take part in runs until stopped.")] = True,
    durability: Annotated[
        str,
        typer.Option(help='What is kept here survives loss of "power", or, sooner, the end of the "process" alone.'),
    ] = "power",
    ca: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help='A proxy ends TLS: who signed its certificate; "public" authorities, or these.'
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Join a server and, as a site, take part in the runs that its owner approves."""
    from atoll.cli.serving import take_up

    take_up(
        word, data=data, home=home, task=task_limit, memory=memory, sums=(sum_least, sum_again), stay=stay,
        durability=durability, ca=ca,
    )  # fmt: skip


@app.command()
@guarded
def submit(
    app: Annotated[str, typer.Argument(metavar="APP", help="Path of an app.py, or the name of a recipe.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the app; repeat for more.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; default the app's, and the time.")] = None,
    sites: Annotated[int, typer.Option(min=0, help="Sites to wait for; 0: all that have joined.")] = 0,
    quorum: Annotated[
        int | None, typer.Option(min=1, help="Updates with which a round may close when no more can come.")
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(
            help="Seconds after which a round does not wait for more than the quorum; without rounds, of a task."
        ),
    ] = None,
    over: Annotated[float, typer.Option(help="How many times the cohort is asked, at least 1.")] = 1.0,
    attempts: Annotated[int, typer.Option(min=1, help="Attempts at a round before the run pauses.")] = 3,
    weight_cap: Annotated[float | None, typer.Option(help="Largest weight an update may have.")] = None,
    norm_bound: Annotated[float | None, typer.Option(help="Largest L2 norm an update may have.")] = None,
    engine: Annotated[str, typer.Option(help='At each site: "auto", "vectorized" or "loop".')] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the run's name and nothing else.")] = False,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Start a run of an experiment over the server's sites."""
    from atoll.cli.operating import submit as start

    options = {
        "least": sites, "quorum": quorum, "deadline": deadline, "over": over, "attempts": attempts,
        "weight_cap": weight_cap, "norm_bound": norm_bound, "engine": engine,
    }  # fmt: skip
    start(app, name=name, settings=settings or [], options=options, home=home, quiet=quiet)


@app.command()
@guarded
def watch(
    run: Annotated[str | None, typer.Argument(metavar="RUN", help="Name of the run; default the newest.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Show how it is now, and end.")] = False,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Follow a run over sites to its end."""
    from atoll.cli.operating import watch as follow

    follow(run, once=once, home=home)


@app.command()
@guarded
def explain(run: Named, home: Home = None, debug: Debug = False) -> None:
    """Say in a sentence why a run over sites is where it is, and what to do."""
    from atoll.cli.explaining import explain as tell

    tell(run, home=home)


@app.command()
@guarded
def trace(
    run: Named,
    out: Annotated[Path | None, typer.Option(help="The file; default RUN.trace.json.")] = None,
    state: Annotated[Path, typer.Option(help="Folder of the server.")] = Path("atoll-server"),
    database: Annotated[
        str | None,
        typer.Option(metavar="URL", envvar="ATOLL_DATABASE", help="Database of the server; default in its folder."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write where the time of a run's rounds went, at the server, for Perfetto or Chrome's tracing page."""
    from atoll.cli.tracing import trace as write

    write(run, out or Path(f"{run}.trace.json"), state=state, database=database)


@app.command()
@guarded
def sites(home: Home = None, debug: Debug = False) -> None:
    """List who has joined the server."""
    from atoll.cli.operating import sites as show

    show(home)


@app.command()
@guarded
def pause(run: Named, reason: Reason = "", home: Home = None, debug: Debug = False) -> None:
    """Let a run rest; nothing that was sent is lost."""
    from atoll.cli.operating import steer

    steer(run, "pause", reason=reason, home=home)


@app.command()
@guarded
def resume(run: Named, home: Home = None, debug: Debug = False) -> None:
    """Let a paused run go on."""
    from atoll.cli.operating import steer

    steer(run, "resume", reason="", home=home)


@app.command()
@guarded
def discard(run: Named, reason: Reason = "", home: Home = None, debug: Debug = False) -> None:
    """Give up the updates a paused run has of the round at work; resumed, it asks the sites again."""
    from atoll.cli.operating import steer

    steer(run, "discard", reason=reason, home=home)


@app.command()
@guarded
def stop(run: Named, reason: Reason = "", home: Home = None, debug: Debug = False) -> None:
    """End a run for good; the model of its last round stays."""
    from atoll.cli.operating import steer

    steer(run, "stop", reason=reason, home=home)


@app.command()
@guarded
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Who is shut out.")],
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Shut a member out of the server, at once."""
    from atoll.cli.operating import revoke as shut_out

    shut_out(name, home=home)


@app.command()
@guarded
def review(
    mark: Annotated[str | None, typer.Argument(metavar="HASH", help="Show this experiment's code.")] = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Show what was asked of this site, and what its owner decided."""
    from atoll.cli.owning import review as show

    show(mark, home=home)


Mark = Annotated[str, typer.Argument(metavar="HASH", help="The experiment, as `atoll review` shows it.")]


@app.command()
@guarded
def approve(mark: Mark, home: Home = None, debug: Debug = False) -> None:
    """Let an experiment run on this site's data: this code, with these settings, and nothing else."""
    from atoll.cli.owning import decide

    decide(mark, "approved", home=home)


@app.command()
@guarded
def deny(mark: Mark, home: Home = None, debug: Debug = False) -> None:
    """Keep an experiment from this site's data, or take an approval back."""
    from atoll.cli.owning import decide

    decide(mark, "denied", home=home)


@app.command()
@guarded
def audit(home: Home = None, debug: Debug = False) -> None:
    """Show everything that left this site, and check that its journal is whole."""
    from atoll.cli.owning import audit as show

    show(home)


@app.command()
@guarded
def peers(
    forget: Annotated[
        str | None, typer.Option(metavar="NAME", help="Pin this site's key anew: its owner confirmed a new one.")
    ] = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Show the sites that this one has summed with, and the fingerprints of their keys."""
    from atoll.cli.owning import peers as show

    show(forget, home)


@app.command()
@guarded
def doctor(
    data: Annotated[str | None, typer.Option(metavar="PATH", help="Look at this table as well.")] = None,
    objects: Annotated[
        str | None, typer.Option(metavar="URL", help="On the server's machine: look at its object store as well.")
    ] = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Look at what stands between this party and its server: name, port, TLS, clock, disk, versions, data, objects."""
    from atoll.cli.doctor import doctor as look

    look(home, data, objects)
