"""Your own products: CSV, JSON, XML, Excel or parquet -> the FashionGen layout, with pseudo-attributes from the texts.

    python -m prepare.catalogue --products=products.csv --out=data/mine --title=name --images=photos
    python -m prepare.catalogue --products=data/raw --out=data/kagl --id=item_ID --title=text --images=image  # parquet
    python -m prepare.catalogue --root=data/datasets --out=data/relabelled   # existing sets, one new vocabulary
    python -m prepare.catalogue --root=data/datasets                         # ... in place

A row is a product; rows that share an id are one product (a row per photo is fine), and a product stands wholly in
train or wholly in val. Settings may stand in a file of plain assignments, as those of training do.

Pseudo-attributes (PAC's labels) are the words and short phrases that many, but not too many, training texts hold. No
tagger: `phrases` and `mine` are all there is to it, and head and tail of the vocabulary are printed to be judged."""

import os
import re
import tempfile
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers.pre_tokenizers import BertPreTokenizer
from tqdm import tqdm

from plumbing import annotations, ending, settings
from plumbing.photos import CROPPED, RESIZED, open_image
from plumbing.settings import FROM_0, InputError, setting
from prepare import layout
from prepare.cells import image_columns, image_file, image_names, is_no_value, read_row
from prepare.rows import COLUMNS, read_tables

CUT = BertPreTokenizer()
JOINT = "\u00ad"  # a hyphen inside of a word while words are cut: to BERT it is a part of the word

# Words that tell nothing of how a garment looks; no phrase crosses them. --stop_words adds those of a shop.
STOP_WORDS = frozenset(
    """
a about above after all also always an and any are as at be been before best both but by can comes complete day do does
during each easy even every everyday featuring features find for from get give gives go goes good great ha has have he
her here him his how i if in into is it its itself just keep keeps let like look looks love loved made make makes many
may more most much must my need new no not now of off offers on once one only or other our out over own pair perfect per
piece please quite really s same set she should similar simple so some still style such t take than that the their them
then there these they this those though through thus to too two under until up upon us use used using very want was way
we wear wearing well were what when where which while who will with within without would yet you your youre
bleach brand care clean cloth cm cold composition detergent dry height hand iron machine mild mm model product remove
separately shade size statistics team tumble wash water wears wipe wring
""".split()
)


@dataclass
class CatalogueConfig:
    """Settings of `python -m prepare.catalogue`."""

    products: str = setting(
        "",
        "file of products: CSV (first line: column names), JSON, XML, Excel or parquet; or a folder of .parquet",
    )
    root: str = setting("", "instead of --products: an existing data root whose attributes_id are mined anew")
    out: str = setting("", "data root to make; empty with --root: in place")
    id: str = setting("id", "column of the product's id; where there is none, rows are numbered")
    images: str = setting("images", "column of images: text with --separator, or a list; or a template: a/{id:.3}.jpg")
    title: str = setting("title", "column of the title")
    description: str = setting("description", "column of the description; may be absent, as the next two")
    category: str = setting("category", "column of the category's name")
    subcategory: str = setting("subcategory", "column of the sub-category's name")
    language: str = setting("", "the language to take where a text stands in several, such as en")
    separator: str = setting(";", "between the image paths of a row")
    photos: str = setting("", "folder of the photos, also of downloaded ones; empty: the folder of --products")
    image_size: int = setting(
        0, "write photos no larger than training at this --image_size needs; 0: as they are", FROM_0
    )
    link: bool = setting(False, "link the image files instead of copying them")
    skip_faulty: bool = setting(False, "list faulty rows and leave them out instead of stopping")
    keep_shared: bool = setting(False, "keep photos of ten and more titles, such as a size chart or a logo")
    val_share: float = setting(0.1, "share of the products that goes to val")
    seed: int = setting(0, "the split follows from it")
    vocabulary: int = setting(2232, "at most so many pseudo-attributes, the most frequent ones (the paper's number)")
    min_count: int = setting(10, "an attribute stands in the texts of at least so many training products")
    max_share: float = setting(0.5, "... and of at most this share of them: what all have tells none apart")
    max_words: int = setting(2, "longest phrase, in words")
    lift: float = setting(3.0, "the parts of a phrase meet so many times as often as chance would have them meet")
    stop_words: str = setting("", "words,to,ignore besides STOP_WORDS")


# ---------------------------------------------------------------------------------------------------------------------
# pseudo-attributes


def phrases(text, stop_words=STOP_WORDS, max_words=2):
    """The set of words and phrases of a text, in lower case; none crosses punctuation, a stop word or a number.

    Words end where BERT's do, so that marks are parts of them (Thai, Hindi), but hyphens join: v-neck. An apostrophe
    goes with what it stands for: dress's, d'été."""
    text = re.sub(r"\b[cdjlmnst]['’](?=\w)|['’](s\b)?", "", unicodedata.normalize("NFC", text.lower()))
    if not text.isascii():  # BERT's words may end in a sign, as nike® and 5€ do
        text = "".join("," if unicodedata.category(character)[0] == "S" else character for character in text)
    text = re.sub(r"(?<=\S)-(?=\S)", JOINT, text).replace("-", " ").replace("_", " ")
    found, run = set(), []
    for word, _ in CUT.pre_tokenize_str(text):
        word = word.strip(JOINT).replace(JOINT, "-")
        is_word = re.search(r"\w", word) and word not in stop_words and not word.isdigit()
        run = [*run, word][-max_words:] if is_word else []
        found.update(" ".join(run[i:]) for i in range(len(run)))
    return {phrase for phrase in found if len(phrase) > 1}


def mine(count, n_texts, config):
    """{phrase: number of texts with it} -> the vocabulary, [(phrase, that number)], the most frequent first.

    Kept: phrases of at least min_count texts and at most max_share of all; of those of several words the ones that are
    one thing (`lift`, wherever they are cut in two); and no part that hardly any text (1 in 10) has without the whole:
    "york" goes, "new york" stays. Raises InputError where nothing is left."""

    def is_one_thing(words):
        cuts = [(" ".join(words[:i]), " ".join(words[i:])) for i in range(1, len(words))]
        return all(count[" ".join(words)] * n_texts >= config.lift * count[a] * count[b] for a, b in cuts)

    kept = {p for p, n in count.items() if config.min_count <= n <= config.max_share * n_texts}
    kept = {p for p in kept if is_one_thing(p.split())}
    for phrase in sorted(kept):
        words = phrase.split()
        parts = {" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)} - {phrase}
        kept -= {part for part in parts if count[phrase] >= 0.9 * count[part]}
    if not kept:
        raise InputError(f"no phrase stands in {config.min_count} of {n_texts} training texts; lower --min_count")
    return sorted(((p, count[p]) for p in kept), key=lambda row: (-row[1], row[0]))[: config.vocabulary]


def label(root, out, config):
    """Mine one vocabulary from the train splits under `root`; write all annotation files with their attributes_id, and
    labels.json, to `out` (which may be `root`). Prints head and tail. Raises InputError on the first faulty entry."""
    ignored, items, texts = STOP_WORDS | set(config.stop_words.lower().split(",")), {}, {}
    for source, data_set in annotations.SETS.items():
        for split, file in data_set.files.items():
            if Path(root, source, file).exists():
                products = annotations.load_products(root, source, split)
                texts[source, split] = [product.text for product in products]
                items[source, split] = annotations.read_json(Path(root, source, file), list)
    if not any(split == "train" for _, split in items):
        raise InputError(f"{root}: no annotation file of a train split, expected some of {', '.join(annotations.SETS)}")
    train = [text for (_, split), part in texts.items() if split == "train" for text in part]
    count = Counter()
    for text in train:  # phrases take much memory, so they are found here and below, and not kept
        count.update(phrases(text, ignored, config.max_words))
    vocabulary = mine(count, len(train), config)
    number, values = {phrase: i for i, (phrase, _) in enumerate(vocabulary)}, {}
    for (source, split), part in items.items():
        for item, text in zip(part, texts[source, split], strict=True):
            found = phrases(text, ignored, config.max_words)
            item["attributes_id"] = sorted(number[phrase] for phrase in found & number.keys())
        values[Path(out, source, annotations.SETS[source].files[split])] = part
    values[Path(out, "labels.json")] = {**layout.read_labels(root), "attributes": list(number)}
    layout.write_together(values)
    counts = [len(item["attributes_id"]) for part in items.values() for item in part]
    print(f"{len(number)} pseudo-attributes, {np.mean(counts):.1f} a product, {counts.count(0)} products without any")
    for name, rows in (("most frequent", vocabulary[:40]), ("least frequent", vocabulary[-40:])):
        print(f"{name}:", ", ".join(f"{phrase} {n}" for phrase, n in rows))


# ---------------------------------------------------------------------------------------------------------------------
# products


def check_columns(table, config):
    """{name: name in the `Table`} of the columns that the settings name. They may differ in Unicode's form.

    A column of a default's name may be absent, except images and title, but not stand there in another spelling.
    Raises InputError on other columns that are not there."""
    names, used = {unicodedata.normalize("NFC", column): column for column in table.columns}, {}

    def plain(column):
        return column.strip("\ufeff ").casefold()

    for name in COLUMNS:
        value = getattr(config, name)
        for column in image_columns(value, names) if name == "images" else [value]:
            similar = [other for other in names if plain(other) == plain(column)]
            if column in names:
                used[column] = names[column]
            elif similar:
                value = value.replace(f"{{{column}", f"{{{similar[0]}") if value != column else similar[0]
                raise InputError(f"{table.path}: no column {column!r}, but {similar[0]!r}; set --{name}={value!r}")
            elif name in ("images", "title") or value != name:
                cure = f"set --{name}=COLUMN" + " or --images='images/{COLUMN}.jpg'" * (name == "images")
                raise InputError(f"{table.path}: no column {column!r}, found {', '.join(table.columns)}; {cure}")
    return used


def check_photo(path, photos, image_size):
    """Open an image file. The result is its path, or that of a smaller copy where `image_size` allows one.

    Training makes a square of 256 / 224 of its image size before it crops, so this is the copy's shorter side.
    Copies are written below the folder `photos`. Raises ValueError where the image cannot be read."""
    try:
        image = open_image(path)
    except InputError as error:
        message = str(error).removesuffix(", or leave it out by --missing=skip")
        if path.is_relative_to(photos):  # it is no file of the user's
            message = message.removeprefix(f"{path}: ").removesuffix("; replace the file")
        raise ValueError(message) from None
    share = round(image_size * RESIZED / CROPPED) / min(image.size)
    if not 0 < share < 1:
        return path
    handle, copy = tempfile.mkstemp(".jpg", dir=photos)
    os.close(handle)
    size = [max(1, round(share * side)) for side in image.size]
    image.resize(size, Image.Resampling.LANCZOS).save(copy, quality=95)
    if path.is_relative_to(photos):
        path.unlink()
    return Path(copy)


def read_products(config, photos):
    """(items, faults) of the files of products: rows of one id joined, images as paths, labels still names.

    photos: an empty folder for photos that lie in parquet files and for smaller copies."""
    items, faults, first_rows, checked, addresses, n_rows, n_no_value, n_failed = {}, [], {}, {}, {}, 0, 0, 0
    needs = "a product needs an id, a title and images"
    config = replace(config, **{name: unicodedata.normalize("NFC", getattr(config, name)) for name in COLUMNS})
    for table in read_tables(config, photos):
        used = check_columns(table, config)
        # img2dataset puts the photos of 00000.parquet into 00000/
        folders = [Path(config.photos or table.path.parent), table.path.with_suffix("")]
        for number, cells in enumerate(tqdm(table.rows, desc="reading", unit="row", disable=None), 1):
            n_rows += 1
            if str(cells.get("status")).startswith("failed_to_"):  # as img2dataset says it of a download
                n_failed += 1
                continue
            row = {name: cells.get(column) for name, column in used.items()}
            no_value = {name: "" for name, cell in row.items() if is_no_value(cell)}
            row, n_no_value = row | no_value, n_no_value + len(no_value)
            try:
                if None in cells:
                    cure = "put quotes around a cell that holds the separator"
                    raise ValueError(f"{len(cells[None])} more cells than columns; {cure}")
                key, texts = read_row(row, config)
                if config.id not in table.columns:
                    key = str(n_rows)
                if not key:
                    raise ValueError(f"id: empty; {needs}")
                paths = [image_file(names, folders, config, addresses) for names in image_names(row, config)]
                old = items.get(key, texts)
                for name in ("title", "category", "subcategory"):
                    if old[name] and texts[name] and old[name].casefold() != texts[name].casefold():
                        raise ValueError(f"id {key} stood before with another {name}; rows of one id are one product")
                for path in paths:
                    if path not in checked:
                        checked[path] = check_photo(path, photos, config.image_size)
                item = items.setdefault(key, {"id": key, "images": [], **texts, "attributes_id": []})
                # a shop may write the texts and photos of a product on any one of its rows
                item.update({name: item[name] or text for name, text in texts.items()})
                item["images"] = list(dict.fromkeys([*item["images"], *(checked[path] for path in paths)]))
                first_rows.setdefault(key, f"{table.path}: row {number}")
            except ValueError as error:
                faults.append(f"{table.path}: row {number}: {error}")
    for key, row in first_rows.items():
        empty = [name for name in ("title", "images") if not items[key][name]]
        if empty:
            faults.append(f"{row}: {' and '.join(empty)}: empty; {needs}")
            del items[key]
    if not n_rows:
        raise InputError(f"{config.products}: found no product, expected products")
    if n_no_value:
        print(f"{n_no_value} cells such as 'nan' or 'NULL' count as empty")
    if n_failed:
        print(f"{n_failed} rows whose download failed, as their column 'status' says, are left out")
    return list(items.values()), faults


def join_spellings(items, key):
    """Names under `key` that differ in case alone become one, the most frequent spelling; says how many do."""
    count = Counter(item[key] for item in items)
    best = {}  # {name in lower case: its most frequent spelling}
    for name, _ in sorted(count.items(), key=lambda pair: (-pair[1], pair[0])):
        best.setdefault(name.casefold(), name)
    if len(best) < len(count):
        odd = min(count.keys() - best.values())
        same = f"{odd!r} = {best[odd.casefold()]!r}"
        print(f"{key}: {len(count) - len(best)} names differ from others in case alone and join them, such as {same}")
    for item in items:
        item[key] = best[item[key].casefold()]


def write_layout(root, photos, config):
    """Write config.products as FashionGen/ and labels.json under `root`. Raises InputError on faults, all printed.

    photos: as in `read_products`."""
    items, faults = read_products(config, photos)
    print(*faults, sep="\n", end="\n" * bool(faults))
    if faults and not config.skip_faulty:
        raise InputError(f"{config.products}: {len(faults)} faulty rows, listed above; mend them or set --skip_faulty")
    if not items:
        raise InputError(f"{config.products}: no product is left, as all rows are faulty; mend those listed above")
    keys = layout.content_keys({path for item in items for path in item["images"]})
    items = items if config.keep_shared else layout.leave_out_shared(items, keys)
    n_val = max(1, round(config.val_share * len(items)))
    if not 0 < config.val_share < 1 or n_val >= len(items):
        raise InputError(f"val_share: found {config.val_share} of {len(items)} products; both splits need products")
    names = {}
    for key, plural in (("category", "categories"), ("subcategory", "subcategories")):
        join_spellings(items, key)
        n_none = sum(not item[key] for item in items)
        if 0 < n_none < len(items):
            print(f"{n_none} products have no {key}; recognition of it leaves them out")
        names[plural] = layout.number_labels(items, key)
    val = set(layout.choose_val(items, keys, n_val, config.seed))
    for split in ("train", "val"):
        part = [item for i, item in enumerate(items) if (i in val) == (split == "val")]
        for i, item in enumerate(tqdm(part, desc=f"{split} images", unit="product", disable=None)):
            # numbered, as an id need not be a file name and two folders may hold files of one name
            files = [f"{i:06}_{view}{path.suffix.lower()}" for view, path in enumerate(item["images"])]
            for file, path in zip(files, item["images"], strict=True):
                layout.place(path, root / "FashionGen" / split / file, config.link and not path.is_relative_to(photos))
            item["images"] = files
        layout.write_together({root / "FashionGen" / f"{split}_info.json": part, root / "labels.json": names})
        print(f"{split}: {len(part)} products, {sum(len(item['images']) for item in part)} images")


def main():
    config = settings.load_config(CatalogueConfig, description=__doc__.splitlines()[0])
    settings.check_limits(config)
    if bool(config.products) == bool(config.root) or config.products and not config.out:
        raise InputError("expected --products=FILE --out=FOLDER, or --root=FOLDER (--help explains)")
    if config.out and config.root and Path(config.out).resolve().is_relative_to(Path(config.root).resolve()):
        raise InputError(f"out: found {config.out}, expected a folder outside of {config.root} (or none: in place)")
    if not config.out:
        label(config.root, config.root, config)
    else:
        with layout.written_aside(config.out) as aside:
            if config.products:
                with tempfile.TemporaryDirectory(dir=aside) as photos:
                    write_layout(aside, Path(photos), config)
            label(config.root or aside, aside, config)
            for folder, _, names in os.walk(config.root, followlinks=True) if config.root else ():
                for name in names:
                    target = aside / Path(folder, name).relative_to(config.root)
                    if not target.exists():
                        layout.place(Path(folder, name), target, config.link)
    root = config.out or config.root
    print(f"next: python -m prepare.check_data --data_root={root}, and train with --n_attributes=0")


if __name__ == "__main__":
    ending.run(main)
