"""bench.py: floating-point operations by hand, and rows that come from a run of the stage."""

import json

import pytest
import torch
import torch.nn.functional as F

import losses
from model import FashionViL, ModelConfig
from plumbing.settings import InputError
from tools import bench


def load(catalogue, **changes):
    return bench.BenchConfig(size="demo", data_root=str(catalogue), **{"batch_size": 2, "updates": 1, **changes})


def resnet18(w, batch, last=3):
    """FLOP of a step of a resnet18 at 64 px: 2 x weights x positions, the stem, then stages at 16, 8, 4, 2 pixels a
    side. The stem has no gradient of its input. The last stage takes `last` times its forward pass."""
    stages = [(w, w, 16, 0), (w, 2 * w, 8, 2 * w * w), (2 * w, 4 * w, 4, 8 * w * w), (4 * w, 8 * w, 2, 32 * w * w)]
    stages = [2 * side**2 * (9 * (a * b + 3 * b * b) + short) for a, b, side, short in stages]
    return batch * (2 * 2 * 3 * 49 * w * 32**2 + 3 * sum(stages[:3]) + last * stages[3])


def test_flop_of_plain_operations():
    a, kernel = torch.randn(5, 7, requires_grad=True), torch.randn(4, 3, 3, 3)
    assert bench.count_flop(lambda: a @ torch.randn(7, 2)) == 2 * 5 * 7 * 2
    assert bench.count_flop(lambda: (a @ torch.randn(7, 2)).sum().backward()) == 2 * 2 * 5 * 7 * 2
    assert bench.count_flop(lambda: F.conv2d(torch.randn(2, 3, 8, 8), kernel, padding=1)) == 2 * 2 * 64 * 4 * 3 * 9


def test_flop_of_itc():
    """Linear layers compute the 13 tokens, filled up to 64, and attention is computed over the padded texts."""
    sizes = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=30)
    c = ModelConfig("resnet18", 16, **sizes, heads=("contrastive",))  # 3 images of width 8 crash torch 2.14
    model = FashionViL(c)
    ids, mask = torch.ones(3, 6, dtype=torch.int64), torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 3 + [0] * 3])
    batch = {"input_ids": ids, "attention_mask": mask, "image": torch.randn(3, 3, 64, 64)}
    found = bench.count_flop(lambda: losses.itc(model, batch)[0].backward())
    d, wide, tokens = c.hidden_size, c.intermediate_size, 64
    layer = 2 * tokens * (4 * d * d + 2 * d * wide) + 3 * 4 * 6 * 6 * d
    expected = resnet18(16, 3) + 3 * (2 * layer + 2 * 3 * 16 * 8 * d + 2 * 2 * 3 * 3 * d)  # two ways of scores
    assert found == expected


def test_row_of_a_task(catalogue, monkeypatch):
    monkeypatch.setattr(bench, "plain_rates", lambda device, dtype: [2e9, 4e9])
    row = bench.measure_training(load(catalogue), "polyvore")
    # A CSA-Net on two images: the last stage has no gradient of its weights. Then its projection, and the weights of
    # the five masks from the two categories, whose one-hot numbers have no gradient, then the two ways of scores.
    w, B, n = 16, 2, len(json.loads((catalogue / "PolyvoreOutfits" / "categories.json").read_text()))
    fuse = 2 * 2 * B * 2 * n * 64 + 3 * 2 * B * (64 * 5 + 5 * 256)
    expected = resnet18(w, 2 * B, last=2) + 2 * 3 * 2 * B * 8 * w * 256 + fuse + 2 * 3 * 2 * B * B * 256
    assert row["GFLOP"] * 1e9 == pytest.approx(expected)
    assert row["samples/s"] == pytest.approx(B / row["seconds"])
    assert row["GFLOP/s"] == pytest.approx(row["GFLOP"] / row["seconds"])
    assert row["of_matmul"] == pytest.approx(row["GFLOP/s"] / 2) and row["of_conv"] == pytest.approx(row["GFLOP/s"] / 4)
    assert 0.05 < row["memory_gb"] < 5


def test_a_stage_that_fails_ends_in_its_line(catalogue, monkeypatch):
    monkeypatch.setattr(bench, "count_flop", lambda function: 1)
    monkeypatch.setattr(bench, "plain_rates", lambda device, dtype: [1, 1])
    with pytest.raises(InputError, match="^itc: error: .*batch_size"):
        bench.measure_training(load(catalogue, batch_size=10**6), "itc")


def test_plain_rates_are_of_this_machine(monkeypatch):
    monkeypatch.setattr(bench, "timed", lambda function: 2.0)
    matmul, conv = bench.plain_rates(torch.device("cpu"), "float32")
    assert matmul == 2048**3 and conv == 8 * 56 * 56 * 256 * 256 * 9


def test_row_of_the_input(catalogue, monkeypatch):
    monkeypatch.setattr(bench, "timed", lambda function: 2.0 + 0 * bool(function()))
    assert bench.measure_input(load(catalogue), "input", n_images=3) == {"images/s": 1.5, "plain_images/s": 1.5}


def test_rows_are_printed_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure_training", lambda config, name: {"x": 0.25})
    out = tmp_path / "bench.json"
    monkeypatch.setattr("sys.argv", ["bench.py", "--only=itc,mlm", f"--out={out}"])
    bench.main()
    assert json.loads(out.read_text())["rows"] == [{"name": "itc", "x": 0.25}, {"name": "mlm", "x": 0.25}]
    assert capsys.readouterr().out.splitlines() == ["itc  x 0.25", "mlm  x 0.25"]


def test_unknown_name_is_one_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench.py", "--only=itcc"])
    with pytest.raises(InputError, match="only: found 'itcc', expected some of itc"):
        bench.main()
