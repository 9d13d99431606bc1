"""Surface normals: angular error."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .metric import StreamingMetric, check_not_empty


class NormalsMetric(StreamingMetric):
    """Angles between predicted and true normals in degrees, over all valid pixels of the data set."""

    main = "mean_angle"
    higher_is_better = False
    within = (11.25, 22.5, 30.0)

    def __init__(self, task: dict):
        super().__init__(task)
        for name in ("angles", "valid"):
            self.sums[name] = torch.zeros((), dtype=torch.float64)
        self.sums["within"] = torch.zeros(len(self.within), dtype=torch.float64)

    def update(self, prediction: Tensor, label: Tensor):
        valid = (label != 255).all(dim=1)
        # The label's length is not quite 1 where 8 bits hold it.
        cosine = F.cosine_similarity(prediction.double(), label.double(), dim=1)[valid]
        angles = cosine.clamp(-1, 1).acos().rad2deg().cpu()
        self.sums["angles"] += angles.sum()
        self.sums["valid"] += angles.numel()
        self.sums["within"] += torch.stack([(angles < limit).sum() for limit in self.within])

    def compute(self) -> dict[str, float]:
        angles, valid, within = self.sums.values()
        check_not_empty(valid, self)
        shares = (within / valid).tolist()
        return {
            "mean_angle": float(angles / valid),
            **{f"within_{limit:g}": share for limit, share in zip(self.within, shares)},
        }

    @staticmethod
    def best_constant(labels: Tensor) -> Tensor:
        """The direction of the mean of vectors `(3, ...)`."""
        return F.normalize(labels.flatten(1).mean(dim=1), dim=0)
