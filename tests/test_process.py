import asyncio
import contextlib
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import ale.process
from ale.errors import DeadlineExceeded, LearnerError, WorkerDied
from ale.process import WorkerProcess

HERE = Path(__file__).parent
ENV = {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent / 'src'}"}


@pytest.fixture(autouse=True)
def _import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


def worker() -> WorkerProcess:
    return WorkerProcess("echo_worker", error=LearnerError, env=ENV)


def run(scenario: Any) -> None:
    """A real loop: what these tests wait for is a process. Nothing may be left running in it."""

    async def guarded() -> None:
        async with asyncio.timeout(30):
            await scenario()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(guarded())


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


async def until_gone(pid: int) -> None:
    async with asyncio.timeout(10):
        while alive(pid):
            await asyncio.sleep(0.01)


def test_a_worker_answers_and_ends_with_its_context() -> None:
    from echo_worker import Echo

    async def scenario() -> None:
        async with worker() as w:
            answers = await asyncio.gather(*(w.ask(Echo(text=str(i)), deadline_s=10) for i in range(50)))
            assert [a.text for a in answers] == [str(i) for i in range(50)]
            pid = w.pid
        assert not alive(pid)
        with pytest.raises(WorkerDied, match=r"exit code 0"):
            await w.ask(Echo(text="too late"), deadline_s=10)

    run(scenario)


def test_frames_of_ten_megabytes_travel_both_ways() -> None:
    from echo_worker import Echo

    data = os.urandom(10_000_000)

    async def scenario() -> None:
        async with worker() as w:
            for _ in range(2):
                assert (await w.ask(Echo(text="big", data=data), deadline_s=20)).data == data

    run(scenario)


def test_what_the_work_raised_arrives_as_the_workers_error_and_the_worker_serves_on() -> None:
    from echo_worker import Echo, Raise

    async def scenario() -> None:
        async with worker() as w:
            with pytest.raises(LearnerError, match=r"KeyError: 'nothing there'"):
                await w.ask(Raise(text="nothing there"), deadline_s=10)
            assert (await w.ask(Echo(text="on"), deadline_s=10)).text == "on"

    run(scenario)


def test_a_late_answer_misses_its_deadline_and_disturbs_nobody() -> None:
    from echo_worker import Echo, Ignore

    async def scenario() -> None:
        async with worker() as w:
            await w.ask(Echo(text="up"), deadline_s=10)
            with pytest.raises(DeadlineExceeded, match=r"Ignore to echo_worker: no answer within 0\.05 s"):
                await w.ask(Ignore(), deadline_s=0.05)
            assert (await w.ask(Echo(text="a"), deadline_s=10)).text == "a"
            assert (await w.ask(Echo(text="b"), deadline_s=10)).text == "b"

    run(scenario)


def test_a_cancelled_ask_is_forgotten() -> None:
    from echo_worker import Echo, Ignore

    async def scenario() -> None:
        async with worker() as w:
            asked = asyncio.create_task(w.ask(Ignore(), deadline_s=10))
            await w.ask(Echo(text="taken"), deadline_s=10)
            asked.cancel()
            await asyncio.wait({asked})
            again = asyncio.create_task(w.ask(Ignore(), deadline_s=10))
            await asyncio.sleep(0)
            again.cancel()
            with pytest.raises(asyncio.CancelledError):
                await again
            assert (await w.ask(Echo(text="on"), deadline_s=10)).text == "on"
            assert not w._pending

    run(scenario)


def test_a_killed_worker_fails_every_ask_with_its_last_words() -> None:
    from echo_worker import Echo, Ignore, Print

    async def scenario() -> None:
        async with worker() as w:
            await w.ask(Print(text="out of luck\n"), deadline_s=10)
            asks = [asyncio.create_task(w.ask(Ignore(), deadline_s=10)) for _ in range(3)]
            await asyncio.sleep(0)
            os.kill(w.pid, signal.SIGKILL)
            for ask in asks:
                with pytest.raises(WorkerDied, match=r"(?s)exit code -9.*out of luck"):
                    await ask
            with pytest.raises(WorkerDied, match="out of luck"):
                await w.ask(Echo(text="anyone?"), deadline_s=10)

    run(scenario)


def test_what_a_worker_prints_just_before_it_ends_is_in_the_error() -> None:
    from echo_worker import Exit

    async def scenario() -> None:
        for code in (3, 4, 5):
            async with worker() as w:
                with pytest.raises(WorkerDied, match=rf"(?s)exit code {code}.*I meant to go"):
                    await w.ask(Exit(code=code), deadline_s=10)

    run(scenario)


def test_a_module_that_is_not_there_says_so() -> None:
    from echo_worker import Echo

    async def scenario() -> None:
        async with WorkerProcess("no_such_worker", error=LearnerError, env=ENV) as w:
            with pytest.raises(WorkerDied, match=r"(?s)exit code 1.*No module named no_such_worker"):
                await w.ask(Echo(text="hello"), deadline_s=10)

    run(scenario)


def test_a_line_without_end_does_not_block_the_worker() -> None:
    from echo_worker import Exit, Print

    async def scenario() -> None:
        async with worker() as w:
            await w.ask(Print(text="x" * 1000, times=1000), deadline_s=10)  # far beyond the pipe and a line's limit
            await w.ask(Print(text="the end\n"), deadline_s=10)
            with pytest.raises(WorkerDied, match="the end") as caught:
                await w.ask(Exit(code=0), deadline_s=10)
            assert len(str(caught.value)) < 10_000

    run(scenario)


@pytest.mark.parametrize(
    "data",
    [
        b"",  # the header is right, the body is not msgpack
        struct.pack("<IQB", 3, 1, 77) + b"abc",
        struct.pack("<IQB", 0xFFFFFFFF, 1, 1),
        b"Traceback (most recent call last):\n",
    ],
    ids=["body", "kind", "length", "text"],
)
def test_bytes_that_are_no_answer_fail_the_asks_and_end_the_worker(data: bytes) -> None:
    from echo_worker import Echo, Garble

    async def scenario() -> None:
        async with worker() as w:
            with pytest.raises(WorkerDied, match="what it sent is no answer"):
                await w.ask(Garble(data=data), deadline_s=10)
            await until_gone(w.pid)
            with pytest.raises(WorkerDied, match="what it sent is no answer"):
                await w.ask(Echo(text="on"), deadline_s=10)

    run(scenario)


def test_a_stuck_worker_is_killed_when_its_context_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from echo_worker import Echo, Stall

    monkeypatch.setattr(ale.process, "_GRACE_S", 0.2)

    async def scenario() -> None:
        async with worker() as w:
            await w.ask(Echo(text="up"), deadline_s=10)
            stuck = asyncio.create_task(w.ask(Stall(), deadline_s=60))
            # More than the socket holds: the parent's transport is left with bytes it cannot send.
            more = asyncio.create_task(w.ask(Echo(text="", data=bytes(5_000_000)), deadline_s=60))
            await asyncio.sleep(0.05)
            pid = w.pid
        assert not alive(pid)
        for ask in (stuck, more):
            with pytest.raises(WorkerDied):
                await ask

    run(scenario)


def test_cancellation_while_leaving_kills_the_worker_at_once() -> None:
    from echo_worker import Echo, Stall

    async def scenario() -> None:
        pid = 0
        leaving = asyncio.Event()

        async def use() -> None:
            nonlocal pid
            async with worker() as w:
                await w.ask(Echo(text="up"), deadline_s=10)
                with pytest.raises(DeadlineExceeded):
                    await w.ask(Stall(), deadline_s=0.01)
                pid = w.pid
                leaving.set()

        started = time.monotonic()
        task = asyncio.create_task(use())
        await leaving.wait()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - started < 4  # the grace is 5
        assert not alive(pid)

    run(scenario)


def test_an_error_in_the_body_passes_through() -> None:
    async def scenario() -> None:
        with pytest.raises(ZeroDivisionError):
            async with worker() as w:
                pid = w.pid
                _ = 1 / 0
        assert not alive(pid)

    run(scenario)


def test_a_worker_that_cannot_be_started_leaves_nothing_open() -> None:
    async def scenario() -> None:
        with pytest.raises(OSError):
            async with WorkerProcess("echo_worker", error=LearnerError, env=ENV, pass_fds=(987_654,)):
                pass

    with contextlib.suppress(OSError):
        os.close(987_654)
    run(scenario)


PARENT = """
import asyncio, sys
from echo_worker import Echo, Stall
from ale.errors import LearnerError
from ale.process import WorkerProcess

async def main():
    async with WorkerProcess("echo_worker", error=LearnerError) as w:
        await w.ask(Echo(text="up"), deadline_s=10)
        asyncio.get_running_loop().call_later(0.05, lambda: print(w.pid, flush=True))
        await w.ask(Stall(), deadline_s=600)

asyncio.run(main())
"""


def test_killing_the_parent_ends_a_worker_in_the_middle_of_its_work() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=os.environ | ENV)
    assert parent.stdout is not None
    with parent, parent.stdout:
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    asyncio.run(until_gone(pid))
