"""What the stages share and nothing else: settings, processes, randomness, schedule, optimizer groups, run folder.

No loop, no model, no task name stands here."""

import contextlib
import ctypes
import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from settings import InputError

EXIT_STOPPED = 75  # of a run that SIGTERM or SIGINT ended after a save; sysexits.h's "try again". torchrun has its own


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
        print("error:", str(error).strip().splitlines()[-1].removeprefix("settings.InputError: "), file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# settings


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
