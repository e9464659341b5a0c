"""Earlier rows beside what is learnt now: the other objective and their loss. (Splits, kills: with all objectives.)"""

import torch
from tiny_runs import tiny_dataset, tiny_model

from prairie.train.objectives.causal_lm import CausalLM
from prairie.train.objectives.dpo import DPO, DPOConfig, reference_logprobs
from prairie.train.objectives.replay import Replay


def test_the_gradient_is_the_other_objectives_and_that_of_each_earlier_row():
    model, votes, earlier = tiny_model(), tiny_dataset(7, group=2), tiny_dataset(11, seed=5)
    dpo = DPO(DPOConfig(), reference_logprobs(model, votes) - 1.0)
    mixed = Replay(dpo, earlier, len(votes), share=1.5, weight=0.3)

    def gradient(batch, objective):
        model.zero_grad()
        objective.loss(model, batch, ())[0].backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    batch = votes.batch(range(14), epoch=1)
    places = mixed.places(batch)
    assert len(places) == 11 and places[0] == 10, "10 rows were those of the epoch before, then the first come again"
    wanted = gradient(batch, dpo)
    for place in places:
        row = earlier.batch([place])
        wanted = wanted + 0.3 * gradient(row, CausalLM()) / row.supervised
    torch.testing.assert_close(gradient(batch, mixed), wanted, atol=1e-4, rtol=1e-4)
    assert mixed.count(batch) == 7 and mixed.settings["replay"]["rows"] == earlier.fingerprint


def test_every_group_brings_its_own_and_another_epoch_others():
    votes, earlier = tiny_dataset(8, group=2), tiny_dataset(40, seed=5)
    mixed = Replay(DPO(DPOConfig(), torch.zeros(16)), earlier, len(votes), share=0.5)
    first, second = (mixed.places(votes.batch(range(16), epoch=epoch)) for epoch in (0, 1))
    assert (first, second) == ([0, 1, 2, 3], [4, 5, 6, 7])
    assert mixed.places(votes.batch([2, 3, 6, 7])) == [0, 1] and mixed.places(votes.batch([0, 1])) == []
    figures = mixed.loss(tiny_model(), votes.batch([0, 1]), ())[1]
    assert float(figures["replay_loss"]) == 0.0
