"""The chat template of an exported model: it takes messages with parts, and ends a prompt exactly as training did."""

from __future__ import annotations

from lit_mm.data.chat import STAND_IN

BEFORE = (
    "{%- set ns = namespace(plain=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{%- set ns.plain = ns.plain + [message] -%}"
    "{%- else -%}"
    "{%- set ns.text = '' -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}"
    "{%- set ns.text = ns.text + '<image>\\n' -%}"
    "{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}"
    "{%- set ns.text = ns.text + part['text'] -%}"
    "{%- endfor -%}"
    "{%- set ns.plain = ns.plain + [{'role': message['role'], 'content': ns.text}] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set asked, messages = add_generation_prompt, ns.plain -%}"
    "{%- if asked -%}"
    f"{{%- set messages = messages + [{{'role': 'assistant', 'content': '{STAND_IN}'}}] -%}}"
    "{%- set add_generation_prompt = false -%}"
    "{%- endif -%}"
    "{%- set rendered %}"
)
AFTER = f"{{% endset %}}{{{{ rendered.split('{STAND_IN}')[0].removesuffix(' ') if asked else rendered }}}}"
"""A prompt is what stands before the answer in a whole conversation, without a last space: see `Conversation`."""


def for_parts(template: str) -> str:
    """A template whose messages may also be lists of parts, as transformers' processors and vLLM give them. Images of a
    message come first, each with a newline; a text may have markers `<image>` instead."""
    return BEFORE + template + AFTER


def for_texts(template: str) -> str:
    """The template that `for_parts` was given; any other as it is."""
    return template.removeprefix(BEFORE).removesuffix(AFTER)
