"""tools/memory.py: the bytes that are counted, by hand."""

import torch
from torch.utils._pytree import tree_leaves

from tools.memory import LiveBytes, with_longest_texts


def test_live_bytes_by_hand():
    x = torch.zeros(1000)  # 4,000 bytes
    live = LiveBytes()
    live.count([x, x.view(10, 100)])  # one memory
    assert live.now == 4000
    with live:
        y = x + 1  # lives on
        z = (x * 2)[:10]  # a view keeps all 4,000
        assert live.now == 12_000
        del z
        y.add_(1)  # in place
        assert (live.now, live.peak) == (8000, 12_000)


def test_what_backward_needs_is_counted():
    w = torch.ones(500, requires_grad=True)
    live = LiveBytes()
    live.count([w])
    with live:
        y = (w.exp() + 1).sum()  # exp keeps its result for the backward; the sum of it and 1 goes
        assert live.now == 2 * 2000 + 4 and live.peak == 3 * 2000 + 4
        y.backward()
    assert w.grad is not None and live.peak >= 3 * 2000


def test_longest_texts_have_no_padding():
    batch = {name: torch.zeros(2, 5, dtype=torch.int64) for name in ("input_ids", "attention_mask", "masked_ids")}
    batch |= {"mlm_labels": torch.zeros(2, 5), "mlm_targets": torch.zeros(1), "text_drop": torch.zeros(2, 5)}
    longest = with_longest_texts(batch, 75)
    assert all(longest[name].shape == (2, 75) for name in batch if name != "mlm_targets")
    assert longest["attention_mask"].all() and len(longest["mlm_targets"]) == 2 * 11
    assert len(tree_leaves(longest)) == len(batch)
