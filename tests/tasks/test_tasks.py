"""Tasks: exact checks, held-out facts that training never shows, wordings that say nothing about correctness."""

import datetime
import re
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prairie.errors import DataError, NotFoundError
from prairie.tasks import arithmetic, catalog, docs, numbers, units
from prairie.tasks.task import LANGUAGES, STYLES, WELL_FORMED_REWARD, WORDINGS, Item

ALL = list(catalog.TASKS)


def item(task: str, answer: str, language: str = "en") -> Item:
    return Item(task, f"{task}-x", language, "?", answer)


# --- numerals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "chinese", "english"),
    [
        (0, "零", "zero"),
        (10, "十", "ten"),
        (17, "十七", "seventeen"),
        (20, "二十", "twenty"),
        (72, "七十二", "seventy-two"),
        (105, "一百零五", "one hundred five"),
        (110, "一百一十", "one hundred ten"),
        (117, "一百一十七", "one hundred seventeen"),
        (1000, "一千", "one thousand"),
        (1001, "一千零一", "one thousand one"),
        (1010, "一千零一十", "one thousand ten"),
        (4072, "四千零七十二", "four thousand seventy-two"),
        (5600, "五千六百", "five thousand six hundred"),
        (9999, "九千九百九十九", "nine thousand nine hundred ninety-nine"),
    ],
)
def test_numerals_known(number, chinese, english):
    assert numbers.chinese(number) == chinese
    assert numbers.english(number) == english


def test_every_numeral_reads_back_and_is_unique():
    assert [numbers.from_chinese(numbers.chinese(n)) for n in range(10_000)] == list(range(10_000))
    assert [numbers.from_english(numbers.english(n)) for n in range(10_000)] == list(range(10_000))


@given(st.text(alphabet="零一二三四五六七八九十百千两", max_size=8))
def test_only_proper_chinese_numerals_are_read(text):
    number = numbers.from_chinese(text)
    assert number is None or numbers.chinese(number) == text.replace("两", "二")


@pytest.mark.parametrize(
    "text", ["", "hundred", "one one", "twenty-eleven", "five hundred thousand", "seven teen", "-", "千"]
)
def test_broken_numerals_are_no_numbers(text):
    assert numbers.from_english(text) is None
    assert numbers.from_chinese(text) in (None, 1000) and (text == "千") <= (numbers.from_chinese(text) is None)


def test_english_variants_are_one_value():
    four = item("numbers", "four thousand seventy-two")
    for text in (
        "four thousand seventy-two",
        "Four thousand and seventy two",
        "The answer is four thousand seventy-two.",
    ):
        assert catalog.check(four, text)
    assert not catalog.check(four, "4072")  # another form is another value: words were asked for
    assert not catalog.check(four, "四千零七十二")
    assert catalog.check(item("numbers", "4072"), "4,072")


# --- every task -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_items_are_right_in_every_wording_and_wrong_otherwise(name, split):
    task = catalog.task(name)
    drawn = task.items(split, 60, seed=3)
    others = list(dict.fromkeys(other.answer for other in drawn))[:12]
    assert {i.language for i in drawn} == set(LANGUAGES)
    for one in drawn:
        for style in STYLES:
            text = task.worded(one, style)
            assert task.check(one, text) and task.check(one, f" {text}\n") and task.reward(one, text) == 1.0
            assert task.read(one, text) == (style, one.answer)
        right = task.canonical(one.answer)
        for value in others:
            if task.canonical(value) != right:
                for style in STYLES:
                    wrong = task.worded(one, style, value)
                    assert not task.check(one, wrong)
                    assert task.reward(one, wrong) == WELL_FORMED_REWARD


@pytest.mark.parametrize("name", ALL)
def test_no_substring_luck(name):
    task = catalog.task(name)
    for one in task.items("held_out", 40, seed=5):
        a = one.answer
        for text in (
            "",
            f"{a} {a}",
            f"{a}{a}",
            f"I think {a}",
            f"{a}, or not",
            f"The answer is {a}. The answer is {a}.",
            f"The answer is not {a}.",
            f"{one.prompt} {a}",
            f"Sure! It is {a}. Anything else? {a}",
            f"答案是{a}。{a}",
            f"x{a}",
            f"{a}\n{a}",
            a[:-2] if len(a) > 2 else "",
        ):
            assert not task.check(one, text), (a, text)
            assert task.reward(one, text) < 1


def test_wording_of_the_other_language_is_not_a_wording():
    one = item("dates", "Friday")
    assert not catalog.check(one, WORDINGS["zh"]["sentence"].replace("{a}", "Friday"))
    assert catalog.reward(one, "答案是Friday。") == 0.0


@pytest.mark.parametrize("name", ALL)
def test_the_same_items_for_the_same_seed_and_others_for_another(name):
    task = catalog.task(name)
    assert task.items("train", 30, 1) == task.items("train", 30, 1)
    assert task.items("train", 30, 1) != task.items("train", 30, 2)
    held_out = task.items("held_out", 200, 1)
    assert len({i.id for i in held_out}) == 200


def test_items_are_the_same_in_another_process():
    code = (
        "from prairie.tasks import catalog; print([i.id for i in catalog.items(list(catalog.TASKS), 'held_out', 5, 0)])"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1 and "numbers-" in runs.pop()


def test_held_out_prompts_are_never_trained_on():
    for name in ALL:
        task = catalog.task(name)
        trained = {i.prompt for i in task.items("train", 3000, 0)}
        assert not trained & {i.prompt for i in task.items("held_out", 200, 0)}


def test_held_out_numbers_stand_in_no_training_row_in_any_form():
    trained = set()
    for one in catalog.task("numbers").items("train", 4000, 0):
        digits = re.findall(r"[0-9]+", f"{one.prompt} {one.answer}")
        assert len(digits) == 1, "every question turns digits into words or back"
        trained.add(int(digits[0]))
    assert len(trained) > 1500
    assert not [n for n in trained if numbers.number_is_held_out(n)]
    assert not any(numbers.number_is_held_out(n) for n in [*range(21), *range(0, 100, 10)])
    assert 0.07 < sum(map(numbers.number_is_held_out, range(10_000))) / 10_000 < 0.13


def test_arithmetic_is_arithmetic_and_problems_are_held_out():
    signs = {"plus": "+", "minus": "-", "times": "x", "加": "+", "减": "-", "乘": "x"}
    seen = {"train": set(), "held_out": set()}
    for split, count in (("train", 3000), ("held_out", 200)):
        for one in catalog.task("arithmetic").items(split, count, 0):
            match = re.fullmatch(
                r"(?:What is |How much is )?(.+?) ?(plus|minus|times|加|减|乘) ?(.+?)(?:\?|等于几\?|是多少\?)",
                one.prompt,
            )
            read = numbers.from_english if one.language == "en" else numbers.from_chinese
            a, b, result = (read(text) for text in (match[1], match[3], one.answer))
            sign = signs[match[2]]
            assert result == {"+": a + b, "-": a - b, "x": a * b}[sign] and result >= 0
            assert max(a, b) <= (arithmetic.LARGEST_FACTOR if sign == "x" else arithmetic.LARGEST_OPERAND)
            seen[split].add((sign, a, b))
    assert not seen["train"] & seen["held_out"]
    assert {sign for sign, _, _ in seen["held_out"]} == {"+", "-", "x"}
    products = [(a, b) for sign, a, b in seen["held_out"] if sign == "x"]
    assert len(products) > 5
    for a, b in products:
        assert not arithmetic.problem_is_held_out("x", b, a), "the other order of a held-out product must be taught"


def test_arithmetic_takes_any_way_of_writing_the_number():
    for text in ("nineteen", "19", "十九", "The answer is 19."):
        assert catalog.check(item("arithmetic", "nineteen"), text)


def test_dates_are_dates():
    months = {}
    for one in catalog.task("dates").items("train", 2500, 0):
        if match := re.fullmatch(r"Write (\d{4})-(\d\d)-(\d\d) in English\.", one.prompt):
            date = datetime.date(*map(int, match.groups()))
            assert one.answer == f"{date.day} {date:%B} {date.year}"
        elif match := re.fullmatch(r"What (day|month) comes (\d+) \w+ (after|before) (\w+)\?", one.prompt):
            kind, steps, direction, start = match.groups()
            names = (
                [f"{datetime.date(2024, 1, d):%A}" for d in range(1, 8)]
                if kind == "day"
                else [f"{datetime.date(2024, m, 1):%B}" for m in range(1, 13)]
            )
            steps = int(steps) if direction == "after" else -int(steps)
            assert one.answer == names[(names.index(start) + steps) % len(names)]
            months[kind] = months.get(kind, 0) + 1
    assert min(months.values()) > 100
    assert catalog.task("dates").canonical("30 February 2024") is None
    assert catalog.check(item("dates", "星期日", "zh"), "答案是星期天。")


def test_units_are_converted_rightly():
    for one in catalog.task("units").items("train", 3000, 0):
        if one.language == "en":
            match = re.fullmatch(r"(?:Convert|What is) (\d+) (\w+) (?:to|in) (\w+)[.?]", one.prompt)
            given, from_unit, to_unit = int(match[1]), match[2], match[3]
            value, unit = one.answer.split()
            plural = {"hour": "hours", "minute": "minutes", "second": "seconds", "week": "weeks", "day": "days"}
            sizes = {"km": 1000, "m": 1, "cm": 0.01, "mm": 0.001, "kg": 1000, "g": 1, "t": 1e6, "l": 1000, "ml": 1,
                     "hours": 3600, "minutes": 60, "seconds": 1, "weeks": 7 * 86400, "days": 86400}  # fmt: skip
            size = sizes[plural.get(from_unit, from_unit)]
            assert int(value) * sizes[plural.get(unit, unit)] == pytest.approx(given * size)
            assert plural.get(unit, unit) == plural.get(to_unit, to_unit)
    assert units.canonical("3000 m") == units.canonical("3000m") == "3000 m"
    assert units.canonical("3000") is None and units.canonical("3000 km m") is None
    assert not catalog.check(item("units", "3000 m"), "3000 mm")


def test_docs_are_the_interpreters_own_first_sentences():
    found = docs.sentences()
    assert 60 <= len(found) <= 120
    assert found["len"] == "Return the number of items in a container."
    for name, sentence in found.items():
        module, _, function = name.rpartition(".")
        source = getattr(__import__(module or "builtins", fromlist=["x"]), function).__doc__
        assert " ".join(source.split()).find(sentence.rstrip(".")) >= 0, name
    assert docs.first_sentence("dict() -> new empty dictionary") == ""
    assert docs.first_sentence("One line\nbroken.  Second.\n\nMore") == "One line broken."
    trained, asked = (
        {re.sub(r"[\w.]*[a-z][\w.]*\.[\w.]+|\b(" + "|".join(found) + r")\b", "{}", i.prompt) for i in items}
        for items in (catalog.task("docs").items(split, 380, 0) for split in ("train", "held_out"))
    )
    assert len(asked) >= 4 and not trained & asked, "a held-out phrasing is taught"


# --- conversations --------------------------------------------------------------------------------


def test_chats_mix_the_wordings_evenly_and_are_right():
    chats = catalog.chats(ALL, "train", 300, seed=0)
    assert len(chats) == 1500
    counts = Counter((chat.tags["task"], chat.tags["style"]) for chat in chats)
    assert set(counts.values()) == {100}
    by_id = {i.id: i for name in ALL for i in catalog.task(name).items("train", 300, 0)}
    for chat in chats:
        one = by_id[chat.tags["item"]]
        assert [m.role for m in chat.messages] == ["user", "assistant"]
        assert chat.messages[0].content == one.prompt and chat.tags["language"] == one.language
        assert catalog.check(one, chat.messages[1].content)
        assert catalog.style_of(one, chat.messages[1].content) == chat.tags["style"]
    only = catalog.chats(["dates"], "train", 9, 0, styles=("warm",))
    assert {chat.tags["style"] for chat in only} == {"warm"}


def test_refusals_say_what_is_there():
    with pytest.raises(NotFoundError, match="did you mean numbers"):
        catalog.task("number")
    with pytest.raises(DataError, match="distinct held_out"):
        catalog.task("docs").items("held_out", 100_000, 0)
    with pytest.raises(DataError, match="train \\| held_out"):
        catalog.task("docs").items("test", 1, 0)
    with pytest.raises(DataError, match="style"):
        catalog.chats(["docs"], "train", 3, 0, styles=("loud",))
