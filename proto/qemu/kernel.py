"""The switch between the compiled kernels for QEMU's stream and their readable twins.

`proto.codec.kernel` decides which of the two is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from proto.codec.kernel import NAME, missing

if TYPE_CHECKING or NAME == "cython":
    try:
        from proto.qemu._ram_files import RamApplier, RamRecorder
        from proto.qemu._ram_reader import SCAN_END, SCAN_FULL, SCAN_MORE, SCAN_RECORDS, RamReader
        from proto.qemu._ram_survey import RamImage, RamSurvey, select_records
        from proto.qemu._ram_writer import RamWriter
    except ModuleNotFoundError as error:
        raise ImportError(missing(error)) from error
else:
    from proto.qemu._ram_files_twin import RamApplier, RamRecorder
    from proto.qemu._ram_reader_twin import SCAN_END, SCAN_FULL, SCAN_MORE, SCAN_RECORDS, RamReader
    from proto.qemu._ram_survey_twin import RamImage, RamSurvey, select_records
    from proto.qemu._ram_writer_twin import RamWriter

__all__ = [
    "SCAN_END",
    "SCAN_FULL",
    "SCAN_MORE",
    "SCAN_RECORDS",
    "RamApplier",
    "RamImage",
    "RamReader",
    "RamRecorder",
    "RamSurvey",
    "RamWriter",
    "select_records",
]
