import json

import torch

TIMES = ("samples_per_s", "images_per_s", "memory_gb")


def read_log(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def same(a, b, where=""):
    """Assert that two trees of a checkpoint are equal to the bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


def same_runs(a, b):
    """Assert that two run folders hold the same run: everything in last.pt but the settings, and the log lines."""
    a_state, b_state = (torch.load(folder / "last.pt", weights_only=True) for folder in (a, b))
    for state in (a_state, b_state):
        del state["config"]
    same(a_state, b_state)
    assert read_log(a) == read_log(b)
