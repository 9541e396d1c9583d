"""The arithmetic of bench.py: medians of pairs, FLOP of every bare part by hand, and a whole update of ours."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from settings import InputError
from tools import bare, bench


def load(catalogue, **changes):
    return bench.BenchConfig(size="demo", data_root=str(catalogue), **{"batch_size": 2, "pairs": 1, **changes})


def test_medians_of_seconds_and_of_the_ratios_of_pairs(monkeypatch):
    seconds = iter([4.0, 2.0, 8.0, 1.0, 2.0, 4.0])  # ours and bare in turns: ratios 2, 8 and 0.5
    monkeypatch.setattr(bench, "timed", lambda side, i: next(seconds))
    assert bench.compare(None, None, 3) == {"seconds": 4, "bare": 2, "ratio": 2}


@pytest.mark.parametrize("name", bench.NAMES)
def test_flop_of_the_bare_parts(name, catalogue, monkeypatch):
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)  # the counter knows no fused kernel
    ours = bench.Ours(load(catalogue), name, shapes_only=True)
    parts = bare.Bare(ours)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        parts.loss(parts.batches[0]).backward()
    found, batch, c = counter.get_total_flops(), ours.batches[0], ours.model.config
    # resnet18 at 64 px by hand: 2 x weights x positions; the stem, then stages at 16, 8, 4, 2 pixels a side
    w = c.width
    stages = [(w, w, 16, 0), (w, 2 * w, 8, 2 * w * w), (2 * w, 4 * w, 4, 8 * w * w), (4 * w, 8 * w, 2, 32 * w * w)]
    stem = 2 * 3 * 49 * w * 32**2
    stages = [2 * side**2 * (9 * (a * b + 3 * b * b) + short) for a, b, side, short in stages]
    if name == "polyvore":  # the last stage has no gradient of its weights, and hands one on
        heads = 3 * 2 * 8 * w * 256 * 2 * 2 + 3 * 2 * 2 * 2 * 256
        assert found == 2 * 2 * (2 * stem + 3 * sum(stages[:3]) + 2 * stages[3]) + heads
        return
    B, P, features = 2, 4, 8 * w
    expected = (1 + ("image2" in batch)) * B * (2 * stem + 3 * sum(stages))
    T, d, wide, layers = batch["input_ids"].shape[1], c.hidden_size, c.intermediate_size, c.num_hidden_layers

    def encoder(n):  # one forward over n tokens: linear layers and attention
        return layers * B * (2 * n * (4 * d * d + 2 * d * wide) + 4 * n * n * d)

    P = {"itc": 0, "pac": 0, "fashiongen_retrieval": 0, "mvc": 3}.get(name, P)  # patches that the Transformer sees
    expected += 3 * encoder(T + P) + 3 * 2 * B * P * features * d
    n_image = 2 * B * features * d  # the projection of the pooled image; not every definition has a use for it
    n_targets = {"mlm": "mlm_labels", "mpfc": "patch_mask"}.get(name)
    n_targets = int((batch[n_targets] > 0).sum()) if n_targets else B
    n_out = {"mlm": c.vocab_size, "mpfc": c.n_codes, "pac": c.n_attributes}.get(name, c.n_classes or 2)
    if name in ("itc", "fashiongen_retrieval", "mvc", "fashioniq"):
        expected += 3 * (n_image + 2 * B * B * d)
    elif name == "pac":
        expected += 3 * (n_image + 2 * 2 * B * d * n_out)
    else:
        expected += n_image + 3 * 2 * n_targets * d * (d + n_out)
    if name == "itm":
        expected += encoder(T)  # the search for hard negatives
    if name == "mpfc":  # the image tokenizer, once and without gradient
        expected += tokenizer_flop(ours.image_tokenizer.config, B)
    assert found == expected
    assert all(p.grad is not None for part in ("resnet", "encoder") for p in getattr(parts, part).parameters())
    n_ours = sum(p.numel() for p in ours.model.parameters())
    assert 0 <= n_ours - sum(p.numel() for p in parts.optimizer.param_groups[0]["params"]) < d


def tokenizer_flop(sizes, B, side=64):
    """FLOP of the image tokenizer's encoder on B images by hand."""
    widths, side, n = [sizes.ch * m for m in sizes.ch_mult], side // sizes.unshuffle, 0
    n += 9 * 3 * sizes.unshuffle**2 * sizes.ch * side**2
    c_in = sizes.ch
    for i, c in enumerate(widths):
        last = i == len(widths) - 1
        n += 9 * (c_in * c + (2 * sizes.n_blocks - 1) * c * c) * side**2 + (c_in != c) * c_in * c * side**2
        n += last * sizes.n_blocks * 4 * c * c * side**2
        side = side if last else side // 2
        n += (not last) * 9 * c * c * side**2
        c_in = c
    n += (4 * 9 + 4) * c * c * side**2  # the middle
    n += (sizes.n_blocks + 1) * 2 * c * side**4  # attention among the places of the smallest map
    return 2 * B * (n + (9 * c * sizes.latent_dim + sizes.latent_dim**2) * side**2)


def test_our_side_of_the_bench_is_a_whole_update(catalogue):
    ours = bench.Ours(load(catalogue), "itc")
    before = [p.detach().clone() for p in ours.model.parameters()]
    bench.step(load(catalogue), ours, 0)
    moved = [not torch.equal(a, b) for a, b in zip(before, ours.model.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2


def test_rows_of_data_and_eval(catalogue, monkeypatch):
    monkeypatch.setattr(bench, "timed", lambda function, i: 2.0 + 0 * bool(function(i)))
    threads = torch.get_num_threads()
    try:
        row = bench.measure_data(load(catalogue), n_images=3)
    finally:
        torch.set_num_threads(threads)
    assert row == {"images/s": 1.5, "bare": 1.5, "ratio": 1}
    row = bench.measure_retrieval(load(catalogue), n_images=30, n_texts=10, width=4)
    assert row == {"images": 30, "texts": 10, "seconds": 2, "bare": 2, "ratio": 1}


def test_each_part_writes_its_rows(catalogue, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "apart", lambda function, config, *args: {"name": function.__name__, "x": 0.25})
    out = tmp_path / "bench.json"
    monkeypatch.setattr("sys.argv", ["bench.py", "--memory", "--data", "--only=itc,mlm", f"--out={out}"])
    bench.main()
    written = json.loads(out.read_text())
    assert [len(written[part]) for part in ("memory", "data")] == [2, 1] and "step" not in written
    assert capsys.readouterr().out.splitlines()[-1] == "data:  name measure_data  x 0.25"


def test_unknown_name_is_one_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench.py", "--only=itcc"])
    with pytest.raises(InputError, match="only: found 'itcc', expected some of itc"):
        bench.main()
