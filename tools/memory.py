"""Memory of a training step on a GPU, calculated on a CPU: the bytes of all tensors that live at the same time.

    python -m tools.memory --data_root=data/fashion-mini                  a row for each objective and task
    python -m tools.memory --only=mvc,fashioniq --dtype=bfloat16

Steps of 2 and of 4 products with texts of full length run at the sizes of the paper. The difference of their peaks is
the memory of a product (gb_per_product). What is left is fixed_gb: weights, gradients, AdamW's moments and, for MPFC,
the image tokenizer. fits_24 and fits_80 are products of a process on cards of 24 and 80 GB. A GPU also holds its
kernels, and its allocator leaves gaps, so RESERVED of the card is left free."""

import weakref
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import ending
import settings
from files import write_json
from settings import InputError, setting
from tools.bench import NAMES, BenchConfig, Ours, apart, step

RESERVED = 0.15  # share of a card
CARDS = (24, 80)  # GB
MLM_TARGETS = 11  # of 75 tokens, about 15 %


@dataclass
class MemoryConfig:
    """Settings of `python -m tools.memory`."""

    only: str = setting("", "objectives and tasks, as itc,mlm,fashioniq; empty: all")
    dtype: str = setting("float32", "float32 or bfloat16 (autocast)", choices=("float32", "bfloat16"))
    data_root: str = setting("data/fashion-mini", "photos of the batches")
    out: str = setting("memory.json", "all figures")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, and of those that exist before (`count`), while they live.

    `peak` is the largest sum so far. Tensors that share memory count once."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def count(self, tensors):
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if id(storage) not in self.known:
                self.known.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)

    def forget(self, number, n_bytes):
        self.known.discard(number)
        self.now -= n_bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count(x for x in tree_leaves(out) if isinstance(x, torch.Tensor))
        return out


def with_longest_texts(batch, n_tokens):
    """The batch with texts of n_tokens word pieces each, none of them padding; 11 of them are targets of MLM."""
    if "input_ids" not in batch:
        return batch
    shape = (len(batch["input_ids"]), n_tokens)
    batch = {**batch, "input_ids": torch.full(shape, 7), "attention_mask": torch.ones(shape, dtype=torch.int64)}
    if "masked_ids" in batch:
        labels = torch.full(shape, settings.NO_LABEL)
        labels[:, :MLM_TARGETS] = 7
        batch |= {"masked_ids": batch["input_ids"], "mlm_labels": labels}
        batch["mlm_targets"] = data.places(labels != settings.NO_LABEL)
    if "text_drop" in batch:
        batch["text_drop"] = torch.zeros(shape, dtype=torch.bool)
        batch["text_drop"][:, 1 : 1 + (n_tokens - 2) // 4] = True  # a quarter of all but [CLS] and [SEP], as in MVC
    return batch


def peak_gb(config, name, n_products):
    """Peak of the second of two steps on n_products products, in GB. The first one makes the optimizer's moments."""
    side = Ours(BenchConfig(data_root=config.data_root, batch_size=n_products, pairs=1), name)
    n_tokens = data.FASHIONIQ_MAX_TOKENS if name == "fashioniq" else data.MAX_TOKENS
    side.batches = [with_longest_texts(side.batches[0], n_tokens)]
    step(config, side, 0)
    for parameter in side.model.parameters():  # DistributedDataParallel keeps the memory of all gradients
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    live = LiveBytes()
    modules = [side.model, *([side.image_tokenizer] if side.image_tokenizer else [])]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    tensors += [p.grad for p in side.model.parameters() if p.grad is not None]
    live.count(tensors + [x for x in tree_leaves(side.optimizer.state) if isinstance(x, torch.Tensor)])
    with live:
        step(config, side, 0)
    return live.peak / 1e9


def main():
    config = settings.load_config(MemoryConfig, description=__doc__)
    rows = []
    for name in config.only.split(",") if config.only else NAMES:
        if name not in NAMES:
            raise InputError(f"only: found {name!r}, expected some of {', '.join(NAMES)}")
        small, large = (apart(peak_gb, config, name, n) for n in (2, 4))
        row = {
            "name": name,
            "dtype": config.dtype,
            "fixed_gb": 2 * small - large,
            "gb_per_product": (large - small) / 2,
        }
        for card in CARDS:
            row[f"fits_{card}"] = int((card * (1 - RESERVED) - row["fixed_gb"]) / row["gb_per_product"])
        rows.append(row)
        print(
            "  ".join(f"{key} {value:.3g}" if type(value) is float else f"{key} {value}" for key, value in row.items())
        )
    write_json(config.out, rows)


if __name__ == "__main__":
    ending.run(main)
