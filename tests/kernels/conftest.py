"""Runs the Triton kernels under Triton's interpreter on CPU tensors; real GPUs are not needed and not used here."""

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("triton was imported before tests/kernels could choose its interpreter: set TRITON_INTERPRET=1")
os.environ["TRITON_INTERPRET"] = "1"

UseKernels = Callable[[tuple[int, int]], None]


@pytest.fixture(autouse=True)
def _one_seed_one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def use_kernels(monkeypatch: pytest.MonkeyPatch) -> UseKernels:
    """Sends CPU tensors down the CUDA path as if on a chip of that capability, with `torch.empty` full of NaN."""

    def use(capability: tuple[int, int]) -> None:
        import ale.kernels.moe
        from ale.kernels.device import Chip
        from ale.kernels.grouped_gemm import op as grouped_gemm_op
        from ale.kernels.linear_logprob import op as linear_logprob_op

        for module in (ale.kernels.moe, grouped_gemm_op, linear_logprob_op):
            monkeypatch.setattr(module, "chip_of", lambda _: Chip(capability, processors=3))
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))

    return use


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return poisoned
