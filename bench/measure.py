"""Time and memory of one call, on CPU and CUDA."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def milliseconds(call: Callable[[], object], *, budget_s: float = 0.5, most: int = 50) -> float:
    """Median over as many calls as fit the budget, after one that is not counted unless it alone used it up."""
    first = _once(call)
    if first > budget_s:
        return first * 1e3
    repeats = max(1, min(most, int(budget_s / max(first, 1e-6))))
    return statistics.median(_once(call) for _ in range(repeats)) * 1e3


def _once(call: Callable[[], object]) -> float:
    if DEVICE.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    # one thread: its processor time, so that what else runs on the machine does not count
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


def peak_mib(call: Callable[[], object]) -> float:
    """Memory in use at the worst moment of the call beyond what was in use before it, results included."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # gives back what the allocator keeps, which the call would use unseen
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _status_kib("VmRSS")
    result = call()
    peak = _status_kib("VmHWM")
    del result
    return (peak - before) / 1024


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
