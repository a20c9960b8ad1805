"""A run as one self-contained HTML page: facts in, text out. Where the facts lie is left to `tasks.report`."""

from fedpipe_core.report.facts import ReportFacts
from fedpipe_core.report.page import render_page

__all__ = ["ReportFacts", "render_page"]
