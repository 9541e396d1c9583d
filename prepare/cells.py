"""The cells of a product's row: texts without markup, and the files of its images."""

import ast
import contextlib
import functools
import html
import json
import os
import re
import unicodedata
from pathlib import Path
from urllib.parse import unquote, urlsplit

from prepare.layout import check_printable

ADDRESS = r"([a-z]+:)?//|data:"
FIELD = r"\{([^{}]+)\}"  # a column in a template of --images, perhaps with a format: {id} or {id:.3}
# What programs write into an empty cell: marks alone, one of these words among marks, \N, an error of a spreadsheet.
NO_VALUE = r"[\W_]*((nan?|n\Wa|null|none|nil|nat|undefined)[\W_]*)?|\\N|-?1\.#\w+|#[A-Z/0]+[!?]"
MARKUP = r"""<(style|script)\b.*?(</\1\s*>|$)|<!--.*?(-->|$)|<!\[CDATA\[|\]\]>|<[a-z/!]([^<>"']|"[^"<]*"|'[^'<]*')*>"""
CUT_OFF = r"<[a-z/!][^<>]*>|<[a-z]+\s[^<>]*=[^<>]*$"  # tags with a quote that is not closed, or without an end
# A backslash and r, n or t. A single one between lower-case letters is left, as in black\navy.
LINE_END = r"(\\+[rnt]){2,}|\\{2,}[rnt]|\\[rnt](?![a-zß-ÿ])|(?<=[.!?:;>)])\\[rnt]|(?<=[.!?:;>)] )\\[rnt]"


def plain_text(text):
    """Text in Unicode's form NFC without HTML's tags and entities, its white space as single spaces."""
    text = text.encode("utf-8", "replace").decode()  # half an emoji, which JSON may hold, cannot be written to a file
    # a shop that ends lines by \r\n writes all its line ends, so that none is a part of a text
    text = re.sub(r"(\\+[rnt])+" if r"\r\n" in text else LINE_END, " ", text)
    for _ in range(3):  # feeds escape their HTML once or twice
        text = re.sub(f"{MARKUP}|{CUT_OFF}", " ", text, flags=re.IGNORECASE | re.DOTALL)
        text = re.sub(r"&#?\w+;", lambda entity: html.unescape(entity[0]), text)
    return " ".join(unicodedata.normalize("NFC", text).split())


def is_no_value(cell):
    """Whether a cell is filled with what stands for no value."""
    text = str(cell).strip() if isinstance(cell, (str, float)) else ""
    return 0 < len(text) < 20 and bool(re.fullmatch(NO_VALUE, text, re.IGNORECASE))


def read_cell(cell):
    """A list or an object that stands in a cell as text, as JSON or Python write it; other cells as they are."""
    if isinstance(cell, str) and re.fullmatch(r"\s*(\[.*\]|\{.*\})\s*", cell, re.DOTALL):
        for read in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                return read(cell.strip())
    return cell


def as_text(value):
    """A text or a number as text, without the .0 of a whole number that stood in a column of floats."""
    return "" if value is None else re.sub(r"^(-?\d+)\.0$", r"\1", str(value))


def join_texts(value, language):
    """One text of a text, a number or a list of them, such as paragraphs. Of texts by language those of `language`.

    By language: {"en": "red"}, or in a list {"language_tag": "en_US", "value": "red"}. Raises ValueError on others."""
    value, parts = read_cell(value), []
    if not isinstance(value, (list, dict)):
        return as_text(value)
    for part in value if isinstance(value, list) else [value]:
        if not isinstance(part, dict):
            parts.append(("", part))
        elif mark := next((key for key in part if re.search("lang|locale", key)), None):
            texts = [text for key, text in part.items() if key != mark and isinstance(text, (str, list))]
            parts += [(str(part[mark]), text) for text in texts[-1:]]
        elif all(re.fullmatch(r"[a-z]{2}([-_]\w+)*", key) for key in part):
            parts += part.items()
        elif len(part) == 1:
            parts += [("", text) for text in part.values()]
        else:
            raise ValueError(f"found {value!r:.60}, expected text")
    spoken = sorted({code for code, _ in parts if code})
    if spoken and not language:
        raise ValueError(f"found texts by language ({', '.join(spoken)}); set --language={spoken[0][:2]}")
    chosen = [code for code in spoken if re.match(rf"{re.escape(language)}(?![a-z])", code, re.IGNORECASE)]
    return " ".join(join_texts(text, language) for code, text in parts if code in ("", *chosen[:1]))


def read_row(row, config):
    """(id, {setting: text}) of a row. Raises ValueError on what no product has."""
    texts = {}
    for name in ("id", "title", "description", "category", "subcategory"):
        try:
            texts[name] = plain_text(join_texts(row.get(getattr(config, name)), config.language))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    key = texts.pop("id")
    if re.fullmatch(r"\d([.,]\d+)?E[+]\d+", key, re.IGNORECASE):
        raise ValueError(f"id {key} was shortened by a spreadsheet; export this column as text")
    check_printable(key, "id")
    return key, texts


def split_names(cell, separator):
    """The images in a cell: text with separators between them, or a list, also as text. Each is a list of its names.

    An image that is an object, as shops' programs give them, has several: {"thumb": ..., "large": ...}.
    Raises ValueError on others."""
    value = read_cell(cell)
    if isinstance(value, str) and re.fullmatch(r"\s*\[.*\]\s*", value, re.DOTALL):
        raise ValueError(f"images: found {value!r:.60}, expected a list of file names")
    images = value.split(separator) if isinstance(value, str) else value if isinstance(value, list) else [value]
    found = []
    for image in images:
        names = [text for key, text in image.items() if key != "alt"] if isinstance(image, dict) else [image]
        names = [name.strip() for name in names if isinstance(name, str)]
        if not names and image is not None:
            raise ValueError(f"images: found {value!r:.60}, expected file names")
        found += [names] if any(names) else []
    return found


class _Cell(str):
    """A cell in a template. It is a number where its format has a zero before the width: {id:010}, or a d."""

    def __format__(self, spec):
        is_number = self.isdecimal() and re.fullmatch(r"0\d+d?|d", spec)
        return format(int(self) if is_number else str(self), spec)


def column_of(field):
    """The column that a field of a template names: id of id:.3, id[0] or id!s."""
    return re.split(r"[:!\[]", field)[0]


def image_columns(images, columns):
    """The columns that the setting `images` names: itself, or those of a template. They need not be in `columns`."""
    if images in columns:
        return [images]
    return [field if field in columns else column_of(field) for field in re.findall(FIELD, images)] or [images]


def image_names(row, config):
    """The images of a row, as `split_names` gives them, from its column or by a template such as images/{id}.jpg.

    A template is filled with each name of a cell, by Python's formats. It gives none where its cell is empty.
    Raises ValueError."""
    if config.images in row or "{" not in config.images:
        return split_names(row.get(config.images), config.separator)
    names = config.images.split(config.separator)
    for field in re.findall(FIELD, config.images):
        column = field if field in row else column_of(field)
        cell = row[column]
        images = split_names(cell if isinstance(cell, (list, dict)) else as_text(cell), config.separator)
        try:
            values = [("{0" + field[len(column) :] + "}").format(_Cell(image[0])) for image in images]
        except (ValueError, LookupError, AttributeError) as error:
            raise ValueError(f"images: {{{field}}} of {cell!r:.60}: {error}") from None
        mark = f"{{{field}}}"
        names = [name.replace(mark, value) for name in names for value in (values if mark in name else [""])]
    return [[name.strip()] for name in names]


@functools.cache
def listing(folder):
    """{a name without its form: all such names in a folder}. Names of one form differ in Unicode, case or escapes."""
    found = {}
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        found.setdefault(without_form(name), []).append(name)
    return found


def without_form(name):
    return " ".join(unicodedata.normalize("NFKC", html.unescape(unquote(name))).casefold().split())


def find_file(folder, name):
    """The path of the file `name` in a folder, or of the only one whose name differs in its form alone; or None."""
    path = Path(folder)
    for part in Path(name).parts:
        if not os.path.exists(path / part):
            similar = listing(path).get(without_form(part), [])
            part = similar[0] if len(similar) == 1 else part
        path = path / part
    return path if os.path.exists(path) else None


def image_file(names, folders, config, addresses):
    """The path of an image of a row, under the first of its `names` that is there. With --photos an address stands for
    the file of its last part, or parts. addresses: {path: the address it stood for}, which this function fills.

    Raises ValueError on an address without a file, on two for one file, and where open_image would say less."""
    for name in names:
        check_printable(name, "images")
        unix = name.replace("\\", "/")  # Windows writes backslashes
        places = [name, unix, unix.lstrip("/")]  # Magento begins a path in its folder with a slash
        url = urlsplit(name if re.match(ADDRESS, name, re.IGNORECASE) else "")
        if url.path and config.photos:
            parts = f"{url.netloc}{url.path}".split("/")
            places = ["/".join(parts[i:]) + query for query in (f"?{url.query}", "") for i in range(len(parts))]
        for path in filter(None, (find_file(folder, place) for folder in folders for place in places)):
            if addresses.setdefault(path, url.path) != url.path:
                raise ValueError(f"images: {path} stands for two addresses, {addresses[path]!r} and {url.path!r}")
            return path
    name = names[0]
    if re.match(ADDRESS, name, re.IGNORECASE):
        cure = "write the name of the file there, or name the folder that holds it by --photos=FOLDER"
        raise ValueError(f"images: {name!r:.80} is an address; download first, and {cure}")
    if re.match(r"[a-z]:[\\/]", name, re.IGNORECASE):
        raise ValueError(f"images: {name!r:.80} is a path of another computer; write it as seen from --photos")
    path = folders[0] / name
    if re.search(r"[,;|]", name):
        cure = f"between several images stands --separator ({config.separator!r})"
        raise ValueError(f"images: no file {str(path)!r}; {cure}")
    return path
