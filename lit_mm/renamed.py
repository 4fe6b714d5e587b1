"""Old names that configurations may still use: they work for one more release, with a warning.

Drop this module, and what imports it, in the release after 0.1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch.utilities import rank_zero_warn

CLASSES = {
    "AnswerAccuracy": "ExactMatch",
    "EasyVQA": "EasyVQADataModule",
    "ImageInstructions": "ImageDataModule",
    "VideoInstructions": "VideoDataModule",
    "VideoShapes": "VideoShapesDataModule",
}
KEYS = {
    "model.llm.source": "name_or_path",
    "model.llm.sizes": "config_overrides",
    "model.llm.template": "chat_template",
    "model.parts.llm.lora.rank": "r",
    "model.parts.llm.lora.alpha": "lora_alpha",
    "model.parts.llm.lora.targets": "target_modules",
}
PACKINGS = {"auto": "auto", "sequential": "sequential", "loop": "padded"}
"""What `model.attention` was besides how a packed sequence attends -> `model.packing`."""
_load_yaml = get_loader("yaml")


def accept_old_names() -> None:
    """Let every YAML value that jsonargparse reads use the old names."""
    set_loader("yaml", lambda text: with_new_names(_load_yaml(text)), (yaml.YAMLError,))


def warn(old: str, new: str) -> None:
    """Say what an old name is called now."""
    rank_zero_warn(f"{old} is called {new} now; the old name goes with the next release")


def with_new_names(config: Any) -> Any:
    """A config, or an overlay of one, with its old keys, class paths and values replaced.

    Args:
        config: What a YAML file or a command line's value holds; anything but a mapping is returned as it is.
    """
    if not isinstance(config, dict):
        return config
    for path, new in KEYS.items():
        *parents, old = path.split(".")
        inner: Any = config
        for name in parents:
            inner = inner.get(name) if isinstance(inner, dict) else None
        if isinstance(inner, dict) and old in inner:
            warn(path, new)
            items = [(new if key == old else key, value) for key, value in inner.items()]
            inner.clear()
            inner.update(items)
    model = config.get("model")
    if isinstance(model, dict) and model.get("attention") in PACKINGS:
        packing = PACKINGS[model.pop("attention")]
        warn("this value of model.attention", f"model.packing: {packing}")
        model.setdefault("packing", packing)
    _rename_classes(config)
    return config


def _rename_classes(config: Any) -> None:
    for name, value in config.items() if isinstance(config, dict) else enumerate(config):
        if name in ("class_path", "data") and isinstance(value, str):
            config[name] = _new_class(value)
        elif isinstance(value, dict | list):
            _rename_classes(value)


def _new_class(path: str) -> str:
    home, _, name = path.rpartition(".")
    if name not in CLASSES or home.split(".")[0] not in ("", "lit_mm"):
        return path
    warn(path, f"lit_mm.{CLASSES[name]}")
    return f"lit_mm.{CLASSES[name]}" if home else CLASSES[name]


def with_new_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line with its old options and class names replaced."""
    return [_new_argument(own, before) for before, own in zip(["", *arguments], arguments, strict=False)]


def _new_argument(argument: str, before: str) -> str:
    option, equals, value = argument.partition("=")
    if before.startswith("--") and argument.startswith("{"):
        return _new_mapping(before, argument)
    if option.startswith("--") and value.startswith("{"):
        argument = f"{option}={_new_mapping(option, value)}"
    if before in ("--data", "--data.class_path"):
        return _new_class(argument)
    if option in ("--data", "--data.class_path") and equals:
        return f"{option}={_new_class(value)}"
    for path, new in KEYS.items():
        if option == f"--{path}" or option.startswith(f"--{path}."):
            warn(path, new)
            return f"--{path.rpartition('.')[0]}.{new}{argument.removeprefix(f'--{path}')}"
    return argument


def _new_mapping(option: str, text: str) -> str:
    """The value of an option such as `--model.llm '{source: x}'`; unchanged if it has no old name."""
    try:
        value = config = _load_yaml(text)
    except yaml.YAMLError:
        return text  # the parser says what is wrong
    before = deepcopy(value)
    for name in reversed(option.removeprefix("--").split(".")):
        config = {name: config}
    with_new_names(config)
    return text if value == before else json.dumps(value)
