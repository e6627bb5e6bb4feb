"""docs/coverage.md says what benchmarks/results/coverage.json says."""

from benchmarks.coverage import TABLE, load, render
from tests.models.catalogue import all_cases


def test_the_table_is_that_of_the_results():
    assert TABLE.read_text() == render(load()), "run `python -m benchmarks.coverage --table`"


def test_all_results_are_exact():
    for name, result in load().items():
        assert result["exact"], name
        assert result["dynamo"]["exact"], name


def test_every_model_has_a_result():
    assert not all_cases().keys() - load().keys()


def test_torchvision_keeps_the_limits():
    found = {name: r for name, r in load().items() if r["family"] == "torchvision"}
    convolutional = {name: r for name, r in found.items() if r["convolutional"]}
    assert min(r["share"] for r in convolutional.values()) >= 0.95
    assert max(r["compile_s"] for r in convolutional.values()) <= 30
    assert found["resnet50"]["compile_s"] <= 10
