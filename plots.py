"""Figures, by matplotlib: grids of images, training curves, trade-offs. PNG files alone.

Two kinds of figures. Grids (before_after, instance_grid, sample_grid) place each image at whole
pixels, without resampling by matplotlib: an image of 32x32 pixels would be blurred. Plots
(training_curves, trade_off) are ordinary axes.

matplotlib.figure.Figure is used without pyplot: no global state, no window, no display needed.
Images are PIL images or uint8 tensors (3, H, W); None leaves a place empty.
"""

import io
import logging
import math
import os
import textwrap
import warnings
from collections import namedtuple
from itertools import cycle
from pathlib import Path
from statistics import mean

import numpy as np
from PIL import Image

from common import fail

DPI = 100  # a point of a font is 100/72 pixels
TILE = 84  # side of an image in a grid, in pixels
GAP = 4  # pixels between two images
GROUP_GAP = 20  # pixels between two groups of columns
TITLE = 30  # height of the titles above columns
MAX_BYTES = 300_000  # of a PNG with all its colours
COPY = 0.4  # copy similarity from which a generated image is a copy

# Colours that people with colour blindness can tell apart (Okabe and Ito 2008)
COLOURS = "black #D55E00 #0072B2 #009E73 #E69F00 #CC79A7 #56B4E9 #8C564B #9A9A00 gray".split()
MARKERS = "oD^sPXv*"

# Quantities of a log.jsonl, in the order of their panels. Other losses are shown by their names.
PANELS = {
    "loss_d": "discriminator loss L_D",
    "disc_acc": "discriminator accuracy",
    "loss_u": "unlearning loss L_u",
    "loss_f": "forget loss L_f",
    "loss_r": "retain loss L_r",
    "cos": "cosine of the two gradients",
    "conflict": "fraction of conflicting steps",
    "share_r": "what retention adds to G, of |G|",
}
REFERENCES = {"disc_acc": 0.5, "cos": 0.0}  # chance level; orthogonal gradients


# ---- 1. figures and files -----------------------------------------------------------------------


def new_figure(width, height, **options):
    """A Figure of so many pixels, white."""
    # Imported here: other errors of a script should not wait for it. Its first import on a machine
    # builds a cache of fonts, which it would announce as a warning.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure

    return Figure((width / DPI, height / DPI), DPI, **options)


def save(figure, path):
    """Writes a PNG atomically, see common.atomic_save; fails if it cannot be written.

    A file over MAX_BYTES is written again with 256 colours: a third of the size, for a sheet of
    small images hardly a difference.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a prompt in a script that the font lacks
        figure.savefig(buffer, format="png", dpi=DPI)
    if buffer.tell() > MAX_BYTES:
        image = Image.open(buffer).convert("RGB")
        image = image.quantize(256, dither=Image.Dither.NONE)
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_bytes(buffer.getvalue())
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        fail(f"{path} cannot be written: {e.strerror}")


def to_pil(image):
    """A uint8 tensor (3, H, W) -> PIL RGB; a PIL image is returned as it is."""
    if isinstance(image, Image.Image):
        return image
    pixels = image.permute(1, 2, 0).contiguous()  # (H, W, 3)
    return Image.fromarray(pixels.numpy())


# ---- 2. grids of images -------------------------------------------------------------------------


def sample_grid(rows, path, columns=None):
    """Labelled rows of images. rows: [(label, [images])].

    columns: titles, each above an equal number of images, or None. "before" and "after" above eight
    images: four each, with a gap between the groups.
    """
    n_images = max(len(images) for _, images in rows)
    titles = columns or [""]
    span = n_images // len(titles)
    save_grid([Panel(rows, [(title, span) for title in titles])], path)


def before_after(rows, path, per_side=4):
    """Images of the same prompts and seeds, before | after unlearning.

    rows: [(heading, prompt, [images before], [images after])]; at most per_side images of a side.
    """
    longest = max(max(len(before), len(after)) for *_, before, after in rows)
    n = max(1, min(per_side, longest))
    grid = []
    for heading, prompt, before, after in rows:
        lines = [heading, textwrap.fill(prompt, 28, max_lines=3)]
        label = "\n".join(line for line in lines if line)
        before = [*before[:n], *[None] * n][:n]  # filled up, so that "after" begins at its place
        grid.append((label, [*before, *after[:n]]))
    save_grid([Panel(grid, [("before", n), ("after", n)])], path)


def instance_grid(forget, surrogates, probes, samples, copies, path, n=8):
    """Instance unlearning: the probes of each forget image, and n samples of the same seeds.

    forget: [images]; surrogates: [image or None]. probes: {"before", "after": [>= 3 images of each
    forget image]}; samples: {"before", "after": (N, 3, H, W)}; copies: [similarity of sample j
    before unlearning to the nearest forget image]. Samples that were copies come first.
    """
    rows = []
    for k, image in enumerate(forget):
        before = probes["before"][k][:3]
        after = probes["after"][k][:3]
        rows.append(("", [image, surrogates[k], *before, *after]))
    columns = [
        ("to forget", 1),
        ("surrogate", 1),
        ("probe: before", 3),
        ("probe: after", 3),
    ]

    order = list(range(len(copies)))
    title = "the same seeds"
    if max(copies) >= COPY:
        # A half of the places is for copies, the other half shows what should stay the same
        order.sort(key=lambda i: -copies[i])
        first = order[: n // 2]
        order = first + sorted(set(order) - set(first))
        title += " (copies of a forget image first)"
    chosen = order[:n]
    sample_rows = []
    for when in ("before", "after"):
        images = [samples[when][i] for i in chosen]
        sample_rows.append((when, images))
    below = Panel(sample_rows, [(title, len(chosen))])
    save_grid([Panel(rows, columns), below], path)


# rows: [(label, [images])]; columns: [(title, how many images wide)]
Panel = namedtuple("Panel", "rows columns")


def save_grid(panels, path):
    """Draws panels, one below the other, and saves them."""
    labels = [label for panel in panels for label, _ in panel.rows]
    lines = [line for label in labels for line in label.split("\n")]
    left = 16 + 7 * max(map(len, lines))  # 7: of a letter, on average
    places = [column_places(panel.columns, left) for panel in panels]
    width = max(xs[-1] for _, xs in places) + TILE + 2 * GAP
    heights = [TITLE + len(panel.rows) * (TILE + GAP) for panel in panels]
    height = sum(heights) + GAP

    figure = new_figure(width, height)
    top = height  # pixels from below, as matplotlib counts
    for panel, (starts, xs) in zip(panels, places, strict=True):
        for (title, _), x in zip(panel.columns, starts, strict=True):
            add_text(figure, x, top - TITLE // 2, title)
        top -= TITLE
        for label, images in panel.rows:
            top -= TILE + GAP
            add_text(figure, 8, top + TILE // 2, label)
            for x, image in zip(xs, images, strict=False):  # a row may be shorter
                if image is not None:
                    add_image(figure, x, top, image)
    save(figure, path)


def column_places(columns, left):
    """([x of each title], [x of each image]), in pixels. columns: [(title, span)]."""
    x = left
    starts, places = [], []
    for _, span in columns:
        starts.append(x)
        for _ in range(span):
            places.append(x)
            x += TILE + GAP
        x += GROUP_GAP
    return starts, places


def add_image(figure, x, y, image):
    """An image, TILE pixels wide, with its lower left corner at pixels (x, y)."""
    tile = to_pil(image).convert("RGB")
    tile = tile.resize((TILE, TILE), Image.BICUBIC)
    figure.figimage(np.asarray(tile), x, y, origin="upper")


def add_text(figure, x, y, text):
    """Text at pixels (x, y) from the lower left corner, centred vertically."""
    # transform=None: pixels. parse_math: two dollar signs in a prompt are no formula
    options = {"transform": None, "va": "center", "parse_math": False}
    figure.text(x, y, text, fontsize=9, **options)


# ---- 3. plots -----------------------------------------------------------------------------------


def training_curves(log, path):
    """A panel for each quantity that the log holds. log: the rows of a log.jsonl, with "step".

    Where there are many steps: all values thin, their running mean thick. Returns False, and writes
    nothing, if there is nothing to show.
    """
    found = dict.fromkeys(key for row in log for key in row)  # a set that keeps the order
    panels = {key: title for key, title in PANELS.items() if key in found}
    for key in found:
        if key.startswith("loss"):
            panels.setdefault(key, key)
    if not panels:
        return False
    n_columns = min(2, len(panels))
    n_rows = math.ceil(len(panels) / n_columns)
    figure = new_figure(440 * n_columns, 210 * n_rows, layout="constrained")
    for place, (key, title) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(n_rows, n_columns, place)
        rows = [row for row in log if key in row]  # warm-up steps have no unlearning loss
        steps = [row["step"] for row in rows]
        values = [row[key] for row in rows]
        plot_curve(axes, steps, values)
        if key in REFERENCES:
            axes.axhline(REFERENCES[key], color="gray", linestyle=":")
        axes.locator_params("x", integer=True)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8)
    save(figure, path)
    return True


def plot_curve(axes, steps, values):
    """One curve, and its running mean over a 20th of it where that is ten values or more."""
    window = len(values) // 20
    smooth = window >= 10
    opacity = 0.25 if smooth else 1
    axes.plot(steps, values, color=COLOURS[2], alpha=opacity)
    if smooth:
        weights = np.ones(window) / window
        means = np.convolve(values, weights, mode="valid")
        axes.plot(steps[window - 1 :], means, color=COLOURS[2])


def trade_off(points, x_label, y_label, path, threshold=None):
    """Two metrics of several methods against each other.

    points: [(label, group, [(x, y) of each seed])]. A large marker is the mean over seeds, small
    ones are the seeds. Colours tell labels, and marker shapes groups; if all labels are the same,
    colours tell groups. Points of one label and group are a method at several strengths: a line
    joins them. threshold: a vertical line at this x.
    """
    if len({label for label, _, _ in points}) == 1:
        points = [(group or label, "", seeds) for label, group, seeds in points]
    colours = assign([label for label, _, _ in points], COLOURS)
    markers = assign([group for _, group, _ in points], MARKERS)
    figure = new_figure(640, 400, layout="constrained")
    axes = figure.subplots()
    if threshold is not None:
        axes.axvline(threshold, color="red", linewidth=1, linestyle="--")
    for label, group, seeds in points:
        xs, ys = zip(*seeds, strict=True)
        style = {"color": colours[label], "marker": markers[group], "linestyle": ""}
        if len(seeds) > 1:
            axes.plot(xs, ys, markersize=3.5, alpha=0.6, **style)
        axes.plot(mean(xs), mean(ys), markersize=8, **style)
    add_curves(axes, points, colours)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    add_legend(axes, colours, markers)
    save(figure, path)


def add_curves(axes, points, colours):
    """A line through the means of the points of one label and group, from left to right."""
    curves = {}
    for label, group, seeds in points:
        xs, ys = zip(*seeds, strict=True)
        curve = curves.setdefault((label, group), [])
        curve.append((mean(xs), mean(ys)))
    for (label, _), curve in curves.items():
        curve.sort()
        xs, ys = zip(*curve, strict=True)
        colour = colours[label]
        axes.plot(xs, ys, color=colour)


def assign(names, values):
    """{name: value}, in order of appearance; values are used again if there are more names."""
    return dict(zip(dict.fromkeys(names), cycle(values), strict=False))


def add_legend(axes, colours, markers):
    """Beside the axes: the labels in their colours, then the groups in their marker shapes."""
    from matplotlib.lines import Line2D

    first = next(iter(markers.values()), "o")
    styles = [(label, colour, first) for label, colour in colours.items()]
    if len(markers) > 1:
        styles += [(group, "gray", marker) for group, marker in markers.items()]
    handles = []
    for label, colour, marker in styles:
        # A line without points and without a line: what is left is its marker
        style = {"color": colour, "marker": marker, "linestyle": ""}
        handles.append(Line2D([], [], label=label, **style))
    if handles:
        place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)}
        axes.legend(handles=handles, fontsize=8, frameon=False, **place)
