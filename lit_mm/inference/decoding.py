"""How an answer's tokens are chosen: transformers' settings, each honored or refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from numbers import Integral, Real
from typing import Any, Literal, cast

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation import logits_process as processes

Decoding = Literal["greedy", "own"]

ALWAYS = ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "min_new_tokens", "suppress_tokens")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
BEAMS = ("num_beams", "length_penalty", "early_stopping")
HONORED = {*ALWAYS, *SAMPLING, *BEAMS, "do_sample", "max_new_tokens", "stop_strings"}
WHOLE = {"max_new_tokens", "min_new_tokens", "num_beams", "top_k", "no_repeat_ngram_size"}
NUMBERS = {"temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty"}
NO_CHOICE = {"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "use_cache"}
NO_CHOICE |= {"cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory"}
NO_CHOICE |= {"compile_config", "disable_compile", "continuous_batching_config", "transformers_version"}
NO_CHOICE |= {"num_return_sequences", "return_dict_in_generate"}
OUTPUTS = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")
NO_CHOICE |= {*OUTPUTS}
"""Settings that do not choose among answers: ids of special tokens, and how answers are computed and returned."""
NEUTRAL: dict[str, Any] = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0, "num_beams": 1}
NEUTRAL |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0, "length_penalty": 1.0}
NEUTRAL |= {"num_beam_groups": 1, "diversity_penalty": 0.0, "guidance_scale": 1.0, "encoder_repetition_penalty": 1.0}
NEUTRAL |= {"encoder_no_repeat_ngram_size": 0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "min_length": 0}
NEUTRAL |= {"penalty_alpha": 0.0}
"""Values of settings that change nothing; neither do None and False."""


def settings(llm: PreTrainedModel, decoding: Decoding = "greedy", **chosen: Any) -> GenerationConfig:
    """The settings of a call.

    Args:
        llm: A causal LM.
        decoding: greedy starts from the most likely token each time, whatever the LLM's generation_config
            says; own starts from the LLM's generation_config.
        chosen: Settings of transformers' GenerationConfig that replace those: max_new_tokens,
            min_new_tokens, do_sample, temperature, top_k, top_p, min_p, typical_p, repetition_penalty,
            no_repeat_ngram_size, bad_words_ids, suppress_tokens, num_beams, length_penalty, early_stopping,
            stop_strings. A temperature above 0 or another sampling setting means do_sample, unless that
            is given; temperature 0 means greedy.

    Raises:
        ValueError: A setting that is not honored here, of another type, or not in its range.
    """
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if unknown := sorted(set(chosen) - HONORED):
        raise ValueError(f"{unknown[0]}: not a setting of answers, expected some of {', '.join(sorted(HONORED))}")
    check_types(chosen)
    if isinstance(chosen.get("stop_strings"), str):
        chosen["stop_strings"] = [chosen["stop_strings"]]
    if chosen.get("temperature") == 0:
        chosen = {"do_sample": False, **{name: value for name, value in chosen.items() if name not in SAMPLING}}
    elif any(chosen.get(name) is not None for name in SAMPLING):
        chosen.setdefault("do_sample", True)
    own = cast(GenerationConfig, llm.generation_config)
    config = deepcopy(own) if decoding == "own" else GenerationConfig(do_sample=False)
    config.update(**dict.fromkeys(OUTPUTS))
    config.update(**chosen, max_length=None, num_return_sequences=1, return_dict_in_generate=False)
    if config.do_sample and config.top_k is None:
        config.top_k = 50 if decoding == "own" else 0  # transformers' own default
    check_settings(config)
    return config


def check_types(chosen: dict[str, Any]) -> None:
    """Check that chosen settings are numbers and texts where those are expected.

    Raises:
        ValueError: One is not.
    """
    for name in WHOLE & set(chosen):
        if not isinstance(chosen[name], Integral) or isinstance(chosen[name], bool):
            raise ValueError(f"{name} {chosen[name]!r:.80}: expected a whole number")
    for name in NUMBERS & set(chosen):
        if not isinstance(chosen[name], Real) or isinstance(chosen[name], bool):
            raise ValueError(f"{name} {chosen[name]!r:.80}: expected a number")
    stops = chosen.get("stop_strings", [])
    if any(not stop or not isinstance(stop, str) for stop in ([stops] if isinstance(stops, str) else stops)):
        raise ValueError(f"stop_strings {stops!r:.80}: expected texts of one character at least")


def check_settings(config: GenerationConfig) -> None:
    """Check that every setting is honored here and in its range.

    Raises:
        ValueError: One is not.
    """
    given = {name: value for name, value in config.to_diff_dict().items() if not name.startswith("_")}
    for name, value in given.items():
        neutral = value is None or value is False or value == NEUTRAL.get(name)
        if name not in HONORED | NO_CHOICE and not neutral:
            raise ValueError(f"generation_config: {name} {value!r} is not supported; set model.decoding to greedy")
    ranges = {
        "max_new_tokens": (1, 1e6),
        "min_new_tokens": (0, 1e6),
        "num_beams": (1, 100),
        "temperature": (1e-6, 100),
        "top_p": (0, 1),
        "min_p": (0, 1),
        "repetition_penalty": (1e-6, 100),
    }
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"{name} {value}: expected {least:g} to {most:g}")


def processors(config: GenerationConfig, ends: Sequence[int], device: torch.device) -> LogitsProcessorList:
    """What changes the logits before a token is chosen, in transformers' order."""
    makers: dict[str, Any] = {
        "repetition_penalty": processes.RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": processes.NoRepeatNGramLogitsProcessor,
        "bad_words_ids": lambda words: processes.NoBadWordsLogitsProcessor(words, list(ends)),
        "min_new_tokens": lambda tokens: processes.MinNewTokensLengthLogitsProcessor(
            0, tokens, list(ends), str(device)
        ),
        "suppress_tokens": lambda tokens: processes.SuppressTokensLogitsProcessor(tokens, str(device)),
        "temperature": processes.TemperatureLogitsWarper,
        "top_k": processes.TopKLogitsWarper,
        "top_p": processes.TopPLogitsWarper,
        "min_p": processes.MinPLogitsWarper,
        "typical_p": processes.TypicalLogitsWarper,
    }
    names = ALWAYS + (SAMPLING if config.do_sample else ())
    values = {name: getattr(config, name) for name in names}
    chosen = {name: value for name, value in values.items() if value is not None and value != NEUTRAL.get(name)}
    return LogitsProcessorList([makers[name](value) for name, value in chosen.items()])


def end_ids(llm: PreTrainedModel, further: Sequence[int] = ()) -> list[int]:
    """Token ids that end an answer: the LLM's own, and further ones.

    Raises:
        ValueError: There are none.
    """
    own = cast(GenerationConfig, llm.generation_config).eos_token_id
    own = own if isinstance(own, list) else [own] if own is not None else []
    if not (ends := sorted({*further, *own})):
        raise ValueError("neither the caller nor the LLM's generation config names a token that ends an answer")
    return ends


def described(llm: PreTrainedModel, decoding: Decoding) -> str:
    """How answers are generated, in words, and which settings of the LLM's generation_config are used or ignored."""
    differs = cast(GenerationConfig, llm.generation_config).to_diff_dict()
    changes = [n for n, value in differs.items() if value is not False and n not in NO_CHOICE and n[0] != "_"]
    own = ", ".join(f"{name} {differs[name]}" for name in changes)
    if decoding == "own":
        return f"as the LLM's generation_config says ({own or 'greedily'})"
    return f"greedily, without {own} of the LLM's generation_config" if own else "greedily"
