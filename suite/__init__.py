"""One pluggable norm, every domain: uniform training and comparison of normalization layers.

`suite` runs, `tasks` define, `configs` choose numbers. Importing this package imports nothing
heavy.
"""

__version__ = "0.1.0"
