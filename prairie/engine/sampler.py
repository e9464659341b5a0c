"""Logits -> the next token of each sequence, for the whole batch in one pass.

Randomness is counter-based: the number that draws token i of a request is a hash of (seed, i), so a request draws the
same whatever runs beside it. Sampling is by the inverse of the cumulative distribution.
Not here: what may be asked for (`request.SamplingParams`), stop conditions (`engine`).

Shapes: B sequences that get a token in this step, V tokens of the model, rows (B,) their places in the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from prairie.engine.request import Sequence, TopLogprobs

if TYPE_CHECKING:
    from prairie.engine.constraint import Matcher

CANDIDATES = 128
"""top_k and top_p first look at this many of the best tokens; only rows that need more sort the whole vocabulary."""
_NO_LIMIT = 2.0


@dataclass(slots=True)
class Sampled:
    """Lists of length B."""

    tokens: list[int]
    logprobs: list[float]
    """Raw: of the model's own distribution."""
    tops: list[TopLogprobs]
    """Empty if nobody asked."""
    broken: list[bool]
    """Rows whose logits were not finite; empty if all were."""


def uniform(seeds: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) from (seed, counter) pairs, both uint64: splitmix64's finaliser over a Weyl sequence."""
    return (_mix(_mix(seeds) + (counters + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Sampler:
    """Keeps the parameters of the running sequences as arrays by row."""

    def __init__(self, max_batch: int, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self.vocab_size = vocab_size
        """Tokens that may be drawn; a model may have more rows than its tokenizer has tokens."""
        self.device = torch.device(device)
        self._temperature = np.ones(max_batch, dtype=np.float32)
        self._top_k = np.zeros(max_batch, dtype=np.int64)
        self._top_p = np.full(max_batch, _NO_LIMIT, dtype=np.float32)
        self._min_p = np.zeros(max_batch, dtype=np.float32)
        self._seed = np.zeros(max_batch, dtype=np.uint64)
        self._tops = np.zeros(max_batch, dtype=np.int64)
        self._presence = np.zeros(max_batch, dtype=np.float32)
        self._frequency = np.zeros(max_batch, dtype=np.float32)
        self._biased = np.zeros(max_batch, dtype=bool)
        self._bias: dict[int, tuple[list[int], list[float]]] = {}
        self._constrained = np.zeros(max_batch, dtype=bool)
        self._plain = np.zeros(max_batch, dtype=bool)
        """Takes its likeliest token, as the logits have it, and wants to know no other."""
        self._matchers: dict[int, Matcher] = {}
        self._counts: Tensor | None = None
        """(max_batch, V) how often each row has generated each token; made when first needed."""

    @torch.inference_mode()
    def seat(self, sequence: Sequence) -> None:
        """A sequence starts, or goes on, in its row."""
        row, params = sequence.row, sequence.request.params
        self._temperature[row] = 0 if params.greedy else params.temperature
        self._top_k[row] = params.top_k if params.top_k < self.vocab_size else 0
        self._top_p[row] = params.top_p if params.top_p < 1 else _NO_LIMIT
        self._min_p[row] = params.min_p
        self._seed[row] = sequence.seed
        self._tops[row] = params.logprobs or 0
        self._presence[row], self._frequency[row] = params.presence_penalty, params.frequency_penalty
        self._biased[row] = bool(params.logit_bias)
        if params.logit_bias:
            self._bias[row] = (list(params.logit_bias.keys()), list(params.logit_bias.values()))
        self._constrained[row] = sequence.matcher is not None
        if sequence.matcher is not None:
            self._matchers[row] = sequence.matcher
        penalised = bool(params.presence_penalty or params.frequency_penalty)
        self._plain[row] = params.greedy and not (
            penalised or params.logit_bias or params.logprobs or sequence.matcher is not None
        )
        if penalised:
            if self._counts is None:
                self._counts = torch.zeros(len(self._temperature), self.vocab_size, device=self.device)
            generated = torch.tensor(sequence.ids[sequence.prompt_tokens :], dtype=torch.long, device=self.device)
            self._counts[row] = torch.bincount(generated, minlength=self.vocab_size)

    def only_best(self, rows: np.ndarray) -> bool:
        """Whether every row takes its likeliest token, as the logits have it, and wants to know no other."""
        return bool(self._plain[rows].all())

    def take_best(self, best_B: np.ndarray, logprobs_B: np.ndarray, norms_B: np.ndarray) -> Sampled:
        """What `__call__` makes of such rows, whose likeliest tokens and log-normalisers are known."""
        broken = [not math.isfinite(norm) for norm in norms_B.tolist()]
        return Sampled(best_B.tolist(), logprobs_B.tolist(), [], broken if any(broken) else [])

    @torch.inference_mode()
    def __call__(self, logits_BV: Tensor, rows: np.ndarray, counters: np.ndarray) -> Sampled:
        """`counters` (B,): how many tokens each sequence has generated before."""
        norm_B = logits_BV.logsumexp(-1)
        shaped_BV = self._shape(logits_BV[:, : self.vocab_size], rows)
        tokens_B = self._choose(shaped_BV, rows, counters)
        logprobs_B = logits_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1) - norm_B
        if self._counts is not None:
            self._counts[torch.from_numpy(rows).to(self.device), tokens_B] += 1
        finite = torch.isfinite(norm_B)
        return Sampled(
            tokens=tokens_B.tolist(),
            logprobs=logprobs_B.tolist(),
            tops=self._best(logits_BV[:, : self.vocab_size], norm_B, rows),
            broken=[] if bool(finite.all()) else (~finite).tolist(),
        )

    def _shape(self, logits_BV: Tensor, rows: np.ndarray) -> Tensor:
        """Penalties (OpenAI's formula, over generated tokens), biases, and the tokens that a constraint forbids; the
        logits themselves if there is nothing of it."""
        presence, frequency, biased = self._presence[rows], self._frequency[rows], self._biased[rows]
        penalised = (presence != 0) | (frequency != 0)
        constrained = np.flatnonzero(self._constrained[rows])
        if not penalised.any() and not biased.any() and not constrained.size:
            return logits_BV
        shaped_BV = logits_BV.clone()
        if penalised.any():
            assert self._counts is not None
            which = np.flatnonzero(penalised)
            counts = self._counts[torch.from_numpy(rows[which]).to(self.device)]
            minus = self._column(frequency[which]) * counts + self._column(presence[which]) * (counts > 0)
            shaped_BV[torch.from_numpy(which).to(self.device)] -= minus
        for place in np.flatnonzero(biased).tolist():
            ids, values = self._bias[int(rows[place])]
            shaped_BV[place, ids] += torch.tensor(values, device=self.device)
        if constrained.size:
            places = torch.from_numpy(constrained).to(self.device)
            shaped_BV[places] = shaped_BV[places].masked_fill_(self._forbidden(rows[constrained]), -torch.inf)
        return shaped_BV

    def _forbidden(self, rows: np.ndarray) -> Tensor:
        """(B, V) true where the row's constraint does not let the token follow. A row whose constraint has broken down
        forbids nothing: its sequence ends with this token anyway."""
        bits = np.stack([np.frombuffer(self._matchers[row].allowed(), np.uint8) for row in rows.tolist()])
        allowed_BV = np.unpackbits(bits, axis=1, bitorder="little")[:, : self.vocab_size].astype(bool)
        allowed_BV[~allowed_BV.any(1)] = True
        return torch.from_numpy(~allowed_BV).to(self.device)

    def _choose(self, shaped_BV: Tensor, rows: np.ndarray, counters: np.ndarray) -> Tensor:
        """(B,) tokens. Each row goes the way that its own parameters say, never one that its neighbours say."""
        greedy = self._temperature[rows] == 0
        if greedy.all():
            return shaped_BV.argmax(-1)
        draws = uniform(self._seed[rows], counters.astype(np.uint64))
        narrow = ~greedy & ((self._top_k[rows] > 0) | (self._top_p[rows] <= 1))
        wide = ~greedy & ~narrow
        if wide.all():
            return self._from_all(shaped_BV, rows, draws)
        tokens_B = torch.empty(len(rows), dtype=torch.long, device=self.device)
        for part, choose in ((greedy, None), (narrow, self._from_best), (wide, self._from_all)):
            if part.any():
                index = np.flatnonzero(part)
                places = torch.from_numpy(index).to(self.device)
                own_BV = shaped_BV if part.all() else shaped_BV[places]
                tokens_B[places] = own_BV.argmax(-1) if choose is None else choose(own_BV, rows[index], draws[index])
        return tokens_B

    def _from_all(self, logits_BV: Tensor, rows: np.ndarray, draws: np.ndarray) -> Tensor:
        """Draws from the whole vocabulary, in its order."""
        probs_BV = self._scaled(logits_BV, rows).softmax(-1)
        min_p = self._min_p[rows]
        if min_p.any():
            floor = probs_BV.amax(-1, keepdim=True) * self._column(min_p)
            probs_BV.masked_fill_(probs_BV < floor, 0.0)
        return self._draw(probs_BV, draws)

    def _from_best(self, logits_BV: Tensor, rows: np.ndarray, draws: np.ndarray, width: int = CANDIDATES) -> Tensor:
        """top_k, then top_p of what is left, then min_p; draws from the best tokens in falling order."""
        scaled_BV = self._scaled(logits_BV, rows)
        width = min(width, self.vocab_size)
        best_BK, ids_BK = scaled_BV.topk(width)
        probs_BK = (best_BK - scaled_BV.logsumexp(-1, keepdim=True)).exp_()
        top_k = self._top_k[rows]
        if top_k.any():
            limit = self._column(np.where(top_k > 0, top_k, self.vocab_size))
            probs_BK.masked_fill_(torch.arange(width, device=self.device) >= limit, 0.0)
            limited = self._column(top_k > 0)
            probs_BK = torch.where(limited, probs_BK / probs_BK.sum(-1, keepdim=True), probs_BK)
        mass_BK, top_p = probs_BK.cumsum(-1), self._column(self._top_p[rows])
        kept_BK = probs_BK.masked_fill(mass_BK - probs_BK >= top_p, 0.0)
        floor = probs_BK[:, :1] * self._column(self._min_p[rows])
        kept_BK.masked_fill_(probs_BK < floor, 0.0)
        tokens_B = ids_BK.gather(1, self._draw(kept_BK, draws).unsqueeze(1)).squeeze(1)
        if width == self.vocab_size:
            return tokens_B
        missing = np.where(top_k > 0, top_k > width, (mass_BK[:, -1:] < top_p).squeeze(1).cpu().numpy())
        if missing.any():
            index = np.flatnonzero(missing)
            places = torch.from_numpy(index).to(self.device)
            tokens_B[places] = self._from_best(logits_BV[places], rows[index], draws[index], self.vocab_size)
        return tokens_B

    def _scaled(self, logits_BV: Tensor, rows: np.ndarray) -> Tensor:
        temperature = self._temperature[rows]
        return logits_BV if (temperature == 1).all() else logits_BV / self._column(temperature)

    def _draw(self, weights_BK: Tensor, draws: np.ndarray) -> Tensor:
        """(B,) the first index whose cumulated weight exceeds draw x total; it has a weight above 0."""
        mass_BK = weights_BK.cumsum(-1)
        total = mass_BK[:, -1:]
        target = torch.minimum(total * self._column(draws.astype(np.float32)), torch.nextafter(total, total * 0))
        index = torch.searchsorted(mass_BK, target.contiguous(), right=True).squeeze(1)
        return index.clamp_max_(mass_BK.shape[1] - 1)

    def _best(self, logits_BV: Tensor, norm_B: Tensor, rows: np.ndarray) -> list[TopLogprobs]:
        wanted = self._tops[rows]
        if not wanted.any():
            return []
        values, ids = logits_BV.topk(min(int(wanted.max()), self.vocab_size))
        pairs = zip(ids.tolist(), (values - norm_B.unsqueeze(1)).tolist(), wanted.tolist(), strict=True)
        return [list(zip(tokens[:n], logprobs[:n], strict=True)) for tokens, logprobs, n in pairs]

    def _column(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device).unsqueeze(1)
