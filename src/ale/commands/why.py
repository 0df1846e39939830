"""`ale why RUN`: what a run waits for, live, or what a dead one waited for last."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ale.data.moment import Moment

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or the name of one in runs/.")]
# A moment of a live run that is older than this was not followed by another.
_OLD_S = 5.0


def why(
    run: RunArgument,
    everything: Annotated[bool, typer.Option("--all", help="Also list every single wait.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The whole moment as JSON.")] = False,
) -> None:
    """Say what a run waits for, since when, and what would release it; of a dead run, what it waited for last."""
    import msgspec

    from ale.data import moment as moments
    from ale.data.cause import Link, report
    from ale.data.run_log import RunLog
    from ale.progress_view import quiet_console

    folder, console = RunLog.open(run).path, quiet_console()
    moment = moments.read(folder)
    if as_json:
        console.out(msgspec.json.encode(moment).decode(), highlight=False)
        return
    console.out(f"run       {folder}: {state(folder, moment)}\n{report(moment)}", highlight=False)
    if everything:
        for n, wait in enumerate(moment.waits):
            link = Link(wait.who, wait.what, wait.waited_s, wait.deadline_s)
            told = "idle: " if wait.idle else "" if wait.named else "unnamed: "
            console.out(f"{'waits' if not n else '':<9} {told}{link.sentence}", highlight=False)


def state(folder: Path, moment: Moment) -> str:
    """Whether it lives, and how old the moment is: `live, 0.4 s ago`."""
    from ale.data.cause import span
    from ale.vitals import look

    age_s = max(0.0, time.time() - moment.at)
    if not locked(folder / "lock"):
        if moment.ended:
            return f"ended {span(age_s)} ago: {moment.ended}"
        return f"dead: its process {moment.pid} was killed, at most a second after this moment, {span(age_s)} ago"
    condition = look(moment.pid).condition
    if age_s <= _OLD_S:
        return f"live, as of {span(age_s)} ago"
    if condition == "stopped":
        return f"its controller (pid {moment.pid}) is stopped; kill -CONT {moment.pid} lets it go on"
    if moment.ended:
        return f"is ending, since {span(age_s)}: {moment.ended}"
    return f"its controller (pid {moment.pid}, {condition}) has written no moment for {span(age_s)}: all of it is stuck"


def locked(path: Path) -> bool:
    """Whether a live process has the run open."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
