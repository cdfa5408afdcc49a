"""One of two processes that score shards of the same batches: python -m tests.two_processes FOLDER RANK."""

import sys
from pathlib import Path

import torch

from obc_tools.scoring.jacobian import all_reduce_scores, jacobian_products
from tests.cases import case


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    chosen = case("residual")
    batches = [chosen.data(seed) for seed in range(3)][rank::2]
    found = {}
    for rows in ("batch", "sample"):
        totals = all_reduce_scores(jacobian_products(chosen.model(), batches, rows=rows).scores())
        found[rows] = {tuple(axis): total.tolist() for axis, total in totals.items()}
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
