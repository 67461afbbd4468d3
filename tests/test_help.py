"""`yolokd help`: every command says what it does, its keys with their defaults, and examples."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from yolokd import UserError
from yolokd.cli import COMMANDS, parse_arguments, run
from yolokd.commands.bench import run_bench
from yolokd.commands.candidates import DEFAULT_METHODS
from yolokd.commands.compare import DEFAULT_SEEDS, run_compare
from yolokd.commands.compare.launchers import DEFAULT_CPUS
from yolokd.commands.demo import run_demo
from yolokd.commands.deploy.settings import DEFAULT_FORMATS, DeploySettings
from yolokd.commands.help import HELP
from yolokd.commands.label.settings import KEYS as LABEL_KEYS
from yolokd.config.arguments import as_list, parse_value
from yolokd.config.defaults import defaults
from yolokd.config.descriptions import ultralytics_keys, yolokd_keys
from yolokd.config.schema import OWN_KEYS


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_shows_its_keys_and_two_examples(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    for arguments in ([command, "--help"], [command, "teacher=x", "-h"], ["help", command]):
        assert run(arguments) == 0
        outputs.append(capsys.readouterr().out)
    assert len(set(outputs)) == 1
    shown = outputs[0]
    assert shown.startswith(f"yolokd {command}: ")
    assert shown.count("\n  yolokd ") == 2
    words = shown.split()
    for key in HELP[command].described_keys:
        assert any(word.startswith(key.name) for word in words), key
        assert key.meaning


def test_every_command_starts_and_shows_its_help_without_torch() -> None:
    code = (
        "import sys; from yolokd.cli import COMMANDS, run; run([]); [run([c, '--help']) for c in COMMANDS]; "
        "print({'torch', 'ultralytics', 'numpy', 'matplotlib'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    run(["help"])
    shown = capsys.readouterr().out
    assert all(f"yolokd {command} " in shown for command in COMMANDS)


def test_an_unknown_command_gets_a_suggestion_in_help_too() -> None:
    for arguments in (["help", "trian"], ["trian", "--help"]):
        with pytest.raises(UserError, match=r"trian: unknown command \(did you mean train\?\)"):
            run(arguments)


def test_the_help_of_train_describes_every_key_of_the_defaults() -> None:
    described = yolokd_keys()
    assert described.keys() == defaults().keys() == OWN_KEYS | {"student", "data"}
    for key, value in defaults().items():
        assert parse_value(described[key].default) == value
        assert described[key].meaning


SIGNATURES: dict[str, Callable[..., Any]] = {"bench": run_bench, "compare": run_compare, "demo": run_demo}


@pytest.mark.parametrize("command", SIGNATURES)
def test_the_help_of_a_command_shows_the_defaults_that_its_function_has(command: str) -> None:
    parameters = inspect.signature(SIGNATURES[command]).parameters.values()
    functions = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
    if command == "compare":  # None there means that the user gave none; the keys of a training go on to `train`
        functions |= {"method": DEFAULT_METHODS, "seeds": DEFAULT_SEEDS, "split": "val", "csv": "PROJECT/compare.csv"}
        functions["cpus"] = DEFAULT_CPUS
        functions |= {key: defaults()[key] for key in ("teacher", "student", "data")}
    shown = {key.name: key.default for key in HELP[command].keys}
    assert shown.keys() == functions.keys()
    for key, default in functions.items():
        assert [parse_value(str(v)) for v in as_list(shown[key])] == [parse_value(str(v)) for v in as_list(default)]


def test_the_help_of_label_shows_the_defaults_of_its_settings() -> None:
    fields = {key: "" if field.is_required() else field.default for key, field in LABEL_KEYS.items()}
    shown = {key.name: key.default for key in HELP["label"].keys}
    assert shown.keys() == fields.keys()
    assert {key: parse_value(default) for key, default in shown.items()} == fields


def test_the_help_of_deploy_shows_the_defaults_of_its_settings() -> None:
    in_words = {"model": "", "data": "the model's", "teacher": "the run's", "save_dir": "the run's"}
    fields = {key: field.default for key, field in DeploySettings.model_fields.items()} | in_words
    fields["formats"] = DEFAULT_FORMATS
    shown = {key.name: key.default for key in HELP["deploy"].keys}
    assert {key: parse_value(default) for key, default in shown.items()} == fields


def test_the_keys_of_ultralytics_that_help_shows_are_described_by_ultralytics() -> None:
    shown = {key for command in HELP.values() for key in command.ultralytics}
    assert all(ultralytics_keys()[key].meaning for key in shown)
    assert ultralytics_keys()["epochs"].default == "100"


def test_names_of_runs_and_folders_are_taken_as_text() -> None:
    keys = parse_arguments(["method=none", "name=none", "project=7", "save_dir=2024", "seed=7", "data=none"])
    assert keys == {"method": "none", "name": "none", "project": "7", "save_dir": "2024", "seed": 7, "data": None}
