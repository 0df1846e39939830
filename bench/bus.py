"""The actor runtime against a bare `asyncio.Queue`, both under uvloop (asyncio where there is none).

Ours runs as in earnest: a supervised actor that matches its messages, deadlines on every `tell` and `ask`, books kept.
The queue has a bare consumer loop and no deadlines. Rows:
- `tell`: 64 senders, one receiver, room for 1,024.
- `ask_c64`: 64 askers at a time; with the queue, a request and a future go in and the consumer sets the future.
- `ask_p50`: one asker at a time, median microseconds.
- `ask_pykka`: for scale, where pykka is installed: its threads ask one at a time, as do we.
"""

from __future__ import annotations

import asyncio
import importlib.util
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any, TypeVar

from ale.actor import Actor
from ale.bus import Bus
from ale.errors import DeadlineExceeded
from ale.supervisor import Supervisor
from ale.wire import Message, Request
from bench.harness import benchmark

T = TypeVar("T")

CLIENTS = 64
CAPACITY = 1024
TELLS = 256_000
ASKS = 128_000
SINGLE_ASKS = 5_000
DEADLINE_S = 30.0


class Tick(Message, frozen=True):
    number: int


class Total(Message, frozen=True):
    value: int


class GetTotal(Request[Total], frozen=True):
    pass


class Counter(Actor):
    def __init__(self) -> None:
        super().__init__("counter", capacity=CAPACITY)
        self.seen = 0

    async def receive(self, message: Message) -> Total | None:
        match message:
            case Tick():
                self.seen += 1
            case GetTotal():
                return Total(value=self.seen)
            case _:
                await super().receive(message)
        return None


def on_loop(measure: Callable[[], Coroutine[Any, Any, T]]) -> T:
    factory = None
    if importlib.util.find_spec("uvloop"):
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(measure())


async def seconds(client: Callable[[], Coroutine[Any, Any, None]]) -> float:
    """How long `CLIENTS` clients take, side by side."""
    begin = time.perf_counter()
    async with asyncio.TaskGroup() as clients:
        for _ in range(CLIENTS):
            clients.create_task(client())
    return time.perf_counter() - begin


async def median_us(once: Callable[[], Awaitable[Any]]) -> float:
    figures = []
    for _ in range(SINGLE_ASKS):
        begin = time.perf_counter()
        await once()
        figures.append(time.perf_counter() - begin)
    return statistics.median(figures) * 1e6


async def tell() -> float:
    bus, counter, tick = Bus(), Counter(), Tick(number=1)

    async def client() -> None:
        for _ in range(TELLS // CLIENTS):
            await bus.tell("counter", tick, deadline_s=DEADLINE_S)

    async with Supervisor(bus) as supervisor:
        await supervisor.start(counter)
        took = await seconds(client)
        total = await bus.ask("counter", GetTotal(), deadline_s=DEADLINE_S)
    assert total.value == TELLS, total
    return TELLS / took


async def ask() -> float:
    bus, request = Bus(), GetTotal()

    async def client() -> None:
        for _ in range(ASKS // CLIENTS):
            await bus.ask("counter", request, deadline_s=DEADLINE_S)

    async with Supervisor(bus) as supervisor:
        await supervisor.start(Counter())
        return ASKS / await seconds(client)


async def ask_p50() -> float:
    bus = Bus()
    async with Supervisor(bus) as supervisor:
        await supervisor.start(Counter())
        return await median_us(lambda: bus.ask("counter", GetTotal(), deadline_s=DEADLINE_S))


async def queue_put() -> float:
    queue: asyncio.Queue[Message] = asyncio.Queue(CAPACITY)
    tick, seen = Tick(number=1), 0

    async def consume() -> None:
        nonlocal seen
        while True:
            await queue.get()
            seen += 1

    async def client() -> None:
        for _ in range(TELLS // CLIENTS):
            await queue.put(tick)

    async with consuming(consume()):
        took = await seconds(client)
        assert seen + queue.qsize() == TELLS, seen
    return TELLS / took


class AskedQueue:
    """How one asks over a bare queue: a request and a future go in, the consumer sets the future."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[tuple[GetTotal, asyncio.Future[Total]]] = asyncio.Queue(CAPACITY)

    async def consume(self) -> None:
        while True:
            _, reply = await self._queue.get()
            reply.set_result(Total(value=0))

    async def ask(self, request: GetTotal) -> Total:
        reply: asyncio.Future[Total] = asyncio.get_running_loop().create_future()
        await self._queue.put((request, reply))
        return await reply


async def queue_ask() -> float:
    queue, request = AskedQueue(), GetTotal()

    async def client() -> None:
        for _ in range(ASKS // CLIENTS):
            await queue.ask(request)

    async with consuming(queue.consume()):
        return ASKS / await seconds(client)


async def queue_ask_p50() -> float:
    queue = AskedQueue()
    async with consuming(queue.consume()):
        return await median_us(lambda: queue.ask(GetTotal()))


@asynccontextmanager
async def consuming(consumer: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(consumer)
    yield
    task.cancel()
    await asyncio.wait([task])


def pykka_ask_rate() -> float:
    import pykka

    class PykkaCounter(pykka.ThreadingActor):
        def on_receive(self, message: Any) -> Any:
            return Total(value=0)

    counter, request = PykkaCounter.start(), GetTotal()
    try:
        begin = time.perf_counter()
        for _ in range(SINGLE_ASKS):
            counter.ask(request)
        return SINGLE_ASKS / (time.perf_counter() - begin)
    finally:
        counter.stop()


async def single_ask_rate() -> float:
    bus = Bus()
    async with Supervisor(bus) as supervisor:
        await supervisor.start(Counter())
        begin = time.perf_counter()
        for _ in range(SINGLE_ASKS):
            await bus.ask("counter", GetTotal(), deadline_s=DEADLINE_S)
        return SINGLE_ASKS / (time.perf_counter() - begin)


async def every_message_is_counted() -> bool:
    bus, sent = Bus(), 10_000
    async with Supervisor(bus) as supervisor:
        await supervisor.start(Counter())
        async with asyncio.TaskGroup() as senders:
            for _ in range(CLIENTS):
                senders.create_task(_send(bus, sent // CLIENTS))
        total = await bus.ask("counter", GetTotal(), deadline_s=DEADLINE_S)
    books = bus.statistics().actors["counter"]
    return total.value == books.told == books.handled == sent // CLIENTS * CLIENTS and books.answered == 1


async def _send(bus: Bus, count: int) -> None:
    for number in range(count):
        await bus.tell("counter", Tick(number=number), deadline_s=DEADLINE_S)


async def late_answers_raise() -> bool:
    bus, release = Bus(), asyncio.Event()

    class Silent(Actor):
        async def receive(self, message: Message) -> Total:
            await release.wait()
            return Total(value=0)

    async with Supervisor(bus) as supervisor:
        await supervisor.start(Silent("silent", capacity=1))
        try:
            await bus.ask("silent", GetTotal(), deadline_s=0.01)
        except DeadlineExceeded:
            return True
        finally:
            release.set()
    return False


def main() -> None:
    with benchmark("bus", pairs=9) as bench:
        bench.check("every message told is counted once", lambda: on_loop(every_message_is_counted))
        bench.check("an ask past its deadline raises", lambda: on_loop(late_answers_raise))
        queue, rate = "asyncio.Queue", "messages/s"
        bench.rate("tell", ours=lambda: on_loop(tell), baseline=lambda: on_loop(queue_put), against=queue, unit=rate)
        bench.rate(
            "ask_c64", ours=lambda: on_loop(ask), baseline=lambda: on_loop(queue_ask), against=queue, unit="asks/s"
        )
        bench.latency(
            "ask_p50", ours=lambda: on_loop(ask_p50), baseline=lambda: on_loop(queue_ask_p50), against=queue, unit="us"
        )
        if importlib.util.find_spec("pykka"):
            pykka = f"pykka {version('pykka')}"
            bench.rate(
                "ask_pykka",
                ours=lambda: on_loop(single_ask_rate),
                baseline=pykka_ask_rate,
                against=pykka,
                unit="asks/s",
            )


if __name__ == "__main__":
    main()
