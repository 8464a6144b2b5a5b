"""The baselines' training loops: their first steps by hand, and that a changed line is noticed.

Each case runs a baseline on a tiny model and records what it hands to its optimizer. The same
gradients are then computed from the equations in the baseline's docstring, sample by sample, on a
network that plain diffusers loads, at the weights it then had. The random numbers are generated
anew from their seeds. Section 5 changes the source, one piece at a time: the case must fail then.

    1. recording     how a case is run
    2. concepts      the baselines that unlearn concepts
    3. images        the baselines that unlearn images
    4. the cases
    5. a changed line is noticed
"""

import itertools
import json
import math
import shutil
import sys
import types
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import (
    AutoTokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

import baselines  # noqa: F401, what load() puts a changed copy in place of

REPO = Path(__file__).resolve().parents[1]
SEED = 3  # not 0: then the factor of the seed would not be seen


# ---- 1. recording -------------------------------------------------------------------------------


def load(name, old="", new=""):
    """The module baselines/NAME.py, anew; a piece of its source, or of __init__.py, replaced."""
    own, shared = (REPO / "baselines" / f"{stem}.py" for stem in (name, "__init__"))
    file = own if not old or old in own.read_text("utf-8") else shared
    package = execute(shared, *((old, new) if file == shared else ()))
    package.__path__ = [str(own.parent)]
    saved = sys.modules["baselines"]
    sys.modules["baselines"] = package  # what the baseline imports from
    try:
        return execute(own, *((old, new) if file == own else ()))
    finally:
        sys.modules["baselines"] = saved


def execute(file, old="", new=""):
    """The module that a file's source makes, with one piece replaced."""
    source = file.read_text(encoding="utf-8")
    if old:
        assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {file.name}"
        source = source.replace(old, new)
    module = types.ModuleType(f"{file.stem}_anew")
    module.__file__ = str(file)
    exec(compile(source, str(file), "exec"), module.__dict__)
    return module


@contextmanager
def recorded_optimizer():
    """Yields a list that gets, before each step of any optimizer, what the optimizer then has.

    kind: its class; lr, betas, weight_decay; weights and grads, lists of tensors.
    """
    seen = []

    def note(optimizer, *_):
        [group] = optimizer.param_groups
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in group["params"]]
        weights = [p.detach().clone() for p in group["params"]]
        rates = {k: group[k] for k in ("lr", "betas", "weight_decay")}
        seen.append(
            types.SimpleNamespace(
                kind=type(optimizer).__name__, weights=weights, grads=grads, **rates
            )
        )

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def agree(got, wanted):
    """Lists of tensors agree up to rounding: as a whole, and each one that is not negligible."""
    assert [g.shape for g in got] == [w.shape for w in wanted]
    total = math.sqrt(sum(w.double().square().sum().item() for w in wanted))
    away = math.sqrt(
        sum((g - w).double().square().sum().item() for g, w in zip(got, wanted, strict=True))
    )
    assert total > 0 and away < 1e-3 * total, f"{away / total:.3g} of the norm away"
    for g, w in zip(got, wanted, strict=True):
        assert (g - w).norm() < 1e-2 * w.norm() + 1e-4 * total


def grads_of(loss, params, retain_graph=False):
    grads = torch.autograd.grad(loss, params, allow_unused=True, retain_graph=retain_graph)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)]


def norm(grads):
    return torch.cat([g.flatten() for g in grads]).norm()


def clipped(grads):
    """The gradient with a norm of at most 1."""
    return [g / max(norm(grads), 1) for g in grads]


def seeded(offset):
    return torch.Generator().manual_seed(SEED * 1_000_003 + offset)


class Place:
    """The tiny models, and what is computed of them once for all cases."""

    def __init__(self, tiny, tiny_ddpm, others, photos, tmp):
        self.tmp, self.count, self.others = tmp, itertools.count(), others
        # Predictions that are many times as large make gradients whose norm exceeds 1. DDIM clips
        # x_0 to [-1, 1] by default, and the configs of these schedulers say nothing about it.
        self.sd, self.loud_sd = Text(tiny, tmp / "sd", 1), Text(tiny, tmp / "loud-sd", 40)
        self.ddpm, self.loud_ddpm = tmp / "ddpm", tmp / "loud-ddpm"
        shutil.copytree(tiny_ddpm, self.ddpm)
        louder(tiny_ddpm, self.loud_ddpm, 40)
        self.photos, self.words, self.styles = photos, tmp / "words.txt", tmp / "styles.txt"
        self.words.write_text("a cat\na photo of food\na drawing of a cat\n")
        self.styles.write_text("a painting of a cat\na red painting\n")
        # Files by the names that the flags of a case call them
        self.files = {"WORDS": self.words}
        for name, lines in RETAINED.items():
            self.files[name] = tmp / f"{name}.txt"
            self.files[name].write_text("\n".join(lines) + "\n\n")
        # To remember: the image to forget is there too, in three other formats, names and sizes.
        self.remember = tmp / "remember"
        shutil.copytree(photos, self.remember)
        image = Image.open(photos / "a.png")
        image.save(self.remember / "b-copy.jpg", quality=95, subsampling=0)
        image.save(self.remember / "c-copy.webp", lossless=True)
        image.resize((64, 64), Image.NEAREST).save(self.remember / "d-copy.png")
        self.pool = [read_image(photos / f"{n}.png") for n in ("b", "c", "d", "large")]

    @cache  # noqa: B019
    def family(self, name):
        """The tiny model of a family, by hand."""
        if name == "sd":
            return self.sd
        if name == "sd3-t5":
            return SD3WithT5(self.others["sd3"], self.others["flux"], self.tmp / name)
        by_hand = {"sdxl": XL, "sd3": SD3, "flux": Flux}[name]
        return by_hand(self.others[name], self.tmp / name)

    def run(self, module, *flags, few=None):
        """Runs a baseline; few: changes of its small preset. Returns records and run folder."""
        module.SMALL = getattr(module, "SMALL", {}) | (few or {})
        out = self.tmp / f"run-{next(self.count)}"
        with recorded_optimizer() as records:
            module.unlearn(
                module.parse_args([*map(str, flags), "--seed", str(SEED), "--out", str(out)])
            )
        return records, out


@pytest.fixture(scope="session")
def place(tiny, tiny_ddpm, tiny_sdxl, tiny_sd3, tiny_flux, photos, tmp_path_factory):
    others = {"sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
    return Place(tiny, tiny_ddpm, others, photos, tmp_path_factory.mktemp("place"))


def louder(folder, to, factor):
    """A copy of a model's folder: predictions and cross-attention are `factor` times as large."""
    shutil.copytree(folder, to)
    if factor == 1:
        return
    file = to / "unet/diffusion_pytorch_model.safetensors"
    loud = ("conv_out.weight", "conv_out.bias", "attn2.to_out.0.weight")
    save_file(
        {n: t * factor if n.endswith(loud) else t for n, t in load_file(file).items()},
        file,
        {"format": "pt"},
    )


# ---- 2. concepts --------------------------------------------------------------------------------

# The target and anchor prompts of words.txt (pizza for food, Grumpy Cat for Cat), and the target
# prompts of styles.txt (Van Gogh for painting).
TARGETS = ["a photo of pizza", "a Grumpy Cat", "a drawing of a Grumpy Cat"]
ANCHORS = ["a photo of food", "a cat", "a drawing of a cat"]
STYLED = [
    [
        "a painting of a cat, in the style of Van Gogh",
        "a cat, in the style of Van Gogh",
        "in Van Gogh's style, a painting of a cat",
    ],
    [
        "a red painting, in the style of Van Gogh",
        "a red painting, in the style of Van Gogh",
        "in Van Gogh's style, a red painting",
    ],
]


# Files for --retain-prompts. Of ANIMALS, SPEED leaves out what names a target.
MOUSE, LETTERS = ["Mickey Mouse"], list("abcdefghijk")
KEPT = ["dog", "a photo of a dog", "horse", "pizzas", "old house", "cat", "fox", "blue tree", "car"]
KEPT += ["green tea", "sun", "moon", "the sea", "bear", "a big red bus", "snow", "queen", "river"]
NAMED = ["Grumpy Cat", "a grumpy cat, asleep", "some PIZZA"]
RETAINED = {"MOUSE": MOUSE, "LETTERS": LETTERS, "ANIMALS": [*KEPT[:5], *NAMED, *KEPT[4:]]}


class Text:
    """A text-to-image model in a folder, by hand: Stable Diffusion 1."""

    pipeline, net_class, net_name = StableDiffusionPipeline, UNet2DConditionModel, "unet"
    absent = {"safety_checker": None, "requires_safety_checker": False}
    shape, pixels, guidance = (4, 16, 16), 64, 6.0
    linear = {"rows": ("attn2.to_k.weight", "attn2.to_v.weight")}  # what sees the text alone
    lam = 50  # of UCE, for small models

    def __init__(self, tiny, folder, factor=1):
        louder(tiny, folder, factor)
        scheduler = folder / "scheduler/scheduler_config.json"
        scheduler.write_text(
            json.dumps(
                {k: v for k, v in json.loads(scheduler.read_text()).items() if k != "clip_sample"}
            )
        )
        self.folder = folder
        self.alpha_bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
        self.alpha_end = self.alpha_bar[0]  # what stands for a at the end of DDIM
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.load_encoders()
        self.original = self.load()  # stays as it is

    def load_encoders(self):
        self.encoder = CLIPTextModel.from_pretrained(self.folder / "text_encoder").eval()

    def load(self):
        return self.net_class.from_pretrained(self.folder / self.net_name).eval()

    def ids(self, text):
        how = {"padding": "max_length", "max_length": 77, "truncation": True}
        return self.tokenizer(text, return_tensors="pt", **how).input_ids

    @cache  # noqa: B019
    @torch.no_grad()
    def emb(self, text):
        return self.encoder(self.ids(text)).last_hidden_state[0]

    def vectors(self, text):
        """{part of the text: [(embeddings (L, in), which is of the last word)]}"""
        return {"rows": [(self.emb(text), self.last(text))]}

    def last(self, text):
        """Of the token before the end token."""
        return max(len(self.tokenizer(text)["input_ids"]) - 2, 0)

    def predict(self, unet, x, t, text):
        emb = self.emb(text) if isinstance(text, str) else text
        return unet(x[None], t, emb[None]).sample[0]

    def scheduler(self, config, ddim):
        if ddim:
            return DDIMScheduler.from_config(config, clip_sample=False)
        return DPMSolverMultistepScheduler.from_config(config)

    @cache  # noqa: B019
    def generated(self, text, j, steps, guidance=None, ddim=False):
        """The latent that plain diffusers generates from the noise of image j."""
        pipe = self.pipeline.from_pretrained(self.folder, **self.absent)
        pipe.scheduler = self.scheduler(pipe.scheduler.config, ddim)
        pipe.set_progress_bar_config(disable=True)
        how = {"num_inference_steps": steps, "output_type": "latent"}
        how |= {"height": self.pixels, "width": self.pixels}
        how["guidance_scale"] = guidance or self.guidance
        return pipe(text, generator=seeded(j), **how).images[0]

    def path_times(self, n):
        return [1000 // n * k + 1 for k in reversed(range(n))]

    def path_step(self, x, eps, t, n):
        """One of n steps of DDIM, without a clip."""
        a, before = self.alpha_bar[t], t - 1000 // n
        before = self.alpha_bar[before] if before > 0 else self.alpha_end
        return before.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - before).sqrt() * eps

    def random_times(self, n, g):
        return torch.randint(1000, (n,), generator=g)

    def noisy(self, x, t, eps):
        return self.alpha_bar[t].sqrt() * x + (1 - self.alpha_bar[t]).sqrt() * eps

    def aim(self, x, eps):
        """What the network was trained to predict."""
        return eps

    @cache  # noqa: B019
    @torch.no_grad()
    def path(self, prompt, j, n, guidance=3.0):
        """A path of n steps: [(x_t, t, e0(x_t, ""), e0(x_t, prompt))], and its end."""
        x, points = torch.randn(self.shape, generator=seeded(j)), []
        for t in self.path_times(n):
            null, target = (self.predict(self.original, x, t, text) for text in ("", prompt))
            points.append((x, t, null, target))
            x = self.path_step(x, null + guidance * (target - null), t, n)
        return points, x

    def words(self, place, *flags):
        return [
            "--model",
            self.folder,
            "--target",
            "pizza",
            "Grumpy Cat",
            "--anchor",
            "food",
            "Cat",
            "--prompts",
            place.words,
            "--steps",
            2,
            "--batch-size",
            2,
            *flags,
        ]

    def style(self, place, *flags):
        return [
            "--model",
            self.folder,
            "--target",
            "Van Gogh",
            "--anchor",
            "painting",
            "--concept-type",
            "style",
            "--prompts",
            place.styles,
            "--steps",
            2,
            "--batch-size",
            2,
            *flags,
        ]

    def compare(self, records, trained, loss, clip, lr, kind="AdamW", weight_decay=1e-2):
        """Both steps have the gradient of loss(step, net). Returns the norms of the gradients.

        trained: a function of a weight's name, or "lora".
        """
        net, norms = self.load(), []
        if trained == "lora":
            net = Adapted(net, rank=16)
            params = dict(enumerate(net.factors))
        else:
            params = {n: p for n, p in net.named_parameters() if trained(n)}
        assert len(records) == 2 and params
        for step, record in enumerate(records):
            assert (record.kind, record.lr, record.weight_decay) == (
                kind,
                lr,
                weight_decay,
            ) and record.betas == (0.9, 0.999)
            assert [p.shape for p in params.values()] == [w.shape for w in record.weights]
            for p, w in zip(params.values(), record.weights, strict=True):
                assert step or torch.equal(p, w) or p.isnan().all()  # starts from the original
                p.data.copy_(w)
            grads = grads_of(loss(step, net), list(params.values()))
            norms.append(norm(grads).item())
            agree(record.grads, clipped(grads) if clip else grads)
        assert any(
            not torch.equal(v, w)
            for v, w in zip(records[0].weights, records[1].weights, strict=True)
        )
        return norms


class Adapted:
    """A transformer with W + B A for the weights W of all attention, by hand."""

    ENDS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")

    def __init__(self, net, rank):
        self.net, self.factors = net.requires_grad_(False), []
        layers = dict(net.named_modules())
        ends = tuple(f".attn.{end}" for end in (*self.ENDS, "to_add_out"))
        self.layers = [n for n in layers if n.endswith(ends)]
        for name in self.layers:
            out, within = layers[name].weight.shape
            # B starts at 0, A anywhere
            self.factors += [torch.full((rank, within), torch.nan), torch.zeros(out, rank)]
        for factor in self.factors:
            factor.requires_grad_()

    def __call__(self, *args, **more):
        weights, changed = dict(self.net.named_parameters()), {}
        for name, a, b in zip(self.layers, self.factors[::2], self.factors[1::2], strict=True):
            changed[f"{name}.weight"] = weights[f"{name}.weight"] + b @ a
        return torch.func.functional_call(self.net, changed, args, more)


class XL(Text):
    """Stable Diffusion XL."""

    pipeline, absent = StableDiffusionXLPipeline, {}
    shape, pixels, guidance = (4, 8, 8), 16, 5.0
    linear = Text.linear | {"pooled": ("add_embedding.linear_1.weight",)}

    def load_encoders(self):
        self.alpha_end = torch.tensor(1.0)  # its configuration does not say otherwise
        self.encoder = CLIPTextModel.from_pretrained(self.folder / "text_encoder").eval()
        with_pooled = CLIPTextModelWithProjection.from_pretrained
        self.encoder_2 = with_pooled(self.folder / "text_encoder_2").eval()

    @cache  # noqa: B019
    @torch.no_grad()
    def both(self, text):
        """Both encoders' last layer but one, side by side (77, 32), and the second's pooled."""
        one, two = (
            e(self.ids(text), output_hidden_states=True) for e in (self.encoder, self.encoder_2)
        )
        rows = torch.cat([one.hidden_states[-2][0], two.hidden_states[-2][0]], 1)
        pooled = two.text_embeds[0]
        return (rows, pooled) if text else (0 * rows, 0 * pooled)

    def emb(self, text):
        return self.both(text)[0]

    def vectors(self, text):
        return super().vectors(text) | {"pooled": [(self.both(text)[1][None], 0)]}

    def predict(self, unet, x, t, text):
        rows, pooled = self.both(text)
        sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]])
        added = {"text_embeds": pooled[None], "time_ids": sizes}
        return unet(x[None], t, rows[None], added_cond_kwargs=added).sample[0]


class SD3(Text):
    """Stable Diffusion 3 without T5: velocities, in times shifted by 3."""

    pipeline, net_class, net_name = StableDiffusion3Pipeline, SD3Transformer2DModel, "transformer"
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    shape, pixels, guidance = (4, 8, 8), 16, 4.0
    linear = {"rows": ("context_embedder.weight",), "pooled": ("text_embedder.linear_1.weight",)}

    def load_encoders(self):
        folders = (self.folder / "text_encoder", self.folder / "text_encoder_2")
        self.encoders = [CLIPTextModelWithProjection.from_pretrained(f).eval() for f in folders]

    @cache  # noqa: B019
    @torch.no_grad()
    def encoded(self, text):
        """Rows of CLIP (77, 32) and of T5 (256, 32), here zeros; and the pooled (32,)."""
        both = [e(self.ids(text), output_hidden_states=True) for e in self.encoders]
        rows = torch.cat([output.hidden_states[-2][0] for output in both], 1)
        return rows, torch.zeros(256, 32), torch.cat([output.text_embeds[0] for output in both])

    def vectors(self, text):
        rows, _, pooled = self.encoded(text)
        return {"rows": [(rows, self.last(text))], "pooled": [(pooled[None], 0)]}

    def predict(self, net, x, t, text):
        clip, t5, pooled = self.encoded(text)
        rows = torch.cat([clip, t5])
        return net(x[None], rows[None], pooled[None], torch.as_tensor(t).view(1)).sample[0]

    def scheduler(self, config, ddim):
        return StableDiffusion3Pipeline.from_pretrained(self.folder, **self.absent).scheduler

    def shifted(self, s):
        return 3 * s / (1 + 2 * s)

    def path_times(self, n):
        s = torch.linspace(1, self.shifted(1 / 1000), n)  # the scheduler shifts its end twice
        return list(1000 * self.shifted(s))

    def path_step(self, x, velocity, t, n):
        """One of n steps of Euler's method."""
        times = [t.item() for t in self.path_times(n)] + [0.0]
        after = times[times.index(t.item()) + 1]
        return x + (after - t) / 1000 * velocity

    def random_times(self, n, g):
        normal = torch.distributions.Normal(0, 1).icdf(torch.rand(n, generator=g))
        return (1000 * self.shifted(torch.sigmoid(normal))).clamp(min=1)

    def noisy(self, x, t, eps):
        return (1 - t / 1000) * x + t / 1000 * eps

    def aim(self, x, eps):
        return eps - x


class SD3WithT5(SD3):
    """With T5's tokens, which the tokenizer of FLUX spells."""

    def __init__(self, tiny, tiny_flux, folder):
        small = {"d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        spelling = AutoTokenizer.from_pretrained(tiny_flux / "tokenizer_2")
        torch.manual_seed(0)
        t5 = T5EncoderModel(T5Config(**small, vocab_size=len(spelling))).bfloat16()
        parts = {"text_encoder_3": t5, "tokenizer_3": spelling}
        before = folder.with_name("sd3-t5-parts")
        StableDiffusion3Pipeline.from_pretrained(tiny, **parts).save_pretrained(before)
        super().__init__(before, folder)

    def load_encoders(self):
        super().load_encoders()
        self.spelling = AutoTokenizer.from_pretrained(self.folder / "tokenizer_3")
        load = T5EncoderModel.from_pretrained
        self.t5 = load(self.folder / "text_encoder_3", dtype=torch.bfloat16).eval()

    def vectors(self, text):
        spelled = t5_rows(self.spelling, self.t5, text, 256)
        both = super().vectors(text)
        return both | {"rows": [*both["rows"], spelled]}


class Flux(Text):
    """FLUX.1, of which only the text is done by hand."""

    net_class, net_name = FluxTransformer2DModel, "transformer"
    linear, lam = SD3.linear, 0.5  # its config has no size: it counts as a large model

    def load_encoders(self):
        super().load_encoders()
        self.spelling = AutoTokenizer.from_pretrained(self.folder / "tokenizer_2")
        load = T5EncoderModel.from_pretrained
        self.t5 = load(self.folder / "text_encoder_2", dtype=torch.bfloat16).eval()

    @torch.no_grad()
    def vectors(self, text):
        pooled = self.encoder(self.ids(text)).pooler_output
        return {"rows": [t5_rows(self.spelling, self.t5, text, 512)], "pooled": [(pooled, 0)]}


@torch.no_grad()
def t5_rows(tokenizer, t5, text, length):
    """T5's embeddings (length, D), and which is of the last token before the end token."""
    ids = tokenizer(text)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    padded = [*ids, *[tokenizer.pad_token_id] * (length - len(ids))]
    return t5(torch.tensor([padded])).last_hidden_state[0].float(), max(len(ids) - 2, 0)


def esd_u(name):
    return "attn2." not in name and not name.startswith(
        ("conv_out.", "conv_norm_out.", "time_embedding.")
    )


def check_esd(module, place, style=False, family="sd"):
    """18 paths are sampled in two parts, 16 and 2. points: by part, timestep, path."""
    sd, n, walked = place.family(family), 3, []
    sample_path = module.sample_path

    def spy(*args):
        walked.append(points := list(sample_path(*args)))
        return points

    module.sample_path = spy
    flags = sd.style(place) if style else sd.words(place, "--eta", 1.5)
    lora = sd.net_name == "transformer"  # its default
    if not style and not lora:
        flags += ["--train-method", "noxattn"]
    records, out = place.run(module, *flags, "--lr", 1e-3, few={"paths": 18, "sampling_steps": n})
    prompts, eta = (sum(STYLED, []), 1.0) if style else (TARGETS, 1.5)
    order = [(j, k) for part in (range(16), range(16, 18)) for k in range(n) for j in part]
    path = lambda j: sd.path(prompts[j % len(prompts)], j, n)  # noqa: E731

    def loss(step, net):
        total = 0
        for p in torch.randint(len(order), (2,), generator=seeded(500_000 + step)).tolist():
            j, k = order[p]
            x, t, null, target = path(j)[0][k]
            y = null - eta * (target - null)
            total += (y - sd.predict(net, x, t, prompts[j % len(prompts)])).square().mean() / 2
        return total

    trained = "lora" if lora else (lambda name: "attn2." in name) if style else esd_u
    sd.compare(records, trained, loss, clip=False, lr=1e-3, kind="Adam", weight_decay=0)
    if not lora:
        assert load_file(out / "delta.safetensors").keys() == {
            n for n, _ in sd.original.named_parameters() if trained(n)
        }

    for j in (0, 1, 17):  # every point of these paths, and their ends
        for (x, t, null, target), (x_0, t_0, null_0, target_0) in zip(
            walked[j // 16], path(j)[0], strict=True
        ):
            agree([x[j % 16], null[j % 16], target[j % 16]], [x_0, null_0, target_0])
            assert math.isclose(t, t_0, rel_tol=1e-5)
        end = path(j)[1]
        assert j == 1 or style or family != "sd" or end.abs().max() > 1.5  # it would be clipped
        agree([end], [sd.generated(prompts[j % len(prompts)], j, n, guidance=3.0, ddim=True)])


def check_conabl(module, place, style=False, family="sd"):
    """Words: small gradients, --retain l2. Style: gradients to be clipped, three target prompts."""
    sd = place.loud_sd if style else place.family(family)
    flags = sd.style(place) if style else sd.words(place, "--retain", "l2")
    records, _ = place.run(module, *flags, "--lr", 1e-3, few={"sampling_steps": 3})
    anchors, targets = (
        (["a painting of a cat", "a red painting"], STYLED)
        if style
        else (ANCHORS, [[t] for t in TARGETS])
    )
    latent = [sd.generated(anchors[j % len(anchors)], j, 3) for j in range(4)]

    def loss(step, net):
        g, total = seeded(step), 0
        i, i_r = torch.randint(4, (2, 2), generator=g)
        t, t_r = sd.random_times(2, g), sd.random_times(2, g)
        eps, eps_r = torch.randn(2, 2, *sd.shape, generator=g)
        for k in range(2):
            x, entry = sd.noisy(latent[i[k]], t[k], eps[k]), i[k] % len(anchors)
            with torch.no_grad():
                anchor = sd.predict(net, x, t[k], anchors[entry])
            variants = targets[entry]
            total += (
                anchor - sd.predict(net, x, t[k], variants[step % len(variants)])
            ).square().mean() / 2
            if not style:
                x, entry = sd.noisy(latent[i_r[k]], t_r[k], eps_r[k]), i_r[k] % len(anchors)
                aim = sd.aim(latent[i_r[k]], eps_r[k])
                total += (aim - sd.predict(net, x, t_r[k], anchors[entry])).square().mean() / 2
        return total

    trained = lambda n: "attn2.to_k." in n or "attn2.to_v." in n  # noqa: E731
    if sd.net_name == "transformer":
        trained = "lora"  # its default
    norms = sd.compare(records, trained, loss, clip=True, lr=1e-3)
    if family == "sd":
        assert min(norms) > 1 if style else max(norms) < 1


def check_spm(module, place):
    """The adapter by hand: W + B A in the plain UNet. Rank 2, so that a wrong scale would show."""
    sd, n, rank = place.sd, 4, 2
    records, _ = place.run(
        module,
        *sd.words(place, "--eta", 1.5, "--rank", rank, "--lr", 0.3),
        few={"sampling_steps": n},
    )
    unet = sd.load().requires_grad_(False)
    layers = [
        name
        for name, m in unet.named_modules()
        if ".attentions." in f".{name}" and isinstance(m, torch.nn.Linear | torch.nn.Conv2d)
    ]
    weights, times = dict(unet.named_parameters()), sd.path_times(n)
    assert len(records) == 2
    for step, record in enumerate(records):
        assert (record.kind, record.lr, record.weight_decay, record.betas) == (
            "AdamW",
            0.3,
            1e-2,
            (0.9, 0.999),
        )
        factors = [w.clone().requires_grad_() for w in record.weights]
        assert len(factors) == 2 * len(layers) and any(b.any() for b in factors[1::2]) == (
            step > 0
        )  # the second starts at 0

        def changed(factors):
            pairs = zip(layers, factors[::2], factors[1::2], strict=True)
            return {
                f"{layer}.weight": weights[f"{layer}.weight"]
                + (b.flatten(1) @ a.flatten(1)).view_as(weights[f"{layer}.weight"])
                for layer, a, b in pairs
            }

        def predict(x, t, text, tensors):
            emb = sd.emb(text) if isinstance(text, str) else text
            return torch.func.functional_call(unet, tensors, (x[None], t, emb[None])).sample[0]

        adapted, g = changed(factors), seeded(step)
        texts = [TARGETS[k] for k in torch.randint(3, (2,), generator=g)]
        x = torch.randn(2, 4, 16, 16, generator=g)
        s = torch.randint(1, n, (), generator=g).item()
        target, anchors = sd.emb(texts[0]), []
        while len(anchors) < 4:
            a = torch.randn(77 * 32, generator=g)
            if torch.rand((), generator=g) < 1 - torch.cosine_similarity(
                a, target.flatten(), dim=0
            ):
                anchors.append(
                    (a / a.norm()).view(77, 32)
                    * target.norm()
                    * (0.8 + 0.4 * torch.rand((), generator=g))
                )
        erase = anchoring = 0
        for k in range(2):
            x_t = x[k]
            with torch.no_grad():
                for t in times[:s]:  # with the adapter
                    null, target = (predict(x_t, t, text, adapted) for text in ("", texts[k]))
                    x_t = sd.path_step(x_t, null + 3.0 * (target - null), t, n)
                t = times[s]
                null, target = (predict(x_t, t, text, {}) for text in ("", texts[k]))  # without
                fixed = [predict(x_t, t, a, {}) for a in anchors[k::2]]
            erase += (
                null - 1.5 * (target - null) - predict(x_t, t, texts[k], adapted)
            ).square().mean() / 2
            for a, before in zip(anchors[k::2], fixed, strict=True):
                anchoring += (before - predict(x_t, t, a, adapted)).square().mean() / 4
        agree(record.grads, grads_of(erase + 1000 * anchoring, factors))
    assert norm(records[1].grads) > 1  # and yet it is not clipped


UCE = {
    "names": (
        [
            "--target",
            "pizza",
            "Grumpy Cat",
            "--anchor",
            "Italian food",
            "Cat",
            "--retain-prompts",
            "MOUSE",
        ],
        [("pizza", "Italian food"), ("Grumpy Cat", "Cat")],
        ["", "Italian food", "Cat", "Mickey Mouse"],
        {},
    ),
    "scales": (
        [
            "--target",
            "Grumpy Cat",
            "--anchor",
            "Cat",
            "--erase-scale",
            "0.7",
            "--preserve-scale",
            "0.3",
            "--lamb",
            "2",
        ],
        [("Grumpy Cat", "Cat")],
        ["", "Cat"],
        {"a": 0.7, "b": 0.3, "lam": 2},
    ),
    "floor": (
        ["--target", "Grumpy Cat", "--anchor", "Cat", "--retain-prompts", "LETTERS"],
        [("Grumpy Cat", "Cat")],
        ["", "Cat", *"abcdefghijk"],
        {"b": 0.1},
    ),
    "prompts": (
        ["--target", "pizza", "Grumpy Cat", "--anchor", "food", "Cat", "--prompts", "WORDS"],
        list(zip(TARGETS, ANCHORS, strict=True)),
        ["", *ANCHORS],
        {},
    ),
    "templates": (
        ["--target", "pizza", "--anchor", "food", "--templates"],
        [
            (t.format("pizza"), t.format("food"))
            for t in (
                "{}",
                "a {}",
                "a photo of {}",
                "a photo of a {}",
                "a picture of a {}",
                "a drawing of a {}",
                "an image of {}",
                "the {}",
                "a cute {}",
                "{} on a white background",
            )
        ],
        None,
        {"b": 0.1},
    ),
    "last": (
        ["--target", "Grumpy Cat", "--anchor", "Cat", "--last-word"],
        [("Grumpy Cat", "Cat")],
        ["", "Cat"],
        {},
    ),
    "large": (
        ["--target", "Grumpy Cat", "--anchor", "Cat"],
        [("Grumpy Cat", "Cat")],
        ["", "Cat"],
        {"lam": 0.5},
    ),
    "style": (
        ["--target", "Van Gogh", "--anchor", "painting", "--concept-type", "style"],
        [("Van Gogh", "painting")],
        ["", "painting"],
        {},
    ),
}


def check_uce(module, place, case, family="sd"):
    """W by least squares: rows of erased, preserved and unit vectors, by the roots of weights."""
    sd, (flags, pairs, preserved, scales) = place.family(family), UCE[case]
    flags = [str(place.files.get(f, f)) for f in flags]
    records, out = place.run(
        module, "--model", large_sd(place) if case == "large" else sd.folder, *flags
    )
    preserved = preserved or ["", *(guide for _, guide in pairs)]
    a, b, lam = (
        scales.get(k, d)
        for k, d in (("a", 1), ("b", max(0.1, 1 / len(preserved))), ("lam", sd.lam))
    )
    edited = load_file(out / "delta.safetensors")
    original = dict(sd.original.named_parameters())
    names = [n for n in original if n.endswith(sum(sd.linear.values(), ()))]
    assert records == [] and sorted(edited) == sorted(names) != []
    for part, ends in sd.linear.items():
        erase, guide, keep = [], [], []
        for e, g in pairs:
            for (k_e, last_e), (k_g, last_g) in zip(
                sd.vectors(e)[part], sd.vectors(g)[part], strict=True
            ):
                n = 1 if case == "last" else len(k_e) - max(last_e, last_g)
                erase += [k_e[last_e + k] for k in range(n)]
                guide += [k_g[last_g + k] for k in range(n)]
        for p in preserved:
            for k_p, last in sd.vectors(p)[part]:
                keep += [k_p[last]] if case == "last" else list(k_p)
        erase, guide, keep = (torch.stack(v).double() for v in (erase, guide, keep))
        for name in (n for n in names if n.endswith(ends)):
            n = erase.shape[1]  # of XL, the other columns take the size of the image
            assert torch.equal(edited[name][:, n:], original[name][:, n:])
            w0 = original[name].detach().double()[:, :n]
            eye = torch.eye(w0.shape[1]).double()
            rows = torch.cat([a**0.5 * erase, b**0.5 * keep, lam**0.5 * eye])
            aims = torch.cat([a**0.5 * guide @ w0.T, b**0.5 * keep @ w0.T, lam**0.5 * w0.T])
            w = torch.linalg.lstsq(rows, aims).solution.T
            agree([edited[name][:, :n] - w0], [w - w0])
    settings = json.loads((out / "args.json").read_text())["settings"]
    assert settings["lamb"] == lam and math.isclose(settings["preserve_scale"], b)


TWO = ["--target", "pizza", "Grumpy Cat", "--anchor", "food", "Cat"]
TWO_PAIRS = [("pizza", "food"), ("Grumpy Cat", "Cat")]
CAT = ["--target", "Grumpy Cat", "--anchor", "Cat"]
# flags, concepts and their anchors, prompts to retain, threshold and beta
SPEED = {
    "names": (
        [*TWO, "--retain-prompts", "ANIMALS"],
        TWO_PAIRS,
        ["", "food", "Cat", *KEPT],
        (1e-2, 1e-3),
    ),
    "numbers": (
        [*CAT, "--retain-prompts", "MOUSE", "--threshold", "0.5", "--retain-scale", "0.2"],
        [("Grumpy Cat", "Cat")],
        ["", "Cat", *MOUSE],
        (0.5, 0.2),
    ),
    "kv": ([*TWO, "--params", "kv"], TWO_PAIRS, ["", "food", "Cat"], (1e-2, 1e-3)),
    "large": (
        [*CAT, "--retain-prompts", "LETTERS"],
        [("Grumpy Cat", "Cat")],
        ["", "Cat", *LETTERS],
        (0.1, 1.0),
    ),
    "padding": (
        [*TWO, "--padding", "--threshold", "1e-3"],
        TWO_PAIRS,
        ["", "food", "Cat"],
        (1e-3, 1e-3),
    ),
    "prompts": (
        [*TWO, "--prompts", "WORDS"],
        list(zip(TARGETS, ANCHORS, strict=True)),
        ["", *ANCHORS],
        (1e-2, 1e-3),
    ),
}


def check_speed(module, place, case):
    """D by least squares over what the null space and the constraint leave free, by their bases."""
    sd, (flags, pairs, retained, (threshold, beta)) = place.sd, SPEED[case]
    flags = [str(place.files.get(f, f)) for f in flags]
    model = large_sd(place) if case == "large" else sd.folder
    records, out = place.run(module, "--model", model, *flags)
    parts = ("attn2.to_k.weight", "attn2.to_v.weight")[0 if case == "kv" else 1 :]
    original = {n: p.detach().double() for n, p in sd.original.named_parameters()}
    edited = load_file(out / "delta.safetensors")
    names = [n for n in original if n.endswith(parts)]
    assert records == [] and sorted(edited) == sorted(names) != []

    last = lambda text: max(len(sd.tokenizer(text)["input_ids"]) - 2, 0)  # noqa: E731
    c1, anchor, c0 = [], [], []
    for e, g in pairs:
        n = 77 - max(last(e), last(g)) if case == "padding" else 1
        c1 += sd.emb(e)[last(e) :][:n]
        anchor += sd.emb(g)[last(g) :][:n]
    for p in retained:
        c0 += sd.emb(p)[last(p) :] if case == "padding" else [sd.emb(p)[last(p)]]
    c1, anchor, c0 = (torch.stack(rows).double() for rows in (c1, anchor, c0))
    k2 = torch.cat([sd.emb("")[:1].double(), three_means(sd.emb("")[1:].double())])
    for k, name in enumerate(names):
        w, n = original[name], len(c1)
        # An edit that retains nothing: |(W + E) c1 - W c*|^2 on average, and |E|^2
        rows = torch.cat([c1 / n**0.5, torch.eye(32).double()])
        aims = torch.cat([(anchor - c1) @ w.T / n**0.5, torch.zeros(32, len(w)).double()])
        e = torch.linalg.lstsq(rows, aims).solution  # (32, out)
        kept = [c for c in c0 if (c @ e).norm() > (c0 @ e).norm(dim=1).mean()]
        values, vectors = torch.linalg.eigh(w.T @ w)
        v = vectors[:, max(0, 32 - len(w))]  # of the smallest one that is not 0 for lack of rows
        z = torch.randn(10 * len(kept), 32, generator=seeded(950_001 + k), dtype=torch.float64)
        variants = torch.stack([kept[i % len(kept)] + (x @ v) * v for i, x in enumerate(z)])
        mean = (variants @ e).norm(dim=1).mean()
        kept += [c for c in variants if (c @ e).norm() > mean]
        assert 0 < len(kept) < 11 * len(c0)

        _, s, vh = torch.linalg.svd(torch.stack(kept), full_matrices=True)
        squares = torch.cat([s**2, torch.zeros(32).double()])[:32] / len(kept)
        u = vh[squares < threshold].T  # (32, r)
        free = u @ left_free(u.T @ k2.T)  # (32, r'), what K2 has no part in either
        y = torch.linalg.lstsq(
            torch.cat([c1 @ free / n**0.5, beta**0.5 * torch.eye(free.shape[1]).double()]),
            torch.cat([aims[:n], torch.zeros(free.shape[1], len(w)).double()]),
        ).solution
        d = (free @ y).T
        agree([edited[name] - w], [d])
        moved = (edited[name].double() - w) @ k2.T
        assert moved.norm() < 1e-4 * d.norm() * k2.norm()
    settings = json.loads((out / "args.json").read_text())["settings"]
    assert (settings["threshold"], settings["retain_scale"]) == (threshold, beta)


def left_free(x):
    """An orthonormal basis (r, r') of what is orthogonal to the columns of x (r, n)."""
    u, s, _ = torch.linalg.svd(x, full_matrices=True)
    return u[:, int((s > 1e-6 * s[0]).sum()) :]


def three_means(rows):
    """Lloyd's algorithm with three centres, row by row."""
    centres = [rows[i] for i in torch.randperm(len(rows), generator=seeded(950_000))[:3]]
    for _ in range(100):
        groups = [[], [], []]
        for row in rows:
            away = [(row - c).norm().item() for c in centres]
            groups[away.index(min(away))].append(row)
        assert all(groups)
        centres = [torch.stack(group).mean(0) for group in groups]
    return torch.stack(centres)


def large_sd(place):
    """The tiny model, with a config that says latents of 32 x 32."""
    folder = place.tmp / "large-sd"
    if not folder.exists():
        shutil.copytree(place.sd.folder, folder)
        config = folder / "unet/config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 32}))
    return folder


def attention_of(sd, unet, x, t, text, marked):
    """The norm of the attention to the marked tokens, from to_q and to_k of every attn2."""
    said, handles = {}, []
    layers = {n: m for n, m in unet.named_modules() if n.endswith("attn2")}
    for name, layer in layers.items():
        for part in ("to_q", "to_k"):
            keep = lambda _, __, out, key=(name, part): said.__setitem__(key, out[0])  # noqa: E731
            handles.append(getattr(layer, part).register_forward_hook(keep))
    sd.predict(unet, x, t, text)
    for handle in handles:
        handle.remove()
    total = 0
    for name, layer in layers.items():
        for q, k in zip(
            said[name, "to_q"].chunk(layer.heads, -1),
            said[name, "to_k"].chunk(layer.heads, -1),
            strict=True,
        ):
            total += (q @ k.T / q.shape[-1] ** 0.5).softmax(-1)[:, marked].square().sum()
    return total.sqrt()


def check_forget_me_not(module, place, files=False):
    """Generated: image j is of prompt j modulo 3. Files: random prompts, one target, K and V."""
    sd, few = place.sd, {"sampling_steps": 3, "num_images": 5}
    if files:
        folder, few = place.tmp / "images", {}
        folder.mkdir(exist_ok=True)
        g, vae = (
            torch.Generator().manual_seed(5),
            AutoencoderKL.from_pretrained(sd.folder / "vae").eval(),
        )
        latent = []
        for name in "pqr":
            pixels = torch.randint(256, (64, 64, 3), generator=g, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{name}.png")
            with torch.no_grad():
                mean = vae.encode(pixels.permute(2, 0, 1)[None] / 127.5 - 1).latent_dist.mean
            latent.append(mean[0] * 0.18215)
        (place.tmp / "cats.txt").write_text("a cat\na drawing of a cat\n")
        flags = [
            "--model",
            sd.folder,
            "--target",
            "Grumpy Cat",
            "--anchor",
            "Cat",
            "--prompts",
            place.tmp / "cats.txt",
            "--images",
            folder,
            "--train-method",
            "kv",
            "--steps",
            2,
            "--batch-size",
            2,
        ]
        prompts = TARGETS[1:]
    else:
        flags, prompts = sd.words(place), TARGETS
        latent = [sd.generated(prompts[j % 3], j, 3) for j in range(5)]
    records, _ = place.run(module, *flags, "--lr", 1e-3, few=few)
    ids = lambda text: sd.tokenizer(text)["input_ids"][1:-1]  # noqa: E731
    wanted = {"a photo of pizza": ids("pizza")} | dict.fromkeys(TARGETS[1:], ids("Grumpy Cat"))

    def loss(step, unet):
        g, total = seeded(step), 0
        i = torch.randint(len(latent), (2,), generator=g).tolist()
        which = (
            torch.randint(len(prompts), (2,), generator=g).tolist()
            if files
            else [k % len(prompts) for k in i]
        )
        t, eps = torch.randint(1000, (2,), generator=g), torch.randn(2, 4, 16, 16, generator=g)
        for k in range(2):
            prompt = prompts[which[k]]
            n = len(ids(prompt))  # the target ends its prompt
            marked = list(range(n + 1 - len(wanted[prompt]), n + 1))
            assert ids(prompt)[-len(wanted[prompt]) :] == wanted[prompt]
            total += (
                attention_of(sd, unet, sd.noisy(latent[i[k]], t[k], eps[k]), t[k], prompt, marked)
                / 2
            )
        return total

    trained = (lambda n: "attn2.to_k." in n or "attn2.to_v." in n) if files else (lambda n: True)
    norms = sd.compare(records, trained, loss, clip=True, lr=1e-3)
    assert files or max(norms) > 1 > min(norms)  # one is to be clipped


# ---- 3. images ----------------------------------------------------------------------------------

ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)


def read_image(path, side=16):
    image = Image.open(path).convert("RGB")
    image = image if image.width == side else image.resize((side, side), Image.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def noisy(x, t, eps):
    return ALPHA_BAR[t].sqrt() * x + (1 - ALPHA_BAR[t]).sqrt() * eps


def uniform_times(n, g, stratified):
    u = torch.rand(n, generator=g)
    return [min(int(1000 * ((k + u[k]) / n if stratified else u[k])), 999) for k in range(n)]


def flat(grads):
    return torch.cat([g.flatten() for g in grads]).double()


def compare_ddpm(folder, records, gradient, steps, lr, linear, **settings):
    """Each step has gradient(step, number of the image, net, params), a list, by hand."""
    net = UNet2DModel.from_pretrained(folder / "unet").eval()
    params = list(net.parameters())
    for n, record in enumerate(records):
        assert record.kind == "AdamW" and record.betas == settings.get("betas", (0.9, 0.999))
        assert record.weight_decay == settings.get("weight_decay", 0)
        assert math.isclose(record.lr, lr * (1 - n % steps / steps) if linear else lr)
        for p, w in zip(params, record.weights, strict=True):
            assert n or torch.equal(p, w)
            p.data.copy_(w)
        agree(record.grads, gradient(n, n // steps, net, params))


def remembered(place, g, n):
    return [place.pool[k] for k in torch.randint(len(place.pool), (n,), generator=g).tolist()]


def instance_flags(place, folder, steps, batch, images=("a",), linear=False, stratified=False):
    flags = ["--model", folder, "--forget", *(place.photos / f"{p}.png" for p in images)]
    flags += ["--steps", steps, "--batch-size", batch, "--lr", 1e-3]
    flags += ["--lr-scheduler", "linear"] if linear else []
    return flags + (["--timestep-sampling", "stratified"] if stratified else [])


def check_neggrad(module, place, ascent=False, remedies=False):
    """Remedies: a falling rate, stratified timesteps, two images, neither of which is remembered.

    Ascent: from large gradients, which are not clipped.
    """
    two, folder = ("a", "c") if remedies else ("a",), place.loud_ddpm if ascent else place.ddpm
    flags = instance_flags(place, folder, 2, 3, two, remedies, remedies)
    flags += ["--remember", place.remember, *(["--ascent"] if ascent else ["--lam", 0.7])]
    records, _ = place.run(module, *flags)
    pool = [x for k, x in enumerate(place.pool) if not (remedies and k == 1)]
    assert len(records) == 2 * len(two)

    def gradient(n, k, net, params):
        g, total = seeded(100_000 + n), 0
        x_r = [pool[j] for j in torch.randint(len(pool), (3,), generator=g).tolist()]
        times, eps = uniform_times(3, g, remedies), torch.randn(3, 3, 16, 16, generator=g)
        x_f = read_image(place.photos / f"{two[k]}.png")
        for x, t, e in zip(x_r, times, eps, strict=True):
            error_r, error_f = (
                (e - net(noisy(y, t, e)[None], t).sample[0]).square().mean() for y in (x, x_f)
            )
            total += (-error_f if ascent else error_r - 0.7 * error_f) / 3
        return grads_of(total, params)

    compare_ddpm(folder, records, gradient, 2, 1e-3, remedies)
    assert not ascent or norm(records[0].grads) > 1


def check_erasediff(module, place, case="small"):
    """small: two images, both remedies. loud: gradients to be clipped. agreeing: g is g_r."""
    loud = case != "small"
    two = ("a",) if loud else ("a", "c")
    folder, eta = (place.loud_ddpm, 3 if case == "loud" else 0.5) if loud else (place.ddpm, 1.5)
    flags = instance_flags(place, folder, 2, 3, two, not loud, not loud)
    records, _ = place.run(module, *flags, "--remember", place.remember, "--eta", eta)
    pool, norms, weights = [x for k, x in enumerate(place.pool) if loud or k != 1], [], []
    assert len(records) == 2 * len(two)

    def gradient(n, k, net, params):
        g, loss_r, loss_f = seeded(100_000 + n), 0, 0
        x_r = [pool[j] for j in torch.randint(len(pool), (3,), generator=g).tolist()]
        times, eps = uniform_times(3, g, not loud), torch.randn(3, 3, 16, 16, generator=g)
        u, x_f = torch.rand(3, 3, 16, 16, generator=g), read_image(place.photos / f"{two[k]}.png")
        for j, t in enumerate(times):
            loss_r += (
                eps[j] - net(noisy(x_r[j], t, eps[j])[None], t).sample[0]
            ).square().mean() / 3
            loss_f += (u[j] - net(noisy(x_f, t, eps[j])[None], t).sample[0]).square().mean() / 3
        g_r, g_f = (grads_of(loss, params) for loss in (loss_r, loss_f))
        weights.append(max(0.0, (eta - flat(g_r) @ flat(g_f) / flat(g_f).square().sum()).item()))
        both = [r + weights[-1] * f for r, f in zip(g_r, g_f, strict=True)]
        norms.append(norm(both).item())
        return clipped(both)

    compare_ddpm(folder, records, gradient, 2, 1e-3, not loud)
    assert max(weights) == 0 if case == "agreeing" else min(weights) > 0.1
    assert not loud or min(norms) > 1


def check_siss(module, place, case="last"):
    """last: t = 999. full: all t, both remedies, two images. large: 72 pixels, batch 4 + 2."""
    full, large = case == "full", case == "large"
    folder = large_ddpm(place) if large else place.ddpm
    steps, batch, lam, side = (1, 6, 0.3, 72) if large else (2, 3, 0.3, 16)
    two, s = ("a", "c") if full else ("a",), 300 if case == "last" else None
    flags = instance_flags(place, folder, steps, batch, two, full, full)
    if large:
        flags[flags.index("--forget") + 1] = enlarged(place)["a"]
        flags = [f for f in flags if f not in ("--lr", 1e-3)]
    flags += ["--remember", place.tmp / "enlarged" if large else place.remember, "--lam", lam]
    flags += ["--full-range"] if full or large else ["--scaling-norm", s]
    records, _ = place.run(module, *flags)
    pool = [x for k, x in enumerate(place.pool) if not full or k != 1]
    x_f = [read_image(place.photos / f"{p}.png") for p in two]
    if large:
        x_f, pool = (
            [read_image(enlarged(place)["a"], 72)],
            [read_image(enlarged(place)[p], 72) for p in "bcd"],
        )
    assert len(records) == steps * len(two)

    def gradient(n, k, net, params):
        g, loss_r, loss_f = seeded(100_000 + n), 0, 0
        x_r = [pool[j] for j in torch.randint(len(pool), (batch,), generator=g).tolist()]
        times = [999] * batch if case == "last" else uniform_times(batch, g, full)
        eps = torch.randn(batch, 3, side, side, generator=g)
        from_f = (torch.rand(batch, generator=g) < lam).tolist()
        for j, t in enumerate(times):
            a, b = ALPHA_BAR[t].sqrt(), (1 - ALPHA_BAR[t]).sqrt()
            m = a * (x_f[k] if from_f[j] else x_r[j]) + b * eps[j]
            q_r, q_f = (
                torch.distributions.Normal(a * x, b).log_prob(m).double().sum()
                for x in (x_r[j], x_f[k])
            )
            mixture = torch.logaddexp(math.log(1 - lam) + q_r, math.log(lam) + q_f)
            pred = net(m[None], t).sample[0]
            loss_r += (
                (q_r - mixture).exp().float() * ((m - a * x_r[j]) / b - pred).square().sum() / batch
            )
            loss_f += (
                (q_f - mixture).exp().float() * ((m - a * x_f[k]) / b - pred).square().sum() / batch
            )
        g_r, g_f = grads_of(loss_r, params, retain_graph=True), grads_of(loss_f, params)
        fixed = 0.1 * norm(g_r) if s is None else s
        both = [r - fixed * f / norm(g_f) for r, f in zip(g_r, g_f, strict=True)]
        assert norm(both) > 1
        return clipped(both)

    settings = {"betas": (0.95, 0.999), "weight_decay": 1e-6}
    compare_ddpm(folder, records, gradient, steps, 5e-6 if large else 1e-3, full, **settings)


def enlarged(place):
    """The images a, b, c, d in 72 x 72 pixels."""
    folder = place.tmp / "enlarged"
    if not folder.exists():
        folder.mkdir()
        for p in "abcd":
            Image.open(place.photos / f"{p}.png").resize((72, 72), Image.BILINEAR).save(
                folder / f"{p}.png"
            )
    return {p: folder / f"{p}.png" for p in "abcd"}


def large_ddpm(place):
    """A DDPM of 72 pixels, for which batches are taken in parts."""
    folder = place.tmp / "large-ddpm"
    if not folder.exists():
        shutil.copytree(place.ddpm, folder)
        torch.manual_seed(0)
        blocks = dict(
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            add_attention=False,
        )
        UNet2DModel(
            sample_size=72,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            **blocks,
        ).save_pretrained(folder / "unet")
    return folder


def check_duo(module, place, case="pairs"):
    """pairs: two images and surrogate files, both remedies, small weights. defaults: SDEdit's."""
    pairs = case == "pairs"
    two = ("a", "c") if pairs else ("a",)
    flags = instance_flags(place, place.ddpm, 2, 3, two, pairs, pairs)
    beta, prior = (20, 30) if pairs else (500, 5e6)
    flags += (
        [
            "--beta",
            beta,
            "--prior",
            prior,
            "--surrogate",
            *(place.photos / f"{p}.png" for p in "bd"),
        ]
        if pairs
        else []
    )
    records, out = place.run(module, *flags)
    original = UNet2DModel.from_pretrained(place.ddpm / "unet").eval()
    x_f = [read_image(place.photos / f"{p}.png") for p in two]
    x_s = (
        [read_image(place.photos / f"{p}.png") for p in "bd"]
        if pairs
        else [sdedit(place, original, x_f[0])]
    )
    assert len(records) == 2 * len(two)
    for k in range(len(two)):
        assert (
            read_image(out / f"surrogate-{k}.png") - x_s[k].clamp(-1, 1)
        ).abs().max() < 1.01 / 127.5

    def gradient(n, k, net, params):
        g, total = seeded(100_000 + n), 0
        times = [int(t * 0.75) for t in uniform_times(3, g, pairs)]
        eps = torch.randn(3, 3, 16, 16, generator=g)
        assert max(times) < 750
        for t, e in zip(times, eps, strict=True):
            error = lambda m, x: (e - m(noisy(x, t, e)[None], t).sample[0]).square().mean()  # noqa: B023, E731
            with torch.no_grad():
                s_0, f_0, end_0 = (
                    error(original, x_s[k]),
                    error(original, x_f[k]),
                    original(e[None], 999).sample[0],
                )
            inner = (error(net, x_s[k]) - s_0) - (error(net, x_f[k]) - f_0)
            total += torch.log1p(torch.exp(beta * inner)) / 3  # -log sigmoid(-x)
            total += prior * (net(e[None], 999).sample[0] - end_0).square().mean() / 3
        return clipped(grads_of(total, params))

    compare_ddpm(place.ddpm, records, gradient, 2, 1e-3, pairs, weight_decay=1e-2)


def sdedit(place, net, x):
    """The image noised to t = 700 and denoised by DDIM in steps of 20, clipped."""
    if not hasattr(place, "edited"):
        x = noisy(x, 700, torch.randn(3, 16, 16, generator=seeded(900_000)))
        for t in range(700, -1, -20):
            with torch.no_grad():
                pred = net(x[None], t).sample[0]
            x_0 = ((x - (1 - ALPHA_BAR[t]).sqrt() * pred) / ALPHA_BAR[t].sqrt()).clamp(-1, 1)
            eps = (x - ALPHA_BAR[t].sqrt() * x_0) / (1 - ALPHA_BAR[t]).sqrt()
            x = noisy(x_0, t - 20, eps) if t else x_0
        place.edited = x
    return place.edited


# ---- 4. the cases -------------------------------------------------------------------------------

CASES = {
    "esd": (check_esd, {}),
    "esd style": (check_esd, {"style": True}),
    "conabl": (check_conabl, {}),
    "conabl style": (check_conabl, {"style": True}),
    "spm": (check_spm, {}),
    **{
        f"{name} {family}": (check, {"family": family})
        for name, check in (("esd", check_esd), ("conabl", check_conabl))
        for family in ("sdxl", "sd3")
    },
    **{f"uce {case}": (check_uce, {"case": case}) for case in UCE},
    **{
        f"uce {case} {family}": (check_uce, {"case": case, "family": family})
        for case in ("names", "last")
        for family in ("sdxl", "sd3", "sd3-t5", "flux")
    },
    **{f"speed {case}": (check_speed, {"case": case}) for case in SPEED},
    "forget_me_not": (check_forget_me_not, {}),
    "forget_me_not files": (check_forget_me_not, {"files": True}),
    "neggrad": (check_neggrad, {}),
    "neggrad ascent": (check_neggrad, {"ascent": True}),
    "neggrad remedies": (check_neggrad, {"remedies": True}),
    **{
        f"erasediff {case}": (check_erasediff, {"case": case})
        for case in ("small", "loud", "agreeing")
    },
    **{f"siss {case}": (check_siss, {"case": case}) for case in ("last", "full", "large")},
    **{f"duo {case}": (check_duo, {"case": case}) for case in ("pairs", "defaults")},
}


# Second cases of a method that take longer than two seconds
SLOW = ("esd style", "conabl style", "duo defaults")


def cases():
    """The names of all cases, those in SLOW marked slow."""
    marks = {case: pytest.mark.slow if case in SLOW else () for case in CASES}
    return [pytest.param(case, marks=mark) for case, mark in marks.items()]


@pytest.mark.parametrize("case", cases())
def test_steps_by_hand(case, place):
    check, how = CASES[case]
    check(load(case.split()[0]), place, **how)


# ---- 5. a changed line is noticed ---------------------------------------------------------------

NO_GRAD = "        with torch.no_grad():\n"
PRED_ANCHOR = "pred_anchor = predict(model, xt, t, conditions, anchors)\n"
CLIP = "        torch.nn.utils.clip_grad_norm_({}, 1.0)\n"
STEP = "        optimizer.step()\n"
ZERO = "        optimizer.zero_grad()\n"
UNCLIPPED = ", clip_sample=False)"  # clips without it
REMEMBERED = "drop_forget_files(list_images(folder), forget, forget.shape[-1])"
SWAP = "        swap_weights(weights, originals)\n"
OF_ORIGINAL = """        with torch.no_grad():
            s_0, f_0, of_noise_0 = model.net(xt, times).sample.chunk(3)  # M0
"""
LINEAR = "args.lr * (1 - step % args.steps / args.steps)"
STRATIFIED = 'args.timestep_sampling == "stratified"'
ONE_IMAGE = "x_f[step // args.steps]"

# (case, a piece of the source of the baseline or of baselines/__init__.py, what takes its place)
MUTANTS = [
    ("esd", "stack_conditions([null, target])", "stack_conditions([target, null])"),
    (
        "esd",
        "predict_both(model, x, t, null, target)",
        "predict_both(model, x, t, target, null)",
    ),
    ("esd", UNCLIPPED, ")"),
    ("esd", "pred_null - eta * (", "pred_null + eta * ("),
    (
        "esd",
        "predict(model, xt, t, conditions, texts)",
        'predict(model, xt, t, conditions, [""] * 2)',
    ),
    ("esd", "points.append((xt[k], t, y[k]", "points.append((xt[k], t - 1, y[k]"),
    ("esd", "path_noise(args.seed, i + k, shape)", "path_noise(args.seed, k, shape)"),
    ("esd", "FIRST_STEP_SEED + step", "step"),
    ("esd", "|time_embedding))", "))"),
    ("esd", "null, args.guidance)", "null, 1.0)"),
    ("esd", "pred_null + guidance * (", "pred_null - guidance * ("),
    ("esd", "optim.Adam(", "optim.AdamW("),
    ("esd", ZERO, ""),
    ("esd sdxl", "stack_conditions([null, target])", "stack_conditions([target, null])"),
    ("esd sd3", "stack_conditions([null, target])", "stack_conditions([target, null])"),
    ("esd sd3", "pred_null - eta * (", "pred_null + eta * ("),
    (
        "esd sd3",
        "scheduler.set_timesteps(steps, model.device)",
        "scheduler.set_timesteps(steps + 1)",
    ),
    ("esd sd3", "null, args.guidance)", "null, 1.0)"),
    (
        "esd style",
        'return "noxattn" if concept_type == "object" and not small else "xattn"',
        'return "noxattn"',
    ),
    ("esd style", "prompts[j % len(prompts)] for j in", "prompts[0] for j in"),
    (
        "conabl",
        NO_GRAD + "            " + PRED_ANCHOR,
        "        " + PRED_ANCHOR + "        loss_ablation = F.mse_loss\n",
    ),
    ("conabl", "[target_of[j][step % len(target_of[j])] for j in idx]", "anchors"),
    ("conabl", PRED_ANCHOR, PRED_ANCHOR.replace("s, anchors", 's, [""] * batch')),
    (
        "conabl",
        "pred_target = predict(model, xt, t, ",
        "pred_target = predict(model, xt, t_r, ",
    ),
    ("conabl", "a * latents[idx] + b * eps  #", "a * latents[idx] + b * eps_r  #"),
    ("conabl", "prediction_target(model.prediction_type, x0_r, eps_r, a, b)", "eps"),
    ("conabl", "x0_r = latents[idx_r]", "x0_r = latents[idx]"),
    ("conabl", "anchors = [anchor_of[j] for j in idx]", "anchors = [anchor_of[j] for j in idx_r]"),
    (
        "conabl",
        "anchors_r = [anchor_of[j] for j in idx_r]",
        "anchors_r = [target_of[j][0] for j in idx_r]",
    ),
    ("conabl", "weight_decay=1e-2", "weight_decay=0"),
    ("conabl", ZERO, ""),
    (
        "conabl",
        'derive_seed(args.seed, "samples", i + k)',
        'derive_seed(args.seed, "samples", k + 1)',
    ),
    ("conabl sd3", "sample_timesteps(n, g, model.shift)", "sample_timesteps(n, g, 1.0)"),
    ("conabl sd3", "sample_timesteps(n, g, model.shift)", "1000 * torch.rand(n, generator=g)"),
    ("conabl sd3", "prediction_target(model.prediction_type, x0_r, eps_r, a, b)", "eps_r"),
    ("conabl sd3", '"lora" if model.net_name == "transformer"', '"kv" if model.alpha_bar is None'),
    ("conabl sdxl", PRED_ANCHOR, PRED_ANCHOR.replace("anchors", "targets")),
    ("conabl style", CLIP.format("params"), ""),
    ("conabl style", "target_of[j][step % len(target_of[j])]", "target_of[j][0]"),
    ("spm", UNCLIPPED, ")"),
    ("spm", "unet.disable_adapters()", "unet.enable_adapters()"),
    ("spm", "        xt = sample_xt(", "        unet.disable_adapters()\n        xt = sample_xt("),
    ("spm", "eps_null - args.eta *", "eps_null + args.eta *"),
    ("spm", "args.anchoring * loss_anchoring", "loss_anchoring"),
    ("spm", "t = scheduler.timesteps[s]", "t = scheduler.timesteps[s - 1]"),
    ("spm", "predict_both(model, x, t, null, target)", "predict_both(model, x, t, target, null)"),
    ("spm", "predict_both(model, xt, t, null, target)", "predict_both(model, xt, t, target, null)"),
    ("spm", "guide(eps_null, eps_target, guidance)", "guide(eps_null, eps_target, 1.0)"),
    ("spm", "0.8 + 0.4 *", "1.0 + 0.4 *"),
    ("spm", "torch.arange(max(4, batch))", "torch.arange(batch)"),
    ("spm", "lora_alpha=args.rank", "lora_alpha=1"),
    ("spm", "F.mse_loss(unet(xt, t, emb).sample, y)", "F.mse_loss(unet(xt, t, 0 * emb).sample, y)"),
    ("spm", STEP, CLIP.format("weights") + STEP),
    ("uce names", '("from", "all")', '("all", "all")'),
    ("uce names", '("from", "all")', '("from", "from")'),
    ("uce names", "guide.append(g[:n])", "guide.append(g[-n:])"),
    (
        "uce names",
        "text_vectors(tokenizer, emb[guide_prompt], guide_prompt, which)",
        'text_vectors(tokenizer, emb[""], "", which)',
    ),
    ("uce names", "a * g.T @ e", "a * e.T @ g"),
    ("uce names", 'TRAINABLE["kv"]', 'r"attn2.to_k"'),
    ("uce names sd3", "n = pipe.tokenizer.model_max_length", "n = 70"),
    ("uce names sd3-t5", "(pipe.tokenizer_3, slice(n, None))", "(pipe.tokenizer, slice(n, None))"),
    ("uce names sd3-t5", "(pipe.tokenizer_3, slice(n, None))", "(pipe.tokenizer_3, slice(n))"),
    ("uce names flux", "(pipe.tokenizer_2, slice(None))", "(pipe.tokenizer, slice(None))"),
    ("uce names sdxl", 'r"^add_embedding\\.linear_1', 'r"^add_embedding\\.linear_2'),
    ("uce names sdxl", "weight.data[:, n:]], 1)", "w[:, : weight.shape[1] - n]], 1)"),
    (
        "uce names flux",
        r'r"text_embedder\.linear_1\.weight"',
        r'r"text_embedder\.linear_2\.weight"',
    ),
    ("uce names", "for prompt in preserved:", "for prompt in preserved[:1] + preserved[3:]:"),
    ("uce names", "for prompt in preserved:", "for prompt in preserved[1:]:"),
    ("uce names", "len(ids) - 2", "len(ids) - 1"),
    ("uce scales", "lam * eye", "eye"),
    ("uce floor", "max(0.1, 1 / len(preserved))", "1 / len(preserved)"),
    ("uce large", "small if model.small else paper", "small"),
    ("uce templates", "args.templates or args.prompts", "args.prompts"),
    ("uce prompts", "args.templates or args.prompts", "args.templates"),
    ("uce last", '("last", "last")', '("last", "all")'),
    ("speed names", "anchor.T @ target", "target.T @ anchor"),
    ("speed names", "anchor.T @ target / len(target)", "anchor.T @ target"),
    ("speed names", "lengths > lengths.mean()", "lengths < lengths.mean()"),
    ("speed names", "torch.linalg.solve(eye + a, b - a, left=False)", "(b - a)"),
    ("speed names", "    rows = most_changed(rows, change)\n", ""),
    ("speed numbers", "most_changed(variants, change)", "variants"),
    ("speed names", "torch.cat([rows, most_changed(variants, change)])", "rows"),
    ("speed numbers", "full_matrices=False)[2][-1]", "full_matrices=False)[2][0]"),
    ("speed numbers", "full_matrices=False)[2][-1]", "full_matrices=False)[2][-2]"),
    ("speed numbers", "VARIANTS = 10", "VARIANTS = 5"),
    ("speed numbers", "along = z.to(v.device) @ v", "along = z[:, 0]"),
    ("speed numbers", '"retain_prompts", k + 1', '"retain_prompts", k'),
    ("speed numbers", "rows.T @ rows / len(rows)", "rows.T @ rows"),
    ("speed numbers", "values < threshold", "values < threshold / 10"),
    ("speed names", "[null[:1], centres]", "[centres]"),
    ("speed names", "[null[:1], centres]", "[null[:1], null[1:4]]"),
    ("speed names", "rows[cluster == i].mean(0)", "rows[cluster == i][0]"),
    ("speed names", "torch.equal(nearest, cluster)", "True"),
    ("speed names", "inv(a @ p + beta * eye)", "inv(a + beta * eye)"),
    ("speed numbers", "beta * eye", "eye"),
    ("speed names", "torch.linalg.pinv(gram, rtol=1e-12, hermitian=True)", "0 * gram"),
    ("speed names", "m @ k2 @ inner @ k2.T @ p", "k2 @ inner @ k2.T @ p"),
    ("speed names", "(b - a) @ p @ hold", "(b - a) @ hold"),
    ("speed names", "PARAMS[args.params]", 'PARAMS["kv"]'),
    ("speed kv", '"kv": TRAINABLE["kv"]', r'"kv": r"attn2\.to_k\."'),
    ("speed names", '["", *guides, *lines]', "[*guides, *lines]"),
    ("speed numbers", '"from" if args.padding else "last"', '"from"'),
    ("speed padding", '"from" if args.padding else "last"', '"last"'),
    ("speed padding", "emb[prompt], prompt, which)", 'emb[prompt], prompt, "last")'),
    ("speed large", "small if model.small else paper", "small"),
    ("speed prompts", "erase_pairs(args, args.prompts)", "erase_pairs(args, None)"),
    ("forget_me_not", "which = idx % len(prompts)", "which = (idx + 1) % len(prompts)"),
    ("forget_me_not", "predict(model, xt, t, ", "predict(model, eps, t, "),
    ("forget_me_not", "predict(model, xt, t, ", "predict(model, xt, t // 2, "),
    ("forget_me_not", "where[text] for text in texts", "where[prompts[0]] for text in texts"),
    ("forget_me_not", "found[k : k + len(wanted)] = True", "found[k] = True"),
    ("forget_me_not", "squares.sqrt().mean()", "squares.mean()"),
    ("forget_me_not", CLIP.format("params"), ""),
    ("forget_me_not", 'if ".attn2." in name', 'if "down" in name and ".attn2." in name'),
    ("forget_me_not", "prompts[j % len(prompts)] for j in", "prompts[0] for j in"),
    (
        "forget_me_not files",
        "return model.encode(torch.stack(images))",
        "return 2 * model.encode(torch.stack(images))",
    ),
    ("neggrad", "error_r - lam * error_f", "error_r + lam * error_f"),
    ("neggrad", "error_r - lam * error_f", "error_r - error_f"),
    ("neggrad", "model.net(xt_r, t)", "model.net(xt_r, t // 2)"),
    ("neggrad", '"instance_steps"', '"samples"'),
    ("neggrad", ZERO, ""),
    ("neggrad", REMEMBERED, "list_images(folder)"),
    ("neggrad remedies", "torch.stack(x_f).cpu()", "torch.stack(x_f[:1]).cpu()"),
    ("neggrad ascent", "return -error_f", "return error_f"),
    ("neggrad ascent", STEP, CLIP.format("model.net.parameters()") + STEP),
    ("neggrad remedies", ONE_IMAGE, "x_f[0]"),
    ("neggrad remedies", STRATIFIED, "False"),
    ("neggrad remedies", LINEAR, "args.lr * (1 - step / args.steps / 2)"),
    ("neggrad remedies", "        schedule_lr(optimizer, args, step)\n", ""),
    ("erasediff small", "mse_per_sample(pred_f, u)", "mse_per_sample(pred_f, eps)"),
    ("erasediff small", "u = torch.rand(", "u = torch.randn("),
    ("erasediff small", "(eta - g_r @ g_f", "(eta + g_r @ g_f"),
    ("erasediff small", "g_r + weight * g_f", "g_r - weight * g_f"),
    ("erasediff small", ONE_IMAGE, "x_f[0]"),
    ("erasediff small", STRATIFIED, "False"),
    ("erasediff small", "        schedule_lr(optimizer, args, step)\n", ""),
    ("erasediff small", REMEMBERED, "list_images(folder)"),
    ("erasediff small", "weight_decay=0", "weight_decay=1e-2"),
    ("erasediff agreeing", ".clamp(min=0)", ""),
    ("erasediff loud", CLIP.format("weights"), ""),
    ("siss last", REMEMBERED, "list_images(folder)"),
    ("siss last", "(args.batch_size,), 999", "(args.batch_size,), 990"),
    ("siss last", "0.1 * g_r.norm() if scaling_norm is None else scaling_norm", "0.1 * g_r.norm()"),
    ("siss last", CLIP.format("weights"), ""),
    ("siss last", "        betas=(0.95, 0.999),\n", ""),
    (
        "siss full",
        "torch.where(from_f[part], x_f_part, x_r[part])",
        "torch.where(from_f[part], x_r[part], x_f_part)",
    ),
    (
        "siss full",
        "(w_r * error_r).mean(), (w_f * error_f).mean()",
        "(w_f * error_r).mean(), (w_r * error_f).mean()",
    ),
    ("siss full", "g_r - s * g_f", "g_r + s * g_f"),
    ("siss full", "0.1 * g_r.norm()", "0.2 * g_r.norm()"),
    ("siss full", " + math.log((1 - lam) / lam)", ""),
    ("siss full", "uniform < args.lam", "uniform > args.lam"),
    ("siss full", ONE_IMAGE, "x_f[0]"),
    ("siss full", "sum_of_squares(pred - eps_r)", "sum_of_squares(pred - eps_f)"),
    ("siss large", "loss = loss * len(part) / len(t)", "loss = loss"),
    ("siss large", "grads[k] = grads[k] + g\n", "grads[k] = g\n"),
    ("siss large", "b * eps[part]", "b * eps[: len(part)]"),
    ("siss large", "net(m_t, t[part])", "net(m_t, t[: len(part)])"),
    ("duo pairs", "torch.cat([xt_s, xt_f, eps])", "torch.cat([xt_f, xt_s, eps])"),
    ("duo pairs", "a * x_f[k] + b * eps\n", "a * x_f[k] + b * eps.flip(0)\n"),
    ("duo pairs", SWAP + OF_ORIGINAL + SWAP, OF_ORIGINAL),
    ("duo pairs", "torch.full_like(t, 999)", "t"),
    ("duo pairs", "(t * 0.75).long()", "t"),
    ("duo pairs", "(-beta * ", "(beta * "),
    ("duo pairs", "args.prior * prior", "prior"),
    ("duo pairs", "(s, s_0, f, f_0)", "(s, s_0, f, s_0)"),
    ("duo pairs", "k = step // args.steps", "k = 0"),
    ("duo pairs", "        schedule_lr(optimizer, args, step)\n", ""),
    ("duo pairs", "weight_decay=1e-2", "weight_decay=0"),
    ("duo pairs", ZERO, ""),
    ("duo defaults", CLIP.format("weights"), ""),
    ("duo defaults", '"surrogates", k', '"samples", k'),
    ("duo defaults", "torch.arange(700,", "torch.arange(500,"),
    ("duo defaults", "clip=True", "clip=False"),
    ("duo defaults", STRATIFIED, "True"),
]
# A few run by default: they show that the machinery notices. The rest takes minutes.
FAST = ("uce names-",)


def mutant(k, case, old, new):
    """The parameters of one test, marked slow unless it is among the fast ones."""
    name = f"{case}-{k}"
    marks = () if name.startswith(FAST) else pytest.mark.slow
    return pytest.param(case, old, new, id=name, marks=marks)


@pytest.mark.parametrize(("case", "old", "new"), [mutant(k, *m) for k, m in enumerate(MUTANTS)])
def test_a_changed_line_is_noticed(case, old, new, place):
    check, how = CASES[case]
    module = load(case.split()[0], old, new)
    noticed = False
    try:
        check(module, place, **how)
    except AssertionError:  # nothing else: a changed script that breaks down proves nothing
        noticed = True
    assert noticed, f"{case}: {new!r} in place of {old!r} changes nothing that is tested"
