"""Which parts of the model train, from which stage on and at which learning rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from lit_mm.costs.flops import count_parameters
from lit_mm.model.vlm import MatryoshkaVLM

PartName = Literal["encoder", "projector", "llm", "router"]
PARTS: tuple[PartName, ...] = ("encoder", "projector", "llm")
"""The parts that every model has."""


@dataclass
class LoRA:
    """Low-rank adapters on the LLM's linear layers (through peft); its own weights stay frozen.

    The defaults are those of M3's and LLaVA's LoRA recipes, which use a learning rate of 2e-4.

    Args:
        r: Rank of the adapters.
        lora_alpha: The output of an adapter is scaled by lora_alpha / r.
        dropout: Dropout of the input of an adapter.
        target_modules: The layers that get an adapter, by the ends of their names, or all-linear: every
            linear layer except the output head.
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
        frozen: Train nothing of the part. It then needs no gradients and no optimizer state, runs in
            evaluation mode (no dropout), and keeps no activations if nothing before it trains.
        from_stage: Train from this stage on, counted from 1: stages of a ConvNeXt, blocks of a ViT,
            layers of an LLM. Earlier stages stay frozen, as with ConvLLaVA's `from_stage: 3`.
        weight_decay: Weight decay of matrices and convolutions; null: the optimizer's. Norms, biases and
            layer scales have none.
        layer_decay: Factor between the learning rates of a stage and the next one: stage i of n has
            lr * layer_decay ** (n - i), and what comes before the first stage counts as stage 0.
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
            raise ValueError(f"parts: expected lr of at least 0 and layer_decay in 0..1, found {found}")


@dataclass
class LLMPart(Part):
    """How the LLM trains.

    Args:
        lora: Train low-rank adapters instead of the weights.
    """

    lora: LoRA | None = None


@dataclass
class Parts:
    """How the parts train. The defaults are M3's: everything, at 2e-5.

    Args:
        encoder: The image encoder.
        projector: The Matryoshka projector.
        llm: The language model.
        router: The router, which trains alone: a model that has one keeps its other parts as they are.
    """

    encoder: Part = field(default_factory=Part)
    projector: Part = field(default_factory=Part)
    llm: LLMPart = field(default_factory=LLMPart)
    router: Part = field(default_factory=lambda: Part(lr=1e-3))

    def __post_init__(self) -> None:
        lora, llm = self.llm.lora, self.llm
        if lora and (llm.frozen or llm.from_stage):
            raise ValueError("parts.llm: lora trains only the adapters, it goes with neither frozen nor from_stage")
        if all(getattr(self, name).frozen for name in PARTS):
            raise ValueError("parts: encoder, projector and llm are all frozen, nothing would train")
        if self.router.frozen:
            raise ValueError("parts.router: frozen, but it is what trains where there is one: set model.router to null")


def parts_of(vlm: MatryoshkaVLM) -> list[PartName]:
    """The model's parts."""
    return [*PARTS, "router"] if vlm.router is not None else list(PARTS)


def trained_parts(vlm: MatryoshkaVLM) -> list[PartName]:
    """Those that may train: a router trains alone."""
    return ["router"] if vlm.router is not None else list(PARTS)


def apply_parts(vlm: MatryoshkaVLM, parts: Parts) -> None:
    """Add the LLM's adapters, freeze what does not train, and put frozen modules into evaluation mode.

    Raises:
        ValueError: A part has no such stage, or LoRA targets a layer that does not exist.
    """
    trained = trained_parts(vlm)
    if parts.llm.lora and "llm" in trained:
        add_adapters(vlm.llm, parts.llm.lora)
    for name in parts_of(vlm):
        module, first = getattr(vlm, name), getattr(parts, name).from_stage
        if getattr(parts, name).frozen or name not in trained:
            module.requires_grad_(False)
        elif first is not None:
            stages = stages_of(vlm, name)
            if not 1 <= first <= len(stages):
                raise ValueError(f"parts.{name}.from_stage {first}: the {name} has stages 1 to {len(stages)}")
            for parameter, stage in _stage_numbers(module, stages):
                parameter.requires_grad_(stage >= first)
        module.train()
        for each in module.modules():
            if (own := list(each.parameters())) and not any(parameter.requires_grad for parameter in own):
                each.eval()  # no dropout, batch statistics stay as they are


def add_adapters(llm: PreTrainedModel, lora: LoRA) -> None:
    """Inject trainable adapters in place and freeze everything else. The adapters' output is zero at first. They
    are float32 whatever the type of the weights, except under trainer.precision bf16-true, which converts all.

    Raises:
        ValueError: A target matches no layer.
    """
    linear = [name for name, module in llm.named_modules() if isinstance(module, nn.Linear)]
    targets = [] if lora.target_modules == "all-linear" else lora.target_modules
    if unknown := [each for each in targets if not any(f".{name}".endswith(f".{each}") for name in linear)]:
        ends = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(f"parts.llm.lora.target_modules: {unknown} match no layer, expected some of {ends}")
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    llm.requires_grad_(False)
    with torch.random.fork_rng([]):  # so that adapters on `meta`, which are drawn later, get the same numbers
        inject_adapter_in_model(config, cast(Any, llm))
    if llm.device.type != "meta":
        start_adapters(llm)
    for name, parameter in llm.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


def start_adapters(module: nn.Module) -> None:
    """Initialize all adapters inside a module; their output is zero."""
    for layer in module.modules():
        if isinstance(layer, LoraLayer):
            cast(Any, layer).reset_lora_parameters("default", True)


def merge_adapters(llm: nn.Module) -> None:
    """Merge the adapters into the weights in place, which leaves an LLM without adapters."""
    for name, module in list(llm.named_modules()):
        if isinstance(module, LoraLayer):
            cast(Any, module).merge()
            parent, _, own = name.rpartition(".")
            setattr(llm.get_submodule(parent), own, cast(Any, module).get_base_layer())


def stages_of(vlm: MatryoshkaVLM, name: PartName) -> list[nn.Module]:
    """A part's stages, blocks or decoder layers, in the order of computation."""
    if name == "encoder":
        return vlm.encoder.stages
    if name in ("projector", "router"):
        return [layer for layer in getattr(vlm, name).layers if isinstance(layer, nn.Linear)]
    return vlm.decoder_layers


def _stage_numbers(module: nn.Module, stages: Sequence[nn.Module]) -> Iterator[tuple[nn.Parameter, int]]:
    """Every parameter with the number of its stage: 0 before the first stage; after the last, the last one's.

    timm and transformers register modules in the order in which they compute.
    """
    own = {id(parameter): number for number, stage in enumerate(stages, 1) for parameter in stage.parameters()}
    reached = 0
    for parameter in module.parameters():
        reached = own.get(id(parameter), reached)
        yield parameter, reached


def parameter_groups(vlm: MatryoshkaVLM, parts: Parts) -> list[dict[str, Any]]:
    """Optimizer groups of all parameters that train; `params` holds their names in the whole model.

    A part has up to three groups: `encoder` with the matrices of its hidden layers (marked `hidden`),
    `encoder_other` with convolutions, embeddings and output heads, and `encoder_no_decay` with norms,
    biases and layer scales. With layer_decay every stage has its own: `encoder_stage_3_other`, ….
    Names are used because sharding may change the shapes by which the three kinds are told apart.
    """
    return [group for name in trained_parts(vlm) for group in _groups_of(vlm, name, getattr(parts, name))]


def _groups_of(vlm: MatryoshkaVLM, name: PartName, part: Part) -> Iterator[dict[str, Any]]:
    module = getattr(vlm, name)
    head = getattr(module, "get_output_embeddings", lambda: None)()
    tables = [each for each in module.modules() if isinstance(each, nn.Embedding)]
    outer = {id(each.weight) for each in [*tables, head] if each is not None}  # a row for every token id
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
    """The groups with the model's parameters in place of their names."""
    named = dict(vlm.named_parameters())
    return [{**group, "params": [named[name] for name in group["params"]]} for group in groups]


def parts_table(vlm: MatryoshkaVLM, parts: Parts) -> Table:
    """For each part: its parameters and those that train, in millions, learning rate, dtype, and how it trains."""
    table = Table(title="What trains", title_justify="left")
    for column in ("part", "parameters", "trained", "lr", "dtype", "how"):
        table.add_column(column, justify="right" if column in ("parameters", "trained", "lr") else "left")
    for name in parts_of(vlm):
        module, part = getattr(vlm, name), getattr(parts, name)
        part = part if name in trained_parts(vlm) else Part(frozen=True)
        counts = [millions(count_parameters(module, trained)) for trained in (False, True)]
        dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()})
        table.add_row(name, *counts, "" if part.frozen else f"{part.lr:g}", ", ".join(dtypes), _how(part))
    table.add_row("all", *(millions(count_parameters(vlm, trained)) for trained in (False, True)), style="bold")
    return table


def _how(part: Part) -> str:
    if part.frozen:
        return "frozen"
    if isinstance(part, LLMPart) and part.lora:
        return f"LoRA of rank {part.lora.r}"
    how = "whole" if part.from_stage is None else f"from stage {part.from_stage} on"
    return how if part.layer_decay == 1.0 else f"{how}, layer decay {part.layer_decay:g}"


def millions(count: int) -> str:
    """`669.16 M`."""
    return f"{count / 1e6:,.2f} M"
