"""Both kernels, side by side: they must behave the same."""

from types import SimpleNamespace

import pytest

from tests.fuzz.sides import COMPILED, TWIN

BOTH = [COMPILED, TWIN]
KERNELS = [pytest.param(COMPILED, id="cython"), pytest.param(TWIN, id="python")]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> SimpleNamespace:
    return request.param
