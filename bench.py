"""How fast it is, against the bare parts, on this machine: a table for each part asked for, and one JSON.

    python bench.py                            steps of the six objectives and five tasks; --size=mini --only=itc,mlm
    python bench.py --memory --data --scale    peak memory of a step; input pipeline; cost over batch and gallery
    python bench.py --eval                     retrieval on 30,000 images x 10,000 texts
    python bench.py --search                   a search among 100,000 items; an index beside the bare encoder

Bare parts: torchvision's ResNet, nn.TransformerEncoder on the same shapes, tables, heads where something is asked, the
image tokenizer without gradient, fused AdamW on as many parameters; the faster memory format, with or without mask. In
turns; medians. Of our step: shares, gb (peak), padding (of text tokens), workers (loaders that keep up), flop_use (FLOP
a second over that of a large product). FLOP of the bare side: 2 m n k of a product, 2 x weights x positions of a
convolution, 4 n^2 D of attention over n tokens of width D; backward twice that, once where weights are frozen."""

import dataclasses
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from types import GeneratorType, SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import common
import data
import evaluate
import finetune
import pretrain
import search
import vqvae
from common import InputError, setting
from losses import IGNORE, OBJECTIVES
from model import RESNETS, FashionViL, ModelConfig

CONFIGS = {size: (size, f"{size}_finetune", f"vqvae_{size}") for size in ("mini", "demo")}
CONFIGS["full"] = ("fashionall", "{}", "vqvae_fashionall")  # of pre-training, a task, the image tokenizer
NAMES, PHASES = (*OBJECTIVES, *finetune.TASKS), ("data", "forward", "backward", "optimizer")
IMAGES, WIDTH, SUBCATEGORIES, BATCHES = 30_000, 768, 121, (2, 4, 8, 16, 32)  # of --eval; of --scale


@dataclasses.dataclass
class BenchConfig:
    """Settings of `python bench.py`."""

    size: str = setting("full", "full, mini or demo: model and images of those configs")
    only: str = setting("", "objectives and tasks, as itc,mlm,fashioniq; empty: all, for --scale itc")
    batch_size: int = setting(8, "products per step")
    pairs: int = setting(5, "runs of either side")
    data_root: str = setting("../shared/data/fashion-mini", "texts and photos of the batches")
    dtype: str = setting("float32", "float32 or bfloat16 (autocast)")
    out: str = setting("bench.json", "all figures")
    memory: bool = setting(False, "peak memory of a step, each side in a process of its own")
    data: bool = setting(False, "input pipeline, images/s of a worker")
    scale: bool = setting(False, "seconds per sample over the batch; retrieval over the gallery")
    eval: bool = setting(False, "retrieval protocols")
    search: bool = setting(False, "search among 100,000 items, and the build of an index")


def timed(function, i=0):
    """Seconds of each phase of function(i): up to each yield of a generator, else as a whole."""
    clock, result = [time.perf_counter()], function(i)
    for _ in result if isinstance(result, GeneratorType) else [None]:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        clock.append(time.perf_counter())
    return np.diff(clock).tolist()


def compare(ours, bare, n):
    """Both functions n times in turns -> medians of their seconds and of the pairs' ratios, shares of our PHASES."""
    runs = [(timed(ours, i), timed(bare, i)) for i in range(n)]
    a, b = ([sum(phases) for phases in side] for side in zip(*runs, strict=True))
    row = {"seconds": median(a), "bare": median(b), "ratio": median(x / y for x, y in zip(a, b, strict=True))}
    shares = [sum(phase) / sum(a) for phase in zip(*(mine for mine, _ in runs), strict=True)]
    return row | (dict(zip(PHASES, shares, strict=True)) if len(shares) > 1 else {})


def apart(function, *args):
    """function(*args) in a fresh process: its peak memory and its heap are its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def prepare(config, name, build="cpu"):
    """What the stage of `name` has before its loop, and `pairs` batches; build "meta": a model of shapes alone."""
    s = SimpleNamespace(name=name, image_tokenizer=None, device=common.start_processes().device)
    pre, fine, vq = (str(finetune.CONFIGS / f"{file.format(name)}.py") for file in CONFIGS[config.size])
    s.forget = name not in OBJECTIVES
    argv = [*([fine, f"--task={name}"] if s.forget else [pre]), f"--data_root={config.data_root}", "--init=random"]
    own = common.load_config(finetune.FinetuneConfig if s.forget else pretrain.PretrainConfig, argv)
    words = data.wordpiece(checkpoint.vocabulary(own, own.init))
    if s.forget:
        objective, heads, load_items, draw, kind, longest = finetune.TASKS[name]
        items, sizes = load_items(own)
        transform, make, sizes["heads"] = data.image_transform(kind, own.image_size, True), finetune.build_model, heads
        s.dataset = data.Samples(items, words, transform, own.max_tokens or longest, draw)
    else:
        objective, items, make = OBJECTIVES[name], data.load_pretraining(own.data_root), pretrain.build_model
        sizes = {"n_attributes": data.count_labels(items, "attributes", own.n_attributes)}
        s.dataset = data.Pretraining(items, words, sizes["n_attributes"], own)
    if name == "mpfc":
        s.image_tokenizer = vqvae.random_tokenizer(vqvae.check_config(common.load_config(vqvae.VQVAEConfig, [vq])))
        sizes["n_codes"] = s.image_tokenizer.to(s.device).config.n_codes
    with torch.device(build):
        s.model = make(own, vocab_size=words.get_vocab_size(), **sizes).train()

    def loss(batch):
        if s.image_tokenizer:
            with torch.autocast(s.device.type, enabled=False):  # as in pretrain.py
                batch = {**batch, "image_codes": s.image_tokenizer.encode(batch["image"])}
        return s.model(batch, objective)[0]

    s.loss, rows = loss, np.random.default_rng(0).permutation(len(items))[: config.pairs * config.batch_size]
    s.batches = [data.collate([s.dataset[0, int(i), name] for i in part]) for part in np.split(rows, config.pairs)]
    if build != "meta":
        s.optimizer = common.make_optimizer(s.model.to(s.device), own)
        for parameter in () if s.forget else s.model.parameters():
            parameter.grad = torch.zeros_like(parameter)  # as after some updates: every head was used before
    return s


def step(config, s, i):
    """One update on batch i of `prepare`'s or `Bare`'s s as the loops make it; yields after each of PHASES."""
    batch = data.to_device(s.batches[i], s.device)
    yield
    with common.autocast(s.device, config.dtype):
        loss = s.loss(batch)
    yield
    loss.backward()
    yield
    s.optimizer.step()
    s.optimizer.zero_grad(set_to_none=s.forget)  # the loops do it as the next update begins
    yield


class Bare(nn.Module):
    """The other side of `prepare`'s s for `step`: parts of its model's sizes, in the fastest variant.

    Its batches lie normalised on the device; `positions` make up for the parameters that it has fewer."""

    forget = True  # gradients after an update

    def __init__(self, config, s):
        super().__init__()
        from torchvision import models  # not before data.py, which makes it importable on a CPU-only torch

        c, n_in = s.model.config, s.model.image_encoder.out_channels
        d, w = c.hidden_size, c.width
        self.name, self.device, self.masked, net = s.name, s.device, True, getattr(models, c.resnet)()
        net.inplanes, net.conv1, net.bn1 = w, nn.Conv2d(3, w, 7, 2, 3, bias=False), nn.BatchNorm2d(w)
        for i, n in enumerate(RESNETS[c.resnet][0]):  # torchvision's own is of width 64
            setattr(net, f"layer{i + 1}", net._make_layer(type(net.layer1[0]), w * 2**i, n, stride=min(2, i + 1)))
        for name, parameter in s.model.image_encoder.named_parameters():
            net.get_parameter(name).requires_grad_(parameter.requires_grad)
        self.resnet = nn.Sequential(*list(net.children())[:-2]).train(s.name != "polyvore")  # no pool, no classifier
        if s.name == "polyvore":
            self.head = nn.Linear(n_in, 256)
        else:
            sizes = (d, c.num_attention_heads, c.intermediate_size, c.dropout, "gelu", 1e-12)
            layer = nn.TransformerEncoderLayer(*sizes, batch_first=True)
            self.encoder, self.words = nn.TransformerEncoder(layer, c.num_hidden_layers), nn.Embedding(c.vocab_size, d)
            torch.backends.mha.set_fastpath_enabled(False)  # SDPA in mining, too, and no nested tensors
            n_out = {"mlm": c.vocab_size, "mpfc": c.n_codes, "pac": c.n_attributes}.get(s.name, c.n_classes or 2)
            self.projection, self.dense, self.head = nn.Linear(n_in, d), nn.Linear(d, d), nn.Linear(d, n_out)
            if s.name == "mlm":
                self.head.weight = self.words.weight
            ours, bare = (sum(p.numel() for p in m.parameters()) for m in (s.model, self))
            self.positions = nn.Parameter(torch.zeros((ours - bare) // d, d))
        self.tokenizer = s.image_tokenizer and vqvae.random_tokenizer(s.image_tokenizer.config)
        trained = [p for p in self.to(s.device).parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, fused=True)
        self.batches = [data.to_device(batch, s.device) for batch in s.batches]

        def use(variant):
            self.masked = variant[1]
            self.to(memory_format=variant[0])
            for batch in self.batches:
                batch.update({k: v.contiguous(memory_format=variant[0]) for k, v in batch.items() if v.ndim == 4})
            return min(sum(timed(partial(step, config, self))) for _ in range(2))

        use(min([(f, m) for f in (torch.contiguous_format, torch.channels_last) for m in (True, False)], key=use))

    def loss(self, batch):
        """Every forward that the definition needs and no more; the log-partition takes the loss's place."""
        features = [self.resnet(batch[k]).flatten(2).transpose(1, 2) for k in ("image", "image2") if k in batch]
        pooled, patches = [f.mean(1) for f in features], features[-1]  # (B, C), (B, P, C)
        if self.name == "polyvore":
            return (self.head(pooled[0]) @ self.head(pooled[1]).t()).logsumexp(1).mean()
        words, padding = self.words(batch.get("masked_ids", batch["input_ids"])), batch["attention_mask"] == 0
        image, T = self.projection(pooled[0]), words.shape[1]

        def encode(patches):
            x = torch.cat([words + self.positions[:T], self.projection(patches)], 1)  # (B, T + P, D)
            return self.encoder(x, src_key_padding_mask=F.pad(padding, (0, x.shape[1] - T)) if self.masked else None)

        with torch.no_grad():
            if self.name == "itm":  # mining: text alone, without dropout
                self.encoder.eval()
                encode(patches[:, :0].detach())
                self.encoder.train()
            if self.name == "mpfc":
                self.tokenizer.quant_conv(self.tokenizer.encoder(batch["image"]))
        if self.name == "mvc":
            padding = padding | batch["text_drop"]
            patches = patches[~batch["patch_drop"]].view(len(words), -1, patches.shape[2])
        if self.name in ("itc", "pac", "fashiongen_retrieval"):
            text = encode(patches[:, :0]).mean(1)
            logits = self.head(torch.cat([image, text])) if self.name == "pac" else image @ text.t()
        elif self.name in ("mvc", "fashioniq"):
            logits = image @ encode(patches)[:, T:].mean(1).t()
        else:  # as many rows as are asked: patches, words or one a sample
            asked = batch.get("patch_mask", batch.get("mlm_labels", batch["attention_mask"][:, 0]) != IGNORE)
            logits = self.head(F.gelu(self.dense(encode(patches).flatten(0, 1)[: int(asked.sum())])))
        return logits.logsumexp(1).mean()


def measure(config, name, side=""):
    """A training step, ours and bare in turns; side: after a few steps of that side alone, its peak memory in GB."""
    s = prepare(config, name, "meta" if side == "bare" else "cpu")
    if side != "bare":
        ours, row = partial(step, config, s), {"name": name, "batch": config.batch_size}
        compare(ours, ours, 1)  # the first step makes the optimizer's state
        row["gb"] = common.peak_memory_gb(s.device)
    if side == "ours":
        bare_gb = apart(measure, config, name, "bare")
        return row | {"bare": bare_gb, "ratio": row["gb"] / bare_gb}
    bare = partial(step, config, Bare(config, s))
    if side == "bare":
        return common.peak_memory_gb(s.device)
    row |= compare(ours, bare, config.pairs)
    with FlopCounterMode(display=False) as counter:
        timed(bare)
    n = 8192 if s.device.type == "cuda" else 2048
    x = torch.randn(n, n, device=s.device, dtype=getattr(torch, config.dtype))
    use = counter.get_total_flops() / row["seconds"] * min(timed(lambda _: x @ x)[0] for _ in range(5)) / (2 * n**3)
    loading = timed(lambda _: data.collate([s.dataset[1, i, name] for i in range(config.batch_size)]))[0]
    asked = torch.cat([batch.get("attention_mask", torch.ones(1)).flatten().float() for batch in s.batches])
    row |= {"padding": 1 - asked.mean().item(), "workers": loading / row["seconds"], "flop_use": use}
    return row | {"tflop": counter.get_total_flops() / 1e12, "samples/s": config.batch_size / row["seconds"]}


def pipeline(config, chunk=64):
    """Samples with one image as a worker makes them, collated, beside decode + resize of the same files."""
    torch.set_num_threads(1)  # as a worker
    dataset = prepare(dataclasses.replace(config, batch_size=1), "itc", "meta").dataset
    dataset.products = [dataclasses.replace(p, images=p.images[:1]) for p in dataset.products]
    large = round(dataset.side * data.STRIDE * 256 / 224)
    part = [np.random.default_rng(i).integers(len(dataset), size=chunk).tolist() for i in range(config.pairs)]

    def bare(i):
        for j in part[i]:
            Image.open(dataset.products[j].images[0]).convert("RGB").resize((large, large), Image.Resampling.BILINEAR)

    compare(bare, lambda _: dataset[0, 0, "itc"], config.pairs)  # files into the page cache, our side set up
    row = compare(lambda i: data.collate([dataset[0, j, "itc"] for j in part[i]]), bare, config.pairs)
    return {"images/s": chunk / row["seconds"], "bare": chunk / row["bare"], "ratio": 1 / row["ratio"]}


def gallery(config, n):
    """Retrieval of n images and n / 3 texts, beside its bare products; mb: peak memory above the embeddings."""
    torch.manual_seed(0)
    image, text, texts = torch.randn(n, WIDTH), torch.randn(n // 3, WIDTH), torch.arange(n // 3)
    images, group = torch.arange(n) % len(text), torch.randint(SUBCATEGORIES, (n // 3,))

    def bare(_):
        for queries, others in ((image, text), (text, image)):
            buffer = torch.empty(2048, len(others))
            for rows in queries.split(len(buffer)):
                torch.mm(rows, others.t(), out=buffer[: len(rows)])

    before = common.peak_memory_gb(torch.device("cpu"))
    evaluate.retrieval(image, text, images, texts)
    row = {"images": n, "mb": 1e3 * (common.peak_memory_gb(torch.device("cpu")) - before), "formula": 8 * 512 * n / 1e6}
    row |= compare(lambda _: evaluate.retrieval(image, text, images, texts), bare, config.pairs)
    sampled = timed(lambda _: evaluate.sample_100(image, text, images, texts, group[images], group))[0]
    return row | {"sample_100": sampled, "us/product": 1e6 * row["seconds"] / (n * len(text))}


@torch.no_grad()
def searching(config, items=100_000, photos=64):
    """A row: median time of a search (scores, best 10) among `items` vectors mapped from a file, after a first one has
    loaded it; images/s of an index build on made-up JPEGs of 256 px beside the encoder's on decoded images."""
    rng, row = np.random.default_rng(0), {"items": items}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vectors.npy")
        np.save(path, rng.standard_normal((items, WIDTH), dtype=np.float32))
        vectors, queries = np.load(path, mmap_mode="r"), rng.standard_normal((21, WIDTH, 1), dtype=np.float32)
        times = [timed(lambda q: search.best((vectors @ q).max(1), 10), query)[0] for query in queries]
        row |= {"load_ms": 1e3 * times[0], "search_ms": 1e3 * median(times[1:])}
        gallery = Path(folder, "gallery")
        gallery.mkdir()
        for i in range(photos):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((256, 256)).save(gallery / f"{i}.jpg")
        encode = partial(evaluate.encode, FashionViL(ModelConfig(heads=("contrastive",))).eval())
        settings = evaluate.EvalConfig(image_size=224, eval_batch_size=32, workers=0)
        processes = common.Processes(0, 1, torch.device("cpu"))
        embed = partial(evaluate.embed, encode, tokenizer=None, config=settings, processes=processes)
        images = data.load_images(sorted(gallery.iterdir()), 224)
        turns = iter(range(1_000))  # every build is the first
        row |= compare(
            lambda _: search.open_index(Path(folder, f"index{next(turns)}"), gallery, "", embed),
            lambda _: [encode({"image": part}) for part in images.split(32)],
            min(config.pairs, 3),
        )
    return row | {"images/s": photos / row["seconds"]}


def main():
    config = common.load_config(BenchConfig, description=__doc__)
    names = config.only.split(",") if config.only else NAMES
    for key, value, known in [("size", config.size, CONFIGS), *(("only", name, NAMES) for name in names)]:
        if value not in known:
            raise InputError(f"{key}: found {value!r}, expected some of {', '.join(known)}")
    sized = [dataclasses.replace(config, batch_size=n) for n in BATCHES]
    jobs = {  # part: the rows of its table, each a function, its config and what else it takes
        "memory": [(measure, config, name, "ours") for name in names],
        "data": [(pipeline, config)],
        "scale": [(measure, c, name) for name in (names if config.only else ["itc"]) for c in sized]
        + [(gallery, config, IMAGES // k) for k in (4, 2, 1)],
        "eval": [(gallery, config, IMAGES)],
        "search": [(searching, config)],
        "step": [(measure, config, name) for name in names],
    }
    jobs = {part: rows for part, rows in jobs.items() if getattr(config, part, False)} or {"step": jobs["step"]}
    results, header = common.describe_run(config) | {"threads": torch.get_num_threads()}, None
    for part, calls in jobs.items():
        results[part] = []
        for function, *args in calls:
            results[part].append(row := apart(function, *args))
            if header != (header := list(row)):
                print(f"\n{part:8}", *(f"{key:>10}" for key in header))
            print(" " * 8, *(f"{v:>10.10}" if isinstance(v, str) else f"{v:10.4g}" for v in row.values()), flush=True)
    common.write_json(config.out, results)


if __name__ == "__main__":
    common.run(main)
