"""Evaluation protocols: embeddings and ids in, plain dicts out.

A protocol returns {"metrics": {name: 0..1}, "chance": same keys, "counts": {name: number}, "outcomes": {set: tensor}}.
`chance` is what a random ranking (or guess) gives on average; `outcomes` has a row per query: all that is needed to
compute the metrics again from resampled queries (`bootstrap`). Ranks start at 1; equal scores rank in gallery order.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import annotations
import checkpoint
import common
import data
import pictures
import settings
from model import CSANet
from settings import InputError, setting

RETRIEVAL_KS, TGIR_KS, OCIR_KS = (1, 5, 10), (10, 50), (10, 30, 50)


def check_embeddings(queries, gallery):
    """queries (Q, D), gallery (G, D), both float32 or both float64. Raises ValueError on other shapes, and where a
    score could be NaN or infinite: |q . g| <= |q| |g|, so norms tell, without a pass over the (Q, G) scores."""
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


def find_positives(query_id, gallery_id):
    """Each query's correct items (equal id) as a slice: gallery items order[start[i] : start[i] + count[i]], ascending.

    query_id (Q,), gallery_id (G,) int64 -> order (G,), start (Q,), count (Q,), int64.
    Raises ValueError for a query without a correct item in the gallery, with its id."""
    sorted_id, order = gallery_id.sort(stable=True)
    start = torch.searchsorted(sorted_id, query_id)
    count = torch.searchsorted(sorted_id, query_id, right=True) - start
    missing = (count == 0).nonzero().flatten().tolist()
    if missing:
        example = f"query {missing[0]} (id {query_id[missing[0]].item()})"
        more = f"{len(missing)} of {len(query_id)} queries have none"
        raise ValueError(f"{example} has no correct item in the gallery of {len(gallery_id)}; {more}")
    return order, start, count


@torch.no_grad()
def best_ranks(queries, gallery, query_id, gallery_id, block=512):
    """Rank of each query's best correct item among the whole gallery by dot product: (Q,) int64 on the CPU, 1 is best.

    queries (Q, D), gallery (G, D) float32 or float64; query_id (Q,), gallery_id (G,) int64. Rank = 1 + items that score
    strictly higher + items that score the same and stand earlier (torch.topk keeps no order among equals).
    Memory: two blocks of (block, G) scores, never (Q, G). Raises as `check_embeddings` and `find_positives`."""
    check_embeddings(queries, gallery)
    if len(query_id) != len(queries) or len(gallery_id) != len(gallery):
        raise ValueError(f"ids {len(query_id)} and {len(gallery_id)}, embeddings {len(queries)} and {len(gallery)}")
    n_gallery, device = len(gallery), queries.device
    order, start, count = find_positives(query_id.to(device), gallery_id.to(device))
    ranks = torch.empty(len(queries), dtype=torch.int64, device=device)
    scores_buffer = queries.new_empty(block, n_gallery)
    count_buffer = torch.empty_like(scores_buffer)  # floats: torch adds them up faster than booleans, exact below 2^24
    for i in range(0, len(queries), block):
        rows = queries[i : i + block]  # (b, D), b <= block
        b = len(rows)
        if b < block:  # BLAS rounds otherwise in another shape, and then twins in the gallery may not tie
            rows = torch.cat([rows, rows.new_zeros(block - b, rows.shape[1])])
        scores = torch.mm(rows, gallery.t(), out=scores_buffer)[:b]  # (b, G)
        # the target's score is read from this very block: the same arithmetic as its rivals', so the same bits
        nth = torch.arange(int(count[i : i + b].max()), device=device)  # (m,), m = most correct items of a query here
        own = order[(start[i : i + b, None] + nth).clamp(max=n_gallery - 1)]  # (b, m) gallery indices
        own_scores = scores.gather(1, own).masked_fill(nth >= count[i : i + b, None], -torch.inf)
        best = own_scores.amax(dim=1, keepdim=True)  # (b, 1)
        higher = torch.gt(scores, best, out=count_buffer[:b]).sum(dim=1)
        level = torch.ge(scores, best, out=count_buffer[:b]).sum(dim=1) - higher  # the item itself included
        ranks[i : i + b] = 1 + higher.long()
        tied = (level > 1).nonzero().flatten()  # few rows; only there count ties before the first best correct item
        if len(tied):
            first = own.masked_fill(own_scores < best, n_gallery).amin(dim=1, keepdim=True)[tied]
            earlier = torch.arange(n_gallery, device=device) < first  # (tied, G)
            ranks[i + tied] += ((scores[tied] == best[tied]) & earlier).sum(dim=1)
    return ranks.cpu()


def first_rows(ids):
    """ids (N,) int64 -> int64 indices of the first row of each distinct id, in row order: what a gallery keeps."""
    order, start, _ = find_positives(ids, ids)
    return order[start].unique()


def with_mean(metrics):
    """Adds "mean_recall", the mean of all recalls."""
    return {**metrics, "mean_recall": sum(metrics.values()) / len(metrics)}


def recalls(outcomes, ks):
    """Share of queries with a correct item among their k best, per query set: {"<set>_r@<k>", ..., "mean_recall"}.

    outcomes {set: ranks (Q,) or (Q, draws) int64}; a rank of 0 means not asked in that draw and is left out.
    Raises ValueError where a set asks nothing."""
    for name, ranks in outcomes.items():
        if not (ranks > 0).any():
            raise ValueError(f"no query in {name!r}")
    return with_mean(
        {f"{name}_r@{k}": (r[r > 0] <= k).double().mean().item() for name, r in outcomes.items() for k in ks}
    )


def category_mean(values, category):
    """values (N,), category (N,) int64 >= 0 -> mean over the categories present of each category's mean."""
    n, total = torch.bincount(category), torch.bincount(category, weights=values.double())
    return (total[n > 0] / n[n > 0]).mean().item()


def category_recalls(outcomes, ks=OCIR_KS):
    """Recall averaged over categories: {"r@<k>", "mean_recall"}; outcomes {"ocir": (Q, 2) int64 rank, category}."""
    ranks, category = outcomes["ocir"].unbind(dim=1)
    return with_mean({f"r@{k}": category_mean(ranks <= k, category) for k in ks})


def recognition_scores(outcomes):
    """{"accuracy", "macro_f1"}; outcomes {"samples": (N, 2) int64 prediction, label}, both >= 0.

    Macro-F1 is the mean of 2 TP / (predicted + true) over the classes present in truth or prediction: a class that is
    only predicted counts 0, a class in neither does not count."""
    predictions, labels = outcomes["samples"].unbind(dim=1)
    n_classes = int(outcomes["samples"].max()) + 1
    hits, true, predicted = (
        torch.bincount(x, minlength=n_classes) for x in (labels[predictions == labels], labels, predictions)
    )
    present = true + predicted > 0
    f1 = 2 * hits[present].double() / (true + predicted)[present]
    return {"accuracy": hits.sum().item() / len(labels), "macro_f1": f1.mean().item()}


def random_recall(positives, gallery, k):
    """Expected recall at k of a random ranking: 1 - C(G - P, k) / C(G, k), the exact hypergeometric.

    positives P, gallery G int64 tensors that broadcast, 1 <= P <= G -> float64. A gallery of k or fewer gives 1."""
    miss = torch.ones(torch.broadcast_shapes(positives.shape, gallery.shape), dtype=torch.float64)
    for i in range(k):  # no correct item in place i + 1, given none before
        miss *= (gallery - positives - i).clamp(min=0) / (gallery - i).clamp(min=1).double()
    return 1 - miss


def chance_recalls(sizes, ks):
    """`recalls` of a random ranking, same keys; sizes {set: (positives, gallery)} int64, an entry per query."""
    return with_mean({f"{name}_r@{k}": random_recall(*sizes[name], k).mean().item() for name in sizes for k in ks})


def recognition_chance(labels):
    """labels (N,) int64 -> accuracy of always naming the most frequent class; macro-F1 of guessing with the labels' own
    frequencies (precision = recall = share of the class, so 1 / C over C classes; a ratio of expectations)."""
    n = torch.bincount(labels)
    return {"accuracy": n.max().item() / len(labels), "macro_f1": 1 / int((n > 0).sum())}


def full_gallery(image, text, image_id, text_id, ks=RETRIEVAL_KS):
    """ITR / TIR, full gallery: every image queries all texts, every text all images; any item of the product is a hit.

    image (N, D), text (M, D) float32; image_id (N,), text_id (M,) int64 product ids.
    Keys i2t_r@k, t2i_r@k, mean_recall. Raises as `best_ranks`. Source: recipe 5."""
    n_texts, n_images = find_positives(image_id, text_id)[2].cpu(), find_positives(text_id, image_id)[2].cpu()
    # t2i first: its blocks are as wide as there are images, and their memory serves i2t's
    t2i, i2t = best_ranks(text, image, text_id, image_id), best_ranks(image, text, image_id, text_id)
    outcomes = {"i2t": i2t, "t2i": t2i}
    chance = chance_recalls(
        {"i2t": (n_texts, torch.tensor(len(text))), "t2i": (n_images, torch.tensor(len(image)))}, ks
    )
    counts = {"images": len(image), "texts": len(text)}
    return {"metrics": recalls(outcomes, ks), "chance": chance, "counts": counts, "outcomes": outcomes}


def sample_candidates(query_id, query_group, gallery_id, gallery_group, generator, n_queries=1000, n_negatives=100):
    """One draw of sample-100: random queries (all, where fewer), for each a random item of its product, and up to
    `n_negatives` distinct items of other products in its sub-category (all, where fewer).

    ids, groups (= sub-categories) int64 (Q,), (G,), CPU. Returns asked (q,) query indices, candidates
    (q, 1 + n_negatives) gallery indices: the positive first, -1 past the end. Raises ValueError for a query without an
    item of its product in its sub-category, with its id. Kaleido-BERT fills up from other sub-categories, we do not."""
    # One number per (sub-category, product): in its order a sub-category is a slice, and a product a slice of that.
    _, product = torch.unique(torch.cat([query_id, gallery_id]), return_inverse=True)
    _, group = torch.unique(torch.cat([query_group, gallery_group]), return_inverse=True)
    n_products = int(product.max()) + 1
    query_key, gallery_key = (group * n_products + product).split([len(query_id), len(gallery_id)])
    gallery_key, order = gallery_key.sort(stable=True)
    asked = torch.randperm(len(query_id), generator=generator)[:n_queries]
    own, own_end = (torch.searchsorted(gallery_key, query_key[asked], right=right) for right in (False, True))
    first_key = query_key[asked] // n_products * n_products
    begin, end = (torch.searchsorted(gallery_key, first_key + shift) for shift in (0, n_products))
    missing = asked[own == own_end].tolist()
    if missing:
        name = f"query {missing[0]} (id {query_id[missing[0]]})"
        raise ValueError(f"{name} has no item of its product in sub-category {query_group[missing[0]]} of the gallery")

    def below(n):  # uniform in 0 .. n - 1, one per query; float64, as float32 would favour some of 30,000 items
        return (torch.rand(len(n), generator=generator, dtype=torch.float64) * n).long()

    positive = order[own + below(own_end - own)]
    n_own = own_end - own
    n_others = end - begin - n_own  # (q,) negatives to choose from
    picks = torch.empty(n_negatives, len(asked), dtype=torch.int64)
    used = torch.zeros(len(asked), int(n_others.max()) + 1, dtype=torch.bool)  # the last column takes the -1
    row = torch.arange(len(asked))
    for j in range(n_negatives):  # Floyd's draw without replacement: one of 0 .. last, and `last` where that is taken
        last = n_others - n_negatives + j  # below 0: fewer than n_negatives - j others, so this step draws none
        pick = below(last.clamp(min=0) + 1)
        picks[j] = torch.where(used[row, pick], last, pick).where(last >= 0, -1)
        used[row, picks[j]] = True
    place = begin[:, None] + picks.t().flip(1)  # (q, n_negatives), flipped to have the -1 last
    place += (place >= own[:, None]) * n_own[:, None]  # step over the query's own product
    negatives = order[place.clamp(max=len(order) - 1)].where(picks.t().flip(1) >= 0, -1)
    return asked, torch.cat([positive[:, None], negatives], dim=1)


@torch.no_grad()
def score_candidates(queries, gallery, candidates, block=64):
    """Rank of the positive, candidates[:, 0], among each query's candidates: (q,) int64 on the CPU, 1 is the best.

    queries (q, D), gallery (G, D) float32; candidates (q, c) int64 gallery indices, -1 = none (scores -inf, so never
    counted). Equal scores rank in gallery order. Raises as `check_embeddings`, and on a row without a positive."""
    check_embeddings(queries, gallery)
    if len(candidates) != len(queries) or (candidates[:, 0] < 0).any():
        raise ValueError(
            f"candidates {tuple(candidates.shape)} for {len(queries)} queries, or a row without a positive"
        )
    ranks = []
    for rows, index in zip(queries.split(block), candidates.to(queries.device).split(block), strict=True):
        scores = gallery[index.clamp(min=0)].mul_(rows[:, None]).sum(dim=2).masked_fill(index < 0, -torch.inf)  # (b, c)
        positive = scores[:, :1]
        ahead = (scores > positive) | ((scores == positive) & (index < index[:, :1]))
        ranks.append(1 + ahead.sum(dim=1))
    return torch.cat(ranks).cpu()


def sample_100(image, text, image_id, text_id, image_group, text_group, seed=0, draws=5, ks=RETRIEVAL_KS):
    """ITR / TIR, sample-100 (Kaleido-BERT's): `sample_candidates`, `score_candidates`, both ways, mean of the draws.

    As `full_gallery`; groups (N,), (M,) int64 sub-categories. Outcomes are ranks (Q, draws), 0 where one was not drawn;
    counts hold the smallest and the mean number of negatives, as small sub-categories have fewer. Source: recipe 5."""
    generator = torch.Generator().manual_seed(seed)  # our own: the global state is neither read nor moved
    image_side, text_side = (image, image_id.cpu(), image_group.cpu()), (text, text_id.cpu(), text_group.cpu())
    outcomes, sizes, counts = {}, {}, {"images": len(image), "texts": len(text), "draws": draws, "seed": seed}
    for way, (queries, *query_ids), (gallery, *gallery_ids) in (
        ("i2t", image_side, text_side),
        ("t2i", text_side, image_side),
    ):
        outcomes[way] = torch.zeros(len(queries), draws, dtype=torch.int64)
        negatives = []
        for draw in range(draws):
            asked, candidates = sample_candidates(*query_ids, *gallery_ids, generator)
            outcomes[way][asked, draw] = score_candidates(queries[asked.to(queries.device)], gallery, candidates)
            negatives.append((candidates[:, 1:] >= 0).sum(dim=1))
        negatives = torch.stack(negatives)  # (draws, q)
        sizes[way] = (torch.tensor(1), 1 + negatives)
        counts[f"{way}_queries"] = negatives.shape[1]
        counts[f"{way}_negatives_min"] = int(negatives.min())
        counts[f"{way}_negatives_mean"] = negatives.double().mean().item()
    chance = chance_recalls(sizes, ks)
    return {"metrics": recalls(outcomes, ks), "chance": chance, "counts": counts, "outcomes": outcomes}


def check_unique(gallery_id):
    """Raises ValueError where an id stands twice in the gallery; `first_rows` says which rows to keep."""
    if len(first_rows(gallery_id)) < len(gallery_id):
        raise ValueError(f"gallery of {len(gallery_id)} rows holds only {len(gallery_id.unique())} distinct ids")


def composed_retrieval(classes, ks=TGIR_KS):
    """TGIR: recall in each class's own gallery, the reference image included; <class>_r@k and mean_recall, their mean.

    classes {name: (query (Q, D), gallery (G, D), target_id (Q,), gallery_id (G,))}: float32, and int64 image ids.
    Raises as `best_ranks`, and ValueError on a repeated gallery id. Source: recipe 5, FashionIQ."""
    outcomes, sizes, counts = {}, {}, {}
    for name, (query, gallery, target_id, gallery_id) in classes.items():
        check_unique(gallery_id)
        outcomes[name] = best_ranks(query, gallery, target_id, gallery_id)
        sizes[name] = (torch.tensor(1), torch.tensor(len(gallery)))
        counts[f"{name}_queries"], counts[f"{name}_gallery"] = len(query), len(gallery)
    chance = chance_recalls(sizes, ks)
    return {"metrics": recalls(outcomes, ks), "chance": chance, "counts": counts, "outcomes": outcomes}


def classification(predictions, labels):
    """CR / SCR, every image one sample; accuracy, macro_f1.

    predictions (N, C) float logits (equal ones: the lower class) or (N,) int64 classes; labels (N,) int64.
    Raises ValueError on NaN logits, and on shapes that do not match. Source: recipe 5."""
    if predictions.shape[:1] != labels.shape or not len(labels):
        raise ValueError(f"predictions {tuple(predictions.shape)}, labels {tuple(labels.shape)}")
    if predictions.dim() == 2:
        if predictions.isnan().any():
            raise ValueError(f"NaN logits in sample {predictions.isnan().any(dim=1).nonzero()[0].item()}")
        predictions = predictions.argmax(dim=1)
    outcomes, chance = {"samples": torch.stack([predictions, labels], dim=1).cpu()}, recognition_chance(labels.cpu())
    counts = {"samples": len(labels), "classes": len(labels.unique())}
    return {"metrics": recognition_scores(outcomes), "chance": chance, "counts": counts, "outcomes": outcomes}


def outfit_retrieval(outfit, target_id, blank, blank_id, blank_category, ks=OCIR_KS):
    """OCIR: each outfit ranks the blanks of its target's fine category; r@k averaged over the targets' categories.

    outfit (Q, D) float32: mean of the fused, scaled features of its question items, not normalised again; target_id
    (Q,) int64. Gallery: blank (G, D), blank_id (G,) int64, each once, fake rows included; blank_category (G,) >= 0.
    Raises as `best_ranks`, and ValueError on a repeated blank. Source: recipe 5."""
    check_unique(blank_id)
    order, start, _ = find_positives(target_id, blank_id)
    category = blank_category[order[start]]  # (Q,)
    ranks = torch.zeros(len(outfit), dtype=torch.int64)
    for c in category.unique():
        asked, items = category == c, blank_category == c
        ranks[asked.cpu()] = best_ranks(outfit[asked], blank[items], target_id[asked], blank_id[items])
    category, n_items = category.cpu(), torch.bincount(blank_category.cpu())
    outcomes = {"ocir": torch.stack([ranks, category], dim=1)}
    random = {k: random_recall(torch.tensor(1), n_items[category], k) for k in ks}
    chance = with_mean({f"r@{k}": category_mean(random[k], category) for k in ks})
    counts = {"queries": len(outfit), "gallery": len(blank), "categories": len(category.unique())}
    return {"metrics": category_recalls(outcomes, ks), "chance": chance, "counts": counts, "outcomes": outcomes}


def bootstrap(metric, outcomes, baseline=None, draws=1000, seed=0):
    """95 % percentile interval of every metric over resampled queries, taken as independent: {name: (low, high)}.

    metric: from outcomes to {name: value}, as `partial(recalls, ks=(1, 5, 10))`; outcomes {set: (Q, ...)}, a row per
    query. With `baseline`, another model's outcomes: the interval of the paired difference metric(outcomes) -
    metric(baseline), both on the same resampled queries. Raises ValueError where these do not have the same shapes."""
    shapes = [{name: tuple(table.shape) for name, table in x.items()} for x in (outcomes, baseline or outcomes)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"not the same queries: {shapes[0]}, {shapes[1]}")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(draws):
        rows = {name: torch.randint(len(table), (len(table),), generator=generator) for name, table in outcomes.items()}
        value = metric({name: table[rows[name]] for name, table in outcomes.items()})
        if baseline is not None:
            other = metric({name: table[rows[name]] for name, table in baseline.items()})
            value = {name: value[name] - other[name] for name in value}
        values.append(list(value.values()))
    interval = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.tensor(values, dtype=torch.float64).quantile(interval, dim=0).tolist()
    return dict(zip(value, zip(low, high, strict=True), strict=True))


# ---- embedding -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def embed(encode, items, tokenizer, config, processes, kind="crop", max_tokens=data.MAX_TOKENS, progress=False):
    """`encode(batch)` (B, ...) of every item, once, in item order: (len(items), ...) float32, on every process's CPU.

    items as data.Samples takes them. The processes share the work; what they return is gathered and put in order."""
    order = sorted(range(len(items)), key=lambda i: len(items[i].get("text", "")))  # alike lengths, little padding
    mine = order[processes.rank :: processes.world_size]
    transform = data.image_transform(kind, config.image_size, train=False)
    dataset = data.Samples([items[i] for i in mine], tokenizer, transform, config.max_tokens or max_tokens)
    # a process of a gloo group has threads, and a fork beside them hung once in 20 minutes of tests/soak.py
    workers = 0 if common.in_group() and processes.device.type == "cpu" else config.workers
    share = {"num_workers": workers, "worker_init_fn": data.leave_group}
    loader = DataLoader(dataset, config.eval_batch_size, collate_fn=data.collate, **share)
    rows = []
    with tqdm(total=len(mine), unit=" items", disable=not progress) as bar:
        for batch in loader:
            with common.autocast(processes.device, config.dtype):
                rows.append(encode(data.to_device(batch, processes.device)).float())
            bar.update(len(rows[-1]))
    rows = common.gather_rows(torch.cat(rows)).cpu()
    out = torch.empty_like(rows)
    out[common.gather_rows(torch.tensor(mine, device=processes.device)).cpu()] = rows
    return out


def image_items(paths):
    """Items of images alone."""
    return [{"image": path, "name": path} for path in paths]


def embed_batch(model, batch):
    """Scaled embeddings (B, D) of images, of texts, or of both: an image with the change in words.

    A CSA-Net's are those of wanted items."""
    image, words = batch.get("image"), [batch[key] for key in ("input_ids", "attention_mask") if key in batch]
    if words:
        x = model.encode_text(*words) if image is None else model.encode_composed(*words, image)
    else:
        x = model.encode_item(image) if isinstance(model, CSANet) else model.encode_image(image)
    return model.scaled(x)


def embed_retrieval(model, products, tokenizer, config, processes):
    """(image (N, D), text (M, D), image_id (N,), text_id (M,)) of products, every image and every text once, scaled."""
    paths = [(i, path) for i, product in enumerate(products) for path in product.images]
    share = (tokenizer, config, processes)
    items = [{"image": path, "name": products[i].name} for i, path in paths]
    image = embed(partial(embed_batch, model), items, *share)
    text = embed(partial(embed_batch, model), [{"text": product.text} for product in products], *share)
    return image, text, torch.tensor([i for i, _ in paths]), torch.arange(len(products))


# ---- the five tasks: (model, tokenizer, config, processes) -> {protocol: result} -------------------------------------


def evaluate_retrieval(model, tokenizer, config, processes):
    """ITR / TIR on FashionGen val: full gallery, and sample-100 within sub-categories."""
    products = annotations.load_products(config.data_root, "FashionGen", "val")
    image, text, image_id, text_id = embed_retrieval(model, products, tokenizer, config, processes)
    results = {"full gallery": full_gallery(image, text, image_id, text_id)}
    if annotations.has_subcategories(products):
        group = torch.tensor([product.subcategory for product in products])
        results["sample-100"] = sample_100(image, text, image_id, text_id, group[image_id], group, config.seed)
    texts = [{"text": product.text} for product in products]
    images = [{"images": [path], "text": product.text} for product in products for path in product.images]
    photos = [{"images": cell["images"]} for cell in images]  # a query does not give the answer away
    ways = [(image, text, image_id, text_id, photos, texts), (text, image, text_id, image_id, texts, images)]
    results["full gallery"]["pictures"] = partial(ranked_pictures, ways)
    return results


def evaluate_fashioniq(model, tokenizer, config, processes):
    """TGIR on FashionIQ val: each gallery image and each query embedded once."""
    classes, cells = {}, []
    for garment in annotations.FASHIONIQ_CLASSES:
        queries, names = annotations.load_fashioniq(config.data_root, garment, "val", config.gallery)
        place = {name: i for i, name in enumerate(names)}
        folder = Path(config.data_root, "FashionIQ", "images")
        share = (tokenizer, config, processes, "scale", data.FASHIONIQ_MAX_TOKENS)
        paths = (str(folder / f"{name}.jpg") for name in names)
        gallery = embed(partial(embed_batch, model), image_items(paths), *share)
        query = embed(
            partial(embed_batch, model), [{k: q[k] for k in ("image", "text", "name")} for q in queries], *share
        )
        target = torch.tensor([place[q["target"]] for q in queries])
        classes[garment] = (query, gallery, target, torch.arange(len(names)))
        shown = [{"images": [q["image"]], "text": q["text"]} for q in queries]
        cells.append((shown, [{"images": [str(folder / f"{name}.jpg")], "text": name} for name in names]))
    result = composed_retrieval(classes)
    sets = [(*tensors, *shown) for tensors, shown in zip(classes.values(), cells, strict=True)]
    return {f"gallery {config.gallery}": {**result, "pictures": partial(ranked_pictures, sets)}}


def evaluate_recognition(model, tokenizer, config, processes):
    """CR or SCR on FashionGen val: every image with its product's text is one sample."""
    products = annotations.load_products(config.data_root, "FashionGen", "val")
    key = annotations.RECOGNITION_LABELS[config.task]
    annotations.count_labels(products, key, model.config.n_classes)
    items = [
        {"image": path, "text": product.text, "label": getattr(product, key), "name": product.name}
        for product in products
        for path in product.images
    ]
    logits = embed(model.classify, items, tokenizer, config, processes)
    result = classification(logits, torch.tensor([item["label"] for item in items]))
    pictures = partial(labelled_pictures, items, *result["outcomes"]["samples"].unbind(dim=1), config)
    return {"every image": {**result, "pictures": pictures}}


def evaluate_polyvore(model, tokenizer, config, processes):
    """OCIR on Polyvore Outfits test, `config.split`: every (item, wanted category) and every blank embedded once."""
    outfits, n_categories = annotations.load_polyvore(config.data_root, config.split, "test")
    if n_categories != model.n_categories:
        raise InputError(
            f"{config.data_root}: {n_categories} categories, but the checkpoint's CSA-Net has {model.n_categories}"
        )
    blanks = {outfit["blank"]: outfit["blank_item"] for outfit in outfits}
    place = {name: i for i, name in enumerate(blanks)}
    share = (tokenizer, config, processes, "scale")
    blank = embed(partial(embed_batch, model), image_items(path for path, _ in blanks.values()), *share)
    real = [outfit for outfit in outfits if not outfit["fake"]]
    # An image is projected once; what the wanted category changes comes after it and costs next to nothing.
    items = {path: category for outfit in real for path, category in outfit["items"]}
    item = embed(lambda batch: model.encode_item(batch["image"]), image_items(items), *share)
    row = {path: i for i, path in enumerate(items)}
    queries = []
    for outfit in real:
        rows = torch.tensor([row[path] for path, _ in outfit["items"]])
        category = torch.tensor([category for _, category in outfit["items"]])
        wanted = torch.full_like(category, outfit["blank_item"][1])
        with torch.no_grad():
            fused = model.fuse(*(x.to(processes.device) for x in (item[rows], category, wanted)))
        queries.append(fused.mean(0).cpu())
    target = torch.tensor([place[outfit["blank"]] for outfit in real])
    blank_category = torch.tensor([category for _, category in blanks.values()])
    outfit, blank_id = torch.stack(queries), torch.arange(len(blank))
    result = outfit_retrieval(outfit, target, blank, blank_id, blank_category)
    shown = [{"images": [path for path, _ in o["items"]], "text": "what goes with these?"} for o in real]
    shown_blanks = [{"images": [path], "text": name} for name, (path, _) in blanks.items()]
    sets = []
    for c in blank_category[target].unique():
        asked, mine = (blank_category[target] == c).nonzero().flatten(), (blank_category == c).nonzero().flatten()
        cells = [shown[i] for i in asked.tolist()], [shown_blanks[i] for i in mine.tolist()]
        sets.append((outfit[asked], blank[mine], target[asked], blank_id[mine], *cells))
    return {f"{config.split}, same category": {**result, "pictures": partial(ranked_pictures, sets)}}


# task: (evaluation; the metric that selects the best checkpoint; outcomes -> metrics; what the checkpoint must have)
PROTOCOLS = {
    "fashiongen_retrieval": (evaluate_retrieval, "mean_recall", partial(recalls, ks=RETRIEVAL_KS), ("contrastive",)),
    "fashioniq": (evaluate_fashioniq, "mean_recall", partial(recalls, ks=TGIR_KS), ("contrastive",)),
    "fashiongen_category": (evaluate_recognition, "accuracy", recognition_scores, ("recognition",)),
    "fashiongen_subcategory": (evaluate_recognition, "accuracy", recognition_scores, ("recognition",)),
    "polyvore": (evaluate_polyvore, "mean_recall", category_recalls, ("csa_net",)),
}


# ---- pictures --------------------------------------------------------------------------------------------------------


def ranked_pictures(sets):
    """(failed (Q,) bool, draw): whether a query's right item is past the SHOWN best, and draw(i) -> (query, [results]).

    sets: [(query (q, D), gallery (G, D), query_id (q,), gallery_id (G,), query cells, gallery cells)], Q queries in
    all; each ranks its own set's gallery, right is what has its id."""
    ranks = [best_ranks(*tensors) for *tensors, _, _ in sets]
    places = [(s, i) for s, own in enumerate(ranks) for i in range(len(own))]

    def draw(place):
        s, i = places[place]
        query, gallery, query_id, gallery_id, query_cells, gallery_cells = sets[s]
        scores = gallery @ query[i]
        cells = []
        for rank, g in enumerate(scores.sort(descending=True, stable=True).indices[: pictures.SHOWN].tolist(), 1):
            right = bool(gallery_id[g] == query_id[i])
            label = f"{rank}   {scores[g]:.2f}{'   right' if right else ''}"
            cells.append({**gallery_cells[g], "label": label, "frame": pictures.RIGHT if right else None})
        return {**query_cells[i], "label": f"right one: rank {ranks[s][i]} of {len(gallery)}"}, cells

    return torch.cat(ranks) > pictures.SHOWN, draw


def labelled_pictures(items, predictions, labels, config):
    """As `ranked_pictures`, for recognition: a cell an image, its predicted and its true label, named by labels.json
    of the data root where there is one."""
    path = Path(config.data_root, "labels.json")
    plural = {"category": "categories", "subcategory": "subcategories"}[annotations.RECOGNITION_LABELS[config.task]]
    names = dict(enumerate(annotations.read_json(path, dict).get(plural, []) if path.exists() else []))
    failed = predictions != labels

    def draw(i):
        said, true = (names.get(int(x[i]), f"class {x[i]}") for x in (predictions, labels))
        frame = pictures.WRONG if failed[i] else pictures.RIGHT
        label, text = f"predicted: {said}", f"true: {true}"
        return None, [{"images": [items[i]["image"]], "label": label, "text": text, "frame": frame}]

    return failed, draw


def show(protocol, result, config, path):
    """PNG of `config.show` random queries (by `config.seed`) of one protocol's result, a failure among them if any."""
    failed, draw = result["pictures"]()
    order = torch.randperm(len(failed), generator=torch.Generator().manual_seed(config.seed))
    chosen, failures = order[: config.show], order[failed[order]]
    if len(failures) and not failed[chosen].any():
        chosen = torch.cat([chosen[:-1], failures[:1]])
    rows = [draw(i) for i in chosen.tolist()]
    if rows[0][0] is None:  # recognition: samples side by side
        rows = [(None, [cell for _, cells in rows for cell in cells])]
    title = f"{config.task}, {protocol}: {len(chosen)} of {len(failed)} queries, drawn at random; right ones in green"
    pictures.draw_sheet(path, title, rows)
    print(f"written: {path} ({int(failed[chosen].sum())} of {len(chosen)} without a right one in view)")


# ---- command line ----------------------------------------------------------------------------------------------------


@dataclass
class EvalConfig:
    """Settings of `python evaluate.py`."""

    task: str = setting("", "fashiongen_retrieval, fashioniq, fashiongen_category, fashiongen_subcategory or polyvore")
    checkpoint: str = setting("", "ours or a released one")
    baseline: str = setting("", "another checkpoint: adds the difference to it on the same queries")
    data_root: str = setting("data/datasets", "folder that holds FashionGen/, FashionIQ/, PolyvoreOutfits/")
    vocab: str = setting("", "WordPiece vocab.txt; empty: the checkpoint's own, else as in training")
    image_size: int = setting(0, "pixels a side; 0: the checkpoint's own, 224 for a released one")
    max_tokens: int = setting(0, "longest text; 0: the checkpoint's own, else the recipe's 75, for fashioniq 50")
    split: str = setting("disjoint", "polyvore: disjoint or nondisjoint")
    gallery: str = setting("original", "fashioniq: original (split file) or val (references and targets)")
    bootstrap: bool = setting(False, "add 95 % intervals over queries")
    eval_batch_size: int = setting(64, "images or texts a process embeds at a time")
    workers: int = setting(2, "data loader workers per process")
    dtype: str = setting("float32", "float32, bfloat16 or float16 (autocast)")
    device: str = setting("auto", "auto, cpu or cuda")
    seed: int = setting(0, "of sample-100's candidates and of the bootstrap")
    bert: str = setting("", "BERT folder or hub name for the vocabulary of a released checkpoint")
    show: int = setting(0, "draw this many queries with their best results as a page; 0: none")
    out: str = setting("", "JSON to write, with --show the page, a .png; empty: CHECKPOINT.TASK.json or .png")


def read_tokenizer(path, model, config):
    """The WordPiece tokenizer of checkpoint `path`. Raises InputError where there is none or it is not the model's."""
    tokenizer = data.wordpiece(checkpoint.vocabulary(config, path))
    if tokenizer.get_vocab_size() != model.config.vocab_size:
        found = f"a vocabulary of {tokenizer.get_vocab_size()} words"
        raise InputError(
            f"{path}: {found}, expected {model.config.vocab_size}; set --vocab=FILE to the one of its training"
        )
    return tokenizer


def evaluate_checkpoint(path, config, processes):
    """{protocol: result} of one checkpoint on `config.task`. Raises InputError where it is of another task."""
    run_protocol, _, _, needs = PROTOCOLS[config.task]
    model, info = checkpoint.load_model(path, processes.device, needs)
    trained = info["config"] or {}
    config = replace(
        config,
        image_size=config.image_size or trained.get("image_size", 224),
        max_tokens=config.max_tokens or trained.get("max_tokens", 0),
    )
    tokenizer = None if "csa_net" in needs else read_tokenizer(path, model, config)  # a CSA-Net reads no text
    if tokenizer:
        data.check_lengths(config, model.config.max_position_embeddings)
    return run_protocol(model, tokenizer, config, processes)


def report(results, config, path, out, seconds, baseline=None, intervals=False):
    """Print a table of {protocol: result}, chance beside every figure, and write it with all circumstances to `out`.

    baseline: {protocol: result} of another checkpoint on the same queries; adds the difference and its interval."""
    metric_of = PROTOCOLS[config.task][2]
    rows = {"task": config.task, "checkpoint": str(path), "seed": config.seed, "seconds": round(seconds, 1)}
    for protocol, result in results.items():
        columns = {"metrics": result["metrics"], "chance": result["chance"]}
        if intervals:
            columns["interval"] = bootstrap(metric_of, result["outcomes"], seed=config.seed)
        if baseline:
            base = baseline[protocol]
            columns["difference"] = {k: v - base["metrics"][k] for k, v in result["metrics"].items()}
            columns["difference_interval"] = bootstrap(
                metric_of, result["outcomes"], base["outcomes"], seed=config.seed
            )
        rows[protocol] = {**columns, "counts": result["counts"]}
        counts = ", ".join(f"{k} {v:g}" for k, v in result["counts"].items())
        print(f"\n{config.task}, {protocol} ({counts}; seed {config.seed}; {path})")
        print(
            f"{'%':>16} {'ours':>7} {'chance':>7}"
            + "".join(f" {name.replace('_', ' '):>19}" for name in list(columns)[2:])
        )
        for name, value in result["metrics"].items():
            line = f"{name:>16} {100 * value:7.1f} {100 * result['chance'][name]:7.1f}"
            for column in list(columns)[2:]:
                cell = columns[column][name]
                cell = (
                    f"{100 * cell[0]:.1f} to {100 * cell[1]:.1f}" if isinstance(cell, tuple) else f"{100 * cell:+.1f}"
                )
                line += f" {cell:>19}"
            print(line)
    common.write_json(out, rows)
    print(f"written: {out}")


def main():
    config = settings.load_config(EvalConfig, description=__doc__)
    if config.task not in PROTOCOLS:
        raise InputError(f"task: found {config.task!r}, expected one of {', '.join(PROTOCOLS)}")
    if not config.checkpoint:
        raise InputError("checkpoint: none given, expected --checkpoint=FILE")
    out = config.out or f"{config.checkpoint}.{config.task}{'.png' if config.show else '.json'}"
    if config.show < 0:
        raise InputError(f"show: found {config.show}, expected a number of queries, or 0 for no page")
    if config.show:
        pictures.check_page(out)
    processes = common.start_processes(config.device)
    started = time.perf_counter()
    results = evaluate_checkpoint(config.checkpoint, config, processes)
    baseline = evaluate_checkpoint(config.baseline, config, processes) if config.baseline else None
    if processes.is_main:
        seconds, table = time.perf_counter() - started, str(Path(out).with_suffix(".json")) if config.show else out
        report(results, config, config.checkpoint, table, seconds, baseline, config.bootstrap)
        if config.show:
            show(*next(iter(results.items())), config, out)


if __name__ == "__main__":
    common.run(main)
