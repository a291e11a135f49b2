"""The tasks that `python -m suite.train task=...` can name: `tasks/<domain>/<task>.py` exports
SPEC.

Adding a task is a folder and one word here; nothing is imported until a task is chosen.
"""

NAMES = (
    "vision/classify",
    "vision/mae",
    "speech/pretrain",
    "speech/ctc",
    "dna/pretrain",
    "dna/classify",
    "language/lm",
)

BENCHES = {
    "scan": ("tasks.dna.scan_bench", "the selective scan of Caduceus against other formulas"),
    "longconv": ("tasks.dna.longconv_bench", "HyenaDNA's long convolution against other ones"),
    "llama": ("tasks.language.llama_bench", "the DyT paper's efficiency table, for every norm"),
}
"""Commands of `python -m suite.bench` that only a domain knows: the module whose run(argv) returns
an exit code, and a line of help."""
