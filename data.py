"""What a training step eats: texts as ids, images as pixels, masks, samples, and batches in their order.

Images leave the loader as uint8, and `to_device` normalises them. Every random choice of a sample follows from (seed,
epoch, index), and every batch from (seed, step). So neither the number of processes nor a restart changes them.

The batch of an update has batch_size rows, of all processes together. --grad_accum cuts it into micro-batches, which go
through the model one after another. A process has its share of the rows of each micro-batch."""

import functools
import math
import os
import sys
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from plumbing import annotations, loading
from plumbing.photos import CROPPED, RESIZED, leave_out, leave_out_of_products, open_image
from plumbing.settings import NO_LABEL, STRIDE, InputError

SETS = tuple(annotations.SETS)  # names of the data sets that pre-training can use
MAX_TOKENS, FASHIONIQ_MAX_TOKENS = 75, 50  # [CLS] and [SEP] included
MANY_UNKNOWN = 0.02  # the share of word pieces that are [UNK] from which on it is said
MEAN = (0.46777044, 0.44531429, 0.40661017)  # of fashion photos (not ImageNet's), for model and image tokenizer
STD = (0.12221994, 0.12145835, 0.14380469)

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else tokenizers warns when a loader forks after its use

# ---- text ------------------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    ids: list  # of [CLS], the text's tokens and [SEP]
    word_numbers: list  # of the word that each token belongs to, from 0; -1 for [CLS] and [SEP]


def tokenize(tokenizer, texts, max_tokens=MAX_TOKENS):
    """Texts -> a list of `Tokens`, each of at most max_tokens.

    No text is refused: a long one is cut, an empty one is [CLS] [SEP], unknown characters become [UNK]."""
    # JSON can hold half of a surrogate pair, which the tokenizer refuses
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    encodings, keep = tokenizer.encode_batch(texts, add_special_tokens=False), max_tokens - 2
    return [Tokens([cls, *e.ids[:keep], sep], [-1, *e.word_ids[:keep], -1]) for e in encodings]


class Texts:
    """Many texts, tokenized once; to do it at every visit takes a quarter of a sample's time. texts[i] is a `Tokens`.

    Memory: 6 bytes for each of max_tokens of a text. The loader's workers share it. Raises as `check_unknown`."""

    def __init__(self, tokenizer, texts, max_tokens, chunk=4096):
        self.ids = np.zeros((len(texts), max_tokens), np.int32)
        self.word_numbers = np.zeros((len(texts), max_tokens), np.int16)
        self.lengths = np.zeros(len(texts), np.int16)
        n_unknown = n_stops = 0
        for start in range(0, len(texts), chunk):
            for i, tokens in enumerate(tokenize(tokenizer, texts[start : start + chunk], max_tokens), start):
                n = self.lengths[i] = len(tokens.ids)
                self.ids[i, :n], self.word_numbers[i, :n] = tokens
                n_unknown += tokens.ids.count(tokenizer.token_to_id("[UNK]"))
                n_stops += tokens.ids.count(tokenizer.token_to_id("."))
        # [CLS], [SEP] and the full stops that join a product's title and description are no words.
        check_unknown(n_unknown, int(self.lengths.sum()) - 2 * len(texts) - n_stops)

    def __getitem__(self, i):
        n = self.lengths[i]
        return Tokens(self.ids[i, :n].tolist(), self.word_numbers[i, :n].tolist())


@functools.cache  # a validation reads the same texts as the one before
def check_unknown(n_unknown, n_pieces):
    """Say how many of all word pieces are [UNK] where it is more than MANY_UNKNOWN. InputError above half."""
    share = n_unknown / max(1, n_pieces)
    said = f"texts: {share:.1%} of their {n_pieces} word pieces are [UNK]"
    if share > 0.5:
        raise InputError(f"{said}; the vocabulary does not know this script; take a BERT that does")
    if share > MANY_UNKNOWN:
        print(f"{said}; the vocabulary does not know these words", file=sys.stderr)


def check_lengths(config, positions, max_tokens=MAX_TOKENS):
    """Raise InputError where a text of these settings would be longer than the model's number of positions."""
    longest = config.max_tokens or max_tokens
    if not 3 <= longest <= positions:
        raise InputError(f"max_tokens: found {longest}, expected 3 to {positions}, the positions of the model")


def pad(rows, value=0):
    """Lists of unequal length -> tensor (B, longest), int64 or bool as they are; `value` fills the ends."""
    rows = [torch.from_numpy(np.asarray(row)) for row in rows]
    return pad_sequence(rows, batch_first=True, padding_value=value)


def pad_texts(rows):
    """Lists of ids -> {"input_ids", "attention_mask"} (B, longest) int64; mask 1 = attended, 0 = padding."""
    return {"input_ids": pad(rows), "attention_mask": pad([[1] * len(row) for row in rows])}


def text_batch(tokenizer, texts, max_tokens=MAX_TOKENS):
    """A `tokenizers.Tokenizer` and texts -> {"input_ids", "attention_mask"}, as `pad_texts`."""
    return pad_texts([tokens.ids for tokens in tokenize(tokenizer, texts, max_tokens)])


# ---- images ----------------------------------------------------------------------------------------------------------


def to_pixels(image, fit, size, rng=None):
    """A PIL image -> uint8 array (size, size, 3). Source: docs/recipe.md "Images".

    fit: `resize_then_crop` (pre-training, FashionGen) or `crop_then_resize` (FashionIQ, OCIR). In training `rng`, a
    np.random.Generator, picks the part of the image and mirrors half of the images."""
    image = fit(image, size, rng)
    if rng is not None and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def resize_then_crop(image, size, rng):
    """A PIL image resized to RESIZED / CROPPED of `size`; of that a part of size x size, the centre where rng is None.

    One call of Pillow does both. Its pixels are those of two calls at size 224, and nearly those at other sizes."""
    large = round(size * RESIZED / CROPPED)
    centre = round((large - size) / 2)
    left, top = (centre, centre) if rng is None else rng.integers(large - size + 1, size=2).tolist()
    x, y = image.width / large, image.height / large
    box = (left * x, top * y, (left + size) * x, (top + size) * y)
    return image.resize((size, size), Image.Resampling.BILINEAR, box)


def crop_then_resize(image, size, rng):
    """A random part of a PIL image, or without rng the whole image, resized to size x size."""
    if rng is None:
        return image.resize((size, size), Image.Resampling.BILINEAR)
    # torchvision uses torch's generator, so give the caller its state back after it
    with torch.random.fork_rng(devices=[]):
        # seed the CPU's generator alone: torch.manual_seed also queues a call for GPUs, which a worker never starts
        torch.default_generator.manual_seed(int(rng.integers(2**63)))
        return v2.RandomResizedCrop(size, scale=(0.8, 1.0), ratio=(0.75, 1.3))(image)


def stack_images(arrays):
    """uint8 arrays (H, W, 3) -> tensor (B, 3, H, W) with channels last in memory, where convolutions are fast."""
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


@functools.cache  # to copy them to a GPU for every batch would make the host wait for it
def mean_and_std(device):
    """MEAN and STD in units of uint8, float32 (3, 1, 1) each, on the device."""
    return [torch.tensor(x, device=device).view(3, 1, 1) * 255 for x in (MEAN, STD)]


def normalize(images):
    """uint8 (B, 3, H, W) on any device -> float32 of the same shape, in units of STD around MEAN."""
    mean, std = mean_and_std(images.device)
    return (images.float() - mean) / std


def load_pixels(paths, size):
    """Image files -> uint8 (B, 3, size, size), fitted as in the validation of pre-training."""
    return stack_images([to_pixels(open_image(path), resize_then_crop, size) for path in paths])


def load_images(paths, size):
    """Image files -> float32 (B, 3, size, size), as `load_pixels` and normalised."""
    return normalize(load_pixels(paths, size))


# ---- masks: True is what the model sees; in MPFC's `patch_mask` alone True is what is masked -------------------------


def mask_words(ids, word_numbers, tokenizer, rng, share=0.15):
    """Whole-word masking -> (masked ids, labels), lists as long as ids. Source: docs/recipe.md "MLM".

    A word is chosen with probability `share`. Of the chosen words 80 % become [MASK], 10 % become random tokens (a new
    one for each piece) and 10 % stay. The labels are the ids of chosen words, and NO_LABEL elsewhere.
    Every text has a label: where no word was chosen, one is chosen at random; where there is no word, it is [SEP]."""
    n_words = 1 + max(word_numbers)
    chosen = rng.random(n_words) < share
    if n_words and not chosen.any():
        chosen[rng.integers(n_words)] = True
    fate = rng.random(n_words)
    masked, labels = list(ids), [NO_LABEL] * len(ids)
    for i, word in enumerate(word_numbers):
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
    """BEiT's block-wise mask of a side x side grid: bool (side * side,), True = masked; docs/recipe.md "MPFC".

    Blocks are placed until enough patches are masked, or until ten tries in a row have placed none."""
    remaining = max(1, round(8 * side * side / 49))  # patches that are still to be masked: 8 of 49 at 224 pixels
    least = max(1, remaining // 2)  # stays as it is, although later fewer patches may be missing
    mask, failures = np.zeros((side, side), bool), 0
    while remaining > 0 and failures < 10:
        # The area is uniform between `least` and `remaining`, as in BEiT also where `remaining` is the smaller one.
        area = least + (remaining - least) * rng.random()
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        failures += 1
        if h >= side or w >= side:
            continue
        top, left = rng.integers(side - h + 1), rng.integers(side - w + 1)
        block = mask[top : top + h, left : left + w]
        new = block.size - int(block.sum())
        if 0 < new <= remaining:
            block[:] = True
            remaining, failures = remaining - new, 0
    if not mask.any():  # on tiny grids all tries can fail, and every image must have a target
        mask.flat[rng.integers(mask.size)] = True
    return mask.reshape(-1)


def keep_most(n, dropped, rng):
    """A list of n bools, True = kept. The share `dropped` of them, rounded down, is False: docs/recipe.md "MVC"."""
    keep = np.ones(n, bool)
    keep[rng.choice(n, int(dropped * n), replace=False)] = False
    return keep.tolist()


# ---- training samples and their order --------------------------------------------------------------------------------


class Key(NamedTuple):  # of one training sample
    epoch: int
    index: int  # of its item
    objective: str  # its name; in fine-tuning the task's


class Samples(Dataset):
    """The samples of `items` by index, as an evaluation reads them.

    An item is a dict of "image", "image2" (a path each), "text", "name" (for messages) and numbers, as far as it has
    them; all have a text or none has. A broken image raises InputError."""

    def __init__(self, items, tokenizer, fit, config, max_tokens):
        self.items, self.fit, self.config = items, fit, config
        self.texts = Texts(tokenizer, [item["text"] for item in items if "text" in item], max_tokens)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.read_item(index, self.items[index])

    def read_item(self, index, item, rng=None):
        """The sample of `item`, which has number `index`: pixels in place of paths, ids in place of the text."""
        sample = {key: value for key, value in item.items() if key not in ("text", "name")}
        for key in ("image", "image2"):
            if key in item:
                sample[key] = self.read_image(index, item[key], rng)
        if "text" in item:
            sample["input_ids"] = self.texts[index].ids
        return sample

    def read_image(self, index, path, rng):
        """The pixels of an image of item `index`, uint8 (S, S, 3). InputError begins with the item's name."""
        try:
            return to_pixels(open_image(path), self.fit, self.config.image_size, rng)
        except InputError as error:
            raise InputError(f"{self.items[index].get('name', f'item {index}')}: {error}") from None


class TrainingSamples(Samples):
    """The samples of `items` by `Key`, as training reads them.

    `pick(item, rng)` takes one image of an item's "images", or two of its "items"; None: there is nothing to pick.
    With config.missing "skip" the next item takes the place of one with a broken image, and "skipped" says how many
    were passed over."""

    def __init__(self, items, tokenizer, fit, config, max_tokens, pick=None):
        super().__init__(items, tokenizer, fit, config, max_tokens)
        self.pick = pick

    def __getitem__(self, key):
        epoch, first, objective = key
        for skipped in range(len(self)):
            index = (first + skipped) % len(self)
            rng = np.random.default_rng([self.config.seed, epoch, index])
            try:
                return {**self.sample(index, rng, objective), "skipped": skipped}
            except InputError:
                if self.config.missing == "stop":
                    raise
        raise InputError("no image of the data set can be read")

    def sample(self, index, rng, objective):
        """The sample of item `index` for an objective; `rng` makes every random choice."""
        item = self.items[index]
        return self.read_item(index, self.pick(item, rng) if self.pick else item, rng)


class Pretraining(TrainingSamples):
    """Samples of products for pre-training; each holds only what its objective needs."""

    def __init__(self, products, tokenizer, n_attributes, config):
        items = [{"images": p.images, "text": p.text, "name": p.name, "attributes": p.attributes} for p in products]
        super().__init__(items, tokenizer, resize_then_crop, config, config.max_tokens or MAX_TOKENS)
        self.tokenizer, self.n_attributes, self.side = tokenizer, n_attributes, config.image_size // STRIDE

    def sample(self, index, rng, objective):
        ids, word_numbers = self.texts[index]
        # the first and the last of the shuffled images are two different ones wherever the product has two
        paths = rng.permutation(self.items[index]["images"]).tolist()
        sample = {"input_ids": ids, "image": self.read_image(index, paths[0], rng)}
        if objective == "itm":
            sample["itm_draws"] = np.float32(rng.random())
        elif objective == "mlm":
            masked = mask_words(ids, word_numbers, self.tokenizer, rng, self.config.mask_share)
            sample["masked_ids"], sample["mlm_labels"] = masked
        elif objective == "mpfc":
            sample["patch_mask"] = mask_patches(self.side, rng)
        elif objective == "mvc":
            sample["image2"] = self.read_image(index, paths[-1], rng)
            sample["text_keep"] = [True, *keep_most(len(ids) - 2, 0.25, rng), True]  # [CLS] and [SEP] always
            sample["patch_keep"] = keep_most(self.side**2, 0.25, rng)
        elif objective == "pac":
            weights = np.zeros(self.n_attributes, np.float32)
            weights[self.items[index]["attributes"]] = 1
            sample["attributes"] = weights / max(weights.sum(), 1)  # they share weight 1; a product may have none
        return sample


PADDING = {
    "masked_ids": 0,
    "mlm_labels": NO_LABEL,
    "text_keep": False,
}  # keys of one value a token: their padding


def places(mask):
    """Where a bool tensor is True: (n,) int64, indices into its flattened form."""
    return mask.flatten().nonzero().squeeze(1)


def collate(samples):
    """Samples -> a batch of tensors, texts padded to the longest of the batch.

    "mlm_targets" and "mpfc_targets" are the `places` of the tokens and patches that have a label."""
    batch = {}
    for key in samples[0]:
        column = [sample[key] for sample in samples]
        if key == "input_ids":
            batch |= pad_texts(column)
        elif key in PADDING:
            batch[key] = pad(column, PADDING[key])
        elif key in ("image", "image2"):
            batch[key] = stack_images(column)
        else:
            batch[key] = torch.from_numpy(np.asarray(column))
    if "mlm_labels" in batch:
        batch["mlm_targets"] = places(batch["mlm_labels"] != NO_LABEL)
    if "patch_mask" in batch:
        batch["mpfc_targets"] = places(batch["patch_mask"])
    return batch


def to_device(batch, device):
    """A new dict: the batch's tensors on the device, images (the uint8 ones) normalised to float32."""
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    return {key: normalize(v) if v.dtype == torch.uint8 and v.ndim == 4 else v for key, v in batch.items()}


def check_candidates(config, parts=1):
    """Raise InputError where a contrastive loss has one candidate: it is 0, its accuracy 100 %, and nothing is learnt.

    parts: how many groups of rows of a micro-batch are compared apart. ITC, MVC and the tasks compare all rows: 1.
    ITM compares the rows of one process, so it has as many groups as there are processes."""
    least = 2 * config.grad_accum * parts
    if config.batch_size < least:
        found = f"found {config.batch_size} with grad_accum={config.grad_accum}"
        raise InputError(f"batch_size: {found}, expected {least} or more, for one product alone has no negatives")


class BatchSampler:
    """Lists of `Key`, one list for each of this process's micro-batches from update `start` on.

    The order of an epoch follows from (seed, epoch), so a resumed run opens no image of earlier updates. The rows of an
    update go to micro-batches, then to processes, in order. The rest of an epoch that fills no batch is left out."""

    def __init__(self, n, config, processes, start=0, objective_at=lambda step: None):
        if config.batch_size % (processes.world_size * config.grad_accum):
            parts = f"processes x grad_accum = {processes.world_size} x {config.grad_accum}"
            raise InputError(f"batch_size: found {config.batch_size}, expected a multiple of {parts}")
        if n < config.batch_size:
            raise InputError(f"batch_size: found {config.batch_size}, but the data has only {n} products")
        self.n, self.config, self.processes = n, config, processes
        self.start, self.objective_at = start, objective_at
        self.epoch, self.permutation = None, None  # of the epoch that was used last

    def update_at(self, step):
        """(epoch, rows, objective) of update `step`. rows: (batch_size,) int64, items of the data set."""
        size = self.config.batch_size
        epoch, i = divmod(step, self.n // size)
        if epoch != self.epoch:
            self.permutation = np.random.default_rng([self.config.seed, epoch]).permutation(self.n)
            self.epoch = epoch
        return epoch, self.permutation[i * size : (i + 1) * size], self.objective_at(step)

    def __iter__(self):
        for step in range(self.start, self.config.max_steps):
            epoch, rows, objective = self.update_at(step)
            shared = rows.reshape(self.config.grad_accum, self.processes.world_size, -1)  # (micro-batch, rank, B)
            for micro in shared[:, self.processes.rank]:
                yield [Key(epoch, int(index), objective) for index in micro]


def train_loader(dataset, sampler, config, device, ahead=4):
    """A DataLoader of the `sampler`'s batches; a worker reads `ahead` of them. For a GPU its memory is pinned."""
    workers = {"num_workers": config.workers, "worker_init_fn": loading.init_worker}
    if config.workers:
        workers |= {"prefetch_factor": ahead, "persistent_workers": True}
        n_batches = config.workers * ahead + config.grad_accum  # read ahead, and in use
        n_samples = config.batch_size // (config.grad_accum * sampler.processes.world_size)  # two images each at most
        loading.check_shared_memory(n_batches, 2 * n_samples, config.image_size)
    pin_memory = device.type == "cuda"
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, pin_memory=pin_memory, **workers)


# ---- what the stages train on ----------------------------------------------------------------------------------------


def pretraining_products(config):
    """(products to train on, FashionGen's to validate with, number of pseudo-attributes, their names) of pre-training.

    The products are `annotations.Product`s. The names are as `annotations.label_names` gives them."""
    products = annotations.load_pretraining(config.data_root, config.sets)
    val_products = annotations.load_products(config.data_root, "FashionGen", "val")
    n_attributes = annotations.count_labels(products, "attributes", config.n_attributes)
    labels = annotations.label_names(config.data_root, "pretrain")
    val_products = leave_out_of_products(val_products, config, "FashionGen val")
    return products, val_products, n_attributes, labels


def image_tokenizer_products(config):
    """(products to train on, paths of config.eval_images FashionGen-val images at most to measure on) of stage 0."""
    products = annotations.load_pretraining(config.data_root, config.sets)
    val_products = annotations.load_products(config.data_root, "FashionGen", "val")
    paths = [path for product in val_products for path in product.images][: config.eval_images]
    broken = leave_out(paths, config, "FashionGen val")
    return products, [path for path in paths if path not in broken]


# The next three functions return the training items; {"n_classes" or "n_categories": n}, a size of the model that the
# data decide; and the names of the labels, as `annotations.label_names` gives them. Each also reads the validation data
# once, so that a fault in it ends the run now and not at the first validation.


def fashiongen_items(config):
    """One item per product of FashionGen. For recognition also its label and, for the model, the number of classes."""
    train, val = (annotations.load_products(config.data_root, "FashionGen", part) for part in ("train", "val"))
    key, counts = annotations.RECOGNITION_LABELS.get(config.task), {}
    if key:
        train = annotations.with_label(train, key, "FashionGen train")
        val = annotations.with_label(val, key, "FashionGen val")
        counts = {"n_classes": annotations.count_labels([*train, *val], key)}
    train = leave_out_of_products(train, config, "FashionGen train")
    items = [{"images": p.images, "text": p.text, "name": p.name} for p in train]
    if key:
        items = [{**item, "label": getattr(product, key)} for item, product in zip(items, train, strict=True)]
    return items, counts, annotations.label_names(config.data_root, config.task)


def fashioniq_items(config):
    """One item per training triplet of the three classes: reference, target, both captions."""
    items = []
    for garment in annotations.FASHIONIQ_CLASSES:
        annotations.load_fashioniq(config.data_root, garment, "val", config.gallery)  # only to find its faults
        # Training needs no gallery. "val" takes it from the captions, for the training part may lack a split file.
        queries, _ = annotations.load_fashioniq(config.data_root, garment, "train", gallery="val")
        items += [{key: query[key] for key in ("image", "image2", "text", "name")} for query in queries]
    broken = leave_out([item[key] for item in items for key in ("image", "image2")], config, "FashionIQ train")
    return [item for item in items if not {item["image"], item["image2"]} & broken], {}, {}


def polyvore_items(config):
    """One item per outfit, with all its pieces."""
    rows, n_categories = annotations.load_polyvore(config.data_root, config.split, "train")
    annotations.load_polyvore(config.data_root, config.split, "test")
    # A row takes one item out of its outfit, the blank. Several rows may give the same outfit.
    names = {frozenset([*row["items"], row["blank_item"]]): row["name"] for row in rows}
    broken = leave_out([path for outfit in names for path, _ in outfit], config, f"Polyvore {config.split} train")
    complete = [outfit for outfit in names if not {path for path, _ in outfit} & broken]
    items = [{"items": sorted(outfit), "name": names[outfit]} for outfit in complete]
    return items, {"n_categories": n_categories}, annotations.label_names(config.data_root, "polyvore")


def pick_image(product, rng):
    """The product with one of its images, picked at random, in place of all."""
    item = {**product}
    images = item.pop("images")
    return {**item, "image": images[rng.integers(len(images))]}


def pick_pair(outfit, rng):
    """Two different items of outfit["items"], (path, category) each: the question and the blank.

    Gives their images and categories under the names that `losses.ocir` reads. Source: docs/recipe.md "Fine-tuning"."""
    a, b = rng.permutation(len(outfit["items"]))[:2]
    (image, category), (image2, wanted) = outfit["items"][a], outfit["items"][b]
    return {"image": image, "image2": image2, "category": category, "wanted": wanted, "name": outfit["name"]}
