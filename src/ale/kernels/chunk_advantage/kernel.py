"""The Triton kernels of `chunk_advantage`, in the order they run. Not yet run on a GPU.

A chunk is cut into pieces of at most PIECE tokens counted from its own start, so that a sum is the same tree of
additions wherever the chunk lies in the batch. One row of a tile is one piece: a chunk of 100,000 tokens is spread over
many programs, 100,000 chunks of one token over rows. Nothing is added atomically.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def piece_sums_kernel(
    logp_ptr,
    old_ptr,
    mu_ptr,
    pieces_ptr,  # int32 [3, P]: chunk, first token, token after the last
    tokens_ptr,  # int32 [C]: tokens that carry the loss
    sums_ptr,  # [3, P]: logp - old, old - mu, logp
    P,
    HAS_OLD: tl.constexpr,
    HAS_MU: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """The one pass over the tokens in forward. The tokens of a chunk that does not carry the loss are not read."""
    for first in range(tl.program_id(0) * ROWS, P, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        live = row < P
        chunk = tl.load(pieces_ptr + row, mask=live, other=0)
        start = tl.load(pieces_ptr + P + row, mask=live, other=0)
        stop = tl.load(pieces_ptr + 2 * P + row, mask=live, other=0)
        carried = tl.load(tokens_ptr + chunk, mask=live, other=0) > 0
        at = start[:, None] + tl.arange(0, PIECE)[None, :]
        inside = (at < stop[:, None]) & carried[:, None]
        logp = tl.load(logp_ptr + at, mask=inside, other=0.0).to(ACC)
        ratio = logp
        if HAS_OLD:
            old = tl.load(old_ptr + at, mask=inside, other=0.0).to(ACC)
            ratio = logp - old
            if HAS_MU:
                mu = tl.load(mu_ptr + at, mask=inside, other=0.0).to(ACC)
                tl.store(sums_ptr + P + row, tl.sum(old - mu, axis=1), mask=live)
        tl.store(sums_ptr + row, tl.sum(ratio, axis=1), mask=live)
        tl.store(sums_ptr + 2 * P + row, tl.sum(logp, axis=1), mask=live)
        if not (HAS_OLD and HAS_MU):
            tl.store(sums_ptr + P + row, tl.zeros([ROWS], ACC), mask=live)


@triton.jit
def segment_sums_kernel(
    values_ptr,  # [3, V]
    offsets_ptr,  # int32 [S + 1] over V
    sums_ptr,  # [3, S]
    V,
    S,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Pieces to chunks, and chunks to trajectories. A lane adds every LANES-th value of its segment."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < S
    start = tl.load(offsets_ptr + row, mask=live, other=0)
    stop = tl.load(offsets_ptr + row + 1, mask=live, other=0)
    longest = tl.max(stop - start, axis=0)
    ratio = tl.zeros([ROWS, LANES], ACC)
    mismatch = tl.zeros([ROWS, LANES], ACC)
    logp = tl.zeros([ROWS, LANES], ACC)
    for first in range(0, longest, LANES):
        at = start[:, None] + first + tl.arange(0, LANES)[None, :]
        inside = at < stop[:, None]
        ratio += tl.load(values_ptr + at, mask=inside, other=0.0)
        mismatch += tl.load(values_ptr + V + at, mask=inside, other=0.0)
        logp += tl.load(values_ptr + 2 * V + at, mask=inside, other=0.0)
    tl.store(sums_ptr + row, tl.sum(ratio, axis=1), mask=live)
    tl.store(sums_ptr + S + row, tl.sum(mismatch, axis=1), mask=live)
    tl.store(sums_ptr + 2 * S + row, tl.sum(logp, axis=1), mask=live)


@triton.jit
def _then(left_factor, left_return, factor, reward):
    """G = reward + factor * (what follows), composed."""
    return left_factor * factor, reward + factor * left_return


@triton.jit
def returns_kernel(
    reward_ptr,  # fp64 [C]: with the advantage added at the outcome chunk
    offsets_ptr,  # int32 [N + 1] over C
    return_ptr,  # [C]
    GAMMA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """G_k = r_k + gamma G_{k+1}: one program a trajectory, blocks of chunks from its end. In fp64: gamma^1000 in fp32
    is off by 1e-5 and more, and chunks are few."""
    start = tl.load(offsets_ptr + tl.program_id(0))
    stop = tl.load(offsets_ptr + tl.program_id(0) + 1)
    lane = tl.arange(0, BLOCK)
    following = tl.zeros([], tl.float64)
    for done in range(0, stop - start, BLOCK):
        at = stop - 1 - done - lane
        live = at >= start
        reward = tl.load(reward_ptr + at, mask=live, other=0.0)
        factor = tl.full([BLOCK], GAMMA, tl.float64)
        factor, value = tl.associative_scan((factor, reward), axis=0, combine_fn=_then)
        value += factor * following
        tl.store(return_ptr + at, value, mask=live)
        following = tl.sum(tl.where(lane == BLOCK - 1, value, 0.0), axis=0)


@triton.jit
def weigh_kernel(
    ratio_ptr,  # [U]: sum of logp - old over the level of the ratio, over ratio_tokens
    ratio_tokens_ptr,
    mismatch_ptr,  # [U]: sum of old - mu over the level of the mask, over mismatch_tokens
    mismatch_tokens_ptr,
    logp_ptr,  # [U]: sum of logp over the unit
    tokens_ptr,  # int32 [U]: tokens that carry the loss
    return_ptr,
    weight_ptr,
    log_ratio_ptr,
    log_mismatch_ptr,
    mask_ptr,  # int8
    term_ptr,  # - weight * logp
    U,
    LOW_POSITIVE: tl.constexpr,
    HIGH_POSITIVE: tl.constexpr,
    LOW_NEGATIVE: tl.constexpr,
    HIGH_NEGATIVE: tl.constexpr,
    DROP: tl.constexpr,
    RATIO_MEAN: tl.constexpr,
    LOG_LOW: tl.constexpr,
    LOG_HIGH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Ratio, mask, factor and weight of each unit, and its term of the loss."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < U
    tokens = tl.load(tokens_ptr + at, mask=live, other=0)
    carried = tokens > 0
    log_ratio = tl.load(ratio_ptr + at, mask=live & carried, other=0.0)
    if RATIO_MEAN:
        log_ratio = log_ratio / tl.load(ratio_tokens_ptr + at, mask=live & carried, other=1).to(log_ratio.dtype)
    log_mismatch = tl.load(mismatch_ptr + at, mask=live & carried, other=0.0)
    log_mismatch = log_mismatch / tl.load(mismatch_tokens_ptr + at, mask=live & carried, other=1).to(log_mismatch.dtype)
    # NaN: -inf - -inf. The engine could not have sampled this.
    log_mismatch = tl.where(log_mismatch == log_mismatch, log_mismatch, float("inf"))
    keep = carried & (log_mismatch >= LOG_LOW) & (log_mismatch <= LOG_HIGH)

    value = tl.load(return_ptr + at, mask=live, other=0.0)
    ratio = tl.exp(log_ratio)
    dtype = ratio.dtype
    low = tl.where(value > 0, tl.full([BLOCK], LOW_POSITIVE, dtype), tl.full([BLOCK], LOW_NEGATIVE, dtype))
    high = tl.where(value > 0, tl.full([BLOCK], HIGH_POSITIVE, dtype), tl.full([BLOCK], HIGH_NEGATIVE, dtype))
    # A comparison with NaN is false, so NaN stays.
    factor = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    if DROP:
        factor = tl.where(factor == ratio, factor, 0.0)
    weight = tl.where(keep & (value != 0), factor * value, 0.0)
    logp = tl.load(logp_ptr + at, mask=live & carried, other=0.0)
    # A weight of 0 takes its tokens out whatever they hold: 0 * -inf is not 0.
    term = tl.where(weight != 0, -weight * logp, 0.0)

    tl.store(weight_ptr + at, weight, mask=live)
    tl.store(log_ratio_ptr + at, log_ratio, mask=live)
    tl.store(log_mismatch_ptr + at, log_mismatch, mask=live)
    tl.store(mask_ptr + at, keep.to(tl.int8), mask=live)
    tl.store(term_ptr + at, term, mask=live)


@triton.jit
def expand_kernel(
    gradient_ptr,  # [C]
    pieces_ptr,  # int32 [3, P]
    out_ptr,  # [T]
    P,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """The one pass over the tokens in backward: each gets the gradient of its chunk."""
    for first in range(tl.program_id(0) * ROWS, P, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        live = row < P
        chunk = tl.load(pieces_ptr + row, mask=live, other=0)
        start = tl.load(pieces_ptr + P + row, mask=live, other=0)
        stop = tl.load(pieces_ptr + 2 * P + row, mask=live, other=0)
        gradient = tl.load(gradient_ptr + chunk, mask=live, other=0.0)
        at = start[:, None] + tl.arange(0, PIECE)[None, :]
        value = tl.broadcast_to(gradient[:, None], [ROWS, PIECE])
        tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=at < stop[:, None])
