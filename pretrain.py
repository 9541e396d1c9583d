"""Stage 1: pre-train FashionViL with six objectives, one of them drawn at every update (recipe 2, 4).

    CPU, minutes:   python pretrain.py configs/demo.py
    one GPU:        python pretrain.py configs/fashionall.py --grad_accum=4 --dtype=bfloat16
    four GPUs:      torchrun --nproc_per_node=4 pretrain.py configs/fashionall.py

Writes into the run folder: run.json (how to run it again), log.jsonl (a line per log step), last.pt (all that a resume
needs) and best.pt (the model with the best FashionGen-val mean recall)."""

import contextlib
import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import annotations
import checkpoint
import common
import data
import evaluate
import runs
import settings
import vqvae
from losses import OBJECTIVES
from model import RESNETS, SIZES, FashionViL, ModelConfig
from settings import FROM_0, InputError, ModelTrainConfig, setting

PAPER_MIX = {"itm": 0.15, "pac": 0.15, "itc": 0.20, "mvc": 0.20, "mlm": 0.15, "mpfc": 0.15}


@dataclass
class PretrainConfig(ModelTrainConfig):
    """Settings of pre-training."""

    sets: tuple = setting(tuple(annotations.SETS), "data sets to train on")
    skip_broken_images: bool = setting(False, data.SKIP_BROKEN)
    objectives: dict = setting(PAPER_MIX, "objectives and their probabilities, itc:0.5,mlm:0.5")
    image_tokenizer: str = setting(
        "", "image tokenizer file for MPFC (vqvae.py trains one; a released encoder will do)"
    )
    n_attributes: int = setting(2232, "size of the pseudo-attribute vocabulary; 0: largest id of the data + 1", FROM_0)
    mask_share: float = setting(0.15, "share of the words that MLM asks for")
    pac_scale: float = setting(1.0, "multiplies the cosines of PAC's head")
    itm_candidates: int = setting(0, "rows of the batch among which ITM looks for its hardest negative; 0: all", FROM_0)


def check_config(config):
    """Raise InputError for an objective that does not exist, probabilities that are none, sizes that no model has."""
    settings.check_limits(config)
    for name in config.objectives:
        if name not in OBJECTIVES:
            raise InputError(f"objectives: found {name!r}, expected some of {', '.join(OBJECTIVES)}")
    shares = list(config.objectives.values())
    numbers = all(type(share) in (int, float) and share >= 0 for share in shares)
    if not numbers or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
        raise InputError(f"objectives: found probabilities {config.objectives}, expected none below 0 and a sum of 1")
    if config.image_size < settings.STRIDE or config.image_size % settings.STRIDE:
        raise InputError(f"image_size: found {config.image_size}, expected a multiple of {settings.STRIDE}")
    if not 0 < config.mask_share < 1:
        raise InputError(f"mask_share: found {config.mask_share}, expected a share between 0 and 1")
    if config.size not in SIZES:
        raise InputError(f"size: found {config.size!r}, expected one of {', '.join(SIZES)}")
    if config.resnet not in RESNETS:
        raise InputError(f"resnet: found {config.resnet!r}, expected one of {', '.join(RESNETS)}")


def objective_at(step, config):
    """Name of the objective of update `step`: a function of (seed, step), so every process and every resume agrees."""
    draw = np.random.default_rng([config.seed, step]).random()
    ends = np.cumsum(list(config.objectives.values()))
    return list(config.objectives)[min(int(np.searchsorted(ends, draw, side="right")), len(ends) - 1)]


def build_model(config, **data_sizes):
    """FashionViL with the pre-training heads, of the config's sizes (a BERT folder's own sizes where one is named)."""
    sizes = checkpoint.bert_sizes(config.bert) if Path(config.bert, "config.json").exists() else SIZES[config.size]
    return FashionViL(
        ModelConfig(
            resnet=config.resnet,
            width=config.width,
            dropout=config.dropout,
            pac_scale=config.pac_scale,
            itm_candidates=config.itm_candidates,
            **{**sizes, **data_sizes},
        )
    )


def load_image_tokenizer(config, device):
    """The frozen image tokenizer of MPFC, or None where MPFC is not trained.

    A random start (`--init=random`) makes do with a random tokenizer where no file is named or there, and says so."""
    if not config.objectives.get("mpfc"):
        return None
    if config.init == "random" and not Path(config.image_tokenizer).is_file():
        print(f"image tokenizer: no file at {config.image_tokenizer!r}; --init=random goes on with random codes")
        return vqvae.random_image_tokenizer(vqvae.ImageTokenizerConfig()).to(device)
    if not config.image_tokenizer:
        raise InputError(
            "image_tokenizer: MPFC needs an image tokenizer; train one with vqvae.py and set --image_tokenizer=FILE"
        )
    tokenizer = vqvae.load_image_tokenizer(config.image_tokenizer, device)
    if tokenizer.config.stride != settings.STRIDE:
        found = f"patches of {tokenizer.config.stride} pixels, expected {settings.STRIDE} as the ResNet's"
        raise InputError(f"image_tokenizer: {config.image_tokenizer} has {found}; train one with vqvae.py")
    return tokenizer


def validate(model, products, tokenizer, config, processes):
    """FashionGen-val retrieval over the full gallery -> metrics, recalls in 0..1, {"i2t_r@1": ..., "mean_recall"}."""
    return evaluate.full_gallery(*evaluate.embed_retrieval(model, products, tokenizer, config, processes))["metrics"]


def train(config, processes):
    """The whole stage on this process. Returns the metrics of the last validation."""
    check_config(config)
    main, device = processes.is_main, processes.device
    run_dir = Path(config.out_dir)
    torch.manual_seed(config.seed)  # every process starts from the same weights

    products = annotations.load_pretraining(config.data_root, config.sets)
    n_attributes = annotations.count_labels(products, "attributes", config.n_attributes)
    val_products = annotations.load_products(config.data_root, "FashionGen", "val")
    vocab = checkpoint.vocabulary(config, config.init)
    tokenizer = data.wordpiece(vocab)

    # frozen, so it is a variable here and no part of what is trained and saved
    image_tokenizer = load_image_tokenizer(config, device)
    n_codes = image_tokenizer.config.n_codes if image_tokenizer else ModelConfig.n_codes
    model = build_model(config, vocab_size=tokenizer.get_vocab_size(), n_attributes=n_attributes, n_codes=n_codes)
    data.check_lengths(config, model.config.max_position_embeddings)
    report = checkpoint.initialise(model, config.init, bert=config.bert, resnet=config.resnet_file)
    model.to(device)
    optimizer = common.make_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")

    start, best, totals, skipped, health = 0, -1.0, {}, 0, runs.Health(device)
    code_counts = torch.zeros(n_codes, dtype=torch.long, device=device)  # of masked patches, for the last table
    state = checkpoint.find_resume(config.resume, run_dir, model)
    if state is not None:
        report += checkpoint.restore(state, config, model, optimizer, scaler)
        start, best, code_counts = state["step"], state["best"], state["code_counts"].to(device)
        mine = runs.own_part(state, processes)
        totals, skipped = mine.get("totals", {}), mine.get("skipped_images", 0)
        health.skipped_updates = state.get("skipped_updates", 0)
        # Used parameters carry gradients of zero between updates (below), so a resumed run must hold them too.
        for parameter in optimizer.state:
            parameter.grad = torch.zeros_like(parameter)
    common.same_everywhere("resume", f"a start at update {start}", "the run folder must be the same on every node")

    batches = data.Batches(len(products), config, processes, start, lambda step: objective_at(step, config))
    dataset = data.Pretraining(products, tokenizer, n_attributes, config)
    loader = iter(data.train_loader(dataset, batches, config, device))
    if config.compile:
        model.image_encoder.compile()
        for layer in model.bert.encoder["layer"]:
            layer.compile(dynamic=True)  # text lengths differ from batch to batch
    # An update uses one objective's heads; DDP must not wait for the others' gradients.
    ddp = DistributedDataParallel(model, find_unused_parameters=True) if processes.world_size > 1 else model

    if main:
        runs.open_run(config, start)
        micro = config.batch_size // config.grad_accum
        print(f"{len(products)} products, {len(val_products)} for validation, {tokenizer.get_vocab_size()} word pieces")
        print(*report, sep="\n")
        for group in optimizer.param_groups:
            n = sum(p.numel() for p in group["params"])
            print(f"learning rate {group['base_lr']:.2e}, weight decay {group['weight_decay']:.0e}: {n:,} parameters")
        print(f"batch {config.batch_size}, contrastive candidates {micro}, updates {start} to {config.max_steps}")
    wandb = runs.start_wandb(config) if main else None

    def save(name, step, **more):
        state = {
            "kind": "fashionvil",
            "task": "pretrain",
            "model": model.state_dict(),
            "model_config": dataclasses.asdict(model.config),
            "config": dataclasses.asdict(config),
            "vocab": vocab,
            "step": step,
            "best": best,
            **more,
        }
        checkpoint.save(run_dir / name, state)

    def name_of(index):
        return products[index].name

    metrics, logged, stop = {}, start, runs.StopSignals()
    clock, bar = time.perf_counter(), tqdm(range(start, config.max_steps), disable=not main, initial=start)
    for step in bar:
        objective = objective_at(step, config)
        common.set_lr(optimizer, step, config)
        common.seed_step(config.seed, step, processes.rank)
        model.train()
        # Zeros, not None: a head that was used before and not in this update still moves by its momentum and decays;
        # one never used has no gradient yet and is skipped. The original does so, and it changes the numbers.
        optimizer.zero_grad(set_to_none=False)
        update_loss = 0.0
        for micro in range(config.grad_accum):
            batch = data.to_device(next(loader), device)
            skipped += int(batch.pop("skipped").sum()) if "skipped" in batch else 0
            if objective == "mpfc":
                batch = {**batch, "image_codes": image_tokenizer.encode(batch["image"])}
                code_counts += torch.bincount(batch["image_codes"][batch["patch_mask"]], minlength=len(code_counts))
            last = micro == config.grad_accum - 1
            sync = contextlib.nullcontext() if last or ddp is model else ddp.no_sync()
            with sync:
                with common.autocast(device, config.dtype):
                    loss, measured = ddp(batch, OBJECTIVES[objective])
                scaler.scale(loss / config.grad_accum).backward()
            update_loss = update_loss + loss.detach() / config.grad_accum
            # sums stay on the device until a log line reads them
            row = totals.setdefault(objective, {})
            for key, value in {"loss": loss.detach(), **measured}.items():
                row[key] = row.get(key, 0) + value / config.grad_accum
            row["updates"] = row.get("updates", 0) + 1 / config.grad_accum
        health.step(step, update_loss, optimizer, scaler)

        done, stopping = step + 1, common.any_process(bool(stop.asked))
        logging, validating, saving = runs.due(config, done, stopping)
        if logging or saving:
            health.check(optimizer, config, batches, name_of)
        if logging:
            row = {"step": done, "lr": optimizer.param_groups[0]["lr"]}
            for name, sums in totals.items():
                means = runs.mean_of_updates(sums, device)
                row |= {f"{name}_loss": means.pop("loss"), **means, f"{name}_updates": round(sums["updates"])}
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            row["samples_per_s"] = config.batch_size * (done - logged) / seconds
            logged = done
            row["memory_gb"] = runs.peak_memory_gb(device)
            if config.skip_broken_images:
                row["skipped_images"] = sum(common.gather_objects(skipped))
            if scaler.is_enabled():
                row["skipped_updates"] = health.skipped_updates
            totals.clear()
            if main:
                runs.append_log(run_dir / "log.jsonl", row)
                bar.set_postfix({k: f"{v:.3f}" for k, v in row.items() if k.endswith("_loss")})
                if wandb:
                    wandb.log(row, step=done)
        pause = time.perf_counter()
        if saving:
            common.check_weights(model, done)
        if validating:
            model.eval()
            metrics = validate(model, val_products, tokenizer, config, processes)
            if main:
                runs.append_log(run_dir / "log.jsonl", {"step": done, **{f"val_{k}": v for k, v in metrics.items()}})
                bar.write(f"step {done}: val mean recall {100 * metrics['mean_recall']:.1f} %")
                if metrics["mean_recall"] > best:
                    best = metrics["mean_recall"]
                    save("best.pt", done)
        if saving:
            parts = common.gather_objects({"totals": runs.as_values(totals), "skipped_images": skipped})
            if main:
                state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "parts": parts}
                save("last.pt", done, **state, code_counts=code_counts, skipped_updates=health.skipped_updates)
            clock += time.perf_counter() - pause  # speed is that of training
        if stopping and done < config.max_steps:
            stop.restore()
            raise common.Stopped(f"stopped after update {done}, {run_dir / 'last.pt'}; --resume=auto goes on")
    stop.restore()
    if main:
        print_summary(
            run_dir / "log.jsonl", trivial_answers(products, tokenizer, config, code_counts.double().cpu().numpy())
        )
    return metrics


def trivial_answers(products, tokenizer, config, code_counts):
    """{objective: (loss, accuracy)} of answering without looking: the table's yardstick.

    Uniform over the candidates (ITC, MVC) or attributes (PAC), the frequency of each token (MLM) and code (MPFC,
    code_counts (K,) of the masked patches seen). ITM's is the majority of all mined pairs, which its log lines hold."""
    words = np.zeros(tokenizer.get_vocab_size())
    texts = [product.text for product in products[:: max(1, len(products) // 5000)]]
    for ids, _ in data.tokenize(tokenizer, texts, config.max_tokens or data.MAX_TOKENS):
        np.add.at(words, ids[1:-1], 1)
    candidates = config.batch_size // config.grad_accum
    answers = dict.fromkeys(("itc", "mvc"), (math.log(candidates), 1 / candidates))
    n_attributes = annotations.count_labels(products, "attributes", config.n_attributes)
    answers["pac"] = (2 * math.log(n_attributes), min(5, n_attributes) / n_attributes)
    for name, counts in (("mlm", words), ("mpfc", code_counts)):
        p = counts[counts > 0] / max(counts.sum(), 1)
        answers[name] = (float(-(p * np.log(p)).sum()), float(p.max(initial=0)))
    return answers


def print_summary(log_file, answers):
    """A table per objective: loss and accuracy in its first and its last log lines, and the trivial answer."""
    lines = [json.loads(line) for line in Path(log_file).read_text().splitlines()]
    print("objective   loss: first    last  trivial     accuracy: first    last  trivial")
    for name in OBJECTIVES:
        rows = [line for line in lines if f"{name}_loss" in line]
        if not rows:
            continue
        metric = "pac_recall" if name == "pac" else f"{name}_acc"
        matched = sum(row.get("itm_matched", 0) for row in rows) / len(rows)
        loss, accuracy = answers.get(name, (math.log(2), max(matched, 1 - matched)))
        last = [sum(row[key] for row in rows[-5:]) / len(rows[-5:]) for key in (f"{name}_loss", metric)]
        print(
            f"{name:9} {rows[0][f'{name}_loss']:14.3f} {last[0]:7.3f} {loss:8.3f}"
            f" {100 * rows[0][metric]:18.1f} % {100 * last[1]:5.1f} % {100 * accuracy:6.1f} %"
        )
    print("last: mean of the last 5 log lines; accuracy: itc, mvc right candidate, pac label weight in the best 5")


def main():
    config = settings.load_config(PretrainConfig, description=__doc__)
    processes = common.start_processes(config.device, config.deterministic)
    metrics = train(config, processes)
    if processes.is_main and metrics:
        print("FashionGen val, full gallery:", "  ".join(f"{k} {100 * v:.1f}" for k, v in metrics.items()))


if __name__ == "__main__":
    common.run(main)
