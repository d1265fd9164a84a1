"""Two ranks, on the CPU with gloo and on GPUs with NCCL: shards stay quantized, bytes are what moves, and results are
those of one rank. The cases are in `sharding_cases.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tritonq as tq


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


class TwoRanks:
    def size(self):
        return 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["nvfp4", "fp8_e4m3_tensor", "int8_tensor_asym"])
def test_what_ranks_share_outlives_the_copy(name):
    """With parameters on the CPU fully_shard makes a copy of a shard on its own stream, and drops it when the copy-out
    has been queued: its memory may not be filled by the next gather before the copy-out has run."""
    whole = tq.quantize(torch.randn(128, 256), name)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        shard = whole[:64].cuda()
        inputs, metadata = shard.fsdp_pre_all_gather(TwoRanks())
        size = next(iter(metadata[1].values())).untyped_storage().nbytes()
        torch.full((1,), 255, dtype=torch.uint8, device="cuda")  # loading a kernel would wait for the others
    outputs = tuple(torch.cat([t, t]) for t in (t.cuda() for t in inputs))
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # about 0.1 s, in which the host goes on
    gathered, _ = shard.fsdp_post_all_gather(outputs, metadata, torch.float32)
    del shard, inputs, metadata
    with torch.cuda.stream(side):
        others = [torch.full((size,), 255, dtype=torch.uint8, device="cuda") for _ in range(8)]
    torch.cuda.synchronize()
    assert len(others) == 8
    for part in ("tensor_scale", "scale", "zero_point"):
        if part in gathered.parts() and gathered.parts()[part].numel() == 1:
            assert torch.equal(gathered.parts()[part].cpu(), whole.parts()[part]), part
