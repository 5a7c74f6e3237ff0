"""Speed, memory and error of quantized models, compared with float models and other packages on one machine.

Every variant has its own process (:mod:`worker`), so that a failure affects no other variant, and memory peaks and cold
compile times are its own. The processes take turns (:mod:`turns`), so that load on the machine affects all alike.
:mod:`linears`, :mod:`attention`, :mod:`transformers` (one step, a whole generation) and :mod:`ceilings` hold the
workloads, :mod:`variants` and :mod:`peers` the participants, :mod:`report` and :mod:`bars` the results.
"""
