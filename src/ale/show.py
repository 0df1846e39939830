"""What `ale show` tells: a run, and one trajectory of it. Facts first (plain structs, `--json`), then their looks.

Whatever a model or a command wrote is printed with its control characters escaped: it cannot steer the terminal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from ale.algorithm.advantages import advantages
from ale.algorithm.filters import group_reason
from ale.algorithm.returns import chunk_returns
from ale.data.run_log import Entry, Logged, RunLog
from ale.messages import ToolResult
from ale.progress import Rate
from ale.progress_view import describe

# The discount of each objective, where the configuration leaves it to them; others do not discount.
GAMMA = {"ipa": 0.95}


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """Which trajectories are listed: `Filter(solved=False, family="sort", limit=None)`. None: all."""

    solved: bool | None = None
    family: str | None = None
    update: int | None = None
    evaluation: str | None = None
    limit: int | None = None

    def __call__(self, entry: Entry, solved: bool) -> bool:
        return (
            self.solved in (None, solved)
            and self.family in (None, entry.family)
            and self.update in (None, entry.update)
            and self.evaluation in (None, entry.evaluation)
        )


class Row(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    task: str
    family: str
    reward: float | None
    status: str
    turns: int
    action_tokens: int
    update: int | None
    evaluation: str | None


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """A run. `matching` of its `kept` trajectories pass the filter; `trajectories` are the first of these."""

    name: str
    path: str
    finished: bool
    updates: int
    updates_wanted: int
    changes: dict[str, Any]
    evaluations: dict[str, Rate]
    books: dict[str, Any]
    last: dict[str, Any]
    summary: dict[str, Any] | None
    kept: int
    matching: int
    trajectories: list[Row]
    notes: list[str]


class ChunkView(msgspec.Struct, frozen=True, kw_only=True):
    """A turn: what stood before it, what was said, what came of it. `weight` is w_k of eq. 9 for a policy that has not
    moved since (ratio 1) and a chunk that the mismatch mask lets through: the return G_k of eq. 7."""

    given: str
    text: str
    ending: str
    error: bool
    tokens: int
    versions: list[int]
    logp_mean: float | None
    logp_min: float | None
    logp_sampled_mean: float | None
    weight: float | None
    result: ToolResult | None


class TrajectoryView(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    task: str
    family: str
    level: int
    update: int | None
    evaluation: str | None
    reward: float | None
    status: str
    cause: str | None
    answer: str | None
    duration_s: float
    tokens: int
    action_tokens: int
    advantage: float | None
    """What plays R_final in eq. 7; None where it was not trained on."""
    gamma: float
    group_rewards: list[float | None]
    chunks: list[ChunkView]
    left: str
    """What followed the last turn."""
    notes: list[str]


def overview(log: RunLog, which: Filter) -> Overview:
    entries = list(log.entries())
    matching = [entry for entry in entries if which(entry, log.solved(entry))]
    last = {k: v for k, v in log.updates[-1].items() if k != "ledger"} if log.updates else {}
    return Overview(
        name=log.name,
        path=str(log.path),
        finished=log.summary is not None,
        updates=len(log.updates),
        updates_wanted=log.setting("learner.updates"),
        changes=log.changes(),
        evaluations={
            str(e["evaluation"]): Rate(success=e["success"], ci95=tuple(e["ci95"]), n=e["n"]) for e in log.evaluations
        },
        books=log.updates[-1].get("ledger", {}) if log.updates else {},
        last=last,
        summary=log.summary,
        kept=len(entries),
        matching=len(matching),
        trajectories=[_row(entry) for entry in matching[: which.limit]],
        notes=log.notes,
    )


def trajectory_view(log: RunLog, id_: str) -> TrajectoryView:
    t, group = log.trajectory(id_)
    notes = list(log.notes)
    decode = _decoder(log, notes)
    gamma = log.setting("algorithm.gamma")
    if gamma is None:
        gamma = GAMMA.get(log.setting("algorithm.objective"), 1.0)
    advantage = _advantage(log, t, group, notes)
    returns = None if advantage is None else chunk_returns(advantage, len(t.chunks), gamma=gamma).tolist()
    chunks, place, sampled = [], 0, 0
    results = list(t.results)
    program = log.setting("agent.kind") == "command"  # its only result is how the whole program ended
    for k, chunk in enumerate(t.chunks):
        size = chunk.end - chunk.start
        logp, logp_sampled = t.logp_A[sampled : sampled + size], t.logp_sampled_A[sampled : sampled + size]
        known = [value for value in logp if value is not None]
        here = k == len(t.chunks) - 1 if program else chunk.ending == "call"
        chunks.append(
            ChunkView(
                given=decode(t.tokens_T[place : chunk.start]),
                text=decode(t.tokens_T[chunk.start : chunk.end]),
                ending=chunk.ending,
                error=chunk.error,
                tokens=size,
                versions=[version for version, _ in groupby(t.version_A[sampled : sampled + size])],
                logp_mean=_mean(logp),
                logp_min=min(known, default=None),
                logp_sampled_mean=_mean(logp_sampled),
                weight=None if returns is None else returns[k],
                result=results.pop(0) if results and here else None,
            )
        )
        place, sampled = chunk.end, sampled + size
    return TrajectoryView(
        id=t.id,
        task=t.task,
        family=t.family,
        level=t.level,
        update=t.update,
        evaluation=t.evaluation,
        reward=t.reward,
        status=t.status,
        cause=t.cause,
        answer=t.answer,
        duration_s=t.duration_s,
        tokens=len(t.tokens_T),
        action_tokens=len(t.logp_A),
        advantage=advantage,
        gamma=gamma,
        group_rewards=[entry.reward for entry in group] if t.update is not None else [],
        chunks=chunks,
        left=decode(t.tokens_T[place:]),
        notes=notes,
    )


def print_overview(seen: Overview, console: Console) -> None:
    say = _Printer(console)
    state = "finished" if seen.finished else "not finished"
    say(f"{seen.name}  {state}, {seen.updates} of {seen.updates_wanted} updates  {seen.path}", "bold")
    for note in seen.notes:
        say(f"note: {note}", "yellow")
    if seen.summary is not None:
        s = seen.summary
        versions = "  ".join(f"{k} {v}" for k, v in s.get("versions", {}).items() if v is not None)
        say(f"{s['episodes']} episodes, {s['wall_s'] / 60:.1f} minutes, {s['tokens_per_s']:.0f} tokens/s  {versions}")
    say.heading("configuration, where it differs from the defaults")
    say.pairs({field: _plain(value) for field, value in seen.changes.items()} or {"none": ""})
    if seen.evaluations:
        say.heading("evaluations")
        say.pairs({name: describe(rate) for name, rate in seen.evaluations.items()})
    if seen.books:
        b, dropped = seen.books, seen.books["dropped"]
        say.heading(f"books at update {seen.updates}")
        say(
            f"  {b['started']} started = {b['trained']} trained + {b['buffered']} buffered + {b['running']} running "
            f"+ {sum(dropped.values())} dropped"
        )
        if b.get("lives", 1) > 1:
            say(f"  {b['lives']} lives; {b['restarted']} rollouts were cut off and ran again from their start")
        means = b.get("dropped_tokens", {})
        say.pairs(
            {reason: f"{n} dropped, {means.get(reason, 0.0):.0f} tokens on average" for reason, n in dropped.items()}
        )
    if seen.last:
        say.heading(f"last update, {seen.last['update']}")
        numbers = {k: v for k, v in seen.last.items() if k != "update"}
        say.pairs({k: "not a number" if v is None else _number(v) for k, v in numbers.items()})
    say.heading(f"trajectories: {seen.matching} of {seen.kept} kept match, {len(seen.trajectories)} are listed")
    if seen.trajectories:
        width = max(len(row.id) for row in seen.trajectories)
        say.row(f"  {'id':<{width}}  {'task':<22}  reward  turns  tokens  where", "dim")
        for row in seen.trajectories:
            where = row.evaluation if row.update is None else f"update {row.update}"
            reward = "-" if row.reward is None else f"{row.reward:g}"
            ending = "" if row.status == "scored" else f", {row.status}"
            facts = f"{reward:>6}  {row.turns:>5}  {row.action_tokens:>6}  {where}{ending}"
            say.row(f"  {row.id:<{width}}  {row.task:<22}  {facts}")


def print_trajectory(seen: TrajectoryView, console: Console) -> None:
    say = _Printer(console)
    where = f"update {seen.update}" if seen.update is not None else seen.evaluation
    reward = "no reward" if seen.reward is None else f"reward {seen.reward:g}"
    say(f"{seen.id}  {reward}  {seen.status}", "bold")
    say(f"task {seen.task}, family {seen.family}, level {seen.level}, {where}, {seen.duration_s:.2f} s")
    say(f"{seen.tokens} tokens, {seen.action_tokens} of them sampled in {len(seen.chunks)} turns")
    if seen.cause:
        say(f"cause: {seen.cause}", "red")
    for note in seen.notes:
        say(f"note: {note}", "yellow")
    if seen.advantage is not None:
        rewards = ", ".join("-" if r is None else f"{r:g}" for r in seen.group_rewards)
        say(f"rewards of its group: {rewards}; advantage {seen.advantage:.4g}, gamma {seen.gamma:g}")
    for k, chunk in enumerate(seen.chunks):
        say.heading("prompt" if k == 0 else "environment")
        say.block(chunk.given, "dim")
        versions = ", ".join(map(str, chunk.versions)) or "-"
        say.heading(f"turn {k + 1}: {chunk.ending}{', error' if chunk.error else ''}")
        facts = [f"{chunk.tokens} tokens", f"version {versions}"]
        if chunk.logp_mean is not None and chunk.logp_min is not None:
            facts.append(f"logp {_number(chunk.logp_mean)} on average, {_number(chunk.logp_min)} at least")
        if chunk.weight is not None:
            facts.append(f"IPA weight {chunk.weight:+.4f}")
        say(f"  {', '.join(facts)}", "cyan")
        say.block(chunk.text, "")
        if chunk.result is not None:
            r = chunk.result
            ending = "timed out" if r.timed_out else f"exit {r.exit_code}"
            say(f"  call, {ending}, {r.duration_s:.3f} s", "cyan")
            say.block(r.call, "green")
            say.block(r.output, "")
    if seen.left:
        say.heading("environment")
        say.block(seen.left, "dim")
    if seen.answer is not None:
        say.heading("answer")
        say.block(seen.answer, "")


def visible(text: str) -> str:
    """`text` with everything that is not printed as itself escaped: control characters, but not line breaks and tabs.

    >>> visible("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


class _Printer:
    """Lines: wrapped on a terminal, whole in a pipe."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, line: str, style: str = "") -> None:
        self._console.print(Text(visible(line), style=style), soft_wrap=not self._console.is_terminal)

    def heading(self, line: str) -> None:
        self._console.print()
        self(line, "bold")

    def row(self, line: str, style: str = "") -> None:
        """A line of a table: cut where the terminal ends."""
        if self._console.is_terminal:
            self._console.print(Text(visible(line), style=style), no_wrap=True, overflow="ellipsis")
        else:
            self(line)

    def pairs(self, items: dict[str, str]) -> None:
        width = max((len(name) for name in items), default=0)
        for name, value in items.items():
            self(f"  {name:<{width}}  {value}".rstrip())

    def block(self, text: str, style: str) -> None:
        for line in text.split("\n"):
            self(f"  | {line}".rstrip(), style)


def _row(entry: Entry) -> Row:
    return Row(
        id=entry.id,
        task=entry.task,
        family=entry.family,
        reward=entry.reward,
        status=entry.status,
        turns=len(entry.chunks),
        action_tokens=entry.action_tokens,
        update=entry.update,
        evaluation=entry.evaluation,
    )


def _advantage(log: RunLog, t: Logged, group: list[Entry], notes: list[str]) -> float | None:
    if t.update is None:
        return None
    rewards = [entry.reward for entry in group]
    if any(reward is None for reward in rewards):
        notes.append("a member of its group has no reward: no weights")
        return None
    known = [float(reward) for reward in rewards if reward is not None]
    baseline = log.setting("algorithm.baseline")
    if group_reason(known, baseline) is not None:
        notes.append("its group on disk gives no advantage: the file holds only a part of it")
        return None
    place = next(n for n, entry in enumerate(group) if entry.id == t.id)
    return float(advantages(known, baseline)[place])


def _decoder(log: RunLog, notes: list[str]) -> Callable[[list[int]], str]:
    """From token ids to text; to the numbers themselves, with a note, where there is nothing to read them with."""
    path = log.tokenizer()
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        notes.append("tokenizers is not installed, so tokens are shown as numbers: pip install 'ale[train]'")
        return _numbers
    if path is None:
        notes.append("the run's tokenizer.json is gone, so tokens are shown as numbers")
        return _numbers
    tokenizer = Tokenizer.from_file(str(path))
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False)) if ids else ""


def _numbers(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _number(value: float) -> str:
    return f"{value:.4g}"


def _plain(value: Any) -> str:
    return msgspec.json.encode(value).decode()
