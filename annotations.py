"""The annotation files of the five fashion data sets -> products, triplets, outfits. Every fault is named."""

import contextlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from settings import InputError

MAX_LABEL = 1_000_000  # no attribute or category id reaches it; heads have a row for every id up to the largest


# annotation file and image folder per split, and the fields whose texts are joined with "."
SETS = {
    "FashionGen": {
        "splits": {"train": ("train_info.json", "train"), "val": ("val_info.json", "val")},
        "text": ("title", "description"),
    },
    "BigFACAD": {
        "splits": {"train": ("train_info.json", "images"), "val": ("val_info.json", "images")},
        "text": ("color", "title", "description"),
    },
    "Fashion200k": {
        "splits": {"train": ("train_info.json", "images"), "val": ("test_info.json", "images")},
        "text": ("title",),
    },
    "PolyvoreOutfits": {
        "splits": {"train": ("train_info.json", "images")},
        "text": ("title", "description"),
    },
}


RECOGNITION_LABELS = {"fashiongen_category": "category", "fashiongen_subcategory": "subcategory"}


FASHIONIQ_CLASSES = ("dress", "shirt", "toptee")


POLYVORE_ITEMS = "polyvore_item_metadata.json"


# Polyvore Outfits' fine category ids in the order in which the released OCIR checkpoint numbers them
POLYVORE_CATEGORIES = tuple(
    int(n)
    for n in """
3 4 5 6 7 8 9 10 11 15 17 18 19 21 23 24 25 26 27 28 29 30 31 35 36 37 38 39 40 41 42 43 46 47 48 49 50 51 52 53
55 56 57 58 59 61 62 64 65 68 69 1606 1607 1605 104 105 106 107 231 236 237 238 239 240 241 243 244 248 249 250
251 252 253 254 255 256 257 258 259 260 261 262 263 264 265 266 267 268 269 270 272 273 275 277 278 279 280 281
282 284 286 287 288 289 290 291 292 293 294 295 296 297 298 299 300 301 302 303 304 305 306 307 309 310 315 318
332 341 342 343 4452 4454 4455 4456 4457 4458 4459 4460 4461 4462 4463 4464 4465 4466 4467 4468 4470 4472 4473
4495 4496 4517 4518
""".split()
)


@dataclass
class Product:
    """One product; `name` is for messages ("FashionGen 1234"), the labels are None where its data set has none."""

    name: str
    images: list
    text: str
    attributes: list
    category: int = None
    subcategory: int = None
    title: str = ""


def read_json(path, kind):
    """The parsed JSON file, of type `kind` (list or dict). Raises InputError on a missing, cut or other file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); fetch the file again") from None
    if type(value) is not kind or not value:
        found = f"{'a filled' if value else 'an empty'} {type(value).__name__}"
        raise InputError(f"{path}: found {found}, expected a filled {kind.__name__}")
    return value


def check_printable(text):
    """Raise ValueError where a name would spoil a message or a path: control characters, half a surrogate pair."""
    if re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", text):
        raise ValueError(f"found {text!r:.60}, expected no control characters")


def inside(folder, name):
    """folder / name as a string; raises ValueError where `name` leads out of the folder (a link inside may lead on)."""
    check_printable(name)
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise ValueError(f"image path {name!r} leaves the folder {folder}")
    return os.path.join(folder, name)


def parse_product(item, source, folder):
    """One annotation entry -> Product; raises ValueError that says key, what was found and what was expected."""

    def get(key, kinds):
        value = item.get(key)
        if not isinstance(value, kinds) or isinstance(value, bool):
            expected = kinds.__name__ if isinstance(kinds, type) else "int or str"
            raise ValueError(f"key {key!r}: found {value!r:.60}, expected {expected}")
        return value

    if not isinstance(item, dict):
        raise ValueError(f"found {item!r:.60}, expected an object")
    name = f"{source} {get('id', (int, str))}"
    check_printable(name)
    images = [get("images", str)] if source == "PolyvoreOutfits" else get("images", list)
    if not images or not all(isinstance(i, str) and i for i in images):
        raise ValueError(f"key 'images': found {images!r:.60}, expected file names")
    attributes = get("attributes_id", list)
    wrong = [a for a in attributes if type(a) is not int or not 0 <= a < MAX_LABEL]
    if wrong:
        raise ValueError(f"key 'attributes_id': found {wrong[0]!r:.60}, expected ids from 0 to {MAX_LABEL - 1}")
    for key in ("category_id", "subcategory_id"):
        if item.get(key) is not None and (type(item[key]) is not int or not 0 <= item[key] < MAX_LABEL):
            raise ValueError(f"key {key!r}: found {item[key]!r:.60}, expected an id from 0 to {MAX_LABEL - 1}")
    text = ".".join(get(key, str) for key in SETS[source]["text"])
    paths = [inside(folder, i) for i in images]
    labels = item.get("category_id"), item.get("subcategory_id")
    return Product(name, paths, text, attributes, *labels, item["title"])


def scan_products(root, source, split):
    """(products, faults) of one annotation file: every entry that can be used, and a line for every one that cannot."""
    file, images = SETS[source]["splits"][split]
    path, folder = Path(root, source, file), os.path.join(root, source, images)
    products, faults, seen = [], [], set()
    for i, item in enumerate(read_json(path, list)):
        try:
            product = parse_product(item, source, folder)
            if product.name in seen:
                raise ValueError("this id stood before; ids must be unique")
            seen.add(product.name)
            products.append(product)
        except ValueError as error:
            name = repr(item["id"])[:60] if isinstance(item, dict) and "id" in item else "missing"
            faults.append(f"{path}: entry {i} (id {name}): {error}")
    return products, faults


def load_products(root, source, split):
    """The products of one set and split. Raises InputError with the first fault; tools.check_data lists all."""
    products, faults = scan_products(root, source, split)
    if faults:
        lister = f"python -m tools.check_data --data_root={root}"
        raise InputError(f"{faults[0]}; {len(faults)} such in the file, {lister} lists them")
    return products


def load_titles(folder):
    """{image path: (product id, title)} of a folder of images, {} where it is none of a data set's (SETS).

    Raises InputError on an annotation file that cannot be read; entries that have faults are left out."""
    folder, titles = Path(folder).resolve(), {}
    source, root = folder.parent.name, folder.parent.parent
    splits = SETS[source]["splits"] if source in SETS else {}
    for split, (file, images) in splits.items():
        if folder.name == images and (folder.parent / file).exists():
            for product in scan_products(root, source, split)[0]:
                own = product.name.removeprefix(f"{source} "), product.title
                titles |= dict.fromkeys(product.images, own)
    if source == "PolyvoreOutfits" and (folder.parent / POLYVORE_ITEMS).exists():
        for item, row in load_polyvore_items(folder.parent)[0].items():
            titles[str(folder / f"{item}.jpg")] = item, str(row.get("title", ""))
    return titles


def load_pretraining(root, sets=tuple(SETS)):
    """The training products of the sets, one list: the union over which training draws uniformly (recipe 3)."""
    unknown = [name for name in sets if name not in SETS]
    if unknown or not sets or len(set(sets)) < len(sets):
        found = repr(unknown[0]) if unknown else f"{sets}"
        raise InputError(f"sets: found {found}, expected some of {', '.join(SETS)}, each once")
    return [product for name in sets for product in load_products(root, name, "train")]


def count_labels(products, key, limit=0):
    """Number of labels: the largest id of the products + 1, or `limit` where that is given.

    key: "attributes", "category" or "subcategory". Raises InputError where an id is out of range or missing."""
    largest = -1
    for product in products:
        value = getattr(product, key)
        if value is None:
            raise InputError(f"{product.name}: no {key}_id, which this task needs")
        top = max(value, default=-1) if key == "attributes" else value
        if limit and top >= limit:
            raise InputError(f"{product.name}: {key} id {top}, expected below {limit}; check the label file or n_{key}")
        largest = max(largest, top)
    return limit or largest + 1


def has_subcategories(products):
    """Whether all products have a sub-category, which sample-100 needs; raises InputError where only some have."""
    if any(product.subcategory is not None for product in products):
        count_labels(products, "subcategory")
        return True
    return False


def need(row, key, kind, where):
    """row[key] of type `kind`, or an InputError that says where, what was found and what was expected."""
    value = row.get(key) if isinstance(row, dict) else None
    if type(value) is not kind:
        raise InputError(f"{where}: key {key!r}: found {value!r:.60}, expected {kind.__name__}")
    return value


def image_of(folder, name, where):
    """Path of the image that FashionIQ or Polyvore Outfits call `name`; raises InputError on what is no name."""
    try:
        if type(name) is not str or not name:
            raise ValueError(f"found {name!r:.60}, expected the name of an image")
        return inside(folder, f"{name}.jpg")
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


@contextlib.contextmanager
def collecting(faults):
    """Let an InputError pass, or note it where `faults` is a list: `check` wants all of a file's."""
    try:
        yield
    except InputError as error:
        if faults is None:
            raise
        faults.append(str(error))


def load_fashioniq(root, garment, split, gallery="original", faults=None):
    """(queries, gallery) of one FashionIQ class: [{"image" (reference), "image2" (target), "text", "target"}], [name].

    Public files: the gallery is every image of the split file ("original"; 3,817 dress, 6,346 shirt, 5,373 toptee in
    val) or the union of references and targets ("val"). The authors' extended files name the gallery themselves: the
    distinct `target_id` of all rows, those with `fake_data` being nobody's query (recipe 3).
    Raises InputError on files that are missing or bad and on a gallery that lacks a target; see `collecting`."""
    if gallery not in ("original", "val"):
        raise InputError(f"gallery: found {gallery!r}, expected original or val")
    folder = Path(root, "FashionIQ")
    path, images = folder / "captions" / f"cap.{garment}.{split}.json", folder / "images"
    queries, names = [], []
    rows = read_json(path, list)
    extended = isinstance(rows[0], dict) and "fake_data" in rows[0]
    for i, row in enumerate(rows):
        where = f"{path}: entry {i}"
        with collecting(faults):
            target = need(row, "target", str, where)
            if extended and row.get("garment_class", garment) not in (garment, FASHIONIQ_CLASSES.index(garment)):
                continue
            image2 = image_of(images, target, where)
            names.append(target)
            if extended and need(row, "fake_data", bool, where):
                continue
            candidate, captions = need(row, "candidate", str, where), need(row, "captions", list, where)
            image = image_of(images, candidate, where)
            if not all(type(caption) is str for caption in captions):
                raise InputError(f"{where}: key 'captions': found {captions!r:.60}, expected texts")
            if not extended:
                names.append(candidate)
            text = ", ".join(captions)
            queries.append({"image": image, "image2": image2, "text": text, "target": target, "name": where})
    if gallery == "original" and not extended:
        path = folder / "image_splits" / f"split.{garment}.{split}.json"
        names = []
        for i, name in enumerate(read_json(path, list)):
            with collecting(faults):
                image_of(images, name, f"{path}: entry {i}")
                names.append(name)
    names = list(dict.fromkeys(names))
    with collecting(faults):
        missing = {q["target"] for q in queries} - set(names)
        if missing:
            raise InputError(f"{path}: target {min(missing)} stands in no row of the gallery ({len(missing)} such)")
        if not queries:
            raise InputError(f"{path}: no query in it; expected rows that are not all fake_data")
    return queries, names


def load_polyvore_items(folder, faults=None):
    """({item id: its metadata}, {category id, an int: number}) of a PolyvoreOutfits folder.

    Categories are numbered in the released checkpoint's order where POLYVORE_CATEGORIES knows them all, else in
    ascending order of their ids. Raises InputError on a file that is missing or bad; see `collecting`."""
    path, metadata = Path(folder, POLYVORE_ITEMS), {}
    for item, row in read_json(path, dict).items():
        with collecting(faults):
            text = need(row, "category_id", str, f"{path}: item {item!r:.60}")
            if not re.fullmatch("[0-9]{1,9}", text):
                raise InputError(f"{path}: item {item!r:.60}: category_id: found {text!r:.60}, expected a whole number")
            metadata[item] = row
    order = sorted({int(row["category_id"]) for row in metadata.values()})
    if set(order) <= set(POLYVORE_CATEGORIES):
        order = POLYVORE_CATEGORIES
    return metadata, {category: i for i, category in enumerate(order)}


def load_polyvore(root, split, part, faults=None):
    """(outfits, n_categories) of Polyvore Outfits' OCIR files, split disjoint or nondisjoint, part train or test.

    An outfit: {"items": [(path, category)] of the question, "blank": its id, "blank_item": (path, category), "fake"}.
    Raises InputError on files that are missing or bad; see `collecting`."""
    folder = Path(root, "PolyvoreOutfits")
    if split not in ("disjoint", "nondisjoint"):
        raise InputError(f"split: found {split!r}, expected disjoint or nondisjoint")
    metadata, number = load_polyvore_items(folder, faults)
    path, outfits = folder / f"ocir_{split}_{part}.json", []
    for i, row in enumerate(read_json(path, list)):
        where = f"{path}: entry {i}"
        with collecting(faults):
            question, blank = need(row, "question", list, where), need(row, "blank", str, where)
            images = [image_of(folder / "images", item, where) for item in [*question, blank]]
            unknown = [item for item in [*question, blank] if item not in metadata]
            if unknown or not question:
                raise InputError(f"{where}: item {unknown[:1]} is not in {POLYVORE_ITEMS}, or the question is empty")
            if part == "train" and set(question) == {blank}:
                raise InputError(f"{where}: blank {blank!r:.60} is the only item of the question, expected two items")
            *items, last = zip(
                images, (number[int(metadata[item]["category_id"])] for item in [*question, blank]), strict=True
            )
            fake = part == "test" and need(row, "fake_data", bool, where)
            outfits.append({"items": items, "blank": blank, "blank_item": last, "fake": fake, "name": where})
    with collecting(faults):
        if all(outfit["fake"] for outfit in outfits):
            raise InputError(f"{path}: no outfit to ask for in it; expected rows that are not all fake_data")
    return outfits, len(number)
