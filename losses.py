"""The losses, exact: the maths, then what is compared over all processes, then one function per objective.

An objective is `(model, batch) -> (loss, metrics)`. Batches are dicts of tensors and are never edited. Metrics are
detached scalars. With several processes each has its own rows of the global batch. DDP averages their gradients, so
every process returns a loss whose mean over the processes is the loss of the global batch, and metrics likewise."""

import torch
import torch.nn.functional as F

from plumbing.processes import all_mean, gather_with_gradient, rank, world_size
from plumbing.settings import NO_LABEL


# ---- the maths: these know other processes only by their arguments ---------------------------------------------------
def info_nce(queries, candidates, rank=0):
    """One-way InfoNCE: row i of queries (B, D) should pick row `rank * B + i` of candidates (N >= B, D), both scaled.

    Returns the mean loss in nats and the share of queries (0..1) that pick right.
    Raises ValueError where the shapes cannot belong together."""
    B = len(queries)
    if queries.shape[1] != candidates.shape[1] or len(candidates) < (rank + 1) * B:
        raise ValueError(f"queries {tuple(queries.shape)}, candidates {tuple(candidates.shape)}: no fit at rank {rank}")
    with torch.autocast(queries.device.type, enabled=False):
        logits = queries @ candidates.t()  # (B, N)
        target = torch.arange(rank * B, (rank + 1) * B, device=logits.device)
        return F.cross_entropy(logits, target), (logits.argmax(1) == target).float().mean()


def soft_cross_entropy(logits, labels):
    """-sum(labels * log_softmax(logits)) per row of (B, A); a row of labels sums to 1, or to 0 where none is known."""
    return -(labels * F.log_softmax(logits.float(), dim=-1)).sum(-1)


def hardest_negatives(image, text, input_ids, n_candidates=0):
    """For each image (B, D) the row (B,) of the most similar text (B, D) of *other* words, and whether one exists.

    Both sides scaled; input_ids (B, T) int64 of the texts. n_candidates: only texts of the same block of that many rows
    count. A short run needs such easier negatives; 0: all rows. Source: docs/recipe.md "ITM"."""
    similarity = image @ text.t()
    excluded = (input_ids[:, None] == input_ids[None, :]).all(2)  # (B, B): the own text, and other products' like it
    if n_candidates:
        block = torch.arange(len(image), device=image.device) // n_candidates
        excluded = excluded | (block[:, None] != block[None, :])
    return similarity.masked_fill(excluded, float("-inf")).argmax(1), ~excluded.all(1)


# ---- over all processes: all that the losses send to each other is in these three functions --------------------------
def one_way(queries, candidates):
    """InfoNCE of queries (B, D) against the candidates of all processes, with gradient -> (loss, accuracy)."""
    return info_nce(queries, gather_with_gradient(candidates), rank())


def symmetric(a, b):
    """Mean of both directions of `one_way`; a and b (B, D) are scaled. Source: FashionViL 3.2; docs/recipe.md "ITC"."""
    loss_ab, acc_ab = one_way(a, b)
    loss_ba, acc_ba = one_way(b, a)
    return (loss_ab + loss_ba) / 2, (acc_ab + acc_ba) / 2


def global_mean(values, weights=None):
    """The mean of values (n,) over all processes, as a loss that DDP may average; weights (n,) 0 or 1 leave rows out.

    Process p has the sum S_p of n_p values, and n_p differs. It returns S_p / mean(n). The mean over processes,
    mean(S) / mean(n), is sum(S) / sum(n): the mean over all values. A sum(n) of 0 is taken as 1."""
    weights = torch.ones_like(values) if weights is None else weights
    mean_count = all_mean(weights.sum()).clamp(min=1 / world_size())
    return (values * weights).sum() / mean_count


# ---- the six objectives of pre-training ------------------------------------------------------------------------------
def itc(model, batch):
    """Image-text contrastive learning; also the loss of fine-tuning for retrieval.

    batch: image (B, 3, H, W), input_ids and attention_mask (B, T). Candidates come from all processes.
    Returns the symmetric InfoNCE in nats and {"itc_acc"}. Source: FashionViL 3.2; docs/recipe.md "ITC"."""
    image = model.scaled(model.encode_image(batch["image"]))
    text = model.scaled(model.encode_text(batch["input_ids"], batch["attention_mask"]))
    loss, accuracy = symmetric(image, text)
    return loss, {"itc_acc": accuracy}


@torch.no_grad()
def mine_negatives(model, features, batch):
    """Choose the text of each pair for ITM: the rows of the texts (B,) int64, and target (B,) int64, 1 = matched.

    features (B, P, C) are this update's own; batch["itm_draws"] (B,) uniform in 0..1: above .5 the hardest text of
    other word pieces takes the place of the own text. Where there is none, the pair stays. No gradient, no dropout."""
    was_training = model.bert.training
    model.bert.eval()  # similarities without dropout
    image = model.scaled(model.encode_image(features))
    text = model.scaled(model.encode_text(batch["input_ids"], batch["attention_mask"]))
    model.bert.train(was_training)
    torch.clear_autocast_cache()  # copies of weights without gradient, which `match_pairs` must not take
    hardest, exists = hardest_negatives(image, text, batch["input_ids"], model.config.itm_candidates)
    replaced = (batch["itm_draws"] > 0.5) & exists
    own = torch.arange(len(hardest), device=hardest.device)
    return torch.where(replaced, hardest, own), (~replaced).long()


def match_pairs(model, features, batch, text_rows, target):
    """ITM of given pairs: image row i, as features (B, P, C), with text row text_rows[i]; target (B,) 1 = matched.

    Returns the mean cross-entropy and {"itm_acc", "itm_matched"}: 0..1, the second the share of matched pairs."""
    input_ids, attention_mask = batch["input_ids"][text_rows], batch["attention_mask"][text_rows]
    logits = model.heads["itm"](model.encode_pair(input_ids, attention_mask, features)).float()
    accuracy = (logits.argmax(1) == target).float().mean()
    return F.cross_entropy(logits, target), {"itm_acc": accuracy, "itm_matched": target.float().mean()}


def itm(model, batch):
    """Image-text matching with hard negatives from this process's own batch; returns what `match_pairs` returns.

    batch as `itc`, itm_draws (B,). Source: FashionViL 3.2; docs/recipe.md "ITM"."""
    features = model.patches(batch["image"])  # one image forward serves mining and matching
    return match_pairs(model, features, batch, *mine_negatives(model, features, batch))


def _loss_of_targets(head, hidden, labels, index, name):
    """Cross-entropy and accuracy of head(hidden) at the n targets, over the n of all processes.

    hidden (B, L, D), labels (B, L) int64, index (n,) int64: the places of the targets in the flattened labels. They
    come with the batch, because finding them in a mask on a GPU would make the CPU wait once more."""
    if not len(index):
        raise ValueError(f"{name}: no token or patch of the batch is a target")
    logits, target = head(hidden.flatten(0, 1)[index]).float(), labels.flatten()[index]  # (n, classes), (n,)
    loss = global_mean(F.cross_entropy(logits, target, reduction="none"))
    return loss, {f"{name}_acc": global_mean((logits.argmax(1) == target).float())}


def mlm(model, batch):
    """Masked language modelling on text + whole image.

    batch: image, masked_ids, attention_mask (B, T), mlm_labels (B, T) int64 with -100 where a token is no target,
    mlm_targets (n,) int64: the places of the n targets in the flattened mlm_labels.
    Returns the mean loss in nats per target token of all processes, and {"mlm_acc"}.
    Raises ValueError where no token of the batch is a target. Source: FashionViL 3.2; docs/recipe.md "MLM"."""
    labels, mask = batch["mlm_labels"], batch["attention_mask"]
    text, _ = model.encode_joint(batch["masked_ids"], mask, batch["image"], read_text=labels != NO_LABEL)
    return _loss_of_targets(model.heads["mlm"], text, labels, batch["mlm_targets"], "mlm")


def mpfc(model, batch):
    """Masked patch feature classification: predict the image tokenizer's code of each masked patch.

    batch: image, input_ids, attention_mask, patch_mask (B, P) bool with True = masked, image_codes (B, P) int64,
    mpfc_targets (n,) int64: the places of the n masked patches in the flattened patch_mask.
    Returns the mean loss in nats per masked patch of all processes, and {"mpfc_acc"}.
    Raises ValueError where nothing is masked or the codes' grid is another. Source: docs/recipe.md "MPFC"."""
    masked, codes = batch["patch_mask"], batch["image_codes"]
    if masked.shape != codes.shape:
        raise ValueError(f"mpfc: patch_mask {tuple(masked.shape)}, codes {tuple(codes.shape)}")
    features = model.patches(batch["image"]).masked_fill(masked.unsqueeze(-1), 0.0)  # before the projection
    _, patches = model.encode_joint(batch["input_ids"], batch["attention_mask"], features, read_patches=masked)
    return _loss_of_targets(model.heads["mpfc"], patches, codes, batch["mpfc_targets"], "mpfc")


def mvc(model, batch):
    """Multi-view contrastive learning (`icc` in the original's code).

    batch: image (view 0), image2 (view 1), input_ids, attention_mask (B, T), text_keep (B, T) and patch_keep (B, P)
    bool, False = left out of attention; such a patch does not count in the mean either. View 0 is compared with view 1
    composed with text.
    Returns the symmetric InfoNCE in nats and {"mvc_acc"}. Source: docs/recipe.md "MVC"."""
    image = model.scaled(model.encode_image(batch["image"]))
    kept = batch["attention_mask"] * batch["text_keep"]
    composed = model.encode_composed(batch["input_ids"], kept, batch["image2"], batch["patch_keep"])
    loss, accuracy = symmetric(image, model.scaled(composed))
    return loss, {"mvc_acc": accuracy}


def pac(model, batch):
    """Pseudo-attribute classification of both modalities by one cosine head.

    batch as `itc`, attributes (B, A) float: a product's attributes share weight 1; all 0 = none known, left out.
    Returns image term + text term, and {"pac_recall"}: the share of the label weight among the head's five best. The
    logits are cosines, so a term over 2232 attributes cannot fall below log(1 + 2231 e^-2) = 5.7: judge PAC by its
    recall. Source: docs/recipe.md "PAC"."""
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


# A new objective needs a function here, a probability in --objectives, and what `data.Pretraining.sample` adds for it.
# A new head needs its name in model.PRETRAINING_HEADS or HEADS, its layers in FashionViL, and the tensor that tells its
# size in checkpoint.SIZE_OF. tools/summary.py reads an objective's accuracy as NAME_acc (of PAC pac_recall).
OBJECTIVES = {"itc": itc, "itm": itm, "mlm": mlm, "mpfc": mpfc, "mvc": mvc, "pac": pac}


# ---- fine-tuning -----------------------------------------------------------------------------------------------------
def tgir(model, batch):
    """Text-guided image retrieval: the reference, changed by the text, against the targets of all processes, one way.

    batch: image (reference), image2 (target), input_ids and attention_mask (B, T). Returns the InfoNCE in nats and
    {"tgir_acc"}. Source: FashionViL 3.3; docs/recipe.md "Text-guided image retrieval"."""
    composed = model.encode_composed(batch["input_ids"], batch["attention_mask"], batch["image"])
    target = model.encode_image(batch["image2"])
    loss, accuracy = one_way(model.scaled(composed), model.scaled(target))
    return loss, {"tgir_acc": accuracy}


def recognition(model, batch):
    """Category or sub-category recognition from image + text.

    batch as `itc` and label (B,) int64. Returns the mean cross-entropy and {"recognition_acc"}.
    Source: FashionViL 3.3; docs/recipe.md "Recognition"."""
    logits = model.classify(batch)
    accuracy = (logits.argmax(1) == batch["label"]).float().mean()
    return F.cross_entropy(logits, batch["label"]), {"recognition_acc": accuracy}


def ocir(model, batch):
    """Outfit complementary item retrieval: an item of an outfit against the item that is missing from it.

    batch: image (the given item, "question"), image2 (the missing one, "blank"), category of the given item and the
    wanted category (B,) int64. Returns the symmetric InfoNCE in nats and {"ocir_acc"}.
    Source: FashionViL 3.3; docs/recipe.md "Outfit completion"."""
    question = model.fuse(model.encode_item(batch["image"]), batch["category"], batch["wanted"])
    loss, accuracy = symmetric(question, model.scaled(model.encode_item(batch["image2"])))
    return loss, {"ocir_acc": accuracy}
