"""The embedded engine against `transformers` generate: the same nano model, prompts and greedy tokens, in one process.

Prompts have one length, so that generate needs no padding; both run to the same number of new tokens. The engine also
serves what generate cannot (sequences that join and leave, caches kept across turns); this measures only what both do.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from ale.envs.families import TRAINED, make
from ale.messages import Generate, Sampling
from ale.models.load import load_model
from ale.models.nano import save_nano
from ale.policy.engine import Engine
from ale.wire import Array
from bench.harness import benchmark

PROMPT, NEW = 96, 48


def engine_tokens(model: PreTrainedModel, prompts_BT: np.ndarray) -> list[list[int]]:
    engine = Engine(model, rows=len(prompts_BT))
    sampling = Sampling(temperature=0.0, max_tokens=NEW)
    for number, prompt in enumerate(prompts_BT):
        engine.add(number, Generate(session=str(number), prompt_T=Array.of(prompt, "int32"), sampling=sampling))
    turns = {}
    while engine.busy:
        turns |= dict(engine.step())
    return [turns[number].tokens_A.numpy().tolist() for number in range(len(prompts_BT))]


def generate_tokens(model: PreTrainedModel, prompts_BT: np.ndarray) -> list[list[int]]:
    ids_BT = torch.from_numpy(prompts_BT)
    with torch.inference_mode():
        out_BT = model.generate(  # type: ignore[operator]
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            do_sample=False,
            min_new_tokens=NEW,
            max_new_tokens=NEW,
            eos_token_id=None,
            pad_token_id=0,
        )
    found: list[list[int]] = out_BT[:, PROMPT:].tolist()
    return found


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, benchmark("engine") as bench:
        save_nano(Path(folder), [make(f, s).instruction for f in TRAINED for s in range(50)], seed=0)
        model = load_model(folder).eval()
        rng = np.random.default_rng(0)
        batches = {size: rng.integers(10, model.config.vocab_size, (size, PROMPT)) for size in (16, 64)}
        for size, prompts in batches.items():
            bench.check(
                f"greedy tokens of {size} sequences equal those of generate",
                lambda prompts=prompts: engine_tokens(model, prompts) == generate_tokens(model, prompts),
            )
        for size, prompts in batches.items():

            def speed(tokens_of: object, prompts: np.ndarray = prompts) -> float:
                started = time.perf_counter()
                tokens_of(model, prompts)  # type: ignore[operator]
                return len(prompts) * NEW / (time.perf_counter() - started)

            bench.rate(
                f"engine/nano_b{size}",
                ours=lambda speed=speed: speed(engine_tokens),
                baseline=lambda speed=speed: speed(generate_tokens),
                against="transformers generate",
                unit="tokens/s",
            )


if __name__ == "__main__":
    main()
