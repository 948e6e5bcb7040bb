"""The first import of a command: says in one line which of the libraries that everything needs are missing."""

import importlib.util
import sys

NEEDED = ("torch", "numpy", "safetensors", "tokenizers", "PIL", "matplotlib", "tqdm")
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if missing:
    print(f"error: {', '.join(missing)} missing: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)
