from typing import Any

def address_of(memory: Any) -> int: ...
def cached_pages(fd: int, offset: int, length: int) -> int: ...
def gather(
    memory: Any,
    fd: int,
    size: int,
    bitmap: Any,
    first: int,
    end: int,
    page_size: int,
    snapshot: Any,
    numbers: Any,
    align: int = 0,
    bounce: Any = None,
    but: Any = b"",
    base: int = 0,
) -> tuple[int, int]: ...
def read_direct(fd: int, align: int, bounce: Any, into: Any, offset: int) -> int: ...
def take_marks(marks: Any, bitmap: Any) -> None: ...
def put_back_marks(marks: Any, bitmap: Any) -> None: ...
def set_marks(marks: Any, first: int, count: int) -> None: ...
def run_load(
    control: Any,
    marks: Any,
    memory: Any,
    hot: int,
    stride: int,
    page_size: int,
    rate: float,
    run: float = 0.01,
) -> None: ...
def fill(memory: Any, hot: int, stride: int, random: bool) -> None: ...
def first_wrong(
    memory: Any,
    hot: int,
    stride: int,
    random: bool,
    sweep: int,
    index: int,
    base: int = 0,
    total: int = 0,
) -> int: ...
