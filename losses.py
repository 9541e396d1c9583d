"""The objectives, exact. At the top pure mathematics; below it one function per objective and the tables of them.

An objective is `(model, batch) -> (loss, metrics)`. Batches are dicts of tensors and are never edited. A loss is this
process's share: its mean over processes is the loss of the global batch, which is what DDP's averaging makes of the
gradients too. Metrics are detached scalars under the same rule, read only when logged."""

import torch
import torch.nn.functional as F

from common import all_mean, gather_with_gradient

IGNORE = -100  # label of a token about which nothing is asked


def info_nce(queries, candidates, rank=0):
    """One-way InfoNCE: row i of queries (B, D) should pick row `rank * B + i` of candidates (N >= B, D), both scaled.

    Returns the mean loss in nats and the share of queries (0..1) that pick right.
    Raises ValueError where the shapes cannot belong together."""
    B = len(queries)
    if queries.shape[1] != candidates.shape[1] or len(candidates) < (rank + 1) * B:
        raise ValueError(
            f"queries {tuple(queries.shape)} and candidates {tuple(candidates.shape)} do not fit, rank {rank}"
        )
    with torch.autocast(queries.device.type, enabled=False):
        logits = queries @ candidates.t()  # (B, N)
        target = torch.arange(rank * B, (rank + 1) * B, device=logits.device)
        return F.cross_entropy(logits, target), (logits.argmax(1) == target).float().mean()


def one_way(queries, candidates):
    """InfoNCE of queries (B, D) against the candidates of all processes, with gradient -> (loss, accuracy)."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return info_nce(queries, gather_with_gradient(candidates), rank)


def symmetric(a, b):
    """Mean of both directions of `one_way`; a and b (B, D) are already scaled (FashionViL 3.2, ITC)."""
    loss_ab, acc_ab = one_way(a, b)
    loss_ba, acc_ba = one_way(b, a)
    return (loss_ab + loss_ba) / 2, (acc_ab + acc_ba) / 2


def global_mean(values, weights=None):
    """Sum of values (n,) over the global count: n, or the sum of weights (n,), over all processes, and at least 1.

    This process's share: the mean of it over processes is the mean over everything asked anywhere, so the number of
    processes changes neither loss nor gradient."""
    count = values.new_tensor(float(len(values))) if weights is None else weights.sum()
    total = values.sum() if weights is None else (values * weights).sum()
    return total / all_mean(count).clamp(min=1 / _world_size())


def _world_size():
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def soft_cross_entropy(logits, labels):
    """-sum(labels * log_softmax(logits)) per row of (B, A); labels weigh 1 in all, or 0 where nothing is known."""
    return -(labels * F.log_softmax(logits.float(), dim=-1)).sum(-1)


def hardest_negatives(image, text, product_id, pool=0):
    """For each image (B, D) the index (B,) of the most similar text (B, D) of *another* product, and whether one is.

    Both sides scaled; product_id (B,) int64. Texts of the same product are out of question (recipe 2, ITM). Where
    `pool` is not 0, so are texts of another stretch of `pool` rows: the fewer to choose from, the easier the pairs."""
    similarity = image @ text.t()
    out = product_id[:, None] == product_id[None, :]
    if pool:
        stretch = torch.arange(len(image), device=image.device) // pool
        out = out | (stretch[:, None] != stretch[None, :])
    return similarity.masked_fill(out, float("-inf")).argmax(1), ~out.all(1)


# ---------------------------------------------------------------------------------------------------------------------
# the six objectives of pre-training


def itc(model, batch):
    """Image-text contrastive learning; also the loss of fine-tuning for retrieval.

    batch: image (B, 3, H, W), input_ids and attention_mask (B, T). Candidates come from all processes.
    Returns the symmetric InfoNCE in nats and {"itc_acc"}. Source: FashionViL 3.2 (ITC)."""
    image = model.scaled(model.encode_image(batch["image"]))
    text = model.scaled(model.encode_text(batch["input_ids"], batch["attention_mask"]))
    loss, accuracy = symmetric(image, text)
    return loss, {"itc_acc": accuracy.detach()}


@torch.no_grad()
def mine_negatives(model, features, batch):
    """The ITM pairing of a batch: (text index (B,), target (B,) with 1 = matched), no gradient and no dropout.

    features (B, P, C) are this step's own; batch["itm_draws"] (B,) uniform in 0..1: above .5 the hardest other text
    of this process's batch takes the text's place. Where every text is of the same product, the pair stays."""
    training = model.bert.training
    model.bert.eval()  # the similarities that mine are those of the model without dropout
    image = model.scaled(model.encode_image(features))
    text = model.scaled(model.encode_text(batch["input_ids"], batch["attention_mask"]))
    model.bert.train(training)
    hardest, exists = hardest_negatives(image, text, batch["product_id"], model.config.itm_candidates)
    replace = (batch["itm_draws"] > 0.5) & exists
    return torch.where(replace, hardest, torch.arange(len(hardest), device=hardest.device)), (~replace).long()


def itm(model, batch):
    """Image-text matching with hard negatives mined inside this process's batch, or given.

    batch as `itc`, product_id (B,) int64, and itm_draws (B,), or itm_text and itm_target (B,) int64 to skip mining.
    Returns the mean cross-entropy and {"itm_acc", "itm_matched"}: 0..1. Source: FashionViL 3.2 (ITM)."""
    features = model.patches(batch["image"])  # one image forward serves mining and matching
    text, target = (
        (batch["itm_text"], batch["itm_target"]) if "itm_text" in batch else mine_negatives(model, features, batch)
    )
    pooled = model.encode_pair(batch["input_ids"][text], batch["attention_mask"][text], features)
    logits = model.heads["itm"](pooled).float()
    accuracy = (logits.argmax(1) == target).float().mean()
    return F.cross_entropy(logits, target), {"itm_acc": accuracy, "itm_matched": target.float().mean()}


def mlm(model, batch):
    """Masked language modelling on text + whole image.

    batch: image, masked_ids, attention_mask (B, T), mlm_labels (B, T) int64 with -100 where nothing is asked.
    Returns the mean loss in nats per asked token of all processes, and {"mlm_acc"}.
    Raises ValueError where no token of the batch is asked. Source: FashionViL 3.2 (MLM); BERT's 80/10/10 over words."""
    asked = batch["mlm_labels"] != IGNORE
    if not bool(asked.any()):
        raise ValueError("mlm: no token of the batch is asked; every label is -100")
    features = model.patches(batch["image"])
    everywhere = F.pad(asked, (0, features.shape[1]))  # (B, T + P)
    hidden = model.encode_joint(batch["masked_ids"], batch["attention_mask"], features, asked=everywhere)
    logits = model.heads["mlm"](hidden[:, : asked.shape[1]][asked])  # (asked, vocabulary)
    return _classify(logits, batch["mlm_labels"][asked], "mlm")


def mpfc(model, batch):
    """Masked patch feature classification: the image tokenizer's code of each masked patch.

    batch: image, input_ids, attention_mask, patch_mask (B, P) bool with True = masked, image_codes (B, P) int64.
    Returns the mean loss in nats per masked patch of all processes, and {"mpfc_acc"}.
    Raises ValueError where nothing is masked or the codes' grid is another. Source: FashionViL 3.2 (MPFC)."""
    mask, codes = batch["patch_mask"], batch["image_codes"]
    if mask.shape != codes.shape or not bool(mask.any()):
        raise ValueError(f"mpfc: patch_mask {tuple(mask.shape)}, codes {tuple(codes.shape)}, {int(mask.sum())} masked")
    ids, T = batch["input_ids"], batch["input_ids"].shape[1]
    hidden = model.encode_joint(ids, batch["attention_mask"], batch["image"], mask, asked=F.pad(mask, (T, 0)))
    logits = model.heads["mpfc"](hidden[:, T:][mask])  # (masked, codes)
    return _classify(logits, codes[mask], "mpfc")


def _classify(logits, target, name):
    """Cross-entropy and accuracy of logits (n, classes) against target (n,), over all processes' n."""
    loss = global_mean(F.cross_entropy(logits.float(), target, reduction="none"))
    return loss, {f"{name}_acc": global_mean((logits.argmax(1) == target).float())}


def mvc(model, batch):
    """Multi-view contrastive learning (`icc` in the original's code).

    batch: image (view 0), image2 (view 1), input_ids, attention_mask (B, T), text_drop (B, T) and patch_drop (B, P)
    bool, True = left out of attention and mean. View 0's embedding against view 1 composed with the text.
    Returns the symmetric InfoNCE in nats and {"mvc_acc"}. Source: FashionViL 3.2 (MVC)."""
    image = model.scaled(model.encode_image(batch["image"]))
    mask = batch["attention_mask"] * ~batch["text_drop"]
    composed = model.encode_composed(batch["input_ids"], mask, batch["image2"], ~batch["patch_drop"])
    loss, accuracy = symmetric(image, model.scaled(composed))
    return loss, {"mvc_acc": accuracy.detach()}


def pac(model, batch):
    """Pseudo-attribute classification of both modalities by one cosine head.

    batch as `itc`, attributes (B, A) float: a product's attributes share weight 1; all 0 = none known, left out.
    Returns image term + text term (at least 5.7 each over 2232 attributes, for cosines stay in [-1, 1]) and
    {"pac_recall"}: the share of the label weight among the head's five best. Source: FashionViL 3.2 (PAC)."""
    labels = batch["attributes"]
    known = (labels.sum(1) > 0).float()
    text = model.encode_text(batch["input_ids"], batch["attention_mask"])
    loss, recall = 0.0, 0.0
    for embedding in (model.encode_image(batch["image"]), text):
        logits = model.heads["pac"](embedding)
        loss = loss + global_mean(soft_cross_entropy(logits, labels), known)
        best = labels.gather(1, logits.topk(min(5, logits.shape[1]), dim=1).indices).sum(1)
        recall = recall + global_mean(best, known) / 2
    return loss, {"pac_recall": recall}


OBJECTIVES = {"itc": itc, "itm": itm, "mlm": mlm, "mpfc": mpfc, "mvc": mvc, "pac": pac}


# ---------------------------------------------------------------------------------------------------------------------
# fine-tuning


def tgir(model, batch):
    """Text-guided image retrieval: the composed reference against the targets of all processes, one way.

    batch: image (reference), image2 (target), input_ids and attention_mask (B, T).
    Returns the InfoNCE in nats and {"tgir_acc"}. Source: FashionViL 3.3 (TGIR), batch-based classification."""
    composed = model.encode_composed(batch["input_ids"], batch["attention_mask"], batch["image"])
    target = model.encode_image(batch["image2"])
    loss, accuracy = one_way(model.scaled(composed), model.scaled(target))
    return loss, {"tgir_acc": accuracy}


def recognition(model, batch):
    """Category or sub-category recognition from image + text.

    batch as `itc` and label (B,) int64. Returns the mean cross-entropy and {"recognition_acc"}.
    Source: FashionViL 3.3 (CR, SCR)."""
    logits = model.classify(batch)
    accuracy = (logits.argmax(1) == batch["label"]).float().mean()
    return F.cross_entropy(logits, batch["label"]), {"recognition_acc": accuracy}


def ocir(model, batch):
    """Outfit complementary item retrieval: a fused outfit item against the outfit's missing item.

    batch: image (question item), image2 (blank), category and wanted (B,) int64.
    Returns the symmetric InfoNCE in nats and {"ocir_acc"}. Source: FashionViL 3.3 (OCIR); CSA-Net."""
    question = model.encode_query(batch["image"], batch["category"], batch["wanted"])
    loss, accuracy = symmetric(question, model.scaled(model.encode_item(batch["image2"])))
    return loss, {"ocir_acc": accuracy.detach()}
