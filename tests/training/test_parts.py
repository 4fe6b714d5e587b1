"""What trains: exactly the parameters that are named, and nothing that is frozen costs anything."""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lit_mm.data.tokenizer import load_tokenizer
from lit_mm.model.encoder import TimmEncoder
from lit_mm.model.llm import load_llm
from lit_mm.training.optim import FusedAdamW
from lit_mm.training.parts import (
    LLMPart,
    LoRA,
    Part,
    Parts,
    apply_parts,
    count_parameters,
    merge_adapters,
    parameter_groups,
    parts_table,
    with_parameters,
)
from tests.helpers.batches import batch_of, packed, samples
from tests.helpers.models import packing_vlm, tiny_llm, tiny_vlm


def vlm_for(parts: Parts, **sizes):
    vlm = packing_vlm(**sizes)
    apply_parts(vlm, parts)
    return vlm


def moved(parts: Parts, **sizes) -> set[str]:
    """Names of the parameters that one optimizer step changes."""
    vlm = vlm_for(parts, **sizes)
    before = copy.deepcopy(dict(vlm.named_parameters()))
    optimizer = FusedAdamW(with_parameters(parameter_groups(vlm, parts), vlm), weight_decay=0.1)
    for _ in range(2):  # in the first step one of an adapter's two matrices has no gradient
        vlm(packed(batch_of(*samples()))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(optimizer.state) == sum(len(group["params"]) for group in optimizer.param_groups)
    return {name for name, parameter in vlm.named_parameters() if not torch.equal(parameter, before[name])}


def all_names(prefix: str = "", **sizes) -> set[str]:
    return {name for name, _ in tiny_vlm(**sizes).named_parameters() if name.startswith(prefix)}


RECIPES = {
    "everything": (Parts(), ("",)),
    "ConvLLaVA stage 1": (
        Parts(Part(3e-4, from_stage=5), Part(3e-4), LLMPart(frozen=True)),
        ("encoder.trunk.stages.4.", "projector."),
    ),
    "ConvLLaVA stage 2": (
        Parts(encoder=Part(from_stage=3)),
        ("encoder.trunk.stages.2.", "encoder.trunk.stages.3.", "encoder.trunk.stages.4.", "projector.", "llm."),
    ),
    "ConvLLaVA stage 3": (Parts(encoder=Part(frozen=True)), ("projector.", "llm.")),
    "frozen llm": (Parts(llm=LLMPart(frozen=True)), ("encoder.", "projector.")),
    "projector alone": (Parts(Part(frozen=True), Part(), LLMPart(frozen=True)), ("projector.",)),
    "the llm's last layer": (
        Parts(Part(frozen=True), Part(frozen=True), LLMPart(from_stage=2)),
        ("llm.model.layers.1.", "llm.model.norm.", "llm.lm_head."),
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_exactly_what_is_named_moves(recipe):
    parts, prefixes = RECIPES[recipe]
    assert moved(parts) == {name for name in all_names() if name.startswith(prefixes)}


def test_a_tied_head_stays_with_its_frozen_embeddings():
    parts = Parts(Part(frozen=True), Part(frozen=True), LLMPart(from_stage=2))
    assert moved(parts, tie_word_embeddings=True) == {
        name
        for name in all_names(tie_word_embeddings=True)
        if name.startswith(("llm.model.layers.1.", "llm.model.norm."))
    }


def test_adapters_alone_move_and_the_output_head_has_none():
    parts = Parts(Part(frozen=True), Part(), LLMPart(lora=LoRA(4, 8, 0.0)))
    found = moved(parts)
    adapters = {name for name in found if "lora_" in name}
    assert found - adapters == all_names("projector.")
    linear = [name for name, module in tiny_vlm().llm.base_model.named_modules() if isinstance(module, nn.Linear)]
    expected = {f"llm.model.{name}.lora_{kind}.default.weight" for name in linear for kind in "AB"}
    assert adapters == expected and len(expected) == 2 * 2 * 7


def test_adapters_are_those_of_peft():
    """The same numbers in peft's own model give the same logits, before and after merging."""
    torch.manual_seed(3)
    llm = load_llm(tiny_llm(), load_tokenizer(tiny_llm()))
    wrapped = copy.deepcopy(llm)
    vlm = tiny_vlm()
    vlm.llm = llm
    apply_parts(vlm, Parts(llm=LLMPart(lora=LoRA(4, 8, 0.0, ["q_proj", "v_proj"]))))
    theirs = peft.get_peft_model(
        wrapped, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    for name, parameter in llm.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    told = theirs.load_state_dict({f"base_model.model.{name}": value for name, value in llm.state_dict().items()})
    assert not told.missing_keys and not told.unexpected_keys
    ids = torch.randint(0, 300, (1, 12))
    expected = theirs.eval()(ids).logits
    assert torch.allclose(llm.eval()(ids).logits, expected, atol=1e-6)
    merge_adapters(llm)
    assert {name for name, _ in llm.named_parameters()} == {name for name, _ in tiny_vlm().llm.named_parameters()}
    assert torch.allclose(llm(ids).logits, expected, atol=1e-5)
    assert not torch.allclose(expected, AutoModelForCausalLM.from_config(llm.config).eval()(ids).logits, atol=1e-2)


@pytest.mark.parametrize(
    ("parts", "kept"),
    [
        (Parts(Part(frozen=True), Part(), LLMPart(frozen=True)), set()),
        (Parts(Part(from_stage=5), Part(), LLMPart(frozen=True)), {"stages.4"}),
        (Parts(Part(from_stage=3)), {"stages.2", "stages.3", "stages.4"}),
    ],
    ids=["frozen", "from stage 5", "from stage 3"],
)
def test_frozen_stages_keep_no_activations(parts, kept):
    vlm = vlm_for(parts)
    keeping = set()
    for number, stage in enumerate(vlm.encoder.stages):
        stage.register_forward_hook(
            lambda module, inputs, output, name=f"stages.{number}": keeping.add(name) if output.requires_grad else None
        )
    vlm(packed(batch_of(*samples())))
    assert keeping == kept


def test_what_is_frozen_drops_nothing_and_keeps_its_statistics():
    vlm = tiny_vlm()
    vlm.encoder = TimmEncoder("resnet18", layer=2)
    vlm.llm.config.attention_dropout = 0.5
    apply_parts(vlm, Parts(Part(from_stage=2), Part(), LLMPart(frozen=True)))
    norms = {name: module for name, module in vlm.encoder.named_modules() if isinstance(module, nn.BatchNorm2d)}
    training = {name for name, module in norms.items() if module.training}
    assert training == {name for name in norms if name.startswith("trunk.layer2")} and training
    before = {name: module.running_mean.clone() for name, module in norms.items()}
    vlm.encoder(torch.randn(2, 3, 64, 64))
    changed = {name for name, module in norms.items() if not torch.equal(module.running_mean, before[name])}
    assert changed == training
    assert not any(module.training for module in vlm.llm.modules())


def test_a_frozen_llm_is_recomputed_too_without_dropout():
    """transformers recomputes in training mode only; a frozen LLM is not in it, its layers say they are."""
    plain, again = (vlm_for(Parts(llm=LLMPart(frozen=True)), attention_dropout=0.5) for _ in range(2))
    again.set_grad_checkpointing(["encoder", "llm"])
    calls = []
    again.decoder_layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    totals = [vlm(packed(batch_of(*samples()))).loss for vlm in (plain, again)]
    assert torch.equal(*totals) and len(calls) == 1
    for total in totals:
        total.backward()
    assert len(calls) == 2
    pairs = zip(plain.named_parameters(), again.parameters(), strict=True)
    assert all(torch.equal(p.grad, q.grad) for (_, p), q in pairs if p.grad is not None)


def test_layer_decay_slows_every_earlier_stage():
    parts = Parts(Part(1.0, layer_decay=0.5), Part(1.0), LLMPart(1.0, layer_decay=0.1, weight_decay=0.3))
    vlm = vlm_for(parts)
    lr = {name: group["lr"] for group in parameter_groups(vlm, parts) for name in group["params"]}
    decay = {name: group.get("weight_decay") for group in parameter_groups(vlm, parts) for name in group["params"]}
    assert lr["encoder.trunk.stem.0.weight"] == 0.5**5
    assert [lr[f"encoder.trunk.stages.{stage}.blocks.0.conv_dw.weight"] for stage in range(5)] == [
        0.5**4, 0.5**3, 0.5**2, 0.5, 1.0
    ]  # fmt: skip
    assert lr["projector.layers.0.weight"] == lr["llm.lm_head.weight"] == lr["llm.model.norm.weight"] == 1.0
    assert lr["llm.model.embed_tokens.weight"] == pytest.approx(0.01)
    assert lr["llm.model.layers.0.mlp.up_proj.weight"] == pytest.approx(0.1)
    assert decay["llm.lm_head.weight"] == 0.3 and decay["llm.model.norm.weight"] == 0.0
    assert decay["projector.layers.0.weight"] is None
    assert set(lr) == {name for name, _ in vlm.named_parameters()}


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"parts.encoder.from_stage 6: the encoder has stages 1 to 5"):
        apply_parts(tiny_vlm(), Parts(encoder=Part(from_stage=6)))
    with pytest.raises(ValueError, match="nothing would train"):
        Parts(Part(frozen=True), Part(frozen=True), LLMPart(frozen=True))
    with pytest.raises(ValueError, match="frozen and from_stage 3 contradict each other"):
        Part(frozen=True, from_stage=3)
    with pytest.raises(ValueError, match=r"layer_decay in 0\.\.1, found lr 1e-05, layer_decay 0"):
        Part(1e-5, layer_decay=0.0)
    with pytest.raises(ValueError, match="goes with neither frozen nor from_stage"):
        Parts(llm=LLMPart(frozen=True, lora=LoRA()))
    with pytest.raises(
        ValueError, match=r"target_modules: \['no_such_layer'\] match no layer, expected some of \['down_proj'"
    ):
        apply_parts(tiny_vlm(), Parts(llm=LLMPart(lora=LoRA(target_modules=["q_proj", "no_such_layer"]))))


def test_the_table_counts_what_trains():
    parts = Parts(Part(1e-3, from_stage=5), Part(2e-3), LLMPart(frozen=True))
    vlm = vlm_for(parts)
    rows = [list(column.cells) for column in parts_table(vlm, parts).columns]
    stage = sum(p.numel() for p in vlm.encoder.trunk.stages[4].parameters())
    assert rows[0] == ["encoder", "projector", "llm", "all"]
    assert rows[2] == [f"{n / 1e6:.2f} M" for n in (stage, count_parameters(vlm.projector, False), 0)] + [
        f"{count_parameters(vlm, True) / 1e6:.2f} M"
    ]
    assert count_parameters(vlm, True) == stage + (24 * 32 + 32 + 32 * 32 + 32)
    assert rows[3] == ["0.001", "0.002", "", ""] and rows[5] == ["from stage 5 on", "whole", "frozen", ""]
