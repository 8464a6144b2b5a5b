"""The training loop of doco.py, on a tiny model of each family; and broken copies of it.

doco_step() as a function is tested in test_doco_step.py. Here are the things around it: which
images, prompts, timesteps and noises a step gets, what M_init is, what the optimizers do with the
gradients, what the log holds, and that a resumed run goes on as if nothing had happened.

`check_training` runs a module (doco.py, or a mutant of it) for four steps and records what is
handed to the two optimizers. Then it computes the same with plain diffusers, the equations, and the
documented order of the random numbers, sample by sample.
"""

import copy
import json
import math
import os
import re
import signal
import types

import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import common
import doco
from discriminator import patchgan

SEED, BATCH, STEPS, WARMUP, LR, DISC_LR = 2, 2, 4, 1, 1e-3, 2e-3
N_IMAGES = STEPS * BATCH

# The prompts, and the pairs that must become of them: (anchor prompt, target prompts).
CATS = "a photo of a cat\none Cat\nthe cat sleeps\n"
CATS_PAIRS = [
    ("a photo of a cat", ["a photo of a Grumpy Cat"]),
    ("one Cat", ["one Grumpy Cat"]),
    ("the cat sleeps", ["the Grumpy Cat sleeps"]),
]
BOTH = "a cat and a dog\na dog and a cat\na dog\n"
BOTH_PAIRS = [
    ("a cat and a dog", ["a Tom and a dog"]),
    ("a cat and a dog", ["a cat and a Snoopy"]),
    ("a dog and a cat", ["a dog and a Tom"]),
    ("a dog and a cat", ["a Snoopy and a cat"]),
    ("a dog", ["a Snoopy"]),
]
STYLE = "a painting of a dog\n"
STYLE_PAIRS = [
    (
        "a painting of a dog",
        [
            "a painting of a dog, in the style of Van Gogh",
            "a dog, in the style of Van Gogh",
            "in Van Gogh's style, a painting of a dog",
        ],
    )
]
# The third is the target to the model (spaces do not count there), but not to the test of its name.
RETAINED = ["one tree", "a yellow submarine", "a photo of a Grumpy  Cat", "a black cat"]
WITH_PROMPTS = ["--retain-prompts", "RETAINED", "--retain-weight", "0.4"]
OF_CATS = ["--target", "Grumpy Cat", "--anchor", "Cat"]
OF_BOTH = ["--target", "Tom", "Snoopy", "--anchor", "cat", "dog"]
OF_STYLE = ["--target", "Van Gogh", "--anchor", "painting", "--concept-type", "style"]

# name: (content of --prompts, the pairs, flags)
SWITCHES = {
    "paper": (CATS, CATS_PAIRS, OF_CATS),
    "lambda 0.5": (CATS, CATS_PAIRS, [*OF_CATS, "--lam", "0.5"]),
    "no retention": (CATS, CATS_PAIRS, [*OF_CATS, "--retain", "none"]),
    "l2": (CATS, CATS_PAIRS, [*OF_CATS, "--retain", "l2"]),
    "x_{t-20}": (CATS, CATS_PAIRS, [*OF_CATS, "--disc-input", "xprev", "--stride", "20"]),
    "x_{t-1}": (CATS, CATS_PAIRS, [*OF_CATS, "--disc-input", "xprev"]),
    "x_{t-900}": (CATS, CATS_PAIRS, [*OF_CATS, "--disc-input", "xprev", "--stride", "900"]),
    "project the step": (CATS, CATS_PAIRS, [*OF_CATS, "--project", "step"]),
    "project the step, lambda 0.5": (
        *(CATS, CATS_PAIRS),
        [*OF_CATS, "--project", "step", "--lam", "0.5"],
    ),
    "x_{t-20}, project the step, lambda 0.5": (
        *(CATS, CATS_PAIRS),
        [*OF_CATS, "--disc-input", "xprev", "--stride", "20", "--project", "step", "--lam", "0.5"],
    ),
    "two targets": (BOTH, BOTH_PAIRS, OF_BOTH),
    "style": (STYLE, STYLE_PAIRS, OF_STYLE),
    "init": (CATS, CATS_PAIRS, [*OF_CATS, "--init", "EARLIER"]),
    # From an earlier run: where M is still M_init, G_r of a distillation is 0.
    "distill": (CATS, CATS_PAIRS, [*OF_CATS, "--init", "EARLIER", "--retain", "distill"]),
    "distill, prompts": (
        *(CATS, CATS_PAIRS),
        [*OF_CATS, "--init", "EARLIER", "--retain", "distill", *WITH_PROMPTS],
    ),
    "null space": (CATS, CATS_PAIRS, [*OF_CATS, "--null-space", "0.7"]),
    "null space, prompts, init": (
        *(CATS, CATS_PAIRS),
        [*OF_CATS, "--init", "EARLIER", "--null-space", "0.99", "--retain-prompts", "RETAINED"],
    ),
}
# Other families: (the model, the switch). A transformer's keys and values of the text, to compare.
FAMILY_SWITCHES = {
    "v-prediction": ("v", []),
    "v-prediction, x_{t-20}": ("v", ["--disc-input", "xprev", "--stride", "20"]),
    "sdxl": ("sdxl", []),
    "sdxl, kv, null space": ("sdxl", ["--train-method", "kv", "--null-space", "0.7"]),
    "sd3": ("sd3", ["--train-method", "kv"]),
    "sd3, whole attention": ("sd3", ["--train-method", "xattn"]),
    "sd3, l2": ("sd3", ["--train-method", "kv", "--retain", "l2"]),
    "flux": ("flux", ["--train-method", "kv", "--resolution", "16"]),
}
for name, (_, flags) in FAMILY_SWITCHES.items():
    SWITCHES[name] = (CATS, CATS_PAIRS, [*OF_CATS, *flags])
MODELS = {name: model for name, (model, _) in FAMILY_SWITCHES.items()}
QUICK = ("v-prediction", "sdxl", "sd3", "flux")
QUICK += ("paper", "x_{t-20}, project the step, lambda 0.5", "two targets", "style", "init")
QUICK += ("distill, prompts", "null space, prompts, init")


# ---- runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def models(tiny, tiny_sdxl, tiny_sd3, tiny_flux, tmp_path_factory):
    """{family: folder}; "v" is the Stable Diffusion with another meaning of its predictions."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    folder = tmp_path_factory.mktemp("v") / "sd"
    pipe.save_pretrained(folder)
    return {"sd": tiny, "v": folder, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}


@pytest.fixture
def train(tiny, tmp_path, monkeypatch):
    """train(module, text of --prompts, *flags): a run folder."""

    def run(module, text, *flags, out="run", model=tiny):
        (tmp_path / "prompts.txt").write_text(text)
        for images in (module.SMALL_IMAGES, module.PAPER_IMAGES):
            monkeypatch.setitem(images, "sampling_steps", 3)
        argv = ["--model", model, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / out]
        argv += ["--steps", STEPS, "--warmup-steps", WARMUP, "--batch-size", BATCH]
        argv += ["--seed", SEED, "--lr", LR, "--disc-lr", DISC_LR, *flags]
        return module.unlearn(module.parse_args([str(value) for value in argv]))

    return run


@pytest.fixture
def recorded(train, tiny, models, tmp_path, monkeypatch):
    """recorded(module, switch): (run folder, what each optimizer got: [(values, gradient)])."""

    def run(module, switch):
        text, _, flags = SWITCHES[switch]
        if "EARLIER" in flags:
            flags = [earlier_run(tiny, tmp_path) if f == "EARLIER" else f for f in flags]
        if "RETAINED" in flags:
            (tmp_path / "retained.txt").write_text("\n".join(RETAINED))
            flags = [tmp_path / "retained.txt" if f == "RETAINED" else f for f in flags]
        records, write_grad = [], module.write_grad

        def record(params, grad):
            params = list(params)
            records.append((flat(params), grad.detach().clone()))
            write_grad(params, grad)

        monkeypatch.setattr(module, "write_grad", record)
        return train(module, text, *flags, model=models[MODELS.get(switch, "sd")]), records

    return run


def earlier_run(tiny, tmp_path):
    """A run folder to start from: other weights than the original model's."""
    folder = tmp_path / "earlier"
    folder.mkdir()
    unet = StableDiffusionPipeline.from_pretrained(tiny).unet
    g = torch.Generator().manual_seed(0)
    earlier = {}
    for name, p in trained_parameters(unet).items():
        earlier[name] = p.detach() + 0.1 * torch.randn(p.shape, generator=g)
    save_file(earlier, folder / "delta.safetensors")
    return folder


def trained_parameters(net, method="kv"):
    """{name: parameter} of the text's keys and values, or of the whole attention with it.

    text, of a UNet: with the layers of the pooled embedding, where it has any.
    """
    parts = ("attn2.to_k", "attn2.to_v", "attn.add_k_proj", "attn.add_v_proj")
    if method == "xattn":
        parts = ("attn.",)
    if method == "text":
        parts += ("add_embedding.",)
    return {n: p for n, p in net.named_parameters() if any(part in n for part in parts)}


# ---- the second computation ---------------------------------------------------------------------


def flat(tensors):
    """One vector of all the numbers, a copy."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def write(params, vector):
    """Writes a vector into the parameters."""
    for p, values in zip(params, vector.split([p.numel() for p in params]), strict=True):
        p.data.copy_(values.view_as(p))


def close(got, expected, what):
    """Equal up to the rounding of single precision."""
    expected = torch.as_tensor(expected, dtype=got.dtype)
    atol = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=atol, msg=lambda m: f"{what}: {m}")


def plain_pipeline(folder, family):
    """The pipeline by diffusers alone."""
    dtype, absent = torch.float32, {}
    if family == "flux":
        dtype = {"default": dtype, "text_encoder_2": torch.bfloat16}  # T5
    if family == "sd3":
        absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


GUIDANCE = {"sd": 6.0, "v": 6.0, "sdxl": 5.0, "sd3": 4.0, "flux": 3.5}


def anchor_images(pipe, pairs, family):
    """Image j from the anchor prompt of pair j, by the family's sampler, and its own seed."""
    if family not in ("sd3", "flux"):
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    seeds = [torch.Generator().manual_seed(SEED * 1_000_003 + j) for j in range(N_IMAGES)]
    prompts = [pairs[j % len(pairs)][0] for j in range(N_IMAGES)]
    what = {"prompt": prompts}
    if family == "flux":
        rows, pooled, _ = pipe.encode_prompt(prompts, prompts, "cpu")
        what = {"prompt_embeds": rows.float(), "pooled_prompt_embeds": pooled}
        what |= {"height": 16, "width": 16}
    latents = pipe(
        guidance_scale=GUIDANCE[family],
        num_inference_steps=3,
        output_type="latent",
        generator=seeds,
        **what,
    ).images
    return unpacked(latents) if family == "flux" else latents


def packed(x):
    """FLUX: (n, C, h, w) -> (n, h w / 4, 4 C), a token for each square of 2x2."""
    n, _, h, w = x.shape
    tokens = [
        x[:, :, i : i + 2, j : j + 2].reshape(n, -1) for i in range(0, h, 2) for j in range(0, w, 2)
    ]
    return torch.stack(tokens, 1)


def unpacked(tokens):
    """The inverse of packed(), for square images."""
    n, count, width = tokens.shape
    side = 2 * int(count**0.5)
    x = tokens.new_zeros(n, width // 4, side, side)
    for k in range(count):
        i, j = 2 * (k // (side // 2)), 2 * (k % (side // 2))
        x[:, :, i : i + 2, j : j + 2] = tokens[:, k].view(n, -1, 2, 2)
    return x


def condition_of(pipe, prompt, family):
    """{argument of the network: (1, ...)} of a prompt, by diffusers alone."""
    if family in ("sd", "v"):
        return {"encoder_hidden_states": pipe.encode_prompt(prompt, "cpu", 1, False)[0]}
    if family == "flux":
        rows, pooled, ids = pipe.encode_prompt(prompt, prompt, "cpu")
        img_ids = torch.tensor([[0.0, i, j] for i in range(4) for j in range(4)])
        more = {"txt_ids": ids, "img_ids": img_ids, "guidance": torch.ones(1)}
        return {"encoder_hidden_states": rows.float(), "pooled_projections": pooled} | more
    if family == "sd3":
        rows, _, pooled, _ = pipe.encode_prompt(
            prompt, prompt, prompt, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": rows, "pooled_projections": pooled}
    rows, _, pooled, _ = pipe.encode_prompt(prompt, prompt, "cpu", 1, False)
    time_ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]])
    added = {"text_embeds": pooled, "time_ids": time_ids}
    return {"encoder_hidden_states": rows, "added_cond_kwargs": added}


def call(net, family, x, t, condition):
    """What the network predicts at a latent (1, C, h, w)."""
    t = torch.as_tensor(t).view(1)
    if family == "flux":
        return unpacked(net(packed(x), timestep=t / 1000, **condition).sample)
    return net(x, timestep=t, **condition).sample


def draw_timesteps(g, family):
    """Timesteps of both batches, (2, BATCH)."""
    if family not in ("sd3", "flux"):
        return torch.randint(1000, (2, BATCH), generator=g)
    # Logit-normal, then shifted: by the scheduler's shift, or by FLUX's rule for 16 tokens.
    mu = 0.5 + (1.15 - 0.5) * (16 - 256) / (4096 - 256)
    shift = 3.0 if family == "sd3" else math.exp(mu)
    u = torch.cat([torch.rand(BATCH, generator=g) for _ in range(2)]).view(2, BATCH)
    odds = shift * torch.distributions.Normal(0, 1).icdf(u).exp()
    return (1000 * odds / (1 + odds)).clamp(min=1)


def noised(a_bar, family, x0, noise, t):
    """x_t, and what the network should predict there."""
    if family in ("sd3", "flux"):
        s = t / 1000
        return (1 - s) * x0 + s * noise, noise - x0
    a = a_bar[t]
    xt = a.sqrt() * x0 + (1 - a).sqrt() * noise  # Eq. 1
    return xt, a.sqrt() * noise - (1 - a).sqrt() * x0 if family == "v" else noise


def shown_to_d(family, disc_input, stride, a_bar, t, xt, eps, posterior_noise):
    """What D is shown of a sample: x0_hat, or the posterior sample in DDPM's words."""
    if family in ("sd3", "flux"):
        return xt - t / 1000 * eps
    a = a_bar[t]
    if family == "v":
        eps = a.sqrt() * eps + (1 - a).sqrt() * xt
    x0_hat = (xt - (1 - a).sqrt() * eps) / a.sqrt()
    if disc_input == "x0":
        return x0_hat
    a_s = a_bar[t - stride] if t >= stride else torch.tensor(1.0)
    mean_x0 = a_s.sqrt() * (1 - a / a_s) / (1 - a) * x0_hat
    mean_xt = (a / a_s).sqrt() * (1 - a_s) / (1 - a) * xt
    sigma = ((1 - a_s) / (1 - a) * (1 - a / a_s)).sqrt()
    return mean_x0 + mean_xt + sigma * posterior_noise


class Recomputation:
    """The same training with two networks, one of which stays the original."""

    def __init__(self, folder, pairs, args, family="sd"):
        pipe = plain_pipeline(folder, family)
        self.pairs, self.args, self.family = pairs, args, family
        self.retained = RETAINED if args.retain_prompts else []
        prompts = {p for anchor, targets in pairs for p in (anchor, *targets)}
        prompts |= {"", *self.retained}
        with torch.no_grad():
            self.conditions = {p: condition_of(pipe, p, family) for p in prompts}
        rows = {p: c["encoder_hidden_states"] for p, c in self.conditions.items()}
        self.embeddings = rows
        if family == "sdxl":  # guidance subtracts zeros, not the encoded empty prompt
            self.embeddings = rows | {"": torch.zeros_like(rows[""])}
        self.latents = anchor_images(pipe, pairs, family)
        beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.a_bar = (1 - beta).cumprod(0).float()
        self.original = (pipe.transformer if family in ("sd3", "flux") else pipe.unet).eval()
        self.net = copy.deepcopy(self.original)
        method = args.train_method or ("text" if family == "sdxl" else "kv")
        self.trained = trained_parameters(self.net, method)
        if self.retained:
            self.retained = self.choose()
        torch.manual_seed(SEED)
        self.disc = patchgan(self.latents.shape[-1], self.latents.shape[1])

    @torch.no_grad()
    def choose(self):
        """RETAINED, the nearest to the target first, without what the model takes for it."""
        anchor, (target, *_) = self.pairs[0]
        noise = torch.randn(
            4, 4, 16, 16, generator=torch.Generator().manual_seed(SEED * 1_000_003 + 950_000)
        )
        noisy = []
        for k, t in enumerate((600, 750, 900, 980)):
            a = self.a_bar[t]
            noisy.append((a.sqrt() * self.latents[k] + (1 - a).sqrt() * noise[k], t))

        def predictions(prompt):
            return flat(self.original(x[None], t, self.embeddings[prompt]).sample for x, t in noisy)

        at_target = predictions(target)
        unit = (predictions(anchor) - at_target).norm()
        near = sorted(RETAINED, key=lambda p: (self.embeddings[p] - self.embeddings[target]).norm())
        chosen = [p for p in near if (predictions(p) - at_target).norm() >= 0.5 * unit]
        assert 1 < len(chosen) < len(RETAINED) and chosen != [p for p in RETAINED if p in chosen]
        return chosen

    def predict(self, net, x, t, prompt):
        """What a network predicts at one latent (C, h, w) -> (1, C, h, w)."""
        return call(net, self.family, x[None], t, self.conditions[prompt])

    def step(self, step):
        """(losses, gradients) of a step at the present weights: {"u", "r", "d"} each."""
        g = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        idx, idx_r = torch.randint(N_IMAGES, (2, BATCH), generator=g)
        t, t_r = draw_timesteps(g, self.family)
        shape = (3, BATCH, *self.latents.shape[1:])
        noise, noise_r, posterior_noise = torch.randn(shape, generator=g)
        if self.retained and self.args.retain == "distill":
            picks = torch.randint(len(self.retained), (BATCH,), generator=g)
        losses = {"u": 0, "r": 0, "d": 0}
        for b in range(BATCH):
            anchor, targets = self.pairs[idx[b] % len(self.pairs)]
            target = targets[step % len(targets)]
            xt, _ = noised(self.a_bar, self.family, self.latents[idx[b]], noise[b], t[b])
            shown = (self.family, self.args.disc_input, self.args.stride, self.a_bar, t[b], xt)
            with torch.no_grad():
                eps = self.predict(self.original, xt, t[b], anchor)  # Eq. 5
                of_anchor = shown_to_d(*shown, eps, posterior_noise[b])
            eps = self.predict(self.net, xt, t[b], target)
            of_target = shown_to_d(*shown, eps, posterior_noise[b])
            p_anchor = torch.sigmoid(self.disc(of_anchor).double())
            p_target = torch.sigmoid(self.disc(of_target.detach()).double())
            losses["d"] -= (p_anchor.log() + (1 - p_target).log()).mean() / BATCH  # Eq. 8
            p_fooled = torch.sigmoid(self.disc(of_target).double())
            losses["u"] -= p_fooled.log().mean() / BATCH  # Eq. 8, non-saturating

            x0_r = self.latents[idx_r[b]]
            x_r, aim = noised(self.a_bar, self.family, x0_r, noise_r[b], t_r[b])  # Eq. 9
            prompt_r = self.pairs[idx_r[b] % len(self.pairs)][0]
            if self.retained and self.args.retain == "distill" and (step + b) % 4 > 0:
                prompt_r = self.retained[picks[b]]
            eps_r = self.predict(self.net, x_r, t_r[b], prompt_r)[0]
            if self.args.retain == "distill":
                with torch.no_grad():
                    aim = self.predict(self.original, x_r, t_r[b], prompt_r)[0]
            losses["r"] += (aim - eps_r).square().mean() / BATCH
        weights = {"u": self.trained.values(), "r": self.trained.values()}
        weights["d"] = self.disc.parameters()
        gradients = {k: flat(torch.autograd.grad(losses[k], list(weights[k]))) for k in losses}
        return {k: float(loss.detach()) for k, loss in losses.items()}, gradients

    def gradient(self, gradients):
        """G, of which M's optimizer makes a step."""
        g_u, g_r = gradients["u"], gradients["r"]
        dot = g_u @ g_r
        if self.args.retain == "l2":
            return g_u + g_r
        g = g_u
        if self.args.retain != "none" and self.args.project == "gradient" and dot < 0:
            g = g_u - self.args.lam * dot / (g_r @ g_r) * g_r  # Eq. 10
        if self.args.retain == "distill":
            g = g + self.args.retain_weight * g.norm() / g_r.norm() * g_r
        return g

    def kept(self, values, begin):
        """Weights (n,) whose change since `begin` leaves the keys and values of prompts alone.

        By least squares: the change is its own residual after a fit by the main directions.
        """
        prompts = {"", *(anchor for anchor, _ in self.pairs), *self.retained}
        rows = torch.cat([self.embeddings[p][0] for p in prompts]).double()
        _, s, v = torch.linalg.svd(rows, full_matrices=False)
        share = s.square().cumsum(0) / s.square().sum()
        main = v[: int((share < self.args.null_space - 1e-9).sum()) + 1].T  # (D, k)
        result, sizes = [], [p.numel() for p in self.trained.values()]
        parts = zip(values.split(sizes), begin.split(sizes), self.trained.values(), strict=True)
        for value, first, p in parts:
            change = (value - first).view_as(p).double()
            fit = torch.linalg.lstsq(main, change.T).solution
            result.append(first + (change - (main @ fit).T).float().reshape(-1))
        return torch.cat(result)


def adam_direction(gradients, beta_1):
    """Adam's step for the last of the gradients, for a learning rate of 1 (Kingma & Ba 2015)."""
    m, v = 0, 0
    for g in gradients:
        m = beta_1 * m + (1 - beta_1) * g
        v = 0.999 * v + 0.001 * g * g
    k = len(gradients)
    return (m / (1 - beta_1**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8)


def check_training(module, recorded, models, switch):
    """Raises AssertionError unless a run of the module is what the equations give.

    Returns, for each step that trains M, whether the two gradients conflict.
    """
    run, records = recorded(module, switch)
    _, pairs, flags = SWITCHES[switch]
    args = doco.parse_args(flags)
    family = MODELS.get(switch, "sd")
    other = Recomputation(models[family], pairs, args, family)
    images = load_file(run / "anchor_latents.safetensors")["latents"]
    close(images, other.latents, "anchor images")
    assert torch.equal(records[0][0], flat(other.disc.parameters())), "D begins otherwise"
    result = load_file(run / "delta.safetensors")
    assert result.keys() == other.trained.keys()

    # In the warm-up, D alone; then M and D take turns.
    of_d = [records[0], *records[2::2]]
    of_m = records[1::2]
    assert WARMUP == 1 and len(of_d) == STEPS and len(of_m) == STEPS - 1, "number of steps"
    end = flat(result[name] for name in other.trained)
    values_m = [values for values, _ in of_m] + [end]
    begin = flat(other.trained.values())
    if args.init:  # one of the two networks begins elsewhere; the original model stays what it is
        earlier = load_file(run.parent / "earlier/delta.safetensors")
        begin = flat(earlier[name] for name in other.trained)
    assert torch.equal(values_m[0], begin), "M begins otherwise"
    conflicts = []
    for step in range(STEPS):
        write(list(other.trained.values()), values_m[max(0, step - WARMUP)])
        write(list(other.disc.parameters()), of_d[step][0])
        losses, gradients = other.step(step)
        close(of_d[step][1], gradients["d"], f"gradient of D, step {step}")
        if step + 1 < STEPS:
            so_far = [g for _, g in of_d[: step + 1]]
            step_d = of_d[step][0] - of_d[step + 1][0]
            expected = DISC_LR * adam_direction(so_far, 0.5)
            torch.testing.assert_close(step_d, expected, rtol=0, atol=2e-3 * DISC_LR)
        if step < WARMUP:
            continue
        k = step - WARMUP
        conflicts.append(bool(gradients["u"] @ gradients["r"] < 0))
        close(of_m[k][1], other.gradient(gradients), f"gradient of M, step {step}")
        so_far = [g for _, g in of_m[: k + 1]]
        adam = LR * 1e-2 * values_m[k] + LR * adam_direction(so_far, 0.9)  # AdamW
        g_r = gradients["r"]
        dot = adam @ g_r
        step_m = adam
        if args.project == "step" and dot < 0:
            step_m = adam - args.lam * dot / (g_r @ g_r) * g_r  # Eq. 10, of the step
        if args.null_space:
            step_m = values_m[k] - other.kept(values_m[k] - step_m, begin)
        taken = values_m[k] - values_m[k + 1]
        torch.testing.assert_close(taken, step_m, rtol=0, atol=2e-4 * LR)

    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    expected = {"step": STEPS - 1, "loss_d": losses["d"], "loss_u": losses["u"]}
    expected["norm_g"] = of_m[-1][1].norm()
    if args.retain != "none":
        g_u = gradients["u"]
        expected |= {"loss_r": losses["r"], "norm_r": g_r.norm(), "norm_f": g_u.norm()}
        expected["cos"] = g_u @ g_r / g_u.norm() / g_r.norm()
        expected["cos_step"] = dot / adam.norm() / g_r.norm()
        expected["conflict"] = sum(conflicts) / len(conflicts)
        g = of_m[-1][1]
        untouched = args.project == "step" or args.retain == "cp" and not conflicts[-1]
        expected["share_r"] = 0 if untouched else (g - g_u).norm() / g.norm()
    assert len(rows) == 1 and rows[0].keys() == expected.keys() | {"disc_acc"}, rows
    for name, value in expected.items():
        close(torch.tensor(float(rows[0][name])), value, f"{name} of the log")
    return conflicts


def check_log(module, train, monkeypatch):
    """Raises AssertionError unless the rows are those of steps 9 and 12, of 13.

    A row holds the losses of its step, and of conflict the mean since the last row.
    """
    updates, doco_step = [], module.doco_step

    def record(*args, **kwargs):
        updates.append(doco_step(*args, **kwargs))
        conflicts.append(updates[-1].stats.get("conflict"))  # train() writes the mean over it
        return updates[-1]

    conflicts = []
    monkeypatch.setattr(module, "doco_step", record)
    flags = [*OF_CATS, "--steps", "13", "--warmup-steps", "2", "--resolution", "32"]
    run = train(module, CATS, *flags)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [9, 12]
    parts = (conflicts[2:10], conflicts[10:])
    for row, part in zip(rows, parts, strict=True):
        assert abs(row["conflict"] - float(sum(part)) / len(part)) < 1e-6, (row, conflicts)
        for name in ("loss_d", "loss_u", "loss_r", "cos"):
            assert row[name] == float(updates[row["step"]].stats[name]), name
    assert 0 < float(sum(parts[0])) < len(parts[0]), "conflicts and agreements"


def check_resume(module, train, monkeypatch):
    """Raises AssertionError unless a run stopped by SIGTERM, and resumed, is the undisturbed one.

    Weights and log are compared, bitwise.
    """
    flags = [*OF_CATS, "--steps", "14", "--warmup-steps", "2", "--resolution", "32"]
    whole = train(module, CATS, *flags, out="whole")
    calls, doco_step = [], module.doco_step

    def stop_at_step_5(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return doco_step(*args, **kwargs)

    monkeypatch.setattr(module, "doco_step", stop_at_step_5)
    with pytest.raises(SystemExit, match="SIGTERM: saved a checkpoint after 10 steps"):
        train(module, CATS, *flags, out="cut")
    resumed = train(module, CATS, *flags, "--resume", out="cut")
    assert len(calls) == 14, f"{len(calls)} steps"
    a, b = (load_file(run / "delta.safetensors") for run in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (whole / "log.jsonl").read_text() == (resumed / "log.jsonl").read_text()


# ---- the checks on the code as it is ------------------------------------------------------------


@pytest.mark.parametrize(
    "switch", [s if s in QUICK else pytest.param(s, marks=pytest.mark.slow) for s in SWITCHES]
)
def test_training_by_hand(recorded, models, switch):
    conflicts = check_training(doco, recorded, models, switch)
    if switch == "paper":  # otherwise the two cases of Eq. 10 would not be told apart
        assert set(conflicts) == {True, False}


def test_log_by_hand(train, monkeypatch):
    check_log(doco, train, monkeypatch)


@pytest.mark.slow
def test_resumed_equals_undisturbed(train, monkeypatch):
    check_resume(doco, train, monkeypatch)


# ---- mutants: one line of the loop changed, and a check above fails -----------------------------

# name: (switch, line of doco.py, what becomes of it). Each line is there once.
MUTANTS = {
    # which images, prompts, timesteps and noises
    "the seed is not used": (
        "paper",
        'common.generator(args.seed, "doco_steps", step)',
        'common.generator(0, "doco_steps", step)',
    ),
    "every step is the first": (
        "paper",
        'common.generator(args.seed, "doco_steps", step)',
        'common.generator(args.seed, "doco_steps", 0)',
    ),
    "the random numbers are torch's own": (
        "paper",
        'g = common.generator(args.seed, "doco_steps", step)',
        "g = None",
    ),
    "the images of retention are those of D": (
        "paper",
        "RetainBatch(latents[idx_r[part]], *retain)",
        "RetainBatch(latents[idx[part]], *retain)",
    ),
    "their noise is that of D": ("paper", "retain = (noise_r[part],", "retain = (noise[part],"),
    "their noise level is that of D": (
        "paper",
        "noise_r[part], t_r[part]",
        "noise_r[part], t[part]",
    ),
    "their prompts are those of D": (
        "paper",
        "t_r[part], other, both)",
        "t_r[part], anchor, both)",
    ),
    "names of the target are retained": (
        "distill, prompts",
        "            names.append(prompt)\n",
        "            chosen.append(prompt)\n",
    ),
    "every prompt is a name": (
        "distill, prompts",
        "min(ratios) < 0.5",
        "min(ratios) < 1e6",
    ),
    "the farthest prompts first": (
        "distill, prompts",
        "sorted(candidates, key=distance)",
        "sorted(candidates, key=distance, reverse=True)",
    ),
    "the order of the file": (
        "distill, prompts",
        "sorted(candidates, key=distance)",
        "list(candidates)",
    ),
    "names by their distance to the anchor": (
        "distill, prompts",
        "(eps - target).norm() / (anchor",
        "(eps - anchor).norm() / (anchor",
    ),
    "retained prompts are not used": (
        "distill, prompts",
        "    if retained and args.retain",
        "    if False and args.retain",
    ),
    "retained prompts beside the noise target": (
        "null space, prompts, init",
        'if retained and args.retain == "distill":',
        "if retained:",
    ),
    "retained prompts in every row": ("distill, prompts", "if (first + i) % 4:", "if True:"),
    "the anchor in every fourth step": (
        "distill, prompts",
        "if (first + i) % 4:",
        "if step % 4:",
    ),
    "always the same retained prompt": (
        "distill, prompts",
        "prompts_r[i] = retained[pick]",
        "prompts_r[i] = retained[0]",
    ),
    "M_init gets the anchor twice": (
        "distill, prompts",
        "stack_conditions([*anchors[part], *others[part]])",
        "stack_conditions([*anchors[part], *anchors[part]])",
    ),
    "the weight is not used": (
        "distill, prompts",
        "retain_weight=args.retain_weight",
        "retain_weight=1.0",
    ),
    "no null space": (
        "null space",
        "                project_weights()  #",
        "                pass  #",
    ),
    "the null space around the original weights": (
        "null space, prompts, init",
        "project_weights = null_space_projector(params,",
        "project_weights = null_space_projector(originals,",
    ),
    "the null space without the empty prompt": (
        "null space",
        'dict.fromkeys(["", *(anchor',
        "dict.fromkeys([*(anchor",
    ),
    "the null space without the anchor": (
        "null space",
        "*(anchor for anchor, _ in pairs), *retained])\n    rows",
        "*retained])\n    rows",
    ),
    "the null space without the retained prompts": (
        "null space, prompts, init",
        "for anchor, _ in pairs), *retained])\n    rows",
        "for anchor, _ in pairs)])\n    rows",
    ),
    "the null space has another energy": (
        "null space, prompts, init",
        "    energy = args.null_space\n",
        "    energy = args.null_space and 0.5 * args.null_space\n",
    ),
    "images and prompts do not belong together": (
        "two targets",
        "entries = [pairs[j % len(pairs)] for j in idx]",
        "entries = [pairs[(j + 1) % len(pairs)] for j in idx]",
    ),
    "images and prompts of retention do not belong together": (
        "two targets",
        "[pairs[j % len(pairs)][0] for j in idx_r]",
        "[pairs[(j + 1) % len(pairs)][0] for j in idx_r]",
    ),
    "the target's prompt is the anchor's": (
        "paper",
        "targets = [conditions[variants[step % len(variants)]] for _, variants in entries]",
        "targets = anchors",
    ),
    "the anchor's prompt is the target's": (
        "paper",
        "t[part], anchor, target, posterior_noise[part])",
        "t[part], target, target, posterior_noise[part])",
    ),
    "anchor and target change places": (
        "paper",
        "t[part], anchor, target, posterior_noise[part])",
        "t[part], target, anchor, posterior_noise[part])",
    ),
    "the posterior's noise is that of x_t": (
        "x_{t-20}",
        "t[part], anchor, target, posterior_noise[part])",
        "t[part], anchor, target, noise[part])",
    ),
    "only the first prompt of a style": (
        "style",
        "variants[step % len(variants)]",
        "variants[0]",
    ),
    "targets one after another": (
        "two targets",
        "for turn in zip_longest(*per_target) for pair in turn if pair",
        "for part in per_target for pair in part",
    ),
    "the anchor is replaced inside of words, too": (
        "paper",
        r'rf"(?<!\w){re.escape(anchor)}(?!\w)", re.IGNORECASE)',
        r'rf"(?<!\w){re.escape(anchor)}(?!\w)")',
    ),
    # the anchor images
    "images of no prompt": (
        "paper",
        "[conditions[prompts[j % len(prompts)]] for j in chunk]",
        '[conditions[""] for j in chunk]',
    ),
    "images without guidance": ("paper", 'guidance=images["guidance"]', "guidance=1.0"),
    "images with other seeds": (
        "paper",
        'common.derive_seed(args.seed, "samples", j)',
        'common.derive_seed(args.seed, "samples", j + 1)',
    ),
    "images with fewer sampling steps": (
        "paper",
        'steps=images["sampling_steps"]',
        'steps=images["sampling_steps"] - 1',
    ),
    # M_init, D and the flags
    "M_init is M": (
        "paper",
        "        swap_weights(params, originals)\n        prediction = backbone.predict",
        "        prediction = backbone.predict",
    ),
    "M_init stays in M": (
        "paper",
        "        swap_weights(params, originals)\n        return prediction",
        "        return prediction",
    ),
    "M_init is the earlier run's": (
        "init",
        "load_init(args.init, trained, backbone)  #",
        "load_init(args.init, trained, backbone); originals = [p.clone().detach() for p in params]"
        "  #",
    ),
    "--init is not loaded": (
        "init",
        "        load_init(args.init, trained, backbone)  #",
        "        pass  #",
    ),
    "other weights are trained": (
        "paper",
        "backbone.trainable_weights(args.train_method,",
        'backbone.trainable_weights("xattn",',
    ),
    "D begins with another seed": ("paper", "torch.manual_seed(args.seed)", "torch.manual_seed(0)"),
    "lambda is not used": ("lambda 0.5", "lam=args.lam", "lam=1.0"),
    "--disc-input is not used": ("x_{t-20}", "disc_input=args.disc_input", 'disc_input="x0"'),
    "--stride is not used": ("x_{t-20}", "stride=args.stride", "stride=1"),
    "--retain is not used": ("l2", "retain=args.retain", 'retain="cp"'),
    "gradient and step are both projected": (
        "project the step",
        "project=args.project",
        'project="gradient"',
    ),
    "one warm-up step too many": (
        "paper",
        "train_model = step >= args.warmup_steps",
        "train_model = step > args.warmup_steps",
    ),
    "no warm-up": ("paper", "train_model = step >= args.warmup_steps", "train_model = True"),
    # the optimizers
    "no weight decay": ("paper", "weight_decay=1e-2", "weight_decay=0"),
    "M's optimizer is Adam": ("paper", "torch.optim.AdamW(", "torch.optim.Adam("),
    "M's learning rate is D's": ("paper", "params, lr=args.lr", "params, lr=args.disc_lr"),
    "D's learning rate is M's": ("paper", "lr=args.disc_lr", "lr=args.lr"),
    "D's betas are the usual ones": ("paper", "betas=(0.5, 0.999)", "betas=(0.9, 0.999)"),
    "M's gradient is G_r": ("paper", "params, update.g, g_r", "params, update.g_r, g_r"),
    "the step is not projected": (
        "project the step",
        'project = args.project == "step"',
        "project = False",
    ),
    "the step is projected without lambda": (
        "project the step, lambda 0.5",
        "update.g, g_r, args.lam, project)",
        "update.g, g_r, 1.0, project)",
    ),
    "the step is projected where it is measured": (
        "paper",
        "update.g, g_r, args.lam, project)",
        "update.g, g_r, args.lam, g_r is not None)",
    ),
    "D is not stepped": ("paper", "            opt_disc.step()\n", ""),
    "D climbs": (
        "paper",
        "write_grad(disc.parameters(), update.g_d)",
        "write_grad(disc.parameters(), -update.g_d)",
    ),
    # what is saved
    "the cosine is not logged": ("paper", '{"cos_step": cos_step}', "{}"),
    "the original weights are saved": (
        "paper",
        "tensors = backbone.lora_state() if is_lora else trained",
        "tensors = {n: p + 1e-3 for n, p in trained.items()}",
    ),
}
LOG_MUTANTS = {
    "the conflicts are never forgotten": (
        "                conflicts = []\n",
        "",
    ),
    "conflict is that of the last step": (
        "torch.stack(conflicts).mean()",
        "conflicts[-1]",
    ),
    "conflict is a number of steps": (
        "torch.stack(conflicts).mean()",
        "torch.stack(conflicts).sum()",
    ),
    "the last step has no row": (
        "(step + 1) % 10 == 0 or step + 1 == args.steps",
        "(step + 1) % 10 == 0",
    ),
    "a row at every step": (
        "(step + 1) % 10 == 0 or step + 1 == args.steps",
        "True",
    ),
    "rows count from 1": ('log.append({"step": step}', 'log.append({"step": step + 1}'),
}
RESUME_MUTANTS = {
    "D is not restored": ("for n, t in disc.state_dict().items()}", "for n, t in ()}"),
    "M is not restored": (
        "for n, p in trained.items()}\n    tensors |=",
        "for n, p in ()}\n    tensors |=",
    ),
    "D's optimizer is not restored": (
        "state = (tensors, (optimizer, opt_disc))",
        "state = (tensors, (optimizer,))",
    ),
    "M's optimizer is not restored": (
        "state = (tensors, (optimizer, opt_disc))",
        "state = (tensors, (opt_disc,))",
    ),
    "a step is repeated": ("save_progress(run, log, step + 1,", "save_progress(run, log, step,"),
    "a step is left out": (
        "save_progress(run, log, step + 1,",
        "save_progress(run, log, step + 2,",
    ),
    "the log begins anew": (
        "start, log = common.resume(run, *state)",
        "start, log = common.resume(run, *state)[0], []",
    ),
    "the original weights are those of the checkpoint": (
        "start, log = common.resume(run, *state)",
        "start, log = common.resume(run, *state); originals = [p.detach().clone() for p in params]",
    ),
    "nothing is restored": ("start, log = common.resume(run, *state)", "start, log = 0, []"),
}


def mutant_of(line, instead):
    """doco.py as a module with one change. The line must be there once."""
    source = (common.REPO / "doco.py").read_text()
    assert source.count(line) == 1, f"{source.count(line)} times in doco.py: {line}"
    module = types.ModuleType("mutant")
    exec(compile(source.replace(line, instead), "mutant.py", "exec"), module.__dict__)
    return module


def assert_caught(check, module, *args):
    """A mutant must fail by what it computes, and not because it is no Python."""
    errors = (AssertionError, RuntimeError, IndexError, SystemExit, ValueError)
    with pytest.raises((*errors, pytest.fail.Exception)) as caught:
        check(module, *args)
    assert not re.search("NameError|SyntaxError", repr(caught.value))


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_of_the_loop_is_caught(recorded, models, name):
    switch, line, instead = MUTANTS[name]
    assert_caught(check_training, mutant_of(line, instead), recorded, models, switch)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOG_MUTANTS)
def test_mutant_of_the_log_is_caught(train, monkeypatch, name):
    assert_caught(check_log, mutant_of(*LOG_MUTANTS[name]), train, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUME_MUTANTS)
def test_mutant_of_resuming_is_caught(train, monkeypatch, name):
    assert_caught(check_resume, mutant_of(*RESUME_MUTANTS[name]), train, monkeypatch)
