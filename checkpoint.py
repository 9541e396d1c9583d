"""Weights in files: ours, the authors' released ones, BERT and ResNet. Reading a file never runs code from it.

`save` writes a checkpoint. Four functions read one: `load_model` gives a model to use, `initialise` fills a new model,
`find_resume` (with `restore`) goes on with a stopped run, and `read_weights` gives the tensors alone.

Our checkpoint is a dict. Every one has "format" (1), "kind" (one of KINDS), "model" (its state dict), "config" (all
settings of the run), "step" (updates done), "best" (the metric that selects) and "n_items" (of the training data). A
model also has "task", "model_config", "vocab" (text of vocab.txt), "labels" (what numbers mean,
`annotations.label_names`) and n_classes or n_categories. For a resume, last.pt adds "optimizer", "scaler", "parts"
(each process's sums for the next log line), "lasting", "skipped_updates" and "validation_due"."""

import copy
import hashlib
import itertools
import json
import math
import re
from pathlib import Path

import torch

from files import not_the_file, replacing
from formats import DECODER, FORMAT, MODELS, WORDS, cause_of, read_file, read_index, read_weights, reading, shown
from model import HEADS, RESNETS, SIZES, CSANet, FashionViL, ModelConfig
from settings import InputError


def save(path, state):
    """Write our checkpoint `state` (without "format") under a temporary name, and then give it the name `path`.

    Raises InputError on a full disk, a missing folder or permission; an older file at `path` is then unharmed."""
    with replacing(path) as file:
        torch.save({"format": FORMAT, **state}, file)


# ---------------------------------------------------------------------------------------------------------------------
# a whole model


def load_model(path, device="cpu", needs=()):
    """(model in eval mode, info) of a checkpoint, ours or released. Take it when you want to use a trained model.

    needs: the heads that you use, or ("csa_net",). All sizes are read from the tensors; info is as `read_weights`'s.
    Raises InputError where the model lacks a head, or with every name that is missing, left over or misshapen."""
    state, info = read_weights(path, MODELS, "checkpoint")
    # On the device "meta" tensors have no memory: a file cannot make us allocate more than it holds.
    with reading(path, "no model has these sizes"), torch.device("meta"):
        model = _build(state, info)
    _check_names(path, model.state_dict(), state)
    words = (info["vocab"] or "").rstrip("\n").count("\n") + 1
    if words > model.config.vocab_size:
        raise InputError(f"{path}: a vocabulary of {words} words, but {model.config.vocab_size} word embeddings")
    offers = model.config.heads if isinstance(model, FashionViL) else ("csa_net",)
    if not set(needs) <= set(offers):
        has = f"{info['task'] or info['layout']} (it has {', '.join(offers) or 'no heads'})"
        raise InputError(f"{path}: a checkpoint of {has}, expected one trained for a task with {', '.join(needs)}")
    model.to_empty(device=device)
    if DECODER in state:  # to_empty has made two tensors of the tied one
        model.heads["mlm"].decoder.weight = model.bert.embeddings.word_embeddings.weight
    model.load_state_dict(state)
    return model.eval(), info


def _build(state, info):
    """The model that the tensors of a checkpoint belong to, with random weights."""
    sizes, saved = read_sizes(state, info["kind"]), info["model_config"]
    if info["kind"] == "csa_net":
        hidden, categories = state["fusion_module.weight_classifier.0.weight"].shape
        n_masks, dim = state["fusion_module.masks.weight"].shape
        return CSANet(ModelConfig(**sizes), categories // 2, dim, n_masks, hidden)
    if "num_attention_heads" not in saved:
        if sizes["hidden_size"] % 64:  # the width of BERT's attention heads
            raise ValueError(f"nothing says the number of attention heads of {sizes['hidden_size']} units")
        sizes["num_attention_heads"] = sizes["hidden_size"] // 64
    for key in ("num_attention_heads", "dropout", "pac_scale"):  # no tensor tells these three
        if key in saved:
            if type(saved[key]) is not type(getattr(ModelConfig, key)) or saved[key] < 0:
                raise ValueError(f"{key} {shown(saved[key])}")
            sizes[key] = saved[key]
    return FashionViL(ModelConfig(**sizes))


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


def read_sizes(state, kind):
    """{field of ModelConfig: size} from the tensors of kind "fashionvil", "csa_net", "bert" or "resnet".

    No tensor tells the number of attention heads. Raises KeyError with the name of a tensor that is missing."""
    sizes, body = {}, {"fashionvil": ("image_encoder.", "bert."), "bert": ("bert.",)}.get(kind, ("image_encoder.",))
    if "image_encoder." in body:
        stages = [f"image_encoder.layer{n}." for n in (1, 2, 3, 4)]
        blocks = tuple(len({name.split(".")[2] for name in state if name.startswith(stage)}) for stage in stages)
        bottleneck = "image_encoder.layer1.0.conv3.weight" in state
        names = [name for name, resnet in RESNETS.items() if resnet == (blocks, bottleneck)]
        sizes["resnet"] = names[0] if names else f"{blocks} blocks a stage"
    if "bert." in body:
        sizes["num_hidden_layers"] = len({n.split(".")[3] for n in state if n.startswith("bert.encoder.layer.")})
    for field, (name, axis) in SIZE_OF.items():
        if name in state or name.startswith(body):
            sizes[field] = state[name].shape[axis]
    if kind == "fashionvil":
        found = {name.split(".")[1] for name in state if name.startswith("heads.")}
        sizes["heads"] = tuple(h for h in HEADS if h in found or (h == "contrastive" and "logit_scale" in state))
    return sizes


def _check_names(path, own, found):
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


# ---------------------------------------------------------------------------------------------------------------------
# the first weights of a new model


def initialise(model, init, bert="", resnet=""):
    """Fill a model that you have just built; returns lines that say what was loaded, what is new and what is left over.

    init: "random"; "pretrained" (ResNet from torch.hub or the file `resnet`, "random" for none; BERT from the folder
    or hub name `bert`); or a checkpoint, ours or released: image encoder, Transformer, and heads of equal shapes. A
    CSANet takes the image encoder, from a CSA-Net file everything. logit_scale always starts at 4 again.
    Raises InputError where a file cannot be had, is of another kind or does not fit."""
    if init == "random":
        return ["init: random weights"]
    is_fashionvil = isinstance(model, FashionViL)
    heads = ("heads", "proj_layer", "fusion_module", "logit_scale")
    if init != "pretrained":
        state, info = read_weights(init, ("fashionvil",) if is_fashionvil else MODELS, "init")
        state.pop("logit_scale", None)
        return [_fill(init, model, state, info, ("image_encoder", "bert"), heads)]
    report = ["image encoder: random weights"]
    if resnet != "random":
        path = resnet or _fetch_resnet(model.config.resnet)
        state, info = read_weights(path, ("resnet",), "resnet_file")
        report = [_fill(path, model, state, info, ("image_encoder",), () if is_fashionvil else heads)]
    if is_fashionvil:
        _check_tokenizer(bert, model.config.vocab_size)
        path = _bert_weights(bert)
        state, info = read_weights(path, ("bert",), "bert")
        _leave_out_padding(path, state, info, model.config.vocab_size)
        for name in ("position_embeddings", "token_type_embeddings"):  # the image side starts from the text's tables
            if f"bert.embeddings.{name}.weight" in state:
                state[f"bert.embeddings.{name}_visual.weight"] = state[f"bert.embeddings.{name}.weight"]
        report.append(_fill(path, model, state, info, ("bert",), ("bert.embeddings.projection", "bert.pooler", *heads)))
    return report


def _fill(path, model, state, info, required, optional):
    """Copy the parts of `state` that begin with `required`, and those that begin with `optional` where they fit."""

    def parts(tensors):  # "heads.itm", "bert.encoder", "bert.embeddings.projection", "image_encoder", ...
        groups = {}
        for name, tensor in tensors.items():
            groups.setdefault(re.match(r"(heads|bert\.embeddings|bert)\.\w+|\w*", name)[0], {})[name] = tensor
        return groups

    loaded, new, theirs = [], [], parts(state)
    for part, own in parts(model.state_dict()).items():
        if not part.startswith(required + optional):
            continue
        found = theirs.pop(part, {})
        if not part.startswith(optional):
            _check_names(path, own, found)
        if {name: tensor.shape for name, tensor in own.items()} != {name: t.shape for name, t in found.items()}:
            new.append(f"{part} (the file's is of another shape)" if found else part)
            continue
        for name, tensor in own.items():
            tensor.copy_(found[name])
        loaded.append(f"{part} ({len(own)})")
    left = [f"{part} ({len(tensors)})" for part, tensors in (theirs | info["set_aside"]).items()]
    lists = {"loaded": loaded, "new": new, "left over": left}
    return f"{path}: " + "; ".join(f"{what} {', '.join(names)}" for what, names in lists.items() if names)


def _fetch_resnet(name):
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


# ---------------------------------------------------------------------------------------------------------------------
# BERT's folder and the vocabulary

BERT_WEIGHTS = [f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]
# Our tokenizer is lower-case BERT WordPiece. Where BERT's own files speak of theirs, they may say this.
TOKENIZER = {
    "tokenizer_class": (None, "PreTrainedTokenizerFast", "BertTokenizerFast", "BertTokenizer"),
    "do_lower_case": (True,),
    "do_basic_tokenize": (True,),
    "tokenize_chinese_chars": (True,),
    "strip_accents": (None, True),
    "normalizer.type": ("BertNormalizer",),
    "normalizer.lowercase": (True,),
    "normalizer.clean_text": (True,),
    "normalizer.handle_chinese_chars": (True,),
    "normalizer.strip_accents": (None, True),
    "pre_tokenizer.type": ("BertPreTokenizer",),
    "model.type": ("WordPiece",),
    "model.continuing_subword_prefix": ("##",),
}


def transformer_sizes(bert, size):
    """{field of ModelConfig: size} of the BERT folder or hub name `bert`; where it is "", of model.SIZES[size].

    Raises InputError where its weights and config.json disagree, or config.json tells of another model than BERT."""
    if not bert:
        return SIZES[size]
    path, weights = _bert_file(bert, "config.json"), _bert_weights(bert)
    with reading(path, "cannot be read"):
        config = dict(json.loads(path.read_text(encoding="utf-8-sig")))
    with reading(weights, "not a BERT"):
        sizes = read_sizes(read_weights(weights, ("bert",), "bert")[0], "bert")
    fixed = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute", "layer_norm_eps": 1e-12}
    for key, expected in (sizes | fixed).items():
        if config.get(key, expected) != expected:
            found = shown(config[key])
            raise InputError(f"{path}: {key}: found {found}, expected {expected!r}, as {weights.name} needs it")
    heads, hidden = config.get("num_attention_heads"), sizes["hidden_size"]
    if type(heads) is not int or heads < 1 or hidden % heads:
        raise InputError(f"{path}: num_attention_heads: found {shown(heads)}, expected a divisor of {hidden}")
    return {**sizes, "num_attention_heads": heads}


def checksum(model):
    """A short text that stands for a model's weights."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_labels(path, theirs, ours):
    """Raise InputError where a number means one thing in the checkpoint `path` and another in the data.

    theirs and ours: {what: names in the order of their numbers}; what only one of them names is not compared."""
    for what in theirs.keys() & ours.keys():
        for number, (name, own) in enumerate(zip(theirs[what], ours[what], strict=False)):
            if name != own:
                found = f"{what}: number {number} is {shown(name)} in the checkpoint, but {shown(own)} in the data"
                raise InputError(f"{path}: {found}; use the data (labels.json) of its training, or train anew")


def vocabulary(config, init):
    """The text of vocab.txt, one token a line: the first that exists of these places, best first.

    The file `config.vocab`; the checkpoint `init`, where it is one and holds a vocabulary; the folder `config.bert`;
    DATA_ROOT/vocab.txt; DATA_ROOT/../bert-base-uncased/vocab.txt; the Hugging Face hub. Raises InputError, also where
    `config.vocab` is another vocabulary than the checkpoint's."""
    own = None if init in ("random", "pretrained") else read_weights(init, MODELS, "init")[1]["vocab"]
    if config.vocab:
        text = _vocab_text(Path(config.vocab))
        pairs = itertools.zip_longest(text.splitlines(), (own or text).splitlines())
        for number, (word, theirs) in enumerate(pairs):
            if word != theirs:
                found = f"token {number} is {word!r}, but {theirs!r} in the vocabulary of {init}"
                raise InputError(f"vocab: {config.vocab}: {found}; leave --vocab out to take that one")
        return text
    if own is not None:
        return own
    if not (config.bert and Path(config.bert).is_dir()):
        for folder in (Path(config.data_root), Path(config.data_root, "..", "bert-base-uncased")):
            if (folder / "vocab.txt").exists():
                return _vocab_text(folder / "vocab.txt")
    text = _vocab_text(_bert_file(config.bert, "vocab.txt", "tokenizer.json"))
    _check_tokenizer(config.bert, text.rstrip("\n").count("\n") + 1)
    return text


def _check_tokenizer(bert, n_words):
    """Raise InputError where BERT's own files say that texts are read otherwise than by our tokenizer of `n_words`."""
    names = ("config.json", "tokenizer_config.json", "tokenizer.json", "added_tokens.json")
    paths = [_bert_file(bert, name, optional=True) for name in names if bert]  # "" is bert-base-uncased, which is known
    for path in filter(None, paths):
        with reading(path, "cannot be read"):
            content = json.loads(path.read_text(encoding="utf-8-sig"))
            said = dict(content)
            for part, inner in content.items():
                if inner is None or isinstance(inner, dict):  # "normalizer": null is a tokenizer without one
                    said |= {f"{part}.{key}": value for key, value in (inner or {"type": None}).items()}
            added = content if path.name == "added_tokens.json" else {}
            added |= {token["content"]: token["id"] for token in content.get("added_tokens", [])}
            added |= {token["content"]: int(i) for i, token in content.get("added_tokens_decoder", {}).items()}
            new = {token: number for token, number in added.items() if number >= n_words}
        for key, allowed in TOKENIZER.items():
            if key in said and said[key] not in allowed:
                found = f"found {shown(said[key])}, expected {allowed[-1]!r}"
                raise InputError(f"{path}: {key}: {found}: our tokenizer is lower-case WordPiece; take an uncased BERT")
        for token, number in new.items():
            found = f"found number {number}, expected less than the vocabulary's {n_words} words"
            raise InputError(f"{path}: added token {shown(token)}: {found}; take a BERT without added tokens")


def _leave_out_padding(path, state, info, words):
    """Cut BERT's word table to `words` rows. Raises InputError unless the others pad it to a multiple of 8 to 128."""
    rows = len(state[WORDS])
    if rows not in [math.ceil(words / multiple) * multiple for multiple in (1, 8, 16, 32, 64, 128)]:
        cure = "set --vocab=FILE to the vocab.txt of this BERT"
        raise InputError(f"{path}: {rows} rows in the word table, but {words} words in the vocabulary; {cure}")
    if rows > words:
        info["set_aside"]["padding of the word table"] = state[WORDS][words:]
        for name in {WORDS, DECODER, "heads.mlm.decoder.bias"} & state.keys():
            state[name] = state[name][:words]


def _vocab_text(path):
    """The text of vocab.txt from such a file or from a tokenizer.json, whose ids must be 0, 1, 2, ..."""
    with reading(path, "no WordPiece vocabulary"):
        text = path.read_text(encoding="utf-8-sig")
        if not_the_file(path):
            raise InputError(f"{path}: {not_the_file(path)}")
        if path.name == "tokenizer.json":
            ids = json.loads(text)["model"]["vocab"]
            if sorted(ids.values()) != list(range(len(ids))):
                raise ValueError("expected ids 0, 1, 2, ...")
            text = "".join(f"{token}\n" for token in sorted(ids, key=ids.get))
    # Our tokenizer makes every text lower-case, so it would take a cased vocabulary's "Dress" for an unknown word.
    cased = re.search(r"^[^\[\n]*[A-Z].*$", text, re.MULTILINE)
    if cased:
        found = f"found the word {shown(cased[0])}, expected lower-case words alone"
        raise InputError(f"{path}: {found}; take the vocab.txt of an uncased BERT")
    return text


def _bert_weights(bert):
    """Path of BERT's file of weights, or of the index of its several files, all of which are then there."""
    path = _bert_file(bert, *BERT_WEIGHTS)
    for shard in sorted(set(read_index(path).values())):
        _bert_file(bert, shard)
    return path


def _bert_file(bert, *names, optional=False):
    """Path of the first of `names` in the folder `bert`, else fetched from the Hugging Face hub ("": BERT-base).

    None where there is no such file and it is optional, else InputError."""
    bert = bert or "bert-base-uncased"
    is_folder = Path(bert).is_dir() or bert.startswith(("/", ".", "~")) or bert.count("/") > 1
    for name in names:
        path = Path(bert, name) if is_folder else _from_hub(bert, name)
        if path and path.is_file():
            return path
    if optional:
        return None
    raise InputError(f"bert: no {' or '.join(names)} in folder {bert}, expected a Hugging Face BERT folder")


def _from_hub(repository, name):
    """Path of a file that was fetched from the Hugging Face hub; None where the hub has the repository without it."""
    import huggingface_hub  # only where something is fetched

    try:
        return Path(huggingface_hub.hf_hub_download(repository, name))
    except Exception as error:  # of the network, the disk, the hub
        if type(error).__name__ == "RemoteEntryNotFoundError":
            return None
        cure = f"put the files of https://huggingface.co/{repository} into a folder and set --bert=FOLDER"
        cure += ", or start with --init=random and set --vocab=FILE to its vocab.txt"
        raise InputError(f"bert: {name} of {repository!r} could not be fetched ({cause_of(error)}): {cure}") from None


# ---------------------------------------------------------------------------------------------------------------------
# a run that goes on


def find_resume(resume, run_dir, model=None):
    """The whole dict of the checkpoint that the setting `resume` means, with its "path"; None for a fresh start.

    "": none; "auto": RUN_DIR/last.pt if it exists; else a file. Take it, and then `restore`, to go on with a run.
    Raises InputError where the file is broken, holds no optimizer state or does not fit `model`."""
    path = Path(run_dir, "last.pt") if resume == "auto" else Path(resume)
    if not resume or (resume == "auto" and not path.exists()):
        return None
    with reading(path, "cannot be resumed"):
        file = copy.deepcopy(read_file(path))  # a copy in memory, since the file may be written over
    if "format" not in file or "optimizer" not in file:
        raise InputError(f"{path}: holds no optimizer state, so it cannot be resumed; --init={path} starts from it")
    if model is not None:
        _check_names(path, model.state_dict(), file["model"])
    return {**file, "path": str(path)}


def restore(state, config, model, optimizer, scaler):
    """Put what `find_resume` found into model, optimizer and scaler; returns lines that say which settings differ.

    Learning rates and weight decay are `config`'s. Raises InputError where the file does not fit."""
    rates = [(group["base_lr"], group["weight_decay"]) for group in optimizer.param_groups]
    with reading(state["path"], "cannot be resumed"):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # only float16 has one, and the earlier run may have had another dtype
            scaler.load_state_dict(state["scaler"])
        if state["step"] > config.max_steps:
            raise ValueError(f"{state['step']} updates done, but max_steps is {config.max_steps}")
    for group, (base_lr, decay) in zip(optimizer.param_groups, rates, strict=True):
        group["base_lr"], group["weight_decay"] = base_lr, decay
    report, now = [f"{state['path']}: resumed after update {state['step']}"], vars(config)
    for name, value in state.get("config", {}).items():
        if name in now and now[name] != value and name not in ("out_dir", "resume"):
            report.append(f"resume: {name} was {shown(value)}, is {shown(now[name])} from here on")
    return report
