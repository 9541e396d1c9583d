"""The tables of an evaluation, printed and as JSON."""

from functools import partial

from metrics import bootstrap
from plumbing.files import write_json
from plumbing.processes import device_name


def report(results, config, device, path, out, seconds, baseline=None, intervals=False):
    """Write {protocol: Result} as JSON to `out`, and print a table for each protocol, with chance beside every metric.

    baseline: {protocol: Result} of another checkpoint on the same queries; adds the difference and its interval."""
    rows = {"task": config.task, "checkpoint": str(path), "seed": config.seed, "seconds": round(seconds, 1)}
    rows |= {"dtype": config.dtype, "device": device_name(device)}
    lines = []
    for protocol, result in results.items():
        interval_of = partial(bootstrap, result.metrics_of, result.outcomes, seed=config.seed)
        more = {}  # further columns
        if intervals:
            more["interval"] = interval_of()
        if baseline:
            base = baseline[protocol]
            more["difference"] = {name: value - base.metrics[name] for name, value in result.metrics.items()}
            more["difference_interval"] = interval_of(base.outcomes)
        rows[protocol] = {"metrics": result.metrics, "chance": result.chance, **more, "counts": result.counts}
        counts = [f"{name} {n:g}" for name, n in result.counts.items() if n or not name.endswith("_left_out")]
        lines.append(f"\n{config.task}, {protocol} ({', '.join(counts)}; seed {config.seed}; {path})")
        lines.append(" ".join([f"{'%':>16} {'value':>7} {'chance':>7}", *(f"{x.replace('_', ' '):>19}" for x in more)]))
        for name, value in result.metrics.items():
            line = f"{name:>16} {100 * value:7.1f} {100 * result.chance[name]:7.1f}"
            for x in (values[name] for values in more.values()):
                text = f"{100 * x[0]:.1f} to {100 * x[1]:.1f}" if isinstance(x, tuple) else f"{100 * x:+.1f}"
                line += f" {text:>19}"
            lines.append(line)
    try:
        write_json(out, rows)  # first, for whoever reads what is printed may close the pipe
        lines.append(f"written: {out}")
    finally:
        print(*lines, sep="\n")  # also where the disk is full
