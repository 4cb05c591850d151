"""flashgen: from a rectified-flow text-to-image teacher to a few-step INT4 device artifact."""

import os
import sys

__version__ = "0.3.0"

# Libraries that report to their makers do not: onnxruntime from 1.29 on, Hugging Face's hub, OpenVINO (which then takes its own stub).
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: importing it raises ImportError
