"""Stage 2: fine-tune for one of the five tasks, keep the best checkpoint, evaluate it (recipe 4, 5).

    CPU, minutes:   python finetune.py configs/demo_finetune.py --task fashioniq --init=runs/demo/best.pt
    one GPU:        python finetune.py --task fashioniq --init=CHECKPOINT --dtype=bfloat16
    four GPUs:      torchrun --nproc_per_node=4 finetune.py --task fashiongen_retrieval --init=CHECKPOINT

--init takes a pre-trained checkpoint (ours or a released one), "pretrained" (plain ResNet + BERT) or "random".
Writes run.json, log.jsonl, last.pt, best.pt and results.json (the best checkpoint's full evaluation)."""

import contextlib
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import annotations
import checkpoint
import common
import data
import evaluate
import losses
import runs
import settings
from model import RESNETS, SIZES, CSANet, FashionViL, ModelConfig
from settings import STRIDE, InputError, ModelTrainConfig, setting

CONFIGS = Path(__file__).parent / "configs"


@dataclass
class FinetuneConfig(ModelTrainConfig):
    """Settings of fine-tuning. Without a config file, configs/<task>.py is read."""

    task: str = setting("", "fashiongen_retrieval, fashioniq, fashiongen_category, fashiongen_subcategory or polyvore")
    split: str = setting("disjoint", "polyvore: disjoint or nondisjoint")
    gallery: str = setting("original", "fashioniq: original (split file) or val (references and targets)")


# Each also reads what the validation will: a fault in it must not wait for the first validation.


def retrieval_items(config):
    annotations.has_subcategories(annotations.load_products(config.data_root, "FashionGen", "val"))
    return [
        {"image": p.images, "text": p.text, "name": p.name}
        for p in annotations.load_products(config.data_root, "FashionGen", "train")
    ], {}


def fashioniq_items(config):
    """One item per training triplet of the three classes: reference, target, both captions; no data sizes."""
    keys = ("image", "image2", "text", "name")
    for garment in annotations.FASHIONIQ_CLASSES:
        annotations.load_fashioniq(config.data_root, garment, "val", config.gallery)
    classes = (
        annotations.load_fashioniq(config.data_root, c, "train", "val")[0] for c in annotations.FASHIONIQ_CLASSES
    )
    return [{key: query[key] for key in keys} for queries in classes for query in queries], {}


def recognition_items(config):
    """Training items, and as many classes as training and validation labels need."""
    key = annotations.RECOGNITION_LABELS[config.task]
    train, val = (annotations.load_products(config.data_root, "FashionGen", split) for split in ("train", "val"))
    items = [{"image": p.images, "text": p.text, "label": getattr(p, key), "name": p.name} for p in train]
    return items, {"n_classes": annotations.count_labels([*train, *val], key)}


def polyvore_items(config):
    """One item per distinct outfit: its questions with their blank, whichever item the row asks for."""
    outfits, n_categories = annotations.load_polyvore(config.data_root, config.split, "train")
    annotations.load_polyvore(config.data_root, config.split, "test")
    whole = {frozenset([*o["items"], o["blank_item"]]): o["name"] for o in outfits}
    return [{"items": sorted(items), "name": name} for items, name in whole.items()], {"n_categories": n_categories}


# task: loss, heads of the model (none: CSA-Net), training items, how a visit draws from an item, image transform,
# longest text
RECOGNITION = (losses.recognition, ("recognition",), recognition_items, data.pick_image, "crop", data.MAX_TOKENS)
TASKS = {
    "fashiongen_retrieval": (losses.itc, ("contrastive",), retrieval_items, data.pick_image, "crop", data.MAX_TOKENS),
    "fashioniq": (losses.tgir, ("contrastive",), fashioniq_items, None, "scale", data.FASHIONIQ_MAX_TOKENS),
    "fashiongen_category": RECOGNITION,
    "fashiongen_subcategory": RECOGNITION,
    "polyvore": (losses.ocir, (), polyvore_items, data.pick_pair, "scale", data.MAX_TOKENS),
}


def build_model(config, heads, vocab_size, n_classes=0, n_categories=0):
    """The task's model, sized as the --init checkpoint is, else by the config's own settings."""
    if config.init in ("random", "pretrained"):
        sizes = checkpoint.bert_sizes(config.bert) if Path(config.bert, "config.json").exists() else SIZES[config.size]
        model_config = ModelConfig(resnet=config.resnet, width=config.width, **{**sizes, "vocab_size": vocab_size})
    else:
        model_config = checkpoint.model_config(config.init)
    model_config = dataclasses.replace(model_config, heads=heads, n_classes=n_classes, dropout=config.dropout)
    return FashionViL(model_config) if heads else CSANet(model_config, n_categories)


def check_config(config):
    """Raise InputError for a task that does not exist or sizes that none has."""
    settings.check_limits(config)
    if config.task not in TASKS:
        raise InputError(f"task: found {config.task!r}, expected one of {', '.join(TASKS)}")
    if config.size not in SIZES:
        raise InputError(f"size: found {config.size!r}, expected one of {', '.join(SIZES)}")
    if config.resnet not in RESNETS:
        raise InputError(f"resnet: found {config.resnet!r}, expected one of {', '.join(RESNETS)}")
    if config.image_size < STRIDE or config.image_size % STRIDE:
        raise InputError(f"image_size: found {config.image_size}, expected a multiple of {STRIDE}")


def train(config, processes):
    """The whole stage on this process. Returns {protocol: result} of the best checkpoint."""
    check_config(config)
    main, device = processes.is_main, processes.device
    run_dir = Path(config.out_dir)
    objective, heads, load_items, draw, kind, max_tokens = TASKS[config.task]
    run_protocol, criterion, *_ = evaluate.PROTOCOLS[config.task]
    torch.manual_seed(config.seed)  # every process starts from the same weights

    items, data_sizes = load_items(config)
    vocab = checkpoint.vocabulary(config, config.init)
    tokenizer = data.wordpiece(vocab)
    model = build_model(config, heads, tokenizer.get_vocab_size(), **data_sizes)
    if heads:
        data.check_lengths(config, model.config.max_position_embeddings, max_tokens)
    report = checkpoint.initialise(model, config.init, bert=config.bert, resnet=config.resnet_file)
    model.to(device)
    optimizer = common.make_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")

    start, best, totals, health = 0, -1.0, {}, runs.Health(device)
    state = checkpoint.find_resume(config.resume, run_dir, model)
    if state is not None:
        report += checkpoint.restore(state, config, model, optimizer, scaler)
        start, best, totals = state["step"], state["best"], runs.own_part(state, processes).get("totals", {})
        health.skipped_updates = state.get("skipped_updates", 0)
    common.same_everywhere("resume", f"a start at update {start}", "the run folder must be the same on every node")

    transform = data.image_transform(kind, config.image_size, train=True)
    dataset = data.Samples(items, tokenizer, transform, config.max_tokens or max_tokens, draw, config.seed)
    batches = data.Batches(len(items), config, processes, start, lambda step: config.task)
    loader = iter(data.train_loader(dataset, batches, config, device))
    if config.compile:
        model.image_encoder.compile()
    # The retrieval losses never touch BERT's pooler; DDP must not wait for its gradient.
    ddp = DistributedDataParallel(model, find_unused_parameters=True) if processes.world_size > 1 else model

    if main:
        runs.open_run(config, start)
        print(f"{config.task}: {len(items)} training items", *report, sep="\n")

    def save(name, step, **more):
        state = {
            "kind": "fashionvil" if heads else "csa_net",
            "task": config.task,
            "model": model.state_dict(),
            "model_config": dataclasses.asdict(model.config),
            **data_sizes,
            "config": dataclasses.asdict(config),
            "vocab": vocab,
            "step": step,
            "best": best,
            **more,
        }
        checkpoint.save(run_dir / name, state)

    def name_of(index):
        return items[index]["name"]

    logged, stop = start, runs.StopSignals()
    clock, bar = time.perf_counter(), tqdm(range(start, config.max_steps), disable=not main, initial=start)
    for step in bar:
        common.set_lr(optimizer, step, config)
        common.seed_step(config.seed, step, processes.rank)
        model.train()
        optimizer.zero_grad()
        update_loss = 0.0
        for micro in range(config.grad_accum):
            batch = data.to_device(next(loader), device)
            last = micro == config.grad_accum - 1
            with contextlib.nullcontext() if last or ddp is model else ddp.no_sync():
                with common.autocast(device, config.dtype):
                    loss, measured = ddp(batch, objective)
                scaler.scale(loss / config.grad_accum).backward()
            update_loss = update_loss + loss.detach() / config.grad_accum
            for key, value in {"loss": loss.detach(), **measured, "updates": 1}.items():
                totals[key] = totals.get(key, 0) + value / config.grad_accum
        health.step(step, update_loss, optimizer, scaler)

        done, stopping = step + 1, common.any_process(bool(stop.asked))
        logging, validating, saving = runs.due(config, done, stopping)
        if logging or saving:
            health.check(optimizer, config, batches, name_of)
        if logging:
            row = {"step": done, "lr": max(group["lr"] for group in optimizer.param_groups)}
            row |= runs.mean_of_updates(totals, device)
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            row["samples_per_s"] = config.batch_size * (done - logged) / seconds
            logged = done
            row["memory_gb"] = runs.peak_memory_gb(device)
            if scaler.is_enabled():
                row["skipped_updates"] = health.skipped_updates
            totals.clear()
            if main:
                runs.append_log(run_dir / "log.jsonl", row)
                bar.set_postfix(loss=f"{row['loss']:.3f}")
        pause = time.perf_counter()
        if saving:
            common.check_weights(model, done)
        if validating:
            model.eval()
            metrics = next(iter(run_protocol(model, tokenizer, config, processes).values()))["metrics"]
            if main:
                runs.append_log(run_dir / "log.jsonl", {"step": done, **{f"val_{k}": v for k, v in metrics.items()}})
                bar.write(f"step {done}: {criterion} {100 * metrics[criterion]:.1f} %")
            if metrics[criterion] > best:
                best = metrics[criterion]
                if main:
                    save("best.pt", done)
        if saving:
            parts = common.gather_objects({"totals": runs.as_values(totals)})
            if main:
                state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "parts": parts}
                save("last.pt", done, **state, skipped_updates=health.skipped_updates)
            clock += time.perf_counter() - pause  # speed is that of training
        if stopping and done < config.max_steps:
            stop.restore()
            raise common.Stopped(f"stopped after update {done}, {run_dir / 'last.pt'}; --resume=auto goes on")
    stop.restore()

    if config.eval_interval < 0:
        return {}
    if main:  # the one that has surely the file
        model.load_state_dict(checkpoint.read(run_dir / "best.pt")["model"])
    common.copy_from_main(model.state_dict().values())
    model.eval()
    return run_protocol(model, tokenizer, config, processes)


def main():
    config = settings.load_config(
        FinetuneConfig,
        description=__doc__,
        files=lambda given: CONFIGS / f"{given['task']}.py" if given.get("task") in TASKS else None,
    )
    check_config(config)
    if config.out_dir.endswith("finetune"):  # named after the config file: one folder a task
        config.out_dir += f"_{config.task}"
    processes = common.start_processes(config.device, config.deterministic)
    started = time.perf_counter()
    results = train(config, processes)
    if processes.is_main and results:
        path = Path(config.out_dir, "best.pt")
        out = Path(config.out_dir, "results.json")
        evaluate.report(results, config, path, out, time.perf_counter() - started)


if __name__ == "__main__":
    common.run(main)
