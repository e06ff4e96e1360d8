"""What the two knobs of inference do: PSNR and NIQE over `generative` and over `budget`.

    python benchmarks/knobs.py [--model tiny] [--seeds 3] [--photographs FOLDER|LIST [--root FOLDER]]
        [--docs docs/adapters.md] [--plot docs/images/knobs.png]

The embedded held-out photographs, or those of a folder or list, each degraded --seeds times by Real-ESRGAN's recipe and
restored with the default settings in one pass each. The
table is printed, and written between the two `knobs` marks of the page; the plot shows the same. A knob is called
monotone over its range if no step of the mean goes against its whole way, and monotone within the intervals if none
does so by more than its paired interval (95 %, bootstrap over pairs). NIQE is better when lower.
"""

from __future__ import annotations

import argparse
import itertools
import re
from pathlib import Path

from torch import Tensor

from morsr import Restorer
from morsr.data.degraded import degraded_pairs
from morsr.evaluation.benchmark import BenchmarkReport, Method, evaluate
from morsr.evaluation.tables import markdown_table

GENERATIVE = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
METRICS = {"psnr": ("PSNR-Y, dB", 3), "niqe": ("NIQE", 3)}
MARKS = re.compile(r"(<!-- knobs -->\n).*?(<!-- end of knobs -->)", re.DOTALL)


def method(restorer: Restorer, knob: str, value: float) -> Method:
    """Restore with one value of one knob."""

    def restore(lr: Tensor) -> Tensor:
        settings = {"generative": float(value)} if knob == "generative" else {"budget": int(value)}
        return restorer(lr, tile=None, **settings)

    return restore


def verdict(report: BenchmarkReport, curve: dict[float, str], metric: str) -> str:
    """Whether the mean goes one way only from the first value of a knob to the last."""
    values, names = list(curve), list(curve.values())
    means = [report.mean(name, metric) for name in names]
    way = 1 if means[-1] > means[0] else -1
    steps = [(way * (after - before), place) for place, (before, after) in enumerate(itertools.pairwise(means))]
    worst, place = min(steps)
    whole = f"{'rises' if way > 0 else 'falls'} by {abs(means[-1] - means[0]):.3f}"
    if worst >= 0:
        return f"monotone: {whole}"
    step = report.difference(names[place + 1], metric, names[place])
    certain = step.low > 0 or step.high < 0
    return (
        f"{'not monotone' if certain else 'monotone within the intervals'}: {whole}; the largest step against it, from "
        f"{values[place]:g} to {values[place + 1]:g}, is {step.mean:+.4f} ({step.low:+.4f} to {step.high:+.4f})"
    )


def plot(report: BenchmarkReport, curves: dict[str, dict[float, str]], target: Path) -> None:
    """Both metrics over both knobs."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.2), layout="constrained")
    for axis, (knob, names) in zip(axes, curves.items(), strict=True):
        twin = axis.twinx()
        for side, metric, color in ((axis, "psnr", "#1f5fa8"), (twin, "niqe", "#b0480e")):
            side.plot(list(names), [report.mean(name, metric) for name in names.values()], "o-", color=color, ms=4)
            side.set_ylabel(METRICS[metric][0], color=color)
            side.tick_params(axis="y", colors=color)
            side.ticklabel_format(axis="y", useOffset=False)
        axis.set_xlabel(knob)
        axis.grid(alpha=0.3)
    figure.savefig(target, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--seeds", type=int, default=3, help="degradations of each photograph")
    parser.add_argument("--photographs", default="skimage:eval", help="folder, or file with one name a line")
    parser.add_argument("--root", help="folder that the names of a list are in")
    parser.add_argument("--docs", type=Path, help="page whose part between the knobs marks is replaced")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(argv)
    restorer = Restorer.from_pretrained(args.model)
    config = restorer.generator.context.config
    # All slots and no routed rank at all are the ends of the other knob's range too, so they are run once.
    ends = {0.0: "generative=0", float(config.top_k): "generative=1"}
    budgets = [1, 2, *range(4, config.top_k, 2)]
    curves = {
        "generative": {value: f"generative={value:g}" for value in GENERATIVE},
        "budget": dict(sorted({**ends, **{float(value): f"budget={value}" for value in budgets}}.items())),
    }
    names = {name: (knob, value) for knob, curve in reversed(curves.items()) for value, name in curve.items()}
    methods = {name: method(restorer, *which) for name, which in names.items()}
    source = {"source": args.photographs, "root": args.root} if args.root else args.photographs
    pairs = degraded_pairs([source], range(args.seeds), multiple=16)
    report = evaluate(methods, pairs, ("psnr", "niqe"), reference="generative=1", pictures=0)

    rows, verdicts = [], []
    for knob, curve in curves.items():
        for value, name in curve.items():
            cells = [f"{report.mean(name, metric):.{digits}f}" for metric, (_, digits) in METRICS.items()]
            difference = report.difference(name, "psnr")
            cells.append(
                ""
                if name == "generative=1"
                else f"{difference.mean:+.3f} ({difference.low:+.3f}, {difference.high:+.3f})"
            )
            rows.append([f"`{knob}={value:g}`", *cells])
        inside = {value: name for value, name in curve.items() if knob == "budget" or value <= 1}
        for metric, (label, _) in METRICS.items():
            verdicts.append(f"- `{knob}`, {label.split(',')[0]}: {verdict(report, inside, metric)}.")
    head = ["setting", *(label for label, _ in METRICS.values()), "PSNR against as trained (95 %)"]
    text = "\n".join(
        [
            markdown_table(head, rows),
            "",
            f"{len(pairs)} pairs of {len(pairs) // args.seeds} photographs. Over 0 to 1, and over 0 to {config.top_k}:",
            "",
            *verdicts,
        ]
    )
    print(text)
    if args.plot:
        plot(report, curves, args.plot)
    if args.docs:
        page = args.docs.read_text(encoding="utf-8")
        if not MARKS.search(page):
            raise SystemExit(f"{args.docs} has no <!-- knobs --> … <!-- end of knobs --> marks")
        args.docs.write_text(MARKS.sub(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", page), encoding="utf-8")


if __name__ == "__main__":
    main()
