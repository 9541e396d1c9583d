"""The image tokenizer: golden codes, nearest code, codebook updates, files, training and resume."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import ONE, in_two_processes
from soak import read_log, same_runs
from torch.utils.flop_counter import FlopCounterMode

import data
import pretrain
import vqvae
from model import ResNet
from plumbing import annotations, checkpoint, photos, runs, settings

HERE = Path(__file__).parent
TINY = vqvae.ImageTokenizerConfig(ch=8, ch_mult=(1, 2, 4), n_blocks=1, latent_dim=16, n_codes=12, unshuffle=8)


def make_vqvae(seed=0, config=TINY):
    torch.manual_seed(seed)
    return vqvae.VQVAE(config)


def make_latents(n=40, seed=1):
    return torch.randn(n, TINY.latent_dim, generator=torch.Generator().manual_seed(seed))


def test_names_and_shapes_are_the_released_encoders():
    lines = (HERE / "golden" / "keys_vqvae.txt").read_text().splitlines()
    expected = {line.split("\t")[0]: line.split("\t")[1] for line in lines if not line.startswith("#")}
    with torch.device("meta"):
        state = vqvae.ImageTokenizer(vqvae.ImageTokenizerConfig()).state_dict()
    assert {name: str(tuple(value.shape)) for name, value in state.items()} == expected


# ---- codes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", [False, True])
def test_nearest_is_the_smallest_euclidean_distance(amp):
    codebook = vqvae.Codebook(200, 32)
    z = 2 * torch.randn(1000, 32) + 0.5
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        found = codebook.nearest(z)
    distance = torch.cdist(z.double(), codebook.weight.double(), compute_mode="donot_use_mm_for_euclid_dist")
    best = distance.topk(2, largest=False)
    clear = best.values[:, 1] - best.values[:, 0] > 1e-4
    assert clear.sum() > 900
    assert torch.equal(found[clear], best.indices[clear, 0])


def test_codes_are_in_row_order_and_can_be_labels():
    tokenizer = vqvae.random_image_tokenizer(TINY)
    images = torch.randn(3, 3, 64, 96)
    codes = tokenizer.encode(images)
    assert codes.shape == (3, 6) and codes.dtype == torch.int64
    # a forward hook cannot tell rows from columns, so go by the definition: map (B, D, 2, 3), rows first
    z = tokenizer.quant_conv(tokenizer.encoder(images))
    for row in range(2):
        for column in range(3):
            assert torch.equal(codes[:, 3 * row + column], tokenizer.codebook.nearest(z[:, :, row, column]))
    logits = torch.randn(18, TINY.n_codes, requires_grad=True)
    F.cross_entropy(logits, codes.flatten()).backward()  # refused for tensors made in inference mode
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(1, 3, 64, 60), (1, 1, 64, 64), (3, 64, 64)])
def test_wrong_image_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="multiples of 32"):
        vqvae.random_image_tokenizer(TINY).encode(torch.zeros(shape))


# ---- learning --------------------------------------------------------------------------------------------------------


def test_straight_through_and_commitment_gradients(monkeypatch):
    model = make_vqvae()
    z = make_latents(8).view(2, 4, -1).requires_grad_()
    monkeypatch.setattr(model, "latents", lambda images: z)
    monkeypatch.setattr(model, "post_quant_conv", torch.nn.Identity())
    monkeypatch.setattr(model, "decoder", torch.nn.Identity())
    grid, commitment, detached, codes = model(torch.zeros(2, 3, 64, 64))
    e = grid.flatten(2).transpose(1, 2)  # (B, P, D)
    assert torch.allclose(e, model.codebook.weight[codes], atol=1e-6)  # the value is the code's ...
    g = torch.randn(e.shape)
    (e * g).sum().backward(retain_graph=True)
    assert torch.equal(z.grad, g)  # ... the gradient goes to the latent as it is
    z.grad = None
    commitment.backward()
    assert torch.allclose(z.grad, 2 * (z.detach() - model.codebook.weight[codes]) / z.numel())
    assert not detached.requires_grad


def test_moving_averages_against_a_loop():
    model = make_vqvae()
    model.idle.zero_()  # nothing is dead
    book = model.codebook
    book.embed_avg.copy_(torch.randn(12, 16))
    size, total = book.cluster_size.double().tolist(), book.embed_avg.double()
    for step in range(3):
        z = make_latents(seed=step)
        codes = book.nearest(z)
        counts = model.update_codebook(z, codes, reseed_after=100)
        for k in range(12):
            members = [z[i].double() for i in range(len(z)) if codes[i] == k]
            assert counts[k] == len(members)
            size[k] = 0.99 * size[k] + 0.01 * len(members)
            total[k] = 0.99 * total[k] + 0.01 * sum(members, torch.zeros(16).double())
        for k in range(12):
            smooth = (size[k] + 1e-5) / (sum(size) + 12 * 1e-5) * sum(size)
            assert torch.allclose(book.weight[k].double(), total[k] / smooth, rtol=1e-5, atol=1e-6)
    assert torch.allclose(book.cluster_size.double(), torch.tensor(size).double(), rtol=1e-5)


def test_reseeding_touches_only_dead_codes():
    with_reseeding, without = make_vqvae(), make_vqvae()
    z = make_latents()
    codes = torch.arange(40) % 6  # codes 6.. are not chosen
    for model in (with_reseeding, without):
        model.idle.copy_(torch.tensor([50] * 6 + [8] * 3 + [9] * 3))  # after this update 9 and 10
    with_reseeding.update_codebook(z, codes, reseed_after=10)
    without.update_codebook(z, codes, reseed_after=1000)
    new, old = with_reseeding.codebook.state_dict(), without.codebook.state_dict()
    for name in new:
        assert torch.equal(new[name][:9], old[name][:9]), name
    picked = torch.cdist(new["weight"][9:], z).argmin(1)
    assert torch.equal(new["weight"][9:], z[picked]) and len(picked.unique()) == 3  # three different latents
    assert torch.equal(new["embed_avg"][9:], z[picked])
    assert with_reseeding.idle.tolist() == [0] * 6 + [9] * 3 + [0] * 3
    assert without.idle.tolist() == [0] * 6 + [9] * 3 + [10] * 3


def test_the_first_batch_seeds_every_unused_code_that_it_can():
    model = make_vqvae()
    z = make_latents(5)
    codes = model.codebook.nearest(z)
    model.update_codebook(z, codes, reseed_after=3)
    seeded = (model.codebook.weight[:, None] == z).all(2)  # (K, N)
    assert seeded.sum(0).tolist() == [1] * 5  # five latents make five codes, the rest wait for the next batch
    assert not seeded[codes.unique()].any()
    assert (model.idle > 3).sum() == 12 - 5 - len(codes.unique())


def codebook_after_three_updates(rank, world_size):
    model, n = make_vqvae(), 40 // world_size
    for step in range(3):
        z = make_latents(seed=step)[rank * n : (rank + 1) * n]
        ONE.seed(0, step, rank=0)
        model.update_codebook(z, model.codebook.nearest(z), reseed_after=2)
    return {**model.codebook.state_dict(), "idle": model.idle}


def test_two_processes_learn_the_codebook_of_one(free_port, tmp_path):
    one = codebook_after_three_updates(0, 1)
    for state in in_two_processes(codebook_after_three_updates, free_port, tmp_path, 2):
        for name, value in state.items():
            assert torch.allclose(value, one[name], rtol=1e-5, atol=1e-6), name


def test_overfits_four_images():
    model = make_vqvae()
    colours = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(colours, scale_factor=16)  # (4, 3, 64, 64): 4 x 4 squares of one colour
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        reconstruction, commitment, z, codes = model(images)
        assert reconstruction.shape == images.shape
        (F.l1_loss(reconstruction, images) + 0.25 * commitment).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_codebook(z.flatten(0, 1), codes.flatten(), reseed_after=10)
    metrics = vqvae.validate(model, ((images * 0.1 + 0.5) * 255).clamp(0, 255).byte(), torch.device("cpu"), chunk=64)
    trivial = min((images - images.mean(0)).abs().mean(), (images - images.mean((2, 3), keepdim=True)).abs().mean())
    assert F.l1_loss(model(images)[0], images) < 0.5 * trivial
    assert metrics["codes_used"] > 4


def test_validate_counts_what_it_says():
    model = make_vqvae().eval()
    images = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    metrics = vqvae.validate(model, images, torch.device("cpu"), chunk=2)
    x = data.normalize(images)
    with torch.no_grad():
        reconstruction, _, _, codes = model(x)
    expected = {
        "l1": F.l1_loss(reconstruction, x),
        "l1_mean_image": (x - x.mean(0)).abs().mean(),
        "codes_used": len(codes.unique()),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-4), name
    assert vqvae.usage(torch.tensor([5.0, 5.0, 5.0, 5.0, 0.0])) == {"perplexity": pytest.approx(4.0), "codes_used": 4}
    assert vqvae.usage(torch.tensor([0.0, 7.0])) == {"perplexity": pytest.approx(1.0), "codes_used": 1}


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["ours", "bare", "inside", "inside multi-gpu", "model"])
def test_loaded_codes_are_those_that_were_saved(layout, tmp_path):
    model = make_vqvae().eval()
    images, path = torch.randn(2, 3, 64, 64), tmp_path / "file.pt"
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(vqvae.TRAINING_ONLY)}
    inside = {f"model.image_tokenizer.{k}": v for k, v in own.items()}
    inside["model.contrastive_norm.norm_s"] = torch.ones(1)
    if layout == "ours":
        checkpoint.save(path, {"kind": "image_tokenizer", "model": model.state_dict(), "step": 1})
    else:
        files = {
            "bare": own,
            "inside": inside,
            "inside multi-gpu": {"model": {f"module.{k}": v for k, v in inside.items()}, "num_updates": 3},
            "model": {"model": own},
        }
        torch.save(files[layout], path)
    tokenizer = vqvae.load_image_tokenizer(path)
    assert tokenizer.config == TINY
    assert torch.equal(tokenizer.encode(images), model.encode(images))
    assert not tokenizer.training and not any(p.requires_grad for p in tokenizer.parameters())


def test_files_that_are_no_tokenizer_end_in_one_line(tmp_path):
    state, path = vqvae.random_image_tokenizer(TINY).state_dict(), tmp_path / "file.pt"
    conv = "encoder.mid.block_1.conv1.weight"
    for broken, said in (
        ({"fc.weight": torch.ones(2, 2)}, "found fc.weight, expected those of .* or VQ-VAE"),
        ({"model.contrastive_norm.norm_s": torch.ones(1)}, "fashionvil weights, expected image_tokenizer"),
        ({k: v for k, v in state.items() if k != conv}, conv),
        ({**state, "encoder.extra.weight": torch.ones(1)}, "encoder.extra.weight"),
        ({**state, conv: torch.ones(3, 3)}, conv),
    ):
        torch.save(broken, path)
        with pytest.raises(settings.InputError, match=said) as error:
            vqvae.load_image_tokenizer(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


# ---- the stage -------------------------------------------------------------------------------------------------------


def make_config(root, out_dir, **changes):
    sizes = {name: getattr(TINY, name) for name in ("ch", "ch_mult", "n_blocks", "latent_dim", "n_codes", "unshuffle")}
    run = dict(sets=("FashionGen",), image_size=64, eval_images=3, workers=0, device="cpu")
    run |= dict(batch_size=4, grad_accum=2, lr=1e-3, warmup=2, milestones=(4,), reseed_after=2)
    run |= dict(max_steps=6, log_interval=3, eval_interval=3)
    return vqvae.VQVAEConfig(data_root=str(root), out_dir=str(out_dir), **{**run, **sizes, **changes})


def run_stage(config):
    return vqvae.train(config, ONE)


def test_a_resumed_run_is_the_uninterrupted_one(root, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    model, metrics = run_stage(make_config(root, whole))

    save = checkpoint.save

    def save_and_die(path, state):
        save(path, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", save_and_die)
        run_stage(make_config(root, parts))  # after update 3
    runs.append_log(parts / "log.jsonl", {"step": 4, "l1": 0.0})  # as if it had got further than its checkpoint
    resumed, resumed_metrics = run_stage(make_config(root, parts, resume="auto"))

    assert metrics == resumed_metrics
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in model.state_dict().items())
    assert [row["step"] for row in read_log(whole)] == [3, 3, 6, 6]
    same_runs(whole, parts)
    with pytest.raises(settings.InputError, match=r"does not fit the model: .*\(12, 16\), expected \(13, 16\)"):
        run_stage(make_config(root, parts, resume="auto", n_codes=13))


def test_the_stage_writes_a_tokenizer(root, tmp_path):
    model, metrics = run_stage(make_config(root, tmp_path / "run", max_steps=3, dtype="bfloat16"))
    images = torch.randn(2, 3, 64, 96)
    assert torch.equal(vqvae.load_image_tokenizer(tmp_path / "run" / "last.pt").encode(images), model.encode(images))
    row = read_log(tmp_path / "run")[0]
    assert row["loss"] == pytest.approx(row["l1"] + 0.25 * row["commitment"])
    _, held_out = data.image_tokenizer_products(make_config(root, ""))
    held_out = data.load_pixels(held_out, 64)
    assert held_out.shape == (3, 3, 64, 64)
    assert metrics == vqvae.validate(model, held_out, torch.device("cpu"), chunk=64)


def test_held_out_images_that_are_broken(root, tmp_path):
    products = annotations.load_products(root, "FashionGen", "val")[:3]
    first, *others = (Path(product.images[0]) for product in products)
    first.unlink()  # it is a link to a file of other tests
    first.touch()
    with pytest.raises(settings.InputError, match=rf"{first}: image is missing; 1 of 3 images of FashionGen val are"):
        run_stage(make_config(root, tmp_path / "run"))
    config = make_config(root, tmp_path / "run", missing="skip", max_steps=2)
    assert len(data.image_tokenizer_products(config)[1]) == 2
    run_stage(config)
    for photo in others:
        photo.unlink()
        photo.write_bytes(b"no image")
    photos.is_readable.cache_clear()
    with pytest.raises(settings.InputError, match="^FashionGen val: none of its 3 images can be read"):
        data.image_tokenizer_products(config)


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(ch_mult=(1, 2)), "patches of 16 pixels, expected 32"),
        (dict(ch_mult=(1, 2.5, 4)), "ch_mult"),
        (dict(image_size=40), "image_size"),
        (dict(n_codes=0), "n_codes"),
    ],
)
def test_wrong_settings_end_in_one_line(changes, said, root, tmp_path):
    with pytest.raises(settings.InputError, match=said):
        run_stage(make_config(root, tmp_path / "run", **changes))


@pytest.mark.parametrize("name", ["demo", "mini", "fashionall"])
def test_tokenizer_config_fits_the_pretraining_config(name):
    """Same data and image size; in the small ones the tokenizer costs less than half of the ResNet's arithmetic."""
    configs = HERE.parent / "configs"
    ours = settings.load_config(vqvae.VQVAEConfig, [str(configs / f"vqvae_{name}.py")])
    theirs = settings.load_config(pretrain.PretrainConfig, [str(configs / f"{name}.py")])
    assert (ours.data_root, ours.image_size) == (theirs.data_root, theirs.image_size)
    vqvae.check_config(ours)
    if name == "fashionall":
        assert vars(ours).items() >= vars(vqvae.ImageTokenizerConfig()).items()
        return
    assert theirs.image_tokenizer == f"{ours.out_dir}/last.pt"
    flops = []
    for part in (vqvae.ImageTokenizer(ours).latents, ResNet(theirs.resnet, theirs.width)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            part(torch.zeros(1, 3, ours.image_size, ours.image_size))
        flops.append(counter.get_total_flops())
    assert flops[0] < 0.5 * flops[1]
