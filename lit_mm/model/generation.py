"""What decides an answer's tokens: greedy decoding, or the settings that the LLM comes with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal, cast

from transformers import GenerationConfig, PreTrainedModel

Decoding = Literal["greedy", "own"]


def all_end_ids(llm: PreTrainedModel, further: Sequence[int] = ()) -> list[int]:
    """Token ids that end an answer: the LLM's own, and further ones.

    Raises:
        ValueError: There are none.
    """
    own = cast(GenerationConfig, llm.generation_config).eos_token_id
    own = own if isinstance(own, list) else [own] if own is not None else []
    if not (ends := sorted({*further, *own})):
        raise ValueError("neither the caller nor the LLM's generation config names a token that ends an answer")
    return ends


@contextmanager
def settings(llm: PreTrainedModel, decoding: Decoding, **chosen: Any) -> Iterator[GenerationConfig]:
    """The settings of `generate`, and meanwhile an LLM that has none of its own: transformers would take from
    there what a greedy answer leaves unset, such as a repetition penalty, banned n-grams or beams."""
    own = cast(GenerationConfig, llm.generation_config)
    config = deepcopy(own) if decoding == "own" else GenerationConfig(do_sample=False)
    config.update(**chosen, max_length=None, num_return_sequences=1, return_dict_in_generate=False)
    llm.generation_config = GenerationConfig()
    try:
        yield config
    finally:
        llm.generation_config = own


def described(llm: PreTrainedModel, decoding: Decoding) -> str:
    """In words, with what it takes or leaves of the LLM's generation_config."""
    differs = cast(GenerationConfig, llm.generation_config).to_diff_dict()
    nothing = ("transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
    changes = [n for n, value in differs.items() if value is not False and n not in nothing and n[0] != "_"]
    own = ", ".join(f"{name} {differs[name]}" for name in changes)
    if decoding == "own":
        return f"as the LLM's generation_config says ({own or 'greedily'})"
    return f"greedily, without {own} of the LLM's generation_config" if own else "greedily"
