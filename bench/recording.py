"""What recording a run costs: a point of its loop, and a turn of the policy, in time of the processor and in bytes.

A point that is not recorded is the baseline: what the loop of every run pays. The turns are of random tokens, which
deflate badly.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

import numpy as np

from ale.data.recording import Life, Recording, read_recording
from ale.messages import Turn
from ale.tape import Blank, Tape
from ale.wire import Array
from bench.harness import benchmark

POINTS, TURNS = 5000, 500


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, benchmark("recording") as bench:
        path = Path(folder) / "recording"
        recording = Recording(path)
        recording.begin(Life(number=1, journal=0, version=0), [])
        asyncio.run(turns(recording, 1, 16))
        bench.check(
            "what is written is read", lambda: [entry.kind for entry in read_recording(path)] == ["life", "turn"]
        )
        bench.latency(
            "point",
            ours=lambda: asyncio.run(points(recording)),
            baseline=lambda: asyncio.run(points(Blank())),
            against="not recorded",
            unit="us",
        )
        for tokens in (16, 512):
            bench.latency(
                f"turn_{tokens}",
                ours=lambda tokens=tokens: asyncio.run(turns(recording, TURNS, tokens)),  # type: ignore[misc]
                baseline=None,
                against=None,
                unit="us",
            )
            before = recording.size
            asyncio.run(turns(recording, TURNS, tokens))
            print(f"a turn of {tokens} tokens takes {(recording.size - before) / TURNS:.0f} bytes")
        before = recording.size
        asyncio.run(points(recording))
        print(f"a point takes {(recording.size - before) / POINTS:.0f} bytes")
        recording.close()


async def points(tape: Tape) -> float:
    began = time.process_time()
    for _ in range(POINTS):
        await tape.reach("heard", "GroupStarted g123")
    return (time.process_time() - began) / POINTS * 1e6


async def turns(tape: Tape, count: int, tokens: int) -> float:
    rng = np.random.default_rng(0)
    logp = Array.of(-rng.exponential(size=tokens), "float32")
    turn = Turn(
        tokens_A=Array.of(rng.integers(0, 768, tokens), "int32"),
        logp_A=logp,
        logp_sampled_A=logp,
        version_A=Array.of(np.full(tokens, 7), "int32"),
        finish="stop",
    )

    async def sample() -> Turn:
        return turn

    began = time.process_time()
    for _ in range(count):
        await tape.answer("turn", "g123/4", sample, Turn)
    return (time.process_time() - began) / count * 1e6


if __name__ == "__main__":
    main()
