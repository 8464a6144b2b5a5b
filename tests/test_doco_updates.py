"""Every update of doco.py recomputed by hand, sample by sample, from the equations; and mutants of the code, each caught.

`check` runs a module (doco.py, or a mutant of it) for four iterations on the tiny model and looks over its shoulder: it takes
the weights and the gradient of each half of each iteration where they are handed to the optimizers. Then it does the same with
nothing but the equations, plain diffusers and the documented order of the draws.
"""

import re
import types

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

import doco
from discriminator import patchgan

SEED, BATCH, STEPS, WARMUP, LR, DISC_LR = 2, 2, 4, 1, 1e-3, 2e-3
OBJECT = ["--target", "Grumpy Cat", "--anchor", "Cat", "--prompts", "CATS"]
TWO = ["--target", "Tom", "Snoopy", "--anchor", "cat", "dog", "--prompts", "BOTH"]
STYLE = ["--target", "Van Gogh", "--anchor", "painting", "--concept-type", "style", "--prompts", "STYLE"]
FILES = {"CATS": "a photo of a cat\none Cat\nthe cat sleeps\n",
         "BOTH": "a cat and a dog\na dog and a cat\na dog\n",
         "STYLE": "a painting of a dog\n"}  # fmt: skip
# What each file must become: (anchor prompt, target prompts), the targets taking turns.
PAIRS = {
    "CATS": [("a photo of a cat", ["a photo of a Grumpy Cat"]), ("one Cat", ["one Grumpy Cat"]),
             ("the cat sleeps", ["the Grumpy Cat sleeps"])],
    "BOTH": [("a cat and a dog", ["a Tom and a dog"]), ("a cat and a dog", ["a cat and a Snoopy"]),
             ("a dog and a cat", ["a dog and a Tom"]), ("a dog and a cat", ["a Snoopy and a cat"]), ("a dog", ["a Snoopy"])],
    "STYLE": [("a painting of a dog", ["a painting of a dog, in the style of Van Gogh", "a dog, in the style of Van Gogh",
                                       "in Van Gogh's style, a painting of a dog"])],
}  # fmt: skip


@pytest.fixture
def run(tiny, tmp_path, monkeypatch):
    """run(module, *flags): four iterations of a module; the run folder, its records and what it was told."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)

    def go(module, *flags):
        records, write = [], module.write_grad

        def spy(params, grad):
            params = list(params)
            records.append(([p.detach().clone() for p in params], grad.detach().clone()))
            write(params, grad)

        monkeypatch.setattr(module, "write_grad", spy)
        monkeypatch.setitem(module.SMALL, "sampling_steps", 3)
        files = [str(tmp_path / f) if f in FILES else f for f in flags]
        argv = ["--model", str(tiny), "--steps", str(STEPS), str(WARMUP), "--batch-size", str(BATCH), "--seed", str(SEED)]
        argv += ["--lr", str(LR), str(DISC_LR), "--out", str(tmp_path / "run")]
        return module.unlearn(module.parse_args([*argv, *files])), records

    return go


def flag(flags, name, default=None):
    return flags[flags.index(name) + 1] if name in flags else default


def adam(values, grads, lr, betas=(0.9, 0.999), decay=0.0):
    """The values after Adam's steps (Kingma & Ba 2015) with decoupled weight decay, from the gradients of all of them."""
    m, v = torch.zeros_like(values), torch.zeros_like(values)
    for k, g in enumerate(grads, 1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        step = (m / (1 - betas[0] ** k)) / ((v / (1 - betas[1] ** k)).sqrt() + 1e-8)
        yield (values := values * (1 - lr * decay) - lr * step)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def close(got, expected, what):
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item(), msg=lambda m: f"{what}: {m}")


def original_pipeline(folder):
    none = dict(safety_checker=None, requires_safety_checker=False)
    return StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **none)


def check(module, run, tiny, *flags):
    """Raises AssertionError where the module's anchor images, gradients or steps are not those of the equations."""
    out, records = run(module, *flags)
    pairs = PAIRS[flag(flags, "--prompts")]
    retain, lam = flag(flags, "--retain", "cp"), float(flag(flags, "--lam", 1))
    view, stride = (flag(flags, "--view", "x0").split(":") + ["1"])[:2]
    pipe = original_pipeline(tiny)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        emb = {p: pipe.encode_prompt(p, "cpu", 1, False)[0] for a, ts in pairs for p in (a, *ts)}

    # The anchor images: image j from the anchor prompt of pair j, with guidance 6, by DPM-Solver++, from its own seed
    n = min(64, STEPS * BATCH)
    pipe.scheduler, pndm = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config), pipe.scheduler
    seeds = [torch.Generator().manual_seed(SEED * 1_000_003 + j) for j in range(n)]
    prompts = [pairs[j % len(pairs)][0] for j in range(n)]
    latents = pipe(prompts, guidance_scale=6.0, num_inference_steps=3, output_type="latent", generator=seeds).images
    close(load_file(out / "anchor_latents.safetensors")["latents"], latents, "anchor images")

    # Two networks: one is trained, the other stays the original
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    a_bar = (1 - beta).cumprod(0).float()
    torch.testing.assert_close(a_bar, pndm.alphas_cumprod, rtol=1e-4, atol=0)
    original = original_pipeline(tiny).unet.eval()
    net = pipe.unet.eval()
    trained = [p for name, p in net.named_parameters() if "attn2.to_k" in name or "attn2.to_v" in name]
    torch.manual_seed(SEED)
    disc = patchgan(16)
    assert all(torch.equal(p, q) for p, q in zip(disc.parameters(), records[0][0], strict=True))  # D begins with its seed

    halves, k = [], 0  # (of the UNet or None, of D) for each iteration
    for step in range(STEPS):
        halves.append((records[k] if step >= WARMUP else None, records[k + (step >= WARMUP)]))
        k += 1 + (step >= WARMUP)
    assert k == len(records)

    conflicts, begin, unet_grads, retain_grads, disc_grads = [], flat(trained), [], [], []
    for step, (of_unet, of_disc) in enumerate(halves):
        if of_unet is not None:
            for p, value in zip(trained, of_unet[0], strict=True):
                p.data.copy_(value)
        for p, value in zip(disc.parameters(), of_disc[0], strict=True):
            p.data.copy_(value)
        g = torch.Generator().manual_seed(SEED * 1_000_003 + step)  # the draws, in their documented order
        i, i_r = torch.randint(n, (2, BATCH), generator=g)
        t, t_r = torch.randint(1000, (2, BATCH), generator=g)
        eps, eps_r, fresh = torch.randn(3, BATCH, 4, 16, 16, generator=g)
        loss_u = loss_r = loss_d = 0
        for b in range(BATCH):
            anchor, targets = pairs[i[b] % len(pairs)]
            a = a_bar[t[b]]
            xt = a.sqrt() * latents[i[b]] + (1 - a).sqrt() * eps[b]  # Eq. 1

            def see(e, a=a, xt=xt, b=b, t=t, fresh=fresh):
                x0 = (xt - (1 - a).sqrt() * e) / a.sqrt()
                if view == "x0":
                    return x0
                s = int(t[b]) - int(stride)
                a_s = a_bar[s] if s >= 0 else torch.tensor(1.0)
                mean = a_s.sqrt() * (1 - a / a_s) / (1 - a) * x0 + (a / a_s).sqrt() * (1 - a_s) / (1 - a) * xt
                return mean + ((1 - a_s) / (1 - a) * (1 - a / a_s)).sqrt() * fresh[b]

            with torch.no_grad():
                of_anchor = see(original(xt[None], t[b], emb[anchor]).sample)  # Eq. 5
            of_target = see(net(xt[None], t[b], emb[targets[step % len(targets)]]).sample)
            patch = lambda x: torch.sigmoid(disc(x).double())  # noqa: E731, D's probability of "anchor", patch by patch
            loss_u = loss_u - patch(of_target).log().mean() / BATCH  # Eq. 8, non-saturating
            loss_d = loss_d - (patch(of_anchor).log() + (1 - patch(of_target.detach())).log()).mean() / BATCH  # Eq. 8
            a_r = a_bar[t_r[b]]
            x_r = a_r.sqrt() * latents[i_r[b]] + (1 - a_r).sqrt() * eps_r[b]
            pred = net(x_r[None], t_r[b], emb[pairs[i_r[b] % len(pairs)][0]]).sample[0]
            loss_r = loss_r + (eps_r[b] - pred).square().mean() / BATCH  # Eq. 9
        g_d = flat(torch.autograd.grad(loss_d, disc.parameters()))
        close(of_disc[1], g_d, f"gradient of D, iteration {step}")
        disc_grads.append(of_disc[1])
        if of_unet is None:
            continue
        g_u = flat(torch.autograd.grad(loss_u, trained))
        g_r = flat(torch.autograd.grad(loss_r, trained))
        conflicts.append(bool(g_u @ g_r < 0))
        expected = g_u
        if retain == "l2":
            expected = g_u + g_r
        if retain == "cp" and "--project" not in flags and g_u @ g_r < 0:
            expected = g_u - lam * (g_u @ g_r) / (g_r @ g_r) * g_r  # Eq. 10
        close(of_unet[1], expected, f"gradient of the UNet, iteration {step}")
        unet_grads.append(of_unet[1])
        retain_grads.append(g_r)

    # The steps that the optimizers make of these gradients: AdamW of rate LR for the UNet, Adam of rate DISC_LR for D
    result = load_file(out / "delta.safetensors")
    end = flat(result[name] for name, _ in net.named_parameters() if name in result)
    after = [flat(h[0][0]) for h in halves if h[0]][1:] + [end]
    old, m, v = begin, 0, 0
    for k, (grad, got) in enumerate(zip(unet_grads, after, strict=True), 1):
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad * grad
        move = LR * 1e-2 * old + LR * (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8)
        if "--project" in flags and move @ (g_r := retain_grads[k - 1]) < 0:
            move = move - lam * (move @ g_r) / (g_r @ g_r) * g_r  # Eq. 10, of the step
        torch.testing.assert_close(got, old - move, rtol=0, atol=2e-4 * LR, msg=lambda s: f"step of the UNet: {s}")
        old = got
    moved = list(adam(flat(halves[0][1][0]), disc_grads, DISC_LR, betas=(0.5, 0.999)))[:-1]
    for got, value in zip([flat(h[1][0]) for h in halves][1:], moved, strict=True):
        torch.testing.assert_close(got, value, rtol=0, atol=2e-3 * DISC_LR, msg=lambda s: f"step of D: {s}")
    return conflicts


SWITCHES = {
    "paper": OBJECT,
    "lambda 0.5": [*OBJECT, "--lam", "0.5"],
    "no retention": [*OBJECT, "--retain", "none"],
    "L2": [*OBJECT, "--retain", "l2"],
    "x_{t-20}": [*OBJECT, "--view", "xprev:20"],
    "x_{t-1}": [*OBJECT, "--view", "xprev"],
    "x_{t-900}, mostly before 0": [*OBJECT, "--view", "xprev:900"],
    "Adam's step": [*OBJECT, "--project", "step"],
    "Adam's step, lambda 0.5": [*OBJECT, "--project", "step", "--lam", "0.5"],
    "two targets": TWO,
    "style": STYLE,
}


@pytest.mark.parametrize("name", SWITCHES)
def test_updates_by_hand(run, tiny, name):
    check(doco, run, tiny, *SWITCHES[name])


def test_there_are_conflicts_and_agreements(run, tiny):
    """Otherwise the two cases of Eq. 10 would not be told apart above."""
    assert set(check(doco, run, tiny, *OBJECT)) == {True, False}


# ---- mutants: a line of the method broken, and the check above goes red ---------------------------------------------

# (name, the switches it is run with, the line, what becomes of it); each line stands once in doco.py
MUTANTS = [
    ("the target's prompt is not used", "paper", "see(predict(xt, t, target_prompts))", "see(predict(xt, t, anchor_prompts))"),
    ("the anchor gets the target's prompt", "paper", "see(predict(xt, t, anchor_prompts))",
     "see(predict(xt, t, target_prompts))"),
    ("the original is never swapped in", "paper", "p.data, o.data = o.data, p.data", "pass"),
    ("the retain loss has the target's prompt", "paper", "[pairs[k % len(pairs)][0] for k in i_r]), eps_r)",
     "[pairs[k % len(pairs)][1][0] for k in i_r]), eps_r)"),
    ("the retain loss has the other noise level", "paper", "add_noise(latents[i_r], eps_r, alpha_bar[t_r]",
     "add_noise(latents[i_r], eps_r, alpha_bar[t]"),
    ("the retain loss is told the other timestep", "paper", "predict(x_r, t_r, [", "predict(x_r, t, ["),
    ("the retain loss has the other images", "paper", "add_noise(latents[i_r], eps_r", "add_noise(latents[i], eps_r"),
    ("the retain loss aims at the other noise", "paper", "for k in i_r]), eps_r)", "for k in i_r]), eps)"),
    ("the anchor image has the other noise level", "paper", "a_t = alpha_bar[t].view", "a_t = alpha_bar[t_r].view"),
    ("the coefficients of Eq. 1 are swapped", "paper", "alpha_bar_t.sqrt() * x0 + (1 - alpha_bar_t).sqrt() * noise",
     "(1 - alpha_bar_t).sqrt() * x0 + alpha_bar_t.sqrt() * noise"),
    ("x0_hat adds the noise", "paper", "(xt - (1 - alpha_bar_t).sqrt() * eps) /", "(xt + (1 - alpha_bar_t).sqrt() * eps) /"),
    ("the UNet wants to be told apart", "paper", "return F.softplus(-disc(view_target)).mean()",
     "return F.softplus(disc(view_target)).mean()"),
    ("D's labels are swapped", "paper", "F.softplus(-disc(view_anchor)).mean() + F.softplus(disc(view_target)).mean()",
     "F.softplus(disc(view_anchor)).mean() + F.softplus(-disc(view_target)).mean()"),
    ("D sees the anchor alone", "paper", "loss_discriminator(disc, view_anchor, view_target.detach())",
     "loss_discriminator(disc, view_anchor, view_anchor)"),
    ("no Eq. 10", "paper", 'elif args.retain == "cp" and args.project == "gradient":', "elif False:"),
    ("lambda is not used", "lambda 0.5", "lambda_projection(grad, g_r, args.lam)", "lambda_projection(grad, g_r)"),
    ("the gradients change places in Eq. 10", "paper", "lambda_projection(grad, g_r, args.lam)",
     "lambda_projection(g_r, grad, args.lam)"),
    ("the unlearning gradient is not used", "no retention", "flat_grad(loss_u, params), {}",
     "0 * flat_grad(loss_u, params), {}"),
    ("L2 climbs the retain loss", "L2", "grad = grad + g_r", "grad = grad - g_r"),
    ("the step is not projected", "Adam's step", "unflatten(params, old - kept)", "unflatten(params, old - move)"),
    ("the step is projected with the wrong sign", "Adam's step", "move = old - flatten(params)",
     "move = flatten(params) - old"),
    ("lambda is not used on the step", "Adam's step, lambda 0.5", "lambda_projection(move, g_r, args.lam)",
     "lambda_projection(move, g_r)"),
    ("one warm-up iteration too many", "paper", "step >= warmup", "step > warmup"),
    ("the stride is not used", "x_{t-20}", "alpha_bar[(t - stride).clamp(min=0)]", "alpha_bar[(t - 1).clamp(min=0)]"),
    ("noise below timestep 0", "x_{t-900}, mostly before 0", "torch.where(t < stride, 1.0,",
     "torch.where(t < stride, alpha_bar[0],"),
    ("x_{t-1} with the old noise", "x_{t-1}", "a_t, a_prev, fresh)", "a_t, a_prev, eps)"),
    ("only the first wording of a style", "style", "w[step % len(w)]", "w[0]"),
    ("targets one after another", "two targets", "for turn in zip_longest(*per_target) for pair in turn if pair",
     "for part in per_target for pair in part"),
    ("no weight decay", "paper", "lr=lr, weight_decay=1e-2", "lr=lr, weight_decay=0"),
    ("D's Adam has the usual betas", "paper", "betas=(0.5, 0.999)", "betas=(0.9, 0.999)"),
    ("the rates are swapped", "paper", "disc.parameters(), lr=disc_lr", "disc.parameters(), lr=lr"),
    ("the UNet is not stepped", "paper", "            opt_unet.step()\n", ""),
    ("D is not stepped", "paper", "        opt_disc.step()\n", ""),
    ("D begins with another seed", "paper", "torch.manual_seed(args.seed)  # the same disc",
     "torch.manual_seed(0)  # the same disc"),
    ("anchor images of no prompt", "paper", "torch.stack([emb[pairs[j % len(pairs)][0]] for j in chunk])",
     'torch.stack([emb[""] for j in chunk])'),
    ("anchor images without guidance", "paper", 'guidance_scale=recipe["guidance"]', "guidance_scale=1.0"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m[0])
def test_mutant_is_caught(run, tiny, mutant):
    _, switch, line, instead = mutant
    source = (doco.REPO / "doco.py").read_text()
    assert source.count(line) == 1, f"stands {source.count(line)} times in doco.py: {line}"
    module = types.ModuleType("mutant")
    exec(compile(source.replace(line, instead), "mutant.py", "exec"), module.__dict__)
    with pytest.raises((AssertionError, RuntimeError, IndexError)) as caught:
        check(module, run, tiny, *SWITCHES[switch])
    assert not re.search("NameError|SyntaxError", repr(caught.value))
