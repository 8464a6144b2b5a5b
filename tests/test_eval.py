"""eval.py: the two scores against their definitions; an untouched model scores as before, a ruined one does not."""

import json
import subprocess
import sys

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

import eval as evaluation
from doco import HERE


def test_clip_score_and_accuracy_by_hand():
    image = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    concept, rival = torch.tensor([[1.0, 0.0], [-2.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, 1.0]])
    torch.testing.assert_close(evaluation.clip_score(image, concept), torch.tensor([250 * 0.6, 0.0]))
    assert evaluation.clip_accuracy(image, concept, rival).tolist() == [0, 0]
    assert evaluation.clip_accuracy(image, rival, concept).tolist() == [100, 100]


def run(tmp_path, delta):
    save_file(delta, tmp_path / "delta.safetensors")
    command = [sys.executable, str(HERE / "eval.py"), "concept", "--before", str(HERE / "emoji/sd"), "--after", str(tmp_path),
               "--target", "panda", "--anchor", "bear", "--num-images", "3"]  # fmt: skip
    subprocess.run(command, check=True)
    return json.loads((tmp_path / "metrics.json").read_text())


def keys_and_values():
    state = StableDiffusionPipeline.from_pretrained(HERE / "emoji/sd").unet.state_dict()
    return {n: p.float().clone() for n, p in state.items() if "attn2.to_k" in n or "attn2.to_v" in n}


def test_untouched_model_scores_the_same(tmp_path):
    report = run(tmp_path, keys_and_values())
    assert report["before"] == report["after"] and report["before"].keys() == set(evaluation.KINDS)
    assert (tmp_path / "before_after.png").stat().st_size > 10_000


def test_model_without_keys_and_values_loses_everything(tmp_path):
    report = run(tmp_path, {n: torch.zeros_like(p) for n, p in keys_and_values().items()})
    for kind in ("target", "ood", "unrelated"):
        assert report["after"][kind]["CS"] < report["before"][kind]["CS"] - 20
