"""Stage 1: pre-train FashionViL with six objectives, one of them drawn at every update (FashionViL 3.2, 4.1).

    CPU, minutes:   python pretrain.py configs/demo.py
    one GPU:        python pretrain.py configs/fashionall.py --grad_accum=4 --dtype=bfloat16
    four GPUs:      torchrun --nproc_per_node=4 pretrain.py configs/fashionall.py

Writes into the run folder: run.json (how to run it again), log.jsonl (a line per log step), last.pt (all that a resume
needs) and best.pt (the model with the best FashionGen-val mean recall)."""

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch

import data
import evaluate
import vqvae
from losses import OBJECTIVES
from model import PRETRAINING_HEADS, RESNETS, SIZES, FashionViL, ModelConfig, compile_parts
from plumbing import checkpoint, runs, settings
from plumbing.settings import COUNT, FROM_0, MISSING, SHARE, InputError, setting

PAPER_MIX = {"itm": 0.15, "pac": 0.15, "itc": 0.20, "mvc": 0.20, "mlm": 0.15, "mpfc": 0.15}


@dataclass
class PretrainConfig(runs.RunConfig):
    """Settings of pre-training; those of the machine and of the log are in plumbing/runs.py."""

    data_root: str = setting("data/datasets", "folder that holds FashionGen/, BigFACAD/, ...", group="data")
    sets: tuple = setting(data.SETS, "data sets to train on")
    vocab: str = setting(
        "", "vocab.txt or tokenizer.json; empty: that of the weights, DATA_ROOT/vocab.txt or the hub's"
    )
    image_size: int = setting(224, "pixels a side, a multiple of 32")
    max_tokens: int = setting(0, "longest text, [CLS] and [SEP] included; 0: the paper's 75", FROM_0)
    n_attributes: int = setting(2232, "size of the pseudo-attribute vocabulary; 0: largest id of the data + 1", FROM_0)
    missing: str = setting("stop", MISSING, choices=("stop", "skip"))

    init: str = setting(
        "pretrained", "pretrained (ResNet, BERT), random, or a checkpoint with its sizes", group="model"
    )
    size: str = setting("base", "Transformer size, a row of model.SIZES", choices=tuple(SIZES))
    resnet: str = setting("resnet50", "resnet18, resnet34 or resnet50", choices=tuple(RESNETS))
    width: int = setting(64, "channels of the ResNet's first stage", COUNT)
    dropout: float = setting(0.1, "dropout of the Transformer", SHARE)
    bert: str = setting("", "BERT folder or hub name, also sets the Transformer's size; empty: bert-base-uncased")
    resnet_file: str = setting("", "torchvision's ResNet weights for --init=pretrained; empty: fetched, random: none")
    image_tokenizer: str = setting("", "image tokenizer file for MPFC: one of vqvae.py, or the released encoder")

    objectives: dict = setting(PAPER_MIX, "objectives and their probabilities, itc:0.5,mlm:0.5", group="objectives")
    mask_share: float = setting(0.15, "share of the words that MLM predicts")
    pac_scale: float = setting(1.0, "multiplies the cosines of PAC's head")
    itm_candidates: int = setting(0, "texts among which ITM seeks its hardest negative; 0: all of this process", FROM_0)

    batch_size: int = setting(256, "products per update, all processes together", COUNT, group="optimization")
    grad_accum: int = setting(1, "micro-batches per update; contrastive candidates are one micro-batch", COUNT)
    max_steps: int = setting(120_000, "updates", COUNT)
    lr: float = setting(1e-5, "base learning rate", FROM_0)
    lr_factor: float = setting(20.0, "image encoder, projection and heads learn this much faster", FROM_0)
    weight_decay: float = setting(1e-4, "AdamW weight decay", FROM_0)
    warmup: int = setting(15_000, "updates until the full learning rate; 0: none", FROM_0)
    milestones: tuple = setting((45_000, 90_000), "updates at which the learning rate falls to a tenth")


def check_config(config, world_size=1):
    """Raise InputError for a setting out of its limits, an unknown objective, a sum of probabilities that is not 1, or
    too few products to compare."""
    settings.check_limits(config)
    for name in config.objectives:
        if name not in OBJECTIVES:
            raise InputError(f"objectives: found {name!r}, expected some of {', '.join(OBJECTIVES)}")
    shares = list(config.objectives.values())
    are_shares = all(type(share) in (int, float) and share >= 0 for share in shares)
    if not are_shares or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
        raise InputError(f"objectives: found probabilities {config.objectives}, expected none below 0 and a sum of 1")
    used = {name for name, share in config.objectives.items() if share}
    if used & {"itc", "mvc", "itm"}:
        # ITC and MVC compare the products of all processes, ITM only those of its own process.
        data.check_candidates(config, parts=world_size if "itm" in used else 1)
    if "itm" in used and config.itm_candidates == 1:
        raise InputError("itm_candidates: found 1, expected 0 or at least 2, for the only candidate is the text itself")
    if not 0 < config.mask_share < 1:
        raise InputError(f"mask_share: found {config.mask_share}, expected a share between 0 and 1")


def objective_at(step, objectives, seed):
    """Name of the objective of update `step`: a function of (seed, step), so every process and every resume agrees."""
    uniform = np.random.default_rng([seed, step]).random()
    ends = np.cumsum(list(objectives.values()))
    return list(objectives)[min(int(np.searchsorted(ends, uniform, side="right")), len(ends) - 1)]


def train(config, processes):
    """The whole stage on this process. Returns the metrics of the last validation."""
    check_config(config, processes.world_size)
    device = processes.device
    torch.manual_seed(config.seed)  # every process starts from the same weights

    # The data come first: where they are missing, nothing is fetched.
    products, val_products, n_attributes, labels = data.pretraining_products(config)

    # The image tokenizer is frozen, so it is a variable here and no part of the model. Checkpoints keep its checksum.
    image_tokenizer = vqvae.prepare_image_tokenizer(config, device)
    n_codes = image_tokenizer.config.n_codes if image_tokenizer else ModelConfig.n_codes

    # What the model starts from decides the sizes of ResNet and Transformer. The data and the image tokenizer decide
    # those of two heads.
    start = checkpoint.read_start(config)
    model_config = replace(
        ModelConfig(**start.sizes),
        heads=PRETRAINING_HEADS,
        n_attributes=n_attributes,
        n_codes=n_codes,
        dropout=config.dropout,
        pac_scale=config.pac_scale,
        itm_candidates=config.itm_candidates,
    )
    model, tokenizer = FashionViL(model_config), start.tokenizer
    data.check_lengths(config, model_config.max_position_embeddings)
    report = checkpoint.initialise(model, start)
    model.to(device)

    # The bookkeeping: log, checkpoints, stops. It resumes an earlier run where config.resume says so.
    contents = checkpoint.contents(model, "pretrain", labels, tokenizer, image_tokenizer)
    run = runs.Run(config, processes, model, contents)

    # The samples, and the order of their batches in the updates that are left.
    objective_of = functools.partial(objective_at, objectives=config.objectives, seed=config.seed)
    sampler = data.BatchSampler(len(products), config, processes, run.start, objective_of)
    dataset = data.Pretraining(products, tokenizer, n_attributes, config)
    loader = iter(data.train_loader(dataset, sampler, config, device))

    # What the user sees at the start.
    report.append(
        f"{len(products)} products, {len(val_products)} for validation, {tokenizer.get_vocab_size()} word pieces"
    )
    for group in run.optimizer.param_groups:
        n = sum(p.numel() for p in group["params"])
        rates = f"learning rate {group['base_lr']:.2e}, weight decay {group['weight_decay']:.0e}"
        report.append(f"{rates}: {n:,} parameters")
    candidates = config.batch_size // config.grad_accum
    report.append(f"batch {config.batch_size}, contrastive candidates {candidates}, updates from {run.start}")
    run.open(sampler, lambda row: products[row].name, report)

    # The model that is compiled where that is set, and that averages gradients over processes.
    if config.compile:
        compile_parts(model)
    ddp = processes.distribute(model)

    def validate():
        model.eval()
        task = evaluate.TASKS["fashiongen_retrieval"]
        embedder = evaluate.Embedder(model, task, tokenizer, config, processes)
        result = evaluate.full_gallery(*evaluate.embed_retrieval(embedder, val_products))
        run.end_validation(result.metrics, task.criterion)

    # The earlier run may have ended while it validated.
    if run.validation_due:
        validate()

    for step in run.steps():
        # The batches of this update. A run that was asked to stop, or lost a loader worker, saves and ends here.
        batches = run.next_batches(loader)

        # The objective, the learning rate and dropout follow from the update's number alone.
        objective = objective_of(step)
        run.set_lr(step)
        processes.seed(config.seed, step)
        model.train()

        # Gradients become zeros, not None: a head that an earlier update used and this one does not still moves by its
        # momentum and decays. A head that was never used has no gradient yet. The original does so, and it matters.
        run.optimizer.zero_grad(set_to_none=False)

        for micro, batch in enumerate(batches):
            # One micro-batch goes to the device. For MPFC the image tokenizer adds the codes to predict.
            run.skipped_images += int(batch["skipped"].sum())
            batch = data.to_device(batch, device)
            if objective == "mpfc":
                batch = {**batch, "image_codes": image_tokenizer.encode(batch["image"])}

            # The loss of the whole objective, then its gradients, averaged over processes in the last micro-batch.
            with processes.averaging(ddp, micro == config.grad_accum - 1):
                with processes.autocast(config.dtype):
                    loss, measured = ddp(batch, OBJECTIVES[objective])
                run.scaler.scale(loss / config.grad_accum).backward()
            run.add(objective, loss, measured)

        # The update itself. The scaler divides the gradients by its scale first; only float16 has one.
        run.scaler.step(run.optimizer)
        run.scaler.update()

        # What is due after this update: a log line, a checkpoint, a validation.
        run.end_update(step)
        if run.log_due:
            run.log()
        if run.save_due:
            run.save()
        if run.validation_due:
            validate()

    if processes.is_main and run.metrics:
        print("FashionGen val, full gallery:", "  ".join(f"{k} {100 * v:.1f}" for k, v in run.metrics.items()))
    return run.metrics


if __name__ == "__main__":
    runs.main(PretrainConfig, train, __doc__)
