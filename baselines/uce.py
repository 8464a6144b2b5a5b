"""UCE, Unified Concept Editing: by a formula, without training, K and V of the cross-attention read the target's words as the
anchor's (Gandikota et al., WACV 2024); a rival of doco.py.

    W = argmin  a sum_e |W k(e) - W0 k(g)|^2 + b sum_p |W k(p) - W0 k(p)|^2 + lam |W - W0|^2
      = (lam W0 + a sum_e W0 k(g) k(e)^T + b sum_p W0 k(p) k(p)^T) (lam I + a sum_e k(e) k(e)^T + b sum_p k(p) k(p)^T)^-1

for each K and V of the cross-attention, W0 as it was. k: the text encoder's vectors, of e a prompt to erase, g the prompt that
guides it, p a prompt to preserve. Taken are all vectors from the last word on, padding included, e and g aligned at their last
words, as in the paper's code; the code of today takes the last word's alone (--last-word). Both invert in float32, here
float64 solves. Their guide for an object is a blank or empty prompt; here it is the anchor, which is also preserved.

    python baselines/uce.py --target "Grumpy Cat" --anchor Cat
    python baselines/uce.py --model CompVis/stable-diffusion-v1-4 --target Snoopy --anchor Dog --preserve Mickey Spongebob
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from doco import TRAINED, load_pipeline, prompt_pairs, atomic_save, stop  # noqa: E402


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--target", nargs="+", required=True, help="what to forget; several are forgotten at once")
    p.add_argument("--anchor", nargs="+", required=True, help="what to draw instead: one for all, or one each")
    p.add_argument("--concept-type", choices=("object", "style"), default="object", help="style: the anchor is a medium")
    p.add_argument("--prompts", type=Path, help="text file of anchor prompts, one a line (default: doco.py's templates)")
    p.add_argument("--model", default=str(HERE.parent / "emoji/sd"), help="Stable Diffusion 1.x/2.x: folder or hub id")
    p.add_argument("--preserve", nargs="*", default=[], help="more to preserve, beside the anchor")
    p.add_argument("--erase-scale", type=float, default=1.0, help="a, the weight of erasing")
    p.add_argument("--preserve-scale", type=float, default=1.0, help="b, the weight of preserving")
    p.add_argument("--lamb", type=float, help="lam, the weight of leaving all as it is (default: 0.5, for emoji/sd 5)")
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
def read(pipe, text, last_word):
    """The text encoder's vectors of a prompt from its last word on, (n, in); the empty prompt's from its first token on."""
    tokens = pipe.tokenizer(text, padding="max_length", truncation=True, max_length=pipe.tokenizer.model_max_length)
    last = max(sum(tokens["attention_mask"]) - 2, 0)  # the one before the end token
    vectors = pipe.encode_prompt(text, pipe.device, 1, False)[0][0]  # (77, in)
    return vectors[last : last + 1] if last_word else vectors[last:]


def unlearn(args):
    """Edits the weights and returns the run folder."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # float64 is not to be had on mps
    pairs = prompt_pairs(args)
    out = args.out or Path("runs") / run_name("uce", args.target)
    if (out / "delta.safetensors").exists():
        fail(f"{out} already holds a run; choose another --out")
    make_run_dir(out)
    pipe = load_pipeline(args.model, safety_checker=None, requires_safety_checker=False, dtype=torch.float32).to(device)
    erase, guide = [], []
    for anchor, wordings in pairs:
        g = read(pipe, anchor, args.last_word)
        for wording in wordings:
            e = read(pipe, wording, args.last_word)
            n = min(len(e), len(g))  # one prompt may be longer: what is left of the padding pairs off
            erase, guide = [*erase, e[:n]], [*guide, g[:n]]
    preserve = [read(pipe, text, args.last_word) for text in [*dict.fromkeys(a for a, _ in pairs), *args.preserve]]
    vectors = [torch.cat(part) for part in (erase, guide, preserve)]
    lamb = (5.0 if pipe.unet.config.sample_size < 32 else 0.5) if args.lamb is None else args.lamb
    scales = args.erase_scale, args.preserve_scale, lamb
    weights = {n: p for n, p in pipe.unet.named_parameters() if re.search(TRAINED["kv"], n)}
    edited = {n: edit(p.data, *vectors, *scales).float() for n, p in weights.items()}

    atomic_save(out / "args.json", text=json.dumps({"settings": vars(args) | {"lamb": lamb}}, indent=1, default=str))
    atomic_save(out / "delta.safetensors", edited, metadata={"format": "pt", "method": "uce", "base_model": args.model})
    return out


if __name__ == "__main__":
    args = parse_args()
    out = unlearn(args)
    sys.exit(evaluate_run("concept", args.model, out, "--seed", args.seed, "--concept-type", args.concept_type, "--target",
                          *args.target, "--anchor", *args.anchor))  # fmt: skip
