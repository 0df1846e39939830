"""The learner's state in one file: going on from it gives, bit for bit, the updates that would have been made.

    model/NAME        the weights that are trained: all, or those of the adapters
    optimizer/NAME/K  what the optimizer keeps for that parameter: K is exp_avg, exp_avg_sq, step
    ring/V/NAME       the weights of earlier versions V that samples still refer to (pi_old of eq. 7)
    random            the state of torch's generator
    counters          int64 [2]: the version, and the optimizer's steps, which the schedule follows

Safetensors: a file from elsewhere can hold wrong numbers, but no code.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ale.errors import LearnerError
from ale.learner.learner import Learner
from ale.learner.sharding import local, rows, shard_like, whole


def save_state(learner: Learner, path: Path) -> None:
    """Writes the file, whole whatever the number of ranks: all of them have to call it, the first one writes. Raises
    `OSError` or `SafetensorError` there when the disk does not take it."""
    parameters = learner.versions.trained()
    tensors: dict[str, Tensor] = {f"model/{name}": whole(p) for name, p in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in learner.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{key}"] = whole(torch.as_tensor(value))
    for version in learner.versions.earlier:
        for name, tensor in learner.versions.weights(version).items():
            tensors[f"ring/{version}/{name}"] = tensor
    tensors["random"] = torch.get_rng_state()
    tensors["counters"] = torch.tensor([learner.version, learner.steps])
    if learner.ranks.rank == 0:
        save_file(tensors, path)


def load_state(learner: Learner, path: Path) -> None:
    """Puts the learner where it was, on as many ranks as it has now. Raises `LearnerError` when the file is not of this
    model or this ring."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise LearnerError(f"the state in {path} cannot be read: {error}") from error
    parameters = learner.versions.trained()
    weights = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
    if {name: t.shape for name, t in weights.items()} != {name: p.shape for name, p in parameters.items()}:
        raise LearnerError(f"the state in {path} is that of another model than the run began with")
    with torch.no_grad():
        for name, parameter in parameters.items():
            local(parameter).copy_(weights[name][rows(parameter)])
    for name, parameter in parameters.items():
        prefix = f"optimizer/{name}/"
        kept = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        if kept:
            learner.optimizer.state[parameter] = {key: shard_like(parameter, t) for key, t in kept.items()}
    version, steps = tensors["counters"].tolist()
    learner.go_on_at(version, steps)
    for earlier in learner.versions.earlier:
        learner.versions.keep(earlier, {name: tensors[f"ring/{earlier}/{name}"] for name in parameters})
    torch.set_rng_state(tensors["random"])
