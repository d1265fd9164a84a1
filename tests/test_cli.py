"""The command line: what it prints, and that bad input is one line, exit code 2 and no DST."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch

import tritonq as tq

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Never written to."""
    return models.save("llama", tmp_path_factory.mktemp("source") / "tiny", num_hidden_layers=1)


@pytest.fixture
def folder(source, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(source, tmp_path / "in" / "tiny"))


@pytest.fixture
def refused(run, tmp_path):
    """Runs `tritonq quantize`; asserts the contract of bad input and returns the message."""

    def refused(src, *words, scheme="W4A16", out=None, options=()):
        out = tmp_path / "out" if out is None else out
        still = out.parent.is_dir() and out.parent != Path("/proc")  # where processes come and go
        parent = {p.name: p.stat().st_mtime_ns for p in out.parent.iterdir()} if still else None
        code, stdout, stderr = run("quantize", src, out, "--scheme", scheme, *options)
        line = stderr.rstrip("\n").split("\n")[-1]
        assert code == 2 and line.startswith("error: ") and len(line) < 500, (code, stdout, stderr)
        assert all(str(word) in line for word in words), line
        assert not any(word in stdout + stderr for word in ("Traceback", "defect", "wrote"))
        if parent is not None:
            assert {p.name for p in out.parent.iterdir()} == set(parent)
        return line

    return refused


def process(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "tritonq", *map(str, arguments)], capture_output=True, text=True,
        env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}, timeout=120, **options
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ as a program


def test_a_stranger_runs_it(source, tmp_path):
    """The program itself: exit codes, streams, paths with spaces and brackets, a traceback nobody should see."""
    out = tmp_path / "my [bold]model"
    done = process("quantize", source, out, "--scheme", "W8A16")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().split("\n")[-1] == f"wrote {out}" and (out / "config.json").is_file()
    again = process("quantize", source, out, "--scheme", "W8A16")
    assert again.returncode == 2 and not again.stdout
    assert again.stderr.count("\n") == 1 and "already exists" in again.stderr and str(out) in again.stderr
    missing = process("quantize", "nowhere", tmp_path / "out", "--scheme", "W8A16", cwd=tmp_path)
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1 and "nowhere" in missing.stderr
    assert not (tmp_path / "out").exists()


def test_console_script():
    scripts = {entry.name: entry.value for entry in importlib.metadata.entry_points(group="console_scripts")}
    if "tritonq" not in scripts:
        pytest.skip("tritonq is not installed here")
    assert scripts["tritonq"] == "tritonq.cli:main"


@pytest.mark.parametrize("command", [(), ("quantize",), ("inspect",), ("formats",), ("eval",), ("demo",)])
def test_help(command, run):
    code, out, err = run(*command, "--help")
    assert code == 0 and not err and "Usage" in out and (not command or command[0] in out)
    if command == ("quantize",):
        for option in ("--scheme", "--group-size", "--ignore", "--device", "--dtype", "--json", "--force",
                       "--max-shard-size"):  # fmt: skip
            assert option in out


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ((), "no command given"), (("nonsense",), "nonsense"), (("--nonsense",), "--nonsense"),
        (("quantize",), "src"), (("quantize", "a"), "dst"), (("quantize", "a", "b"), "--scheme"),
        (("quantize", "a", "b", "--scheme"), "--scheme"), (("inspect",), "path"), (("eval",), "model"),
        (("quantize", "a", "b", "--scheme", "W4A16", "--bogus"), "--bogus"), (("inspect", "a", "b"), "b"),
        (("quantize", "a", "b", "--scheme", "W4A16", "--group-size", "many"), "--group-size"),
        (("quantize", "a", "b", "--scheme", "W4A16", "--dtype", "int8"), "int8"), (("formats", "x"), "x"),
        (("demo", "--windows", "0"), "--windows"),
    ],
)  # fmt: skip
def test_wrong_usage(arguments, culprit, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    line = err.rstrip("\n").split("\n")[-1]
    assert code == 2 and not out and line.startswith("error: ") and "Traceback" not in err
    assert culprit.lower() in line.lower() and len(line) < 300 and not list(tmp_path.iterdir())


def test_defects_say_so(run, source, tmp_path, monkeypatch):
    """An unforeseen exception is a line as well; TRITONQ_DEBUG brings the traceback back."""
    from tritonq.io import inspection

    def fail(path):
        raise ZeroDivisionError("first\nsecond")

    monkeypatch.setattr(inspection, "inspect_checkpoint", fail)
    code, _, err = run("inspect", source)
    assert code == 2 and err.startswith("error: ZeroDivisionError: first second (this is a defect")
    monkeypatch.setenv("TRITONQ_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run("inspect", source)


# ------------------------------------------------------------------------------------------------------- quantize


def test_tables_and_json_agree(run, source, tmp_path):
    """--json prints one document on stdout and nothing else anywhere."""
    code, out, _ = run("quantize", source, tmp_path / "a", "--scheme", "w4a16")
    assert code == 0 and out.rstrip().endswith(f"wrote {tmp_path / 'a'}")
    assert "q_proj" in out and "SQNR" in out and "4.12 bits" in out and "7 weights quantized" in out
    code, out, err = run("quantize", source, tmp_path / "b", "--scheme", "W4A16", "--json")
    report = json.loads(out)
    assert code == 0 and not err and report["scheme"] == "W4A16" and report["quantized"] == 7
    assert report["path"] == str(tmp_path / "b") and report["bits_per_weight"] == 4.125
    assert report["peak_rss_bytes"] > 1 << 20 and report["bytes_after"] < report["bytes_before"]
    assert models.files(tmp_path / "a").keys() == models.files(tmp_path / "b").keys()
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_options(run, source, tmp_path):
    """Each option arrives: an ignored --ignore would be found only by whoever deploys the model."""
    out = tmp_path / "out"
    arguments = ("--scheme", "W4A16", "--group-size", 32, "--ignore", "down_proj", "--ignore", "re:.*[qk]_proj",
                 "--dtype", "float16", "--max-shard-size", "100KB", "--device", "cpu", "--json")  # fmt: skip
    code, text, err = run("quantize", source, out, *arguments)
    assert code == 0, err
    found, config = models.tensors(out), json.loads((out / "config.json").read_text())
    assert json.loads(text)["quantized"] == 4 and len(list(out.glob("*.safetensors"))) > 1
    scale = found["model.layers.0.mlp.up_proj.weight_scale"]
    assert tuple(scale.shape) == (384, 8) and scale.dtype is torch.float16
    for dense in ("mlp.down_proj", "self_attn.q_proj", "self_attn.k_proj"):
        assert found[f"model.layers.0.{dense}.weight"].dtype is torch.float16
    ignored = config["quantization_config"]["ignore"]
    assert {"lm_head", "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"} <= set(ignored)
    assert run("quantize", source, out, "--scheme", "W8A16")[0] == 2
    code, _, err = run("quantize", source, out, "--scheme", "W8A16", "--force")
    assert code == 0, err
    assert models.tensors(out)["model.layers.0.mlp.up_proj.weight_scale"].shape == (384, 1)


# ------------------------------------------------------------------------------------------------------ bad input


def test_bad_names(refused, source, tmp_path):
    line = refused(source, "W5A5", scheme="W5A5")
    assert all(name in line for name in tq.SCHEMES)
    refused(source, "no_such", "matches no module", options=("--ignore", "down_proj", "--ignore", "no_such"))
    refused(source, "re:(", "regular expression", options=("--ignore", "re:("))
    refused(source, "nonsense", options=("--device", "nonsense"))
    refused(source, "5XB", options=("--max-shard-size", "5XB"))
    refused(source, "MXFP4", "group", scheme="MXFP4", options=("--group-size", 64))
    refused(source, "group size", "-3", options=("--group-size", -3))
    refused(source, "down_proj", "groups of 100", "--group-size 128", options=("--group-size", 100))
    refused(source, "no linear layers", options=("--ignore", "re:.*"))


def test_bad_sources(refused, source, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    refused(tmp_path / "missing", "missing", "does not exist")
    refused(tmp_path / "empty", "empty", "safetensors")
    refused(tmp_path / "file.txt", "file.txt")
    refused(tmp_path / "missing.gguf", "missing.gguf")
    odd = models.save("llama", tmp_path / "odd", num_hidden_layers=1, intermediate_size=200)
    refused(odd, "down_proj", "200", "--ignore", scheme="W4A16")
    refused(odd, "down_proj", "200", scheme="MXFP4A16")


@pytest.mark.parametrize("content", [None, b"", b"hello", b"\xff" * 64])
def test_damaged_weights(content, refused, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64] if content is None else content)
    refused(folder, "model.safetensors")


@pytest.mark.parametrize("change", ["tensor", "file", "syntax"])
def test_damaged_index(change, refused, tmp_path):
    folder = models.save("llama", tmp_path / "in" / "tiny", max_shard_size="300KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    if change == "file":
        index["weight_map"]["model.norm.weight"] = "gone.safetensors"
    elif change == "tensor":
        index["weight_map"]["model.ghost.weight"] = next(iter(index["weight_map"].values()))
    path.write_text("{" if change == "syntax" else json.dumps(index))
    refused(folder, {"file": "gone.safetensors", "tensor": "model.ghost.weight", "syntax": path.name}[change])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_weights(value, refused, folder):
    content = models.tensors(folder)
    content["model.layers.0.mlp.up_proj.weight"][3, :2] = value
    models.write(folder, content)
    refused(folder, "model.layers.0.mlp.up_proj.weight", "2 elements")


def test_destinations(run, refused, source, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "precious.txt").write_text("x")
    refused(source, kept, "--force", out=kept)
    refused(source, "not a checkpoint", out=kept, options=("--force",))
    assert (kept / "precious.txt").read_text() == "x"
    refused(source, "cannot create", out=Path("/proc/tritonq-out"))
    before = models.files(source)
    refused(source, "source", out=source, options=("--force",))
    assert models.files(source) == before
    assert run("quantize", source, tmp_path / "once", "--scheme", "W8A16", "--json")[0] == 0
    refused(tmp_path / "once", "already quantized")


# ---------------------------------------------------------------------------------------------- inspect, formats


@pytest.mark.parametrize("scheme", [None, "W4A16_ASYM", "FP8_BLOCK", "NVFP4"])
def test_inspect(scheme, run, source, tmp_path):
    """Counts and bytes are those of the files, dense or quantized."""
    path = source
    if scheme:
        path = tmp_path / "out"
        assert run("quantize", source, path, "--scheme", scheme, "--json")[0] == 0
    code, out, err = run("inspect", path, "--json")
    content, found = json.loads(out), models.tensors(path)
    assert code == 0 and not err
    assert sum(kind["count"] for kind in content["kinds"]) == len(found) and content["files"] == 1
    wanted = sum(t.numel() * t.element_size() for t in found.values())
    assert content["bytes"] == sum(kind["bytes"] for kind in content["kinds"]) == wanted
    assert ("not quantized" in content["description"]) == (scheme is None)
    assert content["ignore"] == (["lm_head"] if scheme else [])
    code, out, _ = run("inspect", path)
    assert code == 0 and "LlamaForCausalLM" in " ".join(out.split()) and ("left dense: lm_head" in out) == bool(scheme)
    assert "up_proj" in out


def test_inspect_refuses(run, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (folder / "model.safetensors").write_bytes(b"junk")
    for path, culprit in (
        (tmp_path / "missing", "missing"), (tmp_path / "empty", "empty"), (folder, "model.safetensors"),
        (folder / "config.json", "config.json"),
    ):  # fmt: skip
        code, out, err = run("inspect", path)
        assert code == 2 and not out and err.count("\n") == 1 and culprit in err and "defect" not in err, err
    (folder / "config.json").write_text("[")
    assert run("inspect", folder)[0] == 2


def test_formats(run):
    """Every name it lists is one that get_format and get_scheme take."""
    code, out, _ = run("formats", "--json")
    content = json.loads(out)
    assert code == 0 and [row["scheme"] for row in content["schemes"]] == list(tq.SCHEMES)
    assert {row["format"] for row in content["formats"]} == set(tq.FORMATS)
    assert all(tq.get_format(row["weights"]) for row in content["schemes"])
    code, out, _ = run("formats")
    assert code == 0 and all(name in out for name in ("W4A16", "NVFP4", "mxfp4", "int3_g64_asym"))
