"""``torch.compile`` where it is a command's default and the machine may have no compiler."""

from fp4dit_ao.util.compilers import missing_for_compilation


def compile_if_possible(wanted: bool, device: str) -> bool:
    """``wanted``; or, on a CPU where something that compiling takes is missing, False, after a line that says what."""
    missing = missing_for_compilation() if wanted and device == "cpu" else None
    if missing:
        print(
            f"torch.compile cannot run here, so the quantized pipeline runs without it. There is {missing}", flush=True
        )
    return wanted and missing is None
