"""python -m lit_mm export: a trained model as a folder that transformers opens without lit_mm.

config.json, model*.safetensors, generation_config.json           the model
processor_config.json, tokenizer*.json, chat_template.jinja       images and text -> what it takes
modeling_lit_mm.py, …                                             copies of files of this package
README.md, chooser.json, router/                                  what was measured; the scale chosen per question
"""

from __future__ import annotations

import argparse
import copy
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from huggingface_hub import HfApi, save_torch_state_dict
from lightning.pytorch.utilities import rank_zero_warn
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import Sequence as Sequential
from torch import Tensor, nn
from transformers import AddedToken, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

import lit_mm
from lit_mm.data.records import RecordError
from lit_mm.evaluation.calibration import CHOOSER
from lit_mm.hub.adapter import RunAdapter, take_adapter, write_adapter
from lit_mm.hub.card import CARD, Origin, card_of
from lit_mm.hub.huggingface.configuration_lit_mm import LitMMConfig, LitMMVisionConfig
from lit_mm.hub.huggingface.processing_lit_mm import LitMMImageProcessor, LitMMProcessor
from lit_mm.hub.loading import load, run_of
from lit_mm.hub.template import for_parts
from lit_mm.inference.answering import Model
from lit_mm.inference.decoding import end_ids, settings
from lit_mm.model.batch import IMAGE
from lit_mm.model.encoder import check_described
from lit_mm.model.hub import reachable
from lit_mm.model.loss import logit_factor
from lit_mm.model.projector import MatryoshkaProjector
from lit_mm.model.vlm import MatryoshkaVLM
from lit_mm.training.checkpoints import is_export
from lit_mm.training.parts import merge_adapters

PROGRAM = "python -m lit_mm export"
MODULES = (
    "hub/huggingface/configuration_lit_mm.py",
    "hub/huggingface/modeling_lit_mm.py",
    "hub/huggingface/processing_lit_mm.py",
    "model/encoder.py",
    "model/projector.py",
    "model/scales.py",
    "data/pixels.py",
)
"""Files of this package that a folder holds copies of."""
IMPORT = re.compile(r"^from lit_mm\.(?:\w+\.)+(\w+) import", re.MULTILINE)
AUTO = {
    "AutoConfig": "configuration_lit_mm.LitMMConfig",
    "AutoModel": "modeling_lit_mm.LitMMModel",
    "AutoModelForImageTextToText": "modeling_lit_mm.LitMMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_lit_mm.LitMMForConditionalGeneration",
    "AutoProcessor": "processing_lit_mm.LitMMProcessor",
    "AutoImageProcessor": "processing_lit_mm.LitMMImageProcessor",
}
SHARD = "5GB"


def main(arguments: Sequence[str]) -> None:
    """Export what the command line names.

    Raises:
        ValueError: The model cannot be exported like this.
        OSError: No such checkpoint, the folder is not empty, or the hub cannot be reached.
    """
    options = _parser().parse_args(arguments)
    folder, llava = Path(options.folder).expanduser(), options.layout == "llava"
    check_new(folder)
    if llava and options.lora == "adapter":
        raise ValueError("export: --lora adapter goes with --as transformers")
    if options.private and not options.push_to_hub:
        raise ValueError("export: --private goes with --push_to_hub")
    model, (run, step) = load(options.checkpoint, "cpu"), run_of(options.checkpoint)
    adapter = take_adapter(model, options.checkpoint) if options.lora == "adapter" else None
    origin = Origin(run, step, options.push_to_hub or folder.resolve().name)
    if llava:
        from lit_mm.hub.llava import export_llava

        export_llava(model, folder, origin)
    else:
        export(model, folder, origin, adapter)
    print(f"exported to {folder}")
    if options.push_to_hub:
        print(f"pushed to {push(folder, options.push_to_hub, options.private)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(PROGRAM, description="Write a trained model as a Hugging Face folder.")
    parser.add_argument("checkpoint", help="a run's folder, a checkpoint, sharded or not, or last: the newest in runs")
    parser.add_argument("folder", help="the folder to write, which must be empty or new")
    parser.add_argument(
        "--as",
        dest="layout",
        choices=["transformers", "llava"],
        default="transformers",
        help="transformers: with the code of this model, for trust_remote_code. llava: transformers' own LLaVA, for "
        "a CLIP ViT with one scale",
    )
    parser.add_argument(
        "--lora",
        choices=["merged", "adapter"],
        default="merged",
        help="adapters of a LoRA run: merged into the weights, or as a peft adapter in adapter/",
    )
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="upload the folder to the Hugging Face hub, too")
    parser.add_argument("--private", action="store_true", help="make that repository private, if it is new")
    return parser


def push(folder: Path, name: str, private: bool) -> str:
    """Upload a folder to the hub; returns its address.

    Raises:
        ConnectionError: The hub is out of reach, or refuses.
    """
    by_hand = f"{folder} is written, `hf upload {name} {folder}` uploads it"
    if not reachable():
        raise ConnectionError(f"--push_to_hub {name}: the hub is out of reach, or HF_HUB_OFFLINE is set: {by_hand}")
    try:
        HfApi().create_repo(name, private=private, exist_ok=True)
        return str(HfApi().upload_folder(repo_id=name, folder_path=folder))
    except (OSError, ValueError) as error:  # no token, no rights, or a name that the hub does not allow
        raise ConnectionError(f"--push_to_hub {name}: {str(error).splitlines()[0]}: {by_hand}") from None


def check_new(folder: Path, verb: str = "export") -> None:
    """Check that an export or import overwrites nothing.

    Raises:
        FileExistsError: The folder is not empty, or is not a folder.
    """
    if folder.is_symlink() and not folder.exists():
        raise FileExistsError(f"{verb}: {folder} is a link to {folder.readlink()}, which does not exist")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{verb}: {folder} is a file, expected a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{verb}: {folder} is not empty")


def export(
    model: Model,
    folder: Path,
    origin: Origin = Origin(),  # noqa: B008 (read only)
    adapter: RunAdapter | None = None,
) -> None:
    """Write a model as a folder that transformers opens with `trust_remote_code=True`, and `lit_mm.load` without. It
    appears once it is complete.

    Args:
        model: The model. If the LLM has adapters in this process, they are merged into it.
        folder: A new or empty folder.
        origin: Where the model comes from.
        adapter: What is written as a peft adapter beside the model.

    Raises:
        FileExistsError: The folder is not empty, or is not a folder.
        ValueError: transformers' classes could not compute what this model computes; the message says why.
    """
    merge_adapters(model.vlm.llm)
    processor = auto_processor(model)
    for each in cast(tuple[Any, ...], (processor, processor.image_processor)):
        each.auto_map = {name: AUTO[name] for name in ("AutoImageProcessor", "AutoProcessor")}
    config = auto_config(model, processor.image_token_id, origin.step)
    with new_folder(folder) as made:
        config.save_pretrained(made)
        save_torch_state_dict(exported_state(model.vlm), made, max_shard_size=SHARD)
        generation_of(model).save_pretrained(made)
        processor.save_pretrained(made)
        _copy_modules(made)
        describe(made, model, origin)
        if model.vlm.router:
            (made / "router").mkdir()
            save_file(model.vlm.router.state_dict(), made / "router/model.safetensors", {"format": "pt"})
        if adapter:
            write_adapter(adapter, model.vlm.llm.base_model_prefix, made / "adapter")


@contextmanager
def new_folder(folder: Path, verb: str = "export") -> Iterator[Path]:
    """A folder to write into, which gets its name once it is complete.

    Raises:
        FileExistsError: The folder of this name is not empty, or is not a folder.
    """
    check_new(folder, verb)
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        made = Path(temporary) / "export"
        made.mkdir()
        yield made
        for file in made.rglob("*.safetensors"):  # which its library lets nobody else read
            file.chmod(made.stat().st_mode & 0o666)
        if folder.exists():
            folder.rmdir()
        made.rename(folder)


def auto_processor(model: Model) -> LitMMProcessor:
    """The tokenizer and image processor of a model's folder. A warning says if prompts get other ids than here.

    Raises:
        ValueError: `<image>` is not a single token of the tokenizer.
    """
    tokenizer = tokenizer_of(model)
    encoder = model.vlm.encoder
    scales, options = model.vlm.projector.scales, {**asdict(model.media.image)}
    images = LitMMImageProcessor(scales, options, encoder.mean, encoder.std)
    processor = LitMMProcessor(images, tokenizer, tokenizer.chat_template)
    if different := different_prompt(processor, model):
        rank_zero_warn(f"export: transformers encodes prompts otherwise than lit_mm: {different}")
    return processor


def tokenizer_of(model: Model) -> PreTrainedTokenizerFast:
    """The tokenizer of a model's folder: with `<image>`, and with a template that takes parts.

    Raises:
        ValueError: The tokenizer is one that only its own Python code can run.
    """
    own = cast(Any, model.tokenizer)
    if not hasattr(own, "backend_tokenizer"):
        raise ValueError(f"export: {type(own).__name__} has no tokenizer.json, expected a fast tokenizer")
    backend = copy.deepcopy(own.backend_tokenizer)
    backend.post_processor = Sequential([])  # the chat template writes the first token
    if isinstance(backend.pre_tokenizer, Metaspace):  # a space before each piece of text, as `Conversation` has it
        backend.pre_tokenizer = Metaspace(prepend_scheme="always", split=backend.pre_tokenizer.split)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=own.clean_up_tokenization_spaces,
        padding_side="left",
        **own.special_tokens_map,
    )
    image = AddedToken(LitMMProcessor.image_token, normalized=False, special=True)
    tokenizer.add_tokens([image], special_tokens=True)
    tokenizer.chat_template = for_parts(str(own.chat_template))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def different_prompt(processor: LitMMProcessor, model: Model) -> str | None:
    """The first of a few prompts whose ids are not those of training; None: there is none."""
    image, one = LitMMProcessor.image_token, processor.image_token_id
    for turns in (["What is it?"], [f"{image}\nWhat is it?"], [f"{image}\nWhat is it?", "A cat.", "Where is it?"]):
        try:
            ours = model.conversation.prompt(turns[-1], "export", history=turns[:-1]).ids
        except RecordError:  # a template for captions has no such prompt
            continue
        messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        found = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        if found != (expected := [one if token == IMAGE else token for token in ours]):
            return f"{text!r} has ids {found}, in training {expected}"
    return None


def auto_config(model: Model, image_token_id: int, step: int | None = None) -> LitMMConfig:
    """The configuration of a model's folder.

    Raises:
        ValueError: Encoder or projector are not of this package, the backbone is not one of timm's own, or the LLM
            computes its logits in a way of its own.
    """
    vlm, media = model.vlm, model.media
    kind = type(vlm.encoder).__name__
    if kind not in ("ConvNeXtEncoder", "TimmEncoder"):
        raise ValueError(f"export: the encoder is a {kind}, expected ConvNeXtEncoder or TimmEncoder")
    if type(vlm.projector) is not MatryoshkaProjector:
        found = type(vlm.projector).__name__
        raise ValueError(f"export: the projector is a {found}, expected MatryoshkaProjector")
    check_head(vlm.llm)
    ours = {
        "names": llm_names(vlm.llm),
        "time_scales": vlm.time_scales,
        "trained_scales": [list(scale) if isinstance(scale, tuple) else scale for scale in model.trained_scales],
        "video": asdict(media.video) if media.video else None,
        "frame": asdict(media.frame) if media.frame != media.image else None,
        "image_first": model.image_first,
        "max_new_tokens": model.max_new_tokens,
        "decoding": model.decoding,
        "router": asdict(vlm.router.options) if vlm.router else None,
        "step": step,
        "version": lit_mm.__version__,
    }
    encoder, text = vlm.encoder, text_config(vlm.llm)
    check_described(encoder.arguments["backbone"], encoder.arguments["overrides"])  # as whoever opens the folder does
    vision = LitMMVisionConfig(
        encoder=kind,
        arguments=encoder.arguments,
        stride=encoder.stride,
        hidden_size=encoder.num_features,
        dtype=next(encoder.parameters()).dtype,
    )
    config = LitMMConfig(
        text_config=text,
        vision_config=vision,
        scales=vlm.projector.scales,
        sampling=vlm.projector.sampling,
        pooling=vlm.projector.pooling,
        image_token_id=image_token_id,
        lm_head_bias=vlm.llm.get_output_embeddings().bias is not None,
        logit_factor=logit_factor(vlm.llm.config),
        tie_word_embeddings=is_tied(vlm.llm),
        dtype=widest(vlm),
        architectures=["LitMMForConditionalGeneration"],
        lit_mm=ours,
    )
    config.auto_map = AUTO
    return config


def text_config(llm: PreTrainedModel) -> PretrainedConfig:
    """The LLM's configuration, without what it only has in this process."""
    config = copy.deepcopy(llm.config)
    config.dtype, config._attn_implementation, config._name_or_path = llm.dtype, None, ""
    return config


def llm_names(llm: PreTrainedModel) -> dict[str, str]:
    """What an LLM calls its parts: `base`, all but its output head, and `head`.

    Raises:
        ValueError: It has weights elsewhere.
    """
    [head] = [name for name, module in llm.named_modules() if module is llm.get_output_embeddings()]
    names = {"base": llm.base_model_prefix, "head": head}
    if others := [name for name in llm.state_dict() if not name.startswith(tuple(f"{own}." for own in names.values()))]:
        raise ValueError(f"export: {type(llm).__name__} has weights beside its layers and its output head: {others}")
    return names


def widest(vlm: MatryoshkaVLM) -> torch.dtype:
    """The type in which no weight is rounded: transformers opens all of a model in one type."""
    return reduce(torch.promote_types, (parameter.dtype for parameter in vlm.parameters()))


def is_tied(llm: PreTrainedModel) -> bool:
    """Whether the LLM's output head is its table of embeddings."""
    return cast(Any, llm.get_output_embeddings()).weight is cast(Any, llm.get_input_embeddings()).weight


@torch.no_grad()
def check_head(llm: PreTrainedModel) -> None:
    """Check that the LLM's logits are those of a linear layer, up to a factor.

    Raises:
        ValueError: They are not (a soft cap, for example).
    """
    ids = torch.arange(4, device=llm.device)[None]
    hidden = cast(Any, llm).base_model(input_ids=ids, use_cache=False).last_hidden_state
    ours = cast(nn.Module, llm.get_output_embeddings())(hidden) * logit_factor(llm.config)
    if not torch.allclose(ours, cast(Any, llm)(input_ids=ids, use_cache=False).logits, rtol=1e-3, atol=1e-3):
        raise ValueError(f"export: the logits of {type(llm).__name__} are not those of a linear output head")


def exported_state(vlm: MatryoshkaVLM) -> dict[str, Tensor]:
    """The model's weights by the names of `LitMMForConditionalGeneration`."""
    parts: dict[str, Any] = {
        "model.vision_tower": vlm.encoder,
        "model.multi_modal_projector": vlm.projector,
        "model.language_model": vlm.llm.base_model,
        "lm_head": vlm.llm.get_output_embeddings(),
    }
    state = {f"{part}.{name}": own for part, each in parts.items() for name, own in each.state_dict().items()}
    if is_tied(vlm.llm):
        del state["lm_head.weight"]
    return state


def generation_of(model: Model) -> GenerationConfig:
    """How the model answers by default: as `Model.answer` does."""
    config = settings(model.vlm.llm, model.decoding, max_new_tokens=model.max_new_tokens)
    config.eos_token_id = end_ids(model.vlm.llm, [model.conversation.end_id])
    config.pad_token_id = model.tokenizer.pad_token_id if model.tokenizer.pad_token else model.tokenizer.eos_token_id
    return config


def describe(folder: Path, model: Model, origin: Origin, llava: bool = False) -> None:
    """Write the model card, or copy that of a folder that is exported again; and copy the chooser."""
    again = origin.run is not None and is_export(origin.run) and not llava
    text = (cast(Path, origin.run) / CARD).read_text(encoding="utf-8") if again else card_of(model, origin, llava)
    (folder / CARD).write_text(text, encoding="utf-8")
    if origin.run and (origin.run / CHOOSER).is_file():
        shutil.copyfile(origin.run / CHOOSER, folder / CHOOSER)


def _copy_modules(folder: Path) -> None:
    """Copy files of this package that work without it; what they import of each other lies beside them."""
    for name in MODULES:
        text = (Path(lit_mm.__file__).parent / name).read_text(encoding="utf-8")
        (folder / Path(name).name).write_text(IMPORT.sub(r"from .\1 import", text), encoding="utf-8")
