"""Tiny random models of many shapes, with calls for them: what calibration goes through block by block."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}


def call(*args, **kwargs):
    """A sample, as `tritonq.calibrate.data.Call`."""
    return SimpleNamespace(args=args, kwargs=kwargs)


def ids(length: int, seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(seed: int, length: int = 9):
    return call(input_ids=ids(length, seed))


def padded(seed: int, used: int, length: int = 9):
    mask = (torch.arange(length) < used).long()[None]
    return call(input_ids=ids(length, seed), attention_mask=mask)


def llama(hf):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE)), [text(0), text(1), text(2), text(3, 7)]


def llama_padded(hf):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE)), [padded(0, 9), padded(1, 6), padded(2, 6), padded(3, 9)]


def qwen3_moe(hf):
    config = hf.Qwen3MoeConfig(**SHAPE, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
    model = hf.Qwen3MoeForCausalLM(config)
    model.config._experts_implementation = "eager"
    return model, [text(0), text(1)]


def gemma3n(hf):
    """Sliding and full attention, an input of its own for each layer, keys that later layers take over, four residual
    streams, and projections of them in lists beside the blocks."""
    config = hf.Gemma3nTextConfig(
        **{**SHAPE, "num_hidden_layers": 6, "intermediate_size": [96] * 6},
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64,
        num_kv_shared_layers=2,
        sliding_window=4,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 6,
        layer_types=["sliding_attention", "full_attention"] * 3,
    )
    return hf.Gemma3nForCausalLM(config), [padded(0, 9), padded(1, 9), padded(2, 5, 7)]


def bert(hf):
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
    return hf.BertModel(hf.BertConfig(**sizes, num_hidden_layers=2)), [padded(0, 6), padded(1, 7), text(2, 5)]


def t5(hf):
    config = hf.T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    calls = [call(input_ids=ids(9, seed), decoder_input_ids=ids(5, seed + 5), use_cache=False) for seed in range(2)]
    return hf.T5ForConditionalGeneration(config), calls


def qwen3_vl(hf):
    """Features of an image are added between the first language layers."""
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 2,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    tokens = {"image_token_id": 61, "video_token_id": 62, "vision_start_token_id": 60, "vision_end_token_id": 63}
    language = {**SHAPE, "num_hidden_layers": 4, "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]}}
    model = hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(text_config=language, vision_config=vision, **tokens))
    return model, [picture(0, 4, 4), picture(1, 4, 4), picture(2, 4, 6), padded(3, 9)]


def picture(seed: int, height: int, width: int):
    """An image of so many patches of 2 x 2 pixels, four of which are a token, between seven tokens of text."""
    image = torch.tensor([[60] + [61] * (height * width // 4) + [63]])
    tokens = torch.cat([ids(3, seed), image, ids(4, seed + 7)], 1)
    return call(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        mm_token_type_ids=(tokens == 61).long(),
        pixel_values=noise(height * width, 24, seed=seed),
        image_grid_thw=torch.tensor([[1, height, width]]),
    )


class Joint(nn.Module):
    """Two streams that look at each other, as the double blocks of diffusion transformers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.image, self.text, self.time = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden, context, *, embedding, rotary):
        both = torch.cat([context, hidden], 1) * rotary
        mixed = both + both.mean(1, keepdim=True) + self.time(embedding)[:, None]
        context_out, hidden_out = mixed.split([context.shape[1], hidden.shape[1]], 1)
        return context + self.text(context_out), hidden + self.image(hidden_out)


class Single(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix, self.time = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, joint, embedding, rotary=None):
        return joint + self.mix(joint * rotary + joint.mean(1, keepdim=True)) * self.time(embedding)[:, None]


class Diffusion(nn.Module):
    """Double blocks over image and text, then single blocks over both put together, as Flux."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.context = nn.Linear(6, width)
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.double_blocks = nn.ModuleList(Joint(width) for _ in range(2))
        self.single_blocks = nn.ModuleList(Single(width) for _ in range(2))
        self.out = nn.Linear(width, 4)

    def forward(self, hidden_states, encoder_hidden_states, timestep, positions):
        hidden, context = self.embed(hidden_states), self.context(encoder_hidden_states)
        embedding = self.time(timestep[:, None])
        rotary = torch.cos(positions)[None, :, None]
        for block in self.double_blocks:
            context, hidden = block(hidden, context, embedding=embedding, rotary=rotary)
        joint = torch.cat([context, hidden], 1)
        for block in self.single_blocks:
            joint = block(joint, embedding, rotary=rotary)
        return self.out(joint[:, context.shape[1] :])


def diffusion(hf=None):
    calls = [
        call(
            noise(1, 6, 4, seed=seed), noise(1, 3, 6, seed=seed + 9), torch.tensor([0.1 + seed]), torch.arange(9.0) / 9
        )
        for seed in range(3)
    ]
    return Diffusion(), calls


class Residual(nn.Module):
    def __init__(self, width: int, skip: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.skip = nn.Linear(2 * width, width) if skip else None

    def forward(self, x, skip=None):
        if self.skip is not None:
            x = self.skip(torch.cat([x, skip], -1))
        return x + self.down(self.up(x).relu())


class LongSkips(nn.Module):
    """Blocks of the second half get outputs of the first, as in U-ViT; the list of them is changed as it goes."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.in_blocks = nn.ModuleList(Residual(width, False) for _ in range(2))
        self.mid_block = Residual(width, False)
        self.out_blocks = nn.ModuleList(Residual(width, True) for _ in range(2))

    def forward(self, x):
        x = self.embed(x)
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop() * 0.5)
        return x


def long_skips(hf=None):
    return LongSkips(), [call(noise(1, 4, 5, seed=seed)) for seed in range(2)]


class Turned(nn.Module):
    """[S, B, H] between the blocks, written to in between; the third gets an order found by sorting what the first
    has put out, through which no gradient flows."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.layers = nn.ModuleList(Residual(width, False) for _ in range(2))
        self.last = nn.ModuleList(Residual(width, True) for _ in range(2))

    def forward(self, x):
        x = self.embed(x).transpose(0, 1)
        x = self.layers[0](x)
        order = x.argsort(0).to(x.dtype)
        x += 1.0
        x = self.layers[1](x)
        x = self.last[0](x, order)
        return self.last[1](x, torch.zeros_like(x))


def turned(hf=None):
    return Turned(), [call(noise(1, 4, 5, seed=seed)) for seed in range(3)]


def plain(hf=None):
    model = nn.Sequential()
    model.first, model.second = nn.Linear(5, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8))
    return model, [call(noise(2, 5, seed=seed)) for seed in range(2)]


TRANSFORMERS = (llama, llama_padded, qwen3_moe, gemma3n, bert, t5, qwen3_vl)
WRITTEN = (diffusion, long_skips, turned, plain)


def build(make) -> tuple[nn.Module, list]:
    """A model and calls for it."""
    hf = None
    if make in TRANSFORMERS:
        import transformers as hf
    torch.manual_seed(0)
    model, calls = make(hf)
    return model.eval(), calls
