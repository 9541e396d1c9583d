"""search.py on a small made-up catalogue: four kinds of query, the index, reranking, the sheet, one-line errors."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image

import data
import search
from model import SIZES, CSANet, FashionViL, ModelConfig
from plumbing import annotations, checkpoint, photos, weights
from plumbing.settings import InputError


def save(path, model, task, tokenizer=None, **config):
    """A checkpoint as pretrain.py and finetune.py write it, of random weights."""
    state = {"model": model.state_dict(), "config": {"image_size": 64, **config}, "step": 1}
    checkpoint.save(path, checkpoint.contents(model, task, {}, tokenizer) | state)
    return str(path)


@pytest.fixture(scope="module")
def files(catalogue, tmp_path_factory):
    """Checkpoints "C" (FashionViL) and "O" (CSA-Net) of random weights."""
    out, tokenizer = tmp_path_factory.mktemp("checkpoints"), weights.read_tokenizer(catalogue / "vocab.txt")
    torch.manual_seed(0)
    sizes = {**SIZES["tiny"], "vocab_size": tokenizer.get_vocab_size()}
    config = ModelConfig(resnet="resnet18", width=8, n_codes=4, n_attributes=4, **sizes)
    n = len(annotations.load_polyvore_items(catalogue / "PolyvoreOutfits")[1])
    return {
        "C": save(out / "c.pt", FashionViL(config), "pretrain", tokenizer),
        "O": save(out / "o.pt", CSANet(config, n), "polyvore", data_root=str(catalogue)),
    }


@pytest.fixture
def gallery(catalogue, tmp_path):
    """Twelve images without any annotation, one of them in a folder below."""
    folder = tmp_path / "my photos"
    (folder / "below").mkdir(parents=True)
    for i, path in enumerate(sorted((catalogue / "FashionGen" / "val").glob("*.jpg"))[:12]):
        (folder / ("below" if not i else "") / path.name).write_bytes(path.read_bytes())
    (folder / "notes.txt").write_text("no image")
    (folder / "._hidden.jpg").write_text("no image either")
    return folder


def rows(checkpoint, gallery, *words):
    words = ["--checkpoint", checkpoint, "--gallery", str(gallery), "--workers=0", *words]
    return search.search(search.read_config(words))


WHOLE = data.crop_then_resize


def by_hand(path, fit=data.resize_then_crop):
    image = data.to_pixels(photos.open_image(path), fit, 64)
    return data.normalize(data.stack_images([image]))


def check_ranking(found, expected):
    assert [r["rank"] for r in found] == list(range(1, len(found) + 1))
    assert [r["score"] for r in found] == sorted((r["score"] for r in found), reverse=True)
    assert {r["path"]: r["score"] for r in found} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["text", "image", "composed"])
def test_scores_are_the_cosines_of_the_model(kind, files, gallery):
    model, info = checkpoint.load_model(files["C"])
    (photo,) = (gallery / "below").iterdir()
    words = data.text_batch(tokenizers.Tokenizer.from_str(info["tokenizer"]), ["a red dress"])
    text, image = ["--text=a red dress"], ["--image", str(photo)]
    with torch.no_grad():
        paths = [path for path in gallery.rglob("*.jpg") if not path.name.startswith(".")]
        vectors = {path: model.encode_image(by_hand(path)) for path in paths}
        query, line = {
            "text": (model.encode_text(**words), text),
            "image": (vectors[photo], image),
            "composed": (model.encode_composed(**words, image=by_hand(photo)), [*text, *image]),
        }[kind]
    if kind != "text":
        del vectors[photo]  # the query itself is no result
    expected = {str(path): torch.cosine_similarity(query, vector).item() for path, vector in vectors.items()}
    check_ranking(rows(files["C"], gallery, *line, "--top=99"), expected)
    assert len(rows(files["C"], gallery, *line, "--top=3")) == 3


def test_a_tilde_is_the_home_folder(gallery, monkeypatch):
    monkeypatch.setenv("HOME", str(gallery))
    config = search.read_config(["--gallery=~/below", "--text=~5 cm", "--outfit", "~/a.jpg", "~/b.jpg=hats"])
    assert config.outfit == {f"{gallery}/a.jpg": "", f"{gallery}/b.jpg": "hats"} and config.text == "~5 cm"
    assert config.gallery == f"{gallery}/below"


def test_outfit_ranks_the_wanted_category(files, catalogue, tmp_path):
    folder, model = catalogue / "PolyvoreOutfits", checkpoint.load_model(files["O"])[0]
    metadata, number = annotations.load_polyvore_items(folder)
    question = json.loads((folder / "ocir_disjoint_test.json").read_text())[0]["question"]
    outfit = [folder / "images" / f"{item}.jpg" for item in question]
    category = {item: number[int(row["category_id"])] for item, row in metadata.items()}
    name = metadata[outfit[0].stem]["semantic_category"]
    wanted = category[outfit[0].stem]
    with torch.no_grad():
        encoded = torch.cat([model.encode_item(by_hand(p, WHOLE)) for p in outfit])
        numbers = torch.tensor([category[p.stem] for p in outfit]), torch.full((len(outfit),), wanted)
        query = model.fuse(encoded, *numbers).mean(0, keepdim=True) / model.logit_scale
        expected = {}
        for path in (folder / "images").glob("*.jpg"):
            if category[path.stem] == wanted and path not in outfit:
                item = torch.nn.functional.normalize(model.encode_item(by_hand(path, WHOLE)))
                expected[str(path)] = float((query * item).sum())
    index = f"--index={tmp_path / 'index'}"
    line = [index, "--top=9999", "--category", f"{name.upper()}s", "--outfit"]  # plural and case do not matter
    found = rows(files["O"], folder / "images", *line, *map(str, outfit))
    check_ranking(found, expected)
    assert found[0]["title"] == metadata[found[0]["id"]]["title"]
    # the same photos from elsewhere, with their categories said; a file name may hold a "="
    copies = [tmp_path / f"a={i}.jpg" for i in range(len(outfit))]
    for copy, path in zip(copies, outfit, strict=True):
        copy.write_bytes(path.read_bytes())
    said = [f"{c}={metadata[p.stem]['category_id']}" for c, p in zip(copies, outfit, strict=True)]
    again = rows(files["O"], folder / "images", *line, *said)
    assert {r["path"]: r["score"] for r in again}.items() >= {r["path"]: r["score"] for r in found}.items()
    with pytest.raises(InputError, match="say what it is"):
        rows(files["O"], folder / "images", *line, str(copies[0]))
    with pytest.raises(InputError, match=f"found 'umbrella', expected one of .*{name}"):
        rows(files["O"], folder / "images", index, "--category=umbrella", "--outfit", str(outfit[0]))


@pytest.mark.parametrize("linked", ["photos", "images/", "data set", "gallery", "photos of the gallery"])
def test_links_do_not_hide_what_a_photo_is(linked, files, catalogue, tmp_path):
    """A photo of Polyvore keeps its category, its title and its identity through links of every kind."""
    real, folder, elsewhere = catalogue / "PolyvoreOutfits", tmp_path / "PolyvoreOutfits", tmp_path / "elsewhere"
    metadata = json.loads((real / annotations.POLYVORE_ITEMS).read_text())
    some = sorted(path.name for path in (real / "images").glob("*.jpg"))[:40]
    folder.mkdir()
    shutil.copy(real / annotations.POLYVORE_ITEMS, folder)
    copy = os.symlink if linked == "photos" else shutil.copy
    photo_folder = elsewhere if linked == "images/" else folder / "images"
    photo_folder.mkdir()
    for name in some:
        copy(real / "images" / name, photo_folder / name)
    copy(real / "images" / some[0], photo_folder / "unlisted.jpg")
    gallery = folder / "images"
    if linked == "images/":
        gallery.symlink_to(elsewhere)
    elif linked == "data set":
        gallery = Path(shutil.move(folder, tmp_path / "other name"), "images")
        folder.symlink_to(gallery.parent)
    elif linked == "gallery":
        gallery = tmp_path / "a link"
        gallery.symlink_to(folder / "images")
    elif linked == "photos of the gallery":
        gallery = tmp_path / "chosen"
        gallery.mkdir()
        for name in some:
            (gallery / name).symlink_to(folder / "images" / name)
        (gallery / "mine.jpg").symlink_to(min((catalogue / "FashionGen" / "val").iterdir()))
    wanted = metadata[Path(some[0]).stem]["category_id"]
    options = [f"--category={wanted}", "--top=99", f"--data_root={tmp_path}"]
    for query in (gallery / some[0], folder / "images" / some[0]):
        found = rows(files["O"], gallery, "--outfit", str(query), *options)
        right = {Path(name).stem for name in some[1:] if metadata[Path(name).stem]["category_id"] == wanted}
        right |= {path.stem for path in gallery.glob("mine.jpg")}  # nobody knows its category
        assert {Path(r["path"]).stem for r in found} == right != set()
        if linked != "photos of the gallery":
            assert all((r["id"], r["title"]) == (Path(r["path"]).stem, metadata[r["id"]]["title"]) for r in found)


def test_a_coarse_category_asks_each_image_as_its_own(files, catalogue, tmp_path):
    """Polyvore's coarse names stand for several fine categories."""
    folder = tmp_path / "PolyvoreOutfits"
    (folder / "images").mkdir(parents=True)
    listed, _ = annotations.load_polyvore_items(catalogue / "PolyvoreOutfits")
    metadata = {item: {**row, "semantic_category": "anything"} for item, row in listed.items()}
    (folder / annotations.POLYVORE_ITEMS).write_text(json.dumps(metadata))
    some = list({row["category_id"]: item for item, row in metadata.items()}.values())[:4]
    for item in some:
        shutil.copy(catalogue / "PolyvoreOutfits" / "images" / f"{item}.jpg", folder / "images")
    outfit = str(folder / "images" / f"{some[0]}.jpg")
    coarse = rows(files["O"], folder / "images", "--category=anything", "--outfit", outfit)
    assert {r["id"] for r in coarse} == set(some[1:])
    for r in coarse:
        fine = rows(files["O"], folder / "images", "--category", metadata[r["id"]]["category_id"], "--outfit", outfit)
        assert [(f["id"], f["score"]) for f in fine] == [(r["id"], pytest.approx(r["score"], abs=1e-6))]


def test_index_is_reused_and_remade(files, gallery, capsys):
    def said(file=files["C"]):
        """What a search says, which finds another index than it needs. A second one finds the index of the first."""
        rows(file, gallery, "--text=red")
        first = capsys.readouterr().err
        rows(file, gallery, "--text=red")
        assert capsys.readouterr().err == ""
        return first

    index, new = Path(f"{gallery}.index.pt"), gallery / "new.png"
    assert "embedding 12 images; 0 cannot be read" in said()
    new.write_bytes(next((gallery / "below").iterdir()).read_bytes())
    assert "embedding 13 images" in said()
    new.unlink()
    assert "embedding 12 images" in said()
    os.utime(next(gallery.glob("*.jpg")), ns=(1, 1))
    assert "embedding" in said()
    model, info = checkpoint.load_model(files["C"])
    torch.nn.init.normal_(model.bert.embeddings.projection.weight)
    other = save(gallery.parent / "other.pt", model, "pretrain", tokenizers.Tokenizer.from_str(info["tokenizer"]))
    assert "embedding" in said(other) and "embedding" in said()
    for content in (b"", b"{", index.read_bytes()[:2000]):
        index.write_bytes(content)
        assert "embedding 12 images" in said()
    assert torch.load(index, weights_only=True)["vectors"].shape == (12, 64)
    assert [p.name for p in gallery.parent.iterdir() if "index" in p.name] == ["my photos.index.pt"]


def test_index_elsewhere(files, gallery, tmp_path):
    rows(files["C"], gallery, "--text=red", f"--index={tmp_path / 'kept'}")
    assert (tmp_path / "kept").exists() and not Path(f"{gallery}.index.pt").exists()
    for place in (tmp_path / "nowhere" / "index", tmp_path / "kept" / "index", tmp_path):
        with pytest.raises(InputError, match="cannot be written .*set --index=FILE"):
            rows(files["C"], gallery, "--text=red", f"--index={place}")


def test_ids_and_titles(files, catalogue, gallery, tmp_path):
    listed = {i["images"][0]: i for i in json.loads((catalogue / "FashionGen" / "val_info.json").read_text())}
    found = rows(files["C"], catalogue / "FashionGen" / "val", "--text=red", f"--index={tmp_path / 'i'}")
    for r in found:
        item = listed[Path(r["path"]).name]
        assert (r["id"], r["title"]) == (str(item["id"]), item["title"])
    # images without a data set around them have their names
    ids = {r["id"]: r["title"] for r in rows(files["C"], gallery, "--text=red", "--top=99")}
    assert len(ids) == 12 and set(ids.values()) == {""}
    assert sum(name.startswith("below/") for name in ids) == 1 and not any(name.endswith(".jpg") for name in ids)


def test_rerank_is_the_itm_head_s_order(files, gallery, monkeypatch):
    monkeypatch.setattr(search, "RERANKED", 5)
    model, info = checkpoint.load_model(files["C"])
    plain = rows(files["C"], gallery, "--text=a red dress", "--top=12")
    found = rows(files["C"], gallery, "--text=a red dress", "--top=12", "--rerank")
    words = data.text_batch(tokenizers.Tokenizer.from_str(info["tokenizer"]), ["a red dress"])
    for r in found[:5]:
        with torch.no_grad():
            hidden, _ = model.encode_joint(**words, image=by_hand(r["path"]))
            logits = model.heads["itm"](model.bert.pool(hidden))
        assert r["itm"] == pytest.approx(logits.softmax(1)[0, 1].item(), abs=1e-5)
    assert [r["itm"] for r in found[:5]] == sorted((r["itm"] for r in found[:5]), reverse=True)
    assert {r["path"] for r in found[:5]} == {r["path"] for r in plain[:5]}
    assert [r["path"] for r in found[5:]] == [r["path"] for r in plain[5:]] and "itm" not in found[5]
    assert len(rows(files["C"], gallery, "--text=a red dress", "--top=2", "--rerank")) == 2


def test_equal_scores_keep_the_gallery_s_order(files, gallery, monkeypatch):
    vectors, names = np.zeros((20, 64), np.float32), [f"{i}.jpg" for i in range(20)]
    vectors[:, 0] = np.tile([0.5, -0.5], 10)
    monkeypatch.setattr(search, "embed_gallery", lambda *_: (vectors, names))
    ids = [int(row["id"]) for row in rows(files["C"], gallery, "--text=red", "--top=99")]
    assert sorted(ids[:10]) == ids[:10] and sorted(ids[10:]) == ids[10:] and len({i % 2 for i in ids[:10]}) == 1


def test_broken_images_stop_it_or_are_left_out(files, gallery, capsys):
    (gallery / "broken.jpg").write_bytes(b"no JPEG")
    with pytest.raises(InputError, match="broken.jpg.*--missing=skip"):
        rows(files["C"], gallery, "--text=red")
    assert not Path(f"{gallery}.index.pt").exists()
    found = rows(files["C"], gallery, "--text=red", "--missing=skip", "--top=99")
    assert len(found) == 12 and "12 images; 1 cannot be read and are left out" in capsys.readouterr().err
    assert rows(files["C"], gallery, "--text=red", "--missing=skip", "--top=99") == found
    assert capsys.readouterr().err == ""


def test_command_line(files, gallery, capsys):
    """JSON alone on standard output, and a sheet of the right size with every image on it."""
    sheet = gallery.parent / "sheet.png"
    line = ["--checkpoint", files["C"], "--gallery", str(gallery), "--text", "red", "--top=7", "--workers=0"]
    search.main([*line, "--json", "--out", str(sheet)])
    found = json.loads(capsys.readouterr().out)
    assert [set(r) for r in found] == [{"rank", "score", "id", "title", "path"}] * 7
    search.main(line)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 7 and all(r["path"] in text for r, text in zip(found, printed, strict=True))
    page = np.asarray(Image.open(sheet).convert("RGB"))
    assert page.shape[1] > 5 * search.pictures.CELL and (page != 255).any(2).mean() > 0.3
    assert not sheet.with_name("sheet.png.tmp").exists()


WRONG = {
    "no query": (["C", "G"], "query: expected --text"),
    "outfit without category": (["C", "G", "--outfit", "a.jpg"], "query: expected"),
    "category without outfit": (["C", "G", "--text=a", "--category=shoes"], "query: expected"),
    "outfit and text": (["C", "G", "--text=a", "--outfit", "a.jpg", "--category=shoes"], "query: expected"),
    "rerank of an image": (["C", "G", "--image=a.jpg", "--rerank"], "rerank: the ITM head"),
    "no gallery": (["C", "", "--text=a"], "search: expected --checkpoint=FILE and --gallery=FOLDER"),
    "neither way": (["C", "G", "--text=a", "--missing=skpi"], "missing: found 'skpi', expected one of stop, skip"),
    "sheet nowhere": (["C", "G", "--text=a", "--out=/nowhere/a.png"], "No such file or directory; set --out=FILE"),
    "missing image": (["C", "G", "--image=/nowhere.jpg"], "/nowhere.jpg: no such image; expected the name"),
    "empty gallery": (["C", Path(__file__).parent, "--text=a"], "gallery: no images in '"),
    "unknown script": (["C", "G", "--text=ชุดเดรสสีแดง"], "100.0% .* are \\[UNK\\]; .* take a BERT that does"),
    "missing checkpoint": (["/nowhere.pt", "G", "--text=a"], "/nowhere.pt"),
    "text for an outfit model": (["O", "G", "--text=a"], "expected one trained for a task with contrastive"),
    "outfit for a text model": (["C", "G", "--outfit", __file__, "--category=shoe"], "with csa_net"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_one_line(case, files, gallery):
    (first, folder, *more), message = WRONG[case]
    folder = {"G": gallery}.get(folder, folder)
    with pytest.raises(InputError, match=message) as error:
        rows(files.get(first, first), folder, *more)
    assert "\n" not in str(error.value)


def test_all_kinds_of_images_and_linked_folders_are_listed(tmp_path, capsys):
    (tmp_path / "gallery" / "deep").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    names = "gallery/a.jfif gallery/b.jpe gallery/deep/c.JPG other/d.avif gallery/e.mpo gallery/f.jpg_large".split()
    for name in (*names, "gallery/notes.txt", "gallery/g.HEIC", "gallery/._c.heic", "gallery/h", "gallery/film.mpg"):
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "gallery" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(tmp_path / "gallery")  # a circle
    names = photos.list_gallery(tmp_path / "gallery")
    assert list(names) == ["a.jfif", "b.jpe", "deep/c.JPG", "e.mpo", "f.jpg_large", "link/d.avif"]
    assert "gallery: 2 files are left out for their endings, as " in capsys.readouterr().err
