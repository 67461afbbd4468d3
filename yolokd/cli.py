"""yolokd VERB key=value …: the command line, thin over YoloDistiller."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from yolokd.config.arguments import did_you_mean, parse_value
from yolokd.errors import UserError, first_line

HELP = """yolokd distils a large Ultralytics YOLO into a small one.

  yolokd train teacher=yolov8l.pt student=yolov8n.yaml method=dfd data=coco8.yaml epochs=100 imgsz=640
  yolokd train cfg=runs/distill/train/distill.yaml   # repeat a run
  yolokd train resume=runs/distill/train             # or resume=True: the latest
  yolokd check teacher=… student=… method=… data=…   # a dry run: what would be paired, and what refused
  yolokd val|predict model=runs/distill/train/weights/best.pt …
  yolokd export model=runs/distill/train/weights/best.pt format=onnx dynamic=True
  yolokd methods                                     # the methods and their constants
  yolokd bench teacher=yolov8l.yaml student=yolov8n.yaml imgsz=320 batch=16 method=none,native,sl2,dfd,pdf
  yolokd compare teacher=… student=… data=… method=none,native,dfd,pdf seeds=0,1,2 epochs=60
  yolokd demo                                        # the whole story, at most ten minutes on two CPU cores

Every key of `yolo train` passes through. --debug shows tracebacks."""

Keys = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 failed, 2 something in the command cannot work."""
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")  # Ultralytics reads it on import: nothing installs at run time
    words = list(sys.argv[1:] if argv is None else argv)
    sys.exit(status_of(lambda: run([w for w in words if w != "--debug"]), "--debug" in words))


def status_of(command: Callable[[], int], debug: bool = False) -> int:
    """Run a command, say in one line why it fails, and return the exit status."""
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


def run(words: Sequence[str]) -> int:
    """Dispatch `VERB key=value …`; returns the exit status."""
    verb = words[0] if words else "help"
    if verb in {"help", "-h", "--help"}:
        print(HELP)
        return 0
    if verb in {"version", "--version"}:
        from yolokd.version import __version__

        print(__version__)
        return 0
    if verb not in VERBS:
        raise UserError(verb, "unknown verb", did_you_mean(verb, VERBS) or f"one of: {', '.join(VERBS)}")
    return VERBS[verb](parse_words(words[1:])) or 0


def parse_words(words: Sequence[str]) -> Keys:
    """`key=value` words as a dict; a bare word stands for word=True, as in Ultralytics.

    >>> parse_words(["epochs=3", "resume", "data=a=b.yaml"])
    {'epochs': 3, 'resume': True, 'data': 'a=b.yaml'}
    """
    keys: Keys = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key:
            raise UserError(word, "is no key=value", "for example epochs=100")
        if equals and not value:
            raise UserError(word, "is empty", f"give a value, or drop {key}")
        if key in keys:
            raise UserError(key, "is given twice", "give it once")
        keys[key] = _value(key, value) if equals else True
    return keys


def _value(key: str, text: str) -> Any:
    return text if key == "method" else parse_value(text)  # method=none is a name, not Python's None


def train(keys: Keys) -> None:
    """Distil, or train plainly with method=none."""
    from yolokd.distiller import YoloDistiller

    YoloDistiller().train(**keys)


def check(keys: Keys) -> None:
    """Print what `train` with the same keys would do."""
    from yolokd.commands.check import print_check
    from yolokd.config.parse import merge_cfg_file

    print_check(merge_cfg_file(keys))


def val(keys: Keys) -> None:
    """Ultralytics' validation."""
    from yolokd.data.dataset import with_data_file
    from yolokd.patches.safe_loading import safe_loading

    with _bad_input("val"), safe_loading(bool(keys.get("trust", False))):
        _model(keys).val(**with_data_file(keys))


def predict(keys: Keys) -> None:
    """Ultralytics' prediction."""
    with _bad_input("predict"):
        for _ in _model(keys).predict(**{"save": True} | keys | {"stream": True}):  # as `yolo predict` saves
            pass


def export(keys: Keys) -> int:
    """Export, and check that the exported model equals the torch model."""
    from yolokd.exporter.export_model import export as run_export

    if "model" not in keys:
        raise UserError("model", "is missing", "give model=runs/distill/train/weights/best.pt")
    return 0 if run_export(keys.pop("model"), **keys).passed else 1


def methods(keys: Keys) -> None:
    """Print the methods."""
    from yolokd.commands.list_methods import list_methods
    from yolokd.config.parse import check_keys

    check_keys(keys, ())
    list_methods()


def bench(keys: Keys) -> None:
    """Measure training steps."""
    from yolokd.commands.bench import run_bench

    run_bench(**keys)


def compare(keys: Keys) -> None:
    """Train methods and seeds side by side."""
    from yolokd.commands.compare import run_compare

    run_compare(**keys)


def demo(keys: Keys) -> None:
    """The embedded default: teacher, student, distilled student, export, parity, detection."""
    from yolokd.commands.demo import run_demo

    run_demo(**keys)


VERBS: dict[str, Callable[[Keys], int | None]] = {
    f.__name__: f for f in (train, check, val, predict, export, methods, bench, compare, demo)
}


def _model(keys: Keys) -> Any:
    """The Ultralytics object of `model=`, removed from the keys with `trust=`."""
    from yolokd.config.ultralytics_keys import KNOWN_KEYS
    from yolokd.distiller import load_yolo

    for key in keys.keys() - KNOWN_KEYS - {"trust"}:
        raise UserError(key, "unknown key", did_you_mean(key, KNOWN_KEYS) or "see Ultralytics' settings")
    if "model" not in keys:
        raise UserError("model", "is missing", "give model=runs/distill/train/weights/best.pt")
    return load_yolo(keys.pop("model"), bool(keys.pop("trust", False)))


@contextmanager
def _bad_input(verb: str) -> Iterator[None]:
    """What Ultralytics raises for settings and files that it cannot take is the user's to mend."""
    try:
        yield
    except UserError:
        raise
    except (SyntaxError, TypeError, ValueError, FileNotFoundError) as e:
        raise UserError(verb, first_line(e), "see Ultralytics' settings") from e


if __name__ == "__main__":
    main()
