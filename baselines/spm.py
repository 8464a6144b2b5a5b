"""SPM, one-dimensional adapters: a LoRA of rank 1 unlearns the target, is held still at random embeddings, and works as hard
as a prompt resembles the target (Lyu et al., CVPR 2024); a rival of doco.py.

    x_t = a point on a path that the model with adapter, M, draws for the target, as far as it has come
    y   = e0(x_t, "") - g (e0(x_t, target) - e0(x_t, ""))                              e0: the adapter off
    L   = |y - M(x_t, target)|^2 + 1000 mean_a |e0(x_t, a) - M(x_t, a)|^2              erase; latent anchoring
    a   = Gaussian noise, taken with probability 1 - cos(a, target), 0.8 to 1.2 times as long as the target's embedding
    m   = max(cos(prompt, target), share of the target's tokens in the prompt)         facilitated transport: W + m (adapter)

The paper: 3,000 updates, batch 1, four anchors each, 1e-4 with warm-up and cosine restarts (a constant rate here), AdamW in 8
bits (32 here), random sizes (one here). The released code feeds its anchors so that the null prompt takes the place of half of
them, applies m twice, to both factors of the adapter, and adds several adapters factor by factor; here several targets share
one. eval.py applies m. There is no anchor in DoCo's sense: --anchor is for eval.py.

    python baselines/spm.py --target "Grumpy Cat" --anchor Cat
    python baselines/spm.py --model CompVis/stable-diffusion-v1-4 --target Snoopy --anchor Dog

In plain diffusers, m is 1, or what the function says:

    m = transport(pipe, ["Snoopy"])
    pipe.load_lora_weights("runs/spm-snoopy")
    pipe(prompt, cross_attention_kwargs={"scale": m(prompt)})
"""

import argparse
import json
import sys
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import atomic_save, evaluate_run, fail, load_pipeline, make_run_dir, run_name  # noqa: E402
from doco import prompt_pairs  # noqa: E402

# The paper's settings; doco.py's updates and batch for toys like emoji/sd, and a larger rate
PAPER = dict(steps=3000, batch_size=1, lr=1e-4, guidance=3.0, sampling_steps=30)
SMALL = dict(steps=250, batch_size=8, lr=3e-3, guidance=3.0, sampling_steps=15)
LAYERS = r".*attentions.*\.(proj_in|proj_out|to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2)"


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--target", nargs="+", required=True, help="what to forget; several are forgotten at once")
    p.add_argument("--anchor", nargs="+", required=True, help="what eval.py compares it with: one for all, or one each")
    p.add_argument("--concept-type", choices=("object", "style"), default="object")
    p.add_argument("--prompts", type=Path, help="text file of anchor prompts, one a line (default: doco.py's templates)")
    p.add_argument("--model", default=str(HERE.parent / "emoji/sd"), help="Stable Diffusion 1.x/2.x: folder or hub id")
    p.add_argument("--resolution", type=int, help="pixels of a side (default: the model's own)")
    p.add_argument("--steps", type=int, help="updates")
    p.add_argument("--batch-size", type=int)
    p.add_argument("--lr", type=float)
    p.add_argument("--eta", type=float, default=1.0, help="g, how far beyond the unconditional prediction")
    p.add_argument("--anchoring", type=float, default=1000.0, help="weight of the latent anchoring")
    p.add_argument("--rank", type=int, default=1, help="of the adapter")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, help="run folder (default: runs/spm-TARGET)")
    return p.parse_args(argv)


def random_anchors(emb, n, generator):
    """n embeddings (n, 77, D) that are unlike emb (77, D): noise, more surely taken the less it points emb's way."""
    target, taken = F.normalize(emb.flatten().cpu(), dim=0), []
    while len(taken) < n:
        a = F.normalize(torch.randn(target.shape, generator=generator), dim=0)
        if torch.rand((), generator=generator) < 1 - a @ target:
            taken.append(a * emb.norm().cpu() * (0.8 + 0.4 * torch.rand((), generator=generator)))
    return torch.stack(taken).view(n, *emb.shape).to(emb.device)


def transport(pipe, targets):
    """A function of a prompt: how hard the adapter is to work, in [0, 1]; of several targets, for the nearest."""

    @torch.no_grad()
    def encode(text):
        return pipe.encode_prompt(text, pipe.device, 1, False)[0].flatten(), set(pipe.tokenizer(text)["input_ids"][1:-1])

    known = [encode(target) for target in targets]

    @cache
    def strength(prompt):
        emb, ids = encode(prompt)
        return max(max(F.cosine_similarity(emb, e, dim=0).item(), len(ids & i) / len(i), 0) for e, i in known)

    return strength


def unlearn(args):
    """Runs SPM and returns the run folder."""
    device = torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    prompts = [wording for _, wordings in prompt_pairs(args) for wording in wordings]
    out = args.out or Path("runs") / run_name("spm", args.target)
    if (lora_file := out / "pytorch_lora_weights.safetensors").exists():
        fail(f"{out} already holds a run; choose another --out")
    make_run_dir(out)
    pipe = load_pipeline(args.model, (StableDiffusionPipeline,), dtype=torch.float32).to(device)
    unet, scale = pipe.unet.requires_grad_(False).eval(), pipe.vae_scale_factor
    budget = SMALL["steps"] * len(args.target) * (2 if args.concept_type == "style" else 1)  # doco.py's
    recipe = SMALL | {"steps": budget} if unet.config.sample_size < 32 else PAPER
    steps, batch, lr = (recipe[k] if (v := getattr(args, k)) is None else v for k in ("steps", "batch_size", "lr"))
    if steps < 1 or batch < 1 or not lr > 0:
        fail(f"--steps {steps} --batch-size {batch} --lr {lr:g}: expected at least 1, 1 and a positive rate")
    size = (args.resolution or unet.config.sample_size * scale) // scale  # side of a latent
    with torch.no_grad():
        emb = {text: pipe.encode_prompt(text, device, 1, False)[0][0] for text in ["", *prompts]}  # (77, D) each
    # Latents are N(0, 1) and must not be clipped to [-1, 1], which DDIM does unless it is told
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(recipe["sampling_steps"], device)

    torch.manual_seed(args.seed)
    unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=LAYERS))  # the second factor starts at 0
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer, log = torch.optim.AdamW(trained, lr=lr, weight_decay=1e-2, fused=True), []
    predict = lambda x, t, c: unet(x, t, c).sample  # noqa: E731

    for step in tqdm(range(steps), "SPM"):
        g = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        texts = [prompts[k] for k in torch.randint(len(prompts), (batch,), generator=g)]
        target, null = torch.stack([emb[p] for p in texts]), emb[""].expand(batch, -1, -1)  # (B, 77, D)
        x = torch.randn(batch, unet.config.in_channels, size, size, generator=g).to(device)
        with torch.no_grad():
            for t in scheduler.timesteps[: (s := torch.randint(1, len(scheduler.timesteps), (), generator=g))]:
                eps_null, eps_target = predict(torch.cat([x, x]), t, torch.cat([null, target])).chunk(2)
                x = scheduler.step(eps_null + recipe["guidance"] * (eps_target - eps_null), t, x).prev_sample
            t, who = scheduler.timesteps[s], torch.arange(max(4, batch)) % batch  # four anchors, or one for each x_t
            a = random_anchors(target[0], len(who), g)  # (4 or B, 77, D)
            unet.disable_adapters()
            eps_null, eps_target = predict(torch.cat([x, x]), t, torch.cat([null, target])).chunk(2)
            eps_a = predict(x[who], t, a)
            unet.enable_adapters()
        y = eps_null - args.eta * (eps_target - eps_null)  # (B, 4, h, w)
        erase, anchoring = F.mse_loss(predict(x, t, target), y), F.mse_loss(predict(x[who], t, a), eps_a)
        (erase + args.anchoring * anchoring).backward()
        optimizer.step()
        optimizer.zero_grad()
        log.append(torch.stack([erase, anchoring]).detach())
    if not torch.stack(log).isfinite().all():
        fail("the loss is not finite any more; lower --lr")

    rows = [dict(zip(("step", "loss_erase", "loss_anchoring"), (k, *v.tolist()), strict=True)) for k, v in enumerate(log)]
    atomic_save(out / "log.jsonl", text="".join(json.dumps(row) + "\n" for row in rows))
    settings = vars(args) | {"steps": steps, "batch_size": batch, "lr": lr, "resolution": size * scale}
    atomic_save(out / "args.json", text=json.dumps({"method": "spm", "settings": settings}, indent=1, default=str))
    atomic_save(lora_file, {f"unet.{n}": p for n, p in get_peft_model_state_dict(unet).items()}, metadata={"format": "pt"})
    return out


if __name__ == "__main__":
    args = parse_args()
    out = unlearn(args)
    size = ("--resolution", args.resolution) if args.resolution else ()
    sys.exit(evaluate_run("concept", args.model, out, "--seed", args.seed, "--concept-type", args.concept_type, *size,
                          "--target", *args.target, "--anchor", *args.anchor))  # fmt: skip
