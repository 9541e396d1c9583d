"""Preparation of catalogues: what people bring (a CSV, a feed, parquet files) becomes what data.py reads."""

import errno
import gzip
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from plumbing import annotations
from plumbing.settings import InputError
from prepare import catalogue as products  # `catalogue` is a fixture
from prepare import check_data, layout
from prepare.cells import plain_text


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


def read(folder, name, **settings):
    """What `read_products` makes of a file: its items, and its faults without the file's name."""
    photos = folder / "temporary"
    shutil.rmtree(photos, ignore_errors=True)
    photos.mkdir()
    items, faults = products.read_products(config(products=str(folder / name), **settings), photos)
    return items, [fault.removeprefix(f"{folder / name}: ") for fault in faults]


def read_shop(folder, text, name="shop.csv", encoding="utf-8", **settings):
    """`read` of a file with this text: ({id: (title, names of its images)}, faults)."""
    (folder / name).write_text(text, encoding=encoding, newline="")
    items, faults = read(folder, name, **settings)
    found = {item["id"]: (item["title"], [str(path.relative_to(folder)) for path in item["images"]]) for item in items}
    return found, faults


def matches(message, found):
    """Whether a message is as expected, where *** stands for anything."""
    return re.fullmatch(re.escape(message).replace(r"\*\*\*", ".*"), found)


def infos(root):
    """{split: the items} of FashionGen in a prepared folder."""
    return {split: read_json(root / "FashionGen" / f"{split}_info.json") for split in ("train", "val")}


@pytest.fixture
def run_catalogue(monkeypatch, capsys):
    """A function (flags) -> standard output: prepare/catalogue.py with phrases that stand in two texts."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["catalogue.py", "--min_count=2", *flags])
        products.main()
        return capsys.readouterr().out

    return run


# ---------------------------------------------------------------------------------------------------------------------
# a CSV becomes a layout


def make_shop(folder, n=40):
    """shop.csv of n products of two kinds, one row a photo, two photos each."""
    rows = ["sku,photo,name,text,kind"]
    for i in range(n):
        kind, name = ("dress", f"red dress no {i}") if i % 2 else ("shoes", f"black shoes no {i}")
        for view in range(2):
            photo(folder / "photos" / f"p{i}" / f"{view}.png", 10 + i)
            text = '"With a round neck, made of soft cotton."' if i % 4 == 1 else "Soft; with flat soles"
            rows.append(f"A/{i},photos/p{i}/{view}.png,{name},{text},{kind}")
    (folder / "shop.csv").write_text("\n".join(rows))


COLUMNS = {"id": "sku", "images": "photo", "title": "name", "description": "text", "category": "kind"}


def split_of(folder, **settings):
    """{id: split} of what `write_layout` makes of shop.csv, in the folder out."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    given = config(products=str(folder / "shop.csv"), link=True, **settings)
    products.write_layout(folder / "out", folder / "temporary", given)
    return {item["id"]: split for split, items in infos(folder / "out").items() for item in items}


def test_a_shop_becomes_a_layout(tmp_path, run_catalogue):
    make_shop(tmp_path)
    root = tmp_path / "root"
    flags = [f"--{key}={value}" for key, value in COLUMNS.items()]
    printed = run_catalogue(f"--products={tmp_path}/shop.csv", f"--out={root}", "--min_count=3", *flags)
    assert not check_data.check(root)[1]
    train, val = (annotations.load_products(root, "FashionGen", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (36, 4)
    assert all(len(product.images) == 2 for product in [*train, *val])  # two rows, one product
    names = [{product.name for product in part} for part in (train, val)]
    assert not names[0] & names[1] and "FashionGen A/7" in names[0] | names[1]
    labels = read_json(root / "labels.json")
    assert labels["categories"] == ["dress", "shoes"] and labels["subcategories"] == []
    assert all(labels["categories"][product.category] in product.text for product in train)
    names = labels["attributes"]
    assert f"{len(names)} pseudo-attributes" in printed and "least frequent" in printed
    assert "round neck" in names and "with" not in names and "soft" not in names  # stop word; in every text
    assert "neck" not in names  # never without "round"
    for product in train:
        assert product.attributes and all(names[a] in product.text.replace(",", "") for a in product.attributes)
        assert ("round neck" in product.text) == (names.index("round neck") in product.attributes)
    assert not list(tmp_path.glob(".root*"))


def test_split_follows_from_the_seed(tmp_path):
    make_shop(tmp_path)
    a, b, c = (split_of(tmp_path, seed=seed, **COLUMNS) for seed in (0, 0, 1))
    assert a == b and a != c
    assert all(path.is_symlink() and path.resolve().is_file() for path in (tmp_path / "out").rglob("*.png"))


def test_kaggles_folder_by_one_command(tmp_path, run_catalogue):
    """styles.csv, images/ID.jpg and styles/ID.json, of which the last are not read."""
    lines = ["id,gender,masterCategory,subCategory,articleType,productDisplayName"]
    for i in range(1163, 1183):
        photo(tmp_path / "raw" / "images" / f"{i}.jpg", i % 256)
        write_json(tmp_path / "raw" / "styles" / f"{i}.json", {"data": {"id": i}})
        lines.append(f"{i},Men,Apparel,Topwear,{'Shirts' if i % 2 else 'Tshirts'},Nike blue no {i}")
    lines.append("1183,Men,Apparel,Topwear,Shirts,A comma, without quotes")
    (tmp_path / "raw" / "styles.csv").write_text("\n".join(lines))
    columns = ["--title=productDisplayName", "--category=subCategory", "--subcategory=articleType"]
    root = tmp_path / "kaggle"
    flags = [f"--products={tmp_path}/raw/styles.csv", f"--out={root}", "--images=images/{id}.jpg", *columns]
    printed = run_catalogue(*flags, "--skip_faulty", "--max_share=1")
    line = "1 more cells than columns; put quotes around a cell that holds the separator"
    assert f"styles.csv: row 21: {line}" in printed
    items = [item for part in infos(root).values() for item in part]
    assert {item["id"]: item["subcategory_id"] for item in items} == {str(i): (i + 1) % 2 for i in range(1163, 1183)}
    names = read_json(root / "labels.json")
    assert names["categories"] == ["Topwear"] and names["subcategories"] == ["Shirts", "Tshirts"]
    assert not check_data.check(root)[1]


def test_faulty_rows(tmp_path, capsys):
    for i in ("a", *range(7, 12)):
        photo(tmp_path / f"{i}.jpg", 100 if i == "a" else 10 * i)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    lines = ["id,images,title", "1,a.jpg,red hat", "2,b.jpg,red hat", "3,broken.jpg,red hat", "4,,red hat", "5,a.jpg,"]
    lines += ["1,a.jpg,blue hat", "6,a.jpg,red hat,more", *(f"{i},{i}.jpg;{i}.jpg,red hat" for i in range(7, 12))]
    (tmp_path / "shop.csv").write_text("\n".join(lines))
    with pytest.raises(InputError, match="6 faulty rows.*--skip_faulty"):
        split_of(tmp_path)
    printed = capsys.readouterr().out
    for row, text in ((2, "b.jpg"), (3, "broken.jpg"), (4, "empty"), (5, "empty"), (6, "another title"), (7, "cells")):
        assert f"row {row}: " in printed and text in printed
    assert "--missing" not in printed  # a setting of other scripts
    assert not (tmp_path / "out").exists()
    assert sorted(split_of(tmp_path, skip_faulty=True)) == ["1", "10", "11", "7", "8", "9"]
    assert all(len(item["images"]) == 1 for part in infos(tmp_path / "out").values() for item in part)
    (tmp_path / "shop.csv").write_text("\n".join(lines[:1] + lines[2:4]))
    with pytest.raises(InputError, match="no product is left, as all rows are faulty"):
        split_of(tmp_path, skip_faulty=True)


# ---------------------------------------------------------------------------------------------------------------------
# texts


NFD = "e\u0301"  # é as a Mac writes it


@pytest.mark.parametrize(
    "text, plain",
    [
        ('<div><p><b style="font:9px">red dress &amp; belt</b></p><li>soft&nbsp;silk', "red dress & belt soft silk"),
        ("<style>p {color: red}</style>one<br/>two<!-- three -->", "one two"),
        ("<a title='5 > 4' href=x>red</a> hat", "red hat"),
        ("caf&eacute; &#39;s A&not B a<b and c &amp; d", "café 's A&not B a<b and c & d"),
        # escaped twice, as feeds and Magento write it
        ("&amp;lt;p&amp;gt;red&amp;amp;nbsp;dress &amp;amp;amp; belt&amp;lt;/p&amp;gt;", "red dress & belt"),
        # Google's feeds
        ("<![CDATA[<p>red</p> dress]]>", "red dress"),
        # WooCommerce writes the ends of lines as a backslash and a letter, which colours may hold, too
        (r"soft silk\nline two\r\n\r\nline\tthree", "soft silk line two line three"),
        (r"Soft silk.\nmade by hand\nWash cold", "Soft silk. made by hand Wash cold"),
        (r"- warm\n- light\n\nfor winter", "- warm - light for winter"),
        (r"olive\teal or olive\rust", r"olive\teal or olive\rust"),
        # cut off by the shop
        ("<p>red dress <a\nhref=", "red dress"),
        ("&lt;p&gt;red dress&lt;/p&gt;&lt;span style=&quot;font", "red dress"),
        # no markup
        ("length < 90 cm, A&B,\n width > 3", "length < 90 cm, A&B, width > 3"),
        ("length < 90", "length < 90"),
        # Unicode: two forms of a letter, half an emoji
        (f"caf{NFD}", "café"),
        ("red \ud83d dress", "red ? dress"),
    ],
)
def test_texts_as_shops_write_them(text, plain):
    assert plain_text(text) == plain


@pytest.mark.parametrize(
    "text, found",
    [
        (
            "The dress's v-neck, and 2 Çiçek prints. New York style",
            {"dress", "v-neck", "dress v-neck", "çiçek", "prints", "çiçek prints", "york"},
        ),
        ("กระโปรง สีชมพู, ผ้าไหม", {"กระโปรง", "สีชมพู", "กระโปรง สีชมพู", "ผ้าไหม"}),
        ("नीली साड़ी", {"नीली", "साड़ी", "नीली साड़ी"}),
        (f"veste d’{NFD}t{NFD}, brod{NFD}e", {"veste", "été", "veste été", "brodée"}),
        ("Nike® t-shirt - soft", {"nike", "t-shirt", "soft", "t-shirt soft"}),
    ],
)
def test_phrases(text, found):
    """Words of any script stay whole."""
    assert products.phrases(text) == {unicodedata.normalize("NFC", phrase) for phrase in found}


def test_mine_by_hand():
    # of 12 texts, three hold "a b", "a" and "b"
    count = {"a": 7, "b": 3, "a b": 3, "c": 3, "rare": 2}
    # "a b" meets 3 x 12 / (7 x 3) = 1.7 times as often as chance, and takes "b" along
    assert products.mine(count, 12, config(lift=1.7, max_share=0.6)) == [("a", 7), ("a b", 3), ("c", 3)]
    assert products.mine(count, 12, config(lift=1.8, max_share=0.6)) == [("a", 7), ("b", 3), ("c", 3)]
    assert products.mine(count, 12, config(lift=1.8, max_share=0.5)) == [("b", 3), ("c", 3)]
    assert products.mine(count, 12, config(lift=1.8, vocabulary=1)) == [("b", 3)]
    with pytest.raises(InputError, match="lower --min_count"):
        products.mine(count, 12, config(min_count=8))


# ---------------------------------------------------------------------------------------------------------------------
# files of products, as other programs write them


RED = {"1": ("red dress", ["photos/1.jpg"])}
RED_AND_BLUE = {**RED, "2": ("blue hat, wool", ["photos/2.jpg"])}
BOTH = {"1": ("red", ["photos/1.jpg", "photos/2.jpg"])}
JSON = {"name": "shop.json"}
ENGLISH = {**JSON, "language": "en"}
BY_ID = {"images": "photos/{id}.jpg"}
ROW = '"id": 1, "images": "photos/1.jpg", "title": "red dress"'
SRC = '{"id": 1, "images": [{"src": "photos/1.jpg", "width": 9}, {"src": "photos/2.jpg"}], "title": "red"}'
BY_LANGUAGE = '[{"language_tag": "de_DE", "value": "rot"}, {"language_tag": "en_GB", "value": "red dress"}]'
FEED = """<?xml version="1.0"?><rss xmlns:g="http://x.y/1"><channel><title>Shop</title><item><g:id>1</g:id><title>
red</title><g:image_link>https://a.b/1.jpg?v=2</g:image_link><g:more>https://a.b/x/2.jpg</g:more><g:tax><g:c>1</g:c></g:tax>
</item></channel></rss>"""
ORDERS = {"id": {"0": 1.0}, "images": {"0": "photos/1.jpg"}, "title": {"0": "red dress"}}  # pandas, by column
SPLIT = {"columns": ["id", "images", "title"], "index": [0], "data": [[1, "photos/1.jpg", "red dress"]]}
SIZES = '[{"thumb": "//a/t.jpg", "large": "//a/1.jpg", "n": null}]'


@pytest.mark.parametrize(
    "text, found, settings",
    [
        # Excel
        ("sep=;\r\nid;images;title\r\n1;photos/1.jpg;red dress\r\n;;\r\n", RED, {}),
        ("id\timages\ttitle\r\n1\tphotos/1.jpg\tred dress\r\n", RED, {"encoding": "utf-16"}),
        ("id|images|title\r1|photos/1.jpg|red dress\r", RED, {}),
        ("\ufeff\ufeffid,images,title\n1,photos/1.jpg,red dress\n", RED, {}),
        # quotes and spaces
        ('id;"title,\nand more";images\n1;red dress;photos/1.jpg\n', RED, {"title": "title, and more"}),
        ('id, images , title\n1, photos/1.jpg, red dress\n\n2, photos/2.jpg, "blue hat, wool"\n', RED_AND_BLUE, {}),
        ('id,images,title\n1,photos/1.jpg,red 5" heel\n', {"1": ('red 5" heel', ["photos/1.jpg"])}, {}),
        # lists in a cell; Windows' paths
        ('id,images,title\n1,"[""photos\\/1.jpg"", ""photos/2.jpg""]",red\n', BOTH, {}),
        ("id;images;title\n1;['photos/1.jpg', 'photos/2.jpg'];red\n", BOTH, {}),
        ("id,images,title\n1, photos/1.jpg ;photos/2.jpg;,red\n", BOTH, {}),
        ("id,images,title\n1,photos\\1.jpg;.\\photos\\2.jpg,red\n", BOTH, {}),
        # Magento: paths in its folder of media, further images in a column that may be empty
        ('id;images;title\n1;"/photos/1.jpg;/photos/2.jpg";red\n', BOTH, {}),
        ('id,a,b,title\n1,/1.jpg,"/1.jpg,/2.jpg",red\n', BOTH, {"images": "photos/{a},photos/{b}", "separator": ","}),
        ("id,base,more,title\n1,photos/1.jpg,,red dress\n", RED, {"images": "{base};{more}"}),
        # Shopify: a size without a photo of its own
        ("id,title,images,size\n1,red,photos/1.jpg,S\n1,,photos/2.jpg,M\n1,,,L\n", BOTH, {}),
        ("id,title,images,size\n1,red,,S\n1,,photos/1.jpg,M\n1,,photos/2.jpg,L\n", BOTH, {}),
        # templates, with Python's formats
        ('id,title\n1,red dress\n2,"blue hat, wool"\n', RED_AND_BLUE, BY_ID),
        ("id,Other No.,title\n1,2,red\n", BOTH, {"images": "photos/{id}.jpg;photos/{Other No.}.jpg"}),
        ('{"id": 1.0, "title": "red dress"}', RED, {**BY_ID, **JSON}),
        ('{"id": 1, "n": ["1", "2"], "title": "red"}', BOTH, {"images": "photos/{n}.jpg", **JSON}),
        ("id,title\n0010,red\n", {"0010": ("red", ["00/0010.jpg"])}, {"images": "{id:.2}/{id}.jpg"}),
        ("id,title\n10,red\n", {"10": ("red", ["00/0010.jpg"])}, {"images": "00/{id:04}.jpg"}),
        ("id,title\n10,red\n", {"10": ("red", ["1/0/x.jpg"])}, {"images": "{id[0]}/{id[1]}/x.jpg"}),
        # JSON: one value or lines, also cut out of a list; as pandas writes it
        (f'{{"products": [\n{{{ROW}}}\n],\n "count": 1}}', RED, JSON),
        (f'{{"data": {{"products": [{{{ROW}}}]}}}}', RED, JSON),
        ('{"n": 1, "1": {"images": "photos/1.jpg", "title": "red dress"}}', RED, JSON),
        (f"{{{ROW}}},\n{{{ROW}}},\n", RED, JSON),
        (f'{{{ROW}, "description": NaN}}', RED, {"name": "shop.jsonl"}),
        (SRC, BOTH, JSON),
        (json.dumps(ORDERS), RED, JSON),
        (json.dumps(SPLIT), RED, JSON),
        (FEED, BOTH, {"name": "a.xml", "images": "{image_link};{more}", "photos": "photos"}),
        # texts that are lists, and by language
        ('{"id": 1, "images": "photos/1.jpg", "title": ["red", "dress"]}', RED, JSON),
        (f'{{"id": 1, "images": "photos/1.jpg", "title": {BY_LANGUAGE}}}', RED, ENGLISH),
        ('{"id": 1, "images": "photos/1.jpg", "title": {"en-GB": "red dress", "en-US": "x"}}', RED, ENGLISH),
        ("id,images,title\n1,photos/1.jpg,\"['red', 'dress']\"\n", RED, {}),
        # an id that became a float
        ("id,images,title\n1.0,photos/1.jpg,red dress\n", RED, {}),
        # addresses of photos that lie in a folder; one of several sizes of a photo
        ("id,images,title\n1,https://a.b/1.jpg?v=3;//a.b/c/2.jpg,red\n", BOTH, {"photos": "photos"}),
        (f'{{"id": 1, "images": {SIZES}, "title": "red dress"}}', RED, {**JSON, "photos": "photos"}),
        # names that differ in case, Unicode's form or escapes
        ("id,images,title\n1,Photos/1.JPG,red dress\n", RED, {}),
        (f"id,images,title\n1,caf{NFD}%201.jpg,red\n", {"1": ("red", ["café 1.jpg"])}, {}),
    ],
)
def test_exports_that_are_read(tmp_path, text, found, settings):
    for name in ("photos/1.jpg", "photos/2.jpg", "00/0010.jpg", "1/0/x.jpg", "café 1.jpg"):
        photo(tmp_path / name)
    if "photos" in settings:
        settings = {**settings, "photos": str(tmp_path / settings["photos"])}
    assert read_shop(tmp_path, text, **settings) == (found, [])


EMPTY = "empty; a product needs an id, a title and images"
LONG = "silk " * 30_000 + "end"  # longer than csv's own limit of a cell
ROWS_OF_ONE_ID = f"""id,title,images,description,category
1,red dress,,,
2,,b.jpg,,Hats
3,,,wool,
1,,a.jpg,{LONG},
2,blue hat,,,hats
1,Red Dress,a.jpg;b.jpg,other silk,dresses
2,,b.jpg,,shoes
2,green hat,b.jpg,,
4,grey shoe,,,
"""


def test_texts_and_photos_on_any_row_of_a_product(tmp_path):
    for name in "ab":
        photo(tmp_path / f"{name}.jpg")
    (tmp_path / "shop.csv").write_text(ROWS_OF_ONE_ID)
    items, faults = read(tmp_path, "shop.csv")
    texts = [(item["id"], item["title"], item["description"], item["category"]) for item in items]
    assert texts == [("1", "red dress", LONG, "dresses"), ("2", "blue hat", "", "Hats")]
    assert [[path.name for path in item["images"]] for item in items] == [["a.jpg", "b.jpg"], ["b.jpg"]]
    other = "rows of one id are one product"
    assert faults == [
        f"row 7: id 2 stood before with another category; {other}",
        f"row 8: id 2 stood before with another title; {other}",
        f"row 3: title and images: {EMPTY}",
        f"row 9: images: {EMPTY}",
    ]


def test_absolute_paths_and_odd_names_of_images(tmp_path):
    names = ["tom&amp;jerry.jpg", "two  spaces.jpg", "back\\slash.jpg", "[red] dress.jpg"]
    for name in [*names, "away/a.jpg"]:
        photo(tmp_path / name)
    text = "images,title\n" + "".join(f"{name},hat\n" for name in [*names, tmp_path / "away" / "a.jpg"])
    found, faults = read_shop(tmp_path, text, separator="|")
    assert not faults and [images for _, images in found.values()] == [[name] for name in [*names, "away/a.jpg"]]


def test_packed_files_and_spreadsheets(tmp_path):
    photo(tmp_path / "photos" / "1.jpg")
    text = "id,images,title\n1,photos/1.jpg,red dress\n"
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(text.encode()))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("styles.csv", text)
    names = ["a.csv.gz", "a.zip"]
    if importlib.util.find_spec("pandas") and importlib.util.find_spec("openpyxl"):
        import pandas

        pandas.DataFrame([{"id": "1", "images": "photos/1.jpg", "title": "red dress"}]).to_excel(tmp_path / "a.xlsx")
        names.append("a.xlsx")
    for name in names:
        items, faults = read(tmp_path, name)
        assert [(item["id"], item["title"]) for item in items] == [("1", "red dress")] and not faults
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        archive.writestr("images/1.jpg", "x")
    with pytest.raises(InputError, match="a zip of 2 files; unpack it, and name the file of products"):
        read(tmp_path, "a.zip")


NO_VALUES = ["nan", "NULL", " None ", *r"#N/A n/a NA <NA> \N (null) - — #REF! NaT -1.#IND undefined N.A.".split()]


def test_cells_that_stand_for_none(tmp_path, capsys):
    photo(tmp_path / "1.jpg")
    lines = [f"{i},1.jpg,red {i},{cell}" for i, cell in enumerate([*NO_VALUES, "Nan bread", "navy"])]
    lines = ["id,images,title,description", *lines, "nan,1.jpg,Nan None,bread"]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    items, faults = read(tmp_path, "a.csv")
    assert [item["description"] for item in items] == [""] * len(NO_VALUES) + ["Nan bread", "navy"]
    assert faults == [f"row {len(lines) - 1}: id: {EMPTY}"]
    assert f"{len(NO_VALUES) + 1} cells such as 'nan' or 'NULL' count as empty" in capsys.readouterr().out
    rows = [{"id": i, "images": "1.jpg", "title": "red", "description": cell} for i, cell in enumerate(("NaN", None))]
    write_json(tmp_path / "a.json", rows)
    items, faults = read(tmp_path, "a.json")
    assert [item["description"] for item in items] == ["", ""] and not faults


def test_ids_that_a_spreadsheet_has_shortened(tmp_path):
    photo(tmp_path / "1.jpg")
    numbers = ["2.00E+12", "2,00E+12", "2E+12", "1.2345678e+16"]
    text = "".join(f'"{number}",1.jpg,red\n' for number in numbers)
    found, faults = read_shop(tmp_path, f"id,images,title\n{text}2E12,1.jpg,blue\n")
    assert found == {"2E12": ("blue", ["1.jpg"])}  # without the plus it is a plain number of an article
    cure = "was shortened by a spreadsheet; export this column as text"
    assert faults == [f"row {i}: id {number} {cure}" for i, number in enumerate(numbers, 1)]


def test_names_that_differ_in_case_alone_are_one_class(tmp_path, capsys):
    names = ["dress", "Dress", "Dress", "DRESS", "Shoes", "shoes", "", "Hat"]
    for i in range(8):
        photo(tmp_path / f"{i}.jpg", 30 * i)
    lines = [f"{i},{i}.jpg,red no,{name}" for i, name in enumerate(names)]
    (tmp_path / "shop.csv").write_text("\n".join(["id,images,title,category", *lines]))
    split_of(tmp_path)
    items = [item for part in infos(tmp_path / "out").values() for item in part]
    labels = read_json(tmp_path / "out" / "labels.json")["categories"]
    found = [item.get("category_id") for item in sorted(items, key=lambda item: item["id"])]
    assert labels == ["Dress", "Hat", "Shoes"] and found == [0, 0, 0, 0, 2, 2, None, 1]  # a tie: the first in order
    line = "category: 3 names differ from others in case alone and join them, such as 'DRESS' = 'Dress'"
    assert line in capsys.readouterr().out


def test_rows_that_stay_out_with_a_true_reason(tmp_path, capsys):
    photo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes(b"\0\0\0\x1cftypheic\0\0\0\0mif1")
    (tmp_path / "c.svg").write_text('<?xml version="1.0"?><svg width="9"/>')
    lines = ["x/a.jpg,red,success", "y/a.jpg,blue,success", "b.jpg,hat,success", "c.svg,hat,"]
    lines.append("d.jpg,hat,failed_to_resize")
    text = "images,title,status\n" + "".join(f"https://s.t/{line}\n" for line in lines)
    found, faults = read_shop(tmp_path, text, photos=str(tmp_path))
    assert found == {"1": ("red", ["a.jpg"])} and len(faults) == 3
    for fault, part in zip(faults, ("stands for two addresses, '/x/a.jpg' and '/y/a.jpg'", "HEIC", "SVG"), strict=True):
        assert part in fault
    assert "1 rows whose download failed" in capsys.readouterr().out
    _, faults = read_shop(tmp_path, f'{{"images": "a.jpg", "title": {BY_LANGUAGE}}}', "a.json")
    assert faults == ["row 1: title: found texts by language (de_DE, en_GB); set --language=de"]


@pytest.mark.parametrize(
    "cell, fault",
    [
        ("https://a.b/1.jpg", "'https://a.b/1.jpg' is an address; download first, and write the name of the ***"),
        ("//a.b/1.jpg", "'//a.b/1.jpg' is an address; download first, ***"),
        ("data:image/jpeg", "'data:image/jpeg' is an address; download first, ***"),
        ('"[""a.jpg"", ""https://a.b/1.jpg""]"', "'https://a.b/1.jpg' is an address; download first, ***"),
        (r"C:\photos\a.jpg", r"'C:\\photos\\a.jpg' is a path of another computer; write it as seen from ***"),
        ("a.jpg|a.jpg", "no file '***/a.jpg|a.jpg'; between several images stands --separator (';')"),
        ("[a.jpg]", "found '[a.jpg]', expected a list of file names"),
        ('"[{""alt"": ""a.jpg""}]"', "found [{'alt': 'a.jpg'}], expected file names"),
    ],
)
def test_images_of_a_row_that_cannot_be_used(tmp_path, cell, fault):
    photo(tmp_path / "a.jpg")
    found, faults = read_shop(tmp_path, f"images,title\na.jpg,hat\n{cell},hat\n")
    assert len(found) == 1 and len(faults) == 1
    assert matches(f"row 2: images: {fault}", faults[0]), faults


QUOTE = 'double each quote (") inside a cell, and close each cell that begins with one'
UTF8 = "save it as UTF-8 text (in Excel: CSV UTF-8)"
NOT_JSON = "expected UTF-8, a .csv or one JSON object a line"
NO_IMAGES = "found id, title; set --images=COLUMN or --images='images/{COLUMN}.jpg'"


@pytest.mark.parametrize(
    "text, message, settings",
    [
        # an opening quote that is closed nowhere, in the middle, and by the stray quote of a later row
        ('images,title\na.jpg,hat\na.jpg,"red\n', f"the row of line 3: unexpected end of data; {QUOTE}", {}),
        ('sep=;\nimages;title\na.jpg;"5\\" heel"\n', f"the row of line 3: ';' expected after '\"'; {QUOTE}", {}),
        ('images,title\na.jpg,"red\na.jpg,5"\n', f"the row of line 2: a cell holds other rows; {QUOTE}", {}),
        # other kinds of files
        (b"images,title\na.jpg,caf\xe9\n", rf"line 2: b'\xe9' is no UTF-8; {UTF8}", {}),
        ("i\0m\0", f"found a zero character, which no text has; {UTF8}", {}),
        ("<!DOCTYPE html>", "a web page, not the file itself; download it again, perhaps by hand in a browser", {}),
        (b"SQLite format 3\0", "an SQLite database; export its table as CSV", {"name": "a.db"}),
        (gzip.compress(bytes(257) + b"ustar"), "a tar archive; unpack it first", {"name": "a.tgz"}),
        ("\n \n", "the file is empty, expected products", {}),
        ("images,title\n", "found no product, expected products", {}),
        ("{}", "the file is empty, expected products", {"name": "a.json"}),
        ("[1]", "found a line that is no object, expected products", {"name": "a.json"}),
        ('{"a": 1}\n{"a": \n', f"line 2: ***; {NOT_JSON}", {"name": "a.jsonl"}),
        # columns
        ("images,title,title\na.jpg,x,y\n", "found 2 columns 'title', expected one; rename the others", {}),
        ("id,images,name\n1,a,b\n", "no column 'title', found id, images, name; set --title=COLUMN", {}),
        ("images,title\na.jpg,hat\n", "no column 'kind', ***", {"category": "kind"}),
        ("id,title\n1,hat\n", f"no column 'images', {NO_IMAGES}", {}),
        ("id,title\n1,hat\n", f"no column 'number', {NO_IMAGES}", {"images": "photos/{number}.jpg"}),
        # columns of another spelling
        ("ID,title,images\n", "no column 'id', but 'ID'; set --id='ID'", {}),
        (
            "title,images,Description\n",
            "no column 'description', but 'Description'; set --description='Description'",
            {},
        ),
        ("title,images,KIND\n", "no column 'kind', but 'KIND'; set --category='KIND'", {"category": "kind"}),
        ("ID,title\n", "no column 'id', but 'ID'; set --images='a/{ID}.jpg'", {"images": "a/{id}.jpg", "id": "ID"}),
        ('{" id": 1, "title": 1, "images": 1}', "no column 'id', but ' id'; set --id=' id'", {"name": "a.jsonl"}),
    ],
)
def test_files_that_are_refused_in_one_line(tmp_path, text, message, settings):
    settings = {"name": "a.csv", **settings}
    path = tmp_path / settings["name"]
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as error:
        read(tmp_path, **settings)
    assert matches(f"{path}: {message}", str(error.value)), error.value


# ---------------------------------------------------------------------------------------------------------------------
# parquet


KAGL = {"id": "item_ID", "images": "image", "title": "text", "category": "category2", "subcategory": "category3"}


def photo_bytes(shade, size=(30, 40), kind="JPEG"):
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 90, 200 - shade)).save(file, kind)
    return file.getvalue()


def kagl_image(i):
    return {"bytes": photo_bytes(5 * i), "path": f"{i}.jpg"}


def make_kagl(folder, n=24, n_files=3, image=kagl_image, row_group_size=5):
    """Parquet files in the schema of Marqo/KAGL, several to a folder data/ as the hub has them; returns all rows."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    cells = [{"text": f"{'Red' if i % 3 else 'Navy'} cotton shirt {i}", "item_ID": str(i + 1000)} for i in range(n)]
    more = {"category1": "Apparel", "category2": "Topwear", "usage": None}
    rows = [{"image": image(i), **more, "category3": f"Kind{i % 2}", **row} for i, row in enumerate(cells)]
    (folder / "data").mkdir(parents=True)
    for i in range(n_files):
        table = arrow.Table.from_pylist(rows[i * n // n_files : (i + 1) * n // n_files])
        path = folder / "data" / f"train-{i:05}-of-{n_files:05}.parquet"
        parquet.write_table(table, path, row_group_size=row_group_size)
    return rows


def test_parquet_files_of_a_folder(tmp_path, run_catalogue):
    rows = make_kagl(tmp_path / "raw")
    flags = [f"--{key}={value}" for key, value in KAGL.items()]
    run_catalogue(f"--products={tmp_path}/raw", f"--out={tmp_path}/kagl", "--link", *flags)
    root, found = tmp_path / "kagl", {}
    labels = read_json(root / "labels.json")
    assert {split: len(items) for split, items in infos(root).items()} == {"train": 22, "val": 2}
    for split, items in infos(root).items():
        for item in items:
            (name,) = item["images"]
            content = (root / "FashionGen" / split / name).read_bytes()
            found[item["id"]] = item["title"], content, labels["subcategories"][item["subcategory_id"]]
    assert found == {row["item_ID"]: (row["text"], row["image"]["bytes"], row["category3"]) for row in rows}
    assert labels["categories"] == ["Topwear"] and "navy" in labels["attributes"]
    assert not check_data.check(root)[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kagl", "raw"]  # no photos are left beside them


def test_photos_of_the_size_that_training_needs(tmp_path, run_catalogue):
    make_kagl(tmp_path / "raw", 3, 1, lambda i: {"bytes": photo_bytes(100, [(300, 400), (900, 90), (73, 400)][i])})
    items, faults = read(tmp_path, "raw", image_size=64, **KAGL)  # 64 x 256 / 224 = 73.1 pixels are cropped to 64
    assert not faults
    assert [Image.open(item["images"][0]).size for item in items] == [(73, 97), (730, 73), (73, 400)]
    assert np.asarray(Image.open(items[0]["images"][0]))[40, 40].tolist() == pytest.approx([100, 90, 100], abs=3)
    assert len(files_under(tmp_path / "temporary")) == 3  # the large ones are gone
    assert items[2]["images"][0].read_bytes() == photo_bytes(100, (73, 400))  # small enough, so as it came
    for name, size, colour in (("a", (200, 100), "red"), ("b", (200, 100), "green"), ("c", (37, 40), "blue")):
        Image.new("RGB", size, colour).save(tmp_path / f"{name}.png")
    (tmp_path / "shop.csv").write_text("images,title\na.png;b.png,red\na.png,red x\nc.png,red\n")
    items, _ = read(tmp_path, "shop.csv", image_size=32)
    assert [Image.open(path).size for item in items[:2] for path in item["images"]] == [(74, 37)] * 3
    assert items[1]["images"] == items[0]["images"][:1]
    flags = [f"--products={tmp_path}/shop.csv", "--image_size=32", "--link", "--max_share=1"]
    run_catalogue(f"--out={tmp_path}/out", *flags)
    written = [path for path in (tmp_path / "out").rglob("*.*") if path.suffix != ".json"]
    found = {(Image.open(path).size, path.is_symlink()) for path in written}
    assert found == {((37, 40), True), ((74, 37), False)}
    assert Image.open(tmp_path / "a.png").size == (200, 100)


@pytest.mark.parametrize(
    "image, expected",
    [
        ({"bytes": photo_bytes(1, kind="PNG"), "path": None}, "data_0000000_0.jpg"),
        ({"bytes": photo_bytes(1), "path": "x/a.PNG"}, "data_0000000_0.PNG"),
        ({"bytes": photo_bytes(1), "path": "http://a/b.jpg?x=1"}, "data_0000000_0.jpg"),
        ([photo_bytes(1), photo_bytes(2)], "data_0000000_0.jpg data_0000000_1.jpg"),
        ({"bytes": None, "path": "a.jpg"}, "a.jpg"),
        ("a.jpg", "a.jpg"),
        ({"bytes": b"no photo", "path": "a.jpg"}, "row 1: image cannot be read: cannot identify image file"),
        ({"bytes": None, "path": None}, f"row 1: images: {EMPTY}"),
        (5, "row 1: images: found [5], expected file names"),
    ],
)
def test_what_an_image_cell_of_parquet_holds(tmp_path, image, expected):
    make_kagl(tmp_path / "raw", 1, 1, lambda i: image)
    (tmp_path / "raw" / "data" / "train-00000-of-00001.parquet").rename(tmp_path / "data.parquet")
    photo(tmp_path / "a.jpg")
    items, faults = read(tmp_path, "data.parquet", **KAGL)
    names = " ".join(path.name for item in items for path in item["images"])
    assert names == expected or faults[0].startswith(expected) and not names


def test_parquet_files_that_are_refused_in_one_line(tmp_path, monkeypatch):
    make_kagl(tmp_path / "raw")
    data = tmp_path / "raw" / "data"
    first, _, last = sorted(data.iterdir())

    def refused(message, **settings):
        with pytest.raises(InputError) as error:
            read(tmp_path, "raw", **{**KAGL, **settings})
        assert matches(message, str(error.value)), error.value

    columns = "image, category1, category2, usage, category3, text, item_ID"
    refused(f"{first}: no column 'name', found {columns}; set --title=COLUMN", title="name")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(parquet.read_table(last).drop_columns("usage"), data / "z.parquet")
    refused(f"{data}/z.parquet: column 'usage' stands in it or in {first}, expected in both or none")
    (data / "z.parquet").unlink()
    content = last.read_bytes()
    last.unlink()
    refused(f"{data}/train-*-of-00003.parquet: found 2 files, expected 3; download the others")
    for broken in (content[:-50], content[:4] + bytes(400) + content[404:]):  # without its end; rows of zeros
        last.write_bytes(broken)
        refused(f"{last}: cannot be read as parquet (***); fetch the file again")
    last.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(f"{last}: a git-lfs pointer, not the file itself; run `git lfs pull` where it came from")
    with pytest.raises(InputError, match="csv: no file there, expected parquet files; or name one file"):
        read(tmp_path, "raw/*.csv", **KAGL)
    items, faults = read(tmp_path, "raw/data/train-00000-*.parquet", **KAGL)  # a pattern may leave files out
    assert len(items) == 8 and not faults
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(f"{first}: a parquet file needs the package pyarrow; pip install pyarrow")


def test_photos_of_shards(tmp_path):
    """img2dataset numbers photos anew in each shard where it is asked to, beside 00000.parquet in 00000/."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for shard in ("00000", "00001"):
        photo(tmp_path / "raw" / shard / "7.jpg")
        row = {"id": shard, "key": "7", "title": "hat", "status": "success"}
        rows = [row, {**row, "id": "x", "key": "8", "status": "failed_to_download"}]
        parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "raw" / f"{shard}.parquet")
    items, faults = read(tmp_path, "raw", images="{key}.jpg")
    assert [item["images"] for item in items] == [[tmp_path / "raw" / s / "7.jpg"] for s in ("00000", "00001")]
    assert not faults


def test_memory_does_not_grow_with_a_parquet_file(tmp_path):
    """The file has 40 MB in groups of 4 MB, and memory holds little more than one group."""
    arrow = pytest.importorskip("pyarrow")
    content, rng = photo_bytes(1), np.random.default_rng(0)  # what follows a photo's end is not read
    make_kagl(tmp_path / "raw", 400, 1, lambda i: {"bytes": content + rng.bytes(100_000)}, row_group_size=40)
    before = arrow.default_memory_pool()
    pool = arrow.proxy_memory_pool(before)
    arrow.set_memory_pool(pool)
    try:
        items, faults = read(tmp_path, "raw", **KAGL)
    finally:
        arrow.set_memory_pool(before)
    assert len(items) == 400 and not faults
    assert 1e6 < pool.max_memory() < 20e6


def test_a_catalogue_is_prepared_without_torch():
    """To import torch takes some 700 MB, which is more than the rest of the program needs for 50,000 products."""
    program = "import sys; from prepare import catalogue; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1]).returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# what stays on one side of the split


def make_catalogue(folder, rows):
    """shop.csv of rows (title, description, numbers of photos)."""
    for number in {number for _, _, numbers in rows for number in numbers}:
        photo(folder / f"{number}.png", number % 256)
    lines = [f"{i},{t},{d},{';'.join(f'{n}.png' for n in numbers)}\n" for i, (t, d, numbers) in enumerate(rows)]
    (folder / "shop.csv").write_text("id,title,description,images\n" + "".join(lines))


def test_products_of_one_photo_stay_on_one_side(tmp_path, capsys):
    # 0, 1 and 2 hang together by way of 1, and 3 by a copy of photo 0; three sizes of each further one
    photos = [[0], [0, 1], [1], [256], *([n] for n in range(2, 14) for _ in range(3))]
    make_catalogue(tmp_path, [("red dress", "", part) for part in photos])
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "256.png").read_bytes()
    for seed in range(8):
        side = split_of(tmp_path, seed=seed)
        assert len({side[str(i)] for i in range(4)}) == 1
        assert all(len({side[str(i + k)] for k in range(3)}) == 1 for i in range(4, 40, 3))
        assert 3 <= list(side.values()).count("val") <= 4
    assert "40 products, 13 groups that share no photo" in capsys.readouterr().out


def test_val_where_no_group_fits(tmp_path):
    make_catalogue(tmp_path, [("red dress", "", [n]) for n in (0, 0, 0, 1, 1, 2, 2, 2)])
    side = split_of(tmp_path)  # val_share asks for one product, the smallest group holds two
    assert [i for i, split in side.items() if split == "val"] == ["3", "4"]
    make_catalogue(tmp_path, [("red dress", "", part) for part in ([0], [0, 1], [1])])
    with pytest.raises(InputError, match="all products share photos"):
        split_of(tmp_path, val_share=0.4)


def test_a_photo_of_many_products_is_a_photo_of_none(tmp_path, capsys):
    """Photo 250 is a size chart of 30 products; the last two have no other. Photo 5 is that of twelve sizes."""
    rows = [(f"dress {i}", "", [20 + i, 250]) for i in range(28)] + [(f"hat {i}", "", [250]) for i in range(2)]
    rows += [("red belt", f"size {i}", [5]) for i in range(12)]
    make_catalogue(tmp_path, rows)
    side = split_of(tmp_path)
    printed = capsys.readouterr().out
    assert len(side) == 40 and list(side.values()).count("val") == 4
    assert "the photo 250.png of id 0 stands in 30 products" in printed and "--keep_shared keeps" in printed
    assert "2 products have no other photo and are left out, such as id 28" in printed
    assert "12 products stand in groups larger than val shall be" in printed
    side = split_of(tmp_path, keep_shared=True, val_share=0.2)
    assert len(side) == 42 and "val has 12 products and 8 were asked for" in capsys.readouterr().out


def test_products_of_one_text_stay_on_one_side(tmp_path, capsys):
    make_catalogue(tmp_path, [(f"coat {i // 4}", "wool", [i]) for i in range(80)])
    side = split_of(tmp_path)
    assert all(len({side[str(4 * i + k)] for k in range(4)}) == 1 for i in range(20))
    assert list(side.values()).count("val") == 8
    assert "80 of 80 products share their text with others, in 20 texts" in capsys.readouterr().out
    root = tmp_path / "out"
    for split, items in infos(root).items():
        write_json(root / "FashionGen" / f"{split}_info.json", [*items[:-1], {**items[-1], "title": "ละมุน"}])
    (root / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\ncoat\nwool\n.\n" + "".join(f"{i}\n" for i in range(20)))
    report = check_data.check(root)[0]
    assert "FashionGen val: 7 of 8 products share their text with others of it" in report
    assert "FashionGen val: 1 of 8 products have a text that stands in train, too" in report
    assert f"FashionGen val: 3.2% of the word pieces are unknown to {root}/vocab.txt" in report


# ---------------------------------------------------------------------------------------------------------------------
# the program and its folders


def test_command_line_errors(tmp_path, monkeypatch):
    done = subprocess.run([sys.executable, "-m", "prepare.catalogue"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    cases = [
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
    with pytest.raises(KeyError), layout.written_aside(tmp_path / "out") as aside:
        (aside / "half").write_text("x")
        raise KeyError
    with pytest.raises(InputError, match="out: the disk is full"), layout.written_aside(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "volume" / "lost+found").mkdir(parents=True)
    for name in ("out", "volume"):
        with layout.written_aside(tmp_path / name) as aside:
            (aside / "whole").write_text("x")
            assert aside.parent == tmp_path / name  # nothing can be written beside a mount
    assert files_under(tmp_path) == ["out/whole", "volume/whole"]
    with pytest.raises(InputError, match="is there already"), layout.written_aside(tmp_path / "out"):
        pass


def test_relabel_a_root(catalogue, tmp_path):
    before = {name: (catalogue / name).read_bytes() for name in files_under(catalogue)}
    out = tmp_path / "out"
    flags = [f"--root={catalogue}", f"--out={out}", "--link", "--min_count=3"]
    subprocess.run([sys.executable, "-m", "prepare.catalogue", *flags], check=True, capture_output=True)
    after = {name: (catalogue / name).read_bytes() for name in files_under(catalogue)}
    assert before == after  # links are not followed
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
    with pytest.raises(InputError, match="entry 0: key 'title'"):
        products.label(tmp_path, tmp_path, config(min_count=1))
    assert before == {name: (tmp_path / name).read_bytes() for name in files_under(tmp_path)}


def test_photos_of_the_evaluation_that_pre_training_reads_from_another_set(catalogue, tmp_path):
    root = shutil.copytree(catalogue, tmp_path / "root")
    val = read_json(root / "FashionGen" / "val_info.json")
    train = read_json(root / "BigFACAD" / "train_info.json")
    photos = [root / "FashionGen" / "val" / name for item in val for name in item["images"]][:8]
    copies = [root / "BigFACAD" / "images" / f"copy{i}.jpg" for i in range(8)]
    for source, copy in zip(photos, copies, strict=True):
        shutil.copyfile(source, copy)
    train[0]["images"] += [copy.name for copy in copies]
    write_json(root / "BigFACAD" / "train_info.json", train)
    item = read_json(root / "PolyvoreOutfits" / "ocir_disjoint_test.json")[0]["blank"]
    items = read_json(root / "PolyvoreOutfits" / "train_info.json")
    more = {**items[0], "id": "one more", "images": f"{item}.jpg"}
    write_json(root / "PolyvoreOutfits" / "train_info.json", [*items, more])
    blank = root / "PolyvoreOutfits" / "images" / f"{item}.jpg"

    def found(root):
        report, faults = check_data.check(root)
        assert not faults
        # the demo's nondisjoint outfits share items, as the published ones do
        lines = [line for line in report if not line.startswith("PolyvoreOutfits nondisjoint")]
        return [line for line in lines if "which pre-training reads" in line]

    reads = "train_info.json, which pre-training reads, such as"
    assert found(root) == [
        f"FashionGen: 8 images of val stand in BigFACAD/{reads} {photos[0]} = {copies[0]}",
        f"PolyvoreOutfits disjoint: 1 images of val stand in PolyvoreOutfits/{reads} {blank}",
    ]
    assert found(catalogue) == []
