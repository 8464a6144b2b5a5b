"""gradsurgery.py: properties of the projections, an independent oracle, several processes."""

import shutil
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as mp

import gradsurgery
from gradsurgery import (
    flat_grad,
    forget_only,
    lambda_projection,
    normalized_sum,
    null_space,
    orthograd,
    project_update,
    write_grad,
)


def pair(cos, n=1000, norm_f=1.0, norm_r=1.0, seed=0):
    """Two vectors (n,), g_f and g_r, with a given cosine and given lengths."""
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, 2, generator=g, dtype=torch.float64))
    along, across = q.T  # orthonormal
    sin = (1 - cos**2) ** 0.5
    g_f = norm_f * (cos * along + sin * across)
    return g_f.float(), (norm_r * along).float()


def cosine(a, b):
    """The cosine of two vectors, in double precision."""
    a, b = a.double(), b.double()
    return (torch.dot(a, b) / a.norm() / b.norm()).item()


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("cos", [-0.99, -0.5, -0.01])
def test_conflict_is_projected_out_at_every_scale_of_the_retain_gradient(cos, scale):
    """An epsilon beside |g_r|^2, as other code has, leaves most of the conflict at 1e-6."""
    g_f, g_r = pair(cos, norm_r=scale)
    g, stats = lambda_projection(g_f, g_r)
    assert abs(cosine(g, g_r)) < 1e-4
    assert stats["conflict"].item() == 1
    assert stats["cos"].item() == pytest.approx(cos, abs=1e-5)
    assert stats["norm_f"].item() == pytest.approx(1, rel=1e-5)
    assert stats["norm_r"].item() == pytest.approx(scale, rel=1e-5)


def test_agreeing_gradients_stay_as_they_are():
    """Without a conflict there is nothing to project out."""
    g_f, g_r = pair(0.3)
    g, stats = lambda_projection(g_f, g_r)
    assert torch.equal(g, g_f)
    assert stats["conflict"].item() == 0


def test_lambda_scales_the_projection():
    """The inner product that is left is (1 - lam) times the original one."""
    g_f, g_r = pair(-0.6, norm_r=3)
    unchanged, _ = lambda_projection(g_f, g_r, 0.0)
    assert torch.equal(unchanged, g_f)
    for lam in (0.5, 2.0):
        g, _ = lambda_projection(g_f, g_r, lam)
        before = torch.dot(g_f, g_r).item()
        after = torch.dot(g, g_r).item()
        assert after == pytest.approx((1 - lam) * before, rel=1e-4)


def test_by_hand():
    """Two dimensions, g_r along the first: its component vanishes. DoCo's code: (0.72, 0.06)."""
    g_f = torch.tensor([-0.08, 0.06])
    g_r = torch.tensor([1.0, 0.0])
    g, _ = lambda_projection(g_f, g_r)
    torch.testing.assert_close(g, torch.tensor([0.0, 0.06]))
    g, _ = forget_only(g_f, g_r)  # the same, and g_r added
    torch.testing.assert_close(g, torch.tensor([1.0, 0.06]))


def test_oracle_nearest_vector_without_conflict():
    """Eq. 10 with lam = 1 solves min |g - g_f|^2 subject to g . g_r >= 0: dual ascent agrees."""
    g_f, g_r = pair(-0.7, n=5, norm_f=2, norm_r=0.3, seed=3)
    g_f, g_r = g_f.double(), g_r.double()
    dual = torch.zeros((), dtype=torch.float64)  # the one multiplier: g = g_f + dual * g_r
    for _ in range(2000):
        slack = torch.dot(g_f + dual * g_r, g_r)
        dual = (dual - slack).clamp(min=0)
    g, _ = lambda_projection(g_f, g_r)
    torch.testing.assert_close(g, g_f + dual * g_r, rtol=1e-9, atol=1e-9)


def test_zero_gradients_do_not_divide_by_zero():
    """A loss of zero at the first step is common, and must not make the weights NaN."""
    zero, one = torch.zeros(4), torch.ones(4)
    for g_f, g_r in ((zero, one), (one, zero), (zero, zero)):
        g, stats = lambda_projection(g_f, g_r)
        assert torch.equal(g, g_f)
        assert torch.isfinite(stats["cos"])


def test_flat_grad_equals_backward_and_leaves_grad_alone():
    """flat_grad and write_grad together do what .backward() does, bitwise."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 4),
        torch.nn.Tanh(),
        torch.nn.Linear(4, 2),
    )
    params = list(net.parameters())
    x = torch.randn(5, 3)
    flat = flat_grad(net(x).square().mean(), params)
    assert all(p.grad is None for p in params)
    write_grad(params, flat)
    ours = [p.grad.clone() for p in params]

    net.zero_grad()
    loss = net(x).square().mean()
    loss.backward()
    for g, p in zip(ours, params, strict=True):
        assert torch.equal(g, p.grad)


def test_flat_grad_unused_weight_is_zero_and_unreached_loss_is_an_error():
    """A weight may be unused; a loss without any weight is a mistake."""
    a = torch.ones(2, requires_grad=True)
    b = torch.ones(2, requires_grad=True)
    loss = (a * 3).sum()
    with pytest.raises(ValueError, match="reaches none"):
        flat_grad(loss, [b])
    with pytest.raises(ValueError, match="empty"):
        flat_grad(loss, [])
    assert flat_grad(loss, [a, b]).tolist() == [3, 3, 0, 0]  # last: frees the graph


def test_write_grad_keeps_types_and_checks_length():
    """A bfloat16 weight gets a bfloat16 gradient; torch would refuse another type."""
    p = torch.ones(3, requires_grad=True, dtype=torch.bfloat16)
    write_grad([p], torch.tensor([1.0, 2.0, 3.0]))
    assert p.grad.dtype == torch.bfloat16
    assert p.grad.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="3 numbers, the flat vector 2"):
        write_grad([p], torch.ones(2))


ALONE = """
import sys, torch, gradsurgery as g
w = torch.ones(2, requires_grad=True)
g_r = g.flat_grad(-w[0], [w])
g_f = g.flat_grad(w.sum(), [w])
g.write_grad([w], g.lambda_projection(g_f, g_r)[0])
assert w.grad.tolist() == [0, 1], w.grad
assert "diffusers" not in sys.modules
"""


@pytest.mark.slow
def test_works_alone_in_an_empty_folder(tmp_path):
    """The file is meant to be copied into other projects: it needs torch alone."""
    shutil.copy(gradsurgery.__file__, tmp_path)
    subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, check=True)


def average_on(rank, store, queue):
    """One of two processes: the gradient of its own loss, averaged over both, goes to the queue."""
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    w = torch.ones(2, requires_grad=True)
    loss = (rank + 1) * w.sum()
    queue.put(flat_grad(loss, [w]).tolist())
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_flat_grad_averages_over_processes(tmp_path):
    """Gradients 1 and 2 of two processes: both get 1.5. They meet at a file, not at a port."""
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(average_on, args=(tmp_path / "store", queue), nprocs=2)
    for _ in range(2):
        assert queue.get() == [1.5, 1.5]


def test_normalized_sum_by_hand_and_whatever_the_scale_of_the_retain_loss():
    g_f, g_r = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    torch.testing.assert_close(normalized_sum(g_f, g_r), torch.tensor([3.0, 9.0]))
    torch.testing.assert_close(normalized_sum(g_f, g_r, 0.5), torch.tensor([3.0, 6.5]))
    torch.testing.assert_close(normalized_sum(g_f, 0.01 * g_r), normalized_sum(g_f, g_r))
    assert torch.equal(normalized_sum(g_f, g_r, 0.0), g_f)


def test_normalized_sum_has_the_direction_of_ngdiff():
    g_f, g_r = pair(-0.4, norm_f=3, norm_r=0.02)
    ngdiff = g_f / g_f.norm() + g_r / g_r.norm()
    assert cosine(normalized_sum(g_f, g_r), ngdiff) == pytest.approx(1, abs=1e-6)


def test_normalized_sum_does_not_blow_up_rounding():
    """Before the first step of a distillation, g_r is 0, or as much as rounding makes of it."""
    g_f, g_r = pair(0.0, norm_r=1e-8)
    assert (normalized_sum(g_f, g_r) - g_f).norm() == pytest.approx(1e-5, rel=1e-3)
    zero = torch.zeros_like(g_f)
    assert torch.equal(normalized_sum(g_f, zero), g_f)
    assert torch.equal(normalized_sum(zero, zero), zero)
    assert torch.equal(normalized_sum(zero, g_r), zero)  # nothing to forget: nothing to weigh


def test_orthograd_is_the_residual_of_least_squares():
    g = torch.Generator().manual_seed(0)
    g_f, g_rs = torch.randn(20, 1, generator=g).double(), torch.randn(20, 3, generator=g).double()
    coefficients = torch.linalg.lstsq(g_rs, g_f).solution
    expected = (g_f - g_rs @ coefficients)[:, 0]
    torch.testing.assert_close(orthograd(g_f[:, 0], g_rs), expected)
    # Two at once, not one after the other: what the second takes off brings back the first
    assert (g_rs.T @ orthograd(g_f[:, 0], g_rs)).abs().max() < 1e-12


def test_orthograd_with_one_gradient_projects_and_with_dependent_ones_takes_off_no_more():
    g_f, g_r = pair(-0.6, norm_r=7)
    one = orthograd(g_f, g_r[:, None])
    torch.testing.assert_close(one, lambda_projection(g_f, g_r)[0], rtol=1e-4, atol=1e-6)
    thrice = torch.stack([g_r, -2 * g_r, torch.zeros_like(g_r)], dim=1)  # of rank one
    torch.testing.assert_close(orthograd(g_f, thrice), one, rtol=1e-4, atol=1e-6)
    # Dependent and zero columns in front of another one, and of other lengths
    a, b = torch.randn(2, 1000, generator=torch.Generator().manual_seed(1))
    for columns in ([a, 3 * a, 1e-8 * b], [torch.zeros_like(a), a, b], [b, a, a + b]):
        g = orthograd(g_f, torch.stack(columns, dim=1))
        assert abs(cosine(g, a)) < 1e-5 and abs(cosine(g, b)) < 1e-5
    assert orthograd(g_f[:2], torch.randn(2, 5)).norm() < 1e-5  # more gradients than weights


def test_null_space_by_hand_and_by_an_svd():
    # Lengths 3, 2 and 1 along the first three of four axes: energies 9, 4 and 1 of 14
    x = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))
    free = {1.0: [0, 0, 0, 1], 0.93: [0, 0, 0, 1], 0.92: [0, 0, 1, 1], 0.64: [0, 1, 1, 1]}
    for energy, diagonal in free.items():
        torch.testing.assert_close(null_space(x, energy), torch.diag(torch.tensor(diagonal) * 1.0))

    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)).double()
    _, s, v = torch.linalg.svd(x)
    share = s.square().cumsum(0) / s.square().sum()
    kept = int((share < 0.7).sum()) + 1  # the fewest that hold 0.7
    expected = torch.eye(8).double() - v[:kept].T @ v[:kept]
    torch.testing.assert_close(null_space(x, 0.7), expected)


def test_null_space_takes_rounding_for_zero():
    """Of rank 3 in 8 dimensions: 5 are free, though no eigenvalue is exactly 0."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=g).double() @ torch.randn(3, 8, generator=g).double()
    p = null_space(x, 1.0)
    assert p.trace().item() == pytest.approx(5) and (x @ p).abs().max() < 1e-9


def test_null_space_fails_where_nothing_is_left():
    with pytest.raises(ValueError, match="fill all 4 dimensions at energy 1"):
        null_space(torch.eye(4), 1.0)


def test_project_update_keeps_outputs_under_adamw_where_projecting_the_gradient_does_not():
    g = torch.Generator().manual_seed(0)
    x_keep, x_forget = torch.randn(3, 8, generator=g), torch.randn(1, 8, generator=g)
    original = torch.randn(5, 8, generator=g)
    p = null_space(x_keep, 1.0)
    moved = {}
    for form in ("update", "gradient"):
        w = original.clone().requires_grad_()
        optimizer = torch.optim.AdamW([w], lr=0.01, weight_decay=0.1)
        for _ in range(20):
            grad = torch.autograd.grad((x_forget @ w.T).square().sum(), w)[0]
            w.grad = grad @ p if form == "gradient" else grad
            optimizer.step()
            if form == "update":
                project_update([w], [original], p)
        moved[form] = ((w - original) @ x_keep.T).abs().max().item()
        assert ((w - original) @ x_forget.T).abs().max() > 0.05  # it does learn
    assert moved["update"] < 1e-5 and moved["gradient"] > 0.02
