"""Stage 3: search a folder of images with any checkpoint that ranks.

    python search.py --checkpoint C --gallery DIR --text "red floral midi dress"
    python search.py --checkpoint C --gallery DIR --image photo.jpg                                    # alike
    python search.py --checkpoint C --gallery DIR --image photo.jpg --text "longer sleeves, in blue"   # changed
    python search.py --checkpoint O --gallery DIR --outfit a.jpg b.jpg --category shoes                # goes with them

O is of finetune.py --task=polyvore. DIR is any folder of images; a data set's own folders have titles, too. Scores are
cosines. The images' vectors stay beside DIR (DIR.index.npy, .json) until checkpoint or files change."""

import argparse
import dataclasses
import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import annotations
import checkpoint
import common
import data
import evaluate
import pictures
from settings import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".jpe", ".avif")
RERANKED = 50  # best results that --rerank scores again


def list_images(folder):
    """{path below `folder`: [bytes, time of change in ns]} of its images, at any depth, sorted; InputError if none."""
    if not Path(folder).is_dir():
        raise InputError(f"gallery: found {str(folder)!r}, expected a folder of images")
    paths, seen = [], set()
    for base, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(base) in seen:  # a link to a folder that was seen before
            folders.clear()
            continue
        seen.add(os.path.realpath(base))
        paths += [Path(base, name) for name in names if not name.startswith(".")]
    paths = sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and path.exists())
    if not paths:
        raise InputError(f"gallery: {folder}: no images in it, expected files that end in {' '.join(IMAGE_SUFFIXES)}")
    return {str(p.relative_to(folder)): [p.stat().st_size, p.stat().st_mtime_ns] for p in paths}


def opens(path):
    """Whether a file can be read as an image; stderr says why it cannot."""
    try:
        data.open_image(path)
        return True
    except InputError as error:
        print(f"left out: {error}", file=sys.stderr)
        return False


def open_index(path, folder, fingerprint, embed, missing="stop"):
    """(unit vectors (N, D) float32, mapped from `path`.npy; the names of their images in `folder`).

    `embed(items)` (N, D) makes them where they are missing or stale. `path`.json says what they were made from; it does
    not exist while they change, so that the two agree. Raises InputError before the work if they cannot be written."""
    vectors, note, files = Path(f"{path}.npy"), Path(f"{path}.json"), list_images(folder)
    try:
        old, found = json.loads(note.read_text()), np.load(vectors, mmap_mode="r")
        if (old["fingerprint"], old["files"], len(old["ids"])) == (fingerprint, files, len(found)):
            return found, old["ids"]
        why = f"stale ({'files added, removed or changed' if old['fingerprint'] == fingerprint else 'new checkpoint'})"
    except (OSError, ValueError, KeyError, TypeError):
        why = "not there yet" if not note.exists() else "damaged"
    print(f"index {vectors}: {why}; embedding {len(files)} images", file=sys.stderr)
    aside = Path(f"{vectors}.tmp")
    try:
        with open(aside, "wb") as file:
            ids = [name for name in files if missing == "stop" or opens(f"{folder}/{name}")]
            if not ids:
                raise InputError(f"{folder}: none of {len(files)} images can be read")
            rows = embed(evaluate.image_items(f"{folder}/{name}" for name in ids))
            np.save(file, F.normalize(rows, dim=-1).numpy())
        note.unlink(missing_ok=True)
        aside.replace(vectors)
        common.write_json(note, {"fingerprint": fingerprint, "ids": ids, "files": files})
    except OSError as error:
        raise InputError(f"{vectors}: cannot be written ({error.strerror}); set --index=PATH to where it can") from None
    finally:
        if aside.exists():
            aside.unlink()
    return np.load(vectors, mmap_mode="r"), ids


class PolyvoreCategories:
    """The fine categories of a PolyvoreOutfits folder, by name and of an image, numbered as in training.

    Raises InputError where there are other than `n`, the number that the checkpoint knows."""

    def __init__(self, folder, n):
        self.folder = Path(folder).resolve()
        self.metadata, self.number = annotations.load_polyvore_items(folder)
        if len(self.number) != n:
            found = f"{len(self.number)} categories, but the checkpoint's CSA-Net has {n}"
            raise InputError(f"{folder}: {found}; expected the folder of its training")

    def numbers(self, name):
        """The sorted numbers that a name or id stands for. "shoe" and "shoes" are one name.

        Polyvore's coarse names stand for several. Raises InputError, with all names, for a name that no item has."""
        known = {}  # name: its numbers
        for row in self.metadata.values():
            for alike in (row["category_id"], str(row.get("semantic_category", row["category_id"]))):
                known.setdefault(alike, set()).add(self.number[int(row["category_id"])])
        singular = name.lower().removesuffix("s")
        found = [numbers for alike, numbers in known.items() if alike.lower().removesuffix("s") == singular]
        if not found:
            shown = sorted(n for n in known if not n.isdigit()) or sorted(known, key=int)
            raise InputError(f"category: found {name!r}, expected one of {', '.join(shown)}, or an id of {self.folder}")
        return sorted(set().union(*found))

    def of_image(self, path):
        """The number of the item that an image, a path as os.path.realpath gives it, shows; -1: not in images/."""
        folder, name = os.path.split(path)
        item = self.metadata.get(os.path.splitext(name)[0]) if folder == f"{self.folder}/images" else None
        return self.number[int(item["category_id"])] if item else -1


def fuse_outfit(model, features, outfit, wanted, categories):
    """(W, D) queries, one for each wanted category (W numbers): the mean of the fused unit vectors of the outfit.

    features (n, D): `encode_item` of the n images of `outfit`, {path: name of its category, or ""}. An image whose name
    stands for several categories counts as their mean. Source: docs/recipe.md "Outfit completion"."""
    queries = []
    for feature, (path, name) in zip(features, outfit.items(), strict=True):
        own = categories.numbers(name) if name else [categories.of_image(os.path.realpath(path))]
        if own[0] < 0:
            raise InputError(f"outfit: {path}: not in {categories.folder}/images, so say what it is: {path}=CATEGORY")
        pairs = torch.cartesian_prod(torch.tensor(wanted), torch.tensor(own)).to(features.device)  # (W x own, 2)
        fused = model.fuse(feature.expand(len(pairs), -1), pairs[:, 1], pairs[:, 0]) / model.logit_scale
        queries.append(fused.view(len(wanted), len(own), -1).mean(1))  # (W, D)
    return torch.stack(queries).mean(0)


def match(model, batch):
    """(B,) the ITM head's probability that text and image of a row belong together."""
    pooled = model.encode_pair(batch["input_ids"], batch["attention_mask"], batch["image"])
    return model.heads["itm"](pooled).float().softmax(-1)[:, 1]


def best(scores, top):
    """The `top` best of scores (N,) -> their indices, best first, equal ones in gallery order; -inf is no result."""
    order = np.argsort(-scores, kind="stable")[:top]
    return order[np.isfinite(scores[order])].tolist()


@torch.no_grad()
def search(given):
    """`given` of `parse` -> [{"rank", "score", "itm" if --rerank, "id", "title", "path"}], best first.

    The query's own files are no results. Raises InputError for whatever is wrong with `given`."""
    folder, processes = Path(given.gallery).resolve(), common.start_processes(given.device)
    # The kind of query says what the checkpoint must have.
    needs = ("csa_net",) if given.outfit else ("contrastive", "itm") if given.rerank else ("contrastive",)
    model, info = checkpoint.load_model(given.checkpoint, processes.device, needs)
    trained = info["config"] or {}  # a released checkpoint has none
    config = evaluate.EvalConfig(vocab=given.vocab, workers=0)
    config.data_root = given.data_root or trained.get("data_root", "data/datasets")
    config.image_size, config.max_tokens = trained.get("image_size", 224), trained.get("max_tokens", 0)
    tokenizer = evaluate.read_tokenizer(given.checkpoint, model, config) if given.text else None
    # FashionIQ and Polyvore have images and texts of their own kind: docs/recipe.md "Images" and "Texts".
    cut, transform, longest = "crop", evaluate.CROP, data.MAX_TOKENS
    if given.outfit or info["task"] == "fashioniq":
        cut, transform, longest = "scale", evaluate.SCALE, data.FASHIONIQ_MAX_TOKENS

    def embed(encode, items, config=config, progress=False):
        return evaluate.embed(encode, items, tokenizer, config, processes, transform, longest, progress)

    # A query is one vector; an outfit has one for each category that the wanted name stands for.
    embed_batch = partial(evaluate.embed_batch, model)
    query = {key: value for key, value in (("text", given.text), ("image", given.image)) if value}
    if given.outfit:
        places = [place for place in (folder, folder.parent) if (place / annotations.POLYVORE_ITEMS).exists()]
        places.append(Path(config.data_root, "PolyvoreOutfits"))
        categories = PolyvoreCategories(places[0], model.n_categories)
        ours = {"Polyvore categories": [str(category) for category in categories.number]}
        checkpoint.check_labels(given.checkpoint, info["labels"], ours)
        features = embed(lambda batch: model.encode_item(batch["image"]), evaluate.image_items(given.images))
        wanted = categories.numbers(given.category)
        queries = fuse_outfit(model, features.to(processes.device), given.outfit, wanted, categories).cpu().numpy()
    else:
        queries = F.normalize(embed(embed_batch, [{**query, "name": "query"}]), dim=-1).numpy()
    # The vectors of the gallery come from its index. They are made anew where it is missing or stale.
    digest = hashlib.sha256(np.memmap(given.checkpoint, mode="r")).hexdigest()
    fingerprint, place = f"{digest} {cut} {config.image_size}", given.index.removesuffix(".npy") or f"{folder}.index"
    config = dataclasses.replace(config, workers=given.workers)
    embed_gallery = partial(embed, embed_batch, config=config, progress=True)
    vectors, ids = open_index(place, folder, fingerprint, embed_gallery, given.missing)
    scores = vectors @ queries.T  # (N, W)
    if given.outfit:  # an image answers the query for its own category, or all if its category is unknown
        category = np.array([categories.of_image(f"{folder}/{name}") for name in ids])[:, None]  # (N, 1)
        scores = np.where((category == wanted) | (category < 0), scores, -np.inf)
    scores, own_images = scores.max(1), {os.path.realpath(path) for path in given.images}
    scores[[i for i, name in enumerate(ids) if str(folder / name) in own_images]] = -np.inf
    # The ITM head orders the best results again.
    order, itm = best(scores, max(given.top, RERANKED) if given.rerank else given.top), {}
    if given.rerank:
        first = order[:RERANKED]
        found = embed(partial(match, model), [{**query, "image": f"{folder}/{ids[i]}"} for i in first])
        itm = dict(zip(first, found.tolist(), strict=True))
        order = sorted(first, key=lambda i: -itm[i]) + order[RERANKED:]
    # Results of a data set's own folder have their ids and titles, others the names of their files.
    titles, rows = annotations.load_titles(folder), []
    for rank, i in enumerate(order[: given.top], 1):
        name, title = titles.get(str(folder / ids[i]), (str(Path(ids[i]).with_suffix("")), ""))
        more = {"itm": itm[i]} if i in itm else {}
        path = str(Path(given.gallery, ids[i]))
        rows.append({"rank": rank, "score": float(scores[i]), **more, "id": name, "title": title, "path": path})
    return rows


def parse_outfit(words):
    """FILE or FILE=CATEGORY, where a file's own name may hold a "=" -> {path: name of its category, or ""}."""
    outfit = {}
    for word in words:
        path, _, name = word.rpartition("=")
        outfit |= {word: ""} if Path(word).exists() or not path else {path: name}
    return outfit


def parse(argv=None):
    """The command line -> Namespace; `outfit` as of `parse_outfit`, `images`: the query's files. Raises InputError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def stop(message):
        raise InputError(message)

    parser.error = stop
    parser.add_argument("--checkpoint", required=True, help="ours or a released one")
    parser.add_argument("--gallery", required=True, help="folder of images")
    parser.add_argument("--outfit", nargs="+", default=[], metavar="FILE[=CATEGORY]", help="images of an outfit")
    for name, default, meaning in (
        ("text", "", "what to look for, or with --image the change"),
        ("image", "", "an image"),
        ("category", "", "what shall go with the outfit: a name or an id of polyvore_item_metadata.json"),
        ("top", 10, "number of results"),
        ("rerank", False, f"let the ITM head order a text's best {RERANKED} again"),
        ("json", False, "print JSON"),
        ("out", "", "page of pictures to draw, a .png"),
        ("index", "", "where the vectors are kept; empty: GALLERY.index"),
        ("missing", "stop", data.MISSING),
        ("vocab", "", "vocab.txt of a released checkpoint"),
        ("data_root", "", "holds PolyvoreOutfits/; empty: the checkpoint's own"),
        ("workers", 2, "processes that read images"),
        ("device", "auto", "auto, cpu or cuda"),
    ):
        kind = {"action": "store_true"} if default is False else {"type": type(default), "default": default}
        parser.add_argument(f"--{name}", help=f"{meaning} [{default!r}]", **kind)
    same = {"action": "store_const", "const": "skip", "dest": "missing", "default": "stop"}
    parser.add_argument("--skip_broken_images", help="the same as --missing=skip", **same)
    given = parser.parse_args(argv)
    if bool(given.outfit) == bool(given.text or given.image) or bool(given.outfit) != bool(given.category):
        raise InputError("query: expected --text, --image, both of them, or --outfit FILES --category NAME")
    if given.rerank and (given.image or given.outfit):
        raise InputError("rerank: the ITM head compares a text with an image, expected --text alone")
    if given.missing not in ("stop", "skip"):
        raise InputError(f"missing: found {given.missing!r}, expected stop or skip")
    if given.top < 1:
        raise InputError(f"top: found {given.top}, expected at least 1")
    if given.out:
        pictures.check_page(given.out)
    given.outfit = parse_outfit(given.outfit)
    given.images = [path for path in (*given.outfit, given.image) if path]
    return given


def main(argv=None):
    given = parse(argv)
    rows = search(given)
    lines, cells = [], []
    for r in rows:
        itm = f"  match {r['itm']:.2f}" if "itm" in r else ""
        lines.append(f"{r['rank']:3}  {r['score']:6.3f}{itm}  {r['id']:12}  {r['title'][:50]:50}  {r['path']}")
        cells.append(pictures.Cell([r["path"]], r["title"] or r["id"], f"{r['rank']}  {r['score']:.2f}{itm}"))
    print(json.dumps(rows, indent=1) if given.json else "\n".join(lines))
    if given.out:
        query = pictures.Cell(given.images, f"wanted: {given.category}" if given.outfit else given.text, "query")
        pictures.draw_page(given.out, f"best {len(rows)} of {given.gallery}", [pictures.Row(query, cells)])


if __name__ == "__main__":
    common.run(main)
