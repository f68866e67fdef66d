"""Train one model: torchrun --nproc-per-node 2 scripts/train.py strategy=fsdp"""

import dtrain.launch.interrupts  # noqa: F401  before what takes long
from dtrain.cli import main, train

if __name__ == "__main__":
    main("train", train)
