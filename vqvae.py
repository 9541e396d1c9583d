"""Stage 0: the image tokenizer, a VQ-VAE whose codes MPFC predicts (van den Oord et al. 2017, Esser et al. 2021).

    python vqvae.py configs/vqvae_demo.py                                    # CPU or one GPU
    torchrun --nproc_per_node=8 vqvae.py configs/vqvae_fashionall.py         # eight GPUs

An encoder makes a latent vector of each patch of an image. The nearest vector of a codebook takes its place, and its
number is the patch's code. A decoder makes the image again. Encoder and decoder are VQGAN's, and their parameters have
the names of the authors' released file. That decides the names of modules here.
Writes run.json, log.jsonl and last.pt. Pre-training needs the encoder and the codebook alone.
Letters in shapes: B batch, P patches (7 x 7 = 49 at 224 px), C channels, D width of latents and codes, K codes."""

import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
from plumbing import checkpoint, runs, settings, weights
from plumbing.files import reading
from plumbing.processes import all_mean, gather_with_gradient, world_size
from plumbing.settings import COUNT, FROM_0, MISSING, InputError, setting


@dataclass
class ImageTokenizerConfig:
    """Everything that decides shapes. The defaults are the released file's sizes."""

    ch: int = setting(128, "channels of the first level", COUNT, group="model")
    ch_mult: tuple = setting((1, 1, 2, 2, 4, 4), "channels of each level, as multiples of ch")
    n_blocks: int = setting(2, "residual blocks a level", COUNT)
    latent_dim: int = setting(256, "size of a code's vector", COUNT)
    n_codes: int = setting(1024, "codes in the codebook", COUNT)
    unshuffle: int = setting(
        1, "pixels a side that PixelUnshuffle turns into channels first; 1: off, as released", COUNT
    )

    @property
    def stride(self):
        """Pixels of an image per patch, along each side."""
        return self.unshuffle * 2 ** (len(self.ch_mult) - 1)


@dataclass
class VQVAEConfig(runs.RunConfig, ImageTokenizerConfig):
    """Settings of the image tokenizer's training: these, the sizes above, and those of plumbing/runs.py."""

    commitment: float = setting(0.25, "weight of the commitment loss beside L1", FROM_0, group="loss and codebook")
    reseed_after: int = setting(100, "a code not chosen for so many updates becomes a latent of the batch", COUNT)

    data_root: str = setting("data/datasets", "folder that holds FashionGen/, BigFACAD/, ...", group="data")
    sets: tuple = setting(data.SETS, "data sets to train on")
    image_size: int = setting(224, "pixels a side, a multiple of 32")
    missing: str = setting("stop", MISSING, choices=("stop", "skip"))
    eval_images: int = setting(1_000, "FashionGen-val images held out to measure on, at most", COUNT)

    batch_size: int = setting(64, "images per update, all processes together", COUNT, group="optimization")
    grad_accum: int = setting(1, "micro-batches per update", COUNT)
    max_steps: int = setting(150_000, "updates", COUNT)
    lr: float = setting(2e-4, "learning rate", FROM_0)
    weight_decay: float = setting(1e-4, "AdamW weight decay", FROM_0)
    warmup: int = setting(2_000, "updates until the full learning rate; 0: none", FROM_0)
    milestones: tuple = setting((100_000, 130_000), "updates at which the learning rate falls to a tenth")


def group_norm(c):
    """GroupNorm of 32 groups, as the original's. The narrow widths of our small configs take the most that divide."""
    return nn.GroupNorm(math.gcd(32, c), c, eps=1e-6)


class ResBlock(nn.Module):
    """conv2(swish(norm2(conv1(swish(norm1(x)))))) + x, with a 1x1 shortcut on x where the widths differ."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(y))) + self.nin_shortcut(x)


class Attention(nn.Module):
    """One head over all positions of the map, with a residual."""

    def __init__(self, c):
        super().__init__()
        self.norm = group_norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))  # (B, 1, HW, C)
        y = F.scaled_dot_product_attention(q, k, v)  # scale C^-.5
        return x + self.proj_out(y.squeeze(1).transpose(1, 2).view(x.shape))


class Level(nn.Module):
    """The residual blocks of one resolution. Attention follows each where the map is the smallest."""

    def __init__(self, c_in, c, n_blocks, is_smallest):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c if i else c_in, c) for i in range(n_blocks))
        self.attn = nn.ModuleList(Attention(c) if is_smallest else nn.Identity() for _ in range(n_blocks))

    def forward(self, x):
        for block, attention in zip(self.block, self.attn, strict=True):
            x = attention(block(x))
        return x


def middle(c):
    """The blocks between the levels and the latents; encoder and decoder have the same ones."""
    return nn.Sequential(OrderedDict(block_1=ResBlock(c, c), attn_1=Attention(c), block_2=ResBlock(c, c)))


def downsample(c):
    """Halves the map. As in the original, it is padded at the right and at the bottom only."""
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, stride=2)))


def upsample(c):
    """Doubles the map."""
    return nn.Sequential(OrderedDict(larger=nn.Upsample(scale_factor=2), conv=nn.Conv2d(c, c, 3, padding=1)))


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, D, H/stride, W/stride). `down.0` is the level of the full resolution."""

    def __init__(self, config):
        super().__init__()
        widths, last = [config.ch * m for m in config.ch_mult], len(config.ch_mult) - 1
        self.unshuffle = nn.PixelUnshuffle(config.unshuffle)
        self.conv_in = nn.Conv2d(3 * config.unshuffle**2, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, c in enumerate(widths):
            level = Level(widths[i - 1] if i else config.ch, c, config.n_blocks, is_smallest=i == last)
            level.downsample = downsample(c) if i < last else nn.Identity()
            self.down.append(level)
        self.mid, self.norm_out = middle(c), group_norm(c)
        self.conv_out = nn.Conv2d(c, config.latent_dim, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(self.unshuffle(x))
        for level in self.down:
            x = level.downsample(level(x))
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """The encoder's mirror, with a block more in each level: (B, D, H/stride, W/stride) -> (B, 3, H, W)."""

    def __init__(self, config):
        super().__init__()
        widths, last = [config.ch * m for m in config.ch_mult], len(config.ch_mult) - 1
        self.conv_in = nn.Conv2d(config.latent_dim, widths[last], 3, padding=1)
        self.mid, self.up = middle(widths[last]), nn.ModuleList()
        for i, c in enumerate(widths):
            before = widths[min(i + 1, last)]  # `forward` runs from the last level, the smallest map, to level 0
            level = Level(before, c, config.n_blocks + 1, is_smallest=i == last)
            level.upsample = upsample(c) if i else nn.Identity()
            self.up.append(level)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3 * config.unshuffle**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(config.unshuffle)

    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level.upsample(level(x))
        return self.shuffle(self.conv_out(F.silu(self.norm_out(x))))


class Codebook(nn.Module):
    """K codes of width D, (K, D), without gradient. `VQVAE.update_codebook` makes them anew at every update.

    `cluster_size` (K,) is the moving average of the number of latents in an update that choose each code. `embed_avg`
    (K, D) is that of their sum. So their quotient, `weight`, is the mean of these latents."""

    def __init__(self, n_codes, dim):
        super().__init__()
        self.register_buffer("weight", torch.randn(n_codes, dim))
        self.register_buffer("cluster_size", torch.ones(n_codes))
        self.register_buffer("embed_avg", self.weight.clone())

    @torch.no_grad()
    def nearest(self, z):
        """(N, D) latents of any float dtype -> (N,) int64, the code at the smallest Euclidean distance."""
        with torch.autocast(z.device.type, enabled=False):
            z, e = z.float(), self.weight.float()
            # ||z - e||^2 less ||z||^2, which is the same for every code
            return torch.addmm(e.square().sum(1), z, e.t(), alpha=-2).argmin(1)


class ImageTokenizer(nn.Module):
    """Images -> codes: encoder, 1x1 convolution, nearest code."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantize = nn.ModuleDict({"embedding": Codebook(config.n_codes, config.latent_dim)})
        self.quant_conv = nn.Conv2d(config.latent_dim, config.latent_dim, 1)
        self.to(memory_format=torch.channels_last)  # what convolutions are fastest on, CPU and GPU

    @property
    def codebook(self):
        return self.quantize["embedding"]

    def latents(self, images):
        """(B, 3, H, W), normalised -> (B, P, D) before quantising, patches in row order.

        Raises ValueError where H or W is not a multiple of the patch size."""
        stride = self.config.stride
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % stride or images.shape[3] % stride:
            raise ValueError(f"images {tuple(images.shape)}: expected (B, 3, H, W), H and W multiples of {stride}")
        images = images.contiguous(memory_format=torch.channels_last)
        grid = self.quant_conv(self.encoder(images))  # (B, D, H/stride, W/stride)
        return grid.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def encode(self, images, at_once=8):
        """(B, 3, H, W) -> (B, P) int64 codes in row order, without gradient. Memory is that of `at_once` images."""
        z = torch.cat([self.latents(part) for part in images.split(at_once)])
        return self.codebook.nearest(z.flatten(0, 1)).view(z.shape[:2])


class VQVAE(ImageTokenizer):
    """The tokenizer with its decoder and the learning of its codebook; only its training needs them."""

    DECAY, EPS = 0.99, 1e-5  # of the codebook's moving averages (docs/recipe.md "Image tokenizer")

    def __init__(self, config):
        super().__init__(config)
        self.post_quant_conv = nn.Conv2d(config.latent_dim, config.latent_dim, 1)
        self.decoder = Decoder(config)
        # (K,): updates since a code was chosen last. At the start that is long ago, so the first update gives a new
        # value to every code that its batch did not choose, as far as there are latents.
        self.register_buffer("idle", torch.full((config.n_codes,), 1_000_000_000))
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        """(B, 3, H, W) -> reconstruction of that shape, commitment loss (), latents (B, P, D) and codes (B, P).

        The latents carry no gradient: they are for `update_codebook`."""
        z = self.latents(images).float()  # (B, P, D)
        codes = self.codebook.nearest(z.flatten(0, 1)).view(z.shape[:2])
        e = self.codebook.weight[codes]  # (B, P, D)
        commitment = F.mse_loss(z, e)
        e = z + (e - z).detach()  # straight-through: the value of the code, the gradient of the latent
        h, w = (side // self.config.stride for side in images.shape[2:])
        grid = e.transpose(1, 2).unflatten(2, (h, w))  # (B, D, h, w)
        return self.decoder(self.post_quant_conv(grid)), commitment, z.detach(), codes

    @torch.no_grad()
    def update_codebook(self, z, codes, reseed_after):
        """One step of the codebook on this process's latents z (N, D) float32 and their codes (N,) int64.

        It takes the latents of all processes together. A code that was idle for `reseed_after` updates becomes one of
        these latents. What is drawn comes from torch's CPU generator, which the caller seeds alike on every process.
        Returns how often each code was chosen by all processes, (K,) float32.
        Source: moving averages of van den Oord et al. 2017, A.1; docs/recipe.md "Image tokenizer"."""
        # The sum and the number of the latents of each code, over all processes: one tensor, so one collective.
        book = self.codebook
        K, D = book.weight.shape
        rows = torch.cat([z.float(), z.new_ones(len(z), 1)], 1)  # (N, D + 1): the column of ones counts
        sums = all_mean(z.new_zeros(K, D + 1).index_add_(0, codes, rows)) * world_size()
        counts = sums[:, D].round()  # exact again after the mean

        # The moving averages of both, and each code as their quotient.
        book.embed_avg.lerp_(sums[:, :D], 1 - self.DECAY)
        book.cluster_size.lerp_(counts, 1 - self.DECAY)
        total = book.cluster_size.sum()
        smooth = (
            (book.cluster_size + self.EPS) / (total + K * self.EPS) * total
        )  # Laplace smoothing: never 0, same total
        book.weight.copy_(book.embed_avg / smooth.unsqueeze(1))

        # Idle codes start anew. A latent far from all codes is likelier to be picked, as in k-means++. With equal
        # chances most new codes would be copies of the white background.
        self.idle.copy_(torch.where(counts > 0, 0, self.idle + 1))
        dead = (self.idle >= reseed_after).nonzero().squeeze(1)
        if len(dead):
            z = gather_with_gradient(z.float())
            far = (z - book.weight[book.nearest(z)]).square().sum(1).cpu() + 1e-12
            picks = torch.multinomial(far, min(len(dead), len(z))).to(z.device)
            dead = dead[: len(picks)]
            book.weight[dead] = book.embed_avg[dead] = z[picks]
            book.cluster_size[dead] = 1.0
            self.idle[dead] = 0
        return counts


TRAINING_ONLY = ("decoder.", "post_quant_conv.", "idle")  # parts of our file that `ImageTokenizer` does without


def random_image_tokenizer(config):
    """A frozen ImageTokenizer of an ImageTokenizerConfig with random weights, in eval mode; its codes mean nothing."""
    return ImageTokenizer(config).requires_grad_(False).eval()


def load_image_tokenizer(path, device="cpu"):
    """The ImageTokenizer of a file, frozen, in eval mode: of our last.pt, of a released encoder, or of a pre-training
    file of the original, which holds one. The tensors tell the sizes.

    Raises InputError where a tensor is missing or has another shape, and where patches are not those of the ResNet."""
    state, _ = weights.read_weights(path, ("image_tokenizer",), "image_tokenizer")
    state = {name: tensor for name, tensor in state.items() if not name.startswith(TRAINING_ONLY)}
    with reading(path, "no image tokenizer in it"):
        tokenizer = random_image_tokenizer(read_sizes(state))
    checkpoint.check_names(path, tokenizer.state_dict(), state)
    check_patches(path, tokenizer.config)
    tokenizer.load_state_dict(state)
    return tokenizer.to(device)


def prepare_image_tokenizer(config, device):
    """The frozen image tokenizer of MPFC for a PretrainConfig, or None where MPFC is not trained.

    A random start without a file makes do with random codes, and says so. Raises InputError where none can be had."""
    if not config.objectives.get("mpfc"):
        return None
    path = config.image_tokenizer
    if config.init == "random" and not Path(path).is_file():
        print(f"image tokenizer: no file at {path!r}; --init=random goes on with random codes")
        return random_image_tokenizer(ImageTokenizerConfig()).to(device)
    if not path:
        raise InputError("image_tokenizer: MPFC needs one; train it with vqvae.py and set --image_tokenizer=FILE")
    return load_image_tokenizer(path, device)


def read_sizes(state):
    """The ImageTokenizerConfig of a state dict's tensors. Raises KeyError with the name that is missing."""
    conv_in = state["encoder.conv_in.weight"]  # (ch, 3 unshuffle^2, 3, 3)
    # Names are encoder.down.LEVEL.block.BLOCK.conv1.weight, so the numbers in them say how many there are.
    n_codes, latent_dim = state["quantize.embedding.weight"].shape
    n_levels = len({name.split(".")[2] for name in state if name.startswith("encoder.down.")})
    n_blocks = len({name.split(".")[4] for name in state if name.startswith("encoder.down.0.block.")})
    widths = [len(state[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(n_levels)]
    ch, unshuffle = len(conv_in), math.isqrt(conv_in.shape[1] // 3)
    return ImageTokenizerConfig(ch, tuple(width // ch for width in widths), n_blocks, latent_dim, n_codes, unshuffle)


def check_patches(where, sizes):
    """Raise InputError where the patches are not those of the ResNet, for MPFC predicts the code of each of them."""
    if sizes.stride != settings.STRIDE:
        found = f"{len(sizes.ch_mult)} levels and unshuffle {sizes.unshuffle} make patches of {sizes.stride} pixels"
        raise InputError(f"{where}: {found}, expected {settings.STRIDE} as the ResNet's")


def check_config(config):
    """Raise InputError for a setting out of its limits or sizes that cannot be."""
    settings.check_limits(config)
    if not config.ch_mult or not all(type(m) is int and m > 0 for m in config.ch_mult):
        raise InputError(f"ch_mult: found {config.ch_mult}, expected whole numbers from 1, one a level")
    check_patches("ch_mult", config)


def usage(counts):
    """How often each code was chosen (K,) -> {"perplexity": exponential of the entropy, 1..K; "codes_used": int}."""
    share = counts.double() / counts.sum().clamp(min=1)
    return {"perplexity": float(torch.special.entr(share).sum().exp()), "codes_used": int((counts > 0).sum())}


@torch.no_grad()
def validate(model, images, device, chunk):
    """Metrics on images uint8 (n, 3, S, S), `chunk` at a time: code usage, and L1 in units of the normalised pixel.

    l1_mean_image is the L1 of a trivial answer, the mean image."""
    model.eval()
    mean_image = sum(data.normalize(part.to(device)).sum(0) for part in images.split(chunk)) / len(images)
    l1, l1_mean_image, counts = 0.0, 0.0, 0
    for part in images.split(chunk):
        part = data.normalize(part.to(device))
        reconstruction, _, _, codes = model(part)
        l1 += float(F.l1_loss(reconstruction, part)) * len(part) / len(images)
        l1_mean_image += float((mean_image - part).abs().mean()) * len(part) / len(images)
        counts += torch.bincount(codes.flatten(), minlength=model.config.n_codes)
    return {"l1": l1, "l1_mean_image": l1_mean_image, **usage(counts)}


def train(config, processes):
    """The whole stage on this process. Returns (model, held-out metrics of the main process, {} on others)."""
    check_config(config)
    is_main, device = processes.is_main, processes.device
    torch.manual_seed(config.seed)  # every process starts from the same weights

    # The data: products to train on, and images to measure on.
    products, held_out = data.image_tokenizer_products(config)
    held_out = data.load_pixels(held_out, config.image_size) if is_main else []  # uint8 (n, 3, S, S)

    # The model. Its optimizer has encoder and decoder; the codebook has no gradient.
    model = VQVAE(config).to(device)

    # The bookkeeping, which resumes an earlier run where config.resume says so.
    counts = torch.zeros(config.n_codes, device=device)  # how often a code was chosen since the last log line
    run = runs.Run(config, processes, model, {"kind": "image_tokenizer"})

    # The order of the samples, and their batches for the updates that are left.
    sampler = data.BatchSampler(len(products), config, processes, run.start, lambda step: "reconstruction")
    items = [{"images": product.images, "name": product.name} for product in products]
    dataset = data.TrainingSamples(items, None, data.resize_then_crop, config, 0, data.pick_image)
    loader = iter(data.train_loader(dataset, sampler, config, device))

    # What the user sees at the start.
    report = [f"{len(products)} products, {len(held_out)} images held out"]
    run.open(sampler, lambda row: products[row].name, report)

    # The model that is compiled where that is set, and that averages gradients over processes. DDP also copies the
    # codebook of the main process to all before every forward, so it does not drift by rounding.
    if config.compile:
        model.encoder.compile()
        model.decoder.compile()
    ddp = processes.distribute(model)

    def measure():
        run.end_validation(validate(model, held_out, device, config.eval_batch_size) if is_main else {})

    # The earlier run may have ended while it validated.
    if run.validation_due:
        measure()

    for step in run.steps():
        # The batches of this update. A run that was asked to stop, or lost a loader worker, saves and ends here.
        batches = run.next_batches(loader)

        # The learning rate follows from the update's number alone. So does what is picked at random: all processes draw
        # as rank 0 does, because all must restart the same idle codes with the same latents.
        run.set_lr(step)
        processes.seed(config.seed, step, rank=0)
        model.train()
        run.optimizer.zero_grad()

        latents, chosen = [], []  # of the micro-batches: (N, D) and (N,)
        for micro, batch in enumerate(batches):
            # One micro-batch goes to the device.
            run.skipped_images += int(batch["skipped"].sum())
            images = data.to_device(batch, device)["image"]  # (B, 3, S, S)

            # The loss of one micro-batch, then its gradients, averaged over processes in the last micro-batch.
            with processes.averaging(ddp, micro == config.grad_accum - 1):
                with processes.autocast(config.dtype):
                    reconstruction, commitment, z, codes = ddp(images)
                l1 = F.l1_loss(reconstruction.float(), images)
                loss = l1 + config.commitment * commitment
                run.scaler.scale(loss / config.grad_accum).backward()
            run.add("", loss, {"l1": l1.detach(), "commitment": commitment.detach()})
            latents.append(z.flatten(0, 1))
            chosen.append(codes.flatten())

        # The update, then that of the codebook. The scaler divides the gradients by its scale; only float16 has one.
        run.scaler.step(run.optimizer)
        run.scaler.update()
        counts += model.update_codebook(torch.cat(latents), torch.cat(chosen), config.reseed_after)

        # What is due after this update: a log line, a checkpoint, a validation.
        run.end_update(step)
        if run.log_due:
            run.log(**usage(counts))
            counts.zero_()
        if run.save_due:
            run.save()
        if run.validation_due:
            measure()

    if is_main:
        metrics = "  ".join(f"{name} {value:.3g}" for name, value in run.metrics.items())
        print(f"written: {config.out_dir}/last.pt; held-out images: {metrics}")
    return model, run.metrics


if __name__ == "__main__":
    runs.main(VQVAEConfig, train, __doc__)
