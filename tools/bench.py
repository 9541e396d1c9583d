"""Time and memory of a training step on this machine. Prints each row, and writes all as one JSON.

    python -m tools.bench --size=demo --data_root=data/demo --only=itc,mlm    the demo's model, in seconds
    python -m tools.bench                         seconds of a step of each objective and task, beside the bare parts
    python -m tools.bench --measure=memory        the memory of a step on a GPU, calculated on a CPU
    python -m tools.bench --measure=data          the input pipeline of ITC, images per second of a worker

step: ours and the bare parts (bare.py) run in turns. seconds and bare are medians, ratio is the median of the pairs'
ratios, padding is a share of the text tokens. MPFC takes the image tokenizer of its config on both sides, or a random
one of full size where there is no file.

memory: the bytes of all tensors that live at the same time, in steps of 2 and of 4 products with texts of full length.
The difference of their peaks is the memory of a product (gb_per_product). What is left is fixed_gb: weights, gradients,
AdamW's moments and, for MPFC, the image tokenizer. fits_24 and fits_80 are products of a process on cards of 24 and 80
GB. A GPU also holds its kernels, and its allocator leaves gaps, so RESERVED of the card is left free."""

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import data
import evaluate
import finetune
import pretrain
from losses import OBJECTIVES
from plumbing import annotations, bert, checkpoint, ending, optim, photos, runs, settings
from plumbing.files import write_json
from plumbing.processes import autocast, start_processes
from plumbing.settings import COUNT, InputError, setting
from tools.bare import Bare

# size: the config files of pre-training and of a task, whose name stands for {}
CONFIGS = {"full": ("fashionall", "{}"), "mini": ("mini", "mini_finetune"), "demo": ("demo", "demo_finetune")}
NAMES = (*OBJECTIVES, *evaluate.TASKS)
RESERVED = 0.15  # share of a card
CARDS = (24, 80)  # GB


@dataclass
class BenchConfig:
    """Settings of `python -m tools.bench`."""

    measure: str = setting("step", "step, memory or data", choices=("step", "memory", "data"))
    size: str = setting("full", "full, mini or demo: model and images of those configs", choices=tuple(CONFIGS))
    only: tuple = setting(NAMES, "objectives and tasks, as itc,mlm,fashioniq")
    batch_size: int = setting(8, "products per step; memory has its own", COUNT)
    pairs: int = setting(5, "runs of either side", COUNT)
    data_root: str = setting("data/fashion-mini", "texts and photos of the batches")
    dtype: str = setting("float32", "float32 or bfloat16 (autocast)", choices=("float32", "bfloat16"))
    out: str = setting("bench.json", "all figures")


def timed(function, *args):
    """Seconds of function(*args), the GPU's work included."""
    start = time.perf_counter()
    function(*args)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(ours, bare, n):
    """Run ours(i) and bare(i) for i below n in turns -> medians of their seconds and of the pairs' ratios."""
    for side in (ours, bare):
        side(0)  # reads files or makes the optimizer's moments, so it does not count
    pairs = np.array([(timed(ours, i), timed(bare, i)) for i in range(n)])
    seconds, bare_seconds = np.median(pairs, axis=0).tolist()
    return {"seconds": seconds, "bare": bare_seconds, "ratio": np.median(pairs[:, 0] / pairs[:, 1]).item()}


class Stage:
    """What the stage of an objective or a task has before its loop, and config.pairs batches on the device.

    full_texts: every text is as long as the model reads texts, so there is no padding."""

    def __init__(self, config, name, full_texts=False):
        processes = start_processes()
        pre, fine = (str(finetune.CONFIGS / f"{file.format(name)}.py") for file in CONFIGS[config.size])
        argv = [f"--data_root={config.data_root}", "--init=random", "--grad_accum=1"]
        argv += [f"--batch_size={config.batch_size}", f"--max_steps={config.pairs}"]
        long_text = {"text": "a " * data.MAX_TOKENS} if full_texts else {}
        if name in OBJECTIVES:
            own = settings.load_config(pretrain.PretrainConfig, [pre, *argv, f"--objectives={name}"])
            words = data.wordpiece(bert.vocabulary(own))
            items = [replace(product, **long_text) for product in annotations.load_pretraining(own.data_root)]
            sizes = dict(checkpoint.read_start(own).sizes, vocab_size=words.get_vocab_size())
            sizes["n_attributes"] = annotations.count_labels(items, "attributes", own.n_attributes)
            self.image_tokenizer = pretrain.prepare_image_tokenizer(own, processes.device)
            if self.image_tokenizer:
                sizes["n_codes"] = self.image_tokenizer.config.n_codes
            self.objective, self.model = OBJECTIVES[name], pretrain.build_model(own, sizes)
            self.dataset = data.Pretraining(items, words, sizes["n_attributes"], own)
        else:
            own = settings.load_config(finetune.FinetuneConfig, [fine, *argv, f"--task={name}"])
            own, task = evaluate.as_trained(own, {}), evaluate.TASKS[name]
            words = data.wordpiece(bert.vocabulary(own))
            items, label_counts = task.load_items(own)
            items = [{**item, **long_text} if "text" in item else item for item in items]
            self.image_tokenizer, self.objective = None, task.objective
            sizes = checkpoint.read_start(own).sizes
            self.model = finetune.build_model(own, sizes, task.heads, words.get_vocab_size(), **label_counts)
            self.dataset = data.Samples(items, words, task.fit, own, own.max_tokens or task.max_tokens, task.pick)
        self.model.to(processes.device).train()
        sampler = data.BatchSampler(len(items), own, processes, objective_at=lambda step: name)
        samples = ([self.dataset[key] for key in keys] for keys in sampler)
        self.batches = [data.to_device(data.collate(batch), processes.device) for batch in samples]
        self.device, self.dtype = processes.device, config.dtype


class Side:
    """A model that is trained on a stage's batches: ours, or the bare parts."""

    def __init__(self, stage, model):
        self.stage, self.model, self.optimizer = stage, model, optim.make_optimizer(model, lr=1e-5, weight_decay=1e-4)
        # As after some updates of pre-training, when every head was used. DistributedDataParallel keeps them, too.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def step(self, i):
        """One update on batch i, as pre-training's loop makes it."""
        stage, batch = self.stage, self.stage.batches[i]
        self.optimizer.zero_grad(set_to_none=False)
        if stage.image_tokenizer:
            batch = {**batch, "image_codes": stage.image_tokenizer.encode(batch["image"])}
        with autocast(stage.device, stage.dtype):
            loss, _ = self.model(batch, stage.objective)
        loss.backward()
        self.optimizer.step()


def measure_step(config, name):
    """A row: a training step, ours and bare in turns."""
    stage = Stage(config, name)
    ours, bare = Side(stage, stage.model), Side(stage, Bare(name, stage.model))
    row = compare(ours.step, bare.step, config.pairs)
    masks = [batch["attention_mask"].flatten() for batch in stage.batches if "attention_mask" in batch]
    row["padding"] = 1 - torch.cat(masks).float().mean().item() if masks else 0.0
    return row | {"batch": config.batch_size, "samples/s": config.batch_size / row["seconds"]}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, and of those given to `count`, while they live.

    `peak` is the largest sum so far. Tensors that share memory count once."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = WeakIdKeyDictionary(), 0  # {memory of a tensor: its bytes}

    def now(self):
        return sum(self.storages.values())

    def count(self, values):
        """Count the tensors among `values` from now on."""
        storages = [value.untyped_storage() for value in values if isinstance(value, torch.Tensor)]
        self.storages.update({storage: storage.nbytes() for storage in storages})
        self.peak = max(self.peak, self.now())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count(tree_leaves(out))
        return out


def peak_gb(config, name, n_products):
    """The largest sum of bytes that live during a step on n_products products, in GB."""
    stage = Stage(replace(config, batch_size=n_products, pairs=1), name, full_texts=True)
    side, live = Side(stage, stage.model), LiveBytes()
    side.step(0)  # makes the optimizer's moments
    for module in filter(None, (stage.model, stage.image_tokenizer)):
        live.count([*module.parameters(), *module.buffers(), *(p.grad for p in module.parameters())])
    live.count(tree_leaves([side.optimizer.state, stage.batches]))
    with live:
        side.step(0)
    return live.peak / 1e9


def measure_memory(config, name):
    """A row: what a step takes, how much of it for each product, and how many products fit on a card."""
    small, large = peak_gb(config, name, 2), peak_gb(config, name, 4)
    row = {"fixed_gb": 2 * small - large, "gb_per_product": (large - small) / 2}
    fits = {f"fits_{card}": (card * (1 - RESERVED) - row["fixed_gb"]) / row["gb_per_product"] for card in CARDS}
    return row | {card: int(n) for card, n in fits.items()}


def measure_data(config, name, n_images=64):
    """A row: samples with one image as a worker makes and collates them, beside decoding and resizing their files."""
    dataset = Stage(config, name).dataset
    dataset.items = [{**item, "image": item["image"][:1]} for item in dataset.items]
    rows = np.random.default_rng(0).integers(len(dataset), size=n_images).tolist()
    side = round(dataset.side * settings.STRIDE * photos.RESIZED / photos.CROPPED)  # pixels before the crop

    def ours(i):
        data.collate([dataset[data.Key(0, row, name)] for row in rows])

    def bare(i):
        for row in rows:
            Image.open(dataset.items[row]["image"][0]).convert("RGB").resize((side, side), Image.Resampling.BILINEAR)

    row = compare(ours, bare, 5 * config.pairs)  # a run is short
    return {"images/s": n_images / row["seconds"], "bare_images/s": n_images / row["bare"], "ratio": 1 / row["ratio"]}


def main():
    config = settings.load_config(BenchConfig, description=__doc__)
    for name in config.only:
        if name not in NAMES:
            raise InputError(f"only: found {name!r}, expected some of {', '.join(NAMES)}")
    measure = {"step": measure_step, "memory": measure_memory, "data": measure_data}[config.measure]
    rows = []
    for name in ["itc"] if config.measure == "data" else config.only:
        row = measure(config, name)
        rows.append({"name": name, **row})
        print(name, *(f"{key} {value:.4g}" for key, value in row.items()), sep="  ", flush=True)
    write_json(config.out, {**runs.describe_run(config), "threads": torch.get_num_threads(), config.measure: rows})


if __name__ == "__main__":
    ending.run(main)
