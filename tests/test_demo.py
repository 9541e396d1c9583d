"""The demo catalogue: formats, determinism, and that texts, outfits and changes say what is drawn."""

import hashlib
import json
import subprocess
import sys

import pytest
from PIL import Image
from tokenizers import BertWordPieceTokenizer

from plumbing import annotations
from prepare import check_data, demo

PROGRAM = [sys.executable, "-m", "prepare.demo"]
SMALL = {"products": 60, "size": 32}
INFOS = {  # file: where its images lie
    f"{name}/{file}": f"{name}/{kind.images.format(part=part)}"
    for name, kind in annotations.SETS.items()
    for part, file in kind.files.items()
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "catalogue"
    assert demo.make_catalogue(out, **SMALL)
    return out


def read(root, name):
    return json.loads((root / name).read_text())


def digests(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_seed_same_bytes(root, tmp_path):
    # The second run is another process, so that nothing hangs on its hash seed or on caches of this one.
    subprocess.run([*PROGRAM, tmp_path / "again", "--products=60", "--size=32"], check=True)
    assert digests(tmp_path / "again") == digests(root)
    demo.make_catalogue(tmp_path / "other", seed=1, **SMALL)
    other, ours = digests(tmp_path / "other"), digests(root)
    pictures = [name for name in ours if name.endswith(".jpg") and name in other]
    assert len(pictures) > 100 and sum(ours[name] == other[name] for name in pictures) == 0
    assert all(ours[name] == other[name] for name in ("labels.json", "vocab.txt"))


def test_infos(root):
    assert check_data.check(root)[1] == []
    labels, products = read(root, "labels.json"), read(root, "products.json")
    used = set()
    for name, folder in INFOS.items():
        for row in read(root, name):
            images = [row["images"]] if "Polyvore" in name else row["images"]
            for image in images:
                with Image.open(root / folder / image) as picture:
                    assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (32, 32))
            used |= {f"{folder}/{image}" for image in images}
            design = products[f"{folder.split('/')[0]}/{row['id']}"]
            assert {labels["attributes"][i] for i in row["attributes_id"]} == set(demo.attributes(design))
            if "category_id" in row:
                assert labels["categories"][row["category_id"]] == demo.KINDS[design["kind"]][0]
                assert labels["subcategories"][row["subcategory_id"]] == design["subcategory"]
    drawn = {str(path.relative_to(root)) for path in root.rglob("*.jpg")}
    assert {x for x in drawn if x.split("/")[0] in ("FashionGen", "BigFACAD", "Fashion200k")} <= used
    train, val = read(root, "FashionGen/train_info.json"), read(root, "FashionGen/val_info.json")
    assert all(len(row["images"]) in (2, 3) for row in train) and all(len(row["images"]) == 1 for row in val)
    for field in ("category_id", "subcategory_id"):
        assert {row[field] for row in val} <= {row[field] for row in train}
    assert len({row["category_id"] for row in train}) == len(labels["categories"])


def test_texts_name_what_is_drawn(root):
    products = read(root, "products.json")
    val = read(root, "FashionGen/val_info.json")
    assert len({row["title"] + row["description"] for row in val}) == len(val)
    for row in val:
        design = products[f"FashionGen/{row['id']}"]
        text = f"{row['title']}. {row['description']}"
        assert design["colour"] in text and (design["second"] or "") in text
        _, told, _, synonym = demo.SUBCATEGORIES[design["subcategory"]]  # the name tells one field
        assert design["subcategory"] in row["title"] or synonym in row["title"]
        for field in {"sleeve", "neckline", "detail"} - {told}:
            assert not design[field] or any(phrase in text for phrase in demo.PARTS[field][design[field]])
        assert any(adjective in row["title"] for adjective in demo.PATTERNS[design["pattern"]][0])
        assert text.count(design["colour"]) == 1  # said once: who hides it must look
    looks = {tuple(design[f] for f in demo.FIELDS + ("cut",)) for design in products.values()}
    assert len(looks) == len(products)  # so no held-out product is trained on
    held_out = [products[f"FashionGen/{row['id']}"] for row in val]
    assert len({(d["subcategory"], d["colour"]) for d in held_out}) == len(val)


def test_vocabulary_covers_the_texts(root):
    vocab = (root / "vocab.txt").read_text().splitlines()
    assert vocab[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] and len(set(vocab)) == len(vocab)
    tokenizer = BertWordPieceTokenizer(str(root / "vocab.txt"), lowercase=True)
    texts = [f"{row['title']}.{row.get('description', '')}" for name in INFOS for row in read(root, name)]
    for path in (root / "FashionIQ" / "captions").iterdir():
        texts += [", ".join(row["captions"]) for row in json.loads(path.read_text())]
    tokens = [tokenizer.encode(text).tokens for text in texts]
    assert max(map(len, tokens)) <= 75  # nothing is cut off
    flat = {token for line in tokens for token in line}
    assert "[UNK]" not in flat
    # No text falls apart into letters: every word is a piece, or a stem and a suffix.
    assert {token for token in flat if token.startswith("##")} <= {"##" + suffix for suffix in demo.SUFFIXES}
    assert any("##s" in line for line in tokens)
    assert texts == [text.lower() for text in texts]


def test_outfits(root):
    products, metadata = read(root, "products.json"), read(root, "PolyvoreOutfits/polyvore_item_metadata.json")
    family = {colour: name for name, colours in demo.FAMILIES.items() for colour in colours}
    assert {row["category_id"] for row in metadata.values()} == {str(i) for i in range(len(demo.KINDS))}
    assert read(root, "PolyvoreOutfits/categories.json") == list(demo.KINDS)
    items, queries = {}, []
    for split in ("disjoint", "nondisjoint"):
        for part in ("train", "test"):
            rows = read(root, f"PolyvoreOutfits/ocir_{split}_{part}.json")
            queries = [row for row in rows if not row.get("fake_data")]
            items[split, part] = {x for row in queries for x in [*row["question"], row["blank"]]}
            for row in queries:
                outfit = [products[f"PolyvoreOutfits/{x}"] for x in [*row["question"], row["blank"]]]
                assert 3 <= len(outfit) <= 5 and len({design["kind"] for design in outfit}) == len(outfit)
                colours = {design[field] for design in outfit for field in ("colour", "second")} - {None}
                assert len({family[colour] for colour in colours}) == 1
            if part == "test":  # the gallery of a category has every family, so the category alone says nothing
                fake = {row["blank"] for row in rows if row["fake_data"]}
                assert fake and not fake & {row["blank"] for row in queries}
                for kind in range(len(demo.KINDS)):
                    gallery = {row["blank"] for row in rows if metadata[row["blank"]]["category_id"] == str(kind)}
                    assert {family[products[f"PolyvoreOutfits/{x}"]["colour"]] for x in gallery} == set(demo.FAMILIES)
    assert not items["disjoint", "train"] & items["disjoint", "test"]
    assert items["nondisjoint", "train"] & items["nondisjoint", "test"]


@pytest.mark.parametrize("name", demo.FASHIONIQ_KINDS)
def test_fashioniq(root, name):
    products = read(root, "products.json")
    splits = {part: read(root, f"FashionIQ/image_splits/split.{name}.{part}.json") for part in ("train", "val")}
    assert not set(splits["train"]) & set(splits["val"])
    for part, gallery in splits.items():
        rows = read(root, f"FashionIQ/captions/cap.{name}.{part}.json")
        designs = {asin: products[f"FashionIQ/{asin}"] for asin in gallery}
        assert {design["kind"] for design in designs.values()} == {demo.FASHIONIQ_KINDS[name]}
        for row in rows:
            assert len(set(row["captions"])) == 2
            old, new = designs[row["candidate"]], designs[row["target"]]
            changed = demo.differences(old, new)
            assert 1 <= len(changed) <= 2
            for caption in row["captions"]:
                fits = [asin for asin in gallery if told(caption, old, designs[asin])]
                assert fits == [row["target"]], caption


def told(caption, old, new):
    """True where `caption` says each change from `old` to `new`, and nothing more."""
    changed = demo.differences(old, new)
    if len(caption.split(" and ")) != len(changed) - ({"pattern", "second"} <= set(changed)):
        return False
    for field in changed:
        if field == "colour":
            phrases = tuple(f"{word} {new['colour']}" for word in ("is", "in", "but"))
        elif field in ("second", "pattern"):
            figures = tuple(f"{new['second']} {noun}" for noun in demo.PATTERNS[new["pattern"]][1])
            phrases = ("plain", "no pattern", "solid colour") if new["pattern"] == "plain" else figures
        else:
            phrases = demo.PARTS[field][new[field]]
            phrases += tuple(w for w in demo.CHANGES.get(f"{field} {old[field]} {new[field]}", ()) if "{" not in w)
        said = caption.split(" instead of ")[0] + " " + " and ".join(caption.split(" and ")[1:])
        if not any(phrase in said for phrase in phrases):
            return False
    return True


def test_refuses_to_overwrite(root, tmp_path):
    before = digests(root)
    assert demo.make_catalogue(root, **SMALL) is False  # the same one: already there
    with pytest.raises(FileExistsError):
        demo.make_catalogue(root, seed=5, **SMALL)
    assert digests(root) == before
    (tmp_path / "mine.txt").write_text("keep")
    run = subprocess.run([*PROGRAM, tmp_path], capture_output=True, text=True)
    assert run.returncode != 0 and "is there" in run.stderr and "Traceback" not in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_nothing_half_written(tmp_path, monkeypatch):
    def fail(cat):
        cat.write("half.json", [])
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(demo, "make_outfits", fail)
    monkeypatch.setattr(demo, "make_described", lambda cat: None)
    with pytest.raises(RuntimeError):
        demo.make_catalogue(tmp_path / "out", **SMALL)
    assert list(tmp_path.iterdir()) == []
