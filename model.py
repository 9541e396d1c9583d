"""FashionViL: one ResNet, one BERT-style Transformer, prediction heads (Han et al., ECCV 2022, arXiv 2207.08150).

The same Transformer weights encode text, fuse text with an image, and compose an image with a change in words. Only
what is fed in differs. Letters in shape comments: B batch, T text tokens, P image patches (7 x 7 = 49 at 224 px),
L positions of a sequence (T, or T + P), C channels of the image encoder (2048), D hidden size (768), K image codes
(1024), A pseudo-attributes (2232). Masks are named by what True or 1 means.

Parameters are named as torchvision (image_encoder) and Hugging Face (bert) name them, so that loading is copying."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

SIZES = {  # of the Transformer
    "base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    "mini": dict(hidden_size=192, num_hidden_layers=3, num_attention_heads=3, intermediate_size=768),
    "demo": dict(hidden_size=192, num_hidden_layers=2, num_attention_heads=6, intermediate_size=384),
    "tiny": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128),
}
# blocks per stage, and whether a block is the three-convolution bottleneck
RESNETS = {"resnet18": ((2, 2, 2, 2), False), "resnet34": ((3, 4, 6, 3), False), "resnet50": ((3, 4, 6, 3), True)}
PRETRAINING_HEADS = ("contrastive", "itm", "mlm", "mpfc", "pac")  # "contrastive" is one number: the learned scale s
HEADS = (*PRETRAINING_HEADS, "recognition")


@dataclass
class ModelConfig:
    """Everything that decides shapes, and dropout, PAC's scale and ITM's candidates."""

    resnet: str = "resnet50"
    width: int = 64  # channels of the ResNet's first stage
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 30522
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    dropout: float = 0.1
    heads: tuple = PRETRAINING_HEADS
    n_codes: int = 1024  # K, size of the image tokenizer's codebook
    n_attributes: int = 2232  # A, size of the pseudo-attribute vocabulary
    n_classes: int = 0  # of the recognition head
    pac_scale: float = 1.0  # multiplies the cosines of the PAC head; 1 as in the paper
    itm_candidates: int = 0  # texts among which ITM looks for its hardest negative; 0: this process's whole micro-batch

    def __post_init__(self):
        self.heads = tuple(self.heads)
        if self.resnet not in RESNETS:
            raise ValueError(f"resnet: found {self.resnet!r}, expected one of {', '.join(RESNETS)}")
        if not set(self.heads) <= set(HEADS):
            raise ValueError(f"heads: found {self.heads}, expected some of {', '.join(HEADS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden size {self.hidden_size} does not divide into {self.num_attention_heads} attention heads"
            )
        if "recognition" in self.heads and self.n_classes < 1:
            raise ValueError("the recognition head needs n_classes, the number of classes of the data")


# ---- image encoder ---------------------------------------------------------------------------------------------------
class Block(nn.Module):
    """Residual block of ResNet-18/34 (two 3x3 convolutions) or, as `bottleneck`, of ResNet-50 (1x1, 3x3, 1x1)."""

    def __init__(self, c_in, c, stride, bottleneck):
        super().__init__()
        c_out = c * 4 if bottleneck else c
        if bottleneck:
            self.conv1 = nn.Conv2d(c_in, c, 1, bias=False)
            self.conv2 = nn.Conv2d(c, c, 3, stride, 1, bias=False)
            self.conv3, self.bn3 = nn.Conv2d(c, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
        else:
            self.conv1 = nn.Conv2d(c_in, c, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(c, c, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(c), nn.BatchNorm2d(c)
        self.bottleneck, self.downsample = bottleneck, None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        if self.bottleneck:
            out = self.bn3(self.conv3(F.relu(out, inplace=True)))
        out += x if self.downsample is None else self.downsample(x)
        return F.relu(out, inplace=True)


class ResNet(nn.Module):
    """ResNet (He et al. 2016) without average pool and classifier, with torchvision's parameter names."""

    def __init__(self, name="resnet50", width=64):
        super().__init__()
        blocks, bottleneck = RESNETS[name]
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        c_in = width
        for stage, n in enumerate(blocks):
            c = width * 2**stage
            c_out = c * 4 if bottleneck else c
            first = Block(c_in, c, 2 if stage else 1, bottleneck)
            others = [Block(c_out, c, 1, bottleneck) for _ in range(n - 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(first, *others))
            c_in = c_out
        self.out_channels = c_out
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.to(memory_format=torch.channels_last)  # what convolutions are fastest on, CPU and GPU

    def forward(self, images):
        """(B, 3, H, W) float, H and W multiples of 32 -> patch features (B, P, C), patches in row order."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images)), inplace=True), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, C, H/32, W/32)
        return x.flatten(2).transpose(1, 2)  # (B, P, C)


# ---- Transformer -----------------------------------------------------------------------------------------------------
class Embeddings(nn.Module):
    """BERT's embeddings, and beside them a projection, positions and token types for image patches."""

    def __init__(self, config, image_channels):
        super().__init__()
        d = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, d)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, d)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, d)
        self.LayerNorm = nn.LayerNorm(d, eps=1e-12)
        self.position_embeddings_visual = nn.Embedding(config.max_position_embeddings, d)
        self.token_type_embeddings_visual = nn.Embedding(config.type_vocab_size, d)
        self.projection = nn.Linear(image_channels, d)
        self.dropout = config.dropout

    def text(self, input_ids):  # (B, T) int64 -> (B, T, D), before the shared LayerNorm
        positions = self.position_embeddings.weight[: input_ids.shape[1]]
        return self.word_embeddings(input_ids) + positions + self.token_type_embeddings.weight[0]

    def image(self, features):  # (B, P, C) -> (B, P, D), before the shared LayerNorm
        positions = self.position_embeddings_visual.weight[: features.shape[1]]
        return self.projection(features) + positions + self.token_type_embeddings_visual.weight[0]

    def forward(self, embedded):  # (..., D), what `text` and `image` give: LayerNorm and dropout are shared by both
        return F.dropout(self.LayerNorm(embedded), self.dropout, self.training)


class Packing:
    """Some positions of a padded batch: `pack` picks their vectors out of the grid, `unpack` puts them back.

    Texts differ in length, and padding is a third of a usual batch. "red dress" and "bag" make a grid of 2 x 4:
        [CLS] red dress [SEP]     numbered 0 1 2 3
        [CLS] bag [SEP] [PAD]              4 5 6 7
    Linear layers, LayerNorm and dropout treat every token alone, so they get the 7 tokens at 0..6 packed as (7, D).
    Attention compares the tokens of one row, so before it the vectors go back into the grid, with zeros at 7."""

    def __init__(self, chosen, device="cpu"):
        """chosen (B, L) bool on the host, True = this position is one of the N. The vectors are on `device`."""
        self.shape = chosen.shape
        self.index = chosen.flatten().nonzero().squeeze(1).to(device, non_blocking=True)  # (N,)

    def pack(self, grid):  # (B, L, D) -> (N, D)
        return grid.flatten(0, 1).index_select(0, self.index)

    def unpack(self, packed):  # (N, D) -> (B, L, D), zeros elsewhere
        grid = packed.new_zeros(self.shape.numel(), packed.shape[1])
        return grid.index_copy(0, self.index, packed).view(*self.shape, -1)


class Layer(nn.Module):
    """One post-norm Transformer layer under Hugging Face's parameter names."""

    def __init__(self, config):
        super().__init__()
        d, wide = config.hidden_size, config.intermediate_size
        self.n_heads, self.dropout = config.num_attention_heads, config.dropout
        qkv = nn.ModuleDict({name: nn.Linear(d, d) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": qkv, "output": self._output(d, d)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(d, wide)})
        self.output = self._output(wide, d)

    @staticmethod
    def _output(n_in, n_out):
        return nn.ModuleDict({"dense": nn.Linear(n_in, n_out), "LayerNorm": nn.LayerNorm(n_out, eps=1e-12)})

    def _residual(self, module, x, residual):
        return module["LayerNorm"](F.dropout(module["dense"](x), self.dropout, self.training) + residual)

    def _project(self, name, x, positions):  # packed x (N, D) -> (B, attention heads, L, D / attention heads)
        grid = positions.unpack(self.attention["self"][name](x))  # (B, L, D)
        return grid.unflatten(2, (self.n_heads, -1)).transpose(1, 2)

    def forward(self, x, attended, inputs, outputs):
        """x (N, D), the tokens at the Packing `inputs` -> (M, D), the layer's outputs at the Packing `outputs`.

        attended (B, 1, 1, L) bool, True = the other tokens of its row see this position."""
        k, v = self._project("key", x, inputs), self._project("value", x, inputs)
        if outputs is not inputs:
            x = outputs.pack(inputs.unpack(x))  # (M, D)
        q = self._project("query", x, outputs)
        y = F.scaled_dot_product_attention(q, k, v, attended, dropout_p=self.dropout if self.training else 0.0)
        y = outputs.pack(y.transpose(1, 2).flatten(2))  # (M, D)
        x = self._residual(self.attention["output"], y, x)
        return self._residual(self.output, F.gelu(self.intermediate["dense"](x)), x)


class Bert(nn.Module):
    """Embeddings, layers and pooler (Devlin et al. 2019)."""

    def __init__(self, config, image_channels):
        super().__init__()
        self.embeddings = Embeddings(config, image_channels)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})
        std = 0.02 * (768 / config.hidden_size) ** 0.5  # BERT's .02 at width 768; narrow ones learn slowly from it
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        # the image side's tables start as copies of the text side's
        for table in ("position_embeddings", "token_type_embeddings"):
            text, image = getattr(self.embeddings, table), getattr(self.embeddings, table + "_visual")
            image.load_state_dict(text.state_dict())

    def forward(self, embedded, attended, needed=None):
        """Embedded tokens (B, L, D), of `embeddings.text` and `.image` -> hidden states (B, L, D).

        attended (B, L) bool, False = padding or left out. needed (B, L) bool, True = the caller uses this hidden state;
        the others come out as 0; None: all are needed. Positions that are neither attended nor needed are not computed,
        and the last layer computes only the needed ones."""
        needed = torch.ones_like(attended) if needed is None else needed
        # How many positions there are decides shapes, so the host waits for a GPU here. One copy makes it one wait.
        inputs, outputs = (Packing(x, attended.device) for x in torch.stack([attended | needed, needed]).cpu())
        seen = attended[:, None, None, :]  # (B, 1, 1, L)
        x = self.embeddings(inputs.pack(embedded))  # (N, D)
        *layers, last = self.encoder["layer"]
        for layer in layers:
            x = layer(x, seen, inputs, inputs)
        return outputs.unpack(last(x, seen, inputs, outputs))

    def pool(self, hidden):  # (B, L, D) -> (B, D): BERT's pooler on the first token
        return torch.tanh(self.pooler["dense"](hidden[:, 0]))


# ---- prediction heads ------------------------------------------------------------------------------------------------
class PredictionHead(nn.Module):
    """Linear, GELU, LayerNorm, Linear: the head of MLM (decoder tied to the words), MPFC and recognition."""

    def __init__(self, d, n_out):
        super().__init__()
        self.dense = nn.Linear(d, d)
        self.LayerNorm = nn.LayerNorm(d, eps=1e-12)
        self.decoder = nn.Linear(d, n_out)

    def forward(self, x):
        return self.decoder(self.LayerNorm(F.gelu(self.dense(x))))


class CosineHead(nn.Module):
    """PAC's classifier: cosine of the embedding with each attribute's weight vector; logits in [-scale, scale]."""

    def __init__(self, d, n_out, scale):
        super().__init__()
        self.projection, self.scale = nn.Parameter(torch.randn(d, n_out)), scale

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):  # 2232 cosines differ by less than bfloat16 can tell
            return self.scale * (F.normalize(x.float(), dim=-1) @ F.normalize(self.projection, dim=0))


def masked_mean(x, mask):  # x (B, L, D) -> (B, D), over the positions where mask (B, L) is 1 or True
    weights = mask.to(x.dtype).unsqueeze(-1)  # (B, L, 1)
    return (x * weights).sum(1) / weights.sum(1)


class FashionViL(nn.Module):
    """The whole model. An `image` argument is pixels (B, 3, H, W) or patch features (B, P, C) computed before.

    In train mode every image forward is one BatchNorm batch, so views and sides go through one at a time."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.image_encoder = ResNet(config.resnet, config.width)
        self.bert = Bert(config, self.image_encoder.out_channels)
        d = config.hidden_size
        build = {
            "itm": lambda: nn.Linear(d, 2),  # class 1 = matched
            "mlm": lambda: PredictionHead(d, config.vocab_size),
            "mpfc": lambda: PredictionHead(d, config.n_codes),
            "pac": lambda: CosineHead(d, config.n_attributes, config.pac_scale),
            "recognition": lambda: PredictionHead(d, config.n_classes),
        }
        if "contrastive" in config.heads:
            self.logit_scale = nn.Parameter(torch.full((1,), 4.0))
        self.heads = nn.ModuleDict({name: build[name]() for name in config.heads if name in build})
        if "mlm" in config.heads:
            self.heads["mlm"].decoder.weight = self.bert.embeddings.word_embeddings.weight

    def patches(self, image):  # pixels (B, 3, H, W) -> patch features (B, P, C); features pass through
        return self.image_encoder(image) if image.ndim == 4 else image

    def encode_image(self, image):  # image alone: projection only, no positions, no Transformer -> patches' mean (B, D)
        return self.bert.embeddings.projection(self.patches(image).mean(1))

    def encode_text(self, input_ids, attention_mask):
        """Text alone, (B, T) int64 and (B, T) 0 = padding -> mean over tokens, [CLS] and [SEP] included, (B, D)."""
        attended = attention_mask.bool()
        return masked_mean(self.bert(self.bert.embeddings.text(input_ids), attended, attended), attention_mask)

    def encode_joint(self, input_ids, attention_mask, image, patch_mask=None, patch_keep=None, needed=None):
        """Text + patches through the Transformer -> hidden states (B, T + P, D).

        patch_mask (B, P) bool, True = masked: the features of these patches are zero before the projection (MPFC).
        patch_keep (B, P) bool, False = left out of attention, as tokens are by a 0 in attention_mask.
        needed (B, T + P) bool, True = the caller uses this hidden state, as for `Bert.forward`."""
        features, embeddings = self.patches(image), self.bert.embeddings
        if patch_mask is not None:
            features = features.masked_fill(patch_mask.unsqueeze(-1), 0.0)
        if patch_keep is None:
            patch_keep = features.new_ones(features.shape[:2], dtype=torch.bool)
        embedded = torch.cat([embeddings.text(input_ids), embeddings.image(features)], 1)  # (B, T + P, D)
        return self.bert(embedded, torch.cat([attention_mask.bool(), patch_keep], 1), needed)

    def encode_pair(self, input_ids, attention_mask, image):
        """Text + image -> BERT's pooler on [CLS] (B, D), for ITM and recognition."""
        features = self.patches(image)
        is_cls = torch.arange(input_ids.shape[1] + features.shape[1], device=features.device) == 0
        needed = is_cls.expand(len(features), -1)  # (B, T + P)
        return self.bert.pool(self.encode_joint(input_ids, attention_mask, features, needed=needed))

    def encode_composed(self, input_ids, attention_mask, image, patch_keep=None):
        """Image + change in words -> mean over the outputs of the kept patches (B, D), as the paper composes them."""
        features, T = self.patches(image), input_ids.shape[1]
        if patch_keep is None:
            patch_keep = features.new_ones(features.shape[:2], dtype=torch.bool)
        needed = F.pad(patch_keep, (T, 0))  # (B, T + P), no token of the text
        hidden = self.encode_joint(input_ids, attention_mask, features, patch_keep=patch_keep, needed=needed)
        return masked_mean(hidden[:, T:], patch_keep)

    def classify(self, batch):  # image, input_ids and attention_mask -> recognition logits (B, n_classes)
        pooled = self.encode_pair(batch["input_ids"], batch["attention_mask"], batch["image"])
        return self.heads["recognition"](pooled).float()

    def scaled(self, x):
        """Embeddings (B, D) -> `s * x / ||x||` float32. The dot product of two, `s^2 cos`, is a contrastive logit."""
        with torch.autocast(x.device.type, enabled=False):  # logits near 16 are too coarse in bfloat16
            return self.logit_scale * F.normalize(x.float(), dim=-1)

    def forward(self, batch, objective):  # DistributedDataParallel must see every loss inside its own forward
        return objective(self, batch)


class CSANet(nn.Module):
    """Category-based subspace attention network (Lin et al. 2020) on the image encoder alone, for outfits (OCIR).

    All BatchNorms, statistics and weights, and the last stage of the image encoder are frozen."""

    def __init__(self, config, n_categories, dim=256, n_masks=5, hidden=64):
        super().__init__()
        self.config, self.n_categories = config, n_categories
        self.image_encoder = ResNet(config.resnet, config.width)
        self.proj_layer = nn.Linear(self.image_encoder.out_channels, dim)
        classifier = nn.Sequential(nn.Linear(2 * n_categories, hidden), nn.ReLU(), nn.Linear(hidden, n_masks))
        self.fusion_module = nn.ModuleDict({"weight_classifier": classifier, "masks": nn.Embedding(n_masks, dim)})
        self.logit_scale = nn.Parameter(torch.full((1,), 4.0))
        self.image_encoder.layer4.requires_grad_(False)
        for module in self.image_encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)

    def train(self, mode=True):
        """As nn.Module's, but the image encoder, and with it every BatchNorm, stays in eval mode."""
        super().train(mode)
        self.image_encoder.eval()
        return self

    def encode_item(self, image):
        """(B, 3, H, W) -> (B, 256), projected and not yet normalised; with `scaled` this is the wanted item's side."""
        return self.proj_layer(self.image_encoder(image).mean(1))

    def fuse(self, item, category, wanted):
        """Outfit items (B, 256) of `encode_item`, their category and the wanted one (B,) int64 -> (B, 256), scaled.

        It is the weighted mean over copies that are multiplied by the learned masks."""
        one_hot = torch.cat([F.one_hot(category, self.n_categories), F.one_hot(wanted, self.n_categories)], 1)
        weights = self.fusion_module["weight_classifier"](one_hot.to(item.dtype)).softmax(-1)  # (B, 5)
        masks = self.fusion_module["masks"].weight  # (5, 256)
        return self.scaled((item * (weights @ masks)) / len(masks))  # the original divides, too; `scaled` undoes it

    scaled = FashionViL.scaled
    forward = FashionViL.forward


def compile_parts(model):
    """torch.compile the image encoder and each layer of the Transformer, whose sequences differ in length."""
    model.image_encoder.compile()
    for layer in model.bert.encoder["layer"] if isinstance(model, FashionViL) else ():
        layer.compile(dynamic=True)
