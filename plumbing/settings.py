"""Settings of a stage: one dataclass, filled from a file of plain assignments and from --name=value.

A stage declares every setting with `setting(...)`. `load_config` reads them, `--help` prints them in their groups,
and `check_limits` refuses values that cannot be. No torch is needed here."""

import argparse
import ast
import dataclasses
import difflib
import math
import os
import typing
from pathlib import Path

STRIDE = 32  # pixels of an image per patch of the ResNet, along each side
NO_LABEL = -100  # label of a token that is no target; torch's cross_entropy leaves it out
DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
COUNT = (1, math.inf)  # limits of a setting: least and most
SHARE = (0.0, 1.0)
FROM_0 = (0, math.inf)
MISSING = "an image file that is missing or broken: stop (end with its name) or skip (leave it out and count it)"


class InputError(ValueError):
    """Something that the user gave is wrong: a file, a setting, the disk. Its text is the one line that they see."""


def setting(default, meaning, limits=None, choices=None, group=None):
    """A dataclass field with what `--help` prints of it and what `check_limits` allows.

    limits: (least, most) of a number. choices: the names that a text may be.
    group: the heading under which `--help` lists this setting and those that follow it."""
    factory = {"default_factory": lambda: dict(default)} if isinstance(default, dict) else {"default": default}
    metadata = {"meaning": meaning, "limits": limits, "choices": choices, "group": group}
    return dataclasses.field(**factory, metadata=metadata)


def check_limits(config):
    """Raise InputError for a setting outside its limits or choices."""
    for f in dataclasses.fields(config):
        value, limits, choices = getattr(config, f.name), f.metadata["limits"], f.metadata["choices"]
        if limits and not (limits[0] <= value <= limits[1] and math.isfinite(value)):
            most = f" to {limits[1]}" if math.isfinite(limits[1]) else " or more"
            raise InputError(f"{f.name}: found {value}, expected {limits[0]}{most}")
        if choices and value not in choices:
            raise InputError(f"{f.name}: found {value!r}, expected one of {', '.join(choices)}")
        if f.name == "milestones" and not all(type(step) is int and step >= 0 for step in value):
            raise InputError(f"milestones: found {value}, expected whole numbers of updates")
        if f.name == "image_size" and value != f.default and (value < STRIDE or value % STRIDE):
            raise InputError(f"image_size: found {value}, expected a multiple of {STRIDE}")


def _typed(value, kind, where):
    """A config file's `value` as the field type `kind`. Raises InputError that says where."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    if type(value) is not kind:
        raise InputError(f"{where}: found {value!r}, expected {kind.__name__}")
    return value


def _parse(text, kind, where):
    """Command-line text as the field type: True, 1e-5, 45000,90000, FashionGen,BigFACAD or itc:0.5,mlm:0.5."""
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind is tuple:
            # a bare name such as FashionGen is a text; everything else is a literal
            parts = [part.strip() for part in text.split(",") if part.strip()]
            return tuple(part if part.isidentifier() else ast.literal_eval(part) for part in parts)
        if kind is dict:
            pairs = [part.strip().partition(":") for part in text.split(",") if part.strip()]
            return {name: float(value) if colon else 1.0 for name, colon, value in pairs}
        return kind(text)
    except (ValueError, KeyError, SyntaxError):
        raise InputError(f"{where}: found {text!r}, expected {kind.__name__}") from None


def _unknown(name, names):
    if name in ("--local-rank", "--local_rank"):  # the launchers before torchrun give it
        return f"{name}: comes from an older launcher; start by torchrun"
    nearest = "".join(f"; the nearest is {near!r}" for near in difflib.get_close_matches(name, names, 1))
    return f"unknown setting {name!r}{nearest} (--help lists all)"


def read_config_file(path, names):
    """{name: value} of a file of plain assignments, `name = literal  # comment`. Nothing in the file is executed.

    Raises InputError naming file and line where a name is not in `names` or a value is not a literal."""
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"config file {path}: cannot be read: {error}") from None
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        try:
            (target,) = node.targets
            name, value = target.id, ast.literal_eval(node.value)
        except (AttributeError, ValueError):
            raise InputError(f"{path}:{node.lineno}: expected `name = literal`") from None
        if name not in names:
            raise InputError(f"{path}:{node.lineno}: {_unknown(name, names)}")
        if name in values:
            raise InputError(f"{path}:{node.lineno}: setting {name!r} stands in the file twice, expected it once")
        values[name] = value
    return values


def _build_parser(cls, kinds, description):
    """An argparse parser with an argument for every field of the dataclass, in its groups."""
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def stop(message):
        raise InputError(message)

    parser.error = stop
    parser.add_argument("config", nargs="?", help="file of plain assignments, such as configs/mini.py")
    group = parser
    inherited = {f.name for base in cls.__bases__ if dataclasses.is_dataclass(base) for f in dataclasses.fields(base)}
    for f in sorted(dataclasses.fields(cls), key=lambda f: f.name in inherited):  # a stage's own settings come first
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        default = f.default_factory() if f.default is dataclasses.MISSING else f.default
        # `--compile` alone means `--compile=True`
        flag = {"nargs": "?", "const": "True"} if kinds[f.name] is bool else {}
        group.add_argument(
            f"--{f.name}",
            metavar=kinds[f.name].__name__.upper(),
            default=argparse.SUPPRESS,
            help=f"{f.metadata['meaning']} [{default!r}]".replace("%", "%%"),
            **flag,
        )
    return parser


def load_config(cls, argv=None, description="", files=None):
    """A `cls` from an optional config file and from `--name=value` or `--name value`, which win over the file.

    files(given): the config file to read where the command line names none; given {name: value} of the command line.
    Raises InputError on an unknown name (it names the nearest), a wrong type, an unreadable file. `--help` exits."""
    kinds = typing.get_type_hints(cls)
    given, unknown = _build_parser(cls, kinds, description).parse_known_args(argv)
    if unknown:
        raise InputError(_unknown(unknown[0].partition("=")[0], [f"--{name}" for name in kinds]))
    given = vars(given)
    path = given.pop("config")
    given = {name: _parse(text, kinds[name], f"--{name}") for name, text in given.items()}
    if not path and files:
        path = files(given)
    from_file = read_config_file(path, kinds) if path else {}
    from_file = {name: _typed(value, kinds[name], f"{path}: {name}") for name, value in from_file.items()}
    values = {**from_file, **given}
    # "~" is the home folder. The shell leaves it as it is after "=".
    config = cls(**{name: os.path.expanduser(value) if kinds[name] is str else value for name, value in values.items()})
    if "out_dir" in kinds and not config.out_dir:
        stage = cls.__name__.removesuffix("Config").lower()
        config.out_dir = f"runs/{Path(path).stem if path else stage}"
        task = getattr(config, "task", "")
        if task not in config.out_dir:  # one config file may serve several tasks: one folder a task
            config.out_dir += f"_{task}"
    check_limits(config)
    return config
