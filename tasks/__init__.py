"""The tasks that `python -m suite.train task=...` can name: `tasks/<domain>/<task>.py` exports
SPEC.

Adding a task is a folder and one word here; nothing is imported until a task is chosen.
"""

NAMES = ("vision/classify", "speech/pretrain", "speech/ctc")
