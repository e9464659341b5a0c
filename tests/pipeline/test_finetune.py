"""recipes/finetune.yaml on a small open model: every record format, plan, JSON, report, and the Python face."""

import gzip
import json
import re

import pyarrow
import pyarrow.parquet
import pytest
from tiny_recipes import chat_rows, model_folder, pair_rows, write_jsonl

import prairie
from prairie.cli.main import main
from prairie.data.records import Chat
from prairie.data.sources import read_records

SHORT = {"epochs": 1, "max_tokens": 96}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def base(folder):
    return model_folder(folder / "open-model")


@pytest.fixture(scope="module")
def home(folder):
    return folder / "home"


def asked_and_said(row):
    return [message["content"] for message in row["messages"]]


def messages(path):
    return write_jsonl(path / "messages.jsonl", chat_rows())


def sharegpt(path):
    turns = [list(zip(("human", "gpt"), asked_and_said(row), strict=True)) for row in chat_rows()]
    data = [{"conversations": [{"from": who, "value": text} for who, text in talk]} for talk in turns]
    (path / "sharegpt.json").write_text(json.dumps(data))
    return path / "sharegpt.json"


def alpaca(path):
    data = [dict(zip(("instruction", "output"), asked_and_said(row), strict=True)) for row in chat_rows()]
    with gzip.open(path / "alpaca.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps({**row, "input": ""}) + "\n" for row in data)
    return path / "alpaca.jsonl.gz"


def prompt_completion(path):
    data = [dict(zip(("prompt", "completion"), asked_and_said(row), strict=True)) for row in chat_rows()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(data), path / "pairs.parquet")
    return path / "pairs.parquet"


def preference(path):
    return write_jsonl(path / "preference.jsonl", pair_rows(40))


def hh(path):
    data = [
        {side: f"\n\nHuman: {row['prompt']}\n\nAssistant: {row[side]}" for side in ("chosen", "rejected")}
        for row in pair_rows(40)
    ]
    with gzip.open(path / "hh.json.gz", "wt", encoding="utf-8") as stream:
        json.dump(data, stream)
    return path / "hh.json.gz"


@pytest.mark.parametrize("make", [messages, sharegpt, alpaca, prompt_completion, preference, hh])
def test_every_format_trains(make, folder, base, home):
    data = make(folder)
    line = make.__name__.replace("_", "-")
    result = prairie.run(
        "finetune", home=home, threads=1, quiet=True, base=str(base), data=str(data), line=line, **SHORT
    )
    stages = result["stages"]
    assert stages["rows"]["figures"]["format"] == make.__name__
    assert stages["rows"]["figures"]["rows"] + stages["rows"]["figures"]["held_out"] == 40
    assert stages["sft"]["figures"]["data"]["refused_rows"] == 0
    scores = stages["after"]["figures"]["models"]
    assert scores["sft"]["loss"]["rows"]["loss"] < scores["base"]["loss"]["rows"]["loss"]
    assert "sft" in result["table"] and "loss rows" in result["table"]

    kept = [*read_records(data).records]
    first = kept[0].messages if isinstance(kept[0], Chat) else kept[0].prompt
    assert first[0].content == "what colour is thing 0?"

    registry = prairie.Registry(home)
    version = registry.champion(line)
    registry.home.close()
    assert version.artifact_id == stages["sft"]["id"]
    assert version.lineage["recipe_hash"] == result["recipe_hash"]


def test_json_is_one_object_and_the_report_is_one_file(folder, base, home, capsys):
    arguments = ["run", "finetune", f"base={base}", f"data={messages(folder)}", "epochs=1", "max_tokens=96"]
    shown = []
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            main([*arguments, "line=messages", "--home", str(home), "--threads", "1", "--no-serve", "--json"])
        out, err = capsys.readouterr()
        assert end.value.code == 0, err
        assert out.count("\n") == 1
        shown.append(json.loads(out))
    assert set(shown[0]) == {"recipe", "recipe_hash", "seconds", "stages", "table", "report"}
    assert list(shown[0]["stages"]) == ["base", "rows", "sft", "after", "publish", "report"]
    for name, stage in shown[0]["stages"].items():
        assert set(stage) == {"kind", "id", "seconds", "reused", "figures"}
        assert (stage["id"] is None) == (name in ("publish", "report"))
        assert stage["reused"] is shown[1]["stages"][name]["reused"] is (name not in ("publish", "report"))

    with open(shown[0]["report"], encoding="utf-8") as stream:
        page = stream.read()
    assert page.startswith("<!doctype html>") and page.endswith("</html>")
    namespaces = set(re.findall(r'\bxmlns(?::\w+)?="(https?://[^"]+)"', page))
    assert namespaces <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\s\"'<>)]+", page)) <= namespaces
    assert not re.search(r"<(script|link|img|iframe|base)\b|@import|url\((?!#)", page)
    assert page.count("<svg") >= 2, "a curve and the lineage"
    for name, stage in shown[0]["stages"].items():
        assert name == "report" or (f"<td>{name}<" in page and (stage["id"] or "-")[:12] in page)
    assert shown[0]["recipe_hash"][:12] in page


def test_plan_shows_mask_rows_and_estimates_and_trains_nothing(folder, base, capsys, tmp_path):
    arguments = ["plan", "finetune", f"base={base}", f"data={messages(folder)}", "max_tokens=96"]
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--home", str(tmp_path), "--threads", "1"])
    out, err = capsys.readouterr()
    assert end.value.code == 0, err
    assert "one row, ⟦supervised⟧ token by token:" in out
    row = next(line for line in out.splitlines() if "⟦" in line and "token by token" not in line)
    supervised = "".join(re.findall("⟦(.*?)⟧", row))
    assert supervised.startswith("It is ") and supervised.endswith("<|im_end|>")
    assert "what colour" in row.replace("·", "") and "what" not in supervised
    assert re.search(r"training takes about \d+ s and [\d,]+ MB of this machine's [\d,]+ MB", out)

    with pytest.raises(SystemExit):
        main([*arguments, "--home", str(tmp_path), "--threads", "1", "--json"])
    plan = json.loads(capsys.readouterr().out)
    stages = {stage["name"]: stage for stage in plan["stages"]}
    figures = stages["sft"]["figures"]
    assert figures["rows"] == stages["rows"]["figures"]["rows"] and figures["steps"] > 0
    assert figures["supervised_tokens"] < figures["tokens"]
    assert (figures["truncated_share"], figures["refused_share"]) == (0, 0)
    assert figures["estimated_s"] > 0 and plan["memory_mb"] >= figures["memory_mb"] > 0
    assert plan["machine_memory_mb"] > 100
    with prairie.Registry(tmp_path).home as opened:
        assert {artifact.kind for artifact in opened.artifacts.list()} == {"import", "prepare"}
        assert opened.registry.lines() == []


def test_the_python_face_loads_lines_versions_and_folders(folder, base, home):
    data = str(messages(folder))
    prairie.run("finetune", home=home, threads=1, quiet=True, base=str(base), data=data, line="messages", **SHORT)
    named = prairie.load("messages", home)
    again = prairie.load("messages@1", home)
    registry = prairie.Registry(home)
    path = registry.home.artifacts.get(registry.champion("messages").artifact_id).path
    by_path = prairie.load(path)
    asked = {"max_tokens": 8, "temperature": 0.0}
    answers = [model.generate("what colour is thing 3?", **asked).text for model in (named, again, by_path)]
    assert len(set(answers)) == 1
    assert (named.name, again.name, by_path.name) == ("messages", "messages@1", path.name)
    with pytest.raises(prairie.errors.NotFoundError, match=r"no such model: got `nobody`, wanted .*messages"):
        prairie.load("nobody", home)
    with pytest.raises(prairie.errors.RecipeError, match=r"no parameter `epoch`: wanted .* `epochs`"):
        prairie.run("finetune", home=home, threads=1, quiet=True, base=str(base), data=data, epoch=1)
