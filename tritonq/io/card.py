"""The model card of an export: what it is, what it lost, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tritonq.formats import Format
from tritonq.io.compressed_tensors import needs_dequantize
from tritonq.io.report import LayerError, by_kind
from tritonq.nn.schemes import Scheme


def licence(folder: Path) -> str | None:
    """The licence that the source's own card names."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    match = re.match(
        r"---\n.*?^license:\s*([\w.-]+)\s*$.*?^---$", card.read_text(encoding="utf-8", errors="replace"), re.M | re.S
    )
    return match[1] if match else None


def model_card(
    *,
    base: str,
    scheme: Scheme,
    fmt: Format,
    layers: Mapping[str, LayerError],
    quantized: int,
    dense: int,
    bits_per_weight: float,
    notes: Sequence[str],
    causal: bool,
    licence: str | None = None,
    static: bool = False,
    calibration: str | None = None,
) -> str:
    """README.md: the same bytes for the same export. `calibration` says with what weights were calibrated."""
    front = ["---", "library_name: transformers", f"base_model: {base}", "base_model_relation: quantized"]
    front += [f"license: {licence}"] if licence else []
    front += ["tags:", "- compressed-tensors", f"- {scheme.name.lower()}", "---", ""]
    inputs = f"inputs quantized on the fly to `{scheme.inputs}`" if scheme.inputs else "inputs as they are"
    if static:
        inputs = f"inputs quantized to `{scheme.inputs}` under static scales"
    how = f"Calibrated with {calibration}" if calibration else "Rounded without calibration data"
    body = [
        f"# {base.rpartition('/')[2]}, quantized to {scheme.name}",
        "",
        f"Weights of {quantized} linear layers of `{base}` in the format `{fmt.name}` "
        f"({bits_per_weight:.2f} bits a weight with "
        f"scales), {inputs}; {dense} other tensors unchanged. {how} by tritonq.",
        "",
    ]
    return "\n".join([*front, *body, *_loading(fmt, causal), *_table(layers), *_notes(notes)])


def _loading(fmt: Format, causal: bool) -> list[str]:
    auto = "AutoModelForCausalLM" if causal else "AutoModel"
    dequantize = needs_dequantize(fmt)
    names = f"{auto}, AutoTokenizer" + (", CompressedTensorsConfig" if dequantize else "")
    option = ", quantization_config=CompressedTensorsConfig(dequantize=True)" if dequantize else ""
    lines = [
        "## Loading",
        "",
        "With transformers (`pip install transformers compressed-tensors`):",
        "```python",
        f"from transformers import {names}",
        "",
        f'model = {auto}.from_pretrained("path/to/this/folder"{option})',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        "```",
    ]
    if causal:
        lines += ["With vLLM:", "```sh", "vllm serve path/to/this/folder", "```"]
    return [*lines, ""]


def _table(layers: Mapping[str, LayerError]) -> list[str]:
    if not layers:
        return []
    lines = [
        "## Error of the weights",
        "",
        "Relative error is |w - dequantized| / |w| (Euclidean norms); SQNR is the same in dB.",
        "",
        "| layers | count | relative error | worst | SQNR (dB) |",
        "|---|---:|---:|---:|---:|",
    ]
    everything = {**by_kind(layers), "**all**": list(layers.values())}
    for kind, errors in everything.items():
        whole = sum(errors, LayerError(0.0, 0.0))
        worst = max(error.relative for error in errors)
        sqnr = "lossless" if whole.sqnr is None else f"{whole.sqnr:.2f}"
        lines.append(f"| {kind} | {len(errors)} | {whole.relative:.4f} | {worst:.4f} | {sqnr} |")
    return [*lines, ""]


def _notes(notes: Sequence[str]) -> list[str]:
    return ["## Notes", "", *(f"- {note}" for note in notes), ""] if notes else []
