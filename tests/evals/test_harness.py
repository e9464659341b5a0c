"""The harness: every answer counted once, by the task's own check."""

import json

import pytest

from prairie.errors import DataError
from prairie.evals.harness import evaluate
from prairie.tasks import catalog


def items(count=30):
    return catalog.items(["numbers", "dates"], "held_out", count, 0)


def test_scores_by_task_and_language():
    asked = items()
    answers = {i.prompt: i.answer if i.task == "numbers" or i.language == "en" else "no idea" for i in asked}
    found = evaluate(lambda conversations: [answers[c[-1].content] for c in conversations], asked)
    assert found.tasks["numbers"].accuracy == 1.0 and found.tasks["numbers"].low > 0.85
    dates = found.tasks["dates"]
    english = sum(i.language == "en" for i in asked if i.task == "dates")
    assert dates.accuracy == pytest.approx(english / 30) and dates.by_language == {"en": 1.0, "zh": 0.0}
    assert dates.low < dates.accuracy < dates.high and dates.n == 30
    assert dates.stderr == pytest.approx((dates.accuracy * (1 - dates.accuracy) / 30) ** 0.5)
    assert found.overall.n == 60 and found.overall.accuracy == pytest.approx((30 + english) / 60)
    assert len(found.wrong()) == 30 - english and {i.task for i, _ in found.wrong()} == {"dates"}
    assert json.loads(json.dumps(found.to_json()))["tasks"]["numbers"]["accuracy"] == 1.0
    assert "dates" in found.text()


def test_all_questions_in_one_call():
    calls = []

    def generate(conversations):
        calls.append(len(conversations))
        return ["?"] * len(conversations)

    assert evaluate(generate, items()).overall.accuracy == 0.0
    assert calls == [60]


def test_refuses_what_would_miscount():
    asked = items()
    with pytest.raises(DataError, match="lost answers"):
        evaluate(lambda conversations: ["?"], asked)
    with pytest.raises(DataError, match="twice"):
        evaluate(lambda conversations: ["?"] * len(conversations), [*asked, asked[0]])
    with pytest.raises(DataError, match="nothing to evaluate"):
        evaluate(lambda conversations: [], [])
