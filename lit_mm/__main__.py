"""`python -m lit_mm`: help without heavy imports, user errors without tracebacks."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path

HELP = """\
lit_mm trains and studies large multimodal models with elastic visual tokens.

  python -m lit_mm fit      --config experiments/quickstart.yaml       train
  python -m lit_mm validate --config … --ckpt_path last                losses and accuracies on the val set
  python -m lit_mm test     --config … --ckpt_path last                accuracy at every scale
  python -m lit_mm predict  --config … --ckpt_path last                write answers to files
  python -m lit_mm ask      --ckpt_path last photo.jpg "What is it?"   an answer, or a conversation
  python -m lit_mm serve    --ckpt_path last [--port 8000]             a server for OpenAI's clients, and a page
  python -m lit_mm calibrate last [--mean_tokens 40]                   the scale chosen per question: --tokens auto
  python -m lit_mm export   last FOLDER                                a Hugging Face folder, also for the hub
  python -m lit_mm import   SOURCE FOLDER                              published weights: LLaVA, M3, ConvLLaVA, CLIP
  python -m lit_mm profile  --config … [--sizes 768 1024]              what every visual token costs, without weights

  --config FILE          an experiment; a later file overrides an earlier one
  --ckpt_path last       the newest run below trainer.default_root_dir, or the path of a checkpoint
  --trainer.max_steps 9  any field of the config
  --print_config         print the resulting config
  fit --help             every field; for those of one class: --model.encoder.help ConvNeXtEncoder
"""
INTERRUPTED = 130
"""The exit status of shells for Ctrl-C."""
COMMANDS = {
    "ask": "lit_mm.inference.ask",
    "serve": "lit_mm.inference.serve",
    "calibrate": "lit_mm.inference.calibrate",
    "export": "lit_mm.hub.export",
    "import": "lit_mm.hub.importers",
    "profile": "lit_mm.profile.command",
}
"""The module of each command that LightningCLI does not run."""
VERBS = ("fit", "validate", "test", "predict", *COMMANDS)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return
    if arguments[0] not in VERBS:
        sys.exit(f"{HELP}\nerror: unknown command {arguments[0]!r}, expected one of {', '.join(VERBS)}")
    if len(arguments) == 1 and arguments[0] in ("fit", "validate", "test", "predict", "profile"):
        sys.exit(f"{HELP}\nerror: {arguments[0]} needs an experiment: --config FILE")
    run(arguments)


def run(arguments: list[str]) -> None:
    """Run a command. User errors end with a message only, Ctrl-C with status 130."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # about Lightning's calls
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        if arguments[0] in COMMANDS:  # these read their arguments themselves
            importlib.import_module(COMMANDS[arguments[0]]).main(arguments[1:])
        else:
            from lit_mm.cli import LitMMCLI

            LitMMCLI(arguments if arguments != sys.argv[1:] else None)
    except (ValueError, OSError, ImportError, FloatingPointError, MisconfigurationException) as error:
        if os.environ.get("LIT_MM_TRACEBACK"):
            raise
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        ours = Path(raised_in).is_relative_to(Path(__file__).parent)
        hint = "" if ours else "\n(LIT_MM_TRACEBACK=1 shows where it comes from)"
        sys.exit(f"error: {tidy(str(error))}{hint}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning exits with 1
            sys.exit(INTERRUPTED)
        raise


def tidy(message: str) -> str:
    """An error of jsonargparse without its list of types: for a value that fits no choice, the error of each choice."""
    if "Does not validate against any of the Union subtypes" not in message:
        return message
    head = message.split("Does not validate", 1)[0].strip()
    said = [line.strip().removeprefix("- ") for line in message.splitlines()]
    nothing = ("Expected a <class 'NoneType'>", "Does not validate", "Subtypes:", "Errors:", "Given value")
    kept = [line for line in said if line and not line.startswith(nothing) and line != head]
    whole = ("Given value: Namespace(", "Given value: NestedArg(", "Given value: {")  # the object that contains it
    given = [line for line in said if line.startswith("Given value:") and not line.startswith(whole)]
    return "\n  ".join([head, *dict.fromkeys(kept), *given[:1]]).strip()


if __name__ == "__main__":
    main()
