"""The kernels under Triton's interpreter, on CPU tensors.

Triton decides when it is imported whether it interprets, so tests that ask for `use_kernels` run in a process with
TRITON_INTERPRET=1, which `test_under_the_interpreter.py` starts; elsewhere they are not collected. The interpreter is
slow: what only repeats a case that another test has on another chip or in another type is left to the full suite.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

SM80, SM90 = (8, 0), (9, 0)
"""Without and with the unit that moves tiles by descriptor."""
UseKernels = Callable[[tuple[int, int]], None]


def chips_and_types(*dtypes: torch.dtype) -> list[Any]:
    """All pairs, for `parametrize("chip, dtype")`: each chip and each type once, the other pairs in the full suite."""
    return [
        pytest.param(chip, dtype, id=f"{name}, {dtype}", marks=[pytest.mark.full] if (m + n) % 2 else [])
        for m, dtype in enumerate(dtypes)
        for n, (name, chip) in enumerate((("pointers", SM80), ("descriptors", SM90)))
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    on_kernels = {item for item in items if "use_kernels" in getattr(item, "fixturenames", ())}
    shared = {item.path for item in on_kernels}
    dropped = [item for item in items if item.path in shared and (item in on_kernels) != INTERPRETING]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in set(dropped)]


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
