"""Reconstruction: choosing the rounding of weights by what their block puts out.

Three plug-in points, a folder each: ``rounding`` (which values weights take), ``objectives`` (by what that is judged) and
``scopes`` (which weights are rounded together). The registries are ``ROUNDINGS``, ``OBJECTIVES`` and ``SCOPES``.
"""

from fp4dit_ao.passes.reconstruction.engine import reconstruct
from fp4dit_ao.passes.reconstruction.objectives import OBJECTIVES
from fp4dit_ao.passes.reconstruction.report import BlockReport, ReconstructionReport
from fp4dit_ao.passes.reconstruction.rounding import ROUNDINGS
from fp4dit_ao.passes.reconstruction.scopes import SCOPES

__all__ = ["OBJECTIVES", "ROUNDINGS", "SCOPES", "BlockReport", "ReconstructionReport", "reconstruct"]
