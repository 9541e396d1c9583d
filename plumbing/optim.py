"""The optimizer: learning rates, their course over a run, and the groups of parameters."""

import torch


def lr_multiplier(n, warmup, milestones, warmup_factor=0.25):
    """Factor on every learning rate with `n` updates done. Source: docs/recipe.md "Optimizer and schedule".

    It grows linearly from `warmup_factor` to 1 at update `warmup`, then falls to a tenth at each milestone."""
    if n < warmup:
        return warmup_factor * (1 - n / warmup) + n / warmup
    return 0.1 ** sum(n >= milestone for milestone in milestones)


def is_fast(name):
    """Whether a parameter learns `lr_factor` times faster: those of the image encoder, the projection and the heads.

    MLM's decoder is the word table, whose name is BERT's, so it learns at the base rate. So does logit_scale."""
    return name.startswith(("image_encoder.", "heads.", "bert.embeddings.projection."))


def has_decay(name):
    """Whether weight decay acts on a parameter: on all but biases and LayerNorms of Transformer and heads.

    The image encoder's BatchNorms do decay, as in the original's optimizer."""
    return name.startswith("image_encoder.") or not (name.endswith(".bias") or "LayerNorm" in name)


def parameter_groups(model, lr, weight_decay, lr_factor=1.0):
    """AdamW's groups, every trainable parameter in exactly one: fast or base rate, with or without decay."""
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = lr * lr_factor if is_fast(name) else lr
        decay = weight_decay if has_decay(name) else 0.0
        group = groups.setdefault((rate, decay), {"params": [], "base_lr": rate, "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def make_optimizer(model, lr, weight_decay, lr_factor=1.0):
    """torch's fused AdamW over `parameter_groups`, betas (.9, .999), eps 1e-8."""
    return torch.optim.AdamW(parameter_groups(model, lr, weight_decay, lr_factor), eps=1e-8, fused=True)


def set_lr(optimizer, n, warmup, milestones):
    """Set the learning rate of every group for the update that follows `n` finished ones."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * lr_multiplier(n, warmup, milestones)
