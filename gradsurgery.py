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
    normalized_sum      after NGDiff (arXiv 2410.22086): add the retain gradient at the forget
                        gradient's length, whatever the scale of its loss
    orthograd           OrthoGrad (arXiv 2503.02312): project out the span of several retain
                        gradients

Two more constrain the weights instead, for linear layers whose inputs are known (keys and values of
the cross-attention: their inputs are the embeddings of prompts).

    null_space          the projection onto what a set of embeddings leaves free (AlphaEdit,
                        arXiv 2410.02355)
    project_update      keeps a layer's outputs for these embeddings as they were

Three lines replace one of a plain training loop:

      optimizer.zero_grad()
    - (loss_f + loss_r).backward()
    + g_r = flat_grad(loss_r, params)                      # first to retain: frees its graph
    + g_f = flat_grad(loss_f, params)                      # then to forget
    + write_grad(params, lambda_projection(g_f, g_r)[0])
      optimizer.step()

Five rules:

- Pass only weights that are trained. One that a loss does not reach gets a zero gradient, and AdamW
  still decays it.
- Clip after the projection, never before: the projection does not depend on the scale of g_r,
  clipping does.
- Do not wrap the model in DistributedDataParallel. flat_grad averages over ranks itself, and before
  the projection: projecting is not linear, so the average of projections is not the projection of
  the average.
- Of a model that fully_shard (FSDP2) has cut into shards, flat vectors are cut alike. The functions
  down to normalized_sum take them: inner products and norms are summed over the shards.
- An optimizer that rescales the gradient, as Adam does, takes a step that may conflict with g_r
  again. What is guaranteed is the gradient, not the step.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F


def flat_grad(loss, params, retain_graph=False):
    """Gradient of a scalar loss as a flat fp32 vector (n,), averaged over all ranks.

    torch.autograd.grad leaves every .grad alone, so a forget loss may run through a discriminator
    (or any other network) without leaving gradients on it. Sharded weights need .backward(), which
    does leave them there, and takes those of params. Raises ValueError if params is empty or the
    loss reaches none of them.
    """
    params = list(params)
    if not params:
        raise ValueError("flat_grad: params is empty; which weights should be trained?")
    if is_sharded(params[0]):
        # backward() adds to what is there, such as the gradient of the last step
        for p in params:
            p.grad = None
        loss.backward(retain_graph=retain_graph)  # FSDP2 averages, and gives each rank its shard
        grads = [p.grad for p in params]
        for p in params:
            p.grad = None
    else:
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
    flat = flatten(grads)  # (n,)
    if dist.is_available() and dist.is_initialized() and not is_sharded(params[0]):
        dist.all_reduce(flat)  # a sum, then a division: gloo, the CPU backend, has no average
        flat /= dist.get_world_size()
    return flat


def _project(g_f, g_r, lam):
    """g_f minus lam times its component along g_r, where the two conflict.

    (n,), (n,) -> (n,) and a dict of 0-dim statistics.
    """
    dot, norm_f, norm_r = whole(g_f @ g_r), norm(g_f), norm(g_r)
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


def normalized_sum(g_f, g_r, weight=1.0):
    """g_f + weight |g_f| / |g_r| g_r: the retain gradient at `weight` times the length of g_f.

    After NGDiff (Bu et al. 2024): g_f / |g_f| + g_r / |g_r| for two losses that are both lowered,
    here at the scale of g_f. g_f and g_r are flat vectors (n,), the result too. The quotient is at
    most 1,000: a shorter g_r is rounding, as in the first step of a distillation, where the two
    models are still the same.
    """
    norm_f, norm_r = norm(g_f), norm(g_r)
    norm_r = torch.maximum(norm_r, norm_f / 1000)
    tiny = torch.finfo(g_f.dtype).tiny
    scale = norm_f / norm_r.clamp_min(tiny)  # 0-dim, at most 1000
    return g_f + weight * scale * g_r


def orthograd(g_f, g_rs):
    """OrthoGrad (Shamsian et al. 2025): g_f without its component in the span of the g_rs.

    g_f (n,); g_rs (n, k): one retain gradient per column, of a sample or a prompt. Returns (n,),
    orthogonal to all of them, whether they conflict or agree. Subtracting the component along one
    after the other would not do: taking off the second brings back some of the first.
    """
    # Columns of one length, and an SVD where the paper has QR: columns that depend on each other,
    # or are zero, give QR arbitrary directions. Here they have a singular value of 0.
    tiny = torch.finfo(g_rs.dtype).tiny
    columns = g_rs / g_rs.norm(dim=0).clamp_min(tiny)
    u, s, _ = torch.linalg.svd(columns, full_matrices=False)
    u = u[:, s > 1e-5 * s[0]]  # (n, rank)
    return g_f - u @ (u.T @ g_f)


def null_space(embeddings, energy):
    """P (d, d), the projection onto what the rows of embeddings (m, d) leave free.

    Their main directions, the fewest that hold the fraction `energy` in (0, 1] of their squared
    length, span what is protected; P = I - U U^T of these (AlphaEdit, Fang et al. 2025, who cut by
    an eigenvalue). With energy = 1 and a weight change D, D P maps every row to 0. Raises
    ValueError if nothing is left.
    """
    x = embeddings.cpu().double()  # once per run; MPS has no double precision
    squares, u = torch.linalg.eigh(x.T @ x)  # (d,), ascending, and (d, d)
    # Summed from the smallest on: these are left free as long as they hold 1 - energy at most.
    # Below the rounding of the largest, a square is 0.
    rounding = squares[-1] * len(squares) * torch.finfo(x.dtype).eps
    squares = squares * (squares > rounding)
    free = squares.cumsum(0) <= (1 - energy) * squares.sum()  # (d,)
    if not free.any():
        raise ValueError(f"null_space: embeddings fill all {len(u)} dimensions at energy {energy}")
    u = u[:, free]  # (d, number of free directions)
    return (u @ u.T).to(embeddings)  # of its dtype, on its device


def project_update(params, originals, projection):
    """W <- W_0 + (W - W_0) P in place, for each W (out, d) of params; after optimizer.step().

    So W x stays W_0 x, up to rounding, for all x with P x = 0, whatever the optimizer did.
    Projecting the gradient instead (G <- G P) would do for SGD alone: Adam divides it entry by
    entry, which leaves the span of P, and weight decay pulls at W itself.
    """
    with torch.no_grad():
        for p, original in zip(params, originals, strict=True):
            p.copy_(original + (p - original) @ projection)


def write_grad(params, flat):
    """Puts a flat vector (n,) into .grad of the parameters; then call optimizer.step().

    The .grad are views of the vector where the types agree, copies otherwise. Raises ValueError if
    the parameters do not hold n numbers.
    """
    params = list(params)
    for p, g in zip(params, unflatten(flat, params), strict=True):
        p.grad = g.to(p.dtype)


# ---- flat vectors -------------------------------------------------------------------------------
# fully_shard leaves each process some rows of every weight, as a DTensor. The flat vector of these
# is a DTensor too: each process holds the numbers of its rows, and zeros where another has a row
# more. So all hold equally many, and the zeros add nothing to an inner product.


def is_sharded(x):
    """True for a tensor that fully_shard has cut, or a flat vector of such tensors."""
    return hasattr(x, "device_mesh")


def whole(x):
    """A tensor, or what all shards of it are together: to be called by all processes."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def norm(x):
    """The length of a flat vector, 0-dim."""
    return whole(x.norm())


def shard_length(x):
    """How many numbers of a sharded tensor each process holds, zeros included."""
    rows = -(-x.shape[0] // x.device_mesh.size())  # rounded up
    return rows * (x.numel() // x.shape[0])


def flatten(tensors):
    """Tensors as one flat fp32 vector (n,), a copy; of sharded ones a sharded vector."""
    tensors = [x.detach() for x in tensors]
    if not is_sharded(tensors[0]):
        return torch.cat([x.reshape(-1).float() for x in tensors])
    parts = []
    for x in tensors:
        part = x.to_local().reshape(-1).float()
        parts.append(F.pad(part, (0, shard_length(x) - part.numel())))
    return like_shard(torch.cat(parts), tensors[0])


def unflatten(flat, like):
    """The inverse of flatten: a list of tensors of the shapes of `like`, views of flat (n,).

    Raises ValueError if `like` does not hold n numbers.
    """
    if is_sharded(flat):
        parts = flat.to_local().split([shard_length(x) for x in like])
        shards = [x.to_local() for x in like]
        views = [p[: s.numel()].view_as(s) for p, s in zip(parts, shards, strict=True)]
        return [like_shard(v, x, x.shape) for v, x in zip(views, like, strict=True)]
    sizes = [x.numel() for x in like]
    if (n := sum(sizes)) != flat.numel():
        raise ValueError(f"unflatten: params hold {n} numbers, the flat vector {flat.numel()}")
    return [part.view_as(x) for x, part in zip(like, flat.split(sizes), strict=True)]


def like_shard(part, x, shape=None):
    """This process's part of a DTensor that is spread as x is. shape: of the whole, if uneven."""
    stride = None if shape is None else x.stride()
    where = (x.device_mesh, x.placements)
    # type(x): importing DTensor takes a second, and few need it
    return type(x).from_local(part, *where, run_check=False, shape=shape, stride=stride)
