"""The recipes: every combination of overlays parses, is built without memory, and trains what the papers train, with
their rates, batches and tokens. Expected figures are the papers' (or arithmetic on their shapes), not the YAMLs'."""

from __future__ import annotations

import math
import os
import re
import subprocess
from functools import cache
from itertools import pairwise

import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from lit_mm.cli import LitMMCLI
from lit_mm.costs.llm_shapes import published
from lit_mm.data.images import ImageOptions
from lit_mm.data.tokenizer import load_tokenizer
from lit_mm.model.loss import Consistency
from lit_mm.model.scales import nested_shapes
from lit_mm.training.module import LitMatryoshka
from lit_mm.training.parts import count_parameters
from lit_mm.training.strategies import policy_of
from tests.helpers.command_line import configs
from tests.helpers.environment import ROOT
from tests.helpers.models import tiny_llm
from tests.helpers.published import PARAMETERS

DEVICES = 8
TOKENS = {768: 144, 1024: 256, 1536: 576}
NESTED = {768: [144, 36, 9, 1], 1024: [256, 64, 16, 4, 1], 1536: [576, 144, 36, 9, 1]}
DEEP = [f"encoder.trunk.stages.{number}." for number in (2, 3, 4)]
ALL = ["encoder.", "projector.", "llm."]
STAGES = {
    1: ([DEEP[-1], "projector."], 3e-4, 256),
    2: ([*DEEP, "projector.", "llm."], 2e-5, 256),
    3: (["projector.", "llm."], 2e-5, 128),
}
"""ConvLLaVA's: what trains, its learning rate, the global batch."""
CONVLLAVA = {
    (size, stage): (f"convllava/stage_{stage}", f"convllava/{size}/stage_{stage}")
    for size in TOKENS
    for stage in STAGES
}
JOINED = {size: ("convllava_m3/stage_3", f"convllava_m3/{size}/stage_3") for size in TOKENS}
M3 = {f"convllava_{size}": scales for size, scales in NESTED.items()} | {"llava": NESTED[1536]}
VIDEO = (*JOINED[768], "video/stage_4")
ABLATIONS = {
    "four_stages": (*CONVLLAVA[1024, 2], "ablations/four_stages"),
    "depth_3": (*CONVLLAVA[768, 1], "ablations/depth_3"),
    "depth_9": (*CONVLLAVA[768, 1], "ablations/depth_9"),
    "from_stage_2": (*CONVLLAVA[768, 2], "ablations/from_stage_2"),
    "from_stage_4": (*CONVLLAVA[768, 2], "ablations/from_stage_4"),
    "frozen_encoder": (*CONVLLAVA[1024, 1], "ablations/four_stages", "ablations/frozen_encoder"),
    "frozen_llm": ("m3/tune", "m3/llava", "ablations/frozen_llm"),
    "single_scale": ("m3/tune", "m3/llava", "ablations/single_scale"),
    "sampling_spatial": ("m3/tune", "m3/llava", "ablations/sampling_spatial"),
    "sampling_sequential": ("m3/tune", "m3/llava", "ablations/sampling_sequential"),
    "consistency": ("m3/tune", "m3/llava", "ablations/consistency"),
}
LLMS = {
    "vicuna_7b": ("lmsys/vicuna-7b-v1.5", 4096, "vicuna_v1"),
    "qwen3_0.6b": ("Qwen/Qwen3-0.6B", 1024, "chatml"),
    "qwen3_1.7b": ("Qwen/Qwen3-1.7B", 2048, "chatml"),
    "qwen3_4b": ("Qwen/Qwen3-4B", 2560, "chatml"),
    "smollm2_135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", 576, "own"),
    "smollm2_360m": ("HuggingFaceTB/SmolLM2-360M-Instruct", 960, "own"),
    "smollm2_1.7b": ("HuggingFaceTB/SmolLM2-1.7B-Instruct", 2048, "own"),
    "llama_3.2_1b": ("meta-llama/Llama-3.2-1B-Instruct", 2048, "vicuna_v1"),
    "llama_3.2_3b": ("meta-llama/Llama-3.2-3B-Instruct", 3072, "vicuna_v1"),
}


class Parsed(LitMMCLI):
    """The command line up to where it would build something."""

    def instantiate_classes(self) -> None:
        """Nothing yet."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing either."""


@pytest.fixture(scope="module")
def parser():
    """The command line's own, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lit_mm"])
        return Parsed(["fit", *configs("base", *CONVLLAVA[768, 1])]).parser


@pytest.fixture(scope="module")
def parse(parser):
    """Overlays -> the config of the run."""
    return cache(lambda *names: parser.parse_args(["fit", *configs("base", *names)]).fit)


@pytest.fixture(scope="module")
def build(parser):
    """Overlays -> the LightningModule with all its parts on `meta`: no weights, no network."""

    def built(*names: str) -> LitMatryoshka:
        config = parser.parse_args(["fit", *configs("base", *names), "--model.init_from=null"])
        lit = parser.instantiate(config).fit.model
        with torch.device("meta"):
            lit.configure_model()
        return lit

    module, tokenizer = "lit_mm.training.module", load_tokenizer(tiny_llm())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{module}.load_tokenizer", lambda llm: tokenizer)
        patch.setattr(f"{module}.load_config", lambda llm, _: published(llm.name_or_path))
        patch.setattr(f"{module}.load_llm", lambda llm, *_: bare_llm(llm.name_or_path, llm.dtype))
        patch.setattr(LitMatryoshka, "inputs", None)  # what the data would need of it
        patch.setattr("timm.models.convnext.trunc_normal_", lambda tensor, **_: tensor)  # slow on `meta`, too
        yield cache(built)


def bare_llm(source: str, dtype: str):
    return AutoModelForCausalLM.from_config(published(source), dtype=getattr(torch, dtype))


def trained(lit: LitMatryoshka) -> set[str]:
    return {name for name, parameter in lit.vlm.named_parameters() if parameter.requires_grad}


def named(lit: LitMatryoshka, prefixes: list[str]) -> set[str]:
    return {name for name, _ in lit.vlm.named_parameters() if name.startswith(tuple(prefixes))}


def optimised(lit: LitMatryoshka, steps: int = 1000):
    """Every trained parameter's group by the parameter's name, and the schedule."""
    lit.total_steps = lambda: steps
    made = lit.configure_optimizers()
    names = {id(parameter): name for name, parameter in lit.vlm.named_parameters()}
    groups = {names[id(p)]: group for group in made["optimizer"].param_groups for p in group["params"]}
    return groups, made["lr_scheduler"]["scheduler"]


def global_batch(config) -> int:
    data = config.data.init_args
    assert data.tokens_per_batch is None
    assert data.pixels_per_batch is None
    return data.batch_size * config.trainer.accumulate_grad_batches * DEVICES


def check_common(config) -> None:
    """What both papers do in every stage."""
    data, model = config.data.init_args, config.model
    assert (data.max_length, config.trainer.max_epochs, config.trainer.max_steps) == (2048, 1, -1)
    assert (model.llm.name_or_path, model.llm.chat_template) == ("lmsys/vicuna-7b-v1.5", "vicuna_v1")
    assert "llm" in model.activation_checkpointing
    assert (model.optimizer.class_path, model.scheduler.class_path) == ("lit_mm.FusedAdamW", "lit_mm.WarmupCosine")
    assert config.trainer.gradient_clip_val is None


def check_rates(lit: LitMatryoshka, rates: dict[str, float]) -> None:
    """Each trained parameter's peak rate, no weight decay, and transformers' own cosine with 3 % warm-up."""
    groups, schedule = optimised(lit)
    assert set(groups) == trained(lit)
    for name, group in groups.items():
        [rate] = [rate for prefix, rate in rates.items() if name.startswith(prefix)]
        assert (group["initial_lr"], group["weight_decay"]) == (rate, 0.0), name
    reference = get_cosine_schedule_with_warmup(torch.optim.SGD([torch.zeros(1)], 1.0), 30, 1000)
    for step in [0, 1, 14, *range(29, 1000, 97)]:
        assert schedule.lr_lambdas[0](step) == pytest.approx(reference.lr_lambdas[0](step), abs=1e-12)


def convnext(depths=(3, 3, 27, 3, 6), widths=(192, 384, 768, 1536, 3072), first: int = 0) -> int:
    """Parameters from a stage on: a block is a 7×7 depthwise convolution, a norm, two linear layers and a scale."""
    blocks = [depth * (49 * w + w + 2 * w + 8 * w * w + 5 * w + w) for depth, w in zip(depths, widths, strict=True)]
    stem = 3 * 16 * widths[0] + widths[0] + 2 * widths[0]
    downs = [0] + [2 * a + 4 * a * b + b for a, b in pairwise(widths)]
    return sum(blocks[first:]) + sum(downs[first:]) + (stem if first == 0 else 0)


def projector(width: int, embedding: int) -> int:
    return width * embedding + embedding + embedding * embedding + embedding


def vit(width: int = 1024, blocks: int = 23, cells: int = 24) -> int:
    """CLIP's ViT-L/14 at 336 up to the last but one of its 24 blocks, with the norm before them."""
    block = 12 * width * width + 13 * width
    return 3 * 14 * 14 * width + width + (cells * cells + 1) * width + 2 * width + blocks * block


VICUNA = PARAMETERS["lmsys/vicuna-7b-v1.5"]
ADAPTERS = 32 * 128 * (4 * (4096 + 4096) + 3 * (4096 + 11008))


def test_the_arithmetic_is_the_papers():
    assert convnext() / 1e6 == pytest.approx(669.16, abs=0.005)
    assert convnext(first=4) / 1e6 == pytest.approx(472.93, abs=0.005)


@pytest.mark.parametrize(("size", "stage"), CONVLLAVA)
def test_convllava(parse, build, size, stage):
    prefixes, rate, batch = STAGES[stage]
    config, lit = parse(*CONVLLAVA[size, stage]), build(*CONVLLAVA[size, stage])
    check_common(config)
    assert trained(lit) == named(lit, prefixes)
    assert ("llm.lm_head.weight" in trained(lit)) == (stage > 1)
    check_rates(lit, dict.fromkeys(prefixes, rate))
    assert global_batch(config) == batch
    assert lit.scales == [TOKENS[size]] == [math.prod(lit.vlm.encoder.grid(size, size))]
    image = config.data.init_args.image
    assert (image.mode, image.size, lit.packing) == ("pad", size, "packed")
    encoder = {1: convnext(first=4), 2: convnext(first=2), 3: 0}[stage]
    assert count_parameters(lit.vlm.encoder, False) == convnext()
    assert count_parameters(lit.vlm, True) == encoder + projector(3072, 4096) + (VICUNA if stage > 1 else 0)
    assert config.model.encoder.init_args.pretrained == (stage == 1)


@pytest.mark.parametrize(("name", "lora"), [*((name, False) for name in M3), ("llava", True), ("convllava_768", True)])
def test_m3(parse, build, name, lora):
    names = ("m3/tune", f"m3/{name}", *(["m3/lora"] if lora else []))
    config, lit = parse(*names), build(*names)
    check_common(config)
    llm = {name for name in named(lit, ["llm."]) if "lora_" in name} if lora else named(lit, ["llm."])
    assert trained(lit) == named(lit, ["encoder.", "projector."]) | llm
    check_rates(lit, {"encoder.": 2e-5, "projector.": 2e-5, "llm.": 2e-4 if lora else 2e-5})
    assert global_batch(config) == 128
    assert (lit.scales, lit.scales_per_step) == (M3[name], "all")
    size = config.data.init_args.image.size
    shapes = nested_shapes(*lit.vlm.encoder.grid(size, size), tuple(lit.scales))
    assert shapes == [(math.isqrt(scale), math.isqrt(scale)) for scale in lit.scales]
    width, encoder = (1024, vit()) if name == "llava" else (3072, convnext())
    tuned = encoder + projector(width, 4096) + (ADAPTERS if lora else VICUNA)
    assert count_parameters(lit.vlm, True) == tuned
    assert count_parameters(lit.vlm.llm, False) == VICUNA + (ADAPTERS if lora else 0)


def test_lora_is_the_papers(build):
    lora = build("m3/tune", "m3/llava", "m3/lora")
    assert (lora.parts.llm.lora.r, lora.parts.llm.lora.lora_alpha) == (128, 256)
    dtypes = {"lora_" in name: parameter.dtype for name, parameter in lora.vlm.llm.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


@pytest.mark.parametrize("size", JOINED)
def test_convllava_m3(parse, build, size):
    config, lit = parse(*JOINED[size]), build(*JOINED[size])
    check_common(config)
    assert trained(lit) == named(lit, ALL)
    check_rates(lit, dict.fromkeys(ALL, 2e-5))
    assert global_batch(config) == 128
    assert lit.scales == NESTED[size]
    for shape in ((640, 480), (480, 640), (500, 500), (1000, 250), (211, 1024)):
        height, width = ImageOptions(**config.data.init_args.image.as_dict()).target(*shape)
        assert min(width, height) == size
        nested_shapes(*lit.vlm.encoder.grid(height, width), tuple(lit.scales), lit.sampling, lit.pooling)


def test_video(parse, build):
    config, lit = parse(*VIDEO), build(*VIDEO)
    check_common(config)
    assert trained(lit) == named(lit, ALL)
    assert global_batch(config) == 128
    assert config.data.class_path == "lit_mm.VideoDataModule"
    assert len(lit.all_scales) == 12
    frames = config.data.init_args.video.max_frames
    assert frames == lit.time_scales[0]
    assert frames * lit.scales[0] < config.data.init_args.max_length * 0.6


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_change_one_thing(parse, build, name):
    lit, config = build(*ABLATIONS[name]), parse(*ABLATIONS[name])
    if name == "four_stages":
        assert trained(lit) == named(lit, [*DEEP[:2], "projector.", "llm."])
        assert count_parameters(lit.vlm.encoder, False) == convnext((3, 3, 27, 3), (192, 384, 768, 1536))
        assert math.prod(lit.vlm.encoder.grid(512, 512)) == lit.scales[0] == TOKENS[1024]
        assert config.data.init_args.image.size == 512
    elif name.startswith("depth"):
        depth = int(name[-1])
        assert count_parameters(lit.vlm.encoder, True) == convnext((3, 3, 27, 3, depth), first=4)
    elif name.startswith("from_stage"):
        assert count_parameters(lit.vlm.encoder, True) == convnext(first=int(name[-1]) - 1)
    elif name == "frozen_encoder":
        assert trained(lit) == named(lit, ["projector."])
    elif name == "frozen_llm":
        assert trained(lit) == named(lit, ["encoder.", "projector."])
    elif name == "single_scale":
        assert lit.scales == [36]
        assert trained(lit) == named(lit, ALL)
    elif name == "consistency":
        assert lit.consistency == Consistency(1.0, "finest", 1.0, 0)
        assert lit.scales == NESTED[1536]
    else:
        assert lit.vlm.projector.sampling == name.removeprefix("sampling_")
        assert lit.scales == NESTED[1536]


@pytest.mark.parametrize("name", LLMS)
def test_other_llms(parse, build, name):
    source, embedding, template = LLMS[name]
    names = (*CONVLLAVA[768, 1], f"llm/{name}")
    lit, llm = build(*names), parse(*names).model.llm
    assert (llm.name_or_path, llm.chat_template) == (source, template)
    assert lit.packing == "packed"
    assert count_parameters(lit.vlm.llm, False) == PARAMETERS[source]
    assert count_parameters(lit.vlm, True) == convnext(first=4) + projector(3072, embedding)


CHAINS = [
    *((CONVLLAVA[size, stage], CONVLLAVA[size, stage + 1]) for size in TOKENS for stage in (1, 2)),
    *((CONVLLAVA[size, 3], ("m3/tune", f"m3/convllava_{size}")) for size in TOKENS),
    *((CONVLLAVA[size, 2], JOINED[size]) for size in TOKENS),
    (JOINED[768], VIDEO),
]


@pytest.mark.parametrize(("before", "after"), CHAINS, ids=lambda names: names[-1])
def test_each_stage_starts_from_the_one_before(parse, build, before, after):
    """It names the folder of the other, and all names and shapes fit."""
    assert parse(*after).model.init_from == parse(*before).trainer.default_root_dir
    given, wanted = (
        {name: tensor.shape for name, tensor in build(*names).vlm.state_dict().items()} for names in (before, after)
    )
    assert given == wanted


def test_m3_takes_projector_and_llm_of_llava(parse):
    config = parse("m3/tune", "m3/llava")
    init = config.model.init_from
    assert (init.run, init.encoder, init.projector, init.llm) == (None, None, *["models/llava-v1.5-7b"] * 2)
    assert config.model.encoder.init_args.pretrained


DATA = {
    "Lin-Chen/ShareGPT4V": "data/sharegpt4v/",
    "FreedomIntelligence/ALLaVA-4V": "data/allava/",
    "Vision-Flan/vision-flan_191-task_1k": "data/vflan/",
}


def test_data_are_those_of_the_papers(parse):
    one, two = ([subset.path for subset in parse(*CONVLLAVA[768, stage]).data.init_args.train] for stage in (1, 2))
    counts = [{name: sum(path.startswith(at) for path in paths) for name, at in DATA.items()} for paths in (one, two)]
    assert [list(count.values()) for count in counts] == [[2, 2, 0], [2, 4, 1]]
    assert all("nstruct-" not in path for path in one)
    assert set(one) < set(two)
    tuned = [CONVLLAVA[768, 3], ("m3/tune", "m3/llava"), JOINED[768]]
    assert {parse(*names).data.init_args.train for names in tuned} == {"data/llava/llava_v1_5_mix665k.json"}
    text = (ROOT / "docs/recipes.md").read_text()
    for name in (*DATA, "liuhaotian/LLaVA-Instruct-150K", "liuhaotian/LLaVA-Pretrain", "LanguageBind/Video-LLaVA"):
        assert f"`{name}`" in text


@pytest.mark.parametrize("name", ["one_gpu", "ddp", "fsdp"])
def test_hardware_changes_nothing_but_the_trainer(parse, name):
    plain, config = (parse(*CONVLLAVA[768, 2], *more) for more in ((), (f"hardware/{name}",)))
    assert (config.model, config.data) == (plain.model, plain.data)
    policy_of(config.trainer.precision)
    one = name == "one_gpu"
    assert (config.trainer.devices, config.trainer.strategy) == ((1, "auto") if one else ("auto", name))
    assert one or name in StrategyRegistry.available_strategies()


def test_every_overlay_is_in_a_combination_that_is_tested():
    tested = {"base", "m3/lora", *(name for names in (*CONVLLAVA.values(), *JOINED.values(), VIDEO) for name in names)}
    tested |= {"m3/tune", *(f"m3/{name}" for name in M3), *(f"llm/{name}" for name in LLMS)}
    tested |= {names[-1] for names in ABLATIONS.values()}
    tested |= {f"hardware/{name}" for name in ("one_gpu", "ddp", "fsdp")}
    folder = ROOT / "experiments"
    files = {*folder.glob("*/**/*.yaml")} - {*folder.glob("evaluation/*.yaml")}  # benchmarks: see test_readers
    files -= {*folder.glob("evidence/*.yaml")}  # see tests/evidence
    found = {str(file.relative_to(folder).with_suffix("")) for file in files}
    assert found | {"base"} == tested


def commands() -> list[str]:
    """The lines of docs/recipes.md that start a training."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/recipes.md").read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if "-m lit_mm fit" in line]


@pytest.mark.parametrize("line", commands())
def test_the_documents_commands_parse(parser, monkeypatch, line):
    monkeypatch.chdir(ROOT)
    listed = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True).stdout
    words = listed.splitlines()
    config = parser.parse_args(words[words.index("lit_mm") + 1 :])
    assert config.fit.model.scales
    devices = 1 if config.fit.trainer.devices == 1 else DEVICES * config.fit.trainer.num_nodes
    assert global_batch(config.fit) * devices // DEVICES in (128, 256)


def table() -> list[list[str]]:
    """The rows of the documents' first table."""
    text = (ROOT / "docs/recipes.md").read_text().split("## The recipes")[1].split("\n\n")[1]
    return [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in text.splitlines()[2:]]


@pytest.mark.parametrize("row", table(), ids=lambda row: row[0])
def test_the_documents_table_is_what_the_files_say(parse, row):
    overlays, _, rates, batch, tokens, _ = row
    config = parse(*re.findall(r"`(.*?)`", overlays))
    parts = [config.model.parts[name] for name in ("encoder", "projector", "llm")]
    assert {float(rate) for rate in rates.split("; ")} == {part.lr for part in parts if not part.frozen}
    assert global_batch(config) == int(batch)
    assert config.model.scales == [int(number) for number in tokens.split(", ")]


def test_the_slurm_script_starts_the_recipe(parser, monkeypatch, tmp_path):
    """With a `srun` that says what it was told, fresh and after a checkpoint."""
    script = ROOT / "experiments/slurm/convllava_1536_stage_2.sbatch"
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "2"}

    def told() -> list[str]:
        command = ["bash", str(script)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    fresh = told()
    monkeypatch.chdir(ROOT)
    config = parser.parse_args(fresh[3:]).fit
    assert fresh[:3] == ["python", "-m", "lit_mm"]
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", script.read_text(), re.MULTILINE))
    devices = int(options["nodes"]) * int(options["ntasks-per-node"])
    assert config.trainer.num_nodes == int(options["nodes"])
    assert global_batch(config) // DEVICES * devices == 256
    last = tmp_path / config.trainer.default_root_dir / "version_0/checkpoints/last.ckpt"
    last.mkdir(parents=True)
    assert told() == [*fresh, "--ckpt_path", "last"]
