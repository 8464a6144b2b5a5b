"""doco_step() and its helpers, recomputed sample by sample from the equations; and broken copies.

The networks are small, in torch alone and in double precision. `check_step` compares everything
that doco_step returns with a second computation that shares no line with it; `check_optimizer_step`
does so for optimizer_step. Then one line of the method at a time is changed, and each of these
mutants must fail one of the two checks.
"""

import copy
import re
import types
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import nn

import backbones
import common
import doco
import gradsurgery
from discriminator import patchgan

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# Seeds of make_problem whose two gradients conflict, and agree.
CONFLICT, AGREEMENT = 0, 6


# ---- a small problem ----------------------------------------------------------------------------


class SmallUNet(nn.Module):
    """A U-Net of two resolutions with cross-attention: x_t, t, (B, 3, 8) of a prompt -> eps."""

    def __init__(self):
        super().__init__()
        self.time = nn.Linear(8, 16)
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 4, stride=2, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.to_q = nn.Linear(16, 16)
        self.to_k = nn.Linear(8, 16)
        self.to_v = nn.Linear(8, 16)
        self.up = nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1)
        self.conv_out = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, xt, t, prompt):
        """(B, 4, h, w), (B,), (B, 3, 8) -> (B, 4, h, w)."""
        angles = t.view(-1, 1) / 1000 * torch.arange(1, 9, dtype=xt.dtype)
        skip = self.conv_in(xt)
        time = self.time(angles.sin())[:, :, None, None]
        h = self.norm(self.down(F.silu(skip))) + time
        tokens = h.flatten(2).transpose(1, 2)  # (B, h w / 4, 16)
        attention = (self.to_q(tokens) @ self.to_k(prompt).transpose(1, 2) / 4).softmax(-1)
        tokens = tokens + 3 * attention @ self.to_v(prompt)
        h = F.silu(tokens.transpose(1, 2).view_as(h))
        return self.conv_out(torch.cat([skip, self.up(h)], dim=1))


Problem = namedtuple("Problem", "net original disc params alpha_bar batch_f batch_r")


def make_problem(module, seed, stride=20):
    """Networks and batches of three samples each; the batches are of the module's own types."""
    torch.manual_seed(seed)
    original = SmallUNet().double().requires_grad_(False)
    net = copy.deepcopy(original)
    params = [*net.to_k.parameters(), *net.to_v.parameters()]
    for p in params:
        p.add_(0.3 * torch.randn_like(p)).requires_grad_()
    disc = patchgan(16, width=16).double()
    with torch.no_grad():
        disc[-1].weight.mul_(5)  # an untrained D gives all patches about the same logit
    alpha_bar = DDPMScheduler(**SCHEDULE).alphas_cumprod.double()
    x0, noise, posterior_noise, x0_r, noise_r = torch.randn(5, 3, 4, 16, 16).double()
    anchor, target, retained = torch.randn(3, 3, 3, 8).double()
    t = torch.tensor([stride - 1, stride, 700])  # x_{t-stride}: x_0 itself, timestep 0, usual
    t_r = torch.tensor([30, 400, 990])
    batch_f = module.ForgetBatch(x0, noise, t, anchor, target, posterior_noise)
    batch_r = module.RetainBatch(x0_r, noise_r, t_r, retained, torch.cat([anchor, retained]))
    return Problem(net, original, disc, params, alpha_bar, batch_f, batch_r)


def flat(tensors):
    """One vector of all the numbers, a copy."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def close(got, expected, what):
    """Equal up to rounding: flat_grad and write_grad compute in single precision."""
    expected = torch.as_tensor(expected).to(got.dtype)
    atol = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=atol, msg=lambda m: f"{what}: {m}")


# ---- the second computation ---------------------------------------------------------------------


def noised(problem, x0, noise, t, kind):
    """x_t of a sample and what the network should predict there, by what it predicts."""
    if kind == "flow":
        s = t.double() / 1000
        return (1 - s) * x0 + s * noise, noise - x0
    a = problem.alpha_bar[t]
    xt = a.sqrt() * x0 + (1 - a).sqrt() * noise  # Eq. 1
    return xt, noise if kind == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * x0


def shown_to_d(problem, b, xt, pred, disc_input, stride, kind):
    """What D is shown of sample b, (4, h, w): x0_hat, or the posterior sample in DDPM's words."""
    t = int(problem.batch_f.t[b])
    if kind == "flow":
        return xt - t / 1000 * pred
    a = problem.alpha_bar[t]
    # v = sqrt(a) eps - sqrt(1 - a) x_0 and x_t are a rotation of eps and x_0
    eps = pred if kind == "epsilon" else a.sqrt() * pred + (1 - a).sqrt() * xt
    x0_hat = (xt - (1 - a).sqrt() * eps) / a.sqrt()
    if disc_input == "x0":
        return x0_hat
    a_s = problem.alpha_bar[t - stride] if t >= stride else torch.tensor(1.0)
    beta = 1 - a / a_s
    mean_x0 = a_s.sqrt() * beta / (1 - a) * x0_hat
    mean_xt = (a / a_s).sqrt() * (1 - a_s) / (1 - a) * xt
    sigma = ((1 - a_s) / (1 - a) * beta).sqrt()
    return mean_x0 + mean_xt + sigma * problem.batch_f.posterior_noise[b]


def recompute(
    problem,
    prediction_type,
    lam,
    disc_input,
    stride,
    retain,
    retain_weight,
    project,
    train_model,
):
    """G, G_r, the gradient of D, G_u . G_r and all statistics, by a loop over the samples."""
    net, original, disc, params, _, batch_f, batch_r = problem
    loss_u, loss_d, loss_r, hits = 0, 0, 0, []
    for b in range(3):
        one = slice(b, b + 1)
        how = (disc_input, stride, prediction_type)
        xt, _ = noised(problem, batch_f.x0[b], batch_f.noise[b], batch_f.t[b], prediction_type)
        with torch.no_grad():
            of_anchor = original(xt[None], batch_f.t[one], batch_f.anchor[one])[0]  # Eq. 5
        of_target = net(xt[None], batch_f.t[one], batch_f.target[one])[0]
        shown_anchor = shown_to_d(problem, b, xt, of_anchor, *how)[None]
        shown_target = shown_to_d(problem, b, xt, of_target, *how)[None]
        p_anchor = torch.sigmoid(disc(shown_anchor))  # patch by patch, "is the anchor"
        p_target = torch.sigmoid(disc(shown_target.detach()))
        loss_d = loss_d - (p_anchor.log() + (1 - p_target).log()).mean() / 3  # Eq. 8, max over D
        loss_u = loss_u - torch.sigmoid(disc(shown_target)).log().mean() / 3  # Eq. 8, min over M
        hits += [(p_anchor > 0.5).double().mean(), (p_target < 0.5).double().mean()]

        xt_r, aim = noised(  # Eq. 9
            problem, batch_r.x0[b], batch_r.noise[b], batch_r.t[b], prediction_type
        )
        pred_r = net(xt_r[None], batch_r.t[one], batch_r.retained[one])[0]
        if retain == "distill":
            with torch.no_grad():
                aim = original(xt_r[None], batch_r.t[one], batch_r.retained[one])[0]
        loss_r = loss_r + (aim - pred_r).square().mean() / 3

    g_d = flat(torch.autograd.grad(loss_d, disc.parameters()))
    g_u = flat(torch.autograd.grad(loss_u, params))
    g_r = flat(torch.autograd.grad(loss_r, params))
    dot = (g_u @ g_r).item()
    g = g_u
    if retain == "l2":
        g = g_u + g_r
    if retain in ("cp", "distill") and project == "gradient" and dot < 0:
        g = g_u - lam * dot / (g_r @ g_r) * g_r  # Eq. 10
    if retain == "distill":
        g = g + retain_weight * g.norm() * g_r / g_r.norm()  # both of one length

    stats = {"loss_d": loss_d, "disc_acc": sum(hits) / 6}
    if train_model:
        stats |= {"loss_u": loss_u, "norm_g": g.norm()}
    if train_model and retain != "none":
        norm_f, norm_r = g_u.norm(), g_r.norm()
        stats |= {"loss_r": loss_r, "norm_f": norm_f, "norm_r": norm_r}
        stats |= {"cos": dot / (norm_f * norm_r), "conflict": float(dot < 0)}
        stats["share_r"] = (g - g_u).norm() / g.norm()
    return g, g_r, g_d, dot, {name: torch.as_tensor(v).detach() for name, v in stats.items()}


def one_by_one(batch_f, batch_r):
    """Three micro-batches of one sample each."""
    both = batch_r.anchor_and_retained
    parts = []
    for b in range(3):
        one = slice(b, b + 1)
        retain = [x[one] for x in batch_r[:4]]
        parts.append(
            (
                type(batch_f)(*(x[one] for x in batch_f)),
                type(batch_r)(*retain, torch.cat([both[one], both[b + 3 : b + 4]])),
            )
        )
    return parts


def check_step(module, seed=CONFLICT, stride=20, micro_batches=False, **switches):
    """Raises AssertionError where doco_step of a module is not the equations. Returns G_u . G_r."""
    problem = make_problem(module, seed, stride)
    net, original, disc, params, alpha_bar, batch_f, batch_r = problem
    passes = []  # (network, is a graph built), in the order of the passes

    def predict(xt, t, condition):
        passes.append(("M", torch.is_grad_enabled()))
        return net(xt, t, condition)

    def predict_original(xt, t, condition):
        passes.append(("M_init", torch.is_grad_enabled()))
        return original(xt, t, condition)

    inputs_of_d = []
    disc.register_forward_pre_hook(lambda _, inputs: inputs_of_d.append(inputs[0]))
    before = flat([*net.parameters(), *original.parameters(), *disc.parameters()])
    used = {"lam": 1.0, "disc_input": "x0", "retain": "cp", "project": "gradient"}
    used |= {"train_model": True, "stride": stride, "retain_weight": 1.0}
    used |= {"prediction_type": "epsilon"} | switches
    retained = used["train_model"] and used["retain"] != "none"
    batches = one_by_one(batch_f, batch_r) if micro_batches else [(batch_f, batch_r)]
    if not retained:  # then it is not looked at
        batches = [(forget, None) for forget, _ in batches]
    update = module.doco_step(
        predict,
        predict_original,
        disc,
        params,
        None if used["prediction_type"] == "flow" else alpha_bar,
        batches,
        **used,
    )

    # The order of the passes is the memory: L_r's graph is freed before the next one is built. No
    # graph of M_init, which is M with other weights in it; none of M in the warm-up. M_init runs
    # once, also where it has two things to say.
    wanted = [("M_init", False), *[("M", True)] * retained, ("M", used["train_model"])]
    assert passes == wanted * len(batches), f"passes: {passes}"
    of_d_half = inputs_of_d[-2:]
    assert len(inputs_of_d) == (2 + used["train_model"]) * len(batches), "passes of D"
    assert not any(x.requires_grad for x in of_d_half), "D's half holds a graph of M"

    # No weight has changed, and no gradient is left behind.
    everything = [*net.parameters(), *original.parameters(), *disc.parameters()]
    assert torch.equal(before, flat(everything)), "a weight has changed"
    assert all(p.grad is None for p in everything), "a gradient is left"

    g, g_r, g_d, dot, stats = recompute(problem, **used)
    close(update.g_d, g_d, "gradient of D")
    if used["train_model"]:
        close(update.g, g, "gradient of M")
    else:
        assert update.g is None, "the warm-up has a gradient of M"
    if retained:
        close(update.g_r, g_r, "G_r")
    else:
        assert update.g_r is None, "G_r without retention"
    assert update.stats.keys() == stats.keys(), f"statistics: {sorted(update.stats)}"
    for name, value in stats.items():
        assert update.stats[name].dim() == 0 and not update.stats[name].requires_grad, name
        close(update.stats[name], value, name)
    return dot


def check_optimizer_step(module, retained=True, lam=1.0, project=False):
    """Raises AssertionError unless two of the module's optimizer steps are AdamW's, or projected.

    AdamW is written out: Loshchilov & Hutter 2019, Algorithm 2. Returns the cosines, step by step.
    """
    torch.manual_seed(0)
    params = [torch.randn(3, 2).requires_grad_(), torch.randn(4).requires_grad_()]
    lr, decay = 1e-2, 0.1
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=decay)
    values, m, v, cosines = flat(params), 0, 0, []
    # The second step is along another gradient: it keeps momentum of the first, which is projected
    # for its own G_r alone. G_r of the first step agrees with it, that of the second does not.
    gradients = torch.randn(2, 10)
    signs = (1, -1)
    for k, (g, sign) in enumerate(zip(gradients, signs, strict=True), 1):
        g_r = sign * g.sign() + 0.1
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        adam = (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8)
        step = lr * decay * values + lr * adam
        dot = step @ g_r
        cos = dot / (step.norm() * g_r.norm())
        if project and dot < 0:
            step = step - lam * dot / (g_r @ g_r) * g_r  # Eq. 10, of the step
        values = values - step
        measured = module.optimizer_step(
            optimizer, params, g, g_r if retained else None, lam, project
        )
        torch.testing.assert_close(flat(params), values, rtol=0, atol=1e-6)
        assert all(p.grad is None for p in params), "a gradient is left in memory"
        if retained:
            close(measured, cos, "cosine of the step and G_r")
            cosines.append(cos.item())
        else:
            assert measured is None
    return cosines


# ---- the checks on the code as it is ------------------------------------------------------------

STEP_SWITCHES = {
    "paper": {},
    "agreement": {"seed": AGREEMENT},
    "lambda 0.5": {"lam": 0.5},
    "lambda 0": {"lam": 0.0},
    "no retention": {"retain": "none"},
    "l2": {"retain": "l2"},
    "distill": {"retain": "distill"},
    "distill, agreement": {"retain": "distill", "seed": AGREEMENT},
    "distill, lambda 0.5, weight 0.3": {"retain": "distill", "lam": 0.5, "retain_weight": 0.3},
    "distill, x_{t-20}": {"retain": "distill", "disc_input": "xprev"},
    "distill, warm-up": {"retain": "distill", "train_model": False},
    "distill, project the step": {"retain": "distill", "project": "step"},
    "x_{t-20}": {"disc_input": "xprev"},
    "x_{t-1}": {"disc_input": "xprev", "stride": 1},
    "x_{t-650}": {"disc_input": "xprev", "stride": 650},
    "project the step": {"project": "step"},
    "project the step, lambda 0.5": {"project": "step", "lam": 0.5},
    "v-prediction": {"prediction_type": "v_prediction"},
    "v-prediction, x_{t-20}": {"prediction_type": "v_prediction", "disc_input": "xprev"},
    "v-prediction, distill": {"prediction_type": "v_prediction", "retain": "distill"},
    "flow": {"prediction_type": "flow"},
    "flow, agreement": {"prediction_type": "flow", "seed": AGREEMENT},
    "flow, distill": {"prediction_type": "flow", "retain": "distill"},
    "micro-batches": {"micro_batches": True},
    "micro-batches, agreement": {"micro_batches": True, "seed": AGREEMENT},
    "micro-batches, distill": {"micro_batches": True, "retain": "distill"},
    "micro-batches, warm-up": {"micro_batches": True, "train_model": False},
    "flow, warm-up": {"prediction_type": "flow", "train_model": False},
    "warm-up": {"train_model": False},
    "warm-up, x_{t-20}": {"train_model": False, "disc_input": "xprev"},
    "warm-up, no retention": {"train_model": False, "retain": "none"},
}
OPTIMIZER_SWITCHES = {
    "measured": {},
    "not measured": {"retained": False},
    "projected": {"project": True},
    "projected, lambda 0.5": {"project": True, "lam": 0.5},
}


@pytest.mark.parametrize("name", STEP_SWITCHES)
def test_step_by_hand(name):
    check_step(doco, **STEP_SWITCHES[name])


def test_there_is_a_conflict_and_an_agreement():
    """Otherwise the two cases of Eq. 10 would not be told apart above."""
    assert check_step(doco) < 0 < check_step(doco, seed=AGREEMENT)
    conflict = check_step(doco, retain="distill")
    assert conflict < 0 < check_step(doco, retain="distill", seed=AGREEMENT)


@pytest.mark.parametrize("name", OPTIMIZER_SWITCHES)
def test_optimizer_step_by_hand(name):
    check_optimizer_step(doco, **OPTIMIZER_SWITCHES[name])


def test_the_step_agrees_once_and_conflicts_once():
    first, second = check_optimizer_step(doco)
    assert first > 0.1 and second < -0.1


def test_eq_10_leaves_nothing_that_conflicts():
    """By the definition, not by the formula: afterwards G . G_r = 0; for lambda = 2 it is > 0."""
    problem = make_problem(doco, CONFLICT)
    net, original, disc, params, alpha_bar, batch_f, batch_r = problem
    dots = []
    for lam in (0.0, 1.0, 2.0):
        update = doco.doco_step(
            net, original, disc, params, alpha_bar, [(batch_f, batch_r)], lam=lam
        )
        dots.append((update.g @ update.g_r / update.g.norm() / update.g_r.norm()).item())
    assert dots[0] < -1e-2 and abs(dots[1]) < 1e-5 and dots[2] > 1e-2


def test_distillation_has_nothing_to_say_before_anything_is_lost():
    """Where M is M_init, G_r is 0 and G is G_u; that of Eq. 9 is all noise there.

    Without Eq. 10, which would project along whatever direction rounding has left of G_r.
    """
    problem = make_problem(doco, CONFLICT)
    _, net, disc, _, alpha_bar, batch_f, batch_r = problem
    params = [p.requires_grad_() for p in (*net.to_k.parameters(), *net.to_v.parameters())]
    step = (net, net, disc, params, alpha_bar, [(batch_f, batch_r)])
    distilled = doco.doco_step(*step, retain="distill", project="step")
    plain = doco.doco_step(*step, retain="none")
    assert distilled.g_r.norm() < 1e-6 * doco.doco_step(*step).g_r.norm()
    close(distilled.g, plain.g, "G")
    assert distilled.stats["share_r"] < 1e-3


def test_the_share_of_retention_is_small_for_cp_and_large_for_distill():
    """What the log says about it: Eq. 10 takes off a part of G_u, distillation adds its length."""
    assert check_step(doco) < 0
    net, original, disc, params, alpha_bar, batch_f, batch_r = make_problem(doco, CONFLICT)
    step = (net, original, disc, params, alpha_bar, [(batch_f, batch_r)])
    shares = {r: doco.doco_step(*step, retain=r).stats["share_r"] for r in ("cp", "distill")}
    assert 0 < shares["cp"] < 0.5 < shares["distill"]


def test_a_batch_repeated_is_the_same_step():
    """Losses are means over the batch."""
    net, original, disc, params, alpha_bar, batch_f, batch_r = make_problem(doco, CONFLICT)
    networks = (net, original, disc, params, alpha_bar)
    once = doco.doco_step(*networks, [(batch_f, batch_r)])
    batch_f = doco.ForgetBatch(*(torch.cat([x, x]) for x in batch_f))
    batch_r = doco.RetainBatch(*(torch.cat([x, x]) for x in batch_r[:4]))
    twice = doco.doco_step(*networks, [(batch_f, batch_r)])
    close(twice.g, once.g, "gradient of M")
    close(twice.g_d, once.g_d, "gradient of D")


# ---- the helpers --------------------------------------------------------------------------------


def test_noise_and_inputs_of_d_agree_with_diffusers():
    scheduler = DDPMScheduler(**SCHEDULE, clip_sample=False)
    torch.manual_seed(0)
    x0, noise, eps = torch.randn(3, 3, 4, 8, 8)
    t = torch.tensor([980, 500, 20])
    alpha_bar = scheduler.alphas_cumprod
    a_t = alpha_bar[t].view(-1, 1, 1, 1)
    xt = a_t.sqrt() * x0 + (1 - a_t).sqrt() * noise
    torch.testing.assert_close(xt, scheduler.add_noise(x0, noise, t))
    for stride in (1, 20):
        scheduler.set_timesteps(1000 // stride)
        for i, timestep in enumerate(t):
            one = slice(i, i + 1)
            posterior_noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
            theirs = scheduler.step(
                eps[one], timestep, xt[one], generator=torch.Generator().manual_seed(7)
            )
            ours = ("epsilon", xt[one], t[one], alpha_bar, stride, posterior_noise)
            x0_hat = doco.discriminator_input(eps[one], "x0", *ours)
            xprev = doco.discriminator_input(eps[one], "xprev", *ours)
            tolerance = {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(x0_hat, theirs.pred_original_sample, **tolerance)
            torch.testing.assert_close(xprev, theirs.prev_sample, **tolerance)


def test_last_step_of_xprev_is_the_clean_latent():
    torch.manual_seed(0)
    xt, x0_hat, noise = torch.randn(3, 1, 4, 8, 8)
    a = torch.full((1, 1, 1, 1), 0.9)
    got = doco.posterior_sample(xt, x0_hat, a, torch.ones_like(a), noise)
    torch.testing.assert_close(got, x0_hat)


def test_losses_by_hand_and_without_overflow():
    anchor = torch.full((2, 1, 2, 2), 0.5)
    target = torch.full((2, 1, 2, 2), -1.5)
    p_anchor, p_target = torch.sigmoid(torch.tensor([0.5, -1.5]))
    loss_d = doco.loss_discriminator(anchor, target)
    torch.testing.assert_close(loss_d, -p_anchor.log() - (1 - p_target).log())
    torch.testing.assert_close(doco.loss_unlearn(target), -p_target.log())
    sure = torch.full((1, 1, 2, 2), 1e4)
    assert doco.loss_discriminator(-sure, sure).item() == 2e4
    assert doco.loss_unlearn(-sure).item() == 1e4


def test_where_d_is_sure_the_model_still_learns():
    """Why the non-saturating form: the paper's own has no gradient where D is sure."""
    logits = torch.full((1, 1, 2, 2), -20.0, requires_grad=True)
    ours = torch.autograd.grad(doco.loss_unlearn(logits), logits)[0].norm()
    saturating = torch.log(1 - torch.sigmoid(logits)).mean()
    papers = torch.autograd.grad(saturating, logits)[0].norm()
    assert papers < 1e-8 < 0.1 < ours


def test_swap_exchanges_the_weights_bitwise_and_flatten_is_a_copy():
    net = SmallUNet()
    params = list(net.to_k.parameters())
    originals = [torch.randn_like(p) for p in params]
    trained, other = doco.flatten(params), doco.flatten(originals)
    doco.swap_weights(params, originals)
    assert torch.equal(doco.flatten(params), other)
    assert torch.equal(doco.flatten(originals), trained)
    doco.swap_weights(params, originals)
    assert torch.equal(doco.flatten(params), trained)
    for p, value in zip(params, doco.unflatten(other, params), strict=True):
        p.data.copy_(value)
    assert torch.equal(doco.flatten(params), other) and not torch.equal(trained, other)


# ---- two processes ------------------------------------------------------------------------------


def step_of_a_rank(rank, folder):
    """Each of two ranks computes its own part of a batch of four, and saves the gradients."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.save(gradients_of_four(slice(2 * rank, 2 * rank + 2)), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def gradients_of_four(rows):
    """(G, gradient of D), of some rows of a fixed batch of four."""
    net, original, disc, params, alpha_bar, batch_f, batch_r = make_problem(doco, CONFLICT)
    four = [0, 1, 2, 2]  # the last sample twice
    batch_f = doco.ForgetBatch(*(x[four][rows] for x in batch_f))
    batch_r = doco.RetainBatch(*(x[four][rows] for x in batch_r[:4]))
    update = doco.doco_step(net, original, disc, params, alpha_bar, [(batch_f, batch_r)])
    return update.g, update.g_d


@pytest.mark.slow
def test_two_ranks_compute_the_step_of_the_whole_batch(tmp_path):
    """Averaged before the projection, which is not linear; and D's gradient is averaged too."""
    torch.multiprocessing.spawn(step_of_a_rank, args=(tmp_path,), nprocs=2)
    whole = gradients_of_four(slice(0, 4))
    for rank in range(2):
        part = torch.load(tmp_path / f"{rank}.pt")
        close(part[0], whole[0], "gradient of M")
        close(part[1], whole[1], "gradient of D")


# ---- mutants: one line of the method changed, and a check above fails ---------------------------

# name: (switch, line of section 1 of doco.py, what becomes of it). Each line is there once.
MUTANTS = {
    "the coefficients of Eq. 1 are swapped": (
        "paper",
        "xt = a * batch_f.x0 + b * batch_f.noise",
        "xt = b * batch_f.x0 + a * batch_f.noise",
    ),
    "Eq. 1 of L_r with swapped coefficients": (
        "paper",
        "xt_r = a_r * batch_r.x0 + b_r * batch_r.noise",
        "xt_r = b_r * batch_r.x0 + a_r * batch_r.noise",
    ),
    "x0_hat is of another prediction": (
        "flow",
        "predict_x0(prediction_type, prediction, xt, a, b)",
        'predict_x0("epsilon", prediction, xt, a, b)',
    ),
    "x0_hat is the noise": (
        "v-prediction",
        "predict_x0(prediction_type, prediction, xt, a, b)",
        "predict_x0(prediction_type, prediction, xt, b, a)",
    ),
    "D is told to see another prediction": (
        "flow",
        "how = (disc_input, prediction_type, xt",
        'how = (disc_input, "epsilon", xt',
    ),
    "L_r aims at the noise of a velocity": (
        "flow",
        "prediction_target(prediction_type, batch_r.x0",
        'prediction_target("epsilon", batch_r.x0',
    ),
    "L_r aims with swapped coefficients": (
        "v-prediction",
        "batch_r.noise, a_r, b_r)",
        "batch_r.noise, b_r, a_r)",
    ),
    "micro-batches are summed": ("micro-batches", "value /= len(batches)", "pass"),
    "the last micro-batch alone": (
        "micro-batches",
        "means[name] = means[name].add_(value) if name in means else value",
        "means[name] = value",
    ),
    "the first micro-batch alone": ("micro-batches", "means[name].add_(value)", "means[name]"),
    "the posterior's alpha is that of x_t": (
        "x_{t-20}",
        "alpha = alpha_bar_t / alpha_bar_prev",
        "alpha = alpha_bar_t",
    ),
    "the posterior's variance as its deviation": (
        "x_{t-20}",
        "variance.sqrt() * noise",
        "variance * noise",
    ),
    "no noise in x_{t-20}": (
        "x_{t-20}",
        "+ variance.sqrt() * noise",
        "",
    ),
    "the posterior's weights are swapped": (
        "x_{t-20}",
        "alpha.sqrt() * (1 - alpha_bar_prev) * xt",
        "alpha.sqrt() * (1 - alpha_bar_t) * xt",
    ),
    "D is always shown x0_hat": ("x_{t-20}", 'if kind == "x0":', "if True:"),
    "D is never shown x0_hat": ("paper", 'if kind == "x0":', "if False:"),
    "the stride is not used": (
        "x_{t-20}",
        "alpha_bar[(t - stride).clamp(min=0)]",
        "alpha_bar[(t - 1).clamp(min=0)]",
    ),
    "below timestep 0, the list is read from its end": (
        "x_{t-650}",
        "torch.where(t < stride, 1.0, alpha_bar_prev)",
        "alpha_bar[t - stride]",
    ),
    "timestep 0 is without noise": ("x_{t-20}", "t < stride, 1.0", "t <= stride, 1.0"),
    "noise below timestep 0": ("x_{t-650}", "t < stride, 1.0", "t < stride, alpha_bar[0]"),
    "D's labels are swapped": (
        "paper",
        "F.softplus(-logits_anchor).mean() + F.softplus(logits_target).mean()",
        "F.softplus(logits_anchor).mean() + F.softplus(-logits_target).mean()",
    ),
    "D's loss is half as large": (
        "paper",
        "F.softplus(-logits_anchor).mean() + F.softplus(logits_target).mean()",
        "(F.softplus(-logits_anchor).mean() + F.softplus(logits_target).mean()) / 2",
    ),
    "M wants to be told apart": (
        "paper",
        "return F.softplus(-logits_target).mean()",
        "return F.softplus(logits_target).mean()",
    ),
    "M's loss is the saturating one": (
        "paper",
        "return F.softplus(-logits_target).mean()",
        "return -F.softplus(logits_target).mean()",
    ),
    "retention in the warm-up": (
        "warm-up",
        'retaining = train_model and retain != "none"',
        'retaining = retain != "none"',
    ),
    "retention in the ablation without": (
        "no retention",
        'retaining = train_model and retain != "none"',
        "retaining = train_model",
    ),
    "distill is cp": ("distill", 'if retaining and retain == "distill":', "if False:"),
    "distill aims at the noise": (
        "distill",
        "            pred_anchor, target_r = both.chunk(2)",
        "            pred_anchor, target_r = both.chunk(2)[0], batch_r.noise",
    ),
    "distill changes anchor and target": (
        "distill",
        "pred_anchor, target_r = both.chunk(2)",
        "target_r, pred_anchor = both.chunk(2)",
    ),
    "distill at the forget batch": (
        "distill",
        "torch.cat([xt, xt_r])",
        "torch.cat([xt, xt])",
    ),
    "distill at the other timesteps": (
        "distill",
        "torch.cat([batch_f.t, batch_r.t])",
        "torch.cat([batch_f.t, batch_f.t])",
    ),
    "distill from M": (
        "distill",
        "both = predict_original(",
        "both = predict(",
    ),
    "cp is distilled": (
        "paper",
        "batch_r.noise, a_r, b_r)  # eps",
        "batch_r.noise, a_r, b_r) * 0 + predict_original(xt_r, batch_r.t, batch_r.retained)",
    ),
    "distill adds nothing": ("distill", '    if retain == "distill":', "    if False:"),
    "distill adds to G_u": (
        "distill",
        "normalized_sum(g, g_r, retain_weight)",
        "normalized_sum(g_u, g_r, retain_weight)",
    ),
    "distill at one weight": (
        "distill, lambda 0.5, weight 0.3",
        "normalized_sum(g, g_r, retain_weight)",
        "normalized_sum(g, g_r)",
    ),
    "distill changes the gradients": (
        "distill, lambda 0.5, weight 0.3",
        "normalized_sum(g, g_r, retain_weight)",
        "normalized_sum(g_r, g, retain_weight)",
    ),
    "distill climbs": (
        "distill",
        "normalized_sum(g, g_r, retain_weight)",
        "normalized_sum(g, g_r, -retain_weight)",
    ),
    "the share is that of G_r": (
        "distill",
        "norm(g - g_u) / norm(g)",
        "norm(g_r) / norm(g)",
    ),
    "distill's weight is not passed on": (
        "distill, lambda 0.5, weight 0.3",
        "combine_gradients(g_u, g_r, retain, lam, retain_weight, project)",
        "combine_gradients(g_u, g_r, retain, lam, 1.0, project)",
    ),
    "L_r has the other images": (
        "paper",
        "a_r * batch_r.x0 + b_r * batch_r.noise",
        "a_r * batch_f.x0 + b_r * batch_r.noise",
    ),
    "L_r has the other noise": (
        "paper",
        "a_r * batch_r.x0 + b_r * batch_r.noise",
        "a_r * batch_r.x0 + b_r * batch_f.noise",
    ),
    "L_r has the other noise level": (
        "paper",
        "coefficients(batch_r.t, alpha_bar)",
        "coefficients(batch_f.t, alpha_bar)",
    ),
    "L_r is told the other timestep": (
        "paper",
        "predict(xt_r, batch_r.t, batch_r.retained)",
        "predict(xt_r, batch_f.t, batch_r.retained)",
    ),
    "L_r has the other anchor prompts": (
        "paper",
        "predict(xt_r, batch_r.t, batch_r.retained)",
        "predict(xt_r, batch_r.t, batch_f.anchor)",
    ),
    "L_r has the target's prompts": (
        "paper",
        "predict(xt_r, batch_r.t, batch_r.retained)",
        "predict(xt_r, batch_r.t, batch_f.target)",
    ),
    "L_r aims at the other noise": (
        "paper",
        "batch_r.x0, batch_r.noise, a_r",
        "batch_r.x0, batch_f.noise, a_r",
    ),
    "L_r aims at the image": (
        "paper",
        "batch_r.x0, batch_r.noise, a_r",
        "batch_r.noise, batch_r.x0, a_r",
    ),
    "L_r is M_init's": (
        "paper",
        "pred_r = predict(xt_r",
        "pred_r = predict_original(xt_r",
    ),
    "L_r is a sum": (
        "paper",
        "F.mse_loss(pred_r, target_r)",
        'F.mse_loss(pred_r, target_r, reduction="sum")',
    ),
    "G_r is negative": (
        "paper",
        'result["g_r"] = flat_grad(loss_r, params)',
        'result["g_r"] = -flat_grad(loss_r, params)',
    ),
    "x_t is of the retain images": (
        "paper",
        "a * batch_f.x0 + b * batch_f.noise",
        "a * batch_r.x0 + b * batch_f.noise",
    ),
    "x_t has the other noise": (
        "paper",
        "a * batch_f.x0 + b * batch_f.noise",
        "a * batch_f.x0 + b * batch_r.noise",
    ),
    "x_t has the other noise level": (
        "paper",
        "coefficients(batch_f.t, alpha_bar)",
        "coefficients(batch_r.t, alpha_bar)",
    ),
    "D is shown the other timestep": (
        "paper",
        "xt, batch_f.t, alpha_bar, stride",
        "xt, batch_r.t, alpha_bar, stride",
    ),
    "the posterior sample has the noise of x_t": (
        "x_{t-1}",
        "batch_f.t, alpha_bar, stride, batch_f.posterior_noise)",
        "batch_f.t, alpha_bar, stride, batch_f.noise)",
    ),
    "M_init is M": (
        "paper",
        "pred_anchor = predict_original(xt",
        "pred_anchor = predict(xt",
    ),
    "M_init gets the target's prompt": (
        "paper",
        "predict_original(xt, batch_f.t, batch_f.anchor)",
        "predict_original(xt, batch_f.t, batch_f.target)",
    ),
    "M_init is at the clean image": (
        "paper",
        "predict_original(xt, batch_f.t, batch_f.anchor)",
        "predict_original(batch_f.x0, batch_f.t, batch_f.anchor)",
    ),
    "M_init is told the other timestep": (
        "paper",
        "predict_original(xt, batch_f.t, batch_f.anchor)",
        "predict_original(xt, batch_r.t, batch_f.anchor)",
    ),
    "a graph of M_init": ("paper", "with torch.no_grad():", "with torch.enable_grad():"),
    "a graph of M in the warm-up": (
        "warm-up",
        "torch.set_grad_enabled(train_model)",
        "torch.set_grad_enabled(True)",
    ),
    "M gets the anchor's prompt": (
        "paper",
        "predict(xt, batch_f.t, batch_f.target)",
        "predict(xt, batch_f.t, batch_f.anchor)",
    ),
    "M is M_init": (
        "paper",
        "pred_target = predict(xt",
        "pred_target = predict_original(xt",
    ),
    "M is at the clean image": (
        "paper",
        "predict(xt, batch_f.t, batch_f.target)",
        "predict(batch_f.x0, batch_f.t, batch_f.target)",
    ),
    "D is shown the anchor twice": (
        "paper",
        "discriminator_input(pred_target, *how)",
        "discriminator_input(pred_anchor, *how)",
    ),
    "D is shown the target twice": (
        "paper",
        "logits_anchor = disc(view_anchor)",
        "logits_anchor = disc(view_target.detach())",
    ),
    "M fools D with the anchor": (
        "paper",
        "loss_unlearn(disc(view_target))",
        "loss_unlearn(disc(view_anchor))",
    ),
    "M learns nothing": (
        "no retention",
        'result["g_u"] = flat_grad(loss_u, params)',
        'result["g_u"] = 0 * flat_grad(loss_u, params)',
    ),
    "the gradient stays on D, as in the released code": (
        "paper",
        'result["g_u"] = flat_grad(loss_u, params)',
        'loss_u.backward(retain_graph=True); result["g_u"] = flat_grad(loss_u, params)',
    ),
    "lambda is not used": (
        "lambda 0.5",
        "lambda_projection(g_u, g_r, lam)",
        "lambda_projection(g_u, g_r)",
    ),
    "the gradients change places in Eq. 10": (
        "paper",
        "lambda_projection(g_u, g_r, lam)",
        "lambda_projection(g_r, g_u, lam)",
    ),
    "agreement is taken for conflict": (
        "agreement",
        "projected, stats = lambda_projection(g_u, g_r, lam)",
        "projected, stats = lambda_projection(g_u, -g_r, lam)",
    ),
    "no Eq. 10": ("paper", 'projected if project == "gradient" else g_u', "g_u"),
    "Eq. 10 and its step": (
        "project the step",
        'projected if project == "gradient" else g_u',
        "projected",
    ),
    "cp adds G_r": (
        "paper",
        'g = projected if project == "gradient" else g_u',
        "g = projected + g_r",
    ),
    "l2 climbs the retain loss": ("l2", "g = g_u + g_r", "g = g_u - g_r"),
    "l2 adds to the projected gradient": ("l2", "g = g_u + g_r", "g = projected + g_r"),
    "l2 is cp": ("l2", 'if retain == "l2":', "if False:"),
    "the norm before the projection": (
        "paper",
        'stats["norm_g"] = norm(g)',
        'stats["norm_g"] = norm(g_u)',
    ),
    "D's half holds a graph of M": ("paper", "disc(view_target.detach())", "disc(view_target)"),
    "D climbs": (
        "warm-up",
        'result["g_d"] = flat_grad(loss_d, disc.parameters())',
        'result["g_d"] = -flat_grad(loss_d, disc.parameters())',
    ),
    "accuracy on the anchor, the wrong way round": (
        "paper",
        "(logits_anchor > 0)",
        "(logits_anchor < 0)",
    ),
    "accuracy on the target, the wrong way round": (
        "paper",
        "(logits_target < 0)",
        "(logits_target > 0)",
    ),
    "accuracy of the sum": ("paper", "hits / 2", "hits"),
    "statistics hold the graph": (
        "paper",
        '"loss_d": loss_d.detach()',
        '"loss_d": loss_d',
    ),
    "G_r is not returned": (
        "paper",
        "return DocoUpdate(g, g_d, g_r, ",
        "return DocoUpdate(g, g_d, None, ",
    ),
    "the projected gradient is what is written": (
        "paper",
        "return DocoUpdate(g, g_d, g_r, ",
        "return DocoUpdate(g_u, g_d, g_r, ",
    ),
}
# The same for optimizer_step.
OPTIMIZER_MUTANTS = {
    "climbs": ("measured", "write_grad(params, g)", "write_grad(params, -g)"),
    "no step": ("not measured", "    optimizer.step()\n", ""),
    "two steps": (
        "not measured",
        "    optimizer.step()\n",
        "    optimizer.step(), optimizer.step()\n",
    ),
    "the gradient is left": ("not measured", "    optimizer.zero_grad()\n", ""),
    "the step has the wrong sign": (
        "projected",
        "descent = before - flatten(params)",
        "descent = flatten(params) - before",
    ),
    "the step is not projected": (
        "projected",
        "unflatten(before - projected, params)",
        "unflatten(before - descent, params)",
    ),
    "the projected step is added to AdamW's": (
        "projected",
        "unflatten(before - projected, params)",
        "unflatten(flatten(params) - projected, params)",
    ),
    "lambda is not used": (
        "projected, lambda 0.5",
        "lambda_projection(descent, g_r, lam)",
        "lambda_projection(descent, g_r)",
    ),
    "the step changes place with G_r": (
        "projected",
        "lambda_projection(descent, g_r, lam)",
        "lambda_projection(g_r, descent, lam)",
    ),
    "always projected": ("measured", "    if project:\n", "    if True:\n"),
    "never projected": ("projected", "    if project:\n", "    if False:\n"),
    "the cosine of the gradient": (
        "measured",
        'return stats["cos"]',
        "return g @ g_r / g.norm() / g_r.norm()",
    ),
    "the weights are not written": ("projected", "p.data.copy_(value)", "pass"),
}


def section_1():
    """Section 1 of doco.py: from its rule to that of section 2."""
    source = (common.REPO / "doco.py").read_text()
    return source[source.index("# ---- 1.") : source.index("# ---- 2.")]


def mutant_of(line, instead):
    """A module of section 1 of doco.py with one change. The line must be there once."""
    source = section_1()
    assert source.count(line) == 1, f"{source.count(line)} times in section 1: {line}"
    module = types.ModuleType("mutant")
    module.__dict__.update(torch=torch, F=F, namedtuple=namedtuple)
    module.__dict__.update(vars(gradsurgery))
    for name in ("coefficients", "predict_x0", "prediction_target"):
        module.__dict__[name] = getattr(backbones, name)
    exec(compile(source.replace(line, instead), "mutant.py", "exec"), module.__dict__)
    return module


def assert_caught(check, module, switches):
    """A mutant must fail by what it computes, and not because it is no Python."""
    with pytest.raises((AssertionError, RuntimeError, ValueError, AttributeError)) as caught:
        check(module, **switches)
    assert not re.search("NameError|SyntaxError", repr(caught.value))


def test_section_1_alone_passes():
    """Or every mutant would be caught for a missing import."""
    same = mutant_of("# Eq. 8, D's half", "# Eq. 8, D's half")
    check_step(same)
    check_optimizer_step(same)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_of_the_step_is_caught(name):
    switch, line, instead = MUTANTS[name]
    assert_caught(check_step, mutant_of(line, instead), STEP_SWITCHES[switch])


@pytest.mark.parametrize("name", OPTIMIZER_MUTANTS)
def test_mutant_of_the_optimizer_step_is_caught(name):
    switch, line, instead = OPTIMIZER_MUTANTS[name]
    assert_caught(check_optimizer_step, mutant_of(line, instead), OPTIMIZER_SWITCHES[switch])
