"""Pretraining tokens a second against a plain transformers loop: LlamaForCausalLM, fused AdamW, clipping.

    python -m benchmarks.pretrain [--quick] [--case 10m/32k] --json

Same shapes, same tokens a step, all cores, the dtype that this machine multiplies fastest. The peer is run as it is and
compiled, and the faster of the two is taken.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks import workloads
from benchmarks.measure import Case, Found, run, timed

SIZES = {  # case: (shape, vocabulary, tokens a row, tokens a step)
    "1m/4k": ("1m", 4096, 256, 4096),
    "10m/32k": ("10m", 32768, 512, 4096),
    "50m/32k": ("50m", 32768, 1024, 2048),
}


def ours(case: str, quick: bool) -> Found:
    from prairie.data.loader import Loader
    from prairie.train.memory import keep_freed_memory
    from prairie.train.objectives.causal_lm import CausalLM
    from prairie.train.optim import AdamW
    from prairie.train.trainer import accumulate_gradients

    shape, vocabulary, row, tokens = SIZES[case]
    keep_freed_memory()
    rng = np.random.default_rng(0)
    texts = [(rng.integers(8, vocabulary, row).tolist(), row - 1) for _ in range(8 * tokens // row)]
    loader = Loader(workloads.our_rows(texts), tokens_per_batch=tokens, seed=0)
    model, runtime = workloads.our_model(shape, vocabulary), workloads.our_runtime()
    optimizer = AdamW(dict(model.named_parameters()), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)

    def step() -> int:
        batches = loader.next_step()
        accumulate_gradients(model, CausalLM(), batches, dtype=runtime.torch_dtype())
        gradients = optimizer.gradient_norm()
        gradients.clip(float(gradients.norm), 1.0)
        optimizer.step(1e-4)
        return sum(len(batch.tokens_N) for batch in batches)

    flops = model.config.flops_per_token(row)
    return {**(found := timed(step, seconds(quick))), "gflops": round(found["rate"] * flops / 1e9, 1)}


def peer(case: str, quick: bool) -> Found:
    import torch

    shape, vocabulary, row, tokens = SIZES[case]
    workloads.peer_threads()
    bfloat16 = workloads.our_runtime().best_dtype() == "bfloat16"
    rows = torch.randint(8, vocabulary, (8 * tokens // row, row))
    count = tokens // row

    def measured(compiled: bool) -> Found:
        model: Any = workloads.peer_model(shape, vocabulary)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        run_model: Any = torch.compile(model) if compiled else model
        place = 0

        def step() -> int:
            nonlocal place
            batch = rows[place : place + count]
            place = (place + count) % len(rows)
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = run_model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return batch.numel()

        return {**timed(step, seconds(quick)), "compiled": compiled, "dtype": "bfloat16" if bfloat16 else "float32"}

    eager = measured(False)
    if quick:  # compiling takes a minute
        return eager
    both = eager, measured(True)
    return {**max(both, key=lambda found: float(found["rate"])), "rates": [round(one["rate"], 1) for one in both]}


def seconds(quick: bool) -> float:
    return 3.0 if quick else 6.0


def case(name: str) -> Case:
    return Case(name, "transformers loop", "tokens/s", lambda quick: ours(name, quick), lambda quick: peer(name, quick))


CASES = [case(name) for name in SIZES]

if __name__ == "__main__":
    run("pretrain", CASES)
