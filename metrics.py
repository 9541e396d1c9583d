"""Ranks, metrics, chance and intervals: tensors in, numbers out. evaluate.py builds its protocols from them.

The rank of a query is the place of its best correct item in the gallery. 1 is the best; equal scores rank in gallery
order. Recall at k is the share of queries whose rank is at most k. `outcomes` is {set: tensor with a row a query}."""

import torch
import torch.nn.functional as F

# ---- ranks -----------------------------------------------------------------------------------------------------------


def check_embeddings(queries, gallery):
    """Raise ValueError unless queries (Q, D) and gallery (G, D) are both float32 or both float64, with finite scores.

    The norms tell this without a pass over the (Q, G) scores, because |q . g| <= |q| |g|."""
    shapes = f"queries {tuple(queries.shape)} {queries.dtype}, gallery {tuple(gallery.shape)} {gallery.dtype}"
    two_d = queries.dim() == gallery.dim() == 2
    if not two_d or queries.shape[1] != gallery.shape[1] or not len(queries) * len(gallery):
        raise ValueError(f"embeddings must be (Q, D) and (G, D), neither empty: {shapes}")
    if queries.dtype != gallery.dtype or queries.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"embeddings must both be float32 or both float64: {shapes}")
    for name, rows in (("query", queries), ("gallery", gallery)):
        fine = rows.norm(dim=1) < torch.finfo(rows.dtype).max ** 0.5  # false for NaN
        bad = (~fine).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"{name} embedding {bad[0]} is not finite or too large ({len(bad)} such rows): {shapes}")


def check_unique(gallery_id):
    """Raise ValueError where an id stands twice in the gallery."""
    if len(gallery_id.unique()) < len(gallery_id):
        raise ValueError(f"gallery of {len(gallery_id)} rows holds only {len(gallery_id.unique())} distinct ids")


def find_positives(query_id, gallery_id):
    """Each query's correct items, which have its id: query_id (Q,), gallery_id (G,) -> own (Q, m), count (Q,); int64.

    own[i, : count[i]] are gallery indices in ascending order; the last of them fills the rest of the row.
    Raises ValueError for a query without a correct item in the gallery, with its id."""
    sorted_id, order = gallery_id.sort(stable=True)
    start = torch.searchsorted(sorted_id, query_id)
    count = torch.searchsorted(sorted_id, query_id, right=True) - start
    missing = (count == 0).nonzero().flatten().tolist()
    if missing:
        example = f"query {missing[0]} (id {query_id[missing[0]].item()})"
        more = f"{len(missing)} of {len(query_id)} queries have none"
        raise ValueError(f"{example} has no correct item in the gallery of {len(gallery_id)}; {more}")
    nth = torch.arange(int(count.max()), device=count.device)
    return order[start[:, None] + torch.minimum(nth, count[:, None] - 1)], count


@torch.no_grad()
def best_ranks(queries, gallery, query_id, gallery_id, block=512):
    """Rank of each query's best correct item in the whole gallery by dot product: (Q,) int64 on the CPU.

    queries (Q, D), gallery (G, D) float32 or float64; query_id (Q,), gallery_id (G,) int64.
    Rank = 1 + the items that score higher + the items that score the same and stand earlier in the gallery.
    Memory: two blocks of (block, G) scores, never (Q, G). Raises as `check_embeddings` and `find_positives`."""
    check_embeddings(queries, gallery)
    if len(query_id) != len(queries) or len(gallery_id) != len(gallery):
        raise ValueError(f"ids {len(query_id)} and {len(gallery_id)}, embeddings {len(queries)} and {len(gallery)}")
    own_items, _ = find_positives(query_id.to(queries.device), gallery_id.to(queries.device))
    place = torch.arange(len(gallery), device=queries.device)
    # All blocks share two buffers. Comparisons are floats: torch adds them faster than booleans, exactly below 2^24.
    scores_buffer = queries.new_empty(block, len(gallery))
    compare_buffer = torch.empty_like(scores_buffer)
    ranks = []
    for rows, own in zip(queries.split(block), own_items.split(block), strict=True):
        b = len(rows)
        # Zeros fill up the last block. A product of another shape may round otherwise, and then twins may not tie.
        scores = torch.mm(F.pad(rows, (0, 0, 0, block - b)), gallery.t(), out=scores_buffer)[:b]  # (b, G)
        # The best correct item's score comes from this product, too, so it has the same bits as its equals.
        own_scores = scores.gather(1, own)  # (b, m)
        best = own_scores.amax(dim=1, keepdim=True)  # (b, 1)
        higher = torch.gt(scores, best, out=compare_buffer[:b]).sum(dim=1)
        equal = torch.ge(scores, best, out=compare_buffer[:b]).sum(dim=1) - higher  # at least 1, the item itself
        rank = 1 + higher.long()
        # Few rows have ties. Only these count the equals before the first of the best correct items.
        tied = (equal > 1).nonzero().flatten()
        first = own.masked_fill(own_scores < best, len(gallery)).amin(dim=1, keepdim=True)[tied]
        rank[tied] += ((scores[tied] == best[tied]) & (place < first)).sum(dim=1)
        ranks.append(rank)
    return torch.cat(ranks).cpu()


def sample_candidates(q, query_id, query_group, gallery_id, gallery_group, generator, n_negatives=100):
    """What query q ranks in sample-100: one positive, then up to `n_negatives` negatives; (c,) int64 gallery indices.

    All are random items of the query's sub-category (group): the positive of its product, the negatives of other
    products and distinct. ids and groups int64 (Q,), (G,) on the CPU. Raises ValueError if there is no positive."""
    same_group, same_product = gallery_group == query_group[q], gallery_id == query_id[q]
    positives = (same_group & same_product).nonzero().flatten()
    negatives = (same_group & ~same_product).nonzero().flatten()
    if not len(positives):
        name = f"query {q} (id {query_id[q]})"
        raise ValueError(f"{name} has no item of its product in sub-category {query_group[q]} of the gallery")
    positive = positives[torch.randint(len(positives), (1,), generator=generator)]
    return torch.cat([positive, negatives[torch.randperm(len(negatives), generator=generator)[:n_negatives]]])


def candidate_rank(query, gallery, candidates):
    """Rank of candidates[0] among the candidates (c,), int64 gallery indices; query (D,), gallery (G, D)."""
    scores = (gallery[candidates] * query).sum(dim=1)
    equal_before = (scores == scores[0]) & (candidates < candidates[0])
    return 1 + int((scores > scores[0]).sum() + equal_before.sum())


def sample_ranks(queries, query_id, query_group, gallery, gallery_id, gallery_group, generator, draws, n_queries=1000):
    """In every draw `n_queries` random queries, or all if there are fewer, rank their `sample_candidates`.

    Returns the positive's ranks (Q, draws) int64, 0 where a draw left the query out, and the number of negatives of
    every other entry (n,) int64, because a small sub-category has fewer of them. Raises as `check_embeddings`."""
    check_embeddings(queries, gallery)
    ranks = torch.zeros(len(queries), draws, dtype=torch.int64)
    n_negatives = torch.zeros_like(ranks)
    for draw in range(draws):
        for q in torch.randperm(len(queries), generator=generator)[:n_queries].tolist():
            candidates = sample_candidates(q, query_id, query_group, gallery_id, gallery_group, generator)
            ranks[q, draw] = candidate_rank(queries[q], gallery, candidates)
            n_negatives[q, draw] = len(candidates) - 1
    return ranks, n_negatives[ranks > 0]


# ---- metrics ---------------------------------------------------------------------------------------------------------


def with_mean(recall):
    """Adds "mean_recall", the mean of all recalls."""
    return {**recall, "mean_recall": sum(recall.values()) / len(recall)}


def recalls(outcomes, ks):
    """Share of hits in each query set: {"<set>_r@<k>", ..., "mean_recall"}.

    outcomes {set: ranks (Q,) or (Q, draws) int64}; rank 0 means that the draw left the query out, so it does not count.
    Raises ValueError for a set without a query."""
    ranks = {name: table[table > 0] for name, table in outcomes.items()}
    for name in ranks:
        if not len(ranks[name]):
            raise ValueError(f"no query in {name!r}")
    return with_mean({f"{name}_r@{k}": (ranks[name] <= k).double().mean().item() for name in ranks for k in ks})


def random_recall(positives, gallery, k):
    """Expected recall at k of a random ranking: 1 - C(G - P, k) / C(G, k), the exact hypergeometric.

    positives P, gallery G int64 tensors that broadcast, 1 <= P <= G -> float64. A gallery of k or fewer gives 1."""
    miss = torch.ones(torch.broadcast_shapes(positives.shape, gallery.shape), dtype=torch.float64)
    for i in range(k):  # no correct item in place i + 1, given none before
        miss *= (gallery - positives - i).clamp(min=0) / (gallery - i).clamp(min=1).double()
    return 1 - miss


def chance_recalls(sizes, ks):
    """`recalls` of a random ranking; sizes {set: (positives, gallery)} int64, as `random_recall` takes them."""
    return with_mean({f"{name}_r@{k}": random_recall(*sizes[name], k).mean().item() for name in sizes for k in ks})


def category_mean(values, category):
    """values (N,), category (N,) int64 >= 0 -> mean over the categories present of each category's mean."""
    n, total = torch.bincount(category), torch.bincount(category, weights=values.double())
    return (total[n > 0] / n[n > 0]).mean().item()


def category_recalls(outcomes, ks):
    """Recall averaged over categories: {"r@<k>", "mean_recall"}; outcomes {"ocir": (Q, 2) int64 rank, category}."""
    ranks, category = outcomes["ocir"].unbind(dim=1)
    return with_mean({f"r@{k}": category_mean(ranks <= k, category) for k in ks})


def category_chance(n_items, category, ks):
    """`category_recalls` of a random ranking, where n_items (Q,) int64 items, one of them right, are ranked."""
    return with_mean({f"r@{k}": category_mean(random_recall(torch.tensor(1), n_items, k), category) for k in ks})


def recognition_scores(outcomes):
    """{"accuracy", "macro_f1"}; outcomes {"samples": (N, 2) int64 prediction, label}, both >= 0.

    Macro-F1 is the mean of 2 TP / (predicted + true) over the classes that occur as a label or a prediction."""
    predictions, labels = outcomes["samples"].unbind(dim=1)
    total = torch.bincount(outcomes["samples"].flatten())
    hits = torch.bincount(labels[predictions == labels], minlength=len(total))
    f1 = 2 * hits[total > 0].double() / total[total > 0]
    return {"accuracy": hits.sum().item() / len(labels), "macro_f1": f1.mean().item()}


def recognition_chance(labels):
    """labels (N,) int64 -> accuracy of always naming the most frequent class; macro-F1 of guessing with the labels' own
    frequencies (precision = recall = share of the class, so 1 / C over C classes; a ratio of expectations)."""
    n = torch.bincount(labels)
    return {"accuracy": n.max().item() / len(labels), "macro_f1": 1 / int((n > 0).sum())}


def bootstrap(metrics_of, outcomes, baseline=None, draws=1000, seed=0):
    """95 % percentile interval of every metric over resampled queries: {name: (low, high)}.

    metrics_of(outcomes) -> {name: value}. With `baseline`, another model's outcomes: the interval of the difference to
    it, both on the same resampled queries. Raises ValueError where the two do not have the same shapes.
    Source: docs/recipe.md "Chance and intervals"."""
    shapes = [{name: tuple(table.shape) for name, table in x.items()} for x in (outcomes, baseline or outcomes)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"not the same queries: {shapes[0]}, {shapes[1]}")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(draws):
        rows = {name: torch.randint(len(table), (len(table),), generator=generator) for name, table in outcomes.items()}
        value = metrics_of({name: table[rows[name]] for name, table in outcomes.items()})
        if baseline is not None:
            other = metrics_of({name: table[rows[name]] for name, table in baseline.items()})
            value = {name: value[name] - other[name] for name in value}
        values.append(list(value.values()))
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    intervals = torch.tensor(values, dtype=torch.float64).quantile(ends, dim=0).t().tolist()
    return {name: (low, high) for name, (low, high) in zip(value, intervals, strict=True)}
