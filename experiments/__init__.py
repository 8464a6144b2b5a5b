"""The papers' tables (reproduce), the cost of a step (bench), and the second paper's theorems (theory).

Run from the repository root, as modules: python -m experiments.reproduce --list
"""
