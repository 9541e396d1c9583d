"""Look at weight files, or convert them.

python -m tools.weights --info FILE          what the file is, its sizes, and whether it loads
python -m tools.weights --convert IN OUT     the tensors alone of a whole model, or of a file with other pickled objects
With --part=PREFIX, --convert takes one of several models: what stands before its names, such as teacher.backbone"""

import argparse
import dataclasses
import re
from pathlib import Path

import torch

import vqvae
from model import ResNet
from plumbing import checkpoint, weights
from plumbing.ending import run
from plumbing.files import reading, replacing, shown
from plumbing.settings import InputError


class Inert(dict):
    """Stands for any object of a pickle: keeps dict entries and its own values, swallows the rest, runs nothing."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.update(state)

    append = extend = __init__
    __hash__ = object.__hash__


def convert(source, target, part=None):
    """Write {"model": the tensors of `source`} to `target` without running anything of it; returns lines that say what.

    source: a zip of torch.save that holds a dict of tensors, {"model": such a dict, ...} or a whole model.
    part: where a file holds several models, what stands before the names of the one. Raises InputError."""
    if Path(target).exists():
        raise InputError(f"{target}: exists, expected a new name")
    with reading(source, "cannot be converted"):
        # torch's own safe reader takes `Inert` for every class and function that it would refuse.
        strangers = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(source))
        with torch.serialization.safe_globals([(Inert, name) for name in strangers]):
            content = torch.load(source, map_location="cpu", weights_only=True)
        if part is None and isinstance(content.get("model"), dict):
            content = content["model"]
        before, tensors = part.rstrip(".") + "." if part else "", {}
        for name, tensor in weights.all_tensors(content).items():
            name = re.sub(r"\b_(modules|parameters|buffers)\.", "", name)  # these are an nn.Module's own
            if name.startswith(before):
                tensors[name.removeprefix(before)] = tensor.detach()
    if not tensors:
        raise InputError(f"{source}: no tensors {f'under {part}' if part else 'in it'}, expected those of a model")
    with replacing(target) as file:
        torch.save({"model": tensors}, file)
    left = ", ".join(map(repr, strangers)) or "nothing foreign"
    return [f"{target}: {len(tensors)} tensors", f"left out: {left}, and all beside the model's tensors"]


def describe(path):
    """Print what --info says of a file. Raises InputError, with the kind printed before, where it does not load."""
    state, info = weights.read_weights(path)
    print(f"{path}: {info['kind']}, layout {info['layout']}, {len(state)} tensors")
    for key, value in {"task": info["task"], "step": info["step"], **info["config"]}.items():
        print(f"{key}: {shown(value)}")
    for what, tensors in info["set_aside"].items():
        print(f"set aside: {len(tensors)} names of {what}")
    if info["kind"] in ("bert", "resnet"):
        sizes = checkpoint.read_sizes(path, state, info)
        print("sizes:", sizes)
        if info["kind"] == "resnet":
            with reading(path, "no model has these sizes"):
                own = {
                    f"image_encoder.{name}": tensor
                    for name, tensor in ResNet(sizes["resnet"], sizes["width"]).state_dict().items()
                }
            checkpoint.check_names(path, own, {n: t for n, t in state.items() if n.startswith("image_encoder.")})
        print("loads: with --bert=ITS FOLDER" if info["kind"] == "bert" else "loads: with --resnet_file=FILE")
        return
    model = vqvae.load_image_tokenizer(path) if info["kind"] == "image_tokenizer" else checkpoint.load_model(path)[0]
    print("sizes:", dataclasses.asdict(model.config))
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}")
    print("loads: yes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--info", metavar="FILE", help="what the file is, its sizes, and whether it loads")
    action.add_argument("--convert", nargs=2, metavar=("IN", "OUT"), help="write the tensors of IN alone to OUT")
    parser.add_argument("--part", metavar="PREFIX", help="of --convert: what stands before the names of one model")
    given = parser.parse_args()
    describe(Path(given.info).expanduser()) if given.info else print(*convert(*given.convert, given.part), sep="\n")


if __name__ == "__main__":
    run(main)
