"""ESD, Erased Stable Diffusion: the model learns negative guidance away from the target.

Paper: "Erasing Concepts from Diffusion Models", Gandikota et al., ICCV 2023. Only the name of the
concept is needed, no image. Nothing is retained explicitly.

    1. x_t = a point on the sampling path of the original model e0 for the target
    2. y   = e0(x_t, "") - eta (e0(x_t, target) - e0(x_t, ""))     guidance of scale -eta
    3. L   = |y - M(x_t, target)|^2

The paper samples every x_t anew, with the model as it is so far; the released code now samples it
with the original model. So do we: the paths can then be sampled once, and each of their points is
used. The guided sampler computes e0(x_t, target) and e0(x_t, "") anyway, so y costs nothing and a
step is one forward and one backward pass. The released code computes y with a second UNet, in
bfloat16, and takes 200 steps at 5e-5 in place of the paper's 1,000 at 1e-5. ESD has no anchor:
--anchor is for the evaluation alone.

    python -m baselines.esd --target "Grumpy Cat" --anchor Cat
    python -m baselines.esd --model CompVis/stable-diffusion-v1-4 \\
        --target "Van Gogh" --anchor painting --concept-type style
"""

import torch
import torch.nn.functional as F
from tqdm import tqdm

from backbones import TRAINABLE
from baselines import (
    concept_parser,
    concept_prompts,
    ddim_scheduler,
    guide,
    load_text_to_image,
    main,
    open_run_folder,
    predict,
    predict_both,
    save_delta,
    target_prompts,
    trainable_weights,
    with_preset,
)
from common import generator
from doco import check_coverage

TASK = "concept"
ROWS = [
    {
        "label": "ESD",
        "flags": [],
        "paper": ["--steps", "1000", "--batch-size", "1"],
        "tried": ("--lr", "3e-4", "1e-4", "2e-4"),
    },
    {
        "label": "ESD-u",
        "flags": ["--train-method", "noxattn"],
        "paper": [],
        "tried": ("--lr", "1e-4", "3e-4", "1e-3"),
        "in": "rates",
    },
]
# The paper's settings: batch 1, 50 steps of DDIM
PAPER = {"steps": 1000, "batch_size": 1, "lr": 1e-5}
PAPER |= {"paths": 100, "guidance": 3.0, "sampling_steps": 50}
# For small models: the steps and batch of doco.py, and a larger learning rate
SMALL = {"steps": 250, "batch_size": 8, "lr": 3e-4}
SMALL |= {"paths": 64, "guidance": 3.0, "sampling_steps": 50}
# Their ESD-u leaves out the cross-attention, the output layers and the time embedding.
NOXATTN = r"^(?!.*(attn2\.|conv_out|conv_norm_out|time_embedding))"
TRAINABLE = TRAINABLE | {"noxattn": NOXATTN}
FIRST_STEP_SEED = 500_000  # path j has seed j; the steps must not repeat its noise


def parse_args(argv=None):
    """The flags of every concept baseline, and those of ESD."""
    parser = concept_parser(__file__, __doc__, PAPER, SMALL)
    add = parser.add_argument_group("method").add_argument
    add("--eta", type=float, default=1.0, help="of Eq. 2")
    text = "noxattn: their ESD-u, all but the cross-attention; xattn: their ESD-x, it alone"
    text += " (without it: noxattn for objects on large models, else xattn)"
    add("--train-method", choices=TRAINABLE, help=text)
    return parser.parse_args(argv)


def default_train_method(concept_type, small):
    """The paper's: ESD-u for objects, ESD-x for styles. Small models: ESD-x for both.

    On emoji/sd, ESD-u left 87 to 97 % of the cats at each of three learning rates.
    """
    return "noxattn" if concept_type == "object" and not small else "xattn"


def esd_target(eps_null, eps_target, eta):
    """Eq. 2, from the original model's predictions without and with the target, (B, 4, h, w)."""
    return eps_null - eta * (eps_target - eps_null)


@torch.no_grad()
def sample_path(unet, scheduler, x, emb, emb_null, guidance):
    """Eq. 1: DDIM with guidance from noise x (B, 4, h, w), embeddings (B, 77, D).

    Yields for each timestep: x_t, t (0-dim), and both predictions (B, 4, h, w).
    """
    for t in scheduler.timesteps:
        eps_null, eps_target = predict_both(unet, x, t, emb_null, emb)
        yield x, t, eps_null, eps_target
        eps = guide(eps_null, eps_target, guidance)
        x = scheduler.step(eps, t, x).prev_sample


def path_noise(seed, j, shape):
    """The noise that path j starts from."""
    return torch.randn(shape, generator=generator(seed, "samples", j))


def sample_points(args, model, emb, prompts):
    """All points of all paths: [(x_t, t, y, prompt)], x_t and y (4, h, w)."""
    scheduler = ddim_scheduler(model, args.sampling_steps)
    shape = model.latent_shape(args.resolution)
    of_path = [prompts[j % len(prompts)] for j in range(args.paths)]
    points = []
    for i in tqdm(range(0, args.paths, 16), f"{args.paths} paths"):  # 16 at a time: memory
        chunk = of_path[i : i + 16]
        x = [path_noise(args.seed, i + k, shape) for k in range(len(chunk))]
        x = torch.stack(x).to(model.device)  # (B, 4, h, w)
        condition = torch.stack([emb[prompt] for prompt in chunk])  # (B, 77, D)
        null = emb[""].expand_as(condition)
        path = sample_path(model.net, scheduler, x, condition, null, args.guidance)
        for xt, t, eps_null, eps_target in path:
            y = esd_target(eps_null, eps_target, args.eta)
            for k, prompt in enumerate(chunk):
                points.append((xt[k], t, y[k], prompt))
    return points


def unlearn(args):
    """Runs ESD; returns the run folder."""
    prompts = target_prompts(concept_prompts(args))
    out = open_run_folder(args)
    model, emb = load_text_to_image(args, prompts)
    args = with_preset(args, model, PAPER, SMALL)
    if args.train_method is None:
        args.train_method = default_train_method(args.concept_type, model.small)
    check_coverage(prompts, args.paths, len(args.target))
    points = sample_points(args, model, emb, prompts)

    weights = trainable_weights(model.net, TRAINABLE[args.train_method])
    params = list(weights.values())
    optimizer = torch.optim.Adam(params, lr=args.lr, fused=True)
    log = []
    for step in tqdm(range(args.steps), "ESD"):
        g = generator(args.seed, "samples", FIRST_STEP_SEED + step)
        idx = torch.randint(len(points), (args.batch_size,), generator=g)
        batch = [points[i] for i in idx]
        xt = torch.stack([point[0] for point in batch])  # (B, 4, h, w)
        t = torch.stack([point[1] for point in batch])  # (B,)
        y = torch.stack([point[2] for point in batch])  # (B, 4, h, w)
        texts = [point[3] for point in batch]
        pred = predict(model.net, xt, t, emb, texts)
        loss = F.mse_loss(pred, y)  # Eq. 3
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        log.append({"loss": loss.detach()})
    return save_delta(args, out, weights, log)


if __name__ == "__main__":
    main(TASK, parse_args, unlearn)
