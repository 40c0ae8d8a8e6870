"""Draw claims.png from docs/claims.json: five claims about samples, and Theorem 1.

    pip install matplotlib
    python extras/paper/claims_figure.py       # -> out/claims.png; docs/images/ has a copy

A star marks the cell that a claim is about. The error bar of another cell is the 95% interval of
its difference from the star; cells that the claim doesn't compare have none.
"""

import json
from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.lines import Line2D

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parents[2]
ROWS = json.loads((ROOT / "docs/claims.json").read_text())["rows"]
SPACES = {"encoder's features": "#0072B2", "classifier's features": "#D55E00"}  # as in a cell
COLORS = tuple(SPACES.values())  # blue and vermillion: color-blind people can tell them apart
REAL = (0.12, 0.05)  # distances of 1,000 real images (docs/results.md)
RECONSTRUCTED = (0.14, 0.20)  # ... and of their reconstructions
STAR = {"marker": "*", "markersize": 15, "markeredgecolor": "white", "zorder": 4}


def claim(start, star, compared):
    """({cell: numbers}, star, {compared cell: half widths}) of the claim that starts like this.

    compared: the cells in the order of the file's differences.
    """
    row = next(row for row in ROWS if row["claim"].startswith(start))
    intervals = zip(compared, row["differences"].values(), strict=True)
    return row["cells"], star, {cell: [half for _, half in each] for cell, each in intervals}


def references(line):
    """Draw both distances of real images and of reconstructions with axhline or axvline."""
    for color, real, reconstructed in zip(COLORS, REAL, RECONSTRUCTED):
        line(real, color=color, linestyle=":", linewidth=1.5, zorder=0)
        line(reconstructed, color=color, linestyle="--", linewidth=1.2, zorder=0)


def bars(ax, cells, star, halves, names):
    """Two horizontal bars per cell, from top to bottom."""
    for i, color in enumerate(COLORS):
        for row, (cell, numbers) in enumerate(cells.items()):
            y = row + 0.34 * i - 0.17
            ax.barh(y, numbers[i], 0.32, color=color)
            if cell in halves:
                ax.errorbar(numbers[i], y, xerr=halves[cell][i], color="black", capsize=2, lw=1)
            if cell == star:
                ax.plot(numbers[i], y, color=color, **STAR)
    references(ax.axvline)
    ax.set_yticks(range(len(cells)), names)
    ax.invert_yaxis()


def curve(ax, cells, star, halves, xs):
    """A line for each distance through the cells at xs."""
    for i, color in enumerate(COLORS):
        ax.plot(xs, [numbers[i] for numbers in cells.values()], "o-", color=color, markersize=5)
        for x, (cell, numbers) in zip(xs, cells.items()):
            if cell in halves:
                ax.errorbar(x, numbers[i], halves[cell][i], color=color, capsize=4)
            if cell == star:
                ax.plot(x, numbers[i], color=color, **STAR)
    references(ax.axhline)
    ax.set_xticks(xs, list(cells))
    ax.minorticks_off()


def theorem(ax):
    """The loss on one image against the width d; the bound is max(1 - d / C, 0) with C = 128."""
    widths, _, head, x_prediction = (row["cells"] for row in ROWS[-4:])
    ax.plot((0, 128, 200), (1, 0, 0), color="gray")
    ax.text(104, 0.24, "bound\nmax(1 - d/C, 0)", color="dimgray")
    xs = [int(width) for width in widths]
    ax.plot(xs, [loss for (loss,) in widths.values()], "o", color="black", markersize=7)
    ax.text(73, 0.56, "plain DiT of width d")
    for x, (loss,) in ((64, head["128"]), (32, x_prediction["x"])):
        ax.plot(x, loss, "D", color="black", markerfacecolor="white", markersize=7)
    ax.text(71, 0.05, "wide\nhead", va="center", fontsize=10)
    ax.text(32, 0.08, "predicts x", ha="center", fontsize=10)
    ax.set_xticks(xs)
    ax.set(xlim=(0, 200), ylim=(-0.03, 1.03), ylabel="loss", title="Theorem 1 (C = 128)")
    ax.set_xlabel("width d of the DiT")


def main():
    pyplot.rcParams.update({"font.size": 11, "axes.titlesize": 12.5})
    figure, grid = pyplot.subplots(2, 3, figsize=(10, 7.2), layout="constrained")
    compute, shift, head, guidance, steps, last = grid.flat
    compute.set(title="Similar compute", xlabel="distance")
    shift.set(title="Schedule shift", xlabel="alpha")
    head.set(title="Head of a narrow backbone", xlabel="width of the head")
    guidance.set(title="AutoGuidance", xlabel="guidance scale")
    steps.set(title="Euler steps", xlabel="steps")

    plain = ["1x256", "2x176", "3x144", "4x128", "2x176, lr 8e-3"]
    names = ["DiT$^{\\rm DH}$", *plain[:4], "2x176,\nlr 8e-3"]
    bars(compute, *claim("DiT^DH beats", "8x64, head 1x128", plain), names)
    shift.set_xscale("log")
    curve(shift, *claim("the schedule needs a shift", "4", ["1", "16"]), (1, 4, 16))
    head.set_yscale("log")
    curve(head, *claim("a narrow backbone", "128", ["none", "96"]), range(4))
    head.set_yticks((0.05, 0.1, 0.2, 0.5, 1, 2, 5), (0.05, 0.1, 0.2, 0.5, 1, 2, 5))
    curve(guidance, *claim("AutoGuidance (1.25)", "1.25", ["none"]), (1, 1.1, 1.25, 1.5))
    steps.set_xscale("log")
    curve(steps, *claim("50 Euler steps", "50", ["100"]), (5, 10, 25, 50, 100))
    for ax in (shift, head, guidance, steps):
        ax.set_ylabel("distance")
    for ax in (shift, guidance, steps):
        ax.set_ylim(bottom=0)
    theorem(last)

    keys = [Line2D([], [], color=color, linewidth=6, label=s) for s, color in SPACES.items()]
    keys += [Line2D([], [], color="black", linestyle="--", label="reconstructions")]
    keys += [Line2D([], [], color="black", linestyle=":", label="real images")]
    figure.legend(handles=keys, loc="outside upper center", ncols=4)
    Path("out").mkdir(exist_ok=True)
    figure.savefig("out/claims.png", dpi=180)


if __name__ == "__main__":
    main()
