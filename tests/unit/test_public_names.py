"""The public names are there, and importing the package loads none of them."""

import subprocess
import sys

import pytest

import paligemma
from paligemma import metrics, recipes, train


def test_names_are_imported_when_they_are_touched():
    assert callable(paligemma.train.fit)
    assert callable(paligemma.recipes.transfer.run)
    assert paligemma.metrics.exact_match(["a"], ["a"]) == 1.0
    for package in (train, recipes, metrics):
        for name in package.__all__:
            assert getattr(package, name) is not None
        assert set(package.__all__) <= set(dir(package))


def test_a_typo_is_answered_with_the_nearest():
    typos = ((train, "fitt", "fit"), (metrics, "exact_mach", "exact_match"), (paligemma, "lod", "load"))
    for package, typo, name in typos:
        with pytest.raises(AttributeError, match=f"Did you mean '{name}'"):
            getattr(package, typo)


def test_importing_the_package_loads_no_torch():
    names = "paligemma, paligemma.train, paligemma.recipes, paligemma.metrics"
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
