"""A quantized model in memory to a checkpoint that others load."""

from __future__ import annotations

import collections
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonq.formats import Format
from tritonq.io import card, compressed_tensors, folder, structure, writer
from tritonq.io.source import natural
from tritonq.nn.linear import STATIC, QLinear
from tritonq.nn.schemes import Scheme
from tritonq.reference import Parts

EXPORTS = ("compressed-tensors",)


def save_pretrained(
    model: Any,
    dst: str | Path,
    format: str = "compressed-tensors",
    *,
    max_shard_size: int | str = "2GB",
    force: bool = False,
) -> Path:
    """Write a transformers model that `tritonq.quantize_` quantized to the folder `dst`; returns its path.

    The tensors are those that `quantize_checkpoint` makes of the dense checkpoint, byte for byte, under its names:
    experts that the model holds as one parameter become one 2-D weight each. Save the tokenizer beside it with its own
    `save_pretrained`.

    Args:
        model: a `PreTrainedModel` whose quantized parameters are QTensors.
        format: the layout; "compressed-tensors" is the only one so far.
        max_shard_size: bytes of an output file: a number, or a text such as "2GB".
        force: replace a checkpoint at `dst`.

    Raises:
        ValueError: the model is not quantized, or its formats or shapes have no such layout.
        FileExistsError, PermissionError, OSError: as for `quantize_checkpoint`.
    """
    if format not in EXPORTS:
        raise ValueError(f"unknown export format {format!r}; known: {', '.join(EXPORTS)}")
    scheme = getattr(model, "tritonq_scheme", None)
    if not isinstance(scheme, Scheme):
        raise ValueError(f"this {type(model).__name__} is not quantized; call tritonq.quantize_(model, scheme) first")
    if not hasattr(model, "config") or not hasattr(model.config, "save_pretrained"):
        raise ValueError(f"{type(model).__name__} has no transformers config; only transformers models can be saved")
    limit = writer.parse_size(max_shard_size)
    destination = folder.Destination(dst, force)
    quantized, dense = _parameters(model)
    if not quantized:
        raise ValueError(f"no parameter of this {type(model).__name__} is quantized; nothing to save")
    static = {name: _static_inputs(model, name, scheme) for name in quantized}
    entries, dynamic = [], []
    for name, value in quantized.items():
        found = _quantized_entries(model, name, value, scheme, static[name])
        entries += found
        dynamic += [] if static[name] else [entry.name for entry in found]
    weights, any_static = len(entries), any(static.values())
    fmt = _common_format(quantized)
    roles = structure.of_model(model, {name: tuple(tensor.shape) for name, tensor in dense.items()}).roles
    ignore = _ignore(model, quantized, roles, dense)
    entries += [_dense_entry(name, tensor) for name, tensor in dense.items()]
    files = writer.split(sorted(entries, key=lambda entry: natural(entry.name)), limit)
    with destination.writing() as path:
        folder.Manifest(path, {"run": uuid.uuid4().hex})  # what another run left is of no use here
        folder.write_shards(path, files)
        _write_configs(model, path, compressed_tensors.quantization_config(scheme, fmt, ignore, any_static, dynamic))
        elements = sum(value.numel() for value in quantized.values())
        text = card.model_card(
            base=getattr(model.config, "_name_or_path", "").rstrip("/").rpartition("/")[2] or model.config.model_type,
            scheme=scheme,
            fmt=fmt,
            static=any_static,
            calibration=getattr(model, "tritonq_calibration", None),
            layers={},
            quantized=weights,
            dense=len(dense),
            bits_per_weight=8
            * sum(value.format.nbytes(tuple(value.shape)) for value in quantized.values())
            / max(1, elements),
            notes=compressed_tensors.reader_limits(
                scheme,
                fmt,
                model.dtype,
                any(value.ndim == 3 for value in quantized.values()),
                any(role.kind == "expert" for role in roles.values()),
            ),
            causal="CausalLM" in type(model).__name__,
        )
        (path / "README.md").write_text(text, encoding="utf-8")
    return destination.path


def _static_inputs(model: Any, name: str, scheme: Scheme) -> Parts:
    """Static parts of the inputs of the module that holds the parameter `name`; {} where there are none, and for a
    tensor-wide divisor that is the one of a model without calibration.

    Raises:
        ValueError: scales that no layout holds.
    """
    module, found = model.get_submodule(name.rpartition(".")[0]), {}
    for part, buffer in STATIC.items():
        tensor = getattr(module, buffer, None)
        if isinstance(tensor, Tensor):
            found[part] = tensor.detach().cpu()
    inputs = scheme.input_format
    if inputs is None or (
        inputs.tensor_scale and found.keys() == {"tensor_scale"} and bool(found["tensor_scale"] == 1)
    ):
        return {}
    if (found and not compressed_tensors.holds_static(inputs)) or (inputs.tensor_scale and "scale" in found):
        raise ValueError(
            f"{name} has static scales of inputs in {inputs.name}, and exports hold one for a whole tensor only; "
            "quantize with dynamic scales, or keep the model with torch.save"
        )
    return found


def _is_quantized(value: Any) -> bool:
    return isinstance(getattr(value, "format", None), Format) and hasattr(value, "qdata")


def _parameters(model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Quantized parameters under the model's names; the rest as its checkpoint names and cuts it. Tied ones once."""
    quantized: dict[str, Any] = {}
    plain: dict[str, Tensor] = {}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in model.named_parameters()}
    parameters = dict(model.named_parameters())
    of_inputs = {
        f"{name}.{buffer}" for name, module in model.named_modules() if isinstance(module, QLinear)
        for buffer in STATIC.values()
    }  # fmt: skip
    for name in model.state_dict(keep_vars=True):
        value = parameters.get(name)
        if value is None:
            if name not in tied and name not in of_inputs:  # those belong to the weight
                plain[name] = model.get_buffer(name)
        elif _is_quantized(value):
            quantized[name] = value
        else:
            plain[name] = value.detach()
    return quantized, structure.checkpoint_tensors(model, plain)


def _common_format(quantized: dict[str, Any]) -> Format:
    """The format that the config describes; scales may follow the dtype of each weight."""
    formats = collections.Counter(value.format for value in quantized.values())
    first = formats.most_common(1)[0][0]
    for name, value in quantized.items():
        fmt = value.format
        if (fmt.element, fmt.group, fmt.zero_point, fmt.tensor_scale) != (
            first.element, first.group, first.zero_point, first.tensor_scale,
        ):  # fmt: skip
            raise ValueError(
                f"{name} is {fmt.name} and others are {first.name}; one checkpoint holds one format so far"
            )
    return first


def _dense_entry(name: str, tensor: Tensor) -> writer.Entry:
    return writer.Entry(name, {name: (tuple(tensor.shape), tensor.dtype)}, lambda: {name: tensor})


def _quantized_entries(model: Any, name: str, value: Any, scheme: Scheme, static: Parts) -> list[writer.Entry]:
    """One entry for a weight, one an expert for fused experts."""
    fmt, inputs, shape = value.format, scheme.input_format, tuple(value.shape)
    compressed_tensors.layout(fmt, inputs)
    group = fmt.group_size if fmt.group[0] == 1 and fmt.group_size > 0 else 1
    if inputs is not None and inputs.group_size > 0:
        group = max(group, inputs.group_size)
    if shape[-1] % group:
        raise ValueError(
            f"{name} has shape {list(shape)}, and runtimes need its {shape[-1]} columns in whole groups of {group}; "
            "quantize with a group size that divides them, or ignore it"
        )
    if len(shape) == 2:
        (key,) = structure.checkpoint_tensors(model, {name: torch.empty(shape, device="meta")})
        pieces = [structure.Piece(key.removesuffix(".weight"), 0, 0, shape[0])]
    else:
        pieces = list(structure.fused_pieces(model, name, shape))
        if not pieces:
            raise ValueError(
                f"{name} {list(shape)} has no form in checkpoints of this model; ignore it when quantizing"
            )
    return [_entry(piece, value, fmt, inputs, static) for piece in pieces]


def _entry(piece: structure.Piece, value: Any, fmt: Format, inputs: Format | None, static: Parts) -> writer.Entry:
    height = fmt.group[0]
    if height > 1 and piece.start % height:
        raise ValueError(
            f"{piece.name} begins at row {piece.start} of a fused parameter, inside a block of {height} rows; "
            "use a format with one scale a row"
        )
    shape = (piece.stop - piece.start, value.shape[-1])

    def cut(part: Tensor, rows: slice) -> Tensor:
        return part[piece.expert, rows] if value.ndim == 3 else part[rows]

    def make() -> dict[str, Tensor]:
        rows = slice(piece.start, piece.stop)
        parts: Parts = {"qdata": cut(value.qdata, rows).cpu().clone()}
        for part in ("scale", "zero_point"):
            tensor = getattr(value, part)
            if tensor is not None:
                groups = slice(piece.start // max(1, height), -(-piece.stop // max(1, height)))
                parts[part] = (tensor if height == -1 else cut(tensor, groups)).cpu().contiguous()
        if value.tensor_scale is not None:
            parts["tensor_scale"] = value.tensor_scale.cpu()
        tensors = compressed_tensors.encode(parts, fmt, inputs, shape, static)
        return {f"{piece.name}.{suffix}": tensor for suffix, tensor in tensors.items()}

    specs = compressed_tensors.specs(fmt, inputs, shape, bool(static))
    return writer.Entry(piece.name, {f"{piece.name}.{suffix}": spec for suffix, spec in specs.items()}, make)


def _ignore(
    model: Any, quantized: dict[str, Any], roles: dict[str, structure.Role], dense: dict[str, Tensor]
) -> list[str]:
    """As `plan` lists them: dense linear modules, and dense 2-D weights that other runtimes build as linear layers."""
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    stays = linears - {name.removesuffix(".weight") for name in quantized}
    for key, tensor in dense.items():
        module, _, leaf = key.rpartition(".")
        if leaf == "weight" and tensor.ndim == 2 and not roles[key].embedding:
            stays.add(roles[key].module if roles[key].kind == "linear" else module)
    return sorted(stays, key=natural)


def _write_configs(model: Any, path: Path, quantization: dict[str, Any]) -> None:
    from tritonq.io.source import read_json

    architectures, model.config.architectures = model.config.architectures, [type(model).__name__]
    try:
        model.config.save_pretrained(path)
    finally:
        model.config.architectures = architectures
    config = read_json(path / "config.json")
    config["dtype"] = str(model.dtype)[6:]
    config["quantization_config"] = quantization
    writer.write_json(path / "config.json", dict(sorted(config.items())))
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(path)
