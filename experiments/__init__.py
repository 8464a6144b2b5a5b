"""The papers' tables (reproduce), the cost of a step (bench), the theorems of the second (theory).

Run from the repository root, as modules: python -m experiments.reproduce --list
"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # see backbones.py
