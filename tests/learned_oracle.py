"""QDQ with tuning parameters from its specification (numerics.md, "Gradients"), group by group: values by the exact
oracle, gradients by float64 autograd of an eager definition with explicit straight-through rounding.

`rounded + (value - value.detach())` has the number `rounded` and the gradient of `value`.
"""

import math
from types import SimpleNamespace

import numpy as np
import oracle
import torch
from oracle import F32, F32_MAX


def straight_through(value, rounded):
    """The number `rounded` with the gradient of `value`."""
    return torch.as_tensor(rounded, dtype=torch.float64) + (value - value.detach())


def unrounded(hi, lo, fmt):
    """The rule of the scale without rounding, float64; hi >= 0 >= lo."""
    rule, element = fmt.scale.rule, fmt.element
    levels, top = 2**element.bits - 1, oracle.element_max(element)
    larger = hi if hi >= -lo else lo
    if rule == "minmax":
        return (hi - lo) / levels
    if rule == "full_range":
        return -larger / 2 ** (element.bits - 1)
    if rule == "half_range":
        return larger.abs() / (levels / 2)
    if rule in ("floor", "even"):
        return larger.abs() / 2.0 ** (math.frexp(top)[1] - 1)
    return larger.abs() / top


def stores(raw, fmt):
    """Whether a scale is stored without being saturated, or lifted from zero."""
    name, raw = fmt.scale.name, abs(float(raw))
    if name == "f32":
        return 0 < raw <= F32_MAX
    if name == "e8m0":
        return raw >= 2.0**-127
    if name in oracle.INTEGERS:
        return True
    ebits, mbits, kind, _, _ = oracle.SCALES[name]
    table = oracle.magnitudes(ebits, mbits, kind)
    return table[1] / 2 < raw <= table[-1] + (table[-1] - table[-2]) / 2


def bounds(fmt, zero):
    element = fmt.element
    if element.values:
        return element.values[0], element.values[-1]
    if element.ebits:
        return -oracle.element_max(element), oracle.element_max(element)
    first = -zero if oracle.asymmetric(fmt) else -(2 ** (element.bits - 1))
    return first / 2**element.fraction, (first + 2**element.bits - 1) / 2**element.fraction


def parameter(t, like):
    """Of groups: fp32 numbers and a float64 leaf."""
    if t is None:
        return np.ones(like, np.float32), None
    flat = t.detach().cpu().to(torch.float64).reshape(-1)
    return flat.numpy().astype(np.float32), flat.clone().requires_grad_()


def qdq(x, fmt, dy, v=None, min_scale=None, max_scale=None, scale=None, zero_point=None, tensor_scale=None):
    """(y as float64 of the output dtype, {name: gradient float64}, inside) of a tensor x."""
    dtype = str(x.dtype).removeprefix("torch.")
    x32 = oracle.to_float32(x.detach().cpu().double().numpy())
    view, count, groups = oracle.regions(x32.shape, fmt)
    flat, dys = x32.reshape(view), dy.detach().cpu().double().reshape(view)
    v64 = torch.zeros(view, dtype=torch.float64)
    v64 = (v64 if v is None else v.detach().cpu().double().reshape(view).clone()).requires_grad_()
    x64 = torch.from_numpy(flat.astype(np.float64)).requires_grad_()
    (lows, low_leaf), (highs, high_leaf) = parameter(min_scale, count), parameter(max_scale, count)
    (given, scale_leaf), (zeros, zero_leaf) = parameter(scale, count), parameter(zero_point, count)
    if fmt.tensor_scale and tensor_scale is None:
        tensor_scale = oracle.choose_tensor_scale(flat, fmt)
    factors, extremes = {}, {}
    for index, where in groups:
        group = flat[where]
        hi = F32(max(group.max(), F32(0))) * max(highs[index], F32(0))
        lo = F32(min(group.min(), F32(0))) * max(lows[index], F32(0))
        extremes[index] = hi, lo
        if scale is not None:
            factor = given[index] if tensor_scale is None else given[index] / F32(tensor_scale)
            factors[index] = factor, F32(0), int(np.rint(np.clip(zeros[index], 0, 2**fmt.bits - 1)))
        elif not fmt.super_group:
            bits, zero = oracle.choose(np.array([hi, lo], np.float32), fmt, tensor_scale)
            factor = oracle.load_scale(bits, fmt.scale.name)
            factors[index] = (factor if tensor_scale is None else factor / F32(tensor_scale)), F32(0), zero
    if fmt.super_group:
        for _, _, inside in oracle.super_groups(x32.shape, fmt)[3]:
            ranges = [extremes[g] for g, _ in inside]
            _, d, integers = oracle.quantize_again([oracle.raw_scale(h, w, fmt) for h, w in ranges], fmt, 1)
            e, minima = F32(0), [0] * len(inside)
            if oracle.asymmetric(fmt):
                _, e, minima = oracle.quantize_again([-min(w, F32(0)) for _, w in ranges], fmt, 0)
            for (g, _), k, j in zip(inside, integers, minima, strict=True):
                factors[g] = d * F32(k), e * F32(j), 0

    y = np.zeros(view, np.float32)
    loss, kept = torch.zeros((), dtype=torch.float64), np.zeros(view, bool)
    for index, where in groups:
        factor, offset, zero = factors[index]
        group = flat[where]
        with np.errstate(all="ignore"):
            u = ((group + offset if offset else group) / factor).astype(np.float32)
            u = (u + v64[where].detach().numpy().astype(np.float32)).astype(np.float32)
        codes = oracle.encode(np.clip(u, -F32_MAX, F32_MAX), fmt, F32(1), zero)  # tiny scales: infinity saturates
        values = oracle.decode(codes, fmt, F32(1), zero).astype(np.float64)
        y[where] = oracle.decode(codes, fmt, factor, zero)
        if fmt.minimum:
            y[where] = y[where] - offset

        # float64, with gradients
        of_x = x64.detach()[where]
        if scale is not None:
            s = straight_through(scale_leaf[index], float(given[index]))
            s = s if tensor_scale is None else s / float(tensor_scale)
            z = torch.zeros((), dtype=torch.float64)
            if zero_leaf is not None:
                z = straight_through(zero_leaf[index].clamp(0, 2**fmt.bits - 1), zero)
        else:
            high = torch.ones((), dtype=torch.float64) if high_leaf is None else high_leaf[index].clamp(min=0)
            low = torch.ones((), dtype=torch.float64) if low_leaf is None else low_leaf[index].clamp(min=0)
            hi, lo = of_x.max().clamp(min=0) * high, of_x.min().clamp(max=0) * low
            raw = unrounded(hi, lo, fmt)
            in_storage = raw if tensor_scale is None else raw * float(tensor_scale)
            s = straight_through(raw if stores(in_storage.detach(), fmt) else raw.detach(), float(factor))
            m = straight_through(-lo, float(offset))
            z = torch.zeros((), dtype=torch.float64)
            if fmt.zero_point:
                z = straight_through((-lo / s).clamp(0, 2**fmt.bits - 1), zero)
        if fmt.minimum:
            exact = (of_x + m) / s + v64[where]
        else:
            exact = of_x / s + v64[where]
        least, most = bounds(fmt, zero)
        inside = (u >= np.float64(least)) & (u <= np.float64(most))
        kept[where] = inside
        clipped = torch.from_numpy(values)
        if fmt.zero_point:
            clipped = clipped + zero - z  # a bound of the codes, less the zero point
        code = torch.where(torch.from_numpy(inside), straight_through(exact, values), clipped)
        result = s * code - m if fmt.minimum else s * code
        # the scale counts as constant in x
        through_x = torch.where(torch.from_numpy(inside), x64[where] - of_x, 0.0)
        loss = loss + ((result + through_x) * dys[where]).sum()
    loss.backward()

    def gradient(leaf, t):
        return None if t is None else (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).reshape(t.shape)

    found = {"x": x64.grad.reshape(x.shape), "v": None if v is None else v64.grad.reshape(x.shape)}
    found |= {"min_scale": gradient(low_leaf, min_scale), "max_scale": gradient(high_leaf, max_scale)}
    found |= {"scale": gradient(scale_leaf, scale), "zero_point": gradient(zero_leaf, zero_point)}
    y = torch.from_numpy(oracle.output(y, dtype)).reshape(x.shape)
    return SimpleNamespace(y=y, inside=kept.reshape(x.shape), **found)
