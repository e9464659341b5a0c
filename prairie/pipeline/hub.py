"""A model folder from the Hugging Face hub: resumed where it was cut off, files checked against the hub's own hashes.

Only what a model here is made of is fetched: configs, safetensors, tokenizer, template, card. Not here: reading it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import httpx

from prairie.errors import ModelError
from prairie.store.disk import disk_errors

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
"""owner/model, or owner/model@revision."""
ORIGIN = "hub.json"
"""The file beside the model that says what was fetched."""
WANTED = (
    "config.json", "generation_config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
    "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.jinja", "*.model",
    "README.md",
)  # fmt: skip
TIMEOUT_S = 10.0


def fetch(name: str, folder: Path) -> Path:
    """Fetches `name` into a folder under `folder` and returns it. ModelError, in one sentence and within seconds, when
    there is no network, no such model, no leave to read it, or no safetensors in it; or when a file is not what it
    should be."""
    try:
        import huggingface_hub
    except ImportError:
        raise ModelError("the hub needs the package huggingface_hub", mend="pip install 'prairie[hub]'") from None
    repo, _, revision = name.partition("@")
    api = huggingface_hub.HfApi()
    found = _look_up(api, repo, revision or None)
    files = _wanted(repo, found.siblings or [])
    into = folder / f"{repo.replace('/', '--')}@{str(found.sha)[:12]}"
    headers = huggingface_hub.utils.build_hf_headers()
    try:
        with disk_errors(f"{into} cannot be written"):
            for file in files:
                url = f"{api.endpoint}/{repo}/resolve/{found.sha}/{file.rfilename}"
                _download(url, headers, into / file.rfilename, file)
            (into / ORIGIN).write_text(json.dumps({"name": repo, "revision": found.sha}) + "\n", "utf-8")
    except httpx.HTTPError as error:
        raise _out_of_reach(name, error) from None
    return into


def _look_up(api: Any, repo: str, revision: str | None) -> Any:
    """The hub's list of the model's files with their hashes."""
    from huggingface_hub import errors

    try:
        return api.model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
    except errors.GatedRepoError:
        raise ModelError(f"{repo} asks for an agreement", mend="accept it on its page, then: hf auth login") from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        named = f"{repo}@{revision}" if revision else repo
        raise ModelError("the hub has no such model, or not for you", got=named, wanted="owner/model") from None
    except Exception as error:  # the hub's client lets those of its HTTP library through, whichever that is
        raise _out_of_reach(repo, error) from None


def _out_of_reach(name: str, error: Exception) -> ModelError:
    return ModelError(
        f"{name} cannot be fetched from the hub",
        got=" ".join(f"{type(error).__name__}: {error}".split())[:160],
        wanted="a connection to it",
        mend="the same command goes on where it stopped; a folder can be imported without network",
    )


def _wanted(repo: str, files: list[Any]) -> list[Any]:
    chosen = [file for file in files if any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in WANTED)]
    if not any(file.rfilename.endswith(".safetensors") for file in chosen):
        pickles = [file.rfilename for file in files if file.rfilename.endswith((".bin", ".pt", ".pth"))]
        raise ModelError(
            f"{repo} has no model.safetensors", got=", ".join(pickles[:3]) or "no weights",
            mend="pickled weights are never opened here" if pickles else None,
        )  # fmt: skip
    top = [file for file in chosen if "/" not in file.rfilename]
    return sorted(top, key=lambda file: (file.rfilename.endswith(".safetensors"), file.rfilename))


def _download(url: str, headers: dict[str, str], path: Path, file: Any) -> None:
    """Goes on with what an earlier call left of the file; it gets its name when its hash is right."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    begin = part.stat().st_size if part.exists() else 0
    if begin < file.size:
        asked = {**headers, "Accept-Encoding": "identity", **({"Range": f"bytes={begin}-"} if begin else {})}
        with httpx.stream("GET", url, headers=asked, follow_redirects=True, timeout=TIMEOUT_S) as response:
            response.raise_for_status()
            with part.open("ab" if response.status_code == 206 else "wb") as stream:
                for piece in response.iter_raw():
                    stream.write(piece)
    found, wanted = _hash_of(part, file), file.lfs.sha256 if file.lfs else file.blob_id
    if found != wanted:
        part.unlink()
        raise ModelError(
            f"{path.name} did not arrive whole", got=found[:12], wanted=str(wanted)[:12],
            mend="run the command again; the damaged file is gone",
        )  # fmt: skip
    part.rename(path)


def _hash_of(path: Path, file: Any) -> str:
    """Large files are named by their sha256, small ones as git names them."""
    digest = hashlib.sha256() if file.lfs else hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
