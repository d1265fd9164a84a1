"""SignRound: tune how weights of a block are rounded, so that the block puts out what it did before.

    W^ = s * clamp(rne(W / s + v)),  s by the format's rule from the extremes of a group times max_scale and min_scale
    v, max_scale, min_scale:  p <- clamp(p - rate * sign(d loss / d p)),  rate = lr * (1 - iteration / iters)
    loss = mean of (block(x; W^) - target)^2 over a batch of samples

Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent" (arXiv 2309.05516). A weight is quantized once
an iteration; its codes are what is kept when the loss was the best so far, and the block computes with what they
dequantize to. Gradients of W^ are added up over micro-batches, after which one launch a weight works out the gradients
of v and of the ratios and moves them: those gradients never exist. What is full-size beside W are W^, its gradient and
v; the codes are there twice.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritonq import learned_ops, ops
from tritonq.autograd import qdq
from tritonq.calibrate import leaves
from tritonq.calibrate.grid import divisors
from tritonq.calibrate.task import Layer, Task
from tritonq.calibrate.trial import Trial, counted_tokens, deterministic
from tritonq.codecs import scale as scales
from tritonq.learned_reference import Learned, moved
from tritonq.reference import Parts
from tritonq.sign_step import SignStep

TOKENS = 4096  # of an iteration
SAMPLES = (2, 8)  # of an iteration, at least and at most
FEW_TOKENS = 0.005  # of all; experts that saw fewer are not tuned
STARTS = ("rule", "search")


@dataclass(eq=False)
class SignRound:
    """Signed gradient descent on the rounding of every layer of a block, experts included.

    Samples of an iteration are spread over `task.devices`, at most `task.micro_batch` of them a call. How they are cut
    decides the order of sums: devices change no bit as long as `micro_batch` is no more than their share of a batch.

    Attributes:
        iters: iterations. lr: rate of v in the first one, 1 / iters unless it is given, from where it falls linearly to
            0. min_scale_lr: the same for the ratios, lr unless it is given.
        batch: samples an iteration, drawn without repetition until fewer are left; None: as many as have 4096 tokens,
            2 to 8.
        momentum: how much of the gradients of the iterations so far the next one's are added to. Signs of few samples
            are noisy, which this averages; 0 is the published method. Fused experts go without.
        v_dtype: of the offsets, fp32 or bf16 (half the memory; steps below its resolution are lost).
        tune_ratios: False tunes offsets only.
        fused: False takes gradients of v and of the ratios from autograd and moves them after; for comparisons.
        patience: iterations without a better loss after which tuning ends; the host then waits for every loss.
        evaluation: how many samples, spread over all, decide between the results there are (None: all): the best
            iteration by the loss of its own batch, the last one, and rounding to nearest with `task.search`.
        start: "search": ratios begin where the rule gives the scales that `task.search` finds, at most 1; "rule": at 1.
        deterministic: kernels that give the same bits in every run, where torch has them.
        compile: run the block through torch.compile, which takes its time once for blocks of one kind.

    Raises:
        ValueError: a number out of range.
    """

    iters: int = 200
    lr: float | None = None
    min_scale_lr: float | None = None
    batch: int | None = None
    momentum: float = 0.5
    v_dtype: torch.dtype = torch.float32
    tune_ratios: bool = True
    fused: bool = True
    patience: int | None = None
    evaluation: int | None = 16
    start: str = "search"
    deterministic: bool = True
    compile: bool = False
    name: str = "signround"

    def __post_init__(self) -> None:
        if self.iters < 1:
            raise ValueError(f"iters is at least 1, got {self.iters}")
        for name in ("batch", "patience", "evaluation"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, or None, got {getattr(self, name)}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is at least 0 and below 1, got {self.momentum}")
        if self.v_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"v_dtype is torch.float32 or torch.bfloat16, got {self.v_dtype}")
        if self.start not in STARTS:
            raise ValueError(f"start is 'rule' or 'search', got {self.start!r}")
        self.rates(torch.device("cpu"))  # raises where they make no sense

    def rates(self, device: torch.device) -> SignStep:
        lr = 1.0 / self.iters if self.lr is None else self.lr
        return SignStep(lr, min_scale_lr=self.min_scale_lr, steps=self.iters, device=device)

    def run(self, task: Task) -> None:
        """Set `result` of every layer of the task.

        Raises:
            torch.OutOfMemoryError: one sample at a time does not fit either; says what is there.
        """
        if not task.layers or not task.samples:
            return
        try:
            batch = self.samples(task)
            share = -(-batch // max(1, len(task.devices)))
            with deterministic(self.deterministic), Trial(task, share, self.compile) as trial:
                _Tuning(self, task, trial, batch).run()
            return
        except torch.OutOfMemoryError as error:
            reason = str(error)
        raise torch.OutOfMemoryError(self._numbers(task, reason))  # outside, so that no frame of the attempt lives on

    def samples(self, task: Task) -> int:
        """Of an iteration: `batch`, or as many as have enough tokens, judging by what the block puts out for one."""
        if self.batch is not None:
            return min(self.batch, task.samples)
        target = task.fetch((0,), task.device, True)[0].targets[0]
        tokens = max(1, target.numel() // max(1, target.shape[-1]))
        return min(max(-(-TOKENS // tokens), SAMPLES[0]), SAMPLES[1], task.samples)

    def _numbers(self, task: Task, reason: str) -> str:
        """What did not fit, and what would help."""
        weights = [layer.weight for layer in task.layers]
        dense, elements = sum(w.nbytes for w in weights), sum(w.numel() for w in weights)
        free = ""
        if task.device.type == "cuda":
            left, total = torch.cuda.mem_get_info(task.device)
            free = f"; {_gib(left)} of {_gib(total)} are free"
        smaller = "" if self.v_dtype is torch.bfloat16 else ", or SignRound(v_dtype=torch.bfloat16)"
        return (
            f"{task.name} cannot be tuned on {task.device}, {task.micro_batch} samples at a time: its weights take "
            f"{_gib(dense)}, their rounded values and gradients as much each, and offsets "
            f"{_gib(elements * self.v_dtype.itemsize)}{free}. Shorter samples (seqlen) take less{smaller}. {reason}"
        )


class Offsets:
    """What is tuned of one layer, on the first device.

    Attributes:
        weight: dense, detached. leaf: what the block computes with.
        v, high, low: offsets, max_scale and min_scale. divisor: the tensor-wide one, None where there is none.
        codes: parts of what the leaf holds. best: parts of the best iteration.
        idle: experts that are not tuned.
    """

    def __init__(self, method: SignRound, task: Task, layer: Layer, leaf: Tensor, divisor: Tensor | None) -> None:
        self.layer, self.fmt, self.leaf, self.divisor = layer, layer.fmt, leaf, divisor
        self.weight = layer.weight.detach()
        shape = tuple(self.weight.shape)
        self.v = torch.zeros(shape, dtype=method.v_dtype, device=self.weight.device)
        self.high: Tensor | None = None
        self.low: Tensor | None = None
        learned_ops.check(self.weight, self.fmt, self.v, None, None, None, None, divisor)
        if method.tune_ratios:
            self.high = torch.ones(self.fmt.scale_shape(shape), dtype=torch.float32, device=self.weight.device)
            if method.start == "search" and self.searches(task):
                self.high = _ratios(self.nearest(task), self.nearest(None), self)
            self.low = self.high.clone()
        self.codes = ops.allocate(self.fmt, shape, self.weight.device)
        self.best: Parts = {}
        self.idle: list[int] = []

    @property
    def learned(self) -> Learned:
        return Learned(self.v, self.high, self.low, False, self.divisor)

    def searches(self, task: Task) -> bool:
        """Whether rounding to nearest comes with a search; formats with super-groups have none."""
        return not self.fmt.super_group and (bool(task.search) or self.layer.importance is not None)

    def nearest(self, task: Task | None) -> Parts:
        """Rounding to nearest as a task has it for layers without a result; without a task by the format's rule."""
        how: dict[str, Any] = {}
        if task is not None and self.searches(task):
            how = {"search": task.search or None, "importance": self.layer.importance}
        parts: Parts = ops.quantize(self.weight, self.fmt, tensor_scale=self.divisor, **how)
        return parts

    def hold(self, parts: Parts) -> None:
        """Have the block compute with these."""
        values = self.leaf.detach()
        ops.dequantize(parts, self.fmt, tuple(self.weight.shape), self.weight.dtype, out=values)

    def refresh(self) -> None:
        """The codes of the parameters as they are."""
        learned_ops.quantized(self.weight, self.fmt, self.learned, out=self.codes)
        self.hold(self.codes)

    def keep(self, better: Tensor) -> None:
        """Take over the codes as the best ones, where `better`, on the device, says so."""
        if not self.best:
            self.best = {name: part.clone() for name, part in self.codes.items()}
        on_device = next(iter(self.best.values())).device == self.weight.device
        if not on_device and not bool(better):
            return
        for name, part in self.codes.items():
            mine, other = ops._bits(self.best[name]), ops._bits(part)
            mine.copy_(torch.where(better, other, mine) if on_device else other)

    def step(self, step: SignStep, fused: bool, momentum: float) -> None:
        """Move the parameters along the signs of their gradients, which the leaf's gradient gives, and leave `momentum`
        of that for the next one to be added to."""
        dy = leaves.gradient(self.leaf)
        if dy is None:  # no expert of these had a token
            return
        if self.idle:
            dy[self.idle] = 0
        if fused:
            learned_ops.step(self.weight, dy, self.fmt, self.learned, step.rates, step.bounds, want_x=False)
        else:
            self._step(dy, step)
        if self.layer.is_expert:  # one that no token reached would go on in an old direction
            momentum = 0.0
        if momentum and dy.dtype is torch.float16:
            torch.nan_to_num_(dy, 0.0, 0.0, 0.0)  # what overflowed once would stay
        leaves.decay(self.leaf, momentum)

    def _step(self, dy: Tensor, step: SignStep) -> None:
        given = {"v": self.v, "max_scale": self.high, "min_scale": self.low}
        own = {name: p.detach().requires_grad_() for name, p in given.items() if p is not None}
        y = qdq(self.weight, self.fmt, tensor_scale=self.divisor, **own)  # type: ignore[arg-type]
        gradients = torch.autograd.grad(y, list(own.values()), dy)
        with torch.no_grad():
            for name, gradient in zip(own, gradients, strict=True):
                rate, bounds = (0, step.bounds[:2]) if name == "v" else (1, step.bounds[2:])
                p = given[name]
                assert p is not None
                p.copy_(moved(p, gradient, step.rates[rate], *bounds))


def _ratios(searched: Parts, nearest: Parts, of: Offsets) -> Tensor:
    """What extremes are multiplied by to have the searched scales come out of the rule, at most 1."""
    if of.fmt.super_group:
        return torch.ones(nearest["scale"].shape, dtype=torch.float32, device=of.weight.device)
    found, rule = (scales.load(parts["scale"], of.fmt, of.divisor) for parts in (searched, nearest))
    return (found / rule).abs_().nan_to_num_(1.0).clamp_(max=1.0)


class _Tuning:
    """One run of the method over one block."""

    def __init__(self, method: SignRound, task: Task, trial: Trial, batch: int) -> None:
        self.method, self.task, self.trial, self.batch = method, task, trial, batch
        self.spilled = False
        shared = divisors(task.layers)
        self.layers = [
            Offsets(method, task, layer, leaf, shared.get(layer))
            for layer, leaf in zip(task.layers, trial.leaves, strict=True)
        ]
        self.step = method.rates(task.device)
        self.best = torch.full((), torch.inf, dtype=torch.float64, device=task.device)
        self.best_iteration = torch.full((), -1, dtype=torch.int64, device=task.device)

    def run(self) -> None:
        method, task, began = self.method, self.task, time.perf_counter()
        self._count_tokens()
        before = self._judge(None)
        searched = self._judge(task) if any(one.searches(task) for one in self.layers) else before
        draws = self._draws()
        iterations = 0
        for i, samples in enumerate(draws):
            self._values()
            loss = self._gradients(samples, draws[i + 1] if i + 1 < len(draws) else None)
            self._keep(loss, i)
            for one in self.layers:
                one.step(self.step, method.fused, method.momentum)
            self.step.advance()
            iterations = i + 1
            if method.patience is not None and i - int(self.best_iteration) >= method.patience:
                break
        self.trial.forget()  # gradients that were left for a next iteration
        after, kept = self._choose(searched)
        task.events(
            "tuned", block=task.name, loss_before=before, loss_nearest=searched, loss_after=after, kept=kept,
            batch=self.batch, iterations=iterations, best_iteration=int(self.best_iteration),
            seconds=time.perf_counter() - began,
        )  # fmt: skip

    def _draws(self) -> list[list[int]]:
        """Samples of every iteration: permutations of all, in pieces of a batch; a rest is left out."""
        generator = torch.Generator().manual_seed(self.task.seed)
        batch, found = self.batch, list[list[int]]()
        while len(found) < self.method.iters:
            order = torch.randperm(self.task.samples, generator=generator).tolist()
            found += [order[i : i + batch] for i in range(0, len(order) - batch + 1, batch)]
        return found[: self.method.iters]

    # ------------------------------------------------------------------------------------------------- an iteration

    def _values(self) -> None:
        with torch.no_grad():
            for one in self.layers:
                one.refresh()
        self.trial.publish()

    def _gradients(self, samples: Sequence[int], following: Sequence[int] | None) -> Tensor:
        """The loss of these samples, fp64 []; the gradients are in the leaves."""
        total, count = self._attempt(samples, True, following)
        return total.double() / count.clamp(min=1.0)

    @torch.no_grad()
    def _keep(self, loss: Tensor, iteration: int) -> None:
        better = loss < self.best  # a loss that is NaN is not
        for one in self.layers:
            one.keep(better)
        self.best.copy_(torch.where(better, loss, self.best))
        self.best_iteration.copy_(torch.where(better, iteration, self.best_iteration))

    # --------------------------------------------------------------------------------------------------- the results

    def _judge(self, task: Task | None) -> float:
        """The loss of rounding to nearest."""
        with torch.no_grad():
            for one in self.layers:
                one.hold(one.nearest(task))
        return self._evaluate()

    def _evaluate(self) -> float:
        """The loss of what leaves hold, over samples spread over all."""
        self.trial.publish()
        wanted = min(self.method.evaluation or self.task.samples, self.task.samples)
        samples = [i * self.task.samples // wanted for i in range(wanted)]
        total, count = self._attempt(samples, False, None)
        return float(total) / max(1.0, float(count))

    def _choose(self, searched: float) -> tuple[float, str]:
        """Set results to the best of what there is: its loss, and what it is."""
        found = {"nearest": searched}
        self._values()
        found["last"] = self._evaluate()
        with torch.no_grad():
            for one in self.layers:
                one.hold(one.best)
        found["best"] = self._evaluate()
        kept = min(("last", "best", "nearest"), key=lambda name: _orderable(found[name]))
        for one in self.layers:
            parts = {"last": lambda one=one: one.codes, "best": lambda one=one: one.best,
                     "nearest": lambda one=one: one.nearest(self.task)}[kept]()  # fmt: skip
            one.layer.result = {name: part.to(one.weight.device) for name, part in parts.items()}
        return found[kept], kept

    # ------------------------------------------------------------------------------------------------------- experts

    def _count_tokens(self) -> None:
        """Experts that few tokens are routed to stay rounded to nearest, and are noted."""
        experts = [one for one in self.layers if one.layer.is_expert]
        if not experts:
            return
        for one in self.layers:
            with torch.no_grad():
                one.leaf.detach().copy_(one.weight)
        self.trial.publish()
        modules = {id(one.layer.module): one.layer.weight.shape[0] for one in experts}
        with counted_tokens(self.trial, modules) as found:
            self._attempt(range(self.task.samples), False, None, found.clear)
        for one in experts:
            tokens, rows = found.of(id(one.layer.module))
            one.layer.notes["tokens"] = tokens
            one.idle = [e for e, count in enumerate(tokens) if count < FEW_TOKENS * rows]
            one.layer.notes["fallback"] = one.idle

    # -------------------------------------------------------------------------------------------------- out of memory

    def _attempt(
        self, samples: Sequence[int], gradients: bool, following: Sequence[int] | None,
        again: Callable[[], object] = lambda: None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`Trial.run`, again with fewer samples a call where memory ran out; sums then start anew."""
        while True:
            try:
                return self.trial.run(samples, gradients, following)
            except torch.OutOfMemoryError as error:
                reason = str(error)
            # Only here do the frames of the failed attempt, and what they held, cease to be.
            self._shrink(reason)
            again()

    def _shrink(self, reason: str) -> None:
        """Make room, and say how; raises where there is nothing left to do."""
        task = self.task
        self.trial.forget()
        gc.collect()  # frames of the failed attempt may be part of a cycle
        if task.device.type == "cuda":
            torch.cuda.empty_cache()
        details = {"block": task.name, "where": self.method.name}
        if self.trial.size > 1:
            task.micro_batch = self.trial.size // 2
            task.events("out of memory", **details, micro_batch=task.micro_batch)
        elif not self.spilled:
            self.spilled = True
            self.trial.look_ahead(False)
            for one in self.layers:
                one.best = {name: part.cpu() for name, part in one.best.items()}
            task.events(
                "out of memory", **details, micro_batch=1, reaction="codes of the best iteration moved to the host"
            )
        else:
            raise torch.OutOfMemoryError(reason)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.3g} GiB"


def _orderable(loss: float) -> float:
    return loss if loss == loss else float("inf")
