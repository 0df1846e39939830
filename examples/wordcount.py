"""Counts words with two actors and no reinforcement learning: the runtime alone.

    python examples/wordcount.py FILE...

    Reader -- Line --> Counter <-- GetTop -- main

The end of data is ownership: the reader's `run` returns, its publisher closes with it, the counter's subscription
drains and ends. There is no sentinel, and main simply asks: the answer comes when the count is complete. If a file
cannot be read, the reader crashes, everything stops in order, and the error surfaces here with the reader's name.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from pathlib import Path

from ale.actor import Actor
from ale.bus import Bus
from ale.supervisor import Supervisor
from ale.topic import Overflow, Subscription
from ale.wire import Message, Request

DEADLINE_S = 60.0


class Line(Message, frozen=True):
    """`Line(text="to be or not to be")`"""

    text: str


class Top(Message, frozen=True):
    """`Top(words=(("be", 2), ("to", 2)))`, most frequent first."""

    words: tuple[tuple[str, int], ...]


class GetTop(Request[Top], frozen=True):
    """The `count` most frequent words of everything published; answered when the last publisher has gone."""

    count: int


class Reader(Actor):
    def __init__(self, paths: list[Path]) -> None:
        super().__init__("reader", capacity=1)
        self.paths = paths

    async def run(self) -> None:
        lines = self.publisher(Line)
        for path in self.paths:
            for text in path.read_text().splitlines():
                await lines.publish(Line(text=text), deadline_s=DEADLINE_S)


class WordCounter(Actor):
    def __init__(self) -> None:
        super().__init__("counter", capacity=8)

    async def started(self) -> None:
        self.words: Counter[str] = Counter()
        self.complete = asyncio.Event()
        lines = self.subscribe(Line, capacity=64, overflow=Overflow.HOLD)
        self.spawn(self.count(lines), name="count")

    async def count(self, lines: Subscription[Line]) -> None:
        async for line in lines:
            self.words.update(line.text.lower().split())
        self.complete.set()

    async def receive(self, message: Message) -> Top | None:
        match message:
            case GetTop(count=count):
                await self.complete.wait()
                return Top(words=tuple(self.words.most_common(count)))
            case _:
                await super().receive(message)
        return None


async def top_words(paths: list[Path], count: int) -> Top:
    bus = Bus(plain=True)
    async with Supervisor(bus) as supervisor:
        await supervisor.start(WordCounter())
        await supervisor.start(Reader(paths))
        return await bus.ask("counter", GetTop(count=count), deadline_s=DEADLINE_S)


if __name__ == "__main__":
    if not sys.argv[1:]:
        raise SystemExit("usage: python examples/wordcount.py FILE...")
    for word, times in asyncio.run(top_words([Path(name) for name in sys.argv[1:]], count=10)).words:
        print(f"{times:8,}  {word}")
