"""A run on disk: `runs/NAME/` with config.json, metrics.jsonl, trajectories.jsonl, checkpoints/ and summary.json."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
import orjson

import ale
from ale.config import RunConfig, dump
from ale.errors import ConfigError
from ale.messages import Trajectory
from ale.progress import Summary, Versions
from ale.wire import Array


class RunFolder:
    """Appends what happens, line by line, flushed as it is written: a killed run keeps what it had finished."""

    def __init__(self, config: RunConfig, *, overwrite: bool = False) -> None:
        self.path = Path(config.runs_dir) / config.name
        try:
            self._make(config, overwrite)
            self._metrics = (self.path / "metrics.jsonl").open("ab")
            self._trajectories = (self.path / "trajectories.jsonl").open("ab")
        except OSError as error:
            raise ConfigError(f"runs_dir: the run folder {self.path} cannot be written: {error}.") from error

    def _make(self, config: RunConfig, overwrite: bool) -> None:
        if self.path.exists() and any(self.path.iterdir()):
            if not overwrite:
                raise ConfigError(
                    f"name: the run folder {self.path} exists and is not empty. Choose another --name, or pass "
                    "--overwrite to delete it."
                )
            if not (self.path / "config.json").is_file():
                raise ConfigError(
                    f"name: {self.path} holds something else than a run, and is not deleted: no config.json."
                )
            shutil.rmtree(self.path)
        (self.path / "checkpoints").mkdir(parents=True)
        (self.path / "config.json").write_bytes(dump(config) + b"\n")

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._metrics.close()
        self._trajectories.close()

    @property
    def model(self) -> Path:
        return self.path / "model"

    def checkpoint(self, name: str) -> Path:
        return self.path / "checkpoints" / name

    def record(self, **values: Any) -> None:
        """One line of metrics.jsonl."""
        self._metrics.write(orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")
        self._metrics.flush()

    def keep(self, trajectory: Trajectory, **more: Any) -> None:
        """One line of trajectories.jsonl: every token, log-probability, chunk, call, output, reward and version.

        A branch has a line of its own, which names its episode.
        """
        for t in trajectory.sequences:
            alone = msgspec.structs.replace(t, branches=())
            of = {} if t is trajectory else {"branch_of": trajectory.id}
            line = orjson.dumps(msgspec.to_builtins(alone, enc_hook=str) | _arrays(alone) | of | more)
            self._trajectories.write(line + b"\n")
        self._trajectories.flush()

    def finish(self, summary: Summary) -> None:
        (self.path / "summary.json").write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n")


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


def _arrays(trajectory: Trajectory) -> dict[str, list[Any]]:
    """JSON knows no infinity: it becomes 1e30 with its sign; what is no number becomes null."""
    fields = {name: getattr(trajectory, name) for name in trajectory.__struct_fields__}
    return {
        name: np.nan_to_num(value.numpy(), nan=np.nan, posinf=1e30, neginf=-1e30).tolist()
        for name, value in fields.items()
        if isinstance(value, Array)
    }
