"""Files of a data root: written aside, copied or linked, labels numbered. All scripts of this folder use these."""

import collections
import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from plumbing import annotations
from plumbing.settings import InputError


@contextlib.contextmanager
def written_aside(out):
    """A hidden folder beside `out` that takes its name when the block ends well and is removed when it does not.

    Raises InputError where `out` is there already and not an empty folder."""
    out = Path(out).absolute()
    if out.is_symlink() or out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out}: is there already, expected a new or empty folder; name another or remove it")
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        yield aside
        aside.replace(out)
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
    keys, count = {path: str(path) for path in paths}, collections.Counter(sizes.values())
    for path, size in sizes.items():
        if size and count[size] > 1:
            with open(path, "rb") as file:
                keys[path] = hashlib.file_digest(file, "sha256").hexdigest()
    return keys


def check_printable(text, where):
    """Raise InputError where a name would spoil a message or a path: control characters, half a surrogate pair."""
    if re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", text):
        raise InputError(f"{where}: found {text!r:.60}, expected no control characters")
