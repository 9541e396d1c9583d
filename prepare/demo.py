"""Draw the demo catalogue: made-up fashion products in the five-folder layout of the real data sets.

    python -m prepare.demo data/demo                                    # half a minute on one core
    python -m prepare.demo OUT --seed=0 --products=2000 --size=128      # the defaults, written out

So that a stranger without any data sees every stage work. Needs only Pillow and NumPy. A product is a *design*, a
dict of the attributes below; its picture and its texts are both made from that, so what the texts say can be seen.
The same arguments give the same bytes (with the same Pillow). Beside the five folders stand
  labels.json    what attributes_id, category_id, subcategory_id index    (the same for every seed and size)
  vocab.txt      a small WordPiece vocabulary for these texts             (the same for every seed and size)
  products.json  "folder/id" -> design, for tests and pictures; no training code reads it
  demo.json      the arguments; written last: it marks a finished catalogue
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

# --- what there is ----------------------------------------------------------------------------------------------------

FAMILIES = {  # an outfit keeps to one family of colours
    "warm": {"red": (204, 28, 42), "orange": (245, 132, 22), "yellow": (250, 214, 50)},
    "green": {"green": (24, 122, 62), "mint": (140, 226, 178)},
    "blue": {"blue": (64, 140, 235), "navy": (24, 36, 100)},
    "berry": {"purple": (112, 44, 156), "pink": (250, 140, 185)},
    "earth": {"brown": (112, 66, 34), "beige": (222, 192, 146)},
    "neutral": {"black": (32, 32, 36), "grey": (134, 138, 144), "white": (250, 250, 250)},
}
COLOURS = {name: rgb for family in FAMILIES.values() for name, rgb in family.items()}
MIN_CONTRAST = 100  # RGB distance of a garment's two colours, below which a pattern is hard to see at 64 pixels
PLAIN_SHARE = 0.2  # of the products
PATTERNS = {  # name: (adjectives, nouns for what has the second colour)
    "plain": (("plain", "solid"), ("a solid colour", "one colour")),
    "striped": (("striped", "stripy"), ("stripes", "bands")),
    "dotted": (("dotted", "polka dot", "spotted"), ("dots", "spots")),
    "checked": (("checked", "gingham"), ("checks", "squares")),
    "zigzag": (("zigzag", "chevron"), ("zigzags", "chevrons")),
    "block": (("colour-block", "two-tone"), ("lower half", "lower part")),
    "floral": (("floral", "flowered"), ("flowers", "blossoms")),
}
PARTS = {  # field: {value: noun phrases}
    "sleeve": {
        "sleeveless": ("no sleeves", "a sleeveless cut", "bare arms"),
        "short": ("short sleeves", "sleeves to the elbow"),
        "long": ("long sleeves", "sleeves to the wrist"),
    },
    "neckline": {
        "round": ("a round neck", "a crew neckline"),
        "v": ("a v neck", "a v-shaped neckline"),
        "square": ("a square neck", "a square neckline"),
        "collar": ("a pointed collar", "a classic collar"),
        "stand": ("a stand collar", "a band collar"),
        "roll": ("a roll neck", "a high turtleneck"),
        "hood": ("a hood", "a roomy hood"),
    },
    "detail": {
        "none": ("a clean finish", "no extras"),
        "buttons": ("a row of buttons", "round buttons"),
        "pockets": ("patch pockets", "two pockets"),
        "belt": ("a buckled belt", "a belt"),
        "bow": ("a bow", "a tied bow"),
        "zip": ("a zip", "a metal zip"),
        "trim": ("contrast trim", "a contrast border"),
        "tassels": ("tassels", "a fringe of tassels"),
    },
    "length": {"short": ("mini length",), "mid": ("midi length",), "long": ("maxi length",)},
}
KINDS = {  # name: (category, sleeves, necklines, details)
    "dress": ("dresses", "sleeveless short long", "round v square", "none belt buttons bow trim"),
    "shirt": ("shirts", "short long", "collar stand", "none pockets trim bow"),
    "top": ("tops", "sleeveless short long", "round v square", "none pockets trim bow"),
    "jumper": ("knitwear", "long", "round v roll", "none pockets zip trim"),
    "coat": ("coats", "long", "collar hood", "none belt buttons pockets"),
    "skirt": ("skirts", "", "", "none belt buttons trim bow"),
    "trousers": ("trousers", "", "", "none belt pockets trim"),
    "shorts": ("trousers", "", "", "none belt pockets trim bow"),
    "bag": ("bags", "", "", "none zip pockets bow tassels"),
    "shoe": ("shoes", "", "", "none bow zip trim"),
    "hat": ("accessories", "", "", "none bow trim buttons"),
    "scarf": ("accessories", "", "", "none tassels buttons trim"),
}
SUBCATEGORIES = {  # name: (kind, field that it fixes, value, another name)
    "mini dress": ("dress", "length", "short", "short dress"),
    "midi dress": ("dress", "length", "mid", "knee-length dress"),
    "maxi dress": ("dress", "length", "long", "ankle-length dress"),
    "short-sleeve shirt": ("shirt", "sleeve", "short", "summer shirt"),
    "long-sleeve shirt": ("shirt", "sleeve", "long", "shirt"),
    "tank top": ("top", "sleeve", "sleeveless", "sleeveless top"),
    "t-shirt": ("top", "sleeve", "short", "short-sleeve top"),
    "long-sleeve top": ("top", "sleeve", "long", "long-sleeve tee"),
    "round-neck jumper": ("jumper", "neckline", "round", "crew-neck sweater"),
    "v-neck jumper": ("jumper", "neckline", "v", "v-neck sweater"),
    "roll-neck jumper": ("jumper", "neckline", "roll", "turtleneck sweater"),
    "short coat": ("coat", "length", "short", "jacket"),
    "long coat": ("coat", "length", "long", "overcoat"),
    "mini skirt": ("skirt", "length", "short", "short skirt"),
    "midi skirt": ("skirt", "length", "mid", "knee-length skirt"),
    "maxi skirt": ("skirt", "length", "long", "ankle-length skirt"),
    "slim trousers": ("trousers", "cut", "slim", "skinny pants"),
    "wide trousers": ("trousers", "cut", "wide", "flared pants"),
    "shorts": ("shorts", "cut", "short", "summer shorts"),
    "tote bag": ("bag", "cut", "tote", "shopper bag"),
    "crossbody bag": ("bag", "cut", "crossbody", "shoulder bag"),
    "trainer": ("shoe", "cut", "trainer", "sneaker"),
    "boot": ("shoe", "cut", "boot", "ankle boot"),
    "high heel": ("shoe", "cut", "heel", "pump"),
    "sun hat": ("hat", "cut", "sun", "brimmed hat"),
    "beanie": ("hat", "cut", "beanie", "knitted hat"),
    "scarf": ("scarf", "cut", "scarf", "shawl"),
}
FIELDS = ("kind", "colour", "second", "pattern", "sleeve", "neckline", "length", "detail")  # what becomes an attribute
FASHIONIQ_KINDS = {"dress": "dress", "shirt": "shirt", "toptee": "top"}

# --- how it is said ---------------------------------------------------------------------------------------------------

FABRICS = ("cotton", "linen", "jersey", "twill", "canvas", "fleece")
BRANDS = ("norrland", "casa vela", "maple row", "atelier lune", "harbour lane", "studio fern")
TITLES = (
    "{pattern} {colours} {fabric} {noun}",
    "{colours} {pattern} {noun}",
    "{colours} {noun} in {pattern} {fabric}",
    "{pattern} {noun} in {colours}",
)
FEATURES = ("it has {parts}.", "cut with {parts}.", "made with {parts}.", "note {parts}.", "finished with {parts}.")
FILLERS = (
    "a favourite from {brand}.",
    "designed by {brand} for every day.",
    "{brand} makes it in small batches.",
    "easy to wear, machine wash cool.",
    "part of the new season at {brand}.",
    "pairs well with everything in your wardrobe.",
)
CHANGES = {  # FashionIQ, by the field that changes; {new} and {old} are noun phrases
    "colour": ("is {new} instead of {old}", "is {new}", "comes in {new}", "is the same but {new}"),
    "second": ("has {new}", "has {new} instead of {old}", "shows {new}"),
    "pattern": ("has {new} instead of {old}", "shows {new}", "is {adjective} with {new}"),
    "plain": ("is plain", "has no pattern", "is plain without {old}", "is a solid colour"),
    "sleeve": ("has {new}", "has {new} instead of {old}", "comes with {new}"),
    "neckline": ("has {new}", "has {new} instead of {old}", "comes with {new}"),
    "detail": ("has {new}", "has {new} instead of {old}", "comes with {new}"),
    "length": ("has {new}", "is {new} instead of {old}", "comes in {new}"),
    # A direction is only said where it leads to one value.
    "sleeve short long": ("has longer sleeves",),
    "sleeve long short": ("has shorter sleeves",),
    "length mid long": ("is longer", "has a longer hem"),
    "length mid short": ("is shorter", "has a shorter hem"),
}
STEMS = "sleeve stripe dot check spot flower button pocket tassel"  # so that these words split: stripe ##s
SUFFIXES = ("less", "ed", "s")
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # BERT's, in this order
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,-'"

# --- designs ----------------------------------------------------------------------------------------------------------


def contrasting(colour, colours=tuple(COLOURS)):
    """Those of `colours` that stand out in a pattern on `colour`; all, where there is no colour."""
    return [c for c in colours if not colour or math.dist(COLOURS[c], COLOURS[colour]) >= MIN_CONTRAST]


def make_design(rng, subcategory, colour=None, colours=tuple(COLOURS)):
    """A product's attributes as a dict, both colours from `colours`; what the kind does not have is None."""
    kind, field, value, _ = SUBCATEGORIES[subcategory]
    colour = colour or rng.choice(colours)
    pattern = "plain" if rng.random() < PLAIN_SHARE else rng.choice(list(PATTERNS)[1:])
    second = None if pattern == "plain" else rng.choice(contrasting(colour, colours))
    sleeve, neckline, detail = (rng.choice(allowed.split() or [None]) for allowed in KINDS[kind][1:])
    design = {"kind": kind, "colour": colour, "second": second, "pattern": pattern, "sleeve": sleeve}
    return {**design, "neckline": neckline, "length": None, "detail": detail, "cut": None, field: value}


def change_design(rng, design):
    """A copy with one visible thing changed (two fields where a pattern comes or goes)."""
    choices = dict(zip(("sleeve", "neckline", "detail"), map(str.split, KINDS[design["kind"]][1:]), strict=True))
    choices |= {"colour": contrasting(design["second"]), "pattern": list(PATTERNS)}
    choices |= {"second": contrasting(design["colour"])} if design["second"] else {}
    choices |= {"length": list(PARTS["length"])} if design["kind"] == "dress" else {}
    choices = {field: [v for v in values if v != design[field]] for field, values in choices.items()}
    field = rng.choice([field for field, values in choices.items() if values])
    new = {**design, field: rng.choice(choices[field])}
    second = new["second"] or rng.choice(contrasting(new["colour"]))
    return {**new, "second": None if new["pattern"] == "plain" else second}


def differences(old, new):
    """The fields in which two designs differ."""
    return [field for field in FIELDS if old[field] != new[field]]


def subcategory_of(design):
    """Name of the one sub-category whose fixed value the design has."""
    (name,) = [s for s, (kind, f, value, _) in SUBCATEGORIES.items() if (kind, value) == (design["kind"], design[f])]
    return name


def attributes(design):
    """Names of what can be seen, for attributes_id."""
    return [f"{field}:{design[field]}" for field in FIELDS if design[field] not in (None, "none")]


def label_names():
    """The three lists of labels.json; they do not depend on seed or size."""
    tables = {"kind": KINDS, "colour": COLOURS, "second": COLOURS, "pattern": PATTERNS, **PARTS}
    return {
        "attributes": [f"{field}:{value}" for field in FIELDS for value in tables[field] if value != "none"],
        "categories": list(dict.fromkeys(row[0] for row in KINDS.values())),
        "subcategories": list(SUBCATEGORIES),
    }


# --- texts ------------------------------------------------------------------------------------------------------------


def write_texts(rng, design):
    """(title, description): 'striped navy and white cotton midi dress' and one or two sentences on what else is seen.

    Each fact is said once, as shops do: a masked word is told by the picture, not by the next sentence."""
    name = subcategory_of(design)
    _, told, _, synonym = SUBCATEGORIES[name]
    fields = [field for field in ("sleeve", "neckline", "detail") if design[field] and field != told]
    parts = [rng.choice(PARTS[field][design[field]]) for field in fields]
    rng.shuffle(parts)
    words = {
        "pattern": rng.choice(PATTERNS[design["pattern"]][0]),
        "colours": " and ".join(filter(None, (design["colour"], design["second"]))),
        "noun": rng.choice((name, synonym)),
        "parts": " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1]))),
        "fabric": rng.choice(FABRICS),
        "brand": rng.choice(BRANDS),
    }
    sentences = [rng.choice(FEATURES)] + [rng.choice(FILLERS)] * (rng.random() < 0.3)
    return rng.choice(TITLES).format(**words), " ".join(sentences).format(**words)


def write_changes(rng, old, new):
    """Two FashionIQ captions, differently worded; each names every field in which design `new` differs from `old`."""

    def figure(design):
        noun = rng.choice(PATTERNS[design["pattern"]][1])
        article = "a " if design["pattern"] == "block" else ""
        return f"{article}{design['second']} {noun}" if design["second"] else noun

    clauses, fields = [], differences(old, new)
    for field in fields:
        if field == "second" and "pattern" in fields:
            continue  # said with the pattern
        wordings = CHANGES["plain" if (field, new[field]) == ("pattern", "plain") else field]
        wordings += CHANGES.get(f"{field} {old[field]} {new[field]}", ())
        if field == "colour":
            words = [new[field], old[field]]
        else:
            words = [rng.choice(PARTS[field][x[field]]) if field in PARTS else figure(x) for x in (new, old)]
        words = {"new": words[0], "old": words[1], "adjective": rng.choice(PATTERNS[new["pattern"]][0])}
        clauses.append([wording.format(**words) for wording in rng.sample(wordings, 2)])
    return [" and ".join(said) for said in zip(*clauses, strict=True)]


def make_vocab():
    """WordPiece vocabulary (list of str) that covers every text this file can write, without [UNK].

    Taken from the tables, not the texts: all catalogues share it, so a model trained on one fits the next."""
    tables = (list(COLOURS), PATTERNS, PARTS, KINDS, SUBCATEGORIES, FABRICS, BRANDS, TITLES, FEATURES, FILLERS, CHANGES)
    words = set(re.findall(r"[a-z]+", re.sub(r"\{\w+\}", "", json.dumps(tables)) + STEMS)) | {"and"}
    # A word whose stem is a word too is left out: it becomes two pieces, and whole-word masking has work to do.
    split = {w for w in words for s in SUFFIXES if w.endswith(s) and len(w) - len(s) > 2 and w[: -len(s)] in words}
    pieces = [*CHARACTERS, *("##" + c for c in CHARACTERS), *("##" + s for s in SUFFIXES), *sorted(words - split)]
    return [*SPECIALS, *dict.fromkeys(pieces)]


# --- pictures ---------------------------------------------------------------------------------------------------------
# Coordinates are percent of the side, x to the right and y down. Points are pairs, or a string "x,y x,y ...". What is
# drawn as a pair, left and right, counts x from the middle.

DARK, CREAM, METAL = (44, 36, 38), (247, 238, 216), (188, 190, 198)
SHADOW = (90, 88, 92)
BACKDROPS = ((226, 227, 230), (233, 227, 214), (212, 222, 232), (232, 220, 218), (216, 224, 214), (205, 206, 210))
SUPERSAMPLING = 2
JPEG_QUALITY = 88
BLOCK_HEIGHT = {"dress": 42, "skirt": 42, "trousers": 56, "bag": 66, "shoe": 58}  # where the lower colour begins, or 51
UPPER = {  # half-widths of shoulder, chest, waist; height of the waist
    "dress": (20, 18, 13.5, 42),
    "shirt": (25, 23.5, 22.5, 60),
    "top": (24, 22, 20, 58),
    "jumper": (26, 26, 27, 62),
    "coat": (23, 22, 20.5, 48),
}
HEMS = {  # kind: {length: (height, half-width)}
    "dress": {"short": (74, 27), "mid": (85, 32), "long": (97, 37)},
    "coat": {"short": (69, 25), "long": (97, 31)},
    "skirt": {"short": (64, 32), "mid": (80, 38), "long": (96, 41)},
    "shirt": {None: (90, 25)},
    "top": {None: (87, 24)},
    "jumper": {None: (88, 26)},
}
NECKS = {  # outline; filled with the dark inside of the back, but roll (cloth) and stand (contrast)
    "v": "39,8 61,8 50,29",
    "square": "39,9 61,9 61,21 39,21",
    "roll": "40,3 60,3 61,14 39,14",
    "stand": "40,4 60,4 61,11 39,11",
}


def parse(points):
    return [tuple(map(float, p.split(","))) for p in points.split()] if isinstance(points, str) else list(points)


def soften(points, cut):
    """Corners cut off twice (Chaikin), so that cloth looks like cloth."""
    points = np.asarray(points, float)
    for _ in range(2):
        after = np.roll(points, -1, axis=0)
        points = np.stack([points * (1 - cut) + after * cut, points * cut + after * (1 - cut)], 1).reshape(-1, 2)
    return [tuple(p) for p in points]


def arc(x, y, rx, ry, start=0, stop=360):
    """Points on an ellipse, degrees clockwise from the right."""
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in np.radians(np.linspace(start, stop, 25))]


@lru_cache
def pattern_mask(pattern, n, block_height):
    """(n, n) L image, 255 where the second colour goes: coarse enough for 64 pixels, and less than half of the area,
    so that 'navy with white stripes' is not 'white with navy stripes'."""
    y, x = np.mgrid[0:n, 0:n] / n
    if pattern in ("dotted", "floral"):  # figures in staggered rows
        rows = {"dotted": 7, "floral": 4.5}[pattern]
        u, v = (x * rows + 0.5 * (np.floor(y * rows) % 2)) % 1 - 0.5, (y * rows) % 1 - 0.5
        r = np.hypot(u, v)
        on = r < 0.33 if pattern == "dotted" else (r < 0.29 + 0.16 * np.cos(5 * np.arctan2(v, u))) & (r > 0.1)
    else:
        on = {
            "striped": (y * 8) % 1 < 0.4,
            "checked": 0.5 * ((x * 6) % 1 < 0.42) + 0.5 * ((y * 6) % 1 < 0.42),
            "zigzag": (y * 6 + 1.1 * np.abs((x * 5) % 1 - 0.5)) % 1 < 0.4,
            "block": y * 100 > block_height,
        }[pattern]
    return Image.fromarray(np.uint8(np.asarray(on, float) * 255))


@lru_cache
def fold_shade(n, variant):
    """(n, n) RGB image to multiply with: soft folds, and light from the upper left."""
    y, x = np.mgrid[0:n, 0:n] / n
    folds = 0.045 * np.sin(x * (17 + 4 * variant) + 3 * np.sin(y * (3 + variant) + variant)) * (0.4 + y)
    shade = np.clip(0.985 + folds - 0.10 * (x - 0.35) ** 2 - 0.07 * y, 0, 1)
    return Image.fromarray(np.uint8(shade * 255)).convert("RGB")


@lru_cache
def backdrop(n, variant):
    """(n, n) RGB image: a studio wall, lighter in the middle, and the beginning of a floor."""
    y, x = np.mgrid[0:n, 0:n] / n
    light = 1.06 - 0.16 * ((x - 0.5) ** 2 + (y - 0.45) ** 2) - 0.05 * np.clip((y - 0.86) * 12, 0, 1)
    return Image.fromarray(np.uint8(np.clip(light[..., None] * np.array(BACKDROPS[variant]), 0, 255)))


class Sheet:
    """A garment being drawn: `rgb` has cloth everywhere, so that edges do not fringe; `alpha` says where it is."""

    def __init__(self, n, cloth, colour):
        self.n, self.cloth, self.rgb, self.alpha = n, cloth, cloth.copy(), Image.new("L", (n, n))
        self.edge = tuple(c // 2 for c in colour)
        self.inside = tuple(c // 3 for c in colour)
        self.ink = CREAM if sum(colour) < 300 else DARK  # what stands out on the cloth

    def part(self, points, fill=None, cut=0.16):
        """A closed piece of cloth (or of colour `fill`) with an outline; `cut` 0 keeps corners sharp."""
        points = soften(parse(points), cut) if cut else parse(points)
        scaled = [(x * self.n / 100, y * self.n / 100) for x, y in points]
        ImageDraw.Draw(self.alpha).polygon(scaled, fill=255)
        if fill:
            ImageDraw.Draw(self.rgb).polygon(scaled, fill=fill)
        else:
            piece = Image.new("L", (self.n, self.n))
            ImageDraw.Draw(piece).polygon(scaled, fill=255)
            self.rgb.paste(self.cloth, mask=piece)
        self.line([*points, points[0]])

    def pair(self, points, fill=None, cut=0.16):
        """Two pieces, right and left."""
        for side in (1, -1):
            self.part([(50 + side * x, y) for x, y in parse(points)], fill, cut)

    def body(self, half, cut=0.16):
        """One piece from its right half, top to bottom."""
        half = parse(half)
        self.part([(50 + x, y) for x, y in half] + [(50 - x, y) for x, y in reversed(half)], None, cut)

    def line(self, points, fill=None, width=0.9):
        points, width = [(x * self.n / 100, y * self.n / 100) for x, y in parse(points)], round(width * self.n / 100)
        for image, colour in ((self.rgb, fill or self.edge), (self.alpha, 255)):
            ImageDraw.Draw(image).line(points, fill=colour, width=max(1, width), joint="curve")

    def ribs(self, top, bottom, reach, step=3.5):
        for x in np.arange(-reach, reach + 1, step):
            self.line([(50 + x, top), (50 + x, bottom)], width=0.4)

    def band(self, top, bottom, reach):
        """Contrast colour on what lies between two heights, at most `reach` from the middle: belt, border."""
        box = [round(v * self.n / 100) for v in (50 - reach, top, 50 + reach, bottom)]
        self.rgb.paste(self.ink, box, self.alpha.crop(box))

    def dot(self, x, y, r, fill=None):
        self.part(arc(x, y, r, r), fill or self.ink, cut=0)


# Each draws one silhouette and returns where details go: belt and hem (top, bottom, reach), front (x, top, bottom),
# pockets (distance from the middle, top, half-width), bow (x, y), zip (a line).


def draw_upper(sheet, design, wide):
    kind, sleeve, neck, detail = design["kind"], design["sleeve"], design["neckline"], design["detail"]
    (shoulder, chest, waist, waist_y), (hem_y, hem) = UPPER[kind], HEMS[kind][design["length"]]
    chest, waist, hem = chest * wide, waist * wide, hem * wide
    if neck == "hood":
        sheet.part(arc(50, 13, 17, 11.5), cut=0)
        sheet.part(arc(50, 14.5, 11.5, 8), sheet.inside, cut=0)
    if sleeve != "sleeveless":
        thick = 3 if kind in ("jumper", "coat") else 0
        outer, inner = ((37, 28), (27 - thick, 34.5)) if sleeve == "short" else ((40, 74), (32.5 - thick, 75.5))
        sheet.pair([(shoulder - 4, 12), (shoulder + 3.5, 18), outer, inner, (chest - 3, 36)])
        if kind in ("jumper", "shirt") or detail == "trim":  # cuffs
            cuff = [outer, inner, (inner[0] - 0.8, inner[1] - 5), (outer[0] - 0.8, outer[1] - 5)]
            sheet.pair(cuff, sheet.ink if detail == "trim" else None, cut=0)
    top = (16, 12.5) if sleeve == "sleeveless" else (shoulder, 12.5)
    tail = [(8, hem_y + 5)] if kind == "shirt" else []
    sheet.body([(9.5, 9), top, (chest, 32), (waist, waist_y), (hem, hem_y - 3), (hem - 3, hem_y), *tail])
    if kind == "dress":
        sheet.line([(50 - waist, waist_y), (50 + waist, waist_y)], width=0.5)
        for x in (-0.6, -0.2, 0.2, 0.6):
            sheet.line([(50 + x * waist, waist_y + 3), (50 + x * hem, hem_y - 2)], width=0.5)
    if kind in ("shirt", "coat"):
        sheet.line([(50, 21), (50, hem_y)])
    if neck == "round":
        sheet.part(arc(50, 8.5, 10.5, 8.5, 0, 180), sheet.inside, cut=0)
    elif neck == "collar":
        deep = 17 if kind == "coat" else 10
        lapel = [(0, 9 + deep * 0.8), (9, 5.5), (14.5, 14), (9, 9 + deep)]
        sheet.pair(lapel, sheet.ink if kind == "shirt" else None, cut=0)
    elif neck in NECKS:
        sheet.part(NECKS[neck], {"roll": None, "stand": sheet.ink}.get(neck, sheet.inside), cut=0)
    if kind == "shirt":
        for y in range(22, 84, 12):
            sheet.dot(50, y, 1)
    if kind == "jumper" and detail != "trim":
        sheet.ribs(hem_y - 6.5, hem_y - 1, 21)
    low = kind in ("shirt", "top")
    return {
        "belt": (waist_y - 2.5, waist_y + 3, waist + 1.5),
        "front": (50, 30, min(hem_y - 5, 80)),
        "pockets": (12, 33, 6) if low else (11.5, 60 if kind == "jumper" else 54, 6),
        "bow": (50, {"dress": waist_y, "shirt": 18}.get(kind, 31)),
        "hem": (hem_y - 7.5, hem_y + 6, hem + 2),
        "zip": [(50, 19 + 10 * (neck == "v")), (50, 72)],
    }


def draw_skirt(sheet, design, wide):
    hem_y, hem = HEMS["skirt"][design["length"]]
    top = {"short": 22, "mid": 14, "long": 6}[design["length"]]
    hem = hem * wide
    sheet.body([(18, top), (18.5, top + 7), (25, top + 21), (hem, hem_y - 2), (hem * 0.6, hem_y + 1.5)])
    sheet.line([(32, top + 7), (68, top + 7)])
    for x in (-0.75, -0.4, 0, 0.4, 0.75):
        sheet.line([(50 + x * 18, top + 8), (50 + x * hem, hem_y - 1)], width=0.5)
    spots = {"belt": (top, top + 7, 20), "front": (50, top + 12, hem_y - 4), "bow": (50, top + 7)}
    return spots | {"hem": (hem_y - 7, hem_y + 3, 48)}


def draw_legs(sheet, design, wide):
    top, waist, hip, crotch, hem_y, outer, inner = {
        "slim": (5, 16.5, 20.5, 36, 95, 20, 7.5),
        "wide": (5, 16.5, 20.5, 36, 95, 34, 6),
        "short": (16, 22, 28, 50, 76, 35, 4.5),
    }[design["cut"]]
    outer = outer * wide
    half = [(waist, top), (waist + 0.5, top + 7), (hip, crotch - 10), (outer, hem_y), (inner, hem_y), (0, crotch)]
    sheet.body(half, cut=0.06)
    sheet.line([(50 - waist, top + 7), (50 + waist, top + 7)])
    sheet.line([(50, top + 7), (50, crotch)])
    for s in (1, -1):
        sheet.line([(50 + s * hip * 0.55, crotch), (50 + s * (outer + inner) / 2, hem_y - 2)], width=0.5)
    spots = {"belt": (top + 1, top + 8, 30), "pockets": (hip * 0.55, top + 14, 5.5), "bow": (50, top + 8)}
    return spots | {"hem": (hem_y - 7.5, hem_y + 1, 48)}


def draw_bag(sheet, design, wide):
    if design["cut"] == "tote":
        sheet.line(arc(50, 40, 17, 28, 180, 360), width=3.5)
        sheet.body([(34, 38), (36 * wide, 90), (20, 93)])
        sheet.line("17,44 83,44")
        return {"pockets": (15, 56, 8), "bow": (50, 54), "hem": (82, 93, 30), "zip": parse("22,52 78,52")}
    sheet.line(arc(50, 52, 36, 46, 180, 360), width=2.2)
    sheet.body([(38 * wide, 46), (40 * wide, 62), (30, 84), (12, 92)])
    sheet.body([(38.5 * wide, 46), (36 * wide, 58), (20, 66), (6, 68)])
    sheet.dot(50, 67, 3, METAL)
    return {"pockets": (15, 70, 7), "bow": (50, 54), "hem": (80, 90, 30), "zip": parse("22,53 78,53")}


def draw_shoe(sheet, design, wide):
    if design["cut"] == "boot":
        sheet.part("18,84 95,84 95,91 42,91 42,95 18,95", DARK, cut=0)
        sheet.part("24,6 56,6 56,50 72,62 92,72 94,86 20,86 24,50")
        return {"bow": (50, 50), "hem": (6, 15, 40), "zip": parse("33,12 33,78")}
    if design["cut"] == "trainer":
        sheet.part("5,70 95,72 96,82 6,82", CREAM)
        sheet.part("6,34 18,36 32,42 48,33 66,50 92,58 96,73 6,72")
        for x, y in zip((45, 51, 57, 63), (43, 47, 51, 55), strict=True):  # laces
            sheet.line([(x, y), (x + 8, y - 7)], CREAM, 2)
        return {"bow": (50, 36), "hem": (63, 71, 50), "zip": parse("14,42 24,68")}
    sheet.part("10,30 20,32 19,88 13,88", DARK, cut=0)
    sheet.part("7,22 22,28 42,52 62,56 80,66 95,82 94,88 70,87 50,76 30,55 12,46")
    return {"bow": (66, 60), "hem": (80, 89, 50), "zip": parse("13,30 24,46")}


def draw_hat(sheet, design, wide):
    if design["cut"] == "sun":
        sheet.part(arc(50, 66, 46, 15 * wide), cut=0)
        sheet.body([(12, 20), (24, 30), (27, 62), (20, 71), (8, 73)])
        return {"bow": (70, 62), "hem": (52, 64, 27), "front": (50, 27, 50)}
    sheet.dot(50, 15, 10, sheet.edge)
    sheet.part([*arc(50, 68, 36 * wide, 50, 180, 360), (86, 72), (14, 72)], cut=0)
    sheet.body([(38.5 * wide, 66), (38.5 * wide, 86)])
    sheet.ribs(68, 85, 35)
    return {"bow": (50, 66), "hem": (67, 85, 40), "front": (50, 30, 62)}


def draw_scarf(sheet, design, wide):
    sheet.part([(52, 28), (74, 26), (80 * wide, 80), (57, 82)])
    sheet.part("28,26 50,28 45,92 20,90")
    sheet.part(arc(50, 22, 30, 15), cut=0)
    sheet.part(arc(50, 17, 19, 6.5), sheet.inside, cut=0)
    return {"front": (35, 44, 80), "hem": (78, 93, 35)}


DRAWERS = {"dress": draw_upper, "shirt": draw_upper, "top": draw_upper, "jumper": draw_upper, "coat": draw_upper}
DRAWERS |= {"skirt": draw_skirt, "trousers": draw_legs, "shorts": draw_legs, "bag": draw_bag, "shoe": draw_shoe}
DRAWERS |= {"hat": draw_hat, "scarf": draw_scarf}


def draw_detail(sheet, detail, spots):
    """One eye-catching extra, where the silhouette has its place for it."""
    if detail == "belt":
        top, bottom, reach = spots["belt"]
        sheet.band(top, bottom, reach)
        sheet.pair([(0, top - 1), (4, top - 1), (4, bottom + 1), (0, bottom + 1)], METAL, cut=0)
    elif detail == "buttons":
        x, top, bottom = spots["front"]
        for y in np.linspace(top, bottom, 5):
            sheet.dot(x, y, 2.4)
    elif detail == "pockets":
        x, y, r = spots["pockets"]
        low, point = y + 1.7 * r, y + 2.3 * r
        sheet.pair([(x - r, y), (x + r, y), (x + r, low), (x, point), (x - r, low)], sheet.edge, 0)
        sheet.pair([(x - r, y), (x + r, y), (x + r, y + 2), (x - r, y + 2)], sheet.ink, 0)
    elif detail == "bow":
        x, y = spots["bow"]
        for s in (1, -1):
            sheet.part([(x, y), (x + s * 3, y + 16), (x + s * 8.5, y + 14)], sheet.ink, cut=0)
            sheet.part([(x, y), (x + s * 12, y - 7), (x + s * 12, y + 7)], sheet.ink)
        sheet.dot(x, y, 2.5)
    elif detail == "zip":
        sheet.line(spots["zip"], DARK, 4)
        sheet.line(spots["zip"], METAL, 2)
        sheet.dot(*spots["zip"][1], 2.8, METAL)
    elif detail == "trim":
        sheet.band(*spots["hem"])
    elif detail == "tassels":
        top, _, reach = spots["hem"]
        cloth = np.asarray(sheet.alpha) > 0
        for x in np.linspace(50 - reach * 0.8, 50 + reach * 0.8, 9):
            lowest = np.flatnonzero(cloth[:, int(x * sheet.n / 100)]).max(initial=0) * 100 / sheet.n
            if lowest > top - 6:
                sheet.line([(x, lowest - 5), (x, min(99, lowest + 8))], sheet.ink, 2)


def draw_garment(design, rng, size):
    """The product without its surroundings, twice as large: RGBA (2 * size, 2 * size)."""
    n, colour = SUPERSAMPLING * size, COLOURS[design["colour"]]
    cloth = Image.new("RGB", (n, n), colour)
    if design["second"]:
        mask = pattern_mask(design["pattern"], n, BLOCK_HEIGHT.get(design["kind"], 51))
        cloth.paste(COLOURS[design["second"]], mask=mask)
    sheet = Sheet(n, cloth, colour)
    draw_detail(sheet, design["detail"], DRAWERS[design["kind"]](sheet, design, rng.uniform(0.95, 1.05)))
    # Volume: darker towards the edge, which is where a blurred silhouette fades.
    volume = sheet.alpha.filter(ImageFilter.BoxBlur(n // 18)).point([150 + 105 * v // 255 for v in range(256)])
    garment = ImageChops.multiply(sheet.rgb, fold_shade(n, rng.randrange(4)))
    garment = ImageChops.multiply(garment, Image.merge("RGB", [volume] * 3))
    garment.putalpha(sheet.alpha)
    return garment


def photograph(garment, rng, view, size):
    """One view of a garment, RGB (size, size): 0 stands straight, 1 is another pose, 2 comes closer."""
    n = garment.width
    turn = math.radians(rng.uniform(-3, 3) if view == 0 else rng.uniform(-9, 9))
    lean = 0 if view == 0 else rng.uniform(-0.07, 0.07)
    zoom = rng.uniform(1.22, 1.38) if view == 2 else rng.uniform(0.92, 1.03)
    x, y = (n / 2 + n * rng.uniform(-0.03, 0.03) for _ in range(2))  # where the garment's middle lands
    a, b, d = math.cos(turn) / zoom, math.sin(turn) / zoom + lean, -math.sin(turn) / zoom
    affine = (a, b, n / 2 - a * x - b * y, d, a, n / 2 - d * x - a * y)  # picture -> garment
    posed = garment.transform((n, n), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR).reduce(SUPERSAMPLING)
    alpha = posed.getchannel("A")
    picture = backdrop(size, rng.randrange(len(BACKDROPS))).copy()
    shadow = Image.new("L", (size, size))
    shadow.paste(alpha, (round(size * 0.03), round(size * 0.035)))
    shadow = shadow.filter(ImageFilter.BoxBlur(size / 28))
    picture.paste(SHADOW, mask=shadow.point([int(v * 0.45) for v in range(256)]))
    picture.paste(posed.convert("RGB"), mask=alpha)
    gain, warmth = rng.uniform(0.9, 1.05), rng.uniform(-0.03, 0.03)  # lighting
    return picture.point([min(255, int(v * gain * tint)) for tint in (1 + warmth, 1, 1 - warmth) for v in range(256)])


# --- folders ----------------------------------------------------------------------------------------------------------


class Catalogue:
    """Where products are drawn and written. Everything random comes from (seed, folder, number)."""

    def __init__(self, root, seed, products, size):
        self.root, self.seed, self.share, self.size = root, seed, products / 2000, size
        self.labels = label_names()
        self.products = {}  # "folder/id" -> design
        self.taken = set()  # designs in use: each product is the only one, so no held-out design is trained on

    def count(self, number, least):
        return max(least, round(number * self.share))

    def rng(self, *key):
        return random.Random("/".join(map(str, (self.seed, *key))))

    def write(self, name, content):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def new(self, make, *args, **kwargs):
        """The first design from `make` that no other product has."""
        while tuple((design := make(*args, **kwargs)).values()) in self.taken:
            pass
        self.taken.add(tuple(design.values()))
        return design

    def shoot(self, folder, name, design, rng, views, sub="images"):
        """Draw and save views of a product; returns the file names."""
        self.products[f"{folder}/{name}"] = {**design, "subcategory": subcategory_of(design)}
        garment = draw_garment(design, rng, self.size)
        files = [f"{name}.jpg" if len(views) == 1 else f"{name}_{i}.jpg" for i in range(len(views))]
        place = self.root / folder / sub
        place.mkdir(parents=True, exist_ok=True)
        for file, view in zip(files, views, strict=True):
            photograph(garment, rng, view, self.size).save(place / file, quality=JPEG_QUALITY)
        return files

    def ids(self, design):
        """The three label fields of a product."""
        attribute, category, subcategory = (names.index for names in self.labels.values())
        return {
            "attributes_id": sorted(map(attribute, attributes(design))),
            "category_id": category(KINDS[design["kind"]][0]),
            "subcategory_id": subcategory(subcategory_of(design)),
        }


def make_described(cat):
    """FashionGen, BigFACAD, Fashion200k: products with texts. What is held out is designed first."""
    subcategories, colours = list(SUBCATEGORIES), list(COLOURS)
    every = len(subcategories)  # so that training has seen all of them
    fashiongen, facad = "title description category_id subcategory_id", "color title description"
    trained = {"FashionGen": cat.count(1000, every), "BigFACAD": cat.count(300, 8), "Fashion200k": cat.count(250, 8)}
    for folder, part, number, sub, keys in (
        ("FashionGen", "val", cat.count(200, 8), "val", fashiongen),
        ("FashionGen", "train", trained["FashionGen"], "train", fashiongen),
        ("BigFACAD", "val", cat.count(60, 4), "images", facad),
        ("BigFACAD", "train", trained["BigFACAD"], "images", facad),
        ("Fashion200k", "test", cat.count(50, 4), "images", "title"),
        ("Fashion200k", "train", trained["Fashion200k"], "images", "title"),
    ):
        first = 0 if part == "train" else trained[folder]  # ids are unique in a folder
        rows = []
        for i in range(number):
            rng = cat.rng(folder, first + i)
            # A step of 10, so that few products already span the kinds. The FashionGen val products are the gallery
            # of the retrieval test: 27 sub-categories and 14 colours have no common factor, so all pairs differ.
            colour = colours[i * 5 % len(colours)] if sub == "val" else None
            design = cat.new(make_design, rng, subcategories[i * 10 % every], colour)
            one = sub == "val" or folder == "Fashion200k"
            views = (0,) if one else (0, 1, 2) if rng.random() < 0.5 else (0, rng.choice((1, 2)))
            title, description = write_texts(rng, design)
            images = cat.shoot(folder, first + i, design, rng, views, sub)
            row = {"id": first + i, "images": images, "color": design["colour"], "title": title}
            row |= {"description": description, **cat.ids(design)}
            rows.append({key: row[key] for key in ("id", "images", *keys.split(), "attributes_id")})
        cat.write(f"{folder}/{part}_info.json", rows)


def make_outfits(cat):
    """PolyvoreOutfits. The rule: items of an outfit are of different kinds and of one colour family."""
    kinds, metadata, rows, pools = list(KINDS), {}, [], {}
    each = cat.count(6, 1)  # items of one kind and family: 36 per kind in the test gallery, 6 of them in tune
    for part in ("train", "test"):
        pools[part] = {(family, kind): [] for family in FAMILIES for kind in kinds}
        for (family, kind), pool in pools[part].items():
            for _ in range(each):
                name = str(10001 + len(metadata))
                rng = cat.rng("PolyvoreOutfits", name)
                subcategory = rng.choice([s for s, row in SUBCATEGORIES.items() if row[0] == kind])
                design = cat.new(make_design, rng, subcategory, colours=tuple(FAMILIES[family]))
                title, description = write_texts(rng, design)
                texts = {"title": title, "description": description}
                (image,) = cat.shoot("PolyvoreOutfits", name, design, rng, (0,))
                metadata[name] = {"category_id": str(kinds.index(kind)), **texts, "semantic_category": kind}
                ids = {"attributes_id": cat.ids(design)["attributes_id"]}
                rows += [{"id": int(name), "images": image, **texts, **ids}] * (part == "train")
                pool.append(name)
    both = {key: pool + pools["test"][key] for key, pool in pools["train"].items()}
    for split in ("disjoint", "nondisjoint"):
        for part, number in (("train", cat.count(150, 12)), ("test", cat.count(60, 6))):
            rng, pool, questions = cat.rng("outfits", split, part), pools[part] if split == "disjoint" else both, []
            for i in range(number):
                family = list(FAMILIES)[i % len(FAMILIES)]
                items = [rng.choice(pool[family, kind]) for kind in rng.sample(kinds, rng.randint(3, 5))]
                questions += [{"question": [x for x in items if x != blank], "blank": blank} for blank in items]
            if part == "test":
                asked = {row["blank"] for row in questions}
                rest = [x for ids in pools["test"].values() for x in ids if x not in asked]
                # Fake rows are no queries: they only put the other test items into the gallery.
                fake = [{"question": [rng.choice(rest)], "blank": x, "fake_data": True} for x in rest]
                questions = [{**row, "fake_data": False} for row in questions] + fake
            cat.write(f"PolyvoreOutfits/ocir_{split}_{part}.json", questions)
    cat.write("PolyvoreOutfits/polyvore_item_metadata.json", metadata)
    cat.write("PolyvoreOutfits/train_info.json", rows)
    cat.write("PolyvoreOutfits/categories.json", kinds)


def make_fashioniq(cat):
    """FashionIQ: trios of products (a design, a change of it, a change of either); a pair is two of a trio.

    All designs differ, so a candidate and its captions fit one target; the third of the trio is the trap."""
    for name, kind in FASHIONIQ_KINDS.items():
        subcategories = [s for s, row in SUBCATEGORIES.items() if row[0] == kind]
        for part, trios, most in (("val", cat.count(60, 6), 3), ("train", cat.count(90, 10), 6)):
            rows, split = [], []
            for i in range(trios):
                rng = cat.rng("FashionIQ", name, part, i)
                trio = [cat.new(make_design, rng, rng.choice(subcategories))]
                trio.append(cat.new(change_design, rng, trio[0]))
                trio.append(cat.new(change_design, rng, rng.choice(trio)))
                asins = [f"{name}{part[0]}{i:04d}{letter}" for letter in "abc"]
                for asin, design in zip(asins, trio, strict=True):
                    cat.shoot("FashionIQ", asin, design, rng, (rng.choice((0, 1)),))
                pairs = [(a, b) for a in range(3) for b in range(3) if 1 <= len(differences(trio[a], trio[b])) <= 2]
                for a, b in rng.sample(pairs, min(len(pairs), most - i % 2)):
                    captions = write_changes(rng, trio[a], trio[b])
                    rows.append({"target": asins[b], "candidate": asins[a], "captions": captions})
                split += asins
            cat.write(f"FashionIQ/captions/cap.{name}.{part}.json", rows)
            cat.write(f"FashionIQ/image_splits/split.{name}.{part}.json", split)


def make_catalogue(out, seed=0, products=2000, size=128):
    """Write a demo catalogue to `out`. Returns False where the same one stands there already, else True.

    `products` scales all folders (2000: FashionGen has 1,000 + 200), `size` is the side of the pictures in pixels.
    Raises FileExistsError where `out` holds anything else. Nothing half-written ever stands under `out`."""
    out = Path(out).absolute()
    settings = {"made_by": "prepare/demo.py", "seed": seed, "products": products, "size": size}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        mark = out / "demo.json"
        if mark.is_file() and json.loads(mark.read_text()) == settings:
            return False
        raise FileExistsError(f"{out} is there and is not this catalogue; name another folder or remove it")
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        cat = Catalogue(aside, seed, products, size)
        for make in (make_described, make_outfits, make_fashioniq):
            make(cat)
        cat.write("labels.json", cat.labels)
        cat.write("products.json", cat.products)
        (aside / "vocab.txt").write_text("\n".join(make_vocab()) + "\n", encoding="utf-8")
        cat.write("demo.json", settings)
        aside.replace(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # gone by now, or half-written
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=os.path.expanduser, help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another catalogue")
    parser.add_argument("--products", type=int, default=2000, help="about how many; scales all folders")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels")
    args = parser.parse_args()
    try:
        made = make_catalogue(**vars(args))
    except FileExistsError as error:
        sys.exit(f"demo: {error}")
    print(f"{args.out}: {'written' if made else 'already there'}")


if __name__ == "__main__":
    main()
