"""The estimate of memory against the measured peak of real processes, and the ways out against the estimate."""

import multiprocessing
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import quiet_runtime

from prairie.data.loader import Loader, TokenDataset
from prairie.errors import TrainingError
from prairie.models.config import ModelConfig
from prairie.models.lora import LoRA, LoRAConfig
from prairie.models.quantized import bytes_of, quantize
from prairie.models.transformer import Transformer
from prairie.ops.packed import bytes_a_number
from prairie.train import memory
from prairie.train.memory import Job, machine_memory_mb, memory_of, ways_out
from prairie.train.objectives.causal_lm import CausalLM
from prairie.train.trainer import TrainConfig, Trainer

pytestmark = pytest.mark.long

PROCESSES = multiprocessing.get_context("spawn")
BAND = (0.75, 1.3)
"""Estimate over measurement: what the estimate is trusted for."""


def shape(vocab: int, dim: int, layers: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        dim=dim,
        layers=layers,
        heads=dim // 32,
        kv_heads=dim // 32,
        ffn_dim=dim * 8 // 3,
        max_context=2048,
    )


JOBS = {
    "small, large batch": Job(shape(2048, 128, 4), 16_384, 64),
    "large vocabulary, long rows": Job(shape(32_768, 256, 4), 4096, 512),
    "an adapter": Job(shape(4096, 384, 6), 4096, 128, rank=16),
    "an adapter on 4 bits": Job(shape(4096, 384, 6), 4096, 128, rank=16, quantize="nf4"),
    "recomputed": Job(shape(4096, 256, 8), 8192, 128, recomputes=True),
    "muon": Job(shape(4096, 384, 6), 1024, 256, optimizer="muon"),
}


def train_twice(job: Job, folder: Path, told: "multiprocessing.Queue[float]") -> None:
    """Two steps of the job in a process of its own; tells its peak in MB."""
    import torch

    torch.set_num_threads(1)
    rows = 2 * job.tokens // job.longest + 1
    ids = np.random.default_rng(0).integers(0, job.config.vocab_size, rows * job.longest).astype(np.uint32)
    offsets = np.arange(0, len(ids) + 1, job.longest)
    dataset = TokenDataset(ids, np.arange(len(ids)) % job.longest > 0, offsets)
    model = Transformer(job.config).init_weights(0)
    if job.quantize:
        quantize(model, job.quantize, [ids[:64].tolist()])
    adapter = LoRA.create(model, LoRAConfig(rank=job.rank)) if job.rank else None
    config = TrainConfig(
        steps=2, tokens_per_batch=job.tokens, lr=1e-4, optimizer=job.optimizer, save_every_s=None,
        activation_checkpointing=job.recomputes,
    )  # fmt: skip
    loader = Loader(dataset, tokens_per_batch=job.tokens, seed=0)
    Trainer(model, CausalLM(), loader, config, runtime=quiet_runtime(), folder=folder, adapter=adapter).fit()
    told.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


@pytest.mark.parametrize(
    "name", ["an adapter", *(pytest.param(n, marks=pytest.mark.slow) for n in JOBS if n != "an adapter")]
)
def test_the_estimate_is_near_the_measured_peak(name, tmp_path):
    job, told = JOBS[name], PROCESSES.Queue()
    process = PROCESSES.Process(target=train_twice, args=(job, tmp_path, told))
    process.start()
    peak_mb = told.get(timeout=200)
    process.join(30)
    assert BAND[0] < memory_of(job).total / peak_mb < BAND[1], (memory_of(job), peak_mb)


def test_ways_out_fit_and_the_cheapest_comes_first():
    job = Job(shape(32_768, 1024, 24), 16_384, 512)
    whole = memory_of(job).total
    only_batch = ways_out(job, 0.7 * whole)
    assert (
        len(only_batch) == 3
        and only_batch[0].startswith("tokens_per_batch")
        and "2 times the micro_batches" in only_batch[0]
    )
    no_optimizer = memory_of(replace(job, tokens=512)).total * 0.6
    assert [way for way in ways_out(job, no_optimizer) if way.startswith("an adapter of rank 16")]
    for way in ways_out(job, no_optimizer):
        assert float(way.rpartition("(")[2].split(" MB")[0].replace(",", "")) <= no_optimizer + 1
    assert ways_out(job, 10.0) == []


def test_each_part_grows_with_what_it_is_of():
    job = Job(shape(4096, 256, 4), 4096, 128)
    base = memory_of(job)
    assert memory_of(replace(job, tokens=8192)).activations == pytest.approx(2 * base.activations)
    adapter = memory_of(replace(job, rank=8))
    assert adapter.gradients < 0.2 * base.gradients and adapter.optimizer < 0.2 * base.optimizer
    assert base.optimizer == pytest.approx(2 * base.gradients) and base.gradients == pytest.approx(base.weights)
    assert memory_of(replace(job, dtype="bfloat16")).activations < base.activations
    for c in (job.config, replace(job.config, tie_embeddings=False)):
        assert Job(c, 1, 1).trained == sum(p.numel() for p in Transformer(c).parameters())
    lora = LoRA.create(Transformer(job.config).init_weights(0), LoRAConfig(rank=8))
    assert replace(job, rank=8).trained == sum(p.numel() for p in lora.parameters())


def test_a_packed_base_is_counted_as_it_is_kept():
    job = Job(shape(4096, 1024, 24), 1024, 128, rank=8)
    dense, packed = memory_of(job), memory_of(replace(job, quantize="nf4"))
    model = Transformer(shape(4096, 256, 2)).init_weights(0)
    numbers = sum(at.dense().numel() for at in model.linears() if at.layer is not None)
    before = sum(p.numel() for p in model.parameters()) * 4
    for bits in ("nf4", "int4", "int8"):
        model = Transformer(shape(4096, 256, 2)).init_weights(0)
        quantize(model, bits, [[1, 2, 3]])
        assert bytes_of(model) == pytest.approx(before - (4 - bytes_a_number(bits)) * numbers, rel=0.01)
    assert packed.weights < dense.weights and packed.total < dense.total
    little = replace(job, tokens=256, quantize="nf4")
    assert (
        memory_of(little).total >= 4 * little.config.parameters() / memory.MB + memory.PROCESS_MB - 1
    )  # while loading


def test_logits_that_wait_for_their_gradient_are_counted():
    job = Job(shape(32_768, 256, 4), 2048, 128)
    assert memory_of(replace(job, keeps_logits=True)).logits == 4 * memory_of(job).logits
    frozen = replace(job, rank=8)
    assert memory_of(replace(frozen, keeps_logits=True)) == memory_of(frozen)


def test_sharded_weights_take_less_and_never_less_than_reading_them():
    config = shape(4000, 512, 8)
    whole = memory_of(Job(config, 1024, 128))
    two, four = (memory_of(Job(config, 1024, 128, ranks=ranks, shard=True)) for ranks in (2, 4))
    assert memory_of(Job(config, 1024, 128, ranks=4)) == whole and four.total < two.total < whole.total
    assert four.optimizer == whole.optimizer / 4 and four.activations == whole.activations
    many = memory_of(Job(config, 128, 128, ranks=1000, shard=True))
    assert many.total >= memory_of(Job(config, 128, 128)).weights + many.process
    offered = ways_out(Job(config, 1024, 128, ranks=2), two.total + 1)
    assert offered[0].startswith("shard: true") or offered[1].startswith("shard: true"), offered


def test_a_containers_limit_counts(monkeypatch):
    def read(name):
        if name.endswith("memory.max"):
            return "1048576000\n"
        raise FileNotFoundError

    assert machine_memory_mb(read) == 1000 and machine_memory_mb(lambda name: "max") > 1000
    monkeypatch.setattr(memory, "machine_memory_mb", lambda: 400)
    with pytest.raises(TrainingError, match=r"stage `x` does not fit.*at most 400 MB"):
        Job(shape(4096, 256, 4), 4096, 128).require_fit("x")
