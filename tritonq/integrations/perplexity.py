"""Perplexity and greedy text of a checkpoint, through transformers alone: what a user without tritonq gets."""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings of the libraries that load models; stderr is for our own messages."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import tqdm
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bar = tqdm.tqdm.__init__  # compressed-tensors draws bars of its own, which nothing else turns off

    def silent(self: Any, *args: Any, **kwargs: Any) -> None:
        bar(self, *args, **{**kwargs, "disable": True})

    tqdm.tqdm.__init__ = silent  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            tqdm.tqdm.__init__ = bar  # type: ignore[method-assign]
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


def load(model: str | Path, device: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a causal language model checkpoint, dense or compressed-tensors.

    Raises:
        ValueError: transformers is missing or cannot load it. FileNotFoundError: no such folder.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise ValueError("evaluation needs transformers; pip install 'tritonq[hf]'") from None
    folder = Path(model)
    if not folder.exists() and str(model).count("/") != 1:
        raise FileNotFoundError(
            f"{model} does not exist; pass the folder of a checkpoint or a hub id such as org/model"
        )
    options: dict[str, Any] = {"dtype": "auto"}
    if _asymmetric(folder):  # transformers' compressed loading path takes symmetric weights only
        from transformers import CompressedTensorsConfig

        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(model)
            loaded = AutoModelForCausalLM.from_pretrained(model, **options).eval()
    except Exception as error:  # whatever a loader raises becomes one line
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"transformers cannot load {model} as a causal language model: {reason}") from error
    try:
        return (loaded.to(device) if device else loaded), tokenizer
    except (RuntimeError, AssertionError) as error:  # torch raises either, by what is missing
        raise ValueError(f"device {device} cannot be used: {str(error).strip().split(chr(10))[0]}") from None


def _asymmetric(folder: Path) -> bool:
    config = folder / "config.json"
    if not config.is_file():
        return False
    groups = json.loads(config.read_text(encoding="utf-8")).get("quantization_config", {}).get("config_groups", {})
    return any((group.get("weights") or {}).get("symmetric") is False for group in groups.values())


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, text: str, windows: int = 4, length: int = 512) -> float:
    """exp(mean negative log-likelihood) of the first `windows` windows of `length` tokens, each on its own.

    Raises:
        ValueError: the text is too short for one window of two tokens.
    """
    with quiet_transformers():
        tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    pieces = [piece for piece in tokens[: windows * length].split(length) if len(piece) > 1]
    if not pieces:
        raise ValueError(f"the text has {len(tokens)} tokens; perplexity needs at least 2")
    total, count = 0.0, 0
    for piece in pieces:
        piece = piece.to(model.device)
        with quiet_transformers():
            logits = model(piece[None]).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum"))
        count += len(piece) - 1
    return math.exp(total / count)


@torch.no_grad()
def complete(model: Any, tokenizer: Any, prompt: str, tokens: int = 24) -> str:
    """The prompt continued greedily by at most `tokens` tokens."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    with quiet_transformers():
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(output[0], skip_special_tokens=True)
