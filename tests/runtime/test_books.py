"""Over random schedules: every ask ends, every told message is handled once or accounted for, and nothing is left."""

import asyncio
import gc
from collections import Counter
from contextlib import suppress
from typing import Any, Literal

from hypothesis import given, settings
from hypothesis import strategies as st

from ale.actor import Actor
from ale.bus import Bus
from ale.errors import ActorError, ActorStopped, DeadlineExceeded, RestartBudgetSpent
from ale.supervisor import Restart, Supervisor
from ale.testing.clock import run
from ale.wire import Message, Request

DURATIONS_S = (0.0, 0.5, 3.0)


class Task(Request["Echo"], frozen=True):
    """Told or asked: both are the same to the actor."""

    number: int
    takes_s: float
    raises: bool


class Echo(Message, frozen=True):
    number: int


class Broken(Exception):
    pass


class Worker(Actor):
    def __init__(self, capacity: int, concurrency: int) -> None:
        super().__init__("worker", capacity=capacity, concurrency=concurrency)
        self.begun: Counter[int] = Counter()
        self.finished: Counter[int] = Counter()

    async def receive(self, message: Message) -> Any:
        match message:
            case Task(number=number, takes_s=takes_s, raises=raises):
                self.begun[number] += 1
                if takes_s:
                    await asyncio.sleep(takes_s)
                self.finished[number] += 1
                if raises:
                    raise Broken(str(number))
                return Echo(number=number)


Send = tuple[Literal["tell", "try_tell", "ask"], float, bool, float]
"""How, how long it takes, whether it raises, and the sender's deadline."""

send = st.tuples(
    st.sampled_from(["tell", "try_tell", "ask"]),
    st.sampled_from(DURATIONS_S),
    st.booleans(),
    st.sampled_from([0.1, 1.0, 100.0]),
)
cancel = st.tuples(st.just("cancel"), st.integers(0, 30))
pause = st.tuples(st.just("pause"), st.sampled_from([0.0, 0.0, 0.25, 1.0]))
schedules = st.lists(st.one_of(send, send, send, cancel, pause), max_size=40)


class Outcome:
    """What the senders saw."""

    def __init__(self) -> None:
        self.tells: dict[int, asyncio.Task[bool]] = {}
        self.asks: dict[int, asyncio.Task[Echo]] = {}

    def all(self) -> list[asyncio.Task[Any]]:
        return [*self.tells.values(), *self.asks.values()]


async def play(schedule: list[Any], bus: Bus, worker: Worker, budget: int, outcome: Outcome) -> None:
    async def tell(task: Task, deadline_s: float) -> bool:
        await bus.tell("worker", task, deadline_s=deadline_s)
        return True

    async def try_tell(task: Task) -> bool:
        return bus.try_tell("worker", task)

    async with Supervisor(bus, stop_deadline_s=2.0) as supervisor:
        await supervisor.start(worker, restart=Restart(budget=budget, window_s=1e9, backoff_s=0.5))
        for number, step in enumerate(schedule):
            match step:
                case ("cancel", index):
                    if senders := outcome.all():
                        senders[index % len(senders)].cancel()
                case ("pause", seconds):
                    await asyncio.sleep(seconds)
                case (how, takes_s, raises, deadline_s):
                    task = Task(number=number, takes_s=takes_s, raises=raises)
                    if how == "ask":
                        outcome.asks[number] = asyncio.create_task(bus.ask("worker", task, deadline_s=deadline_s))
                    elif how == "tell":
                        outcome.tells[number] = asyncio.create_task(tell(task, deadline_s))
                    else:
                        outcome.tells[number] = asyncio.create_task(try_tell(task))


def accepted(tell: asyncio.Task[bool]) -> bool:
    return not tell.cancelled() and tell.exception() is None and tell.result()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(schedule=schedules, capacity=st.integers(1, 4), concurrency=st.integers(1, 3), budget=st.integers(0, 3))
def test_every_ask_ends_and_every_told_message_is_handled_once_or_accounted_for(
    schedule, capacity, concurrency, budget
):
    async def scenario():
        loop = asyncio.get_running_loop()
        unread: list[str] = []
        loop.set_exception_handler(lambda _, context: unread.append(context["message"]))
        bus, worker, outcome = Bus(), Worker(capacity, concurrency), Outcome()
        # Without a budget left, or in the shutdown, a crash ends the actor: its messages must be accounted for too.
        with suppress(RestartBudgetSpent, Broken):
            await play(schedule, bus, worker, budget, outcome)
        senders = outcome.all()
        if senders:
            await asyncio.wait(senders)  # with nobody left to answer, a hung sender is a Deadlock here

        books = bus.statistics().actors["worker"]
        told = {number for number, tell in outcome.tells.items() if accepted(tell)}
        refused = outcome.tells.keys() - told
        assert books.told == len(told)
        assert not worker.begun.keys() & refused, "a tell that failed or was cancelled was sent all the same"
        assert all(count == 1 for count in worker.begun.values()), "handled twice"
        unfinished = len(told - worker.finished.keys())
        stopped_asks = 0

        for number, ask in outcome.asks.items():
            if ask.cancelled():
                continue
            error = ask.exception()
            if error is None:
                assert ask.result() == Echo(number=number)
            elif isinstance(error, Broken):
                assert str(error) == str(number), "an error went to the wrong asker"
            elif not isinstance(error, DeadlineExceeded):
                assert isinstance(error, ActorError)
                stopped_asks += 1
        for tell in outcome.tells.values():
            if not tell.cancelled() and tell.exception() is not None:
                assert isinstance(tell.exception(), ActorStopped | DeadlineExceeded)

        dropped = sum(books.dropped.values())
        assert unfinished <= dropped <= unfinished + stopped_asks
        assert books.told + books.asked == (books.handled + books.answered + books.failed + books.abandoned + dropped)
        assert books.handled == len({n for n in told & worker.finished.keys() if not schedule[n][2]})
        assert (books.depth, books.in_hand, books.held, books.state) == (0, 0, 0, "ended")
        assert books.high_water <= capacity
        assert bus.waits() == []
        assert asyncio.all_tasks() == {asyncio.current_task()}
        del outcome, senders
        gc.collect()
        assert unread == []

    run(scenario())
