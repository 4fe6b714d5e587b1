"""Opens exported folders as others do, in a process that has only torch, timm and transformers with what they need:

    python without_lit_mm.py FOLDER …

Each folder has `asked.json` beside it: conversations with the names of image files, and the scales to answer at. Writes
`answered.safetensors` and `answered.json` beside it. Run by path, so that the checkout is not importable.
"""

import json
import sys
from pathlib import Path
from typing import Any

ABSENT = (
    "lit_mm",
    "lightning",
    "torchmetrics",
    "jsonargparse",
    "peft",
    "sentencepiece",
    "datasets",
    "av",
    "accelerate",
)


class Without:
    """A finder of modules that does not find some."""

    def __init__(self, finder: Any) -> None:
        self.finder = finder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.split(".", maxsplit=1)[0] in ABSENT else self.finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def main(folders: list[Path]) -> None:
    sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
    try:
        import lit_mm  # noqa: F401
    except ModuleNotFoundError:
        pass
    else:
        raise AssertionError("lit_mm can be imported here")
    for folder in folders:
        answer(folder)


def answer(folder: Path) -> None:
    import torch
    from PIL import Image
    from safetensors.torch import save_file
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.set_num_threads(1)
    asked = json.loads((folder.parent / "asked.json").read_text())
    trust = {"trust_remote_code": asked["trust_remote_code"]}
    model = AutoModelForImageTextToText.from_pretrained(folder, **trust).eval()
    processor = AutoProcessor.from_pretrained(folder, **trust)
    found: dict[str, torch.Tensor] = {}
    told: dict[str, Any] = {"class": type(model).__name__, "answers": {}, "batched": {}, "ids": {}}

    def inputs_of(conversations: list[Any], **options: Any) -> Any:
        opened = [[message_of(each, folder.parent) for each in messages] for messages in conversations]
        made = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return processor.apply_chat_template(opened, **made, processor_kwargs={"padding": True, **options})

    def message_of(message: Any, root: Path) -> Any:
        if isinstance(message["content"], str):
            return message
        parts = [
            part | {"image": Image.open(root / part["image"])} if "image" in part else part
            for part in message["content"]
        ]
        return message | {"content": parts}

    def answers(inputs: Any, **options: Any) -> list[list[int]]:
        made = model.generate(**inputs, max_new_tokens=4, **options)
        assert torch.equal(made[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
        return made[:, inputs["input_ids"].shape[1] :].tolist()

    for scale in asked["scales"]:
        at, chosen = ({}, {}) if scale is None else ({"num_visual_tokens": scale}, {"num_visual_tokens": scale})
        for number, messages in enumerate(asked["conversations"]):
            inputs = inputs_of([messages], **at)
            told["ids"][f"{number}@{scale}"] = inputs["input_ids"][0].tolist()
            with torch.no_grad():
                found[f"{number}@{scale}"] = model(**inputs).logits[0]
            if "pixel_values" in inputs:
                found[f"pixels {number}"] = inputs["pixel_values"].contiguous()
            told["answers"][f"{number}@{scale}"] = answers(inputs)[0]
            if scale is not None:  # the same from what the processor wrote for the finest scale
                assert answers(inputs_of([messages]), **chosen)[0] == told["answers"][f"{number}@{scale}"]
        told["batched"][str(scale)] = answers(inputs_of(asked["conversations"]), **chosen)
    save_file(found, folder.parent / "answered.safetensors")
    (folder.parent / "answered.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
