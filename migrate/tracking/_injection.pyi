INSTRUCTION: bytes

def inject(
    pid: int, thread: int, pidfd: int, users: bytes, at: int, first: int, patience: float
) -> tuple[int, float]: ...
