"""Grades a program against a check that its author never saw. A script of its own, uploaded to the sandbox as a test.

    python3 judge_program.py task.json program.py reward.txt      task.json: prompt, entry_point, test, solution

Two processes. This one, which knows the tests and writes the reward, never executes the program: the child does, and is
sent arguments and sends back values, both as Python literals. So the comparison is made here, on plain data, and there
is nothing in it that the program could replace. Before the child executes a line of the program it gives up opening,
writing and forking for good (RLIMIT_NOFILE, FSIZE and NPROC at 0): it can read no test and write no reward.

The reward is 1 when the check passes and 0 when it fails, the program crashes, or it takes too long.
"""

from __future__ import annotations

import ast
import json
import math
import os
import resource
import select
import signal
import sys
import time
from typing import Any

# What programs of this kind import. The child can open no file later, so they are loaded before.
_MODULES = (
    "bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "hashlib", "heapq",
    "itertools", "json", "math", "operator", "random", "re", "statistics", "string", "sys", "time", "typing",
)  # fmt: skip
_WALL_S = 10.0
_MEMORY_BYTES = 256 << 20
_MAX_ANSWER_BYTES = 1 << 20
_PR_SET_DUMPABLE = 4


class Failed(Exception):
    """The program is wrong, in whichever way."""


class Program:
    """The program in its child process; calling it calls the function `entry_point` there, by value."""

    def __init__(self, source: str, entry_point: str) -> None:
        self._deadline = time.monotonic() + _WALL_S
        there, self._tell = os.pipe()
        self._hear, here = os.pipe()
        self._child = os.fork()
        if self._child == 0:
            os.close(self._tell)
            os.close(self._hear)
            _serve(source, entry_point, there, here)
        os.close(there)
        os.close(here)
        self._buffer = b""

    def __call__(self, *arguments: Any) -> Any:
        try:
            os.write(self._tell, repr(arguments).encode() + b"\n")
        except OSError as error:
            raise Failed("it has ended") from error
        while b"\n" not in self._buffer:
            left = self._deadline - time.monotonic()
            if left <= 0 or not select.select([self._hear], [], [], left)[0]:
                raise Failed(f"it took longer than {_WALL_S:g} s")
            data = os.read(self._hear, 65536)
            if not data:
                raise Failed("it has ended")
            self._buffer += data
            if len(self._buffer) > _MAX_ANSWER_BYTES:
                raise Failed("its answer is too long")
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            said, value = _read(line.decode())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
            raise Failed("its answer is no plain value") from error
        if said != "value":
            raise Failed(f"it raised {value}")
        return value

    def end(self) -> None:
        os.kill(self._child, signal.SIGKILL)
        os.waitpid(self._child, 0)


def _serve(source: str, entry_point: str, there: int, here: int) -> None:
    """The child. Ends the process."""
    try:
        for name in _MODULES:
            __import__(name)
        requests = os.fdopen(there, "rb")
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
        for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE):
            resource.setrlimit(limit, (0, 0))
        names: dict[str, Any] = {"__name__": "program"}
        problem = None
        try:
            exec(compile(source, "program.py", "exec"), names)
            function = names[entry_point]
        except BaseException as error:
            problem = type(error).__name__
        for line in requests:
            try:
                answer = ("raised", problem) if problem else ("value", function(*_read(line.decode())))
                text = repr(answer)
            except BaseException as error:
                text = repr(("raised", type(error).__name__))
            os.write(here, text.replace("\n", " ").encode() + b"\n")
    finally:
        os._exit(0)


def _read(text: str) -> Any:
    """The value of a Python literal; `inf` and `nan` too, which repr() writes as names."""
    tree = ast.parse(text, mode="eval")
    return ast.literal_eval(_Numbers().visit(tree))


class _Numbers(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant({"inf": math.inf, "nan": math.nan}[node.id]) if node.id in ("inf", "nan") else node


def judge(task: dict[str, str], source: str) -> str:
    """Why the program fails; "" when it passes."""
    names: dict[str, Any] = {"__name__": "check"}
    # The check may call functions that the prompt defines beside the one to write.
    exec(compile(task["prompt"] + task["solution"], "prompt.py", "exec"), names)
    exec(compile(task["test"], "test.py", "exec"), names)
    program = Program(task["prompt"] + source, task["entry_point"])
    try:
        names["check"](program)
    except Failed as error:
        return str(error)
    except Exception as error:  # an assertion, or what the check makes of a value of another type
        return f"{type(error).__name__}: {error}"
    finally:
        program.end()
    return ""


def main(task: str, program: str, reward: str) -> None:
    _forbid_inspection()
    with open(task) as file:
        told = json.load(file)
    try:
        with open(program, encoding="utf-8", errors="replace") as file:
            problem = judge(told, file.read())
    except OSError:
        problem = "there is no program"
    print(problem or "passed")
    with open(reward, "w") as file:
        file.write("0" if problem else "1")


def _forbid_inspection() -> None:
    """No process of the same user may read or change this one's memory."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
