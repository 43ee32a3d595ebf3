"""`report(run)`: one self-contained HTML page of a run, with its curves and the rationales it sampled early and late.

Read are `metrics.jsonl` and `rationales.jsonl`, to which training appends, and `run.json`, which may be missing. The
page loads nothing, can be read without its script, and takes whatever a model wrote as text.
"""

from latro.report.page import report
from latro.report.records import ReportError

__all__ = ["ReportError", "report"]
