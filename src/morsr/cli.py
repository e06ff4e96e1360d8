"""The `morsr` command: Lightning's fit, validate, test and predict, and one typed function for each other command."""

from __future__ import annotations

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
from morsr.errors import ConfigError, MorsrError, class_at
from morsr.files import say

LIGHTNING = {
    "fit": "train what a config describes (resume with --ckpt_path)",
    "validate": "run the validation of a config",
    "test": "the benchmark table of a config",
    "predict": "restore the images of a config's data module",
}
COMMANDS = {
    "check": "what a run of a config lacks, in one answer",
    "upscale": "restore an image or a folder",
    "score": "metrics of folders of outputs, one protocol for all",
    "compare": "paired comparison of two scored runs",
    "degrade": "make low-quality images by a recipe",
    "severity": "degradation scores of images",
    "routing": "which ranks are active for which image, as one HTML page",
    "import": "OSEDiff's or PiSA-SR's weights as an adapters file",
    "export": "one fixed routing as a LoRA, a diffusers folder or ONNX",
    "demo": "a local web page to try a model on one's own images",
    "selftest": "restore a bundled image and compare with its expected output",
    "schema": "JSON schema of configs, for completion in editors",
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
        with _signals_end_it():
            if training:
                return _lightning(arguments)
            try:
                return _command(arguments)
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()  # a reader that has gone is to be noticed here
    except MorsrError as error:
        return _failed(str(error))
    except BrokenPipeError:
        if training:
            raise  # it may be a worker's pipe
        with contextlib.suppress(OSError):  # Python flushes once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except _Stopped as error:
        return _failed("stopped", int(str(error.code)))
    except OSError as error:
        return _failed(f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}")
    except KeyboardInterrupt:
        return _failed("stopped", 130)


def _failed(message: str, code: int = 2) -> int:
    say(f"morsr: {message}")
    return code


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


def _command(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_overview())
        return 0
    if name == "--version":
        print(f"morsr {__version__}")
        return 0
    if name not in COMMANDS:
        from morsr.cli_errors import closest

        raise ConfigError(f"{name}: no such command; {closest(name, [*LIGHTNING, *COMMANDS]) or 'see morsr --help'}")
    from morsr.cli_parser import call

    # Only the command that runs is imported. "import" is a word of the language, so its module is import_.
    module = importlib.import_module(f"morsr.commands.{name}_" if keyword.iskeyword(name) else f"morsr.commands.{name}")
    return call(module.run, name, arguments[1:])


def _overview() -> str:
    width = max(map(len, (*LIGHTNING, *COMMANDS))) + 2
    lines = [f"  {name:<{width}}{text}" for name, text in (*LIGHTNING.items(), *COMMANDS.items())]
    return "\n".join(["usage: morsr COMMAND ...      morsr COMMAND --help", "", *lines, "", "morsr --version"])


def _lightning(arguments: list[str]) -> int:
    if _settings_printed(arguments):
        return 0
    if "--print_config" not in arguments and not any(name in os.environ for name in ("LOCAL_RANK", "SLURM_PROCID")):
        say(f"morsr {arguments[0]}: loading …")
    from morsr.training.cli import run

    with warnings.catch_warnings():
        # These come from how we call Lightning or from small machines, and ask for nothing that a user could improve.
        warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message="\\s*Dump of a value that does not round-trip")  # tuples as lists
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        # The frozen networks stay in evaluation mode on purpose.
        warnings.filterwarnings("ignore", message=".*module\\(s\\) in eval mode at the start of training.*")
        # The learned estimator's first steps only fill its pool.
        warnings.filterwarnings("ignore", message=".*`training_step` returned `None`.*")
        # Written for modules whose step is wanted undone in the checkpoint; ours is to be in it.
        warnings.filterwarnings("ignore", message=".*ModelCheckpoint with manual optimization.*")
        warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
        return run(arguments)


def _settings_printed(arguments: Sequence[str]) -> bool:
    """Print the settings that an option such as `--model.adapters.help` asks for; False if there is none."""
    asked = next((one for one in arguments if one.startswith("--") and one.endswith(".help")), "")
    section, *inside = asked[2:].removesuffix(".help").split(".")
    if section not in ("model", "data"):
        return False  # none, or Lightning's own
    from jsonargparse import ArgumentParser

    from morsr.cli_errors import class_in, closest, settings_of
    from morsr.commands.check import parsed

    rest = [one for one in arguments[1:] if one != asked]
    given = parsed(rest) if any(one.startswith(("-c", "--config")) for one in rest) else {}
    ours = {"model": "morsr.training.module.OneStepSRModule", "data": "morsr.data.RealESRGANDataModule"}
    kind = class_at(given.get(section, {}).get("class_path", ours[section]), f"--{section}")
    for place, name in enumerate(inside):
        known = settings_of(kind)
        if name not in known or class_in(known[name]) is None:
            where = ".".join([section, *inside[: place + 1]])
            raise ConfigError(f"{where}: no group of settings; {closest(name, known) or f'see --{section}.help'}")
        kind = class_in(known[name])
    parser = ArgumentParser(prog="morsr fit", usage="morsr fit --config FILE [options]", add_help=False)
    parser.add_class_arguments(kind, ".".join([section, *inside]), fail_untyped=False)
    parser.print_help()
    return True
