"""What compare.md and compare.html show: the recommendation first, then every method, then what one looks up.

Made of nothing but the record, so that a comparison that was kept as JSON can be shown again.
"""

from qlora_trainer.stages.compare.page.layout import lay_out

__all__ = ["lay_out"]
