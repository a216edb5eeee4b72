import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from osp_diag.trainer.config import DivergenceConfig
from osp_diag.trainer.divergence import LEAST, Watch, first_bad_tensor
from osp_diag.trainer.scalars import Clock, Scalars

CPU = torch.device("cpu")


def judged(watch, losses, norm=1.0):
    return [bool(watch.judge(torch.tensor(loss), torch.tensor(norm))) for loss in losses]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_bad_in_loss_and_gradient(bad):
    assert judged(Watch(DivergenceConfig(policy="skip"), CPU), [1.0, bad, 1.0]) == [False, True, False]
    assert judged(Watch(DivergenceConfig(policy="skip"), CPU), [1.0], norm=bad) == [True]
    assert judged(Watch(DivergenceConfig(policy="ignore"), CPU), [bad, 1.0]) == [False, False]


def test_after_a_stop_nothing_moves_any_more():
    assert judged(Watch(DivergenceConfig(policy="stop"), CPU), [1.0, float("nan"), 1.0]) == [
        False,
        True,
        True,
    ]


@settings(deadline=None)
@given(
    noise=st.lists(st.floats(-0.1, 0.1), min_size=LEAST, max_size=40),
    window=st.integers(LEAST, 20),
)
def test_a_spike_is_so_many_standard_deviations_of_the_recent_losses(noise, window):
    watch = Watch(DivergenceConfig(policy="skip", spike=5.0, window=window), CPU)
    losses = [3.0 + entry for entry in noise]
    kept = [loss for loss, bad in zip(losses, judged(watch, losses), strict=True) if not bad][-window:]
    recent = torch.tensor(kept, dtype=torch.float64)
    limit = float(recent.mean() + 5 * recent.std(correction=0))
    assert not bool(watch.judge(torch.tensor(limit - 1e-2), torch.tensor(1.0)))
    assert bool(watch.judge(torch.tensor(limit + 10.0), torch.tensor(1.0)))


def test_the_first_steps_are_no_spikes():
    watch = Watch(DivergenceConfig(policy="skip", spike=3.0), CPU)
    assert judged(watch, [9.0] * (LEAST - 1) + [20.0]) == [False] * LEAST


def test_the_watch_goes_on_where_it_was():
    one = Watch(DivergenceConfig(policy="skip", spike=3.0, window=16), CPU)
    judged(one, [3.0, 3.1] * 20)
    other = Watch(DivergenceConfig(policy="skip", spike=3.0, window=16), CPU)
    other.load_state_dict(one.state_dict())
    assert judged(one, [3.05, 4.0]) == judged(other, [3.05, 4.0]) == [False, True]


class Ratio(nn.Module):
    def __init__(self, inner=1.0):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.inner = inner

    def forward(self, x):
        return self.second(self.first(x) * self.inner)


def test_the_first_bad_tensor_is_named():
    x = torch.ones(1, 2)
    assert first_bad_tensor(Ratio(), iter([])) is None
    model = Ratio()
    with torch.no_grad():
        model.second.weight[0, 0] = float("nan")
    assert first_bad_tensor(model, iter([])) == "parameter second.weight holds NaN or Inf before the step"
    model = Ratio(inner=float("inf"))
    found = first_bad_tensor(model, (model(x).sum() for _ in range(1)))
    assert found == "the output of second is the first that is not finite"
    model = Ratio()
    found = first_bad_tensor(model, ((model(x) - model(x)).abs().sqrt().sum() for _ in range(1)))
    assert found == "the gradient at the output of second is the first that is not finite"
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    model = Ratio()
    found = first_bad_tensor(model, (model(x).sum() / 0 for _ in range(1)))
    assert found == "the loss is the first that is not finite"


def test_scalars_are_read_with_the_lag_that_was_asked_for():
    scalars = Scalars(CPU, lag=2)
    for step in range(5):
        scalars.add(step, {"loss": torch.tensor(float(step))}, {"learning_rate": 0.1}, Clock(CPU))
        read = list(scalars.arrived())
        assert [at for at, _ in read] == ([step - 2] if step >= 2 else [])
    rest = dict(scalars.arrived(wait=True))
    assert [values["loss"] for values in rest.values()] == [3.0, 4.0]
    assert all(values["step_seconds"] >= 0 and values["learning_rate"] == 0.1 for values in rest.values())
