"""``post_training.py`` with weights spread over CPU processes by FSDP2, which accelerate does on accelerators only.

Run by torchrun, with accelerate's own variables for FSDP set.
"""

import sys
from typing import Any

import accelerate
import transformers.trainer
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from llm_pruner.cli import run_script


class Spread(accelerate.Accelerator):
    distributed_type = property(lambda self: DistributedType.FSDP)
    is_fsdp2 = property(lambda self: True)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        AcceleratorState._shared_state["fsdp_plugin"] = kwargs.get("fsdp_plugin") or FullyShardedDataParallelPlugin()


if __name__ == "__main__":
    AcceleratorState.is_fsdp2 = property(lambda self: True)
    transformers.trainer.Accelerator = Spread
    sys.exit(run_script("post_training.py"))
