"""The rows of files of products, as shops, spreadsheets and data sets write them.

prepare/catalogue.py makes products of them."""

import ast
import codecs
import csv
import glob
import html
import io
import json
import os
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from plumbing.files import not_the_file
from plumbing.settings import InputError
from prepare.layout import check_printable

COLUMNS = ("id", "images", "title", "description", "category", "subcategory")  # settings that name a column
FIELD = r"\{([^{}]+)\}"  # a column in a template of --images
NO_VALUE = ("nan", "null", "none", "n/a", "#n/a")  # what pandas, databases and spreadsheets write into empty cells
BATCH = 32  # rows of a parquet file that are in memory at a time, with their photos


class Table(NamedTuple):
    """A file of products."""

    path: Path
    columns: list  # the names of all columns
    rows: object  # dicts {column: cell}, which can be read once


class _Text(HTMLParser):
    """The text of a piece of HTML, without styles and scripts; a tag separates words."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts, self.hidden = [], False

    def handle_starttag(self, tag, attributes):
        self.parts.append(" ")
        self.hidden = tag in ("style", "script")  # which hold no other tag

    def handle_endtag(self, tag):
        self.parts.append(" ")
        self.hidden = False

    def handle_data(self, text):
        if not self.hidden:
            self.parts.append(text)


def plain_text(text):
    """Text without HTML's tags and entities, its white space as single spaces."""
    text = text.encode("utf-8", "replace").decode()  # half an emoji, which JSON may hold, cannot be written to a file
    text = re.sub(r"(\\+[rnt])+", " ", text)  # WooCommerce writes the end of a line as a backslash and an n
    for _ in range(3):  # feeds escape their HTML once or twice
        text = re.sub(r"<!\[CDATA\[|\]\]>|<[a-zA-Z]+\s[^<>]*=[^<>]*$", " ", text)  # the last: a tag that is cut off
        if re.search(r"<[a-zA-Z/!][^<>]*>", text):
            parser = _Text()
            parser.feed(text)
            parser.close()
            text = "".join(parser.parts)
        else:
            text = re.sub(r"&#?\w+;", lambda entity: html.unescape(entity[0]), text)
    return " ".join(text.split())


def read_text(path):
    """The text of a file in UTF-8, or in UTF-16 with its mark, as Excel writes it. Raises InputError on others."""
    cure, problem = "save it as UTF-8 text (in Excel: CSV UTF-8)", not_the_file(path)
    try:
        content = Path(path).read_bytes()
        marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if marked else "utf-8-sig")
        if "\0" in text:
            problem = f"found a zero character, which no text has; {cure}"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        problem = problem or f"line {line}: {content[error.start : error.end]} is no UTF-8; {cure}"
    if problem:
        raise InputError(f"{path}: {problem}")
    return text.lstrip("\ufeff")  # a file that was saved twice may have the mark of UTF-8 twice


def read_csv(path, config):
    """The `Table` of a CSV file; cells beyond the columns stand under None. Empty rows are left out.

    Raises InputError where a quote is not closed or closes in another row."""
    text = read_text(path)
    excel = re.match(r'"?sep=([^\w"\r\n])"?[\r\n]+', text)  # Excel's own first line
    if excel:
        text = text[excel.end() :]
    first_row = re.match(r'("[^"]*"|[^"\r\n])*', text.lstrip())[0]
    # without Excel's line it is the mark that stands most often in the first row, outside of quotes
    separator = excel[1] if excel else max(",;\t|", key=re.sub(r'"[^"]*"', "", first_row).count)
    csv.field_size_limit(2**31 - 1)  # descriptions can be longer than csv's own limit
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True)
    columns, rows, begin = [], [], 1
    try:
        for cells in reader:
            if not any(columns):  # the first row that is not blank
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
    return Table(path, columns, rows)


def holds_row(cell, columns, separator, images):
    """Whether a later line of a cell is a row of the file, with an image in its place: a quote was not closed."""
    lines = [line.split(separator) for line in cell.split("\n")[1:]] if images in columns else []
    rows = [line for line in lines if len(line) == len(columns)]
    return any(re.fullmatch(r".+\.(jpe?g|png|webp|gif)", row[columns.index(images)].strip(), re.I) for row in rows)


def find_products(value, config):
    """The products of a JSON value: a list, one product, the only list in an object, or an object with ids as keys."""
    if isinstance(value, dict) and config.title not in value:
        lists = [part for part in value.values() if isinstance(part, list) and part and isinstance(part[0], dict)]
        if len(lists) == 1:
            return lists[0]
        parts = {key: part for key, part in value.items() if isinstance(part, dict)}
        if any(config.title in part for part in parts.values()) or len(parts) == len(value) > 1:
            return [{config.id: key, **part} for key, part in parts.items()]
        if len(parts) == 1:
            return find_products(*parts.values(), config)
    return value if isinstance(value, list) else [value]


def read_json(path, config):
    """The `Table` of a file of JSON lines, or one JSON value. Raises InputError naming a line that cannot be read."""

    def load(text, where=""):
        try:
            return json.loads(text, parse_constant=lambda name: None)  # NaN is no text
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: {where}{error}; expected UTF-8, a .csv or one JSON object a line") from None

    text = read_text(path).strip()
    try:
        rows = find_products(load(text), config)
    except InputError:
        if text.startswith("["):
            raise
        lines = [line.strip().removesuffix(",") for line in text.split("\n")]  # they may be cut out of a list
        rows = [load(line, f"line {number}: ") for number, line in enumerate(lines, 1) if line]
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: found a line that is no object, expected products")
    return Table(path, list(dict.fromkeys(column for row in rows for column in row)), rows)


def read_parquet(path, config, photos):
    """The `Table` of a parquet file. Its rows are read a few at a time, so memory does not grow with the file.

    Photos that lie in the file are written into the folder `photos`, as they came; the rows name them.
    Raises InputError without pyarrow and on a file that cannot be read, also while the rows are read."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: a parquet file needs the package pyarrow; pip install pyarrow") from None

    def stop(error):
        cause = str(error).partition("\n")[0]
        problem = not_the_file(path) or f"cannot be read as parquet ({cause}); fetch the file again"
        raise InputError(f"{path}: {problem}") from None

    def read():
        try:
            # With pyarrow's own choice of these settings several groups of rows are in memory at a time.
            with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**16) as file:
                for batch in file.iter_batches(BATCH, use_threads=False):
                    yield from batch.to_pylist()
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            stop(error)

    def name_photos():  # outside of `read`, so that a full disk is not taken for a broken file
        for number, row in enumerate(read()):
            if config.images in row:
                row[config.images] = write_photos(row[config.images], photos, f"{path.stem}_{number:07}")
            yield row

    try:
        columns = pyarrow.parquet.read_schema(path).names
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        stop(error)
    return Table(path, columns, name_photos())


def write_photos(cell, folder, stem):
    """The image cell of a parquet file -> what `image_names` reads: names as they are, of photos their new paths.

    A photo is bytes, or {"bytes": ..., "path": ...} as in Hugging Face's data sets. A cell may be a list of them."""
    if isinstance(cell, str) or cell is None:
        return cell
    names = []
    for view, image in enumerate(cell if isinstance(cell, list) else [cell]):
        image = image if isinstance(image, dict) else {"bytes" if isinstance(image, bytes) else "path": image}
        content, name = image.get("bytes"), image.get("path")
        if isinstance(content, bytes):
            ending = Path(name or "").suffix
            ending = ending if re.fullmatch(r"\.\w{2,5}", ending) else ".jpg"  # readers look at the content alone
            name = os.path.join(folder, f"{stem}_{view}{ending}")
            Path(name).write_bytes(content)
        if name is not None:
            names.append(name)
    return names


def find_files(products):
    """The paths of the file `products`, or of the parquet files of a folder or of a pattern such as data/*.parquet.

    Raises InputError where there is none, and where a folder lacks one of 00000-of-00003 to 00002-of-00003."""
    if not os.path.isdir(products) and ("*" not in products or os.path.exists(products)):
        return [Path(products)]
    is_folder = os.path.isdir(products)
    paths = sorted(Path(products).rglob("*.parquet") if is_folder else map(Path, glob.glob(products, recursive=True)))
    if not paths:
        raise InputError(f"{products}: no file there, expected parquet files; or name one file, such as products.csv")
    parts = Counter(re.sub(r"\d+-of-(\d+\.parquet)$", r"*-of-\1", str(path)) for path in paths if is_folder)
    for name, found in parts.items():
        whole = re.search(r"\*-of-(\d+)\.parquet$", name)
        if whole and found != int(whole[1]):
            raise InputError(f"{name}: found {found} files, expected {int(whole[1])}; download the others")
    return paths


def read_tables(config, photos):
    """The `Table`s of config.products, which all have the same columns. The suffix tells CSV, parquet and JSON apart.

    photos: an empty folder for the photos that lie in parquet files. Raises InputError on what cannot be read."""
    tables = []
    for i, path in enumerate(find_files(config.products)):
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            folder = Path(photos, str(i))  # as files in two folders may have one name
            folder.mkdir()
            tables.append(read_parquet(path, config, folder))
        elif suffix in (".csv", ".tsv", ".txt"):
            tables.append(read_csv(path, config))
        else:
            tables.append(read_json(path, config))
    first = tables[0]
    for table in tables:
        if not any(table.columns):
            raise InputError(f"{table.path}: the file is empty, expected products")
        if set(table.columns) != set(first.columns):
            odd = min(set(table.columns) ^ set(first.columns))
            raise InputError(f"{table.path}: column {odd!r} stands in it or in {first.path}, expected in both or none")
        for name in (getattr(config, name) for name in COLUMNS):
            count = table.columns.count(name)
            if count > 1:
                raise InputError(f"{table.path}: found {count} columns {name!r}, expected one; rename the others")
    return tables


def clear_cells(row):
    """Empty the cells of a row that hold one of NO_VALUE alone, and return how many they are."""
    columns = [column for column, cell in row.items() if cell is not None and str(cell).strip().lower() in NO_VALUE]
    row.update(dict.fromkeys(columns, ""))
    return len(columns)


def get_text(row, name, config):
    """The plain text of the column that the setting `name` names, "" where there is none. Raises ValueError."""
    value = row.get(getattr(config, name))
    if not isinstance(value, (str, int, float, type(None))):
        raise ValueError(f"{name}: found {value!r:.60}, expected text")
    return "" if value is None else plain_text(str(value))


def read_row(row, config):
    """(id, {setting: text}) of a row. Raises ValueError on what no product has."""
    if None in row:
        raise ValueError(f"{len(row[None])} more cells than columns; put quotes around a cell that holds the separator")
    texts = {name: get_text(row, name, config) for name in ("title", "description", "category", "subcategory")}
    key = get_text(row, "id", config)
    if re.fullmatch(r"\d([.,]\d+)?E[+]\d+", key, re.IGNORECASE):
        raise ValueError(f"id {key} was shortened by a spreadsheet; export this column as text")
    check_printable(key, "id")
    return key, texts


def read_list(text):
    """A list that stands in a cell, as JSON or Python write it. Raises ValueError on another text."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise ValueError(f"images: found {text!r:.60}, expected a list of file names")


def split_names(cell, separator):
    """The names in a cell: text with separators between them, or a list, also as text. Raises ValueError on others."""
    if isinstance(cell, str) and re.fullmatch(r"\s*\[.*\]\s*", cell, re.S):
        cell = read_list(cell.strip())
    names = cell.split(separator) if isinstance(cell, str) else cell or []
    names = names if isinstance(names, list) else [names]
    names = [name.get("src") if isinstance(name, dict) else name for name in names]  # as Shopify's programs give them
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"images: found {cell!r:.60}, expected file names")
    return [name.strip() for name in names if name.strip()]


def image_names(row, config):
    """The names of a row's images, from its column or by a template such as images/{id}.jpg. Raises ValueError.

    A template is filled with each name of a cell. It gives none where its cell is empty."""
    if config.images in row or "{" not in config.images:
        return split_names(row.get(config.images), config.separator)
    names = config.images.split(config.separator)
    for column in re.findall(FIELD, config.images):
        field, cell = f"{{{column}}}", row.get(column)
        values = split_names(str(cell) if isinstance(cell, (int, float)) else cell, config.separator)
        names = [name.replace(field, value) for name in names for value in (values if field in name else [""])]
    return [name.strip() for name in names]


def image_file(name, folder, separator):
    """The path of an image that a row names. Raises ValueError on an address and where it says more than open_image."""
    check_printable(name, "images")
    path, unix = folder / name, name.replace("\\", "/")  # Windows writes backslashes
    for place in (path, folder / unix, folder / unix.lstrip("/")):  # Magento begins a path in its folder with a slash
        if os.path.exists(place):
            return place
    if re.match(r"([a-z]+:)?//|data:", name, re.I):
        raise ValueError(f"images: {name!r:.80} is an address; download first, and write the name of the file there")
    if re.match(r"[a-z]:[\\/]", name, re.I):
        raise ValueError(f"images: {name!r:.80} is a path of another computer; write it as seen from --image_folder")
    if re.search(r"[,;|]", name):
        raise ValueError(f"images: no file {str(path)!r}; between several images stands --separator ({separator!r})")
    return path
