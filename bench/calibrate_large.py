"""A model of the shape of Llama 3 70B calibrated from file to file: what memory that takes.
`python -m bench.calibrate_large [--out FILE] [--folder DIR]`.

A checkpoint with some blocks of that shape (hidden 8192, inner 28672, 64 heads, 8 of keys and values, vocabulary
128256) and random weights is written, and `tritonq.quantize_checkpoint` quantizes it with W4A16, groups of 128, on
128 x 2048 random tokens. All 80 blocks are 140 GB of files and most of an hour; here are `--blocks` of them, all of
which are read, run, quantized and written. The first `--timed` are tuned by SignRound, the others rounded to nearest,
which takes seconds each. What 80 blocks take follows from what each of these takes: the report has the peak of every
block, and `growth` is what the peak of the last one has more than that of the first of its kind. One thing grows with
the number of blocks: while it is found out what the blocks get, their outputs for one sample are kept, 32 MiB each.
`all_blocks` counts that, too: 80 x 32 MiB are less than the 8 GiB of inputs and targets that come later.

    device limit = 2 blocks' weights + activations
    activations  = forward and backward of one call (measured, without gradients of weights)
                 + inputs and targets of this call and of the next one, which is fetched meanwhile
                 + inputs and targets of samples that lie on the device, 1 GiB at most
    host limit   = 24 GiB of memory that is no mapped file: RssAnon (pinned buffers are in it) + RssShmem
                 + what torch pinned itself

`blocks_of_weights` is what the peak has beyond these activations, in weights of a block. With n bytes of bf16 weights
in a block, SignRound keeps W n, what the block computes with n, its gradient n, v 2n in fp32 or n in bf16, and codes
twice 0.26 n: 5.5 n or 4.5 n, and a thirtieth of n for the extremes of groups. So the dense weights of two blocks are
never there (other blocks have none, and the embedding looks its rows up in the file), but more than twice the bytes of
one are while it is tuned, and `holds` says so. n is 1.59 GiB; inputs and targets of all samples are 4 GiB each, in
pinned memory but for that 1 GiB.

Rows after the first tune for fewer iterations, which changes no peak. Times are those of the pipeline's own report. On
`--device cpu` there is no peak of a device.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import re
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tritonq as tq
from tritonq.bench import measure, report
from tritonq.calibrate import calibration as calibrations
from tritonq.calibrate.signround import SignRound
from tritonq.calibrate.task import Task
from tritonq.calibrate.trial import deterministic, half_squared_error

Row = dict[str, Any]
ALL_BLOCKS = 80
HOST_LIMIT = 24 * 2**30
INTERVAL = 0.05  # seconds between looks at the memory of the host
QUANTIZED = 0.27  # of the bytes of bf16 weights: 4 bits, and a scale for 128


@dataclass(frozen=True)
class Case:
    """A row: options of SignRound."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()


CASES = (
    Case("defaults"),
    Case("bf16 offsets, no momentum", (("v_dtype", torch.bfloat16), ("momentum", 0.0))),
    Case("8 samples", (("batch", 8),)),
)


# ------------------------------------------------------------------------------------------------------- the checkpoint


def write_checkpoint(folder: Path, arguments: argparse.Namespace, device: torch.device) -> int:
    """A Llama with random bf16 weights, a file a block; returns the bytes of the weights of one block that are
    quantized."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=arguments.hidden, intermediate_size=arguments.inner, num_attention_heads=arguments.heads,
        num_key_value_heads=max(1, arguments.heads // 8), num_hidden_layers=arguments.blocks,
        vocab_size=arguments.vocab, max_position_embeddings=max(2048, arguments.tokens), tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    files: dict[str, list[str]] = {}
    for name in model.state_dict():
        found = re.match(r"model\.layers\.(\d+)\.", name)
        files.setdefault(f"block-{int(found[1]):05d}" if found else name.rpartition(".")[0], []).append(name)
    state = model.state_dict()
    needed = sum(t.numel() * 2 for t in state.values())
    free = shutil.disk_usage(folder).free
    if free < (1 + 2 * QUANTIZED) * needed:
        raise SystemExit(
            f"{folder} has {report.size_text(free)} free, and a checkpoint of {report.size_text(needed)} and its "
            f"results take {report.size_text((1 + 2 * QUANTIZED) * needed)}; pass --folder, or fewer --blocks"
        )
    generator = torch.Generator(device).manual_seed(0)
    for number, (file, names) in enumerate(sorted(files.items())):
        values = {name: _values(state[name], generator, device) for name in names}
        save_file(values, folder / f"{file}.safetensors", metadata={"format": "pt"})
        del values
        print(f"file {number + 1} of {len(files)}", end="\r", flush=True)
    index = {"metadata": {}, "weight_map": {name: f"{file}.safetensors" for file, own in files.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(
        m.weight.numel() * 2
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name.startswith("model.layers.0.")
    )


def _values(like: Tensor, generator: torch.Generator, device: torch.device) -> Tensor:
    if like.ndim == 1:  # of a norm
        return torch.ones(like.shape, dtype=torch.bfloat16)
    values = torch.empty(like.shape, dtype=torch.bfloat16, device=device)
    return values.normal_(0, 0.02, generator=generator).cpu()


# ------------------------------------------------------------------------------------------------------------- watching


class HostPeak:
    """The most host memory of this process while open, by kind, in bytes; {} where there is no /proc."""

    KINDS = ("RssAnon", "RssShmem", "RssFile")

    def __init__(self) -> None:
        self.peak: dict[str, int] = {}
        self.before = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="host-peak", daemon=True)

    def __enter__(self) -> HostPeak:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        for kind, nbytes in self._now().items():
            self.peak[kind] = max(self.peak.get(kind, 0), nbytes)

    def _now(self) -> dict[str, int]:
        """The last two: what does not count as a mapped file, and the same of all processes of the container."""
        found: dict[str, int] = {}
        with contextlib.suppress(OSError):
            text = Path("/proc/self/status").read_text()
            found = {kind: int(n) * 1024 for kind, n in re.findall(r"^(Rss\w+):\s+(\d+) kB", text, re.MULTILINE)}
            found["unmapped"] = found.get("RssAnon", 0) + found.get("RssShmem", 0) + pinned_by_torch()
        with contextlib.suppress(OSError):
            text = Path("/sys/fs/cgroup/memory.stat").read_text()
            found["cgroup"] = sum(int(n) for n in re.findall(r"^(?:anon|shmem) (\d+)", text, re.MULTILINE))
        return found


def pinned_by_torch() -> int:
    """Bytes that torch's allocator of pinned memory holds, which are in no line of /proc/self/status."""
    if not torch.cuda.is_initialized() or not hasattr(torch.cuda, "host_memory_stats"):
        return 0
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0))


class First:
    """SignRound of the first blocks; the others are left to rounding to nearest.

    Attributes:
        activations: bytes that forward and backward of one call take on the device, None where nobody counts them.
        earlier: the peak of a block's device before it was tuned, by the name of the block.
        tuned: names of the blocks that were tuned.
    """

    name = "signround"

    def __init__(self, count: int, method: SignRound) -> None:
        self.count, self.method = count, method
        self.activations: int | None = None
        self.earlier: dict[str, int] = {}
        self.tuned: list[str] = []

    def run(self, task: Task) -> None:
        if len(self.tuned) == self.count:
            return
        self.tuned.append(task.name)
        if self.activations is None and task.device.type == "cuda":
            self.earlier[task.name] = torch.cuda.max_memory_allocated(task.device)
            self.activations = activations(task, min(self.method.samples(task), task.micro_batch))
            torch.cuda.reset_peak_memory_stats(task.device)
        self.method.run(task)


def activations(task: Task, samples: int) -> int:
    """The most that forward and backward of one call take beyond the block and the batch; gradients of weights are
    dropped one by one, as soon as they are there."""
    weights = [layer.weight for layer in task.layers]
    (batch,) = task.fetch(range(samples), task.device, True)
    with contextlib.ExitStack() as undo, torch.enable_grad(), deterministic(True):
        for weight in weights:
            undo.callback(weight.requires_grad_, False)
            undo.callback(weight.requires_grad_(True).register_post_accumulate_grad_hook(_drop).remove)
        torch.cuda.synchronize(task.device)
        torch.cuda.reset_peak_memory_stats(task.device)
        before = torch.cuda.memory_allocated(task.device)
        half_squared_error(task.forward(batch), batch).backward()
        torch.cuda.synchronize(task.device)
        return torch.cuda.max_memory_allocated(task.device) - before


def _drop(weight: Tensor) -> None:
    weight.grad = None


# ------------------------------------------------------------------------------------------------------------- the rows


def row(case: Case, source: Path, out: Path, arguments: argparse.Namespace, block: int, iters: int) -> Row:
    """Quantize the checkpoint. Args: block: bytes of the weights of one."""
    device = torch.device(arguments.device)
    ids = torch.randint(
        0, arguments.vocab, (arguments.samples, arguments.tokens), generator=torch.Generator().manual_seed(1)
    )
    method = First(arguments.timed, SignRound(iters=iters, **dict(case.options)))
    calibration = tq.Calibration(ids, method=method, samples=arguments.samples, seqlen=arguments.tokens)
    room = sum(calibrations._room(device).values())
    began = time.perf_counter()
    with HostPeak() as host:
        tq.quantize_checkpoint(source, out, "W4A16", calibration=calibration, device=device, progress=False)
    seconds = time.perf_counter() - began
    assert calibration.result is not None
    told = calibration.result
    rows = [_block(one, method, device) for one in told.blocks]
    sample = arguments.tokens * arguments.hidden * 2  # bytes of an input, or of a target
    kept = min(room, 2 * arguments.samples * sample)
    result: Row = {
        "name": case.name, "batch": max((e.details["batch"] for e in told.events if e.what == "tuned"), default=0),
        "iters": iters,
        "options": {key: str(value) for key, value in case.options}, "seconds": round(seconds, 1),
        "seconds_of_parts": {one.name: one.seconds for one in told.parts},
        "peak_of_parts": {one.name: one.peak_bytes for one in told.parts},
        "seconds_tuned": [e.details["seconds"] for e in told.events if e.what == "tuned"],
        "memory_steps": [str(event) for event in told.memory_steps],
        "blocks": rows, "growth": _growth(rows),
        "host": {
            "before": host.before, "peak": host.peak, "limit": HOST_LIMIT,
            "holds": host.peak["unmapped"] <= HOST_LIMIT if host.peak else None,
        },
    }  # fmt: skip
    everything = ALL_BLOCKS * sample  # outputs of all blocks for one sample, while they are looked at
    result["all_blocks"] = {
        "blocks": ALL_BLOCKS, "outputs_of_one_sample": everything, "inputs_and_targets": 2 * arguments.samples * sample,
        "larger": everything > 2 * arguments.samples * sample,
    }  # fmt: skip
    if method.activations is not None:
        others = [n for one in told.parts for where, n in one.peak_bytes.items() if where != "host"]
        peak = max(*(one["device"] for one in rows), *others)
        calls = 4 * result["batch"] * sample
        active = method.activations + calls + kept
        result["device"] = {
            "peak": peak, "weights_of_a_block": block, "limit": 2 * block + active, "holds": peak <= 2 * block + active,
            "activations": {"forward_and_backward": method.activations, "calls": calls, "kept": kept},
            "blocks_of_weights": round((peak - active) / block, 2), "of_80_gb": round(peak / 80e9, 3),
        }  # fmt: skip
    return result


def _block(one: Any, method: First, device: torch.device) -> Row:
    peaks = {name: nbytes for name, nbytes in one.peak_bytes.items() if name != "host"}
    on_device = max([*peaks.values(), method.earlier.get(one.name, 0)], default=0)
    return {
        "name": one.name, "tuned": one.name in method.tuned, "seconds": one.seconds, "host": one.peak_bytes.get("host"),
        "device": on_device or None, "loss_before": one.loss_before, "loss_after": one.loss_after,
    }  # fmt: skip


def _growth(rows: list[Row]) -> dict[str, Row]:
    """By kind of block and of memory: bytes that the peak of the last one has more than that of the first."""
    found: dict[str, Row] = {}
    for kind, tuned in (("tuned", True), ("rounded", False)):
        own = [one for one in rows if one["tuned"] is tuned]
        if len(own) > 1:
            found[kind] = {
                where: own[-1][where] - own[0][where] for where in ("device", "host") if own[0][where] is not None
            }
    return found


def text(found: Row) -> str:
    """A row in one line."""
    parts = [f"{found['name']}: {found['seconds']} s"]
    parts.append("blocks " + ", ".join(f"{one['seconds']} s" for one in found["blocks"] if one["tuned"]))
    if "device" in found:
        own = found["device"]
        parts.append(
            f"device {report.size_text(own['peak'])} of {report.size_text(own['limit'])}, "
            f"{own['blocks_of_weights']} blocks' weights"
        )
    if found["host"]["peak"]:
        parts.append(f"host {report.size_text(found['host']['peak']['unmapped'])} of {report.size_text(HOST_LIMIT)}")
    return "; ".join(parts)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    for name, default, meaning in (
        ("hidden", 8192, ""), ("inner", 28672, ""), ("heads", 64, ""), ("vocab", 128256, ""),
        ("blocks", 6, "in the checkpoint, 1.6 GiB each"), ("timed", 2, "of these that are tuned"),
        ("samples", 128, ""), ("tokens", 2048, ""), ("iters", 200, "of the first row"),
        ("more", 20, "iterations of the other rows"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=meaning or None)
    parser.add_argument("--rows", nargs="*", type=int, help=f"by number: {[case.name for case in CASES]}")
    parser.add_argument("--folder", type=Path, help="for the checkpoint and results, which are removed; 24 GB at once")
    parser.add_argument("--budget", type=float, default=200.0, help="seconds after which no row begins")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    arguments, began = parse(words), time.perf_counter()
    command = " ".join(["python -m bench.calibrate_large", *(sys.argv[1:] if words is None else words)])
    result: Row = {"torch": torch.__version__, "command": command, "gpu": None}
    device = torch.device(arguments.device)
    if device.type == "cuda":
        measure.require_gpu()
        result = measure.environment(command)
    names = ("hidden", "inner", "heads", "vocab", "blocks", "timed", "samples", "tokens")
    result |= {"scheme": "W4A16", "shape": {name: getattr(arguments, name) for name in names}}
    result |= {"rows": [], "left_out": []}
    chosen = [CASES[i] for i in arguments.rows] if arguments.rows is not None else list(CASES)
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tritonq-large-", dir=arguments.folder) as place:
        source, out = Path(place) / "source", Path(place) / "out"
        block = write_checkpoint(source, arguments, device)
        result["seconds_of_writing"] = round(time.perf_counter() - began, 1)
        print(f"checkpoint after {result['seconds_of_writing']} s", flush=True)
        for number, case in enumerate(chosen):
            if time.perf_counter() - began > arguments.budget:
                result["left_out"].append(case.name)
                continue
            iters = arguments.iters if number == 0 else min(arguments.more, arguments.iters)
            result["rows"].append(row(case, source, out, arguments, block, iters))
            print(text(result["rows"][-1]), flush=True)
            shutil.rmtree(out)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if arguments.out:
                report.write(result, arguments.out)
    on_device = [one["device"]["holds"] for one in result["rows"] if "device" in one]
    result["holds"] = {
        "host": all(one["host"]["holds"] for one in result["rows"]), "device": any(on_device) if on_device else None,
    }  # fmt: skip
    print(f"within limits: {result['holds']}")
    report.finish(result, began, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
