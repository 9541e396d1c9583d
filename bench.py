"""How fast it is, against the bare parts, on this machine.

    python bench.py --eval      the retrieval protocols on 30,000 images x 10,000 texts of width 768
    python bench.py --search    search among 100,000 items of width 768; index build against the bare encoder

Times are medians of interleaved runs; memory is the peak of the resident set above the embeddings."""

import resource
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import common
import data
import evaluate
import search
from common import setting
from model import FashionViL, ModelConfig

IMAGES, TEXTS, WIDTH, SUBCATEGORIES = 30_000, 10_000, 768, 121


@dataclass
class BenchConfig:
    """Settings of `python bench.py`."""

    eval: bool = setting(False, "time the retrieval protocols")
    search: bool = setting(False, "time search and the build of its index")
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


def search_speed(items=100_000, width=WIDTH, photos=64, searches=20, seed=0):
    """Print the median time of a search (scores and the best 10) among `items` vectors mapped from a file that the
    first search has loaded, and the images/s of an index build with the full-size model on `photos` made-up JPEGs of
    256 px, in turns with the bare encoder's on the same images already decoded."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        vectors = rng.standard_normal((items, width), dtype=np.float32)
        np.save(folder / "vectors.npy", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
        mapped, queries = np.load(folder / "vectors.npy", mmap_mode="r"), vectors[:searches, None]  # (searches, 1, D)
        first = seconds(lambda: mapped @ queries[0].T)
        times = [seconds(lambda q=q: search.best((mapped @ q.T).max(1), 10)) for q in queries]
        print(f"{items:,} items, width {width}, {torch.get_num_threads()} threads")
        print(f"search  {1000 * statistics.median(times):.1f} ms   loading {1000 * first:.0f} ms")

        gallery = folder / "gallery"
        gallery.mkdir()
        for i in range(photos):
            noise = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((256, 256)).save(gallery / f"{i}.jpg")
        model = FashionViL(ModelConfig(heads=("contrastive",))).eval()
        config = evaluate.EvalConfig(image_size=224, eval_batch_size=32, workers=0)
        encode, device = partial(evaluate.encode, model), common.Processes(0, 1, torch.device("cpu"))
        pixels = data.load_images(sorted(gallery.iterdir()), 224)

        def build(turn):
            embed = partial(evaluate.embed, encode, tokenizer=None, config=config, processes=device)
            search.open_index(folder / f"index{turn}", gallery, "", embed)

        @torch.no_grad()
        def bare():
            for part in pixels.split(32):
                encode({"image": part})

        bare()
        pairs = [(seconds(lambda turn=turn: build(turn)), seconds(bare)) for turn in range(3)]
        ours, alone = (photos / statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        print(f"index   {ours:.1f} images/s   bare encoder {alone:.1f} images/s   ratio {ratio:.2f}")


def main():
    config = common.load_config(BenchConfig, description=__doc__)
    if not (config.eval or config.search):
        raise common.InputError("nothing to measure: set --eval or --search")
    if config.eval:
        bench_evaluation(config)
    if config.search:
        search_speed(seed=config.seed)


if __name__ == "__main__":
    common.run(main)
