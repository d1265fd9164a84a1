"""Training steps with saved activations in host memory: `python -m bench.activations [--layers 16] [--out FILE]`.

A stack of transformer blocks in bf16, forward and backward: plain, with everything offloaded ("default", and "all" but
for the last four groups), with the share of it that copies hide behind the computation, and with torch's
`save_on_cpu(pin_memory=True)`. For each the peak of
memory beside parameters, gradients and inputs, the time of a step, and from a profiler's trace the bytes and rates of
copies, beside those of copies of pinned memory in the same run. Loss and all gradients are compared bit for bit first.

The floor of a step is max(forward, bytes to the host / rate) + max(backward, bytes back / rate).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tritonq as tq
from bench.streaming import copies
from tritonq.bench import measure as measured
from tritonq.bench import report


class Block(nn.Module):
    def __init__(self, width: int, head: int = 128) -> None:
        super().__init__()
        self.head = head
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, self.head)).transpose(1, 2) for t in self.qkv(self.first(x)).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


class Step:
    """Forward and backward of a model on one input."""

    def __init__(self, layers: int, width: int, tokens: int) -> None:
        torch.manual_seed(0)
        with torch.device("cuda"):
            self.model = nn.Sequential(*(Block(width) for _ in range(layers))).to(torch.bfloat16)
            self.x = torch.randn(max(1, tokens // 2048), min(tokens, 2048), width, dtype=torch.bfloat16)
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def forward(self, context: Any) -> Tensor:
        with context:
            y: Tensor = self.model(self.x)
        return y.float().square().mean()

    def __call__(self, context: Any) -> Tensor:
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            parameter.grad.zero_()
        loss = self.forward(context)
        loss.backward()
        return loss.detach()

    def bits(self, context: Any) -> list[Tensor]:
        """The loss and, of every gradient, a sum of its bits, each times its place."""
        torch.use_deterministic_algorithms(True)  # of attention, whose fast backward is not
        found = [self(context)]
        torch.use_deterministic_algorithms(False)
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            bits = parameter.grad.flatten().view(torch.int16)
            places = torch.arange(1, bits.numel() + 1, dtype=torch.int32, device=bits.device)
            found.append(places.mul_(bits).sum())
        return found


def peak(step: Step, context: Any) -> int:
    """Bytes beside what is there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(context)
    return torch.cuda.max_memory_allocated() - before


def milliseconds(call: Callable[[], Any], repeats: int) -> float:
    """Median of the host's clock, from an idle device to an idle one."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def traffic(call: Callable[[], Any]) -> dict[str, Any]:
    """Copies of one call by direction: how many, bytes, and GB/s while one of them runs."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiled.export_chrome_trace(file.name)
        events = [e for e in json.loads(Path(file.name).read_text())["traceEvents"] if e.get("cat") == "gpu_memcpy"]
    found: dict[str, Any] = {}
    for direction, name in (("to_host", "DtoH"), ("to_device", "HtoD")):
        mine = [e for e in events if name in e["name"] and e["args"]["bytes"] > 1 << 16]
        nbytes, micros = sum(e["args"]["bytes"] for e in mine), sum(e["dur"] for e in mine)
        span = max((e["ts"] + e["dur"] for e in mine), default=0) - min((e["ts"] for e in mine), default=0)
        found[direction] = {
            "copies": len(mine), "bytes": nbytes, "gb_s": round(nbytes / max(micros, 1e-9) / 1e3, 2) if mine else 0.0,
            "gb_s_first_to_last": round(nbytes / max(span, 1e-9) / 1e3, 2) if mine else 0.0,
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    began = time.perf_counter()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for where algorithms have to be deterministic
    torch.utils.deterministic.fill_uninitialized_memory = False
    pinned = torch.empty(1 << 17, 8192, dtype=torch.bfloat16, pin_memory=True)
    rates = copies(pinned, pinned)
    del pinned
    step = Step(args.layers, args.width, args.tokens)
    plain = contextlib.nullcontext()
    expected = step.bits(plain)
    forward = milliseconds(lambda: step.forward(plain), args.repeats)
    whole = milliseconds(lambda: step(plain), args.repeats)
    resident = torch.cuda.memory_allocated()
    hidden = 0.8 * 1e6 * min(forward * rates["to_host"], (whole - forward) * rates["to_device"])
    everything = tq.offload.activations(keep_last=4)
    loss = step.forward(everything)
    share = min(1.0, hidden / everything.nbytes)
    del loss
    some = tq.offload.activations(keep_last=4, share=share)
    contexts: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain,
        "default": tq.offload.activations,
        "all": lambda: everything,
        "hidden": lambda: some,
        "save_on_cpu": lambda: torch.autograd.graph.save_on_cpu(pin_memory=True),
    }
    result: dict[str, Any] = measured.environment(" ".join(["python -m bench.activations", *sys.argv[1:]]))
    result |= {
        "layers": args.layers, "width": args.width, "tokens": args.tokens, "copies_gb_s": rates,
        "resident_mib": round(resident / 2**20, 1), "forward_ms": round(forward, 2),
        "share": round(share, 4), "rows": [],
    }  # fmt: skip
    print(f"pinned copies: {rates['to_host']:.1f} GB/s to the host, {rates['to_device']:.1f} back; forward "
          f"{forward:.1f} ms of {whole:.1f}; {time.perf_counter() - began:.1f} s")  # fmt: skip
    for name, make in contexts.items():
        for found, want in zip(step.bits(make()), expected, strict=True):
            if not torch.equal(found, want):
                raise SystemExit(f"{name}: loss or gradients differ from a plain step")
        step(make())
        extra, taken = peak(step, make()), milliseconds(lambda make=make: step(make()), args.repeats)
        moved = traffic(lambda make=make: step(make()))
        floor = max(forward, moved["to_host"]["bytes"] / rates["to_host"] / 1e6)
        floor += max(whole - forward, moved["to_device"]["bytes"] / rates["to_device"] / 1e6)
        row = {
            "mode": name, "peak_mib": round(extra / 2**20, 1), "step_ms": round(taken, 2), "of_plain": taken / whole,
            "floor_ms": round(floor, 2), "of_floor": round(taken / floor, 4), **moved,
        }  # fmt: skip
        result["rows"].append(row)
        out, back = moved["to_host"], moved["to_device"]
        shares = [100 * way["gb_s"] / rates[key] for key, way in (("to_host", out), ("to_device", back))]
        print(
            f"{name:12} peak {extra / 2**20:8.1f} MiB, step {taken:7.1f} ms ({taken / whole:.2f} of plain, "
            f"{taken / floor:.2f} of its floor), to the host {out['bytes'] / 2**30:5.2f} GiB at {out['gb_s']:5.1f} "
            f"GB/s ({shares[0]:3.0f}%), back at {back['gb_s']:5.1f} ({shares[1]:3.0f}%)",
            flush=True,
        )
    report.finish(result, began, args.out)


if __name__ == "__main__":
    main()
