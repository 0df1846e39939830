"""A complete mixture-of-experts layer on `grouped_gemm`, and the experts backend of `transformers` built from it.

Axes: T tokens, D hidden, J experts per token, E experts, I intermediate; M = T * J slots, slot t * J + j being choice j
of token t; sorted by expert where nothing else is said.

Saved for the backward: x, the routing and the [M, 2 I] input of the activation. The activation itself is recomputed,
and no copy of x or of the output in expert order exists on a GPU.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ale.kernels.device import chip_of, under_autocast, wide
from ale.kernels.grouped_gemm import cpu, grouped_gemm, op
from ale.kernels.grouped_gemm.cpu import Variant

STREAM_ROWS = 192
"""Rows per expert from which the CPU takes one expert after the other, its temporaries staying in cache. Below, two
grouped products over all experts cost fewer calls (rows `grouped_gemm/moe/...` of the benchmark)."""


def moe_experts(
    x_TD: Tensor,
    experts_TJ: Tensor,
    weights_TJ: Tensor,
    gate_up_E2ID: Tensor,
    down_EDI: Tensor,
    *,
    check_experts: bool = True,
) -> Tensor:
    """`y[t] = sum over j of weights[t, j] * (silu(x[t] @ gate_e^T) * (x[t] @ up_e^T)) @ down_e^T`, e = experts[t, j].

    `gate_up_E2ID[e] = [gate_e; up_e]`, as `transformers` stores it. Differentiable in x, weights and both matrices.
    Deterministic. ValueError for shapes and types that do not fit, and for experts out of range. Reading those waits
    for the GPU: with `check_experts=False`, for choices straight from a router's top-k, an expert out of range on
    CUDA stops the program with a device assertion instead.
    """
    _check(x_TD, experts_TJ, weights_TJ, gate_up_E2ID, down_EDI)
    x, gate_up, down = under_autocast(x_TD, gate_up_E2ID, down_EDI)
    order_M, ends_E = sort_by_expert(experts_TJ, gate_up.shape[0], check=check_experts)
    layer = _Layer(x, weights_TJ, gate_up, down, order_M, ends_E)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in layer):
        y: Tensor = _MoE.apply(*layer)  # type: ignore[no-untyped-call]
    else:  # a decoding step is short enough to feel the autograd call
        y, _ = _forward(layer, keep_pre=False)
    return y.to(x_TD.dtype)


def sort_by_expert(experts_TJ: Tensor, num_experts: int, *, check: bool = True) -> tuple[Tensor, Tensor]:
    """The slots in expert order, [M], and each expert's end among them, [E] int32. Stable, so deterministic.

    `check` as `check_experts` of `moe_experts`.
    """
    sorted_M, order_M = experts_TJ.reshape(-1).sort(stable=True)
    if experts_TJ.is_cuda and not check:
        in_range = (sorted_M[:1] >= 0).all() & (sorted_M[-1:] < num_experts).all()
        torch._assert_async(in_range, "an expert index is out of range")
    elif sorted_M.numel():
        first, last = sorted_M[[0, -1]].tolist()
        if first < 0 or last >= num_experts:
            raise ValueError(f"expected expert indices in [0, {num_experts}), got {first if first < 0 else last}")
    if not experts_TJ.is_cuda:
        return order_M, torch.bincount(sorted_M, minlength=num_experts).cumsum(0, dtype=torch.int32)
    last_E = torch.arange(num_experts, device=sorted_M.device, dtype=sorted_M.dtype)
    return order_M, torch.searchsorted(sorted_M, last_E, right=True, out_int32=True)


def cpu_path(M: int, E: int) -> Literal["grouped", "stream"]:
    return "stream" if M >= STREAM_ROWS * E else "grouped"


class _Layer(NamedTuple):
    """What one call computes with; forward and backward take it whole."""

    x_TD: Tensor
    weights_TJ: Tensor
    gate_up_E2ID: Tensor
    down_EDI: Tensor
    order_M: Tensor
    ends_E: Tensor

    @property
    def top_k(self) -> int:
        return self.weights_TJ.shape[1]

    @property
    def token_M(self) -> Tensor:
        """The token of each row in expert order."""
        return self.order_M // self.top_k

    @property
    def scale_M1(self) -> Tensor:
        """The routing weight of each row in expert order."""
        return self.weights_TJ.reshape(-1, 1).index_select(0, self.order_M).to(self.x_TD.dtype)

    @property
    def cpu_path(self) -> Literal["grouped", "stream"]:
        return cpu_path(self.order_M.shape[0], self.gate_up_E2ID.shape[0])


class _MoE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        y_TD, pre = _forward(_Layer(*tensors), keep_pre=True)
        ctx.save_for_backward(*tensors, pre)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, pre = ctx.saved_tensors
        backward = _backward_cpu if chip_of(dy_TD) is None else _backward_fused
        return *backward(_Layer(*tensors), dy_TD, pre, needs=ctx.needs_input_grad), None, None


def _forward(layer: _Layer, *, keep_pre: bool) -> tuple[Tensor, Tensor | None]:
    """y and, with `keep_pre`, the input of the activation for the backward."""
    return (_forward_cpu if chip_of(layer.x_TD) is None else _forward_fused)(layer, keep_pre)


def _forward_fused(layer: _Layer, keep_pre: bool) -> tuple[Tensor, Tensor | None]:
    gather = Variant(gather_M=layer.order_M, top_k=layer.top_k, swiglu=True)
    h_MI, pre = op.gemm(layer.x_TD, layer.gate_up_E2ID.mT, layer.ends_E, gather, keep_pre=keep_pre)
    scatter = Variant(scatter_M=layer.order_M, scale_M=layer.weights_TJ.reshape(-1))
    y_MD, _ = op.gemm(h_MI, layer.down_EDI.mT, layer.ends_E, scatter)
    return op.sum_slots(y_MD, layer.top_k), pre


def _backward_fused(layer: _Layer, dy_TD: Tensor, pre: Tensor, *, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    x_TD, weights_TJ, gate_up, down, order_M, ends_E = layer
    top_k = layer.top_k
    dh_MI, _ = op.gemm(dy_TD, down, ends_E, Variant(gather_M=order_M, top_k=top_k))
    dpre, h_MI, dweights = op.swiglu_backward(pre, dh_MI, weights_TJ.reshape(-1), order_M)
    assert h_MI is not None
    assert dweights is not None
    dx = dgate_up = ddown = None
    if needs[0]:
        dx_MD, _ = op.gemm(dpre, gate_up, ends_E, Variant(scatter_M=order_M))
        dx = op.sum_slots(dx_MD, top_k)
    if needs[2]:
        dgate_up = op.weight_grad(x_TD, dpre, gate_up.mT, ends_E, gather_x_M=order_M, top_k=top_k).mT
    if needs[3]:
        ddown = op.weight_grad(h_MI, dy_TD, down.mT, ends_E, gather_dy_M=layer.token_M).mT
    return dx, dweights.view_as(weights_TJ), dgate_up, ddown


def _forward_cpu(layer: _Layer, keep_pre: bool) -> tuple[Tensor, Tensor | None]:
    x_TD, _, gate_up, down, order_M, ends_E = layer
    token_M, scale_M1 = layer.token_M, layer.scale_M1
    y_TD = torch.zeros(x_TD.shape, dtype=wide(x_TD))
    if layer.cpu_path == "grouped":
        swiglu = Variant(swiglu=True)
        h_MI, pre = op.gemm(x_TD.index_select(0, token_M), gate_up.mT, ends_E, swiglu, keep_pre=keep_pre)
        # the routing weight on h, which is narrower than y or equal: (s h) w = s (h w)
        y_MD, _ = op.gemm(h_MI.mul_(scale_M1), down.mT, ends_E)
        return y_TD.index_add_(0, token_M, y_MD.to(y_TD.dtype)).to(x_TD.dtype), pre
    pre = x_TD.new_empty(order_M.shape[0], gate_up.shape[1]) if keep_pre else None
    for expert, begin, end in _segments(ends_E):
        token_m = token_M[begin:end]
        z = _mm(x_TD.index_select(0, token_m), gate_up[expert].t(), out=None if pre is None else pre[begin:end])
        gate, up = z.chunk(2, dim=1)
        y = _mm(F.silu(gate).mul_(up).mul_(scale_M1[begin:end]), down[expert].t())
        y_TD.index_add_(0, token_m, y.to(y_TD.dtype))
    return y_TD.to(x_TD.dtype), pre


def _backward_cpu(layer: _Layer, dy_TD: Tensor, pre: Tensor, *, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    x_TD, weights_TJ, gate_up, down, order_M, ends_E = layer
    token_M, scale_M1 = layer.token_M, layer.scale_M1
    dx_TD = torch.zeros(x_TD.shape, dtype=wide(x_TD)) if needs[0] else None
    dweights_M = torch.empty_like(weights_TJ).view(-1)
    if layer.cpu_path == "grouped":
        dy_MD = dy_TD.index_select(0, token_M)
        dh_MI, _ = op.gemm(dy_MD, down, ends_E)
        dpre, h_MI, dots_M = cpu.swiglu_backward(pre, dh_MI, scale_M1)
        dweights_M.index_copy_(0, order_M, dots_M.to(dweights_M.dtype))
        if dx_TD is not None:
            dx_MD, _ = op.gemm(dpre, gate_up, ends_E)
            dx_TD.index_add_(0, token_M, dx_MD.to(dx_TD.dtype))
        x_MD = x_TD.index_select(0, token_M) if needs[2] else None
        dgate_up = None if x_MD is None else op.weight_grad(x_MD, dpre, gate_up.mT, ends_E).mT
        ddown = op.weight_grad(h_MI, dy_MD, down.mT, ends_E).mT if needs[3] else None
    else:
        dgate_up = torch.zeros_like(gate_up) if needs[2] else None
        ddown = torch.zeros_like(down) if needs[3] else None
        for expert, begin, end in _segments(ends_E):
            token_m = token_M[begin:end]
            dy = dy_TD.index_select(0, token_m)
            dpre, h, dots = cpu.swiglu_backward(pre[begin:end], _mm(dy, down[expert]), scale_M1[begin:end])
            dweights_M.index_copy_(0, order_M[begin:end], dots.to(dweights_M.dtype))
            if dx_TD is not None:
                dx_TD.index_add_(0, token_m, _mm(dpre, gate_up[expert]).to(dx_TD.dtype))
            if dgate_up is not None:
                _mm(dpre.t(), x_TD.index_select(0, token_m), out=dgate_up[expert])
            if ddown is not None:
                _mm(dy.t(), h, out=ddown[expert])
    return None if dx_TD is None else dx_TD.to(x_TD.dtype), dweights_M.view_as(weights_TJ), dgate_up, ddown


def _segments(ends_E: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, row after the last) of the experts that have rows."""
    ends = ends_E.tolist()
    return [(e, b, t) for e, (b, t) in enumerate(zip([0, *ends], ends, strict=False)) if t > b]


def _mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """`a @ b`, through fp32 where the library has no kernels for fp16."""
    if a.dtype is torch.float16 and not cpu.processor().fp16:
        product = (a.float() @ b.float()).to(a.dtype)
        return product if out is None else out.copy_(product)
    return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)


def _check(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> None:
    if x.dim() != 2 or gate_up.dim() != 3 or gate_up.shape[1] % 2 or gate_up.shape[2] != x.shape[1]:
        raise ValueError(f"expected x [T, D] and gate_up [E, 2 I, D], got {tuple(x.shape)} and {tuple(gate_up.shape)}")
    expected = (gate_up.shape[0], x.shape[1], gate_up.shape[1] // 2)
    if down.shape != expected:
        raise ValueError(f"expected down [E, D, I] = {expected}, got {tuple(down.shape)}")
    if experts.dim() != 2 or experts.shape[0] != x.shape[0] or weights.shape != experts.shape:
        raise ValueError(
            f"expected experts and weights [T, J] with T = {x.shape[0]}, got {tuple(experts.shape)} and "
            f"{tuple(weights.shape)}"
        )
    if experts.is_floating_point() or not weights.is_floating_point():
        raise ValueError(f"expected integer experts and floating-point weights, got {experts.dtype}, {weights.dtype}")
    for name, tensor in (("experts", experts), ("weights", weights), ("gate_up", gate_up), ("down", down)):
        if tensor.device != x.device:
            raise ValueError(f"expected {name} on {x.device} with x, got {tensor.device}")
    one_dtype = x.dtype == gate_up.dtype == down.dtype and x.is_floating_point()
    if not one_dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"expected x, gate_up and down of one floating-point dtype, got {x.dtype}, {gate_up.dtype} and {down.dtype}"
        )


def register_experts(name: str = "ale") -> None:
    """Makes `experts_implementation="ale"` known to `transformers`, for every model with its experts interface.

    Then `AutoModelForCausalLM.from_pretrained(..., experts_implementation="ale")`, or
    `model.set_experts_implementation("ale")` on a loaded model. Needs transformers 5; may be called again.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of an experts module of `transformers`: fused for SwiGLU without biases, composed for the rest."""
    if self._is_expert_parallel:
        # choices of other ranks' experts carry the index num_experts and must add nothing
        elsewhere = top_k_index >= self.num_experts
        top_k_index = top_k_index.masked_fill(elsewhere, self.num_experts - 1)
        top_k_weights = top_k_weights.masked_fill(elsewhere, 0.0)
    if is_plain_swiglu(self):
        gate_up, down = self.gate_up_proj, self.down_proj
        if self.is_transposed:
            gate_up, down = gate_up.mT, down.mT
        return moe_experts(hidden_states, top_k_index, top_k_weights, gate_up, down, check_experts=False)
    return _composed_experts(self, hidden_states, top_k_index, top_k_weights)


def is_plain_swiglu(module: Any) -> bool:
    from transformers.activations import SiLUActivation
    from transformers.integrations.moe import _default_apply_gate

    return (
        module.has_gate
        and module.is_concatenated
        and not module.has_bias
        and not module.has_post_expert_norm
        and type(module)._apply_gate is _default_apply_gate
        and isinstance(module.act_fn, (SiLUActivation, torch.nn.SiLU))
    )


def _composed_experts(module: Any, x_TD: Tensor, experts_TJ: Tensor, weights_TJ: Tensor) -> Tensor:
    """Any other experts module: its own activation, gate, biases and norm between two grouped products."""
    top_k = experts_TJ.shape[1]
    order_M, ends_E = sort_by_expert(experts_TJ, module.num_experts, check=False)
    expert_M = experts_TJ.reshape(-1)[order_M]
    first = "gate_up_proj" if module.has_gate else "up_proj"

    def project(rows: Tensor, name: str, **gather: Any) -> Tensor:
        weight = getattr(module, name)
        z = grouped_gemm(rows, weight if module.is_transposed else weight.mT, ends_E, **gather)
        return z + getattr(module, f"{name}_bias")[expert_M] if module.has_bias else z

    h = project(x_TD, first, gather_M=order_M, top_k=top_k)
    h = module._apply_gate(h) if module.has_gate else module.act_fn(h)
    y_MD = project(h, "down_proj")
    if module.has_post_expert_norm:
        y_MD = module.post_expert_norm(y_MD)
    y_MD = y_MD * weights_TJ.reshape(-1, 1)[order_M].to(y_MD.dtype)
    return op.sum_slots(y_MD[torch.argsort(order_M)], top_k).to(x_TD.dtype)
