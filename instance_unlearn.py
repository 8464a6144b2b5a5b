"""Prompt-free instance unlearning: unlearn one image that no prompt names, and remember the rest.

Paper: "Unlearning the Unpromptable: Prompt-free Instance Unlearning in Diffusion Models", Lee et
al., arXiv 2603.10445. The image x^f is moved towards a surrogate x^s, an edited copy of it: at the
noisy x^f, the model learns the noise that would have led there from x^s. At the same time it goes
on learning other images x^r, and the forget gradient yields to theirs.

One step of Algorithm 1; M(x_t, t) predicts the noise eps:

    1. x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps             Eq. 1   of x^r and x^f: same eps, same t
    2. L_r = |eps - M(x_t^r, t)|^2                         Eq. 8   remember
    3. eps' = (x_t^f - sqrt(a_t) x^s) / sqrt(1 - a_t)      Eq. 10  the surrogate's noise at x_t^f
    4. L_f = |eps' - M(x_t^f, t)|^2                        Eq. 11  forget
    5. g_r = grad of lambda L_r,
       g_f = grad of (1 - lambda) L_f, lambda = 1 - beta t Eq. 12  forgetting weighs more at noisy t
    6. g = g_r + g_f - min(0, <g_f, g_r>) / |g_r|^2 g_r    Eq. 13  gradient surgery, of g_f alone

All of it is instance_step() and instance_gradients() below. Several images are unlearned one after
another.

    paper                  code                      paper                     code
    x^f, x^s, x^r          x_f, x_s, x_r             L_f, L_r                  loss_f, loss_r
    sqrt(a_t),             a, b                      lambda(t), beta           lam_t, beta
      sqrt(1 - a_t)                                  g_f, g_r, g               g_f, g_r, g

Flow matching (Stable Diffusion 3, FLUX) is the same idea: x_t = (1 - s) x_0 + s eps, s = t / 1000,
and M predicts the velocity eps - x_0. Keep x_t^f; the noise that leads to it from the surrogate is
eps' = (x_t^f - (1 - s) x^s) / s, Eq. 10 with other coefficients. Its velocity eps' - x^s equals
(x_t^f - x^s) / s: a model that follows it for the time s arrives at the surrogate.

Run it (the first line needs nothing but this repository; it uses the small model in emoji/ddpm):

    torchrun instance_unlearn.py
    torchrun instance_unlearn.py --model google/ddpm-celebahq-256 --forget face.png \\
        --surrogate edited.png --remember celebahq/
    torchrun instance_unlearn.py --model stabilityai/stable-diffusion-3-medium-diffusers \\
        --prompt "the flag of Japan" --forget wrong.png --surrogate painted.png

Added: images forgotten earlier take part in later steps; for small models, a falling learning rate
and stratified timesteps. What the paper leaves open, and its errata: docs/instance.md.

Beyond the paper, --remember-loss distill: L_r = |M_init(x_t^r, t) - M(x_t^r, t)|^2, the original
model's prediction in place of the noise. The noise of Eq. 8 is right on average alone: g_r varies
around 0 even before anything is forgotten, and moves the weights. The distilled g_r is 0 there.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # see backbones.py

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import common
from backbones import (
    LORA,
    coefficients,
    load_backbone,
    load_pipeline,
    load_unlearned,
    loading_lines,
    prediction_target,
    sample_timesteps,
)
from common import fail
from doco import swap_weights
from gradsurgery import flat_grad, forget_only, pcgrad, write_grad

# ---- 1. the method: pure functions of tensors ---------------------------------------------------
# B: images of a batch; C, h, w: of what the network denoises (pixels for a DDPM, else latents);
# n: number of trained weights. a and b stand for sqrt(a_t) and sqrt(1 - a_t), or 1 - s and s: see
# backbones.coefficients, and backbones.prediction_target for what a network predicts.


def surrogate_noise(xt, x_s, a, b):
    """Eq. 10: the noise that would have led from the surrogate x_s to x_t, (B, C, h, w)."""
    return (xt - a * x_s) / b


def lambda_t(t, beta, constant=None):
    """Eq. 12: the weight of remembering, 1 - beta t, for t (B,) in [0, 1000] -> (B,).

    What is left, beta t, is the weight of forgetting: at noisy timesteps the model decides what the
    image is going to show, at clean ones only its details, which all images share. (The error that
    it weights falls faster than beta t grows: docs/instance.md.) constant: the same weight at every
    t, the ablation of Table III.
    """
    if constant is not None:
        return torch.full_like(t, constant, dtype=torch.float32)
    return 1 - beta * t


def mse_per_sample(prediction, target):
    """Squared error of each sample, (B, C, h, w) -> (B,): the mean over C, h, w.

    A mean, not the paper's squared norm: its scale does not grow with the resolution.
    """
    return (prediction - target).square().mean((1, 2, 3))


def no_surgery(g_f, g_r):
    """g_r + g_f as they are, and the statistics of their conflict: the ablation of Table IV."""
    return g_r + g_f, forget_only(g_f, g_r)[1]


# --surgery: what is projected where g_f and g_r conflict. "forget" is the paper's, Eq. 13.
SURGERY = {"none": no_surgery, "forget": forget_only, "both": pcgrad}


def instance_step(
    predict,  # the model M: (x_t (B, C, h, w), t (B,)) -> (B, C, h, w)
    params,  # its trained weights, n numbers in all
    x_r,  # images to remember (B, C, h, w)
    forget,  # [(x_f, x_s)]: images to forget and their surrogates, (B, C, h, w) each
    noise,  # eps (B, C, h, w), the same for all images of a row
    t,  # timesteps (B,)
    a,  # (B, 1, 1, 1): x_t = a x_0 + b eps
    b,  # (B, 1, 1, 1)
    lam_t,  # (B,), lambda(t) of Eq. 12
    prediction_type="epsilon",  # or "v_prediction", "flow": what M predicts
    surgery="forget",  # a key of SURGERY
    predict_original=None,  # M_init, of the signature of M: L_r is distilled from it
    micro_batches=1,  # the rows in so many parts, one after another: less memory
):
    """One step of Algorithm 1. Returns (g (n,), 0-dim statistics); changes no weight.

    Two forward and two backward passes for one image to forget; one of each more for every further
    entry of forget, and a forward pass of M_init if it is given. As many for each micro-batch. The
    last entry of forget is the one that loss_f of the statistics reports.
    """
    means, size = {}, len(t) // micro_batches
    for first in range(0, len(t), size):
        rows = slice(first, first + size)
        pairs = [(x_f[rows], x_s[rows]) for x_f, x_s in forget]
        at = (noise[rows], t[rows], a[rows], b[rows], lam_t[rows])
        how = (prediction_type, predict_original)
        part = instance_gradients(predict, params, x_r[rows], pairs, *at, *how)
        # The mean of the micro-batches' gradients is the gradient of the whole batch: so they are
        # averaged here, before the projection, which is not linear.
        for name, value in part.items():
            value /= micro_batches
            means[name] = means[name].add_(value) if name in means else value

    # Eq. 13: g = g_r + g_f - min(0, <g_f, g_r>) / |g_r|^2 g_r. g_r itself is not projected: PCGrad
    # does that ("both"), and remembers less (Table IV).
    g_f, g_r = means.pop("g_f"), means.pop("g_r")
    g, stats = SURGERY[surgery](g_f, g_r)
    return g, means | stats


def instance_gradients(
    predict,  # M
    params,  # (n numbers)
    x_r,  # (B, C, h, w)
    forget,  # [(x_f, x_s)], (B, C, h, w) each
    noise,  # (B, C, h, w)
    t,  # (B,)
    a,  # (B, 1, 1, 1)
    b,  # (B, 1, 1, 1)
    lam_t,  # (B,)
    prediction_type,
    predict_original,  # M_init, or None
):
    """g_r and g_f of Eq. 12 for one micro-batch; the arguments are instance_step's.

    Returns {name: tensor}: g_r and g_f (n,), the 0-dim losses.
    """
    # Eq. 8 and 12: g_r. flat_grad frees this graph before the next one is built, so that the memory
    # holds one of them, never both.
    xt_r = a * x_r + b * noise  # (B, C, h, w), Eq. 1
    target_r = prediction_target(prediction_type, x_r, noise, a, b)  # (B, C, h, w)
    if predict_original is not None:  # "distill": the original model, not the noise, is the target
        with torch.no_grad():
            target_r = predict_original(xt_r, t)  # (B, C, h, w)
    error_r = mse_per_sample(predict(xt_r, t), target_r)  # (B,)
    g_r = flat_grad((lam_t * error_r).mean(), params)  # (n,)

    g_f = 0
    for x_f, x_s in forget:
        # Eq. 10 and 11: the input is the noisy image itself, only the regression target is the
        # surrogate's. So the model is corrected exactly where sampling would arrive at x_f.
        xt_f = a * x_f + b * noise  # (B, C, h, w), Eq. 1 with the noise and the timesteps of x_r
        noise_s = surrogate_noise(xt_f, x_s, a, b)  # (B, C, h, w), eps' of Eq. 10
        target_f = prediction_target(prediction_type, x_s, noise_s, a, b)  # (B, C, h, w)
        error_f = mse_per_sample(predict(xt_f, t), target_f)  # (B,), Eq. 11
        g_f = g_f + flat_grad(((1 - lam_t) * error_f).mean(), params)  # (n,), Eq. 12
    losses = {"loss_r": error_r.mean().detach(), "loss_f": error_f.mean().detach()}
    return {"g_r": g_r, "g_f": g_f, **losses}


# ---- 2. the training loop: Algorithm 1 ----------------------------------------------------------


def train(backbone, trained, x_f, x_s, remember_batch, n_remember, condition, args, run, processes):
    """Unlearns the images x_f (K, C, h, w) one after another, args.steps steps each, in place.

    trained: {name: parameter}. x_s: [K surrogates (C, h, w)], None for "random", other images to
    remember in every step. remember_batch: [indices] -> (B, C, h, w); indices below n_remember.
    condition: the prompt's, of one row. Resumes a run that has a checkpoint.
    """
    params = list(trained.values())
    # All that M_init costs. A LoRA begins with B = 0: its originals are the network without it.
    is_distilled = args.remember_loss == "distill"
    originals = [p.detach().clone() for p in params] if is_distilled else None
    # The paper names no optimizer. This is Adam: AdamW without weight decay.
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=0, fused=True)
    # All that a checkpoint holds: no RNG state, for all randomness derives from (seed, step).
    state = ({f"net/{n}": p for n, p in trained.items()}, (optimizer,))
    start, log = common.resume(run, *state)

    def predict(xt, t):
        """M, conditioned on the prompt of the images to forget."""
        return backbone.predict(xt, t, condition)

    def predict_original(xt, t):
        """M_init: the same network, with its original weights for this one pass."""
        swap_weights(params, originals)
        prediction = predict(xt, t)
        swap_weights(params, originals)
        return prediction

    total = args.steps * len(x_f)  # the outer loop of Algorithm 1 is over the images
    recent = []  # statistics of the steps since the last logging step, still on the device
    progress = common.progress_bar(start, total, processes)
    with common.sigterm_flag() as stop_requested:
        for step in progress:
            current = step // args.steps  # the image to forget
            idx_r, idx_s, t, noise = sample_batch(step, n_remember, x_f, backbone, args, processes)
            a, b = coefficients(t, backbone.alpha_bar)  # (B, 1, 1, 1)

            # Other images in every step: what is to be remembered is the whole data set.
            x_r = remember_batch(idx_r)  # (B, C, h, w)
            # "random" surrogates are other images to remember, new ones in every step (ours† of the
            # paper); they are read only if asked for.
            random = remember_batch(idx_s) if any(x is None for x in x_s) else None
            forget = forget_pairs(step, current, x_f, x_s, random, args.batch_size, processes)
            # All rows of the last pair show the current image, at B noise levels.
            g, stats = instance_step(
                predict,
                params,
                x_r,
                forget,
                noise,
                t,
                a,
                b,
                lambda_t(t, args.beta, args.constant_lambda),
                backbone.prediction_type,
                args.surgery,
                predict_original if is_distilled else None,
                args.gradient_accumulation_steps,
            )

            # Algorithm 1, line 21. A learning rate that falls to 0 for each image is not in it: at
            # a constant one, the gradient's noise alone moves a small model far.
            if args.lr_scheduler == "linear":
                fraction_done = step % args.steps / args.steps
                optimizer.param_groups[0]["lr"] = args.lr * (1 - fraction_done)
            write_grad(params, g)
            optimizer.step()

            recent.append(torch.stack(list(stats.values())))
            if (step + 1) % 10 == 0 or step + 1 == total:
                # One transfer from the device for ten steps; the mean over the ranks.
                rows = common.average(torch.stack(recent), processes).tolist()
                for j, row in enumerate(rows, step + 1 - len(recent)):
                    about = {"step": j, "image": j // args.steps}
                    log.append(about | dict(zip(stats, row, strict=True)))
                recent = []
                shown = ("loss_r", "loss_f", "cos")
                progress.set_postfix({key: f"{log[-1][key]:.3f}" for key in shown})
                every = 10 * max(1, total // 200)  # steps between checkpoints
                common.save_progress(run, log, step + 1, state, every, stop_requested, processes)


def sample_batch(step, n_remember, x_f, backbone, args, processes):
    """What is random in a step, of which this process gets its slice of B rows.

    Returns indices of images to remember [B], indices of random surrogates [B], timesteps (B,) and
    noise (B, C, h, w). Every rank samples the whole batch from (seed, step) and takes its rows. So
    N processes compute what one does, and a resumed run needs no saved RNG state.
    """
    n, device = args.batch_size, processes.device
    rows = common.local_slice(n, processes)
    g = common.generator(args.seed, "instance_steps", step)
    idx_r, idx_s = torch.randint(n_remember, (2, n), generator=g)[:, rows].tolist()  # [B] each
    stratified = args.timestep_sampling == "stratified"
    t = sample_timesteps(n, g, backbone.shift, stratified)[rows].to(device)  # (B,)
    noise = torch.randn(n, *x_f.shape[1:], generator=g)[rows].to(device)  # (B, C, h, w)
    return idx_r, idx_s, t, noise


def forget_pairs(step, current, x_f, x_s, random, batch_size, processes):
    """The pairs of instance_step: earlier images to forget, if there are any, then the current one.

    Not in Algorithm 1, which goes on to the next image: otherwise earlier forget images re-emerge.
    The rows of the first pair are the earlier images in turn. random (B, C, h, w): the
    surrogates of this step where x_s has None.
    """
    rows = common.local_slice(batch_size, processes)
    batches = [[current] * batch_size]  # for each pair, which image each row of it shows
    if current > 0:
        # Row i shows image (step + i) mod current: over the steps, every earlier image comes up at
        # every noise level.
        batches.insert(0, [j % current for j in range(step, step + batch_size)])
    pairs = []
    for forget_idx in (batch[rows] for batch in batches):  # [B], the slice of this process
        surrogates = [random[i] if x_s[j] is None else x_s[j] for i, j in enumerate(forget_idx)]
        pairs.append((x_f[forget_idx], torch.stack(surrogates)))
    return pairs


# ---- 3. surrogates ------------------------------------------------------------------------------
# What the image to forget is replaced by (Tables I and V). The paper edits faces with TediGAN, one
# image of Stable Diffusion 3 by SDEdit, flags by hand. Here: a file that you edited by any tool, or
#
#   sdedit  the model itself edits: noise up to --strength, then sampling (Meng et al. 2022)
#   flip    the mirror image
#   noise   the image plus Gaussian noise
#   random  no edit at all: another image to remember in each step

KINDS = ("sdedit", "flip", "noise", "random")


def make_surrogate(kind, x, k, backbone, sample, timesteps, condition, args):
    """The surrogate (C, h, w) of the image x (C, h, w), number k; None for "random".

    kind: one of KINDS, or a file. sample, timesteps: see generate_samples; condition: that of
    --surrogate-prompt.
    """
    if kind == "random":
        return None
    x, g = x[None], common.generator(args.seed, "surrogates", k)
    if kind == "sdedit":
        # From --strength on: what is coarser than that noise stays as it is in the image.
        remaining = timesteps[timesteps <= 1000 * args.strength]
        a, b = coefficients(remaining[:1], backbone.alpha_bar)
        noisy = a * x + b * torch.randn(x.shape, generator=g).to(x.device)  # Eq. 1
        return sample(noisy, remaining, condition)[0]
    if kind == "flip":  # in pixels: the latents of a mirror image are not the mirrored latents
        return backbone.encode(backbone.decode(x).flip(-1))[0]
    if kind == "noise":  # not clipped to what an image file could hold
        image = backbone.decode(x)
        noise = torch.randn(image.shape, generator=g).to(image.device)
        return backbone.encode(image + args.noise_sigma / 127.5 * noise)[0]
    return backbone.encode(common.read_exact(kind, args.resolution, "--surrogate")[None])[0]


# ---- 4. the remember set ------------------------------------------------------------------------
# Images of a data set, or samples of the model itself. No image to forget may be among them: it
# would be learned and unlearned at once.


def drop_near_duplicates(samples, x_f, reference, floor=0):
    """samples (N, C, h, w) without those that show an image to forget, x_f (K, C, h, w).

    A near-duplicate is nearer to x_f than 0.6 times the usual distance: the upper quartile of the
    distances from x_f to the reference (M, C, h, w). 0.6 separates copies from other samples of the
    embedded models. The reference is made of samples of the empty prompt: with the samples
    themselves, the threshold would fall with every copy among them. A DDPM takes no prompt, and its
    reference is the samples; there, floor keeps the threshold up.
    """
    # Euclidean distances of whole images, in pixels or latents.
    usual = torch.cdist(reference.flatten(1), x_f.flatten(1)).quantile(0.75, dim=0)  # (K,)
    distance = torch.cdist(samples.flatten(1), x_f.flatten(1))  # (N, K)
    threshold = (0.6 * usual).clamp(min=floor)
    return samples[(distance >= threshold).all(1)]


def report_dropped(n, n_left, rank=0):
    """Prints how many of n samples were dropped; warns if most were, fails if all were."""
    if n_left == 0:
        fail(
            f"--remember generated: all {n} samples show an image to forget; "
            f"expected --remember FOLDER with other images"
        )
    if rank == 0 and n_left < n:
        print(f"{n - n_left} of {n} samples show an image to forget and are dropped")
    if rank == 0 and n_left < n / 2:
        print(
            f"warning: most samples of the model show an image to forget; {n_left} are left to "
            f"remember, more would be better: --num-remember {4 * n}, or --remember FOLDER",
            file=sys.stderr,
        )


def drop_forget_files(files, forget, size):
    """The files that show none of the images to forget (K, 3, size, size), in any format or size.

    Two images are the same if their root mean square difference is 0.055 or less, of [-1, 1]: that
    of another resampling filter or a JPEG of quality 75 is below; the nearest pair of different
    emoji is at 0.061. Thumbnails of 16x16 decide for nearly all files; 30,000 files of 256x256 take
    a minute or two.
    """
    thumbnails = F.interpolate(forget, (16, 16), mode="area")

    def distance(image, images):
        """Root mean square difference of an image and the nearest of the images."""
        return (image - images).square().mean((1, 2, 3)).sqrt().min()

    left = []
    for f in tqdm(files, "comparing with --forget", disable=len(files) < 1000):
        thumbnail = common.read_cropped(f, 16, about=64)
        is_near = distance(thumbnail, thumbnails) < 0.15
        if not (is_near and distance(common.read_cropped(f, size), forget) <= 0.055):
            left.append(f)
    return left


def generate_samples(sample, timesteps, condition, n, shape, purpose, seed, processes):
    """n samples of the original model (n, *shape), each from its own seed; the ranks share them.

    sample: (noise (m, *shape), timesteps, condition) -> samples. purpose: a key of
    common.SEED_OFFSETS, so that no two sets of samples begin with the same noise.
    """
    samples = torch.zeros(n, *shape, device=processes.device)
    chunks = [range(i, min(i + 16, n)) for i in range(0, n, 16)]
    mine = chunks[processes.rank :: processes.world]
    for chunk in tqdm(mine, f"{n} {purpose.replace('_', ' ')}", disable=processes.rank > 0):
        generators = [common.generator(seed, purpose, j) for j in chunk]
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])  # (m, C, h, w)
        samples[list(chunk)] = sample(noise.to(processes.device), timesteps, condition)
    if processes.world > 1:
        dist.all_reduce(samples)  # a sum: each rank has filled its own rows
    return samples


def generated_remember_set(sample, x_f, conditions, timesteps, args, contents, run, processes):
    """Samples for --remember generated, (N, C, h, w), without near-duplicates of x_f; or noise.

    conditions: {prompt: condition}; the model takes a prompt if they are not empty. A cache in OUT
    serves a run that is resumed.
    """
    n, shape = args.num_remember, x_f.shape[1:]
    if args.remember == "noise":
        g = common.generator(args.seed, "samples", 0)
        return torch.randn(n, *shape, generator=g).to(processes.device)
    takes_prompt = bool(conditions[""])
    cache = run.out / "remember.safetensors"
    key = common.fingerprint(contents["--model"], args.prompt, args.seed, n, shape, timesteps)
    samples = common.read_cache(cache, "remember", key, processes)
    if samples is None:
        how = (shape, "samples", args.seed, processes)
        samples = generate_samples(sample, timesteps, conditions[args.prompt or ""], n, *how)
        if takes_prompt:  # 16 more of the empty prompt: the reference of drop_near_duplicates
            how = (shape, "unconditional_samples", args.seed, processes)
            reference = generate_samples(sample, timesteps, conditions[""], 16, *how)
            samples = torch.cat([samples, reference])
        if processes.rank == 0:
            common.atomic_save(cache, {"remember": samples}, metadata={"key": key})

    if takes_prompt:
        left = drop_near_duplicates(samples[:n], x_f, samples[n:])
    else:
        # A root mean square difference of 0.15, of [-1, 1], is a copy whatever else is sampled.
        floor = 0.15 * x_f[0].numel() ** 0.5
        left = drop_near_duplicates(samples, x_f, samples, floor)
    report_dropped(n, len(left), processes.rank)
    return left


# ---- 5. presets and flags -----------------------------------------------------------------------

# The paper's settings: a DDPM trains whole, Stable Diffusion 3 by LoRA; 1 and 2 get the same here.
# It does not give the LoRA's rank, nor sampling steps; guidance is the family's (backbones.py).
PAPER_DDPM = {"steps": 240, "lr": 5e-6, "beta": 5e-5, "sampling_steps": 50}
PAPER_LORA = {"steps": 100, "lr": 1e-5, "beta": 2e-4, "sampling_steps": 28}
# For small models (DDPMs of 64 pixels or less, latents below 32x32) such as emoji/ddpm, emoji/sd3:
# higher learning rates, chosen on the cowboy (DDPM) and the black cat (LoRA).
SMALL_DDPM = {"steps": 240, "lr": 6e-5, "beta": 5e-5, "sampling_steps": 50}
SMALL_LORA = {"steps": 100, "lr": 1e-3, "beta": 2e-4, "sampling_steps": 15}
# Two remedies for the noise of their gradients, neither in the paper. All baselines have them too.
PAPER_REMEDIES = {"lr_scheduler": "constant", "timestep_sampling": "uniform"}
SMALL_REMEDIES = {"lr_scheduler": "linear", "timestep_sampling": "stratified"}

# The default model, the image that it forgets, and those that it remembers: faces, monsters and
# animals, the images that it was trained on.
EMOJI_DDPM = common.REPO / "emoji/ddpm"
EMOJI_FORGET = common.REPO / "emoji/creatures/twemoji-cowboy-hat-face.png"
EMOJI_REMEMBER = common.REPO / "emoji/creatures"
GENERATED = ("generated", "noise")  # values of --remember that are no folder


def parse_args(argv=None):
    """The command line. Defaults that depend on the model are filled in by fill_defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.HelpFormatter)
    add = parser.add_argument_group("images").add_argument
    help_text = "image to unlearn; several: one after another (emoji/ddpm: the cowboy)"
    add("--forget", nargs="+", type=Path, help=help_text)
    add("--prompt", help="prompt that generates it (without it: the empty one)")
    help_text = "an edited image file, sdedit, flip, noise or random; one for all, or one per image"
    add("--surrogate", nargs="+", default=["sdedit"], metavar="FILE|KIND", help=help_text)
    help_text = "of --surrogate sdedit: noise level in (0, 1], 1 replaces the image"
    add("--strength", type=float, default=0.7, help=help_text)
    help_text = "of --surrogate noise: standard deviation, of 255"
    add("--noise-sigma", type=float, default=150.0, help=help_text)
    add("--surrogate-prompt", help="prompt of --surrogate sdedit (without it: --prompt)")
    help_text = (
        "folder of images, generated (without it; emoji/ddpm: its own), or noise (distill alone)"
    )
    add("--remember", metavar="FOLDER|KIND", help=help_text)
    add("--num-remember", type=int, default=100, help="how many to generate")

    add = parser.add_argument_group("model").add_argument
    add("--model", default=str(EMOJI_DDPM), help="DDPM, Stable Diffusion or FLUX.1")
    add("--resolution", type=int, help="side of an image in pixels (without it: the model's own)")
    add("--rank", type=int, default=16, help="rank of the LoRA; a DDPM is trained whole")

    # In brackets: DDPM and LoRA in the paper; DDPM and LoRA of small models.
    group = parser.add_argument_group("training", "without a value: (paper; small models)")
    add = group.add_argument
    add("--steps", type=int, help="steps per image to forget (240, LoRA 100; the same)")
    add("--batch-size", type=int, default=8, help="images to remember per step, over all processes")
    add("--lr", type=float, help="learning rate (5e-6, LoRA 1e-5; 6e-5, LoRA 1e-3)")
    help_text = "linear: falls to 0 for each image (constant; linear)"
    add("--lr-scheduler", choices=("constant", "linear"), help=help_text)
    help_text = "timesteps of a batch: independent, or one from each quantile (uniform; stratified)"
    add("--timestep-sampling", choices=("uniform", "stratified"), help=help_text)

    add = parser.add_argument_group("method").add_argument
    add("--beta", type=float, help="Eq. 12: lambda = 1 - beta t (5e-5, LoRA 2e-4; the same)")
    help_text = "Table III: the same lambda at every timestep, in place of --beta"
    add("--constant-lambda", type=float, help=help_text)
    help_text = "what M learns at images to remember: their noise (Eq. 8), or M_init's prediction"
    add("--remember-loss", choices=("noise", "distill"), default="noise", help=help_text)
    help_text = "Table IV: which gradient is projected: none, g_f (Eq. 13), or both (PCGrad)"
    add("--surgery", choices=SURGERY, default="forget", help=help_text)
    common.add_run_arguments(parser, "runs/instance-IMAGE")

    args = parser.parse_args(argv)
    if Path(args.model).resolve() == EMOJI_DDPM:
        args.forget = args.forget or [EMOJI_FORGET]
        args.remember = args.remember or str(EMOJI_REMEMBER)
    args.remember = args.remember or "generated"
    return args


def check_flags(args):
    """Fails on flags that contradict each other, before anything is loaded."""
    if not args.forget:
        fail("--forget is missing: which image?")
    if len(args.surrogate) not in (1, len(args.forget)):
        fail(
            f"{len(args.forget)} images but {len(args.surrogate)} surrogates; "
            f"give one --surrogate for all, or one each"
        )
    for kind in args.surrogate:  # a mistyped kind would count as a file
        if kind not in KINDS and not Path(kind).is_file():
            fail(f"--surrogate {kind}: no such file; expected a file, {', '.join(KINDS)}")
    # A flag that changes nothing is a misunderstanding; better now than after a training.
    unused = {
        "--strength": args.strength != 0.7 and "sdedit" not in args.surrogate,
        "--surrogate-prompt": args.surrogate_prompt and "sdedit" not in args.surrogate,
        "--noise-sigma": args.noise_sigma != 150 and "noise" not in args.surrogate,
        "--num-remember": args.num_remember != 100 and args.remember not in GENERATED,
        "--beta": args.beta is not None and args.constant_lambda is not None,
    }
    for flag, is_unused in unused.items():
        if is_unused:
            fail(f"{flag} has no effect with these flags; --help says what it belongs to")
    if args.remember == "noise" and args.remember_loss != "distill":
        fail("--remember noise goes with --remember-loss distill: noise is nothing to learn from")
    # 0 would leave the image as it is: nothing to learn.
    if not 0 < args.strength <= 1:
        fail(f"--strength {args.strength}: expected a number in (0, 1]")
    if args.noise_sigma < 0:
        fail(f"--noise-sigma {args.noise_sigma}: expected 0 or more")
    if args.rank < 1 or args.num_remember < 1:
        fail(f"--rank {args.rank} --num-remember {args.num_remember}: expected at least 1")


def fill_defaults(args, backbone, processes):
    """Returns the flags with their defaults filled in, and the preset. Fails on bad values.

    Flags that were given are not touched. The preset is that of the model's size and family.
    """
    args = argparse.Namespace(**vars(args))  # the caller's stays as it was typed
    if backbone.small:
        preset = SMALL_REMEDIES | (SMALL_LORA if backbone.lora_targets else SMALL_DDPM)
    else:
        preset = PAPER_REMEDIES | (PAPER_LORA if backbone.lora_targets else PAPER_DDPM)
    # The preset also holds sampling steps, which are no flag.
    for name in ("steps", "lr", "beta", "lr_scheduler", "timestep_sampling"):
        if getattr(args, name) is None:
            setattr(args, name, preset[name])
    if len(args.surrogate) == 1:
        args.surrogate = args.surrogate * len(args.forget)
    args.resolution = backbone.check_resolution(args.resolution)

    # The batch is split over the processes, each gets as many images.
    common.check_processes(args, processes)
    if args.shard and backbone.lora_targets is None:
        fail("--shard: a DDPM fits any card; leave it out")
    args.mixed_precision = common.mixed_precision(args, processes.device)
    if args.steps < 1 or not args.lr > 0:
        fail(f"--steps {args.steps} --lr {args.lr:g}: expected at least one step, a positive rate")
    # lambda must stay in [0, 1] for all t in [0, 1000].
    if not 0 <= args.beta <= 1e-3:
        fail(f"--beta {args.beta:g}: expected 0 to 1e-3, for lambda in [0, 1]")
    if args.constant_lambda is not None and not 0 <= args.constant_lambda <= 1:
        fail(f"--constant-lambda {args.constant_lambda:g}: expected a number in [0, 1]")
    return args, preset


# ---- 6. the run ---------------------------------------------------------------------------------

RESULTS = ("pipeline", LORA)  # of a DDPM; of a LoRA


def unlearn(args):
    """Runs Algorithm 1. Returns the run folder on rank 0, None on the others. Fails on bad input.

    The order is that of the cost of a mistake: flags, then the model, then images, then training.
    """
    processes = common.setup_processes()
    check_flags(args)
    out = args.out or Path("runs") / common.run_name("instance", [f.stem for f in args.forget])
    run = common.open_run(out, RESULTS, args.resume, processes)

    # The original model, and the settings for its family and size.
    backbone = load_backbone(args.model)
    # "" is the unconditional prompt of guidance; a dict keeps the order and drops duplicates.
    prompts = {"": None, args.prompt or "": None, args.surrogate_prompt or args.prompt or "": None}
    if not backbone.takes_prompt and len(prompts) > 1:
        fail(f"--prompt {list(prompts)[1]!r}: {args.model} is unconditional, it takes no prompt")
    args, preset = fill_defaults(args, backbone, processes)
    size = args.resolution
    # A data set is compared with the images to forget here, and read again in each step.
    images = [common.read_exact(f, size, "--forget") for f in args.forget]
    pixels_f = torch.stack(images)  # (K, 3, size, size)
    files = [] if args.remember in GENERATED else remember_files(args, pixels_f)

    # Each prompt is encoded once; then the text encoders leave the memory.
    conditions = backbone.encode_prompts(prompts, processes.device)

    # A run is resumed only with the settings it began with, and the same contents behind them.
    edited = [Path(kind) for kind in args.surrogate if kind not in KINDS]
    contents = {
        "--model": common.fingerprint(backbone.fingerprint(), preset, backbone.sample_guidance),
        "--forget": common.fingerprint(*args.forget),
        "--surrogate": common.fingerprint(*(f for f in edited if f.is_file())),
        "--remember": common.fingerprint_files(files),
    }
    common.record_settings(run, args, contents, processes)
    if run.finished:  # training had finished; evaluation or --save-pipeline was interrupted
        return finish(args, run, processes)
    if processes.rank == 0:
        print(preset_line(args, backbone))

    # What is trained keeps its precision; the rest of the network needs no gradient either.
    trained = trainable_weights(backbone, args)
    backbone.to(processes.device, args.mixed_precision)

    # x^f, x^r and x^s, as the network sees them.
    timesteps = backbone.timesteps(preset["sampling_steps"])
    null_condition = conditions[""] if backbone.takes_prompt else None

    def sample(x, timesteps, condition):
        """Samples of the original model from x (B, C, h, w), as noisy as timesteps[0]."""
        return backbone.sample(x, timesteps, condition, null_condition, backbone.sample_guidance)

    x_f = backbone.encode(pixels_f)  # (K, C, h, w)
    if files:
        generated, n_remember = None, len(files)
    else:
        generated = generated_remember_set(
            sample, x_f, conditions, timesteps, args, contents, run, processes
        )
        n_remember = len(generated)
    x_s = make_surrogates(backbone, x_f, sample, timesteps, conditions, args, run, processes)

    def remember_batch(indices):
        """Images to remember (B, C, h, w). Files are read when needed: a data set may be large."""
        if generated is not None:
            return generated[indices]
        return backbone.encode(torch.stack([common.read_cropped(files[j], size) for j in indices]))

    if backbone.takes_prompt and generated is not None:
        backbone.pipe.vae = None  # it leaves the memory; files would still need it
    trained = common.use_memory_flags(backbone.net, args, processes)
    condition = conditions[args.prompt or ""]
    train(backbone, trained, x_f, x_s, remember_batch, n_remember, condition, args, run, processes)

    save(backbone, run, processes)
    if processes.rank == 0:
        lines = loading_lines(backbone, args.model, run.out, args.prompt or "")
        print(f"\nload it with:\n{lines}\n")
    return finish(args, run, processes)


def remember_files(args, pixels_f):
    """The files below --remember that show no image to forget. Fails if none is left."""
    files = common.list_images(args.remember)
    if not files:
        fail(
            f"--remember {args.remember}: no images there; "
            f"expected a folder of png, jpg or webp files, generated or noise"
        )
    files = drop_forget_files(files, pixels_f, args.resolution)
    if not files:
        fail(f"--remember {args.remember}: every image there shows one to forget; expected others")
    return files


def make_surrogates(backbone, x_f, sample, timesteps, conditions, args, run, processes):
    """[K surrogates (C, h, w), or None for "random"], also written to OUT/surrogate-K.png."""
    condition = conditions[args.surrogate_prompt or args.prompt or ""]
    # Below the sampler's last timestep, nothing would be sampled.
    if "sdedit" in args.surrogate and 1000 * args.strength < timesteps[-1]:
        fail(f"--strength {args.strength}: expected more, for one step of the sampler at least")
    x_s = []
    for k, kind in enumerate(args.surrogate):
        how = (backbone, sample, timesteps, condition, args)
        x_s.append(make_surrogate(kind, x_f[k], k, *how))
        if processes.rank == 0 and x_s[k] is not None:
            image = common.to_image(backbone.decode(x_s[k][None])[0])
            image.save(run.out / f"surrogate-{k}.png")
    return x_s


def trainable_weights(backbone, args):
    """{name: parameter} of what is trained: the whole DDPM, or a LoRA of the attention."""
    # A DDPM has no part that a prompt or its attention could name: the image may be anywhere.
    method = "lora" if backbone.lora_targets else "full"
    return backbone.trainable_weights(method, args.rank, args.seed)


def save(backbone, run, processes):
    """Writes the result in a format that plain diffusers loads, and removes the checkpoint.

    Called by all ranks, which may hold a shard each; rank 0 writes.
    """
    if backbone.lora_targets is not None:
        common.save_tensors(run.out / LORA, backbone.lora_state(), {"format": "pt"}, processes)
    elif processes.rank == 0:
        common.atomic_save(run.out / "pipeline", pipe=backbone.pipe)
    if processes.rank == 0:
        run.checkpoint.unlink(missing_ok=True)


def finish(args, run, processes):
    """Writes OUT/pipeline if asked to, and ends the process group. Returns what unlearn returns.

    The pipeline of a LoRA is the whole model with the LoRA fused into it, for tools that take
    folders. It comes after the weights are saved: loading may fail offline, and must not cost a
    training.
    """
    pipeline = run.out / "pipeline"
    if processes.rank == 0 and args.save_pipeline and not pipeline.exists():
        pipe = load_pipeline(args.model, safety_checker=True, dtype=torch.float32)
        load_unlearned(pipe, run.out)
        common.atomic_save(pipeline, pipe=pipe)
    common.close_processes(processes)
    return run.out if processes.rank == 0 else None


def preset_line(args, backbone):
    """What is printed before training: the settings that decide the result."""
    weight = f"beta {args.beta:g}"
    if args.constant_lambda is not None:
        weight = f"lambda {args.constant_lambda:g}"
    return (
        f"{'small-model' if backbone.small else 'paper'} preset for {type(backbone).__name__}: "
        f"{args.steps} steps per image, batch {args.batch_size}, lr {args.lr:g} "
        f"{args.lr_scheduler}, {args.timestep_sampling} timesteps, {weight}, "
        f"surgery {args.surgery}, remember loss {args.remember_loss}"
    )


def main():
    """Unlearns, then evaluates in a process of its own. Returns the exit code."""
    args = parse_args()
    out = unlearn(args)
    if out is None:  # rank 0 evaluates
        return 0
    flags = ["--seed", args.seed, "--forget", *args.forget]
    flags += ["--prompt", args.prompt] if args.prompt else []
    # Real images for FID_real, if there are some.
    has_real = args.remember not in GENERATED and len(common.list_images(args.remember)) > 1
    flags += ["--real", args.remember] if has_real else []
    flags += ["--resolution", args.resolution] if args.resolution else []
    return common.evaluate_run("instance", args.model, out, *flags)


if __name__ == "__main__":
    sys.exit(main())
