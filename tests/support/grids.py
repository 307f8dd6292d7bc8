"""Marks of tests that take too long for `make test-all`: a make target of its own runs each of them."""

import os

import pytest


def _only_in(target: str, variable: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not os.environ.get(variable), reason=f"`make {target}` runs it")


only_in_test_resume = _only_in("test-resume", "RESUME_GRID")
only_in_test_kernels = _only_in("test-kernels", "ALL_KERNELS")
only_in_test_nodes = _only_in("test-nodes", "ALL_NODES")
only_in_test_service = _only_in("test-service", "SERVICE_GRID")
only_in_test_cookbooks = _only_in("test-cookbooks", "ALL_COOKBOOKS")
only_in_test_image = _only_in("test-image", "TEST_IMAGE")
