"""If somebody asked, the error is theirs; if nobody asked, the actor crashes and its supervisor decides."""

import asyncio
from typing import Any

import pytest

from ale.actor import Actor
from ale.bus import Bus
from ale.errors import ActorError, ActorStopped, DeadlineExceeded, RestartBudgetSpent, UserError
from ale.supervisor import Restart, Supervisor
from ale.testing.clock import run
from ale.wire import Message, Request


class Done(Message, frozen=True):
    by: int
    """Which incarnation answered."""


class Work(Request[Done], frozen=True):
    pass


class Break(Message, frozen=True):
    text: str = "broken"


class Hang(Request[Done], frozen=True):
    pass


class Machine(Actor):
    def __init__(self, name: str = "machine", *, concurrency: int = 1, starts: int = 99) -> None:
        super().__init__(name, capacity=16, concurrency=concurrency)
        self.incarnation = 0
        self.starts = starts
        self.log: list[str] = []

    async def started(self) -> None:
        self.incarnation += 1
        if self.incarnation > self.starts:
            raise ValueError("no more starts")
        self.log.append("started")

    async def receive(self, message: Message) -> Any:
        match message:
            case Work():
                return Done(by=self.incarnation)
            case Break(text=text):
                raise ValueError(text)
            case Hang():
                await asyncio.Event().wait()

    async def stopped(self) -> None:
        self.log.append("stopped")


async def settle() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


def test_a_crash_on_a_told_message_stops_everything_and_surfaces_with_the_actors_name():
    async def scenario():
        bus = Bus()
        bystander = Machine("bystander")
        with pytest.raises(ValueError, match="broken") as caught:
            async with Supervisor(bus) as supervisor:
                await supervisor.start(bystander)
                await supervisor.start(Machine())
                await bus.tell("machine", Break(), deadline_s=1)
                await asyncio.sleep(1000)
                pytest.fail("the body goes on after a fatal crash")
        assert caught.value.__notes__ == ["while actor 'machine' handled Break", "in actor 'machine'"]
        assert bystander.log == ["started", "stopped"]
        assert asyncio.get_running_loop().time() == 0
        assert asyncio.current_task().cancelling() == 0

    run(scenario())


def test_the_cause_keeps_its_type_so_that_a_user_error_stays_one():
    async def scenario():
        async def misconfigured():
            raise UserError("set `lr`")

        with pytest.raises(UserError, match="set `lr`"):
            async with Supervisor(Bus()) as supervisor:
                supervisor.spawn(misconfigured(), name="setup")
                await asyncio.sleep(1000)

    run(scenario())


def test_the_first_of_several_crashes_is_the_cause():
    async def scenario():
        bus = Bus()
        with pytest.raises(ValueError, match="first"):
            async with Supervisor(bus) as supervisor:
                await supervisor.start(Machine("a"))
                await supervisor.start(Machine("b"))
                await bus.tell("b", Break(text="first"), deadline_s=1)
                await bus.tell("a", Break(text="second"), deadline_s=1)
                await asyncio.sleep(1000)

    run(scenario())


def test_an_ask_that_waits_while_its_actor_dies_gets_an_error_with_the_cause():
    async def scenario():
        bus = Bus()
        asks = []
        with pytest.raises(ValueError, match="broken"):
            async with Supervisor(bus) as supervisor:
                await supervisor.start(Machine(concurrency=2))
                asks.append(asyncio.create_task(bus.ask("machine", Hang(), deadline_s=60)))
                await settle()
                await bus.tell("machine", Break(), deadline_s=1)
                asks.append(asyncio.create_task(bus.ask("machine", Hang(), deadline_s=60)))
                await asyncio.sleep(1000)
        in_hand, queued = (ask.exception() for ask in asks)
        assert "crashed while it had Hang in hand" in str(in_hand)
        assert isinstance(in_hand.__cause__, ValueError)
        assert isinstance(queued, ActorError)
        books = bus.statistics().actors["machine"]
        assert (books.failed, books.dropped) == (1, {"crashed": 2})
        with pytest.raises(ActorStopped, match="actor 'machine' has ended: ValueError: broken") as late:
            await bus.ask("machine", Work(), deadline_s=60)
        assert isinstance(late.value.__cause__, ValueError)

    run(scenario())


def test_a_restart_keeps_the_mailbox_and_fails_only_what_was_in_hand():
    async def scenario():
        bus = Bus()
        async with Supervisor(bus) as supervisor:
            machine = Machine(concurrency=2)
            await supervisor.start(machine, restart=Restart(budget=1, window_s=60, backoff_s=2))
            in_hand = asyncio.create_task(bus.ask("machine", Hang(), deadline_s=60))
            await settle()
            await bus.tell("machine", Break(), deadline_s=1)
            await settle()
            assert bus.statistics().actors["machine"].state == "restarting"
            assert "machine/life waits for the end of the back-off of actor 'machine'" in {
                f"{wait.who} waits for {wait.what}" for wait in bus.waits()
            }
            answer = await bus.ask("machine", Work(), deadline_s=60)
            assert answer == Done(by=2)
            assert asyncio.get_running_loop().time() == 2
            with pytest.raises(ActorError, match="crashed while it had Hang in hand"):
                await in_hand
        assert machine.log == ["started", "stopped"] * 2

    run(scenario())


def test_the_back_off_doubles_up_to_its_bound_and_the_budget_ends_it():
    async def scenario():
        bus = Bus()
        loop = asyncio.get_running_loop()
        restarts = []
        with pytest.raises(RestartBudgetSpent, match="crashed again after 4 restarts within 100 s") as caught:
            async with Supervisor(bus) as supervisor:
                policy = Restart(budget=4, window_s=100, backoff_s=1, backoff_max_s=5)
                await supervisor.start(Machine(), restart=policy)
                while True:
                    begin = loop.time()
                    await bus.tell("machine", Break(), deadline_s=1)
                    await settle()
                    assert (await bus.ask("machine", Work(), deadline_s=60)).by == len(restarts) + 2
                    restarts.append(loop.time() - begin)
        assert restarts == [1, 2, 4, 5]
        assert isinstance(caught.value.__cause__, ValueError)
        assert "in actor 'machine'" in caught.value.__notes__

    run(scenario())


def test_crashes_outside_the_window_do_not_count():
    async def scenario():
        bus = Bus()
        async with Supervisor(bus) as supervisor:
            await supervisor.start(Machine(), restart=Restart(budget=1, window_s=10, backoff_s=1))
            for incarnation in range(2, 6):
                await bus.tell("machine", Break(), deadline_s=1)
                await settle()
                assert await bus.ask("machine", Work(), deadline_s=60) == Done(by=incarnation)
                await asyncio.sleep(10)
        assert bus.statistics().actors["machine"].restarts == 4

    run(scenario())


def test_an_actor_that_does_not_start_stops_everything_and_never_stopped_is_called():
    async def scenario():
        machine = Machine(starts=0)
        with pytest.raises(ValueError, match="no more starts"):
            async with Supervisor(Bus()) as supervisor:
                await supervisor.start(machine)
                pytest.fail("start returned")
        assert machine.log == []

    run(scenario())


def test_a_start_that_takes_too_long_is_named():
    async def scenario():
        class Slow(Machine):
            async def started(self) -> None:
                await asyncio.sleep(1000)

        with pytest.raises(DeadlineExceeded, match="the start of actor 'slow': no answer within 3 s"):
            async with Supervisor(Bus(), start_deadline_s=3) as supervisor:
                await supervisor.start(Slow("slow"))

    run(scenario())


def test_the_error_of_a_spawned_task_crashes_its_actor():
    async def scenario():
        class Parent(Machine):
            async def started(self) -> None:
                await super().started()
                if self.incarnation == 1:
                    self.spawn(self.fail(), name="child")

            async def fail(self) -> None:
                raise ValueError("the child")

        bus = Bus()
        async with Supervisor(bus) as supervisor:
            await supervisor.start(Parent("parent"), restart=Restart(budget=1, window_s=60))
            await settle()
            assert await bus.ask("parent", Work(), deadline_s=9) == Done(by=2)

    run(scenario())


def test_a_cancellation_inside_receive_is_an_error_like_any_other():
    async def scenario():
        class Clumsy(Machine):
            async def receive(self, message: Message) -> Any:
                future = asyncio.get_running_loop().create_future()
                future.cancel()
                await future

        bus = Bus()
        with pytest.raises(ActorError, match="something was cancelled while actor 'clumsy' handled Break"):
            async with Supervisor(bus) as supervisor:
                await supervisor.start(Clumsy("clumsy"))
                with pytest.raises(ActorError, match="something was cancelled while actor 'clumsy' handled Work"):
                    await bus.ask("clumsy", Work(), deadline_s=1)
                await bus.tell("clumsy", Break(), deadline_s=1)
                await asyncio.sleep(1000)

    run(scenario())


@pytest.mark.parametrize("task", ["machine", "machine/life"])
def test_a_task_cancelled_from_outside_is_a_crash_and_not_a_silent_end(task):
    async def scenario():
        bus = Bus()
        with pytest.raises(ActorError, match="cancelled behind its supervisor's back"):
            async with Supervisor(bus) as supervisor:
                await supervisor.start(Machine())
                await settle()
                next(found for found in asyncio.all_tasks() if found.get_name() == task).cancel()
                await bus.ask("machine", Hang(), deadline_s=1000)

    run(scenario())


def test_concurrency_bounds_how_many_messages_are_in_hand():
    async def scenario():
        class Busy(Machine):
            async def receive(self, message: Message) -> Any:
                await asyncio.sleep(1)
                return Done(by=1)

        bus = Bus()
        async with Supervisor(bus) as supervisor:
            await supervisor.start(Busy("busy", concurrency=4))
            await asyncio.gather(*(bus.ask("busy", Work(), deadline_s=60) for _ in range(12)))
        assert asyncio.get_running_loop().time() == 3

    run(scenario())


def test_an_actor_that_keeps_telling_itself_leaves_turns_to_others():
    async def scenario():
        class Restless(Machine):
            left = 10_000

            async def receive(self, message: Message) -> Any:
                self.left -= 1
                if self.left:
                    self.bus.try_tell(self.name, message)

        bus = Bus()
        async with Supervisor(bus) as supervisor:
            restless = Restless("restless")
            await supervisor.start(restless)
            await bus.tell("restless", Break(), deadline_s=1)
            turns = 0
            while restless.left:
                turns += 1
                await asyncio.sleep(0)
            assert turns >= 9

    run(scenario())


def test_supervisors_nest_and_the_inner_one_ends_first():
    async def scenario():
        bus = Bus()
        order = []

        class Logged(Machine):
            async def stopped(self) -> None:
                order.append(self.name)

        async with Supervisor(bus) as outer:
            await outer.start(Logged("outer"))
            with pytest.raises(ValueError, match="broken"):
                async with Supervisor(bus) as inner:
                    await inner.start(Logged("inner"))
                    await bus.tell("inner", Break(), deadline_s=1)
                    await asyncio.sleep(1000)
            assert order == ["inner"]
            assert await bus.ask("outer", Work(), deadline_s=1) == Done(by=1)
        assert order == ["inner", "outer"]

    run(scenario())


def test_what_was_not_started_here_has_no_bus_and_cannot_be_joined():
    async def scenario():
        machine = Machine()
        with pytest.raises(ActorError, match="actor 'machine' is not started"):
            _ = machine.bus
        supervisor = Supervisor(Bus())
        with pytest.raises(ActorError, match="enter the supervisor first"):
            await supervisor.start(machine)
        async with supervisor:
            with pytest.raises(ActorError, match="actor 'machine' was not started by this supervisor"):
                await supervisor.join(machine)
            await supervisor.start(machine)
            with pytest.raises(ActorError, match="was started already"):
                await supervisor.start(machine)
        with pytest.raises(ActorError, match="is stopping and cannot start actor 'late'"):
            await supervisor.start(Machine("late"))
        with pytest.raises(ActorError, match="a supervisor is entered once"):
            async with supervisor:
                pass

    run(scenario())


def test_a_concurrency_below_one_is_refused():
    with pytest.raises(ValueError, match="needs a concurrency of at least 1, not 0"):
        Actor("idle", capacity=1, concurrency=0)
