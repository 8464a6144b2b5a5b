"""DoCo pasted into a project of one's own: section 1 of doco.py and two files, in an empty folder.

doco.py promises that this needs torch alone. Here a stranger's project does it, in a process that
sees nothing of this repository and cannot import diffusers.
"""

import json
import subprocess
import sys
import textwrap

import pytest

import common
import gradsurgery

IMPORTS = """
from collections import namedtuple

import torch
import torch.nn.functional as F

from discriminator import patchgan
from gradsurgery import flat_grad, flatten, is_sharded, lambda_projection, norm, write_grad
"""

# A network of the stranger's own: what it is given as a condition is its own business, too.
TRAINING = """
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = torch.nn.Conv2d(4, 8, 3, padding=1)
        self.prompt = torch.nn.Embedding(2, 8)
        self.conv_out = torch.nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, xt, t, condition):
        h = self.conv_in(xt) + self.prompt(condition)[:, :, None, None]
        return self.conv_out(F.silu(h)) * (1 + t.view(-1, 1, 1, 1) / 1000)


torch.manual_seed(0)
net, disc = Net(), patchgan(8)
params = list(net.requires_grad_(False).prompt.requires_grad_().parameters())
originals = [p.detach().clone() for p in params]
d_before = flatten(disc.parameters())
rest_before = flatten([*net.conv_in.parameters(), *net.conv_out.parameters()])
optimizer = torch.optim.AdamW(params, lr=1e-2)
opt_disc = torch.optim.Adam(disc.parameters(), lr=1e-3)
alpha_bar = torch.linspace(0.9999, 0.005, 1000)
anchor, target = torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.long)


def predict_original(xt, t, condition):
    swap_weights(params, originals)
    eps = net(xt, t, condition)
    swap_weights(params, originals)
    return eps


rows = []
for step in range(6):
    train_model = step >= 2
    x0, noise, x0_r, noise_r = torch.randn(4, 2, 4, 8, 8)
    t, t_r = torch.randint(1000, (2, 2))
    batch_f = ForgetBatch(x0, noise, t, anchor, target, None)
    update = doco_step(
        net,
        predict_original,
        disc,
        params,
        alpha_bar,
        [(batch_f, RetainBatch(x0_r, noise_r, t_r, anchor))],
        train_model=train_model,
    )
    before = flatten(params)
    if train_model:
        optimizer_step(optimizer, params, update.g, update.g_r)
    write_grad(disc.parameters(), update.g_d)
    opt_disc.step()
    moved = (flatten(params) - before).norm()
    rows.append({name: float(value) for name, value in update.stats.items()})
    rows[-1]["moved"] = float(moved)

rest = flatten([*net.conv_in.parameters(), *net.conv_out.parameters()])
moved_d = float((flatten(disc.parameters()) - d_before).norm())
print(json.dumps({"rows": rows, "moved_d": moved_d, "rest": torch.equal(rest, rest_before)}))
"""

# -I: neither the current folder, nor PYTHONPATH, nor the user's packages are looked at.
ISOLATED = """
import json, sys
for name in ("diffusers", "transformers", "peft", "safetensors", "PIL"):
    sys.modules[name] = None  # importing it fails
sys.path.insert(0, sys.argv[1])
import pasted
names = [name for name in ("common", "backbones", "doco") if name in sys.modules]
assert not names, names
"""


def run_isolated(folder):
    """What pasted.py in a folder prints, in a process that has torch and the folder alone."""
    command = [sys.executable, "-I", "-c", ISOLATED, str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def copy_files(folder, *names):
    """Copies files of the repository's root."""
    for name in names:
        (folder / name).write_text((common.REPO / name).read_text())


def section_1(file="doco.py"):
    """Section 1 of a file: from its rule to that of section 2."""
    source = (common.REPO / file).read_text()
    return source[source.index("# ---- 1.") : source.index("# ---- 2.")]


def test_doco_step_trains_with_torch_alone(tmp_path):
    """Both sections 1 with their imports: the warm-up trains D alone, then both move."""
    copy_files(tmp_path, "gradsurgery.py", "discriminator.py")
    sections = f"{section_1('backbones.py')}\n\n{section_1()}"
    pasted = f"import json\n{IMPORTS}\n\n{sections}\n\n{TRAINING}"
    (tmp_path / "pasted.py").write_text(pasted)
    result = json.loads(run_isolated(tmp_path))
    rows = result["rows"]
    finite = [value == value and abs(value) < 1e3 for row in rows for value in row.values()]
    assert all(finite), rows
    assert [row["moved"] > 0 for row in rows] == [False, False, True, True, True, True]
    assert result["moved_d"] > 0 and result["rest"]
    assert {"loss_u", "loss_r", "loss_d", "cos"} <= rows[-1].keys()


def training_loop_of_the_docstring():
    """The three-line diff in gradsurgery.py's docstring as Python, its minus line left out."""
    text = gradsurgery.__doc__
    start = text.index("      optimizer.zero_grad()")
    block = text[start : text.index("\n\n", start)]
    assert block.count("\n    + ") == 3 and block.count("\n    - ") == 1, block
    lines = [line[6:] for line in block.splitlines() if not line.startswith("    - ")]
    return "\n".join(lines)


@pytest.mark.slow
def test_gradsurgery_alone_trains_by_its_docstring(tmp_path):
    """One file, and the lines of its docstring: loss_f falls, and loss_r does not rise."""
    copy_files(tmp_path, "gradsurgery.py")
    loop = textwrap.indent(training_loop_of_the_docstring(), "    ")
    head = """
        import torch
        from gradsurgery import flat_grad, lambda_projection, write_grad

        torch.manual_seed(0)
        x, y, x_f, y_f = torch.randn(4, 16, 4)
        net = torch.nn.Linear(4, 4)
        params = list(net.parameters())
        optimizer = torch.optim.SGD(params, lr=1e-3)
        losses = []
        for _ in range(5):
            loss_r = (net(x) - y).square().mean()
            loss_f = -(net(x_f) - y_f).square().mean()
            losses.append((loss_f.item(), loss_r.item()))
    """
    tail = "\nprint(json.dumps(losses))\n"
    (tmp_path / "pasted.py").write_text("import json\n" + textwrap.dedent(head) + loop + tail)
    losses = json.loads(run_isolated(tmp_path))
    forget, retain = zip(*losses, strict=True)
    assert all(a > b for a, b in zip(forget, forget[1:], strict=False)), forget
    assert retain[-1] < retain[0] + 1e-4, retain


def test_the_two_files_import_torch_alone():
    for name in ("gradsurgery.py", "discriminator.py"):
        lines = (common.REPO / name).read_text().splitlines()
        imports = [line for line in lines if line.startswith(("import ", "from "))]
        assert imports and all(line.split()[1].startswith("torch") for line in imports), imports
