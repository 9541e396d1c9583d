"""Pages of pictures: which queries stand on the page, what is framed, and the drawing itself."""

import types

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import metrics
from plumbing import annotations, pictures, weights
from plumbing.pictures import Cell, Ranking, Row, dot_products
from plumbing.processes import Processes
from plumbing.settings import InputError


def numbered(n, kind):
    return [{"text": f"{kind} {i}", "id": i} for i in range(n)]


def ranking_of(n, wrong=()):
    """The ranking of n queries on a gallery of n unit vectors; those of `wrong` have their right item last."""
    query = torch.eye(n) + torch.linspace(0.5, 0.1, n)
    for i in wrong:
        query[i, i] = -1.0
    return Ranking(numbered(n, "query"), numbered(n, "item"), dot_products(query, torch.eye(n)))


def test_rows_of_a_ranking():
    ranking = ranking_of(9, wrong=[3])
    rows = [pictures.ranked_row(ranking, i) for i in range(9)]
    assert [i for i, row in enumerate(rows) if row.failed] == [3]
    query, cells, _ = rows[2]
    assert query == Cell([], "query 2", "right one: rank 1 of 9")
    assert [c.text for c in cells] == ["item 2", "item 0", "item 1", "item 3", "item 4"]
    assert [c.right for c in cells] == [True, False, False, False, False] and "right" in cells[0].label
    query, cells, _ = rows[3]
    assert query.label == "right one: rank 9 of 9" and not any(c.right for c in cells)
    scores, ids = torch.stack([ranking.scores(i) for i in range(9)]), torch.arange(9)
    ranks = metrics.best_ranks(scores, torch.eye(9), ids, ids).tolist()
    assert [row.query.label for row in rows] == [f"right one: rank {rank} of 9" for rank in ranks]


@pytest.mark.parametrize("n", [1, 3, 99])
def test_a_failure_is_always_among_them(n, monkeypatch, capsys):
    pages = []
    monkeypatch.setattr(pictures, "draw_page", lambda path, title, rows: pages.append(rows))
    for seed in range(5):
        pictures.draw_rankings("a.png", "x", [ranking_of(40, wrong=[17])], n, seed)
        assert f"a.png (1 of {min(n, 40)} without a right one" in capsys.readouterr().out
        assert len(pages[-1]) == min(n, 40)
        assert sum(row.query.text == "query 17" for row in pages[-1]) == 1
        assert len({row.query.text for row in pages[-1]}) == len(pages[-1])


def test_recognition_shows_both_labels(catalogue):
    """A model that always says class 1: whoever is of another class fails."""
    config = evaluate.EvalConfig("fashiongen_category", data_root=str(catalogue), image_size=32, workers=0)
    names = annotations.label_names(catalogue, config.task)["categories"]
    logits = torch.eye(len(names) + 1)[1]  # one class more than labels.json has names
    model = types.SimpleNamespace(config=types.SimpleNamespace(n_classes=len(logits)))
    model.classify = lambda batch: logits.repeat(len(batch["image"]), 1)
    tokenizer = weights.wordpiece((catalogue / "vocab.txt").read_text())
    _, result = next(evaluate.run_task(model, tokenizer, config, Processes(0, 1, torch.device("cpu"))))
    (ranking,) = result.rankings
    assert ranking.gallery[-1] == {"text": f"class {len(names)}", "id": len(names)}
    for i, (prediction, label) in enumerate(result.outcomes["samples"].tolist()):
        query, results, failed = pictures.ranked_row(ranking, i)
        assert prediction == 1 and query.text == f"true: {names[label]}"
        assert [(cell.text, cell.right) for cell in results] == [(names[1], label == 1)] and failed == (label != 1)


def test_a_query_shows_only_items_of_its_category():
    queries = [{**item, "wanted": c} for item, c in zip(numbered(4, "query"), (0, 0, 0, 1), strict=True)]
    items = [{**item, "category": c} for item, c in zip(numbered(4, "item"), (0, 1, 0, 1), strict=True)]
    ranking = Ranking(queries, items, dot_products(torch.eye(4), torch.eye(4)))
    query, cells, _ = pictures.ranked_row(ranking, 2)
    assert query.label == "right one: rank 1 of 2" and [cell.text for cell in cells] == ["item 2", "item 0"]


def test_page(tmp_path):
    """A red photo, framed, right of the line; the query's text left; nothing left aside."""
    Image.new("RGB", (30, 60), (255, 0, 0)).save(tmp_path / "red.png")
    photo = Cell([str(tmp_path / "red.png")], "a title", "1", True)
    rows = [Row(Cell(text="red"), [photo] * 7), Row(Cell(photo.images * 3), [photo])]
    pictures.draw_page(tmp_path / "page.png", "title", rows)
    page = np.asarray(Image.open(tmp_path / "page.png")).astype(int)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.png", "red.png"]
    red, green = ((page == colour).all(2).sum() for colour in ((255, 0, 0), pictures.GREEN))
    whole, tile = pictures.CELL**2 // 2, (pictures.CELL // 2) ** 2 // 2  # the photo fills half of its square
    assert red == pytest.approx(8 * whole + 3 * tile, rel=0.01)
    frame = (pictures.CELL + 12) ** 2 - (pictures.CELL + 2) ** 2
    assert green == 8 * frame
    with pytest.raises(InputError, match="cannot be saved"):
        pictures.draw_page(tmp_path / "nowhere" / "page.png", "title", rows)


@pytest.mark.parametrize("out", ["page.txt", "nowhere/page.png"])
def test_a_page_that_cannot_be_is_said_before_the_work(out):
    with pytest.raises(InputError, match="expected the name of a .png|cannot be written there: No such file"):
        pictures.check_page(out)
