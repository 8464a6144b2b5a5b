"""--shard: what two processes with a part of the weights each compute is what one would.

The checks run in two processes, which meet at a file; what fails in one fails the test. The whole
program with --shard: test_families.py.
"""

import argparse
import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

import common
from doco import optimizer_step, swap_weights
from gradsurgery import (
    flat_grad,
    flatten,
    lambda_projection,
    norm,
    normalized_sum,
    unflatten,
    whole,
    write_grad,
)

FLAGS = argparse.Namespace(shard=True, gradient_checkpointing=False, compile=False)


class Net(torch.nn.Sequential):
    """Odd sizes, of which one process holds a row more than the other, or the only one."""

    _no_split_modules = ("Linear",)

    def __init__(self):
        super().__init__(torch.nn.Linear(4, 5), torch.nn.SiLU(), torch.nn.Linear(5, 3))
        self.append(torch.nn.LayerNorm(3))
        self.append(torch.nn.Linear(3, 1))
        self[3].requires_grad_(False)  # not all is trained


def sharded_and_whole(processes):
    """({name: parameter}, network) twice: cut into shards, and as it is. And inputs (4, 4)."""
    torch.manual_seed(0)
    net = Net()
    plain = copy.deepcopy(net)
    params = common.use_memory_flags(net, FLAGS, processes)
    # Each block for itself, or all weights would be whole at once
    assert [isinstance(m, FSDPModule) for m in net] == [True, False, True, False, True]
    of_plain = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    assert list(params) == list(of_plain)
    return params, net, of_plain, plain, torch.randn(4, 4)


def on_two(rank, folder):
    """One of two processes, which makes all checks: starting it takes longer than they do."""
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    processes = common.Processes(rank, 2, torch.device("cpu"))
    gradients_are_projected_over_all_shards(processes)
    weights_are_swapped_where_fsdp_gathers_them(processes)
    a_checkpoint_is_that_of_a_whole_run(processes, folder)
    dist.destroy_process_group()


def gradients_are_projected_over_all_shards(processes):
    """Eq. 10 conflicts here; it and the step of AdamW after it are those of the whole network."""
    params, net, of_plain, plain, x = sharded_and_whole(processes)
    params, of_plain = list(params.values()), list(of_plain.values())
    mine = x.chunk(2)[processes.rank]
    assert sum(p.to_local().numel() for p in params) < sum(p.numel() for p in of_plain)

    # The oracle, without a process group's average: both halves in one batch
    def oracle(sign):
        """The gradient of the mean over the whole batch."""
        y = plain(x)
        loss = (y.square() + sign * y + 0.3 * y[0]).mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, of_plain)])

    def sharded(sign):
        """The same of each process's half."""
        y = net(mine)
        first = net(x[:1])[0]
        return flat_grad((y.square() + sign * y + 0.3 * first).mean(), params)

    wanted_f, wanted_r = oracle(1), oracle(-1)
    g_f, g_r = sharded(1), sharded(-1)
    assert all(p.grad is None for p in params)
    for g, wanted in ((g_f, wanted_f), (g_r, wanted_r)):
        parts = [whole(part).flatten() for part in unflatten(g, params)]
        torch.testing.assert_close(torch.cat(parts), wanted, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(norm(g), wanted.norm(), rtol=1e-4, atol=0)
    projected, stats = lambda_projection(g_f, g_r)
    wanted, wanted_stats = lambda_projection(wanted_f, wanted_r)
    assert wanted_stats["conflict"] == 1
    for name, value in wanted_stats.items():
        torch.testing.assert_close(stats[name], value, rtol=1e-3, atol=1e-6)
    projected = normalized_sum(projected, g_r, 0.5)
    wanted = normalized_sum(wanted, wanted_r, 0.5)

    step, cosines = torch.optim.AdamW(params, lr=0.1, fused=True), []
    step_of_plain = torch.optim.AdamW(of_plain, lr=0.1, fused=True)
    cosines.append(optimizer_step(step, params, projected, g_r, project=True))
    cosines.append(optimizer_step(step_of_plain, of_plain, wanted, wanted_r, project=True))
    torch.testing.assert_close(*cosines, rtol=1e-3, atol=1e-5)
    for p, q in zip(params, of_plain, strict=True):
        torch.testing.assert_close(whole(p.detach()), q.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net(mine), plain(mine), rtol=1e-4, atol=1e-5)


def weights_are_swapped_where_fsdp_gathers_them(processes):
    """M_init and M alternate, each with and without a graph; whoever kept weights would be seen."""
    params, net, _, plain, x = sharded_and_whole(processes)
    params = list(params.values())
    originals = [p.detach().clone() for p in params]
    write_grad(params, flatten([torch.ones_like(p) for p in params]))
    torch.optim.SGD(params, lr=0.1).step()
    trained = net(x).detach()
    for _ in range(2):
        swap_weights(params, originals)
        with torch.no_grad():
            torch.testing.assert_close(net(x), plain(x))
        swap_weights(params, originals)
        y = net(x)
        torch.testing.assert_close(y.detach(), trained)
        flat_grad(y.sum(), params)
    assert not torch.allclose(trained, plain(x))


def a_checkpoint_is_that_of_a_whole_run(processes, folder):
    """Whoever resumes, sharded or not, continues with the same weights and moments."""
    params, net, of_plain, plain, x = sharded_and_whole(processes)
    mine, file = x.chunk(2)[processes.rank], folder / "checkpoint.safetensors"

    def train(model, weights, optimizer, x, steps=3):
        """Steps of Adam on the mean of the outputs' squares."""
        weights = list(weights.values())
        for _ in range(steps):
            write_grad(weights, flat_grad(model(x).square().mean(), weights))
            optimizer.step()

    adam = torch.optim.AdamW(params.values(), lr=0.1)
    train(net, params, adam, mine)
    common.save_checkpoint(file, 3, params, (adam,), processes)
    dist.barrier()
    train(net, params, adam, mine)
    assert len(load_file(file)) == 4 * len(params)  # the weight, two moments, the count of steps

    # Resumed in a whole network
    of_whole = torch.optim.AdamW(of_plain.values(), lr=0.1)
    assert common.load_checkpoint(file, of_plain, (of_whole,)) == 3
    train(plain, of_plain, of_whole, mine)  # flat_grad averages over the processes
    # and in a sharded one
    again, other, *_ = sharded_and_whole(processes)
    of_other = torch.optim.AdamW(again.values(), lr=0.1)
    assert common.load_checkpoint(file, again, (of_other,)) == 3
    train(other, again, of_other, mine)
    for name, p in params.items():
        assert torch.equal(p.to_local(), again[name].to_local()), name
        torch.testing.assert_close(whole(p.detach()), of_plain[name].detach())

    common.save_tensors(folder / "delta.safetensors", params, {"format": "pt"}, processes)
    dist.barrier()
    saved = load_file(folder / "delta.safetensors")
    assert all(torch.equal(saved[name], whole(p.detach())) for name, p in params.items())


@pytest.mark.slow
def test_on_two_processes(tmp_path):
    mp.spawn(on_two, args=(tmp_path,), nprocs=2)
