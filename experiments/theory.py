"""Why a surrogate disturbs a model less than deletion: the theorems of Lee et al., runnable.

"Unlearning the Unpromptable" explains the surrogate by ridge regression,

    theta* = argmin |X theta - y|^2 / 2 + lam |theta|^2 / 2,

with one row (x_i, y_i) to be unlearned:

    Theorem 1    delete the row                       theta~ - theta*, Eq. 18
    Theorem 2    replace it by a surrogate (x', y')   theta+ - theta*, Eq. 31, sign corrected
    Corollary 3  x' = x_i: the ratio of the lengths of the two shifts, Eq. 47

    python -m experiments.theory      # seconds on one core

The command compares the closed forms with refitting from scratch and plots the paper's Fig. 4.

Letters: n rows, d features; X (n, d), y (n,), theta (d,); lam >= 0 is a number, i a row. All
tensors are float64: the differences are then of the order of rounding.

Erratum: Eq. 31 and 46 print (x_i - x') y'. Eq. 41, from which they come, has r y' with
r = x' - x_i. The latter holds, and check() measures both.
"""

import argparse
import os
from collections import namedtuple
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import float64, outer
from torch.linalg import solve

from common import fail

# ---- 1. closed forms ----------------------------------------------------------------------------


def gram(X, lam):
    """Eq. 15: A = X^T X + lam I, (d, d)."""
    return X.T @ X + lam * torch.eye(X.shape[1], dtype=X.dtype)


def fit(X, y, lam):
    """Eq. 16: theta* = A^-1 X^T y, (d,)."""
    A = gram(X, lam)
    return solve(A, X.T @ y)


def shift_of_deletion(X, y, lam, i):
    """Theorem 1, Eq. 18: theta~ - theta* when row i is deleted, (d,), without refitting.

    Statistics knows it as the leave-one-out formula.
    """
    x = X[i]
    theta = fit(X, y, lam)
    direction = solve(gram(X, lam), x)  # A^-1 x_i, (d,)
    leverage = x @ direction  # how much of its own prediction a row determines, in [0, 1)
    residual = x @ theta - y[i]
    return residual / (1 - leverage) * direction


def shift_of_surrogate(X, y, lam, i, x_new, y_new):
    """Theorem 2: theta+ - theta* when row i becomes (x_new, y_new), (d,). Eq. 45, B of Eq. 42."""
    r = x_new - X[i]  # Eq. 34
    s = y_new - y[i]  # Eq. 34
    cross = outer(X[i], r)  # (d, d)
    M = cross + cross.T + outer(r, r)  # Eq. 32, (d, d): the change of X^T X
    B = X[i] * s + r * y_new  # Eq. 42, (d,): the change of X^T y; Eq. 46 prints -r y_new
    theta_plus = solve(gram(X, lam) + M, X.T @ y + B)
    return theta_plus - fit(X, y, lam)


def ratio(X, y, lam, i, y_new):
    """Corollary 3, Eq. 47: |theta~ - theta*| / |theta+ - theta*| for a surrogate (x_i, y_new).

    Above 1, the surrogate moves theta less than deletion does.
    """
    x = X[i]
    theta = fit(X, y, lam)
    leverage = x @ solve(gram(X, lam), x)
    residual = (x @ theta - y[i]).abs()
    distance = (y_new - y[i]).abs()
    return residual / (distance * (1 - leverage))


# ---- 2. against refitting -----------------------------------------------------------------------

# A ridge problem with a row to unlearn and its surrogate; the arguments of shift_of_surrogate.
Problem = namedtuple("Problem", "X y lam i x_new y_new")


def random_problem(seed, n=12, d=4):
    """A Problem of n rows and d features; the surrogate lies near the row that it replaces."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=g, dtype=float64)
    y = torch.randn(n, generator=g, dtype=float64)
    new = torch.randn(d + 1, generator=g, dtype=float64)
    i = int(torch.randint(n, (1,), generator=g))
    lam = float(torch.rand(1, generator=g)) + 0.01
    x_new = X[i] + 0.3 * new[:d]
    y_new = y[i] + new[d]
    return Problem(X, y, lam, i, x_new, y_new)


def shift_by_refitting(problem, X, y):
    """The difference between the solution on the rows X, y and that on the problem's, (d,)."""
    theta = fit(problem.X, problem.y, problem.lam)
    return fit(X, y, problem.lam) - theta


def shift_as_printed(problem, X_new):
    """theta+ - theta* by Eq. 46 as the paper prints it, with the sign that does not hold, (d,)."""
    X, y, lam, i, x_new, y_new = problem
    M = X_new.T @ X_new - X.T @ X
    B = X[i] * (y_new - y[i]) + (X[i] - x_new) * y_new
    theta_plus = solve(gram(X, lam) + M, X.T @ y + B)
    return theta_plus - fit(X, y, lam)


def differences(problem):
    """{name: largest difference between a closed form and refitting from scratch}, of a Problem."""
    X, y, lam, i, x_new, y_new = problem
    others = torch.arange(len(X)) != i
    X_new, y_all = X.clone(), y.clone()
    X_new[i] = x_new
    y_all[i] = y_new
    deleted = shift_by_refitting(problem, X[others], y[others])
    replaced = shift_by_refitting(problem, X_new, y_all)
    same_x = shift_by_refitting(problem, X, y_all)

    theorem_1 = shift_of_deletion(X, y, lam, i)
    theorem_2 = shift_of_surrogate(*problem)
    corollary_3 = ratio(X, y, lam, i, y_new)
    printed = shift_as_printed(problem, X_new)
    errors = {
        "Theorem 1": theorem_1 - deleted,
        "Theorem 2": theorem_2 - replaced,
        "Corollary 3": corollary_3 - deleted.norm() / same_x.norm(),
        "Eq. 46 as printed": printed - replaced,
    }
    return {name: error.abs().max().item() for name, error in errors.items()}


def check(n=200):
    """The largest of differences() over n random problems, by name."""
    every = [differences(random_problem(seed)) for seed in range(n)]
    return {name: max(d[name] for d in every) for name in every[0]}


# ---- 3. figure ----------------------------------------------------------------------------------


def plot_shifts(path):
    """The paper's Fig. 4: a line through points; one is deleted, or replaced by a surrogate."""
    g = torch.Generator().manual_seed(1)
    x = torch.linspace(0.2, 3, 9, dtype=float64)
    noise = torch.randn(9, generator=g, dtype=float64)
    y = 0.9 * x + 0.25 * noise
    X = x[:, None]  # one feature, no intercept: all lines pass through the origin
    i, lam = 8, 0.1
    y[i] = 0.6  # the point to unlearn, far below the line
    y_new = torch.tensor(1.1, dtype=float64)  # its surrogate: the same x, another y
    theta = fit(X, y, lam)
    deletion = shift_of_deletion(X, y, lam, i)
    surrogate = shift_of_surrogate(X, y, lam, i, X[i], y_new)

    # Figure, not pyplot: no window, no display needed, no global state
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axes = figure.subplots()
    red, blue = "firebrick", "royalblue"

    def line(slope, colour, label):
        """y = slope x, through all of the figure."""
        axes.axline((0, 0), slope=slope.item(), color=colour, linewidth=2, label=label)

    line(theta, "black", "theta*: all points")
    line(theta + deletion, red, f"deleted: {deletion.item():+.3f}")
    line(theta + surrogate, blue, f"surrogate: {surrogate.item():+.3f}")
    axes.plot(x, y, "o", color="black")
    axes.plot(x[i], y[i], "o", color=red)
    axes.plot(x[i], y_new, "s", color=blue)
    axes.text(2.92, y[i], "to unlearn", color=red, ha="right", va="center")
    axes.text(2.92, y_new, "surrogate", color=blue, ha="right", va="center")
    axes.set_xlim(0, 3.4)
    axes.set_ylim(0, 3.2)
    axes.set_xlabel("x")
    axes.set_ylabel("y")
    axes.legend(loc="upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(f"{path}.tmp", format="png", dpi=110, metadata={"Software": None})
        os.replace(f"{path}.tmp", path)
    except OSError as e:
        fail(f"--out {path} cannot be written: {e.strerror}")


def parse_args(argv=None):
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m experiments.theory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("runs/theory.png"),
        help="file of the figure (default: %(default)s)",
    )
    return p.parse_args(argv)


def main(args):
    """Prints the largest differences from refitting and writes the figure."""
    print("largest difference from refitting, 200 random problems, float64:")
    for name, value in check().items():
        print(f"  {name:18} {value:.1e}")
    plot_shifts(args.out)
    print(f"figure: {args.out}")


if __name__ == "__main__":
    main(parse_args())
