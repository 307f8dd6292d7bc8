"""What utils/processes.py promises of the process that calls it."""

import gc
from collections.abc import Iterator

import pytest

from utils.processes import importing


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def test_nothing_is_collected_while_importing():
    with importing():
        assert not gc.isenabled()
        with importing():
            assert not gc.isenabled()
        assert not gc.isenabled(), "the outer one goes on"
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0, "what was imported is left alone"


def test_a_failed_import_leaves_the_collector_on():
    with pytest.raises(ModuleNotFoundError), importing():
        import no_such_package  # noqa: F401  # pyright: ignore[reportMissingImports]
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    with importing():
        pass
    assert not gc.isenabled()
