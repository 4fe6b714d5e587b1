"""`profile` as a user meets it, against published figures and arithmetic."""

import json
import re
import socket
import time

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lit_mm.__main__ import main
from lit_mm.costs.flops import causal_pairs
from lit_mm.costs.timing import AnswerTimer, quartiles
from lit_mm.costs.units import in_bytes, in_flops
from lit_mm.model.scales import nested_shapes
from lit_mm.profile.experiment import Experiment, pooled_again, read_model
from lit_mm.profile.memory_plan import plan_of
from lit_mm.profile.report import without_common_start
from tests.helpers.clock import forward_by
from tests.helpers.environment import ROOT, TOKENIZER
from tests.helpers.models import tiny_vlm

VICUNA = {"name_or_path": "lmsys/vicuna-7b-v1.5", "chat_template": "vicuna_v1"}
CONVLLAVA = {
    "scales": [576, 144, 36, 9, 1],
    "encoder": {"class_path": "lit_mm.ConvNeXtEncoder", "init_args": {"extra_stages": [{}]}},
    "llm": VICUNA,
    "parts": {"encoder": {"from_stage": 3}},
    "activation_checkpointing": ["llm"],
}
LLAVA = {
    "scales": [576, 144, 36, 9, 1],
    "encoder": {"class_path": "lit_mm.TimmEncoder"},
    "llm": VICUNA,
    "parts": {"encoder": {"frozen": True}, "llm": {"lora": {"rank": 128}}},
}
LLM = {"name_or_path": "LlamaConfig", "tokenizer": TOKENIZER, "chat_template": "bare"}
LLM["config_overrides"] = "{num_hidden_layers: 1, hidden_size: 64, num_attention_heads: 4, intermediate_size: 96}"
SMALL_LLM = [word for name, value in LLM.items() for word in (f"--model.llm.{name}", value)]
QUICKSTART = str(ROOT / "experiments/quickstart.yaml")
LAYERS = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
"""Weights of Llama-7B's layers."""


def prefill(length: int) -> int:
    """FLOPs of Llama-7B over so many tokens, with logits of the last."""
    return 2 * LAYERS * length + 32 * 4 * 4096 * causal_pairs(length) + 2 * 4096 * 32000


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs profile without a network: (its JSON, what it printed)."""

    def refuse(*arguments, **named):
        raise AssertionError("profile asked the network")

    def call(*arguments: str):
        monkeypatch.chdir(ROOT)  # the quickstart's tokenizer has a relative path
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        main(["profile", *arguments, "--json", str(tmp_path / "figures.json")])
        return json.loads((tmp_path / "figures.json").read_text()), capsys.readouterr().out

    return call


@pytest.fixture
def configs(tmp_path):
    """Paths of two configs with data and trainer sections that no verb but this one would take."""
    paths = {}
    for name, model in (("convllava", CONVLLAVA), ("llava", LLAVA)):
        paths[name] = str(tmp_path / f"{name}.yaml")
        others = {"data": {"class_path": "Nothing", "init_args": {"train": "nowhere"}}, "trainer": {"max_steps": -3}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"model": model, **others}))
    return paths


def test_the_papers_models_in_one_call(run, configs, tmp_path):
    """PAPERS: GFLOPs and tokens of ConvLLaVA's encoder at its sizes, parameters; LLaVA-1.5 beside it."""
    picture = tmp_path / "costs.png"
    started = time.process_time()
    found, printed = run(
        *("--config", configs["convllava"], "--sizes", "768", "1024", "1536", "768x1024"),
        *("--and", "--config", configs["llava"], "--name", "LLaVA-1.5", "--plot", str(picture)),
    )
    assert time.process_time() - started < 60
    conv, llava = found
    assert (conv["name"], llava["name"]) == ("convllava", "LLaVA-1.5")
    assert [round(at["scales"][0]["encoder_flops"] / 1e9, 1) for at in conv["sizes"]] == [944.0, 1678.2, 3775.9, 1258.6]
    assert [[row["visual_tokens"] for row in at["scales"]] for at in conv["sizes"]] == [
        [144, 36, 9, 1],
        [256, 64, 16, 4, 1],
        [576, 144, 36, 9, 1],
        [192, 48, 12, 1],
    ]
    assert round(conv["parameters"]["encoder"] / 1e6, 2) == 669.16
    assert conv["weight_bytes"] == 2 * sum(conv["parameters"].values())
    assert [(at["height"], at["width"], at["grid"]) for at in llava["sizes"]] == [(336, 336, [24, 24])]
    assert "scales [576] do not divide a 12×12 grid" in printed
    for words in ("944 G", "1.678 T", "3.776 T", "13.85 GiB", "lmsys/vicuna-7b-v1.5"):
        assert words in printed, words
    assert Image.open(picture).size[0] > 1000


def test_the_llms_share_is_arithmetic(run, configs):
    [own], _ = run("--config", configs["llava"], "--prompt", "30", "--new-tokens", "3")
    [at] = own["sizes"]
    none = at["text_only"]
    assert none["prefill_flops"] == prefill(30)
    assert none["total_flops"] == prefill(30) + sum(prefill(n) - prefill(n - 1) for n in (31, 32)) + 4 * 4096 * 32000
    for row in at["scales"]:
        length = row["visual_tokens"] + 30
        assert row["prefill_flops"] == prefill(length)
        assert row["kv_bytes"] == length * 2 * 32 * 4096 * 2  # keys and values, 32 layers, 16 bit
        assert row["decode_flops_per_token"] * 2 == row["decode_flops"]
        parts = row["encoder_flops"] + row["projector_flops"] + row["prefill_flops"] + row["decode_flops"]
        assert row["total_flops"] == parts
        assert row["visual_share"] == (parts - none["total_flops"]) / parts


def test_training_costs_what_the_parts_say(run, configs):
    """A frozen encoder costs its forward pass, LoRA's LLM no gradients of its own weights; ConvLLaVA's
    from stage 3 on three times what these stages cost and once what comes before."""
    found, _ = run("--config", configs["convllava"], "--sizes", "768", "--and", "--config", configs["llava"])
    conv, llava = ((own["sizes"][0]["training"], own["sizes"][0]["scales"][0]) for own in found)
    assert llava[0]["encoder_flops"] == llava[1]["encoder_flops"]
    adapters = 2 * 128 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    rows, pairs = 766 + 5 * 128, sum(causal_pairs(scale + 128) for scale in (576, 144, 36, 9, 1))
    attention = 32 * 4 * 4096 * pairs
    assert llava[0]["packed_tokens"] == rows
    assert llava[0]["llm_flops"] == rows * (2 * 2 * LAYERS + 3 * adapters) + 3 * attention
    assert 1 < conv[0]["encoder_flops"] / conv[1]["encoder_flops"] < 3
    assert 0.7 < conv[0]["recompute_flops"] / (conv[0]["llm_flops"] / 3) < 1
    assert llava[0]["recompute_flops"] == 0
    assert 1.5 < llava[0]["total_flops"] / llava[0]["finest_alone_flops"] < 2.1


@pytest.mark.parametrize(
    ("grid", "scales"),
    [
        ((24, 24), [576, 144, 36, 9, 1]),
        ((16, 16), [256, 64, 16, 4, 1]),
        ((12, 12), [144, 36, 9, 1]),
        ((24, 18), [432, 108, 12, 1]),
        ((24, 17), [408, 1]),
        ((1, 1), [1]),
    ],
)
def test_pooling_again_and_again(grid, scales):
    """M3's windows: 2×2, 2×2, 2×2, 3×3."""
    assert pooled_again(*grid) == scales
    nested_shapes(*grid, tuple(scales))


def test_overlays_and_fields_win(tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model: {scales: [16, 1], llm: {sizes: {hidden_size: 64}}, max_new_tokens: 9}")
    model = read_model([QUICKSTART, str(overlay)], ["--model.encoder.drop_path", "0.25", "--model.max_new_tokens", "5"])
    assert (model.scales, model.max_new_tokens) == ([16, 1], 5)
    assert model.llm.config_overrides["hidden_size"] == 64
    assert model.encoder().trunk.stages[-2].blocks[0].drop_path.drop_prob == 0.25


def test_nothing_but_the_model_is_built(tmp_path):
    """A class that leaves a file where it is built."""
    made = {"class_path": "logging.FileHandler", "init_args": {"filename": str(tmp_path / "made.log")}}
    (tmp_path / "others.yaml").write_text(yaml.safe_dump({"data": made, "trainer": {"callbacks": [made]}}))
    read_model([QUICKSTART, str(tmp_path / "others.yaml")], [])
    assert not (tmp_path / "made.log").exists()


def test_experiments_keep_their_own_options(run):
    found, _ = run(
        *("--config", QUICKSTART, "--model.scales", "[4,1]", "--prompt", "9", "--and"),
        *("--sizes", "64", "128x64", "--config", QUICKSTART, "--model.pooling", "adaptive", "--name", "wide"),
    )
    assert [[at["grid"] for at in own["sizes"]] for own in found] == [[[2, 2]], [[4, 4], [8, 4]]]
    assert [row["visual_tokens"] for row in found[1]["sizes"][1]["scales"]] == [16, 4, 1]
    assert [own["name"] for own in found] == ["quickstart", "wide"]
    assert [own["prompt_tokens"] for own in found] == [9, 9]


def test_experiments_are_told_apart(run, tmp_path):
    """Both of their configs are called `stage_3`; a table of memory has a row for each, as the others."""
    chain = ("experiments/base.yaml", "experiments/convllava/stage_3.yaml")
    calls = []
    for size in ("768", "1024"):
        files = *chain, f"experiments/convllava/{size}/stage_3.yaml"
        calls += [word for file in files for word in ("--config", file)]
        calls += ["--model.encoder.backbone", "convnext_atto", *SMALL_LLM, "--and"]
    found, printed = run(*calls[:-1], "--gpus", "2")
    names = [f"base + convllava/stage_3 + convllava/{size}/stage_3" for size in (768, 1024)]
    assert [own["name"] for own in found] == names
    assert all(own["training_memory"]["total"] > own["training_memory"]["parameters"] > 0 for own in found)
    memory = printed[printed.index("Training: GiB") :]
    assert [memory.count(f"{size}/stage_3") for size in (768, 1024)] == [1, 1]


def test_titles_of_panels_leave_out_what_all_have_in_common():
    names = ["base + m3/tune + m3/convllava_768", "base + m3/tune + m3/llava"]
    assert without_common_start(names) == ["m3/convllava_768", "m3/llava"]
    assert without_common_start([names[0], "base"]) == [names[0], "base"]
    assert without_common_start([names[0]] * 2) == [names[0]] * 2


def test_a_name_is_no_markup(run):
    _, printed = run("--config", QUICKSTART, "--name", "[/b][red]runs[m3]", "--model.scales", "[9,1]", "--sizes", "64")
    assert "[/b][red]runs[m3], 64×64: " in printed
    assert printed.count("[/b][red]runs[m3] ") >= 3  # a cell of every table


def test_an_encoder_of_ones_own_is_profiled_or_says_why_not(run, tmp_path, monkeypatch):
    """That of docs/extending.md, which might load weights by itself; what it lacks is named."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.DOTALL)
    code = next(block for block in blocks if "class " in block)
    (tmp_path / "own_encoder.py").write_text(
        code.replace("self.pretrained = patch, width, False", "self.pretrained = patch, width, True")
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ["--config", QUICKSTART, "--model.encoder", "own_encoder.PatchEncoder", "--model.scales", "[16,4,1]"]
    [found], _ = run(*own, "--measure", "--dtype", "float32", "--new-tokens", "2")
    assert found["sizes"][0]["scales"][0]["measured"]["encode_ms"]["median"] > 0
    with pytest.raises(SystemExit, match="activation_checkpointing: PatchEncoder has no set_grad_checkpointing"):
        run(*own, "--model.activation_checkpointing", "[encoder]")


def test_what_is_quantized_is_said_to_be_left_out(run):
    quantized = {
        "llm.name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "llm.config_overrides": "{}",
        "llm.quantize": "4bit",
    }
    overrides = [word for name, value in quantized.items() for word in (f"--model.{name}", value)]
    _, printed = run("--config", QUICKSTART, *overrides)
    assert "quickstart: llm.quantize 4bit is ignored" in printed


def test_a_single_token_has_no_further_one(run):
    [own], printed = run("--config", QUICKSTART, "--measure", "--dtype", "float32", "--new-tokens", "1")
    assert [row["measured"]["further_token_ms"] for row in own["sizes"][0]["scales"]] == [None] * 3
    assert "further token ms" in printed


def test_an_experiments_models_share_nothing(monkeypatch):
    """What one figure freezes must not change the next."""
    monkeypatch.chdir(ROOT)
    experiment = Experiment("twice", read_model([QUICKSTART], []), [], "float32")
    experiment.build().requires_grad_(False)
    assert all(parameter.requires_grad for parameter in experiment.build().parameters())


def test_video_pays_for_every_frame(run):
    video = str(ROOT / "experiments/video_quickstart.yaml")
    [own], printed = run("--config", video, "--model.time_scales", "[8,2]")
    [at] = own["sizes"]
    assert [(row["scale"], row["visual_tokens"]) for row in at["scales"]] == [
        ("8x4", 32),
        ("8x1", 8),
        ("2x4", 8),
        ("2x1", 2),
    ]
    [[still], _] = run("--config", video)
    assert {row["encoder_flops"] for row in at["scales"]} == {8 * still["sizes"][0]["scales"][0]["encoder_flops"]}
    assert "8 × 32×32" in printed


def test_measured_on_this_machine(run, tmp_path):
    picture = tmp_path / "costs.png"
    options = ["--measure", "--dtype", "float32", "--new-tokens", "4", "--plot", str(picture)]
    [own], printed = run("--config", QUICKSTART, *options)
    for row in own["sizes"][0]["scales"]:
        seen = row["measured"]
        for name in ("encode_ms", "first_token_ms", "further_token_ms"):
            assert 0 < seen[name]["q1"] <= seen[name]["median"] <= seen[name]["q3"]
    assert "threads)" in printed
    assert Image.open(picture).size[1] > 1000


def test_times_hold_what_they_are_called(monkeypatch, hands):
    """By the clock, the encoder takes 200 ms and the LLM 100 a call."""
    monkeypatch.chdir(ROOT)
    model = Experiment("slow", read_model([QUICKSTART], []), [], "float32").build("cpu")
    timer = AnswerTimer(model, 8, new_tokens=3, repetitions=3)
    timer.vlm.encoder.trunk.stem.register_forward_pre_hook(forward_by(hands, 0.2))
    timer.vlm.llm.register_forward_pre_hook(forward_by(hands, 0.1))
    pixels = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    seen = {name: times["median"] for name, times in timer(pixels, 16).items() if name.endswith("_ms")}
    assert seen == pytest.approx({"encode_ms": 200, "first_token_ms": 300, "further_token_ms": 100})
    with pytest.raises(ValueError, match="expected 17 visual tokens, 1 images have 16 cells"):
        timer(pixels, 17)
    times = [float(n) for n in (5, 1, 9, 3)]
    assert list(quartiles(times).values()) == np.percentile(times, [50, 25, 75]).tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "64"], "each experiment needs --config"),
        (["--config", QUICKSTART, "--and"], "each experiment needs --config"),
        (["--config", "nowhere.yaml"], "no file nowhere.yaml"),
        (["--config", QUICKSTART, "--sizes", "64y"], "expected a positive number, found '64y'"),
        (["--config", QUICKSTART, "--plot", "nowhere/x.png"], "no folder nowhere"),
        (["--config", QUICKSTART, "--sizes", "768x"], "expected a positive number, found ''"),
        (["--config", QUICKSTART, "--plot", "experiments"], "expected a file, found the folder experiments"),
        (["--config", QUICKSTART, "--plot", "costs.xyz"], "expected one of .png, .pdf, .svg, found 'costs.xyz'"),
        (["--config", QUICKSTART, "--model.scales", "[]"], "scales must be distinct, positive and finest first"),
        (["--config", "CHANGELOG.md"], "--config CHANGELOG.md: "),
        (["--config", "LICENSE"], "--config LICENSE: "),
        (["--config", QUICKSTART, "--model.scalez", "[1]"], "model.scalez"),
        (["--config", QUICKSTART, "--model.scales", "[32,1]"], "no square grid has 32 cells, give --sizes"),
        (["--config", QUICKSTART, "--model.llm.name_or_path", "Gemma2Config"], "costs of gemma2"),
        (["--config", QUICKSTART, "--model.encoder.backbone", "convnxt"], "encoder.backbone convnxt"),
    ],
)
def test_mistakes_end_in_one_message(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    code = stopped.value.code
    assert code not in (0, None)
    assert message in capsys.readouterr().err + str(code)


def test_help_names_every_option(capsys):
    main(["profile", "--help"])
    text = capsys.readouterr().out
    for option in (
        "--config",
        "--and",
        "--sizes",
        "--prompt",
        "--new-tokens",
        "--measure",
        "--json",
        "--plot",
        "--name",
    ):
        assert option in text, option


def test_units():
    assert [in_flops(n) for n in (0, 7, 4500, 943963766784, 3.7758e12, 12e15)] == [
        "0",
        "7",
        "4.5 K",
        "944 G",
        "3.776 T",
        "12 P",
    ]
    assert [in_bytes(n) for n in (512, 2**20, 320 * 2**20, 13.5 * 2**30)] == ["512 B", "1 MiB", "320 MiB", "13.5 GiB"]
    assert in_bytes(sum(p.nbytes for p in tiny_vlm().parameters())).endswith("KiB")


def test_old_strategies_are_named(capsys):
    with pytest.warns(UserWarning, match="fsdp2 is called fsdp now"):
        main(["profile", "--config", QUICKSTART, "--gpus", "2", "--strategy", "fsdp2"])
    assert "2 GPUs (fsdp)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["profile", "--config", QUICKSTART, "--gpus", "2", "--strategy", "fsdp1"])
    assert "FSDP1 is gone, use fsdp" in capsys.readouterr().err


def test_gpus_plans_the_memory_of_training(capsys):
    """Weights in float32, AdamW's two moments: 12 bytes a parameter that trains, half of them on each of two GPUs."""
    adamw = ["--model.optimizer", "lit_mm.FusedAdamW"]
    experiment = Experiment("quickstart", read_model([QUICKSTART], adamw), [], "bfloat16")
    count = sum(parameter.numel() for parameter in experiment.build().parameters())
    one = plan_of(experiment, 1, 2, "32-true", "fsdp")
    assert (
        0 <= one.parameters - 4 * count < 1000 and 0 <= one.optimizer - 8 * count < 1000
    )  # rotary tables; step counts
    two = plan_of(experiment, 2, 2, "32-true", "fsdp")
    assert two.sharded and not one.sharded and 0.5 <= two.optimizer / one.optimizer < 0.52
    main(["profile", "--config", QUICKSTART, *adamw, "--gpus", "2"])
    assert "GiB on each of 2 GPUs (fsdp), 1 samples each, bf16-mixed" in capsys.readouterr().out
