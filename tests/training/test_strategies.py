"""Two processes (gloo, CPU), sharded in every way: losses, norms and weights of one process alone."""

import copy
from functools import partial
from itertools import pairwise
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy

from lit_mm.data.tokenizer import load_tokenizer
from lit_mm.model.llm import LLM, load_llm
from lit_mm.model.loss import Consistency
from lit_mm.training.checkpoints import open_weights
from lit_mm.training.module import LitMatryoshka
from lit_mm.training.optim import MuonAdamW
from lit_mm.training.parts import LLMPart, LoRA, Part, Parts
from lit_mm.training.strategies import FSDP, policy_of, units
from tests.helpers.environment import TOKENIZER
from tests.helpers.models import tiny_encoder, tiny_llm, tiny_vlm
from tests.helpers.sharded import Run, on_ranks, perform, unchanged

EVERYTHING = Parts(Part(0.01), Part(0.01), LLMPart(0.01))
STAGE_1 = Parts(Part(0.01, from_stage=5), Part(0.01), LLMPart(frozen=True))
ADAPTERS = Parts(Part(frozen=True), Part(0.01), LLMPart(0.01, lora=LoRA(4, 8, 0.0)))
HEAD = Parts(Part(frozen=True), Part(0.01), LLMPart(0.01, lora=LoRA(4, 8, 0.0, ["q_proj", "lm_head"])))
RECOMPUTED = {"activation_checkpointing": ["encoder", "llm"]}
CLIPPED = {"gradient_clip_val": 0.1}
CASES = {
    "all": (EVERYTHING, {}, {}),
    "stage 1": (STAGE_1, {}, {}),
    "lora": (ADAPTERS, {}, {}),
    "lora head": (HEAD, {}, {}),
    "clipped": (EVERYTHING, {}, CLIPPED),
    "clipped values": (EVERYTHING, {}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "recomputed": (EVERYTHING, RECOMPUTED, {}),
    "recomputed stage 1": (STAGE_1, RECOMPUTED, {}),
    "padded": (EVERYTHING, {"packing": "padded"}, {}),
    "consistency": (EVERYTHING, {"consistency": Consistency(3.0, "next_finer", 2.0)}, {}),
    "accumulated": (EVERYTHING, {}, {"accumulate_grad_batches": 2, "max_steps": 2, **CLIPPED}),
    "bf16": (EVERYTHING, {}, {"precision": "bf16-mixed"}),
    "adapters on bf16": (ADAPTERS, {"llm": tiny_llm(dtype="bfloat16")}, {"precision": "bf16-mixed"}),
}
ON_CPU = {"accelerator": "cpu", "devices": 2, "logger": False}
DDP = ["all", "stage 1", "lora", "recomputed", "accumulated", "consistency"]
EXACT = [("fsdp", case) for case in CASES if "bf16" not in case]
EXACT += [("ddp", case) for case in DDP]


def run_of(folder: Path, strategy: str, case: str, trainer=None, **options) -> Run:
    parts, model, own = copy.deepcopy(CASES[case])
    folder.mkdir(parents=True)
    return Run(folder, strategy, parts, {**model, **options.pop("model", {})}, {**own, **(trainer or {})}, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All runs, those of two ranks in one pair of processes."""
    root = tmp_path_factory.mktemp("strategies")
    published = root / "published"
    lightning.seed_everything(5)
    load_llm(tiny_llm(), load_tokenizer(tiny_llm())).save_pretrained(published, max_shard_size="20KB")
    read = {"llm": LLM(str(published), tokenizer=TOKENIZER, chat_template="bare")}
    same, eight = {"model": {"scheduler": unchanged}}, {"max_steps": 8}
    for case in CASES:
        perform(run_of(root / "auto" / case, "auto", case))
    tied = {"llm": LLM(str(root / "tied"), tokenizer=TOKENIZER, chat_template="bare")}
    load_llm(tiny_llm(tie_word_embeddings=True), load_tokenizer(tiny_llm())).save_pretrained(root / "tied")
    reads = {"read": ("lora", read), "read tied": ("all", tied), "read head": ("lora head", read)}
    for name, (case, model) in reads.items():
        perform(run_of(root / "auto" / name, "auto", case, model=dict(model)))
    runs = [run_of(root / strategy / case, strategy, case) for strategy, case in EXACT]
    runs += [run_of(root / strategy / case, strategy, case) for strategy, case in ROUNDED]
    runs += [run_of(root / "fsdp" / name, "fsdp", case, model=model) for name, (case, model) in reads.items()]
    runs += [run_of(root / "fsdp/whole", "fsdp", "all", eight, **copy.deepcopy(same))]
    runs += [run_of(root / "fsdp/half", "fsdp", "all", **copy.deepcopy(same))]
    resume = {"resume": root / "fsdp/half/after.ckpt"}
    runs += [run_of(root / "fsdp/resumed", "fsdp", "all", eight, **copy.deepcopy(same), **resume)]
    muon = {"optimizer": partial(MuonAdamW)}
    runs += [run_of(root / "fsdp/muon", "fsdp", "all", model=muon, fails="needs whole matrices")]
    sequential = {"packing": "sequential"}
    runs += [run_of(root / "fsdp/sequential", "fsdp", "all", model=sequential, fails="a different number of times")]
    on_ranks(2, runs)
    on_ranks(1, [run_of(root / "fsdp/resumed on one", "fsdp", "all", eight, **copy.deepcopy(same), **resume)])
    return root


ROUNDED = [("fsdp", "bf16"), ("fsdp", "adapters on bf16")]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return {name: read() for name, read in open_weights(str(run / "after.ckpt")).tensors.items()}


def assert_same_weights(found: Path, expected: Path, tolerance: float = 1e-5) -> None:
    ours, theirs = weights_of(found), weights_of(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name].float(), tensor.float(), rtol=0, atol=tolerance), name


def told(run: Path) -> dict:
    return torch.load(run / "told0.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "case"), EXACT)
def test_two_ranks_are_one_process(folder, strategy, case):
    """Batches with and without images on either rank and on both; validation with an empty batch on one."""
    two, one = told(folder / strategy / case), told(folder / "auto" / case)
    assert torch.allclose(torch.tensor(two["losses"]), torch.tensor(one["losses"]), rtol=1e-5, atol=1e-5)
    for name, value in one["val"].items():
        assert abs(float(two["val"][name]) - float(value)) < 1e-5, name
    assert_same_weights(folder / strategy / case, folder / "auto" / case)


@pytest.mark.slow
def test_every_case_changes_the_weights_its_own_way(folder):
    """Or the comparison above would compare nothing."""
    ends = {case: told(folder / "auto" / case)["losses"][-1][0] for case in CASES}
    assert ends.pop("recomputed") == pytest.approx(ends["all"]) == pytest.approx(ends.pop("padded"))
    assert ends.pop("recomputed stage 1") == pytest.approx(ends["stage 1"])
    values = sorted(ends.values())
    assert all(b - a > 1e-4 for a, b in pairwise(values)), ends


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "case"), ROUNDED)
def test_in_bf16_losses_stay_near(folder, strategy, case):
    two, one = (torch.tensor(told(folder / kind / case)["losses"])[:, 0] for kind in (strategy, "auto"))
    assert torch.allclose(two, one, rtol=2e-2)
    exact = torch.tensor(told(folder / "auto" / ("all" if case == "bf16" else "lora"))["losses"])[:, 0]
    assert not torch.equal(one, exact)
    dtypes = {name: tensor.dtype for name, tensor in weights_of(folder / strategy / case).items() if "q_proj" in name}
    base = torch.bfloat16 if case == "adapters on bf16" else torch.float32
    assert all(dtype == (torch.float32 if "lora" in name else base) for name, dtype in dtypes.items())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["read", "read tied", "read head"])
def test_an_llm_read_layer_by_layer_is_the_one_transformers_loads(folder, case):
    """Built on `meta`, its weights from several safetensors files, adapters beside them, or a tied head."""
    assert_same_weights(folder / "fsdp" / case, folder / "auto" / case)
    two, one = (torch.tensor(told(folder / kind / case)["losses"]) for kind in ("fsdp", "auto"))
    assert torch.allclose(two, one, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_saved_on_two_ranks_and_resumed_on_two_and_on_one(folder):
    assert (folder / "fsdp/half/after.ckpt/.metadata").is_file()
    assert not (folder / "fsdp/half/after.ckpt.part").exists()
    assert len(list((folder / "fsdp/half/after.ckpt").glob("*.distcp"))) == 2
    assert_same_weights(folder / "fsdp/resumed", folder / "fsdp/whole", 0)
    assert_same_weights(folder / "fsdp/resumed on one", folder / "fsdp/whole")
    assert told(folder / "fsdp/resumed")["losses"] == told(folder / "fsdp/whole")["losses"][4:]


def test_units_are_the_models_own_blocks():
    vlm = tiny_vlm()
    kinds = [type(unit).__name__ for unit in units(vlm)]
    assert kinds == ["ConvNeXtStage"] * 5 + ["MatryoshkaProjector"] + ["LlamaDecoderLayer"] * 2


def test_the_old_name_works_with_a_warning():
    with pytest.warns(UserWarning, match="fsdp2 is called fsdp now"):
        assert isinstance(lightning.Trainer(strategy="fsdp2", **ON_CPU).strategy, FSDP)


@pytest.mark.parametrize("name", ["fsdp1", "fsdp_cpu_offload"])
def test_names_of_fsdp1_say_that_it_is_gone(name):
    with pytest.raises(ValueError, match="FSDP1 is gone, use fsdp"):
        lightning.Trainer(strategy=name, **ON_CPU)


def test_lightnings_own_fsdp1_is_refused():
    class Own(FSDPStrategy):
        """Which Lightning takes on a CPU, unlike FSDPStrategy itself."""

    lit = LitMatryoshka(tiny_encoder, tiny_llm(), [16, 4, 1])
    lit.trainer = lightning.Trainer(strategy=Own(), **ON_CPU)
    with pytest.raises(ValueError, match="FSDP1 is gone, use fsdp"):
        lit.configure_model()


def test_a_precision_with_loss_scaling_is_refused():
    with pytest.raises(ValueError, match=r"16-mixed does not go with sharding: expected one of 32-true"):
        policy_of("16-mixed")
