"""A pretend GPU: tensors that say they live on device "gpu:0" and compute on the CPU.

float32 only: autocast knows no such device. An operation that mixes devices raises, as CUDA would. `waits` counts what
would make the host wait for a GPU (or copy to it from ordinary memory), with the line of the caller. What a GPU would
do differently otherwise (kernels, autocast's casts, streams) does not show.

    import pretend_gpu                       # before anything makes a tensor on the device
    with pretend_gpu.on():
        pretrain.train(config, processes.Processes(0, 1, pretend_gpu.DEVICE))   # workers=0
    print(pretend_gpu.waits.most_common())
"""

import collections
import contextlib
import os
import traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("gpu")
torch.gpu.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
DEVICE = torch.device("gpu", 0)
waits = collections.Counter()  # {(operation, "file.py:line"): times}
HERE = os.path.abspath(__file__)
MAY_MIX = ("aten::copy_", "aten::_to_copy")
WAITS = (
    "aten::nonzero",
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
)


def note(name):
    stack = [f for f in traceback.extract_stack() if f.filename != HERE and f"{os.sep}torch{os.sep}" not in f.filename]
    waits[name, f"{os.path.basename(stack[-1].filename)}:{stack[-1].lineno}"] += 1


class Pretended(torch.Tensor):
    """`elem` is the CPU tensor that holds the numbers."""

    @staticmethod
    def __new__(cls, elem):
        t = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=DEVICE,
            requires_grad=False,
        )
        t.elem = elem
        return t

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def tolist(self):
        note("tolist")
        return self.elem.tolist()

    def new_tensor(self, data, **options):
        note("new_tensor")
        return Pretended(torch.tensor(data, dtype=options.get("dtype", self.dtype)))

    def __getitem__(self, index):
        if isinstance(index, torch.Tensor):  # torch's own way asks the device for memory behind our back
            if isinstance(index, Pretended) and index.dtype == torch.bool:
                note("boolean index")
            return torch.ops.aten.index.Tensor(self, [index])
        return super().__getitem__(index)


def run(func, args, kwargs):
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    name, ours = func._schema.name, any(isinstance(x, Pretended) for x in tensors)
    strangers = [x for x in tensors if not isinstance(x, Pretended) and x.dim()]
    if ours and strangers and name not in MAY_MIX:
        if not (name.startswith("aten::index") and isinstance(tensors[0], Pretended)):  # CUDA takes CPU indices
            raise RuntimeError(
                f"{func}: tensors on two devices: {[(type(x).__name__, tuple(x.shape)) for x in tensors]}"
            )
    if ours and name in WAITS:
        note(name)
    target = kwargs.get("device")
    if target is not None:
        to_gpu = torch.device(target).type == "gpu"
        if (
            name == "aten::_to_copy"
            and tensors
            and to_gpu != isinstance(tensors[0], Pretended)
            and not kwargs.get("non_blocking")
        ):
            note("copy between host and device")
        kwargs = {k: v for k, v in {**kwargs, "device": torch.device("cpu")}.items() if k != "pin_memory"}
    else:
        to_gpu = (
            isinstance(args[0], Pretended) if name == "aten::copy_" else ours and name != "aten::_local_scalar_dense"
        )
    out = func(*tree_map(plain, args), **tree_map(plain, kwargs))
    if func._schema.is_mutable and args and isinstance(args[0], Pretended) and out is args[0].elem:
        return args[0]
    return tree_map(lambda x: Pretended(x) if isinstance(x, torch.Tensor) else x, out) if to_gpu else out


def plain(x):
    """What a CPU holds of it; for checkpoints map a state with it before it is saved."""
    return x.elem if isinstance(x, Pretended) else x


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def _made_on_host(make):
    """torch.tensor and torch.as_tensor with device=: built on the CPU, then sent."""

    def made(data, *args, device=None, **kwargs):
        if isinstance(data, Pretended):
            return data.to(kwargs.get("dtype", data.dtype))
        x = make(data, *args, **kwargs)
        return x.to(device) if device is not None and torch.device(device).type == "gpu" else x

    return made


@contextlib.contextmanager
def on():
    """The pretend GPU is there. `.to(DEVICE)` unties a module's tied parameters here: tie them again after it."""
    before = torch.tensor, torch.as_tensor, torch.__future__.get_overwrite_module_params_on_conversion()
    torch.tensor, torch.as_tensor = map(_made_on_host, before[:2])
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _Mode():
            yield
    finally:
        torch.tensor, torch.as_tensor = before[:2]
        torch.__future__.set_overwrite_module_params_on_conversion(before[2])
