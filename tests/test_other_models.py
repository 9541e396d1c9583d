"""evaluate.py --list and --embeddings: the vectors of any model under our protocols."""

import json
import sys

import numpy as np
import pytest
import tokenizers
from helpers import ONE
from helpers import small_finetuning as small

import evaluate
import finetune
from plumbing import checkpoint
from plumbing.other_models import OtherModel
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
            words = tokenizers.Tokenizer.from_str(info["tokenizer"])
            embedder = evaluate.Embedder(model, evaluate.TASKS[task], words, config, ONE)
            found = embedder.embed([items[i] for i in part])
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


N = 9  # lines of the list
WRONG = {  # contents of a file, what is said of it
    "count": ({"vectors": np.zeros((N - 1, 4))}, rf"vectors \({N - 1}, 4\) float64, expected numbers \({N}, D\)"),
    "nan": ({"vectors": np.r_[np.zeros((3, 4)), np.full((N - 3, 4), np.nan)]}, r"vector 3 is not finite \(6 such\)"),
    "other": (
        {"vectors": np.zeros((1, 4)), "list": "{}"},
        r"1 of 1 items are not in its list, as \{\"text\": \"0\"\}; write",
    ),
    "complex": ({"vectors": np.zeros((N, 4), complex)}, r"vectors \(9, 4\) complex128, expected numbers"),
    "keys": ({"list": ""}, r"no .npz of vectors and list, as docs/results.md makes it: .*vectors"),
    "page": (b"<html>", "a web page"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_vectors_end_in_one_line(name, tmp_path):
    (content, says), path = WRONG[name], tmp_path / f"{name}.npz"
    if type(content) is dict:
        np.savez(path, **{"list": "".join(f'{{"text": "{i}"}}\n' for i in range(N)), **content})
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}\.npz: .*{says}") as error:
        OtherModel(path, [{"text": "0"}])
    assert "\n" not in str(error.value)


def test_a_task_that_needs_more_than_vectors_says_so(catalogue, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="task: found 'polyvore', expected fashiongen_retrieval or fashioniq"):
        run_main(monkeypatch, "--task=polyvore", f"--data_root={catalogue}", f"--list={tmp_path}/o.jsonl")
