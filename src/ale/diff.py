"""Two runs side by side: where their configurations differ, and where what they did differs first.

The order is that in which a run comes about: update after update, of each the batch (which trajectories, in which
order), then each trajectory (its tokens, versions, log-probabilities, calls, reward), then the loss. An evaluation is
compared where it was made.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import msgspec

from ale.data.compare import first_difference
from ale.data.run_log import Logged, RunLog, flatten

TOLERANCE = 1e-6
"""Of losses, gradient norms and log-probabilities, absolutely or in proportion."""
_NAMES = {"name", "runs_dir", "record"}
# What the clock says.
_CLOCKED = frozenset({"duration_s", "started_version"})


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """`Difference(config={"seed": "0, and 1"}, updates=3, first="update 4, trajectory g9/2: tokens_T[31]: 5, and 9")`.

    `updates` are the same in both, from the first on. `first` None: neither run did anything that the other did not.
    """

    config: dict[str, str]
    updates: int
    first: str | None


def difference(a: RunLog, b: RunLog) -> Difference:
    same = 0
    first: str | None = None
    members = (_members(a), _members(b))
    batches: tuple[dict[int, list[Logged]], ...] = ({}, {})
    for one, other in zip(_lines(a), _lines(b), strict=False):
        if one.get("evaluation") != other.get("evaluation") or one.get("update") != other.get("update"):
            first = f"one run made {_what(one)}, where the other made {_what(other)}"
        elif "update" in one:
            number = int(one["update"])
            for stream, held in zip(members, batches, strict=True):
                if number not in held:
                    held.clear()
                    held.update([next(stream, (number, []))])
            first = _update(number, batches[0].get(number, []), batches[1].get(number, []), one, other)
            same += first is None
        else:
            found = first_difference(one["success"], other["success"], tolerance=TOLERANCE)
            first = None if found is None else f"{_what(one)}{found}"
        if first is not None:
            break
    else:
        lengths = [len(a.updates), len(b.updates)]
        if lengths[0] != lengths[1]:
            first = f"one run has made {lengths[0]} updates, the other {lengths[1]}; what both have made is the same"
    return Difference(config=_config(a, b), updates=same, first=first)


def _config(a: RunLog, b: RunLog) -> dict[str, str]:
    one, other = flatten(a.config), flatten(b.config)
    fields = [*one, *(field for field in other if field not in one)]
    return {
        field: f"{_plain(a.setting(field))}, and {_plain(b.setting(field))}"
        for field in fields
        if field not in _NAMES and a.setting(field) != b.setting(field)
    }


def _lines(log: RunLog) -> Iterator[dict[str, Any]]:
    yield from log.lines


def _members(log: RunLog) -> Iterator[tuple[int, list[Logged]]]:
    """What each update was trained on, in order."""
    trained = (t for t in log.logged() if t.update is not None)
    for number, batch in groupby(trained, key=lambda t: t.update):
        yield int(number or 0), list(batch)


def _update(number: int, a: list[Logged], b: list[Logged], one: dict[str, Any], other: dict[str, Any]) -> str | None:
    if found := first_difference([t.id for t in a], [t.id for t in b]):
        return f"update {number}, batch: member {found}"
    for t, u in zip(a, b, strict=True):
        if found := first_difference(t, u, tolerance=TOLERANCE, skip=_CLOCKED):
            return f"update {number}, trajectory {t.id}: {found}"
    for name in ("loss", "grad_norm"):
        if found := first_difference(one.get(name), other.get(name), tolerance=TOLERANCE):
            return f"update {number}, {name}{found}"
    return None


def _what(line: dict[str, Any]) -> str:
    return f"update {line['update']}" if "update" in line else f"evaluation {line.get('evaluation')}"


def _plain(value: Any) -> str:
    return msgspec.json.encode(value).decode()
