"""Loading needs little more memory than the model itself, whatever the files look like."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from prairie.models.config import ModelConfig
from prairie.models.transformer import Transformer
from prairie.models.weights import save_model

pytestmark = pytest.mark.long

PROBE = """
import sys
import torch
from prairie.models.config import ModelConfig
from prairie.models.transformer import Transformer
from prairie.models.weights import load_model, save_model
kind = getattr(torch, sys.argv[2])
save_model(Transformer(ModelConfig(50, 32, 1, 4, 2, 48)).init_weights(0), sys.argv[3])
load_model(sys.argv[3], kind)  # what is loaded once per process is there before we count
def resident(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024
open("/proc/self/clear_refs", "w").write("5")
before = resident("VmRSS")
model = load_model(sys.argv[1], kind)
size = sum(p.numel() * p.element_size() for p in model.parameters())
print((resident("VmHWM") - before) / size, size)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("family", "dtype", "shards"),
    [
        pytest.param("llama", "float32", 1, marks=pytest.mark.slow),
        ("phi3", "float32", 3),
        ("gpt2", "bfloat16", 1),
    ],
)
def test_peak_is_below_one_point_two_times_the_weights(family: str, dtype: str, shards: int, tmp_path: Path) -> None:
    """Of files whose tensors are rows of fused weights, or fused and reordered, or transposed and of another dtype."""
    learned = {"positions": "learned", "gated": False, "norm": "layer", "norm_bias": True}
    learned |= {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
    config = ModelConfig(24_000, 512, 8, 8, 8, 2048, family=family, **(learned if family == "gpt2" else {}))
    model, folder = Transformer(config).requires_grad_(False), tmp_path / "model"
    for number, parameter in enumerate(model.parameters()):
        parameter.fill_(number)
    save_model(model, folder)
    if shards > 1:
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        where = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(sorted(state))}
        for file in set(where.values()):
            save_file({name: tensor for name, tensor in state.items() if where[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        del state
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(folder), dtype, str(tmp_path / "tiny")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    share, size = map(float, done.stdout.split())
    assert size > 60e6
    assert 0.9 < share < 1.2
