"""The library against 300 random networks that are pruned by hand."""

import pytest
import torch
from fuzzing import examine, main, read_rows, shares
from random_networks import build

LOT = 30
LEAST = 0.8


@pytest.mark.parametrize("first", range(0, 300, LOT))
def test_pruned_as_by_hand(first):
    rows = [examine(seed) for seed in range(first, first + LOT)]
    assert [row["verdict"] for row in rows] == ["right"] * LOT, [row for row in rows if row["verdict"] != "right"]
    # Here and there the random plan finds nothing to remove.
    assert sum(row["removed"] > 0 and row["changed"] > 1e-4 for row in rows) >= 0.9 * LOT, rows
    few = {kind: pair for kind, pair in shares(rows).items() if pair[0] < LEAST * pair[1]}
    assert not few, few


@torch.no_grad()
def test_by_hand_without_nothing_is_the_network_and_without_a_channel_another():
    known, x = build(3), torch.randn(2, 3, 8, 8).double()
    channel = known.maker.kinds.index("stem")
    whole, fewer = known.without(()), known.without({channel})
    assert torch.equal(whole(x), known.network(x))
    assert fewer.stem.out_channels == known.network.stem.out_channels - 1
    assert not torch.allclose(fewer(x), known.network(x), rtol=1e-3)


def test_the_table_goes_on_where_it_ended(tmp_path, capsys):
    table = tmp_path / "fuzz.csv"
    for count in (1, 2):
        main(count, table)
        assert capsys.readouterr().out.splitlines()[0].split() == ["right", str(count)]
        assert sum(line.startswith("seed") for line in table.read_text().splitlines()) == 1
    rows = read_rows(table)
    assert [row["seed"] for row in rows] == [0, 1] and all(row["kinds"]["stem"][1] > 0 for row in rows)
