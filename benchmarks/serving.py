"""Serving: tokens a second, time to first token, adapters and prefixes, against llama.cpp, transformers and ourselves.

    python -m benchmarks.serving [--quick] [--case "mixed 8 llama.cpp"] --json

Random models in the blocks' shape, the same weights and the same requests on both sides, two threads, greedy. `bf16`,
`int8` and `int4` are how the weights are kept: ours computes in float32 from them, llama.cpp as its files of that kind
do (bf16, q8_0, q4_0; beside four bits embedding and head have eight on both sides), transformers in float32 on the same
rounded numbers, because torch multiplies bfloat16 at a sixtieth of that speed on a chip without instructions for it
(`about.dtype`; where the chip has them it computes in bfloat16).
`mixed`: prompts and answers lognormal from 16 to 256 tokens, the prompts inside the time. `single`: a prompt of 64,
then 127 single tokens, without the prompt's time. llama.cpp's GGUF file is written by our own exporter.
`speculation`: one stream, ours with drafts and without. `corrects`: an answer that repeats its prompt but for every
16th token, said by weights made to do that and nothing else; `babbles`: tokens drawn evenly, where no draft is right.
`8 corrects`, `8 babble`: the same with eight at a time. `8 stories`: eight at a time, greedy, by the trained model of
260 thousand parameters in ../shared/data. `adapters`: each has answered once before, the base alone as often.
`dtype auto`: weights that bfloat16 holds, kept as a probe finds best.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import workloads
from benchmarks.measure import Case, Found, forget_peak, peak_rss_mb, run

LLAMA = Path(__file__).parents[1] / ".peers" / "llama" / "bin" / "python"
THREADS = 2
CONTEXT = 1024
VOCABULARY = {"1m": 4096, "50m": 32768}
ADAPTERS = 16
CLIENTS, ASKED_TOKENS = 64, 16
SLOTS = (8, 32, 64)
"""Parallel slots that llama.cpp's server is tried with."""
WALK, MISTAKES = 256, 16
STORIES = Path(__file__).resolve().parents[2] / "shared" / "data" / "models" / "stories260K-hf"
BEGINNINGS = (
    "Once upon a time, there was a little girl named Lily.", "Tom and Sam were friends.", "One day, a big dog",
    "The sun was hot and the", "A small bird sat on a tree and", "Ben had a red ball. He", "It was a rainy day.",
    "Mom said,",
)  # fmt: skip
PREFIX = 400

Ask = tuple[list[int], int]
"""Token ids of a prompt, and how many tokens are wanted."""


def requests(count: int, vocabulary: int, seed: int = 1) -> list[Ask]:
    """Prompts and answers of mixed lengths."""
    rng = random.Random(seed)

    def length() -> int:
        return int(min(256, max(16, math.exp(rng.gauss(math.log(64), 0.8)))))

    lengths = [(length(), length()) for _ in range(count)]
    return [([rng.randrange(300, vocabulary) for _ in range(prompt)], wanted) for prompt, wanted in lengths]


def one_request(vocabulary: int, prompt: int = 64, wanted: int = 128) -> list[Ask]:
    rng = random.Random(0)
    return [([rng.randrange(300, vocabulary) for _ in range(prompt)], wanted)]


# --- the model, once for both sides -----------------------------------------------------------------------------------


def rounded_model(shape: str) -> Any:
    """Seeded weights, rounded to bfloat16 so that both sides can keep them exactly."""
    import torch

    torch.set_num_threads(THREADS)
    model = workloads.our_model(shape, VOCABULARY[shape]).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    return model


def tokenizer(vocabulary: int) -> Any:
    """A byte-level tokenizer with as many tokens as the model: text of plain letters is a token a letter."""
    from prairie.data.tokenizer import Tokenizer

    small = Tokenizer.train_bpe(["a b c d e f g"], 260)
    spec = json.loads(json.dumps(small.spec))
    known = set(spec["model"]["vocab"].values()) | {token["id"] for token in spec["added_tokens"]}
    spec["model"]["vocab"] |= {f"<w{id}>": id for id in range(vocabulary) if id not in known}
    return Tokenizer(spec, small.config)


def template(words: Any) -> Any:
    from prairie.data.chat_template import ChatTemplate

    return ChatTemplate.builtin("chatml", words)


def correcting_model() -> Any:
    """A 50m whose next token depends on the last alone: it walks through `WALK` tokens in a circle. It computes what
    any model of this shape does, and the embedding is too large for the blocks to change the outcome."""
    import torch

    plain = rounded_model("50m")
    model = type(plain)(replace(plain.config, tie_embeddings=False)).init_weights(0).requires_grad_(False).eval()
    walk = torch.arange(300, 300 + WALK)
    model.head.zero_()
    model.head[walk.roll(-1)] = model.embed[walk]
    model.embed.mul_(1000)
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    return model


def to_correct(wanted: int) -> list[Ask]:
    """That walk with mistakes, ready to be said again without them."""
    rng = random.Random(2)
    walk = [300 + at for at in range(WALK)]
    prompt = [rng.randrange(1000, 2000) if rng.randrange(MISTAKES) == 0 else token for token in walk]
    return [([*prompt[:-1], walk[-1]], wanted)]


# --- ours -------------------------------------------------------------------------------------------------------------


def our_engine(shape: str, weights: str, model: Any = None, **settings: Any) -> Any:
    """An engine as `prairie serve` would build it, when what it compiles is ready."""
    from prairie.engine.engine import Engine
    from prairie.models.quantized import quantize

    model = model or rounded_model(shape)
    if weights == "auto":
        settings["dtype"] = weights
    elif weights != "float32":
        quantize(model, weights, [list(range(300, 332))], head=True)
    words = tokenizer(VOCABULARY[shape])
    engine = Engine(model, words, template(words), weights_hash="benchmark", max_context=CONTEXT, **settings)
    engine.compile()
    forget_peak()
    return engine


def our_requests(asked: list[Ask], adapters: list[str] = [], temperature: float = 0) -> list[Any]:  # noqa: B006
    from prairie.engine.request import Request, SamplingParams

    made = []
    for i, (prompt, wanted) in enumerate(asked):
        params = SamplingParams(max_tokens=wanted, temperature=temperature, seed=i, ignore_eos=True)
        made.append(Request(str(i), prompt, params, adapters[i % len(adapters)] if adapters else None, stream=False))
    return made


def answered(
    engine: Any,
    asked: list[Ask],
    adapters: list[str] = [],  # noqa: B006 - is not changed
    temperature: float = 0,
) -> tuple[list[list[int]], list[float]]:
    """The answers, and when each step ended."""
    done, ended = {}, []
    for request in our_requests(asked, adapters, temperature):
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            if output.completion is not None:
                done[output.request_id] = output.completion.token_ids
        ended.append(time.perf_counter())
    return [done[str(i)] for i in range(len(asked))], ended


def warm_up(engine: Any, adapters: list[str] = [], count: int = 4) -> None:  # noqa: B006
    vocabulary = engine.model.config.vocab_size
    answered(engine, [(prompt[:32], 4) for prompt, _ in requests(count, vocabulary, seed=9)], adapters)


def ours(shape: str, weights: str, slots: int, asked: list[Ask], adapters: int = 0, warm: int = 4) -> Found:
    engine = our_engine(shape, weights, max_batch=slots)
    names = []
    if adapters:
        from prairie.models.lora import LoRA, LoRAConfig

        for number in range(adapters):
            lora = LoRA.create(engine.model, LoRAConfig(), seed=number).requires_grad_(False).eval()
            for path in lora.paths:
                lora.pair(path)[1].normal_(0, 0.02)
            engine.add_adapter(lora.hash, lora)
            names.append(lora.hash)
    warm_up(engine, names, warm)
    began = time.perf_counter()
    answers, ended = answered(engine, asked, names)
    tokens, since = (len(ended) - 1, ended[0]) if slots == 1 else (sum(map(len, answers)), began)
    rate = tokens / (ended[-1] - since)  # of one stream without its first step, the prompt's
    first = round(1000 * (ended[0] - began), 1)
    return {"rate": rate, "rss_mb": peak_rss_mb(), "first_token_ms": first, "begins": answers[0][:8]}


def our_speculation(speculate: str | None, quick: bool, copies: bool) -> Found:
    """One stream without its first step, and what came of drafts."""
    model = correcting_model() if copies else None
    engine = our_engine("50m", "bf16", model, max_batch=1, speculate=speculate)
    warm_up(engine)
    wanted = 64 if quick else 240
    asked = to_correct(wanted) if copies else one_request(VOCABULARY["50m"], wanted=wanted)
    (answer,), ended = answered(engine, asked, temperature=0 if copies else 1)
    if copies and answer != [300 + at % WALK for at in range(wanted)]:
        raise SystemExit("the model that corrects does not")
    rate, figures = (len(answer) - 1) / (ended[-1] - ended[0]), engine.figures()
    counts = {name: figures[name] for name in ("drafted_tokens", "accepted_tokens")}
    return {"rate": rate, "rss_mb": peak_rss_mb(), "steps": len(ended), **counts}


def our_batch(speculate: str | None, quick: bool, copies: bool) -> Found:
    """Eight at a time, prompts inside the time, and what came of drafts."""
    engine = our_engine("50m", "bf16", correcting_model() if copies else None, max_batch=8, speculate=speculate)
    warm_up(engine)
    asked = to_correct(48 if quick else 160) * 8 if copies else mixed(8, quick)
    return _drafted(engine, asked, 0 if copies else 1)


def our_stories(speculate: str | None, quick: bool) -> Found:
    """Text of a trained model, eight at a time."""
    from prairie.engine.language_model import LanguageModel

    if not STORIES.is_dir():
        raise SystemExit(f"the trained model is not there: {STORIES}")
    engine = LanguageModel.load(STORIES, speculate=speculate, max_batch=8).engine
    engine.compile()
    forget_peak()
    asked = [(engine.prompt_ids(BEGINNINGS[i % len(BEGINNINGS)]), 64 if quick else 400) for i in range(16)]
    _drafted(engine, asked[:2], 0)
    return _drafted(engine, asked, 0)


def _drafted(engine: Any, asked: list[Ask], temperature: float) -> Found:
    before, began = engine.figures(), time.perf_counter()
    answers, ended = answered(engine, asked, temperature=temperature)
    figures, tokens = engine.figures(), sum(map(len, answers))
    counts = {name: figures[name] - before[name] for name in ("drafted_tokens", "accepted_tokens")}
    rate = tokens / (ended[-1] - began)
    return {"rate": rate, "rss_mb": peak_rss_mb(), "steps": len(ended), "tokens": tokens, **counts}


def our_prefix(reuse: bool, quick: bool) -> Found:
    """Seconds to the first token of a request whose first 400 tokens another one has brought before."""
    engine = our_engine("50m", "bf16", max_batch=8, prefix_reuse=reuse)
    warm_up(engine)
    rng = random.Random(5)
    shared = [rng.randrange(300, VOCABULARY["50m"]) for _ in range(PREFIX)]
    seconds = []
    for _ in range(3 if quick else 10):
        own = [rng.randrange(300, VOCABULARY["50m"]) for _ in range(24)]
        began = time.perf_counter()
        answered(engine, [([*shared, *own], 1)])
        seconds.append(time.perf_counter() - began)
    return {"rate": statistics.median(seconds[1:]), "rss_mb": peak_rss_mb()}


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, shape: str, dtype: str) -> None:
    import gguf

    from prairie.data.gguf_vocabulary import add_vocabulary
    from prairie.models.gguf import add_model, architecture_of

    model, words = rounded_model(shape), tokenizer(VOCABULARY[shape])
    writer = gguf.GGUFWriter(path, architecture_of(model.config).name)
    add_model(writer, model, dtype, "benchmark")
    add_vocabulary(writer, words, template(words), model.config.vocab_size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def gguf_file(shape: str, dtype: str) -> Iterator[Path]:
    """Written by another process, whose memory is nobody's."""
    if not LLAMA.exists():
        raise SystemExit("no llama-cpp-python: `make peers` builds it")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        call = "from pathlib import Path; from benchmarks import serving; "
        call += f"serving.write_gguf(Path({str(path)!r}), {shape!r}, {dtype!r})"
        done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr.strip().splitlines()[-1])
        yield path


def llama(shape: str, dtype: str, slots: int, asked: list[Ask]) -> Found:
    with gguf_file(shape, dtype) as path:
        job = {
            "path": str(path), "slots": slots, "threads": THREADS, "context": CONTEXT, "requests": asked,
            "measure": "single" if slots == 1 else "mixed",
        }  # fmt: skip
        script = Path(__file__).with_name("llama_side.py")
        done = subprocess.run([LLAMA, script], input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit((done.stderr.strip().splitlines() or ["llama.cpp gave no reason"])[-1])
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


# --- transformers -----------------------------------------------------------------------------------------------------


def peer_model(shape: str) -> tuple[Any, str]:
    """The same weights in transformers, in the dtype that this machine multiplies faster."""
    import torch
    from transformers import LlamaForCausalLM

    from prairie.models.weights import save_model
    from prairie.runtime import Runtime

    dtype = Runtime.detect(threads=THREADS).best_dtype()
    with TemporaryDirectory() as folder:
        save_model(rounded_model(shape), Path(folder))
        model = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model.generation_config.pad_token_id = 0
    return model, dtype


def transformers_generate(asked: list[Ask]) -> Found:
    import torch

    model, dtype = peer_model("1m")
    ((prompt, wanted),) = asked
    ids = torch.tensor([prompt])

    def go(count: int) -> tuple[float, list[int]]:
        began = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), min_new_tokens=count, max_new_tokens=count, do_sample=False
            )
        return time.perf_counter() - began, out[0, len(prompt) :].tolist()

    go(8)
    forget_peak()
    first, _ = go(1)
    whole, answer = go(wanted)
    return {"rate": (wanted - 1) / (whole - first), "rss_mb": peak_rss_mb(), "dtype": dtype, "begins": answer[:8]}


def transformers_batching(slots: int, asked: list[Ask]) -> Found:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model, dtype = peer_model("50m")
    settings = ContinuousBatchingConfig(max_requests_per_batch=slots) if _takes_slots() else ContinuousBatchingConfig()
    longest = max(wanted for _, wanted in asked)

    def go(some: list[Ask]) -> tuple[float, list[int]]:
        with model.continuous_batching_context_manager(
            generation_config=GenerationConfig(
                max_new_tokens=longest, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=settings,
        ) as manager:
            began, left = time.perf_counter(), {}
            for i, (prompt, wanted) in enumerate(some):
                left[manager.add_request(prompt, request_id=str(i), max_new_tokens=wanted)] = i
            begins: list[int] = []
            while left:
                output = manager.get_result(timeout=1)
                if output is not None and output.is_finished() and left.pop(output.request_id) == 0:
                    begins = output.generated_tokens[:8]
            return time.perf_counter() - began, begins

    go([(prompt[:16], 4) for prompt, _ in asked[:2]])
    forget_peak()
    seconds, begins = go(asked)
    return {"rate": sum(n for _, n in asked) / seconds, "rss_mb": peak_rss_mb(), "dtype": dtype, "begins": begins}


def _takes_slots() -> bool:
    import inspect

    from transformers import ContinuousBatchingConfig

    return "max_requests_per_batch" in inspect.signature(ContinuousBatchingConfig).parameters


# --- over HTTP --------------------------------------------------------------------------------------------------------


def our_server(quick: bool) -> Found:
    with TemporaryDirectory() as folder:
        # Another process compiles what a server that runs for the second time finds compiled.
        call = "from pathlib import Path; from benchmarks import serving; "
        call += f"serving.write_model(Path({folder!r}) / 'model'); serving.our_engine('50m', 'bf16')"
        subprocess.run([sys.executable, "-c", call], check=True, capture_output=True, env=_environment())
        command = [sys.executable, "-m", "prairie", "serve", f"{folder}/model", "--home", f"{folder}/home"]
        return first_tokens([*command, "--quantize", "bf16"], "model", quick)


def write_model(folder: Path) -> None:
    from prairie.models.weights import save_model

    words = tokenizer(VOCABULARY["50m"])
    made = template(words)
    save_model(rounded_model("50m"), folder, tokenizer_hash=words.hash, template_hash=made.hash)
    words.save(folder)
    made.save(folder)


def llama_server(quick: bool) -> Found:
    """llama.cpp's own, with the number of slots that serves these clients best."""
    program = Path(os.environ.get("PRAIRIE_LLAMA_SERVER") or LLAMA.with_name("llama-server"))
    if not program.exists():
        raise SystemExit(f"no llama.cpp server at {program}: `make peers` builds it, or PRAIRIE_LLAMA_SERVER names one")
    with gguf_file("50m", "bf16") as path:
        threads = ["--threads", str(THREADS), "--threads-batch", str(THREADS)]
        found = []
        for slots in SLOTS:
            room = ["--parallel", str(slots), "--ctx-size", str(CONTEXT * slots)]
            told = first_tokens([str(program), "--model", str(path), *threads, *room, "--log-disable"], "model", quick)
            found.append({**told, "slots": slots})
    return min(found, key=lambda told: float(told["rate"]))


def llama_cpp_python_server(quick: bool) -> Found:
    """It answers one request after the other. Its default would break off one for the next."""
    with gguf_file("50m", "bf16") as path:
        command = [str(LLAMA), "-m", "llama_cpp.server", "--model", str(path), "--n_ctx", str(CONTEXT)]
        command += ["--n_threads", str(THREADS), "--n_threads_batch", str(THREADS)]
        return first_tokens([*command, "--verbose", "false", "--interrupt_requests", "false"], "model", quick)


def first_tokens(command: list[str], model: str, quick: bool) -> Found:
    """Seconds from sending a request to its first token, 64 clients at once, each with a prompt of its own."""
    port = 18000 + os.getpid() % 2000
    server = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_environment()
    )
    try:
        seconds = asyncio.run(_clients(f"http://127.0.0.1:{port}", model, 8 if quick else CLIENTS, server))
        status = Path(f"/proc/{server.pid}/status").read_text().splitlines()
        rss = int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024
    finally:
        server.terminate()
        server.wait(30)
    p50, p99 = (seconds[min(len(seconds) - 1, int(share * len(seconds)))] for share in (0.5, 0.99))
    return {"rate": p50, "p50_s": round(p50, 4), "p99_s": round(p99, 4), "rss_mb": rss}


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(THREADS)}


async def _clients(url: str, model: str, clients: int, server: subprocess.Popen[bytes]) -> list[float]:
    import httpx

    rng = random.Random(3)
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=0)  # llama.cpp closes idle ones unseen
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        for _ in range(600):
            if server.poll() is not None:
                raise SystemExit(f"the server ended with {server.returncode}")
            try:
                if (await http.get("/v1/models")).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.1)

        async def first(prompt: str) -> float:
            body = {"model": model, "prompt": prompt, "max_tokens": ASKED_TOKENS, "temperature": 0, "stream": True}
            began = time.perf_counter()
            found = 0.0
            async with http.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code != 200:
                    raise SystemExit(f"the server said {answer.status_code}: {(await answer.aread())[:200]!r}")
                async for line in answer.aiter_lines():
                    if line.startswith("data: {") and not found:
                        found = time.perf_counter() - began
            return found

        def prompt() -> str:
            return "".join(rng.choice("abcdefgh ") for _ in range(64))

        for _ in range(4):
            await first(prompt())
        await asyncio.sleep(8)  # what the background reads from the cache of compiled functions is there now
        await first(prompt())
        return sorted(await asyncio.gather(*(first(prompt()) for _ in range(clients))))


# --- the rows ---------------------------------------------------------------------------------------------------------


def mixed(slots: int, quick: bool) -> list[Ask]:
    return requests(slots if quick else max(24, 3 * slots // 2), VOCABULARY["50m"])


def single(shape: str, quick: bool) -> list[Ask]:
    return one_request(VOCABULARY[shape], wanted=32 if quick else 128)


CASES = [
    Case(
        "mixed 8 llama.cpp", "llama.cpp bf16, 8 slots", "tokens/s",
        lambda quick: ours("50m", "bf16", 8, mixed(8, quick)), lambda quick: llama("50m", "bf16", 8, mixed(8, quick)),
        required=1.5,
    ),
    Case(
        "mixed 32 llama.cpp", "llama.cpp bf16, 32 slots", "tokens/s",
        lambda quick: ours("50m", "bf16", 32, mixed(32, quick)),
        lambda quick: llama("50m", "bf16", 32, mixed(32, quick)), required=2.5,
    ),
    Case(
        "mixed 8 transformers", "transformers continuous batching", "tokens/s",
        lambda quick: ours("50m", "bf16", 8, mixed(8, quick)),
        lambda quick: transformers_batching(8, mixed(8, quick)), required=3.0,
    ),
    Case(
        "single bf16", "llama.cpp bf16", "tokens/s",
        lambda quick: ours("50m", "bf16", 1, single("50m", quick)),
        lambda quick: llama("50m", "bf16", 1, single("50m", quick)), required=0.8,
    ),
    Case(
        "single int8", "llama.cpp q8_0", "tokens/s",
        lambda quick: ours("50m", "int8", 1, single("50m", quick)),
        lambda quick: llama("50m", "q8_0", 1, single("50m", quick)), required=0.8,
    ),
    Case(
        "single int4", "llama.cpp q4_0", "tokens/s",
        lambda quick: ours("50m", "int4", 1, single("50m", quick)),
        lambda quick: llama("50m", "q4_0", 1, single("50m", quick)), required=0.8,
    ),
    Case(
        "single 1m", "transformers generate", "tokens/s",
        lambda quick: ours("1m", "float32", 1, single("1m", quick)),
        lambda quick: transformers_generate(single("1m", quick)), required=8.0,
    ),
    Case(
        "speculation corrects", "our engine without drafts", "tokens/s",
        lambda quick: our_speculation("ngram", quick, copies=True),
        lambda quick: our_speculation(None, quick, copies=True),
    ),
    Case(
        "speculation babbles", "our engine without drafts", "tokens/s",
        lambda quick: our_speculation("ngram", quick, copies=False),
        lambda quick: our_speculation(None, quick, copies=False), required=0.98,
    ),
    Case(
        "speculation 8 corrects", "our engine without drafts", "tokens/s",
        lambda quick: our_batch("ngram", quick, copies=True), lambda quick: our_batch(None, quick, copies=True),
    ),
    Case(
        "speculation 8 babble", "our engine without drafts", "tokens/s",
        lambda quick: our_batch("ngram", quick, copies=False), lambda quick: our_batch(None, quick, copies=False),
        required=0.98,
    ),
    Case(
        "speculation 8 stories", "our engine without drafts", "tokens/s",
        lambda quick: our_stories("ngram", quick), lambda quick: our_stories(None, quick), required=0.98,
    ),
    Case(
        "dtype auto", "our engine in float32", "tokens/s", lambda quick: ours("50m", "auto", 1, single("50m", quick)),
        lambda quick: ours("50m", "float32", 1, single("50m", quick)), required=1.0,
    ),
    Case(
        "adapters 16", "our base alone", "tokens/s",
        lambda quick: ours("50m", "bf16", 16, mixed(16, quick), ADAPTERS, warm=ADAPTERS),
        lambda quick: ours("50m", "bf16", 16, mixed(16, quick), warm=ADAPTERS), required=0.85,
    ),
    Case(
        "ttft http", "llama.cpp's server", "s", our_server, llama_server, lower_is_better=True, required=1.0,
    ),
    Case(
        "ttft http python", "llama_cpp.server", "s", our_server, llama_cpp_python_server, lower_is_better=True,
        required=1.0,
    ),
    Case(
        "prefix", "our engine without reuse", "s",
        lambda quick: our_prefix(True, quick), lambda quick: our_prefix(False, quick), lower_is_better=True,
        required=4.0,
    ),
]  # fmt: skip

if __name__ == "__main__":
    run("serving", CASES)
