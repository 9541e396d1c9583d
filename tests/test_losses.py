"""Losses against hand-computed cases, their errors, one process against two, and that each can be learned."""

import math

import pytest
import torch
import torch.distributed as dist
from helpers import in_two_processes
from test_model import tiny
from torch.nn.parallel import DistributedDataParallel

import data
import losses
from losses import OBJECTIVES


def random_batch(n=8, seed=1, size=64, vocab=50):
    """Everything that any objective reads, for the tiny model (2 x 2 patches)."""
    g = torch.Generator().manual_seed(seed)
    patches = (size // 32) ** 2
    ids = torch.randint(5, vocab, (n, 9), generator=g)
    mask = (torch.arange(9)[None] < torch.randint(5, 10, (n, 1), generator=g)).long()
    asked = torch.zeros(n, 9, dtype=torch.bool)
    asked[:, 1] = True
    asked[::2, 2] = True
    drop = torch.zeros(n, patches, dtype=torch.bool)
    drop[:, 0] = True
    shuffled = torch.arange(n).roll(1)
    target = torch.arange(n) % 2
    attributes = torch.zeros(n, 12).scatter(1, torch.randint(12, (n, 1), generator=g), 1.0)
    attributes[3] = 0
    batch = {
        "image": torch.randn(n, 3, size, size, generator=g),
        "image2": torch.randn(n, 3, size, size, generator=g),
        "input_ids": ids * mask,
        "attention_mask": mask,
        "itm_draws": torch.rand(n, generator=g),
        "itm_text": torch.where(target.bool(), torch.arange(n), shuffled),
        "itm_target": target,
        "masked_ids": torch.where(asked, 4, ids * mask),
        "mlm_labels": torch.where(asked, ids, -100),
        "patch_mask": ~drop,
        "image_codes": torch.randint(16, (n, patches), generator=g),
        "text_keep": torch.ones(n, 9, dtype=torch.bool),
        "patch_keep": ~drop,
        "attributes": attributes,
        "label": torch.arange(n) % 5,
    }
    return with_targets(batch)


def with_targets(batch):
    """The batch with the places of its targets, as data.collate adds them."""
    mlm, mpfc = data.places(batch["mlm_labels"] != data.NO_LABEL), data.places(batch["patch_mask"])
    return {**batch, "mlm_targets": mlm, "mpfc_targets": mpfc}


def test_info_nce_by_hand():
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    b = torch.tensor([[1.0, 1.5], [0.0, 1.0]])
    loss, accuracy = losses.info_nce(a, b)  # logits [[1, 0], [3, 2]]: the second query picks wrong
    expected = (math.log(math.e + 1) - 1 + math.log(math.e + 1)) / 2
    assert float(loss) == pytest.approx(expected) and float(accuracy) == 0.5
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(1, 2\)"):
        losses.info_nce(a, b[:1])


def test_global_mean_leaves_out_and_never_divides_by_zero():
    values, weights = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 0.0, 1.0])
    assert float(losses.global_mean(values)) == 3.0
    assert float(losses.global_mean(values, weights)) == 3.5
    assert float(losses.global_mean(values, torch.zeros(3))) == 0.0


def test_hardest_negatives_have_other_word_pieces():
    image = torch.eye(3)
    text = torch.tensor([[0.0, 0.5, 0.1], [0.9, 0.0, 0.8], [0.8, 0.7, 0.0]])
    ids = torch.tensor([[2, 5, 8, 3], [2, 5, 9, 3], [2, 5, 3, 0]])
    index, exists = losses.hardest_negatives(image, text, ids)
    assert index.tolist() == [1, 2, 1] and exists.all()
    # texts 0 and 1 are equal, as those of colour variants: the next best of other words is taken
    index, exists = losses.hardest_negatives(image, text, ids[[0, 0, 2]])
    assert index.tolist() == [2, 2, 1] and exists.all()
    _, exists = losses.hardest_negatives(image, text, ids[[1, 1, 1]])
    assert not exists.any()
    # a pool of two rows: image 0 and 1 choose between texts 0 and 1, image 2 has only its own
    index, exists = losses.hardest_negatives(image, text, ids, n_candidates=2)
    assert index[:2].tolist() == [1, 0] and exists.tolist() == [True, True, False]


def test_mining_keeps_pairs_without_a_negative_and_restores_training_mode():
    model, batch = tiny(dropout=0.5).train(), random_batch()
    features = model.patches(batch["image"])
    always = {**batch, "itm_draws": torch.ones(8)}
    text, target = losses.mine_negatives(model, features, always)
    assert (text != torch.arange(8)).all() and not target.any() and model.bert.training
    assert torch.equal(text, losses.mine_negatives(model, features, always)[0])  # no dropout in it
    same = {**always, **{key: batch[key][:1].expand(8, -1) for key in ("input_ids", "attention_mask")}}
    text, target = losses.mine_negatives(model, features, same)
    assert torch.equal(text, torch.arange(8)) and target.all()


def test_a_colour_variant_s_equal_text_is_no_wrong_text():
    """Products 0, 3 and 6 share their text, 1 and 2 share another: no pair gets its own words as the wrong text."""
    model, batch = tiny().eval(), random_batch()
    texts = [0, 1, 1, 0, 4, 5, 0, 7]
    batch |= {key: batch[key][texts] for key in ("input_ids", "attention_mask")} | {"itm_draws": torch.ones(8)}
    rows, target = losses.mine_negatives(model, model.patches(batch["image"]), batch)
    assert not target.any() and not (batch["input_ids"][rows] == batch["input_ids"]).all(1).any()


def test_pac_leaves_out_products_without_attributes():
    model, batch = tiny(), random_batch()
    loss, _ = losses.pac(model, batch)
    without = with_targets({k: torch.cat([v[:3], v[4:]]) for k, v in batch.items()})
    assert float(loss) == pytest.approx(float(losses.pac(model, without)[0]), rel=1e-5)
    unknown = {**batch, "attributes": torch.zeros(8, 12)}
    assert float(losses.pac(model, unknown)[0]) == 0.0


def test_nothing_asked_is_an_error():
    model, batch = tiny(), random_batch()
    nothing = {"mlm_labels": torch.full((8, 9), -100), "patch_mask": torch.zeros(8, 4, dtype=torch.bool)}
    for objective in (losses.mlm, losses.mpfc):
        with pytest.raises(ValueError, match=f"{objective.__name__}: no token or patch of the batch is a target"):
            objective(model, with_targets({**batch, **nothing}))
    with pytest.raises(ValueError, match=r"\(8, 9\)"):
        losses.mpfc(model, {**batch, "image_codes": torch.zeros(8, 9, dtype=torch.long)})


# loss at which eight pairs are learned by heart; PAC's cosines are scaled by 16 to let its loss fall
LEARNED = {"itc": 0.1, "itm": 0.1, "mlm": 0.1, "mpfc": 0.2, "mvc": 0.1, "pac": 0.4}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_objective_overfits_eight_pairs(name):
    model, batch = tiny(pac_scale=16.0, dropout=0.0).train(), random_batch()
    before = {k: v.clone() for k, v in batch.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss, _ = model(batch, OBJECTIVES[name])
        loss.backward()
        optimizer.step()
        if loss.item() < LEARNED[name]:
            break
    assert loss.item() < LEARNED[name]
    assert all(torch.equal(batch[k], before[k]) for k in batch)


# ---- one process and two ---------------------------------------------------------------------------------------------


def five_steps(rank, world_size):
    """{objective: (losses, weights)} of five SGD steps each on this process's rows of a global batch of 8.

    SGD, for Adam makes a whole step of a gradient that is zero but for rounding (attention's key bias)."""

    def given_pairs(model, batch):
        features = model.patches(batch["image"])
        return losses.match_pairs(model, features, batch, batch["itm_text"], batch["itm_target"])

    results = {}
    for name, objective in {**OBJECTIVES, "itm": given_pairs}.items():
        model = tiny(dropout=0.0)  # BatchNorm in eval mode
        ddp = DistributedDataParallel(model, find_unused_parameters=True) if world_size > 1 else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        values = []
        for step in range(5):
            batch = random_batch(seed=50 + step)  # with these, no ReLU has an input within rounding of zero
            n = 8 // world_size
            # negatives are given, and lie on the process's own side
            batch["itm_text"] = torch.where(batch["itm_target"].bool(), torch.arange(8), torch.arange(8) ^ 1)
            batch = with_targets({k: v[rank * n : (rank + 1) * n] for k, v in batch.items()})
            batch["itm_text"] = batch["itm_text"] - rank * n
            optimizer.zero_grad()
            loss, _ = ddp(batch, objective)
            loss.backward()
            optimizer.step()
            loss = loss.detach().clone()
            if world_size > 1:
                dist.all_reduce(loss)
            values.append(loss / world_size)
        results[name] = (torch.stack(values), {k: v for k, v in model.state_dict().items() if "running" not in k})
    return results


def test_two_processes_train_as_one(tmp_path, free_port):
    two, _ = in_two_processes(five_steps, free_port, tmp_path, 2)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the two processes; Adam makes a step of lr of what another order of sums leaves
    one = five_steps(0, 1)
    torch.set_num_threads(n_threads)
    for name, (values, weights) in one.items():
        assert (two[name][0] - values).abs().max() < 1e-5, name
        moved = max((weights[key] - value).abs().max() for key, value in tiny().named_parameters())
        assert moved > 1e-4, name
        for key, weight in weights.items():
            assert (two[name][1][key] - weight).abs().max() < 1e-5, (name, key)


def test_mining_under_autocast_leaves_the_gradients_of_itm_as_they_are():
    """Autocast keeps copies of weights. Those made in mining have no gradient, and older torch used them again."""
    batch, gradients = random_batch(), []
    for objective in (losses.itm, given_pairs_of_mining):
        model = tiny(dropout=0.0).train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = objective(model, batch)[0]
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 50
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def given_pairs_of_mining(model, batch):
    """ITM whose pairs were mined outside of this autocast."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        features = model.patches(batch["image"])
        pairs = losses.mine_negatives(model, features, batch)
    return losses.match_pairs(model, features, batch, *pairs)
