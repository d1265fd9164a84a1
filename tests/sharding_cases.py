"""What two ranks do, for `test_sharding.py`: `python -m sharding_cases RANK RANKS DEVICE FOLDER` runs every case and
writes {case: [error or None, seconds]}.

One start of two processes for all cases, since importing torch takes longer than they do.
"""

import copy
import faulthandler
import functools
import gc
import json
import sys
import time
import traceback
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import tritonq as tq
from tritonq.tensor import QTensor

CASES = {}
# One of each kind: groups, rows, a tensor, two levels, zero points, odd bits, super-groups.
FORMATS = ("int4_g128", "int8_channel", "mxfp4", "nvfp4", "fp8_e4m3_tensor", "int3_g8", "q4_k", "int8_tensor_asym")
if sys.argv[3:4] == ["cuda"]:
    FORMATS += ("fp8_e4m3_channel", "mxfp8", "int4_g32_asym", "e3m4_g48", "q2_k", "nf4_g64")


def case(function):
    CASES[function.__name__] = function
    return function


class Sent(TorchDispatchMode):
    """Bytes that this rank hands to collectives, by operator: of what is read, not of what is written."""

    INPUTS = {"_allgather_base_": 1, "scatter_": 1, "_reduce_scatter_base_": 1}  # argument; 0 elsewhere

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        namespace, name = func._schema.name.split("::")
        if namespace in ("c10d", "_c10d_functional"):
            leaves = pytree.tree_leaves((args, kwargs))
            if any(isinstance(t, QTensor) for t in leaves):  # and see what that communicates
                with self:
                    return QTensor.__torch_dispatch__(func, types, args, kwargs)
            given = pytree.tree_leaves(args[self.INPUTS.get(name, 0)])
            self.bytes[name] += sum(t.numel() * t.element_size() for t in given if isinstance(t, torch.Tensor))
        return func(*args, **kwargs)


def dense(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def same(q, wanted):
    assert isinstance(q, QTensor) and q.format == wanted.format, (type(q), wanted.format.name)
    assert tuple(q.shape) == tuple(wanted.shape), (q.format.name, q.shape, wanted.shape)
    for (name, part), other in zip(q.parts().items(), wanted.parts().values(), strict=True):
        assert torch.equal(part.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)), name
    return True


def part_bytes(fmt, shape):
    """Bytes of the parts that have rows: what a shard of that shape has to move, from the sizes a Format declares."""
    return sum(
        torch.Size(size).numel() * dtype.itemsize
        for name, (size, dtype) in tq.get_format(fmt).storage(shape).items()
        if name == "qdata" or not (name == "tensor_scale" or tq.get_format(fmt).group[0] == -1)
    )


class Adapted(nn.Module):
    """A frozen quantized weight with trainable matrices of low rank beside it."""

    def __init__(self, name, rows, columns=512, seed=0):
        super().__init__()
        self.base = nn.Linear(columns, rows, device=DEVICE)
        self.base.weight = nn.Parameter(tq.quantize(dense((rows, columns), seed), name), requires_grad=False)
        self.base.bias = nn.Parameter(dense((rows,), seed + 1), requires_grad=False)
        self.down = nn.Parameter(dense((4, columns), seed + 2))
        self.up = nn.Parameter(dense((rows, 4), seed + 3))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


def model(name, rows=(101, 512, 1)):
    columns, layers = 512, []
    for i, n in enumerate(rows):
        layers.append(Adapted(name, n, columns, seed=10 * i))
        columns = n
    return nn.Sequential(*layers)


def sharded(whole, **options):
    for layer in whole:
        fully_shard(layer, mesh=MESH, **options)
    return fully_shard(whole, mesh=MESH, **options)


def steps(net, x, optimize=True):
    """(outputs and gradients of two steps), which is also where what was gathered first has to be gathered again."""
    found = []
    for _ in range(2):
        y = net(x)
        y.square().mean().backward()
        for name, p in net.named_parameters():
            if p.grad is not None:
                grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                found.append((name, grad.clone()))
                p.grad = None
        found.append(("y", y.detach().clone()))
    return found


def gathered_bytes(layer):
    """What a layer holds of its quantized weight beside the shard."""
    (group,) = groups if (groups := getattr(layer._get_fsdp_state(), "_fsdp_param_groups", None)) else (
        layer._get_fsdp_state()._fsdp_param_group,)  # fmt: skip
    (p,) = (p for p in group.fsdp_params if isinstance(p._sharded_local_tensor, QTensor))
    return sum(t.untyped_storage().nbytes() for t in (*p.all_gather_outputs, *p._unsharded_inner_tensors))


def fsdp(name, reshard):
    rows = (101, 512, 1)
    one, two = model(name, rows), sharded(model(name, rows), reshard_after_forward=reshard)
    x = dense((3, 512), seed=99)
    held = []
    hooks = [layer.register_forward_pre_hook(lambda m, _: held.append(gathered_bytes(m))) for layer in two]
    for layer, n in zip(two, rows, strict=True):
        local = layer.base.weight._local_tensor
        start, stop = min(n, RANK * -(-n // RANKS)), min(n, (RANK + 1) * -(-n // RANKS))
        assert isinstance(local, QTensor) and local.shape[0] == stop - start
        assert not layer.base.weight.requires_grad and layer.up.requires_grad
        inputs, _ = local.fsdp_pre_all_gather(MESH)
        for given, again in zip(inputs, local.clone().fsdp_pre_all_gather(MESH)[0], strict=True):
            kept = given.numel() * local.shape[0] // -(-n // RANKS)  # the copy, which has no padding, gets some
            assert given.shape == again.shape and torch.equal(given[:kept], again[:kept])
        whole = layer.base.weight.full_tensor()
        assert same(whole, tq.quantize(dense(whole.shape, 10 * list(two).index(layer)), name))
    with Sent() as sent:
        found = steps(two, x)
    for hook in hooks:
        hook.remove()
    stored = [part_bytes(name, (RANKS * -(-n // RANKS), k)) for n, k in zip(rows, (512, *rows), strict=False)]
    assert held[:3] and all(s <= h < s + 1024 for h, s in zip(held[:3], stored, strict=True)), (held, stored)
    wanted = steps(one, x)
    assert [n for n, _ in found] == [n for n, _ in wanted]
    again = steps(two, x)  # where no dispatch mode looks on, launches go to the driver at once
    for (n, a), (_, b), (_, c) in zip(found, wanted, again, strict=True):
        assert torch.equal(a, b) and torch.equal(c, b), (n, (a - b).abs().max(), (c - b).abs().max(), b.abs().max())
    # A gather: the padded shard as it is stored, and dense vectors and low-rank matrices.
    columns, once, values = 512, 0, 0
    for n in rows:
        most, low = -(-n // RANKS), -(-4 // RANKS)
        once += part_bytes(name, (most, columns)) + 4 * (most + low * columns + 4 * most)
        values += 4 * most * columns
        columns = n
    if RANKS == 1:
        return
    gathers = 2 * (2 if reshard else 1)
    assert sent.bytes["_allgather_base_"] == gathers * once < gathers * values, (sent.bytes, gathers, once, values)
    assert set(sent.bytes) <= {
        "_allgather_base_", "_reduce_scatter_base_", "all_gather_into_tensor", "wait_tensor", "_wrap_tensor_autograd"
    }, sent.bytes  # fmt: skip
    assert [gathered_bytes(layer) for layer in two] == [0, 0, 0]  # after backward


for _name in FORMATS:
    for _reshard in (True, False) if _name in ("int4_g128", "nvfp4") else (True,):
        CASES[f"fsdp[{_name}-{_reshard}]"] = lambda name=_name, reshard=_reshard: fsdp(name, reshard)
ALONE = (
    *CASES,
    "fsdp_experts",
    "fsdp_casts",
    "fsdp_offload",
    "fsdp_training",
)  # what a single rank can show; torch 2.11 takes none of one rank through inference mode, dense weights neither


@case
def fsdp_blocks():
    """Whole blocks of rows stay; a cut through one is refused, by all ranks and before anything is sent."""
    name = "fp8_e4m3_b128x128"
    weight, x = tq.quantize(dense((512, 256)), name), dense((3, 256), 1)
    layer = nn.Linear(256, 512, bias=False, device=DEVICE)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    fully_shard(layer, mesh=MESH)
    assert torch.equal(layer(x), F.linear(x, weight))
    ragged = nn.Linear(256, 255, bias=False, device=DEVICE)  # 128 and 127
    ragged.weight = nn.Parameter(tq.quantize(dense((255, 256)), name), requires_grad=False)
    wanted = F.linear(x, ragged.weight)
    fully_shard(ragged, mesh=MESH)
    assert torch.equal(ragged(x), wanted) and torch.equal(ragged(x), wanted)
    bad = nn.Linear(256, 384, bias=False, device=DEVICE)
    bad.weight = nn.Parameter(tq.quantize(dense((384, 256)), name), requires_grad=False)
    refused(lambda: fully_shard(bad, mesh=MESH), "[192, 192]", "(384, 256)", "128")


@case
def fsdp_columns():
    """fully_shard joins shards along other axes itself, value by value."""
    layer = nn.Linear(512, 64, bias=False, device=DEVICE)
    layer.weight = nn.Parameter(tq.quantize(dense((64, 512)), "int4_g128"), requires_grad=False)
    refused(lambda: fully_shard(layer, mesh=MESH, shard_placement_fn=lambda p: Shard(1)), "Shard(0)", "axis 1")


@case
def fsdp_experts():
    for name in ("int4_g128", "nvfp4", "fp8_e4m3_b128x128", "fp8_e4m3_tensor"):
        experts = nn.Module()
        experts.gate_up = nn.Parameter(tq.quantize(dense((3, 256, 128)), name), requires_grad=False)
        experts.forward = lambda x, e=experts: torch.stack([F.linear(x, w) for w in e.gate_up])
        x = dense((5, 128), 1)
        wanted = experts.forward(x)
        experts.__class__ = type("Experts", (nn.Module,), {"forward": lambda self, x: torch.stack(
            [F.linear(x, w) for w in self.gate_up])})  # fmt: skip
        del experts.forward
        fully_shard(experts, mesh=MESH)
        assert isinstance(experts.gate_up._local_tensor, QTensor) and experts.gate_up._local_tensor.shape[0] == (
            2 - RANK if RANKS > 1 else 3
        )
        assert torch.equal(experts(x), wanted) and torch.equal(experts(x), wanted)


@case
def fsdp_casts():
    """Mixed precision makes the weight dequantize to the dtype of the inputs; the bytes are those of the weight."""
    for name in ("mxfp8", "nvfp4"):
        one, two = model(name, (101,)).bfloat16(), model(name, (101,))
        sharded(two, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=True))
        x = dense((3, 512), 9)
        assert torch.equal(two(x), one(x.bfloat16()))


@case
def fsdp_offload():
    for name in ("int4_g128", "nvfp4", "fp8_e4m3_tensor"):
        one, two = model(name, (101, 64)), model(name, (101, 64)).double().float().cpu()
        two = sharded(two, offload_policy=CPUOffloadPolicy(pin_memory=DEVICE.type == "cuda"))
        x = dense((3, 512), 9)
        assert all(p.device.type == "cpu" for p in two.parameters())
        assert not any(layer.base.weight.requires_grad for layer in two)
        seen = []
        hook = functools.partial(lambda seen, m, _: seen.append((m.weight.requires_grad, str(m.weight.device))), seen)
        two[0].base.register_forward_pre_hook(hook)
        for _ in range(2):
            assert torch.equal(two(x), one(x)), seen
        assert seen == 2 * [(False, str(DEVICE))], seen


def full(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


@case
def fsdp_training():
    """Accumulated gradients, an optimizer's step, layers gathered by hand, and modes without gradients between.

    Bit for bit, stage by stage. The first step of Adam is about lr * sign(gradient): it would hide a lost half of the
    gradients, yet an ulp of theirs would change parameters. SGD by a power of two rounds once, whatever the kernel."""
    one, two = model("int4_g128", (101, 64)), sharded(model("int4_g128", (101, 64)))
    inputs, gradients, trained = [dense((3, 512), 9), dense((3, 512), 10)], [], []
    for net in (two, one):
        with torch.no_grad():
            net(inputs[0])
        for last, x in zip((False, True), inputs, strict=True):
            if net is two:
                net.set_requires_gradient_sync(last)
            net(x).square().mean().backward()
            summed = [p.grad is not None for p in net.parameters() if p.requires_grad]
            assert summed == [net is one or last] * 4, summed
        named = {n: p for n, p in net.named_parameters() if p.requires_grad}
        gradients.append({n: full(p.grad).clone() for n, p in named.items()})
        optimizer = torch.optim.SGD(named.values(), lr=2.0**-16)
        optimizer.step()
        optimizer.zero_grad()
        trained.append({n: full(p.detach()).clone() for n, p in named.items()})
    for stage, (found, wanted) in (("gradient", gradients), ("parameter", trained)):
        assert list(found) == list(wanted)
        for n, wants in wanted.items():
            assert torch.equal(found[n], wants), (stage, n, (found[n] - wants).abs().max(), wants.abs().max())
    y, wants = two(inputs[0]), one(inputs[0])
    assert torch.equal(y, wants), ((y - wants).abs().max(), wants.abs().max())
    two[0].unshard(async_op=True).wait()
    assert same(two[0].base.weight, one[0].base.weight) and two[0].up.shape == (101, 4)
    two[0].reshard()
    assert isinstance(two[0].base.weight, DTensor)


@case
def fsdp_checkpointed():
    """Layers whose forward runs again in backward, when they are gathered again."""
    one, two = model("int4_g128", (101, 64)), model("int4_g128", (101, 64))
    apply_activation_checkpointing(two, check_fn=lambda m: isinstance(m, Adapted))
    fully_shard(two, mesh=MESH)
    x = dense((3, 512), 9)
    for (n, a), (_, b) in zip(steps(two, x), steps(one, x), strict=True):
        assert torch.equal(a, b), n


class Gate(nn.Module):
    def __init__(self, q):
        super().__init__()
        self.weight = nn.Parameter(q, requires_grad=False)

    def forward(self, x):
        return x * self.weight


@case
def vectors():
    for name, n in (("int4_g128", 1024), ("nvfp4", 1024), ("q4_k", 1024), ("fp8_e4m3_tensor", 511)):
        q, x = tq.quantize(dense((n,)), name), dense((3, n), 1)
        one, two = Gate(q), fully_shard(Gate(q.clone()), mesh=MESH)
        assert isinstance(two.weight._local_tensor, QTensor) and two.weight._local_tensor.ndim == 1
        assert torch.equal(one(x), two(x)) and torch.equal(one(x), two(x))
        assert same(distribute_tensor(q, MESH, [Shard(0)]).full_tensor(), q)
    whole = tq.quantize(dense((64,)), "int8_channel")
    refused(lambda: fully_shard(Gate(whole), mesh=MESH), "int8_channel", "[32, 32]", "multiples of 64")


@case
def fsdp_inference():
    one, two = model("nvfp4", (101, 64)), sharded(model("nvfp4", (101, 64)))
    x = dense((3, 512), 9)
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(two(x), one(x))


@case
def fsdp_states():
    """state_dict, copy_ and assign into shards, cast and back, checkpoints of two ranks: bit for bit."""
    for name in ("int4_g128", "nvfp4", "fp8_e4m3_tensor", "int8_tensor_asym"):
        x, other = dense((3, 512), 9), model(name, (101, 64))
        for layer, seed in zip(other, (50, 60), strict=True):
            layer.base.weight.data = tq.quantize(dense(tuple(layer.base.weight.shape), seed) * 3, name)
        wanted = other(x)
        source, copied, assigned = (sharded(model(name, (101, 64))) for _ in range(3))
        for layer, whole in zip(source, other, strict=True):
            layer.base.weight.data.copy_(distribute_tensor(whole.base.weight.data, MESH, [Shard(0)]))
            layer.base.bias.data.copy_(distribute_tensor(whole.base.bias.data, MESH, [Shard(0)]))
            layer.up.data.copy_(distribute_tensor(whole.up.data, MESH, [Shard(0)]))
            layer.down.data.copy_(distribute_tensor(whole.down.data, MESH, [Shard(0)]))
        assert torch.equal(source(x), wanted), name
        copied.load_state_dict(source.state_dict())
        assigned.load_state_dict({k: v.detach().clone() for k, v in source.state_dict().items()}, assign=True)
        assert torch.equal(copied(x), wanted) and torch.equal(assigned(x), wanted), name
        full = get_model_state_dict(source, options=StateDictOptions(full_state_dict=True))
        assert same(full["0.base.weight"], other[0].base.weight) and torch.equal(full["1.up"], other[1].up)
        folder = FOLDER / f"dcp-{name}"
        dcp.save({"m": source.state_dict()}, checkpoint_id=folder)
        loaded = sharded(model(name, (101, 64)))
        state = {"m": loaded.state_dict()}
        dcp.load(state, checkpoint_id=folder)
        loaded.load_state_dict(state["m"])
        assert torch.equal(loaded(x), wanted), name
        pickled = {k: v.detach() for k, v in source.state_dict().items()}
        torch.save(pickled, FOLDER / f"{name}-{RANK}.pt")
        found = torch.load(FOLDER / f"{name}-{RANK}.pt", weights_only=True)
        read = sharded(model(name, (101, 64)))
        read.load_state_dict(found, assign=True)
        assert torch.equal(read(x), wanted), name
        if RANK == 0:  # one wrote, two ranks read
            dcp.save({"m": other.state_dict()}, checkpoint_id=FOLDER / f"one-{name}", no_dist=True)
        dist.barrier()
        loaded = sharded(model(name, (101, 64)))
        state = {"m": loaded.state_dict()}
        dcp.load(state, checkpoint_id=FOLDER / f"one-{name}")
        loaded.load_state_dict(state["m"])
        assert torch.equal(loaded(x), wanted), name
        alone = model(name, (101, 64))  # two ranks wrote, one reads
        state = {"m": alone.state_dict()}
        dcp.load(state, checkpoint_id=folder)
        for layer, whole in zip(alone, other, strict=True):
            assert same(layer.base.weight, whole.base.weight), name
        assert torch.equal(alone(x), wanted), name


def refused(function, *words):
    try:
        function()
    except (ValueError, RuntimeError) as error:
        assert all(word in str(error) for word in words), str(error)
    else:
        raise AssertionError("not refused")


@case
def distributing():
    """Every placement, both ways: what arrives are bytes of rank 0, and as many as that rank keeps."""
    for name in (*FORMATS, "fp8_e4m3_b128x128"):
        for shape in ((256, 768), (3, 256, 512)):
            whole = tq.quantize(dense(shape), name)
            mine = tq.quantize(dense(shape, seed=RANK), name)  # only that of rank 0 counts
            for placement in (Shard(0), Shard(1), Shard(len(shape) - 1), Replicate()):
                dim = None if placement == Replicate() else placement.dim
                unit = max(1, whole.format.super_group or whole.format.group[1])
                if dim == len(shape) - 1 and shape[dim] // 2 % unit:
                    refused(lambda w=whole, p=placement: distribute_tensor(w, MESH, [p]), name, f"axis {dim}")
                    continue
                with Sent() as sent:
                    made = distribute_tensor(mine.clone(), MESH, [placement])
                local = made.to_local()
                if isinstance(placement, Shard):
                    wanted = torch.chunk(whole, 2, placement.dim)[RANK]
                    assert (local.untyped_storage().nbytes() <= whole._buf.numel() * 2 // 3 + 512) or shape[0] == 3
                else:
                    wanted = whole
                assert isinstance(wanted, QTensor), (name, shape, placement, type(local))
                assert same(local, wanted), (name, shape, placement)
                assert sum(sent.bytes.values()) < 2 * whole.nbytes + 4096 < 4 * whole.numel()
                assert same(made.full_tensor(), whole), (name, shape, placement)
                own = distribute_tensor(whole, MESH, [placement], src_data_rank=None).to_local()
                assert same(own, wanted) and own._is_compact()
                assert torch.equal(own.dequantize(), wanted.dequantize())


@case
def other_axes():
    """Redistributing, casting, copying a DTensor: bytes all the way."""
    for name in ("int4_g128", "nvfp4", "int8_channel", "fp8_e4m3_tensor"):
        whole = tq.quantize(dense((512, 768)), name)
        made = distribute_tensor(whole, MESH, [Shard(0)])
        columns = made.redistribute(placements=[Shard(1)])
        assert same(columns.to_local(), whole.chunk(2, 1)[RANK])
        assert same(columns.redistribute(placements=[Shard(0)]).to_local(), whole.chunk(2, 0)[RANK])
        assert same(made.redistribute(placements=[Replicate()]).to_local(), whole)
        own = DTensor.from_local(whole.chunk(2)[RANK], MESH, [Shard(0)])  # a window of the whole
        assert same(own.full_tensor(), whole) and same(own.redistribute(placements=[Shard(1)]).full_tensor(), whole)
        back = distribute_tensor(whole, MESH, [Replicate()]).redistribute(placements=[Shard(1)])
        assert same(back.to_local(), columns.to_local())
        for moved in (
            made.to(torch.bfloat16),
            made.clone(),
            made.detach(),
            made.cpu(),
            torch.empty_like(made).copy_(made),
        ):
            assert isinstance(moved.to_local(), QTensor) and moved.to_local().dtype is moved.dtype
            assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(
                bits(moved.to_local()), bits(made.to_local()), strict=True))  # fmt: skip
    short = distribute_tensor(tq.quantize(dense((64, 384)), "int4_g128"), MESH, [Shard(0)])
    refused(lambda: short.redistribute(placements=[Shard(1)]), "int4_g128", "384")


def bits(q):
    return [part.contiguous().view(torch.uint8) for part in q.parts().values()]


@case
def hybrid():
    """Meshes of two axes, one of which replicates."""
    for shape in ((1, RANKS), (RANKS, 1)):
        mesh = init_device_mesh(DEVICE.type, shape, mesh_dim_names=("replicate", "shard"))
        one, two = model("nvfp4", (101, 64)), model("nvfp4", (101, 64))
        for layer in two:
            fully_shard(layer, mesh=mesh)
        fully_shard(two, mesh=mesh)
        x = dense((3, 512), 9)
        for (n, a), (_, b) in zip(steps(two, x), steps(one, x), strict=True):
            assert torch.equal(a, b), (shape, n)


@case
def uneven_columns():
    """255 columns make shards of 128 and 127, which DTensor pads; 200 rows of blocks of 100 shards of 100."""
    for name in ("int4_g64", "mxfp4", "int8_channel", "nvfp4", "int3_g8", "fp8_e4m3_tensor"):
        whole = tq.quantize(dense((64, 255)), name)
        made = distribute_tensor(whole.clone(), MESH, [Shard(1)])
        assert same(made.to_local(), torch.chunk(whole, 2, 1)[RANK]) and same(made.full_tensor(), whole)


@case
def cut_groups():
    for name, shape, dim, numbers in (
        ("int4_g128", (64, 384), 1, ("[192, 192]", "(64, 384)", "128")),
        ("nvfp4", (64, 48), 1, ("[24, 24]", "16")),
        ("fp8_e4m3_b128x128", (384, 128), 0, ("[192, 192]", "128")),
        ("q4_k", (64, 768), 1, ("[384, 384]", "256")),
        ("int3_channel", (64, 44), 1, ("[22, 22]", "8")),
    ):
        whole = tq.quantize(dense(shape), name)
        for source in (0, None):
            refused(lambda s=source, w=whole, d=dim: distribute_tensor(w, MESH, [Shard(d)], src_data_rank=s),
                    name, f"axis {dim}", *numbers)  # fmt: skip


class Block(nn.Module):
    def __init__(self, name, exact):
        super().__init__()
        self.up, self.down = nn.Linear(512, 768, device=DEVICE), nn.Linear(768, 512, device=DEVICE)
        for i, layer in enumerate((self.up, self.down)):
            values = dense(tuple(layer.weight.shape), i)
            values = values.round().clamp(-2, 2) if exact else values
            parts = {"scale": torch.ones_like(tq.quantize(values, name).scale)} if exact else {}
            layer.weight = nn.Parameter(tq.quantize(values, name, **parts), requires_grad=False)
            layer.bias = nn.Parameter(dense(tuple(layer.bias.shape), i + 5).round(), requires_grad=False)

    def forward(self, x):
        return self.down(F.relu(self.up(x)))


@case
def tensor_parallel():
    """Column then row. Whole numbers make every sum exact, so that two ranks equal one bit for bit whatever the order;
    otherwise the columns do, and the sum of two halves of a row differs by rounding."""
    for name in ("int4_g128", "fp8_e4m3_channel", "mxfp4", "fp8_e4m3_tensor"):
        for whole_numbers in (True, False):
            exact = whole_numbers and tq.get_format(name).scale.dtype in (torch.bfloat16, torch.float32)
            one, two = Block(name, exact), Block(name, exact)
            parallelize_module(two, MESH, {"up": ColwiseParallel(), "down": RowwiseParallel()})
            up, down = two.up.weight, two.down.weight
            assert tuple(up.to_local().shape) == (384, 512) and tuple(down.to_local().shape) == (512, 384)
            assert isinstance(up.to_local(), QTensor) and isinstance(down.to_local(), QTensor)
            x = dense((2, 3, 512), 3)
            x = x.round() if exact else x
            inputs = [x.clone().requires_grad_() for _ in range(2)]
            ys = [net(x) for net, x in zip((one, two), inputs, strict=True)]
            for y in ys:
                y.backward(dense(tuple(y.shape), 4).round())
            for a, b in ((ys[0], ys[1]), (inputs[0].grad, inputs[1].grad)):
                assert torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-4, atol=1e-3), (name, exact)
        hidden = F.linear(x, tq.quantize(dense((768, 512), 0), name)[RANK * 384 : RANK * 384 + 384])
        local = Block(name, False)
        parallelize_module(local, MESH, {"up": ColwiseParallel()})
        local.up.bias = None
        assert torch.equal(local.up(x), hidden)


@case
def tensor_parallel_of_quantized_layers():
    """QLinear with inputs quantized on the fly is an nn.Linear to parallelize_module; scales of a row of inputs are
    those of the whole row, so only the order of sums differs from one rank."""
    for scheme in ("FP8_DYNAMIC", "W8A8", "MXFP8", "NVFP4"):
        torch.manual_seed(0)
        one = nn.Sequential(nn.Linear(512, 256), nn.Linear(256, 512)).to(DEVICE)
        tq.quantize_(one, scheme, progress=False)
        two = copy.deepcopy(one)
        parallelize_module(two, MESH, {"0": ColwiseParallel(), "1": RowwiseParallel()})
        inputs = [dense((4, 512), 3).requires_grad_() for _ in range(2)]
        ys = [net(x) for net, x in zip((one, two), inputs, strict=True)]
        assert isinstance(two[1].weight.to_local(), QTensor) and isinstance(two[0], tq.QLinear)
        saved = []

        def keep(t, saved=saved):
            saved.append(t.numel() * t.element_size())
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            two(inputs[1])
        assert max(saved) < 512 * 128 * 4 and sum(saved) < 2 * two[0].weight.to_local().nbytes + 100_000, saved
        assert torch.equal(two[0](inputs[0]), one[0](inputs[0]).chunk(2, -1)[RANK])  # columns: bit for bit
        assert torch.allclose(*ys, rtol=1e-4, atol=1e-4), (scheme, (ys[0] - ys[1]).abs().max())
        with torch.inference_mode():
            assert torch.allclose(two(inputs[1].detach()), ys[0], rtol=1e-4, atol=1e-4)
        for y in ys:
            y.square().sum().backward()
        assert torch.allclose(inputs[0].grad, inputs[1].grad, rtol=1e-3, atol=1e-3), scheme


@case
def both_kinds():
    """fully_shard over shards of tensor parallelism."""
    mesh = init_device_mesh(DEVICE.type, (1, RANKS), mesh_dim_names=("dp", "tp"))
    one, two = Block("int4_g128", True), Block("int4_g128", True)
    parallelize_module(two, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(two, mesh=mesh["dp"])
    x = dense((3, 512), 3).round()
    for _ in range(2):
        assert torch.equal(two(x), one(x))
    mesh = init_device_mesh(DEVICE.type, (RANKS, 1), mesh_dim_names=("dp", "tp"))
    two = Block("int4_g128", True)
    parallelize_module(two, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(two, mesh=mesh["dp"])
    assert isinstance(two.up.weight._local_tensor, QTensor)
    for _ in range(2):
        assert torch.equal(two(x), one(x))


@case
def replicas():
    """DistributedDataParallel would send values and quantize them again, by another scale than a search had found."""
    one, two = model("int4_g128", (101,)), model("int4_g128", (101,))
    refused(lambda: nn.parallel.DistributedDataParallel(two), "int4_g128", "init_sync=False", "fully_shard")
    two = nn.parallel.DistributedDataParallel(two, init_sync=False)
    x = dense((3, 512), 9)
    for net in (one, two):
        net(x).sum().backward()
    assert same(two.module[0].base.weight, one[0].base.weight) and torch.equal(one[0].up.grad, two.module[0].up.grad)


@case
def compiled_shards():
    """Compiled layers under fully_shard, whose hooks stay outside of the graph."""
    one, two = model("int4_g128", (101,)), model("int4_g128", (101,))
    for layer in two:
        layer.compile(backend="aot_eager")
    sharded(two)
    x = dense((3, 512), 9)
    for (n, a), (_, b) in zip(steps(two, x), steps(one, x), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5), n


@case
def compiled_columns_and_rows():
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(512, 256), nn.Linear(256, 512)).to(DEVICE)
    two = copy.deepcopy(tq.quantize_(one, "W4A16", progress=False).requires_grad_(False))
    parallelize_module(two, MESH, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    x = dense((4, 512), 3)
    assert torch.allclose(torch.compile(two, backend="aot_eager")(x), one(x), rtol=1e-4, atol=1e-4)


@case
def collectives():
    for name in ("int4_g128", "nvfp4"):
        mine, theirs = tq.quantize(dense((64, 256), RANK), name), tq.quantize(dense((64, 256), 1 - RANK), name)
        first = tq.quantize(dense((64, 256), 0), name)
        for target in (mine.clone(), torch.cat([mine, mine])[64:]):
            if DEVICE.type == "cuda" and not target._is_compact():
                refused(lambda t=target: dist.broadcast(t, src=0), name, "tensor of its own")
            elif tuple(target.shape) == (64, 256):
                dist.broadcast(target, src=0)
                assert torch.equal(target.dequantize(), first.dequantize()) or (
                    name == "nvfp4" and not target._is_compact()
                )
        found = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(found, mine)
        assert same(found[RANK], mine) and same(found[1 - RANK], theirs)
        refused(lambda m=mine: dist.all_reduce(m), name, "not reduced")
        refused(lambda m=mine: dist.all_gather([torch.empty(64, 256, device=DEVICE)] * 2, m), name)


def main():
    global RANK, RANKS, DEVICE, MESH, FOLDER
    RANK, RANKS, kind, FOLDER = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    only = sys.argv[5:]
    torch.set_num_threads(1)
    faulthandler.enable()
    DEVICE = torch.device(kind, RANK) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(DEVICE)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", init_method=f"file://{FOLDER}/store", rank=RANK,
        world_size=RANKS, timeout=timedelta(seconds=60),
    )  # fmt: skip
    MESH = init_device_mesh(kind, (RANKS,))
    results = {}
    for name, function in CASES.items():
        if (only and not any(o in name for o in only)) or (RANKS == 1 and name not in ALONE):
            continue
        start = time.perf_counter()
        try:
            function()
            results[name] = [None, 0.0]
        except Exception:
            results[name] = [traceback.format_exc(limit=-12), 0.0]
        results[name][1] = round(time.perf_counter() - start, 2)
        (FOLDER / f"{RANK}.json").write_text(json.dumps(results))
    gc.collect()  # shards of models, before the groups that they belong to
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
