from pathlib import Path

import numpy as np
import pytest
import torch
from golden import PUBLISHED, RESNET56, golden_batches
from networks import mlp_layernorm, network, small_vgg
from torch import nn

from obc_tools import CRITERIA, Criterion, LayerAxis, find_groups, load_model, score_groups
from obc_tools.scoring.criteria import resolve_criterion
from obc_tools.scoring.jacobian import stream_products
from obc_tools.scoring.scores import NORMALIZERS, REDUCTIONS, sum_squares

DATA = Path(__file__).parents[1] / "data"


def golden(name, build):
    """Return the model, its batches and the expected vectors of a golden file."""
    file = np.load(DATA / f"{name}.npz")
    arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    model = build()
    model.load_state_dict({key[6:]: value for key, value in arrays.items() if key.startswith("state/")})
    size = int(arrays["batch_size"])
    batches = list(zip(arrays["images"].split(size), arrays["labels"].split(size), strict=True))
    return model.eval(), batches, arrays


@pytest.mark.parametrize(
    ("name", "build", "count"), [("small_vgg", small_vgg, 108), ("mlp_layernorm", mlp_layernorm, 60)]
)
def test_group_scores_match_the_published_code(name, build, count):
    model, batches, arrays = golden(name, build)
    groups = {group.root.layer: group for group in find_groups(model, batches[0][0])}
    keys = [key for key in arrays if key.startswith("group/")]
    assert len(keys) == count
    for key in keys:
        _, root, _, reduction, normalizer = key.split("/")
        options = {"group_reduction": reduction, "normalizer": None if normalizer == "None" else normalizer}
        score = score_groups(model, [groups[root]], "jacobian", batches, **options)[groups[root]]
        scale = arrays[key].abs().max().item()
        torch.testing.assert_close(score / scale, arrays[key].double() / scale, rtol=0, atol=1e-5, msg=key)


def test_batches_weigh_as_rows():
    model, batches, _ = golden("small_vgg", small_vgg)
    groups = find_groups(model, batches[0][0])
    whole = score_groups(model, groups, "jacobian", batches)
    apart = [score_groups(model, groups, "jacobian", [batch]) for batch in batches]
    for group in groups:
        if group.prunable:
            torch.testing.assert_close(whole[group], sum(part[group] for part in apart))


def test_reductions_combine_the_members():
    model, images = network("concat")
    group = next(group for group in find_groups(model, images) if group.root == LayerAxis("left", "out"))
    member = {"left": None, "norm": None, "last": None}
    for layer in member:
        alone = Criterion("l1", "weights", CRITERIA["l1"].saliency, lambda m, layer=layer: m is getattr(model, layer))
        member[layer] = score_groups(model, [group], alone)[group]
    parts = torch.stack(list(member.values()))
    expected = {
        "sum": parts.sum(0),
        "mean": parts.mean(0),
        "max": parts.amax(0),
        "prod": parts.prod(0),
        "first": parts[0],
    }
    assert set(expected) == set(REDUCTIONS)
    for reduction, value in expected.items():
        torch.testing.assert_close(score_groups(model, [group], "l1", group_reduction=reduction)[group], value)


def test_parameters_normalizer_counts_one_channel_of_the_whole_group():
    model, images = network("small_vgg")
    group = next(group for group in find_groups(model, images) if group.root == LayerAxis("7", "out"))
    plain = score_groups(model, [group], "l2")[group]
    scaled = score_groups(model, [group], "l2", normalizer="parameters")[group]
    torch.testing.assert_close(plain / scaled, torch.full((16,), 12 * 9 + 1 + 16 * 24.0, dtype=torch.float64))


def test_weight_criteria_by_hand():
    model, images = network("small_vgg")
    group = find_groups(model, images)[0]
    conv, norm, after = model[0].weight, model[1].weight, model[3].weight
    l1 = conv.abs().sum((1, 2, 3)) + norm.abs() + after.abs().sum((0, 2, 3))
    l2 = conv.square().sum((1, 2, 3)) + norm.square() + after.square().sum((0, 2, 3))
    torch.testing.assert_close(score_groups(model, [group], "l1")[group], l1.detach())
    torch.testing.assert_close(score_groups(model, [group], "l2")[group], l2.detach())
    torch.testing.assert_close(score_groups(model, [group], "bn_scale")[group], norm.detach().abs())


def test_taylor_by_hand():
    model, images = network("small_vgg")
    labels = torch.tensor([1, 2, 3, 4])
    group = find_groups(model, images)[0]
    score = score_groups(model, [group], "taylor", [(images, labels), (images * 2, labels)])[group]
    loss = sum(nn.functional.cross_entropy(model(x), labels) for x in (images, images * 2)) / 2
    loss.backward()
    conv, norm, after = model[0], model[1], model[3]
    expected = (conv.weight * conv.weight.grad).abs().sum((1, 2, 3)) + (conv.bias * conv.bias.grad).abs()
    expected += (norm.weight * norm.weight.grad).abs() + (norm.bias * norm.bias.grad).abs()
    expected += (after.weight * after.weight.grad).abs().sum((0, 2, 3))
    torch.testing.assert_close(score, expected.detach())


def test_random_follows_the_seed():
    model, images = network("small_vgg")
    group = find_groups(model, images)[0]
    first, again, other = (score_groups(model, [group], "random", seed=seed)[group] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_function_of_weights_is_a_criterion():
    model, images = network("residual")
    groups = find_groups(model, images)
    ours = score_groups(model, groups, lambda weights: weights.abs().sum(1))
    theirs = score_groups(model, groups, "l1")
    assert all(torch.equal(ours[group], theirs[group]) for group in groups)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_scores_every_group(criterion):
    model, images = network("residual")
    groups = find_groups(model, images)
    batches = [(images, torch.tensor([0, 1, 2, 3]))]
    for normalizer in NORMALIZERS:
        scores = score_groups(model, groups, criterion, batches, normalizer=normalizer)
        assert all(scores[group].shape == (group.width,) for group in groups)
        assert all(scores[group].std() > 0 for group in groups if group.prunable)
    assert criterion in repr(scores) and "<table" in scores._repr_html_()


@pytest.mark.parametrize(
    ("criterion", "options", "message"),
    [
        ("jacobain", {}, "unknown criterion 'jacobain'; closest: jacobian"),
        ("jacobian", {"batches": None}, "criterion 'jacobian' needs products: give it batches"),
        ("jacobian", {"batches": []}, "the batches yield no data"),
        ("taylor", {"batches": []}, "the batches yield no data"),
        ("l1", {"group_reduction": "median"}, "unknown group_reduction 'median'"),
        ("l1", {"normalizer": "standardization"}, "unknown normalizer 'standardization'; closest: standarization"),
        (3, {}, "criterion 3: expected a name"),
        (lambda weights: weights, {}, "gave"),
        (lambda weights: weights.sum(1) / 0, {}, "is not finite"),
    ],
)
def test_bad_requests_are_refused(criterion, options, message):
    model, images = network("small_vgg")
    batches = [(images, torch.tensor([0, 1, 2, 3]))]
    with pytest.raises(ValueError, match=message):
        score_groups(model, find_groups(model, images), criterion, **({"batches": batches} | options))


def test_labels_out_of_range_and_nan_weights_are_named():
    model, images = network("small_vgg")
    groups = find_groups(model, images)
    with pytest.raises(ValueError, match="label 12 for a model with 10 outputs"):
        score_groups(model, groups, "jacobian", [(images, torch.tensor([0, 12, 2, 3]))])
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="batch 1: the loss is nan"):
        score_groups(model, groups, "jacobian", [(images, torch.tensor([0, 1, 2, 3]))])
    with pytest.raises(ValueError, match=r"the score of 3\.in is not finite"):
        score_groups(model, groups, "l1")


@pytest.mark.parametrize(("name", "build"), [("small_vgg", small_vgg), ("mlp_layernorm", mlp_layernorm)])
@pytest.mark.parametrize(
    ("prefix", "criterion"), [("split_group", ("jacobian", {"split_bias": True})), ("whc_group", "whc")]
)
def test_published_variants_match(name, build, prefix, criterion):
    model, batches, arrays = golden(name, build)
    groups = {group.root.layer: group for group in find_groups(model, batches[0][0])}
    keys = [key for key in arrays if key.startswith(f"{prefix}/")]
    assert keys
    for key in keys:
        group = groups[key.split("/")[1]]
        scale = arrays[key].abs().max().item()
        score = score_groups(model, [group], criterion, batches)[group]
        torch.testing.assert_close(score / scale, arrays[key].double() / scale, rtol=0, atol=1e-5, msg=key)


@pytest.mark.parametrize(("name", "build"), [("small_vgg", small_vgg), ("mlp_layernorm", mlp_layernorm)])
def test_weights_and_biases_apart_match(name, build):
    model, batches, arrays = golden(name, build)
    keys = {LayerAxis(*key.split("/")[1:]): key for key in arrays if key.startswith("split/")}
    assert {axis.axis for axis in keys} == {"out_w", "out_b", "in"}
    squares = sum_squares(stream_products(model, batches, list(keys)))
    for axis, key in keys.items():
        scale = arrays[key].abs().max().item()
        torch.testing.assert_close(squares[axis] / scale, arrays[key].double() / scale, rtol=0, atol=1e-5, msg=key)


def test_group_coupling_keeps_the_cross_terms():
    model, images = network("small_vgg")
    batches = [(images[:2], torch.tensor([1, 2])), (images[2:], torch.tensor([3, 4]))]
    group = next(group for group in find_groups(model, images) if group.root == LayerAxis("7", "out"))
    score = score_groups(model, [group], ("jacobian", {"coupling": "group"}), batches)[group]
    expected = torch.zeros(16, dtype=torch.float64)
    for x, y in batches:
        conv, linear = model[7], model[11]
        loss = nn.functional.cross_entropy(model(x), y)
        cw, cb, lw = torch.autograd.grad(loss, (conv.weight, conv.bias, linear.weight))
        joined = (cw * conv.weight).sum((1, 2, 3)) + cb * conv.bias
        joined = joined + (lw * linear.weight).sum(0).view(16, 16).sum(1)
        expected += joined.detach().square()
    torch.testing.assert_close(score, expected)


def test_a_criterion_may_have_its_own_data_budget():
    model, images = network("small_vgg")
    batches = [(images, torch.tensor([1, 2, 3, 4])), (images * 2, torch.tensor([1, 2, 3, 4]))]
    groups = find_groups(model, images)[:1]
    ours = score_groups(model, groups, ("jacobian", {"batches": 1}), batches)[groups[0]]
    assert torch.equal(ours, score_groups(model, groups, "jacobian", batches[:1])[groups[0]])


@pytest.mark.parametrize(
    ("criterion", "options", "message"),
    [
        (("jacobian", {"coupling": "groups"}), {}, "unknown coupling 'groups'; closest: group"),
        (("jacobian", {"coupling": "group"}), {"group_reduction": "mean"}, "already joins the members"),
        (("jacobian", {"split_bias": True, "rows": "sample"}), {}, "split_bias goes with rows='batch'"),
        (("l1", {"coupling": "group"}), {}, "coupling and split_bias go with products"),
    ],
)
def test_options_that_do_not_go_together_are_refused(criterion, options, message):
    model, images = network("small_vgg")
    with pytest.raises(ValueError, match=message):
        score_groups(model, find_groups(model, images), criterion, [(images, torch.tensor([0, 1, 2, 3]))], **options)


@pytest.mark.parametrize("golden_file", [RESNET56] if RESNET56.exists() and PUBLISHED.exists() else [])
@pytest.mark.slow
def test_group_scores_of_the_published_resnet56(golden_file):
    file = np.load(golden_file)
    model = load_model("resnet56", weights=str(PUBLISHED)).double().eval()
    images = torch.from_numpy(file["images_uint8"]).double().div(255)
    images = images.sub(torch.from_numpy(file["mean"])).div(torch.from_numpy(file["std"])).permute(0, 3, 1, 2)
    batches = golden_batches(file, images.contiguous())
    groups = {group.root.layer: group for group in find_groups(model, images[:1]) if group.prunable}
    keys = [key for key in file.files if key.startswith("group/")]
    assert len(keys) == len(groups) > 20
    scores = score_groups(model, list(groups.values()), "jacobian", batches)
    for key in keys:
        group, expected = groups[key.split("/")[1]], torch.from_numpy(file[key])
        # The file's members, up to 31 of a group, were added up in float32.
        torch.testing.assert_close(scores[group], expected, rtol=0, atol=2e-7 * expected.max().item(), msg=key)


def test_hessian_sums_the_squared_gradients_of_every_image():
    model, images = network("residual")
    labels = torch.tensor([0, 1, 2, 3])
    groups = find_groups(model, images)
    score = score_groups(model, groups, "hessian", [(images[:3], labels[:3]), (images[3:], labels[3:])])
    squares = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(image), label).backward()
        for name, parameter in model.named_parameters():
            squares[name] += parameter.grad.square()
    expected = {name: p.detach().square() * squares[name] for name, p in model.named_parameters()}
    group = next(group for group in groups if group.root.layer == "conv1")
    by_hand = expected["conv1.weight"].sum((1, 2, 3)) + expected["bn1.weight"] + expected["bn1.bias"]
    by_hand += expected["conv2.weight"].sum((0, 2, 3))
    torch.testing.assert_close(score[group], by_hand, rtol=1e-10, atol=0)


def test_lamp_is_largest_at_the_largest_channel():
    model, images = network("small_vgg")
    group = find_groups(model, images)[0]
    lamp, l2 = (score_groups(model, [group], name)[group] for name in ("lamp", "l2"))
    assert lamp.max() == 1 and torch.equal(lamp.argsort(), l2.argsort())
    second = l2.sort(descending=True).values
    torch.testing.assert_close(lamp.sort(descending=True).values[1], second[1] / (second[0] + second[1]))


def test_a_set_is_removed_greedily():
    model, images = network("residual")
    labels = torch.tensor([0, 1, 2, 3])
    batches = [(images, labels), (images.flip(0) * 2, labels)]
    groups = [group for group in find_groups(model, images) if group.prunable]
    ranks = score_groups(model, groups, ("jacobian", {"rows": "sample", "coupling": "set"}), batches)
    axes = [member.axis for group in groups for member in group.members]
    joined = []
    for products in stream_products(model, batches, list(dict.fromkeys(axes)), rows="sample"):
        rows = []
        for group in groups:
            row = torch.zeros(len(images), group.width, dtype=torch.float64)
            for member in group.members:
                for position, channel in zip(member.positions, member.channels, strict=True):
                    row[:, channel] += products[member.axis][:, position]
            rows.append(row)
        joined.append(torch.cat(rows, 1))
    rows = torch.cat(joined)
    removed, left = [], list(range(rows.shape[1]))
    while left:
        best = min(left, key=lambda channel: rows[:, [*removed, channel]].sum(1).square().sum())
        removed.append(best)
        left.remove(best)
    order = torch.cat([ranks[group] for group in groups]).argsort()
    assert order.tolist() == removed


def test_sampled_labels_need_classification():
    model, images = network("residual")
    groups = find_groups(model, images)
    batches = [(images, torch.tensor([0, 1, 2, 3]))]
    with pytest.raises(ValueError, match=r"criterion 'obdc' draws labels .* classification alone"):
        score_groups(model, groups, "obdc", batches, objective=lambda model, batch: model(batch[0]).square().mean(1))


def test_what_draws_is_repeated():
    drawing = {name for name, criterion in CRITERIA.items() if criterion.draws}
    assert drawing == {"jacobian", "taylor", "hessian", "obdc", "random", "residual"}
    with pytest.raises(ValueError, match=r"batches=0; expected at least 1"):
        Criterion("mine", "weights", lambda layer, axis, evidence: evidence.weights.sum(1), batches=0)


def test_criteria_are_known_by_their_usual_names_too():
    for name, known in (("magnitude", "l2"), ("L1", "l1"), ("l1_norm", "l1"), ("BN", "bn_scale"), ("Taylor", "taylor")):
        assert resolve_criterion(name) is CRITERIA[known]
    with pytest.raises(ValueError, match="unknown criterion 'fisher'; known: bn_scale, fpgm, .*, whc"):
        resolve_criterion("fisher")
