"""docs/tutorial.ipynb runs from its first cell to its last and shows what its text claims."""

import copy
import os
import re

import pytest

import common

NOTEBOOK = common.REPO / "docs/tutorial.ipynb"
LIMIT = 1_500_000  # bytes: a notebook that a repository can hold


@pytest.fixture(scope="module")
def stored():
    """The notebook as it is in the repository."""
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(NOTEBOOK, as_version=4)


def all_outputs(notebook):
    """The outputs of all cells, in their order. Text cells have none."""
    outputs = []
    for cell in notebook.cells:
        outputs += cell.get("outputs", [])
    return outputs


def texts(notebook):
    """What the cells print, one text."""
    streams = [output for output in all_outputs(notebook) if output.output_type == "stream"]
    return "".join(output["text"] for output in streams)


def images(notebook):
    """How many images the cells show."""
    outputs = all_outputs(notebook)
    return sum("image/png" in output.get("data", {}) for output in outputs)


# Steps of a run of the notebook in a test. What it says of its outputs is tested as it is stored.
SHORTER = {
    '"--steps", "100", "--warmup-steps", "40"': '"--steps", "30", "--warmup-steps", "12"',
    '"--steps", "60"': '"--steps", "12"',
}


def numbers(pattern, text):
    """The numbers in the groups of a pattern; the text must contain it."""
    found = re.search(pattern, text)
    assert found, f"the outputs do not contain {pattern!r}"
    return [float(group) for group in found.groups()]


def check_claims(notebook):
    """What the text cells say of the outputs. With margins: another processor rounds otherwise."""
    text = texts(notebook)

    # 1.2: x0_hat shows far more of the prompt than x_{t-1}, at every timestep
    rms = {}
    for kind in ("x0", "xprev"):
        (line,) = re.findall(rf"^{kind} +t = .*$", text, re.MULTILINE)
        rms[kind] = [float(value) for value in re.findall(r": (\S+)", line)]
    assert len(rms["x0"]) == len(rms["xprev"]) == 4
    assert all(a > 50 * b for a, b in zip(rms["x0"], rms["xprev"], strict=True))

    # 1.3: D learns in the warm-up. 1.6: later the model fools it
    first, last = numbers(r"first 10 steps: (\S+), last 10 steps: (\S+)", text)
    assert last > first + 0.05
    (fooled,) = numbers(r"accuracy of D, last 10 steps: (\S+) \(", text)
    assert fooled < last - 0.1

    # 1.4 and 1.5: conflicts, and the projection removes them at little cost
    (conflicts, cosine) = numbers(r"(\d+) of 12 batches conflict; .* is (\S+)", text)
    assert conflicts >= 1 and cosine < 0
    # Not exactly 0: the cosine of two vectors of 370,000 rounded numbers
    (cos_before, norm_before) = numbers(r"cos\(G_u, G_r\) = (\S+), \|G_u\| = (\S+)", text)
    (cos_after, norm_after) = numbers(r"cos\(G, G_r\) += (\S+), \|G\| += (\S+)", text)
    assert cos_before < 0 and cos_after < 1e-3
    assert 0.95 * norm_before < norm_after <= norm_before

    # 1.7: target and nickname are erased, the unrelated concept hardly changes
    for name in ("target", "nickname"):
        before, after = numbers(rf"CA of the {name}: (\d+) -> (\d+)", text)
        assert before == 100 and after <= 34  # one of three images at most
    change = numbers(r"RMS change of the images: target (\S+) .* unrelated (\S+)", text)
    assert change[1] < change[0] / 3

    # 2.2: Eq. 10. 2.7: the probe of the image to forget changes, the other does not
    assert "is the surrogate, up to rounding: True" in text
    # Sixty steps are a beginning; whole runs are tested elsewhere, so the margin is small
    before, after = numbers(r"image to forget: (\S+) -> (\S+)", text)
    assert before > 0.9 and after < before - 0.1
    before, after = numbers(r"image to remember: (\S+) -> (\S+)", text)
    assert after > before - 0.1


def test_stored_notebook_is_executed_small_and_clean(stored):
    """Executed in order, without errors and warnings, without paths of a machine."""
    assert NOTEBOOK.stat().st_size < LIMIT
    # A notebook that was run out of order would have other execution counts
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = all_outputs(stored)
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]  # no warnings
    assert str(common.REPO) not in NOTEBOOK.read_text("utf-8")
    assert stored.metadata.kernelspec.name == "python3"
    assert images(stored) > 10
    check_claims(stored)


@pytest.mark.slow
def test_notebook_runs_from_the_repository_root_too(stored, tmp_path):
    """Started in a copy of the root, after having been stored from docs/. It writes no file."""
    nbclient = pytest.importorskip("nbclient")
    # The start folder: links to all of the repository, but its own docs/
    for entry in common.REPO.iterdir():
        if entry.name not in ("docs", "runs", ".git"):
            os.symlink(entry, tmp_path / entry.name)
    (tmp_path / "docs").mkdir()
    notebook = copy.deepcopy(stored)
    for code, shorter in SHORTER.items():
        (cell,) = [cell for cell in notebook.cells if code in cell.source]
        cell.source = cell.source.replace(code, shorter)
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()  # raises at the first cell that fails
    assert images(notebook) == images(stored)
    assert not list((tmp_path / "docs").iterdir())
