"""Around a step: norms, gradients that are no numbers, rates changed for a resumed run, memory."""

import json
from functools import partial
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LambdaCallback

from lit_mm.callbacks.advice import MemoryAdvice
from lit_mm.data.tokenizer import load_tokenizer
from lit_mm.model.llm import LLM, load_llm
from lit_mm.training.optim import FusedAdamW
from lit_mm.training.parts import LLMPart, LoRA, Part, Parts
from lit_mm.training.steps import refuse_hidden_scale
from tests.helpers.environment import TOKENIZER, installed
from tests.helpers.models import tiny_llm
from tests.helpers.runs import fit, logged, losses, module


def poison(trainer, lit, batch, batch_idx) -> None:
    """An infinite weight before the second step."""
    if batch_idx == 1:
        lit.vlm.projector.layers[0].bias.data[0] = float("nan")


def test_gradients_that_are_no_numbers_stop_the_run(instruction_set, tmp_path):
    before = []
    watch = LambdaCallback(
        on_train_batch_start=poison,
        on_before_optimizer_step=lambda trainer, lit, optimizer: before.append(lit.vlm.llm.lm_head.weight.clone()),
        on_exception=lambda trainer, lit, error: before.append(lit.vlm.llm.lm_head.weight.clone()),
    )
    with pytest.raises(
        FloatingPointError, match=r"step 1: the gradient norm is nan, losses nan; the records are listed in"
    ):
        fit(instruction_set, tmp_path, callbacks=[watch], limit_val_batches=0)
    [file] = tmp_path.glob("**/not_finite.step_1.rank_0.json")
    told = json.loads(file.read_text())
    [batch] = told["batches"]
    assert (told["epoch"], told["step"], batch["loss"]) == (0, 1, "nan") and len(batch["records"]) == 4
    known = {item["id"] for item in json.loads((instruction_set / "train.json").read_text())}
    assert all(any(f"(id {name})" in record for name in known) for record in batch["records"]), batch["records"]
    assert torch.equal(before[-1], before[-2])  # no step was taken with them


def test_all_batches_of_an_accumulation_are_written_down(instruction_set, tmp_path):
    watch = LambdaCallback(on_train_batch_start=poison)
    with pytest.raises(FloatingPointError):
        fit(instruction_set, tmp_path, callbacks=[watch], limit_val_batches=0, accumulate_grad_batches=3)
    told = json.loads(next(tmp_path.glob("**/not_finite*.json")).read_text())
    assert [batch["loss"] == "nan" for batch in told["batches"]] == [False, True, True]


def test_the_logged_norm_is_that_before_clipping(instruction_set, tmp_path):
    norms = []

    def own_norm(trainer, lit, optimizer):
        squares = [p.grad.double().square().sum() for p in lit.parameters() if p.grad is not None]
        norms.append(float(torch.stack(squares).sum().sqrt()))

    watch = LambdaCallback(on_before_optimizer_step=own_norm)
    lit, _ = fit(instruction_set, tmp_path, callbacks=[watch], limit_val_batches=0, gradient_clip_val=0.05)
    found = [row["train/gradient_norm"] for row in logged(tmp_path, "train/gradient_norm")]
    assert found == pytest.approx(norms, rel=1e-4)
    clipped = torch.stack([p.grad.square().sum() for p in lit.parameters() if p.grad is not None]).sum().sqrt()
    assert norms[-1] > 0.06 and float(clipped) == pytest.approx(0.05, rel=1e-3)


def test_a_rate_given_now_beats_the_checkpoints(instruction_set, tmp_path):
    def lrs(trainer):
        return {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}

    _, trainer = fit(instruction_set, tmp_path / "a", limit_val_batches=0, max_steps=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    _, same = fit(instruction_set, tmp_path / "b", tmp_path / "two.ckpt", limit_val_batches=0)
    parts = Parts(Part(5e-3), Part(2e-3), LLMPart(3e-3, weight_decay=0.7))
    _, other = fit(
        instruction_set, tmp_path / "c", tmp_path / "two.ckpt", lit=changed(parts=parts), limit_val_batches=0
    )
    for name, lr in lrs(same).items():
        assert lrs(other)[name] == pytest.approx(lr * (5 if name.startswith("encoder") else 1))
    decays = {group["name"]: group["weight_decay"] for group in other.optimizers[0].param_groups}
    assert decays["llm"] == 0.7 and decays["llm_no_decay"] == 0.0 == decays["encoder_other"]


def test_other_options_and_another_length_are_those_of_now(instruction_set, tmp_path):
    """AdamW's betas too; and of a longer run the schedule from its first step on, though the rate had been zero."""
    _, trainer = fit(instruction_set, tmp_path / "a", limit_val_batches=0, max_steps=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0
    seen = []
    watch = LambdaCallback(
        on_before_optimizer_step=lambda trainer, lit, optimizer: seen.append(optimizer.param_groups[0]["lr"])
    )
    options = {"limit_val_batches": 0, "max_steps": 6, "callbacks": [watch]}
    _, longer = fit(instruction_set, tmp_path / "b", tmp_path / "two.ckpt", lit=changed(), **options)
    assert longer.optimizers[0].param_groups[0]["betas"] == (0.5, 0.6)
    resumed, seen[:] = list(seen), []
    fit(instruction_set, tmp_path / "c", lit=changed(), **options)
    assert resumed == pytest.approx(seen[2:]) and resumed[0] > 0


def test_other_parts_are_not_resumed(instruction_set, tmp_path):
    _, trainer = fit(instruction_set, tmp_path / "a", limit_val_batches=0, max_steps=2)
    trainer.save_checkpoint(two := tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match=r"trained \{'encoder_other': .* or start a new run with --model.init_from"):
        fit(instruction_set, tmp_path / "b", two, lit=changed(parts=Parts(Part(frozen=True))), limit_val_batches=0)


def test_a_fused_optimizer_is_refused_where_the_loss_is_scaled():
    parameter = [{"params": [torch.nn.Parameter(torch.zeros(1))]}]
    fused, plain = FusedAdamW(parameter), torch.optim.AdamW(parameter)
    for optimizer, precision in ((plain, "16-mixed"), (fused, "bf16-mixed")):
        refuse_hidden_scale(SimpleNamespace(optimizers=[optimizer], precision=precision))
    with pytest.raises(ValueError, match="16-mixed: a fused optimizer hides the loss scale"):
        refuse_hidden_scale(SimpleNamespace(optimizers=[fused], precision="16-mixed"))


changed = partial(module, optimizer=partial(FusedAdamW, betas=(0.5, 0.6)))


def test_moving_averages_take_part_and_resume(instruction_set, tmp_path):
    """Lightning's own callback: validated and saved are the averages; the run goes on with the weights."""
    average = partial(EMAWeightAveraging, decay=0.5, update_every_n_steps=1, update_starting_at_step=0)
    whole, trainer = fit(instruction_set, tmp_path / "a", callbacks=[average()], limit_val_batches=0, max_steps=4)
    _, half = fit(instruction_set, tmp_path / "b", callbacks=[average()], limit_val_batches=0, max_steps=2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    plain, _ = fit(instruction_set, tmp_path / "c", limit_val_batches=0, max_steps=4)
    assert losses(tmp_path / "a") == losses(tmp_path / "c")
    assert not torch.equal(whole.vlm.llm.lm_head.weight, plain.vlm.llm.lm_head.weight)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    saved = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["vlm.llm.lm_head.weight"], whole.vlm.llm.lm_head.weight)


class NoMemory(lightning.Callback):
    def on_before_optimizer_step(self, *_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


def test_out_of_memory_names_the_knobs(instruction_set, tmp_path):
    callbacks = [MemoryAdvice(), NoMemory()]
    with pytest.warns(UserWarning) as told, pytest.raises(torch.OutOfMemoryError):
        fit(instruction_set, tmp_path, callbacks=callbacks, limit_val_batches=0)
    [text] = [str(warning.message) for warning in told if "out of memory" in str(warning.message)]
    assert "a batch of 4 samples" in text and "64×64 pixels" in text
    for knob in ("activation_checkpointing", "bf16-mixed", "tokens_per_batch", "sequential", "fsdp", "lora"):
        assert knob in text
    with pytest.warns(UserWarning) as told, pytest.raises(torch.OutOfMemoryError):
        fit(instruction_set, tmp_path, callbacks=callbacks, limit_val_batches=0, precision="bf16-mixed")
    assert not any("trainer.precision: bf16" in str(warning.message) for warning in told)


def test_quantized_weights_need_adapters_and_a_pretrained_model():
    quantized = tiny_llm()
    quantized.quantize = "4bit"
    with pytest.raises(ValueError, match=r"these weights cannot train: set parts.llm.frozen or .lora"):
        module(quantized, parts=Parts())
    with pytest.raises(ValueError, match="needs a pretrained model"):
        module(quantized, parts=Parts(llm=LLMPart(lora=LoRA(4)))).configure_model()


def test_without_bitsandbytes_the_error_names_it(tmp_path, monkeypatch):
    load_llm(tiny_llm(), load_tokenizer(tiny_llm())).save_pretrained(tmp_path)
    monkeypatch.setattr("lit_mm.model.llm.importlib.util.find_spec", lambda name: None)
    llm = LLM(str(tmp_path), tokenizer=TOKENIZER, chat_template="bare", quantize="8bit")
    with pytest.raises(ModuleNotFoundError, match="pip install bitsandbytes"):
        load_llm(llm, load_tokenizer(llm))


@installed("bitsandbytes")
@pytest.mark.parametrize(("quantize", "error"), [("8bit", 0.1), ("4bit", 0.5)])
def test_adapters_train_on_a_quantized_base(tmp_path, quantize, error):
    torch.manual_seed(0)
    whole = load_llm(tiny_llm(hidden_size=128, initializer_range=0.05), load_tokenizer(tiny_llm()))
    whole.save_pretrained(tmp_path)
    llm = LLM(str(tmp_path), tokenizer=TOKENIZER, chat_template="bare", quantize=quantize)
    lit = module(llm, parts=Parts(llm=LLMPart(lora=LoRA(4, 8, 0.0))))
    lit.configure_model()
    ids = torch.randint(0, 300, (1, 9))
    found, expected = lit.vlm.llm(ids).logits.float(), whole(ids).logits
    assert 0 < float((found - expected).norm() / expected.norm()) < error
    found.sum().backward()
    trained = {name for name, parameter in lit.vlm.llm.named_parameters() if parameter.grad is not None}
    assert trained and all("lora_" in name for name in trained)
    row = [list(column.cells)[2] for column in lit.table.columns]
    count = sum(p.numel() for p in whole.parameters())
    assert row[1] == f"{(count + sum(lit.vlm.llm.get_parameter(n).numel() for n in trained)) / 1e6:.2f} M"
