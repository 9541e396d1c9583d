"""How numbers are made: ranks, recalls, chance and intervals, and below them the protocols. Tensors in, numbers out.

rank: the place of a query's best correct item in the gallery; 1 is the best; equal scores rank in gallery order.
hit: a query is a hit at k if its rank is at most k. Recall at k (r@k) is the share of hits among the queries.
chance: what a random ranking, or a guess, reaches on average.
outcomes: {set: tensor with a row for each query}, from which all metrics can be computed, also of resampled queries.

queries (Q, D), gallery (G, D) float32 or float64; query_* (Q,), gallery_* (G,) int64. An item is correct if its id is
the query's."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F


def check_embeddings(queries, gallery):
    """Raise ValueError for embeddings of other shapes or dtypes, and where a score could be NaN or infinite.

    |q . g| <= |q| |g|, so the norms tell the last without a pass over the (Q, G) scores."""
    found = f"queries {tuple(queries.shape)} {queries.dtype}, gallery {tuple(gallery.shape)} {gallery.dtype}"
    same_width = queries.dim() == gallery.dim() == 2 and queries.shape[1] == gallery.shape[1]
    same_dtype = queries.dtype == gallery.dtype and queries.dtype in (torch.float32, torch.float64)
    if not same_width or not same_dtype or not len(queries) or not len(gallery):
        raise ValueError(f"{found}; expected (Q, D) and (G, D), neither empty, both float32 or both float64")
    for name, rows in (("query", queries), ("gallery", gallery)):
        fine = rows.norm(dim=1) < torch.finfo(rows.dtype).max ** 0.5  # false for NaN
        bad = (~fine).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"{name} embedding {bad[0]} is not finite or too large ({len(bad)} such rows): {found}")


def find_positives(query_id, gallery_id):
    """Each query's correct items, gallery indices in ascending order, and their number: (Q, m), (Q,) int64.

    Gallery ids 7 5 7 and query ids 5 7 give [[1, 1], [0, 2]] and [1, 2]: a shorter row repeats its last item.
    Raises ValueError for a query without a correct item, with its id."""
    sorted_id, order = gallery_id.sort(stable=True)  # the items of one id are now neighbours, from `start` on
    start = torch.searchsorted(sorted_id, query_id)
    count = torch.searchsorted(sorted_id, query_id, right=True) - start
    missing = (count == 0).nonzero().flatten().tolist()
    if missing:
        query = f"query {missing[0]} (id {query_id[missing[0]].item()}) and {len(missing) - 1} more have"
        raise ValueError(f"{query} no correct item in the gallery of {len(gallery_id)}")
    nth = torch.arange(int(count.max()), device=count.device)
    return order[start[:, None] + torch.minimum(nth, count[:, None] - 1)], count


@torch.no_grad()
def best_ranks(queries, gallery, query_id, gallery_id, block=512):
    """Rank of each query's best correct item in the whole gallery by dot product: (Q,) int64 on the CPU.

    Rank = 1 + the items that score higher + the items that score the same and stand earlier in the gallery.
    Only `block` queries have scores at a time. Raises as `check_embeddings` and `find_positives`."""
    check_embeddings(queries, gallery)
    if len(query_id) != len(queries) or len(gallery_id) != len(gallery):
        raise ValueError(f"ids {len(query_id)} and {len(gallery_id)}, embeddings {len(queries)} and {len(gallery)}")
    own_items, _ = find_positives(query_id.to(queries.device), gallery_id.to(queries.device))
    place = torch.arange(len(gallery), device=queries.device)
    ranks = []
    for rows, own in zip(queries.split(block), own_items.split(block), strict=True):
        # Equal gallery items must get equal bits, or their order would be an accident of rounding. With few rows a
        # matrix product may take another kernel that rounds them differently, so zeros fill up the last block.
        scores = (F.pad(rows, (0, 0, 0, block - len(rows))) @ gallery.t())[: len(rows)]  # (b, G)
        # The best correct item's score comes from this product, too, so it has the same bits as its equals.
        own_scores = scores.gather(1, own)  # (b, m)
        best = own_scores.amax(dim=1, keepdim=True)  # (b, 1)
        # Its place in the gallery: the first of the correct items that have this score.
        best_place = own.masked_fill(own_scores < best, len(gallery)).amin(dim=1, keepdim=True)  # (b, 1)
        before = (scores > best) | ((scores == best) & (place < best_place))
        ranks.append(1 + before.sum(dim=1, dtype=torch.int32).long())  # int32 needs half the memory of int64
    return torch.cat(ranks).cpu()


def sample_candidates(q, query_id, query_group, gallery_id, gallery_group, generator, n_negatives=100):
    """What query q ranks in sample-100: (c,) int64 gallery indices, random items of the query's group, all distinct.

    The first is correct, which is the positive. Up to `n_negatives` others are not. Ids and groups are on the CPU."""
    same_group, correct = gallery_group == query_group[q], gallery_id == query_id[q]
    positives = (same_group & correct).nonzero().flatten()
    negatives = (same_group & ~correct).nonzero().flatten()
    positive = positives[torch.randint(len(positives), (1,), generator=generator)]
    return torch.cat([positive, negatives[torch.randperm(len(negatives), generator=generator)[:n_negatives]]])


def candidate_rank(query, gallery, candidates):
    """Rank of candidates[0] among the candidates (c,), int64 gallery indices; query (D,), gallery (G, D)."""
    scores = (gallery[candidates] * query).sum(dim=1)
    return 1 + int(((scores > scores[0]) | ((scores == scores[0]) & (candidates < candidates[0]))).sum())


def with_mean(recall):
    """The dict with "mean_recall", the mean of its values, added."""
    return {**recall, "mean_recall": sum(recall.values()) / len(recall)}


def recalls(outcomes, ks):
    """Share of hits in each query set: {"<set>_r@<k>", ..., "mean_recall"}; outcomes {set: ranks}, 0 does not count."""
    ranks = {name: table[table > 0] for name, table in outcomes.items()}
    return with_mean({f"{name}_r@{k}": (ranks[name] <= k).double().mean().item() for name in ranks for k in ks})


def random_recall(positives, gallery, k):
    """Chance of a hit at k if `positives` of `gallery` items are correct (ints): 1 - C(G - P, k) / C(G, k)."""
    k = min(k, gallery)
    return 1 - math.comb(gallery - positives, k) / math.comb(gallery, k)


def chance_recalls(sizes, ks):
    """`recalls` of a random ranking; sizes {set: [(positives, gallery) of each query]}, as in `random_recall`."""
    chance = {}
    for name, queries in sizes.items():
        for k in ks:
            chance[f"{name}_r@{k}"] = statistics.fmean(random_recall(*size, k) for size in queries)
    return with_mean(chance)


def category_mean(values, category):
    """Mean over the categories present of each category's mean; values (N,) or a list, category (N,) int64 >= 0."""
    n, total = category.bincount(), category.bincount(torch.as_tensor(values, dtype=torch.float64))
    return (total[n > 0] / n[n > 0]).mean().item()


def category_recalls(outcomes, ks):
    """Recall averaged over categories: {"r@<k>", "mean_recall"}; outcomes {"ocir": (Q, 2) int64 rank, category}."""
    ranks, category = outcomes["ocir"].unbind(dim=1)
    return with_mean({f"r@{k}": category_mean(ranks <= k, category) for k in ks})


def recognition_scores(outcomes):
    """{"accuracy", "macro_f1"}; outcomes {"samples": (N, 2) int64 prediction, label}, both >= 0.

    Macro-F1 is the mean of 2 TP / (predicted + true) over the classes that occur as a label or a prediction."""
    predictions, labels = outcomes["samples"].unbind(dim=1)
    total = torch.bincount(outcomes["samples"].flatten())
    hits = torch.bincount(labels[predictions == labels], minlength=len(total))
    f1 = (2 * hits.double() / total)[total > 0].mean()
    return {"accuracy": hits.sum().item() / len(labels), "macro_f1": f1.item()}


def bootstrap(metrics_of, outcomes, baseline=None, draws=1000, seed=0):
    """95 % percentile interval of every metric over resampled queries: {name: (low, high)}.

    metrics_of(outcomes) -> {name: value}. With `baseline`, another model's outcomes for the same queries, the interval
    is that of the difference to it. Queries count as independent, which photos of one product are not, and the seeds of
    training do not count: a true interval is wider. Source: docs/recipe.md "Chance and intervals"."""
    if baseline and any(table.shape != baseline[name].shape for name, table in outcomes.items()):
        raise ValueError("baseline: its outcomes are not of the same queries")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(draws):
        rows = {name: torch.randint(len(table), (len(table),), generator=generator) for name, table in outcomes.items()}
        value = metrics_of({name: table[rows[name]] for name, table in outcomes.items()})
        if baseline:
            other = metrics_of({name: table[rows[name]] for name, table in baseline.items()})
            value = {name: value[name] - other[name] for name in value}
        values.append(list(value.values()))
    ends = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return dict(zip(value, zip(*ends.tolist(), strict=True), strict=True))


@dataclass
class Result:
    """What a protocol found. Metrics and chance have the same names and lie in 0..1."""

    metrics_of: Callable  # outcomes -> metrics
    chance: dict
    counts: dict  # numbers of queries, gallery items, ...
    outcomes: dict
    rankings: list = field(default_factory=list)  # pictures.Ranking of all queries, for --show

    def __post_init__(self):
        self.metrics = self.metrics_of(self.outcomes)


# ---- protocols: embeddings and ids -> Result -------------------------------------------------------------------------


def full_gallery(image, text, image_id, text_id, ks=(1, 5, 10)):
    """ITR and TIR: every image ranks all texts ("i2t"), every text all images ("t2i"); all items of its product count.

    image (N, D), text (M, D) float32; image_id (N,), text_id (M,) int64 product ids.
    Raises as `best_ranks`. Source: docs/recipe.md "Full gallery"."""
    i2t, t2i = best_ranks(image, text, image_id, text_id), best_ranks(text, image, text_id, image_id)
    outcomes, counts = {"i2t": i2t, "t2i": t2i}, {"images": len(image), "texts": len(text)}
    _, texts = find_positives(image_id, text_id)  # how many texts are correct for each image
    _, images = find_positives(text_id, image_id)
    sizes = {"i2t": [(n, len(text)) for n in texts.tolist()], "t2i": [(n, len(image)) for n in images.tolist()]}
    return Result(partial(recalls, ks=ks), chance_recalls(sizes, ks), counts, outcomes)


def sample_100(image, text, image_id, text_id, image_group, text_group, seed=0, draws=5, n_queries=1000, ks=(1, 5, 10)):
    """ITR and TIR as Kaleido-BERT measures them: random queries rank one positive and up to 100 negatives.

    As `full_gallery`, on the CPU; image_group (N,), text_group (M,) int64 sub-categories; a small one has fewer
    negatives. Each draw takes n_queries queries, or all of fewer. The metrics are means over all draws. outcomes {way:
    (Q, draws) int64 ranks, 0 where the draw left the query out}. Source: docs/recipe.md "Sample-100"."""
    generator = torch.Generator().manual_seed(seed)  # its own, so that the global state neither counts nor changes
    outcomes, sizes, counts = {}, {}, {"images": len(image), "texts": len(text), "draws": draws, "seed": seed}
    check_embeddings(image, text)

    def rank_one_way(way, queries, query_id, query_group, gallery, gallery_id, gallery_group):
        outcomes[way], negatives = torch.zeros(len(queries), draws, dtype=torch.int64), []
        for draw in range(draws):
            for q in torch.randperm(len(queries), generator=generator)[:n_queries].tolist():
                candidates = sample_candidates(q, query_id, query_group, gallery_id, gallery_group, generator)
                outcomes[way][q, draw] = candidate_rank(queries[q], gallery, candidates)
                negatives.append(len(candidates) - 1)
        sizes[way] = [(1, 1 + n) for n in negatives]
        counts[f"{way}_queries"] = len(negatives) // draws
        counts[f"{way}_negatives_min"], counts[f"{way}_negatives_mean"] = min(negatives), statistics.fmean(negatives)

    rank_one_way("i2t", image, image_id, image_group, text, text_id, text_group)
    rank_one_way("t2i", text, text_id, text_group, image, image_id, image_group)
    return Result(partial(recalls, ks=ks), chance_recalls(sizes, ks), counts, outcomes)


def composed_retrieval(classes, ks=(10, 50)):
    """TGIR: each class has its own gallery, which includes the reference images; <class>_r@k and their mean.

    classes {name: (queries, gallery, query_id, gallery_id)}, as `best_ranks` takes them; ids of images, each once in a
    gallery. Raises as that. Source: docs/recipe.md "Text-guided image retrieval"."""
    outcomes, sizes, counts = {}, {}, {}
    for name, (queries, gallery, query_id, gallery_id) in classes.items():
        outcomes[name] = best_ranks(queries, gallery, query_id, gallery_id)
        sizes[name] = [(1, len(gallery))]
        counts[f"{name}_queries"], counts[f"{name}_gallery"] = len(queries), len(gallery)
    return Result(partial(recalls, ks=ks), chance_recalls(sizes, ks), counts, outcomes)


def recognition(logits, labels):
    """CR and SCR: every image is one sample; accuracy and macro_f1.

    logits (N, C) float, the lower of equal classes counts; labels (N,) int64.
    Raises ValueError on NaN logits and on shapes that do not match. Source: docs/recipe.md "Recognition"."""
    if logits.shape[:1] != labels.shape or not len(labels):
        raise ValueError(f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}")
    if logits.isnan().any():
        raise ValueError(f"NaN logits in sample {logits.isnan().nonzero()[0, 0].item()}")
    outcomes = {"samples": torch.stack([logits.argmax(dim=1), labels], dim=1).cpu()}
    counts = {"samples": len(labels), "classes": len(labels.unique())}
    # Accuracy: always naming the most frequent class. Macro-F1: guessing with the labels' own frequencies, where
    # precision and recall of a class are its share, so that their mean over C classes is 1 / C.
    chance = {"accuracy": labels.bincount().max().item() / len(labels), "macro_f1": 1 / counts["classes"]}
    return Result(recognition_scores, chance, counts, outcomes)


def outfit_retrieval(outfit, target_id, blank, blank_id, blank_category, ks=(10, 30, 50)):
    """OCIR: each outfit ranks the blanks of its target's fine category; r@k is averaged over the targets' categories.

    outfit (Q, D) float32: mean of the fused, scaled features of its items, not normalised again; target_id (Q,) int64.
    blank (G, D), blank_id (G,) int64, each once; blank_category (G,) int64 >= 0. All on the CPU.
    Raises as `best_ranks`. Source: docs/recipe.md "Outfit completion"."""
    target, _ = find_positives(target_id, blank_id)
    category = blank_category[target[:, 0]]  # (Q,)
    ranks = torch.zeros(len(outfit), dtype=torch.int64)
    for c in category.unique():
        rows, items = category == c, blank_category == c
        ranks[rows] = best_ranks(outfit[rows], blank[items], target_id[rows], blank_id[items])
    outcomes = {"ocir": torch.stack([ranks, category], dim=1)}
    n_items = torch.bincount(blank_category)[category].tolist()  # that each query ranks; one of them is right
    chance = {f"r@{k}": category_mean([random_recall(1, n, k) for n in n_items], category) for k in ks}
    counts = {"queries": len(outfit), "gallery": len(blank), "categories": len(category.unique())}
    return Result(partial(category_recalls, ks=ks), with_mean(chance), counts, outcomes)
