"""Files as disks, networks and people leave them: damaged at any byte, cut, doubled, filled."""

from __future__ import annotations

import hypothesis.strategies as st


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` after one to four accidents."""
    for _ in range(draw(st.integers(1, 4))):
        content = draw(_accident(content))
    return content


@st.composite
def _accident(draw: st.DrawFn, content: bytes) -> bytes:
    size = len(content)
    # early bytes are headers: every second accident happens there
    at = draw(st.integers(0, size) | st.integers(0, min(size, 64)))
    kind = draw(st.sampled_from(("flip", "delete", "insert", "cut", "double", "fill", "swap")))
    some = draw(st.binary(min_size=1, max_size=8) | st.sampled_from(_WORDS))
    if kind == "flip":
        return content[:at] + some + content[at + len(some) :]
    if kind == "delete":
        return content[:at] + content[at + draw(st.integers(1, 40)) :]
    if kind == "insert":
        return content[:at] + some + content[at:]
    if kind == "cut":
        return content[:at]
    if kind == "double":
        return content[:at] + content
    if kind == "fill":
        return content[:at] + draw(st.sampled_from((b"\0", b"\xff"))) * (size - at)
    return content[at:] + content[:at]


_WORDS = (
    *(b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\x01\0\0\0"),
    *(b"\n", b"\r\n", b"\t", b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"NaN", b"1e400", b"-1", b'"'),
    *(b"null", b"[]", b"{}", b"[" * 40, b"{" * 40, b"\xc3\x28", b"9" * 30, b"9" * 5000, b"../../x"),
)
