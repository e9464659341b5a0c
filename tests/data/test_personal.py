"""Personal data is found by its check digits, in English and Chinese, and what only looks like it stays."""

import gzip
import json
import random
import re
from pathlib import Path

import pytest

from prairie.data.personal import find_personal, is_resident_number, luhn, mask_personal
from prairie.tasks import catalog


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Write to ada.love+x@example.co.uk, please.", "Write to [email], please."),
        ("邮箱是zhang_san@163.com，电话13800138000。", "邮箱是[email]，电话[phone]。"),
        ("我的手机号：138 0013 8000", "我的手机号：[phone]"),
        ("+86-139-1234-5678 or 0086 13912345678", "[phone] or [phone]"),
        ("座机010-62781234，或(0571)87654321", "座机[phone]，或[phone]"),
        ("身份证11010519491231002X已登记", "身份证[id]已登记"),
        ("身份证号：１１０１０５１９４９１２３１００２Ｘ。", "身份证号：[id]。"),
        ("card 4111 1111 1111 1111, exp 12/27", "card [card], exp 12/27"),
        ("银行卡6222021234567890128请查收", "银行卡[card]请查收"),
        ("SSN 219-09-9999.", "SSN [id]."),
        ("call (415) 555-2671 or 415-555-2671 or +44 20 7946 0958", "call [phone] or [phone] or [phone]"),
        ("IBAN GB82 WEST 1234 5698 7654 32!", "IBAN [iban]!"),
        ("from 203.0.113.7 and 2001:db8::8a2e:370:7334.", "from [ip] and [ip]."),
    ],
)
def test_what_is_personal_is_masked(text, masked):
    assert mask_personal(text)[0] == masked


@pytest.mark.parametrize(
    "text",
    [
        "11010519491231002Y, 110105194913310029, 110105194912310021",  # no such form, date, check character
        "4111 1111 1111 1112",  # Luhn fails
        "0000 0000 0000 0000",
        "order 1234567890123456789012345",
        "version 10.2.300.4, 127.0.0.1, 1.2.3.4.5",
        "pi is 3.14159265358979, e is 2.718281828",
        "in 1998-2003, 2024-05-06 12:30:45, 12:34:56",
        "ID 12800138000 and 138001380001",
        "GB83 WEST 1234 5698 7654 32",
        "000-12-3456 666-12-3456 900-12-3456",
        "a@b, @handle, foo@localhost",
        "std::vector::iterator and a::b::c::d",
        "三千八百，2,500,000 元，编号 A13800138000",
        "",
    ],
)
def test_what_only_looks_like_it_stays(text):
    assert mask_personal(text) == (text, {})


def test_check_digits():
    assert luhn("79927398713") and not luhn("79927398710")
    assert is_resident_number("11010519491231002X") and is_resident_number("11010519491231002x")
    rng = random.Random(0)
    made_up = ["".join(rng.choices("0123456789", k=16)) for _ in range(2000)]
    assert 0.07 < sum(map(luhn, made_up)) / 2000 < 0.13
    # A single changed digit is always noticed, in both.
    for place in range(17):
        number = "11010519491231002X"
        other = number[:place] + str((int(number[place]) + 1) % 10) + number[place + 1 :]
        assert not is_resident_number(other)


def test_names_are_what_the_callers_library_finds():
    def names(text):
        return [m.span() for m in re.finditer("Ada Lovelace|张三", text)]

    text, counts = mask_personal("Ada Lovelace (ada@example.org) 与 张三", names)
    assert text == "[name] ([email]) 与 [name]" and counts == {"name": 2, "email": 1}


def test_places_and_overlaps():
    found = find_personal("给a@b.com打电话13800138000")
    assert [(f.kind, f.start, f.end) for f in found] == [("email", 1, 8), ("phone", 11, 22)]
    # The digits of an email's name are no phone besides.
    assert [f.kind for f in find_personal("13800138000@qq.com")] == ["email"]


def test_questions_of_the_tasks_hold_nothing_personal():
    items = catalog.items(list(catalog.TASKS), "train", 200, 0, distinct=False)
    assert not [i.prompt for i in items if find_personal(i.prompt) or find_personal(i.answer)]


def test_books_that_are_older_than_telephones_hold_nothing_personal():
    file = Path(__file__).parents[2].parent / "shared" / "data" / "corpora" / "chinese_classics.jsonl.gz"
    if not file.is_file():
        pytest.skip("../shared/data is not here")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(300), strict=False)]
    assert sum(map(len, texts)) > 10_000 and not [f for text in texts for f in find_personal(text)]
