"""Depth: root mean squared error."""

from torch import Tensor

from .metric import StreamingMetric, check_not_empty


class DepthMetric(StreamingMetric):
    """Errors in metres over all valid pixels of the data set."""

    main = "rmse"
    higher_is_better = False

    def __init__(self, task: dict):
        super().__init__(task)
        self.squared = self.relative = self.valid = 0.0

    def update(self, prediction: Tensor, label: Tensor):
        valid = label != 255
        prediction, label = prediction[valid].double(), label[valid].double()
        self.squared += float(((prediction - label) ** 2).sum())
        self.relative += float(((prediction - label).abs() / label).sum())
        self.valid += label.numel()

    def compute(self) -> dict[str, float]:
        check_not_empty(self.valid, self)
        return {"rmse": (self.squared / self.valid) ** 0.5, "abs_rel": self.relative / self.valid}

    @staticmethod
    def best_constant(labels: Tensor) -> Tensor:
        """The median depth."""
        return labels.flatten().median()
