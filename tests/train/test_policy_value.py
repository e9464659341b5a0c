"""Policy and value: the loss against its formula, symmetric rows, splits, and the one Trainer on positions."""

import json

import numpy as np
import pytest
import torch

from prairie.data.loader import Loader
from prairie.data.positions import ARRAYS, PositionDataset, turned
from prairie.errors import DataError, TrainingError
from prairie.models.tower import SCORE_SCALE, Tower, TowerConfig
from prairie.runtime import Progress, Runtime
from prairie.train.config import TrainConfig
from prairie.train.objectives.policy_value import PolicyValue, PolicyValueConfig
from prairie.train.trainer import Trainer, accumulate_gradients


def positions(rows=40, side=4, seed=0):
    """Boards whose best move is the one point marked in plane 1, and whose owner is told by plane 2."""
    rng = np.random.default_rng(seed)
    planes = np.zeros((rows, 12, side, side), np.uint8)
    planes[:, 0] = 1
    point = rng.integers(side * side, size=rows)
    planes.reshape(rows, 12, -1)[np.arange(rows), 1, point] = 1
    mine = rng.integers(2, size=rows)
    planes[:, 2] = mine[:, None, None]
    policy = np.full((rows, side * side + 1), 0.1 / (side * side), np.float32)
    policy[np.arange(rows), point] += 0.9 - 0.1 / (side * side)
    policy /= policy.sum(axis=1, keepdims=True)
    sign = 2 * mine - 1
    return PositionDataset({
        "planes": planes, "figures": rng.random((rows, 7)).astype(np.float32), "policy": policy,
        "outcome": sign.astype(np.float32), "lead": (sign * side * side).astype(np.float32),
        "owner": np.broadcast_to(sign[:, None, None], (rows, side, side)).astype(np.int8),
    })  # fmt: skip


def tower(seed=0):
    return Tower(TowerConfig.small(12, 7, blocks=2, width=16)).init_weights(seed)


def test_the_loss_is_its_formula():
    net, batch = tower(), positions(6).batch([0, 3, 5])
    objective = PolicyValue(PolicyValueConfig(value=0.7, lead=0.3, owner=0.2))
    total, figures = objective.loss(net, batch)
    judged = net(batch.planes_RCHW, batch.figures_RG)
    wanted = 0.0
    for row in range(3):
        policy = judged.policy_BM[row].softmax(-1)
        wanted -= float((batch.policy_RM[row] * policy.log()).sum().detach())
        win = judged.outcome_BO[row].softmax(-1)
        wanted -= 0.7 * float(win[0 if batch.outcome_R[row] > 0 else 1].log().detach())
        off = abs(float(judged.score_BS[row, 0].detach() - batch.lead_R[row] / SCORE_SCALE))
        wanted += 0.3 * (0.5 * off**2 if off < 1 else off - 0.5)
        wanted += 0.2 * float((judged.owner_BHW[row].tanh() - batch.owner_RHW[row]).square().mean())
    assert float(total) == pytest.approx(wanted, rel=1e-5) and objective.count(batch) == 3
    assert float(figures["policy_gap"]) < float(figures["policy"])


def test_rows_are_turned_whole_and_differently_each_epoch():
    data = positions(16)
    seen = set()
    for epoch in range(8):
        batch = data.batch(range(16), epoch)
        marked = batch.planes_RCHW[:, 1].flatten(1)
        assert torch.equal(marked.argmax(1), batch.policy_RM[:, :-1].argmax(1)), "policy and planes turn together"
        seen.add(tuple(marked.argmax(1).tolist()))
        again = data.batch([7], epoch)
        assert torch.equal(again.planes_RCHW[0], batch.planes_RCHW[7]), "whoever else is in the batch"
    assert len(seen) == 8
    board = np.arange(9).reshape(1, 3, 3)
    assert len({turned(board, k).tobytes() for k in range(8)}) == 8


def test_gradient_is_the_same_however_a_step_is_split():
    data, objective = positions(), PolicyValue()
    found = []
    for split in ([list(range(12))], [list(range(5)), list(range(5, 12))], [[i] for i in range(12)]):
        net = tower()
        accumulate_gradients(net, objective, [data.batch(rows, 3) for rows in split])
        found.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    assert torch.allclose(found[0], found[1], atol=1e-6) and torch.allclose(found[0], found[2], atol=1e-6)


def trainer(folder, steps, net, data, **changes):
    config = TrainConfig(**{"steps": steps, "tokens_per_batch": 16, "lr": 1e-2, "save_every_s": None, **changes})
    loader = Loader(data, tokens_per_batch=16, seed=1)
    return Trainer(net, PolicyValue(), loader, config, runtime=Runtime(progress=Progress(quiet=True)), folder=folder)


def test_the_one_trainer_learns_positions(tmp_path):
    net, data = tower(), positions(64)
    figures = trainer(tmp_path, 120, net, data).fit()
    assert figures["loss_last"] < 0.5 * figures["loss_first"]
    held_out = positions(64, seed=9).batch(range(64))
    net.eval()
    with torch.no_grad():
        judged = net(held_out.planes_RCHW, held_out.figures_RG)
    assert (judged.policy_BM.argmax(-1) == held_out.policy_RM.argmax(-1)).float().mean() > 0.9
    assert (judged.value_B.sign() == held_out.outcome_R).all()
    assert (judged.owner_BHW.sign() == held_out.owner_RHW).float().mean() > 0.95
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"policy", "policy_gap", "value", "owner", "accuracy"} <= set(line)


def test_a_resumed_run_is_the_undisturbed_one(tmp_path):
    whole = tower()
    trainer(tmp_path / "whole", 10, whole, positions()).fit()
    first = trainer(tmp_path / "cut", 10, tower(), positions(), save_every=4)
    batches = first.loader.next_step

    def dies(*args):
        if first.state.step == 6:
            raise KeyboardInterrupt
        return batches(*args)

    first.loader.next_step = dies
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    cut = tower()
    trainer(tmp_path / "cut", 10, cut, positions(), save_every=4).fit()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))


def test_what_is_not_finite_is_named(tmp_path):
    data = positions()
    data.arrays["lead"][:] = np.nan
    with pytest.raises(TrainingError, match="step 1 is not finite"):
        trainer(tmp_path, 3, tower(), data).fit()
    row = json.loads((tmp_path / "bad-step-000001.jsonl").read_text().splitlines()[0])
    assert {"row", "policy", "outcome", "loss_alone"} <= set(row)


def test_files_and_arrays_that_do_not_fit(tmp_path):
    data = positions(5)
    data.save(tmp_path / "a")
    positions(3, seed=2).save(tmp_path / "b")
    both = PositionDataset.load([tmp_path / "a", tmp_path / "b"])
    assert len(both) == 8 and PositionDataset.load([tmp_path / "a"]).fingerprint == data.fingerprint
    with pytest.raises(DataError, match="holds no positions"):
        PositionDataset.load([tmp_path / "c"])
    positions(3, side=5).save(tmp_path / "c")
    with pytest.raises(DataError, match="different boards"):
        PositionDataset.load([tmp_path / "a", tmp_path / "c"])
    with pytest.raises(DataError, match="do not belong together"):
        PositionDataset({**data.arrays, "lead": data.arrays["lead"][:2]})
    assert set(ARRAYS) == set(data.arrays)
