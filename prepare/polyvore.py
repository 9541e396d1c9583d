"""The public Polyvore Outfits release -> PolyvoreOutfits/: OCIR files of both splits, products for pre-training.

    python -m prepare.polyvore --release=polyvore_outfits --out=data/datasets --link
    python -m prepare.catalogue --root=data/datasets      # then: pseudo-attributes, of all sets that are there

| file | rows |
| --- | --- |
| ocir_<split>_train.json | an outfit of train.json each: the last item is the blank (training draws pairs anew) |
| ocir_<split>_test.json | real: a question of fill_in_blank_test.json each, whose blank is its right answer |
| | fake: every other item of test.json in the fine category of a question; they only widen the gallery |
| train_info.json | the items of disjoint/train.json: pre-training sees none of the disjoint test's |

The authors' own OCIR files are not public: what is measured on these has this gallery, not the paper's.

--missing=skip leaves out every outfit, question and other item whose images are not all there, and counts them. Numbers
that are measured then are not those of the whole release."""

from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from plumbing.annotations import need, read_json
from plumbing.ending import run
from plumbing.settings import InputError, check_limits, load_config, setting
from prepare.cells import plain_text
from prepare.layout import place, write_together, written_aside

SPLITS = ("disjoint", "nondisjoint")


@dataclass
class PolyvoreConfig:
    """Settings of `python -m prepare.polyvore`."""

    release: str = setting("polyvore_outfits", "folder of the release: disjoint/, nondisjoint/, images/, ...")
    out: str = setting("data/datasets", "data root; PolyvoreOutfits/ is made in it")
    link: bool = setting(False, "link the images instead of copying them")
    missing: str = setting(
        "stop", "missing or empty images: stop, or skip what needs them and count it", choices=("stop", "skip")
    )


def read_outfits(path):
    """{set id: {"SET_INDEX": item id}} of a train.json or test.json; the keys are what questions call the items."""
    outfits = {}
    for i, row in enumerate(read_json(path, list)):
        where = f"{path}: entry {i}"
        name = need(row, "set_id", where, str)
        items = need(row, "items", where, list)
        outfits[name] = {f"{name}_{need(x, 'index', where, int)}": need(x, "item_id", where, str) for x in items}
    return outfits


def make_row(items, blank):
    """An OCIR row: the items without the blank (an outfit may hold one twice), or None where no item is left."""
    question = [item for item in dict.fromkeys(items) if item != blank]
    return {"question": question, "blank": blank} if question else None


def read_questions(path, outfits):
    """The OCIR rows of a fill_in_blank_test.json: the right answer is the one of the question's own outfit.

    Raises InputError where that is not exactly one."""
    rows = []
    for i, row in enumerate(read_json(path, list)):
        where = f"{path}: entry {i}"
        question, answers = (list(map(str, need(row, key, where, list))) for key in ("question", "answers"))
        outfit = outfits.get(question[0].rpartition("_")[0] if question else None, {})
        right = [answer for answer in answers if answer in outfit]
        if len(right) != 1 or not outfit.keys() >= set(question):
            raise InputError(f"{where}: found {len(right)} answers of the question's outfit in test.json, expected one")
        rows.append(make_row([outfit[item] for item in question], outfit[right[0]]))
    return [row for row in rows if row]


def texts(row):
    """Title (the end of the item's address where it is empty), description and coarse category of a metadata row."""
    row = {**row, "title": row.get("title") or row.get("url_name")}
    keys = ("title", "description", "semantic_category")
    return {key: plain_text(str(row.get(key) or "")) for key in keys}


def has_photo(release, item):
    """Whether the image of an item is there and not empty."""
    path = release / "images" / f"{item}.jpg"
    return path.is_file() and path.stat().st_size > 0


def convert(release, folder, link=False, missing="stop"):
    """Write the folder PolyvoreOutfits from the release. Raises InputError on what is missing or does not fit."""
    metadata_path = release / "polyvore_item_metadata.json"
    names = [f"{split}/{name}.json" for split in SPLITS for name in ("train", "test", "fill_in_blank_test")]
    for path in [metadata_path, *(release / name for name in names)]:
        if not path.is_file():
            cure = "its authors publish it (README, section Data); name its folder by --release"
            raise InputError(f"{path}: no file there, expected the release of Polyvore Outfits; {cure}")
    metadata, values, used = read_json(metadata_path, dict), {}, {}
    gone = {item for item in metadata if not has_photo(release, item)} if missing == "skip" else set()

    def category(item):
        return need(metadata.get(item), "category_id", f"{metadata_path}: item {item}", str)

    for split in SPLITS:
        train, test = (read_outfits(release / split / f"{part}.json") for part in ("train", "test"))
        outfits = [list(outfit.values()) for outfit in train.values() if outfit]
        whole = [items for items in outfits if gone.isdisjoint(items)]
        rows = [row for row in (make_row(items, items[-1]) for items in whole) if row]
        all_questions = read_questions(release / split / "fill_in_blank_test.json", test)
        questions = [row for row in all_questions if gone.isdisjoint([*row["question"], row["blank"]])]
        if not rows or not questions:
            what = "question" if rows else "outfit of two items to train on"
            raise InputError(f"{release / split}: no {what} with all its images; fetch the images again")
        blanks = dict.fromkeys(row["blank"] for row in questions)
        gallery = dict.fromkeys(item for outfit in test.values() for item in outfit.values())
        categories = {category(item) for item in blanks}
        more = [item for item in gallery if item not in blanks and category(item) in categories]
        others = [item for item in more if item not in gone]
        # nobody reads a fake row's question, but the format has one
        fake = [{"question": [item], "blank": item, "fake_data": True} for item in others]
        values[folder / f"ocir_{split}_train.json"] = rows
        values[folder / f"ocir_{split}_test.json"] = [{**row, "fake_data": False} for row in questions] + fake
        used |= dict.fromkeys(item for row in [*rows, *questions, *fake] for item in [*row["question"], row["blank"]])
        if split == "disjoint":
            every_product = dict.fromkeys(item for outfit in outfits for item in outfit)
            products = {item: None for item in every_product if item not in gone}
        small = len(train) - len(outfits) + len(whole) - len(rows)
        print(f"{split}: {len(rows)} outfits to train on ({small} of less than two items left out),")
        print(
            f"    {len(questions)} questions in {len(categories)} categories, {len(blanks) + len(others)} items to find"
        )
        if missing == "skip":
            print(f"    left out as images are missing: {len(outfits) - len(whole)} of {len(outfits)} outfits,")
            print(f"    {len(all_questions) - len(questions)} of {len(all_questions)} questions,", end=" ")
            print(f"{len(more) - len(others)} of {len(more)} items that only widen the gallery")
    used |= products
    kept = {item: {"category_id": category(item), **texts(metadata[item])} for item in used}
    lost = [item for item in used if not has_photo(release, item)]
    if lost:
        cure = "fetch the images again, or set --missing=skip to leave out what needs them"
        raise InputError(f"{release}/images/{lost[0]}.jpg: missing ({len(lost)} such, with empty files); {cure}")
    for item in tqdm(used, desc="images", unit="image", disable=None):
        place(release / "images" / f"{item}.jpg", folder / "images" / f"{item}.jpg", link)
    values[folder / "polyvore_item_metadata.json"] = kept
    values[folder / "train_info.json"] = [
        {"id": item, "images": f"{item}.jpg", **texts(metadata[item]), "attributes_id": []} for item in products
    ]
    write_together(values)
    left_out = f" ({len(every_product) - len(products)} left out)" if missing == "skip" else ""
    print(f"{len(products)} products to pre-train on{left_out}, {len(used)} images")


def main():
    config = load_config(PolyvoreConfig, description=__doc__.splitlines()[0])
    check_limits(config)
    with written_aside(Path(config.out, "PolyvoreOutfits")) as folder:
        convert(Path(config.release), folder, config.link, config.missing)
    print(f"next: python -m prepare.catalogue --root={config.out}  (pseudo-attributes)")


if __name__ == "__main__":
    run(main)
