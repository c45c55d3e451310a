"""Checkpoints on disk: lazy reading, all-or-nothing writing, and what their tensors are called."""

from mergeme_ext.io import names
from mergeme_ext.io.adapters import AdaptedSource
from mergeme_ext.io.companions import copy_companions, portable_name, with_dtype
from mergeme_ext.io.format import (
    CheckpointError,
    TensorInfo,
    dtype_name,
    format_size,
    load_json_object,
    parse_size,
)
from mergeme_ext.io.licences import licence_of
from mergeme_ext.io.operands import Converted, Operand, Stored
from mergeme_ext.io.sink import CheckpointSink
from mergeme_ext.io.source import CheckpointSource

__all__ = [
    "AdaptedSource",
    "CheckpointError",
    "CheckpointSink",
    "CheckpointSource",
    "Converted",
    "Operand",
    "Stored",
    "TensorInfo",
    "copy_companions",
    "dtype_name",
    "format_size",
    "licence_of",
    "load_json_object",
    "names",
    "parse_size",
    "portable_name",
    "with_dtype",
]
