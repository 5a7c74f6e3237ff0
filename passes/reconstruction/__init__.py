"""Block-wise reconstruction: learning the rounding of weights from what their block puts out."""

from fp4dit_ao.passes.reconstruction.engine import reconstruct
from fp4dit_ao.passes.reconstruction.report import BlockReport, ReconstructionReport

__all__ = ["BlockReport", "ReconstructionReport", "reconstruct"]
