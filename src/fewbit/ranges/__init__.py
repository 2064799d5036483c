"""Range estimators, one file a method, streaming in constant memory."""

from fewbit.ranges.range_finder import Range, RangeFinder, RangeMethod
from fewbit.ranges.weights import find_weight_range

__all__ = ["Range", "RangeFinder", "RangeMethod", "find_weight_range"]
