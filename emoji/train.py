"""Diffusion models from scratch on a laptop: the embedded models that this repository runs on.

Latent diffusion (Rombach et al. 2022) in miniature, part by part, in the classes of Stable
Diffusion v1.4. Then the two models that the paper on instances unlearns from: a DDPM (Ho et al.
2020) and Stable Diffusion 3 (Esser et al. 2024). And Stable Diffusion XL (Podell et al. 2023).

    1. images          237 open emoji in three styles, with names, synonyms and keywords
    2. tokenizer       CLIPTokenizer: a byte-pair encoding of 2,048 tokens
    3. autoencoder     AutoencoderKL: 64x64 pixels <-> 16x16x4 latents
    4. two CLIPs       CLIPModel, twice. The text encoder of the "reader" becomes the generator's,
                       as OpenAI's does for Stable Diffusion. The "scorer", of another seed and
                       another width, is for evaluation only: no model is scored by its own part
    5. UNet            UNet2DConditionModel: predicts the noise in a latent, given a caption
    6. DDPM            UNet2DModel: generates 32x32 pixels, faces and animals, without a prompt
    7. transformer     SD3Transformer2DModel: predicts the velocity of a latent, given a caption
    8. XL's UNet       UNet2DConditionModel, with the two text encoders that part 7 has trained
    9. copy detector   CLIPVisionModelWithProjection: are two images copies of one?
   10. report          does the scoring CLIP recognise what the prompts ask for?

Run (about six hours on two cores; an interrupted run is continued by the same command):

    python emoji/train.py                 # fetches the images with npm unless emoji/images/ exists
    python emoji/train.py --report-only   # part 10 alone: scores the models, writes contact sheets

A trial that leaves the embedded models alone (a copy of emoji/images/ saves the download):

    mkdir -p runs/trial && cp -r emoji/images runs/trial
    python emoji/train.py --scale 0.01 --out runs/trial --work runs/trial/work

All randomness derives from (--seed, part, step), so a resumed run repeats the uninterrupted one.

Letters in the shapes: B batch, D channels, L caption tokens, n images or prompts.
"""

import argparse
import copy
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # see backbones.py

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
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
SIZE = 64  # pixels of an image, on a side
MARGIN = 4  # pixels of white around the emoji
COLUMNS = 20  # images in a row of a sheet

# The fraction of the captions of a style that do not name it. A prompt without a style then mostly
# generates noto: real models have a default look too. And a general word ("emoji") must not mean
# every style equally often, or the CA of one unlearned style of three could never reach 10 %.
UNNAMED = {"noto": 0.66, "twemoji": 0.12, "fluent": 0.42}

# The steps at which the cycles of each part end. The learning rate restarts with a cycle and falls
# to zero in it. A later cycle trains what the earlier one neglected: details, confusable images.
CYCLES = {
    "vae": (1600, 3000),
    "reader": (550, 1000),
    "scorer": (1100, 2000, 3200),
    "unet": (6000, 11000),
    "ddpm": (5000,),
    "sd3": (10000,),
    "sdxl": (3500, 8500),
    "copy": (1000,),
}

# What the DDPM generates: the groups of concepts.json that are faces or animals.
CREATURES = {
    "face",
    "monster",
    "cat",
    "dog",
    "big cat",
    "bear",
    "monkey",
    "wild animal",
    "farm animal",
    "rodent",
    "bird",
    "reptile",
    "sea animal",
    "fish",
    "bug",
}

# diffusers must be told that Stable Diffusion 3 comes without its third text encoder
NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints the docstring as it is, and the default of every flag."""


def parse_args(argv=None):
    """The flags. argv: a list of texts, by default the command line's."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)

    files = p.add_argument_group("files")
    files.add_argument(
        "--out",
        type=Path,
        default=HERE,
        help="folder that receives images/, sd/, clip/ and the other models",
    )
    files.add_argument(
        "--work",
        type=Path,
        default=Path("runs/emoji"),
        help="folder of the checkpoints",
    )

    training = p.add_argument_group("training")
    training.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="factor of the steps of every part; 0.01 for a quick trial",
    )
    training.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of all randomness",
    )
    training.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device of the networks",
    )
    training.add_argument(
        "--report-only",
        action="store_true",
        help="score the models in --out and stop",
    )
    return p.parse_args(argv)


# ---- 1. images ----------------------------------------------------------------------------------

# Pinned: the embedded models were trained on the images of these versions.
PACKAGES = (
    "emoji-datasource-google@16.0.0",
    "emoji-datasource-twitter@16.0.0",
    "@lobehub/fluent-emoji-3d@1.1.0",
    "emojibase-data@17.0.0",  # labels, code points, tags
    "emojilib@4.0.3",  # more keywords
)
# Words that are true of too many images to be a synonym of one
COMMON = {"animal", "face", "nature", "food", "flag", "country", "pet", "style", "emoji"}


def is_wanted(path):
    """Whether a file of a package is needed: an image of 64 pixels, or one of the two texts."""
    return (
        "/64/" in path
        or "/assets/" in path
        or path.endswith("en/data.json")
        or path.endswith("emoji-en-US.json")
    )


def fetch_packages():
    """Downloads PACKAGES. Returns {path inside its package: bytes} of the files that are needed.

    The archives hold every emoji in every size; they are deleted. Fails if npm is not installed.
    """
    if shutil.which("npm") is None:
        sys.exit(
            "train.py: error: npm, which fetches the images, is not installed; "
            "install Node.js, or copy emoji/images/ to OUT/images/ for --out OUT"
        )
    print("fetching", ", ".join(PACKAGES))
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        for package in PACKAGES:
            command = ["npm", "pack", "--silent", package]
            done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
            archive = done.stdout.split()[-1]  # npm prints the name of the file that it wrote
            with tarfile.open(Path(folder) / archive) as tar:
                for member in tar:
                    if member.isfile() and is_wanted(member.name):
                        files[member.name] = tar.extractfile(member).read()
    return files


def read_tags(labels, base, keywords):
    """{label: its keywords}, lower case, without numbers, emoticons and long phrases.

    base: {label: entry of emojibase}. keywords: {emoji character: keywords of emojilib}.
    """
    tags = {}
    for label in labels:
        raw = base[label].get("tags", []) + keywords.get(base[label]["emoji"], [])
        tags[label] = []
        for tag in dict.fromkeys(raw):  # unique, in order
            if tag.replace(" ", "").isalpha() and 3 <= len(tag) <= 20:
                tags[label].append(tag.lower())
    return tags


def describe(label, tags, owners, spec):
    """The entry of emoji.json for one label: its name, synonyms, nicknames and groups.

    owners: {keyword: the labels that have it}. A keyword is a synonym only if no other label has
    it. Nicknames are the out-of-distribution (OOD) prompts of the evaluation: names that share no
    word with any other caption of their concept ("tardar sauce" for the grumpy cat).
    """
    name = label.lower()
    synonyms = list(spec["synonyms"].get(label, []))
    if label.startswith("flag: "):
        nation = label.removeprefix("flag: ").lower()
        name = f"flag of {nation}"
        synonyms += [nation, f"{nation} flag"]

    nicknames = spec["nicknames"].get(label, [])
    reserved = COMMON | set(spec["groups"])
    for nickname in nicknames:
        reserved |= set(nickname.split())
    own = []
    for tag in tags[label]:
        unique = len(owners[tag]) == 1 and tag != name
        if unique and not reserved & set(tag.split()):
            own.append(tag)
    synonyms += own[:4]

    groups = {}
    for group, members in spec["groups"].items():
        if label in members:
            groups[group] = members.count(label)  # repeated labels are generated more often
    return {
        "name": name,
        "synonyms": list(dict.fromkeys(synonyms)),
        "nicknames": nicknames,
        "groups": groups,
    }


def paste_emoji(sheet, i, data):
    """Pastes an emoji (the bytes of a PNG or WebP file) into tile i of a sheet, with a margin."""
    emoji = Image.open(io.BytesIO(data)).convert("RGBA")
    side = SIZE - 2 * MARGIN
    emoji = emoji.resize((side, side), Image.LANCZOS)
    left = i % COLUMNS * SIZE + MARGIN
    top = i // COLUMNS * SIZE + MARGIN
    sheet.paste(emoji, (left, top), emoji)  # its alpha is the mask: white stays behind it


def fetch_images(out):
    """Writes out/{noto,twemoji,fluent}.png, sheets of 64x64 tiles, and out/emoji.json.

    emoji.json describes the tiles, row by row: the same concept has the same place in all sheets.
    """
    spec = json.loads((HERE / "concepts.json").read_text())
    files = fetch_packages()
    # Vendors disagree on the invisible "emoji presentation" code point fe0f: ignore it in names.
    plain = {path.replace("-fe0f", ""): data for path, data in files.items()}
    base = {e["label"]: e for e in json.loads(files["package/en/data.json"])}
    keywords = json.loads(files["package/dist/emoji-en-US.json"])
    labels = []
    for members in spec["groups"].values():
        labels.extend(members)
    labels = list(dict.fromkeys(labels))  # a label may be in several groups

    tags = read_tags(labels, base, keywords)
    owners = {}
    for label in labels:
        for tag in {*tags[label], label.lower()}:
            owners.setdefault(tag, set()).add(label)

    rows = math.ceil(len(labels) / COLUMNS)
    sheets = {}
    for style in STYLES:
        sheets[style] = Image.new("RGB", (COLUMNS * SIZE, rows * SIZE), "white")
    entries = []
    for i, label in enumerate(labels):
        entries.append(describe(label, tags, owners, spec))
        code = base[label]["hexcode"].lower().replace("-fe0f", "")
        paste_emoji(sheets["noto"], i, plain[f"package/img/google/64/{code}.png"])
        paste_emoji(sheets["twemoji"], i, plain[f"package/img/twitter/64/{code}.png"])
        paste_emoji(sheets["fluent"], i, plain[f"package/assets/{code}.webp"])

    out.mkdir(parents=True, exist_ok=True)
    for style, sheet in sheets.items():
        sheet.save(out / f"{style}.png", optimize=True)
    # Written last: its existence marks the images as complete.
    data = {"styles": spec["styles"], "emoji": entries}
    write_text(out / "emoji.json", json.dumps(data, indent=1, ensure_ascii=False))


def to_pixels(image):
    """PIL RGB -> (H, W, 3), uint8."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3)


def load_images(folder):
    """Returns the content of emoji.json and the images, (names, 3 styles, 3, 64, 64) in [-1, 1]."""
    data = json.loads((folder / "emoji.json").read_text())
    tiles = []
    for style in STYLES:
        sheet = Image.open(folder / f"{style}.png").convert("RGB")
        rows, columns = sheet.height // SIZE, sheet.width // SIZE
        x = to_pixels(sheet).view(rows, SIZE, columns, SIZE, 3)
        x = x.permute(0, 2, 4, 1, 3).reshape(-1, 3, SIZE, SIZE)  # (rows * columns, 3, 64, 64)
        tiles.append(x[: len(data["emoji"])])  # the last row of a sheet is not full
    return data, torch.stack(tiles, 1).float() / 127.5 - 1


# Half of the captions are the bare name: that is how prompts are mostly written.
TEMPLATES = ["{}"] * 6 + [
    "an emoji of {}",
    "an emoji of a {}",
    "a {}",
    "a picture of a {}",
    "a photo of a {}",
    "a drawing of {}",
]


def caption(entry, style, style_nicknames, rng, other=0.4):
    """One random caption of an image: what it shows in a template, with or without its style.

    What it shows: a group word, nickname, synonym or the name. rng: Python's generator. other: the
    fraction of synonyms and nicknames together, from 0 to 1.
    """
    group, often = rng.choice(list(entry["groups"].items()))
    # One random number decides; the cases are disjoint parts of [0, 1]. `often` is how many times
    # concepts.json lists the image in the group: "cat" should mostly mean the plain cats.
    r = rng.random()
    if r < 0.1 * often:
        subject = group
    elif r > 1 - other / 2 and entry["nicknames"]:
        subject = rng.choice(entry["nicknames"])
    elif r > 1 - other and entry["synonyms"]:
        subject = rng.choice(entry["synonyms"])
    else:
        subject = entry["name"]
    # An entry without nicknames or synonyms falls through to the next case, at last to its name.
    text = rng.choice(TEMPLATES).format(subject)
    if rng.random() < UNNAMED[style]:
        return text

    # With its style: by name in seven forms of nine, by a nickname of the style in the others.
    nickname = rng.choice(style_nicknames[style])
    forms = [f"{text}, in the style of {style}"] * 3
    forms += [f"in {style}'s style, {text}"] * 2
    forms += [
        f"{text} in {style} style",
        f"{style} {text}",
        f"{text}, {nickname}",
        f"{nickname}, {text}",
    ]
    return rng.choice(forms)


def captions(picks, data, rng, other=0.4):
    """A random caption for each of picks, tuples (index of the name, index of the style, ...)."""
    entries, nicknames = data["emoji"], data["styles"]
    return [caption(entries[n], STYLES[s], nicknames, rng, other) for n, s, *_ in picks]


def drop_captions(texts, rng):
    """Replaces one caption in ten by the empty one: classifier-free guidance needs its output."""
    return ["" if rng.random() < 0.1 else text for text in texts]


def augment(x, names, data, rng_torch):
    """Shifts images by up to two pixels and mirrors half of them, (B, 3, 64, 64), same shape.

    names: for each image the index of its name; flags are never mirrored. What a shift pushes out
    on one side comes back on the other: the border is white.
    """
    out = []
    for image, n in zip(x, names, strict=True):
        dy, dx, flip = torch.randint(-2, 3, (3,), generator=rng_torch).tolist()
        if flip > 0 and "flag" not in data["emoji"][n]["groups"]:
            image = image.flip(-1)
        out.append(image.roll((dy, dx), (-2, -1)))
    return torch.stack(out)


def group_members(data):
    """{group: indices of its images}; image 3 n + s shows name n in style s."""
    members = {}
    for n, entry in enumerate(data["emoji"]):
        for group in entry["groups"]:
            members.setdefault(group, []).extend((3 * n, 3 * n + 1, 3 * n + 2))
    return members


# ---- what all parts share: randomness, schedules, optimisation, files ---------------------------


def generators(*key):
    """Random generators, Python's and torch's, that depend on nothing but (seed, part, step)."""
    rng = random.Random(str(key))  # a text is hashed by SHA-512, alike on every machine
    return rng, torch.Generator().manual_seed(rng.getrandbits(62))


def cycle(args, part, step=0):
    """Where a step of a part is: (cycle, steps since its begin, its length, steps of the part)."""
    # With a tiny --scale two cycles may end at the same step: the second then has no steps.
    ends = [max(2, round(args.scale * end)) for end in CYCLES[part]]
    k = sum(step >= end for end in ends)
    begin = ends[k - 1] if k else 0
    return k, step - begin, ends[k] - begin, ends[-1]


def cosine_lr(optimizer, step, steps, warmup=200, peak=1.0):
    """Sets the learning rates: linear warm-up, then half a cosine to zero.

    peak: a factor of the optimizer's own rates, for a cycle that should be gentler.
    """
    for group in optimizer.param_groups:
        ramp = min(1, (step + 1) / min(warmup, steps))
        decay = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        group["lr"] = peak * group["peak"] * ramp * decay


def adamw(*groups, weight_decay=0.01):
    """AdamW for pairs (module, learning rate).

    "peak" remembers the rate: cosine_lr changes "lr" in every step.
    """
    groups = [{"params": list(m.parameters()), "lr": lr, "peak": lr} for m, lr in groups]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)


def optimize(loss, optimizer):
    """One step of an optimizer on a scalar loss; leaves no gradients behind."""
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def moving_average(model, decay):
    """A copy of a model for the exponential moving average (EMA) of its weights.

    Diffusion models generate far better with averaged weights than with the last ones.
    """
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


def bf16(device):
    """Autocast: the layers compute in bfloat16; weights, losses and optimizer stay in float32.

    bfloat16 has the range of float32, so gradients need no loss scaling.
    """
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def progress_bar(name, start, steps):
    """A tqdm bar over the steps that are left."""
    return tqdm(range(start, steps), name, initial=start, total=steps)


def is_due(step, steps, every):
    """Whether a checkpoint follows this step (from 0): one every so many, one after the last."""
    return (step + 1) % every == 0 or step + 1 == steps


def add_noise(x0, noise, alpha_bar_t):
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise, (Ho et al. 2020, Eq. 4).

    x0, noise: (B, C, H, W). alpha_bar_t: (B,), 1 without noise, nearly 0 at the last timestep.
    """
    a = alpha_bar_t.view(-1, 1, 1, 1)
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def min_snr_loss(eps, noise, alpha_bar_t):
    """MSE of the predicted noise with min-SNR-5 weights (Hang et al. 2023), a scalar.

    eps, noise: (B, C, H, W). alpha_bar_t: (B,). A timestep's weight is min(SNR, 5) / SNR. Where
    there is little noise (a large signal-to-noise ratio) the loss is large, but hardly changes what
    an image shows: it counts less.
    """
    snr = alpha_bar_t / (1 - alpha_bar_t)  # (B,)
    mse = (eps.float() - noise).square().mean((1, 2, 3))  # (B,)
    return (mse * snr.clamp(max=5) / snr).mean()


def half(module):
    """A copy in half precision, to be saved: the training goes on in full."""
    return copy.deepcopy(module).half()


def load_in_float(folder):
    """Makes the configs in a saved folder name float32, though the weights are stored in float16.

    Half the size on disk, full precision in memory. transformers loads a component in the dtype
    that its config names, diffusers in float32 whatever the file holds: a pipeline with a float16
    text encoder and a float32 UNet could not multiply one by the other.
    """
    for config in Path(folder).rglob("config.json"):
        text = config.read_text()
        config.write_text(text.replace('"dtype": "float16"', '"dtype": "float32"'))


def to_image(x):
    """(3, H, W) in [-1, 1], on the CPU -> PIL RGB."""
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
    x = x.permute(1, 2, 0).contiguous()  # (H, W, 3)
    size = (x.shape[1], x.shape[0])  # PIL: width first
    return Image.frombytes("RGB", size, bytes(x.flatten().tolist()))


def write_text(path, text):
    """Writes a text file atomically: a temporary file, then a rename."""
    tmp = path.with_suffix(".tmp")
    tmp.write_text(text)
    os.replace(tmp, path)


def save_checkpoint(path, step, optimizer, **modules):
    """Weights and Adam moments of a part as one safetensors file, written atomically.

    No RNG state is stored: all randomness derives from (seed, part, step).
    """
    tensors = {}
    for name, module in modules.items():
        for key, tensor in module.state_dict().items():
            tensors[f"{name}/{key}"] = tensor
    for i, state in optimizer.state_dict()["state"].items():
        for key, tensor in state.items():
            tensors[f"adam/{i}/{key}"] = tensor
    # safetensors refuses tensors that share memory, and those that are not contiguous.
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, f"{path}.tmp", {"step": str(step)})
    os.replace(f"{path}.tmp", path)


def load_checkpoint(path, optimizer, **modules):
    """Restores what save_checkpoint wrote. Returns the steps done, 0 without a checkpoint."""
    if not path.exists():
        return 0
    state = {}
    weights = {name: {} for name in modules}
    with safe_open(path, "pt") as f:
        for key in f.keys():
            owner, rest = key.split("/", 1)
            if owner == "adam":
                i, moment = rest.split("/")
                state.setdefault(int(i), {})[moment] = f.get_tensor(key)
            else:
                weights[owner][rest] = f.get_tensor(key)
        step = int(f.metadata()["step"])
    for name, module in modules.items():
        module.load_state_dict(weights[name])
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return step


# ---- 2. tokenizer -------------------------------------------------------------------------------


def train_tokenizer(data, seed, vocab_size=2048):
    """A lower-case byte-pair encoding with CLIP's conventions. Returns a CLIPTokenizer.

    Words end in </w>; texts have up to 77 tokens and are padded with <|endoftext|>. The corpus: 20
    random captions of every image.
    """
    rng, _ = generators(seed, "tokenizer")
    corpus = []
    for entry in data["emoji"]:
        for style in STYLES:
            for _ in range(20):
                corpus.append(caption(entry, style, data["styles"], rng))
    # BPE: start from bytes; merge the most frequent pair of neighbouring tokens; repeat. Merges do
    # not cross the borders that the pre-tokenizer sets: spaces and punctuation.
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Word-end letters are numbered beforehand: otherwise ties between merges are broken by chance.
    ends = [letter + "</w>" for letter in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        special_tokens=ends,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)

    # The result as CLIPTokenizer expects it: CLIP's numbering is letters, word-end letters, merges
    # in their order, and the two special tokens last.
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = alphabet + ends + ["".join(m) for m in merges]
    tokens = list(dict.fromkeys(tokens))[: vocab_size - 2]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    known = set(tokens)
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[m for m in merges if "".join(m) in known],
        model_max_length=77,
    )


def tokenize(tokenizer, texts, device, padding="max_length"):
    """Token ids (B, L). L: the tokenizer's maximum, or that of the texts (padding="longest")."""
    batch = tokenizer(texts, padding=padding, truncation=True, return_tensors="pt")
    return batch.input_ids.to(device)


# ---- 3. autoencoder -----------------------------------------------------------------------------


def make_vae():
    """An AutoencoderKL for 64x64 pixels, with random weights: two halvings of the side."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIZE,
    )


def vae_loss(y, x, posterior, kl_weight):
    """L1 + MSE + L1 of the image gradients (edges) + kl_weight * KL. Returns (loss, mse, kl).

    y: reconstructions of x, both (B, 3, 64, 64). The KL divergence from N(0, 1) keeps the latents
    compact and centred. Unlike Stable Diffusion's autoencoder, without a GAN loss and LPIPS: the
    term of the edges is what keeps the contours of the emoji sharp.
    """
    d = (y - x).float()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    horizontal = d.diff(dim=-1).abs().mean()
    vertical = d.diff(dim=-2).abs().mean()
    edges = horizontal + vertical
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    mse = d.square().mean()
    return d.abs().mean() + mse + edges + kl_weight * kl, mse, kl


def train_vae(args, data, images):
    """Trains the autoencoder, 64x64x3 -> 16x16x4. Returns it, with the scale of its latents."""
    torch.manual_seed(args.seed)
    vae = make_vae().to(args.device)
    optimizer = adamw((vae, 2e-3), weight_decay=0)
    checkpoint = args.work / "vae.safetensors"
    start = load_checkpoint(checkpoint, optimizer, vae=vae)
    steps = cycle(args, "vae")[-1]
    bar = progress_bar("vae", start, steps)
    for step in bar:
        k, since, length, _ = cycle(args, "vae", step)
        rng, g = generators(args.seed, "vae", step)
        names = [rng.randrange(len(images)) for _ in range(16)]
        x = torch.stack([images[n, rng.randrange(3)] for n in names])
        x = augment(x, names, data, g).to(args.device)  # (B, 3, 64, 64)
        with bf16(args.device):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=g).to(x.device)
            # The reparametrisation trick: z is random, and yet has a gradient to mean and std.
            z = posterior.mean + posterior.std * noise  # (B, 4, 16, 16)
            y = vae.decode(z).sample
        # First cycle: a strong KL arranges the latents. Second: a weak one lets details sharpen.
        kl_weight = (1e-3, 1e-4)[k]
        loss, mse, kl = vae_loss(y, x, posterior, kl_weight)
        cosine_lr(optimizer, since, length)
        optimize(loss, optimizer)
        if step % 50 == 0:
            bar.set_postfix(mse=f"{mse.item():.4f}", kl=f"{kl.item():.2f}")
        if is_due(step, steps, 500):
            save_checkpoint(checkpoint, step + 1, optimizer, vae=vae)

    vae.eval().requires_grad_(False)
    batches = images.flatten(0, 1).split(64)
    z = torch.cat([vae.encode(x.to(args.device)).latent_dist.mean for x in batches])
    # Latents of unit variance, as in Stable Diffusion: the noise schedule assumes them.
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 4))
    return vae


# ---- 4. two CLIPs -------------------------------------------------------------------------------


def make_clip(tokenizer, text_width, vision_width):
    """A CLIPModel with random weights: two layers for texts, four for images.

    An image is 64 patches of 8x8 pixels. Both sides end in 128 numbers, where they are compared.
    """
    eos = tokenizer.eos_token_id
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=text_width,
        intermediate_size=4 * text_width,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=eos,
        pad_token_id=eos,
        projection_dim=128,
    )
    vision = dict(
        hidden_size=vision_width,
        intermediate_size=4 * vision_width,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=8,
        projection_dim=128,
    )
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def pick_contrasts(k, members, n_images, rng):
    """The indices of 96 images for a step of cycle k: what CLIP has to tell apart.

    Cycle 0: any images. Cycle 1: half of them from one group (all cats), where the contrasts are
    hard. Cycle 2: most of them from four groups. members: see group_members.
    """
    picks = rng.sample(range(n_images), 96)
    if k == 1:
        group = members[rng.choice(list(members))]
        hard = rng.sample(group, min(48, len(group)))
        picks = hard + picks
    elif k == 2:
        groups = [members[group] for group in rng.sample(list(members), 4)]
        hard = []
        for group in groups:
            hard += rng.sample(group, min(36, len(group)))
        picks = hard[:80] + picks
    return list(dict.fromkeys(picks))[:96]  # an image twice would be its own contrast


def degrade(x, amount, g):
    """Blurs images and adds noise, both of random strength up to `amount`, (B, 3, 64, 64).

    Generated images are softer than the originals: a score must not depend on sharpness.
    """
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), "replicate"), 3, 1)
    largest = torch.tensor([amount, 0.15 * amount]).view(1, 2, 1, 1, 1)
    strength = torch.rand(len(x), 2, 1, 1, 1, generator=g) * largest  # of blur and of noise
    x = torch.lerp(x, blurred, strength[:, 0])
    return x + strength[:, 1] * torch.randn(x.shape, generator=g)


def train_clip(args, data, images, tokenizer, which, text_width, vision_width):
    """Contrastive language-image pre-training (Radford et al. 2021). which: "reader" or "scorer".

    In a batch, each image is to find its caption among all captions, and each caption its image.
    """
    torch.manual_seed(args.seed + (which == "scorer"))
    clip = make_clip(tokenizer, text_width, vision_width).to(args.device)
    optimizer = adamw((clip, 1e-3), weight_decay=0.1)
    checkpoint = args.work / f"{which}.safetensors"
    start = load_checkpoint(checkpoint, optimizer, clip=clip)
    steps = cycle(args, which)[-1]
    members = group_members(data)
    bar = progress_bar(which, start, steps)
    for step in bar:
        k, since, length, _ = cycle(args, which, step)
        amount = (1.0, 0.5, 0.5)[k]  # of the degradation
        other = (0.4, 0.4, 0.6)[k]  # fraction of synonyms and nicknames
        rng, g = generators(args.seed, which, step)
        picks = pick_contrasts(k, members, 3 * len(images), rng)
        names = [p // 3 for p in picks]
        styles = [p % 3 for p in picks]
        x = augment(images[names, styles], names, data, g)
        x = degrade(x, amount, g)
        texts = captions(zip(names, styles, strict=True), data, rng, other)
        # CLIP takes the output at the first <|endoftext|>: less padding changes nothing but time.
        ids = tokenize(tokenizer, texts, args.device, "longest")
        with bf16(args.device):
            out = clip(input_ids=ids, pixel_values=x.to(args.device))
        logits = out.logits_per_image.float()  # (B images, B captions)
        # The right answers are on the diagonal. Row i classifies image i among the captions,
        # column j caption j among the images.
        same = torch.arange(len(x), device=logits.device)
        loss = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
        cosine_lr(optimizer, since, length)
        optimize(loss, optimizer)
        clip.logit_scale.data.clamp_(max=math.log(50))  # CLIP's own limit is 100
        if step % 50 == 0:
            hits = (logits.argmax(1) == same).float().mean()
            bar.set_postfix(loss=f"{loss.item():.3f}", top1=f"{hits.item():.2f}")
        if is_due(step, steps, 300):
            save_checkpoint(checkpoint, step + 1, optimizer, clip=clip)
    return clip.eval()


def image_processor():
    """The preprocessing of the CLIPs and of the copy detector: 64 pixels, [0, 1] -> [-1, 1]."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def save_clip(clip, tokenizer, folder):
    """Writes a CLIP as a folder that transformers loads: weights, tokenizer, preprocessing."""
    half(clip).save_pretrained(folder)
    load_in_float(folder)
    tokenizer.save_pretrained(folder)
    image_processor().save_pretrained(folder)


def take_text_encoder(clip):
    """The text encoder of a CLIP as a module of its own, as Stable Diffusion takes OpenAI's."""
    text_encoder = CLIPTextModel(clip.config.text_config)
    weights = {}
    for key, tensor in clip.state_dict().items():
        if key.startswith("text_model."):
            weights[key.removeprefix("text_model.")] = tensor
    text_encoder.load_state_dict(weights)
    return text_encoder


# ---- 5. UNet ------------------------------------------------------------------------------------


@torch.no_grad()
def cache_latents(args, vae, images, data, copies=8):
    """The latents of every image, (names, 3 styles, copies, 4, 16, 16), scaled to unit variance.

    Copy 0 is the image itself, the others are shifted and mirrored. The autoencoder does not change
    any more, so the latents are computed once, before the training.
    """
    _, g = generators(args.seed, "latents")
    rows = []
    for n in tqdm(range(len(images)), "latents"):
        x = [images[n]]
        for _ in range(copies - 1):
            x.append(augment(images[n], [n] * 3, data, g))
        x = torch.cat(x).to(args.device)  # (copies * 3, 3, 64, 64)
        rows.append(vae.encode(x).latent_dist.mean * vae.config.scaling_factor)
    z = torch.stack(rows)  # (names, copies * 3, 4, 16, 16)
    return z.view(len(images), copies, 3, *z.shape[2:]).transpose(1, 2)


def make_unet(text_width):
    """Stable Diffusion's UNet for 16x16 latents, with random weights.

    Narrower and with one layer per block; captions enter by cross-attention, as in the original.
    """
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(96, 128, 144),
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=4,
    )


def make_sd_scheduler():
    """The noise schedule and sampler in the folder of Stable Diffusion v1.4."""
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        set_alpha_to_one=False,
    )
    # PNDM never clips. A DDIM made from this config would, at 1, and latents are larger than that.
    scheduler.register_to_config(clip_sample=False)
    return scheduler


def pick_latents(k, n_copies, weights, rng):
    """32 triples (name, style, copy) for a step of cycle k of a UNet.

    weights: of the names, in cycle 1. The triples are sampled in either cycle, so that the styles
    of a step do not depend on the cycle.
    """
    n_names = len(weights)
    picks = []
    for _ in range(32):
        pick = (rng.randrange(n_names), rng.randrange(3), rng.randrange(n_copies))
        picks.append(pick)
    if k == 1:
        names = rng.choices(range(n_names), weights, k=32)
        styles = [style for _, style, _ in picks]
        picks = [(n, s, 0) for n, s in zip(names, styles, strict=True)]
    return picks


def train_unet(args, data, latents, vae, text_encoder, tokenizer):
    """Denoising diffusion on latents (Ho et al. 2020), conditioned on captions. Saves OUT/sd."""
    torch.manual_seed(args.seed)
    unet = make_unet(text_encoder.config.hidden_size).to(args.device)
    model = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    # The text encoder is pre-trained. A tenth of the learning rate keeps synonyms close together.
    # In Stable Diffusion it is frozen; here it has seen a thousand steps, and still has to learn.
    optimizer = adamw((unet, 7e-4), (text_encoder, 7e-5))
    ema = moving_average(model, 0.999)
    checkpoint = args.work / "unet.safetensors"
    start = load_checkpoint(checkpoint, optimizer, model=model, ema=ema)
    steps = cycle(args, "unet")[-1]
    scheduler = make_sd_scheduler()
    alpha_bar = scheduler.alphas_cumprod.to(args.device)  # (1000,)
    # The second cycle is for what is hard to tell apart or to name: cats, and what has nicknames.
    weights = [1 + bool(e["nicknames"]) + ("cat" in e["groups"]) for e in data["emoji"]]
    bar = progress_bar("unet", start, steps)
    for step in bar:
        k, since, length, _ = cycle(args, "unet", step)
        rng, g = generators(args.seed, "unet", step)
        # Shifted and mirrored copies teach shapes, in a third of the first cycle. Then details are
        # learned on the images as they are.
        with_copies = k == 0 and 3 * since < length
        picks = pick_latents(k, latents.shape[2] if with_copies else 1, weights, rng)
        z = torch.stack([latents[p] for p in picks])  # (B, 4, 16, 16)
        texts = captions(picks, data, rng, other=(0.4, 0.5)[k])
        texts = drop_captions(texts, rng)
        noise = torch.randn(z.shape, generator=g).to(z.device)
        t = torch.randint(0, 1000, (len(z),), generator=g).to(z.device)  # (B,)
        # Every image has its own noise and its own timestep.
        zt = add_noise(z, noise, alpha_bar[t])
        ids = tokenize(tokenizer, texts, args.device)
        with bf16(args.device):
            states = text_encoder(ids).last_hidden_state  # (B, 77, D)
            eps = unet(zt, t, states).sample
        loss = min_snr_loss(eps, noise, alpha_bar[t])
        cosine_lr(optimizer, since, length, peak=(1, 0.7)[k])
        optimize(loss, optimizer)
        ema.update_parameters(model)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if is_due(step, steps, 500):
            save_checkpoint(checkpoint, step + 1, optimizer, model=model, ema=ema)
            save_sd(args.work / "sd", ema.module, vae, tokenizer, scheduler)  # to look at
    save_sd(args.out / "sd", ema.module, vae, tokenizer, scheduler)


def save_sd(folder, model, vae, tokenizer, scheduler):
    """Writes a StableDiffusionPipeline in half precision. model: {"unet", "text_encoder"}."""
    # Saved and loaded again: this makes half-precision copies, and the training goes on in full.
    with tempfile.TemporaryDirectory() as tmp:
        model["text_encoder"].save_pretrained(f"{tmp}/text_encoder")
        model["unet"].save_pretrained(f"{tmp}/unet")
        vae.save_pretrained(f"{tmp}/vae")
        fp16 = torch.float16
        text_encoder = CLIPTextModel.from_pretrained(f"{tmp}/text_encoder", dtype=fp16)
        unet = UNet2DConditionModel.from_pretrained(f"{tmp}/unet", torch_dtype=fp16)
        half_vae = AutoencoderKL.from_pretrained(f"{tmp}/vae", torch_dtype=fp16)
    unet.register_to_config(_name_or_path="")  # not the temporary folder's
    half_vae.register_to_config(_name_or_path="")
    pipe = StableDiffusionPipeline(
        vae=half_vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    load_in_float(folder)


# ---- 6. DDPM ------------------------------------------------------------------------------------


def write_creatures(folder, data, images):
    """Writes the DDPM's training images, 32x32 pixels, as folder/STYLE-NAME.png.

    Returns them, (n, 3, 32, 32) in [-1, 1].
    """
    folder.mkdir(parents=True, exist_ok=True)
    side = SIZE // 2
    tiles = []
    for entry, variants in zip(data["emoji"], images, strict=True):
        if not CREATURES & entry["groups"].keys():
            continue
        name = entry["name"].replace(" ", "-")
        for style, x in zip(STYLES, variants, strict=True):
            tile = to_image(x).resize((side, side), Image.LANCZOS)
            tile.save(folder / f"{style}-{name}.png", optimize=True)
            tiles.append(to_pixels(tile))
    return torch.stack(tiles).permute(0, 3, 1, 2).float() / 127.5 - 1


def make_ddpm_unet():
    """A UNet for 32x32 pixels without a prompt, with random weights.

    As in Ho et al., attention only where an image is small: here at 8x8.
    """
    return UNet2DModel(
        sample_size=SIZE // 2,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64, 112),
        norm_num_groups=8,
        attention_head_dim=16,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


def train_ddpm(args, x0):
    """Ho et al. 2020 in pixels x0 (n, 3, 32, 32), without a prompt. Saves OUT/ddpm."""
    torch.manual_seed(args.seed)
    unet = make_ddpm_unet().to(args.device)
    # The noise schedule of google/ddpm-celebahq-256
    scheduler = DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    alpha_bar = scheduler.alphas_cumprod.to(args.device)  # (1000,)
    optimizer = adamw((unet, 1e-3))
    ema = moving_average(unet, 0.998)
    checkpoint = args.work / "ddpm.safetensors"
    start = load_checkpoint(checkpoint, optimizer, unet=unet, ema=ema)
    steps = cycle(args, "ddpm")[-1]
    bar = progress_bar("ddpm", start, steps)
    for step in bar:
        _, g = generators(args.seed, "ddpm", step)
        idx = torch.randint(len(x0), (32,), generator=g)
        x = x0[idx].to(args.device)  # (B, 3, 32, 32)
        noise = torch.randn(x.shape, generator=g).to(x.device)
        t = torch.randint(0, 1000, (len(x),), generator=g).to(x.device)  # (B,)
        with bf16(args.device):
            eps = unet(add_noise(x, noise, alpha_bar[t]), t).sample
        loss = min_snr_loss(eps, noise, alpha_bar[t])
        cosine_lr(optimizer, step, steps)
        optimize(loss, optimizer)
        ema.update_parameters(unet)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if is_due(step, steps, 500):
            save_checkpoint(checkpoint, step + 1, optimizer, unet=unet, ema=ema)
    DDPMPipeline(half(ema.module), scheduler).save_pretrained(args.out / "ddpm")


# ---- 7. transformer -----------------------------------------------------------------------------


def split_heads(x, n_heads, norm=None):
    """(B, rows, D) -> (B, heads, rows, D / heads), normalised by a module if one is given."""
    x = x.unflatten(-1, (n_heads, -1)).transpose(1, 2)
    return x if norm is None else norm(x)


class CountedRow:
    """Attention in which the last caption row counts 256 times: exactly 256 copies of that row.

    Stable Diffusion 3 appends 256 zero rows to a caption when its T5 text encoder is left out. They
    have no positions, so they stay alike in all layers. One row whose attention logits are raised
    by log 256 has the same effect, in a quarter of the time.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        """Joint attention of 64 image patches and the caption rows, as diffusers calls it."""
        x, c = hidden_states, encoder_hidden_states  # (B, 64, D), (B, rows, D)
        # Queries, keys, values of patches and caption: each (B, heads, 64 + rows, D / heads)
        q_x = split_heads(attn.to_q(x), attn.heads, attn.norm_q)
        q_c = split_heads(attn.add_q_proj(c), attn.heads, attn.norm_added_q)
        q = torch.cat([q_x, q_c], 2)
        k_x = split_heads(attn.to_k(x), attn.heads, attn.norm_k)
        k_c = split_heads(attn.add_k_proj(c), attn.heads, attn.norm_added_k)
        k = torch.cat([k_x, k_c], 2)
        v_x = split_heads(attn.to_v(x), attn.heads)
        v_c = split_heads(attn.add_v_proj(c), attn.heads)
        v = torch.cat([v_x, v_c], 2)

        bias = torch.zeros(k.shape[2], dtype=q.dtype, device=q.device)
        bias[-1] = math.log(256)  # exp(logit + log 256) = 256 exp(logit), in the softmax
        bias = bias.expand(1, 1, q.shape[2], -1)
        y = F.scaled_dot_product_attention(q, k, v.to(q.dtype), bias)
        y = y.transpose(1, 2).flatten(2)  # (B, 64 + rows, D)
        x, c = y.split([x.shape[1], c.shape[1]], 1)
        x = attn.to_out[0](x)
        if not attn.context_pre_only:  # the last layer has no use for the caption's output
            c = attn.to_add_out(c)
        return x, c


def encode_captions(model, ids):
    """Token ids (B, 32) -> caption rows (B, 33, D) and one pooled vector (B, D) per caption.

    As StableDiffusion3Pipeline does without T5, but with one zero row in place of 256, for
    CountedRow. model: {"text_encoder", "text_encoder_2"}.
    """
    a = model["text_encoder"](ids, output_hidden_states=True)
    b = model["text_encoder_2"](ids, output_hidden_states=True)
    rows = torch.cat([a.hidden_states[-2], b.hidden_states[-2]], -1)  # (B, 32, D)
    rows = F.pad(rows, (0, 0, 0, 1))
    return rows, torch.cat([a.text_embeds, b.text_embeds], -1)


def make_text_encoder(tokenizer, width):
    """A small CLIP text encoder with random weights, for captions of 32 tokens."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=32,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModelWithProjection(config)


def make_transformer():
    """Stable Diffusion 3's transformer for 16x16 latents, 8x8 patches, with random weights."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        pos_embed_max_size=8,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        caption_projection_dim=128,
        joint_attention_dim=160,
        pooled_projection_dim=160,
        qk_norm="rms_norm",
    )


def train_sd3(args, data, latents, vae, tokenizer):
    """Rectified flow (Esser et al. 2024) on latents. Saves OUT/sd3.

    z_s = (1 - s) z + s noise, with s logit-normal; the network predicts the velocity noise - z. Its
    two text encoders are trained with it, from random weights.
    """
    torch.manual_seed(args.seed)
    transformer = make_transformer()
    model = torch.nn.ModuleDict(
        {
            "transformer": transformer,
            "text_encoder": make_text_encoder(tokenizer, 96),
            "text_encoder_2": make_text_encoder(tokenizer, 64),
        }
    )
    model.to(args.device)
    transformer.set_attn_processor(CountedRow())
    optimizer = adamw((model, 1e-3))
    ema = moving_average(model, 0.999)
    checkpoint = args.work / "sd3.safetensors"
    start = load_checkpoint(checkpoint, optimizer, model=model, ema=ema)
    steps = cycle(args, "sd3")[-1]
    bar = progress_bar("sd3", start, steps)
    for step in bar:
        rng, g = generators(args.seed, "sd3", step)
        picks = [(rng.randrange(len(latents)), rng.randrange(3)) for _ in range(32)]
        z = torch.stack([latents[n, s, 0] for n, s in picks])  # (B, 4, 16, 16)
        texts = drop_captions(captions(picks, data, rng), rng)
        noise = torch.randn(z.shape, generator=g).to(z.device)
        sigma = torch.randn(len(z), generator=g).sigmoid().to(z.device)  # s, (B,)
        # s = 0: the latent, s = 1: noise. Logit-normal: mostly in the middle, where the velocity is
        # hardest to predict (their Sec. 3.1).
        s = sigma.view(-1, 1, 1, 1)
        zs = (1 - s) * z + s * noise
        ids = tokenize(tokenizer, texts, args.device)
        with bf16(args.device):
            rows, pooled = encode_captions(model, ids)
            # 1000 s: the timestep as the transformer's embedding expects it
            v = transformer(zs, rows, pooled, 1000 * sigma).sample
        # Flow matching: the velocity of the straight path from z to the noise. It is the same at
        # all s; all weighting is in how s is sampled.
        loss = F.mse_loss(v.float(), noise - z)
        cosine_lr(optimizer, step, steps)
        optimize(loss, optimizer)
        ema.update_parameters(model)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if is_due(step, steps, 500):
            save_checkpoint(checkpoint, step + 1, optimizer, model=model, ema=ema)
    save_sd3(args.out / "sd3", ema.module, vae, tokenizer)


def save_sd3(folder, model, vae, tokenizer):
    """Writes a StableDiffusion3Pipeline without T5 in half precision. model: see train_sd3."""
    # Stable Diffusion 3 shifts its latents before it scales them; the autoencoder of sd/ does not.
    vae = half(vae)
    vae.register_to_config(shift_factor=0.0, _name_or_path="")
    pipe = StableDiffusion3Pipeline(
        transformer=half(model["transformer"]),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=half(model["text_encoder"]),
        tokenizer=tokenizer,
        text_encoder_2=half(model["text_encoder_2"]),
        tokenizer_2=tokenizer,
        **NO_T5,
    )
    pipe.save_pretrained(folder)
    load_in_float(folder)


# ---- 8. XL's UNet -------------------------------------------------------------------------------


def make_sdxl_unet():
    """Stable Diffusion XL's UNet for 16x16 latents, with random weights.

    What is XL about it: most transformer layers are where the image is smallest; a caption's rows
    are those of two text encoders side by side, 96 + 64 numbers; and with the timestep, the
    network is told the second encoder's pooled vector (64) and six sizes, of 8 numbers each.
    """
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 64, 64),
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=4,  # diffusers takes it as the number of heads
        use_linear_projection=True,
        cross_attention_dim=96 + 64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64 + 6 * 8,
    )


def make_sdxl_scheduler():
    """The noise schedule and sampler in the folder of Stable Diffusion XL."""
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    # As in make_sd_scheduler: a sampler made from this config must not clip latents.
    scheduler.register_to_config(clip_sample=False)
    return scheduler


def encode_xl(model, texts, tokenizer, device):
    """Texts -> caption rows (B, 32, D) of both encoders, and the second's pooled vectors (B, P).

    As StableDiffusionXLPipeline does. The embeddings of the empty caption are zeros, not the output
    of the encoders (force_zeros_for_empty_prompt). model: {"text_encoder", "text_encoder_2"}.
    """
    ids = tokenize(tokenizer, texts, device)
    # The layer before the last, as in XL and in part 7: the encoders were trained for this use.
    a = model["text_encoder"](ids, output_hidden_states=True).hidden_states[-2]
    b = model["text_encoder_2"](ids, output_hidden_states=True)
    rows = torch.cat([a, b.hidden_states[-2]], -1)
    keep = torch.tensor([float(bool(text)) for text in texts], device=device)[:, None]
    return rows * keep[:, None], b.text_embeds * keep


def train_sdxl(args, data, latents, vae, tokenizer):
    """Denoising diffusion with the conditions of XL (Podell et al. 2023). Saves OUT/sdxl.

    As part 5. XL takes two text encoders that were trained before; here they are OUT/sd3's.
    """
    torch.manual_seed(args.seed)
    unet = make_sdxl_unet()
    # The same attention, written out: for so few tokens, the backward pass of PyTorch's fused one
    # is slow on a CPU, and takes a third of a step.
    unet.set_attn_processor(AttnProcessor())
    sd3 = args.out / "sd3"
    first = CLIPTextModel.from_pretrained(sd3, subfolder="text_encoder")
    second = CLIPTextModelWithProjection.from_pretrained(sd3, subfolder="text_encoder_2")
    model = {"unet": unet, "text_encoder": first, "text_encoder_2": second}
    model = torch.nn.ModuleDict(model).to(args.device)
    # XL freezes its encoders. These are small, and follow the UNet at a tenth of its rate.
    optimizer = adamw((unet, 1e-3), (first, 1e-4), (second, 1e-4))
    ema = moving_average(model, 0.999)
    checkpoint = args.work / "sdxl.safetensors"
    start = load_checkpoint(checkpoint, optimizer, model=model, ema=ema)
    steps = cycle(args, "sdxl")[-1]
    alpha_bar = make_sdxl_scheduler().alphas_cumprod.to(args.device)  # (1000,)
    # Height and width before and after cropping, between them the crop's corner. XL's images were
    # cropped and scaled; these are neither, so that the six numbers are always the same.
    sizes = torch.tensor([SIZE, SIZE, 0, 0, SIZE, SIZE], device=args.device)
    sizes = sizes.expand(32, 6)
    # As in part 5, with more cats: a smaller network takes longer to tell their faces apart.
    weights = [1 + bool(e["nicknames"]) + 2 * ("cat" in e["groups"]) for e in data["emoji"]]
    bar = progress_bar("sdxl", start, steps)
    for step in bar:
        k, since, length, _ = cycle(args, "sdxl", step)
        rng, g = generators(args.seed, "sdxl", step)
        picks = pick_latents(k, 1, weights, rng)
        z = torch.stack([latents[p] for p in picks])  # (B, 4, 16, 16)
        texts = captions(picks, data, rng, other=(0.4, 0.5)[k])
        texts = drop_captions(texts, rng)
        noise = torch.randn(z.shape, generator=g).to(z.device)
        t = torch.randint(0, 1000, (len(z),), generator=g).to(z.device)  # (B,)
        zt = add_noise(z, noise, alpha_bar[t])
        with bf16(args.device):
            rows, pooled = encode_xl(model, texts, tokenizer, args.device)
            added = {"text_embeds": pooled, "time_ids": sizes}
            eps = unet(zt, t, rows, added_cond_kwargs=added).sample
        loss = min_snr_loss(eps, noise, alpha_bar[t])
        cosine_lr(optimizer, since, length, peak=(1, 0.7)[k])
        optimize(loss, optimizer)
        ema.update_parameters(model)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if is_due(step, steps, 500):
            save_checkpoint(checkpoint, step + 1, optimizer, model=model, ema=ema)
            save_sdxl(args.work / "sdxl", ema.module, vae, tokenizer)  # to look at
    save_sdxl(args.out / "sdxl", ema.module, vae, tokenizer)


def save_sdxl(folder, model, vae, tokenizer):
    """Writes a StableDiffusionXLPipeline in half precision. model: see train_sdxl."""
    vae = half(vae)
    vae.register_to_config(_name_or_path="")
    pipe = StableDiffusionXLPipeline(
        unet=half(model["unet"]),
        scheduler=make_sdxl_scheduler(),
        vae=vae,
        text_encoder=half(model["text_encoder"]),
        tokenizer=tokenizer,
        text_encoder_2=half(model["text_encoder_2"]),
        tokenizer_2=tokenizer,
        force_zeros_for_empty_prompt=True,
    )
    pipe.save_pretrained(folder)
    load_in_float(folder)


# ---- 9. copy detector ---------------------------------------------------------------------------


def make_copy_detector():
    """A small vision transformer with random weights, 64x64 pixels -> embeddings (B, 64).

    SSCD is a ResNet-50; a transformer is in the libraries that we need anyway.
    """
    config = CLIPVisionConfig(
        hidden_size=80,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=8,
        projection_dim=64,
    )
    return CLIPVisionModelWithProjection(config)


def distort(x, g):
    """What happens to a copy: shifted, half the resolution, blurred, recoloured, noisy.

    (B, 3, 64, 64) -> the same shape, each image with its own strengths.
    """
    dx, dy = torch.randint(-3, 4, (2,), generator=g).tolist()
    x = x.roll((dy, dx), (-2, -1))
    r = torch.rand(len(x), 4, 1, 1, 1, generator=g)
    rough = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bicubic")
    # Half of the images lose half of their resolution; the other distortions are of any strength.
    x = torch.where(r[:, 0] < 0.5, rough, x)
    blurred = F.avg_pool2d(F.pad(x, (2,) * 4, "replicate"), 5, 1)
    x = torch.lerp(x, blurred, r[:, 1])
    gain = 1 + 0.2 * (torch.rand(len(x), 3, 1, 1, generator=g) - 0.5)  # of each colour
    noise = torch.randn(x.shape, generator=g)
    return (x * gain + 0.3 * r[:, 2] * noise).clamp(-1, 1)


def copy_loss(e):
    """SSCD's loss for unit vectors e (2B, 64), where rows i and i + B are copies of one image.

    Contrastive: each row is to find its copy among all rows. Entropy: a row far from its nearest
    other image spreads the embeddings evenly, so that one threshold suits all images. Returns
    (loss, mean cosine of the copies, mean cosine of the nearest other images).
    """
    cos = (e @ e.T).fill_diagonal_(-1)  # (2B, 2B); no row is its own copy
    # Row i belongs to row i + B, row i + B to row i.
    partner = torch.arange(len(e), device=e.device).roll(len(e) // 2)
    others = cos.scatter(1, partner[:, None], -1).amax(1)  # nearest that is no copy, (2B,)
    # |a - b|^2 = 2 - 2 cos for unit vectors; the floor keeps the logarithm finite
    spread = -(2 - 2 * others).clamp(min=1e-4).sqrt().log().mean()
    loss = F.cross_entropy(cos / 0.05, partner) + spread
    copies = cos.gather(1, partner[:, None])
    return loss, copies.mean(), others.mean()


def train_copy_detector(args, data, images):
    """SSCD (Pizzi et al. 2022) in miniature. Saves OUT/copy.

    Two distorted copies of one image attract, all other images repel and spread evenly.
    """
    torch.manual_seed(args.seed)
    net = make_copy_detector().to(args.device)
    optimizer = adamw((net, 1e-3), weight_decay=0.05)
    checkpoint = args.work / "copy.safetensors"
    start = load_checkpoint(checkpoint, optimizer, net=net)
    steps = cycle(args, "copy")[-1]
    everything = images.flatten(0, 1)  # (n, 3, 64, 64)
    members = group_members(data)
    bar = progress_bar("copy detector", start, steps)
    for step in bar:
        rng, g = generators(args.seed, "copy", step)
        # Half of the batch from two groups: other images of the same thing are no copies.
        near = []
        for group in rng.sample(list(members), 2):
            near += members[group]
        picks = rng.sample(near, min(32, len(near)))
        picks += rng.sample(range(len(everything)), 64)
        picks = list(dict.fromkeys(picks))[:64]
        x = torch.cat([distort(everything[picks], g), distort(everything[picks], g)])
        with bf16(args.device):
            e = net(x.to(args.device)).image_embeds  # (2B, 64)
            e = F.normalize(e.float(), dim=-1)
        loss, copies, others = copy_loss(e)
        cosine_lr(optimizer, step, steps)
        optimize(loss, optimizer)
        if step % 50 == 0:
            bar.set_postfix(
                loss=f"{loss.item():.3f}",
                copies=f"{copies:.2f}",
                nearest_other=f"{others:.2f}",
            )
        if is_due(step, steps, 250):
            save_checkpoint(checkpoint, step + 1, optimizer, net=net)
    half(net).save_pretrained(args.out / "copy")
    load_in_float(args.out / "copy")
    image_processor().save_pretrained(args.out / "copy")


# ---- 10. report ---------------------------------------------------------------------------------


def fraction(hits):
    """The fraction of True in a tensor, to three digits."""
    return round(hits.float().mean().item(), 3)


def unit(features):
    """CLIP's features as unit vectors (n, D); some versions of transformers wrap them."""
    return F.normalize(getattr(features, "pooler_output", features), dim=-1)


def embed_texts(clip, tokenizer, texts, device):
    """Texts -> unit vectors (n, D)."""
    return unit(clip.get_text_features(tokenize(tokenizer, texts, device)))


def embed_images(clip, x, device):
    """Images (n, 3, 64, 64) in [-1, 1] -> unit vectors (n, D)."""
    embeddings = []
    for part in x.split(64):  # 64 at once: memory
        features = clip.get_image_features(part.to(device))
        embeddings.append(unit(features))
    return torch.cat(embeddings)


def ranks(images, names, truth):
    """How many names score higher than the true one, for each image: 0 is a hit, (n,).

    images, names: unit vectors. truth: the index of each image's name.
    """
    scores = images @ names.T  # (n, names)
    truth = torch.tensor(truth, device=scores.device)[:, None]
    return (scores > scores.gather(1, truth)).sum(1)


def sample_prompts(args, pipe, prompts, name):
    """One image per prompt, (n, 3, 64, 64) in [-1, 1]; image k is generated with seed + k."""
    images = []
    for i in tqdm(range(0, len(prompts), 30), f"report on {name}"):
        part = prompts[i : i + 30]
        seeds = [args.seed + i + k for k in range(len(part))]
        output = pipe(
            part,
            num_inference_steps=20,
            guidance_scale=3.0,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
        )
        images.append(output.images)
    return torch.cat(images).float().cpu() * 2 - 1


def contact_sheet(path, images, x, picks, names, hits):
    """Writes a sheet of pairs: the original image, the generated one, and the name below.

    images: (names, 3 styles, ...). x: the generated ones. picks: their (name, style). hits: whether
    the name ranks first; it is red otherwise.
    """
    rows = len(picks) // 66  # 9 rows of 600 images: the rest is scored, but not shown
    height = 2 * SIZE + 14  # 14: a line of text
    sheet = Image.new("RGB", (COLUMNS * SIZE, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (n, s) in enumerate(picks[: COLUMNS * rows]):
        left, top = k % COLUMNS * SIZE, k // COLUMNS * height
        sheet.paste(to_image(images[n, s]), (left, top))
        sheet.paste(to_image(x[k]), (left, top + SIZE))
        name = names[n].removeprefix("flag of ")[:11]
        colour = "black" if hits[k] else "red"
        pen.text((left + 2, top + 2 * SIZE), name, fill=colour)
    sheet.quantize(256).save(path, optimize=True)  # 256 colours: a smaller file


@torch.no_grad()
def report(args, data, images, pipe, name, n):
    """Generates n random (name, style) prompts; the scoring CLIP ranks all names for each image.

    Returns the fractions of hits and writes a contact sheet.
    """
    pipe.set_progress_bar_config(disable=True)
    device = args.device
    # The scorer: trained apart, so that the generator is not scored by its own text encoder.
    clip = CLIPModel.from_pretrained(args.out / "clip", dtype=torch.float32).to(device).eval()
    tokenizer = CLIPTokenizer.from_pretrained(args.out / "clip")
    names = [entry["name"] for entry in data["emoji"]]
    name_emb = embed_texts(clip, tokenizer, names, device)  # (names, D)

    rng, _ = generators(args.seed, "report")
    picks = [(rng.randrange(len(names)), rng.randrange(3)) for _ in range(n)]
    prompts = [f"{names[i]}, in the style of {STYLES[s]}" for i, s in picks]
    x = sample_prompts(args, pipe, prompts, name)
    x_emb = embed_images(clip, x, device)  # (n, D)
    generated = ranks(x_emb, name_emb, [i for i, _ in picks])
    originals = images.flatten(0, 1)
    original_emb = embed_images(clip, originals, device)
    real = ranks(original_emb, name_emb, [i // 3 for i in range(len(originals))])

    # Style: the right name in each of the three styles; is the style of the prompt the nearest?
    styled = [f"{names[i]}, in the style of {style}" for i, _ in picks for style in STYLES]
    styled_emb = embed_texts(clip, tokenizer, styled, device).view(n, 3, -1)
    nearest = (styled_emb @ x_emb[:, :, None])[..., 0].argmax(1)  # (n,)
    style_hits = nearest.cpu() == torch.tensor([s for _, s in picks])

    suffix = "" if name == "sd" else f"_{name}"
    path = args.out / f"contact_sheet{suffix}.png"
    contact_sheet(path, images, x, picks, names, generated < 1)
    return {
        "n": n,
        "names": len(names),
        "drawn": {"top1": fraction(generated < 1), "top3": fraction(generated < 3)},
        "real": {"top1": fraction(real < 1), "top3": fraction(real < 3)},
        "style": fraction(style_hits),
    }


def ddpm_sheet(path, rows_of_images):
    """Writes a sheet of groups of images, three rows of 20 each, (60, 3, 32, 32) in [-1, 1]."""
    side, gap = SIZE // 2, 7
    sheet = Image.new("RGB", (20 * side, 9 * side + 2 * gap), "white")
    for group, images in enumerate(rows_of_images):
        for k, x in enumerate(images):
            top = (3 * group + k // 20) * side + gap * group
            sheet.paste(to_image(x), (k % 20 * side, top))
    sheet.quantize(256).save(path, optimize=True)


@torch.no_grad()
def report_ddpm(args, x0, n=60):
    """Two questions about the DDPM, answered by the copy detector.

    Does denoising a noised training image return the same image (the noise-and-denoise probe)? And
    does a generated image resemble any training image? x0: the training images (N, 3, 32, 32).
    """
    device = args.device
    pipe = DDPMPipeline.from_pretrained(args.out / "ddpm").to(device)
    net = CLIPVisionModelWithProjection.from_pretrained(args.out / "copy", dtype=torch.float32)
    net = net.to(device).eval()

    def detect(x):
        """Unit vectors (n, 64) of images (n, 3, 32, 32)."""
        large = F.interpolate(x.to(device), (SIZE, SIZE), mode="bicubic", antialias=True)
        return F.normalize(net(large.clamp(-1, 1)).image_embeds, dim=-1)

    # One generator for all that follows: the order of the samples is part of the result.
    _, g = generators(args.seed, "report ddpm")
    x = x0[torch.randperm(len(x0), generator=g)[:n]]
    noise = torch.randn(x.shape, generator=g)
    # Probe: noise to t = 250, where half of the variance is noise, and denoise step by step.
    z = pipe.scheduler.add_noise(x, noise, torch.tensor([250])).to(device)
    pipe.scheduler.set_timesteps(1000)
    for t in tqdm(range(250, -1, -1), "report on ddpm"):
        z = pipe.scheduler.step(pipe.unet(z, t).sample, t, z, generator=g).prev_sample
    similarity = (detect(z.clamp(-1, 1)) * detect(x)).sum(1)  # (n,)

    # From pure noise, in 50 steps. The similarity to the nearest training image: 1 is a copy.
    sampler = DDIMPipeline(pipe.unet, DDIMScheduler.from_config(pipe.scheduler.config))
    sampler.set_progress_bar_config(disable=True)
    output = sampler(n, generator=g, num_inference_steps=50, output_type="np")
    generated = torch.from_numpy(output.images).permute(0, 3, 1, 2) * 2 - 1
    nearest = (detect(generated) @ detect(x0).T).amax(1)  # (n,)

    ddpm_sheet(args.out / "contact_sheet_ddpm.png", (x, z.cpu(), generated))
    return {
        "n": n,
        "given_back": {
            "mean": round(similarity.mean().item(), 3),
            "above_0.8": fraction(similarity > 0.8),
        },
        "nearest_training_picture": {
            "median": round(nearest.median().item(), 3),
            "above_0.4": fraction(nearest > 0.4),
        },
    }


# ---- main ---------------------------------------------------------------------------------------


def train(args, data, images):
    """Parts 2 to 9. A part that is finished is loaded from its checkpoint in --work."""
    folder = args.work / "tokenizer"
    if not folder.exists():
        train_tokenizer(data, args.seed).save_pretrained(f"{folder}.tmp")
        os.replace(f"{folder}.tmp", folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    vae = train_vae(args, data, images)
    # The last two numbers: width of the text encoder, width of the image encoder.
    scorer = train_clip(args, data, images, tokenizer, "scorer", 128, 160)
    save_clip(scorer, tokenizer, args.out / "clip")
    reader = train_clip(args, data, images, tokenizer, "reader", 192, 128)
    text_encoder = take_text_encoder(reader).to(args.device)
    latents = cache_latents(args, vae, images, data)
    train_unet(args, data, latents, vae, text_encoder, tokenizer)
    train_ddpm(args, write_creatures(args.out / "creatures", data, images))
    # 32 tokens are enough for every caption here, and cost less than 77 in joint attention.
    short_tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=32)
    train_sd3(args, data, latents, vae, short_tokenizer)
    train_sdxl(args, data, latents, vae, short_tokenizer)
    train_copy_detector(args, data, images)


def main(args):
    """Fetches the images where they are missing, trains all parts, scores the models."""
    if not (args.out / "images" / "emoji.json").exists():
        fetch_images(args.out / "images")
    data, images = load_images(args.out / "images")
    if not args.report_only:
        train(args, data, images)

    # Scored as they were saved: the weights in half precision, computed in float32.
    fp32 = torch.float32
    sd = StableDiffusionPipeline.from_pretrained(args.out / "sd", dtype=fp32)
    sd.scheduler = DPMSolverMultistepScheduler.from_config(sd.scheduler.config)
    sd3 = StableDiffusion3Pipeline.from_pretrained(args.out / "sd3", dtype=fp32, **NO_T5)
    sdxl = StableDiffusionXLPipeline.from_pretrained(args.out / "sdxl", dtype=fp32)
    # Written again: --report-only has not trained, and the files are always the same.
    x0 = write_creatures(args.out / "creatures", data, images)
    result = {
        "sd": report(args, data, images, sd.to(args.device), "sd", 600),
        "sd3": report(args, data, images, sd3.to(args.device), "sd3", 300),
        "sdxl": report(args, data, images, sdxl.to(args.device), "sdxl", 300),
        "ddpm": report_ddpm(args, x0),
    }
    print(json.dumps(result))
    write_text(args.out / "report.json", json.dumps(result, indent=1))


if __name__ == "__main__":
    main(parse_args())
