"""Tables and plots of results; nothing here computes one."""

from mergeme_ext.report.plot import grouped_bars
from mergeme_ext.report.table import text_table

__all__ = ["grouped_bars", "text_table"]
