"""Data: photos and texts of the five fashion data sets, WordPiece, masks, and the order of training batches.

`python data.py --data_root=DIR` checks a data root and prints every fault in one pass.

Pictures leave the loader as uint8 and are normalised on the device (`to_device`). Every draw of a sample follows from
(seed, epoch, index), every batch from (seed, step): neither the number of processes nor a restart changes them."""

import concurrent.futures
import contextlib
import functools
import json
import math
import os
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common import InputError, leave_group, load_config, run, setting

try:
    from torchvision.transforms import v2
except RuntimeError:
    # PyPI's torchvision for Linux is built for CUDA. On a CPU-only torch its compiled operators cannot load, and the
    # import stops where it describes two of them. The transforms need no operator, so naming those two is enough.
    _names = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _names.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torchvision.transforms import v2

MEAN = (0.46777044, 0.44531429, 0.40661017)  # of the fashion photos, not ImageNet's; the image tokenizer's too
STD = (0.12221994, 0.12145835, 0.14380469)
MAX_TOKENS, FASHIONIQ_MAX_TOKENS = 75, 50  # [CLS] and [SEP] included
MAX_PIXELS = 64_000_000  # of an image file; what is larger takes a gigabyte on its way, and is no product photo
MAX_LABEL = 1_000_000  # no attribute or category id reaches it; heads have a row for every id up to the largest
SKIP_BROKEN = "replace a product whose image cannot be read by the next one, and count it"
STRIDE = 32  # pixels of an image per patch, along each side
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

# ---------------------------------------------------------------------------------------------------------------------
# the data sets, as rows of a table

# annotation file and image folder per split, and the fields whose texts are joined with "."
SETS = {
    "FashionGen": {
        "splits": {"train": ("train_info.json", "train"), "val": ("val_info.json", "val")},
        "text": ("title", "description"),
    },
    "BigFACAD": {
        "splits": {"train": ("train_info.json", "images"), "val": ("val_info.json", "images")},
        "text": ("color", "title", "description"),
    },
    "Fashion200k": {
        "splits": {"train": ("train_info.json", "images"), "val": ("test_info.json", "images")},
        "text": ("title",),
    },
    "PolyvoreOutfits": {
        "splits": {"train": ("train_info.json", "images")},
        "text": ("title", "description"),
    },
}
RECOGNITION_LABELS = {"fashiongen_category": "category", "fashiongen_subcategory": "subcategory"}
FASHIONIQ_CLASSES = ("dress", "shirt", "toptee")
POLYVORE_ITEMS = "polyvore_item_metadata.json"
# Polyvore Outfits' fine category ids in the order in which the released OCIR checkpoint numbers them
POLYVORE_CATEGORIES = tuple(
    int(n)
    for n in """
3 4 5 6 7 8 9 10 11 15 17 18 19 21 23 24 25 26 27 28 29 30 31 35 36 37 38 39 40 41 42 43 46 47 48 49 50 51 52 53
55 56 57 58 59 61 62 64 65 68 69 1606 1607 1605 104 105 106 107 231 236 237 238 239 240 241 243 244 248 249 250
251 252 253 254 255 256 257 258 259 260 261 262 263 264 265 266 267 268 269 270 272 273 275 277 278 279 280 281
282 284 286 287 288 289 290 291 292 293 294 295 296 297 298 299 300 301 302 303 304 305 306 307 309 310 315 318
332 341 342 343 4452 4454 4455 4456 4457 4458 4459 4460 4461 4462 4463 4464 4465 4466 4467 4468 4470 4472 4473
4495 4496 4517 4518
""".split()
)


@dataclass
class Product:
    """One product; `name` is for messages ("FashionGen 1234"), the labels are None where its data set has none."""

    name: str
    images: list
    text: str
    attributes: list
    category: int = None
    subcategory: int = None
    title: str = ""


def read_json(path, kind):
    """The parsed JSON file, of type `kind` (list or dict). Raises InputError on a missing, cut or other file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); fetch the file again") from None
    if type(value) is not kind or not value:
        found = f"{'a filled' if value else 'an empty'} {type(value).__name__}"
        raise InputError(f"{path}: found {found}, expected a filled {kind.__name__}")
    return value


def printable(text):
    """Raise ValueError where a name would spoil a message or a path: control characters, half a surrogate pair."""
    if re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", text):
        raise ValueError(f"found {text!r:.60}, expected no control characters")


def inside(folder, name):
    """folder / name as a string; raises ValueError where `name` leads out of the folder (a link inside may lead on)."""
    printable(name)
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise ValueError(f"image path {name!r} leaves the folder {folder}")
    return os.path.join(folder, name)


def parse_product(item, source, folder):
    """One annotation entry -> Product; raises ValueError that says key, what was found and what was expected."""

    def get(key, kinds):
        value = item.get(key)
        if not isinstance(value, kinds) or isinstance(value, bool):
            expected = kinds.__name__ if isinstance(kinds, type) else "int or str"
            raise ValueError(f"key {key!r}: found {value!r:.60}, expected {expected}")
        return value

    if not isinstance(item, dict):
        raise ValueError(f"found {item!r:.60}, expected an object")
    name = f"{source} {get('id', (int, str))}"
    printable(name)
    images = [get("images", str)] if source == "PolyvoreOutfits" else get("images", list)
    if not images or not all(isinstance(i, str) and i for i in images):
        raise ValueError(f"key 'images': found {images!r:.60}, expected file names")
    attributes = get("attributes_id", list)
    wrong = [a for a in attributes if type(a) is not int or not 0 <= a < MAX_LABEL]
    if wrong:
        raise ValueError(f"key 'attributes_id': found {wrong[0]!r:.60}, expected ids from 0 to {MAX_LABEL - 1}")
    for key in ("category_id", "subcategory_id"):
        if item.get(key) is not None and (type(item[key]) is not int or not 0 <= item[key] < MAX_LABEL):
            raise ValueError(f"key {key!r}: found {item[key]!r:.60}, expected an id from 0 to {MAX_LABEL - 1}")
    text = ".".join(get(key, str) for key in SETS[source]["text"])
    paths = [inside(folder, i) for i in images]
    labels = item.get("category_id"), item.get("subcategory_id")
    return Product(name, paths, text, attributes, *labels, item["title"])


def scan_products(root, source, split):
    """(products, faults) of one annotation file: every entry that can be used, and a line for every one that cannot."""
    file, images = SETS[source]["splits"][split]
    path, folder = Path(root, source, file), os.path.join(root, source, images)
    products, faults, seen = [], [], set()
    for i, item in enumerate(read_json(path, list)):
        try:
            product = parse_product(item, source, folder)
            if product.name in seen:
                raise ValueError("this id stood before; ids must be unique")
            seen.add(product.name)
            products.append(product)
        except ValueError as error:
            name = repr(item["id"])[:60] if isinstance(item, dict) and "id" in item else "missing"
            faults.append(f"{path}: entry {i} (id {name}): {error}")
    return products, faults


def load_products(root, source, split):
    """The products of one set and split. Raises InputError with the first fault (`python data.py` lists all)."""
    products, faults = scan_products(root, source, split)
    if faults:
        raise InputError(f"{faults[0]}; {len(faults)} such in the file, python data.py --data_root={root} lists them")
    return products


def list_images(folder):
    """{path below `folder`: [bytes, time of change in ns]} of its images, at any depth, sorted; InputError if none."""
    if not Path(folder).is_dir():
        raise InputError(f"gallery: found {str(folder)!r}, expected a folder of images")
    paths = (Path(base, name) for base, _, names in os.walk(folder) for name in names if not name.startswith("."))
    paths = sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and path.exists())
    if not paths:
        raise InputError(f"gallery: {folder}: no images in it, expected files that end in {' '.join(IMAGE_SUFFIXES)}")
    return {str(p.relative_to(folder)): [p.stat().st_size, p.stat().st_mtime_ns] for p in paths}


def readable_images(folder, names):
    """Those of `names` below `folder` that open as images; the others are printed to stderr. InputError if none."""
    readable = []
    for name in names:
        try:
            open_image(Path(folder, name))
            readable.append(name)
        except InputError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not readable:
        raise InputError(f"{folder}: none of {len(names)} images can be read")
    return readable


def load_titles(folder):
    """{image path: (product id, title)} of a folder of images, {} where it is none of a data set's (SETS).

    Raises InputError on an annotation file that cannot be read; entries that have faults are left out."""
    folder, titles = Path(folder).resolve(), {}
    source, root = folder.parent.name, folder.parent.parent
    splits = SETS[source]["splits"] if source in SETS else {}
    for split, (file, images) in splits.items():
        if folder.name == images and (folder.parent / file).exists():
            for product in scan_products(root, source, split)[0]:
                own = product.name.removeprefix(f"{source} "), product.title
                titles |= dict.fromkeys(product.images, own)
    if source == "PolyvoreOutfits" and (folder.parent / POLYVORE_ITEMS).exists():
        for item, row in load_polyvore_items(folder.parent)[0].items():
            titles[str(folder / f"{item}.jpg")] = item, str(row.get("title", ""))
    return titles


def load_pretraining(root, sets=tuple(SETS)):
    """The training products of the sets, one list: the union over which training draws uniformly (recipe 3)."""
    unknown = [name for name in sets if name not in SETS]
    if unknown or not sets or len(set(sets)) < len(sets):
        found = repr(unknown[0]) if unknown else f"{sets}"
        raise InputError(f"sets: found {found}, expected some of {', '.join(SETS)}, each once")
    return [product for name in sets for product in load_products(root, name, "train")]


def count_labels(products, key, limit=0):
    """Number of labels: the largest id of the products + 1, or `limit` where that is given.

    key: "attributes", "category" or "subcategory". Raises InputError where an id is out of range or missing."""
    largest = -1
    for product in products:
        value = getattr(product, key)
        if value is None:
            raise InputError(f"{product.name}: no {key}_id, which this task needs")
        top = max(value, default=-1) if key == "attributes" else value
        if limit and top >= limit:
            raise InputError(f"{product.name}: {key} id {top}, expected below {limit}; check the label file or n_{key}")
        largest = max(largest, top)
    return limit or largest + 1


def check_subcategories(products):
    """Whether all products have a sub-category, which sample-100 needs; raises InputError where only some have."""
    if any(product.subcategory is not None for product in products):
        count_labels(products, "subcategory")
        return True
    return False


# ---------------------------------------------------------------------------------------------------------------------
# images

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # texts are encoded before loaders fork; no warning of it
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `open_image` has a lower limit


def open_image(path):
    """An image file as RGB with its EXIF rotation applied; the first frame of an animation, 16 bits cut to 8.

    Raises InputError naming the file where it is missing, broken, cut short or of absurd size (MAX_PIXELS)."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, expected at most {MAX_PIXELS:,}")
            # a JPEG says at once whether it holds any; to search one that does not takes a sixth of its load
            if image.format != "JPEG" or {"exif", "xmp"} & image.info.keys():
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):  # 16-bit grey: convert would clip, not scale
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # Pillow's readers raise nearly anything on broken files
        cause = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        cure = "replace the file (pre-training also has --skip_broken_images)"
        raise InputError(f"{path}: image cannot be read: {cause}; {cure}") from None


def image_transform(kind, size, train):
    """(PIL image, np.random.Generator) -> uint8 array (size, size, 3), as recipe 3's table.

    kind "crop" (pre-training, FashionGen): resize to 256/224 of `size`, random or centre crop; "scale" (FashionIQ,
    OCIR): random resized crop in training, plain resize else. Training flips half of the images; the generator can be
    None where nothing is drawn."""
    fit = {"crop": resize_and_crop, "scale": crop_and_resize}[kind]
    return functools.partial(_transform, fit, size, train)


def _transform(fit, size, train, image, rng=None):
    image = fit(image, size, rng if train else None)
    if train and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def resize_and_crop(image, size, rng):
    """A PIL image resized to 256/224 of `size`, then cropped at random (rng None: the centre).

    In one step, which computes only what is kept: the pixels of two steps at 224 (all fractions exact), alike else."""
    large = round(size * 256 / 224)
    left, top = [round((large - size) / 2)] * 2 if rng is None else rng.integers(large - size + 1, size=2).tolist()
    x, y = image.width / large, image.height / large
    box = (left * x, top * y, (left + size) * x, (top + size) * y)
    return image.resize((size, size), Image.Resampling.BILINEAR, box)


def crop_and_resize(image, size, rng):
    """A random part of a PIL image (.8 to 1 of it, sides .75 to 1.3; rng None: all of it) resized to size x size."""
    if rng is None:
        return image.resize((size, size), Image.Resampling.BILINEAR)
    with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's generator; leave the caller's alone
        # the CPU's alone: torch.manual_seed also queues a call, with its stack, for GPUs that a worker never starts
        torch.default_generator.manual_seed(int(rng.integers(2**63)))
        return v2.RandomResizedCrop(size, scale=(0.8, 1.0), ratio=(0.75, 1.3))(image)


def stack_images(arrays):
    """uint8 arrays (H, W, 3) -> tensor (B, 3, H, W), channels last in memory, as convolutions like them."""
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def normalize(images):
    """uint8 (B, 3, H, W) on any device -> float32, with the data's mean and std."""
    mean, std = (torch.tensor(x, device=images.device).view(3, 1, 1) * 255 for x in (MEAN, STD))
    return (images.float() - mean) / std


def load_images(paths, size):
    """Image files -> float32 (B, 3, size, size), as the evaluation of pre-training sees them."""
    transform = image_transform("crop", size, train=False)
    return normalize(stack_images([transform(open_image(path)) for path in paths]))


def to_device(batch, device):
    """A new dict of the batch on the device, its images normalised."""
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    return {key: normalize(v) if v.dtype == torch.uint8 and v.ndim == 4 else v for key, v in batch.items()}


# ---------------------------------------------------------------------------------------------------------------------
# text


def find_vocab(config, bert=""):
    """Path of vocab.txt: the setting `vocab`, else DATA_ROOT/vocab.txt, DATA_ROOT/../bert-base-uncased/vocab.txt, the
    folder `bert`, or the hub's bert-base-uncased. Raises InputError that says where to put the file."""
    if config.vocab:
        return config.vocab
    places = [Path(config.data_root, "vocab.txt"), Path(config.data_root, "..", "bert-base-uncased", "vocab.txt")]
    for place in [Path(bert, "vocab.txt"), *places] if bert else places:
        if place.exists():
            return str(place)
    from huggingface_hub import hf_hub_download  # comes with tokenizers

    try:
        return hf_hub_download(bert or "bert-base-uncased", "vocab.txt")
    except Exception as error:  # any of the hub's many ways to be out of reach
        where = f"put bert-base-uncased's vocab.txt at {places[0]} or set --vocab=FILE"
        raise InputError(f"vocab: no file found and none could be fetched ({type(error).__name__}); {where}") from None


def wordpiece(vocab):
    """BERT's uncased WordPiece tokenizer from the text of a vocab.txt, one token a line.

    Raises InputError where one of BERT's special tokens is missing."""
    ids = {token: i for i, token in enumerate(vocab.rstrip("\n").split("\n"))}
    for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"):
        if token not in ids:
            raise InputError(f"vocab: token {token} is missing; expected a BERT vocab.txt, one token a line")
    return tokenizers.BertWordPieceTokenizer(ids, lowercase=True)


def encode(tokenizer, texts, max_tokens=MAX_TOKENS):
    """Texts -> a list of (ids, words): [CLS] ... [SEP], at most max_tokens; words[i] = token i's word, -1 for specials.

    A text of any length, empty or of unknown characters is fine: it is cut, or is only [CLS] [SEP], or holds [UNK]."""
    # half a surrogate pair, which JSON can hold, is no text
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    encodings, keep = tokenizer.encode_batch(texts, add_special_tokens=False), max_tokens - 2
    return [([cls, *e.ids[:keep], sep], [-1, *e.word_ids[:keep], -1]) for e in encodings]


class Texts:
    """Many texts, encoded once: anew at every visit it takes a quarter of a sample's time. texts[i] as of `encode`.

    Memory: 6 bytes a text for each of max_tokens, shared by the loader's workers."""

    def __init__(self, tokenizer, texts, max_tokens, chunk=4096):
        self.ids = np.zeros((len(texts), max_tokens), np.int32)
        self.words, self.lengths = np.zeros(self.ids.shape, np.int16), np.zeros(len(texts), np.int16)
        for start in range(0, len(texts), chunk):
            for i, (ids, words) in enumerate(encode(tokenizer, texts[start : start + chunk], max_tokens), start):
                n = self.lengths[i] = len(ids)
                self.ids[i, :n], self.words[i, :n] = ids, words

    def __getitem__(self, i):
        n = self.lengths[i]
        return self.ids[i, :n].tolist(), self.words[i, :n].tolist()


def check_lengths(config, positions, max_tokens=MAX_TOKENS):
    """Raise InputError where texts or images of these settings need more positions than the model has, or no grid."""
    if config.image_size < STRIDE or config.image_size % STRIDE:
        raise InputError(f"image_size: found {config.image_size}, expected a multiple of {STRIDE}")
    longest = config.max_tokens or max_tokens
    if not 3 <= longest <= positions:
        raise InputError(f"max_tokens: found {longest}, expected 3 to {positions}, the positions of the model")
    if (config.image_size // STRIDE) ** 2 > positions:
        most = math.isqrt(positions) * STRIDE
        raise InputError(f"image_size: found {config.image_size}, expected at most {most} for {positions} positions")


def pad(rows, value=0):
    """Lists of unequal length -> (B, longest) tensor, int64 or bool as `value` is."""
    out = np.full((len(rows), max(map(len, rows))), value)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)


def pad_texts(rows):
    """Lists of ids -> {"input_ids", "attention_mask"} (B, longest) int64, mask 0 = padding."""
    return {"input_ids": pad(rows), "attention_mask": pad([[1] * len(row) for row in rows])}


def tokenize(vocab, texts, max_tokens=MAX_TOKENS):
    """Texts and the text of a vocab.txt -> {"input_ids", "attention_mask"} (B, longest) int64."""
    tokenizer = wordpiece(vocab)
    return pad_texts([ids for ids, _ in encode(tokenizer, texts, max_tokens)])


# ---------------------------------------------------------------------------------------------------------------------
# masks


def mask_words(ids, words, tokenizer, rng, share=0.15):
    """Whole-word masking (recipe 2, MLM) -> (masked ids, labels), lists as long as ids; labels -100 where unasked.

    A word is chosen with p = share; of the chosen 80 % become [MASK], 10 % random tokens (each piece anew), 10 % stay.
    A text in which no word was chosen gets one at random, so that every text asks; one without words asks its [SEP]."""
    n_words = 1 + max(words)
    chosen = rng.random(n_words) < share
    if n_words and not chosen.any():
        chosen[rng.integers(n_words)] = True
    fate = rng.random(n_words)
    masked, labels = list(ids), [-100] * len(ids)
    for i, word in enumerate(words):
        if word < 0 or not chosen[word]:
            continue
        labels[i] = ids[i]
        if fate[word] < 0.8:
            masked[i] = tokenizer.token_to_id("[MASK]")
        elif fate[word] < 0.9:
            masked[i] = int(rng.integers(tokenizer.get_vocab_size()))
    if not n_words:
        labels[-1], masked[-1] = ids[-1], tokenizer.token_to_id("[MASK]")
    return masked, labels


def mask_patches(side, rng):
    """BEiT's block-wise mask (recipe 2, MPFC) on a side x side grid -> bool (side * side,), True = masked."""
    wanted = max(1, round(8 * side * side / 49))
    smallest = max(1, wanted // 2)
    mask = np.zeros((side, side), bool)
    while wanted > 0:
        for _ in range(10):
            area = smallest + (wanted - smallest) * rng.random()  # uniform, also where `wanted` is the smaller
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= side or w >= side:
                continue
            top, left = rng.integers(side - h + 1), rng.integers(side - w + 1)
            block = mask[top : top + h, left : left + w]
            new = block.size - int(block.sum())
            if 0 < new <= wanted:
                block[:] = True
                wanted -= new
                break
        else:
            break
    if not mask.any():  # tiny grids can refuse all tries; every image must ask something
        mask.flat[rng.integers(mask.size)] = True
    return mask.reshape(-1)


def drop_some(n, share, rng):
    """bool (n,) with floor(share * n) True, drawn without replacement (recipe 2, MVC's Decision)."""
    drop = np.zeros(n, bool)
    drop[rng.choice(n, int(share * n), replace=False)] = True
    return drop


# ---------------------------------------------------------------------------------------------------------------------
# training samples and their order


class Pretraining(Dataset):
    """Samples of pre-training; a key is (epoch, index, objective), and only what the objective needs is made."""

    def __init__(self, products, tokenizer, n_attributes, config):
        self.products, self.tokenizer, self.n_attributes = products, tokenizer, n_attributes
        self.seed, self.skip_broken, self.mask_share = config.seed, config.skip_broken_images, config.mask_share
        self.texts = Texts(tokenizer, [product.text for product in products], config.max_tokens or MAX_TOKENS)
        self.transform = image_transform("crop", config.image_size, train=True)
        self.side = config.image_size // STRIDE

    def __len__(self):
        return len(self.products)

    def __getitem__(self, key):
        for skipped in range(len(self.products)):
            try:
                sample = self.sample(*key)
                return {**sample, "skipped": skipped} if self.skip_broken else sample
            except InputError:
                if not self.skip_broken:
                    raise
                key = (key[0], (key[1] + 1) % len(self.products), key[2])
        raise InputError("no image of the data set can be read")

    def sample(self, epoch, index, objective):
        rng = np.random.default_rng([self.seed, epoch, index])
        product = self.products[index]
        ids, words = self.texts[index]
        sample = {"input_ids": ids, "product_id": index}
        views = rng.permutation(product.images)  # the last differs from the first wherever there are two
        paths = [views[0], views[-1]] if objective == "mvc" else [views[0]]
        sample["image"], *second = open_augmented(product.name, paths, self.transform, rng)
        if objective == "itm":
            sample["itm_draws"] = rng.random()
        elif objective == "mlm":
            sample["masked_ids"], sample["mlm_labels"] = mask_words(ids, words, self.tokenizer, rng, self.mask_share)
        elif objective == "mpfc":
            sample["patch_mask"] = mask_patches(self.side, rng)
        elif objective == "mvc":
            sample["image2"] = second[0]
            sample["text_drop"] = [False, *drop_some(len(ids) - 2, 0.25, rng), False]
            sample["patch_drop"] = drop_some(self.side**2, 0.25, rng)
        elif objective == "pac":
            sample["attributes"] = attribute_weights(product.attributes, self.n_attributes)
        return sample


def open_augmented(name, paths, transform, rng):
    """The transformed images, uint8 arrays (S, S, 3); an unreadable one is an InputError with the product's name."""
    try:
        return [transform(open_image(path), rng) for path in paths]
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def attribute_weights(attributes, n):
    """A product's attribute ids -> float32 (n,) that share weight 1 equally; all 0 where it has none."""
    weights = torch.zeros(n)
    if attributes:
        weights[attributes] = 1.0
        weights /= weights.sum()
    return weights


def collate(samples):
    """Samples -> batch of tensors, text padded to the longest of the batch."""
    batch = pad_texts([s["input_ids"] for s in samples]) if "input_ids" in samples[0] else {}
    for key in samples[0]:
        column = [s[key] for s in samples]
        if key == "masked_ids":
            batch[key] = pad(column)
        elif key == "mlm_labels":
            batch[key] = pad(column, -100)
        elif key == "text_drop":
            batch[key] = pad(column, False)
        elif key in ("image", "image2"):
            batch[key] = stack_images(column)
        elif key != "input_ids":
            batch[key] = torch.stack(column) if torch.is_tensor(column[0]) else torch.as_tensor(np.asarray(column))
    return {k: v.float() if v.dtype == torch.float64 else v for k, v in batch.items()}


class Batches:
    """Batch sampler: the keys (epoch, index, objective) of this process's micro-batches from update `start` on.

    The order of an epoch follows from (seed, epoch), so a resumed run decodes nothing that it skips. Rows of an
    update go to micro-batches, then to processes, in order; the rest of an epoch that fills no batch is left out."""

    def __init__(self, n, config, processes, start=0, objective_at=lambda step: None):
        share = processes.world_size * config.grad_accum
        if config.batch_size % share:
            raise InputError(
                f"batch_size: found {config.batch_size}, expected a multiple of processes x grad_accum "
                f"= {processes.world_size} x {config.grad_accum}"
            )
        if n < config.batch_size:
            raise InputError(f"batch_size: found {config.batch_size}, but the data has only {n} products")
        self.n, self.config, self.processes = n, config, processes
        self.start, self.objective_at = start, objective_at
        self.epoch, self.order = None, None  # the order drawn last

    def __len__(self):
        return (self.config.max_steps - self.start) * self.config.grad_accum

    def update(self, step):
        """(epoch, rows (batch_size,), objective) of update `step`, over all processes and micro-batches."""
        size = self.config.batch_size
        epoch, i = divmod(step, self.n // size)
        if epoch != self.epoch:
            self.order = np.random.default_rng([self.config.seed, epoch]).permutation(self.n)
            self.epoch = epoch
        return epoch, self.order[i * size : (i + 1) * size], self.objective_at(step)

    def __iter__(self):
        for step in range(self.start, self.config.max_steps):
            epoch, rows, objective = self.update(step)
            micros = rows.reshape(self.config.grad_accum, self.processes.world_size, -1)
            for micro in micros[:, self.processes.rank]:
                yield [(epoch, int(index), objective) for index in micro]


def train_loader(dataset, batches, config, device):
    """A DataLoader over `batches`, with workers that read ahead and pinned memory for the GPU."""
    ahead = {"prefetch_factor": 4, "persistent_workers": True} if config.workers else {}
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=config.workers,
        worker_init_fn=leave_group,
        pin_memory=device.type == "cuda",
        **ahead,
    )


class Samples(Dataset):
    """Samples of fine-tuning and evaluation; a key is an index, or (epoch, index, anything) in training.

    `draw(item, rng)` picks what this visit needs of items[index], under the batch's names: "image" and "image2" (a
    path), and numbers. All items have a "text", or none has. Evaluation items have nothing to pick: draw=None takes
    them as they are."""

    def __init__(self, items, tokenizer, transform, max_tokens, draw=None, seed=0):
        self.items, self.transform, self.draw, self.seed = items, transform, draw, seed
        self.texts = Texts(tokenizer, [item["text"] for item in items if "text" in item], max_tokens)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        epoch, index = key[:2] if isinstance(key, tuple) else (0, key)
        rng = np.random.default_rng([self.seed, epoch, index])
        row = self.draw(self.items[index], rng) if self.draw else self.items[index]
        sample = {k: v for k, v in row.items() if k not in ("image", "image2", "text", "name")}
        if "text" in row:
            sample["input_ids"] = self.texts[index][0]
        names = [k for k in ("image", "image2") if k in row]
        images = open_augmented(row.get("name", f"item {index}"), [row[k] for k in names], self.transform, rng)
        return {**sample, **dict(zip(names, images, strict=True))}


def draw_product(item, rng):
    """One image of the product at random, with its text and labels."""
    return {**item, "image": item["image"][rng.integers(len(item["image"]))]}


def draw_pair(outfit, rng):
    """Two different items of an outfit: question and blank (recipe 4, OCIR's Decision), with their categories.

    outfit {"items": [(path, category), ...]}; two images and their categories, for `losses.ocir`."""
    a, b = rng.permutation(len(outfit["items"]))[:2]
    (image, category), (image2, wanted) = outfit["items"][a], outfit["items"][b]
    return {"image": image, "image2": image2, "category": category, "wanted": wanted, "name": outfit["name"]}


def need(row, key, kind, where):
    """row[key] of type `kind`, or an InputError that says where, what was found and what was expected."""
    value = row.get(key) if isinstance(row, dict) else None
    if type(value) is not kind:
        raise InputError(f"{where}: key {key!r}: found {value!r:.60}, expected {kind.__name__}")
    return value


def image_of(folder, name, where):
    """Path of the image that FashionIQ or Polyvore Outfits call `name`; raises InputError on what is no name."""
    try:
        if type(name) is not str or not name:
            raise ValueError(f"found {name!r:.60}, expected the name of an image")
        return inside(folder, f"{name}.jpg")
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


@contextlib.contextmanager
def noting(faults):
    """Let an InputError pass, or note it where `faults` is a list: `check` wants all of a file's."""
    try:
        yield
    except InputError as error:
        if faults is None:
            raise
        faults.append(str(error))


def load_fashioniq(root, garment, split, gallery="original", faults=None):
    """(queries, gallery) of one FashionIQ class: [{"image" (reference), "image2" (target), "text", "target"}], [name].

    Public files: the gallery is every image of the split file ("original"; 3,817 dress, 6,346 shirt, 5,373 toptee in
    val) or the union of references and targets ("val"). The authors' extended files name the gallery themselves: the
    distinct `target_id` of all rows, those with `fake_data` being nobody's query (recipe 3).
    Raises InputError on files that are missing or bad and on a gallery that lacks a target; see `noting`."""
    if gallery not in ("original", "val"):
        raise InputError(f"gallery: found {gallery!r}, expected original or val")
    folder = Path(root, "FashionIQ")
    path, images = folder / "captions" / f"cap.{garment}.{split}.json", folder / "images"
    queries, names = [], []
    rows = read_json(path, list)
    extended = isinstance(rows[0], dict) and "fake_data" in rows[0]
    for i, row in enumerate(rows):
        where = f"{path}: entry {i}"
        with noting(faults):
            target = need(row, "target", str, where)
            if extended and row.get("garment_class", garment) not in (garment, FASHIONIQ_CLASSES.index(garment)):
                continue
            image2 = image_of(images, target, where)
            names.append(target)
            if extended and need(row, "fake_data", bool, where):
                continue
            candidate, captions = need(row, "candidate", str, where), need(row, "captions", list, where)
            image = image_of(images, candidate, where)
            if not all(type(caption) is str for caption in captions):
                raise InputError(f"{where}: key 'captions': found {captions!r:.60}, expected texts")
            if not extended:
                names.append(candidate)
            text = ", ".join(captions)
            queries.append({"image": image, "image2": image2, "text": text, "target": target, "name": where})
    if gallery == "original" and not extended:
        path = folder / "image_splits" / f"split.{garment}.{split}.json"
        names = []
        for i, name in enumerate(read_json(path, list)):
            with noting(faults):
                image_of(images, name, f"{path}: entry {i}")
                names.append(name)
    names = list(dict.fromkeys(names))
    with noting(faults):
        missing = {q["target"] for q in queries} - set(names)
        if missing:
            raise InputError(f"{path}: target {min(missing)} stands in no row of the gallery ({len(missing)} such)")
        if not queries:
            raise InputError(f"{path}: no query in it; expected rows that are not all fake_data")
    return queries, names


def load_polyvore_items(folder, faults=None):
    """({item id: its metadata}, {category id, an int: number}) of a PolyvoreOutfits folder.

    Categories are numbered in the released checkpoint's order where POLYVORE_CATEGORIES knows them all, else in
    ascending order of their ids. Raises InputError on a file that is missing or bad; see `noting`."""
    path, metadata = Path(folder, POLYVORE_ITEMS), {}
    for item, row in read_json(path, dict).items():
        with noting(faults):
            text = need(row, "category_id", str, f"{path}: item {item!r:.60}")
            if not re.fullmatch("[0-9]{1,9}", text):
                raise InputError(f"{path}: item {item!r:.60}: category_id: found {text!r:.60}, expected a whole number")
            metadata[item] = row
    order = sorted({int(row["category_id"]) for row in metadata.values()})
    if set(order) <= set(POLYVORE_CATEGORIES):
        order = POLYVORE_CATEGORIES
    return metadata, {category: i for i, category in enumerate(order)}


class PolyvoreCategories:
    """The fine categories of a PolyvoreOutfits folder, by name and of an image, numbered as in training.

    Raises InputError where there are other than `n`, the number that the checkpoint knows."""

    def __init__(self, folder, n):
        self.folder = Path(folder).resolve()
        self.metadata, self.number = load_polyvore_items(folder)
        if len(self.number) != n:
            found = f"{len(self.number)} categories, but the checkpoint's CSA-Net has {n}"
            raise InputError(f"{folder}: {found}; expected the folder of its training")

    def numbers(self, name):
        """The sorted numbers that a name or id stands for; Polyvore's coarse names stand for several.

        "shoe" and "shoes" are one name. Raises InputError on one that no item has, with those that there are."""
        alike, known = set(), set()
        for row in self.metadata.values():
            names = {row["category_id"], str(row.get("semantic_category", row["category_id"]))}
            known |= names
            if name.lower().removesuffix("s") in {n.lower().removesuffix("s") for n in names}:
                alike.add(self.number[int(row["category_id"])])
        if not alike:
            shown = sorted(n for n in known if not n.isdigit()) or sorted(known, key=int)
            raise InputError(f"category: found {name!r}, expected one of {', '.join(shown)}, or an id of {self.folder}")
        return sorted(alike)

    def of_image(self, path):
        """The number of the item that an image, a path as os.path.realpath gives it, shows; -1: not in images/."""
        folder, name = os.path.split(path)
        item = self.metadata.get(os.path.splitext(name)[0]) if folder == f"{self.folder}/images" else None
        return self.number[int(item["category_id"])] if item else -1


def load_polyvore(root, split, part, faults=None):
    """(outfits, n_categories) of Polyvore Outfits' OCIR files, split disjoint or nondisjoint, part train or test.

    An outfit: {"items": [(path, category)] of the question, "blank": its id, "blank_item": (path, category), "fake"}.
    Raises InputError on files that are missing or bad; see `noting`."""
    folder = Path(root, "PolyvoreOutfits")
    if split not in ("disjoint", "nondisjoint"):
        raise InputError(f"split: found {split!r}, expected disjoint or nondisjoint")
    metadata, number = load_polyvore_items(folder, faults)
    path, outfits = folder / f"ocir_{split}_{part}.json", []
    for i, row in enumerate(read_json(path, list)):
        where = f"{path}: entry {i}"
        with noting(faults):
            question, blank = need(row, "question", list, where), need(row, "blank", str, where)
            images = [image_of(folder / "images", item, where) for item in [*question, blank]]
            unknown = [item for item in [*question, blank] if item not in metadata]
            if unknown or not question:
                raise InputError(f"{where}: item {unknown[:1]} is not in {POLYVORE_ITEMS}, or the question is empty")
            if part == "train" and set(question) == {blank}:
                raise InputError(f"{where}: blank {blank!r:.60} is the only item of the question, expected two items")
            *items, last = zip(
                images, (number[int(metadata[item]["category_id"])] for item in [*question, blank]), strict=True
            )
            fake = part == "test" and need(row, "fake_data", bool, where)
            outfits.append({"items": items, "blank": blank, "blank_item": last, "fake": fake, "name": where})
    with noting(faults):
        if all(outfit["fake"] for outfit in outfits):
            raise InputError(f"{path}: no outfit to ask for in it; expected rows that are not all fake_data")
    return outfits, len(number)


# ---------------------------------------------------------------------------------------------------------------------
# checking a data root


def image_fault(image):
    """What is wrong with (path, product or row that names it), as a line, or None."""
    path, name = image
    if not os.path.exists(path):
        return f"{path}: missing (of {name})"
    try:
        open_image(path)
    except InputError as error:
        return f"{name}: {error}"


def check(root, workers=0, open_images=True):
    """(report lines, faults) over everything under `root`: counts per file, and every fault with file and entry.

    Every image is opened once, by `workers` processes (0: this one)."""
    report, faults, images = [], [], {}
    for source, row in SETS.items():
        for split, (file, _) in row["splits"].items():
            if not Path(root, source, file).exists():
                report.append(f"{source:16} {split:5}  no {file}")
                continue
            with noting(faults):
                products, found = scan_products(root, source, split)
                faults += found
                images |= {path: product.name for product in products for path in product.images}
                n_images, vocabulary = sum(len(p.images) for p in products), {a for p in products for a in p.attributes}
                labels = [f"{len({getattr(p, k) for p in products} - {None})} {k}" for k in ("category", "subcategory")]
                shown = f", {', '.join(labels)} labels" if source == "FashionGen" else ""
                counts = f"{len(products)} products, {n_images} images, {len(vocabulary)} attributes{shown}"
                report.append(f"{source:16} {split:5}  {counts}")
                if split == "val":
                    check_subcategories(products)
    for garment in FASHIONIQ_CLASSES:
        for split in ("train", "val"):
            if Path(root, "FashionIQ", "captions", f"cap.{garment}.{split}.json").exists():
                with noting(faults):
                    gallery = "original" if split == "val" else "val"  # training needs no split file
                    queries, names = load_fashioniq(root, garment, split, gallery, faults)
                    images |= {q[key]: q["name"] for q in queries for key in ("image", "image2")}
                    folder = os.path.join(root, "FashionIQ", "images")
                    images = {**{f"{folder}/{name}.jpg": f"split.{garment}.{split}.json" for name in names}, **images}
                    report.append(
                        f"FashionIQ        {split:5}  {garment}: {len(queries)} queries, gallery {len(names)}"
                    )
    for split in ("disjoint", "nondisjoint"):
        for part in ("train", "test"):
            if Path(root, "PolyvoreOutfits", f"ocir_{split}_{part}.json").exists():
                with noting(faults):
                    outfits, n = load_polyvore(root, split, part, faults)
                    images |= {path: o["name"] for o in outfits for path, _ in [*o["items"], o["blank_item"]]}
                    report.append(f"PolyvoreOutfits  {part:5}  {split}: {len(outfits)} outfits, {n} categories")
    if not open_images:
        return report, list(dict.fromkeys(faults))
    pool = concurrent.futures.ProcessPoolExecutor(workers) if workers else contextlib.nullcontext()
    with pool:
        found = pool.map(image_fault, images.items(), chunksize=64) if workers else map(image_fault, images.items())
        faults += filter(None, tqdm(found, "images", len(images), leave=False, disable=None))
    return report, list(dict.fromkeys(faults))


NEEDS = """
pre-training             FashionGen, BigFACAD, Fashion200k, PolyvoreOutfits: train; FashionGen: val for validation
fashiongen_retrieval     FashionGen: train, val
fashiongen_category      FashionGen: train, val, with category_id
fashiongen_subcategory   FashionGen: train, val, with subcategory_id
fashioniq                FashionIQ: captions/, image_splits/, images/
polyvore                 PolyvoreOutfits: ocir_*.json, polyvore_item_metadata.json, images/"""


@dataclass
class DataConfig:
    """Settings of `python data.py`."""

    data_root: str = setting("data/datasets", "folder that holds FashionGen/, BigFACAD/, Fashion200k/, ...")
    workers: int = setting(4, "processes that open images; 0: this one")


def main():
    config = load_config(DataConfig, description=__doc__.splitlines()[0])
    if not os.path.isdir(config.data_root):
        raise InputError(f"data_root: no folder {config.data_root}")
    report, faults = check(config.data_root, max(0, config.workers))
    print("\n".join(report), NEEDS, sep="\n")
    if faults:
        print(f"\n{len(faults)} faults:", *faults, sep="\n")
        raise InputError(f"{config.data_root}: {len(faults)} faults, listed above")


if __name__ == "__main__":
    run(main)
