"""What the stages share and nothing else: settings, processes, randomness, schedule, optimizer groups, run folder.

No loop, no model, no task name stands here."""

import argparse
import ast
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

EXIT_STOPPED = 75  # of a run that SIGTERM or SIGINT ended after a save; sysexits.h's "try again". torchrun has its own


class InputError(ValueError):
    """Something the user gave (file, entry, setting, disk) is wrong; its text is the one line that the user sees."""


class Stopped(Exception):
    """The run was asked to stop, and has saved; its text is the one line that the user sees."""


def run(main):
    """Call `main()`; InputError: its one line and exit code 2, Stopped: its line and EXIT_STOPPED; a bug traces."""
    try:
        main()
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    except InputError as error:
        # an error raised in a DataLoader worker arrives wrapped in that worker's traceback: its last line is ours
        print("error:", str(error).strip().splitlines()[-1].removeprefix("common.InputError: "), file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# settings


def setting(default, meaning, limits=None):
    """A dataclass field with its meaning, which `--help` prints, and its (least, most) for `check_limits`."""
    factory = {"default_factory": lambda: dict(default)} if isinstance(default, dict) else {"default": default}
    return dataclasses.field(**factory, metadata={"meaning": meaning, "limits": limits})


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
    autocast(torch.device("cpu"), config.dtype)  # knows the names


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


# ---------------------------------------------------------------------------------------------------------------------
# processes


@dataclass
class Processes:
    """Who we are among the processes of torchrun (one process without it) and the device that is ours."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0


def start_processes(device="auto", deterministic=False):
    """Join torchrun's group where there is one: NCCL on GPUs, gloo on CPUs; one process needs no group. On a CPU the
    process keeps freed memory from then on. Raises InputError for a device that is not there."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
        torch.use_deterministic_algorithms(True)
    local_rank, world_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device: found {device!r}, expected auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: found cuda, but torch sees no GPU; use --device=cpu")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    elif platform.libc_ver()[0] == "glibc":
        # it gives the memory of large tensors back to the kernel, and to fault the pages in again takes up to a tenth
        # of a step; M_MMAP_MAX = 0 and M_TRIM_THRESHOLD = -1 keep it for the next tensor
        for option, value in ((-4, 0), (-1, -1)):
            ctypes.CDLL(None).mallopt(option, value)
    if world_size > 1:
        store, rank, _ = next(dist.rendezvous("env://"))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun (2.13) keeps one store over its restarts: a new group would wait for the dead one's addresses
            store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        # on GPUs both: tensors on the CPU, as of `any_process`, go through gloo and wait for no GPU
        backend, own = ("cpu:gloo,cuda:nccl", device) if on_gpu else ("gloo", None)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, device_id=own)
    return Processes(int(os.environ.get("RANK", 0)), world_size, device)


def in_group():
    """Whether collectives have anyone to talk to: the one check that all of them sit behind."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _GatherWithGradient(torch.autograd.Function):
    """Concatenate over processes; the gradient of a row is the sum of what all processes' losses say about it."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather_with_gradient(x):
    """(B, ...) of this process -> (world_size * B, ...) of all, rank after rank, differentiable; equal B everywhere."""
    return _GatherWithGradient.apply(x) if in_group() else x


def all_mean(x):
    """Mean over processes of a float tensor, no gradient; returns a new tensor of the same shape."""
    if not in_group():
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def gather_rows(x):
    """Rows of all processes, (B_r, ...) with any B_r each -> (sum of B_r, ...), no gradient, for evaluation."""
    if not in_group():
        return x
    counts = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    longest = max(int(n) for n in counts)
    padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])


def barrier():
    if in_group():
        dist.barrier()


def gather_objects(value):
    """[value of rank 0, of rank 1, ...] on every process; plain Python values and CPU tensors."""
    if not in_group():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def any_process(flag):
    """Whether `flag` is true on any process; every process gets the same answer."""
    if not in_group():
        return flag
    flag = torch.tensor(float(flag))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def copy_from_main(tensors):
    """Overwrite the tensors of every process by rank 0's."""
    if in_group():
        for tensor in tensors:
            dist.broadcast(tensor.data, 0)


def same_everywhere(what, value, cure):
    """Raise InputError naming the rank where `value` is not rank 0's."""
    values = gather_objects(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise InputError(f"{what}: rank {rank} has {other}, rank 0 {values[0]}; {cure}")


def checksum(model):
    """One number of all bits of a model's float32 parameters: that of other weights is almost surely another."""
    total = 0
    for i, parameter in enumerate(model.parameters(), 1):
        total = total + i * parameter.detach().view(torch.int32).sum(dtype=torch.int64)
    return int(total)


def check_weights(model, done):
    """Before a validation or save after `done` updates: rank 0's buffers for all, and parameters that must not differ.

    Raises InputError naming the rank that has drifted."""
    copy_from_main(model.buffers())  # BatchNorm's averages, which each process moves by its own batch
    cure = "the last checkpoint is from before it: --resume=auto, and suspect that rank's machine"
    same_everywhere(f"after update {done} the weights' checksums differ", checksum(model), cure)


# ---------------------------------------------------------------------------------------------------------------------
# stop requests and health


class StopSignals:
    """SIGTERM and SIGINT, from here to `restore()`, only set `asked`: the loop finishes its update, saves and leaves.

    A second Ctrl-C ends a run of one process at once; under torchrun, which passes each one on, it does not."""

    def __init__(self):
        self.asked = None
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number, frame):
        if self.asked and number == signal.SIGINT and not in_group():
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def leave_group(worker=0):
    """For data loader workers: Ctrl-C and torchrun's signals go to the whole process group, but the main process needs
    its workers for the last update. A SIGTERM to them alone still ends them: so a main process that fails does it."""
    os.setpgrp()


class Health:
    """Notes the first update whose loss or gradient is NaN or infinite, on the device, where nothing waits for it.

    `check` reads the note, at log lines and before every save: so the run ends some updates later, yet names the right
    one, for what an update was made of follows from its number. Under float16 infinite gradients are the scaler's
    business, which skips such updates; they are counted, and count as broken once its scale has fallen below 1."""

    def __init__(self, device, skipped_updates=0):
        self.note = torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64, device=device)  # update, loss, gradient norm
        self.skipped_updates = skipped_updates

    def step(self, step, loss, optimizer, scaler):
        """Do the optimizer's update `step` (from 0), whose loss on this process is `loss` (), and look at both."""
        scale = scaler.get_scale()  # 1.0 without a scaler; with one, scaler.step waits for the device anyway
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [] if scaler.is_enabled() else [p.grad for p in parameters]
        norm = torch.nn.utils.get_total_norm(gradients).to(loss.device)  # of nothing: 0
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:
            self.skipped_updates += 1
            norm = norm + (math.inf if scale < 1 else 0.0)
        number = torch.full((), step, device=loss.device)
        row = torch.stack([value.to(self.note) for value in (number, loss.detach(), norm)])
        self.note = torch.where((self.note[0] < 0) & ~row.isfinite().all(), row, self.note)

    def check(self, optimizer, config, batches, name_of):
        """Raise InputError, on every process, where an update was broken: its number, objective, rate and products.

        name_of(index): how messages call the data set's item. To be called by all processes together."""
        broken = [row for row in gather_objects(self.note.tolist()) if row[0] >= 0]
        if not broken:
            return
        step, loss, norm = min(broken, key=lambda row: row[0])
        _, rows, objective = batches.update(int(step))
        lr = optimizer.param_groups[0]["base_lr"] * lr_multiplier(step, config.warmup, config.milestones)
        raise InputError(
            f"update {int(step) + 1}: loss {loss:g}, gradient norm {norm:g} (objective {objective}, learning rate "
            f"{lr:.3g}); the last checkpoint is older and stays; lower --lr, or look at this update's products: "
            f"{', '.join(name_of(int(row)) for row in rows)}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# randomness, precision


def seed_step(seed, step, rank):
    """Seed dropout of one update from (seed, step, rank): any update can be run again without those before it."""
    state = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
    torch.default_generator.manual_seed(state)  # torch.manual_seed keeps a stack trace per call where there is no GPU
    if torch.cuda.is_available():
        torch.cuda.manual_seed(state)


def autocast(device, dtype):
    """The autocast context of a config's dtype name; float32 is none."""
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype: found {dtype!r}, expected float32, bfloat16 or float16")
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))


# ---------------------------------------------------------------------------------------------------------------------
# learning rate and optimizer


def lr_multiplier(n, warmup, milestones, warmup_factor=0.25):
    """Factor on every rate with `n` updates done: linear from .25 up to `warmup`, a tenth at each milestone."""
    if n < warmup:
        return warmup_factor * (1 - n / warmup) + n / warmup
    return 0.1 ** sum(n >= m for m in milestones)


def is_fast(name):
    """Image encoder, projection and heads learn `lr_factor` times faster; the heads have no part in BERT."""
    return name.startswith(("image_encoder.", "heads.", "bert.embeddings.projection."))


def has_decay(name):
    """All but biases and LayerNorms decay; the image encoder's BatchNorms do decay, as in the original's optimizer."""
    return name.startswith("image_encoder.") or not (name.endswith(".bias") or "LayerNorm" in name)


def parameter_groups(model, config):
    """AdamW groups, every trainable parameter in exactly one: fast or base rate, with or without decay."""
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lr = config.lr * (config.lr_factor if is_fast(name) else 1.0)
        decay = config.weight_decay if has_decay(name) else 0.0
        group = groups.setdefault((lr, decay), {"params": [], "base_lr": lr, "lr": lr, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def make_optimizer(model, config):
    """torch's fused AdamW over `parameter_groups`, betas (.9, .999), eps 1e-8."""
    return torch.optim.AdamW(parameter_groups(model, config), eps=1e-8, fused=True)


def set_lr(optimizer, n, config):
    """Set every group's rate for the update that follows `n` finished ones; returns the multiplier."""
    factor = lr_multiplier(n, config.warmup, config.milestones)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return factor


# ---------------------------------------------------------------------------------------------------------------------
# run folder


def mean_of_updates(sums, device):
    """{name: mean per update over all processes} of {name: sum, "updates": n}; sums are floats or device tensors."""
    n = sums["updates"]
    flat = {k: torch.as_tensor(v, dtype=torch.float64, device=device).sum() for k, v in sums.items() if k != "updates"}
    return {name: float(all_mean(value / n)) for name, value in flat.items()}


def describe_run(config):
    """What must be known to run this again: command, settings, git commit, versions."""
    git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "command": shlex.join([sys.executable, *sys.argv]),
        "config": dataclasses.asdict(config),
        "git_commit": git.stdout.strip() or None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@contextlib.contextmanager
def writing(path):
    """What the disk refuses while `path` is written becomes one line: InputError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        while not isinstance(error, OSError) and error.__context__:  # torch's writer hides what the disk said
            error = error.__context__
        cause = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0][:300] or type(error).__name__
        raise InputError(f"{path}: cannot be saved: {cause}; what was there before is unharmed") from None


@contextlib.contextmanager
def replacing(path):
    """A binary file, written aside in the same folder, flushed to disk, and only then given its name `path`.

    Raises InputError on a full disk, a missing folder or permission: the last whole file stays and no half one."""
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    try:
        with writing(path):
            with open(aside, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    with contextlib.suppress(OSError):  # makes the rename last; some network file systems cannot sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path, value):
    """A reader never sees half a file."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def due(config, done, stopping=False):
    """(log, validate, save): what is to be done after `done` updates; `stopping`: and then the run leaves."""

    def every(interval):
        return done == config.max_steps or (interval > 0 and done % interval == 0)

    validate = config.eval_interval >= 0 and every(config.eval_interval)
    return every(config.log_interval), validate, validate or every(config.save_interval) or stopping


_locks = {}  # {run folder: its open lock file}; the system lets go of it when the process dies, however it does


def lock_folder(folder):
    """Raise InputError where another process trains in the folder: two would write one checkpoint in turns."""
    import fcntl  # not on Windows

    _locks.pop(folder, None)
    file = open(folder / "lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # loader workers, which may outlive us, do not hold it
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return  # a file system without locks
        file.seek(0)
        who = file.read().strip() or "another process"
        raise InputError(f"{folder}: {who} trains in it; stop it or choose another --out_dir") from None
    file.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", file=file, flush=True)
    _locks[folder] = file


def open_run(config, start):
    """Make the run folder ready for updates from `start` on: a lock, run.json, and a log without lines past `start`.

    A new start in the folder of another run renames that one's files to *.before: a later --resume=auto must not find
    them, and they may be days of work. Raises InputError where the folder cannot be written, or is in use."""
    folder = Path(config.out_dir)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder)
        if start == 0 and (folder / "last.pt").exists():
            for name in ("last.pt", "best.pt", "log.jsonl"):
                if (folder / name).exists():
                    os.replace(folder / name, folder / f"{name}.before")
            print(f"{folder}: holds an older run, kept as *.before (--resume=auto would have gone on with it)")
    write_json(folder / "run.json", describe_run(config))
    cut_log(folder / "log.jsonl", start)


def start_wandb(config):
    """A Weights & Biases run where the setting `wandb` names a project, else None; InputError if not installed."""
    if not config.wandb:
        return None
    try:
        import wandb
    except ImportError:
        raise InputError(f"wandb: set to {config.wandb!r}, but the package is missing; pip install wandb") from None
    return wandb.init(project=config.wandb, config=dataclasses.asdict(config), dir=config.out_dir)


def append_log(path, row):
    """One JSON line; not-a-number and infinity are not JSON, so they are written as null."""
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    with writing(path), open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())  # a checkpoint that lasts, with log lines that do not, would leave a gap


def cut_log(path, step):
    """Drop the lines past `step`, and a last line cut short, so that a resumed run writes each step once."""
    if not Path(path).exists():
        return
    kept = []
    for line in Path(path).read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    with replacing(path) as file:
        file.write("".join(line + "\n" for line in kept).encode())


def as_values(tree):
    """A dict of sums, nested or not, for a checkpoint: scalars as floats, exactly; other tensors on the CPU."""
    if isinstance(tree, dict):
        return {key: as_values(value) for key, value in tree.items()}
    return tree.cpu() if torch.is_tensor(tree) and tree.ndim else float(tree)


def own_part(state, processes):
    """This process's part of what differs between them, state["parts"] = gather_objects(...); {} where there is none.

    A run resumed with another number of processes shares the parts out as they come."""
    parts = state.get("parts") or [{}]
    return parts[processes.rank % len(parts)]


def peak_memory_gb(device):
    """Peak memory so far in GB: the GPU's allocator where there is one, else this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # not on Windows, which has no torchrun on GPUs to speak of either

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
