"""QDQ with tuning parameters on a GPU beside its definition in torch: `python -m bench.tuning_step [--out FILE]`.

Rows: forward; forward and backward with v, min_scale and max_scale; and a whole step of sign descent (forward,
backward, update, clamps), fused into backward. The peers are the same in plain torch operations with `detach` for
straight-through rounding, eager and through torch.compile, whose step has its update compiled, too; and where the
package auto-round is installed its own functions, in both ways. Bytes that have to move over the bandwidth of `copy_`
in the same run are the floor. Values and gradients are checked before they are
timed: against the CPU path bit for bit on some rows, and against the peer, whose divisions and sums differ in the last
bits, almost everywhere.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tritonq as tq
from tritonq import learned_ops, learned_plans, ops
from tritonq.bench import measure, report, timing
from tritonq.formats import Format, get_format
from tritonq.learned_reference import Learned, Wanted

FORMATS = ("int4_g128", "mxfp4", "nvfp4", "int4_g128_asym", "mxfp8", "fp8_e4m3_channel")
SHAPE, LARGE = (4096, 14336), (16384, 16384)
LR, RATIO_LR = 1 / 200, 1 / 200
PEERS = ("eager", "compiled", "auto_round", "auto_round_compiled")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Row = dict[str, Any]


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    return value + (rounded - value).detach()


def _power_of_two(biased: Tensor) -> Tensor:
    return (biased << 23).view(torch.float32)


def _rounded(u: Tensor, fmt: Format) -> Tensor:
    """Floats: u within range, on the element's grid."""
    element = fmt.element
    if element.dtype is torch.float8_e4m3fn:
        return u.to(element.dtype).to(torch.float32)
    exponent = ((u.view(torch.int32) >> 23) & 0xFF).clamp(min=128 - element.bias)
    steps = (u * _power_of_two(254 + element.mbits - exponent)).round()
    return steps * _power_of_two(exponent - element.mbits)


def definition(fmt: Format) -> Callable[..., Tensor]:
    """y of (x, v, min_scale, max_scale, tensor_scale), differentiable, by the fields of the format."""
    element, rule, levels = fmt.element, fmt.scale.rule, 1 << fmt.element.bits
    integer = element.codec.offset_binary

    def qdq(x: Tensor, v: Tensor, min_scale: Tensor, max_scale: Tensor, divisor: Tensor | None) -> Tensor:
        size = x.shape[-1] if fmt.group[1] == -1 else fmt.group[1]
        groups = x.reshape(-1, size).to(torch.float32)
        hi = groups.amax(-1, keepdim=True).clamp(min=0.0) * max_scale.reshape(-1, 1)
        lo = groups.amin(-1, keepdim=True).clamp(max=0.0) * min_scale.reshape(-1, 1)
        zero = torch.zeros_like(hi)
        if rule == "minmax":
            raw = (hi - lo) / (levels - 1)
        elif rule == "full_range":
            raw = torch.where(hi >= -lo, -hi, -lo) / (levels // 2)
        elif rule == "floor":
            raw = torch.maximum(hi, -lo) * 2.0**-element.emax
        else:
            amax = torch.maximum(hi, -lo)
            raw = (amax if divisor is None else amax * divisor) / element.max
        if rule == "floor":
            bits = raw.detach().view(torch.int32) & 0x7F800000
            scale = straight_through(raw, bits.view(torch.float32))
        elif fmt.scale.name == "f32":
            scale = raw
        else:
            scale = straight_through(raw, raw.clamp(max=fmt.scale.max).to(fmt.scale.dtype).to(torch.float32))
        if divisor is not None:
            scale = scale / divisor
        if fmt.zero_point:
            zero = -lo / scale
            zero = straight_through(zero, zero.round()).clamp(0, levels - 1)
        u = groups / scale + v.reshape(-1, size)
        if fmt.zero_point:
            u = torch.maximum(torch.minimum(u, levels - 1 - zero), -zero)
            code = straight_through(u, u.round())
        elif integer:
            u = u.clamp(-(levels // 2), levels // 2 - 1)
            code = straight_through(u, u.round())
        else:
            u = u.clamp(-element.max, element.max)
            code = straight_through(u, _rounded(u.detach(), fmt))
        return (code * scale).to(x.dtype).reshape(x.shape)

    return qdq


def auto_round(fmt: Format) -> Callable[..., Tensor] | None:
    """The same by the functions of the package auto-round; None where it has none, or is not installed. Those of MX and
    NVFP4 leave min_scale out."""
    try:
        from auto_round.data_type.utils import get_quant_func
    except ImportError:
        return None
    if fmt.scale.is_exponent and fmt.bits == 4:
        data_type = "mx_fp"
    elif fmt.tensor_scale and fmt.bits == 4:
        data_type = "nv_fp"
    elif fmt.element.codec.offset_binary and fmt.scale.rule in ("full_range", "minmax"):
        data_type = "int"
    else:
        return None
    function, _ = get_quant_func(data_type, fmt.bits, not fmt.zero_point, group_size=fmt.group[1])
    shared = {"bits": fmt.bits, "group_size": fmt.group[1], "scale_dtype": fmt.scale.dtype}

    def qdq(x: Tensor, v: Tensor, min_scale: Tensor, max_scale: Tensor, divisor: Tensor | None) -> Tensor:
        ratios = {"min_scale": min_scale.reshape(-1), "max_scale": max_scale.reshape(-1)}
        if divisor is not None:
            ratios["global_scale"] = divisor
        y: Tensor = function(x, v=v.reshape(-1, fmt.group[1]), **ratios, **shared)[0]
        return y.reshape(x.shape)

    return qdq


def update(v: Tensor, low: Tensor, high: Tensor, gradients: tuple[Tensor, Tensor, Tensor]) -> None:
    """The step that follows backward."""
    of_v, *of_ratios = gradients
    v.copy_((v - LR * of_v.sign()).clamp(-0.5, 0.5))
    for p, g in zip((low, high), of_ratios, strict=True):
        p.copy_((p - RATIO_LR * g.sign()).clamp(0.0, 1.0))


class Case:
    """Tensors of one row."""

    def __init__(self, fmt: Format, shape: tuple[int, int], of_v: torch.dtype) -> None:
        self.fmt = fmt
        self.x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        self.dy = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        self.v = (torch.rand(shape, device="cuda") - 0.5).to(of_v)
        groups = fmt.scale_shape(shape)
        self.low, self.high = (1 - 0.2 * torch.rand(groups, device="cuda") for _ in range(2))
        self.divisor = ops.tensor_scale(self.x, fmt) if fmt.tensor_scale else None
        self.given = Learned(self.v, self.high, self.low, False, self.divisor)
        self.step = tq.SignStep(LR, min_scale_lr=RATIO_LR, device="cuda")
        self.leaves = [t.detach().requires_grad_() for t in (self.v, self.low, self.high)]

    def forward(self) -> Tensor:
        return learned_ops.qdq(self.x, self.fmt, self.given)

    def ours(self) -> Tensor:
        v, low, high = self.leaves
        return tq.qdq(self.x, self.fmt, v=v, min_scale=low, max_scale=high, tensor_scale=self.divisor)

    def both(self, forward: Callable[[], Tensor] | None = None) -> tuple[Tensor, ...]:
        """y and the gradients of v, min_scale and max_scale."""
        y = (forward or self.ours)()
        return y, *torch.autograd.grad(y, self.leaves, self.dy, materialize_grads=True)

    def stepped(self) -> Tensor:
        y = tq.qdq(self.x, self.fmt, v=self.v, min_scale=self.low, max_scale=self.high, tensor_scale=self.divisor,
                   step=self.step)  # fmt: skip
        y.backward(self.dy)
        return y

    def peer_step(self, forward: Callable[[], Tensor], moved: Callable[..., None]) -> Tensor:
        y, *gradients = self.both(forward)
        with torch.no_grad():
            moved(*(t.detach() for t in self.leaves), gradients)
        return y

    def bytes(self, what: str) -> float:
        """That have to move: x, v, y; and x, v, dy, dv or the new v."""
        n, of_v = self.x.numel(), self.v.element_size()
        return n * (4 + of_v if what == "forward" else 8 + 3 * of_v)


def verify(case: Case, peer: Callable[[], Tensor]) -> Row:
    """Raises where values are wrong; the shares of numbers that are those of the peer."""
    rows = 64
    found = case.both()
    given = Learned(case.v[:rows].cpu(), case.high[:rows].cpu(), case.low[:rows].cpu(), False,
                   None if case.divisor is None else case.divisor.cpu())  # fmt: skip
    x, dy = case.x[:rows].cpu(), case.dy[:rows].cpu()
    y = learned_ops.qdq(x, case.fmt, given)
    expected = learned_ops.backward(x, dy, case.fmt, given, Wanted(False, True, True, True))
    if not (torch.equal(found[0][:rows].cpu(), y) and torch.equal(found[1][:rows].cpu(), expected["dv"])):
        raise RuntimeError(f"{case.fmt.name}: y or dv differ from the CPU path")
    for got, name in ((found[2], "d_low"), (found[3], "d_high")):
        torch.testing.assert_close(got[:rows].cpu(), expected[name], rtol=1e-4, atol=1e-2)
    theirs = case.both(peer)
    shares = [float((a == b).float().mean()) for a, b in zip(found[:2], theirs[:2], strict=True)]
    largest = [float(((a - b).abs() / (b.abs().mean() + 1e-12)).quantile(0.99)) for a, b in
               zip((f.flatten()[: 1 << 20] for f in found[2:]), (t.flatten()[: 1 << 20] for t in theirs[2:]),
                   strict=True)]  # fmt: skip
    if min(shares) < 0.99:
        raise RuntimeError(f"{case.fmt.name}: only {shares} of y and dv are those of the peer")
    return {"rows_verified": rows, "equal_to_peer": [round(s, 6) for s in shares],
            "ratio_gradients_off_p99": [round(o, 6) for o in largest]}  # fmt: skip


def us(call: Callable[[], Any]) -> float:
    return round(timing.device_us(call, [()]), 1)


def one(fmt: Format, of_v: str, gb_per_s: float, peers: tuple[str, ...], say: Callable[[str], None]) -> Row:
    case = Case(fmt, SHAPE, TYPES[of_v])
    qdq = definition(fmt)

    def peer(function: Callable[..., Tensor] = qdq) -> Tensor:
        return function(case.x, *case.leaves, case.divisor)

    row: Row = {"format": fmt.name, "v": of_v, **verify(case, peer)}
    calls = {"forward": case.forward, "both": case.both, "step": case.stepped}
    for what, call in calls.items():
        row[f"{what}_us"] = us(call)
        row[f"{what}_of_floor"] = round(case.bytes(what) / gb_per_s / 1e3 / row[f"{what}_us"], 3)
    say(str(row))
    torch._dynamo.reset()
    moved_at_once = torch.compile(update, dynamic=False)
    kinds: dict[str, tuple[Callable[..., Tensor], Any]] = {
        "eager": (qdq, update), "compiled": (torch.compile(qdq, dynamic=False), moved_at_once)
    }  # fmt: skip
    theirs = auto_round(fmt)
    if theirs is not None:
        kinds["auto_round"] = theirs, update
        kinds["auto_round_compiled"] = torch.compile(theirs, dynamic=False), moved_at_once
        one_ratio = Learned(case.v, case.high, case.high, False, case.divisor)
        y = theirs(case.x, case.v, case.high, case.high, case.divisor)
        row["auto_round_equal"] = round(float((y == learned_ops.qdq(case.x, fmt, one_ratio)).float().mean()), 6)
    for kind, (function, moved) in kinds.items():
        if kind in peers:
            begun, forward = time.monotonic(), functools.partial(peer, function)
            try:
                case.peer_step(forward, moved)
            except RuntimeError as error:  # a package whose gradients do not exist
                row[f"{kind}_failed"] = str(error).split("\n")[0]
                continue
            row[f"{kind}_seconds_to_first"] = round(time.monotonic() - begun, 1)
            row[f"{kind}_both_us"] = us(lambda forward=forward: case.both(forward))
            row[f"{kind}_step_us"] = us(lambda forward=forward, moved=moved: case.peer_step(forward, moved))
            for what in ("both", "step"):
                row[f"{what}_times_{kind}"] = round(row[f"{kind}_{what}_us"] / row[f"{what}_us"], 2)
    return row


def sweep(fmt: Format, of_v: str, gb_per_s: float) -> Row:
    """Shares of the floor by (elements of a tile, of a thread), for every kind of launch."""
    case, row = Case(fmt, SHAPE, TYPES[of_v]), {"format": fmt.name, "v": of_v}
    n, of_v_bytes, kept = case.x.numel(), case.v.element_size(), dict(learned_plans.CHOICES)
    wanted = Wanted(False, True, True, True)
    calls: dict[str, Callable[[], Any]] = {
        "qdq": case.forward,
        "backward": lambda: learned_ops.backward(case.x, case.dy, fmt, case.given, wanted),
        "step": lambda: learned_ops.step(case.x, case.dy, fmt, case.given, case.step.rates, case.step.bounds, False),
    }
    try:
        for mode, call in calls.items():
            floor = n * (4 + of_v_bytes * (1 if mode == "qdq" else 2)) / gb_per_s / 1e3
            found = {}
            for choice in itertools.product((1024, 2048, 4096, 8192), (8, 16, 32)):
                if choice[0] // choice[1] >= 32:
                    learned_plans.CHOICES[mode] = choice
                    learned_plans.forget()
                    found[choice] = round(floor / timing.device_us(call, [()]), 3)
            best = sorted(found, key=lambda choice: -found[choice])
            row[mode] = {f"{tile}/{each}": found[tile, each] for tile, each in best[:4]}
            row[f"{mode}_now"] = found[kept[mode]]
    finally:
        learned_plans.CHOICES.update(kept)
        learned_plans.forget()
    return row


def memory(fmt: Format, of_v: str) -> Row:
    """Peak bytes beyond what was there before, of a weight of 512 MiB, less y and the gradients that are returned."""
    case = Case(fmt, LARGE, TYPES[of_v])
    case.step = tq.SignStep(LR, device="cuda")
    outputs = {"forward": 0, "both": sum(t.nbytes for t in case.leaves), "step": 0}
    row: Row = {"format": fmt.name, "v": of_v, "weight_mib": case.x.nbytes >> 20}
    for what, call in (("forward", case.forward), ("both", case.both), ("step", case.stepped)):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        held = call()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before - case.x.nbytes - outputs[what]
        row[f"{what}_extra_mib"] = round(extra / (1 << 20), 3)
        del held
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS[:4]), help=f"among others: {', '.join(FORMATS)}")
    parser.add_argument("--v", nargs="+", default=["fp32", "bf16"], choices=list(TYPES))
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--budget", type=float, default=90.0, help="seconds after which no more peers are compiled")
    parser.add_argument("--sweep", action="store_true", help="sizes of tiles instead")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    measure.require_gpu()
    begun = time.monotonic()
    torch.manual_seed(0)
    timing.warm_up()
    x = torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16)
    copy_us = timing.device_us(lambda: torch.empty_like(x).copy_(x), [()])
    gb_per_s = 2 * x.nbytes / copy_us / 1e3
    result: Row = {
        **measure.environment(" ".join(["python -m bench.tuning_step", *sys.argv[1:]])),
        "shape": list(SHAPE),
    }
    result |= {"copy_us": round(copy_us, 1), "copy_gb_per_s": round(gb_per_s, 1)}
    result |= {"rows": [], "memory": [], "failed": []}
    print(f"copy {copy_us:.1f} us, {gb_per_s:.0f} GB/s", flush=True)

    def attempt(into: str, call: Callable[[], Row], what: str) -> None:
        try:
            result[into].append(call())
            print(result[into][-1], f"after {time.monotonic() - begun:.0f} s", flush=True)
        except Exception as error:
            result["failed"].append(f"{what}: {type(error).__name__}: {error}".split("\n")[0])
            print("FAILED", result["failed"][-1], flush=True)
        torch.cuda.empty_cache()
        if arguments.out:  # after every row, so that a run that is cut short leaves what it has
            report.write(result, arguments.out)

    if arguments.sweep:
        result["sweep"] = []
        for name, of_v in itertools.product(arguments.formats, arguments.v):
            attempt("sweep", functools.partial(sweep, get_format(name), of_v, gb_per_s), f"{name} {of_v}")
        return 1 if result["failed"] else 0
    for of_v in arguments.v:
        for name in arguments.formats:
            late = time.monotonic() - begun > arguments.budget
            peers = tuple(kind for kind in arguments.peers if not late or kind == "eager")
            say = functools.partial(print, flush=True)
            attempt("rows", functools.partial(one, get_format(name), of_v, gb_per_s, peers, say), f"{name} {of_v}")
    for name in arguments.formats:
        attempt("memory", functools.partial(memory, get_format(name), arguments.v[0]), f"{name} memory")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
