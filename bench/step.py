"""One whole RL step on SmolLM2-135M-Instruct, by phase: 32 sequences of 64 new tokens, engine and learner as in a run
with `max_lag = 0` (one process, two threads, in turn).

    prefill     the prompts (those of a group once), and the first token of each sequence
    generation  the other 63
    forward     log-probabilities at the action tokens; pi_old is read off them, so there is no pass of its own
    backward, optimizer (clip and AdamW), publish (weights into the ring), sync (the engine takes and packs them)

The baseline is a figure, not a paired run: one step of TRL's GRPOTrainer with the same model, numbers of sequences and
new tokens, float32, took 57 s (24 s generation, 33 s training) on a machine of this kind, 2 cores, measured once for
this project. The prompts of that run were not recorded; here four groups of eight continue prompts of about 100 tokens.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from ale.agent.chat import Chat
from ale.algorithm.advantages import advantages
from ale.algorithm.objectives import objective
from ale.config import Precision
from ale.envs.families import make
from ale.learner.learner import TRUTH_TOLERANCE, Learner, LearnerSettings
from ale.learner.weights import Layout, WeightRing, create_memory
from ale.messages import Chunk, Generate, Sample, Sampling, StepMetrics, Trajectory, Turn
from ale.models.load import load_model, load_tokenizer
from ale.policy.engine import Engine
from ale.wire import Array
from bench.harness import benchmark
from bench.smollm2 import THREADS, smollm2

GROUPS, SIZE, NEW = 4, 8, 64
SYSTEM = "You work in a Linux terminal. To run a command, write it in a ```bash fence. Answer when you are done."
TRL = {"total": 57.0, "rollout": 24.0, "training": 33.0}
AGAINST = "TRL GRPO step, fp32 (a figure: see the module's text)"
PHASES = ("prefill", "generation", "forward", "backward", "optimizer", "publish", "sync")


class Step:
    """Engine, learner and the ring between them."""

    def __init__(self, path: Path, precision: Precision) -> None:
        trained, sampled = load_model(path), load_model(path)
        tokenizer = load_tokenizer(path)
        layout = Layout.of(trained, 2)
        self.ring = WeightRing(create_memory(), layout)
        settings = LearnerSettings(learning_rate=1e-6, precision=precision, micro_tokens=1536)
        self.learner = Learner(trained, tokenizer, self.ring, objective("ipa"), settings)
        self.engine = Engine(sampled, rows=GROUPS * SIZE, precision=getattr(torch, precision))
        chat = Chat(tokenizer)
        self.prompts = [chat.start(make("copy", seed).instruction, SYSTEM) for seed in range(GROUPS)]
        self.number = 0

    def run(self) -> tuple[dict[str, float], StepMetrics]:
        """Seconds by phase, and what the learner says of the update."""
        self.number += 1
        started = time.perf_counter()
        for n in range(GROUPS * SIZE):
            sampling = Sampling(max_tokens=NEW, seed=(self.number << 20) + (n << 10))
            prompt_T = Array.of(self.prompts[n // SIZE], "int32")
            self.engine.add(n, Generate(session=f"{self.number}/{n}", prompt_T=prompt_T, sampling=sampling))
        turns = dict(self.engine.step())
        first = time.perf_counter()
        while self.engine.busy:
            turns |= dict(self.engine.step())
        sampled = time.perf_counter()
        metrics = self.learner.learn(self.samples(turns))
        learned = time.perf_counter()
        self.ring.adopt(metrics.slot, self.engine.model)
        self.engine.set_version(metrics.version)
        ended = time.perf_counter()
        phases = {name: metrics.values[f"{name}_s"] for name in ("forward", "backward", "optimizer", "publish")}
        phases |= {"prefill": first - started, "generation": sampled - first, "sync": ended - learned}
        return phases | {"rollout": sampled - started, "training": ended - sampled, "total": ended - started}, metrics

    def samples(self, turns: dict[int, Turn]) -> list[Sample]:
        reward_G = [float(n % 2) for n in range(SIZE)]
        advantage_G = advantages(reward_G, "group_mean")
        return [
            Sample(self.trajectory(n, turns[n], reward_G[n % SIZE]), float(advantage_G[n % SIZE]))
            for n in range(GROUPS * SIZE)
        ]

    def trajectory(self, n: int, turn: Turn, reward: float) -> Trajectory:
        prompt, tokens = self.prompts[n // SIZE], turn.tokens_A.numpy()
        return Trajectory(
            id=f"{self.number}/{n}",
            group=str(n // SIZE),
            task="copy",
            family="copy",
            level=1,
            tokens_T=Array.of(np.concatenate([prompt, tokens]), "int32"),
            chunks=(Chunk(len(prompt), len(prompt) + len(tokens), "cut"),),
            logp_A=turn.logp_A,
            logp_sampled_A=turn.logp_sampled_A,
            version_A=turn.version_A,
            reward=reward,
        )


def main() -> None:
    path = smollm2()
    torch.set_num_threads(THREADS)
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    with benchmark("step", pairs=3) as bench:
        seen: dict[str, list[dict[str, float]]] = {}
        for precision in precisions:
            step = Step(path, precision)
            steps = [step.run() for _ in range(4)]  # the first is the one that is not recorded
            seen[precision] = [phases for phases, _ in steps]
            last = steps[-1][1]
            bench.check(
                f"{precision}: the update has a gradient", lambda last=last: last.grad_norm > 0 and not last.dropped
            )
            if precision == "float32":
                bench.check(
                    f"float32: recorded and trained log-probabilities agree to {TRUTH_TOLERANCE}",
                    lambda last=last: last.values["truth_max"] < TRUTH_TOLERANCE,
                )
        for precision, runs in seen.items():
            for name, figure in TRL.items():
                bench.latency(
                    f"step/{precision}/{name}",
                    ours=iter([phases[name] for phases in runs]).__next__,
                    baseline=lambda figure=figure: figure,
                    against=AGAINST,
                    unit="s",
                )
            for name in PHASES:
                bench.latency(
                    f"step/{precision}/{name}",
                    ours=iter([phases[name] for phases in runs]).__next__,
                    baseline=None,
                    against=None,
                    unit="s",
                )


if __name__ == "__main__":
    main()
