"""A data root: what goes to train and to val, labels numbered, files copied or linked and written aside."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from plumbing import annotations
from plumbing.files import writing
from plumbing.settings import InputError

MANY = 10  # titles of products that share a photo, from which on it is a size chart, a logo or the like


@contextlib.contextmanager
def written_aside(out):
    """A hidden folder whose content stands in `out` when the block ends well and is removed when it does not.

    It is made beside `out`, or in it where that is there already: a mounted volume has no place beside it.
    Raises InputError where `out` holds something, cannot be written, or the disk gets full."""
    out = Path(out).absolute()
    is_there = out.is_dir() and not out.is_symlink()
    if not is_there and os.path.lexists(out) or is_there and {*os.listdir(out)} - {"lost+found"}:  # of a new disk
        raise InputError(f"{out}: is there already, expected a new or empty folder; name another or remove it")
    aside = (out if is_there else out.parent) / f".{out.name}.{os.getpid()}"
    with writing(out):
        aside.mkdir(parents=True)
    try:
        yield aside
        if is_there:
            for path in aside.iterdir():
                path.replace(out / path.name)
        else:
            aside.replace(out)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"{out}: the disk is full; nothing is left there of what was written") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # gone by now, or half-written


def place(source, target, link=False):
    """Copy (contents alone: a read-only original is no hindrance) or link a file to where it shall stand."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        target.symlink_to(os.path.abspath(source))
    else:
        shutil.copyfile(source, target)


def write_together(values):
    """Write {path: JSON value}: all aside, then all renamed, so that an error on the way changes none of them."""
    for path, value in values.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{path}.tmp").write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in values:
        Path(f"{path}.tmp").replace(path)


def read_labels(root):
    """ROOT/labels.json, the names that attributes_id, category_id and subcategory_id index; {} where there is none."""
    path = Path(root, "labels.json")
    return annotations.read_json(path, dict) if path.exists() else {}


def number_labels(items, key):
    """Replace each item's name under `key` by its number under `<key>_id`, in the order of names; returns the names."""
    names = sorted({item[key] for item in items} - {""})
    number = {name: i for i, name in enumerate(names)}
    for item in items:
        name = item.pop(key)
        if name:
            item[f"{key}_id"] = number[name]
    return names


def content_keys(paths):
    """{path: a text that two paths share where both files hold the same bytes}; it is the path where there is no other.

    Only files of one size are compared, by their hashes. Missing and empty files are like no other."""
    sizes = {path: os.path.getsize(path) for path in paths if os.path.isfile(path)}
    keys, count = {path: str(path) for path in paths}, Counter(sizes.values())
    for path, size in sizes.items():
        if size and count[size] > 1:
            with open(path, "rb") as file:
                keys[path] = hashlib.file_digest(file, "sha256").hexdigest()
    return keys


def check_printable(text, where):
    """Raise InputError where a name would spoil a message or a path: control characters, half a surrogate pair."""
    if re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", text):
        raise InputError(f"{where}: found {text!r:.60}, expected no control characters")


def leave_out_shared(items, keys):
    """The items without photos that stand in products of MANY titles, and without products that have no others.

    keys: {path: a text that copies of a photo share}. Prints what is left out. Raises InputError where all is."""
    products = defaultdict(list)
    for item in items:
        for key in {keys[path] for path in item["images"]}:
            products[key].append(item)
    shared = {key for key, part in products.items() if len({item["title"].casefold() for item in part}) >= MANY}
    for key in shared:
        one = products[key][0]
        name = next(path.name for path in one["images"] if keys[path] == key)
        print(f"the photo {name} of id {one['id']} stands in {len(products[key])} products of several titles")
    for item in items:
        item["images"] = [path for path in item["images"] if keys[path] not in shared]
    kept = [item for item in items if item["images"]]
    if len(kept) < len(items):
        gone = next(item["id"] for item in items if not item["images"])
        print(f"{len(items) - len(kept)} products have no other photo and are left out, such as id {gone}")
    if shared:
        print(f"{len(shared)} photos are left out, as they show no product; --keep_shared keeps them")
    if not kept:
        raise InputError("images: all products share photos with many others; set --keep_shared to keep these")
    return kept


def find_groups(items, keys, by_text):
    """Lists of the numbers of products that share a photo, with `by_text` also those that share all of their text.

    They may share it under two names, and by way of a third product."""
    parent, first = list(range(len(items))), {}

    def find(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]  # shorter for the next search
            i = parent[i]
        return i

    for i, item in enumerate(items):
        for shared in [*(keys[path] for path in item["images"]), *[read_text(item)] * by_text]:
            parent[find(i)] = find(first.setdefault(shared, i))
    groups = defaultdict(list)
    for i in range(len(items)):
        groups[find(i)].append(i)
    return list(groups.values())


def read_text(item):
    """What two products must share to be alike to a model of texts."""
    return item["title"].casefold(), item["description"].casefold()


def choose_val(items, keys, n_val, seed):
    """The numbers of the items for val, `n_val` or a few less: products that share a photo or a text stay on one side.

    Texts do not count where val would become much smaller for that. Prints where val is not what was asked for.
    keys: as in `leave_out_shared`. Raises InputError where all products share photos."""
    same = [n for n in Counter(map(read_text, items)).values() if n > 1]
    if same:
        print(f"{sum(same)} of {len(items)} products share their text with others, in {len(same)} texts")
    for by_text in (True, False):
        groups, val = find_groups(items, keys, by_text), []
        np.random.default_rng(seed).shuffle(groups)
        for group in groups:
            if len(val) + len(group) <= n_val:
                val += group
        if len(groups) > 1 and 2 * len(val) >= n_val:
            break
        if by_text and same:
            print(
                "too many products share their text to keep all such on one side, so some texts of val stand in train"
            )
    if len(groups) == 1:
        raise InputError("images: all products share photos, so val cannot be another's; give each photos of its own")
    print(f"{len(items)} products, {len(groups)} groups that share no photo{' or text' * by_text}")
    val = val or min(groups, key=len)
    if len(val) != n_val:
        print(f"val has {len(val)} products and {n_val} were asked for, as groups stay together")
    n_large = sum(len(group) for group in groups if len(group) > n_val)
    if n_large:
        print(f"{n_large} products stand in groups larger than val shall be, so val has none of their kind")
    return val
