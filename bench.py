"""How fast it is, against the bare parts, on this machine.

    python bench.py --eval      the retrieval protocols on 30,000 images x 10,000 texts of width 768

Times are medians of interleaved runs; memory is the peak of the resident set above the embeddings."""

import resource
import statistics
import time
from dataclasses import dataclass

import torch

import common
import evaluate
from common import setting

IMAGES, TEXTS, WIDTH, SUBCATEGORIES = 30_000, 10_000, 768, 121


@dataclass
class BenchConfig:
    """Settings of `python bench.py`."""

    eval: bool = setting(False, "time the retrieval protocols")
    pairs: int = setting(5, "runs of either side, in turns")
    seed: int = setting(0, "of the random embeddings")


def seconds(function):
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def bare_products(a, b, block=2048):
    """Both products of full-gallery retrieval, a b' and b a', block by block into one buffer, scores not looked at."""
    for queries, gallery in ((a, b), (b, a)):
        buffer = torch.empty(block, len(gallery))
        for part in queries.split(block):
            torch.mm(part, gallery.t(), out=buffer[: len(part)])


def bench_evaluation(config):
    """Full gallery and sample-100 on random embeddings, the former in turns with its bare matrix products."""
    generator = torch.Generator().manual_seed(config.seed)
    text = torch.randn(TEXTS, WIDTH, generator=generator)
    text_id = torch.arange(TEXTS)
    image_id = torch.arange(IMAGES) % TEXTS
    image = torch.randn(IMAGES, WIDTH, generator=generator)
    group = torch.randint(SUBCATEGORIES, (TEXTS,), generator=generator)

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    evaluate.retrieval(image, text, image_id, text_id)  # first, for nothing else has raised the peak yet
    above = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    pairs = [
        (
            seconds(lambda: evaluate.retrieval(image, text, image_id, text_id)),
            seconds(lambda: bare_products(image, text)),
        )
        for _ in range(config.pairs)
    ]
    ours, bare = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    sampled = statistics.median(
        seconds(lambda: evaluate.sample_100(image, text, image_id, text_id, group[image_id], group, config.seed))
        for _ in range(config.pairs)
    )
    print(f"{IMAGES:,} images x {TEXTS:,} texts, width {WIDTH}, {torch.get_num_threads()} threads")
    print(f"full gallery  {ours:6.2f} s   bare products {bare:.2f} s   ratio {ratio:.2f}   {above:.0f} MB above them")
    print(f"sample-100    {sampled:6.2f} s   1,000 queries x 5 draws, both ways")


def main():
    config = common.load_config(BenchConfig, description=__doc__)
    if not config.eval:
        raise common.InputError("nothing to measure: set --eval")
    bench_evaluation(config)


if __name__ == "__main__":
    common.run(main)
