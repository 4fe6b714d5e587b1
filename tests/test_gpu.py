"""What only a GPU computes: its attention kernels in training and in generation, against slow ways and the CPU."""

import copy
import json
import time
from itertools import product
from math import isfinite
from statistics import median

import pytest
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lit_mm.data.collate import group_by_size
from lit_mm.inference.decoding import settings
from lit_mm.inference.generation import generate
from tests.helpers.batches import SCALES, batch_of, packed, random_samples
from tests.helpers.command_line import CONFIG, lit_mm_anew
from tests.helpers.models import gradients, packing_vlm, packing_vlm64
from tests.helpers.questions import pictures, questions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
WIDE_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
"""16 channels a head, the fewest that FlexAttention's kernel takes."""


def on_gpu(batch):
    return apply_to_collection(batch, Tensor, Tensor.to, "cuda")


def apart(found, expected) -> float:
    """The largest difference between two gradients of a parameter, relative to their length."""
    pairs = [(a.double().cpu(), b.double().cpu()) for a, b in zip(found, expected, strict=True)]
    return max(float((a - b).norm() / (b.norm() + 1e-6)) for a, b in pairs)


@pytest.mark.parametrize("packing", ["packed", "sequential"])
@pytest.mark.parametrize("source", ["LlamaConfig", "Qwen3Config"])
def test_branches_are_exact_in_float64_and_equal_the_cpus(source, packing):
    vlm = packing_vlm64(source=source)
    batch = packed(batch_of(*random_samples(0)), packing)
    at_home = vlm(batch)
    expected = gradients(at_home.loss, vlm)
    vlm.cuda()
    fast, slow = vlm(on_gpu(batch)), vlm.reference(on_gpu(batch))
    assert torch.allclose(fast.per_scale, slow.per_scale, rtol=1e-10)
    assert torch.allclose(fast.per_scale.cpu(), at_home.per_scale, rtol=1e-10)
    found = gradients(fast.loss, vlm)
    assert apart(found, gradients(slow.loss, vlm)) < 1e-8
    assert apart(found, expected) < 1e-5  # padding has no variance: LayerNorm multiplies other rounding there


DTYPES = {"float32": (1e-5, 5e-3), "bfloat16": (1e-2, 0.1), "mixed": (1e-2, 0.1)}
"""How far losses and gradients may be from those of float32."""


@pytest.mark.parametrize("attention", ["branch", "flex"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_compute_the_loss_and_gradients_of_float32(attention, dtype):
    """Gradients of the LLM and the projector: the encoder multiplies its rounding by its gradients' size."""
    vlm = packing_vlm(**WIDE_HEADS).cuda()
    batch = on_gpu(packed(batch_of(*random_samples(0)), attention=attention))
    exact = vlm.reference(batch)
    expected = gradients(exact.loss, vlm)
    rounded = copy.deepcopy(vlm).to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == "mixed"):
        losses = rounded(batch)
    found = gradients(losses.loss, rounded)
    number = len(list(vlm.encoder.parameters()))
    assert torch.allclose(losses.per_scale, exact.per_scale, rtol=DTYPES[dtype][0])
    assert apart(found[number:], expected[number:]) < DTYPES[dtype][1]


def test_flex_is_compiled_once_for_all_layouts():
    """Past dynamo's limit of recompilations it would build every score matrix."""
    vlm = packing_vlm(**WIDE_HEADS).cuda()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for seed in range(12):
            batch = on_gpu(packed(batch_of(*random_samples(seed, 1 + seed)), attention="flex"))
            fast, slow = vlm(batch), vlm.reference(batch)
            assert torch.allclose(fast.per_scale, slow.per_scale, rtol=1e-4)
            fast.loss.backward()


def test_a_batch_with_new_lengths_takes_no_longer_than_one_with_known_lengths():
    """cuDNN's attention built a plan for each: a step of a real run took over 45 s instead of 0.6 s."""
    vlm = packing_vlm(**WIDE_HEADS).cuda().to(torch.bfloat16)
    batches = [on_gpu(packed(batch_of(*random_samples(seed)))) for seed in range(9)]

    def seconds(batch):
        start = time.perf_counter()
        vlm(batch).loss.backward()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    new = [seconds(batch) for batch in batches][1:]
    known = [seconds(batch) for batch in batches][1:]
    assert median(new) < 3 * median(known)


@pytest.mark.parametrize("sampled", [False, True])
def test_answers_together_equal_answers_alone_and_the_cpus(sampled):
    """In float64; the CPU and the GPU draw other random numbers."""
    vlm, asked = packing_vlm64(), [question for question in questions() if question.image_index]
    images = group_by_size([image[None] for image in pictures()])
    chosen = {"temperature": 1.5} if sampled else {}
    config = settings(vlm.llm, max_new_tokens=12, **chosen)
    at_home = generate(vlm, images, asked, SCALES, config, [347])
    vlm.cuda()
    together = generate(vlm, on_gpu(images), asked, SCALES, config, [347])
    for (number, question), (place, scale) in product(enumerate(asked), enumerate(SCALES)):
        found = together[number][place]
        [[alone]] = generate(vlm, on_gpu(images), [question], [scale], config, [347])
        assert found.ids == alone.ids
        assert found.logprobs == pytest.approx(alone.logprobs, abs=1e-9)
        assert sampled or found.ids == at_home[number][place].ids


RUNS = {
    "bf16-mixed": ["--trainer.precision=bf16-mixed"],
    "bf16-true": ["--trainer.precision=bf16-true"],
    "flex": ["--trainer.precision=bf16-mixed", "--model.attention=flex"],
    "recomputed": ["--trainer.precision=bf16-mixed", "--model.activation_checkpointing=[encoder,llm]"],
    "fsdp": ["--trainer.strategy=fsdp", "--trainer.precision=bf16-mixed"],
}


FILES = {"train": "train", "val": "val", "test": "val"}


@pytest.mark.slow
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_run_trains_goes_on_and_answers(options, instruction_set, tmp_path):
    config, root = tmp_path / "config.yaml", instruction_set
    config.write_text(CONFIG)
    words = [f"--config={config}", f"--trainer.default_root_dir={tmp_path / 'runs'}", *options]
    words += ["--trainer.accelerator=gpu", "--trainer.devices=1", "--trainer.log_every_n_steps=1"]
    words += ["--model.llm.config_overrides.num_attention_heads=2", f"--data.init_args.image_root={root}"]
    words += [f"--data.init_args.{split}={root / file}.json" for split, file in FILES.items()]
    lit_mm_anew("fit", *words)
    lit_mm_anew("fit", *words, "--trainer.max_steps=5", "--ckpt_path=last")
    lit_mm_anew("test", *words, "--ckpt_path=last")
    run = tmp_path / "runs/version_0"
    values = scalars_of(run)
    assert len(values["train/loss"]) == 5
    assert all(isfinite(value) for name in ("train/loss", "memory/allocated_GiB") for value in values[name])
    assert (run / "accuracy_tokens.json").is_file()
    checkpoint = next((run / "checkpoints").glob("last*"))
    if "fsdp" in options[0]:
        lit_mm_anew("export", str(checkpoint), str(tmp_path / "exported"))
        assert (tmp_path / "exported/model.safetensors").is_file()
        return
    picture = str(root / "images/0.png")
    printed = lit_mm_anew("ask", f"--ckpt_path={run}", "--json", "--tokens=all", picture, "what color is the shape?")
    answers = json.loads(printed.strip().splitlines()[-1])["answers"]
    assert [answers[scale]["visual_tokens"] for scale in ("16", "4", "1")] == [16, 4, 1]


def scalars_of(run):
    """TensorBoard's scalars of a run: name -> values."""
    events = EventAccumulator(str(run)).Reload()
    return {name: [each.value for each in events.Scalars(name)] for name in events.Tags()["scalars"]}
