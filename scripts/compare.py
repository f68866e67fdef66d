"""Compare strategies: python scripts/compare.py strategies=[single,ddp,fsdp] launch.nproc=2"""

import dtrain.launch.interrupts  # noqa: F401  before what takes long
from dtrain.cli import compare, main

if __name__ == "__main__":
    main("compare", compare)
