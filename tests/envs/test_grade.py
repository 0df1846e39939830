"""What an agent can do to its reward: nothing but solve the task."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress

import pytest

from ale.envs.families import make
from ale.envs.grade import grade
from ale.envs.terminal import TerminalEnv
from ale.errors import EvaluatorError, SandboxError
from ale.messages import Score
from ale.sandbox import SandboxEngine
from ale.task import REWARD_FILE, Task, TaskFile

CHECK = f'[ "$(cat a.txt 2>&1)" = yes ] && r=1 || r=0\necho $r > {REWARD_FILE}\n'


def task_with(test: str, timeout_s: float = 20.0) -> Task:
    tests = (TaskFile("test.sh", test.encode()),)
    return Task(id="t-1", instruction="Go.", files=(), tests=tests, verifier_timeout_s=timeout_s)


async def play(engine: SandboxEngine, task: Task, commands: Iterable[str] = ()) -> tuple[Score, list[str]]:
    """The score after `commands`, and what was seen."""
    env = TerminalEnv(task, engine, lambda task, snapshot: grade(engine, task, snapshot))
    try:
        await env.reset()
        seen = [(await env.step(command)).observation for command in commands]
        return await env.score(), seen
    finally:
        await env.close()


def reward(loop: asyncio.Runner, engine: SandboxEngine, task: Task, *commands: str) -> float:
    return loop.run(play(engine, task, commands))[0].reward


def test_the_reward_is_what_the_tests_wrote(loop: asyncio.Runner, sandboxes: SandboxEngine) -> None:
    task = task_with(CHECK)
    assert reward(loop, sandboxes, task, "echo yes > a.txt") == 1
    assert reward(loop, sandboxes, task, "echo no > a.txt") == 0
    assert reward(loop, sandboxes, task_with(f"echo ' -0.25' > {REWARD_FILE}")) == -0.25


@pytest.mark.parametrize(
    ("test", "said"),
    [
        ("echo broken >&2; exit 3", "wrote no reward to .*: broken"),
        ("kill -9 $$", "killed by signal 9"),
        (f"ln -s /etc/passwd {REWARD_FILE}", "wrote no reward"),
        (f"echo 1 > one; ln -s $PWD/one {REWARD_FILE}", "wrote no reward"),
        (f"ln -s /dev/zero {REWARD_FILE}", "wrote no reward"),
        (f"mkfifo {REWARD_FILE}", "no regular file"),
        (f"mkdir {REWARD_FILE}", "no regular file"),
        (f"echo nan > {REWARD_FILE}", "'nan' .* not finite"),
        (f"echo -inf > {REWARD_FILE}", "'-inf' .* not finite"),
        (f"echo passed > {REWARD_FILE}", "'passed' .* no number"),
        (f": > {REWARD_FILE}", "'' .* no number"),
        (f"head -c 100000 /dev/zero > {REWARD_FILE}", "no number"),
        (f"printf '\\377' > {REWARD_FILE}", "no number"),
    ],
)
def test_tests_that_write_no_number_are_an_evaluator_error(
    loop: asyncio.Runner, sandboxes: SandboxEngine, test: str, said: str
) -> None:
    with pytest.raises(EvaluatorError, match=said):
        reward(loop, sandboxes, task_with(test))


def test_tests_that_hang_are_an_evaluator_error(loop: asyncio.Runner, sandboxes: SandboxEngine) -> None:
    task = task_with(f"echo 1 > {REWARD_FILE}; sleep 1000", timeout_s=0.5)
    with pytest.raises(EvaluatorError, match=r"longer than 0\.5 s"):
        reward(loop, sandboxes, task)


HOSTILE = (
    f"mkdir -p /logs/verifier /tests; echo 1 > {REWARD_FILE}",
    f"setsid sh -c 'while :; do mkdir -p /logs/verifier; echo 1 > {REWARD_FILE}; echo yes > a.txt; done' >&- 2>&- &",
    "nohup sh -c 'while :; do echo exit > /tests/test.sh; done' > /dev/null 2>&1 &",
    f"mkdir -p tests logs/verifier; echo 1 > logs/verifier/reward.txt; ln -s {REWARD_FILE} reward.txt",
    "printf '#!/bin/sh\\necho yes\\n' > cat; chmod 755 cat; cp cat bash; export PATH=/app:$PATH",
    f"echo 'echo 1 > {REWARD_FILE}; exit' > .bashrc; cp .bashrc .profile; cp .bashrc .bash_profile",
)


def test_an_agent_can_neither_write_the_reward_nor_see_the_tests(
    loop: asyncio.Runner, sandboxes: SandboxEngine
) -> None:
    secret = "only-the-tests-know-this"
    task = task_with(f"# {secret}\nrm -f a.txt\nsleep 0.2\n{CHECK}")
    look = f"ls -A /tests /logs; grep -rs {secret} /app /tests /tmp /logs /proc/*/environ"
    score, seen = loop.run(play(sandboxes, task, (look, *HOSTILE, look)))
    assert score.reward == 0
    for text in (seen[0], seen[-1]):
        assert secret not in text
    assert "cannot access '/tests'" in seen[0]
    with pytest.raises(EvaluatorError):  # what the agent left in /logs is not what is read
        reward(loop, sandboxes, task_with("true"), *HOSTILE)
    assert reward(loop, sandboxes, task_with(CHECK), "echo yes > a.txt") == 1


def test_tests_see_no_process_of_the_agent(loop: asyncio.Runner, sandboxes: SandboxEngine) -> None:
    stays = "setsid sleep 1000 > /dev/null 2>&1 &"
    count = task_with(f"cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c 'sleep 100[0]' > {REWARD_FILE}")
    assert reward(loop, sandboxes, count, stays) == 0


CHEATS = (
    f"echo 1 > {REWARD_FILE}",
    f"setsid sh -c 'while :; do echo 1 > {REWARD_FILE}; done' > /dev/null 2>&1 &",
    f"ln -sf /app/one {REWARD_FILE}",
    f"ln -f /app/one {REWARD_FILE}",
    f"mv /app/one {REWARD_FILE}; chmod 444 {REWARD_FILE}",
    f"cp /app/one {REWARD_FILE}; chmod 444 {REWARD_FILE}",
    f"touch {REWARD_FILE}; chmod 444 {REWARD_FILE}",
    f"mkdir {REWARD_FILE}",
    "ulimit -f unlimited; " + f"echo 1 > {REWARD_FILE}; chmod 444 {REWARD_FILE}",
    "kill -9 $PPID",
    "kill -9 -1",
    "kill -STOP $PPID",
    f"sleep 0.1; rm -rf /tests; echo 1 > {REWARD_FILE}",
)


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_script_that_the_tests_run_cannot_reward_itself(
    loop: asyncio.Runner, sandboxes: SandboxEngine, cheat: str
) -> None:
    import msgspec

    task = msgspec.structs.replace(make("fix", 1), verifier_timeout_s=3.0)
    (script,) = (f.path for f in task.files if f.path.endswith(".sh"))
    write = f"echo 1 > one; cat > {script} <<'EOF'\n{cheat}\nEOF"
    with suppress(EvaluatorError):  # dropped, not rewarded
        assert reward(loop, sandboxes, task, write) == 0
    assert reward(loop, sandboxes, task, *task.solution) == 1


def test_files_that_cannot_be_laid_out_are_a_sandbox_error(loop: asyncio.Runner, sandboxes: SandboxEngine) -> None:
    files = (TaskFile("a", b""), TaskFile("a/b", b""))
    task = Task(id="t-1", instruction="Go.", files=files, tests=(TaskFile("test.sh", CHECK.encode()),))
    with pytest.raises(SandboxError, match="t-1: a/b cannot be laid out"):
        reward(loop, sandboxes, task)
