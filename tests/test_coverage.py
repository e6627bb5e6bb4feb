"""docs/coverage.md says what benchmarks/results/coverage.json says, of every model there is."""

import pytest

from benchmarks.coverage import TABLE, load, render
from tests.models.catalogue import CENTERFACE, all_cases


def test_the_table_is_that_of_the_results():
    assert TABLE.read_text() == render(load()), "run `python -m benchmarks.coverage --table`"


def test_every_model_has_a_result():
    needed = {name for name in all_cases() if CENTERFACE not in name}
    missing = needed - set(load())
    assert not missing, "run `python -m benchmarks.coverage`"


@pytest.mark.parametrize("name", load())
def test_every_model_is_exact(name):
    result = load()[name]
    assert result["exact"]
    assert result["dynamo"]["exact"]
