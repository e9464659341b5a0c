"""Names of people by optional libraries: what they find, what they miss, and the sentence where none is installed."""

import json

import pytest

from prairie.cli.main import main
from prairie.data import personal_names
from prairie.data.personal import mask_personal
from prairie.data.personal_names import ENGLISH, name_finder
from prairie.errors import UsageError
from prairie.store.feedback import FeedbackEvent
from prairie.store.home import Home


def test_chinese_names_are_masked():
    pytest.importorskip("jieba", reason="jieba is not installed (extra `names`)")
    find = name_finder()
    for text, masked in {
        "我叫王小明，请打电话给李华。": "我叫[name]，请打电话给[name]。",
        "高兴见到你，陈建国先生，邮箱 chen@b.org": "高兴见到你，[name]先生，邮箱 [email]",
        "张伟问：三加七等于几？": "[name]问：三加七等于几？",
        "草原上的马在奔跑。": "草原上的马在奔跑。",
        "一千克等于多少克？": "一千克等于多少克？",
        "What is three plus seven?": "What is three plus seven?",
    }.items():
        assert mask_personal(text, find)[0] == masked
    assert mask_personal("我叫王小明。", find)[1] == {"name": 1}


def test_what_jieba_misses_is_known():
    """As the module says; a library that does better may change this test."""
    pytest.importorskip("jieba", reason="jieba is not installed (extra `names`)")
    find = name_finder()
    assert mask_personal("白云在天上飘", find)[0] == "[name]在天上飘", "a word that is a name too"
    assert mask_personal("奥巴马访问了上海", find)[0] == "奥巴马访问了上海", "a foreign name"


@pytest.fixture
def english():
    """What finds English names, if it is installed."""
    if not personal_names._installed("spacy") or not any(map(personal_names._installed, ENGLISH)):
        pytest.skip("spaCy or an English pipeline of it is not installed (python -m spacy download en_core_web_sm)")
    return name_finder()


def test_english_names_are_masked(english):
    for text, masked in {
        "My name is John Smith and I live in Paris.": "My name is [name] and I live in Paris.",
        "Please call Maria Garcia about the invoice.": "Please call [name] about the invoice.",
        "write to anna@x.org, Anna Berg": "write to [email], [name]",
        "The Washington Monument is tall.": "The Washington Monument is tall.",
        "What is three plus seven?": "What is three plus seven?",
    }.items():
        assert mask_personal(text, english)[0] == masked


def test_what_spacy_misses_is_known(english):
    """As the module says, of the small pipeline; a larger one may do better and change this test."""
    if any(map(personal_names._installed, ENGLISH[:-1])):
        pytest.skip("a larger pipeline than en_core_web_sm is installed")
    for missed in ("ask bob about it", "Tell Xiaoming Wang I said hello."):
        assert mask_personal(missed, english)[0] == missed


def test_a_pipeline_that_does_not_load_is_one_sentence():
    pytest.importorskip("spacy", reason="spaCy is not installed")
    with pytest.raises(UsageError, match=r"cannot load its pipeline en_core_web_none.*spacy download"):
        personal_names._english("en_core_web_none")


def test_where_no_library_is_installed_it_is_one_sentence(monkeypatch, voted, capsys):
    monkeypatch.setattr(personal_names.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"no library that finds them is installed.*pip install"):
        name_finder()
    for command in (["feedback", "curate", "spark", "--names"], ["turn", "spark", "--names"]):
        with pytest.raises(SystemExit) as end:
            main([*command, "--home", str(voted)])
        assert end.value.code == 2 and "names cannot be masked" in capsys.readouterr().err


def test_a_dataset_masks_names_only_where_that_is_asked_for(voted, capsys):
    pytest.importorskip("jieba", reason="jieba is not installed (extra `names`)")
    with Home(voted) as home:
        event = home.feedback.events()[0]
        home.feedback.add(FeedbackEvent(event.response_id, "edit", {"text": "王小明说可以。"}, user=event.user))
    found = []
    for option in ([], ["--names"]):
        with pytest.raises(SystemExit):
            main(["feedback", "curate", "spark", "--home", str(voted), "--json", *option])
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["id"] != found[1]["id"]
    with Home(voted) as home:
        texts = [
            "".join(path.read_text() for path in home.artifacts.get(one["id"]).path.rglob("*.jsonl")) for one in found
        ]
    assert "王小明说" in texts[0] and "王小明" not in texts[1] and "[name]说可以" in texts[1]
