"""Weights in files: ours, the authors' released ones, BERT and ResNet. Reading a file never runs code from it.

`save` writes a checkpoint. `load_model` gives a model to use. `read_start` and `initialise` give a new model its first
weights. `read_weights` gives the tensors alone. runs.py goes on with a stopped run. A damaged, hostile or foreign file
ends in InputError, one line that names the file. Reading takes about as much memory as the file has bytes.

Our checkpoint is a dict. Every one has "format" (1), "kind" (one of KINDS), "model" (its state dict), "config" (all
settings of the run), "step" (updates done), "best" (the metric that selects) and "n_items" (of the training data). A
model also has "task", "model_config", "vocab" (text of vocab.txt) and "labels" (what numbers mean,
`annotations.label_names`, and in pre-training the checksum of the image tokenizer). For a resume, last.pt adds
"optimizer", "scaler", "parts" (each process's sums for the next log line), "lasting", "skipped_updates" and
"validation_due"."""

import json
import math
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from model import HEADS, RESNETS, SIZES, CSANet, FashionViL, ModelConfig
from plumbing import bert
from plumbing.files import cause_of, reading, replacing, shown
from plumbing.settings import InputError

FORMAT = 1
MODELS = ("fashionvil", "csa_net")
KINDS = (*MODELS, "image_tokenizer")
FIELDS = dict(kind=str, task=str, model=dict, model_config=dict, config=dict, vocab=str, step=int, labels=dict)
WORDS, DECODER = "bert.embeddings.word_embeddings.weight", "heads.mlm.decoder.weight"  # one tensor under two names

# beginnings of names: (ours, the authors'); the first row that fits is taken
NAMES = (
    ("image_encoder.conv1.", "image_encoder.model.0."),  # theirs is an nn.Sequential of torchvision's parts
    ("image_encoder.bn1.", "image_encoder.model.1."),
    *((f"image_encoder.layer{n}.", f"image_encoder.model.{n + 3}.") for n in (1, 2, 3, 4)),
    ("bert.", "model.bert."),
    ("heads.itm.", "model.heads.itm.seq_relationship."),
    ("heads.mlm.decoder.bias", "model.heads.mlm.bias"),
    ("heads.mlm.decoder.", "model.heads.mlm.decoder."),
    ("heads.mlm.", "model.heads.mlm.transform."),
    ("heads.mpfc.decoder.", "model.heads.mpfc.1."),
    ("heads.mpfc.", "model.heads.mpfc.0."),
    ("heads.pac.", "model.heads.pac."),
    ("heads.recognition.decoder.", "model.classifier.1."),
    ("heads.recognition.", "model.classifier.0."),
    ("logit_scale", "model.contrastive_norm.norm_s"),  # pre-training
    ("logit_scale", "model.norm_layer.norm_s"),  # contrastive and composition
    ("logit_scale", "norm_layer.norm_s"),  # CSA-Net, which has no "model."
)
# beginnings of names by kind of file: (theirs, ours)
RENAME = {kind: [(theirs, ours) for ours, theirs in NAMES] for kind in MODELS} | {
    "bert": [
        ("cls.predictions.bias", "heads.mlm.decoder.bias"),
        ("cls.predictions.decoder.", "heads.mlm.decoder."),
        ("cls.predictions.transform.", "heads.mlm."),
        *((f"{part}.", f"bert.{part}.") for part in ("embeddings", "encoder", "pooler")),  # without their "bert."
    ],
    "resnet": [("", "image_encoder.")],
    "image_tokenizer": [],
}
# Files hold these and the model has no use for them: the image tokenizer, an objective that the final recipe does not
# use, BERT's next-sentence head, ResNet's classifier, and counters of positions.
LEFT_OVER = r"(model\.image_tokenizer|model\.heads\.mpfr|cls\.seq_relationship|fc)\.|((?:.*\.)?position_ids)$"
# (a name that only this layout has, layout, kind); the first row found is taken
LAYOUTS = (
    ("proj_layer.weight", "csa_net", "csa_net"),
    ("model.classifier.1.weight", "classification", "fashionvil"),
    ("model.contrastive_norm.norm_s", "pretraining", "fashionvil"),
    ("model.norm_layer.norm_s", "contrastive or composition", "fashionvil"),
    ("quantize.embedding.weight", "vqvae", "image_tokenizer"),
    ("embeddings.word_embeddings.weight", "bert", "bert"),
    ("layer1.0.conv1.weight", "resnet", "resnet"),
)


def save(path, state):
    """Write our checkpoint `state` (without "format") under a temporary name, and then give it the name `path`.

    Raises InputError on a full disk, a missing folder or permission; an older file at `path` is then unharmed."""
    with replacing(path) as file:
        torch.save({"format": FORMAT, **state}, file)


# ---- a whole model ---------------------------------------------------------------------------------------------------


def load_model(path, device="cpu", needs=()):
    """(model in eval mode, info) of a checkpoint, ours or released. Take it when you want to use a trained model.

    needs: the heads that you use, or ("csa_net",). All sizes are read from the tensors; info is as `read_weights`'s.
    Raises InputError where the model lacks a head, or with every name that is missing, left over or misshapen."""
    state, info = read_weights(path, MODELS, "checkpoint")
    sizes = read_sizes(path, state, info)
    # On the device "meta" tensors have no memory: a file cannot make us allocate more than it holds.
    with reading(path, "no model has these sizes"), torch.device("meta"):
        if info["kind"] == "csa_net":
            hidden, categories = state["fusion_module.weight_classifier.0.weight"].shape
            n_masks, dim = state["fusion_module.masks.weight"].shape
            model = CSANet(ModelConfig(**sizes), categories // 2, dim, n_masks, hidden)
        else:
            model = FashionViL(ModelConfig(**sizes))
    check_names(path, model.state_dict(), state)
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
        kind, saved, sizes = info["kind"], info["model_config"], {}
        if "image_encoder" in PARTS[kind]:
            stages = [f"image_encoder.layer{n}." for n in (1, 2, 3, 4)]
            blocks = tuple(len({name.split(".")[2] for name in state if name.startswith(stage)}) for stage in stages)
            bottleneck = "image_encoder.layer1.0.conv3.weight" in state
            names = [name for name, resnet in RESNETS.items() if resnet == (blocks, bottleneck)]
            sizes["resnet"] = names[0] if names else f"{blocks} blocks a stage"
        if "bert" in PARTS[kind]:
            sizes["num_hidden_layers"] = len({n.split(".")[3] for n in state if n.startswith("bert.encoder.layer.")})
        for field, (name, axis) in SIZE_OF.items():
            if name in state or name.startswith(PARTS[kind]):
                sizes[field] = state[name].shape[axis]
        if kind != "fashionvil":
            return sizes
        heads = {name.split(".")[1] for name in state if name.startswith("heads.")}
        sizes["heads"] = tuple(h for h in HEADS if h in heads or (h == "contrastive" and "logit_scale" in state))
        if "num_attention_heads" not in saved:
            if sizes["hidden_size"] % 64:  # the width of BERT's attention heads
                raise ValueError(f"nothing says the number of attention heads of {sizes['hidden_size']} units")
            sizes["num_attention_heads"] = sizes["hidden_size"] // 64
        for key in ("num_attention_heads", "dropout", "pac_scale"):  # no tensor tells these three
            if key in saved:
                if type(saved[key]) is not type(getattr(ModelConfig, key)) or saved[key] < 0:
                    raise ValueError(f"{key} {shown(saved[key])}")
                sizes[key] = saved[key]
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


# ---- the first weights of a new model --------------------------------------------------------------------------------


class Start(NamedTuple):
    """What a new model starts from."""

    sizes: dict  # {field of ModelConfig: value}
    vocab: str  # text of the checkpoint's vocab.txt, None where there is none
    trained: dict  # settings of the run that wrote the checkpoint, {} where there is none
    files: list  # (path, state dict, info) of each file with weights, which `initialise` empties


def read_start(config, uses_bert=True):
    """The `Start` that the settings of a stage mean. Each file of weights is read here, and only here.

    config.init: "random"; "pretrained" (ResNet from torch.hub or the file `resnet_file`, "random" for none; BERT from
    the folder or hub name `bert`); or a checkpoint, ours or released. A checkpoint brings its sizes. Else they are
    those of the BERT folder, or model.SIZES[config.size]. uses_bert: False for a CSANet.
    Raises InputError where a file cannot be had, is of another kind, or is not what its config.json says."""
    if config.init not in ("random", "pretrained"):
        state, info = read_weights(config.init, ("fashionvil",) if uses_bert else MODELS, "init")
        return Start(read_sizes(config.init, state, info), info["vocab"], info["config"], [(config.init, state, info)])
    sizes, files = {"resnet": config.resnet, "width": config.width, **SIZES[config.size]}, []
    if config.init == "pretrained" and config.resnet_file != "random":
        path = config.resnet_file or _fetch_resnet(config.resnet)
        files.append((path, *read_weights(path, ("resnet",), "resnet_file")))
    if uses_bert and (config.init == "pretrained" or config.bert):
        path = bert.find_weights(config.bert)
        state, info = read_weights(path, ("bert",), "bert")
        if config.bert:
            found = read_sizes(path, state, info)
            sizes |= {**found, "num_attention_heads": bert.count_attention_heads(config.bert, found)}
        if config.init == "pretrained":
            files.append((path, state, info))
    return Start(sizes, None, {}, files)


NOT_IN_BERT = ("bert.embeddings.projection", "bert.pooler")  # parts of our Transformer that a file of BERT may lack


def initialise(model, start):
    """Fill a model that you have just built from a `Start`; returns lines that say what was loaded, left over and new.

    A checkpoint gives image encoder, Transformer, and heads of equal shapes. logit_scale always starts at 4 again. The
    image side's tables of positions and types start as copies of BERT's. Raises InputError where a file does not fit.
    """
    if not start.files:
        return ["init: random weights"]
    ours, report = _by_part(model.state_dict()), []
    for path, state, info in start.files:
        state.pop("logit_scale", None)
        if info["kind"] == "bert":
            _leave_out_padding(path, state, info, model.config.vocab_size)
            for name in ("position_embeddings", "token_type_embeddings"):
                if f"bert.embeddings.{name}.weight" in state:
                    state[f"bert.embeddings.{name}_visual.weight"] = state[f"bert.embeddings.{name}.weight"]
        theirs, loaded = _by_part(state), []
        for part in list(ours):
            own, found = ours[part], theirs.get(part, {})
            if part.startswith(PARTS[info["kind"]]) and not (info["kind"] == "bert" and part in NOT_IN_BERT):
                check_names(path, own, found)
            if {name: tensor.shape for name, tensor in own.items()} == {name: t.shape for name, t in found.items()}:
                for name, tensor in own.items():
                    tensor.copy_(found[name])
                loaded.append(part)
                del ours[part], theirs[part]
        left = ", ".join([*theirs, *info["set_aside"]]) or "nothing"
        sizes = "; its sizes count, not --size, --resnet and --width" if info["kind"] in MODELS else ""
        report.append(f"{path}: loaded {', '.join(loaded)}; left over {left}{sizes}")
    start.files.clear()  # their tensors can take as much memory as the model
    return [*report, f"new weights: {', '.join(ours) or 'none'}"]


def _by_part(state):
    """{part: its state dict}: "heads.itm", "bert.encoder", "bert.embeddings.projection", "image_encoder", ..."""
    parts = {}
    for name, tensor in state.items():
        parts.setdefault(re.match(r"(heads|bert\.embeddings|bert)\.\w+|\w*", name)[0], {})[name] = tensor
    return parts


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


def _leave_out_padding(path, state, info, words):
    """Cut BERT's word table to `words` rows. Raises InputError unless the others pad it to a multiple of 8 to 128."""
    rows = len(state[WORDS])
    if rows not in [math.ceil(words / multiple) * multiple for multiple in (1, 8, 16, 32, 64, 128)]:
        cure = "set --vocab=FILE to the vocab.txt of this BERT"
        raise InputError(f"{path}: {rows} rows in the word table, but {words} words in the vocabulary; {cure}")
    if rows > words:
        info["set_aside"][f"{rows - words} padding rows of the word table"] = state[WORDS][words:]
        for name in {WORDS, DECODER, "heads.mlm.decoder.bias"} & state.keys():
            state[name] = state[name][:words]


# ---- what numbers mean -----------------------------------------------------------------------------------------------


def check_labels(path, theirs, ours):
    """Raise InputError where a number means one thing in the checkpoint `path` and another in the data.

    theirs and ours: {what: names in the order of their numbers}; what only one of them names is not compared."""
    for what in theirs.keys() & ours.keys():
        for number, (name, own) in enumerate(zip(theirs[what], ours[what], strict=False)):
            if name != own:
                found = f"{what}: number {number} is {shown(name)} in the checkpoint, but {shown(own)} in the data"
                raise InputError(f"{path}: {found}; use the data (labels.json) of its training, or train anew")


# ---- tensors under our names -----------------------------------------------------------------------------------------


def read_weights(path, kinds=None, setting=""):
    """(state dict under our names, info) of any file of weights. Take it when you need the tensors and no model.

    info: "kind" (one of KINDS, "bert" or "resnet"), "layout" ("ours" or the released one's), "task", "step" and
    "vocab" (None where the file says none), "config", "model_config" and "labels" ({} there), and "set_aside" ({what of
    LEFT_OVER: its tensors}). Tensors stay in the file until they are used, so copy what must outlive it.
    Raises InputError where the file claims more than it has, or is none of `kinds` as the setting `setting` needs."""
    places = bert.read_index(path)
    paths = [Path(path).with_name(name) for name in sorted(set(places.values()))] or [Path(path)]
    file = {}
    for one in paths:
        file |= read_safetensors(one) if one.suffix == ".safetensors" else read_file(one)
    lost = places.keys() - file.keys()
    if lost:
        raise InputError(f"{path}: lists {len(places)} tensors, but its files lack {len(lost)}, as {shown(min(lost))}")
    is_ours = "format" in file
    parts = [file[key] for key in ("model", "state_dict", "model_state_dict") if isinstance(file.get(key), dict)]
    state = parts[0] if parts else file
    for name, tensor in state.items():
        if type(name) is not str or not re.fullmatch(r"[\w.]{1,200}", name) or not isinstance(tensor, torch.Tensor):
            found = f"{shown(name)}, a {type(tensor).__name__}"
            raise InputError(f"{path}: found {found}, expected names of parameters and tensors alone")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise InputError(f"{path}: {name} is not a plain tensor")
    # torch.compile and DistributedDataParallel put these before names.
    state = {name.replace("_orig_mod.", "").removeprefix("module."): tensor for name, tensor in state.items()}
    info = {"layout": "ours", "set_aside": {}}
    info |= {key: file.get(key) if is_ours else None for key in ("kind", "task", "step", "vocab")}
    info |= {key: file.get(key, {}) if is_ours else {} for key in ("config", "model_config", "labels")}
    with reading(path, "cannot be loaded"):
        if not is_ours:
            layouts = [row for row in LAYOUTS if row[0] in state or f"bert.{row[0]}" in state]
            if not layouts:
                found = ", ".join(list(state)[:3]) or "no names"
                raise InputError(
                    f"{path}: found {found}, expected those of FashionViL, CSA-Net, BERT, ResNet or VQ-VAE"
                )
            _, info["layout"], info["kind"] = layouts[0]
            info["model_config"] = _attention_heads(file.get("config"))
            for name in list(state):
                found = re.match(LEFT_OVER, name)
                if found:
                    info["set_aside"].setdefault(found[1] or found[2], {})[name] = state.pop(name)
            state = rename(state, RENAME[info["kind"]])
            if info["kind"] in ("bert", "resnet"):
                _add_unwritten(state)
        if {DECODER, WORDS} <= state.keys() and not torch.equal(state[DECODER], state[WORDS]):
            raise ValueError(f"{DECODER} and {WORDS} differ, but are one tensor in the model")
    # A few bytes can pose as any number of tensors, where all of them are views of the same memory.
    if sum(tensor.nbytes for name, tensor in state.items() if name != DECODER) > sum(map(os.path.getsize, paths)):
        raise InputError(f"{path}: its tensors claim more bytes than the file has")
    if kinds and info["kind"] not in kinds:
        raise InputError(f"{setting}: {path}: {info['kind']} weights, expected {' or '.join(kinds)}")
    return state, info


def _attention_heads(config):
    """{"num_attention_heads": n} from wherever it stands in a released file's nested config, or {}."""
    todo, seen = [config], set()
    while todo:
        item = todo.pop(0)
        if isinstance(item, dict) and id(item) not in seen:
            seen.add(id(item))  # a few bytes can put one dict into endlessly many places
            if "num_attention_heads" in item:
                return {"num_attention_heads": item["num_attention_heads"]}
            todo.extend(item.values())
    return {}


def rename(state, rows):
    """`state` with the first of the rows (old beginning, new beginning) that fits applied to each name.

    Old BERT files call LayerNorm's parameters gamma and beta. Raises ValueError where one tensor's two names differ."""
    renamed = {}
    for name, tensor in state.items():
        old, new = next((row for row in rows if name.startswith(row[0])), ("", ""))
        new_name = new + name.removeprefix(old)
        new_name = new_name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if new_name in renamed and not tensor.is_meta and not torch.equal(renamed[new_name], tensor):
            raise ValueError(f"{name} and another name of {new_name} differ, but are one tensor in the model")
        renamed[new_name] = tensor
    return renamed


def _add_unwritten(state):
    """Add to `state` what other programs leave out: the tied name, and the counters of ResNets of before 2018."""
    if any(name.startswith("heads.mlm.") for name in state):
        state.setdefault(DECODER, state[WORDS])
    for name in list(state):
        if name.endswith("running_mean"):
            state.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))


# ---- bytes -----------------------------------------------------------------------------------------------------------


def read_file(path):
    """The dict in a file of torch.save, ours (checked against FIELDS) or another: what `read_weights` is made from.

    Its tensors stay in the file, which must not change while they are in use. Nothing in the file is run."""
    zipped = is_zip(path)
    with reading(path, "not a checkpoint (a file of torch.save), or damaged"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unusual pickles
        try:  # mmap checks each tensor against the file's end; files that are no zip cannot be mapped
            file = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            if found is None:
                raise
            cure = f"; python -m tools.weights --convert {path} OUT takes the tensors alone" if zipped else ""
            raise InputError(f"{path}: holds a pickled {found[1]}, expected tensors, numbers, text{cure}") from None
    if not isinstance(file, dict):
        raise InputError(f"{path}: holds a {type(file).__name__}, expected a dict of tensors or a checkpoint")
    if "format" not in file:
        return file
    if type(file["format"]) is not int or file["format"] != FORMAT:
        found = shown(file["format"])
        raise InputError(f"{path}: checkpoint format {found}, expected {FORMAT}; read it with the code that wrote it")
    for key, expected in FIELDS.items():
        if key in file and not isinstance(file[key], expected):
            raise InputError(f"{path}: {key}: found {shown(file[key])}, expected a {expected.__name__}")
    if file.get("kind") == "tokenizer":  # the image tokenizer's name in older files
        file["kind"] = "image_tokenizer"
    if file.get("kind") not in KINDS or "model" not in file:
        raise InputError(f"{path}: kind {file.get('kind')!r}, expected {' or '.join(KINDS)}, and a 'model'")
    return file


def is_zip(path):
    """Whether a file is a whole zip of torch.save. False: what torch wrote before 1.6, or no checkpoint at all."""
    if Path(path).is_dir():
        raise InputError(f"{path}: a folder, expected a checkpoint file (a BERT folder goes to --bert)")
    with reading(path, "cannot be read, or is cut short"):
        with open(path, "rb") as file:
            size, head = os.fstat(file.fileno()).st_size, file.read(4)
        if not size:
            raise InputError(f"{path}: an empty file, expected a checkpoint")
        if head != b"PK\3\4":
            return False
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if sum(Path(entry.filename).name == "data.pkl" for entry in entries) != 1:
                raise InputError(f"{path}: a zip without data.pkl, expected a checkpoint (a file of torch.save)")
            # torch.save neither compresses nor overlaps entries, so nothing that is read can be larger than the file.
            if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > size:
                raise InputError(f"{path}: a zip whose entries claim more than the file holds, expected a checkpoint")
            # Nothing else shows a changed bit of a weight. Checksums are 0 where torch was told to write none.
            if any(entry.CRC for entry in entries) and archive.testzip():
                raise InputError(f"{path}: damaged, a checksum is wrong; copy or download it again")
    return True


def read_safetensors(path):
    """{name: tensor} of a safetensors file: 8-byte length, JSON header, then raw bytes without gaps or overlaps.

    Source: the format's description at github.com/huggingface/safetensors."""
    tensors = {}
    with reading(path, "not a safetensors file, or damaged"):
        data = bytearray(Path(path).read_bytes())
        if not data:
            raise ValueError("an empty file")
        start = end = 8 + int.from_bytes(data[:8], "little")
        if start > len(data):
            raise ValueError(f"a header of {start - 8} bytes in a file of {len(data)}")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (begin, stop) = SAFETENSORS[entry["dtype"]], entry["shape"], entry["data_offsets"]
            n = math.prod(shape)
            if start + begin != end or stop - begin != n * dtype.itemsize or start + stop > len(data):
                found = f"{entry['dtype']} {shape} does not fit into offsets {begin} to {stop}"
                raise ValueError(f"{name}: {found}, expected to begin at {end - start}")
            values = torch.frombuffer(data, dtype=dtype, count=n, offset=end) if n else torch.empty(0, dtype=dtype)
            tensors[name] = values.view(shape)
            end = start + stop
        if end != len(data):
            raise ValueError(f"{len(data) - end} bytes at the end belong to no tensor")
    return tensors


SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SAFETENSORS |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
