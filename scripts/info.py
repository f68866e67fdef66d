"""Tell a model's parameters, operations and memory: python scripts/info.py model=llama_70b

Or which strategies go together, for which tasks: python scripts/info.py capabilities
"""

import dtrain.launch.interrupts  # noqa: F401  before what takes long
from dtrain.cli import info, main

if __name__ == "__main__":
    main("info", info)
