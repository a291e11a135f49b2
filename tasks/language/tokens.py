"""What every part of the language task agrees on: the id of a byte, of a document's end, and of
nothing asked."""

from __future__ import annotations

IGNORE = -100  # a target that is not asked for; torch's own default
BYTE_END = 256  # the id after the 256 bytes: a document ends here
BYTE_VOCAB = 257
