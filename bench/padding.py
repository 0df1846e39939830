"""How much of the learner's rows is padding: `just bench padding`. What packing rows end to end could save.

Lengths are lognormal, groups of eight share a prompt; `batch.split` makes the micro-batches as in an update.
"""

from __future__ import annotations

import numpy as np

from ale.learner.batch import OVERHEAD, split
from ale.messages import Chunk
from ale.wire import Array

CASES = {
    "nano: 32 apart, median 200, at most 512, 8192 tokens": (32, 1, 60, 200, 0.5, 512, 8192, 128),
    "SmolLM2: 4 groups of 8, median 300, at most 640, 3072 tokens": (4, 8, 150, 300, 0.5, 640, 3072, 576),
}


def measure(
    groups: int,
    size: int,
    prompt: int,
    median: int,
    spread: float,
    most: int,
    micro: int,
    width: int,
    *,
    seed: int,
    overhead: int,
) -> float:
    """Positions of all rows that no token of a sequence stands at, as a share of all positions."""
    rng = np.random.default_rng(seed)
    tokens, chunks = [], []
    for _ in range(groups):
        begin = rng.integers(0, 1000, prompt)
        for _ in range(size):
            length = int(np.clip(rng.lognormal(np.log(median), spread), prompt + 2, most))
            tokens.append(Array.of(np.concatenate([begin, rng.integers(0, 1000, length - prompt)]), "int32"))
            chunks.append((Chunk(prompt, length, "answer"),))
    cells = used = 0
    for batch in split(tokens, chunks, micro, width=width, overhead=overhead):
        cells += batch.ids_BT.numel()
        used += len(np.unique(np.concatenate([places.numpy() for places in batch.places_N])))
    return 1.0 - used / cells


def main() -> None:
    for name, case in CASES.items():
        for said, overhead in (("as few micro-batches as fit", 1 << 40), ("cut by cost", OVERHEAD)):
            shares = [measure(*case, seed=seed, overhead=overhead) for seed in range(5)]
            print(f"{name}, {said}: {np.median(shares):.1%} padding ({min(shares):.1%} to {max(shares):.1%})")


if __name__ == "__main__":
    main()
