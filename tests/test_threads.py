"""One model, two threads: a probe acts in the thread that entered its step, and the other notices nothing."""

import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import osp_diag
from osp_diag.errors import CaptureError
from osp_diag.seams.interface import ObservedName
from tests.training_loops import assert_untouched, dropping_llama, token_ids

SITES = ("residual_post", "attention", "mlp_hidden")


@pytest.fixture(scope="module")
def probe():
    return osp_diag.Probe(dropping_llama().eval(), sites=SITES, keep_raw=False)


@contextmanager
def beside(work):
    """Run ``work`` again and again in another thread until the block ends; raise what it raised."""
    stop, errors, started = threading.Event(), [], threading.Event()

    def run():
        while not stop.is_set():
            try:
                work()
            except BaseException as error:
                errors.append(error)
                break
            finally:
                started.set()

    # Threads change places so often that every place where they can is met.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        started.wait()
        yield
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]


def test_a_plain_pass_beside_probed_ones_is_neither_disturbed_nor_recorded(probe):
    model, ids, others = probe.model, token_ids(2), token_ids(5, seed=3)
    with torch.no_grad():
        expected, plain = model(ids).logits, model(others).logits
        with probe.collect() as alone:
            model(ids)
    passes = []

    def work():
        with torch.no_grad():
            passes.append(torch.equal(model(others).logits, plain))

    with beside(work), torch.no_grad():
        for _ in range(25):
            with probe.collect() as collector:
                assert torch.equal(model(ids).logits, expected)
            assert collector.forward_passes == 1
            assert collector.skipped == alone.skipped
            for key, state in alone.states.items():
                assert all(
                    torch.equal(value, collector.states[key][name]) for name, value in state.items()
                ), key
    assert passes
    assert all(passes)
    assert_untouched(model)
    assert type(model.config._attn_implementation) is str
    mapping = transformers_table()
    assert not [name for name in mapping if isinstance(name, ObservedName)]


def transformers_table():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return type(ALL_ATTENTION_FUNCTIONS)._global_mapping


def test_passes_of_another_thread_alone_are_no_pass_of_the_step(probe):
    step = osp_diag.Probe(probe.model, sites=("residual_post",))
    thread = threading.Thread(target=lambda: probe.model(token_ids(2)))

    def elsewhere():
        with step.step(0):
            thread.start()
            thread.join()

    with pytest.raises(CaptureError, match="no forward pass of the probed model ran"):
        elsewhere()


def test_a_name_outlives_the_step_for_a_thread_that_has_just_read_it(probe):
    """As a thread has it that is stopped between the config and the table."""
    model, names = probe.model, []
    layer = model.model.layers[0].self_attn
    handle = layer.register_forward_pre_hook(lambda *_: names.append(model.config._attn_implementation))
    with torch.no_grad(), probe.collect():
        model(token_ids(1))
    handle.remove()
    query = torch.randn(1, 2, 3, 8)
    assert isinstance(names[0], ObservedName)
    function = transformers_table()[names[0]]
    plain = transformers_table()["sdpa"]
    ours, theirs = (f(layer, query, query, query, None) for f in (function, plain))
    assert torch.equal(ours[0], theirs[0])
    names.clear()
    assert not [name for name in transformers_table() if isinstance(name, ObservedName)]


def test_a_second_thread_that_probes_is_refused_before_its_forward(probe):
    messages = []

    def second():
        with (
            pytest.raises(CaptureError, match="is being probed in another thread") as raised,
            probe.collect(),
        ):
            raise AssertionError("the step began")
        messages.append(str(raised.value))

    with probe.collect():
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        probe.model(token_ids(1))
    assert len(messages) == 1
    assert_untouched(probe.model)
    with torch.no_grad(), probe.collect() as collector:  # it is free again
        probe.model(token_ids(1))
    assert collector.forward_passes == 1


def test_a_thread_that_died_within_its_step_holds_nothing(probe):
    def die():
        probe.collect().__enter__()

    thread = threading.Thread(target=die)
    thread.start()
    thread.join()
    with torch.no_grad(), probe.collect() as collector:
        probe.model(token_ids(1))
    assert collector.forward_passes == 1


class Checkpointed(nn.Module):
    """Blocks that are computed again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(2))
        self.head = nn.Linear(16, 64)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return self.head(x)


def test_a_backward_pass_in_another_thread_recomputes_unobserved():
    model = Checkpointed()
    probe = osp_diag.Probe(model, sites=("residual_post",), keep_raw=False)
    ids = torch.arange(22).reshape(2, 11)
    with torch.no_grad(), probe.collect() as alone:
        model(ids)
    errors = []

    def backward(loss):
        try:
            loss.backward()
        except BaseException as error:
            errors.append(error)

    with probe.collect() as collector:
        loss = model(ids).sum()
        thread = threading.Thread(target=backward, args=(loss,))
        thread.start()
        thread.join()
    assert not errors
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert collector.forward_passes == 1
    for key, state in alone.states.items():
        assert all(torch.equal(value, collector.states[key][name]) for name, value in state.items()), key
