"""Both kernels, side by side: what one of them does the other must do too."""

from types import ModuleType

import pytest

from proto import _kernel, _twin

KERNELS = [pytest.param(_kernel, id="cython"), pytest.param(_twin, id="python")]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> ModuleType:
    return request.param
