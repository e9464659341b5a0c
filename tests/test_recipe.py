from pathlib import Path

import pytest

from prairie.errors import RecipeError
from prairie.recipe import load_recipe, resolve_recipe

RECIPES = Path(__file__).parents[1] / "recipes"


def tree(**train):
    return {
        "name": "t",
        "params": {"data": None, "steps": 3},
        "stages": {
            "sft": {"kind": "train", "start": "base", "data": "rows", "steps": "${steps}", **train},
            "rows": {"kind": "prepare", "source": "file", "path": "${data}"},
            "base": {"kind": "import", "path": "somewhere"},
        },
    }


def test_order_puts_a_stage_after_what_it_reads():
    recipe = resolve_recipe(tree(), ["data=x.jsonl"])
    assert recipe.order() == ["base", "rows", "sft"]
    assert recipe.stages["sft"].steps == 3


def test_overrides_reach_params_and_stages_and_change_the_hash():
    plain = resolve_recipe(tree(), ["data=x"])
    other = resolve_recipe(tree(), ["data=x", "sft.lr=0.5", "sft.adapter.rank=4", "seed=9"])
    assert other.stages["sft"].lr == 0.5 and other.stages["sft"].adapter.rank == 4 and other.seed == 9
    assert plain.hash() != other.hash()
    assert plain.hash() == resolve_recipe(tree(), ["data=x"]).hash()


@pytest.mark.parametrize(
    ("overrides", "extra", "words"),
    [
        (["data=x"], {"learning_rate": 1}, ["unknown key `sft.learning_rate`", "`lr`"]),
        (["data=x"], {"adapter": {"rnk": 1}}, ["unknown key `sft.adapter.rnk`", "did you mean `rank`"]),
        (["data=x"], {"epochs": 1}, ["epochs", "steps"]),
        (["data=x"], {"lr": -1}, ["`sft.lr`", "greater than 0", "-1"]),
        ([], {}, ["needs a value for `data`", "data=VALUE"]),
        (["dta=x"], {}, ["no parameter `dta`", "did you mean `data`"]),
        (["sfd.lr=1"], {}, ["no stage `sfd`", "did you mean `sft`"]),
        (["lr"], {}, ["not `key=value`"]),
        (["data=x"], {"start": "bas"}, ["unknown stage", "`bas`", "did you mean `base`"]),
        (["data=x"], {"kind": "trian"}, ["unknown kind", "did you mean `train`"]),
    ],
)
def test_bad_recipes_get_one_sentence(overrides, extra, words):
    with pytest.raises(RecipeError) as caught:
        resolve_recipe(tree(**extra), overrides).order()
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_circle_is_refused():
    circle = tree(start="two")
    circle["stages"]["two"] = {"kind": "train", "start": "sft", "data": "rows", "steps": 1}
    with pytest.raises(RecipeError, match="wait for each other"):
        resolve_recipe(circle, ["data=x"]).order()


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(RecipeError, match="is not YAML"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(RecipeError, match="is not a recipe"):
        load_recipe(tmp_path / "list.yaml")


def test_go9_takes_what_go7_made():
    """Stages are known by what stands in them and by the seed: what differs would be played again for an hour."""
    small, large = (load_recipe(RECIPES / f"{name}.yaml") for name in ("go7", "go9"))
    shared = ("net", "publish", "first", "then")
    assert {name: small.stages[name] for name in shared} == {name: large.stages[name] for name in shared}
    assert small.seed == large.seed
