"""The commands that compute: evaluate, turn, gate, doctor, plan, run; their one object and their refusals."""

import json

import pytest
import yaml

from prairie.flywheel.curate import is_held_out
from prairie.store.home import Home

pytestmark = pytest.mark.long

FAST = ("--tasks", "numbers", "--threads", "1")


@pytest.fixture
def at(voted):
    return ("--home", voted)


def champion(root):
    with Home(root) as home:
        return home.registry.champion("spark").name


def test_evaluate(ask, call, at, voted):
    with Home(voted) as home:
        folder = home.artifacts.list()[0].path
    found = ask("evaluate", "spark", folder, "--tasks", "numbers, units", "--items", 4, "--max-tokens", 4, *at)
    assert found["items"] == 4 and list(found["models"]) == ["spark", str(folder)]
    scores = found["models"]["spark"]
    assert set(scores["tasks"]) == {"numbers", "units"}
    assert scores == found["models"][str(folder)], "the same weights on the same items score the same"
    assert 0 <= scores["tasks"]["numbers"]["low"] <= scores["tasks"]["numbers"]["accuracy"]
    code, out, _ = call("evaluate", "spark", "--tasks", "numbers", "--items", 2, "--max-tokens", 2, *at)
    assert code == 0 and out.startswith("model") and "numbers" in out and "0.0% [" in out
    code, out, err = call("evaluate", "spark", "--tasks", "nubmers", *at)
    assert (code, out) == (1, "") and "numbers" in err
    code, out, err = call("evaluate", "sprak", *at)
    assert (code, out) == (1, "") and "no such model: got `sprak`, wanted spark" in err


def test_turn_learns_from_votes_and_promotes_once(ask, call, at, voted):
    learn = ("steps=6", "epochs=null", "tokens_per_batch=512", "lr=0.005", "max_tokens=128", "adapter.rank=4")
    dry = ask("turn", "spark", *learn, "--dry-run", *FAST, *at)
    assert dry["dry_run"] and dry["promoted"], dry["verdict"]["reasons"]
    assert champion(voted) == "spark@1"
    found = ask("turn", "spark", *learn, *FAST, *at)
    assert {k: found[k] for k in ("turn", "champion", "candidate", "promoted", "dry_run")} == {
        "turn": 1, "champion": "spark@1", "candidate": "spark@2", "promoted": True, "dry_run": False,
    }  # fmt: skip
    assert found["verdict"] == dry["verdict"] and found["dataset"] == dry["dataset"]
    assert champion(voted) == "spark@2"
    code, out, err = call("turn", "spark", *FAST, *at)
    assert (code, out) == (1, "") and "the votes on `spark` teach too little: got 0 preferences from 0 votes" in err

    gate = ask("gate", "spark@2", "spark@1", *FAST, *at)
    assert (gate["candidate"], gate["champion"], gate["verdict"]["passed"]) == ("spark@2", "spark@1", True)
    code, out, _ = call("gate", "spark@1", "spark@2", *FAST, *at)
    assert code == 0 and out.startswith("spark@1 against spark@2\nKEEP the champion")
    assert champion(voted) == "spark@2", "a gate changes nothing"

    with Home(voted) as home:
        teacher = next(event.user for event in home.feedback.events() if not is_held_out(event.user))
    forgotten = ask("feedback", "forget", teacher, "--yes", *at)
    assert [model["versions"] for model in forgotten["models"]] == [["spark@2"]]
    assert forgotten["champions"] == ["spark@2"]


def test_turn_refuses_in_a_sentence(call, at, voted):
    for arguments, words in (
        (("spark", "learning_rate=1"), "unknown key `turn.learn.learning_rate`"),
        (("spark", "lr"), "not `key=value`"),
        (("sprak",), "no such model: got `sprak`, wanted spark"),
    ):
        code, out, err = call("turn", *arguments, *FAST, *at)
        assert (code, out, err.count("\n")) == (1, "", 1) and words in err, err
    with Home(voted) as home, home.lock("run"):
        code, out, err = call("turn", "spark", *FAST, *at)
    assert (code, out) == (1, "") and "is in use by process" in err
    assert champion(voted) == "spark@1"


def test_go_refuses_in_a_sentence(call, at, tmp_path):
    (tmp_path / "junk.bin.gz").write_bytes(b"junk")
    for arguments, words in (
        (("--line", "sprak"), "no such model: got `sprak`"),
        (("--net", tmp_path / "nothing.bin.gz"), "cannot be read as a KataGo net"),
        (("--net", tmp_path / "junk.bin.gz"), "Not a gzipped file"),
        (("--net", tmp_path), "tower.json does not exist"),
    ):
        code, out, err = call("go", "gtp", *arguments, *at)
        assert (code, out, err.count("\n")) == (1, "", 1) and words in err, err


def test_doctor(ask, call, root):
    found = ask("doctor", "--threads", 1)
    assert {"python", "torch", "device", "cores", "threads", "memory_mb", "matmul_float32_gflops", "fast_dtype",
            "read_gb_per_s", "home", "disk_free_gb", "port_8000_free"} <= set(found)  # fmt: skip
    assert found["threads"] == 1 and found["matmul_float32_gflops"] > 0 and found["read_gb_per_s"] > 0
    assert found["home"] == str(root) and not root.exists(), "looking makes no home"


def test_plan_and_run_of_a_recipe(ask, call, tmp_path, root):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": f"{n}!"}) + "\n" for n in range(20)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "name": "t",
                "params": {"data": None},
                "stages": {
                    "rows": {"kind": "prepare", "source": "file", "path": "${data}"},
                    "words": {"kind": "tokenizer", "data": ["rows"], "vocab_size": 270},
                    "base": {
                        "kind": "train",
                        "data": "rows",
                        "tokenizer": "words",
                        "steps": 2,
                        "tokens_per_batch": 64,
                        "shape": {"depth": 1, "dim": 16, "heads": 1},
                    },
                },
            }
        )
    )
    planned = ask("plan", recipe, f"data={data}", "--threads", 1)
    assert planned == ask("run", recipe, f"data={data}", "--plan", "--threads", 1) | {
        key: planned[key] for key in ("estimated_s", "memory_mb", "stages")
    }
    base = planned["stages"][-1]
    assert (base["name"], base["figures"]["steps"]) == ("base", 2)
    assert base["figures"]["rows"] == planned["stages"][0]["figures"]["rows"]
    assert any(mask for _, mask in base["example"]) and not base["example"][0][1]
    with Home(root) as home:
        assert {artifact.kind for artifact in home.artifacts.list()} == {"prepare", "tokenizer"}
    done = ask("run", recipe, f"data={data}", "base.steps=3", "--threads", 1)
    assert [stage["reused"] for stage in done["stages"].values()] == [True, True, False]
    assert done["stages"]["base"]["figures"]["parameters"] == base["figures"]["parameters"]
    assert done["report"] is None
    code, out, _ = call("run", recipe, f"data={data}", "base.steps=3", "--threads", 1)
    assert code == 0 and "base: train" in out
    code, out, _ = call("run", "--schema")
    assert code == 0 and json.loads(out)["properties"]["stages"]
    assert call("run")[0] == 2
