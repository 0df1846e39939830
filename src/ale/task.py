"""A task: an instruction, the files the agent starts with, the tests that score it and, optionally, a solution.

On disk a task is a directory that Harbor and Terminal-Bench users recognise:

    task.toml            [metadata], [agent] timeout_sec, [verifier] timeout_sec, [environment] memory_mb ...
    instruction.md       what the agent is told
    environment/files/   copied into the working directory; environment/Dockerfile says the same to Docker
    tests/test.sh        writes a number to /logs/verifier/reward.txt; uploaded only when the episode is graded
    solution/solve.sh    one command a line (optional)
"""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec

from ale.wire import Message

WORKDIR = "/app"
TESTS_DIR = "/tests"
REWARD_FILE = "/logs/verifier/reward.txt"

Split = Literal["train", "heldout", "families", "user"]
Actions = Literal["bash", "text", "python"]
"""How a turn is read (`ale.agent.actions`): "bash", a command in a fence, or without one the final answer; "text", the
whole turn is the action; "python", the code in it is."""


class TaskFile(msgspec.Struct, frozen=True, array_like=True):
    """One file: path relative to its directory, content, permission bits."""

    path: str
    data: bytes
    mode: int = 0o644


class Task(Message, frozen=True):
    """`Task(id="copy-1-7", instruction="Copy oak.txt to fox.txt.", files=(TaskFile("oak.txt", b"elm\\n"),), ...)`."""

    id: str
    instruction: str = ""
    files: tuple[TaskFile, ...] = ()
    tests: tuple[TaskFile, ...] = ()
    solution: tuple[str, ...] = ()
    """The actions of a reference solution, before they are rendered as turns."""
    actions: Actions = "bash"
    family: str = "user"
    level: int = 1
    seed: int = 0
    split: Split = "user"
    agent_timeout_s: float = 120.0
    verifier_timeout_s: float = 30.0
    memory_mb: int = 512

    @property
    def content_hash(self) -> str:
        """What makes two tasks the same: instruction, environment and tests; not the name or the seed."""
        digest = hashlib.sha256(self.instruction.encode())
        for kind, files in (("environment", self.files), ("tests", self.tests)):
            for file in sorted(files, key=lambda f: f.path):
                digest.update(f"\0{kind}\0{file.path}\0{file.mode:o}\0{len(file.data)}\0".encode())
                digest.update(file.data)
        return digest.hexdigest()
