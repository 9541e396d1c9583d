"""Check a data root and print every fault in one pass: python -m tools.check_data --data_root=DIR"""

import concurrent.futures
import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import annotations
from annotations import collecting
from common import run
from data import open_image
from settings import InputError, load_config, setting

NEEDS = """
pre-training             FashionGen, BigFACAD, Fashion200k, PolyvoreOutfits: train; FashionGen: val for validation
fashiongen_retrieval     FashionGen: train, val
fashiongen_category      FashionGen: train, val, with category_id
fashiongen_subcategory   FashionGen: train, val, with subcategory_id
fashioniq                FashionIQ: captions/, image_splits/, images/
polyvore                 PolyvoreOutfits: ocir_*.json, polyvore_item_metadata.json, images/"""


@dataclass
class DataConfig:
    """Settings of `python -m tools.check_data`."""

    data_root: str = setting("data/datasets", "folder that holds FashionGen/, BigFACAD/, Fashion200k/, ...")
    workers: int = setting(4, "processes that open images; 0: this one")


# Each of these reads one annotation file and returns a line of counts. It adds the file's images to the dict `images`,
# {path: product or row that names it}, and the file's faults to the list `faults`.


def check_products(root, source, split, images, faults):
    products = annotations.load_products(root, source, split, faults)
    images |= {path: product.name for product in products for path in product.images}
    vocabulary = {attribute for product in products for attribute in product.attributes}
    counts = [f"{sum(len(product.images) for product in products)} images", f"{len(vocabulary)} attributes"]
    if source == "FashionGen":
        for key in ("category", "subcategory"):
            counts.append(f"{len({getattr(product, key) for product in products} - {None})} {key}")
        counts[-1] += " labels"
    if split == "val":
        with collecting(faults):
            annotations.has_subcategories(products)
    return f"{source:16} {split:5}  {len(products)} products, {', '.join(counts)}"


def check_fashioniq(root, garment, split, images, faults):
    gallery = "original" if split == "val" else "val"  # training needs no split file
    queries, names = annotations.load_fashioniq(root, garment, split, gallery, faults)
    images |= {query[key]: query["name"] for query in queries for key in ("image", "image2")}
    for name in names:
        images.setdefault(annotations.fashioniq_image(root, garment, name, garment), f"split.{garment}.{split}.json")
    return f"FashionIQ        {split:5}  {garment}: {len(queries)} queries, gallery {len(names)}"


def check_polyvore(root, split, part, images, faults):
    outfits, n_categories = annotations.load_polyvore(root, split, part, faults)
    images |= {path: row["name"] for row in outfits for path, _ in [*row["items"], row["blank_item"]]}
    return f"PolyvoreOutfits  {part:5}  {split}: {len(outfits)} outfits, {n_categories} categories"


def image_fault(image):
    """What is wrong with (path, product or row that names it), as a line, or None."""
    path, name = image
    if not os.path.exists(path):
        return f"{path}: missing (of {name})"
    try:
        open_image(path)
    except InputError as error:
        return f"{name}: {error}"


def check(root, workers=0, open_images=True):
    """(report lines, faults) of all that is under `root`: counts of every file, and every fault with file and entry.

    Every image is opened once, by `workers` processes (0: this one)."""
    report, faults, images, checks = [], [], {}, []
    for source, data_set in annotations.SETS.items():
        for split, file in data_set.files.items():
            checks.append((check_products, source, split, Path(root, source, file)))
    for garment in annotations.FASHIONIQ_CLASSES:
        for split in ("train", "val"):
            path = Path(root, "FashionIQ", "captions", f"cap.{garment}.{split}.json")
            checks.append((check_fashioniq, garment, split, path))
    for split in ("disjoint", "nondisjoint"):
        for part in ("train", "test"):
            checks.append((check_polyvore, split, part, Path(root, "PolyvoreOutfits", f"ocir_{split}_{part}.json")))
    for check_file, name, split, path in checks:
        if path.exists():
            with collecting(faults):
                report.append(check_file(root, name, split, images, faults))
        elif check_file is check_products:
            report.append(f"{name:16} {split:5}  no {path.name}")
    if open_images:
        pool = concurrent.futures.ProcessPoolExecutor(workers) if workers else contextlib.nullcontext()
        with pool:
            found = pool.map(image_fault, images.items(), chunksize=64) if workers else map(image_fault, images.items())
            faults += filter(None, tqdm(found, "images", len(images), leave=False, disable=None))
    return report, list(dict.fromkeys(faults))


def main():
    config = load_config(DataConfig, description=__doc__.splitlines()[0])
    if not os.path.isdir(config.data_root):
        raise InputError(f"data_root: no folder {config.data_root}")
    report, faults = check(config.data_root, max(0, config.workers))
    print("\n".join(report), NEEDS, sep="\n")
    if faults:
        print(f"\n{len(faults)} faults:", *faults, sep="\n")
        raise InputError(f"{config.data_root}: {len(faults)} faults, listed above")


if __name__ == "__main__":
    run(main)
