"""Photos for the model: fitted to its size, normalised, and left out where they cannot be read."""

import concurrent.futures
import contextlib
import functools
import os
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from photos import CROPPED, RESIZED, open_image
from settings import InputError

MEAN = (0.46777044, 0.44531429, 0.40661017)  # of fashion photos (not ImageNet's), for model and image tokenizer
STD = (0.12221994, 0.12145835, 0.14380469)
MISSING = "an image file that is missing or broken: stop (end with its name) or skip (leave it out and count it)"


def leave_out(paths, config, what):
    """The set of image files `paths` that a validation or an evaluation must do without; usually empty.

    config.missing "stop": raises InputError where a file is missing or empty, and says how many of `what` are.
    "skip": opens every file, in config.workers threads, and prints how many cannot be read. InputError if none can."""
    paths = list(dict.fromkeys(map(str, paths)))
    if config.missing == "stop":
        gone = [path for path in paths if not os.path.exists(path) or not os.path.getsize(path)]
        if gone:
            cure = "fetch them, or set --missing=skip to leave them out"
            raise InputError(f"{gone[0]}: image is missing; {len(gone)} of {len(paths)} images of {what} are; {cure}")
        return set()
    with concurrent.futures.ThreadPoolExecutor(max(1, config.workers)) as pool:  # Pillow decodes without Python's lock
        broken = {path for path, fine in zip(paths, pool.map(is_readable, paths), strict=True) if not fine}
    if broken:
        if len(broken) == len(paths):
            raise InputError(f"{what}: none of its {len(paths)} images can be read; fetch them anew, as {min(broken)}")
        print(f"{what}: {len(broken)} of {len(paths)} images cannot be read and are left out, as {min(broken)}")
    return broken


@functools.cache  # a validation asks for the same files as the one before
def is_readable(path):
    """Whether `open_image` can open the file."""
    with contextlib.suppress(InputError):
        open_image(path)
        return True
    return False


def leave_out_of_products(products, config, what):
    """The products without the images that `leave_out` finds, and without products that lose all of theirs."""
    broken = leave_out([path for product in products for path in product.images], config, what)
    kept = [replace(p, images=[path for path in p.images if str(path) not in broken]) for p in products]
    return [product for product in kept if product.images]


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


def load_images(paths, size):
    """Image files -> normalised float32 (B, 3, size, size), fitted as in the validation of pre-training."""
    return normalize(stack_images([to_pixels(open_image(path), resize_then_crop, size) for path in paths]))
