"""Our own checkpoints: saving, loading a model to use, and what a new model starts from. weights.py reads the files.

A checkpoint is a dict. Every one has "format" (weights.FORMAT), "kind" (one of KINDS), "model" (its state dict),
"config" (all settings of the run), "step" (updates done), "best" (the metric that selects) and "n_items" (of the
training data). A checkpoint of a model also has what `contents` gives. For a resume, last.pt adds what runs.py says."""

import dataclasses
import json
import re
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch

from model import HEADS, RESNETS, SIZES, CSANet, FashionViL, ModelConfig
from plumbing.files import cause_of, checksum, reading, replacing, shown
from plumbing.settings import InputError
from plumbing.weights import FORMAT, MODELS, WORDS, bert_tokenizer, count_words, find_file, find_tokenizer, read_weights


def save(path, state):
    """Write our checkpoint `state` (without "format") under a temporary name, and then give it the name `path`.

    Raises InputError on a full disk, a missing folder or permission; an older file at `path` is then unharmed."""
    with replacing(path) as file:
        torch.save({"format": FORMAT, **state}, file)


def contents(model, task, labels, tokenizer=None, image_tokenizer=None):
    """What every checkpoint of a run holds beside weights and progress. It says what the model's numbers mean.

    labels: {what: names in the order of their numbers}, as `annotations.label_names` gives it. tokenizer: of the texts.
    image_tokenizer: the frozen model whose codes MPFC predicts. Either is None where the model needs none."""
    return {
        "kind": "csa_net" if isinstance(model, CSANet) else "fashionvil",
        "task": task,
        "model_config": dataclasses.asdict(model.config),
        "labels": labels,
        "tokenizer": tokenizer.to_str() if tokenizer else None,  # the whole text of a tokenizer.json
        "image_tokenizer": checksum(image_tokenizer) if image_tokenizer else None,
    }


# ---- a whole model ---------------------------------------------------------------------------------------------------


def load_model(path, device="cpu", needs=()):
    """(model in eval mode, info) of a checkpoint, ours or released. Take it when you want to use a trained model.

    needs: the heads that you use, or ("csa_net",). All sizes are read from the tensors; info is as `read_weights`'s.
    Raises InputError where the model lacks a head, or with every name that is missing, left over or misshapen."""
    state, info = read_weights(path, MODELS, "checkpoint")
    with reading(path, "no model has these sizes"):
        config = ModelConfig(**read_sizes(path, state, info))
        if info["kind"] == "csa_net":
            hidden, categories = state["fusion_module.weight_classifier.0.weight"].shape
            n_masks, dim = state["fusion_module.masks.weight"].shape
            model, offers = CSANet(config, categories // 2, dim, n_masks, hidden), ("csa_net",)
        else:
            model, offers = FashionViL(config), config.heads
    check_names(path, model.state_dict(), state)
    if not set(needs) <= set(offers):
        has = f"{info['task'] or info['layout']} (it has {', '.join(offers) or 'no heads'})"
        raise InputError(f"{path}: a checkpoint of {has}, expected one trained for a task with {', '.join(needs)}")
    model.load_state_dict(state)
    return model.to(device).eval(), info


# kind of file: the parts of a model that it has
PARTS = {"fashionvil": ("image_encoder", "bert"), "csa_net": ("image_encoder",)}
PARTS |= {"resnet": ("image_encoder",), "bert": ("bert",)}
SIZE_OF = {  # field of ModelConfig: the tensor that tells it, and along which axis
    "width": ("image_encoder.conv1.weight", 0),
    "vocab_size": (WORDS, 0),
    "hidden_size": (WORDS, 1),
    "intermediate_size": ("bert.encoder.layer.0.intermediate.dense.weight", 0),
    "max_position_embeddings": ("bert.embeddings.position_embeddings.weight", 0),
    "type_vocab_size": ("bert.embeddings.token_type_embeddings.weight", 0),
    "n_codes": ("heads.mpfc.decoder.weight", 0),
    "n_attributes": ("heads.pac.projection", 1),
    "n_classes": ("heads.recognition.decoder.weight", 0),
}


def read_sizes(path, state, info):
    """{field of ModelConfig: value} of what `read_weights` gave. Raises InputError where no model has such sizes.

    No tensor tells the number of attention heads. Of a BERT or a CSA-Net it is left out."""
    with reading(path, "no model has these sizes"):
        kind, sizes = info["kind"], {}
        if "image_encoder" in PARTS[kind]:
            stages = [f"image_encoder.layer{n}." for n in (1, 2, 3, 4)]
            blocks = tuple(len({name.split(".")[2] for name in state if name.startswith(stage)}) for stage in stages)
            bottleneck = "image_encoder.layer1.0.conv3.weight" in state
            names = [name for name, resnet in RESNETS.items() if resnet == (blocks, bottleneck)]
            sizes["resnet"] = names[0] if names else f"{blocks} blocks a stage"
        if "bert" in PARTS[kind]:
            sizes["num_hidden_layers"] = len({n.split(".")[3] for n in state if n.startswith("bert.encoder.layer.")})
        for field, (name, axis) in SIZE_OF.items():
            if name in state or name.startswith(PARTS[kind]):  # a file without a part that it must have: KeyError
                sizes[field] = state[name].shape[axis]
        if kind == "fashionvil":
            heads = {name.split(".")[1] for name in state if name.startswith("heads.")}
            if "logit_scale" in state:
                heads.add("contrastive")
            sizes["heads"] = tuple(head for head in HEADS if head in heads)
            if "num_attention_heads" not in info["model_config"] and sizes["hidden_size"] % 64:
                raise ValueError(f"nothing says the number of attention heads of {sizes['hidden_size']} units")
            sizes["num_attention_heads"] = sizes["hidden_size"] // 64  # 64 is the width of BERT's attention heads
            told = ("num_attention_heads", "dropout", "pac_scale")  # no tensor tells these three
            sizes |= {key: info["model_config"][key] for key in told if key in info["model_config"]}
        return sizes


def check_names(path, own, found):
    """Raise InputError that lists what `found` lacks, has too much or has in another shape than `own`."""

    def shape(tensor):
        return ("" if tensor.is_floating_point() else "integers ") + str(tuple(tensor.shape))

    both = [(name, shape(found[name]), shape(own[name])) for name in own if name in found]
    problems = {
        "of other shapes": [f"{name} {theirs}, expected {ours}" for name, theirs, ours in both if theirs != ours],
        "missing": [name for name in own if name not in found],
        "left over": [name for name in found if name not in own],
    }
    said = [f"{len(names)} {what}: {', '.join(names)}" for what, names in problems.items() if names]
    if said:
        raise InputError(f"{path}: does not fit the model: {'; '.join(said)}")


# ---- what numbers mean -----------------------------------------------------------------------------------------------


def check_labels(path, theirs, ours):
    """Raise InputError where a number means one thing in the checkpoint `path` and another in the data.

    theirs and ours: {what: names in the order of their numbers}; what only one of them names is not compared."""
    for what in theirs.keys() & ours.keys():
        for number, (name, own) in enumerate(zip(theirs[what], ours[what], strict=False)):
            if name != own:
                found = f"{what}: number {number} is {shown(name)} in the checkpoint, but {shown(own)} in the data"
                raise InputError(f"{path}: {found}; use the data (labels.json) of its training, or train anew")


def check_same(path, theirs, ours):
    """Raise InputError where a checkpoint is of another task, or numbers mean something else in it than in this run.

    theirs: the dict of the checkpoint `path`; ours: what `contents` gives for this run."""
    if theirs.get("task") != ours.get("task"):
        found = f"a run of task {theirs.get('task')}, expected {ours.get('task')}"
        raise InputError(f"{path}: {found}; set another --out_dir, or --init={path} to start from its weights")
    check_labels(path, theirs.get("labels", {}), ours.get("labels", {}))
    settings = {"tokenizer": "--vocab, --bert and --data_root", "image_tokenizer": "--image_tokenizer"}
    for what, names in settings.items():
        found, expected = theirs.get(what), ours.get(what)
        if what == "tokenizer" and found:  # another version of tokenizers may write the same one in other words
            found = tokenizers.Tokenizer.from_str(found).to_str()
        if found and expected and found != expected:
            raise InputError(f"{path}: was trained with another {what}; set {names} as in its training, or train anew")


# ---- the first weights of a new model --------------------------------------------------------------------------------


class Start(NamedTuple):
    """What a new model starts from."""

    sizes: dict  # {field of ModelConfig: value}, with vocab_size where the model reads texts
    tokenizer: tokenizers.Tokenizer  # None where the model reads no text
    trained: dict  # settings of the run that wrote the checkpoint, {} where there is none
    files: list  # (path, state dict, info) of each file with weights, which `initialise` empties


def read_start(config, reads_text=True):
    """The `Start` that the settings of a stage mean. All files of weights and words are read or fetched here alone.

    config.init: "random"; "pretrained" (ResNet from torch.hub or the file `resnet_file`, "random" for none; BERT from
    the folder or hub name `bert`); or a checkpoint, ours or released. A checkpoint brings its sizes. Else they are
    those of the BERT folder, or model.SIZES[config.size]. reads_text: False for a CSANet.
    The tokenizer is that of `weights.find_tokenizer`. A new word table has a row for each of its words.
    Raises InputError where a file cannot be had, is of another kind, or is not what its config.json says."""
    files, trained = [], {}
    own, rows = None, None  # the tokenizer that the weights come with, and the rows of their word table
    if config.init not in ("random", "pretrained"):  # a checkpoint
        state, info = read_weights(config.init, ("fashionvil",) if reads_text else MODELS, "init")
        files.append((config.init, state, info))
        sizes, trained, own = read_sizes(config.init, state, info), info["config"], info["tokenizer"]
        rows = sizes.get("vocab_size")
    else:  # ResNet and BERT, each with its weights or random
        sizes = {"resnet": config.resnet, "width": config.width, **SIZES[config.size]}
        if config.init == "pretrained" and config.resnet_file != "random":
            path = config.resnet_file or fetch_resnet(config.resnet)
            files.append((path, *read_weights(path, ("resnet",), "resnet_file")))
        if reads_text and (config.init == "pretrained" or config.bert):
            file, found = read_bert(config.bert)
            if config.bert:
                sizes |= found
            if config.init == "pretrained":
                files.append(file)
                rows, own = found["vocab_size"], bert_tokenizer(config.bert).to_str()
    tokenizer = None
    if reads_text:
        tokenizer = find_tokenizer(config, own, rows)
        sizes["vocab_size"] = rows or count_words(tokenizer)
    return Start(sizes, tokenizer, trained, files)


# What config.json may say of the Transformer. Where it says nothing, it means the same.
TRANSFORMER = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
TRANSFORMER["layer_norm_eps"] = 1e-12


def read_bert(bert):
    """(path, state dict, info) of a BERT's weights, and its sizes, of the folder or hub name `bert`.

    Weights in several files (model.safetensors.index.json) are not read. Raises InputError where config.json tells of
    another model than BERT."""
    path = find_file(bert, "model.safetensors", "pytorch_model.bin")
    state, info = read_weights(path, ("bert",), "bert")
    sizes, config_path = read_sizes(path, state, info), find_file(bert, "config.json")
    with reading(config_path, "cannot be read"):
        config = json.loads(config_path.read_text(encoding="utf-8-sig"))
        sizes["num_attention_heads"] = config["num_attention_heads"]
    for key, expected in TRANSFORMER.items():
        found = config.get(key, expected)
        if found != expected:
            raise InputError(f"{config_path}: {key}: found {shown(found)}, expected {expected!r}")
    return (path, state, info), sizes


def fetch_resnet(name):
    """Path of torchvision's ImageNet file in torch.hub's folder; it is fetched where it is not there yet."""
    from torchvision.models import get_model_weights  # only where something is fetched

    url = get_model_weights(name).IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    try:
        torch.hub.load_state_dict_from_url(url, progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # of the network, the disk, the hash
        cure = f"put it at {path}, or anywhere and set --resnet_file=FILE, or start with --init=random"
        raise InputError(f"{url} could not be fetched ({cause_of(error)}): {cure}") from None
    return path


NOT_IN_BERT = ("bert.embeddings.projection", "bert.pooler")  # parts of our Transformer that a file of BERT may lack


def initialise(model, start):
    """Fill a model that you have just built from a `Start`; returns lines that say what was loaded, left over and new.

    A checkpoint gives image encoder, Transformer, and heads of equal shapes. logit_scale always starts at 4 again.
    Raises InputError where a file does not fit."""
    if not start.files:
        return ["init: random weights"]
    new, report = _by_part(model.state_dict()), []  # new: the parts that no file has filled yet
    for path, state, info in start.files:
        in_file, loaded = _by_part(state), []
        in_file.pop("logit_scale", None)
        for part, ours in list(new.items()):
            theirs = in_file.get(part, {})
            # Image encoder and Transformer must fit. A head of another shape, or one that is not there, stays new.
            may_lack = info["kind"] == "bert" and part in NOT_IN_BERT
            if part.startswith(PARTS[info["kind"]]) and not may_lack:
                check_names(path, ours, theirs)
            if {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}:
                model.load_state_dict(theirs, strict=False)
                loaded.append(part)
                del new[part], in_file[part]
        left = ", ".join([*in_file, *info["set_aside"]]) or "nothing"
        sizes = "; its sizes count, not --size, --resnet and --width" if info["kind"] in MODELS else ""
        report.append(f"{path}: loaded {', '.join(loaded)}; left over {left}{sizes}")
    start.files.clear()  # their tensors can take as much memory as the model
    return [*report, f"new weights: {', '.join(new) or 'none'}"]


def _by_part(state):
    """{part: its state dict}: "heads.itm", "bert.encoder", "bert.embeddings.projection", "image_encoder", ..."""
    parts = {}
    for name, tensor in state.items():
        parts.setdefault(re.match(r"(heads|bert\.embeddings|bert)\.\w+|\w*", name)[0], {})[name] = tensor
    return parts
