"""How fast it is, against the bare parts (bare.py), on this machine: a table for each part asked for, and one JSON.

    python -m tools.bench                          steps of the objectives and tasks; --size=mini --only=itc,mlm
    python -m tools.bench --memory --data --scale  peak memory of a step; input pipeline; cost over batch and gallery
    python -m tools.bench --eval --search          retrieval on 30,000 images x 10,000 texts; a search among 100,000

In turns; medians. Of our step: shares of its PHASES, gb (peak), padding (of text tokens), workers (loaders that keep
up), flop_use (its FLOP a second, by the formula in bare.py, over those of a large product)."""

import dataclasses
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import annotations
import checkpoint
import common
import data
import evaluate
import finetune
import pretrain
import runs
import search
import settings
import vqvae
from losses import OBJECTIVES
from model import FashionViL, ModelConfig
from settings import InputError, setting
from tools.bare import Bare, apart, compare, decode, multiply, product_tflop, timed

CONFIGS = {size: (size, f"{size}_finetune", f"vqvae_{size}") for size in ("mini", "demo")}
CONFIGS["full"] = ("fashionall", "{}", "vqvae_fashionall")  # of pre-training, a task, the image tokenizer
NAMES = (*OBJECTIVES, *finetune.TASKS)
IMAGES, WIDTH, SUBCATEGORIES = 30_000, 768, 121  # of --eval
BATCHES, GALLERIES = (2, 4, 8, 16, 32), (IMAGES // 3, IMAGES * 2 // 3, IMAGES)  # of --scale


@dataclasses.dataclass
class BenchConfig:
    """Settings of `python -m tools.bench`."""

    size: str = setting("full", "full, mini or demo: model and images of those configs")
    only: str = setting("", "objectives and tasks, as itc,mlm,fashioniq; empty: all, for --scale itc")
    batch_size: int = setting(8, "products per step")
    pairs: int = setting(5, "runs of either side")
    data_root: str = setting("data/fashion-mini", "texts and photos of the batches")
    dtype: str = setting("float32", "float32 or bfloat16 (autocast)")
    out: str = setting("bench.json", "all figures")
    memory: bool = setting(False, "peak memory of a step, each side in a process of its own")
    data: bool = setting(False, "input pipeline, images/s of a worker")
    scale: bool = setting(False, "cost per sample over the batch; time and memory of retrieval over the gallery")
    eval: bool = setting(False, "retrieval protocols")
    search: bool = setting(False, "search among 100,000 items, and the build of an index")


def prepare(config, name, build="cpu"):
    """What the stage of `name` has before its loop, and `pairs` batches; build "meta": a model of shapes alone."""
    s = SimpleNamespace(name=name, image_tokenizer=None, device=common.start_processes().device)
    pre, fine, vq = (str(finetune.CONFIGS / f"{file.format(name)}.py") for file in CONFIGS[config.size])
    argv = [*([pre] if name in OBJECTIVES else [fine, f"--task={name}"]), f"--data_root={config.data_root}"]
    stage_config = pretrain.PretrainConfig if name in OBJECTIVES else finetune.FinetuneConfig
    own = settings.load_config(stage_config, [*argv, "--init=random"])
    words = data.wordpiece(checkpoint.vocabulary(own, own.init))
    if name in OBJECTIVES:
        objective, items = OBJECTIVES[name], annotations.load_pretraining(own.data_root)
        sizes = {**checkpoint.transformer_sizes(own.bert, own.size)}
        sizes["n_attributes"] = annotations.count_labels(items, "attributes", own.n_attributes)
        s.dataset = data.Pretraining(items, words, sizes["n_attributes"], own)
    else:
        task = finetune.TASKS[name]
        objective = task.objective
        items, sizes = task.load_items(own)
        sizes["heads"] = task.heads
        transform = data.image_transform(task.transform, own.image_size, True)
        s.dataset = data.Samples(items, words, transform, own.max_tokens or task.max_tokens, task.pick)
    if name == "mpfc":
        s.image_tokenizer = vqvae.random_image_tokenizer(
            vqvae.check_config(settings.load_config(vqvae.VQVAEConfig, [vq]))
        )
        sizes["n_codes"] = s.image_tokenizer.to(s.device).config.n_codes
    sizes["vocab_size"] = words.get_vocab_size()
    with torch.device(build):
        s.model = pretrain.build_model(own, sizes) if name in OBJECTIVES else finetune.build_model(own, **sizes)
    s.model.train()

    def loss(batch):
        if s.image_tokenizer:
            with torch.autocast(s.device.type, enabled=False):  # as in pretrain.py
                batch = {**batch, "image_codes": s.image_tokenizer.encode(batch["image"])}
        return s.model(batch, objective)[0]

    s.loss, rows = loss, np.random.default_rng(0).permutation(len(items))[: config.pairs * config.batch_size]
    s.samples = [[s.dataset[0, int(i), name] for i in part] for part in np.split(rows, config.pairs)]
    s.batches = [data.collate(part) for part in s.samples]
    if build != "meta":
        s.optimizer = common.make_optimizer(s.model.to(s.device), own.lr, own.weight_decay, own.lr_factor)
        for parameter in s.model.parameters() if name in OBJECTIVES else ():
            parameter.grad = torch.zeros_like(parameter)  # as after some updates: every head was used before
    return s


def step(config, s, batches, i):
    """One update of `prepare`'s or `Bare`'s s on batches[i] as the loops make it; yields after each of PHASES."""
    batch = data.to_device(batches[i], s.device)
    yield
    with common.autocast(s.device, config.dtype):
        loss = s.loss(batch)
    yield
    loss.backward()
    yield
    s.optimizer.step()
    s.optimizer.zero_grad(set_to_none=s.name not in OBJECTIVES)  # the loops do it as the next update begins
    yield


def memory(config, name, side="both"):
    """A row: peak memory in GB of two steps of ours, beside the bare parts', each in a process of its own."""
    if side == "both":
        ours, bare = (apart(memory, config, name, side) for side in ("cpu", "meta"))
        return {"name": name, "batch": config.batch_size, "gb": ours, "bare": bare, "ratio": ours / bare}
    s = prepare(config, name, side) if side == "cpu" else Bare(prepare(config, name, side))
    run = partial(step, config, s, s.batches)
    compare(run, run, 1)
    return runs.peak_memory_gb(s.device)


def measure(config, name):
    """A row: a training step, ours and bare in turns."""
    s = prepare(config, name)
    ours, row = partial(step, config, s, s.batches), {"name": name, "batch": config.batch_size}
    compare(ours, ours, 1)  # the first step makes the optimizer's state
    row["gb"] = runs.peak_memory_gb(s.device)
    parts = Bare(s)
    bare = partial(step, config, parts, parts.batches)
    layouts = (torch.channels_last, torch.contiguous_format)
    parts.use(min(layouts, key=lambda layout: parts.use(layout) or min(sum(timed(bare)) for _ in range(2))))
    row |= compare(ours, bare, config.pairs)
    with FlopCounterMode(display=False) as counter:
        for i in range(config.pairs):
            timed(ours, i)
    loading = timed(lambda _: data.collate([s.dataset[1, i, name] for i in range(config.batch_size)]))[0]
    asked = torch.cat([batch.get("attention_mask", torch.ones(1)).flatten().float() for batch in s.batches])
    tflop, top = counter.get_total_flops() / 1e12 / config.pairs, product_tflop(s.device, getattr(torch, config.dtype))
    row |= {"padding": 1 - asked.mean().item(), "workers": loading / row["seconds"], "tflop": tflop}
    return row | {"flop_use": tflop / row["seconds"] / top, "samples/s": config.batch_size / row["seconds"]}


def pipeline(config, chunk=64):
    """Samples with one image as a worker makes them, collated, beside decode + resize of the same files."""
    torch.set_num_threads(1)  # as a worker
    dataset = prepare(dataclasses.replace(config, batch_size=1), "itc", "meta").dataset
    dataset.products = [dataclasses.replace(p, images=p.images[:1]) for p in dataset.products]
    large, pairs = round(dataset.side * settings.STRIDE * 256 / 224), 5 * config.pairs  # short ones
    part = [np.random.default_rng(i).integers(len(dataset), size=chunk).tolist() for i in range(pairs)]
    bare = partial(decode, [[dataset.products[j].images[0] for j in rows] for rows in part], large)
    compare(bare, lambda _: dataset[0, 0, "itc"], pairs)  # files into the page cache, our side set up
    row = compare(lambda i: data.collate([dataset[0, j, "itc"] for j in part[i]]), bare, pairs)
    return {"images/s": chunk / row["seconds"], "bare": chunk / row["bare"], "ratio": 1 / row["ratio"]}


def made_up(n):
    """Embeddings of n images and n / 3 texts and their product ids, as `evaluate.full_gallery` takes them."""
    torch.manual_seed(0)
    return torch.randn(n, WIDTH), torch.randn(n // 3, WIDTH), torch.arange(n) % (n // 3), torch.arange(n // 3)


def gallery(config, n):
    """Retrieval and sample-100 of n `made_up` images, beside the bare products. Peak memory above the embeddings, by
    formula: 16 MB of workspace and two blocks of 512 n scores."""
    image, text, images, texts = embeddings = made_up(n)
    group, cpu = torch.randint(SUBCATEGORIES, (n // 3,)), common.start_processes("cpu").device
    evaluate.full_gallery(image[:512], text[:512], texts[:512], texts[:512])  # BLAS takes its workspace
    before = runs.peak_memory_gb(cpu)
    evaluate.full_gallery(*embeddings)
    row = {"images": n, "mb": 1e3 * (runs.peak_memory_gb(cpu) - before), "formula_mb": 16 + 8 * 512 * n / 1e6}
    row |= compare(lambda _: evaluate.full_gallery(*embeddings), lambda _: multiply(image, text), config.pairs)
    return row | {"sample_100": timed(lambda _: evaluate.sample_100(*embeddings, group[images], group))[0]}


def scaling(config, name):
    """A row: seconds per sample over BATCHES, or for "retrieval" microseconds for each of the 2 n^2 / 3 products of
    vectors over GALLERIES. By formula they are constant. All sizes in turns, for a machine's speed drifts."""
    if name == "retrieval":
        common.start_processes("cpu")  # freed memory is kept, as in evaluate.py
        sets = {n: made_up(n) for n in GALLERIES}
        sides = {f"{n} images": (2e-6 * n**2 / 3, lambda _, n=n: evaluate.full_gallery(*sets[n])) for n in sets}
    else:
        most, sides = BATCHES[-1], {}  # every size sees the same samples, for texts differ in length
        s = prepare(dataclasses.replace(config, batch_size=most), name)
        for n in BATCHES:
            sets = [[data.collate(part[k : k + n]) for k in range(0, most, n)] for part in s.samples]
            sides[f"batch {n}"] = (
                most,
                lambda i, sets=sets: (phase for k in range(len(sets[i])) for phase in step(config, s, sets[i], k)),
            )
    runs = [[sum(timed(side, i)) / unit for unit, side in sides.values()] for i in (0, *range(config.pairs))]
    return {"name": name} | dict(zip(sides, np.median(runs[1:], axis=0), strict=True))  # the first: optimizer's state


@torch.no_grad()
def searching(config, items=100_000, photos=64):
    """Median time of a search (scores, best 10) among `items` vectors mapped from a file, after a first one has loaded
    it; images/s of an index build on made-up JPEGs of 256 px beside the encoder's on decoded images."""
    rng, row = np.random.default_rng(0), {"items": items}
    encode = partial(evaluate.embed_batch, FashionViL(ModelConfig(heads=("contrastive",))).eval())
    own = evaluate.EvalConfig(image_size=224, eval_batch_size=32, workers=0)
    embed = partial(evaluate.embed, encode, tokenizer=None, config=own, processes=common.start_processes("cpu"))
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as photo_dir:
        path = Path(folder, "vectors.npy")
        np.save(path, rng.standard_normal((items, WIDTH), dtype=np.float32))
        vectors, queries = np.load(path, mmap_mode="r"), rng.standard_normal((21, WIDTH, 1), dtype=np.float32)
        times = [timed(lambda q: search.best((vectors @ q).max(1), 10), query)[0] for query in queries]
        row |= {"load_ms": 1e3 * times[0], "search_ms": 1e3 * median(times[1:])}
        for i, pixels in enumerate(rng.integers(0, 256, (photos, 32, 32, 3), dtype=np.uint8)):
            Image.fromarray(pixels).resize((256, 256)).save(f"{photo_dir}/{i}.jpg")
        images, turns = data.load_images(sorted(Path(photo_dir).iterdir()), 224), iter(range(1_000))
        row |= compare(
            lambda _: search.open_index(Path(folder, f"index{next(turns)}"), photo_dir, "", embed),  # a new one
            lambda _: [encode({"image": part}) for part in images.split(32)],
            config.pairs,
        )
    return row | {"images/s": photos / row["seconds"]}


def main():
    config = settings.load_config(BenchConfig, description=__doc__)
    names = config.only.split(",") if config.only else NAMES
    for key, value, known in [("size", config.size, CONFIGS), *(("only", name, NAMES) for name in names)]:
        if value not in known:
            raise InputError(f"{key}: found {value!r}, expected some of {', '.join(known)}")
    jobs = {  # part: the rows of its table, each a function, its config and what else it takes
        "memory": [(memory, config, name) for name in names],
        "data": [(pipeline, config)],
        "scale": [(scaling, config, name) for name in [*(names if config.only else ["itc"]), "retrieval"]]
        + [(gallery, config, n) for n in GALLERIES],
        "eval": [(gallery, config, IMAGES)],
        "search": [(searching, config)],
    }
    step_rows = {"step": [(measure, config, name) for name in names]}
    jobs = {part: rows for part, rows in jobs.items() if getattr(config, part)} or step_rows
    results, header = runs.describe_run(config) | {"threads": torch.get_num_threads()}, None
    for part, calls in jobs.items():
        for function, *args in calls:
            results.setdefault(part, []).append(row := apart(function, *args))
            if header != (header := list(row)):
                print(f"\n{part:8}", *(f"{key:>{22 if key == 'name' else 10}}" for key in header))
            print(" " * 8, *(f"{v:>22}" if isinstance(v, str) else f"{v:10.4g}" for v in row.values()), flush=True)
    common.write_json(config.out, results)


if __name__ == "__main__":
    common.run(main)
