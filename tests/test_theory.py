"""theory.py: the closed forms against refitting from scratch, and the figure's claim."""

import torch

import theory


def test_closed_forms_agree_with_refitting():
    worst = theory.check(100)
    assert max(worst[name] for name in ("Theorem 1", "Theorem 2", "Corollary 3")) < 1e-10
    assert worst["Eq. 46 as printed"] > 0.1  # the sign in the paper does not hold


def test_corollary_by_hand():
    """One feature, no ridge: X = (1, 2), y = (1, 0), theta* = 1/5. Deleting row 1 leaves theta = 0, y_1 = 1/2 leaves 1/10."""
    X, y = torch.tensor([[1.0], [2.0]], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(theory.fit(X, y, 0), torch.tensor([0.2], dtype=torch.float64))
    torch.testing.assert_close(theory.shift_of_deletion(X, y, 0, 0), torch.tensor([-0.2], dtype=torch.float64))
    shift = theory.shift_of_surrogate(X, y, 0, 0, X[0], torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close(shift, torch.tensor([-0.1], dtype=torch.float64))
    assert abs(theory.ratio(X, y, 0, 0, torch.tensor(0.5, dtype=torch.float64)) - 2) < 1e-12


def test_figure_is_drawn(tmp_path):
    theory.draw_figure(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 2000
