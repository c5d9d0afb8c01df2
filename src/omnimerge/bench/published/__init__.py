"""What AdaMMS, OptMerge and SWUDI report, as data: tables, checkpoints, evaluations, known errors.

The numbers are in YAML files under ``data``; `schema` says what such a file holds, `tables` reads
them, `recompute` checks the printed sums and means, `results` and `compare` put a user's own
numbers beside them, `render` prints.
"""
