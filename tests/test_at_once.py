"""Small tensors with a tensor-wide scale: one launch whose programs meet gives the bits of the CPU path."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import INTERPRET
from test_compile import REGISTERS, TARGETS, check
from torch.multiprocessing.reductions import StorageWeakRef

import tritonq as tq
from bench.launches import launched
from tritonq import meeting, ops, plans, tuning
from tritonq.formats import get_format

PADDED = dataclasses.replace(get_format("nvfp4"), name="nvfp4_g48", group=(1, 48))
FORMATS = ("nvfp4", PADDED, "fp8_e4m3_tensor", "int8_tensor_asym", "int3_tensor", "nf4_tensor")
MODES = ("quantize", "qdq")


def numbers(shape, dtype=torch.bfloat16, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x.view(-1)[-1] = 37.0  # the largest, in the last tile
    return x


def call(mode, x, name, **options):
    """Bytes of every part, or values."""
    if mode == "qdq":
        return [tq.qdq(x, name, **options)]
    return [part.view(torch.uint8) for part in ops.quantize(x, name, **options).values()]


@pytest.mark.parametrize("name", ["nvfp4", "fp8_e4m3_tensor", "int5_tensor_asym"])
@pytest.mark.parametrize("elements", [16, 1008, 8192, 131 * 1024, 1 << 20, 132 * 8192 + 16, 1 << 21, 1 << 22])
def test_tiles_cover_the_tensor_and_fit_the_gpu(name, elements):
    fmt = get_format(name)
    for processors in (1, 16, 68, 132, 304):
        for mode in MODES:
            alone = tuning.at_once_config(elements, fmt, mode, processors, True)
            found = tuning.at_once_config(elements, fmt, mode, processors, False)
            if found is None:
                assert elements > processors * 4 * tuning.TILE and alone is None
                continue
            config, tiles = found
            assert (alone == found) == (tiles <= processors)
            tile = config["BLOCK_N"] if "BLOCK_N" in config else math.prod(config[k] for k in ("S", "M", "GROUPS", "W"))
            assert (tiles - 1) * tile < elements <= tiles * tile
            assert tiles <= processors or (tile == 2 * tuning.TILE and tiles <= 2 * processors)


def launches(name, shape=(4096, 192)):
    """Of quantize and QDQ."""
    fmt, x = get_format(name), torch.zeros(shape, dtype=torch.bfloat16)

    def slots(count):
        return torch.zeros(2, count, dtype=torch.int64)

    def run():
        for y in (None, torch.empty_like(x)):
            assert plans.encode_at_once(x, fmt, ops.allocate(fmt, x.shape, x.device), y, None, slots)

    return launched(run)


@pytest.mark.skipif(INTERPRET, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("name", FORMATS, ids=str)
def test_compiles(name, target, tmp_path):
    for one in launches(name):
        check(one, TARGETS[target], tmp_path, REGISTERS)


def test_what_does_not_meet():
    """Large, strided, given, a window of a larger one: all have launches of their own."""
    x = torch.zeros(1 << 10, 64)
    for name, given in (("nvfp4", x.expand(4096, 1 << 10, 64)), ("nvfp4", x[:, :48]), ("int4_g32", x), ("q4_k", x)):
        fmt = get_format(name)
        assert not plans.encode_at_once(given, fmt, {"qdata": x}, None, None, pytest.fail)
    assert meeting.slots(torch.device("cpu"), 128) is None


def test_slots_of_captured_graphs_stay(monkeypatch):
    """A graph keeps their addresses only, so nothing else may ever get their memory, also where one capture takes all
    slots of a chunk."""
    capturing = False
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    slots, taken, addresses = meeting._Slots(torch.device("cpu"), 32), [], set()
    for _ in range(3):
        capturing = False
        addresses.add(slots.here().data_ptr())
        capturing = True
        while (found := slots.here()) is not None:
            assert not found.any() and found.data_ptr() not in addresses
            addresses.add(found.data_ptr())
            taken.append(StorageWeakRef(found.untyped_storage()))
            del found
    assert len(taken) > 2 * meeting._CHUNK and not any(storage.expired() for storage in taken)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FORMATS)
def test_gpu_gives_the_bits_of_the_cpu(name, mode):
    for shape, dtype in (
        ((1, 16), torch.float32), ((3, 40, 48), torch.bfloat16), ((256, 4096), torch.bfloat16),
        ((257, 4096), torch.float16), ((511, 4096), torch.float32), ((513, 2064), torch.float64),
        ((5, 7), torch.float32), ((64, 384), torch.bfloat16),
    ):  # fmt: skip
        x = numbers(shape, dtype)
        for options in ({}, {"rounding": "stochastic"}):
            found = [
                call(mode, t, name, **options, **({"generator": torch.Generator().manual_seed(5)} if options else {}))
                for t in (x, x.cuda())
            ]
            for cpu, gpu in zip(*found, strict=True):
                assert torch.equal(cpu, gpu.cpu()), (shape, dtype, options)
    x = numbers((64, 512), torch.float32)
    x[3, 5], x[9, 1] = float("nan"), float("-inf")
    for cpu, gpu in zip(call(mode, x, name), call(mode, x.cuda(), name), strict=True):
        assert torch.equal(cpu.nan_to_num(7e30), gpu.cpu().nan_to_num(7e30))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["nvfp4", "fp8_e4m3_tensor"])
def test_gpu_takes_one_launch(name):
    x = numbers((256, 4096)).cuda()
    for mode in MODES:
        call(mode, x, name)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call(mode, x, name)
            torch.cuda.synchronize()
        assert [e.name.startswith("at_once") for e in profile.events() if "at_once" in e.name or "emset" in e.name] == [
            True
        ]


@pytest.mark.gpu
def test_gpu_streams_beside_each_other():
    """More launches at a time than fit the GPU: none waits for programs that cannot begin."""
    tensors = [numbers((256, 4096), seed=i).cuda() * (i + 1) for i in range(24)]
    expected = [call("quantize", x.cpu(), "nvfp4") for x in tensors]
    streams = [torch.cuda.Stream() for _ in tensors]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for x, stream in zip(tensors, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(call("quantize", x, "nvfp4"))
    torch.cuda.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        for gpu, cpu in zip(ours, theirs, strict=True):
            assert torch.equal(gpu.cpu(), cpu)


@pytest.mark.gpu
def test_gpu_graphs():
    """Replays, branches beside each other in a graph, eager calls in between, and more calls than there are slots."""
    tensors = [numbers((256, 4096), seed=i).cuda() for i in range(meeting._CHUNK + 4)]
    call("quantize", tensors[0], "nvfp4")
    graph, found = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()
        for i, x in enumerate(tensors):
            side.wait_stream(main)
            with torch.cuda.stream(side if i % 2 else main):
                found.append(call("quantize", x, "nvfp4"))
        main.wait_stream(side)
    for round_ in range(3):
        for i, x in enumerate(tensors):
            x.copy_(numbers((256, 4096), seed=100 * round_ + i))
        graph.replay()
        eager = call("quantize", tensors[1], "nvfp4")
        graph.replay()
        torch.cuda.synchronize()
        for i in (0, 1, len(tensors) - 1):
            for gpu, cpu in zip(found[i], call("quantize", tensors[i].cpu(), "nvfp4"), strict=True):
                assert torch.equal(gpu.cpu(), cpu)
        assert all(torch.equal(a, b) for a, b in zip(eager, found[1], strict=True))
    call("quantize", tensors[0], "nvfp4")  # there are slots again
