"""Records to rows of tokens, and rows to batches: what a training step eats, resumable to the exact row.

A dataset is three flat arrays: `ids` and `mask` of all rows one after the other, `offsets` of the rows. Batches are
flat too (no padding). Nothing is dropped in silence: a row that cannot be learnt from is refused, counted and listed.

Legend: N = all tokens of a batch. Not here: reading files (`sources`), attention between the tokens of a row (`ops`).
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from prairie.data.chat_template import ChatTemplate, Dialogue, Filled, Rendered
from prairie.data.processes import in_processes, making_many
from prairie.data.records import Chat, Message, Preference, Text
from prairie.data.tokenizer import Tokenizer
from prairie.data.words import spread
from prairie.errors import DataError, TemplateError, TrainingError

if TYPE_CHECKING:
    import torch

OnLong = Literal["refuse", "truncate"]
_CHUNK = 2048
"""Records tokenised at once: enough to feed all cores, few enough to keep memory flat."""
_PROBED = 64
"""Conversations that are looked at before all are made into rows."""
_LISTED = 1000
"""Refused rows listed in the figures; all are counted."""
_T = TypeVar("_T")


class TokenDataset:
    """Rows of tokens. `group` rows that belong together lie side by side: 2 for preferences (chosen, rejected)."""

    def __init__(
        self,
        ids: npt.NDArray[np.uint32],
        mask: npt.NDArray[np.bool_],
        offsets: npt.NDArray[np.int64],
        *,
        group: int = 1,
        figures: dict[str, Any] | None = None,
        fingerprint: str | None = None,
        targets: npt.NDArray[np.int64] | None = None,
        weights: npt.NDArray[np.float64] | None = None,
    ) -> None:
        """`ids`, `mask`: (tokens,); `offsets`: (rows + 1,), row i is `ids[offsets[i]:offsets[i + 1]]`; `targets`:
        (rows,) the class of each row, where rows have one; `weights`: (groups,) how much each group counts, above 0,
        where they do not all count the same."""
        rows = len(offsets) - 1
        if rows < group or rows % group or len(ids) != len(mask) or int(offsets[-1]) != len(ids):
            raise DataError(
                "this dataset has no whole rows", got=f"{rows} rows, {len(ids)} tokens", wanted=f"groups of {group}"
            )
        if targets is not None and len(targets) != rows:
            raise DataError("not every row has its class", got=f"{len(targets)} classes", wanted=f"{rows}")
        if weights is not None and not (
            len(weights) * group == rows and bool(np.all((weights > 0) & (weights < np.inf)))
        ):
            raise DataError(
                "the weights do not fit", got=f"{len(weights)} of {rows // group}", wanted="one above 0 each"
            )
        self.ids, self.mask, self.offsets, self.group, self.targets = ids, mask, offsets, group, targets
        self.weights = weights
        self.figures: dict[str, Any] = {
            "rows": rows,
            "tokens": len(ids),
            "supervised_tokens": int(np.count_nonzero(mask)),
            "longest_row": int(np.diff(offsets).max()),
            "truncated_rows": 0,
            "truncated_tokens": 0,
            "refused_rows": 0,
            "refused": [],
        } | (figures or {})
        if weights is not None:
            self.figures["weighted_rows"] = int(np.count_nonzero(weights != 1))
        self.fingerprint = fingerprint or _fingerprint(ids, mask, offsets, group, targets, weights)

    @classmethod
    def from_texts(
        cls, records: Iterable[Text], tokenizer: Tokenizer, row_tokens: int, *, marked: bool = False
    ) -> TokenDataset:
        """Documents, each ended by eos (and begun by bos where the tokenizer does so), cut in rows of at most
        `row_tokens`; all tokens but a row's first are learnt. Raises DataError if nothing is left.

        `marked`: as an encoder reads texts, every row between the marks of its tokenizer ([CLS] and [SEP]).
        """
        if row_tokens < 3:
            raise DataError("rows are too short to learn from", got=row_tokens, wanted="row_tokens of 3 or more")
        rows = _Rows()
        begin, end = _ends(tokenizer, marked)
        room = row_tokens - len(begin) - len(end)
        count = 0
        for chunk in _chunks(records):
            for text_ids in tokenizer.encode_batch([record.text for record in chunk]):
                if text_ids:
                    step = max(1, room) if marked else len(text_ids)
                    for first in range(0, len(text_ids), step):
                        row = begin + text_ids[first : first + step] + end
                        rows.add_document(np.array(row, np.uint32), row_tokens, count)
                else:
                    rows.refuse(count, "the document has no text")
                count += 1
        return rows.dataset(1, "texts")

    @classmethod
    def from_chats(
        cls, records: Iterable[Chat], template: ChatTemplate, max_tokens: int, *, on_long: OnLong = "refuse"
    ) -> TokenDataset:
        """One row a conversation (one an answer where the template writes earlier turns anew); assistants' turns and
        their stop tokens are learnt.

        A row without an assistant's turn, or longer than `max_tokens`, is refused and listed; with
        `on_long="truncate"` it is cut and counted instead. Raises DataError if nothing is left.
        """
        template.check_trainable()
        waiting = iter(records)
        first = list(islice(waiting, _PROBED))
        alike = len(template.fill([Dialogue(record.messages, record.tools) for record in first]).numbers)
        # What is filled in is made here sooner than it is handed to other processes.
        processes = 1 if 2 * alike > len(first) else None
        make = partial(_chat_rows, template, max_tokens, on_long)
        return _rows_of(chain(first, waiting), make, processes).dataset(1, "conversations")

    @classmethod
    def from_preferences(
        cls, records: Iterable[Preference], template: ChatTemplate, max_tokens: int, *, on_long: OnLong = "refuse"
    ) -> TokenDataset:
        """Two rows a preference, chosen then rejected, side by side; only what comes after the prompt is learnt.

        Refused as in `from_chats` if either side is, and if both sides are the same tokens.
        """
        template.check_trainable()
        return _rows_of(records, partial(_preference_rows, template, max_tokens, on_long)).dataset(2, "preferences")

    @classmethod
    def from_judged(
        cls, records: Iterable[Chat], template: ChatTemplate, max_tokens: int, *, on_long: OnLong = "refuse"
    ) -> TokenDataset:
        """Two rows an answer that people liked or not (`Chat.label`): the answer, and behind the same prompt the answer
        to the next record's prompt that is another one (KTO's mismatched pair), cut to `max_tokens` whatever `on_long`
        says. Only what comes after the prompt is marked; the class of both rows is 1 for liked, else 0.

        Refused as in `from_chats`, and without a label or without an answer at the end. Raises DataError if nothing is
        left, or if all records ask the same.
        """
        template.check_trainable()
        every = list(records)
        judged = list(zip(every, _others(every), strict=True))
        return _rows_of(judged, partial(_judged_rows, template, max_tokens, on_long)).dataset(2, "judged answers")

    @classmethod
    def from_labelled(
        cls,
        records: Iterable[Text],
        tokenizer: Tokenizer,
        labels: Sequence[str],
        max_tokens: int,
        *,
        on_long: OnLong = "refuse",
        marked: bool = False,
    ) -> TokenDataset:
        """One row a text, as it will be read in service: with bos where the tokenizer adds it, and no eos; its class is
        the place of its label in `labels`. The mask marks the token that a decoder's score is read from, the last one.
        `marked`: between the marks of the tokenizer, as encoders read.

        A row of another label, or longer than `max_tokens`, is refused and listed; `on_long="truncate"` cuts its text.
        Raises DataError if nothing is left.
        """
        rows = _Rows()
        begin, end = _ends(tokenizer, marked)
        end = end if marked else []
        number_of = {label: number for number, label in enumerate(labels)}
        count = 0
        for chunk in _chunks(records):
            for record, ids in zip(chunk, tokenizer.encode_batch([record.text for record in chunk]), strict=True):
                row = _scored(begin + ids, end, max_tokens, on_long) if ids else "the document has no text"
                if record.label not in number_of:
                    row = f"label {record.label!r} is none of {', '.join(labels)}" if record.label else "no `label`"
                rows.add(count, [row], target=number_of.get(str(record.label)))
                count += 1
        made = rows.dataset(1, "labelled texts")
        counts = np.bincount(rows.targets, minlength=len(labels)).tolist()
        made.figures["labels"] = dict(zip(labels, counts, strict=True))
        return made

    @classmethod
    def from_answers(
        cls, records: Iterable[Chat], tokenizer: Tokenizer, max_tokens: int, *, on_long: OnLong = "refuse"
    ) -> TokenDataset:
        """Two rows a conversation of one question and one answer, for an encoder-decoder: what is read, with the marks
        that the tokenizer puts, and what is answered.

        A conversation of more turns, or with a side longer than `max_tokens`, is refused and listed;
        `on_long="truncate"` cuts it. Raises DataError if nothing is left.
        """
        rows = _Rows()
        for count, record in enumerate(records):
            if [message.role for message in record.messages] != ["user", "assistant"]:
                rows.refuse(count, "not one question and one answer")
                continue
            sides = [tokenizer.encode_input(message.content).ids for message in record.messages]
            masks = [False] * len(sides[0]), [True] * len(sides[1])
            if record.weight != 1:
                rows.refuse(count, "an encoder-decoder learns without weights, and this row has one")
                continue
            rows.add(count, [_side(*side, max_tokens, on_long) for side in zip(sides, masks, strict=True)])
        return rows.dataset(2, "questions with answers")

    def check_refused(self, most: float) -> None:
        """Raises DataError if a larger share than `most` of the rows was refused while this dataset was made."""
        refused = int(self.figures["refused_rows"])
        total = refused + len(self)
        if refused > most * total:
            first = self.figures["refused"][0]
            raise DataError(
                "too many rows cannot be learnt from",
                got=f"{refused} of {total} refused, the first (row {first['row']}): {first['reason']}",
                wanted=f"at most {most:.0%}",
                mend="raise `max_tokens`, cut long rows with `on_long: truncate`, or raise `max_refused`",
            )

    def rows_without_label(self) -> npt.NDArray[np.int64]:
        """The numbers of the groups' last rows that have no supervised token behind their first one. (The first row of
        a group may be one that is only read.)"""
        last = np.arange(self.group - 1, len(self.offsets) - 1, self.group)
        marks = np.concatenate([[0], np.cumsum(self.mask)])
        firsts = np.asarray(self.mask[self.offsets[:-1]], np.int64)
        found = marks[self.offsets[1:]] - marks[self.offsets[:-1]] - firsts
        return last[found[last] < 1]

    def __len__(self) -> int:
        """Number of groups."""
        return (len(self.offsets) - 1) // self.group

    def batch(self, rows: Sequence[int], epoch: int = 0) -> Batch:
        """The batch of these rows, in this order."""
        return batch_of(self, rows, epoch)

    def row(self, i: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
        """Ids and mask of row i."""
        start, end = int(self.offsets[i]), int(self.offsets[i + 1])
        return self.ids[start:end], self.mask[start:end]

    def save(self, folder: Path | str) -> None:
        """Three `.npy` files and `dataset.json`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("ids", "mask", "offsets"):
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)
        if self.targets is not None:
            np.save(folder / "targets.npy", self.targets, allow_pickle=False)
        if self.weights is not None:
            np.save(folder / "weights.npy", self.weights, allow_pickle=False)
        about = {"group": self.group, "fingerprint": self.fingerprint, "figures": self.figures}
        (folder / "dataset.json").write_text(json.dumps(about, indent=2, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str, *, verify: bool = False) -> TokenDataset:
        """Memory-maps what `save` wrote; `verify` reads it all and compares the fingerprint. Raises DataError."""
        folder = Path(folder)
        try:
            about = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
            arrays = [
                np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in ("ids", "mask", "offsets")
            ]
            targets, weights = (
                np.load(path, allow_pickle=False) if (path := folder / f"{name}.npy").exists() else None
                for name in ("targets", "weights")
            )
            group, fingerprint, figures = int(about["group"]), str(about["fingerprint"]), dict(about["figures"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder} holds no dataset", got=str(error), wanted="what TokenDataset.save wrote"
            ) from None
        ids, mask, offsets = arrays
        if verify and _fingerprint(ids, mask, offsets, group, targets, weights) != fingerprint:
            raise DataError(f"the dataset in {folder} is damaged", got="another fingerprint", wanted=fingerprint[:12])
        return cls(
            ids, mask, np.asarray(offsets), group=group, figures=figures, fingerprint=fingerprint, targets=targets,
            weights=weights,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows one after the other, without padding."""

    tokens_N: torch.Tensor
    """int64."""
    labels_N: torch.Tensor
    """int64: the next token of the same row where it is learnt, else -100."""
    lengths: list[int]
    rows: list[int]
    """Row numbers in the dataset."""
    epoch: int = 0
    """Which pass over the data this is: what is drawn for a row may depend on it."""
    targets_R: torch.Tensor | None = None
    """int64: the class of each row, where rows have one."""
    weights_R: torch.Tensor | None = None
    """float64: how much each row counts (that of its group), where they do not all count the same."""

    @property
    def size(self) -> int:
        """Tokens."""
        return len(self.tokens_N)

    @property
    def supervised(self) -> int:
        """Number of labels."""
        return int((self.labels_N != -100).sum())

    def described(self) -> list[dict[str, Any]]:
        """Each row, JSON-able, for a report of what went wrong."""
        tokens, labels = self.tokens_N.split(self.lengths), self.labels_N.split(self.lengths)
        return [
            {"token_ids": ids.tolist(), "label_ids": wanted.tolist()}
            for ids, wanted in zip(tokens, labels, strict=True)
        ]


class Rows(Protocol):
    """What a loader asks of a dataset: rows of tokens here, positions of games elsewhere."""

    @property
    def group(self) -> int: ...

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """(rows + 1,): where each row begins, in the unit that a batch is filled up with."""
        ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int:
        """Number of groups."""
        ...

    def batch(self, rows: Sequence[int], epoch: int = 0) -> Any: ...


def batch_of(dataset: TokenDataset, rows: Sequence[int], epoch: int = 0) -> Batch:
    """The batch of these rows, in this order."""
    import torch

    index = np.asarray(rows, np.int64)
    starts = dataset.offsets[index]
    lengths = dataset.offsets[index + 1] - starts
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    positions = spread(starts, lengths)
    tokens = dataset.ids[positions].astype(np.int64)
    learnt = np.where(dataset.mask[positions], tokens, -100)
    labels = np.full(total, -100, np.int64)
    labels[:-1] = learnt[1:]
    labels[ends[lengths > 0] - 1] = -100  # a row's last token does not predict the next row
    targets = None if dataset.targets is None else torch.from_numpy(dataset.targets[index])
    weights = None if dataset.weights is None else torch.from_numpy(dataset.weights[index // dataset.group])
    return Batch(
        torch.from_numpy(tokens), torch.from_numpy(labels), lengths.tolist(), index.tolist(), epoch, targets, weights
    )


def prompts_of(dataset: TokenDataset) -> npt.NDArray[np.int64]:
    """(groups,) a number for what each group's first row says before its first learnt token; equal prompts have equal
    numbers, counted from 0 by first appearance. Groups of one row have a number each."""
    if dataset.group == 1:
        return np.arange(len(dataset))
    numbers: dict[bytes, int] = {}
    found = np.empty(len(dataset), np.int64)
    for group in range(len(dataset)):
        ids, mask = dataset.row(group * dataset.group)
        found[group] = numbers.setdefault(ids[: int(np.argmax(mask))].tobytes(), len(numbers))
    return found


class Loader:
    """Endless batches: a seeded permutation of the prompts per epoch, filled greedily up to `tokens_per_batch`.

    A batch holds whole groups of one epoch. Only a single group longer than the limit makes a batch exceed it. Groups
    that answer one prompt follow each other, so that the prompt can be computed once for them.
    """

    def __init__(self, dataset: Rows, *, tokens_per_batch: int, seed: int, shuffle: bool = True) -> None:
        if tokens_per_batch < 1:
            raise TrainingError("a batch needs tokens", got=tokens_per_batch, wanted="tokens_per_batch of 1 or more")
        self.dataset, self.tokens_per_batch, self.seed, self.shuffle = dataset, tokens_per_batch, seed, shuffle
        self._group_tokens = np.diff(dataset.offsets[:: dataset.group])
        prompts = prompts_of(dataset) if isinstance(dataset, TokenDataset) else np.arange(len(dataset))
        self._by_prompt, self._prompt_groups = np.argsort(prompts, kind="stable"), np.bincount(prompts)
        self._epoch, self._cursor = 0, 0
        self._start_epoch()

    def next_step(self, micro_batches: int = 1, rank: int = 0, ranks: int = 1) -> list[Any]:
        """Of the next `micro_batches` batches every `ranks`-th, from the `rank`-th on: together the ranks see what one
        process would."""
        batches = []
        for index in range(micro_batches):
            rows = self._next_rows()
            if index % ranks == rank:
                batches.append(self.dataset.batch(rows, self._epoch))
        return batches

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self._epoch + self._cursor / len(self.dataset)

    @property
    def batches_per_epoch(self) -> int:
        """Batches of one pass (exact for the current epoch, near that for others)."""
        cursor = batches = 0
        while cursor < len(self.dataset):
            cursor = self._fill(cursor)
            batches += 1
        return batches

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch starts; JSON."""
        return {
            "epoch": self._epoch,
            "cursor": self._cursor,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "fingerprint": self.dataset.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken. Raises TrainingError if the data or their order are others."""
        for key, mine in (("fingerprint", self.dataset.fingerprint), ("seed", self.seed), ("shuffle", self.shuffle)):
            if state.get(key) != mine:
                raise TrainingError(
                    f"this run cannot go on: the {'data' if key == 'fingerprint' else key} changed since it was saved",
                    got=mine,
                    wanted=state.get(key),
                    mend="restore it, or start a new run",
                )
        self._epoch, self._cursor = int(state["epoch"]), int(state["cursor"])
        self._start_epoch()

    def _start_epoch(self) -> None:
        if self.shuffle:
            count = len(self._prompt_groups)
            prompts = np.random.Generator(np.random.PCG64([self.seed, self._epoch])).permutation(count)
            starts, sizes = (
                (np.cumsum(self._prompt_groups) - self._prompt_groups)[prompts],
                self._prompt_groups[prompts],
            )
            self._order = self._by_prompt[spread(starts, sizes)]
        else:
            self._order = np.arange(len(self.dataset))
        self._tokens_until = np.concatenate([[0], np.cumsum(self._group_tokens[self._order])])

    def _fill(self, cursor: int) -> int:
        """End of the batch that starts at group `cursor` of the permutation."""
        limit = self._tokens_until[cursor] + self.tokens_per_batch
        return max(int(np.searchsorted(self._tokens_until, limit, side="right")) - 1, cursor + 1)

    def _next_rows(self) -> list[int]:
        if self._cursor >= len(self.dataset):
            self._epoch, self._cursor = self._epoch + 1, 0
            self._start_epoch()
        end = self._fill(self._cursor)
        groups, size = self._order[self._cursor : end], self.dataset.group
        self._cursor = end
        rows: list[int] = (groups[:, None] * size + np.arange(size)).ravel().tolist()
        return rows


@dataclass(slots=True)
class _Row:
    ids: list[int]
    mask: list[bool]
    cut: int = 0
    """Tokens that were cut off."""


class _Rows:
    """Rows while a dataset is made."""

    def __init__(self) -> None:
        self.ids: list[npt.NDArray[np.uint32]] = []
        self.mask: list[npt.NDArray[np.bool_]] = []
        self.lengths: list[int] = []
        self.targets: list[int] = []
        """The class of each row; empty where rows have none."""
        self.weights: list[float] = []
        """Of each group; empty where nothing was said of them."""
        self.truncated = 0
        self.cut = 0
        self.refused: list[dict[str, Any]] = []
        self.refused_count = 0
        self.records = 0
        """What the rows were made of, where several such are put together."""

    def append(self, other: _Rows) -> None:
        """The rows of the records that follow."""
        self.ids += other.ids
        self.mask += other.mask
        self.lengths += other.lengths
        self.targets += other.targets
        self.weights += other.weights
        self.truncated += other.truncated
        self.cut += other.cut
        self.refused += [{**row, "row": self.records + row["row"]} for row in other.refused]
        del self.refused[_LISTED:]
        self.refused_count += other.refused_count
        self.records += other.records

    def packed(self) -> _Rows:
        """Itself, its arrays joined: quicker to hand to another process."""
        if self.lengths:
            self.ids, self.mask = [np.concatenate(self.ids)], [np.concatenate(self.mask)]
        return self

    def refuse(self, row: int, reason: str) -> None:
        self.refused_count += 1
        if len(self.refused) < _LISTED:
            self.refused.append({"row": row, "reason": reason})

    def add(
        self, number: int, group: Sequence[_Row | str], *, weight: float | None = None, target: int | None = None
    ) -> None:
        """One group of rows, or why not: a group is kept whole or refused."""
        reason = next((row for row in group if isinstance(row, str)), None)
        if reason is not None:
            self.refuse(number, reason)
            return
        for row in group:
            assert isinstance(row, _Row)
            self.ids.append(np.array(row.ids, np.uint32))
            self.mask.append(np.array(row.mask, np.bool_))
            self.lengths.append(len(row.ids))
            self.truncated += row.cut > 0
            self.cut += row.cut
        self.targets += [] if target is None else [target] * len(group)
        self.weights += [] if weight is None else [weight]

    def add_filled(self, filled: Filled, first: int, end: int, weights: list[float]) -> None:
        """The rows from `first` on to `end`, as they are."""
        start, stop = int(filled.offsets[first]), int(filled.offsets[end])
        self.ids.append(filled.ids[start:stop])
        self.mask.append(filled.mask[start:stop])
        self.lengths += np.diff(filled.offsets[first : end + 1]).tolist()
        self.weights += weights

    def add_document(self, ids: npt.NDArray[np.uint32], row_tokens: int, number: int) -> None:
        if len(ids) < 2:
            self.refuse(number, "the document has one token and nothing to predict")
            return
        cuts = list(range(row_tokens, len(ids), row_tokens))
        if cuts and len(ids) - cuts[-1] == 1:  # a lone last token would predict nothing: give it company
            cuts[-1] -= 1
        lengths = np.diff([0, *cuts, len(ids)])
        mask = np.ones(len(ids), np.bool_)
        mask[[0, *cuts]] = False
        self.ids.append(ids)
        self.mask.append(mask)
        self.lengths += lengths.tolist()

    def dataset(self, group: int, what: str) -> TokenDataset:
        if not self.lengths:
            first = f"; the first: row {self.refused[0]['row']}, {self.refused[0]['reason']}" if self.refused else ""
            raise DataError(
                f"no row is left of these {what}",
                got=f"{self.refused_count} rows, all refused{first}",
                wanted="one row",
                mend="raise `max_tokens` or cut long rows with `on_long: truncate`" if "tokens" in first else None,
            )
        offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        figures = {
            "truncated_rows": self.truncated,
            "truncated_tokens": self.cut,
            "refused_rows": self.refused_count,
            "refused": self.refused,
        }
        ids, mask = np.concatenate(self.ids), np.concatenate(self.mask)
        targets = np.array(self.targets, np.int64) if self.targets else None
        weights = np.array(self.weights) if any(weight != 1 for weight in self.weights) else None
        return TokenDataset(ids, mask, offsets, group=group, figures=figures, targets=targets, weights=weights)


def _rows_of(records: Iterable[_T], make: Callable[[list[_T]], _Rows], processes: int | None = None) -> _Rows:
    """The rows of all records, made chunk by chunk, on all cores (or in so many processes) if there are many."""
    rows = _Rows()
    with making_many():
        for part in in_processes(make, _chunks(records), processes):
            rows.append(part)
    return rows


def _chat_rows(template: ChatTemplate, max_tokens: int, on_long: OnLong, chunk: list[Chat]) -> _Rows:
    rows = _Rows()
    dialogues = [Dialogue(record.messages, record.tools) for record in chunk]
    filled = template.fill(dialogues)
    fits = filled.fit(max_tokens)
    singly = sorted({*range(len(chunk))} - {number for number, fit in zip(filled.numbers, fits, strict=True) if fit})
    row_of = dict(zip(filled.numbers, range(len(fits)), strict=True))
    unlike = [number for number in singly if number not in row_of]
    rest = _each_or_why(template, [dialogues[number] for number in unlike], template.encode_rows)
    made = dict(zip(unlike, rest, strict=True))
    done = 0  # rows of `filled`
    for number in [*singly, len(chunk)]:
        end = bisect_left(filled.numbers, number)
        rows.add_filled(filled, done, end, [chunk[n].weight for n in filled.numbers[done:end]])
        done = end + (number in row_of)
        if number < len(chunk):
            rendered = made[number] if number in made else [filled.row(row_of[number])]
            for row in [rendered] if isinstance(rendered, str) else rendered:
                fitted = row if isinstance(row, str) else _fit(row, max_tokens, on_long)
                rows.add(number, [fitted], weight=chunk[number].weight)
    rows.records = len(chunk)
    return rows.packed()


def _preference_rows(template: ChatTemplate, max_tokens: int, on_long: OnLong, chunk: list[Preference]) -> _Rows:
    rows = _Rows()
    sides = [Dialogue((*r.prompt, *side), r.tools) for r in chunk for side in (r.chosen, r.rejected)]
    prompts = _each_or_why(
        template, [Dialogue(r.prompt, r.tools) for r in chunk], partial(template.encode_many, prompt=True)
    )
    rendered = _each_or_why(template, sides, template.encode_rows)
    for number, prompt in enumerate(prompts):
        pair = [_after(prompt, side, max_tokens, on_long) for side in rendered[2 * number : 2 * number + 2]]
        chosen, rejected = pair
        if isinstance(chosen, _Row) and isinstance(rejected, _Row) and chosen.ids == rejected.ids:
            pair = ["chosen and rejected are the same tokens"]
        rows.add(number, pair, weight=chunk[number].weight)
    rows.records = len(chunk)
    return rows.packed()


def _others(records: Sequence[Chat]) -> list[Chat]:
    """For each record the next one, round the end, with another prompt. Raises DataError if all prompts are one."""
    prompts = [record.messages[:-1] for record in records]
    if len(set(prompts)) < 2:
        raise DataError(
            "judged answers need two prompts or more", got=f"{len(records)} answers to {len(set(prompts))}",
            mend="the reference point is what a model says of answers to other prompts: add rows",
        )  # fmt: skip
    others = [records[0]] * len(records)
    for i in reversed(range(2 * len(records))):
        here, after = i % len(records), (i + 1) % len(records)
        others[here] = records[after] if prompts[after] != prompts[here] else others[after]
    return others


def _last_answer(record: Chat) -> Message:
    return next((m for m in reversed(record.messages) if m.role == "assistant"), record.messages[-1])


def _judged_rows(template: ChatTemplate, max_tokens: int, on_long: OnLong, chunk: list[tuple[Chat, Chat]]) -> _Rows:
    rows = _Rows()
    sides = [
        Dialogue((*record.messages[:-1], answer), record.tools)
        for record, other in chunk
        for answer in (record.messages[-1], _last_answer(other))
    ]
    prompts = _each_or_why(
        template, [Dialogue(r.messages[:-1], r.tools) for r, _ in chunk], partial(template.encode_many, prompt=True)
    )
    rendered = _each_or_why(template, sides, template.encode_rows)
    for number, (record, _) in enumerate(chunk):
        prompt, (its, foreign) = prompts[number], rendered[2 * number : 2 * number + 2]
        pair = [_after(prompt, its, max_tokens, on_long), _after(prompt, foreign, max_tokens, "truncate")]
        if record.label is None:
            pair = ["`label` does not say true or false"]
        rows.add(number, pair, weight=record.weight, target=int(record.label or False))
    rows.records = len(chunk)
    return rows.packed()


def _chunks(records: Iterable[_T]) -> Iterator[list[_T]]:
    iterator = iter(records)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk


def _each_or_why(
    template: ChatTemplate, dialogues: Sequence[Dialogue], encode: Callable[[Sequence[Dialogue]], list[_T]]
) -> list[_T | str]:
    """What `encode` makes of each, or why the template refuses it. Raises TemplateError if it refuses all training."""
    try:
        return list(encode(dialogues))
    except TemplateError:
        template.check_trainable()
    results: list[_T | str] = []
    for dialogue in dialogues:
        try:
            results += encode([dialogue])
        except TemplateError as error:
            results.append(str(error))
    return results


def _fit(rendered: Rendered, max_tokens: int, on_long: OnLong) -> _Row | str:
    """The row, cut if it may be, or why it is refused."""
    ids, mask = rendered.ids, rendered.mask
    if not any(mask[1:]):
        return "no assistant turn, so no supervised token"
    if len(ids) <= max_tokens:
        return _Row(ids, mask)
    if on_long == "refuse":
        return f"{len(ids)} tokens, more than the {max_tokens} allowed"
    if not any(mask[1:max_tokens]):
        return f"no supervised token is left after cutting {len(ids)} tokens to {max_tokens}"
    return _Row(ids[:max_tokens], mask[:max_tokens], cut=len(ids) - max_tokens)


def _ends(tokenizer: Tokenizer, marked: bool) -> tuple[list[int], list[int]]:
    """What stands before and behind every text: bos and eos, or (`marked`) the marks of the tokenizer's own making."""
    if marked:
        whole, text = tokenizer.encode_input("a").ids, tokenizer.encode("a")
        first = next(place for place in range(len(whole)) if whole[place : place + len(text)] == text)
        return whole[:first], whole[first + len(text) :]
    begin = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    return begin, [tokenizer.eos_id] if tokenizer.eos_id is not None else []


def _side(ids: list[int], mask: list[bool], max_tokens: int, on_long: OnLong) -> _Row | str:
    """What is read or what is answered, cut if it may be, or why it is refused."""
    if len(ids) < 2:
        return "a side with nothing in it"
    if len(ids) > max_tokens and on_long == "refuse":
        return f"{len(ids)} tokens, more than the {max_tokens} allowed"
    return _Row(ids[:max_tokens], mask[:max_tokens], cut=max(0, len(ids) - max_tokens))


def _scored(ids: list[int], end: list[int], max_tokens: int, on_long: OnLong) -> _Row | str:
    """A row whose last token is the supervised one, cut before its `end` if it may be, or why it is refused."""
    over = len(ids) + len(end) - max_tokens
    if over > 0 and on_long == "refuse":
        return f"{len(ids) + len(end)} tokens, more than the {max_tokens} allowed"
    ids = ids[: len(ids) - max(over, 0)] + end
    if len(ids) < 2:
        return "one token and nothing before it to read"
    return _Row(ids, [False] * (len(ids) - 1) + [True], cut=max(over, 0))


def _after(prompt: Rendered | str, rows: list[Rendered] | str, max_tokens: int, on_long: OnLong) -> _Row | str:
    """One side of a preference with only the tokens after the prompt supervised."""
    if isinstance(prompt, str) or isinstance(rows, str):
        return prompt if isinstance(prompt, str) else str(rows)
    length = len(prompt.ids)
    after = [row for row in rows if row.ids[:length] == prompt.ids and any(row.mask[length:])]
    if not after:
        return "an answer does not begin with an assistant turn"
    if len(after) > 1:
        return "a side has several answers, which this chat template does not write in one row"
    side = after[0]
    return _fit(Rendered(side.ids, [False] * length + side.mask[length:]), max_tokens, on_long)


def _fingerprint(
    ids: npt.NDArray[np.uint32],
    mask: npt.NDArray[np.bool_],
    offsets: npt.NDArray[np.int64],
    group: int,
    targets: npt.NDArray[np.int64] | None,
    weights: npt.NDArray[np.float64] | None,
) -> str:
    digest = hashlib.sha256(f"{group} {len(ids)} {len(offsets)}".encode())
    for array in (ids, mask, offsets, *(extra for extra in (targets, weights) if extra is not None)):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
