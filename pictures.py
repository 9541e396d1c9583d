"""Pages of pictures: a query at the left, its results beside it. evaluate.py --show and search.py --out draw them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

import data
from common import replacing
from settings import InputError

CELL, GAP, LINE, LARGE_LINE = 200, 18, 19, 22  # pixels: side of a picture, space between cells, height of a text line
TEXT_LINES, SHOWN = 4, 5  # lines of text below a picture; results beside each other
RIGHT, WRONG = (26, 150, 65), (215, 48, 39)  # colours of frames


@dataclass
class Cell:
    """One cell of a page. Without images its text stands in the square, else below the label."""

    images: list = ()  # paths; several share the square
    text: str = ""
    label: str = ""  # one line below the square
    frame: tuple = None  # colour of a frame around the square


class Row(NamedTuple):
    """One row of a page; `query` is None where the row has only results."""

    query: Cell
    results: list


class Choice(NamedTuple):
    """A row that a page can show. `failed` says that its results lack the right one; `make()` returns the Row."""

    failed: bool
    make: Callable


def ranked_choices(ranks, query_cells, gallery_cells, queries, gallery, query_id, gallery_id):
    """A Choice for every query: its SHOWN best gallery items; it failed if none of them is right.

    ranks (Q,) as metrics.best_ranks returns them for the four last arguments; the cells are lists of Cell."""

    def make(i):
        scores = gallery @ queries[i]
        results = []
        for rank, item in enumerate(scores.sort(descending=True, stable=True).indices[:SHOWN].tolist(), 1):
            right = bool(gallery_id[item] == query_id[i])
            label = f"{rank}   {scores[item]:.2f}{'   right' if right else ''}"
            results.append(replace(gallery_cells[item], label=label, frame=RIGHT if right else None))
        return Row(replace(query_cells[i], label=f"right one: rank {ranks[i]} of {len(gallery)}"), results)

    return [Choice(rank > SHOWN, partial(make, i)) for i, rank in enumerate(ranks.tolist())]


def labelled_row(path, predicted, true, name_of):
    """Row of one image with the names of its predicted and its true class, name_of(class)."""
    frame = RIGHT if predicted == true else WRONG
    return Row(None, [Cell([path], f"true: {name_of(true)}", f"predicted: {name_of(predicted)}", frame)])


def wrap(text, font, width, n_lines):
    """Words of `text` in at most `n_lines` lines of `width` pixels; what does not fit is cut and ends in "..."."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > n_lines:
        lines = [*lines[: n_lines - 1], f"{lines[n_lines - 1]}..."]
    for i, line in enumerate(lines):
        while font.getlength(line) > width:
            line = line.removesuffix("...")[:-1] + "..."
        lines[i] = line
    return lines


def draw_cell(page, x, y, cell):
    """Draw a Cell with its upper left corner at (x, y)."""
    draw, small, large = ImageDraw.Draw(page), ImageFont.load_default(15), ImageFont.load_default(17)
    if cell.images:
        tiles = math.ceil(math.sqrt(len(cell.images)))  # along each side of the square
        side = CELL // tiles
        for i, path in enumerate(cell.images):
            picture = ImageOps.pad(data.open_image(path), (side, side), color="white")
            page.paste(picture, (x + i % tiles * side, y + i // tiles * side))
        for i, line in enumerate(wrap(cell.text, small, CELL, TEXT_LINES)):
            draw.text((x, y + CELL + 8 + LINE + 4 + i * LINE), line, (70, 70, 70), small)
    else:
        draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), fill=(240, 240, 240))
        for i, line in enumerate(wrap(cell.text, large, CELL - 16, (CELL - 16) // LARGE_LINE)):
            draw.text((x + 8, y + 8 + i * LARGE_LINE), line, "black", large)
    draw.text((x, y + CELL + 8), cell.label, "black", large)
    if cell.frame:
        draw.rectangle((x - 6, y - 6, x + CELL + 5, y + CELL + 5), outline=cell.frame, width=5)


def draw_page(path, title, rows):
    """Write a PNG of a list of Row: the query left of a line, SHOWN results beside each other, the others below them.

    Raises InputError where a picture cannot be read or the file cannot be written; no half file is left."""
    left = GAP + (CELL + 2 * GAP if any(row.query for row in rows) else 0)  # of the results
    deep = CELL + 8 + LINE + 4 + TEXT_LINES * LINE + GAP  # a line of cells
    lines = [max(1, math.ceil(len(row.results) / SHOWN)) for row in rows]
    width = left + SHOWN * (CELL + GAP)
    font = ImageFont.load_default(20)
    heading = wrap(title, font, width - 2 * GAP, 2)
    top = GAP + len(heading) * 28 + GAP // 2
    page = Image.new("RGB", (width, top + sum(lines) * deep), "white")
    draw = ImageDraw.Draw(page)
    for i, line in enumerate(heading):
        draw.text((GAP, GAP + i * 28), line, "black", font)
    for row, n in zip(rows, lines, strict=True):
        if row.query:
            draw_cell(page, GAP, top, row.query)
            draw.line((left - GAP, top, left - GAP, top + n * deep - GAP), fill=(180, 180, 180), width=2)
        for i, cell in enumerate(row.results):
            draw_cell(page, left + i % SHOWN * (CELL + GAP), top + i // SHOWN * deep, cell)
        top += n * deep
    with replacing(path) as file:
        page.save(file, format="PNG")


def draw_choices(path, name, choices, n, seed):
    """Write a page of n random ones of `choices`. If any of all choices failed, one that failed is on the page."""
    order = torch.randperm(len(choices), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, failures = order[:n], [i for i in order if choices[i].failed]
    if failures and not any(choices[i].failed for i in chosen):
        chosen[-1] = failures[0]
    rows = [choices[i].make() for i in chosen]
    if not any(row.query for row in rows):  # the results of rows without a query stand beside each other
        rows = [Row(None, [cell for row in rows for cell in row.results])]
    draw_page(path, f"{name}: {len(chosen)} of {len(choices)} queries, drawn at random; right ones in green", rows)
    print(f"written: {path} ({sum(choices[i].failed for i in chosen)} of {len(chosen)} without a right one in view)")


def check_page(path):
    """Raise InputError where a page could not be written to `path`, so that a run stops before its work."""
    if Path(path).suffix != ".png" or not Path(path).absolute().parent.is_dir():
        raise InputError(f"out: found {str(path)!r}, expected the name of a .png in a folder that exists")
