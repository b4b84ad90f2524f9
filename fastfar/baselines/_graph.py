"""A whole computation as one CUDA graph, for the well run forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fastfar.graphs import Capturer, CudaCapturer


class Graphed:
    """function(*tensors) -> tensor, recorded once and replayed on every call.

    Args:
        function: reads nothing that changes between calls but its arguments.
        examples: arguments of the shapes, dtypes and device of all later ones.
        capturer: None is the device's own.

    Raises:
        ValueError: the examples are not on a CUDA device, or the function waits for it.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        examples: Sequence[Tensor],
        capturer: Capturer | None = None,
    ) -> None:
        self._capturer = capturer or CudaCapturer(examples[0].device)
        self._buffers = [example.clone() for example in examples]
        self._out = examples[0]

        def body() -> None:
            self._out = function(*self._buffers)

        (self._replay,) = self._capturer.capture([body])

    def __call__(self, *arguments: Tensor) -> Tensor:
        """A copy of the result, which the next call would write over."""
        with self._capturer.in_turn():
            for buffer, value in zip(self._buffers, arguments, strict=True):
                self._capturer.fill(buffer, value)
            self._replay()
            return self._out.clone()
