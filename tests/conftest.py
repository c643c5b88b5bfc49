"""What all tests share: one thread per process, randomness that repeats, and skips that say why."""

import os

# Before torch is imported: two test processes with all cores each are slower than one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # a borrowed GPU machine runs tests/gpu with pytest alone
    settings = None

if settings is not None:
    # `make test` tries the same examples every time; `make soak` tries others, and many more.
    _CALM = [HealthCheck.too_slow, HealthCheck.data_too_large]
    settings.register_profile("test", deadline=None, derandomize=True, database=None, suppress_health_check=_CALM)
    settings.register_profile("soak", deadline=None, max_examples=2000, suppress_health_check=_CALM, print_blob=True)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "test"))


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip aloud what this machine cannot run; `-ra` prints every reason at the end."""
    reasons = {
        "gpu": None if torch.cuda.is_available() else "no CUDA device here",
        "network": None if os.environ.get("PALIGEMMA_TEST_NETWORK") else "set PALIGEMMA_TEST_NETWORK=1 to go online",
        "weights": None
        if os.environ.get("PALIGEMMA_TEST_WEIGHTS")
        else "set PALIGEMMA_TEST_WEIGHTS=<folder of released checkpoints>",
        "soak": None if "soak" in config.option.markexpr else "long randomised run: make soak",
    }
    for item in items:
        for mark, reason in reasons.items():
            if reason and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))
