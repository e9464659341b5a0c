"""Policy and value: what a search found, how the game ended (AlphaGo Zero; ownership and lead as in arXiv 1902.10565).

Not here: where positions come from (games), the net (models/tower), steps (trainer).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from prairie.data.positions import PositionBatch
from prairie.models.lora import AdapterRows
from prairie.models.tower import SCORE_SCALE, Tower


@dataclass(frozen=True)
class PolicyValueConfig:
    """Weights of the parts of the loss beside that of the policy, which is 1."""

    value: float = 1.0
    lead: float = 0.1
    owner: float = 0.15


@dataclass(frozen=True)
class PolicyValue:
    """Sum over positions of cross-entropy with the search's policy and with the outcome, Huber loss of the lead in
    units of `SCORE_SCALE` points, and mean squared error of the ownership over the points of the board."""

    config: PolicyValueConfig = PolicyValueConfig()
    name: str = "policy_value"
    group: int = 1

    @property
    def settings(self) -> Mapping[str, Any]:
        return asdict(self.config)

    def count(self, batch: PositionBatch) -> float:
        return float(batch.size)

    def loss(
        self, model: Tower, batch: PositionBatch, adapters: Sequence[AdapterRows] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        device = next(model.parameters()).device
        planes = batch.planes_RCHW.to(device)
        judged = model(planes, batch.figures_RG.to(device))
        policy_RM, outcome_R = batch.policy_RM.to(device), batch.outcome_R.to(device)
        policy = -(policy_RM * judged.policy_BM.log_softmax(-1)).sum()
        outcome = judged.outcome_BO.log_softmax(-1)
        won_R = (1 + outcome_R) / 2
        value = -(won_R * outcome[:, 0] + (1 - won_R) * outcome[:, 1]).sum()
        lead = F.huber_loss(judged.score_BS[:, 0], batch.lead_R.to(device) / SCORE_SCALE, reduction="sum")
        exists = planes[:, 0]
        off = (judged.owner_BHW.tanh() - batch.owner_RHW.to(device)).square() * exists
        owner = (off.sum(dim=(1, 2)) / exists.sum(dim=(1, 2))).sum()
        config = self.config
        total = policy + config.value * value + config.lead * lead + config.owner * owner
        entropy = -(policy_RM * policy_RM.clamp(min=1e-9).log()).sum()
        right = (judged.policy_BM.argmax(-1) == policy_RM.argmax(-1)).sum()
        figures = {"policy": policy, "policy_gap": policy - entropy, "value": value, "lead": lead, "owner": owner}
        return total, {name: figure.detach() for name, figure in figures.items()} | {"accuracy": right.float()}
