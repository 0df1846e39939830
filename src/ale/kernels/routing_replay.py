"""Routing replay (R3): train through the experts that were chosen when the tokens were sampled.

A router near a tie chooses differently when anything about the arithmetic changes: another engine, another batch shape,
another precision. One flipped expert moves a log-probability far more than rounding does, so the importance ratios of
the loss measure noise. R3 (arXiv 2510.11370) keeps the sampled choice and lets the trained router weigh it:
the weights still come from the current scores, and gradients still reach the router.

    with record_routing(model) as routing:          # while sampling
        model.generate(...)
    experts_LBSJ = routing.take()

    with replay_routing(model, experts_LBSJ):       # in training; keep it open until after backward()
        model(input_ids).logits

Axes: L layers with experts, B sequences, S positions, J experts per token, E experts. Works with any `transformers`
model of the experts interface, and any experts implementation: what is replaced is the `topk` inside a layer's router.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

NOT_RECORDED = -1
"""In place of an expert: the position was not run while sampling (a last token, padding), so the router chooses."""


class RoutingRecord:
    """The experts chosen by each layer since the last `take`, position after position."""

    def __init__(self, layers: int) -> None:
        self._chosen_L: list[list[Tensor]] = [[] for _ in range(layers)]

    def add(self, layer: int, experts_BSJ: Tensor) -> None:
        self._chosen_L[layer].append(experts_BSJ.to(torch.int16))

    def take(self) -> Tensor:
        """[L, B, S, J] int16 of all forwards since the last call (a prefill, then one position per decoding step).

        ValueError when nothing was recorded, or when the batch changed size in between.
        """
        if not self._chosen_L[0]:
            raise ValueError("expected at least one forward since the last take, got none")
        sizes = {chosen.shape[0] for chosen in self._chosen_L[0]}
        if len(sizes) > 1:
            raise ValueError(f"expected forwards of one batch size between takes, got sizes {sorted(sizes)}")
        experts_LBSJ = torch.stack([torch.cat(chosen, dim=1) for chosen in self._chosen_L])
        for chosen in self._chosen_L:
            chosen.clear()
        return experts_LBSJ


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Records the experts of every forward inside. ValueError for a model without expert layers."""
    layers = _expert_layers(model)
    record = RoutingRecord(len(layers))
    with ExitStack() as hooks:
        for number, (block, experts) in enumerate(layers):
            shape: list[int] = []
            hooks.callback(block.register_forward_pre_hook(_remember_shape(shape), with_kwargs=True).remove)
            hook = _record_choice(record, number, shape)
            hooks.callback(experts.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield record


@contextmanager
def replay_routing(model: nn.Module, experts_LBSJ: Tensor) -> Iterator[None]:
    """Every forward inside routes position [b, s] of layer l to `experts_LBSJ[l, b, s]`; -1 leaves it to the router.

    A layer may run more than once (gradient checkpointing). ValueError when L, J or a value does not fit the model, and
    from the forward when B and S do not fit its input.
    """
    layers = _expert_layers(model)
    if experts_LBSJ.dim() != 4 or experts_LBSJ.shape[0] != len(layers):
        raise ValueError(f"expected experts [L = {len(layers)}, B, S, J], got {tuple(experts_LBSJ.shape)}")
    num_experts = count_experts(model)
    if experts_LBSJ.numel():
        lowest, highest = (int(bound) for bound in experts_LBSJ.aminmax())
        if lowest < NOT_RECORDED or highest >= num_experts:
            raise ValueError(f"expected experts in [0, {num_experts}) or -1, got {lowest} to {highest}")
    with ExitStack() as undo:
        for (block, experts), experts_BSJ in zip(layers, experts_LBSJ, strict=True):
            undo.callback(_replace_forward(block, int(experts.num_experts), experts_BSJ))
        yield


def count_experts(model: nn.Module) -> int:
    """Experts of a layer (of the layer with the fewest); 0 for a model without expert layers."""
    return min((int(experts.num_experts) for _, experts in _find_layers(model)), default=0)


def _find_layers(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """(block, experts) of each layer in order; the block is the parent, which holds the router as well."""
    found = []
    for block in model.modules():
        found += [(block, child) for child in block.children() if hasattr(child, "_is_expert_parallel")]
    return found


def _expert_layers(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    found = _find_layers(model)
    if not found:
        raise ValueError(f"expected a model with experts of the transformers interface, got {type(model).__name__}")
    return found


def _remember_shape(shape: list[int]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        shape[:] = hidden.shape[:-1]

    return hook


def _record_choice(record: RoutingRecord, layer: int, shape: list[int]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        chosen_TJ = args[1] if len(args) > 1 else kwargs["top_k_index"]
        batch = shape[0] if len(shape) == 2 else 1
        record.add(layer, chosen_TJ.detach().view(batch, -1, chosen_TJ.shape[-1]))

    return hook


def _replace_forward(block: nn.Module, num_experts: int, experts_BSJ: Tensor) -> Callable[[], None]:
    """Runs the block under `_ReplayTopK`; returns what undoes it."""
    forward = block.forward
    top_k = experts_BSJ.shape[-1]

    def replayed(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        tokens = hidden.shape[:-1].numel()
        if tokens != experts_BSJ[..., 0].numel():
            raise ValueError(
                f"expected an input of the recorded {tuple(experts_BSJ.shape[:2])} positions, got "
                f"{tuple(hidden.shape[:-1])}"
            )
        mode = _ReplayTopK(num_experts, experts_BSJ.reshape(tokens, top_k))
        with mode:
            result = forward(*args, **kwargs)
        if not mode.replayed:
            raise ValueError(
                f"expected {type(block).__name__} to choose {top_k} of {num_experts} experts by torch.topk, it did not"
            )
        return result

    before = block.__dict__.get("forward")
    block.forward = replayed

    def undo() -> None:
        del block.forward
        if before is not None:
            block.forward = before

    return undo


class _ReplayTopK(TorchFunctionMode):
    """Answers the router's `topk` over all experts with the recorded choice and the current scores of it.

    Everything else that a router does (softmax or sigmoid before, normalising after, a first choice among groups)
    stays the model's own.
    """

    def __init__(self, num_experts: int, experts_TJ: Tensor) -> None:
        super().__init__()
        self.replayed = False
        self._num_experts = num_experts
        self._experts_TJ = experts_TJ

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (torch.topk, Tensor.topk) or args[0].shape[-1] != self._num_experts:
            return result
        scores, chosen = args[0], result.indices
        if chosen.shape[-1] != self._experts_TJ.shape[-1]:
            return result
        recorded = self._experts_TJ.to(chosen).view_as(chosen)
        replayed = torch.where(recorded == NOT_RECORDED, chosen, recorded)
        self.replayed = True
        return torch.return_types.topk((scores.gather(-1, replayed), replayed))
