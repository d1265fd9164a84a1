"""The formats as one defines them in plain torch, for torch.compile to fuse; finite input.

Independent of the codecs, apart from the views that put a group on an axis of its own. On the CPU, uncompiled, the
parts are those of tritonq bit for bit (`tests/test_bench.py`). What helps the compiler is done: floats of 4 and 6 bits
are rounded by arithmetic on their exponents and not looked up, and the steps of a kernel share one shape, because
inductor does not fuse across a reshape and writes what lies before it to memory as fp32. So values get their dtype
before groups are put back into rows, and x is split into the places of packed codes before it is divided, not after;
in rows, because with an axis of groups its tiles were two-dimensional and their loads scattered.
Parts are plain integers where the compiler does not know the dtype; `typed` gives them theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonq.codecs.pack import chunk
from tritonq.formats import Format, Shape
from tritonq.reference import Parts, grouped, spread, ungrouped

HARDWARE = (torch.float8_e4m3fn, torch.float8_e5m2)  # fp8 types that Triton converts to and from on NVIDIA GPUs


@dataclass(frozen=True)
class Eager:
    """Functions of one format for tensors of one shape and dtype."""

    quantize: Callable[..., Parts]  # (x, tensor_scale=None)
    dequantize: Callable[[Parts], Tensor]
    qdq: Callable[..., Tensor]  # (x, tensor_scale=None)


def supported(fmt: Format) -> bool:
    scale, element = fmt.scale, fmt.element
    rules = ("absmax", "floor") if element.fraction else ("absmax", "half_range", "full_range", "minmax", "floor")
    types = scale.name in ("bf16", "f32", "e8m0") or (scale.name == "e4m3" and fmt.tensor_scale)
    elements = element.codec.name != "minifloat" or (element.mbits > 0 and element.signed)
    return scale.rule in rules and types and elements


def typed(parts: Parts, fmt: Format) -> Parts:
    """Parts with the dtypes of `fmt.storage`."""
    names = {name: dtype for name, (_, dtype) in fmt.storage((1, 1)).items()}
    return {name: part if part.dtype is names[name] else part.view(names[name]) for name, part in parts.items()}


def raw(parts: Parts) -> Parts:
    """The inverse of `typed`."""
    plain = (torch.uint8, torch.int8, torch.bfloat16, torch.float32, *HARDWARE)
    return {name: part if part.dtype in plain else part.view(torch.uint8) for name, part in parts.items()}


def _to_bf16(x: Tensor) -> Tensor:
    """Rounded to bf16, as fp32. By its bits, because inductor drops `.to(bfloat16).float()` inside a kernel."""
    bits = x.view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF).view(torch.float32)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^(exponent - 127) of an int32 tensor, normal numbers."""
    return (exponent << 23).view(torch.float32)


def lanes(x: Tensor, bits: int) -> tuple[Tensor, ...]:
    """x [..., n] as the tensors of every code's place in a chunk (`codecs.pack`), [..., n / places] each."""
    return x.unflatten(-1, (-1, chunk(bits)[0])).unbind(-1)


def pack(codes: Sequence[Tensor], bits: int) -> Tensor:
    """Lanes of int32 codes to bytes, least significant bit first: a chunk as one integer, then its bytes."""
    width = chunk(bits)[1]
    word = codes[0] if width < 4 else codes[0].to(torch.int64)
    for i, lane in enumerate(codes[1:], 1):
        word = word | (lane.to(word.dtype) << (i * bits))
    if width == 1:
        return word.to(torch.uint8)
    shifts = torch.arange(width, device=word.device, dtype=word.dtype) * 8
    return ((word.unsqueeze(-1) >> shifts) & 0xFF).to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Bytes to int32 codes: runs of codes as one integer, shifted by as much as each code needs."""
    if bits == 8:
        return packed.to(torch.int32)
    per, width = chunk(bits)
    runs = packed.unflatten(-1, (-1, width)).to(torch.int32 if width < 4 else torch.int64)
    word = runs[..., 0]
    for i in range(1, width):
        word = word | (runs[..., i] << (8 * i))
    shifts = torch.arange(per, device=packed.device, dtype=word.dtype) * bits
    return ((word.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2).to(torch.int32)


def eager(fmt: Format, shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu") -> Eager | None:
    """The definition of `fmt`, or None where this file does not have its rule, or rows or groups end within a chunk."""
    if not supported(fmt) or any(n % chunk(fmt.bits)[0] for n in (shape[-1], max(0, fmt.group[1]))):
        return None
    element, rule, rows = fmt.element, fmt.scale.rule, fmt.group[0]
    bits, m, bias, largest, emax = element.bits, element.mbits, element.bias, element.max, element.emax
    levels, is_integer = 1 << bits, element.codec.offset_binary
    float_type = element.dtype if element.dtype in HARDWARE else None
    axes = (-3, -1) if rows > 1 else (-1,)
    places = chunk(bits)[0]
    packed = float_type is None and fmt.qdtype is not torch.int8  # codes that are int32 until they are bytes
    scale_shape, scale_max = fmt.scale_shape(shape), fmt.scale.max
    middle = 0.0 if fmt.zero_point else float(levels // 2)
    values_of = torch.tensor(element.values, device=device) if element.values else None
    boundaries = torch.tensor(element.thresholds, device=device) if element.values else None
    smallest = 2.0**-149
    if fmt.scale.element is not None:
        smallest = 2.0 ** (1 - fmt.scale.element.bias - fmt.scale.element.mbits)

    def choose(groups: Tensor, divisor: Tensor | None) -> tuple[Tensor, Tensor, Tensor | float]:
        """What is stored, what divides, and the zero point; tensors of groups' shape with axes of one."""
        if rule in ("full_range", "minmax"):
            high, low = groups.amax(axes, keepdim=True), groups.amin(axes, keepdim=True)
            if rule == "full_range":
                scale = torch.where(high >= -low, -high, -low) / (levels // 2)
            else:
                high, low = high.clamp(min=0.0), low.clamp(max=0.0)
                scale = (high - low) / (levels - 1)
        else:
            amax = groups.abs().amax(axes, keepdim=True)
            if rule == "floor":
                exponent = ((amax.view(torch.int32) >> 23) - emax).clamp(0, 254)
                factor = torch.where(exponent == 0, 0x400000, exponent << 23).view(torch.float32)
                return exponent.to(torch.uint8), factor, middle
            if divisor is not None:
                amax = amax * divisor
            scale = amax / ((levels - 1) / 2 if rule == "half_range" else largest)
        if fmt.scale.name == "e4m3":
            scale = scale.clamp(max=scale_max).to(torch.float8_e4m3fn).to(torch.float32)
        elif fmt.scale.name == "bf16":
            scale = _to_bf16(scale)
        scale = torch.where(scale == 0, smallest, scale)
        zero = (-low / scale).round().clamp(0, levels - 1) if fmt.zero_point else middle
        return scale.to(fmt.scale.dtype), scale if divisor is None else scale / divisor, zero

    def exponents(x: Tensor) -> Tensor:
        """Biased fp32 exponents, at least that of the element's smallest normal number."""
        return ((x.view(torch.int32) >> 23) & 0xFF).clamp(min=128 - bias)

    def steps(x: Tensor, exponent: Tensor) -> Tensor:
        """|x| in units of its last mantissa bit, 0 .. 2^(m + 1)."""
        return (x.abs() * _power_of_two(254 + m - exponent)).round()

    def units(scaled: Tensor) -> Tensor:
        return scaled * 2.0**element.fraction if element.fraction else scaled

    def values(units: Tensor) -> Tensor:
        return units * 2.0**-element.fraction if element.fraction else units

    def encode(scaled: Tensor, zero: Tensor | float) -> Tensor:
        if is_integer:
            codes = (units(scaled).round() + zero).clamp(0, levels - 1)
            return (codes - middle).to(torch.int8) if not packed else codes.to(torch.int32)
        if boundaries is not None:
            return torch.bucketize(scaled, boundaries, out_int32=True)
        scaled = scaled.clamp(-largest, largest)
        if float_type is not None:
            return scaled.to(float_type)
        exponent = exponents(scaled)
        magnitude = ((exponent - (128 - bias)) << m) + steps(scaled, exponent).to(torch.int32)
        negative = scaled.view(torch.int32) < 0
        if element.special == "fnuz":  # has no -0
            negative = negative & (magnitude > 0)
        return torch.where(negative, magnitude | (levels >> 1), magnitude)

    def rounded(scaled: Tensor, zero: Tensor | float) -> Tensor:
        """decode(encode(scaled)) without codes."""
        if is_integer:
            return values((units(scaled).round() + zero).clamp(0, levels - 1) - zero)
        if values_of is not None and boundaries is not None:
            return values_of[torch.bucketize(scaled, boundaries)]
        scaled = scaled.clamp(-largest, largest)
        if float_type is not None:
            return scaled.to(float_type).to(torch.float32)
        exponent = exponents(scaled)
        result = (steps(scaled, exponent) * _power_of_two(exponent - m)).copysign(scaled)
        return result + 0.0 if element.special == "fnuz" else result

    def decode(codes: Tensor, zero: Tensor | float) -> Tensor:
        if is_integer:
            return values(codes.to(torch.float32) - (0.0 if fmt.qdtype is torch.int8 else zero))
        if values_of is not None:
            return values_of[codes]
        if float_type is not None:
            return codes.to(torch.float32)
        magnitude = codes & ((levels >> 1) - 1)
        exponent, mantissa = magnitude >> m, magnitude & ((1 << m) - 1)
        whole = torch.where(exponent > 0, mantissa + (1 << m), mantissa).to(torch.float32)
        result = whole * _power_of_two(exponent.clamp(min=1) + (127 - bias - m))
        return torch.where(codes >= levels >> 1, -result, result)

    def divisor_of(x: Tensor, given: Tensor | None) -> Tensor | None:
        if not fmt.tensor_scale or given is not None:
            return given
        amax = x.abs().amax().to(torch.float32).reshape(1)
        return torch.where(amax > 0, torch.full_like(amax, scale_max * largest) / amax, 1.0)

    def chunkwise(per_group: Tensor, groups: Tensor) -> Tensor:
        """What belongs to a group, for every chunk of codes of a row."""
        chunks = per_group.expand(*groups.shape[:-1], groups.shape[-1] // places)
        return ungrouped(chunks, (*shape[:-1], shape[-1] // places), fmt)

    def quantize(x: Tensor, tensor_scale: Tensor | None = None) -> Parts:
        divisor = divisor_of(x, tensor_scale)
        x = x.to(torch.float32)
        groups = grouped(x, fmt)
        stored, factor, zero = choose(groups, divisor)
        if places == 1:
            codes = encode(groups / factor, zero)
            parts = {"qdata": ungrouped(codes.to(torch.uint8) if packed else codes, shape, fmt)}
        else:
            factors, zeros = (chunkwise(part, groups) if isinstance(part, Tensor) else part for part in (factor, zero))
            parts = {"qdata": pack([encode(lane / factors, zeros) for lane in lanes(x, bits)], bits)}
        parts["scale"] = stored.reshape(scale_shape)
        if isinstance(zero, Tensor):
            parts["zero_point"] = zero.to(torch.uint8).reshape(scale_shape)
        if divisor is not None:
            parts["tensor_scale"] = divisor
        return parts

    def dequantize(parts: Parts) -> Tensor:
        qdata, scale = parts["qdata"], parts["scale"]
        codes = unpack(qdata, bits) if qdata.dtype is torch.uint8 else qdata
        if rule == "floor":
            exponent = scale.to(torch.int32)
            factor = torch.where(exponent == 0, 0x400000, exponent << 23).view(torch.float32)
        else:
            factor = scale.to(torch.float32)
        if "tensor_scale" in parts:
            factor = factor / parts["tensor_scale"]
        zero = spread(parts["zero_point"].to(torch.float32), fmt) if fmt.zero_point else middle
        y = decode(grouped(codes, fmt), zero) * spread(factor, fmt)
        return ungrouped(y.to(dtype), shape, fmt)

    def qdq(x: Tensor, tensor_scale: Tensor | None = None) -> Tensor:
        divisor = divisor_of(x, tensor_scale)
        groups = grouped(x.to(torch.float32), fmt)
        _, factor, zero = choose(groups, divisor)
        return ungrouped((rounded(groups / factor, zero) * factor).to(dtype), shape, fmt)

    return Eager(quantize, dequantize, qdq)
