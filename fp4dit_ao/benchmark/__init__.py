"""Speed, memory and faithfulness beside what a user could pick instead, measured in turns on one machine.

Every variant lives in a process of its own (:mod:`worker`), so that one that fails or dies costs no other its result, and
peaks of memory and cold compile times are its own. The processes take turns (:mod:`turns`), so that a busy machine disturbs
all alike. What is measured: :mod:`linears`, :mod:`attention`, :mod:`transformers` (one step, a whole generation) and
:mod:`ceilings`; beside whom: :mod:`variants` and :mod:`peers`; what is said of it: :mod:`report` and :mod:`bars`.
"""
