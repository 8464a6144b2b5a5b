"""Did it forget, and what else went with it? Scores two models on the same prompts and the same seeds.

    python eval.py concept --before emoji/sd --after runs/doco-grumpy-cat --target "Grumpy Cat" --anchor Cat
    python eval.py concept --before CompVis/stable-diffusion-v1-4 --after runs/doco-snoopy --target Snoopy --anchor Dog \\
        --ood "Charlie Brown's beagle" --keep Mickey Spongebob Pikachu
    python eval.py instance --before emoji/ddpm --after runs/instance-twemoji-cowboy-hat-face \\
        --forget emoji/creatures/twemoji-cowboy-hat-face.png --real emoji/creatures

A concept (DoCo). CS, CLIP score (Hessel et al. 2021, scale of DoCo's tables): 2.5 * max(cos(picture, concept), 0) * 100,
mean over pictures. CA, CLIP accuracy: share of pictures, in per cent, that CLIP finds nearer the concept than its rival.
The rival is the anchor, for the target, its nicknames and all that should stay; for the anchor it is the target.
Prompts are of five kinds: target; ood (out of distribution: no word of the target, yet they draw it); anchor; related
(neighbours of the target, hardest to keep: known for the embedded model alone); unrelated.

A picture (prompt-free instance unlearning). Copy similarity: the picture is noised to t = 250 of 1000 and denoised, by 251
ancestral steps (flow matching: noised half, s = 0.5, 25 Euler steps, no guidance); a copy detector compares what comes out
with the picture. Under 0.4 it counts as forgotten, if the rest is whole: SSIM and a perceptual distance between pictures
drawn from the same seeds before and after; FID_pre, of the pictures after against those before; FID_real, against real ones.

Writes into --out: metrics.json, before_after.png and, where there is a log.jsonl, curves.png.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

from instance_unlearn import load_pipeline, read_any, read_exact, to_image

HERE = Path(__file__).resolve().parent
KINDS = ("target", "ood", "anchor", "related", "unrelated")
STYLE_SUBJECTS = ("cat", "dog", "penguin", "frog", "rose", "pizza", "banana", "ghost")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = p.add_subparsers(dest="task", required=True)
    concept, instance = tasks.add_parser("concept"), tasks.add_parser("instance")
    for q in (concept, instance):
        q.add_argument("--before", required=True, help="the original model: pipeline folder or hub id")
        q.add_argument("--after", type=Path, required=True, help="a run folder or a pipeline folder")
        q.add_argument("--clip", help="folder or hub id (default: emoji/clip for toys, else openai/clip-vit-base-patch32)")
        q.add_argument("--num-images", type=int, help="concept: per prompt (default: about 128 in all); instance: in all")
        q.add_argument("--seed", type=int, default=0)
        q.add_argument("--out", type=Path, help="where the report goes (default: --after)")
    concept.add_argument("--target", nargs="+", required=True)
    concept.add_argument("--anchor", nargs="+", required=True)
    concept.add_argument("--concept-type", choices=("object", "style"), default="object")
    concept.add_argument("--ood", nargs="*", help="prompts without the target's words that draw it (emoji model: nicknames)")
    concept.add_argument("--keep", nargs="*", help="unrelated concepts (emoji model: four neighbours, six strangers)")
    instance.add_argument("--forget", nargs="+", type=Path, required=True, metavar="FILE", help="what should be forgotten")
    instance.add_argument("--prompt", default="", help="the prompt that drew them (Stable Diffusion)")
    instance.add_argument("--real", type=Path, help="folder of real pictures, for FID_real")
    instance.add_argument("--sscd", help="TorchScript file of the copy detector (default: emoji/copy for toys, else none)")
    return p.parse_args(argv)


def stop(message):
    sys.exit(f"eval.py: error: {message}")


# ---- 1. metrics: pure functions ---------------------------------------------------------------------------------


def clip_score(image_emb, text_emb):
    """CS per picture on the papers' scale: 2.5 * max(cos, 0) * 100. Embeddings (n, d), any length -> (n,)."""
    return 250 * F.cosine_similarity(image_emb, text_emb, dim=-1).clamp(min=0)


def clip_accuracy(image_emb, concept_emb, rival_emb):
    """CA per picture: 100 where it is nearer the concept than the rival, else 0. Embeddings (n, d) -> (n,)."""
    nearer = F.cosine_similarity(image_emb, concept_emb, dim=-1) > F.cosine_similarity(image_emb, rival_emb, dim=-1)
    return 100.0 * nearer


def write_report(out, report):
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json.tmp").write_text(json.dumps(report, indent=1))
    os.replace(out / "metrics.json.tmp", out / "metrics.json")


# ---- 2. what to draw and how to judge it ------------------------------------------------------------------------


def emoji_entry(data, word):
    """The entry of emoji.json that a word names, or None."""
    return next((e for e in data["emoji"] if word.lower() in [e["name"], *e["synonyms"]]), None)


def prompt_rows(args, toy):
    """[(kind, prompt, concept, rival)]: draw prompt, then ask CLIP whether it is nearer the concept or the rival."""
    data = json.loads((HERE / "emoji/images/emoji.json").read_text()) if toy else {"emoji": [], "styles": {}}
    anchors = args.anchor * len(args.target) if len(args.anchor) == 1 else args.anchor
    rows = []
    for target, anchor in zip(args.target, anchors, strict=True):
        if args.concept_type == "style":
            article = "an" if anchor[0].lower() in "aeiou" else "a"
            for s in STYLE_SUBJECTS:
                concept, rival = f"{s}, in the style of {target}", f"{article} {anchor} of a {s}"
                rows += [("target", concept, concept, rival), ("anchor", rival, rival, concept)]
                nicknames = data["styles"].get(target.lower(), []) if args.ood is None else args.ood
                rows += [("ood", f"{s}, {nickname}", concept, rival) for nickname in nicknames]
                keep = data["styles"] if args.keep is None else args.keep
                others = [o for o in keep if o not in [t.lower() for t in args.target]]
                rows += [("unrelated", f"{s}, in the style of {o}", f"{s}, in the style of {o}", rival) for o in others]
            continue
        rows += [("target", p.format(target), target, anchor) for p in ("{}", "an emoji of {}" if toy else "a photo of {}")]
        entry = emoji_entry(data, target) or {"nicknames": [], "groups": {}}
        rows += [("ood", p, target, anchor) for p in (entry["nicknames"] if args.ood is None else args.ood)]
        rows += [("anchor", p.format(anchor), anchor, target) for p in ("{}", "an emoji of {}" if toy else "a photo of {}")]
        near, far = [], args.keep or []
        if args.keep is None:  # four that share a group with the target, six that do not
            taken = {*args.target, *anchors, entry.get("name", "")}
            names = [e for e in data["emoji"] if not {e["name"], *e["synonyms"]} & {t.lower() for t in taken}]
            near = [e["name"] for e in names if set(e["groups"]) & set(entry["groups"])]
            far = [e["name"] for e in names if not set(e["groups"]) & set(entry["groups"])]
            near, far = near[:: max(1, len(near) // 4)][:4], far[:: max(1, len(far) // 6)][:6]
        rows += [("related", k, k, anchor) for k in near] + [("unrelated", k, k, anchor) for k in far]
    return list(dict.fromkeys(rows))


# ---- 3. models ----------------------------------------------------------------------------------------------------


def load_models(args, device):
    """The pipeline, the UNet weights before, and the UNet weights after (only those that differ are kept twice)."""
    try:
        pipe = StableDiffusionPipeline.from_pretrained(args.before, safety_checker=None, requires_safety_checker=False,
                                                       use_safetensors=True, dtype=torch.float32).to(device)  # fmt: skip
    except Exception as e:  # whatever the hub client raises
        stop(f"--before {args.before} cannot be loaded: {str(e).splitlines()[0]}")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    if (args.after / "delta.safetensors").is_file():
        after = load_file(args.after / "delta.safetensors")
    elif (args.after / "unet").is_dir():
        after = pipe.unet.from_pretrained(args.after / "unet", use_safetensors=True).state_dict()
    else:
        stop(f"--after {args.after}: expected delta.safetensors (a run folder) or unet/ (a pipeline folder) there")
    state = pipe.unet.state_dict()
    if unknown := set(after) - set(state):
        stop(f"--after {args.after} does not fit --before: {sorted(unknown)[0]} is not a weight of that UNet")
    return pipe, {n: state[n].clone() for n in after}, after


def load_clip(folder, device):
    """Returns two functions: texts -> (n, d), PIL pictures -> (n, d)."""
    try:
        clip = CLIPModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32).to(device).eval()
        tokenizer, processor = CLIPTokenizer.from_pretrained(folder), CLIPImageProcessorPil.from_pretrained(folder)
    except Exception as e:
        stop(f"--clip {folder} cannot be loaded: {str(e).splitlines()[0]}")

    def unwrap(features):  # transformers 5 returns an object, 4 the tensor
        return getattr(features, "pooler_output", features)

    @torch.no_grad()
    def embed_texts(texts):
        ids = tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt").to(device)
        return unwrap(clip.get_text_features(**ids)).float().cpu()

    @torch.no_grad()
    def embed_images(images):
        parts = [processor(images[i : i + 64], return_tensors="pt").to(device) for i in range(0, len(images), 64)]
        return torch.cat([unwrap(clip.get_image_features(**p)) for p in parts]).float().cpu()

    return embed_texts, embed_images


@torch.no_grad()
def draw(pipe, prompts, seeds, toy, label):
    """One picture per prompt and seed; a picture depends on its own seed alone, so before and after can be compared."""
    device, images = pipe.device, []
    chunk = 48 if toy else 4
    for i in tqdm(range(0, len(prompts), chunk), label):
        g = [torch.Generator().manual_seed(s) for s in seeds[i : i + chunk]]
        with torch.autocast(device.type, torch.bfloat16):
            images += pipe(prompts[i : i + chunk], generator=g, num_inference_steps=15 if toy else 25,
                           guidance_scale=6.0).images  # fmt: skip
    return images


# ---- 4. pictures --------------------------------------------------------------------------------------------------


def draw_before_after(rows, before, after, per_row, path, shown=4, tile=88):
    """Rows: prompts. Columns: before | after at the same seeds. before, after: PIL pictures, per_row of them for each row."""
    picked = []  # two prompts of each kind
    for kind in KINDS:
        of_kind = [i for i, r in enumerate(rows) if r[0] == kind]
        picked += of_kind[:: max(1, len(of_kind) // 2)][:2]
    font, shown = ImageFont.load_default(size=13), min(shown, per_row)
    left, gap, top = 230, 24, 26
    image = Image.new("RGB", (left + 2 * shown * tile + gap + 8, top + len(picked) * (tile + 4)), "white")
    pen = ImageDraw.Draw(image)
    for side, (title, pictures) in enumerate((("before", before), ("after", after))):
        x0 = left + side * (shown * tile + gap)
        pen.text((x0 + 4, 6), title, fill="black", font=font)
        for line, i in enumerate(picked):
            y = top + line * (tile + 4)
            for k in range(shown):
                image.paste(pictures[i * per_row + k].resize((tile - 4, tile - 4), Image.BICUBIC), (x0 + k * tile, y))
            if side == 0:
                pen.text((8, y + tile // 2 - 22), rows[i][0], fill="gray", font=font)
                words, text = rows[i][1].split(), ""
                for word in words:  # wrap the prompt to the width of its column
                    fits = pen.textlength(f"{text.splitlines()[-1] if text else ''} {word}", font=font) < left - 24
                    text += (" " if fits and text else "\n" if text else "") + word
                pen.text((8, y + tile // 2 - 4), text, fill="black", font=font)
    image.save(path)


def draw_curves(log, path):
    """A training log as a picture: one panel per quantity, by iteration."""
    panels = [("discriminator loss L_D", "loss_d"), ("discriminator accuracy", "disc_acc"), ("unlearning loss L_u", "loss_u"),
              ("retaining loss L_r", "loss_r"), ("cos(G_u, G_r)", "cos"), ("share of conflicts", "conflict")]  # fmt: skip
    w, h, font = 400, 190, ImageFont.load_default(size=12)
    image = Image.new("RGB", (2 * w, 3 * h), "white")
    pen = ImageDraw.Draw(image)
    for k, (title, key) in enumerate(panels):
        points = [(row["step"], row[key]) for row in log if key in row]
        left, top, right, bottom = k % 2 * w + 60, k // 2 * h + 26, k % 2 * w + w - 20, k // 2 * h + h - 26
        pen.text((left, top - 20), title, fill="black", font=font)
        pen.rectangle((left, top, right, bottom), outline="gray")
        if not points:
            pen.text((left + 8, top + 8), "not measured in this run", fill="gray", font=font)
            continue
        (low, high), last = (f(v for _, v in points) for f in (min, max)), max(log[-1]["step"], 1)
        at = [(left + s / last * (right - left), bottom - (bottom - top) * (v - low) / ((high - low) or 1)) for s, v in points]
        pen.line(at, fill="darkblue", width=2)
        pen.text((left - 50, top - 6), f"{high:.3g}", fill="gray", font=font)
        pen.text((left - 50, bottom - 10), f"{low:.3g}", fill="gray", font=font)
        pen.text((right - 30, bottom + 4), str(last), fill="gray", font=font)
    image.save(path)


# ---- 5. a concept -------------------------------------------------------------------------------------------------


def concept(args, device):
    pipe, weights_before, weights_after = load_models(args, device)
    toy = pipe.unet.config.sample_size < 32
    clip_name = args.clip or (str(HERE / "emoji/clip") if toy else "openai/clip-vit-base-patch32")
    embed_texts, embed_images = load_clip(clip_name, device)
    rows, out = prompt_rows(args, toy), args.out or args.after
    n = args.num_images or min(8, max(2, 128 // len(rows)))
    prompts = [prompt for _, prompt, _, _ in rows for _ in range(n)]
    seeds = [args.seed * 1_000_003 + 500_000 + k for _ in rows for k in range(n)]  # not the seeds that doco.py uses

    report = {"target": args.target, "anchor": args.anchor, "clip": clip_name, "cs_scale": "250 * max(cos, 0)",
              "seed": args.seed, "images_per_prompt": n, "before": {}, "after": {}, "prompts": []}  # fmt: skip
    pictures, per_row = {}, {}
    concepts, rivals = (embed_texts([r[i] for r in rows]).repeat_interleave(n, 0) for i in (2, 3))
    for when, weights in (("before", weights_before), ("after", weights_after)):
        pipe.unet.load_state_dict(weights, strict=False)
        pictures[when] = draw(pipe, prompts, seeds, toy, f"drawing {when}")
        image_emb = embed_images(pictures[when])
        ca, cs = clip_accuracy(image_emb, concepts, rivals).view(-1, n), clip_score(image_emb, concepts).view(-1, n)
        per_row[when] = ca.mean(1), cs.mean(1)
        for kind in KINDS:
            if mine := [i for i, r in enumerate(rows) if r[0] == kind]:
                values = {"CA": ca[mine].mean().item(), "CS": cs[mine].mean().item()}
                report[when][kind] = {k: round(v, 2) for k, v in values.items()} | {"n": len(mine) * n}
    for i, (kind, prompt, concept, rival) in enumerate(rows):
        scores = {f"{m}_{when}": round(per_row[when][j][i].item(), 2) for j, m in enumerate(("CA", "CS")) for when in per_row}
        report["prompts"].append({"kind": kind, "prompt": prompt, "concept": concept, "rival": rival, **scores})

    write_report(out, report)
    draw_before_after(rows, pictures["before"], pictures["after"], n, out / "before_after.png")
    if (out / "log.jsonl").is_file():
        draw_curves([json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()], out / "curves.png")

    print(f"\n{'':12}{'CA before':>10}{'after':>8}{'CS before':>12}{'after':>8}{'n':>6}    CLIP: {clip_name}")
    for kind in KINDS:
        if kind in report["before"]:
            b, a = report["before"][kind], report["after"][kind]
            print(f"{kind:12}{b['CA']:10.1f}{a['CA']:8.1f}{b['CS']:12.1f}{a['CS']:8.1f}{a['n']:6}")
        elif kind != "related":
            print(f"{kind:12}  not measured: no such prompts known; give some with --{'keep' if kind == 'unrelated' else kind}")
    print(f"pictures: {out / 'before_after.png'}")


# ---- 6. a picture -------------------------------------------------------------------------------------------------


class Features(torch.nn.Module):
    """A CLIP's eyes. Pictures (n, 3, H, W) in [0, 1] -> (n, d) for FID, and per layer for the perceptual distance."""

    def __init__(self, folder, device):
        super().__init__()
        clip = CLIPModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32).to(device).eval()
        self.clip, self.size, self.num_features = clip, clip.config.vision_config.image_size, clip.config.projection_dim
        processor = CLIPImageProcessorPil.from_pretrained(folder)
        stats = processor.image_mean, processor.image_std
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in stats)

    def vision(self, x):
        x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        return self.clip.vision_model((x - self.mean) / self.std, output_hidden_states=True)

    @torch.no_grad()
    def forward(self, x):
        return self.clip.visual_projection(self.vision(x).pooler_output)

    @torch.no_grad()
    def distance(self, x, y):
        """As LPIPS (Zhang et al. 2018) without its learned weights: squared distance of unit features, over layers -> (n,)."""
        layers = zip(self.vision(x).hidden_states, self.vision(y).hidden_states, strict=True)
        unit = lambda h: F.normalize(h, dim=-1)  # noqa: E731
        return torch.stack([(unit(a) - unit(b)).square().sum(-1).mean(1) for a, b in layers]).mean(0)


def fid(features, real, drawn, device):
    """Frechet distance (Heusel et al. 2017) between the features of two sets of pictures (n, 3, H, W) in [0, 1]."""
    metric = FrechetInceptionDistance(feature=features, normalize=True, input_img_size=tuple(real.shape[1:]))
    for x, is_real in ((real, True), (drawn, False)):
        for part in x.split(64):
            metric.update(part.to(device), real=is_real)
    return metric.compute().item()


@torch.no_grad()
def denoise_ancestral(net, scheduler, z, noise, cond, g):
    """The probe of a DDPM or Stable Diffusion 1.x: z (1, C, h, w) noised to t = 250, and back in 251 steps -> (n, C, h, w)."""
    scheduler.set_timesteps(1000)
    z = scheduler.add_noise(z, noise, torch.tensor([250]))
    for t in range(250, -1, -1):
        says = net(z, timestep=torch.full((len(z),), t, device=z.device), **cond).sample
        z = scheduler.step(says, t, z, generator=g).prev_sample
    return z


@torch.no_grad()
def denoise_flow(net, z, noise, cond):
    """The probe of Stable Diffusion 3: z (1, C, h, w) mixed half and half with noise, and back in 25 Euler steps."""
    z = (z + noise) / 2
    for k in range(25, 0, -1):
        z = z - 0.02 * net(z, timestep=torch.full((len(z),), 20.0 * k, device=z.device), **cond).sample
    return z


def load_copy_detector(args, toy, device):
    """A function of pictures (n, 3, H, W) in [0, 1] -> unit vectors (n, d), and its name; None where there is none."""
    if args.sscd:
        try:
            net = torch.jit.load(args.sscd, map_location=device).eval()
        except (RuntimeError, ValueError) as e:
            stop(f"--sscd {args.sscd} cannot be loaded as TorchScript: {str(e).splitlines()[0]}")
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        resize = lambda x: F.interpolate(x, (320, 320), mode="bilinear", antialias=True)  # noqa: E731
        return lambda x: F.normalize(net((resize(x.to(device)) - mean) / std), dim=-1).cpu(), Path(args.sscd).name
    if not toy:
        return None, "not measured: give the file of SSCD with --sscd"
    net = CLIPVisionModelWithProjection.from_pretrained(HERE / "emoji/copy", dtype=torch.float32).to(device).eval()
    resize = lambda x: F.interpolate(x, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)  # noqa: E731
    return lambda x: F.normalize(net(resize(x.to(device)) * 2 - 1).image_embeds, dim=-1).cpu(), "emoji/copy"


class Drawer:
    """One model, whatever its family: draws from seeds, and denoises a noised picture."""

    def __init__(self, model, prompt, device):
        self.pipe = load_pipeline(model, dtype=torch.float32).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.family, self.prompt, self.device = type(self.pipe).__name__, prompt, device
        self.ddpm, self.flow = self.family == "DDPMPipeline", self.family == "StableDiffusion3Pipeline"
        self.net = self.pipe.transformer if self.flow else self.pipe.unet
        side = self.net.config.sample_size
        self.toy, self.size = (side <= 64, side) if self.ddpm else (side < 32, side * self.pipe.vae_scale_factor)

    def become(self, after):
        """Takes the weights of a run folder (its LoRA, or its pipeline) or of a pipeline folder."""
        folder = after / "pipeline" if (after / "pipeline").is_dir() else after
        name = "transformer" if self.flow else "unet"
        if (after / "pytorch_lora_weights.safetensors").is_file():
            self.pipe.load_lora_weights(after)
        elif (folder / name).is_dir():
            self.net.load_state_dict(type(self.net).from_pretrained(folder / name, use_safetensors=True).state_dict())
        else:
            stop(f"--after {after}: expected pipeline/ or pytorch_lora_weights.safetensors (a run folder) or {name}/ there")

    @torch.no_grad()
    def draw(self, seeds, label):  # -> (n, 3, H, W) in [0, 1]
        pipe, chunk = self.pipe, 32 if self.toy else 4
        options = {"prompt": self.prompt, "guidance_scale": 4.0 if self.toy else 7.0}
        if self.ddpm:
            pipe, options = DDIMPipeline(self.net, DDIMScheduler.from_config(self.pipe.scheduler.config)), {}
            pipe.set_progress_bar_config(disable=True)
        pictures = []
        for i in tqdm(range(0, len(seeds), chunk), label):
            g = [torch.Generator().manual_seed(s) for s in seeds[i : i + chunk]]
            many = {"batch_size": len(g)} if self.ddpm else {"num_images_per_prompt": len(g)}
            x = pipe(generator=g, num_inference_steps=25, output_type="np", **many, **options).images
            pictures.append(torch.from_numpy(x).permute(0, 3, 1, 2).float())
        return torch.cat(pictures)

    @torch.no_grad()
    def probe(self, x, seed, n=4):
        """Noises one picture (3, H, W) in [-1, 1] in n ways and denoises it again -> (n, 3, H, W) in [0, 1]."""
        g, pipe = torch.Generator().manual_seed(seed), self.pipe
        z, cond = x[None].to(self.device), {}
        if not self.ddpm:
            vae = pipe.vae.config
            z = (pipe.vae.encode(z).latent_dist.mode() - (vae.shift_factor or 0)) * vae.scaling_factor
            if self.flow:
                rows, _, pooled, _ = pipe.encode_prompt(self.prompt, None, None, do_classifier_free_guidance=False)
                cond = {"encoder_hidden_states": rows.expand(n, -1, -1), "pooled_projections": pooled.expand(n, -1)}
            else:
                rows, _ = pipe.encode_prompt(self.prompt, self.device, 1, False)
                cond = {"encoder_hidden_states": rows.expand(n, -1, -1)}
        noise = torch.randn(n, *z.shape[1:], generator=g).to(self.device)
        if self.flow:
            z = denoise_flow(self.net, z, noise, cond)
        else:
            scheduler = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=self.ddpm)
            z = denoise_ancestral(self.net, scheduler, z, noise, cond, g)
        if not self.ddpm:
            z = pipe.vae.decode(z / vae.scaling_factor + (vae.shift_factor or 0)).sample
        return (z.clamp(-1, 1).cpu() + 1) / 2


def draw_instances(x_f, surrogates, probes, samples, copies, path, tile=96):
    """Above: picture, surrogate, three probes before | after. Below: same-seed pictures before over after, copies first."""
    font, left, top, shown = ImageFont.load_default(size=13), 76, 26, 8
    order = (sorted(range(len(copies)), key=lambda i: -copies[i])[: shown // 2] if max(copies) >= 0.4 else [])
    order += [i for i in range(len(copies)) if i not in order][: shown - len(order)]
    height = 2 * top + (len(x_f) + 2) * tile
    image = Image.new("RGB", (left + shown * tile + 8, height), "white")
    pen = ImageDraw.Draw(image)

    def put(x, column, y):
        image.paste(to_image(2 * x - 1).resize((tile - 4, tile - 4), Image.LANCZOS), (left + column * tile, y))

    for column, title in ((0, "to forget"), (1, "surrogate"), (2, "probe: before"), (5, "probe: after")):
        pen.text((left + column * tile, 6), title, fill="black", font=font)
    for k, x in enumerate(x_f):
        y = top + k * tile
        put((x + 1) / 2, 0, y)
        if surrogates[k]:
            image.paste(surrogates[k].resize((tile - 4, tile - 4), Image.LANCZOS), (left + tile, y))
        for column in range(3):
            put(probes["before"][k][column], 2 + column, y)
            put(probes["after"][k][column], 5 + column, y)
    y = top + len(x_f) * tile + top
    title = "same seeds" + (" (copies of the forgotten picture first)" if max(copies) >= 0.4 else "")
    pen.text((left, y - 20), title, fill="black", font=font)
    for line, when in enumerate(("before", "after")):
        pen.text((8, y + line * tile + tile // 2 - 10), when, fill="black", font=font)
        for column, i in enumerate(order):
            put(samples[when][i], column, y + line * tile)
    image.save(path)


def instance(args, device):
    drawer, out = Drawer(args.before, args.prompt, device), args.out or args.after
    if drawer.ddpm and args.prompt:
        stop(f"--prompt {args.prompt!r}: {args.before} is unconditional, it takes no prompt")
    clip_name = args.clip or (str(HERE / "emoji/clip") if drawer.toy else "openai/clip-vit-base-patch32")
    detect, detector = load_copy_detector(args, drawer.toy, device)
    x_f = [read_exact(f, drawer.size, "--forget") for f in args.forget]
    seeds = [args.seed * 1_000_003 + 500_000 + k for k in range(args.num_images or 128)]  # not those of instance_unlearn.py
    probes, samples = {}, {}
    for when in ("before", "after"):
        if when == "after":
            drawer.become(args.after)
        probes[when] = [drawer.probe(x, args.seed + 7, n=4) for x in tqdm(x_f, f"probing {when}")]
        samples[when] = drawer.draw(seeds, f"drawing {when}")

    report = {"forget": [str(f) for f in args.forget], "prompt": args.prompt, "seed": args.seed, "copy_detector": detector,
              "features": clip_name, "probe": "t = 250, ancestral" if not drawer.flow else "s = 0.5, Euler", "n_probes": 4,
              "n": len(seeds), "pictures": []}  # fmt: skip
    copies = torch.zeros(len(seeds))  # similarity of what was drawn before to the nearest picture to forget
    for k, x in enumerate(x_f if detect else []):
        with torch.no_grad():
            truth, before, after = (detect(y) for y in ((x[None] + 1) / 2, probes["before"][k], probes["after"][k]))
            drawn = {when: detect(samples[when]) @ truth[0] for when in samples}
        copies = torch.maximum(copies, drawn["before"])
        row = {"before": (before @ truth[0]).mean(), "after": (after @ truth[0]).mean()}
        row["between"] = (before * after).sum(1).mean()  # the paper's SSCD: the two probes, noise by noise
        row |= {f"copies_drawn_{when}": (sim >= 0.4).float().mean() for when, sim in drawn.items()}
        report["pictures"].append({"file": str(args.forget[k])} | {name: round(v.item(), 3) for name, v in row.items()})

    # What should stay: all pictures from the same seeds but those that were copies before
    rest = copies < 0.4
    features, b, a = Features(clip_name, device), samples["before"].to(device), samples["after"].to(device)
    ssim = structural_similarity_index_measure(a[rest], b[rest], data_range=1.0, reduction="none")
    report |= {"n_rest": int(rest.sum()), "ssim": ssim.mean().item()}
    report["distance"] = features.distance(a[rest], b[rest]).mean().item()
    real = None
    if args.real:
        files = sorted(f for f in args.real.rglob("*") if f.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
        if len(files) < 2:
            stop(f"--real {args.real}: expected a folder with at least two pictures")
        real = torch.stack([(read_any(f, drawer.size) + 1) / 2 for f in files[:10_000]])
    for name, reference in (("fid_pre", b), ("fid_real", real)):
        if reference is not None:
            report[name] = fid(features, reference, a, device)
    report = {k: round(v, 4) if isinstance(v, float) else v for k, v in report.items()}
    write_report(out, report)
    surrogates = [Image.open(f) if (f := args.after / f"surrogate-{k}.png").is_file() else None for k in range(len(x_f))]
    draw_instances(x_f, surrogates, probes, samples, copies.tolist(), out / "before_after.png")

    print(f"\n{'copy similarity':44}{'before':>8}{'after':>8}    detector: {detector}")
    for row in report["pictures"]:
        verdict = "forgotten" if row["after"] < 0.4 else "NOT forgotten"
        print(f"{Path(row['file']).name:44}{row['before']:8.2f}{row['after']:8.2f}    < 0.4: {verdict}")
    print(f"{'SSIM (1 is unchanged)':44}{report['ssim']:16.3f}    {report['n_rest']} pictures, same seeds")
    print(f"{'perceptual distance (0 is unchanged)':44}{report['distance']:16.3f}    features: {clip_name}")
    for name, label in (("fid_pre", "FID_pre, against the pictures before"), ("fid_real", "FID_real, against real pictures")):
        value = f"{report[name]:16.4f}    {len(seeds)} pictures" if name in report else "    not measured: give --real"
        print(f"{label:44}{value}")
    print(f"pictures: {out / 'before_after.png'}")


if __name__ == "__main__":
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    concept(args, device) if args.task == "concept" else instance(args, device)
