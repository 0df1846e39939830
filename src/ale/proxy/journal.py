"""What went over the wire in one episode: every request with the exact bytes of its answer, one JSON line each.

A journal is what *replay* answers from. It holds what an agent sent and saw, not tokens: those are in the token tree.
"""

from __future__ import annotations

import hashlib
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import IO

import msgspec
import orjson

from ale.errors import ConfigError


class Exchange(msgspec.Struct, frozen=True):
    """`Exchange("/v1/chat/completions", '{"model": ...}', 200, "application/json", ['{"id": ...}'])`.

    `request` is the body as it came (where it is no UTF-8, with U+FFFD); `pieces` are the writes of the answer in
    order, a stream's events as they left.
    """

    path: str
    request: str
    status: int
    content_type: str
    pieces: list[str]


class Journal:
    """Appends exchanges to a file, each flushed as its answer ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = path.open("ab")
        except OSError as error:
            raise ConfigError(f"the journal {path} cannot be written: {error}") from error

    def keep(self, exchange: Exchange) -> None:
        self._file.write(msgspec.json.encode(exchange) + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Recorded:
    """A journal to answer from: equal requests get their answers in the order in which these were given."""

    def __init__(self, path: Path) -> None:
        self._answers: dict[bytes, deque[Exchange]] = {}
        decoder = msgspec.json.Decoder(Exchange)
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            raise ConfigError(f"the journal {path} cannot be read: {error}") from error
        for number, line in enumerate(lines, 1):
            try:
                exchange = decoder.decode(line)
            except msgspec.DecodeError as error:
                raise ConfigError(f"{path}:{number} is no exchange of a journal: {error}") from error
            self._answers.setdefault(_key(exchange.path, exchange.request.encode()), deque()).append(exchange)

    def next(self, path: str, body: bytes) -> Exchange | None:
        """The next recorded answer to this request; None when there is no other."""
        found = self._answers.get(_key(path, body.decode("utf-8", "replace").encode()))
        return found.popleft() if found else None


def _key(path: str, body: bytes) -> bytes:
    """Requests are equal when their JSON is: order of keys and white space between them do not count."""
    with suppress(orjson.JSONDecodeError):  # what is no JSON is compared as it is
        body = orjson.dumps(orjson.loads(body), option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(path.encode() + b"\0" + body, digest_size=16).digest()
