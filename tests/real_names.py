"""Names that parametrise the tests on real networks."""

from __future__ import annotations

NETWORKS = (
    "resnet20",
    "resnet56",
    "mobilenet_v1_025",
    "fdmobilenet_025",
    "mobilenet_v2",
    "squeezenet_v11",
    "googlenet",
)
ENGINES = ("onnxruntime", "openvino")
