"""Carrying out a recipe: what exists is not made again, what changed is, and what stands below it with it."""

import pytest
from tiny_recipes import contents, data_stages, learning, quiet_runtime, run_here, training_recipe, write_jsonl

import prairie
from prairie.errors import BusyError, DataError, ModelError, NotFoundError, RecipeError
from prairie.models.lora import LoRA
from prairie.models.weights import load_model, read_manifest
from prairie.pipeline import run as module
from prairie.pipeline.context import Context
from prairie.recipe import resolve_recipe
from prairie.store.home import Home

pytestmark = pytest.mark.long


@pytest.fixture
def home(tmp_path):
    with Home(tmp_path / "home") as home:
        yield home


def reused(made):
    return {name for name, one in made.items() if one.reused}


def test_what_exists_is_skipped_and_a_changed_key_remakes_what_stands_below_it(home, tmp_path):
    tree = training_recipe(tmp_path, steps=1)
    del tree["stages"]["dpo"]
    tree["stages"]["adapter"]["start"] = "sft"
    first = run_here(tree, home)
    assert reused(first) == set() and len(home.artifacts.list()) == 6
    again = run_here(tree, home)
    assert reused(again) == set(again)
    assert {name: one.identity for name, one in again.items()} == {name: one.identity for name, one in first.items()}
    assert again["sft"].figures == first["sft"].figures, "a reused stage has the figures of the one that made it"

    changed = run_here(tree, home, ("sft.lr=0.0007",))
    assert reused(changed) == {"chats", "pairs", "tokenizer", "base"}
    assert reused(run_here(tree, home, ("seed=6",))) == set()
    assert reused(run_here(tree, home)) == set(first), "the first ones are still there"
    assert list((home.root / "tmp").iterdir()) == [] and list((home.root / "work").iterdir()) == []


def test_another_file_or_another_code_is_another_product(home, tmp_path, monkeypatch):
    tree = {"name": "t", "stages": data_stages(tmp_path)}
    first = run_here(tree, home)
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3)
    second = run_here(tree, home)
    assert reused(second) == {"chats"}
    assert second["tokenizer"].identity != first["tokenizer"].identity

    plain = module.code_revision
    monkeypatch.setattr(module, "code_revision", lambda rooms: plain(rooms) + "changed" * ("data" in rooms))
    third = run_here(tree, home)
    assert reused(third) == set()
    assert third["chats"].product.manifest["code"] == plain(module_rooms("prepare")) + "changed"


def module_rooms(kind):
    from prairie.pipeline.handlers import HANDLERS

    return HANDLERS[kind].rooms


def test_the_code_revision_is_of_the_rooms_that_a_stage_names():
    assert module.code_revision(("data",)) == module.code_revision(("data",))
    assert module.code_revision(("data",)) != module.code_revision(("data", "tasks"))
    assert module.code_revision(("pipeline/run",)) != module.code_revision(("pipeline/context",))


@pytest.mark.parametrize("kind", ["train", "sample", "evaluate", "prepare", "turn"])
def test_every_room_of_a_revision_exists(kind):
    """A room that is misspelt would silently leave its code out of the id."""
    from pathlib import Path

    import prairie
    from prairie.flywheel.chat import LEARNING_CODE
    from prairie.flywheel.stages import HANDLERS as TURNING
    from prairie.pipeline.handlers import HANDLERS

    package = Path(prairie.__file__).parent
    for room in ({**HANDLERS, **TURNING}[kind].rooms, LEARNING_CODE)[kind == "turn"]:
        assert (package / room).is_dir() or (package / room).with_suffix(".py").is_file(), room


def test_what_fails_leaves_nothing_and_what_was_made_before_stays(home, tmp_path):
    tree = training_recipe(tmp_path, steps=2)
    tree["stages"]["dpo"]["data"] = "chats"  # no preferences
    with pytest.raises(DataError, match="dpo needs preferences"):
        run_here(tree, home)
    assert set(contents(home.root)) == {"chats", "pairs", "tokenizer", "base", "sft"}
    assert list((home.root / "tmp").iterdir()) == []
    mended = run_here(training_recipe(tmp_path, steps=2), home)
    assert reused(mended) == {"chats", "pairs", "tokenizer", "base", "sft"}


def test_a_home_that_is_in_use_or_a_stage_that_nobody_knows(home, tmp_path):
    tree = {"name": "t", "stages": data_stages(tmp_path)}
    with home.lock("run"), pytest.raises(BusyError, match=r"in use by process \d+"):
        run_here(tree, home)
    recipe = resolve_recipe(tree)
    with pytest.raises(RecipeError, match="stage `chats` cannot be carried out here: got prepare"):
        module.run(Context(recipe, home, quiet_runtime()), {})


def test_publishing_twice_is_one_version_and_does_not_undo_what_came_after(home, tmp_path):
    tree = training_recipe(tmp_path, steps=2)
    tree["stages"]["publish"] = {"kind": "publish", "line": "tiny", "model": "sft"}
    run_here(tree, home)
    other = run_here(tree, home, ("publish.model=dpo",))
    assert [v.number for v in home.registry.versions("tiny")] == [1, 2]
    run_here(tree, home)
    assert home.registry.champion("tiny").artifact_id == other["publish"].identity
    assert len(home.registry.history("tiny")) == 2
    adapter = run_here(tree, home, ("publish.model=adapter", "publish.line=tiny:adapter"))
    version = home.registry.champion("tiny:adapter")
    assert (version.kind, version.base_artifact_id) == ("adapter", adapter["dpo"].identity)


def test_a_model_of_a_published_stage_can_be_trained_on(home, tmp_path):
    tree = {"name": "t", "stages": data_stages(tmp_path)}
    tree["stages"]["base"] = learning(2, data="chats", tokenizer="tokenizer", shape={"depth": 1, "dim": 16})
    tree["stages"]["publish"] = {"kind": "publish", "line": "tiny", "model": "base"}
    tree["stages"]["more"] = learning(2, data="chats", start="publish")
    made = run_here(tree, home)
    assert made["base"].identity in made["more"].product.inputs


def test_a_product_that_is_damaged_is_a_sentence(home, tmp_path):
    tree = {"name": "t", "stages": data_stages(tmp_path)}
    made = run_here(tree, home)
    victim = made["tokenizer"].product.path / "tokenizer.json"
    victim.chmod(0o644)
    victim.write_text("{}")
    from prairie.errors import StoreError

    with pytest.raises(StoreError, match=f"artifact {made['tokenizer'].identity} is damaged"):
        run_here(tree, home)
    with pytest.raises(NotFoundError):
        home.artifacts.get("ffff")


def test_an_adapter_on_an_adapter(home, tmp_path):
    tree = {"name": "t", "stages": data_stages(tmp_path)}
    tree["stages"] |= {
        "base": learning(4, data="chats", tokenizer="tokenizer", shape={"depth": 1, "dim": 32}),
        "sft": learning(4, data="chats", start="base", adapter={"rank": 2, "dora": True}),
        "dpo": learning(
            4, objective="dpo", data="pairs", start="sft", lr=1e-2,
            adapter={"rank": 3, "stack": True, "rslora": True, "targets": ["q_proj", "lm_head"]},
        ),
        "publish": {"kind": "publish", "line": "tiny:dpo", "model": "dpo"},
        "after": {"kind": "evaluate", "models": ["base", "sft", "dpo"], "text": ["chats"]},
    }  # fmt: skip
    made = run_here(tree, home)
    below, above = (LoRA.load(made[name].product.path) for name in ("sft", "dpo"))
    assert below.config.dora and above.config.rslora and above.config.rank == 3
    assert [parent.hash for parent in above.parents] == [below.hash], "the adapter below was not left as it was"
    loss = {name: figures["loss"]["chats"]["loss"] for name, figures in made["after"].figures["models"].items()}
    assert len(set(loss.values())) == 3
    model = prairie.load("tiny:dpo", home=home.root)
    assert model.adapter_hash == above.hash
    assert model.generate("what colour is thing 3?", max_tokens=3, temperature=0).token_ids


def test_an_adapter_learns_on_a_quantised_base(home, tmp_path):
    tree = {"name": "t", "stages": data_stages(tmp_path)}
    base = learning(4, data="chats", tokenizer="tokenizer", shape={"depth": 1, "dim": 64})
    tree["stages"] |= {
        "base": base,
        "sft": learning(8, data="chats", start="base", lr=1e-2, quantize="nf4", adapter={"rank": 4}),
        "dpo": learning(2, objective="dpo", data="pairs", start="sft", quantize="nf4"),
    }
    made = run_here(tree, home)
    for name in ("sft", "dpo"):
        report = made[name].figures["quantized"]
        assert report["bits"] == "nf4" and report["kl"] > 0 and report["bytes_after"] < report["bytes_before"]
        assert read_manifest(made[name].product.path)["base_quantized"] == "nf4"
    lora = LoRA.load(made["sft"].product.path)
    lora.require_base(load_model(made["base"].product.path))
    whole = {**tree, "stages": {**tree["stages"], "base": base | {"quantize": "int8"}}}
    with pytest.raises(ModelError, match="only an adapter can learn on a quantised base"):
        run_here(whole, home)
