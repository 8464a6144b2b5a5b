"""Gradient surgery for unlearning: two gradients in, one out. Needs torch alone: copy this file.

Forgetting and retaining change the same weights. Where the two gradients conflict (their inner
product is negative), the component of the forget gradient along the retain gradient is projected
out: it would undo what is to be retained.

    lambda_projection   DoCo, Eq. 10 (Wu et al., AAAI 2025): step along the projected forget
                        gradient alone
    forget_only         prompt-free instance unlearning, Eq. 12-13 (arXiv 2603.10445): project it,
                        add the retain gradient
    pcgrad              PCGrad (Yu et al., NeurIPS 2020), the ablation of the same paper: project
                        both, add them

Three lines replace one of a plain training loop:

      optimizer.zero_grad()
    - (loss_f + loss_r).backward()
    + g_r = flat_grad(loss_r, params)                      # first to retain: frees its graph
    + g_f = flat_grad(loss_f, params)                      # then to forget
    + write_grad(params, lambda_projection(g_f, g_r)[0])
      optimizer.step()

Four rules:

- Pass only weights that are trained. One that a loss does not reach gets a zero gradient, and AdamW
  still decays it.
- Clip after the projection, never before: the projection does not depend on the scale of g_r,
  clipping does.
- Do not wrap the model in DistributedDataParallel. flat_grad averages over ranks itself, and before
  the projection: projecting is not linear, so the average of projections is not the projection of
  the average.
- An optimizer that rescales the gradient, as Adam does, takes a step that may conflict with g_r
  again. What is guaranteed is the gradient, not the step.
"""

import torch
import torch.distributed as dist


def flat_grad(loss, params, retain_graph=False):
    """Gradient of a scalar loss as a flat fp32 vector (n,), averaged over all ranks.

    torch.autograd.grad leaves every .grad alone, so a forget loss may run through a discriminator
    (or any other network) without leaving gradients on it. Raises ValueError if params is empty or
    the loss reaches none of them.
    """
    params = list(params)
    if not params:
        raise ValueError("flat_grad: params is empty; which weights should be trained?")
    grads = torch.autograd.grad(
        loss,
        params,
        retain_graph=retain_graph,
        allow_unused=True,  # such a weight gets None here, zeros below
    )
    if all(g is None for g in grads):
        raise ValueError(
            "flat_grad: the loss reaches none of params; "
            "look for a detach() or a no_grad() on the way"
        )
    grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
    flat = torch.cat([g.reshape(-1).float() for g in grads])  # (n,)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(flat)  # a sum, then a division: gloo, the CPU backend, has no average
        flat /= dist.get_world_size()
    return flat


def _project(g_f, g_r, lam):
    """g_f minus lam times its component along g_r, where the two conflict.

    (n,), (n,) -> (n,) and a dict of 0-dim statistics.
    """
    dot, norm_f, norm_r = g_f @ g_r, g_f.norm(), g_r.norm()
    # A floor, not an epsilon: adding 1e-8 to |g_r|^2 = 1e-10 would bias the result.
    tiny = torch.finfo(g_f.dtype).tiny
    # The case distinction of Eq. 10 as a clamp: no branch, so no wait for the GPU.
    coefficient = lam * dot.clamp(max=0) / norm_r.square().clamp_min(tiny)  # 0-dim, <= 0
    stats = {
        "cos": dot / (norm_f * norm_r).clamp_min(tiny),
        "norm_f": norm_f,
        "norm_r": norm_r,
        "conflict": (dot < 0).float(),
    }
    return g_f - coefficient * g_r, stats


def lambda_projection(g_f, g_r, lam=1.0):
    """DoCo, Eq. 10: G = G_u if G_u . G_r >= 0, else G_u - lam (G_u . G_r) / |G_r|^2 G_r.

    g_f (their G_u) and g_r (their G_r) are flat vectors (n,), of all trained weights. Returns G
    (n,) and a dict of 0-dim tensors: cos and conflict (1 where the inner product is negative)
    before the projection, norm_f and norm_r. lam = 0 changes nothing; lam = 1 makes conflicting
    gradients orthogonal. G_r itself is never added: it acts through the projection alone.
    """
    # Eq. 10
    return _project(g_f, g_r, lam)


def forget_only(g_f, g_r):
    """Prompt-free instance unlearning, Eq. 13 and Algorithm 1: g = g_r + g_f'.

    g_f' is g_f without its component along g_r, where the two conflict. g_f and g_r are flat
    vectors (n,), already weighted by the timestep (Eq. 12). Returns g (n,) and the statistics of
    lambda_projection. g_r is added unchanged: PCGrad, which projects both gradients, loses quality
    there (their Table IV).
    """
    # Eq. 13
    g_f, stats = _project(g_f, g_r, 1.0)
    return g_r + g_f, stats


def pcgrad(g_f, g_r):
    """PCGrad (Yu et al. 2020) for two losses: each gradient (n,) is projected, then they are added.

    Each loses its component along the other, where the two conflict. Returns the sum (n,) and the
    statistics of lambda_projection.
    """
    projected_f, stats = _project(g_f, g_r, 1.0)
    return projected_f + _project(g_r, g_f, 1.0)[0], stats


def write_grad(params, flat):
    """Puts a flat vector (n,) into .grad of the parameters; then call optimizer.step().

    The .grad are views of the vector where the types agree, copies otherwise. Raises ValueError if
    the parameters do not hold n numbers.
    """
    params = list(params)
    if (n := sum(p.numel() for p in params)) != flat.numel():
        raise ValueError(f"write_grad: params hold {n} numbers, the flat vector {flat.numel()}")
    for p, g in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad = g.view_as(p).to(p.dtype)
