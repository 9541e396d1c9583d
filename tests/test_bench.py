"""The arithmetic of bench.py: medians of pairs, FLOP of the bare parts and live bytes by hand, an update of ours."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from plumbing.settings import InputError
from tools import bare, bench


def load(catalogue, **changes):
    return bench.BenchConfig(size="demo", data_root=str(catalogue), **{"batch_size": 2, "pairs": 1, **changes})


def test_medians_of_seconds_and_of_the_ratios_of_pairs(monkeypatch):
    seconds = iter([4.0, 2.0, 8.0, 1.0, 2.0, 4.0])  # ours and bare in turns: ratios 2, 8 and 0.5
    monkeypatch.setattr(bench, "timed", lambda side, i: next(seconds))
    assert bench.compare(abs, abs, 3) == {"seconds": 4, "bare": 2, "ratio": 2}


@pytest.mark.parametrize("name", bench.NAMES)
def test_flop_of_the_bare_parts(name, catalogue, monkeypatch):
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)  # the counter knows no fused kernel
    stage = bench.Stage(load(catalogue), name)
    parts, batch, c = bare.Bare(name, stage.model), stage.batches[0], stage.model.config
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        parts(batch)[0].backward()
    found = counter.get_total_flops()
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
    assert found == expected
    assert all(p.grad is not None for part in ("resnet", "encoder") for p in getattr(parts, part).parameters())
    n_ours, n_bare = (sum(p.numel() for p in module.parameters()) for module in (stage.model, parts))
    assert 0 <= n_ours - n_bare < d


def test_our_side_of_the_bench_is_a_whole_update(catalogue):
    stage = bench.Stage(load(catalogue), "itc")
    before = [p.detach().clone() for p in stage.model.parameters()]
    bench.Side(stage, stage.model).step(0)
    moved = [not torch.equal(a, b) for a, b in zip(before, stage.model.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2


def test_mpfc_has_the_same_image_tokenizer_on_both_sides(catalogue, monkeypatch):
    stage, seen = bench.Stage(load(catalogue), "mpfc"), []
    encode = stage.image_tokenizer.encode
    monkeypatch.setattr(stage.image_tokenizer, "encode", lambda images: seen.append(images.shape) or encode(images))
    for model in (stage.model, bare.Bare("mpfc", stage.model)):
        bench.Side(stage, model).step(0)
    assert seen == [(2, 3, 64, 64)] * 2


def test_row_of_data(catalogue, monkeypatch):
    monkeypatch.setattr(bench, "timed", lambda function, i: 2.0 + 0 * bool(function(i)))
    assert bench.measure_data(load(catalogue), "itc", n_images=3) == {"images/s": 1.5, "bare_images/s": 1.5, "ratio": 1}


def test_live_bytes_by_hand():
    x = torch.zeros(1000)  # 4,000 bytes
    live = bench.LiveBytes()
    live.count([x, x.view(10, 100)])  # one memory
    assert live.now() == 4000
    with live:
        y = x + 1  # lives on
        z = (x * 2)[:10]  # a view keeps all 4,000
        assert live.now() == 12_000
        del z
        y.add_(1)  # in place
        assert (live.now(), live.peak) == (8000, 12_000)


def test_what_backward_needs_is_counted():
    w = torch.ones(500, requires_grad=True)
    live = bench.LiveBytes()
    live.count([w])
    with live:
        y = (w.exp() + 1).sum()  # exp keeps its result for the backward; the sum of it and 1 goes
        assert live.now() == 2 * 2000 + 4 and live.peak == 3 * 2000 + 4
        y.backward()
    assert w.grad is not None and live.peak >= 3 * 2000


@pytest.mark.parametrize("name, n_tokens", [("mlm", 75), ("fashioniq", 50)])
def test_full_texts_have_no_padding(name, n_tokens, catalogue):
    (batch,) = bench.Stage(load(catalogue), name, full_texts=True).batches
    assert batch["input_ids"].shape == (2, n_tokens) and batch["attention_mask"].all()


def test_row_of_memory(monkeypatch):
    monkeypatch.setattr(bench, "peak_gb", lambda config, name, n: 3 + 0.5 * n)
    row = {"fixed_gb": 3, "gb_per_product": 0.5, "fits_24": 34, "fits_80": 130}
    assert bench.measure_memory(None, "itc") == row


def test_rows_are_printed_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure_memory", lambda config, name: {"x": 0.25})
    out = tmp_path / "bench.json"
    monkeypatch.setattr("sys.argv", ["bench.py", "--measure=memory", "--only=itc,mlm", f"--out={out}"])
    bench.main()
    written = json.loads(out.read_text())
    assert written["memory"] == [{"name": "itc", "x": 0.25}, {"name": "mlm", "x": 0.25}] and "step" not in written
    assert capsys.readouterr().out.splitlines() == ["itc  x 0.25", "mlm  x 0.25"]


def test_unknown_name_is_one_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench.py", "--only=itcc"])
    with pytest.raises(InputError, match="only: found 'itcc', expected some of itc"):
        bench.main()
