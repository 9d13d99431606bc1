"""Task balancing: how the losses of the tasks become the one number that is minimised.

The losses come with the fixed weights of the configuration (`loss_weight`), the paper's by default; what is learned
or adapted here multiplies those. A step in which a task has no label changes nothing that is kept about this task.
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
            losses: `(num_tasks,)`, of a batch or of a part of it; those of the parts add up to the batch's.
            labelled: `(num_tasks,)`, bool: whether the batch has a label of the task. Without, the loss is 0.
            share: the part of the batch that this is, in (0, 1].
        """
        return losses.sum()

    def observe(self, losses: Tensor, labelled: Tensor, epoch: int):
        """Is told about each whole batch: losses and `labelled`, as for [`forward`], and its epoch, from 0."""


class UncertaintyWeights(FixedWeights):
    """Learned homoscedastic uncertainty (Kendall, Gal and Cipolla 2018): sum of exp(-s) * loss + s, with s learned.

    s is the logarithm of a task's variance. This is twice the paper's objective for regression, for all kinds, so that
    the training starts, with s = 0, from the sum of the losses.
    """

    def __init__(self, num_tasks: int):
        super().__init__(num_tasks)
        # A parameter each: one without a gradient does not move, but a value in a parameter does, by its momentum.
        self.log_variances = nn.ParameterList(torch.zeros(()) for _ in range(num_tasks))

    def forward(self, losses: Tensor, labelled: Tensor, share: float = 1.0) -> Tensor:
        log_variances = torch.stack(list(self.log_variances))
        return torch.where(labelled, torch.exp(-log_variances) * losses + share * log_variances, losses).sum()


class DynamicWeightAverage(FixedWeights):
    """Dynamic weight average (Liu, Johns and Davison 2019): tasks whose loss falls slowly weigh more.

    In epoch e the weights are num_tasks * softmax(r / 2), with r = L(e-1) / L(e-2), the ratio of a task's mean losses
    in the two epochs before; 1 in the first two epochs. Means are over the steps in which the task has labels. Epochs
    without one are left out: r is 1 in the next, and then compares those on both sides.
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
        # of the epoch that is going on
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
