"""Blocks small enough for exact answers, and a `Task` over tensors at hand."""

from __future__ import annotations

import torch
from torch import nn

from tritonq.calibrate.task import Batch, Layer, Task
from tritonq.formats import get_format


def layer_of(module, name, fmt, input_format=None, key="weight", **more):
    """The Layer of a linear submodule, or of a parameter of experts."""
    found = module.get_submodule(name) if name else module
    full = name if key == "weight" else f"{name}.{key}"
    inputs = None if input_format is None else get_format(input_format)
    return Layer(full, found, key, get_format(fmt), inputs, **more)


def make_task(block, layers, samples, masks=None, micro_batch=4, search=False, fail=None, **more):
    """A Task whose samples are tensors [T, K], called as block(x [B, T, K]).

    Args:
        masks: bool [T] by sample, False for padding.
        fail: called with the numbers of the samples of every fetch; may raise.
    """
    told = []

    def fetch(numbers, device, targets):
        if fail is not None:
            fail(tuple(numbers))
        shapes = {}
        for i in numbers:
            shapes.setdefault(tuple(samples[i].shape), []).append(i)
        batches = []
        for members in shapes.values():
            x = torch.stack([samples[i] for i in members]).to(device)
            mask = None if masks is None else torch.stack([masks[i] for i in members]).to(device).unsqueeze(-1)
            with torch.no_grad():
                outputs = [block(x)] if targets else []
            batches.append(Batch(tuple(members), (x,), {}, outputs, [mask]))
        return batches

    def events(what, **details):
        told.append((what, details))

    device = next(block.parameters()).device
    task = Task(
        "block", block, layers, len(samples), fetch, device, events, micro_batch=micro_batch, search=search, **more
    )
    return task, told


class Mlp(nn.Module):
    """down(silu(gate(norm(x))) * up(norm(x)))"""

    def __init__(self, width=16, inner=24, norm=None, bias=False):
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm is None else norm
        self.gate = nn.Linear(width, inner, bias=bias)
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def experts_block(hidden=32, inner=16, experts=4, top_k=2, dtype=torch.float32):
    """A Mixtral block of experts as transformers has it, with its router; called as block(x [B, T, K])."""
    import transformers as hf
    from transformers.models.mixtral import modeling_mixtral as mixtral

    config = hf.MixtralConfig(
        hidden_size=hidden, intermediate_size=inner, num_local_experts=experts, num_experts_per_tok=top_k
    )
    config._experts_implementation = "grouped_mm"
    block = mixtral.MixtralSparseMoeBlock(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    return block


class Attention(nn.Module):
    """o(softmax(q k^T) v) after an RMS norm, with `repeats` query heads for each of keys and values."""

    def __init__(self, width=16, head=4, repeats=2):
        super().__init__()
        self.head, self.repeats = head, repeats
        self.norm = nn.RMSNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width // repeats, bias=False)
        self.v = nn.Linear(width, width // repeats)
        self.o = nn.Linear(width, width, bias=False)

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (-1, self.head)).transpose(-2, -3) for layer in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(self.repeats, -3) for t in (k, v))
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(z.transpose(-2, -3).flatten(-2))


class GemmaNorm(nn.Module):
    """x / rms(x) * (1 + weight)"""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) / 8)

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)
