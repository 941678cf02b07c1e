"""The messages of `mlx_lm.server` when a load fails, and what the user can do about each.

Measured with mlx-lm 0.31.3 and 0.32.2.
"""

from __future__ import annotations

from typing import Final

ADVICE: Final[tuple[tuple[str, str], ...]] = (
    (
        r"Model type (\S+) not supported",
        "the installed mlx-lm does not support the architecture {0}. Update mlx-lm, or choose "
        "another model.",
    ),
    (
        r"Missing \d+ parameters",
        "weights are missing. The download is incomplete: download the model again.",
    ),
    (
        r"invalid data offsets|Unable to read|header length|InvalidHeader|Incomplete",
        "a weights file is damaged or incomplete. Download the model again.",
    ),
    (
        r"Expected shape|Received \d+ parameters not in model",
        "the weights do not match the configuration. Download the model again, or choose another "
        "conversion.",
    ),
    (
        r"No safetensors found",
        "there are no weights in the folder. Download the model again.",
    ),
    (
        r"tokenizer",
        "its tokenizer files are missing or damaged. Download the model again.",
    ),
    (
        r"[Tt]emplate|jinja|raise_exception",
        "its chat template fails. Choose another conversion of the model.",
    ),
    (
        r"Insufficient Memory|[Oo]ut of memory|bad_alloc|Attempting to allocate|metal::malloc",
        "there is not enough memory. Quit other programs, or choose a smaller quantization.",
    ),
    (
        r"SIGKILL",
        "the system killed it, most likely because memory ran out. Choose a smaller quantization.",
    ),
    (
        r"its first chat failed",
        "it loads, but cannot chat, most likely because of its chat template. Choose another "
        "conversion of the model.",
    ),
    (
        r"config\.json",
        "config.json is missing or broken. Download the model again.",
    ),
    (
        r"Repo id must be|does not exist|No such file",
        "its files no longer exist. Is the disk mounted?",
    ),
)
