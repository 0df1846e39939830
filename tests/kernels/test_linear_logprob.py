"""`linear_logprob`: the reference by hand, gradients in float64, the CPU path, memory, then the kernels."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ale.kernels import linear_logprob
from ale.kernels.linear_logprob import tiles
from ale.kernels.linear_logprob.reference import linear_logprob_reference

from .conftest import SM90, chips_and_types

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def inputs(T: int, D: int, V: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    h = torch.randn(T, D, dtype=dtype).requires_grad_()
    w = torch.randn(V, D, dtype=dtype).requires_grad_()
    return h, w, torch.randint(0, V, (T,))


def outputs_and_gradients(function: Any, h: Tensor, w: Tensor, token: Tensor, **options: Any) -> list[Tensor]:
    result = function(h, w, token, **options)
    result = result if isinstance(result, tuple) else (result,)
    # small, as a loss divided by many tokens is: a half type must not lose it
    grads = [1e-4 * torch.linspace(-1, 1, r.numel(), dtype=r.dtype) for r in result]
    return [*result, *torch.autograd.grad(result, [h, w], grads)]


def assert_close(ours: list[Tensor], expected: list[Tensor]) -> None:
    for index, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        error = (
            ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()
            if b.numel()
            else 0.0
        )
        assert error <= TOLERANCE[a.dtype], f"output {index}: {error:.1e}"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "CPU_TOKENS", 4)
    monkeypatch.setattr(tiles, "CPU_VOCABULARY", 8)


def test_the_reference_gives_numbers_worked_by_hand() -> None:
    h, w = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [math.log(3.0)]])
    logp, entropy = linear_logprob_reference(h, w, torch.tensor([1, 0]), entropy=True)
    # odds 1 : 3, then 1 : 9
    assert logp.tolist() == pytest.approx([math.log(3 / 4), math.log(1 / 10)])
    assert entropy[0].item() == pytest.approx(-(1 / 4 * math.log(1 / 4) + 3 / 4 * math.log(3 / 4)))
    tempered = linear_logprob_reference(h, w, torch.tensor([1, 0]), temperature=2.0)
    assert tempered[1].item() == pytest.approx(math.log(1 / 4))  # the square root of 9


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("entropy", [False, True], ids=["logp", "logp and entropy"])
def test_gradients_pass_gradcheck_in_float64(entropy: bool) -> None:
    h, w, token = inputs(6, 3, 11, torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprob(h, w, token, temperature=0.7, entropy=entropy),
        (h, w),
    )


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 8, 8), (5, 7, 9), (13, 16, 100), (0, 4, 5)], ids=str)
def test_the_cpu_path_equals_the_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    case = inputs(*shape, dtype)
    for options in ({}, {"temperature": 0.5, "entropy": True}):
        if shape[2] == 1 and options:
            continue  # an entropy of zero has no relative error
        ours = outputs_and_gradients(linear_logprob, *case, **options)
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        assert ours[0].dtype is wide
        if shape[2] > 1:
            assert_close(ours, outputs_and_gradients(linear_logprob_reference, *case, **options))
        else:
            assert all(not part.any() for part in ours)


@pytest.mark.usefixtures("small_blocks")
def test_logits_of_a_thousand_do_not_overflow() -> None:
    h, w, token = torch.full((3, 1), 1000.0), torch.linspace(-1, 1, 20)[:, None], torch.tensor([0, 19, 7])
    logp, entropy = linear_logprob(h, w, token, entropy=True)
    expected = linear_logprob_reference(h, w, token, entropy=True)
    torch.testing.assert_close(logp, expected[0])
    assert logp.max() <= 0
    torch.testing.assert_close(entropy, torch.zeros(3), atol=1e-4, rtol=0)


@given(T=st.integers(1, 9), V=st.integers(2, 30), cut=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_a_token_does_not_depend_on_the_tokens_beside_it(T: int, V: int, cut: int) -> None:
    h, w, token = inputs(T, 8, V)
    whole = linear_logprob(h, w, token)
    parts = [linear_logprob(h[i : i + cut], w, token[i : i + cut]) for i in range(0, T, cut)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=0, atol=1e-5)


def test_a_frozen_head_or_hidden_state_gets_no_gradient() -> None:
    h, w, token = inputs(4, 8, 16)
    (dh,) = torch.autograd.grad(linear_logprob(h, w.detach(), token).sum(), [h])
    (dw,) = torch.autograd.grad(linear_logprob(h.detach(), w, token).sum(), [w])
    both = torch.autograd.grad(linear_logprob(h, w, token).sum(), [h, w])
    assert torch.equal(dh, both[0])
    assert torch.equal(dw, both[1])


def test_an_unused_output_costs_its_gradient_nothing() -> None:
    h, w, token = inputs(4, 8, 16)
    logp, entropy = linear_logprob(h, w, token, entropy=True)
    expected = linear_logprob_reference(h, w, token, entropy=True)
    for ours, theirs in zip((logp, entropy), expected, strict=True):
        a = torch.autograd.grad(ours.sum(), [h, w], retain_graph=True)
        b = torch.autograd.grad(theirs.sum(), [h, w], retain_graph=True)
        assert_close(list(a), list(b))


class _Largest(TorchDispatchMode):
    """The largest storage that any operation inside returned, in elements."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


def test_the_logits_are_never_held_forward_or_backward() -> None:
    T, D, V = 256, 8, 8192
    h, w, token = inputs(T, D, V)
    with _Largest() as largest:
        logp, entropy = linear_logprob(h, w, token, entropy=True)
        (logp.sum() + entropy.sum()).backward()
    assert 0 < largest.elements <= T * V // 8


def test_the_same_input_gives_the_same_bits() -> None:
    case = inputs(9, 8, 50)
    first, second = (outputs_and_gradients(linear_logprob, *case) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


H, W, TOKEN = torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 4, 2])
BAD = {
    "h of three axes": ((H[None], W, TOKEN), {}, r"h \[T, D\]"),
    "D that differs": ((H[:, :3], W, TOKEN), {}, r"w \[V, D\]"),
    "an empty vocabulary": ((H, W[:0], TOKEN), {}, "V > 0"),
    "tokens of another length": ((H, W, TOKEN[:2]), {}, r"\[T = 3\]"),
    "tokens of floats": ((H, W, TOKEN.float()), {}, "int32 or int64"),
    "a token beyond the vocabulary": ((H, W, torch.tensor([0, 5, 1])), {}, r"\[0, 5\), got 0 to 5"),
    "a negative token": ((H, W, torch.tensor([0, -100, 1])), {}, "got -100 to 1"),
    "two dtypes": ((H, W.half(), TOKEN), {}, "one dtype"),
    "a device that differs": ((H, W, TOKEN.to("meta")), {}, "tokens on cpu"),
    "a temperature of zero": ((H, W, TOKEN), {"temperature": 0.0}, "above 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case: str) -> None:
    args, options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        linear_logprob(*args, **options)


@pytest.mark.parametrize(("chip", "dtype"), chips_and_types(torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((19, 24, 300), {}),
        ((37, 40, 301), {"temperature": 0.7, "entropy": True}),
        ((3, 23, 130), {"entropy": True}),
    ],
    ids=["several tiles", "odd vocabulary, entropy", "D that descriptors cannot take"],
)
def test_the_kernels_equal_the_reference(
    shape: tuple[int, int, int], options: dict[str, Any], dtype: torch.dtype, chip: tuple[int, int], use_kernels: Any
) -> None:
    case = inputs(*shape, dtype)
    expected = outputs_and_gradients(linear_logprob_reference, *case, **options)
    use_kernels(chip)
    assert_close(outputs_and_gradients(linear_logprob, *case, **options), expected)


def test_the_kernels_go_through_the_vocabulary_in_chunks(use_kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "chunk", lambda _: 100)
    case = inputs(5, 16, 270)
    expected = outputs_and_gradients(linear_logprob_reference, *case, entropy=True)
    use_kernels(SM90)
    assert_close(outputs_and_gradients(linear_logprob, *case, entropy=True), expected)


@pytest.mark.parametrize("T", [1, 17, 100, 4096, 100_000])
@pytest.mark.parametrize("V", [5, 32_000, 151_936])
def test_slices_cover_the_vocabulary_and_none_is_empty(T: int, V: int) -> None:
    tile = tiles.sums_tile(T, torch.bfloat16, SM90)
    slices, per_slice = tiles.slices(T, V, tile, 132)
    words = per_slice * tile.n
    assert (slices - 1) * words < V <= slices * words


def test_the_backward_holds_a_small_slice_of_the_vocabulary() -> None:
    assert tiles.chunk(151_936) <= 151_936 / 16
    assert tiles.chunk(50) >= 50
