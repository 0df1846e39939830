"""A run on disk, read back: what it was asked to do, what it did, and every trajectory. Reads only; needs no torch.

A file whose last line has no end is one that is being written, or a run that was killed: the line is left out and
`notes` says so. Any other line that cannot be read is damage, and an error that names it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ale.config import EvalConfig, RunConfig
from ale.errors import RunFolderError
from ale.messages import Chunk, Status, ToolResult

L = TypeVar("L")


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One line of trajectories.jsonl without its tokens. Either `update` says which one it was trained on in, or
    `evaluation` which one it belongs to."""

    id: str
    group: str
    task: str
    family: str
    level: int
    chunks: tuple[Chunk, ...]
    reward: float | None
    status: Status
    duration_s: float
    update: int | None = None
    evaluation: str | None = None

    @property
    def action_tokens(self) -> int:
        return sum(chunk.end - chunk.start for chunk in self.chunks)


class Logged(Entry, frozen=True, kw_only=True):
    """The whole line. Axes: T tokens, A action tokens (those of the chunks, in order). A log-probability of None was
    not a number; one of -1e30 was minus infinity."""

    tokens_T: list[int]
    logp_A: list[float | None]
    logp_sampled_A: list[float | None]
    version_A: list[int]
    results: tuple[ToolResult, ...]
    answer: str | None
    cause: str | None
    started_version: int


class RunLog:
    """`RunLog.open("runs/nano")`. `updates` and `evaluations` are the lines of metrics.jsonl."""

    def __init__(self, path: Path) -> None:
        """Raises `RunFolderError` when `path` holds no run or one of its files is damaged."""
        self.path = path
        self.notes: list[str] = []
        self.config: dict[str, Any] = _document(path / "config.json")
        self.summary: dict[str, Any] | None = (
            _document(path / "summary.json") if (path / "summary.json").is_file() else None
        )
        self.lines = list(self._lines("metrics.jsonl", dict[str, Any]))
        """Those of metrics.jsonl, updates and evaluations as they came."""
        self.updates = [line for line in self.lines if "update" in line]
        self.evaluations = [line for line in self.lines if "evaluation" in line]

    @classmethod
    def open(cls, run: str | Path, runs_dir: Path = Path("runs")) -> RunLog:
        """A folder, or the name of one in `runs_dir`."""
        for path in (Path(run).expanduser(), runs_dir / run):
            if (path / "config.json").is_file():
                return cls(path)
        known = sorted(path.parent.name for path in runs_dir.glob("*/config.json"))
        near = difflib.get_close_matches(Path(run).name, known, n=1)
        if near:
            hint = f"did you mean {near[0]}?"
        elif known:
            hint = f"in {runs_dir} there are: {', '.join(known)}."
        else:
            hint = f"{runs_dir} holds no runs either. Give the path of a run folder."
        raise RunFolderError(f"There is no run {run}: no folder of that name with a config.json; {hint}")

    @property
    def name(self) -> str:
        return str(self.config.get("name", self.path.name))

    def solved(self, entry: Entry) -> bool:
        """As the run itself counted it."""
        return entry.status == "scored" and EvalConfig(solved_at=self.setting("eval.solved_at")).solved(entry.reward)

    def setting(self, field: str) -> Any:
        """`setting("algorithm.gamma")`: as configured, or today's default where the run did not know the field."""
        flat = flatten(self.config)
        return flat[field] if field in flat else _DEFAULTS.get(field)

    def changes(self) -> dict[str, Any]:
        """The fields of its configuration that differ from the defaults."""
        return {
            field: value
            for field, value in flatten(self.config).items()
            if field not in ("name", "runs_dir") and value != _DEFAULTS.get(field)
        }

    def entries(self) -> Iterator[Entry]:
        """Every trajectory, in the order in which they were kept."""
        return self._lines("trajectories.jsonl", Entry)

    def logged(self) -> Iterator[Logged]:
        """The same, whole."""
        return self._lines("trajectories.jsonl", Logged)

    def trajectory(self, id_: str) -> tuple[Logged, list[Entry]]:
        """One trajectory, and all members of its group. Raises `RunFolderError`, which names the nearest id."""
        entries = list(self.entries())
        places = [n for n, entry in enumerate(entries) if entry.id == id_]
        if not places:
            near = difflib.get_close_matches(id_, [entry.id for entry in entries], n=1)
            hint = f"did you mean {near[0]}?" if near else f"`ale show {self.path}` lists its {len(entries)}."
            raise RunFolderError(f"The run {self.path} has no trajectory {id_}; {hint}")
        with (self.path / "trajectories.jsonl").open("rb") as file:
            line = next(line for n, line in enumerate(file) if n == places[-1])
        found = _decode(line, Logged, self.path / "trajectories.jsonl", places[-1] + 1)
        return found, [e for e in entries if e.group == found.group and e.update == found.update]

    def tokenizer(self) -> Path | None:
        """The tokenizer.json that the run's tokens are numbers of."""
        configured = str(self.setting("model.path"))
        homes = [self.path / "model", *([Path(configured).expanduser()] if configured != "nano" else [])]
        homes += sorted((self.path / "checkpoints").glob("*"))
        return next((home / "tokenizer.json" for home in homes if (home / "tokenizer.json").is_file()), None)

    def _lines(self, name: str, kind: type[L]) -> Iterator[L]:
        path = self.path / name
        if not path.is_file():
            return
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    note = f"{name} ends within line {number}: the run goes on, or was killed"
                    if note not in self.notes:
                        self.notes.append(note)
                    return
                yield _decode(line, kind, path, number)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"rollout": {"max_lag": 1}}` becomes `{"rollout.max_lag": 1}`; one level deep, as sections are."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and not prefix:
            flat |= flatten(value, f"{key}.")
        else:
            flat[prefix + key] = value
    return flat


# As a run's folder has them: in JSON a tuple is a list.
_DEFAULTS = flatten(msgspec.json.decode(msgspec.json.encode(RunConfig())))


def _document(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        raise RunFolderError(f"{path.parent} holds no run: no {path.name}.") from None
    except (OSError, msgspec.DecodeError) as error:
        raise RunFolderError(f"{path} cannot be read: {error}. Put it back as it was.") from error


def _decode(line: bytes, kind: type[L], path: Path, number: int) -> L:
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RunFolderError(
            f"{path}, line {number}, is damaged: {error}. Put the file back as it was, or take the line out."
        ) from error
