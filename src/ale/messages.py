"""Every struct that crosses the bus or a process boundary, each with one worked example.

Array names carry their axes: T tokens of a trajectory, A its action tokens (those the policy sampled), C its chunks.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from ale.audit import Alarm, AuditEvent
from ale.config import AlgorithmConfig, LearnerConfig, Precision
from ale.task import Task
from ale.wire import Array, Message, Request

Finish = Literal["stop", "length"]
Ending = Literal["call", "answer", "malformed", "cut"]

# Generation


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """`Sampling(temperature=0.7, top_p=0.8, top_k=20, max_tokens=128, stop=(2,), seed=7)`. Temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    max_tokens: int = 64
    stop: tuple[int, ...] = ()
    seed: int = 0


class Turn(Message, frozen=True):
    """What the policy sampled: `Turn(tokens=[12, 7, 2], logp=[-0.1, -2.0, -0.01], ..., finish="stop")`.

    `logp_A` is the log-probability under the untruncated distribution at the sampling temperature (at 1 where that
    is 0), `logp_sampled_A` the one under the distribution really drawn from (top-p, top-k), `version_A` the policy
    version that computed each token. `experts_TLJ`, where routing is recorded: the J experts that each of L layers
    chose at every position of prompt and turn, uint8 (int16 with more than 256 experts); the last token was never run.
    """

    tokens_A: Array
    logp_A: Array
    logp_sampled_A: Array
    version_A: Array
    finish: Finish
    experts_TLJ: Array | None = None


class Generate(Request[Turn], frozen=True):
    """`Generate(session="g3/1", prompt_T=[5, 9, 31], sampling=Sampling())`: continue exactly these tokens.

    `session` names the episode: what its earlier turns left in the KV cache is reused as far as the tokens agree.
    """

    session: str
    prompt_T: Array
    sampling: Sampling


class EndSession(Request[None], frozen=True):
    """`EndSession(session="g3/1")`: forget the episode; a turn still being generated is abandoned."""

    session: str


class LoadWeights(Request[None], frozen=True):
    """`LoadWeights(version=4, slot=1)`: from the next token on, sample from the weights in this slot of the ring."""

    version: int
    slot: int


# Episodes


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """Action tokens between two interactions with the environment: `Chunk(start=31, end=44, ending="call")`.

    `start` and `end` are positions in the trajectory's tokens; a chunk is one run of sampled tokens. `error` marks a
    chunk that caused a tool-call or execution error, `relevant` one that belongs to the task at hand: they are m_err
    and m_task of eq. 2.
    """

    start: int
    end: int
    ending: Ending
    error: bool = False
    relevant: bool = True


class ToolResult(msgspec.Struct, frozen=True):
    """`ToolResult(call="ls", output="a.txt", exit_code=0, duration_s=0.002)`: one interaction, as the log shows it.

    `audit` and `alarms` are what the call tried to reach and what was made of it.
    """

    call: str
    output: str
    exit_code: int | None = None
    timed_out: bool = False
    duration_s: float = 0.0
    audit: tuple[AuditEvent, ...] = ()
    alarms: tuple[Alarm, ...] = ()


Status = Literal[
    "scored",
    "sandbox_failure",
    "stopped_by_alarm",
    "policy_failure",
    "evaluator_error",
    "episode_timeout",
    "straggler",
    "illegal_tool_calls",
    "agent_failure",
    "bad_reward",
    "bad_logprob",
]
"""`scored`, or why the trajectory must not be trained on."""


class Trajectory(Message, frozen=True):
    """One episode: `Trajectory(id="g3/1", task="copy-7", tokens_T=[...], chunks=(Chunk(31, 44, "call"),), reward=1.0)`.

    Everything that was sampled is here exactly as it was sampled: `logp_A`, `logp_sampled_A` and `version_A` run over
    the tokens of all chunks in order. `experts_TLJ` is that of the last turn: the positions after it were never run.
    """

    id: str
    group: str
    task: str
    family: str
    level: int
    tokens_T: Array
    chunks: tuple[Chunk, ...]
    logp_A: Array
    logp_sampled_A: Array
    version_A: Array
    experts_TLJ: Array | None = None
    results: tuple[ToolResult, ...] = ()
    answer: str | None = None
    reward: float | None = None
    status: Status = "scored"
    cause: str | None = None
    started_version: int = 0
    duration_s: float = 0.0
    branches: tuple[Trajectory, ...] = ()
    """The other sequences of an episode whose agent left one line of history (agent native mode). They share its
    reward and its fate; no sampled token is in two of them."""

    @property
    def sequences(self) -> tuple[Trajectory, ...]:
        """All that one episode gives to train on, itself first."""
        return (self, *self.branches)

    @property
    def oldest_version(self) -> int:
        """The oldest policy that any token of the sample came from."""
        own = int(self.version_A.numpy().min()) if len(self.version_A) else self.started_version
        return min((own, *(branch.oldest_version for branch in self.branches)))

    @property
    def flags(self) -> tuple[Alarm, ...]:
        """The alarms that are more than counted: what a filter or a reward may look at."""
        return tuple(alarm for result in self.results for alarm in result.alarms if alarm.action != "count")

    @property
    def action_tokens(self) -> int:
        return sum(len(t.logp_A) for t in self.sequences)


class Group(Message, frozen=True):
    """The rollouts of one task from one start state: `Group(id="g3", task="copy-7", trajectories=(...))`."""

    id: str
    task: str
    trajectories: tuple[Trajectory, ...]

    @property
    def oldest_version(self) -> int:
        return min(t.oldest_version for t in self.trajectories)


class GroupStarted(Message, frozen=True):
    """`GroupStarted(group="g3")`: the buffer learns the order in which groups begin."""

    group: str


class GroupEnded(Message, frozen=True):
    """`GroupEnded(group="g3", reason="zero_advantage")`: it will not be trained on."""

    group: str
    reason: str


class TasksEnded(Message, frozen=True):
    """`TasksEnded(started=12)`: every one of the 12 groups has been told or ended, and no other will start."""

    started: int


class Batch(Message, frozen=True):
    """`Batch(groups=(Group(...),))`: what one update is made of."""

    groups: tuple[Group, ...]


class TakeBatch(Request[Batch], frozen=True):
    """`TakeBatch(version=4, groups=8)`: wait for 8 groups fresh enough to train version 4 on."""

    version: int
    groups: int


class Rollout(Request[Trajectory], frozen=True):
    """`Rollout(id="g3/1", group="g3", task=Task(...), sampling=Sampling(seed=31))`: run one episode to its score.

    One that lasts longer than `straggler_s` is ended; its status says so. None: only the agent's own limits hold.
    """

    id: str
    group: str
    task: Task
    sampling: Sampling
    straggler_s: float | None = None


class Score(Message, frozen=True):
    """`Score(reward=1.0, output="")`: what the tests gave, with what they printed."""

    reward: float
    output: str = ""


class Grade(Request[Score], frozen=True):
    """`Grade(task=Task(...), layers=("/tmp/ale/3/upper",))`: run the task's tests on what the agent left behind."""

    task: Task
    snapshot: str


# Training


class Sample(msgspec.Struct, frozen=True):
    """`Sample(trajectory=Trajectory(...), advantage=-0.5)`: a trajectory with what plays R_final in eq. 7."""

    trajectory: Trajectory
    advantage: float


class StepMetrics(Message, frozen=True):
    """`StepMetrics(version=4, slot=1, loss=0.02, grad_norm=0.9, values={"masked_high": 0.01})`: one update.

    `grad_norm` is the norm before clipping; `dropped` names trajectories that were not trained on, with the reason.
    """

    version: int
    slot: int
    loss: float
    grad_norm: float
    values: dict[str, float]
    dropped: dict[str, str] = msgspec.field(default_factory=dict)


class TrainStep(Request[StepMetrics], frozen=True):
    """`TrainStep(samples=(Sample(...),))`: one update of the policy on these samples."""

    samples: tuple[Sample, ...]


class Demonstration(msgspec.Struct, frozen=True):
    """`Demonstration(tokens_T=[...], chunks=(Chunk(31, 44, "call"),))`: tokens to imitate."""

    tokens_T: Array
    chunks: tuple[Chunk, ...]


class Imitate(Request[StepMetrics], frozen=True):
    """`Imitate(demonstrations=(...), learning_rate=2e-3)`: one supervised update (eq. 1)."""

    demonstrations: tuple[Demonstration, ...]
    learning_rate: float
    weight_decay: float = 0.0


class Saved(Message, frozen=True):
    """`Saved()`, or `Saved(problem="No space left on device (os error 28)")`: what the disk said."""

    problem: str | None = None


class SaveModel(Request[Saved], frozen=True):
    """`SaveModel(path="runs/a/checkpoints/4")`: a Hugging Face directory with model and tokenizer."""

    path: str


class SaveState(Request[Saved], frozen=True):
    """`SaveState(path="runs/a/state/2/learner.safetensors")`: all that the learner needs to go on from here."""

    path: str


# Opening the two processes that compute


class Opened(Message, frozen=True):
    """`Opened(version=0, slot=0)`: the process has loaded its model; what it will sample from or has published."""

    version: int
    slot: int


class OpenEngine(Request[Opened], frozen=True):
    """`OpenEngine(model="runs/a/model", weights_fd=7, slots=3, threads=1, rows=64)`. `weights_fd` None: no learner.

    `record_routing`: every turn carries the experts that were chosen.
    """

    model: str
    weights_fd: int | None
    slots: int
    threads: int
    rows: int
    precision: Precision = "float32"
    record_routing: bool = False


class OpenLearner(Request[Opened], frozen=True):
    """`OpenLearner(model="runs/a/model", weights_fd=7, slots=3, threads=1, algorithm=..., ...)`.

    `state` is what `SaveState` wrote, in the life of the run that is resumed.
    """

    model: str
    weights_fd: int
    slots: int
    threads: int
    algorithm: AlgorithmConfig
    learner: LearnerConfig
    temperature: float
    state: str | None = None
    precision: Precision = "float32"


class OpenRank(Message, frozen=True):
    """`OpenRank(settings=OpenLearner(...), rank=1, store="/proc/self/fd/9")`: what rank 0 of a learner tells another.

    `store` is the file in which the ranks find each other.
    """

    settings: OpenLearner
    rank: int
    store: str


class StartPolicyOptimization(Request[None], frozen=True):
    """`StartPolicyOptimization()`: the warm start is over; the optimizer starts afresh."""


class EngineStatistics(Message, frozen=True):
    """`EngineStatistics(version=3, running=12, ...)`: the engine's counters since it was opened, in tokens."""

    version: int
    running: int
    waiting: int
    parked: int
    generated_tokens: int
    prefilled_tokens: int
    reused_tokens: int
    recomputed_tokens: int
    kv_used: float = 0.0
    """Share of the cache in use, where it has a bound of its own."""
    busy_s: float = 0.0
    """Time that it spent computing."""


class SetThreads(Request[None], frozen=True):
    """`SetThreads(threads=3)`: compute with so many from the next step on."""

    threads: int


class GetStatistics(Request[EngineStatistics], frozen=True):
    """`GetStatistics()`"""
