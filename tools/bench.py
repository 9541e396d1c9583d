"""How fast it is on this machine, beside the bare parts (bare.py). Prints each row, and writes all as one JSON.

    python -m tools.bench                   training steps of the objectives and tasks; --size=mini --only=itc,mlm
    python -m tools.bench --memory          peak memory of these steps, in GB
    python -m tools.bench --data --eval     the input pipeline; retrieval among 30,000 images and 10,000 texts

Both sides run in turns. seconds and bare are medians, ratio is the median of the pairs' ratios, padding is a share of
the text tokens. MPFC takes the image tokenizer of its config, or a random one of full size where there is no file."""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from PIL import Image

import annotations
import bert
import checkpoint
import common
import data
import ending
import evaluate
import finetune
import photos
import pretrain
import runs
import settings
from files import write_json
from losses import OBJECTIVES
from settings import COUNT, InputError, setting
from tools.bare import Bare

# size: the config files of pre-training and of a task, whose name stands for {}
CONFIGS = {"full": ("fashionall", "{}"), "mini": ("mini", "mini_finetune"), "demo": ("demo", "demo_finetune")}
NAMES = (*OBJECTIVES, *finetune.TASKS)


@dataclass
class BenchConfig:
    """Settings of `python -m tools.bench`."""

    size: str = setting("full", "full, mini or demo: model and images of those configs", choices=tuple(CONFIGS))
    only: str = setting("", "objectives and tasks, as itc,mlm,fashioniq; empty: all")
    batch_size: int = setting(8, "products per step", COUNT)
    pairs: int = setting(5, "runs of either side", COUNT)
    data_root: str = setting("data/fashion-mini", "texts and photos of the batches")
    dtype: str = setting("float32", "float32 or bfloat16 (autocast)", choices=("float32", "bfloat16"))
    out: str = setting("bench.json", "all figures")
    memory: bool = setting(False, "peak memory of a step, each side in a process of its own")
    data: bool = setting(False, "input pipeline, images/s of a worker")
    eval: bool = setting(False, "retrieval protocols")


def apart(function, *args):
    """The result of function(*args) in a fresh process, whose peak memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def timed(function, *args):
    """Seconds of function(*args), the GPU's work included."""
    start = time.perf_counter()
    function(*args)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(ours, bare, n):
    """Run ours(i) and bare(i) for i below n in turns -> medians of their seconds and of the pairs' ratios."""
    pairs = np.array([(timed(ours, i), timed(bare, i)) for i in range(n)])
    seconds, bare_seconds = np.median(pairs, axis=0).tolist()
    return {"seconds": seconds, "bare": bare_seconds, "ratio": np.median(pairs[:, 0] / pairs[:, 1]).item()}


class Ours:
    """What the stage of an objective or a task has before its loop, and config.pairs batches.

    shapes_only: the model has no weights, and there is no optimizer. The bare parts need no more."""

    def __init__(self, config, name, shapes_only=False):
        processes = common.start_processes()
        self.name, self.device, self.image_tokenizer = name, processes.device, None
        pre, fine = (str(finetune.CONFIGS / f"{file.format(name)}.py") for file in CONFIGS[config.size])
        argv = [f"--data_root={config.data_root}", "--init=random", "--grad_accum=1"]
        argv += [f"--batch_size={config.batch_size}", f"--max_steps={config.pairs}"]
        if name in OBJECTIVES:
            own = settings.load_config(pretrain.PretrainConfig, [pre, *argv, f"--objectives={name}"])
            words = data.wordpiece(bert.vocabulary(own))
            self.objective, items = OBJECTIVES[name], annotations.load_pretraining(own.data_root)
            sizes = dict(checkpoint.read_start(own).sizes, vocab_size=words.get_vocab_size())
            sizes["n_attributes"] = annotations.count_labels(items, "attributes", own.n_attributes)
            self.image_tokenizer = pretrain.prepare_image_tokenizer(own, self.device)
            if self.image_tokenizer:
                sizes["n_codes"] = self.image_tokenizer.config.n_codes
            self.dataset = data.Pretraining(items, words, sizes["n_attributes"], own)
            build = partial(pretrain.build_model, own, sizes)
        else:
            own = settings.load_config(finetune.FinetuneConfig, [fine, *argv, f"--task={name}"])
            own = evaluate.as_trained(own, {})
            words = data.wordpiece(bert.vocabulary(own))
            task = finetune.TASKS[name]
            self.objective, (items, label_counts) = task.objective, task.load_items(own)
            self.dataset = data.Samples(items, words, task.fit, own, own.max_tokens or task.max_tokens, task.pick)
            sizes = checkpoint.read_start(own).sizes
            build = partial(finetune.build_model, own, sizes, task.heads, words.get_vocab_size(), **label_counts)
        with torch.device("meta" if shapes_only else self.device):
            self.model = build().train()
        order = data.Batches(len(items), own, processes, objective_at=lambda step: name)
        self.batches = [data.collate([self.dataset[key] for key in keys]) for keys in order]
        if not shapes_only:
            self.optimizer = common.make_optimizer(self.model, own.lr, own.weight_decay, own.lr_factor)
            for parameter in self.model.parameters() if name in OBJECTIVES else ():
                parameter.grad = torch.zeros_like(parameter)  # as after some updates, when every head was used

    def loss(self, batch):
        """The loss of a batch on the device, as the loops compute it."""
        if self.image_tokenizer:
            with torch.autocast(self.device.type, enabled=False):  # as in pretrain.py
                batch = {**batch, "image_codes": self.image_tokenizer.encode(batch["image"])}
        return self.model(batch, self.objective)[0]


def step(config, side, i):
    """One update on batch i of `side`, an Ours or a Bare."""
    batch = data.to_device(side.batches[i], side.device)
    with common.autocast(side.device, config.dtype):
        loss = side.loss(batch)
    loss.backward()
    side.optimizer.step()
    # The loops do this when the next update begins. Pre-training keeps gradients of zero.
    side.optimizer.zero_grad(set_to_none=side.name not in OBJECTIVES)


def measure_step(config, name):
    """A row: a training step, ours and bare in turns."""
    side = Ours(config, name)
    ours, bare = partial(step, config, side), partial(step, config, Bare(side))
    compare(ours, bare, 1)  # the first step makes the optimizers' states
    row = {"name": name, "batch": config.batch_size} | compare(ours, bare, config.pairs)
    masks = [batch["attention_mask"].flatten() for batch in side.batches if "attention_mask" in batch]
    row["padding"] = 1 - torch.cat(masks).float().mean().item() if masks else 0.0
    return row | {"samples/s": config.batch_size / row["seconds"]}


def peak_memory(config, name, is_bare):
    """Peak memory in GB of this process after two steps, ours or the bare parts'."""
    side = Bare(Ours(config, name, shapes_only=True)) if is_bare else Ours(config, name)
    for _ in range(2):
        step(config, side, 0)
    return runs.peak_memory_gb(side.device)


def measure_memory(config, name):
    """A row: peak memory in GB of our steps beside that of the bare parts, each in a process of its own."""
    ours, bare = apart(peak_memory, config, name, False), apart(peak_memory, config, name, True)
    return {"name": name, "batch": config.batch_size, "ours": ours, "bare": bare, "ratio": ours / bare}


def measure_data(config, n_images=64):
    """A row: samples with one image as a worker makes and collates them, beside decoding and resizing their files."""
    torch.set_num_threads(1)  # as a worker
    dataset = Ours(replace(config, batch_size=1), "itc", shapes_only=True).dataset
    dataset.items = [{**item, "image": item["image"][:1]} for item in dataset.items]
    n = 5 * config.pairs  # for a run is short
    rows = np.random.default_rng(0).integers(len(dataset), size=(n, n_images)).tolist()
    side = round(dataset.side * settings.STRIDE * photos.RESIZED / photos.CROPPED)  # pixels before the crop

    def ours(i):
        data.collate([dataset[data.Key(0, row, "itc")] for row in rows[i]])

    def bare(i):
        for row in rows[i]:
            Image.open(dataset.items[row]["image"][0]).convert("RGB").resize((side, side), Image.Resampling.BILINEAR)

    for i in range(n):
        bare(i)  # now the system has all files in memory
    row = compare(ours, bare, n)
    return {"images/s": n_images / row["seconds"], "bare": n_images / row["bare"], "ratio": 1 / row["ratio"]}


def measure_retrieval(config, n_images=30_000, n_texts=10_000, width=768):
    """A row: retrieval among made-up embeddings, beside the bare products of both directions."""
    common.start_processes("cpu")  # as evaluate.py: freed memory is kept
    image, text = torch.randn(n_images, width), torch.randn(n_texts, width)
    image_id, text_id = torch.arange(n_images) % n_texts, torch.arange(n_texts)

    def bare(i):
        for queries, others in ((image, text), (text, image)):
            for rows in queries.split(2048):
                torch.mm(rows, others.t())

    row = compare(lambda i: evaluate.full_gallery(image, text, image_id, text_id), bare, config.pairs)
    return {"images": n_images, "texts": n_texts} | row


def main():
    config = settings.load_config(BenchConfig, description=__doc__)
    names = config.only.split(",") if config.only else NAMES
    for name in names:
        if name not in NAMES:
            raise InputError(f"only: found {name!r}, expected some of {', '.join(NAMES)}")
    calls = [("memory", measure_memory, name) for name in names if config.memory]
    calls += [("data", measure_data)] if config.data else []
    calls += [("eval", measure_retrieval)] if config.eval else []
    calls = calls or [("step", measure_step, name) for name in names]
    results = runs.describe_run(config) | {"threads": torch.get_num_threads()}
    for part, function, *args in calls:
        row = apart(function, config, *args)
        results.setdefault(part, []).append(row)
        figures = (f"{key} {value:.4g}" if type(value) is float else f"{key} {value}" for key, value in row.items())
        print(f"{part}: ", "  ".join(figures), flush=True)
    write_json(config.out, results)


if __name__ == "__main__":
    ending.run(main)
