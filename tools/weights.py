"""Look at weight files, or convert them.

python -m tools.weights --info FILE          what the file is, its sizes, and whether it loads
python -m tools.weights --convert IN OUT     the tensors alone of a file that holds other pickled objects"""

import argparse
import dataclasses
import pickle
import zipfile
from io import BytesIO
from pathlib import Path

import torch

import checkpoint
import vqvae
from common import replacing, run
from formats import is_zip, read_weights, reading, shown
from settings import InputError

STORAGES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16}
STORAGES |= {"DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32}
STORAGES |= {"ShortStorage": torch.int16, "ByteStorage": torch.uint8, "BoolStorage": torch.bool}


class Inert(dict):
    """Stands for any object of a pickle: keeps dict entries, swallows everything else, runs nothing."""

    def __init__(self, *args):
        pass

    def _swallow(self, *args):
        return self

    __call__ = __setstate__ = append = extend = _swallow
    __hash__ = object.__hash__


class Entry(tuple):
    """What a pickle says of a tensor: ((_, dtype, storage key, _, _), offset, size, stride, ...)."""


class TensorsOnly(pickle._Unpickler):  # Python's own, as C's memo grows to the largest index that a file names
    """Unpickler that imports nothing: `Entry` for tensors, containers and numbers as they are, `Inert` for all else."""

    def find_class(self, module, name):
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return (lambda *args: Entry(args)) if name == "_rebuild_tensor_v2" else (lambda tensor, *rest: tensor)
        if (module, name) != ("collections", "OrderedDict"):
            self.strangers.add(f"{module}.{name}")
        return Inert

    def persistent_load(self, pid):
        return pid


def convert(source, target):
    """Write {"model": the tensors of `source`} to `target` without running anything of it; returns lines that say what.

    source: a zip of torch.save that holds a dict of tensors or {"model": such a dict, ...}. Raises InputError."""
    if Path(target).exists():
        raise InputError(f"{target}: exists, expected a new name")
    if not is_zip(source):
        raise InputError(f"{source}: not a zip of torch.save (torch 1.6 or newer); no other file is converted")
    storages, tensors = {}, {}
    with reading(source, "cannot be converted"), zipfile.ZipFile(source) as archive:
        entry = next(name for name in archive.namelist() if Path(name).name == "data.pkl")
        unpickler = TensorsOnly(BytesIO(archive.read(entry)))
        unpickler.strangers = set()
        content = unpickler.load()
        model = content["model"] if isinstance(content.get("model"), dict) else content
        for name, value in model.items():
            if type(value) is Entry:
                (_, dtype, key, *_), offset, size, stride, *_ = value
                if key not in storages:
                    data = bytearray(archive.read(f"{entry.removesuffix('data.pkl')}data/{key}"))
                    storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
                tensors[name] = storages[key].as_strided(size, stride, offset)  # raises past the storage's end
    if not tensors:
        raise InputError(f"{source}: no tensors in it, expected a state dict or {{'model': a state dict}}")
    with replacing(target) as file:
        torch.save({"model": tensors}, file)
    left = ", ".join(map(repr, sorted(unpickler.strangers))) or "nothing foreign"
    return [f"{target}: {len(tensors)} tensors", f"left out: {left}, and all beside the model's tensors"]


def describe(path):
    """Print what --info says of a file. Raises InputError, with the kind printed before, where it does not load."""
    state, info = read_weights(path)
    print(f"{path}: {info['kind']}, layout {info['layout']}, {len(state)} tensors")
    for key, value in {"task": info["task"], "step": info["step"], **info["config"]}.items():
        print(f"{key}: {shown(value)}")
    for what, tensors in info["set_aside"].items():
        print(f"set aside: {len(tensors)} names of {what}")
    if info["kind"] in ("bert", "resnet"):
        with reading(path, "incomplete"):
            print(checkpoint.read_sizes(state, info["kind"]))
        print("loads: with --bert=ITS FOLDER" if info["kind"] == "bert" else "loads: with --resnet_file=FILE")
        return
    if info["kind"] == "image_tokenizer":
        model = vqvae.load_image_tokenizer(path)
    else:
        model, _ = checkpoint.load_model(path)
    print("sizes:", dataclasses.asdict(model.config))
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}")
    print("loads: yes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--info", metavar="FILE", help="what the file is, its sizes, and whether it loads")
    action.add_argument("--convert", nargs=2, metavar=("IN", "OUT"), help="write the tensors of IN alone to OUT")
    given = parser.parse_args()
    if given.info:
        describe(given.info)
    else:
        print(*convert(*given.convert), sep="\n")


if __name__ == "__main__":
    run(main)
