"""FashionGen's HDF5 release -> the FashionGen layout (needs h5py: pip install h5py).

    python -m prepare.fashiongen --train=fashiongen_256_256_train.h5 --val=fashiongen_256_256_validation.h5 \\
        --out=data/datasets
    python -m prepare.catalogue --root=data/datasets      # then: pseudo-attributes, of all sets that are there

A row of the release is one photo ("pose"); rows that share input_productID are one product, and its texts are those of
its first row. The release has no pseudo-attributes: attributes_id is empty until they are mined."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from plumbing.ending import run
from plumbing.settings import InputError, load_config, setting
from prepare.cells import plain_text
from prepare.layout import number_labels, read_labels, write_together, written_aside

TEXTS = {  # our key: the release's
    "title": "input_name",
    "description": "input_description",
    "category": "input_category",
    "subcategory": "input_subcategory",
}
ENCODING = "ISO-8859-9"  # of the texts: latin-1 but for six Turkish letters
BLOCK = 512  # photos read at a time: 100 MB


@dataclass
class FashionGenConfig:
    """Settings of `python -m prepare.fashiongen`."""

    train: str = setting("fashiongen_256_256_train.h5", "HDF5 file of the training products")
    val: str = setting("fashiongen_256_256_validation.h5", "HDF5 file of the validation products")
    out: str = setting("data/datasets", "data root; FashionGen/ is made in it")
    quality: int = setting(95, "of the JPEG files, 1 to 95")


def open_release(path):
    """The open HDF5 file, a mapping from key to array. Raises InputError without h5py and on a missing or cut file."""
    try:
        import h5py
    except ImportError:
        raise InputError("h5py: the package is missing, HDF5 files need it; pip install h5py") from None
    if not Path(path).is_file():
        cure = "FashionGen's authors give it on request (README, section Data); name the two files by --train and --val"
        raise InputError(f"{path}: no file there, expected FashionGen's HDF5 file; {cure}")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path}: cannot be read as HDF5 ({error}); fetch the file again") from None


def read_products(release, where):
    """(products, file name of each photo) of an open release; products hold the names of their labels.

    release: key -> array-like, input_productID (N, 1) int, input_image (N, H, W, 3) uint8, texts (N, 1) bytes.
    Raises InputError naming `where` and the key that is missing, or of another length or kind than expected."""
    for key in ("input_image", "input_productID", *TEXTS.values()):
        if key not in release:
            raise InputError(f"{where}: no key {key!r}, found {', '.join(release)}; expected FashionGen's HDF5 file")
    photos, ids = release["input_image"], np.ravel(release["input_productID"][:])
    if photos.shape[1:] != (*photos.shape[1:3], 3) or photos.dtype != np.uint8 or len(photos) != len(ids):
        found = f"{photos.dtype} {photos.shape}"
        raise InputError(f"{where}: input_image: found {found}, expected uint8 ({len(ids)}, height, width, 3)")
    texts = {ours: np.ravel(release[key][:]) for ours, key in TEXTS.items()}
    for name, column in texts.items():
        if len(column) != len(ids) or not all(isinstance(text, bytes) for text in column):
            raise InputError(f"{where}: {TEXTS[name]}: found {len(column)} entries, expected {len(ids)} texts as bytes")
    products, files = {}, []
    for row, number in enumerate(ids.tolist()):
        if number not in products:
            words = {name: plain_text(str(column[row], ENCODING)) for name, column in texts.items()}
            products[number] = {"id": number, "images": [], **words, "attributes_id": []}
        images = products[number]["images"]
        images.append(f"{number}_{len(images)}.jpg")
        files.append(images[-1])
    return list(products.values()), files


def convert(releases, folder, quality=95):
    """Write {"train": release, "val": release} (`read_products`) as a FashionGen folder; returns the labels' names.

    Labels are numbered over train and val together, in alphabetical order."""
    products = {}
    for split, release in releases.items():
        products[split], files = read_products(release, split)
        (folder / split).mkdir(parents=True)
        for start in tqdm(range(0, len(files), BLOCK), desc=split, unit_scale=BLOCK, unit="photo", disable=None):
            photos = release["input_image"][start : start + BLOCK]
            for name, pixels in zip(files[start : start + BLOCK], photos, strict=True):
                Image.fromarray(pixels).save(folder / split / name, quality=quality)
        print(f"{split}: {len(products[split])} products, {len(files)} photos")
    everything = [product for part in products.values() for product in part]
    names = {"categories": number_labels(everything, "category")}
    names["subcategories"] = number_labels(everything, "subcategory")
    write_together({folder / f"{split}_info.json": part for split, part in products.items()})
    return names


def main():
    config = load_config(FashionGenConfig, description=__doc__.splitlines()[0])
    with open_release(config.train) as train, open_release(config.val) as val:
        with written_aside(Path(config.out, "FashionGen")) as folder:
            names = convert({"train": train, "val": val}, folder, config.quality)
            write_together({Path(config.out, "labels.json"): {**read_labels(config.out), **names}})
    # the paper's data: 60,147 products to train on, 48 categories, 121 sub-categories
    print(*(f"{len(rows)} {name}" for name, rows in names.items()), sep=", ")
    print(f"next: python -m prepare.catalogue --root={config.out}  (pseudo-attributes)")


if __name__ == "__main__":
    run(main)
