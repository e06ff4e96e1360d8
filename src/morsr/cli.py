"""The `morsr` command: Lightning's fit, validate, test and predict, and one small function for each of the rest."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import keyword
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType

from morsr import __version__
from morsr.errors import ConfigError, MorsrError

LIGHTNING = {
    "fit": "train what the config describes (resume with --ckpt_path)",
    "validate": "run the validation of a config",
    "test": "the benchmark table of a config",
    "predict": "restore the images of a config's data module",
}
COMMANDS = {
    "upscale": "restore an image or a folder",
    "score": "metrics of a folder of outputs, one protocol for all",
    "compare": "paired comparison of two per-image tables",
    "degrade": "make low-quality images by a recipe",
    "severity": "degradation scores of images",
    "routing": "which ranks run for which image, as one HTML page",
    "data-check": "what a config's data lacks, before a run",
    "import": "OSEDiff's or PiSA-SR's weights as an adapters file",
    "export": "one fixed routing as a LoRA, a diffusers folder or ONNX",
    "demo": "a local web page to try a model on one's own images",
    "selftest": "restore a bundled image and compare with its expected output",
}


class _Stopped(SystemExit):
    """A signal asked for an end."""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    0, 1 if some items failed, 2 for an error, 130 when stopped from the keyboard, 143 and 129 by SIGTERM and SIGHUP,
    and 141 where whoever read the output has gone.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if hasattr(sys.stdout, "reconfigure"):  # names of files need not be of the terminal's letters
        sys.stdout.reconfigure(errors="backslashreplace")
    training = bool(arguments) and arguments[0] in LIGHTNING
    try:
        if training:
            with _signals_end_it():
                return _lightning(arguments)
        with _signals_end_it():
            try:
                return _command(arguments)
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()  # a reader that has gone is to be noticed here
    except MorsrError as error:
        print(f"morsr: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        if training:
            raise  # it may be a worker's pipe
        with contextlib.suppress(OSError):  # Python flushes once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except _Stopped as error:
        print("morsr: stopped", file=sys.stderr)
        return int(str(error.code))
    except OSError as error:
        print(f"morsr: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("morsr: stopped", file=sys.stderr)
        return 130


@contextlib.contextmanager
def _signals_end_it() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the work in order, so that no half-written file stays behind."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stopped(128 + number)

    kept = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        # What is ignored stays so, as by nohup.
        kept = {number: signal.signal(number, stop) for number in numbers if signal.getsignal(number) == signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Raise ConfigError for an empty argument: as a path it would be the current folder. A prompt may be empty."""
    for place, (before, argument) in enumerate(zip(["", *arguments], arguments, strict=False), start=1):
        option, equals, value = argument.partition("=")
        if argument == "" and before != "--prompt":
            what = before if before.startswith("-") else f"argument {place}"
        elif equals and not value and option.startswith("--") and option != "--prompt":
            what = option
        else:
            continue
        raise ConfigError(f"{what}: expected a value, got an empty one")


def _command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="morsr", description=__doc__)
    parser.add_argument("--version", action="version", version=f"morsr {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, help_text in LIGHTNING.items():
        subparsers.add_parser(name, help=help_text, add_help=False)
    # Only the command that runs is imported; the others need no more than their line of help.
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, help_text in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=help_text)
        if name == chosen:
            # "import" is a word of the language, so its module is import_.
            place = f"{name}_" if keyword.iskeyword(name) else name.replace("-", "_")
            module = importlib.import_module(f"morsr.commands.{place}")
            subparser.description = module.HELP
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    _refuse_empty(arguments)
    options, others = parser.parse_known_args(arguments)
    if others and not hasattr(options, "overrides"):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    options.overrides = others
    return options.run(options) or 0


def _lightning(arguments: list[str]) -> int:
    if "--print_config" not in arguments and not any(name in os.environ for name in ("LOCAL_RANK", "SLURM_PROCID")):
        print(f"morsr {arguments[0]}: loading …", file=sys.stderr, flush=True)
    from morsr.training.cli import run

    with warnings.catch_warnings():
        # These come from how we call Lightning or from small machines, and ask for nothing that a user could improve.
        warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        # The frozen networks stay in evaluation mode on purpose.
        warnings.filterwarnings("ignore", message=".*module\\(s\\) in eval mode at the start of training.*")
        # The learned estimator's first steps only fill its pool.
        warnings.filterwarnings("ignore", message=".*`training_step` returned `None`.*")
        # Written for modules whose step is wanted undone in the checkpoint; ours is to be in it.
        warnings.filterwarnings("ignore", message=".*ModelCheckpoint with manual optimization.*")
        warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
        return run(arguments)
