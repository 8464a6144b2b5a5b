"""Concept Ablation: match the target prediction to the anchor prediction on noisy anchor images.

Paper: "Ablating Concepts in Text-to-Image Diffusion Models", Kumari et al., ICCV 2023. It is DoCo
without a discriminator: it aligns predictions one by one, DoCo aligns their distribution.

    1. x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps   x_0: an anchor image, generated
    2. L   = |sg M(x_t, anchor) - M(x_t, target)|^2              sg: no gradient; M as it is now
    3. L  += |eps - M(x_t', anchor)|^2                           --retain l2: other anchor images

Families: all with a prompt, Stable Diffusion 1.x, 2.x, XL, 3 and 3.5, and FLUX.1. Eq. 2 compares
two predictions at one x_t, whatever they predict. Flow matching: x_t = (1 - s) x_0 + s eps with
s = t / 1000 in Eq. 1, and the velocity eps - x_0 in place of eps in Eq. 3.

L is the model-based loss of the paper. The released code pastes the images at random sizes on black
and masks the loss accordingly, and detaches K and V of the first token; neither is done here, nor
in doco.py. It multiplies its learning rate of 2e-6 by batch size and number of GPUs (1.6e-5, the
default here), and advises --retain l2 if the anchor's name is part of the target's.

    python -m baselines.conabl --target "Grumpy Cat" --anchor Cat
    python -m baselines.conabl --model CompVis/stable-diffusion-v1-4 \\
        --target "Van Gogh" --anchor painting --concept-type style
"""

import torch
import torch.nn.functional as F
from tqdm import tqdm

from backbones import (
    TRAINABLE,
    Flux,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
    coefficients,
    prediction_target,
)
from baselines import (
    add_weight_flags,
    concept_parser,
    concept_prompts,
    generate_latents,
    load_text_to_image,
    main,
    open_run_folder,
    predict,
    save_trained,
    target_prompts,
    training_timesteps,
    with_preset,
    with_train_method,
)
from common import generator
from doco import check_coverage

TASK = "concept"
FAMILIES = (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux)
WHY = "a concept is named by a prompt"
ROWS = [
    {
        "label": "ConAbl",
        "flags": [],
        "paper": ["--steps", "100"],
        "tried": ("--lr", "1e-4", "3e-5"),
    }
]
# The released code's settings on two GPUs
PAPER = {"steps": 100, "batch_size": 8, "lr": 1.6e-5, "num_images": 1000}
# For small models: the steps and images of doco.py, and a larger learning rate
SMALL = {"steps": 250, "batch_size": 8, "lr": 1e-4, "num_images": 64}
# A LoRA, on either: the best of three rates on emoji/sd3 and the enraged face
LORA_LR = 3e-5
PAPER |= {"lora_lr": LORA_LR}
SMALL |= {"lora_lr": LORA_LR}


def parse_args(argv=None):
    """The flags of every concept baseline, and those of Concept Ablation."""
    parser = concept_parser(__file__, __doc__, PAPER, SMALL)
    add = parser.add_argument_group("method").add_argument
    add("--retain", choices=("none", "l2"), default="none", help="l2: add Eq. 3")
    text = "the text's keys and values in the attention, the default for UNets; the layers that "
    text += "take its embeddings; all of that attention; or the whole network"
    add_weight_flags(add, TRAINABLE, text, LORA_LR)
    return parser.parse_args(argv)


def loss_ablation(pred_target, pred_anchor):
    """Eq. 2: mean squared error of two predictions (B, C, h, w), the anchor's a constant. 0-dim."""
    return F.mse_loss(pred_target, pred_anchor.detach())


def unlearn(args):
    """Runs Concept Ablation; returns the run folder."""
    pairs = concept_prompts(args)  # [(anchor prompt, [target prompts])]
    out = open_run_folder(args)
    prompts = [*(anchor for anchor, _ in pairs), *target_prompts(pairs)]
    model, conditions = load_text_to_image(args, prompts, FAMILIES, WHY)
    # The released code trains K and V of the cross-attention, as DoCo's does after it.
    args = with_train_method(args, model, unet="kv")
    args = with_preset(args, model, PAPER, SMALL)

    # Anchor images from the original model: the same as doco.py's. Image j belongs to pair j.
    n = min(args.num_images, args.steps * args.batch_size)
    check_coverage(pairs, n, len(args.target))
    pair_of = [pairs[j % len(pairs)] for j in range(n)]
    anchor_of = [anchor for anchor, _ in pair_of]
    target_of = [targets for _, targets in pair_of]
    latents = generate_latents(args, model, conditions, anchor_of)  # (n, C, h, w)

    weights = model.trainable_weights(args.train_method, args.rank, args.seed)
    params = list(weights.values())
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=1e-2, fused=True)
    batch, device = args.batch_size, model.device
    shape = (2, batch, *latents.shape[1:])
    log = []
    for step in tqdm(range(args.steps), "Concept Ablation"):
        # Two batches, idx for Eq. 2 and idx_r for Eq. 3, each with timesteps and noise of its own
        g = generator(args.seed, "doco_steps", step)
        idx, idx_r = torch.randint(n, (2, batch), generator=g).tolist()
        t, t_r = (training_timesteps(model, batch, g).to(device) for _ in range(2))
        eps, eps_r = torch.randn(shape, generator=g).to(device)

        # Eq. 1. The target prompts of a pair (styles have three) take turns.
        a, b = coefficients(t, model.alpha_bar)
        xt = a * latents[idx] + b * eps  # (B, C, h, w)
        anchors = [anchor_of[j] for j in idx]
        targets = [target_of[j][step % len(target_of[j])] for j in idx]
        with torch.no_grad():
            pred_anchor = predict(model, xt, t, conditions, anchors)
        pred_target = predict(model, xt, t, conditions, targets)
        loss = loss_ablation(pred_target, pred_anchor)

        if args.retain == "l2":  # Eq. 3
            a, b = coefficients(t_r, model.alpha_bar)
            x0_r = latents[idx_r]
            xt_r = a * x0_r + b * eps_r
            anchors_r = [anchor_of[j] for j in idx_r]
            pred_r = predict(model, xt_r, t_r, conditions, anchors_r)
            target_r = prediction_target(model.prediction_type, x0_r, eps_r, a, b)
            loss = loss + F.mse_loss(pred_r, target_r)

        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.append({"loss": loss.detach()})
    return save_trained(args, out, model, weights, log)


if __name__ == "__main__":
    main(TASK, parse_args, unlearn)
