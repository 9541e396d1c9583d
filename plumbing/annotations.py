"""The annotation files of the five fashion data sets become products, queries and outfits. Every fault is named.

* A product has pseudo-attributes: ids of words and phrases that were mined from all texts (prepare/catalogue.py).
* A FashionIQ query is a reference image, and captions that say what is different in the target image.
* One item of a Polyvore outfit is taken away, the blank; the question is the items that are left. The blank is searched
  among all blanks of its category. A fake row is no question: its blank is one more wrong answer."""

import contextlib
import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from plumbing.files import not_the_file
from plumbing.settings import InputError

MAX_LABEL = 1_000_000  # every label id is below it; a head has one row for every id up to the largest
RECOGNITION_LABELS = {"fashiongen_category": "category", "fashiongen_subcategory": "subcategory"}  # task: label
FASHIONIQ_CLASSES = ("dress", "shirt", "toptee")
POLYVORE_ITEMS = "polyvore_item_metadata.json"
# the fine category ids of Polyvore Outfits in the order in which the released OCIR checkpoint numbers them
POLYVORE_CATEGORIES = json.loads((Path(__file__).parents[1] / "assets/polyvore_categories.json").read_text())


class DataSet(NamedTuple):
    text: tuple  # the fields of an entry whose texts are joined with "."
    files: dict  # part, train or val: annotation file
    images: str = "images"  # image folder; {part} stands for the part's name


SETS = {
    "FashionGen": DataSet(("title", "description"), {"train": "train_info.json", "val": "val_info.json"}, "{part}"),
    "BigFACAD": DataSet(("color", "title", "description"), {"train": "train_info.json", "val": "val_info.json"}),
    "Fashion200k": DataSet(("title",), {"train": "train_info.json", "val": "test_info.json"}),
    "PolyvoreOutfits": DataSet(("title", "description"), {"train": "train_info.json"}),
}


@dataclass
class Product:
    name: str  # for messages, such as "FashionGen 1234"
    images: list  # paths
    text: str
    attributes: list  # ids of pseudo-attributes
    category: int = None  # None: the file has no such label
    subcategory: int = None
    title: str = ""


def read_json(path, kind):
    """The content of a JSON file, a filled `kind` (list or dict). Raises InputError on a missing, cut or other file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        cure = "README, section Data, says where to get it; `python -m prepare.demo data/demo` makes a small one to try"
        raise InputError(f"{path}: this file of the data set is missing; {cure} with --data_root=data/demo") from None
    except (OSError, ValueError, RecursionError) as error:
        problem = not_the_file(path) or f"cannot be read as JSON ({error}); fetch the file again"
        raise InputError(f"{path}: {problem}") from None
    if type(value) is not kind or not value:
        found = f"{'a filled' if value else 'an empty'} {type(value).__name__}"
        raise InputError(f"{path}: found {found}, expected a filled {kind.__name__}")
    return value


def need(row, key, where, *kinds):
    """row[key], whose type is one of `kinds`; InputError if not. `where`: the file and entry to name in it."""
    value = row.get(key) if isinstance(row, dict) else None
    if type(value) not in kinds:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(f"{where}: key {key!r}: found {value!r:.60}, expected {expected}")
    return value


def image_path(folder, name, where, ending=""):
    """folder/name + ending, a string. Raises InputError on what is no name and on a name that leads out of `folder`."""
    if type(name) is not str or not name:
        raise InputError(f"{where}: found {name!r:.60}, expected the name of an image")
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise InputError(f"{where}: image path {name + ending!r} leaves the folder {folder}")
    return os.path.join(folder, name + ending)


@contextlib.contextmanager
def collecting(faults):
    """Where `faults` is a list, add an InputError's text to it and go on; where it is None, raise the error."""
    try:
        yield
    except InputError as error:
        if faults is None:
            raise
        faults.append(str(error))


def parse_product(item, source, folder, where):
    """One entry of an annotation file -> Product. Raises InputError: where, what was found and what was expected."""
    name = f"{source} {need(item, 'id', where, int, str)}"
    one_image = source == "PolyvoreOutfits"  # its files hold a string in place of a list
    images = need(item, "images", where, str if one_image else list)
    paths = [image_path(folder, image, where) for image in ([images] if one_image else images)]
    if not paths:
        raise InputError(f"{where}: key 'images': found [], expected file names")
    labels = [("attributes_id", value) for value in need(item, "attributes_id", where, list)]
    labels += [(key, item[key]) for key in ("category_id", "subcategory_id") if item.get(key) is not None]
    for key, value in labels:
        if type(value) is not int or not 0 <= value < MAX_LABEL:
            raise InputError(f"{where}: key {key!r}: found {value!r:.60}, expected an id from 0 to {MAX_LABEL - 1}")
    paths = list(dict.fromkeys(paths))  # a photo that stands twice is no other view of itself
    text = ".".join(need(item, key, where, str) for key in SETS[source].text)
    numbers = item["attributes_id"], item.get("category_id"), item.get("subcategory_id")
    return Product(name, paths, text, *numbers, item["title"])


def load_products(root, source, part, faults=None):
    """The products of one data set and part. Raises InputError for a faulty entry; `faults` as in `collecting`."""
    path = Path(root, source, SETS[source].files[part])
    folder = os.path.join(root, source, SETS[source].images.format(part=part))
    products = {}  # by name
    for i, item in enumerate(read_json(path, list)):
        where = f"{path}: entry {i}"
        with collecting(faults):
            product = parse_product(item, source, folder, where)
            if product.name in products:
                raise InputError(f"{where}: id {item['id']!r:.60} stood before; ids must be unique")
            products[product.name] = product
    return list(products.values())


def load_pretraining(root, sets=tuple(SETS)):
    """The training products of the sets in one list; training picks uniformly from it (docs/recipe.md "Data sets")."""
    if not sets or not set(sets) <= set(SETS) or len(set(sets)) < len(sets):
        raise InputError(f"sets: found {sets}, expected some of {', '.join(SETS)}, each once")
    return [product for name in sets for product in load_products(root, name, "train")]


def absolute_paths(path):
    """The absolute paths of `path`: as it is named and, if that is another, with every link followed.

    A link to a photo, to a folder of photos or to a data set belongs to what is beside the one or the other."""
    return [*map(Path, dict.fromkeys([os.path.abspath(path), os.path.realpath(path)]))]


def load_titles(folder):
    """{path below it: (product id, title)} of a data set's image folder, {} of another. Faulty entries are left out."""
    titles = {}
    for images in absolute_paths(folder):
        source, root = images.parent.name, images.parent.parent
        for part, file in SETS[source].files.items() if source in SETS else ():
            if images.name == SETS[source].images.format(part=part) and (images.parent / file).exists():
                for product in load_products(root, source, part, faults=[]):
                    named = product.name.removeprefix(f"{source} "), product.title
                    titles |= {os.path.relpath(path, images): named for path in product.images}
        if (images.parent / POLYVORE_ITEMS).exists():
            for item, row in load_polyvore_items(images.parent, faults=[])[0].items():
                titles[f"{item}.jpg"] = item, str(row.get("title", ""))
    return titles


def label_names(root, task):
    """{what: [name of number 0, of number 1, ...]} of the numbers that a task's model learns; {} where no file says it.

    ROOT/labels.json names pseudo-attributes, categories and sub-categories. Polyvore's categories have public ids.
    Raises InputError where names are no list of texts."""
    if task == "polyvore":
        return {"Polyvore categories": [*map(str, load_polyvore_items(Path(root, "PolyvoreOutfits"))[1])]}
    keys = {"pretrain": "attributes", "fashiongen_category": "categories", "fashiongen_subcategory": "subcategories"}
    path, what = Path(root, "labels.json"), keys.get(task)
    names = read_json(path, dict).get(what, []) if path.exists() else []
    if type(names) is not list or not all(type(name) is str for name in names):
        raise InputError(f"{path}: key {what!r}: found {names!r:.60}, expected a list of names in numerical order")
    return {what: names} if names else {}


def count_labels(products, key, limit=0):
    """Number of rows of a head for the products' label `key`, which all have: `limit`, or with 0 the largest id + 1.
    `key` is "attributes", "category" or "subcategory". Raises InputError on an id of `limit` or more."""
    labels = [getattr(product, key) for product in products]
    tops = [max(ids, default=-1) for ids in labels] if key == "attributes" else labels
    largest = max(tops, default=-1)
    if limit and largest >= limit:
        name = products[tops.index(largest)].name
        raise InputError(f"{name}: {key} id {largest}, expected below {limit}; check the label file or n_{key}")
    return limit or largest + 1


def with_label(products, key, what):
    """The products that have a label `key`, and a printed line where some have none. Raises InputError if all lack it.

    what: the part of the data, for the message."""
    kept = [product for product in products if getattr(product, key) is not None]
    if not kept:
        raise InputError(f"{what}: no product has a {key}_id, which this task needs")
    if len(kept) < len(products):
        print(f"{what}: {len(products) - len(kept)} of {len(products)} products have no {key}_id and are left out")
    return kept


@functools.cache
def list_images(folder):
    """{name without ending: paths of the files that have it, .jpg first} of a folder; {} where there is no folder."""
    paths = {}
    for path in sorted(Path(folder).glob("*"), key=lambda path: (path.suffix != ".jpg", path.name)):
        paths.setdefault(path.stem, []).append(str(path))
    return paths


def fashioniq_image(root, garment, name, where):
    """Path of the FashionIQ image `name`, of any ending: in images/, or in its folder GARMENT, train, val or test.

    Empty files are passed over. Where there is none, it is images/NAME.jpg. Raises InputError as `image_path`."""
    images = os.path.join(root, "FashionIQ", "images")
    missing = image_path(images, name, where, ".jpg")
    for place in ("", garment, "train", "val", "test"):
        folder, stem = os.path.split(os.path.join(images, place, name))
        for path in list_images(folder).get(stem, ()):
            if os.path.isfile(path) and os.path.getsize(path):
                return path
    return missing


class FashionIQ(NamedTuple):
    queries: list  # of {"image": path of the reference, "image2": path of the target, "text", "target", "name"}
    gallery: dict  # {name: path} of the images to search in; "target" of a query is one of the names


def load_fashioniq(root, garment, part, gallery="original", faults=None):
    """The `FashionIQ` of one class and part, train or val. Source: docs/recipe.md "Text-guided image retrieval".
    gallery: "original" is every image of the split file, "val" all references and targets. The authors' extended files
    name the gallery themselves: it is the targets of all rows. Raises InputError; `faults` as in `collecting`."""
    folder = Path(root, "FashionIQ")
    path = folder / "captions" / f"cap.{garment}.{part}.json"
    rows, queries, images = read_json(path, list), [], {}  # images: the gallery
    # The authors' own files have rows of all classes, and fake rows, which only add their target to the gallery.
    extended = isinstance(rows[0], dict) and "fake_data" in rows[0]
    for i, row in enumerate(rows):
        where = f"{path}: entry {i}"
        with collecting(faults):
            target = need(row, "target", where, str)
            if extended and row.get("garment_class", garment) not in (garment, FASHIONIQ_CLASSES.index(garment)):
                continue  # a row of another class
            images[target] = image2 = fashioniq_image(root, garment, target, where)
            if extended and need(row, "fake_data", where, bool):
                continue
            candidate, captions = need(row, "candidate", where, str), need(row, "captions", where, list)
            image = fashioniq_image(root, garment, candidate, where)
            if not all(type(caption) is str for caption in captions) or not "".join(captions).strip():
                raise InputError(f"{where}: key 'captions': found {captions!r:.60}, expected texts")
            if candidate == target:
                raise InputError(f"{where}: candidate and target are {target!r:.60}, expected two images")
            if not extended:
                images[candidate] = image
            text = ", ".join(captions)
            queries.append({"image": image, "image2": image2, "text": text, "target": target, "name": where})
    if gallery == "original" and not extended:
        path = folder / "image_splits" / f"split.{garment}.{part}.json"
        images = {}
        for i, name in enumerate(read_json(path, list)):
            with collecting(faults):
                images[name] = fashioniq_image(root, garment, name, f"{path}: entry {i}")
    with collecting(faults):
        missing = {query["target"] for query in queries} - set(images)
        if missing:
            raise InputError(f"{path}: target {min(missing)} stands in no row of the gallery ({len(missing)} such)")
    return FashionIQ(queries, images)


def load_polyvore_items(folder, faults=None):
    """({item id: its metadata}, {category id, an int: its number}) of a PolyvoreOutfits folder. The numbers follow the
    released checkpoint's order where POLYVORE_CATEGORIES knows them all, else the ascending order of their ids."""
    path, metadata = Path(folder, POLYVORE_ITEMS), {}
    for item, row in read_json(path, dict).items():
        with collecting(faults):
            where = f"{path}: item {item!r:.60}"
            text = need(row, "category_id", where, str)
            if not text.isdecimal():
                raise InputError(f"{where}: category_id: found {text!r:.60}, expected a whole number")
            metadata[item] = row
    order = sorted({int(row["category_id"]) for row in metadata.values()})
    if set(order) <= set(POLYVORE_CATEGORIES):
        order = POLYVORE_CATEGORIES
    return metadata, {category: i for i, category in enumerate(order)}


class PolyvoreCategories:
    """The fine categories of a PolyvoreOutfits folder, numbered as in training. n: how many the checkpoint knows."""

    def __init__(self, folder, n):
        self.folder, self.names = Path(folder), {}  # {a category's name or id: its numbers}
        self.images = os.path.realpath(self.folder / "images")
        self.metadata, self.number = load_polyvore_items(folder)
        if len(self.number) != n:
            found = f"{len(self.number)} categories, but the checkpoint's CSA-Net has {n}"
            raise InputError(f"{folder}: {found}; expected the folder of its training")
        for row in self.metadata.values():
            for name in (row["category_id"], str(row.get("semantic_category", row["category_id"]))):
                self.names.setdefault(name, set()).add(self.number[int(row["category_id"])])

    def numbers(self, name):
        """The sorted numbers of a category's name or id. Polyvore's coarse names have several.

        "shoe" and "Shoes" are one name. Raises InputError, with all names, for a name that no item has."""
        wanted = name.lower().removesuffix("s")
        found = [numbers for known, numbers in self.names.items() if known.lower().removesuffix("s") == wanted]
        if not found:
            shown = sorted(known for known in self.names if not known.isdigit()) or sorted(self.names, key=int)
            raise InputError(f"category: found {name!r}, expected one of {', '.join(shown)}, or an id of {self.folder}")
        return sorted(set().union(*found))

    def of_image(self, path):
        """The number of the item whose photo a file of images/ is, or a link to one; -1 for other files."""
        for place in absolute_paths(path):
            item = self.metadata.get(place.stem)
            if item and os.path.realpath(place.parent) == self.images:
                return self.number[int(item["category_id"])]
        return -1


class Polyvore(NamedTuple):
    outfits: list  # of {"items": the question, "blank": its id, "blank_item", "fake", "name"}; item: (path, category)
    n_categories: int


def load_polyvore(root, split, part, faults=None):
    """The `Polyvore` of one split and one part, train or test. Source: docs/recipe.md "Outfit completion".
    Raises InputError on bad files; `faults` as in `collecting`."""
    folder = Path(root, "PolyvoreOutfits")
    metadata, number = load_polyvore_items(folder, faults)
    path, outfits = folder / f"ocir_{split}_{part}.json", []
    for i, row in enumerate(read_json(path, list)):
        where = f"{path}: entry {i}"
        with collecting(faults):
            question, blank = need(row, "question", where, list), need(row, "blank", where, str)
            ids = [*question, blank]
            paths = [image_path(folder / "images", item, where, ".jpg") for item in ids]
            unknown = [item for item in ids if item not in metadata]
            if unknown or not question:
                raise InputError(f"{where}: item {unknown[:1]} is not in {POLYVORE_ITEMS}, or the question is empty")
            if part == "train" and set(question) == {blank}:
                raise InputError(f"{where}: blank {blank!r:.60} is the only item of the question, expected two items")
            fake = need(row, "fake_data", where, bool) if part == "test" else False
            if part == "test" and not fake and blank in question:
                raise InputError(f"{where}: blank {blank!r:.60} stands in its question, expected it missing there")
            categories = [number[int(metadata[item]["category_id"])] for item in ids]
            *items, last = zip(paths, categories, strict=True)
            outfits.append({"items": items, "blank": blank, "blank_item": last, "fake": fake, "name": where})
    return Polyvore(outfits, len(number))
