"""`fake_quantize_`: what the model computes is what quantization leaves, and it trains; `convert_` changes no bit."""

import copy
import io

import models
import pytest
import torch
from conftest import INTERPRET
from torch import nn

import tritonq as tq
from tritonq import QLinear, QTensor
from tritonq.nn.fake_quantize import FakeQuantLinear

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(INTERPRET, reason="models are not for the interpreter")

SCHEMES = ("W4A16", "W4A16_ASYM", "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP4", "NVFP4")
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
         "num_hidden_layers": 1}  # fmt: skip
TOKENS = torch.arange(24).reshape(2, 12) * 5 % 128


@pytest.fixture(scope="module")
def built():
    cache = {}

    def build(kind="llama", dtype=torch.float32, device="cpu"):
        if (kind, dtype) not in cache:
            experts = {"moe_intermediate_size": 32} if kind == "qwen3moe" else {}
            cache[kind, dtype] = models.build(kind, dtype, **SMALL, **experts)
        return copy.deepcopy(cache[kind, dtype]).to(device)

    return build


def output(model):
    with torch.no_grad():
        return model.eval()(TOKENS.to(model.device))[0]


def loss(model):
    tokens = TOKENS.to(model.device)
    return model(tokens, labels=tokens).loss


def convert(model):
    return tq.convert_(model, progress=False)


def layer(rows=48, columns=64, device="cpu", **options):
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(columns, rows, device=device, **options)})


def same(a, b):
    """Bits on the CPU; on a GPU dense and quantized weights may take other matrix products."""
    assert a.dtype == b.dtype
    assert torch.equal(a, b) if a.device.type == "cpu" else torch.allclose(a, b, rtol=2e-2, atol=2e-2)


def trained(model, steps=1, rate=0.05):
    optimizer = torch.optim.SGD(model.train().parameters(), rate)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        found.append(value.item())
    return found


# ------------------------------------------------------------------------------------------------- the same outputs


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["llama", "qwen3moe"])
def test_conversion_changes_no_output(kind, scheme, built, device):
    """Fake-quantized, converted, and quantized without training: one output. Divisors that NVFP4 shares included."""
    options = {} if (kind, scheme) == ("llama", "MXFP4") else {"search": False}  # a search takes the CPU long
    model = built(kind, device=device)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(3)
    dense, quantized = output(model), tq.quantize_(copy.deepcopy(model), scheme, progress=False, **options)
    names = list(dict(model.named_parameters()))
    assert tq.fake_quantize_(model, scheme, **options) is model
    assert list(model.state_dict()) == names
    fake = output(model)
    assert not torch.equal(fake, dense) and torch.isfinite(fake).all()
    same(fake, output(quantized))
    assert convert(model) is model
    same(output(model), fake)
    assert list(dict(model.named_parameters())) == names
    for (name, p), q in zip(model.named_parameters(), quantized.parameters(), strict=True):
        assert isinstance(p, QTensor) == isinstance(q, QTensor), name
        if isinstance(p, QTensor):
            assert torch.equal(p.qdata.view(torch.uint8), q.qdata.view(torch.uint8))
            assert p.format == q.format and not p.requires_grad
    assert not any(isinstance(m, FakeQuantLinear) or hasattr(m, "fake") for m in model.modules())
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in quantized.named_modules()}
    for name in ("tritonq_scheme", "tritonq_group_size", "tritonq_ignored"):
        assert getattr(model, name) == getattr(quantized, name)


@pytest.mark.parametrize(
    "options", [{"group_size": 16, "search": False}, {"search": False, "ignore": ["down_proj", "re:.*q_proj"]}]
)
def test_options_of_quantize(options, built):
    model = built(dtype=torch.bfloat16)
    quantized = tq.quantize_(copy.deepcopy(model), "W4A16", progress=False, **options)
    tq.fake_quantize_(model, "W4A16", **options)
    fake = output(model)
    assert fake.dtype is torch.bfloat16
    same(fake, output(quantized))
    same(output(convert(model)), fake)


def test_after_training(built, device):
    """What training left is what is converted; under autocast, too."""
    for scheme in ("NVFP4", "W8A8"):
        model = tq.fake_quantize_(built(device=device), scheme)
        before = output(model)
        trained(model)
        fake = output(model)
        assert not torch.equal(fake, before)
        twin = convert(copy.deepcopy(model))
        same(output(twin), fake)
        with torch.autocast(device, dtype=torch.bfloat16):
            same(output(twin), output(model))


# ---------------------------------------------------------------------------------------------------------- training


def test_gradients_of_one_layer(device):
    """Against the formulas of W8A8 in float64: int8 rows by the element of largest magnitude, int8 tokens by amax."""
    module = tq.fake_quantize_(layer(device=device), "W8A8")
    weight, bias = (module["a"].get_parameter(n).detach().cpu().double() for n in ("weight", "bias"))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    dy = torch.randn(5, 48, generator=torch.Generator().manual_seed(2)).to(device)
    y = module["a"](x)
    y.backward(dy)
    x64, dy64 = x.detach().cpu().double(), dy.cpu().double()
    largest = weight.gather(1, weight.abs().argmax(1, keepdim=True))
    quantized, inside = [], []
    for values, scale in ((weight, -largest / 128), (x64, x64.abs().amax(1, keepdim=True) / 127)):
        ratio = values.float() / scale.float()  # scales are stored and divide in fp32
        quantized.append(ratio.double().round().clamp(-128, 127) * scale.float().double())
        inside.append((ratio <= 127) & (ratio >= -128))
    for got, expected in (
        (y, quantized[1] @ quantized[0].T + bias), (x.grad, inside[1] * (dy64 @ quantized[0])),
        (module["a"].weight.grad, inside[0] * (dy64.T @ quantized[1])), (module["a"].bias.grad, dy64.sum(0)),
    ):  # fmt: skip
        torch.testing.assert_close(got.detach().cpu().double(), expected, rtol=1e-4, atol=1e-4)
    assert not inside[0].all()  # where rounding met the end of the range, the gradient is 0


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4", "MXFP4", "FP8_BLOCK"])
def test_no_rounded_copy_is_kept(scheme, device):
    """Backward keeps the parameter and the rounded input; gradients, twice over, are those of plain autograd."""
    module = tq.fake_quantize_(layer(device=device), scheme)
    linear, scheme = module["a"], tq.get_scheme(scheme)
    fmt, inputs = scheme.weight_format(torch.float32), scheme.input_format
    given = {"tensor_scale": torch.ones(1, device=device)} if inputs is not None and inputs.tensor_scale else {}
    found, saved = [], []
    for plain in (False, True):
        x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            if plain:
                values = x if inputs is None else tq.qdq(x, inputs, **given)
                y = nn.functional.linear(values, tq.qdq(linear.weight, fmt, search=scheme.search(None)), linear.bias)
            else:
                y = linear(x)
                assert all(t is linear.weight or t.numel() < linear.weight.numel() for t in saved)
        leaves = (x, linear.weight, linear.bias)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        found.append([y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(*[f[:2] for f in found], strict=True)) or device == "cuda"
    with pytest.raises(TypeError, match=r"bfloat16 and the weight torch\.float32"):
        linear(x.detach().bfloat16())


@pytest.mark.parametrize("kind,scheme", [("llama", "W4A16"), ("llama", "NVFP4"), ("qwen3moe", "FP8_DYNAMIC")])
def test_training_lowers_the_loss(kind, scheme, built, device):
    model = tq.fake_quantize_(built(kind, device=device), scheme, search=False)
    losses = trained(model, 4)
    assert losses[-1] < losses[0] - 0.05, losses
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        assert p.grad.abs().sum() > 0 or "experts" in name, name  # which tokens reach an expert is chance
    experts = [p.grad for name, p in model.named_parameters() if "experts" in name]
    assert all(grad.abs().sum() > 0 for grad in experts)


def test_gradient_checkpointing(built):
    """Recomputing a block gives the bits of the first time."""
    found = []
    for checkpointing in (False, True):
        model = tq.fake_quantize_(built(), "FP8", inputs="static").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        value = loss(model)
        value.backward()
        found.append(
            [value, *(p.grad for p in model.parameters()), *(b for n, b in model.named_buffers() if "range" in n)]
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("scheme,options", [("MXFP4", {}), ("NVFP4", {"search": False}), ("FP8", {"inputs": "static"})])
def test_one_graph(scheme, options, built, device):
    """torch.compile(fullgraph=True) of a whole model, with the gradients of eager calls."""
    torch._dynamo.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    model = tq.fake_quantize_(built(device=device), scheme, **options).train()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    values = [loss(compiled), loss(twin)]
    for value in values:
        value.backward()
    torch.testing.assert_close(values[0], values[1], rtol=1e-2, atol=1e-2)  # sums in another order round otherwise
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0
        if device == "cpu":
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    for p, q in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-2)


def test_trainer(built, tmp_path):
    """transformers' Trainer takes two steps and resumes from its checkpoint; save_pretrained writes a dense model."""
    hf = pytest.importorskip("transformers")
    try:
        from transformers import Trainer, TrainingArguments
    except ImportError as error:
        pytest.skip(f"transformers has no Trainer here: {error}")
    own = {"search": False, "group_size": 32}
    options = {"per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    data = [{"input_ids": row, "labels": row} for row in TOKENS.repeat(2, 1)]
    model = tq.fake_quantize_(built(), "W4A16", **own)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for steps, resume in ((2, False), (3, True)):
        arguments = TrainingArguments(str(tmp_path / "run"), max_steps=steps, save_steps=2, **options)
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == steps
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if "proj" in n)
    fake = output(model)
    model.save_pretrained(tmp_path / "dense")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    same(output(tq.fake_quantize_(again, "W4A16", **own)), fake)
    tq.save_pretrained(convert(model), tmp_path / "quantized")


# ------------------------------------------------------------------------------------------------ ranges of inputs


@pytest.mark.parametrize("averaging", [None, 0.75])
def test_ranges(averaging, device):
    """Extremes or averages over the batches in training mode; frozen in eval mode and by freeze_observers_."""
    module = tq.fake_quantize_(layer(device=device), "FP8", inputs="static", averaging=averaging)
    batches = [torch.randn(4, 64) * (i + 1) for i in range(3)]
    expected = None
    for x in batches:
        module["a"](x.to(device))
        low, high = float(x.min()), float(x.max())
        if expected is None:
            expected = [low, high]
        elif averaging is None:
            expected = [min(low, expected[0]), max(high, expected[1])]
        else:
            expected = [e * averaging + v * (1 - averaging) for e, v in zip(expected, (low, high), strict=True)]
    known = module["a"].input_range.clone()
    torch.testing.assert_close(known.cpu(), torch.tensor(expected))
    module["a"](torch.full((2, 64), torch.inf, device=device))  # says nothing about a range
    module["a"](torch.empty(0, 64, device=device))
    module.eval()
    module["a"](torch.full((2, 64), 1e3, device=device))
    tq.freeze_observers_(module.train())
    module["a"](torch.full((2, 64), 1e3, device=device))
    assert torch.equal(module["a"].input_range, known)
    x = torch.randn(6, 64).to(device)
    fake = module.eval()["a"](x)
    scale = (known.cpu().abs().amax() / torch.tensor(448.0)).reshape(1).to(device)
    inputs = tq.qdq(x, "fp8_e4m3_tensor", scale=scale)
    weight = tq.qdq(module["a"].weight, module["a"].fake.formats[torch.float32])
    same(fake.detach(), nn.functional.linear(inputs, weight, module["a"].bias).detach())
    convert(module)
    assert type(module["a"]) is QLinear and torch.equal(module["a"].input_scale, scale)
    same(module["a"](x), fake)
    restored = tq.quantize_(layer(device=device), "FP8", progress=False)
    assert "a.input_scale" in module.state_dict() and "a.input_scale" not in restored.state_dict()
    restored.load_state_dict(module.state_dict())
    same(restored["a"](x), fake)


def test_range_of_two_levels(built, device):
    """NVFP4: the tensor-wide divisor 448 * 6 / amax of what was seen, in place of 1."""
    model = tq.fake_quantize_(built(device=device), "NVFP4", inputs="static").train()
    loss(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, FakeQuantLinear)}
    expected = {n: 448 * 6 / m.input_range.abs().amax() for n, m in layers.items()}
    fake = output(model)
    same(output(convert(model)), fake)
    for name, divisor in expected.items():
        torch.testing.assert_close(model.get_submodule(name).input_global_scale, divisor.reshape(1))
    assert len({float(d) for d in expected.values()}) > 2


@pytest.mark.parametrize("scheme", ["FP8", "NVFP4"])
def test_scales_and_ranges_keep_their_dtype(scheme, device):
    """A model that is cast to bf16 has bf16 weights, and the scales of its inputs as they are stored."""
    module = tq.fake_quantize_(layer(device=device), scheme, inputs="static")
    module["a"](torch.randn(4, 64, device=device))
    known = module["a"].input_range.clone()
    module.to(torch.bfloat16)
    assert module["a"].weight.dtype is torch.bfloat16 and torch.equal(module["a"].input_range, known)
    x = torch.randn(4, 64, device=device).bfloat16()
    fake = module.eval()["a"](x)
    same(convert(module)["a"](x), fake)
    quantized = convert(tq.fake_quantize_(layer(device=device), scheme))
    quantized.to(torch.bfloat16)
    assert quantized["a"](x).dtype is torch.bfloat16


def test_static_scales_need_inputs(device):
    module = tq.fake_quantize_(layer(device=device), "FP8", inputs="static").eval()
    for call in (lambda: module["a"](torch.ones(2, 64, device=device)), lambda: convert(module)):
        with pytest.raises(ValueError, match=r"no finite .* training mode"):
            call()
    module.train()["a"](torch.ones(2, 64, device=device))
    again = tq.fake_quantize_(layer(device=device), "FP8", inputs="static").eval()
    again.load_state_dict(module.state_dict())
    x = torch.randn(3, 64, device=device)
    assert torch.equal(again["a"](x), module.eval()["a"](x))
    again.load_state_dict(tq.fake_quantize_(layer(device=device), "FP8", inputs="static").state_dict())
    with pytest.raises(ValueError, match=r"no finite .* training mode"):
        again["a"](x)


def test_static_scales_are_exported(built, tmp_path):
    model = tq.fake_quantize_(built(), "FP8", inputs="static").train()
    loss(model)
    tq.save_pretrained(convert(model), tmp_path / "out")
    found = models.tensors(tmp_path / "out")
    scales = {name: module.input_scale for name, module in model.named_modules() if hasattr(module, "input_scale")}
    assert len(scales) == 7 * model.config.num_hidden_layers
    assert all(torch.equal(found[f"{n}.input_scale"], scale.to(model.dtype)) for n, scale in scales.items())


# ------------------------------------------------------------------------------------------- what has to be kept


def test_parameters_are_the_same_objects(built):
    """An optimizer made before keeps working, and removal leaves what was there."""
    model = built("qwen3moe")
    kinds = {n: type(m) for n, m in model.named_modules()}
    parameters, dense = dict(model.named_parameters()), output(model)
    tq.fake_quantize_(model, "W8A16")
    assert all(p is parameters[n] for n, p in model.named_parameters())
    experts = model.model.layers[0].mlp.experts
    assert experts.gate_up_proj is parameters["model.layers.0.mlp.experts.gate_up_proj"]  # rounded only inside forward
    assert "fake=W8A16" in repr(model)
    twin, pickled = copy.deepcopy(model), io.BytesIO()
    same(output(twin), output(model))
    assert twin.model.layers[0].self_attn.q_proj.weight is not model.model.layers[0].self_attn.q_proj.weight
    assert tq.remove_fake_quantize_(model) is model
    assert torch.equal(output(model), dense) and kinds == {n: type(m) for n, m in model.named_modules()}
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert not any("fake" in key or "range" in key for m in model.modules() for key in (*m.__dict__, *m._buffers))
    same(output(tq.quantize_(model, "W8A16", progress=False)), output(twin))
    whole = tq.fake_quantize_(built(), "NVFP4", search=False)
    own = copy.deepcopy(whole).model.layers[0].self_attn  # whose divisor follows its own weights, not those it had
    assert {id(m) for m in own.k_proj.sharing} == {id(m) for m in (own.q_proj, own.k_proj, own.v_proj)}
    torch.save(whole, pickled)
    pickled.seek(0)
    same(output(torch.load(pickled, weights_only=False)), output(whole))


def test_state_dict(built):
    """The dense one, both ways."""
    model, other = built(), built()
    tq.fake_quantize_(model, "W8A16")
    trained(model)
    other.load_state_dict(model.state_dict())
    same(output(tq.quantize_(other, "W8A16", progress=False)), output(model))
    fresh = tq.fake_quantize_(built(), "W8A16")
    fresh.load_state_dict(model.state_dict())
    same(output(fresh), output(model))


def test_hooks_are_kept(device):
    module, seen = layer(device=device), []
    module["a"].register_forward_hook(lambda m, args, out: seen.append(type(m)))
    tq.fake_quantize_(module, "W8A16")
    module["a"](torch.ones(1, 64, device=device))
    convert(module)["a"](torch.ones(1, 64, device=device))
    assert seen == [FakeQuantLinear, QLinear]


# ------------------------------------------------------------------------------------------------------------ errors


def test_errors(built):
    model = built()
    for call, words in (
        (lambda: tq.fake_quantize_(model, "W5A5"), "unknown scheme 'W5A5'; known: .*NVFP4"),
        (lambda: tq.fake_quantize_(model, "W4A16", ignore=["nothing"]), "'nothing' matches no module.*q_proj"),
        (lambda: tq.fake_quantize_(model, "W4A16", ignore=["re:.*"]), "no linear layer to quantize"),
        (lambda: tq.fake_quantize_(model, "MXFP4", group_size=64), "MXFP4 fixes its groups"),
        (lambda: tq.fake_quantize_(model, "FP8", inputs="sometimes"), "got 'sometimes'"),
        (lambda: tq.fake_quantize_(model, "FP8_DYNAMIC", inputs="static"), "FP8_DYNAMIC gives inputs scales"),
        (lambda: tq.fake_quantize_(model, "W4A16", inputs="static"), "W4A16 leaves inputs alone"),
        (lambda: tq.fake_quantize_(model, "FP8", averaging=0.9), "averaging is between 0 and 1"),
        (lambda: tq.fake_quantize_(model, "FP8", inputs="static", averaging=1), "averaging is between 0 and 1"),
        (lambda: convert(model), "no fake-quantized layer; call tritonq.fake_quantize_"),
        (lambda: tq.remove_fake_quantize_(model), "no fake-quantized layer"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
        assert not any(hasattr(m, "fake") for m in model.modules())
    for kind in ("llama", "qwen3moe"):
        twice = tq.fake_quantize_(built(kind), "W4A16")
        for call in (tq.fake_quantize_, tq.quantize_):
            with pytest.raises(ValueError, match="quantized already"):
                call(twice, "W4A16")
    other = built()
    other.model.layers[0].mlp.up_proj.forward = lambda x: x
    with pytest.raises(ValueError, match=r"forward of model\.layers\.0\.mlp\.up_proj was replaced"):
        tq.fake_quantize_(other, "W4A16")


def test_weights_that_are_not_finite():
    """Named when converting, which leaves the model as it was."""
    module = tq.fake_quantize_(layer(), "W4A16")
    with torch.no_grad():
        module["a"].weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"a of shape \(48, 64\) has 1 non-finite element "):
        convert(module)
    assert type(module["a"]) is FakeQuantLinear


def test_two_schemes_in_one_model(built):
    """Each call applies to what the others left."""
    model = built()
    quantized = copy.deepcopy(model)
    for m, call in ((model, tq.fake_quantize_), (quantized, lambda *a, **k: tq.quantize_(*a, progress=False, **k))):
        call(m, "W8A8", ignore=["re:.*mlp"])
        call(m, "W4A16")
    fake = output(model)
    same(fake, output(quantized))
    same(output(convert(model)), fake)
