"""Any image file, opened as RGB, or left out where it cannot be. It needs no torch, so prepare/ takes little memory."""

import concurrent.futures
import contextlib
import functools
import io
import mimetypes
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageOps, PngImagePlugin

from plumbing.files import cause_of, not_the_file
from plumbing.settings import InputError

RESIZED, CROPPED = 256, 224  # sides in pixels before and after a crop; other image sizes keep this ratio
# Pillow opens more, such as .eps and .h5, but those are no photos.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".jpe", ".avif", ".mpo")
IMAGE_SUFFIXES += (".tga", ".jp2", ".psd", ".ico", ".ppm", ".pjpeg", ".jpg_large")
MAX_PIXELS = 64_000_000  # of an image file; a larger one is no product photo and needs a gigabyte of memory

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS is lower than Pillow's limit
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = MAX_PIXELS  # bytes; long texts harm no pixel


def open_image(path):
    """An image file in sRGB, turned as its EXIF data say. Transparent parts become white.

    An animation gives its first frame, and 16 bits become 8.
    Raises InputError with the file's name where it is missing, broken, cut short or larger than MAX_PIXELS."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, expected at most {MAX_PIXELS:,}")
            if image.format == "PNG" and "transparency" in image.info and image.tile:
                # Pillow scales the values of 2 and 4 bits to 8 bits, but not the one that is transparent.
                image.info["transparency"] *= {"L;2": 85, "L;4": 17}.get(image.tile[0][3], 1)
            turn_upright(image)
            profile = image.info.get("icc_profile")
            if image.mode.startswith(("I", "F")):
                image = eight_bits(image)
            elif image.has_transparency_data:  # the colour below a transparent pixel is no part of the photo
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image.load()
            image = image if image.mode in ("RGB", "L", "CMYK") else image.convert("RGB")
            transform = to_srgb(profile, image.mode) if profile else None
            if transform:
                return transform.apply(image)
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # Pillow's readers raise nearly anything on broken files
        cure = "replace the file, or leave it out by --missing=skip"
        cause = not_the_file(path) or f"{cause_of(error)}; {cure}"
        raise InputError(f"{path}: image cannot be read: {cause}") from None


def turn_upright(image):
    """Turn a Pillow image in place, as its EXIF or XMP orientation says. Metadata that cannot be read is ignored."""
    image.load()
    # a JPEG's info says whether it has a rotation; to look for one in every JPEG takes a sixth of its loading
    if image.format == "JPEG" and not {"exif", "xmp"} & image.info.keys():
        return
    with contextlib.suppress(Exception):  # Pillow's reader of metadata raises nearly anything
        image.getexif()  # Pillow keeps what it has read
        for key in ("exif", "Raw profile type exif"):  # without them it does not write the metadata anew
            image.info.pop(key, None)
        ImageOps.exif_transpose(image, in_place=True)


@functools.lru_cache(16)  # to build one takes longer than to read a small photo
def to_srgb(profile, mode):
    """The Pillow transform from the colours of an ICC profile (bytes) to sRGB, for images of `mode`.

    None where the profile is that of sRGB, broken, or made for images of another mode."""
    with contextlib.suppress(Exception):  # Pillow's reader of profiles raises several kinds
        transform = ImageCms.buildTransform(io.BytesIO(profile), ImageCms.createProfile("sRGB"), mode, "RGB")
        colours = np.indices((16, 16, 16), np.uint8).reshape(3, 64, 64).transpose(1, 2, 0) * 17
        colours = Image.fromarray(colours).convert(mode)
        changes = ImageChops.difference(transform.apply(colours), colours.convert("RGB")).getextrema()
        if max(high for _, high in changes) > 2:  # two profiles of sRGB differ by their rounding
            return transform
    return None


def eight_bits(image):
    """Grey of 16 bits a pixel -> 8 bits; `convert` would clip the values. Where it is transparent it becomes white.

    Raises ValueError for other grey, whose white Pillow does not know: 12 or 32 bits, or a TIFF whose white is 0."""
    is_known = image.mode.startswith("I;16") or image.format in ("PNG", "PPM") and image.mode == "I"
    if image.format == "TIFF":  # tag 258 is the number of bits, and 262 is 1 where black is 0
        is_known = image.tag_v2.get(258) == (16,) and image.tag_v2.get(262) == 1
    if not is_known:
        raise ValueError(f"grey of an unusual kind (mode {image.mode}); save it as a PNG or JPEG of 8 bits")
    values = np.asarray(image)
    grey = (values >> 8).astype(np.uint8)
    grey[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey)


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


def list_gallery(folder):
    """{path below `folder`: [bytes, time of change in ns]} of its images, at any depth, sorted; InputError if none."""
    files, seen, others = {}, set(), []
    for base, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(base) in seen:  # a link to a folder that was seen before
            folders.clear()
            continue
        seen.add(os.path.realpath(base))
        for path in (Path(base, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() in IMAGE_SUFFIXES and path.exists():
                files[str(path.relative_to(folder))] = [path.stat().st_size, path.stat().st_mtime_ns]
            elif (mimetypes.guess_type(path)[0] or "image").startswith("image"):  # such as the HEIC of phones
                others.append(str(path))
    if others:
        print(f"gallery: {len(others)} files are left out for their endings, as {min(others)}", file=sys.stderr)
    if not files:
        raise InputError(f"gallery: no images in {str(folder)!r}, expected .jpg, .png, .webp or others")
    return dict(sorted(files.items()))
