"""Calibrated quantization, block by block: see `Calibration`, and docs/calibration.md."""

from tritonq.calibrate.blocks import find as find_blocks
from tritonq.calibrate.calibration import Calibration
from tritonq.calibrate.data import Call, record
from tritonq.calibrate.report import CalibrationReport
from tritonq.calibrate.task import Batch, Layer, Method, Task

__all__ = ["Batch", "Calibration", "CalibrationReport", "Call", "Layer", "Method", "Task", "find_blocks", "record"]
