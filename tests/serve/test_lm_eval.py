"""lm-eval over our server gives the scores of its own transformers backend, on the small real model.

What both must be told alike is whether a text begins with bos: `local-completions` adds none to a request, and one
before a rolling window; the `hf` backend adds the tokenizer's own, and before a rolling window a second one.
"""

import json
import shutil
from pathlib import Path

import pytest
from tiny_server import running

from prairie.store.home import Home

pytestmark = pytest.mark.slow

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
{more}
"""
KINDS = {
    "endings": ("multiple_choice", 'doc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: gold\n'
                "metric_list: [{metric: acc}, {metric: acc_norm}]"),
    "goes_on_so": ("loglikelihood", 'doc_to_text: "{{q}}"\ndoc_to_target: "{{choices[gold]}}"\n'
                   "metric_list: [{metric: perplexity}, {metric: acc}]"),
    "stories": ("loglikelihood_rolling", 'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'
                "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]"),
    "goes_on": ("generate_until", 'doc_to_text: "{{q}}"\ndoc_to_target: "{{goes_on}}"\n'
                'metric_list: [{metric: exact_match}]\n'
                'filter_list: [{name: none, filter: [{function: "remove_whitespace"}, {function: "take_first"}]}]\n'
                'generation_kwargs: {until: ["."], max_gen_toks: 24, do_sample: false}'),
}  # fmt: skip
STORY = "Once upon a time, there was a little girl named Lily. She had a big red ball. "
ROWS = [
    {"q": "Once upon a time, there was a", "choices": [" little girl", " quantum"], "gold": 0,
     "text": "Once upon a time, there was a little girl named Lily.", "goes_on": "little girl named Lily"},
    {"q": "One day, Tom saw a big red", "choices": [" equation of", " ball in"], "gold": 1,
     "text": "One day, Tom saw a big red ball in the park. He was", "goes_on": "an equation"},
    {"q": "The dog and the cat were", "choices": [" very happy", " taxable"], "gold": 1,
     "text": STORY * 30, "goes_on": "good friends"},
]  # fmt: skip
LONGEST = 400
"""Tokens of a window: the last row is rolled over."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model with a chat template of plain lines."""
    source = Path(__file__).parents[3] / "shared" / "data" / "models" / "stories260K-hf"
    if not source.is_dir():
        pytest.skip("the small real model is not in ../shared/data")
    folder = tmp_path_factory.mktemp("lm") / "stories"
    shutil.copytree(source, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    manager = pytest.importorskip("lm_eval.tasks", reason="lm-eval is not installed (extra `dev`)").TaskManager
    root = tmp_path_factory.mktemp("tasks")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, (kind, more) in KINDS.items():
        (root / f"{name}.yaml").write_text(TASK.format(name=name, file=root / "rows.jsonl", kind=kind, more=more))
    return manager(include_path=str(root), include_defaults=False)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with Home(tmp_path_factory.mktemp("lm") / "home") as home, running(home, [str(folder)]) as server:
        yield server


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def found(tasks, backend, names, /, *, chat=False, limit=None, **arguments):
    """(scores by task, what was said of each row)."""
    from lm_eval.evaluator import simple_evaluate

    told = ",".join(f"{key}={value}" for key, value in arguments.items())
    all = simple_evaluate(
        model=backend, model_args=told, tasks=names, task_manager=tasks, bootstrap_iters=0, limit=limit,
        apply_chat_template=chat,
    )  # fmt: skip
    scores = {n: {k: v for k, v in all["results"][n].items() if isinstance(v, float)} for n in names}
    return scores, {n: [s["resps"] for s in sorted(all["samples"][n], key=lambda s: s["doc_id"])] for n in names}


@pytest.mark.parametrize("bos", [False, True])
def test_likelihoods_are_those_of_its_own_backend(folder, tasks, server, bos):
    """Choices, endings and rolling perplexity, without bos and with it (there with two, as both then do)."""
    names = ["endings", "goes_on_so", "stories"]
    theirs, _ = found(
        tasks, "hf", names, pretrained=folder, device="cpu", dtype="float32", add_bos_token=bos, max_length=LONGEST
    )
    ours, _ = found(
        tasks, "local-completions", names, base_url=f"{server.url}/v1/completions", model=folder.name, tokenizer=folder,
        num_concurrent=1, add_bos_token=bos, max_length=LONGEST + 1,
    )  # fmt: skip
    assert set(theirs["endings"]) >= {"acc,none", "acc_norm,none"} and 0 < ours["endings"]["acc,none"] < 1
    for name in names:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_the_perplexity_is_that_of_a_plain_loop(folder, tasks, server):
    """What is right, by transformers alone: each text after one bos. The `hf` backend as it comes puts two."""
    import math

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def perplexity(before):
        total = 0.0
        for row in ROWS[:2]:
            ids = torch.tensor([*before, *words(row["text"], add_special_tokens=False).input_ids])
            with torch.no_grad():
                logprobs = model(ids[None]).logits[0].log_softmax(-1)
            total += sum(logprobs[i, token].item() for i, token in enumerate(ids[1:]))
        return math.exp(-total / sum(len(row["text"].split()) for row in ROWS[:2]))

    def of_lm_eval(backend, **arguments):
        scores, _ = found(tasks, backend, ["stories"], limit=2, max_length=LONGEST, **arguments)
        return scores["stories"]["word_perplexity,none"]

    local = {"model": folder.name, "tokenizer": folder, "num_concurrent": 1}
    ours = of_lm_eval("local-completions", base_url=f"{server.url}/v1/completions", **local)
    as_it_comes = of_lm_eval("hf", pretrained=folder, device="cpu", dtype="float32")
    bos = words.bos_token_id
    assert ours == pytest.approx(perplexity([bos]), rel=1e-4) and ours == pytest.approx(2.6933, abs=1e-3)
    assert as_it_comes == pytest.approx(perplexity([bos, bos]), rel=1e-4) and as_it_comes > 2 * ours


def test_generations_are_those_of_its_own_backend(folder, tasks, server):
    theirs, said = found(
        tasks, "hf", ["goes_on"], chat=True, pretrained=folder, device="cpu", dtype="float32", max_length=LONGEST
    )
    ours, heard = found(
        tasks, "local-chat-completions", ["goes_on"], chat=True, base_url=f"{server.url}/v1/chat/completions",
        model=folder.name, num_concurrent=1,
    )  # fmt: skip
    assert [[each.strip() for each in row[0]] for row in heard["goes_on"]] == [
        [each.strip() for each in row[0]] for row in said["goes_on"]
    ]
    assert ours == theirs and 0 < ours["goes_on"]["exact_match,none"] < 1
