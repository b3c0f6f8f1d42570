"""The two implementations that must agree, and every way of comparing pages there is here."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from proto.codec import (
    _batch_survey,
    _batch_survey_twin,
    _bitmaps,
    _bitmaps_twin,
    _cache,
    _cache_twin,
    _decoder,
    _decoder_twin,
    _encoder,
    _encoder_twin,
    _hashes,
    _hashes_twin,
    _xbzrle,
    _xbzrle_twin,
)
from proto.codec import kernel as switch
from proto.qemu import (
    _ram_files,
    _ram_files_twin,
    _ram_reader,
    _ram_reader_twin,
    _ram_survey,
    _ram_survey_twin,
    _ram_writer,
    _ram_writer_twin,
)
from proto.qemu import kernel as stream_switch
from proto.wire.errors import ProtoError

COMPILED_MODULES = (
    _xbzrle, _bitmaps, _hashes, _cache, _encoder, _decoder, _batch_survey, _ram_reader, _ram_writer,
    _ram_files, _ram_survey,
)  # fmt: skip
TWIN_MODULES = (
    _xbzrle_twin, _bitmaps_twin, _hashes_twin, _cache_twin, _encoder_twin, _decoder_twin,
    _batch_survey_twin, _ram_reader_twin, _ram_writer_twin, _ram_files_twin, _ram_survey_twin,
)  # fmt: skip
NAMES = [
    name for name in (*switch.__all__, *stream_switch.__all__) if name not in ("NAME", "missing")
]


def _side(modules: tuple[object, ...]) -> SimpleNamespace:
    """Return all that the switches import, from these modules: as if they were one."""
    having = {name: next(one for one in modules if hasattr(one, name)) for name in NAMES}
    return SimpleNamespace(**{name: getattr(one, name) for name, one in having.items()})


COMPILED = _side(COMPILED_MODULES)
TWIN = _side(TWIN_MODULES)
SIDES = (COMPILED, TWIN)
SIMD = [name for name, runs in _xbzrle.simd_kernels().items() if runs]
PATTERN = bytes(range(256)) * 66
use_simd = _xbzrle.use_simd


def outcome(call: Callable[..., object], *args: object) -> object:
    """Return what a call returns, or the sentence of its refusal."""
    try:
        return call(*args)
    except (ProtoError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
