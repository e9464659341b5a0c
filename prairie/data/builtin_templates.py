"""Chat templates that are built in, as jinja; `{% generation %}` marks what an assistant says.

A model's folder keeps the template that it was made with, and adapters know it by its hash: a template may get a new
name or a new text here, and models that exist keep theirs. Not here: rendering (`chat_template`).
"""

from __future__ import annotations

_TOOLS_OF_CHATML = (
    "# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n"
    "You are provided with function signatures within <tools></tools> XML tags:\\n<tools>"
)
_CALLS_OF_CHATML = (
    "\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\\n<tool_call>\\n"
    '{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call>'
)

PLAIN_CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}"
    "{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""ChatML before it knew tools: models that were made with it keep it."""

BUILTIN: dict[str, str] = {
    # ChatML; tools and calls as Hermes and Qwen write them, thoughts between <think> marks.
    "chatml": (
        "{%- if tools -%}"
        "{{- '<|im_start|>system\\n' -}}"
        "{%- if messages[0]['role'] == 'system' -%}{{- messages[0]['content'] + '\\n\\n' -}}{%- endif -%}"
        f'{{{{- "{_TOOLS_OF_CHATML}" -}}}}'
        "{%- for tool in tools -%}{{- '\\n' + tool | tojson -}}{%- endfor -%}"
        f'{{{{- "{_CALLS_OF_CHATML}<|im_end|>\\n" -}}}}'
        "{%- endif -%}"
        "{%- for message in messages -%}"
        "{%- if not (tools and loop.first and message['role'] == 'system') -%}"
        "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
        "{%- if message['role'] == 'assistant' -%}"
        "{%- generation -%}"
        "{%- if message['reasoning_content'] -%}"
        "{{- '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' -}}"
        "{%- endif -%}"
        "{{- message['content'] -}}"
        "{%- for call in message['tool_calls'] or [] -%}"
        "{%- if message['content'] or not loop.first -%}{{- '\\n' -}}{%- endif -%}"
        "{{- '<tool_call>\\n{\"name\": ' + call['function']['name'] | tojson -}}"
        "{{- ', \"arguments\": ' + call['function']['arguments'] | tojson + '}\\n</tool_call>' -}}"
        "{%- endfor -%}"
        "{{- '<|im_end|>' -}}"
        "{%- endgeneration -%}"
        "{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}"
        "{{- '\\n' -}}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    ),
    "llama3": (
        "{{- bos_token -}}"
        "{%- for message in messages -%}"
        "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}"
        "{%- if message['role'] == 'assistant' -%}"
        "{%- generation -%}{{- message['content'] | trim + '<|eot_id|>' -}}{%- endgeneration -%}"
        "{%- else -%}{{- message['content'] | trim + '<|eot_id|>' -}}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}"
        "{%- endif -%}"
    ),
    "zephyr": (
        "{%- for message in messages -%}"
        "{{- '<|' + message['role'] + '|>\\n' -}}"
        "{%- if message['role'] == 'assistant' -%}"
        "{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
        "{%- else -%}{{- message['content'] + eos_token -}}{%- endif -%}"
        "{{- '\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"
    ),
    # Mistral 7B Instruct v0.2; a system message stands before the first question.
    "mistral": (
        "{{- bos_token -}}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'assistant' -%}"
        "{%- generation -%}{{- ' ' + message['content'] + eos_token -}}{%- endgeneration -%}"
        "{%- elif message['role'] == 'user' -%}"
        "{%- if loop.index0 == 1 and messages[0]['role'] == 'system' -%}"
        "{{- '[INST] ' + messages[0]['content'] + '\\n\\n' + message['content'] + ' [/INST]' -}}"
        "{%- else -%}{{- '[INST] ' + message['content'] + ' [/INST]' -}}{%- endif -%}"
        "{%- elif message['role'] != 'system' or not loop.first or loop.last -%}"
        "{{- raise_exception('only user and assistant turns after a first system turn') -}}"
        "{%- endif -%}"
        "{%- endfor -%}"
    ),
    # Gemma 3; a system message stands before the first question.
    "gemma": (
        "{{- bos_token -}}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'assistant' -%}"
        "{{- '<start_of_turn>model\\n' -}}"
        "{%- generation -%}{{- message['content'] | trim + '<end_of_turn>' -}}{%- endgeneration -%}{{- '\\n' -}}"
        "{%- elif message['role'] == 'user' -%}"
        "{{- '<start_of_turn>user\\n' -}}"
        "{%- if loop.index0 == 1 and messages[0]['role'] == 'system' -%}"
        "{{- messages[0]['content'] + '\\n\\n' -}}"
        "{%- endif -%}"
        "{{- message['content'] | trim + '<end_of_turn>\\n' -}}"
        "{%- elif message['role'] != 'system' or not loop.first or loop.last -%}"
        "{{- raise_exception('only user and assistant turns after a first system turn') -}}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"
    ),
    "plain": (
        "{%- if bos_token and bos_token != eos_token -%}{{- bos_token -}}{%- endif -%}"
        "{%- for message in messages -%}"
        "{{- message['role'] | capitalize + ': ' -}}"
        "{%- if message['role'] == 'assistant' -%}"
        "{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
        "{%- else -%}{{- message['content'] -}}{%- endif -%}"
        "{{- '\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- 'Assistant: ' -}}{%- endif -%}"
    ),
}

NEEDED: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "zephyr": (),
    "mistral": (),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "plain": (),
}
"""Special tokens without which a template cannot be used."""

ENDS_BY_EOS = frozenset(["zephyr", "mistral", "plain"])
STOP_STRINGS: dict[str, tuple[str, ...]] = {"plain": ("\nUser:",)}
AS_SAID = frozenset([PLAIN_CHATML, *(BUILTIN[name] for name in ("chatml", "zephyr", "mistral", "plain"))])
"""Templates that write what is said as it stands and look at nothing of it but who speaks, where nobody calls a tool or
thinks: two such conversations of the same roles differ only in what is said."""
