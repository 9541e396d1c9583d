"""Any image file, opened as RGB. This file needs no torch, so that the programs in prepare/ take little memory."""

import contextlib
import warnings

import numpy as np
from PIL import Image, ImageOps

from settings import InputError

RESIZED, CROPPED = 256, 224  # sides in pixels before and after a crop; other image sizes keep this ratio
MAX_PIXELS = 64_000_000  # of an image file; a larger one is no product photo and needs a gigabyte of memory

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS is lower than Pillow's limit


def open_image(path):
    """An image file as RGB, turned as its EXIF data say. Transparent parts become white.

    An animation gives its first frame, and 16 bits become 8.
    Raises InputError with the file's name where it is missing, broken, cut short or larger than MAX_PIXELS."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, expected at most {MAX_PIXELS:,}")
            turn_upright(image)
            # The colour below a transparent pixel is no part of the photo.
            if image.mode.startswith(("I", "F")):
                image = eight_bits(image)
            elif image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # Pillow's readers raise nearly anything on broken files
        cause = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        cure = "replace the file, or leave it out by --missing=skip"
        raise InputError(f"{path}: image cannot be read: {cause}; {cure}") from None


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


def eight_bits(image):
    """Grey of 16 bits a pixel -> 8 bits; `convert` would clip the values. Where it is transparent it becomes white."""
    if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise ValueError(f"32 bits a pixel (mode {image.mode}), expected 8 or 16")  # nothing says which value is white
    values = np.asarray(image)
    grey = (values >> 8).astype(np.uint8)
    grey[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey)
