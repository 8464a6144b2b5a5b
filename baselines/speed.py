"""SPEED: V of the cross-attention is edited by a closed form, where nothing retained is changed.

Paper: "SPEED: Scalable, Precise, and Efficient Concept Erasure for Diffusion Models", Li et al.,
arXiv 2503.07392. No training. UCE weighs the retained prompts against the erased ones, and each of
them changes a little. Here the change D of a weight W (out, in) is confined to the directions that
the retained prompts do not use: it cannot reach them.

c1, c*, c0: the text encoder's vectors (in,) of a target, its anchor, a retained prompt, each that
of the prompt's last word; A = mean c1 c1^T and B = mean c* c1^T over the concepts. For each W:

    1. E  = W (B - A) (I + A)^-1        an edit that retains nothing, by which to choose the c0:
       R  = {c0 : |E c0| > its mean}    those that it would change most (the paper's IPF)
    2. R' = {c0 + z v v^T : c0 in R}    10 variants of each, z ~ N(0, I), along the direction v that
                                        W shrinks most: other prompts that look alike to W. Again
                                        those with |E c0'| > its mean join R (DPA)
    3. P  = U U^T                       U: eigenvectors of the mean of c0 c0^T over R whose
                                        eigenvalue is below --threshold, the null space
    4. K2 = [start token, 3 centres]    of the empty prompt: its first vector, and the centres that
                                        k-means finds among its other 76. W + D maps these exactly
                                        as W does (IEC)
    5. M  = (A P + beta I)^-1,          G = K2^T P M K2
    6. D  = W (B - A) P [I - M K2 G^+ K2^T P] M

Eq. 6 is the D = D P with D K2 = 0 that minimises mean |(W + D) c1 - W c*|^2 + beta |D|^2.

The smaller R and the larger the threshold, the more freedom D has. Without --retain-prompts, R has
so few directions that the threshold hardly matters. Two things are different in small models such
as emoji/sd. Related concepts are nearly one vector (panda and bear differ by 0.7 at a length of
13), little of which is in the null space: |P c1|^2 is about 0.1 for the panda, and beta must be
less. And the padding after the last word tells the concept as well. With --padding, c1, c* and c0
are the vectors from the last word on, aligned as in UCE; with many prompts they leave few
directions free.

Families: Stable Diffusion 1.x and 2.x. V of a transformer sees tokens that earlier blocks have
mixed. Stable Diffusion XL was not tried.

As in the released code: R gets its variants in addition; v is of the smallest singular value that
is not 0 for lack of rows; of --retain-prompts, those that contain a target's name are left out. It
computes in float32, inverts G, and retains the empty prompt's 76 vectors without a file; here all
is float64, G^+ is a pseudo-inverse, and without a file the anchors and the empty prompt are
retained, as by UCE. Its variant for nudity, which takes all vectors of target and anchor but the
first, is left out.

    python -m baselines.speed --target "Grumpy Cat" --anchor Cat
    python -m baselines.speed --model CompVis/stable-diffusion-v1-4 \\
        --target Snoopy --anchor Dog --retain-prompts characters.txt
"""

import sys
from pathlib import Path

import torch

from backbones import TRAINABLE, StableDiffusion
from baselines import (
    concept_parser,
    load_text_to_image,
    main,
    open_run_folder,
    save_delta,
    target_prompts,
    trainable_weights,
    with_preset,
)
from baselines.uce import erase_pairs, paired_vectors, text_vectors
from common import fail, generator, pick_device
from doco import read_retain_prompts

TASK = "concept"
FAMILIES = (StableDiffusion,)
WHY = "a transformer's V sees more than the text's vectors; XL was not tried"
ROWS = [
    # Without --retain-prompts the threshold changes nothing here: none was tried.
    {"label": "SPEED", "flags": [], "paper": []},
    {
        "label": "SPEED, padding",
        "flags": ["--padding"],
        "paper": [],
        "tried": ("--threshold", "1e-2", "1e-3", "1e-1"),
    },
]
PAPER = {"threshold": 1e-1, "retain_scale": 1.0}
SMALL = {"threshold": 1e-2, "retain_scale": 1e-3}
PARAMS = {"v": r"attn2\.to_v\.", "kv": TRAINABLE["kv"]}  # names of weights, by --params
VARIANTS = 10  # of each retained vector, Eq. 2
CENTRES = 3  # of the empty prompt's vectors, Eq. 4


def parse_args(argv=None):
    """The flags of every concept baseline, without those of training, and those of SPEED."""
    parser = concept_parser(__file__, __doc__, PAPER, SMALL)
    add = parser.add_argument_group("method").add_argument
    text = "prompts to retain, one per line, beside the anchor and the empty prompt"
    add("--retain-prompts", type=Path, metavar="FILE", help=text)
    add("--params", choices=PARAMS, default="v", help="the weights to edit: V, or K and V")
    text = "of each prompt, also the vectors after that of its last word, as uce does"
    add("--padding", action="store_true", help=text)
    values = f"{PAPER['threshold']:g}; small: {SMALL['threshold']:g}"
    add("--threshold", type=float, help=f"of Eq. 3 ({values})")
    values = f"{PAPER['retain_scale']:g}; small: {SMALL['retain_scale']:g}"
    add("--retain-scale", type=float, help=f"beta of Eq. 5 ({values})")
    return parser.parse_args(argv)


# ---- the method: pure functions of float64 tensors. d: length of a text vector ------------------


def moments(target, anchor):
    """A and B, (d, d), the means of c1 c1^T and c* c1^T. target, anchor: (n, d), rows c1 and c*."""
    a = target.T @ target / len(target)
    b = anchor.T @ target / len(target)
    return a, b


def most_changed(rows, change):
    """Those of the rows (m, d) that a change (out, d) of a weight moves by more than the mean.

    All of them if it moves all by the same (by 0, where target and anchor are one vector).
    """
    lengths = (rows @ change.T).norm(dim=1)  # (m,)
    above = lengths > lengths.mean()
    return rows[above] if above.any() else rows


def retained_rows(weight, a, b, rows, g):
    """Eq. 1 and 2: the rows (m, d) to retain, chosen and augmented for this weight: (m', d).

    a, b: moments(); g: a generator on the CPU.
    """
    eye = torch.eye(len(a)).to(a)
    change = weight @ torch.linalg.solve(eye + a, b - a, left=False)  # Eq. 1: E, (out, d)
    rows = most_changed(rows, change)
    # Not the full decomposition: it would also have the directions that W maps to exactly 0.
    v = torch.linalg.svd(weight, full_matrices=False)[2][-1]  # (d,)
    z = torch.randn(VARIANTS * len(rows), len(v), generator=g, dtype=torch.float64)
    along = z.to(v.device) @ v  # z P_min = (z v) v^T, (10 m,)
    variants = rows.repeat(VARIANTS, 1) + torch.outer(along, v)  # Eq. 2
    return torch.cat([rows, most_changed(variants, change)])


def null_basis(rows, threshold):
    """Eq. 3: U (d, r), orthonormal columns, the directions that the rows (m, d) hardly have."""
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    # What is 0 comes out as the rounding of the largest, of either sign.
    values = values * (values > values[-1] * len(values) * torch.finfo(rows.dtype).eps)
    return vectors[:, values < threshold]


def kmeans(rows, k, g, iterations=100):
    """The centres (k, d) of k clusters of the rows (m, d), by Lloyd's algorithm.

    It begins with k of the rows, by the generator g. A cluster that loses all rows keeps its
    centre.
    """
    first = torch.randperm(len(rows), generator=g)[:k]
    centres = rows[first.to(rows.device)]
    cluster = None
    for _ in range(iterations):
        nearest = torch.cdist(rows, centres).argmin(1)  # (m,)
        if cluster is not None and torch.equal(nearest, cluster):
            break
        cluster = nearest
        for i in range(k):
            if (cluster == i).any():
                centres[i] = rows[cluster == i].mean(0)
    return centres


def edit(weight, a, b, basis, invariant, beta):
    """Eq. 5 and 6: D (out, d), for W (out, d). a, b: moments(); basis: U (d, r).

    invariant: (n, d), the rows that W + D maps where W does, K2^T.
    """
    eye = torch.eye(len(a)).to(a)
    k2 = invariant.T
    p = basis @ basis.T
    m = torch.linalg.inv(a @ p + beta * eye)  # Eq. 5, (d, d)
    gram = k2.T @ p @ m @ k2  # (n, n), symmetric: P M K2 are K2's parts in the null space
    # A vector of K2 that Eq. 3 retains already has no part in it, and G is singular: of the empty
    # prompt's start token, that is the rule. Where G x = 0, P M K2 x = 0 too; so D K2 = 0 holds
    # with the pseudo-inverse. Below 1e-12 of the largest, an eigenvalue is rounding.
    inner = torch.linalg.pinv(gram, rtol=1e-12, hermitian=True)
    hold = eye - m @ k2 @ inner @ k2.T @ p  # so that D K2 = 0
    return weight @ (b - a) @ p @ hold @ m  # Eq. 6


# ---- the program --------------------------------------------------------------------------------


def read_retained(args, guides):
    """The prompts to retain: the empty one, the anchors, --retain-prompts without the targets."""
    lines = read_retain_prompts(args.retain_prompts, args.target)
    return list(dict.fromkeys(["", *guides, *lines]))  # each once


def check_numbers(args):
    """Fails if a number is impossible. A flag that was not given is None."""
    for flag in ("threshold", "retain_scale"):
        value = getattr(args, flag)
        if value is not None and not value > 0:  # nan is not greater than 0 either
            fail(f"--{flag.replace('_', '-')} {value:g}: expected a positive number")


def unlearn(args):
    """Edits the weights; returns the run folder."""
    check_numbers(args)
    pairs = erase_pairs(args, args.prompts)
    retained = read_retained(args, [guide for guide, _ in pairs])
    out = open_run_folder(args)
    prompts = [*retained, *target_prompts(pairs)]
    device = pick_device(mps=False)
    model, conditions = load_text_to_image(args, prompts, FAMILIES, WHY, device)
    emb = {prompt: c["encoder_hidden_states"][0] for prompt, c in conditions.items()}  # (77, d)
    args = with_preset(args, model, PAPER, SMALL)

    tokenizer, which = model.pipe.tokenizer, "from" if args.padding else "last"
    a, b = moments(*(x.double() for x in paired_vectors(tokenizer, emb, pairs, which)))
    rows = [text_vectors(tokenizer, emb[prompt], prompt, which) for prompt in retained]
    rows = torch.cat(rows).double()
    null = emb[""].double()
    centres = kmeans(null[1:], CENTRES, generator(args.seed, "retain_prompts", 0))
    invariant = torch.cat([null[:1], centres])  # Eq. 4

    edited, free = {}, []
    weights = trainable_weights(model.net, PARAMS[args.params])
    for k, (name, weight) in enumerate(weights.items()):
        w = weight.data.double()
        g = generator(args.seed, "retain_prompts", k + 1)
        kept = retained_rows(w, a, b, rows, g)
        basis = null_basis(kept, args.threshold)
        free.append(basis.shape[1])
        if free[-1] <= len(invariant):  # D K2 = 0 leaves nothing of so few
            fail(
                f"--threshold {args.threshold:g} leaves {free[-1]} of {len(a)} directions to edit "
                f"{name}; expected more than {len(invariant)}: raise it, "
                f"or give fewer --retain-prompts"
            )
        edited[name] = (w + edit(w, a, b, basis, invariant, args.retain_scale)).float()
    print(f"null space: {min(free)} to {max(free)} of {len(a)} directions", file=sys.stderr)
    return save_delta(args, out, edited)


if __name__ == "__main__":
    main(TASK, parse_args, unlearn)
