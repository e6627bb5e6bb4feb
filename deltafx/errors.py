"""Every error that deltafx raises on purpose.

Each names what is wrong and what to do about it. An exception that the user's model raises is none
of these: it comes through as it is.
"""

from __future__ import annotations


class DeltafxError(Exception):
    """Base of all errors of this package."""


class InvalidOptionError(DeltafxError, ValueError):
    """An option of `compile` is unknown or out of its range."""


class InvalidInputError(DeltafxError, ValueError):
    """The frames handed to a compiled model, or the model itself, are not what is needed."""


class TrainModeError(DeltafxError, RuntimeError):
    """The model, or a part of it, is in train mode."""


class UntraceableError(DeltafxError, RuntimeError):
    """A model, or a part of it, that no graph can stand for; then its parts are compiled.

    It reaches a user only where a graph of the whole model is asked for.
    """


class UnknownNodeError(DeltafxError, KeyError):
    """A node name that the compiled model does not have."""

    def __str__(self) -> str:
        """The message itself, where KeyError would show its repr."""
        return str(self.args[0]) if self.args else ""


class NotCompiledError(DeltafxError, RuntimeError):
    """Something was asked that is known only after the first frame (or with `example_inputs`)."""


class UnsupportedDeviceError(DeltafxError, RuntimeError):
    """The operators do not run on this device."""


class VerificationError(DeltafxError, AssertionError):
    """A pass left the graph in a state that its stage forbids: a bug in deltafx."""


class UnknownModelError(DeltafxError, LookupError):
    """No model of that name."""


class VideoError(DeltafxError, OSError):
    """A video cannot be opened, decoded or written."""


class CudaGraphWarning(UserWarning):
    """A model's frames cannot be captured as a CUDA graph; they are right, and slower."""


class StateLimitWarning(UserWarning):
    """A state takes more memory than `max_state_bytes`; nothing else is wrong with it."""
