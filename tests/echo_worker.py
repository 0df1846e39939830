"""The child of tests/test_process.py: answers, fails, stalls, dies or talks nonsense, as it is asked."""

import contextlib
import os
import struct
import sys
import time

from ale.heart import Heart
from ale.process import Requests
from ale.wire import Message, Request


class Answer(Message, frozen=True):
    text: str
    data: bytes = b""


class Echo(Request[Answer], frozen=True):
    text: str
    data: bytes = b""


class Raise(Request[Answer], frozen=True):
    text: str


class Print(Request[Answer], frozen=True):
    text: str
    times: int = 1


class Stall(Request[Answer], frozen=True):
    """Never answers, never reads again."""


class Ignore(Request[Answer], frozen=True):
    """Is answered after the next request."""


class Exit(Request[Answer], frozen=True):
    code: int


class Garble(Request[Answer], frozen=True):
    data: bytes


KINDS = (Echo, Raise, Print, Stall, Ignore, Exit, Garble)


def main() -> None:
    fd = int(sys.argv[1])
    requests = Requests(fd, KINDS)
    ignored: list[int] = []
    with Heart(requests.beat) as heart:
        while True:
            for number, request in requests.take(block=True):
                with heart.doing(type(request).__name__):
                    answer(requests, ignored, fd, number, request)


def answer(requests: Requests, ignored: list[int], fd: int, number: int, request: object) -> None:
    match request:
        case Echo(text=text, data=data):
            requests.answer(number, Answer(text=text, data=data))
            while ignored:
                requests.answer(ignored.pop(), Answer(text="late"))
        case Raise(text=text):
            requests.fail(number, KeyError(text))
        case Print(text=text, times=times):
            sys.stderr.write(text * times)
            sys.stderr.flush()
            requests.answer(number, Answer(text="printed"))
        case Stall():
            time.sleep(600)
        case Ignore():
            ignored.append(number)
        case Exit(code=code):
            print("I meant to go", file=sys.stderr, flush=True)
            os._exit(code)
        case Garble(data=data):
            os.write(fd, data or struct.pack("<IQB", 5, number, 1) + b"\xc1\xc1\xc1\xc1\xc1")


if __name__ == "__main__":
    with contextlib.suppress(EOFError):
        main()
