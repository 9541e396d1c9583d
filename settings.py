"""Settings of a stage: a dataclass, filled from a file of plain assignments and from the command line."""

import argparse
import ast
import dataclasses
import difflib
import math
import typing
from dataclasses import dataclass
from pathlib import Path


class InputError(ValueError):
    """Something the user gave (file, entry, setting, disk) is wrong; its text is the one line that the user sees."""


def setting(default, meaning, limits=None):
    """A dataclass field with its meaning, which `--help` prints, and its (least, most) for `check_limits`."""
    factory = {"default_factory": lambda: dict(default)} if isinstance(default, dict) else {"default": default}
    return dataclasses.field(**factory, metadata={"meaning": meaning, "limits": limits})


STRIDE = 32  # pixels of an image per patch of the ResNet, along each side
DTYPES = ("float32", "bfloat16", "float16")
COUNT, SHARE, FROM_0 = (1, math.inf), (0.0, 1.0), (0, math.inf)  # limits


def check_limits(config):
    """Raise InputError for a number outside its setting's limits, and for what every stage would trip over later."""
    for f in dataclasses.fields(config):
        value, limits = getattr(config, f.name), f.metadata["limits"]
        if limits and not (limits[0] <= value <= limits[1] and math.isfinite(value)):
            most = f" to {limits[1]}" if math.isfinite(limits[1]) else " or more"
            raise InputError(f"{f.name}: found {value}, expected {limits[0]}{most}")
    if not all(type(step) is int and step >= 0 for step in config.milestones):
        raise InputError(f"milestones: found {config.milestones}, expected whole numbers of updates")
    if config.dtype not in DTYPES:
        raise InputError(f"dtype: found {config.dtype!r}, expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")


@dataclass
class TrainConfig:
    """Settings of every training stage. A stage's own class adds what only that stage has."""

    data_root: str = setting("data/datasets", "folder that holds FashionGen/, BigFACAD/, Fashion200k/, ...")
    out_dir: str = setting("", "run folder; empty: runs/<name of the config file>")
    vocab: str = setting("", "WordPiece vocab.txt; empty: first of DATA_ROOT/vocab.txt, BERT/vocab.txt, the hub's file")
    image_size: int = setting(224, "pixels a side, a multiple of 32")
    batch_size: int = setting(256, "products per update, all processes together", COUNT)
    grad_accum: int = setting(
        1, "micro-batches per update; contrastive candidates are one micro-batch of all processes", COUNT
    )
    max_steps: int = setting(120_000, "updates", COUNT)
    lr: float = setting(1e-5, "base learning rate", FROM_0)
    lr_factor: float = setting(20.0, "image encoder, projection and heads learn this much faster", FROM_0)
    weight_decay: float = setting(1e-4, "AdamW weight decay", FROM_0)
    warmup: int = setting(15_000, "updates until the full learning rate; 0: none", FROM_0)
    milestones: tuple = setting((45_000, 90_000), "updates at which the learning rate falls to a tenth")
    dtype: str = setting("float32", "float32, bfloat16 (autocast) or float16 (autocast and GradScaler)")
    compile: bool = setting(False, "torch.compile the model")
    device: str = setting("auto", "auto, cpu or cuda")
    eval_batch_size: int = setting(64, "images or texts a process embeds at a time in validation", COUNT)
    workers: int = setting(4, "data loader workers per process; 0: load in the training process", FROM_0)
    seed: int = setting(0, "every draw follows from it", (0, 2**63 - 1))
    deterministic: bool = setting(False, "only deterministic kernels; on CPU they always are")
    log_interval: int = setting(50, "updates between log lines", COUNT)
    eval_interval: int = setting(
        2_000, "updates between validations, each with a checkpoint; 0: only at the end, -1: never", (-1, math.inf)
    )
    save_interval: int = setting(0, "updates between further checkpoints; 0: none but those of validations", FROM_0)
    resume: str = setting("", "auto (newest whole checkpoint of the run folder, else start) or a checkpoint")
    wandb: str = setting("", "Weights & Biases project; empty: off")


@dataclass
class ModelTrainConfig(TrainConfig):
    """Settings of the stages that train FashionViL itself."""

    size: str = setting("base", "Transformer size, a row of model.SIZES")
    resnet: str = setting("resnet50", "resnet18, resnet34 or resnet50")
    width: int = setting(64, "channels of the ResNet's first stage", COUNT)
    max_tokens: int = setting(0, "longest text, [CLS] and [SEP] included; 0: the recipe's 75, for fashioniq 50", FROM_0)
    dropout: float = setting(0.1, "dropout of the Transformer", SHARE)
    init: str = setting("pretrained", "pretrained (ImageNet ResNet + BERT), random, or a checkpoint")
    bert: str = setting("", "BERT folder or hub name, also sets the Transformer's size; empty: bert-base-uncased")
    resnet_file: str = setting("", "torchvision's ResNet weights for --init=pretrained; empty: fetched, random: none")


def _convert(value, kind, where):
    """`value` as the field type `kind`, or an InputError that says where, what was found and what was expected."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    if type(value) is not kind:
        raise InputError(f"{where}: found {value!r}, expected {kind.__name__}")
    return value


def _literal(text):
    """45000 as a number; FashionGen, a bare name, as it stands."""
    return text if text.isidentifier() else ast.literal_eval(text)


def _parse(text, kind, where):
    """Command-line text as the field type: True/False, 1e-5, 45000,90000, FashionGen,BigFACAD or itc:0.5,mlm:0.5."""
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind is tuple:
            return tuple(_literal(part) for part in text.split(",") if part)
        if kind is dict:
            pairs = [part.partition(":") for part in text.split(",") if part]
            return {name: float(value) if colon else 1.0 for name, colon, value in pairs}
        return kind(text)
    except (ValueError, KeyError, SyntaxError):
        raise InputError(f"{where}: found {text!r}, expected {kind.__name__}") from None


def _nearest(name, names):
    close = difflib.get_close_matches(name, names, 1, 0)
    return f"unknown setting {name!r}; the nearest is {close[0]!r} (--help lists all)"


def read_config_file(path, names):
    """{name: value} of a file of plain assignments, `name = literal  # comment`; nothing in it is executed.

    Raises InputError naming file and line where a name is not in `names` or a value is not a literal."""
    try:
        tree = ast.parse(Path(path).read_text())
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"config file {path}: cannot be read: {error}") from None
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        try:
            (target,) = node.targets
            values[target.id] = ast.literal_eval(node.value)
        except (AttributeError, ValueError):
            raise InputError(f"{path}:{node.lineno}: expected `name = literal`") from None
        if target.id not in names:
            raise InputError(f"{path}:{node.lineno}: {_nearest(target.id, names)}")
    return values


def load_config(cls, argv=None, description="", files=None):
    """A `cls` from an optional config file and `--key=value` / `--key value`, which win over the file.

    `files(given)` may name the config file from what was given (a task's own file) where none stands on the line.
    Raises InputError on an unknown key (naming the nearest), a wrong type or an unreadable file; `--help` exits."""
    kinds = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)

    def stop(message):
        raise InputError(message)

    parser.error = stop
    parser.add_argument("config", nargs="?", help="file of plain assignments, such as configs/mini.py")
    for name, f in fields.items():
        default = f.default_factory() if f.default is dataclasses.MISSING else f.default
        parser.add_argument(
            f"--{name}",
            metavar=kinds[name].__name__.upper(),
            default=argparse.SUPPRESS,
            help=f"{f.metadata['meaning']} [{default!r}]".replace("%", "%%"),
            **({"nargs": "?", "const": "True"} if kinds[name] is bool else {}),
        )
    given, unknown = parser.parse_known_args(argv)
    for word in unknown:
        raise InputError(_nearest(word.lstrip("-").partition("=")[0], fields))
    given = vars(given)
    path = given.pop("config")
    given = {name: _parse(text, kinds[name], f"--{name}") for name, text in given.items()}
    path = path or (files(given) if files else None)
    from_file = read_config_file(path, fields) if path else {}
    from_file = {name: _convert(value, kinds[name], f"{path}: {name}") for name, value in from_file.items()}
    config = cls(**{**from_file, **given})
    if "out_dir" in fields and not config.out_dir:
        config.out_dir = f"runs/{Path(path).stem if path else cls.__name__.removesuffix('Config').lower()}"
    return config
