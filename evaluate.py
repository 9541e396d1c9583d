"""Evaluate a checkpoint on one of the five tasks.

    python evaluate.py --task=fashioniq --checkpoint=runs/fashioniq/best.pt --bootstrap

fashiongen_retrieval: image-to-text and text-to-image retrieval (ITR, TIR). fashioniq: text-guided image retrieval
(TGIR), where an image and a change in words rank images. fashiongen_category and fashiongen_subcategory: category and
sub-category recognition (CR, SCR). polyvore: outfit complementary item retrieval (OCIR), where an outfit ranks items.

metrics.py has the protocols, each with its definition."""

import json
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import losses
import metrics
from metrics import composed_retrieval, full_gallery, outfit_retrieval, recognition, sample_100
from model import CSANet
from plumbing import annotations, bert, checkpoint, ending, photos, pictures, settings
from plumbing.files import not_the_file, replacing, write_json
from plumbing.pictures import Ranking
from plumbing.processes import device_name, gather_objects, in_group, start_processes
from plumbing.settings import COUNT, DEVICES, DTYPES, FROM_0, MISSING, InputError, setting

GALLERIES, SPLITS = ("original", "val"), ("disjoint", "nondisjoint")  # of FashionIQ and of Polyvore Outfits


@torch.no_grad()
def embed(encode, items, tokenizer, config, processes, whole=False, progress=False):
    """`encode(batch)` of every item once, in the order of the items: (len(items), ...) float32 on every process's CPU.

    items: as data.Samples takes them; the processes share them. whole: True for FashionIQ and Polyvore, whose images
    are whole and whose texts are shorter; of the others the centre is taken: docs/recipe.md "Images", "Texts".
    config has image_size, max_tokens, eval_batch_size, workers and dtype. Tasks also need its task, data_root, missing,
    seed, split and gallery."""
    fit = data.crop_then_resize if whole else data.resize_then_crop
    max_tokens = config.max_tokens or (data.FASHIONIQ_MAX_TOKENS if whole else data.MAX_TOKENS)
    # Neighbours have texts of similar length, so that batches hold little padding.
    order = sorted(range(len(items)), key=lambda i: len(items[i].get("text", "")))
    # Where there are fewer items than processes, the others embed the first item again.
    places = [order[rank :: processes.world_size] or order[:1] for rank in range(processes.world_size)]
    own = [items[i] for i in places[processes.rank]]  # that this process embeds
    dataset = data.Samples(own, tokenizer, fit, config, max_tokens)
    # Workers only pay for more images than a batch. Texts are tokenized already.
    workers = config.workers if "image" in items[0] and len(own) > config.eval_batch_size else 0
    if workers:  # each reads two batches ahead
        data.check_shared_memory(2 * workers + 1, config.eval_batch_size, config.image_size)
    on_gpu = processes.device.type == "cuda"
    reading = {"num_workers": workers, "worker_init_fn": data.init_worker, "pin_memory": on_gpu}
    if workers and (in_group() or on_gpu):
        # The main process has threads (gloo, NCCL, pinned memory). A fork beside them can hang (pytorch#130610).
        reading["multiprocessing_context"] = "forkserver"
    loader = DataLoader(dataset, config.eval_batch_size, collate_fn=data.collate, **reading)
    rows = []
    for batch in tqdm(loader, unit=" batches", disable=not progress):
        with processes.autocast(config.dtype):
            rows.append(encode(data.to_device(batch, processes.device)).float())
    # Every process receives all rows, and puts them into the order of the items.
    rows = torch.cat(rows).cpu()
    out = rows.new_empty(len(items), *rows.shape[1:])
    for place, part in zip(places, gather_objects(rows), strict=True):
        out[place] = part
    return finite(out, items)


def finite(vectors, items):
    """The vectors (N, ...) of N items. Raises InputError, with the first item's name, where one is not finite."""
    broken = (~vectors.reshape(len(items), -1).isfinite().all(dim=1)).nonzero().flatten().tolist()
    if broken:
        name = items[broken[0]].get("name", f"item {broken[0]}")
        found = f"its embedding is not finite ({len(broken)} of {len(items)} such)"
        raise InputError(f"{name}: {found}; the checkpoint is broken, or its numbers are too large for float16")
    return vectors


def embed_batch(model, batch):
    """Scaled embeddings (B, D) of images, of texts, or of both: an image with a change in words. CSA-Net: of items."""
    image, words = batch.get("image"), [batch[key] for key in ("input_ids", "attention_mask") if key in batch]
    if words:
        return model.scaled(model.encode_text(*words) if image is None else model.encode_composed(*words, image))
    return model.scaled(model.encode_item(image) if isinstance(model, CSANet) else model.encode_image(image))


def embed_scaled(model, items, **how):
    """Scaled embeddings (len(items), D) of items; how: what `embed` takes after the items.

    model: one of ours, an OtherModel, or None, which gives zeros."""
    if model is None:
        return torch.zeros(len(items), 1)
    if isinstance(model, OtherModel):
        return model.vectors_of(items)
    return embed(partial(embed_batch, model), items, **how)


class OtherModel:
    """Vectors of any model in the place of ours: docs/results.md "Any model under these protocols".

    path: an .npz with "vectors" (N, D) float32, a row for each line of "list", the text of the file that --list wrote.
    They are compared by their dot products, as they are. Raises InputError on other contents."""

    def __init__(self, path):
        self.path = path
        try:
            with np.load(path, allow_pickle=False) as file:
                if file["vectors"].dtype.kind not in "fiu":
                    raise ValueError(f"vectors of {file['vectors'].dtype}")
                self.vectors = torch.from_numpy(file["vectors"]).float()
                lines = str(file["list"]).removeprefix("\ufeff").splitlines()
                self.rows = {line: row for row, line in enumerate(lines)}
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            found = not_the_file(path) or f"cannot be read ({str(error).partition(chr(10))[0]:.100})"
            cure = "expected an .npz of vectors and list, as docs/results.md makes it"
            raise InputError(f"{path}: {found}; {cure}") from None
        shape = tuple(self.vectors.shape)
        if len(shape) != 2 or shape[0] != len(self.rows) or not shape[1]:
            expected = f"({len(self.rows)}, D), a row for each line of list"
            raise InputError(f"{path}: found vectors {shape}, expected {expected}")
        bad = (~self.vectors.isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            raise InputError(f"{path}: vector {bad[0]} is not finite ({len(bad)} such); expected numbers alone")

    def vectors_of(self, items):
        """The vectors (len(items), D) of items. Raises InputError for an item that is not in the list."""
        lines = [line_of(item) for item in items]
        missing = [line for line in lines if line not in self.rows]
        if missing:
            found = f"{len(missing)} of {len(lines)} items are not in its list, as {missing[0]:.200}"
            raise InputError(f"{self.path}: {found}; write the list anew for this --data_root and task")
        return self.vectors[[self.rows[line] for line in lines]]


def line_of(item):
    """The line of an item in the file that --list writes: JSON with "image", "text" or both."""
    return json.dumps({key: str(item[key]) for key in ("image", "text") if key in item})


# ---- the five tasks --------------------------------------------------------------------------------------------------
# Each function yields (protocol, Result). The first protocol selects the best checkpoint; a validation stops after it.


def product_items(products):
    """What `embed` takes for every image and for every text of products."""
    images = [{"image": path, "name": product.name} for product in products for path in product.images]
    return images, [{"text": product.text} for product in products]


def embed_retrieval(model, products, tokenizer, config, processes):
    """The first four arguments of `full_gallery` for products: every image and every text once, scaled."""
    images, texts = product_items(products)
    image_id = [i for i, product in enumerate(products) for _ in product.images]
    how = {"tokenizer": tokenizer, "config": config, "processes": processes}
    embeddings = [embed_scaled(model, items, **how) for items in (images, texts)]
    return *embeddings, torch.tensor(image_id), torch.arange(len(products))


def evaluate_retrieval(model, tokenizer, config, processes):
    """ITR and TIR on FashionGen val: full gallery, and sample-100 where the products have sub-categories."""
    every = annotations.load_products(config.data_root, "FashionGen", "val")
    products = photos.leave_out_of_products(every, config, "FashionGen val")
    embeddings = image, text, image_id, text_id = embed_retrieval(model, products, tokenizer, config, processes)
    n_images = sum(len(product.images) for product in every)
    left_out = {"images_left_out": n_images - len(image), "texts_left_out": len(every) - len(text)}
    images, texts = product_items(products)
    result = full_gallery(*embeddings)
    result.counts |= left_out
    result.rankings.append(Ranking(images, texts, image, text, image_id, text_id))
    captioned = [{"image": path, "name": product.text} for product in products for path in product.images]
    result.rankings.append(Ranking(texts, captioned, text, image, text_id, image_id))
    yield "full gallery", result
    if annotations.has_subcategories(products):
        group = torch.tensor([product.subcategory for product in products])
        result = sample_100(*embeddings, group[image_id], group, config.seed)
        result.counts |= left_out
        yield "sample-100", result


def load_garment(name, config):
    """FashionIQ val of one of FASHIONIQ_CLASSES, as far as its images are there: queries as annotations.FashionIQ has
    them, {name: path} of the gallery, counts of what is left out. Raises InputError where no query has its images."""
    queries, gallery = annotations.load_fashioniq(config.data_root, name, "val", config.gallery)
    paths = [query[key] for query in queries for key in ("image", "image2")]
    broken = photos.leave_out([*gallery.values(), *paths], config, f"FashionIQ {name}")
    kept = [query for query in queries if not {query["image"], query["image2"]} & broken]
    if not kept:
        raise InputError(f"FashionIQ {name}: no query has both its images, expected some under {config.data_root}")
    kept_gallery = {image: path for image, path in gallery.items() if path not in broken}
    left_out = {f"{name}_queries_left_out": len(queries) - len(kept)}
    return kept, kept_gallery, left_out | {f"{name}_gallery_left_out": len(gallery) - len(kept_gallery)}


def evaluate_fashioniq(model, tokenizer, config, processes):
    """TGIR on FashionIQ val with the gallery `config.gallery`: each gallery image and each query is embedded once."""
    how = {"tokenizer": tokenizer, "config": config, "processes": processes, "whole": True}
    garments = {name: load_garment(name, config) for name in annotations.FASHIONIQ_CLASSES}
    classes, rankings, counts = {}, [], {}
    for name, (queries, gallery, left_out) in garments.items():
        query_items = [{key: query[key] for key in ("image", "text", "name")} for query in queries]
        gallery_items = [{"image": path, "name": image} for image, path in gallery.items()]
        place = {image: i for i, image in enumerate(gallery)}
        target = torch.tensor([place[query["target"]] for query in queries])
        embeddings = [embed_scaled(model, items, **how) for items in (query_items, gallery_items)]
        classes[name] = (*embeddings, target, torch.arange(len(gallery)))
        rankings.append(Ranking(query_items, gallery_items, *classes[name]))
        counts |= left_out
    result = composed_retrieval(classes)
    result.counts |= counts
    result.rankings += rankings
    yield f"gallery {config.gallery}", result


def evaluate_recognition(model, tokenizer, config, processes):
    """CR or SCR on FashionGen val: every image with its product's text is one sample."""
    every = annotations.load_products(config.data_root, "FashionGen", "val")
    products = photos.leave_out_of_products(every, config, "FashionGen val")
    key = annotations.RECOGNITION_LABELS[config.task]
    annotations.count_labels(products, key, model.config.n_classes)
    items = []
    for product in products:
        item = {"text": product.text, "label": getattr(product, key), "name": product.name}
        items += [{"image": path, **item} for path in product.images]
    logits = embed(model.classify, items, tokenizer, config, processes)
    labels, classes = torch.tensor([item["label"] for item in items]), torch.arange(logits.shape[1])
    result = recognition(logits, labels)
    result.counts["samples_left_out"] = sum(len(product.images) for product in every) - len(items)
    # On a page each image shows its class and the class that was predicted for it.
    names = next(iter(annotations.label_names(config.data_root, config.task).values()), [])
    names = [{"text": names[i] if i < len(names) else f"class {i}"} for i in classes.tolist()]
    images = [{"image": item["image"], "text": f"true: {names[item['label']]['text']}"} for item in items]
    result.rankings.append(Ranking(images, names, logits, None, labels, classes, shown=1))
    yield "every image", result


@torch.no_grad()
def embed_outfits(model, outfits, **how):
    """Each outfit as `outfit_retrieval` takes it: (Q, D) float32. how: what `embed` takes after the items.

    outfits: dicts as annotations.Polyvore has them, but an item has a list of categories: it counts as their mean."""
    # The wanted category counts only after the image encoder, so each image is encoded once for all categories.
    paths = list({path: None for outfit in outfits for path, _ in outfit["items"]})
    images = [{"image": path, "name": path} for path in paths]
    device = model.logit_scale.device
    encoded = embed(lambda batch: model.encode_item(batch["image"]), images, **how).to(device)
    row_of, queries = {path: i for i, path in enumerate(paths)}, []
    for outfit in outfits:
        pairs = [(row_of[path], one, 1 / len(several)) for path, several in outfit["items"] for one in several]
        row, category, share = (torch.tensor(column, device=device) for column in zip(*pairs, strict=True))
        fused = model.fuse(encoded[row], category, torch.full_like(category, outfit["blank_item"][1]))
        queries.append((share[:, None] * fused).sum(0).cpu() / len(outfit["items"]))
    return finite(torch.stack(queries), outfits)


def evaluate_polyvore(model, tokenizer, config, processes):
    """OCIR on Polyvore Outfits test, split `config.split`. The blank is the item that a row takes out of its outfit."""
    every, n_categories = annotations.load_polyvore(config.data_root, config.split, "test")
    if n_categories != model.n_categories:
        expected = f"the {model.n_categories} of the checkpoint's CSA-Net"
        raise InputError(f"{config.data_root}: found {n_categories} categories, expected {expected}")
    paths = [path for outfit in every for path, _ in [*outfit["items"], outfit["blank_item"]]]
    broken = photos.leave_out(paths, config, f"Polyvore {config.split} test")
    rows = [o for o in every if not {path for path, _ in [*o["items"], o["blank_item"]]} & broken]
    # The gallery has every blank once, also the blanks of rows that are no queries: they are marked as fake, or the
    # image of another item is missing.
    every_blank = {row["blank"]: row["blank_item"] for row in every}
    blanks = {name: item for name, item in every_blank.items() if item[0] not in broken}
    outfits = [row for row in rows if not row["fake"]]
    how = {"tokenizer": tokenizer, "config": config, "processes": processes, "whole": True}
    blank_items = [{"image": path, "name": name} for name, (path, _) in blanks.items()]
    blank = embed_scaled(model, blank_items, **how)
    asked = [{**o, "items": [(path, [category]) for path, category in o["items"]]} for o in outfits]
    queries = embed_outfits(model, asked, **how)
    blank_id, category = torch.arange(len(blank)), torch.tensor([category for _, category in blanks.values()])
    place = {name: i for i, name in enumerate(blanks)}
    target = torch.tensor([place[outfit["blank"]] for outfit in outfits])
    result = outfit_retrieval(queries, target, blank, blank_id, category)
    result.counts["outfits_left_out"] = len(every) - len(rows)  # rows marked as fake included
    result.counts["gallery_left_out"] = len(every_blank) - len(blanks)
    shown = [{"image": [path for path, _ in o["items"]], "text": "what goes with these?"} for o in outfits]
    result.rankings.append(Ranking(shown, blank_items, queries, blank, target, blank_id, (category[target], category)))
    yield f"{config.split}, same category", result


@dataclass
class Task:
    """A task: how it is trained and how it is evaluated."""

    heads: tuple  # of the FashionViL that it trains; none: it trains a CSA-Net
    objective: Callable  # its loss, one of losses.py
    load_items: Callable  # (config) -> (training items, label counts), one of data.py
    pick: Callable | None  # what a visit in training takes of an item; None: all of it
    run: Callable  # (model, tokenizer, config, processes) -> (protocol, Result) pairs, one of the functions above
    criterion: str = "mean_recall"  # the metric that selects the best checkpoint
    fit: Callable = data.resize_then_crop  # how an image gets the size of the model
    max_tokens: int = data.MAX_TOKENS  # the longest text, where the settings have 0

    @property
    def needs(self):
        """What `checkpoint.load_model` must find in a checkpoint of this task."""
        return self.heads or ("csa_net",)


RECOGNITION = Task(
    ("recognition",), losses.recognition, data.fashiongen_items, data.pick_image, evaluate_recognition, "accuracy"
)
TASKS = {
    "fashiongen_retrieval": Task(
        ("contrastive",), losses.itc, data.fashiongen_items, data.pick_image, evaluate_retrieval
    ),
    "fashioniq": Task(
        ("contrastive",),
        losses.tgir,
        data.fashioniq_items,
        None,
        evaluate_fashioniq,
        fit=data.crop_then_resize,
        max_tokens=data.FASHIONIQ_MAX_TOKENS,
    ),
    "fashiongen_category": RECOGNITION,
    "fashiongen_subcategory": RECOGNITION,
    "polyvore": Task(
        (), losses.ocir, data.polyvore_items, data.pick_pair, evaluate_polyvore, fit=data.crop_then_resize
    ),
}


@dataclass
class EvalConfig:
    """Settings of `python evaluate.py`."""

    task: str = setting("", ", ".join(TASKS), choices=tuple(TASKS), group="task")
    checkpoint: str = setting("", "ours or a released one")
    baseline: str = setting("", "another checkpoint or .npz: adds the difference to it on the same queries")
    list: str = setting("", "file to write, a JSON line for each item that a model must embed; needs no checkpoint")
    embeddings: str = setting("", "an .npz with the vectors of that list by any model, in place of --checkpoint")
    split: str = setting("disjoint", "polyvore: disjoint or nondisjoint", choices=SPLITS)
    gallery: str = setting("original", "fashioniq: original (split file) or val (references, targets)", None, GALLERIES)
    data_root: str = setting("data/datasets", "folder that holds FashionGen/, FashionIQ/, ...", group="data")
    missing: str = setting("stop", MISSING, choices=("stop", "skip"))
    vocab: str = setting("", "WordPiece vocab.txt; empty: the checkpoint's own, else as in training")
    bert: str = setting("", "BERT folder or hub name for the vocabulary of a released checkpoint")
    image_size: int = setting(0, "pixels a side; 0: the checkpoint's own, 224 for a released one")
    max_tokens: int = setting(0, "longest text; 0: the checkpoint's own, else the paper's 75, for fashioniq 50", FROM_0)
    bootstrap: bool = setting(False, "add 95 % intervals over queries", group="results")
    show: int = setting(0, "draw this many queries with their best results as a page; 0: none", FROM_0)
    out: str = setting("", "JSON to write, with --show the page, a .png; empty: CHECKPOINT.TASK.json or .png")
    seed: int = setting(0, "of sample-100's candidates, of the bootstrap and of the queries that --show draws", FROM_0)
    eval_batch_size: int = setting(64, "images or texts a process embeds at a time", COUNT, group="machine")
    workers: int = setting(2, "data loader workers per process", FROM_0)
    dtype: str = setting("float32", "float32, bfloat16 or float16 (autocast)", choices=DTYPES)
    device: str = setting("auto", "auto, cpu or cuda", choices=DEVICES)


def read_tokenizer(path, model, config, vocab):
    """The WordPiece tokenizer of checkpoint `path`, whose own vocabulary is `vocab`, a text or None.

    Raises InputError where there is no vocabulary or it is not the model's."""
    tokenizer = data.wordpiece(bert.vocabulary(config, vocab))
    if tokenizer.get_vocab_size() != model.config.vocab_size:
        found = f"found a vocabulary of {tokenizer.get_vocab_size()} words, expected {model.config.vocab_size}"
        raise InputError(f"{path}: {found}; set --vocab=FILE to the one of its training")
    return tokenizer


def as_trained(config, trained_config):
    """The config with image_size and max_tokens of `trained_config`, a checkpoint's "config" or {}, where it has 0."""
    image_size, max_tokens = trained_config.get("image_size", 224), trained_config.get("max_tokens", 0)
    return replace(config, image_size=config.image_size or image_size, max_tokens=config.max_tokens or max_tokens)


def run_other(model, config, processes):
    """The task of an OtherModel, or None. Raises InputError for a task that needs more than vectors of items."""
    if config.task not in ("fashiongen_retrieval", "fashioniq"):
        expected = "fashiongen_retrieval or fashioniq for any model's vectors"
        raise InputError(f"task: found {config.task!r}, expected {expected}")
    return TASKS[config.task].run(model, None, config, processes)


def evaluate_checkpoint(path, config, processes):
    """{protocol: Result} of one checkpoint on `config.task`. Raises InputError where it is of another task."""
    task = TASKS[config.task]
    if str(path).endswith(".npz"):
        return dict(run_other(OtherModel(path), config, processes))
    model, info = checkpoint.load_model(path, processes.device, task.needs)
    if "recognition" in task.needs and info["task"] not in (None, config.task):
        raise InputError(f"{path}: was trained for {info['task']}; set --task={info['task']}, not {config.task}")
    checkpoint.check_labels(path, info["labels"], annotations.label_names(config.data_root, config.task))
    config = as_trained(config, info["config"])
    tokenizer = None
    if task.heads:  # a CSA-Net reads no text
        tokenizer = read_tokenizer(path, model, config, info["vocab"])
        data.check_lengths(config, model.config.max_position_embeddings)
    return dict(task.run(model, tokenizer, config, processes))


def report(results, config, device, path, out, seconds, baseline=None, intervals=False):
    """Print a table for each protocol, chance beside every metric, and write all of it as JSON to `out`.

    baseline: {protocol: Result} of another checkpoint on the same queries; adds the difference and its interval."""
    rows = {"task": config.task, "checkpoint": str(path), "seed": config.seed, "seconds": round(seconds, 1)}
    rows |= {"dtype": config.dtype, "device": device_name(device)}
    lines = []
    for protocol, result in results.items():
        interval_of = partial(metrics.bootstrap, result.metrics_of, result.outcomes, seed=config.seed)
        more = {}  # further columns
        if intervals:
            more["interval"] = interval_of()
        if baseline:
            base = baseline[protocol]
            more["difference"] = {name: value - base.metrics[name] for name, value in result.metrics.items()}
            more["difference_interval"] = interval_of(base.outcomes)
        rows[protocol] = {"metrics": result.metrics, "chance": result.chance, **more, "counts": result.counts}
        counts = {k: v for k, v in result.counts.items() if v or not k.endswith("_left_out")}
        counts = ", ".join(f"{name} {value:g}" for name, value in counts.items())
        lines.append(f"\n{config.task}, {protocol} ({counts}; seed {config.seed}; {path})")
        lines.append(" ".join([f"{'%':>16} {'value':>7} {'chance':>7}", *(f"{x.replace('_', ' '):>19}" for x in more)]))
        for name, value in result.metrics.items():
            line = f"{name:>16} {100 * value:7.1f} {100 * result.chance[name]:7.1f}"
            for x in (column[name] for column in more.values()):
                text = f"{100 * x[0]:.1f} to {100 * x[1]:.1f}" if isinstance(x, tuple) else f"{100 * x:+.1f}"
                line += f" {text:>19}"
            lines.append(line)
    write_json(out, rows)  # first, for whoever reads what is printed may close the pipe
    print(*lines, f"written: {out}", sep="\n")


def main():
    config = settings.load_config(EvalConfig, description=__doc__)
    path = config.embeddings or config.checkpoint
    if not path and not config.list:
        raise InputError("checkpoint: none given, expected --checkpoint=FILE, --embeddings=FILE.npz or --list=FILE")
    if config.embeddings and config.checkpoint:
        raise InputError("embeddings: found --checkpoint, too, expected one of them; --baseline compares two")
    out = config.out or f"{path}.{config.task}.{'png' if config.show else 'json'}"
    if config.show:
        pictures.check_page(out)
    processes = start_processes(config.device)
    if config.list:
        _, result = next(run_other(None, config, processes))
        items = [item for ranking in result.rankings for item in (*ranking.query_items, *ranking.gallery_items)]
        lines = dict.fromkeys(map(line_of, items))  # each once
        if processes.is_main:
            with replacing(config.list) as file:
                file.write("".join(f"{line}\n" for line in lines).encode())
            print(f"written: {config.list}, {len(lines)} items to embed")
        return
    started = time.perf_counter()
    results = evaluate_checkpoint(path, config, processes)
    baseline = evaluate_checkpoint(config.baseline, config, processes) if config.baseline else None
    if not processes.is_main:
        return
    table, seconds = str(Path(out).with_suffix(".json")) if config.show else out, time.perf_counter() - started
    report(results, config, processes.device, path, table, seconds, baseline, config.bootstrap)
    if config.show:
        protocol, result = next(iter(results.items()))
        pictures.draw_rankings(out, f"{config.task}, {protocol}", result.rankings, config.show, config.seed)


if __name__ == "__main__":
    ending.run(main)
