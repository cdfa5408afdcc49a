"""The studio and the explorers on tasks that are no classification, and on data that is no `Data`."""

import dataclasses

import pytest
import torch
from task_networks import case_of
from torch.utils.data import DataLoader, TensorDataset
from trainings import network, wait_for

import obc_tools as obc
from obc_tools import InteractionExplorer, JTJExplorer, PruningStudio, as_data
from obc_tools.pruning.choices import Scoring, Target
from obc_tools.studio import Choices, Setup, StudioSession, to_code


def data_of(task):
    parts = [case_of(task).batch(seed) for seed in (1, 2)]
    return as_data(*parts)


@pytest.mark.parametrize("task", ["segmentation", "language_model", "outputs"])
def test_a_studio_measures_by_the_task(task):
    model, data = case_of(task).model(), data_of(task)
    setup = Setup(data.image_shape, batches=2, batch_size=2, task=task)
    session = StudioSession(model, data, setup, task=obc.TASKS[task])
    choices = Choices(Scoring("jacobian"), Target(ratio=0.4))
    session.score(choices.scoring)
    plan = session.plan(choices)
    session.measure([plan, session.whole])
    table = session.table({"plan": plan})
    headline = session.task.headline
    assert table[headline].tolist()[0] != "" and "accuracy" not in table.columns.drop("pixel_accuracy", errors="ignore")
    found = session.measured(session.whole).metrics
    wanted = obc.TASKS[task] if task != "outputs" else obc.TASKS[task].against(model)
    batches = data.batches("val", 2)
    assert found.values[headline] == pytest.approx(obc.evaluate(model, batches, task=wanted).values[headline], rel=1e-6)
    namespace = {"model": model, "data": data, "task": obc.TASKS[task]}
    exec(to_code(choices, session.setup), namespace)
    assert namespace["plan"] == plan and plan.channels_removed


def test_explorers_differentiate_the_task():
    model, data = case_of("segmentation").model(), data_of("segmentation")
    losses = obc.TASKS["segmentation"].losses
    batches = list(obc.take(data.batches("train", 2, seed=0), 2))
    explorer = JTJExplorer(model, data, task="segmentation", batch_size=2)
    explorer.wait(60)
    expected = obc.dense_jtj(model, batches, "first", range(6), objective=losses)
    torch.testing.assert_close(explorer.dense.values, expected.values)
    assert "objective=task.losses" in explorer.code.value
    other = InteractionExplorer(model, data, task="segmentation", batch_size=2)
    wait_for(lambda: other.interactions is not None)
    products = obc.jacobian_products(model, batches, objective=losses)
    torch.testing.assert_close(other.interactions.values, obc.filter_interactions(products, "first").values)


def test_loaders_will_do():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(40, 3, 6, 6, generator=generator, dtype=torch.float64).float()
    loader = DataLoader(TensorDataset(images, torch.arange(40) % 3), 8)
    model = network().float()
    explorer = JTJExplorer(model, loader)
    explorer.wait(60)
    other = InteractionExplorer(model, loader)
    wait_for(lambda: other.interactions is not None)
    with pytest.raises(ValueError, match=r"data was made without val examples: pass as_data\(train, val\)"):
        PruningStudio(model, loader)
    studio = PruningStudio(model, as_data(loader, loader))
    assert studio.session.setup.batches == 1


def test_a_task_that_does_not_fit_is_refused_at_once():
    model, data = case_of("segmentation").model(), data_of("language_model")
    with pytest.raises(ValueError, match="data: task 'segmentation' does not fit Segmenter: "):
        PruningStudio(model, data, task="segmentation")
    task = dataclasses.replace(obc.TASKS["segmentation"], name="mine")
    studio = PruningStudio(model, data_of("segmentation"), task=task, batch_size=2)
    assert studio.session.setup.task == "mine" and "task.example(" in studio.code
