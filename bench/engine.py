"""The embedded engine against `transformers` generate: the same model, prompts and number of tokens, in one process.

Two models: the nano model (one thread) and SmolLM2-135M-Instruct (two threads), float32 and bfloat16 products. Prompts
have one length, so that generate needs no padding; both run to the same number of new tokens. The engine also records
log-probabilities, which generate is spared, and serves what generate cannot (sequences that join and leave, caches kept
across turns, shared prompts); the prompts here have nothing in common.

`products` rows are the bound: tokens/s if a step consisted of its packed products alone.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from ale.envs.families import TRAINED, make
from ale.learner.batch import split
from ale.learner.forward import action_logp
from ale.messages import Chunk, Generate, Sampling, Turn
from ale.models.load import load_model
from ale.models.nano import save_nano
from ale.policy.engine import Engine
from ale.wire import Array
from bench.harness import Benchmark, benchmark
from bench.smollm2 import THREADS, smollm2

PROMPT, NEW = 96, 48
SMOLLM2_PROMPT, SMOLLM2_NEW, SMOLLM2_BATCH = 32, 64, 16
TRUTH = 1e-3
Prompts = npt.NDArray[np.int64]


def run_engine(engine: Engine, prompts_BT: Prompts, new: int, temperature: float) -> list[Turn]:
    for number, prompt in enumerate(prompts_BT):
        sampling = Sampling(temperature=temperature, max_tokens=new, seed=number)
        session = f"{number}/{engine.statistics().generated_tokens}"  # no cache of an earlier run is found again
        engine.add(number, Generate(session=session, prompt_T=Array.of(prompt, "int32"), sampling=sampling))
    turns: dict[int, Turn] = {}
    while engine.busy:
        turns |= dict(engine.step())
    return [turns[number] for number in range(len(prompts_BT))]


def run_generate(model: PreTrainedModel, prompts_BT: Prompts, new: int, temperature: float) -> list[list[int]]:
    ids_BT = torch.from_numpy(prompts_BT)
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    with torch.inference_mode():
        out_BT = model.generate(  # type: ignore[operator]
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            min_new_tokens=new,
            max_new_tokens=new,
            eos_token_id=None,
            pad_token_id=0,
            **how,
        )
    found: list[list[int]] = out_BT[:, prompts_BT.shape[1] :].tolist()
    return found


def speed(tokens: int, run: object) -> float:
    started = time.perf_counter()
    run()  # type: ignore[operator]
    return tokens / (time.perf_counter() - started)


def products_speed(engine: Engine) -> float:
    """Tokens/s of the packed products of one decoding step, nothing else."""
    packed = [product for part in engine.fused.parts for product in part.products]
    inputs = [torch.randn(SMOLLM2_BATCH, 1, layer.inputs) for layer in packed]
    with torch.inference_mode():
        return speed(SMOLLM2_BATCH, lambda: [layer(x) for layer, x in zip(packed, inputs, strict=True)])


def truth(turns: list[Turn], prompts_BT: Prompts, trained: PreTrainedModel) -> float:
    """The largest difference between recorded log-probabilities and those of the training forward."""
    sequences = [[*p, *t.tokens_A.numpy()] for p, t in zip(prompts_BT, turns, strict=True)]
    chunks = [(Chunk(prompts_BT.shape[1], len(ids), "answer"),) for ids in sequences]
    (batch,) = split([Array.of(ids, "int32") for ids in sequences], chunks, 1 << 20)
    with torch.no_grad():
        logp_A = action_logp(trained, batch, 1.0)[0].numpy()
    recorded_A = np.concatenate([turns[i].logp_A.numpy() for i in batch.index])
    return float(np.abs(logp_A - recorded_A).max())


def main() -> None:
    path = smollm2()
    with tempfile.TemporaryDirectory() as folder, benchmark("engine", pairs=3) as bench:
        save_nano(Path(folder), [make(f, s).instruction for f in TRAINED for s in range(50)], seed=0)
        rng = np.random.default_rng(0)
        nano, plain_nano = Engine(load_model(folder)), load_model(folder).eval()
        nano_prompts = {size: rng.integers(10, nano.model.config.vocab_size, (size, PROMPT)) for size in (16, 64)}
        prompts = rng.integers(10, 49_000, (SMOLLM2_BATCH, SMOLLM2_PROMPT))
        exact, mixed = Engine(load_model(path)), Engine(load_model(path), precision=torch.bfloat16)
        plain, plain_bf16 = load_model(path).eval(), load_model(path, dtype=torch.bfloat16).eval()

        torch.set_num_threads(1)
        for size, batch in nano_prompts.items():
            bench.check(
                f"greedy tokens of {size} sequences of the nano model equal those of generate",
                lambda batch=batch: (
                    [t.tokens_A.numpy().tolist() for t in run_engine(nano, batch, NEW, 0.0)]
                    == run_generate(plain_nano, batch, NEW, 0.0)
                ),
            )
        torch.set_num_threads(THREADS)
        bench.check(
            f"log-probabilities of SmolLM2 in float32 agree with the training forward to {TRUTH}",
            lambda: truth(run_engine(exact, prompts, 24, 1.0), prompts, plain) < TRUTH,
        )
        torch.set_num_threads(1)
        for size, batch in nano_prompts.items():
            bench.rate(
                f"engine/nano_b{size}",
                ours=lambda batch=batch: speed(batch.shape[0] * NEW, lambda: run_engine(nano, batch, NEW, 0.0)),
                baseline=lambda batch=batch: speed(
                    batch.shape[0] * NEW, lambda: run_generate(plain_nano, batch, NEW, 0.0)
                ),
                against="transformers generate",
                unit="tokens/s",
            )
        torch.set_num_threads(THREADS)
        for name, engine, model in (("float32", exact, plain), ("bfloat16", mixed, plain_bf16)):
            compare(bench, name, engine, model, prompts)
            bench.rate(
                f"engine/smollm2_b{SMOLLM2_BATCH}/{name}/products",
                ours=lambda engine=engine: products_speed(engine),
                baseline=None,
                against=None,
                unit="tokens/s",
            )


def compare(bench: Benchmark, name: str, engine: Engine, model: PreTrainedModel, prompts: Prompts) -> None:
    tokens = SMOLLM2_BATCH * SMOLLM2_NEW
    bench.rate(
        f"engine/smollm2_b{SMOLLM2_BATCH}/{name}",
        ours=lambda: speed(tokens, lambda: run_engine(engine, prompts, SMOLLM2_NEW, 1.0)),
        baseline=lambda: speed(tokens, lambda: run_generate(model, prompts, SMOLLM2_NEW, 1.0)),
        against=f"transformers generate, {name}",
        unit="tokens/s",
    )


if __name__ == "__main__":
    main()
