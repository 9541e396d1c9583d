"""Pages of pictures: a query at the left, its results beside it. evaluate.py --show and search.py --out draw them."""

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

import photos
from files import replacing
from settings import InputError

CELL, GAP, LINE = 200, 18, 19  # pixels: side of a picture, space between cells, height of a text line
TEXT_LINES, SHOWN = 4, 5  # lines of text below a picture; results beside each other
DEEP = CELL + (TEXT_LINES + 2) * LINE + GAP  # pixels: height of a cell with its texts and the space below it
RIGHT, WRONG = (26, 150, 65), (215, 48, 39)  # colours of frames


@dataclass
class Cell:
    """One cell of a page. Without images its text stands in the square, else below the label."""

    images: list = ()  # paths; several share the square
    text: str = ""
    label: str = ""  # one line below the square
    frame: tuple = None  # colour of a frame around the square


class Row(NamedTuple):  # of a page
    query: Cell
    results: list


class Choice(NamedTuple):  # a row that a page can show
    failed: bool  # whether its results lack the right one
    make: Callable  # () -> Row


def ranked_choices(ranks, query_cells, gallery_cells, queries, gallery, query_id, gallery_id, category=None):
    """A Choice for every query: its SHOWN best gallery items; it failed if none of them is right.

    ranks: metrics.best_ranks of the four tensors; cells: lists of Cell. category: (Q,), (G,) int64; a query then
    ranks only the items of its own."""

    def make(i):
        scores, n = gallery @ queries[i], len(gallery)
        if category:
            other = category[1] != category[0][i]
            scores, n = scores.masked_fill(other, -math.inf), n - int(other.sum())
        results = []
        for rank, item in enumerate(scores.sort(descending=True, stable=True).indices[: min(n, SHOWN)].tolist(), 1):
            right = bool(gallery_id[item] == query_id[i])
            label = f"{rank}   {scores[item]:.2f}{'   right' if right else ''}"
            results.append(replace(gallery_cells[item], label=label, frame=RIGHT if right else None))
        return Row(replace(query_cells[i], label=f"right one: rank {ranks[i]} of {n}"), results)

    return [Choice(rank > SHOWN, partial(make, i)) for i, rank in enumerate(ranks.tolist())]


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
    if cell.frame:
        draw.rectangle((x - 6, y - 6, x + CELL + 5, y + CELL + 5), outline=cell.frame, width=5)


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


def draw_choices(path, name, choices, n, seed):
    """Write a page of n random ones of `choices`. If any of all choices failed, one that failed is on the page."""
    order = torch.randperm(len(choices), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, failures = order[:n], [i for i in order if choices[i].failed]
    if failures and failures[0] not in chosen:  # then none of the chosen failed, since both are in the same order
        chosen[-1] = failures[0]
    title = f"{name}: {len(chosen)} of {len(choices)} queries, drawn at random; right ones in green"
    draw_page(path, title, [choices[i].make() for i in chosen])
    print(f"written: {path} ({sum(choices[i].failed for i in chosen)} of {len(chosen)} without a right one in view)")


def check_page(path):
    """Raise InputError where a page could not be written to `path`, so that a run stops before its work."""
    if Path(path).suffix != ".png" or not Path(path).absolute().parent.is_dir():
        raise InputError(f"out: found {str(path)!r}, expected the name of a .png in a folder that exists")
