"""The run of `bench.chaos` that needs no sandbox: an environment of its own, embedded with `ale.open_run`."""

from __future__ import annotations

import asyncio
import random
import sys

import ale


class Slow:
    """An episode takes some milliseconds a step, more for some tasks than for others."""

    def __init__(self, task: ale.Task) -> None:
        self._random = random.Random(task.seed)

    def reset(self) -> str:
        return "Say something."

    async def step(self, action: str) -> ale.Step:
        await asyncio.sleep(self._random.expovariate(1 / 0.02))
        return ale.Step("go on", reward=float(len(action) % 2))


async def main(*, resume: bool) -> None:
    config = ale.load("runs/a" if resume else "small.toml")
    async with ale.open_run(config, environment=Slow, resume=resume) as run:
        async for _ in run.updates():
            pass


if __name__ == "__main__":
    asyncio.run(main(resume="--resume" in sys.argv))
