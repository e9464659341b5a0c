"""Learning from preferences without a reward model: DPO (arXiv 2305.18290) and its family.

h = (log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected)), sums over the supervised tokens.
  sigmoid  -log s(beta h); with `label_smoothing` e: (1-e) -log s(beta h) + e -log s(-beta h)   (cDPO)
  ipo      (h' - 1/(2 beta))^2, h' of log-probs averaged over each row's tokens   (arXiv 2310.12036, eq. 17)
  + sft_weight * -log p(chosen) per token of that row   (arXiv 2404.19733: keeps the chosen answer likely)

Every term is a sum over PAIRS, the NLL being averaged inside its own row, so that one count (pairs) divides them all.
A pair of weight w is a sum over w pairs, in the loss, the figures and the count.
The reference is a number per row, computed once per dataset: no second model stays in memory.

Not here: which of two answers is preferred (data, flywheel), the division by the count (trainer).
Shapes: R rows (chosen, rejected, chosen, ...), P = R / 2 pairs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import logsigmoid

from prairie.data.loader import Batch, TokenDataset
from prairie.errors import TrainingError
from prairie.models.lora import AdapterRows
from prairie.models.transformer import Transformer
from prairie.models.weights import hash_of
from prairie.train.checkpoint import writing
from prairie.train.objective import (
    computing_in,
    every_batch,
    hidden_states,
    judging,
    reference_of,
    require_finite,
    require_next_tokens,
    require_pairs,
    row_sums,
    row_weights,
    supervised_per_row,
)


@dataclass(frozen=True)
class DPOConfig:
    """Raises TrainingError for a value outside its range."""

    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: float = 0.1
    """The pull towards the reference; for `ipo` the paper's tau."""
    label_smoothing: float = 0.0
    """The share of pairs believed to be the wrong way round."""
    sft_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.loss not in ("sigmoid", "ipo"):
            raise TrainingError("the DPO loss is unknown", got=repr(self.loss), wanted="sigmoid or ipo", param="loss")
        if not self.beta > 0:
            raise TrainingError("beta is not positive", got=self.beta, wanted="above 0", param="beta")
        if not 0 <= self.label_smoothing < 0.5:
            raise TrainingError(
                "label_smoothing is out of range", got=self.label_smoothing, wanted="0 <= value < 0.5",
                param="label_smoothing",
            )  # fmt: skip
        if self.label_smoothing and self.loss == "ipo":
            raise TrainingError(
                "label_smoothing has no meaning for ipo", got=self.label_smoothing, wanted="0", mend="use loss sigmoid",
                param="label_smoothing",
            )  # fmt: skip
        if not self.sft_weight >= 0:
            raise TrainingError("sft_weight is negative", got=self.sft_weight, wanted="0 or more", param="sft_weight")


class DPO:
    """`reference_logps` (rows of the dataset,) are `reference_logprobs` of the same dataset."""

    name = "dpo"
    group = 2

    def __init__(self, config: DPOConfig, reference_logps: Tensor) -> None:
        require_finite(reference_logps)
        self.config = config
        self.reference_logps = reference_logps.detach().to(torch.float32).cpu()

    @property
    def settings(self) -> Mapping[str, Any]:
        return asdict(self.config)

    def count(self, batch: Batch) -> float:
        return float(row_weights(batch)[0::2].sum())

    def loss(
        self, model: Transformer, batch: Batch, adapters: Sequence[AdapterRows] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        require_next_tokens(model)
        require_pairs(batch)
        reference_R = reference_of(self.reference_logps, batch)
        hidden_ND, labels_N = hidden_states(model, batch, adapters)
        logps_R = row_sums(model.logprobs(hidden_ND, labels_N, adapters), batch.lengths)
        lengths_R = supervised_per_row(batch).to(logps_R.device)
        weights_P = row_weights(batch)[0::2].to(logps_R)
        return preference_loss(logps_R, reference_R.to(logps_R.device), lengths_R, self.config, weights_P)


def preference_loss(
    logps_R: Tensor, reference_R: Tensor, lengths_R: Tensor, config: DPOConfig, weights_P: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The formulas above. Returns the SUM over pairs and sums of figures; divide each by P for means.

    logps_R, reference_R: log-probabilities of rows, summed over supervised tokens; lengths_R: how many those are;
    weights_P: how much each pair counts, else each once.
    """
    w_P = torch.ones_like(logps_R[0::2]) if weights_P is None else weights_P
    ratios_R = logps_R - reference_R
    scores_R = ratios_R / lengths_R.clamp(min=1) if config.loss == "ipo" else ratios_R
    h_P = scores_R[0::2] - scores_R[1::2]
    if config.loss == "ipo":
        losses_P = (h_P - 1 / (2 * config.beta)) ** 2
    else:
        e = config.label_smoothing
        losses_P = -(1 - e) * logsigmoid(config.beta * h_P)
        if e:
            losses_P = losses_P - e * logsigmoid(-config.beta * h_P)
    nll_P = -logps_R[0::2] / lengths_R[0::2].clamp(min=1)
    loss = (w_P * losses_P).sum()
    if config.sft_weight:
        loss = loss + config.sft_weight * (w_P * nll_P).sum()
    with torch.no_grad():
        rewards_R = config.beta * ratios_R.detach()
        figures_P = {
            "preference_loss": losses_P,
            "accuracy": (rewards_R[0::2] > rewards_R[1::2]).float(),
            "margin": rewards_R[0::2] - rewards_R[1::2],
            "logps_chosen": logps_R[0::2],
            "logps_rejected": logps_R[1::2],
            "nll_chosen": nll_P,
            "length_chosen": lengths_R[0::2],
            "length_rejected": lengths_R[1::2],
        }
        return loss, {name: (w_P * value_P).sum() for name, value_P in figures_P.items()}


def reference_logprobs(
    model: Transformer,
    dataset: TokenDataset,
    adapters: Sequence[AdapterRows] = (),
    *,
    tokens_per_batch: int = 8192,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """log p of each row's supervised tokens, (rows,) float32 on the CPU. No adapters = the base is the reference.

    `dtype` is that of the training's forward pass, so that what rounding does to both cancels. The same model, data and
    threads give the same bits: a resumed run computes them anew.
    """
    logps_R = torch.zeros(len(dataset.offsets) - 1)
    with judging(model, adapters), computing_in(dtype, model):
        for batch in every_batch(dataset, tokens_per_batch):
            hidden_ND, labels_N = hidden_states(model, batch, adapters)
            logps_R[batch.rows] = row_sums(model.logprobs(hidden_ND, labels_N, adapters).float(), batch.lengths).cpu()
    return logps_R


def kept_reference(
    folder: Path,
    model: Transformer,
    dataset: TokenDataset,
    adapters: Sequence[AdapterRows] = (),
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`reference_logprobs`, read from `folder` where they were computed before.

    The file is named by all that decides the bits: weights, adapters, tokens and mask (so the template too), dtype, and
    the torch and threads that computed. A damaged file is computed anew. Raises StorageFullError.
    """
    about = [
        hash_of(model), [adapter.lora.hash for adapter in adapters], dataset.fingerprint, str(dtype),
        torch.__version__, torch.get_num_threads(), str(model.embed.device),
    ]  # fmt: skip
    path = folder / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()}.safetensors"
    with suppress(OSError, SafetensorError, KeyError):
        kept = load_file(path)["logps"]
        if len(kept) == len(dataset.offsets) - 1:
            return kept
    found = reference_logprobs(model, dataset, adapters, dtype=dtype)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}")
        save_file({"logps": found}, aside)
        aside.replace(path)
    return found


def held_out_preferences(
    model: Transformer,
    dataset: TokenDataset,
    adapters: Sequence[AdapterRows] = (),
    *,
    reference_logps: Tensor,
    config: DPOConfig,
    tokens_per_batch: int = 8192,
) -> dict[str, float]:
    """Means over the pairs of `dataset`: loss, accuracy, margin, log-probabilities, lengths; and `pairs`.

    `accuracy_by_likelihood` is the share of pairs whose chosen answer is the likelier one, no reference asked.
    """
    logps_R = reference_logprobs(model, dataset, adapters, tokens_per_batch=tokens_per_batch)
    lengths_R = torch.zeros_like(logps_R)
    for batch in every_batch(dataset, tokens_per_batch):
        lengths_R[batch.rows] = supervised_per_row(batch)
    loss, sums = preference_loss(logps_R, reference_logps.float().cpu(), lengths_R, config)
    pairs = len(logps_R) // 2
    figures = {name: float(value) / pairs for name, value in {"loss": loss, **sums}.items()}
    figures["accuracy_by_likelihood"] = float((logps_R[0::2] > logps_R[1::2]).float().mean())
    return {**figures, "pairs": float(pairs)}
