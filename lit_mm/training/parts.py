"""Which part of the model trains, from where on and how fast; parameter groups and a table of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from lit_mm.model.vlm import MatryoshkaVLM

PartName = Literal["encoder", "projector", "llm"]
PARTS: tuple[PartName, ...] = get_args(PartName)


@dataclass
class LoRA:
    """Low-rank adapters on the LLM's linear layers (through peft); its own weights stay frozen.

    The defaults are those of M3's and LLaVA's LoRA recipes, which go with a learning rate of 2e-4.

    Args:
        r: Rank of the two matrices of an adapter.
        lora_alpha: The adapters' output counts lora_alpha / r.
        dropout: Before the adapters.
        target_modules: Ends of the names of the layers that get one, or all-linear: all but the output head.
    """

    r: int = 128
    lora_alpha: int = 256
    dropout: float = 0.05
    target_modules: list[str] | Literal["all-linear"] = "all-linear"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"parts.llm.lora.r: expected a positive number, found {self.r}")


@dataclass
class Part:
    """How one part trains.

    Args:
        lr: Peak learning rate.
        frozen: Whether nothing of the part trains. It then costs no gradient and no optimizer state,
            runs in evaluation mode (no dropout), and in front of all that trains keeps no activations.
        from_stage: Train from this stage on, counted from 1: a ConvNeXt's stages, a ViT's blocks, an
            LLM's layers. What comes before stays frozen, as with ConvLLaVA's `from_stage: 3`.
        weight_decay: Of matrices and convolutions; null: the optimizer's. Norms, biases and layer
            scales get none.
        layer_decay: Every stage before the last learns this much slower than the next: stage i of n
            with lr * layer_decay ** (n - i), what stands before the first as stage 0.
    """

    lr: float = 2e-5
    frozen: bool = False
    from_stage: int | None = None
    weight_decay: float | None = None
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        if self.frozen and self.from_stage is not None:
            raise ValueError(f"parts: frozen and from_stage {self.from_stage} contradict each other, set one to null")
        if self.lr < 0 or not 0 < self.layer_decay <= 1:
            found = f"lr {self.lr}, layer_decay {self.layer_decay}"
            raise ValueError(f"parts: lr must not be negative and layer_decay in 0..1, found {found}")


@dataclass
class LLMPart(Part):
    """How the LLM trains.

    Args:
        lora: Train low-rank adapters instead of the weights.
    """

    lora: LoRA | None = None


@dataclass
class Parts:
    """How the three parts train; the defaults are M3's (2e-5 everywhere).

    Args:
        encoder: The image encoder.
        projector: The Matryoshka projector.
        llm: The language model.
    """

    encoder: Part = field(default_factory=Part)
    projector: Part = field(default_factory=Part)
    llm: LLMPart = field(default_factory=LLMPart)

    def __post_init__(self) -> None:
        lora, llm = self.llm.lora, self.llm
        if lora and (llm.frozen or llm.from_stage):
            raise ValueError("parts.llm: lora trains adapters alone, it goes with neither frozen nor from_stage")
        if all(getattr(self, name).frozen for name in PARTS):
            raise ValueError("parts: encoder, projector and llm are all frozen, nothing would train")


def apply_parts(vlm: MatryoshkaVLM, parts: Parts) -> None:
    """Freeze what does not train, add the LLM's adapters, and set every part's mode.

    Raises:
        ValueError: A part has no such stage, or no layer has a name that LoRA targets.
    """
    if parts.llm.lora:
        add_adapters(vlm.llm, parts.llm.lora)
    for name in PARTS:
        module, part = getattr(vlm, name), getattr(parts, name)
        if part.frozen:
            module.requires_grad_(False)
        elif part.from_stage is not None:
            freeze_before(module, stages_of(vlm, name), part.from_stage, name)
        train_mode(module)


def train_mode(module: nn.Module) -> None:
    """Training mode where something trains; evaluation mode (no dropout, statistics as they are) elsewhere."""
    module.train()
    for each in module.modules():
        if (own := list(each.parameters())) and not any(parameter.requires_grad for parameter in own):
            each.eval()


def add_adapters(llm: PreTrainedModel, lora: LoRA) -> None:
    """Inject trainable adapters in place and freeze all else; the adapters start as zero and are
    float32 whatever the weights are (but for trainer.precision bf16-true, which converts everything).

    Raises:
        ValueError: No layer has a name that is targeted.
    """
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    check_targets(llm, lora)
    llm.requires_grad_(False)
    with torch.random.fork_rng([]):  # drawn below, or on `meta` when they get memory: the same either way
        inject_adapter_in_model(config, cast(Any, llm))
    if llm.device.type != "meta":
        start_adapters(llm)
    for name, parameter in llm.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


def check_targets(llm: PreTrainedModel, lora: LoRA) -> None:
    """Whether every target is the end of some layer's name.

    Raises:
        ValueError: One is not.
    """
    linear = [name for name, module in llm.named_modules() if isinstance(module, nn.Linear)]
    targets = [] if lora.target_modules == "all-linear" else list(lora.target_modules)
    nothing = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in linear)]
    if nothing:
        ends = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(f"parts.llm.lora.target_modules: {nothing} match no layer, expected some of {ends}")


def start_adapters(module: nn.Module) -> None:
    """Draw the adapters within: together they are zero."""
    for layer in module.modules():
        if isinstance(layer, LoraLayer):
            cast(Any, layer).reset_lora_parameters("default", True)


def merge_adapters(llm: nn.Module) -> None:
    """Add the adapters to the weights they adapt, in place: an LLM without adapters remains."""
    for name, module in list(llm.named_modules()):
        if isinstance(module, LoraLayer):
            cast(Any, module).merge()
            parent, _, own = name.rpartition(".")
            setattr(llm.get_submodule(parent), own, cast(Any, module).get_base_layer())


def stages_of(vlm: MatryoshkaVLM, name: PartName) -> list[nn.Module]:
    """A part's repeated modules, nearest to its input first: stages, blocks or decoder layers."""
    if name == "encoder":
        return vlm.encoder.stages
    if name == "projector":
        return [layer for layer in vlm.projector.layers if isinstance(layer, nn.Linear)]
    return vlm.decoder_layers


def freeze_before(module: nn.Module, stages: Sequence[nn.Module], first: int, name: str) -> None:
    """Freeze all parameters that come before a stage, counted from 1, in the order of computation.

    Raises:
        ValueError: There is no such stage.
    """
    if not 1 <= first <= len(stages):
        raise ValueError(f"parts.{name}.from_stage {first}: the {name} has stages 1 to {len(stages)}")
    for parameter, stage in _stage_numbers(module, stages):
        parameter.requires_grad_(stage >= first)


def _stage_numbers(module: nn.Module, stages: Sequence[nn.Module]) -> Iterator[tuple[nn.Parameter, int]]:
    """Every parameter with the number of its stage: 0 before the first, behind the last that one's.

    timm and transformers register modules in the order in which they compute.
    """
    own = {id(parameter): number for number, stage in enumerate(stages, 1) for parameter in stage.parameters()}
    reached = 0
    for parameter in module.parameters():
        reached = own.get(id(parameter), reached)
        yield parameter, reached


def parameter_groups(vlm: MatryoshkaVLM, parts: Parts) -> list[dict[str, Any]]:
    """Parameter groups with their learning rates, of what trains; `params` are names in the whole model.

    A part has up to three: `encoder` with the matrices of its hidden layers (marked `hidden`),
    `encoder_other` with convolutions, embeddings and output heads, and `encoder_no_decay` with norms,
    biases and layer scales, which get no weight decay. With layer_decay it has those of every stage:
    `encoder_stage_3_other`, …. Names, because sharding may change the shapes by which they are told apart.
    """
    return [group for name in PARTS for group in _groups_of(vlm, name, getattr(parts, name))]


def _groups_of(vlm: MatryoshkaVLM, name: PartName, part: Part) -> Iterator[dict[str, Any]]:
    module, outer = getattr(vlm, name), _embeddings(getattr(vlm, name))
    stages = stages_of(vlm, name) if part.layer_decay != 1.0 else []
    numbers = [stage for _, stage in _stage_numbers(module, stages)]
    named = zip(module.named_parameters(prefix=name), numbers, strict=True)
    trained = [(own, parameter, stage) for (own, parameter), stage in named if parameter.requires_grad]
    for stage in sorted({stage for _, _, stage in trained}):
        own = [(own, parameter) for own, parameter, number in trained if number == stage]
        label = f"{name}_stage_{stage}" if stages else name
        decay = {} if part.weight_decay is None else {"weight_decay": part.weight_decay}
        options = {"lr": part.lr * part.layer_decay ** (len(stages) - stage), **decay}
        if hidden := [n for n, p in own if p.ndim == 2 and id(p) not in outer]:
            yield {"name": label, "params": hidden, "hidden": True, **options}
        if others := [n for n, p in own if p.ndim > 2 or id(p) in outer]:
            yield {"name": f"{label}_other", "params": others, **options}
        if spared := [n for n, p in own if p.ndim < 2]:
            yield {"name": f"{label}_no_decay", "params": spared, **options, "weight_decay": 0.0}


def with_parameters(groups: Sequence[dict[str, Any]], vlm: nn.Module) -> list[dict[str, Any]]:
    """Groups of names -> of the parameters of a model, sharded or not."""
    named = dict(vlm.named_parameters())
    return [{**group, "params": [named[name] for name in group["params"]]} for group in groups]


def _embeddings(module: nn.Module) -> set[int]:
    """Matrices with a row for every token id."""
    tables = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    head = getattr(module, "get_output_embeddings", lambda: None)()
    return {id(part.weight) for part in [*tables, head] if part is not None}


def parts_table(vlm: MatryoshkaVLM, parts: Parts) -> Table:
    """For each part: parameters, what of them trains, learning rate, type; in millions."""
    table = Table(title="What trains", title_justify="left")
    for name, justify in (("part", "left"), ("parameters", "right"), ("trained", "right"), ("lr", "right")):
        table.add_column(name, justify=cast(Any, justify))
    table.add_column("dtype")
    table.add_column("how")
    for name in PARTS:
        table.add_row(name, *_described(getattr(vlm, name), getattr(parts, name)))
    counts = [count_parameters(vlm, trained) for trained in (False, True)]
    table.add_row("all", *(millions(count) for count in counts), style="bold")
    return table


def _described(module: nn.Module, part: Part) -> tuple[str, ...]:
    counts = [millions(count_parameters(module, trained)) for trained in (False, True)]
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()})
    return *counts, "" if part.frozen else f"{part.lr:g}", ", ".join(dtypes), _how(part)


def _how(part: Part) -> str:
    if part.frozen:
        return "frozen"
    if isinstance(part, LLMPart) and part.lora:
        return f"LoRA of rank {part.lora.r}"
    how = "whole" if part.from_stage is None else f"from stage {part.from_stage} on"
    return how if part.layer_decay == 1.0 else f"{how}, layer decay {part.layer_decay:g}"


def count_parameters(module: nn.Module, trained: bool) -> int:
    """How many parameters there are, or how many of them train; of a sharded model's those of all ranks."""
    return sum(_numbers(parameter) for parameter in module.parameters() if parameter.requires_grad or not trained)


def _numbers(parameter: nn.Parameter) -> int:
    """Of a quantized parameter those that it stands for: bitsandbytes packs two into a byte."""
    packed = getattr(parameter, "quant_state", None)
    return int(packed.shape.numel()) if packed is not None else parameter.numel()


def millions(count: int) -> str:
    """`669.16 M`."""
    return f"{count / 1e6:,.2f} M"
