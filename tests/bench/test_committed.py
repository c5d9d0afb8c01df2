"""What the committed results of the benchmark have to show, whatever their numbers."""

from pathlib import Path

import pytest

from omnimerge.bench import lines
from omnimerge.bench.tables import AVERAGE, make_tables, read_results

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "bench"


def rows(line):
    (table,) = make_tables(read_results(COMMITTED / line))
    assert (table.preset, tuple(table.seeds)) == ("full", (0, 1, 2))
    return {(row.kind, row.name): row for row in table.lines if row.cells}


@pytest.mark.parametrize("line", lines.names())
def test_merging_beats_base_and_every_expert_on_the_average(line):
    found = rows(line)
    averages = {key: row.cells[AVERAGE].mean for key, row in found.items()}
    best = max(value for (kind, _), value in averages.items() if kind == "method")
    single = [value for (kind, _), value in averages.items() if kind in ("base", "expert")]
    assert len(single) == 1 + len(lines.get(line).experts) and best > max(single)
    assert len([key for key in found if key[0] == "method"]) >= 20


@pytest.mark.parametrize("method", ["optmerge", "aswudi", "tsv", "metagpt"])
def test_the_omni_model_is_as_good_as_each_expert_and_better_on_mixed_questions(method):
    found = rows("modality")
    omni = found["method", method].cells
    for expert in lines.get("modality").experts:
        alone = found["expert", expert].cells
        deviation = max(omni[expert].deviation, alone[expert].deviation)
        assert omni[expert].mean >= alone[expert].mean - deviation, (expert, omni, alone)
        for mixed in ("two", "three"):
            assert omni[mixed].mean > alone[mixed].mean, (expert, mixed)
