"""Where two values of the same kind differ first: the field, the place, both sides."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np

from ale.wire import Array

_SHOWN = 80


def first_difference(old: Any, new: Any, *, tolerance: float = 0.0, skip: frozenset[str] = frozenset()) -> str | None:
    """`"trajectory.tokens_T[17]: 5, and 9"`; None where they agree. Numbers may differ by `tolerance`, absolutely or in
    proportion, whichever is more; a field whose name is in `skip` may be anything."""
    return _differ(old, new, "", tolerance, skip)


def _differ(old: Any, new: Any, place: str, tolerance: float, skip: frozenset[str]) -> str | None:
    if isinstance(old, Array) and isinstance(new, Array):
        return _arrays_differ(old, new, place)
    if isinstance(old, msgspec.Struct) and type(old) is type(new):
        old, new = ({n: getattr(value, n) for n in value.__struct_fields__} for value in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            if name in skip:
                continue
            inner = f"{place}.{name}" if place else str(name)
            if name not in old or name not in new:
                return f"{inner}: {_short(old.get(name))}, and {_short(new.get(name))}"
            if (found := _differ(old[name], new[name], inner, tolerance, skip)) is not None:
                return found
        return None
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        for number, (a, b) in enumerate(zip(old, new, strict=False)):
            if (found := _differ(a, b, f"{place}[{number}]", tolerance, skip)) is not None:
                return found
        return None if len(old) == len(new) else f"{place}: {len(old)} of them, and {len(new)}"
    return None if _same(old, new, tolerance) else f"{place}: {_short(old)}, and {_short(new)}"


def _arrays_differ(old: Array, new: Array, place: str) -> str | None:
    a, b = old.numpy(), new.numpy()
    if a.shape != b.shape:
        return f"{place}: of shape {a.shape}, and {b.shape}"
    # Bit for bit, so that what is no number equals itself.
    if old.data == new.data and old.dtype == new.dtype:
        return None
    apart = np.argwhere(~((a == b) | ((a != a) & (b != b))))
    if not len(apart):
        return None
    where = tuple(int(n) for n in apart[0])
    return f"{place}[{', '.join(map(str, where))}]: {a[where]}, and {b[where]}"


def _same(old: Any, new: Any, tolerance: float) -> bool:
    if isinstance(old, float) and isinstance(new, float | int):
        return math.isclose(old, new, rel_tol=tolerance, abs_tol=tolerance) or (math.isnan(old) and math.isnan(new))
    return bool(old == new)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
