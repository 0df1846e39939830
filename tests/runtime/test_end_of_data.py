"""Publish and subscribe: what a slow reader does to its publishers, and how the data ends."""

import asyncio

import pytest

from ale.actor import Actor
from ale.bus import Bus
from ale.errors import ActorError, DeadlineExceeded, MailboxClosed
from ale.supervisor import Restart, Supervisor
from ale.testing.clock import run
from ale.topic import Overflow
from ale.wire import Message


class Line(Message, frozen=True):
    number: int


class Other(Message, frozen=True):
    pass


class Opaque(Message, frozen=True):
    thing: object


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def numbers(lines) -> list[int]:
    return [line.number async for line in lines]


async def publish_all(lines, count: int) -> None:
    for number in range(count):
        await lines.publish(Line(number=number), deadline_s=9)


def test_readers_drain_and_end_when_the_last_publisher_closes():
    async def scenario():
        bus = Bus()
        with bus.subscribe(Line, "reader", capacity=8, overflow=Overflow.HOLD) as lines:
            with bus.publisher(Line) as first:
                with bus.publisher(Line) as second:
                    await first.publish(Line(number=1), deadline_s=1)
                    await second.publish(Line(number=2), deadline_s=1)
                reading = asyncio.create_task(numbers(lines))
                await settle()
                assert not reading.done(), "one publisher is still held"
                await first.publish(Line(number=3), deadline_s=1)
            assert await reading == [1, 2, 3]

    run(scenario())


def test_get_names_the_end_of_data_and_its_deadline():
    async def scenario():
        bus = Bus()
        with bus.subscribe(Line, "reader", capacity=8, overflow=Overflow.HOLD) as lines:
            publisher = bus.publisher(Line)
            with pytest.raises(DeadlineExceeded, match="a message in the subscription of 'reader' to Line"):
                await lines.get(deadline_s=1)
            publisher.close()
            with pytest.raises(MailboxClosed, match="the subscription of 'reader' to Line has ended"):
                await lines.get(deadline_s=1)

    run(scenario())


def test_a_reader_that_comes_after_the_end_of_data_does_not_wait_for_it():
    async def scenario():
        bus = Bus()
        with bus.publisher(Line):
            pass
        with bus.subscribe(Line, "late", capacity=1, overflow=Overflow.HOLD) as lines:
            assert await numbers(lines) == []

    run(scenario())


def test_every_reader_gets_every_message_of_exactly_its_type():
    async def scenario():
        bus = Bus()
        readers = [bus.subscribe(Line, f"reader {n}", capacity=8, overflow=Overflow.HOLD) for n in range(3)]
        others = bus.subscribe(Other, "other", capacity=8, overflow=Overflow.HOLD)
        with bus.publisher(Line) as lines, bus.publisher(Other):
            await publish_all(lines, 4)
            with pytest.raises(TypeError, match="a publisher of Line was given a Other"):
                await lines.publish(Other(), deadline_s=1)
        assert [await numbers(reader) for reader in readers] == [[0, 1, 2, 3]] * 3
        assert await numbers(others) == []
        assert bus.statistics().published == {"Line": 4, "Other": 0}

    run(scenario())


def test_a_slow_reader_holds_its_publisher_and_nothing_is_dropped():
    async def scenario():
        bus = Bus()
        slow = bus.subscribe(Line, "slow", capacity=2, overflow=Overflow.HOLD)
        with bus.publisher(Line) as lines:
            publishing = asyncio.create_task(publish_all(lines, 5), name="producer")
            await settle()
            (books,) = bus.statistics().subscriptions
            assert (books.reader, books.depth, books.held, books.dropped) == ("slow", 2, 1, 0)
            assert [(wait.who, wait.what) for wait in bus.waits()] == [
                ("producer", "room in the subscription of 'slow' to Line")
            ]
            assert [(await slow.get()).number for _ in range(5)] == [0, 1, 2, 3, 4]
            await publishing

    run(scenario())


@pytest.mark.parametrize(
    ("overflow", "kept"), [(Overflow.DROP_OLDEST, [3, 4]), (Overflow.DROP_NEWEST, [0, 1])], ids=lambda value: str(value)
)
def test_a_reader_that_may_lose_messages_never_holds_its_publisher(overflow, kept):
    async def scenario():
        bus = Bus()
        lossy = bus.subscribe(Line, "lossy", capacity=2, overflow=overflow)
        with bus.publisher(Line) as lines:
            await publish_all(lines, 5)
            (books,) = bus.statistics().subscriptions
        assert await numbers(lossy) == kept
        assert books.dropped == 3
        assert books.depth == books.high_water == 2

    run(scenario())


@pytest.mark.parametrize("ending", ["cancelled", "too late"])
def test_a_publish_that_fails_reaches_no_reader_at_all(ending):
    async def scenario():
        bus = Bus()
        fast = bus.subscribe(Line, "fast", capacity=2, overflow=Overflow.HOLD)
        full = bus.subscribe(Line, "full", capacity=1, overflow=Overflow.HOLD)
        lossy = bus.subscribe(Line, "lossy", capacity=9, overflow=Overflow.DROP_OLDEST)
        with bus.publisher(Line) as lines:
            await lines.publish(Line(number=0), deadline_s=1)
            held = asyncio.create_task(lines.publish(Line(number=1), deadline_s=1))
            await settle()
            if ending == "cancelled":
                held.cancel()
            await asyncio.wait([held])
            assert held.cancelled() if ending == "cancelled" else isinstance(held.exception(), DeadlineExceeded)
            assert (await full.get()).number == 0
            await lines.publish(Line(number=2), deadline_s=1)
        assert [await numbers(reader) for reader in (fast, full, lossy)] == [[0, 2], [2], [0, 2]]
        assert bus.statistics().published == {"Line": 2}

    run(scenario())


def test_a_reader_that_leaves_lets_its_publishers_go():
    async def scenario():
        bus = Bus()
        stays = bus.subscribe(Line, "stays", capacity=9, overflow=Overflow.HOLD)
        with bus.publisher(Line) as lines:
            with bus.subscribe(Line, "leaves", capacity=1, overflow=Overflow.HOLD):
                publishing = asyncio.create_task(publish_all(lines, 3))
                await settle()
                assert not publishing.done()
            await publishing
        assert await numbers(stays) == [0, 1, 2]
        assert [books.reader for books in bus.statistics().subscriptions] == ["stays"]

    run(scenario())


def test_a_reader_that_leaves_while_a_publish_is_held_gets_nothing():
    async def scenario():
        bus = Bus()
        leaving = [bus.subscribe(Line, o.value, capacity=1, overflow=o) for o in Overflow]
        full = bus.subscribe(Line, "full", capacity=1, overflow=Overflow.HOLD)
        with bus.publisher(Line) as lines:
            await lines.publish(Line(number=0), deadline_s=1)
            assert [(await reader.get()).number for reader in leaving] == [0, 0, 0]
            held = asyncio.create_task(lines.publish(Line(number=1), deadline_s=1))
            await settle()
            for reader in leaving:
                reader.close()
            await full.get()
            await held
        assert [await numbers(reader) for reader in (*leaving, full)] == [[], [], [], [1]]

    run(scenario())


def test_what_a_leaving_reader_has_not_read_counts_as_dropped():
    async def scenario():
        bus = Bus()
        reader = bus.subscribe(Line, "reader", capacity=9, overflow=Overflow.HOLD)
        with bus.publisher(Line) as lines:
            await publish_all(lines, 3)
            await reader.get()
            reader.close()
        assert (reader.received, reader.dropped) == (3, 2)

    run(scenario())


def test_an_actor_that_has_ended_holds_no_publisher():
    async def scenario():
        bus = Bus()
        async with Supervisor(bus) as supervisor:
            await supervisor.start(Fragile())
        assert bus.statistics().subscriptions == ()
        with bus.publisher(Line) as lines:
            await publish_all(lines, 99)

    run(scenario())


def test_a_closed_publisher_publishes_no_more():
    async def scenario():
        bus = Bus()
        full = bus.subscribe(Line, "full", capacity=1, overflow=Overflow.HOLD)
        with bus.publisher(Line) as lines, bus.publisher(Line):
            await lines.publish(Line(number=0), deadline_s=1)
            held = asyncio.create_task(lines.publish(Line(number=1), deadline_s=1))
            await settle()
            lines.close()
            await full.get()
            with pytest.raises(ActorError, match="this publisher of Line is closed"):
                await held
            with pytest.raises(ActorError, match="this publisher of Line is closed"):
                await lines.publish(Line(number=2), deadline_s=1)
            assert not full.mailbox.items

    run(scenario())


def test_a_plain_bus_refuses_to_publish_what_is_not_plain_data():
    async def scenario():
        bus = Bus(plain=True)
        lines = bus.subscribe(Line, "reader", capacity=1, overflow=Overflow.HOLD)
        with bus.publisher(Opaque) as opaque, bus.publisher(Line) as numbered:
            with pytest.raises(TypeError, match="Opaque is not plain data"):
                await opaque.publish(Opaque(thing=object()), deadline_s=1)
            sent = Line(number=5)
            await numbered.publish(sent, deadline_s=1)
            got = await lines.get()
            assert got == sent
            assert got is not sent

    run(scenario())


class Producer(Actor):
    def __init__(self, name: str, count: int, crash_at: int | None = None) -> None:
        super().__init__(name, capacity=1)
        self.left = list(range(count))
        self.crash_at = crash_at

    async def run(self) -> None:
        lines = self.publisher(Line)
        while self.left:
            number = self.left.pop(0)
            await lines.publish(Line(number=number), deadline_s=9)
            if number == self.crash_at:
                raise ValueError("a bad line")


class Doubler(Actor):
    """Between two topics: its own publisher closes when its input has ended."""

    def __init__(self) -> None:
        super().__init__("doubler", capacity=1)

    async def started(self) -> None:
        self.lines = self.subscribe(Line, capacity=2, overflow=Overflow.HOLD)

    async def run(self) -> None:
        doubled = self.publisher(Doubled)
        async for line in self.lines:
            await doubled.publish(Doubled(number=2 * line.number), deadline_s=9)


class Doubled(Message, frozen=True):
    number: int


def test_the_end_of_data_runs_through_a_chain_of_actors():
    async def scenario():
        bus = Bus()
        out = bus.subscribe(Doubled, "out", capacity=2, overflow=Overflow.HOLD)
        async with Supervisor(bus) as supervisor:
            doubler = Doubler()
            await supervisor.start(doubler)
            with bus.publisher(Line):  # held while the producers start: none of them is the last by accident
                for n in range(3):
                    await supervisor.start(Producer(f"producer {n}", 5))
            seen = await numbers(out)
            await supervisor.join(doubler, deadline_s=1)
        assert sorted(seen) == sorted(3 * [0, 2, 4, 6, 8])

    run(scenario())


def test_a_restart_is_not_the_end_of_data_and_loses_no_unread_message():
    async def scenario():
        bus = Bus()
        out = bus.subscribe(Doubled, "out", capacity=99, overflow=Overflow.HOLD)
        async with Supervisor(bus) as supervisor:
            await supervisor.start(Doubler())
            await supervisor.start(Producer("producer", 6, crash_at=2), restart=Restart(budget=1, window_s=60))
            assert await numbers(out) == [0, 2, 4, 6, 8, 10]
        assert bus.statistics().actors["producer"].restarts == 1

    run(scenario())


class Fragile(Actor):
    """Crashes on line 1; what it had not read yet is there after the restart."""

    def __init__(self) -> None:
        super().__init__("fragile", capacity=1)
        self.seen: list[int] = []

    async def started(self) -> None:
        self.lines = self.subscribe(Line, capacity=9, overflow=Overflow.HOLD)

    async def run(self) -> None:
        async for line in self.lines:
            if line.number == 1:
                raise ValueError("line 1")
            self.seen.append(line.number)


def test_a_reader_that_restarts_keeps_its_subscription():
    async def scenario():
        bus = Bus()
        async with Supervisor(bus) as supervisor:
            fragile = Fragile()
            await supervisor.start(fragile, restart=Restart(budget=1, window_s=60))
            with bus.publisher(Line) as lines:
                await publish_all(lines, 5)
            await supervisor.join(fragile, deadline_s=9)
            assert fragile.seen == [0, 2, 3, 4]

    run(scenario())
