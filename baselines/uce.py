"""UCE, Unified Concept Editing: the layers that see the text are edited by a closed form.

Paper: "Unified Concept Editing in Diffusion Models", Gandikota et al., WACV 2024. Without training,
K and V of the cross-attention map the target's words to what they were for the anchor's.

    1. W = argmin a sum_e |W k(e) - W0 k(g)|^2 + b sum_p |W k(p) - W0 k(p)|^2 + lam |W - W0|^2
    2.   = (lam W0 + a sum_e W0 k(g) k(e)^T + b sum_p W0 k(p) k(p)^T)
           (lam I + a sum_e k(e) k(e)^T + b sum_p k(p) k(p)^T)^-1

for each weight W of those below, W0 being the original. k: the vectors of the text encoder for a
prompt e to erase, the prompt g that guides it, a prompt p to preserve.

Families: Stable Diffusion 1.x, 2.x, XL, 3 and 3.5, and FLUX.1. Eq. 1 is exact for a linear layer
that sees the text encoder's vectors alone. Which are edited:

    UNets          K and V of the cross-attention. Of XL, k has the vectors of both text encoders
                   side by side. Its pooled embedding enters by add_embedding.linear_1, one vector
                   per prompt: of that layer, the columns that take it, for the others take the size
                   of the image. The released code leaves that layer as it is; with it, the target
                   remained on emoji/sdxl.
    transformers   where the text enters: context_embedder, by the vectors of the tokens, and the
                   first layer of the pooled embedding, text_embedder.linear_1, by that embedding,
                   one vector per prompt. Not K and V: they see tokens that are mixed with the image
                   and modulated by the timestep. W k + bias: Eq. 1 has no bias, and it stays.

In a transformer the edit moves the text itself, before all blocks; the released code for FLUX edits
the same two layers.

As in the paper's code: e is the bare name; of e and g, all vectors from the last word on count,
padding included, aligned at their last words; of p all 77; the empty prompt is always preserved; b
is 1 over the number of prompts to preserve, at least 0.1. --templates erases the name in the
sentences of doco.py too; --last-word is the released code of today, one vector per prompt. Both
invert in float32, here float64 solves. Their guide for an object is a blank or empty prompt; here
it is the anchor, which is also preserved.

    python -m baselines.uce --target "Grumpy Cat" --anchor Cat
    python -m baselines.uce --model CompVis/stable-diffusion-v1-4 \\
        --target Snoopy --anchor Dog --retain-prompts characters.txt
"""

from pathlib import Path

import torch

from backbones import TRAINABLE, Flux, StableDiffusion, StableDiffusion3, StableDiffusionXL
from baselines import (
    concept_parser,
    concept_prompts,
    load_text_to_image,
    main,
    open_run_folder,
    save_delta,
    target_prompts,
    trainable_weights,
    with_preset,
)
from common import pick_device
from doco import read_retain_prompts

TASK = "concept"
FAMILIES = (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux)
WHY = "a concept is named by a prompt"
ROWS = [
    {
        "label": "UCE",
        "flags": [],
        "paper": [],
        "tried": ("--lamb", "50", "0.1", "0.5", "5", "500"),
    }
]
PAPER = {"lamb": 0.5}
SMALL = {"lamb": 50.0}
# What of the text is linear, by the kind of network: {part of a condition: names of the weights
# whose first columns see it alone}
LINEAR = {
    "unet": {
        "encoder_hidden_states": TRAINABLE["kv"],
        "text_embeds": r"^add_embedding\.linear_1\.weight",  # of XL
    },
    "transformer": {
        "encoder_hidden_states": r"^context_embedder\.weight",
        "pooled_projections": r"text_embedder\.linear_1\.weight",
    },
}


def parse_args(argv=None):
    """The flags of every concept baseline, without those of training, and those of UCE."""
    parser = concept_parser(__file__, __doc__, PAPER, SMALL)
    add = parser.add_argument_group("method").add_argument
    add("--templates", action="store_true", help="erase the name in sentences (or --prompts) too")
    text = "more prompts to preserve, one per line, beside the anchor and the empty prompt"
    add("--retain-prompts", type=Path, metavar="FILE", help=text)
    add("--erase-scale", type=float, default=1.0, help="a of Eq. 1")
    text = "b of Eq. 1 (without it: 1 / number of prompts to preserve, at least 0.1)"
    add("--preserve-scale", type=float, help=text)
    text = f"lam of Eq. 1 ({PAPER['lamb']}; small: {SMALL['lamb']})"
    add("--lamb", type=float, help=text)
    add("--last-word", action="store_true", help="one vector per prompt, that of its last word")
    return parser.parse_args(argv)


def edit(weight, erase, guide, preserve, a=1.0, b=1.0, lam=0.5):
    """Eq. 2: W (out, in), in float64, for W0 (out, in).

    erase, guide: (n, in); preserve: (m, in). With these vectors as rows of E, G and P, it solves
    W (lam I + a E^T E + b P^T P) = lam W0 + a W0 G^T E + b W0 P^T P.
    """
    w0, e, g, p = (x.double() for x in (weight, erase, guide, preserve))
    n = w0.shape[1]
    eye = torch.eye(n, dtype=w0.dtype, device=w0.device)
    left = lam * w0 + w0 @ (a * g.T @ e + b * p.T @ p)  # (out, in)
    right = lam * eye + a * e.T @ e + b * p.T @ p  # (in, in), symmetric
    return torch.linalg.solve(right, left.T).T


def token_sequences(model, part):
    """[(tokenizer, slice)]: whose tokens the rows of this part of a condition are.

    Stable Diffusion 3 has the tokens of CLIP, its two encoders side by side, and after them T5's,
    or zeros without T5. FLUX has T5's. A pooled embedding is one row, of no token: None.
    """
    pipe = model.pipe
    if part in ("pooled_projections", "text_embeds"):
        return [(None, slice(None))]
    if isinstance(model, Flux):
        return [(pipe.tokenizer_2, slice(None))]
    n = pipe.tokenizer.model_max_length  # 77
    sequences = [(pipe.tokenizer, slice(n))]
    if isinstance(model, StableDiffusion3) and model.has_t5:
        sequences.append((pipe.tokenizer_3, slice(n, None)))
    return sequences


def text_vectors(tokenizer, emb, text, which):
    """k of Eq. 1: the text encoder's vectors (n, in) of a prompt, from its embedding (L, in).

    L: 77 tokens of CLIP. which: "all" of them, those "from" the prompt's last word on, or the
    "last" word's. The empty prompt has no word: its first token stands for one. tokenizer: None for
    a pooled embedding, which is returned as it is.
    """
    if which == "all" or tokenizer is None:
        return emb
    ids = tokenizer(text, truncation=True, max_length=len(emb))["input_ids"]
    last = max(len(ids) - 2, 0)  # the token before the end token
    return emb[last:] if which == "from" else emb[last : last + 1]


def paired_vectors(tokenizer, emb, pairs, which):
    """k(e) and k(g) of Eq. 1, aligned at their last words: two tensors (n, in).

    emb: {prompt: (L, in)}; pairs: erase_pairs(); which: "from" or "last", see text_vectors.
    """
    erase, guide = [], []
    for guide_prompt, erase_prompts in pairs:
        g = text_vectors(tokenizer, emb[guide_prompt], guide_prompt, which)
        for prompt in erase_prompts:
            e = text_vectors(tokenizer, emb[prompt], prompt, which)
            n = min(len(e), len(g))  # of the longer prompt, the padding at the end has no partner
            erase.append(e[:n])
            guide.append(g[:n])
    return torch.cat(erase), torch.cat(guide)


def vectors_of(model, conditions, part, pairs, preserved, last_word):
    """k(e), k(g) and k(p) of Eq. 1, from one part of the conditions: (n, in), (n, in), (m, in)."""
    which, which_preserved = ("last", "last") if last_word else ("from", "all")
    erase, guide, preserve = [], [], []
    for tokenizer, rows in token_sequences(model, part):
        # (1, L, in) -> (L, in); a pooled embedding (1, in) is one row already
        emb = {prompt: c[part].flatten(0, -2)[rows] for prompt, c in conditions.items()}
        e, g = paired_vectors(tokenizer, emb, pairs, which)
        erase.append(e)
        guide.append(g)
        for prompt in preserved:
            preserve.append(text_vectors(tokenizer, emb[prompt], prompt, which_preserved))
    return torch.cat(erase), torch.cat(guide), torch.cat(preserve)


def erase_pairs(args, sentences):
    """[(guide, [prompts to erase])]: bare names or, with sentences, the prompts of doco.py."""
    pairs = concept_prompts(args)  # also checks --target and --anchor
    if sentences:
        return pairs
    anchors = args.anchor
    if len(anchors) == 1:
        anchors = anchors * len(args.target)
    targets = [[target] for target in args.target]
    return list(zip(anchors, targets, strict=True))


def unlearn(args):
    """Edits the weights; returns the run folder."""
    pairs = erase_pairs(args, args.templates or args.prompts)
    guides = [guide for guide, _ in pairs]
    retained = read_retain_prompts(args.retain_prompts, args.target)
    preserved = list(dict.fromkeys(["", *guides, *retained]))  # each once
    out = open_run_folder(args)
    prompts = [*preserved, *target_prompts(pairs)]
    device = pick_device(mps=False)
    model, conditions = load_text_to_image(args, prompts, FAMILIES, WHY, device)
    args = with_preset(args, model, PAPER, SMALL)
    if args.preserve_scale is None:
        args.preserve_scale = max(0.1, 1 / len(preserved))

    scales = args.erase_scale, args.preserve_scale, args.lamb
    edited = {}
    for part in model.condition_names:
        vectors = vectors_of(model, conditions, part, pairs, preserved, args.last_word)
        n = vectors[0].shape[1]  # of XL's pooled embedding, fewer than its layer has columns
        for name, weight in trainable_weights(model.net, LINEAR[model.net_name][part]).items():
            w = edit(weight.data[:, :n], *vectors, *scales).float()
            edited[name] = torch.cat([w, weight.data[:, n:]], 1)
    return save_delta(args, out, edited)


if __name__ == "__main__":
    main(TASK, parse_args, unlearn)
