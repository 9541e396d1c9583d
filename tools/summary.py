"""A table of a pre-training run: loss and accuracy of each objective at first and last, beside the trivial answer.

    python -m tools.summary runs/demo

The trivial answer looks at nothing: uniform over the candidates (ITC, MVC) or attributes (PAC), always the same class
(ITM), the frequency of each word piece (MLM) and of each code (MPFC). Last is the mean of the last five log lines."""

import argparse
import math
from pathlib import Path

import numpy as np
import tokenizers

import data
import vqvae
from losses import OBJECTIVES
from plumbing import annotations, ending, weights
from tools.curves import read_curves

SAMPLE = 5_000  # at most about so many texts, and a tenth as many photos, count for the frequencies


def trivial_answer(name, curves, config, tokenizer):
    """(loss in nats, accuracy) without looking, of objective `name` of a run: its log, settings and tokenizer."""
    if name in ("itc", "mvc"):
        candidates = config["batch_size"] // config["grad_accum"]
        return math.log(candidates), 1 / candidates
    if name == "itm":
        matched = np.mean(curves["itm_matched"][1])
        return math.log(2), max(matched, 1 - matched)
    products = annotations.load_pretraining(config["data_root"], config["sets"])
    if name == "pac":
        n = annotations.count_labels(products, "attributes", config["n_attributes"])
        return 2 * math.log(n), min(5, n) / n
    if name == "mlm":
        texts = [product.text for product in products[:: max(1, len(products) // SAMPLE)]]
        texts = data.tokenize(tokenizer, texts, config["max_tokens"] or data.MAX_TOKENS)
        ids = np.concatenate([text.ids[1:-1] for text in texts])
    elif name == "mpfc" and Path(config["image_tokenizer"]).is_file():
        image_tokenizer = vqvae.load_image_tokenizer(config["image_tokenizer"])
        paths = [product.images[0] for product in products[:: max(1, 10 * len(products) // SAMPLE)]]
        ids = np.concatenate([image_tokenizer.encode(data.load_images([p], config["image_size"]))[0] for p in paths])
    else:  # an objective that is not known here, or MPFC with random codes
        return math.nan, math.nan
    counts = np.unique(ids, return_counts=True)[1]
    shares = counts / counts.sum()
    return -(shares * np.log(shares)).sum(), shares.max()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder of pretrain.py, as runs/demo")
    folder = Path(parser.parse_args(argv).run)
    curves, (_, info) = read_curves(folder), weights.read_weights(folder / "last.pt", ("fashionvil",), "run")
    tokenizer = tokenizers.Tokenizer.from_str(info["tokenizer"])
    print("objective   loss: first    last  trivial     accuracy: first    last  trivial")
    for name in OBJECTIVES:
        if f"{name}_loss" in curves:
            losses = curves[f"{name}_loss"][1]
            accuracies = curves["pac_recall" if name == "pac" else f"{name}_acc"][1]
            trivial_loss, trivial_accuracy = trivial_answer(name, curves, info["config"], tokenizer)
            row = f"{name:9} {losses[0]:14.3f} {np.mean(losses[-5:]):7.3f} {trivial_loss:8.3f}"
            print(f"{row} {accuracies[0]:18.1%} {np.mean(accuracies[-5:]):8.1%} {trivial_accuracy:8.1%}")
    print("accuracy: itc, mvc right candidate, pac label weight in the best 5")


if __name__ == "__main__":
    ending.run(main)
