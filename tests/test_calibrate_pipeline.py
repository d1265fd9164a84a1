"""`quantize_(calibration=)`: the loop over blocks, what it leaves behind, and what it does when memory runs out."""

import gc
import json
import weakref

import pytest
import torch
from conftest import INTERPRET
from models import build, decompressed
from torch import nn

import tritonq as tq
from tritonq import ops
from tritonq.calibrate import pipeline
from tritonq.calibrate.replay import Replay
from tritonq.calibrate.task import Task

pytestmark = pytest.mark.skipif(INTERPRET, reason="calibration does not depend on the interpreter")

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}


def model(kind="llama", **overrides):
    return build(kind, torch.float32, **SHAPE, **overrides)


def ids(count=6, length=12):
    return list(torch.randint(0, 128, (count, 1, length), generator=torch.Generator().manual_seed(3)))


def calibration(method="rtn", **options):
    return tq.Calibration(
        ids(), method, samples=6, batch=2, **{"iters": 60 if method == "signround" else None, **options}
    )


def quantized(m):
    return {name: p for name, p in m.named_parameters() if isinstance(p, tq.QTensor)}


def run(method="rtn", scheme="W4A16", group_size=32, kind="llama", **options):
    m, own = model(kind), calibration(method, **options)
    assert tq.quantize_(m, scheme, group_size=group_size, calibration=own, progress=False) is m
    return m, own


def test_rounding_to_nearest_is_that_without_data():
    """With the method that decides nothing, the bytes of `quantize_` without calibration, also outside of blocks."""
    for kind, scheme, group_size in (("llama", "W4A16", 32), ("qwen3moe", "NVFP4", None)):
        found, _ = run(scheme=scheme, group_size=group_size, kind=kind)
        expected = tq.quantize_(model(kind), scheme, group_size=group_size, progress=False)
        parts = quantized(expected)
        assert parts and quantized(found).keys() == parts.keys()
        for name, q in quantized(found).items():
            for part, values in q.parts().items():
                assert torch.equal(values.view(torch.uint8), parts[name].parts()[part].view(torch.uint8)), (name, part)
        assert type(found.model.layers[0].self_attn.q_proj) is type(expected.model.layers[0].self_attn.q_proj)


class Stack(nn.Module):
    """Layers outside of blocks, too."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(32, 32)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(3))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2, generator=generator)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_blocks_see_what_quantized_blocks_put_out():
    """Inputs of each block are the outputs of the quantized ones before it, targets those of the dense block on them;
    reported losses are the mean squared errors between."""
    seen = []

    class Looking:
        name = "looking"

        def run(self, task: Task) -> None:
            (batch,) = task.fetch([1], task.device, True)
            seen.append((batch.args[0].clone(), batch.targets[0].clone()))

    data = [(torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(i)),) for i in range(3)]
    m, dense = Stack(), Stack()
    m.first.weight.data = dense.first.weight.data = torch.eye(32)  # which a format holds exactly
    own = tq.Calibration(data, Looking(), samples=3, batch=2)
    tq.quantize_(m, "W8A16", calibration=own, progress=False)
    x = m.first(data[1][0])
    for index, layer in enumerate(m.layers):
        assert torch.equal(seen[index][0], x), index
        assert torch.allclose(seen[index][1], dense.layers[index](x)), index
        x = x + layer(x)
    errors = []
    for sample in data:
        x = m.first(sample[0])
        errors.append((m.layers[0](x) - dense.layers[0](x)).square().mean())
    assert own.result.blocks[0].loss_after == pytest.approx(float(torch.stack(errors).mean().detach()), rel=1e-4)
    assert all(isinstance(layer[0].weight, tq.QTensor) for layer in m.layers) and isinstance(m.first.weight, tq.QTensor)


@pytest.mark.parametrize("method", ["signround", "gptq"])
def test_tuning_lowers_the_loss_and_repeats_itself(method):
    (first, own), (second, _) = run(method), run(method)
    assert [row.name for row in own.result.blocks] == ["model.layers.0", "model.layers.1"]
    assert all(row.loss_after < row.loss_before for row in own.result.blocks), own.result.blocks
    for name, q in quantized(first).items():
        assert torch.equal(q._buf, quantized(second)[name]._buf), name


def test_nothing_is_left_behind():
    m = model()
    m.train()
    m.config.use_cache = True
    m.model.embed_tokens.weight.requires_grad_(True)
    m.model.norm.weight.requires_grad_(False)
    hooks = [module for module in m.modules() if module._forward_hooks or module._forward_pre_hooks]
    tq.quantize_(m, "W4A16", group_size=32, calibration=calibration("signround"), progress=False)
    assert (
        m.training and m.model.layers[0].training and m.config.use_cache and m.model.embed_tokens.weight.requires_grad
    )
    assert not m.model.norm.weight.requires_grad
    assert hooks == [module for module in m.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert not any("_compiled_call_impl" in module.__dict__ for module in m.modules())
    assert torch.isfinite(m(ids()[0])[0]).all()


class Aliased(nn.Module):
    """A layer that sits in two blocks and beside them."""

    def __init__(self):
        super().__init__()
        self.layers = Stack().layers
        self.layers[2][0] = self.again = self.layers[0][0]

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.again(x)


def test_a_layer_in_several_places_stays_one():
    m, data = Aliased(), [(torch.randn(3, 32, generator=torch.Generator().manual_seed(i)),) for i in range(3)]
    tq.quantize_(m, "W8A16", calibration=tq.Calibration(data, "gptq", samples=3), progress=False)
    assert isinstance(m.again.weight, tq.QTensor)
    assert m.again is m.layers[0][0] and m.again is m.layers[2][0]


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()) for _ in range(2))
        self.head, self.last = nn.Linear(64, 32), nn.Linear(32, 32)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.last(self.head(x.flatten(1)))


def test_lists_without_linear_layers_are_no_blocks():
    """The layers beside them see data, too."""
    torch.manual_seed(0)
    data = list(torch.randn(6, 1, 4, 8, 8))
    own = tq.Calibration([(x,) for x in data], "gptq", samples=6)
    tq.quantize_(Convolutions(), "W4A16", group_size=32, calibration=own, progress=False)
    (row,) = own.result.blocks
    assert row.loss_after < row.loss_before


def test_every_module_trains_again():
    m = model().train()
    m.model.layers[0].mlp.eval()
    before = {name: module.training for name, module in m.named_modules()}
    tq.quantize_(m, "W4A16", group_size=32, calibration=calibration(), progress=False)
    assert {name: module.training for name, module in m.named_modules()} == before


def test_within_autocast():
    """Its copies of weights are none of an iteration before."""
    with torch.autocast("cpu", torch.bfloat16):
        _, own = run("signround", iters=3)
        assert torch.is_autocast_cache_enabled()
    assert all(row.loss_after <= 1.05 * row.loss_before for row in own.result.blocks), own.result.blocks


def test_models_made_in_inference_mode():
    expected, _ = run("gptq")
    with torch.inference_mode():
        m = model()
        assert m.model.norm.weight.requires_grad
    tq.quantize_(m, "W4A16", group_size=32, calibration=calibration("gptq"), progress=False)
    for name, q in quantized(m).items():
        assert torch.equal(q._buf, quantized(expected)[name]._buf), name


def test_dense_weights_are_freed_block_by_block():
    m, alive = model(), []
    weights = [weakref.ref(layer.mlp.up_proj.weight) for layer in m.model.layers]

    class Looking:
        name = "looking"

        def run(self, task: Task) -> None:
            gc.collect()
            alive.append([weight() is not None for weight in weights])

    tq.quantize_(m, "W4A16", group_size=32, calibration=calibration(Looking()), progress=False)
    assert alive == [[True, True], [False, True]]
    gc.collect()
    assert not any(weight() is not None for weight in weights)


def test_files_go_where_the_model_raises(tmp_path):
    m = Stack()
    m.layers[1].register_forward_hook(lambda *args: 1 / 0)
    data = [torch.ones(1, 4, 32)]
    with pytest.raises(ZeroDivisionError) as _:  # which holds the frames
        own = tq.Calibration(data, "rtn", samples=1, cache=1, disk=tmp_path)
        tq.quantize_(m, "W8A16", calibration=own, progress=False)
    assert not list(tmp_path.iterdir())


def test_what_is_in_no_block_is_told():
    own = tq.Calibration([torch.ones(1, 4, 32)], "rtn", samples=1, cache=0)  # also: everything through files
    tq.quantize_(Stack(), "W8A16", calibration=own, progress=False)
    (event,) = [event for event in own.result.events if event.what == "rounded without data"]
    assert event.details["layers"] == ["first"]


def test_activations_that_are_not_finite_are_told():
    m = Stack()
    m.layers[2][0].bias.data[0] = torch.inf
    own = tq.Calibration([torch.ones(1, 4, 32)], "rtn", samples=1)
    tq.quantize_(m, "W8A16", calibration=own, progress=False)
    assert any(event.what == "outputs are not finite" for event in own.result.events)


def test_outputs_that_are_not_numbers_name_block_and_sample():
    m = Stack()
    m.layers[1][0].bias.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"'layers\.1' put out NaN for sample 0"):
        tq.quantize_(m, "W8A16", calibration=tq.Calibration([torch.ones(1, 4, 32)], "rtn", samples=1), progress=False)


def test_losses_of_signround_in_the_report():
    """Before: of rounding to nearest with the search, as `rtn` reports it; not 0, and no less than after."""
    _, own = run("signround", iters=4)
    _, nearest = run("rtn")
    for row in own.result.blocks:
        assert row.loss_before > 0 and row.loss_after <= row.loss_before
    assert own.result.blocks[0].loss_before == pytest.approx(nearest.result.blocks[0].loss_after, rel=1e-5)


def test_report_and_export(tmp_path):
    m, own = run("gptq", kind="qwen3moe", report=tmp_path / "report")
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (
        content["complete"]
        and len(content["blocks"]) == 2
        and "<svg" in (tmp_path / "report" / "report.html").read_text()
    )
    tq.save_pretrained(m, tmp_path / "out")
    for name, weight in decompressed(tmp_path / "out").items():
        if name.endswith("q_proj.weight"):
            own = m.get_submodule(name.removesuffix(".weight")).weight
            assert torch.equal(weight, own.dequantize()), name


# ------------------------------------------------------------------------------------------------------ out of memory


def failing(monkeypatch, owner, name, times=1, when=lambda *args: True):
    """The first calls of a function raise as torch does when memory runs out."""
    original, left = getattr(owner, name), [times]

    def call(*args, **kwargs):
        if left[0] and when(*args):
            left[0] -= 1
            raise torch.OutOfMemoryError("injected")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return left


@pytest.mark.parametrize("method", ["signround", "gptq"])
def test_out_of_memory_while_packing(monkeypatch, method):
    expected, _ = run(method)
    seen = set()

    def first(layer, parts):
        return "up_proj" in layer.name and not (layer.name in seen or seen.add(layer.name))

    left = failing(monkeypatch, pipeline, "packed", times=2, when=first)
    found, own = run(method)
    assert left == [0]
    for name, q in quantized(found).items():
        assert torch.equal(q._buf, quantized(expected)[name]._buf), name
    steps = [event.details for event in own.result.memory_steps]
    assert len(steps) == 2 and all(step["where"] == "packing" and step["device"] == "cpu" for step in steps)


def test_out_of_memory_while_rounding(monkeypatch):
    left = failing(monkeypatch, ops, "quantize", times=1)
    found, own = run()
    assert left == [0] and own.result.complete and own.result.memory_steps
    assert quantized(found).keys() == quantized(tq.quantize_(model(), "W4A16", group_size=32, progress=False)).keys()


def test_out_of_memory_while_measuring(monkeypatch):
    _, expected = run()
    left = failing(monkeypatch, Task, "forward", times=1)
    _, own = run()
    assert left == [0] and own.result.memory_steps
    for a, b in zip(own.result.blocks, expected.result.blocks, strict=True):
        assert a.loss_after == pytest.approx(b.loss_after, rel=1e-5)


def test_out_of_memory_in_a_block(monkeypatch):
    """Whatever the place: the run completes and says so."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    expected, _ = run("gptq")
    for call in (0, 3, 9, 17, 30):
        original, count = LlamaDecoderLayer.forward, [0]

        def forward(self, *args, original=original, count=count, call=call, **kwargs):
            count[0] += 1
            if count[0] == call + 1:
                raise torch.OutOfMemoryError("injected")
            return original(self, *args, **kwargs)

        monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
        found, own = run("gptq")
        monkeypatch.setattr(LlamaDecoderLayer, "forward", original)
        assert count[0] > call and own.result.complete, call
        assert own.result.memory_steps, call
        assert quantized(found).keys() == quantized(expected).keys()


def test_out_of_memory_for_good(monkeypatch):
    monkeypatch.setattr(Replay, "fetch", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("injected")))
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        run()


# -------------------------------------------------------------------------------------------------------------- errors


def test_errors():
    with pytest.raises(ValueError, match="unknown method 'rtm'; known: signround, gptq"):
        tq.Calibration(method="rtm")
    with pytest.raises(ValueError, match=r"gptq takes .*got dampening"):
        tq.Calibration(method="gptq", options={"gptq": {"dampening": 1}})
    with pytest.raises(ValueError, match="options are for awq, which method does not name"):
        tq.Calibration(method="gptq", options={"awq": {}})
    with pytest.raises(ValueError, match="inputs is 'dynamic' or one of minmax"):
        tq.Calibration(inputs="static")
    with pytest.raises(ValueError, match="samples is a number >= 1"):
        tq.Calibration(samples=0)
    with pytest.raises(TypeError, match=r"calibration is a .*, got str"):
        tq.quantize_(model(), "W4A16", calibration="signround")
    for method, scheme, inputs in (
        ("smoothquant", "W4A16", "dynamic"),
        ("imatrix", "W8A16", "dynamic"),
        ("rtn", "MXFP8", "minmax"),
    ):
        with pytest.raises(ValueError, match=r"inputs|search"):  # before the model is called
            own = tq.Calibration(iter(()), method, inputs=inputs)
            tq.quantize_(model(), scheme, calibration=own, progress=False)
    with pytest.raises(ValueError, match="devices names none"):
        tq.quantize_(model(), "W4A16", calibration=calibration(devices=[]), progress=False)
    m = model()
    m.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.* has .* non-finite"):
        tq.quantize_(m, "W4A16", group_size=32, calibration=calibration(), progress=False)
    assert not quantized(m)
    data = [torch.ones(1, 4, 32), torch.full((1, 4, 32), torch.nan)]
    with pytest.raises(ValueError, match="sample 1 of the calibration data has 128 NaN"):
        tq.quantize_(Stack(), "W8A16", calibration=tq.Calibration(data, "awq", samples=2), progress=False)


# --------------------------------------------------------------------------------------------------------------- GPUs


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["rtn", "signround", "gptq", "awq", ("smoothquant", "gptq"), "imatrix"])
@pytest.mark.parametrize("kind", ["llama", "qwen3moe"])
def test_gpu_computes_for_a_model_in_host_memory(kind, method):
    """Blocks visit the GPU one after the other; the model ends where it was, as good as if the CPU had done it."""
    scheme = "W8A8" if isinstance(method, tuple) else "W4A16"
    group_size = None if isinstance(method, tuple) else 32
    m, here = model(kind), model(kind)
    own, expected = calibration(method), calibration(method)
    for one, target, device in ((own, m, "cuda"), (expected, here, None)):
        tq.quantize_(target, scheme, group_size=group_size, calibration=one, device=device, progress=False)
    assert {p.device.type for p in m.parameters()} == {"cpu"} and torch.isfinite(m(ids()[0])[0]).all()
    assert own.result.complete and not own.result.memory_steps and own.result.peak_bytes["cuda:0"]
    for row, other in zip(own.result.blocks, expected.result.blocks, strict=True):
        assert row.loss_after == pytest.approx(other.loss_after, rel=0.3), (own.result.blocks, expected.result.blocks)
    if method == "rtn":  # kernels have what they keep by now
        gc.collect()
        held = torch.cuda.memory_allocated()
        tq.quantize_(model(kind), scheme, group_size=group_size, calibration=calibration(method), device="cuda")
        gc.collect()
        assert torch.cuda.memory_allocated() - held < 1 << 14  # the smallest weight is as large as that


@pytest.mark.gpu
def test_gpu_gives_the_same_bytes_twice():
    found = []
    for _ in range(2):
        m = model().cuda()
        tq.quantize_(m, "W4A16", group_size=32, calibration=calibration("signround"), progress=False)
        assert {p.device.type for p in m.parameters()} == {"cuda"}
        found.append(quantized(m))
    for name, q in found[0].items():
        assert torch.equal(q._buf, found[1][name]._buf), name


@pytest.mark.gpu
def test_gpu_that_two_share_gives_the_bytes_of_one():
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.device_count() > 1 else ["cuda"] * 2
    one, two = model(), model()
    tq.quantize_(one, "W4A16", group_size=32, calibration=calibration("signround", devices=["cuda"]), progress=False)
    own = calibration("signround", devices=devices)
    tq.quantize_(two, "W4A16", group_size=32, calibration=own, progress=False)
    for name, q in quantized(one).items():
        assert torch.equal(q._buf, quantized(two)[name]._buf), name
