"""Row-wise and column-wise quantization of one read: the parts of x [N, K] and those of its transpose [K, N].

Programs for rows and programs for columns take turns over the same region, so that what the ones read the others find
in the L2 cache: x comes from memory once, in one launch. Each is a tile of `quantize_tile`, of x or of its transpose.
"""

import triton
import triton.language as tl

from tritonq.kernels.quantize import quantize_tile


@triton.jit(do_not_specialize=["N", "tiles_m"])
def both_kernel(
    x_ptr, q_ptr, scale_ptr, zero_ptr, other_q_ptr, other_scale_ptr, other_zero_ptr,
    tensor_scale_ptr, other_tensor_scale_ptr,
    N, K, row_bytes, column_bytes, tiles_m, tiles_n, other_tiles_m, other_tiles_n, programs, other_programs,
    stride_batch, stride_row, stride_col,
    FMT: tl.constexpr, PARTIAL: tl.constexpr, OTHER_PARTIAL: tl.constexpr, WORDS: tl.constexpr,
    OTHER_WORDS: tl.constexpr, S: tl.constexpr, M: tl.constexpr, GROUPS: tl.constexpr, OTHER_M: tl.constexpr,
    OTHER_GROUPS: tl.constexpr, R: tl.constexpr, W: tl.constexpr, OTHER_W: tl.constexpr,
):  # fmt: skip
    """`programs` tiles of x and `other_programs` tiles of its transpose, whose parts are the `other` ones.

    The tensor scale is stored again beside the other parts.
    """
    pid = tl.program_id(0).to(tl.int64)
    before = pid * other_programs // (programs + other_programs)  # programs for columns that come earlier
    if FMT.tensor_scale:
        tl.store(other_tensor_scale_ptr, tl.load(tensor_scale_ptr), pid == 0)
    if (pid + 1) * other_programs // (programs + other_programs) == before:
        index = pid - before
        row = index // tiles_n
        quantize_tile(
            x_ptr, q_ptr, scale_ptr, zero_ptr, tensor_scale_ptr, None, None, None,
            row // tiles_m, row % tiles_m, index % tiles_n, N, K, row_bytes, stride_batch, stride_row, stride_col,
            FMT, "quantize", 0, 0.0, PARTIAL, WORDS, S, M, R, GROUPS, W, False,
        )  # fmt: skip
    else:  # tiles of the transpose, in the order of the rows of x
        row = before // other_tiles_m
        quantize_tile(
            x_ptr, other_q_ptr, other_scale_ptr, other_zero_ptr, tensor_scale_ptr, None, None, None,
            row // other_tiles_n, before % other_tiles_m, row % other_tiles_n, K, N, column_bytes,
            stride_batch, stride_col, stride_row,
            FMT, "quantize", 0, 0.0, OTHER_PARTIAL, OTHER_WORDS, 1, OTHER_M, R, OTHER_GROUPS, OTHER_W, False,
        )  # fmt: skip
