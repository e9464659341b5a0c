"""The convolutional tower: masking, its start, its files; and a strong published net in it that plays as it should."""

from pathlib import Path

import pytest
import torch

from prairie.errors import ModelError
from prairie.models.katago import load_katago
from prairie.models.tower import Tower, TowerConfig, load_tower, multiply_adds, save_tower

KATAGO = Path(__file__).resolve().parents[3] / "shared" / "data" / "models" / "katago_g170-b6c96.bin.gz"
needs_katago = pytest.mark.skipif(not KATAGO.is_file(), reason="the shared KataGo net is not on this machine")


def random_tower(seed=0, **changes):
    """Every weight drawn, so that no branch is silent."""
    config = TowerConfig.small(12, 7, blocks=4, width=24)
    tower = Tower(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return tower.eval()


def boards(count, size, seed=0, room=None):
    generator = torch.Generator().manual_seed(seed)
    planes = torch.zeros(count, 12, room or size, room or size)
    planes[:, :, :size, :size] = (torch.rand(count, 12, size, size, generator=generator) < 0.3).float()
    planes[:, 0, :size, :size] = 1
    return planes, torch.rand(count, 7, generator=generator)


@pytest.mark.parametrize("size", [2, 5, 9])
def test_a_small_board_in_a_large_array_is_judged_the_same(size):
    tower = random_tower()
    with torch.no_grad():
        alone = tower(*boards(3, size))
        padded = tower(*boards(3, size, room=11))
    inside = padded.policy_BM[:, :-1].reshape(3, 11, 11)[:, :size, :size]
    assert torch.allclose(inside.flatten(1), alone.policy_BM[:, :-1], atol=1e-4)
    assert torch.allclose(padded.policy_BM[:, -1], alone.policy_BM[:, -1], atol=1e-4)
    assert torch.allclose(padded.policy_BM.softmax(-1).sum(), torch.tensor(3.0))
    assert torch.allclose(padded.value_B, alone.value_B, atol=1e-5)
    assert torch.allclose(padded.lead_B, alone.lead_B, atol=1e-3)
    assert torch.allclose(padded.owner_BHW[:, :size, :size], alone.owner_BHW, atol=1e-4)


def test_a_fresh_tower_says_next_to_nothing():
    tower = Tower(TowerConfig.small(12, 7, blocks=6, width=32)).init_weights(1)
    with torch.no_grad():
        judged = tower(*boards(8, 7))
    assert judged.policy_BM.softmax(-1).max() < 0.06 and judged.value_B.abs().max() < 0.3
    again = Tower(tower.config).init_weights(1)
    assert all(torch.equal(a, b) for a, b in zip(tower.parameters(), again.parameters(), strict=True))


def test_a_block_begins_as_the_identity():
    tower = Tower(TowerConfig.small(12, 7, blocks=2, width=16)).init_weights(0)
    from prairie.models.tower import Board

    x = torch.randn(2, 16, 5, 5)
    board = Board.of(torch.ones(2, 1, 5, 5))
    for block in tower.blocks:
        assert torch.equal(block(x, board), x)


def test_files_bring_the_same_tower_and_bad_ones_are_refused(tmp_path):
    tower = random_tower()
    save_tower(tower, tmp_path)
    again = load_tower(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(*boards(2, 5)).policy_BM, tower(*boards(2, 5)).policy_BM)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-4] + b"\x00\x00\x80\x3f")
    with pytest.raises(ModelError, match=r"not those its prairie\.json names"):
        load_tower(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights[:100])
    with pytest.raises(ModelError, match="missing or damaged"):
        load_tower(tmp_path)
    (tmp_path / "tower.json").write_text("{}")
    with pytest.raises(ModelError, match="not the shape of a tower"):
        load_tower(tmp_path)
    with pytest.raises(ModelError, match="cannot have this shape"):
        TowerConfig(12, 7, ("round",), 16)


def test_work_is_counted():
    assert multiply_adds(TowerConfig(12, 7, ("plain",), 32), 25) == 25 * 9 * (12 * 32 + 2 * 32 * 32)


@needs_katago
def test_a_strong_net_plays_what_it_is_known_to_play():
    tower = load_katago(KATAGO)
    corners = {"Q4", "D4", "Q16", "D16", "R4", "Q3", "D3", "C4", "C16", "D17", "Q17", "R16"}
    from prairie.games.features import TowerJudge, encode
    from prairie.games.go import Boards, vertex

    best = {}
    for size in (9, 19):
        logits = TowerJudge(tower, seed=None)(*encode(Boards.empty(size, 1), [7.5])).logits_RM[0]
        best[size] = [vertex(int(move), size) for move in logits.argsort()[::-1][:4]]
    assert best[9][0] == "E5" and set(best[19]) <= corners
    assert tower.config.blocks == ("plain", "plain", "pooled", "plain", "pooled", "plain")


@needs_katago
def test_a_strong_net_knows_who_owns_a_finished_board():
    """Black's wall and white's wall on a 9x9 board: ownership, lead and value must all say what stands there."""
    from prairie.games.features import TowerJudge, encode
    from prairie.games.go import Boards, Position

    rows = ["....XO..."] * 9
    stones = [".XO".index(c) for row in rows for c in row]
    judge = TowerJudge(load_katago(KATAGO), seed=None)
    for to_move in (1, 2):
        planes, figures = encode(Boards.at([Position.of(9, stones, to_move)]), [0.5])
        judged = judge.judged(planes, figures)
        sign = 1 if to_move == 1 else -1
        owner = torch.tanh(judged.owner_BHW[0]) * sign
        assert owner[:, :5].min() > 0.8 and owner[:, 5:].max() < -0.8
        assert judged.value_B[0] * sign > 0.9 and abs(float(judged.lead_B[0]) * sign - 8.5) < 2.5


@needs_katago
def test_what_is_no_net_is_refused(tmp_path):
    data = KATAGO.read_bytes()
    (tmp_path / "x.bin.gz").write_bytes(data[:1000])
    with pytest.raises(ModelError, match="cannot be read as a KataGo net"):
        load_katago(tmp_path / "x.bin.gz")
    import gzip

    whole = gzip.decompress(data)
    for bad, sentence in ((whole[:50_000], "no KataGo net"), (whole.replace(b"\n8\n", b"\n9\n", 1), "version 9")):
        (tmp_path / "x.bin.gz").write_bytes(gzip.compress(bad))
        with pytest.raises(ModelError, match=sentence):
            load_katago(tmp_path / "x.bin.gz")
