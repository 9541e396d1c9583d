"""Stage 3: search a folder of images with any checkpoint that ranks.

    python search.py --checkpoint C --gallery DIR --text "red floral midi dress"
    python search.py --checkpoint C --gallery DIR --image photo.jpg                                    # alike
    python search.py --checkpoint C --gallery DIR --image photo.jpg --text "longer sleeves, in blue"   # changed
    python search.py --checkpoint O --gallery DIR --outfit a.jpg b.jpg --category shoes                # goes with them

O is of finetune.py --task=polyvore. DIR is any folder of images; a data set's own folders have titles, too. Scores are
cosines. The images' vectors stay beside DIR (DIR.index.npy, .json) until checkpoint or files change."""

import argparse
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
from annotations import load_polyvore_items
from data import open_image
from settings import InputError

RERANKED = 50  # best results that --rerank scores again


def open_index(path, folder, fingerprint, embed, skip_broken=False):
    """(unit vectors (N, D) float32, mapped from `path`.npy; their images' paths below `folder`).

    Made anew by `embed(items)` (N, D) where missing or stale; `path`.json says what of, and is gone while that
    changes, so that the two agree. Raises InputError where they cannot be written, before anything is embedded."""
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
            ids = readable_images(folder, files) if skip_broken else list(files)
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


def best(scores, top):
    """The `top` best of scores (N,) -> their indices, best first, equal ones in gallery order; -inf is no result."""
    order = np.argsort(-scores, kind="stable")[:top]
    return order[np.isfinite(scores[order])].tolist()


def match(model, batch):
    """(B,) the ITM head's probability that text and image of a row belong together."""
    pooled = model.encode_pair(batch["input_ids"], batch["attention_mask"], batch["image"])
    return model.heads["itm"](pooled).float().softmax(-1)[:, 1]


def fuse_outfit(model, items, given, categories):
    """items (n, D), `encode_item` of given.outfit -> (queries (W, D), wanted (W,)): one for each of the W fine
    categories that given.category stands for: the mean of the fused unit vectors, not normalised again (recipe 5)."""
    wanted, queries = categories.numbers(given.category), []
    for item, (path, name) in zip(items, given.outfit, strict=True):
        own = categories.numbers(name) if name else [categories.of_image(os.path.realpath(path))]
        if own[0] < 0:
            raise InputError(f"outfit: {path}: not in {categories.folder}/images, so say what it is: {path}=CATEGORY")
        pairs = torch.cartesian_prod(torch.tensor(wanted), torch.tensor(own)).to(items.device)  # (W x own, 2)
        fused = model.fuse(item.expand(len(pairs), -1), pairs[:, 1], pairs[:, 0]) / model.logit_scale
        queries.append(fused.view(len(wanted), len(own), -1).mean(1))  # (W, D)
    return torch.stack(queries).mean(0).cpu().numpy(), wanted


@torch.no_grad()
def search(given):
    """`given` (of `parse`) -> [{"rank", "score", "itm" if --rerank, "id", "title", "path"}], best first, without the
    query's own files. Raises InputError for whatever is wrong with `given`."""
    processes, folder = common.start_processes(given.device), Path(given.gallery).resolve()
    needs = ("csa_net",) if given.outfit else ("contrastive", "itm") if given.rerank else ("contrastive",)
    model, info = checkpoint.load_model(given.checkpoint, processes.device, needs)
    trained = info["config"] or {}
    given.image_size, given.max_tokens = trained.get("image_size", 224), trained.get("max_tokens", 0)
    given.data_root = given.data_root or trained.get("data_root", "data/datasets")
    tokenizer = evaluate.read_tokenizer(given.checkpoint, model, given) if given.text else None
    as_fashioniq = bool(given.outfit) or info["task"] == "fashioniq"  # recipe 3: how these two cut images and texts
    kind, length = ("scale", data.FASHIONIQ_MAX_TOKENS) if as_fashioniq else ("crop", data.MAX_TOKENS)

    def embed(encoder, items, workers=0, progress=False):
        config = argparse.Namespace(**{**vars(given), "workers": workers})
        return evaluate.embed(partial(encoder, model), items, tokenizer, config, processes, kind, length, progress)

    query = {key: vars(given)[key] for key in ("text", "image") if vars(given)[key]}
    if given.outfit:
        places = (folder, folder.parent, Path(given.data_root, "PolyvoreOutfits"))
        place = next((p for p in places if (p / annotations.POLYVORE_ITEMS).exists()), places[2])
        categories = PolyvoreCategories(place, model.n_categories)
        items = embed(lambda model, batch: model.encode_item(batch["image"]), evaluate.image_items(given.sources))
        queries, wanted = fuse_outfit(model, items.to(processes.device), given, categories)
    else:
        queries = F.normalize(embed(evaluate.embed_batch, [{**query, "name": "query"}]), dim=-1).numpy()

    digest = hashlib.sha256(np.memmap(given.checkpoint, mode="r")).hexdigest()
    fingerprint, place = f"{digest} {kind} {given.image_size}", given.index.removesuffix(".npy") or f"{folder}.index"
    embed_all = partial(embed, evaluate.embed_batch, workers=given.workers, progress=True)
    vectors, ids = open_index(place, folder, fingerprint, embed_all, given.skip_broken_images)
    scores = vectors @ queries.T  # (N, W)
    if given.outfit:  # an image answers the query for its own category; any, where nobody knows that
        category = np.array([categories.of_image(f"{folder}/{name}") for name in ids])[:, None]  # (N, 1)
        scores = np.where((category == wanted) | (category < 0), scores, -np.inf)
    scores, own = scores.max(1), {os.path.realpath(path) for path in given.sources}
    scores[[i for i, name in enumerate(ids) if str(folder / name) in own]] = -np.inf
    order, itm = best(scores, max(given.top, RERANKED * given.rerank)), {}
    if given.rerank:
        first = order[:RERANKED]
        found = embed(match, [{**query, "image": f"{folder}/{ids[i]}"} for i in first])
        itm = dict(zip(first, found.tolist(), strict=True))
        order = [*sorted(first, key=lambda i: -itm[i]), *order[RERANKED:]]
    titles, rows = annotations.load_titles(folder), []
    for rank, i in enumerate(order[: given.top], 1):
        name, title = titles.get(str(folder / ids[i]), (str(Path(ids[i]).with_suffix("")), ""))
        row = {"rank": rank, "score": float(scores[i]), **({"itm": itm[i]} if i in itm else {})}
        rows.append({**row, "id": name, "title": title, "path": str(Path(given.gallery, ids[i]))})
    return rows


def parse(argv=None):
    """The command line -> Namespace, `outfit` as [(path, category or "")]. Raises InputError."""
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
        ("out", "", "contact sheet to draw, a .png"),
        ("index", "", "where the vectors are kept; empty: GALLERY.index"),
        ("skip_broken_images", False, "leave out images that cannot be read"),
        ("vocab", "", "vocab.txt of a released checkpoint"),
        ("data_root", "", "holds PolyvoreOutfits/; empty: the checkpoint's own"),
        ("workers", 2, "processes that read images"),
        ("device", "auto", "auto, cpu or cuda"),
    ):
        kind = {"action": "store_true"} if default is False else {"type": type(default), "default": default}
        parser.add_argument(f"--{name}", help=f"{meaning} [{default!r}]", **kind)
    given = parser.parse_args(argv, argparse.Namespace(bert="", dtype="float32", eval_batch_size=64))
    if bool(given.outfit) == bool(given.text or given.image) or bool(given.outfit) != bool(given.category):
        raise InputError("query: expected --text, --image, both of them, or --outfit FILES --category NAME")
    if given.rerank and (given.image or given.outfit):
        raise InputError("rerank: the ITM head compares a text with an image, expected --text alone")
    if given.top < 1:
        raise InputError(f"top: found {given.top}, expected at least 1")
    if given.out:
        pictures.check_page(given.out)
    pairs = [(word, "") if Path(word).exists() else word.rpartition("=")[::2] for word in given.outfit]
    given.outfit = [(path, name) if path else (name, "") for path, name in pairs]
    given.sources = [path for path, _ in given.outfit] or [given.image] * bool(given.image)
    return given


def main(argv=None):
    given = parse(argv)
    rows, lines, cells = search(given), [], []
    for r in rows:
        itm = f"  match {r['itm']:.2f}" if "itm" in r else ""
        lines.append(f"{r['rank']:3}  {r['score']:6.3f}{itm}  {r['id']:12}  {r['title'][:50]:50}  {r['path']}")
        label = f"{r['rank']}  {r['score']:.2f}{itm}"
        cells.append({"images": [r["path"]], "text": r["title"] or r["id"], "label": label})
    print(json.dumps(rows, indent=1) if given.json else "\n".join(lines))
    if given.out:
        query = {"images": given.sources, "text": f"wanted: {given.category}" if given.outfit else given.text}
        pictures.draw_sheet(given.out, f"best {len(rows)} of {given.gallery}", [({**query, "label": "query"}, cells)])


if __name__ == "__main__":
    common.run(main)


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def list_images(folder):
    """{path below `folder`: [bytes, time of change in ns]} of its images, at any depth, sorted; InputError if none."""
    if not Path(folder).is_dir():
        raise InputError(f"gallery: found {str(folder)!r}, expected a folder of images")
    paths = (Path(base, name) for base, _, names in os.walk(folder) for name in names if not name.startswith("."))
    paths = sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and path.exists())
    if not paths:
        raise InputError(f"gallery: {folder}: no images in it, expected files that end in {' '.join(IMAGE_SUFFIXES)}")
    return {str(p.relative_to(folder)): [p.stat().st_size, p.stat().st_mtime_ns] for p in paths}


def readable_images(folder, names):
    """Those of `names` below `folder` that open as images; the others are printed to stderr. InputError if none."""
    readable = []
    for name in names:
        try:
            open_image(Path(folder, name))
            readable.append(name)
        except InputError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not readable:
        raise InputError(f"{folder}: none of {len(names)} images can be read")
    return readable


class PolyvoreCategories:
    """The fine categories of a PolyvoreOutfits folder, by name and of an image, numbered as in training.

    Raises InputError where there are other than `n`, the number that the checkpoint knows."""

    def __init__(self, folder, n):
        self.folder = Path(folder).resolve()
        self.metadata, self.number = load_polyvore_items(folder)
        if len(self.number) != n:
            found = f"{len(self.number)} categories, but the checkpoint's CSA-Net has {n}"
            raise InputError(f"{folder}: {found}; expected the folder of its training")

    def numbers(self, name):
        """The sorted numbers that a name or id stands for; Polyvore's coarse names stand for several.

        "shoe" and "shoes" are one name. Raises InputError on one that no item has, with those that there are."""
        alike, known = set(), set()
        for row in self.metadata.values():
            names = {row["category_id"], str(row.get("semantic_category", row["category_id"]))}
            known |= names
            if name.lower().removesuffix("s") in {n.lower().removesuffix("s") for n in names}:
                alike.add(self.number[int(row["category_id"])])
        if not alike:
            shown = sorted(n for n in known if not n.isdigit()) or sorted(known, key=int)
            raise InputError(f"category: found {name!r}, expected one of {', '.join(shown)}, or an id of {self.folder}")
        return sorted(alike)

    def of_image(self, path):
        """The number of the item that an image, a path as os.path.realpath gives it, shows; -1: not in images/."""
        folder, name = os.path.split(path)
        item = self.metadata.get(os.path.splitext(name)[0]) if folder == f"{self.folder}/images" else None
        return self.number[int(item["category_id"])] if item else -1
