"""What is logged against slow counts, arithmetic and one process for two; pictures, tables and JSON."""

import json
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning_utilities.core.apply_func import apply_to_collection
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from lit_mm.callbacks import token_efficiency
from lit_mm.callbacks.efficiency_report import draw, in_short, markdown, table
from lit_mm.callbacks.meter import Clock, Meter, PartTimes, percentile, report
from lit_mm.callbacks.token_efficiency import TokenEfficiency
from lit_mm.costs import timing
from lit_mm.costs.counts import counts_of
from lit_mm.costs.devices import PeakMemory
from lit_mm.costs.flops import Costs
from lit_mm.costs.timing import Stopwatch
from lit_mm.training.parts import PARTS
from tests.helpers.batches import SCALES, batch_of, packed, random_samples
from tests.helpers.clock import forward_by
from tests.helpers.counting import slow_counts
from tests.helpers.models import packing_vlm, tiny_llm, tiny_vlm
from tests.helpers.records import write_instruction_set
from tests.helpers.runs import logged, watched_fit
from tests.helpers.sharded import Run, on_ranks, perform


def slow(batches, packing):
    """Text, visual, targets, padding of batches, spelled out."""
    total = defaultdict(int)
    for batch in batches:
        sizes = [g.shape[-2] * g.shape[-1] for g in batch.images.groups for _ in g]
        pixels = iter([[sizes[batch.images.order[i]]] for i in batch.image_index])
        samples = []
        for ids, targets in zip(batch.input_ids, batch.labels, strict=True):
            visuals = [next(pixels) for token in ids if token == -200]
            samples.append((ids.tolist(), targets.tolist(), [0] * len(ids), visuals))
        found, _ = slow_counts(samples, [n for n, w in enumerate(batch.scale_weights) if w], [], packing)
        for name, value in found.items():
            total[name] += value
        total["stills"] += len(sizes)
    return total


@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_report_is_the_mean_of_its_steps(instruction_set, tmp_path, packing, accumulate):
    options = {"model": {"packing": packing, "scales_per_step": 2}, "accumulate_grad_batches": accumulate}
    _, lit, _, batches = watched_fit(instruction_set, tmp_path, limit_val_batches=0, max_epochs=-1, **options)
    rows = logged(tmp_path)
    assert [row["step"] for row in rows] == [2, 5]  # steps 3 and 6, as Lightning counts
    assert len(batches) == 6 * accumulate
    for row, own in zip(rows, (batches[: 3 * accumulate], batches[3 * accumulate :]), strict=True):
        expected = slow(own, packing)
        assert row["tokens/visual"] == pytest.approx(expected["visual"] / 3)
        assert row["tokens/text"] == pytest.approx(expected["text"] / 3)
        assert row["tokens/label"] == pytest.approx(expected["labels"] / 3)
        assert row["tokens/padding"] == pytest.approx(expected["padding"] / 3)
        assert row["images/stills"] == pytest.approx(expected["stills"] / 3)
        assert row["images/pixels_per_visual_token"] == pytest.approx(expected["shown_pixels"] / expected["visual"])
        flops = sum(lit.costs.step(batch).total.training for batch in own)
        assert row["speed/TFLOPS_per_device"] * row["speed/step_ms"] * 3 == pytest.approx(flops / 1e9)
        positions = expected["visual"] + expected["text"]
        assert row["speed/tokens_per_s"] * row["speed/step_ms"] * 3 / 1000 == pytest.approx(positions)
    assert (sum(row["tokens/padding_share"] for row in rows) > 0) == (packing == "padded")


def test_the_last_interval_may_be_shorter(instruction_set, tmp_path):
    _, _, _, batches = watched_fit(instruction_set, tmp_path, limit_val_batches=0, max_steps=7, max_epochs=-1)
    rows = logged(tmp_path)
    assert [row["step"] for row in rows] == [2, 5, 6]
    assert rows[-1]["tokens/text"] == slow(batches[6:], "packed")["text"]


def test_a_resumed_run_counts_its_own_steps(instruction_set, tmp_path):
    """Stopped behind the second of three steps: what follows it is the mean of what follows."""
    trainer, *_ = watched_fit(instruction_set, tmp_path / "before", limit_val_batches=0, max_steps=2, max_epochs=-1)
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    again = {"ckpt_path": tmp_path / "stopped.ckpt", "max_steps": 3, "max_epochs": -1}
    _, _, _, batches = watched_fit(instruction_set, tmp_path / "after", limit_val_batches=0, **again)
    [row] = logged(tmp_path / "after")
    assert row["step"] == 2
    assert row["tokens/text"] == slow(batches, "packed")["text"]


class Slowed(TokenEfficiency):
    """By the clock, the LLM takes 100 ms of every training batch, the optimizer 80 of every step, and validation a
    minute a batch."""

    def __init__(self, hands):
        super().__init__(repetitions=0)
        self.hands = hands

    def on_train_start(self, trainer, lit):
        super().on_train_start(trainer, lit)
        forward = forward_by(self.hands, 0.1)
        lit.vlm.llm.base_model.register_forward_hook(lambda llm, *_: forward() if llm.training else None)
        trainer.optimizers[0].register_step_post_hook(forward_by(self.hands, 0.08))

    def on_validation_batch_end(self, *arguments):
        super().on_validation_batch_end(*arguments)
        self.hands[0] += 60


def test_validation_is_no_training(instruction_set, tmp_path, monkeypatch, hands):
    asked = []
    for name in ("note", "forget"):
        monkeypatch.setattr(PeakMemory, name, lambda self, name=name: asked.append(name))
    options = {"max_steps": 4, "log_every_n_steps": 1, "val_check_interval": 1, "max_epochs": -1}
    watched_fit(instruction_set, tmp_path, Slowed(hands), **options)
    assert [row["speed/step_ms"] for row in logged(tmp_path)] == pytest.approx([180] * 4)
    assert asked == ["note", "forget"] * 4


@pytest.mark.parametrize("between", [{"limit_val_batches": 0}, {"val_check_interval": 3}])
def test_the_parts_of_a_step_are_those_of_all_its_batches(instruction_set, tmp_path, hands, between):
    """Also where validation came between the batches of a step: then another step is watched."""
    options = {"max_steps": 4, "log_every_n_steps": 1, "max_epochs": -1, **between}
    watched_fit(instruction_set, tmp_path, Slowed(hands), accumulate_grad_batches=2, **options)
    rows = logged(tmp_path)
    assert "parts/llm_ms" not in rows[0]  # the first step has more to do
    watched = [row for row in rows if "parts/llm_ms" in row]
    assert watched
    for row in watched:
        times = [row[name] for name in ("parts/llm_ms", "parts/other_ms", "speed/step_ms")]
        assert times == pytest.approx([200, 80, 280])
        assert row["parts/encoder_ms"] == row["parts/projector_ms"] == 0


def test_padding_of_images_and_tokens_per_image():
    """One image of 60×50, encoded as 64×64, and one of 64×64, at all scales."""
    sizes, numbers = {(60, 50): 1, (64, 64): 1}, Meter(SCALES, 16, None)
    samples = [sample for sample in random_samples(0, 40) if len(sample[2]) == 1]
    chosen = [next(s for s in samples if tuple(s[2][0].shape[1:]) == size) for size in sizes]
    batch = packed(batch_of(*chosen))
    batch.counts = counts_of(batch, SCALES)
    numbers.add(batch)
    found = report({**numbers.take(), "seconds": 1.0, "peak_flops": math.nan}, 1, 1, SCALES)
    assert found["images/stride_padding_share"] == pytest.approx(1 - (3000 + 4096) / (2 * 4096))
    assert found["tokens/visual_per_image"] == pytest.approx(7)
    assert found["tokens/visual_per_image_p95"] == 16
    assert found["images/pixels_per_visual_token"] == pytest.approx(3 * (3000 + 4096) / 42)


def test_percentiles_of_counted_values():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        values, times = [576, 144, 36, 9, 1], rng.integers(0, 20, 5)
        times[rng.integers(5)] += 1
        expected = np.percentile(np.repeat(values, times), 95, method="inverted_cdf")
        assert percentile(values, times.tolist(), 95) == expected


def test_a_training_step_reads_no_tensor():
    """On `meta` nothing can be read: what would make a GPU wait ends in an error there."""
    vlm = packing_vlm()
    for packing in ("packed", "padded"):
        batch = packed(batch_of(*random_samples(0)), packing)
        batch.counts = counts_of(batch, SCALES)
        batch = apply_to_collection(batch, Tensor, Tensor.to, "meta")
        costs = Costs(vlm)
        numbers = Meter(SCALES, 16, costs)
        numbers.add(batch)
        with pytest.raises(RuntimeError, match="meta"):
            batch.input_ids[0].sum().item()
        taken = numbers.take()
        assert sum(taken[f"{part}_flops"] for part in PARTS) == costs.step(batch).total.training
    batch.counts = None
    with pytest.raises((TypeError, RuntimeError), match="meta"):
        costs.step(batch)


def test_nothing_of_a_step_is_waited_for(instruction_set, tmp_path, monkeypatch):
    """The hooks of a step never ask a tensor for its value; the module's own do."""
    inside, asked = [], []
    for name in ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__"):
        original = getattr(Tensor, name)

        def spied(self, *arguments, original=original, name=name, **named):
            asked.extend([(inside[-1], name)] if inside else [])
            return original(self, *arguments, **named)

        monkeypatch.setattr(Tensor, name, spied)
    callback = TokenEfficiency(peak_tflops=1.0)
    for name in ("on_train_batch_start", "on_before_backward", "on_after_backward", "on_train_batch_end"):
        original = getattr(callback, name)

        def hook(*arguments, original=original, name=name):
            inside.append(name)
            original(*arguments)
            inside.pop()

        setattr(callback, name, hook)
    watched_fit(instruction_set, tmp_path, callback, limit_val_batches=0, log_every_n_steps=2)
    assert len(logged(tmp_path)) == 3
    assert not asked


def test_batches_that_nobody_counted_are_refused():
    batch = packed(batch_of(*random_samples(0)))
    with pytest.raises(ValueError, match=r"expected Batch.counts.*counts_of"):
        Meter(SCALES, 16, None).add(batch)


class Loader:
    waited = 0.0


def test_pauses_are_no_training(hands):
    """Two steps of 2 s with 1 s between them, of which 0.4 is a wait; then validation; then a new loader."""
    clock, loader = Clock(), Loader()
    loader.waited = 7.0  # the first batch, before training began
    clock.start(loader)
    hands[0] += 2
    clock.end()
    hands[0] += 1
    loader.waited += 0.4
    clock.start(loader)
    hands[0] += 2
    clock.end()
    assert clock.take() == {"seconds": pytest.approx(12), "waited": pytest.approx(7.4)}
    clock.pause()
    hands[0] += 60
    loader.waited += 0.5
    clock.start(loader)
    hands[0] += 2
    clock.end()
    assert clock.take() == {"seconds": pytest.approx(2.5), "waited": pytest.approx(0.5)}
    clock.pause()
    fresh = Loader()
    fresh.waited = 0.25
    hands[0] += 9
    clock.start(fresh)
    assert clock.take() == {"seconds": pytest.approx(0.25), "waited": pytest.approx(0.25)}


def test_a_pause_within_a_batch_ends_it(hands):
    clock = Clock()
    clock.start(Loader())
    hands[0] += 2
    clock.pause()
    hands[0] += 60
    clock.end()
    assert clock.take()["seconds"] == pytest.approx(2)


def test_a_loader_that_does_not_tell_is_no_wait_of_zero(hands):
    clock = Clock()
    clock.start(object())
    hands[0] += 2
    clock.end()
    assert clock.take() == {"seconds": 2}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_slow_set_is_seen_as_waiting(instruction_set, tmp_path, monkeypatch, hands, workers):
    """By the clock every batch is 400 ms late, and a step takes 180 more."""
    load = DataLoader.__iter__

    def late(self):
        for batch in load(self):
            hands[0] += 0.4
            yield batch

    monkeypatch.setattr(DataLoader, "__iter__", late)
    slowed = Slowed(hands)
    watched_fit(instruction_set, tmp_path, slowed, data={"num_workers": workers}, limit_val_batches=0, max_steps=3)
    [row] = logged(tmp_path)
    assert row["speed/data_wait_share"] == pytest.approx(400 / 580)
    assert row["speed/step_ms"] == pytest.approx(580)


def test_parts_take_what_they_take(hands):
    """Each part puts the clock forward in its forward and its backward pass, and shows just that."""
    vlm = packing_vlm().train()
    batch = packed(batch_of(*random_samples(2)))
    groups = len(batch.images.groups)
    assert groups > 1  # encoder and projector take turns
    for layer, seconds in ((vlm.encoder.trunk.stem, 3), (vlm.projector.layers, 2), (vlm.llm.model.layers[0], 10)):
        slow_down(layer, hands, seconds)
    times = PartTimes(torch.device("cpu"))
    for _ in range(2):
        times.start(vlm)
        hands[0] += 1
        total = vlm(batch).loss
        times.mark("llm")
        total.backward()
        times.mark("other")
        hands[0] += 4
        times.stop()
        expected = {"encoder": 6000 * groups, "projector": 4000 * groups, "llm": 20000, "other": 5000}
        assert times.take() == pytest.approx(expected)
    vlm(batch)  # nobody watches any more
    assert times.take() is None


def test_frozen_parts_take_their_forward_pass_alone(hands):
    vlm = packing_vlm().train()
    vlm.encoder.requires_grad_(False)
    vlm.projector.requires_grad_(False)
    for layer, seconds in ((vlm.encoder.trunk.stem, 3), (vlm.projector.layers, 2), (vlm.llm.model.layers[0], 10)):
        slow_down(layer, hands, seconds)
    times, batch = PartTimes(torch.device("cpu")), packed(batch_of(*random_samples(2)))
    times.start(vlm)
    vlm(batch).loss.backward()
    times.stop()
    groups = len(batch.images.groups)
    expected = {"encoder": 3000 * groups, "projector": 2000 * groups, "llm": 20000, "other": 0}
    assert times.take() == pytest.approx(expected)


class Later(torch.autograd.Function):
    """Does nothing but put the clock forward."""

    @staticmethod
    def forward(ctx, x, hands, seconds):
        ctx.hands, ctx.seconds = hands, seconds
        hands[0] += seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.hands[0] += ctx.seconds
        return gradient, None, None


def slow_down(layer, hands, seconds):
    def forward(*arguments, original=layer.forward, **named):
        found = original(*arguments, **named)
        if isinstance(found, tuple):
            return Later.apply(found[0], hands, seconds), *found[1:]
        return Later.apply(found, hands, seconds)

    layer.forward = forward


def test_text_alone_is_the_llms():
    vlm = packing_vlm().train()
    samples = [sample for sample in random_samples(0, 30) if not sample[2]]
    times = PartTimes(torch.device("cpu"))
    times.start(vlm)
    total = vlm(packed(batch_of(*samples))).loss
    times.mark("llm")
    total.backward()
    times.stop()
    assert set(times.take()) == {"other", "llm"}


def test_events_of_a_gpu_are_read_when_they_lie_behind(monkeypatch):
    """Fake events: nobody synchronizes before the last one is done."""
    done, waited = [False], []

    class Event:
        made = 0

        def __init__(self, enable_timing):
            Event.made += 1
            self.at = Event.made

        def record(self):
            pass

        def query(self):
            return done[0]

        def synchronize(self):
            waited.append(done[0])

        def elapsed_time(self, other):
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    times, vlm = PartTimes(torch.device("cuda")), tiny_vlm()
    times.start(vlm)
    times.mark("encoder")
    times.stop()
    assert times.take() is None
    assert not waited
    done[0] = True
    assert times.take() == {"other": 1, "encoder": 1}
    assert waited == [True]
    assert Stopwatch(torch.device("cuda")).done


def test_an_unknown_device_has_no_mfu(instruction_set, tmp_path, caplog):
    with caplog.at_level("INFO"):
        watched_fit(instruction_set, tmp_path, limit_val_batches=0)
    assert not any("MFU" in name for row in logged(tmp_path) for name in row)
    assert caplog.text.count("no MFU: the peak of") == 1
    assert all(row["speed/TFLOPS_per_device"] > 0 for row in logged(tmp_path))


def test_a_given_peak_and_a_known_device_have(instruction_set, tmp_path, monkeypatch):
    watched_fit(instruction_set, tmp_path / "given", TokenEfficiency(peak_tflops=0.5), limit_val_batches=0)
    monkeypatch.setattr(token_efficiency, "device_name", lambda device: "NVIDIA H200")
    watched_fit(instruction_set, tmp_path / "known", limit_val_batches=0)
    for folder, peak in (("given", 0.5), ("known", 66.9)):
        for row in logged(tmp_path / folder):
            assert row["speed/MFU"] == pytest.approx(row["speed/TFLOPS_per_device"] / peak)
            shares = [row[f"parts/{part}_FLOPs_share"] for part in PARTS]
            assert sum(shares) == pytest.approx(1)
            whole = [
                row[f"parts/{part}_MFU"] * row[f"parts/{part}_ms"] / share
                for part, share in zip(PARTS, shares, strict=True)
            ]
            assert whole == pytest.approx([whole[0]] * 3)  # FLOPs of the step, by each part's share


def test_an_llm_of_unknown_costs_is_counted_all_the_same(instruction_set, tmp_path, caplog):
    model = {"llm": tiny_llm("MistralConfig", sliding_window=8)}
    with caplog.at_level("INFO"):
        watched_fit(instruction_set, tmp_path, TokenEfficiency(peak_tflops=1.0), model)
    assert "costs of MistralForCausalLM are not known" in caplog.text
    assert "may not keep a plain KV cache" in caplog.text
    [row, _] = logged(tmp_path)
    assert row["speed/tokens_per_s"] > 0
    assert not any("FLOP" in name or "MFU" in name for name in row)


STEPS_OF_A_RUN = ("tokens/", "images/")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The same batches in one process and shared between two, by every strategy; both log into a file."""
    root = tmp_path_factory.mktemp("ranks")
    runs = {name: watched(root / name, name) for name in ("auto", "ddp", "fsdp")}
    perform(runs.pop("auto"))
    on_ranks(2, list(runs.values()))
    return root


def watched(folder, strategy) -> Run:
    folder.mkdir()
    options = {"log_every_n_steps": 2, "logger": CSVLogger(folder)}
    whole = strategy in ("auto", "ddp")
    return Run(folder, strategy, trainer=options, watch=[TokenEfficiency(peak_tflops=2.0)], test=whole)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_count_what_one_process_counts(ranks, strategy):
    alone, shared = logged(ranks / "auto"), logged(ranks / strategy)
    assert len(alone) == len(shared) == 2
    for one, two in zip(alone, shared, strict=True):
        names = [name for name in one if name.startswith(STEPS_OF_A_RUN)]
        assert len(names) >= 10
        assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names})
        flops = [row["speed/TFLOPS_per_device"] * row["speed/step_ms"] for row in (one, two)]
        assert 2 * flops[1] == pytest.approx(flops[0])
        assert two["speed/MFU"] == pytest.approx(two["speed/TFLOPS_per_device"] / 2)  # two devices of 2 TFLOP/s


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_judge_what_one_process_judges(ranks, strategy):
    [one], [two] = (logged(ranks / name, "scale/prompt_tokens@16") for name in ("auto", strategy))
    names = [name for name in one if name.startswith("scale/") and not name.split("@")[0].endswith("_ms")]
    assert len(names) == 3 * 4
    assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names})
    assert one["scale/first_token_ms@4"] > 0
    assert ("scale/first_token_ms@4" in two) == (strategy == "ddp")  # a sharded model is not timed


@pytest.mark.slow
def test_two_ranks_write_one_json(ranks):
    one, two = (
        json.loads(next((ranks / name).glob("**/accuracy_tokens.json")).read_text()) for name in ("auto", "ddp")
    )
    assert one["questions"] == two["questions"] == 4
    for name in ("area", "smallest_within_a_point", "majority_answer"):
        assert one[name] == two[name]
    assert (one["run"]["devices"], two["run"]["devices"]) == (1, 2)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Fit, validate and test of a run: (its folder, the result in memory, what validation logged)."""
    root, callback = tmp_path_factory.mktemp("judged"), TokenEfficiency(peak_tflops=3.0)
    trainer, lit, data, _ = watched_fit(
        write_instruction_set(root), root / "log", callback, val_check_interval=2, max_epochs=-1
    )
    trainer.test(lit, data, verbose=False)
    return root / "log", callback, trainer


def test_json_holds_quality_cost_and_where_it_was_measured(judged):
    folder, _, trainer = judged
    found = json.loads(next(folder.glob("**/accuracy_tokens.json")).read_text())
    assert [row["visual_tokens"] for row in found["scales"]] == [16, 4, 1]
    for row in found["scales"]:
        assert row["accuracy"] == trainer.callback_metrics[f"test/accuracy@{row['scale']}"].item()
        assert row["mean_visual_tokens"] == row["visual_tokens"]  # every record shows one image
        assert row["accuracy_per_tflop"] == 1e12 * row["accuracy"] / (row["encode_flops"] + row["prefill_flops"])
        for name in ("encode_ms", "first_token_ms", "further_token_ms"):
            assert 0 < row["measured"][name]["q1"] <= row["measured"][name]["median"] <= row["measured"][name]["q3"]
        assert row["measured"]["peak_bytes"] is None  # there is no such figure on a CPU
    assert found["timed"] | {"height": 0, "width": 0} == {
        **{"images": 1, "height": 0, "width": 0, "new_tokens": 3, "batch_size": 1},
        **{"repetitions": 5, "warm_up": 2},
    }
    own = found["run"]
    assert own["batch_size"] | {"training_tokens": 0, "training_pixels": 0} == {
        **{"training_records": 4, "training_tokens": 0, "training_pixels": 0, "evaluation_records": 4},
    }
    assert (own["packing"], own["precision"], own["peak_tflops"], own["devices"]) == ("packed", "32-true", 3.0, 1)
    assert own["dtype"] == {"encoder": "float32", "projector": "float32", "llm": "float32"}
    assert {"python", "torch", "transformers", "timm", "lightning", "lit_mm"} == set(own["versions"])
    assert found["questions"] == 8
    assert 0 < found["majority_answer"] < 1


def test_the_last_validation_of_a_fit_is_kept_as_well(judged):
    folder, *_ = judged
    found = json.loads(next(folder.glob("**/accuracy_tokens_val.json")).read_text())
    assert (found["split"], found["step"]) == ("val", 6)
    assert found["area"] == logged(folder, "val/accuracy_area")[-1]["val/accuracy_area"]
    assert next(folder.glob("**/accuracy_tokens_val.png")).read_bytes().startswith(b"\x89PNG")


def test_a_test_of_nothing_says_so(instruction_set, tmp_path):
    """Images that went away after a set was opened, left out as asked."""
    trainer, lit, data, _ = watched_fit(instruction_set, tmp_path, data={"on_bad_record": "skip"}, limit_val_batches=0)
    data.setup("test")
    for file in (instruction_set / "images").iterdir():
        file.unlink()
    with pytest.warns(UserWarning, match="nothing was evaluated"):
        trainer.test(lit, data, verbose=False)


def test_a_trial_of_one_batch_leaves_no_files(instruction_set, tmp_path, capsys):
    watched_fit(instruction_set, tmp_path, fast_dev_run=True, default_root_dir=tmp_path)
    assert "Validation at step 1" in capsys.readouterr().out
    assert not list(tmp_path.rglob("accuracy_tokens*"))


def test_nothing_is_timed_where_nobody_wants_it(instruction_set, tmp_path, caplog):
    with caplog.at_level("INFO"):
        watched_fit(instruction_set, tmp_path, TokenEfficiency(repetitions=0))
    assert "answers are not timed: token_efficiency.repetitions is 0" in caplog.text
    [row] = logged(tmp_path, "scale/prompt_tokens@16")
    assert not any("_ms@" in name for name in row)


def test_questions_of_several_images_are_timed_with_enough_of_them(instruction_set, tmp_path):
    items = json.loads((instruction_set / "train.json").read_text())
    (instruction_set / "val.json").write_text(json.dumps([items[0], items[12]]))
    callback = TokenEfficiency(repetitions=2)
    watched_fit(instruction_set, tmp_path, callback)
    assert callback.last["scales"][0]["mean_visual_tokens"] == pytest.approx(4 * 16 / 3)  # three questions
    assert callback.last["timed"]["images"] == 2


def test_text_alone_has_no_curve_over_tokens(instruction_set, tmp_path):
    items = json.loads((instruction_set / "train.json").read_text())
    (instruction_set / "val.json").write_text(json.dumps(items[13:]))
    callback = TokenEfficiency()
    watched_fit(instruction_set, tmp_path, callback)
    assert callback.last["area"] is None
    assert callback.last["timed"] is None


def test_what_one_run_judged_is_not_shown_for_the_next(judged):
    *_, trainer = judged
    callback = TokenEfficiency()
    callback.last = result()
    callback.setup(trainer, trainer.lightning_module, "validate")
    assert callback.last is None


def test_a_run_goes_on_where_memory_does_not_suffice_for_timing(instruction_set, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(timing.AnswerTimer, "__call__", full)
    callback = TokenEfficiency()
    with caplog.at_level("INFO"):
        watched_fit(instruction_set, tmp_path, callback)
    assert "answers are not timed: out of memory" in caplog.text
    assert [row["measured"] for row in callback.last["scales"]] == [None] * 3


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_the_cache_is_as_large_as_a_real_one(instruction_set, tmp_path, precision):
    callback = TokenEfficiency(repetitions=0)
    trainer, lit, _, _ = watched_fit(instruction_set, tmp_path, callback, precision=precision)
    with torch.no_grad(), trainer.precision_plugin.val_step_context():
        embeddings = lit.vlm.llm.get_input_embeddings()(torch.zeros(1, 10, dtype=torch.long))
        cache = lit.vlm.llm(inputs_embeds=embeddings, use_cache=True).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 10
    for row in callback.last["scales"]:
        assert row["kv_bytes"] == pytest.approx(row["prompt_tokens"] * real)


@pytest.mark.parametrize("peak", [0, -1.0, math.nan])
def test_a_peak_is_more_than_nothing(peak):
    with pytest.raises(ValueError, match="peak_tflops: expected more than 0"):
        TokenEfficiency(peak_tflops=peak)


@pytest.mark.parametrize("repetitions", [1, -1])
def test_too_few_repetitions_are_refused(repetitions):
    with pytest.raises(ValueError, match=f"repetitions: expected 0 or at least 2, found {repetitions}"):
        TokenEfficiency(repetitions=repetitions)


def test_validation_is_logged_at_every_level(judged):
    folder, *_ = judged
    rows = logged(folder, "scale/visual_tokens@16")
    assert [row["step"] for row in rows] == [1, 3, 5]
    for row in rows:
        assert [row[f"scale/visual_tokens@{scale}"] for scale in (16, 4, 1)] == [16, 4, 1]
        assert all(row[f"scale/{name}_ms@{scale}"] > 0 for name in ("encode", "first_token") for scale in (16, 4, 1))
        assert row["scale/KV_MiB@16"] > row["scale/KV_MiB@1"] > 0
    kept = json.loads(next(folder.glob("**/accuracy_tokens_val.json")).read_text())
    assert all(
        row["loss"] == pytest.approx(logged(folder, "val/loss@16")[-1][f"val/loss@{row['scale']}"])
        for row in kept["scales"]
    )


def result(accuracies=(0.9, 0.7, 0.5), **figures):
    rows = [
        {"scale": str(scale), "visual_tokens": scale, "accuracy": accuracy, "measured": None, **figures}
        | {"interval": [accuracy - 0.02, accuracy + 0.03]}
        for scale, accuracy in zip((16, 4, 1), accuracies, strict=True)
    ]
    return {
        **{"split": "test", "step": 2800, "questions": 4, "majority_answer": 0.5, "area": 0.7},
        **{"smallest_within_a_point": "16", "scales": rows, "types": {}, "timed": None, "run": {"device": "a device"}},
    }


def test_picture_and_table_show_every_scale(tmp_path):
    [axes] = draw(result()).axes
    assert list(axes.lines[0].get_xdata()) == [16, 4, 1]
    assert np.allclose(axes.lines[0].get_ydata(), [90, 70, 50])
    assert list(axes.lines[1].get_xydata()[0]) == [16, 90]  # the ring
    assert axes.lines[2].get_ydata()[0] == 50
    assert table(result()).row_count == 4
    assert table(result()).title == "Test at step 2,800: accuracy on 4 questions"
    draw(result()).savefig(tmp_path / "picture.png")
    picture = np.asarray(Image.open(tmp_path / "picture.png").convert("L"))
    assert (picture < 200).mean() > 0.005  # something is drawn
    assert "| 4 | 70.00 ± 2.50 |" in markdown(result())
    [bars] = [each for each in axes.collections if len(each.get_segments()) == 3]
    assert np.allclose([segment[:, 1] for segment in bars.get_segments()], [[88, 93], [68, 73], [48, 53]])


def test_times_are_drawn_beside_accuracies():
    times = {
        name: {"median": value, "q1": value, "q3": value} for name, value in (("encode_ms", 3), ("first_token_ms", 5))
    }
    made = result(measured={**times, "further_token_ms": {"median": 2, "q1": 1, "q3": 3}, "peak_bytes": 2**30})
    made["timed"] = {"images": 1, "height": 64, "width": 64}
    _, axes = draw(made).axes
    bars = [bar for container in axes.containers for bar in getattr(container, "patches", [])]
    assert sorted({bar.get_height() for bar in bars}) == [2, 3]
    assert "3 (0)" in markdown(made)
    assert "1 GiB" in markdown(made)


def test_a_line_for_every_time_scale():
    made = result()
    scales = [(8, 4, 0.9), (8, 1, 0.8), (2, 4, 0.6), (2, 1, 0.5)]
    made["scales"] = [
        {"scale": f"{f}x{t}", "frames": f, "visual_tokens": f * t, "accuracy": a, "interval": [a, a], "measured": None}
        for f, t, a in scales
    ]
    made["smallest_within_a_point"] = "8x4"
    [axes] = draw(made).axes
    assert [line.get_label() for line in axes.lines[:2]] == ["8 sets of frames", "2 sets of frames"]
    assert [list(line.get_xdata()) for line in axes.lines[:2]] == [[32, 8], [8, 2]]
    assert np.allclose(axes.lines[1].get_ydata(), [60, 50])
    assert next(iter(table(made).columns[0].cells)) == "8 x 4 = 32"


def test_types_of_questions_have_lines_and_are_told_in_short():
    """By hand: with 4 tokens `wide` is within a point of its best, `fine` is not."""
    made = result()
    types = {"fine": [0.99, 0.9, 0.1], "wide": [0.955, 0.95, 0.92]}
    made["types"] = {name: {"questions": 2, "accuracy": own} for name, own in types.items()}
    lines = {line.get_label(): line for line in draw(made).axes[0].lines}
    assert np.allclose(lines["fine"].get_xydata(), [[16, 99], [4, 90], [1, 10]])
    assert np.allclose(lines["wide"].get_ydata(), [95.5, 95, 92])
    assert np.allclose(lines["all questions"].get_ydata(), [90, 70, 50])
    assert in_short(made) == [
        "16 tokens: 90.0 % · 4 tokens: 70.0 % · 1 token: 50.0 %",
        "wide needs 4 tokens (95.0 %; 92.0 % with 1 token); fine needs 16 tokens (99.0 %; 10.0 % with 1 token)",
    ]
    made["types"]["wide"]["accuracy"] = [0.955, 0.95, 0.951]
    assert in_short(made)[1].startswith("wide needs 1 token (95.1 %); fine")


def test_a_type_that_no_scale_answers_is_called_so():
    """Up to one point: within it, every scale is as good as the best."""
    made = result()
    types = {"easy": [0.9, 0.9, 0.9], "never": [0.0, 0.0, 0.0], "rarely": [0.004, 0.01, 0.0], "seldom": [0.02, 0, 0]}
    made["types"] = {name: {"questions": 2, "accuracy": own} for name, own in types.items()}
    told = "easy needs 1 token (90.0 %); no scale answers never (at most 0.0 %); no scale answers rarely "
    told += "(at most 1.0 %); seldom needs 16 tokens (2.0 %; 0.0 % with 1 token)"
    assert in_short(made)[1] == told


@pytest.mark.parametrize("count", [0, 1, 7])
def test_one_type_or_many_have_no_lines(count):
    made = result()
    made["types"] = {f"type {n}": {"questions": 2, "accuracy": [0.9, 0.7, 0.5]} for n in range(count)}
    assert in_short(made) == []
    assert len(draw(made).axes[0].lines) == len(draw(result()).axes[0].lines)


def test_each_validation_of_a_fit_is_one_line(instruction_set, tmp_path, capsys):
    trainer, *_ = watched_fit(instruction_set, tmp_path, max_steps=4, val_check_interval=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("validation at step")]
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    scales = [name.split("@")[1] for name in found if name.startswith("val/accuracy@")]
    accuracies = ", ".join(f"{100 * found[f'val/accuracy@{scale}']:.2f} @{scale}" for scale in scales)
    assert [line.split(":")[0] for line in lines] == ["validation at step 2", "validation at step 4"]
    assert lines[-1] == f"validation at step 4: loss {found['val/loss']:.3f}, accuracy % {accuracies}"
