"""What the experts of a trained model do: which tokens, sources and documents go to which of them."""

from lightning_tex.inspection.counting import UsageCounter
from lightning_tex.inspection.origins import Origins
from lightning_tex.inspection.report import UsageReport
from lightning_tex.inspection.usage import LayerUsage

__all__ = ["LayerUsage", "Origins", "UsageCounter", "UsageReport"]
