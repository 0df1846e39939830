"""`ale replay` and `ale diff`: a recorded run once more, and two runs side by side."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ale.commands.loop import run_to_end

Json = Annotated[bool, typer.Option("--json", help="The same as JSON.")]


def replay(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A recorded run: its folder, or its name in runs/.")],
    as_json: Json = False,
) -> None:
    """Run a recorded run again, without sampling and without sandboxes, and compare.

    The same batches have to come in the same order, with the same losses to 1e-6. Exit code 1, and the first
    difference, where the replay goes another way. The run folder stays as it is.
    """
    import msgspec

    from ale.config_file import load
    from ale.data.recording import check_recorded
    from ale.data.run_log import RunLog
    from ale.embedding import load_pipeline

    log = RunLog.open(run)
    check_recorded(log.path / "recording")
    load_pipeline(load(log.path))  # says what is not installed
    from ale.replay import replay as again

    done = run_to_end(again(log.path, tell=lambda said: None if as_json else print(said)))
    if as_json:
        print(msgspec.json.encode(done).decode())
    elif done.diverged is None:
        print(
            f"{done.updates} updates, {done.rollouts} rollouts, {done.points} points in {done.lives} lives: the same "
            f"batches in the same order; the largest difference of a loss is {done.loss_apart:.2g}"
        )
    if done.diverged is not None:
        print(f"ale: after {done.updates} updates the replay goes another way: {done.diverged}", file=sys.stderr)
        raise typer.Exit(1)


def diff(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or the name of one in runs/.")],
    other: Annotated[str, typer.Argument(metavar="RUN", help="Another one.")],
    as_json: Json = False,
) -> None:
    """Say where two runs differ: in their configuration, and first in what they did.

    Named are the batch, the trajectory, the token or the loss. Exit code 1 where they differ in what they did.
    """
    import msgspec

    from ale.data.run_log import RunLog
    from ale.diff import difference
    from ale.progress_view import quiet_console

    found = difference(RunLog.open(run), RunLog.open(other))
    if as_json:
        print(msgspec.json.encode(found).decode())
    else:
        console = quiet_console()
        for field, values in found.config.items():
            console.out(f"{field}: {values}", highlight=False)
        said = f"the first difference is at {found.first}" if found.first else "neither did what the other did not"
        console.out(f"{found.updates} updates are the same; {said}", highlight=False)
    if found.first:
        raise typer.Exit(1)
