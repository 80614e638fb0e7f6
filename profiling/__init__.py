"""The phases of a transfer as NVTX ranges and as a record of their times."""

from kvpack.profiling.phases import Phase
from kvpack.profiling.records import PhaseClock, RecordBuilder, TransferRecord

__all__ = ["Phase", "PhaseClock", "RecordBuilder", "TransferRecord"]
