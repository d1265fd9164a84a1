"""Families of models through `quantize_(calibration=)`, tiny and random: what comes out is finite, nearer to the dense
model than rounding to nearest under the same rule for scales, and the same every time; the report is filled."""

import copy
import functools
import json
import warnings

import pytest
import torch
from torch import nn

import tritonq as tq
from tritonq.calibrate import find_blocks
from tritonq.calibrate.data import Call, record, samples

hf = pytest.importorskip("transformers")

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "max_position_embeddings": 64}  # fmt: skip
OPTIONS = {"signround": {"iters": 12}, "gptq": {}, "awq": {}}


pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(count, length, seed=1):
    """Some tokens are much more frequent than others, as in text."""
    frequency = 1.0 / torch.arange(1, 96, dtype=torch.float64)
    drawn = torch.multinomial(frequency, count * length, True, generator=torch.Generator().manual_seed(seed))
    return drawn.reshape(count, length)


def llama():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, tie_word_embeddings=False)), list(ids(12, 16)[:, None])


def qwen3_moe():
    config = hf.Qwen3MoeConfig(
        **SMALL, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1,
        mlp_only_layers=[], tie_word_embeddings=False,
    )  # fmt: skip
    model = hf.Qwen3MoeForCausalLM(config)
    model.model.layers[0].mlp.gate.register_forward_hook(_without_the_last)
    return model, list(ids(16, 16)[:, None])


def _without_the_last(gate, inputs, outputs):
    """Scores and choices of the router, expert 3 replaced by one that was not chosen."""
    logits, scores, chosen = outputs
    other = torch.stack([(chosen[:, 1 - i] + 1) % 3 for i in range(2)], -1)
    return logits, scores, torch.where(chosen == 3, other, chosen)


def qwen3_vl():
    """Images of several sizes in the text, and one sample without any."""
    text = {**SMALL, "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4,
              "out_hidden_size": 64, "spatial_merge_size": 2, "temporal_patch_size": 2,
              "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}  # fmt: skip
    config = hf.Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=95, vision_start_token_id=94, vision_end_token_id=93,
        video_token_id=92, tie_word_embeddings=False,
    )  # fmt: skip
    calls = []
    for i, (height, width) in enumerate([(4, 4), (4, 8), (8, 4), (4, 4), (8, 8), (0, 0)] * 2):
        patches, text = height * width, ids(1, 12, seed=i) % 90
        if not patches:
            calls.append({"input_ids": text})
            continue
        image = torch.tensor([94, *[95] * (patches // 4), 93])[None]
        tokens = torch.cat([text[:, :4], image, text[:, 4:]], 1)
        calls.append({
            "input_ids": tokens, "attention_mask": torch.ones_like(tokens),
            "pixel_values": random(patches, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, height, width]]),
            "mm_token_type_ids": (tokens == 95).int(),
        })  # fmt: skip
    return hf.Qwen3VLForConditionalGeneration(config), [Call(kwargs=call) for call in calls]


def bert():
    """Sentences of several lengths, padded."""
    config = hf.BertConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=64,
    )  # fmt: skip
    mask = torch.arange(20)[None] < torch.tensor([20, 13, 7, 16] * 4)[:, None]
    return hf.BertModel(config), [{"input_ids": ids(16, 20) * mask, "attention_mask": mask.long()}]


class Double(nn.Module):
    """A block of two streams, which are modulated by the time step and see each other."""

    def __init__(self):
        super().__init__()
        self.modulation = nn.Linear(64, 128)
        self.image, self.text = nn.Linear(64, 64), nn.Linear(64, 64)
        self.mlp, self.mlp_text = (nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)) for _ in range(2))

    def forward(self, hidden_states, encoder_hidden_states, temb, scale=1.0):
        shift, gain = self.modulation(temb)[:, None].chunk(2, -1)
        x = nn.functional.layer_norm(hidden_states, (64,)) * (1 + gain) + shift
        q, k = self.image(x), self.text(encoder_hidden_states)
        both = torch.cat([q, k], 1)
        seen = nn.functional.scaled_dot_product_attention(both, both, both)
        hidden_states = hidden_states + scale * self.mlp(seen[:, : q.shape[1]])
        return encoder_hidden_states + self.mlp_text(seen[:, q.shape[1] :]), hidden_states


class Single(nn.Module):
    def __init__(self):
        super().__init__()
        self.modulation, self.mlp = nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))

    def forward(self, hidden_states, temb):
        return hidden_states + self.mlp(nn.functional.layer_norm(hidden_states, (64,)) + self.modulation(temb)[:, None])


class DiT(nn.Module):
    """Two lists of blocks of different classes, called with keyword arguments."""

    def __init__(self):
        super().__init__()
        self.time, self.inner, self.outer = nn.Linear(1, 64), nn.Linear(16, 64), nn.Linear(64, 16)
        self.transformer_blocks = nn.ModuleList(Double() for _ in range(2))
        self.single_transformer_blocks = nn.ModuleList(Single() for _ in range(2))

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        temb = self.time(timestep[:, None])
        x, text = self.inner(hidden_states), encoder_hidden_states
        for block in self.transformer_blocks:
            text, x = block(hidden_states=x, encoder_hidden_states=text, temb=temb)
        x = torch.cat([text, x], 1)
        for block in self.single_transformer_blocks:
            x = block(hidden_states=x, temb=temb)
        return self.outer(x[:, text.shape[1] :])


def diffusion():
    """Denoising of three prompts in ten steps, of which 12 calls are kept."""
    model = DiT()

    def pipeline():
        for prompt in range(3):
            latent, text = random(1, 12, 16, seed=prompt), random(1, 5, 64, seed=10 + prompt)
            for step in range(10):
                noise = model(latent, encoder_hidden_states=text, timestep=torch.tensor([1 - step / 10]))
                latent = latent - 0.1 * noise

    return model, record(model, pipeline, limit=12, seed=0)


class Stage(nn.Module):
    """A block of ConvNeXt: a convolution, then linear layers over channels."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x):
        y = self.norm(self.convolution(x).permute(0, 2, 3, 1))
        return x + self.down(nn.functional.gelu(self.up(y))).permute(0, 3, 1, 2)


def convolutions():
    model = nn.Sequential(
        nn.Conv2d(3, 32, 2, 2), Stage(), Stage(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 8)
    )
    return model, [(random(1, 3, 12, 12, seed=i),) for i in range(8)]


def perceptron():
    layers = (nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 16))
    return nn.Sequential(*layers), [(random(8, 64, seed=i) * torch.linspace(0.1, 3, 64),) for i in range(8)]


FAMILIES = {  # how many blocks each has, and how their names begin
    llama: (2, "model.layers."), qwen3_moe: (2, "model.layers."), qwen3_vl: (2, "model.language_model.layers."),
    bert: (2, "encoder.layer."), diffusion: (4, ""), convolutions: (2, ""), perceptron: (1, ""),
}  # fmt: skip


@functools.cache
def family(build):
    """(dense model, data, calls, dense outputs)."""
    torch.manual_seed(0)
    model, data = build()
    model.eval().requires_grad_(False)
    for module in model.modules():  # channels of very different size, as norms of trained models make them
        if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
            module.weight.copy_(random(*module.weight.shape).exp())
    with warnings.catch_warnings(action="ignore"):  # there are fewer
        calls = samples(data, model, count=16, seqlen=64)
    return model, data, calls, outputs(model, calls)


@torch.no_grad()
def outputs(model, calls):
    found = [model(*call.args, **call.kwargs) for call in calls]
    found = [y if isinstance(y, torch.Tensor) else y[0] for y in found]
    masks = [call.kwargs.get("attention_mask") for call in calls]
    return [y if mask is None else y[mask.bool()] for y, mask in zip(found, masks, strict=True)]


def error(model, calls, wanted):
    found = outputs(model, calls)
    assert all(torch.isfinite(y).all() for y in found)
    return float(sum((y.double() - t.double()).square().sum() for y, t in zip(found, wanted, strict=True)))


def calibrated(build, method, device=None, **options):
    model, data, calls, _ = family(build)
    options = {"samples": len(calls), "batch": 4, **OPTIONS.get(method, {}), **options}
    calibration = tq.Calibration(data, method=method, **options)
    model = copy.deepcopy(model)
    found = tq.quantize_(
        model, "W3A16", group_size=32, search=False, calibration=calibration, device=device, progress=False
    )
    assert found is model
    return model, calibration.result


@functools.cache
def nearest(build):
    model, _, calls, wanted = family(build)
    plain = tq.quantize_(copy.deepcopy(model), "W3A16", group_size=32, search=False, progress=False)
    return error(plain, calls, wanted)


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("build", FAMILIES, ids=lambda build: build.__name__)
def test_nearer_than_rounding_to_nearest(build, method, tmp_path):
    _, _, calls, wanted = family(build)
    model, report = calibrated(build, method, report=tmp_path)
    if (build, method) == (diffusion, "awq"):  # its norms have no weights, so nothing can take scales over
        notes = [notes["awq"] for row in report.blocks for notes in row.layers.values()]
        assert set(notes) == {"nothing before it can be scaled"}
        assert error(model, calls, wanted) == nearest(build)
    else:
        assert error(model, calls, wanted) < nearest(build)
    count, prefix = FAMILIES[build]
    assert len(report.blocks) == count and all(row.name.startswith(prefix) for row in report.blocks)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["complete"] and content["method"] == method and content["scheme"] == "W3A16"
    for row in content["blocks"]:
        assert row["loss_after"] <= row["loss_before"] and row["seconds"] > 0 and row["layers"]
    weights = [p for p in model.parameters() if isinstance(p, tq.QTensor)]
    assert weights and all(w.format.name.startswith("int3_g32") for w in weights)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["signround", "gptq"])
@pytest.mark.parametrize("build", FAMILIES, ids=lambda build: build.__name__)
def test_models_of_the_host_visit_the_gpu(build, method):
    _, _, calls, wanted = family(build)
    model, report = calibrated(build, method, device="cuda")
    assert error(model, calls, wanted) < nearest(build)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert any(key.startswith("cuda") for key in report.peak_bytes)


def stored(model):
    """Every tensor of the model as bytes, QTensors by their parts."""
    found = {}
    for name, tensor in model.state_dict().items():
        parts = tensor.parts() if isinstance(tensor, tq.QTensor) else {"": tensor}
        found |= {f"{name} {part}": bytes(own.contiguous().view(torch.uint8).numpy()) for part, own in parts.items()}
    return found


@pytest.mark.parametrize("build", [llama, qwen3_moe, qwen3_vl, diffusion], ids=lambda build: build.__name__)
def test_same_bytes_with_a_seed(build):
    first, second = (stored(calibrated(build, "signround", seed=3, iters=8)[0]) for _ in range(2))
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_other_bytes_with_another_seed():
    first, second = (stored(calibrated(llama, "signround", seed=seed, iters=8)[0]) for seed in (3, 4))
    assert first != second


@pytest.mark.parametrize("method", ["signround", "gptq"])
def test_experts_that_saw_nothing_fall_back_and_are_reported(method):
    model, report = calibrated(qwen3_moe, method)
    tokens = report.tokens_by_expert["model.layers.0.mlp.experts"]
    assert tokens[3] == 0 and all(count > 0 for count in tokens[:3])
    assert sum(tokens) == 2 * 16 * 16  # two experts for each token
    key = "model.layers.0.mlp.experts.gate_up_proj"
    assert report.fallbacks[key] == [3]
    dense = family(qwen3_moe)[0].model.layers[0].mlp.experts.gate_up_proj
    plain = tq.quantize(dense, "int3_g32_f32").dequantize()
    found = model.model.layers[0].mlp.experts.gate_up_proj.dequantize()
    assert torch.equal(found[3], plain[3])
    assert not any(torch.equal(found[i], plain[i]) for i in range(3))


def test_sight_is_rounded_and_language_calibrated():
    model, _ = calibrated(qwen3_vl, "gptq")
    plain = tq.quantize_(copy.deepcopy(family(qwen3_vl)[0]), "W3A16", group_size=32, search=False, progress=False)
    same = {
        name: torch.equal(q.dequantize(), plain.get_parameter(name).dequantize())
        for name, q in model.named_parameters()
        if isinstance(q, tq.QTensor)
    }
    assert {name for name, equal in same.items() if equal} == {name for name in same if ".visual." in name}
    assert any(".visual." in name for name in same)


def test_what_is_no_linear_layer_stays():
    model, _ = calibrated(convolutions, "gptq")
    dense = family(convolutions)[0]
    for name, module in dense.named_modules():
        if isinstance(module, nn.Conv2d):
            assert torch.equal(model.get_submodule(name).weight, module.weight)


ONE = {**SMALL, "num_hidden_layers": 1}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**ONE)), ["model.layers.0"]),
        (lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**ONE, **EXPERTS)), ["model.layers.0"]),
        (
            lambda: hf.T5ForConditionalGeneration(
                hf.T5Config(d_model=64, d_kv=16, d_ff=128, num_heads=4, num_layers=1)
            ),
            ["encoder.block.0", "decoder.block.0"],
        ),
    ],
)
def test_a_model_of_one_layer_has_a_block(model, expected):
    """And what is around it stays out: tuning for the logits of a tiny model moved the wrong weights."""
    assert [name for name, _ in find_blocks(model())] == expected


def test_a_list_of_one_head_is_no_block():
    """Most of the model is beside the list."""
    model = nn.Module()
    model.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model.heads = nn.ModuleList([nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 2))])
    assert not any(name.startswith("heads.") for name, _ in find_blocks(model))
