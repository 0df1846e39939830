import asyncio
import gc
import re
from typing import Any

import pytest
import uvloop

from ale.actor import Actor
from ale.bus import SWEEP_S, Bus
from ale.errors import ActorError, ActorStopped, DeadlineExceeded
from ale.supervisor import Supervisor
from ale.testing.clock import run
from ale.wire import Message, Request


class Note(Message, frozen=True):
    text: str = ""


class Sum(Message, frozen=True):
    value: int


class Add(Request[Sum], frozen=True):
    a: int
    b: int = 0


class Flush(Request[None], frozen=True):
    pass


class Opaque(Message, frozen=True):
    thing: Any


class GetOpaque(Request[Opaque], frozen=True):
    pass


class Adder(Actor):
    """Adds; a closed gate keeps what it has in hand."""

    def __init__(self, *, capacity: int = 8, concurrency: int = 1) -> None:
        super().__init__("adder", capacity=capacity, concurrency=concurrency)
        self.gate = asyncio.Event()
        self.gate.set()
        self.notes: list[str] = []
        self.added: list[int] = []

    async def receive(self, message: Message) -> Any:
        await self.gate.wait()
        match message:
            case Add(a=a, b=b):
                self.added.append(a)
                return Sum(value=a + b)
            case Note(text=text):
                self.notes.append(text)
            case GetOpaque():
                return Opaque(thing=object())
            case Flush():
                return None
            case _:
                await super().receive(message)


def scenario(test):
    """Runs an async test on the virtual clock with a supervised adder."""

    def wrapped():
        async def body():
            bus = Bus()
            async with Supervisor(bus) as supervisor:
                adder = Adder()
                await supervisor.start(adder)
                await test(bus, adder)
                adder.gate.set()
            books = bus.statistics().actors["adder"]
            assert books.told + books.asked == (
                books.handled + books.answered + books.failed + books.abandoned + sum(books.dropped.values())
            )

        run(body())

    wrapped.__name__ = test.__name__
    return wrapped


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@scenario
async def test_an_ask_is_answered_with_what_receive_returns(bus, adder):
    assert await bus.ask("adder", Add(a=2, b=3), deadline_s=1) == Sum(value=5)


@scenario
async def test_messages_pass_by_reference(bus, adder):
    text = "x" * 100
    await bus.tell("adder", Note(text=text), deadline_s=1)
    await bus.ask("adder", Flush(), deadline_s=1)
    assert adder.notes[0] is text


@scenario
async def test_told_messages_are_handled_in_order(bus, adder):
    for number in range(100):
        await bus.tell("adder", Note(text=str(number)), deadline_s=1)
    await bus.ask("adder", Flush(), deadline_s=1)
    assert adder.notes == [str(number) for number in range(100)]


@scenario
async def test_try_tell_says_no_instead_of_waiting(bus, adder):
    adder.gate.clear()
    await bus.tell("adder", Note(text="in hand"), deadline_s=1)
    await settle()
    assert [bus.try_tell("adder", Note(text=str(n))) for n in range(9)] == [True] * 8 + [False]
    adder.gate.set()
    await bus.ask("adder", Flush(), deadline_s=1)
    assert adder.notes == ["in hand", *map(str, range(8))]


@scenario
async def test_a_tell_to_a_full_inbox_fails_at_its_deadline_and_was_not_sent(bus, adder):
    adder.gate.clear()
    while bus.try_tell("adder", Note()):
        await settle()
    begin = asyncio.get_running_loop().time()
    with pytest.raises(DeadlineExceeded, match="waits for room in the inbox of actor 'adder': no answer within 2 s"):
        await bus.tell("adder", Note(text="late"), deadline_s=2)
    assert asyncio.get_running_loop().time() - begin == pytest.approx(2, abs=SWEEP_S)
    adder.gate.set()
    await bus.ask("adder", Flush(), deadline_s=1)
    assert "late" not in adder.notes


@scenario
async def test_a_cancelled_tell_was_not_sent(bus, adder):
    adder.gate.clear()
    while bus.try_tell("adder", Note()):
        await settle()
    held = asyncio.create_task(bus.tell("adder", Note(text="cancelled"), deadline_s=9))
    await settle()
    held.cancel()
    await asyncio.wait([held])
    assert bus.statistics().actors["adder"].held == 0
    adder.gate.set()
    await bus.ask("adder", Flush(), deadline_s=1)
    assert "cancelled" not in adder.notes


@scenario
async def test_an_ask_fails_at_its_deadline_which_names_the_wait_and_where_it_was(bus, adder):
    adder.gate.clear()
    in_hand = asyncio.create_task(bus.ask("adder", Add(a=1), deadline_s=3), name="first")
    queued = asyncio.create_task(bus.ask("adder", Add(a=2), deadline_s=4), name="second")
    await asyncio.wait([in_hand, queued])
    assert str(in_hand.exception()) == (
        "first waits for the answer of actor 'adder' to Add (in hand): no answer within 3 s"
    )
    assert str(queued.exception()) == (
        "second waits for the answer of actor 'adder' to Add (in its inbox): no answer within 4 s"
    )
    adder.gate.set()
    await bus.ask("adder", Flush(), deadline_s=1)
    assert adder.added == [1], "the one in hand is finished, the one whose caller has gone is skipped"
    assert bus.statistics().actors["adder"].abandoned == 2


@scenario
async def test_deadlines_fire_in_their_own_order_and_at_most_one_sweep_late(bus, adder):
    adder.gate.clear()
    loop = asyncio.get_running_loop()
    fired = {}

    async def ask(deadline_s: float) -> None:
        with pytest.raises(DeadlineExceeded):
            await bus.ask("adder", Add(a=1), deadline_s=deadline_s)
        fired[deadline_s] = loop.time()

    await asyncio.gather(*map(ask, (9.0, 0.5, 4.0, 0.503, 0.001, 7.0)))
    assert list(fired) == sorted(fired)
    for deadline_s, at in fired.items():
        assert deadline_s <= at <= deadline_s + SWEEP_S


@scenario
async def test_an_ask_held_by_a_full_inbox_has_the_same_deadline(bus, adder):
    adder.gate.clear()
    while bus.try_tell("adder", Note()):
        await settle()
    with pytest.raises(DeadlineExceeded, match="waits for room in the inbox"):
        await bus.ask("adder", Add(a=1), deadline_s=1)


@scenario
async def test_a_cancelled_ask_is_skipped_when_its_turn_comes(bus, adder):
    adder.gate.clear()
    asks = [asyncio.create_task(bus.ask("adder", Add(a=n), deadline_s=9)) for n in range(4)]
    await settle()
    asks[2].cancel()
    await settle()
    adder.gate.set()
    answers = await asyncio.gather(*asks, return_exceptions=True)
    assert [type(answer) for answer in answers] == [Sum, Sum, asyncio.CancelledError, Sum]
    assert adder.added == [0, 1, 3]


@scenario
async def test_an_ask_cancelled_in_the_moment_of_its_error_leaves_no_unread_error(bus, adder):
    unread = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unread.append(context["message"]))
    ask = asyncio.create_task(bus.ask("adder", Opaque(thing=1), deadline_s=9))
    while not bus.statistics().actors["adder"].failed:
        await asyncio.sleep(0)
    ask.cancel()
    await asyncio.wait([ask])
    assert ask.cancelled()
    del ask
    gc.collect()
    assert unread == []


@scenario
async def test_a_thousand_asks_at_once_are_all_answered_though_the_inbox_holds_eight(bus, adder):
    answers = await asyncio.gather(*(bus.ask("adder", Add(a=n, b=1), deadline_s=9) for n in range(1000)))
    assert [answer.value for answer in answers] == list(range(1, 1001))
    assert bus.statistics().actors["adder"].high_water == 8


def test_a_thousand_asks_at_once_are_all_answered_under_uvloop():
    async def body():
        bus = Bus()
        async with Supervisor(bus) as supervisor:
            await supervisor.start(Adder(concurrency=16))
            answers = await asyncio.gather(*(bus.ask("adder", Add(a=n), deadline_s=30) for n in range(1000)))
            assert [answer.value for answer in answers] == list(range(1000))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(body())


@scenario
async def test_the_error_of_an_ask_belongs_to_the_asker_and_the_actor_goes_on(bus, adder):
    with pytest.raises(ActorError, match="actor 'adder' does not understand Opaque"):
        await bus.ask("adder", Opaque(thing=1), deadline_s=1)
    assert await bus.ask("adder", Add(a=1, b=1), deadline_s=1) == Sum(value=2)


@scenario
async def test_a_receive_that_forgets_a_request_is_an_error_unless_none_is_the_answer(bus, adder):
    with pytest.raises(ActorError, match="actor 'adder' has no answer to Note: its `receive` returned None"):
        await bus.ask("adder", Note(), deadline_s=1)
    assert await bus.ask("adder", Flush(), deadline_s=1) is None


@scenario
async def test_a_wrong_address_is_an_error_with_the_likeliest_name(bus, adder):
    with pytest.raises(ActorError, match="no actor named 'ader'; did you mean 'adder'"):
        await bus.tell("ader", Note(), deadline_s=1)
    with pytest.raises(ActorError, match="no actor named 'zoo'; there are: adder"):
        await bus.ask("zoo", Add(a=1), deadline_s=1)


@scenario
async def test_two_actors_cannot_share_a_name(bus, adder):
    async with Supervisor(bus) as other:
        with pytest.raises(ValueError, match="has an actor named 'adder' already"):
            await other.start(Adder())


def test_who_asks_tells_or_try_tells_the_dead_gets_an_error_at_once():
    async def body():
        bus = Bus()
        async with Supervisor(bus) as supervisor:
            await supervisor.start(Adder())
        for send in (bus.ask("adder", Add(a=1), deadline_s=9), bus.tell("adder", Note(), deadline_s=9)):
            with pytest.raises(ActorStopped, match="actor 'adder' has ended"):
                await send
        with pytest.raises(ActorStopped, match="actor 'adder' has ended"):
            bus.try_tell("adder", Note())
        assert asyncio.get_running_loop().time() == 0

    run(body())


def test_the_address_of_the_dead_can_be_taken_again():
    async def body():
        bus = Bus()
        for _ in range(2):
            async with Supervisor(bus) as supervisor:
                await supervisor.start(Adder())
                assert await bus.ask("adder", Add(a=1), deadline_s=1) == Sum(value=1)

    run(body())


@scenario
async def test_waits_tell_who_waits_for_what_and_since_when(bus, adder):
    adder.gate.clear()
    asks = [asyncio.create_task(bus.ask("adder", Add(a=n), deadline_s=60), name=f"asker {n}") for n in range(2)]
    await asyncio.sleep(5)
    while bus.try_tell("adder", Note()):
        pass
    held = asyncio.create_task(bus.tell("adder", Note(), deadline_s=30), name="teller")

    async def borrow():
        async with bus.waiting("a free sandbox", deadline_s=20):
            await asyncio.Event().wait()

    borrower = asyncio.create_task(borrow(), name="borrower")
    await asyncio.sleep(2)
    seen = [(wait.who, wait.what, wait.waited_s, wait.deadline_s) for wait in bus.waits()]
    assert seen == [
        ("asker 0", "the answer of actor 'adder' to Add (in hand)", 7, 60),
        ("asker 1", "the answer of actor 'adder' to Add (in its inbox)", 7, 60),
        ("borrower", "a free sandbox", 2, 20),
        ("teller", "room in the inbox of actor 'adder'", 2, 30),
    ]
    with pytest.raises(DeadlineExceeded, match="borrower waits for a free sandbox: no answer within 20 s"):
        await borrower
    adder.gate.set()
    await asyncio.gather(*asks, held)
    await settle()
    assert [(wait.who, wait.what) for wait in bus.waits()] == [("adder", "a message in the inbox of actor 'adder'")]


@scenario
async def test_a_time_out_inside_a_named_wait_is_not_taken_for_its_deadline(bus, adder):
    with pytest.raises(TimeoutError, match="of the inside"):
        async with bus.waiting("something", deadline_s=9):
            raise TimeoutError("of the inside")
    assert "something" not in [wait.what for wait in bus.waits()]


@scenario
async def test_statistics_count_every_message_once(bus, adder):
    adder.gate.clear()
    await asyncio.sleep(1)
    await bus.tell("adder", Note(), deadline_s=1)
    await asyncio.sleep(1)
    await bus.tell("adder", Note(), deadline_s=1)
    ask = asyncio.create_task(bus.ask("adder", Add(a=1), deadline_s=60))
    await asyncio.sleep(2)
    books = bus.statistics().actors["adder"]
    assert (books.told, books.asked, books.depth, books.in_hand, books.high_water) == (2, 1, 2, 1, 2)
    assert books.oldest_s == 2
    assert books.state == "serving"
    adder.gate.set()
    await ask
    books = bus.statistics().actors["adder"]
    assert (books.handled, books.answered, books.failed, books.depth, books.in_hand) == (2, 1, 0, 0, 0)
    assert books.oldest_s == 0


def test_a_plain_bus_hands_over_copies_and_refuses_what_is_not_plain_data():
    async def body():
        bus = Bus(plain=True)
        async with Supervisor(bus) as supervisor:
            adder = Adder()
            await supervisor.start(adder)
            text = "x" * 100
            await bus.tell("adder", Note(text=text), deadline_s=1)
            assert await bus.ask("adder", Add(a=1, b=2), deadline_s=1) == Sum(value=3)
            assert adder.notes == [text]
            assert adder.notes[0] is not text
            with pytest.raises(TypeError, match=re.escape("Opaque is not plain data")):
                await bus.tell("adder", Opaque(thing=object()), deadline_s=1)
            with pytest.raises(TypeError, match=re.escape("Opaque is not plain data")):
                bus.try_tell("adder", Opaque(thing=object()))
            with pytest.raises(TypeError, match="object is not plain data: send a msgspec struct"):
                await bus.tell("adder", object(), deadline_s=1)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match=re.escape("Opaque is not plain data")):
                await bus.ask("adder", GetOpaque(), deadline_s=1)
            assert bus.statistics().actors["adder"].told == 1

    run(body())


def test_a_bus_needs_a_running_loop():
    with pytest.raises(RuntimeError, match="no running event loop"):
        Bus()


class Patient(Actor):
    """Works for ever; what it was cancelled in is in `ended`. `stubborn`: it answers all the same."""

    cancel_abandoned = True

    def __init__(self, stubborn: bool = False) -> None:
        super().__init__("patient", capacity=8, concurrency=2)
        self.stubborn = stubborn
        self.begun: list[int] = []
        self.ended: list[int] = []

    async def receive(self, message):
        match message:
            case Add(a=a):
                self.begun.append(a)
                try:
                    await asyncio.sleep(0 if a == 0 else 1e6)
                except asyncio.CancelledError:
                    self.ended.append(a)
                    await asyncio.sleep(1)  # cleaning up takes its time, and is not cut short
                    self.ended.append(-a)
                    if not self.stubborn:
                        raise
                return Sum(value=a)
            case _:
                await super().receive(message)


@pytest.mark.parametrize("stubborn", [False, True])
def test_an_actor_may_end_what_nobody_waits_for(stubborn: bool) -> None:
    async def scenario_() -> None:
        bus = Bus()
        async with Supervisor(bus) as supervisor:
            patient = Patient(stubborn)
            await supervisor.start(patient)
            one = asyncio.create_task(bus.ask("patient", Add(a=1), deadline_s=1e5))
            two = asyncio.create_task(bus.ask("patient", Add(a=2), deadline_s=5))  # its deadline passes
            three = asyncio.create_task(bus.ask("patient", Add(a=3), deadline_s=1e5))
            await asyncio.sleep(1)
            one.cancel()
            await asyncio.sleep(0.5)
            assert (patient.begun, patient.ended) == ([1, 2], [1])
            await asyncio.sleep(1)
            assert (patient.begun, patient.ended) == ([1, 2, 3], [1, -1])  # its worker took the next
            with pytest.raises(DeadlineExceeded):
                await two
            await asyncio.sleep(1.5)
            assert patient.ended == [1, -1, 2, -2]
            three.cancel()
            await asyncio.sleep(2)
            # The workers are as good as new, and the books close.
            assert [(await bus.ask("patient", Add(a=0), deadline_s=1)).value for _ in range(5)] == [0] * 5
            books = bus.statistics().actors["patient"]
            assert (books.asked, books.answered, books.abandoned, books.in_hand) == (8, 5, 3, 0)

    run(scenario_())


def test_an_actor_that_ends_what_nobody_waits_for_can_still_be_stopped() -> None:
    async def scenario_() -> None:
        bus = Bus()
        async with Supervisor(bus, stop_deadline_s=2) as supervisor:
            patient = Patient()
            await supervisor.start(patient)
            asks = [asyncio.create_task(bus.ask("patient", Add(a=a), deadline_s=1e5)) for a in (1, 2, 3)]
            await asyncio.sleep(1)
            asks[0].cancel()
        ended = await asyncio.gather(*asks, return_exceptions=True)
        assert [type(e).__name__ for e in ended] == ["CancelledError", "ActorStopped", "ActorStopped"]

    run(scenario_())
