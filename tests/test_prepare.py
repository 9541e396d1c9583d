"""Preparation: what people bring (a CSV, FashionGen's HDF5, Polyvore Outfits) becomes what data.py reads."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from settings import InputError
from tools import check_data

PREPARE = Path(__file__).parents[1] / "prepare"
sys.path.insert(0, str(PREPARE))

import catalogue as products  # noqa: E402  (`catalogue` is a fixture)
import fashiongen  # noqa: E402
import polyvore  # noqa: E402

import annotations  # noqa: E402


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def read_json(path):
    return json.loads(path.read_text())


def files_under(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def photo(path, shade=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, 20, 30)).save(path)


def config(**given):
    return products.CatalogueConfig(**{"min_count": 3, **given})


# ---------------------------------------------------------------------------------------------------------------------
# catalogue.py


def make_shop(folder, n=40):
    """A CSV of n products of two kinds, one row a photo, two photos each; returns its path."""
    rows = []
    for i in range(n):
        kind, name = ("dress", f"red dress no {i}") if i % 2 else ("shoes", f"black shoes no {i}")
        for view in range(2):
            photo(folder / "photos" / f"p{i}" / f"{view}.png", 10 + i)
            text = "With a round neck, made of soft cotton." if i % 4 == 1 else "Soft; with flat soles"
            rows.append({"sku": f"A/{i}", "photo": f"photos/p{i}/{view}.png", "name": name, "text": text, "kind": kind})
    path = folder / "shop.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


COLUMNS = {"id": "sku", "images": "photo", "title": "name", "description": "text", "category": "kind"}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    flags = [f"--{key}={value}" for key, value in COLUMNS.items()]
    out = folder / "root"
    command = [sys.executable, PREPARE / "catalogue.py", f"--products={make_shop(folder)}", f"--out={out}", *flags]
    done = subprocess.run([*command, "--min_count=3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_shop_is_a_layout(shop):
    root, printed = shop
    report, faults = check_data.check(root)
    assert not faults
    train, val = (annotations.load_products(root, "FashionGen", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (36, 4)
    assert all(len(product.images) == 2 for product in [*train, *val])  # two rows, one product
    names = [{product.name for product in part} for part in (train, val)]
    assert not names[0] & names[1] and "FashionGen A/7" in names[0] | names[1]
    labels = read_json(root / "labels.json")
    assert labels["categories"] == ["dress", "shoes"] and labels["subcategories"] == []
    assert all(labels["categories"][product.category] in product.text for product in train)
    assert f"{len(labels['attributes'])} pseudo-attributes" in printed and "least frequent" in printed
    assert not list(root.parent.glob(".root*"))


def test_shop_attributes_are_in_the_text(shop):
    root, _ = shop
    names = read_json(root / "labels.json")["attributes"]
    assert "round neck" in names and "with" not in names and "soft" not in names  # stop word; in every text
    assert "neck" not in names  # never without "round"
    for product in annotations.load_products(root, "FashionGen", "train"):
        assert product.attributes and all(names[a] in product.text.replace(",", "") for a in product.attributes)
        assert ("round neck" in product.text) == (names.index("round neck") in product.attributes)


def test_split_follows_from_the_seed(tmp_path):
    path = make_shop(tmp_path)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        products.write_layout(tmp_path / name, config(products=str(path), seed=seed, link=True, **COLUMNS))
    a, b, c = (read_json(tmp_path / name / "FashionGen" / "val_info.json") for name in "abc")
    assert a == b and a != c
    assert all(path.is_symlink() and path.resolve().is_file() for path in (tmp_path / "a").rglob("*.png"))


def test_json_lines(tmp_path):
    photo(tmp_path / "a.jpg")
    rows = [{"images": ["a.jpg"], "title": f"blue hat {i}", "category": "hats"} for i in range(10)]
    (tmp_path / "shop.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items, faults = products.read_products(config(products=str(tmp_path / "shop.jsonl")))
    assert not faults and [item["id"] for item in items] == [str(i) for i in range(1, 11)]
    assert items[0]["description"] == "" and items[0]["category"] == "hats"


def test_html_becomes_text():
    body = '<div class="d"><p><span style="font-size:14px">red dress &amp; belt</span></p><ul><li>soft&nbsp;silk</li>'
    assert products.plain_text(body) == "red dress & belt soft silk"
    assert products.plain_text("<style>p {color: red}</style>one<br/>two<!-- three -->") == "one two"
    assert products.plain_text("length < 90 cm, A&B,\n width > 3") == "length < 90 cm, A&B, width > 3"
    assert products.plain_text("caf&eacute; &#39;s &lt;b&gt;") == "café 's <b>"


def test_shop_export_with_texts_on_the_first_row_alone(tmp_path):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        photo(tmp_path / name)
    long = "x" * 140_000
    for delimiter in ",;\t":
        rows = [["Handle", "Title", "Body (HTML)", "Image Src"], ["h0", "red dress", f"<p>silk</p>{long}", "a.jpg"]]
        rows += [["h0", "", "", "b.jpg"], ["h1", "blue hat", "wool", "c.jpg"]]
        with open(tmp_path / "shop.csv", "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file, delimiter=delimiter).writerows(rows)
        columns = {"id": "Handle", "title": "Title", "description": "Body (HTML)", "images": "Image Src"}
        items, faults = products.read_products(config(products=str(tmp_path / "shop.csv"), **columns))
        assert not faults
        assert [(item["title"], [path.name for path in item["images"]]) for item in items] == [
            ("red dress", ["a.jpg", "b.jpg"]),
            ("blue hat", ["c.jpg"]),
        ]
        assert items[0]["description"] == f"silk {long}"


def test_faulty_rows(tmp_path, capsys):
    photo(tmp_path / "a.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    lines = ["id,images,title", "1,a.jpg,red hat", "2,b.jpg,red hat", "3,broken.jpg,red hat", "4,,red hat", "5,a.jpg,"]
    lines += ["1,a.jpg,blue hat", "6,a.jpg,red hat,more", *(f"{i},a.jpg;a.jpg,red hat" for i in range(7, 12))]
    (tmp_path / "shop.csv").write_text("\n".join(lines))
    settings = {"products": str(tmp_path / "shop.csv")}
    with pytest.raises(InputError, match="6 faulty rows.*--skip_faulty"):
        products.write_layout(tmp_path / "out", config(**settings))
    printed = capsys.readouterr().out
    for row, text in ((2, "b.jpg"), (3, "broken.jpg"), (4, "empty"), (5, "empty"), (6, "another title"), (7, "cells")):
        assert f"row {row}: " in printed and text in printed
    assert "--missing" not in printed  # a setting of other scripts
    assert not (tmp_path / "out").exists()
    products.write_layout(tmp_path / "out", config(skip_faulty=True, **settings))
    train, val = (annotations.load_products(tmp_path / "out", "FashionGen", split) for split in ("train", "val"))
    found = train + val
    assert len(found) == 6 and all(len(product.images) == 1 for product in found)


@pytest.mark.parametrize(
    "name, text, settings, message",
    [
        (
            "shop.csv",
            "id,images,name\n1,a.jpg,hat\n",
            {},
            "no column 'title', found id, images, name; set --title",
        ),
        ("shop.csv", "images,title\na.jpg,hat\n", {"category": "kind"}, "no column 'kind'"),
        ("shop.csv", "images,title\n", {}, "no product"),
        ("shop.csv", 'images,title\n"a.jpg,hat', {}, "shop.csv: "),
        ("shop.jsonl", "{}\n[]\n", {}, "a line that is no object"),
        ("shop.jsonl", "{'a': 1}\n", {}, "expected UTF-8, a .csv or one JSON object a line"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, text, settings, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        products.read_products(config(products=str(tmp_path / name), **settings))


def test_command_line_errors(tmp_path, monkeypatch):
    done = subprocess.run([sys.executable, PREPARE / "catalogue.py"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    cases = [
        (["--products=a.csv"], "expected --products=FILE --out=FOLDER"),
        (["--products=a.csv", "--root=b"], "expected --products=FILE --out=FOLDER"),
        (["--root=nowhere"], "nowhere: no annotation file"),
        (["--root=a", "--out=a/b"], "out: found a/b, expected a folder outside of a"),  # or it would copy itself
    ]
    monkeypatch.chdir(tmp_path)
    for flags, message in cases:
        monkeypatch.setattr(sys, "argv", ["catalogue.py", *flags])
        with pytest.raises(InputError, match=message):
            products.main()
    assert not list(tmp_path.iterdir())


def test_written_aside(tmp_path):
    with pytest.raises(KeyError), products.written_aside(tmp_path / "out") as aside:
        (aside / "half").write_text("x")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with products.written_aside(tmp_path / "out") as aside:
        (aside / "whole").write_text("x")
    assert files_under(tmp_path) == ["out/whole"]
    with pytest.raises(InputError, match="is there already"), products.written_aside(tmp_path / "out"):
        pass


def test_phrases():
    text = "The dress's v-neck, and 2 Çiçek prints. New York style"
    words = {"dress", "v-neck", "çiçek", "prints", "çiçek prints", "york"}
    assert products.phrases(text) == {*words, "dress v-neck"}
    assert "çiçek prints york" not in products.phrases(text, max_words=3)


def test_mine_by_hand():
    texts = [{"a"}] * 4 + [{"b", "a b", "a"}] * 3 + [{"c"}] * 3 + [{"rare"}] * 2
    # "a b" meets 3 x 12 / (7 x 3) = 1.7 times as often as chance, and takes "b" along
    assert products.mine(texts, config(lift=1.7, max_share=0.6)) == [("a", 7), ("a b", 3), ("c", 3)]
    assert products.mine(texts, config(lift=1.8, max_share=0.6)) == [("a", 7), ("b", 3), ("c", 3)]
    assert products.mine(texts, config(lift=1.8, max_share=0.5)) == [("b", 3), ("c", 3)]
    assert products.mine(texts, config(lift=1.8, vocabulary=1)) == [("b", 3)]
    with pytest.raises(InputError, match="lower --min_count"):
        products.mine(texts, config(min_count=8))


def test_relabel_a_root(catalogue, tmp_path):
    before = {name: (catalogue / name).read_bytes() for name in files_under(catalogue)}
    out = tmp_path / "out"
    command = [
        sys.executable,
        PREPARE / "catalogue.py",
        f"--root={catalogue}",
        f"--out={out}",
        "--link",
        "--min_count=3",
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert before == {
        name: (catalogue / name).read_bytes() for name in files_under(catalogue)
    }  # links are not followed
    assert files_under(out) == sorted(before) and not check_data.check(out)[1]
    labels, old = read_json(out / "labels.json"), json.loads(before["labels.json"])
    assert labels["categories"] == old["categories"] and labels["attributes"] != old["attributes"]
    for source in annotations.SETS:  # one vocabulary over all sets, nothing else changed
        new = annotations.load_products(out, source, "train")
        for product, was in zip(new, annotations.load_products(catalogue, source, "train"), strict=True):
            assert (product.name, product.text, product.category) == (was.name, was.text, was.category)
            assert all(labels["attributes"][a].split()[0] in product.text.lower() for a in product.attributes)
    products.label(out, out, config(vocabulary=5))  # in place
    assert len(read_json(out / "labels.json")["attributes"]) == 5
    assert max(a for p in annotations.load_pretraining(out) for a in p.attributes) == 4
    assert files_under(out) == sorted(before)


def test_relabel_in_place_changes_nothing_on_a_fault(tmp_path):
    item = {"images": ["a.jpg"], "id": 1, "title": "red hat", "attributes_id": [7]}
    write_json(tmp_path / "Fashion200k" / "train_info.json", [item])
    write_json(tmp_path / "Fashion200k" / "test_info.json", [{**item, "title": None}])
    before = {name: (tmp_path / name).read_bytes() for name in files_under(tmp_path)}
    with pytest.raises(InputError, match="entry 0 .id 1.: key 'title'"):
        products.label(tmp_path, tmp_path, config(min_count=1))
    assert before == {name: (tmp_path / name).read_bytes() for name in files_under(tmp_path)}


# ---------------------------------------------------------------------------------------------------------------------
# fashiongen.py


def make_release(rows, size=256):
    """FashionGen's schema as a mapping of arrays; rows: (product id, title, category, sub-category) of each photo."""
    n = len(rows)

    def column(values):
        return np.array([[value.encode("ISO-8859-9")] for value in values])

    return {
        "index": np.arange(n)[:, None],
        "input_image": np.stack([np.full((size, size, 3), 10 * i, np.uint8) for i in range(n)]),
        "input_productID": np.array([[row[0]] for row in rows]),
        "input_name": column(row[1] for row in rows),
        "input_description": column(f"{row[1]} by\n Kılıç, in café. " for row in rows),
        "input_category": column(row[2] for row in rows),
        "input_subcategory": column(row[3] for row in rows),
        "input_pose": column(f"id_gridfs_{i + 1}" for i in range(n)),
        "input_gender": column("Men" for _ in rows),
    }


TRAIN = make_release(
    [
        (52, "Red Tee", "TOPS", "T-SHIRTS"),
        (52, "Red Tee", "TOPS", "T-SHIRTS"),
        (7, "Grey Jeans", "JEANS", "JEANS"),
        (52, "Red Tee", "TOPS", "T-SHIRTS"),
    ]
)
VAL = make_release([(9, "Blue Shirt", "SHIRTS", "SHIRTS")])


def check_fashiongen(root, names):
    assert names == {"categories": ["JEANS", "SHIRTS", "TOPS"], "subcategories": ["JEANS", "SHIRTS", "T-SHIRTS"]}
    train, val = (annotations.load_products(root, "FashionGen", split) for split in ("train", "val"))
    assert not check_data.check(root)[1]
    assert [(p.name, len(p.images), p.category, p.subcategory) for p in [*train, *val]] == [
        ("FashionGen 52", 3, 2, 2),
        ("FashionGen 7", 1, 0, 0),
        ("FashionGen 9", 1, 1, 1),
    ]
    assert train[0].text == "Red Tee.Red Tee by Kılıç, in café."
    assert [np.asarray(Image.open(path)).mean().round() for path in train[0].images] == [0, 10, 30]
    assert Image.open(val[0].images[0]).size == (256, 256)


def test_fashiongen_on_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(fashiongen, "BLOCK", 2)  # four photos in more than one block
    check_fashiongen(tmp_path, fashiongen.convert({"train": TRAIN, "val": VAL}, tmp_path / "FashionGen"))


def test_fashiongen_on_hdf5(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py")
    for name, release in (("train", TRAIN), ("val", VAL)):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            for key, array in release.items():
                file.create_dataset(key, data=array)
    root = tmp_path / "root"
    write_json(root / "labels.json", {"attributes": ["kept"]})
    flags = [f"--train={tmp_path}/train.h5", f"--val={tmp_path}/val.h5", f"--out={root}"]
    monkeypatch.setattr(sys, "argv", ["fashiongen.py", *flags])
    fashiongen.main()
    labels = read_json(root / "labels.json")
    assert labels.pop("attributes") == ["kept"]
    check_fashiongen(root, labels)
    (tmp_path / "val.h5").write_bytes((tmp_path / "val.h5").read_bytes()[:1000])
    monkeypatch.setattr(sys, "argv", ["fashiongen.py", *flags[:2], f"--out={tmp_path}/other"])
    with pytest.raises(InputError, match="val.h5: cannot be read as HDF5"):
        fashiongen.main()
    assert not (tmp_path / "other").exists()


def test_fashiongen_without_h5py(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match="pip install h5py"):
        fashiongen.open_release("train.h5")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input_name": None}, "val: no key 'input_name', found index, input_image"),
        ({"input_name": np.array([[b"a"], [b"b"]])}, "val: input_name: found 2 entries, expected 1"),
        ({"input_name": np.array([["text"]])}, "val: input_name: .*texts as bytes"),
        ({"input_image": np.zeros((1, 4, 4), np.uint8)}, r"val: input_image: found uint8 \(1, 4, 4\)"),
    ],
)
def test_fashiongen_of_another_schema(tmp_path, change, message):
    release = {key: value for key, value in {**VAL, **change}.items() if value is not None}
    with pytest.raises(InputError, match=message):
        fashiongen.convert({"val": release}, tmp_path / "FashionGen")


# ---------------------------------------------------------------------------------------------------------------------
# polyvore.py


def make_polyvore(folder):
    """A small release in the published shape: item n has fine category 3, 4 or 1606, by n modulo 3."""
    metadata = {}
    for n in range(1, 31):
        metadata[str(n)] = {
            "url_name": f"item {n} of the shop",
            "title": "" if n == 2 else f"Item {n}",
            "description": None if n == 3 else "for  the\nevening",
            "catgeories": ["Women's Fashion"],
            "related": [],
            "category_id": ("3", "4", "1606")[n % 3],
            "semantic_category": ("tops", "bags", "shoes")[n % 3],
        }
        photo(folder / "images" / f"{n}.jpg")
    write_json(folder / "polyvore_item_metadata.json", metadata)

    def outfit(name, *items):
        rows = [{"item_id": str(item), "index": i} for i, item in enumerate(items, 1)]
        return {"set_id": str(name), "items": rows}

    for split, first in (("disjoint", 100), ("nondisjoint", 200)):
        train = [outfit(first, 1, 2, 3), outfit(first + 1, 4, 5), outfit(first + 2, 6)]
        test = [outfit(first + 10, 7, 8, 9), outfit(first + 11, 10, 11), outfit(first + 12, 12, 13, 16)]
        question = {
            "question": [f"{first + 10}_1", f"{first + 10}_3"],
            "blank_position": 2,
            "answers": [f"{first + 11}_2", f"{first + 10}_2", f"{first + 12}_2", f"{first + 12}_3"],
        }
        write_json(folder / split / "train.json", train)
        write_json(folder / split / "test.json", test)
        write_json(folder / split / "valid.json", [outfit(first + 5, 20, 21)])
        write_json(folder / split / "fill_in_blank_test.json", [question])
    (folder / "categories.csv").write_text("3,dress,tops\n4,bag,bags\n1606,boot,shoes\n")
    return folder


@pytest.fixture
def release(tmp_path):
    return make_polyvore(tmp_path / "polyvore_outfits")


def test_polyvore(release, tmp_path):
    root = tmp_path / "root"
    command = [sys.executable, PREPARE / "polyvore.py", f"--release={release}", f"--out={root}", "--link"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for split in ("disjoint", "nondisjoint"):
        train, _ = annotations.load_polyvore(root, split, "train")
        test, n_categories = annotations.load_polyvore(root, split, "test")
        assert n_categories == 153  # the release's ids, so the released checkpoint's order
        assert [[Path(path).stem for path, _ in row["items"]] + [row["blank"]] for row in train] == [
            ["1", "2", "3"],
            ["4", "5"],
        ]
        assert [(row["blank"], row["fake"]) for row in test] == [("8", False), ("11", True)]  # 8, 11: category 1606
        assert [Path(path).stem for path, _ in test[0]["items"]] == ["7", "9"]
    products = annotations.load_pretraining(root, ("PolyvoreOutfits",))
    assert [product.text for product in products][1:4] == [
        "item 2 of the shop.for the evening",
        "Item 3.",
        "Item 4.for the evening",
    ]
    assert len(products) == 6 and not check_data.check(root)[1]
    assert "20.jpg" not in {
        path.name for path in (root / "PolyvoreOutfits" / "images").iterdir()
    }  # of valid.json alone
    assert all(path.is_symlink() for path in (root / "PolyvoreOutfits" / "images").iterdir())


def test_polyvore_that_does_not_fit(release, tmp_path):
    questions = release / "disjoint" / "fill_in_blank_test.json"
    rows = read_json(questions)
    write_json(questions, [{**rows[0], "answers": rows[0]["answers"][:1]}])
    with pytest.raises(InputError, match="fill_in_blank_test.json: entry 0: found 0 answers"):
        polyvore.convert(release, tmp_path / "out")
    write_json(questions, rows)
    (release / "images" / "8.jpg").unlink()
    with pytest.raises(InputError, match="images/8.jpg: missing .1 such."):
        polyvore.convert(release, tmp_path / "out")
    metadata = read_json(release / "polyvore_item_metadata.json")
    del metadata["9"]
    write_json(release / "polyvore_item_metadata.json", metadata)
    with pytest.raises(InputError, match="item 9: key 'category_id'"):
        polyvore.convert(release, tmp_path / "out")
    assert not (tmp_path / "out").exists()
