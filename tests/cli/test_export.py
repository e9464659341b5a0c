"""`prairie export` and `prairie import`: every way out and in, the card, and what does not go together."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from prairie.data.chat_template import ChatTemplate
from prairie.data.tokenizer import Tokenizer
from prairie.engine.language_model import LanguageModel
from prairie.models.config import ModelConfig
from prairie.models.lora import LoRA, LoRAConfig
from prairie.models.transformer import Transformer
from prairie.models.weights import load_model, read_manifest, save_model
from prairie.store.home import Home

pytestmark = pytest.mark.long

CONFIG = {"dim": 32, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn_dim": 64, "max_context": 64}


def open_model(folder: Path) -> Path:
    tokenizer = Tokenizer.train_bpe(["a small text of few words", "草原上的马"] * 3, 300)
    template = ChatTemplate.builtin("chatml", tokenizer)
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, tie_embeddings=False, **CONFIG)).init_weights(0)
    save_model(model, folder, tokenizer_hash=tokenizer.hash, template_hash=template.hash)
    tokenizer.save(folder)
    template.save(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Small\n", "utf-8")
    return folder


@pytest.fixture
def poet(ask, root, tmp_path):
    """A line `smol` from an open model, and on it the vertical `smol:poet`, two adapters one on the other."""
    ask("import", open_model(tmp_path / "Smol Model"), "smol")
    with Home(root) as home:
        base = home.registry.resolve("smol")
        path = home.artifacts.get(base.artifact_id).path
        model, below = load_model(path), None
        facts = {key: read_manifest(path)[key] for key in ("tokenizer_hash", "template_hash")}
        for seed in (1, 2):
            below = LoRA.create(model, LoRAConfig(rank=2, alpha=8, dora=seed == 1), seed, below)
            with torch.no_grad():
                for parameter in below.parameters():
                    if parameter.requires_grad:
                        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        with home.artifacts.create("train", "poet", {"epochs": 2, "lr": 0.1}, [base.artifact_id]) as folder:
            below.save(folder, base_artifact=base.artifact_id, **facts)
        id = home.artifacts.id_of("train", {"epochs": 2, "lr": 0.1}, [base.artifact_id], "")
        home.registry.promote(
            home.registry.register("smol:poet", id, kind="adapter", base=base.artifact_id, figures={"accuracy": 0.75})
        )
        return LanguageModel.load(path, home.artifacts.get(id).path).logits([[5, 6, 7, 8]])


def test_a_stack_merged_answers_as_before(ask, poet, tmp_path):
    facts = ask("export", "smol:poet", "--to", "hf", "--merge", "--out", tmp_path / "merged")
    assert facts["merge_error"] < 1e-5 and facts["kind"] == "model"
    merged = LanguageModel.load(tmp_path / "merged")
    torch.testing.assert_close(merged.logits([[5, 6, 7, 8]]), poet, rtol=1e-4, atol=1e-4)
    assert len(read_manifest(tmp_path / "merged")["merged"]) == 2
    half = ask("export", "smol:poet", tmp_path / "half", "--to", "hf", "--merge", "--dtype", "bf16")
    assert half["dtype"] == "bf16"
    assert load_model(tmp_path / "half").embed.dtype == torch.bfloat16
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(peer(torch.tensor([[5, 6, 7, 8]])).logits, poet, rtol=1e-4, atol=1e-4)


def test_the_card_tells_the_lineage(ask, poet, tmp_path):
    ask("export", "smol:poet", tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text("utf-8")
    front, _, rest = text.removeprefix("---\n").partition("---\n")
    assert "license: apache-2.0" in front and "library_name: peft" in front and "base_model: Smol Model" in front
    for section in ("Lineage", "Data", "Recipe", "Figures", "Licence"):
        assert f"## {section}\n" in rest
    assert "train poet" in rest and "import model" in rest and '"lr": 0.1' in rest and "accuracy 0.75" in rest
    assert "apache-2.0, as the base states it" in rest
    assert str(tmp_path) not in text, "a card that is published does not tell where its maker keeps things"
    assert LoRA.load(tmp_path / "adapter").parent is not None, "the adapter below is part of the folder"


def test_gguf_of_a_merged_adapter(call, poet, tmp_path):
    pytest.importorskip("gguf")
    code, out, err = call("export", "smol:poet", "--to", "gguf", "--merge", "--dtype", "q8_0", "--out", tmp_path / "g")
    assert code == 0, err
    assert "llama.cpp's tokenizer: cut as" in err and "Merging changed no logit" in err and "is in" in out
    files = sorted(path.name for path in (tmp_path / "g").iterdir())
    assert files == ["README.md", "smol-poet-1-q8_0.gguf"]
    from gguf import GGUFReader

    reader = GGUFReader(tmp_path / "g" / files[1])
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0" and kinds["output_norm.weight"] == "F32"
    assert "chatml" in str(reader.fields) or "tokenizer.chat_template" in reader.fields


def test_numbers_that_a_dtype_cannot_hold_are_refused(call, tmp_path):
    folder = open_model(tmp_path / "large")
    model = load_model(folder)
    with torch.no_grad():
        model.layers[0].down[0, 0] = 1e5
    (folder / "prairie.json").unlink()
    save_model(model, folder)
    for form in ("hf", "gguf"):
        code, _, err = call("export", folder, "--to", form, "--dtype", "f16", "--out", tmp_path / "out")
        assert code == 1 and "f16 cannot hold" in err and not (tmp_path / "out").exists()
        assert call("export", folder, "--to", form, "--dtype", "bf16", "--out", tmp_path / form)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("smol:poet", "--to", "hf"), "is an adapter, and --to hf writes whole models; add --merge"),
        (("smol:poet", "--to", "gguf"), "add --merge"),
        (("smol", "--to", "peft"), "only an adapter can be written in PEFT's format"),
        (("smol", "--merge"), "is no adapter, so there is nothing to merge"),
        (("smol:poet", "--dtype", "f16"), "an adapter is copied as it is"),
        (("smol", "--dtype", "q8_0"), "a Hugging Face folder cannot have this dtype"),
        (("smol", "--to", "onnx"), "onnx"),
        (("nobody",), "no such model"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(call, poet, tmp_path, arguments, sentence):
    code, out, err = call("export", *arguments, "--out", tmp_path / "out")
    assert code in (1, 2) and out == "" and sentence in err, err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.part"))


def test_both_spellings_and_names_by_default(ask, call, tmp_path, monkeypatch):
    folder = open_model(tmp_path / "Smol Model")
    assert ask("import", folder)["imported"] == "smol-model@1"
    assert ask("models", "import", folder, "other")["origin"] == "Smol Model"
    monkeypatch.chdir(tmp_path)
    assert ask("export", "smol-model@1")["folder"] == "smol-model-1"
    assert (tmp_path / "smol-model-1" / "model.safetensors").is_file()
    assert ask("models", "export", folder, "again")["to"] == "hf", "a plain folder can be exported too"
    assert call("export", "other", "one", "--out", "two")[0] == 2
    code, _, err = call("import", tmp_path / "nothing")
    assert code == 1 and "no such model folder" in err


# ---- the hub: a server of our own that speaks as it does


class Hub(BaseHTTPRequestHandler):
    files: dict[str, bytes]
    cut: set[str]
    bad: set[str]
    asked: list[tuple[str, str | None]]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/org/smol/revision/main") or self.path.startswith("/api/models/org/smol?"):
            return self.say_json(self.info())
        name = self.path.partition("?")[0].rpartition("/")[2]
        if "/org/smol/resolve/" not in self.path or name not in self.files:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        data, begin = self.files[name], 0
        if (wanted := self.headers.get("Range", "")).startswith("bytes="):
            begin = int(wanted[6:].partition("-")[0] or 0)
        if self.command == "GET":
            self.asked.append((name, self.headers.get("Range")))
        self.send_response(206 if begin else 200)
        self.send_header("ETag", f'"{self.etag(name)}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("Content-Length", str(len(data) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            body = bytes(b ^ 1 for b in data) if name in self.bad else data
            half = name in self.cut
            self.wfile.write(body[begin : len(data) // 2] if half else body[begin:])
            if half:
                self.wfile.flush()
                self.connection.close()
        return None

    def etag(self, name: str) -> str:
        data = self.files[name]
        if name.endswith(".safetensors"):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def info(self) -> dict[str, object]:
        siblings = []
        for name, data in self.files.items():
            each: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": self.etag(name)}
            if name.endswith(".safetensors"):
                each["lfs"] = {"sha256": self.etag(name), "size": len(data), "pointerSize": 134}
            siblings.append(each)
        return {"id": "org/smol", "modelId": "org/smol", "sha": "c" * 40, "siblings": siblings, "tags": []}

    def say_json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    folder = open_model(tmp_path / "there")
    Hub.files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"unused.bin": b"pickle"}
    Hub.cut, Hub.bad, Hub.asked = set(), set(), []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_name_of_the_hub(ask, call, hub, root):
    facts = ask("import", "org/smol")
    assert facts["imported"] == "smol@1" and facts["origin"] == "org/smol@" + "c" * 12
    assert facts["license"] == "apache-2.0"
    assert "unused.bin" not in {name for name, _ in hub.asked}
    assert not list((root / "downloads").iterdir()), "what was imported need not lie there twice"
    code, _, err = call("import", "org/other")
    assert code == 1 and "the hub has no such model" in err


def test_a_damaged_download_is_refused_and_a_cut_one_goes_on(ask, call, hub, root):
    hub.bad.add("model.safetensors")
    code, _, err = call("import", "org/smol")
    assert code == 1 and "model.safetensors did not arrive whole" in err and "Traceback" not in err
    hub.bad.clear()
    hub.cut.add("model.safetensors")
    code, _, err = call("import", "org/smol")
    assert code == 1 and "cannot be fetched from the hub" in err
    hub.cut.clear()
    hub.asked.clear()
    assert ask("import", "org/smol")["imported"] == "smol@1"
    ranges = [wanted for name, wanted in hub.asked if name == "model.safetensors"]
    assert ranges and all(wanted and not wanted.startswith("bytes=0-") for wanted in ranges), "it began anew"
    assert "config.json" not in {name for name, _ in hub.asked}, "what is there is not fetched again"


def test_without_network_it_is_said_at_once(call, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    code, out, err = call("import", "org/smol")
    sentence = err.splitlines()[-1]
    assert code == 1 and out == "" and sentence.startswith("error: org/smol cannot be fetched from the hub"), err
    assert "a connection to it" in sentence and "Traceback" not in err
