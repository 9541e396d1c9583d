"""What the golden tests share: the reference file, models with its made-up weights, and its inputs as our batches."""

import os
from pathlib import Path

import inputs
import torch
from fill import fill

import data
import vqvae
from model import PRETRAINING_HEADS, CSANet, FashionViL, ModelConfig
from plumbing import weights

HERE = Path(__file__).parent / "golden"
GOLDEN = torch.load(os.environ.get("GOLDEN", HERE / "tiny.pt"), weights_only=True)
META = GOLDEN["meta"]
B, SEED, VOCAB = META["B"], META["seed"], META["vocab"]


def to_original(state_dict, norm=None):
    """Our names -> the authors', with tied tensors under both of theirs: for the golden tests.

    norm: their name of logit_scale; None: the one that a model with these heads has."""
    if norm is None:
        pretraining = any(name.startswith(f"heads.{head}.") for name in state_dict for head in PRETRAINING_HEADS[1:])
        norm = "model.contrastive_norm.norm_s" if pretraining else "model.norm_layer.norm_s"
        norm = "norm_layer.norm_s" if "proj_layer.weight" in state_dict else norm
    rows = [(ours, theirs) for theirs, ours in weights.RELEASED if ours != "logit_scale" or theirs == norm]
    theirs = weights.rename(state_dict, rows)
    if "model.heads.mlm.bias" in theirs:
        theirs["model.heads.mlm.decoder.bias"] = theirs["model.heads.mlm.bias"]
    return theirs


def filled(model):
    """The model with the golden weights, which depend on the original's parameter names alone."""
    state = fill(to_original(model.state_dict()), META["scale"])
    model.load_state_dict(weights.rename(state, weights.RELEASED))
    # The reference was computed in this memory format; in ours the kernels round otherwise, and what a ReLU makes of a
    # value next to zero moves gradient norms by up to 1.4e-3.
    model.image_encoder.to(memory_format=torch.contiguous_format)
    return model.eval()


def build(heads=PRETRAINING_HEADS, dropout=0.1):
    size = dict(META["size"])
    size.pop("visual_embedding_dim")
    return filled(FashionViL(ModelConfig(resnet=META["resnet"], heads=heads, n_classes=121, dropout=dropout, **size)))


def build_csa():
    dim = GOLDEN["csa_train"]["scores"].shape[1]
    return filled(CSANet(ModelConfig(resnet=META["resnet"]), n_categories=inputs.CATS, dim=dim))


def build_image_tokenizer():
    tokenizer = vqvae.random_image_tokenizer(vqvae.ImageTokenizerConfig(ch=32))
    tokenizer.load_state_dict(fill(tokenizer.state_dict(), META["scale"], prefix="model.image_tokenizer."))
    return tokenizer.eval()


def golden_batch(seed=SEED, n=B, vocab=VOCAB):
    """Every input of every objective, under the names our losses read; text stays padded to its full 24 tokens."""
    text, mlm = inputs.text(n, seed, vocab), inputs.mlm(n, seed, vocab)
    text_keep, patch_keep = (torch.ones(n, size, dtype=torch.bool) for size in (inputs.L, inputs.PATCHES))
    text_at, patch_at = inputs.icc_draws(seed)
    text_keep[:, text_at], patch_keep[:, patch_at] = False, False
    labels = mlm["lm_label_ids"].masked_fill(mlm["lm_label_ids"] == -1, -100)
    patch_mask = inputs.image_masks(n, seed).bool()
    return {
        "image": inputs.images(n, seed, 0),
        "image2": inputs.images(n, seed, 1),
        "input_ids": text["input_ids"],
        "attention_mask": text["input_mask"],
        "itm_draws": inputs.itm_draws(n, seed),
        "masked_ids": mlm["input_ids_masked"],
        "mlm_labels": labels,
        "mlm_targets": data.places(labels != data.NO_LABEL),
        "patch_mask": patch_mask,
        "mpfc_targets": data.places(patch_mask),
        "text_keep": text_keep,
        "patch_keep": patch_keep,
        "attributes": inputs.attribute_labels(n, seed),
        "label": inputs.labels(n, seed),
        "category": inputs.csa(n, seed)["combine_cat_id"][:, 0],
        "wanted": inputs.csa(n, seed)["combine_cat_id"][:, 1],
    }


def difference(ours, reference):
    """max |a - b| / max |b|, the golden README's measure, per tensor."""
    ours, reference = torch.as_tensor(ours).detach().double(), torch.as_tensor(reference).double()
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float((ours - reference).abs().max() / reference.abs().max())
