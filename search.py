"""Stage 3: search a folder of images with any checkpoint that ranks.

    python search.py --checkpoint C --gallery DIR --text "red floral midi dress"
    python search.py --checkpoint C --gallery DIR --image photo.jpg                                    # alike
    python search.py --checkpoint C --gallery DIR --image photo.jpg --text "longer sleeves, in blue"   # changed
    python search.py --checkpoint O --gallery DIR --outfit a.jpg b.jpg --category shoes                # goes with them

O is of finetune.py --task=polyvore. DIR is any folder of images; a data set's own folders have titles, too. Scores are
cosines; of an outfit they are means over its items. The images' vectors stay beside DIR, in DIR.index.pt, until
checkpoint or files change."""

import argparse
import hashlib
import json
import mimetypes
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import evaluate
from plumbing import annotations, checkpoint, ending, photos, pictures, settings
from plumbing.files import replacing
from plumbing.processes import start_processes
from plumbing.settings import COUNT, DEVICES, FROM_0, MISSING, InputError, setting

# Pillow opens more, such as .eps and .h5, but those are no photos.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".jpe", ".avif", ".mpo")
IMAGE_SUFFIXES += (".tga", ".jp2", ".psd", ".ico", ".ppm", ".pjpeg", ".jpg_large")
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
    vocab: str = setting("", "vocab.txt of a released checkpoint")
    data_root: str = setting("", "folder that holds PolyvoreOutfits/; empty: the checkpoint's own")
    workers: int = setting(2, "processes that read images", FROM_0, group="machine")
    device: str = setting("auto", "auto, cpu or cuda", choices=DEVICES)


def list_images(folder):
    """{path below `folder`: [bytes, time of change in ns]} of its images, at any depth, sorted; InputError if none."""
    files, seen, others = {}, set(), []
    for base, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(base) in seen:  # a link to a folder that was seen before
            folders.clear()
            continue
        seen.add(os.path.realpath(base))
        for path in (Path(base, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() in IMAGE_SUFFIXES and path.exists():
                files[str(path.relative_to(folder))] = [path.stat().st_size, path.stat().st_mtime_ns]
            elif (mimetypes.guess_type(path)[0] or "image").startswith("image"):  # such as the HEIC of phones
                others.append(str(path))
    if others:
        print(f"gallery: {len(others)} files are left out for their endings, as {min(others)}", file=sys.stderr)
    if not files:
        raise InputError(f"gallery: no images in {str(folder)!r}, expected .jpg, .png, .webp or others")
    return dict(sorted(files.items()))


def open_index(path, folder, fingerprint, embed, missing="stop"):
    """(unit vectors (N, D) float32, mapped from the file `path`; the names of their images in `folder`).

    `embed(items)` (N, D) makes them where that file is not there, damaged, or made from other images or with another
    `fingerprint`. missing: as in SearchConfig. Raises InputError where they cannot be written, before the work."""
    files = list_images(folder)
    try:
        index = torch.load(path, mmap=True, weights_only=True)
        if (index["fingerprint"], index["files"]) == (fingerprint, files):
            return index["vectors"].numpy(), index["names"]
        why = "stale"
    except Exception:  # torch.load raises nearly anything on a damaged file
        why = "damaged" if Path(path).exists() else "not there yet"
    place = Path(path).parent
    if not place.is_dir() or not os.access(place, os.W_OK) or Path(path).is_dir():
        raise InputError(f"{path}: cannot be written there; set --index=FILE to where it can")
    names = [name for name in files if missing == "stop" or photos.is_readable(f"{folder}/{name}")]
    if not names:
        raise InputError(f"{folder}: none of {len(files)} images can be read")
    numbers = f"embedding {len(names)} images; {len(files) - len(names)} cannot be read and are left out"
    print(f"index {path}: {why}; {numbers}", file=sys.stderr)
    vectors = F.normalize(embed([{"image": f"{folder}/{name}", "name": f"{folder}/{name}"} for name in names]), dim=-1)
    with replacing(path) as file:
        torch.save({"fingerprint": fingerprint, "files": files, "names": names, "vectors": vectors}, file)
    return vectors.numpy(), names


class PolyvoreCategories:
    """The fine categories of a PolyvoreOutfits folder, numbered as in training; `n`: how many the checkpoint knows."""

    def __init__(self, folder, n):
        self.folder = Path(folder).resolve()
        self.metadata, self.number = annotations.load_polyvore_items(folder)
        if len(self.number) != n:
            found = f"{len(self.number)} categories, but the checkpoint's CSA-Net has {n}"
            raise InputError(f"{folder}: {found}; expected the folder of its training")

    def numbers(self, name):
        """The sorted numbers of a category's name or id. Polyvore's coarse names have several.

        "shoe" and "Shoes" are one name. Raises InputError, with all names, for a name that no item has."""
        found, known = set(), set()
        for row in self.metadata.values():
            names = {row["category_id"], str(row.get("semantic_category", row["category_id"]))}
            known |= names
            if name.lower().removesuffix("s") in {alike.lower().removesuffix("s") for alike in names}:
                found.add(self.number[int(row["category_id"])])
        if not found:
            shown = sorted(n for n in known if not n.isdigit()) or sorted(known, key=int)
            raise InputError(f"category: found {name!r}, expected one of {', '.join(shown)}, or an id of {self.folder}")
        return sorted(found)

    def of_image(self, path):
        """The number of the item whose photo a file of images/ is; -1 for other files."""
        folder, name = os.path.split(os.path.realpath(path))
        item = self.metadata.get(os.path.splitext(name)[0]) if folder == f"{self.folder}/images" else None
        return self.number[int(item["category_id"])] if item else -1


def match_probability(model, batch):
    """(B,) the ITM head's probability that text and image of a row belong together."""
    pooled = model.encode_pair(batch["input_ids"], batch["attention_mask"], batch["image"])
    return model.heads["itm"](pooled).float().softmax(-1)[:, 1]


def check_query(config):
    """Raise InputError for a query that is none, and for settings that do not go together."""
    settings.check_limits(config)
    if not config.checkpoint or not config.gallery:
        raise InputError("search: expected --checkpoint=FILE and --gallery=FOLDER")
    outfit = bool(config.outfit)
    if outfit == bool(config.text or config.image) or outfit != bool(config.category):
        raise InputError("query: expected --text, --image, both of them, or --outfit FILES --category NAME")
    if config.rerank and (config.image or outfit):
        raise InputError("rerank: the ITM head compares a text with an image, expected --text alone")
    if config.out:
        pictures.check_page(config.out)


@torch.no_grad()
def search(config):
    """The best images for the query of a SearchConfig, best first, without the query's own files.

    [{"rank", "score", "itm" if config.rerank, "id", "title", "path"}]. Raises InputError for whatever is wrong."""
    check_query(config)
    folder, processes = Path(config.gallery).resolve(), start_processes(config.device)
    # The query says what the checkpoint must have.
    needs = ("csa_net",) if config.outfit else ("contrastive", "itm") if config.rerank else ("contrastive",)
    model, info = checkpoint.load_model(config.checkpoint, processes.device, needs)
    for path in (config.image, *config.outfit):
        if path and not os.path.isfile(path):
            raise InputError(f"{path}: no such image; expected the name of a file in --image or --outfit")
    data_root = config.data_root or info["config"].get("data_root", "data/datasets")
    own = evaluate.EvalConfig(data_root=data_root, vocab=config.vocab, workers=config.workers)
    own = evaluate.as_trained(own, info["config"])
    tokenizer = evaluate.read_tokenizer(config.checkpoint, model, own, info["vocab"]) if config.text else None
    whole = bool(config.outfit) or info["task"] == "fashioniq"  # as in training
    how = {"tokenizer": tokenizer, "config": own, "processes": processes, "whole": whole}

    # A query is one vector; an outfit has one for each category that the wanted name stands for.
    query = {key: value for key, value in (("text", config.text), ("image", config.image)) if value}
    if config.outfit:
        places = [folder, folder.parent, Path(data_root, "PolyvoreOutfits")]
        place = next((place for place in places if (place / annotations.POLYVORE_ITEMS).exists()), places[-1])
        categories = PolyvoreCategories(place, model.n_categories)
        ours = {"Polyvore categories": [str(category) for category in categories.number]}
        checkpoint.check_labels(config.checkpoint, info["labels"], ours)
        wanted, items = categories.numbers(config.category), []
        for path, name in config.outfit.items():
            numbers = categories.numbers(name) if name else [categories.of_image(path)]
            if numbers[0] < 0:
                found = f"not in {categories.folder}/images, so say what it is: {path}=CATEGORY"
                raise InputError(f"outfit: {path}: {found}")
            items.append((path, numbers))
        outfits = [{"items": items, "blank_item": ("", number), "name": "outfit"} for number in wanted]
        queries = evaluate.embed_outfits(model, outfits, **how) / model.logit_scale.cpu()
    else:
        queries = F.normalize(evaluate.embed_scaled(model, [{**query, "name": "query"}], **how), dim=-1)

    # The vectors of the gallery come from its index. They are made anew where it is missing or stale.
    digest = hashlib.sha256(np.memmap(config.checkpoint, mode="r")).hexdigest()
    path, fingerprint = config.index or f"{folder}.index.pt", f"{digest} {whole} {own.image_size}"
    embed_gallery = partial(evaluate.embed_scaled, model, progress=True, **how)
    vectors, names = open_index(path, folder, fingerprint, embed_gallery, config.missing)
    scores = vectors @ queries.numpy().T  # (N, W) for W wanted categories; without an outfit W is 1
    paths = [f"{folder}/{name}" for name in names]
    if config.outfit:  # an image answers the query for its own category, or all if its category is unknown
        category = np.array([categories.of_image(path) for path in paths])[:, None]  # (N, 1)
        scores = np.where((category == wanted) | (category < 0), scores, -np.inf)
    scores = scores.max(1)  # (N,)
    own_images = {os.path.realpath(path) for path in (*config.outfit, config.image) if path}
    scores[[path in own_images for path in paths]] = -np.inf

    # The best come first, equal ones in the order of the gallery; -inf is no result, and stands last.
    order, itm = np.argsort(-scores, kind="stable")[: np.isfinite(scores).sum()].tolist(), {}
    if config.rerank:  # the ITM head orders the best ones again
        first = order[:RERANKED]
        pairs = [{**query, "image": paths[i]} for i in first]
        found = evaluate.embed(partial(match_probability, model), pairs, **how).tolist()
        itm = {i: {"itm": value} for i, value in zip(first, found, strict=True)}
        order = sorted(first, key=lambda i: -itm[i]["itm"]) + order[RERANKED:]

    # Results of a data set's own folder have their ids and titles, others the names of their files.
    titles, rows = annotations.load_titles(folder), []
    for rank, i in enumerate(order[: config.top], 1):
        name, title = titles.get(paths[i], (os.path.splitext(names[i])[0], ""))
        row = {"rank": rank, "score": float(scores[i]), **itm.get(i, {}), "id": name, "title": title}
        rows.append({**row, "path": str(Path(config.gallery, names[i]))})
    return rows


def read_config(argv=None):
    """The command line -> SearchConfig. Raises InputError. `--help` exits."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--outfit", nargs="*", default=())  # the only setting of several words
    given, others = parser.parse_known_args(argv)
    config = settings.load_config(SearchConfig, others, description=__doc__)
    for word in given.outfit:  # FILE or FILE=CATEGORY; the name of a file may hold a "=", too
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
    # The name of a file can hold whatever moves the cursor of a terminal.
    lines = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines]
    print(json.dumps(rows, indent=1) if config.json else "\n".join(lines))
    if config.out:
        text = f"wanted: {config.category}" if config.outfit else config.text
        query = pictures.Cell([path for path in (*config.outfit, config.image) if path], text, "query")
        pictures.draw_page(config.out, f"best {len(rows)} of {config.gallery}", [pictures.Row(query, cells)])


if __name__ == "__main__":
    ending.run(main)
