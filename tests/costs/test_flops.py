"""Costs against torch's own counter on `meta`, against published figures and against arithmetic."""

from dataclasses import replace
from math import prod

import pytest
import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, Qwen2Config

from lit_mm.costs.flops import (
    GROUPED,
    Costs,
    EncoderCosts,
    Flops,
    LanguageCosts,
    ModelFlops,
    causal_pairs,
    count_parameters,
    nested_segments,
    on_meta,
)
from lit_mm.costs.llm_shapes import published
from lit_mm.model.attention import BranchLayout
from lit_mm.model.batch import Batch, Images
from lit_mm.model.encoder import ConvNeXtEncoder, ExtraStage, TimmEncoder
from lit_mm.model.llm import PACKED
from lit_mm.model.packing import pack
from lit_mm.model.projector import MatryoshkaProjector
from lit_mm.model.vlm import MatryoshkaVLM
from lit_mm.training.parts import LoRA, add_adapters
from tests.helpers.batches import SCALES, batch_of, packed, random_samples
from tests.helpers.models import CLASSES, EXTRA, packing_vlm, packing_vlm64, tiny_vlm
from tests.helpers.videos import TIMES, random_videos, video_batch_of

SQUARES = [(768, 768), (768, 1024), (1024, 1024), (1536, 1536)]
QWEN2 = Qwen2Config(  # Qwen2-0.5B
    hidden_size=896,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    intermediate_size=4864,
    vocab_size=151936,
    tie_word_embeddings=True,
)
LLMS = {
    "Llama-7B": published("lmsys/vicuna-7b-v1.5"),
    "Qwen2-0.5B": QWEN2,
    "Qwen3-0.6B": published("Qwen/Qwen3-0.6B"),
    "SmolLM2-135M": published("HuggingFaceTB/SmolLM2-135M-Instruct"),
}


def convnext(stages=1):
    with torch.device("meta"):
        return ConvNeXtEncoder(extra_stages=[ExtraStage()] * stages)


def llm_of(config, **options):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **options)


def vlm_of(encoder, config, scales):
    with torch.device("meta"):
        projector = MatryoshkaProjector(encoder.num_features, config.hidden_size, scales)
    return MatryoshkaVLM(encoder, projector, llm_of(config))


def freeze(module: nn.Module, but=lambda name: False) -> None:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(but(name))


def encoder_flops(encoder, size, checkpointed=False) -> Flops:
    return EncoderCosts(encoder, checkpointed).image(size)


def counted(encoder, size) -> Flops:
    """An encoder on the whole image, as torch counts its operators."""
    return Flops(*counter(lambda: encoder(torch.empty(1, 3, *size, device="meta")).sum()))


def counter(run) -> tuple[int, int]:
    """Forward and backward FLOPs of what returns a scalar, as torch counts them."""
    in_place = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * prod(a) * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as forward:
        total = run()
    if not total.requires_grad:
        return without_rotary(forward), 0
    with FlopCounterMode(display=False, custom_mapping=GROUPED) as backward:
        total.backward()
    return without_rotary(forward), without_rotary(backward)


def without_rotary(own: FlopCounterMode) -> int:
    """transformers 5.17 multiplies positions and frequencies as matrices, 5.23 element by element."""
    modules = own.get_flop_counts().items()
    return own.get_total_flops() - sum(sum(flops.values()) for name, flops in modules if name.endswith("rotary_emb"))


@pytest.mark.parametrize(
    ("size", "whole", "fifth"),
    list(zip(SQUARES, [944.0, 1258.6, 1678.2, 3775.9], [136.2, 181.5, 242.1, 544.6], strict=True)),
)
def test_convnext_costs_what_the_paper_says(size, whole, fifth):
    """PAPERS, section 1: GFLOPs at four sizes, to the digit."""
    five, four = encoder_flops(convnext(), size).forward, encoder_flops(convnext(0), size).forward
    assert round(five / 1e9, 1) == whole
    assert round((five - four) / 1e9, 1) == fifth


@pytest.mark.parametrize("size", [(768, 768), (1024, 1024), (1536, 1536), (1536, 1100)])
def test_convnext_equals_the_counter(size):
    encoder = convnext()
    assert encoder_flops(encoder, size) == counted(encoder, size)
    assert encoder_flops(encoder, (1536, 1100)) == encoder_flops(encoder, (1536, 1152))


@pytest.mark.parametrize(
    ("backbone", "overrides"),
    [
        ("convnextv2_atto", {}),  # response norm instead of layer scale
        ("convnext_atto_ols", {"kernel_sizes": 3}),  # a stem of several convolutions
        ("convnext_atto", {"output_stride": 16, "patch_size": 2}),  # dilated
    ],
)
def test_other_convnexts_equal_the_counter(backbone, overrides):
    with torch.device("meta"):
        encoder = ConvNeXtEncoder(backbone, [ExtraStage(1, 24)], overrides=overrides, drop_path=0.1)
    same_with_checkpoints(encoder, (192, 128))


def same_with_checkpoints(encoder, size):
    plain = encoder_flops(encoder, size)
    assert plain == counted(encoder, size)
    encoder.set_grad_checkpointing()
    again = counted(encoder, size)
    encoder.set_grad_checkpointing(False)
    assert encoder_flops(encoder, size, checkpointed=True) == replace(plain, recompute=again.backward - plain.backward)


@pytest.mark.parametrize("first", [0, 3, 5])
def test_frozen_stages_cost_no_backward_pass(first):
    """ConvLLaVA trains stage 5 alone, then all from stage 3 on."""
    encoder = convnext()
    freeze(encoder, lambda name: any(f"stages.{stage}." in name for stage in range(first - 1, 5)))
    if not first:
        freeze(encoder)
        assert encoder_flops(encoder, (768, 768)).backward == 0
    same_with_checkpoints(encoder, (768, 768))


def test_clip_costs_what_torch_counts_and_leaves_out_the_last_block():
    """LLaVA takes the last but one of 24 blocks. timm's table says 191.11 GMACs for ViT-L/14 at 336
    with all 24 and the embedding."""
    with torch.device("meta"):
        encoder, whole = TimmEncoder(), TimmEncoder(layer=-1)
    same_with_checkpoints(encoder, (336, 336))
    assert encoder_flops(whole, (336, 336)).forward / 2e9 == pytest.approx(191.11, rel=2e-3)
    patches = 2 * 576 * 1024 * 3 * 14 * 14
    blocks = [encoder_flops(each, (336, 336)).forward - patches for each in (encoder, whole)]
    assert blocks[0] * 24 == blocks[1] * 23


@pytest.mark.parametrize("first", [12, 23])
def test_frozen_vit_blocks_cost_no_backward_pass(first):
    with torch.device("meta"):
        encoder = TimmEncoder()
    freeze(encoder, lambda name: any(f"blocks.{block}." in name for block in range(first, 24)))
    same_with_checkpoints(encoder, (336, 336))


def test_who_asks_first_changes_nothing():
    """Validation asks without gradients, for sizes that training has not seen."""
    with torch.device("meta"):
        encoder = TimmEncoder("resnet18", layer=-1)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            asked = encoder_flops(encoder, (64, 64))
        assert asked == counted(encoder, (64, 64))
    assert asked.backward > asked.forward


@pytest.mark.parametrize(
    ("backbone", "size", "gmacs"),
    [("resnet18", 224, 1.82), ("regnety_002", 224, 0.2), ("eva02_tiny_patch14_336", 336, 4.68)],
)
def test_other_backbones_are_counted(backbone, size, gmacs):
    """GMACs of timm's results tables."""
    with torch.device("meta"):
        encoder = TimmEncoder(backbone, layer=-1)
    flops = encoder_flops(encoder, (size, size), checkpointed=True)
    assert flops.forward / 2e9 == pytest.approx(gmacs, rel=0.03)
    assert 1.9 * flops.forward < flops.backward < 2.1 * flops.forward
    assert 0 < flops.recompute <= flops.forward


def test_grouped_convolutions_cost_their_groups():
    """As many FLOPs as the groups apart, where torch's own formula counts more; without groups its."""
    whole, part = (nn.Conv2d(c, 2 * c, 3, 2, groups=c // 4) for c in (8, 4))
    plain = counter(lambda: part(torch.randn(2, 4, 9, 9, requires_grad=True)).sum())
    assert counter(lambda: whole(torch.randn(2, 8, 9, 9, requires_grad=True)).sum()) == (2 * plain[0], 2 * plain[1])
    with FlopCounterMode(display=False) as own:
        part(torch.randn(2, 4, 9, 9, requires_grad=True)).sum().backward()
    assert own.get_total_flops() == sum(plain)
    up = nn.ConvTranspose2d(4, 8, 3, 2)
    with FlopCounterMode(display=False) as own:
        up(torch.randn(2, 4, 9, 9, requires_grad=True)).sum().backward()
    assert own.get_total_flops() == sum(counter(lambda: up(torch.randn(2, 4, 9, 9, requires_grad=True)).sum()))


def hidden_of(llm, embeddings):
    """As the vlm calls an LLM: a mask of four dimensions keeps transformers from building its own."""
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeddings.device)
    return llm.base_model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).last_hidden_state


@pytest.mark.parametrize("name", LLMS)
def test_llms_equal_the_counter(name):
    """It counts every pair of attention, causal or not."""
    llm, length, labels = llm_of(LLMS[name]), 700, 64
    embeddings = torch.empty(1, length, LLMS[name].hidden_size, device="meta", requires_grad=True)
    found = counter(lambda: llm.get_output_embeddings()(hidden_of(llm, embeddings)[:, :labels]).sum())
    costs = LanguageCosts(llm, checkpointed=False)
    total = costs.flops(length, length**2, labels, gradient=True).total
    assert (total.forward, total.backward) == found
    unseen = length * (length - 1) // 2
    attention = (
        4 * LLMS[name].num_hidden_layers * LLMS[name].num_attention_heads * llm.model.layers[0].self_attn.head_dim
    )
    causal = costs.flops(length, causal_pairs(length), labels, gradient=True).total
    assert total.training - causal.training == 3 * attention * unseen


@pytest.mark.parametrize(
    ("trains", "kind"),
    [("all", kind) for kind in sorted(PACKED)]
    + [("above", kind) for kind in ("cohere", "llama", "olmo", "olmo2", "phi3")]
    + [("below", "llama"), ("below", "olmo"), ("nothing", "llama")],
)
def test_every_packed_llm_equals_the_counter(trains, kind):
    """With and without checkpointing, frozen in part, with and without a gradient from before."""
    llm = on_meta(tiny_vlm(source=CLASSES[kind], **EXTRA.get(kind, {})).llm).train()
    if trains != "all":
        freeze(llm, lambda name: {"above": "layers.1." in name, "below": "layers.0." in name}.get(trains, False))
    for checkpointed in (False, True):
        if checkpointed:
            llm.gradient_checkpointing_enable({"use_reentrant": False})
        for gradient in (False, True):
            inputs = torch.empty(1, 50, 32, device="meta", requires_grad=gradient or trains == "all")
            found = counter(lambda: llm.get_output_embeddings()(hidden_of(llm, inputs)).sum())  # noqa: B023
            total = LanguageCosts(llm, checkpointed).flops(50, 50**2, 50, gradient).total
            assert (total.forward, total.backward + total.recompute) == found
            assert bool(total.recompute) == (checkpointed and total.backward > 0)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_adapters_cost_their_own_weights_gradients_only(checkpointed, gradient):
    """LoRA as the recipes inject it, on an image's tokens and on a text alone."""
    llm = tiny_vlm().llm.train()
    add_adapters(llm, LoRA(r=4))
    if checkpointed:
        llm.gradient_checkpointing_enable({"use_reentrant": False})
    llm = on_meta(llm)
    inputs = torch.empty(1, 50, 32, device="meta", requires_grad=gradient)
    found = counter(lambda: llm.get_output_embeddings()(hidden_of(llm, inputs)).sum())
    total = LanguageCosts(llm, checkpointed).flops(50, 50**2, 50, gradient).total
    assert (total.forward, total.backward + total.recompute) == found


class Packed(nn.Linear):
    """Two weights a byte, as bitsandbytes keeps 4 bits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


def test_quantized_weights_cost_what_the_whole_ones_do():
    llm = tiny_vlm().llm.requires_grad_(False)
    plain = LanguageCosts(llm, False).flops(50, 50**2, 50, gradient=True)
    for layer in llm.model.layers:
        layer.mlp.up_proj = Packed(layer.mlp.up_proj)
    assert LanguageCosts(llm, False).flops(50, 50**2, 50, gradient=True) == plain


def test_the_llms_costs_follow_from_its_parameters():
    """A forward pass of a dense LLM: 2 FLOPs for each weight of its layers, a token."""
    config = LLMS["Llama-7B"]
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    total = LanguageCosts(llm_of(config), False).flops(1, 0, 0, False).total
    assert total.forward == 2 * weights


@pytest.mark.parametrize(("tokens", "teraflops"), [(576, 8.0), (144, 2.2), (36, 0.9), (9, 0.5), (1, 0.4)])
def test_prefill_of_a_7b_is_what_m3_states(tokens, teraflops):
    """PAPERS, section 2, by a roofline model without the encoder; with about 30 tokens of text."""
    costs = LanguageCosts(llm_of(LLMS["Llama-7B"]), False)
    length = tokens + 30
    assert costs.flops(length, causal_pairs(length), 1, False).total.forward / 1e12 == pytest.approx(
        teraflops, abs=0.07
    )


@pytest.mark.parametrize("kind", ["llama", "gemma", "phi3"])
def test_cache_and_decoding_are_those_of_a_real_cache(kind):
    llm = tiny_vlm(source=CLASSES[kind], **EXTRA.get(kind, {})).llm
    cache = DynamicCache(config=llm.config)
    with torch.no_grad():
        llm(torch.zeros(1, 37, dtype=torch.long), past_key_values=cache)
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    costs = LanguageCosts(llm, False)
    assert 37 * costs.cached * 4 == stored
    meta = on_meta(llm)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")
    places = {"cache_position": torch.tensor([37]), "position_ids": torch.tensor([[37]], device="meta")}
    mask = torch.ones(1, 1, 1, 38, dtype=torch.bool, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as found:
        meta(torch.zeros(1, 1, dtype=torch.long, device="meta"), mask, past_key_values=cache, **places)
    assert costs.flops(1, causal_pairs(1, before=37), 1, False).total.forward == without_rotary(found)


def test_llms_that_do_not_attend_to_all_are_refused():
    with pytest.raises(ValueError, match="costs of mistral with these layers are not known"):
        Costs(tiny_vlm(source="MistralConfig", sliding_window=8))


TRAINS = {
    "everything": lambda name: True,
    "projector and stage 5": lambda name: name.startswith("projector") or "stages.4." in name,
    "projector and llm": lambda name: not name.startswith("encoder"),
    "llm": lambda name: name.startswith("llm"),
    "projector": lambda name: name.startswith("projector"),
}


@pytest.mark.parametrize("packing", ["packed", "sequential"])
@pytest.mark.parametrize("trains", TRAINS)
def test_a_step_costs_what_the_counter_says_of_the_real_step(trains, packing):
    """Encoder, projector, LLM over a packed sequence with its own attention, head and loss, both ways."""
    vlm = packing_vlm()
    freeze(vlm, TRAINS[trains])
    batch = packed(batch_of(*random_samples(0)), packing)
    real = counter_of_step(vlm, batch)
    for own in batch.packed:
        assert own.counts.pairs < computed_pairs(own.layout) < 4 * own.counts.pairs  # needed; counted as full squares
        own.counts.pairs = computed_pairs(own.layout)
    total = Costs(vlm).step(batch).total
    assert total.training + total.recompute == sum(real)  # the head's gradients are made in the forward pass
    assert bool(total.recompute) == (packing == "sequential")


def counter_of_step(vlm, batch):
    meta = apply_to_collection(batch, Tensor, Tensor.to, "meta")
    return counter(lambda: on_meta(vlm)(meta).loss)


def computed_pairs(layout: BranchLayout) -> int:
    """What the branches' attention computes in squares, causal or not, filling included."""
    return sum(group.count * group.queries * group.keys for group in layout.groups)


def test_needed_pairs_are_those_that_a_mask_over_the_row_shows():
    batch = packed(batch_of(*random_samples(1)), attention="flex")
    [row] = batch.packed
    own, prefix = row.layout.segment, row.layout.prefix
    seen = (own[None] == own[:, None]) | (own[None] == prefix[:, None])
    assert row.counts.pairs == int(seen.tril().sum())


def test_a_row_costs_its_branches_less_the_shared_prefix():
    """As much as each branch with the prefix alone, the prefix counted once."""
    costs = Costs(tiny_vlm())
    prefix, text, scales = 35, 64, [576, 144, 36, 9, 1]
    row = costs.sequence(nested_segments(prefix, text, scales), labels=0)
    alone = [prefix + scale + text for scale in scales]
    expected = sum((costs.text(n, causal_pairs(n), 0) for n in alone), ModelFlops())
    shared = costs.text(prefix, causal_pairs(prefix), 0) * (len(scales) - 1)
    assert row + shared == expected
    ids, labels = torch.tensor([1] * prefix + [-200] + [2] * text), torch.full((100,), -100)
    [real] = pack(Batch(Images([], torch.arange(1)), [ids], [labels], torch.tensor([0]), [1 / 5] * 5), scales)
    assert (len(real.input_ids), real.counts.pairs) == (
        sum(length for *_, length in nested_segments(prefix, text, scales)),
        sum(length * before + causal_pairs(length) for _, before, _, length in nested_segments(prefix, text, scales)),
    )


def test_a_batch_without_rows_costs_every_level_apart():
    costs, mixed = Costs(tiny_vlm()), random_samples(0)
    batch = packed(batch_of(*mixed), "padded")
    step, expected = costs.step(batch), ModelFlops()
    for scale in SCALES:
        for ids, labels, images in mixed:
            length = len(ids) + len(images) * (scale - 1)
            expected += costs.text(length, causal_pairs(length), sum(t != -100 for t in labels[1:]))
    assert (step.llm, step.head) == (expected.llm, expected.head)
    assert step.encoder == sum((costs.image(i.shape[1:]).encoder for *_, images in mixed for i in images), Flops())


def test_a_video_step_costs_what_the_counter_says():
    vlm = packing_vlm64(time_scales=TIMES)
    batch = video_batch_of(random_videos(2))
    real = counter_of_step(vlm, batch)
    loop = Costs(vlm).step(replace(batch, packed=[]))
    needed = Costs(vlm).step(batch)
    assert needed.encoder == loop.encoder
    assert needed.total.training < loop.total.training
    batch.packed[0].counts.pairs = computed_pairs(batch.packed[0].layout)
    total = Costs(vlm).step(batch).total
    assert total.training == sum(real)


@pytest.mark.parametrize("packing", ["packed", "sequential"])
def test_a_step_is_counted_without_reading_a_tensor(packing):
    """On `meta` nothing can be read: what would make a GPU wait ends in an error there."""
    costs, batch = Costs(tiny_vlm()), packed(batch_of(*random_samples(0)), packing)
    assert costs.step(apply_to_collection(batch, Tensor, Tensor.to, "meta")) == costs.step(batch)


def test_an_answer_costs_its_prompt_and_its_tokens():
    """Generation token by token: each forward pass over what is new, with all before in the cache."""
    costs = Costs(tiny_vlm())
    answer = costs.answer((64, 64), 16, text=10, new_tokens=4)
    without = costs.answer((64, 64), 0, text=10, new_tokens=4, images=0)
    image = costs.image((64, 64)).total.forward
    passes = [costs.text(26, causal_pairs(26), 1)] + [costs.text(1, length, 1) for length in (27, 28, 29)]
    assert answer.total == image + sum(each.total.forward for each in passes)
    assert answer.decode_per_token == costs.text(1, 28, 1).total.forward
    assert (answer.visual_tokens, answer.prompt_tokens, without.prompt_tokens) == (16, 26, 10)
    assert answer.cache == 26 * costs.language.cached * 2
    assert without.total == sum(
        costs.text(n, pairs, 1).total.forward for n, pairs in [(10, 55), (1, 11), (1, 12), (1, 13)]
    )
    assert costs.answer((64, 64), 16, 10).decode_per_token == 0


def test_every_image_or_frame_is_encoded():
    costs = Costs(tiny_vlm())
    clip = costs.answer((32, 32), 8, text=10, images=4)  # four frames, averaged in pairs, four tokens a pair
    assert (clip.visual_tokens, clip.prefill.encoder) == (8, costs.image((32, 32)).encoder * 4)
    assert clip.prefill.llm == costs.text(18, causal_pairs(18), 1).llm


def test_a_fixed_image_size_is_kept():
    costs = Costs(vlm_of(TimmEncoder("vit_tiny_patch16_224"), QWEN2, [196, 1]))
    assert costs.image((224, 224)).encoder.forward > 0
    with pytest.raises(ValueError, match="takes images of 224×224 only, found 224×448"):
        costs.image((224, 448))


def test_parameters_by_part():
    vlm = vlm_of(convnext(), published("Qwen/Qwen3-0.6B"), [144, 36, 9, 1])
    costs, width = Costs(vlm), 1024
    assert costs.parameters["llm"] == count_parameters(vlm.llm, trained=True) == 596_049_920
    assert costs.parameters["projector"] == 3072 * width + width + width**2 + width
    assert round(costs.parameters["encoder"] / 1e6, 2) == 669.16


def test_costs_need_no_weights_and_keep_none():
    vlm = tiny_vlm()
    costs = Costs(vlm)
    before = costs.image((64, 64))
    kept = [*costs.encoder.parameters(), *costs.encoder.buffers()]
    assert all(tensor.is_meta for tensor in kept)
    assert Costs(on_meta(vlm)).image((64, 64)) == before
    assert not any(p.is_meta for p in vlm.parameters())
