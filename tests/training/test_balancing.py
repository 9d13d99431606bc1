import math

import pytest
import torch

from transformers_degmix.training.balancing import DynamicWeightAverage, FixedWeights, UncertaintyWeights


LOSSES = torch.tensor([1.0, 2.0, 6.0])
ALL = torch.tensor([True, True, True])


def test_fixed_weights():
    assert FixedWeights(3)(LOSSES, ALL).item() == 9


def test_uncertainty():
    balancer = UncertaintyWeights(3)
    assert balancer(LOSSES, ALL).item() == 9
    with torch.no_grad():
        for parameter, value in zip(balancer.log_variances, [0.0, math.log(2), -1.0]):
            parameter.fill_(value)
    # Kendall et al., equation 7, times 2, with sigma^2 = exp(s)
    expected = sum(loss / math.exp(s) + s for loss, s in zip([1, 2, 6], [0, math.log(2), -1]))
    assert balancer(LOSSES, ALL).item() == pytest.approx(expected)


def test_uncertainty_of_parts_adds_up():
    balancer = UncertaintyWeights(3)
    for parameter in balancer.log_variances:
        torch.nn.init.normal_(parameter)
    parts = [balancer(LOSSES * part, ALL, share=part) for part in (0.25, 0.75)]
    assert sum(parts).item() == pytest.approx(balancer(LOSSES, ALL).item())


def test_learned_variances_approach_the_losses():
    balancer = UncertaintyWeights(3)
    optimizer = torch.optim.Adam(balancer.parameters(), 0.05)
    for _ in range(500):
        optimizer.zero_grad()
        balancer(LOSSES, ALL).backward()
        optimizer.step()
    # The minimum of loss * exp(-s) + s is at exp(s) = loss.
    variances = torch.stack(list(balancer.log_variances)).detach().exp()
    torch.testing.assert_close(variances, LOSSES, rtol=1e-2, atol=0)


def test_uncertainty_of_a_task_without_labels_is_not_counted():
    balancer, losses = UncertaintyWeights(3), torch.tensor([1.0, 0.0, 6.0])
    with torch.no_grad():
        for parameter in balancer.log_variances:
            parameter.fill_(0.5)
    loss = balancer(losses, torch.tensor([True, False, True]))
    assert loss.item() == pytest.approx(7 * math.exp(-0.5) + 2 * 0.5)
    loss.backward()
    assert [parameter.grad.item() != 0 for parameter in balancer.log_variances] == [True, False, True]


def test_dynamic_weight_average():
    balancer = DynamicWeightAverage(2)
    epochs = [[[4.0, 1.0], [2.0, 3.0]], [[1.5, 2.0]], [[1.0, 1.0]], [[1.0, 1.0]]]
    means = [[3.0, 2.0], [1.5, 2.0], [1.0, 1.0]]
    seen = []
    for epoch, batches in enumerate(epochs):
        for losses in batches:
            balancer.observe(torch.tensor(losses), ALL[:2], epoch)
        seen.append(balancer.weights.tolist())
    assert seen[0] == seen[1] == [1, 1]
    # Liu et al., equation 7, temperature 2, with the two epochs before
    for epoch in (2, 3):
        ratios = [last / before for last, before in zip(means[epoch - 1], means[epoch - 2])]
        powers = [math.exp(ratio / 2) for ratio in ratios]
        assert seen[epoch] == pytest.approx([2 * power / sum(powers) for power in powers])
    assert balancer(torch.tensor([1.0, 0.0]), ALL[:2]).item() == pytest.approx(seen[3][0])


def test_dynamic_weight_average_of_a_task_without_labels():
    balancer = DynamicWeightAverage(2)
    for epoch in range(3):
        balancer.observe(torch.tensor([1.0, 0.0]), torch.tensor([True, False]), epoch)
    assert balancer.weights.tolist() == [1, 1]


def test_dynamic_weight_average_is_over_steps_with_labels():
    """Steps without labels of the second task change nothing, nor does an epoch without any."""
    balancer = DynamicWeightAverage(2)
    labelled, unlabelled = ([1.0, 4.0], True), ([1.0, 0.0], False)
    epochs = [[labelled, unlabelled], [unlabelled], [unlabelled, ([1.0, 2.0], True)], [labelled]]
    for epoch, steps in enumerate(epochs):
        for losses, has_labels in steps:
            balancer.observe(torch.tensor(losses), torch.tensor([True, has_labels]), epoch)
        if epoch == 2:
            assert balancer.weights.tolist() == [1, 1]  # nothing to compare the last epoch with
    powers = [math.exp(1 / 2), math.exp(2 / 4 / 2)]
    assert balancer.weights.tolist() == pytest.approx([2 * power / sum(powers) for power in powers])


def test_state_is_kept():
    balancer, other = DynamicWeightAverage(2), DynamicWeightAverage(2)
    for epoch in range(3):
        balancer.observe(torch.tensor([2.0**-epoch, 1.0]), ALL[:2], epoch)
    other.load_state_dict(balancer.state_dict())
    for each in (balancer, other):
        each.observe(torch.tensor([0.3, 1.0]), ALL[:2], 3)
    assert torch.equal(balancer.weights, other.weights) and balancer.weights[0] < 1
