"""DoCo: unlearn a concept of a text-to-image diffusion model, and preserve the rest.

Paper: "Unlearning Concepts in Diffusion Model via Concept Domain Correction and Concept Preserving
Gradient", Wu et al., AAAI 2025, arXiv 2405.15304. A discriminator learns to distinguish the model's
denoised latents for the target concept from the original model's for an anchor concept; the model
learns to fool it. Gradient surgery projects out of the model's gradient the component that
conflicts with the gradient of the usual denoising loss on the anchor.

One step, for images x_0 that the original model generated from anchor prompts:

    1. x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps                      Eq. 1   add noise
    2. eps_c = M_init(x_t, anchor),  eps_c* = M(x_t, target)        Eq. 5   same x_t, two prompts
    3. L_r = |eps - M(x_t, anchor)|^2                               Eq. 9   retain the anchor
    4. L_u = -log D(v*), v* = the x_0 that eps_c* implies           Eq. 8   M learns to fool D
    5. G = G_u - lam min(0, <G_u, G_r>) / |G_r|^2 G_r               Eq. 10  gradient surgery
    6. L_D = -log D(v) - log(1 - D(v*)), v from eps_c likewise      Eq. 8   D tells them apart

All of it is doco_step() and doco_gradients() below. Before that, D is trained alone for some steps
(the warm-up).

    paper              code                          paper            code
    M, M_init          predict, predict_original     L_u, L_r, L_D    loss_u, loss_r, loss_d
    c*, c              target, anchor                G_u, G_r, G      g_u, g_r, g
    x_t, eps           xt, noise                     lambda, D        lam, disc
    sqrt(a_t),         a, b                          v, v*            view_anchor, view_target
      sqrt(1 - a_t)

Models that do not predict eps take the same step; only x_0_hat and the target of L_r differ. Flow
matching (Stable Diffusion 3, FLUX): x_t = (1 - s) x_0 + s eps, s = t / 1000, and M predicts the
velocity u = eps - x_0. Then v = x_t - s u, for x_t - s (eps - x_0) = x_0, and L_r = |u - M|^2.
v-prediction: u = a eps - b x_0, v = a x_t - b u, for a^2 + b^2 = 1.

Run it (the first line needs nothing but this repository; it uses the small model in emoji/sd):

    torchrun doco.py --target "Grumpy Cat" --anchor Cat
    torchrun doco.py --target twemoji --anchor emoji --concept-type style
    torchrun doco.py --model emoji/sd3 --target "enraged face" --anchor face
    torchrun --nproc-per-node 2 doco.py --model CompVis/stable-diffusion-v1-4 \\
        --target Snoopy --anchor Dog

Changed, all as in the released code: D is shown x0_hat, where the paper has x_{t-1} (--disc-input
xprev); the model's loss is the non-saturating one; the anchor's prediction is the original model's
(Eq. 5), where Eq. 7 has the trained model's. What else the paper leaves open: docs/doco.md.

Beyond the paper, --retain distill: the original model, not the noise, says what is to be retained,
L_r = |M_init(x_t, c) - M(x_t, c)|^2, and G_r is added to G of Eq. 10, stretched to the length of G.
Why: the G_r of Eq. 9 is mostly noise, nearly orthogonal to G_u, so that Eq. 10 takes off next to
nothing; this one is 0 until something is lost. c: the anchor, and --retain-prompts.
"""

import argparse
import re
import sys
from collections import namedtuple
from itertools import zip_longest
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm

import common
from backbones import (
    DDPM,
    DELTA,
    FAMILIES,
    LORA,
    TRAINABLE,
    coefficients,
    expand_condition,
    is_embedded,
    load_backbone,
    load_pipeline,
    load_unlearned,
    loading_lines,
    predict_x0,
    prediction_target,
    sample_timesteps,
    stack_conditions,
)
from common import fail
from discriminator import patchgan
from gradsurgery import (
    flat_grad,
    flatten,
    is_sharded,
    lambda_projection,
    norm,
    normalized_sum,
    null_space,
    project_update,
    unflatten,
    write_grad,
)

# ---- 1. the method: pure functions of tensors ---------------------------------------------------
# B: images of a batch; C, h, w: of a latent, (4, 64, 64) for 512 pixels; n: number of trained
# weights. a, b, and what a network predicts: coefficients(), prediction_target(), predict_x0().
#
# To use DoCo in a project of your own, copy this section, section 1 of backbones.py, gradsurgery.py
# and discriminator.py. They need torch alone. The rest of this file is training loop, prompts,
# flags and bookkeeping.


def posterior_sample(xt, x0_hat, alpha_bar_t, alpha_bar_prev, noise):
    """A sample x_{t-stride} of the DDPM posterior q(x_{t-stride} | x_t, x0_hat), (B, C, h, w).

    Eq. 6 and 7 of DDPM (Ho et al. 2020), with the alphas of the skipped steps multiplied. For a
    stride of 1, its gradient with respect to eps is 80 to 1,200 times smaller than x0_hat's: one
    step of 1000 moves x_t very little. This is what the paper shows D.
    """
    alpha = alpha_bar_t / alpha_bar_prev  # (B, 1, 1, 1), of the skipped steps together
    weighted_x0 = alpha_bar_prev.sqrt() * (1 - alpha) * x0_hat
    mean = weighted_x0 + alpha.sqrt() * (1 - alpha_bar_prev) * xt
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha)  # (B, 1, 1, 1)
    return mean / (1 - alpha_bar_t) + variance.sqrt() * noise


def discriminator_input(prediction, kind, prediction_type, xt, t, alpha_bar, stride, noise):
    """What D is shown of a prediction at x_t, by kind: "x0" or "xprev". (B, C, h, w) in both cases.

    noise: that of the posterior sample. Anchor and target get the same, so that they differ in the
    prediction alone.
    """
    a, b = coefficients(t, alpha_bar)  # (B, 1, 1, 1) each
    x0_hat = predict_x0(prediction_type, prediction, xt, a, b)  # (B, C, h, w)
    if kind == "x0":
        return x0_hat
    alpha_bar_t = alpha_bar[t].view(-1, 1, 1, 1)
    alpha_bar_prev = alpha_bar[(t - stride).clamp(min=0)]
    alpha_bar_prev = torch.where(t < stride, 1.0, alpha_bar_prev)  # x_0 itself has no noise
    return posterior_sample(xt, x0_hat, alpha_bar_t, alpha_bar_prev.view(-1, 1, 1, 1), noise)


def loss_discriminator(logits_anchor, logits_target):
    """Eq. 8, max over D, as a loss: -log D(anchor) - log(1 - D(target)), D = sigmoid(logits)."""
    # softplus(-l) = -log sigmoid(l), without overflow
    return F.softplus(-logits_anchor).mean() + F.softplus(logits_target).mean()


def loss_unlearn(logits_target):
    """Eq. 8, min over M, in its non-saturating form: -log D(target) instead of log(1 - D(target)).

    Both have the same fixed point. But where D is sure of the target, as after the warm-up, the
    gradient of the paper's form vanishes, and M would hardly learn (Goodfellow et al. 2014).
    """
    return F.softplus(-logits_target).mean()


def combine_gradients(g_u, g_r, retain="cp", lam=1.0, retain_weight=1.0, project="gradient"):
    """G of G_u and G_r (n,), and 0-dim statistics: lambda_projection's, and share_r.

    share_r: what retention adds or takes off, |G - G_u| / |G|. retain: not "none".
    """
    # Eq. 10: G = G_u - lam min(0, <G_u, G_r>) / |G_r|^2 G_r. G_r itself is never added: it retains
    # the anchor by what it takes away from G_u. Adding it is the ablation "l2".
    #
    # "distill" does both. What Eq. 10 takes off is what would be lost in this step; what has been
    # lost in earlier ones comes back by G_r alone. Its loss has Eq. 9's gradient on average, where
    # M_init has learned the mean of eps given x_t; but eps itself varies around that mean far more
    # than M differs from M_init. G_r is stretched, because the shorter gradient would not count.
    projected, stats = lambda_projection(g_u, g_r, lam)
    g = projected if project == "gradient" else g_u
    if retain == "l2":
        g = g_u + g_r
    if retain == "distill":
        g = normalized_sum(g, g_r, retain_weight)
    stats["share_r"] = norm(g - g_u) / norm(g).clamp_min(torch.finfo(g.dtype).tiny)
    return g, stats


# x0: latents of anchor images (B, C, h, w); noise: of the same shape; t: timesteps (B,); anchor,
# target and retained: conditions on the prompts, whatever `predict` takes; posterior_noise: for
# "xprev" alone. anchor_and_retained: conditions of 2B rows, the anchor's of ForgetBatch, then
# `retained`, for the one pass of M_init that predicts both; for "distill" alone.
ForgetBatch = namedtuple("ForgetBatch", "x0 noise t anchor target posterior_noise")
RetainBatch = namedtuple("RetainBatch", "x0 noise t retained anchor_and_retained", defaults=[None])

# Flat gradients, averaged over the ranks, and 0-dim statistics. g: of M, Eq. 10 applied, or None in
# the warm-up; g_d: of D; g_r: G_r, or None without retention.
DocoUpdate = namedtuple("DocoUpdate", "g g_d g_r stats")


def doco_step(
    predict,  # the model M: (x_t (B, C, h, w), t (B,), condition) -> (B, C, h, w)
    predict_original,  # the original model M_init: the same signature
    disc,  # D: (B, C, h, w) -> patch logits (B, 1, 2, 2), > 0 for the anchor
    params,  # the trained weights of M, n numbers in all
    alpha_bar,  # (1000,), cumulative products: alpha_t in the paper; flow matching: None
    batches,  # [(ForgetBatch, RetainBatch)], drawn independently: one, or micro-batches of one size
    prediction_type="epsilon",  # or "v_prediction", "flow": what M predicts
    lam=1.0,  # lambda of Eq. 10
    disc_input="x0",  # or "xprev"
    stride=1,  # of "xprev"
    retain="cp",  # "cp": Eq. 10; "distill"; "l2": add G_r; "none" (the ablation of Table 3)
    retain_weight=1.0,  # of "distill": length of the added G_r, relative to Eq. 10's result
    project="gradient",  # what Eq. 10 projects; "step": leave it to optimizer_step
    train_model=True,  # False in the warm-up
):
    """One step of DoCo: three forward passes of the network, two backward. Changes no weight.

    Returns a DocoUpdate. "distill": M_init's pass has 2B rows. In the warm-up, D's gradient alone:
    two forward passes, M's and M_init's. With micro-batches, as many passes for each.
    """
    networks = (predict, predict_original, disc, params, alpha_bar)
    how = (prediction_type, disc_input, stride, retain, train_model)
    means = {}
    for batch_f, batch_r in batches:
        part = doco_gradients(*networks, batch_f, batch_r, *how)
        # The mean of the micro-batches' gradients is the gradient of the whole batch: so they are
        # averaged here, before the projection, which is not linear. In place: of all weights of a
        # large model, a copy is gigabytes.
        for name, value in part.items():
            value /= len(batches)
            means[name] = means[name].add_(value) if name in means else value

    g_u, g_r, g_d = (means.pop(name, None) for name in ("g_u", "g_r", "g_d"))
    g, stats = g_u, means
    if g_r is not None:
        g, surgery = combine_gradients(g_u, g_r, retain, lam, retain_weight, project)  # Eq. 10
        stats |= surgery  # cos, norm_f, norm_r, conflict, share_r
    if train_model:
        stats["norm_g"] = norm(g)
    return DocoUpdate(g, g_d, g_r, stats)


def doco_gradients(
    predict,  # M
    predict_original,  # M_init
    disc,  # D
    params,  # (n numbers)
    alpha_bar,  # (1000,), or None
    batch_f,  # ForgetBatch, B rows
    batch_r,  # RetainBatch, B rows
    prediction_type,
    disc_input,
    stride,
    retain,
    train_model,
):
    """The gradients of Eq. 8 and 9 for one micro-batch; the arguments are doco_step's.

    Returns {name: tensor}: g_u and g_r (n,), g_d, and 0-dim losses and D's accuracy. In the
    warm-up there is nothing of M, without retention no g_r.
    """
    result = {}
    retaining = train_model and retain != "none"  # otherwise, batch_r is not looked at

    # Eq. 1: x_t, from an image of the anchor. Eq. 8 of the paper takes the second expectation over
    # images of the target; its code uses anchor images for both, and so do we: no image of what is
    # to be unlearned is needed.
    a, b = coefficients(batch_f.t, alpha_bar)  # (B, 1, 1, 1) each
    xt = a * batch_f.x0 + b * batch_f.noise  # (B, C, h, w)
    if retaining:
        a_r, b_r = coefficients(batch_r.t, alpha_bar)
        xt_r = a_r * batch_r.x0 + b_r * batch_r.noise  # (B, C, h, w)
        target_r = prediction_target(prediction_type, batch_r.x0, batch_r.noise, a_r, b_r)  # eps

    # Eq. 5, its first half: the original model's prediction for the anchor.
    with torch.no_grad():
        if retaining and retain == "distill":  # and, in the same pass, what is to be retained
            xt_both, t_both = torch.cat([xt, xt_r]), torch.cat([batch_f.t, batch_r.t])
            both = predict_original(xt_both, t_both, batch_r.anchor_and_retained)
            pred_anchor, target_r = both.chunk(2)  # (B, C, h, w) each, of 2B rows
        else:
            pred_anchor = predict_original(xt, batch_f.t, batch_f.anchor)  # (B, C, h, w)

    # Eq. 9: L_r = |eps - M(x_t, anchor)|^2; "distill": M_init(x_t, retained) in place of eps. This
    # pass of M comes first: flat_grad frees its graph before the graph of the next one is built, so
    # that the memory holds one of them, never both.
    if retaining:
        pred_r = predict(xt_r, batch_r.t, batch_r.retained)  # (B, C, h, w)
        loss_r = F.mse_loss(pred_r, target_r)  # 0-dim
        result["g_r"] = flat_grad(loss_r, params)  # (n,), the mean over the ranks
        result["loss_r"] = loss_r.detach()

    # Eq. 5, its second half: the trained model's prediction for the target, at the same x_t.
    # Whatever D finds to tell the two apart comes from the prompt.
    how = (disc_input, prediction_type, xt, batch_f.t, alpha_bar, stride, batch_f.posterior_noise)
    view_anchor = discriminator_input(pred_anchor, *how)  # (B, C, h, w)
    with torch.set_grad_enabled(train_model):
        pred_target = predict(xt, batch_f.t, batch_f.target)  # (B, C, h, w)
        view_target = discriminator_input(pred_target, *how)  # (B, C, h, w)

    if train_model:
        # Eq. 8, the model's half: L_u = -log D(v*). flat_grad goes through D to the weights of M
        # and leaves D alone. In the released code this gradient stays on D, and enters its step.
        loss_u = loss_unlearn(disc(view_target))  # 0-dim
        result["g_u"] = flat_grad(loss_u, params)  # (n,)
        result["loss_u"] = loss_u.detach()

    # Eq. 8, D's half: L_D = -log D(v) - log(1 - D(v*)), on the inputs that M was trained with. By
    # flat_grad and not backward(), because it averages over the ranks.
    logits_anchor = disc(view_anchor)  # (B, 1, 2, 2)
    logits_target = disc(view_target.detach())  # (B, 1, 2, 2)
    loss_d = loss_discriminator(logits_anchor, logits_target)  # 0-dim
    result["g_d"] = flat_grad(loss_d, disc.parameters())  # (number of D's weights,)
    hits = (logits_anchor > 0).float().mean() + (logits_target < 0).float().mean()
    # D's accuracy; at 0.5, M fools it.
    return result | {"loss_d": loss_d.detach(), "disc_acc": hits / 2}


def optimizer_step(optimizer, params, g, g_r=None, lam=1.0, project=False):
    """Steps along g (n,). With g_r, returns the cosine of minus that step and g_r, else None.

    Why it may be negative: AdamW rescales the gradient entry by entry and adds momentum, so that
    its step can conflict with G_r even though G, after Eq. 10, cannot. With project=True, Eq. 10 is
    applied to the step itself. Costs a copy of the trained weights; without g_r, nothing.
    """
    before = None if g_r is None else flatten(params)  # (n,)
    write_grad(params, g)
    optimizer.step()
    optimizer.zero_grad()
    if g_r is None:
        return None
    descent = before - flatten(params)  # (n,), minus the step: it has the sign of a gradient
    projected, stats = lambda_projection(descent, g_r, lam)  # Eq. 10
    if project:
        for p, value in zip(params, unflatten(before - projected, params), strict=True):
            p.data.copy_(value)
    return stats["cos"]


def swap_weights(params, originals):
    """Swaps trained and original weights in place: M becomes M_init, bitwise, and M again.

    So the original model costs a copy of what is trained, 2 % of Stable Diffusion's UNet, and not a
    second network. Never call it while a graph is alive, or inside autocast, which caches
    low-precision copies of the weights.
    """
    for p, original in zip(params, originals, strict=True):
        if is_sharded(p):  # FSDP2 gathers from where it first put them: there the values change
            values = p.detach().clone()
            p.data.copy_(original)
            original.copy_(values)
        else:
            p.data, original.data = original.data, p.data


# ---- 2. the training loop -----------------------------------------------------------------------


def train(backbone, trained, latents, pairs, retained, conditions, args, run, processes):
    """Runs the steps of DoCo on the trained weights, {name: parameter}, in place.

    latents: anchor images (N, C, h, w), image j from entry j mod len(pairs) of the prompt pairs.
    retained: prompts, from choose_retained. conditions: {prompt: condition}. args: the flags, their
    defaults filled in. Resumes a run that has a checkpoint; writes the log every ten steps.
    """
    params = list(trained.values())
    # All that M_init costs. A LoRA begins with B = 0: its originals are the network without it.
    originals = [p.detach().clone() for p in params]
    if args.init:
        load_init(args.init, trained, backbone)  # after the copy: M_init has not seen it
    project_weights = null_space_projector(params, pairs, retained, conditions, args, processes)

    torch.manual_seed(args.seed)  # the same D on every rank; all later draws have generators
    disc = patchgan(latents.shape[-1], latents.shape[1]).to(processes.device)
    # The paper names no optimizer. As in the released code: AdamW with a weight decay of 1e-2 for
    # the model; for D, Adam with the betas 0.5 and 0.999 that GANs are trained with since DCGAN.
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=1e-2, fused=True)
    opt_disc = torch.optim.Adam(disc.parameters(), lr=args.disc_lr, betas=(0.5, 0.999), fused=True)

    # All that a checkpoint holds: no RNG state, for all randomness derives from (seed, step).
    tensors = {f"unet/{n}": p for n, p in trained.items()}
    tensors |= {f"disc/{n}": t for n, t in disc.state_dict().items()}
    state = (tensors, (optimizer, opt_disc))
    start, log = common.resume(run, *state)

    def predict_original(xt, t, condition):
        """M_init: the same network, with its original weights for this one pass."""
        swap_weights(params, originals)
        prediction = backbone.predict(xt, t, condition)
        swap_weights(params, originals)
        return prediction

    how = (pairs, retained, conditions, backbone, args, processes)
    conflicts = []  # since the last row of the log: 1 where G_u and G_r conflicted, else 0
    progress = common.progress_bar(start, args.steps, processes)
    with common.sigterm_flag() as stop_requested:
        for step in progress:
            train_model = step >= args.warmup_steps
            is_logging_step = (step + 1) % 10 == 0 or step + 1 == args.steps
            batches = sample_batches(step, latents, *how)

            # All gradients at the weights as they are; then both optimizers take their steps.
            update = doco_step(
                backbone.predict,
                predict_original,
                disc,
                params,
                backbone.alpha_bar,
                batches,
                backbone.prediction_type,
                lam=args.lam,
                disc_input=args.disc_input,
                stride=args.stride,
                retain=args.retain,
                retain_weight=args.retain_weight,
                project=args.project,
                train_model=train_model,
            )
            stats = update.stats
            if train_model:
                project = args.project == "step"
                g_r = update.g_r if project or is_logging_step else None  # measuring costs a copy
                cos_step = optimizer_step(optimizer, params, update.g, g_r, args.lam, project)
                stats |= {} if cos_step is None else {"cos_step": cos_step}
                project_weights()  # nothing without --null-space
            write_grad(disc.parameters(), update.g_d)
            opt_disc.step()

            if "conflict" in stats:
                conflicts.append(stats["conflict"])
            if is_logging_step:
                log.append({"step": step} | read_statistics(stats, conflicts, processes))
                conflicts = []
                shown = ("loss_d", "disc_acc", "loss_u", "cos")
                progress.set_postfix({k: f"{log[-1][k]:.3f}" for k in shown if k in log[-1]})
                every = 10 * max(1, args.steps // 200)  # steps between checkpoints
                common.save_progress(run, log, step + 1, state, every, stop_requested, processes)


def read_statistics(stats, conflicts, processes):
    """{name: number} of 0-dim statistics; conflict becomes the mean of the list of conflicts.

    One transfer from the device for all values: reading them at every step would make a GPU wait.
    The mean over the ranks, each of which saw its part of the batch.
    """
    if conflicts:
        stats["conflict"] = torch.stack(conflicts).mean()
    values = common.average(torch.stack(list(stats.values())), processes).tolist()
    return dict(zip(stats, values, strict=True))


def null_space_projector(params, pairs, retained, conditions, args, processes):
    """A function that undoes what the last step changed for the prompts to be retained.

    By projecting the change of the keys and values, since this call, onto what the embeddings of
    these prompts leave free. They are the empty prompt, which guidance subtracts, the anchor's and
    --retain-prompts; of each, all rows: padding carries the meaning of a prompt too. Without
    --null-space, the function does nothing. Fails if nothing is left free.
    """
    energy = args.null_space
    if energy is None:
        return lambda: None
    # Not M_init's weights: with --init, what was unlearned earlier stays unlearned. The prompts,
    # each once: several targets may share an anchor.
    before = [p.detach().clone() for p in params]
    prompts = dict.fromkeys(["", *(anchor for anchor, _ in pairs), *retained])
    rows = [conditions[prompt]["encoder_hidden_states"][0] for prompt in prompts]  # (L, D) each
    try:
        projection = null_space(torch.cat(rows), energy)
    except ValueError:
        fail(
            f"--null-space {energy:g}: {len(prompts)} prompts fill all dimensions of the "
            f"embeddings, {rows[0].shape[1]}; give less, or fewer --retain-prompts"
        )
    if processes.rank == 0:
        free = projection.trace().round().int().item()
        print(f"null space: {free} of {len(projection)} dimensions are free")
    return lambda: project_update(params, before, projection)


def sample_batches(step, latents, pairs, retained, conditions, backbone, args, processes):
    """[(ForgetBatch, RetainBatch)] of a step: the micro-batches of the slice of this process.

    Every rank samples the whole batch from (seed, step) and takes its rows. So N processes compute
    what one does, and a resumed run needs no saved RNG state.
    """
    n, device = args.batch_size, processes.device
    rows = common.local_slice(n, processes)
    g = common.generator(args.seed, "doco_steps", step)

    # Two independent batches: what D sees, and what is to be retained. In the released code the
    # second is the first one's images with other noise.
    idx, idx_r = torch.randint(len(latents), (2, n), generator=g)[:, rows].tolist()  # [B] each
    # Timesteps as a model of this kind is trained: uniform; flow matching: shifted towards noise.
    if backbone.shift is None:
        times = torch.randint(len(backbone.alpha_bar), (2, n), generator=g)
    else:
        times = torch.stack([sample_timesteps(n, g, backbone.shift) for _ in range(2)])
    t, t_r = times[:, rows].to(device)  # (B,) each
    noises = torch.randn(3, n, *latents.shape[1:], generator=g)[:, rows].to(device)
    noise, noise_r, posterior_noise = noises  # (B, C, h, w) each

    # Latent j was generated for entry j mod len(pairs). Where an entry has several target prompts
    # (three for a style), they take turns from step to step.
    entries = [pairs[j % len(pairs)] for j in idx]
    anchors = [conditions[prompt] for prompt, _ in entries]  # [B]
    targets = [conditions[variants[step % len(variants)]] for _, variants in entries]

    # What is to be retained: the anchor. With --retain-prompts, in three rows of four one of these,
    # at a noisy image of the anchor all the same: M_init says what to predict there. The rows that
    # keep the anchor move from step to step, so that all processes see it.
    prompts_r = [pairs[j % len(pairs)][0] for j in idx_r]
    if retained and args.retain == "distill":
        picks = torch.randint(len(retained), (n,), generator=g)[rows].tolist()
        first = step + (rows.start or 0)
        for i, pick in enumerate(picks):
            if (first + i) % 4:
                prompts_r[i] = retained[pick]
    others = [conditions[prompt] for prompt in prompts_r]

    # Micro-batches; usually one. Embeddings are stacked for each by itself: it is these that grow.
    batches, size = [], len(idx) // args.gradient_accumulation_steps
    for first in range(0, len(idx), size):
        part = slice(first, first + size)
        anchor, target = stack_conditions(anchors[part]), stack_conditions(targets[part])
        other, both = stack_conditions(others[part]), None
        if args.retain == "distill":
            both = stack_conditions([*anchors[part], *others[part]])
        forget = (noise[part], t[part], anchor, target, posterior_noise[part])
        retain = (noise_r[part], t_r[part], other, both)
        batch_f = ForgetBatch(latents[idx[part]], *forget)
        batch_r = RetainBatch(latents[idx_r[part]], *retain)
        batches.append((batch_f, batch_r))
    return batches


def load_init(folder, trained, backbone):
    """Loads the weights of an earlier run into the trained ones, {name: parameter}, in place."""
    file = next(folder / name for name in RESULTS if (folder / name).is_file())
    earlier = common.load_or_fail(file, lambda: load_file(file))
    for saved_name, value in earlier.items():
        name = backbone.lora_parameter(saved_name) if file.name == LORA else saved_name
        if name not in trained or value.shape != trained[name].shape:
            fail(
                f"--init {folder} trained {saved_name}, which is not trained here; "
                f"repeat its --model, --train-method and --rank"
            )
        trained[name].data.copy_(common.shard_like(trained[name], value))


# ---- 3. prompts ---------------------------------------------------------------------------------
# The paper does not say which prompts it trains on; its released code has 200 per concept, written
# by ChatGPT or taken from the captions of LAION. --prompts takes such a file. Without it, the
# templates below serve: the anchor's name for {}, and for the target's prompt the target's name.

OBJECT_PROMPTS = (
    "{}",
    "a {}",
    "a photo of {}",
    "a photo of a {}",
    "a picture of a {}",
    "an emoji of {}",
    "an emoji of a {}",
    "a drawing of a {}",
    "an image of {}",
    "the {}",
    "a cute {}",
    "{} on a white background",
)
# What a style is applied to: "an emoji of a cat" becomes "a cat, in the style of twemoji".
STYLE_SUBJECTS = (
    "cat dog bird fish horse tiger rabbit frog butterfly rose sunflower house "
    "car pizza banana apple face bear tree strawberry ghost owl"
).split()


def prompt_pairs(targets, anchors, concept_type="object", prompts=None, emoji=False):
    """[(anchor prompt, [target prompts])]: an entry per template and target, targets taking turns.

    anchors: one for all targets, or one per target. prompts: a text file of anchor prompts, one per
    line, in place of the templates; {} stands for any anchor. emoji: the model knows emoji; with
    any other, two of twelve anchor images would be emoji that nobody asked for.

    Turns matter: anchor image j belongs to entry j modulo their number. With fewer images than
    entries, the last templates of every target go untrained, and never a whole target.
    """
    anchors = anchors * len(targets) if len(anchors) == 1 else anchors
    if len(anchors) != len(targets):
        fail(
            f"{len(targets)} targets but {len(anchors)} anchors; "
            f"give one --anchor for all, or one each"
        )
    lines = read_prompts(prompts) if prompts else None
    per_target = []  # a list of pairs for each target
    for target, anchor in zip(targets, anchors, strict=True):
        if not target.strip() or not anchor.strip():
            fail("--target and --anchor must not be empty")
        if target.lower() == anchor.lower():
            fail(f"--target and --anchor are both {target!r}; there is nothing to unlearn")
        if concept_type == "style":
            per_target.append(style_pairs(target, anchor, lines))
        else:
            one_anchor = len(set(anchors)) == 1  # then every line of --prompts must contain it
            own = lines and [line.replace("{}", anchor) for line in lines]
            per_target.append(object_pairs(target, anchor, own, emoji, one_anchor))
    # The first pair of each target, then the second of each, ...; zip_longest pads with None.
    return [pair for turn in zip_longest(*per_target) for pair in turn if pair]


def read_prompts(path, flag="--prompts", what="anchor prompt"):
    """The lines of a text file of prompts, without the empty ones."""
    if not path.is_file():
        fail(f"{flag} {path}: no such file")
    lines = [line.strip() for line in path.read_text("utf-8", "replace").splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        fail(f"{flag} {path} is empty; expected one {what} per line")
    return lines


def read_retain_prompts(which, targets, tokenizer=None):
    """The candidates of --retain-prompts, without those that contain a target's name.

    A file's lines; for "vocabulary", the tokenizer's words; for None, none. Each once.
    """
    if which is None:
        return []
    if which == "vocabulary":
        # What ends with </w> in CLIP's vocabulary ends a word: words, and last pieces of others. Of
        # these the 1,024 most frequent, for its numbers follow the frequency.
        ordered = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        words = [word for word, _ in ordered if re.fullmatch("[a-z]{3,}</w>", word)]
        prompts = [word.removesuffix("</w>") for word in words][:1024]
    else:
        prompts = read_prompts(Path(which), "--retain-prompts", "prompt")
    # What the model understands as a target is dropped later, by choose_retained. That finds bare
    # names, and not what has other things in it ("panda, in the style of twemoji"): so here goes
    # whatever names it.
    for target in targets:
        name = re.compile(rf"(?<!\w){re.escape(target)}(?!\w)", re.IGNORECASE)
        prompts = [prompt for prompt in prompts if not name.search(prompt)]
    if not prompts:
        fail(f"--retain-prompts {which}: no prompt is left that does not name a target")
    return list(dict.fromkeys(prompts))


# Prompts of --retain-prompts that are used, per target. A step has six rows for them (at a batch of
# 8): each of 180 would come up too rarely to be retained.
N_RETAINED = 32


@torch.no_grad()
def choose_retained(backbone, candidates, pairs, latents, conditions, seed, processes):
    """Returns the candidates that are retained: those nearest to a target, but no names of it.

    The nearest in the embeddings are what an erasure damages first. But one that the original model
    understands as the target is a name of it, and would hold what is to be unlearned: its
    prediction, at noisy anchor images, is at less than half the anchor's distance from the
    target's. Synonyms and nicknames are far below that limit, other concepts around the whole
    distance; for the nearest relatives the draw of the images may decide. Fails if none is left.
    pairs: (anchor prompt, [target prompts]) of each target. latents: (N, C, h, w).
    """
    n = N_RETAINED * len(pairs)

    def distance(prompt):
        """From a prompt to the nearest target, both (1, L, D)."""
        embeddings = conditions[prompt]["encoder_hidden_states"]
        targets = [conditions[prompts[0]]["encoder_hidden_states"] for _, prompts in pairs]
        return min((embeddings - target).norm().item() for target in targets)

    # Twice as many as needed: names are among the nearest, and each costs a pass of the network.
    nearest = sorted(candidates, key=distance)[: 2 * n]

    # The same four noisy images for all prompts: what differs is the prompt alone.
    x0 = latents[[k % len(latents) for k in range(4)]]  # (4, C, h, w)
    t = torch.tensor([600, 750, 900, 980], device=x0.device)  # where prompts matter most
    noise = torch.randn(x0.shape, generator=common.generator(seed, "retain_prompts"))
    a, b = coefficients(t, backbone.alpha_bar)
    xt = a * x0 + b * noise.to(x0.device)  # (4, C, h, w)

    def predict(prompt):
        """M_init's prediction (4, C, h, w)."""
        return backbone.predict(xt, t, expand_condition(conditions[prompt], len(xt)))

    of_pairs = [(predict(anchor), predict(prompts[0])) for anchor, prompts in pairs]
    chosen, names = [], []
    # Of several targets, the prompt must be far from each in that target's own unit.
    for prompt in nearest:
        eps = predict(prompt)
        ratios = [(eps - target).norm() / (anchor - target).norm() for anchor, target in of_pairs]
        if min(ratios) < 0.5:
            names.append(prompt)
        else:
            chosen.append(prompt)
    if processes.rank == 0:
        print(f"retained beside the anchor: {', '.join(chosen[:n])}")
        print(f"not retained, as names of a target: {', '.join(names) or 'none'}")
    if not chosen:
        fail("--retain-prompts: the model takes every prompt for the target; expected others")
    return chosen[:n]


def object_pairs(target, anchor, lines, emoji, one_anchor):
    """The pairs of one target: prompts with the anchor, and the same with the target in its place.

    Of several anchors, each takes the lines that contain it; a line without a single anchor, or an
    anchor without a line, is an error.
    """
    word = re.compile(rf"(?<!\w){re.escape(anchor)}(?!\w)", re.IGNORECASE)  # no "man" in "woman"
    templates = [t for t in OBJECT_PROMPTS if emoji or "emoji" not in t]
    candidates = lines or [t.format(anchor) for t in templates]
    fitting = [p for p in candidates if word.search(p)]
    if lines and len(fitting) < len(lines) and (one_anchor or not fitting):
        other = min(set(lines) - set(fitting))
        fail(f"--prompts: {other!r} does not contain the anchor {anchor!r}, to be replaced")
    return [(p, [word.sub(lambda _: target, p)]) for p in fitting]


def style_pairs(target, anchor, lines):
    """The pairs of one target style; the anchor is a medium: "a painting of a cat".

    Three target prompts for each: "a painting of a cat, in the style of Van Gogh"; the same without
    the medium; "in Van Gogh's style, a painting of a cat". They take turns from step to step.
    """
    article = "an" if anchor[0].lower() in "aeiou" else "a"
    pairs = []
    for p in lines or [f"{article} {anchor} of a {subject}" for subject in STYLE_SUBJECTS]:
        subject = p.removeprefix(f"{article} {anchor} of ")
        target_prompts = [
            f"{p}, in the style of {target}",
            f"{subject}, in the style of {target}",
            f"in {target}'s style, {p}",
        ]
        pairs.append((p, target_prompts))
    return pairs


def check_coverage(pairs, n_images, n_targets, warn=True):
    """Warns of entries of prompt_pairs that get no anchor image; fails if a whole target gets none.

    A pair without an image is never trained: the batches of train() are made of images.
    """
    if n_images < n_targets:
        fail(
            f"{n_targets} targets but {n_images} anchor images; "
            f"give fewer --target at once, or raise --steps or --batch-size"
        )
    if n_images < len(pairs) and warn:
        message = (
            f"warning: {len(pairs) - n_images} of {len(pairs)} pairs of prompt and target are not "
            f"trained, for there are {n_images} anchor images; every target keeps its first prompts"
        )
        tqdm.write(message, file=sys.stderr)


# ---- 4. presets and flags -----------------------------------------------------------------------

# The settings of the paper, and of its released code where the paper is silent (D's learning rate,
# anchor images). With --scale_lr, that code trains the model at 6e-6 * 8 images = 4.8e-5.
PAPER = {"steps": 2000, "warmup_steps": 1000, "batch_size": 8, "lr": 6e-6, "disc_lr": 1e-4}
PAPER_IMAGES = {"num_images": 1000}
# For small models (latents below 32x32) such as emoji/sd: higher learning rates, fewer steps. The
# steps are for one target; each further target adds as many, and a style takes twice as many. They
# were chosen on the grumpy cat (for styles, on twemoji).
SMALL = {"steps": 250, "warmup_steps": 50, "batch_size": 8, "lr": 1.5e-4, "disc_lr": 2e-4}
SMALL_IMAGES = {"num_images": 64}
# A LoRA, which transformers get, has a rate of its own: that of diffusers' examples, also the best
# of those tried on emoji/sd3 and the enraged face. Neither paper nor released code has one.
LORA_PRESET = {"lr": 1e-4}

RESULTS = (DELTA, LORA)  # what a finished run holds: the trained weights, or a LoRA


def parse_args(argv=None):
    """The command line. Defaults that depend on the model are filled in by fill_defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.HelpFormatter)
    add = parser.add_argument_group("concepts").add_argument
    add("--target", nargs="+", required=True, help="concept to unlearn; several: all at once")
    add("--anchor", nargs="+", required=True, help="anchor concept: one for all, or one per target")
    help_text = "style: the anchor is a medium, such as painting"
    add("--concept-type", choices=("object", "style"), default="object", help=help_text)
    help_text = (
        "file of anchor prompts, one per line; {} stands for the anchor (without it: templates)"
    )
    add("--prompts", type=Path, help=help_text)

    add = parser.add_argument_group("model").add_argument
    help_text = "Stable Diffusion 1.x, 2.x, XL, 3 or 3.5, or FLUX.1: folder or hub id"
    add("--model", default=str(common.REPO / "emoji/sd"), help=help_text)
    add("--init", type=Path, help="earlier run folder to start from; its concepts stay unlearned")
    add("--resolution", type=int, help="side of an image in pixels (without it: the model's own)")
    help_text = "the text's keys and values in the attention, the layers that take its embeddings, "
    help_text += "all of that attention, the network, or a LoRA of all attention (without it: kv; "
    help_text += "for Stable Diffusion XL text; for a transformer lora)"
    add("--train-method", choices=(*TRAINABLE, "lora"), help=help_text)
    add("--rank", type=int, default=16, help="of --train-method lora")

    # The values in brackets are the paper's and the small-model preset's.
    group = parser.add_argument_group("training", "without a value: (paper; small models)")
    add = group.add_argument
    add("--steps", type=int, help="training steps in all (2000; 250 per target, 500 for a style)")
    add("--warmup-steps", type=int, help="of these, the first ones train D alone (1/2; 1/5)")
    add("--batch-size", type=int, help="images per step, over all processes (8; 8)")
    add("--lr", type=float, help="learning rate of the model (6e-6; 1.5e-4; a LoRA 1e-4)")
    add("--disc-lr", type=float, help="of the discriminator (1e-4; 2e-4; 5 times that for styles)")

    add = parser.add_argument_group("method").add_argument
    add("--lam", type=float, default=1.0, help="lambda of Eq. 10, the projection strength")
    help_text = "what D is shown: x0_hat, or x_{t-stride} (the paper: xprev with stride 1)"
    add("--disc-input", choices=("x0", "xprev"), default="x0", help=help_text)
    add("--stride", type=int, default=1, help="of --disc-input xprev, in timesteps")
    help_text = "Table 3: no retention, adding G_r (L2), or Eq. 10 (concept-preserving gradient); "
    help_text += "distill: the original model's predictions are retained"
    add("--retain", choices=("none", "l2", "cp", "distill"), default="cp", help=help_text)
    help_text = "of --retain distill: length of the retain gradient, relative to Eq. 10's result"
    add("--retain-weight", type=float, default=1.0, help=help_text)
    help_text = "of distill and --null-space, beside the anchor: prompts to be retained, one per "
    help_text += "line of a file; vocabulary: words of the tokenizer"
    add("--retain-prompts", metavar="FILE|vocabulary", help=help_text)
    help_text = "keeps keys and values as they are in the main directions of the embeddings of the "
    help_text += "prompts to be retained: those that hold this fraction of their energy, in (0, 1]"
    add("--null-space", type=float, metavar="ENERGY", help=help_text)
    help_text = "what Eq. 10 is applied to: the gradient, as in the paper, or AdamW's step"
    add("--project", choices=("gradient", "step"), default="gradient", help=help_text)
    common.add_run_arguments(parser, "runs/doco-TARGET")
    return parser.parse_args(argv)


def fill_defaults(args, backbone, processes):
    """Returns the flags with their defaults filled in, and the preset of the anchor images.

    Latents below 32x32 get the small-model preset. Flags that were given are not touched. Fails on
    values outside their range.
    """
    args = argparse.Namespace(**vars(args))  # the caller's stays as it was typed
    # Where the prompt enters the network differs between the families, and so does what is trained:
    # each Backbone names its own.
    args.train_method = args.train_method or backbone.train_method
    small = backbone.small
    preset = dict(SMALL if small else PAPER)
    if args.train_method == "lora":
        preset |= LORA_PRESET
    # The anchor images are generated as the family generates images.
    images = {"sampling_steps": backbone.sampling_steps, "guidance": backbone.guidance}
    images |= SMALL_IMAGES if small else PAPER_IMAGES

    if args.concept_type == "style":
        preset["disc_lr"] *= 5  # as in the released code
    if small:
        scale = len(args.target) * (2 if args.concept_type == "style" else 1)
        preset["steps"] *= scale
        preset["warmup_steps"] *= scale
    if args.steps is not None:  # the warm-up keeps its part of a shorter or longer training
        preset["warmup_steps"] = args.steps * preset["warmup_steps"] // preset["steps"]
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)

    common.check_processes(args, processes)
    args.mixed_precision = common.mixed_precision(args, processes.device)
    if not 0 <= args.warmup_steps <= args.steps or args.steps < 1:
        fail(
            f"--steps {args.steps} --warmup-steps {args.warmup_steps}: "
            f"expected at least one step, and no more warm-up steps than steps"
        )
    if not (args.lr > 0 and args.disc_lr > 0):
        fail(f"--lr {args.lr:g} --disc-lr {args.disc_lr:g}: expected positive learning rates")
    # A short training does not need more images than it looks at.
    images["num_images"] = min(images["num_images"], args.steps * args.batch_size)
    return args, images


def check_flags(args):
    """Fails on combinations of flags that mean nothing."""
    if not 1 <= args.stride <= 999:
        fail(f"--stride {args.stride}: expected 1 to 999 timesteps")
    if args.stride > 1 and args.disc_input != "xprev":
        fail(f"--stride {args.stride} goes with --disc-input xprev, not {args.disc_input}")
    if args.retain not in ("cp", "distill"):  # without Eq. 10
        other = f"goes with --retain cp or distill, not with --retain {args.retain}"
        if args.lam != 1:
            fail(f"--lam {args.lam:g} {other}")
        if args.project == "step":
            fail(f"--project step {other}")
    if args.retain_weight != 1 and args.retain != "distill":
        fail(f"--retain-weight {args.retain_weight:g} goes with --retain distill")
    if not args.retain_weight > 0:
        fail(f"--retain-weight {args.retain_weight:g}: expected a positive number")
    if args.retain_prompts and args.retain != "distill" and args.null_space is None:
        # The noise of an anchor image is no target for another prompt.
        fail("--retain-prompts goes with --retain distill or --null-space")
    if args.null_space is not None and not 0 < args.null_space <= 1:
        fail(f"--null-space {args.null_space:g}: expected a fraction in (0, 1]")
    if args.null_space is not None and args.shard:
        fail("--null-space goes with --train-method kv, which needs no --shard; leave that out")
    if args.retain_prompts == "vocabulary" and args.init:
        # The original model knows the earlier run's concepts, and they are in the vocabulary.
        fail("--retain-prompts vocabulary would bring back what --init unlearned; give a file")
    if args.init and not any((args.init / name).is_file() for name in RESULTS):
        fail(f"--init {args.init}: no {RESULTS[0]} there; expected a finished run's folder")


def check_model(args, backbone):
    """Fails on flags that this family has no use for. args: their defaults filled in."""
    # x_{t-1} is a sample of DDPM's posterior; the path of a flow has none.
    if backbone.prediction_type == "flow" and args.disc_input == "xprev":
        fail("--disc-input xprev: flow matching has no posterior of x_{t-1}; expected x0")
    # The projection is exact where keys and values are a matrix times the prompt's embeddings. In a
    # transformer that holds for the first block alone.
    if backbone.net_name == "transformer" and args.null_space is not None:
        fail("--null-space: the keys and values of a transformer see more than embeddings")
    if args.null_space is not None and args.train_method != "kv":
        fail("--null-space goes with --train-method kv: only keys and values see embeddings alone")
    if args.rank < 1:
        fail(f"--rank {args.rank}: expected at least 1")
    if args.rank != 16 and args.train_method != "lora":
        fail(f"--rank {args.rank} goes with --train-method lora, not {args.train_method}")


# ---- 5. the run ---------------------------------------------------------------------------------


def unlearn(args):
    """Runs DoCo. Returns the run folder on rank 0, None on the other ranks. Fails on bad input.

    The order is that of the cost of a mistake: flags, then the model, then anchor images (minutes),
    then training (hours on a large model). Every rank runs all of it.
    """
    processes = common.setup_processes()

    # What can be checked before a model is loaded, which may take minutes.
    emoji = is_embedded(args.model)
    pairs = prompt_pairs(args.target, args.anchor, args.concept_type, args.prompts, emoji)
    check_flags(args)
    if args.retain_prompts and args.retain_prompts != "vocabulary":  # that needs the tokenizer
        read_retain_prompts(args.retain_prompts, args.target)  # or fails
    out = args.out or Path("runs") / common.run_name("doco", args.target)
    run = common.open_run(out, RESULTS, args.resume, processes)

    # The original model, and the settings for its family and size.
    backbone = load_backbone(args.model, tuple(f for f in FAMILIES if f is not DDPM))
    args, images = fill_defaults(args, backbone, processes)
    check_model(args, backbone)
    args.resolution = backbone.check_resolution(args.resolution)
    least = 8 * backbone.scale_factor  # latents of 8x8: two layers of the discriminator
    if args.resolution < least:
        fail(f"--resolution {args.resolution}: expected at least {least}, as this model needs")
    check_coverage(pairs, images["num_images"], len(args.target), warn=processes.rank == 0)

    # Each prompt is encoded once; then the text encoder leaves the memory.
    others = read_retain_prompts(args.retain_prompts, args.target, backbone.pipe.tokenizer)
    prompts = ["", *(anchor for anchor, _ in pairs), *(t for _, ts in pairs for t in ts), *others]
    conditions = backbone.encode_prompts(dict.fromkeys(prompts), processes.device)

    # A run is resumed only with the settings it began with, and the same contents behind them.
    contents = {"--model": backbone.fingerprint(), "--prompts": common.fingerprint(pairs)}
    contents |= {"--retain-prompts": common.fingerprint(others)} if others else {}
    if args.init:
        earlier = [args.init / name for name in RESULTS]
        contents["--init"] = common.fingerprint(*(f for f in earlier if f.is_file()))
    common.record_settings(run, args, contents, processes)
    if run.finished:  # training had finished; evaluation or --save-pipeline was interrupted
        return finish(args, run, processes)
    if processes.rank == 0:
        print(
            f"{'small-model' if backbone.small else 'paper'} preset: {args.steps} steps, the first "
            f"{args.warmup_steps} for D alone, batch {args.batch_size}, "
            f"train {args.train_method}, lr {args.lr:g}, "
            f"disc lr {args.disc_lr:g}, disc input {args.disc_input} (stride {args.stride}), "
            f"retain {args.retain}, lambda {args.lam:g}"
        )

    # What is trained keeps its precision; the rest of the network needs no gradient either.
    trained = backbone.trainable_weights(args.train_method, args.rank, args.seed)
    backbone.to(processes.device, args.mixed_precision)
    latents = anchor_latents(backbone, conditions, pairs, images, args, contents, run, processes)
    backbone.pipe = None  # the VAE leaves the memory; the network stays
    first = pairs[: len(args.target)]  # each target's first pair
    how = (first, latents, conditions, args.seed, processes)
    retained = choose_retained(backbone, others, *how) if others else []
    # The embeddings of the others leave the memory: of 1,024 words, 240 MB for Stable Diffusion.
    for prompt in set(others) - {*retained, *(p for anchor, ts in pairs for p in (anchor, *ts))}:
        del conditions[prompt]

    trained = common.use_memory_flags(backbone.net, args, processes)
    train(backbone, trained, latents, pairs, retained, conditions, args, run, processes)

    # Only the trained tensors, under the names by which plain diffusers loads them. All ranks take
    # part: with --shard, each holds some of them.
    is_lora = args.train_method == "lora"
    tensors = backbone.lora_state() if is_lora else trained
    metadata = {"format": "pt", "method": "doco", "base_model": args.model}
    common.save_tensors(run.out / RESULTS[is_lora], tensors, metadata, processes)
    if processes.rank == 0:
        run.checkpoint.unlink(missing_ok=True)
        lines = loading_lines(backbone, args.model, run.out, args.target[0])
        print(f"\nload it with:\n{lines}\n")
    return finish(args, run, processes)


def anchor_latents(backbone, conditions, pairs, images, args, contents, run, processes):
    """The anchor images x_0 as latents (N, C, h, w), generated by the original model.

    By DPM-Solver++ with guidance, as in the released code, which saves them as JPEG in between.
    Image j follows (seed, j) and the anchor prompt of entry j of the pairs, whatever the number of
    ranks: these share the work. A cache in OUT serves a run that is resumed.
    """
    n, shape = images["num_images"], backbone.latent_shape(args.resolution)
    prompts = [anchor for anchor, _ in pairs]
    key = common.fingerprint(contents["--model"], prompts, args.seed, shape, images)
    cache = run.out / "anchor_latents.safetensors"
    latents = common.read_cache(cache, "latents", key, processes)
    if latents is not None:
        return latents

    latents = torch.zeros(n, *shape, device=processes.device)
    chunks = [range(i, min(i + 16, n)) for i in range(0, n, 16)]
    mine = chunks[processes.rank :: processes.world]
    for chunk in tqdm(mine, f"{n} anchor images", disable=processes.rank > 0):
        latents[list(chunk)] = backbone.generate_latents(
            [conditions[prompts[j % len(prompts)]] for j in chunk],
            conditions[""],
            seeds=[common.derive_seed(args.seed, "samples", j) for j in chunk],
            resolution=args.resolution,
            steps=images["sampling_steps"],
            guidance=images["guidance"],
        )
    if processes.world > 1:
        dist.all_reduce(latents)  # a sum: each rank has filled its own rows
    if processes.rank == 0:
        common.atomic_save(cache, {"latents": latents}, metadata={"key": key})
    return latents


def finish(args, run, processes):
    """Writes OUT/pipeline if asked to, and ends the process group. Returns what unlearn returns.

    The pipeline comes after the weights are saved: loading the safety checker may fail offline, and
    must not cost a training.
    """
    pipeline = run.out / "pipeline"
    if processes.rank == 0 and args.save_pipeline and not pipeline.exists():
        pipe = load_pipeline(args.model, safety_checker=True, dtype=torch.float32)
        load_unlearned(pipe, run.out)
        common.atomic_save(pipeline, pipe=pipe)
    common.close_processes(processes)
    return run.out if processes.rank == 0 else None


def main():
    """Unlearns, then evaluates in a process of its own. Returns the exit code."""
    args = parse_args()
    out = unlearn(args)
    if out is None:  # rank 0 evaluates
        return 0
    flags = ["--seed", args.seed, "--concept-type", args.concept_type]
    flags += ["--target", *args.target, "--anchor", *args.anchor]
    flags += ["--resolution", args.resolution] if args.resolution else []
    return common.evaluate_run("concept", args.model, out, *flags)


if __name__ == "__main__":
    sys.exit(main())
