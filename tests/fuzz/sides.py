"""The two implementations that must agree, and every way of comparing pages there is here."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from proto import _batch, _cache, _codec, _twin
from proto.errors import ProtoError

# The compiled kernel is three modules; the twin is one.
COMPILED = SimpleNamespace(
    PageCache=_cache.PageCache,
    PageDecoder=_batch.PageDecoder,
    PageEncoder=_batch.PageEncoder,
    PageHashes=_batch.PageHashes,
    count_bits=_batch.count_bits,
    keep_bits=_batch.keep_bits,
    unite_bits=_batch.unite_bits,
    zeros=_batch.zeros,
    decode=_codec.decode,
    decode_pages=_codec.decode_pages,
    encode=_codec.encode,
    encode_pages=_codec.encode_pages,
)
SIDES = (COMPILED, _twin)
SIMD = [name for name, runs in _codec.simd_kernels().items() if runs]
PATTERN = bytes(range(256)) * 66
use_simd = _codec.use_simd


def outcome(call: Callable[..., object], *args: object) -> object:
    """What a call returns, or the sentence of the refusal."""
    try:
        return call(*args)
    except (ProtoError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
