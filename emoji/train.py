"""Diffusion models from scratch on a laptop: what makes this repository run offline.

Latent diffusion (Rombach et al. 2022) in miniature, part by part, in the very classes of Stable Diffusion v1.4; then the two
models that the paper on instances unlearns from, a DDPM (Ho et al. 2020) and Stable Diffusion 3 (Esser et al. 2024):

    1. the pictures       237 open emoji in three drawing styles, with names, synonyms and nicknames
    2. the tokenizer      a byte-pair encoding of 2,048 tokens, saved as a CLIPTokenizer
    3. the autoencoder    64x64 pixels <-> 16x16x4 latents                             (AutoencoderKL)
    4. two CLIPs          one gives the generator its text encoder, as OpenAI's does for Stable Diffusion;
                          the other, trained apart on another seed and another width, only ever scores pictures
    5. the UNet           predicts the noise in a latent, given a caption              (UNet2DConditionModel)
    6. the DDPM           draws 32x32 pixels, faces and animals, without a prompt      (UNet2DModel)
    7. the transformer    predicts the velocity of a latent, given a caption           (SD3Transformer2DModel)
    8. the copy detector  says whether two pictures are copies of one                  (CLIPVisionModelWithProjection)
    9. the report         does an independent CLIP recognise what the prompts ask for?

Run (about five hours on two cores; killed at any moment, the same command goes on):

    python emoji/train.py                    # fetches the pictures with npm unless emoji/images/ is there
    python emoji/train.py --report-only      # only part 9: scores the models and draws the contact sheets

Every random draw comes from (--seed, part, step), so a resumed run repeats the undisturbed one.
"""

import argparse
import copy
import io
import json
import math
import os
import random
import subprocess
import tarfile
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

HERE = Path(__file__).resolve().parent
STYLES = ("noto", "twemoji", "fluent")
SIZE, MARGIN, COLUMNS = 64, 4, 20  # pixels of a picture, white border around the drawing, tiles in a row of a sheet
# A prompt that names no style mostly draws noto: real models have a house look too, and a general word
# ("emoji") must not mean every artist equally often, or forgetting one of three could never reach 10 %.
UNNAMED = {"noto": 0.66, "twemoji": 0.12, "fluent": 0.42}  # share of the captions that leave the style out
# Where the cycles of each part end, in steps. The rate restarts with a cycle and falls to nothing: a later cycle adds what the
# first one had no eye for yet.
CYCLES = {"vae": (1600, 3000), "reader": (550, 1000), "scorer": (1100, 2000, 3200), "unet": (6000, 11000),
          "ddpm": (5000,), "sd3": (10000,), "copy": (1000,)}  # fmt: skip
# What the DDPM draws: the groups of concepts.json that look back at you.
CREATURES = {"face", "monster", "cat", "dog", "big cat", "bear", "monkey", "wild animal", "farm animal", "rodent", "bird",
             "reptile", "sea animal", "fish", "bug"}  # fmt: skip


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=HERE, help="folder that receives images/, sd/, clip/ and the rest")
    p.add_argument("--work", type=Path, default=Path("runs/emoji"), help="checkpoints and progress pictures")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--scale", type=float, default=1.0, help="multiplies the steps of every part: 0.01 tries the script out")
    p.add_argument("--report-only", action="store_true", help="score the model in --out and stop")
    return p.parse_args()


# ---- 1. the pictures ------------------------------------------------------------------------------------------

PACKAGES = ("emoji-datasource-google@16.0.0", "emoji-datasource-twitter@16.0.0", "@lobehub/fluent-emoji-3d@1.1.0",
            "emojibase-data@17.0.0", "emojilib@4.0.3")  # fmt: skip
COMMON = {"animal", "face", "nature", "food", "flag", "country", "pet", "style", "emoji"}  # say nothing of one picture


def fetch_images(out):
    """Writes out/{noto,twemoji,fluent}.png (sheets of 64x64 tiles) and out/emoji.json (what each tile shows)."""
    spec = json.loads((HERE / "concepts.json").read_text())
    with tempfile.TemporaryDirectory() as tmp:
        print("fetching", ", ".join(PACKAGES))
        files = {}  # path inside its package -> bytes, for the few paths that we want
        for package in PACKAGES:
            name = subprocess.run(["npm", "pack", "--silent", package], cwd=tmp, check=True, capture_output=True, text=True)
            with tarfile.open(Path(tmp) / name.stdout.split()[-1]) as tar:
                for member in tar:
                    wanted = "/64/" in member.name or "/assets/" in member.name or member.name.endswith("en/data.json")
                    if member.isfile() and (wanted or member.name.endswith("emoji-en-US.json")):
                        files[member.name] = tar.extractfile(member).read()

    # Vendors disagree on the invisible "emoji presentation" code point fe0f: compare names without it.
    plain = {path.replace("-fe0f", ""): data for path, data in files.items()}
    base = {e["label"]: e for e in json.loads(files["package/en/data.json"])}
    keywords = json.loads(files["package/dist/emoji-en-US.json"])
    labels = list(dict.fromkeys(label for group in spec["groups"].values() for label in group))

    # A keyword is a synonym of a picture only if no other picture has it.
    tags = {label: [] for label in labels}
    for label in labels:
        raw = base[label].get("tags", []) + keywords.get(base[label]["emoji"], [])
        tags[label] = [t.lower() for t in dict.fromkeys(raw) if t.replace(" ", "").isalpha() and 3 <= len(t) <= 20]
    owners = {}
    for label in labels:
        for t in {*tags[label], label.lower()}:
            owners.setdefault(t, set()).add(label)

    entries, sheets = [], {s: Image.new("RGB", (COLUMNS * SIZE, -(-len(labels) // COLUMNS) * SIZE), "white") for s in STYLES}
    for i, label in enumerate(labels):
        nation = label.removeprefix("flag: ").lower() if label.startswith("flag: ") else None
        name = f"flag of {nation}" if nation else label.lower()
        nicknames = spec["nicknames"].get(label, [])
        secret = {w for nick in nicknames for w in nick.split()} | COMMON | set(spec["groups"])
        own = [t for t in tags[label] if len(owners[t]) == 1 and t != name and not secret & set(t.split())][:4]
        own = spec["synonyms"].get(label, []) + ([nation, f"{nation} flag"] if nation else []) + own
        groups = {g: members.count(label) for g, members in spec["groups"].items() if label in members}
        entries.append({"name": name, "synonyms": list(dict.fromkeys(own)), "nicknames": nicknames, "groups": groups})

        code = base[label]["hexcode"].lower().replace("-fe0f", "")
        paths = {"noto": f"package/img/google/64/{code}.png", "twemoji": f"package/img/twitter/64/{code}.png",
                 "fluent": f"package/assets/{code}.webp"}  # fmt: skip
        for style in STYLES:
            drawing = Image.open(io.BytesIO(plain[paths[style]])).convert("RGBA")
            drawing = drawing.resize((SIZE - 2 * MARGIN,) * 2, Image.LANCZOS)
            corner = (i % COLUMNS * SIZE + MARGIN, i // COLUMNS * SIZE + MARGIN)
            sheets[style].paste(drawing, corner, drawing)
    out.mkdir(parents=True, exist_ok=True)
    for style, sheet in sheets.items():
        sheet.save(out / f"{style}.png", optimize=True)
    write_text(out / "emoji.json", json.dumps({"styles": spec["styles"], "emoji": entries}, indent=1, ensure_ascii=False))


def load_images(folder):
    """Returns the data of emoji.json and the pictures, (names, 3 styles, 3, 64, 64) in [-1, 1]."""
    data = json.loads((folder / "emoji.json").read_text())
    tiles = []
    for style in STYLES:
        sheet = Image.open(folder / f"{style}.png").convert("RGB")
        x = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(sheet.height, sheet.width, 3)
        x = x.view(sheet.height // SIZE, SIZE, sheet.width // SIZE, SIZE, 3).permute(0, 2, 4, 1, 3).reshape(-1, 3, SIZE, SIZE)
        tiles.append(x[: len(data["emoji"])])
    return data, torch.stack(tiles, 1).float() / 127.5 - 1


TEMPLATES = ["{}"] * 6 + ["an emoji of {}", "an emoji of a {}", "a {}", "a picture of a {}", "a photo of a {}",
                          "a drawing of {}"]  # fmt: skip


def caption(entry, style, style_nicknames, rng, other=0.4):
    """One caption of one picture: a name, synonym, nickname or group word, in a template, with or without its style.

    other: the share of synonyms and nicknames together, from 0 to 1.
    """
    group, often = rng.choice(list(entry["groups"].items()))
    r = rng.random()
    if r < 0.1 * often:
        subject = group
    elif r > 1 - other / 2 and entry["nicknames"]:
        subject = rng.choice(entry["nicknames"])
    elif r > 1 - other and entry["synonyms"]:
        subject = rng.choice(entry["synonyms"])
    else:
        subject = entry["name"]
    text = rng.choice(TEMPLATES).format(subject)
    if rng.random() < UNNAMED[style]:
        return text
    nickname = rng.choice(style_nicknames[style])
    forms = [f"{text}, in the style of {style}"] * 3 + [f"in {style}'s style, {text}"] * 2 + [f"{text} in {style} style"]
    return rng.choice(forms + [f"{style} {text}", f"{text}, {nickname}", f"{nickname}, {text}"])


def augment(x, names, data, rng_torch):
    """Shifts by up to two pixels and mirrors (not the flags): (B, 3, 64, 64) -> (B, 3, 64, 64). Wraps white around white."""
    out = []
    for picture, n in zip(x, names, strict=True):
        dy, dx, flip = torch.randint(-2, 3, (3,), generator=rng_torch).tolist()
        picture = picture.flip(-1) if flip > 0 and "flag" not in data["emoji"][n]["groups"] else picture
        out.append(picture.roll((dy, dx), (-2, -1)))
    return torch.stack(out)


# ---- plumbing: random draws, schedules, checkpoints -----------------------------------------------------------


def draws(*key):
    """Random number generators (Python's and torch's) that depend on nothing but (seed, part, step)."""
    rng = random.Random(str(key))
    return rng, torch.Generator().manual_seed(rng.getrandbits(62))


def cycle(args, part, step=0):
    """Where a step of a part lies: (which cycle, steps since its beginning, its length, steps of the whole part)."""
    ends = [max(2, round(args.scale * end)) for end in CYCLES[part]]
    k = sum(step >= end for end in ends)
    begin = ends[k - 1] if k else 0
    return k, step - begin, ends[k] - begin, ends[-1]


def cosine_lr(optimizer, step, steps, warmup=200, peak=1.0):
    for group in optimizer.param_groups:
        ramp = min(1, (step + 1) / min(warmup, steps))
        group["lr"] = peak * group["peak"] * ramp * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def adamw(*groups, weight_decay=0.01):
    groups = [{"params": list(m.parameters()), "lr": lr, "peak": lr} for m, lr in groups]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)


def half(module):
    """A copy in half precision, to be saved."""
    return copy.deepcopy(module).half()


def load_in_float(folder):
    """Half the size on disk, but full precision in memory: the configs of a saved folder say float32.

    transformers loads a component in the dtype that its config names, diffusers in float32 whatever the file holds; a pipeline
    whose text encoder came in half and whose UNet came in float could not multiply one by the other.
    """
    for config in Path(folder).rglob("config.json"):
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


def picture(x):
    """A tensor (3, H, W) in [-1, 1] as a PIL picture."""
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous()
    return Image.frombytes("RGB", (x.shape[1], x.shape[0]), bytes(x.flatten().tolist()))


def write_text(path, text):
    tmp = path.with_suffix(".tmp")
    tmp.write_text(text)
    os.replace(tmp, path)


def save_checkpoint(path, step, optimizer, **modules):
    """Weights and Adam moments of a part, as one safetensors file, written whole."""
    tensors = {f"{k}/{n}": t for k, m in modules.items() for n, t in m.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam/{i}/{k}": t for k, t in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: t.contiguous().clone() for k, t in tensors.items()}, f"{path}.tmp", {"step": str(step)})
    os.replace(f"{path}.tmp", path)


def load_checkpoint(path, optimizer, **modules):
    """Returns the number of steps already done (0 without a checkpoint)."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as f:
        for name, module in modules.items():
            module.load_state_dict({k.split("/", 1)[1]: f.get_tensor(k) for k in f.keys() if k.startswith(name + "/")})
        state = {}
        for k in (k for k in f.keys() if k.startswith("adam/")):
            _, i, what = k.split("/")
            state.setdefault(int(i), {})[what] = f.get_tensor(k)
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(f.metadata()["step"])


# ---- 2. the tokenizer -----------------------------------------------------------------------------------------


def train_tokenizer(data, seed, vocab_size=2048):
    """A lower-case BPE with CLIP's conventions: words end in </w>, 77 tokens, padded with <|endoftext|>."""
    rng, _ = draws(seed, "tokenizer")
    corpus = [caption(e, s, data["styles"], rng) for e in data["emoji"] for s in STYLES for _ in range(20)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [a + "</w>" for a in alphabet]  # given their numbers beforehand: else ties between merges fall by chance
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 2, special_tokens=ends, initial_alphabet=alphabet,
                                  end_of_word_suffix="</w>", show_progress=False)  # fmt: skip
    bpe.train_from_iterator(corpus, trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = alphabet + ends + ["".join(m) for m in merges]
    tokens = list(dict.fromkeys(tokens))[: vocab_size - 2] + ["<|startoftext|>", "<|endoftext|>"]
    merges = [m for m in merges if "".join(m) in set(tokens)]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=77)


def tokenize(tokenizer, texts, device, padding="max_length"):
    ids = tokenizer(texts, padding=padding, truncation=True, return_tensors="pt").input_ids
    return ids.to(device)  # (B, 77), or (B, longest)


# ---- 3. the autoencoder ---------------------------------------------------------------------------------------


def train_vae(args, data, images):
    """64x64x3 -> 16x16x4. Loss: L1 + MSE + difference of image gradients (edges), and a faint pull to N(0, 1)."""
    torch.manual_seed(args.seed)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
    vae = AutoencoderKL(**blocks, block_out_channels=(24, 48, 96), layers_per_block=1, latent_channels=4,
                        norm_num_groups=8, mid_block_add_attention=False, sample_size=SIZE).to(args.device)  # fmt: skip
    optimizer = adamw((vae, 2e-3), weight_decay=0)
    checkpoint = args.work / "vae.safetensors"
    start, steps = load_checkpoint(checkpoint, optimizer, vae=vae), cycle(args, "vae")[-1]
    bar = tqdm(range(start, steps), "vae", initial=start, total=steps)
    for step in bar:
        rng, g = draws(args.seed, "vae", step)
        names = [rng.randrange(len(images)) for _ in range(16)]
        x = torch.stack([images[n, rng.randrange(3)] for n in names])
        x = augment(x, names, data, g).to(args.device)  # (B, 3, 64, 64)
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=g).to(x.device)
            y = vae.decode(posterior.mean + posterior.std * noise).sample
        d, mean, logvar = (y - x).float(), posterior.mean.float(), posterior.logvar.float()
        edges = d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        # Two cosine cycles: a strong pull to N(0, 1) lays the latents out, a weak one then sharpens eyes and whiskers.
        k, since, length, _ = cycle(args, "vae", step)
        loss = d.abs().mean() + d.square().mean() + edges + (1e-3, 1e-4)[k] * kl
        cosine_lr(optimizer, since, length)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(mse=f"{d.square().mean().item():.4f}", kl=f"{kl.item():.2f}")
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save_checkpoint(checkpoint, step + 1, optimizer, vae=vae)
    vae.eval().requires_grad_(False)
    z = torch.cat([vae.encode(x.to(args.device)).latent_dist.mean for x in images.flatten(0, 1).split(64)])
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 4))  # latents of unit variance, as in SD
    return vae


# ---- 4. two CLIPs ---------------------------------------------------------------------------------------------


def train_clip(args, data, images, tokenizer, which, text_width, vision_width):
    """Contrastive language-image pre-training (Radford et al. 2021): a caption and its picture attract, others repel."""
    torch.manual_seed(args.seed + (which == "scorer"))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    text = dict(vocab_size=len(tokenizer), hidden_size=text_width, intermediate_size=4 * text_width, num_hidden_layers=2,
                num_attention_heads=4, bos_token_id=bos, eos_token_id=eos, pad_token_id=eos, projection_dim=128)  # fmt: skip
    vision = dict(hidden_size=vision_width, intermediate_size=4 * vision_width, num_hidden_layers=4,
                  num_attention_heads=4, image_size=SIZE, patch_size=8, projection_dim=128)  # fmt: skip
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)).to(args.device)
    optimizer = adamw((clip, 1e-3), weight_decay=0.1)
    checkpoint = args.work / f"{which}.safetensors"
    start, steps = load_checkpoint(checkpoint, optimizer, clip=clip), cycle(args, which)[-1]
    members = {}  # group -> its pictures
    for n, entry in enumerate(data["emoji"]):
        for group in entry["groups"]:
            members.setdefault(group, []).extend((3 * n, 3 * n + 1, 3 * n + 2))
    bar = tqdm(range(start, steps), which, initial=start, total=steps)
    for step in bar:
        # Cycles: first any pictures; then half of each batch from one group (all cats), where telling apart is hard; last most
        # of it from a few groups, with more synonyms.
        k, since, length, _ = cycle(args, which, step)
        strong, other = (1.0, 0.5, 0.5)[k], (0.4, 0.4, 0.6)[k]
        rng, g = draws(args.seed, which, step)
        picks = rng.sample(range(3 * len(images)), 96)
        if k == 1:
            hard = members[rng.choice(list(members))]
            picks = list(dict.fromkeys(rng.sample(hard, min(48, len(hard))) + picks))[:96]
        elif k == 2:
            hard = [members[group] for group in rng.sample(list(members), 4)]
            hard = [p for pictures in hard for p in rng.sample(pictures, min(36, len(pictures)))]
            picks = list(dict.fromkeys(hard[:80] + picks))[:96]
        names, styles = [p // 3 for p in picks], [p % 3 for p in picks]
        x = augment(images[names, styles], names, data, g)
        # Generated pictures are softer than drawn ones: blur and grain, so that a score does not hang on sharpness.
        blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), "replicate"), 3, 1)
        strength = torch.rand(len(x), 2, 1, 1, 1, generator=g) * torch.tensor([strong, 0.15 * strong]).view(1, 2, 1, 1, 1)
        x = torch.lerp(x, blurred, strength[:, 0]) + strength[:, 1] * torch.randn(x.shape, generator=g)
        texts = [caption(data["emoji"][n], STYLES[s], data["styles"], rng, other) for n, s in zip(names, styles, strict=True)]
        ids = tokenize(tokenizer, texts, args.device, "longest")  # CLIP reads the first <|endoftext|>: padding is idle
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            out = clip(input_ids=ids, pixel_values=x.to(args.device))
        logits = out.logits_per_image.float()  # (B pictures, B captions)
        same = torch.arange(len(x), device=logits.device)
        loss = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
        cosine_lr(optimizer, since, length)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clip.logit_scale.data.clamp_(max=math.log(50))
        if step % 50 == 0:
            hits = (logits.argmax(1) == same).float().mean()
            bar.set_postfix(loss=f"{loss.item():.3f}", top1=f"{hits.item():.2f}")
        if (step + 1) % 300 == 0 or step + 1 == steps:
            save_checkpoint(checkpoint, step + 1, optimizer, clip=clip)
    return clip.eval()


def image_processor():
    size, gray = {"height": SIZE, "width": SIZE}, [0.5, 0.5, 0.5]
    return CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=size, image_mean=gray, image_std=gray)


def save_clip(clip, tokenizer, folder):
    half(clip).save_pretrained(folder)
    load_in_float(folder)
    tokenizer.save_pretrained(folder)
    image_processor().save_pretrained(folder)


# ---- 5. the UNet ----------------------------------------------------------------------------------------------


@torch.no_grad()
def cache_latents(args, vae, images, data, copies=8):
    """Encodes shifted and mirrored copies once: (names, 3 styles, copies, 4, 16, 16), scaled to unit variance."""
    _, g = draws(args.seed, "latents")
    rows = []
    for n in tqdm(range(len(images)), "latents"):
        x = torch.cat([images[n]] + [augment(images[n], [n] * 3, data, g) for _ in range(copies - 1)])
        rows.append(vae.encode(x.to(args.device)).latent_dist.mean * vae.config.scaling_factor)
    z = torch.stack(rows)
    return z.view(len(images), copies, 3, *z.shape[2:]).transpose(1, 2)


def train_unet(args, data, latents, vae, text_encoder, tokenizer):
    """Denoising diffusion on latents (Ho et al. 2020) with min-SNR-5 weights and an exponential moving average."""
    torch.manual_seed(args.seed)
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4,
        layers_per_block=1, block_out_channels=(96, 128, 144), norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_encoder.config.hidden_size, attention_head_dim=4,
    ).to(args.device)  # fmt: skip
    model = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    # The text encoder comes pre-trained: a tenth of the rate keeps the synonyms where CLIP has put them, close together.
    optimizer = adamw((unet, 7e-4), (text_encoder, 7e-5))
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    checkpoint = args.work / "unet.safetensors"
    start, steps = load_checkpoint(checkpoint, optimizer, model=model, ema=ema), cycle(args, "unet")[-1]
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)  # fmt: skip
    scheduler.register_to_config(clip_sample=False)  # PNDM never clips; DDIM made from this config would, at 1
    alpha_bar = scheduler.alphas_cumprod.to(args.device)
    everything = range(len(latents))
    # The second cycle is for what is hard to tell apart or to name: cats, and what has nicknames, come twice as often or more.
    harder = [1 + bool(e["nicknames"]) + ("cat" in e["groups"]) for e in data["emoji"]]
    bar = tqdm(range(start, steps), "unet", initial=start, total=steps)
    for step in bar:
        rng, g = draws(args.seed, "unet", step)
        # A third of the first cycle on shifted and mirrored copies teaches shapes; then the drawings as they are teach details.
        k, since, length, _ = cycle(args, "unet", step)
        copies = latents.shape[2] if k == 0 and 3 * since < length else 1
        picks = [(rng.randrange(len(latents)), rng.randrange(3), rng.randrange(copies)) for _ in range(32)]
        if k == 1:
            picks = [(n, s, 0) for n, (_, s, _) in zip(rng.choices(everything, harder, k=32), picks, strict=True)]
        z = torch.stack([latents[p] for p in picks])  # (B, 4, 16, 16)
        texts = [caption(data["emoji"][n], STYLES[s], data["styles"], rng, (0.4, 0.5)[k]) for n, s, _ in picks]
        texts = ["" if rng.random() < 0.1 else t for t in texts]  # the null prompt, for classifier-free guidance
        noise = torch.randn(z.shape, generator=g).to(z.device)
        t = torch.randint(0, 1000, (len(z),), generator=g).to(z.device)
        a = alpha_bar[t].view(-1, 1, 1, 1)
        zt = a.sqrt() * z + (1 - a).sqrt() * noise
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            states = text_encoder(tokenize(tokenizer, texts, args.device)).last_hidden_state  # (B, 77, D)
            eps = unet(zt, t, states).sample
        snr = alpha_bar[t] / (1 - alpha_bar[t])
        loss = ((eps.float() - noise).square().mean((1, 2, 3)) * snr.clamp(max=5) / snr).mean()
        cosine_lr(optimizer, since, length, peak=(1, 0.7)[k])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(model)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save_checkpoint(checkpoint, step + 1, optimizer, model=model, ema=ema)
            save_pipeline(args.work / "sd", ema.module, vae, tokenizer, scheduler)
    return save_pipeline(args.out / "sd", ema.module, vae, tokenizer, scheduler)


def save_pipeline(folder, model, vae, tokenizer, scheduler):
    with tempfile.TemporaryDirectory() as tmp:  # half-precision copies of what goes on training in full
        model["text_encoder"].save_pretrained(f"{tmp}/text_encoder")
        model["unet"].save_pretrained(f"{tmp}/unet")
        vae.save_pretrained(f"{tmp}/vae")
        parts = dict(
            text_encoder=CLIPTextModel.from_pretrained(f"{tmp}/text_encoder", dtype=torch.float16),
            unet=UNet2DConditionModel.from_pretrained(f"{tmp}/unet", torch_dtype=torch.float16),
            vae=AutoencoderKL.from_pretrained(f"{tmp}/vae", torch_dtype=torch.float16),
        )
    for part in ("unet", "vae"):
        parts[part].register_to_config(_name_or_path="")  # not the temporary folder's
    none = dict(safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False)
    pipe = StableDiffusionPipeline(**parts, tokenizer=tokenizer, scheduler=scheduler, **none)
    pipe.save_pretrained(folder)
    load_in_float(folder)
    return pipe


# ---- 6. the DDPM ------------------------------------------------------------------------------------------------


def write_creatures(folder, data, images):
    """Writes the DDPM's pictures as files of 32x32 pixels, folder/STYLE-NAME.png. Returns them, (n, 3, 32, 32) in [-1, 1]."""
    folder.mkdir(parents=True, exist_ok=True)
    tiles = []
    for entry, drawings in zip(data["emoji"], images, strict=True):
        if CREATURES & entry["groups"].keys():
            for style, x in zip(STYLES, drawings, strict=True):
                tile = picture(x).resize((SIZE // 2,) * 2, Image.LANCZOS)
                tile.save(folder / f"{style}-{entry['name'].replace(' ', '-')}.png", optimize=True)
                tiles.append(torch.frombuffer(bytearray(tile.tobytes()), dtype=torch.uint8).view(SIZE // 2, SIZE // 2, 3))
    return torch.stack(tiles).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_ddpm(args, x0):
    """Ho et al. 2020 in pixels, with the noise schedule of google/ddpm-celebahq-256; min-SNR-5 weights, averaged weights."""
    torch.manual_seed(args.seed)
    unet = UNet2DModel(
        sample_size=SIZE // 2, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(32, 64, 112),
        norm_num_groups=8, attention_head_dim=16, down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    ).to(args.device)  # fmt: skip
    scheduler = DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    alpha_bar = scheduler.alphas_cumprod.to(args.device)
    optimizer = adamw((unet, 1e-3))
    ema = torch.optim.swa_utils.AveragedModel(unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    checkpoint = args.work / "ddpm.safetensors"
    start, steps = load_checkpoint(checkpoint, optimizer, unet=unet, ema=ema), cycle(args, "ddpm")[-1]
    bar = tqdm(range(start, steps), "ddpm", initial=start, total=steps)
    for step in bar:
        _, g = draws(args.seed, "ddpm", step)
        x = x0[torch.randint(len(x0), (32,), generator=g)].to(args.device)  # (B, 3, 32, 32)
        noise = torch.randn(x.shape, generator=g).to(x.device)
        t = torch.randint(0, 1000, (len(x),), generator=g).to(x.device)
        a = alpha_bar[t].view(-1, 1, 1, 1)
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            eps = unet(a.sqrt() * x + (1 - a).sqrt() * noise, t).sample
        snr = alpha_bar[t] / (1 - alpha_bar[t])
        loss = ((eps.float() - noise).square().mean((1, 2, 3)) * snr.clamp(max=5) / snr).mean()
        cosine_lr(optimizer, step, steps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(unet)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save_checkpoint(checkpoint, step + 1, optimizer, unet=unet, ema=ema)
    DDPMPipeline(half(ema.module), scheduler).save_pretrained(args.out / "ddpm")


# ---- 7. the transformer -----------------------------------------------------------------------------------------


class CountedRow:
    """Attention in which the last caption row counts 256 times, exactly as if it stood there 256 times.

    Stable Diffusion 3 appends 256 zero rows to a caption when its T5 text encoder is left out. They have no positions, so they
    stay alike through all layers: one row, with log 256 added to its attention logits, does the same in a quarter of the time.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        heads = lambda x, norm=None: (norm or torch.nn.Identity())(x.unflatten(-1, (attn.heads, -1)).transpose(1, 2))  # noqa: E731
        x, c = hidden_states, encoder_hidden_states  # (B, 64, D), (B, rows, D)
        q = torch.cat([heads(attn.to_q(x), attn.norm_q), heads(attn.add_q_proj(c), attn.norm_added_q)], 2)
        k = torch.cat([heads(attn.to_k(x), attn.norm_k), heads(attn.add_k_proj(c), attn.norm_added_k)], 2)
        v = torch.cat([heads(attn.to_v(x)), heads(attn.add_v_proj(c))], 2)  # (B, heads, 64 + rows, D / heads)
        bias = torch.zeros(k.shape[2], dtype=q.dtype, device=q.device)
        bias[-1] = math.log(256)
        y = F.scaled_dot_product_attention(q, k, v.to(q.dtype), bias.expand(1, 1, q.shape[2], -1))
        x, c = y.transpose(1, 2).flatten(2).split([x.shape[1], c.shape[1]], 1)
        return attn.to_out[0](x), c if attn.context_pre_only else attn.to_add_out(c)


def encode_captions(model, ids):
    """As StableDiffusion3Pipeline does without T5, but for one zero row in place of 256: (B, 33, D) and (B, D)."""
    a, b = (model[name](ids, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2"))
    rows = torch.cat([a.hidden_states[-2], b.hidden_states[-2]], -1)
    return F.pad(rows, (0, 0, 0, 1)), torch.cat([a.text_embeds, b.text_embeds], -1)


def train_sd3(args, data, latents, vae, tokenizer):
    """Rectified flow (Esser et al. 2024) on latents: z_s = (1 - s) z + s noise, velocity noise - z, s drawn logit-normally."""
    torch.manual_seed(args.seed)
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id)

    def encoder(width):
        return CLIPTextModelWithProjection(CLIPTextConfig(
            vocab_size=len(tokenizer), max_position_embeddings=32, hidden_size=width, intermediate_size=4 * width,
            num_hidden_layers=2, num_attention_heads=4, projection_dim=width, **ends))  # fmt: skip

    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, pos_embed_max_size=8, num_layers=4, attention_head_dim=32,
        num_attention_heads=4, caption_projection_dim=128, joint_attention_dim=160, pooled_projection_dim=160,
        qk_norm="rms_norm",
    )  # fmt: skip
    model = torch.nn.ModuleDict({"transformer": transformer, "text_encoder": encoder(96), "text_encoder_2": encoder(64)})
    model.to(args.device)
    transformer.set_attn_processor(CountedRow())
    optimizer = adamw((model, 1e-3))
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    checkpoint = args.work / "sd3.safetensors"
    start, steps = load_checkpoint(checkpoint, optimizer, model=model, ema=ema), cycle(args, "sd3")[-1]
    bar = tqdm(range(start, steps), "sd3", initial=start, total=steps)
    for step in bar:
        rng, g = draws(args.seed, "sd3", step)
        picks = [(rng.randrange(len(latents)), rng.randrange(3)) for _ in range(32)]
        z = torch.stack([latents[n, s, 0] for n, s in picks])  # (B, 4, 16, 16)
        texts = [caption(data["emoji"][n], STYLES[s], data["styles"], rng) for n, s in picks]
        texts = ["" if rng.random() < 0.1 else t for t in texts]  # the null prompt, for classifier-free guidance
        noise = torch.randn(z.shape, generator=g).to(z.device)
        sigma = torch.randn(len(z), generator=g).sigmoid().to(z.device)
        s = sigma.view(-1, 1, 1, 1)
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            rows, pooled = encode_captions(model, tokenize(tokenizer, texts, args.device))
            v = transformer((1 - s) * z + s * noise, rows, pooled, 1000 * sigma).sample
        loss = F.mse_loss(v.float(), noise - z)
        cosine_lr(optimizer, step, steps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(model)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save_checkpoint(checkpoint, step + 1, optimizer, model=model, ema=ema)
    vae = half(vae)
    vae.register_to_config(shift_factor=0.0, _name_or_path="")
    parts = {name: half(module) for name, module in ema.module.items()}
    none = dict(text_encoder_3=None, tokenizer_3=None)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = StableDiffusion3Pipeline(vae=vae, tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=scheduler, **parts, **none)
    pipe.save_pretrained(args.out / "sd3")
    load_in_float(args.out / "sd3")


# ---- 8. the copy detector ---------------------------------------------------------------------------------------


def train_copy_detector(args, data, images):
    """SSCD (Pizzi et al. 2022) in miniature: two views of one drawing attract, all others repel and spread evenly."""
    torch.manual_seed(args.seed)
    net = CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=80, intermediate_size=320, num_hidden_layers=3,
                num_attention_heads=4, image_size=SIZE, patch_size=8, projection_dim=64)).to(args.device)  # fmt: skip
    optimizer = adamw((net, 1e-3), weight_decay=0.05)
    checkpoint = args.work / "copy.safetensors"
    start, steps = load_checkpoint(checkpoint, optimizer, net=net), cycle(args, "copy")[-1]
    everything = images.flatten(0, 1)
    members = {}
    for n, entry in enumerate(data["emoji"]):
        for group in entry["groups"]:
            members.setdefault(group, []).extend((3 * n, 3 * n + 1, 3 * n + 2))

    def view(x, g):
        """What happens to a copy: moved, half the resolution, blurred, noisy, other colours. (B, 3, 64, 64), same shape."""
        dx, dy = torch.randint(-3, 4, (2,), generator=g).tolist()
        x, r = x.roll((dy, dx), (-2, -1)), torch.rand(len(x), 4, 1, 1, 1, generator=g)
        rough = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bicubic")
        x = torch.where(r[:, 0] < 0.5, rough, x)
        x = torch.lerp(x, F.avg_pool2d(F.pad(x, (2,) * 4, "replicate"), 5, 1), r[:, 1])
        gain = 1 + 0.2 * (torch.rand(len(x), 3, 1, 1, generator=g) - 0.5)
        return (x * gain + 0.3 * r[:, 2] * torch.randn(x.shape, generator=g)).clamp(-1, 1)

    bar = tqdm(range(start, steps), "copy detector", initial=start, total=steps)
    for step in bar:
        rng, g = draws(args.seed, "copy", step)
        near = [p for group in rng.sample(list(members), 2) for p in members[group]]  # other drawings of one thing: not copies
        picks = list(dict.fromkeys(rng.sample(near, min(32, len(near))) + rng.sample(range(len(everything)), 64)))[:64]
        x = torch.cat([view(everything[picks], g), view(everything[picks], g)]).to(args.device)  # (2B, 3, 64, 64)
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            e = F.normalize(net(x).image_embeds.float(), dim=-1)  # (2B, 64)
        cos = (e @ e.T).fill_diagonal_(-1)
        partner = torch.arange(len(e), device=e.device).roll(len(picks))
        others = cos.scatter(1, partner[:, None], -1).amax(1)  # the nearest that is no copy
        spread = -(2 - 2 * others).clamp(min=1e-4).sqrt().log().mean()
        loss = F.cross_entropy(cos / 0.05, partner) + spread
        cosine_lr(optimizer, step, steps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            pair = cos.gather(1, partner[:, None]).mean()
            bar.set_postfix(loss=f"{loss.item():.3f}", copies=f"{pair:.2f}", nearest_other=f"{others.mean():.2f}")
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save_checkpoint(checkpoint, step + 1, optimizer, net=net)
    half(net).save_pretrained(args.out / "copy")
    load_in_float(args.out / "copy")
    image_processor().save_pretrained(args.out / "copy")


# ---- 9. the report --------------------------------------------------------------------------------------------


@torch.no_grad()
def report(args, data, images, pipe, name, n):
    """Draws n random (name, style) prompts; the scoring CLIP ranks all names for each picture. Scores, and a contact sheet."""
    pipe.set_progress_bar_config(disable=True)
    clip = CLIPModel.from_pretrained(args.out / "clip", dtype=torch.float32).to(args.device).eval()
    tokenizer = CLIPTokenizer.from_pretrained(args.out / "clip")
    names = [e["name"] for e in data["emoji"]]

    def ranks(x, truth):  # x: (n, 3, 64, 64) in [-1, 1] -> how many names score above the true one
        t = clip.get_text_features(tokenize(tokenizer, names, args.device))
        i = torch.cat([embedding(clip.get_image_features(part.to(args.device))) for part in x.split(64)])
        scores = i @ embedding(t).T  # (n, names)
        return (scores > scores.gather(1, torch.tensor(truth, device=scores.device)[:, None])).sum(1)

    def embedding(features):
        return F.normalize(getattr(features, "pooler_output", features), dim=-1)

    rng, _ = draws(args.seed, "report")
    picks = [(rng.randrange(len(names)), rng.randrange(3)) for _ in range(n)]
    pictures = []
    for i in tqdm(range(0, n, 30), f"report on {name}"):
        part = picks[i : i + 30]
        prompts = [f"{names[a]}, in the style of {STYLES[b]}" for a, b in part]
        g = [torch.Generator().manual_seed(args.seed + i + k) for k in range(len(part))]
        pictures.append(pipe(prompts, num_inference_steps=20, guidance_scale=3.0, generator=g, output_type="pt").images)
    x = torch.cat(pictures).float().cpu() * 2 - 1
    drawn, real = ranks(x, [a for a, _ in picks]), ranks(images.flatten(0, 1), [i // 3 for i in range(3 * len(names))])
    styled = tokenize(tokenizer, [f"{names[a]}, in the style of {s}" for a, _ in picks for s in STYLES], args.device)
    styled = embedding(clip.get_text_features(styled)).view(n, 3, -1)
    i = torch.cat([embedding(clip.get_image_features(part.to(args.device))) for part in x.split(64)])
    style_hits = (styled @ i[:, :, None])[..., 0].argmax(1).cpu() == torch.tensor([b for _, b in picks])
    top = lambda r, k: round((r < k).float().mean().item(), 3)  # noqa: E731
    result = {"n": n, "names": len(names), "drawn": {"top1": top(drawn, 1), "top3": top(drawn, 3)}}
    result |= {"real": {"top1": top(real, 1), "top3": top(real, 3)}, "style": round(style_hits.float().mean().item(), 3)}

    columns, rows = 20, n // 66  # above each drawn picture, the real one
    sheet = Image.new("RGB", (columns * SIZE, rows * (2 * SIZE + 14)), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (a, b) in enumerate(picks[: columns * rows]):
        cx, cy = k % columns * SIZE, k // columns * (2 * SIZE + 14)
        sheet.paste(picture(images[a, b]), (cx, cy))
        sheet.paste(picture(x[k]), (cx, cy + SIZE))
        pen.text((cx + 2, cy + 2 * SIZE), names[a].removeprefix("flag of ")[:11], fill="black" if drawn[k] < 1 else "red")
    sheet.quantize(256).save(args.out / f"contact_sheet{'' if name == 'sd' else '_' + name}.png", optimize=True)
    return result


@torch.no_grad()
def report_ddpm(args, x0, n=60):
    """Two questions: is a noised training picture given back, and does a sample resemble any? The copy detector answers."""
    pipe = DDPMPipeline.from_pretrained(args.out / "ddpm").to(args.device)
    net = CLIPVisionModelWithProjection.from_pretrained(args.out / "copy", dtype=torch.float32).to(args.device).eval()
    resize = lambda x: F.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(-1, 1)  # noqa: E731
    detect = lambda x: F.normalize(net(resize(x)).image_embeds, dim=-1)  # noqa: E731
    _, g = draws(args.seed, "report ddpm")
    x = x0[torch.randperm(len(x0), generator=g)[:n]]
    noise = torch.randn(x.shape, generator=g)
    z = pipe.scheduler.add_noise(x, noise, torch.tensor([250])).to(args.device)
    pipe.scheduler.set_timesteps(1000)
    for t in tqdm(range(250, -1, -1), "report on ddpm"):
        z = pipe.scheduler.step(pipe.unet(z, t).sample, t, z, generator=g).prev_sample
    back = (detect(z.clamp(-1, 1)) * detect(x.to(args.device))).sum(1)
    sampler = DDIMPipeline(pipe.unet, DDIMScheduler.from_config(pipe.scheduler.config))
    sampler.set_progress_bar_config(disable=True)
    drawn = sampler(n, generator=g, num_inference_steps=50, output_type="np").images
    drawn = torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1
    nearest = (detect(drawn.to(args.device)) @ detect(x0.to(args.device)).T).amax(1)
    side = SIZE // 2
    sheet = Image.new("RGB", (20 * side, 9 * side + 14), "white")
    for line, tiles in enumerate((x, z.cpu(), drawn)):  # three rows each: real, noised and given back, drawn from noise
        for k in range(n):
            sheet.paste(picture(tiles[k]), (k % 20 * side, (3 * line + k // 20) * side + 7 * line))
    sheet.quantize(256).save(args.out / "contact_sheet_ddpm.png", optimize=True)
    share = lambda v, level: round((v > level).float().mean().item(), 3)  # noqa: E731
    return {"n": n, "given_back": {"mean": round(back.mean().item(), 3), "above_0.8": share(back, 0.8)},
            "nearest_training_picture": {"median": round(nearest.median().item(), 3), "above_0.4": share(nearest, 0.4)}}


def main(args):
    if not (args.out / "images" / "emoji.json").exists():
        fetch_images(args.out / "images")
    data, images = load_images(args.out / "images")
    if not args.report_only:
        if not (folder := args.work / "tokenizer").exists():
            train_tokenizer(data, args.seed).save_pretrained(f"{folder}.tmp")
            os.replace(f"{folder}.tmp", folder)
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        vae = train_vae(args, data, images)
        scorer = train_clip(args, data, images, tokenizer, "scorer", 128, 160)
        save_clip(scorer, tokenizer, args.out / "clip")
        reader = train_clip(args, data, images, tokenizer, "reader", 192, 128)
        text_encoder = CLIPTextModel(reader.config.text_config).to(args.device)
        text_encoder.load_state_dict({k.removeprefix("text_model."): v for k, v in reader.state_dict().items()
                                      if k.startswith("text_model.")})  # fmt: skip
        latents = cache_latents(args, vae, images, data)
        train_unet(args, data, latents, vae, text_encoder, tokenizer)
        train_ddpm(args, write_creatures(args.out / "creatures", data, images))
        train_sd3(args, data, latents, vae, CLIPTokenizer.from_pretrained(folder, model_max_length=32))
        train_copy_detector(args, data, images)
    none = dict(text_encoder_3=None, tokenizer_3=None)
    sd = StableDiffusionPipeline.from_pretrained(args.out / "sd", dtype=torch.float32).to(args.device)
    sd.scheduler = DPMSolverMultistepScheduler.from_config(sd.scheduler.config)
    sd3 = StableDiffusion3Pipeline.from_pretrained(args.out / "sd3", dtype=torch.float32, **none).to(args.device)
    result = {"sd": report(args, data, images, sd, "sd", 600), "sd3": report(args, data, images, sd3, "sd3", 300)}
    result["ddpm"] = report_ddpm(args, write_creatures(args.out / "creatures", data, images))
    print(json.dumps(result))
    write_text(args.out / "report.json", json.dumps(result, indent=1))


if __name__ == "__main__":
    main(parse_args())
