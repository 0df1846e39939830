"""Whatever an agent does, what is on record is what the engine sampled, and each token of it is trained on once."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from typing import Any

import httpx
import numpy as np
import openai
from hypothesis import given, settings
from hypothesis import strategies as st

from ale.messages import Rollout, Sampling
from ale.proxy.episode import Episode
from ale.proxy.sequences import trajectory
from ale.proxy.server import Proxy, train_mode
from ale.task import Task
from ale.testing.random_policy import RandomPolicy

from .conftest import TAGS_TEMPLATE, THINKING_TEMPLATE, TOOLS

TASK = Task(id="t", instruction="Go.", files=(), tests=())


def sequences(episode: Episode) -> tuple[Any, ...]:
    assert episode.tree is not None
    rollout = Rollout(id=episode.id, group="g", task=TASK, sampling=Sampling())
    whole = trajectory(
        episode.tree, rollout, reward=1.0, status="scored", cause=None, started_version=0, duration_s=1.0
    )
    return whole.sequences if episode.tree.nodes else ()


def check_record(episode: Episode, policy: RandomPolicy) -> None:
    """Every token of every turn is one that the engine returned for exactly the prompt before it, and the books add
    up: sampled = in a turn + behind a stop; each turn in exactly one sequence."""
    assert episode.tree is not None
    pool: dict[bytes, list[Any]] = {}
    for request, turn in policy.log:
        pool.setdefault(request.prompt_T.data, []).append(turn)
    behind = 0
    for node in episode.tree.nodes:
        path = node.tokens_T()
        at = len(path) - len(node.sampled)
        taken = 0
        while taken < len(node.sampled):
            waiting = pool[path[: at + taken].tobytes()]
            rest = node.sampled.tokens_A[taken:]
            piece = next(t for t in waiting if (t.tokens_A.numpy()[: len(rest)] == rest[: len(t.tokens_A)]).all())
            waiting.remove(piece)
            kept = min(len(rest), len(piece.tokens_A))
            window = slice(taken, taken + kept)
            np.testing.assert_array_equal(node.sampled.logp_A[window], piece.logp_A.numpy()[:kept])
            np.testing.assert_array_equal(node.sampled.version_A[window], piece.version_A.numpy()[:kept])
            behind += len(piece.tokens_A) - kept
            taken += kept
    assert all(not left for left in pool.values()), "the engine sampled what no turn holds"
    sampled = sum(len(turn.tokens_A) for _, turn in policy.log)
    assert sampled == episode.usage.sampled
    assert behind == episode.usage.after_stop
    assert sampled == sum(len(node.sampled) for node in episode.tree.nodes) + behind

    owners = Counter(node for branch in episode.tree.branches() for node in branch.owned)
    assert owners == Counter(episode.tree.nodes)
    whole = sequences(episode)
    assert len({t.id for t in whole}) == len(whole)
    trained = 0
    for t in whole:
        length = sum(chunk.end - chunk.start for chunk in t.chunks)
        assert length == len(t.logp_A) == len(t.logp_sampled_A) == len(t.version_A)
        assert all(0 < chunk.start < chunk.end <= len(t.tokens_T) for chunk in t.chunks)
        assert all(a.end <= b.start for a, b in zip(t.chunks, t.chunks[1:], strict=False))
        trained += length
    assert trained == sampled - behind


class Agent:
    """Does what agents do, at random: `step` is one act on one of its lines of history."""

    def __init__(self, client: openai.AsyncOpenAI, rng: random.Random) -> None:
        self.client = client
        self.rng = rng
        self.lines: list[list[Any]] = [[{"role": "user", "content": "Go."}]]
        self.seen: list[Any] = []
        """What the policy said, as this agent saw it."""

    async def step(self, act: str) -> None:
        rng = self.rng
        line = rng.choice(self.lines)
        if act == "append":
            await self.ask(line)
        elif act == "parallel":
            other = [*line]
            self.lines.append(other)
            await asyncio.gather(self.ask(line), self.ask(other))
        elif act == "retry":
            await self.request(line)  # as if the answer had been lost
            await self.ask(line)
        elif act == "edit":
            other = [dict(m) for m in line]
            rng.choice(other)["content"] = f"edited {rng.random()}"
            self.lines.append(other)
            await self.ask(other)
        elif act == "fork":
            own = [i for i, m in enumerate(line) if m["role"] == "assistant"]
            other = [*line[: rng.choice(own)], {"role": "user", "content": "Otherwise."}] if own else [*line]
            self.lines.append(other)
            await self.ask(other)
        elif act == "compact":
            line[:] = [{"role": "user", "content": f"So far: {len(line)}"}, *line[-2:]]
            while len(line) > 1 and line[1]["role"] == "tool":
                del line[1]
            await self.ask(line)
        elif act == "sub-agent":
            self.lines.append([{"role": "system", "content": "You help."}, {"role": "user", "content": "Look."}])
            await self.ask(self.lines[-1])
        elif act == "white space":
            for message in line:
                if message["role"] == "assistant" and message.get("content"):
                    message["content"] = " " + "  ".join(message["content"].split()) + "\n"
                for call in message.get("tool_calls") or ():
                    call["function"]["arguments"] = json.dumps(json.loads(call["function"]["arguments"]), indent=2)
            await self.ask(line)
        elif act == "foreign":
            line += [{"role": "assistant", "content": "I made that up."}, {"role": "user", "content": "Really?"}]
            await self.ask(line)
        elif act == "choices":
            answer = await self.request(line, n=3)
            self.answered(line, answer, rng.randrange(3))
        elif act == "stop":
            await self.ask(line, stop=["e", "oak"])
        elif act == "stream":
            stream = await self.request(line, stream=True)
            async for _ in stream:
                pass
        elif act == "abort":
            asking = asyncio.ensure_future(self.request(line, stream=True))
            for _ in range(rng.randrange(1, 60)):
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def ask(self, line: list[Any], **options: Any) -> None:
        self.answered(line, await self.request(line, **options), 0)

    async def request(self, line: list[Any], **options: Any) -> Any:
        tools = {"tools": TOOLS} if self.rng.random() < 0.5 else {}
        return await self.client.chat.completions.create(
            model="m", messages=line, max_tokens=self.rng.randrange(4, 60), **tools, **options
        )

    def answered(self, line: list[Any], answer: Any, choice: int) -> None:
        message = answer.choices[choice].message
        line.append(message.model_dump(include={"role", "content", "tool_calls"}, exclude_none=True))
        results = [{"role": "tool", "content": "ok", "tool_call_id": c.id} for c in message.tool_calls or ()]
        line += results or [{"role": "user", "content": self.rng.choice(["Go on.", "No.", "<|end|> you say"])}]


ACTS = (
    "append",
    "append",
    "append",
    "parallel",
    "retry",
    "edit",
    "fork",
    "compact",
    "sub-agent",
    "white space",
    "foreign",
    "choices",
    "stop",
    "stream",
    "abort",
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(acts=st.lists(st.sampled_from(ACTS), min_size=1, max_size=14), seed=st.integers(0, 2**32))
def test_every_token_on_record_is_one_that_was_sampled_and_is_trained_once(
    nano_path: Any, acts: list[str], seed: int
) -> None:
    policy, proxy = made(nano_path, (None, TAGS_TEMPLATE, THINKING_TEMPLATE)[seed % 3])

    async def scenario() -> None:
        async with proxy.episode("g/0", sampling=Sampling(seed=seed % 1000)) as episode:
            http = httpx.AsyncClient(transport=httpx.ASGITransport(proxy.app))  # type: ignore[arg-type]
            async with openai.AsyncOpenAI(
                base_url="http://proxy/v1", api_key=episode.key, max_retries=0, http_client=http
            ) as client:
                agent = Agent(client, random.Random(seed))
                for act in acts:
                    await agent.step(act)
            assert not episode.busy_lanes
        check_record(episode, policy)

    asyncio.run(scenario())


_MADE: dict[str, Any] = {}


def made(path: Any, template: str | None) -> tuple[RandomPolicy, Proxy]:
    from ale.models.load import load_tokenizer

    tokenizer = _MADE.setdefault(str(template), load_tokenizer(path))
    if template is not None:
        tokenizer.chat_template = template
    calls = tokenizer('<tool_call>{"name": "bash", "arguments": {"command": "ls"}}</tool_call>').input_ids
    fence = tokenizer("```bash\nls\n```").input_ids
    thought = tokenizer("<think>oak</think>").input_ids
    policy = RandomPolicy([*range(len(tokenizer) - 2), *calls, *fence, *thought], tokenizer.eos_token_id)
    return policy, Proxy(train_mode(policy, tokenizer, places=2), "m")
