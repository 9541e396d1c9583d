"""Files of weights, whoever wrote them: read without running any code from them, and named as our models name them.

checkpoint.py builds on this file; look there first for the function to take. A damaged, hostile or foreign file ends in
InputError, one line that names the file. Reading takes about as much memory as the file has bytes."""

import contextlib
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

from files import not_the_file
from settings import InputError

FORMAT = 1
MODELS = ("fashionvil", "csa_net")
KINDS = (*MODELS, "image_tokenizer")
FIELDS = {"kind": str, "task": str, "model": dict, "model_config": dict, "config": dict, "vocab": str, "step": int}
FIELDS["labels"] = dict
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


def read_weights(path, kinds=None, setting=""):
    """(state dict under our names, info) of any file of weights. Take it when you need the tensors and no model.

    info: "kind" (one of KINDS, "bert" or "resnet"), "layout" ("ours" or the released one's), "task", "step" and
    "vocab" (None where the file says none), "config", "model_config" and "labels" ({} there), and "set_aside" ({what of
    LEFT_OVER: its tensors}). Tensors stay in the file until they are used, so copy what must outlive it.
    Raises InputError where the file claims more than it has, or is none of `kinds` as the setting `setting` needs."""
    places = read_index(path)
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
            info["layout"], info["kind"] = _layout(path, state)
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


def _layout(path, state):
    """(layout, kind) of a file that is not ours, by its names. Raises InputError for names of another model."""
    names = {name.removeprefix("bert.") for name in state}
    for name, layout, kind in LAYOUTS:
        if name in names:
            return layout, kind
    found = ", ".join(list(state)[:3]) or "no names"
    raise InputError(f"{path}: found {found}, expected names of FashionViL, CSA-Net, BERT, ResNet or VQ-VAE")


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


# ---------------------------------------------------------------------------------------------------------------------
# bytes


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
    for key, kind in FIELDS.items():
        if key in file and not isinstance(file[key], kind):
            raise InputError(f"{path}: {key}: found {shown(file[key])}, expected a {kind.__name__}")
    if file.get("kind") == "tokenizer":  # the image tokenizer's name in older files
        file["kind"], file["image_tokenizer_config"] = "image_tokenizer", file.get("tokenizer_config")
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


def read_index(path):
    """{name of a tensor: its file} of a *.index.json, Hugging Face's list of several files; {} for other files."""
    if not str(path).endswith(".index.json"):
        return {}
    with reading(path, "not an index of weight files"):
        places = json.loads(Path(path).read_text(encoding="utf-8-sig"))["weight_map"]
        if not places or any(Path(place).name != place for place in places.values()):
            raise ValueError("expected names of files in the same folder")
    return places


def read_safetensors(path):
    """{name: tensor} of a safetensors file: 8-byte length, JSON header, then raw bytes without gaps or overlaps.

    Source: the format's description at github.com/huggingface/safetensors."""
    tensors = {}
    with reading(path, "not a safetensors file, or damaged"):
        data = bytearray(Path(path).read_bytes())
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


SAFETENSORS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


@contextlib.contextmanager
def reading(path, problem):
    """Turn whatever a reader raises on a damaged or hostile file into one InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        cause = f"{shown(error.args[0])} is missing" if isinstance(error, KeyError) else cause_of(error)
        said = not_the_file(path) or f"{problem}: {cause}"
        raise InputError(f"{path}: {said}") from None


def cause_of(error):
    """One line of an exception's text; of torch's long advice about weights_only, the part that says what was found."""
    text = getattr(error, "strerror", None) or str(error)
    for advice_ends in ("WeightsUnpickler error:", "from a trusted source."):
        text = text.partition(advice_ends)[2] or text
    return text.strip().partition("\n")[0][:300] or type(error).__name__


def shown(value):
    """A short text of any value of a file; its full text can be endless where it holds itself many times."""
    return reprlib.repr(value)[:80]
