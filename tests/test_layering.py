"""Modules import only leftward in the order of docs/design.md; imports inside functions count."""

import ast
from pathlib import Path

import pytest

import tritonq.formats

PACKAGE = Path(tritonq.formats.__file__).parent
LAYERS = (
    ("formats", "codecs"), ("reference", "learned_reference", "kernels", "scale_tiles", "rotation"),
    ("tuning", "tuning_cache", "tuning_files", "boxes", "tiling", "tiles", "timing", "launch", "meeting", "memory",
     "layout", "plans", "learned_tiles", "learned_plans", "bulk_tiles", "bulk_plans", "bulk_tables"),
    ("ops", "operators", "learned_ops"), ("progress", "streams", "scheduler"),
    ("sign_step", "autograd", "ste", "tune"), ("tensor", "tensor_ops", "sharding"), ("bulk", "bulk_quantize"),
    ("offload", "nn", "best"), ("calibrate", "io"), ("integrations", "bench", "cli", "demo", "__main__"),
)  # fmt: skip
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def top(path):
    """First component below tritonq: kernels/quantize.py is "kernels"."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(source, package):
    """(line, top-level part of tritonq) of every import; "" stands for the package itself."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *([base] if base else [])]
                )
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "tritonq" else [base]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "tritonq":
                part = parts[1] if len(parts) > 1 else ""
                known = part in RANK or (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists()
                yield node.lineno, part if part and known else ""


def violations(source, own, package):
    for line, part in imported(source, package):
        if part == own:
            continue
        if part == "":  # the public names: everything
            if RANK[own] < len(LAYERS) - 1:
                yield line, "tritonq"
        elif RANK[part] > RANK[own]:
            yield line, part


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_left(path):
    own = top(path)
    assert own in RANK, f"{path.name} has no place in the layers; give it one here and in docs/design.md"
    package = ".".join(("tritonq", *path.relative_to(PACKAGE).parent.parts))
    assert list(violations(path.read_text(), own, package)) == []


@pytest.mark.parametrize(
    "path", [p for p in MODULES if top(p) == "kernels" or p.stem.endswith("_triton")], ids=lambda p: p.name
)
def test_kernels_do_not_know_torch(path):
    """Only @triton.jit functions, and what the compiler calls itself: no allocation, no torch, no reference."""
    tree = ast.parse(path.read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not {n for n in names if n.split(".")[0] == "torch" or n == "tritonq.reference"}
    functions = [
        n for n in tree.body if isinstance(n, ast.FunctionDef) and "_semantic" not in [a.arg for a in n.args.args]
    ]
    decorators = {"triton.jit", "triton.constexpr_function"}
    bare = [{ast.unparse(getattr(d, "func", d)) for d in f.decorator_list} for f in functions]  # without arguments
    assert all(decorators & found for found in bare)


@pytest.mark.parametrize("path", [p for p in MODULES if RANK.get(top(p), 0) < RANK["tensor"]], ids=lambda p: p.name)
def test_below_tensor_nothing_knows_qtensor(path):
    tree = ast.parse(path.read_text())
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {
        n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)
    }
    assert "QTensor" not in names


def test_the_check_sees_imports():
    bad = "def f():\n from tritonq import ops\n from tritonq.nn.schemes import X\n import tritonq.cli\n"
    bad += " from . import tiling\n"
    assert [part for _, part in violations(bad, "reference", "tritonq")] == ["ops", "nn", "cli", "tiling"]
    good = "import torch\nfrom tritonq.codecs import pack\nfrom tritonq import formats\nfrom .kernels import tile\n"
    assert list(violations(good, "ops", "tritonq")) == []
    assert list(violations("from ..tensor import T", "io", "tritonq.io")) == []
    assert list(violations("import tritonq as tq", "nn", "tritonq.nn")) == [(1, "tritonq")]


def _objects_passed(source):
    """Lines where a call gets a part of a constexpr object that is an object itself, straight as `FMT.scale.element`:
    Triton before 3.9 cannot pass it on; bound to a name of its own it can."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
                if isinstance(argument, ast.Attribute) and argument.attr in ("element", "scale", "super_scale"):
                    yield node.lineno


DEVICE_CODE = sorted((*(PACKAGE / "kernels").glob("*.py"), *(PACKAGE / "codecs").glob("*_triton.py")))


@pytest.mark.parametrize("path", DEVICE_CODE, ids=lambda p: p.name)
def test_objects_get_a_name_before_they_are_passed(path):
    assert not list(_objects_passed(path.read_text()))


def test_objects_passed():
    assert list(_objects_passed("f(x, FMT.element)\nELEM = FMT.element\nf(x, ELEM, FMT.bits)")) == [1]
