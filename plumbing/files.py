"""Files are written whole or not at all, and every fault of one that is read becomes a line that names it."""

import contextlib
import hashlib
import json
import os
import reprlib
import tempfile
from pathlib import Path

from plumbing.settings import InputError


def not_the_file(path):
    """What a file is that a download left in the place of another, as a text for a message; "" for other files."""
    try:
        with open(path, "rb") as file:
            head = file.read(4096).replace(b"\0", b"").lstrip(b"\xff\xfe\xef\xbb\xbf \r\n\t").lower()  # UTF-8 or UTF-16
    except OSError:
        return ""
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself; run `git lfs pull` where it came from"
    before, drawing, _ = head.partition(b"<svg")
    if head.startswith(b"<") and drawing and b"html" not in before:  # a web page can hold a drawing
        return "a drawing (SVG), no photo; export it as PNG"
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<meta", b"<script", b"<!--")):
        return "a web page, not the file itself; download it again, perhaps by hand in a browser"
    if head[:12].partition(b"ftyp")[2][:3] in (b"hei", b"hev", b"mif"):
        return "a HEIC photo, as phones take them; save it as JPEG (heif-convert does that)"
    xml_error = head.startswith(b"<?xml") and b"<error" in head
    if xml_error or head.startswith((b"<error", b"entry not found", b"404: not found")):
        return "what a server answered, not the file itself; see what stands in it, and download it again"
    if head.startswith(b"\x1f\x8b"):
        return "packed by gzip; unpack it first (gunzip)"
    return ""


@contextlib.contextmanager
def reading(path, problem):
    """Turn whatever a reader raises on a damaged or hostile file into one InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        cause = f"{shown(error.args[0])} is missing" if isinstance(error, KeyError) else cause_of(error)
        said = not_the_file(path) or f"{problem}: {cause}"
        raise InputError(f"{path}: {said}") from None


def cause_of(error):
    """One line of an exception's text; of torch's long advice about weights_only, the part that says what was found."""
    text = getattr(error, "strerror", None) or str(error)
    for advice_ends in ("WeightsUnpickler error:", "from a trusted source."):
        text = text.partition(advice_ends)[2] or text
    return text.strip().partition("\n")[0][:300] or type(error).__name__


def shown(value):
    """A short text of any value of a file; its full text can be endless where it holds itself many times."""
    return reprlib.repr(value)[:80]


@contextlib.contextmanager
def writing(path):
    """Turn what the disk refuses while `path` is written into one line, an InputError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        while not isinstance(error, OSError) and error.__context__:  # torch's writer hides what the disk said
            error = error.__context__
        raise InputError(f"{path}: cannot be saved: {cause_of(error)}; what was there before is unharmed") from None


def check_place(path, name):
    """Raise InputError where no file can be written to `path`, so that a run stops before its work.

    name: the setting that can name another place."""
    cause = "it is a folder" if os.path.isdir(path) else ""
    try:
        tempfile.TemporaryFile(dir=Path(path).absolute().parent).close()
    except OSError as error:
        cause = cause_of(error)
    if cause:
        raise InputError(f"{path}: cannot be written there: {cause}; set --{name}=FILE to where it can")


@contextlib.contextmanager
def replacing(path):
    """A binary file that is written aside in the same folder, flushed to disk, and only then gets its name `path`.

    Raises InputError on a full disk, a missing folder or permission. The last whole file stays, no half one."""
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    try:
        with writing(path):
            with open(aside, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def write_json(path, value):
    """Write `value` as JSON. A reader never sees half a file."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def checksum(model):
    """A short text that stands for a model's weights."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
