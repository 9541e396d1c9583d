"""A table of a pre-training run: loss and accuracy of each objective at first and last, beside the trivial answer.

    python -m tools.summary runs/demo

The trivial answer looks at nothing: uniform over the candidates (ITC, MVC) or attributes (PAC), always the same class
(ITM), the frequency of each word piece (MLM) and of each code (MPFC). Last is the mean of the last five log lines."""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch

import annotations
import checkpoint
import data
import vqvae
from common import run
from losses import OBJECTIVES
from settings import InputError

SAMPLE = 5_000  # at most about so many texts, and a tenth of it photos, count for the frequencies
LAST = 5  # log lines


def entropy(counts):
    """Counts (n,) -> (entropy in nats, largest share): loss and accuracy of answering with the frequencies."""
    p = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(p * np.log(p)).sum()), float(p.max(initial=0))


def trivial_answers(config, vocab, names):
    """{objective: (loss in nats, accuracy)} without looking, for the objectives `names` of a run's settings."""
    products = annotations.load_pretraining(config["data_root"], config["sets"])
    candidates = config["batch_size"] // config["grad_accum"]
    answers = dict.fromkeys(("itc", "mvc"), (math.log(candidates), 1 / candidates))
    n_attributes = annotations.count_labels(products, "attributes", config["n_attributes"])
    answers["pac"] = 2 * math.log(n_attributes), min(5, n_attributes) / n_attributes
    if "mlm" in names:
        tokenizer = data.wordpiece(vocab)
        texts = [product.text for product in products[:: max(1, len(products) // SAMPLE)]]
        words = np.zeros(tokenizer.get_vocab_size())
        for ids, _ in data.tokenize(tokenizer, texts, config["max_tokens"] or data.MAX_TOKENS):
            np.add.at(words, ids[1:-1], 1)
        answers["mlm"] = entropy(words)
    if "mpfc" in names and Path(config["image_tokenizer"]).is_file():
        image_tokenizer = vqvae.load_image_tokenizer(config["image_tokenizer"])
        paths = [product.images[0] for product in products[:: max(1, 10 * len(products) // SAMPLE)]]
        codes = [image_tokenizer.encode(data.load_images([path], config["image_size"])) for path in paths]
        answers["mpfc"] = entropy(np.bincount(torch.cat(codes).flatten().numpy()).astype(float))
    return answers


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder of pretrain.py, as runs/demo")
    folder = Path(parser.parse_args(argv).run)
    try:
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        config = json.loads((folder / "run.json").read_text())["config"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: found {error}, expected a run folder of pretrain.py") from None
    rows = {name: [line for line in lines if f"{name}_loss" in line] for name in OBJECTIVES}
    answers = trivial_answers(config, checkpoint.read_weights(folder / "last.pt")[1]["vocab"], rows)
    print("objective   loss: first    last  trivial     accuracy: first    last  trivial")
    for name, own in rows.items():
        if not own:
            continue
        metric = "pac_recall" if name == "pac" else f"{name}_acc"
        matched = sum(row.get("itm_matched", 0) for row in own) / len(own)
        answers["itm"] = math.log(2), max(matched, 1 - matched)
        trivial_loss, trivial_accuracy = answers.get(name, (math.nan, math.nan))
        loss, accuracy = (sum(row[key] for row in own[-LAST:]) / len(own[-LAST:]) for key in (f"{name}_loss", metric))
        print(
            f"{name:9} {own[0][f'{name}_loss']:14.3f} {loss:7.3f} {trivial_loss:8.3f}"
            f" {100 * own[0][metric]:18.1f} % {100 * accuracy:5.1f} % {100 * trivial_accuracy:6.1f} %"
        )
    print(
        f"last: mean of the last {LAST} log lines; accuracy: itc, mvc right candidate, pac label weight in the best 5"
    )


if __name__ == "__main__":
    run(main)
