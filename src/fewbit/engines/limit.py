"""What oneDNN, and with it OpenVINO, is told to take the processor for."""

from __future__ import annotations

import os

ISA_LIMIT = "ONEDNN_MAX_CPU_ISA"
_NAMES = (ISA_LIMIT, "DNNL_MAX_CPU_ISA")


def onednn_limit() -> str:
    """Return the environment's limit in capitals, such as "AVX2"; "ALL" where there is none."""
    told = next(filter(None, (os.environ.get(name, "") for name in _NAMES)), "ALL").upper()
    return "ALL" if told == "DEFAULT" else told
