"""Ordered, bounded, and nobody waits for the dead."""

import asyncio
import inspect
import logging
from typing import Any

import pytest

from ale.actor import Actor
from ale.bus import Bus
from ale.errors import ActorError, ActorStopped, DeadlineExceeded
from ale.supervisor import Restart, Supervisor
from ale.testing.clock import run
from ale.wire import Message, Request


class Job(Message, frozen=True):
    takes_s: float = 0.0


class Receipt(Message, frozen=True):
    pass


class Order(Request[Receipt], frozen=True):
    takes_s: float = 0.0


class Clerk(Actor):
    def __init__(self, name: str = "clerk", *, log: list[str] | None = None, concurrency: int = 1) -> None:
        super().__init__(name, capacity=16, concurrency=concurrency)
        self.log = [] if log is None else log
        self.done: list[float] = []

    async def started(self) -> None:
        self.log.append(f"{self.name} started")

    async def receive(self, message: Message) -> Any:
        match message:
            case Job(takes_s=takes_s):
                if takes_s < 0:
                    raise ValueError("a bad job")
                await asyncio.sleep(takes_s)
                self.done.append(takes_s)
            case Order(takes_s=takes_s):
                await asyncio.sleep(takes_s)
                return Receipt()

    async def stopped(self) -> None:
        self.log.append(f"{self.name} stopped")


async def settle() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


def now() -> float:
    return asyncio.get_running_loop().time()


def tasks_left() -> int:
    return len(asyncio.all_tasks()) - 1


def test_actors_start_in_order_and_stop_in_reverse_each_before_the_next():
    async def scenario():
        log: list[str] = []

        class Slow(Clerk):
            async def stopped(self) -> None:
                await asyncio.sleep(1)
                await super().stopped()

        async with Supervisor(Bus()) as supervisor:
            for name in "abc":
                await supervisor.start(Slow(name, log=log))
        assert log == ["a started", "b started", "c started", "c stopped", "b stopped", "a stopped"]
        assert now() == 3
        assert tasks_left() == 0

    run(scenario())


def test_an_actor_that_is_stopped_first_handles_what_is_in_its_inbox():
    async def scenario():
        bus = Bus()
        clerk = Clerk()
        async with Supervisor(bus) as supervisor:
            await supervisor.start(clerk)
            for takes_s in (1, 2, 3):
                await bus.tell("clerk", Job(takes_s=takes_s), deadline_s=1)
            order = asyncio.create_task(bus.ask("clerk", Order(), deadline_s=60))
            await settle()
        assert clerk.done == [1, 2, 3]
        assert await order == Receipt()

    run(scenario())


def test_what_is_not_finished_by_the_stop_deadline_is_cancelled_named_and_accounted_for(caplog):
    async def scenario():
        bus = Bus()
        clerk = Clerk()
        async with Supervisor(bus, stop_deadline_s=5) as supervisor:
            await supervisor.start(clerk)
            asks = [asyncio.create_task(bus.ask("clerk", Order(takes_s=60), deadline_s=600)) for _ in range(2)]
            await settle()
            for _ in range(2):
                await bus.tell("clerk", Job(), deadline_s=1)
        assert now() == 5
        for ask, what in zip(asks, ("stopped while it had Order in hand", "has ended"), strict=True):
            with pytest.raises(ActorStopped, match=what):
                await ask
        assert bus.statistics().actors["clerk"].dropped == {"stopped": 4}
        assert clerk.log == ["clerk started", "clerk stopped"]
        assert tasks_left() == 0

    with caplog.at_level(logging.WARNING):
        run(scenario())
    assert "actor 'clerk' did not finish within 5 s of its stop and was cancelled; in hand: Order" in caplog.text
    assert "in its inbox: 3" in caplog.text


def test_a_sender_held_by_an_actor_that_is_stopped_gets_an_error():
    async def scenario():
        bus = Bus()
        async with Supervisor(bus, stop_deadline_s=5) as supervisor:
            await supervisor.start(Clerk())
            await bus.tell("clerk", Job(takes_s=60), deadline_s=1)
            await settle()
            while bus.try_tell("clerk", Job()):
                pass
            held = asyncio.create_task(bus.tell("clerk", Job(), deadline_s=600))
            await settle()
        with pytest.raises(ActorStopped, match="actor 'clerk' has ended"):
            await held

    run(scenario())


def test_a_handler_that_ignores_its_cancellation_handles_no_further_message():
    async def scenario():
        class Stubborn(Clerk):
            async def receive(self, message: Message) -> Any:
                try:
                    await super().receive(message)
                except asyncio.CancelledError:
                    self.log.append("ignored")

        bus = Bus()
        stubborn = Stubborn()
        async with Supervisor(bus, stop_deadline_s=5) as supervisor:
            await supervisor.start(stubborn)
            for takes_s in (60, 0, 0):
                await bus.tell("clerk", Job(takes_s=takes_s), deadline_s=1)
            await settle()
        assert stubborn.log == ["clerk started", "ignored", "clerk stopped"]
        assert bus.statistics().actors["clerk"].dropped == {"stopped": 2}

    run(scenario())


def test_a_task_that_does_not_end_is_named_and_does_not_hold_up_the_others():
    async def scenario():
        release = asyncio.Event()

        class Zombie(Clerk):
            async def run(self) -> None:
                while not release.is_set():
                    try:
                        await release.wait()
                    except asyncio.CancelledError:
                        self.log.append("not yet")

        bus = Bus()
        other = Clerk("other")
        with pytest.raises(DeadlineExceeded, match="the end of the cancelled tasks 'zombie/run'") as caught:
            async with Supervisor(bus, stop_deadline_s=5) as supervisor:
                await supervisor.start(other)
                await supervisor.start(Zombie("zombie"), restart=Restart(budget=9, window_s=60))
                await settle()
        assert "in actor 'zombie'" in caught.value.__notes__
        assert other.log == ["other started", "other stopped"]
        assert bus.statistics().actors["zombie"].restarts == 0, "its successor must not meet it"
        release.set()
        await settle()
        assert tasks_left() == 0

    run(scenario())


def test_a_stopped_hook_that_takes_too_long_is_named():
    async def scenario():
        class Slow(Clerk):
            async def stopped(self) -> None:
                await asyncio.sleep(1000)

        with pytest.raises(DeadlineExceeded, match="the end of actor 'slow': no answer within 5 s"):
            async with Supervisor(Bus(), stop_deadline_s=5) as supervisor:
                await supervisor.start(Slow("slow"))
        assert now() == 5

    run(scenario())


def test_spawned_helpers_outlive_the_last_message():
    async def scenario():
        class Engine(Clerk):
            async def started(self) -> None:
                self.queue: asyncio.Queue[asyncio.Future[None]] = asyncio.Queue()
                self.spawn(self.turn(), name="turn")

            async def turn(self) -> None:
                while True:
                    (await self.queue.get()).set_result(None)

            async def receive(self, message: Message) -> Any:
                served = asyncio.get_running_loop().create_future()
                self.queue.put_nowait(served)
                await served
                self.done.append(1)

        bus = Bus()
        engine = Engine()
        async with Supervisor(bus) as supervisor:
            await supervisor.start(engine)
            for _ in range(9):
                await bus.tell("clerk", Job(), deadline_s=1)
        assert len(engine.done) == 9
        assert now() == 0

    run(scenario())


class Clock(Clerk):
    """An actor with a loop of its own."""

    async def run(self) -> None:
        await asyncio.sleep(10)


def test_an_actor_ends_when_its_own_loop_returns_and_join_sees_it():
    async def scenario():
        bus = Bus()
        async with Supervisor(bus) as supervisor:
            clock = Clock("clock")
            await supervisor.start(clock)
            await bus.tell("clock", Job(takes_s=12), deadline_s=1)
            with pytest.raises(DeadlineExceeded, match="waits for the end of actor 'clock': no answer within 4 s"):
                await supervisor.join(clock, deadline_s=4)
            await supervisor.join(clock)
            assert now() == 12, "what was in hand when the loop returned is finished"
            assert clock.log == ["clock started", "clock stopped"]
            with pytest.raises(ActorStopped):
                await bus.ask("clock", Order(), deadline_s=60)

    run(scenario())


def test_an_own_loop_is_cancelled_first_when_its_actor_is_stopped():
    async def scenario():
        bus = Bus()
        async with Supervisor(bus) as supervisor:
            clock = Clock("clock")
            await supervisor.start(clock)
            await supervisor.stop(clock)
            assert now() == 0
            await supervisor.stop(clock)
        assert bus.statistics().actors["clock"].state == "ended"

    run(scenario())


def test_an_own_loop_produces_nothing_while_the_inbox_is_finished():
    async def scenario():
        class Ticking(Clerk):
            async def run(self) -> None:
                while True:
                    self.log.append(f"tick {now():g}")
                    await asyncio.sleep(1)

        bus = Bus()
        ticking = Ticking()
        async with Supervisor(bus) as supervisor:
            await supervisor.start(ticking)
            await bus.tell("clerk", Job(takes_s=5), deadline_s=1)
            await asyncio.sleep(0.5)
        assert ticking.done == [5]
        assert ticking.log == ["clerk started", "tick 0", "clerk stopped"]

    run(scenario())


def test_what_a_failed_start_had_spawned_is_ended():
    async def scenario():
        class HalfStarted(Clerk):
            async def started(self) -> None:
                self.spawn(asyncio.sleep(1000), name="helper")
                raise ValueError("half started")

        with pytest.raises(ValueError, match="half started"):
            async with Supervisor(Bus()) as supervisor:
                await supervisor.start(HalfStarted())
        assert now() == 0
        assert tasks_left() == 0

    run(scenario())


def test_a_crash_beside_the_first_one_is_logged(caplog):
    async def scenario():
        class Clumsy(Clerk):
            async def stopped(self) -> None:
                raise KeyError("second")

        bus = Bus()
        with pytest.raises(ValueError, match="a bad job"):
            async with Supervisor(bus) as supervisor:
                await supervisor.start(Clumsy())
                await bus.tell("clerk", Job(takes_s=-1), deadline_s=1)
                await asyncio.sleep(1000)

    run(scenario())
    assert "actor 'clerk', already crashed, also failed with" in caplog.text
    assert "KeyError: 'second'" in caplog.text


def test_an_error_while_an_own_loop_is_cancelled_is_not_lost():
    async def scenario():
        class Clumsy(Clerk):
            async def run(self) -> None:
                try:
                    await asyncio.Event().wait()
                finally:
                    raise ValueError("on the way out")

        with pytest.raises(ValueError, match="on the way out"):
            async with Supervisor(Bus()) as supervisor:
                await supervisor.start(Clumsy())
                await settle()

    run(scenario())


@pytest.mark.parametrize("restart", [None, Restart(budget=9, window_s=60)], ids=["no restart", "restart"])
def test_a_crash_while_the_inbox_is_finished_surfaces_and_the_rest_is_accounted_for(restart):
    async def scenario():
        bus = Bus()
        with pytest.raises(ValueError, match="a bad job"):
            async with Supervisor(bus) as supervisor:
                await supervisor.start(Clerk(), restart=restart)
                for takes_s in (1, -1, 1):
                    await bus.tell("clerk", Job(takes_s=takes_s), deadline_s=1)
        books = bus.statistics().actors["clerk"]
        assert (books.handled, books.failed, books.dropped, books.restarts) == (1, 1, {"crashed": 1}, 0)

    run(scenario())


@pytest.mark.parametrize("phase", ["before its first step", "while it starts", "while it backs off"])
def test_an_actor_can_be_stopped_at_any_moment(phase):
    async def scenario():
        class Slow(Clerk):
            async def started(self) -> None:
                if phase == "while it starts":
                    await asyncio.sleep(1000)
                await super().started()

        bus = Bus()
        clerk = Slow()
        async with Supervisor(bus, start_deadline_s=5000) as supervisor:
            starting = asyncio.create_task(supervisor.start(clerk, restart=Restart(budget=9, window_s=60)))
            await asyncio.sleep(0)
            if phase != "before its first step":
                await settle()
            if phase == "while it backs off":
                await bus.tell("clerk", Job(takes_s=-1), deadline_s=1)
                await settle()
                assert bus.statistics().actors["clerk"].state == "restarting"
            await supervisor.stop(clerk)
            await starting
        assert now() == 0
        assert bus.statistics().actors["clerk"].state == "ended"
        assert clerk.log == (["clerk started", "clerk stopped"] if phase == "while it backs off" else [])
        assert tasks_left() == 0

    run(scenario())


def test_an_error_in_the_body_stops_the_actors_and_is_not_hidden_by_what_follows():
    async def scenario():
        bus = Bus()
        clerk = Clerk()
        with pytest.raises(KeyError, match="mine"):
            async with Supervisor(bus) as supervisor:
                await supervisor.start(clerk)
                await bus.tell("clerk", Job(takes_s=-1), deadline_s=1)
                raise KeyError("mine")
        assert clerk.log == ["clerk started", "clerk stopped"]

    run(scenario())


def test_a_cancelled_body_stops_its_actors_and_stays_cancelled():
    async def scenario():
        clerk = Clerk()

        async def body():
            async with Supervisor(Bus()) as supervisor:
                await supervisor.start(clerk)
                await asyncio.sleep(1000)

        task = asyncio.create_task(body())
        await settle()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert clerk.log == ["clerk started", "clerk stopped"]
        assert tasks_left() == 0

    run(scenario())


def test_a_supervisor_in_the_cleanup_of_a_cancelled_task_still_surfaces_its_crashes():
    async def scenario():
        caught = []

        async def body():
            try:
                await asyncio.sleep(1000)
            finally:
                bus = Bus()
                try:
                    async with Supervisor(bus) as supervisor:
                        await supervisor.start(Clerk())
                        await bus.tell("clerk", Job(takes_s=-1), deadline_s=1)
                        await asyncio.sleep(1000)
                except ValueError as error:
                    caught.append(str(error))

        task = asyncio.create_task(body())
        await settle()
        task.cancel()
        await asyncio.wait([task])
        assert caught == ["a bad job"]
        assert task.cancelled()

    run(scenario())


def test_a_cancellation_during_the_shutdown_does_not_cut_it_short():
    async def scenario():
        bus = Bus()
        clerk = Clerk()

        async def body():
            async with Supervisor(bus) as supervisor:
                await supervisor.start(clerk)
                await bus.tell("clerk", Job(takes_s=4), deadline_s=1)

        task = asyncio.create_task(body())
        await asyncio.sleep(1)
        task.cancel()
        await asyncio.sleep(1)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert now() == 4
        assert clerk.done == [4]
        assert clerk.log == ["clerk started", "clerk stopped"]

    run(scenario())


def test_a_crash_in_the_moment_the_body_ends_leaves_no_cancellation_behind():
    async def scenario():
        bus = Bus()
        with pytest.raises(ValueError, match="a bad job"):
            async with Supervisor(bus) as supervisor:
                clerk = Clerk()
                await supervisor.start(clerk)
                await bus.tell("clerk", Job(takes_s=-1), deadline_s=1)
                while bus.statistics().actors["clerk"].state != "ended":
                    await asyncio.sleep(0)
        await asyncio.sleep(1)
        assert asyncio.current_task().cancelling() == 0

    run(scenario())


def test_spawned_work_is_cancelled_at_the_end_of_the_body_and_joined_by_name():
    async def scenario():
        ended = []

        async def work(seconds: float) -> None:
            try:
                await asyncio.sleep(seconds)
            finally:
                ended.append((seconds, now()))

        bus = Bus()
        async with Supervisor(bus) as supervisor:
            short = supervisor.spawn(work(2), name="short")
            supervisor.spawn(work(50), name="long")
            await supervisor.join(short)
            refused = work(1)
            with pytest.raises(ValueError, match="has an actor named 'long' already"):
                supervisor.spawn(refused, name="long")
        assert ended == [(2, 2), (50, 2)]

    run(scenario())


def test_spawned_work_that_never_began_is_closed():
    async def scenario():
        async def work() -> None:
            pytest.fail("began")

        never = work()
        async with Supervisor(Bus()) as supervisor:
            supervisor.spawn(never, name="never")
        assert inspect.getcoroutinestate(never) == inspect.CORO_CLOSED

    run(scenario())


def test_a_crash_seen_through_join_from_another_task_is_an_error_there_too():
    async def scenario():
        bus = Bus()
        joining: list[asyncio.Task[None]] = []
        with pytest.raises(ValueError, match="a bad job"):
            async with Supervisor(bus) as supervisor:
                clerk = Clerk()
                await supervisor.start(clerk)
                joining.append(asyncio.create_task(supervisor.join(clerk)))
                await bus.tell("clerk", Job(takes_s=-1), deadline_s=1)
                await asyncio.sleep(1000)
        with pytest.raises(ActorError, match="actor 'clerk' crashed") as caught:
            await joining[0]
        assert isinstance(caught.value.__cause__, ValueError)

    run(scenario())
