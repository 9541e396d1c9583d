"""The rows of files of products, as shops, spreadsheets and data sets write them.

prepare/catalogue.py makes products of them."""

import bz2
import codecs
import csv
import glob
import gzip
import io
import itertools
import json
import lzma
import os
import re
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from plumbing.files import cause_of, not_the_file, reading
from plumbing.settings import InputError
from prepare.cells import image_columns

COLUMNS = ("id", "images", "title", "description", "category", "subcategory")  # settings that name a column
PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}  # by a file's first bytes
OTHERS = {  # by the first bytes, of the file or of what is packed in it
    b"SQLite format 3": "an SQLite database; export its table as CSV",
    b"\xd0\xcf\x11\xe0": "an Excel workbook of the old kind; give its name the ending .xls, or save it as CSV UTF-8",
    b"PAR1": "a parquet file; give its name the ending .parquet, unpacked",
    b"ARROW1": "a Feather file; write it as parquet",
    b"\x89HDF": "an HDF5 file; write its table as CSV or parquet",
    b"%PDF": "a PDF document; write its table as CSV",
    b"7z\xbc\xaf": "packed by 7-Zip; unpack it first",
    b"Rar!": "packed by RAR; unpack it first",
    b"\x28\xb5\x2f\xfd": "packed by zstd; unpack it first",
}
EXCEL = (".xlsx", ".xls", ".xlsm", ".xlsb", ".ods")
BATCH = 32  # rows of a parquet file that are in memory at a time, with their photos


class Table(NamedTuple):
    """A file of products."""

    path: Path
    columns: list  # the names of all columns
    rows: object  # dicts {column: cell}, which can be read once


def open_packed(path):
    """An open binary file, unpacked where it is packed. Raises InputError on a zip of several files."""
    file = open(path, "rb")
    head = file.read(6)
    file.seek(0)
    for mark, opener in PACKED.items():
        if head.startswith(mark):
            return opener(file)
    if not head.startswith(b"PK\x03\x04"):
        return file
    archive = zipfile.ZipFile(file)
    names = [name for name in archive.namelist() if not re.search(r"/$|^__MACOSX/", name)]
    if len(names) == 1:
        return archive.open(names[0])
    if "[Content_Types].xml" in names:
        raise InputError(f"{path}: an Excel workbook; give its name the ending .xlsx")
    raise InputError(f"{path}: a zip of {len(names)} files; unpack it, and name the file of products that was in it")


def read_lines(path):
    """The lines of a text file in UTF-8, or in UTF-16 with its mark, as Excel writes it. Raises InputError on others.

    The file may be packed by gzip, bzip2, xz or zip."""
    cure, number = "save it as UTF-8 text (in Excel: CSV UTF-8)", 0
    with reading(path, "cannot be read"), open_packed(path) as file:
        marked = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        file.seek(0)
        text = io.TextIOWrapper(file, "utf-16" if marked else "utf-8-sig", newline="")
        try:
            for number, line in enumerate(text, 1):
                if "\0" in line:
                    raise InputError(f"{path}: found a zero character, which no text has; {cure}")
                yield line if number > 1 else line.lstrip("\ufeff")  # a file that was saved twice has two marks
        except UnicodeDecodeError as error:
            line = number + error.object.count(b"\n", 0, error.start) + 1
            found = error.object[error.start : error.end]
            raise InputError(f"{path}: line {line}: {found} is no UTF-8; {cure}") from None


def read_csv(path, config):
    """The `Table` of a CSV file, read row by row; cells beyond the columns stand under None. Empty rows are left out.

    Raises InputError, also while the rows are read, where a quote is not closed or closes in another row."""
    head = "".join(itertools.islice(read_lines(path), 20))
    excel = re.match(r'"?sep=([^\w"\r\n])"?[\r\n]+', head)  # Excel's own first line
    first_row = re.match(r'("[^"]*"|[^"\r\n])*', head.lstrip())[0]
    # without Excel's line it is the mark that stands most often in the first row, outside of quotes
    separator = excel[1] if excel else max(",;\t|", key=re.sub(r'"[^"]*"', "", first_row).count)
    csv.field_size_limit(2**31 - 1)  # descriptions can be longer than csv's own limit
    lines = itertools.islice(read_lines(path), bool(excel), None)
    reader = csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=True)

    def read():
        begin = 1
        try:
            for cells in reader:
                if any(cells):
                    if any("\n" in cell and holds_row(cell, columns, separator, config.images) for cell in cells):
                        raise csv.Error("a cell holds other rows")
                    more = {None: cells[len(columns) :]} if len(cells) > len(columns) else {}
                    yield dict(zip(columns, cells, strict=False)) | more
                begin = reader.line_num + 1
        except csv.Error as error:
            cure = 'double each quote (") inside a cell, and close each cell that begins with one'
            raise InputError(f"{path}: the row of line {begin + bool(excel)}: {error}; {cure}") from None

    columns = []  # all cells of the first row stand beyond them
    rows = read()
    first = next((row[None] for row in rows), [])
    columns = [" ".join(name.split()) for name in first]
    return Table(path, columns, rows)


def holds_row(cell, columns, separator, images):
    """Whether a later line of a cell is a row of the file, with an image in its place: a quote was not closed."""
    lines = [line.split(separator) for line in cell.split("\n")[1:]] if images in columns else []
    rows = [line for line in lines if len(line) == len(columns)]
    return any(re.fullmatch(r".+\.(jpe?g|png|webp|gif)", row[columns.index(images)].strip(), re.I) for row in rows)


def find_products(value, config):
    """The products of a JSON value: a list, one product, the only list in an object, or an object with ids as keys.

    So is what pandas writes: its orient "split", and columns that are lists or objects of one length."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    if {"columns", "data"} <= value.keys():
        return [dict(zip(value["columns"], cells, strict=False)) for cells in value["data"]]
    if config.title in value:
        columns = list(value.values())
        if len(columns) > 1 and all(isinstance(column, (list, dict)) for column in columns):
            columns = [list(column.values()) if isinstance(column, dict) else column for column in columns]
            return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
        return [value]
    lists = [part for part in value.values() if isinstance(part, list) and part and isinstance(part[0], dict)]
    if len(lists) == 1:
        return lists[0]
    parts = {key: part for key, part in value.items() if isinstance(part, dict)}
    if any(config.title in part for part in parts.values()) or len(parts) == len(value) > 1:
        return [{config.id: key, **part} for key, part in parts.items()]
    return find_products(*parts.values(), config) if len(parts) == 1 else [value]


def read_json(path, config):
    """The `Table` of a file of JSON lines, or one JSON value. Raises InputError naming a line that cannot be read."""

    def load(text, where=""):
        try:
            return json.loads(text.strip().removesuffix(","), parse_constant=lambda name: None)  # NaN is no text
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: {where}{error}; expected UTF-8, a .csv or one JSON object a line") from None

    lines = ((number, line) for number, line in enumerate(read_lines(path), 1) if line.strip())
    _, first = next(lines)
    try:
        values = [load(first)]
    except InputError:  # one value on several lines
        values = [load(first + "".join(line for _, line in lines))]
    values += [load(line, f"line {number}: ") for number, line in lines]  # they may be cut out of a list
    with reading(path, "its columns differ in length"):
        rows = values if len(values) > 1 else find_products(values[0], config)
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: found a line that is no object, expected products")
    return Table(path, list(dict.fromkeys(column for row in rows for column in row)), rows)


def read_xml(path, config):
    """The `Table` of an XML file, such as a feed for Google Merchant. Prefixes of names are left out: image_link.

    A product is each element of the kind that holds a title and images. What stands in it several times is a list.
    Raises InputError on another file."""
    with reading(path, "cannot be read as XML"), open_packed(path) as file:
        elements = list(ElementTree.parse(file).iter())

    def read_row(element):
        row = {key: [value] for key, value in element.attrib.items()}
        for child in element:
            parts = child if len(child) and not (child.text or "").strip() else [child]
            values = row.setdefault(str(child.tag).rpartition("}")[2], [])
            values += ["".join(part.itertext()).strip() for part in parts]
        return {key: values if len(values) > 1 else "".join(values) for key, values in row.items()}

    def is_product(row):
        return config.title in row and any(column in row for column in image_columns(config.images, row))

    parents = [element for element in elements if len(element)]
    found = [element.tag for element in parents if is_product(read_row(element))]
    found += [tag for tag, _ in Counter(element.tag for element in parents).most_common(1)]  # to name its columns
    rows = [read_row(element) for element in parents if element.tag in found[:1]]
    return Table(path, list(dict.fromkeys(column for row in rows for column in row)), rows)


def read_excel(path):
    """The `Table` of a spreadsheet's first sheet. Raises InputError without pandas and the package that it asks for."""
    try:
        import pandas

        frame = pandas.read_excel(path, dtype=object)  # so that 007 stays a text
    except ImportError as error:
        cure = f"pip install pandas {'openpyxl' if path.suffix.lower() == '.xlsx' else ''}".strip()
        raise InputError(
            f"{path}: a spreadsheet needs more packages; {cure} ({error}), or save it as CSV UTF-8"
        ) from None
    except Exception as error:  # pandas' readers raise nearly anything on broken files
        raise InputError(f"{path}: cannot be read as a spreadsheet ({cause_of(error)}); save it as CSV UTF-8") from None
    return Table(path, [str(column) for column in frame.columns], frame.where(frame.notna(), None).to_dict("records"))


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
    """The `Table`s of config.products, which all have the same columns. Raises InputError on what cannot be read.

    photos: an empty folder for the photos that lie in parquet files."""
    tables = []
    for i, path in enumerate(find_files(config.products)):
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            folder = Path(photos, str(i))  # as files in two folders may have one name
            folder.mkdir()
            tables.append(read_parquet(path, config, folder))
        elif suffix in EXCEL:
            tables.append(read_excel(path))
        else:
            with reading(path, "cannot be read"), open_packed(path) as file:
                head = file.read(2048)
            other = next((text for mark, text in OTHERS.items() if head.startswith(mark)), "")
            if other or head[257:262] == b"ustar":
                raise InputError(f"{path}: {other or 'a tar archive; unpack it first'}")
            start = head.replace(b"\0", b"").lstrip(b"\xff\xfe\xef\xbb\xbf \r\n\t")[:1]
            is_csv = start not in (b"{", b"[") or ".csv" in path.suffixes  # SQL Server writes columns as [id],[title]
            read = read_xml if start == b"<" else read_csv if is_csv else read_json
            tables.append(read(path, config))
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
