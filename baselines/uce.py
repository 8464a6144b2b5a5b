"""UCE, Unified Concept Editing: by a formula, without training, K and V of the cross-attention read the target's words as the
anchor's (Gandikota et al., WACV 2024); a rival of doco.py.

    W = argmin  a sum_e |W k(e) - W0 k(g)|^2 + b sum_p |W k(p) - W0 k(p)|^2 + lam |W - W0|^2
      = (lam W0 + a sum_e W0 k(g) k(e)^T + b sum_p W0 k(p) k(p)^T) (lam I + a sum_e k(e) k(e)^T + b sum_p k(p) k(p)^T)^-1

for each K and V of the cross-attention, W0 as it was. k: the text encoder's vectors, of e a prompt to erase, g the prompt that
guides it, p a prompt to preserve. As in the paper's code, e is the bare name; of e and g, all vectors from the last word on
count, padding included, aligned at their last words; of p all 77; the empty prompt is always preserved; b is 1 over the number
of prompts to preserve, at least 0.1. --templates erases the name in doco.py's sentences too; --last-word is the code of today,
one vector of each prompt. Both invert in float32, here float64 solves. Their guide for an object is a blank or empty prompt;
here it is the anchor, which is also preserved.

    python baselines/uce.py --target "Grumpy Cat" --anchor Cat
    python baselines/uce.py --model CompVis/stable-diffusion-v1-4 --target Snoopy --anchor Dog --preserve Mickey Spongebob
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import atomic_save, evaluate_run, fail, load_pipeline, make_run_dir, run_name  # noqa: E402
from doco import TRAINED, prompt_pairs  # noqa: E402


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--target", nargs="+", required=True, help="what to forget; several are forgotten at once")
    p.add_argument("--anchor", nargs="+", required=True, help="what to draw instead: one for all, or one each")
    p.add_argument("--concept-type", choices=("object", "style"), default="object", help="style: the anchor is a medium")
    p.add_argument("--prompts", type=Path, help="text file of anchor prompts, one a line (default: the bare name)")
    p.add_argument("--model", default=str(HERE.parent / "emoji/sd"), help="Stable Diffusion 1.x/2.x: folder or hub id")
    p.add_argument("--templates", action="store_true", help="erase the name in sentences (or --prompts) too, not it alone")
    p.add_argument("--preserve", nargs="*", default=[], help="more to preserve, beside the anchor and the empty prompt")
    p.add_argument("--erase-scale", type=float, default=1.0, help="a, the weight of erasing")
    p.add_argument("--preserve-scale", type=float, help="b, the weight of preserving (default: 1 / their number, at least 0.1)")
    p.add_argument("--lamb", type=float, help="lam, the weight of leaving all as it is (default: 0.5, for small models 50)")
    p.add_argument("--last-word", action="store_true", help="one vector of each prompt, its last word's")
    p.add_argument("--seed", type=int, default=0, help="of eval.py; the formula draws nothing")
    p.add_argument("--out", type=Path, help="run folder (default: runs/uce-TARGET)")
    return p.parse_args(argv)


def edit(weight, erase, guide, preserve, a=1.0, b=1.0, lam=0.5):
    """The minimiser W, (out, in), for a weight W0 (out, in) and vectors erase, guide (n, in) and preserve (m, in); in float64.

    It satisfies W (lam I + a E^T E + b P^T P) = lam W0 + a W0 G^T E + b W0 P^T P with the vectors as rows of E, G and P.
    """
    w0, e, g, p = (x.double() for x in (weight, erase, guide, preserve))
    left = lam * w0 + w0 @ (a * g.T @ e + b * p.T @ p)  # (out, in)
    right = lam * torch.eye(w0.shape[1], dtype=w0.dtype, device=w0.device) + a * e.T @ e + b * p.T @ p  # (in, in), symmetric
    return torch.linalg.solve(right, left.T).T


@torch.no_grad()
def read(pipe, text, which):
    """The text encoder's vectors of a prompt, (n, in). which: "all" 77, those "from" its last word on, or the "last" word's.

    The empty prompt has no word: its start token stands for one.
    """
    tokens = pipe.tokenizer(text, padding="max_length", truncation=True, max_length=pipe.tokenizer.model_max_length)
    last = max(sum(tokens["attention_mask"]) - 2, 0)  # the one before the end token
    vectors = pipe.encode_prompt(text, pipe.device, 1, False)[0][0]  # (77, in)
    return {"all": vectors, "from": vectors[last:], "last": vectors[last : last + 1]}[which]


def unlearn(args):
    """Edits the weights and returns the run folder."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # float64 is not to be had on mps
    pairs = prompt_pairs(args)  # also where they are not used: they check --target and --anchor
    if not (args.templates or args.prompts):
        anchors = args.anchor * len(args.target) if len(args.anchor) == 1 else args.anchor
        pairs = [(anchor, [target]) for target, anchor in zip(args.target, anchors, strict=True)]
    out = args.out or Path("runs") / run_name("uce", args.target)
    if (out / "delta.safetensors").exists():
        fail(f"{out} already holds a run; choose another --out")
    make_run_dir(out)
    pipe = load_pipeline(args.model, (StableDiffusionPipeline,), dtype=torch.float32).to(device)
    which, erase, guide = "last" if args.last_word else "from", [], []
    for anchor, wordings in pairs:
        g = read(pipe, anchor, which)
        for wording in wordings:
            e = read(pipe, wording, which)
            n = min(len(e), len(g))  # one prompt may be longer: what is left of the padding pairs off
            erase, guide = [*erase, e[:n]], [*guide, g[:n]]
    preserved = dict.fromkeys(["", *(a for a, _ in pairs), *args.preserve])
    preserve = [read(pipe, text, "last" if args.last_word else "all") for text in preserved]
    vectors = [torch.cat(part) for part in (erase, guide, preserve)]
    lamb = (50.0 if pipe.unet.config.sample_size < 32 else 0.5) if args.lamb is None else args.lamb
    b = max(0.1, 1 / len(preserve)) if args.preserve_scale is None else args.preserve_scale
    scales = args.erase_scale, b, lamb
    weights = {n: p for n, p in pipe.unet.named_parameters() if re.search(TRAINED["kv"], n)}
    edited = {n: edit(p.data, *vectors, *scales).float() for n, p in weights.items()}

    settings = vars(args) | {"lamb": lamb, "preserve_scale": b}
    atomic_save(out / "args.json", text=json.dumps({"settings": settings}, indent=1, default=str))
    atomic_save(out / "delta.safetensors", edited, metadata={"format": "pt", "method": "uce", "base_model": args.model})
    return out


if __name__ == "__main__":
    args = parse_args()
    out = unlearn(args)
    sys.exit(evaluate_run("concept", args.model, out, "--seed", args.seed, "--concept-type", args.concept_type, "--target",
                          *args.target, "--anchor", *args.anchor))  # fmt: skip
