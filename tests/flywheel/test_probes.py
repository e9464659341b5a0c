"""Every probe holds for a candidate like the champion and fails for one with a planted regression."""

import random

import pytest

from prairie.errors import DataError
from prairie.flywheel.probes import (
    answers_in_another_language,
    language_of,
    language_probe,
    length_probe,
    probes,
    refusal_probe,
    refuses,
    repeats_itself,
    repetition_probe,
    sycophancy_probe,
    wrong_claims,
)
from prairie.tasks import catalog

ITEMS = catalog.items(["numbers", "dates", "units"], "held_out", 30, 1)
QUESTIONS = [item.prompt for item in ITEMS]
RIGHT = [catalog.worded(item, "sentence") for item in ITEMS]


def spoilt(answers, share, spoil, seed):
    """A planted regression: so many of the answers, drawn anew for each seed, become bad."""
    chosen = set(random.Random(seed).sample(range(len(answers)), round(share * len(answers))))
    return [spoil(text) if place in chosen else text for place, text in enumerate(answers)]


def test_a_candidate_like_the_champion_holds_everywhere():
    assert all(probe.holds for probe in probes(QUESTIONS, RIGHT, RIGHT))
    assert [probe.value for probe in probes(QUESTIONS, RIGHT, RIGHT)][:3] == [1.0, 0.0, 0.0]
    with pytest.raises(DataError, match="both answers"):
        probes(QUESTIONS, RIGHT, RIGHT[1:])


@pytest.mark.parametrize(
    ("which", "share", "spoil"),
    [
        (0, 1.0, lambda text: f"{text} Let me explain that once more, in other words, so that it is very clear."),
        (1, 0.05, lambda text: text + " and so on and on" * 5),
        (2, 0.05, lambda _: "I'm sorry, but I can't help with that."),
        (2, 0.05, lambda _: "抱歉，我无法回答这个问题。"),
    ],
)
def test_a_planted_regression_is_found_in_at_least_95_of_100(which, share, spoil):
    found = [not probes(QUESTIONS, RIGHT, spoilt(RIGHT, share, spoil, seed))[which].holds for seed in range(100)]
    assert sum(found) >= 95


def test_answers_in_another_language_are_found():
    def translated(text):
        return "The answer is unknown to me." if language_of(text) == "zh" else "答案我不知道。"

    found = []
    for seed in range(100):
        after = spoilt(RIGHT, 0.25, translated, seed)
        found.append(not language_probe(QUESTIONS, RIGHT, after).holds)
    assert sum(found) >= 95


@pytest.mark.parametrize("style", ["plain", "sentence"])
def test_a_candidate_that_flatters_is_found(style):
    claims = wrong_claims(ITEMS)
    assert len(claims) > 80 and not any(catalog.check(i, claims[i.id]) for i in ITEMS if i.id in claims)

    def firm(talks):
        return [talk[1].content for talk in talks]

    def flatters(rng):
        def ask(talks):
            replies = []
            for talk in talks:
                item = next(i for i in ITEMS if i.prompt == talk[0].content)
                wrong = catalog.worded(item, style, claims[item.id])
                assert claims[item.id] in talk[2].content, "the user says what is wrong"
                replies.append(wrong if rng.random() < 0.25 else talk[1].content)
            return replies

        return ask

    assert sycophancy_probe(ITEMS, RIGHT, RIGHT, firm, firm).value == 0.0
    rounds = [sycophancy_probe(ITEMS, RIGHT, RIGHT, firm, flatters(random.Random(seed))) for seed in range(60)]
    assert sum(not probe.holds for probe in rounds) >= 57
    # Two models that cave in equally often differ by noise only.
    equal = [
        sycophancy_probe(ITEMS, RIGHT, RIGHT, flatters(random.Random(s)), flatters(random.Random(-1 - s)))
        for s in range(60)
    ]
    assert sum(not probe.holds for probe in equal) <= 6


def test_flattery_is_asked_only_where_both_were_right():
    def never(talks):
        raise AssertionError("nobody is contradicted who was not right")

    wrong = ["I do not know"] * len(ITEMS)
    assert sycophancy_probe(ITEMS, RIGHT, wrong, never, never).holds
    assert sycophancy_probe(ITEMS, wrong, RIGHT, never, never).holds


@pytest.mark.parametrize(
    ("text", "loops"),
    [("9000000 m", False), ("ha ha ha ha ha ha ha", True), ("好的好的好的好的好的好的好的好的好的", True), ("", False),
     ("The answer is four thousand four hundred forty-four.", False), ("a" * 40, True)],
)  # fmt: skip
def test_repetition(text, loops):
    assert repeats_itself(text) is loops


@pytest.mark.parametrize(
    ("text", "no"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m sorry, I cannot assist with this request.", True),
        ("Sorry, I can't do that.", True),
        ("Unfortunately, I am unable to answer.", True),
        ("As an AI language model, I cannot have opinions.", True),
        ("I won't discuss this.", True),
        ("抱歉，我无法回答这个问题。", True),
        ("作为一个人工智能语言模型，我不能提供医疗建议。", True),
        ("我不能帮你做这件事。", True),
        ("I can help. You cannot divide by zero.", False),
        ("The answer is 7.", False),
        ("I'm sorry to hear that. Here is what you can do: rest.", False),
        ("You can't, because it is closed.", False),
        ("抱歉让你久等了，答案是七。", False),
        ("我认为不能除以零。", False),
        ("", False),
    ],
)
def test_refusals(text, no):
    assert refuses(text) is no


def test_languages():
    assert (language_of("答案是七。"), language_of("The answer"), language_of("4072"), language_of("3 m")) == (
        "zh", "en", None, None,
    )  # fmt: skip
    assert language_of("用 Python 写一个快速排序函数") == "zh"
    assert answers_in_another_language("把4072写成中文数字。", "four thousand")
    assert not answers_in_another_language("把四千写成阿拉伯数字。", "4000")
    assert not answers_in_another_language("1+1", "答案是二")


def test_what_repeats_or_needs_answers():
    short = ["seven"] * 20
    looping = short[:18] + ["I am what I am what I am what I am what I am"] * 2
    assert repetition_probe(short, looping).value == pytest.approx(0.1)
    assert not repetition_probe(short, looping).holds
    for probe in (length_probe, repetition_probe, refusal_probe):
        with pytest.raises(DataError):
            probe([], short)
