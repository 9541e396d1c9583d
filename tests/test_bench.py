"""The arithmetic of bench.py: medians of pairs, padding and FLOP of a step, and that every bare part trains."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from settings import InputError
from tools import bare, bench


def test_median_of_pairs(monkeypatch):
    mine, theirs = iter([[1.0, 3.0], [6.0, 2.0], [1.0, 1.0]]), iter([[2.0], [2.0], [4.0]])  # sums 4, 8, 2 and 2, 2, 4
    monkeypatch.setattr(bare, "timed", lambda side, i: next(side))
    monkeypatch.setattr(bare, "PHASES", ("forward", "backward"))
    row = bare.compare(mine, theirs, 3)
    assert row == {
        "seconds": 4,
        "bare": 2,
        "ratio": 2,
        "forward": pytest.approx(8 / 14),
        "backward": pytest.approx(6 / 14),
    }


def test_phases_are_the_time_between_yields(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 6.0])
    monkeypatch.setattr(bare.time, "perf_counter", lambda: next(clock))
    assert bare.timed(lambda i: (_ for _ in range(3))) == [1, 2, 3]
    clock = iter([0.0, 5.0])
    assert bare.timed(lambda i: {"not": "a", "generator": "!"}) == [5]


@pytest.mark.parametrize("name", bench.NAMES)
def test_flop_of_the_bare_parts(name, catalogue):
    config = bench.BenchConfig(size="demo", data_root=str(catalogue), batch_size=2, pairs=1)
    s = bench.prepare(config, name, "meta")
    parts = bare.Bare(s)
    with FlopCounterMode(display=False) as counter:
        parts.loss(parts.batches[0]).backward()
    batch, c = s.batches[0], s.model.config
    images = 1 + ("image2" in batch)
    # resnet18 at 64 px by hand: 2 x weights x positions; the stem, then stages at 16, 8, 4, 2 pixels a side
    w = c.width
    stages = [(w, w, 16, 0), (w, 2 * w, 8, 2 * w * w), (2 * w, 4 * w, 4, 8 * w * w), (4 * w, 8 * w, 2, 32 * w * w)]
    stem = 2 * 3 * 49 * w * 32**2
    stages = [2 * side**2 * (9 * (a * b + 3 * b * b) + short) for a, b, side, short in stages]
    if name == "polyvore":  # the last stage has no gradient of its weights, and hands one on
        heads = 3 * 2 * 8 * w * 256 * 2 * 2 + 3 * 2 * 2 * 2 * 256
        assert counter.get_total_flops() == 2 * 2 * (2 * stem + 3 * sum(stages[:3]) + 2 * stages[3]) + heads
        return
    total = images * 2 * (2 * stem + 3 * sum(stages))
    if name == "mpfc":  # the image tokenizer, once and without gradient
        with FlopCounterMode(display=False) as tokenizer_counter, torch.no_grad():
            parts.tokenizer.quant_conv(parts.tokenizer.encoder(parts.batches[0]["image"]))
        total += tokenizer_counter.get_total_flops()
    T = batch["input_ids"].shape[1]
    n = T if name in ("itc", "pac", "fashiongen_retrieval") else T + 4 - (name == "mvc")  # of 4 patches, 1 is dropped
    d, wide, layers = c.hidden_size, c.intermediate_size, c.num_hidden_layers
    weights = (4 * d * d + 2 * d * wide) * 2
    total += 3 * layers * 2 * n * weights  # attention, projection and heads come on top: a few per cent at these sizes
    assert total <= counter.get_total_flops() <= 1.25 * total + (name == "itm") * total
    assert all(p.grad is not None for part in ("resnet", "encoder") for p in getattr(parts, part).parameters())
    ours = sum(p.numel() for p in s.model.parameters())
    assert 0 <= ours - sum(p.numel() for p in parts.optimizer.param_groups[0]["params"]) < d


def test_our_side_of_the_bench_is_a_whole_update(catalogue):
    config = bench.BenchConfig(size="demo", data_root=str(catalogue), batch_size=2, pairs=1)
    s = bench.prepare(config, "itc")
    before = [p.detach().clone() for p in s.model.parameters()]
    assert len(list(bench.step(config, s, s.batches, 0))) == len(bare.PHASES)
    moved = [not torch.equal(a, b) for a, b in zip(before, s.model.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2


def test_unknown_name_is_one_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench.py", "--only=itcc"])
    with pytest.raises(InputError, match="only: found 'itcc', expected some of itc"):
        bench.main()
