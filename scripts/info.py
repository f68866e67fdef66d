"""Tell a model's parameters, operations and memory: python scripts/info.py model=llama_70b"""

from dtrain.cli import info, main

if __name__ == "__main__":
    main("info", info)
