"""cfg/*.yaml and the user's overrides -> one validated configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from pydantic import ValidationError

from yolokd.config.arguments import as_list, did_you_mean
from yolokd.config.defaults import defaults, method_defaults
from yolokd.config.schedule import Schedule
from yolokd.config.schema import OWN_KEYS, SETTINGS, DistillationConfig, MethodConfig, normalize_teachers
from yolokd.errors import UserError
from yolokd.methods import constants_model, registered


def is_yolokd_key(key: str) -> bool:
    """Whether a key is yolokd's (or a method's constant), not Ultralytics'."""
    return key in OWN_KEYS or "." in key


def parse(keys: Mapping[str, Any]) -> DistillationConfig:
    """Validate yolokd's own keys over their defaults.

    Raises UserError for an unknown method or constant, and for a value of the wrong type or range.

    >>> parse({"teacher": "t.pt", "method": "dfd+pdf", "dfd.alpha": 0.5}).method_configs[0].constants["alpha"]
    0.5
    """
    own = {k: v for k, v in keys.items() if k in OWN_KEYS}
    dotted = {k: v for k, v in keys.items() if "." in k}
    merged = {k: v for k, v in defaults().items() if k in OWN_KEYS} | own
    merged["teacher"] = normalize_teachers(merged["teacher"])
    if merged["balance"] is False:  # YAML's reading of a bare off
        merged["balance"] = "off"
    if isinstance(merged["stages"], int | float | list):
        merged["stages"] = tuple(map(_number, as_list(merged["stages"])))
    names = method_names(merged["method"])
    if "balance" not in own and any(key.endswith(".gain") for key in dotted):
        merged["balance"] = "off"  # who sets a gain wants it in force
    for key in dotted:
        _check_prefix(key, names)
        if key.endswith(".gain") and merged["balance"] != "off":
            why = f"has no effect: balance={merged['balance']} sets the gains"
            raise UserError(key, why, "give balance=off, or drop it")
    parts = tuple(
        _part(name, {k.partition(".")[2]: v for k, v in dotted.items() if k.startswith(f"{name}.")}) for name in names
    )
    if names and not merged["teacher"]:
        raise UserError("teacher", "is missing", "give teacher=yolov8l.pt, or method=none for plain training")
    try:
        config = DistillationConfig(**merged, method_configs=parts)
    except ValidationError as e:
        raise _as_user_error(e, merged) from e
    _check_stages(config)
    return config


def _check_stages(config: DistillationConfig) -> None:
    starts = config.stages
    if starts is None:
        return
    if len(starts) != len(config.teachers) - 1 or list(starts) != sorted(set(starts)):
        raise UserError(
            f"stages={list(starts)}",
            f"must be the rising epochs at which the teachers after the first of {len(config.teachers)} take over",
            "for example teacher=[weak.pt,strong.pt] stages=[20]",
        )


def _number(value: object) -> object:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def method_names(method: object) -> tuple[str, ...]:
    """The names in `a+b`; () for none.

    Raises UserError where the text is no such composition.

    >>> method_names("dfd+pdf")
    ('dfd', 'pdf')
    """
    known = ", ".join([*sorted(registered()), "none"])
    argument = f"method={method}"
    if not isinstance(method, str) or not method.strip():
        raise UserError(argument, "is empty", f"one of: {known}; join several with +")
    if method == "none":
        return ()
    names = tuple(method.split("+"))
    for name in names:
        if not name or name == "none":
            raise UserError(argument, "is no list of methods joined by single +", f"for example {'+'.join(_two())}")
        if name not in registered():
            raise UserError(argument, f"no method {name!r}", f"one of: {known}; join several with +")
    if len(set(names)) < len(names):
        raise UserError(argument, "names a method twice", "name each method once")
    return names


def _two() -> list[str]:
    return sorted(registered())[:2]


def _check_prefix(key: str, names: tuple[str, ...]) -> None:
    prefix = key.partition(".")[0]
    if prefix in names:
        return
    if prefix in registered():
        raise UserError(
            key,
            f"sets a constant of {prefix}, which is not in method={'+'.join(names) or 'none'}",
            f"add {prefix} to method=, or drop {key}",
        )
    raise UserError(
        key, "unknown key", did_you_mean(prefix, registered()) or f"methods: {', '.join(sorted(registered()))}"
    )


def _part(name: str, overrides: dict[str, Any]) -> MethodConfig:
    values = method_defaults(name)
    model = constants_model(registered()[name])
    for key in overrides:
        known = [*SETTINGS, *model.model_fields]
        if key not in known:
            raise UserError(
                f"{name}.{key}", "no such constant", did_you_mean(key, known) or f"one of: {', '.join(known)}"
            )
    values |= overrides
    try:
        constants = {k: v for k, v in values.items() if k not in SETTINGS}
        checked = model.model_validate(constants, strict=True).model_dump()
        schedule = Schedule(**{k: v for k, v in values.items() if k in Schedule.model_fields})
        return MethodConfig(name=name, gain=values["gain"], schedule=schedule, constants=checked)
    except ValidationError as e:
        raise _as_user_error(e, values, prefix=f"{name}.") from e


def _as_user_error(error: ValidationError, values: Mapping[str, Any], prefix: str = "") -> UserError:
    first = error.errors()[0]
    key = str(first["loc"][0]) if first["loc"] else ""
    return UserError(f"{prefix}{key}={values.get(key)}", "not a valid value", first["msg"])


def merge_cfg_file(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `cfg=FILE`, if it is given, under those given beside it."""
    path = keys.get("cfg")
    if path is None:
        return dict(keys)
    try:
        with open(str(path), encoding="utf-8") as f:
            content = yaml.safe_load(f)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"cfg={path}", "cannot be read", "give a run's distill.yaml") from e
    if not isinstance(content, dict):
        raise UserError(f"cfg={path}", "holds no key: value pairs", "give a run's distill.yaml")
    return content | {k: v for k, v in keys.items() if k != "cfg"}


def check_keys(keys: Iterable[str], known: Iterable[str]) -> None:
    """Raise UserError for the first key that is neither in `known` (Ultralytics') nor yolokd's own."""
    known = {*known, *OWN_KEYS, "student"}
    for key in keys:
        if key not in known and "." not in key:
            raise UserError(
                key, "unknown key", did_you_mean(key, known) or "see `yolokd help` and Ultralytics' settings"
            )
