"""Both kernels, side by side: what one of them does the other must do too."""

from types import ModuleType, SimpleNamespace

import pytest

from proto import _batch, _cache, _codec, _twin

# The compiled kernel is three modules; the twin is one.
COMPILED = SimpleNamespace(
    PageCache=_cache.PageCache,
    PageDecoder=_batch.PageDecoder,
    PageEncoder=_batch.PageEncoder,
    PageHashes=_batch.PageHashes,
    decode=_codec.decode,
    decode_pages=_codec.decode_pages,
    encode=_codec.encode,
    encode_pages=_codec.encode_pages,
)
BOTH = [COMPILED, _twin]
KERNELS = [pytest.param(COMPILED, id="cython"), pytest.param(_twin, id="python")]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> ModuleType | SimpleNamespace:
    return request.param
