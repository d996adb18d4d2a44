"""Errors: one class, with subclasses for what a caller handles."""

from __future__ import annotations


class Error(Exception):
    """What the library refused or could not do.

    ``status`` is the name and ``code`` the number that rewardrt.h gives it; the message names the field or file, its
    value and what would be right.
    """

    def __init__(self, message: str, status: str = "", code: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code

    def __str__(self) -> str:
        return f"{self.message} ({self.status})" if self.status else self.message

    def __reduce__(self):
        # Jobs of other processes fail with it too: it has to survive pickling with all its fields.
        return type(self), (self.message, self.status, self.code)


class ArgumentError(Error, ValueError):
    """A field has a value outside its range."""


class NotFound(Error, LookupError):
    """There is no such file, job or tensor."""


class Busy(Error):
    """It is in use: another thread is at it, or sequences are under way that cannot finish."""


class Full(Error):
    """The queue is full: nothing was queued, retry when jobs are done."""


class Cancelled(Error):
    """The job was cancelled, or its model closed."""


class Conflict(Error):
    """Another version or state than the call expects: an ended update, weights that are not valid."""


class Duplicate(Error):
    """The tensor was put before."""


class FormatError(Error, ValueError):
    """A file breaks its format."""


class Unsupported(Error, NotImplementedError):
    """This version does not do that."""


class ShapeError(Error, ValueError):
    """Tensors are missing, superfluous, or of another shape or dtype; the message lists them."""


class LimitError(Error):
    """A stated limit or the memory budget would be exceeded."""


class TemplateError(Error, ValueError):
    """The chat template failed."""


class NoDevice(Error):
    """No device matches; the message lists what there is."""


class OutOfMemory(Error, MemoryError):
    """The device or the host has no memory left."""


class DeviceLost(Error):
    """The device is gone: close the runtime and open another."""


class NonFinite(Error, ArithmeticError):
    """A result, or a tensor of an update that checks, is NaN or infinite."""


class Timeout(Error, TimeoutError):
    """The time is over; nothing changed."""


class Closed(Error, ValueError):
    """The object was closed."""


class Forked(Error):
    """The object is from before fork(): open a runtime in the child."""


_BY_STATUS: dict[str, type[Error]] = {
    "RRT_TIMEOUT": Timeout,
    "RRT_E_ARG": ArgumentError,
    "RRT_E_NOT_FOUND": NotFound,
    "RRT_E_BUSY": Busy,
    "RRT_E_FULL": Full,
    "RRT_E_CANCELLED": Cancelled,
    "RRT_E_CONFLICT": Conflict,
    "RRT_E_DUPLICATE": Duplicate,
    "RRT_E_FORMAT": FormatError,
    "RRT_E_UNSUPPORTED": Unsupported,
    "RRT_E_SHAPE": ShapeError,
    "RRT_E_LIMIT": LimitError,
    "RRT_E_TEMPLATE": TemplateError,
    "RRT_E_NO_DEVICE": NoDevice,
    "RRT_E_OOM_DEVICE": OutOfMemory,
    "RRT_E_OOM_HOST": OutOfMemory,
    "RRT_E_DEVICE_LOST": DeviceLost,
    "RRT_E_NONFINITE": NonFinite,
    "RRT_E_FORKED": Forked,
}


def of_status(status: str, code: int, message: str) -> Error:
    """The exception for a status; those without a class of their own are plain :class:`Error`."""
    return _BY_STATUS.get(status, Error)(message or status, status, code)
