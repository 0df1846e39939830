"""A model whose parameters are sharded over the ranks (FSDP2), and what of a parameter lies where.

Each decoder layer is gathered when it computes and given up again; the experts of a layer are one parameter [E, ...],
sharded along E, so that each rank keeps its share of them, with their gradients and optimizer state. The policy (model
and head) is the root: embedding, last norm and head are gathered with it.

Parameters are float32 where they lie. With bfloat16 products layers are gathered in bfloat16; gradients are summed in
float32. The ranks' gradients are added, not averaged: the loss is divided by the Z of the whole batch on each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ale.errors import ModelError
from ale.learner.ranks import Ranks


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated layers of the body. Raises `ModelError` for a model that is not built that way."""
    for child in model.base_model.children():
        if isinstance(child, nn.ModuleList) and len(child) == model.config.num_hidden_layers:
            return list(child)
    raise ModelError(
        f"learner.ranks, learner.activation_checkpointing: {type(model).__name__} has no list of "
        f"{model.config.num_hidden_layers} layers to work on one by one; use one rank, without checkpointing."
    )


def shard(policy: nn.Module, layers: list[nn.Module], ranks: Ranks, precision: torch.dtype) -> None:
    """From here on each rank holds its rows of every parameter, in float32."""
    narrow = precision if precision is not torch.float32 else None
    # Inputs stay as they are: the residual stream is float32, autocast rounds what goes into a product.
    inside = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
    outside = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=ranks.mesh, mp_policy=inside)
    # Given up after the forward like the rest: what was not written since the last backward is never in use.
    fully_shard(policy, mesh=ranks.mesh, mp_policy=outside, reshard_after_forward=True)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo multiplies nothing on the way


def checkpoint_activations(layers: list[nn.Module]) -> None:
    """Each layer keeps its input and computes the rest again in the backward."""
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # Nothing in a layer is random: dropout is off.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def fill(model: PreTrainedModel, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """Gives a model that was built without memory its weights, without a copy."""
    for name, tensor in weights.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
    for name, tensor in buffers.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(leaf, tensor.clone(), persistent=False)
    model.tie_weights()


def rows(parameter: Tensor) -> slice:
    """Which rows (along the first axis) of the whole parameter this rank holds."""
    if not isinstance(parameter, DTensor):
        return slice(None)
    mesh = parameter.device_mesh
    each = -(-parameter.shape[0] // mesh.size())
    begin = min(mesh.get_local_rank() * each, parameter.shape[0])
    return slice(begin, min(begin + each, parameter.shape[0]))


def local(tensor: Tensor) -> Tensor:
    """The rows this rank holds, in place."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All rows, on the CPU. Of a sharded tensor: all ranks have to call it."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu()


def shard_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """This rank's rows of a whole tensor of that shape, sharded as the parameter is."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:  # a counter of steps has no rows
        return tensor.to(parameter.device)
    own = tensor[rows(parameter)].clone().to(parameter.to_local().device)
    return DTensor.from_local(
        own, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )
