"""The bare parts of a training step that bench.py measures against.

They are torchvision's ResNet, torch's nn.TransformerEncoder, tables and heads of the model's sizes, and as many
parameters as the model has. They do every forward and backward that the definition of an objective or a task needs, on
the same shapes, without masks. They learn nothing."""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from model import RESNETS


def make_resnet(config, image_encoder):
    """torchvision's ResNet of our sizes without pool and classifier. What `image_encoder` freezes is frozen here."""
    net, w = getattr(models, config.resnet)(), config.width
    net.conv1, net.bn1, net.inplanes = nn.Conv2d(3, w, 7, 2, 3, bias=False), nn.BatchNorm2d(w), w
    for i, n_blocks in enumerate(RESNETS[config.resnet][0]):  # torchvision's own stages are for width 64
        stage = net._make_layer(type(net.layer1[0]), w * 2**i, n_blocks, stride=1 if i == 0 else 2)
        setattr(net, f"layer{i + 1}", stage)
    for name, parameter in image_encoder.named_parameters():
        net.get_parameter(name).requires_grad_(parameter.requires_grad)
    return nn.Sequential(*list(net.children())[:-2])


class Bare(nn.Module):
    """The bare parts of a step of the objective or task `name` with our `model`, on the model's device."""

    def __init__(self, name, model):
        super().__init__()
        c, n_features, self.name = model.config, model.image_encoder.out_channels, name
        self.resnet = make_resnet(c, model.image_encoder).train(name != "polyvore")
        if name == "polyvore":
            self.head = nn.Linear(n_features, 256)
        else:
            d = c.hidden_size
            sizes = d, c.num_attention_heads, c.intermediate_size, c.dropout, "gelu", 1e-12
            layer = nn.TransformerEncoderLayer(*sizes, batch_first=True)
            layer.dropout = nn.Identity()  # BERT has none between the two linear layers
            self.encoder = nn.TransformerEncoder(layer, c.num_hidden_layers, enable_nested_tensor=False)
            self.words = nn.Embedding(c.vocab_size, d)
            n_out = {"mlm": c.vocab_size, "mpfc": c.n_codes, "pac": c.n_attributes}.get(name, c.n_classes or 2)
            self.projection, self.dense, self.head = nn.Linear(n_features, d), nn.Linear(d, d), nn.Linear(d, n_out)
            if name == "mlm":
                self.head.weight = self.words.weight
            # The position table takes as many rows more as the model has other parameters, all for the optimizer.
            n_ours, n_bare = (sum(p.numel() for p in module.parameters()) for module in (model, self))
            self.positions = nn.Parameter(torch.zeros((n_ours - n_bare) // d, d))
        # The memory format of our model; it was the faster one.
        self.to(next(model.parameters()).device, memory_format=torch.channels_last)

    def encode(self, words, patches):
        """Embedded words (B, T, D) and patch features (B, P, C) -> hidden states (B, T + P, D)."""
        return self.encoder(torch.cat([words + self.positions[: words.shape[1]], self.projection(patches)], 1))

    def forward(self, batch, objective=None):
        """Every forward that the definition needs -> (a log-partition, which stands for the loss, and no metrics)."""
        features = [self.resnet(batch[key]).flatten(2).transpose(1, 2) for key in ("image", "image2") if key in batch]
        pooled, patches = [f.mean(1) for f in features], features[-1]  # (B, C) of each image, (B, P, C)
        if self.name == "polyvore":
            return (self.head(pooled[0]) @ self.head(pooled[1]).t()).logsumexp(1).mean(), {}
        words = self.words(batch.get("masked_ids", batch["input_ids"]))  # (B, T, D)
        B, T = words.shape[:2]
        image, no_patch = self.projection(pooled[0]), patches[:, :0]
        if self.name == "itm":  # the search for hard negatives: text alone, without dropout
            self.encoder.eval()
            with torch.no_grad():
                self.encode(words, no_patch)
            self.encoder.train()
        if self.name == "mvc":
            patches = patches[~batch["patch_drop"]].view(B, -1, patches.shape[2])
        if self.name in ("itc", "pac", "fashiongen_retrieval"):
            text = self.encode(words, no_patch).mean(1)
            logits = self.head(torch.cat([image, text])) if self.name == "pac" else image @ text.t()
        elif self.name in ("mvc", "fashioniq"):
            logits = image @ self.encode(words, patches)[:, T:].mean(1).t()
        else:  # which of the positions are targets changes no cost
            n_targets = len(batch.get(f"{self.name}_targets", words))
            logits = self.head(F.gelu(self.dense(self.encode(words, patches).flatten(0, 1)[:n_targets])))
        return logits.logsumexp(1).mean(), {}
