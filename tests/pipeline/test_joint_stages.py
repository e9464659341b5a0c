"""Stages of one `together` are carried out in the same steps, and are otherwise like any other."""

import pytest
from tiny_recipes import learning, run_here, training_recipe

from prairie.errors import RecipeError
from prairie.models.lora import LoRA
from prairie.pipeline import model_stages
from prairie.recipe import resolve_recipe
from prairie.store.home import Home

pytestmark = pytest.mark.long


def recipe(folder, together):
    tree = training_recipe(folder, steps=4)
    stages = tree["stages"]
    shared = {"start": "base", "together": "verticals"} if together else {"start": "base"}
    for name in ("sft", "dpo", "adapter"):
        del stages[name]
    stages["poet"] = learning(6, data="chats", adapter={"rank": 2}, **shared)
    stages["critic"] = learning(4, objective="dpo", data="pairs", lr=1e-3, adapter={"rank": 4}, **shared)
    return tree


@pytest.fixture
def home(tmp_path):
    with Home(tmp_path / "home") as home:
        yield home


def weights(made):
    return {k: v.detach() for k, v in LoRA.load(made.product.path).named_parameters()}


def test_together_is_apart_in_fewer_passes(home, tmp_path, monkeypatch):
    calls = []
    fit = model_stages.fit_together
    monkeypatch.setattr(model_stages, "fit_together", lambda trainers: calls.append(len(trainers)) or fit(trainers))
    apart, together = run_here(recipe(tmp_path, False), home), run_here(recipe(tmp_path, True), home)
    assert calls == [2]
    for name, steps in (("poet", 6), ("critic", 4)):
        assert together[name].figures["steps"] == steps and not together[name].reused
        assert together[name].product.manifest["inputs"] == apart[name].product.manifest["inputs"]
        ours, theirs = weights(together[name]), weights(apart[name])
        assert max(float((ours[k] - theirs[k]).norm() / theirs[k].norm().clamp_min(1e-9)) for k in theirs) < 1e-3
    assert list((home.root / "tmp").iterdir()) == [] and list((home.root / "work").iterdir()) == []

    again = run_here(recipe(tmp_path, True), home)
    assert all(made.reused for made in again.values()) and calls == [2]
    changed = run_here(recipe(tmp_path, True), home, ("critic.lr=0.0007",))
    assert changed["poet"].reused and not changed["critic"].reused and calls == [2]


def test_the_reference_is_read_where_it_was_computed(home, tmp_path):
    run_here(recipe(tmp_path, False), home)
    (kept,) = home.references.iterdir()
    written = kept.stat().st_mtime_ns
    run_here(recipe(tmp_path, False), home, ("critic.beta=0.2",))
    assert [path.stat().st_mtime_ns for path in home.references.iterdir()] == [written]
    kept.write_bytes(kept.read_bytes()[:20])
    made = run_here(recipe(tmp_path, False), home, ("critic.beta=0.3",))
    assert kept.stat().st_size > 20 and made["critic"].figures["steps"] == 4


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("critic.start=poet", "wait for each other|differ in `start`"),
        ("critic.dtype=bfloat16", "differ in `dtype`"),
        ("critic.adapter=null", "`together` is for adapters"),
    ],
)
def test_what_cannot_share_a_base_is_refused(tmp_path, override, what):
    with pytest.raises(RecipeError, match=what):
        resolve_recipe(recipe(tmp_path, True), (override,)).order()


def test_together_waits_for_what_all_of_it_reads(tmp_path):
    order = resolve_recipe(recipe(tmp_path, True)).order()
    assert max(order.index(name) for name in ("chats", "pairs", "base")) < min(map(order.index, ("poet", "critic")))
