"""Check a data root and print every fault in one pass: python -m tools.check_data --data_root=DIR"""

import concurrent.futures
import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from annotations import (
    FASHIONIQ_CLASSES,
    SETS,
    collecting,
    has_subcategories,
    load_fashioniq,
    load_polyvore,
    scan_products,
)
from common import run
from data import open_image
from settings import InputError, load_config, setting


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
    """(report lines, faults) over everything under `root`: counts per file, and every fault with file and entry.

    Every image is opened once, by `workers` processes (0: this one)."""
    report, faults, images = [], [], {}
    for source, row in SETS.items():
        for split, (file, _) in row["splits"].items():
            if not Path(root, source, file).exists():
                report.append(f"{source:16} {split:5}  no {file}")
                continue
            with collecting(faults):
                products, found = scan_products(root, source, split)
                faults += found
                images |= {path: product.name for product in products for path in product.images}
                n_images, vocabulary = sum(len(p.images) for p in products), {a for p in products for a in p.attributes}
                labels = [f"{len({getattr(p, k) for p in products} - {None})} {k}" for k in ("category", "subcategory")]
                shown = f", {', '.join(labels)} labels" if source == "FashionGen" else ""
                counts = f"{len(products)} products, {n_images} images, {len(vocabulary)} attributes{shown}"
                report.append(f"{source:16} {split:5}  {counts}")
                if split == "val":
                    has_subcategories(products)
    for garment in FASHIONIQ_CLASSES:
        for split in ("train", "val"):
            if Path(root, "FashionIQ", "captions", f"cap.{garment}.{split}.json").exists():
                with collecting(faults):
                    gallery = "original" if split == "val" else "val"  # training needs no split file
                    queries, names = load_fashioniq(root, garment, split, gallery, faults)
                    images |= {q[key]: q["name"] for q in queries for key in ("image", "image2")}
                    folder = os.path.join(root, "FashionIQ", "images")
                    images = {**{f"{folder}/{name}.jpg": f"split.{garment}.{split}.json" for name in names}, **images}
                    report.append(
                        f"FashionIQ        {split:5}  {garment}: {len(queries)} queries, gallery {len(names)}"
                    )
    for split in ("disjoint", "nondisjoint"):
        for part in ("train", "test"):
            if Path(root, "PolyvoreOutfits", f"ocir_{split}_{part}.json").exists():
                with collecting(faults):
                    outfits, n = load_polyvore(root, split, part, faults)
                    images |= {path: o["name"] for o in outfits for path, _ in [*o["items"], o["blank_item"]]}
                    report.append(f"PolyvoreOutfits  {part:5}  {split}: {len(outfits)} outfits, {n} categories")
    if not open_images:
        return report, list(dict.fromkeys(faults))
    pool = concurrent.futures.ProcessPoolExecutor(workers) if workers else contextlib.nullcontext()
    with pool:
        found = pool.map(image_fault, images.items(), chunksize=64) if workers else map(image_fault, images.items())
        faults += filter(None, tqdm(found, "images", len(images), leave=False, disable=None))
    return report, list(dict.fromkeys(faults))


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
