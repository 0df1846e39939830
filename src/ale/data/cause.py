"""Why a run waits: from its last moment, the chain of waits from the trainer down to what nobody else could end.

A wait names who could end it (`Wait.on`). Following that gives a tree, for an actor may wait for many things at once;
its leaves are causes. The one that is told is the sickest process, or else what has been waited for longest.
"""

from __future__ import annotations

from collections import Counter

import msgspec

from ale.data.moment import Moment
from ale.heart import BEAT_S
from ale.mailbox import Wait
from ale.vitals import ProcessState

# A heart-beat that is this late is told of.
LATE_S = 5 * BEAT_S
# A wait for a process that has said meanwhile that it has nothing to do: its answer is lost.
_LOST_S = 5.0
_CLOCK = "trainer"
_OTHERS = 4


class Link(msgspec.Struct, frozen=True):
    """`Link("trainer/run", "the answer of actor 'buffer' to TakeBatch (in hand)", 34.0, 3600.0)`"""

    who: str
    what: str
    waited_s: float
    deadline_s: float | None

    @property
    def sentence(self) -> str:
        limit = "no deadline" if self.deadline_s is None else f"of at most {span(self.deadline_s)}"
        return f"{self.who} waits for {self.what}: {span(self.waited_s)}, {limit}"


class Cause(msgspec.Struct, frozen=True, kw_only=True):
    """`said` names it in a sentence; `release` is what would end it; `chain` leads to it, link by link."""

    said: str
    release: str
    chain: tuple[Link, ...] = ()
    others: tuple[str, ...] = ()
    """What else is waited for at the ends of other chains, the most frequent first."""


class _Leaf(msgspec.Struct, frozen=True):
    rank: tuple[int, float]
    said: str
    release: str
    chain: tuple[Link, ...]
    kind: str


def find(moment: Moment) -> Cause | None:
    """None: nothing that matters waits for anything."""
    leaves = _Leaves(moment)
    roots = [w for w in moment.waits if w.named and not w.idle and w.of == _CLOCK]
    # Before and after the trainer's time: the pipeline's own waits.
    roots = roots or [w for w in moment.waits if w.named and not w.idle and w.of is None]
    found = [leaf for wait in roots for leaf in leaves.below(wait, ())]
    if not found:
        return None
    worst = max(found, key=lambda leaf: leaf.rank)
    kinds = Counter(leaf.kind for leaf in {leaf.chain: leaf for leaf in found}.values() if leaf.kind != worst.kind)
    others = tuple(f"{n} x {kind}" for kind, n in kinds.most_common(_OTHERS))
    said = worst.said
    if moment.notes:
        said = f"{said}. Before that: {'; '.join(moment.notes)}"
    return Cause(said=said, release=worst.release, chain=worst.chain, others=others)


class _Leaves:
    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._processes = {process.name: process for process in moment.processes}
        self._seen: set[Wait] = set()

    def below(self, wait: Wait, chain: tuple[Link, ...]) -> list[_Leaf]:
        """Every end of the chains that go on from this wait; none where one leads back to itself."""
        if wait in self._seen:
            return []
        self._seen.add(wait)
        chain = (*chain, Link(wait.who, wait.what, wait.waited_s, wait.deadline_s))
        kind, _, name = (wait.on or "").partition(" ")
        if kind == "process":
            return [self._process(wait, name, chain)]
        children = self._waits_of(kind, name)
        if children:
            return [leaf for child in children for leaf in self.below(child, chain)]
        return [self._end(wait, chain)]

    def _waits_of(self, kind: str, name: str) -> list[Wait]:
        if kind == "task":
            mine = [w for w in self._moment.waits if w.who == name and not w.idle]
        elif kind == "actor":
            mine = [
                w
                for w in self._moment.waits
                if not w.idle and (w.of == name if w.named else w.who == name or w.who.startswith(f"{name}/"))
            ]
        else:
            return []
        stated = [w for w in mine if w.named]
        return stated or mine

    def _end(self, wait: Wait, chain: tuple[Link, ...]) -> _Leaf:
        if not wait.named:
            place = wait.what.removeprefix("something at ")
            said = f"{wait.who} has waited in one place for {span(wait.waited_s)}: {place}"
            release = "nothing states it: what stands in that line"
        else:
            said = f"{wait.who} waits for {wait.what}, for {span(wait.waited_s)}"
            release = wait.release or (f"{wait.on}, which waits for nothing itself" if wait.on else "")
        full = next((link.what for link in chain if link.what.startswith("room in ")), None)
        if full is not None:
            said = f"{full.removeprefix('room in ')} is full, since {said}"
        return _Leaf((0, wait.waited_s), said, _by_deadline(release, wait), chain, wait.what)

    def _process(self, wait: Wait, name: str, chain: tuple[Link, ...]) -> _Leaf:
        process = self._processes.get(name)
        if process is None:
            said, rank = f"process {name} is not there", 2
        else:
            said, rank = describe(process)
            if rank == 0 and process.in_hand is not None and process.in_hand < process.asked:
                beat_s = process.beat_s or 0.0
                if wait.waited_s - beat_s > _LOST_S and process.in_hand == 0 and not process.doing:
                    rank = 1
                    said = (
                        f"process {name} (pid {process.pid}) has nothing to do and beats, but {process.asked} requests "
                        f"wait for its answer, one for {span(wait.waited_s)}: a request or its answer was lost"
                    )
        return _Leaf((rank, wait.waited_s), said, _by_deadline(f"an answer of process {name}", wait), chain, said)


def describe(process: ProcessState) -> tuple[str, int]:
    """How a process is, in words; 0 well, 1 at one piece of work for long, 2 not answering at all."""
    who = f"process {process.name} (pid {process.pid})"
    last = f"; its last heart-beat was {span(process.beat_s)} ago" if process.beat_s is not None else ""
    match process.vitals.condition:
        case "dead" | "gone":
            return f"{who} is dead", 2
        case "stopped":
            return f"{who} is stopped, by SIGSTOP or a debugger{last}; kill -CONT {process.pid} lets it go on", 2
    if process.beat_s is not None and process.beat_s > LATE_S:
        return f"{who} has sent no heart-beat for {span(process.beat_s)}: all of it is stuck", 2
    if process.doing and process.doing_s > LATE_S:
        return f"{who} is at one {process.doing} for {span(process.doing_s)}", 1
    at = f", at {process.doing}" if process.doing else ""
    return f"{who} is at work{at}; {process.asked} requests wait for its answer", 0


def _by_deadline(release: str, wait: Wait) -> str:
    if wait.deadline_s is None:
        return release or "nothing states it"
    left = wait.deadline_s - wait.waited_s
    when = f"its deadline, in {span(left)}" if left > 0 else "its deadline, which has passed"
    return f"{release}, or {when}" if release else when


def span(seconds: float | None) -> str:
    """`4.2 s`, `12 min`, `3.5 h`."""
    if seconds is None:
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def report(moment: Moment) -> str:
    """Everything of it in lines: what `ale why` prints, and what a run that is ended for its silence says."""
    lines = []
    if moment.phase:
        lines.append(f"phase     {moment.phase} {moment.step}/{moment.total}")
    lines.append(f"progress  {span(moment.silent_s)} ago: {moment.progress}")
    if moment.failures:
        ended = ", ".join(f"{n} x {reason}" for reason, n in sorted(moment.failures.items()))
        lines.append(f"since     {ended}")
    cause = find(moment)
    if moment.held_s:
        lines.append(f"cause     {'; '.join(moment.notes)}")
        lines.append("release   the end of what it is in: code that is called in the event loop must not block")
    elif cause is None:
        lines.append("cause     nothing waits: the controller itself is at work")
        lines += [f"note      {note}" for note in moment.notes]
    else:
        lines.append(f"cause     {cause.said}")
        lines.append(f"release   {cause.release}")
        lines += [f"{'chain' if not n else '':<9} {'  ' * n}{link.sentence}" for n, link in enumerate(cause.chain)]
        lines += [f"{'also' if not n else '':<9} {other}" for n, other in enumerate(cause.others)]
    for n, process in enumerate(moment.processes):
        v = process.vitals
        lines.append(
            f"{'processes' if not n else '':<9} {describe(process)[0]} "
            f"[{v.memory_mb:.0f} MB, {v.descriptors} descriptors, {span(v.cpu_s)} of processor time]"
        )
    counted = ", ".join(f"{name} {n}" for name, n in sorted(moment.counters.items()))
    if counted:
        lines.append(f"counted   {counted}")
    return "\n".join(lines)
