"""Pretraining tokens a second against a plain transformers loop (LlamaForCausalLM, fused AdamW, clipping).

    python -m benchmarks.pretrain [--quick] --json

Same shapes, same random tokens, rows of 256, 4,096 tokens a step, float32, all cores; the faster of float32 and
bfloat16 autocast is taken for the peer.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.measure import compare, report, timed

CASES = {  # name: (dim, layers, heads, ffn_dim, vocabulary)
    "1m/4k": (128, 4, 4, 352, 4096),
    "10m/32k": (320, 6, 5, 864, 32768),
}
ROW, ROWS = 256, 16


def ours(case: str, seconds: float) -> dict[str, Any]:
    import numpy as np

    from prairie.data.loader import Loader, TokenDataset
    from prairie.models.config import ModelConfig
    from prairie.models.transformer import Transformer
    from prairie.train.objectives.causal_lm import CausalLM
    from prairie.train.optim import AdamW

    dim, layers, heads, ffn_dim, vocabulary = CASES[case]
    ids = np.random.default_rng(0).integers(8, vocabulary, ROW * ROWS * 8).astype(np.uint32)
    offsets = np.arange(0, len(ids) + 1, ROW).astype(np.int64)
    mask = np.ones(len(ids), bool)
    mask[offsets[:-1]] = False
    loader = Loader(TokenDataset(ids, mask, offsets), tokens_per_batch=ROW * ROWS, seed=0)
    config = ModelConfig(
        vocab_size=vocabulary, dim=dim, layers=layers, heads=heads, kv_heads=heads, ffn_dim=ffn_dim, max_context=ROW
    )
    model, objective = Transformer(config).init_weights(0), CausalLM()
    optimizer = AdamW(dict(model.named_parameters()), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)

    def step() -> int:
        batch = loader.next_step()[0]
        loss, _ = objective.loss(model, batch)
        (loss / objective.count(batch)).backward()
        gradients = optimizer.gradient_norm()
        gradients.clip(float(gradients.norm), 1.0)
        optimizer.step(1e-4)
        return len(batch.tokens_N)

    return timed(step, seconds)


def peer(case: str, seconds: float) -> dict[str, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    dim, layers, heads, ffn_dim, vocabulary = CASES[case]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=dim, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=ffn_dim, max_position_embeddings=ROW, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rows = torch.randint(8, vocabulary, (ROWS * 8, ROW))

    def with_dtype(autocast: bool) -> dict[str, Any]:
        place = 0

        def step() -> int:
            nonlocal place
            batch = rows[place : place + ROWS]
            place = (place + ROWS) % len(rows)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return batch.numel()

        return timed(step, seconds)

    return max(with_dtype(False), with_dtype(True), key=lambda found: float(found["rate"]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", choices=["ours", "peer"])
    parser.add_argument("--case", choices=list(CASES))
    args = parser.parse_args()
    seconds = 3.0 if args.quick else 12.0
    if args.side:
        print(json.dumps((ours if args.side == "ours" else peer)(args.case, seconds)))
        return
    cases = [args.case] if args.case else list(CASES)[: 1 if args.quick else None]
    rows = [compare("benchmarks.pretrain", case, "transformers loop", "tokens/s", args.quick) for case in cases]
    report("pretrain", rows, args.json)


if __name__ == "__main__":
    main()
