"""An encoder goes through recipes: taken in with how it pools, taught to guess words, then to classify, given away."""

import json

import pytest
import tokenizers
import torch
from tiny_recipes import learning, run_here, write_jsonl
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

import prairie
from prairie.errors import ModelError
from prairie.models.pooling import Pooling, read_pooling
from prairie.store.home import Home

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "thing", "is", "hot", "cold", "no", "##t"]
WORDS += [str(n) for n in range(10)] + [f"##{n}" for n in range(10)]


@pytest.fixture
def home(tmp_path):
    with Home(tmp_path / "home") as home:
        yield home


@pytest.fixture
def bert(tmp_path):
    """A random BERT with a WordPiece vocabulary, as a sentence-transformers folder."""
    folder = tmp_path / "bert"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    ids = {word: number for number, word in enumerate(WORDS)}
    backend = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.add_special_tokens(WORDS[:5])
    backend.save(str(folder / "tokenizer.json"))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"tokenizer_class": "BertTokenizer"}))
    steps = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    listed = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in steps]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    return folder


def tree_of(tmp_path, bert, **stages):
    rows = [
        {"text": f"The thing {n} is {'hot' if n % 2 else 'cold'}", "label": "warm" if n % 2 else "cool"}
        for n in range(60)
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    return {
        "name": "t",
        "seed": 5,
        "stages": {
            "rows": {"kind": "prepare", "source": "file", "path": str(path), "held_out": 0.2},
            "bert": {"kind": "import", "path": str(bert)},
            **stages,
        },
    }


def test_an_encoder_is_taken_in_taught_and_given_away(home, tmp_path, bert):
    watch = {"every": 30, "by": "accuracy"}
    made = run_here(
        tree_of(
            tmp_path,
            bert,
            guess=learning(30, objective="masked_lm", data="rows", start="bert", lr=5e-3, evaluation={"every": 30}),
            kinds=learning(30, objective="classification", data="rows", start="guess", lr=5e-3, evaluation=watch),
            out={"kind": "publish", "line": "judge", "model": "kinds"},
        ),
        home,
    )
    assert made["guess"].figures["evaluation"]["held_out"]["rows"]["loss"] < 2.5 < torch.tensor(len(WORDS)).log()
    assert made["kinds"].figures["evaluation"]["held_out"]["rows"]["accuracy"] >= 0.9
    for name in ("bert", "guess", "kinds"):
        assert read_pooling(made[name].product.path) == Pooling("cls", normalize=True)
    original, taken_in = prairie.load(bert), prairie.load(made["bert"].product.path)
    torch.testing.assert_close(taken_in.embed("The thing 7 is hot"), original.embed("The thing 7 is hot"))

    judge = prairie.load("judge", home=home.root)
    folder = made["kinds"].product.path
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert peer.config.id2label == {0: "cool", 1: "warm"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text, label in (("The thing 3 is hot", "warm"), ("The thing 8 is cold", "cool")):
        [scores] = judge.scores(text)
        assert max(scores, key=scores.__getitem__) == label
        with torch.no_grad():
            theirs = peer(**tokenizer(text, return_tensors="pt")).logits[0]
        torch.testing.assert_close(torch.tensor(list(scores.values())), theirs, atol=1e-4, rtol=1e-4)
    # Rows are read in training as they are in service: between the same marks.
    assert judge.embedder.ids("the thing")[0] == 2 and judge.embedder.ids("the thing")[-1] == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "an encoder cannot learn by"),
        ({"objective": "masked_lm", "adapter": {"rank": 2}}, "trained as a whole"),
    ],
)
def test_what_an_encoder_cannot_learn_is_refused(home, tmp_path, bert, change, words):
    tree = tree_of(tmp_path, bert, learn=learning(2, data="rows", start="bert", **change))
    with pytest.raises(ModelError, match=words):
        run_here(tree, home)
