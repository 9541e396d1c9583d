"""Stage 3: search a folder of images with any checkpoint that ranks.

    python search.py --checkpoint C --gallery DIR --text "red floral midi dress"
    python search.py --checkpoint C --gallery DIR --image photo.jpg                                    # alike
    python search.py --checkpoint C --gallery DIR --image photo.jpg --text "longer sleeves, in blue"   # changed
    python search.py --checkpoint O --gallery DIR --outfit a.jpg b.jpg --category shoes                # goes with them

O is of finetune.py --task=polyvore. DIR is any folder of images; a data set's own folders have titles, too. Scores are
cosines; of an outfit they are means over its items. The images' vectors stay beside DIR, in DIR.index.pt, until
checkpoint or files change."""

import argparse
import contextlib
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import evaluate
from plumbing import annotations, checkpoint, ending, photos, pictures, settings
from plumbing.files import check_place, replacing
from plumbing.processes import start_processes
from plumbing.settings import COUNT, DEVICES, FROM_0, MISSING, InputError, setting

RERANKED = 50  # best results that --rerank scores again


@dataclass
class SearchConfig:
    """Settings of `python search.py`, and what `search` takes."""

    checkpoint: str = setting("", "ours or a released one", group="where to search")
    gallery: str = setting("", "folder of images")
    text: str = setting("", "what to look for, or with --image the change", group="query")
    image: str = setting("", "an image")
    outfit: dict = setting({}, "images of an outfit, FILE or FILE=CATEGORY each; in Python {FILE: CATEGORY or ''}")
    category: str = setting("", "what shall go with the outfit: a name or an id of polyvore_item_metadata.json")
    top: int = setting(10, "number of results", COUNT, group="results")
    rerank: bool = setting(False, f"let the ITM head order a text's best {RERANKED} again")
    json: bool = setting(False, "print JSON")
    out: str = setting("", "page of pictures to draw, a .png")
    index: str = setting("", "file in which the images' vectors are kept; empty: GALLERY.index.pt", group="data")
    missing: str = setting("stop", MISSING, choices=("stop", "skip"))
    vocab: str = setting("", "vocab.txt or tokenizer.json of a released checkpoint")
    data_root: str = setting("", "folder that holds PolyvoreOutfits/; empty: the checkpoint's own")
    workers: int = setting(2, "processes that read images", FROM_0, group="machine")
    device: str = setting("auto", "auto, cpu or cuda", choices=DEVICES)


# ---- the steps of a search -------------------------------------------------------------------------------------------


def check_query(config):
    """Raise InputError for a query that is none, and for settings that do not go together."""
    settings.check_limits(config)
    if not config.checkpoint or not config.gallery:
        raise InputError("search: expected --checkpoint=FILE and --gallery=FOLDER")
    outfit = bool(config.outfit)
    if bool(config.text or config.image) == outfit or bool(config.category) != outfit:
        raise InputError("query: expected --text, --image, both of them, or --outfit FILES --category NAME")
    if config.rerank and (config.image or outfit):
        raise InputError("rerank: the ITM head compares a text with an image, expected --text alone")
    for path in query_images(config):
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such image; expected the name of a file in --image or --outfit")
    if config.out:
        pictures.check_page(config.out)


def query_images(config):
    """The paths of the query's own images."""
    return [path for path in (*config.outfit, config.image) if path]


def load_embedder(config):
    """(evaluate.Embedder of the checkpoint, its info, as `checkpoint.load_model` gives it)."""
    processes = start_processes(config.device)
    needs = ("csa_net",) if config.outfit else ("contrastive", "itm") if config.rerank else ("contrastive",)
    model, info = checkpoint.load_model(config.checkpoint, processes.device, needs)
    data_root = config.data_root or info["config"].get("data_root", "data/datasets")
    own = evaluate.EvalConfig(data_root=data_root, vocab=config.vocab, workers=config.workers)
    own = evaluate.as_trained(own, info["config"])
    tokenizer = None
    if config.text:
        tokenizer = checkpoint.find_tokenizer(own, info["tokenizer"], model.config.vocab_size)
    # Images are fitted as in training. In pre-training this is as for retrieval.
    name = "polyvore" if config.outfit else info["task"]
    task = evaluate.TASKS.get(name, evaluate.TASKS["fashiongen_retrieval"])
    return evaluate.Embedder(model, task, tokenizer, own, processes), info


def find_categories(config, embedder, info):
    """The `PolyvoreCategories` beside the gallery, or else of data_root. InputError where training had others."""
    folders = [place.parent for place in annotations.absolute_paths(config.gallery)]
    folders = [folder for folder in folders if (folder / annotations.POLYVORE_ITEMS).exists()]
    folder = folders[0] if folders else Path(embedder.config.data_root, "PolyvoreOutfits")
    categories = annotations.PolyvoreCategories(folder, embedder.model.n_categories)
    ours = {"Polyvore categories": [str(category) for category in categories.number]}
    checkpoint.check_labels(config.checkpoint, info["labels"], ours)
    return categories


def embed_outfit(config, embedder, categories, wanted):
    """The outfit's vector for each of the category numbers `wanted`: (W, D) float32.

    It is the mean of its items' unit vectors, and not normalised again."""
    numbers_of = []
    for path, name in config.outfit.items():
        numbers = categories.numbers(name) if name else [categories.of_image(path)]
        if numbers[0] < 0:
            found = f"not in {categories.folder}/images, so say what it is: {path}=CATEGORY"
            raise InputError(f"outfit: {path}: {found}")
        numbers_of.append(numbers)
    outfit = {"images": [*config.outfit], "categories": numbers_of, "name": "outfit"}
    scaled = evaluate.embed_outfits(embedder, [{**outfit, "wanted": number} for number in wanted])
    return scaled / embedder.model.logit_scale.cpu()


def embed_gallery(config, embedder):
    """(unit vectors (N, D) float32, the names of their images in the gallery), from the index file.

    It is made anew where it is not there, damaged, or of another checkpoint or other images. Raises InputError where it
    cannot be written, before the work."""
    folder = os.path.abspath(config.gallery)
    path, files = Path(config.index or f"{folder}.index.pt"), photos.list_gallery(folder)
    digest = hashlib.sha256(np.memmap(config.checkpoint, mode="r")).hexdigest()
    fingerprint = f"{digest} {embedder.task.fit.__name__} {embedder.config.image_size}"
    with contextlib.suppress(Exception):  # torch.load raises nearly anything on a damaged file
        index = torch.load(path, mmap=True, weights_only=True)
        if (index["fingerprint"], index["files"]) == (fingerprint, files):
            return index["vectors"].numpy(), index["names"]
    check_place(path, "index")
    names = [name for name in files if config.missing == "stop" or photos.is_readable(f"{folder}/{name}")]
    left_out = f"{len(files) - len(names)} cannot be read and are left out"
    print(f"index {path}: embedding {len(names)} images; {left_out}", file=sys.stderr)
    items = [{"image": f"{folder}/{name}", "name": f"{folder}/{name}"} for name in names]
    vectors = F.normalize(embedder.embed(items, progress=True), dim=-1)
    with replacing(path) as file:
        torch.save({"fingerprint": fingerprint, "files": files, "names": names, "vectors": vectors}, file)
    return vectors.numpy(), names


def rerank(text, paths, order, embedder):
    """Let the ITM head order the first RERANKED of `order` again, which are numbers of paths, best first.

    Returns the new order, and {number: the head's probability} of those that it has seen."""
    model, first = embedder.model, order[:RERANKED]

    def match_probability(batch):  # (B,), that text and image of a row belong together
        pooled = model.encode_pair(batch["input_ids"], batch["attention_mask"], batch["image"])
        return model.heads["itm"](pooled).float().softmax(-1)[:, 1]

    found = embedder.embed([{"text": text, "image": paths[i]} for i in first], encode=match_probability)
    itm = dict(zip(first, found.tolist(), strict=True))
    return sorted(first, key=lambda i: -itm[i]) + order[RERANKED:], itm


@torch.no_grad()
def search(config):
    """The best images for the query of a SearchConfig, best first, without the query's own files.

    [{"rank", "score", "itm" if config.rerank, "id", "title", "path"}]. Raises InputError for whatever is wrong."""
    check_query(config)
    embedder, info = load_embedder(config)

    # A query is one vector; an outfit has one for each category that the wanted name stands for.
    if config.outfit:
        categories = find_categories(config, embedder, info)
        wanted = categories.numbers(config.category)
        queries = embed_outfit(config, embedder, categories, wanted)
    else:
        given = {key: value for key, value in (("text", config.text), ("image", config.image)) if value}
        queries = F.normalize(embedder.embed([{**given, "name": "query"}]), dim=-1)

    vectors, names = embed_gallery(config, embedder)
    paths = [str(Path(config.gallery, name)) for name in names]
    scores = vectors @ queries.numpy().T  # (N, W) for W wanted categories; without an outfit W is 1
    if config.outfit:
        # A photo with a Polyvore category competes only for that one. A photo of no known category competes for every
        # wanted one, unless the gallery is Polyvore's own folder.
        category = np.array([categories.of_image(path) for path in paths])[:, None]  # (N, 1)
        answers_all = (category < 0) & (os.path.realpath(config.gallery) != categories.images)
        scores = np.where((category == wanted) | answers_all, scores, -np.inf)
    scores = scores.max(1)  # (N,)
    query_files = [os.stat(path) for path in query_images(config)]
    is_query = [any(os.path.samestat(file, os.stat(path)) for file in query_files) for path in paths]
    scores[np.array(is_query)] = -np.inf

    # The best come first, equal ones in the order of the gallery. An image with -inf is no result; those stand last.
    order, itm = np.argsort(-scores, kind="stable")[: np.isfinite(scores).sum()].tolist(), {}
    if config.rerank:
        order, itm = rerank(config.text, paths, order, embedder)

    # Results of a data set's own folder have their ids and titles, others the names of their files.
    titles, rows = annotations.load_titles(config.gallery), []
    for rank, i in enumerate(order[: config.top], 1):
        name, title = titles.get(names[i], (os.path.splitext(names[i])[0], ""))
        row = {"rank": rank, "score": float(scores[i])} | ({"itm": itm[i]} if i in itm else {})
        rows.append({**row, "id": name, "title": title, "path": paths[i]})
    return rows


def read_config(argv=None):
    """The command line -> SearchConfig. Raises InputError. `--help` exits."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--outfit", nargs="*", default=())  # the only setting of several words
    given, others = parser.parse_known_args(argv)
    config = settings.load_config(SearchConfig, others, description=__doc__)
    for word in map(os.path.expanduser, given.outfit):  # FILE or FILE=CATEGORY; the name of a file may hold a "=", too
        path, _, category = word.rpartition("=")
        config.outfit |= {word: ""} if Path(word).exists() or not path else {path: category}
    return config


def main(argv=None):
    config = read_config(argv)
    rows = search(config)
    lines, cells = [], []
    for r in rows:
        itm = f"  itm {r['itm']:.2f}" if "itm" in r else ""
        lines.append(f"{r['rank']:3}  {r['score']:6.3f}{itm}  {r['id']:12}  {r['title'][:50]:50}  {r['path']}")
        cells.append(pictures.Cell([r["path"]], r["title"] or r["id"], f"{r['rank']}  {r['score']:.2f}{itm}"))
    print(json.dumps(rows, indent=1) if config.json else "\n".join(lines))
    if config.out:
        text = f"wanted: {config.category}" if config.outfit else config.text
        query = pictures.Cell(query_images(config), text, "query")
        pictures.draw_page(config.out, f"best {len(rows)} of {config.gallery}", [pictures.Row(query, cells)])


if __name__ == "__main__":
    ending.run(main)
