"""Bad input: one line that names the culprit and the way out, and nothing under the final name."""

import json
import os

import models
import pytest
import torch

from tritonq.io.checkpoint import quantize_checkpoint

pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path):
    return models.save("llama", tmp_path / "in" / "tiny", num_hidden_layers=1)


def refused(source, out, *words, kind=(ValueError, OSError), scheme="W4A16", **options):
    """The message of the error, which has one line with all `words`; nothing is left beside or at `out`."""
    before = set(out.parent.iterdir()) if out.parent.is_dir() else None
    with pytest.raises(kind) as caught:
        quantize_checkpoint(source, out, scheme, progress=False, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, message
    for word in words:
        assert word in message, message
    if before is not None:
        assert set(out.parent.iterdir()) == before
    return message


# ---------------------------------------------------------------------------------------------------------- source


def test_truncated_file(folder, tmp_path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, tmp_path / "out", "model.safetensors", "cut short", kind=ValueError)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 64, b"version https://git-lfs.github.com/spec/v1\n"])
def test_not_safetensors(content, folder, tmp_path):
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, tmp_path / "out", "model.safetensors", "not a safetensors file", kind=ValueError)


def test_truncated_shard(tmp_path):
    folder = models.save("llama", tmp_path / "in" / "tiny", max_shard_size="300KB")
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:5000])
    refused(folder, tmp_path / "out", path.name, kind=ValueError)


def change_index(folder, change):
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_index_naming_missing_tensors(tmp_path):
    folder = models.save("llama", tmp_path / "in" / "tiny", max_shard_size="300KB")
    file = sorted(folder.glob("*.safetensors"))[0].name
    change_index(folder, lambda index: index["weight_map"].update({"model.ghost.weight": file}))
    refused(folder, tmp_path / "out", "model.ghost.weight", file, kind=ValueError)


def test_index_naming_missing_or_outside_files(tmp_path):
    folder = models.save("llama", tmp_path / "in" / "tiny", max_shard_size="300KB")
    sorted(folder.glob("*.safetensors"))[1].rename(folder / "elsewhere")
    refused(folder, tmp_path / "out", "model-00002-of", "missing", kind=FileNotFoundError)
    change_index(folder, lambda index: index["weight_map"].update({"x.weight": "../../secret.safetensors"}))
    refused(folder, tmp_path / "out", "x.weight", "not the name of a file", kind=ValueError)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"weight_map": {}}'])
def test_broken_index(text, tmp_path):
    folder = models.save("llama", tmp_path / "in" / "tiny", max_shard_size="300KB")
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, tmp_path / "out", "model.safetensors.index.json", kind=ValueError)


def test_shards_without_an_index(tmp_path):
    folder = models.save("llama", tmp_path / "in" / "tiny", max_shard_size="300KB")
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, tmp_path / "out", "model.safetensors.index.json", kind=FileNotFoundError)


def test_broken_config(folder, tmp_path):
    (folder / "config.json").write_text('{"architectures": [')
    refused(folder, tmp_path / "out", "config.json", kind=ValueError)


def test_config_of_another_model(folder, tmp_path):
    models.edit_config(folder, hidden_size=512)
    refused(folder, tmp_path / "out", "has shape", "config.json", kind=ValueError)


def test_no_source(tmp_path, monkeypatch):
    refused(tmp_path / "nowhere", tmp_path / "out", "nowhere", "does not exist", kind=FileNotFoundError)
    refused(tmp_path / "nowhere.gguf", tmp_path / "out", "nowhere.gguf", kind=FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "out", "holds no safetensors", kind=FileNotFoundError)
    (tmp_path / "file.bin").write_bytes(b"x")
    refused(tmp_path / "file.bin", tmp_path / "out", "file.bin", kind=ValueError)
    (tmp_path / "broken.gguf").write_bytes(b"GGUFnot really")
    refused(tmp_path / "broken.gguf", tmp_path / "out", "broken.gguf", kind=ValueError)


def test_unreachable_hub(tmp_path, monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise ConnectionError("no route\nand a long traceback")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused("someone/some-model", tmp_path / "out", "someone/some-model", "no route", kind=FileNotFoundError)


def test_already_quantized(folder, tmp_path):
    quantize_checkpoint(folder, tmp_path / "once", "W8A16", progress=False)
    refused(tmp_path / "once", tmp_path / "out", "once", "already quantized", kind=ValueError)


def test_nothing_to_quantize(folder, tmp_path):
    refused(folder, tmp_path / "out", "no linear layers", kind=ValueError, ignore=["re:.*"])


# --------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("name", "count"), [("model.layers.0.mlp.up_proj.weight", 3), ("model.embed_tokens.weight", 2)]
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4"])
def test_non_finite_weights(name, count, value, scheme, folder, tmp_path):
    content = models.tensors(folder)
    content[name].view(-1)[:count] = value
    models.write(folder, content)
    refused(folder, tmp_path / "out", name, f"{count} elements", "NaN", kind=ValueError, scheme=scheme)


def test_overflow_of_dtype(tmp_path):
    folder = models.save("llama", tmp_path / "in" / "tiny", num_hidden_layers=1)
    content = models.tensors(folder)
    content["model.layers.0.mlp.up_proj.weight"][3, 5] = 1e6
    models.write(folder, content)
    refused(folder, tmp_path / "out", "up_proj", "float16", "bfloat16", kind=ValueError, dtype=torch.float16)
    quantize_checkpoint(folder, tmp_path / "out", "W4A16", progress=False)


# --------------------------------------------------------------------------------------------------------- options


def test_unknown_scheme(folder, tmp_path):
    message = refused(folder, tmp_path / "out", "W5A5", "W4A16", "NVFP4", kind=ValueError, scheme="W5A5")
    assert "known" in message


@pytest.mark.parametrize("entry", ["no_such_layer", "model.layers.7.mlp.up_proj", "re:.*vision.*"])
def test_ignore_that_matches_nothing(entry, folder, tmp_path):
    refused(folder, tmp_path / "out", entry, "matches no module", "q_proj", kind=ValueError, ignore=[entry])


def test_ignore_that_is_no_regex(folder, tmp_path):
    refused(folder, tmp_path / "out", "re:(", "regular expression", kind=ValueError, ignore=["re:("])


def test_ignore_may_name_embeddings_and_checkpoint_modules(folder, tmp_path):
    quantize_checkpoint(
        folder, tmp_path / "a", "W4A16", ignore=["embed_tokens", "lm_head", "down_proj"], progress=False
    )
    mixtral = models.save("mixtral", tmp_path / "mixtral")
    report = quantize_checkpoint(
        mixtral, tmp_path / "b", "W4A16", ignore=[r"re:.*block_sparse_moe\.experts\..*"], progress=False
    )
    assert report.quantized == 8
    report = quantize_checkpoint(
        mixtral, tmp_path / "c", "W4A16", ignore=["model.layers.0.mlp.experts"], progress=False
    )
    assert report.quantized == 8 + 12


def test_experts_of_a_layer_go_together(tmp_path):
    folder = models.save("qwen3moe", tmp_path / "in" / "tiny")
    refused(
        folder, tmp_path / "out", "model.layers.0.mlp.experts.gate_up_proj", "some experts", kind=ValueError,
        ignore=["model.layers.0.mlp.experts.2.up_proj"],
    )  # fmt: skip


def test_groups_that_do_not_fit(tmp_path):
    folder = models.save(
        "llama", tmp_path / "in" / "tiny", hidden_size=192, num_attention_heads=3, num_key_value_heads=3
    )
    refused(folder, tmp_path / "out", "proj.weight", "[", "192", "128", "--group-size 64", kind=ValueError)
    for scheme in ("FP8_BLOCK",):
        refused(folder, tmp_path / "out", "192", "128", "--ignore", kind=ValueError, scheme=scheme)
    refused(folder, tmp_path / "out", "MXFP4", "group", kind=ValueError, scheme="MXFP4", group_size=64)
    refused(folder, tmp_path / "out", "group size", kind=ValueError, group_size=0)
    odd = models.save("llama", tmp_path / "in" / "odd", intermediate_size=200)
    refused(odd, tmp_path / "out", "down_proj", "200", "32", "--ignore", kind=ValueError, scheme="MXFP4")
    refused(odd, tmp_path / "out", "down_proj", "200", kind=ValueError)
    quantize_checkpoint(odd, tmp_path / "out", "FP8_DYNAMIC", progress=False)


@pytest.mark.parametrize("size", ["", "two", "-1", "0", "5XB"])
def test_shard_size(size, folder, tmp_path):
    refused(folder, tmp_path / "out", "max_shard_size", kind=ValueError, max_shard_size=size)


def test_device_and_dtype(folder, tmp_path):
    refused(folder, tmp_path / "out", "nonsense", kind=ValueError, device="nonsense")
    if not torch.cuda.is_available():
        refused(folder, tmp_path / "out", "cuda", kind=ValueError, device="cuda")
    refused(folder, tmp_path / "out", "int8", kind=ValueError, dtype=torch.int8)


# ----------------------------------------------------------------------------------------------------- destination


def test_existing_destination(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("x")
    refused(folder, out, "out", "already exists", "--force", kind=FileExistsError)
    refused(folder, out, "out", "not a checkpoint", kind=FileExistsError, force=True)
    assert (out / "precious.txt").read_text() == "x"
    file = tmp_path / "file"
    file.write_text("x")
    refused(folder, file, "file", kind=FileExistsError)
    refused(folder, file / "out", "file", "not a folder", kind=PermissionError)


def test_destination_that_holds_the_source(folder, tmp_path):
    for out in (folder, folder.parent):
        with pytest.raises(ValueError, match="source"):
            quantize_checkpoint(folder, out, "W4A16", force=True, progress=False)
    link = tmp_path / "link"
    link.symlink_to(folder)
    with pytest.raises(ValueError, match="source"):
        quantize_checkpoint(link, folder, "W4A16", force=True, progress=False)
    assert (folder / "model.safetensors").exists()


def test_unwritable_destination(folder, tmp_path):
    if os.geteuid() == 0:
        parent = "/proc"  # refuses even root
    else:
        parent = tmp_path / "locked"
        parent.mkdir(mode=0o500)
    with pytest.raises(PermissionError, match="cannot create"):
        quantize_checkpoint(folder, os.path.join(parent, "out"), "W4A16", progress=False)


def test_a_failure_keeps_what_force_would_replace(folder, tmp_path):
    out = tmp_path / "out"
    quantize_checkpoint(folder, out, "W8A16", progress=False)
    before = models.files(out)
    content = models.tensors(folder)
    content["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    models.write(folder, content)
    refused(folder, out, "up_proj", kind=ValueError, force=True)
    assert models.files(out) == before


def test_two_runs_at_once(folder, tmp_path):
    from tritonq.io.folder import Destination

    with Destination(tmp_path / "out", False).writing() as partial:
        (partial / "config.json").write_text("{}")
        with pytest.raises(FileExistsError, match="another run"):
            quantize_checkpoint(folder, tmp_path / "out", "W4A16", progress=False)
    assert (tmp_path / "out/config.json").exists()


def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch):
    from tritonq.io import writer

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_write_tensor", fail)
    refused(folder, tmp_path / "out", "model.safetensors", "No space left", kind=OSError)
