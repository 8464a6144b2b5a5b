"""SPM, one-dimensional adapters: a LoRA of rank 1, as strong as a prompt resembles the target.

Paper: "One-dimensional Adapter to Rule Them All: Concepts, Diffusion Models and Erasing
Applications", Lyu et al., CVPR 2024. The LoRA erases the target as ESD does; it is regularised on
random anchor embeddings (latent anchoring); its strength depends on the prompt (facilitated
transport).

    1. x_t = a point on the sampling path of M, the model with its adapter so far, for the target
    2. y   = e0(x_t, "") - g (e0(x_t, target) - e0(x_t, ""))         e0: without the adapter
    3. L   = |y - M(x_t, target)|^2                                  erasing
           + 1000 mean_a |e0(x_t, a) - M(x_t, a)|^2                  latent anchoring
    4. a   = Gaussian noise, accepted with probability 1 - cos(a, target), 0.8 to 1.2 times as
             long as the target's embedding
    5. m   = max(cos(prompt, target), fraction of the target's tokens in the prompt); W + m adapter

Families: Stable Diffusion 1.x and 2.x. Eq. 4 is about one text encoder's embeddings of tokens; the
others are told a pooled embedding too, which the paper has no random anchors for.

The paper: 3,000 steps, batch 1, four anchors per step, a learning rate of 1e-4 with warm-up and
cosine restarts (constant here), AdamW in 8 bits (32 here), random sizes (one here). The released
code feeds its anchors so that the null prompt takes the place of half of them, applies m twice, to
both factors of the adapter, and adds several adapters factor by factor; here several targets share
one. eval.py applies m. SPM has no anchor in DoCo's sense: --anchor is for the evaluation alone.

    python -m baselines.spm --target "Grumpy Cat" --anchor Cat
    python -m baselines.spm --model CompVis/stable-diffusion-v1-4 --target Snoopy --anchor Dog

In plain diffusers, with m:

    m = prompt_strength(pipe, {"target": ["Snoopy"]})
    pipe.load_lora_weights("runs/spm-snoopy")
    pipe(prompt, cross_attention_kwargs={"scale": m(prompt)})
"""

from functools import cache

import torch
import torch.nn.functional as F
from peft import LoraConfig
from tqdm import tqdm

from backbones import StableDiffusion, expand_condition, stack_conditions
from baselines import (
    concept_parser,
    concept_prompts,
    ddim_scheduler,
    guide,
    load_text_to_image,
    main,
    open_run_folder,
    predict_both,
    save_lora,
    target_prompts,
    with_preset,
)
from common import generator

TASK = "concept"
FAMILIES = (StableDiffusion,)
WHY = "the random anchors of SPM are embeddings of tokens, without a pooled one"
ROWS = [
    {
        "label": "SPM",
        "flags": [],
        "paper": ["--steps", "3000", "--batch-size", "1"],
        "tried": ("--lr", "3e-3", "3e-4", "1e-3"),
    }
]
# The paper's settings
PAPER = {"steps": 3000, "batch_size": 1, "lr": 1e-4}
PAPER |= {"guidance": 3.0, "sampling_steps": 30}
# For small models: the steps and batch of doco.py, and a larger learning rate
SMALL = {"steps": 250, "batch_size": 8, "lr": 3e-3}
SMALL |= {"guidance": 3.0, "sampling_steps": 15}
# Every linear and 1x1 convolution layer of the UNet's transformers
LAYERS = r".*attentions.*\.(proj_in|proj_out|to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2)"


def parse_args(argv=None):
    """The flags of every concept baseline, and those of SPM."""
    parser = concept_parser(__file__, __doc__, PAPER, SMALL)
    add = parser.add_argument_group("method").add_argument
    add("--eta", type=float, default=1.0, help="g of Eq. 2")
    add("--anchoring", type=float, default=1000.0, help="weight of the latent anchoring, Eq. 3")
    add("--rank", type=int, default=1, help="of the adapter")
    return parser.parse_args(argv)


def random_anchors(emb, n, g):
    """Eq. 4: n random embeddings (n, 77, D) unlike emb (77, D), by the generator g on the CPU."""
    target = F.normalize(emb.flatten().cpu(), dim=0)
    accepted = []
    while len(accepted) < n:
        a = torch.randn(target.shape, generator=g)
        a = F.normalize(a, dim=0)
        if torch.rand((), generator=g) < 1 - a @ target:
            length = 0.8 + 0.4 * torch.rand((), generator=g)
            accepted.append(a * emb.norm().cpu() * length)
    anchors = torch.stack(accepted).view(n, *emb.shape)
    return anchors.to(emb.device)


def prompt_strength(pipe, settings):
    """Eq. 5: a function prompt -> m in [0, 1]; of several targets, the nearest counts.

    settings: those in args.json; the targets are needed.
    """

    @torch.no_grad()
    def encode(text):
        """The embedding, (77 D,), and the set of token ids without start and end token."""
        ids = pipe.tokenizer(text)["input_ids"][1:-1]
        emb = pipe.encode_prompt(text, pipe.device, 1, False)[0]
        return emb.flatten(), set(ids)

    targets = [encode(target) for target in settings["target"]]

    @cache
    def strength(prompt):
        """m of one prompt."""
        emb, ids = encode(prompt)
        m = 0
        for target_emb, target_ids in targets:
            cos = F.cosine_similarity(emb, target_emb, dim=0).item()
            m = max(m, cos, len(ids & target_ids) / len(target_ids))
        return m

    return strength


@torch.no_grad()
def sample_xt(model, scheduler, x, target, null, guidance, steps):
    """Eq. 1: the first `steps` steps of DDIM with guidance, from noise x (B, 4, h, w)."""
    for t in scheduler.timesteps[:steps]:
        eps_null, eps_target = predict_both(model, x, t, null, target)
        eps = guide(eps_null, eps_target, guidance)
        x = scheduler.step(eps, t, x).prev_sample
    return x


def unlearn(args):
    """Runs SPM; returns the run folder."""
    prompts = target_prompts(concept_prompts(args))
    out = open_run_folder(args)
    model, conditions = load_text_to_image(args, prompts, FAMILIES, WHY)
    args = with_preset(args, model, PAPER, SMALL)
    scheduler = ddim_scheduler(model, args.sampling_steps)
    unet = model.net

    torch.manual_seed(args.seed)  # of the adapter's first factor; the second starts at 0
    lora = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=LAYERS)
    unet.add_adapter(lora)
    weights = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=1e-2, fused=True)
    batch = args.batch_size
    shape = (batch, *model.latent_shape(args.resolution))
    anchored = torch.arange(max(4, batch)) % batch  # x_t of each anchor: four, or one for each x_t
    log = []
    for step in tqdm(range(args.steps), "SPM"):
        g = generator(args.seed, "doco_steps", step)
        idx = torch.randint(len(prompts), (batch,), generator=g)
        target = stack_conditions([conditions[prompts[i]] for i in idx])  # of B rows
        null = expand_condition(conditions[""], batch)
        x = torch.randn(shape, generator=g).to(model.device)
        s = torch.randint(1, len(scheduler.timesteps), (), generator=g)
        xt = sample_xt(model, scheduler, x, target, null, args.guidance, s)  # (B, 4, h, w)
        t = scheduler.timesteps[s]
        emb = target["encoder_hidden_states"]  # (B, 77, D)
        a = random_anchors(emb[0], len(anchored), g)  # (4 or B, 77, D)

        unet.disable_adapters()  # e0
        with torch.no_grad():
            eps_null, eps_target = predict_both(model, xt, t, null, target)
            eps_a = unet(xt[anchored], t, a).sample
        unet.enable_adapters()  # M
        y = eps_null - args.eta * (eps_target - eps_null)  # Eq. 2
        loss_erase = F.mse_loss(unet(xt, t, emb).sample, y)  # Eq. 3
        loss_anchoring = F.mse_loss(unet(xt[anchored], t, a).sample, eps_a)
        (loss_erase + args.anchoring * loss_anchoring).backward()
        optimizer.step()
        optimizer.zero_grad()
        row = {"loss_erase": loss_erase.detach(), "loss_anchoring": loss_anchoring.detach()}
        log.append(row)
    return save_lora(args, out, model, log)


if __name__ == "__main__":
    main(TASK, parse_args, unlearn)
