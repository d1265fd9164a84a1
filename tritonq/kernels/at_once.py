"""Quantize and QDQ of a small tensor with a tensor-wide scale in one launch, whose programs wait for each other.

Every program holds one tile. It leaves the largest key of its tile where all can see it, waits until all have done so,
works out the tensor-wide scale for itself, and goes on as `group_kernel` or `apply_kernel` does; the tile it then reads
again lies in the cache. A large tensor is better off with launches of its own for keys and codes, which fill the GPU.

Programs meet in `slots` of 64 bits, a count of launches above a key: a key and the word that it is there arrive
together, nothing has to be set to zero before, and a count that no program of a launch has seen yet is the next one
whatever came before. Every launch writes all slots, those beyond its programs with a key of 0. All programs have to be
on the GPU at a time, which a cooperative launch guarantees.
"""

import triton
import triton.language as tl

from tritonq.codecs import scale_triton as scales
from tritonq.kernels import tile
from tritonq.kernels.quantize import apply_kernel, group_kernel
from tritonq.kernels.stats import _store_choice, _tensor_scale


@triton.jit
def _largest(key, slots_ptr, SLOTS: tl.constexpr):
    """The largest of the keys of all programs (int32 or uint32), and of 0."""
    pid, slot = tl.program_id(0), tl.arange(0, SLOTS)
    launch = (tl.load(slots_ptr + pid, volatile=True) >> 32) + 1
    word = (launch << 32) + tl.where(slot == pid, key.to(tl.uint32, bitcast=True).to(tl.int64), 0)
    tl.atomic_xchg(slots_ptr + slot, word, slot % tl.num_programs(0) == pid, sem="relaxed")
    launch = launch.to(tl.int32)
    seen = tl.load(slots_ptr + slot, volatile=True)
    while tl.max(((seen >> 32).to(tl.int32) != launch).to(tl.int32), 0) != 0:
        seen = tl.load(slots_ptr + slot, volatile=True)
    return tl.maximum(tl.max(seen.to(tl.int32).to(key.dtype, bitcast=True), 0), 0)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "first_index"])
def at_once_kernel(
    x_ptr, q_ptr, scale_ptr, zero_ptr, tensor_scale_ptr, slots_ptr,
    seed_low, seed_high, first_index, K, row_bytes, tiles,
    FMT: tl.constexpr, MODE: tl.constexpr, ROUNDING: tl.constexpr, LIMIT: tl.constexpr, PARTIAL: tl.constexpr,
    WORDS: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
    S: tl.constexpr, M: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """A row of K contiguous elements in as many tiles of BLOCK as there are programs. slots: int64 [2, SLOTS]."""
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tile.to_float32(tl.load(x_ptr + lane, lane < K, other=0.0))
    if FMT.tensor_scale:
        x = tl.where(x - x == 0.0, x, 0.0)  # of finite elements
    high, low = scales.keys(x, FMT)
    high = _largest(tl.max(high, 0), slots_ptr, SLOTS).to(tl.int32, bitcast=True)
    low = tl.full([], 0, tl.int32)
    if FMT.scale.signed_range:
        low = _largest(tl.max(scales.keys(x, FMT)[1], 0), slots_ptr + SLOTS, SLOTS).to(tl.int32, bitcast=True)
    # Every program stores the same, for itself.
    one, zero = tl.arange(0, 1), tl.zeros([1], tl.int32)
    if FMT.tensor_scale:
        tl.store(tensor_scale_ptr + one, _tensor_scale(high + zero, low + zero, FMT))
    else:
        _store_choice(high + zero, low + zero, one, one == 0, scale_ptr, zero_ptr, tensor_scale_ptr, FMT)
    tl.debug_barrier()
    if FMT.tensor_scale:
        group_kernel(
            x_ptr, q_ptr, scale_ptr, zero_ptr, tensor_scale_ptr,
            seed_low, seed_high, first_index, 1, K, row_bytes, 1, tiles, K, K, 1,
            FMT, MODE, ROUNDING, LIMIT, PARTIAL, 1, WORDS, S, M, R, GROUPS, W, False,
        )  # fmt: skip
    else:
        apply_kernel(
            x_ptr, q_ptr, scale_ptr, zero_ptr, tensor_scale_ptr,
            seed_low, seed_high, first_index, 1, K, row_bytes, 1, tiles, K, K, 1,
            FMT, MODE, ROUNDING, LIMIT, PARTIAL, 1, WORDS, 1, BLOCK, True,
        )  # fmt: skip
