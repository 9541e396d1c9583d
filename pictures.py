"""Contact sheets: a query at the left, its results beside it. evaluate.py --show and search.py --out draw them."""

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

import data
from common import replacing
from settings import InputError

CELL, GAP, LINE = 200, 18, 19  # pixels: a picture's side, between cells, a line of text
TEXT_LINES, SHOWN = 4, 5  # lines of text below a picture; results of a query
RIGHT, WRONG = (26, 150, 65), (215, 48, 39)  # colours of frames


def wrap(text, font, width, n_lines):
    """Words of `text` in at most `n_lines` lines of `width` pixels; what does not fit is cut and ends in "..."."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if font.getlength(longer) <= width or not lines[-1] else [lines[-1], word]
    if len(lines) > n_lines:
        lines = [*lines[: n_lines - 1], f"{lines[n_lines - 1]}..."]
    for i, line in enumerate(lines):
        while font.getlength(line) > width:
            line = line.removesuffix("...")[:-1] + "..."
        lines[i] = line
    return lines


def draw_cell(page, x, y, cell):
    """One cell of a sheet at (x, y): pictures in a square, or text in it; below it the label, then the text.

    cell: "images" (paths), "text", "label" and "frame" (a colour), each of which may be absent."""
    draw, small, large = ImageDraw.Draw(page), ImageFont.load_default(15), ImageFont.load_default(17)
    paths, text = cell.get("images", []), cell.get("text", "")
    if not paths:
        draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), fill=(240, 240, 240))
        for i, line in enumerate(wrap(text, large, CELL - 16, (CELL - 16) // (LINE + 3))):
            draw.text((x + 8, y + 8 + i * (LINE + 3)), line, "black", large)
        text = ""
    tiles = math.ceil(math.sqrt(len(paths)))  # along each side
    for i, path in enumerate(paths):
        side = CELL // tiles
        picture = ImageOps.pad(data.open_image(path), (side, side), color="white")
        page.paste(picture, (x + i % tiles * side, y + i // tiles * side))
    if cell.get("frame"):
        draw.rectangle((x - 6, y - 6, x + CELL + 5, y + CELL + 5), outline=cell["frame"], width=5)
    lines = wrap(text, small, CELL, TEXT_LINES)
    draw.text((x, y + CELL + 8), cell.get("label", ""), "black", large)
    for i, line in enumerate(lines):
        draw.text((x, y + CELL + 8 + LINE + 4 + i * LINE), line, (70, 70, 70), small)


def draw_sheet(path, title, rows):
    """A contact sheet as PNG: rows of (query cell or None, [result cells]), the query left of a line, SHOWN results
    beside each other. Cells as `draw_cell` takes them;

    Raises InputError where a picture cannot be read or the file cannot be written; no half file is left."""
    has_query = any(query for query, _ in rows)
    left = GAP + has_query * (CELL + 2 * GAP)  # of the results
    deep = CELL + 8 + LINE + 4 + TEXT_LINES * LINE + GAP  # a line of cells
    lines = [max(1, math.ceil(len(results) / SHOWN)) for _, results in rows]
    width = left + SHOWN * (CELL + GAP)
    font = ImageFont.load_default(20)
    heading = wrap(title, font, width - 2 * GAP, 2)
    top = GAP + len(heading) * 28 + GAP // 2
    page = Image.new("RGB", (width, top + sum(lines) * deep), "white")
    draw = ImageDraw.Draw(page)
    for i, line in enumerate(heading):
        draw.text((GAP, GAP + i * 28), line, "black", font)
    for (query, results), n in zip(rows, lines, strict=True):
        if query:
            draw_cell(page, GAP, top, query)
            x = GAP + CELL + GAP
            draw.line((x, top, x, top + n * deep - GAP), fill=(180, 180, 180), width=2)
        for i, cell in enumerate(results):
            draw_cell(page, left + i % SHOWN * (CELL + GAP), top + i // SHOWN * deep, cell)
        top += n * deep
    with replacing(path) as file:
        page.save(file, format="PNG")


def check_page(path):
    """Raise InputError where a sheet could not be written to `path`: said before the work, not after it."""
    if Path(path).suffix != ".png" or not Path(path).absolute().parent.is_dir():
        raise InputError(f"out: found {str(path)!r}, expected the name of a .png in a folder that exists")
