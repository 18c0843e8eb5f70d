"""FusedAdam is torch's AdamW with the step count where Apex has it."""

from __future__ import annotations

import pytest
import torch

from megatron_cpt.platforms.fused_adam import FusedAdam


def test_updates_equal_torchs_adamw() -> None:
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(7))]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    a, b = FusedAdam(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(5):
        for x, y in zip(ours, theirs, strict=True):
            x.grad = torch.randn_like(x)
            y.grad = x.grad.clone()
        a.step()
        b.step()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_the_step_lives_in_the_group_and_survives_a_round_trip() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = FusedAdam([parameter])
    optimizer.step()
    optimizer.step()
    state = optimizer.state_dict()
    assert state["param_groups"][0]["step"] == 2
    assert set(state["state"][0]) == {"exp_avg", "exp_avg_sq"}
    other = FusedAdam([torch.nn.Parameter(torch.ones(3))])
    other.load_state_dict(state)
    assert other.param_groups[0]["step"] == 2


def test_plain_adam_is_refused() -> None:
    with pytest.raises(ValueError, match="AdamW"):
        FusedAdam([torch.nn.Parameter(torch.ones(1))], adam_w_mode=False)
