"""The vectors of any model in a file, in the place of our own model: docs/results.md "Any model under these protocols".

`write_list` writes what the model must embed, and `OtherModel` reads the vectors that it made of that."""

import json

import numpy as np
import torch

from plumbing.files import reading, replacing
from plumbing.settings import InputError


def line_of(item):
    """The line of an item in the list: JSON with "image", "text" or both."""
    return json.dumps({key: str(item[key]) for key in ("image", "text") if key in item})


def write_list(path, items):
    """Write a line for each item into the file `path`, equal lines once, and print their number."""
    lines = dict.fromkeys(map(line_of, items))
    with replacing(path) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
    print(f"written: {path}, {len(lines)} items to embed")


class OtherModel:
    """Gives the vectors of items from an .npz, as an `evaluate.Embedder` gives those of our model.

    The file has "vectors" (N, D), a row for each line of "list", the text that `write_list` wrote. They are compared by
    their dot products, as they are. items: all that will be asked. Raises InputError where one is not in the list, and
    where the file holds something else."""

    def __init__(self, path, items):
        with reading(path, "no .npz of vectors and list, as docs/results.md makes it"):
            with np.load(path, allow_pickle=False) as file:
                vectors, lines = file["vectors"], str(file["list"]).removeprefix("\ufeff").splitlines()
            if vectors.dtype.kind not in "fiu" or vectors.ndim != 2 or len(vectors) != len(lines) or not vectors.size:
                expected = f"numbers ({len(lines)}, D), a row for each line of list"
                raise ValueError(f"vectors {vectors.shape} {vectors.dtype}, expected {expected}")
            self.vectors, self.rows = torch.from_numpy(vectors).float(), {line: row for row, line in enumerate(lines)}
            bad = (~self.vectors.isfinite().all(1)).nonzero().flatten().tolist()
            if bad:
                raise ValueError(f"vector {bad[0]} is not finite ({len(bad)} such)")
        missing = [line for line in map(line_of, items) if line not in self.rows]
        if missing:
            found = f"{len(missing)} of {len(items)} items are not in its list, as {missing[0]:.200}"
            raise InputError(f"{path}: {found}; write the list anew for this --data_root and task")

    def embed(self, items):
        """The vectors (len(items), D) float32 of items."""
        return self.vectors[[self.rows[line_of(item)] for item in items]]
