"""Data: tokens against BERT's, mask statistics against the original's, the order of batches, images, files."""

import io
import itertools
import json
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import data
import pretrain
from plumbing import annotations, photos, weights
from plumbing.processes import Processes
from plumbing.settings import InputError

SHARED = Path(__file__).parents[2] / "shared" / "data"
VOCAB = SHARED / "bert-base-uncased" / "vocab.txt"
METRICS = torch.load(Path(__file__).parent / "golden" / "metrics.pt", weights_only=True)
SLICES = Path(__file__).parent / "slices"  # of BERT's vocabulary and of FashionIQ's captions; all of them are in SHARED
needs_vocab = pytest.mark.skipif(not VOCAB.exists(), reason="needs shared/data")
SMALL_VOCAB = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "dress", "##es", "a"])


# ---- text ------------------------------------------------------------------------------------------------------------


BERTS = [
    ("hello world", "[CLS] hello world [SEP]", [101, 7592, 2088, 102]),
    ("Hello,  WORLD", "[CLS] hello , world [SEP]", [101, 7592, 1010, 2088, 102]),
    ("café", "[CLS] cafe [SEP]", [101, 7668, 102]),  # accents are stripped
    ("hello\u200b\x00 world", "[CLS] hello world [SEP]", [101, 7592, 2088, 102]),  # control characters vanish
    ("", "[CLS] [SEP]", [101, 102]),
    ("\U0001f457", "[CLS] [UNK] [SEP]", [101, 100, 102]),  # an emoji is [UNK]
    ("x" * 101, "[CLS] [UNK] [SEP]", [101, 100, 102]),  # and so is a word of over 100 characters
    ("[MASK] hello", "[CLS] [MASK] hello [SEP]", [101, 103, 7592, 102]),
]


@pytest.mark.parametrize("vocab", [SLICES / "vocab.txt", pytest.param(VOCAB, marks=needs_vocab)])
@pytest.mark.parametrize("text, tokens, ids", BERTS)
def test_tokens_and_ids_are_berts(text, tokens, ids, vocab):
    tokenizer = weights.wordpiece(vocab.read_text(encoding="utf-8"))
    found = data.tokenize(tokenizer, [text])[0].ids
    assert [tokenizer.id_to_token(i) for i in found] == tokens.split()
    assert vocab != VOCAB or found == ids  # a slice has other numbers


def test_long_text_is_cut_to_the_limit_with_sep_last():
    tokenizer = weights.wordpiece(SMALL_VOCAB)
    ids, words = data.tokenize(tokenizer, ["red " * 10_000])[0]
    assert len(ids) == len(words) == 75 and ids[0] == 2 and ids[-1] == 3 and set(ids[1:-1]) == {5}


@pytest.mark.parametrize(
    "texts, said",
    [
        (["red dress"] * 49 + ["red платье"], ""),  # 1 of 100
        (["red dress"] * 24 + ["red платье"], ""),  # 1 of 50 is not above 2 %
        (["red dress"] * 23 + ["red платье"], "texts: 2.1% of their 48 word pieces are [UNK]"),
        (["red платье", "красное dress"], "texts: 50.0% of their 4 word pieces are [UNK]"),
        (["red платье", "red 드레스", "", "красное"], "stop: texts: 60.0% of their 5 word pieces are [UNK]"),
        (["ชุดเดรสสีแดง"], "stop: texts: 100.0% of their 1 word pieces are [UNK]"),
        (["ชุดเดรสสีแดง."], "stop: texts: 100.0% of their 1 word pieces are [UNK]"),  # a title without description
        ([], ""),
        (["", " "], ""),
    ],
)
def test_unknown_words_are_counted(texts, said, capsys):
    data.check_unknown.cache_clear()  # another test may have had as many
    tokenizer = weights.wordpiece(SMALL_VOCAB + "\n.")
    try:
        data.Texts(tokenizer, texts, 9), data.Texts(tokenizer, texts, 9)
        found = capsys.readouterr().err
    except InputError as error:
        found = f"stop: {error}"
        assert found.endswith("the vocabulary does not know this script; take a BERT that does")
    assert found.partition(";")[0] == said and found.count("[UNK]") <= 1  # the same texts are counted once


def test_texts_are_what_encode_says_of_each():
    tokenizer = weights.wordpiece(SMALL_VOCAB)
    texts = ["red dress", "", "red dresses a red", "\ud83d red", "a " * 100]
    found = data.Texts(tokenizer, texts, 9, chunk=2)
    assert [found[i] for i in range(5)] == data.tokenize(tokenizer, texts, 9)
    assert found[2] == ([2, 5, 6, 7, 8, 5, 3], [-1, 0, 1, 1, 2, 3, -1])


# ---- masks -----------------------------------------------------------------------------------------------------------


def test_whole_word_masking_statistics():
    golden = METRICS["whole_word"]
    tokenizer = weights.wordpiece("\n".join([SMALL_VOCAB, *(f"w{i}" for i in range(1000))]))
    mask_id, size = 4, tokenizer.get_vocab_size()
    ids = [2, *golden["token_ids"], 3]
    starts = [not token.startswith("##") for token in golden["tokens"]]
    words = [-1, *(int(i) - 1 for i in np.cumsum(starts)), -1]
    n_words, draws, rng = golden["n_words"], 10_000, np.random.default_rng(0)
    assert max(words[1:-1]) == n_words - 1
    chosen, masked_n, kept_n, changed = np.zeros(len(ids)), 0, 0, 0
    first, random_pieces = np.array([True, *starts, True]), []
    for _ in range(draws):
        masked, labels = data.mask_words(ids, words, tokenizer, rng)
        asked = np.array(labels) != -100
        assert asked.any() and not asked[0] and not asked[-1]
        for a, b in itertools.pairwise(range(1, len(ids) - 1)):
            assert words[a] != words[b] or asked[a] == asked[b]  # whole words
        assert all(label == i for label, i, on in zip(labels, ids, asked, strict=True) if on)
        assert all(m == i for m, i, on in zip(masked, ids, asked, strict=True) if not on)
        chosen += asked
        for i in np.flatnonzero(asked & first):
            pieces = [j for j in range(len(ids)) if words[j] == words[i]]
            new = [masked[j] for j in pieces]
            if all(m == mask_id for m in new):
                masked_n += 1
            elif new == [ids[j] for j in pieces]:
                kept_n += 1
            else:
                changed += 1
                random_pieces += new
    # p = .15, and where none was chosen (.85 ** words of the draws; the original leaves those empty) one at random
    expected = 0.15 + 0.85**n_words / n_words
    assert np.abs(chosen[1:-1] / draws - expected).max() < 0.015
    extra = golden["no_token_selected_rate"] / n_words
    assert np.abs(chosen[1:-1] / draws - extra - golden["rate_by_token"].numpy()).max() < 0.02
    total = masked_n + kept_n + changed
    for n, key in ((masked_n, "mask"), (changed, "random"), (kept_n, "keep")):
        assert n / total == pytest.approx(golden[f"selected_{key}_rate"], abs=0.012)
    assert np.mean(random_pieces) == pytest.approx(size / 2, rel=0.05) and max(random_pieces) > 0.98 * size


def test_text_without_words_still_asks_something():
    masked, labels = data.mask_words([2, 3], [-1, -1], weights.wordpiece(SMALL_VOCAB), np.random.default_rng(0))
    assert masked == [2, 4] and labels == [-100, 3]


def test_block_masks_have_the_originals_statistics():
    golden, rng = METRICS["blockwise"], np.random.default_rng(0)
    masks = np.stack([data.mask_patches(7, rng) for _ in range(10_000)])
    counts = np.bincount(masks.sum(1), minlength=9) / 10_000
    assert masks.sum(1).max() == 8
    for n, times in golden["count_histogram"].items():
        assert counts[n] == pytest.approx(times / golden["draws"], abs=0.006)
    assert masks.sum(1).mean() == pytest.approx(golden["mean_masked"], abs=0.006)
    assert np.abs(masks.mean(0).reshape(7, 7) - golden["position_rate"].numpy()).max() < 0.02


@pytest.mark.parametrize("side, largest", [(1, 1), (2, 1), (3, 1), (4, 3), (10, 16)])
def test_block_masks_of_other_grids(side, largest):
    rng = np.random.default_rng(0)
    counts = [data.mask_patches(side, rng).sum() for _ in range(300)]
    assert min(counts) >= 1 and max(counts) == largest  # n = round(8 P / 49)


def test_dropped_positions_are_a_floor_share_without_replacement():
    for n, expected in ((49, 12), (7, 1), (3, 0), (0, 0)):
        assert n - sum(data.keep_most(n, 0.25, np.random.default_rng(0))) == expected


# ---- samples and batches ---------------------------------------------------------------------------------------------


def settings(**changes):
    small = dict(batch_size=8, max_steps=12, seed=3, workers=0, image_size=64)
    return pretrain.PretrainConfig(**{**small, **changes})


def samples(catalogue, **changes):
    products, tokenizer = annotations.load_pretraining(catalogue), weights.read_tokenizer(catalogue / "vocab.txt")
    return data.Pretraining(products, tokenizer, annotations.count_labels(products, "attributes"), settings(**changes))


def test_pretraining_is_the_union_of_the_sets_with_their_texts(catalogue):
    keys = {"FashionGen": ["title", "description"], "BigFACAD": ["color", "title", "description"]}
    keys |= {"Fashion200k": ["title"], "PolyvoreOutfits": ["title", "description"]}
    expected = []
    for name, fields in keys.items():
        rows = json.loads((catalogue / name / "train_info.json").read_text())
        expected += [(f"{name} {row['id']}", ".".join(row[field] for field in fields)) for row in rows]
    assert [(product.name, product.text) for product in annotations.load_pretraining(catalogue)] == expected


def test_every_epoch_visits_every_product_once_in_a_new_order():
    batches = list(data.BatchSampler(32, settings(), Processes(0, 1, torch.device("cpu")), objective_at=str))
    epochs = [[k for batch in batches[e * 4 : e * 4 + 4] for k in batch] for e in range(3)]
    for e, keys in enumerate(epochs):
        assert sorted(index for _, index, _ in keys) == list(range(32))
        assert {epoch for epoch, _, _ in keys} == {e}
    assert [i for _, i, _ in epochs[0]] != [i for _, i, _ in epochs[1]]
    assert [batch[0][2] for batch in batches] == [str(step) for step in range(12)]


@pytest.mark.parametrize("world_size, grad_accum, start", [(2, 1, 0), (2, 2, 0), (1, 4, 0), (1, 1, 7), (2, 2, 5)])
def test_processes_micro_batches_and_restarts_share_one_order(world_size, grad_accum, start):
    config = settings(grad_accum=grad_accum)
    one = list(data.BatchSampler(32, settings(), Processes(0, 1, None)))
    ranks = range(world_size)
    parts = [list(data.BatchSampler(32, config, Processes(rank, world_size, None), start)) for rank in ranks]
    assert [len(part) for part in parts] == [(len(one) - start) * grad_accum] * world_size
    for step, whole in enumerate(one[start:]):
        rows = []
        for micro in range(grad_accum):
            rows += [key for part in parts for key in part[step * grad_accum + micro]]
        assert rows == whole


def test_a_sample_is_a_function_of_its_key_alone(catalogue):
    for objective in ("itc", "itm", "mlm", "mpfc", "mvc", "pac"):
        first, again = samples(catalogue)[2, 5, objective], samples(catalogue)[2, 5, objective]
        other = samples(catalogue, seed=1)[2, 5, objective]
        assert first.keys() == again.keys()
        for key in first:
            assert np.array_equal(np.asarray(first[key]), np.asarray(again[key])), key
        if objective == "mlm":
            assert [first[key] for key in ("mlm_labels", "masked_ids")] != [other["mlm_labels"], other["masked_ids"]]


def test_sampling_leaves_the_callers_generator_alone(catalogue):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    samples(catalogue)[0, 0, "mvc"]
    data.to_pixels(Image.new("RGB", (40, 40)), data.crop_then_resize, 32, np.random.default_rng(0))
    assert torch.equal(torch.rand(3), expected)


def test_views_of_mvc_differ_where_there_are_two_images(catalogue):
    dataset = samples(catalogue)
    dataset.read_image = lambda index, path, rng: path
    assert {len(item["images"]) for item in dataset.items} >= {1, 2, 3}
    for index, item in enumerate(dataset.items):
        for epoch in range(5):
            sample = dataset[epoch, index, "mvc"]
            assert {sample["image"], sample["image2"]} <= set(item["images"])
            assert (sample["image"] != sample["image2"]) == (len(item["images"]) > 1)


def test_collate_pads_to_the_longest_text_only(catalogue):
    dataset = samples(catalogue)
    by_length = sorted(range(len(dataset)), key=lambda i: len(dataset.texts[i].ids))
    rows = [dataset[0, i, "mvc"] for i in (by_length[0], by_length[-1])]
    batch = data.collate(rows)
    lengths = [len(row["input_ids"]) for row in rows]
    assert lengths[0] != lengths[1] and batch["input_ids"].shape == (2, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["text_keep"].dtype == torch.bool and batch["patch_keep"].shape == (2, 4)
    ends = [n - 1 for n in lengths]
    assert batch["text_keep"][:, 0].all() and batch["text_keep"][[0, 1], ends].all()  # [CLS] and [SEP] are kept
    assert not (batch["text_keep"] & (batch["attention_mask"] == 0)).any()  # padding is not
    assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (2, 3, 64, 64)


def test_attributes_of_a_product_share_weight_1(catalogue):
    dataset = samples(catalogue)
    dataset.items[0]["attributes"], dataset.items[1]["attributes"] = [0, 2], []
    first, second = (dataset[0, i, "pac"]["attributes"] for i in (0, 1))
    assert first[:3].tolist() == [0.5, 0, 0.5] and first.sum() == 1 and not second.any()
    products = [annotations.Product("a", [], "", [0, 2], 1), annotations.Product("b", [], "", [], 0)]
    assert [annotations.count_labels(products, key) for key in ("attributes", "category")] == [3, 2]


def test_a_broken_image_names_file_and_product_or_is_counted(catalogue, tmp_path, monkeypatch):
    dataset, path = samples(catalogue), tmp_path / "a.jpg"
    dataset.items[0] |= {"images": [str(path)], "name": "a product"}
    Image.effect_noise((40, 40), 50).save(path)
    whole = path.read_bytes()
    for content, limit, cause in (
        (whole, 99, "40 x 40 pixels, expected at most 99"),
        (whole[: len(whole) // 2], 9999, "image file is truncated"),
        (b"no image", 9999, "cannot identify image file"),
    ):
        monkeypatch.setattr(photos, "MAX_PIXELS", limit)
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"a product: {path}: image cannot be read: .*{cause}"):
            dataset[0, 0, "itc"]
    dataset.config.missing = "skip"
    sample = dataset[0, 0, "itc"]
    assert sample["skipped"] == 1 and np.array_equal(sample["image"], dataset[0, 1, "itc"]["image"])


# ---- images ----------------------------------------------------------------------------------------------------------


def test_normalisation_by_hand():
    image = torch.full((1, 3, 2, 2), 100, dtype=torch.uint8)
    expected = [(100 / 255 - m) / s for m, s in zip(data.MEAN, data.STD, strict=True)]
    assert data.normalize(image)[0, :, 0, 0].tolist() == pytest.approx(expected, rel=1e-5)


def test_photos_are_turned_upright_and_animations_give_their_first_frame(tmp_path):
    red, green = Image.new("RGB", (20, 10), (250, 0, 0)), Image.new("RGB", (20, 10), (0, 250, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    xmp = b'<rdf:Description tiff:Orientation="6"/>'
    for name, more in {"turned.jpg": {"exif": exif}, "turned.png": {"exif": exif}, "xmp.jpg": {"xmp": xmp}}.items():
        red.save(tmp_path / name, **more)
        assert photos.open_image(tmp_path / name).size == (10, 20), name
    red.save(tmp_path / "moving.gif", save_all=True, append_images=[green])
    assert np.asarray(photos.open_image(tmp_path / "moving.gif"))[0, 0, 0] > 200


def numbers(*values):
    """Numbers as ICC profiles write them."""
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def icc_profile(colours, measured_in, tags):
    """An ICC profile with the tags {name: content}. `measured_in` is b"XYZ " or b"Lab "."""
    parts, table, start = b"", struct.pack(">I", len(tags)), 132 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += struct.pack(">4sII", name, start + len(parts), len(content))
        parts += content
    head = struct.pack(">I4sI4s4s4s", start + len(parts), b"", 0x02400000, b"prtr", colours, measured_in)
    return head + bytes(12) + b"acsp" + bytes(28) + numbers(0.9642, 1, 0.8249) + bytes(48) + table + parts


def curve(gamma):
    return b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256))


# The primaries of Adobe RGB (1998), adapted to the white of profiles.
ADOBE = {"r": (0.60974, 0.31111, 0.01947), "g": (0.20528, 0.62567, 0.06087), "b": (0.14919, 0.06322, 0.74457)}
ADOBE = {f"{c}XYZ".encode(): b"XYZ " + numbers(0, *xyz) for c, xyz in ADOBE.items()}
ADOBE |= {name: curve(563 / 256) for name in (b"rTRC", b"gTRC", b"bTRC")}
# A printer that prints sRGB's red for cyan. The colour (Lab) of the 16 mixtures of inks; i & 1 is black, i & 8 is cyan.
MIXTURES = [(0, 128, 128) if i & 1 else (138, 209, 198) if i & 8 else (255, 128, 128) for i in range(16)]
PRINTER = b"mft1" + struct.pack(">IBBBB", 0, 4, 3, 2, 0) + numbers(1, 0, 0, 0, 1, 0, 0, 0, 1)
PRINTER += bytes(range(256)) * 4 + b"".join(map(bytes, MIXTURES)) + bytes(range(256)) * 3
PROFILES = {
    "adobe": icc_profile(b"RGB ", b"XYZ ", ADOBE),
    "grey": icc_profile(b"GRAY", b"XYZ ", {b"kTRC": curve(1)}),
    "printer": icc_profile(b"CMYK", b"Lab ", {b"A2B0": PRINTER}),
    "srgb": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    "broken": icc_profile(b"RGB ", b"XYZ ", ADOBE)[:200],
}


@pytest.mark.parametrize(
    "name, mode, profile, stored, expected",
    [
        ("a.png", "RGB", "adobe", (200, 30, 40), (233, 24, 36)),  # by hand, from the definitions of both
        ("a.jpg", "RGB", "adobe", (40, 160, 80), (0, 161, 73)),
        ("a.webp", "RGB", "adobe", (200, 30, 40), (233, 24, 36)),
        ("a.png", "RGBA", "adobe", (200, 30, 40, 255), (233, 24, 36)),
        ("a.png", "P", "adobe", (200, 30, 40), (233, 24, 36)),
        ("a.png", "L", "grey", 82, (154, 154, 154)),  # (82 / 255) ** (1 / 2.4) * 1.055 - 0.055
        ("a.tif", "I;16", "grey", 82 * 257, (154, 154, 154)),
        ("a.jpg", "CMYK", "printer", (255, 0, 0, 0), (255, 0, 0)),
        ("a.tif", "CMYK", "printer", (0, 0, 0, 255), (0, 0, 0)),
        ("a.png", "RGB", "srgb", (200, 30, 40), (200, 30, 40)),
        ("a.jpg", "RGB", "printer", (200, 30, 40), (200, 30, 40)),  # it does not fit, so it is ignored
        ("a.png", "L", "adobe", 82, (82, 82, 82)),
        ("a.jpg", "RGB", "broken", (200, 30, 40), (200, 30, 40)),
    ],
)
def test_colours_of_a_profile_become_those_of_srgb(name, mode, profile, stored, expected, tmp_path):
    image = Image.new("RGB" if mode == "P" else mode, (16, 16), stored)
    image = image.quantize(4) if mode == "P" else image
    image.save(tmp_path / name, icc_profile=PROFILES[profile])
    opened = photos.open_image(tmp_path / name)
    assert opened.mode == "RGB" and np.abs(np.asarray(opened, int)[8, 8] - expected).max() <= 3
    if profile == "srgb":
        assert photos.to_srgb(PROFILES["srgb"], "RGB") is None  # no time is spent on it


def test_transforms_crop_and_scale():
    grid = np.zeros((100, 100, 3), np.uint8)
    grid[:, 50:] = 255
    image = Image.fromarray(grid)
    centre = data.to_pixels(image, data.resize_then_crop, 64)
    assert centre.shape == (64, 64, 3) and centre[0, 0, 0] == 0 and centre[0, -1, 0] == 255
    whole = data.to_pixels(image, data.crop_then_resize, 64)
    assert [int((x[0, :, 0] > 127).sum()) for x in (centre, whole)] == [32, 32]
    for fit in (data.resize_then_crop, data.crop_then_resize):
        rng = np.random.default_rng(0)
        views = [data.to_pixels(image, fit, 64, rng) for _ in range(40)]
        assert 8 < sum(bool(v[0, 0, 0] > 127) for v in views) < 32  # half are flipped
        assert len({v.tobytes() for v in views}) > 5  # parts differ
    batch = data.stack_images([centre, whole])
    assert batch.shape == (2, 3, 64, 64) and batch.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(batch[0, :, 5, 7], centre[5, 7])


@pytest.mark.parametrize("size, off", [(224, 0), (64, 2), (96, 2)])
@pytest.mark.parametrize("width, height", [(144, 144), (300, 400), (1000, 777), (257, 513), (3001, 2000)])
def test_resize_then_crop_in_one_step_has_torchvisions_pixels(size, off, width, height):
    from torchvision.transforms import v2

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    large = round(size * 256 / 224)
    whole = v2.Resize((large, large))(image)
    left, top = np.random.default_rng(1).integers(large - size + 1, size=2).tolist()
    theirs = [v2.CenterCrop(size)(whole), v2.functional.crop(whole, top, left, size, size)]
    for rng, expected in zip((None, np.random.default_rng(1)), theirs, strict=True):
        ours = data.resize_then_crop(image, size, rng)
        difference = np.abs(np.asarray(ours, int) - np.asarray(expected, int))
        assert difference.max() <= off and (difference > 0).mean() < 0.02


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gallery, size", [("original", 60), ("val", 48)])
def test_fashioniq_slice_counts(gallery, size):
    for garment in annotations.FASHIONIQ_CLASSES:
        rows, names = annotations.load_fashioniq(SLICES, garment, "val", gallery)
        assert (len(rows), len(names)) == (24, size)
        assert {row["target"] for row in rows} < set(names)
        assert all(Path(row["image"]).stem in names and ", " in row["text"] for row in rows)


@pytest.mark.skipif(not SHARED.exists(), reason="needs shared/data")
@pytest.mark.parametrize("gallery, sizes", [("original", (3817, 6346, 5373)), ("val", (2628, 3089, 2902))])
def test_fashioniq_public_counts(tmp_path, gallery, sizes):
    (tmp_path / "FashionIQ").symlink_to(SHARED / "fashioniq-public")
    parts = [annotations.load_fashioniq(tmp_path, garment, "val", gallery) for garment in annotations.FASHIONIQ_CLASSES]
    assert [len(rows) for rows, _ in parts] == [2017, 2038, 1961]
    assert [len(names) for _, names in parts] == list(sizes)


ROW = {"candidate": "a", "target": "b", "captions": ["is red", "is long"]}
EXTENDED = [{**ROW, "garment_class": 0, "fake_data": False}, {**ROW, "target": "z", "fake_data": True}]


@pytest.mark.parametrize(
    "rows, gallery, names",
    [([ROW], "original", "abcd"), ([ROW], "val", "ba"), (EXTENDED, "original", "bz")],  # extended files name theirs
)
def test_fashioniq_galleries(tmp_path, rows, gallery, names):
    folder = tmp_path / "FashionIQ"
    for name, content in (("captions/cap", rows), ("image_splits/split", list("abcd"))):
        (folder / name).parent.mkdir(parents=True)
        (folder / f"{name}.dress.val.json").write_text(json.dumps(content))
    queries, found = annotations.load_fashioniq(tmp_path, "dress", "val", gallery)
    assert "".join(found) == names and [query["text"] for query in queries] == ["is red, is long"]


def test_polyvore_numbers_categories(tmp_path):
    folder = tmp_path / "PolyvoreOutfits"
    folder.mkdir()
    rows = [{"question": ["1", "2"], "blank": "3", "fake_data": False}]
    (folder / "ocir_disjoint_test.json").write_text(json.dumps(rows))

    def load(*ids):
        metadata = {str(i + 1): {"category_id": c} for i, c in enumerate(ids)}
        (folder / "polyvore_item_metadata.json").write_text(json.dumps(metadata))
        outfits, n = annotations.load_polyvore(tmp_path, "disjoint", "test")
        return [c for _, c in outfits[0]["items"]], outfits[0]["blank_item"][1], n

    assert load("20", "1", "0") == ([2, 1], 0, 3)  # own numbers, ascending
    assert load("3", "1605", "4518") == ([0, 53], 152, 153)  # the released checkpoint's


def test_images_to_leave_out(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "sound.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.png").write_text("<html>")
    sound, empty, page, gone = (str(tmp_path / f"{name}.png") for name in ("sound", "empty", "page", "gone"))
    skip, stop = SimpleNamespace(missing="skip", workers=2), SimpleNamespace(missing="stop")
    assert photos.leave_out([sound, sound, empty, page, gone], skip, "val") == {empty, page, gone}
    assert "val: 3 of 4 images cannot be read" in capsys.readouterr().out
    with pytest.raises(InputError, match="empty.png: image is missing; 2 of 4 images of val.*--missing=skip"):
        photos.leave_out([sound, empty, page, gone], stop, "val")
    with pytest.raises(InputError, match="^val: none of its 2 images can be read; fetch .*empty.png"):
        photos.leave_out([empty, page], skip, "val")
    products = [annotations.Product(str(i), images, "", []) for i, images in enumerate(([sound, gone], [page]))]
    (kept,) = photos.leave_out_of_products(products, skip, "val")
    assert (kept.name, kept.images) == ("0", [sound])


def test_transparent_parts_are_white(tmp_path):
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[..., :3] = (0, 200, 0)  # hidden below the transparency
    rgba[16:48, 16:48] = (200, 30, 40, 255)
    cut_out, palette = Image.fromarray(rgba), Image.fromarray(rgba[..., :3]).quantize(4)
    half = Image.new("RGBA", (64, 64), (200, 0, 0, 128))
    for image, corner, centre in (
        (cut_out, [255] * 3, [200, 30, 40]),
        (cut_out.convert("LA"), [255] * 3, [cut_out.convert("L").getpixel((40, 40))] * 3),
        (palette, [255] * 3, [200, 30, 40]),
        (half, [227, 127, 127], [227, 127, 127]),  # 200 a + 255 (1 - a)
    ):
        more = {"transparency": palette.getpixel((0, 0))} if image is palette else {}
        image.save(tmp_path / "a.png", **more)
        opened = np.asarray(photos.open_image(tmp_path / "a.png")).astype(int)
        assert opened[0, 0].tolist() == corner and np.abs(opened[40, 40] - centre).max() < 6, image.mode


# Value 1 is the transparent one. Pillow scales pixels of few bits to 8 bits, but not that value.
TRANSPARENT, LONG_TEXT = (b"tRNS", b"\0\1"), (b"zTXt", b"note\0\0" + zlib.compress(b"a" * 2_000_000))


@pytest.mark.parametrize(
    "bits, packed, chunk, expected",
    [(2, 0x18, TRANSPARENT, [0, 255, 170, 0]), (4, 0x1A, TRANSPARENT, [255, 170]), (8, 0x07, LONG_TEXT, [7])],
)
def test_grey_pngs_that_pillow_reads_in_another_way(tmp_path, bits, packed, chunk, expected):
    size = struct.pack(">IIBBBBB", 8 // bits, 1, bits, 0, 0, 0, 0)
    parts = [(b"IHDR", size), chunk, (b"IDAT", zlib.compress(bytes([0, packed]))), (b"IEND", b"")]
    whole = [struct.pack(">I", len(x)) + name + x + struct.pack(">I", zlib.crc32(name + x)) for name, x in parts]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(whole))
    assert np.asarray(photos.open_image(tmp_path / "a.png"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("tag, value", [(262, 0), (258, 12)], ids=["white is 0", "12 bits"])
def test_grey_tiffs_whose_values_mean_something_else_are_refused(tag, value, tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(np.full((4, 4), 200, np.uint16)).save(path)
    content = path.read_bytes()  # Pillow writes its own values of these two tags
    at = content.index(struct.pack("<HHI", tag, 3, 1)) + 8
    path.write_bytes(content[:at] + struct.pack("<H", value) + content[at + 2 :])
    with pytest.raises(InputError, match="a.tif: image cannot be read: grey of an unusual kind .* save it as a PNG"):
        photos.open_image(path)


@pytest.mark.parametrize("denominator", [0, -1])
def test_odd_metadata_do_not_hide_a_sound_photo(tmp_path, denominator):
    photo = io.BytesIO()
    Image.new("RGB", (30, 20), (200, 30, 40)).save(photo, "JPEG")
    # orientation 6, and a resolution whose type or value Pillow cannot write anew
    tiff = b"II*\0" + struct.pack("<IH", 8, 2) + struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)
    tiff += struct.pack("<HHII", 0x11A, 10, 1, 38) + struct.pack("<I", 0) + struct.pack("<ii", -1, denominator)
    for exif, size in ((tiff, (20, 30)), (tiff[:20], None), (b"II*\0" + b"\xff" * 40, (30, 20)), (b"?", (30, 20))):
        exif = b"Exif\0\0" + exif
        head = b"\xff\xd8\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
        (tmp_path / "odd.jpg").write_bytes(head + photo.getvalue()[2:])
        opened = photos.open_image(tmp_path / "odd.jpg")
        assert size is None or opened.size == size
        assert np.abs(np.asarray(opened)[5, 5].astype(int) - [200, 30, 40]).max() < 6
