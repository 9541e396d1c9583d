"""Fine-tuning and evaluation end to end on a small catalogue: five tasks, resume, processes, batch sizes, errors."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tokenizers
import torch
from golden_model import to_original
from helpers import ONE, in_two_processes
from helpers import small_finetuning as small

import data
import evaluate
import finetune
from finetune import FinetuneConfig
from plumbing import annotations, checkpoint, runs
from plumbing.processes import Processes
from plumbing.settings import InputError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("task", evaluate.TASKS)
def test_each_task_trains_selects_and_evaluates(task, catalogue, tmp_path):
    config = small(task, catalogue, tmp_path)
    results = finetune.train(config, ONE)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    criterion = evaluate.TASKS[task].criterion
    validated = [row[f"val_{criterion}"] for row in rows if f"val_{criterion}" in row]
    first = next(iter(results.values()))
    assert len(validated) == 2 and first.metrics[criterion] == max(validated)
    assert all(row["loss"] > 0 for row in rows if "loss" in row)
    # the command line evaluates the same file to the same numbers, with sizes and vocabulary read from it
    again = evaluate.evaluate_checkpoint(tmp_path / "best.pt", evaluate_config(task, catalogue), ONE)
    assert metrics_of(again) == metrics_of(results)
    # and so it does when the file is in the layout of the authors' releases, which brings no sizes and no vocabulary
    ours = torch.load(tmp_path / "best.pt", weights_only=True)
    theirs = {f"module.{name}": value for name, value in to_original(ours["model"]).items()}
    torch.save({"model": theirs, "config": {"num_attention_heads": 4}}, tmp_path / "released.ckpt")
    settings = evaluate_config(task, catalogue, image_size=64, vocab=str(catalogue / "vocab.txt"))
    assert metrics_of(evaluate.evaluate_checkpoint(tmp_path / "released.ckpt", settings, ONE)) == metrics_of(results)


def metrics_of(results):
    return {name: result.metrics for name, result in results.items()}


def evaluate_config(task, catalogue, **changes):
    return evaluate.EvalConfig(**{"task": task, "data_root": str(catalogue), "workers": 0, **changes})


def test_fashioniq_without_some_images_says_on_what_it_stands(root, tmp_path):
    queries, gallery = annotations.load_fashioniq(root, "dress", "val")
    gone = queries[0]["image"]
    Path(gone).unlink()
    lost = sum(gone in (query["image"], query["image2"]) for query in queries)
    config = small("fashioniq", root, tmp_path / "run", max_steps=1, eval_interval=1)
    with pytest.raises(InputError, match=f"{gone}: image is missing; 1 of .* --missing=skip"):
        finetune.train(config, ONE)
    (result,) = finetune.train(dataclasses.replace(config, missing="skip"), ONE).values()
    for garment in ("shirt", "toptee"):  # nothing of them is missing
        captions = json.loads((root / f"FashionIQ/captions/cap.{garment}.val.json").read_text())
        split = json.loads((root / f"FashionIQ/image_splits/split.{garment}.val.json").read_text())
        assert result.counts[f"{garment}_queries"] == len(captions)
        assert result.counts[f"{garment}_gallery"] == len(split)
    assert result.counts["dress_queries_left_out"] == lost and result.counts["dress_gallery_left_out"] == 1
    assert result.counts["dress_queries"] == len(queries) - lost
    assert result.counts["dress_gallery"] == len(gallery) - 1 and result.counts["shirt_gallery_left_out"] == 0


def test_fashioniq_images_of_other_endings_and_in_folders_are_found(tmp_path):
    images = tmp_path / "FashionIQ" / "images"
    (images / "dress").mkdir(parents=True)
    (images / "val").mkdir()
    for name in ("a.jpg", "a.png", "b.png", "dress/c.jpg", "dress/d.png", "val/f.jpg", "g.JPG", "h", "i.png"):
        (images / name).write_bytes(b"photo")
    (images / "i.jpg").touch()  # an empty file is no photo
    found = [annotations.fashioniq_image(tmp_path, "dress", name, "row") for name in "abcdefghi"]
    expected = ["a.jpg", "b.png", "dress/c.jpg", "dress/d.png", "e.jpg", "val/f.jpg", "g.JPG", "h", "i.png"]
    assert [str(Path(path).relative_to(images)) for path in found] == expected
    with pytest.raises(InputError, match="leaves the folder"):
        annotations.fashioniq_image(tmp_path, "dress", "../a", "row")


def test_a_resumed_fine_tuning_is_the_uninterrupted_one(catalogue, tmp_path):
    for name, stops in (("whole", (6,)), ("halves", (3, 6))):
        for stop in stops:
            config = small("fashioniq", catalogue, tmp_path / name, max_steps=stop, milestones=(4,), resume="auto")
            finetune.train(config, ONE)
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "halves"))
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])


def test_frozen_parts_of_csa_net_do_not_move(catalogue, tmp_path):
    finetune.train(small("polyvore", catalogue, tmp_path), ONE)
    after = torch.load(tmp_path / "best.pt", weights_only=True)["model"]
    config = checkpoint.load_model(tmp_path / "best.pt")[0].config
    torch.manual_seed(0)
    before = finetune.CSANet(config, len(after["proj_layer.bias"])).state_dict()
    frozen = [k for k in before if "layer4" in k or "bn" in k or "downsample.1" in k]
    assert frozen and all(torch.equal(before[k], after[k]) for k in frozen)
    assert not torch.equal(before["image_encoder.conv1.weight"], after["image_encoder.conv1.weight"])


def test_init_takes_the_body_of_another_checkpoint(catalogue, tmp_path):
    finetune.train(small("fashiongen_retrieval", catalogue, tmp_path / "a", max_steps=1), ONE)
    config = small("fashiongen_category", catalogue, tmp_path / "b", init=str(tmp_path / "a" / "best.pt"), size="base")
    start = checkpoint.read_start(config)
    model = finetune.build_model(config, start.sizes, evaluate.RECOGNITION, n_classes=10)
    report = checkpoint.initialise(model, start)
    source = torch.load(tmp_path / "a" / "best.pt", weights_only=True)["model"]
    assert torch.equal(model.bert.pooler["dense"].weight, source["bert.pooler.dense.weight"])  # and of its size
    assert report[1] == "new weights: heads.recognition"


def test_a_checkpoint_of_another_task_is_refused(catalogue, tmp_path):
    finetune.train(small("fashiongen_category", catalogue, tmp_path, max_steps=1), ONE)
    with pytest.raises(InputError, match="a checkpoint of fashiongen_category"):
        evaluate.evaluate_checkpoint(tmp_path / "best.pt", evaluate_config("fashioniq", catalogue), ONE)
    # Its classes are other ones, though the head has the same name.
    with pytest.raises(InputError, match="was trained for fashiongen_category; set --task=fashiongen_category, not"):
        evaluate.evaluate_checkpoint(tmp_path / "best.pt", evaluate_config("fashiongen_subcategory", catalogue), ONE)


def test_a_resume_of_another_task_is_refused(catalogue, tmp_path):
    finetune.train(small("fashioniq", catalogue, tmp_path, max_steps=1), ONE)
    line = "a run of task fashioniq, expected fashiongen_retrieval; set another --out_dir"
    with pytest.raises(InputError, match=line):
        finetune.train(small("fashiongen_retrieval", catalogue, tmp_path, max_steps=2, resume="auto"), ONE)


def test_a_resume_with_another_validation_seeks_the_best_model_anew(catalogue, tmp_path):
    """Values of two galleries cannot be compared. Else best.pt would stay that of the easier one."""
    finetune.train(small("fashioniq", catalogue, tmp_path, max_steps=1), ONE)
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    checkpoint.save(
        tmp_path / "last.pt", {name: value for name, value in last.items() if name != "format"} | {"best": 0.99}
    )
    results = finetune.train(small("fashioniq", catalogue, tmp_path, max_steps=1, resume="auto", gallery="val"), ONE)
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert best["best"] == pytest.approx(results["gallery val"].metrics["mean_recall"], abs=1e-6)


def test_blanks_of_outfits_that_lost_an_image_stay_in_the_gallery(catalogue, tmp_path):
    """Else one missing image would make the ranking easier."""
    shutil.copytree(catalogue / "PolyvoreOutfits", tmp_path / "PolyvoreOutfits")
    finetune.train(small("polyvore", catalogue, tmp_path / "run", max_steps=1), ONE)
    whole = evaluate_config("polyvore", catalogue, missing="skip")
    outfits, _ = annotations.load_polyvore(tmp_path, "disjoint", "test")
    blanks, gone = {outfit["blank_item"][0] for outfit in outfits}, outfits[0]["items"][0][0]
    Path(gone).unlink()
    lost = sum(gone in [path for path, _ in [*outfit["items"], outfit["blank_item"]]] for outfit in outfits)
    assert len({outfit["blank_item"][0] for outfit in outfits if gone in [path for path, _ in outfit["items"]]}) > 0
    found = [
        evaluate.evaluate_checkpoint(tmp_path / "run" / "best.pt", config, ONE)["disjoint, same category"].counts
        for config in (whole, dataclasses.replace(whole, data_root=str(tmp_path)))
    ]
    assert [counts["gallery"] for counts in found] == [len(blanks), len(blanks - {gone})]
    assert [counts["gallery_left_out"] for counts in found] == [0, len(blanks & {gone})]
    assert found[1]["outfits_left_out"] == lost > 0 and found[0]["outfits_left_out"] == 0


def test_the_table_is_written_before_it_is_printed(catalogue, tmp_path):
    """As for `| head -1`, whose reader closes the pipe early."""
    finetune.train(small("fashiongen_category", catalogue, tmp_path, max_steps=1), ONE)
    command = f"{sys.executable} evaluate.py --task=fashiongen_category --checkpoint={tmp_path}/best.pt"
    command += f" --data_root={catalogue} --workers=0 --out={tmp_path}/table.json | true"
    subprocess.run(["bash", "-c", command], cwd=ROOT, check=True)
    assert "every image" in json.loads((tmp_path / "table.json").read_text())


def test_readme_snippet(catalogue, tmp_path):
    """The README's program, on a checkpoint and photos that are there."""
    finetune.train(small("fashiongen_retrieval", catalogue, tmp_path, max_steps=1), ONE)
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    photos = sorted((catalogue / "FashionGen" / "val").iterdir())[:2]
    paths = {"runs/demo/best.pt": tmp_path / "best.pt", "a.jpg": photos[0], "b.jpg": photos[1]}
    for name, path in paths.items():
        code = code.replace(name, str(path))
    names = {}
    exec(code, names)
    config = evaluate_config("fashiongen_retrieval", catalogue, image_size=64)
    items = [{"image": str(photo)} for photo in photos]
    model = names["model"]
    expected = evaluate.Embedder(model, evaluate.TASKS[config.task], None, config, ONE).embed(items)
    assert (names["image"] - expected).abs().max() < 1e-5 and names["changed"].shape == (2, 64)


# ---- batch size and number of processes ------------------------------------------------------------------------------


def embeddings(catalogue, path, processes, batch_size, workers=0):
    model, info = checkpoint.load_model(path)
    sizes = {"eval_batch_size": batch_size, "image_size": 64, "workers": workers}
    config = evaluate_config("fashiongen_retrieval", catalogue, **sizes)
    products = annotations.load_products(catalogue, "FashionGen", "val")
    task, words = evaluate.TASKS[config.task], tokenizers.Tokenizer.from_str(info["tokenizer"])
    return evaluate.embed_retrieval(evaluate.Embedder(model, task, words, config, processes), products)


def embeddings_of_a_process(rank, catalogue, path):
    fork, forked = os.fork, []  # a worker beside gloo's threads must not be a fork of this process
    os.fork = lambda: forked.append(1) or fork()
    result = embeddings(catalogue, path, Processes(rank, 2, torch.device("cpu")), 7, workers=1)
    assert not forked
    return result


def test_batch_size_and_processes_change_no_embedding(catalogue, tmp_path, free_port):
    finetune.train(small("fashiongen_retrieval", catalogue, tmp_path, max_steps=3), ONE)
    path = tmp_path / "best.pt"
    expected = embeddings(catalogue, path, ONE, 64)
    metrics = evaluate.full_gallery(*expected).metrics
    both = in_two_processes(embeddings_of_a_process, free_port, tmp_path, catalogue, path)
    others = {n: embeddings(catalogue, path, ONE, n) for n in (1, 7)}
    others |= {f"rank {rank}": result for rank, result in enumerate(both)}
    for name, other in others.items():
        for a, b in zip(expected, other, strict=True):
            assert a.shape == b.shape and (a - b).abs().max() < 1e-5, name
        for key, value in evaluate.full_gallery(*other).metrics.items():
            queries = len(expected[0]) if key.startswith("i2t") else len(expected[1])
            assert abs(value - metrics[key]) <= 1.001 / queries, (name, key)


def test_wandb_gets_the_settings_the_training_lines_and_the_validations(catalogue, tmp_path, monkeypatch):
    rows, opened = {}, []

    class Stand:  # in the place of the package
        def log(self, row, step):
            rows.setdefault(step, {}).update(row)

    def init(**given):
        opened.append(given)
        return Stand()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    config = small("fashioniq", catalogue, tmp_path, max_steps=3, log_interval=1, eval_interval=3, wandb="fashion")
    finetune.train(config, ONE)
    assert [(given["project"], given["config"]["task"]) for given in opened] == [("fashion", "fashioniq")]
    assert sorted(rows) == [1, 2, 3] and all(row["loss"] > 0 and row["tgir_acc"] >= 0 for row in rows.values())
    assert 0 < rows[3]["val_mean_recall"] <= 1 and "val_mean_recall" not in rows[1]
    finetune.train(dataclasses.replace(config, max_steps=4, resume="auto", wandb=""), ONE)
    finetune.train(dataclasses.replace(config, max_steps=5, resume="auto"), ONE)  # goes on in its own W&B run
    finetune.train(config, ONE)  # a new run
    first, same, other = [given["id"] for given in opened]
    assert first == same != other and all(given["resume"] == "allow" for given in opened)


def test_compile_compiles_the_transformer_too(catalogue, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled.append((module, options)))
    for task, parts in (("fashioniq", {"ResNet": 1, "Layer": 2}), ("polyvore", {"ResNet": 1})):
        compiled.clear()
        finetune.train(small(task, catalogue, tmp_path / task, max_steps=1, eval_interval=-1, compile=True), ONE)
        names = [type(module).__name__ for module, _ in compiled]
        assert {name: names.count(name) for name in names} == parts
        assert all(options == {"dynamic": True} for module, options in compiled if type(module).__name__ == "Layer")


def test_results_of_a_bfloat16_run_are_those_of_evaluate(catalogue, tmp_path, monkeypatch):
    """They are in float32, and the file says so. Validations leave sample-100 out, which selects nothing."""
    sampled = []
    original = evaluate.sample_100
    monkeypatch.setattr(evaluate, "sample_100", lambda *args: sampled.append(1) or original(*args))
    words = ["configs/demo_finetune.py", "--task=fashiongen_retrieval", f"--data_root={catalogue}", "--init=random"]
    words += ["--size=tiny", "--width=8", "--image_size=64", "--batch_size=8", "--max_steps=2", "--eval_interval=1"]
    words += ["--dtype=bfloat16", f"--out_dir={tmp_path}", "--workers=0"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *words])
    monkeypatch.chdir(ROOT)
    runs.main(FinetuneConfig, finetune.train, "")
    assert len(sampled) == 1
    ours = json.loads((tmp_path / "results.json").read_text())
    path = str(tmp_path / "best.pt")
    config = evaluate.EvalConfig("fashiongen_retrieval", path, data_root=str(catalogue), workers=0)
    theirs = evaluate.evaluate_checkpoint(path, config, ONE)
    assert (ours["dtype"], ours["device"]) == ("float32", "cpu")
    for protocol, result in theirs.items():
        assert ours[protocol]["metrics"] == result.metrics


def test_image_size_and_text_length_are_the_checkpoints_unless_they_are_set(catalogue, tmp_path, monkeypatch):
    first = small("fashioniq", catalogue, tmp_path / "first", max_steps=1, max_tokens=9, image_size=96)
    finetune.train(first, ONE)
    seen = []
    monkeypatch.setattr(
        data, "check_lengths", lambda config, *rest: seen.append((config.image_size, config.max_tokens))
    )
    for size, tokens in ((0, 0), (64, 7)):
        run = {"init": str(tmp_path / "first" / "best.pt"), "max_steps": 1, "eval_interval": -1}
        finetune.train(small("fashioniq", catalogue, tmp_path / "next", image_size=size, max_tokens=tokens, **run), ONE)
    assert seen == [(96, 9), (64, 7)]
