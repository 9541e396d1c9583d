"""Ranks, metrics, chance and intervals: tensors in, numbers out. evaluate.py defines the words and the protocols.

queries (Q, D), gallery (G, D) float32 or float64; query_* (Q,), gallery_* (G,) int64. Of the same id means correct."""

import math
import statistics

import torch
import torch.nn.functional as F


def check_embeddings(queries, gallery):
    """Raise ValueError for embeddings of other shapes or dtypes, and where a score could be NaN or infinite.

    |q . g| <= |q| |g|, so the norms tell the last without a pass over the (Q, G) scores."""
    found = f"queries {tuple(queries.shape)} {queries.dtype}, gallery {tuple(gallery.shape)} {gallery.dtype}"
    two_d = queries.dim() == gallery.dim() == 2
    same_dtype = queries.dtype == gallery.dtype and queries.dtype in (torch.float32, torch.float64)
    if not two_d or not same_dtype or queries.shape[1] != gallery.shape[1] or not len(queries) * len(gallery):
        raise ValueError(f"{found}; expected (Q, D) and (G, D), neither empty, both float32 or both float64")
    for name, rows in (("query", queries), ("gallery", gallery)):
        fine = rows.norm(dim=1) < torch.finfo(rows.dtype).max ** 0.5  # false for NaN
        bad = (~fine).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"{name} embedding {bad[0]} is not finite or too large ({len(bad)} such rows): {found}")


def find_positives(query_id, gallery_id):
    """Each query's correct items, gallery indices in ascending order, and their number: (Q, m), (Q,) int64.

    The last item fills the rest of its row. Raises ValueError for a query without a correct item, with its id."""
    sorted_id, order = gallery_id.sort(stable=True)
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
        # Zeros fill up the last block. A product of another shape may round otherwise, and then twins may not tie.
        scores = (F.pad(rows, (0, 0, 0, block - len(rows))) @ gallery.t())[: len(rows)]  # (b, G)
        # The best correct item's score comes from this product, too, so it has the same bits as its equals.
        own_scores = scores.gather(1, own)  # (b, m)
        best = own_scores.amax(dim=1, keepdim=True)  # (b, 1)
        first = own.masked_fill(own_scores < best, len(gallery)).amin(dim=1, keepdim=True)  # (b, 1), its place
        before = (scores > best) | ((scores == best) & (place < first))
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

    def chance(name, k):
        return statistics.fmean(random_recall(*size, k) for size in sizes[name])

    return with_mean({f"{name}_r@{k}": chance(name, k) for name in sizes for k in ks})


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
    is that of the difference to it. Source: docs/recipe.md "Chance and intervals"."""
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
