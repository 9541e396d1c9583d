"""Evaluate a checkpoint on one of the five tasks.

    python evaluate.py --task=fashioniq --checkpoint=runs/fashioniq/best.pt --bootstrap

fashiongen_retrieval: image-to-text and text-to-image retrieval (ITR, TIR). fashioniq: text-guided image retrieval
(TGIR), where an image and a change in words rank images. fashiongen_category and fashiongen_subcategory: category and
sub-category recognition (CR, SCR). polyvore: outfit complementary item retrieval (OCIR), where an outfit ranks items.

An item is a dict. A model reads its "image" (a path), its "text", or both. Its "name" is for messages. Its "id" is a
number: the right items of a query have its id. This file makes vectors of items, and metrics.py makes the numbers."""

import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import losses
from metrics import composed_retrieval, full_gallery, outfit_retrieval, recognition, sample_100
from model import CSANet, FashionViL
from plumbing import annotations, checkpoint, ending, loading, photos, pictures, settings, tables
from plumbing.files import check_place
from plumbing.other_models import OtherModel, write_list
from plumbing.pictures import Ranking, dot_products
from plumbing.processes import gather_objects, start_processes
from plumbing.settings import COUNT, DEVICES, DTYPES, FROM_0, MISSING, InputError, setting

GALLERIES, SPLITS = ("original", "val"), ("disjoint", "nondisjoint")  # of FashionIQ and of Polyvore Outfits


# ---- from items to vectors -------------------------------------------------------------------------------------------


class Embedder:
    """Makes vectors of items with a model, which must be in eval mode.

    task: a row of TASKS; it says how images are fitted and how long texts may be. tokenizer: None for a CSANet.
    config has image_size, max_tokens, eval_batch_size, workers and dtype."""

    def __init__(self, model, task, tokenizer, config, processes):
        self.model, self.task, self.tokenizer = model, task, tokenizer
        self.config, self.processes = config, processes

    @torch.no_grad()
    def embed(self, items, encode=None, progress=False):
        """Every item once, in the order of the items: (len(items), ...) float32 on the CPU of every process.

        encode(batch) gives a batch's vectors (B, ...); None: `self.encode`. The processes share the work.
        Raises InputError as `check_finite`."""
        rank, world_size, device = self.processes.rank, self.processes.world_size, self.processes.device
        # Neighbours have texts of similar length, so that batches hold little padding.
        order = sorted(range(len(items)), key=lambda i: len(items[i].get("text", "")))
        # Where there are fewer items than processes, the others repeat one item, so that none is without work.
        shares = [order[i::world_size] or order[:1] for i in range(world_size)]
        vectors = []
        for batch in tqdm(self.load([items[i] for i in shares[rank]]), unit=" batches", disable=not progress):
            with self.processes.autocast(self.config.dtype):
                vectors.append((encode or self.encode)(data.to_device(batch, device)).float())
        # Every process receives the vectors of all, and puts them into the order of the items.
        vectors = torch.cat(vectors).cpu()
        ordered = vectors.new_empty(len(items), *vectors.shape[1:])
        for share, found in zip(shares, gather_objects(vectors), strict=True):
            ordered[share] = found
        check_finite(ordered, items)
        return ordered

    def load(self, items):
        """A DataLoader of the items, in their order."""
        config, on_gpu = self.config, self.processes.device.type == "cuda"
        max_tokens = config.max_tokens or self.task.max_tokens
        dataset = data.Samples(items, self.tokenizer, self.task.fit, config, max_tokens)
        # A start of workers is only worth it for more images than a batch. Texts are tokenized already.
        workers = config.workers if "image" in items[0] and len(items) > config.eval_batch_size else 0
        if workers:  # each reads two batches ahead
            loading.check_shared_memory(2 * workers + 1, config.eval_batch_size, config.image_size)
        options = {"num_workers": workers, "worker_init_fn": loading.init_worker, "pin_memory": on_gpu}
        if workers and (on_gpu or self.processes.world_size > 1):
            # The main process has threads (gloo, NCCL, pinned memory). A fork beside them can hang (pytorch#130610).
            options["multiprocessing_context"] = "spawn" if sys.platform == "win32" else "forkserver"
        return DataLoader(dataset, config.eval_batch_size, collate_fn=data.collate, **options)

    def encode(self, batch):
        """Scaled embeddings (B, D) of images, of texts, or of images with a change in words. CSANet: of items."""
        model, image = self.model, batch.get("image")
        if "input_ids" in batch:
            words = batch["input_ids"], batch["attention_mask"]
            return model.scaled(model.encode_text(*words) if image is None else model.encode_composed(*words, image))
        return model.scaled(model.encode_item(image) if isinstance(model, CSANet) else model.encode_image(image))


def check_finite(vectors, items):
    """Raise InputError where the vector of an item is not finite, with its name. vectors: (len(items), ...) float."""
    broken = (~vectors.reshape(len(items), -1).isfinite().all(dim=1)).nonzero().flatten().tolist()
    if broken:
        found = f"its embedding is not finite ({len(broken)} of {len(items)} such)"
        name = items[broken[0]].get("name", f"item {broken[0]}")
        raise InputError(f"{name}: {found}; the checkpoint is broken, or its numbers are too large for float16")


def column(items, key):
    """(len(items),) int64: the number that each item has under `key`."""
    return torch.tensor([item[key] for item in items])


# ---- the five tasks --------------------------------------------------------------------------------------------------
# Each `evaluate_*` yields (name of a protocol, metrics.Result). The first protocol selects the best checkpoint, so a
# validation stops after it. In retrieval and fashioniq the embedder may be an OtherModel, which has `embed`, too.


def load_val_products(config):
    """(products of FashionGen val as they are listed, the same as far as their images are there)."""
    listed = annotations.load_products(config.data_root, "FashionGen", "val")
    return listed, photos.leave_out_of_products(listed, config, "FashionGen val")


def count_left_out(listed, products):
    """How many images and texts of the listed products are none of `products`."""
    n_images = [sum(len(product.images) for product in some) for some in (listed, products)]
    return {"images_left_out": n_images[0] - n_images[1], "texts_left_out": len(listed) - len(products)}


def product_items(products):
    """The items of all images of products, and those of their texts. A product's id is its place."""
    images = [{"image": path, "id": i, "name": p.name} for i, p in enumerate(products) for path in p.images]
    return images, [{"text": product.text, "id": i} for i, product in enumerate(products)]


def embed_retrieval(embedder, products):
    """The first four arguments of `full_gallery` for products: every image and every text is embedded once."""
    images, texts = product_items(products)
    return embedder.embed(images), embedder.embed(texts), column(images, "id"), column(texts, "id")


def count_equal_texts(result, texts, image_id, text_id):
    """{"i2t_equal_texts", "t2i_equal_texts"}: the number of queries with a wrong item of the very same text.

    No model can tell such an item from the right one. A direction without such queries has no key. texts: a key of each
    product; equal keys cannot be told apart. image_id, text_id: the queries' products, as in `full_gallery`."""
    times, draws = Counter(texts), result.counts.get("draws", 1)
    equal = torch.tensor([times[text] > 1 for text in texts])
    rows = {"i2t": equal[image_id], "t2i": equal[text_id]}
    # sample-100 has a column for each draw, with 0 where the draw left the query out. So this is a mean over draws.
    counts = {f"{way}_equal_texts": (result.outcomes[way][rows[way]] > 0).sum().item() / draws for way in rows}
    return {key: n for key, n in counts.items() if n}


def evaluate_retrieval(embedder, config):
    """ITR and TIR on FashionGen val: full gallery, and sample-100 of the products that have a sub-category."""
    listed, products = load_val_products(config)
    image, text, image_id, text_id = embeddings = embed_retrieval(embedder, products)
    result = full_gallery(*embeddings)
    result.counts |= count_left_out(listed, products)
    result.counts |= count_equal_texts(result, [p.text for p in products], image_id, text_id)
    images, texts = product_items(products)
    captioned = [{**item, "text": products[item["id"]].text} for item in images]  # what a page shows below an image
    result.rankings.append(Ranking(images, texts, dot_products(image, text)))
    result.rankings.append(Ranking(texts, captioned, dot_products(text, image)))
    yield "full gallery", result
    grouped = [product for product in products if product.subcategory is not None]
    if grouped:
        group = torch.tensor([-1 if p.subcategory is None else p.subcategory for p in products])
        some_images, some_texts = group[image_id] >= 0, group >= 0
        ids = image_id[some_images], text_id[some_texts]
        result = sample_100(image[some_images], text[some_texts], *ids, *(group[i] for i in ids), config.seed)
        result.counts |= count_left_out(listed, grouped)
        result.counts |= count_equal_texts(result, [(p.text, p.subcategory) for p in products], *ids)
        yield "sample-100", result


def load_garment(name, config):
    """FashionIQ val of one of FASHIONIQ_CLASSES: (items of its queries, of its gallery, counts of what is left out).

    An image's id is its place in the gallery. Raises InputError where no query has both its images."""
    listed, gallery = annotations.load_fashioniq(config.data_root, name, "val", config.gallery)
    paths = [query[key] for query in listed for key in ("image", "image2")]  # of references and targets
    broken = photos.leave_out([*gallery.values(), *paths], config, f"FashionIQ {name}")
    kept = [image for image, path in gallery.items() if path not in broken]
    gallery_items = [{"image": gallery[image], "id": i, "name": image} for i, image in enumerate(kept)]
    place, queries = {image: i for i, image in enumerate(kept)}, []
    for query in listed:
        if not {query["image"], query["image2"]} & broken:
            item = {key: query[key] for key in ("image", "text", "name")}
            queries.append({**item, "id": place[query["target"]]})
    if not queries:
        raise InputError(f"FashionIQ {name}: no query has both its images, expected some under {config.data_root}")
    left_out = {f"{name}_queries_left_out": len(listed) - len(queries)}
    return queries, gallery_items, left_out | {f"{name}_gallery_left_out": len(gallery) - len(kept)}


def evaluate_fashioniq(embedder, config):
    """TGIR on FashionIQ val with the gallery `config.gallery`: each gallery image and each query is embedded once."""
    garments = {name: load_garment(name, config) for name in annotations.FASHIONIQ_CLASSES}
    classes, rankings, left_out = {}, [], {}
    for name, (queries, gallery, counts) in garments.items():
        vectors = embedder.embed(queries), embedder.embed(gallery)
        classes[name] = (*vectors, column(queries, "id"), column(gallery, "id"))
        rankings.append(Ranking(queries, gallery, dot_products(*vectors)))
        left_out |= counts
    result = composed_retrieval(classes)
    result.counts |= left_out
    result.rankings += rankings
    yield f"gallery {config.gallery}", result


def evaluate_recognition(embedder, config):
    """CR or SCR on FashionGen val: every image with its product's text is one sample. A label is an id."""
    listed, products = load_val_products(config)
    key = annotations.RECOGNITION_LABELS[config.task]
    products = annotations.with_label(products, key, "FashionGen val")
    annotations.count_labels(products, key, embedder.model.config.n_classes)
    samples = []
    for product in products:
        sample = {"text": product.text, "id": getattr(product, key), "name": product.name}
        samples += [{"image": path, **sample} for path in product.images]
    logits = embedder.embed(samples, encode=embedder.model.classify)
    result = recognition(logits, column(samples, "id"))
    result.counts["samples_left_out"] = count_left_out(listed, products)["images_left_out"]
    # On a page, each image shows its class and the class that was predicted for it.
    names = next(iter(annotations.label_names(config.data_root, config.task).values()), [])
    names = [*names, *(f"class {i}" for i in range(len(names), logits.shape[1]))]
    shown = [{**sample, "text": f"true: {names[sample['id']]}"} for sample in samples]
    classes = [{"text": name, "id": i} for i, name in enumerate(names)]
    result.rankings.append(Ranking(shown, classes, lambda i: logits[i], n_shown=1))
    yield "every image", result


@torch.no_grad()
def embed_outfits(embedder, outfits):
    """Each outfit as `outfit_retrieval` takes it: (len(outfits), D) float32 on the CPU.

    An outfit is a dict with "images", the paths of its photos; "categories", a list of numbers for each photo;
    "wanted", the category number of what goes with it; and "name". A photo has several categories only in search.py,
    where a coarse name such as "shoes" stands for several. It then counts as the mean of its vectors for all of them.
    """
    model, device = embedder.model, embedder.processes.device
    # The categories count only after the image encoder, so each photo is encoded once for all outfits.
    paths = list(dict.fromkeys(path for outfit in outfits for path in outfit["images"]))
    photo_items = [{"image": path, "name": path} for path in paths]
    encoded = embedder.embed(photo_items, encode=lambda batch: model.encode_item(batch["image"])).to(device)
    place, vectors = {path: i for i, path in enumerate(paths)}, []
    for outfit in outfits:
        # A row for each category of each photo. The rows of a photo have equal shares in its vector.
        pairs = zip(outfit["images"], outfit["categories"], strict=True)
        rows = [(place[path], number, 1 / len(numbers)) for path, numbers in pairs for number in numbers]
        row, category, share = (torch.tensor(values, device=device) for values in zip(*rows, strict=True))
        fused = model.fuse(encoded[row], category, torch.full_like(category, outfit["wanted"]))  # (len(rows), D)
        vectors.append((share[:, None] * fused).sum(0).cpu() / len(outfit["images"]))
    vectors = torch.stack(vectors)
    check_finite(vectors, outfits)
    return vectors


def evaluate_polyvore(embedder, config):
    """OCIR on Polyvore Outfits test, split `config.split`.

    The blank is the item that a row takes out of its outfit. It is to be found. A row that is marked as fake is no
    query: it only adds its blank to the gallery."""
    rows, n_categories = annotations.load_polyvore(config.data_root, config.split, "test")
    if n_categories != embedder.model.n_categories:
        expected = f"the {embedder.model.n_categories} of the checkpoint's CSA-Net"
        raise InputError(f"{config.data_root}: found {n_categories} categories, expected {expected}")
    photos_of = [[path for path, _ in [*row["items"], row["blank_item"]]] for row in rows]
    broken = photos.leave_out([path for paths in photos_of for path in paths], config, f"Polyvore {config.split} test")

    # The gallery has every blank once, also the blanks of rows that are no queries. A blank's id is its place.
    blanks = {row["blank"]: row["blank_item"] for row in rows}
    kept = [(name, path, category) for name, (path, category) in blanks.items() if path not in broken]
    gallery = [{"image": path, "name": name, "category": c, "id": i} for i, (name, path, c) in enumerate(kept)]
    place = {item["name"]: item["id"] for item in gallery}

    # A row is a query where all its photos are there and it is not marked as fake.
    complete = [row for row, paths in zip(rows, photos_of, strict=True) if broken.isdisjoint(paths)]
    outfits = [
        {
            "images": [path for path, _ in row["items"]],
            "categories": [[category] for _, category in row["items"]],
            "wanted": row["blank_item"][1],
            "id": place[row["blank"]],
            "name": row["name"],
            "text": "what goes with these?",
        }
        for row in complete
        if not row["fake"]
    ]

    queries, items = embed_outfits(embedder, outfits), embedder.embed(gallery)
    gallery_id, category = column(gallery, "id"), column(gallery, "category")
    result = outfit_retrieval(queries, column(outfits, "id"), items, gallery_id, category)
    result.counts["outfits_left_out"] = len(rows) - len(complete)  # rows marked as fake included
    result.counts["gallery_left_out"] = len(blanks) - len(gallery)
    result.rankings.append(Ranking(outfits, gallery, dot_products(queries, items)))
    yield f"{config.split}, same category", result


@dataclass
class Task:
    """All that differs between the tasks, in training and in evaluation."""

    evaluate: Callable  # (embedder, config) -> (protocol, Result) pairs
    objective: Callable  # the loss, one of losses.py
    load_items: Callable  # (config) -> (training items, sizes, labels), one of data.py
    pick: Callable | None = None  # what a visit in training takes of an item; None: all of it
    model: type = FashionViL  # or CSANet, which reads no text
    needs: tuple = ("contrastive",)  # its heads; ("csa_net",) for a CSANet
    criterion: str = "mean_recall"  # the metric that selects the best checkpoint
    fit: Callable = data.resize_then_crop  # how an image gets the size of the model
    max_tokens: int = data.MAX_TOKENS  # the longest text, where the settings have 0


FIT_WHOLE = data.crop_then_resize  # training takes a random part of the image, evaluation all of it
RECOGNITION = Task(
    evaluate_recognition,
    losses.recognition,
    data.fashiongen_items,
    data.pick_image,
    FashionViL,
    ("recognition",),
    criterion="accuracy",
)
TASKS = {
    "fashiongen_retrieval": Task(evaluate_retrieval, losses.itc, data.fashiongen_items, data.pick_image),
    "fashioniq": Task(
        evaluate_fashioniq, losses.tgir, data.fashioniq_items, fit=FIT_WHOLE, max_tokens=data.FASHIONIQ_MAX_TOKENS
    ),
    "fashiongen_category": RECOGNITION,
    "fashiongen_subcategory": RECOGNITION,
    "polyvore": Task(
        evaluate_polyvore, losses.ocir, data.polyvore_items, data.pick_pair, CSANet, ("csa_net",), fit=FIT_WHOLE
    ),
}


def run_task(model, tokenizer, config, processes):
    """Yield (protocol, Result) of a model in eval mode on `config.task`. tokenizer: None for a CSANet."""
    task = TASKS[config.task]
    yield from task.evaluate(Embedder(model, task, tokenizer, config, processes), config)


def list_items(config):
    """The items whose vectors are all that `config.task` needs of a model. InputError for a task that needs more."""
    if config.task == "fashiongen_retrieval":
        images, texts = product_items(load_val_products(config)[1])
        return images + texts
    if config.task == "fashioniq":
        garments = [load_garment(name, config) for name in annotations.FASHIONIQ_CLASSES]
        return [item for queries, gallery, _ in garments for item in queries + gallery]
    expected = "fashiongen_retrieval or fashioniq for any model's vectors"
    raise InputError(f"task: found {config.task!r}, expected {expected}")


# ---- the command line ------------------------------------------------------------------------------------------------


@dataclass
class EvalConfig:
    """Settings of `python evaluate.py`."""

    task: str = setting("", ", ".join(TASKS), choices=tuple(TASKS), group="task")
    checkpoint: str = setting("", "ours or a released one")
    baseline: str = setting("", "another checkpoint or .npz: adds the difference to it on the same queries")
    list: str = setting("", "file to write, a JSON line for each item that a model must embed; needs no checkpoint")
    embeddings: str = setting("", "an .npz with the vectors of that list by any model, in place of --checkpoint")
    split: str = setting("disjoint", "polyvore: disjoint or nondisjoint", choices=SPLITS)
    gallery: str = setting("original", "fashioniq: original (split file), val (references, targets)", choices=GALLERIES)
    data_root: str = setting("data/datasets", "folder that holds FashionGen/, FashionIQ/, ...", group="data")
    missing: str = setting("stop", MISSING, choices=("stop", "skip"))
    vocab: str = setting("", "vocab.txt or tokenizer.json; empty: the checkpoint's own, else as in training")
    bert: str = setting("", "BERT folder or hub name, for the tokenizer of a released checkpoint")
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


def as_trained(config, trained_config):
    """The config with image_size and max_tokens of `trained_config`, a checkpoint's "config" or {}, where it has 0."""
    image_size, max_tokens = trained_config.get("image_size", 224), trained_config.get("max_tokens", 0)
    return replace(config, image_size=config.image_size or image_size, max_tokens=config.max_tokens or max_tokens)


def evaluate_checkpoint(path, config, processes):
    """{protocol: Result} of one checkpoint, or of an OtherModel's .npz, on `config.task`.

    Raises InputError for a checkpoint of another task, and where its numbers mean something else than the data's."""
    task = TASKS[config.task]
    if str(path).endswith(".npz"):
        return dict(task.evaluate(OtherModel(path, list_items(config)), config))
    model, info = checkpoint.load_model(path, processes.device, task.needs)
    if task is RECOGNITION and info["task"] not in (None, config.task):
        raise InputError(f"{path}: was trained for {info['task']}; set --task={info['task']}, not {config.task}")
    checkpoint.check_labels(path, info["labels"], annotations.label_names(config.data_root, config.task))
    config, tokenizer = as_trained(config, info["config"]), None
    if task.model is FashionViL:
        tokenizer = checkpoint.find_tokenizer(config, info["tokenizer"], model.config.vocab_size)
        data.check_lengths(config, model.config.max_position_embeddings, task.max_tokens)
    return dict(run_task(model, tokenizer, config, processes))


def main():
    config = settings.load_config(EvalConfig, description=__doc__)
    if sum(map(bool, (config.checkpoint, config.embeddings, config.list))) != 1:
        expected = "one of --checkpoint=FILE, --embeddings=FILE.npz and --list=FILE"
        raise InputError(f"checkpoint: expected {expected}; --baseline compares two")
    path = config.checkpoint or config.embeddings
    out = config.out or f"{path}.{config.task}.{'png' if config.show else 'json'}"
    table = str(Path(out).with_suffix(".json")) if config.show else out
    processes = start_processes(config.device)
    if config.list:
        if processes.is_main:
            check_place(config.list, "list")
            write_list(config.list, list_items(config))
        return
    if processes.is_main and (config.out or Path(path).exists()):  # a checkpoint that is missing is named as such below
        check_place(table, "out")
        if config.show:
            pictures.check_page(out)
    started = time.perf_counter()
    results = evaluate_checkpoint(path, config, processes)
    baseline = evaluate_checkpoint(config.baseline, config, processes) if config.baseline else None
    if not processes.is_main:
        return
    seconds = time.perf_counter() - started
    tables.report(results, config, processes.device, path, table, seconds, baseline, config.bootstrap)
    if config.show:
        protocol, result = next(iter(results.items()))
        pictures.draw_rankings(out, f"{config.task}, {protocol}", result.rankings, config.show, config.seed)


if __name__ == "__main__":
    ending.run(main)
