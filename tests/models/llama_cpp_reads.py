"""What llama.cpp makes of GGUF files: run by a Python that has it, jobs as JSON on stdin, answers on stdout.

A job: {"path", "texts": [...], "rows": [[ids]], "prompts": [[ids]], "steps": n}. Its answer: the ids of the texts, the
logits of every token of the rows, and the greedy continuation of the prompts.
"""

import json
import sys

import llama_cpp
import numpy as np

F32 = 0


def answer(job):
    # Keys and values in float32 too: half precision would be llama.cpp's own rounding, not the file's.
    model = llama_cpp.Llama(
        job["path"], n_ctx=job.get("context", 128), n_threads=1, logits_all=True, verbose=False, type_k=F32, type_v=F32,
        flash_attn=False,
    )  # fmt: skip
    found = {"texts": [model.tokenize(text.encode(), add_bos=False, special=False) for text in job.get("texts", [])]}
    found["rows"] = []
    for row in job.get("rows", []):
        model.reset()
        model.eval(row)
        found["rows"].append(np.array(model.scores[: len(row)]).tolist())
    found["prompts"] = []
    for prompt in job.get("prompts", []):
        ids = []
        for token in model.generate(prompt, temp=0.0, top_k=1, reset=True):
            ids.append(int(token))
            if len(ids) == job["steps"]:
                break
        found["prompts"].append(ids)
    metadata = model.metadata
    found["template"] = metadata.get("tokenizer.chat_template")
    found["marks"] = [model.token_bos(), model.token_eos()]
    return found


print(json.dumps([answer(job) for job in json.load(sys.stdin)]))
