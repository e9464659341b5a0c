"""All that people said of a line as one dataset artifact: pairs, labelled answers, edits, comments, each in its file.

Every kind has a folder with `train.jsonl` and `held_out.jsonl`, in the shapes that recipes read; `comments.jsonl` is
for people. What is held out is split off by user (the people who judge candidates) or by time (the newest). The
artifact names every event that it holds, so that forgetting a person finds it.
Not here: the rules (`curate`), the dataset that a turn learns from (`chat`: the pairs alone).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from prairie.data.personal import FindNames
from prairie.data.records import Preference, Record
from prairie.data.sources import write_records
from prairie.errors import DataError
from prairie.flywheel.curate import HELD_OUT_SHARE, Curated, curate, gold_of, is_held_out, split_by_time
from prairie.pipeline.context import code_revision
from prairie.store.artifacts import Artifact
from prairie.store.feedback import Vote
from prairie.store.home import Home

Split = Literal["user", "time"]


def feedback_dataset(
    home: Home,
    line: str,
    *,
    split: Split = "user",
    share: float = HELD_OUT_SHARE,
    gold: Sequence[Preference] = (),
    names: FindNames | None = None,
) -> Artifact:
    """Curates the votes on a line that count now. The same votes are the same artifact. `gold`: preferences known to be
    right, by which people are trusted; `names`: what finds names of people, to mask them too. Raises DataError when
    nobody said anything that gives a record."""
    votes = home.feedback.votes(line=line, purpose="chat")
    train, held_out = split_votes(votes, split, share)
    parts = {
        name: curate(some, gold=gold_of(gold), names=names) for name, some in (("train", train), ("held_out", held_out))
    }
    events = list(dict.fromkeys(event for part in parts.values() for event in part.all_events))
    if not events:
        raise DataError(
            f"nothing that was said of `{line}` gives a record", got=f"{len(votes)} votes",
            wanted="a choice, an edit, a thumb, a rating or a comment",
        )  # fmt: skip
    config = {"line": line, "split": split, "share": share, "events": events, "gold": [p.to_json() for p in gold]}
    if names is not None:
        config["names"] = True
    code = code_revision(("data", "flywheel/curate", "flywheel/datasets"))
    id = home.artifacts.id_of("feedback", config, [], code)
    if (found := home.artifacts.find(id)) is not None:
        return found
    figures = {name: _figures(part) for name, part in parts.items()}
    name = f"feedback-{line}"
    with home.artifacts.create("feedback", name, config, [], code, figures=figures, events=events) as folder:
        for part_name, part in parts.items():
            for kind, records in _kinds(part).items():
                (folder / kind).mkdir(exist_ok=True)
                write_records(folder / kind / f"{part_name}.jsonl", records)
        comments = [{**comment, "part": name} for name, part in parts.items() for comment in part.comments]
        lines = "".join(json.dumps(comment, ensure_ascii=False) + "\n" for comment in comments)
        (folder / "comments.jsonl").write_text(lines, encoding="utf-8")
    return home.artifacts.get(id)


def split_votes(votes: Sequence[Vote], split: Split, share: float) -> tuple[list[Vote], list[Vote]]:
    """(train, held out) by user or by time."""
    if not 0 <= share < 1:
        raise DataError("a share cannot be held out", got=share, wanted="a number from 0 to below 1")
    if split == "time":
        return split_by_time(votes, share)
    judging = [is_held_out(vote.event.user or "", share) for vote in votes]
    return (
        [vote for vote, held in zip(votes, judging, strict=True) if not held],
        [vote for vote, held in zip(votes, judging, strict=True) if held],
    )


def _kinds(part: Curated) -> dict[str, Sequence[Record]]:
    return {"pairs": part.pairs, "weak": part.weak, "labelled": part.labelled, "edits": part.edits}


def _figures(part: Curated) -> dict[str, object]:
    return {
        **{kind: len(records) for kind, records in _kinds(part).items()},
        "comments": len(part.comments),
        "dropped": dict(+part.dropped),
        "masked": dict(+part.masked),
        "distrusted": sorted(user for user, how_far in part.trust.items() if how_far < 0.5),
    }
