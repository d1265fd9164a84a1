"""Device functions of `lookup`; see `tritonq.codecs` for what each one does.

A binary search without branches: the bits of the code, most significant first, are comparisons of x with a threshold
that the bits before it select, by a tree of selects between constants. Such a tree also makes each table, once a
program; elements then look their values up in it (`tl.gather`, from shared memory).
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _entry(element, which, index, count, step):
    """The entry at `index` of a table, or None if not all `count` of them from there on, `step` apart, are equal (codes
    that a table leaves unused share their entry).

    Tables by code: "thresholds", above which x rounds to a higher code; "bounds", from which on it is at least the next
    value; "values"; and "following", the next value, the last one after itself.
    """
    table = {
        "thresholds": element.thresholds,
        "bounds": element.values[1:],
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
def encode(x, zero, finite, ELEM: tl.constexpr):
    bits = _search(x, (), ELEM.bits, "thresholds", ELEM)
    # 2^23 + code has the code in its low bits; NVIDIA GPUs add floats on a pipe that has less to do than that of logic.
    LAST: tl.constexpr = ELEM.bits - 1
    code = tl.where(bits[0], 8388608.0 + (1 << LAST), 8388608.0)
    for i in tl.static_range(LAST):
        code = code + tl.where(bits[i + 1], 0.5 * (1 << (LAST - i)), 0.0)
    code = code.to(tl.int32, bitcast=True) & 0xFF
    if finite is not None:
        code = tl.where(finite, code, ELEM.zero_code)
    return code


@triton.jit
def round(x, zero, ELEM: tl.constexpr):
    return _select(_search(x, (), ELEM.bits, "thresholds", ELEM), 0, 0, 1 << ELEM.bits, 1, "values", ELEM)


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
    return round(x * factor, zero, ELEM)


@triton.jit
def _bits(code, bits, LEFT: tl.constexpr):
    """The LEFT lower bits of code, most significant first, after `bits`."""
    if LEFT == 0:
        return bits
    else:
        return _bits(code, bits + ((code & (1 << (LEFT - 1))) != 0,), LEFT - 1)


@triton.jit
def _values_by_code(ELEM: tl.constexpr):
    """The table itself, fp32."""
    return _select(_bits(tl.arange(0, 1 << ELEM.bits), (), ELEM.bits), 0, 0, 1 << ELEM.bits, 1, "values", ELEM)


@triton.jit
def decode(code, zero, ELEM: tl.constexpr):
    flat = code.to(tl.int32).reshape([code.numel])
    return tl.gather(_values_by_code(ELEM), flat, 0).reshape(code.shape)
