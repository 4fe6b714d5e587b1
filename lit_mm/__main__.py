"""`python -m lit_mm`: help without heavy imports, errors without tracebacks where they are the user's."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

HELP = """\
lit_mm trains and studies large multimodal models with elastic visual tokens.

  python -m lit_mm fit      --config experiments/quickstart.yaml       train
  python -m lit_mm validate --config … --ckpt_path last                losses and accuracies on the val set
  python -m lit_mm test     --config … --ckpt_path last                accuracy at every token scale
  python -m lit_mm predict  --config … --ckpt_path last                answers to files
  python -m lit_mm export   --config … --ckpt_path last --to FOLDER    plain weights, a Hugging Face LLM
  python -m lit_mm profile  --config … [--sizes 768 1024]              what every visual token costs, without weights

  --config FILE          an experiment; several are laid over each other, later ones win
  --ckpt_path last       the newest run below trainer.default_root_dir, or the path of a checkpoint
  --model.scales [16,1]  any field of the config, by its name
  --print_config         the whole configuration that would run
  fit --help             every field; --model.encoder.help ConvNeXtEncoder and the like go deeper
"""
INTERRUPTED = 130
"""The exit status that shells give Ctrl-C."""
VERBS = ("fit", "validate", "test", "predict", "export", "profile")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return
    if arguments[0] not in VERBS:
        sys.exit(f"{HELP}\nerror: unknown command {arguments[0]!r}, expected one of {', '.join(VERBS)}")
    if len(arguments) == 1:
        sys.exit(f"{HELP}\nerror: {arguments[0]} needs an experiment: --config FILE")
    run(arguments)


def run(arguments: list[str]) -> None:
    """Hand over to the verb; what this package itself refuses ends in its message alone, Ctrl-C with status 130."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's calls, not the user's
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        start(arguments)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if not Path(raised_in).is_relative_to(Path(__file__).parent):
            raise
        sys.exit(f"error: {error}")
    except MisconfigurationException as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # of which Lightning makes a status of 1
            sys.exit(INTERRUPTED)
        raise


def start(arguments: list[str]) -> None:
    """`profile` reads configs by itself, the other verbs are LightningCLI's."""
    if arguments[0] == "profile":
        from lit_mm.profile.command import main as profile

        profile(arguments[1:])
        return
    from lit_mm.cli import LitMMCLI

    LitMMCLI(arguments if arguments != sys.argv[1:] else None)


if __name__ == "__main__":
    main()
