"""Loss and metric curves of runs as one picture: python -m tools.curves RUN... [--out curves.png]

RUN is a run folder. Each logged number has a panel, with a line for each run. Needs requirements-dev.txt."""

import argparse
import json
from pathlib import Path

from plumbing import ending
from plumbing.files import reading, replacing
from plumbing.settings import InputError

LEFT_OUT = ("lr", "samples_per_s", "memory_gb", "skipped_images", "updates")  # they show nothing of learning


def read_curves(folder):
    """{name: ([steps], [values])} of a run's log.jsonl. A null was not a number, and is left out.

    So is a last line that is cut short, for the run may go on. Raises InputError where there is no log."""
    path, curves = Path(folder, "log.jsonl"), {}
    with reading(path, "cannot be read, expected the log of a run folder"):
        *lines, _ = path.read_text(encoding="utf-8").split(
            "\n"
        )  # after the last newline stands nothing, or half a line
    for row in map(json.loads, lines):
        step = row.pop("step")
        for name, value in row.items():
            if value is not None:
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    return curves


def draw(runs, path):
    """Write a PNG of {label: curves of `read_curves`}."""
    try:
        from matplotlib.figure import Figure  # here alone: no stage needs it
    except ImportError:
        raise InputError("matplotlib is missing, which draws; pip install -r requirements-dev.txt") from None
    names = dict.fromkeys(name for curves in runs.values() for name in curves if not name.endswith(LEFT_OUT))
    if not names:
        raise InputError(f"{', '.join(runs)}: nothing is logged yet, expected lines with losses or metrics")
    names = sorted(names, key=lambda name: (name.startswith("val_"), not name.endswith("loss")))  # losses first
    n_rows = (len(names) + 2) // 3  # three panels a row
    figure = Figure(figsize=(13.5, 2.8 * n_rows), layout="constrained")
    for i, name in enumerate(names, 1):
        panel = figure.add_subplot(n_rows, 3, i, title=name, xlabel="updates")
        for label, curves in runs.items():
            panel.plot(*curves.get(name, ([], [])), ".-", label=label)  # a run without the number keeps its colour
        panel.legend(fontsize="small")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=100)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, as runs/demo")
    parser.add_argument("--out", default="curves.png", help="PNG to write [curves.png]")
    given = parser.parse_args(argv)
    draw({run: read_curves(run) for run in given.runs}, Path(given.out).expanduser())
    print(f"written: {given.out}")


if __name__ == "__main__":
    ending.run(main)
