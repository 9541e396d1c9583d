"""Situations from the public trackers of this field, tried with this code; each names its source."""

import contextlib
import dataclasses
import json
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
import torchvision
from helpers import ONE
from helpers import small_pretraining as small
from PIL import Image, features
from torch.utils.data import DataLoader

import data
import evaluate
import finetune
import pretrain
import search
from model import CSANet, FashionViL, ModelConfig
from plumbing import annotations, checkpoint, ending, photos, runs, weights
from plumbing.processes import Processes, start_processes
from plumbing.settings import InputError
from prepare import check_data
from tools.weights import convert, describe


@pytest.fixture(scope="module")
def samples(catalogue):
    """A data set of pre-training at 64 pixels."""
    products = annotations.load_products(catalogue, "FashionGen", "train")
    tokenizer = weights.wordpiece((catalogue / "vocab.txt").read_text())
    return data.Pretraining(products, tokenizer, 1000, pretrain.PretrainConfig(image_size=64))


@pytest.fixture(scope="module")
def trained(catalogue, tmp_path_factory):
    """The settings of a run of two updates, which is done."""
    config = small(catalogue, tmp_path_factory.mktemp("run"), objectives={"itc": 1.0}, max_steps=2)
    pretrain.train(config, ONE)
    return config


def test_workers_and_epochs_augment_differently(samples):
    """pytorch/pytorch#5059: numpy's state was copied into every worker, so all of them cropped alike."""
    keys = [[data.Key(epoch, 0, "itc")] for epoch in range(4)]
    batches = list(DataLoader(samples, batch_sampler=keys, collate_fn=data.collate, num_workers=2))
    pictures = [batch["image"] for batch in batches]
    assert not any(torch.equal(a, b) for i, a in enumerate(pictures) for b in pictures[:i])
    for key, picture in zip(keys, pictures, strict=True):  # a worker's sample is that of the main process
        assert torch.equal(picture, data.collate([samples[key[0]]])["image"])


def test_samples_reach_workers_that_do_not_fork(samples):
    """pytorch/pytorch#165532 sets "spawn"; Python 3.14 starts workers by "forkserver". Both pickle the data set."""
    key = data.Key(1, 3, "mlm")
    sample, same = samples[key], pickle.loads(pickle.dumps(samples))[key]
    assert sample.keys() == same.keys()
    assert all(np.array_equal(sample[name], same[name]) for name in sample)


def test_a_longer_text_in_the_batch_changes_no_embedding(catalogue):
    """huggingface/transformers#3150 and #278: an embedding changed with the padding of its batch."""
    tokenizer = weights.read_tokenizer(catalogue / "vocab.txt")
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, resnet="resnet18")
    torch.manual_seed(0)
    model = FashionViL(
        ModelConfig(vocab_size=tokenizer.get_vocab_size(), width=4, heads=("contrastive",), **sizes)
    ).eval()
    alone = data.text_batch(tokenizer, ["red dress"])
    beside = data.text_batch(tokenizer, ["red dress", "a long red dress " * 9])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(**alone)[0], model.encode_text(**beside)[0], rtol=1e-4, atol=1e-5)


def save_png_16(path, rows, transparent=b""):
    """A PNG of 16 bits a channel from uint16 (H, W, 4) or grey (H, W), which Pillow can read and not write."""
    import struct
    import zlib

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], 16, 6 if rows.ndim == 3 else 0, 0, 0, 0)
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    parts = [chunk(b"IHDR", head), *([chunk(b"tRNS", transparent)] if transparent else [])]
    parts += [chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


RED = np.array([[[200 * 257, 30 * 257, 40 * 257, 65535], [0, 0, 0, 0]]], np.uint16)
GREY = np.array([[300, 301, 200 * 256, 65535]], np.uint16)
PHOTOS = {  # file and source: how it is made at a path, the pixels of its first row
    # python-pillow/Pillow#5991: 16 bits a channel became noise or black in a conversion. Transparent parts are white.
    "cut-out.png": (lambda path: save_png_16(path, RED), [(200, 30, 40), (255, 255, 255)]),
    "transparent.png": (lambda path: save_png_16(path, GREY, (300).to_bytes(2, "big")), [255, 1, 200, 255]),
    "grey.png": (lambda path: save_png_16(path, GREY), [1, 1, 200, 255]),
    "grey.tif": (lambda path: Image.fromarray(GREY[:, 2:3]).save(path), [200]),
    # Its header says which value is white.
    "grey.pgm": (lambda path: path.write_bytes(b"P5 1 1 65535\n" + (200 * 256).to_bytes(2, "big")), [200]),
    # python-pillow/Pillow#4860, haraldk/TwelveMonkeys#147: Adobe stores CMYK inverted, so red came out as cyan.
    "cmyk.jpg": (lambda path: Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path), [(255, 0, 0)] * 16),
    "cmyk.tif": (lambda path: Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path), [(255, 0, 0)] * 16),
    # Esri/data-collection-ios#184, instructure/canvas-lms#1206: a shop's server sends other formats as .jpg.
    "webp.jpg": (lambda path: save_red(path, "WEBP"), [(200, 30, 40)] * 16),
    "avif.jpg": (lambda path: save_red(path, "AVIF"), [(200, 30, 40)] * 16),
}


def save_red(path, kind):
    if not features.check(kind.lower()):
        pytest.skip(f"this Pillow has no {kind}")
    Image.new("RGB", (16, 16), (200, 30, 40)).save(path, kind)


@pytest.mark.parametrize("name", PHOTOS)
def test_photos_have_the_right_colours(tmp_path, name):
    save, expected = PHOTOS[name]
    save(tmp_path / name)
    pixels = np.asarray(photos.open_image(tmp_path / name))[0].astype(int)
    expected = np.array([np.broadcast_to(colour, 3) for colour in expected])
    lossy = name.startswith(("cmyk", "webp", "avif"))
    assert pixels.shape == expected.shape and np.abs(pixels - expected).max() <= (3 if lossy else 0)


@pytest.mark.parametrize("mode, value", [("I", 200), ("F", 0.8)])
def test_32_bits_a_pixel_are_refused(tmp_path, mode, value):
    """python-pillow/Pillow#3838 and #5991: nothing says which value is white, and the photo became black."""
    path = tmp_path / "a.tif"
    Image.new(mode, (8, 8), value).save(path)
    says = rf"a.tif: image cannot be read: grey of an unusual kind \(mode {mode}\); save"
    with pytest.raises(InputError, match=says):
        photos.open_image(path)


def test_vocabulary_with_the_line_ends_of_windows(tmp_path, catalogue):
    """huggingface/transformers#1078: ids were shifted against the file, so every word had another's vector."""
    text = (catalogue / "vocab.txt").read_text()
    (tmp_path / "vocab.txt").write_bytes(text.replace("\n", "\r\n").encode())
    assert weights.read_tokenizer(tmp_path / "vocab.txt").get_vocab() == weights.wordpiece(text).get_vocab()


@pytest.mark.parametrize("prefix", ["", "module._orig_mod.", "backbone.0.body.", "encoder."])
@pytest.mark.parametrize("part", [(), ("model",), ("state_dict",), ("module",), ("checkpoint", "ema")])
def test_weights_in_a_part_of_the_file(tmp_path, prefix, part):
    """mlfoundations/open_clip#639, huggingface/pytorch-image-models#2003, pytorch/examples#410: training scripts add
    to names, and keep weights in a part of the file."""
    state = torchvision.models.resnet18().state_dict()
    file = {f"{prefix}{name}": tensor for name, tensor in state.items()} | {f"{prefix}head.0.bias": torch.ones(3)}
    file |= {"queue": torch.ones(9)} if prefix else {}
    for key in reversed(part):
        file = {key: file, "epoch": 9, "optimizer": {"state": {0: {"exp_avg": torch.ones(9)}}}}
    torch.save(file, tmp_path / "a.pth")
    found, info = checkpoint.read_weights(tmp_path / "a.pth", ("resnet",), "resnet_file")
    expected = {f"image_encoder.{name}" for name in state if not name.startswith("fc.")}
    assert info["kind"] == "resnet" and found.keys() - expected == {"fc.weight", "fc.bias", "head.0.bias"}
    assert all(torch.equal(found[name], state[name.removeprefix("image_encoder.")]) for name in expected)


def test_one_of_several_models_and_a_whole_one(tmp_path):
    """What self-supervised training leaves: a student and its teacher in one file. And torch.save(model)."""
    student, teacher = torchvision.models.resnet18(), torchvision.models.resnet18()
    states = {f"module.backbone.{name}": tensor for name, tensor in student.state_dict().items()}
    torch.save({"student": states, "teacher": {"backbone": teacher.state_dict()}}, tmp_path / "both.pth")
    problem = r"found models under 'student.module.backbone.' and 'teacher.backbone.'; .*--convert .* --part=PREFIX"
    with pytest.raises(InputError, match=problem):
        checkpoint.read_weights(tmp_path / "both.pth")
    torch.save(torch.nn.ModuleDict({"module": student}), tmp_path / "whole.pth")  # named as in DataParallel
    with pytest.raises(InputError, match="a pickled torch.nn.modules.container.ModuleDict, .*--convert"):
        checkpoint.read_weights(tmp_path / "whole.pth")
    for name, part, model in (
        ("both", "teacher.backbone", teacher),
        ("both", "student", student),
        ("both", "teacher.backbone.", teacher),
        ("whole", None, student),
    ):
        path = tmp_path / f"{name}_{part}.pth"
        convert(tmp_path / f"{name}.pth", path, part)
        found, _ = checkpoint.read_weights(path, ("resnet",), "resnet_file")
        expected = model.state_dict()
        assert len(found) == len(expected)
        assert all(torch.equal(found[f"image_encoder.{n}"], t) for n, t in expected.items() if not n.startswith("fc."))
    with pytest.raises(InputError, match="both.pth: no tensors under ema"):
        convert(tmp_path / "both.pth", tmp_path / "none.pth", "ema")


def test_info_calls_no_other_network_a_resnet(tmp_path):
    """CLIP's ResNet has another beginning, and torchvision's other networks share names with released files."""
    blocks = {f"visual.{n}": t for n, t in torchvision.models.resnet18().state_dict().items() if n.startswith("layer")}
    torch.save({**blocks, "visual.conv1.weight": torch.ones(64, 3, 3, 3)}, tmp_path / "clip.pth")
    with pytest.raises(InputError, match=r"of other shapes: image_encoder.conv1.weight \(64, 3, 3, 3\), expected"):
        describe(tmp_path / "clip.pth")
    torch.save({"model": torchvision.models.alexnet().state_dict()}, tmp_path / "alexnet.pth")
    with pytest.raises(InputError, match="found model.features.0.weight, .*, expected those of"):
        describe(tmp_path / "alexnet.pth")


def test_our_checkpoint_with_the_names_of_torch_compile(trained, tmp_path):
    file = torch.load(f"{trained.out_dir}/best.pt", weights_only=True)
    renamed = {f"_orig_mod.{name}": tensor for name, tensor in file["model"].items()}
    torch.save({**file, "model": renamed}, tmp_path / "a.pt")
    found, _ = checkpoint.read_weights(tmp_path / "a.pt", ("fashionvil",), "init")
    assert found.keys() == file["model"].keys()


def test_a_machine_without_git(monkeypatch, tmp_path):
    """Rikorose/DeepFilterNet#676, NVlabs/FourCastNet#12: a slim container has no git, and the run died of it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runs.describe_run(pretrain.PretrainConfig())["git_commit"] is None


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs /dev/shm")
def test_batches_that_do_not_fit_into_shared_memory(catalogue, tmp_path, monkeypatch):
    """pytorch/pytorch#1355 and #5040: a small /dev/shm. The worker dropped the batch, and the run hung for ever."""
    config = small(catalogue, tmp_path / "run", objectives={"itc": 1.0}, workers=2, max_steps=1, eval_interval=-1)
    ahead = (2 * 4 + 1) * 2 * 16 * 3 * 64**2  # bytes: 2 workers, 4 batches each, and the one in use; 2 images a sample
    usage = shutil.disk_usage("/dev/shm")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=ahead - 1))
    with pytest.raises(InputError, match="workers: .* need up to 3 MiB of /dev/shm, where 3 are free; set fewer"):
        pretrain.train(config, ONE)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=ahead))
    pretrain.train(config, ONE)


@pytest.mark.parametrize(
    "said", ["Too many open files. Communication with the workers is no longer", "received 0 items of ancdata"]
)
def test_too_many_open_files_are_a_lost_worker(said):
    """pytorch/pytorch#11201 and #973: every batch of a worker holds open files, and the system allows so many."""
    assert ending.is_dead_worker(RuntimeError(said)) and not ending.is_dead_worker(RuntimeError("shape"))


@pytest.mark.parametrize("token", ["red", ""])
def test_a_word_twice_in_the_vocabulary(catalogue, token, tmp_path):
    """huggingface/transformers#2020: a dictionary with words twice; ids ran past the table of words."""
    words = [word for word in (catalogue / "vocab.txt").read_text().splitlines() if word != token]
    words = [*words[:30], token, *words[30:], token, "end"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = weights.read_tokenizer(tmp_path / "vocab.txt")
    assert weights.count_words(tokenizer) == len(words)  # a word table has a row for every line
    assert all(number == tokenizer.token_to_id(word) for number, word in enumerate(words) if word != token)


def test_fewer_items_than_processes(catalogue, monkeypatch):
    """Lightning-AI/pytorch-lightning#5047 "DDP crashing with small sets"; ours crashed after the last update."""
    paths = sorted(map(str, (catalogue / "FashionGen" / "val").glob("*.jpg")))[:2]
    config = evaluate.EvalConfig(image_size=32, workers=0)
    parts = []

    def embed(processes):
        items = [{"image": path} for path in paths]
        embedder = evaluate.Embedder(None, evaluate.TASKS["fashiongen_retrieval"], None, config, processes)
        return embedder.embed(items, encode=lambda batch: batch["image"][:, :, 9, 9])

    def keep(rows):
        parts.append(rows)
        return [rows] * 3

    expected = embed(ONE)
    monkeypatch.setattr(evaluate, "gather_objects", keep)
    for rank in range(3):
        embed(Processes(rank, 3, ONE.device))
    monkeypatch.setattr(evaluate, "gather_objects", lambda rows: parts)
    assert not torch.equal(expected[0], expected[1])
    for rank in range(3):
        assert torch.equal(embed(Processes(rank, 3, ONE.device)), expected)


def test_weights_that_are_nan_find_nothing(trained, catalogue, tmp_path):
    """embeddings-benchmark/mteb#1389 and #3030: NaN scores became results; ours were none, with exit code 0."""
    file = torch.load(f"{trained.out_dir}/best.pt", weights_only=True)
    file["model"]["image_encoder.conv1.weight"][:] = float("nan")
    torch.save(file, tmp_path / "nan.pt")
    gallery = catalogue / "FashionGen" / "val"
    words = [f"--checkpoint={tmp_path}/nan.pt", f"--gallery={gallery}", f"--index={tmp_path}/index", "--workers=0"]
    line = r": its embedding is not finite \(15 of 15 such\); the checkpoint is broken, or"
    with pytest.raises(InputError, match=line):
        search.search(search.read_config([*words, "--text=red dress"]))
    assert not (tmp_path / "index").exists()
    with pytest.raises(InputError, match=r"^query: its embedding is not finite \(1 of 1 such\); "):
        search.search(search.read_config([*words, f"--image={min(gallery.glob('*.jpg'))}"]))
    config = evaluate.EvalConfig(task="fashiongen_retrieval", data_root=str(catalogue), workers=0)
    with pytest.raises(InputError, match=line):
        evaluate.evaluate_checkpoint(str(tmp_path / "nan.pt"), config, ONE)


@pytest.mark.parametrize(
    "objectives, processes, grad_accum, least",
    [
        ({"itc": 1.0}, 1, 8, 16),
        ({"mlm": 0.5, "mvc": 0.5}, 1, 8, 16),
        ({"itc": 1.0}, 4, 2, None),  # candidates come from all processes
        ({"itm": 1.0}, 4, 2, 16),  # candidates come from one process
        ({"itm": 1.0}, 2, 2, None),
        ({"mlm": 0.5, "pac": 0.5, "itc": 0.0}, 1, 8, None),  # no candidates
    ],
)
def test_one_candidate_teaches_nothing(objectives, processes, grad_accum, least):
    """jiawei-ren/BalancedMSE#19, UrbanCLIP#5: the loss is 0 and the accuracy 100 % where there is one candidate."""
    config = pretrain.PretrainConfig(objectives=objectives, batch_size=8, grad_accum=grad_accum)
    line = f"^batch_size: found 8 with grad_accum={grad_accum}, expected {least} or more, for one product alone"
    with pytest.raises(InputError, match=line) if least else contextlib.nullcontext():
        pretrain.check_config(config, processes)


def test_one_candidate_of_itm_and_of_fine_tuning_teaches_nothing():
    config = pretrain.PretrainConfig(objectives={"itm": 1.0}, itm_candidates=1)
    with pytest.raises(InputError, match="^itm_candidates: found 1, expected 0 or at least 2, "):
        pretrain.check_config(config)
    for task in ("fashiongen_retrieval", "fashioniq", "polyvore"):
        with pytest.raises(InputError, match="^batch_size: found 4 with grad_accum=4, expected 8 or more, "):
            finetune.train(finetune.FinetuneConfig(task=task, batch_size=4, grad_accum=4), ONE)


def test_variables_of_another_launcher(monkeypatch):
    """NVIDIA/apex#99, pytorch/examples#458: WORLD_SIZE alone ended in a traceback. RANK alone must not stop saving."""
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "3")
    assert start_processes("cpu").is_main
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = "WORLD_SIZE=2, but RANK is not set; start by torchrun, or unset WORLD_SIZE"
    with pytest.raises(InputError, match=f"^{line}$"):
        start_processes("cpu")


@pytest.mark.parametrize(
    "there, changes, says",
    [
        ({}, dict(wandb="shop"), "^wandb: No module named 'wandb'; `pip install wandb`, or leave"),
        ({"folder": "wandb"}, dict(wandb="shop"), "^wandb: cannot import name 'init' from 'wandb' "),
        ({"CXX": "icpx"}, dict(compile=True), "^compile: found no compiler icpx, .*, name yours in CXX, or"),
        ({"CXX": f"ccache {sys.executable}"}, dict(compile=True), None),
        ({"device": "cuda"}, dict(compile=True), "^compile: found no compiler gcc or clang, .* in CC, "),
    ],
)
def test_a_machine_that_lacks_something(there, changes, says, tmp_path, monkeypatch):
    """Slim images have no compiler and no package; a folder wandb/ can be imported, too."""
    for name, value in {"PATH": "", "CC": "gcc clang", "CXX": "g++", **there}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / there.get("folder", "other")).mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(InputError, match=says) if says else contextlib.nullcontext():
        runs.check_machine(pretrain.PretrainConfig(**changes), torch.device(there.get("device", "cpu")))


def test_a_photo_that_stands_twice_is_one():
    """MVC-Datasets/MVC#4: the same photo twice; MVC took it for another view, and val counted it twice."""
    item = {"id": 1, "images": ["b.jpg", "a.jpg", "b.jpg"], "title": "a", "description": "b", "attributes_id": []}
    assert annotations.parse_product(item, "FashionGen", "in", "here").images == ["in/b.jpg", "in/a.jpg"]


DRESSES = "FashionIQ/captions/cap.dress.val.json"
ROWS = [  # file below the data root, change of its second row, what is said after "entry 1: "
    (DRESSES, lambda row: {**row, "candidate": row["target"]}, "candidate and target"),
    (DRESSES, lambda row: {**row, "captions": ["", " "]}, "key 'captions': found ['', "),
    ("PolyvoreOutfits/ocir_disjoint_test.json", lambda row: {**row, "question": [row["blank"]]}, "blank "),
]


@pytest.mark.parametrize("file, change, says", ROWS)
def test_a_query_that_holds_its_own_answer_or_says_nothing(root, file, change, says):
    path = root / file
    rows = json.loads(path.read_text())
    rows[1] = change(rows[1]) | ({"fake_data": False} if "fake_data" in rows[1] else {})
    path.write_text(json.dumps(rows))
    faults = check_data.check(root, open_images=False)[1]
    assert len(faults) == 1 and faults[0].startswith(f"{path}: entry 1: {says}")


def test_placeholders_of_dead_links_are_reported(catalogue, tmp_path):
    """dusty-nv/jetson-inference#124, rom1504/img2dataset#193: a dead link sends a GIF of 1 x 1, and no error."""
    shutil.copytree(catalogue, tmp_path / "data")
    photos = sorted((tmp_path / "data" / "FashionIQ" / "images").glob("*.jpg"))
    for number, says in ((9, False), (10, True)):
        for path in photos[:number]:
            Image.new("L", (1, 1)).save(path, "GIF")
        report, faults = check_data.check(tmp_path / "data")
        line = f"10 images are one and the same file, such as {photos[0]}: what a shop sends for a dead link?"
        assert (line in report) is says and not faults


def test_outfit_weights_that_are_nan_find_nothing(catalogue, tmp_path):
    """Its sibling: the images' vectors are sound, and what makes the outfit's vector of them is not."""
    n = len(annotations.load_polyvore_items(catalogue / "PolyvoreOutfits")[1])
    model = CSANet(ModelConfig(resnet="resnet18", width=4), n)
    torch.nn.init.constant_(model.fusion_module["masks"].weight, float("nan"))
    state = {"kind": "csa_net", "task": "polyvore", "step": 1, "config": {"image_size": 64}}
    state |= {"model": model.state_dict(), "model_config": dataclasses.asdict(model.config)}
    checkpoint.save(tmp_path / "nan.pt", state)
    photos = catalogue / "PolyvoreOutfits" / "images"
    words = [f"--checkpoint={tmp_path}/nan.pt", f"--gallery={photos}", f"--index={tmp_path}/index", "--workers=0"]
    words += ["--category=shoes", "--outfit", str(min(photos.glob("*.jpg")))]
    with pytest.raises(InputError, match="^outfit: its embedding is not finite "):
        search.search(search.read_config(words))
    config = evaluate.EvalConfig(task="polyvore", data_root=str(catalogue), workers=0)
    with pytest.raises(InputError, match="ocir_disjoint_test.json: entry .*: its embedding is not finite "):
        evaluate.evaluate_checkpoint(str(tmp_path / "nan.pt"), config, ONE)
