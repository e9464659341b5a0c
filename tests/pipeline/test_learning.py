"""A training inside a recipe: what is looked at while it goes on, its best weights, its objectives, its refusals."""

import json
import re

import pytest
from tiny_recipes import chat_rows, data_stages, learning, model_folder, quiet_runtime, run_here, write_jsonl

import prairie
from prairie.data.tokenizer import Tokenizer
from prairie.errors import DataError, ModelError, RecipeError, TrainingError
from prairie.models.lora import LoRA
from prairie.models.weights import hash_of, load_model
from prairie.pipeline.context import Context
from prairie.pipeline.plan import plan_recipe
from prairie.recipe import resolve_recipe
from prairie.runtime import Runtime
from prairie.store.home import Home

pytestmark = pytest.mark.long

SHAPE = {"depth": 1, "dim": 32, "context": 128}


@pytest.fixture
def home(tmp_path):
    with Home(tmp_path / "home") as home:
        yield home


def tree_of(tmp_path, **stages):
    return {"name": "t", "seed": 5, "stages": {**data_stages(tmp_path), **stages}}


def lines_of(made):
    return [json.loads(line) for line in (made.product.path / "metrics.jsonl").open()]


def overfitting(steps=24, **evaluation):
    """Few rows with answers that nothing foretells: the held-out loss falls, then rises."""
    return learning(
        steps, data="few", tokenizer="tokenizer", shape=SHAPE, lr=1e-2, schedule="constant", warmup=0.0,
        evaluation={"every": 3, **evaluation},
    ) | {"tokens_per_batch": 512}  # fmt: skip


def with_few(tmp_path, **stages):
    few = write_jsonl(tmp_path / "few.jsonl", chat_rows(16, seed=3))
    return tree_of(tmp_path, few={"kind": "prepare", "source": "file", "path": str(few), "held_out": 0.5}, **stages)


def test_the_best_weights_are_kept_and_a_training_ends_when_it_gets_no_better(home, tmp_path):
    made = run_here(
        with_few(
            tmp_path,
            plain=overfitting(),
            best=overfitting(keep_best=True),
            early=overfitting(keep_best=True, patience=2),
        ),
        home,
    )
    looks = {
        name: [line for line in lines_of(made[name]) if "evaluation" in line] for name in ("plain", "best", "early")
    }
    scores = {line["step"]: line["evaluation"]["score"] for line in looks["plain"]}
    best = max(scores, key=scores.__getitem__)
    assert 3 <= best <= 15 and scores[24] < scores[best] - 0.05, "the rows are too many to overfit"
    assert looks["best"] == looks["plain"], "looking for the best changes nothing that is learned"
    figures = made["best"].figures
    assert (figures["best_step"], figures["steps"], figures["best_score"]) == (best, 24, scores[best])
    assert looks["early"][-1]["step"] == best + 6 and made["early"].figures["steps"] == best + 6
    assert f"no better than that of step {best}" in made["early"].figures["ended"]
    hashes = {name: hash_of(load_model(made[name].product.path)) for name in ("plain", "best", "early")}
    assert hashes["best"] == hashes["early"] != hashes["plain"]
    # The weights that were kept are those of that step: a run of so many steps ends with them.
    short = run_here(with_few(tmp_path, short=overfitting(steps=best)), home)["short"]
    assert hash_of(load_model(short.product.path)) == hashes["best"]


def test_tasks_are_asked_during_a_training(home, tmp_path):
    tree = tree_of(
        tmp_path,
        asked={"kind": "prepare", "source": "tasks", "tasks": ["units"], "rows": 60, "held_out": 0.2},
        sft=learning(
            6, data="asked", tokenizer="tokenizer", shape=SHAPE, max_tokens=128,
            evaluation={"every": 3, "tasks": ["units"], "items": 8, "by": "accuracy", "max_tokens": 8},
        ),
    )  # fmt: skip
    looks = [line["evaluation"] for line in lines_of(run_here(tree, home)["sft"]) if "evaluation" in line]
    assert len(looks) == 2
    for look in looks:
        assert look["tasks"].keys() == {"units"} and look["score"] == look["tasks"]["units"]
        assert look["held_out"]["asked"]["loss"] > 0 and look["held_out"]["asked"]["count"] > 10


def labelled_rows():
    return [
        {"text": f"thing {n} is {'hot' if n % 2 else 'cold'}", "label": "warm" if n % 2 else "cool"} for n in range(40)
    ]


def test_an_adapter_brings_the_head_of_its_scores(home, tmp_path):
    """It learns on a language model that goes on to write; loaded by name it scores, and nobody may talk to it."""
    texts = write_jsonl(tmp_path / "texts.jsonl", labelled_rows())
    watch = {"every": 20, "by": "accuracy"}
    tree = tree_of(
        tmp_path,
        labelled={"kind": "prepare", "source": "file", "path": str(texts), "held_out": 0.2},
        base=learning(2, data="chats", tokenizer="tokenizer", shape=SHAPE),
        judge=learning(2, objective="reward", data="pairs", start="base", adapter={"rank": 2}),
        kinds=learning(
            40, objective="classification", data="labelled", start="base", lr=1e-2, evaluation=watch,
            adapter={"rank": 4},
        ),
        further=learning(2, objective="classification", data="labelled", start="kinds"),
        out={"kind": "publish", "line": "kinds", "model": "kinds"},
    )  # fmt: skip
    made = run_here(tree, home)
    assert made["kinds"].figures["evaluation"]["held_out"]["labelled"]["accuracy"] >= 0.8
    assert LoRA.load(made["judge"].product.path).labels == ("reward",)
    model = prairie.load("kinds", home=home.root)
    scores = model.scores(["thing 41 is hot", "thing 42 is cold"])
    assert [max(one, key=one.__getitem__) for one in scores] == ["warm", "cool"]
    assert LoRA.load(made["further"].product.path).labels == ("cool", "warm")
    with pytest.raises(ModelError, match="gives no vectors"):
        model.embed("thing")
    more = {**tree, "stages": {**tree["stages"], "after": learning(2, data="chats", start="kinds")}}
    with pytest.raises(ModelError, match="gives other scores"):
        run_here(more, home)


def test_reward_and_classification_are_stages(home, tmp_path):
    """From one base; each learns what it is taught, on held-out rows too; its folder loads; nobody may talk to it."""
    texts = write_jsonl(tmp_path / "texts.jsonl", labelled_rows())
    watch = {"every": 15, "by": "accuracy", "keep_best": True}
    tree = tree_of(
        tmp_path,
        labelled={"kind": "prepare", "source": "file", "path": str(texts), "held_out": 0.2},
        base=learning(2, data="chats", tokenizer="tokenizer", shape=SHAPE),
        judge=learning(30, objective="reward", data="pairs", start="base", lr=5e-3, evaluation=watch),
        kinds=learning(30, objective="classification", data="labelled", start="base", lr=5e-3, evaluation=watch),
    )
    made = run_here(tree, home)
    assert load_model(made["judge"].product.path).config.labels == ("reward",)
    assert load_model(made["kinds"].product.path).config.labels == ("cool", "warm")
    assert json.loads((made["kinds"].product.path / "config.json").read_text())["id2label"] == {
        "0": "cool",
        "1": "warm",
    }
    for name, stage in (("judge", "pairs"), ("kinds", "labelled")):
        assert made[name].figures["evaluation"]["held_out"][stage]["accuracy"] >= 0.8, name
    counts = made["kinds"].figures["data"]["labels"]
    assert counts.keys() == {"cool", "warm"} and sum(counts.values()) == made["labelled"].figures["rows"]
    assert {"score_chosen", "score_rejected", "margin", "length_chosen", "length_baseline"} <= made[
        "judge"
    ].figures.keys()
    tree["stages"]["after"] = {"kind": "evaluate", "models": ["judge"], "tasks": ["units"], "items": 2}
    with pytest.raises(ModelError, match="gives scores, not text"):
        run_here(tree, home)
    more = {**tree, "stages": {**tree["stages"], "after": learning(2, data="chats", start="judge")}}
    with pytest.raises(ModelError, match="gives other scores"):
        run_here(more, home)


def test_what_a_training_says_of_its_rows(home, tmp_path):
    """Length alone is a baseline that is known before the first step; cut and refused rows are counted."""
    tree = tree_of(
        tmp_path,
        base=learning(2, data="chats", tokenizer="tokenizer", shape=SHAPE),
        dpo=learning(2, objective="dpo", data="pairs", start="base"),
    )
    made = run_here(tree, home)
    figures, line = made["dpo"].figures, [line for line in lines_of(made["dpo"]) if "loss" in line][-1]
    assert 0.5 <= figures["length_baseline"] <= 1
    names = {
        "logps_chosen",
        "logps_rejected",
        "margin",
        "accuracy",
        "mfu",
        "padding",
        "fill",
        "grad_norm",
        "tokens_per_s",
    }
    assert names <= line.keys() and 0 < line["mfu"] < 1.5 and 0 <= line["padding"] < 1 and 0 < line["fill"] <= 1
    assert figures["data"]["truncated_tokens"] == 0
    sft = learning(2, data="chats", tokenizer="tokenizer", shape=SHAPE, on_long="truncate")
    cut = tree_of(tmp_path, cut=sft | {"max_tokens": made["base"].figures["data"]["longest_row"] - 1})
    data = run_here(cut, home)["cut"].figures["data"]
    assert data["truncated_rows"] > 0 and data["truncated_tokens"] >= data["truncated_rows"]


def test_the_curve_page_stands_alone(home, tmp_path):
    tree = with_few(tmp_path, model=overfitting(steps=6, keep_best=True))
    made = run_here(tree, home)["model"]
    page = (made.product.path / "curves.html").read_text()
    assert page.count("<svg") == 1 and "held out: few" in page and "gradient norm" in page and "best score" in page
    assert not re.findall(r"(?:src|href)=[\"'](?!#)", page) and "<script" not in page, "it fetches something"


def test_too_many_rows_that_cannot_be_learnt_from_stop_the_stage(home, tmp_path):
    rows = chat_rows(6) + [
        {"messages": [{"role": "user", "content": "word " * 90}, {"role": "assistant", "content": "yes"}]}
    ] * 2  # fmt: skip
    mixed = {"kind": "prepare", "source": "file", "path": str(write_jsonl(tmp_path / "m.jsonl", rows)), "held_out": 0}
    tree = tree_of(
        tmp_path, mixed=mixed, sft=learning(1, data="mixed", tokenizer="tokenizer", shape=SHAPE, max_refused=0.1)
    )
    with pytest.raises(
        DataError, match=r"too many rows cannot be learnt from: got 2 of 8 refused.*at most 10%"
    ) as caught:
        run_here(tree, home)
    assert "raise `max_tokens`" in str(caught.value)
    assert run_here(tree, home, ("sft.max_refused=0.3",))["sft"].figures["data"]["refused_rows"] == 2


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"objective": "reward", "adapter": {"rank": 2}, "together": "all"}, "causal_lm or dpo"),
        ({"evaluation": {"by": "accuracy"}}, "needs `evaluation.tasks`"),
        ({"objective": "classification", "evaluation": {"tasks": ["units"]}}, "answers no `evaluation.tasks`"),
        ({"evaluation": {"evry": 2}}, "did you mean `every`"),
    ],
)
def test_keys_that_do_not_go_together(tmp_path, keys, words):
    tree = tree_of(tmp_path, base=learning(1, data="chats", tokenizer="tokenizer", shape=SHAPE))
    tree["stages"]["more"] = learning(1, data="chats", start="base", **keys)
    with pytest.raises(RecipeError) as caught:
        resolve_recipe(tree)
    assert words in str(caught.value)


def test_an_evaluation_without_rows_is_refused(home, tmp_path):
    tree = tree_of(tmp_path, base=overfitting() | {"data": "chats"})
    tree["stages"]["chats"]["held_out"] = 0
    with pytest.raises(DataError, match="needs held-out rows"):
        run_here(tree, home)


def test_a_tracker_that_is_not_installed_is_a_sentence(home, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    tree = tree_of(tmp_path, base=learning(1, data="chats", tokenizer="tokenizer", shape=SHAPE, track="mlflow"))
    with pytest.raises(
        TrainingError, match="`track: mlflow` needs a package that is not installed; pip install mlflow"
    ):
        run_here(tree, home)


def test_tensorboard_reads_what_a_run_wrote_and_the_product_is_the_same(home, tmp_path):
    reading = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    tree = with_few(tmp_path, model=overfitting(steps=6))
    run_here(tree, home)
    assert run_here(tree, home, ("model.track=tensorboard",))["model"].reused, "who follows is no part of the product"
    other = run_here(tree, home, ("model.track=tensorboard", "model.lr=0.005"))["model"]
    (folder,) = (home.root / "tracking").iterdir()
    events = reading.EventAccumulator(str(folder))
    events.Reload()
    wanted = [(line["step"], line["loss"]) for line in lines_of(other) if "loss" in line]
    assert [(e.step, pytest.approx(e.value, rel=1e-5)) for e in events.Scalars("train/loss")] == wanted
    assert {"evaluation/score", "evaluation/held_out/few/loss", "train/mfu"} <= set(events.Tags()["scalars"])


def test_mlflow_reads_what_a_run_wrote(home, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    tree = with_few(tmp_path, model=overfitting(steps=6))
    made = run_here(tree, home, ("model.track=mlflow",))["model"]
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{home.root / 'tracking' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("prairie").experiment_id])
    wanted = [(line["step"], line["loss"]) for line in lines_of(made) if "loss" in line]
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")] == wanted
    assert run.info.status == "FINISHED" and run.data.params["lr"] == "0.01"


def planned(tree, home, *overrides):
    recipe = resolve_recipe(json.loads(json.dumps(tree)), overrides)
    return plan_recipe(Context(recipe, home, quiet_runtime(recipe.seed)))


def test_what_does_not_fit_into_memory_is_refused_with_three_ways_out(home, tmp_path):
    tree = tree_of(tmp_path, base=learning(1, data="chats", tokenizer="tokenizer", shape={"depth": 64, "dim": 8192}))
    plan = planned(tree, home)
    with pytest.raises(TrainingError) as caught:
        plan.check_fits()
    said = str(caught.value)
    assert "stage `base` does not fit into this machine's memory: got about" in said and "optimizer" in said
    assert said.count(" MB)") >= 3 and said.count("; or ") == 2, said
    assert plan.to_json()["stages"][-1]["refusal"] == said
    with pytest.raises(TrainingError, match="does not fit"):
        run_here(tree, home)
    small = tree_of(tmp_path, base=learning(1, data="chats", tokenizer="tokenizer", shape=SHAPE))
    planned(small, home).check_fits()


def test_dtype_auto_is_said_and_the_peak_is_of_that_dtype(monkeypatch):
    from prairie import runtime

    said = []
    machine = quiet_runtime()
    monkeypatch.setattr(machine.progress, "say", said.append)
    for rates, wanted in (((1e11, 4e11), "bfloat16"), ((1e11, 1e11), "float32")):
        known = dict(zip(("float32", "bfloat16"), rates, strict=True))
        monkeypatch.setattr(runtime, "gemm_flops", lambda dtype, *_, known=known, **__: known[dtype])
        found = machine.computing_in("auto")
        assert (found.dtype, found.peak_flops) == (wanted, known[wanted]) and f"dtype auto: {wanted}" in said[-1]
    assert Runtime().dtype == "float32" and machine.computing_in("float32").dtype == "float32"


def test_the_probe_is_a_rate_of_this_machine():
    from prairie.runtime import gemm_flops

    assert 1e8 < gemm_flops("float32", size=256) < 1e14


def test_labels_that_are_no_classes(home, tmp_path):
    rows = write_jsonl(tmp_path / "one.jsonl", [{"text": f"a {n}", "label": "same"} for n in range(5)])
    tree = tree_of(
        tmp_path,
        base=learning(1, data="chats", tokenizer="tokenizer", shape=SHAPE),
        one={"kind": "prepare", "source": "file", "path": str(rows), "held_out": 0},
        kinds=learning(1, objective="classification", data="one", start="base"),
    )
    with pytest.raises(DataError, match="two classes or more: got labels same"):
        run_here(tree, home)
    with pytest.raises(ModelError, match="mask token"):
        run_here(tree, home, ("kinds.objective=masked_lm",))


def test_an_encoder_decoder_learns_answers(home, tmp_path):
    """A T5 of 32 columns from its folder; the loss on held-out answers falls, and prairie.load reads the product."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = model_folder(tmp_path / "t5")
    words = Tokenizer.load(folder)
    config = transformers.T5Config(
        vocab_size=words.vocab_size, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
        pad_token_id=words.eos_id, eos_token_id=words.eos_id, decoder_start_token_id=words.eos_id,
    )  # fmt: skip
    for name in ("config.json", "generation_config.json", "model.safetensors", "prairie.json"):
        (folder / name).unlink(missing_ok=True)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    tree = tree_of(
        tmp_path,
        t5={"kind": "import", "path": str(folder)},
        answers=learning(20, objective="seq2seq", data="chats", start="t5", lr=5e-3, evaluation={"every": 10}),
    )
    made = run_here(tree, home)["answers"]
    first, last = [line["evaluation"]["held_out"]["chats"]["loss"] for line in lines_of(made) if "evaluation" in line]
    assert last < first and made.figures["loss_last"] < made.figures["loss_first"]
    assert type(prairie.load(made.product.path)).__name__ == "Seq2Seq"
    tree["stages"]["wrong"] = learning(1, data="chats", start="t5")
    with pytest.raises(ModelError, match="an encoder-decoder cannot learn by causal_lm"):
        run_here(tree, home)


def test_thumbs_teach_by_kto_and_by_nothing_else(home, tmp_path):
    """Labelled answers in a recipe: weights are told, the liked ones become likelier, and no other objective takes
    what was disliked for good."""
    rows = [{**row, "label": n % 3 > 0, "weight": 0.5 if n % 4 else 1.0} for n, row in enumerate(chat_rows(36))]
    thumbs = write_jsonl(tmp_path / "thumbs.jsonl", rows)
    kto = learning(8, objective="kto", data="thumbs", start="base", lr=3e-3, desirable_weight=1.2, tokens_per_batch=512)
    tree = tree_of(
        tmp_path,
        thumbs={"kind": "prepare", "source": "file", "path": str(thumbs), "held_out": 0.2},
        base=learning(2, data="chats", tokenizer="tokenizer", shape=SHAPE),
        kto=kto | {"evaluation": {"every": 4, "by": "accuracy"}},
    )
    made = run_here(tree, home)
    figures, lines = made["kto"].figures, [line for line in lines_of(made["kto"]) if "loss" in line]
    assert 0.5 < figures["liked"] < 0.8 and 0 < figures["data"]["weighted_rows"] < figures["data"]["rows"]
    assert "length_baseline" not in figures and lines[-1]["margin"] > 0.05 and lines[-1]["reference_point"] >= 0
    tree["stages"]["sft"] = learning(2, data="thumbs", start="base")
    with pytest.raises(DataError, match=r"causal_lm would learn answers that people disliked: got \d+ rows"):
        run_here(tree, home)
    tree["stages"]["sft"] = learning(2, objective="kto", data="chats", start="base")
    with pytest.raises(DataError, match="kto needs answers with a label"):
        run_here(tree, home)
