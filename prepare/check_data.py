"""Check a data root and print every fault in one pass: python -m prepare.check_data --data_root=DIR"""

import collections
import concurrent.futures
import os
from dataclasses import dataclass
from pathlib import Path

from tokenizers import BertWordPieceTokenizer
from tqdm import tqdm

from plumbing import annotations
from plumbing.ending import run
from plumbing.files import reading
from plumbing.photos import open_image
from plumbing.settings import InputError, load_config, setting
from prepare.layout import content_keys

NEEDS = """
pre-training             FashionGen, BigFACAD, Fashion200k, PolyvoreOutfits: train; FashionGen: val for validation
fashiongen_retrieval     FashionGen: train, val
fashiongen_category      FashionGen: train, val, with category_id
fashiongen_subcategory   FashionGen: train, val, with subcategory_id
fashioniq                FashionIQ: captions/, image_splits/, images/
polyvore                 PolyvoreOutfits: ocir_*.json, polyvore_item_metadata.json, images/"""

MANY_UNKNOWN = 0.02  # share of word pieces that are [UNK], from which on the report says so
MANY = 10  # names of one and the same image file, from which on the report says so


@dataclass
class DataConfig:
    """Settings of `python -m prepare.check_data`."""

    data_root: str = setting("data/datasets", "folder that holds FashionGen/, BigFACAD/, Fashion200k/, ...")
    workers: int = setting(4, "threads that open images")


# Each of these three reads one annotation file and returns a line of counts. It adds the file's images to the dict
# `images`, {path: product or row that names it}, its texts to the list `texts`, and its faults to the list `faults`.


def check_products(root, source, part, images, texts, faults):
    products = annotations.load_products(root, source, part, faults)
    images |= {path: product.name for product in products for path in product.images}
    attributes = {attribute for product in products for attribute in product.attributes}
    counts = f"{sum(len(product.images) for product in products)} images, {len(attributes)} attributes"
    for key in ("category", "subcategory") if source == "FashionGen" else ():
        labels = [getattr(product, key) for product in products]
        n_none = labels.count(None)
        without = f" ({n_none} products without)" if 0 < n_none < len(labels) else ""
        counts += f", {len({*labels} - {None})} {key} labels{without}"
    texts.extend(product.text for product in products)
    return f"{len(products)} products, {counts}"


def check_fashioniq(root, garment, part, images, texts, faults):
    gallery = "original" if part == "val" else "val"  # training needs no split file
    queries, found = annotations.load_fashioniq(root, garment, part, gallery, faults)
    images |= {query[key]: query["name"] for query in queries for key in ("image", "image2")}
    texts.extend(query["text"] for query in queries)
    for path in found.values():
        images.setdefault(path, f"split.{garment}.{part}.json")
    return f"{garment}: {len(queries)} queries, gallery {len(found)}"


def check_polyvore(root, split, part, images, texts, faults):
    outfits, n_categories = annotations.load_polyvore(root, split, part, faults)
    images |= {path: row["name"] for row in outfits for path, _ in [*row["items"], row["blank_item"]]}
    return f"{split}: {len(outfits)} outfits, {n_categories} categories"


def image_fault(path, name):
    """What is wrong with an image of the product or row `name`, as a line, or None."""
    if not os.path.exists(path):
        return f"{path}: missing (of {name})"
    try:
        open_image(path)
    except InputError as error:
        return f"{name}: {error}"


def text_lines(root, texts):
    """Lines on texts that several products share, and on words that the vocabulary ROOT/vocab.txt lacks.

    texts: {(data set, is it of train): list of texts}."""
    lines, vocabulary = [], Path(root, "vocab.txt")
    with reading(vocabulary, "is no vocabulary of WordPiece"):
        tokenizer = BertWordPieceTokenizer(str(vocabulary)) if vocabulary.exists() else None
    for (name, is_train), part in texts.items():
        where = f"{name} {'train' if is_train else 'val'}"
        if name in annotations.SETS:
            count = collections.Counter(part)
            same, train = sum(n for n in count.values() if n > 1), {*texts[name, True]} if not is_train else ()
            both = sum(text in train for text in part)
            if same:
                lines.append(f"{where}: {same} of {len(part)} products share their text with others of it")
            if both:
                lines.append(f"{where}: {both} of {len(part)} products have a text that stands in train, too")
        encodings = tokenizer.encode_batch(part, add_special_tokens=False) if tokenizer else ()
        pieces = [piece for encoding in encodings for piece in encoding.tokens]
        share = pieces.count("[UNK]") / max(1, len(pieces))
        if share > MANY_UNKNOWN:
            lines.append(f"{where}: {share:.1%} of the word pieces are unknown to {vocabulary}")
    return lines


def check(root, workers=1, open_images=True):
    """(report lines, faults) of all that is under `root`: counts of every file, and every fault with file and entry.

    Every image is opened once, by `workers` threads. An id in train and in val is a fault. The same image in both is
    only reported: Polyvore's nondisjoint split and the classes of FashionIQ were published so. So is an image of
    val that pre-training reads from another set."""
    report, faults, checks = [], [], []
    images, texts = collections.defaultdict(dict), collections.defaultdict(list)
    for source, data_set in annotations.SETS.items():
        checks += [(check_products, source, part, f"{source}/{file}") for part, file in data_set.files.items()]
    for name in annotations.FASHIONIQ_CLASSES:
        checks += [(check_fashioniq, name, p, f"FashionIQ/captions/cap.{name}.{p}.json") for p in ("train", "val")]
    for name in ("disjoint", "nondisjoint"):
        checks += [(check_polyvore, name, p, f"PolyvoreOutfits/ocir_{name}_{p}.json") for p in ("train", "test")]
    for check_file, name, part, file in checks:
        folder, counts = Path(file).parts[0], f"no {Path(file).name}"
        # images of the classes of FashionIQ are counted together, as one model is trained on all of them
        key = f"{folder} {name}" if check_file is check_polyvore else folder, part == "train"
        if Path(root, file).exists():
            with annotations.collecting(faults):
                counts = check_file(root, name, part, images[key], texts[key], faults)
        report.append(f"{folder:16} {part:5}  {counts}")
    names = {path: name for named in images.values() for path, name in named.items()}
    if open_images:
        with concurrent.futures.ThreadPoolExecutor(max(1, workers)) as pool:  # Pillow decodes without Python's lock
            found = pool.map(image_fault, names.keys(), names.values())
            faults += filter(None, tqdm(found, "images", len(names), leave=False, disable=None))
    keys = content_keys(names if open_images else ())
    for key, n in collections.Counter(keys.values()).items():
        if n >= MANY:
            one = min(path for path in keys if keys[path] == key)
            report.append(f"{n} images are one and the same file, such as {one}: what a shop sends for a dead link?")
    for name in list(dict.fromkeys(name for name, _ in images)):
        val = images[name, False]
        ids = set(images[name, True].values()) & set(val.values())
        if ids:
            faults.append(f"{name}: {len(ids)} ids stand in train and in val, such as {min(ids)}")
        for source in dict.fromkeys([name, *annotations.SETS]):  # pre-training reads the train of all of SETS
            twins = {keys.get(path, path): path for path in images[source, True]}
            both = [path for path in val if keys.get(path, path) in twins]
            if both:
                pair = dict.fromkeys([both[0], twins[keys.get(both[0], both[0])]])  # often one and the same file
                where = "train, too" if source == name else f"{source}/train_info.json, which pre-training reads"
                report.append(f"{name}: {len(both)} images of val stand in {where}, such as {' = '.join(pair)}")
    report += text_lines(root, texts)
    return report, list(dict.fromkeys(faults))


def main():
    config = load_config(DataConfig, description=__doc__.splitlines()[0])
    if not os.path.isdir(config.data_root):
        raise InputError(f"data_root: no folder {config.data_root}")
    report, faults = check(config.data_root, config.workers)
    print("\n".join(report), NEEDS, sep="\n")
    if faults:
        print(f"\n{len(faults)} faults:", *faults, sep="\n")
        raise InputError(f"{config.data_root}: {len(faults)} faults, listed above")


if __name__ == "__main__":
    run(main)
