"""The stages that make data: `prepare` (rows, split, counted) and `tokenizer`.

A prepared folder holds `train.jsonl`, `held_out.jsonl` (records of `data/records.py`) and `refused.jsonl`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from prairie.data.builtin_templates import NEEDED
from prairie.data.chat_template import ChatTemplate
from prairie.data.clean import clean
from prairie.data.interpreter import interpreter_texts
from prairie.data.records import Chat, Preference, Record, Text
from prairie.data.sources import Loaded, Refused, read_records, write_records
from prairie.data.tokenizer import CHATML_SPECIALS, Tokenizer
from prairie.errors import DataError
from prairie.pipeline.context import Work, file_fingerprint
from prairie.recipe import Prepare, TrainTokenizer
from prairie.tasks.catalog import chats
from prairie.tasks.task import STYLES, Style

KINDS: dict[type, str] = {Text: "text", Chat: "chat", Preference: "preference"}


def prepare(work: Work) -> dict[str, Any]:
    """Rows from one source, cleaned, split into train and held-out, with what was refused beside them."""
    config: Prepare = work.config
    seed = work.context.recipe.seed
    refused: list[Refused] = []
    origin: str = config.source
    if config.source == "interpreter":
        train, held_out = _interpreter(config, seed)
    elif config.source == "tasks":
        train, held_out = _tasks(config, seed)
    else:
        loaded = read_records(str(config.path), want=config.want, format=config.format)
        _check_refused(work.name, config, loaded)
        refused, origin = loaded.refused, loaded.format
        train, held_out = _split(loaded.records[: config.limit], config.held_out)
    if not train:
        raise DataError(f"stage `{work.name}` keeps no row for training", mend="lower `held_out` or add rows")
    write_records(work.folder / "train.jsonl", train)
    write_records(work.folder / "held_out.jsonl", held_out)
    with (work.folder / "refused.jsonl").open("w", encoding="utf-8") as stream:
        for row in refused:
            fault = {"row": row.row, "file": Path(row.file).name, "reason": row.reason}
            stream.write(json.dumps(fault, ensure_ascii=False) + "\n")
    return {
        "rows": len(train),
        "held_out": len(held_out),
        "refused": len(refused),
        "kind": KINDS[type(train[0])],
        "format": origin,
        "bytes": sum(_size(record) for record in train),
    }


def outside_of_prepare(config: Prepare) -> list[str]:
    """A changed file, or another interpreter, is another product."""
    if config.source == "file":
        path = Path(config.path or "").expanduser()
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise DataError("no such data file", got=str(path), wanted="JSONL, JSON, .gz, Parquet or text")
        return [f"{file.name}:{file_fingerprint(file)}" for file in files]
    return [sys.version]


def tokenizer(work: Work) -> dict[str, Any]:
    """A byte-level BPE over the training rows, saved with its chat template."""
    config: TrainTokenizer = work.config
    special = dict.fromkeys((*CHATML_SPECIALS, *NEEDED.get(config.template, ())))
    trained = Tokenizer.train_bpe(_texts(work, config.data), config.vocab_size, tuple(special))
    template = ChatTemplate.builtin(config.template, trained)
    trained.save(work.folder)
    template.save(work.folder)
    sample = "".join(_texts(work, config.data, limit=200))
    return {
        "vocab_size": trained.vocab_size,
        "bytes_per_token": round(len(sample.encode()) / max(1, len(trained.encode(sample))), 3),
        "hash": trained.hash,
    }


def train_records(folder: Path) -> list[Record]:
    """The training rows of a prepared folder."""
    return read_records(folder / "train.jsonl").records


def held_out_records(folder: Path) -> list[Record]:
    """The held-out rows of a prepared folder; empty when none were kept."""
    path = folder / "held_out.jsonl"
    return read_records(path).records if path.is_file() and path.stat().st_size else []


def _interpreter(config: Prepare, seed: int) -> tuple[list[Record], list[Record]]:
    """The documentation and sources that are on every machine with Python; held out by document."""
    size = int(config.megabytes * 1e6)
    train, _ = clean(interpreter_texts(size, seed, split="train"))
    if not config.held_out:
        return list(train), []
    held_out, _ = clean(interpreter_texts(max(1, int(size * config.held_out)), seed, split="held_out"))
    return list(train), list(held_out)


def _tasks(config: Prepare, seed: int) -> tuple[list[Record], list[Record]]:
    """Conversations of tasks; their held-out facts stand in no training row."""
    wordings = cast(Sequence[Style], config.wordings or STYLES)
    train = chats(config.tasks, "train", config.rows, seed, wordings)
    held_out = chats(config.tasks, "held_out", int(config.rows * config.held_out), seed, wordings)
    return list(train), list(held_out)


def _check_refused(name: str, config: Prepare, loaded: Loaded) -> None:
    total = len(loaded.records) + len(loaded.refused)
    if len(loaded.refused) > config.max_refused * total:
        first = loaded.refused[0]
        raise DataError(
            f"stage `{name}` refuses too many rows",
            got=f"{len(loaded.refused)} of {total}, the first (row {first.row}): {first.reason}",
            wanted=f"at most {config.max_refused:.0%}",
            mend="mend the file or raise `max_refused`",
        )


def _split(records: Sequence[Record], share: float) -> tuple[list[Record], list[Record]]:
    """By the hash of the row, so that a row stays on its side when others are added."""
    train: list[Record] = []
    held_out: list[Record] = []
    for record in records:
        point = int.from_bytes(hashlib.sha256(_key(record).encode()).digest()[:8], "big") / 2**64
        (held_out if point < share else train).append(record)
    return train, held_out


def _key(record: Record) -> str:
    """What must not stand on both sides: the text, or the conversation up to its first answer."""
    if isinstance(record, Text):
        return record.text
    messages = record.messages if isinstance(record, Chat) else record.prompt
    opening: list[str] = []
    for message in messages:
        if message.role == "assistant":
            break
        opening.append(message.written)
    return "\x00".join(opening)


def _texts(work: Work, names: Iterable[str], limit: int | None = None) -> Iterable[str]:
    for name in names:
        for record in train_records(work.inputs[name].product.path)[:limit]:
            if isinstance(record, Text):
                yield record.text
            elif isinstance(record, Chat):
                yield from (message.written for message in record.messages)
            else:
                yield from (m.written for m in (*record.prompt, *record.chosen, *record.rejected))


def _size(record: Record) -> int:
    if isinstance(record, Text):
        return len(record.text.encode())
    messages = record.messages if isinstance(record, Chat) else (*record.prompt, *record.chosen)
    return sum(len(message.written.encode()) for message in messages)
