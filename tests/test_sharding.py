"""Two ranks, on the CPU with gloo and on GPUs with NCCL: shards stay quantized, bytes are what moves, and results are
those of one rank. The cases are in `sharding_cases.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def test_ranks(device, tmp_path):
    """Fails on a subclass that dequantizes to be sharded, gathered, saved or summed; prints every case that failed."""
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    ranks = min(2, torch.cuda.device_count()) if device == "cuda" else 2
    here = Path(__file__).parent
    path = os.pathsep.join((str(here), str(here.parent), os.environ.get("PYTHONPATH", "")))
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "sharding_cases", str(rank), str(ranks), device, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
    failed = [f"rank {r}, {name}: {e}" for r, cases in enumerate(found) for name, (e, _) in cases.items() if e]
    assert not failed, "\n".join(failed)
    ended = [process.returncode for process in processes]
    assert ended == [0] * ranks, (ended, outputs)
    assert len(found[0]) == len(found[-1]) >= (32 if ranks == 2 else 14), found
