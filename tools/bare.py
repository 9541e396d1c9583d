"""The bare parts that bench.py measures against, and how it measures: in turns, or in a process of its own.

Of a step: torchvision's ResNet and nn.TransformerEncoder of the model's sizes, tables, heads where something is asked,
the image tokenizer without gradient, one fused AdamW on as many parameters: every forward and backward that the
definition of an objective or a task needs and no more, on the same shapes, without masks. Nothing here learns anything.

FLOP, as torch's counter has them: 2 m n k of a product, 2 x weights x positions of a convolution, 4 n^2 D of attention
over n tokens of width D (on GPUs; the counter knows no CPU kernel of it); backward twice that, once where weights are
frozen."""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from types import GeneratorType

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import vqvae
from losses import IGNORE
from model import RESNETS

PHASES = ("data", "forward", "backward", "optimizer")  # of a step


def apart(function, *args):
    """function(*args) in a fresh process: its peak memory and its heap are its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def timed(function, i=0):
    """Seconds of each phase of function(i): up to each yield of a generator, else as a whole."""
    clock, result = [time.perf_counter()], function(i)
    for _ in result if isinstance(result, GeneratorType) else [None]:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        clock.append(time.perf_counter())
    return np.diff(clock).tolist()


def compare(ours, bare, n):
    """Both functions n times in turns -> medians of their seconds and of the pairs' ratios, shares of our PHASES."""
    runs = np.array([(np.sum(mine := timed(ours, i)), np.sum(timed(bare, i)), *mine) for i in range(n)])
    (seconds, bare, *phases), ratio = np.median(runs, axis=0), np.median(runs[:, 0] / runs[:, 1])
    shares = dict(zip(PHASES, runs[:, 2:].sum(0) / runs[:, 0].sum(), strict=True)) if len(phases) > 1 else {}
    return {"seconds": seconds, "bare": bare, "ratio": ratio, **shares}


def decode(batches, side, i):
    """The images of batches[i], paths, decoded and resized to side x side."""
    for path in batches[i]:
        Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BILINEAR)


def multiply(image, text, block=2048):
    """The scores of image (N, D) and text (M, D), both ways as retrieval asks them, block by block into one buffer."""
    for queries, others in ((image, text), (text, image)):
        buffer = queries.new_empty(block, len(others))
        for rows in queries.split(block):
            torch.mm(rows, others.t(), out=buffer[: len(rows)])


def product_tflop(device, dtype):
    """TFLOP a second of a large product, the best of 20: what the device can do."""
    n = 8192 if device.type == "cuda" else 2048
    x = torch.randn(n, n, device=device, dtype=dtype)
    return 2e-12 * n**3 / min(timed(lambda _: x @ x)[0] for _ in range(20))


class Bare(nn.Module):
    """The parts of a step: s has the name of an objective or a task, its model, image_tokenizer, batches and device.

    The batches lie normalised on the device; `positions` make up for the parameters that it has fewer."""

    def __init__(self, s):
        super().__init__()
        from torchvision import models  # not before data.py, which makes it importable on a CPU-only torch

        c, n_in, net = s.model.config, s.model.image_encoder.out_channels, getattr(models, s.model.config.resnet)()
        d, w, self.name, self.device = c.hidden_size, c.width, s.name, s.device
        net.inplanes, net.conv1, net.bn1 = w, nn.Conv2d(3, w, 7, 2, 3, bias=False), nn.BatchNorm2d(w)
        for i, n in enumerate(RESNETS[c.resnet][0]):  # torchvision's own is of width 64
            setattr(net, f"layer{i + 1}", net._make_layer(type(net.layer1[0]), w * 2**i, n, stride=min(2, i + 1)))
        for name, parameter in s.model.image_encoder.named_parameters():
            net.get_parameter(name).requires_grad_(parameter.requires_grad)
        self.resnet = nn.Sequential(*list(net.children())[:-2]).train(s.name != "polyvore")  # no pool, no classifier
        if s.name == "polyvore":
            self.head = nn.Linear(n_in, 256)
        else:
            layer = nn.TransformerEncoderLayer(
                d, c.num_attention_heads, c.intermediate_size, c.dropout, "gelu", 1e-12, batch_first=True
            )
            layer.dropout = nn.Identity()  # BERT has none between the two linear layers
            self.encoder, self.words = nn.TransformerEncoder(layer, c.num_hidden_layers), nn.Embedding(c.vocab_size, d)
            n_out = {"mlm": c.vocab_size, "mpfc": c.n_codes, "pac": c.n_attributes}.get(s.name, c.n_classes or 2)
            self.projection, self.dense, self.head = nn.Linear(n_in, d), nn.Linear(d, d), nn.Linear(d, n_out)
            if s.name == "mlm":
                self.head.weight = self.words.weight
            ours, bare = (sum(p.numel() for p in m.parameters()) for m in (s.model, self))
            self.positions = nn.Parameter(torch.zeros((ours - bare) // d, d))
        self.tokenizer = s.image_tokenizer and vqvae.random_image_tokenizer(s.image_tokenizer.config)
        trained = [p for p in self.to(s.device).parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, fused=True)
        self.batches = [data.to_device(batch, s.device) for batch in s.batches]
        self.use(torch.channels_last)

    def use(self, layout):
        """Hold weights and images in this memory format."""
        self.to(memory_format=layout)
        for batch in self.batches:
            batch.update({k: v.contiguous(memory_format=layout) for k, v in batch.items() if v.ndim == 4})

    def loss(self, batch):
        """Every forward that the definition needs and no more; the log-partition takes the loss's place."""
        features = [self.resnet(batch[k]).flatten(2).transpose(1, 2) for k in ("image", "image2") if k in batch]
        pooled, patches = [f.mean(1) for f in features], features[-1]  # (B, C), (B, P, C)
        if self.name == "polyvore":
            return (self.head(pooled[0]) @ self.head(pooled[1]).t()).logsumexp(1).mean()
        words, image = self.words(batch.get("masked_ids", batch["input_ids"])), self.projection(pooled[0])
        T = words.shape[1]

        def encode(patches):  # (B, T + P, D)
            return self.encoder(torch.cat([words + self.positions[:T], self.projection(patches)], 1))

        with torch.no_grad():
            if self.name == "itm":  # mining: text alone, without dropout
                self.encoder.eval()
                encode(patches[:, :0].detach())
                self.encoder.train()
            if self.name == "mpfc":
                self.tokenizer.quant_conv(self.tokenizer.encoder(batch["image"]))
        if self.name == "mvc":
            patches = patches[~batch["patch_drop"]].view(len(words), -1, patches.shape[2])
        if self.name in ("itc", "pac", "fashiongen_retrieval"):
            text = encode(patches[:, :0]).mean(1)
            logits = self.head(torch.cat([image, text])) if self.name == "pac" else image @ text.t()
        elif self.name in ("mvc", "fashioniq"):
            logits = image @ encode(patches)[:, T:].mean(1).t()
        else:  # as many rows as are asked: patches, words or one a sample
            asked = batch.get("patch_mask", batch.get("mlm_labels", batch["attention_mask"][:, 0]) != IGNORE)
            logits = self.head(F.gelu(self.dense(encode(patches).flatten(0, 1)[: int(asked.sum())])))
        return logits.logsumexp(1).mean()
