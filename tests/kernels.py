"""Both kernels, side by side: what one of them does the other must do too."""

from types import ModuleType, SimpleNamespace

import pytest

from proto import _twin
from tests.fuzz.sides import COMPILED

BOTH = [COMPILED, _twin]
KERNELS = [pytest.param(COMPILED, id="cython"), pytest.param(_twin, id="python")]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> ModuleType | SimpleNamespace:
    return request.param
