"""Every function that touches a model gives it back as it was, also after an error in the objective."""

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from networks import network
from oracles import interrupted, state_of
from torch import nn

from obc_tools import (
    TASKS,
    EquivalentModel,
    LayerAxis,
    Recipe,
    check_plan,
    cost,
    cost_model,
    dense_jtj,
    evaluate,
    find_groups,
    fit,
    group_jtj,
    jacobian_products,
    latency,
    load_data,
    make_plan,
    prune,
    prune_to,
    score_groups,
)
from obc_tools.data.batches import Augmentation, augment_batches
from obc_tools.interop import JacobianImportance
from obc_tools.measure.latency import latencies
from obc_tools.scoring.objectives import classification
from obc_tools.state import RANDOMNESS, LentRandomness, alone, evaluating, shared


def group_of(model, images):
    return next(group for group in find_groups(model, images) if group.root == LayerAxis("conv1", "out"))


def random_plan(model, images):
    return make_plan(score_groups(model, find_groups(model, images), "random"), ratio=0.3)


WITH_OBJECTIVE = {
    "jacobian_products": lambda m, b, o: jacobian_products(m, b, objective=o),
    "jacobian_products by image": lambda m, b, o: jacobian_products(m, b, rows="sample", objective=o),
    "score_groups": lambda m, b, o: score_groups(m, find_groups(m, b[0][0]), "jacobian", b, objective=o),
    "score_groups by gradients": lambda m, b, o: score_groups(m, find_groups(m, b[0][0]), "taylor", b, objective=o),
    "dense_jtj": lambda m, b, o: dense_jtj(m, b, "conv1", objective=o),
    "dense_jtj by image": lambda m, b, o: dense_jtj(m, b, "conv1", rows="sample", objective=o),
    "group_jtj": lambda m, b, o: group_jtj(m, b, group_of(m, b[0][0]), 0, objective=o),
    "prune_to": lambda m, b, o: prune_to(m, b[0][0], b, ratio=0.3, steps=2, objective=o, progress=False),
    "importance": lambda m, b, o: JacobianImportance().score(m, b, objective=o),
}

WITHOUT = {
    "find_groups": lambda m, b: find_groups(m, b[0][0]),
    "cost": lambda m, b: cost(m, b[0][0]),
    "cost_model": lambda m, b: cost_model(m, b[0][0]).of(random_plan(m, b[0][0])),
    "evaluate": evaluate,
    "latency": lambda m, b: latency(m, b[0][0], repeats=1, warmup=0),
    "prune": lambda m, b: prune(m, random_plan(m, b[0][0])),
    "equivalent": lambda m, b: EquivalentModel(m, random_plan(m, b[0][0])).merge(),
}


def borrowed():
    """Return a model in mixed modes, with a frozen parameter, a gradient and a hook of its own, and batches."""
    model, images = network("residual")
    model.train()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    model.conv2.weight.grad = torch.ones_like(model.conv2.weight)
    model.fc.register_forward_hook(lambda module, args, output: None)
    return model, [(images, torch.tensor([0, 1, 2, 3]))] * 2


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", WITH_OBJECTIVE)
def test_functions_that_score_give_the_model_back(name, fails):
    model, batches = borrowed()
    before = state_of(model)
    if fails:
        with pytest.raises(KeyError, match="stop"):
            WITH_OBJECTIVE[name](model, batches, interrupted(classification))
    else:
        WITH_OBJECTIVE[name](model, batches, classification)
    assert state_of(model) == before


@pytest.mark.parametrize("name", WITHOUT)
def test_other_functions_give_the_model_back(name):
    model, batches = borrowed()
    before = state_of(model)
    WITHOUT[name](model, batches)
    assert state_of(model) == before


@pytest.mark.parametrize("name", ["find_groups", "cost", "cost_model", "evaluate", "latency"])
def test_a_forward_pass_that_fails_leaves_nothing(name):
    model, batches = borrowed()
    model.fc = nn.Linear(7, 5).double()
    before = state_of(model)
    with pytest.raises(Exception, match=r"mat1 and mat2|shapes|size"):
        WITHOUT[name](model, batches)
    assert state_of(model) == before


@pytest.mark.parametrize("first_leaves_first", [True, False])
def test_what_is_changed_for_the_process_stays_until_the_last_thread_is_done(first_leaves_first):
    value = ["before"]

    def take():
        return shared("a setting of this test", lambda: value.append("changed"), partial(value.append, value[-1]))

    first, second = take(), take()
    one, other = (first, second) if first_leaves_first else (second, first)
    one.close()
    assert value[-1] == "changed"
    other.close()
    assert value[-1] == "before"
    other.close()
    assert value.count("before") == 2


class Looping(nn.Module):
    """Counts its channels in Python, and waits before."""

    def __init__(self, wait):
        super().__init__()
        self.first, self.last, self.wait = nn.Linear(3, 6), nn.Linear(6, 2), wait

    def forward(self, x):
        self.wait()
        x = self.first(x)
        return self.last(x * sum(1.0 for _ in range(x.shape[1])))


def test_traces_of_several_threads_see_what_one_sees_and_leave_python_as_it_was():
    before, barrier = (range, math.log2, torch.backends.mha.get_fastpath_enabled()), threading.Barrier(2)
    alone = [(group.root, group.kept_whole) for group in find_groups(Looping(lambda: None), torch.zeros(1, 3))]
    found = []

    def trace():
        model = Looping(lambda: barrier.wait(60))
        found.append([(group.root, group.kept_whole) for group in find_groups(model, torch.zeros(1, 3))])

    threads = [threading.Thread(target=trace) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone, alone]
    assert any("range" in reason for _, reason in alone)
    assert (range, math.log2, torch.backends.mha.get_fastpath_enabled()) == before


def test_threads_that_score_one_model_wait_for_each_other():
    """Each finds what one finds alone, and the model is left in the mode and with the flags that it had."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)).double()
    model[0].weight.requires_grad_(False)
    batches = [(torch.randn(4, 3, 6, 6).double(), torch.tensor([0, 1, 2, 0]))]
    groups = find_groups(model, batches[0][0])

    def work(_):
        plan = make_plan(score_groups(model, groups, "jacobian", batches), ratio=0.4)
        skeleton = EquivalentModel(model, plan)
        assert check_plan(model, plan, batches[0][0])
        return plan.to_json(), [parameter.requires_grad for parameter in skeleton.merge().parameters()]

    numbers, expected = torch.get_rng_state(), work(0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(24))) == [expected] * 24
    assert all(module.training for module in model.modules())
    assert not model[0].weight.requires_grad and model[1].weight.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(numbers, torch.get_rng_state())


def ended_in_time(*functions):
    """Call functions in a thread each, and return what they returned or raised; fail where one does not end."""
    found = [None] * len(functions)

    def call(number):
        try:
            found[number] = functions[number]()
        except ValueError as error:
            found[number] = error

    threads = [threading.Thread(target=call, args=(number,), daemon=True) for number in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "it waits for ever"
    return found


@pytest.mark.parametrize("way", ["together", "measured", "against each other"])
def test_threads_that_borrow_two_models_in_opposite_orders_do_not_wait_for_ever(way):
    one, other, images = nn.Linear(3, 2), nn.Linear(3, 2), torch.ones(4, 3)

    def borrow(first, second):
        for _ in range(200):
            if way == "together":
                evaluating(first, second).close()
            elif way == "measured":
                latencies({"first": first, "second": second}, images, repeats=1, warmup=0)
            else:
                evaluate(first, [(images, None)], task=TASKS["outputs"].against(second))

    assert ended_in_time(lambda: borrow(one, other), lambda: borrow(other, one)) == [None, None]
    assert one.training and other.training


def test_of_threads_each_of_which_has_what_the_other_waits_for_one_is_refused():
    one, other, both = nn.Linear(3, 2), nn.Linear(3, 2), threading.Barrier(2)

    def borrow(first, second):
        with alone(first):
            both.wait(60)
            with alone(second):
                return "has both"

    found = ended_in_time(lambda: borrow(one, other), lambda: borrow(other, RANDOMNESS), lambda: None)
    assert found[:2] == ["has both"] * 2
    found = ended_in_time(lambda: borrow(one, other), lambda: borrow(other, one))
    assert sorted(map(str, found))[1] == "has both"
    assert "a thread uses what this one waits for" in sorted(map(str, found))[0]
    with alone(one, other):  # both are free again
        pass


def test_a_child_process_does_not_wait_for_threads_that_it_has_not():
    taken, let_go = threading.Event(), threading.Event()

    def hold():
        with alone(RANDOMNESS):
            taken.set()
            let_go.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(60)
    context = torch.multiprocessing.get_context("fork")
    child = context.Process(target=lambda: LentRandomness(0).close())
    child.start()
    child.join(60)
    let_go.set()
    thread.join()
    assert child.exitcode == 0


def test_random_numbers_of_several_threads_are_those_of_one():
    data = load_data("digits")
    untrained = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.5), nn.Linear(16, 10))

    def augmented(seed):
        batches = augment_batches(data.batches("train", 64, seed=seed), Augmentation(erase=0.5, mixup=0.2), 10, seed)
        return [images.double().sum().item() for images, _ in batches.at(0)]

    def trained(seed):
        model, recipe = copy.deepcopy(untrained), Recipe(epochs=1, batch_size=64, seed=seed)
        fit(model, data.batches("train", 64, seed=seed), data.batches("val", 360), recipe)
        return [parameter.double().sum().item() for parameter in model.parameters()]

    work = [partial(function, seed) for seed in range(3) for function in (augmented, trained)]
    numbers, expected = torch.get_rng_state(), [function() for function in work]
    with ThreadPoolExecutor(4) as pool:
        assert [found.result(60) for found in [pool.submit(function) for function in work * 3]] == expected * 3
    assert torch.equal(numbers, torch.get_rng_state())


def test_what_is_called_after_an_epoch_may_draw_numbers_without_changing_the_training():
    data = load_data("digits")
    torch.manual_seed(0)
    first, second = (nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout(0.5)) for _ in range(2))
    second.load_state_dict(first.state_dict())
    batches = data.batches("train", 360, seed=0), data.batches("val", 360)
    fit(first, *batches, Recipe(epochs=2))
    fit(second, *batches, Recipe(epochs=2), on_epoch=lambda _: torch.rand(3))
    assert torch.equal(first[1].weight, second[1].weight)
