"""Runs that were wedged on purpose: what `ale why` says of each, and that the watchdog ends it with that."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ale.actors.reward import Reward
from ale.actors.watchdog import Watchdog
from ale.data import moment as moments
from ale.data.cause import find, report
from ale.data.moment import Moment
from ale.envs.terminal import TerminalEnv
from ale.errors import DeadlineExceeded, LearnerError, Stalled, WorkerDied
from ale.messages import Rollout, Score
from ale.process import WorkerProcess
from ale.progress import Progress
from ale.sandbox import Completed
from ale.testing.clock import VirtualClockLoop, run
from ale.testing.fakes import Play, ScriptedEnvs
from ale.testing.wedges import DeafReader, Envs, ProcessLearner, SilentSandboxes, for_ever
from ale.waiting import held_up
from ale.wire import Message

HERE = Path(__file__).parent.parent
FULL = pytest.mark.full
SILENCE_S = 120.0  # less than the deadline of a rollout


def watched(loop: Any, folder: Path, silence_s: float = SILENCE_S, **more: Any) -> Any:
    """The run, with a watchdog that writes into `folder`."""
    folder.mkdir(exist_ok=True)
    loop.stop_deadline_s = 0.5
    last = lambda: Progress(phase="train", step=len(loop.updates), total=3)  # noqa: E731
    loop.watchdog = Watchdog(
        silence_s, lambda moment: moments.write(folder, moment), last, **{"wall": wall_of_the_loop, **more}
    )
    loop.before.insert(0, loop.watchdog)
    loop.on_failure = loop.watchdog.freeze
    return loop


def wall_of_the_loop() -> float:
    """A wall clock that goes as the loop's."""
    try:
        return 1e9 + asyncio.get_running_loop().time()
    except RuntimeError:
        return 1e9


def stalls(loop: Any, folder: Path, runner: Callable[..., Any] = run) -> tuple[Stalled, Moment]:
    with pytest.raises(Stalled) as caught:
        runner(loop.run())
    moment = moments.read(folder)
    cause = find(moment)
    assert cause is not None
    # What the error says is what `ale why` says afterwards.
    assert cause.said in str(caught.value)
    assert caught.value.report == report(moment)
    return caught.value, moment


def in_sandboxes(sandboxes: SilentSandboxes, reward: Reward | None = None) -> Envs:
    """Episodes of one command in a real `TerminalEnv`, graded by a real `Reward`."""

    async def play(envs: Envs, rollout: Rollout) -> None:
        async def grade(task: Any, snapshot: Any) -> Score:
            assert reward is not None
            return await reward.ask(envs.bus, task, snapshot)

        env = TerminalEnv(rollout.task, sandboxes, grade, command_timeout_s=1e6)  # type: ignore[arg-type]
        await env.reset()
        await env.step("make tests")
        await env.score()

    return Envs(play)


def test_a_sandbox_that_never_answers_is_named_with_its_task_and_its_command(loop: Any, tmp_path: Path) -> None:
    it = watched(loop(), tmp_path)
    it.envs = in_sandboxes(SilentSandboxes(tmp_path, "exec", answer=Completed(exit_code=0)))
    error, moment = stalls(it, tmp_path)
    assert "the end of a command in the sandbox of t" in str(error)
    assert "'make tests'" in str(error)
    assert "Nothing was finished for 2 min" in str(error)
    cause = find(moment)
    assert cause is not None
    assert "its time-out" in cause.release
    # From the trainer down to the command, link by link.
    who = [link.who.split("/")[0].split(" ")[0] for link in cause.chain]
    assert (who[:2], who[-1]) == (["trainer", "buffer"], "envs")
    assert cause.chain[0].waited_s == pytest.approx(SILENCE_S, abs=5)


def test_tests_that_hang_are_named_with_their_task(loop: Any, tmp_path: Path, monkeypatch: Any) -> None:
    it = watched(loop(), tmp_path)
    sandboxes = SilentSandboxes(tmp_path, "run", answer=Completed(exit_code=0))
    reward = Reward(sandboxes, concurrency=4)  # type: ignore[arg-type]
    monkeypatch.setattr("ale.actors.reward._QUEUE_DEADLINE_S", 1e6)
    it.envs = in_sandboxes(sandboxes, reward)
    it.before.append(reward)
    error, moment = stalls(it, tmp_path)
    assert "reward/" in str(error)
    assert "waits for the end of the tests of t" in str(error)
    cause = find(moment)
    assert cause is not None
    assert any("the answer of actor 'reward' to Grade" in link.what for link in cause.chain)


def test_a_full_mailbox_is_named_with_what_keeps_its_reader(loop: Any, tmp_path: Path) -> None:
    class Line(Message, frozen=True):
        pass

    it = watched(loop(), tmp_path)
    it.before.append(DeafReader())

    async def always(envs: Envs, rollout: Rollout) -> None:
        while True:
            await envs.bus.tell("reader", Line(), deadline_s=1e6)

    it.envs = Envs(always)
    error, _ = stalls(it, tmp_path)
    assert "the inbox of actor 'reader' is full, since reader has waited in one place" in str(error)
    assert "testing/wedges.py" in str(error)


def test_a_lost_reply_is_named_by_where_it_is_waited_for(loop: Any, tmp_path: Path) -> None:
    async def play(envs: Envs, rollout: Rollout) -> None:
        await for_ever()

    it = watched(loop(), tmp_path)
    it.envs = Envs(play)
    error, _ = stalls(it, tmp_path)
    assert "envs/" in str(error)
    assert "waited in one place" in str(error)
    assert "in for_ever" in str(error)


def real(work: Any) -> Any:
    return asyncio.run(work)


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], WorkerProcess]:
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setattr("ale.data.cause.LATE_S", 1.5)
    env = {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    return lambda name: WorkerProcess("echo_worker", error=LearnerError, env=env, name=name)


@pytest.mark.parametrize(
    "how", ["stopped", pytest.param("at one step", marks=FULL), pytest.param("its answer was lost", marks=FULL)]
)
def test_an_engine_that_is_stuck_is_named_with_how(loop: Any, tmp_path: Path, echo: Any, how: str) -> None:
    from echo_worker import Echo, Ignore, Stall

    async def scenario(it: Any) -> None:
        async with echo("engine") as worker:
            await worker.ask(Echo(text="up"), deadline_s=30)

            async def play(envs: Envs, rollout: Rollout) -> None:
                await worker.ask(Stall() if how == "at one step" else Ignore(), deadline_s=1e6)

            it.envs = Envs(play)
            if how == "stopped":
                os.kill(worker.pid, signal.SIGSTOP)
            await it.run()

    it = watched(loop(), tmp_path, 7.0 if "lost" in how else 3.0)
    with pytest.raises(Stalled) as caught:
        asyncio.run(scenario(it))
    said = {
        "stopped": "is stopped, by SIGSTOP or a debugger",
        "at one step": "is at one Stall for",
        "its answer was lost": "a request or its answer was lost",
    }[how]
    assert said in str(caught.value)
    assert "process engine (pid" in str(caught.value)


@pytest.mark.parametrize("how", [pytest.param("stopped", marks=FULL), "killed"])
def test_a_dead_learner_is_named(loop: Any, tmp_path: Path, echo: Any, how: str) -> None:
    from echo_worker import Echo, Stall

    async def scenario(it: Any) -> None:
        async with echo("learner") as worker:
            await worker.ask(Echo(text="up"), deadline_s=30)
            it.learner = ProcessLearner(worker, Stall())
            it.learner.steps, it.check = [], lambda: None
            it.envs = ScriptedEnvs(lambda r: Play(reward=float(r.id[-1]), latency_s=0.01), it.policy)
            os.kill(worker.pid, signal.SIGSTOP)
            if how == "killed":
                asyncio.get_running_loop().call_later(2.5, os.kill, worker.pid, signal.SIGKILL)
            await it.run()

    it = watched(loop(), tmp_path, 4.0)
    with pytest.raises(Stalled if how == "stopped" else WorkerDied) as caught:
        asyncio.run(scenario(it))
    if how == "stopped":
        assert "process learner (pid" in str(caught.value)
        assert "is stopped" in str(caught.value)
    else:  # an error by itself: the run has ended before the watchdog had to
        moment = moments.read(tmp_path)
        assert moment.ended.startswith("WorkerDied: the worker echo_worker ended (exit code -9)")
        assert "process learner" in report(moment)


def test_a_full_disk_is_named_in_the_room_that_the_file_still_has(
    loop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = watched(loop(), tmp_path)
    it.envs = in_sandboxes(SilentSandboxes(tmp_path, "exec", answer=Completed(exit_code=0)))

    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def later(_: Any) -> None:
        await asyncio.sleep(100)
        monkeypatch.setattr(Path, "write_bytes", full)
        await asyncio.sleep(1e6)

    with pytest.raises(Stalled):
        run(it.run(later))
    moment = moments.read(tmp_path)
    assert moment.silent_s == pytest.approx(SILENCE_S, abs=2)
    assert "sandbox of t" in report(moment)


def test_a_disk_that_takes_no_moment_is_told_of_and_does_not_end_the_run(loop: Any, tmp_path: Path) -> None:
    def full(moment: Moment) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    it = loop()
    watchdog = Watchdog(SILENCE_S, full)
    it.before.append(watchdog)
    run(it.run())
    assert len(it.updates) == 3
    assert "No space left on device" in watchdog._disk


def test_a_clock_that_jumps_ends_no_run_and_is_named_when_deadlines_passed_by_it(loop: Any, tmp_path: Path) -> None:
    async def jump(it: Any) -> None:
        clock = asyncio.get_running_loop()
        assert isinstance(clock, VirtualClockLoop)
        await asyncio.sleep(it.jump_at)
        clock.now += 10_000
        await asyncio.sleep(1e6)

    well = watched(loop(latency_s=lambda update: 100.0), tmp_path / "well")
    well.jump_at = 50.0  # no rollout is under way

    async def until_done(it: Any) -> None:
        jumping = asyncio.create_task(jump(it))
        while len(it.updates) < 3:
            await asyncio.sleep(1.0)
        jumping.cancel()

    run(well.run(until_done))
    assert "the clock jumped by 2.8 h" in report(moments.read(tmp_path / "well"))

    slow = watched(loop(lambda r: Play(latency_s=100.0)), tmp_path / "slow")
    slow.jump_at = 2.5
    with pytest.raises(DeadlineExceeded):
        run(slow.run(jump))
    moment = moments.read(tmp_path / "slow")
    assert moment.ended.startswith("DeadlineExceeded")
    assert "the clock jumped by 2.8 h between two beats" in report(moment)


def test_a_wall_clock_that_is_set_moves_no_deadline_and_is_told_of(loop: Any, tmp_path: Path) -> None:
    it = loop(lambda r: Play(reward=float(r.id[-1]), latency_s=5.0))

    def wall() -> float:
        return wall_of_the_loop() - (3600 if wall_of_the_loop() > 1e9 + 7 else 0)

    watched(it, tmp_path, wall=wall)
    run(it.run())
    assert len(it.updates) == 3
    assert "the wall clock was set back by 60 min" in report(moments.read(tmp_path))


def test_a_held_event_loop_is_named_by_the_line_that_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from ale.bus import Bus
    from ale.supervisor import Supervisor

    monkeypatch.setattr("ale.actors.watchdog._LATE_S", 0.5)
    monkeypatch.setattr("ale.actors.watchdog.BEAT_S", 0.1)
    told, over = list[str](), threading.Event()

    def end(said: str) -> None:
        told.append(said)
        over.set()

    async def scenario() -> None:
        async with Supervisor(Bus()) as supervisor:
            await supervisor.start(Watchdog(1.0, lambda m: moments.write(tmp_path, m), stuck=end))
            await asyncio.sleep(0.3)
            over.wait(20)

    asyncio.run(scenario())
    assert "the event loop of the controller has not turned" in told[0]
    assert "test_why.py" in told[0]
    assert "in scenario" in told[0]


def test_a_process_that_was_stopped_is_not_taken_for_a_held_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After SIGCONT the thread may look before the event loop has turned."""
    monkeypatch.setattr("ale.actors.watchdog.BEAT_S", 0.01)
    told = list[str]()
    watchdog = Watchdog(5.0, lambda moment: None, stuck=told.append)
    looks, jumps = 0, iter((0.0, 0.01, 3600.0, 3600.01, 3600.02))

    def wait(timeout: float) -> bool:
        nonlocal looks
        looks += 1
        return looks > 4

    monkeypatch.setattr(watchdog._over, "wait", wait)
    monkeypatch.setattr("ale.actors.watchdog.time", SimpleNamespace(monotonic=lambda: next(jumps)))
    watchdog._guard(0)
    assert told == []


def test_a_run_that_is_held_up_rightly_is_not_silent(loop: Any, tmp_path: Path) -> None:
    it = watched(loop(), tmp_path)
    plain = it._after

    async def after(update: Any) -> None:
        with held_up("whoever embeds the run", release="their asking"):
            await asyncio.sleep(1.2 * SILENCE_S)
        await plain(update)

    it._after = after
    run(it.run())
    assert len(it.updates) == 3
