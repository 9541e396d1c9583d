"""evaluate.py --list and --embeddings: the vectors of any model under our protocols."""

import json
import sys
from functools import partial

import numpy as np
import pytest
from test_finetune import ONE, small

import data
import evaluate
import finetune
from plumbing import checkpoint
from plumbing.settings import InputError


@pytest.fixture(scope="module")
def trained(catalogue, tmp_path_factory):
    """{task: checkpoint} of short runs."""
    out, files = tmp_path_factory.mktemp("trained"), {}
    for task in ("fashiongen_retrieval", "fashioniq"):
        finetune.train(small(task, catalogue, out / task, max_steps=2), ONE)
        files[task] = str(out / task / "best.pt")
    return files


def vectors_of_list(checkpoint_path, lines, task, catalogue):
    """What a reader of the docs would write, with our own model in the place of another."""
    model, info = checkpoint.load_model(checkpoint_path)
    config = evaluate.EvalConfig(task, data_root=str(catalogue), image_size=64, workers=0)
    items = [json.loads(line) for line in lines]
    rows = {}
    for keys in ({"image"}, {"text"}, {"image", "text"}):
        part = [i for i, item in enumerate(items) if item.keys() == keys]
        if part:
            encode = partial(evaluate.embed_batch, model)
            words = data.wordpiece(info["vocab"])
            found = evaluate.embed(encode, [items[i] for i in part], words, config, ONE, task == "fashioniq")
            rows |= dict(zip(part, found, strict=True))
    return np.stack([rows[i].numpy() for i in range(len(items))])


def run_main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
    evaluate.main()


@pytest.mark.parametrize("task", ["fashiongen_retrieval", "fashioniq"])
def test_vectors_of_our_own_model_give_our_own_table(task, trained, catalogue, tmp_path, monkeypatch):
    words = [f"--task={task}", f"--data_root={catalogue}", "--workers=0"]
    run_main(monkeypatch, *words, f"--list={tmp_path}/items.jsonl")
    text = (tmp_path / "items.jsonl").read_text()
    vectors = vectors_of_list(trained[task], text.splitlines(), task, catalogue)
    np.savez(tmp_path / "ours.npz", vectors=vectors, list=text)
    run_main(monkeypatch, *words, f"--embeddings={tmp_path}/ours.npz", f"--out={tmp_path}/a.json")
    run_main(monkeypatch, *words, f"--checkpoint={trained[task]}", f"--out={tmp_path}/b.json")
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    protocols = [name for name, value in b.items() if isinstance(value, dict)]
    assert protocols and all(a[name]["metrics"] == b[name]["metrics"] for name in protocols)

    # Random vectors give chance, within the interval.
    np.savez(tmp_path / "random.npz", vectors=np.random.default_rng(0).standard_normal((len(vectors), 64)), list=text)
    run_main(monkeypatch, *words, f"--embeddings={tmp_path}/random.npz", "--bootstrap", f"--out={tmp_path}/c.json")
    row = json.loads((tmp_path / "c.json").read_text())[protocols[0]]
    low, high = row["interval"]["mean_recall"]
    assert low - 0.02 <= row["chance"]["mean_recall"] <= high + 0.02


def test_wrong_vectors_end_in_one_line(catalogue, tmp_path, monkeypatch):
    words = ["--task=fashiongen_retrieval", f"--data_root={catalogue}", "--workers=0"]
    run_main(monkeypatch, *words, f"--list={tmp_path}/items.jsonl")
    text = (tmp_path / "items.jsonl").read_text()
    n = text.count("\n")
    bad = np.zeros((n, 4))
    bad[3, 1] = np.nan
    for name, arrays, says in (
        (
            "count",
            {"vectors": np.zeros((n - 1, 4)), "list": text},
            rf"found vectors \({n - 1}, 4\), expected \({n}, D\)",
        ),
        ("nan", {"vectors": bad, "list": text}, r"vector 3 is not finite \(1 such\)"),
        ("other", {"vectors": np.zeros((1, 4)), "list": "{}"}, r"items are not in its list, as \{\"image\": "),
        ("complex", {"vectors": np.zeros((n, 4), complex), "list": text}, r"cannot be read \(vectors of complex128\)"),
        ("keys", {"vectors": np.zeros((n, 4))}, r"cannot be read \(.*list.*\); expected an .npz"),
    ):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(InputError, match=rf"{name}\.npz: .*{says}") as error:
            run_main(monkeypatch, *words, f"--embeddings={tmp_path}/{name}.npz")
        assert "\n" not in str(error.value)
    for content, says in ((b"", r"cannot be read \("), (b"<html>", "a web page")):
        (tmp_path / "other.npz").write_bytes(content)
        with pytest.raises(InputError, match=rf"other\.npz: {says}"):
            run_main(monkeypatch, *words, f"--embeddings={tmp_path}/other.npz")
    with pytest.raises(InputError, match="task: found 'polyvore', expected fashiongen_retrieval or fashioniq"):
        run_main(monkeypatch, "--task=polyvore", f"--data_root={catalogue}", f"--list={tmp_path}/o.jsonl")
