"""MuonAdamW is torch's Muon and torch's AdamW, and resumes exactly."""

from copy import deepcopy

import torch
from torch.optim import AdamW, Muon

from lit_mm.training.optim import MuonAdamW
from lit_mm.training.parts import LLMPart, Part, Parts, parameter_groups, with_parameters
from tests.helpers.models import tiny_vlm


def groups():
    torch.manual_seed(0)
    matrix, table, bias = (torch.nn.Parameter(torch.randn(*shape)) for shape in ((4, 6), (5, 3), (4,)))
    made = [
        {"params": [matrix], "lr": 0.1, "hidden": True},
        {"params": [table], "lr": 0.2},
        {"params": [bias], "lr": 0.3, "weight_decay": 0.0},
    ]
    return made, [matrix, table, bias]


def take_steps(optimizers, parameters, first, last):
    for step in range(first, last):
        torch.manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        for optimizer in optimizers:
            optimizer.step()


def test_it_is_torchs_muon_and_adamw():
    (made, found), (own, expected) = groups(), groups()
    take_steps([MuonAdamW(made, weight_decay=0.1)], found, 0, 5)
    muon = Muon(own[:1], weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    take_steps([muon, AdamW(own[1:], weight_decay=0.1, betas=(0.9, 0.95), fused=True)], expected, 0, 5)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_resuming_goes_on_exactly():
    (made, found), (again, resumed) = groups(), groups()
    optimizer = MuonAdamW(made)
    take_steps([optimizer], found, 0, 3)
    with torch.no_grad():
        for a, b in zip(resumed, found, strict=True):
            a.copy_(b)
    other = MuonAdamW(again)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    for each in (optimizer, other):
        each.param_groups[0]["lr"] = 0.05  # as a scheduler does
    take_steps([optimizer], found, 3, 6)
    take_steps([other], resumed, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(found, resumed, strict=True))


def test_embeddings_heads_and_convolutions_are_left_to_adamw():
    vlm = tiny_vlm()
    names = {id(parameter): name for name, parameter in vlm.named_parameters()}
    made = with_parameters(parameter_groups(vlm, Parts(Part(1.0), Part(2.0), LLMPart(3.0))), vlm)
    hidden = {names[id(p)] for group in made if group.get("hidden") for p in group["params"]}
    assert {name.split(".")[-2] for name in hidden} >= {"q_proj", "down_proj", "0", "2"}
    assert not [name for name in hidden if "embed" in name or "lm_head" in name or "conv" in name or "stem" in name]
    MuonAdamW(made)
