"""docs/coverage.md says what benchmarks/results/coverage.json says."""

from benchmarks.coverage import TABLE, load, render


def test_the_table_is_that_of_the_results():
    assert TABLE.read_text() == render(load()), "run `python -m benchmarks.coverage --table`"


def test_all_results_are_exact():
    for name, result in load().items():
        assert result["exact"], name
        assert result["dynamo"]["exact"], name


def test_models_of_every_family_are_there():
    families = [result["family"] for result in load().values()]
    least = {"torchvision": 10, "timm": 25, "smp": 4, "onnx": 2}
    assert {f: families.count(f) >= n for f, n in least.items()} == dict.fromkeys(least, True)
