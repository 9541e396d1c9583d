"""Our own checkpoints: saving, loading a model to use, and what a new model starts from. weights.py reads the files.

A checkpoint is a dict. Every one has "format" (weights.FORMAT), "kind" (one of KINDS), "model" (its state dict),
"config" (all settings of the run), "step" (updates done), "best" (the metric that selects) and "n_items" (of the
training data). A checkpoint of a model also has what `contents` gives. For a resume, last.pt adds what runs.py says."""

import dataclasses
import re
from typing import NamedTuple

import tokenizers
import torch

from model import SIZES, CSANet, FashionViL, ModelConfig
from plumbing.files import checksum, reading, replacing, shown
from plumbing.settings import InputError
from plumbing.weights import (
    FORMAT,
    MODELS,
    PARTS,
    check_names,
    count_words,
    fetch_resnet,
    find_tokenizer,
    read_bert,
    read_sizes,
    read_weights,
)


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
    The tokenizer is that of `weights.find_tokenizer`. A random start has a word for each of its numbers.
    Raises InputError where a file cannot be had, is of another kind, or is not what its config.json says."""
    files, trained, own, rows = [], {}, None, None
    if config.init not in ("random", "pretrained"):
        state, info = read_weights(config.init, ("fashionvil",) if reads_text else MODELS, "init")
        files.append((config.init, state, info))
        sizes, trained, own = read_sizes(config.init, state, info), info["config"], info["tokenizer"]
        rows = sizes.get("vocab_size")
    else:
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
                rows = found["vocab_size"]
    tokenizer = None
    if reads_text:
        tokenizer = find_tokenizer(config, own, rows)
        sizes["vocab_size"] = rows or count_words(tokenizer)
    return Start(sizes, tokenizer, trained, files)


NOT_IN_BERT = ("bert.embeddings.projection", "bert.pooler")  # parts of our Transformer that a file of BERT may lack


def initialise(model, start):
    """Fill a model that you have just built from a `Start`; returns lines that say what was loaded, left over and new.

    A checkpoint gives image encoder, Transformer, and heads of equal shapes. logit_scale always starts at 4 again.
    Raises InputError where a file does not fit."""
    if not start.files:
        return ["init: random weights"]
    new, report = _by_part(model.state_dict()), []  # new: the parts that no file has filled yet
    for path, state, info in start.files:
        theirs, loaded = _by_part(state), []
        theirs.pop("logit_scale", None)
        for part, own in list(new.items()):
            found = theirs.get(part, {})
            # Image encoder and Transformer must fit. A head of another shape, or one that is not there, stays new.
            if part.startswith(PARTS[info["kind"]]) and not (info["kind"] == "bert" and part in NOT_IN_BERT):
                check_names(path, own, found)
            if {name: tensor.shape for name, tensor in own.items()} == {name: t.shape for name, t in found.items()}:
                for name, tensor in own.items():
                    tensor.copy_(found[name])
                loaded.append(part)
                del new[part], theirs[part]
        left = ", ".join([*theirs, *info["set_aside"]]) or "nothing"
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
