"""What the optimizer does, parameter by parameter, measured inside the step: see docs/monitor.md."""

from .monitor import Monitor
from .report import Report
from .writers import CSV, DeepSpeed, TensorBoard, WandB, Writer

__all__ = ["CSV", "DeepSpeed", "Monitor", "Report", "TensorBoard", "WandB", "Writer"]
