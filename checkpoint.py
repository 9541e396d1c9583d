"""Weights in files: ours (save, read, resume), the authors' released ones, BERT and ResNet. No file ever runs code.

Our checkpoint: {"format": 1, "kind": "fashionvil" | "csa_net" | "tokenizer", "task", "model": state dict,
"model_config", "config", "vocab": text of vocab.txt, "step", and what a resume needs: "optimizer", "scaler", ...}."""

import contextlib
import copy
import dataclasses
import json
import math
import os
import pickle
import re
import reprlib
import warnings
import zipfile
from pathlib import Path

import torch

from common import replacing
from model import HEADS, RESNETS, CSANet, FashionViL, ModelConfig
from settings import InputError

FORMAT = 1
KINDS = ("fashionvil", "csa_net", "tokenizer")
FIELDS = {"kind": str, "task": str, "model": dict, "model_config": dict, "config": dict, "vocab": str, "step": int}

# ---------------------------------------------------------------------------------------------------------------------
# writing and reading


def save(path, state):
    """Write our checkpoint `state` (without "format"): aside in the same folder, flushed to disk, then renamed.

    Raises InputError on a full disk, a missing folder or permission: the last whole file stays and no half one."""
    _write(path, {"format": FORMAT, **state})


def _write(path, content):
    with replacing(path) as file:
        torch.save(content, file)


def _cause(error):
    """One line of an exception's text; of torch's long advice about weights_only, the part that says what was found."""
    text = getattr(error, "strerror", None) or str(error).partition("WeightsUnpickler error:")[2] or str(error)
    return text.strip().partition("\n")[0][:300] or type(error).__name__


def _shown(value):
    return reprlib.repr(value)[:80]  # bounded, where a few bytes of a file can have an endless text


@contextlib.contextmanager
def _reading(path, what):
    """A damaged or hostile file can raise anything in its reader: make it one InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{path}: {what}: {_shown(error.args[0])} is missing") from None
    except Exception as error:
        raise InputError(f"{path}: {what}: {_cause(error)}") from None


def read(path, mmap=False):
    """The dict in a file of torch.save, tensors on the CPU: ours, or someone else's as it stands.

    mmap: tensors stay in the file until touched; for a short look only, as the file may be replaced meanwhile.
    Raises InputError on whatever is no checkpoint; nothing in the file is run, memory stays near its size."""
    zipped = _is_zip(path)
    with _reading(path, "not a checkpoint (a file of torch.save), or damaged"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unusual pickles
        try:  # mapped in any case, for then each tensor is checked against the file's end; older files cannot be
            file = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            if found is None:
                raise
            cure = f"; python -m tools.weights --convert {path} OUT takes the tensors alone" if zipped else ""
            raise InputError(f"{path}: holds a pickled {found[1]}, expected tensors, numbers, text{cure}") from None
        if not isinstance(file, dict):
            raise InputError(f"{path}: holds a {type(file).__name__}, expected a dict of tensors or a checkpoint")
        if zipped and not mmap:
            file = copy.deepcopy(file)
    if "format" not in file:
        return file
    if type(file["format"]) is not int or file["format"] != FORMAT:
        found = _shown(file["format"])
        raise InputError(f"{path}: checkpoint format {found}, expected {FORMAT}; read it with the code that wrote it")
    for key, kind in FIELDS.items():
        if not isinstance(file.get(key, kind()), kind):
            raise InputError(f"{path}: {key}: found {_shown(file[key])}, expected a {kind.__name__}")
    if file.get("kind") not in KINDS or "model" not in file:
        raise InputError(f"{path}: kind {file.get('kind')!r}, expected {' or '.join(KINDS)}, and a 'model'")
    return file


def _is_zip(path):
    """Whether a file is a zip of torch.save; False: what torch wrote before 1.6, or no checkpoint at all."""
    if Path(path).is_dir():
        raise InputError(f"{path}: a folder, expected a checkpoint file (a BERT folder goes to --bert)")
    with _reading(path, "cannot be read, or is cut short"):
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
            # torch.save neither compresses nor overlaps; so nothing that is read can be larger than the file
            if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > size:
                raise InputError(f"{path}: a zip whose entries claim more than the file holds, expected a checkpoint")
            # a changed bit of a weight shows in no other way; torch can be told to write no checksums (0)
            if any(entry.CRC for entry in entries) and archive.testzip():
                raise InputError(f"{path}: damaged, a checksum is wrong; copy or download it again")
    return True


def find_resume(resume, run_dir, model=None):
    """The checkpoint that the setting `resume` asks for, as `read` gives it, or None for a fresh start.

    "": none; "auto": RUN_DIR/last.pt where there is one (it is whole, for it gets its name last); else a file.
    Raises InputError where it is broken, has no optimizer or does not fit `model`, rather than quietly start again."""
    path = Path(run_dir, "last.pt") if resume == "auto" else Path(resume)
    if not resume or (resume == "auto" and not path.exists()):
        return None
    file = {**read(path), "path": str(path)}
    if "format" not in file or "optimizer" not in file:
        raise InputError(f"{path}: holds no optimizer state, so it cannot be resumed; --init={path} starts from it")
    if model is not None:
        _check_names(path, model.state_dict(), file["model"])
    return file


def restore(state, config, model, optimizer, scaler):
    """Put what `find_resume` found into model, optimizer and scaler; returns lines that say which settings differ.

    Learning rates and weight decay are `config`'s. Raises InputError where the file does not fit."""
    rates = [(group["base_lr"], group["weight_decay"]) for group in optimizer.param_groups]
    with _reading(state["path"], "cannot be resumed"):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        if state["step"] > config.max_steps:
            raise ValueError(f"{state['step']} updates done, but max_steps is {config.max_steps}")
    for group, (base_lr, decay) in zip(optimizer.param_groups, rates, strict=True):
        group["base_lr"], group["weight_decay"] = base_lr, decay
    report, now = [f"{state['path']}: resumed after update {state['step']}"], dataclasses.asdict(config)
    for name, value in (state.get("config") or {}).items():
        if name in now and now[name] != value and name not in ("out_dir", "resume"):
            report.append(f"resume: {name} was {_shown(value)}, is {_shown(now[name])} from here on")
    return report


def read_safetensors(path):
    """{name: tensor} of a safetensors file: 8-byte length, JSON header, then raw bytes without gaps or overlaps.

    Every claim is checked against the file's size before memory is taken; raises InputError.
    Source: the format's description at github.com/huggingface/safetensors."""
    dtypes = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool", "U8": "uint8"}
    dtypes |= {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)}
    tensors, end = {}, 0
    with _reading(path, "not a safetensors file, or damaged"), open(path, "rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size - 8
        if length > size:
            raise ValueError(f"a header of {length} bytes in a file of {size + 8}")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = getattr(torch, dtypes[entry["dtype"]]), entry["shape"]
            begin, stop = entry["data_offsets"]
            if any(type(n) is not int or n < 0 for n in (begin, stop, *shape)) or begin != end:
                raise ValueError(f"{name}: shape {shape}, offsets {begin} to {stop}, expected to begin at {end}")
            if stop - begin != math.prod(shape) * dtype.itemsize or stop > size - length:
                raise ValueError(f"{name}: {entry['dtype']} {shape} does not fit into offsets {begin} to {stop}")
            data = bytearray(file.read(stop - begin))
            tensors[name] = (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).view(shape)
            end = stop
        if end != size - length:
            raise ValueError(f"{size - length - end} bytes at the end belong to no tensor")
    return tensors


# ---------------------------------------------------------------------------------------------------------------------
# names

# (ours, the original's) beginnings of names; the first row that fits is taken
NAMES = (
    ("image_encoder.conv1.", "image_encoder.model.0."),  # the original's is an nn.Sequential of torchvision's parts
    ("image_encoder.bn1.", "image_encoder.model.1."),
    ("image_encoder.layer1.", "image_encoder.model.4."),
    ("image_encoder.layer2.", "image_encoder.model.5."),
    ("image_encoder.layer3.", "image_encoder.model.6."),
    ("image_encoder.layer4.", "image_encoder.model.7."),
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
# (Hugging Face's BERT without its "bert.", ours)
BERT_NAMES = (
    ("cls.predictions.bias", "heads.mlm.decoder.bias"),
    ("cls.predictions.decoder.", "heads.mlm.decoder."),
    ("cls.predictions.transform.", "heads.mlm."),
    ("embeddings.", "bert.embeddings."),
    ("encoder.", "bert.encoder."),
    ("pooler.", "bert.pooler."),
)
# what files may hold and the model has no use for: image tokenizer (vqvae.py reads it), an objective that the final
# recipe does not use, BERT's next-sentence head, ResNet's classifier
LEFT_OVER = r"(model\.image_tokenizer|model\.heads\.mpfr|cls\.seq_relationship|fc)\.|((?:.*\.)?position_ids)$"
# (a name that only this layout has, layout, kind); the first row found is taken
LAYOUTS = (
    ("proj_layer.weight", "csa_net", "csa_net"),
    ("model.classifier.1.weight", "classification", "fashionvil"),
    ("model.contrastive_norm.norm_s", "pretraining", "fashionvil"),
    ("model.norm_layer.norm_s", "contrastive or composition", "fashionvil"),
    ("quantize.embedding.weight", "vqvae", "tokenizer"),
    ("embeddings.word_embeddings.weight", "bert", "bert"),
    ("layer1.0.conv1.weight", "resnet", "resnet"),
)
WORDS, DECODER = "bert.embeddings.word_embeddings.weight", "heads.mlm.decoder.weight"  # one tensor under two names


def to_original(state_dict, norm=None):
    """Our names -> the original's, tied tensors under both of theirs.

    norm: the original's name of logit_scale; None: what a model with these heads calls it."""
    if norm is None:
        pretraining = any(name.startswith(f"heads.{head}.") for name in state_dict for head in HEADS[1:5])
        norm = "model.contrastive_norm.norm_s" if pretraining else "model.norm_layer.norm_s"
        norm = "norm_layer.norm_s" if "proj_layer.weight" in state_dict else norm
    theirs = _rename(state_dict, [row for row in NAMES if row[0] != "logit_scale" or row[1] == norm])
    if "model.heads.mlm.bias" in theirs:
        theirs["model.heads.mlm.decoder.bias"] = theirs["model.heads.mlm.bias"]
    return theirs


def from_original(state_dict):
    """The original's names -> ours, without "module." and LEFT_OVER; other names stay, for a strict load to refuse.

    Raises ValueError where the two names of a tied tensor hold different values."""
    state = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    state = {name: tensor for name, tensor in state.items() if not re.match(LEFT_OVER, name)}
    return _rename(state, [(theirs, ours) for ours, theirs in NAMES])


def _rename(state, rows):
    renamed = {}
    for name, tensor in state.items():
        old, new = next((row for row in rows if name.startswith(row[0])), ("", ""))
        new += name[len(old) :]
        if new in renamed and not tensor.is_meta and not torch.equal(renamed[new], tensor):
            raise ValueError(f"{name} and another name of {new} differ, but are one tensor in the model")
        renamed[new] = tensor
    return renamed


def _from_bert(state):
    state = {name.removeprefix("bert."): tensor for name, tensor in state.items()}
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    state = _rename(state, BERT_NAMES)
    if any(name.startswith("heads.mlm.") for name in state):
        state.setdefault(DECODER, state[WORDS])  # newer files leave the tied name out
    return state


def _from_resnet(state):
    counters = {name.replace("running_mean", "num_batches_tracked") for name in state if name.endswith("running_mean")}
    state = {**{name: torch.tensor(0) for name in counters}, **state}  # files of before 2018 have none
    return {f"image_encoder.{name}": tensor for name, tensor in state.items()}


RENAME = {"fashionvil": from_original, "csa_net": from_original, "bert": _from_bert, "resnet": _from_resnet}


def _heads_of_config(config):
    """{"num_attention_heads": n} from wherever it stands in a released file's nested config, or {}."""
    todo = [config]
    for item in todo:  # which grows on the way; bounded, for few bytes can hold endlessly many references
        if isinstance(item, dict) and len(todo) < 10_000:
            if "num_attention_heads" in item:
                return {"num_attention_heads": item["num_attention_heads"]}
            todo.extend(item.values())
    return {}


def read_model(path):
    """A file of any kind -> (state dict under our names, info); tensors stay mapped from the file, no model is built.

    info: kind ("fashionvil", "csa_net", "tokenizer", "bert", "resnet"), layout ("ours" or the released one's), task,
    step, config, vocab, model_config (empty where the file has none), set_aside {what of LEFT_OVER: number of names}.
    Raises InputError where the file is none of these, holds more than plain tensors, or claims more than it has."""
    file = read_safetensors(path) if Path(path).suffix == ".safetensors" else read(path, mmap=True)
    ours = "format" in file
    state = file["model"] if isinstance(file.get("model"), dict) else file
    for name, tensor in state.items():
        if type(name) is not str or not re.fullmatch(r"[\w.]{1,200}", name) or not isinstance(tensor, torch.Tensor):
            found = f"{_shown(name)}, a {type(tensor).__name__}"
            raise InputError(f"{path}: found {found}, expected names of parameters and tensors alone")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise InputError(f"{path}: {name} is not a plain tensor")
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    info = {key: file.get(key) if ours else None for key in FIELDS if key != "model"} | {"layout": "ours"}
    if not ours:
        names = {name.removeprefix("bert.") for name in state}
        row = next((row for row in LAYOUTS if row[0] in names), None)
        if row is None:
            found = ", ".join(list(state)[:3]) or "no names"
            raise InputError(f"{path}: found {found}, expected names of FashionViL, CSA-Net, BERT, ResNet or VQ-VAE")
        _, info["layout"], info["kind"] = row
        info["model_config"] = _heads_of_config(file.get("config"))
    aside = [found[1] or found[2] for found in (re.match(LEFT_OVER, name) for name in state) if found]
    info["set_aside"] = {what: aside.count(what) for what in aside}
    with _reading(path, "cannot be loaded"):
        if not ours and info["kind"] in RENAME:
            state = RENAME[info["kind"]]({name: t for name, t in state.items() if not re.match(LEFT_OVER, name)})
        if {DECODER, WORDS} <= state.keys() and not torch.equal(state[DECODER], state[WORDS]):
            raise ValueError(f"{DECODER} and {WORDS} differ, but are one tensor in the model")
    # a few bytes can pose as any number of tensors, all of them views of the same
    if sum(tensor.nbytes for name, tensor in state.items() if name != DECODER) > os.path.getsize(path):
        raise InputError(f"{path}: its tensors claim more bytes than the file has")
    return state, info


# ---------------------------------------------------------------------------------------------------------------------
# whole models


def load_model(path, device="cpu", needs=(), num_attention_heads=None):
    """(model in eval mode, info) of a checkpoint, ours or released; all sizes are read from the tensors (model.config).

    needs: heads that the caller uses, or "csa_net". num_attention_heads: of a released file whose own config does not
    say it and where it is not hidden size / 64. info as `read_model`'s.
    Loads strictly: raises InputError that lists every name that is amiss."""
    model, state, info = _plan(path, num_attention_heads)
    offers = model.config.heads if isinstance(model, FashionViL) else ("csa_net",)
    if not set(needs) <= set(offers):
        has = f"{info['task'] or info['layout']} (it has {', '.join(offers) or 'no heads'})"
        raise InputError(f"{path}: a checkpoint of {has}, expected one trained for a task with {', '.join(needs)}")
    model.to_empty(device=device)
    if DECODER in state:  # to_empty cuts the tie
        model.heads["mlm"].decoder.weight = model.bert.embeddings.word_embeddings.weight
    model.load_state_dict(state)
    return model.eval(), info


def model_config(path, num_attention_heads=None):
    """The ModelConfig of a checkpoint, ours or released, as `load_model` would build it."""
    return _plan(path, num_attention_heads)[0].config


def _plan(path, num_attention_heads=None):
    """(model on device "meta", state dict that fits it exactly, info): nothing of the weights' size is allocated."""
    state, info = _read_kind(path, ("fashionvil", "csa_net"), "checkpoint")
    with _reading(path, "no model has these sizes"), torch.device("meta"), NoInit():
        if info["kind"] == "csa_net":
            hidden, categories = state["fusion_module.weight_classifier.0.weight"].shape
            n_masks, dim = state["fusion_module.masks.weight"].shape
            model = CSANet(ModelConfig(**_image_sizes(state)), categories // 2, dim, n_masks, hidden)
        else:
            sizes = {**_image_sizes(state), **_text_sizes(state), **_head_sizes(state)}
            saved = dict(info["model_config"] or {})  # for three settings that no tensor tells
            if num_attention_heads or "num_attention_heads" not in saved:
                if not num_attention_heads and sizes["hidden_size"] % 64:
                    raise ValueError(f"nothing says the number of attention heads of {sizes['hidden_size']} units")
                saved["num_attention_heads"] = num_attention_heads or sizes["hidden_size"] // 64  # BERT's
            for key in saved.keys() & {"num_attention_heads", "dropout", "pac_scale"}:
                sizes[key] = saved[key]
                if type(saved[key]) is not type(getattr(ModelConfig, key)) or saved[key] < 0:
                    raise ValueError(f"{key} {saved[key]!r}")
            model = FashionViL(ModelConfig(**sizes))
    _check_names(path, model.state_dict(), state)
    words = (info["vocab"] or "").rstrip("\n").count("\n") + 1
    if words > model.config.vocab_size:
        raise InputError(f"{path}: a vocabulary of {words} words, but {model.config.vocab_size} word embeddings")
    return model, state, info


class NoInit(torch.overrides.TorchFunctionMode):
    """Skips random starts, which a file's weights replace anyway; on "meta" they import torch's compiler (3 s)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if getattr(func, "__name__", "").endswith("normal_") else func(*args, **(kwargs or {}))


def _read_kind(path, kinds, setting):
    state, info = read_model(path)
    if info["kind"] not in kinds:
        raise InputError(f"{setting}: {path}: {info['kind']} weights, expected {' or '.join(kinds)}")
    return state, info


def _image_sizes(state):
    parts = {tuple(name.split(".")[1:3]) for name in state if name.startswith("image_encoder.layer")}
    found = tuple(sum(part[0] == f"layer{n}" for part in parts) for n in (1, 2, 3, 4))
    found = found, "image_encoder.layer1.0.conv3.weight" in state
    name = next((name for name, blocks in RESNETS.items() if blocks == found), f"{found[0]} blocks a stage")
    return {"resnet": name, "width": state["image_encoder.conv1.weight"].shape[0]}


def _text_sizes(state):
    """All but the number of attention heads, which no tensor tells."""
    return {
        "vocab_size": state[WORDS].shape[0],
        "hidden_size": state[WORDS].shape[1],
        "num_hidden_layers": len({name.split(".")[3] for name in state if name.startswith("bert.encoder.layer.")}),
        "intermediate_size": state["bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
        "max_position_embeddings": state["bert.embeddings.position_embeddings.weight"].shape[0],
        "type_vocab_size": state["bert.embeddings.token_type_embeddings.weight"].shape[0],
    }


def _head_sizes(state):
    names = [head for head in HEADS[1:] if any(name.startswith(f"heads.{head}.") for name in state)]
    sizes = {"heads": ("contrastive", *names) if "logit_scale" in state else tuple(names)}
    if "mpfc" in names:
        sizes["n_codes"] = state["heads.mpfc.decoder.weight"].shape[0]
    if "pac" in names:
        sizes["n_attributes"] = state["heads.pac.projection"].shape[1]
    if "recognition" in names:
        sizes["n_classes"] = state["heads.recognition.decoder.weight"].shape[0]
    return sizes


def _check_names(path, own, found):
    """Raise InputError that lists what `found` lacks, has too much or in other shapes than `own`."""

    def kind(tensor):
        return ("" if tensor.is_floating_point() else "integers ") + str(tuple(tensor.shape))

    pairs = [(name, kind(found[name]), kind(own[name])) for name in own if name in found]
    problems = {
        "of other shapes": [f"{name} {theirs}, expected {ours}" for name, theirs, ours in pairs if theirs != ours],
        "missing": [name for name in own if name not in found],
        "left over": [name for name in found if name not in own],
    }
    said = [f"{len(names)} {what}: {', '.join(names)}" for what, names in problems.items() if names]
    if said:
        raise InputError(f"{path}: does not fit the model: {'; '.join(said)}")


# ---------------------------------------------------------------------------------------------------------------------
# a fresh model's first weights

RESNET_URL = "https://download.pytorch.org/models/"
RESNET_FILES = {  # torchvision's ImageNet V1, the beginning of their SHA-256 in the name
    "resnet18": "resnet18-f37072fd.pth",
    "resnet34": "resnet34-b627a593.pth",
    "resnet50": "resnet50-0676ba61.pth",
}
BERT_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def initialise(model, init, bert="", resnet="", keep_scale=False):
    """Fill a freshly built FashionViL or CSANet; returns lines that say what was loaded, is new, was left over.

    init: "random"; "pretrained" (ImageNet ResNet from torch.hub or the file `resnet`, "random" for none; BERT from the
    folder or hub name `bert`); or a checkpoint, ours or released: image encoder, Transformer, heads of equal shapes.
    logit_scale starts at 4 again unless keep_scale. A CSANet takes an image encoder, from a CSA-Net file everything.
    Raises InputError where a file cannot be had, is of another kind or does not fit."""
    whole = isinstance(model, FashionViL)
    heads = ("heads", "logit_scale") if whole else ("proj_layer", "fusion_module", "logit_scale")
    if init == "random":
        return ["init: random weights"]
    if init != "pretrained":
        state, info = _read_kind(init, ("fashionvil",) if whole else ("fashionvil", "csa_net"), "init")
        if not keep_scale:
            state.pop("logit_scale", None)
        return [_fill(init, model, state, info, ("image_encoder", "bert") if whole else ("image_encoder",), heads)]
    report = ["image encoder: random weights"]
    if resnet != "random":
        path = resnet or _fetch_resnet(model.config.resnet)
        state, info = _read_kind(path, ("resnet",), "resnet_file")
        report = [_fill(path, model, state, info, ("image_encoder",), () if whole else heads)]
    if whole:
        path = _bert_file(bert, *BERT_WEIGHTS)
        state, info = _read_kind(path, ("bert",), "bert")
        for name in ("position_embeddings", "token_type_embeddings"):  # the image side starts from the text's tables
            if f"bert.embeddings.{name}.weight" in state:
                state[f"bert.embeddings.{name}_visual.weight"] = state[f"bert.embeddings.{name}.weight"]
        report.append(_fill(path, model, state, info, ("bert",), ("bert.embeddings.projection", "bert.pooler", *heads)))
    return report


def _fill(path, model, state, info, required, optional):
    """Copy parts of `state` into the model: those that begin with `required` strictly, `optional` ones if they fit."""

    def parts(tensors):
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
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(found[name])
        loaded.append(f"{part} ({len(own)})")
    left = {part: len(tensors) for part, tensors in theirs.items()} | info["set_aside"]
    lists = {"loaded": loaded, "new": new, "left over": [f"{part} ({n})" for part, n in left.items()]}
    return f"{path}: " + "; ".join(f"{what} {', '.join(names)}" for what, names in lists.items() if names)


def _fetch_resnet(name):
    """Path of torchvision's ImageNet file in torch.hub's folder, fetched where it is not there yet."""
    path = Path(torch.hub.get_dir(), "checkpoints", RESNET_FILES[name])
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(RESNET_URL + path.name, path, path.stem.partition("-")[2], progress=False)
    except Exception as error:  # of the network, the disk, the hash
        cure = f"put it at {path}, or anywhere and set --resnet_file=FILE, or start with --init=random"
        raise InputError(f"{RESNET_URL}{path.name} could not be fetched ({_cause(error)}): {cure}") from None
    return path


def _bert_file(bert, *names):
    """Path of the first of `names` in the folder `bert`, else fetched from the Hugging Face hub ("": BERT-base)."""
    bert = bert or "bert-base-uncased"
    if Path(bert).is_dir() or bert.startswith(("/", ".", "~")) or bert.count("/") > 1:
        path = next((Path(bert, name) for name in names if Path(bert, name).is_file()), None)
        if path is None:
            raise InputError(f"bert: no {' or '.join(names)} in folder {bert}, expected a Hugging Face BERT folder")
        return path
    import huggingface_hub  # only where something is fetched

    for name in names:
        try:
            return Path(huggingface_hub.hf_hub_download(bert, name))
        except Exception as error:  # of the network, the disk, the hub
            cause = error
            if type(error).__name__ != "RemoteEntryNotFoundError":  # the hub has none of this name: try the next
                break
    cure = f"put config.json, vocab.txt and {BERT_WEIGHTS[1]} of https://huggingface.co/{bert} into a folder"
    cure += " and set --bert=FOLDER, or start with --init=random"
    raise InputError(f"bert: {' or '.join(names)} of {bert!r} could not be fetched ({_cause(cause)}): {cure}")


def bert_sizes(bert):
    """{field of ModelConfig: size} of a BERT folder or hub name, from its weights and config.json.

    Raises InputError where they disagree, or it is no BERT with exact GELU and absolute positions."""
    path, weights = _bert_file(bert, "config.json"), _bert_file(bert, *BERT_WEIGHTS)
    with _reading(path, "cannot be read"):
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    state, _ = _read_kind(weights, ("bert",), "bert")
    with _reading(weights, "not a BERT"):
        sizes = _text_sizes(state)
    fixed = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute", "layer_norm_eps": 1e-12}
    for key, expected in {**sizes, **fixed}.items():
        if config.get(key, expected) != expected:
            found = _shown(config[key])
            raise InputError(f"{path}: {key}: found {found}, expected {expected!r}, as {weights.name} needs it")
    heads, hidden = config.get("num_attention_heads"), sizes["hidden_size"]
    if type(heads) is not int or heads < 1 or hidden % heads:
        raise InputError(f"{path}: num_attention_heads: found {_shown(heads)}, expected a divisor of {hidden}")
    return {**sizes, "num_attention_heads": heads}


def bert_vocab(bert):
    """The text of vocab.txt, a token a line, of a BERT folder or hub name that has vocab.txt or tokenizer.json."""
    path = _bert_file(bert, "vocab.txt", "tokenizer.json")
    with _reading(path, "no WordPiece vocabulary"):
        text = path.read_text(encoding="utf-8")
        if path.name == "vocab.txt":
            return text
        model = json.loads(text)["model"]
        ids = model["vocab"]
        if model.get("type", "WordPiece") != "WordPiece" or sorted(ids.values()) != list(range(len(ids))):
            raise ValueError("expected a WordPiece model with ids 0, 1, 2, ...")
        return "".join(f"{token}\n" for token in sorted(ids, key=ids.get))


def vocabulary(config, init):
    """The text of vocab.txt, a token a line, that a stage's config means.

    The file `config.vocab`; else what the checkpoint `init`, where it is one, was trained with; else the BERT folder's;
    else what `data.find_vocab` finds. Raises InputError where there is none."""
    if not config.vocab and init not in ("random", "pretrained"):
        vocab = _read_kind(init, ("fashionvil", "csa_net"), "init")[1]["vocab"]
        if vocab is not None:
            return vocab
    if not config.vocab and Path(config.bert).is_dir() and config.bert:
        return bert_vocab(config.bert)
    import data  # torchvision, which is slow to import, is of no use here

    path = data.find_vocab(config, config.bert)
    with _reading(path, "no vocabulary"):
        return Path(path).read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# command line
