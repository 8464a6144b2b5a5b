"""attack.py: each attack by hand or against a closed form, on tiny models; the whole program."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import attack
import common
import eval as evaluation

CPU = torch.device("cpu")
CASES = [
    attack.Case("a grumpy cat", "a cat", 3),
    attack.Case("photo of a grumpy cat", "photo of a cat", 5),
]


def arguments(model, *flags):
    """The flags, filled in as attack() does."""
    argv = [
        "concept",
        "--before",
        model,
        "--after",
        model,
        "--target",
        "grumpy cat",
        "--anchor",
        "cat",
    ]
    args = attack.parse_args([str(value) for value in [*argv, *flags]])
    args.device = CPU
    return args


def sampler(model, change=0.0, resolution=None):
    """A Sampler that takes three steps; change: how far K and V are from the folder's."""
    result = evaluation.Sampler(model, CPU, resolution=resolution)
    result.steps = 3
    result.autocast = False  # bf16 would hide what is compared
    g = torch.Generator().manual_seed(1)
    for name, p in result.net.named_parameters():
        if change and ("attn2.to_k" in name or "attn2.to_v" in name):
            p.data += change * torch.randn(p.shape, generator=g)
    return result


def seeded(seed, *shape):
    """Numbers of a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- 1. inversion -------------------------------------------------------------------------------


def test_closed_form_has_no_gradient():
    """At the minimum of Eq. 1, which autograd writes down again."""
    old = [seeded(k, 5, 4) for k in range(3)]
    new = [seeded(k + 10, 5, 4) for k in range(3)]
    c, ridge = seeded(20, 7, 4), 0.3
    found = attack.closed_form(old, new, c, ridge).double().requires_grad_()
    loss = ridge * found.square().sum()
    for w, w_new in zip(old, new, strict=True):
        loss = loss + (found @ w_new.double().T - c.double() @ w.double().T).square().sum()
    (gradient,) = torch.autograd.grad(loss, found)
    assert gradient.abs().max() < 1e-4 * loss.item()


def test_closed_form_undoes_a_change_of_basis():
    """W' = W R: c' = R^-1 c gives the same keys and values, exactly."""
    old, r = [seeded(k, 6, 4) for k in range(3)], seeded(9, 4, 4)
    c = seeded(20, 7, 4)
    found = attack.closed_form(old, [w @ r for w in old], c, 1e-9)
    torch.testing.assert_close(found @ r.T, c, rtol=1e-4, atol=1e-4)


def test_matrix_is_what_the_layer_does():
    """Without its bias; a LoRA counts; the first columns alone, where the rest takes no text."""
    layer = torch.nn.Linear(5, 3)
    torch.testing.assert_close(attack.matrix(layer, 5), layer.weight.detach())
    torch.testing.assert_close(attack.matrix(layer, 2), layer.weight.detach()[:, :2])


def test_matrix_has_the_lora(tiny):
    attacked = sampler(tiny)
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    before = attack.matrix(attacked.net.get_submodule(name), 32)
    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_k"])
    attacked.net.add_adapter(config)
    layer = attacked.net.get_submodule(name)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (b @ a).abs().max() > 1e-3
    torch.testing.assert_close(attack.matrix(layer, 32), before + b @ a)


@pytest.mark.parametrize("family", ["tiny", "tiny_sdxl", "tiny_sd3"])
def test_inversion_of_an_unchanged_model_changes_nothing(family, request, monkeypatch):
    """With next to no ridge, keys and values of c' are those of the prompt."""
    model = request.getfixturevalue(family)
    original, found = sampler(model), []
    monkeypatch.setattr(attack, "RIDGES", (1e-7,))
    monkeypatch.setattr(attack, "generate", lambda s, e, *rest: found.extend(e) or torch.zeros(1))
    attack.inversion(original, sampler(model), CASES, arguments(model))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, *original.backbone.latent_shape(original.size), generator=g)
    for case, parts in zip(CASES, found, strict=True):
        known = original.encode([case.prompt])[case.prompt]
        assert parts.keys() == known.keys()
        predictions = [
            original.backbone.predict(x, torch.tensor([500]), attack.conditions(original, [p]))
            for p in (parts, known)
        ]
        torch.testing.assert_close(*predictions, rtol=1e-3, atol=1e-4)


def test_inversion_finds_the_prompt_behind_a_change_of_basis(tiny, monkeypatch):
    """K and V of the attacked model are W R: its images from c' are those of the original."""
    original, attacked = sampler(tiny), sampler(tiny)
    r = torch.eye(32) + 0.3 * seeded(0, 32, 32)
    for name, p in attacked.net.named_parameters():
        if "attn2.to_k" in name or "attn2.to_v" in name:
            p.data = p.data @ r
    monkeypatch.setattr(attack, "RIDGES", (1e-8,))
    prompts, seeds = [c.prompt for c in CASES], [c.seed for c in CASES]
    # The empty prompt, too, sees other keys and values: no guidance
    for s in (original, attacked):
        s.guidance = 1.0
    expected = original.sample(prompts, seeds, "")
    unattacked = attacked.sample(prompts, seeds, "")
    (images,) = attack.inversion(original, attacked, CASES, arguments(tiny))
    error = (images.float() - expected.float()).abs().max()
    assert error <= 2 < (unattacked.float() - expected.float()).abs().max()


# ---- 2. direction and completion ----------------------------------------------------------------


def test_direction_by_hand(tiny, monkeypatch):
    """T(p) + eta (T(p) - T(a)), a try for each eta."""
    attacked, found = sampler(tiny), []
    monkeypatch.setattr(attack, "generate", lambda s, e, *rest: found.append(e) or torch.zeros(1))
    assert len(attack.direction(None, attacked, CASES, arguments(tiny))) == len(attack.ETAS)
    for eta, embeddings in zip(attack.ETAS, found, strict=True):
        for case, parts in zip(CASES, embeddings, strict=True):
            p, a = (attacked.pipe.encode_prompt(t, CPU, 1, False)[0] for t in case[:2])
            torch.testing.assert_close(parts["prompt_embeds"], p + eta * (p - a))


def test_a_lora_that_looks_at_the_prompt_sees_that_of_the_case(tiny):
    """The embeddings are another's, and the strength that of the prompt which is attacked."""
    attacked, seen = sampler(tiny), []
    known = attacked.encode([case.anchor_prompt for case in CASES])
    attacked.strength = strength = lambda prompt: seen.append(prompt) or 1.0
    embeddings = [known[case.anchor_prompt] for case in CASES]
    images = attack.generate(attacked, embeddings, CASES, "")
    assert seen == [case.prompt for case in CASES] and attacked.strength is strength
    attacked.strength = None
    assert images.equal(attacked.sample([case.anchor_prompt for case in CASES], [3, 5], ""))


def test_completion_by_hand(tiny, monkeypatch):
    """By diffusers' DDIM: the first k predictions are the original's, the others the attacked's."""
    original, attacked = sampler(tiny), sampler(tiny, change=0.5)
    monkeypatch.setattr(attack, "COMPLETION_STEPS", 4)
    tries = attack.completion(original, attacked, CASES, arguments(tiny))
    assert tries.shape == (3, 2, 3, 64, 64)
    for k, images in zip(attack.SWITCHES, tries, strict=True):
        for case, image in zip(CASES, images, strict=True):
            config = original.pipe.scheduler.config
            ddim = DDIMScheduler.from_config(config, clip_sample=False, set_alpha_to_one=True)
            ddim.set_timesteps(4)
            rows, null = (original.pipe.encode_prompt(t, CPU, 1, False)[0] for t in (case[0], ""))
            x = seeded(case.seed, 4, 16, 16)[None]
            with torch.no_grad():
                for j, t in enumerate(ddim.timesteps):
                    net = (original if j < k else attacked).net
                    e, e_null = net(x, t, rows).sample, net(x, t, null).sample
                    x = ddim.step(e_null + 6.0 * (e - e_null), t, x).prev_sample
                z = x / original.pipe.vae.config.scaling_factor
                pixels = original.pipe.vae.decode(z).sample[0].clamp(-1, 1)
            assert (evaluation.to_uint8(pixels).int() - image.int()).abs().max() <= 2


# ---- 3. token and relearning --------------------------------------------------------------------


def test_learned_word_stands_where_the_word_stood(tiny):
    """Two tokens of a word, twice in a text: the encoder sees the rows there, and no others."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    word = attack.LearnedWord(pipe, "grumpy cat")
    (ids,), (rows,) = word.ids, word.rows
    table = pipe.text_encoder.get_input_embeddings()
    torch.testing.assert_close(rows, table.weight[ids])  # it begins as the word itself
    text = "a grumpy cat, no cat, and a grumpy cat"
    tokens = pipe.tokenizer(text, return_tensors="pt").input_ids
    expected = table(tokens).detach()
    with torch.no_grad():
        rows += torch.arange(rows.numel()).view_as(rows)
    k, starts = len(ids), []
    for i in range(tokens.shape[1] - k + 1):
        if tokens[0, i : i + k].equal(ids):
            starts.append(i)
            expected[0, i : i + k] = rows
    assert len(starts) == 2
    with word:
        got = table(tokens)
    torch.testing.assert_close(got, expected)
    assert not table(tokens).equal(got)  # afterwards the table is as it was
    got.sum().backward()
    assert rows.grad.eq(2).all() and table.weight.grad is None


def recorded(run):
    """(what run() returns, [[(weight, gradient, weight after)] of each step of an optimizer])."""
    steps = []

    def before(optimizer, args, kwargs):
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        steps.append([[p.detach().clone(), p.grad.clone()] for p in weights])

    def after(optimizer, args, kwargs):
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        for p, row in zip(weights, steps[-1], strict=True):
            row.append(p.detach().clone())

    hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    try:
        return run(), steps
    finally:
        for hook in hooks:
            hook.remove()


def adam(p, g, lr, decay=0.0):
    """A weight after the first step of AdamW: both averages are of one gradient."""
    return (1 - lr * decay) * p - lr * g / (g.abs() + 1e-8)


def latents(original, images):
    """By the VAE itself."""
    vae = original.pipe.vae
    with torch.no_grad():
        z = vae.encode(images / 127.5 - 1).latent_dist.mode()
    return z * vae.config.scaling_factor


def first_batch(n):
    """(rows, timesteps, noise) of the first step of two images, of n, as they are sampled."""
    g = torch.Generator().manual_seed(960_000)
    idx = torch.randint(n, (2,), generator=g).tolist()
    t = (1000 * torch.rand(2, generator=g)).long()
    return idx, t, torch.randn(2, 4, 16, 16, generator=g)


def noisy(original, x0, t, noise):
    """x_t by diffusers' own scheduler."""
    scheduler = DDIMScheduler.from_config(original.pipe.scheduler.config)
    return scheduler.add_noise(x0, noise, t)


def test_token_by_hand(tiny):
    """The first gradient of V is that of the anchor's row in the table, on noisy target images."""
    original, attacked = sampler(tiny), sampler(tiny, change=0.5)
    weights = common.fingerprint(attacked.net), common.fingerprint(attacked.pipe.text_encoder)
    args = arguments(tiny, "--token-steps", "2", "--batch-size", "2", "--token-lr", "0.1")
    run = lambda: attack.token(original, attacked, CASES, args)  # noqa: E731
    tries, steps = recorded(run)
    assert tries.shape == (1, 2, 3, 64, 64)
    assert weights == (
        common.fingerprint(attacked.net),
        common.fingerprint(attacked.pipe.text_encoder),
    )
    idx, t, noise = first_batch(2)
    x0 = latents(original, original.sample([c.prompt for c in CASES], [3, 5], ""))[idx]
    encoder = attacked.pipe.text_encoder.requires_grad_(True)
    how = {"padding": "max_length", "max_length": 77, "return_tensors": "pt"}
    texts = [CASES[i].anchor_prompt for i in idx]
    rows = encoder(attacked.pipe.tokenizer(texts, **how).input_ids).last_hidden_state
    prediction = attacked.net(noisy(original, x0, t, noise), t, rows).sample
    F.mse_loss(prediction, noise).backward()
    (word,) = attacked.pipe.tokenizer("cat", add_special_tokens=False).input_ids
    expected = encoder.get_input_embeddings().weight.grad[word]
    ((row, got, after),) = steps[0]
    torch.testing.assert_close(row[0], encoder.get_input_embeddings().weight[word].detach())
    torch.testing.assert_close(got[0], expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(after, adam(row, got, 0.1, 0.01))
    assert len(steps) == 2
    # The learned word is what the images come from: as long as it is the anchor's, they are, too
    plain = attacked.sample([c.anchor_prompt for c in CASES], [3, 5], "")
    assert not tries[0].equal(plain)
    args.token_lr = 0.0
    assert attack.token(original, attacked, CASES, args)[0].equal(plain)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_denoising_loss_by_diffusers(kind):
    """Of a network that predicts x_t: by the scheduler's own noise and velocity."""
    scheduler = DDIMScheduler()
    shift, alpha_bar = (3.0, None) if kind == "flow" else (None, scheduler.alphas_cumprod)
    backbone = SimpleNamespace(prediction_type=kind, shift=shift, alpha_bar=alpha_bar)
    backbone.predict = lambda xt, t, condition: xt
    x0 = seeded(0, 2, 4, 8, 8)
    loss = attack.denoising_loss(backbone, x0, {}, torch.Generator().manual_seed(7))
    g = torch.Generator().manual_seed(7)
    u = torch.rand(2, generator=g)
    noise = torch.randn(x0.shape, generator=g)
    if kind == "flow":
        s = torch.distributions.Normal(0, 1).icdf(u).sigmoid()
        s = (3 * s / (1 + 2 * s)).view(-1, 1, 1, 1)
        xt, target = (1 - s) * x0 + s * noise, noise - x0
    else:
        t = (1000 * u).long()
        xt, target = scheduler.add_noise(x0, noise, t), noise
        if kind == "v_prediction":
            target = scheduler.get_velocity(x0, noise, t)
    torch.testing.assert_close(loss, F.mse_loss(xt, target), rtol=1e-4, atol=1e-5)


def test_relearning_by_hand(tiny, monkeypatch):
    """The first gradient is that of the usual loss on other images; the weights come back."""
    original, attacked = sampler(tiny), sampler(tiny, change=0.5)
    saved = common.fingerprint(attacked.net)
    others = ["a cat", "dog"]
    monkeypatch.setattr(attack, "other_prompts", lambda args, embedded: others)
    flags = ["--relearning-steps", "4", "--batch-size", "2", "--relearning-lr", "0.01"]
    args = arguments(tiny, *flags)
    run = lambda: attack.relearning(original, attacked, CASES, args)  # noqa: E731
    tries, steps = recorded(run)
    assert tries.shape == (4, 2, 3, 64, 64) and len(steps) == 4
    assert not tries[0].equal(tries[3])
    assert common.fingerprint(attacked.net) == saved
    idx, t, noise = first_batch(2)
    images = original.sample(others, [970_000, 970_001], "")
    x0 = latents(original, images)[idx]
    rows = torch.cat([attacked.pipe.encode_prompt(others[i], CPU, 1, False)[0] for i in idx])
    attacked.net.requires_grad_(True).zero_grad()
    prediction = attacked.net(noisy(original, x0, t, noise), t, rows.detach()).sample
    F.mse_loss(prediction, noise).backward()
    for (weight, got, after), p in zip(steps[0], attacked.net.parameters(), strict=True):
        assert weight.equal(p)
        torch.testing.assert_close(got, p.grad, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(after, adam(weight, got, 0.01), rtol=1e-4, atol=1e-5)


# ---- 4. the protocol ----------------------------------------------------------------------------


def test_without_an_attack_each_try_has_other_noise(tiny):
    """The first has the case's own seed; there are as many as any attack has."""
    attacked = sampler(tiny)
    tries = attack.no_attack(None, attacked, CASES, arguments(tiny))
    assert len(tries) == max(map(len, (attack.RIDGES, attack.ETAS, attack.SWITCHES))) == 3
    assert tries[0].equal(attacked.sample([case.prompt for case in CASES], [3, 5], ""))
    assert len({common.fingerprint(x) for images in tries for x in images}) == 6


def test_a_success_is_one_of_the_tries_or_the_prompt_itself():
    none = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0]]).bool()
    hits = torch.tensor([[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    assert attack.success(hits, none, "inversion") == 75
    assert attack.success(hits, none, "relearning") == 25
    expected = {"ASR": 75.0, "no_attack": 50.0, "by_try": [25.0, 25.0, 0.0]}
    assert attack.figures(hits, none, "inversion") == expected
    assert attack.figures(hits, none, "relearning")["no_attack"] == 25


def test_the_classifier_asks_for_the_target_alone():
    class Clip:
        """Images and texts with embeddings by hand."""

        def texts(self, texts):
            assert texts == ["target", "synonym", "b", "c"]
            return torch.tensor([[2.0, 0, 0, 0], [0, 3, 0, 0], [0, 0, 1, 0], [0, 0, 0, 9]])

        def __call__(self, images):
            return images

    classify = attack.Classifier(Clip(), ["target", "synonym"], ["b", "c"])
    rows = [[1.0, 0, 0.9, 0.9], [0, 1.0, 0.9, 0], [1.0, 0, 1.1, 0], [0, 0, 0, 0.1]]
    assert classify(torch.tensor(rows)).tolist() == [True, True, False, False]


def test_names_of_classes():
    """An embedded model's concepts but the target itself, by whatever name; else what is known."""
    args = arguments("emoji/sd", "--unrelated", "dog")
    names, others = attack.names_of_classes(args, embedded=False)
    assert names == ["grumpy cat"]
    assert others == ["cat", "dog", "random noise", "a blank image"]
    names, others = attack.names_of_classes(args, embedded=True)
    assert names == ["grumpy cat", "pouting cat", "angry cat"]
    assert len(others) == len(set(others)) == 236 and "pizza" in others


def test_a_random_network_is_of_no_other_shape(tiny):
    args = arguments(tiny, "--seed", "1")  # the folder's own weights are of seed 0
    original, random = (attack.load_model(args, name) for name in ("original", "random"))
    pairs = list(zip(original.net.parameters(), random.net.parameters(), strict=True))
    assert all(p.shape == q.shape for p, q in pairs)
    assert not any(p.equal(q) for p, q in pairs if p.dim() > 1)


BAD = [
    (["--num-images", "0"], "--num-images 0: expected at least 1"),
    (["--relearning-steps", "3"], "--relearning-steps 3: expected at least 4"),
    (["--after", "no/such"], "--after no/such: no such folder"),
]


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_bad_flags_are_one_line(flags, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        attack.attack(arguments("emoji/sd", "--out", tmp_path, *flags))


def test_a_ddpm_takes_no_prompt(tiny_ddpm, tmp_path):
    with pytest.raises(SystemExit, match="is a DDPM, which takes no prompt"):
        attack.attack(arguments(tiny_ddpm, "--out", tmp_path))


def test_a_model_must_generate_the_target_before(tiny, tmp_path):
    flags = ["--clip", common.REPO / "emoji/clip", "--num-images", "1", "--out", tmp_path]
    with pytest.raises(SystemExit, match="generates it from 0 of 4 prompts and seeds; expected at"):
        attack.attack(arguments(tiny, *flags))


@pytest.mark.slow
def test_uce_is_undone_by_inversion(tmp_path, monkeypatch):
    """On emoji/sd: the controls hold, K and V that were edited are inverted, and it resumes."""
    from baselines import uce

    run = tmp_path / "run"
    flags = ["--target", "Grumpy Cat", "--anchor", "Cat", "--lamb", "0.1"]
    uce.unlearn(uce.parse_args([*flags, "--out", str(run)]))
    argv = ["concept", "--before", "emoji/sd", "--after", run, *flags[:4], "--num-images", "4"]
    argv = [str(value) for value in [*argv, "--attacks", "inversion"]]
    models = attack.attack(attack.parse_args(argv))["models"]
    assert json.loads((run / "attack.json").read_text())["models"] == models
    assert (run / "attack.png").is_file() and "| inversion |" in (run / "attack.md").read_text()
    assert models["original"]["none"]["ASR"] == models["original"]["inversion"]["ASR"] == 100
    assert models["random"]["none"]["ASR"] == models["random"]["inversion"]["ASR"] == 0
    assert models["unlearned"]["none"]["by_try"][0] <= 50
    assert models["unlearned"]["inversion"]["ASR"] >= 75
    args = attack.parse_args(argv)
    monkeypatch.setattr(attack, "ATTACKS", {})  # nothing is computed again
    assert attack.attack(args)["models"] == models


@pytest.mark.parametrize("family", ["tiny_sdxl", "tiny_sd3", "tiny_flux"])
def test_every_attack_runs_on_every_family(family, request, monkeypatch):
    """On an unchanged model: images of the right shape, and completion is plain sampling."""
    model = request.getfixturevalue(family)
    original, attacked = sampler(model, resolution=16), sampler(model, resolution=16)
    monkeypatch.setattr(attack, "other_prompts", lambda args, embedded: ["a cat", "dog"])
    monkeypatch.setattr(attack, "COMPLETION_STEPS", 4)
    flags = ["--token-steps", "2", "--relearning-steps", "4", "--relearning-lr", "1e-3"]
    args = arguments(model, "--batch-size", "2", *flags)
    for kind, run in attack.ATTACKS.items():
        tries = run(original, attacked, CASES, args)
        assert tries.shape[1:] == (2, 3, original.size, original.size), kind
        assert tries.dtype == torch.uint8 and len(tries) == {"token": 1}.get(kind, len(tries))
    backbone, known = original.backbone, original.encode([case.prompt for case in CASES])
    condition = attack.conditions(original, [known[case.prompt] for case in CASES])
    null = attack.conditions(original, [known[""]] * 2)
    shape = backbone.latent_shape(original.size)
    x = torch.stack([seeded(case.seed, *shape) for case in CASES])
    times = backbone.timesteps(attack.COMPLETION_STEPS)
    z = backbone.sample(x, times, condition, null, original.guidance)
    expected = evaluation.to_uint8(backbone.decode(z).clamp(-1, 1))
    for images in attack.completion(original, attacked, CASES, args):
        assert (images.int() - expected.int()).abs().max() <= 1


def test_a_retrained_model_that_is_not_there_is_one_line(tiny, tmp_path):
    args = arguments(tiny, "--retrained", tmp_path)
    with pytest.raises(SystemExit, match=f"--retrained {tmp_path}: no model_index.json there"):
        attack.load_model(args, "retrained")


def test_another_text_encoder_is_another_model(tiny):
    """Images of the one are not taken for the other's."""
    one, other = sampler(tiny), sampler(tiny)
    assert attack.weights_of(one) == attack.weights_of(other)
    next(other.pipe.text_encoder.parameters()).data += 1
    assert attack.weights_of(one) != attack.weights_of(other)


def test_a_run_folder_is_what_is_attacked(tiny, tmp_path):
    """The weights of --after, and not those of --before."""
    original = evaluation.Sampler(tiny, CPU)
    state = original.net.state_dict()
    name = next(n for n in state if "attn2.to_k" in n)
    save_file({name: state[name] + 1}, tmp_path / "delta.safetensors")
    args = arguments(tiny, "--after", tmp_path)
    attacked = attack.load_model(args, "unlearned")
    assert load_file(tmp_path / "delta.safetensors")[name].equal(attacked.net.state_dict()[name])
