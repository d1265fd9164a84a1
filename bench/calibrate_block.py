"""One decoder block of an 8B model tuned by SignRound and by the package auto-round:
`python -m bench.calibrate_block [--out FILE]`.

The block is transformers' LlamaDecoderLayer with the sizes of Llama 3.1 8B, random weights, and inputs whose channels
are correlated and of very different sizes, as those of language models are. Every row tunes the same weights on the
same samples, and its loss is computed here in one way: the mean of squared differences over all samples between what
the block puts out with the rounded weights and with its own. Time is that of tuning alone (for auto-round of its
quantizer's `quantize_block`, without the passes before and after), after a run of a few iterations that compiles
whatever there is to compile; peak is all memory that torch had allocated meanwhile, weights, inputs and targets
included where they are on the device.

One more row is `tritonq.quantize_` with its defaults on a model of this one block, with all that comes before and after
tuning (inputs taken from the model's own forward, dense outputs, losses, packing), beside auto-round's time with the
same; inputs begin on the host there.

auto-round runs as LLM Compressor calls it for one block, with its defaults (200 iterations, 8 samples each, inputs and
targets kept on the device), eager and with torch.compile. `--auto-round` names folders that it is imported from where
it is not installed.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tritonq as tq
from tritonq import ops
from tritonq.bench import measure, report
from tritonq.calibrate.signround import SignRound
from tritonq.calibrate.task import Batch, Layer, Task, squared_error
from tritonq.nn.schemes import get_scheme

Row = dict[str, Any]
WARM = 3  # iterations of the run before
WHOLE = "quantize_, defaults"


@dataclass(frozen=True)
class Ours:
    """A row of ours: samples a call, where inputs and targets are, and options of SignRound."""

    name: str
    micro_batch: int
    on_device: bool
    options: tuple[tuple[str, Any], ...] = ()


OURS = (
    Ours("defaults, inputs on the host", 8, False),
    Ours("defaults, inputs on the device", 8, True),
    Ours("bf16 offsets, inputs on the host", 8, False, (("v_dtype", torch.bfloat16),)),
    Ours("no momentum, inputs on the host", 8, False, (("momentum", 0.0),)),
    Ours("8 samples, inputs on the device", 8, True, (("batch", 8),)),
    Ours("8 samples in pieces of 2, inputs on the host", 2, False, (("batch", 8),)),
)
COMPILED = (Ours("defaults, compiled", 8, False, (("compile", True),)),)


class Samples:
    """Inputs [1, tokens, hidden] and what the dense block puts out, bf16, in pinned host memory."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        self.device, self.tokens, self.count = device, arguments.tokens, arguments.samples
        config = LlamaConfig(
            hidden_size=arguments.hidden, intermediate_size=arguments.inner, num_attention_heads=arguments.heads,
            num_key_value_heads=max(1, arguments.heads // 4), num_hidden_layers=1, vocab_size=128,
            max_position_embeddings=max(2048, arguments.tokens), attn_implementation="sdpa",
        )  # fmt: skip
        with torch.device(device):
            self.model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        for p in self.model.parameters():
            if p.ndim == 2:
                p.data.normal_(0, 0.02)
        self.block = self.model.model.layers[0]
        hidden, rank = arguments.hidden, max(1, arguments.hidden // 4)
        sizes = torch.exp(0.7 * torch.randn(hidden, device=device))
        mix = torch.randn(rank, hidden, device=device) / rank**0.5
        shape = (self.count, self.tokens, hidden)
        pinned = device.type == "cuda"
        self.inputs, self.targets = (torch.empty(shape, dtype=torch.bfloat16, pin_memory=pinned) for _ in range(2))
        for i in range(self.count):
            z = torch.randn(self.tokens, rank, device=device)
            self.inputs[i] = (z @ mix + 0.5 * torch.randn(self.tokens, hidden, device=device)) * sizes
        position = torch.arange(self.tokens, device=device)[None]
        first = self.inputs[:1].to(device)
        self.kwargs = {"position_embeddings": self.model.model.rotary_emb(first, position), "attention_mask": None}
        with torch.no_grad():
            for i in range(self.count):
                self.targets[i] = self.outputs(self.block, self.inputs[i : i + 1].to(device))[0]

    def outputs(self, block: nn.Module, x: Tensor) -> Tensor:
        y = block(x, **self.kwargs)
        found: Tensor = y[0] if isinstance(y, tuple) else y
        return found

    @torch.no_grad()
    def loss(self, block: nn.Module) -> float:
        """Over all samples."""
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for i in range(0, self.count, 4):
            batch = self.batch(range(i, min(i + 4, self.count)), self.inputs, self.targets)
            total += squared_error([self.outputs(block, batch.args[0])], batch)
            count += batch.count
        return float(total) / count

    def batch(self, samples: Sequence[int], inputs: Tensor, targets: Tensor) -> Batch:
        """Samples put together on the device, wherever these tensors are."""
        chosen = [
            torch.cat([t[i : i + 1].to(self.device, non_blocking=True) for i in samples]) for t in (inputs, targets)
        ]
        return Batch(tuple(samples), (chosen[0],), self.kwargs, [chosen[1]], [None])

    def task(self, row: Ours, told: list[Row]) -> Task:
        fmt = get_scheme("W4A16").weight_format(torch.bfloat16)
        layers = [
            Layer(name, module, "weight", fmt)
            for name, module in self.block.named_modules()
            if isinstance(module, nn.Linear)
        ]
        inputs, targets = (t.to(self.device) if row.on_device else t for t in (self.inputs, self.targets))
        return Task(
            "block", self.block, layers, self.count,
            lambda samples, device, wanted: [self.batch(samples, inputs, targets)],
            self.device, lambda what, **details: told.append({"what": what, **details}), micro_batch=row.micro_batch,
        )  # fmt: skip


class Watch:
    """Seconds, and peak bytes of device memory, of what runs inside."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds, self.peak = 0.0, None

    def __enter__(self) -> Watch:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.began = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.peak = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        self.seconds = round(time.perf_counter() - self.began, 3)


def clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ours(samples: Samples, row: Ours, iters: int) -> Row:
    options = {"iters": iters, **dict(row.options)}
    began = time.perf_counter()
    SignRound(**{**options, "iters": WARM, "evaluation": 1}).run(samples.task(row, []))
    first = round(time.perf_counter() - began, 1)
    clear(samples.device)
    told: list[Row] = []
    task = samples.task(row, told)
    with Watch(samples.device) as watch:
        SignRound(**options).run(task)
    copied = copy.deepcopy(samples.block)
    for layer in task.layers:
        weight = copied.get_submodule(layer.name).weight
        assert layer.result is not None
        weight.data.copy_(ops.dequantize(layer.result, layer.fmt, tuple(weight.shape), weight.dtype))
    tuned = told[-1]
    return {
        "what": "tritonq", "name": row.name, "batch": tuned["batch"], "micro_batch": task.micro_batch,
        "inputs_on_device": row.on_device, "options": {k: str(v) for k, v in options.items()},
        "seconds": watch.seconds, "peak_gib": watch.peak, "loss": samples.loss(copied),
        "loss_rule": tuned["loss_before"], "loss_search": tuned["loss_nearest"], "kept": tuned["kept"],
        "best_iteration": tuned["best_iteration"], "seconds_of_first": first,
    }  # fmt: skip


def whole(samples: Samples, iters: int) -> Row:
    """Everything between a model of one block and samples of its inputs on the host, and its packed weights."""
    data = [{"inputs_embeds": x[None]} for x in samples.inputs]
    for wanted in (WARM, iters):
        model = copy.deepcopy(samples.model)
        samples.model.cpu()
        clear(samples.device)
        calibration = tq.Calibration(data, samples=samples.count, seqlen=samples.tokens, iters=wanted)
        try:
            with Watch(samples.device) as watch:
                tq.quantize_(model, "W4A16", calibration=calibration, progress=False)
        finally:
            samples.model.to(samples.device)
    assert calibration.result is not None
    return {
        "what": "tritonq", "name": WHOLE, "seconds_with_passes": watch.seconds, "peak_gib": watch.peak,
        "loss": samples.loss(model.model.layers[0]),
        "events": [str(event) for event in calibration.result.events],
    }  # fmt: skip


def auto_round(samples: Samples, compiled: bool, iters: int) -> Row:
    """Raises ImportError where the package is not there."""
    from auto_round import AutoRound

    seconds_of_first = 0.0
    row: Row = {}
    for wanted in (WARM, iters):
        model = copy.deepcopy(samples.model)
        block = model.model.layers[0]
        samples.model.cpu()  # nothing of ours on the device
        clear(samples.device)
        rounder = AutoRound(
            model, tokenizer="", scheme="W4A16", iters=wanted, nsamples=samples.count, seqlen=samples.tokens,
            batch_size=8, enable_torch_compile=compiled, device_map=str(samples.device),
        )  # fmt: skip
        rounder.post_init()
        kept = {**samples.kwargs, "position_ids": torch.arange(samples.tokens, device=samples.device)[None]}
        calls = [(((x[None],), dict(kept)),) for x in samples.inputs]
        quantizer, watch = rounder.alg_composer.block_quantizer, Watch(samples.device)
        quantizer.quantize_block = functools.partial(_watched, watch, quantizer.quantize_block)
        began = time.perf_counter()
        try:
            rounder.quantize_block(block, calls, None, device=str(samples.device))
        finally:
            samples.model.to(samples.device)
        whole = round(time.perf_counter() - began, 3)
        if wanted == WARM:
            seconds_of_first = whole
            continue
        context = rounder.compress_context
        row = {
            "what": "auto-round", "name": "compiled" if compiled else "eager", "batch": 8,
            "options": {
                "compile": bool(context.enable_torch_compile), "cache_device": str(context.cache_device),
                "iters": quantizer.iters, "lr": quantizer.lr,
            },
            "seconds": watch.seconds, "seconds_with_passes": whole, "peak_gib": watch.peak,
            "seconds_of_first": round(seconds_of_first, 1), "loss": samples.loss(block.to(samples.device)),
        }  # fmt: skip
    return row


def _watched(watch: Watch, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    with watch:
        return call(*arguments, **options)


def compare(rows: list[Row]) -> list[Row]:
    """Every row of ours beside every row of auto-round."""
    found = []
    for mine in (row for row in rows if row["what"] == "tritonq"):
        for other in (row for row in rows if row["what"] == "auto-round"):
            peaks = mine["peak_gib"] and other["peak_gib"]
            timed = "seconds" if "seconds" in mine else "seconds_with_passes"
            found.append({
                "ours": mine["name"], "auto_round": other["name"],
                "times_as_fast": round(other[timed] / mine[timed], 2),
                "loss_ratio": round(mine["loss"] / other["loss"], 4),
                "peak_ratio": round(mine["peak_gib"] / other["peak_gib"], 3) if peaks else None,
            })  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    for name, default in (("hidden", 4096), ("inner", 14336), ("heads", 32), ("samples", 128), ("tokens", 2048),
                          ("iters", 200)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rows", nargs="*", type=int, help=f"of ours, by number: {[row.name for row in OURS]}")
    parser.add_argument("--no-whole", dest="whole", action="store_false", help=f"leave out {WHOLE!r}")
    parser.add_argument("--compile", action="store_true", help="ours with a compiled block, too")
    parser.add_argument("--peers", nargs="*", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--auto-round", nargs="*", default=[], metavar="DIR", help="where auto-round is imported from")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds after which no row begins")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device, began = torch.device(arguments.device), time.perf_counter()
    command = " ".join(["python -m bench.calibrate_block", *sys.argv[1:]])
    result: Row = {"torch": torch.__version__, "command": command, "gpu": None}
    if device.type == "cuda":
        measure.require_gpu()
        result = measure.environment(command)
        device = torch.device("cuda", torch.cuda.current_device())
    sys.path += arguments.auto_round
    shape = {name: getattr(arguments, name) for name in ("hidden", "inner", "heads", "samples", "tokens", "iters")}
    result |= {"scheme": "W4A16", "shape": shape, "rows": [], "failed": [], "left_out": []}
    samples = Samples(arguments, device)
    wholes = [(f"tritonq {WHOLE}", functools.partial(whole, samples, arguments.iters))] if arguments.whole else []
    chosen = [OURS[i] for i in arguments.rows] if arguments.rows is not None else list(OURS)
    chosen += COMPILED if arguments.compile else ()
    todo: list[tuple[str, Callable[[], Row]]] = [
        (f"tritonq {row.name}", functools.partial(ours, samples, row, arguments.iters)) for row in chosen
    ] + wholes
    for kind in arguments.peers:  # last: what it changes in torch and transformers cannot slow down ours
        call = functools.partial(auto_round, samples, kind == "compiled", arguments.iters)
        todo.append((f"auto-round {kind}", call))
    print(f"inputs and targets after {time.perf_counter() - began:.0f} s", flush=True)
    for name, call in todo:
        if time.perf_counter() - began > arguments.budget:
            result["left_out"].append(name)
            continue
        try:
            result["rows"].append(call())
            print(result["rows"][-1], f"after {time.perf_counter() - began:.0f} s", flush=True)
        except Exception as error:  # a package that is not there, or whose interface has moved on
            result["failed"].append(f"{name}: {type(error).__name__}: {error}".split("\n")[0])
            print("FAILED", result["failed"][-1], flush=True)
        clear(device)
        result["compared"] = compare(result["rows"])
        if arguments.out:
            report.write(result, arguments.out)
    for row in result["compared"]:
        print(row)
    report.finish(result, began, arguments.out)
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
