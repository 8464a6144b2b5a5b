"""Why a surrogate disturbs a model less than deletion: the theorems of "Unlearning the Unpromptable" (Lee et al.), runnable.

Ridge regression, theta* = argmin |X theta - y|^2 / 2 + lam |theta|^2 / 2, with one row (x_i, y_i) to be unlearned:

    Theorem 1    delete the row                          theta~ - theta*, Eq. 18
    Theorem 2    replace it by a surrogate (x', y')      theta+ - theta*, Eq. 31 with its sign mended (see below)
    Corollary 3  x' = x_i: how much further deletion moves theta than the surrogate does, Eq. 47

    python theory.py        # checks the closed forms against refitting from scratch, and draws the paper's Fig. 4

Erratum: Eq. 31 and 46 print (x_i - x') y'; Eq. 41, from which they come, has r y' with r = x' - x_i. The latter holds.
"""

import argparse
import os
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont


def fit(X, y, lam):
    """Eq. 16: theta* = A^-1 X^T y with A = X^T X + lam I (Eq. 15). X (n, d), y (n,) -> (d,)."""
    return torch.linalg.solve(gram(X, lam), X.T @ y)


def gram(X, lam):
    """Eq. 15: A = X^T X + lam I, (d, d)."""
    return X.T @ X + lam * torch.eye(X.shape[1], dtype=X.dtype)


def shift_of_deletion(X, y, lam, i):
    """Theorem 1, Eq. 18: theta~ - theta* when row i is deleted, (d,), without refitting. Known as leave-one-out."""
    x = X[i]
    direction = torch.linalg.solve(gram(X, lam), x)  # A^-1 x_i
    return (x @ fit(X, y, lam) - y[i]) / (1 - x @ direction) * direction


def shift_of_surrogate(X, y, lam, i, x_new, y_new):
    """Theorem 2: theta+ - theta* when row i becomes (x_new, y_new), (d,). Eq. 45, with B of Eq. 42."""
    r, s = x_new - X[i], y_new - y[i]  # Eq. 34
    M = torch.outer(X[i], r) + torch.outer(r, X[i]) + torch.outer(r, r)  # Eq. 32
    B = X[i] * s + r * y_new  # Eq. 42; Eq. 46 prints -r y_new
    return torch.linalg.solve(gram(X, lam) + M, X.T @ y + B) - fit(X, y, lam)


def ratio(X, y, lam, i, y_new):
    """Corollary 3, Eq. 47: |theta~ - theta*| / |theta+ - theta*| for a surrogate (x_i, y_new). Above 1, the surrogate wins."""
    x = X[i]
    leverage = x @ torch.linalg.solve(gram(X, lam), x)  # in [0, 1)
    return (x @ fit(X, y, lam) - y[i]).abs() / ((y_new - y[i]).abs() * (1 - leverage))


def problem(seed, n=12, d=4):
    """A random ridge problem in float64 with a row to unlearn and its surrogate: X, y, lam, i, x', y'."""
    g = torch.Generator().manual_seed(seed)
    X, y, new = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((n, d), (n,), (d + 1,)))
    i = int(torch.randint(n, (1,), generator=g))
    lam = float(torch.rand(1, generator=g)) + 0.01
    return X, y, lam, i, X[i] + 0.3 * new[:d], y[i] + new[d]


def check(n=200):
    """Largest differences between the closed forms and refitting from scratch, over n random problems."""
    worst = dict.fromkeys(("Theorem 1", "Theorem 2", "Corollary 3", "Eq. 46 as printed"), 0.0)
    for seed in range(n):
        X, y, lam, i, x_new, y_new = problem(seed)
        keep = torch.arange(len(X)) != i
        theta, deleted = fit(X, y, lam), fit(X[keep], y[keep], lam)
        X_new, y_all = X.clone(), y.clone()
        X_new[i], y_all[i] = x_new, y_new
        replaced, same_x = fit(X_new, y_all, lam), fit(X, y_all, lam)
        M = X_new.T @ X_new - X.T @ X
        printed = torch.linalg.solve(gram(X, lam) + M, X.T @ y + X[i] * (y_new - y[i]) + (X[i] - x_new) * y_new) - theta
        differences = (
            (shift_of_deletion(X, y, lam, i) - (deleted - theta)).abs().max(),
            (shift_of_surrogate(X, y, lam, i, x_new, y_new) - (replaced - theta)).abs().max(),
            (ratio(X, y, lam, i, y_new) - (deleted - theta).norm() / (same_x - theta).norm()).abs(),
            (printed - (replaced - theta)).abs().max(),
        )
        worst = {name: max(w, d.item()) for (name, w), d in zip(worst.items(), differences, strict=True)}
    return worst


def draw_figure(path):
    """The paper's Fig. 4: a line through points; one point deleted, or replaced by a surrogate with another y."""
    g = torch.Generator().manual_seed(1)
    x = torch.linspace(0.2, 3, 9, dtype=torch.float64)
    y = 0.9 * x + 0.25 * torch.randn(9, generator=g, dtype=torch.float64)
    i, lam = 8, 0.1
    y[i] = 0.6  # the point to unlearn, far below the line
    y_new = torch.tensor(1.1, dtype=torch.float64)
    X = x[:, None]
    theta, deleted = fit(X, y, lam), shift_of_deletion(X, y, lam, i)
    replaced = shift_of_surrogate(X, y, lam, i, X[i], y_new)
    w, h, left, bottom, font = 560, 380, 50, 360, ImageFont.load_default(size=14)
    image = Image.new("RGB", (w, h), "white")
    pen = ImageDraw.Draw(image)
    at = lambda u, v: (left + 145 * float(u), bottom - 110 * float(v))  # noqa: E731
    pen.line([at(0, 3), at(0, 0), at(3.4, 0)], fill="gray")
    for label, slope, colour, row in (
        ("theta*: all points", theta, "black", 0),
        (f"deleted: {deleted.item():+.3f}", theta + deleted, "firebrick", 1),
        (f"surrogate: {replaced.item():+.3f}", theta + replaced, "royalblue", 2),
    ):
        pen.line([at(0, 0), at(3.2, 3.2 * slope.item())], fill=colour, width=3)
        pen.text((left + 20, 14 + 22 * row), label, fill=colour, font=font)
    for k in range(len(x)):
        cx, cy = at(x[k], y[k])
        pen.ellipse((cx - 5, cy - 5, cx + 5, cy + 5), fill="firebrick" if k == i else "black")
    cx, cy = at(x[i], y_new)
    pen.rectangle((cx - 5, cy - 5, cx + 5, cy + 5), fill="royalblue")
    pen.text((cx - 78, cy - 9), "surrogate", fill="royalblue", font=font)
    pen.text((at(x[i], y[i])[0] - 78, at(x[i], y[i])[1] - 9), "to unlearn", fill="firebrick", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(f"{path}.tmp", "png")
    os.replace(f"{path}.tmp", path)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("runs/theory.png"), help="where the picture goes")
    args = p.parse_args()
    print("largest difference from refitting, 200 random problems, float64:")
    for name, value in check().items():
        print(f"  {name:18} {value:.1e}")
    draw_figure(args.out)
    print(f"picture: {args.out}")
