"""Vectors of any model, to be evaluated under our protocols: docs/results.md "Any model under these protocols"."""

import json
import zipfile

import numpy as np
import torch

from settings import InputError


class OtherModel:
    """Vectors of any model in the place of ours. Without a file it notes the items that --list writes.

    path: an .npz with "vectors" (N, D) float32, a row for each line of "list", the text of the file that --list wrote.
    They are compared by their dot products, as they are. Raises InputError on other contents."""

    def __init__(self, path=None):
        self.path, self.rows, self.vectors = path, {}, None  # rows {line of the list: its number}
        if path is None:
            return
        try:
            with np.load(path, allow_pickle=False) as file:
                self.vectors = torch.from_numpy(file["vectors"]).float()
                self.rows = {line: row for row, line in enumerate(str(file["list"]).splitlines())}
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            cure = "expected an .npz of vectors and list, as docs/results.md makes it"
            raise InputError(f"{path}: cannot be read ({str(error).partition(chr(10))[0]:.100}); {cure}") from None
        shape = tuple(self.vectors.shape)
        if len(shape) != 2 or shape[0] != len(self.rows) or not shape[1]:
            raise InputError(
                f"{path}: found vectors {shape}, expected ({len(self.rows)}, D), a row for each line of list"
            )
        bad = (~self.vectors.isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            raise InputError(f"{path}: vector {bad[0]} is not finite ({len(bad)} such); expected numbers alone")

    def vectors_of(self, items):
        """The vectors (len(items), D) of items; zeros (len(items), 1) where they are only noted."""
        lines = [json.dumps({key: str(item[key]) for key in ("image", "text") if key in item}) for item in items]
        if self.path is None:
            self.rows |= dict.fromkeys(lines)
            return torch.zeros(len(items), 1)
        missing = [line for line in lines if line not in self.rows]
        if missing:
            found = f"{len(missing)} of {len(lines)} items are not in its list, as {missing[0]:.200}"
            raise InputError(f"{self.path}: {found}; write the list anew for this --data_root and task")
        return self.vectors[[self.rows[line] for line in lines]]
