"""Checking a gradient: `check_vjp` for the layers of this library and for anybody's."""

from flax_customgrad.registry.public import publish
from flax_customgrad.testing.coverage import Hint
from flax_customgrad.testing.report import GradientError, Report, Row
from flax_customgrad.testing.vjp_check import CHECKS, check_vjp

__all__ = ["CHECKS", "GradientError", "Hint", "Report", "Row", "check_vjp"]

publish(globals(), __all__)
