"""Data: photos and texts of the five fashion data sets, WordPiece, masks, and the order of training batches.

Pictures leave the loader as uint8 and are normalised on the device (`to_device`). Every draw of a sample follows from
(seed, epoch, index), every batch from (seed, step): neither the number of processes nor a restart changes them."""

import functools
import math
import os
import warnings
from pathlib import Path

import numpy as np
import tokenizers
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from settings import STRIDE, InputError

MEAN = (0.46777044, 0.44531429, 0.40661017)  # of the fashion photos, not ImageNet's; the image tokenizer's too
STD = (0.12221994, 0.12145835, 0.14380469)
MAX_TOKENS, FASHIONIQ_MAX_TOKENS = 75, 50  # [CLS] and [SEP] included
MAX_PIXELS = 64_000_000  # of an image file; what is larger takes a gigabyte on its way, and is no product photo
SKIP_BROKEN = "replace a product whose image cannot be read by the next one, and count it"

# ---------------------------------------------------------------------------------------------------------------------
# the data sets, as rows of a table


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
    """(PIL image, np.random.Generator) -> uint8 array (size, size, 3), as docs/recipe.md "Images".

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


def tokenize(tokenizer, texts, max_tokens=MAX_TOKENS):
    """Texts -> a list of (ids, words): [CLS] ... [SEP], at most max_tokens; words[i] = token i's word, -1 for specials.

    A text of any length, empty or of unknown characters is fine: it is cut, or is only [CLS] [SEP], or holds [UNK]."""
    # half a surrogate pair, which JSON can hold, is no text
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    encodings, keep = tokenizer.encode_batch(texts, add_special_tokens=False), max_tokens - 2
    return [([cls, *e.ids[:keep], sep], [-1, *e.word_ids[:keep], -1]) for e in encodings]


class Texts:
    """Many texts, encoded once: anew at every visit it takes a quarter of a sample's time. texts[i] as of `tokenize`.

    Memory: 6 bytes a text for each of max_tokens, shared by the loader's workers."""

    def __init__(self, tokenizer, texts, max_tokens, chunk=4096):
        self.ids = np.zeros((len(texts), max_tokens), np.int32)
        self.words, self.lengths = np.zeros(self.ids.shape, np.int16), np.zeros(len(texts), np.int16)
        for start in range(0, len(texts), chunk):
            for i, (ids, words) in enumerate(tokenize(tokenizer, texts[start : start + chunk], max_tokens), start):
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


def text_batch(vocab, texts, max_tokens=MAX_TOKENS):
    """Texts and the text of a vocab.txt -> {"input_ids", "attention_mask"} (B, longest) int64."""
    tokenizer = wordpiece(vocab)
    return pad_texts([ids for ids, _ in tokenize(tokenizer, texts, max_tokens)])


# ---------------------------------------------------------------------------------------------------------------------
# masks


def mask_words(ids, words, tokenizer, rng, share=0.15):
    """Whole-word masking (docs/recipe.md "MLM") -> (masked ids, labels), lists as long as ids; -100 = no target.

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
    """BEiT's block-wise mask (docs/recipe.md "MPFC") on a side x side grid -> bool (side * side,), True = masked."""
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
    """bool (n,) with floor(share * n) True, drawn without replacement (docs/recipe.md "MVC")."""
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
                return {**sample, "skipped": skipped}
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

    def rows_of(self, step):
        """(epoch, rows (batch_size,), objective) of update `step`, over all processes and micro-batches."""
        size = self.config.batch_size
        epoch, i = divmod(step, self.n // size)
        if epoch != self.epoch:
            self.order = np.random.default_rng([self.config.seed, epoch]).permutation(self.n)
            self.epoch = epoch
        return epoch, self.order[i * size : (i + 1) * size], self.objective_at(step)

    def __iter__(self):
        for step in range(self.start, self.config.max_steps):
            epoch, rows, objective = self.rows_of(step)
            micros = rows.reshape(self.config.grad_accum, self.processes.world_size, -1)
            for micro in micros[:, self.processes.rank]:
                yield [(epoch, int(index), objective) for index in micro]


def leave_group(worker=0):
    """For data loader workers: Ctrl-C and torchrun's signals go to the whole process group, but the main process needs
    its workers for the last update. A SIGTERM to them alone still ends them: so a main process that fails does it."""
    os.setpgrp()


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

    `pick(item, rng)` picks what this visit needs of items[index], under the batch's names: "image" and "image2" (a
    path), and numbers. All items have a "text", or none has. Evaluation items have nothing to pick: pick=None takes
    them as they are."""

    def __init__(self, items, tokenizer, transform, max_tokens, pick=None, seed=0):
        self.items, self.transform, self.pick, self.seed = items, transform, pick, seed
        self.texts = Texts(tokenizer, [item["text"] for item in items if "text" in item], max_tokens)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        epoch, index = key[:2] if isinstance(key, tuple) else (0, key)
        rng = np.random.default_rng([self.seed, epoch, index])
        row = self.pick(self.items[index], rng) if self.pick else self.items[index]
        sample = {k: v for k, v in row.items() if k not in ("image", "image2", "text", "name")}
        if "text" in row:
            sample["input_ids"] = self.texts[index][0]
        names = [k for k in ("image", "image2") if k in row]
        images = open_augmented(row.get("name", f"item {index}"), [row[k] for k in names], self.transform, rng)
        return {**sample, **dict(zip(names, images, strict=True))}


def pick_image(item, rng):
    """One image of the product at random, with its text and labels."""
    return {**item, "image": item["image"][rng.integers(len(item["image"]))]}


def pick_pair(outfit, rng):
    """Two different items of an outfit: question and blank (docs/recipe.md "Fine-tuning"), with their categories.

    outfit {"items": [(path, category), ...]}; two images and their categories, for `losses.ocir`."""
    a, b = rng.permutation(len(outfit["items"]))[:2]
    (image, category), (image2, wanted) = outfit["items"][a], outfit["items"][b]
    return {"image": image, "image2": image2, "category": category, "wanted": wanted, "name": outfit["name"]}


# ---------------------------------------------------------------------------------------------------------------------
# checking a data root
