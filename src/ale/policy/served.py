"""A policy over vLLM servers: sessions stay with a replica, turns outlive its death, every token has its version.

A turn that a dying server broke off is taken up by another, or by itself started again: from the tokens that had
arrived, where they are all of one version, else from its beginning.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ale.errors import DeadlineExceeded, PolicyError, WorkerDied
from ale.messages import EngineStatistics, Finish, Generate, Sampling, Turn
from ale.policy.replica import Replica, Weights
from ale.policy.vllm_client import Piece, ServerGone, Span
from ale.wire import Array

logger = logging.getLogger(__name__)

_ATTEMPTS = 8
_STREAM_INTERVAL = 8  # tokens in a piece: each costs the controller about as much as its tokens
_STATISTICS_DEADLINE_S = 10.0
_SEED_BITS = (1 << 63) - 1

Export = Callable[[int], Awaitable[Weights]]
"""Writes the learner's weights, which are those of this version, where the servers can read them."""


@dataclass
class _Sampled:
    """Tokens with what is known of them."""

    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    version: list[int] = field(default_factory=list)

    def add(self, tokens: Sequence[int], logp: Sequence[float], version: Sequence[int]) -> None:
        self.tokens += tokens
        self.logp += logp
        self.version += version

    def finish(self, sampling: Sampling) -> Finish | None:
        if self.tokens and self.tokens[-1] in sampling.stop:
            return "stop"
        return "length" if len(self.tokens) >= sampling.max_tokens else None

    def turn(self, finish: Finish) -> Turn:
        logp_A = Array.of(self.logp, "float32")
        return Turn(
            tokens_A=Array.of(self.tokens, "int32"),
            logp_A=logp_A,
            logp_sampled_A=logp_A,
            version_A=Array.of(self.version, "int32"),
            finish=finish,
        )


@dataclass
class _Call:
    """A turn being generated: `end_session` ends it through its deadline."""

    scope: asyncio.Timeout
    ended: bool = False


class ServedPolicy:
    """A `Policy`. Its deadlines bound a turn, and a change of weights, with the restart of a server in it."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        export: Export | None,
        *,
        turn_deadline_s: float,
        sync_deadline_s: float,
    ) -> None:
        self.version = 0
        self.reissued = 0
        """Turns, or rests of them, that were asked for again because a server was gone."""
        self.sampled_again = 0
        """Tokens that had arrived and were given up with it."""
        self._replicas = list(replicas)
        self._export = export
        self._turn_deadline_s = turn_deadline_s
        self._sync_deadline_s = sync_deadline_s
        self._home: dict[str, Replica] = {}
        self._calls: dict[str, list[_Call]] = {}

    async def generate(self, request: Generate) -> Turn:
        _check(request)
        session = request.session
        call = _Call(asyncio.timeout(self._turn_deadline_s))
        self._calls.setdefault(session, []).append(call)
        try:
            async with call.scope:
                return await self._sample(request)
        except TimeoutError as error:
            if call.ended:
                raise PolicyError(f"session {session} was ended") from error
            if not call.scope.expired():
                raise
            where = self._home[session].name if session in self._home else "a vLLM server"
            raise DeadlineExceeded(f"a turn of {session} by {where}", self._turn_deadline_s) from error
        finally:
            self._calls[session].remove(call)
            if not self._calls[session]:
                del self._calls[session]

    async def end_session(self, session: str) -> None:
        self._home.pop(session, None)
        now = asyncio.get_running_loop().time()
        for call in self._calls.get(session, ()):
            call.ended = True
            if not call.scope.expired():
                call.scope.reschedule(now)

    async def load_weights(self, version: int, slot: int) -> None:
        """Whatever the slot: the weights go by file, and the learner's own are those of `version`."""
        if self._export is None:
            raise PolicyError("these servers were opened without a learner: there are no weights to load")
        deadline_s = self._sync_deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                weights = await self._export(version)
                for replica in self._replicas:
                    replica.want(weights)
                async with asyncio.TaskGroup() as group:
                    for replica in self._replicas:
                        group.create_task(replica.until_live(version), name=f"version {version} to {replica.name}")
        except TimeoutError as error:
            late = [r.name for r in self._replicas if r.version != version]
            raise DeadlineExceeded(f"version {version} to {', '.join(late)}", deadline_s) from error
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        self.version = version

    async def statistics(self) -> EngineStatistics:
        """Of the servers that are up, added up. What a server does with keys and values besides is its own affair."""
        up = [replica for replica in self._replicas if replica.up]
        try:
            async with asyncio.timeout(_STATISTICS_DEADLINE_S):
                each = await asyncio.gather(*(replica.client.metrics() for replica in up))
        except TimeoutError as error:
            names = ", ".join(replica.name for replica in up)
            raise DeadlineExceeded(f"the metrics of {names}", _STATISTICS_DEADLINE_S) from error

        def total(name: str) -> int:
            return int(sum(seen.get(name, 0.0) for seen in each))

        hits = total("prefix_cache_hits_total")
        return EngineStatistics(
            version=self.version,
            running=total("num_requests_running"),
            waiting=total("num_requests_waiting"),
            parked=0,
            generated_tokens=total("generation_tokens_total"),
            prefilled_tokens=total("prompt_tokens_total") - hits,
            reused_tokens=hits,
            recomputed_tokens=0,
            kv_used=max((seen.get("kv_cache_usage_perc", 0.0) for seen in each), default=0.0),
            busy_s=sum(replica.busy_s for replica in self._replicas),
        )

    def counters(self) -> dict[str, float]:
        return {
            "engine_restarts": float(sum(r.restarted for r in self._replicas)),
            "turns_reissued": float(self.reissued),
            "tokens_sampled_again": float(self.sampled_again),
        }

    async def watch(self) -> None:
        """Raises `WorkerDied` when no server is left that would be brought back. That one of several is gone for good
        is told by the next change of weights."""
        for replica in self._replicas:
            failure = await replica.until_gone()
        raise WorkerDied(f"no vLLM server is left; {replica.name} is gone for good: {failure}") from failure

    async def _sample(self, request: Generate) -> Turn:
        sampling, kept = request.sampling, _Sampled()
        prompt = request.prompt_T.numpy().tolist()
        cause: Exception | None = None
        for attempt in range(_ATTEMPTS):
            finish = kept.finish(sampling)
            if finish is not None:
                return kept.turn(finish)
            replica = await self._replica(request.session)
            certain = replica.certain
            part, last = _Sampled(), None
            try:
                async with replica.turn(_body(prompt, kept, sampling, attempt)) as pieces:
                    async for piece in pieces:
                        replica.heard()
                        part.add(piece.tokens, piece.logp, ())
                        last = piece
                if last is None or last.finish not in ("stop", "length"):
                    raise ServerGone(f"{replica.name} ended an answer without its end: {last and last.finish}")
            except ServerGone as error:
                cause = error
                self.reissued += 1
                if certain[0] is not None and replica.certain == certain:
                    kept.add(part.tokens, part.logp, [certain[0]] * len(part.tokens))
                else:  # the labels come at the end: of these tokens nobody can say which weights they are of
                    self.sampled_again += len(part.tokens)
                logger.info("a turn of %s is taken up again: %s", request.session, error)
                replica.suspect()
                continue
            kept.add(part.tokens, part.logp, _versions(last, len(part.tokens)))
            return kept.turn("stop" if last.finish == "stop" else "length")
        raise PolicyError(f"a turn of {request.session} was broken off {_ATTEMPTS} times: {cause}") from cause

    async def _replica(self, session: str) -> Replica:
        """The one that knows the session's earlier turns; another, the least loaded, if it is not there."""
        while True:
            home = self._home.get(session)
            up = [r for r in self._replicas if r.up]
            if home is None or (home not in up and up):
                sessions = list(self._home.values())
                home = min(up or self._replicas, key=lambda r: (r.busy, sessions.count(r)))
                self._home[session] = home
            await (home.until_looked_at() if home.up else home.until_up())
            if home.up:
                return home


def _body(prompt: list[int], kept: _Sampled, sampling: Sampling, attempt: int) -> dict[str, Any]:
    greedy = sampling.temperature == 0
    return {
        "token_ids": prompt + kept.tokens,
        "stream": True,
        "sampling_params": {
            "temperature": sampling.temperature,
            "top_p": 1.0 if greedy else sampling.top_p,
            "max_tokens": sampling.max_tokens - len(kept.tokens),
            "stop_token_ids": list(sampling.stop),
            "ignore_eos": True,  # `stop` alone says what ends a turn
            # What goes on where another left off must not draw the same numbers again.
            "seed": (sampling.seed + attempt * 0x9E3779B97F4A7C15) & _SEED_BITS,
            "logprobs": 0,  # that of the sampled token
            "detokenize": False,
            "stream_interval": _STREAM_INTERVAL,
        },
    }


def _versions(last: Piece, count: int) -> list[int]:
    """The version of each token of an answer, as the engine labelled it."""
    spans: list[Span] = last.spans or []
    try:
        version = [int(span.version) for span in spans for _ in range(span.end - span.start)]
    except ValueError as error:
        raise PolicyError(f"a vLLM server has weights that are not of this run: {spans}") from error
    if len(version) != count:
        raise PolicyError(f"a vLLM server said the weights of {len(version)} tokens out of {count}; ale needs 0.32")
    return version


def _check(request: Generate) -> None:
    if not len(request.prompt_T):
        raise PolicyError("Generate.prompt_T is empty: a prompt needs at least one token")
    s = request.sampling
    if s.temperature and (s.top_p < 1 or s.top_k):
        raise PolicyError(
            "vLLM says the log-probability of what it really draws from: with top_p or top_k, that of the whole "
            "distribution, which training needs, cannot be had of it"
        )
