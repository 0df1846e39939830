"""Admission and warm sandboxes, on an engine that only counts; and once on the real ones."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from ale.errors import DeadlineExceeded, SandboxBusy, SandboxError
from ale.sandbox import Capacity, Command, Completed, Limits, Pool, SandboxEngine, SandboxSpec, open_pool

WAIT_S = 30.0


class Counted:
    def __init__(self, spec: SandboxSpec) -> None:
        self.spec, self.label, self.well = spec, spec.label, True

    async def ping(self, *, deadline_s: float = 5.0) -> None:
        if not self.well:
            raise SandboxError("broken")

    def assign(self, label: str) -> None:
        self.label = label


class CountingEngine:
    """Starts nothing, and knows how many of it would be alive."""

    scratch = Path("/nowhere")

    def __init__(self) -> None:
        self.alive: list[Counted] = []
        self.peak = self.started = 0
        self.failing = self.sticking = False

    @asynccontextmanager
    async def start(self, spec: SandboxSpec) -> AsyncIterator[Counted]:
        await asyncio.sleep(0)
        if self.failing:
            raise SandboxError("it does not start")
        sandbox = Counted(spec)
        self.alive.append(sandbox)
        self.started += 1
        self.peak = max(self.peak, len(self.alive))
        try:
            yield sandbox
        finally:
            self.alive.remove(sandbox)
            if self.sticking:
                raise SandboxError("it does not close")

    async def run(self, spec: SandboxSpec, command: Command) -> Completed:
        async with self.start(spec):
            return Completed(exit_code=0)


@asynccontextmanager
async def pooled(capacity: Capacity, **settings: Any) -> AsyncIterator[tuple[CountingEngine, Pool]]:
    engine = CountingEngine()
    async with open_pool(engine, capacity, pause_s=0, **settings) as pool:  # type: ignore[arg-type]
        yield engine, pool
    assert engine.alive == []


async def turns(until: Callable[[], bool]) -> None:
    for _ in range(1000):
        if until():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came to that")


async def test_no_more_are_alive_than_the_capacity_allows() -> None:
    async with pooled(Capacity(count=3), max_warm=0) as (engine, pool):

        async def use(number: int) -> None:
            async with pool.start(SandboxSpec(label=f"run/{number}")):
                await asyncio.sleep(0)

        await asyncio.gather(*(use(number) for number in range(20)))
        assert engine.peak == 3
        assert engine.started == 20
        assert pool.pool_statistics().used.count == 0


@pytest.mark.parametrize(
    ("capacity", "limits"),
    [
        (Capacity(memory_mb=1000), Limits(memory_mb=500)),
        (Capacity(pids=100), Limits(pids=50)),
        (Capacity(cpus=4), Limits(cpus=2)),
        (Capacity(cpus=2), Limits()),
    ],
)
async def test_each_resource_is_counted(capacity: Capacity, limits: Limits) -> None:
    async with pooled(capacity, max_warm=0, deadline_s=0.02) as (engine, pool), AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(pool.start(SandboxSpec(limits=limits)))
        with pytest.raises(DeadlineExceeded, match="place for a sandbox"):
            await stack.enter_async_context(pool.start(SandboxSpec(limits=limits)))
        assert pool.pool_statistics().expired == 1
        assert len(engine.alive) == 2


async def test_what_never_fits_and_what_is_too_many_is_refused_at_once() -> None:
    async with pooled(Capacity(count=1, memory_mb=600), max_warm=0, max_waiting=1) as (_, pool):
        with pytest.raises(SandboxBusy, match="memory_mb 700 never fits"):
            async with pool.start(SandboxSpec(limits=Limits(memory_mb=700))):
                pass
        async with pool.start(SandboxSpec()):
            waiting = asyncio.ensure_future(pool.run(SandboxSpec(), Command(shell="true")))
            await turns(lambda: pool.pool_statistics().waiting == 1)
            with pytest.raises(SandboxBusy, match="1 wait"):
                await pool.run(SandboxSpec(), Command(shell="true"))
        assert (await waiting).ok
        assert pool.pool_statistics().refused == 2


async def test_runs_take_turns_and_a_large_one_is_not_overtaken() -> None:
    order: list[str] = []
    async with pooled(Capacity(count=8, memory_mb=1000), max_warm=0) as (_, pool):

        async def use(label: str, memory_mb: int) -> None:
            async with pool.start(SandboxSpec(label=label, limits=Limits(memory_mb=memory_mb))):
                order.append(label)
                await asyncio.sleep(0)

        async with pool.start(SandboxSpec(limits=Limits(memory_mb=1000))):
            tasks = []
            for label, memory_mb in (("a/1", 1000), ("a/2", 1000), ("a/3", 1000), ("b/1", 1000), ("c/1", 1)):
                tasks.append(asyncio.ensure_future(use(label, memory_mb)))
                await turns(lambda: pool.pool_statistics().waiting == len(tasks))
        await asyncio.gather(*tasks)
    assert order == ["a/1", "b/1", "c/1", "a/2", "a/3"]


async def test_a_caller_that_gives_up_leaves_the_queue() -> None:
    async with pooled(Capacity(count=1), max_warm=0) as (engine, pool):
        async with pool.start(SandboxSpec()):
            waiting = [asyncio.ensure_future(pool.run(SandboxSpec(), Command(shell="true"))) for _ in range(3)]
            await turns(lambda: pool.pool_statistics().waiting == 3)
            waiting[0].cancel()
            await asyncio.wait(waiting[:1])
            assert pool.pool_statistics().waiting == 2
        assert all([(await task).ok for task in waiting[1:]])
        assert engine.started == 3


async def test_what_was_taken_lately_is_kept_warm_and_given_out_once() -> None:
    async with pooled(Capacity(count=10), max_warm=2) as (engine, pool):
        seen = []
        for number in range(4):
            async with pool.start(SandboxSpec(label=f"run/{number}")) as sandbox:
                assert sandbox.label == f"run/{number}"
                seen.append(sandbox)
            await turns(lambda number=number: pool.pool_statistics().warm == min(2, number + 1))
        assert len(set(map(id, seen))) == 4
        assert pool.pool_statistics().hits == 3
        assert pool.pool_statistics().used.count == 2
        async with pool.start(SandboxSpec(env={"A": "other"})):
            assert pool.pool_statistics().hits == 3
        assert len(engine.alive) >= 2


async def test_warm_ones_make_room_for_whoever_waits() -> None:
    async with pooled(Capacity(count=2), max_warm=2, deadline_s=WAIT_S) as (_, pool):
        async with pool.start(SandboxSpec()):
            pass
        await turns(lambda: pool.pool_statistics().warm > 0)
        async with pool.start(SandboxSpec(env={"A": "1"})), pool.start(SandboxSpec(env={"A": "2"})):
            assert pool.pool_statistics().used.count == 2


async def test_a_broken_warm_one_is_replaced_and_a_broken_used_one_is_told() -> None:
    async with pooled(Capacity(count=4), max_warm=1) as (engine, pool):
        async with pool.start(SandboxSpec()):
            pass
        await turns(lambda: pool.pool_statistics().warm == 1)
        engine.alive[0].well = False
        with pytest.raises(SandboxError, match="told"):
            async with pool.start(SandboxSpec()) as sandbox:
                assert sandbox.well
                raise SandboxError("the user is told")
        assert pool.pool_statistics().broken == 2


async def test_idle_ones_are_pinged_and_cooled() -> None:
    async with pooled(Capacity(count=4), max_warm=1, memory_s=0.2) as (engine, pool):
        async with pool.start(SandboxSpec()):
            pass
        await turns(lambda: pool.pool_statistics().warm == 1)
        async with asyncio.timeout(WAIT_S):
            while engine.alive:  # nobody asks any more
                await asyncio.sleep(0.01)
        assert pool.pool_statistics().warm == 0


async def test_a_warm_one_that_does_not_close_is_counted_and_the_pool_goes_on() -> None:
    async with pooled(Capacity(count=1), max_warm=1) as (engine, pool):
        async with pool.start(SandboxSpec(env={"A": "1"})):
            pass
        await turns(lambda: pool.pool_statistics().warm == 1)
        engine.sticking = True
        async with pool.start(SandboxSpec(env={"A": "2"})):  # for which the warm one makes room
            engine.sticking = False
            assert pool.pool_statistics().broken == 1
            assert pool.pool_statistics().used.count == 1
        await turns(lambda: pool.pool_statistics().warm == 1)


async def test_a_start_that_fails_gives_its_place_back() -> None:
    async with pooled(Capacity(count=1), max_warm=1) as (engine, pool):
        engine.failing = True
        for _ in range(3):
            with pytest.raises(SandboxError, match="does not start"):
                async with pool.start(SandboxSpec()):
                    pass
        engine.failing = False
        async with pool.start(SandboxSpec()):
            pass


async def test_a_pool_on_a_real_engine_hands_out_clean_labelled_sandboxes(local: SandboxEngine) -> None:
    async with open_pool(local, Capacity(count=4), max_warm=1) as pool:
        for number in range(3):
            async with pool.start(SandboxSpec(label=f"run/{number}")) as sandbox:
                assert f"run/{number}" in sandbox.id
                assert (await sandbox.exec(Command(shell="ls; touch used"))).stdout == b""
            async with asyncio.timeout(WAIT_S):
                while not pool.pool_statistics().warm:
                    await asyncio.sleep(0.005)
        assert pool.pool_statistics().hits == 2
        (idle,) = (kept for template in pool._templates.values() for kept in template.idle)
        for pid in rocklets_of(local, (await idle.value()).id):
            os.kill(pid, signal.SIGKILL)
        async with pool.start(SandboxSpec(label="run/9")) as sandbox:
            assert (await sandbox.exec(Command(shell="echo well"))).stdout == b"well\n"
        assert pool.pool_statistics().broken == 1
    assert local.statistics().alive == 0


def rocklets_of(engine: SandboxEngine, name: str) -> list[int]:
    upper = f"{engine.capabilities()['state']}/boxes/{name}.0/upper"
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            ours = (entry / "cmdline").read_bytes().startswith(b"/.rocklet")
            if ours and upper in (entry / "mountinfo").read_text():
                found.append(int(entry.name))
    return found
