"""A run on disk: `runs/NAME/`. What each file is for, and what holds after a kill, is told in docs/runs.md.

config.json  metrics.jsonl  trajectories.jsonl  tensorboard/  checkpoints/  summary.json   to be read
model/  journal  state/  lock                                                              to resume from
recording                                                                                  to replay
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec
import numpy as np
import orjson

import ale
from ale.config import RunConfig
from ale.config_file import changed_fields, dump, parse
from ale.data.board import Board
from ale.data.books import Books
from ale.data.checkpoints import Checkpoint, Checkpoints, freeze
from ale.data.disk import AppendedFile, replace
from ale.data.events import Began, FileSizes, Resumed
from ale.data.instruments import Page
from ale.data.journal import FORMAT, Journal
from ale.data.moment import NAME as MOMENT
from ale.data.moment import Moment
from ale.data.moment import read as read_moment
from ale.data.moment import write as write_moment
from ale.data.recording import Recording
from ale.data.timeline import Timeline
from ale.errors import ConfigError, RunFolderError
from ale.messages import Trajectory
from ale.progress import Summary, Versions
from ale.wire import Array

F = TypeVar("F", AppendedFile, Journal, Recording, Board)

# A resumed run may have other values of these: none of them decides what is sampled or how it is trained on.
_MAY_CHANGE = {
    "runs_dir",
    "rollout.concurrency",
    "rollout.batch_deadline_s",
    "policy.urls",
    "policy.replicas",
    "policy.python",
    "policy.kv_cache_gb",
    "policy.devices",
    "policy.weights_dir",
    "policy.turn_deadline_s",
    "policy.start_deadline_s",
    "policy.sync_deadline_s",
    "policy.restarts",
    "rollout.adaptive",
    "rollout.engine_rows",
    "eval.beside",
    "learner.updates",
    "learner.checkpoint_every",
    "learner.export_every",
    "learner.step_deadline_s",
    "watchdog.silence_s",
    "watchdog.heartbeat_s",
    "watchdog.restarts",
    "metrics.prometheus_port",
    "metrics.timeline_mb",
    "learner.ranks",
    "learner.device",
    "learner.activation_checkpointing",
}


class RunFolder:
    """Open while the run lives; no other process can open it meanwhile.

    `books` are those of the run so far. A line of the files is counted when the journal says so: what was written
    beyond that is written again.
    """

    def __init__(self, config: RunConfig, *, overwrite: bool = False, resume: bool = False) -> None:
        """Raises `ConfigError` and `RunFolderError`."""
        self.path = Path(config.runs_dir) / config.name
        self.checkpoints = Checkpoints(self.path / "state")
        self.books = Books()
        self.checkpoint: Checkpoint | None = None
        """What the learner goes on from."""
        self.page = Page(config.name)
        self._open = ExitStack()
        try:
            self._check(overwrite, resume)
            self.path.mkdir(parents=True, exist_ok=True)
            self._open.callback(os.close, _lock(self.path / "lock"))
            changed = self._compare(config) if resume else self._clear(config)
            self.journal = self._closing(Journal(self.path / "journal"))
            if resume:
                self._restore(config, changed)
            else:
                self.journal.write(Began(format=FORMAT, ale=ale.__version__))
            self.timeline = Timeline(self.path / "timeline.json", config.metrics.timeline_mb, self.books.lives)
            self.recording = self._closing(Recording(self.path / "recording")) if config.record else None
            self._metrics = self._lines("metrics.jsonl", self.books.sizes.metrics)
            self._trajectories = self._lines("trajectories.jsonl", self.books.sizes.trajectories)
            self._board = self._closing(Board(self.path / "tensorboard", self.books.recorded))
        except OSError as error:
            self._open.close()
            raise ConfigError(f"runs_dir: the run folder {self.path} cannot be written: {error}.") from error
        except BaseException:
            self._open.close()
            raise

    def _check(self, overwrite: bool, resume: bool) -> None:
        a_run = (self.path / "config.json").is_file()
        if resume:
            if not a_run:
                raise RunFolderError(f"--resume: there is no run in {self.path}. Leave --resume out to begin one.")
            if not (self.path / "journal").is_file() and (self.path / "metrics.jsonl").is_file():
                raise RunFolderError(
                    f"--resume: the run in {self.path} has no journal: it was made by a version of ale that could not "
                    "resume. Choose another --name, or pass --overwrite to delete it."
                )
        elif self.path.exists() and any(entry.name != "lock" for entry in self.path.iterdir()):
            if not overwrite:
                raise ConfigError(
                    f"name: the run folder {self.path} exists and is not empty. Pass --resume to go on with that run, "
                    "choose another --name, or pass --overwrite to delete it."
                )
            if not a_run:
                raise ConfigError(
                    f"name: {self.path} holds something else than a run, and is not deleted: no config.json."
                )

    def _clear(self, config: RunConfig) -> dict[str, str]:
        """Begins the run."""
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()
        _save_config(self.path, config)
        return {}

    def _compare(self, config: RunConfig) -> dict[str, str]:
        """What has changed since the run's last life. Raises `RunFolderError` when that makes it another run."""
        path = self.path / "config.json"
        try:
            old = parse(orjson.loads(path.read_bytes()), where=str(path))
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{path} cannot be read: {error}. Put it back as it was.") from error
        changed = changed_fields(old, config)
        refused = [f"{field} ({said})" for field, said in changed.items() if field not in _MAY_CHANGE]
        if refused:
            raise RunFolderError(
                f"--resume: {self.path} is a run of another configuration; what differs: {', '.join(refused)}. "
                f"`ale train {self.path} --resume` goes on with its own; for this one choose another --name."
            )
        return changed

    def _restore(self, config: RunConfig, changed: dict[str, str]) -> None:
        """The books: those of the last checkpoint, and then what the journal says."""
        self.checkpoint = self.checkpoints.latest()
        start = 0
        if self.checkpoint is not None:
            self.books, start = self.checkpoint.books, self.checkpoint.journal
        for event in self.journal.read(start):
            self.books.apply(event)
        if config.learner.updates < self.books.updates:
            raise RunFolderError(
                f"--resume: learner.updates is {config.learner.updates}, but {self.path} has made "
                f"{self.books.updates} already. Updates cannot be taken back: ask for at least as many."
            )
        if "learner.updates" in changed and config.learner.schedule != "constant" and self.books.since:
            raise RunFolderError(
                f"--resume: the schedule follows learner.updates, which {changed['learner.updates']}, and "
                f"{len(self.books.since)} updates have to be made again as they were. Resume the run as it was first; "
                "after its end, or after Ctrl-C, it can be given more updates."
            )
        resumed = Resumed(changed=changed, format=FORMAT, ale=ale.__version__)
        self.journal.write(resumed)
        self.books.apply(resumed)
        _save_config(self.path, config)

    def _lines(self, name: str, size: int) -> AppendedFile:
        """A file of lines, cut to what the journal vouches for."""
        file = self._closing(AppendedFile(self.path / name))
        if file.size < size:
            raise RunFolderError(
                f"{file.path} is shorter than the journal says: {file.size} bytes instead of {size}. Put it back as it "
                "was, or start the run anew with --overwrite."
            )
        file.cut(size)
        return file

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()

    def _closing(self, file: F) -> F:
        self._open.callback(file.close)
        return file

    @property
    def model(self) -> Path:
        """The model that the run began with."""
        return self.path / "model"

    def export(self, name: str) -> Path:
        """Where a trained model is kept."""
        return self.path / "checkpoints" / name

    @property
    def sizes(self) -> FileSizes:
        return FileSizes(metrics=self._metrics.size, trajectories=self._trajectories.size)

    def record(self, **values: Any) -> None:
        """One line of metrics.jsonl, and its numbers for TensorBoard where it has an `update`."""
        self._metrics.append(orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")
        if "update" in values:
            scalars = _scalars(values)
            self._board.add(values["update"], scalars)
            self.page.show(scalars | {"update": float(values["update"])})

    def keep(self, trajectory: Trajectory, **more: Any) -> None:
        """One line of trajectories.jsonl: every token, log-probability, chunk, call, output, reward and version.

        A branch has a line of its own, which names its episode.
        """
        for t in trajectory.sequences:
            alone = msgspec.structs.replace(t, branches=())
            of = {} if t is trajectory else {"branch_of": trajectory.id}
            line = orjson.dumps(msgspec.to_builtins(alone, enc_hook=str) | _arrays(alone) | of | more)
            self._trajectories.append(line + b"\n")

    def keep_moment(self, moment: Moment) -> None:
        """What `ale why` reads. Raises `OSError`."""
        write_moment(self.path, moment)
        self.timeline.sample(moment)
        self.timeline.flush()

    def forget_moment(self) -> None:
        """The last one of an earlier life says nothing of the life that begins, nor of what ends it early."""
        (self.path / MOMENT).unlink(missing_ok=True)

    def end(self, how: str) -> None:
        """The last word on the run's last moment: "done", or the error that ended it."""
        with suppress(OSError, RunFolderError):  # no moment was written, or the disk is full: the error itself is told
            self.timeline.flush()
            last = read_moment(self.path)
            write_moment(self.path, msgspec.structs.replace(last, ended=how))

    async def commit(self, books: Books) -> None:
        """Makes a checkpoint of what the learner wrote where `checkpoints.begin` said, and of the books as they are."""
        books.since.clear()  # the learner's part holds them
        frozen = freeze(books, self.journal.size)

        def flush() -> None:
            for file in (self.journal, self._metrics, self._trajectories, self.recording):
                if file is not None:
                    file.sync()
            self.checkpoints.commit(frozen)

        await asyncio.to_thread(flush)

    def finish(self, summary: Summary) -> None:
        replace(self.path / "summary.json", msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n")


def _save_config(path: Path, config: RunConfig) -> None:
    replace(path / "config.json", dump(config) + b"\n")


def _lock(path: Path) -> int:
    """A descriptor that holds the lock of the run folder; the kernel lets go of it when this process ends."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 20, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise RunFolderError(
            f"The run folder {path.parent} is in use by a live process (pid {holder}). Wait until it has ended, or "
            "choose another --name."
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def summary_of(path: Path) -> Summary | None:
    """What the run in this folder came to; None before its end."""
    file = path / "summary.json"
    return msgspec.json.decode(file.read_bytes(), type=Summary) if file.is_file() else None


def versions() -> Versions:
    return Versions(
        python=platform.python_version(),
        torch=metadata.version("torch"),
        transformers=metadata.version("transformers"),
        ale=ale.__version__,
        commit=_commit(),
    )


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _scalars(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a line of metrics; those of the ledger under its name."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "update":
            found[prefix + name] = float(value)
    return found


def _arrays(trajectory: Trajectory) -> dict[str, list[Any]]:
    """JSON knows no infinity: it becomes 1e30 with its sign; what is no number becomes null."""
    fields = {name: getattr(trajectory, name) for name in trajectory.__struct_fields__}
    return {
        name: np.nan_to_num(value.numpy(), nan=np.nan, posinf=1e30, neginf=-1e30).tolist()
        for name, value in fields.items()
        if isinstance(value, Array)
    }
