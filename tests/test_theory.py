"""experiments/theory.py: the closed forms against refitting, and the figure's claim."""

import torch

from experiments import theory


def test_closed_forms_agree_with_refitting():
    """To rounding, over 100 random problems; the paper's Eq. 46 as printed does not."""
    worst = theory.check(100)
    assert max(worst[name] for name in ("Theorem 1", "Theorem 2", "Corollary 3")) < 1e-10
    assert worst["Eq. 46 as printed"] > 0.1


def test_corollary_by_hand():
    """One feature, no ridge: X = (1, 2), y = (1, 0), so theta* = 1/5.

    Deleting row 1 leaves theta = 0; its surrogate y_1 = 1/2 leaves 1/10: half the shift.
    """
    X = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    y = torch.tensor([1.0, 0.0], dtype=torch.float64)
    y_new = torch.tensor(0.5, dtype=torch.float64)

    def expect(actual, value):
        torch.testing.assert_close(actual, torch.tensor([value], dtype=torch.float64))

    expect(theory.fit(X, y, 0), 0.2)
    expect(theory.shift_of_deletion(X, y, 0, 0), -0.2)
    expect(theory.shift_of_surrogate(X, y, 0, 0, X[0], y_new), -0.1)
    assert abs(theory.ratio(X, y, 0, 0, y_new) - 2) < 1e-12


def test_figure_is_written(tmp_path):
    """Also into a folder that does not exist yet, and nothing else is left there."""
    theory.plot_shifts(tmp_path / "new" / "figure.png")
    (figure,) = (tmp_path / "new").iterdir()
    assert figure.name == "figure.png" and figure.stat().st_size > 2000


def test_command(tmp_path, capsys):
    """The command prints a difference per theorem and the path of the figure."""
    theory.main(theory.parse_args(["--out", str(tmp_path / "figure.png")]))
    printed = capsys.readouterr().out
    assert "Theorem 1" in printed and f"figure: {tmp_path / 'figure.png'}" in printed
