"""Your own products: CSV, JSON lines or parquet -> the FashionGen layout, with pseudo-attributes mined from the texts.

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
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from plumbing import annotations, ending, settings
from plumbing.photos import CROPPED, RESIZED, open_image
from plumbing.settings import FROM_0, InputError, setting
from prepare.layout import content_keys, number_labels, place, read_labels, write_together, written_aside
from prepare.rows import COLUMNS, FIELD, clear_cells, image_file, image_names, read_row, read_tables

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
        "file of products: CSV (first line: column names), JSON lines or parquet; or a folder or pattern of .parquet",
    )
    root: str = setting("", "instead of --products: an existing data root whose attributes_id are mined anew")
    out: str = setting("", "data root to make; empty with --root: in place")
    id: str = setting("id", "column of the product's id; where there is none, rows are numbered")
    images: str = setting(
        "images", "column of image paths: text with --separator between them, or a list; or a template"
    )
    title: str = setting("title", "column of the title")
    description: str = setting("description", "column of the description; may be absent, as the next two")
    category: str = setting("category", "column of the category's name")
    subcategory: str = setting("subcategory", "column of the sub-category's name")
    separator: str = setting(";", "between the image paths of a row")
    image_folder: str = setting("", "where relative image paths start; empty: the folder of --products")
    image_size: int = setting(
        0, "write photos no larger than training at this --image_size needs; 0: as they are", FROM_0
    )
    link: bool = setting(False, "link the image files instead of copying them")
    skip_faulty: bool = setting(False, "list faulty rows and leave them out instead of stopping")
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
    """The set of words and phrases of a text, in lower case; none crosses punctuation, a stop word or a number."""
    found = set()
    for clause in re.split(r"[^\w\s-]+", re.sub(r"['’](s\b)?", "", text.lower())):
        run = []
        for word in re.findall(r"[^\W_]+(?:-[^\W_]+)*", clause):
            run = [] if word in stop_words or word.isdigit() else [*run, word][-max_words:]
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
    write_together({**values, Path(out, "labels.json"): {**read_labels(root), "attributes": list(number)}})
    counts = [len(item["attributes_id"]) for part in items.values() for item in part]
    print(f"{len(number)} pseudo-attributes, {np.mean(counts):.1f} a product, {counts.count(0)} products without any")
    for name, rows in (("most frequent", vocabulary[:40]), ("least frequent", vocabulary[-40:])):
        print(f"{name}:", ", ".join(f"{phrase} {n}" for phrase, n in rows))


# ---------------------------------------------------------------------------------------------------------------------
# products


def check_columns(table, config):
    """Raise InputError where the settings name a column that the `Table` lacks.

    A column of a default's name may be absent, except images and title, but not stand there in another spelling."""

    def plain(column):
        return column.strip("\ufeff ").casefold()

    for name in COLUMNS:
        value = getattr(config, name)
        fields = re.findall(FIELD, value) if name == "images" and value not in table.columns else []
        for column in [column for column in fields or [value] if column not in table.columns]:
            similar = [other for other in table.columns if plain(other) == plain(column)]
            if similar:
                value = value.replace(f"{{{column}}}", f"{{{similar[0]}}}") if fields else similar[0]
                raise InputError(f"{table.path}: no column {column!r}, but {similar[0]!r}; set --{name}={value!r}")
            if name in ("images", "title") or value != name:
                cure = f"set --{name}=COLUMN" + " or --images='images/{COLUMN}.jpg'" * (name == "images")
                raise InputError(f"{table.path}: no column {column!r}, found {', '.join(table.columns)}; {cure}")


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
    items, faults, first_rows, checked, n_rows, n_no_value = {}, [], {}, {}, 0, 0
    needs = "a product needs an id, a title and images"
    for table in read_tables(config, photos):
        check_columns(table, config)
        folder = Path(config.image_folder or table.path.parent)
        for number, row in enumerate(tqdm(table.rows, desc="reading", unit="row", disable=None), 1):
            n_rows += 1
            n_no_value += clear_cells(row)
            try:
                key, texts = read_row(row, config)
                if config.id not in table.columns:
                    key = str(n_rows)
                if not key:
                    raise ValueError(f"id: empty; {needs}")
                paths = [image_file(name, folder, config.separator) for name in image_names(row, config)]
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


def choose_val(items, n_val, seed):
    """The numbers of the items for val, `n_val` or a few less: products that share a photo stay on one side.

    They may share it under two names, and by way of a third product. Raises InputError where all stay together."""
    keys = content_keys({path for item in items for path in item["images"]})
    parent, first = list(range(len(items))), {}

    def find(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]  # shorter for the next search
            i = parent[i]
        return i

    for i, item in enumerate(items):
        for path in item["images"]:
            parent[find(i)] = find(first.setdefault(keys[path], i))
    groups, val = {}, []
    for i in np.random.default_rng(seed).permutation(len(items)).tolist():
        groups.setdefault(find(i), []).append(i)
    if len(groups) == 1:
        raise InputError("images: all products share photos, so val cannot be another's; give each photos of its own")
    for group in groups.values():
        if len(val) + len(group) <= n_val:
            val += group
    print(f"{len(items)} products, {len(groups)} groups that share no photo")
    return val or min(groups.values(), key=len)


def write_layout(root, photos, config):
    """Write config.products as FashionGen/ and labels.json under `root`. Raises InputError on faults, all printed.

    photos: as in `read_products`."""
    items, faults = read_products(config, photos)
    print(*faults, sep="\n", end="\n" * bool(faults))
    if faults and not config.skip_faulty:
        raise InputError(f"{config.products}: {len(faults)} faulty rows, listed above; mend them or set --skip_faulty")
    if not items:
        raise InputError(f"{config.products}: no product is left, as all rows are faulty; mend those listed above")
    n_val = max(1, round(config.val_share * len(items)))
    if not 0 < config.val_share < 1 or n_val >= len(items):
        raise InputError(f"val_share: found {config.val_share} of {len(items)} products; both splits need products")
    for key in ("category", "subcategory"):
        join_spellings(items, key)
    names = {"categories": number_labels(items, "category"), "subcategories": number_labels(items, "subcategory")}
    val = set(choose_val(items, n_val, config.seed))
    for split in ("train", "val"):
        part = [item for i, item in enumerate(items) if (i in val) == (split == "val")]
        for i, item in enumerate(tqdm(part, desc=f"{split} images", unit="product", disable=None)):
            # numbered, as an id need not be a file name and two folders may hold files of one name
            files = [f"{i:06}_{view}{path.suffix.lower()}" for view, path in enumerate(item["images"])]
            for file, path in zip(files, item["images"], strict=True):
                place(path, root / "FashionGen" / split / file, config.link and not path.is_relative_to(photos))
            item["images"] = files
        write_together({root / "FashionGen" / f"{split}_info.json": part, root / "labels.json": names})
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
        with written_aside(config.out) as aside:
            if config.products:
                with tempfile.TemporaryDirectory(prefix=f"{aside.name}.", dir=aside.parent) as photos:
                    write_layout(aside, Path(photos), config)
            label(config.root or aside, aside, config)
            for folder, _, names in os.walk(config.root, followlinks=True) if config.root else ():
                for name in names:
                    target = aside / Path(folder, name).relative_to(config.root)
                    if not target.exists():
                        place(Path(folder, name), target, config.link)
    root = config.out or config.root
    print(f"next: python -m prepare.check_data --data_root={root}, and train with --n_attributes=0")


if __name__ == "__main__":
    ending.run(main)
