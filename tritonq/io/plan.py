"""The plan of an export, from names and shapes alone: what is quantized, what it becomes, who shares a scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tritonq.formats import Format
from tritonq.io import compressed_tensors
from tritonq.io.source import Source, natural
from tritonq.io.structure import Piece, Structure
from tritonq.nn.schemes import Scheme
from tritonq.nn.select import Selection, sharing_key
from tritonq.ops import FLOATS


@dataclass(frozen=True)
class Weight:
    """A 2-D weight [N, K] that will be quantized.

    Attributes:
        name: checkpoint name of its module; its tensors are called `<name>.weight_scale` and so on.
        source: checkpoint tensor that holds it, with `piece` where that is a fused one.
        dtype: of the weight before quantization, after any cast.
        key: weights with the same key share their tensor-wide scale.
    """

    name: str
    source: str
    piece: Piece | None
    shape: tuple[int, int]
    dtype: torch.dtype
    fmt: Format
    key: str | None
    expert: bool


@dataclass(frozen=True)
class Plan:
    """Weights to quantize and tensors to copy, both in natural order, and the modules that stay dense."""

    weights: tuple[Weight, ...]
    dense: tuple[str, ...]
    ignore: tuple[str, ...]
    notes: tuple[str, ...]


def make_plan(
    source: Source,
    structure: Structure,
    scheme: Scheme,
    selection: Selection,
    group_size: int | None,
    dtype: torch.dtype | None,
) -> Plan:
    """Decide about every tensor of `source`.

    Raises:
        ValueError: nothing to quantize, an ignore entry that matches nothing, experts of one layer treated differently,
            groups that do not fit, or a format without a layout.
    """
    weights: list[Weight] = []
    dense: list[str] = []
    decisions: dict[str, set[bool]] = {}
    for key, info in source.tensors.items():
        role, module = structure.roles[key], key.rpartition(".")[0]
        names = [module, role.module]
        if role.kind in ("expert", "fused"):  # role.module is a parameter: its module may be meant as well
            names.append(role.module.rpartition(".")[0])
        ignored = [selection.ignores(name) for name in names]  # all are asked: every entry that matches counts as used
        wanted = not any(ignored)
        if role.kind == "other" or info.dtype not in FLOATS:
            dense.append(key)
            continue
        pieces: list[tuple[Piece | None, str, int]] = [(None, module, info.shape[0])]
        if role.kind == "fused":
            pieces = [(piece, piece.name, piece.stop - piece.start) for piece in role.pieces]
        if role.kind != "linear":
            decisions.setdefault(role.module, set()).add(wanted)
        if not wanted:
            dense.append(key)
            continue
        stored = dtype or info.dtype
        fmt = scheme.weight_format(stored, group_size)
        for piece, name, rows in pieces:
            shape = (rows, info.shape[-1])
            weights.append(Weight(name, key, piece, shape, stored, fmt, sharing_key(name, fmt), role.kind != "linear"))
    for name in structure.linears:
        selection.ignores(name)
    selection.check_all_used(name for name in structure.linears or [w.name for w in weights])
    for name, both in decisions.items():
        if len(both) == 2:
            raise ValueError(
                f"ignore leaves some experts of {name} dense and others not, but models hold them as one tensor; "
                f"ignore all of them: {name}"
            )
    if not weights:
        if any(role.kind != "other" for role in structure.roles.values()):
            raise ValueError(f"{source.name} has no linear layers to quantize that are not ignored; ignore fewer")
        reason = f" ({structure.notes[0]})" if structure.notes else ""
        raise ValueError(
            f"{source.name} has no linear layers to quantize{reason}; schemes apply to nn.Linear and to experts"
        )
    weights.sort(key=lambda weight: natural(weight.name))
    _check_groups(weights, scheme)
    notes = list(structure.notes)
    experts = any(weight.expert for weight in weights)
    dense_experts = any(structure.roles[key].kind == "expert" for key in dense)
    first = weights[0]
    notes += compressed_tensors.reader_limits(scheme, first.fmt, first.dtype, experts, dense_experts)
    return Plan(tuple(weights), tuple(dense), _ignore(source, structure, weights, dense), tuple(notes))


def _ignore(source: Source, structure: Structure, weights: list[Weight], dense: list[str]) -> tuple[str, ...]:
    """Names for the reader's `ignore`: every linear module that stays dense, and dense modules that other runtimes
    build as linear layers (routers, transposed layers) under their checkpoint names."""
    quantized = {structure.roles[weight.source].module for weight in weights}
    stays = {name for name in structure.linears if name not in quantized}
    for key in dense:
        module, _, leaf = key.rpartition(".")
        if leaf == "weight" and len(source.tensors[key].shape) == 2 and not structure.roles[key].embedding:
            role = structure.roles[key]
            stays.add(role.module if role.kind == "linear" else module)
    return tuple(sorted(stays, key=natural))


def _check_groups(weights: list[Weight], scheme: Scheme) -> None:
    """Runtimes want whole groups along K: of the weight, and of the inputs where those are quantized in groups."""
    inputs = scheme.input_format
    for fmt in {weight.fmt for weight in weights}:
        compressed_tensors.layout(fmt, inputs)
    for weight in weights:
        rows, group = weight.fmt.group
        along = group if rows == 1 and group > 0 else 1
        if inputs is not None and inputs.group_size > 0:
            along = max(along, inputs.group_size)
        if weight.shape[1] % along:
            raise ValueError(
                f"{weight.name}.weight has shape {list(weight.shape)}, and runtimes need its {weight.shape[1]} columns "
                f"in whole groups of {along} for {scheme.name}; {_way_out(weights, weight, scheme)}"
            )


def _way_out(weights: list[Weight], culprit: Weight, scheme: Scheme) -> str:
    if scheme.takes_group_size:
        columns = {weight.shape[1] for weight in weights}
        fitting = [size for size in range(16, 257) if all(k % size == 0 for k in columns)]
        if fitting:
            fitting.sort(key=lambda size: (size & (size - 1) != 0, size > 128, -size))  # powers of two first
            others = f" (also {', '.join(map(str, fitting[1:4]))})" if fitting[1:] else ""
            return f"use --group-size {fitting[0]}{others}"
    return f"leave it dense with --ignore {culprit.name}, or take a scheme with one scale a row: W8A16, FP8_DYNAMIC"
