"""Acting on all processes of a run at once, and looking through a network that trains."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from pytorch_lightning import Trainer
from torch import nn

T = TypeVar("T")


def together(trainer: Trainer, act: Callable[[], T]) -> T:
    """Act on every process of the run; where one fails all do, and none waits for it in vain.

    What acts may wait for other processes only where it fails on all of them alike.
    """
    failure: Exception | None = None
    try:
        result = act()
    except Exception as error:
        failure = error
    if not trainer.strategy.reduce_boolean_decision(failure is None):
        raise failure or RuntimeError("another process of this run failed on cached features, and says why")
    return result


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Hold a method or a network in eval mode."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
