"""What the logs need to know of CUDA's configs, without TVM."""

from ..schedules.cuda_config import CudaConfig
from ..schedules.cuda_sampling import SCHEDULE_VERSION, WORDS

__all__ = ["SCHEDULE_VERSION", "WORDS", "CudaConfig"]
