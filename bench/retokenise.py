"""What tokenising an agent's history again would do to its action tokens, on episodes of an agent as it is.

    python -m bench.retokenise examples/mini_swe_agent/train.toml runs/mini_swe_agent/checkpoints/final --tasks 50

Plays held-out tasks at the temperature of training. `changed` counts the action tokens on record that are not those
that the engine returned for exactly the prompt before them: it has to be 0. `naive` is what training on messages would
see: the text of the episode, tokenised.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from ale.config import RunConfig
from ale.config_file import load
from ale.envs.families import make_splits
from ale.envs.grade import grade
from ale.envs.terminal import TerminalEnv
from ale.messages import Generate, OpenEngine, Rollout, Sampling, Trajectory, Turn
from ale.models.load import load_tokenizer
from ale.policy.embedded import open_embedded
from ale.policy.port import Policy
from ale.proxy.command import open_command_agent
from ale.sandbox import Mount, open_engine
from ale.task import Task


class Watched:
    """A policy that remembers every turn by the prompt it continued."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.said: dict[bytes, list[Turn]] = {}

    @property
    def version(self) -> int:
        return self._policy.version

    async def generate(self, request: Generate) -> Turn:
        turn = await self._policy.generate(request)
        self.said.setdefault(request.prompt_T.numpy().tobytes(), []).append(turn)
        return turn

    async def end_session(self, session: str) -> None:
        await self._policy.end_session(session)

    async def load_weights(self, version: int, slot: int) -> None:
        await self._policy.load_weights(version, slot)


def changed(t: Trajectory, policy: Watched) -> int:
    """Action tokens that the engine did not return for the prompt in front of them."""
    tokens, wrong = t.tokens_T.numpy(), 0
    for chunk in t.chunks:
        mine = tokens[chunk.start : chunk.end]
        turns = policy.said.get(tokens[: chunk.start].tobytes(), [])
        same = any(len(turn.tokens_A) == len(mine) and (turn.tokens_A.numpy() == mine).all() for turn in turns)
        wrong += 0 if same else len(mine)
    return wrong


def naive(t: Trajectory, tokenizer: Any) -> int:
    """Action tokens in chunks whose text has other tokens when it is tokenised again."""
    tokens, differ = t.tokens_T.numpy().tolist(), 0
    for chunk in t.chunks:
        ids = tokens[chunk.start : chunk.end]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        differ += len(ids) if tokenizer(text, add_special_tokens=False).input_ids != ids else 0
    return differ


async def play(
    config: RunConfig, model: Path, tasks: Sequence[Task], mounts: tuple[Mount, ...]
) -> tuple[list[Trajectory], Watched]:
    box = config.sandbox
    settings = OpenEngine(
        model=str(model), weights_fd=None, slots=1, threads=config.model.threads, rows=config.rollout.concurrency
    )
    room = asyncio.Semaphore(config.rollout.concurrency)
    async with open_engine("local") as sandboxes, open_embedded(settings) as policy:
        watched = Watched(policy)

        def environment(task: Task) -> TerminalEnv:
            return TerminalEnv(
                msgspec.structs.replace(task, memory_mb=box.memory_mb),
                sandboxes,
                lambda task, snapshot: grade(sandboxes, task, snapshot),
                pids=box.pids,
                mounts=mounts,
            )

        async with open_command_agent(watched, load_tokenizer(model), environment, config) as program:

            async def one(number: int, task: Task) -> Trajectory:
                sampling = Sampling(temperature=config.rollout.temperature, seed=number << 20)
                async with room:
                    return await program.play(Rollout(id=f"r/{number}", group="r", task=task, sampling=sampling))

            async with asyncio.TaskGroup() as group:
                running = [group.create_task(one(i, task), name=task.id) for i, task in enumerate(tasks)]
    return [task.result() for task in running], watched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tasks", type=int, default=50)
    given = parser.parse_args()
    config = load(given.config)
    tasks = make_splits(given.tasks, 0, config.tasks.seed, config.tasks.only).heldout
    mounts = tuple(Mount(os.path.abspath(source), target) for source, target in config.agent.mounts.items())
    played, policy = asyncio.run(play(config, given.model, tasks, mounts))
    tokenizer = load_tokenizer(given.model)
    sequences = [(t, s) for t in played for s in t.sequences]
    differing = {t.id for t, s in sequences if naive(s, tokenizer)}
    result = {
        "episodes": len(played),
        "scored": sum(t.status == "scored" for t in played),
        "solved": sum((t.reward or 0) > 0 for t in played),
        "action_tokens": sum(t.action_tokens for t in played),
        "changed": sum(changed(s, policy) for _, s in sequences),
        "naive_tokens": sum(naive(s, tokenizer) for _, s in sequences),
        "naive_episodes": len(differing),
        "causes": sorted({f"{t.status}: {t.cause}" for t in played if t.cause}),
    }
    print(json.dumps(result, indent=2))
    if result["changed"]:
        raise SystemExit(f"{result['changed']} action tokens are not those that were sampled")


if __name__ == "__main__":
    main()
