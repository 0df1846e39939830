"""`grouped_gemm`: the reference by hand, gradients in float64, the CPU path, then the kernels under the interpreter.

Axes: R rows of x, M rows of the product, E experts, K inputs, N outputs.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ale.kernels import grouped_gemm
from ale.kernels.grouped_gemm import op, tiles
from ale.kernels.grouped_gemm.reference import grouped_gemm_reference

from .conftest import SM90, chips_and_types

VARIANTS = ("plain", "gather", "scatter and scale", "swiglu")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Largest error over largest value: a few roundings of each type."""


class Case:
    """Inputs of one call, in the variants that the op has."""

    def __init__(
        self,
        rows_E: list[int],
        K: int,
        N: int,
        dtype: torch.dtype = torch.float32,
        variant: str = "plain",
        *,
        k_major: bool = False,
    ) -> None:
        M, E = sum(rows_E), len(rows_E)
        top_k = 2 if variant in ("gather", "swiglu") and M % 2 == 0 else 1
        self.x = torch.randn(M // top_k, K, dtype=dtype).requires_grad_()
        w = torch.randn(E, N, K, dtype=dtype).mT if k_major else torch.randn(E, K, N, dtype=dtype)
        self.w = w.requires_grad_()
        self.ends = torch.tensor(rows_E).cumsum(0).int()
        self.inputs = [self.x, self.w]
        self.options: dict[str, Any] = {"top_k": top_k, "swiglu": variant == "swiglu"}
        if variant != "plain":
            self.options["gather_M"] = torch.randperm(M)
        if variant == "scatter and scale":
            self.options["scatter_M"] = torch.randperm(M)
            self.options["scale_M"] = torch.rand(M, dtype=dtype).requires_grad_()
            self.inputs.append(self.options["scale_M"])

    def run(self, function: Any) -> list[Tensor]:
        """y and the gradient of every input."""
        y = function(self.x, self.w, self.ends, **self.options)
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        return [y, *torch.autograd.grad(y, self.inputs, dy)]


def assert_close(ours: list[Tensor], expected: list[Tensor]) -> None:
    for index, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if b.numel():
            error = ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-6)).item()
            assert error <= TOLERANCE[a.dtype], f"output {index}: {error:.1e}"


def test_the_reference_gives_numbers_worked_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    w = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[9.0, 9.0], [9.0, 9.0]], [[1.0, 1.0], [0.0, 2.0]]])
    ends = torch.tensor([1, 1, 3])  # rows 1, 0, 2
    assert grouped_gemm_reference(x, w, ends).tolist() == [[1, 2], [3, 11], [5, 17]]
    y = grouped_gemm_reference(
        x, w, ends, gather_M=torch.tensor([2, 0, 1]), scatter_M=torch.tensor([1, 2, 0]),
        scale_M=torch.tensor([10.0, 1.0, 0.5]),
    )  # fmt: skip
    # row 0 is x[2] @ w[0] = [5, 6] to row 1; row 1 is x[0] @ w[2] = [1, 5] to row 2; row 2 is x[1] @ w[2] to row 0
    assert y.tolist() == [[30, 110], [5, 6], [0.5, 2.5]]


def test_the_reference_of_swiglu_is_silu_of_the_first_half_times_the_second() -> None:
    x, w = torch.tensor([[2.0]]), torch.tensor([[[0.5, 3.0]]])  # gate 1, up 6
    y = grouped_gemm_reference(x, w, torch.tensor([1]), swiglu=True)
    assert y.item() == pytest.approx(6 / (1 + 2.718281828459045**-1))


@pytest.mark.parametrize("k_major", [False, True], ids=["dense", "stored transposed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_pass_gradcheck_in_float64(variant: str, k_major: bool) -> None:
    case = Case([2, 0, 4], 3, 4, torch.float64, variant, k_major=k_major)
    names = ("x", "w", "scale")[: len(case.inputs)]

    def call(*inputs: Tensor) -> Tensor:
        given = dict(zip(names, inputs, strict=True))
        options = case.options | ({"scale_M": given["scale"]} if "scale" in given else {})
        return grouped_gemm(given["x"], given["w"], case.ends, **options)

    assert torch.autograd.gradcheck(call, case.inputs)


SHAPES = {
    "one row": ([1], 8, 8),
    "experts without rows first, amid and last": ([0, 5, 0, 3, 0], 16, 24),
    "one expert with all rows": ([0, 0, 18, 0], 16, 16),
    "K and N that are no multiple of anything": ([7, 6, 1], 23, 38),
    "rows one beyond a tile": ([17, 16, 33], 16, 16),
    "more experts than rows": ([1, 0, 0, 1, 0, 0, 0, 0, 0], 8, 8),
    "no rows at all": ([0, 0], 8, 8),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_cpu_path_equals_the_reference(shape: str, variant: str, dtype: torch.dtype) -> None:
    case = Case(*SHAPES[shape], dtype, variant)
    assert_close(case.run(grouped_gemm), case.run(grouped_gemm_reference))


@pytest.mark.parametrize("path", ["grouped_mm", "loop", "upcast"])
def test_every_cpu_path_equals_the_reference(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "cpu_path", lambda *_, **__: path)
    for k_major in (False, True):
        case = Case([3, 0, 9], 16, 8, torch.float32, "scatter and scale", k_major=k_major)
        assert_close(case.run(grouped_gemm), case.run(grouped_gemm_reference))


@given(rows_E=st.lists(st.integers(0, 6), min_size=1, max_size=9), variant=st.sampled_from(VARIANTS))
@settings(max_examples=40, deadline=None)
def test_any_ragged_layout_equals_the_reference(rows_E: list[int], variant: str) -> None:
    case = Case(rows_E, 8, 8, torch.float32, variant)
    assert_close(case.run(grouped_gemm), case.run(grouped_gemm_reference))


@given(rows_E=st.lists(st.integers(0, 6), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_rows_do_not_depend_on_the_experts_beside_them(rows_E: list[int]) -> None:
    case = Case(rows_E, 8, 8)
    y = grouped_gemm(case.x, case.w, case.ends)
    begin = 0
    for expert, end in enumerate(case.ends.tolist()):
        alone = case.x[begin:end] @ case.w[expert]
        torch.testing.assert_close(y[begin:end], alone, rtol=0, atol=1e-5)
        begin = end


def test_strided_inputs_and_an_expanded_gradient_are_taken() -> None:
    x = torch.randn(24, 12)[::2, 2:10].requires_grad_()
    w = torch.randn(3, 16, 8)[:, ::2].requires_grad_()
    ends = torch.tensor([4, 4, 12])
    grads = []
    for function in (grouped_gemm, grouped_gemm_reference):
        y = function(x, w, ends)
        grads.append(torch.autograd.grad(y.sum(), [x, w]))  # sum gives a gradient of stride 0
    assert_close(list(grads[0]), list(grads[1]))


def test_the_same_input_gives_the_same_bits() -> None:
    case = Case([9, 0, 7, 4], 16, 16, torch.float32, "scatter and scale")
    for a, b in zip(case.run(grouped_gemm), case.run(grouped_gemm), strict=True):
        assert torch.equal(a, b)


def test_autocast_reaches_the_operands() -> None:
    case = Case([3, 5], 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_gemm(case.x, case.w, case.ends)
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    assert case.w.grad is not None
    assert case.w.grad.dtype is torch.float32


X, W, ENDS = torch.zeros(4, 8), torch.zeros(2, 8, 6), torch.tensor([1, 4])
BAD = {
    "x of three axes": ((X[None], W, ENDS), {}, r"x \[R, K\]"),
    "K that differs": ((X[:, :7], W, ENDS), {}, r"w \[E, K, N\]"),
    "ends of another length": ((X, W, ENDS[:1]), {}, r"ends of shape \(2,\)"),
    "ends of floats": ((X, W, ENDS.float()), {}, "int32 or int64"),
    "ends that do not cover M": ((X, W, torch.tensor([1, 3])), {}, r"4 rows.*got \[1, 3\]"),
    "ends that fall": ((X, W, torch.tensor([5, 4])), {}, "rise"),
    "two dtypes": ((X, W.half(), ENDS), {}, "one dtype"),
    "an integer dtype": ((X.int(), W.int(), ENDS), {}, "one dtype"),
    "a device that differs": ((X, W.to("meta"), ENDS), {}, "w on cpu"),
    "top_k without gather": ((X, W, torch.tensor([1, 8])), {"top_k": 2}, "together with gather"),
    "a gather that repeats": ((X, W, ENDS), {"gather_M": torch.tensor([0, 1, 1, 2])}, "permutation"),
    "a scatter out of range": ((X, W, ENDS), {"scatter_M": torch.tensor([0, 1, 2, 4])}, "permutation"),
    "a scatter of another length": ((X, W, ENDS), {"scatter_M": torch.arange(3)}, r"shape \(4,\)"),
    "a scale of another length": ((X, W, ENDS), {"scale_M": torch.ones(3)}, r"scale of shape \(4,\)"),
    "swiglu with an odd N": ((X, W[:, :, :5], ENDS), {"swiglu": True}, "even N"),
    "swiglu with a scale": ((X, W, ENDS), {"swiglu": True, "scale_M": torch.ones(4)}, "neither scatter nor scale"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case: str) -> None:
    args, options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        grouped_gemm(*args, **options)


def test_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="cpu or cuda"):
        grouped_gemm(X.to("meta"), W.to("meta"), ENDS.to("meta"))


@pytest.mark.parametrize(("chip", "dtype"), chips_and_types(torch.float32, torch.float16))
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernels_equal_the_reference(
    dtype: torch.dtype, variant: str, chip: tuple[int, int], use_kernels: Any
) -> None:
    case = Case([0, 9, 1, 0, 8], 24, 48, dtype, variant, k_major=variant == "swiglu")
    expected = case.run(grouped_gemm_reference)
    use_kernels(chip)
    assert_close(case.run(grouped_gemm), expected)


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "one row"])
def test_the_kernels_hold_at_shapes_that_break_kernels(shape: str, use_kernels: Any) -> None:
    case = Case(*SHAPES[shape], torch.float32, "gather")
    expected = case.run(grouped_gemm_reference)
    use_kernels(SM90)
    assert_close(case.run(grouped_gemm), expected)


def test_the_kernels_check_the_values_of_a_tensor_once_until_it_is_written_to(
    use_kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[tuple[int, ...]] = []
    for name in ("_check_ends", "_check_permutation"):
        check = getattr(op, name)
        monkeypatch.setattr(op, name, lambda t, e, check=check: (looked.append(tuple(t.shape)), check(t, e)))
    case = Case([3, 0, 5], 16, 16, torch.float32, "gather")
    use_kernels(SM90)
    for _ in range(3):
        case.run(grouped_gemm)
    assert looked == [(3,), (8,)]
    case.ends[1] = 9
    with pytest.raises(ValueError, match=r"rise from 0 to the 8 rows.*\[3, 9, 8\]"):
        case.run(grouped_gemm)
    case.ends[1] = 8
    case.ends[2] = 9
    with pytest.raises(ValueError, match="rise"):
        case.run(grouped_gemm)


def test_the_kernels_take_bfloat16_strides_and_a_tall_tile(use_kernels: Any) -> None:
    case = Case([130, 0, 3], 8, 16, torch.bfloat16)
    case.x = torch.randn(133, 16, dtype=torch.bfloat16)[:, ::2].requires_grad_()
    case.inputs = [case.x, case.w]
    expected = case.run(grouped_gemm_reference)
    use_kernels(SM90)
    assert_close(case.run(grouped_gemm), expected)


def test_the_cpu_path_depends_on_shape_dtype_and_processor_alone() -> None:
    def path(dtype: torch.dtype, rows: int = 128, K: int = 1024, *, amx: bool = False, fp16: bool = False) -> str:
        return tiles.cpu_path(16 * rows, 16, K, 1024, dtype, tiles.Processor(amx=amx, fp16=fp16))

    assert path(torch.float32) == "grouped_mm"
    assert path(torch.bfloat16) == "grouped_mm"
    assert path(torch.bfloat16, amx=True) == "loop"
    assert path(torch.bfloat16, rows=4, amx=True) == "grouped_mm"
    assert path(torch.float16) == "upcast"
    assert path(torch.float16, fp16=True) == "grouped_mm"
    assert path(torch.float32, K=1023) == "loop"
    assert path(torch.float64) == "loop"


def test_a_product_and_its_gradients_take_one_path() -> None:
    """`grouped_gemm` lets torch record the bare product where it goes through `grouped_mm`: its backward then does."""
    for rows, K, N in ((128, 1024, 512), (4, 512, 1023), (7, 64, 8)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for amx in (False, True):
                processor = tiles.Processor(amx=amx, fp16=amx)
                ways = ((K, N), (N, K))
                assert len({tiles.cpu_path(rows * 8, 8, *way, dtype, processor) for way in ways}) == 1


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 4096])
def test_a_tile_is_no_taller_than_the_rows_of_an_expert_ask_for(rows: int) -> None:
    tile = tiles.gemm_tile(rows * 8, 8, 768, torch.bfloat16, SM90)
    assert tile.m <= max(16, 2 * rows)
    assert tile.m & (tile.m - 1) == 0
