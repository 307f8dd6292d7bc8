"""The state of the garbage collector during and after `importing`."""

import gc
from collections.abc import Iterator

import pytest

from utils.processes import importing


@pytest.fixture(autouse=True)
def restore_collector() -> Iterator[None]:
    """Unfreeze and enable the garbage collector after each test."""
    yield
    gc.unfreeze()
    gc.enable()


def test_garbage_collector_is_disabled_while_importing():
    with importing():
        assert not gc.isenabled()
        with importing():
            assert not gc.isenabled()
        assert not gc.isenabled(), "the outer context is still active"
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0, "imported objects are frozen"


def test_failed_import_enables_the_collector_again():
    with pytest.raises(ModuleNotFoundError), importing():
        import no_such_package  # noqa: F401  # pyright: ignore[reportMissingImports]
    assert gc.isenabled()


def test_disabled_collector_stays_disabled():
    gc.disable()
    with importing():
        pass
    assert not gc.isenabled()
