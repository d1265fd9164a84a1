"""`import tritonq` is quick, takes no Triton, and the CPU path works where Triton cannot be imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code):
    """stdout of a fresh interpreter."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_time():
    """Under 0.3 s beyond torch's own import, best of three."""
    code = "import torch, time; t = time.perf_counter(); import tritonq; print(time.perf_counter() - t)"
    assert min(float(python(code)) for _ in range(3)) < 0.3


def test_import_is_lean():
    code = "import torch, sys; before = set(sys.modules); import tritonq; print(*sorted(set(sys.modules) - before))"
    loaded = {name.split(".")[0] for name in python(code).split()}
    assert not loaded & {"triton", "transformers", "compressed_tensors"}


MISSING = "import sys; sys.modules['triton'] = None"
BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
"""
USE = """
import torch, tritonq
from tritonq import ops
x = torch.randn(4, 256)
for name in ("int4_g128", "int3_g64_asym", "fp8_e4m3_channel", "mxfp4", "nvfp4"):
    parts = ops.quantize(x, name)
    assert torch.equal(ops.dequantize(parts, name, (4, 256), x.dtype), ops.qdq(x, name))
assert not any(m.split(".")[0] == "triton" and sys.modules[m] is not None for m in sys.modules)
assert torch.equal(tritonq.ste.cast(x, "e4m3"), x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype))
if hasattr(tritonq, "qdq"):
    assert torch.equal(tritonq.qdq(x, "int4_g128"), ops.qdq(x, "int4_g128"))
    assert torch.equal(tritonq.quantize(x, "int4_g128").dequantize(), ops.qdq(x, "int4_g128"))
print("ok")
"""


@pytest.mark.parametrize("without", [MISSING, BLOCKED], ids=["missing", "blocked"])
def test_works_without_triton(without):
    assert python(without + USE).strip() == "ok"


def test_cpu_path_does_not_import_triton():
    """Tensors on the CPU never pay for Triton's import."""
    code = "import sys" + USE
    assert python(code).strip() == "ok"
