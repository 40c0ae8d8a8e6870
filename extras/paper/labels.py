"""Write names above the columns and beside the rows of a grid of images; stack grids.

    python sample.py --num 60 --out out/sixty
    python extras/paper/labels.py out/sixty.png --zoom 2 --columns disc ring square triangle star \\
        cross heart moon bar hourglass          # -> out/labeled.png: docs/images/samples.png

Names share the grid's width or height equally, but "7*near" is as wide as seven. --zoom repeats
pixels. Several grids are stacked, each under the same names.
"""

import argparse

from PIL import Image, ImageDraw, ImageFont


def centers(names):
    """Pairs of a name and the center of its share, between 0 and 1."""
    counts = [int(name.split("*")[0]) if "*" in name else 1 for name in names]
    for i, name in enumerate(names):
        yield name.split("*")[-1], (sum(counts[:i]) + counts[i] / 2) / sum(counts)


def label(grid, columns=(), rows=(), font_size=24):
    """The image `grid` below the names of its columns and right of the names of its rows."""
    font = ImageFont.load_default(size=font_size)
    top = 3 * font_size // 2 if columns else 0
    left = max((round(font.getlength(name)) + font_size // 2 for name in rows), default=0)
    page = Image.new("RGB", (left + grid.width, top + grid.height), "white")
    page.paste(grid, (left, top))
    write = ImageDraw.Draw(page).text
    for name, x in centers(columns):
        write((left + x * grid.width, top / 2), name, "black", font, anchor="mm")
    for name, y in centers(rows):
        write((left - font_size // 4, top + y * grid.height), name, "black", font, anchor="rm")
    return page


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("grids", nargs="+", metavar="PNG")
    p.add_argument("--columns", nargs="+", default=[], metavar="NAME")
    p.add_argument("--rows", nargs="+", default=[], metavar="NAME")
    p.add_argument("--font-size", type=int, default=24, help="in pixels, after the zoom")
    p.add_argument("--zoom", type=int, default=1)
    p.add_argument("--out", default="out/labeled.png")
    args = p.parse_args()
    grids = [Image.open(path).convert("RGB") for path in args.grids]
    grids = [g.resize((g.width * args.zoom, g.height * args.zoom), Image.NEAREST) for g in grids]
    pages = [label(grid, args.columns, args.rows, args.font_size) for grid in grids]
    gap = args.font_size
    size = max(page.width for page in pages), sum(page.height + gap for page in pages) - gap
    stacked = Image.new("RGB", size, "white")
    for i, page in enumerate(pages):
        stacked.paste(page, (0, sum(above.height + gap for above in pages[:i])))
    stacked.save(args.out, optimize=True)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
