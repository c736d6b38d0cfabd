"""Whole tiny models of every row that dispatches experts: logits and generated tokens.

Expected values are transformers' own, with its eager experts, and the same model in float64. The
inputs are such that no router and no argmax decides by less than 1e-4, which is asserted.
"""

from __future__ import annotations

import copy
import math
import re

import moec.transformers as mt
import pytest
import torch
import transformers
from moec.reference import reference
from spec_models import ATTENTION, CASES, experts_of
from test_transformers import cache, check_logits, ids_of, logits  # noqa: F401

# llama has no experts; llama4's are not dispatched by transformers (no use_experts_implementation).
ROWS = sorted(set(CASES) - {"llama", "llama4_text"})

# What accelerate takes over where the parts are children of the decoder layer.
PARTS = {
    "gemma4_text": "done: router and experts, mlp",
    "granitemoeshared": "done: whole block, shared_mlp",
}


def make(row: str) -> torch.nn.Module:
    torch.manual_seed(3)
    sizes = {**ATTENTION, "num_key_value_heads": 2, **CASES[row]}
    if row == "qwen3_5_moe_text":
        sizes["num_hidden_layers"] = 4  # the first with full attention, which the cache wants
    config = transformers.AutoConfig.for_model(row, **sizes)
    config.eos_token_id = config.pad_token_id = None
    kind = transformers.AutoModelForCausalLM
    model = kind.from_config(config, experts_implementation="eager").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(4)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or "rotary" in name or "embed_positions" in name:
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() >= 2:
            tensor.copy_(noise * 1.5 / math.sqrt(tensor.shape[-1]))
        elif "norm" in name or "scale" in name:
            tensor.copy_(1 + 0.1 * noise)
        elif "A_log" not in name and "dt_" not in name and not re.search(r"layer_scalar|std", name):
            tensor.copy_(0.2 * noise)
    return model


@torch.no_grad()
def router_gap(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """The smallest distance between a chosen expert's score and the next one's, over all tokens and
    layers, by the float64 reference on what the routers read."""
    from moec._semantics import spec_of_config

    modules, gaps, hooks = dict(model.named_modules()), [], []
    for layer in spec_of_config(model.config)["layers"]:
        if layer["kind"] != "moe":
            continue
        name = layer["name"] if layer["name"] in modules else f"model.{layer['name']}"
        number = re.match(r".*\.layers\.\d+", name)[0]
        ref = reference(layer, experts_of(modules[number], name[len(number) + 1 :]))
        reads = modules[f"{number}.router"] if layer["router"].get("router_x") else modules[name]

        def hook(module, inputs, ref=ref):
            gaps.append(ref.routing(inputs[0].flatten(0, -2)).gap.min())

        hooks.append(reads.register_forward_pre_hook(hook))
    model(ids)
    for one in hooks:
        one.remove()
    assert gaps
    return min(gaps)


GREEDY = dict(max_new_tokens=6, do_sample=False, output_scores=True, return_dict_in_generate=True)


def clear_prompt(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(prompt, what transformers makes of it), with no close choice on the way."""
    for seed in range(40):
        ids = ids_of(model, 1, 7, seed)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
        top = torch.stack(out.scores).float().topk(2).values
        if (top[..., 0] - top[..., 1]).min() > 1e-4 and router_gap(model, out.sequences) > 1e-4:
            return ids, out.sequences
    pytest.fail("expected a prompt without close choices among 40, but got none")


@pytest.mark.parametrize("row", ROWS)
def test_row(row):
    model = make(row)
    ids, tokens = clear_prompt(model)
    own, exact = logits(model, tokens), logits(copy.deepcopy(model).double(), tokens)
    assert own.std() > 1e-2  # the experts matter

    def check():
        check_logits(logits(model, tokens), own, exact)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
        assert torch.equal(out.sequences, tokens)

    model.set_experts_implementation("moec")
    check()
    model.set_experts_implementation("eager")
    report = mt.accelerate(model, weights="drop")
    assert report.done and report.freed > 0, str(report)
    assert set(report.values()) == {PARTS.get(row, "done: whole block")}, str(report)
    check()
    mt.restore(model)
    assert torch.equal(logits(model, tokens), own)
