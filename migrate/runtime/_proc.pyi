def find_descriptors(
    table: int,
    device: int,
    inode: int,
    *,
    block: bool = False,
    writable: bool = False,
    deadline: float = ...,
) -> tuple[list[int], bool]: ...
def leads_to(table: int, fd: int, device: int, inode: int) -> bool: ...
def list_processes(table: int) -> list[tuple[int, int, int]]: ...
