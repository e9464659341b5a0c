"""How much memory a training takes, by what takes it, before anything is allocated; and the cheapest ways to less.

Counted from what `Transformer.forward` and its losses keep for their backward pass; a test holds the sum against the
measured peak of real runs. Not here: time (pipeline/plan).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from prairie.errors import TrainingError
from prairie.models.config import ModelConfig
from prairie.models.weight_table import fused_parts
from prairie.ops.attention import MATRIX_LENGTH, is_worth_compiling
from prairie.ops.loss import KEPT_NUMBERS, chunk_of
from prairie.ops.packed import Bits, bytes_a_number
from prairie.runtime import give_back

MB = 2**20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Names of settings in glibc's malloc.h."""
KEPT_BYTES = 2**31 - 1
"""The most that these settings can say."""
RETURNED_BYTES = 2**18
"""Blocks from this size on lie apart where what is freed is returned."""
PROCESS_MB = 330.0
"""Python, torch, numpy and their threads, before a model is there."""
LEAST_BATCH = 256
"""No smaller batch is proposed: the products would be too thin to be worth a step."""


@dataclass(frozen=True)
class Job:
    """What decides the memory of a training."""

    config: ModelConfig
    tokens: int
    """Of one micro-batch."""
    longest: int
    """Tokens of the longest row."""
    rank: int = 0
    """Of the adapter; 0 = all weights are trained."""
    optimizer: str = "adamw"
    dtype: str = "float32"
    recomputes: bool = False
    """With activation checkpointing."""
    quantize: Bits | None = None
    """In which form the matrices of a frozen base are kept."""
    keeps_logits: bool = False
    """The objective asks for log-probabilities, whose exponentials wait for the gradient (`ops.loss`)."""
    ranks: int = 1
    """Processes that share each step."""
    beside: int = 1
    """Those of them that share this machine's memory."""
    shard: bool = False
    """Each of the ranks keeps a part of the weights, gradients and moments."""

    @property
    def trained(self) -> int:
        """Numbers that learn."""
        c = self.config
        if not self.rank:
            return c.parameters()
        blocks = fused_parts(c)
        return self.rank * sum(p.inputs + p.outputs for block in blocks for parts in block.values() for p in parts)

    def require_fit(self, stage: str) -> None:
        """Raises TrainingError with the cheapest ways out if the training needs more memory than this machine has."""
        found, limit_mb = memory_of(self), machine_memory_mb() // self.beside
        if found.total > limit_mb:
            ways = ways_out(self, limit_mb)
            each = f" in each of {self.beside} processes" if self.beside > 1 else ""
            raise TrainingError(
                f"stage `{stage}` does not fit into this machine's memory",
                got=f"about {found.total:,.0f} MB{each} ({found.text()})",
                wanted=f"at most {limit_mb:,} MB",
                mend="what would fit, the cheapest first: " + "; or ".join(ways) if ways else "take a smaller model",
            )


@dataclass(frozen=True)
class Memory:
    """Megabytes (2**20 bytes) at the moment when most is held."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """What the forward pass keeps for the backward pass, and the gradients of it that are alive at once."""
    logits: float
    """One chunk of logits; its gradient is written over it."""
    process: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    def text(self) -> str:
        """For people, the largest first."""
        parts = sorted(asdict(self).items(), key=lambda part: -part[1])
        return ", ".join(f"{name} {size:,.0f}" for name, size in parts if size >= 1)


def memory_of(job: Job) -> Memory:
    """The estimate for one process of a training."""
    c, wide = job.config, 4
    narrow = wide if job.dtype == "float32" else 2
    copies = 0 if job.dtype == "float32" else narrow * c.parameters()
    adapters = wide * job.trained if job.rank else 0
    moments = 2 if job.optimizer == "adamw" else 1.2  # muon keeps one for the matrices, and makes their step at once
    found = Memory(
        weights=(wide * c.parameters() + copies + adapters) / MB,
        gradients=wide * job.trained / MB,
        optimizer=moments * wide * job.trained / MB,
        activations=job.tokens * (_kept_by_layers(job, narrow) + _alive_at_once(c, narrow)) / MB,
        logits=wide * _logits_at_once(job) / MB,
        process=PROCESS_MB,
    )
    if job.shard and job.ranks > 1:
        return _sharded(job, found)
    return found if job.quantize is None else _with_packed_weights(job, found)


def _sharded(job: Job, whole: Memory) -> Memory:
    """A part of what stays, and in full what a layer and the embedding take while they are computed; but never less
    than the model that each rank has read before it gives away the rest."""
    tables = (1 if job.config.tie_embeddings else 2) * job.config.vocab_size * job.config.dim
    gathered = 4 * (tables + 2 * (job.config.parameters() - tables) / job.config.layers) / MB
    parts = replace(
        whole, weights=whole.weights / job.ranks + gathered, gradients=whole.gradients / job.ranks + gathered,
        optimizer=whole.optimizer / job.ranks,
    )  # fmt: skip
    loading = 4 * job.config.parameters() / MB + whole.process
    return parts if parts.total >= loading else replace(parts, weights=parts.weights + loading - parts.total)


def _logits_at_once(job: Job) -> int:
    kept = job.tokens * job.config.vocab_size
    if job.keeps_logits and not job.rank and kept <= KEPT_NUMBERS:
        return kept
    return min(job.tokens, chunk_of(job.config.vocab_size)) * job.config.vocab_size


def _with_packed_weights(job: Job, dense: Memory) -> Memory:
    """Matrices of the blocks are packed one after the other, so before the first step all stand there dense, and in the
    steps one at a time does."""
    assert job.quantize is not None
    parts = [part for block in fused_parts(job.config) for parts in block.values() for part in parts]
    sizes = [part.inputs * part.outputs for part in parts]
    saved = (4 - bytes_a_number(job.quantize)) * sum(sizes) - 4 * max(sizes, default=0)
    packed = replace(dense, weights=dense.weights - saved / MB)
    loading = 4 * job.config.parameters() / MB + dense.process
    return packed if packed.total >= loading else replace(packed, weights=packed.weights + loading - packed.total)


def _kept_by_layers(job: Job, narrow: int) -> float:
    """Bytes that all layers keep for each token; recomputed ones keep their inputs, and about three at a time the
    rest: the one whose gradient is made, the one that is computed again, and what was freed and does not fit."""
    one = _kept_by_layer(job, narrow)
    return job.config.layers * narrow * job.config.dim + 3 * one if job.recomputes else job.config.layers * one


def _kept_by_layer(job: Job, narrow: int) -> float:
    """Bytes that a layer keeps for each token: two norms with their inputs, q, k and v before and after they are laid
    out for attention, its output, gate, up and their product; in short rows also the attention weights."""
    c = job.config
    ffn_dim = max(c.ffn_dim, c.experts_per_token * c.expert_ffn_dim)
    kept = narrow * (4 * c.dim + c.qkv_dim + 2 * c.q_dim + 3 * ffn_dim)
    adapters = narrow * (6 * job.rank + c.qkv_dim + 2 * ffn_dim + 2 * c.dim) if job.rank else 0  # outputs before deltas
    compiled = is_worth_compiling(job.tokens * min(job.longest, job.tokens), c.heads, c.head_dim)
    weights = 0.0 if compiled or job.longest > MATRIX_LENGTH else 4 * c.heads * min(job.longest, job.tokens) * 0.6
    return kept + adapters + weights


def _alive_at_once(config: ModelConfig, narrow: int) -> float:
    """Bytes for each token that are held outside the layers: the last hidden state, and gradients on their way."""
    return narrow * (4 * config.dim + 4 * config.ffn_dim) + 4 * 2 * config.dim


def ways_out(job: Job, limit_mb: float, most: int = 3) -> list[str]:
    """Changes with which the training fits into `limit_mb`, the cheapest first, each with what it then takes.

    Smaller micro-batches cost some speed and change no gradient, nor does activation checkpointing, which costs a third
    of the time; shorter rows lose text; an adapter learns less; a smaller model is another one.
    """
    found: list[str] = []
    for words, changed in _changes(job):
        fitting = _smaller_batch(changed, limit_mb)
        if fitting is None:
            continue
        if fitting.tokens < job.tokens:
            times = -(-job.tokens // fitting.tokens)
            words += f"{' and ' if words else ''}tokens_per_batch {fitting.tokens} with {times} times the micro_batches"
        found.append(f"{words} ({memory_of(fitting).total:,.0f} MB)")
        if len(found) == most:
            break
    return found


def _changes(job: Job) -> Iterator[tuple[str, Job]]:
    """From what costs least to what costs most."""
    c = job.config
    yield "", job
    if job.ranks > 1 and not (job.shard or job.rank) and job.optimizer == "adamw":
        yield "shard: true", replace(job, shard=True)
    if not job.recomputes:
        yield "activation_checkpointing: true", replace(job, recomputes=True)
    if job.longest > 2 * LEAST_BATCH:
        yield f"max_tokens {job.longest // 2}", replace(job, longest=job.longest // 2)
    if not job.rank:
        yield "an adapter of rank 16", replace(job, rank=16, shard=False)
    for share in (2, 4, 8, 16, 32, 64):
        depth = c.layers // share
        if depth:
            yield f"a model of {depth} layers", replace(job, config=replace(c, layers=depth))
    for share in (2, 4, 8, 16, 32, 64):
        heads = c.heads // share
        if heads and not c.heads % share:
            kv_heads = max(1, c.kv_heads // share)
            smaller = replace(c, dim=c.dim // share, heads=heads, kv_heads=kv_heads, ffn_dim=c.ffn_dim // share)
            yield f"a model {c.dim // share} wide", replace(job, config=smaller)


def _smaller_batch(job: Job, limit_mb: float) -> Job | None:
    """The job, or the same in the largest batch (a half, a quarter, ...) that fits; None if none does."""
    least = max(job.longest, LEAST_BATCH)
    while memory_of(job).total > limit_mb:
        if job.tokens // 2 < least:
            return None
        job = replace(job, tokens=job.tokens // 2)
    return job


def keep_freed_memory() -> bool:
    """Lets this process keep what it frees, up to its peak, for the next step; False where the C library cannot be
    told so.

    glibc gives every large block back to the system at once, and the system fills its pages with zeros again in the
    next step: a tenth of the time where a step takes and frees gigabytes (docs/performance.md). All threads take from
    one pool: those of others glibc does give back, whatever it was told.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    kept = mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) and mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
    return bool(kept and mallopt(M_ARENA_MAX, 1))


def return_freed_memory() -> bool:
    """The opposite, for a process that is short of memory: what it frees goes back to the machine at once. Sharded
    weights are fetched and given away layer by layer, and holes in the heap would keep what they took. False where the
    C library cannot be told so."""
    try:
        library = ctypes.CDLL(None)
        told = library.mallopt(M_MMAP_THRESHOLD, RETURNED_BYTES) and library.mallopt(M_TRIM_THRESHOLD, RETURNED_BYTES)
    except (OSError, AttributeError):
        return False
    give_back()
    return bool(told)


def machine_memory_mb(read: Callable[[str], str] | None = None) -> int:
    """Memory that this process may use: the machine's, or less where a container's limit says so."""
    physical = int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limits = [physical]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int((read or (lambda name: Path(name).read_text()))(file)))
        except (OSError, ValueError):  # no such file, or "max": no limit
            continue
    return min(limits) // MB
