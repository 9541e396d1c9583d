"""The rows of a file of products, as shops and spreadsheets write it. prepare/catalogue.py makes products of them."""

import ast
import codecs
import csv
import io
import json
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # annotations.py and settings.py stand one folder up

from annotations import check_printable  # noqa: E402
from files import not_the_file  # noqa: E402
from settings import InputError  # noqa: E402

COLUMNS = ("id", "images", "title", "description", "category", "subcategory")  # settings that name a column
FIELD = r"\{([^{}]+)\}"  # a column in a template of --images


class _Text(HTMLParser):
    """The text of a piece of HTML, without styles and scripts; a tag separates words."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts, self.hidden = [], ""

    def handle_starttag(self, tag, attributes):
        self.parts.append(" ")
        if tag in ("style", "script"):
            self.hidden = tag

    def handle_endtag(self, tag):
        self.parts.append(" ")
        if tag == self.hidden:
            self.hidden = ""

    def handle_data(self, text):
        if not self.hidden:
            self.parts.append(text)


def plain_text(text):
    """Text without HTML's tags and entities, its white space as single spaces."""
    if re.search(r"<[a-zA-Z/!][^<>]*>|&#?\w+;", text):
        parser = _Text()
        parser.feed(text)
        parser.close()
        text = "".join(parser.parts)
    return " ".join(text.split())


def read_text(path):
    """The text of a file in UTF-8, or in UTF-16 with its mark, as Excel writes it. Raises InputError on others."""
    cure = "save it as UTF-8 text (in Excel: CSV UTF-8)"
    try:
        content = Path(path).read_bytes()
        marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if marked else "utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        problem = not_the_file(path) or f"line {line}: {content[error.start : error.end]} is no UTF-8; {cure}"
        raise InputError(f"{path}: {problem}") from None
    problem = not_the_file(path)
    if "\0" in text:
        problem = f"found a zero character, which no text has; {cure}"
    if problem:
        raise InputError(f"{path}: {problem}")
    return text


def guess_separator(first_line):
    """The mark that cuts the first line of a CSV file into most cells: a comma, a semicolon, a tab or a bar."""
    return max(",;\t|", key=lambda mark: len(next(csv.reader([first_line], delimiter=mark))))


def read_csv(path, config):
    """The rows of a CSV file as dicts; cells beyond the columns stand under None. Empty rows are left out.

    Raises InputError where a quote is not closed or closes in another row, and on two columns of one name."""
    text = read_text(path)
    excel = re.match(r'"?sep=([^\w"\r\n])"?[\r\n]+', text)  # Excel's own first line
    if excel:
        text = text[excel.end() :]
    separator = excel[1] if excel else guess_separator(re.match(r"[^\r\n]*", text.lstrip())[0])
    csv.field_size_limit(2**31 - 1)  # descriptions can be longer than csv's own limit
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True)
    columns, rows, begin = [], [], 1
    try:
        for cells in reader:
            if not columns:
                columns = [" ".join(name.split()) for name in cells]
            elif any(cells):
                if any(holds_row(cell, columns, separator, config.images) for cell in cells):
                    raise csv.Error("a cell holds other rows")
                row = dict(zip(columns, cells, strict=False))
                if len(cells) > len(columns):
                    row[None] = cells[len(columns) :]
                rows.append(row)
            begin = reader.line_num + 1
    except csv.Error as error:
        cure = 'double each quote (") inside a cell, and close each cell that begins with one'
        raise InputError(f"{path}: the row of line {begin + bool(excel)}: {error}; {cure}") from None
    for name in (getattr(config, name) for name in COLUMNS):
        if columns.count(name) > 1:
            raise InputError(f"{path}: found {columns.count(name)} columns {name!r}, expected one; rename the others")
    return rows


def holds_row(cell, columns, separator, images):
    """Whether a later line of a cell is a row of the file, with an image in its place: a quote was not closed."""
    lines = [line.split(separator) for line in cell.split("\n")[1:]] if images in columns else []
    rows = [line for line in lines if len(line) == len(columns)]
    return any(re.fullmatch(r".+\.(jpe?g|png|webp|gif)", row[columns.index(images)].strip(), re.I) for row in rows)


def read_json_rows(path):
    """The rows of a file of JSON lines, or of one JSON list. Raises InputError naming the line that cannot be read."""
    text, rows = read_text(path).strip(), []
    is_list = text.startswith("[")
    for number, line in enumerate([text] if is_list else text.split("\n"), 1):
        line = line.strip().removesuffix(",")  # a line that was cut out of a list
        try:
            value = json.loads(line or "[]", parse_constant=lambda name: None)  # NaN is no text
        except (ValueError, RecursionError) as error:
            where = "" if is_list else f"line {number}: "
            raise InputError(f"{path}: {where}{error}; expected UTF-8, a .csv or one JSON object a line") from None
        rows += value if is_list else [value] if line else []
    return rows


def read_rows(config):
    """The rows of config.products as dicts: of CSV where it ends in .csv, .tsv or .txt, else of JSON."""
    path = config.products
    is_csv = Path(path).suffix.lower() in (".csv", ".tsv", ".txt")
    rows = read_csv(path, config) if is_csv else read_json_rows(path)
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: found {'a line that is no object' if rows else 'no product'}, expected products")
    return rows


def read_list(text):
    """A list that stands in a cell, as JSON or Python write it. Raises ValueError on another text."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise ValueError(f"images: found {text!r:.60}, expected a list of file names")


def image_names(row, config):
    """The names of a row's images, from its column or by a template such as images/{id}.jpg. Raises ValueError."""

    def fill(field):
        if row.get(field[1]) in (None, ""):
            raise ValueError(f"column {field[1]!r} is empty, and --images needs it")
        return str(row[field[1]])

    if config.images not in row and "{" in config.images:
        return [re.sub(FIELD, fill, name) for name in config.images.split(config.separator)]
    names = row.get(config.images) or []
    if isinstance(names, str) and re.fullmatch(r"\s*\[.*\]\s*", names, re.S):
        names = read_list(names.strip())
    names = names.split(config.separator) if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"images: found {names!r:.60}, expected file names")
    return [name.strip() for name in names if name.strip()]


def image_file(name, folder, separator):
    """The path of an image that a row names. Raises ValueError on an address and where it says more than open_image."""
    check_printable(name, "images")
    path = folder / name
    if os.path.exists(path):
        return path
    if re.match(r"([a-z]+:)?//|data:", name, re.I):
        raise ValueError(f"images: {name!r:.80} is an address; download first, and write the name of the file there")
    if os.path.exists(folder / name.replace("\\", "/")):  # written on Windows
        return folder / name.replace("\\", "/")
    if re.match(r"[a-z]:[\\/]", name, re.I):
        raise ValueError(f"images: {name!r:.80} is a path of another computer; write it as seen from --image_folder")
    if re.search(r"[,;|]", name):
        raise ValueError(f"images: no file {str(path)!r}; between several images stands --separator ({separator!r})")
    return path
