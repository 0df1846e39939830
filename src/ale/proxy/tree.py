"""The record of one episode as a tree of turns, each with exactly the tokens that the policy sampled.

A turn hangs below the turn that its prompt goes on from; `fresh_P` are the prompt's tokens in between. A dialogue that
a client sends back is matched against the tree message by message:

- what came from outside (system, user, tool) has to be the same text;
- what the policy said may come back with other white space, JSON written otherwise or without its reasoning. It is then
  still the turn that was sampled, and its sampled tokens are the context, not the client's text. Each such rule that is
  needed is counted;
- the longest match wins. What follows is encoded once; a turn of this episode that stands there, in a new context, goes
  in as the ids that were sampled, without a loss. A text that fits more than one turn and none exactly is not guessed:
  it is encoded as text, and counted.

Axes: P prompt tokens new in a turn, A tokens sampled in it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from ale.messages import Ending
from ale.proxy.dialogue import Entry, Refusal, Said, ToolCall, Want
from ale.proxy.speech import Speech
from ale.proxy.template import ChatTemplate, Slot

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


_NOT_SEEN = Entry("assistant")


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the policy sampled in one turn, piece after piece, and nothing else."""

    tokens_A: Ids
    logp_A: Floats
    logp_sampled_A: Floats
    version_A: Ids

    def __len__(self) -> int:
        return len(self.tokens_A)


@dataclass(eq=False, slots=True)
class Node:
    """A turn. `number` counts the turns of the episode in the order of their ends."""

    number: int
    parent: Node | None
    fresh_P: Ids
    sampled: Sampled
    ended: bool
    """Whether the last sampled token is the end-of-turn token."""
    ending: Ending
    lane: str
    """The session of the policy that generated it: its KV cache ends with this turn, unless another went on."""
    said: Entry = _NOT_SEEN
    children: list[Node] = field(default_factory=list)

    def path(self) -> list[Node]:
        """From the root of the tree to this turn."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def tokens_T(self) -> Ids:
        return np.concatenate([part for node in self.path() for part in (node.fresh_P, node.sampled.tokens_A)])


@dataclass(frozen=True, slots=True)
class Plan:
    """A prompt: what is on record up to `parent`, then `fresh_P`. `digest` identifies the dialogue up to here."""

    parent: Node | None
    fresh_P: Ids
    digest: Any
    raw: bool = False

    def prompt_T(self) -> Ids:
        return self.fresh_P if self.parent is None else np.concatenate([self.parent.tokens_T(), self.fresh_P])


@dataclass(frozen=True, slots=True)
class Branch:
    """One way from the root to a leaf. A turn that several branches share is `owned` by exactly one of them."""

    nodes: tuple[Node, ...]
    owned: frozenset[Node]


class TokenTree:
    """`counts` says which rules were needed, and how often: see `RULES`."""

    def __init__(self, template: ChatTemplate, speech: Speech) -> None:
        self._template = template
        self._speech = speech
        self._by_dialogue: dict[bytes, list[Node]] = {}
        self._by_said: dict[bytes, list[Node]] = {}
        self._raw: list[tuple[Node, str, Ids]] = []
        self.nodes: list[Node] = []
        self.counts: Counter[str] = Counter()

    def plan(self, want: Want) -> Plan:
        """The exact prompt of a request. Raises `Refusal` when the template cannot render the dialogue."""
        if want.prompt is not None:
            return self._plan_raw(want.prompt)
        entries = want.entries
        digest = hashlib.blake2b(orjson.dumps(want.tools), digest_size=16)
        ends: list[tuple[int, bytes]] = []
        for i, entry in enumerate(entries):
            digest.update(_canonical(entry))
            if entry.role == "assistant":
                ends.append((i, digest.digest()))
        parent, start = None, 0
        for i, key in reversed(ends):
            parent = self._choose(self._by_dialogue.get(key, ()), entries[i])
            if parent is not None:
                start = i + 1
                break
        slots = [self._slot(entry) for entry in entries[start:]]
        if parent is None:
            fresh = self._template.opening(slots, want.tools)
        else:
            fresh = self._template.following(slots, ended=parent.ended)
        self._count_branch(parent)
        if want.prefix:
            fresh += self._template.outside(want.prefix)
        return Plan(parent, np.array(fresh, np.int32), digest)

    def add(self, plan: Plan, sampled: Sampled, said: Said | None, *, ending: Ending, ended: bool, lane: str) -> Node:
        """Records a turn. There is at least one sampled token: it is what a turn is. `said` None: nobody saw it."""
        if not len(sampled):
            raise ValueError("a turn without a sampled token is none")
        node = Node(len(self.nodes), plan.parent, plan.fresh_P, sampled, ended, ending, lane)
        self.nodes.append(node)
        if plan.parent is not None:
            plan.parent.children.append(node)
        if plan.raw:
            tokens = node.tokens_T()
            self._raw.append((node, self._template.text(tokens.tolist()), tokens))
            return node
        if said is None:
            return node
        node.said = said.entry
        canonical = _canonical(node.said)
        digest = plan.digest.copy()
        digest.update(canonical)
        self._by_dialogue.setdefault(digest.digest(), []).append(node)
        self._by_said.setdefault(canonical, []).append(node)
        return node

    def branches(self) -> Iterator[Branch]:
        """Every leaf with its path, the oldest first. A shared turn belongs to the branch that goes on the longest."""
        depth: dict[Node, int] = {}
        for node in reversed(self.nodes):  # a child ends after its parent
            depth[node] = 1 + max((depth[child] for child in node.children), default=0)
        heir = {node: max(node.children, key=lambda c: (depth[c], -c.number)) for node in self.nodes if node.children}
        for leaf in self.nodes:
            if leaf.children:
                continue
            path = leaf.path()
            owned = {leaf}
            for parent, child in zip(path[-2::-1], path[:0:-1], strict=True):
                if heir[parent] is not child:
                    break
                owned.add(parent)
            yield Branch(tuple(path), frozenset(owned))

    def _choose(self, candidates: Sequence[Node], entry: Entry) -> Node | None:
        """The turn that an entry is; None when there is none, or when it could be several and is exactly none."""
        if not candidates:
            return None
        differing = [(node, _rules(node.said, entry)) for node in candidates]
        exact = [node for node, rules in differing if not rules]
        if exact:
            if len(exact) > 1:  # said twice in the same words: either is what the client has seen
                self.counts["same_words"] += 1
            return exact[0]
        if len(candidates) > 1:
            self.counts["ambiguous"] += 1
            return None
        node, rules = differing[0]
        self.counts.update(rules)
        return node

    def _slot(self, entry: Entry) -> Slot:
        if entry.role != "assistant":
            return Slot(entry.role, self._template.outside(entry.text))
        node = self._choose(self._by_said.get(_canonical(entry), ()), entry)
        if node is not None:
            self.counts["spliced"] += 1
            return Slot("assistant", node.sampled.tokens_A.tolist(), node.ended)
        self.counts["foreign"] += 1
        text = "\n".join(part for part in (entry.text, self._speech.syntax.write(entry.calls)) if part)
        return Slot("assistant", self._template.outside(text))

    def _plan_raw(self, prompt: str | tuple[int, ...]) -> Plan:
        """A plain completion goes on from the longest recorded text, or ids, that its prompt begins with."""
        parent: Node | None = None
        known: tuple[int, ...] = ()
        tail = prompt
        for node, text, tokens in self._raw:
            if isinstance(prompt, str):
                length = len(text) if prompt.startswith(text) else 0
            else:
                length = len(tokens) if prompt[: len(tokens)] == tuple(tokens.tolist()) else 0
            if len(prompt) - length < len(tail):
                parent, tail = node, prompt[length:]
        if parent is not None and parent.ended and isinstance(prompt, str):
            # The text goes on where the policy had ended it: the same ids, but for the end token.
            known, parent = tuple(parent.tokens_T()[:-1].tolist()), None
            self.counts["spliced"] += 1
        fresh = [*known, *(self._template.outside(tail) if isinstance(tail, str) else tail)]
        if parent is None and not fresh:
            raise Refusal(400, "the prompt is empty", param="prompt")
        self._count_branch(parent)
        return Plan(parent, np.array(fresh, np.int32), None, raw=True)

    def _count_branch(self, parent: Node | None) -> None:
        if parent is None:
            self.counts["forks" if self.nodes else "roots"] += 1
        elif parent.children:
            self.counts["forks"] += 1


RULES = ("white_space", "json", "reasoning_dropped", "call_ids")
"""What a client may change of what the policy said. Beside them, `counts` holds `roots`, `forks`, `spliced` (sampled
ids in a new context), `foreign` (assistant text that no policy of this episode said), `ambiguous` and `same_words`."""


def _rules(said: Entry, sent: Entry) -> list[str]:
    """Which rules it takes to see `said` in `sent`; they are equal up to these already."""
    found = []
    if sent.text != said.text:
        found.append("white_space")
    if said.reasoning and not sent.reasoning:
        found.append("reasoning_dropped")
    if any(a.arguments != b.arguments for a, b in zip(said.calls, sent.calls, strict=True)):
        found.append("json")
    if any(a.id != b.id for a, b in zip(said.calls, sent.calls, strict=True)):
        found.append("call_ids")
    return found


def _canonical(entry: Entry) -> bytes:
    """What of an entry has to agree. Reasoning, ids of calls, and the white space of what was said do not."""
    if entry.role == "assistant":
        parts = [" ".join(entry.text.split()), *(part for c in entry.calls for part in (c.name, _arguments(c)))]
    else:
        parts = [entry.text]
    encoded = [part.encode("utf-8", "surrogatepass") for part in (entry.role, *parts)]
    return b"".join(b"%d:%b" % (len(part), part) for part in encoded) + b";"


def _arguments(call: ToolCall) -> str:
    try:
        return orjson.dumps(orjson.loads(call.arguments), option=orjson.OPT_SORT_KEYS).decode()
    except orjson.JSONDecodeError:
        return " ".join(call.arguments.split())
