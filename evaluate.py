"""Evaluate a checkpoint on one of the five tasks.

    python evaluate.py --task=fashioniq --checkpoint=runs/fashioniq/best.pt --bootstrap

fashiongen_retrieval: image-to-text and text-to-image retrieval (ITR, TIR). fashioniq: text-guided image retrieval
(TGIR), where an image and a change in words rank images. fashiongen_category and fashiongen_subcategory: category and
sub-category recognition (CR, SCR). polyvore: outfit complementary item retrieval (OCIR), where an outfit ranks items.

metrics.py has the protocols, each with its definition."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import annotations
import bert
import checkpoint
import common
import data
import ending
import metrics
import photos
import pictures
import settings
from data import crop_then_resize, resize_then_crop
from files import replacing, write_json
from metrics import classification, composed_retrieval, full_gallery, outfit_retrieval, sample_100
from model import CSANet
from othermodels import OtherModel
from settings import COUNT, DEVICES, DTYPES, FROM_0, InputError, setting

GALLERIES, SPLITS = ("original", "val"), ("disjoint", "nondisjoint")  # of FashionIQ and of Polyvore Outfits


@torch.no_grad()
def embed(
    encode, items, tokenizer, config, processes, fit=resize_then_crop, max_tokens=data.MAX_TOKENS, progress=False
):
    """`encode(batch)` of every item once, in the order of the items: (len(items), ...) float32 on every process's CPU.

    items: as data.Samples takes them; the processes share them. max_tokens: where config.max_tokens is 0. config needs
    image_size, max_tokens, eval_batch_size, workers, dtype; in tasks also task, data_root, seed, split and gallery."""
    if isinstance(encode, OtherModel):
        return encode.vectors_of(items)
    # Neighbours have texts of similar length, so that batches hold little padding.
    order = sorted(range(len(items)), key=lambda i: len(items[i].get("text", "")))
    # Where there are fewer items than processes, the others embed the first item again.
    places = [order[rank :: processes.world_size] or order[:1] for rank in range(processes.world_size)]
    own = [items[i] for i in places[processes.rank]]  # that this process embeds
    dataset = data.Samples(own, tokenizer, fit, config, config.max_tokens or max_tokens)
    reading = {"worker_init_fn": data.leave_group, "collate_fn": data.collate}
    reading |= {"num_workers": config.workers if any("image" in item for item in own) else 0}  # texts are tokenized
    reading |= {"pin_memory": processes.device.type == "cuda"}
    if reading["num_workers"] and (common.in_group() or processes.device.type == "cuda"):
        # The main process has threads (gloo, NCCL, pinned memory). A fork beside them can hang (pytorch#130610).
        reading["multiprocessing_context"] = "forkserver"
    rows = []
    for batch in tqdm(DataLoader(dataset, config.eval_batch_size, **reading), unit=" batches", disable=not progress):
        with common.autocast(processes.device, config.dtype):
            rows.append(encode(data.to_device(batch, processes.device)).float())
    # Every process receives all rows, and puts them into the order of the items.
    rows = torch.cat(rows).cpu()
    out = rows.new_empty(len(items), *rows.shape[1:])
    for place, part in zip(places, common.gather_objects(rows), strict=True):
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


def encoder_of(model):
    """What `embed` takes for the scaled embeddings of a model of ours or an OtherModel."""
    return model if isinstance(model, OtherModel) else partial(embed_batch, model)


def image_items(paths):
    """Items of images alone."""
    return [{"image": path, "name": path} for path in paths]


def embed_batch(model, batch):
    """Scaled embeddings (B, D) of images, of texts, or of both: an image with a change in words. CSA-Net: of items."""
    image, words = batch.get("image"), [batch[key] for key in ("input_ids", "attention_mask") if key in batch]
    if words:
        return model.scaled(model.encode_text(*words) if image is None else model.encode_composed(*words, image))
    return model.scaled(model.encode_item(image) if isinstance(model, CSANet) else model.encode_image(image))


def embed_retrieval(model, products, tokenizer, config, processes):
    """The first four arguments of `full_gallery` for products: every image and every text once, scaled."""
    embed_items = partial(embed, encoder_of(model), tokenizer=tokenizer, config=config, processes=processes)
    images = [{"image": path, "name": product.name} for product in products for path in product.images]
    image_id = [i for i, product in enumerate(products) for _ in product.images]
    texts = embed_items([{"text": product.text} for product in products])
    return embed_items(images), texts, torch.tensor(image_id), torch.arange(len(products))


def retrieval_metrics(model, products, tokenizer, config, processes):
    """Metrics of products in the full gallery, for the validation of pre-training."""
    return full_gallery(*embed_retrieval(model, products, tokenizer, config, processes)).metrics


# ---- the five tasks: {protocol: Result}; the first protocol selects the best checkpoint ------------------------------


def left_out(config, **numbers):
    """Counts of what misses its images, if config.missing allows that; numbers {name: (before, after)}.

    A table that says them does not stand on the published protocol."""
    skip = config.missing == "skip"
    return {f"{name}_left_out": before - after for name, (before, after) in numbers.items() if skip}


def evaluate_retrieval(model, tokenizer, config, processes, only_first=False):
    """ITR and TIR on FashionGen val: full gallery, and sample-100 where the products have sub-categories.

    only_first: the full gallery alone, which selects the best checkpoint."""
    every = annotations.load_products(config.data_root, "FashionGen", "val")
    products = photos.leave_out_of_products(every, config, "FashionGen val")
    embeddings = image, text, image_id, text_id = embed_retrieval(model, products, tokenizer, config, processes)
    result = full_gallery(*embeddings)
    n_images = sum(len(product.images) for product in every)
    missing = left_out(config, images=(n_images, len(image)), texts=(len(every), len(text)))
    result.counts |= missing
    # A photo that is a query stands on a page without its text, which is the answer.
    texts = [pictures.Cell(text=product.text) for product in products]
    photo_cells = [pictures.Cell([path]) for product in products for path in product.images]
    images = [pictures.Cell([path], product.text) for product in products for path in product.images]
    result.choices = pictures.ranked_choices(result.outcomes["i2t"], photo_cells, texts, image, text, image_id, text_id)
    result.choices += pictures.ranked_choices(result.outcomes["t2i"], texts, images, text, image, text_id, image_id)
    results = {"full gallery": result}
    if not only_first and annotations.has_subcategories(products):
        group = torch.tensor([product.subcategory for product in products])
        results["sample-100"] = sample_100(*embeddings, group[image_id], group, config.seed)
        results["sample-100"].counts |= missing
    return results


class Garment(NamedTuple):  # one class of FashionIQ val, as far as its images are there
    queries: list  # as annotations.FashionIQ has them
    gallery: dict  # {name: path} of the images to search in
    left_out: dict  # counts of what is not there


def load_garment(name, config):
    """The `Garment` of one of FASHIONIQ_CLASSES. Raises InputError where no query has its images."""
    queries, gallery = annotations.load_fashioniq(config.data_root, name, "val", config.gallery)
    paths = [query[key] for query in queries for key in ("image", "image2")]
    broken = photos.leave_out([*gallery.values(), *paths], config, f"FashionIQ {name}")
    kept = [query for query in queries if not {query["image"], query["image2"]} & broken]
    if not kept:
        raise InputError(f"FashionIQ {name}: no query has both its images, expected some under {config.data_root}")
    kept_gallery = {image: path for image, path in gallery.items() if path not in broken}
    sizes = {f"{name}_queries": (len(queries), len(kept)), f"{name}_gallery": (len(gallery), len(kept_gallery))}
    return Garment(kept, kept_gallery, left_out(config, **sizes))


def evaluate_fashioniq(model, tokenizer, config, processes):
    """TGIR on FashionIQ val with the gallery `config.gallery`: each gallery image and each query is embedded once."""
    how = (tokenizer, config, processes, crop_then_resize, data.FASHIONIQ_MAX_TOKENS)
    garments = {name: load_garment(name, config) for name in annotations.FASHIONIQ_CLASSES}
    classes = {}
    for name, (queries, gallery, _) in garments.items():
        items = [{key: query[key] for key in ("image", "text", "name")} for query in queries]
        place = {image: i for i, image in enumerate(gallery)}
        classes[name] = {
            "gallery": embed(encoder_of(model), image_items(gallery.values()), *how),
            "queries": embed(encoder_of(model), items, *how),
            "query_id": torch.tensor([place[query["target"]] for query in queries]),
            "gallery_id": torch.arange(len(gallery)),
        }
    result = composed_retrieval(classes)
    for name, (queries, gallery, counts) in garments.items():
        result.counts |= counts
        query_cells = [pictures.Cell([query["image"]], query["text"]) for query in queries]
        gallery_cells = [pictures.Cell([path], image) for image, path in gallery.items()]
        result.choices += pictures.ranked_choices(result.outcomes[name], query_cells, gallery_cells, **classes[name])
    return {f"gallery {config.gallery}": result}


def recognition_row(config, path, prediction, label):
    """The pictures.Row of one image with the names of its classes, from labels.json of the data root, or numbers."""
    labels = annotations.label_names(config.data_root, config.task)  # of one kind, or none
    names = {number: name for names in labels.values() for number, name in enumerate(names)}
    true, predicted = (names.get(number, f"class {number}") for number in (label, prediction))
    frame = pictures.RIGHT if prediction == label else pictures.WRONG
    return pictures.Row(pictures.Cell([path], label=f"true: {true}"), [pictures.Cell(text=predicted, frame=frame)])


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
    result = classification(logits, torch.tensor([item["label"] for item in items]))
    result.counts |= left_out(config, samples=(sum(len(product.images) for product in every), len(items)))
    for item, (prediction, label) in zip(items, result.outcomes["samples"].tolist(), strict=True):
        row = partial(recognition_row, config, item["image"], prediction, label)
        result.choices.append(pictures.Choice(prediction != label, row))
    return {"every image": result}


@torch.no_grad()
def embed_outfits(model, outfits, embed_items):
    """Each outfit as `outfit_retrieval` takes it: (Q, D) float32. embed_items(encode, items): `embed` of the task."""
    # The wanted category counts only after the image encoder, so each image is encoded once for all categories.
    paths = list({path: None for outfit in outfits for path, _ in outfit["items"]})
    encoded = embed_items(lambda batch: model.encode_item(batch["image"]), image_items(paths))
    row_of, device = {path: i for i, path in enumerate(paths)}, model.logit_scale.device
    queries = []
    for outfit in outfits:
        items = encoded[[row_of[path] for path, _ in outfit["items"]]].to(device)
        category = torch.tensor([category for _, category in outfit["items"]], device=device)
        fused = model.fuse(items, category, torch.full_like(category, outfit["blank_item"][1]))
        queries.append(fused.mean(0).cpu())
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
    # The gallery has every blank once, also the blanks of rows marked as fake, which are no queries.
    blanks = {row["blank"]: row["blank_item"] for row in rows}
    outfits = [row for row in rows if not row["fake"]]
    embed_items = partial(embed, tokenizer=tokenizer, config=config, processes=processes, fit=crop_then_resize)
    blank = embed_items(partial(embed_batch, model), image_items(path for path, _ in blanks.values()))
    queries, blank_id = embed_outfits(model, outfits, embed_items), torch.arange(len(blank))
    blank_category = torch.tensor([category for _, category in blanks.values()])
    place = {name: i for i, name in enumerate(blanks)}
    target = torch.tensor([place[outfit["blank"]] for outfit in outfits])
    result = outfit_retrieval(queries, target, blank, blank_id, blank_category)
    result.counts |= left_out(config, outfits=(len(every), len(rows)))  # rows marked as fake included
    ranks, category = result.outcomes["ocir"].unbind(dim=1)
    cells = [pictures.Cell([path for path, _ in o["items"]], "what goes with these?") for o in outfits]
    blank_cells = [pictures.Cell([path], name) for name, (path, _) in blanks.items()]
    shown = cells, blank_cells, queries, blank, target, blank_id, (category, blank_category)
    result.choices = pictures.ranked_choices(ranks, *shown)
    return {f"{config.split}, same category": result}


@dataclass
class Evaluation:
    """How one task is evaluated."""

    run: Callable  # (model, tokenizer, config, processes) -> {protocol: Result}
    metrics: Callable  # outcomes -> metrics
    needs: tuple  # what the model must have: heads, or "csa_net"
    criterion: str = "mean_recall"  # the metric that selects the best checkpoint
    validate: Callable = None  # as run, but only the protocol that selects; None: run itself

    def __post_init__(self):
        self.validate = self.validate or self.run


RECOGNITION = Evaluation(evaluate_recognition, metrics.recognition_scores, ("recognition",), "accuracy")
EVALUATIONS = {
    "fashiongen_retrieval": Evaluation(
        evaluate_retrieval,
        partial(metrics.recalls, ks=metrics.ITR_KS),
        ("contrastive",),
        validate=partial(evaluate_retrieval, only_first=True),
    ),
    "fashioniq": Evaluation(evaluate_fashioniq, partial(metrics.recalls, ks=metrics.TGIR_KS), ("contrastive",)),
    "fashiongen_category": RECOGNITION,
    "fashiongen_subcategory": RECOGNITION,
    "polyvore": Evaluation(evaluate_polyvore, partial(metrics.category_recalls, ks=metrics.OCIR_KS), ("csa_net",)),
}


def selecting(results):
    """The Result whose criterion selects the best checkpoint: every task puts that protocol first."""
    return next(iter(results.values()))


@dataclass
class EvalConfig:
    """Settings of `python evaluate.py`."""

    task: str = setting("", ", ".join(EVALUATIONS), choices=tuple(EVALUATIONS), group="task")
    checkpoint: str = setting("", "ours or a released one")
    baseline: str = setting("", "another checkpoint or .npz: adds the difference to it on the same queries")
    list: str = setting("", "file to write, a JSON line for each item that a model must embed; needs no checkpoint")
    embeddings: str = setting("", "an .npz with the vectors of that list by any model, in place of --checkpoint")
    split: str = setting("disjoint", "polyvore: disjoint or nondisjoint", choices=SPLITS)
    gallery: str = setting("original", "fashioniq: original (split file) or val (references, targets)", None, GALLERIES)
    data_root: str = setting("data/datasets", "folder that holds FashionGen/, FashionIQ/, ...", group="data")
    missing: str = setting("stop", photos.MISSING, choices=("stop", "skip"))
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


def read_tokenizer(path, model, config, trained):
    """The WordPiece tokenizer of checkpoint `path`, whose own vocabulary is `trained`, a text or None.

    Raises InputError where there is no vocabulary or it is not the model's."""
    tokenizer = data.wordpiece(bert.vocabulary(config, trained))
    if tokenizer.get_vocab_size() != model.config.vocab_size:
        found = f"found a vocabulary of {tokenizer.get_vocab_size()} words, expected {model.config.vocab_size}"
        raise InputError(f"{path}: {found}; set --vocab=FILE to the one of its training")
    return tokenizer


def as_trained(config, trained):
    """The config with image_size and max_tokens of `trained`, a checkpoint's "config" or {}, where it has 0."""
    image_size, max_tokens = trained.get("image_size", 224), trained.get("max_tokens", 0)
    return replace(config, image_size=config.image_size or image_size, max_tokens=config.max_tokens or max_tokens)


def run_other(model, config, processes):
    """{protocol: Result} of an OtherModel. Raises InputError for a task that needs more than vectors of items."""
    if config.task not in ("fashiongen_retrieval", "fashioniq"):
        raise InputError(
            f"task: found {config.task!r}, expected fashiongen_retrieval or fashioniq for any model's vectors"
        )
    return EVALUATIONS[config.task].run(model, None, config, processes)


def write_list(config, processes):
    """Write the file `config.list`: a JSON line with "image", "text" or both for each item that a model must embed."""
    model = OtherModel()
    run_other(model, config, processes)
    if processes.is_main:
        with replacing(config.list) as file:
            file.write("".join(f"{line}\n" for line in model.rows).encode())
        print(f"written: {config.list}, {len(model.rows)} items to embed")


def evaluate_checkpoint(path, config, processes):
    """{protocol: Result} of one checkpoint on `config.task`. Raises InputError where it is of another task."""
    evaluation = EVALUATIONS[config.task]
    if str(path).endswith(".npz"):
        return run_other(OtherModel(path), config, processes)
    model, info = checkpoint.load_model(path, processes.device, evaluation.needs)
    checkpoint.check_labels(path, info["labels"], annotations.label_names(config.data_root, config.task))
    config = as_trained(config, info["config"])
    tokenizer = None
    if config.task != "polyvore":  # a CSA-Net reads no text
        tokenizer = read_tokenizer(path, model, config, info["vocab"])
        data.check_lengths(config, model.config.max_position_embeddings)
    return evaluation.run(model, tokenizer, config, processes)


def report(results, config, device, path, out, seconds, baseline=None, intervals=False):
    """Print a table for each protocol, chance beside every metric, and write all of it as JSON to `out`.

    baseline: {protocol: Result} of another checkpoint on the same queries; adds the difference and its interval."""
    interval_of = partial(metrics.bootstrap, EVALUATIONS[config.task].metrics, seed=config.seed)
    rows = {"task": config.task, "checkpoint": str(path), "seed": config.seed, "seconds": round(seconds, 1)}
    rows |= {"dtype": config.dtype, "device": common.device_name(device)}
    for protocol, result in results.items():
        more = {}  # further columns
        if intervals:
            more["interval"] = interval_of(result.outcomes)
        if baseline:
            base = baseline[protocol]
            more["difference"] = {name: value - base.metrics[name] for name, value in result.metrics.items()}
            more["difference_interval"] = interval_of(result.outcomes, base.outcomes)
        rows[protocol] = {"metrics": result.metrics, "chance": result.chance, **more, "counts": result.counts}
        counts = ", ".join(f"{name} {value:g}" for name, value in result.counts.items())
        print(f"\n{config.task}, {protocol} ({counts}; seed {config.seed}; {path})")
        print(f"{'%':>16} {'value':>7} {'chance':>7}", *(f"{name.replace('_', ' '):>19}" for name in more))
        for name, value in result.metrics.items():
            line = f"{name:>16} {100 * value:7.1f} {100 * result.chance[name]:7.1f}"
            for x in (column[name] for column in more.values()):
                text = f"{100 * x[0]:.1f} to {100 * x[1]:.1f}" if isinstance(x, tuple) else f"{100 * x:+.1f}"
                line += f" {text:>19}"
            print(line)
    write_json(out, rows)
    print(f"written: {out}")


def main():
    config = settings.load_config(EvalConfig, description=__doc__)
    path = config.embeddings or config.checkpoint
    if not path and not config.list:
        raise InputError("checkpoint: none given, expected --checkpoint=FILE, --embeddings=FILE.npz or --list=FILE")
    out = config.out or f"{path}.{config.task}.{'png' if config.show else 'json'}"
    if config.show:
        pictures.check_page(out)
    processes = common.start_processes(config.device)
    if config.list:
        write_list(config, processes)
        return
    started = time.perf_counter()
    results = evaluate_checkpoint(path, config, processes)
    baseline = evaluate_checkpoint(config.baseline, config, processes) if config.baseline else None
    if not processes.is_main:
        return
    table, seconds = str(Path(out).with_suffix(".json")) if config.show else out, time.perf_counter() - started
    report(results, config, processes.device, path, table, seconds, baseline, config.bootstrap)
    if config.show:
        name = f"{config.task}, {next(iter(results))}"
        pictures.draw_choices(out, name, selecting(results).choices, config.show, config.seed)


if __name__ == "__main__":
    ending.run(main)
