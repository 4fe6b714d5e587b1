"""Packed rows against the slow, obvious way of test_vlm: one sample and one scale at a time."""

from dataclasses import replace
from functools import partial
from itertools import combinations

import pytest
import torch
from transformers import LlamaConfig, MambaConfig

from lit_mm.model import attention, loss
from lit_mm.model.attention import BranchLayout
from lit_mm.model.batch import IGNORE_INDEX, IMAGE, Batch, Images
from lit_mm.model.llm import PACKED, load_config, packing_of
from lit_mm.model.packing import pack
from lit_mm.training.check import check_packing
from tests.helpers.batches import SCALES, batch_of, packed, random_samples, samples, slow_loss
from tests.helpers.models import CLASSES, EXTRA, gradients, packing_vlm, packing_vlm64, tiny_llm, tiny_vlm, tiny_vlm64


def check(vlm, mixed, packing, rtol, **tolerance):
    """Losses and, with tolerances for them, gradients."""
    losses, expected = vlm(packed(batch_of(*mixed), packing)), torch.stack([slow_loss(vlm, mixed, s) for s in SCALES])
    assert torch.allclose(losses.per_scale, expected, rtol=rtol)
    assert torch.allclose(losses.loss, expected.mean(), rtol=rtol)
    if tolerance:
        for fast, slow in zip(gradients(losses.loss, vlm), gradients(expected.mean(), vlm), strict=True):
            atol = tolerance["atol"] + tolerance.get("of_most", 0) * slow.abs().max().item()
            assert torch.allclose(fast, slow, rtol=tolerance["rtol_of_gradients"], atol=atol)


@pytest.mark.parametrize("packing", ["packed", "sequential", "padded"])
@pytest.mark.parametrize(
    ("source", "seed"), [*(("LlamaConfig", seed) for seed in range(3)), ("Qwen2Config", 3), ("Qwen3Config", 4)]
)
def test_losses_and_gradients_equal_the_slow_way(source, packing, seed):
    vlm = packing_vlm64(source=source)
    check(vlm, random_samples(seed), packing, 1e-10, rtol_of_gradients=1e-10, atol=1e-12)


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


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_takes_one_kernel_for_all_lengths(monkeypatch):
    """For sequences below 128 positions torch 2.11 would take another, which fails on an H200."""
    found, original = [], attention.flex_attention

    def spy(*arguments, **named):
        found.append(named["kernel_options"]["BACKEND"])
        return original(*arguments, **named)

    monkeypatch.setattr(attention, "flex_attention", spy)
    with torch.no_grad():
        packing_vlm64()(packed(batch_of(*samples()), attention="flex"))
    assert found == ["TRITON", "TRITON"]  # one a layer


def test_autocasts_queries_and_keys_are_copied_as_values_are(monkeypatch):
    """Rotary positions leave them in float32."""
    found, original = set(), attention._attend_group
    monkeypatch.setattr(
        attention, "_attend_group", lambda *a: found.add(tuple(x.dtype for x in a[1:4])) or original(*a)
    )
    with torch.autocast("cpu", torch.bfloat16):
        packing_vlm()(packed(batch_of(*samples())))
    assert found == {(torch.bfloat16,) * 3}


LLMS = [(CLASSES[kind], "packed", EXTRA.get(kind, {})) for kind in sorted(PACKED)] + [
    (name, "padded", {"sliding_window": 8, **sizes})
    for name, sizes in {
        "MistralConfig": {},
        "Phi3Config": {"pad_token_id": 0},
        "Starcoder2Config": {},
        "Qwen2Config": {"use_sliding_window": True, "max_window_layers": 1},
        "Qwen3Config": {"use_sliding_window": True, "max_window_layers": 1},
        "Gemma2Config": {"head_dim": 8},
        "Gemma3TextConfig": {"head_dim": 8},
        "Cohere2Config": {},
    }.items()
]
"""All listed kinds, and those whose windows and soft caps a packed sequence would lose."""


@pytest.mark.parametrize(("source", "packing", "sizes"), LLMS)
def test_every_llm_is_exact_by_its_own_packing(source, packing, sizes, tokenizer):
    assert packing_of(load_config(tiny_llm(source, **sizes), tokenizer), "auto") == packing
    vlm = (packing_vlm if packing == "packed" else tiny_vlm)(source=source, **sizes)
    gradients_too = {"rtol_of_gradients": 1e-2, "atol": 1e-6, "of_most": 1e-4} if packing == "packed" else {}
    check(vlm, random_samples(0), packing, 2e-5, **gradients_too)
    check_packing(vlm, packing)


def test_every_kind_of_llm_is_listed():
    assert set(CLASSES) == PACKED


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_stretched_by_the_length_of_a_row_are_not_packed(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
    assert packing_of(LlamaConfig(rope_parameters=rope), "auto") == "padded"
    assert packing_of(LlamaConfig(), "auto") == "packed"
    assert packing_of(MambaConfig(), "packed") == "padded"  # recurrent


def test_a_window_is_refused_where_it_would_be_lost():
    vlm = packing_vlm(source="MistralConfig", sliding_window=8)
    with pytest.raises(ValueError, match=r"do not support \['sliding_window'\] of MistralAttention"):
        vlm(packed(batch_of(*samples())))


def leaky(attend, masked):
    """Attention that sees the key before, or within groups with a mask what the mask hides."""

    def leaks(layout, query, key, *rest):
        if not masked:
            return attend(layout, query, key.roll(1, 2), *rest)
        groups = [group if group.mask is None else replace(group, mask=None) for group in layout.groups]
        return attend(replace(layout, groups=groups), query, key, *rest)

    return leaks


@pytest.mark.parametrize(
    ("vlm", "masked"),
    [(packing_vlm64, False), (packing_vlm64, True), (partial(packing_vlm, num_hidden_layers=6), False)],
    ids=["all groups", "those with a mask", "rounded to bfloat16"],
)
def test_the_start_up_check_finds_an_attention_that_leaks(monkeypatch, vlm, masked):
    rounded, vlm = isinstance(vlm, partial), vlm()
    with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
        check_packing(vlm, "packed")
        monkeypatch.setattr(BranchLayout, "attend", leaky(BranchLayout.attend, masked))
        with pytest.raises(RuntimeError, match=r"the packed loss .*set model\.packing to padded"):
            check_packing(vlm, "packed")
    check_packing(vlm, "padded")


def test_layer_checkpointing_keeps_every_gradient():
    vlm, mixed = packing_vlm64(), random_samples(1)
    plain = gradients(vlm(packed(batch_of(*mixed))).loss, vlm)
    vlm.llm.gradient_checkpointing_enable({"use_reentrant": False})
    vlm.train()
    again = gradients(vlm(packed(batch_of(*mixed))).loss, vlm)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_bf16_stays_near_float32():
    vlm, mixed = packing_vlm(), random_samples(1)
    exact = vlm(packed(batch_of(*mixed))).loss
    with torch.autocast("cpu", torch.bfloat16):
        rough = vlm(packed(batch_of(*mixed))).loss
    assert rough.dtype == torch.float32
    assert torch.allclose(rough, exact, rtol=2e-2)
    rough.backward()


def test_compiled_layers_compute_the_same_however_many_layouts_come():
    """Attention is left out of the graphs: compiled with them, every other layout would be a new one."""
    vlm, seeds = packing_vlm64(), range(9)  # one more than dynamo recompiles
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
    total, losses, _ = loss.weighted_loss(llm, hidden, labels, weights)
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
