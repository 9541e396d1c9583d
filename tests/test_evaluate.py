"""Protocols of evaluate.py: the original's numbers (golden/metrics.pt), hand-computed cases, brute force."""

import itertools
import json
import math
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import one_hot

import data
import evaluate
import metrics
from plumbing import annotations, tables
from plumbing.processes import Processes
from plumbing.settings import InputError

GOLDEN = torch.load(Path(__file__).parent / "golden" / "metrics.pt", weights_only=True)
WAYS = [f"{way}_r@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
RETRIEVAL_SETS = ("ret_small", "ret_large", "ret_few_same_subcat")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_integers(*shape, seed=0, top=3):
    """Embeddings whose scores are exact in any order of summation, and tie often."""
    return torch.randint(-top, top + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def sorted_rank(scores, correct):
    """Brute force: the place of the first correct item in the gallery sorted by (-score, index)."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    return next(place for place, j in enumerate(order, 1) if correct[j])


def line(scores):
    """A gallery of width 1 whose scores for the query [[1.]] are `scores`."""
    return torch.tensor(scores, dtype=torch.float32)[:, None]


ONE = torch.ones(1, 1)


def first_rows(ids):
    """Index of the first row of each distinct id, in the order of the rows."""
    rows = ids.tolist()
    return [i for i, value in enumerate(rows) if rows.index(value) == i]


# ---- the original's numbers ------------------------------------------------------------------------------------------


def arrays(name, *keys):
    return [GOLDEN[name][key] for key in keys]


@pytest.mark.parametrize("name", RETRIEVAL_SETS)
def test_full_gallery_is_the_original_s(name):
    result = evaluate.full_gallery(*arrays(name, "image", "text", "image_id", "text_id"))
    golden = GOLDEN[name]["r@k_general"]
    for key in WAYS:
        assert result.metrics[key] == pytest.approx(golden[key], abs=1e-6)
    assert result.metrics["mean_recall"] == pytest.approx(golden["avg"], abs=1e-6)
    assert result.counts == {"images": GOLDEN[name]["n_image"], "texts": GOLDEN[name]["n_text"]}


README_SAMPLE_100 = {
    "ret_small": (0.3935, 0.6920, 0.8263, 0.4367, 0.6967, 0.8167),
    "ret_large": (0.3610, 0.6640, 0.7820, 0.3614, 0.6529, 0.7929),
}


@pytest.mark.parametrize("name", RETRIEVAL_SETS)
def test_given_the_original_s_candidates_scores_are_the_original_s(name):
    image, text = arrays(name, "image", "text")
    drawn = {key: value.long() for key, value in GOLDEN[name]["kaleido_first_repeat"].items()}
    got = []
    for way, queries, gallery in (("i2t", image, text), ("t2i", text, image)):
        candidates = torch.cat([drawn[f"{way}_pos"], drawn[f"{way}_neg"]], dim=1)
        pairs = zip(drawn[f"{way}_query"].tolist(), candidates, strict=True)
        ranks = torch.tensor([metrics.candidate_rank(queries[q], gallery, row) for q, row in pairs])
        top10 = drawn[f"{way}_top10"] == drawn[f"{way}_pos"]  # where the positive stands among the original's ten best
        expected = torch.where(top10.any(dim=1), top10.int().argmax(dim=1) + 1, 11)
        assert torch.equal(ranks.clamp(max=11), expected)
        got += [(ranks <= k).double().mean().item() for k in (1, 5, 10)]
    if name in README_SAMPLE_100:
        assert got == pytest.approx(README_SAMPLE_100[name], abs=5.1e-5)


@pytest.mark.parametrize("name", ["ret_small", "ret_large"])
def test_seeded_draws_come_close_to_the_original_s_mean(name):
    """Eight of our seeds against the mean of the original's: within 4 standard errors of the difference."""
    inputs = arrays(name, "image", "text", "image_id", "text_id", "image_subcat_id", "text_subcat_id")
    n_seeds = 8
    ours = [evaluate.sample_100(*inputs, seed=seed).metrics for seed in range(n_seeds)]
    mean, std = GOLDEN[name]["kaleido_mean_over_seeds"], GOLDEN[name]["kaleido_std_over_seeds"]
    for i, key in enumerate([*WAYS, "mean_recall"]):
        error = 4 * std[i].item() * math.sqrt(1 / n_seeds + 1 / GOLDEN[name]["kaleido_n_seeds"])
        assert sum(m[key] for m in ours) / n_seeds == pytest.approx(mean[i].item(), abs=error), key


def test_fashioniq_is_the_original_s():
    keys = "scores", "targets", "target_id", "fake_data", "garment_class"
    scores, targets, target_id, fake, garment = arrays("fashioniq", *keys)
    classes = {}
    for c, name in enumerate(("dress", "shirt", "toptee")):
        rows = garment == c
        keep = first_rows(target_id[rows])
        real = rows & ~fake
        classes[name] = scores[real], targets[rows][keep], target_id[real], target_id[rows][keep]
    result = evaluate.composed_retrieval(classes)
    golden = dict(GOLDEN["fashioniq"]["result"])
    assert result.metrics.pop("mean_recall") == pytest.approx(golden.pop("avg"), abs=1e-6)
    assert result.metrics == pytest.approx(golden, abs=1e-6)
    assert (result.counts["dress_queries"], result.counts["dress_gallery"]) == (208, 220)


def golden_ocir():
    keys = "scores", "targets", "blank_id", "blank_cat_id", "fake_data"
    scores, targets, blank_id, category, fake = arrays("ocir", *keys)
    keep = first_rows(blank_id)
    return scores[~fake], blank_id[~fake], targets[keep], blank_id[keep], category[keep]


def test_ocir_is_the_original_s():
    result = evaluate.outfit_retrieval(*golden_ocir())
    golden = dict(GOLDEN["ocir"]["result"])
    assert result.metrics.pop("mean_recall") == pytest.approx(golden.pop("avg"), abs=1e-6)
    assert result.metrics == pytest.approx(golden, abs=1e-6)
    assert result.counts == {"queries": 876, "gallery": 719, "categories": 9}


def test_recognition_is_the_original_s():
    logits, labels = arrays("classification", "logits", "targets")
    result = evaluate.recognition(logits, labels)
    assert result.metrics["accuracy"] == pytest.approx(GOLDEN["classification"]["accuracy"], abs=1e-6)
    assert result.metrics["macro_f1"] == pytest.approx(GOLDEN["classification"]["macro_f1"], abs=1e-6)
    assert result.counts["classes"] == GOLDEN["classification"]["classes_in_targets"]


# ---- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "ids", "rank"),
    [
        ([3, 2, 1], [0, 7, 0], 2),
        ([2, 2, 2], [7, 0, 0], 1),  # equal scores rank in gallery order
        ([2, 2, 2], [0, 0, 7], 3),
        ([9, 2, 2, 2, 9], [0, 0, 7, 0, 0], 4),  # two higher, one level and earlier, one level and later
        ([1, 3, 2, 4], [7, 0, 7, 0], 3),  # several correct: the best counts
        ([5, 5, 5, 5], [0, 7, 0, 7], 2),  # several correct and level: the earlier counts
        ([5, 5, 5, 4], [0, 0, 7, 7], 3),  # a worse correct item changes nothing
    ],
)
def test_rank_by_hand(scores, ids, rank):
    assert metrics.best_ranks(ONE, line(scores), torch.tensor([7]), torch.tensor(ids)).tolist() == [rank]


def test_ranks_equal_brute_force_whatever_the_block():
    queries, gallery = small_integers(57, 4, seed=1), small_integers(90, 4, seed=2)
    generator = torch.Generator().manual_seed(3)
    gallery_id = torch.randint(25, (90,), generator=generator) * 1_000_003 - 7  # gaps, a negative one: no indices
    query_id = gallery_id[torch.randint(90, (57,), generator=generator)]
    scores = (queries @ gallery.t()).tolist()
    expected = [sorted_rank(s, gallery_id == i) for s, i in zip(scores, query_id, strict=True)]
    for block in (1, 7, 56, 57, 64, 512):
        assert metrics.best_ranks(queries, gallery, query_id, gallery_id, block=block).tolist() == expected
    shared = (queries @ gallery.t()).eq((queries @ gallery.t()).amax(dim=1, keepdim=True)).sum(dim=1)
    assert (shared > 1).any()  # the case does hold ties


def test_twins_in_the_gallery_tie_to_the_bit():
    """Two equal images of two products: the earlier one wins, however few the queries.

    BLAS treats a matrix of few rows in another way, where equal columns may get scores that differ in the last bit."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(501, 768, generator=generator)
    gallery, ids = torch.cat([first, first]), torch.arange(1002)
    for n_queries in (1, 17, 600):
        queries = torch.randn(n_queries, 768, generator=generator)
        naive = queries @ gallery.t()
        uneven = (naive[:, :501] != naive[:, 501:]).any(dim=0).nonzero().flatten().tolist()
        for target in [0, 500, *uneven][:8]:
            target = torch.full((n_queries,), target)
            early = metrics.best_ranks(queries, gallery, target, ids)
            assert torch.equal(metrics.best_ranks(queries, gallery, target + 501, ids), early + 1)


def test_a_target_outside_the_gallery_is_an_error_with_its_id():
    gallery, gallery_id = line([1, 2]), torch.tensor([5, 6])
    with pytest.raises(ValueError, match=r"query 1 \(id 4711\).*gallery of 2"):
        metrics.best_ranks(torch.ones(2, 1), gallery, torch.tensor([5, 4711]), gallery_id)
    with pytest.raises(ValueError, match="4711"):
        evaluate.full_gallery(ONE, ONE, torch.tensor([4711]), torch.tensor([5]))
    with pytest.raises(ValueError, match="4711"):
        evaluate.composed_retrieval({"dress": (ONE, gallery, torch.tensor([4711]), gallery_id)})
    with pytest.raises(ValueError, match="4711"):
        evaluate.outfit_retrieval(ONE, torch.tensor([4711]), gallery, gallery_id, torch.tensor([0, 0]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("where", ["query", "gallery"])
def test_scores_that_are_not_finite_are_an_error(bad, where):
    """1e30 is finite, but a score could overflow, and inf - inf is NaN."""
    queries, gallery = torch.ones(3, 2), torch.ones(4, 2)
    (queries if where == "query" else gallery)[2, 1] = bad
    with pytest.raises(ValueError, match=f"{where} embedding 2 is not finite or too large"):
        metrics.best_ranks(queries, gallery, torch.tensor([0, 1, 2]), torch.arange(4))
    ids = torch.arange(3), torch.arange(4)
    groups = torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"{where} embedding 2 is not finite or too large"):
        evaluate.sample_100(queries, gallery, *ids, *groups)


def test_shapes_and_dtypes_that_do_not_match_are_errors():
    ids = torch.arange(3)
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(3, 5\)"):
        metrics.best_ranks(torch.ones(3, 4), torch.ones(3, 5), ids, ids)
    with pytest.raises(ValueError, match="float16"):
        metrics.best_ranks(torch.ones(3, 4).half(), torch.ones(3, 4).half(), ids, ids)
    with pytest.raises(ValueError, match="ids 2 and 3"):
        metrics.best_ranks(torch.ones(3, 4), torch.ones(3, 4), ids[:2], ids)


def test_recalls_leave_out_what_was_not_asked():
    outcomes = {"a": torch.tensor([[1, 0], [2, 1], [11, 10]]), "b": torch.tensor([5])}
    assert metrics.recalls(outcomes, (1, 10)) == pytest.approx(
        {"a_r@1": 2 / 5, "a_r@10": 4 / 5, "b_r@1": 0, "b_r@10": 1, "mean_recall": (0.4 + 0.8 + 0 + 1) / 4}
    )


# ---- sample-100 ------------------------------------------------------------------------------------------------------


def made_up(n_products=60, n_groups=3, seed=0):
    """(text ids, groups), (image ids, groups): 1 to 4 images a product, shuffled, ids with gaps."""
    generator = torch.Generator().manual_seed(seed)
    text_id = torch.randperm(10 * n_products, generator=generator)[:n_products]
    group = torch.randint(n_groups, (n_products,), generator=generator) * 11
    images = torch.arange(n_products).repeat_interleave(torch.randint(1, 5, (n_products,), generator=generator))
    images = images[torch.randperm(len(images), generator=generator)]
    return (text_id, group), (text_id[images], group[images])


def test_a_sub_category_with_too_few_negatives_by_hand():
    """Products 1, 2, 3 in sub-category 0 and 4 alone in 1: three queries get 2 negatives, one gets none."""
    ids, groups = torch.tensor([1, 2, 3, 4]), torch.tensor([0, 0, 0, 1])
    image = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    text = torch.tensor([[1.0, 0], [1, 0], [1, 0], [9, 0]])  # image 4 likes none; nothing of another group is met
    result = evaluate.sample_100(image, text, ids, ids, groups, groups, ks=(1, 2))
    assert result.counts["i2t_negatives_min"] == 0 and result.counts["i2t_negatives_mean"] == 1.5
    # i2t ties everywhere, so rank in gallery order: 1, 2, 3, and 1 for the lonely one
    assert torch.equal(result.outcomes["i2t"], torch.tensor([1, 2, 3, 1])[:, None].repeat(1, 5))
    # t2i: scores of images 1, 2, 3 are 1, 0, 1 for all three texts
    assert torch.equal(result.outcomes["t2i"], torch.tensor([1, 3, 2, 1])[:, None].repeat(1, 5))
    assert result.metrics["i2t_r@1"] == 2 / 4 and result.metrics["t2i_r@2"] == 3 / 4
    assert result.chance["i2t_r@1"] == pytest.approx((3 * 1 / 3 + 1) / 4)


def test_every_positive_and_every_set_of_negatives_is_as_likely():
    """One product with 2 images among 4 others of its group: 2 positives x 6 pairs of negatives, each with 1 / 12."""
    ids, groups = torch.tensor([3, 8, 8, 1, 9, 4, 5]), torch.tensor([0, 0, 0, 0, 0, 0, 1])
    generator = torch.Generator().manual_seed(0)
    n = 12_000
    seen = {}
    for _ in range(n):
        query = torch.tensor([8]), torch.tensor([0])
        positive, *negatives = metrics.sample_candidates(0, *query, ids, groups, generator, 2).tolist()
        key = positive, *sorted(negatives)
        seen[key] = seen.get(key, 0) + 1
    assert set(seen) == {(p, *pair) for p in (1, 2) for pair in itertools.combinations((0, 3, 4, 5), 2)}
    chi2 = sum((count - n / 12) ** 2 / (n / 12) for count in seen.values())
    assert chi2 < 31.3  # 11 degrees of freedom: p = .001


def test_draws_come_from_their_own_seed():
    texts, images = made_up()
    image, text = torch.randn(len(images[0]), 4), torch.randn(60, 4)
    inputs = image, text, images[0], texts[0], images[1], texts[1]
    state = torch.get_rng_state()
    results = [evaluate.sample_100(*inputs, seed=seed, draws=3, n_queries=40) for seed in (1, 1, 2)]
    ranks = [result.outcomes["t2i"] for result in results]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(ranks[0], ranks[1]) and not torch.equal(ranks[0], ranks[2])
    assert not torch.equal(ranks[0] > 0, ranks[2] > 0)  # other queries
    assert not torch.equal(ranks[0][:, 0], ranks[0][:, 1])  # and every draw is another


def test_candidate_ranks_by_hand():
    gallery = line([5, 7, 7, 1, -3])
    for candidates, rank in (
        ([2, 1, 0, 3], 2),  # 1 is level and earlier in the gallery
        ([1, 2, 0, 3], 1),  # 2 is level and later
        ([0, 3], 1),
        ([4, 3], 2),
        ([3], 1),
    ):
        assert metrics.candidate_rank(ONE[0], gallery, torch.tensor(candidates)) == rank


def test_many_queries_are_sampled_and_few_are_all_asked():
    n = 1100
    ids, groups = torch.arange(n), torch.arange(n) % 2
    image = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    result = evaluate.sample_100(image, image, ids, ids, groups, groups, draws=2)
    assert [(result.outcomes[way] > 0).sum(dim=0).tolist() for way in ("i2t", "t2i")] == [[1000, 1000]] * 2
    assert result.counts["i2t_queries"] == 1000 and result.counts["t2i_negatives_min"] == 100
    assert result.chance["t2i_r@10"] == pytest.approx(10 / 101)
    few = evaluate.sample_100(image[:30], image[:30], ids[:30], ids[:30], groups[:30], groups[:30])
    assert few.counts["i2t_queries"] == 30 and few.counts["i2t_negatives_mean"] == 14


# ---- the other protocols ---------------------------------------------------------------------------------------------


def test_composed_retrieval_keeps_galleries_apart():
    """The shirt that would win for the dress query is no rival of the dress."""
    dress = ONE, line([1, 2]), torch.tensor([5]), torch.tensor([5, 6])  # rank 2
    shirt = torch.ones(2, 1), line([9, 8, 7]), torch.tensor([6, 7]), torch.tensor([6, 8, 7])  # ranks 1, 3
    result = evaluate.composed_retrieval({"dress": dress, "shirt": shirt}, ks=(1, 2))
    expected = {"dress_r@1": 0, "dress_r@2": 1, "shirt_r@1": 0.5, "shirt_r@2": 0.5, "mean_recall": 0.5}
    assert result.metrics == pytest.approx(expected)
    assert result.chance["dress_r@1"] == pytest.approx(1 / 2) and result.chance["shirt_r@2"] == pytest.approx(2 / 3)
    assert result.counts == {"dress_queries": 1, "dress_gallery": 2, "shirt_queries": 2, "shirt_gallery": 3}


def test_ocir_averages_over_categories_and_ranks_within_them():
    blank = line([1, 2, 3, 9, 8])
    blank_id, category = torch.tensor([10, 11, 12, 20, 21]), torch.tensor([0, 0, 0, 4, 4])
    target_id = torch.tensor([10, 11, 12, 21])  # ranks 3, 2, 1 in category 0; 2 in category 4
    result = evaluate.outfit_retrieval(torch.ones(4, 1), target_id, blank, blank_id, category, ks=(1, 2))
    assert result.outcomes["ocir"].tolist() == [[3, 0], [2, 0], [1, 0], [2, 4]]
    assert result.metrics == pytest.approx({"r@1": (1 / 3 + 0) / 2, "r@2": (2 / 3 + 1) / 2, "mean_recall": 0.5})
    assert result.chance == pytest.approx({"r@1": (1 / 3 + 1 / 2) / 2, "r@2": (2 / 3 + 1) / 2, "mean_recall": 0.625})


def test_recognition_counts_a_class_absent_from_the_truth_and_not_one_absent_from_both():
    labels = torch.tensor([0, 0, 0, 1])
    predictions = torch.tensor([0, 0, 3, 1])  # class 3 only predicted: F1 0; class 2 in neither
    result = evaluate.recognition(one_hot(predictions, 6).float(), labels)
    assert result.metrics == pytest.approx({"accuracy": 3 / 4, "macro_f1": (4 / 5 + 1 + 0) / 3})
    assert result.chance == pytest.approx({"accuracy": 3 / 4, "macro_f1": 1 / 2})
    never = evaluate.recognition(torch.ones(2, 3), torch.tensor([0, 2]))  # a class in the truth, never predicted
    assert never.metrics["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)


@pytest.fixture
def partly_labelled(root):
    """A FashionGen val of six products, two images each; the fourth has no category and the fifth no sub-category."""
    names = sorted(path.name for path in (root / "FashionGen" / "val").iterdir())
    labels = zip("AABCCD", (0, 1, 0, None, 1, 1), (5, 5, 5, 9, None, 9), strict=True)
    products = [
        {"id": i, "images": names[2 * i : 2 * i + 2], "title": text, "description": "", "attributes_id": []}
        | {"category_id": category, "subcategory_id": subcategory}
        for i, (text, category, subcategory) in enumerate(labels)
    ]
    (root / "FashionGen" / "val_info.json").write_text(json.dumps(products))
    (root / "labels.json").unlink(missing_ok=True)
    return root


def test_retrieval_counts_equal_texts_and_needs_no_sub_category(partly_labelled):
    vectors = torch.eye(6)
    embedder = SimpleNamespace(embed=lambda items: vectors[[item["id"] for item in items]])
    config = evaluate.EvalConfig("fashiongen_retrieval", data_root=str(partly_labelled), workers=0)
    full, sampled = (result.counts for _, result in evaluate.evaluate_retrieval(embedder, config))
    assert (full["images"], full["texts"], full["images_left_out"], full["texts_left_out"]) == (12, 6, 0, 0)
    assert (full["i2t_equal_texts"], full["t2i_equal_texts"]) == (8, 4)  # A twice and C twice
    assert (sampled["images"], sampled["texts"]) == (sampled["i2t_queries"], sampled["t2i_queries"]) == (10, 5)
    assert (sampled["images_left_out"], sampled["texts_left_out"]) == (2, 1)
    assert (sampled["i2t_equal_texts"], sampled["t2i_equal_texts"]) == (4, 2)  # C meets no other C in its sub-category


def test_retrieval_without_sub_categories_and_equal_texts_says_nothing_of_them(root):
    rows = json.loads((root / "FashionGen" / "val_info.json").read_text())[:5]
    rows = [{**row, "subcategory_id": None, "title": str(i)} for i, row in enumerate(rows)]
    (root / "FashionGen" / "val_info.json").write_text(json.dumps(rows))
    embedder = SimpleNamespace(embed=lambda items: torch.eye(5)[[item["id"] for item in items]])
    config = evaluate.EvalConfig("fashiongen_retrieval", data_root=str(root), workers=0)
    ((protocol, result),) = evaluate.evaluate_retrieval(embedder, config)
    assert protocol == "full gallery"
    assert result.counts.keys() == {"images", "texts", "images_left_out", "texts_left_out"}


def test_recognition_leaves_out_products_without_a_label(partly_labelled, capsys):
    model = SimpleNamespace(config=SimpleNamespace(n_classes=2), classify=None)
    embedder = SimpleNamespace(model=model, embed=lambda items, encode: one_hot(torch.tensor([i["id"] for i in items])))
    config = evaluate.EvalConfig("fashiongen_category", data_root=str(partly_labelled), workers=0)
    ((_, result),) = evaluate.evaluate_recognition(embedder, config)
    assert result.counts == {"samples": 10, "classes": 2, "samples_left_out": 2} and result.metrics["accuracy"] == 1
    said = "FashionGen val: 1 of 6 products have no category_id and are left out"
    assert said in capsys.readouterr().out
    folder = partly_labelled / "FashionGen"
    shutil.copytree(folder / "val", folder / "train", dirs_exist_ok=True)
    shutil.copy(folder / "val_info.json", folder / "train_info.json")
    items, sizes, _ = data.fashiongen_items(config)
    assert [item["label"] for item in items] == [0, 1, 0, 1, 1] and sizes == {"n_classes": 2}
    assert said.replace("val", "train") in capsys.readouterr().out


@pytest.mark.parametrize("task", ["polyvore", "fashioniq"])
def test_a_part_without_queries_gives_no_table(task, root):
    for path in [root / "PolyvoreOutfits/ocir_disjoint_test.json", *root.glob("FashionIQ/captions/cap.*.val.json")]:
        path.write_text(json.dumps([{**row, "fake_data": True} for row in json.loads(path.read_text())]))
    model = SimpleNamespace(n_categories=len(annotations.load_polyvore_items(root / "PolyvoreOutfits")[1]))
    config = evaluate.EvalConfig(task, data_root=str(root), image_size=32, workers=0)
    with pytest.raises((IndexError, InputError)):
        list(evaluate.run_task(model, None, config, Processes(0, 1, torch.device("cpu"))))


def test_recognition_refuses_nan_and_other_shapes():
    logits = torch.zeros(2, 3)
    logits[1, 2] = math.nan
    with pytest.raises(ValueError, match="sample 1"):
        evaluate.recognition(logits, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3,\)"):
        evaluate.recognition(torch.zeros(2, 3), torch.tensor([0, 0, 0]))


# ---- chance ----------------------------------------------------------------------------------------------------------


def test_random_recall_equals_all_orders():
    for gallery in range(1, 7):
        for positives in range(1, gallery + 1):
            ranks = [min(order[:positives]) + 1 for order in itertools.permutations(range(gallery))]
            for k in (1, 2, 5, 10):
                expected = sum(rank <= k for rank in ranks) / len(ranks)
                got = metrics.random_recall(positives, gallery, k)
                assert got == pytest.approx(expected, abs=1e-12)


def test_chance_is_what_random_embeddings_get():
    """Mean over 150 random models, within 4 standard errors; several positives a text, so not simply k / gallery."""
    (text_id, text_group), (image_id, image_group) = made_up(n_products=30)
    inputs, groups = (image_id, text_id), (image_group, text_group)
    full, sampled = [], []
    for seed in range(150):
        generator = torch.Generator().manual_seed(seed)
        image, text = (torch.randn(len(ids), 3 * len(image_id), generator=generator) for ids in inputs)
        full.append(evaluate.full_gallery(image, text, *inputs))
        sampled.append(evaluate.sample_100(image, text, *inputs, *groups, draws=1, seed=seed))
    for runs in (full, sampled):
        for key, chance in runs[0].chance.items():
            got = torch.tensor([run.metrics[key] for run in runs], dtype=torch.float64)
            assert got.mean().item() == pytest.approx(chance, abs=4 * got.std().item() / math.sqrt(len(runs))), key
    assert full[0].chance["t2i_r@5"] > 1.5 * 5 / len(image_id)


def test_recognition_chance():
    labels = torch.tensor([0] * 60 + [1] * 30 + [5] * 10)
    always_0 = evaluate.recognition(torch.ones(len(labels), 6), labels)
    assert always_0.chance["accuracy"] == always_0.metrics["accuracy"] == 0.6
    labels = labels.repeat(100)
    guess = labels[torch.randint(len(labels), labels.shape, generator=torch.Generator().manual_seed(0))]
    found = evaluate.recognition(one_hot(guess).float(), labels).metrics
    assert found["macro_f1"] == pytest.approx(always_0.chance["macro_f1"], abs=0.02)


# ---- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 5])
def test_bootstrap_interval_has_the_binomial_width(draws):
    """Five draws of the same query, as sample-100 has them, are not five queries: the interval is that of n queries."""
    n, p = 2000, 0.3
    ranks = torch.where(torch.arange(n) < p * n, 1, 100)[:, None].repeat(1, draws)
    low, high = metrics.bootstrap(partial(metrics.recalls, ks=(10,)), {"dress": ranks})["dress_r@10"]
    width = 1.96 * math.sqrt(p * (1 - p) / n)
    assert (low + high) / 2 == pytest.approx(p, abs=0.1 * width)
    assert (high - low) / 2 == pytest.approx(width, rel=0.1)


def test_paired_difference_takes_the_same_queries_for_both():
    """Model a has every hit of b and 40 of 1,000 queries more: the difference varies as 40 hits do, not as 500."""
    n, metric = 1000, partial(metrics.recalls, ks=(1,))
    a = {"x": torch.where(torch.arange(n) < 500, 1, 2)}
    b = {"x": torch.where(torch.arange(n) < 460, 1, 2)}
    low, high = metrics.bootstrap(metric, a, baseline=b)["x_r@1"]
    assert 0 < low < 0.04 < high
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.04 * 0.96 / n), rel=0.1)
    assert metrics.bootstrap(metric, a, baseline=a)["x_r@1"] == (0, 0)
    with pytest.raises(ValueError, match="same queries"):
        metrics.bootstrap(metric, a, baseline={"x": torch.ones(999)})


def test_bootstrap_of_averages_that_are_not_means_over_queries():
    """Macro-F1 and OCIR's category average: the interval encloses the value and narrows with the data."""
    logits, labels = arrays("classification", "logits", "targets")
    kept = labels < 5
    ocir = evaluate.outfit_retrieval(*golden_ocir())
    f1 = evaluate.recognition(logits[kept, :5], labels[kept])
    for metric, result, key in (
        (partial(metrics.category_recalls, ks=(10,)), ocir, "r@10"),
        (metrics.recognition_scores, f1, "macro_f1"),
    ):
        low, high = metrics.bootstrap(metric, result.outcomes, draws=300)[key]
        assert low < result.metrics[key] < high
        ten_times = {name: table.repeat(10, 1) for name, table in result.outcomes.items()}
        narrow = metrics.bootstrap(metric, ten_times, draws=300)[key]
        assert (narrow[1] - narrow[0]) * math.sqrt(10) == pytest.approx(high - low, rel=0.3)
        assert metrics.bootstrap(metric, ten_times, draws=300)[key] == narrow


# ---- where the tables go ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, cause",
    [
        (["--checkpoint=c.pt", "--out=nowhere/a.json"], "nowhere/a.json: ***No such file or directory; set --out=FILE"),
        (["--checkpoint=c.pt", "--out=nowhere/a.png", "--show=2"], "nowhere/a.json: ***No such file or directory"),
        (["--checkpoint=c.pt", "--out=c.pt/a.json"], "c.pt/a.json: ***Not a directory"),
        (["--checkpoint=c.pt"], "c.pt.fashioniq.json: ***it is a folder; set --out=FILE to where it can"),
        (["--list=nowhere/a.jsonl"], "nowhere/a.jsonl: ***No such file or directory; set --list=FILE to where it can"),
    ],
)
def test_a_place_that_cannot_be_written_is_said_before_the_work(words, cause, tmp_path, monkeypatch):
    (tmp_path / "c.pt").write_text("")
    (tmp_path / "c.pt.fashioniq.json").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--task=fashioniq", *words])
    monkeypatch.setattr(evaluate, "evaluate_checkpoint", None)
    monkeypatch.setattr(evaluate, "list_items", None)
    with pytest.raises(InputError, match=cause.replace("***", "cannot be written there: ")):
        evaluate.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.pt", "c.pt.fashioniq.json"]


def test_the_table_is_printed_where_its_file_cannot_be_written(tmp_path, capsys):
    """A disk can fill up, or go, while the work is done."""
    results = {"every image": evaluate.recognition(one_hot(torch.tensor([1, 0])).float(), torch.tensor([1, 1]))}
    config, out = evaluate.EvalConfig("fashiongen_category"), tmp_path / "gone" / "table.json"
    with pytest.raises(InputError, match="table.json: cannot be saved: No such file or directory"):
        tables.report(results, config, torch.device("cpu"), "c.pt", out, 1.0)
    printed = capsys.readouterr().out
    assert "accuracy    50.0" in printed and "written" not in printed
