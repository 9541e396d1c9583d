"""The model against second implementations: torchvision's ResNet, torch's Transformer layer, hand-made masks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data  # noqa: F401  (makes torchvision importable on a CPU-only torch)
from model import RESNETS, SIZES, FashionViL, ModelConfig, Places, ResNet, masked_mean


def tiny(**changes):
    """A small FashionViL in eval mode: 64 px images give 2 x 2 patches."""
    torch.manual_seed(0)
    sizes = dict(resnet="resnet18", width=8, vocab_size=50, n_codes=16, n_attributes=12, **SIZES["tiny"])
    return FashionViL(ModelConfig(**{**sizes, **changes})).eval()


@pytest.mark.parametrize("name", RESNETS)
@pytest.mark.parametrize("training", [False, True])
def test_resnet_equals_torchvisions(name, training):
    import torchvision

    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(weights=None)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.weight, 1.0, 0.1)
    ours = ResNet(name)
    names = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    assert set(ours.state_dict()) == set(names)
    ours.load_state_dict(names)
    images = torch.randn(4, 3, 96, 64)
    ours.train(training), theirs.train(training)
    theirs.avgpool, theirs.fc = nn.Identity(), nn.Identity()
    with torch.no_grad():
        expected = theirs(images).view(4, ours.out_channels, 6).transpose(1, 2)  # (B, P, C), row order
        result = ours(images)
    assert result.shape == expected.shape
    # statistics of a batch of 24 last-stage positions amplify rounding
    assert (result - expected).abs().max() < (1e-3 if training else 1e-5) * expected.abs().max()
    mean = (ours.bn1.running_mean - theirs.bn1.running_mean).abs().max()
    assert mean < 1e-6 and (not training or ours.bn1.running_mean.abs().max() > 0)


def test_layers_equal_torchs_encoder_layers():
    config = ModelConfig(resnet="resnet18", width=8, vocab_size=50, **SIZES["tiny"])
    model = FashionViL(config).eval()
    x, lengths = torch.randn(3, 9, config.hidden_size), torch.tensor([9, 4, 7])
    mask = torch.arange(9)[None] < lengths[:, None]
    theirs, seen_at = model.bert.embeddings.norm_and_dropout(x), Places(mask)
    ours = seen_at.pick(theirs)  # (64, D): the 20 seen tokens, and the first of them again
    assert torch.equal(ours, theirs[mask][[*range(20), *44 * [0]]])
    assert torch.equal(seen_at.put(ours), theirs * mask[..., None])
    for layer in model.bert.encoder["layer"]:
        other = nn.TransformerEncoderLayer(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            activation="gelu",
            layer_norm_eps=1e-12,
            batch_first=True,
        ).eval()
        s = layer.attention["self"]
        other.self_attn.in_proj_weight.data = torch.cat([s[n].weight for n in ("query", "key", "value")])
        other.self_attn.in_proj_bias.data = torch.cat([s[n].bias for n in ("query", "key", "value")])
        pairs = [
            (other.self_attn.out_proj, layer.attention["output"]["dense"]),
            (other.norm1, layer.attention["output"]["LayerNorm"]),
            (other.linear1, layer.intermediate["dense"]),
            (other.linear2, layer.output["dense"]),
            (other.norm2, layer.output["LayerNorm"]),
        ]
        for to, source in pairs:
            to.load_state_dict(source.state_dict())
        theirs = other(theirs, src_key_padding_mask=~mask)
        before, ours = ours, layer(ours, seen_at, ours, seen_at)
    assert (ours[:20] - theirs[mask]).abs().max() < 1e-5
    some = torch.zeros(3, 9, dtype=torch.bool)
    some[0, 0] = some[1, 0] = some[2, 1] = True  # the packed tokens 0, 9 and 14
    some_at = Places(some)
    found = layer(some_at.pick(seen_at.put(before)), some_at, before, seen_at)
    assert (found[:3] - ours[[0, 9, 14]]).abs().max() < 1e-6


def test_hidden_states_that_are_read_are_those_of_all():
    model = tiny()
    ids, image = torch.randint(5, 50, (3, 11)), torch.randn(3, 3, 64, 64)
    mask = torch.arange(11)[None] < torch.tensor([11, 4, 7])[:, None]
    read_text, read_patches = torch.rand(3, 11) < 0.3, torch.rand(3, 4) < 0.3
    read_text &= mask
    with torch.no_grad():
        text, patches = model.encode_joint(ids, mask, image)
        assert not text[~mask].any()  # padding
        some, none = model.encode_joint(ids, mask, image, read_text=read_text)
        assert (some - text)[read_text].abs().max() < 1e-6 and not some[~read_text].any() and not none.any()
        none, some = model.encode_joint(ids, mask, image, read_patches=read_patches)
        assert (some - patches)[read_patches].abs().max() < 1e-6 and not some[~read_patches].any() and not none.any()
        assert (model.encode_pair(ids, mask, image) - model.bert.pool(text)).abs().max() < 1e-6


def test_padding_and_batch_do_not_change_an_embedding():
    model = tiny()
    ids, image = torch.randint(5, 50, (3, 11)), torch.randn(3, 3, 64, 64)
    lengths = [11, 4, 7]
    mask = (torch.arange(11)[None] < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        text, composed = model.encode_text(ids, mask), model.encode_composed(ids, mask, image)
        for i, n in enumerate(lengths):
            alone = ids[i : i + 1, :n], mask[i : i + 1, :n]
            assert (model.encode_text(*alone) - text[i]).abs().max() < 1e-5
            assert (model.encode_composed(*alone, image[i : i + 1]) - composed[i]).abs().max() < 1e-5


def test_dropped_patches_are_those_that_attention_and_mean_leave_out():
    model = tiny()
    ids, mask = torch.randint(5, 50, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    image = torch.randn(2, 3, 64, 64)
    keep = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1]]).bool()
    with torch.no_grad():
        embeddings = model.bert.embeddings
        tokens = torch.cat([embeddings.text(ids), embeddings.image(model.patches(image))], 1)
        hidden = model.bert(tokens, torch.cat([mask, keep.long()], 1).bool())
        expected = masked_mean(hidden[:, 6:], keep)
        assert (model.encode_composed(ids, mask, image, keep) - expected).abs().max() < 1e-5


def test_four_ways_in_depend_on_what_they_should():
    model = tiny()
    ids, mask = torch.randint(5, 50, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = model.patches(image)
        projected = F.linear(features, model.bert.embeddings.projection.weight, model.bert.embeddings.projection.bias)
        assert torch.allclose(model.encode_image(image), projected.mean(1), atol=1e-6)  # no positions, no Transformer
        text, patches = model.encode_joint(ids, mask, image)
        assert text.shape == (2, 6, 64) and patches.shape == (2, 4, 64)
        assert torch.allclose(model.encode_composed(ids, mask, features), patches.mean(1), atol=1e-6)
    scaled = model.scaled(torch.randn(5, 64))
    assert torch.allclose(scaled.norm(dim=1), torch.full((5,), 4.0))


def test_image_side_tables_start_as_copies_of_the_text_side():
    embeddings = tiny().bert.embeddings
    for table in ("position_embeddings", "token_type_embeddings"):
        text, image = getattr(embeddings, table).weight, getattr(embeddings, table + "_visual").weight
        assert torch.equal(text, image) and text.data_ptr() != image.data_ptr()


def test_pac_head_is_a_cosine():
    head = tiny(pac_scale=3.0).heads["pac"]
    x = torch.randn(4, 64)
    for i in range(4):
        for a in range(12):
            cosine = F.cosine_similarity(x[i], head.projection[:, a], dim=0)
            assert abs((head(x)[i, a] - 3 * cosine).item()) < 1e-5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"heads": ("itm", "itx")}, "itx"),
        ({"heads": ("recognition",)}, "n_classes"),
        ({"resnet": "resnet99"}, "resnet99"),
        ({"hidden_size": 65}, "65"),
    ],
)
def test_impossible_configs_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_initial_weights_keep_berts_proportion():
    """std .02 at width 768, as BERT; twice that at 192, for the sum of 192 terms is half as wide."""
    for size, std in (("base", 0.02), ("mini", 0.04)):
        config = ModelConfig(resnet="resnet18", width=8, vocab_size=50, **{**SIZES[size], "num_hidden_layers": 1})
        weights = FashionViL(config).bert.encoder["layer"][0].intermediate["dense"].weight
        assert float(weights.detach().std()) == pytest.approx(std, rel=0.02)
