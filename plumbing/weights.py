"""Files of weights, ours and other people's: their tensors under our names. And BERT's tokenizer.

`read_weights` reads any file that we know: ours, the authors' released ones, BERT, ResNet, VQ-VAE. `find_tokenizer`
finds what cuts the texts into words. No code of a file is ever run. A damaged or foreign file ends in InputError, one
line that names the file. checkpoint.py makes models from what is read here."""

import json
import math
import pickle
import re
import zipfile
from pathlib import Path

import tokenizers
import torch

from plumbing.files import cause_of, reading, shown
from plumbing.settings import InputError

FORMAT = 2  # of our own files
MODELS = ("fashionvil", "csa_net")
KINDS = (*MODELS, "image_tokenizer")
WORDS, DECODER = "bert.embeddings.word_embeddings.weight", "heads.mlm.decoder.weight"  # one tensor under two names

# Beginnings of names: (theirs, ours). The first row that fits is taken.
RELEASED = (
    ("image_encoder.model.0.", "image_encoder.conv1."),  # theirs is an nn.Sequential of torchvision's parts
    ("image_encoder.model.1.", "image_encoder.bn1."),
    *((f"image_encoder.model.{n + 3}.", f"image_encoder.layer{n}.") for n in (1, 2, 3, 4)),
    ("model.bert.", "bert."),
    ("model.heads.itm.seq_relationship.", "heads.itm."),
    ("model.heads.mlm.bias", "heads.mlm.decoder.bias"),
    ("model.heads.mlm.decoder.", "heads.mlm.decoder."),
    ("model.heads.mlm.transform.", "heads.mlm."),
    ("model.heads.mpfc.1.", "heads.mpfc.decoder."),
    ("model.heads.mpfc.0.", "heads.mpfc."),
    ("model.heads.pac.", "heads.pac."),
    ("model.classifier.1.", "heads.recognition.decoder."),
    ("model.classifier.0.", "heads.recognition."),
    ("model.contrastive_norm.norm_s", "logit_scale"),  # pre-training
    ("model.norm_layer.norm_s", "logit_scale"),  # contrastive and composition
    ("norm_layer.norm_s", "logit_scale"),  # CSA-Net, which has no "model."
)
BERT = (
    ("cls.predictions.bias", "heads.mlm.decoder.bias"),
    ("cls.predictions.decoder.", "heads.mlm.decoder."),
    ("cls.predictions.transform.", "heads.mlm."),
    *((f"{part}.", f"bert.{part}.") for part in ("embeddings", "encoder", "pooler")),  # some files leave "bert." out
)
RESNET = tuple(
    (f"{part}.", f"image_encoder.{part}.") for part in ("conv1", "bn1", *(f"layer{n}" for n in (1, 2, 3, 4)))
)
# Files hold these and the model has no use for them: the image tokenizer, an objective that the final recipe does not
# use, BERT's next-sentence head, and counters of positions.
LEFT_OVER = r"(model\.image_tokenizer|model\.heads\.mpfr|cls\.seq_relationship)\.|((?:.*\.)?position_ids)$"
# (how a name of this layout alone ends, layout, kind, how its names become ours). The first row that is found counts.
LAYOUTS = (
    ("proj_layer.weight", "csa_net", "csa_net", RELEASED),
    ("model.classifier.0.dense.weight", "classification", "fashionvil", RELEASED),
    ("model.contrastive_norm.norm_s", "pretraining", "fashionvil", RELEASED),
    ("model.norm_layer.norm_s", "contrastive or composition", "fashionvil", RELEASED),
    ("quantize.embedding.weight", "vqvae", "image_tokenizer", ()),
    ("image_encoder.conv1.weight", "ours", "fashionvil", ()),
    ("bert.embeddings.word_embeddings.weight", "bert", "bert", BERT),
    ("embeddings.word_embeddings.weight", "bert", "bert", BERT),
    ("layer1.0.conv1.weight", "resnet", "resnet", RESNET),
)


# ---- tensors under our names -----------------------------------------------------------------------------------------


def read_weights(path, kinds=None, setting=""):
    """(state dict under our names, info) of any file of weights. Take it when you need the tensors and no model.

    info: "kind" (one of KINDS, "bert" or "resnet"), "layout" ("ours" or the released one's), "task", "step" and
    "tokenizer" (None where the file says none), "config", "model_config" and "labels" ({} where it says none; of a file
    that is not ours, "model_config" is its "config"), and "set_aside" ({what of LEFT_OVER: its tensors}).
    Raises InputError where the file is none of `kinds`, as the setting `setting` needs."""
    file = read_file(path)
    (_, layout, kind, names), state = find_model(path, file, kinds)
    info = {"kind": kind, "layout": layout, "task": None, "step": None, "tokenizer": None}
    info |= {"config": {}, "model_config": {}, "labels": {}, "set_aside": {}}
    if "format" in file:
        info |= {key: file[key] for key in info if key in file} | {"layout": "ours"}
    elif isinstance(file.get("config"), dict):
        info["model_config"] = file["config"]
    if kinds and info["kind"] not in kinds:
        raise InputError(f"{setting}: {path}: {info['kind']} weights, expected {' or '.join(kinds)}")
    for name in list(state):
        found = re.match(LEFT_OVER, name)
        if found:
            info["set_aside"].setdefault(found[1] or found[2], {})[name] = state.pop(name)
    with reading(path, "cannot be loaded"):
        state = rename(state, names)
    if info["kind"] == "bert":
        if any(name.startswith("heads.mlm.") for name in state):
            state.setdefault(DECODER, state[WORDS])  # newer files leave the second name out
        for table in ("position_embeddings", "token_type_embeddings"):  # the image side starts from the text's tables
            if f"bert.embeddings.{table}.weight" in state:
                state[f"bert.embeddings.{table}_visual.weight"] = state[f"bert.embeddings.{table}.weight"]
    if info["kind"] == "resnet":
        for name in [name for name in state if name.endswith("running_mean")]:  # files of before 2018 have no counters
            state.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    if {DECODER, WORDS} <= state.keys() and not torch.equal(state[DECODER], state[WORDS]):
        raise InputError(f"{path}: {DECODER} and {WORDS} differ, but are one tensor in the model")
    return state, info


def find_model(path, file, kinds=None):
    """(its row of LAYOUTS, its tensors) of the model in `file`, whatever stands before its names.

    Programs keep a model in a part of their file, and put something before its names: state_dict, module, teacher.
    kinds: what is looked for first. Raises InputError where there is none, and names all where there are several."""
    tensors = all_tensors(file)
    for row in sorted(LAYOUTS, key=lambda row: bool(kinds) and row[2] not in kinds):
        before = [name.removesuffix(row[0]) for name in tensors if f".{name}".endswith(f".{row[0]}")]
        if len(before) > 1:
            cure = f"python -m tools.weights --convert {path} OUT --part=PREFIX takes one"
            raise InputError(f"{path}: found models under {' and '.join(map(repr, before))}; {cure}")
        if before:
            return row, {n.removeprefix(before[0]): tensor for n, tensor in tensors.items() if n.startswith(before[0])}
    found = ", ".join(list(tensors)[:3]) or "no tensors"
    raise InputError(f"{path}: found {found}, expected those of FashionViL, CSA-Net, BERT, ResNet or VQ-VAE")


def all_tensors(file):
    """{name: tensor} of a dict and of all dicts in it. The keys that lead to a tensor, joined by dots, are its name."""
    tensors, parts, seen = {}, [("", file)], set()
    for before, part in parts:  # which grow meanwhile
        for key, value in part.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{before}{key}"] = value
            elif isinstance(value, dict) and id(value) not in seen:  # a dict can hold itself
                seen.add(id(value))
                parts.append((f"{before}{key}.", value))
    return tensors


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


# ---- a BERT folder ---------------------------------------------------------------------------------------------------

TOKENIZER = ("tokenizer.json", "vocab.txt")


def find_file(bert, *names, optional=False):
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
    expected = "expected a Hugging Face BERT folder (weights in several files are not read)"
    raise InputError(f"bert: no {' or '.join(names)} in {bert}, {expected}")


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


# ---- the tokenizer of texts ------------------------------------------------------------------------------------------


def find_tokenizer(config, own=None, rows=None):
    """The `tokenizers.Tokenizer` that the settings mean: that of the first of these places that there is.

    `own`, the text of the tokenizer that the weights were trained with (None: it is not known); the file
    `config.vocab`; `config.bert`, a folder or a hub name; DATA_ROOT/vocab.txt; the folder
    DATA_ROOT/../bert-base-uncased; bert-base-uncased on the hub. rows: of the word table, None for a new one.
    Raises InputError where `config.vocab` has other words than `own`, or the word table is not made for so many."""
    root = Path(config.data_root)
    places = [root / "vocab.txt", *(root / ".." / "bert-base-uncased" / name for name in TOKENIZER)]
    if own is not None:
        tokenizer = tokenizers.Tokenizer.from_str(own)
        if config.vocab:
            check_words(config.vocab, read_tokenizer(config.vocab), tokenizer)
    elif config.vocab:
        tokenizer = read_tokenizer(config.vocab)
    elif not config.bert and any(place.exists() for place in places):
        tokenizer = read_tokenizer(next(place for place in places if place.exists()))
    else:
        tokenizer = bert_tokenizer(config.bert)
    words = count_words(tokenizer)
    # Some word tables have a few rows more than words, up to a multiple of 128. One with more is of another tokenizer.
    if rows is not None and not words <= rows < words + 128:
        cure = "set --vocab=FILE to the vocab.txt or tokenizer.json of its training"
        raise InputError(f"tokenizer: found {words} words, but {rows} rows in the word table of the weights; {cure}")
    return tokenizer


def bert_tokenizer(bert):
    """The `tokenizers.Tokenizer` of the folder or hub name `bert`. Raises InputError where it has none."""
    find_file(bert, "tokenizer_config.json", optional=True)  # fetches what read_tokenizer looks for
    return read_tokenizer(find_file(bert, *TOKENIZER))


def check_words(path, given, trained):
    """Raise InputError where a word has another number in the tokenizer `given`, of the file `path`, than in `trained`.

    Each row of a word table belongs to a number. In another order, every word would get another word's vector."""
    ours, theirs = given.get_vocab(), trained.get_vocab()
    others = sorted(word for word, _ in ours.items() ^ theirs.items())
    if others:
        word = others[0]
        found = f"{shown(word)} has number {ours.get(word)}, expected {theirs.get(word)} as the weights were trained"
        raise InputError(f"vocab: {path}: {found}; leave --vocab out")


def count_words(tokenizer):
    """The number of rows that a word table needs for a tokenizer: its largest number + 1."""
    return 1 + max(tokenizer.get_vocab().values())


def read_tokenizer(path):
    """The `tokenizers.Tokenizer` of a tokenizer.json, as it is, or of a vocab.txt, without padding and truncation.

    Of a vocab.txt the tokenizer_config.json beside it says how it treats case, accents and Chinese characters.
    Raises InputError for one that is no WordPiece or lacks one of BERT's special tokens."""
    path = Path(path)
    with reading(path, "no WordPiece vocabulary"):
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            tokenizer = tokenizers.Tokenizer.from_str(text)
        else:
            beside = path.with_name("tokenizer_config.json")
            tokenizer = wordpiece(text, **(json.loads(beside.read_text("utf-8-sig")) if beside.exists() else {}))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if not isinstance(tokenizer.model, tokenizers.models.WordPiece):
            raise ValueError(f"found {type(tokenizer.model).__name__}, expected BERT's WordPiece")
        for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"):
            if tokenizer.token_to_id(token) is None:
                raise ValueError(f"token {token} is missing; expected a BERT vocab.txt, one token a line")
    return tokenizer


def wordpiece(vocab, do_lower_case=True, strip_accents=None, tokenize_chinese_chars=True, **others):
    """BERT's WordPiece tokenizer from the text of a vocab.txt, one token a line, and what tokenizer_config.json says.

    others: what that file says of other things."""
    ids = {token: number for number, token in enumerate(vocab.rstrip("\n").split("\n"))}
    chars = {"lowercase": do_lower_case, "handle_chinese_chars": tokenize_chinese_chars}
    tokenizer = tokenizers.BertWordPieceTokenizer(ids, strip_accents=strip_accents, **chars)
    return tokenizers.Tokenizer.from_str(tokenizer.to_str())


# ---- bytes -----------------------------------------------------------------------------------------------------------


def read_file(path):
    """The dict in a file of torch.save or safetensors: what `read_weights` is made from. Nothing in it is run."""
    if Path(path).suffix == ".safetensors":
        return read_safetensors(path)
    with reading(path, "not a checkpoint (a file of torch.save), or damaged"):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # torch compares no checksums. They are 0 where it was told to write none.
                if any(entry.CRC for entry in archive.infolist()) and archive.testzip():
                    raise InputError(f"{path}: damaged, a checksum is wrong; copy or download it again")
        try:
            file = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            if found is None:
                raise
            cure = f"python -m tools.weights --convert {path} OUT takes the tensors alone"
            raise InputError(f"{path}: holds a pickled {found[1]}, expected tensors, numbers, text; {cure}") from None
    if file.get("format", FORMAT) != FORMAT:
        found = shown(file["format"])
        raise InputError(f"{path}: checkpoint format {found}, expected {FORMAT}; read it with the code that wrote it")
    if "format" in file and file.get("kind") not in KINDS:
        raise InputError(f"{path}: kind {file.get('kind')!r}, expected {' or '.join(KINDS)}")
    return file


SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SAFETENSORS |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """{name: tensor} of a safetensors file: 8-byte length, JSON header, then the tensors' bytes.

    Source: the format's description at github.com/huggingface/safetensors."""
    tensors = {}
    with reading(path, "not a safetensors file, or damaged"):
        data = bytearray(Path(path).read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            dtype, n = SAFETENSORS[entry["dtype"]], math.prod(entry["shape"])
            offset = start + entry["data_offsets"][0]
            tensors[name] = torch.frombuffer(data, dtype=dtype, count=n, offset=offset).view(entry["shape"])
    return tensors
