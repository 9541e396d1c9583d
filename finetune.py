"""Stage 2: fine-tune for one of the five tasks, keep the best checkpoint, evaluate it (FashionViL 3.3).

    CPU, minutes:   python finetune.py configs/demo_finetune.py --task fashioniq --init=runs/demo/best.pt
    one GPU:        python finetune.py --task fashioniq --init=CHECKPOINT --dtype=bfloat16
    four GPUs:      torchrun --nproc_per_node=4 finetune.py --task fashiongen_retrieval --init=CHECKPOINT

--init takes a pre-trained checkpoint (ours or a released one), "pretrained" (plain ResNet + BERT) or "random".
Writes run.json, log.jsonl, last.pt, best.pt and results.json (the full evaluation of the best checkpoint, on the same
part of the data that selected it)."""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import evaluate
from model import RESNETS, SIZES, CSANet, FashionViL, ModelConfig, compile_parts
from plumbing import checkpoint, runs, settings, tables
from plumbing.processes import allow_tf32, copy_from_main
from plumbing.settings import COUNT, FROM_0, MISSING, SHARE, setting

CONFIGS = Path(__file__).parent / "configs"


@dataclass
class FinetuneConfig(runs.RunConfig):
    """Settings of fine-tuning; those of the machine and of the log are in plumbing/runs.py."""

    task: str = setting("", ", ".join(evaluate.TASKS), choices=tuple(evaluate.TASKS), group="task")
    split: str = setting("disjoint", "polyvore: disjoint or nondisjoint", choices=evaluate.SPLITS)
    gallery: str = setting(
        "original", "fashioniq: original (split file), val (references, targets)", choices=evaluate.GALLERIES
    )

    data_root: str = setting("data/datasets", "folder that holds FashionGen/, FashionIQ/, ...", group="data")
    vocab: str = setting(
        "", "vocab.txt or tokenizer.json; empty: that of the weights, DATA_ROOT/vocab.txt or the hub's"
    )
    image_size: int = setting(0, "pixels a side, a multiple of 32; 0: the checkpoint's own, else 224")
    missing: str = setting("stop", MISSING, choices=("stop", "skip"))
    max_tokens: int = setting(0, "longest text; 0: the checkpoint's own, else the paper's 75, for fashioniq 50", FROM_0)

    init: str = setting("pretrained", "a checkpoint with its sizes, pretrained (ResNet, BERT) or random", group="model")
    size: str = setting("base", "Transformer size, a row of model.SIZES", choices=tuple(SIZES))
    resnet: str = setting("resnet50", "resnet18, resnet34 or resnet50", choices=tuple(RESNETS))
    width: int = setting(64, "channels of the ResNet's first stage", COUNT)
    dropout: float = setting(0.1, "dropout of the Transformer", SHARE)
    bert: str = setting("", "BERT folder or hub name, also sets the Transformer's size; empty: bert-base-uncased")
    resnet_file: str = setting("", "torchvision's ResNet weights for --init=pretrained; empty: fetched, random: none")

    # configs/TASK.py, which is read where the command line names no file, has the paper's values of a task.
    batch_size: int = setting(256, "items per update, all processes together", COUNT, group="optimization")
    grad_accum: int = setting(1, "micro-batches per update; contrastive candidates are one micro-batch", COUNT)
    max_steps: int = setting(120_000, "updates", COUNT)
    lr: float = setting(1e-5, "base learning rate", FROM_0)
    lr_factor: float = setting(20.0, "image encoder, projection and heads learn this much faster", FROM_0)
    weight_decay: float = setting(1e-4, "AdamW weight decay", FROM_0)
    warmup: int = setting(15_000, "updates until the full learning rate; 0: none", FROM_0)
    milestones: tuple = setting((45_000, 90_000), "updates at which the learning rate falls to a tenth")


def build_model(config, sizes, task, n_classes=0, n_categories=0):
    """The model of an `evaluate.Task`. sizes: {field of ModelConfig: value} of what it starts from.

    n_classes, n_categories: of the data, for recognition and for OCIR."""
    if task.model is CSANet:
        return CSANet(ModelConfig(**{**sizes, "heads": (), "dropout": config.dropout}), n_categories)
    own = {"heads": task.needs, "n_classes": n_classes, "dropout": config.dropout}
    return FashionViL(ModelConfig(**{**sizes, **own}))


def train(config, processes):
    """The whole stage on this process. Returns {protocol: Result} of the best checkpoint."""
    started = time.perf_counter()
    settings.check_limits(config)
    task, device = evaluate.TASKS[config.task], processes.device
    if task is not evaluate.RECOGNITION:  # the other tasks compare the items of a batch
        data.check_candidates(config)
    torch.manual_seed(config.seed)  # every process starts from the same weights

    # The data come first: where they are missing, nothing is fetched.
    items, data_sizes, labels = task.load_items(config)

    # What the model starts from. A checkpoint brings its image size and text length where the settings have 0.
    start = checkpoint.read_start(config, reads_text=task.model is FashionViL)
    config = evaluate.as_trained(config, start.trained)

    # The model and its first weights. From a checkpoint it takes all but the learned scale and heads of other tasks.
    model, tokenizer = build_model(config, start.sizes, task, **data_sizes), start.tokenizer
    if task.model is FashionViL:
        data.check_lengths(config, model.config.max_position_embeddings, task.max_tokens)
    report = checkpoint.initialise(model, start)
    model.to(device)

    # The bookkeeping: log, checkpoints, stops. It resumes an earlier run where config.resume says so.
    contents = checkpoint.contents(model, config.task, labels, tokenizer)
    run = runs.Run(config, processes, model, contents)

    # The batches of the updates that are left, and the model that averages gradients over processes.
    dataset = data.TrainingSamples(items, tokenizer, task.fit, config, config.max_tokens or task.max_tokens, task.pick)
    sampler = data.BatchSampler(len(items), config, processes, run.start, lambda step: config.task)
    loader = iter(data.train_loader(dataset, sampler, config, device))
    if config.compile:
        compile_parts(model)
    ddp = processes.distribute(model)
    run.open(sampler, lambda row: items[row]["name"], [f"{config.task}: {len(items)} training items", *report])

    def validate():
        model.eval()
        _, result = next(evaluate.run_task(model, tokenizer, config, processes))  # the first protocol selects best.pt
        run.end_validation(result.metrics, task.criterion)

    # The earlier run may have ended while it validated.
    if run.validation_due:
        validate()

    for step in run.steps():
        # The batches of this update. A run that was asked to stop, or lost a loader worker, saves and ends here.
        batches = run.next_batches(loader)

        # The learning rate and dropout follow from the update's number alone.
        run.set_lr(step)
        processes.seed(config.seed, step)
        model.train()
        run.optimizer.zero_grad()  # to None; in pre-training zeros matter for heads that an update does not use

        for micro, batch in enumerate(batches):
            # The loss of one micro-batch, then its gradients, averaged over processes in the last micro-batch.
            run.skipped_images += int(batch["skipped"].sum())
            batch = data.to_device(batch, device)
            with processes.averaging(ddp, micro == config.grad_accum - 1):
                with processes.autocast(config.dtype):
                    loss, measured = ddp(batch, task.objective)
                run.scaler.scale(loss / config.grad_accum).backward()
            run.add("", loss, measured)

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

    # The best checkpoint is evaluated as evaluate.py does it, in exact float32. Machines may not share a disk, so the
    # main process alone reads the file. The others get its weights.
    if config.eval_interval < 0:  # without validations there is no best checkpoint
        return {}
    allow_tf32(False)
    config = dataclasses.replace(config, dtype="float32")
    if processes.is_main:
        model.load_state_dict(checkpoint.read_weights(run.folder / "best.pt")[0])
    copy_from_main(model.state_dict().values())
    model.eval()
    results = dict(evaluate.run_task(model, tokenizer, config, processes))
    if processes.is_main:
        best, file, seconds = run.folder / "best.pt", run.folder / "results.json", time.perf_counter() - started
        tables.report(results, config, device, best, file, seconds)
    return results


def config_file(given):
    """The file that is read where the command line names none: configs/<task>.py."""
    return CONFIGS / f"{given['task']}.py" if given.get("task") in evaluate.TASKS else None


if __name__ == "__main__":
    runs.main(FinetuneConfig, train, __doc__, config_file)
