"""What a compiled step is told, as numbers and addresses in one record; and what it is told of adapters.

Legend: as in `ops.decoder`.
"""

import numpy as np

QKV, OUT, GATE_UP, DOWN = 0, 1, 2, 3
PARTS = 3
"""The most layers that are fused into one (q, k, v)."""
A, INNER, PART = 0, 1, 2
AT, RANK, B, FIRST, LAST = 0, 1, 2, 3, 4
PAIRS = PART + 5 * PARTS
"""What there is to know of an adapter's change of a fused layer: the address of A in narrow panels, whose rows are the
ranks of all parts, and how many rows that makes; then, for each part, which row is its first, how
many it has (whole vectors, or none), the address of its B, 8 columns rank by rank and
then the next 8, its first and last column."""

TILE_ROWS = 24
"""Rows of a weight in rows come in whole multiples of this in a piece: whole tiles, and whole vectors of what they
write."""
DOOR_BYTES = 64
"""Room for a semaphore."""
STATE, DONE, STEP, GATE_BYTES = 0, 64, 128, 192
"""Where in the gate the three words lie on which threads meet: phase and tickets, pieces done, number of the step."""
PHASE_BITS, TICKET_BITS = 12, 20
PLAN = np.dtype(
    [(name, np.int64) for name in (
        # the model; weights and scales (L, 4) addresses, of QKV, OUT, GATE_UP, DOWN
        "kind", "layers", "dim", "heads", "kv_heads", "head_dim", "ffn", "weights", "scales",
        # rows of a weight and heads in a piece come in whole multiples of these
        "rows_at_once", "heads_at_once",
        # norms (L, 2, D), last_norm (D,), qk_norms (L, 2, E), biases (L, columns); 0 where there are none
        "norms", "last_norm", "qk_norms", "qkv_bias", "out_bias", "mlp_bias", "down_bias",
        # windows (L,) how many tokens a layer sees, 0 for all; turned (L,) whether it turns queries and keys
        "windows", "turned", "head_kind", "head", "head_scales", "vocab",
        # the cache: kv (L, 2, slots, K, E), tables (rows, blocks)
        "kv", "slots", "tables", "blocks", "block_size",
        # embeddings (V, D), FLOAT32 or in panels, and of each position (.., E) cosines, then sines
        "embed_kind", "embeddings", "embed_scales", "all_turns",
        # the step: of its sequences (S,) the row in tables, the first token's position, how many tokens; ids (N,)
        "sequences", "rows", "starts", "counts", "tokens", "ids",
        # what follows from that. x (N, D) holds embeddings before and hidden states, not yet normed, afterwards; turns
        # and plain (N, E) cosines, then sines, for layers that turn and for those that do not; position, row in tables
        # and own slot of each token (N,); runs (M, 2) first token and count
        "x", "turns", "plain", "positions", "of_row", "own_slots", "runs", "run_count",
        # adapters, if there are any: segments (S, 3) first token, count, address of pairs (L, 4, PAIRS);
        # inner (N, inner_width) A x, of each token by its adapter
        "segments", "segment_count", "adapter_kind", "inner", "inner_width",
        # scratch; y has a copy for each thread
        "y", "qkv", "mixed", "gate_up", "act",
        # ready (R,) tokens that want logits (R, V). Of the first `sampled` tokens each one's likeliest goes to best[0];
        # found[0] (R, 3): its logit, the largest logit of all, the sum of e^(logit - that). One for each piece. Then
        # logs (2, R): the log-probability of the likeliest, the log of the sum of e^logit
        "ready", "ready_count", "sampled", "logits", "best", "found", "head_pieces", "logs",
        # who meets where: addresses of the gate, of T doors (semaphores), and of functions
        "threads", "gate", "doors", "stop", "products", "post", "wait", "try_wait", "give_way",
    )] + [("eps", np.float32), ("query_scale", np.float32), ("embed_scale", np.float32)],
    align=True,
)  # fmt: skip
"""What a step needs, as numbers and addresses, in an array of one: threads that help read it where it lies."""
