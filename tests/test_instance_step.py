"""instance_step(), the training loop around it and its helpers, recomputed; and broken copies.

Three checks, none of which shares a line with the code that it checks:

    check_step    instance_step on a small network in double precision, sample by sample
    check_parts   the helpers, from plain numbers: timesteps, lambda(t), batches, pairs
    check_run     a whole run on a tiny diffusers model: every gradient, every step of Adam, the log

Then one line of instance_unlearn.py, or of section 1 of backbones.py, at a time is changed, and
each of these mutants must fail.
"""

import copy
import functools
import json
import math
import re
import shutil
import statistics
import types
from argparse import Namespace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import backbones
import common
import instance_unlearn

PREDICTION_TYPES = ("epsilon", "v_prediction", "flow")
SURGERIES = ("none", "forget", "both")
LAMBDAS = ("per sample", "constant")
# prediction type, surgery, number of forget pairs, lambda, whether L_r is distilled
STEPS = list(product(PREDICTION_TYPES, SURGERIES, (1, 2), LAMBDAS, (False,)))
STEPS += product(PREDICTION_TYPES, ("forget",), (1, 2), ("per sample",), (True,))

# ---- a small problem ----------------------------------------------------------------------------


class SmallNet(nn.Module):
    """Two convolutions with the timestep between them: (B, 2, h, w), (B,) -> (B, 2, h, w)."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(2, 6, 3, padding=1)
        self.time = nn.Linear(1, 6)
        self.conv_out = nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, xt, t):
        h = self.conv_in(xt) + self.time(t.view(-1, 1) / 500 - 1)[:, :, None, None]
        return self.conv_out(torch.tanh(h))


def make_problem(seed, prediction_type, n_pairs, lam):
    """A network and a batch of four samples: everything that instance_step takes."""
    torch.manual_seed(seed)
    net = SmallNet().double()
    x_r, noise, *images = torch.randn(2 + 2 * n_pairs, 4, 2, 6, 6).double()
    t = 1000 * torch.rand(4).double()
    s = t / 1000
    a, b = (1 - s, s) if prediction_type == "flow" else (torch.cos(s), torch.sin(s))
    lam_t = torch.full((4,), 0.6).double()
    if lam == "per sample":
        lam_t = 0.1 + 0.8 * torch.rand(4).double()
    forget = list(zip(images[::2], images[1::2], strict=True))
    original = copy.deepcopy(net).requires_grad_(False)  # M has gone some way from it
    for q in original.parameters():
        q.add_(0.1 * torch.randn_like(q))
    tensors = {"x_r": x_r, "noise": noise, "t": t, "a": a, "b": b, "lam_t": lam_t}
    return Namespace(net=net, original=original, forget=forget, **tensors)


def target_by_hand(prediction_type, xt, x0, a, b):
    """The regression target of one sample, from x_t and x_0 alone."""
    if prediction_type == "epsilon":
        return (xt - a * x0) / b
    if prediction_type == "flow":  # the velocity that leads from x_t to x_0 in the time b
        return (xt - x0) / b
    return (a * xt - x0) / b  # v = a eps - b x_0, where a^2 + b^2 = 1


def flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])


def recompute(problem, prediction_type, distilled):
    """(g_r, g_f, loss_r, loss_f of the last pair): Eq. 1 and 8 to 12, one sample at a time."""
    p = problem
    weighted_r = weighted_f = loss_r = loss_f = 0
    for i in range(4):
        a, b, lam = p.a[i].item(), p.b[i].item(), p.lam_t[i].item()

        def error(x0, target_x0, i=i, a=a, b=b):
            """Mean squared error at the noisy x0, of a prediction that should lead to target_x0."""
            xt = a * x0 + b * p.noise[i]  # Eq. 1
            target = target_by_hand(prediction_type, xt, target_x0, a, b)
            difference = p.net(xt[None], p.t[i : i + 1])[0] - target
            return (difference**2).sum() / difference.numel()

        error_r = error(p.x_r[i], p.x_r[i])  # Eq. 8
        if distilled:
            xt, t = (a * p.x_r[i] + b * p.noise[i])[None], p.t[i : i + 1]
            error_r = (p.net(xt, t) - p.original(xt, t)).square().mean()
        weighted_r = weighted_r + lam * error_r / 4
        loss_r = loss_r + error_r.item() / 4
        errors_f = [error(x_f[i], x_s[i]) for x_f, x_s in p.forget]  # Eq. 10 and 11
        weighted_f = weighted_f + (1 - lam) * sum(errors_f) / 4  # Eq. 12
        loss_f = loss_f + errors_f[-1].item() / 4
    params = list(p.net.parameters())
    g_r = flat(torch.autograd.grad(weighted_r, params))
    g_f = flat(torch.autograd.grad(weighted_f, params))
    return g_r, g_f, loss_r, loss_f


def combine(g_f, g_r, surgery):
    """The gradient of the step, Eq. 13 and its two ablations."""
    dot = (g_f * g_r).sum()
    if surgery == "none" or dot >= 0:
        return g_r + g_f
    g = g_r + g_f - dot / (g_r * g_r).sum() * g_r  # Eq. 13
    if surgery == "both":  # PCGrad: g_r loses its component along g_f, too
        g = g - dot / (g_f * g_f).sum() * g_f
    return g


@functools.cache
def find_problem(conflict, prediction_type, n_pairs, lam, distilled):
    """The first problem whose two gradients conflict, or agree."""
    for seed in range(100):
        problem = make_problem(seed, prediction_type, n_pairs, lam)
        g_r, g_f, loss_r, loss_f = recompute(problem, prediction_type, distilled)
        cos = (g_r * g_f).sum() / g_r.norm() / g_f.norm()
        if (cos < -0.05) if conflict else (cos > 0.05):
            return problem, (g_r, g_f, loss_r, loss_f)
    raise AssertionError("no such problem")


def close(got, expected, what):
    tolerance = {"rtol": 1e-4, "atol": 1e-5 * float(expected.abs().max())}
    torch.testing.assert_close(
        got.double(), expected.double(), **tolerance, msg=lambda m: f"{what}: {m}"
    )


def check_step(module, prediction_type, surgery, n_pairs, lam, distilled):
    """Compares what instance_step returns, in a conflict and without one, at once and in parts."""
    for conflict, micro_batches in ((True, 1), (False, 1), (True, 2)):
        p, expected = find_problem(conflict, prediction_type, n_pairs, lam, distilled)
        g_r, g_f, loss_r, loss_f = expected
        net = copy.deepcopy(p.net)  # the problem is used again
        params = list(net.parameters())
        before = [q.detach().clone() for q in params]
        a, b = p.a.view(-1, 1, 1, 1), p.b.view(-1, 1, 1, 1)
        batch = (p.x_r, p.forget, p.noise, p.t, a, b, p.lam_t)
        graphs = []

        def original(xt, t, p=p, graphs=graphs):
            graphs.append(torch.is_grad_enabled())
            return p.original(xt, t)

        how = (prediction_type, surgery, original if distilled else None, micro_batches)
        g, stats = module.instance_step(net, params, *batch, *how)
        assert graphs == [False] * distilled * micro_batches, "passes of M_init"

        close(g, combine(g_f, g_r, surgery), "g")
        cos = (g_r * g_f).sum() / g_r.norm() / g_f.norm()
        wanted = {"loss_r": loss_r, "loss_f": loss_f, "cos": cos, "conflict": float(conflict)}
        wanted |= {"norm_r": g_r.norm(), "norm_f": g_f.norm()}
        assert list(stats) == ["loss_r", "loss_f", "cos", "norm_f", "norm_r", "conflict"]
        for name, value in wanted.items():
            assert stats[name].shape == () and not stats[name].requires_grad
            close(stats[name], torch.as_tensor(value), name)
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
        assert all(q.grad is None for q in params)


@pytest.mark.parametrize(("prediction_type", "surgery", "n_pairs", "lam", "distilled"), STEPS)
def test_step_by_hand(prediction_type, surgery, n_pairs, lam, distilled):
    check_step(instance_unlearn, prediction_type, surgery, n_pairs, lam, distilled)


def test_distillation_has_nothing_to_say_before_anything_is_forgotten():
    """There g is g_f alone: no noise of Eq. 8 moves the weights."""
    p = make_problem(0, "epsilon", 1, "per sample")
    g, stats = step(p, predict_original=copy.deepcopy(p.net))
    assert stats["loss_r"] == 0 and stats["norm_r"] == 0 and stats["cos"] == 0
    assert g.norm() == stats["norm_f"] > 0
    _, of_noise = step(p)
    assert of_noise["norm_r"] > 0


# ---- properties of the step ---------------------------------------------------------------------


def step(problem, forget=None, x_r=None, noise=None, lam_t=None, surgery="forget", **more):
    """instance_step on a problem that predicts noise, with some inputs replaced."""
    p = problem
    return instance_unlearn.instance_step(
        p.net,
        list(p.net.parameters()),
        p.x_r if x_r is None else x_r,
        p.forget if forget is None else forget,
        p.noise if noise is None else noise,
        p.t,
        p.a.view(-1, 1, 1, 1),
        p.b.view(-1, 1, 1, 1),
        p.lam_t if lam_t is None else lam_t,
        surgery=surgery,
        **more,
    )


def test_x_r_x_f_and_x_s_enter_where_the_paper_has_them():
    """loss_r knows x_r alone, loss_f knows x_f and x_s alone, and every one of them matters."""
    p = make_problem(0, "epsilon", 1, "per sample")
    (x_f, x_s), other = p.forget[0], torch.randn_like(p.x_r)
    _, plain = step(p)
    _, changed_r = step(p, x_r=other)
    _, changed_f = step(p, forget=[(other, x_s)])
    _, changed_s = step(p, forget=[(x_f, other)])
    assert changed_r["loss_f"] == plain["loss_f"] and changed_r["loss_r"] != plain["loss_r"]
    for changed in (changed_f, changed_s):
        assert changed["loss_r"] == plain["loss_r"] and changed["loss_f"] != plain["loss_f"]


def test_a_surrogate_that_is_the_image_itself_is_ordinary_training():
    """Eq. 10 with x^s = x^f gives back eps: the image is learned as those to remember are."""
    p = make_problem(0, "epsilon", 1, "per sample")
    half = torch.full((4,), 0.5).double()
    g, stats = step(p, forget=[(p.x_r, p.x_r)], lam_t=half)
    torch.testing.assert_close(stats["loss_f"], stats["loss_r"])
    torch.testing.assert_close(stats["cos"], torch.ones(()))
    torch.testing.assert_close(stats["norm_f"], stats["norm_r"])


def test_noise_and_timestep_are_shared_by_both_losses():
    """The two networks' inputs differ by a (x_f - x_r) alone, at the same timesteps."""
    p = make_problem(0, "epsilon", 2, "per sample")
    inputs, net = [], p.net

    def record(xt, t):
        inputs.append((xt.detach(), t))
        return net(xt, t)

    params = list(net.parameters())
    p.net = SimpleNamespace(parameters=lambda: params)
    a, b = p.a.view(-1, 1, 1, 1), p.b.view(-1, 1, 1, 1)
    instance_unlearn.instance_step(record, params, p.x_r, p.forget, p.noise, p.t, a, b, p.lam_t)
    (xt_r, t_r), *of_forget = inputs
    torch.testing.assert_close(xt_r, a * p.x_r + b * p.noise)
    for (xt_f, t_f), (x_f, _) in zip(of_forget, p.forget, strict=True):
        assert torch.equal(t_f, t_r) and torch.equal(t_r, p.t)
        torch.testing.assert_close(xt_f - xt_r, a * (x_f - p.x_r))


def test_lambda_weighs_each_sample_by_its_own_timestep():
    """A sample with lambda = 1 takes no part in forgetting, one with 0 none in remembering."""
    p = make_problem(0, "epsilon", 1, "per sample")
    lam_t = torch.tensor([1.0, 0.0, 1.0, 0.0]).double()
    plain, _ = step(p, lam_t=lam_t, surgery="none")
    (x_f, x_s), x_r = p.forget[0], p.x_r.clone()
    x_f, x_s = x_f.clone(), x_s.clone()
    x_r[1::2], x_f[::2], x_s[::2] = 7, 7, 7  # those that have no weight
    other, _ = step(p, x_r=x_r, forget=[(x_f, x_s)], lam_t=lam_t, surgery="none")
    assert torch.equal(other, plain)


def test_two_pairs_are_two_forget_gradients_added():
    p = make_problem(0, "epsilon", 2, "per sample")
    zero = torch.zeros(4).double()  # lambda = 0: no g_r at all
    both, _ = step(p, lam_t=zero, surgery="none")
    first, _ = step(p, forget=p.forget[:1], lam_t=zero, surgery="none")
    second, _ = step(p, forget=p.forget[1:], lam_t=zero, surgery="none")
    torch.testing.assert_close(both, first + second)


def test_projected_gradient_agrees_with_remembering():
    """After Eq. 13, <g, g_r> = |g_r|^2: nothing of the forget gradient is left along g_r."""
    p, (g_r, _, _, _) = find_problem(True, "epsilon", 1, "per sample", False)
    g, _ = step(p)
    torch.testing.assert_close(g.double() @ g_r, g_r @ g_r, rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_input_stays_and_the_target_is_the_surrogates(prediction_type):
    """Eq. 10: the same x_t from another x_0. With x^s = x^f, nothing changes."""
    x_f, x_s, noise = torch.randn(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    alpha_bar = None if prediction_type == "flow" else torch.linspace(0.999, 0.01, 1000)
    a, b = backbones.coefficients(torch.tensor([400, 900]), alpha_bar)
    xt = a * x_f + b * noise
    noise_s = instance_unlearn.surrogate_noise(xt, x_s, a, b)
    torch.testing.assert_close(a * x_s + b * noise_s, xt)
    same = instance_unlearn.surrogate_noise(xt, x_f, a, b)
    torch.testing.assert_close(same, noise, rtol=1e-3, atol=1e-3)
    target = backbones.prediction_target(prediction_type, x_s, noise_s, a, b)
    x0_hat = backbones.predict_x0(prediction_type, target, xt, a, b)
    torch.testing.assert_close(x0_hat, x_s)
    if prediction_type == "flow":  # as the docstring derives it
        torch.testing.assert_close(target, (xt - x_s) / b)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_model_that_predicts_the_target_arrives_at_the_surrogate(prediction_type):
    x_f, x_s, noise = torch.randn(3, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    alpha_bar = None if prediction_type == "flow" else torch.linspace(0.999, 0.01, 1000)

    def perfect(x, t):
        a, b = backbones.coefficients(t, alpha_bar)
        noise_s = instance_unlearn.surrogate_noise(x, x_s, a, b)
        return backbones.prediction_target(prediction_type, x_s, noise_s, a, b)

    timesteps = torch.tensor([700, 450, 300, 40])
    a, b = backbones.coefficients(timesteps[:1], alpha_bar)
    how = (timesteps, prediction_type, alpha_bar)
    end = backbones.sample_deterministic(perfect, a * x_f + b * noise, *how, clip=False)
    torch.testing.assert_close(end, x_s, rtol=1e-4, atol=1e-4)


# ---- the distribution of the timesteps ----------------------------------------------------------


def test_stratified_timesteps_are_uniform():
    """One of each eighth of 0 .. 999; over many batches, the uniform distribution."""
    sample, g = backbones.sample_timesteps, torch.Generator().manual_seed(0)
    for _ in range(50):
        t = sample(8, g, stratified=True)
        assert (t // 125).tolist() == list(range(8))
    t = torch.cat([sample(4, g, stratified=True) for _ in range(4000)])
    assert t.min() == 0 and t.max() == 999
    assert abs(t.float().mean() - 499.5) < 5


def test_independent_timesteps_are_independent():
    """Nearly every batch of eight has two in one eighth; a stratified batch never has."""
    g = torch.Generator().manual_seed(0)
    t = torch.stack([backbones.sample_timesteps(8, g) for _ in range(500)])
    assert t.min() >= 0 and t.max() <= 999
    assert abs(t.float().mean() - 499.5) < 15
    eighths = torch.stack([torch.bincount(row // 125, minlength=8) for row in t])
    assert (eighths > 1).any(1).float().mean() > 0.9


@pytest.mark.parametrize(("shift", "median"), [(1.0, 500), (3.0, 750)])  # 3 / 2 / (1 + 2 / 2)
def test_times_of_flow_matching_are_those_of_its_training(shift, median):
    """Logit-normal after the shift is undone: mean 0, standard deviation 1."""
    g = torch.Generator().manual_seed(0)
    t = backbones.sample_timesteps(4001, g, shift, stratified=True)
    assert 1 <= t.min() and t.max() <= 1000
    assert abs(t.median() - median) < 1
    logit = torch.logit(t / 1000 / (shift - (shift - 1) * t / 1000))
    assert abs(logit.mean()) < 0.01 and abs(logit.std() - 1) < 0.02


# ---- the helpers from plain numbers -------------------------------------------------------------


def check_surrogate_noise(module):
    """Eq. 10 at sqrt(a_t) = 0.8: x_t^f = 0.8 * 1 + 0.6 * 0.5 = 1.1; eps' = (1.1 - 0.4) / 0.6."""
    xt, x_s = torch.full((1, 1, 1, 1), 1.1), torch.full((1, 1, 1, 1), 0.5)
    a, b = torch.full((1, 1, 1, 1), 0.8), torch.full((1, 1, 1, 1), 0.6)
    got = module.surrogate_noise(xt, x_s, a, b)
    torch.testing.assert_close(got, torch.full((1, 1, 1, 1), 7 / 6))


def check_lambda(module):
    """Eq. 12, and the constant of Table III, which does not ask for t or beta."""
    t = torch.tensor([0, 500, 999])
    got = module.lambda_t(t, 5e-5)
    torch.testing.assert_close(got, torch.tensor([1.0, 0.975, 0.95005]))
    got = module.lambda_t(torch.tensor([1000.0]), 2e-4)  # flow matching: times are not integers
    torch.testing.assert_close(got, torch.tensor([0.8]))
    got = module.lambda_t(t, 5e-5, constant=0.25)
    torch.testing.assert_close(got, torch.full((3,), 0.25))
    got = module.lambda_t(t, 5e-5, constant=0.0)
    torch.testing.assert_close(got, torch.zeros(3))


def check_mse(module):
    """One number per sample, the mean over channels and pixels."""
    prediction = torch.zeros(2, 2, 1, 2)
    target = torch.tensor([[1.0, 1, 1, 1], [0, 0, 2, 4]]).view(2, 2, 1, 2)
    got = module.mse_per_sample(prediction, target)
    torch.testing.assert_close(got, torch.tensor([1.0, 5.0]))


def check_surgery(module):
    """In conflict g_f' = (0, 1), and PCGrad's g_r' = (-1, 1); otherwise all three add."""
    g_f, g_r = torch.tensor([1.0, 1.0]), torch.tensor([-2.0, 0.0])
    expected = {"none": (-1.0, 1.0), "forget": (-2.0, 1.0), "both": (-1.0, 2.0)}
    assert module.SURGERY.keys() == expected.keys()
    for name, surgery in module.SURGERY.items():
        g, stats = surgery(g_f, g_r)
        torch.testing.assert_close(g, torch.tensor(expected[name]), msg=name)
        assert stats["conflict"] == 1 and stats["norm_r"] == 2
        torch.testing.assert_close(surgery(g_f, -g_r)[0], g_f - g_r, msg=name)


def timestep_by_hand(u, shift):
    """The timestep at the quantile u, by the standard library."""
    if shift is None:
        return int(1000 * u)
    logit = statistics.NormalDist().inv_cdf(u)
    s = 1 / (1 + math.exp(-logit))
    return max(1, 1000 * shift * s / (1 + (shift - 1) * s))


def check_timesteps(module):
    """Each quantile by hand; independent, or one of each n-th part."""
    for shift, stratified in product((None, 1.0, 3.0), (False, True)):
        u = torch.rand(8, generator=torch.Generator().manual_seed(5)).tolist()
        if stratified:
            u = [(i + v) / 8 for i, v in enumerate(u)]
        expected = [timestep_by_hand(v, shift) for v in u]
        g = torch.Generator().manual_seed(5)
        t = module.sample_timesteps(8, g, shift, stratified)
        assert t.tolist() == pytest.approx(expected, rel=1e-4)
        assert t.is_floating_point() == (shift is not None)
    g = torch.Generator().manual_seed(5)  # the defaults: Algorithm 1
    u = torch.rand(8, generator=torch.Generator().manual_seed(5)).tolist()
    assert module.sample_timesteps(8, g).tolist() == [int(1000 * v) for v in u]


def check_ends_of_the_timesteps(module):
    """Stratified, 7 + (1 - 2^-24) is 8 in float32; and no time of flow matching is below 1."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch, "rand", lambda n, generator: torch.full((n,), 1 - 2**-24))
        assert module.sample_timesteps(8, None, stratified=True)[-1] == 999
        m.setattr(torch, "rand", lambda n, generator: torch.zeros(n))
        assert module.sample_timesteps(8, None)[0] == 0
        assert module.sample_timesteps(8, None, shift=1.0)[0] == 1


CPU = torch.device("cpu")


def check_batch(module):
    """Draws in their documented order from (seed, step): images, timesteps, noise; then rows."""
    x_f = torch.zeros(2, 3, 4, 4)
    for shift, sampling in ((None, "uniform"), (None, "stratified"), (3.0, "stratified")):
        backbone = SimpleNamespace(shift=shift)
        args = Namespace(batch_size=6, seed=2, timestep_sampling=sampling)
        g = torch.Generator().manual_seed(2 * 1_000_003 + 100_000 + 7)
        indices = torch.randint(20, (2, 6), generator=g)
        u = torch.rand(6, generator=g).tolist()
        if sampling == "stratified":
            u = [(i + v) / 6 for i, v in enumerate(u)]
        t = [timestep_by_hand(v, shift) for v in u]
        noise = torch.randn(6, 3, 4, 4, generator=g)
        for rank, world in ((0, 1), (0, 3), (2, 3)):
            rows = range(6) if world == 1 else range(2 * rank, 2 * rank + 2)
            processes = common.Processes(rank, world, CPU)
            got = module.sample_batch(7, 20, x_f, backbone, args, processes)
            assert got[0] == [indices[0, i].item() for i in rows]
            assert got[1] == [indices[1, i].item() for i in rows]
            assert got[2].tolist() == pytest.approx([t[i] for i in rows], rel=1e-4)
            assert torch.equal(got[3], torch.stack([noise[i] for i in rows]))


def check_pairs(module):
    """Which image and which surrogate stand in each row: image j is all j, its surrogate -j."""
    x_f = torch.arange(3.0).view(3, 1, 1, 1)
    x_s = [torch.full((1, 1, 1), -10.0), None, torch.full((1, 1, 1), -12.0)]
    random = -100 - torch.arange(6.0).view(6, 1, 1, 1)
    surrogate_of = {0: [-10] * 6, 1: [-100, -101, -102, -103, -104, -105], 2: [-12] * 6}
    for current, world in product(range(3), (1, 2)):
        for rank, step_number in product(range(world), (6, 7)):
            processes = common.Processes(rank, world, CPU)
            here = random[: 6 // world]  # each process reads those of its own rows
            pairs = module.forget_pairs(step_number, current, x_f, x_s, here, 6, processes)
            rows = range(6) if world == 1 else range(3 * rank, 3 * rank + 3)
            expected = [[current for _ in rows]]
            if current > 0:  # earlier images in turn, before the current one
                expected.insert(0, [(step_number + i) % current for i in rows])
            assert len(pairs) == len(expected)
            for (images, surrogates), wanted in zip(pairs, expected, strict=True):
                assert images.flatten().tolist() == wanted
                from_x_s = [surrogate_of[j][i] for i, j in enumerate(wanted)]
                assert surrogates.flatten().tolist() == from_x_s


PARTS = {
    "surrogate_noise": check_surrogate_noise,
    "lambda_t": check_lambda,
    "mse_per_sample": check_mse,
    "surgery": check_surgery,
    "sample_timesteps": check_timesteps,
    "ends of the timesteps": check_ends_of_the_timesteps,
    "sample_batch": check_batch,
    "forget_pairs": check_pairs,
}


@pytest.mark.parametrize("name", PARTS)
def test_part_by_hand(name):
    PARTS[name](instance_unlearn)


def test_batch_is_that_of_its_step_and_seed():
    """Another step, another seed: other draws; the same again: the same."""
    x_f, backbone = torch.zeros(1, 3, 4, 4), SimpleNamespace(shift=None)
    processes = common.Processes(0, 1, CPU)

    def batch(seed, number):
        args = Namespace(batch_size=4, seed=seed, timestep_sampling="uniform")
        return instance_unlearn.sample_batch(number, 20, x_f, backbone, args, processes)[3]

    assert torch.equal(batch(0, 3), batch(0, 3))
    assert not torch.equal(batch(0, 3), batch(0, 4))
    assert not torch.equal(batch(0, 3), batch(1, 3))


# ---- a whole run --------------------------------------------------------------------------------

LR, BATCH, SEED = 1e-3, 4, 2
# name: (model, surrogates of the two images to forget, more flags)
RUNS = {
    "ddpm": ("ddpm", ("b.png", "random"), "--beta 9e-4 --steps 3"),
    "ddpm, constant": (
        "ddpm",
        ("d.png", "b.png"),
        "--constant-lambda 0.4 --surgery both --lr 1e-2 --steps 8 "
        "--lr-scheduler constant --timestep-sampling uniform",
    ),
    "ddpm, no surgery": (
        "ddpm",
        ("d.png", "b.png"),
        "--constant-lambda 0.4 --surgery none --lr 1e-2 --steps 8",
    ),
    "sd": ("sd", ("flip", "random"), "--prompt cat --beta 5e-4"),
    "v-prediction": ("v", ("flip", "flip"), "--beta 5e-4"),
    "sd3": ("sd3", ("b.png", "random"), "--prompt cat --beta 5e-4"),
    # M_init of a LoRA is the network without it
    "ddpm, distill": ("ddpm", ("b.png", "random"), "--beta 9e-4 --steps 3 --remember-loss distill"),
    "sd, distill": ("sd", ("flip", "random"), "--prompt cat --beta 5e-4 --remember-loss distill"),
    "v, distill": ("v", ("flip", "flip"), "--beta 5e-4 --remember-loss distill"),
    "sd3, distill": ("sd3", ("b.png", "flip"), "--prompt cat --beta 5e-4 --remember-loss distill"),
}


def flag(flags, name, default):
    return flags[flags.index(name) + 1] if name in flags else default


@pytest.fixture
def folders(tiny, tiny_ddpm, tiny_sd3, photos, tmp_path):
    """Models of all families, images of 64x64 pixels beside those of 16x16, and a run folder."""
    v_model = tmp_path / "v"
    shutil.copytree(tiny, v_model)
    config = v_model / "scheduler/scheduler_config.json"
    changed = json.loads(config.read_text()) | {"prediction_type": "v_prediction"}
    config.write_text(json.dumps(changed))
    large = tmp_path / "photos-64"
    large.mkdir()
    for file in photos.glob("?.png"):
        Image.open(file).resize((64, 64)).save(large / file.name)
    models = {"ddpm": tiny_ddpm, "sd": tiny, "v": v_model, "sd3": tiny_sd3}
    images = {"ddpm": photos, "sd": large, "v": large, "sd3": photos}
    return SimpleNamespace(models=models, images=images, out=tmp_path / "run")


def run_recorded(module, folders, name):
    """Runs a module. Returns [(weights before, gradient)] of its steps, and the run folder."""
    model, surrogates, flags = RUNS[name]
    images, records, write = folders.images[model], [], module.write_grad

    def record(params, g):
        records.append((flat(params).clone(), g.detach().clone()))
        write(params, g)

    argv = ["--model", folders.models[model], "--forget", images / "a.png", images / "c.png"]
    argv += ["--remember", images, "--out", folders.out]
    argv += [
        "--steps",
        2,
        "--lr",
        LR,
        *flags.split(),
        "--seed",
        SEED,
        "--batch-size",
        BATCH,
        "--rank",
        4,
    ]
    argv += ["--surrogate", *(images / s if s.endswith("png") else s for s in surrogates)]
    args = module.parse_args(list(map(str, argv)))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(module, "write_grad", record)
        return records, module.unlearn(args)


def pixels(file, size=None):
    """(1, 3, H, W) in [-1, 1], from the bytes of a file."""
    image = Image.open(file).convert("RGB")
    if size and image.width != size:
        image = image.resize((size, size), Image.LANCZOS)
    values = torch.tensor(list(image.tobytes()), dtype=torch.float32)
    return values.view(1, image.height, image.width, 3).permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def encode(pipe, x):
    """What the network denoises: pixels, or the VAE's scaled latents."""
    if not hasattr(pipe, "vae"):
        return x
    config = pipe.vae.config
    z = pipe.vae.encode(x).latent_dist.mode()
    return (z - (config.shift_factor or 0)) * config.scaling_factor


@torch.no_grad()
def flipped(pipe, z):
    """The mirror image, in pixels, of what the network denoises."""
    if not hasattr(pipe, "vae"):
        return z.flip(-1)
    config = pipe.vae.config
    decoded = pipe.vae.decode(z / config.scaling_factor + (config.shift_factor or 0)).sample
    return encode(pipe, decoded.flip(-1))


def plain_model(folders, model, prompt, lora=True):
    """(pipeline, network with its LoRA, condition, alpha_bar or None), by diffusers and peft."""
    folder = folders.models[model]
    if model == "ddpm":
        pipe = DDPMPipeline.from_pretrained(folder)
        return pipe, pipe.unet, {}, pipe.scheduler.alphas_cumprod
    if model == "sd3":
        absent = {"text_encoder_3": None, "tokenizer_3": None}
        pipe = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
        net, alpha_bar = pipe.transformer, None
        with torch.no_grad():
            rows, _, pooled, _ = pipe.encode_prompt(
                prompt, prompt, prompt, do_classifier_free_guidance=False
            )
        condition = {"encoder_hidden_states": rows, "pooled_projections": pooled}
        names = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
        targets = [f"attn.{n}" for n in (*names, "to_add_out")]
    else:
        pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        net, alpha_bar = pipe.unet, pipe.scheduler.alphas_cumprod
        with torch.no_grad():
            condition = {"encoder_hidden_states": pipe.encode_prompt(prompt, "cpu", 1, False)[0]}
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
    if not lora:
        return pipe, net, condition, alpha_bar
    torch.manual_seed(SEED)  # of the LoRA's first factor; the second is 0
    net.requires_grad_(False).add_adapter(
        LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets)
    )
    return pipe, net, condition, alpha_bar


def check_adam(records, after, flags):
    """The weights after each step follow from the recorded gradients (Kingma and Ba 2015)."""
    rate = float(flag(flags, "--lr", LR))
    constant = flag(flags, "--lr-scheduler", "linear") == "constant"
    m, v, per_image = 0, 0, int(flag(flags, "--steps", 2))
    for number, got in enumerate(after):
        before, g = records[number]
        k = number + 1
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        move = (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8)
        lr = rate if constant else rate * (1 - number % per_image / per_image)
        torch.testing.assert_close(got, before - lr * move, rtol=0, atol=1e-3 * rate)


def check_run(module, folders, name):
    """Every gradient, every step of Adam and the log of a run. Returns the cosines."""
    model, kinds, flags = RUNS[name]
    flags = flags.split()
    records, out = run_recorded(module, folders, name)
    per_image = int(flag(flags, "--steps", 2))
    assert len(records) == 2 * per_image

    pipe, net, condition, alpha_bar = plain_model(folders, model, flag(flags, "--prompt", ""))
    net.eval()
    params = [p for p in net.parameters() if p.requires_grad]
    without_lora = plain_model(folders, model, flag(flags, "--prompt", ""), lora=False)[1].eval()
    torch.testing.assert_close(flat(params), records[0][0], msg="the weights before step 0")
    prediction_type = {"v": "v_prediction", "sd3": "flow"}.get(model, "epsilon")
    images = folders.images[model]
    x_f = [encode(pipe, pixels(images / f)) for f in ("a.png", "c.png")]
    size = Image.open(images / "a.png").width
    files = [images / f for f in ("b.png", "d.png", "large.png") if (images / f).exists()]
    remember = [encode(pipe, pixels(f, size)) for f in files]  # all but those to forget
    x_s = []
    for kind, x in zip(kinds, x_f, strict=True):
        made = flipped(pipe, x) if kind == "flip" else None  # None: random
        x_s.append(encode(pipe, pixels(images / kind)) if kind.endswith("png") else made)

    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for number, (weights_before, g) in enumerate(records):
        current = number // per_image
        position = 0
        for p in params:
            p.data.copy_(weights_before[position : position + p.numel()].view_as(p))
            position += p.numel()
        draws = torch.Generator().manual_seed(SEED * 1_000_003 + 100_000 + number)
        idx_r, idx_s = torch.randint(len(files), (2, BATCH), generator=draws).tolist()
        u = torch.rand(BATCH, generator=draws).tolist()
        if flag(flags, "--timestep-sampling", "stratified") == "stratified":
            u = [(i + v) / BATCH for i, v in enumerate(u)]
        noise = torch.randn(BATCH, *x_f[0].shape[1:], generator=draws)

        weighted_r = weighted_f = loss_r = loss_f = 0
        for i in range(BATCH):
            t = torch.tensor([timestep_by_hand(u[i], 3.0 if model == "sd3" else None)])
            if model == "sd3":
                a, b = 1 - t.item() / 1000, t.item() / 1000
            else:
                a, b = alpha_bar[t].sqrt().item(), (1 - alpha_bar[t]).sqrt().item()
            lam = 1 - float(flag(flags, "--beta", 5e-5)) * t.item()  # Eq. 12
            lam = float(flag(flags, "--constant-lambda", lam))

            def error(x0, target_x0, a=a, b=b, t=t, noise=noise[i : i + 1]):
                xt = a * x0 + b * noise
                prediction = net(xt, timestep=t, **condition).sample
                target = target_by_hand(prediction_type, xt, target_x0, a, b)
                return (prediction - target).square().mean()

            error_r = error(remember[idx_r[i]], remember[idx_r[i]])
            if "distill" in flags:
                xt = a * remember[idx_r[i]] + b * noise[i : i + 1]
                with torch.no_grad():
                    aim = without_lora(xt, timestep=t, **condition).sample
                error_r = (net(xt, timestep=t, **condition).sample - aim).square().mean()
            weighted_r = weighted_r + lam * error_r / BATCH
            loss_r += error_r.item() / BATCH
            for k in range(current + 1):  # of two images, the earlier one is number 0
                surrogate = remember[idx_s[i]] if x_s[k] is None else x_s[k]
                error_f = error(x_f[k], surrogate)
                weighted_f = weighted_f + (1 - lam) * error_f / BATCH
                loss_f += error_f.item() / BATCH if k == current else 0
        g_r = flat(torch.autograd.grad(weighted_r, params))
        g_f = flat(torch.autograd.grad(weighted_f, params))
        expected = combine(g_f, g_r, flag(flags, "--surgery", "forget"))
        tolerance = {"rtol": 2e-3, "atol": 2e-4 * float(expected.abs().max())}
        torch.testing.assert_close(g, expected, **tolerance)
        cos = float(g_f @ g_r / g_f.norm() / g_r.norm().clamp(min=1e-30))
        row = {"step": number, "image": current, "loss_r": loss_r, "loss_f": loss_f}
        for key, value in (row | {"cos": cos}).items():
            assert rows[number][key] == pytest.approx(value, rel=1e-3, abs=1e-3), key
    assert len(rows) == len(records)

    after = [weights for weights, _ in records[1:]]
    if model == "ddpm":  # the last step, too, is in what is saved
        saved = load_file(out / "pipeline/unet/diffusion_pytorch_model.safetensors")
        after.append(flat(saved[n] for n, _ in net.named_parameters()))
    check_adam(records, after, flags)
    return [row["cos"] for row in rows]


def test_run_by_hand(folders):
    check_run(instance_unlearn, folders, "ddpm")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in RUNS if n != "ddpm"])
def test_run_of_each_family_by_hand(folders, name):
    cosines = check_run(instance_unlearn, folders, name)
    if "--surgery" in RUNS[name][2]:
        assert min(cosines) < 0 < max(cosines)  # or the surgeries would not be told apart


# ---- mutants of the pure functions --------------------------------------------------------------

# what is broken: (checks that must see it, the line, what becomes of it). Each line stands once in
# instance_unlearn.py. "step": any of the switches of check_step.
PURE_MUTANTS = {
    "micro-batches are summed": ("step", "value /= micro_batches", "pass"),
    "the last micro-batch alone": (
        "step",
        "means[name] = means[name].add_(value) if name in means else value",
        "means[name] = value",
    ),
    "micro-batches of another row's noise": ("step", "at = (noise[rows],", "at = (noise[:size],"),
    "micro-batches of other images": ("step", "x_r[rows], pairs", "x_r[:size], pairs"),
    "micro-batches of other surrogates": ("step", "x_s[rows])", "x_s[:size])"),
    "never distilled": ("step", "if predict_original is not None:", "if False:"),
    "M distilled from itself": (
        "step",
        "target_r = predict_original(xt_r, t)",
        "target_r = predict(xt_r, t)",
    ),
    "distilled at the clean image": (
        "step",
        "predict_original(xt_r, t)",
        "predict_original(x_r, t)",
    ),
    "distilled at the timestep of another row": (
        "step",
        "predict_original(xt_r, t)",
        "predict_original(xt_r, t.flip(0))",
    ),
    "a graph of M_init": (
        "step",
        "        with torch.no_grad():\n            target_r",
        "        with torch.enable_grad():\n            target_r",
    ),
    "x_f and x_s change places": ("step", "for x_f, x_s in forget:", "for x_s, x_f in forget:"),
    "the noisy surrogate is the input": (
        "step",
        "xt_f = a * x_f + b * noise",
        "xt_f = a * x_s + b * noise",
    ),
    "x_r is forgotten": ("step", "xt_f = a * x_f + b * noise", "xt_f = a * x_r + b * noise"),
    "x_f is remembered": (
        "step",
        "xt_r = a * x_r + b * noise",
        "xt_r = a * forget[0][0] + b * noise",
    ),
    "a and b of x_r change places": (
        "step",
        "xt_r = a * x_r + b * noise",
        "xt_r = b * x_r + a * noise",
    ),
    "a and b of x_f change places": (
        "step",
        "xt_f = a * x_f + b * noise",
        "xt_f = b * x_f + a * noise",
    ),
    "noise of its own for x_f": (
        "step",
        "xt_f = a * x_f + b * noise",
        "xt_f = a * x_f + b * torch.randn_like(noise)",
    ),
    "the noise of another row for x_f": (
        "step",
        "xt_f = a * x_f + b * noise",
        "xt_f = a * x_f + b * noise.flip(0)",
    ),
    "the timestep of another row for x_f": ("step", "predict(xt_f, t)", "predict(xt_f, t.flip(0))"),
    "the timestep of another row for x_r": ("step", "predict(xt_r, t)", "predict(xt_r, t.flip(0))"),
    "the prediction for x_r is compared": ("step", "predict(xt_f, t)", "predict(xt_r, t)"),
    "the target of x_r is x_f's": (
        "step",
        "prediction_target(prediction_type, x_r, noise",
        "prediction_target(prediction_type, forget[0][0], noise",
    ),
    "the target of x_r without noise": (
        "step",
        "prediction_target(prediction_type, x_r, noise",
        "prediction_target(prediction_type, x_r, 0 * noise",
    ),
    "the target of x_f is x_f's own velocity": (
        "step",
        "prediction_target(prediction_type, x_s, noise_s",
        "prediction_target(prediction_type, x_f, noise_s",
    ),
    "the target of x_f has the original noise": (
        "step",
        "prediction_target(prediction_type, x_s, noise_s",
        "prediction_target(prediction_type, x_s, noise",
    ),
    "Eq. 10 is made at x_t of x_r": (
        "step",
        "surrogate_noise(xt_f, x_s, a, b)",
        "surrogate_noise(xt_r, x_s, a, b)",
    ),
    "Eq. 10 leads back to x_f": (
        "step",
        "surrogate_noise(xt_f, x_s, a, b)",
        "surrogate_noise(xt_f, x_f, a, b)",
    ),
    "a and b of Eq. 10 change places": (
        "step",
        "surrogate_noise(xt_f, x_s, a, b)",
        "surrogate_noise(xt_f, x_s, b, a)",
    ),
    "lambda and 1 - lambda change places in g_r": (
        "step",
        "flat_grad((lam_t * error_r).mean(), params)",
        "flat_grad(((1 - lam_t) * error_r).mean(), params)",
    ),
    "lambda and 1 - lambda change places in g_f": (
        "step",
        "flat_grad(((1 - lam_t) * error_f).mean(), params)",
        "flat_grad((lam_t * error_f).mean(), params)",
    ),
    "g_r without lambda": ("step", "(lam_t * error_r).mean()", "error_r.mean()"),
    "g_f without 1 - lambda": ("step", "((1 - lam_t) * error_f).mean()", "error_f.mean()"),
    "the mean of lambda for all samples of g_r": (
        "step",
        "(lam_t * error_r).mean()",
        "(lam_t.mean() * error_r).mean()",
    ),
    "the mean of lambda for all samples of g_f": (
        "step",
        "((1 - lam_t) * error_f).mean()",
        "((1 - lam_t.mean()) * error_f).mean()",
    ),
    "a sum over the batch for g_r": ("step", "(lam_t * error_r).mean()", "(lam_t * error_r).sum()"),
    "a sum over the batch for g_f": (
        "step",
        "((1 - lam_t) * error_f).mean()",
        "((1 - lam_t) * error_f).sum()",
    ),
    "naive ascent: the sign of g_f": ("step", "g_f = g_f + flat_grad", "g_f = g_f - flat_grad"),
    "missing earlier images": ("step", "g_f = g_f + flat_grad", "g_f = flat_grad"),
    "only the first pair": ("step", "for x_f, x_s in forget:", "for x_f, x_s in forget[:1]:"),
    "the mean over the pairs": (
        "step",
        "SURGERY[surgery](g_f, g_r)",
        "SURGERY[surgery](g_f / len(forget), g_r)",
    ),
    "the gradients change places in Eq. 13": (
        "step",
        "SURGERY[surgery](g_f, g_r)",
        "SURGERY[surgery](g_r, g_f)",
    ),
    "always Eq. 13": ("step", "SURGERY[surgery](g_f, g_r)", "forget_only(g_f, g_r)"),
    "never Eq. 13": ("step", "SURGERY[surgery](g_f, g_r)", "no_surgery(g_f, g_r)"),
    "always epsilon for x_r": (
        "step",
        "prediction_target(prediction_type, x_r, noise",
        'prediction_target("epsilon", x_r, noise',
    ),
    "always epsilon for x_f": (
        "step",
        "prediction_target(prediction_type, x_s, noise_s",
        'prediction_target("epsilon", x_s, noise_s',
    ),
    "the reported losses change places": (
        "step",
        '"loss_r": error_r.mean().detach(), "loss_f": error_f.mean().detach()',
        '"loss_r": error_f.mean().detach(), "loss_f": error_r.mean().detach()',
    ),
    "the reported losses keep their graph": (
        "step",
        '"loss_r": error_r.mean().detach()',
        '"loss_r": error_r.mean()',
    ),
    "the step moves the weights": (
        "step",
        "    g, stats = SURGERY[surgery](g_f, g_r)\n",
        "    g, stats = SURGERY[surgery](g_f, g_r)\n    params[0].data.add_(1e-3)\n",
    ),
    "Eq. 10 without a": (
        "step surrogate_noise",
        "return (xt - a * x_s) / b",
        "return (xt - x_s) / b",
    ),
    "Eq. 10 with a plus": (
        "step surrogate_noise",
        "return (xt - a * x_s) / b",
        "return (xt + a * x_s) / b",
    ),
    "Eq. 10 with b for a": (
        "step surrogate_noise",
        "return (xt - a * x_s) / b",
        "return (xt - b * x_s) / b",
    ),
    "Eq. 10 is not divided by b": (
        "step surrogate_noise",
        "return (xt - a * x_s) / b",
        "return xt - a * x_s",
    ),
    "Eq. 10 is divided by a": (
        "step surrogate_noise",
        "return (xt - a * x_s) / b",
        "return (xt - a * x_s) / a",
    ),
    "the sign of Eq. 10": (
        "step surrogate_noise",
        "return (xt - a * x_s) / b",
        "return (a * x_s - xt) / b",
    ),
    "lambda is the weight of forgetting": ("lambda_t", "return 1 - beta * t", "return beta * t"),
    "lambda grows with t": ("lambda_t", "return 1 - beta * t", "return 1 + beta * t"),
    "lambda at t / 1000": ("lambda_t", "return 1 - beta * t", "return 1 - beta * t / 1000"),
    "lambda falls quadratically": ("lambda_t", "return 1 - beta * t", "return 1 - beta * t * t"),
    "the constant is not used": (
        "lambda_t",
        "return torch.full_like(t, constant, dtype=torch.float32)",
        "return 1 - beta * t",
    ),
    "the constant is the weight of forgetting": (
        "lambda_t",
        "torch.full_like(t, constant,",
        "torch.full_like(t, 1 - constant,",
    ),
    "a constant of 0 is none": ("lambda_t", "if constant is not None:", "if constant:"),
    "a constant of the type of t": ("lambda_t", "constant, dtype=torch.float32)", "constant)"),
    "the sum of squares": (
        "step mse_per_sample",
        "(prediction - target).square().mean((1, 2, 3))",
        "(prediction - target).square().sum((1, 2, 3))",
    ),
    "absolute errors": (
        "step mse_per_sample",
        "(prediction - target).square().mean((1, 2, 3))",
        "(prediction - target).abs().mean((1, 2, 3))",
    ),
    "one error for the batch": (
        "step mse_per_sample",
        "(prediction - target).square().mean((1, 2, 3))",
        "(prediction - target).square().mean().expand(len(target))",
    ),
    "no surgery without g_f": (
        "step surgery",
        "return g_r + g_f, forget_only",
        "return g_r, forget_only",
    ),
    "no surgery subtracts g_f": (
        "step surgery",
        "return g_r + g_f, forget_only",
        "return g_r - g_f, forget_only",
    ),
    "the statistics of no surgery change places": (
        "step surgery",
        "forget_only(g_f, g_r)[1]",
        "forget_only(g_r, g_f)[1]",
    ),
    "the names of the surgeries change places": (
        "step surgery",
        '"forget": forget_only, "both": pcgrad',
        '"forget": pcgrad, "both": forget_only',
    ),
    "timesteps in one stratum": ("sample_timesteps", "(torch.arange(n) + u) / n", "u / n"),
    "strata twice too wide": (
        "sample_timesteps",
        "u = (torch.arange(n) + u) / n",
        "u = (torch.arange(n) + 2 * u) / (n + 1)",
    ),
    "stratified where it is not asked for": (
        "sample_timesteps",
        "if stratified:",
        "if not stratified:",
    ),
    "stratified by default": ("sample_timesteps", "stratified=False):", "stratified=True):"),
    "timesteps up to 500": (
        "sample_timesteps",
        "return (1000 * u).long()",
        "return (500 * u).long()",
    ),
    "timesteps rounded up": (
        "sample_timesteps",
        "return (1000 * u).long()",
        "return (1000 * u).ceil().long()",
    ),
    "timestep 1000 of a schedule of 1000": ("ends", ".long().clamp(max=999)", ".long()"),
    "uniform times of flow matching": ("sample_timesteps", "torch.special.ndtri(u).sigmoid()", "u"),
    "no logit-normal times": (
        "sample_timesteps",
        "torch.special.ndtri(u).sigmoid()",
        "torch.special.ndtri(u)",
    ),
    "no shift": ("sample_timesteps", "(1000 * shift * s / (1 + (shift - 1) * s))", "(1000 * s)"),
    "a shift towards the clean images": (
        "sample_timesteps",
        "(1000 * shift * s / (1 + (shift - 1) * s))",
        "(1000 * s / (shift - (shift - 1) * s))",
    ),
    "times below 1": ("ends", "(shift - 1) * s)).clamp(min=1)", "(shift - 1) * s))"),
    "the same draws in every step": (
        "sample_batch",
        'common.generator(args.seed, "instance_steps", step)',
        'common.generator(args.seed, "instance_steps")',
    ),
    "draws without the seed": (
        "sample_batch",
        'common.generator(args.seed, "instance_steps", step)',
        'common.generator(0, "instance_steps", step)',
    ),
    "the noise of the remember set": (
        "sample_batch",
        'common.generator(args.seed, "instance_steps", step)',
        'common.generator(args.seed, "samples", step)',
    ),
    "indices change places": (
        "sample_batch",
        "return idx_r, idx_s, t, noise",
        "return idx_s, idx_r, t, noise",
    ),
    "random surrogates are the images of the same row": (
        "sample_batch",
        "return idx_r, idx_s, t, noise",
        "return idx_r, idx_r, t, noise",
    ),
    "each rank has all indices": (
        "sample_batch",
        "generator=g)[:, rows].tolist()",
        "generator=g).tolist()",
    ),
    "each rank has the first timesteps": (
        "sample_batch",
        "stratified)[rows].to(device)",
        "stratified)[: len(idx_r)].to(device)",
    ),
    "each rank has the first noise": (
        "sample_batch",
        "torch.randn(n, *x_f.shape[1:], generator=g)[rows]",
        "torch.randn(n, *x_f.shape[1:], generator=g)[: len(idx_r)]",
    ),
    "one noise for all rows": (
        "sample_batch",
        "torch.randn(n, *x_f.shape[1:], generator=g)[rows]",
        "torch.randn(1, *x_f.shape[1:], generator=g).expand(n, -1, -1, -1)[rows]",
    ),
    "the shift of the model is not used": (
        "sample_batch",
        "(n, g, backbone.shift, ",
        "(n, g, None, ",
    ),
    "stratified timesteps are not used": (
        "sample_batch",
        'stratified = args.timestep_sampling == "stratified"',
        "stratified = False",
    ),
    "no earlier images": ("forget_pairs", "if current > 0:", "if False:"),
    "the first image has earlier ones": ("forget_pairs", "if current > 0:", "if current >= 0:"),
    "the current image comes first": ("forget_pairs", "batches.insert(0, [", "batches.append(["),
    "the earlier images include the current one": (
        "forget_pairs",
        "[j % current for j in range",
        "[j % (current + 1) for j in range",
    ),
    "the first of the earlier images alone": (
        "forget_pairs",
        "[j % current for j in range",
        "[0 for j in range",
    ),
    "earlier images in the same rows of every step": (
        "forget_pairs",
        "for j in range(step, step + batch_size)]",
        "for j in range(batch_size)]",
    ),
    "each rank has the first rows": (
        "forget_pairs",
        "for forget_idx in (batch[rows] for batch in batches)",
        "for forget_idx in (batch[: rows.stop - rows.start] for batch in batches)",
    ),
    "the surrogate of the current image for all": (
        "forget_pairs",
        "random[i] if x_s[j] is None else x_s[j]",
        "random[i] if x_s[current] is None else x_s[current]",
    ),
    "one random surrogate for all rows": (
        "forget_pairs",
        "random[i] if x_s[j] is None",
        "random[0] if x_s[j] is None",
    ),
    "the image is its own surrogate": (
        "forget_pairs",
        "pairs.append((x_f[forget_idx], torch.stack(surrogates)))",
        "pairs.append((x_f[forget_idx], x_f[forget_idx]))",
    ),
}


METHOD = (common.REPO / "instance_unlearn.py").read_text()
SCHEDULE = (common.REPO / "backbones.py").read_text().partition("\n# ---- 2. ")[0]


def source_of(line):
    """instance_unlearn.py or section 1 of backbones.py, whichever has the line, and has it once."""
    found = [source for source in (METHOD, SCHEDULE) if line in source]
    assert len(found) == 1 and found[0].count(line) == 1, f"stands elsewhere, or twice: {line}"
    return found[0]


def mutant_of(line, instead):
    """The source of a line with that line changed, as a module."""
    source = source_of(line)
    module = types.ModuleType("mutant")
    module.__file__ = "mutant.py"
    exec(compile(source.replace(line, instead), "mutant.py", "exec"), module.__dict__)
    return module


def assert_caught(check, *args):
    """A mutant must fail by what it computes, and not because it is no Python."""
    with pytest.raises(
        (AssertionError, RuntimeError, LookupError, ValueError, ArithmeticError)
    ) as caught:
        check(*args)
    assert "NotFoundError" not in repr(caught.value) and "NameError" not in repr(caught.value)


def check_all_steps(module):
    for switches in STEPS:
        check_step(module, *switches)


def check_of(name):
    """The check of a mutant's first column."""
    if name == "step":
        return check_all_steps
    return PARTS["ends of the timesteps" if name == "ends" else name]


@pytest.mark.parametrize("name", PURE_MUTANTS)
def test_mutant_is_caught(name):
    checks, line, instead = PURE_MUTANTS[name]
    module = mutant_of(line, instead)
    for check in checks.split():
        assert_caught(check_of(check), module)


def test_source_without_a_change_passes():
    """Or every mutant would be caught for a missing import."""
    method, schedule = (mutant_of(line, line) for line in ("def instance_step(", "def sample_t"))
    for check in PARTS.values():
        check(method)
    check_step(method, *STEPS[0])
    check_timesteps(schedule)
    check_ends_of_the_timesteps(schedule)


# ---- mutants of the training loop ---------------------------------------------------------------

# what is broken: (run of RUNS, the line, what becomes of it)
RUN_MUTANTS = {
    "never distilled in a run": (
        "ddpm, distill",
        "predict_original if is_distilled else None",
        "None",
    ),
    "always distilled": (
        "ddpm",
        'is_distilled = args.remember_loss == "distill"',
        "is_distilled = True",
    ),
    "M_init follows M": (
        "ddpm, distill",
        "        swap_weights(params, originals)\n        prediction",
        "        prediction",
    ),
    "M_init stays in M": (
        "ddpm, distill",
        "        swap_weights(params, originals)\n        return prediction",
        "        return prediction",
    ),
    "a schedule over the whole run": (
        "ddpm",
        "fraction_done = step % args.steps / args.steps",
        "fraction_done = step / total",
    ),
    "a schedule that rises": ("ddpm", "args.lr * (1 - fraction_done)", "args.lr * fraction_done"),
    "a schedule that falls to half": (
        "ddpm",
        "args.lr * (1 - fraction_done)",
        "args.lr * (1 - fraction_done / 2)",
    ),
    "a schedule of the learning rate that is current": (
        "ddpm",
        '["lr"] = args.lr * (1 - fraction_done)',
        '["lr"] *= 1 - fraction_done',
    ),
    "constant where linear is asked for": (
        "ddpm",
        'if args.lr_scheduler == "linear":',
        "if False:",
    ),
    "linear where constant is asked for": (
        "ddpm, constant",
        'if args.lr_scheduler == "linear":',
        "if True:",
    ),
    "weight decay": ("ddpm", "lr=args.lr, weight_decay=0,", "lr=args.lr, weight_decay=5,"),
    "other moments": ("ddpm", "weight_decay=0, fused=True", "weight_decay=0, betas=(0.5, 0.999)"),
    "no step of the optimizer": ("ddpm", "            optimizer.step()\n", ""),
    "the images to forget alternate": (
        "ddpm",
        "current = step // args.steps",
        "current = step % len(x_f)",
    ),
    "the first image alone": ("ddpm", "current = step // args.steps", "current = 0"),
    "half of the steps": (
        "ddpm",
        "total = args.steps * len(x_f)",
        "total = args.steps * len(x_f) // 2",
    ),
    "the noise level of another row": (
        "ddpm",
        "coefficients(t, backbone.alpha_bar)",
        "coefficients(t.flip(0), backbone.alpha_bar)",
    ),
    "a and b change places": ("ddpm", "a, b = coefficients(t, back", "b, a = coefficients(t, back"),
    "the other indices for x_r": ("ddpm", "remember_batch(idx_r)", "remember_batch(idx_s)"),
    "x_r for the random surrogates": (
        "ddpm",
        "random = remember_batch(idx_s)",
        "random = remember_batch(idx_r)",
    ),
    "lambda of another row": (
        "ddpm",
        "lambda_t(t, args.beta, args.constant_lambda)",
        "lambda_t(t.flip(0), args.beta, args.constant_lambda)",
    ),
    "the constant lambda is not used": (
        "ddpm, constant",
        "lambda_t(t, args.beta, args.constant_lambda)",
        "lambda_t(t, args.beta)",
    ),
    "always noise predictions": (
        "sd3",
        "                backbone.prediction_type,\n",
        '                "epsilon",\n',
    ),
    "always Eq. 13": (
        "ddpm, no surgery",
        "                args.surgery,\n",
        '                "forget",\n',
    ),
    "the gradient is negated": ("ddpm", "write_grad(params, g)", "write_grad(params, -g)"),
    "the gradient is rescaled": (
        "ddpm",
        "write_grad(params, g)",
        "write_grad(params, g / g.norm())",
    ),
    "the empty prompt": (
        "sd",
        'condition = conditions[args.prompt or ""]\n    train(',
        'condition = conditions[""]\n    train(',
    ),
    "the log counts images by 1": (
        "ddpm",
        '"image": j // args.steps',
        '"image": 1 + j // args.steps',
    ),
    "the log misses a step": (
        "ddpm",
        "enumerate(rows, step + 1 - len(recent))",
        "enumerate(rows, step)",
    ),
    "the LoRA has another seed": (
        "sd",
        "backbone.trainable_weights(method, args.rank, args.seed)",
        "backbone.trainable_weights(method, args.rank, 0)",
    ),
    "flipped latents for a flipped image": (
        "sd",
        "return backbone.encode(backbone.decode(x).flip(-1))[0]",
        "return x[0].flip(-1)",
    ),
    "one surrogate for all images": (
        "ddpm",
        "x_s.append(make_surrogate(kind, x_f[k], k, *how))",
        "x_s.append(make_surrogate(args.surrogate[0], x_f[k], k, *how))",
    ),
    "the image to forget is remembered": (
        "ddpm",
        "        if not (is_near and ",
        "        if True or not (is_near and ",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN_MUTANTS)
def test_mutant_of_the_run_is_caught(folders, name):
    run, line, instead = RUN_MUTANTS[name]
    assert_caught(check_run, mutant_of(line, instead), folders, run)


def test_every_mutant_changes_one_line_that_exists():
    for name, (_, line, instead) in (PURE_MUTANTS | RUN_MUTANTS).items():
        assert source_of(line) and line != instead, name
        assert re.search(r"\S", line), name
