"""FashionViL: one ResNet, one BERT-style Transformer, prediction heads (Han et al., ECCV 2022, arXiv 2207.08150).

The same Transformer weights encode text, fuse text with an image, and compose an image with a change in words. Only
what is fed in differs. Letters in shape comments: B batch, T text tokens, P image patches (7 x 7 = 49 at 224 px),
L positions of a sequence (T, or T + P), C channels of the image encoder (2048), D hidden size (768), K image codes
(1024), A pseudo-attributes (2232).

One rule for all attention masks: True or 1 marks what is kept. These are the tokens and patches that the Transformer
sees (`attention_mask`, `*_keep`, `seen`) and the hidden states that the caller reads (`read*`). The only exception has
its name from the original: in MPFC's `patch_mask` True marks a masked patch.

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
    itm_candidates: int = 0  # texts among which ITM looks for its hardest negative; 0: all that this process has

    def __post_init__(self):
        self.heads = tuple(self.heads)
        if self.resnet not in RESNETS:
            raise ValueError(f"resnet: found {self.resnet!r}, expected one of {', '.join(RESNETS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"size {self.hidden_size} does not divide into {self.num_attention_heads} attention heads")
        if not set(self.heads) <= set(HEADS):
            raise ValueError(f"heads: found {self.heads}, expected some of {', '.join(HEADS)}")
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
        shortcut = x if self.downsample is None else self.downsample(x)
        out += shortcut
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

    def text(self, input_ids):  # (B, T) int64 -> (B, T, D)
        positions = self.position_embeddings.weight[: input_ids.shape[1]]
        return self.word_embeddings(input_ids) + positions + self.token_type_embeddings.weight[0]

    def image(self, features):  # (B, P, C) -> (B, P, D)
        positions = self.position_embeddings_visual.weight[: features.shape[1]]
        return self.projection(features) + positions + self.token_type_embeddings_visual.weight[0]

    def norm_and_dropout(self, embedded):  # (..., D) -> (..., D), for text and patches alike
        return F.dropout(self.LayerNorm(embedded), self.dropout, self.training)


class Places:
    """Saves the time of padding: linear layers see a list of the real tokens, attention sees the padded grid.

    A third of a usual batch of texts is padding. "red dress" and "bag" make this grid of 2 x 4 places:
        0 [CLS]  1 red  2 dress  3 [SEP]
        4 [CLS]  5 bag  6 [SEP]  7 [PAD]
    Linear layers, LayerNorm and dropout treat every token alone, so they get the list of 7 tokens, (7, D). Attention
    compares the tokens of a row, so it gets the grid, (2, 4, D), with zeros at place 7. `pick` makes a list of a grid,
    and `put` makes a grid of a list.

    A CPU compiles kernels for every new length of the list, in bfloat16. They take a seventh of the time and a gigabyte
    of memory. So `pick` fills the list with copies of one token up to a multiple of FILL, and `put` drops them."""

    FILL = 64

    def __init__(self, mask, device="cpu"):  # mask (B, L) bool on the CPU, True at the tokens; device of the vectors
        self.shape = mask.shape
        self.index = mask.flatten().nonzero().squeeze(1).to(device, non_blocking=True)  # in the flattened grid
        self.filled = torch.cat([self.index, self.index[:1].expand(-len(self.index) % self.FILL)])  # (N,)
        self.attention_mask = mask[:, None, None, :].to(device, non_blocking=True)  # (B, 1, 1, L)

    def pick(self, grid):  # (B, L, D) -> (N, D)
        return grid.flatten(0, 1).index_select(0, self.filled)

    def put(self, tokens):  # (N, D) -> (B, L, D), zeros elsewhere
        grid = tokens.new_zeros(self.shape.numel(), tokens.shape[1])
        return grid.index_copy(0, self.index, tokens[: len(self.index)]).view(*self.shape, -1)


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

    def _project(self, name, tokens, places):
        """Tokens (N, D) -> their queries, keys or values, as `name` says, in the grid: (B, n_heads, L, D / n_heads)."""
        grid = places.put(self.attention["self"][name](tokens))  # (B, L, D)
        return grid.unflatten(2, (self.n_heads, -1)).transpose(1, 2)

    def _add_and_norm(self, module, x, residual):
        return module["LayerNorm"](F.dropout(module["dense"](x), self.dropout, self.training) + residual)

    def forward(self, x, x_places, context, context_places):
        """The outputs (M, D) of the tokens x (M, D). Each attends to those tokens of `context` (N, D) in its own row.

        So x makes the queries, and context, which is all tokens, makes keys and values. They are the same tokens but in
        the last layer, where x has only those that `Bert.forward` was asked for.
        Attention runs on the whole grid, with a zero at every other place. `pick` drops what comes out there."""
        q = self._project("query", x, x_places)
        k, v = self._project("key", context, context_places), self._project("value", context, context_places)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q, k, v, context_places.attention_mask, dropout
        )  # (B, n_heads, L, D / n_heads)
        y = x_places.pick(y.transpose(1, 2).flatten(2))  # (M, D)
        x = self._add_and_norm(self.attention["output"], y, x)
        return self._add_and_norm(self.output, F.gelu(self.intermediate["dense"](x)), x)


class Bert(nn.Module):
    """Embeddings, layers and pooler (Devlin et al. 2019)."""

    def __init__(self, config, image_channels):
        super().__init__()
        self.embeddings = Embeddings(config, image_channels)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})
        std = 0.02 * (768 / config.hidden_size) ** 0.5  # BERT's .02 at width 768; narrow models learn slowly from .02
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        tables = self.embeddings  # those of the image side start as copies of the text side's
        tables.position_embeddings_visual.load_state_dict(tables.position_embeddings.state_dict())
        tables.token_type_embeddings_visual.load_state_dict(tables.token_type_embeddings.state_dict())

    def forward(self, embedded, seen, read=None):
        """Embedded tokens (B, L, D), of `embeddings.text` and `.image` -> hidden states (B, L, D).

        seen (B, L) bool, False = padding or left out: no linear layer runs for such a token, and its hidden state is 0.
        read (B, L) bool, some of the seen: the caller reads only these hidden states. The last layer computes no others
        and leaves them 0. None: all that are seen."""
        # The number of tokens decides shapes, so the CPU waits for a GPU here. Both masks go in one copy, for one wait.
        masks = torch.stack([seen, seen if read is None else read]).cpu()
        seen_places, read_places = (Places(mask, embedded.device) for mask in masks)
        x = self.embeddings.norm_and_dropout(seen_places.pick(embedded))  # (N, D)
        # In all layers but the last, every seen token attends to every seen token.
        *layers, last = self.encoder["layer"]
        for layer in layers:
            x = layer(x, seen_places, x, seen_places)
        # In the last layer only the tokens that are read attend, still to every seen token.
        x_read = read_places.pick(seen_places.put(x))  # (M, D)
        return read_places.put(last(x_read, read_places, x, seen_places))

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


# ---- the models ------------------------------------------------------------------------------------------------------
def masked_mean(x, mask):  # x (B, L, D) -> (B, D), over the positions where mask (B, L) is 1 or True
    weights = mask.to(x.dtype).unsqueeze(-1)  # (B, L, 1)
    return (x * weights).sum(1) / weights.sum(1)


class ContrastiveModel(nn.Module):
    """What FashionViL and CSA-Net share: the learned scale s, `logit_scale`, and a forward that computes a loss."""

    def scaled(self, x):
        """Embeddings (B, D) -> `s * x / ||x||` float32. The dot product of two is a contrastive logit, `s^2 cos`."""
        with torch.autocast(x.device.type, enabled=False):  # logits near 16 are too coarse in bfloat16
            return self.logit_scale * F.normalize(x.float(), dim=-1)

    def forward(self, batch, objective):  # DistributedDataParallel must see every loss inside its own forward
        return objective(self, batch)


class FashionViL(ContrastiveModel):
    """The whole model. An `image` argument is pixels (B, 3, H, W) or patch features (B, P, C) computed before.

    Encode the two images of a pair (MVC, TGIR) in two calls, because BatchNorm in train mode mixes what is in one."""

    def __init__(self, config):
        super().__init__()
        self.config, d = config, config.hidden_size
        self.image_encoder = ResNet(config.resnet, config.width)
        self.bert = Bert(config, self.image_encoder.out_channels)
        self.heads = nn.ModuleDict()
        if "contrastive" in config.heads:
            self.logit_scale = nn.Parameter(torch.full((1,), 4.0))  # 16 cos at first: a temperature of 1/16
        if "itm" in config.heads:
            self.heads["itm"] = nn.Linear(d, 2)  # class 1 = matched
        if "mlm" in config.heads:
            self.heads["mlm"] = PredictionHead(d, config.vocab_size)
            self.heads["mlm"].decoder.weight = self.bert.embeddings.word_embeddings.weight  # one tensor for both
        if "mpfc" in config.heads:
            self.heads["mpfc"] = PredictionHead(d, config.n_codes)
        if "pac" in config.heads:
            self.heads["pac"] = CosineHead(d, config.n_attributes, config.pac_scale)
        if "recognition" in config.heads:
            self.heads["recognition"] = PredictionHead(d, config.n_classes)

    def patches(self, image):  # pixels (B, 3, H, W) -> patch features (B, P, C); features pass through
        return self.image_encoder(image) if image.ndim == 4 else image

    def encode_image(self, image):
        """Image alone -> mean over its projected patches (B, D). There are no positions and no Transformer."""
        return self.bert.embeddings.projection(self.patches(image).mean(1))

    def encode_text(self, input_ids, attention_mask):
        """Text alone, (B, T) int64 and (B, T) 0 = padding -> mean over tokens, [CLS] and [SEP] included, (B, D)."""
        hidden = self.bert(self.bert.embeddings.text(input_ids), attention_mask.bool())  # (B, T, D)
        return masked_mean(hidden, attention_mask)

    def encode_joint(self, input_ids, attention_mask, image, patch_keep=None, read_text=None, read_patches=None):
        """Text + patches through the Transformer -> hidden states of the text (B, T, D) and of the patches (B, P, D).

        patch_keep (B, P) bool, False = left out of attention, as tokens are by a 0 in attention_mask.
        read_text (B, T) bool, or read_patches (B, P) bool, not both: the caller reads only these; the others are 0."""
        features, embeddings = self.patches(image), self.bert.embeddings
        T, P = input_ids.shape[1], features.shape[1]
        if patch_keep is None:
            patch_keep = features.new_ones(features.shape[:2], dtype=torch.bool)
        read = None
        if read_text is not None:
            read = F.pad(read_text, (0, P))  # (B, T + P), False at the patches
        elif read_patches is not None:
            read = F.pad(read_patches, (T, 0))  # (B, T + P), False at the text
        embedded = torch.cat([embeddings.text(input_ids), embeddings.image(features)], 1)  # (B, T + P, D)
        seen = torch.cat([attention_mask.bool(), patch_keep], 1)  # (B, T + P)
        return self.bert(embedded, seen, read).split([T, P], 1)

    def encode_pair(self, input_ids, attention_mask, image):
        """Text + image -> BERT's pooler on [CLS] (B, D), for ITM and recognition."""
        is_cls = torch.zeros_like(input_ids, dtype=torch.bool)
        is_cls[:, 0] = True
        text, _ = self.encode_joint(input_ids, attention_mask, image, read_text=is_cls)
        return self.bert.pool(text)

    def encode_composed(self, input_ids, attention_mask, image, patch_keep=None):
        """Image + change in words -> mean over the outputs of the kept patches (B, D), as the paper composes them."""
        features = self.patches(image)
        if patch_keep is None:
            patch_keep = features.new_ones(features.shape[:2], dtype=torch.bool)
        _, patches = self.encode_joint(input_ids, attention_mask, features, patch_keep, read_patches=patch_keep)
        return masked_mean(patches, patch_keep)

    def classify(self, batch):  # image, input_ids and attention_mask -> recognition logits (B, n_classes)
        pooled = self.encode_pair(batch["input_ids"], batch["attention_mask"], batch["image"])
        return self.heads["recognition"](pooled).float()


class CSANet(ContrastiveModel):
    """Category-based subspace attention network (Lin et al. 2020) on the image encoder alone, for outfits (OCIR).

    As in the original, every BatchNorm (statistics and weights) and the last stage of the image encoder are frozen. Its
    first stages learn."""

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

        It is the weighted sum of copies of the item, each multiplied by a learned mask, over the number of masks."""
        one_hot = torch.cat([F.one_hot(category, self.n_categories), F.one_hot(wanted, self.n_categories)], 1)
        weights = self.fusion_module["weight_classifier"](one_hot.to(item.dtype)).softmax(-1)  # (B, 5)
        masks = self.fusion_module["masks"].weight  # (5, 256)
        return self.scaled((item * (weights @ masks)) / len(masks))  # divided as in the original; `scaled` undoes it


def compile_parts(model):
    """torch.compile the image encoder, and each layer of the Transformer for sequences of any length."""
    model.image_encoder.compile()
    if isinstance(model, FashionViL):  # a CSA-Net has no Transformer
        for layer in model.bert.encoder["layer"]:
            layer.compile(dynamic=True)
