"""Pages of pictures: a query at the left, its results beside it. evaluate.py --show and search.py --out draw them."""

import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from plumbing import photos
from plumbing.files import check_place, replacing
from plumbing.settings import InputError

CELL, GAP, LINE = 200, 18, 19  # pixels: side of a picture, space between cells, height of a text line
TEXT_LINES, SHOWN = 4, 5  # lines of text below a picture; results beside each other
DEEP = CELL + (TEXT_LINES + 2) * LINE + GAP  # pixels: height of a cell with its texts and the space below it
GREEN = (26, 150, 65)  # of the frame around a right result


class Cell(NamedTuple):  # of a page
    images: list = ()  # paths; several share the square
    text: str = ""  # below the label; without images it stands in the square
    label: str = ""  # one line below the square
    right: bool = False  # a right result has a frame


class Row(NamedTuple):  # of a page
    query: Cell
    results: list  # of Cell
    failed: bool = False  # whether the results lack the right one


class Ranking(NamedTuple):
    """Queries that rank the items of a gallery.

    An item is a dict with "image" (a path) or "images" and "text" or "name", as far as it has them, and "id": the items
    of a query's id are right. A query with "wanted", a number, ranks only the items of that "category"."""

    queries: list  # items
    gallery: list  # G items
    scores: Callable  # scores(i) -> (G,) float, what query i gives to each item of the gallery
    n_shown: int = SHOWN  # results in view; a query failed if none of them is right


def dot_products(queries, gallery):
    """The `scores` of a Ranking whose queries (Q, D) and gallery (G, D) are compared by dot product, as metrics do."""
    return lambda i: gallery @ queries[i]


def cell_of(item, label, right=False):
    """The Cell of an item of a `Ranking`."""
    images = [item["image"]] if "image" in item else item.get("images", [])
    return Cell(images, item.get("text", item.get("name", "")), label, right)


def ranked_row(ranking, i):
    """The Row of query i of a `Ranking`: its best gallery items, of equal ones the first."""
    query, gallery, scores = ranking.queries[i], ranking.gallery, ranking.scores(i)
    order = scores.sort(descending=True, stable=True).indices.tolist()
    if "wanted" in query:
        order = [item for item in order if gallery[item]["category"] == query["wanted"]]
    right = [gallery[item]["id"] == query["id"] for item in order]
    rank, results = 1 + right.index(True), []
    for place, item in enumerate(order[: ranking.n_shown]):
        label = f"{place + 1}   {scores[item]:.2f}{'   right' if right[place] else ''}"
        results.append(cell_of(gallery[item], label, right[place]))
    return Row(cell_of(query, f"right one: rank {rank} of {len(order)}"), results, rank > ranking.n_shown)


def wrap(text, font, width, n_lines):
    """`text` in at most `n_lines` lines of `width` pixels; what does not fit is cut and ends in "..."."""
    for n_letters in range(width // 3, 3, -1):
        lines = textwrap.wrap(text, n_letters, max_lines=n_lines, placeholder="...")
        if all(font.getlength(line) <= width for line in lines):
            break
    return "\n".join(lines)


def draw_cell(page, x, y, cell):
    """Draw a Cell with its upper left corner at (x, y)."""
    draw, small, large = ImageDraw.Draw(page), ImageFont.load_default(15), ImageFont.load_default(17)
    tiles = math.ceil(math.sqrt(len(cell.images)))  # along each side of the square
    for i, path in enumerate(cell.images):
        side = CELL // tiles
        place = (x + i % tiles * side, y + i // tiles * side)
        page.paste(ImageOps.pad(photos.open_image(path), (side, side), color="white"), place)
    if cell.images:
        draw.text((x, y + CELL + 2 * LINE), wrap(cell.text, small, CELL, TEXT_LINES), (70, 70, 70), small)
    else:
        draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), fill=(240, 240, 240))
        draw.text((x + 8, y + 8), wrap(cell.text, large, CELL - 16, 8), "black", large)
    draw.text((x, y + CELL + 8), cell.label, "black", large)
    if cell.right:
        draw.rectangle((x - 6, y - 6, x + CELL + 5, y + CELL + 5), outline=GREEN, width=5)


def draw_page(path, title, rows):
    """Write a PNG of a list of Row: the query left of a line, SHOWN results beside each other, the others below them.

    Raises InputError where a picture cannot be read or the file cannot be written; no half file is left."""
    left = GAP + CELL + 2 * GAP  # of the results
    heights = [DEEP * max(1, math.ceil(len(row.results) / SHOWN)) for row in rows]
    width, top, font = left + SHOWN * (CELL + GAP), 80, ImageFont.load_default(20)
    page = Image.new("RGB", (width, top + sum(heights)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((GAP, GAP), wrap(title, font, width - 2 * GAP, 2), "black", font)
    for row, height in zip(rows, heights, strict=True):
        draw_cell(page, GAP, top, row.query)
        draw.line((left - GAP, top, left - GAP, top + height - GAP), fill=(180, 180, 180), width=2)
        for i, cell in enumerate(row.results):
            draw_cell(page, left + i % SHOWN * (CELL + GAP), top + i // SHOWN * DEEP, cell)
        top += height
    with replacing(path) as file:
        page.save(file, format="PNG")


def draw_rankings(path, name, rankings, n, seed):
    """Write a page of n random queries of a list of `Ranking`. If any query failed, one that failed is on the page."""
    queries = [(ranking, i) for ranking in rankings for i in range(len(ranking.queries))]
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(seed)).tolist()
    rows, how = [ranked_row(*queries[i]) for i in order[:n]], "drawn at random"
    if not any(row.failed for row in rows):
        others = (ranked_row(*queries[i]) for i in order[n:])
        failed = next((row for row in others if row.failed), None)
        if failed:
            rows[-1], how = failed, "drawn at random, the last one because it failed"
    draw_page(path, f"{name}: {len(rows)} of {len(queries)} queries, {how}; right ones in green", rows)
    print(f"written: {path} ({sum(row.failed for row in rows)} of {len(rows)} without a right one in view)")


def check_page(path):
    """Raise InputError where a page could not be written to `path`, so that a run stops before its work."""
    if Path(path).suffix != ".png":
        raise InputError(f"out: found {str(path)!r}, expected the name of a .png")
    check_place(path, "out")
