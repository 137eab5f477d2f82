"""What compare.md and compare.html show: the recommendation first, then every method, then what one looks up.

Made of nothing but the record, so that a comparison that was kept as JSON can be shown again.
"""

from qlora_trainer.stages.compare.page.front import front_chart
from qlora_trainer.stages.compare.page.layout import lay_out
from qlora_trainer.stages.compare.page.outliers import outlier_map

__all__ = ["front_chart", "lay_out", "outlier_map"]
