"""Pooling against sentence-transformers' own, and what a folder may say of it."""

import json

import pytest
import torch

from prairie.errors import ModelError
from prairie.models.pooling import Pooling, read_pooling

LENGTHS = [3, 1, 5]


@pytest.mark.parametrize(("kind", "theirs"), [("mean", "mean"), ("cls", "cls"), ("max", "max"), ("last", "lasttoken")])
@pytest.mark.parametrize("normalize", [False, True])
def test_equals_sentence_transformers(kind, theirs, normalize):
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    hidden_ND = torch.randn(sum(LENGTHS), 8, generator=torch.Generator().manual_seed(0))
    padded_BTD = torch.nn.utils.rnn.pad_sequence(hidden_ND.split(LENGTHS), batch_first=True)
    mask_BT = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    wanted = modules.Pooling(8, pooling_mode=theirs)({"token_embeddings": padded_BTD, "attention_mask": mask_BT.long()})
    wanted = modules.Normalize()(wanted) if normalize else wanted
    torch.testing.assert_close(Pooling(kind, normalize)(hidden_ND, LENGTHS), wanted["sentence_embedding"])


def folder_of(path, steps=("Transformer", "Pooling", "Normalize"), pooling=None, length=None, prompts=None):
    names = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize", "Dense": "2_Dense", "Far": "../x"}
    listed = [
        {"idx": i, "path": names[step], "type": f"sentence_transformers.models.{step}"} for i, step in enumerate(steps)
    ]
    (path / "modules.json").write_text(json.dumps(listed))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling or {"pooling_mode_mean_tokens": True}))
    if length:
        (path / "sentence_bert_config.json").write_text(json.dumps(length))
    if prompts:
        (path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return path


def test_the_real_folder(minilm):
    assert read_pooling(minilm) == Pooling("mean", normalize=True, max_tokens=256)


def test_what_a_folder_says(tmp_path):
    assert read_pooling(tmp_path) is None
    folder = folder_of(
        tmp_path,
        ("Transformer", "Pooling"),
        {"embedding_dimension": 8, "pooling_mode": "lasttoken", "include_prompt": True},
        {"max_seq_length": 99, "do_lower_case": True},
        {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": "query"},
    )
    assert read_pooling(folder) == Pooling("last", False, 99, True, "query: ")


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"steps": ("Transformer", "Pooling", "Dense")}, "got Dense"),
        ({"pooling": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}}, "cls \\+ mean"),
        ({"pooling": {"pooling_mode": "weightedmean"}}, "weightedmean"),
        ({"pooling": {"pooling_mode": "mean", "include_prompt": False}}, "include_prompt"),
        ({"prompts": {"prompts": {}, "default_prompt_name": "query"}}, "default prompt"),
    ],
)
def test_what_is_not_computed_here_is_refused(tmp_path, made, words):
    with pytest.raises(ModelError, match=words):
        read_pooling(folder_of(tmp_path, **made))


def test_damaged_files_are_refused(tmp_path):
    folder = folder_of(tmp_path)
    (folder / "modules.json").write_text('[{"type": "x.Pooling", "path": "../elsewhere"}]')
    with pytest.raises(ModelError, match="outside of its own"):
        read_pooling(folder)
    (folder / "modules.json").write_text("{}")
    with pytest.raises(ModelError, match="no list of JSON objects"):
        read_pooling(folder)
