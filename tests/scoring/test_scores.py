import logging
import re
from collections import OrderedDict

import pytest
import torch
from cases import CASES
from networks import NETWORKS, network
from torch import nn

from obc_tools import (
    check_plan,
    dense_jtj,
    explain,
    filter_interactions,
    find_groups,
    group_jtj,
    jacobian_products,
    make_plan,
    prune_to,
    score_groups,
)
from obc_tools.measure.metrics import TaskMetrics
from obc_tools.scoring.rows import parameter_slots
from obc_tools.structure.layers import find_axis, get_layer, own_parameters

NETS = [*NETWORKS, "mlp_layernorm"]
CASE_NAMES = (
    *("conv1d", "conv2d", "conv3d", "grouped", "transposed", "linear", "tokens", "batch_norm1d", "batch_norm2d"),
    *("batch_statistics", "layer_norm", "group_norm", "prelu", "residual", "read_twice", "shared"),
)


def scored(name):
    """Return a model, its groups and a batch, from the small networks or the cases of single layers."""
    if name in NETS:
        model, images = network(name)
        outputs = model(images)
        labels = torch.tensor([0, 1, 2, 0])
        objective = (lambda m, b: m(b[0]).square().flatten(1).mean(1)) if outputs.dim() > 2 else None
        return model, find_groups(model, images), (images, labels), objective
    case = next(case for case in CASES if case.name == name)
    model, batch = case.model(), case.data()
    return model, find_groups(model, batch[0]), batch, case.objective


@pytest.mark.parametrize("name", [*NETS, *CASE_NAMES])
def test_no_parametrised_member_is_skipped(name):
    model, groups, batch, objective = scored(name)
    options = {"objective": objective} if objective else {}
    assert any(group.prunable for group in groups)
    before = score_groups(model, groups, "jacobian", [batch], **options)
    generator = torch.Generator().manual_seed(0)
    for group in groups:
        for member in group.members if group.prunable else ():
            layer = get_layer(model, member.axis.layer)
            slots = parameter_slots(layer, find_axis(layer, member.axis))
            for slot in slots:
                parameter = own_parameters(layer)[slot.tensor]
                kept = parameter.detach().clone()
                with torch.no_grad():
                    parameter.mul_(torch.rand(parameter.shape, generator=generator) + 0.5)
                after = score_groups(model, [group], "jacobian", [batch], **options)[group]
                with torch.no_grad():
                    parameter.copy_(kept)
                assert not torch.allclose(after, before[group], rtol=1e-6, atol=0), (
                    f"{member.axis} {slot.tensor} of {group}"
                )


@pytest.mark.parametrize("certainty", [1e4, 30.0])
def test_scores_that_are_all_zero_or_nearly_so_are_said_to_be(certainty, caplog):
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    nn.init.constant_(model[2].bias, 0.0).data[1] = certainty  # sure of class 1, and right, whatever it is shown
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
    groups = find_groups(model, inputs)
    for labels, said in ((torch.ones(6, dtype=torch.long), True), (torch.arange(6) % 3, False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "obc_tools"):
            score_groups(model, groups, "jacobian", [(inputs, labels)])
        assert ("all scores are zero" in caplog.text and "sorted by class?" in caplog.text) == said


@pytest.mark.parametrize("name", ["small_vgg", "residual", "grouped", "mlp_layernorm"])
@pytest.mark.parametrize("criterion", ["jacobian", ("jacobian", {"rows": "sample"}), "taylor", "hessian"])
def test_bfloat16_ranks_as_float32_does(name, criterion, caplog):
    model, images = network(name)
    model, batches = model.float(), [(images.float().repeat(4, 1, 1, 1), torch.arange(16) % 5)]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    groups = [group for group in find_groups(model, images.float()) if group.prunable]
    seen = []
    model.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs.dtype))
    exact, coarse = (
        torch.cat(list(score_groups(model, groups, criterion, batches, amp=amp).values())) for amp in ("no", "bf16")
    )
    assert {torch.float32, torch.bfloat16} <= set(seen)
    assert not torch.equal(exact, coarse)
    ranks = torch.stack([exact.argsort().argsort(), coarse.argsort().argsort()]).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.95
    assert "one backward pass a row" not in caplog.text
    assert all(
        torch.equal(before[key], value) and value.dtype == torch.float32
        for key, value in model.state_dict().items()
        if value.is_floating_point()
    )


def test_precisions_that_are_not_known_are_refused():
    model, images = network("small_vgg")
    with pytest.raises(ValueError, match="amp.*fp16.*bf16"):
        score_groups(model, find_groups(model, images), "jacobian", [(images, torch.zeros(4).long())], amp="fp16")
    with pytest.raises(ValueError, match="amp.*half.*bf16"):
        prune_to(model, images, speedup=1.2, amp="half")


def test_names_are_text_in_every_view():
    """Also where they look like HTML, and those of criteria and metrics."""
    name, images = "<img src=x onerror=alert(1)>", torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(OrderedDict([(name, nn.Linear(4, 5)), ("relu", nn.ReLU()), ("last", nn.Linear(5, 3))]))
    batches = [(images, torch.arange(6) % 3)]
    groups = find_groups(model, images)
    scores = score_groups(model, groups, lambda weight: weight.abs().sum(1))
    plan = make_plan(scores, ratio=0.2)
    group = next(group for group in groups if group.prunable)
    views = [group, group_jtj(model, batches, group, 0), dense_jtj(model, batches, name), plan, explain(groups)]
    views += [filter_interactions(jacobian_products(model, batches), name), check_plan(model, plan, images)]
    assert all("&lt;img src=x" in view._repr_html_() for view in views[:-1])
    views += [scores, TaskMetrics("<b>", {"<img": 1.0}, {"<img": "higher"})]
    assert not any(re.search("<img|<lambda", view._repr_html_()) for view in views)
