"""The configuration: defaults, overrides, refused values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from yolokd import UserError
from yolokd.cli import parse_arguments
from yolokd.config.arguments import parse_value
from yolokd.config.defaults import defaults, method_defaults
from yolokd.config.parse import merge_cfg_file, method_names, parse
from yolokd.config.schema import OWN_KEYS
from yolokd.methods import constants_model, registered
from yolokd.runtime.bundled import bundled_folder

T = {"teacher": "t.pt"}


def test_defaults_come_from_the_yaml_files() -> None:
    config = parse(T)
    assert config.method == defaults()["method"] == "fitnet+pdf"
    assert config.method_configs[0].gain == method_defaults("fitnet")["gain"]
    assert defaults().keys() - OWN_KEYS == {"student", "data"}


def test_setting_a_gain_switches_balancing_off() -> None:
    assert parse(T).balance == defaults()["balance"] == 1.0
    assert parse({**T, "method": "dfd", "dfd.alpha": 2.0}).balance == 1.0
    fixed = parse({**T, "method": "dfd+pdf", "pdf.gain": 3.0})
    assert (fixed.balance, [part.gain for part in fixed.method_configs]) == (
        "off",
        [method_defaults("dfd")["gain"], 3.0],
    )
    assert parse({**T, **yaml.safe_load("{balance: off, pdf.gain: 3.0}"), "method": "dfd+pdf"}) == fixed


@pytest.mark.parametrize("name", ["dfd", "pdf"])
def test_each_methods_yaml_lists_exactly_its_constants(name: str) -> None:
    content = yaml.safe_load((bundled_folder("cfg") / "methods" / f"{name}.yaml").read_text())
    assert content.keys() == {"gain", *constants_model(registered()[name]).model_fields}


def test_flat_keys_parse_back_to_the_same_configuration() -> None:
    config = parse({**T, "method": "dfd+pdf", "dfd.alpha": 0.5, "pdf.gain": 3, "level_weights": "uniform"})
    assert parse(config.flat()) == config


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"method": "dfx"}, "method=dfx: no method 'dfx'"),
        ({"method": ""}, "is empty"),
        ({"method": None}, "is empty"),
        ({"method": 3}, "is empty"),
        ({"method": "dfd++pdf"}, "joined by single"),
        ({"method": "dfd+"}, "joined by single"),
        ({"method": "dfd+none"}, "joined by single"),
        ({"method": "dfd+dfd"}, "twice"),
        ({"method": "dfd", "pdf.gain": 1}, "pdf.gain: sets a constant of pdf"),
        ({"method": "dfd", "dfd.alhpa": 1}, "did you mean alpha"),
        ({"method": "dfd", "dgd.alpha": 1}, "did you mean"),
        ({"method": "dfd", "dfd.alpha": -1}, "dfd.alpha=-1: not a valid value"),
        ({"method": "dfd", "dfd.alpha": "much"}, "dfd.alpha=much"),
        ({"method": "dfd", "dfd.alpha": float("nan")}, "dfd.alpha=nan"),
        ({"method": "dfd", "dfd.alpha": True}, "dfd.alpha=True"),
        ({"method": "dfd", "dfd.gain": -0.1}, "dfd.gain=-0.1"),
        ({"method": "dfd", "dfd.gain": float("inf")}, "dfd.gain=inf"),
        ({"method": "dfd", "dfd.regions": "middle"}, "dfd.regions=middle"),
        ({"method": "pdf", "pdf.distance": 2}, "pdf.distance=2"),
        ({"method": "dfd", "probe": 0}, "probe=0"),
        ({"method": "dfd", "level_weights": "some"}, "level_weights=some"),
        ({"method": "dfd", "level_floor": 1.1}, "level_floor=1.1: not a valid value"),
        ({"method": "dfd", "level_floor": float("nan")}, "level_floor=nan: not a valid value"),
        ({"method": "dfd", "level_weights": "uniform", "level_floor": 0.1}, "level_floor=0.1: has no effect"),
        ({"method": "dfd", "adapter": "none"}, "adapter=none: not a valid value"),
        ({"method": "dfd", "check_teacher": "maybe"}, "check_teacher=maybe"),
        ({"method": "dfd", "teacher": None}, "teacher: is missing"),
        ({"method": "dfd", "balance": 0}, "balance=0: not a valid value"),
        ({"method": "dfd", "balance": "on"}, "balance=on: not a valid value"),
        ({"method": "dfd", "balance": 0.3, "dfd.gain": 2.0}, "dfd.gain: has no effect: balance=0.3"),
        ({"method": "dfd", "dfd.schedule": "square"}, "dfd.schedule=square"),
        ({"method": "dfd", "dfd.warmup": -1.0}, "dfd.warmup=-1.0"),
        ({"method": "dfd", "dfd.end": 0.0}, "dfd.end=0.0"),
        ({"method": "dfd", "teacher": "[a.pt, a.pt]"}, "is empty or names one twice"),
        ({"method": "dfd", "teacher": "[]"}, "is empty or names one twice"),
        ({"method": "dfd", "teacher": "[a.pt, b.pt]", "stages": [3, 5]}, "stages=[3.0, 5.0]: must be"),
        ({"method": "dfd", "teacher": "[a.pt, b.pt, c.pt]", "stages": [5, 3]}, "must be 2 rising epochs"),
        ({"method": "dfd", "stages": 5}, "stages=[5.0]: has no effect: there is one teacher"),
        ({"method": "dfd", "levels": []}, "levels=(): not a valid value"),
        ({"method": "dfd", "classes_map": {}}, "classes_map={}: not a valid value"),
        ({"method": "dfd", "classes_map": {"person": ""}}, "classes_map={'person': ''}: not a valid value"),
        ({"method": "dfd", "classes_map": {"person": 1}}, "classes_map={'person': 1}: not a valid value"),
        ({"method": "dfd", "classes_map": "{person: man"}, "classes_map={person: man: not a valid value"),
    ],
)
def test_invalid_settings_are_refused_with_one_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as e:
        parse(T | keys)
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_levels_in_any_order_are_the_same_setting() -> None:
    assert parse(T | {"levels": [16, 8, 16]}).levels == parse(T | {"levels": [8, 16]}).levels == (8, 16)


def test_keys_that_are_given_replace_those_of_a_file_with_all_that_depends_on_them(tmp_path: Path) -> None:
    saved = {"method": "dfd+pdf", "dfd.alpha": 0.5, "pdf.distance": "l1", "dfd.gain": 2.0, "balance": "off"}
    saved |= {"student": "a.yaml", "unlabelled": "photos", "unlabelled_ratio": 2.0, "epochs": 3}
    file = tmp_path / "distill.yaml"
    file.write_text(yaml.safe_dump(saved))

    def left(**given: Any) -> set[str]:
        """Return which of the file's keys are not taken over as they are."""
        merged = merge_cfg_file({"cfg": str(file), **given})
        assert given.items() <= merged.items()
        return {key for key in saved if key not in given and merged.get(key) != saved[key]}

    assert left() == left(epochs=5) == left(balance="off") == left(student="b.yaml") == set()
    assert left(method="pdf") == {"dfd.alpha", "dfd.gain"}
    assert left(method="none") == {"dfd.alpha", "dfd.gain", "pdf.distance"}
    assert left(balance=1.0) == {"dfd.gain"}
    assert left(model="b.yaml") == {"student"}
    assert left(unlabelled=None) == {"unlabelled_ratio"}


def test_method_none_needs_no_teacher() -> None:
    assert parse({"method": "none"}).method_configs == ()


@given(st.text(max_size=12))
def test_any_text_is_a_list_of_methods_or_a_user_error(text: str) -> None:
    try:
        names = method_names(text)
    except UserError as e:
        assert len(str(e).splitlines()) == 1
    else:
        assert text == "none" or "+".join(names) == text


@given(st.text(max_size=20))
def test_any_text_parses_as_a_value(text: str) -> None:
    parse_value(text)


@given(st.one_of(st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False, allow_infinity=False)))
def test_python_values_written_as_text_parse_back(value: Any) -> None:
    assert parse_value(str(value)) == value


@given(st.lists(st.text(min_size=1, max_size=10), max_size=5))
def test_any_command_line_parses_or_is_a_user_error(words: list[str]) -> None:
    try:
        keys = parse_arguments(words)
    except UserError as e:
        assert len(str(e).splitlines()) == 1
    else:
        assert len(keys) == len(words)


@pytest.mark.parametrize("teachers", ["[a b.pt, 'c.pt']", ["a b.pt", "c.pt"]])
def test_stages_of_several_teachers_start_at_equal_distances_or_as_given(teachers: Any) -> None:
    config = parse({"method": "dfd", "teacher": teachers})
    assert config.teacher_files == ("a b.pt", "c.pt")
    assert config.starts(40) == (0, 20)
    assert parse({"method": "dfd", "teacher": teachers, "stages": 7}).starts(40) == (0, 7)
    assert parse(config.flat()) == config


@pytest.mark.parametrize("balance", [0.3, "off"])
def test_flat_keys_of_a_composition_parse_back_to_the_same_configuration(balance: Any) -> None:
    keys = {"teacher": "t.pt", "method": "frs+dfd", "balance": balance, "frs.end": 9.0, "dfd.schedule": "cosine"}
    config = parse(keys)
    assert parse(config.flat()) == config
