"""NAME: what the method does, in one sentence.

Paper: "Title", authors, venue and year, arXiv number. What is retained, and what it needs.

    1. x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps   its equations, one to a line
    2. L   = weight |sg M(x_t, "") - M(x_t, target)|^2           sg: without gradient

Families: those of backbones.py that the equations hold for. What the released code does
differently, and what is different here.

    python -m baselines._template --target "Grumpy Cat" --anchor Cat
"""

import torch
import torch.nn.functional as F
from tqdm import tqdm

from backbones import TRAINABLE, StableDiffusion, coefficients
from baselines import (
    concept_parser,
    concept_prompts,
    generate_latents,
    load_text_to_image,
    main,
    open_run_folder,
    predict,
    save_delta,
    target_prompts,
    trainable_weights,
    training_timesteps,
    with_preset,
)
from common import generator
from doco import check_coverage

TASK = "concept"
FAMILIES = (StableDiffusion,)
WHY = "why the equations do not hold for other families; the end of the error message"
ROWS = [
    {
        "label": "NAME",
        "flags": [],
        "paper": ["--steps", "100"],
        "tried": ("--lr", "1e-4"),
    }
]
# The presets: the paper's settings, and those for small models such as emoji/sd. A name without a
# flag, such as num_images, becomes an attribute of args too.
PAPER = {"steps": 100, "batch_size": 8, "lr": 1e-5, "num_images": 1000}
SMALL = {"steps": 250, "batch_size": 8, "lr": 1e-4, "num_images": 64}


def parse_args(argv=None):
    """The flags of every concept baseline, and those of this method."""
    parser = concept_parser(__file__, __doc__, PAPER, SMALL)
    add = parser.add_argument_group("method").add_argument
    add("--weight", type=float, default=1.0, help="of Eq. 2")
    return parser.parse_args(argv)


def loss_name(pred_target, pred_null, weight):
    """Eq. 2, for predictions (B, C, h, w). 0-dim."""
    return weight * F.mse_loss(pred_target, pred_null.detach())


def unlearn(args):
    """Runs the method; returns the run folder."""
    # First what needs no model: a mistyped flag must not cost the minutes that loading takes.
    prompts = target_prompts(concept_prompts(args))
    out = open_run_folder(args)
    # conditions: {prompt: what the network is told of it}
    model, conditions = load_text_to_image(args, prompts, FAMILIES, WHY)
    args = with_preset(args, model, PAPER, SMALL)

    # Images of the target from the original model; image j is of prompt j.
    check_coverage(prompts, args.num_images, len(args.target))
    of_image = [prompts[j % len(prompts)] for j in range(args.num_images)]
    latents = generate_latents(args, model, conditions, of_image)  # (n, C, h, w)

    # What is trained: here K and V of the cross-attention, where prompts enter the UNet.
    weights = trainable_weights(model.net, TRAINABLE["kv"])
    params = list(weights.values())
    # fused: one kernel for all weights
    optimizer = torch.optim.AdamW(params, lr=args.lr, fused=True)
    batch, device = args.batch_size, model.device
    shape = (batch, *latents.shape[1:])
    log = []
    for step in tqdm(range(args.steps), "NAME"):
        # All randomness of a step comes from g, in this order: a changed order is another result.
        g = generator(args.seed, "doco_steps", step)
        idx = torch.randint(len(latents), (batch,), generator=g)
        t = training_timesteps(model, batch, g).to(device)
        eps = torch.randn(shape, generator=g).to(device)

        a, b = coefficients(t, model.alpha_bar)
        xt = a * latents[idx] + b * eps  # Eq. 1, (B, C, h, w)
        # "sg" of Eq. 2: no graph, which saves memory and time.
        with torch.no_grad():
            pred_null = predict(model, xt, t, conditions, [""] * batch)
        texts = [of_image[j] for j in idx]
        pred_target = predict(model, xt, t, conditions, texts)
        loss = loss_name(pred_target, pred_null, args.weight)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        # Without detach(), the log would keep the graph of every step in memory.
        log.append({"loss": loss.detach()})
    return save_delta(args, out, weights, log)


if __name__ == "__main__":
    main(TASK, parse_args, unlearn)
