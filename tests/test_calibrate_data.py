"""Calibration data: every kind becomes calls of the model; what cannot be used is named."""

import gc
import json
import sys
import types
import warnings
import weakref

import pytest
import torch

from tritonq.calibrate import data
from tritonq.calibrate.data import Call, digest, record, samples


def letters(text):
    """A tokenizer without special tokens: the code of each character."""
    return [ord(character) for character in text]


def ids(calls):
    return [call.kwargs["input_ids"] for call in calls]


TEXT = "".join(chr(33 + i % 90) for i in range(1000))  # a token says where it is, modulo 90


def is_window_of(tokens, text):
    return "".join(map(chr, tokens.flatten().tolist())) in text


def test_windows_of_a_text():
    calls = samples([TEXT], tokenizer=letters, count=7, seqlen=64, seed=3)
    windows = ids(calls)
    assert len(windows) == 7 and all(w.shape == (1, 64) and w.dtype is torch.int64 for w in windows)
    assert all(is_window_of(w, TEXT) for w in windows) and all(set(call.kwargs) == {"input_ids"} for call in calls)
    again, other = (samples([TEXT], tokenizer=letters, count=7, seqlen=64, seed=seed) for seed in (3, 4))
    assert torch.equal(torch.cat(ids(again)), torch.cat(windows))
    assert not torch.equal(torch.cat(ids(other)), torch.cat(windows))


def test_windows_do_not_overlap():
    """Of a text whose tokens are all different, nothing is taken twice."""
    calls = samples(["x"], tokenizer=lambda text: list(range(1000)), count=15, seqlen=64)
    assert torch.cat(ids(calls)).unique().numel() == 15 * 64


def test_texts_are_put_one_after_the_other():
    texts = [TEXT[:300], TEXT[300:301], TEXT[301:]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in (texts, iter(texts), [{"text": text, "id": 1} for text in texts]):
            calls = samples(given, tokenizer=letters, count=15, seqlen=64)
            assert len(calls) == 15 and all(is_window_of(w, TEXT) for w in ids(calls))


def test_a_very_long_text_is_not_tokenized_whole(monkeypatch):
    monkeypatch.setattr(data, "_CHARACTERS", 1)
    asked = []

    def tokenizer(text):
        asked.append(len(text))
        return letters(text)

    calls = samples([TEXT * 100], tokenizer=tokenizer, count=2, seqlen=16)
    assert len(calls) == 2 and sum(asked) < 2000
    endless = ({"text": TEXT} for _ in iter(int, 1))
    assert len(samples(endless, tokenizer=letters, count=2, seqlen=16)) == 2


def test_too_little_text():
    with pytest.raises(ValueError, match="has 999 tokens, less than one sample of 1000"):
        samples([TEXT[:999]], tokenizer=letters, count=2, seqlen=1000)
    with pytest.warns(UserWarning, match="makes 3 samples of 300 tokens, 128 were asked for"):
        assert len(samples([TEXT], tokenizer=letters, seqlen=300)) == 3


def test_no_more_tokens_than_positions():
    config = types.SimpleNamespace(max_position_embeddings=32, vocab_size=128)
    model = torch.nn.Linear(1, 1)
    model.config = config
    for one in (config, model):
        assert all(w.shape == (1, 32) for w in ids(samples([TEXT], one, tokenizer=letters, count=3, seqlen=2048)))
    with pytest.raises(ValueError, match="token id 200 is beyond the model's vocabulary of 128"):
        samples([torch.tensor([1, 200])], config, count=1)


@pytest.fixture
def bert_like(tmp_path):
    """A tokenizer of words that puts [CLS] and [SEP] around a text."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, **{f"w{i}": 4 + i for i in range(100)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer/config.json").write_text('{"model_type": "bert"}')
    return tmp_path / "tokenizer"


def test_special_tokens_go_around_each_window(bert_like):
    text = " ".join(f"w{i}" for i in range(100))
    model = types.SimpleNamespace(name_or_path=str(bert_like))
    for calls in (
        samples([text], tokenizer=bert_like, count=5, seqlen=16),
        samples([text], model, count=5, seqlen=16),
    ):
        for window in ids(calls):
            row = window[0].tolist()
            assert len(row) == 16 and row[0] == 1 and row[-1] == 2
            assert row[1:-1] == list(range(row[1], row[1] + 14))  # consecutive words
    with pytest.raises(ValueError, match="leaves no room beside the 2 tokens"):
        samples([text], tokenizer=bert_like, count=1, seqlen=2)


def test_files(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": TEXT[i : i + 100]}) for i in range(0, 1000, 100)))
    (tmp_path / "a.json").write_text(json.dumps([TEXT[:500], TEXT[500:]]))
    (tmp_path / "b.json").write_text(json.dumps({"text": [TEXT]}, indent=1))
    wanted = samples([TEXT], tokenizer=letters, count=15, seqlen=64)
    for name in ("a.txt", "a.json", "b.json", "a.jsonl"):
        for path in (tmp_path / name, str(tmp_path / name)):
            found = samples(path, tokenizer=letters, count=15, seqlen=64)
            assert len(found) == 15 and all(is_window_of(w, TEXT) for w in ids(found)), name
    assert torch.equal(ids(samples(tmp_path / "a.txt", tokenizer=letters, count=15, seqlen=64))[3], ids(wanted)[3])


def test_the_default_is_the_language_reference():
    calls = samples(None, tokenizer=letters, count=3, seqlen=200)
    assert all(is_window_of(w, data.default_text()) for w in ids(calls))


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("nowhere.txt", {}, "calibration data nowhere.txt does not exist; pass a text"),
        (".", {}, "is a folder"), (3, {}, "cannot be int"), ([], {}, "no calibration data in an empty list"),
        (["text"], {}, "pass tokenizer="), ([3.5], {}, "holds float"), ([None], {}, "holds NoneType"),
        (["text", 3], {"tokenizer": letters}, "mixes texts and int"),
        ([torch.ones(2, 2, 2).long()], {}, r"\[2, 2, 2\]"),
        ([{"prompt": "x", "answer": "y"}], {}, "prompt, answer, and none is 'text'"),
        (["x"], {"tokenizer": "/nowhere/at/all"}, "no tokenizer that could be loaded"),
        (["x"], {"count": 0}, "got 0 and"), (["x"], {"seqlen": 0}, "and 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(given, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        samples(given, **options)
    assert "\n" not in str(caught.value)


def test_broken_files(tmp_path):
    for name, content in (("a.json", b"{"), ("b.txt", b"\xff\xfe\x00"), ("c.jsonl", b"[1]\n[2]"), ("d.jsonl", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            samples(tmp_path / name, tokenizer=letters)


def test_hub(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": TEXT}))
    asked = []

    class Api:
        def list_repo_files(self, name, repo_type):
            return ["README.md", "test.jsonl", "train.jsonl"]

    def download(name, file, repo_type):
        asked.append((name, file, repo_type))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert len(samples("someone/texts", tokenizer=letters, count=3, seqlen=64)) == 3
    assert asked == [("someone/texts", "train.jsonl", "dataset")]

    streamed = types.SimpleNamespace(load_dataset=lambda name, split, streaming: iter([{"text": TEXT}]))
    monkeypatch.setitem(sys.modules, "datasets", streamed)
    assert len(samples("someone/texts", tokenizer=letters, count=3, seqlen=64)) == 3 and len(asked) == 1

    def fail(*args, **kwargs):
        raise ConnectionError("no route\nand more")

    streamed.load_dataset = fail
    with pytest.raises(FileNotFoundError, match=r"someone/texts .*\(no route\); pass a text"):
        samples("someone/texts", tokenizer=letters)


# --------------------------------------------------------------------------------------------------- other kinds


def test_token_ids():
    rows = torch.arange(24).view(4, 6)
    for given in (rows, list(rows), [rows[:3], rows[3:]], rows.tolist(), rows.int()):
        found = sorted(ids(samples(given, count=4, seqlen=8)), key=lambda one: int(one[0, 0]))
        assert len(found) == 4 and torch.equal(torch.cat(found), rows) and found[0].dtype is torch.int64
    cut = ids(samples([torch.arange(20)], count=2, seqlen=8))
    assert torch.equal(torch.cat(cut), torch.arange(16).view(2, 8))


def test_a_choice_is_made_with_the_seed_of_sequences_only():
    rows = [torch.full((4,), i) for i in range(100)]
    one, same, other = (ids(samples(rows, count=5, seqlen=8, seed=seed)) for seed in (1, 1, 2))
    first = [int(row[0, 0]) for row in one]
    assert first == [int(row[0, 0]) for row in same] != [int(row[0, 0]) for row in other]
    assert len(set(first)) == 5 and max(first) > 20
    drawn = []

    def stream():
        for row in rows:
            drawn.append(row)
            yield row

    assert [int(row[0, 0]) for row in ids(samples(stream(), count=5, seqlen=8))] == [0, 1, 2, 3, 4]
    assert len(drawn) == 5


def test_arguments_are_taken_as_they_are():
    x = torch.randn(2, 3)
    calls = samples([(x, 5), x, {"pixels": x, "flag": True}, Call((1,), {"k": 2})], count=4)
    kinds = {(len(call.args), tuple(call.kwargs)) for call in calls}
    assert kinds == {(2, ()), (1, ()), (0, ("pixels", "flag")), (1, ("k",))}
    assert next(call for call in calls if call.kwargs.get("flag")).kwargs["pixels"] is x


def test_padding_keeps_its_mask():
    tokens, mask = torch.arange(12).view(3, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    calls = samples(iter([{"input_ids": tokens, "attention_mask": mask, "use_cache": False}]), count=3)
    assert [call.kwargs["input_ids"].tolist() for call in calls] == [[row] for row in tokens.tolist()]
    assert [call.kwargs["attention_mask"].tolist() for call in calls] == [[row] for row in mask.tolist()]
    assert all(call.kwargs["use_cache"] is False for call in calls)
    # Patches of images have rows of their own, which cannot be told apart: the batch stays one sample.
    (call,) = samples([{"input_ids": tokens, "pixel_values": torch.randn(7, 5)}], count=1)
    assert call.kwargs["input_ids"].shape == (3, 4) and call.kwargs["pixel_values"].shape == (7, 5)
    (call,) = samples([{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 0]}], count=1)  # a row of a data set
    assert call.kwargs["input_ids"].tolist() == [[1, 2, 3]] and call.kwargs["attention_mask"].tolist() == [[1, 1, 0]]


def test_data_loader():
    loader = torch.utils.data.DataLoader(torch.arange(40).view(10, 4), batch_size=4)
    found = ids(samples(loader, count=6, seqlen=4))
    assert torch.equal(torch.cat(found), torch.arange(24).view(6, 4))


def test_digest_tells_samples_apart():
    def call(value, **changes):
        return Call((torch.tensor([value, 1.0]),), {"mask": None, "n": 3, **changes})

    assert digest([call(0.0)]) == digest([call(0.0)])
    others = [
        [call(-0.0)],
        [call(0.0), call(0.0)],
        [call(0.0, n=4)],
        [call(0.0, mask=torch.ones(()))],
        [Call((torch.tensor([[0.0, 1.0]]),), {"mask": None, "n": 3})],
    ]
    assert len({digest(calls) for calls in [[call(0.0)], *others]}) == 6


# ------------------------------------------------------------------------------------------------ recorded calls


class Denoiser(torch.nn.Module):
    def forward(self, sample, timestep, encoder_hidden_states=None, extra=None):
        return sample + 1


def test_record_is_a_fair_choice_of_the_calls():
    """Each of 20 calls is kept with probability 5 / 20; over 400 seeds the mean is 100 with a deviation of 8.7."""
    model = Denoiser()

    def run():
        for step in range(20):
            model(torch.full((1,), float(step)), step)

    counts = [0] * 20
    for seed in range(400):
        calls = record(model, run, limit=5, seed=seed)
        steps = [call.args[1] for call in calls]
        assert len(steps) == 5 and steps == sorted(steps)
        assert all(float(call.args[0]) == call.args[1] for call in calls)
        for step in steps:
            counts[step] += 1
    assert all(60 < count < 140 for count in counts), counts
    assert not model._forward_pre_hooks


def test_record_holds_no_more_than_the_limit(monkeypatch):
    model, held, peak = Denoiser(), [], 0
    original = torch.Tensor.to

    def to(self, *args, **kwargs):
        nonlocal peak
        copy = original(self, *args, **kwargs)
        if kwargs.get("copy"):
            held.append(weakref.ref(copy))
            gc.collect()
            peak = max(peak, sum(one() is not None for one in held))
        return copy

    monkeypatch.setattr(torch.Tensor, "to", to)
    calls = record(model, lambda: [model(torch.ones(1), step) for step in range(50)], limit=4)
    assert len(calls) == 4 and len(held) > 4 and peak == 4


def test_record_copies_what_changes_and_shares_what_does_not():
    model, text, latents = Denoiser(), torch.randn(3, 4), torch.zeros(2)

    def run():
        for step in range(3):
            model(latents, timestep=step, encoder_hidden_states=text, extra={"ids": [text, None]})
            latents.add_(1)
        text.zero_()

    before = text.clone()
    calls = record(model, run, limit=10)
    assert [call.args[0].tolist() for call in calls] == [[0, 0], [1, 1], [2, 2]]
    assert [call.kwargs["timestep"] for call in calls] == [0, 1, 2]
    kept = [call.kwargs["encoder_hidden_states"] for call in calls] + [call.kwargs["extra"]["ids"][0] for call in calls]
    assert all(one is kept[0] for one in kept) and torch.equal(kept[0], before)


def test_record_in_inference_mode():
    model, latents = Denoiser(), None

    def run():
        nonlocal latents
        with torch.inference_mode():
            latents = torch.zeros(2)
            for step in range(3):
                model(latents, step)
                latents.add_(1)

    assert [call.args[0].tolist() for call in record(model, run, limit=10)] == [[0, 0], [1, 1], [2, 2]]


def test_record_errors_leave_no_hook():
    model = Denoiser()
    with pytest.raises(ValueError, match="Denoiser was not called"):
        record(model, lambda: None, limit=1)
    with pytest.raises(ZeroDivisionError):
        record(model, lambda: 1 / 0, limit=1)
    with pytest.raises(ValueError, match="from 1, got 0"):
        record(model, lambda: None, limit=0)
    assert not model._forward_pre_hooks
