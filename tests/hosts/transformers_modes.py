"""transformers: generation and training of a quantized model, also under the hooks of accelerate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .accelerate_modes import restore
from .peft_modes import attached, dense_twin, under_adapters
from .registry import IN_SAFETENSORS, Setting, check_contents, contents, equal, mode, qtensors, save_refused

HOST = "transformers"
TRAINED = ["q_proj", "v_proj", "down_proj"]


def llama() -> nn.Module:
    import transformers as hf

    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


def generate(at: Setting, model: nn.Module) -> Any:
    tokens = torch.arange(10, device=at.device).reshape(2, 5)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = model.generate(tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, **options)
    return torch.cat([found.sequences.float().flatten(), *(logits.float().flatten() for logits in found.logits)])


def generates(at: Setting, apply: Any, rests_on: str) -> None:
    wanted = generate(at, at.model(llama).to(at.device))
    model = at.model(llama)
    before = contents(model)
    with at.nothing_left(model):
        apply(model)
        for step in range(2):
            assert equal(generate(at, model), wanted), f"outputs differ in call {step}"
    check_contents(model, before, rests_on)


@mode(HOST, "generate", slow=True)
def generate_plain(at: Setting) -> None:
    generates(at, lambda model: model.to(at.device), at.device)


@mode(HOST, "generate under accelerate.cpu_offload", slow=True)
def generate_offloaded(at: Setting) -> None:
    from accelerate import cpu_offload

    generates(at, lambda model: cpu_offload(model, torch.device(at.device)), "meta")


@mode(HOST, "generate under accelerate.dispatch_model", devices=("cuda",))
def generate_dispatched(at: Setting) -> None:
    """The embedding, tied to the output head, stays on the device, one layer too, the other goes to the CPU."""
    from accelerate import dispatch_model

    device_map = {
        "model.embed_tokens": 0, "lm_head": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.norm": 0,
        "model.rotary_emb": 0,
    }  # fmt: skip
    wanted = generate(at, at.model(llama).to(at.device))
    model = at.model(llama)
    before = contents(model)
    with at.nothing_left(model):
        dispatch_model(model, device_map, main_device=0)
        for step in range(2):
            assert equal(generate(at, model), wanted), f"outputs differ in call {step}"
        found = {name: q.device.type for name, q in qtensors(model).items()}
        assert all(device == (at.device if ".layers.0." in name else "meta") for name, device in found.items()), found
    restore(model)
    check_contents(model.to("cpu"), before, "cpu")


@mode(HOST, "save_pretrained", error=RuntimeError, message=IN_SAFETENSORS)
def saved(at: Setting) -> None:
    save_refused(at, lambda model, folder: model.save_pretrained(folder), llama)


@mode(HOST, "Trainer with LoRA, gradient checkpointing", slow=True)
def trainer(at: Setting) -> None:
    import transformers as hf

    data = [{"input_ids": list(range(i, i + 6)), "labels": list(range(i, i + 6))} for i in range(8)]

    def train(model: nn.Module) -> dict[str, torch.Tensor]:
        model = attached(model, target_modules=TRAINED, task_type="CAUSAL_LM")
        arguments = hf.TrainingArguments(
            output_dir=str(at.folder), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
            save_strategy="no", logging_strategy="no", use_cpu=at.device == "cpu", gradient_checkpointing=True,
            disable_tqdm=True, seed=0,
        )  # fmt: skip
        hf.Trainer(model=model, args=arguments, train_dataset=data).train()
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    from accelerate.state import AcceleratorState

    base = at.model(llama)
    before = contents(base)
    try:
        wanted, found = train(dense_twin(base)), train(base)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)  # which is the process's
    assert wanted and all(equal(found[name], tensor) for name, tensor in wanted.items())
    check_contents(base, under_adapters(before, TRAINED), at.device)
