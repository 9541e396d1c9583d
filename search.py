"""Stage 3: search a folder of images with any checkpoint that ranks.

    python search.py --checkpoint C --gallery DIR --text "red floral midi dress"
    python search.py --checkpoint C --gallery DIR --image photo.jpg                                    # alike
    python search.py --checkpoint C --gallery DIR --image photo.jpg --text "longer sleeves, in blue"   # changed
    python search.py --checkpoint O --gallery DIR --outfit a.jpg b.jpg --category shoes                # goes with them

O is of finetune.py --task=polyvore. DIR is any folder of images; a data set's own folders have titles, too. Scores are
cosines. The images' vectors stay beside DIR (DIR.index.npy, .json) until checkpoint or files change."""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
import common
import data
import evaluate
from common import InputError
from model import CSANet

RERANKED = 50  # best results that --rerank scores again


def readable(path):
    try:
        return bool(data.open_image(path))
    except InputError as error:
        print(f"left out: {error}", file=sys.stderr)  # standard output is for results alone


def open_index(path, folder, fingerprint, embed, skip_broken=False):
    """(unit vectors (N, D) float32, mapped from `path`.npy; their images' paths below `folder`).

    Made anew by `embed(paths)` where missing or stale; `path`.json says what of, and is gone while that changes, so
    that the two agree. Raises InputError where they cannot be written, before anything is embedded."""
    vectors, note, files = Path(f"{path}.npy"), Path(f"{path}.json"), data.list_images(folder)
    try:
        old, found = json.loads(note.read_text()), np.load(vectors, mmap_mode="r")
        if (old["fingerprint"], old["files"], len(old["ids"])) == (fingerprint, files, len(found)):
            return found, old["ids"]
        why = "files were added, removed or changed" if old["fingerprint"] == fingerprint else "of another checkpoint"
    except FileNotFoundError:
        why = "not there yet"
    except (OSError, ValueError, KeyError, TypeError):
        why = "damaged"
    print(f"index {vectors}: {why}; embedding {len(files)} images", file=sys.stderr)
    aside = Path(f"{vectors}.tmp")
    try:
        with open(aside, "wb") as file:
            ids = [name for name in files if not skip_broken or readable(folder / name)]
            np.save(file, embed([str(folder / name) for name in ids]))
        note.unlink(missing_ok=True)
        aside.replace(vectors)
        common.write_json(note, {"fingerprint": fingerprint, "ids": ids, "files": files})
    except OSError as error:
        raise InputError(f"{vectors}: cannot be written ({error.strerror}); set --index=PATH to where it can") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()
    return np.load(vectors, mmap_mode="r"), ids


def best(scores, top):
    """The `top` best of scores (N,) -> their indices, best first, equal ones in gallery order; -inf is no result."""
    order = np.argsort(-scores, kind="stable")[:top]
    return order[np.isfinite(scores[order])].tolist()


def encode(model, batch):
    """Unit vectors (B, D) of a batch of images, of texts, or of both: the image with the change in words."""
    image, words = batch.get("image"), [batch[k] for k in ("input_ids", "attention_mask") if k in batch]
    if words:
        x = model.encode_text(*words) if image is None else model.encode_composed(*words, image)
    else:
        x = model.encode_item(image) if isinstance(model, CSANet) else model.encode_image(image)
    return F.normalize(x.float(), dim=-1)


def match(model, batch):
    """(B,) the ITM head's probability that text and image of a row belong together."""
    hidden = model.encode_joint(batch["input_ids"], batch["attention_mask"], batch["image"])
    return model.heads["itm"](model.bert.pool(hidden)).float().softmax(-1)[:, 1]


def fuse_outfit(model, items, given, folder):
    """(queries (W, D), wanted (W,) category numbers that --category may mean, category_of(path): its number or -1).

    items (n, D): `encode_item` of given.outfit; `folder` (PolyvoreOutfits) names categories as in training. A query
    is the mean over the outfit of the fused unit vectors, not normalised again (recipe 5). Raises InputError."""
    (metadata, number), names = data.load_polyvore_items(folder), data.name_polyvore_categories(folder)
    if len(number) != model.n_categories:
        raise InputError(f"{folder}: {len(number)} categories, but the checkpoint's CSA-Net has {model.n_categories}")

    def look_up(name):
        alike = [n for n in names if n.lower().removesuffix("s") == name.lower().removesuffix("s")]  # shoe, shoes
        if not alike:
            known = sorted(n for n in names if not n.isdigit()) or sorted(names, key=int)
            raise InputError(f"category: found {name!r}, expected one of {', '.join(known)}, or an id of {folder}")
        return torch.tensor(sorted(set.union(*(names[n] for n in alike))), device=items.device)

    def category_of(path):
        item = metadata.get(path.stem) if path.resolve().parent == (folder / "images").resolve() else None
        return number[item["category_id"]] if item else -1

    wanted, queries = look_up(given.category), []
    for item, (path, name) in zip(items, given.outfit, strict=True):
        own = look_up(name) if name else torch.tensor([category_of(Path(path))], device=items.device)
        if own[0] < 0:
            raise InputError(f"outfit: {path}: not among {folder}/images, so say what it is: {path}=CATEGORY")
        pairs = torch.cartesian_prod(wanted, own)  # (W x own, 2)
        fused = model.fuse(item.expand(len(pairs), -1), pairs[:, 1], pairs[:, 0]) / model.logit_scale
        queries.append(fused.view(len(wanted), len(own), -1).mean(1))  # (W, D)
    return torch.stack(queries).mean(0).cpu().numpy(), wanted.cpu().numpy(), category_of


@torch.no_grad()
def search(given):
    """`given` (of `parse`) -> [{"rank", "score", "itm" if --rerank, "id", "title", "path"}], best first.

    The query's own files are no results. Raises InputError for whatever is wrong with `given`."""
    processes, folder = common.start_processes(given.device), Path(given.gallery).resolve()
    needs = ("csa_net",) if given.outfit else ("contrastive", "itm") if given.rerank else ("contrastive",)
    model, info = checkpoint.load_model(given.checkpoint, processes.device, needs)
    trained = info["config"] or {}
    given.image_size = given.image_size or trained.get("image_size", 224)
    given.data_root = given.data_root or trained.get("data_root", "data/datasets")
    given.max_tokens = trained.get("max_tokens", 0)
    tokenizer = evaluate.read_tokenizer(given.checkpoint, model, given) if given.text else None
    as_fashioniq = bool(given.outfit) or info["task"] == "fashioniq"  # recipe 3: how these two cut images and texts
    kind, length = ("scale", data.FASHIONIQ_MAX_TOKENS) if as_fashioniq else ("crop", data.MAX_TOKENS)

    def embed(encoder, items, workers=0, progress=False):
        config = argparse.Namespace(**{**vars(given), "workers": workers})
        encoder = functools.partial(encoder, model)
        return evaluate.embed(encoder, items, tokenizer, config, processes, kind, length, progress)

    text = {"text": given.text} if given.text else {}
    sources = [path for path, _ in given.outfit] or [given.image] * bool(given.image)
    if given.outfit:
        places = (folder, folder.parent, Path(given.data_root, "PolyvoreOutfits"))
        place = next((p for p in places if (p / data.POLYVORE_ITEMS).exists()), places[-1])
        items = embed(lambda model, batch: model.encode_item(batch["image"]), evaluate.image_items(sources))
        queries, wanted, category_of = fuse_outfit(model, items.to(processes.device), given, place)
    else:
        queries = embed(encode, [{**text, **({"image": given.image, "name": "image"} if sources else {})}]).numpy()

    digest = hashlib.sha256(np.memmap(given.checkpoint, mode="r")).hexdigest()
    vectors, ids = open_index(
        given.index.removesuffix(".npy") or f"{folder}.index",
        folder,
        f"{digest} {kind} {given.image_size}",
        lambda paths: embed(encode, evaluate.image_items(paths), given.workers, True).numpy(),
        given.skip_broken_images,
    )
    scores = vectors @ queries.T  # (N, W)
    if given.outfit:  # an image answers the query for its own category; any, where nobody knows that
        category = np.array([category_of(folder / name) for name in ids])[:, None]  # (N, 1)
        scores = np.where((category == wanted) | (category < 0), scores, -np.inf)
    scores, own = scores.max(1), {os.path.realpath(path) for path in sources}
    scores[[i for i, name in enumerate(ids) if str(folder / name) in own]] = -np.inf
    order, itm = best(scores, max(given.top, RERANKED * given.rerank)), {}
    if given.rerank:
        first = order[:RERANKED]
        itm = dict(
            zip(first, embed(match, [{**text, "image": str(folder / ids[i])} for i in first]).tolist(), strict=True)
        )
        order = [*sorted(first, key=lambda i: -itm[i]), *order[RERANKED:]]
    titles, rows = data.load_titles(folder), []
    for place, i in enumerate(order[: given.top], 1):
        name, title = titles.get(str(folder / ids[i]), (str(Path(ids[i]).with_suffix("")), ""))
        row = {"rank": place, "score": float(scores[i]), **({"itm": itm[i]} if i in itm else {})}
        rows.append({**row, "id": name, "title": title, "path": str(Path(given.gallery, ids[i]))})
    return rows


def parse(argv=None):
    """The command line -> Namespace, `outfit` as [(path, category or "")]. Raises InputError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def stop(message):
        raise InputError(message)

    parser.error = stop
    parser.add_argument("--outfit", nargs="+", default=[], metavar="FILE[=CATEGORY]", help="images of an outfit")
    for name, default, meaning in (
        ("checkpoint", "", "ours or a released one"),
        ("gallery", "", "folder of images"),
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
        ("image_size", 0, "pixels a side; 0: the checkpoint's own"),
        ("eval_batch_size", 64, "images embedded at a time"),
        ("workers", 2, "processes that read images"),
        ("device", "auto", "auto, cpu or cuda"),
    ):
        kind = {"action": "store_true"} if default is False else {"type": type(default), "default": default}
        parser.add_argument(f"--{name}", help=f"{meaning} [{default!r}]", **kind)
    parser.set_defaults(bert="", dtype="float32")
    given = parser.parse_args(argv)
    for name in ("checkpoint", "gallery"):
        if not getattr(given, name):
            raise InputError(f"{name}: none given, expected --{name}=PATH")
    if bool(given.outfit) == bool(given.text or given.image) or bool(given.outfit) != bool(given.category):
        raise InputError("query: expected --text, --image, both of them, or --outfit FILES --category NAME")
    if given.rerank and not (given.text and not given.image):
        raise InputError("rerank: the ITM head compares a text with an image, expected --text alone")
    if given.top < 1:
        raise InputError(f"top: found {given.top}, expected at least 1")
    if given.out:
        evaluate.check_page(given.out)
    pairs = [(word, "") if Path(word).exists() else word.rpartition("=")[::2] for word in given.outfit]
    given.outfit = [(path, name) if path else (name, "") for path, name in pairs]
    return given


def main(argv=None):
    given = parse(argv)
    rows = search(given)
    if given.json:
        print(json.dumps(rows, indent=1))
    for r in [] if given.json else rows:
        itm = f"  match {r['itm']:.3f}" if "itm" in r else ""
        print(f"{r['rank']:3}  {r['score']:6.3f}{itm}  {r['id']:12}  {r['title'][:50]:50}  {r['path']}")
    if given.out:
        wanted = f"wanted: {given.category}" if given.outfit else given.text
        images = [path for path, _ in given.outfit] or [given.image] * bool(given.image)
        cells = [
            {
                "images": [r["path"]],
                "text": r["title"] or r["id"],
                "label": f"{r['rank']}   {r['score']:.2f}" + (f"   match {r['itm']:.2f}" if "itm" in r else ""),
            }
            for r in rows
        ]
        query = {"images": images, "text": wanted, "label": "query"}
        evaluate.draw_sheet(given.out, f"best {len(rows)} of {given.gallery}", [(query, cells)])
        print(f"written: {given.out}", file=sys.stderr)


if __name__ == "__main__":
    common.run(main)
