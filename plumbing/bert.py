"""A Hugging Face BERT folder, or its name on the hub: where its files are, its words, and whether it is of our kind.

checkpoint.py reads the weights. This file needs no torch."""

import itertools
import json
import re
from pathlib import Path

from plumbing.files import cause_of, not_the_file, reading, shown
from plumbing.settings import InputError

WEIGHTS = [f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]
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
# What config.json may say of the Transformer, beside its sizes.
TRANSFORMER = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "layer_norm_eps": 1e-12,
}


# ---- where its files are ---------------------------------------------------------------------------------------------


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


def find_weights(bert):
    """Path of BERT's file of weights, or of the index of its several files, all of which are then there."""
    path = find_file(bert, *WEIGHTS)
    for shard in sorted(set(read_index(path).values())):
        find_file(bert, shard)
    return path


def read_index(path):
    """{name of a tensor: its file} of a *.index.json, Hugging Face's list of several files; {} for other files."""
    if not str(path).endswith(".index.json"):
        return {}
    index = read_json(path)
    with reading(path, "not an index of weight files"):
        if not index["weight_map"] or any(Path(place).name != place for place in index["weight_map"].values()):
            raise ValueError("expected names of files in the same folder")
    return index["weight_map"]


def read_json(path):
    """The dict of one of BERT's JSON files. Raises InputError for a missing, broken or other file."""
    with reading(path, "cannot be read"):
        return dict(json.loads(Path(path).read_text(encoding="utf-8-sig")))


# ---- its words -------------------------------------------------------------------------------------------------------


def vocabulary(config, trained=None):
    """The text of vocab.txt, one token a line: the first that exists of these places, best first.

    The file `config.vocab`; `trained`, the vocabulary of the checkpoint that is used (None: it has none); the folder
    `config.bert`; DATA_ROOT/vocab.txt; DATA_ROOT/../bert-base-uncased/vocab.txt; the Hugging Face hub.
    Raises InputError, also where `config.vocab` is not `trained` and where BERT reads texts otherwise than we do."""
    if config.vocab:
        text = _vocab_text(Path(config.vocab))
        if trained is not None:
            _check_words(f"vocab: {config.vocab}", text, trained, "the checkpoint's vocabulary")
    elif trained is not None:
        return trained
    else:
        folders = (Path(config.data_root), Path(config.data_root, "..", "bert-base-uncased"))
        places = [folder / "vocab.txt" for folder in folders if (folder / "vocab.txt").exists()]
        if not places or (config.bert and Path(config.bert).is_dir()):
            places = [find_file(config.bert, "vocab.txt", "tokenizer.json")]
        text = _vocab_text(places[0])
    # "" is bert-base-uncased, which is known. A random start takes only the sizes of a BERT.
    if config.bert and vars(config).get("init") != "random":
        for name in ("vocab.txt", "tokenizer.json"):
            path = find_file(config.bert, name, optional=True)
            if path and (name == "vocab.txt" or "vocab" in (read_json(path).get("model") or {})):
                _check_words("vocab", text, _vocab_text(path), path)
        check_tokenizer(config.bert, _words(text))
    return text


def _words(text):
    return text.rstrip("\n").split("\n")


def _check_words(what, text, expected, place):
    """Raise InputError where two texts of vocab.txt do not have the same words in the same order."""
    for number, (word, theirs) in enumerate(itertools.zip_longest(_words(text), _words(expected))):
        if word != theirs:
            found = f"token {number} is {word!r}, but {theirs!r} in {place}"
            raise InputError(f"{what}: {found}; leave --vocab out to take that one")


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


def check_tokenizer(bert, words):
    """Raise InputError where BERT's own files say that texts are read otherwise than by our tokenizer of `words`."""
    names = ("config.json", "tokenizer_config.json", "tokenizer.json", "added_tokens.json")
    for path in filter(None, [find_file(bert, name, optional=True) for name in names]):
        content = read_json(path)
        with reading(path, "cannot be read"):
            said = dict(content)
            for part, inner in content.items():
                if inner is None or isinstance(inner, dict):  # "normalizer": null is a tokenizer without one
                    said |= {f"{part}.{key}": value for key, value in (inner or {"type": None}).items()}
            added = content if path.name == "added_tokens.json" else {}
            added |= {token["content"]: token["id"] for token in content.get("added_tokens", [])}
            added |= {token["content"]: int(i) for i, token in content.get("added_tokens_decoder", {}).items()}
            new = {token: number for token, number in added.items() if [token] != words[number : number + 1]}
        for key, allowed in TOKENIZER.items():
            if key in said and said[key] not in allowed:
                found = f"found {shown(said[key])}, expected {allowed[-1]!r}"
                raise InputError(f"{path}: {key}: {found}: our tokenizer is lower-case WordPiece; take an uncased BERT")
        for token, number in new.items():
            found = f"found number {number}, expected that of the same word among the vocabulary's {len(words)} words"
            raise InputError(f"{path}: added token {shown(token)}: {found}; take a BERT without added tokens")


# ---- its sizes -------------------------------------------------------------------------------------------------------


def count_attention_heads(bert, sizes):
    """The number of attention heads that config.json says. sizes: {field of ModelConfig: what the weights have}.

    Raises InputError where the weights and config.json disagree, or it tells of another model than BERT."""
    path = find_file(bert, "config.json")
    config = read_json(path)
    for key, expected in (sizes | TRANSFORMER).items():
        found = config.get(key, expected)
        if found != expected:
            raise InputError(f"{path}: {key}: found {shown(found)}, expected {expected!r}, as the weights need it")
    heads, hidden = config.get("num_attention_heads"), sizes["hidden_size"]
    if type(heads) is not int or heads < 1 or hidden % heads:
        raise InputError(f"{path}: num_attention_heads: found {shown(heads)}, expected a divisor of {hidden}")
    return heads
