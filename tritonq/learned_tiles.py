"""QDQ with tuning parameters on the CPU: `learned_reference` on tiles, so that intermediates stay small."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from tritonq import learned_reference, reference, tiling
from tritonq.codecs import pack
from tritonq.formats import Format
from tritonq.learned_reference import Chosen, Learned, Parts, Wanted

Views = dict[str, Tensor]
_INTERMEDIATES = 12  # fp32 tensors of a tile that are alive at a time

_OF_GROUPS = ("high", "low", "d_high", "d_low", "scale", "zero_point", "group_minimum", "super_scale", "super_minimum")


def _slabs(tensors: Views, fmt: Format) -> Iterator[Views]:
    """Matching 2-D views, of one matrix or of as many as there are leading indices. What has one number a group is
    contiguous."""
    lead = tensors["x"].shape[:-2]
    one = fmt.group[0] == -1
    if fmt.group[0] <= 1:
        try:
            yield {name: t if one and name in _OF_GROUPS else t.view(-1, t.shape[-1]) for name, t in tensors.items()}
            return
        except RuntimeError:  # strides that do not go together
            pass
    for index in itertools.product(*map(range, lead)):
        yield {name: t if one and name in _OF_GROUPS else t[index] for name, t in tensors.items()}


_Member = tuple[Views, tiling._Tile]


def _shared(tensors: Views, fmt: Format) -> list[list[_Member]]:
    """Tiles of whole groups, each alone, or those that make up one large group."""
    x = tensors["x"]
    budget = tiling._budget(x, fmt) // _INTERMEDIATES
    found = [
        [(slab, tile) for tile in tiles]
        for slab in _slabs(tensors, fmt)
        for tiles in tiling._windows(slab["x"], fmt, budget)
    ]
    return [list(itertools.chain.from_iterable(found))] if fmt.group[0] == -1 else found


def _load(views: Views, tile: tiling._Tile) -> Tensor:
    return reference.to_float32(views["x"][tile.rows, tile.cols])


def _window(views: Views, name: str, tile: tiling._Tile) -> Tensor | None:
    """Elements or groups of this tile."""
    t = views.get(name)
    if t is None:
        return None
    if name not in _OF_GROUPS:
        return t[tile.rows, tile.cols]
    if name.startswith("super_"):
        size = tile.fmt.super_group
        return t[tile.scale_rows, tile.cols.start // size : -(-tile.cols.stop // size)]
    return tile.of(t)


def _choose(members: list[_Member], tuning: Learned, fmt: Format) -> Chosen:
    views, tile = members[0]
    positive, negative = learned_reference.extremes(_load(views, tile), tile.fmt)
    for other in members[1:]:
        more, less = learned_reference.extremes(_load(*other), other[1].fmt)
        positive, negative = torch.maximum(positive, more), torch.maximum(negative, less)
    own = Learned(None, _window(views, "high", tile), _window(views, "low", tile), tuning.given, tuning.tensor_scale)
    return learned_reference.choose(positive, negative, fmt, own)


def _tensors(x: Tensor, tuning: Learned, **more: Tensor | None) -> Views:
    named = {"x": x, "v": tuning.v, "high": tuning.high, "low": tuning.low, **more}
    found = {name: t for name, t in named.items() if t is not None}
    return {name: t.unsqueeze(0) for name, t in found.items()} if x.ndim == 1 else found


def qdq(x: Tensor, fmt: Format, tuning: Learned, y: Tensor) -> None:
    """Values into contiguous y."""
    for members in _shared(_tensors(x, tuning, y=y), fmt):
        chosen = _choose(members, tuning, fmt)
        for views, tile in members:
            tile_x = _load(views, tile)
            found = learned_reference.elements(tile_x, _window(views, "v", tile), chosen, tile.fmt)
            values = learned_reference.values(tile_x, found, chosen, tile.fmt, y.dtype)
            views["y"][tile.rows, tile.cols].copy_(values)


def quantize(x: Tensor, fmt: Format, tuning: Learned, parts: Parts) -> None:
    """Codes and scales of what `qdq` gives, into contiguous parts."""
    outputs = {name: part for name, part in parts.items() if name != "tensor_scale"}
    for members in _shared(_tensors(x, tuning, **outputs), fmt):
        chosen = _choose(members, tuning, fmt)
        for name, part in chosen.parts.items():
            target = _window(members[0][0], name, members[0][1])
            assert target is not None
            target.copy_(part.view(target.shape))
        for views, tile in members:
            tile_x = _load(views, tile)
            found = learned_reference.elements(tile_x, _window(views, "v", tile), chosen, tile.fmt)
            bad = reference.spread(chosen.bad, tile.fmt)
            codes = fmt.element.codec.encode_ref(found.u.masked_fill(bad, 0.0), found.zero, fmt.element)
            codes = reference.ungrouped(codes, tuple(tile_x.shape), tile.fmt)
            lost = learned_reference.lost(tile_x, chosen, tile.fmt)
            if lost is not None:
                codes = codes.masked_fill(lost, fmt.element.nan_code)
            if fmt.sign_flip:
                codes = codes ^ fmt.sign_flip
            tile.codes(views["qdata"]).copy_(pack.pack(codes, fmt.bits).view(fmt.qdtype))


def backward(
    x: Tensor, dy: Tensor, fmt: Format, tuning: Learned, wanted: Wanted, out: Views, rates: Tensor | None
) -> None:
    """Gradients into `out`, contiguous tensors "dx", "dv", "d_high" and "d_low"; with a step, the parameters move."""
    for members in _shared(_tensors(x, tuning, dy=dy, **out), fmt):
        chosen = _choose(members, tuning, fmt)
        total = outside = torch.zeros((), device=x.device)
        for views, tile in members:
            tile_dy, v = _window(views, "dy", tile), _window(views, "v", tile)
            assert tile_dy is not None
            found = learned_reference.elements(_load(views, tile), v, chosen, tile.fmt)
            of_tile = learned_reference.gradients(found, tile_dy, chosen, tile.fmt)
            total, outside = total + of_tile.total, outside + of_tile.outside
            if wanted.x:
                views["dx"][tile.rows, tile.cols].copy_(of_tile.x)
            if wanted.v and v is not None:
                if wanted.step:
                    assert rates is not None
                    v.copy_(learned_reference.moved(v, of_tile.v, rates[0], *wanted.bounds[:2]))
                else:
                    views["dv"][tile.rows, tile.cols].copy_(of_tile.v)
        if wanted.groups:
            views, tile = members[0]
            own = Learned(None, None, None, tuning.given, tuning.tensor_scale)
            found_both = learned_reference.of_parameters(total, outside, chosen, fmt, own, wanted.factor)
            for name, gradient in zip(("high", "low"), found_both, strict=True):
                parameter, target = _window(views, name, tile), _window(views, f"d_{name}", tile)
                if wanted.step and parameter is not None:
                    assert rates is not None
                    gradient = gradient.view(parameter.shape)
                    parameter.copy_(learned_reference.moved(parameter, gradient, rates[1], *wanted.bounds[2:]))
                elif target is not None:
                    target.copy_(gradient.view(target.shape))
