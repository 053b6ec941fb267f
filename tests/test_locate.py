"""locate.py: importance by the gradient against plain autograd."""

import pytest
import torch
from helpers import FIXTURES, assert_close, gradients, random_ids, separate_logps, tiny_model, whole

from allo_mini import locate
from allo_mini.checkpoint import load_model
from allo_mini.data.encoder import Example
from allo_mini.locate import gradient_importance
from allo_mini.objectives import dpo_objective

EXAMPLES = [Example(random_ids(5 + i, i), [random_ids(6, 20 + i), random_ids(3 + i, 40 + i)])
            for i in range(5)]


def by_autograd(model, examples):
    for example in examples:
        up, down = (separate_logps(model.requires_grad_(True), example.prompt, response).sum()
                    for response in example.responses)
        (-0.3 / 2 * (up - down)).backward()
    return gradients(model)


@pytest.mark.parametrize("groups", [1, 3, 1000])
def test_importance_is_the_gradients_sum_or_its_ratio_to_the_root_of_their_squares(
        monkeypatch, tmp_path, groups):
    """In one pass, in three, and a tensor at a time; no file is left, the model is as before."""
    monkeypatch.setattr(locate, "TOGETHER", 2)
    model = tiny_model(trainable=False)
    each = [by_autograd(tiny_model(), EXAMPLES[at:at + 2]) for at in (0, 2, 4)]
    for snr in (False, True):
        objective = dpo_objective(0.3)
        got = gradient_importance(model, EXAMPLES, objective, tmp_path, snr, groups, 30, snr)
        assert got.keys() == each[0].keys()
        for name, importance in got.items():
            g = torch.stack([one[name] for one in each])
            wanted = g.sum(0) / (g.square().sum(0).sqrt().clamp(min=1e-19) if snr else 1)
            assert torch.equal(importance == 0, wanted == 0) or not snr
            clear = g.abs().amax(0) >= (1e-5 if snr else 0)
            torch.testing.assert_close(importance[clear], wanted[clear], rtol=1e-3, atol=1e-4)
    assert not list(tmp_path.iterdir())
    assert not any(p.requires_grad or hasattr(p, "slot") for p in model.parameters())


def test_importance_of_an_int8_model_is_that_of_its_dequantised_twin(tmp_path):
    ours, twin = (load_model(FIXTURES / "hf" / "qwen2", int8=int8) for int8 in (True, False))
    for name, p in ours.named_parameters():
        twin.get_parameter(name).copy_(whole(p))
    got = gradient_importance(ours, EXAMPLES, dpo_objective(0.3), tmp_path, False, 3, 4096, False)
    assert_close(got, by_autograd(twin, EXAMPLES), rtol=1e-3, atol=1e-5)
