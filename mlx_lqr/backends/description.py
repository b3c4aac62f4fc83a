"""What a loaded model is and where it computes, for whoever asks before working with it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Description:
    """A model as it is in memory."""

    device: str
    """Where it computes, as "Apple M3 Max" or "CPU"."""
    dtype: str
    """Of the residual stream, as "bfloat16"."""
    packing: str
    """How quantised weights are packed, as "4 bits" or "mxfp4"; empty where none is."""
    parameters: int
    """How many numbers the weights stand for, packed or not; what two parts share is counted once."""
    nbytes: int
    """What the weights take in memory, in bytes."""
    context_length: int | None
    """In tokens; None where the model does not say."""
