"""Division by a number that gives the same bits on every device, in eager mode and compiled."""

from torch import Tensor


def divided(x: Tensor, number: float) -> Tensor:
    """``x / number`` in float32, correctly rounded.

    PyTorch on CUDA, and Inductor for CUDA, multiply by the number's reciprocal, and Triton's own division is approximate:
    each may miss the last bit, and a scale would differ from device to device. So this divides in float64 and rounds once.
    A quotient of two float32 numbers lies at least 2^-49 of itself from any middle between two others (and is one only
    for a power of two, which has an exact reciprocal), while a product with a float64 reciprocal errs by 2^-52.

    Args:
        x: float32, few elements: scales rather than values.
        number: one that float32 holds. Powers of two need no such care: ``x / 2`` is exact.
    """
    return (x.double() / number).float()
