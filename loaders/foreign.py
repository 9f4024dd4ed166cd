"""Files that are no GGUF files: what they look like, and what to do instead."""

from __future__ import annotations

import re

_OLD = "convert it to GGUF, or download a GGUF file of the model"
_UNPACK = "unpack it first"
_PICKLE = (
    "it is not opened, because loading it can run any code. Convert it to GGUF with "
    "convert_hf_to_gguf.py of llama.cpp"
)
# (offset, bytes there, what the file is, what to do)
_FOREIGN = (
    (
        0,
        b"version https://git-lfs",
        "a Git LFS pointer",
        "run `git lfs pull`, or download the file",
    ),
    (0, b"FUGG", "a GGUF file with its bytes swapped", "download it again"),
    (0, b"lmgg", "a GGML file from before GGUF", _OLD),
    (0, b"fmgg", "a GGML file from before GGUF", _OLD),
    (0, b"tjgg", "a GGML file from before GGUF", _OLD),
    (0, b"algg", "a GGML adapter from before GGUF", _OLD),
    (0, b"PK\x03\x04", "a zip archive, perhaps a PyTorch checkpoint", _PICKLE),
    (0, b"\x80\x02", "a Python pickle or PyTorch checkpoint", _PICKLE),
    (0, b"\x80\x03", "a Python pickle", _PICKLE),
    (0, b"\x80\x04", "a Python pickle", _PICKLE),
    (0, b"\x80\x05", "a Python pickle", _PICKLE),
    (0, b"\x93NUMPY", "a numpy array", _OLD),
    (0, b"\x89HDF", "an HDF5 file", _OLD),
    (4, b"TFL3", "a TensorFlow Lite model", _OLD),
    (0, b"\x1f\x8b", "a gzip archive", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (0, b"BZh", "a bzip2 archive", _UNPACK),
    (0, b"\xfd7zXZ", "an xz archive", _UNPACK),
    (0, b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
)


def looks_like(head: bytes) -> tuple[str, str]:
    """What a file that begins with these bytes is, and what to do about it."""
    for offset, magic, what, advice in _FOREIGN:
        if head.startswith(magic, offset):
            return what, advice
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.match(rb"<(!doctype|html|head|\?xml|!--)", text, re.IGNORECASE):
        return "a web page", (
            "the download saved a page (log-in, error or preview) instead of the model. Use the "
            "link of the file itself (/resolve/, not /blob/, on Hugging Face)"
        )
    # safetensors: the length of a JSON object, then the object
    if head[8:9] == b"{" and head[5:8] == b"\0\0\0":
        return "a safetensors file", "name its directory, with its config.json in it"
    if text[:16].startswith(b'{"__metadata__"'):
        return "the header of a safetensors file", "download the whole file again"
    if text[:1] in (b"{", b"["):
        return "JSON", f"perhaps an error message of the server, read it. It begins {text[:60]!r}"
    if re.match(rb"\x08[\x03-\x20][\x12\x3a\x42]", head):  # IR version, producer or graph
        return (
            "an ONNX file",
            "`run`, `bench`, `inspect`, `plan` and `compress` take it as NAME.onnx",
        )
    if not any(head):
        return "zeros", "a download that reserved the space and never finished, start it again"
    return "nothing known", f"it begins with {head[:8]!r}; download it again"
