"""Preparation of releases: FashionGen's HDF5 and Polyvore Outfits become what data.py reads."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_prepare import photo, read_json, write_json

from plumbing import annotations
from plumbing.settings import InputError
from prepare import check_data, fashiongen, polyvore

# ---------------------------------------------------------------------------------------------------------------------
# fashiongen.py


def make_release(rows, size=256):
    """FashionGen's schema as a mapping of arrays; rows: (product id, title, category, sub-category) of each photo."""
    n = len(rows)

    def column(values):
        return np.array([[value.encode("ISO-8859-9")] for value in values])

    return {
        "input_image": np.stack([np.full((size, size, 3), 10 * i, np.uint8) for i in range(n)]),
        "input_productID": np.array([[row[0]] for row in rows]),
        "input_name": column(row[1] for row in rows),
        "input_description": column(f"{row[1]} by\n Kılıç, in café. " for row in rows),
        "input_category": column(row[2] for row in rows),
        "input_subcategory": column(row[3] for row in rows),
    }


TEE = (52, "Red Tee", "TOPS", "T-SHIRTS")
TRAIN = make_release([TEE, TEE, (7, "Grey Jeans", "JEANS", "JEANS"), TEE])
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


def test_fashiongen_that_is_not_there(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(InputError, match="pip install h5py"):
        patch.setitem(sys.modules, "h5py", None)
        fashiongen.open_release("train.h5")
    pytest.importorskip("h5py")
    with pytest.raises(InputError) as error:
        fashiongen.open_release(tmp_path / "train.h5")
    cure = "FashionGen's authors give it on request (README, section Data); name the two files by --train and --val"
    assert str(error.value) == f"{tmp_path}/train.h5: no file there, expected FashionGen's HDF5 file; {cure}"


def test_markup_in_the_texts_of_a_release():
    release = make_release([(1, "Tees &amp; tops <br>", "TOPS &amp; MORE", "T-SHIRTS")], size=4)
    (item,), _ = fashiongen.read_products(release, "train")
    texts = [item[name] for name in ("title", "description", "category")]
    assert texts == ["Tees & tops", "Tees & tops by Kılıç, in café.", "TOPS & MORE"]
    row = {"title": "A&amp;B <b>hat</b>", "description": None, "semantic_category": "hats"}
    assert polyvore.texts(row) == {"title": "A&B hat", "description": "", "semantic_category": "hats"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input_name": None}, "val: no key 'input_name', found input_image"),
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


def items_of(outfits):
    """The names of each outfit's items, that of the blank last."""
    return [[Path(path).stem for path, _ in row["items"]] + [row["blank"]] for row in outfits]


def test_polyvore(release, tmp_path):
    root, images = tmp_path / "root", tmp_path / "root" / "PolyvoreOutfits" / "images"
    command = [sys.executable, "-m", "prepare.polyvore", f"--release={release}", f"--out={root}", "--link"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for split in ("disjoint", "nondisjoint"):
        train, _ = annotations.load_polyvore(root, split, "train")
        test, n_categories = annotations.load_polyvore(root, split, "test")
        assert n_categories == 153  # the release's ids, so the released checkpoint's order
        assert items_of(train) == [["1", "2", "3"], ["4", "5"]]
        assert [(row["blank"], row["fake"]) for row in test] == [("8", False), ("11", True)]  # 8, 11: category 1606
        assert items_of(test)[0] == ["7", "9", "8"]
    products = annotations.load_pretraining(root, ("PolyvoreOutfits",))
    texts = ["item 2 of the shop.for the evening", "Item 3.", "Item 4.for the evening"]
    assert [product.text for product in products][1:4] == texts
    assert len(products) == 6 and not check_data.check(root)[1]
    assert not (images / "20.jpg").is_symlink()  # of valid.json alone
    assert (images / "1.jpg").is_file() and all(path.is_symlink() for path in images.iterdir())


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


def test_polyvore_that_is_not_there(release, tmp_path):
    gone = release / "nondisjoint" / "fill_in_blank_test.json"
    gone.unlink()
    cure = "its authors publish it (README, section Data); name its folder by --release"
    for folder, path in ((release, gone), (tmp_path / "nowhere", tmp_path / "nowhere" / "polyvore_item_metadata.json")):
        with pytest.raises(InputError) as error:
            polyvore.convert(folder, tmp_path / "out")
        assert str(error.value) == f"{path}: no file there, expected the release of Polyvore Outfits; {cure}"


def test_polyvore_without_some_images(release, tmp_path, monkeypatch, capsys):
    train = read_json(release / "disjoint" / "train.json")
    more = [{"item_id": str(n), "index": i} for i, n in enumerate((17, 18, 19), 1)]
    write_json(release / "disjoint" / "train.json", [*train, {"set_id": "150", "items": more}])
    questions = read_json(release / "disjoint" / "fill_in_blank_test.json")
    second = {"question": ["112_1", "112_3"], "blank_position": 2, "answers": ["110_1", "112_2"]}
    write_json(release / "disjoint" / "fill_in_blank_test.json", [*questions, second])
    (release / "images" / "2.jpg").unlink()  # of a training outfit of both splits
    (release / "images" / "11.jpg").write_bytes(b"")  # only widens the gallery
    (release / "images" / "13.jpg").unlink()  # the right answer of the second question
    (release / "images" / "30.jpg").unlink()  # nobody needs it
    root = tmp_path / "root"
    argv = ["polyvore.py", f"--release={release}", f"--out={root}", "--link"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(InputError) as error:
        polyvore.main()
    cure = "fetch the images again, or set --missing=skip to leave out what needs them"
    assert str(error.value) == f"{release}/images/2.jpg: missing (3 such, with empty files); {cure}"
    assert not root.exists() or not list(root.iterdir())
    monkeypatch.setattr(sys, "argv", [*argv, "--missing=skip"])
    capsys.readouterr()
    polyvore.main()
    printed = " ".join(capsys.readouterr().out.split())
    assert "disjoint: 2 outfits to train on (1 of less than two items left out), 1 questions in 1 categories" in printed
    left_out = "1 of 4 outfits, 1 of 2 questions, 1 of 1 items that only widen the gallery"
    assert f"left out as images are missing: {left_out}" in printed
    assert "8 products to pre-train on (1 left out)" in printed
    outfits = annotations.load_polyvore(root, "disjoint", "train").outfits
    assert items_of(outfits) == [["4", "5"], ["17", "18", "19"]]
    test = annotations.load_polyvore(root, "disjoint", "test").outfits
    assert [(row["blank"], row["fake"]) for row in test] == [("8", False)]
    assert not check_data.check(root)[1]


def test_polyvore_without_the_images_of_all_questions(release, tmp_path):
    (release / "images" / "7.jpg").unlink()
    with pytest.raises(InputError, match="disjoint: no question with all its images; fetch the images again"):
        polyvore.convert(release, tmp_path / "out", missing="skip")
    (release / "images" / "7.jpg").touch()
    for n in (1, 4):
        (release / "images" / f"{n}.jpg").unlink()
    with pytest.raises(InputError, match="disjoint: no outfit of two items to train on with all its images"):
        polyvore.convert(release, tmp_path / "out", missing="skip")
