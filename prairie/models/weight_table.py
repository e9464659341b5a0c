"""Every tensor of a model's files by the parameter that holds it: a function of the config and its family's names.

Not here: the names themselves (`families`), reading and writing (`weights`).
"""

from __future__ import annotations

import torch

from prairie.models.config import ModelConfig
from prairie.models.families import FAMILIES
from prairie.models.names import Names, Order, Part, Weight
from prairie.ops.attention import pairs_together


def fused_parts(config: ModelConfig) -> list[dict[str, tuple[Part, ...]]]:
    """The linear layers of each block by the fused weight that holds them, in row order. Experts are not among them."""
    c, names = config, names_of(config)
    q, k, v = _head_orders(c)
    fused = len(names.qkv) == 1
    qkv = _joined_order(c, names.qkv_by_head) if fused else None
    up = "gate_up" if c.gated else "up"
    blocks = []
    for layer in range(c.layers):
        path = names.layer.format(layer).removeprefix(names.prefix if is_bare(c) else "")

        def part(name: str, outputs: int, inputs: int, order: Order | None = None, path: str = path) -> Part:
            return Part(path + name, outputs, inputs, order, names.transposed)

        groups: dict[str, tuple[Part, ...]] = {
            "qkv": (part(names.qkv[0], c.qkv_dim, c.dim, qkv),)
            if fused
            else (
                part(names.qkv[0], c.q_dim, c.dim, q),
                part(names.qkv[1], c.kv_dim, c.dim, k),
                part(names.qkv[2], c.kv_dim, c.dim, v),
            ),
            "o": (part(names.o, c.dim, c.q_dim),),
        }
        if c.encoder is not None:
            q_name, *kv_names = names.cross_qkv
            groups["cross_q"] = (part(q_name, c.q_dim, c.dim),)
            groups["cross_kv"] = tuple(part(name, c.kv_dim, c.encoder.dim) for name in kv_names)
            groups["cross_o"] = (part(names.cross_o, c.dim, c.q_dim),)
        if not c.has_experts(layer):
            up_names = names.up if c.gated or not names.plain_up else names.plain_up
            outputs = c.ffn_dim * (1 + c.gated) // len(up_names)
            groups[up] = tuple(part(name, outputs, c.dim) for name in up_names)
            groups["down"] = (part(names.down, c.dim, c.ffn_dim),)
        blocks.append(groups)
    return blocks


def weight_table(config: ModelConfig) -> list[Weight]:
    """Every tensor that a folder of this config holds, and where it lives in a `Transformer`."""
    c, names, is_stack = config, names_of(config), is_encoder_stack(config)
    table: list[Weight] = []

    def add(name: str, parameter: str, *shape: int, start: int = 0, order: Order | None = None) -> None:
        table.append(Weight(name, parameter, slice(start, start + shape[0]), shape, order))

    def add_norm(path: str, parameter: str, size: int, order: Order | None = None) -> None:
        add(f"{path}.weight", parameter, size, order=order)
        if c.norm_bias:
            add(f"{path}.bias", f"{parameter}_bias", size, order=order)

    def add_part(part: Part, parameter: str, start: int, biased: bool) -> None:
        rows = slice(start, start + part.outputs)
        shape = (part.inputs, part.outputs) if part.transposed else (part.outputs, part.inputs)
        table.append(Weight(f"{part.name}.weight", parameter, rows, shape, part.order, part.transposed))
        if biased:
            table.append(Weight(f"{part.name}.bias", f"{parameter}_bias", rows, (part.outputs,), part.order))

    biased = {"qkv": c.qkv_bias, "o": c.o_bias, "gate_up": c.mlp_bias, "up": c.mlp_bias, "down": c.mlp_bias}
    biased |= {"cross_q": c.qkv_bias, "cross_kv": c.qkv_bias, "cross_o": c.o_bias}
    if not is_stack:
        add(f"{names.embed}.weight", "embed", c.vocab_size, c.dim)
    if c.positions == "learned":
        add(f"{names.positions}.weight", "positions", c.max_context + c.position_offset, c.dim)
    if c.segments:
        add(f"{names.segments}.weight", "segments", c.segments, c.dim)
    if c.positions == "relative":
        add(f"{names.layer.format(0)}{names.relative}.weight", "relative_bias", c.relative_buckets, c.heads)
    if c.embed_norm:
        add_norm(names.embed_norm, "embed_norm", c.dim)
    q_order, k_order, _ = _norm_orders(c)
    for layer, groups in enumerate(fused_parts(c)):
        path, home = names.layer.format(layer), f"layers.{layer}."
        for group, parts in groups.items():
            start = 0
            for part in parts:
                add_part(part, home + group, start, biased[group])
                start += part.outputs
        if c.has_experts(layer):
            add(f"{path}{names.router}.weight", f"{home}router", c.experts, c.dim)
            size = c.expert_ffn_dim
            for expert in range(c.experts):
                of = path + names.expert.format(expert)
                for half, name in enumerate(names.expert_up):
                    start = (2 * expert + half) * size
                    add(f"{of}{name}.weight", f"{home}experts_gate_up", size, c.dim, start=start)
                add(f"{of}{names.expert_down}.weight", f"{home}experts_down", c.dim, size, start=expert * c.dim)
        for parameter in block_norms(c, layer):
            add_norm(path + getattr(names, parameter), home + parameter, c.dim)
        if c.qk_norm:
            whole = c.qk_norm == "width"
            add_norm(path + names.q_norm, f"{home}q_norm", c.q_dim if whole else c.head_dim, q_order)
            add_norm(path + names.k_norm, f"{home}k_norm", c.kv_dim if whole else c.head_dim, k_order)
    if c.final_norm:
        add_norm(names.norm, "norm", c.dim)
    if not c.tie_embeddings:
        add(f"{names.head}.weight", "head", c.vocab_size, c.dim)
    if c.logit_bias:
        shape = (1, c.vocab_size) if c.encoder is not None else (c.vocab_size,)
        table.append(Weight(names.logit_bias, "logit_bias", slice(0, shape[0]), shape))
    if c.head is not None:
        row = FAMILIES[c.family].head_row(c.head.kind)
        if c.head.dense:
            add(f"{row.dense}.weight", "task.dense", c.dim, c.dim)
            if c.head.dense_bias:
                add(f"{row.dense}.bias", "task.dense_bias", c.dim)
        if c.head.norm:
            add_norm(row.norm, "task.norm", c.dim)
        if c.head.labels:
            add(f"{row.out}.weight", "task.out", len(c.head.labels), c.dim)
            if c.head.bias:
                add(f"{row.out}.bias", "task.out_bias", len(c.head.labels))
    if c.encoder is not None:
        table += [weight._replace(parameter=f"encoder.{weight.parameter}") for weight in weight_table(c.encoder)]
    if is_bare(c):
        table = [weight._replace(name=weight.name.removeprefix(names.prefix)) for weight in table]
    return table


def block_norms(config: ModelConfig, layer: int) -> tuple[str, ...]:
    """The norms of a block over the model's width, by the parameter that holds each."""
    cross = config.encoder is not None
    before = ("attention_norm", *["cross_norm"] * cross, "mlp_norm")
    after = ("attention_out_norm", *["cross_out_norm"] * cross, "mlp_out_norm")
    norms = {"input": before, "output": after, "sum": after, "both": before + after}[config.norm_at]
    return norms if layer or config.first_norm else tuple(name for name in norms if name != "attention_norm")


def is_encoder_stack(config: ModelConfig) -> bool:
    """Whether it is the encoder of an encoder-decoder, which embeds for it."""
    return config.kind == "encoder" and FAMILIES[config.family].encoder_names is not None


def is_bare(config: ModelConfig) -> bool:
    """Whether files of this config leave out the prefix of names."""
    own_head = config.head is not None and config.head.kind != "pool"
    return config.kind == "encoder" and not own_head and not is_encoder_stack(config)


def names_of(config: ModelConfig) -> Names:
    """Where files of this config keep their weights."""
    family = FAMILIES[config.family]
    return family.encoder_names if is_encoder_stack(config) and family.encoder_names is not None else family.names


def _head_orders(c: ModelConfig) -> tuple[Order | None, Order | None, None]:
    """Of q, k and v: rotary pairs lie side by side in ours (`ops.attention.pairs_together`)."""
    if c.positions != "rotary":
        return None, None, None
    q, k = (
        Order.of(pairs_together(torch.arange(size, device="cpu"), c.head_dim, c.rotary_dim))
        for size in (c.q_dim, c.kv_dim)
    )
    return q, k, None


def _norm_orders(c: ModelConfig) -> tuple[Order | None, Order | None, None]:
    """Of the norms of queries and keys, which have the length of one head or of all."""
    if c.qk_norm != "head" or c.positions != "rotary":
        return _head_orders(c)
    head = Order.of(pairs_together(torch.arange(c.head_dim, device="cpu"), c.head_dim, c.rotary_dim))
    return head, head, None


def _joined_order(c: ModelConfig, by_head: bool) -> Order | None:
    """Of the one tensor that holds q, k and v."""
    rows = torch.arange(c.qkv_dim, device="cpu")
    if by_head:
        rows = rows.view(c.heads, 3, c.head_dim).transpose(0, 1).flatten()
    if c.positions == "rotary":
        turning, still = rows.split([c.q_dim + c.kv_dim, c.kv_dim])
        rows = torch.cat([pairs_together(turning, c.head_dim, c.rotary_dim), still])
    return Order.of(rows) if by_head or c.positions == "rotary" else None
