"""LaTRO: teach a language model to reason from gold answers alone."""

from latro.config import LatroConfig
from latro.data import Example, load
from latro.trainer import LatroTrainer

__all__ = ["Example", "LatroConfig", "LatroTrainer", "load"]
