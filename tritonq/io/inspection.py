"""What a checkpoint holds, from its config and the headers of its files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tritonq.io.source import open_source


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """Description, tensors by kind (last parts of their names) and sizes of the checkpoint in a folder.

    Returns:
        {"description", "quantization", "ignore", "kinds": [{"name", "count", "dtype", "shape", "bytes"}], "files",
        "bytes"}.

    Raises:
        FileNotFoundError, ValueError: no checkpoint there, or a damaged one.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; pass the folder of a checkpoint")
    with open_source(path, path, None) as source:
        quantization = source.config.get("quantization_config")
        kinds: dict[tuple[str, str], dict[str, Any]] = {}
        for info in source.tensors.values():
            name = ".".join(info.name.split(".")[-2:])
            dtype = str(info.dtype).removeprefix("torch.")
            kind = kinds.setdefault(
                (name, dtype), {"name": name, "count": 0, "dtype": dtype, "shape": list(info.shape), "bytes": 0}
            )
            kind["count"] += 1
            kind["bytes"] += info.nbytes
        return {
            "description": _describe(path.resolve().name, source.config, quantization),
            "quantization": quantization,
            "ignore": list((quantization or {}).get("ignore", [])),
            "kinds": list(kinds.values()),
            "files": len({info.file for info in source.tensors.values()}),
            "bytes": source.nbytes,
        }


def _describe(name: str, config: dict[str, Any], quantization: dict[str, Any] | None) -> str:
    kind = ", ".join(config.get("architectures") or ["unknown architecture"])
    if not quantization:
        return f"{name}: {kind}, not quantized"
    parts = []
    for group in (quantization.get("config_groups") or {}).values():
        parts.append(f"weights {_arguments(group.get('weights'))}, inputs {_arguments(group.get('input_activations'))}")
    layout = quantization.get("format", quantization.get("quant_method", "unknown"))
    return f"{name}: {kind}, {layout}" + "".join(f"; {part}" for part in parts)


def _arguments(args: dict[str, Any] | None) -> str:
    if not args:
        return "as they are"
    group = args.get("group_size") or args.get("block_structure")
    size = f" of {group}" if group else ""
    asymmetric = ", asymmetric" if args.get("symmetric") is False else ""
    return f"{args.get('type')}{args.get('num_bits')} by {args.get('strategy')}{size}{asymmetric}"
