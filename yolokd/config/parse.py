"""Turns a user's keys, over the defaults in cfg/, into one validated configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError
from ultralytics.utils import LOGGER

from yolokd.config.arguments import as_list, check_known, did_you_mean
from yolokd.config.defaults import defaults, method_defaults
from yolokd.config.schedule import Schedule
from yolokd.config.schema import METHOD_SETTINGS, OWN_KEYS, DistillationConfig, MethodConfig, normalize_teachers
from yolokd.config.ultralytics_keys import KNOWN_KEYS
from yolokd.config.validate import as_user_error
from yolokd.errors import UserError
from yolokd.methods import constants_model, registered


class Keys(NamedTuple):
    """Holds a run's flat keys in two groups: yolokd's, with the methods' constants (`dfd.alpha`), and Ultralytics'."""

    distillation: dict[str, Any]
    ultralytics: dict[str, Any]


def split_keys(keys: Mapping[str, Any]) -> Keys:
    """Tell yolokd's keys from Ultralytics'.

    >>> split_keys({"method": "dfd", "dfd.alpha": 0.5, "epochs": 3})
    Keys(distillation={'method': 'dfd', 'dfd.alpha': 0.5}, ultralytics={'epochs': 3})
    """
    distillation = {key: value for key, value in keys.items() if is_yolokd_key(key)}
    return Keys(distillation, {key: value for key, value in keys.items() if key not in distillation})


def is_yolokd_key(key: str) -> bool:
    """Return whether a key is yolokd's own or a constant of a method."""
    return key in OWN_KEYS or "." in key


def parse(keys: Mapping[str, Any]) -> DistillationConfig:
    """Return the validated configuration: yolokd's keys among `keys`, over their defaults.

    Raises UserError for an unknown method or constant, and for a value of the wrong type or range.

    >>> parse({"teacher": "t.pt", "method": "dfd+pdf", "dfd.alpha": 0.5}).method_configs[0].constants["alpha"]
    0.5
    """
    given = {k: v for k, v in keys.items() if k in OWN_KEYS}
    constants = {k: v for k, v in keys.items() if "." in k}
    values = {k: v for k, v in defaults().items() if k in OWN_KEYS} | given
    values["teacher"] = normalize_teachers(values["teacher"])
    if values["balance"] is False:  # YAML reads a bare `off` so
        values["balance"] = "off"
    if isinstance(values["unlabelled"], Path):
        values["unlabelled"] = str(values["unlabelled"])
    for key in ("levels", "stages", "teacher_channels"):
        if isinstance(values[key], int | float | list):
            values[key] = tuple(as_list(values[key]))
    if values["levels"] and all(isinstance(stride, int) for stride in values["levels"]):
        values["levels"] = tuple(sorted({*values["levels"]}))
    if "balance" not in given and any(key.endswith(".gain") for key in constants):
        values["balance"] = "off"  # a user who sets a gain wants it to be used
    names = method_names(values["method"])
    _check_constants(constants, names, values["balance"])
    methods = tuple(_method_config(name, constants) for name in names)
    if names and not values["teacher"]:
        raise UserError("teacher", "is missing", "give teacher=yolov8l.pt, or method=none for plain training")
    try:
        config = DistillationConfig(**values, method_configs=methods)
    except ValidationError as e:
        raise as_user_error(e, values) from e
    _check_teachers(config)
    if config.level_weights == "uniform" and config.level_floor > 0:
        why = "has no effect: level_weights=uniform weights all levels evenly"
        raise UserError(f"level_floor={config.level_floor:g}", why, "drop it, or give level_weights=confidence")
    _check_unlabelled(config)
    return config


def _check_constants(constants: Mapping[str, Any], names: tuple[str, ...], balance: object) -> None:
    """Raise UserError for `NAME.constant` of a method that is not used, and for a gain that the balance replaces."""
    for key in constants:
        _check_prefix(key, names)
        if key.endswith(".gain") and balance != "off":
            why = f"has no effect: balance={balance} sets the gains"
            raise UserError(key, why, f"give balance=off, or drop {key}")


def _check_teachers(config: DistillationConfig) -> None:
    """Raise UserError for an ensemble of one teacher, and for `stages` that do not fit the teachers."""
    starts, together = config.stages, config.teachers == "ensemble"
    if together and config.method_configs and len(config.teacher_files) < 2:
        raise UserError("teachers=ensemble", "needs several teachers", "for example teacher=[a.pt,b.pt]")
    if starts is None:
        return
    if together:
        why = "has no effect: the teachers of an ensemble all teach from the first epoch on"
        raise UserError(f"stages={list(starts)}", why, "drop it, or give teachers=stages")
    if len(config.teacher_files) < 2:
        why = "has no effect: there is one teacher" if config.teacher_files else "has no effect without teachers"
        raise UserError(f"stages={list(starts)}", why, "drop it, or give teacher=[weak.pt,strong.pt]")
    if len(starts) != len(config.teacher_files) - 1 or list(starts) != sorted(set(starts)):
        raise UserError(
            f"stages={list(starts)}",
            f"must be {len(config.teacher_files) - 1} rising epochs, one for each teacher after the first",
            "for example teacher=[weak.pt,strong.pt] stages=[20]",
        )


def _check_unlabelled(config: DistillationConfig) -> None:
    """Raise UserError for a ratio without images, and for images without a method; the plan knows what each learns."""
    if config.unlabelled is None and config.unlabelled_ratio != defaults()["unlabelled_ratio"]:
        raise UserError("unlabelled_ratio", "has no effect without images", "give unlabelled=, too, or drop it")
    if config.unlabelled is not None and not config.method_configs:
        why = "would not be used: method=none learns from labelled images alone"
        raise UserError(f"unlabelled={config.unlabelled}", why, "add a method such as fitnet, or drop it")


def method_names(method: object) -> tuple[str, ...]:
    """Return the names in `a+b`; an empty tuple for `none`.

    Raises UserError if the text is not a list of methods joined by +.

    >>> method_names("dfd+pdf")
    ('dfd', 'pdf')
    """
    known = ", ".join([*sorted(registered()), "none"])
    argument = f"method={method}"
    if isinstance(method, list | tuple):
        raise UserError(argument, "is a list", f"join methods with +, for example {'+'.join(map(str, method))}")
    if not isinstance(method, str) or not method.strip():
        raise UserError(argument, "is empty", f"one of: {known}; join several with +")
    if method == "none":
        return ()
    names = tuple(method.split("+"))
    for name in names:
        if not name or name == "none":
            example = "+".join(sorted(registered())[:2])
            raise UserError(argument, "is no list of methods joined by single +", f"for example {example}")
        if name not in registered():
            raise UserError(argument, f"no method {name!r}", f"one of: {known}; join several with +")
    if len(set(names)) < len(names):
        raise UserError(argument, "names a method twice", "name each method once")
    return names


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
    cure = did_you_mean(prefix, registered()) or f"methods: {', '.join(sorted(registered()))}"
    raise UserError(key, "unknown key", cure)


def _method_config(name: str, constants: Mapping[str, Any]) -> MethodConfig:
    """Return one method's configuration. constants: of all methods, with their prefixes (`dfd.alpha`)."""
    overrides = {key.partition(".")[2]: value for key, value in constants.items() if key.startswith(f"{name}.")}
    values = method_defaults(name)
    model = constants_model(registered()[name])
    known = [*METHOD_SETTINGS, *model.model_fields]
    for key in overrides:
        if key not in known:
            cure = did_you_mean(key, known) or f"one of: {', '.join(known)}"
            raise UserError(f"{name}.{key}", "no such constant", cure)
    values |= overrides
    try:
        unchecked = {k: v for k, v in values.items() if k not in METHOD_SETTINGS}
        checked = model.model_validate(unchecked, strict=True).model_dump()
        schedule = Schedule(**{k: v for k, v in values.items() if k in Schedule.model_fields})
        return MethodConfig(name=name, gain=values["gain"], schedule=schedule, constants=checked)
    except ValidationError as e:
        raise as_user_error(e, values, prefix=f"{name}.") from e


def merge_cfg_file(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of the file that `cfg=` names, if it is given, overridden by the other keys."""
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
    try:
        check_keys(content, KNOWN_KEYS)
    except UserError as e:
        raise UserError(f"cfg={path}", f"has an unknown key, {e.argument}", "give a run's distill.yaml") from e
    given = {k: v for k, v in keys.items() if k != "cfg"}
    return without_replaced(without_trust(content, f"cfg={path}"), given) | given


def without_replaced(saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return saved keys without those that the given ones make meaningless.

    Drops constants of methods that are no longer used, fixed gains if the gains are now balanced, the saved student if
    one is given under either name, and what is given as None, with its details.
    """
    dropped = {key for key, value in given.items() if value is None and key not in {"teacher", "student", "model"}}
    if given.get("method"):
        names = method_names(given["method"])
        dropped |= {key for key in saved if "." in key and key.partition(".")[0] not in names}
    if given.get("balance") not in (None, False, "off"):
        dropped |= {key for key in saved if key.endswith(".gain")}
    if given.get("student") or given.get("model"):
        dropped |= {"student", "model"}
    if "unlabelled" in dropped:
        dropped.add("unlabelled_ratio")
    return {key: value for key, value in saved.items() if key not in dropped}


def without_trust(keys: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return keys that come from a file without `trust`; say so if it was on.

    Only a person may trust a file, on the command line or in Python: a file that could trust itself would run its code.
    """
    if keys.get("trust"):
        LOGGER.warning(f"{source}: its trust=True is ignored; if you trust its files, give trust=True yourself")
    return {key: value for key, value in keys.items() if key != "trust"}


def check_keys(keys: Iterable[str], known: Iterable[str]) -> None:
    """Raise UserError for the first key that is neither in `known` (Ultralytics') nor yolokd's own."""
    known = {*known, *OWN_KEYS, "student"}
    check_known((key for key in keys if "." not in key), known, "see `yolokd help` and Ultralytics' settings")
