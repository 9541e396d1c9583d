"""Speed and memory of training on this machine. Prints a row for each objective and task, and writes all as one JSON.

    python -m tools.bench --size=demo --data_root=data/demo --only=itc,mlm    the demo's model, in a minute
    python -m tools.bench                                                     every row, at full size
    python -m tools.bench --dtype=bfloat16 --batch_size=64 --workers=12       a GPU

A row trains for some updates with the stage's own program, from random weights, and reads its log:
seconds, samples/s     of an update, the median of all but the first
GFLOP                  10^9 multiplications and additions in matrix products and convolutions of an update. torch counts
                       them in another run of the stage, with the same batches
GFLOP/s                GFLOP divided by seconds
of_matmul, of_conv     GFLOP/s as a share of what a plain matrix product and a plain convolution reach on this machine.
                       Both run just before the row, in the same dtype
memory_gb              the peak of the process, as the system says; on a GPU that of its tensors, as CUDA says
MPFC takes the image tokenizer of its config, or a random one of full size where there is no file. At full size a row
writes 4 GB into the folder for temporary files and removes them.
The row "input" says how many images one loader worker makes in a second, beside plain decoding and resizing."""

import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import evaluate
import finetune
import pretrain
from losses import OBJECTIVES
from plumbing import ending, photos, runs, settings
from plumbing.files import write_json
from plumbing.processes import start_processes
from plumbing.settings import COUNT, FROM_0, InputError, setting
from tools.curves import read_curves

ROOT = Path(__file__).parent.parent
# size: the config files of pre-training and of a task, whose name stands for {}
CONFIGS = {"full": ("fashionall", "{}"), "mini": ("mini", "mini_finetune"), "demo": ("demo", "demo_finetune")}
NAMES = (*OBJECTIVES, *evaluate.TASKS, "input")


@dataclass
class BenchConfig:
    """Settings of `python -m tools.bench`."""

    size: str = setting("full", "full, mini or demo: model and images of those configs", choices=tuple(CONFIGS))
    only: tuple = setting(NAMES, "rows, as itc,mlm,fashioniq")
    batch_size: int = setting(8, "products per update", COUNT)
    updates: int = setting(5, "updates that count", COUNT)
    data_root: str = setting("data/fashion-mini", "texts and photos of the batches")
    dtype: str = setting("float32", "float32 or bfloat16 (autocast)", choices=("float32", "bfloat16"))
    workers: int = setting(0, "data loader workers", FROM_0)
    out: str = setting("bench.json", "all figures")


def timed(function):
    """Seconds of function(), the GPU's work included: the best of six calls, of which the first warms up."""
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        function()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def count_flop(function):
    """Floating-point operations of the matrix products and convolutions of function(), backward ones included."""
    # Attention runs in its plain form here, since torch does not count every fused one.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def plain_rates(device, dtype):
    """FLOP/s that this machine reaches on a plain matrix product and on a plain 3 x 3 convolution."""
    n, n_images = (8192, 256) if device.type == "cuda" else (2048, 8)  # a GPU is busy with large ones only
    options = {"device": device, "dtype": getattr(torch, dtype)}
    a, kernel = torch.randn(n, n, **options), torch.randn(256, 256, 3, 3, **options)
    images = torch.randn(n_images, 256, 56, 56, **options).contiguous(memory_format=torch.channels_last)
    return [count_flop(f) / timed(f) for f in (lambda: a @ a, lambda: F.conv2d(images, kernel, padding=1))]


def stage_of(config, name):
    """The stage that trains an objective or a task -> (its module, its class of settings, its command line)."""
    pre, fine = (str(ROOT / "configs" / f"{file.format(name)}.py") for file in CONFIGS[config.size])
    argv = [f"--{key}={getattr(config, key)}" for key in ("data_root", "batch_size", "dtype", "workers")]
    argv += ["--init=random", "--grad_accum=1", f"--max_steps={config.updates + 1}", "--warmup=0"]
    argv += ["--milestones=", "--eval_interval=-1", "--log_interval=1"]
    if name in evaluate.TASKS:
        return finetune, finetune.FinetuneConfig, [fine, *argv, f"--task={name}"]
    return pretrain, pretrain.PretrainConfig, [pre, *argv, f"--objectives={name}:1"]


def measure_training(config, name):
    """A row: the updates of an objective or a task."""
    stage, settings_class, argv = stage_of(config, name)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        own = settings.load_config(settings_class, [*argv, f"--out_dir={folder}/counted"])
        processes = start_processes(own.device, own.deterministic, own.tf32)
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            flop = count_flop(lambda: stage.train(own, processes)) / own.max_steps
        matmul, conv = plain_rates(processes.device, config.dtype)
        command = [sys.executable, stage.__file__, *argv, f"--out_dir={folder}/timed"]
        # A shell stands between, for a program on Linux begins with the peak of memory of the one that starts it.
        ended = subprocess.run(["sh", "-c", '"$@"; exit $?', "sh", *command], capture_output=True, text=True)
        if ended.returncode:
            raise InputError(f"{name}: {ended.stderr.strip().splitlines()[-1]}")
        log = {key: values for key, (_, values) in read_curves(f"{folder}/timed").items()}
    speed = statistics.median(log["samples_per_s"][1:])
    seconds = config.batch_size / speed
    rate = flop / seconds
    row = {"seconds": seconds, "samples/s": speed, "GFLOP": flop / 1e9, "GFLOP/s": rate / 1e9}
    return row | {"of_matmul": rate / matmul, "of_conv": rate / conv, "memory_gb": log["memory_gb"][-1]}


def measure_input(config, name, n_images=64):
    """A row: images as a loader worker makes and collates them, beside plain decoding and resizing of their files."""
    _, settings_class, argv = stage_of(config, "itc")
    own = settings.load_config(settings_class, argv)
    paths = [product.images[0] for product in data.pretraining_products(own)[0][:n_images]]
    items = [{"images": (path,)} for path in paths]
    dataset = data.TrainingSamples(items, None, data.resize_then_crop, own, 0, data.pick_image)
    side = round(own.image_size * photos.RESIZED / photos.CROPPED)  # pixels before the crop

    def ours():
        data.collate([dataset[data.Key(0, row, name)] for row in range(len(paths))])

    def plain():
        for path in paths:
            Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BILINEAR)

    return {"images/s": len(paths) / timed(ours), "plain_images/s": len(paths) / timed(plain)}


def main():
    config = settings.load_config(BenchConfig, description=__doc__)
    for name in config.only:
        if name not in NAMES:
            raise InputError(f"only: found {name!r}, expected some of {', '.join(NAMES)}")
    rows = []
    for name in config.only:
        row = measure_input(config, name) if name == "input" else measure_training(config, name)
        rows.append({"name": name, **row})
        print(name, *(f"{key} {value:.4g}" for key, value in row.items()), sep="  ", flush=True)
    write_json(config.out, {**runs.describe_run(config), "threads": torch.get_num_threads(), "rows": rows})


if __name__ == "__main__":
    ending.run(main)
