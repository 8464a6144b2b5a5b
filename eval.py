"""Did it forget, and what else went with it? Scores two models on the same prompts and the same seeds.

    python eval.py concept --before emoji/sd --after runs/doco-grumpy-cat --target "Grumpy Cat" --anchor Cat
    python eval.py concept --before CompVis/stable-diffusion-v1-4 --after runs/doco-snoopy --target Snoopy --anchor Dog \\
        --ood "Charlie Brown's beagle" --keep Mickey Spongebob Pikachu

CS, CLIP score (Hessel et al. 2021, scale of DoCo's tables): 2.5 * max(cos(picture, concept), 0) * 100, mean over pictures.
CA, CLIP accuracy: share of pictures, in per cent, that CLIP finds nearer the concept than its rival. The rival is the
anchor, for the target, its nicknames and all that should stay; for the anchor it is the target.
Prompts are of five kinds: target; ood (out of distribution: no word of the target, yet they draw it); anchor; related
(neighbours of the target, hardest to keep: known for the embedded model alone); unrelated.

Writes into --out: metrics.json, before_after.png and, where there is a log.jsonl, curves.png.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

HERE = Path(__file__).resolve().parent
KINDS = ("target", "ood", "anchor", "related", "unrelated")
STYLE_SUBJECTS = ("cat", "dog", "penguin", "frog", "rose", "pizza", "banana", "ghost")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("task", choices=("concept",))
    p.add_argument("--before", required=True, help="the original model: pipeline folder or hub id")
    p.add_argument("--after", type=Path, required=True, help="pipeline folder, or a run folder with delta.safetensors")
    p.add_argument("--target", nargs="+", required=True)
    p.add_argument("--anchor", nargs="+", required=True)
    p.add_argument("--concept-type", choices=("object", "style"), default="object")
    p.add_argument("--ood", nargs="*", help="prompts without the target's words that draw it (emoji model: nicknames)")
    p.add_argument("--keep", nargs="*", help="unrelated concepts (emoji model: four neighbours, six strangers)")
    p.add_argument("--clip", help="CLIP folder or hub id (default: emoji/clip for toys, else openai/clip-vit-base-patch32)")
    p.add_argument("--num-images", type=int, help="pictures per prompt (default: 2 to 8, about 128 in all)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, help="where the report goes (default: --after)")
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


# ---- 5. the run ---------------------------------------------------------------------------------------------------


def main(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
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

    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json.tmp").write_text(json.dumps(report, indent=1))
    os.replace(out / "metrics.json.tmp", out / "metrics.json")
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


if __name__ == "__main__":
    main(parse_args())
