"""The embedded engine: continuous batching over a transformers causal LM, with a KV cache kept across turns.

`add` a request, then call `step` until its `Turn` comes back. One step computes the tokens that are not yet in the
cache (a new prompt, an observation) and then one new token for every running sequence. Sequences join and leave
between steps. What several sequences have in common at their beginning (the prompt of a group) is computed once.

A change of weights takes effect between two tokens: the next one is computed under the new weights from a cache that
is recomputed under them, so that each token's log-probability belongs to exactly one policy version.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ale.errors import ModelError, PolicyError
from ale.kernels.routing_replay import count_experts, record_routing
from ale.messages import EngineStatistics, Finish, Generate, Sampling, Turn
from ale.models.load import hidden_states
from ale.policy.attention import FlatCache
from ale.policy.fused import flat_hidden_states, fuse
from ale.policy.kv_cache import KVRows, RowsCache
from ale.policy.sampler import sample, uniform
from ale.wire import Array

_PREFILL_TOKENS = 4096  # padded tokens in one prefill: bounds memory and how long running sequences wait
_SHARED_TOKENS = 16  # a common beginning shorter than this is computed again rather than waited for

Experts = npt.NDArray[np.integer[Any]]  # [L, J]: what each layer with experts chose at one position


@dataclass(slots=True)
class _Sequence:
    number: int
    request: Generate
    tokens: list[int]
    prompt: int
    cached: int = 0
    logp: list[float] = field(default_factory=list)
    logp_sampled: list[float] = field(default_factory=list)
    version: list[int] = field(default_factory=list)
    experts: list[Experts] = field(default_factory=list)  # of every cached position, where routing is recorded

    @property
    def missing(self) -> int:
        """Tokens that are not in the cache yet."""
        return len(self.tokens) - self.cached

    @property
    def finish(self) -> Finish | None:
        if len(self.tokens) == self.prompt:
            return None
        if self.tokens[-1] in self.request.sampling.stop:
            return "stop"
        return "length" if len(self.tokens) - self.prompt >= self.request.sampling.max_tokens else None

    def turn(self, finish: Finish) -> Turn:
        return Turn(
            tokens_A=Array.of(self.tokens[self.prompt :], "int32"),
            logp_A=Array.of(self.logp, "float32"),
            logp_sampled_A=Array.of(self.logp_sampled, "float32"),
            version_A=Array.of(self.version, "int32"),
            finish=finish,
            experts_TLJ=Array.of(np.stack(self.experts)) if self.experts else None,
        )


@dataclass(slots=True)
class _Parked:
    tokens: list[int]  # those whose keys and values are in `cache`
    cache: Tensor
    experts: list[Experts]


class Engine:
    """Not thread-safe, never blocks on anything but arithmetic. `rows` bounds how many sequences run at once.

    Takes the model over: its large products go through packed copies of the weights, those of its body in `precision`
    (None: that of the model, in which everything else stays). Call `set_version` after any change of the weights. With
    `record_routing` every turn carries the experts that its cache was computed with; `ModelError` for a model that has
    none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rows: int = 64,
        parked: int = 1024,
        precision: torch.dtype | None = None,
        record_routing: bool = False,
    ) -> None:
        if record_routing and not count_experts(model):
            raise ModelError(
                f"algorithm.routing_replay: {type(model).__name__} has no experts to record; leave it out or false."
            )
        self._record_routing = record_routing
        self._experts_dtype = torch.uint8 if count_experts(model) <= 256 else torch.int16
        self.model = model.eval()
        self.version = 0
        self._cache = KVRows(model.config, rows, model.dtype)
        self.fused = fuse(model, precision or model.dtype)
        self._rows = rows
        self._running: list[_Sequence] = []  # the index is the row
        self._waiting: deque[_Sequence] = deque()
        self._parked: OrderedDict[str, _Parked] = OrderedDict()
        self._parked_limit = parked
        self._generated = self._prefilled = self._reused = self._recomputed = 0

    def add(self, number: int, request: Generate) -> None:
        """Queues a request; `number` comes back with its turn. Raises `PolicyError` for a prompt it cannot run."""
        tokens = request.prompt_T.numpy().tolist()
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if not tokens:
            raise PolicyError("Generate.prompt_T is empty: a prompt needs at least one token")
        if limit and len(tokens) + request.sampling.max_tokens > limit:
            raise PolicyError(
                f"{len(tokens)} prompt tokens and up to {request.sampling.max_tokens} new ones exceed the model's "
                f"{limit} positions"
            )
        if min(tokens) < 0 or max(tokens) >= self.model.config.vocab_size:
            raise PolicyError(f"Generate.prompt_T holds ids outside 0..{self.model.config.vocab_size - 1}")
        _check(request.sampling)
        self._waiting.append(_Sequence(number, request, tokens, len(tokens)))

    @torch.inference_mode()  # rows made in this mode can only be moved in it
    def end_session(self, session: str) -> list[int]:
        """Forgets a session. Returns the numbers of its requests that will not be answered."""
        self._parked.pop(session, None)
        dropped = [s.number for s in (*self._running, *self._waiting) if s.request.session == session]
        self._waiting = deque(s for s in self._waiting if s.request.session != session)
        for row in reversed(range(len(self._running))):
            if self._running[row].request.session == session:
                self._leave(row, park=False)
        return dropped

    def set_version(self, version: int) -> None:
        """Call after the model's weights have changed: what the cache holds belongs to the old ones."""
        self.version = version
        self.fused.pack()
        self._parked.clear()
        for sequence in self._running:
            self._recomputed += sequence.cached
            sequence.cached = 0
            sequence.experts.clear()

    @property
    def busy(self) -> bool:
        return bool(self._running or self._waiting)

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(
            version=self.version,
            running=len(self._running),
            waiting=len(self._waiting),
            parked=len(self._parked),
            generated_tokens=self._generated,
            prefilled_tokens=self._prefilled,
            reused_tokens=self._reused,
            recomputed_tokens=self._recomputed,
        )

    @torch.inference_mode()
    def step(self, moved: Callable[[], None] = lambda: None) -> list[tuple[int, Turn]]:
        """Advances every running sequence by one token; returns the turns that this finished. After new weights, and
        where many prompts come at once, that is many forwards: `moved` is called after each."""
        while self._waiting and len(self._running) < self._rows:
            self._join(self._waiting.popleft())
        left = list(range(len(self._running)))
        while left:
            first, left = self._without_overlap(left)
            for rows in self._batches(first):
                self._forward(rows)
                moved()
            for row in left:
                self._borrow(row)
        done = []
        for row in reversed(range(len(self._running))):
            sequence = self._running[row]
            finish = sequence.finish
            if finish is not None:
                done.append((sequence.number, sequence.turn(finish)))
                self._leave(row, park=True)
        return done

    def _join(self, sequence: _Sequence) -> None:
        row = len(self._running)
        self._running.append(sequence)
        parked = self._parked.pop(sequence.request.session, None)
        if parked is not None:
            # At least one token is computed anew: its logits are what the next token is drawn from.
            shared = _common_prefix(parked.tokens, sequence.tokens[:-1])
            if shared:
                self._cache.reserve(shared)
                self._cache.unpark(row, parked.cache, shared)
                sequence.cached = shared
                sequence.experts = parked.experts[:shared]
                self._reused += shared
        self._borrow(row)

    def _borrow(self, row: int) -> None:
        """Copies the keys and values of the longest beginning that another running sequence has computed."""
        sequence, prompt = self._running[row], self._running[row].tokens[:-1]
        found = [(_common_prefix(s.tokens[: s.cached], prompt), source) for source, s in enumerate(self._running)]
        shared, source = max(found)
        if shared - sequence.cached >= _SHARED_TOKENS:
            self._cache.copy(source, row, shared)
            self._reused += shared - sequence.cached
            sequence.cached = shared
            sequence.experts = self._running[source].experts[:shared]

    def _without_overlap(self, rows: list[int]) -> tuple[list[int], list[int]]:
        """Rows to compute now, and those that will find part of what they need computed by one of them."""
        first: list[int] = []
        rest: list[int] = []
        prompts: list[int] = []
        for row in rows:
            sequence = self._running[row]
            if sequence.missing == 1:
                first.append(row)
                continue
            prompt = sequence.tokens[:-1]
            overlaps = (_common_prefix(self._running[other].tokens, prompt) - sequence.cached for other in prompts)
            if any(n >= _SHARED_TOKENS for n in overlaps):
                rest.append(row)
            else:
                first.append(row)
                prompts.append(row)
        return first, rest

    def _leave(self, row: int, *, park: bool) -> None:
        sequence = self._running[row]
        if park and sequence.cached:
            keys_values = self._cache.park(row, sequence.cached)
            parked = _Parked(sequence.tokens[: sequence.cached], keys_values, sequence.experts)
            self._parked[sequence.request.session] = parked
            if len(self._parked) > self._parked_limit:
                self._parked.popitem(last=False)
        last = len(self._running) - 1
        if row != last:
            self._cache.copy(last, row, self._running[last].cached)
            self._running[row] = self._running[last]
        self._running.pop()

    def _batches(self, rows: list[int]) -> list[list[int]]:
        """What one forward computes: rows of any length together where nothing is padded, else of similar length; each
        within the token budget."""
        batches: list[list[int]] = []
        tokens = width = 0  # of the last batch
        for row in sorted(rows, key=lambda r: self._running[r].missing):
            missing = self._running[row].missing
            if batches and self.fused.flat:
                joins, tokens = True, tokens + missing
            elif batches:  # one token a row is a shape of its own
                joins, tokens = missing == 1 or width > 1, (len(batches[-1]) + 1) * missing
            else:
                joins = False
            if joins and tokens <= _PREFILL_TOKENS:
                batches[-1].append(row)
            else:
                batches.append([row])
                tokens = missing
            width = missing
        return [sorted(batch) for batch in batches]

    def _states(self, rows: list[int], sequences: list[_Sequence], count_B: list[int]) -> Tensor:
        """The last hidden state of each row [B, D], of its uncached tokens; the cache is filled."""
        start_B = [s.cached for s in sequences]
        if self.fused.flat:
            flat = FlatCache(self._cache, rows, start_B, count_B)
            ids_N = torch.tensor([token for s in sequences for token in s.tokens[s.cached :]])
            return flat_hidden_states(self.model, ids_N, flat)[torch.tensor(count_B).cumsum(0) - 1]
        width = max(count_B)
        cache = RowsCache(self._cache, rows, start_B, count_B)
        ids_BQ = torch.tensor(
            [s.tokens[s.cached :] + [0] * (width - n) for s, n in zip(sequences, count_B, strict=True)]
        )
        end = max(s + n for s, n in zip(start_B, count_B, strict=True))
        # Padding after a long row must not pass the model's last position.
        position_BQ = (torch.tensor(start_B)[:, None] + torch.arange(width)).clamp(max=end - 1)
        output = hidden_states(
            self.model,
            input_ids=ids_BQ,
            position_ids=position_BQ,
            attention_mask=(torch.arange(end) <= position_BQ[:, :, None])[:, None],
            use_cache=True,
            cache=cache,
        )
        states_BD: Tensor = output.last_hidden_state[torch.arange(len(rows)), torch.tensor(count_B) - 1]
        return states_BD

    def _forward(self, rows: list[int]) -> None:
        """Computes the uncached tokens of these rows and samples the next token of each."""
        sequences = [self._running[row] for row in rows]
        count_B = [s.missing for s in sequences]
        with record_routing(self.model) if self._record_routing else nullcontext() as routing:
            last_BD = self._states(rows, sequences, count_B)
        if routing is not None:
            self._keep(routing.take(), sequences, count_B)
        logits_BV = self.model.get_output_embeddings()(last_BD)
        settings = [s.request.sampling for s in sequences]
        uniform_B = np.array([uniform(s.request.sampling.seed, len(s.tokens)) for s in sequences])
        token_B, logp_B, logp_sampled_B = sample(logits_BV, settings, uniform_B)
        for sequence, token, logp, logp_sampled, count in zip(
            sequences, token_B.tolist(), logp_B.tolist(), logp_sampled_B.tolist(), count_B, strict=True
        ):
            sequence.cached += count
            sequence.tokens.append(token)
            sequence.logp.append(logp)
            sequence.logp_sampled.append(logp_sampled)
            sequence.version.append(self.version)
            if count > 1:
                self._prefilled += count
        self._generated += len(rows)

    def _keep(self, experts_LBQJ: Tensor, sequences: list[_Sequence], count_B: list[int]) -> None:
        experts_BQLJ = experts_LBQJ.permute(1, 2, 0, 3).to(self._experts_dtype).numpy()
        own = np.split(experts_BQLJ[0], np.cumsum(count_B)[:-1]) if self.fused.flat else experts_BQLJ
        for sequence, experts_QLJ, count in zip(sequences, own, count_B, strict=True):
            sequence.experts += list(experts_QLJ[:count])


def _check(sampling: Sampling) -> None:
    for name, holds, expected in (
        ("max_tokens", sampling.max_tokens >= 1, "at least 1"),
        ("temperature", 0 <= sampling.temperature < math.inf, "0 (greedy) or a positive number"),
        ("top_p", 0 < sampling.top_p <= 1, "above 0 and at most 1"),
        ("top_k", sampling.top_k is None or sampling.top_k >= 1, "None (off) or at least 1"),
    ):
        if not holds:
            raise PolicyError(f"Sampling.{name}: expected {expected}, got {getattr(sampling, name)}")


def _common_prefix(a: list[int], b: list[int]) -> int:
    """Length of the common beginning, by bisection: comparing slices is far faster than a loop over tokens."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
