"""LitMatryoshka: groups, schedule, what is logged, checkpoints, repeatable runs."""

import math

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from transformers import GenerationConfig, TrainingArguments, get_cosine_schedule_with_warmup

from lit_mm.data.datamodules import ImageDataModule
from lit_mm.data.images import ImageOptions
from lit_mm.model.loss import Consistency
from lit_mm.training.module import LitMatryoshka
from lit_mm.training.parts import LLMPart, Part, Parts, parameter_groups
from lit_mm.training.schedule import WarmupCosine
from tests.helpers.models import tiny_encoder, tiny_llm, tiny_vlm
from tests.helpers.runs import fit, logged, losses, module


def test_what_a_module_came_from_does_not_count_as_steps_of_its_fit(instruction_set, tmp_path):
    _, trainer = fit(instruction_set, tmp_path / "first", max_steps=3)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    lit = module()
    options = {
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "inference_mode": False,
        "default_root_dir": tmp_path,
    }
    files = {split: f"{instruction_set}/{split}.json" for split in ("train", "val")}
    data = ImageDataModule(lit.inputs, **files, image_root=str(instruction_set), image=ImageOptions("keep", None))
    lightning.Trainer(**options, logger=False).validate(
        lit, data, ckpt_path=tmp_path / "first.ckpt", weights_only=False
    )
    assert lit.place.steps == 3  # where it was judged
    trainer = lightning.Trainer(**options, logger=False, max_steps=2, limit_val_batches=0)
    trainer.fit(lit, data)
    trainer.save_checkpoint(tmp_path / "second.ckpt")
    assert torch.load(tmp_path / "second.ckpt", weights_only=False)["global_step"] == 2


def test_groups_carry_the_parts_rates_and_spare_norms_from_decay():
    vlm = tiny_vlm()
    groups = {group["name"]: group for group in parameter_groups(vlm, Parts(Part(1.0), Part(2.0), LLMPart(3.0)))}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "encoder_other": 1.0,  # this backbone's matrices are 1×1 convolutions
        "encoder_no_decay": 1.0,
        "projector": 2.0,
        "projector_no_decay": 2.0,
        "llm": 3.0,
        "llm_other": 3.0,
        "llm_no_decay": 3.0,
    }
    grouped = [own for group in groups.values() for own in group["params"]]
    assert sorted(grouped) == sorted(name for name, _ in vlm.named_parameters())
    spared = [own for name, group in groups.items() if name.endswith("no_decay") for own in group["params"]]
    assert all(group["weight_decay"] == 0 for name, group in groups.items() if name.endswith("no_decay"))
    assert all(name.endswith(("bias", "gamma")) or "norm" in name or name.split(".")[-2].isdigit() for name in spared)
    for kind in ("gamma", "norm.weight", "conv_dw.bias", "input_layernorm.weight"):
        assert any(name.endswith(kind) for name in spared)
    assert not any(name.endswith(("mlp.fc1.weight", "q_proj.weight", "embed_tokens.weight")) for name in spared)


def rates_of(schedule, optimizer, steps) -> list[float]:
    """The rate of each of so many steps, and the one after."""
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        optimizer.step()
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def one_parameter():
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 2.0}])


@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.1, 0.34, 0.999])
@pytest.mark.parametrize("steps", [1, 2, 7, 33, 34, 100, 517])
def test_schedule_is_that_of_transformers_step_for_step(tmp_path, steps, warmup):
    """With the warm-up that its Trainer makes of a ratio; 33 and 34 steps lie on both sides of a whole one."""
    options = {"output_dir": str(tmp_path), "use_cpu": True, "lr_scheduler_type": "cosine"}
    theirs = TrainingArguments(**options, warmup_steps=warmup).get_warmup_steps(steps)
    optimizer, own = one_parameter(), one_parameter()
    expected = rates_of(get_cosine_schedule_with_warmup(optimizer, theirs, steps), optimizer, steps)
    assert rates_of(WarmupCosine(own, steps, warmup), own, steps) == pytest.approx(expected, abs=1e-12)


def test_schedule_of_the_papers_by_hand():
    """ConvLLaVA's and M3's 3 % of 5,198 steps, 155.94, are 156 from rate 0 on."""
    optimizer = one_parameter()
    rates = rates_of(WarmupCosine(optimizer, 5198), optimizer, 200)
    assert rates[:157] == pytest.approx([2.0 * step / 156 for step in range(157)])
    assert rates[200] == pytest.approx(1 + math.cos(math.pi * 44 / 5042))


def test_schedule_ends_at_its_floor():
    optimizer = one_parameter()
    assert rates_of(WarmupCosine(optimizer, 50, floor=0.1), optimizer, 60)[50:] == pytest.approx([0.2] * 11)


def test_two_runs_of_twenty_steps_give_the_same_losses(instruction_set, tmp_path):
    for run in ("a", "b"):
        fit(instruction_set, tmp_path / run, max_steps=20, limit_val_batches=0)
    first, second = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert len(first) == 20
    assert first == second
    epochs = [sum(row["train/loss"] for row in first[start : start + 4]) for start in range(0, 20, 4)]
    assert epochs[-1] < epochs[0]


def test_the_loss_is_the_mean_over_scales(instruction_set, tmp_path):
    fit(instruction_set, tmp_path)
    for row in losses(tmp_path):
        assert row["train/loss"] == pytest.approx(sum(row[f"train/loss@{scale}"] for scale in (16, 4, 1)) / 3)


def test_consistency_is_logged_beside_the_loss_from_its_start_on(instruction_set, tmp_path):
    """Together they are the loss of the step."""
    totals = []
    watch = LambdaCallback(on_train_batch_end=lambda trainer, lit, outputs, *_: totals.append(float(outputs["loss"])))
    options = {"lit": module(consistency=Consistency(3.0, start=2)), "callbacks": [watch], "limit_val_batches": 0}
    lit, _ = fit(instruction_set, tmp_path, **options)
    rows = logged(tmp_path, "train/loss")
    assert {name for row in rows for name in row if "consistency" in name} == {
        name for name in lit.metric_names() if "consistency" in name
    }
    assert ["train/consistency" in row for row in rows] == [False, False, True, True]
    for row, total in zip(rows, totals, strict=True):
        assert total == pytest.approx(row["train/loss"] + row.get("train/consistency", 0), rel=1e-5)
    for row in rows[2:]:
        assert (
            0
            < row["train/consistency"]
            == pytest.approx(sum(row[f"train/consistency@{scale}"] for scale in (4, 1)) / 3)
        )


@pytest.mark.parametrize("options", [{"scales": [16]}, {"scales_per_step": 1}])
def test_consistency_without_a_second_scale_is_refused(options):
    with pytest.raises(ValueError, match=r"model.consistency needs at least two scales in a step, found scales 16"):
        LitMatryoshka(tiny_encoder, tiny_llm(), **{"scales": [16, 4, 1], "consistency": Consistency(), **options})


def test_validation_loss_is_the_mean_over_targets_not_over_batches(instruction_set, tmp_path):
    lit, trainer = fit(instruction_set, tmp_path, max_steps=2, val_check_interval=2)
    data = trainer.datamodule
    total, count = 0.0, 0
    for batch in data.val_dataloader():
        total, count = total + lit.vlm(batch).loss.item() * batch.num_labels, count + batch.num_labels
    [metrics] = trainer.validate(lit, data, verbose=False)
    assert metrics["val/loss"] == pytest.approx(total / count, rel=1e-5)


def test_every_parameter_learns(instruction_set, tmp_path):
    lightning.seed_everything(7, verbose=False)
    before = module()
    before.configure_model()
    lit, _ = fit(instruction_set, tmp_path)
    moved = [not torch.equal(a, b) for a, b in zip(before.vlm.parameters(), lit.vlm.parameters(), strict=True)]
    assert all(moved)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_steps": 9}, 9),
        ({"max_epochs": 2, "max_steps": -1}, 8),
        ({"max_epochs": 3, "max_steps": -1, "accumulate_grad_batches": 3}, 6),
        ({"max_epochs": 2, "max_steps": 1000}, 8),
        ({"max_epochs": 1000, "max_steps": 5}, 5),
        ({"max_epochs": 2, "max_steps": 8}, 8),
        ({"max_epochs": 2, "max_steps": -1, "limit_train_batches": 3}, 6),
    ],
)
def test_total_steps_are_those_the_run_takes(instruction_set, tmp_path, options, steps):
    lit, trainer = fit(instruction_set, tmp_path, limit_val_batches=0, **options)
    assert lit.total_steps() == steps == trainer.global_step
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)  # the schedule ends with the run


def test_endless_run_is_refused(instruction_set, tmp_path):
    with pytest.raises(ValueError, match=r"set trainer\.max_steps or trainer\.max_epochs"):
        fit(instruction_set, tmp_path, max_steps=-1, max_epochs=-1)


def test_inputs_need_no_weights():
    lit = module()
    inputs = lit.inputs
    assert not hasattr(lit, "vlm")
    assert (inputs.stride, inputs.scales, inputs.color) == (16, [16, 4, 1], (123, 116, 103))


def test_building_twice_keeps_the_model():
    lit = module()
    lit.configure_model()
    vlm = lit.vlm
    lit.configure_model()
    assert lit.vlm is vlm


def test_optimizer_and_schedule_come_from_the_config(instruction_set, tmp_path):
    lit = module(optimizer=torch.optim.SGD, scheduler=torch.optim.lr_scheduler.CosineAnnealingLR)
    _, trainer = fit(instruction_set, tmp_path, lit=lit)
    assert isinstance(trainer.optimizers[0], torch.optim.SGD)
    schedule = trainer.lr_scheduler_configs[0].scheduler
    assert (type(schedule), schedule.T_max) == (torch.optim.lr_scheduler.CosineAnnealingLR, 4)


def stopped_in_the_middle(root, folder, batches=2, **options) -> str:
    """A checkpoint after so many of an epoch's four batches."""
    file = folder / "middle.ckpt"

    def keep(trainer, lit, outputs, batch, batch_idx):
        if batch_idx == batches - 1:
            trainer.save_checkpoint(file)

    callbacks = [LambdaCallback(on_train_batch_end=keep)]
    fit(root, folder, max_steps=2, limit_val_batches=0, callbacks=callbacks, **options)
    return str(file)


def test_resuming_in_the_middle_of_an_accumulation(instruction_set, tmp_path):
    file = stopped_in_the_middle(instruction_set, tmp_path, 3, accumulate_grad_batches=2)
    options = {"accumulate_grad_batches": 2, "limit_val_batches": 0}
    _, trainer = fit(instruction_set, tmp_path, ckpt_path=file, max_steps=3, **options)
    assert trainer.global_step == 3


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"batch_size": 2}, "batch_size was 4 and is 2"), ({"seed": 1}, r"data\.seed was 0 and is 1")],
)
def test_another_division_in_the_middle_of_an_epoch_is_refused(instruction_set, tmp_path, changed, said):
    file = stopped_in_the_middle(instruction_set, tmp_path)
    with pytest.raises(ValueError, match=f"stopped in mid-epoch, after batch 2, .* must not change: {said}"):
        fit(instruction_set, tmp_path, ckpt_path=file, data=changed, limit_val_batches=0)


def test_another_division_at_an_epochs_beginning_is_said(instruction_set, tmp_path):
    file = tmp_path / "end.ckpt"
    _, trainer = fit(instruction_set, tmp_path, limit_val_batches=0)
    trainer.save_checkpoint(file)
    with pytest.warns(UserWarning, match="resuming with other batches than before: batch_size was 4 and is 2"):
        _, trainer = fit(
            instruction_set, tmp_path, ckpt_path=str(file), data={"batch_size": 2}, max_steps=6, limit_val_batches=0
        )
    assert trainer.global_step == 6


def test_a_checkpoint_without_a_place_is_refused(instruction_set, tmp_path):
    file = stopped_in_the_middle(instruction_set, tmp_path)
    checkpoint = torch.load(file, weights_only=False)  # made above
    del checkpoint["place"]
    torch.save(checkpoint, file)
    with pytest.raises(ValueError, match=r"middle\.ckpt: holds no position in the data"):
        fit(instruction_set, tmp_path, ckpt_path=file, limit_val_batches=0)


@pytest.mark.parametrize(
    ("decoding", "told"),
    [
        ("greedy", "answers: greedily, without num_beams 3, repetition_penalty 1.3 of the LLM's generation_config,"),
        ("own", "answers: as the LLM's generation_config says (num_beams 3, repetition_penalty 1.3),"),
    ],
)
def test_a_run_says_how_it_generates(instruction_set, tmp_path, monkeypatch, decoding, told):
    said = []
    monkeypatch.setattr("lit_mm.training.module.rank_zero_info", said.append)
    lit, trainer = fit(instruction_set, tmp_path, max_steps=1)
    assert any(line.startswith("answers: greedily, at most 3 tokens") for line in said), said
    lit.decoding, lit.vlm.llm.generation_config = decoding, GenerationConfig(repetition_penalty=1.3, num_beams=3)
    lit.vlm.llm.generation_config.eos_token_id = [5, 6]
    said.clear()
    trainer.validate(lit, trainer.datamodule, verbose=False)
    [line] = said
    assert line.startswith(told) and line.count(", 6 ") == 1, line


@pytest.mark.parametrize(("number", "per_batch"), [(1, {}), (2, {"tokens_per_batch": 150, "batch_size": None})])
def test_overfit_batches_are_the_same_in_every_epoch(instruction_set, tmp_path, number, per_batch):
    seen = []

    class Watch(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append([ids.tolist() for ids in batch.input_ids])

    options = {"max_steps": 3 * number, "overfit_batches": number, "reload_dataloaders_every_n_epochs": 1}
    _, trainer = fit(instruction_set, tmp_path, data=per_batch, callbacks=[Watch()], **options)
    assert trainer.current_epoch == 3
    assert seen == 3 * seen[:number]
    assert all(seen[0] != other for other in seen[1:number])
