"""Baselines: losses by hand; each runs, repeats itself, and loads in plain diffusers."""

import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch.distributions import Normal

import baselines
import common
from backbones import (
    DDPM,
    Flux,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
    coefficients,
    load_backbone,
)
from baselines import conabl, duo, erasediff, esd, forget_me_not, neggrad, siss, speed, spm, uce
from gradsurgery import flat_grad
from instance_unlearn import mse_per_sample

METHODS = baselines.methods()
CONCEPT = [name for name, module in METHODS.items() if module.TASK == "concept"]
INSTANCE = [name for name, module in METHODS.items() if module.TASK == "instance"]
CLOSED = ("speed", "uce")  # closed forms: without training, so without its flags
TRAINED = [name for name in METHODS if name not in CLOSED]
# The scripts that stand for all in the default run: a closed form, one of each task
FAST = ("uce", "conabl", "neggrad")
# FLUX has no native size that a tiny one could differ in: it is told one
FAMILIES = {"sd": StableDiffusion, "sdxl": StableDiffusionXL, "sd3": StableDiffusion3, "flux": Flux}
SIZE = {"flux": ["--resolution", "16"]}
REMEMBERING = [name for name in INSTANCE if name != "duo"]


def slow_but(names):
    """Test parameters: all names, marked slow unless they are in FAST."""
    return [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in names]


def random(*shape, seed=0):
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def folders(tiny, tiny_sdxl, tiny_sd3, tiny_flux):
    return {"sd": tiny, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}


@pytest.fixture
def sd(tiny):
    """The tiny Stable Diffusion as plain diffusers loads it."""
    parts = {"safety_checker": None, "requires_safety_checker": False}
    return StableDiffusionPipeline.from_pretrained(tiny, **parts)


# ---- 1. losses and formulas by hand -------------------------------------------------------------


def test_esd_target_is_negative_guidance():
    null, target = random(2, 4, 8, 8), random(2, 4, 8, 8, seed=1)
    guided = null + -1.5 * (target - null)  # classifier-free guidance with a scale of -1.5
    assert torch.allclose(esd.esd_target(null, target, 1.5), guided, atol=1e-6)
    assert torch.allclose(baselines.guide(null, target, -1.5), guided, atol=1e-6)


def test_esd_trains_what_its_paper_does():
    """All but the cross-attention for objects, it alone for styles; on small models it alone."""
    assert esd.default_train_method("object", small=False) == "noxattn"
    assert esd.default_train_method("style", small=False) == "xattn"
    assert esd.default_train_method("object", small=True) == "xattn"
    assert esd.default_train_method("style", small=True) == "xattn"


@torch.no_grad()
def test_esd_paths_are_those_of_diffusers(sd):
    """sample_path follows what StableDiffusionPipeline samples by unclipped DDIM with guidance."""
    model = load_backbone(sd.config._name_or_path)
    sd.scheduler = DDIMScheduler.from_config(sd.scheduler.config, clip_sample=False)
    sd.set_progress_bar_config(disable=True)
    noise, prompts = random(2, 4, 16, 16), ["a cat", "a dog"]
    settings = {"guidance_scale": 3.0, "num_inference_steps": 6, "output_type": "latent"}
    sampled = sd(prompts, latents=noise, **settings).images
    emb, null = sd.encode_prompt(prompts, "cpu", 1, True)
    emb, null = ({"encoder_hidden_states": rows} for rows in (emb, null))
    sd.scheduler.set_timesteps(6)
    path = list(esd.sample_path(model, sd.scheduler, noise, emb, null, 3.0))
    assert [point[1].item() for point in path] == sd.scheduler.timesteps.tolist()
    assert torch.equal(path[0][0], noise)
    xt, t, eps_null, eps_target = path[-1]
    last = sd.scheduler.step(eps_null + 3 * (eps_target - eps_null), t, xt).prev_sample
    assert torch.allclose(last, sampled, atol=1e-4)
    assert sampled.abs().max() > 2  # latents are N(0, 1), a clip would show


@torch.no_grad()
def test_esd_target_of_a_velocity_is_that_of_eps():
    """u and v, from eps and x_t: y of them is the u or v that y of eps implies."""
    xt, null, target = (random(1, 4, 8, 8, seed=k) for k in range(3))
    y = esd.esd_target(null, target, 1.5)
    s, alpha_bar = 0.7, torch.tensor(0.4)
    a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    for of_eps in (lambda eps: (eps - xt) / (1 - s), lambda eps: (eps - b * xt) / a):
        wanted = of_eps(y)
        assert torch.allclose(esd.esd_target(of_eps(null), of_eps(target), 1.5), wanted, atol=1e-5)
    x0 = (xt - s * null) / (1 - s)  # x_t = (1 - s) x_0 + s eps
    assert torch.allclose((null - xt) / (1 - s), null - x0, atol=1e-5)
    x0 = (xt - b * null) / a
    assert torch.allclose((null - b * xt) / a, a * null - b * x0, atol=1e-5)


def test_conabl_moves_the_target_alone():
    target = random(2, 4, 8, 8).requires_grad_()
    anchor = random(2, 4, 8, 8, seed=1).requires_grad_()
    loss = conabl.loss_ablation(target, anchor)
    loss.backward()
    difference = (target - anchor).detach()
    assert math.isclose(loss.item(), (difference**2).mean().item(), rel_tol=1e-5)
    assert anchor.grad is None
    assert torch.allclose(target.grad, 2 * difference / target.numel(), atol=1e-6)


@pytest.fixture
def keys():
    """W0 (24, 16), and vectors to erase, to guide and to preserve."""
    return random(24, 16), random(5, 16, seed=1), random(5, 16, seed=2), random(7, 16, seed=3)


def test_uce_is_the_minimum(keys):
    w0, e, g, p = (x.double() for x in keys)
    w = uce.edit(*keys, a=0.7, b=1.3, lam=0.4)
    left = w @ (0.4 * torch.eye(16).double() + 0.7 * e.T @ e + 1.3 * p.T @ p)
    right = 0.4 * w0 + 0.7 * w0 @ g.T @ e + 1.3 * w0 @ p.T @ p
    assert (left - right).abs().max() < 1e-8  # the normal equations

    v = w.clone().requires_grad_()  # and the gradient of the objective, as its sums are written
    erase = sum((v @ x - w0 @ y).square().sum() for x, y in zip(e, g, strict=True))
    preserve = sum((v @ x - w0 @ x).square().sum() for x in p)
    objective = 0.7 * erase + 1.3 * preserve + 0.4 * (v - w0).square().sum()
    assert torch.autograd.grad(objective, v)[0].abs().max() < 1e-8


def test_uce_maps_the_erased_to_the_guide_and_leaves_the_preserved(keys):
    w0, e, g, p = keys
    w = uce.edit(w0, e, g, p, a=1e8, b=1e8, lam=1e-2).float()  # 12 vectors in 16 dimensions
    assert torch.allclose(w @ e.T, w0 @ g.T, atol=1e-3)
    assert torch.allclose(w @ p.T, w0 @ p.T, atol=1e-3)
    assert torch.allclose(uce.edit(w0, e, e, p), w0.double(), atol=1e-6)  # guided to itself


@torch.no_grad()
def test_uce_takes_the_vectors_from_the_last_word_on(sd):
    text, tokenizer = "a grumpy cat", sd.tokenizer
    emb = sd.encode_prompt(text, "cpu", 1, False)[0][0]
    ids = tokenizer(text)["input_ids"]
    n = len(ids)
    assert len(emb) == 77
    assert torch.equal(uce.text_vectors(tokenizer, emb, text, "all"), emb)
    assert torch.equal(uce.text_vectors(tokenizer, emb, text, "from"), emb[n - 2 :])
    assert torch.equal(uce.text_vectors(tokenizer, emb, text, "last"), emb[n - 2 : n - 1])
    assert tokenizer.decode(ids[n - 2]).strip() == "cat"


def test_speed_is_the_minimum_in_the_null_space(keys):
    """Of (W + D) c1 against W c*, and beta |D|^2, over every D with D c0 = 0 and D K2 = 0."""
    w0, e, g, p = (x.double() for x in keys)
    k2 = torch.cat([p[:1], random(3, 16, seed=4).double()])  # one of them is retained anyway
    basis = speed.null_basis(p, 1e-30)
    assert basis.shape == (16, 9) and torch.allclose(basis.T @ basis, torch.eye(9).double())
    d = speed.edit(w0, *speed.moments(e, g), basis, k2, beta=0.3)
    assert (d @ p.T).abs().max() < 1e-10 and (d @ k2.T).abs().max() < 1e-10
    assert (d @ e.T).abs().max() > 0.1

    # The gradient of the objective has no part in the directions that are free.
    v = d.clone().requires_grad_()
    errors = [((w0 + v) @ x - w0 @ y).square().sum() for x, y in zip(e, g, strict=True)]
    objective = sum(errors) / len(errors) + 0.3 * v.square().sum()
    gradient = torch.autograd.grad(objective, v)[0]
    fixed = torch.linalg.qr(torch.cat([p, k2[1:]]).T)[0]  # (16, 10)
    free = torch.eye(16).double() - fixed @ fixed.T
    assert (gradient @ free).abs().max() < 1e-9 < gradient.abs().max()


def test_speed_cuts_the_null_space_at_the_threshold():
    rows = torch.diag(torch.tensor([2.0, 1.0, 0.4, 0.0])).double()  # eigenvalues 1, 1/4, 0.04, 0
    for threshold, free in ((1e-9, 1), (0.039, 1), (0.041, 2), (0.24, 2), (0.26, 3), (2.0, 4)):
        basis = speed.null_basis(rows, threshold)
        p = basis @ basis.T
        assert torch.allclose(
            p, torch.diag(torch.tensor([4 - k <= free for k in range(4)]).double())
        )


def test_speed_retains_what_would_change_most():
    """W = diag(3, 1), one concept: E is along c1; v, the direction that W shrinks most, is y."""
    w, c1 = torch.diag(torch.tensor([3.0, 1.0])).double(), torch.tensor([[1.0, 0.0]]).double()
    a, b = speed.moments(c1, -c1)
    # E = -3 on x and 0 on y: (4, 1) is moved by 12, (1, 2) by 3 and (0, 5) by 0; on average, by 5.
    rows = torch.tensor([[4.0, 1.0], [1.0, 2.0], [0.0, 5.0]]).double()
    assert torch.equal(speed.most_changed(rows, w @ (b - a) / 2), rows[:1])
    kept = speed.retained_rows(w, a, b, rows, torch.Generator().manual_seed(0))
    assert torch.equal(kept[0], rows[0])
    z = torch.randn(10, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert len(kept) == 11  # noise along y changes no length: none is above the mean, all stay
    assert torch.allclose(kept[1:], rows[0] + z * torch.tensor([0.0, 1.0]))


def test_speed_keeps_all_rows_where_nothing_changes():
    """Target and anchor may be one vector: what they share with 77 tokens is all that is seen."""
    rows = random(5, 16)
    assert torch.equal(speed.most_changed(rows, torch.zeros(3, 16)), rows)


def test_speed_finds_the_centres_of_clusters():
    spots = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]]).double()
    rows = torch.cat([spots + random(3, 2, seed=k).double() / 10 for k in range(20)])
    for seed in (0, 2):  # these begin in three clusters
        centres = speed.kmeans(rows, 3, torch.Generator().manual_seed(seed))
        found = centres[torch.cdist(spots, centres).argmin(1)]
        assert torch.allclose(found, rows.view(20, 3, 2).mean(0))
    same = speed.kmeans(torch.ones(5, 2).double(), 3, torch.Generator().manual_seed(0))
    assert torch.equal(same, torch.ones(3, 2).double())  # empty clusters stay where they began


def test_speed_retains_no_prompt_that_names_a_target(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("dog\nCATS\na cat\nA Cat!\n\nconcatenate\nWow! now\ndog\nbear\n")
    flags = ["--target", "Cat", "Wow!", "--anchor", "dog", "--retain-prompts", str(file)]
    args = speed.parse_args(flags)
    found = speed.read_retained(args, ["dog", "dog"])
    assert found == ["", "dog", "CATS", "concatenate", "bear"]
    args = speed.parse_args(["--target", "Cat", "--anchor", "black cat"])
    assert speed.read_retained(args, ["black cat"]) == ["", "black cat"]  # the anchor stays


@torch.no_grad()
def test_spm_starts_as_the_original(sd):
    x, emb = random(2, 4, 16, 16), random(2, 77, 32, seed=1)
    before = sd.unet(x, 500, emb).sample
    sd.unet.add_adapter(spm.LoraConfig(r=1, lora_alpha=1, target_modules=spm.LAYERS))
    assert torch.equal(sd.unet(x, 500, emb).sample, before)
    inside = [m for n, m in sd.unet.named_modules() if "attentions" in n and "lora" not in n]
    layers = [m for m in inside if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    adapted = [p for n, p in sd.unet.named_parameters() if "lora_B" in n]
    assert len(adapted) == len(layers) > 20  # every layer of the transformers, and no other
    for p in adapted:
        p += 1
    assert not torch.allclose(sd.unet(x, 500, emb).sample, before, atol=1e-3)


def test_spm_anchors_are_as_long_as_the_target_and_rarely_like_it():
    emb = random(77, 32)
    anchors = spm.random_anchors(emb, 50, torch.Generator().manual_seed(0))
    lengths = anchors.flatten(1).norm(dim=1) / emb.norm()
    assert anchors.shape == (50, 77, 32)
    assert 0.8 <= lengths.min() < 0.85 and 1.15 < lengths.max() <= 1.2
    # In one dimension half of all noise equals the target: it is never accepted.
    narrow = spm.random_anchors(torch.tensor([[1.0]]), 20, torch.Generator().manual_seed(0))
    assert (narrow < 0).all()


@torch.no_grad()
def test_spm_is_as_strong_as_a_prompt_resembles_the_target(sd):
    strength = spm.prompt_strength(sd, {"target": ["grumpy cat"]})
    assert math.isclose(strength("grumpy cat"), 1, rel_tol=1e-5)
    assert strength("a photo of a grumpy cat") == 1  # all of its tokens
    flat = [sd.encode_prompt(s, "cpu", 1, False)[0].flatten() for s in ("a cat", "grumpy cat")]
    cos = torch.cosine_similarity(*flat, dim=0)
    cat, whole = (set(sd.tokenizer(s)["input_ids"][1:-1]) for s in ("cat", "grumpy cat"))
    assert math.isclose(strength("a cat"), max(cos, len(cat) / len(whole)), rel_tol=1e-5)
    two = spm.prompt_strength(sd, {"target": ["grumpy cat", "pizza"]})
    assert two("pizza") >= strength("pizza")


def record_attention(sd, x, emb):
    """The prediction with an AttentionRecorder in every cross-attention layer, and the recorder."""
    recorder = forget_me_not.AttentionRecorder()
    processors = dict(sd.unet.attn_processors)
    for name in processors:
        if ".attn2." in name:
            processors[name] = recorder
    sd.unet.set_attn_processor(processors)
    return sd.unet(x, 500, emb).sample, recorder


@torch.no_grad()
def test_forget_me_not_records_attention_and_changes_nothing(sd):
    x, emb = random(2, 4, 16, 16), random(2, 77, 32, seed=1)
    before = sd.unet(x, 500, emb).sample
    after, both = record_attention(sd, x, emb)
    assert torch.allclose(after, before, atol=1e-5)
    layers = [name for name in sd.unet.attn_processors if ".attn2." in name]
    assert len(both.probabilities) == len(layers) > 0
    for p in both.probabilities:
        assert p.shape[0] == 2 and p.shape[3] == 77
        assert torch.allclose(p.sum(-1), torch.ones(1))
    _, second = record_attention(sd, x[1:], emb[1:])  # its attention is its own
    for p, q in zip(both.probabilities, second.probabilities, strict=True):
        assert torch.allclose(p[1], q[0], atol=1e-5)


def test_forget_me_not_loss_by_hand(sd):
    prompt = "a photo of a grumpy cat"
    found = forget_me_not.token_positions(sd.tokenizer, prompt, ["pizza", "grumpy cat"])
    end = len(sd.tokenizer(prompt)["input_ids"]) - 1
    n = len(sd.tokenizer("grumpy cat")["input_ids"]) - 2
    assert found.nonzero().flatten().tolist() == list(range(end - n, end))
    # Two layers that differ in heads and pixels
    first, second = torch.zeros(2, 1, 3, 4), torch.zeros(2, 2, 1, 4)
    first[0, 0, 1, 2], second[0, 1, 0, 2] = 3.0, 4.0
    second[0, 0, 0, 3], first[1, 0, 0, 0] = 9.0, 2.0
    marked = torch.tensor([[False, False, True, False], [True, False, False, False]])
    # sqrt(9 + 16), and sqrt(4)
    assert forget_me_not.loss_attention([first, second], marked) == (5 + 2) / 2


def test_neggrad_loss_by_hand():
    error_r, error_f = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    assert neggrad.loss_neggrad(error_r, error_f, 0.5) == -0.5  # (1 - 1.5 + 2 - 2.5) / 2
    assert neggrad.loss_neggrad(None, error_f, 0.5) == -4


def test_erasediff_forgets_as_fast_as_eta_demands():
    g_r, g_f = torch.tensor([1.0, 2.0]), torch.tensor([-3.0, 0.0])
    g = erasediff.combine(g_r, g_f, 0.1)
    assert torch.allclose(g, torch.tensor([1 - 3 * (0.1 + 1 / 3), 2.0]))
    assert math.isclose(g @ g_f, 0.1 * 9, rel_tol=1e-5)  # in conflict: just as much as demanded
    assert torch.equal(erasediff.combine(g_r, -g_f, 0.1), g_r)  # in agreement, and faster
    assert torch.equal(erasediff.combine(g_r, 0 * g_f, 0.1), g_r)


@pytest.mark.parametrize("lam", (0.5, 0.2))
def test_siss_weights_are_the_ratio_of_densities(lam):
    x_r, x_f = random(6, 3, 4, 4).double() / 3, random(6, 3, 4, 4, seed=1).double() / 3
    alpha_bar = torch.linspace(0.05, 0.6, 6).double()
    a, b = coefficients(torch.arange(6), alpha_bar)
    even = torch.arange(6).view(-1, 1, 1, 1) % 2 == 0
    m_t = a * torch.where(even, x_r, x_f) + b * random(6, 3, 4, 4, seed=2)
    q_r, q_f = (Normal(a * x, b).log_prob(m_t).sum((1, 2, 3)).exp() for x in (x_r, x_f))
    mixture = (1 - lam) * q_r + lam * q_f
    w_r, w_f = siss.importance_weights(m_t, x_r, x_f, a, b, lam)
    assert torch.allclose(w_r, q_r / mixture) and torch.allclose(w_f, q_f / mixture)
    pred = random(6, 3, 4, 4, seed=3)
    losses = siss.losses_siss(pred, m_t, x_r, x_f, a, b, lam)
    for q, x, loss in zip((q_r, q_f), (x_r, x_f), losses, strict=True):
        error = ((pred - (m_t - a * x) / b) ** 2).sum((1, 2, 3))
        assert torch.allclose(loss, (q / mixture * error).mean())


def test_siss_weights_stay_finite_without_overlap():
    x_r, x_f = torch.ones(1, 3, 64, 64), -torch.ones(1, 3, 64, 64)
    a, b = torch.tensor([1.0, 0.01]).view(2, 1, 1, 1, 1)
    w_r, w_f = siss.importance_weights(x_r, x_r, x_f, a, b, 0.5)
    assert w_r == 2 and w_f == 0
    with pytest.raises(ValueError, match="lam is 1"):
        siss.importance_weights(x_r, x_r, x_f, a, b, 1)


def test_siss_subtracts_a_fixed_norm():
    g_r, g_f = torch.tensor([30.0, 40.0]), torch.tensor([0.0, 7.0])
    assert torch.equal(siss.subtract(g_r, g_f, 2.0), torch.tensor([30.0, 38.0]))
    assert torch.allclose(siss.subtract(g_r, g_f), torch.tensor([30.0, 35.0]))  # a tenth of 50


def test_siss_two_backward_passes_through_one_graph():
    """flat_grad with retain_graph gives each loss its own gradient."""
    w = torch.tensor([2.0, 3.0], requires_grad=True)
    y = w.square()
    assert torch.equal(flat_grad(y[0], [w], retain_graph=True), torch.tensor([4.0, 0]))
    assert torch.equal(flat_grad(y[1], [w]), torch.tensor([0, 6.0]))


def test_duo_prefers_the_surrogate():
    s, s_0, f, f_0 = (torch.tensor([v]) for v in (0.30, 0.32, 0.50, 0.45))
    loss = duo.loss_preference(s, s_0, f, f_0, 10)
    assert math.isclose(loss, math.log(1 + math.exp(-0.7)), rel_tol=1e-5)
    equal = duo.loss_preference(s_0, s_0, f_0, f_0, 500)
    assert math.isclose(equal, math.log(2), rel_tol=1e-6)
    s, f = s.requires_grad_(), f.requires_grad_()
    loss = duo.loss_preference(s, s_0, f, f_0, 10)
    g_s, g_f = torch.autograd.grad(loss, (s, f))
    assert g_s > 0 > g_f  # downhill: the surrogate's error falls, the other rises
    assert math.isclose(g_s, -g_f, rel_tol=1e-5)


# ---- 2. the shared functions --------------------------------------------------------------------


def test_methods_are_the_files_of_the_folder():
    names = {"conabl", "duo", "erasediff", "esd", "forget_me_not", "neggrad", "siss", "spm"}
    assert names | {*CLOSED} <= METHODS.keys()
    for module in METHODS.values():
        for row in module.ROWS:
            assert (
                {"label", "flags", "paper"}
                <= row.keys()
                <= {"label", "flags", "paper", "tried", "in"}
            )
            flag, *values = row.get("tried", ("--seed", "1"))
            needed = ["--target", "A", "--anchor", "B"]
            needed = needed if module.TASK == "concept" else ["--forget", "a.png"]
            for value in values:  # the parser takes them all
                module.parse_args([*needed, *row["flags"], *row["paper"], flag, value])
        if "tried" in module.ROWS[0]:  # the first one is the default of small models
            flag, value, *_ = module.ROWS[0]["tried"]
            assert module.SMALL[flag.strip("-")] == float(value)


@pytest.mark.parametrize("name", METHODS)
def test_help_shows_every_default(name, capsys):
    with pytest.raises(SystemExit) as e:
        METHODS[name].parse_args(["--help"])
    text = capsys.readouterr().out
    assert e.value.code == 0
    assert METHODS[name].__doc__.strip().splitlines()[0] in text
    for number in ("steps", "batch_size", "lr", "lamb", "threshold", "retain_scale"):
        for preset in (METHODS[name].PAPER, METHODS[name].SMALL):
            assert number not in preset or f"{preset[number]:g}" in text


def test_a_preset_gives_what_no_flag_gives(tiny):
    flags = ["--target", "pizza", "Grumpy Cat", "--anchor", "food", "--concept-type", "style"]
    args = conabl.parse_args([*flags, "--lr", "3e-4"])
    model = load_backbone(str(tiny))
    small = baselines.with_preset(args, model, conabl.PAPER, conabl.SMALL)
    assert small.steps == 250 * 2 * 2  # two targets, twice as many for a style
    assert (small.lr, small.batch_size, small.num_images) == (3e-4, 8, 64)
    assert small.resolution == 64
    assert (args.steps, args.resolution) == (None, None)  # the caller's stay as they are
    model.small = False
    large = baselines.with_preset(args, model, conabl.PAPER, conabl.SMALL)
    assert (large.steps, large.num_images, large.lr) == (100, 1000, 3e-4)


@pytest.mark.parametrize("module", (conabl, esd))
def test_a_lora_has_a_rate_of_its_own(module, tiny):
    """The default of a transformer, whatever the model's size; and --lr overrides it."""
    argv, model = ["--target", "Grumpy Cat", "--anchor", "Cat"], load_backbone(str(tiny))
    for flags, small, rate in (
        ([], True, module.SMALL["lr"]),
        (["--train-method", "lora"], True, module.LORA_LR),
        (["--train-method", "lora"], False, module.LORA_LR),
        (["--train-method", "lora", "--lr", "7e-6"], True, 7e-6),
    ):
        model.small = small
        args = baselines.with_train_method(module.parse_args([*argv, *flags]), model, "xattn")
        args = baselines.with_preset(args, model, module.PAPER, module.SMALL)
        assert args.lr == rate and args.rank == 16 and "lora_lr" not in args
    model.net_name = "transformer"
    args = baselines.with_train_method(module.parse_args(argv), model, "xattn")
    assert args.train_method == "lora"


def test_prompt_strength_comes_from_the_module(tmp_path, sd):
    assert baselines.prompt_strength(tmp_path, sd) is None  # no args.json
    record = {"method": "esd", "settings": {"target": ["Grumpy Cat"]}}
    for method, expected in (("esd", None), (None, None), ("unknown", None), ("spm", 1)):
        (tmp_path / "args.json").write_text(json.dumps(record | {"method": method}))
        strength = baselines.prompt_strength(tmp_path, sd)
        assert (strength and strength("a Grumpy Cat")) == expected


def test_main_evaluates_with_the_flags_of_the_run(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(baselines, "evaluate_run", lambda *call: calls.append(call) or 7)
    argv = ["--target", "a", "--anchor", "b", "--resolution", "64", "--seed", "3"]
    with pytest.raises(SystemExit) as e:
        baselines.main("concept", lambda: esd.parse_args(argv), lambda args: tmp_path)
    assert e.value.code == 7
    for argv in (["--forget", "a.png", "b.png"], ["--forget", "a.png", "--remember", "folder"]):
        with pytest.raises(SystemExit):
            baselines.main("instance", lambda a=argv: siss.parse_args(a), lambda args: tmp_path)
    with pytest.raises(SystemExit):
        argv = ["--forget", "a.png"]
        baselines.main("instance", lambda: duo.parse_args(argv), lambda args: tmp_path)
    found = [" ".join(map(str, call[3:])) for call in calls]
    assert found == [
        "--seed 3 --concept-type object --resolution 64 --target a --anchor b",
        f"--seed 0 --real {common.REPO / 'emoji/creatures'} --forget a.png b.png",
        "--seed 0 --real folder --forget a.png",
        "--seed 0 --forget a.png",
    ]


@pytest.mark.slow
def test_the_template_runs_as_a_baseline_of_its_own(tmp_path, tiny):
    """A copy of _template.py is found and runs, as CONTRIBUTING.md has it."""
    for name in ("baselines", "common.py", "backbones.py", "doco.py", "instance_unlearn.py"):
        source = common.REPO / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    for name in ("gradsurgery.py", "discriminator.py"):
        shutil.copy(common.REPO / name, tmp_path / name)
    shutil.copy(tmp_path / "baselines/_template.py", tmp_path / "baselines/new.py")
    code = (
        "import baselines; new = baselines.methods()['new'];"
        f"flags = ['--target', 'Grumpy Cat', '--anchor', 'Cat', '--model', {str(tiny)!r}];"
        "new.SMALL |= {'num_images': 4, 'sampling_steps': 2};"
        "print(new.unlearn(new.parse_args([*flags, '--steps', '2', '--batch-size', '2'])))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/new-grumpy-cat"
    assert done.stdout.strip() == "runs/new-grumpy-cat"
    weights = load_file(run / "delta.safetensors")
    assert weights and all(".attn2.to_" in name for name in weights)
    assert json.loads((run / "args.json").read_text())["method"] == "new"


# ---- 3. the scripts -----------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Few images, paths and sampling steps in the presets of training."""
    for name in set(CONCEPT) & set(TRAINED):
        for preset in ("SMALL", "PAPER"):
            numbers = getattr(METHODS[name], preset)
            few = {key: 4 for key in ("paths", "num_images") if key in numbers}
            monkeypatch.setattr(METHODS[name], preset, numbers | few | {"sampling_steps": 4})


def run_concept(name, tiny, out, *flags):
    """Three steps of a concept baseline on the tiny model; returns the run folder."""
    argv = ["--target", "Grumpy Cat", "--anchor", "Cat", "--model", str(tiny), "--out", str(out)]
    argv += ["--steps", "3", "--batch-size", "2"] if name in TRAINED else []
    return METHODS[name].unlearn(METHODS[name].parse_args([*argv, *flags]))


def weights_of(run):
    """The tensors that a concept baseline saved."""
    return load_file(next(run.glob("*.safetensors")))


def logged(run, key):
    """One column of log.jsonl."""
    return [json.loads(line)[key] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", slow_but(CONCEPT))
def test_concept_baselines_run_repeat_and_load(name, tiny, tmp_path, sd, quick):
    seeds = {"a": "0", "b": "0", "c": "1"}
    runs = [run_concept(name, tiny, tmp_path / k, "--seed", seed) for k, seed in seeds.items()]
    first, again, other = map(weights_of, runs)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[n], again[n]) for n in first)
    differs = any(not torch.equal(first[n], other[n]) for n in first)
    assert differs == (name != "uce")  # which has no random numbers
    about = json.loads((tmp_path / "a/args.json").read_text())
    assert about["method"] == name
    assert about["settings"]["target"] == ["Grumpy Cat"]

    x, emb = random(2, 4, 16, 16), random(2, 77, 32, seed=1)
    with torch.no_grad():
        before = sd.unet(x, 500, emb).sample
        if name == "spm":
            sd.load_lora_weights(tmp_path / "a")
        else:
            assert not sd.unet.load_state_dict(first, strict=False).unexpected_keys
        assert not torch.equal(sd.unet(x, 500, emb).sample, before)
    with pytest.raises(SystemExit, match="already holds a run"):
        run_concept(name, tiny, tmp_path / "a")


@pytest.mark.slow
@pytest.mark.parametrize("name", CONCEPT)
def test_concept_baselines_take_styles_and_several_targets(name, tiny, tmp_path, quick):
    objects = ["--target", "pizza", "Grumpy Cat", "--anchor", "food", "Cat"]
    style = ["--target", "twemoji", "--anchor", "emoji", "--concept-type", "style"]
    assert weights_of(run_concept(name, tiny, tmp_path / "objects", *objects))
    assert weights_of(run_concept(name, tiny, tmp_path / "style", *style))


@pytest.mark.parametrize(
    ("name", "family"),
    [(n, f) for n in ("conabl", "esd") for f in FAMILIES if FAMILIES[f] in METHODS[n].FAMILIES],
)
def test_a_lora_of_a_baseline_loads_in_plain_diffusers(name, family, folders, tmp_path, quick):
    """It is the default of transformers, and UNets take it too."""
    flags = ["--lr", "0.1", "--rank", "4", *SIZE.get(family, [])]
    if family.startswith("sd") and family != "sd3":
        flags += ["--train-method", "lora"]
    run = run_concept(name, folders[family], tmp_path / "run", *flags)
    assert not (run / "delta.safetensors").exists()
    lora = load_file(run / "pytorch_lora_weights.safetensors")
    assert {len(lora[n]) for n in lora if "lora_A" in n} == {4}
    absent = {"text_encoder_3": None, "tokenizer_3": None} if family == "sd3" else {}
    pipe = DiffusionPipeline.from_pretrained(folders[family], dtype=torch.float32, **absent)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "output_type": "latent"}
    call |= {"height": 16, "width": 16} if family == "flux" else {}

    def sample():
        return pipe("Grumpy Cat", generator=torch.Generator().manual_seed(0), **call).images

    before = sample()
    pipe.load_lora_weights(run)
    assert not torch.allclose(before, sample(), atol=1e-2)


@pytest.mark.slow
def test_esd_learns_its_target(tiny, tmp_path, quick):
    flags = ["--lr", "1e-3", "--train-method", "full", "--steps", "60"]
    losses = logged(run_concept("esd", tiny, tmp_path / "run", *flags), "loss")
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.slow
def test_spm_is_anchored_at_the_original(tiny, tmp_path, quick):
    flags = ["--lr", "1e-1", "--steps", "20", "--anchoring"]
    runs = [run_concept("spm", tiny, tmp_path / k, *flags, k) for k in ("0", "1e5")]
    free, held = (logged(run, "loss_anchoring") for run in runs)
    assert free[0] == held[0] == 0  # at first the adapter changes nothing
    assert free[-1] > 2 * held[-1] > 0


@pytest.mark.slow
def test_forget_me_not_marks_each_target_where_prompts_are_few(tiny, tmp_path, quick):
    """A file may hold more prompts of one anchor than of another. Unmarked, the loss would be 0."""
    file = tmp_path / "prompts.txt"
    file.write_text("food\na photo of food\nan emoji of food\na cat\n")
    words = ["--target", "pizza", "Grumpy Cat", "--anchor", "food", "Cat", "--prompts", str(file)]
    flags = [*words, "--batch-size", "1", "--steps", "8"]
    run = run_concept("forget_me_not", tiny, tmp_path / "run", *flags)
    assert min(logged(run, "loss")) > 0.01


@pytest.mark.slow
def test_forget_me_not_reads_images(tiny, tmp_path, photos, quick):
    run = run_concept("forget_me_not", tiny, tmp_path / "run", "--images", str(photos))
    assert weights_of(run)
    with pytest.raises(SystemExit, match="--images"):
        nowhere = str(tmp_path / "nowhere")
        run_concept("forget_me_not", tiny, tmp_path / "other", "--images", nowhere)


@pytest.mark.slow
def test_forget_me_not_needs_the_target_among_the_tokens_of_its_prompt(tiny, tmp_path, sd, quick):
    """A prompt is cut at 77 tokens. If nothing of the target is left, its norm has no gradient."""
    long = "so " * 100 + "tall"
    message = "--target 'so so.* is not found in any prompt's first 77 tokens"
    with pytest.raises(SystemExit, match=message) as e:
        run_concept("forget_me_not", tiny, tmp_path / "long", "--target", "pizza", long)
    assert "\n" not in str(e.value)
    assert not forget_me_not.token_positions(sd.tokenizer, "in Wow!'s style", ["Wow!"]).any()
    flags = ["--target", "Wow!", "--anchor", "art", "--concept-type", "style"]
    run = run_concept("forget_me_not", tiny, tmp_path / "style", *flags, "--batch-size", "8")
    assert min(logged(run, "loss")) > 0.01  # other prompts contain it


@pytest.mark.slow
def test_eval_applies_the_strength_of_a_prompt(tiny, tmp_path, quick):
    """Sampled by eval.py, a prompt gets the adapter times its strength, as in plain diffusers."""
    import eval as evaluation

    run_concept("spm", tiny, tmp_path / "run", "--lr", "1")
    sampler = evaluation.Sampler(str(tiny), torch.device("cpu"))
    sampler.load_unlearned(tmp_path / "run")
    strength = spm.prompt_strength(sampler.pipe, {"target": ["Grumpy Cat"]})
    assert strength("a grumpy cat") == 1 > strength("a cat")

    def by_hand(prompt, seed, m):
        how = {"guidance_scale": 6.0, "num_inference_steps": sampler.steps, "output_type": "np"}
        g = torch.Generator().manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16):  # as eval.py does
            scale = {"cross_attention_kwargs": {"scale": m}}
            image = sampler.pipe(prompt, generator=g, **scale, **how).images[0]
        return torch.from_numpy(image).permute(2, 0, 1) * 255

    prompts, seeds = ["a grumpy cat", "a cat"], [1, 2]
    images = sampler.sample(prompts, seeds, "test")
    for x, prompt, seed in zip(images, prompts, seeds, strict=True):
        m = strength(prompt)
        away = {k: (x - by_hand(prompt, seed, k)).abs().mean() for k in {m, 1, 0.5 * m}}
        assert min(away, key=away.get) == m
        assert away[m] < 0.5  # rounded to bytes


def run_instance(name, tiny_ddpm, photos, out, *flags):
    """Four steps of an instance baseline on the tiny DDPM; returns the run folder."""
    argv = ["--model", str(tiny_ddpm), "--forget", str(photos / "a.png"), "--out", str(out)]
    argv += ["--steps", "4", "--batch-size", "4"]
    if name in REMEMBERING:
        argv += ["--remember", str(photos)]
    else:
        argv += ["--surrogate", str(photos / "b.png")]
    return METHODS[name].unlearn(METHODS[name].parse_args([*argv, *flags]))


@pytest.mark.parametrize("name", slow_but(INSTANCE))
def test_instance_baselines_run_repeat_and_load(name, tiny_ddpm, photos, tmp_path):
    weights = []
    for k, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        run = run_instance(name, tiny_ddpm, photos, tmp_path / k, "--seed", seed)
        net = DDPMPipeline.from_pretrained(run / "pipeline").unet
        weights.append(torch.cat([p.flatten() for p in net.parameters()]))
    first, again, other = weights
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert json.loads((run / "args.json").read_text())["method"] == name
    with pytest.raises(SystemExit, match="already holds a run"):
        run_instance(name, tiny_ddpm, photos, tmp_path / "a")


@torch.no_grad()
def loss_of(folder, image):
    """The denoising loss of an image, over ten timesteps."""
    pipe, x = DDPMPipeline.from_pretrained(folder), common.to_tensor(Image.open(image))[None]
    t = torch.arange(50, 1000, 100)
    eps = random(len(t), 3, 16, 16)
    a, b = coefficients(t, pipe.scheduler.alphas_cumprod)
    return mse_per_sample(pipe.unet(a * x + b * eps, t).sample, eps).mean()


ASCENDING = (
    ("neggrad", ()),
    ("neggrad", ("--ascent",)),
    ("siss", ("--full-range", "--scaling-norm", "1e6")),
)


@pytest.mark.parametrize(("name", "flags"), ASCENDING)
def test_instance_baselines_raise_the_loss_of_their_image(name, flags, tiny_ddpm, photos, tmp_path):
    flags = [*flags, "--lr", "1e-3", "--steps", "10"]
    run = run_instance(name, tiny_ddpm, photos, tmp_path / "run", *flags)
    image = photos / "a.png"
    assert loss_of(run / "pipeline", image) > 1.2 * loss_of(tiny_ddpm, image)


@pytest.mark.slow
def test_duo_moves_from_its_image_to_the_surrogate(tiny_ddpm, photos, tmp_path):
    flags = ["--lr", "1e-3", "--steps", "20", "--prior", "0"]
    run = run_instance("duo", tiny_ddpm, photos, tmp_path / "run", *flags)
    before, after = (
        loss_of(folder, photos / "a.png") - loss_of(folder, photos / "b.png")
        for folder in (tiny_ddpm, run / "pipeline")
    )
    assert after > before + 0.01
    losses = logged(run, "loss_preference")
    assert math.isclose(losses[0], math.log(2), rel_tol=1e-6)  # measured from the original
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(("flags", "last_alone"), (((), True), (("--full-range",), False)))
def test_siss_takes_the_last_timestep_alone_unless_told_otherwise(
    flags, last_alone, tiny_ddpm, photos, tmp_path, monkeypatch
):
    times = []

    def recorded(t, alpha_bar):
        times.append(t)
        return coefficients(t, alpha_bar)

    monkeypatch.setattr(siss, "coefficients", recorded)
    run_instance("siss", tiny_ddpm, photos, tmp_path / "run", *flags)
    assert (torch.cat(times) == 999).all() == last_alone


# ---- 4. bad input: one line ---------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but(TRAINED))
def test_a_run_that_diverges_saves_nothing(name, tiny, tiny_ddpm, photos, tmp_path, quick):
    run = tmp_path / "run"
    with pytest.raises(SystemExit, match="not finite"):
        if name in CONCEPT:
            run_concept(name, tiny, run, "--lr", "1e38")
        else:
            run_instance(name, tiny_ddpm, photos, run, "--lr", "1e38")
    assert not any((run / result).exists() for result in baselines.RESULTS)


@pytest.mark.parametrize("name", slow_but(INSTANCE))
def test_instance_baselines_refuse_other_models(name, tiny, photos, tmp_path):
    argv = ["--model", str(tiny), "--forget", str(photos / "a.png"), "--out", str(tmp_path / "run")]
    argv += ["--remember", str(photos)] if name in REMEMBERING else []
    with pytest.raises(SystemExit, match="is a StableDiffusionPipeline; expected one of DDPM"):
        METHODS[name].unlearn(METHODS[name].parse_args(argv))


BAD_INPUT = [
    ("esd", ["--steps", "0"], "--steps 0"),
    ("conabl", ["--batch-size", "0"], "--batch-size 0"),
    ("conabl", ["--resolution", "30"], "--resolution 30"),
    ("spm", ["--target", "Cat"], "--target and --anchor are both 'Cat'"),
    ("uce", ["--out", "/proc/nowhere"], "--out /proc/nowhere cannot be written"),
    ("uce", ["--retain-prompts", "no.txt"], "--retain-prompts no.txt: no such file"),
    ("speed", ["--retain-prompts", "no.txt"], "--retain-prompts no.txt: no such file"),
    ("speed", ["--threshold", "0"], "--threshold 0: expected a positive number"),
    ("speed", ["--retain-scale", "nan"], "--retain-scale nan: expected a positive number"),
    ("forget_me_not", ["--model", "no/such-model"], "--model no/such-model cannot be loaded"),
    ("neggrad", ["--forget", "missing.png"], "--forget missing.png cannot be read"),
    ("erasediff", ["--remember", "nowhere"], "--remember nowhere: no images there"),
    ("siss", ["--lam", "1"], "--lam 1.0: expected a probability"),
    ("siss", ["--out", "/proc/nowhere"], "--out /proc/nowhere cannot be written"),
    ("duo", ["--surrogate", "a.png", "b.png"], "1 images but 2 surrogates"),
    *((name, ["--lr", "0"], "--lr 0") for name in TRAINED),
    *((name, ["--lr", "nan"], "--lr nan") for name in TRAINED),
    *((name, ["--anchor", "a", "b"], "1 targets but 2 anchors") for name in CONCEPT),
]


@pytest.mark.parametrize(("name", "flags", "message"), BAD_INPUT)
def test_bad_input_is_one_line(name, flags, message, tiny, tiny_ddpm, photos, tmp_path):
    argv = ["--target", "Grumpy Cat", "--anchor", "Cat", "--model", str(tiny)]
    if name in INSTANCE:
        argv = ["--forget", str(photos / "a.png"), "--model", str(tiny_ddpm)]
        argv += ["--remember", str(photos)] if name in REMEMBERING else []
    argv += ["--out", str(tmp_path / "out"), *flags]
    with pytest.raises(SystemExit) as e:
        METHODS[name].unlearn(METHODS[name].parse_args(argv))
    assert message in str(e.value) and "\n" not in str(e.value) and e.value.code != 0


def test_speed_needs_directions_to_edit(tiny, tmp_path):
    """The vectors of many prompts fill all 32 dimensions of the tiny model."""
    file = tmp_path / "prompts.txt"
    words = [f"{a} {b}" for a in ("red", "old", "big", "wet") for b in ("dog", "sun", "tea", "car")]
    file.write_text("\n".join([*words, *"abcdefghijklmnopqrstuvwxyz", *map(str, range(50))]))
    flags = ["--retain-prompts", str(file), "--threshold", "1e-9"]
    message = r"--threshold 1e-09 leaves \d of 32 directions to edit .*to_v.* expected more than 4"
    with pytest.raises(SystemExit, match=message) as e:
        run_concept("speed", tiny, tmp_path / "run", *flags)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "run/delta.safetensors").exists()


# What each method for concepts refuses. Those for images refuse all but a DDPM, above.
REFUSED = [
    (name, family)
    for name in CONCEPT
    for family, backbone in ({"ddpm": DDPM} | FAMILIES).items()
    if backbone not in METHODS[name].FAMILIES
]


@pytest.mark.parametrize(("name", "family"), REFUSED)
def test_other_families_are_refused_and_told_why(name, family, folders, tiny_ddpm, tmp_path):
    model = folders.get(family, tiny_ddpm)
    with pytest.raises(SystemExit) as e:
        run_concept(name, model, tmp_path / "run")
    text = str(e.value)
    assert f"--model {model} is a " in text and "; expected one of StableDiffusion" in text
    assert text.endswith(f": {METHODS[name].WHY}") and "\n" not in text
    assert not (tmp_path / "run/args.json").exists()


@pytest.mark.parametrize("name", CONCEPT)
def test_the_docstring_names_the_families_that_a_method_takes(name):
    """In the first sentence of a paragraph of its own."""
    words = {"1.x": StableDiffusion, "XL": StableDiffusionXL, "3.5": StableDiffusion3}
    words["FLUX.1"] = Flux
    [sentence] = re.findall(r"^Families: (.*?\.)\s", METHODS[name].__doc__, re.M | re.S)
    assert {words[word] for word in words if word in sentence} == set(METHODS[name].FAMILIES)


BAD_FLAGS = [
    ("esd", "sd3", ["--train-method", "noxattn"], "--train-method noxattn: a transformer has no"),
    ("esd", "sd3", ["--rank", "0"], "--rank 0: expected at least 1"),
    ("esd", "sdxl", ["--rank", "4"], "--rank 4 goes with --train-method lora, not xattn"),
    ("conabl", "sd3", ["--train-method", "kv", "--rank", "4"], "goes with --train-method lora"),
    ("conabl", "flux", ["--resolution", "18"], "--resolution 18 is no multiple of 4"),
]


@pytest.mark.parametrize(("name", "family", "flags", "message"), BAD_FLAGS)
def test_flags_that_a_family_has_no_use_for(name, family, flags, message, folders, tmp_path):
    with pytest.raises(SystemExit) as e:
        run_concept(name, folders[family], tmp_path / "run", *flags)
    assert message in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("name", REMEMBERING)
def test_another_model_needs_images_to_remember(name, tiny_ddpm, photos, tmp_path):
    argv = ["--forget", str(photos / "a.png"), "--model", str(tiny_ddpm)]
    argv += ["--out", str(tmp_path / "out")]
    message = "--remember is missing: which images should .*ddpm remember"
    with pytest.raises(SystemExit, match=message) as e:
        METHODS[name].unlearn(METHODS[name].parse_args(argv))
    assert "\n" not in str(e.value)


def default_folder(module, flags):
    """The name of the run folder that is created without --out."""
    return baselines.open_run_folder(module.parse_args(flags)).name


@pytest.mark.parametrize("name", CONCEPT)
def test_targets_in_any_script_and_length_have_folders_of_their_own(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    method = name.replace("_", "-")
    long = {"so " * 100 + "tall": "so-so-", "so " * 101: "so-so-"}
    starts = {"Grumpy Cat": "grumpy-cat", "不爽猫": "", "快乐狗": ""} | long
    folders = []
    for target, start in starts.items():
        folder = default_folder(METHODS[name], ["--target", target, "--anchor", "Cat"])
        assert folder.startswith(f"{method}-{start}")
        assert folder.isascii() and len(folder) < 120
        folders.append(folder)
    assert folders[0] == f"{method}-grumpy-cat"
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("name", INSTANCE)
def test_images_of_any_name_have_folders_of_their_own(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = ("猫.png", "狗.png", "x" * 200 + ".png")
    folders = [default_folder(METHODS[name], ["--forget", file]) for file in files]
    for folder in folders:
        assert folder.startswith(f"{name}-") and folder.isascii() and len(folder) < 120
    assert len(set(folders)) == 3
