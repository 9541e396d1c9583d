"""curves.py: what it reads of a run's log, and its one-line errors."""

import json
import sys
from pathlib import Path

import pytest

from plumbing import runs
from plumbing.settings import InputError
from tools import curves

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(tmp_path):
    """A run folder with a log as pretrain.py writes it: objectives come and go, one loss was not finite."""
    runs.append_log(tmp_path / "log.jsonl", {"step": 50, "lr": 1e-3, "itc_loss": 3.5, "itc_acc": 0.1, "itc_updates": 9})
    runs.append_log(tmp_path / "log.jsonl", {"step": 100, "itm_loss": 0.7, "itc_loss": float("nan"), "memory_gb": 0.6})
    runs.append_log(tmp_path / "log.jsonl", {"step": 100, "val_mean_recall": 0.5})
    runs.append_log(tmp_path / "log.jsonl", {"step": 150, "itc_loss": 2, "samples_per_s": 100.0})
    return tmp_path


EXPECTED = {
    "lr": ([50], [1e-3]),
    "itc_updates": ([50], [9]),
    "memory_gb": ([100], [0.6]),
    "samples_per_s": ([150], [100.0]),
    "itc_loss": ([50, 150], [3.5, 2]),
    "itc_acc": ([50], [0.1]),
    "itm_loss": ([100], [0.7]),
    "val_mean_recall": ([100], [0.5]),
}


def test_curves(run):
    assert curves.read_curves(run) == EXPECTED


def test_a_last_line_cut_short_is_left_out(run):
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 200, "itc_lo')
    assert curves.read_curves(run) == EXPECTED


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "log.jsonl: cannot be read, expected the log of a run folder: No such file"),
        ("", "nothing is logged yet"),
        ('{"step": 1, "lr": 0.1}\n', "nothing is logged yet"),
    ],
)
def test_errors_are_one_line(text, message, tmp_path):
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        curves.main([str(tmp_path), "--out", str(tmp_path / "a.png")])
    assert "\n" not in str(error.value)


def test_without_matplotlib(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="^matplotlib is missing.*pip install -r requirements-dev.txt$"):
        curves.main([str(run), "--out", str(run / "a.png")])
    assert not (run / "a.png").exists()
    assert "matplotlib" in (ROOT / "requirements-dev.txt").read_text()


def test_draws(run, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn, save = [], figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, *args, **more: drawn.append(self) or save(self, *args, **more))
    other = tmp_path / "other"
    other.mkdir()
    (other / "log.jsonl").write_text(json.dumps({"step": 10, "itc_loss": 1.0, "loss": 3}) + "\n")
    curves.main([str(run), str(other), "--out", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG") and not list(tmp_path.glob("*.tmp"))
    panels = {panel.get_title(): panel for panel in drawn[0].axes}
    assert list(panels) == ["itc_loss", "itm_loss", "loss", "itc_acc", "val_mean_recall"]
    first, second = panels["itc_loss"].lines
    assert first.get_xydata().tolist() == [[50, 3.5], [150, 2]] and second.get_xydata().tolist() == [[10, 1]]
    assert (first.get_label(), second.get_label()) == (str(run), str(other))
    with pytest.raises(InputError, match="/nowhere/a.png: cannot be saved: No such file or directory"):
        curves.main([str(run), "--out", "/nowhere/a.png"])
