"""Packed rows against the slow, obvious way of test_vlm: one sample and one scale at a time."""

from itertools import combinations

import pytest
import torch
from transformers import LlamaConfig, MambaConfig

from lit_mm.model import attention, loss
from lit_mm.model.attention import NAME
from lit_mm.model.batch import IGNORE_INDEX, IMAGE, Batch, Images
from lit_mm.model.llm import PACKED, load_config, packing_of
from lit_mm.model.packing import pack
from lit_mm.training.check import check_packing
from tests.helpers.batches import SCALES, batch_of, packed, random_samples, samples, slow_loss
from tests.helpers.models import CLASSES, EXTRA, gradients, packing_vlm64, tiny_llm, tiny_vlm, tiny_vlm64

LLMS = ["LlamaConfig", "Qwen2Config", "Qwen3Config"]


@pytest.mark.parametrize("packing", ["packed", "sequential"])
@pytest.mark.parametrize("source", LLMS)
@pytest.mark.parametrize("seed", range(3))
def test_losses_and_gradients_equal_the_slow_way(source, packing, seed):
    vlm, mixed = packing_vlm64(source=source), random_samples(seed)
    losses = vlm(packed(batch_of(*mixed), packing))
    expected = torch.stack([slow_loss(vlm, mixed, scale) for scale in SCALES])
    assert torch.allclose(losses.per_scale, expected, rtol=1e-10)
    assert torch.allclose(losses.loss, expected.mean(), rtol=1e-10)
    for fast, slow in zip(gradients(losses.loss, vlm), gradients(expected.mean(), vlm), strict=True):
        assert torch.allclose(fast, slow, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("packing", ["packed", "sequential"])
@pytest.mark.parametrize("source", LLMS)
def test_float32_agrees_to_rounding(source, packing):
    vlm, mixed = tiny_vlm(source=source), random_samples(7)
    vlm.llm.set_attn_implementation(NAME)
    losses = vlm(packed(batch_of(*mixed), packing))
    assert torch.allclose(losses.per_scale, vlm.reference(packed(batch_of(*mixed))).per_scale, rtol=1e-5)


def test_every_way_of_a_group_is_tried():
    """Long prefixes ask with a mask, short ones with the branch; both within one row."""
    batch = packed(batch_of(*(sample for seed in range(3) for sample in random_samples(seed))))
    groups = batch.packed[0].layout.groups
    assert {group.mask is None for group in groups} == {True, False}
    assert len(groups) > 3
    assert max(group.count for group in groups) > 1


def test_a_sample_moves_no_other_samples_loss_by_one_bit():
    vlm, mixed = packing_vlm64(), random_samples(3, count=6)
    before = vlm_losses(vlm, mixed)
    for changed in range(len(mixed)):
        other = [(list(ids), list(labels), list(images)) for ids, labels, images in mixed]
        ids, _, images = other[changed]
        ids[:] = [token if token == IMAGE else (token + 1) % 348 for token in ids]
        images[:] = [255 - image for image in images]
        after = vlm_losses(vlm, other)
        for number, (a, b) in enumerate(zip(before, after, strict=True)):
            assert torch.equal(a, b) == (number != changed)


def vlm_losses(vlm, mixed):
    """All losses of each sample, as one tensor a sample."""
    batch, found = packed(batch_of(*mixed)), []
    original, row = loss.cross_entropy, batch.packed[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "cross_entropy", lambda *x: found.append(original(*x)) or found[-1])
        with torch.no_grad():
            vlm(batch)
    return [torch.cat(found)[row.label_sample == number] for number in range(len(mixed))]


def test_layout_of_one_sample_by_hand():
    ids = [torch.tensor([5, 6, IMAGE, 7, 8]), torch.tensor([9, 10])]
    labels = [torch.tensor([IGNORE_INDEX, 6, IGNORE_INDEX, IGNORE_INDEX, 8]), torch.tensor([IGNORE_INDEX, 10])]
    batch = Batch(Images([], torch.arange(2)), ids, labels, torch.tensor([1]), [0.25, 0.75])
    [row] = pack(batch, [4, 1])
    assert row.input_ids.tolist() == [5, 6, 0, 0, 0, 0, 7, 8, 0, 7, 8, 9, 10]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 2, 3, 4, 0, 1]
    assert row.visual_index.tolist() == [2, 3, 4, 5, 8]
    assert row.visual_source.tolist() == [5, 6, 7, 8, 9]  # image 1 of two with 4 + 1 tokens each
    assert row.label_index.tolist() == [0, 6, 9, 11]
    assert row.labels.tolist() == [6, 8, 8, 10]
    both = [True, True]  # a prefix and a text alone count at both scales
    assert row.label_scales.tolist() == [both, [True, False], [False, True], both]
    assert row.label_sample.tolist() == [0, 0, 0, 1]


def test_sequential_lays_text_alone_out_once():
    batch = packed(batch_of(*samples()), "sequential")
    assert [2 in row.label_sample for row in batch.packed] == [True, False, False]


def test_a_row_is_as_long_as_m3s_scales_without_repetitions():
    """766 visual tokens over five scales, P prefix and T text tokens: P + 766 + 5 T positions."""
    ids, prefix, text = [torch.tensor([1] * 35 + [IMAGE] + [2] * 64)], 35, 64
    [row] = pack(Batch(Images([], torch.arange(1)), ids, ids, torch.tensor([0]), [1 / 5] * 5), [576, 144, 36, 9, 1])
    assert len(row.input_ids) == prefix + 766 + 5 * text


@pytest.mark.parametrize("per_step", [1, 2])
def test_mean_gradient_over_all_draws_is_m3s(per_step):
    vlm, batch = packing_vlm64(), batch_of(*samples())
    whole = gradients(vlm(packed(batch)).loss, vlm)
    draws = list(combinations(range(3), per_step))
    sums = [torch.zeros_like(p) for p in vlm.parameters()]
    for draw in draws:
        weights = [1 / per_step if number in draw else 0.0 for number in range(3)]
        for packing in ("packed", "sequential", "padded"):
            found = gradients(vlm(packed(batch, packing, weights)).loss, vlm)
            sums = [total + each / len(draws) / 3 for total, each in zip(sums, found, strict=True)]
    for total, expected in zip(sums, whole, strict=True):
        assert torch.allclose(total, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_computes_the_same_losses():
    """Forward only: on a CPU flex_attention has no backward."""
    vlm, mixed = packing_vlm64(), random_samples(0)
    with torch.no_grad():
        fast, slow = vlm(packed(batch_of(*mixed), attention="flex")), vlm(packed(batch_of(*mixed)))
    assert torch.allclose(fast.per_scale, slow.per_scale, rtol=1e-10)


UNPACKED = {
    "MistralConfig": {"sliding_window": 8},
    "Phi3Config": {"sliding_window": 8, "pad_token_id": 0},
    "Starcoder2Config": {"sliding_window": 8},
    "Qwen2Config": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "Qwen3Config": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "Gemma2Config": {"head_dim": 8, "sliding_window": 8},
    "Gemma3TextConfig": {"head_dim": 8, "sliding_window": 8},
    "Cohere2Config": {"sliding_window": 8},
}


def by_its_own_packing(source, tokenizer, **sizes):
    packing = packing_of(load_config(tiny_llm(source, **sizes), tokenizer), "auto")
    vlm = tiny_vlm(source=source, **sizes)
    if packing == "packed":
        vlm.llm.set_attn_implementation(NAME)
    return vlm, packing


def test_every_kind_of_llm_is_listed():
    assert set(CLASSES) == PACKED


@pytest.mark.parametrize("kind", sorted(PACKED))
def test_every_listed_llm_is_exact(kind, tokenizer):
    vlm, packing = by_its_own_packing(CLASSES[kind], tokenizer, **EXTRA.get(kind, {}))
    assert packing == "packed"
    mixed = random_samples(0)
    losses, expected = vlm(packed(batch_of(*mixed), packing)), torch.stack([slow_loss(vlm, mixed, s) for s in SCALES])
    assert torch.allclose(losses.per_scale, expected, rtol=2e-5)
    for fast, slow in zip(gradients(losses.loss, vlm), gradients(expected.mean(), vlm), strict=True):
        assert torch.allclose(fast, slow, rtol=1e-2, atol=1e-4 * slow.abs().max().item() + 1e-6)
    check_packing(vlm, packing)


@pytest.mark.parametrize("source", sorted(UNPACKED))
def test_windows_and_soft_caps_are_kept(source, tokenizer):
    vlm, packing = by_its_own_packing(source, tokenizer, **UNPACKED[source])
    mixed = random_samples(0)
    losses, expected = vlm(packed(batch_of(*mixed), packing)), torch.stack([slow_loss(vlm, mixed, s) for s in SCALES])
    assert packing == "padded"
    assert torch.allclose(losses.per_scale, expected, rtol=2e-5)
    check_packing(vlm, packing)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_stretched_by_the_length_of_a_row_are_not_packed(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
    assert packing_of(LlamaConfig(rope_parameters=rope), "auto") == "padded"
    assert packing_of(LlamaConfig(), "auto") == "packed"


def test_recurrent_models_run_scale_after_scale():
    assert packing_of(MambaConfig(), "packed") == "padded"
    assert packed(batch_of(*samples()), "padded").packed == []


def test_a_window_is_refused_where_it_would_be_lost():
    vlm = tiny_vlm(source="MistralConfig", sliding_window=8)
    vlm.llm.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match=r"do not support \['sliding_window'\] of MistralAttention"):
        vlm(packed(batch_of(*samples())))


def test_the_start_up_check_finds_an_attention_that_leaks(monkeypatch):
    vlm = packing_vlm64()
    check_packing(vlm, "packed")
    real = attention._attend_group
    monkeypatch.setattr(
        attention, "_attend_group", lambda group, q, k, v, *rest: real(group, q, k.roll(1, 0), v, *rest)
    )
    with pytest.raises(RuntimeError, match=r"set model\.packing to padded"):
        check_packing(vlm, "packed")
    check_packing(vlm, "padded")


def test_the_start_up_check_tries_masked_groups_too(monkeypatch):
    vlm, real = packing_vlm64(), attention._attend_group

    def leaky(group, queries, keys, *rest):
        return real(group, queries, keys if group.mask is None else keys.roll(1, 0), *rest)

    monkeypatch.setattr(attention, "_attend_group", leaky)
    with pytest.raises(RuntimeError, match=r"the packed loss"):
        check_packing(vlm, "packed")


def test_the_start_up_check_under_autocast_knows_rounding_from_a_leak(monkeypatch):
    vlm, real = tiny_vlm(num_hidden_layers=6), attention._attend_group
    vlm.llm.set_attn_implementation(NAME)
    with torch.autocast("cpu", torch.bfloat16):
        check_packing(vlm, "packed")
        monkeypatch.setattr(
            attention, "_attend_group", lambda group, q, k, v, *rest: real(group, q, k.roll(1, 0), v, *rest)
        )
        with pytest.raises(RuntimeError, match=r"set model\.packing to padded"):
            check_packing(vlm, "packed")


def test_layer_checkpointing_keeps_every_gradient():
    vlm, mixed = packing_vlm64(), random_samples(1)
    plain = gradients(vlm(packed(batch_of(*mixed))).loss, vlm)
    vlm.llm.gradient_checkpointing_enable({"use_reentrant": False})
    vlm.train()
    again = gradients(vlm(packed(batch_of(*mixed))).loss, vlm)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_bf16_stays_near_float32():
    vlm, mixed = tiny_vlm(), random_samples(1)
    vlm.llm.set_attn_implementation(NAME)
    exact = vlm(packed(batch_of(*mixed))).loss
    with torch.autocast("cpu", torch.bfloat16):
        rough = vlm(packed(batch_of(*mixed))).loss
    assert rough.dtype == torch.float32
    assert torch.allclose(rough, exact, rtol=2e-2)
    rough.backward()


def test_compiled_layers_compute_the_same_however_many_layouts_come():
    """Attention is left out of the graphs: compiled with them, every other layout would be a new one."""
    vlm, seeds = packing_vlm64(), range(12)
    expected = [vlm(packed(batch_of(*random_samples(seed, 2 + seed)))).loss for seed in seeds]
    for layer in vlm.llm.model.layers:
        layer.compile(backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for seed in seeds:
            found = vlm(packed(batch_of(*random_samples(seed, 2 + seed)))).loss
            assert torch.allclose(found, expected[seed], rtol=1e-12)
    found.backward()
    expected[-1].backward(inputs=[(check := vlm.llm.model.layers[0].mlp.up_proj.weight)])
    assert check.grad is not None


@pytest.mark.parametrize(
    ("source", "sizes"),
    [
        ("LlamaConfig", {}),
        ("GraniteConfig", {"logits_scaling": 8.0}),
        ("CohereConfig", {"logit_scale": 0.25}),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_chunks_of_logits_give_plain_autograds_gradients(source, sizes, tied, monkeypatch):
    monkeypatch.setitem(loss.CHUNK, "cpu", 348 * 3)  # three labels at a time
    llm = tiny_vlm64(source=source, tie_word_embeddings=tied, **sizes).llm
    torch.manual_seed(0)
    hidden = torch.randn(10, 32, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.randint(348, (10,)), torch.rand(10, dtype=torch.float64)
    total, losses = loss.weighted_loss(llm, hidden, labels, weights)
    head, wanted = llm.get_output_embeddings(), [hidden, llm.get_output_embeddings().weight]
    logits = loss.logit_factor(llm.config) * head(hidden)
    plain = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert torch.allclose(losses, plain, rtol=1e-12)
    found = torch.autograd.grad(3 * total, wanted)
    for a, b in zip(found, torch.autograd.grad(3 * (plain * weights).sum(), wanted), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


def test_an_unknown_packing_is_refused():
    with pytest.raises(ValueError, match="packing branch: expected one of packed, sequential, padded"):
        packed(batch_of(*samples()), "branch")
