"""The command line, `yolokd COMMAND key=value …`; each command imports what it needs, so that errors come fast."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any

from yolokd.config.arguments import check_known, did_you_mean, parse_value
from yolokd.errors import UserError, first_line

Keys = dict[str, Any]
HELP_FLAGS = frozenset({"help", "-h", "--help"})
TEXT_KEYS = frozenset({"method", "name", "project", "save_dir"})  # text also if it looks like none or a number


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with status 0 (done), 1 (failed) or 2 (the user gave something that cannot work)."""
    # Ultralytics reads this on import; without it, it would install packages at run time.
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # else a file's name that is not UTF-8 could not be printed
    arguments = list(sys.argv[1:] if argv is None else argv)
    sys.exit(status_of(lambda: run([a for a in arguments if a != "--debug"]), "--debug" in arguments))


def status_of(command: Callable[[], int], debug: bool = False) -> int:
    """Run a command and return the exit status; if it fails, print why in one line, with `debug` also a traceback."""
    try:
        return command()
    except UserError as e:
        if debug:
            traceback.print_exc()
        print(f"yolokd: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print(f"yolokd: interrupted{f'; {e}' if str(e) else ''}", file=sys.stderr)
        return 128 + int(getattr(e, "signum", signal.SIGINT))
    except Exception as e:
        if debug:
            traceback.print_exc()
        print(f"yolokd: failed: {type(e).__name__}: {first_line(e)} (--debug shows the traceback)", file=sys.stderr)
        return 1


def run(arguments: Sequence[str]) -> int:
    """Run `COMMAND key=value …` and return the exit status; `help COMMAND` and `COMMAND --help` show its help.

    Raises UserError for an unknown command and for arguments that cannot work.
    """
    wants_help = not arguments or not HELP_FLAGS.isdisjoint(arguments)
    words = [argument for argument in arguments if argument not in HELP_FLAGS]
    if not words:
        _print_overview()
        return 0
    name = words[0]
    if name in {"version", "--version"}:
        from yolokd.version import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        raise UserError(name, "unknown command", did_you_mean(name, COMMANDS) or f"one of: {', '.join(COMMANDS)}")
    if wants_help:
        from yolokd.commands.help import print_help

        print_help(name, _summary(COMMANDS[name]))
        return 0
    return COMMANDS[name](parse_arguments(words[1:])) or 0


def _print_overview() -> None:
    from yolokd.commands.help import print_overview

    print_overview({name: _summary(command) for name, command in COMMANDS.items()})


def _summary(command: Callable[[Keys], int | None]) -> str:
    """Return the first line of a command's docstring."""
    return (command.__doc__ or "").partition("\n")[0]


def parse_arguments(arguments: Sequence[str]) -> Keys:
    """Convert `key=value` arguments to a dict; `key` alone means key=True, as in Ultralytics.

    Raises UserError for an argument without a key or value, and for a key that is given twice.

    >>> parse_arguments(["epochs=3", "resume", "data=a=b.yaml"])
    {'epochs': 3, 'resume': True, 'data': 'a=b.yaml'}
    """
    keys: Keys = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        _check_spelling(argument, key, value)
        if equals and not value:
            raise UserError(argument, "is empty", f"give a value, or drop {key}")
        if key in keys:
            raise UserError(key, "is given twice", "give it once")
        keys[key] = _parse_value(key, value) if equals else True
    return keys


def _check_spelling(argument: str, key: str, value: str) -> None:
    """Raise UserError for an argument that other programs would take, and for a list that the shell has split."""
    if not key:
        raise UserError(argument, "has no key before =", "write key=value without spaces, for example epochs=100")
    if key.startswith("-"):
        raise UserError(argument, "begins with a dash", f"write {key.lstrip('-')}=value")
    if value[:1] in {"[", "{"} and value[-1] not in {"]", "}"}:
        raise UserError(argument, "is a part of a list, split at a space", "put the whole argument in quotes")
    if argument.endswith((".pt", ".yaml", ".onnx", ".jpg")) and not value:
        raise UserError(argument, "has no key", f"write key=value, for example model={argument}")


def _parse_value(key: str, text: str) -> Any:
    return text if key in TEXT_KEYS else parse_value(text)


def train(keys: Keys) -> None:
    """Train a student with the help of a teacher, or alone (method=none)."""
    from yolokd.distiller import YoloDistiller

    YoloDistiller().train(**keys)


def check(keys: Keys) -> None:
    """Show what `train` would do with the same keys, and what it would refuse, without training."""
    from yolokd.commands.check import print_check
    from yolokd.config.parse import merge_cfg_file

    print_check(merge_cfg_file(keys))


def val(keys: Keys) -> None:
    """Score a checkpoint on a data set, with Ultralytics."""
    from yolokd.data.dataset import with_data_file
    from yolokd.patches.safe_loading import safe_loading

    with _errors_as_user_errors("val"), safe_loading(bool(keys.get("trust", False))):
        _pop_model(keys).val(**with_data_file(keys))


def predict(keys: Keys) -> None:
    """Detect objects in images, with Ultralytics, and save the results as `yolo predict` does."""
    from yolokd.patches.image_names import any_image_name
    from yolokd.patches.safe_loading import safe_loading

    with _errors_as_user_errors("predict"), safe_loading(bool(keys.get("trust", False))), any_image_name():
        for _ in _pop_model(keys).predict(**{"save": True} | keys | {"stream": True}):
            pass


def export(keys: Keys) -> int:
    """Export a checkpoint, and check that the file gives the same results.

    Returns 1 if it does not.
    """
    from yolokd.exporter.export_model import export as run_export

    if "model" not in keys:
        raise UserError("model", "is missing", "give model=runs/distill/train/weights/best.pt")
    return 0 if run_export(keys.pop("model"), **keys).passed else 1


def label(keys: Keys) -> None:
    """Write a teacher's detections as a YOLO data set to train on."""
    from yolokd.commands.label import run_label

    run_label(**keys)


def deploy(keys: Keys) -> int:
    """Measure a checkpoint in the formats that you could ship: size, score, latency, memory.

    Returns 1 if an export differs from the checkpoint or loses more than `limit`.
    """
    from yolokd.commands.deploy.run import run_deploy

    return 0 if run_deploy(**keys) else 1


def methods(keys: Keys) -> None:
    """List the methods, with their papers and constants."""
    from yolokd.commands.list_methods import list_methods
    from yolokd.config.parse import check_keys

    check_keys(keys, ())
    list_methods()


def bench(keys: Keys) -> None:
    """Measure what a training step costs with each method."""
    from yolokd.commands.bench import run_bench

    run_bench(**keys)


def compare(keys: Keys) -> None:
    """Train with several methods and seeds, and compare the scores."""
    from yolokd.commands.compare import run_compare

    run_compare(**keys)


def report(keys: Keys) -> None:
    """Make the report of a run, or of a comparison, again: one HTML file to open in a browser."""
    from yolokd.commands.report import run_report

    run_report(**keys)


def show(keys: Keys) -> None:
    """Draw what teacher and student attend to, and where they disagree, in images."""
    from yolokd.commands.show import run_show

    run_show(**keys)


def demo(keys: Keys) -> None:
    """Train, distil, export and detect on a small drawn data set: about six minutes on two cores."""
    from yolokd.commands.demo import run_demo

    run_demo(**keys)


COMMANDS: dict[str, Callable[[Keys], int | None]] = {
    f.__name__: f
    for f in (train, check, val, predict, label, export, deploy, methods, bench, compare, report, show, demo)
}


def _pop_model(keys: Keys) -> Any:
    """Return the `YOLO` object of `model=`; remove `model` and `trust` from the keys.

    Raises UserError for an unknown key, and for a model that is missing or cannot be loaded.
    """
    from yolokd.config.ultralytics_keys import KNOWN_KEYS
    from yolokd.distiller import load_yolo

    check_known(keys, KNOWN_KEYS | {"trust"}, "see Ultralytics' settings")
    if "model" not in keys:
        raise UserError("model", "is missing", "give model=runs/distill/train/weights/best.pt")
    return load_yolo(keys.pop("model"), bool(keys.pop("trust", False)))


@contextmanager
def _errors_as_user_errors(command: str) -> Iterator[None]:
    """Turn errors that Ultralytics raises for settings, files and packages inside the block into UserError."""
    try:
        yield
    except UserError:
        raise
    except ModuleNotFoundError as e:
        raise UserError(command, f"needs {e.name}, which is not installed", f"pip install {e.name}") from e
    except (PermissionError, NotADirectoryError) as e:
        raise UserError("project", first_line(e), "give a folder that can be written") from e
    except (SyntaxError, TypeError, ValueError, FileNotFoundError) as e:
        raise UserError(command, first_line(e), "see Ultralytics' settings") from e


if __name__ == "__main__":
    main()
