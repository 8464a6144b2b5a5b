"""The rivals: their losses and formulas by hand, and that each runs, repeats itself, and loads in plain diffusers."""

import json
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch.distributions import Normal

import eval as evaluation
from baselines import conabl, duo, erasediff, esd, forget_me_not, neggrad, siss, spm, uce
from gradsurgery import flat_grad
from instance_unlearn import coefficients, per_picture, to_tensor


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def sd(tiny):
    return StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None, requires_safety_checker=False)


# ---- the losses and formulas ----------------------------------------------------------------------------------------


def test_esd_aims_at_negative_guidance():
    null, target = random(2, 4, 8, 8), random(2, 4, 8, 8, seed=1)
    guided = null + -1.5 * (target - null)  # classifier-free guidance with a scale of -1.5
    assert torch.allclose(esd.steer_away(null, target, 1.5), guided, atol=1e-6)


def test_esd_trains_what_its_paper_does():
    """All but the cross-attention for objects, the cross-attention for styles; on small models the latter for both."""
    assert [esd.default_train(kind, small) for kind in ("object", "style") for small in (False, True)] == [
        "noxattn", "xattn", "xattn", "xattn"]  # fmt: skip
    assert esd.unlearn.__code__.co_names.count("default_train") == 1


def test_esd_paths_are_those_of_diffusers(sd):
    """What draw_path walks is what StableDiffusionPipeline draws by DDIM, unclipped, with the same guidance."""
    sd.scheduler = DDIMScheduler.from_config(sd.scheduler.config, clip_sample=False)
    sd.set_progress_bar_config(disable=True)
    noise = random(2, 4, 16, 16)
    drawn = sd(["a cat", "a dog"], latents=noise, guidance_scale=3.0, num_inference_steps=6, output_type="latent").images
    with torch.no_grad():
        emb, null = sd.encode_prompt(["a cat", "a dog"], "cpu", 1, True)
    sd.scheduler.set_timesteps(6)
    path = list(esd.draw_path(sd.unet, sd.scheduler, noise, emb, null, 3.0))
    assert [t.item() for _, t, *_ in path] == sd.scheduler.timesteps.tolist() and torch.equal(path[0][0], noise)
    x, t, eps_null, eps_target = path[-1]
    last = sd.scheduler.step(eps_null + 3 * (eps_target - eps_null), t, x).prev_sample
    assert torch.allclose(last, drawn, atol=1e-4) and drawn.abs().max() > 2  # latents are N(0, 1), and a clip would show


def test_conabl_moves_the_target_alone():
    target, anchor = random(2, 4, 8, 8).requires_grad_(), random(2, 4, 8, 8, seed=1).requires_grad_()
    loss = conabl.loss_ablation(target, anchor)
    loss.backward()
    assert math.isclose(loss.item(), ((target - anchor) ** 2).mean().item(), rel_tol=1e-5)
    assert anchor.grad is None and torch.allclose(target.grad, 2 * (target - anchor).detach() / target.numel(), atol=1e-6)


@pytest.fixture
def keys():
    return random(24, 16), random(5, 16, seed=1), random(5, 16, seed=2), random(7, 16, seed=3)  # W0, erase, guide, preserve


def test_uce_is_the_minimum(keys):
    w0, e, g, p = (x.double() for x in keys)
    w = uce.edit(*keys, a=0.7, b=1.3, lam=0.4)
    left = w @ (0.4 * torch.eye(16).double() + 0.7 * e.T @ e + 1.3 * p.T @ p)
    assert (left - (0.4 * w0 + 0.7 * w0 @ g.T @ e + 1.3 * w0 @ p.T @ p)).abs().max() < 1e-8  # the normal equations

    v = w.clone().requires_grad_()  # and the gradient of the objective, as its sums are written
    objective = 0.7 * sum((v @ x - w0 @ y).square().sum() for x, y in zip(e, g, strict=True))
    objective = objective + 1.3 * sum((v @ x - w0 @ x).square().sum() for x in p) + 0.4 * (v - w0).square().sum()
    assert torch.autograd.grad(objective, v)[0].abs().max() < 1e-8


def test_uce_reads_the_erased_as_the_guide_and_leaves_the_preserved(keys):
    w0, e, g, p = keys
    w = uce.edit(w0, e, g, p, a=1e8, b=1e8, lam=1e-2).float()  # 12 vectors in 16 dimensions: both can be had
    assert torch.allclose(w @ e.T, w0 @ g.T, atol=1e-3) and torch.allclose(w @ p.T, w0 @ p.T, atol=1e-3)
    assert torch.allclose(uce.edit(w0, e, e, p), w0.double(), atol=1e-6)  # guided to itself


def test_uce_takes_the_vectors_from_the_last_word_on(sd):
    with torch.no_grad():
        whole = sd.encode_prompt("a grumpy cat", "cpu", 1, False)[0][0]
    n = len(sd.tokenizer("a grumpy cat")["input_ids"])
    assert torch.equal(uce.read(sd, "a grumpy cat", "all"), whole) and len(whole) == 77
    assert torch.equal(uce.read(sd, "a grumpy cat", "from"), whole[n - 2 :])
    assert torch.equal(uce.read(sd, "a grumpy cat", "last"), whole[n - 2 : n - 1])
    assert sd.tokenizer.decode(sd.tokenizer("a grumpy cat")["input_ids"][n - 2]).strip() == "cat"


def test_spm_starts_as_the_original(sd):
    x, emb = random(2, 4, 16, 16), random(2, 77, 32, seed=1)
    with torch.no_grad():
        before = sd.unet(x, 500, emb).sample
        sd.unet.add_adapter(spm.LoraConfig(r=1, lora_alpha=1, target_modules=spm.LAYERS))
        assert torch.equal(sd.unet(x, 500, emb).sample, before)
        inside = [(n, m) for n, m in sd.unet.named_modules() if "attentions" in n and "lora" not in n]
        layers = [n for n, m in inside if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
        adapted = [p for n, p in sd.unet.named_parameters() if "lora_B" in n]
        assert len(adapted) == len(layers) > 20  # every layer of the transformers, and none beside
        for p in adapted:
            p += 1
        assert not torch.allclose(sd.unet(x, 500, emb).sample, before, atol=1e-3)


def test_spm_anchors_are_as_long_as_the_target_and_rarely_like_it():
    emb = random(77, 32)
    anchors = spm.random_anchors(emb, 50, torch.Generator().manual_seed(0))
    lengths = anchors.flatten(1).norm(dim=1) / emb.norm()
    assert anchors.shape == (50, 77, 32) and 0.8 <= lengths.min() < 0.85 and 1.15 < lengths.max() <= 1.2
    narrow = torch.tensor([[1.0]])  # in one dimension half of all noise equals the target: never taken
    assert (spm.random_anchors(narrow, 20, torch.Generator().manual_seed(0)) < 0).all()


def test_spm_works_as_hard_as_a_prompt_resembles_the_target(sd):
    strength = spm.transport(sd, ["grumpy cat"])
    assert math.isclose(strength("grumpy cat"), 1, rel_tol=1e-5)
    assert strength("a photo of a grumpy cat") == 1  # all of its tokens
    with torch.no_grad():
        flat = [sd.encode_prompt(s, "cpu", 1, False)[0].flatten() for s in ("a cat", "grumpy cat")]
    cos = torch.cosine_similarity(*flat, dim=0)
    half = len({*sd.tokenizer("cat")["input_ids"][1:-1]}) / len({*sd.tokenizer("grumpy cat")["input_ids"][1:-1]})
    assert math.isclose(strength("a cat"), max(cos, half), rel_tol=1e-5)
    assert spm.transport(sd, ["grumpy cat", "pizza"])("pizza") >= strength("pizza")


def test_forget_me_not_watches_without_disturbing(sd):
    x, emb = random(2, 4, 16, 16), random(2, 77, 32, seed=1)
    with torch.no_grad():
        before, watch = sd.unet(x, 500, emb).sample, forget_me_not.Watch()
        sd.unet.set_attn_processor({n: watch if ".attn2." in n else p for n, p in sd.unet.attn_processors.items()})
        assert torch.allclose(sd.unet(x, 500, emb).sample, before, atol=1e-5)
    assert len(watch.seen) == sum(".attn2." in n for n in sd.unet.attn_processors) > 0
    assert all(p.shape[0] == 2 and p.shape[3] == 77 and torch.allclose(p.sum(-1), torch.ones(1)) for p in watch.seen)
    single, alone = forget_me_not.Watch(), []  # the second picture's attention is its own, not the other's
    sd.unet.set_attn_processor({n: single if ".attn2." in n else p for n, p in sd.unet.attn_processors.items()})
    with torch.no_grad():
        sd.unet(x[1:], 500, emb[1:])
    alone = [torch.allclose(p[1], q[0], atol=1e-5) for p, q in zip(watch.seen, single.seen, strict=True)]
    assert all(alone)


def test_forget_me_not_loss_by_hand(sd):
    at = forget_me_not.positions(sd.tokenizer, "a photo of a grumpy cat", ["pizza", "grumpy cat"])
    ids = sd.tokenizer("a photo of a grumpy cat")["input_ids"]
    n = len(sd.tokenizer("grumpy cat")["input_ids"]) - 2
    assert at.nonzero().flatten().tolist() == list(range(len(ids) - 1 - n, len(ids) - 1))
    seen = [torch.zeros(2, 1, 3, 4), torch.zeros(2, 2, 1, 4)]  # two layers of other heads and pixels
    seen[0][0, 0, 1, 2], seen[1][0, 1, 0, 2], seen[1][0, 0, 0, 3], seen[0][1, 0, 0, 0] = 3.0, 4.0, 9.0, 2.0
    marked = torch.tensor([[False, False, True, False], [True, False, False, False]])
    assert forget_me_not.loss_attention(seen, marked) == (5 + 2) / 2  # sqrt(9 + 16), and sqrt(4)


def test_neggrad_loss_by_hand():
    error_r, error_f = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    assert neggrad.loss_neggrad(error_r, error_f, 0.5) == -0.5  # (1 - 1.5 + 2 - 2.5) / 2
    assert neggrad.loss_neggrad(None, error_f, 0.5) == -4


def test_erasediff_forgets_as_fast_as_eta_says():
    g_r, g_f = torch.tensor([1.0, 2.0]), torch.tensor([-3.0, 0.0])
    g = erasediff.combine(g_r, g_f, 0.1)
    assert torch.allclose(g, torch.tensor([1 - 3 * (0.1 + 1 / 3), 2.0]))
    assert math.isclose(g @ g_f, 0.1 * 9, rel_tol=1e-5)  # in conflict: just as much as asked
    assert torch.equal(erasediff.combine(g_r, -g_f, 0.1), g_r)  # in agreement, and faster than asked: nothing is added
    assert torch.equal(erasediff.combine(g_r, 0 * g_f, 0.1), g_r)


@pytest.mark.parametrize("lam", (0.5, 0.2))
def test_siss_weights_are_the_ratio_of_densities(lam):
    x_r, x_f = random(6, 3, 4, 4).double() / 3, random(6, 3, 4, 4, seed=1).double() / 3
    alpha_bar = torch.linspace(0.05, 0.6, 6).double()
    a, b = coefficients(torch.arange(6), alpha_bar)
    m_t = a * torch.where(torch.arange(6).view(-1, 1, 1, 1) % 2 == 0, x_r, x_f) + b * random(6, 3, 4, 4, seed=2)
    q_r, q_f = (Normal(a * x, b).log_prob(m_t).sum((1, 2, 3)).exp() for x in (x_r, x_f))
    mixture = (1 - lam) * q_r + lam * q_f
    w_r, w_f = siss.importance_weights(m_t, x_r, x_f, a, b, lam)
    assert torch.allclose(w_r, q_r / mixture) and torch.allclose(w_f, q_f / mixture)
    says = random(6, 3, 4, 4, seed=3)
    errors = [((says - (m_t - a * x) / b) ** 2).sum((1, 2, 3)) for x in (x_r, x_f)]
    wanted = [(q / mixture * error).mean() for q, error in zip((q_r, q_f), errors, strict=True)]
    assert torch.allclose(torch.stack(siss.losses_siss(says, m_t, x_r, x_f, a, b, lam)), torch.stack(wanted))


def test_siss_weights_stay_finite_without_overlap():
    x_r, x_f, (a, b) = torch.ones(1, 3, 64, 64), -torch.ones(1, 3, 64, 64), torch.tensor([1.0, 0.01]).view(2, 1, 1, 1, 1)
    w_r, w_f = siss.importance_weights(x_r, x_r, x_f, a, b, 0.5)
    assert w_r == 2 and w_f == 0
    with pytest.raises(ValueError, match="lam is 1"):
        siss.importance_weights(x_r, x_r, x_f, a, b, 1)


def test_siss_subtracts_a_fixed_norm():
    g_r, g_f = torch.tensor([30.0, 40.0]), torch.tensor([0.0, 7.0])
    assert torch.equal(siss.subtract(g_r, g_f, 2.0), torch.tensor([30.0, 38.0]))
    assert torch.allclose(siss.subtract(g_r, g_f), torch.tensor([30.0, 35.0]))  # a tenth of 50


def test_duo_prefers_the_surrogate():
    s, s_0, f, f_0 = (torch.tensor([v]) for v in (0.30, 0.32, 0.50, 0.45))
    assert math.isclose(duo.loss_preference(s, s_0, f, f_0, 10), math.log(1 + math.exp(-0.7)), rel_tol=1e-5)
    assert math.isclose(duo.loss_preference(s_0, s_0, f_0, f_0, 500), math.log(2), rel_tol=1e-6)
    s, f = s.requires_grad_(), f.requires_grad_()
    g_s, g_f = torch.autograd.grad(duo.loss_preference(s, s_0, f, f_0, 10), (s, f))
    assert g_s > 0 > g_f and math.isclose(g_s, -g_f, rel_tol=1e-5)  # downhill: the surrogate's error falls, the other rises


# ---- the scripts ------------------------------------------------------------------------------------------------------


CONCEPT = {"esd": esd, "conabl": conabl, "spm": spm, "uce": uce, "forget_me_not": forget_me_not}
INSTANCE = {"neggrad": neggrad, "erasediff": erasediff, "siss": siss, "duo": duo}


@pytest.fixture
def quick(monkeypatch):
    for module in CONCEPT.values():
        if hasattr(module, "SMALL"):
            few = {"paths": 4, "images": 4, "sampling_steps": 4}
            monkeypatch.setattr(module, "SMALL", module.SMALL | {k: v for k, v in few.items() if k in module.SMALL})


def run_concept(name, tiny, out, *flags):
    common = ["--target", "Grumpy Cat", "--anchor", "Cat", "--model", str(tiny), "--out", str(out)]
    common += ["--steps", "3", "--batch-size", "2"] if name != "uce" else []
    return CONCEPT[name].unlearn(CONCEPT[name].parse_args([*common, *flags]))


def weights_of(run):
    return load_file(next(run.glob("*.safetensors")))


@pytest.mark.parametrize("name", CONCEPT)
def test_concept_rivals_run_repeat_and_load(name, tiny, tmp_path, sd, quick):
    runs = [run_concept(name, tiny, tmp_path / k, "--seed", seed) for k, seed in (("a", "0"), ("b", "0"), ("c", "1"))]
    first, again, other = map(weights_of, runs)
    assert first.keys() == again.keys() and all(torch.equal(first[n], again[n]) for n in first)
    assert name == "uce" or any(not torch.equal(first[n], other[n]) for n in first)  # the formula draws nothing
    assert json.loads((tmp_path / "a/args.json").read_text())["settings"]["target"] == ["Grumpy Cat"]

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


@pytest.mark.parametrize("name", CONCEPT)
def test_concept_rivals_take_styles_and_several_targets(name, tiny, tmp_path, quick):
    module = CONCEPT[name]
    flags = ["--model", str(tiny), *(["--steps", "2", "--batch-size", "2"] if name != "uce" else [])]
    for k, words in enumerate((["--target", "pizza", "Grumpy Cat", "--anchor", "food", "Cat"],
                               ["--target", "twemoji", "--anchor", "emoji", "--concept-type", "style"])):  # fmt: skip
        assert weights_of(module.unlearn(module.parse_args([*words, *flags, "--out", str(tmp_path / str(k))])))


def logged(run, key):
    return [json.loads(line)[key] for line in (run / "log.jsonl").read_text().splitlines()]


def test_esd_learns_what_it_aims_at(tiny, tmp_path, quick):
    losses = logged(run_concept("esd", tiny, tmp_path / "run", "--lr", "1e-3", "--train", "full", "--steps", "60"), "loss")
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_spm_is_anchored_at_the_original(tiny, tmp_path, quick):
    runs = [run_concept("spm", tiny, tmp_path / k, "--lr", "1e-1", "--steps", "20", "--anchoring", k) for k in ("0", "1e5")]
    free, held = (logged(run, "loss_anchoring") for run in runs)
    assert free[0] == held[0] == 0 and free[-1] > 2 * held[-1] > 0  # at first the adapter does nothing


def test_forget_me_not_marks_each_target_where_prompts_are_few(tiny, tmp_path, quick):
    """A file may hold more prompts of one anchor than of another; where no target were marked, the loss would be 0."""
    (tmp_path / "prompts.txt").write_text("food\na photo of food\nan emoji of food\na cat\n")
    words = ["--target", "pizza", "Grumpy Cat", "--anchor", "food", "Cat", "--prompts", str(tmp_path / "prompts.txt")]
    run = run_concept("forget_me_not", tiny, tmp_path / "run", *words, "--batch-size", "1", "--steps", "8")
    assert min(logged(run, "loss")) > 0.01


def test_forget_me_not_reads_pictures(tiny, tmp_path, photos, quick):
    assert weights_of(run_concept("forget_me_not", tiny, tmp_path / "run", "--pictures", str(photos)))
    with pytest.raises(SystemExit, match="--pictures"):
        run_concept("forget_me_not", tiny, tmp_path / "other", "--pictures", str(tmp_path / "nowhere"))


def test_eval_lets_spm_work_as_hard_as_a_prompt_resembles_the_target(tiny, tmp_path, quick):
    """Drawn through eval.py, a prompt gets the adapter times its strength: as by hand in plain diffusers."""
    run_concept("spm", tiny, tmp_path / "run", "--lr", "1")
    drawer = evaluation.Drawer(str(tiny), torch.device("cpu"))
    drawer.become(tmp_path / "run")
    strength = spm.transport(drawer.pipe, ["Grumpy Cat"])
    assert strength("a grumpy cat") == 1 > strength("a cat")

    def by_hand(prompt, seed, m):
        how = {"guidance_scale": 6.0, "num_inference_steps": drawer.steps, "output_type": "np"}
        with torch.autocast("cpu", torch.bfloat16):  # as eval.py does
            g = torch.Generator().manual_seed(seed)
            image = drawer.pipe(prompt, generator=g, cross_attention_kwargs={"scale": m}, **how).images[0]
        return torch.from_numpy(image).permute(2, 0, 1) * 255

    for x, *what in zip(drawer.draw(["a grumpy cat", "a cat"], [1, 2], "test"), ["a grumpy cat", "a cat"], [1, 2], strict=True):
        m = strength(what[0])
        away = {k: (x - by_hand(*what, k)).abs().mean() for k in {m, 1, 0.5 * m}}
        assert min(away, key=away.get) == m and away[m] < 0.5  # rounded to bytes


def run_instance(name, tiny_ddpm, photos, out, *flags):
    common = ["--model", str(tiny_ddpm), "--forget", str(photos / "a.png"), "--steps", "4", "--batch-size", "4"]
    common += ["--remember", str(photos)] if name != "duo" else ["--surrogate", str(photos / "b.png")]
    return INSTANCE[name].unlearn(INSTANCE[name].parse_args([*common, *flags, "--out", str(out)]))


@pytest.mark.parametrize("name", INSTANCE)
def test_instance_rivals_run_repeat_and_load(name, tiny_ddpm, photos, tmp_path):
    nets = [DDPMPipeline.from_pretrained(run_instance(name, tiny_ddpm, photos, tmp_path / k, "--seed", s) / "pipeline").unet
            for k, s in (("a", "0"), ("b", "0"), ("c", "1"))]  # fmt: skip
    first, again, other = (torch.cat([p.flatten() for p in net.parameters()]) for net in nets)
    assert torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(SystemExit, match="already holds a run"):
        run_instance(name, tiny_ddpm, photos, tmp_path / "a")


def loss_of(folder, picture):
    pipe, x = DDPMPipeline.from_pretrained(folder), to_tensor(Image.open(picture))[None]
    t, g = torch.arange(50, 1000, 100), torch.Generator().manual_seed(0)
    eps = torch.randn(len(t), 3, 16, 16, generator=g)
    a, b = coefficients(t, pipe.scheduler.alphas_cumprod)
    with torch.no_grad():
        return per_picture(pipe.unet(a * x + b * eps, t).sample, eps).mean()


@pytest.mark.parametrize(("name", "flags"), (
    ("neggrad", ()), ("neggrad", ("--ascent",)), ("siss", ("--full-range", "--scaling-norm", "1e6"))))  # fmt: skip
def test_instance_rivals_raise_the_loss_of_their_picture(name, flags, tiny_ddpm, photos, tmp_path):
    run = run_instance(name, tiny_ddpm, photos, tmp_path / "run", *flags, "--lr", "1e-3", "--steps", "10")
    assert loss_of(run / "pipeline", photos / "a.png") > 1.2 * loss_of(tiny_ddpm, photos / "a.png")


def test_duo_moves_from_its_picture_to_the_surrogate(tiny_ddpm, photos, tmp_path):
    run = run_instance("duo", tiny_ddpm, photos, tmp_path / "run", "--lr", "1e-3", "--steps", "20", "--prior", "0")
    gap = [loss_of(f, photos / "a.png") - loss_of(f, photos / "b.png") for f in (tiny_ddpm, run / "pipeline")]
    assert gap[1] > gap[0] + 0.01
    losses = logged(run, "loss_preference")
    assert math.isclose(losses[0], math.log(2), rel_tol=1e-6) and losses[-1] < losses[0] - 0.1  # measured from the original


@pytest.mark.parametrize(("flags", "all_at_999"), (((), True), (("--full-range",), False)))
def test_siss_draws_the_last_timestep_unless_told_otherwise(flags, all_at_999, tiny_ddpm, photos, tmp_path, monkeypatch):
    times = []
    monkeypatch.setattr(siss, "coefficients", lambda t, alpha_bar: times.append(t) or coefficients(t, alpha_bar))
    run_instance("siss", tiny_ddpm, photos, tmp_path / "run", *flags)
    assert (torch.cat(times) == 999).all() == all_at_999


def test_siss_two_ways_back_through_one_graph():
    """flat_grad with retain_graph gives each loss its own gradient."""
    w = torch.tensor([2.0, 3.0], requires_grad=True)
    y = w.square()
    assert torch.equal(flat_grad(y[0], [w], retain_graph=True), torch.tensor([4.0, 0]))
    assert torch.equal(flat_grad(y[1], [w]), torch.tensor([0, 6.0]))


@pytest.mark.parametrize("module", INSTANCE.values())
def test_instance_rivals_refuse_other_models(module, tiny, photos, tmp_path):
    flags = ["--model", str(tiny), "--forget", str(photos / "a.png"), "--out", str(tmp_path / "run")]
    flags += ["--remember", str(photos)] if module is not duo else []
    with pytest.raises(SystemExit, match="expected a DDPM"):
        module.unlearn(module.parse_args(flags))


@pytest.mark.parametrize("name", [name for name in (*CONCEPT, *INSTANCE) if name != "uce"])  # a formula
def test_a_run_that_diverges_saves_nothing(name, tiny, tiny_ddpm, photos, tmp_path, quick):
    with pytest.raises(SystemExit, match="not finite"):
        if name in CONCEPT:
            run_concept(name, tiny, tmp_path / "run", "--lr", "1e38")
        else:
            run_instance(name, tiny_ddpm, photos, tmp_path / "run", "--lr", "1e38")
    assert not list((tmp_path / "run").glob("*.safetensors")) and not (tmp_path / "run/pipeline").exists()


# ---- bad input: one line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "flags", "says"), [
    ("esd", ["--steps", "0"], "--steps 0"),
    ("conabl", ["--batch-size", "0"], "--batch-size 0"),
    ("spm", ["--target", "Cat"], "--target and --anchor are both 'Cat'"),
    ("uce", ["--out", "/proc/nowhere"], "--out /proc/nowhere cannot be written"),
    ("forget_me_not", ["--model", "no/such-model-anywhere"], "--model no/such-model-anywhere cannot be loaded"),
    ("neggrad", ["--forget", "missing.png"], "--forget missing.png cannot be read"),
    ("erasediff", ["--remember", "nowhere"], "--remember nowhere: no pictures there"),
    ("siss", ["--lam", "1"], "--lam 1.0: expected a probability"),
    ("siss", ["--out", "/proc/nowhere"], "--out /proc/nowhere cannot be written"),
    ("duo", ["--surrogate", "a.png", "b.png"], "1 pictures but 2 surrogates"),
    *((name, ["--lr", "0"], "--lr 0") for name in (*CONCEPT, *INSTANCE) if name != "uce"),
    *((name, ["--lr", "nan"], "--lr nan") for name in (*CONCEPT, *INSTANCE) if name != "uce"),
    *((name, ["--anchor", "a", "b"], "1 targets but 2 anchors") for name in CONCEPT),
])  # fmt: skip
def test_bad_input_is_one_line(name, flags, says, tiny, tiny_ddpm, photos, tmp_path):
    module = (CONCEPT | INSTANCE)[name]
    common = ["--target", "Grumpy Cat", "--anchor", "Cat", "--model", str(tiny)]
    if name in INSTANCE:
        common = ["--forget", str(photos / "a.png"), "--model", str(tiny_ddpm)]
        common += ["--remember", str(photos)] if name != "duo" else []
    with pytest.raises(SystemExit) as e:
        module.unlearn(module.parse_args([*common, "--out", str(tmp_path / "out"), *flags]))
    assert says in str(e.value) and "\n" not in str(e.value) and e.value.code != 0


@pytest.mark.parametrize("name", ("neggrad", "erasediff", "siss"))
def test_what_a_foreign_model_is_to_keep_must_be_said(name, tiny_ddpm, photos, tmp_path):
    module = INSTANCE[name]
    argv = ["--forget", str(photos / "a.png"), "--model", str(tiny_ddpm), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="--remember is missing: which pictures should .*ddpm keep") as e:
        module.unlearn(module.parse_args(argv))
    assert "\n" not in str(e.value)


def default_folder(module, tmp_path, monkeypatch, *flags):
    """The run folder that a script makes where --out is not given; --lr 0 ends the run right after."""
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.glob("runs/*"))
    try:
        module.unlearn(module.parse_args([*flags, *([] if module is uce else ["--lr", "0"])]))
    except SystemExit as e:
        assert "--lr 0" in str(e)
    [new] = set(tmp_path.glob("runs/*")) - before
    return new.name


@pytest.mark.parametrize("name", CONCEPT)
def test_targets_in_any_script_and_length_have_folders_of_their_own(name, tiny, tmp_path, monkeypatch):
    method, model = name.replace("_", "-"), ["--model", str(tiny)]
    starts = {"Grumpy Cat": "grumpy-cat", "不爽猫": "", "快乐狗": "", "so " * 100 + "tall": "so-so-", "so " * 101: "so-so-"}
    for target, start in starts.items():
        flags = ["--target", target, "--anchor", "Cat", *model]
        folder, start = default_folder(CONCEPT[name], tmp_path, monkeypatch, *flags), f"{method}-{start}"
        assert folder.startswith(start) and folder.isascii() and len(folder) < 120  # and a new one, as default_folder() checks
        assert target != "Grumpy Cat" or folder == start


@pytest.mark.parametrize("name", INSTANCE)
def test_pictures_of_any_name_have_folders_of_their_own(name, tiny_ddpm, photos, tmp_path, monkeypatch):
    for picture in ("猫", "狗", "x" * 200):
        (file := tmp_path / f"{picture}.png").write_bytes((photos / "a.png").read_bytes())
        flags = ["--forget", str(file), "--model", str(tiny_ddpm), *(["--remember", str(photos)] if name != "duo" else [])]
        folder = default_folder(INSTANCE[name], tmp_path, monkeypatch, *flags)
        assert folder.startswith(f"{name}-") and folder.isascii() and len(folder) < 120


def test_forget_me_not_needs_the_target_among_the_tokens_of_its_prompt(tiny, tmp_path, sd, quick):
    """A prompt is cut at 77 tokens. Where nothing of the target is left, its norm is 0 and has no gradient."""
    with pytest.raises(SystemExit, match="--target 'so so.* is not found in any prompt's first 77 tokens") as e:
        run_concept("forget_me_not", tiny, tmp_path / "long", "--target", "pizza", "so " * 100 + "tall")
    assert "\n" not in str(e.value)
    assert not forget_me_not.positions(sd.tokenizer, "in Wow!'s style", ["Wow!"]).any()
    flags = ["--target", "Wow!", "--anchor", "art", "--concept-type", "style", "--batch-size", "8"]
    assert min(logged(run_concept("forget_me_not", tiny, tmp_path / "style", *flags), "loss")) > 0.01  # other prompts have it
