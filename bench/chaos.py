"""Kills a random process of a short run at a random moment, resumes it until it ends, and counts what is wrong then.

    python -m bench.chaos --runs 100 --seed 0 --minutes 44

The victim is the controller, the learner, the engine, the launcher of sandboxes, a process inside a sandbox, or all of
them at once. Every second run has real sandboxes and `ale train`; the others have an environment of their own
(`ale.open_run`), whose episodes take some milliseconds, so that more of them are under way when a run is hit. Every
fourth run is hit a second time, while it is resumed.

For each run: every trajectory that had finished at a kill is there at the end, once; no task is left out or repeated;
the books add up; every life ends by itself within its deadline; and no process, mount, cgroup, temporary file or shared
memory of it is left. What a run started is told by a mark in its environment, by its process ids and by a temporary
directory of its own, so that other work on the machine is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec

from ale.data.books import Books, LedgerStatistics
from ale.data.events import Event, GroupDropped, GroupOpened, Recorded, RolloutDropped, RolloutKept, RolloutStarted
from ale.data.events import Updated as Trained
from ale.data.journal import Journal
from ale.sandbox.state import PREFIX, SHARED_MEMORY, shows_tools
from ale.testing.processes import ended, processes_with
from ale.testing.small_run import write_small

ROOT = Path(__file__).resolve().parent.parent
UPDATES = 5
HANG_S = 240.0
"""No life takes so long, nor ten times as long as one that is left alone: one that does hangs."""
VICTIMS = ("controller", "learner", "engine", "launcher", "sandbox", "tree")
_MARK = "ALE_CHAOS_RUN"
_FIND_S = 5.0  # how long a victim is looked for, until the next best is taken


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One run: `Outcome(number=7, seed=7, kind="sandbox", victims=("engine",), lives=2, finished=12, ...)`."""

    number: int
    seed: int
    kind: str
    victims: tuple[str, ...]
    lives: int
    finished: int
    """Trajectories that had finished at the last kill."""
    wall_s: float
    wrong: tuple[str, ...]
    """What is wrong, each sentence beginning with its kind: lost, duplicated, hang, leak, books, failed."""


class Case:
    """One run in a directory of its own, and everything that it starts."""

    def __init__(self, place: Path, model: Path, number: int, seed: int, length_s: float = 0.0) -> None:
        self.place, self.number, self.seed = place, number, seed
        self.hang_s = max(HANG_S, 10 * length_s)
        self.rng = random.Random(f"chaos/{seed}/{number}")
        self.kind = "sandbox" if number % 2 == 0 else "environment"
        self.mark = f"chaos-{os.getpid()}-{seed}-{number}"
        self.folder = place / "runs" / "a"
        self.temporary = place / "tmp"
        self.temporary.mkdir(parents=True)
        write_small(place, model, {"tasks.heldout": 1, "warm_start.steps": 0, "learner.updates": UPDATES})
        self.lives: list[int] = []
        self.finished = set[str]()
        self.victims: list[str] = []
        self.wrong: list[str] = []

    # A life

    def start(self, *, resume: bool) -> subprocess.Popen[bytes]:
        if self.kind == "sandbox":
            said = ["train", "runs/a", "--resume"] if resume else ["train", "small.toml"]
            command = [sys.executable, "-c", "from ale.cli import main; main()", *said]
        else:
            command = [sys.executable, "-m", "bench.chaos_environment", *(["--resume"] if resume else [])]
        life = len(self.lives)
        with (self.place / f"life-{life}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=self.place,
                env=os.environ
                | {
                    _MARK: self.mark,
                    "TMPDIR": str(self.temporary),
                    "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), *sys.path]),
                },
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.lives.append(process.pid)
        return process

    def strike(self, process: subprocess.Popen[bytes], length_s: float, length: int) -> None:
        """Kills a victim at a moment of this life: half of the moments are drawn over its time, half over its work."""
        victim = self.rng.choice(VICTIMS if self.kind == "sandbox" else ("controller", "learner", "engine", "tree"))
        began = time.monotonic()
        before = self._size()
        share = self.rng.random()
        by_work = self.rng.random() < 0.5
        while process.poll() is None and time.monotonic() < began + self.hang_s:
            if by_work and self._size() >= before + share * max(1, length - before):
                break
            if not by_work and time.monotonic() >= began + share * length_s:
                break
            time.sleep(0.001)
        time.sleep(self.rng.random() * 0.03)
        patience = time.monotonic() + _FIND_S
        while process.poll() is None:
            hit = self.victims_of(process.pid, victim)
            if hit or time.monotonic() > patience:
                for pid in hit or [process.pid]:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                self.victims.append(victim if hit else f"controller (no {victim} was there)")
                break
            time.sleep(0.001)
        else:
            self.victims.append("none: it had ended")

    def victims_of(self, controller: int, victim: str) -> list[int]:
        if victim == "controller":
            return [controller]
        if victim == "tree":
            return sorted({controller, *descendants(controller), *processes_with(self.mark)})
        if victim == "sandbox":
            inside = [pid for pid in descendants(controller) if self._in_sandbox(pid, controller)]
            return [self.rng.choice(inside)] if inside else []
        word = {"learner": "learner_process", "engine": "engine_process", "launcher": "launcher.py"}[victim]
        lines = {pid: command_of(pid) for pid in descendants(controller)}
        return [pid for pid, line in lines.items() if word in line and "bwrap" not in line][:1]

    def _in_sandbox(self, pid: int, controller: int) -> bool:
        names = [path.name for path in self._states(controller)]
        return any(shows_tools(Path(f"/proc/{pid}"), name) for name in names)

    def _size(self) -> int:
        with suppress(OSError):
            return (self.folder / "journal").stat().st_size
        return 0

    def wait(self, process: subprocess.Popen[bytes]) -> int | None:
        """How the life ended; None where it had to be ended."""
        try:
            return process.wait(timeout=self.hang_s)
        except subprocess.TimeoutExpired:
            log = (self.place / f"life-{len(self.lives) - 1}.log").read_text(errors="replace")
            self.wrong.append(
                f"hang: life {len(self.lives) - 1} did not end in {self.hang_s:.0f} s; it said: {log[-600:]}"
            )
            for pid in (process.pid, *descendants(process.pid)):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            return None

    # What is left

    def note_finished(self) -> None:
        """What had finished at a kill. It is there at every later kill, and at the end."""
        now = set(ends(self.events()))
        gone = self.finished - now
        if gone:
            self.wrong.append(f"lost: {sorted(gone)} had finished and are gone")
        self.finished |= now

    def events(self) -> list[Event]:
        if not (self.folder / "journal").is_file():
            return []
        copy = self.place / "journal.copy"  # opening a journal mends it, which is for the run to do
        shutil.copyfile(self.folder / "journal", copy)
        with ExitStack() as stack:
            journal = Journal(copy)
            stack.callback(journal.close)
            return list(journal.read())

    def audit(self) -> None:
        """Everything that has to hold at the end."""
        events = self.events()
        self.note_finished()
        said = self.wrong.append
        started = [e.rollout for e in events if isinstance(e, RolloutStarted)]
        kept = [e.trajectory.id for e in events if isinstance(e, RolloutKept)]
        for what, ids in (
            ("rollouts started", started),
            ("rollouts ended", ends(events)),
            ("groups trained on or dropped", [*trained_groups(events), *dropped_groups(events)]),
            ("tasks taken", [e.drawn for e in events if isinstance(e, GroupOpened)]),
            ("updates made", [e.number for e in events if isinstance(e, Trained)]),
        ):
            if twice := sorted(str(id_) for id_, n in Counter(ids).items() if n > 1):
                said(f"duplicated: {what} twice: {twice}")
        drawn = [e.drawn for e in events if isinstance(e, GroupOpened)]
        if drawn and drawn != list(range(drawn[0], drawn[0] + len(drawn))):
            said(f"lost: the tasks taken are {drawn}: one was left out, or they are out of order")
        if not set(ends(events)) <= set(started):
            said("books: a rollout ended that had not started")
        if [e.update for e in events if isinstance(e, Recorded)] != list(range(1, UPDATES + 1)):
            said(f"books: not every one of {UPDATES} updates is recorded once")
        books = Books()
        for event in events:
            books.apply(event)
        if (lost := LedgerStatistics.of(books).lost) != 0:
            said(f"books: {lost} samples are neither trained, buffered, running nor dropped")
        self._audit_files(set(trained_groups(events)), kept, len(started))

    def _audit_files(self, trained: set[str], kept: list[str], started: int) -> None:
        said = self.wrong.append
        metrics = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        if [line["update"] for line in metrics if "update" in line] != list(range(1, UPDATES + 1)):
            said("duplicated: metrics.jsonl does not have each update once")
        for line in metrics:
            if "ledger" in line:
                b = line["ledger"]
                if b["started"] != b["trained"] + b["buffered"] + b["running"] + sum(b["dropped"].values()):
                    said(f"books: the identity does not hold after update {line['update']}: {b}")
        rows = [json.loads(line) for line in (self.folder / "trajectories.jsonl").read_text().splitlines()]
        members = Counter(row["id"] for row in rows if "update" in row)
        if lost := {id_ for id_ in kept if id_.split("/")[0] in trained} - set(members):
            said(f"lost: trained on and not in trajectories.jsonl: {sorted(lost)}")
        if twice := [id_ for id_, n in members.items() if n > 1]:
            said(f"duplicated: in trajectories.jsonl twice: {twice}")
        names = [line["evaluation"] for line in metrics if "evaluation" in line]
        if names != ["heldout_before", "heldout_after"]:
            said(f"duplicated: the evaluations are {names}")
        summary = json.loads((self.folder / "summary.json").read_text())
        if (summary["updates"], summary["lost_samples"], summary["episodes"]) != (UPDATES, 0, started):
            said(f"books: the summary says {summary['updates']} updates, {summary['lost_samples']} lost, "
                 f"{summary['episodes']} of {started} episodes")  # fmt: skip

    def leaks(self) -> None:
        """What this run started or made and left."""
        ours = [f"{PREFIX}{pid}-" for pid in self.lives]
        left = list[int]()
        for pid in set().union(*(processes_with(text) for text in (self.mark, str(self.place), *ours))):
            with suppress(ProcessLookupError):
                left.append(os.pidfd_open(pid))
        if (alive := len(left) - ended(left)) > 0:
            self.wrong.append(f"leak: {alive} processes")
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        mounts = [line for line in lines if str(self.place) in line or any(name in line for name in ours)]
        groups = [path for path in cgroups() if any(name in path for name in ours)]
        states = [path for pid in self.lives for path in self._states(pid)]
        files = [path for path in self.temporary.rglob("*") if path.is_file()]
        for what, found in (
            ("mounts", mounts), ("cgroups", groups), ("state directories", states), ("temporary files", files),
        ):  # fmt: skip
            if found:
                self.wrong.append(f"leak: {len(found)} {what}: {str(found[0])[:200]}")

    def _states(self, pid: int) -> list[Path]:
        return [path for parent in (SHARED_MEMORY, self.temporary) for path in parent.glob(f"{PREFIX}{pid}-*")]

    def outcome(self, began: float) -> Outcome:
        return Outcome(
            number=self.number,
            seed=self.seed,
            kind=self.kind,
            victims=tuple(self.victims),
            lives=len(self.lives),
            finished=len(self.finished),
            wall_s=time.monotonic() - began,
            wrong=tuple(self.wrong),
        )


def ends(events: list[Event]) -> list[str]:
    return [
        *(e.trajectory.id for e in events if isinstance(e, RolloutKept)),
        *(e.rollout for e in events if isinstance(e, RolloutDropped)),
    ]


def trained_groups(events: list[Event]) -> list[str]:
    return [group for e in events if isinstance(e, Trained) for group in e.groups]


def dropped_groups(events: list[Event]) -> list[str]:
    return [e.group for e in events if isinstance(e, GroupDropped)]


def command_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def descendants(pid: int) -> list[int]:
    """All that `pid` started, and what that started, seen from the outside."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    left = [pid]
    while left:
        below = children.get(left.pop(), [])
        found += below
        left += below
    return found


def cgroups() -> Iterator[str]:
    for place, names, _ in os.walk("/sys/fs/cgroup"):
        yield from (f"{place}/{name}" for name in names if name.startswith(PREFIX))


def play(case: Case, length_s: float, length: int, kills: int) -> Outcome:
    """One run from its start to its end, with so many kills on the way."""
    began, done = time.monotonic(), False
    for attempt in range(kills + 6):
        process = case.start(resume=(case.folder / "config.json").is_file())
        if attempt < kills:
            case.strike(process, length_s, length)
        code = case.wait(process)
        case.note_finished()
        done = code == 0
        if done or code is None:
            break
        if attempt >= kills:
            log = (case.place / f"life-{len(case.lives) - 1}.log").read_text(errors="replace")
            case.wrong.append(f"failed: a life that was left alone ended with {code}: {log[-600:]}")
    if done:
        case.audit()
        case.leaks()
    return case.outcome(began)


def make_model(path: Path) -> None:
    """A model as small as they get: what is tested is around it."""
    import torch
    from transformers import Qwen3MoeForCausalLM

    from ale.models.nano import nano_config, train_tokenizer

    tokenizer = train_tokenizer(["a b c"], 300)
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(nano_config(tokenizer, hidden_size=64, layers=1)).save_pretrained(path)
    tokenizer.save_pretrained(path)


def chaos(place: Path, runs: int, seed: int, minutes: float, *, say: bool = True) -> list[Outcome]:
    """As many of `runs` as fit into the time; two more, left alone, tell how long a life is."""
    began, model = time.monotonic(), place / "model"
    make_model(model)
    length_s, length = dict[str, float](), dict[str, int]()
    outcomes: list[Outcome] = []
    for number in range(-2, runs):
        if time.monotonic() - began > minutes * 60:
            break
        case = Case(place / f"run-{number}", model, number, seed, max(length_s.values(), default=0.0))
        kills = 0 if number < 0 else 2 if number % 4 == 3 else 1
        outcome = play(case, length_s.get(case.kind, 0), length.get(case.kind, 0), kills)
        if number < 0:
            length_s[case.kind] = outcome.wall_s
            length[case.kind] = (case.folder / "journal").stat().st_size
        outcomes.append(outcome)
        if say:
            mark = "WRONG: " + "; ".join(outcome.wrong) if outcome.wrong else "well"
            said = f"{number:4d} {case.kind:12} {outcome.lives} lives, {outcome.finished:3d} finished, "
            said += f"{outcome.wall_s:5.1f} s, killed: {', '.join(outcome.victims) or 'nothing'}: {mark}"
            print(said, flush=True)
        if not outcome.wrong:
            shutil.rmtree(case.place)
    return outcomes


def report(outcomes: list[Outcome]) -> str:
    hit = [o for o in outcomes if o.number >= 0]
    wrong = Counter(said.partition(":")[0] for o in outcomes for said in o.wrong)
    victims = Counter(victim for o in hit for victim in o.victims)
    return (
        f"{len(hit)} runs, {sum(o.lives for o in hit)} lives, {sum(len(o.victims) for o in hit)} kills "
        f"({', '.join(f'{n} {name}' for name, n in victims.most_common())}), "
        f"{sum(o.wall_s for o in outcomes) / 60:.1f} minutes: "
        + ", ".join(f"{wrong[kind]} {kind}" for kind in ("lost", "duplicated", "hang", "leak", "books", "failed"))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=110)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=43.0, help="begin no run after this time")
    parser.add_argument("--keep", type=Path, help="where to work, kept; else a temporary directory")
    args = parser.parse_args()
    with ExitStack() as stack:
        if args.keep is not None:
            place = args.keep.resolve()
            place.mkdir(parents=True)
        else:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ale-chaos-")))
        outcomes = chaos(place, args.runs, args.seed, args.minutes)
    print(report(outcomes))
    if any(outcome.wrong for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
