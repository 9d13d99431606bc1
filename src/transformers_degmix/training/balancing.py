"""Task balancing: the losses of the tasks become the one number that is minimised.

The losses already have the fixed weights of the configuration (`loss_weight`, by default the paper's). Weights that
are learned or adapted here multiply them. A step without a label of a task does not change the state of that task.
"""

import torch
from torch import Tensor, nn


class FixedWeights(nn.Module):
    """The sum of the losses."""

    def __init__(self, num_tasks: int):
        super().__init__()

    def forward(self, losses: Tensor, labelled: Tensor, share: float = 1.0) -> Tensor:
        """The loss that is minimised.

        Args:
            losses: `(num_tasks,)`, of a batch or a part of it. The losses of all parts add up to the batch's.
            labelled: `(num_tasks,)`, bool: whether the batch has a label of the task. Without a label, the loss is 0.
            share: how much of the batch this part is, in (0, 1].
        """
        return losses.sum()

    def observe(self, losses: Tensor, labelled: Tensor, epoch: int):
        """Called once per step, with the losses of the whole batch, as in [`forward`], and its epoch, from 0."""


class UncertaintyWeights(FixedWeights):
    """Learned homoscedastic uncertainty (Kendall, Gal and Cipolla 2018): sum of exp(-s) * loss + s, with s learned.

    s is the logarithm of a task's variance. All kinds have twice the paper's objective for regression: it starts, with
    s = 0, as the sum of the losses.
    """

    def __init__(self, num_tasks: int):
        super().__init__(num_tasks)
        # One parameter per task: without a gradient, optimisers skip it. Momentum would move an entry of a vector.
        self.log_variances = nn.ParameterList(torch.zeros(()) for _ in range(num_tasks))

    def forward(self, losses: Tensor, labelled: Tensor, share: float = 1.0) -> Tensor:
        log_variances = torch.stack(list(self.log_variances))
        return torch.where(labelled, torch.exp(-log_variances) * losses + share * log_variances, losses).sum()


class DynamicWeightAverage(FixedWeights):
    """Dynamic weight average (Liu, Johns and Davison 2019): tasks whose loss falls slowly weigh more.

    In epoch e the weights are num_tasks * softmax(r / 2), where r = L(e-1) / L(e-2) is the ratio of a task's mean
    losses in the two previous epochs. In the first two epochs, the weights are 1. Means are over the steps with labels
    of the task. After an epoch without any, r is 1; one epoch later, it compares the epochs before and after the gap.
    """

    TEMPERATURE = 2.0

    weights: Tensor
    last_means: Tensor
    total: Tensor
    count: Tensor
    epoch: Tensor

    def __init__(self, num_tasks: int):
        super().__init__(num_tasks)
        self.register_buffer("weights", torch.ones(num_tasks))
        self.register_buffer("last_means", torch.zeros(num_tasks))
        # of the current epoch
        self.register_buffer("total", torch.zeros(num_tasks))
        self.register_buffer("count", torch.zeros(num_tasks, dtype=torch.int64))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))

    def forward(self, losses: Tensor, labelled: Tensor, share: float = 1.0) -> Tensor:
        return (self.weights * losses).sum()

    def observe(self, losses: Tensor, labelled: Tensor, epoch: int):
        if epoch > self.epoch:
            means = self.total / self.count
            if self.last_means.any():
                ratios = torch.where((self.count > 0) & (self.last_means > 0), means / self.last_means, 1.0)
                self.weights.copy_(len(ratios) * (ratios / self.TEMPERATURE).softmax(dim=0))
            self.last_means.copy_(torch.where(self.count > 0, means, self.last_means))
            self.total.zero_()
            self.count.zero_()
            self.epoch.fill_(epoch)
        self.total += losses
        self.count += labelled


TASK_BALANCING = {
    "fixed": FixedWeights,
    "uncertainty": UncertaintyWeights,
    "dynamic_weight_average": DynamicWeightAverage,
}
