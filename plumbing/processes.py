"""The processes of a run: their start, their device, and what they do together."""

import contextlib
import ctypes
import os
import platform
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from plumbing.settings import InputError


@dataclass
class Processes:
    """This process's rank among the `world_size` processes of torchrun, and its device. Without torchrun: 0 of 1."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0

    def seed(self, seed, step, rank=None):
        """Seed torch for one update from (seed, step, rank): an update can be repeated without those before it.

        rank: the own one where it is None, so that dropout differs between processes."""
        rank = self.rank if rank is None else rank
        state = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
        torch.default_generator.manual_seed(state)  # torch.manual_seed keeps a stack trace per call
        if torch.cuda.is_available():
            torch.cuda.manual_seed(state)

    def autocast(self, dtype):
        """The autocast context of a dtype's name, one of settings.DTYPES; for float32 it does nothing."""
        is_off = dtype == "float32"
        return contextlib.nullcontext() if is_off else torch.autocast(self.device.type, dtype=getattr(torch, dtype))

    def distribute(self, model):
        """The model as DistributedDataParallel where there are several processes, else the model itself."""
        # An update uses the heads of one objective. DDP must not wait for gradients of the others. All gradients lie in
        # the memory of DDP, for a second copy would take as much as the weights.
        options = {"find_unused_parameters": True, "gradient_as_bucket_view": True}
        return DistributedDataParallel(model, **options) if self.world_size > 1 else model

    def averaging(self, ddp, is_last):
        """The context of a micro-batch: DDP averages the gradients over processes once an update, in the last one."""
        return ddp.no_sync() if self.world_size > 1 and not is_last else contextlib.nullcontext()


def allow_tf32(allowed):
    """Whether GPUs may multiply float32 in TF32, with 10 bits in place of 23. It changes nothing on a CPU."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def device_name(device):
    """ "cpu", or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def start_processes(device="auto", deterministic=False, tf32=False):
    """Choose the device and join torchrun's process group, if there is one: NCCL on GPUs, gloo on CPUs.

    device: "auto", "cpu" or "cuda". Returns Processes. Raises InputError for a device that is not there."""
    allow_tf32(tf32)
    # Images have one size, so a search for the fastest kernels is worth it. Its result may differ between runs.
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses without it
        torch.use_deterministic_algorithms(True)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: found cuda, but torch sees no GPU; use --device=cpu")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    elif platform.libc_ver()[0] == "glibc":
        # glibc gives the memory of large tensors back to the system, and getting it again takes up to a tenth of a
        # step. M_MMAP_MAX (-4) = 0 and M_TRIM_THRESHOLD (-1) = -1 keep it for the next tensor.
        for option, value in ((-4, 0), (-1, -1)):
            ctypes.CDLL(None).mallopt(option, value)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):  # some launchers set WORLD_SIZE alone
            if name not in os.environ:
                raise InputError(
                    f"WORLD_SIZE={processes}, but {name} is not set; start by torchrun, or unset WORLD_SIZE"
                )
        # On GPUs there are both backends: tensors on the CPU, as in `any_process`, go through gloo and wait for no GPU.
        backend, own_device = ("cpu:gloo,cuda:nccl", device) if on_gpu else ("gloo", None)
        # torchrun's store lives on when it restarts a run. Without a prefix a new group waits for dead addresses.
        store, own_rank, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=own_rank, world_size=processes, device_id=own_device)
    return Processes(rank(), processes, device)


def world_size():
    """Number of processes in the group; 1 where there is no group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """This process's place in the group, from 0; 0 where there is no group."""
    return dist.get_rank() if dist.is_initialized() else 0


def in_group():
    """Whether there are other processes. Every collective below asks this first."""
    return world_size() > 1


class _GatherWithGradient(torch.autograd.Function):
    """Concatenation over processes. The gradient of a row is the sum of its gradients in all processes' losses.

    It is a sum because DDP divides gradients by the number of processes afterwards. So the mean loss is differentiated.
    """

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(world_size())[rank()]


def gather_with_gradient(x):
    """(B, ...) of this process -> (world_size * B, ...) of all, rank after rank, differentiable. All B are equal."""
    return _GatherWithGradient.apply(x) if in_group() else x


def all_mean(x):
    """Mean over processes of a float tensor, without gradient, of the same shape."""
    if not in_group():
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / world_size()


def gather_objects(value):
    """[value of rank 0, of rank 1, ...] on every process; plain Python values and CPU tensors."""
    values = [value] * world_size()
    if in_group():
        dist.all_gather_object(values, value)
    return values


def any_process(flag):
    """Whether `flag` is true on any process. Every process gets the same answer."""
    if not in_group():
        return flag
    flag = torch.tensor(float(flag))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def copy_from_main(tensors):
    """Overwrite the tensors of every process, which need no gradient, by those of rank 0."""
    if in_group():
        for tensor in tensors:
            dist.broadcast(tensor, 0)
