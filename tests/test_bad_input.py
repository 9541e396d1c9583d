"""Bad input: each kind ends in one line that names file, entry and cure, before the first update, and leaves nothing.

And what looks odd but is fine: it trains. `***` in an expected message stands for anything."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ONE, small_finetuning, small_pretraining
from PIL import Image

import data
import evaluate
import finetune
import pretrain
import vqvae
from plumbing import annotations, checkpoint, photos, settings, weights
from plumbing.settings import InputError
from prepare import check_data

TRAIN, VAL = "FashionGen/train_info.json", "FashionGen/val_info.json"


def edit(file, entry, **changes):
    """Change keys of an entry of an annotation file (None: remove; entry None: of all); the result has `.file`."""

    def apply(root):
        rows = json.loads((root / file).read_text())
        for row in rows if entry is None else [rows[entry]]:
            row.update(changes)
            for key in [key for key, value in changes.items() if value is None]:
                del row[key]
        (root / file).write_text(json.dumps(rows))

    apply.file = file
    return apply


def put(file, content):
    """Replace a file's content; bytes, text or something for JSON. The result has `.file`."""

    def apply(root):
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        (root / file).write_bytes(text if isinstance(text, bytes) else text.encode())

    apply.file = file
    return apply


def refuse(call, message, root):
    """`call()` raises one line that is `message`, {root} and *** filled in."""
    expected = ".*".join(re.escape(part) for part in message.format(root=root).split("***"))
    with pytest.raises(InputError) as error:
        call()
    assert re.fullmatch(expected, str(error.value)), f"\n{error.value}\n{message}"


# ---- settings --------------------------------------------------------------------------------------------------------

SETTINGS = [
    (dict(batch_size=0), "batch_size: found 0, expected 1 or more"),
    (dict(batch_size=100_000), "batch_size: found 100000, but the data has only *** products"),
    (dict(eval_interval=-2), "eval_interval: found -2, expected -1 or more"),
    (dict(workers=-1), "workers: found -1, expected 0 or more"),
    (dict(seed=-1), "seed: found -1, expected 0 to 9223372036854775807"),
    (dict(lr=float("nan")), "lr: found nan, expected 0 or more"),
    (dict(dropout=1.5), "dropout: found 1.5, expected 0.0 to 1.0"),
    (dict(n_attributes=3), "*** ***: attributes id ***, expected below 3; check the label file or n_attributes"),
    (dict(milestones=("a",)), "milestones: found ('a',), expected whole numbers of updates"),
    (dict(dtype="half"), "dtype: found 'half', expected one of float32, bfloat16, float16"),
    (dict(max_tokens=2), "max_tokens: found 2, expected 3 to 512, the positions of the model"),
    (dict(max_tokens=513), "max_tokens: found 513, expected 3 to 512, the positions of the model"),
    (dict(sets=("Wear",)), "sets: found ('Wear',), expected some of FashionGen, BigFACAD, Fashion200k, *** once"),
    (dict(sets=("FashionGen",) * 2), "sets: found ('FashionGen', 'FashionGen'), expected some of ***, each once"),
    (dict(objectives={"itc": float("nan")}), "objectives: found probabilities {{'itc': nan}}, expected ***"),
    (dict(objectives={"itx": 1.0}), "objectives: found 'itx', expected some of itc, itm, mlm, mpfc, mvc, pac***"),
    (dict(objectives={"itc": 0.5}), "objectives: ***a sum of 1***"),
    (dict(objectives={"itc": 1.5, "mlm": -0.5}), "objectives: ***none below 0***"),
    (dict(image_size=100), "image_size: found 100, expected a multiple of 32***"),
    (dict(size="huge"), "size: found 'huge', expected one of base***"),
    (dict(objectives={"mpfc": 1.0}, image_tokenizer="", init="pretrained"), "image_tokenizer: MPFC needs one***"),
    (dict(resume="gone.pt"), "gone.pt: ***: No such file or directory"),
]


@pytest.mark.parametrize("changes, message", SETTINGS)
def test_settings(changes, message, catalogue, tmp_path):
    config = small_pretraining(catalogue, tmp_path / "run", **{"objectives": {"itc": 1.0}, **changes})
    refuse(lambda: pretrain.train(config, ONE), message, catalogue)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("stage", [pretrain, finetune])
def test_missing_data_are_named_before_anything_is_fetched(stage, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "read_start", None)  # it fetches BERT and the ResNet
    small = small_pretraining if stage is pretrain else functools.partial(small_finetuning, "fashioniq")
    message = "/nowhere/***: this file of the data set is missing; README***prepare.demo data/demo***"
    refuse(lambda: stage.train(small("/nowhere", tmp_path / "run", init="pretrained"), ONE), message, "")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(task="fashionik"), "task: found 'fashionik', expected one of fashiongen_retrieval***"),
        (dict(task="fashioniq", gallery="all"), "gallery: found 'all', expected one of original, val"),
        (dict(task="fashioniq", batch_size=7, grad_accum=2), "batch_size: found 7, expected a multiple of *** = 1 x 2"),
        (dict(task="fashioniq", init="gone.pt"), "gone.pt: ***: No such file or directory"),
    ],
)
def test_settings_of_fine_tuning(changes, message, catalogue, tmp_path):
    config = small_finetuning(changes["task"], catalogue, tmp_path / "run")
    for name, value in changes.items():
        setattr(config, name, value)
    refuse(lambda: finetune.train(config, ONE), message, catalogue)
    assert not os.listdir(tmp_path)


# ---- annotation files ------------------------------------------------------------------------------------------------

ENTRIES = [  # changes of entry 1 of the training file, what the message says of it
    (dict(title=None), "key 'title': found None, expected str"),
    (dict(id=True), "key 'id': found True, expected int or str"),
    (dict(images="a.jpg"), "key 'images': found 'a.jpg', expected list"),
    (dict(images=[]), "key 'images': found [], expected file names"),
    (dict(images=[["a"]]), "found ['a'], expected the name of an image"),
    (dict(images=["../../a.jpg"]), "image path '../../a.jpg' leaves the folder ***"),
    (dict(images=["/etc/hosts"]), "image path '/etc/hosts' leaves the folder ***"),
    (dict(attributes_id=[-1]), "key 'attributes_id': found -1, expected an id from 0 to 999999"),
    (dict(attributes_id=[10**12]), "key 'attributes_id': found 1000000000000, expected an id from 0 to 999999"),
    (dict(attributes_id=[0, 1.5]), "key 'attributes_id': found 1.5, expected an id from 0 to 999999"),
    (dict(subcategory_id="x"), "key 'subcategory_id': found 'x', expected an id from 0 to 999999"),
]
IQ, SPLIT = "FashionIQ/captions/cap.shirt.val.json", "FashionIQ/image_splits/split.shirt.val.json"
OCIR = "PolyvoreOutfits/ocir_disjoint_train.json"
ITEMS = "PolyvoreOutfits/polyvore_item_metadata.json"
CATEGORY, SUBCATEGORY = "fashiongen_category", "fashiongen_subcategory"
CUT = "Expecting ',' delimiter: line 1 column 10 (char 9)"
ONE_ITEM = "is the only item of the question, expected two items"
NO_SUBCATEGORY = "FashionGen val: no product has a subcategory_id, which this task needs"
FILES = [  # task ("": pre-training), what is done to the data, message; FILE is the file that was spoilt
    *(("", edit(TRAIN, 1, **changes), f"FILE: entry 1: {text}") for changes, text in ENTRIES),
    ("", edit(TRAIN, None, id=7), "FILE: entry 1: id 7 stood before; ids must be unique"),
    ("", put(TRAIN, []), "FILE: found an empty list, expected a filled list"),
    ("", put(TRAIN, {"a": 1}), "FILE: found a filled dict, expected a filled list"),
    ("", put(TRAIN, '[{"id": 1'), f"FILE: cannot be read as JSON ({CUT}); fetch the file again"),
    (SUBCATEGORY, edit(VAL, None, subcategory_id=None), NO_SUBCATEGORY),
    ("fashioniq", edit(IQ, 2, candidate=None), "FILE: entry 2: key 'candidate': found None, expected str"),
    ("fashioniq", edit(IQ, 2, captions=[1, 2]), "FILE: entry 2: key 'captions': found [1, 2], expected texts"),
    ("fashioniq", edit(IQ, 2, candidate="../a"), "FILE: entry 2: image path '../a.jpg' leaves the folder ***"),
    ("fashioniq", put(SPLIT, ["a"]), "FILE: target *** stands in no row of the gallery (*** such)"),
    ("polyvore", edit(OCIR, 0, question=[]), "FILE: entry 0: item [] is not in ***, or the question is empty"),
    ("polyvore", edit(OCIR, 0, question=["10001"], blank="10001"), f"FILE: entry 0: blank '10001' {ONE_ITEM}"),
    ("polyvore", edit(OCIR, 0, blank="lost"), "FILE: entry 0: item ['lost'] is not in polyvore_item_***"),
    ("polyvore", put(ITEMS, {"1": {"category_id": "x"}}), "FILE: item '1': category_id: found 'x', ***"),
]


@pytest.mark.parametrize("task, spoil, message", FILES)
def test_annotation_files(task, spoil, message, root, tmp_path):
    spoil(root)
    message = message.replace("FILE", "{root}/" + spoil.file)
    before = sorted(path for path in tmp_path.rglob("*"))
    if task:
        refuse(lambda: finetune.train(small_finetuning(task, root, tmp_path / "run"), ONE), message, root)
    else:
        config = small_pretraining(root, tmp_path / "run", objectives={"itc": 1.0})
        refuse(lambda: pretrain.train(config, ONE), message, root)
    assert sorted(path for path in tmp_path.rglob("*")) == before


# ---- images, found when first opened ---------------------------------------------------------------------------------


BROKEN = "{root}/***: image cannot be read: "
MISSING = "{root}/FashionGen/***: image is missing; *** images of FashionGen ***--missing=skip***"
IMAGES = [  # stage, the content of all images of a product (None: no file), the message less the product's name
    ("pretrain", None, BROKEN + "No such file or directory"),
    *[(s, b"no image", BROKEN + "cannot identify image file ***") for s in ("pretrain", "finetune", "validate")],
    # these two look for missing and empty files before they begin
    *[(stage, content, MISSING) for stage in ("finetune", "validate") for content in (None, b"")],
]


@pytest.mark.parametrize("stage, content, message", IMAGES)
def test_images(stage, content, message, root, tmp_path):
    source = "Fashion200k" if stage == "pretrain" else "FashionGen"
    if stage == "finetune":
        config = small_finetuning(CATEGORY, root, tmp_path / "run")
    else:
        changes = dict(objectives={"itc": 1.0}, max_steps=1, batch_size=4, sets=(source,))
        config = small_pretraining(root, tmp_path / "run", **changes)
    products = annotations.load_products(root, source, "val" if stage == "validate" else "train")
    first = 5 if stage == "validate" else data.BatchSampler(len(products), config, ONE).update_at(0)[1][2]
    product = products[first]
    for path in map(Path, product.images):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    train = finetune.train if stage == "finetune" else pretrain.train
    if message is MISSING:
        refuse(lambda: train(config, ONE), message, root)
        assert not (tmp_path / "run").exists()
        return
    cure = "replace the file, or leave it out by --missing=skip"
    refuse(lambda: train(config, ONE), f"{product.name}: {message}; {cure}", root)
    files = {"lock", "run.json"} | ({"last.pt", "log.jsonl"} if stage == "validate" else set())
    assert set(os.listdir(tmp_path / "run")) == files  # a run saves before the validation that failed
    named = [f"{product.name}: " in fault or f"(of {product.name})" in fault for fault in check_data.check(root)[1]]
    assert named == [True] * len(product.images)


def test_a_data_set_without_any_image_that_can_be_read(root, tmp_path):
    for path in (root / "Fashion200k" / "images").iterdir():
        path.unlink()
    changes = dict(objectives={"itc": 1.0}, sets=("Fashion200k",), batch_size=4, missing="skip")
    config = small_pretraining(root, tmp_path / "run", **changes)
    refuse(lambda: pretrain.train(config, ONE), "no image of the data set can be read", root)


# ---- what is odd, but fine -------------------------------------------------------------------------------------------


def test_odd_images_and_texts_train(root, tmp_path):
    red = Image.new("RGB", (80, 60), (200, 30, 40))
    images = {"cmyk.jpg": red.convert("CMYK"), "palette.png": red.quantize(4), "grey.png": red.convert("L")}
    images |= {"alpha.png": red.convert("RGBA"), "bits.png": red.convert("1"), "one.png": red.resize((1, 1))}
    images |= {"deep.png": Image.fromarray(np.full((60, 80), 40_000, np.uint16)), "a.jpg": red}
    texts = ["", " ", "word " * 10_000, "x" * 100_000, "\U0001f457" * 50, "\ud800 half a pair", "\0\n\t", "مرحبا 你好"]
    rows = json.loads((root / TRAIN).read_text())[:8]
    for row, (name, image), text in zip(rows, images.items(), texts, strict=True):
        image.save(root / "FashionGen" / "train" / name)
        row |= {"images": [name], "title": text, "description": ""}
    put(TRAIN, rows)(root)
    settings = dict(objectives={"itc": 0.5, "mlm": 0.25, "mvc": 0.25}, sets=("FashionGen",), batch_size=8, max_steps=6)
    pretrain.train(small_pretraining(root, tmp_path / "run", **settings), ONE)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [value for row in log for key, value in row.items() if key.endswith("_loss")]
    assert losses and all(value is not None for value in losses)


def test_what_editors_and_shells_add_is_no_content(tmp_path):
    words = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n"
    for name, text in (("rows.json", '["a"]'), ("run.py", "max_steps = 7"), ("vocab.txt", words)):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")  # with a byte order mark
    assert annotations.read_json(tmp_path / "rows.json", list) == ["a"]
    argv = [str(tmp_path / "run.py"), "--sets=FashionGen, BigFACAD", "--objectives=itc:0.5, mlm:0.5"]
    config = settings.load_config(pretrain.PretrainConfig, argv)
    assert config.max_steps == 7 and config.sets == ("FashionGen", "BigFACAD")
    assert config.objectives == {"itc": 0.5, "mlm": 0.5}
    assert weights.read_tokenizer(tmp_path / "vocab.txt").token_to_id("[PAD]") == 0


@pytest.mark.parametrize("word, folder", [("--out_dir=runs/mine", "runs/mine"), ("", "runs/demo_finetune_fashioniq")])
def test_a_run_folder_that_was_named_keeps_its_name(word, folder):
    argv = [str(finetune.CONFIGS / "demo_finetune.py"), "--task=fashioniq", *word.split()]
    assert settings.load_config(finetune.FinetuneConfig, argv).out_dir == folder


# ---- all faults in one pass ------------------------------------------------------------------------------------------


def test_data_check_finds_all_faults_in_one_pass(root, monkeypatch, capsys):
    assert check_data.check(root)[1] == []
    image = Path(annotations.load_products(root, "BigFACAD", "train")[3].images[0])
    image.unlink()  # it is a link to a file of other tests
    faults = [
        (edit(TRAIN, 1, title=None), "FashionGen/train_info.json: entry 1: key 'title'"),
        (edit(TRAIN, 2, attributes_id=[-1]), "FashionGen/train_info.json: entry 2: key 'attributes_id'"),
        (put("Fashion200k/train_info.json", "[1"), "Fashion200k/train_info.json: cannot be read as JSON"),
        (edit(IQ, 2, captions=["a", 2]), "cap.shirt.val.json: entry 2: key 'captions'"),
        (edit(IQ, 3, candidate="lost"), "FashionIQ/images/lost.jpg: missing (of "),
        (edit(IQ, 4, target="/lost"), "cap.shirt.val.json: entry 4: image path '/lost.jpg' leaves"),
        (edit(OCIR, 1, blank="lost"), "ocir_disjoint_train.json: entry 1: item ['lost']"),
        (edit(OCIR, 2, question=None), "ocir_disjoint_train.json: entry 2: key 'question'"),
        (lambda root: image.write_bytes(b"no image"), f"{image}: image cannot be read"),
    ]
    for spoil, _ in [*faults, (edit(VAL, 0, subcategory_id=None), "")]:
        spoil(root)
    monkeypatch.setattr("sys.argv", ["check_data.py", f"--data_root={root}", "--workers=2"])
    with pytest.raises(InputError, match=r"data: 9 faults, listed above"):
        check_data.main()
    report, listed = capsys.readouterr().out.split("9 faults:\n")
    assert "subcategory labels (1 products without)" in report  # which no task needs of each product
    assert [listed.count(part) for _, part in faults] == [1] * 9


# ---- what a download leaves in the place of a file -------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer.*git lfs pull"),
        (b"\n <!DOCTYPE html><html>Google Drive can't scan this file</html>", "a web page.*download it again"),
        ("<html>".encode("utf-16"), "a web page"),
        (b"<!DOCTYPE html><title>A shop</title><svg>", "a web page"),
        (
            b"<?xml version='1.0'?>\n<!DOCTYPE svg [" + b"<!ENTITY a 'b'>" * 60 + b"]>\n<svg>",
            r"a drawing \(SVG\).*as PNG",
        ),
        (b"<!-- made by hand --><svg>", "a drawing"),
        (b"\0\0\0\x20ftypheix\0\0\0\0mif1heix", "a HEIC photo.*save it as JPEG"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "what a server answered"),
        (b"Entry not found", "what a server answered"),
        (b"\x1f\x8b\x08\0\0", "packed by gzip; unpack it first"),
    ],
)
def test_pointers_and_web_pages(content, problem, tmp_path):
    for name, read in (
        ("weights.pth", checkpoint.load_model),
        ("weights.bin", checkpoint.read_weights),
        ("model.safetensors", checkpoint.read_weights),
        ("rows.json", lambda path: annotations.read_json(path, list)),
        ("photo.jpg", photos.open_image),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: (image cannot be read: )?{problem}"):
            read(tmp_path / name)


@pytest.mark.parametrize("names", [{"0": "a"}, [1, 2], "ab", 0])
def test_names_of_labels_are_a_list_of_texts(names, tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps({"categories": names}))
    with pytest.raises(InputError, match="labels.json: key 'categories': found .* expected a list of names in numer"):
        annotations.label_names(tmp_path, "fashiongen_category")


@pytest.mark.parametrize("name, code", [("prepare.check_data", 0), ("search", 2), ("evaluate", 2), ("pretrain", 2)])
def test_a_system_without_unix_signals(name, code, root):
    """Windows, pretended: every program ends in its own line, also after its work."""
    lines = ["import runpy, signal, sys", "del signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD"]
    lines += ["sys.modules['fcntl'] = sys.modules['resource'] = None"]
    lines += ["from plumbing import loading", "loading.init_worker()", f"runpy.run_module({name!r}, None, '__main__')"]
    command = [sys.executable, "-c", "\n".join(lines), f"--data_root={root}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = done.returncode, "Traceback" in done.stderr, "start it in WSL" in done.stderr
    assert found == (code, False, name == "pretrain"), done.stderr


def test_names_that_the_terminal_cannot_show():
    code = r"from plumbing import ending; ending.run(lambda: print('caf\udce9'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"}, capture_output=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, rb"caf\udce9")


def test_a_broken_photo_of_the_validation_is_left_out_and_counted(root, tmp_path, capsys):
    path = Path(annotations.load_products(root, "FashionGen", "val")[0].images[0])
    path.unlink()  # it is a link to a file of other tests
    path.touch()
    changes = dict(objectives={"itc": 1.0}, max_steps=2, missing="skip", eval_interval=1)
    metrics = pretrain.train(small_pretraining(root, tmp_path / "run", **changes), ONE)
    assert 0 <= metrics["mean_recall"] <= 1
    assert "FashionGen val: 1 of 15 images cannot be read and are left out" in capsys.readouterr().out


@pytest.mark.parametrize("stage, words", [(pretrain.PretrainConfig, []), (evaluate.EvalConfig, ["--task=polyvore"])])
def test_an_unknown_way_with_missing_images_is_refused(stage, words):
    message = "missing: found 'skpi', expected one of stop, skip"
    refuse(lambda: settings.load_config(stage, [*words, "--missing=skpi"]), message, "")


def test_check_reports_what_stands_in_train_and_in_val(root):
    sound, faults = check_data.check(root)
    assert not faults
    # the demo's nondisjoint outfits share items, as the published ones do
    assert [line.partition(":")[0] for line in sound if " of val stand in train" in line] == (
        ["PolyvoreOutfits nondisjoint"]
    )
    rows, val = (json.loads((root / file).read_text()) for file in (TRAIN, VAL))
    target = json.loads((root / "FashionIQ/captions/cap.dress.train.json").read_text())[0]["target"]
    edit(IQ, 0, candidate=target)(root)  # the shirts' validation begins with a dress of the training
    images = []
    for row in rows[:5]:
        for name in row["images"]:
            copy = root / "FashionGen" / "val" / f"of_train_{name}"
            copy.write_bytes((root / "FashionGen" / "train" / name).read_bytes())
            images.append(copy)
    moved = [{**row, "images": [f"of_train_{name}" for name in row["images"]]} for row in rows[:5]]
    put(VAL, val + moved)(root)
    report, faults = check_data.check(root)
    first = min(f"FashionGen {row['id']}" for row in rows[:5])
    assert faults == [f"FashionGen: 5 ids stand in train and in val, such as {first}"]
    twin = root / "FashionGen" / "train" / rows[0]["images"][0]
    line = f"FashionGen: {len(images)} images of val stand in train, too, such as {images[0]} = {twin}"
    iq_line = "FashionIQ: 1 images of val stand in train, too, such as "
    iq_line += annotations.fashioniq_image(root, "dress", target, "")
    assert {row for row in report if row not in sound and "images of val" in row} == {line, iq_line}


def rename_label(what):
    """Another name for number 1 of labels.json."""

    def apply(root):
        labels = json.loads((root / "labels.json").read_text())
        labels[what][1] = "something else"
        (root / "labels.json").write_text(json.dumps(labels))

    return apply


def swap_words(root):
    vocab = (root / "vocab.txt").read_text()
    (root / "vocab.txt").write_text(vocab.replace("[MASK]", "[X]").replace("[UNK]", "[MASK]").replace("[X]", "[UNK]"))


def change_image_tokenizer(root):
    tokenizer = vqvae.random_image_tokenizer(vqvae.ImageTokenizerConfig())
    with torch.no_grad():
        next(tokenizer.parameters()).add_(1)
    vqvae.prepare_image_tokenizer = lambda config, device: tokenizer


def change_last_category(root):
    items = json.loads((root / ITEMS).read_text())
    last = str(max(int(item["category_id"]) for item in items.values()))
    for item in items.values():
        item["category_id"] = item["category_id"].replace(last, str(int(last) + 1))
    put(ITEMS, items)(root)


OTHER_NAME = "number 1 is '***' in the checkpoint, but 'something else' in the data; use the data (labels.json) of ***"
OTHER_CATEGORY = "number *** is '***' in the checkpoint, but '***' in the data***"
MEANINGS = [  # task ("": pre-training), what changes after training, what a resume and an evaluation say
    ("", swap_words, "***last.pt: was trained with another tokenizer; set --vocab, --bert and --data_root as ***"),
    ("", change_image_tokenizer, "***last.pt: was trained with another image_tokenizer; set ***"),
    ("", rename_label("attributes"), f"***last.pt: attributes: {OTHER_NAME}"),
    (CATEGORY, rename_label("categories"), f"***.pt: categories: {OTHER_NAME}"),
    ("polyvore", change_last_category, f"***.pt: Polyvore categories: {OTHER_CATEGORY}"),
]


@pytest.mark.parametrize("task, change, message", MEANINGS)
def test_numbers_that_mean_something_else_are_refused(task, change, message, root, tmp_path, monkeypatch):
    monkeypatch.setattr(vqvae, "prepare_image_tokenizer", vqvae.prepare_image_tokenizer)  # put back after the test
    stage, changes = (finetune if task else pretrain), dict(max_steps=1, eval_interval=1 if task else -1)
    small = functools.partial(small_finetuning, task) if task else small_pretraining
    config = small(root, tmp_path / "run", **changes)
    stage.train(config, ONE)
    change(root)
    refuse(lambda: stage.train(dataclasses.replace(config, resume="auto", max_steps=2), ONE), message, root)
    if task:
        path = str(tmp_path / "run" / "best.pt")
        evaluation = evaluate.EvalConfig(task, path, data_root=str(root), workers=0)
        refuse(lambda: evaluate.evaluate_checkpoint(path, evaluation, ONE), message, root)
