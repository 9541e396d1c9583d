"""Loss and metric curves of runs as one picture: python -m tools.curves RUN... [--out curves.png]

RUN is a run folder (or its log.jsonl). A panel for each logged number, a line for each run in it. Needs matplotlib,
which is in requirements-dev.txt."""

import argparse
import json
import math
from pathlib import Path

import common
from settings import InputError

# of the log's numbers, those that say nothing of what was learned
LEFT_OUT = ("step", "lr", "samples_per_s", "memory_gb", "skipped_images", "updates")
COLUMNS = 3  # of panels


def read_curves(run):
    """{name: ([steps], [values])} of a run folder or log.jsonl, in the log's order; null and LEFT_OUT are left out.

    A last line cut short (the run is being written, or was killed) is left out, too. Raises InputError where there is
    no log, where another line is no JSON object with a step, and where nothing is logged yet."""
    path = Path(run, "log.jsonl") if Path(run).is_dir() else Path(run)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}), expected a run folder with a log.jsonl") from None
    curves = {}
    for i, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, KeyError, TypeError):
            if i == len(lines):
                break
            raise InputError(f"{path}:{i}: found {line!r:.60}, expected a JSON object with a step") from None
        for name, value in row.items():
            if not name.endswith(LEFT_OUT) and isinstance(value, (int, float)):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    if not curves:
        raise InputError(f"{path}: nothing is logged yet, expected lines with losses or metrics")
    return curves


def order(names):
    """Losses first, then what is measured in training, then validation; each in the order of the log."""
    return sorted(names, key=lambda name: (name.startswith("val_"), not name.endswith("loss")))


def draw(runs, path):
    """PNG of {label: curves of `read_curves`}. Raises InputError without matplotlib or where it cannot be written."""
    try:
        from matplotlib.figure import Figure  # here alone: no stage needs it
    except ImportError:
        raise InputError("matplotlib is missing, which draws; pip install -r requirements-dev.txt") from None
    names = order(dict.fromkeys(name for curves in runs.values() for name in curves))
    rows = math.ceil(len(names) / COLUMNS)
    figure = Figure(figsize=(4.5 * COLUMNS, 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for panel, name in zip(panels, names, strict=False):
        for i, (label, curves) in enumerate(runs.items()):
            if name in curves:
                mark = "." if len(curves[name][0]) < 20 else None  # few points, as validation has, show as such
                panel.plot(*curves[name], color=f"C{i}", label=label, marker=mark)
        panel.set_title(name)
        panel.set_xlabel("updates")
        panel.grid(alpha=0.3)
        if len(runs) > 1:
            panel.legend(fontsize="small")
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    aside = Path(f"{path}.tmp")
    try:
        figure.savefig(aside, format="png", dpi=100)
        aside.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); set --out=FILE to where it can") from None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, as runs/demo")
    parser.add_argument("--out", default="curves.png", help="PNG to write [curves.png]")
    given = parser.parse_args(argv)
    draw({run: read_curves(run) for run in given.runs}, given.out)
    print(f"written: {given.out}")


if __name__ == "__main__":
    common.run(main)
