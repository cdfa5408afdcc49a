"""Time and memory of scoring a language model against its forward and backward pass with frozen weights.

    python benchmarks/language_scoring.py [--passes 2]

GPT-2's shape (Radford et al. 2019: 124 million parameters), random weights, 8 sequences of 256 random tokens, rows per
batch. The plain pass is the same loss and its gradient for the embedded tokens, no weight wanting one. Each runs in a
process of its own. Scoring proves itself on the first batch of a call, by the weights' gradients: the first pass is
printed apart from what another one takes, and is part of the most memory that the process ever held.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch
import tyro
from torch import nn

import obc_tools as obc


@dataclass(frozen=True)
class Options:
    """What to measure."""

    sequences: int = 8
    tokens: int = 256
    layers: int = 12
    passes: int = 2


def plain_pass(model: nn.Module, tokens: torch.Tensor) -> None:
    """Compute a batch's mean loss and its gradient for the embedded tokens."""
    model.requires_grad_(False)
    embedded = model.get_input_embeddings()(tokens).requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()


def measured(what: str, options: Options) -> tuple[float, float, float]:
    """Return seconds of processor time, of the first pass and of another one, and MiB, of this process."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=options.layers)).eval()
    tokens = torch.randint(model.config.vocab_size, (options.sequences, options.tokens))
    task = obc.task_of(model)
    groups = obc.find_groups(model, task.example({"input_ids": tokens[:1, :8]}))
    batch = {"input_ids": tokens}

    def score(batches: int) -> None:
        obc.score_groups(model, groups, "jacobian", [batch] * batches, objective=task.losses)

    def run(passes: int) -> None:
        for _ in range(passes):
            plain_pass(model, tokens)

    first, all_passes = (seconds({"plain": run, "scoring": score}[what], n) for n in (1, 1 + options.passes))
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return first, (all_passes - first) / options.passes, held / 2**10 if sys.platform == "darwin" else held


def seconds(work: Callable[[int], None], passes: int) -> float:
    """Return the seconds of processor time that some passes take."""
    start = time.process_time()
    work(passes)
    return time.process_time() - start


def main(options: Options) -> None:
    found = {}
    for what in ("plain", "scoring"):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
            found[what] = alone.submit(measured, what, options).result()
        print("{:8} {:6.2f} s of processor time, then {:6.2f} s; {:6.0f} MiB".format(what, *found[what]), flush=True)
    (_, plain, less), (_, scoring, more) = found.values()
    print(f"scoring / plain passes with frozen weights: time {scoring / plain:.2f}, memory {more / less:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
