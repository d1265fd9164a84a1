"""Device functions of `lookup`; see `tritonq.codecs` for what each one does.

A binary search without branches: the bits of the code, most significant first, are comparisons of x with a threshold
that the bits before it select, by a tree of selects between constants. Such trees also make tables, once a program, in
which elements then look things up (`tl.gather`, from shared memory): values by code; and where the thresholds fall into
`cells`, by the cell of x, the code below the threshold there.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _entry(element, which, index, count, step):
    """The entry at `index` of a table, or None if not all `count` of them from there on, `step` apart, are equal (codes
    that a table leaves unused share their entry).

    Tables by code: "thresholds", above which x rounds to a higher code; "bounds", from which on it is at least the next
    value; "cells", in which the thresholds lie, from 0 on; "values"; and "following", the next value, the last one
    after itself.
    """
    table = {
        "thresholds": element.thresholds,
        "bounds": element.values[1:],
        "cells": tuple(n - element.cells[1][0] for n in element.cells[1]) if element.cells else (),
        "values": element.table,
        "following": element.table[1:] + element.table[-1:],
    }[which]
    table = table + (float("inf"),) * ((1 << element.bits) - len(table))
    entries = table[index : index + (count - 1) * step + 1 : step]
    return entries[0] if len(set(entries)) == 1 else None


@triton.jit
def _select(bits, USED: tl.constexpr, INDEX: tl.constexpr, COUNT: tl.constexpr, STEP: tl.constexpr,
            TABLE: tl.constexpr, ELEM: tl.constexpr):  # fmt: skip
    """Of COUNT entries from INDEX on, STEP apart, the one whose number has `bits` from USED on."""
    ENTRY: tl.constexpr = _entry(ELEM, TABLE, INDEX, COUNT, STEP)
    if ENTRY is not None:
        return tl.full([], ENTRY, tl.float32)  # not a bare number: those that are subnormal in fp32 become fp64
    else:
        HALF: tl.constexpr = COUNT // 2
        low = _select(bits, USED + 1, INDEX, HALF, STEP, TABLE, ELEM)
        high = _select(bits, USED + 1, INDEX + HALF * STEP, HALF, STEP, TABLE, ELEM)
        return tl.where(bits[USED], high, low)


@triton.jit
def _search(x, bits, LEFT: tl.constexpr, TABLE: tl.constexpr, ELEM: tl.constexpr):
    """`bits` of the code of x ("thresholds": the nearest, "bounds": the largest that is not above x), completed by the
    LEFT lower ones: entries 2^(LEFT - 1) - 1, 2^LEFT apart."""
    if LEFT == 0:
        return bits
    else:
        COUNT: tl.constexpr = 1 << (ELEM.bits - LEFT)
        threshold = _select(bits, 0, (1 << (LEFT - 1)) - 1, COUNT, 1 << LEFT, TABLE, ELEM)
        if TABLE == "bounds":
            higher = x >= threshold
        else:
            higher = x > threshold
        return _search(x, bits + (higher,), LEFT - 1, TABLE, ELEM)


@triton.jit
def _number(bits, ELEM: tl.constexpr):
    """The code of `bits`, int32."""
    # 2^23 + code has the code in its low bits; NVIDIA GPUs add floats on a pipe that has less to do than that of logic.
    LAST: tl.constexpr = ELEM.bits - 1
    code = tl.where(bits[0], 8388608.0 + (1 << LAST), 8388608.0)
    for i in tl.static_range(LAST):
        code = code + tl.where(bits[i + 1], 0.5 * (1 << (LAST - i)), 0.0)
    return code.to(tl.int32, bitcast=True) & 0xFF


@triton.jit
def _by_code(TABLE: tl.constexpr, ELEM: tl.constexpr):
    """A table by code, fp32 [2^bits]."""
    return _select(_bits(tl.arange(0, 1 << ELEM.bits), (), ELEM.bits), 0, 0, 1 << ELEM.bits, 1, TABLE, ELEM)


@triton.jit
def _look_up(table, index):
    """table[index] for int32 indices within it."""
    return tl.gather(table, index.reshape([index.numel]), 0).reshape(index.shape)


@triton.constexpr_function
def _cells(element):
    """(scale, first cell, number of them as a power of two) of `element.cells`, or None."""
    if element.cells is None:
        return None
    scale, found = element.cells
    return scale, found[0], 1 << (found[-1] - found[0]).bit_length()


@triton.jit
def _nearest(x, ELEM: tl.constexpr):
    """The code of the entry nearest to x, int32."""
    CELLS: tl.constexpr = _cells(ELEM)
    if CELLS is None:
        return _number(_search(x, (), ELEM.bits, "thresholds", ELEM), ELEM)
    else:
        COUNT: tl.constexpr = CELLS[2]
        LOW: tl.constexpr = ELEM.thresholds[0]
        HIGH: tl.constexpr = ELEM.thresholds[-1]
        MAGIC: tl.constexpr = 12582912.0 - CELLS[1]
        below = _number(_search(tl.arange(0, COUNT).to(tl.float32), (), ELEM.bits, "cells", ELEM), ELEM)
        cell = tl.fma(tl.minimum(tl.maximum(x, LOW), HIGH), CELLS[0], MAGIC).to(tl.int32, bitcast=True)
        code = _look_up(below, cell & (COUNT - 1))
        return code + (x > _look_up(_by_code("thresholds", ELEM), code)).to(tl.int32)


@triton.jit
def encode(x, zero, finite, ELEM: tl.constexpr):
    code = _nearest(x, ELEM)
    if finite is not None:
        code = tl.where(finite, code, ELEM.zero_code)
    return code


@triton.jit
def _rounded(x, ELEM: tl.constexpr):
    """`round` by selects alone."""
    return _select(_search(x, (), ELEM.bits, "thresholds", ELEM), 0, 0, 1 << ELEM.bits, 1, "values", ELEM)


@triton.jit
def round(x, zero, ELEM: tl.constexpr):
    CELLS: tl.constexpr = _cells(ELEM)
    if CELLS is None:
        return _rounded(x, ELEM)
    else:
        return _look_up(_by_code("values", ELEM), _nearest(x, ELEM))


@triton.jit
def stochastic(x, u, zero, ELEM: tl.constexpr):
    LOW: tl.constexpr = ELEM.values[0]
    HIGH: tl.constexpr = ELEM.values[-1]
    x = tl.minimum(tl.maximum(x, LOW), HIGH)
    bits = _search(x, (), ELEM.bits, "bounds", ELEM)
    lower = _select(bits, 0, 0, 1 << ELEM.bits, 1, "values", ELEM)
    upper = _select(bits, 0, 0, 1 << ELEM.bits, 1, "following", ELEM)
    return tl.where(u * (upper - lower) < x - lower, upper, lower)


@triton.jit
def round_product(x, factor, zero, ELEM: tl.constexpr):
    return _rounded(x * factor, ELEM)  # a few elements at a time, in a loop


@triton.jit
def _bits(code, bits, LEFT: tl.constexpr):
    """The LEFT lower bits of code, most significant first, after `bits`."""
    if LEFT == 0:
        return bits
    else:
        return _bits(code, bits + ((code & (1 << (LEFT - 1))) != 0,), LEFT - 1)


@triton.jit
def decode(code, zero, ELEM: tl.constexpr):
    return _look_up(_by_code("values", ELEM), code.to(tl.int32))
