"""Rows, batches and their order: nothing leaks, nothing is lost, a resumed loader is the same loader."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prairie.data.chat_template import ChatTemplate
from prairie.data.loader import Batch, Loader, TokenDataset, batch_of
from prairie.data.records import Chat, Message, Preference, Text
from prairie.data.tokenizer import Tokenizer
from prairie.errors import DataError, TemplateError, TrainingError

TOKENIZER = Tokenizer.train_bpe(["hello world, how are you? 12 + 30 = 42"] * 10, 300)
TEMPLATE = ChatTemplate.builtin("chatml", TOKENIZER)


def chat(*turns: str) -> Chat:
    return Chat(tuple(Message("assistant" if i % 2 else "user", turn) for i, turn in enumerate(turns)))


def user(text: str) -> Message:
    return Message("user", text)


def says(text: str) -> Message:
    return Message("assistant", text)


def toy(lengths: list[int], group: int = 1) -> TokenDataset:
    """Row r holds tokens 100 r, 100 r + 1, ...; every third is not learnt."""
    ids = np.concatenate([100 * r + np.arange(n) for r, n in enumerate(lengths)]).astype(np.uint32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenDataset(ids, np.arange(len(ids)) % 3 != 0, offsets, group=group)


def naive_labels(dataset: TokenDataset, rows: list[int]) -> list[int]:
    labels: list[int] = []
    for r in rows:
        ids, mask = dataset.row(r)
        labels += [int(ids[i + 1]) if mask[i + 1] else -100 for i in range(len(ids) - 1)] + [-100]
    return labels


def same(a: list[Batch], b: list[Batch]) -> bool:
    return [x.rows for x in a] == [y.rows for y in b] and all(
        x.tokens_N.equal(y.tokens_N) and x.labels_N.equal(y.labels_N) for x, y in zip(a, b, strict=True)
    )


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.data())
@settings(max_examples=80, deadline=None)
def test_batch_equals_naive(lengths: list[int], data: st.DataObject) -> None:
    dataset = toy(lengths)
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=6))
    batch = batch_of(dataset, rows)
    assert batch.tokens_N.tolist() == [int(t) for r in rows for t in dataset.row(r)[0]]
    assert batch.labels_N.tolist() == naive_labels(dataset, rows)
    assert batch.lengths == [lengths[r] for r in rows] and batch.rows == rows
    assert batch.supervised == sum(label != -100 for label in batch.labels_N.tolist())


@given(
    st.lists(st.integers(1, 12), min_size=2, max_size=20).filter(lambda x: len(x) % 2 == 0),
    st.integers(1, 40),
    st.integers(0, 5),
    st.sampled_from([1, 2]),
)
@settings(max_examples=80, deadline=None)
def test_every_group_once_an_epoch_within_budget(lengths: list[int], budget: int, seed: int, group: int) -> None:
    loader = Loader(toy(lengths, group), tokens_per_batch=budget, seed=seed)
    for epoch in range(2):
        seen: list[int] = []
        batches = []
        while loader.epoch < epoch + 1:
            batches += loader.next_step()
        assert loader.batches_per_epoch == len(batches)
        for batch in batches:
            assert sum(batch.lengths) <= budget or len(batch.rows) == group
            assert group == 1 or batch.rows[1::2] == [row + 1 for row in batch.rows[::2]]
            seen += batch.rows
        assert sorted(seen) == list(range(len(lengths)))
        assert loader.epoch == epoch + 1
        for first, second in pairwise(batches):  # greedy: the next group did not fit
            assert sum(first.lengths) + sum(second.lengths[:group]) > budget


@given(st.integers(0, 30), st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_resume_is_exact(steps: int, micro: int, seed: int) -> None:
    dataset = toy([3, 9, 1, 4, 7, 7, 2, 12, 5])
    undisturbed = Loader(dataset, tokens_per_batch=14, seed=seed)
    for _ in range(steps):
        undisturbed.next_step(micro)
    resumed = Loader(dataset, tokens_per_batch=14, seed=seed)
    resumed.load_state_dict(json.loads(json.dumps(undisturbed.state_dict())))
    assert resumed.epoch == undisturbed.epoch
    for _ in range(12):
        assert same(undisturbed.next_step(micro), resumed.next_step(micro))


def test_order_depends_on_seed_and_epoch_and_micro_batches_do_not_change_it() -> None:
    dataset = toy([2] * 50)
    orders = {}
    for seed in (0, 1):
        loader = Loader(dataset, tokens_per_batch=100, seed=seed)
        orders[seed] = [tuple(loader.next_step()[0].rows) for _ in range(3)]
    assert len({order for seed in orders.values() for order in seed}) == 6
    one = Loader(dataset, tokens_per_batch=10, seed=0)
    four = Loader(dataset, tokens_per_batch=10, seed=0)
    assert same([b for _ in range(8) for b in one.next_step()], [b for _ in range(2) for b in four.next_step(4)])
    straight = Loader(dataset, tokens_per_batch=10, seed=0, shuffle=False)
    assert straight.next_step()[0].rows == [0, 1, 2, 3, 4]


def test_resume_with_other_data_is_refused() -> None:
    state = Loader(toy([2, 3]), tokens_per_batch=4, seed=0).state_dict()
    with pytest.raises(TrainingError, match="data changed"):
        Loader(toy([3, 2]), tokens_per_batch=4, seed=0).load_state_dict(state)
    with pytest.raises(TrainingError, match="seed changed"):
        Loader(toy([2, 3]), tokens_per_batch=4, seed=1).load_state_dict(state)
    with pytest.raises(TrainingError, match="1 or more"):
        Loader(toy([2, 3]), tokens_per_batch=0, seed=1)


@given(st.lists(st.text(max_size=60), min_size=1, max_size=6), st.integers(3, 20))
@settings(max_examples=60, deadline=None)
def test_texts_become_rows_without_loss(texts: list[str], row_tokens: int) -> None:
    documents = [[*TOKENIZER.encode(text), 0] for text in texts if text]
    if not documents:
        with pytest.raises(DataError, match="no row is left"):
            TokenDataset.from_texts(map(Text, texts), TOKENIZER, row_tokens)
        return
    dataset = TokenDataset.from_texts(map(Text, texts), TOKENIZER, row_tokens)
    assert dataset.ids.tolist() == [i for document in documents for i in document]
    lengths = np.diff(dataset.offsets)
    assert lengths.max() <= row_tokens and lengths.min() >= 2
    for r in range(len(dataset)):
        assert dataset.row(r)[1].tolist() == [False] + [True] * (int(lengths[r]) - 1)
    assert dataset.figures["refused_rows"] == len(texts) - len(documents)


def test_chats_equal_the_template_and_bad_rows_are_listed() -> None:
    records = [chat("hello", "world"), chat("only me"), chat("how", "x " * 200), chat("你好", "世界")]
    dataset = TokenDataset.from_chats(records, TEMPLATE, 60)
    assert len(dataset) == 2
    for r, record in enumerate((records[0], records[3])):
        rendered = TEMPLATE.encode(record.messages)
        assert dataset.row(r)[0].tolist() == rendered.ids and dataset.row(r)[1].tolist() == rendered.mask
    figures = dataset.figures
    assert figures["rows"] == 2 and figures["refused_rows"] == 2 and figures["truncated_rows"] == 0
    assert [refusal["row"] for refusal in figures["refused"]] == [1, 2]
    assert "no assistant turn" in figures["refused"][0]["reason"] and "60 allowed" in figures["refused"][1]["reason"]
    assert figures["supervised_tokens"] == dataset.mask.sum() and figures["tokens"] == len(dataset.ids)
    assert figures["longest_row"] == max(np.diff(dataset.offsets))
    cut = TokenDataset.from_chats(records, TEMPLATE, 60, on_long="truncate")
    assert cut.figures["truncated_rows"] == 1 and cut.figures["longest_row"] == 60
    with pytest.raises(DataError, match="all refused; the first: row 0, no assistant turn"):
        TokenDataset.from_chats([chat("only me")], TEMPLATE, 60)
    with pytest.raises(DataError, match="after cutting"):
        TokenDataset.from_chats([chat("hello " * 50, "w")], TEMPLATE, 20, on_long="truncate")


def test_many_records_are_made_by_several_processes_into_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    chats = [chat("hello " * (i % 9), "world") if i % 5 else chat("only me") for i in range(60)]
    pairs = [Preference(c.messages[:1], (says(f"yes {i}"),), (says("no" if i % 3 else f"yes {i}"),)) for i, c in
             enumerate(chats)]  # fmt: skip
    for make, records in ((TokenDataset.from_chats, chats), (TokenDataset.from_preferences, pairs)):
        alone = make(records, TEMPLATE, 60)
        with monkeypatch.context() as small:
            small.setattr("prairie.data.loader._CHUNK", 7)
            small.setattr("loky.cpu_count", lambda: 2)
            together = make(records, TEMPLATE, 60)
        assert together.figures == alone.figures and together.fingerprint == alone.fingerprint
        assert alone.figures["refused_rows"] > 10


def test_preferences_lie_side_by_side_and_only_answers_are_learnt() -> None:
    prompt = (user("hello"), says("world"), user("how are you?"))
    records = [
        Preference(prompt, (says("hello world"),), (says("12"),)),
        Preference(prompt, (says("same"),), (says("same"),)),
        Preference(prompt, (user("no answer"),), (says("12"),)),
        Preference(prompt, (says("a"), user("b"), says("c")), (says("d"),)),
    ]
    dataset = TokenDataset.from_preferences(records, TEMPLATE, 100)
    assert dataset.group == 2 and len(dataset) == 2
    answers = []
    for r in range(4):
        ids, mask = dataset.row(r)
        answers.append(TOKENIZER.decode(ids[mask], skip_special=False))
    assert answers == ["hello world<|im_end|>", "12<|im_end|>", "a<|im_end|>c<|im_end|>", "d<|im_end|>"]
    reasons = {refusal["row"]: refusal["reason"] for refusal in dataset.figures["refused"]}
    assert "same tokens" in reasons[1] and "does not begin with an assistant turn" in reasons[2]
    batch = Loader(dataset, tokens_per_batch=1, seed=0).next_step()[0]
    assert batch.rows in ([0, 1], [2, 3])


def test_rows_that_a_template_refuses_are_listed_and_a_useless_template_is_an_error() -> None:
    strict = ChatTemplate(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
        TOKENIZER,
    )
    bad = Chat((Message("system", "s"), *chat("a", "b").messages))
    dataset = TokenDataset.from_chats([chat("a", "b"), bad], strict, 100)
    assert dataset.figures["refused_rows"] == 1 and "no system" in dataset.figures["refused"][0]["reason"]
    useless = ChatTemplate("{{ messages | length }}{{ messages[-1].content }}", TOKENIZER)
    with pytest.raises(TemplateError):
        TokenDataset.from_chats([chat("a", "b")], useless, 100)


def test_save_load_maps_the_same_dataset(tmp_path: Path) -> None:
    dataset = TokenDataset.from_chats([chat("hello", "world"), chat("x"), chat("a", "b")], TEMPLATE, 60)
    dataset.save(tmp_path)
    again = TokenDataset.load(tmp_path, verify=True)
    assert isinstance(again.ids, np.memmap)
    assert (again.fingerprint, again.figures, again.group) == (dataset.fingerprint, dataset.figures, 1)
    assert same(
        Loader(dataset, tokens_per_batch=30, seed=3).next_step(4),
        Loader(again, tokens_per_batch=30, seed=3).next_step(4),
    )
    mask = np.load(tmp_path / "mask.npy")
    np.save(tmp_path / "mask.npy", ~mask)
    with pytest.raises(DataError, match="damaged"):
        TokenDataset.load(tmp_path, verify=True)
    (tmp_path / "offsets.npy").unlink()
    with pytest.raises(DataError, match="holds no dataset"):
        TokenDataset.load(tmp_path)


def test_the_fingerprint_knows_every_part() -> None:
    base = toy([2, 3, 1, 4])
    others = [toy([3, 2, 1, 4]), toy([2, 3, 1, 4], group=2), TokenDataset(base.ids, ~base.mask, base.offsets)]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert toy([2, 3, 1, 4]).fingerprint == base.fingerprint


def test_documents_begin_with_bos_where_the_tokenizer_says_so() -> None:
    config = TOKENIZER.config | {"bos_token": "<|im_start|>", "add_bos_token": True}
    tokenizer = Tokenizer(TOKENIZER.spec, config)
    dataset = TokenDataset.from_texts([Text("hello")], tokenizer, 50)
    assert dataset.ids.tolist() == [1, *TOKENIZER.encode("hello"), 0]
