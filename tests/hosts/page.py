"""docs/hosts.md, and the file of what was seen on a GPU: `python -m tests.hosts.page` writes the page.

A row says what the test of that mode asserts. What ran on a GPU is what `bench/results/<gpu>/hosts.json` says, for rows
that claim the same today: `python -m pytest tests/hosts -m gpu --out bench/results/<gpu>/hosts.json` writes it.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import accelerate_modes, diffusers_modes, peft_modes, transformers_modes
from .registry import MODES, SCHEMES, Mode

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "hosts.md"
HOSTS = [module.HOST for module in (diffusers_modes, accelerate_modes, peft_modes, transformers_modes)]
NOT_YET = "not yet"
PACKAGES = ("torch", "triton", *HOSTS)

INTRODUCTION = """# Quantized models under other libraries

What host libraries do to a model that `tritonq.quantize_` quantized, as they are released: nothing of them is patched,
and nothing has to be imported for them. This page is written from the tests (`tests/hosts/`), one row a test:

- *works*: outputs, gradients and trained parameters are those of the same quantized model without the host (under
  adapters: of the dense model that the weights stand for), bit for bit, over several steps; quantized parameters are
  the same ones, of the same format and with the same bytes, and lie where the host puts them, payload and all; nothing
  is left allocated on the device. Where a note says otherwise, the test asserts what the note says.
- *refused*: the call raises this error and leaves the weights as they were.

Formats: {formats}. Models: three blocks of linear layers and fused experts (a parameter
of rank 3) with a parameter and a buffer beside them, a tiny Flux, a tiny Llama. On the CPU modes take turns with the
formats; on a GPU every mode runs with all of them.

On the CPU, in every run of the suite: {versions}.
"""


def result(mode: Mode) -> str:
    return "works" if mode.error is None else f"refused: `{mode.error.__name__}: ... {mode.message} ...`"


def seen_on_gpus() -> list[dict[str, Any]]:
    files = sorted((ROOT / "bench" / "results").glob("*/hosts.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


def on_gpu(mode: Mode, gpus: list[dict[str, Any]]) -> str:
    """The GPUs on which this row was seen as it stands, with the number of formats."""
    if "cuda" not in mode.devices:
        return ""
    found = []
    for gpu in gpus:
        rows = [row for row in gpu["rows"] if (row["mode"], row["result"]) == (mode.id, result(mode))]
        if rows:
            count = len(rows[0]["formats"])
            found.append(f"{gpu['device']}: {'all formats' if count == len(SCHEMES) else f'{count} formats'}")
    return ", ".join(found) or NOT_YET


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def page() -> str:
    gpus, pinned = seen_on_gpus(), pins()
    versions = ", ".join(f"{name} {pinned[name]}" for name in PACKAGES)
    text = [INTRODUCTION.format(formats=", ".join(SCHEMES), versions=versions)]
    for gpu in gpus:
        used = ", ".join(f"{name} {number}" for name, number in gpu["versions"].items())
        text.append(f"On {gpu['device']}: {used}.\n")
    for host in HOSTS:
        text.append(f"## {host}\n\n| mode | result | CPU | GPU | note |\n|---|---|---|---|---|")
        for mode in MODES:
            if mode.host == host:
                cpu, gpu = "yes" if "cpu" in mode.devices else "", on_gpu(mode, gpus)
                seen = result(mode) if cpu or gpu != NOT_YET else "not run yet"
                text.append(f"| {' | '.join((mode.name, seen, cpu, gpu, mode.note))} |")
        text.append("")
    return "\n".join(text)


def write_seen(path: Path, seen: Iterable[tuple[str, str]]) -> None:
    """The file of a run on this GPU: `seen` are (mode id, format) of tests that passed there."""
    import torch

    formats: dict[str, list[str]] = {}
    for mode_id, fmt in sorted(set(seen)):
        formats.setdefault(mode_id, []).append(fmt)
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    rows = [
        {"mode": mode.id, "result": result(mode), "formats": formats[mode.id]} for mode in MODES if mode.id in formats
    ]
    content = {"device": torch.cuda.get_device_name(), "versions": versions, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
