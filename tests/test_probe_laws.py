"""The laws of a probe: the model is undisturbed, nothing stays behind, nothing is counted in error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from osp_diag import Probe
from osp_diag.capture import attention_measuring, collector
from osp_diag.errors import CaptureError, SiteError
from tests.attention_reference import no_trace
from tests.families import FAMILIES
from tests.site_reference import FusedEncoder, OddBlock, built, odd_model

SEVERAL = [
    "llama",
    "gemma2",
    "gpt2",
    "bloom",
    "falcon",
    "mixtral",
    "gpt_oss",
    "bert",
    "albert",
    "mamba",
    "phi",
]


def train_step(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, list[Tensor], Tensor]:
    """Loss, gradients and the random state after one step with dropout, from a fixed random state."""
    torch.manual_seed(3)
    model.zero_grad()
    loss = model(**batch)[0].float().square().mean()
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return loss.detach(), gradients, torch.get_rng_state()


def same(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    first, second = ([x[0], *x[1], x[2]] for x in (left, right))
    return len(first) == len(second) and all(map(torch.equal, first, second))


def numbers(probe: Probe) -> dict[str, np.ndarray]:
    """All variables of the last step of a run."""
    found = {}
    for node in probe.run.tree.subtree:
        if not node.path.startswith(("/series", "/snapshot")):
            dataset = node.to_dataset(inherit=False)
            for name, variable in dataset.variables.items():  # not `data_vars`: a labelled array of each
                if "step" in variable.dims and name not in dataset.coords:
                    found[f"{node.path}/{name}"] = variable.isel(step=-1).values
    assert found
    return found


def assert_equal_numbers(
    found: dict[str, np.ndarray], expected: dict[str, np.ndarray], rtol: float = 0.0, atol: float = 0.0
) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=atol, err_msg=name)


def probed(model: nn.Module, *batches: dict[str, Any], **options: Any) -> dict[str, np.ndarray]:
    """The numbers of one step over some forward passes without gradients."""
    probe = Probe(model, **options)
    with torch.no_grad(), probe.step(0):
        for batch in batches:
            model(**batch)
    return numbers(probe)


# -- the model is undisturbed ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEVERAL)
def test_outputs_are_bit_identical(name: str) -> None:
    family = FAMILIES[name]
    for implementation in family.implementations or (None,):
        model, batch = built(name, implementation), family.inputs(padded=True)
        probe = Probe(model, sites=["*"])
        with torch.no_grad():
            expected = model(**batch)[0]
            with no_trace(model):
                with probe.collect():
                    found = model(**batch)[0]
                again = model(**batch)[0]
        assert torch.equal(found, expected)
        assert torch.equal(again, expected)


@pytest.mark.parametrize("name", SEVERAL)
def test_training_steps_under_autocast_are_bit_identical(name: str) -> None:
    family = FAMILIES[name]
    model, batch = family.build().train(), family.inputs(padded=True)
    probe = Probe(model, sites=["*"])
    expected = train_step(model, batch)
    with probe.collect():
        found = train_step(model, batch)
    assert same(found, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = train_step(model, batch)
        with probe.collect():
            found = train_step(model, batch)
        assert torch.is_autocast_enabled("cpu")
    assert same(found, lowered)
    assert not torch.equal(expected[0], lowered[0])


def test_statistics_under_autocast_are_taken_in_float32() -> None:
    """The same activations give the same numbers, whatever region they were made in."""
    model = odd_model()
    seen: list[bool] = []
    estimate = collector.ActivationObservation

    class Watched(estimate):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            seen.append(torch.is_autocast_enabled("cpu") or torch.is_grad_enabled())
            super().__init__(*args, **options)

    collector.ActivationObservation = Watched  # type: ignore[misc]
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), Probe(model).step(0):
            model(torch.arange(20).reshape(2, 10))
    finally:
        collector.ActivationObservation = estimate  # type: ignore[misc]
    assert seen
    assert not any(seen)


@pytest.mark.filterwarnings("ignore:.*use_reentrant")
@pytest.mark.parametrize(
    ("name", "reentrant"),
    [("llama", True), ("mixtral", True), *((name, False) for name in ("llama", "bloom", "mixtral", "bert"))],
)
def test_checkpointing_counts_nothing_twice(name: str, reentrant: bool) -> None:
    family = FAMILIES[name]
    model, batch = family.build(attention_dropout=0.1).train(), family.inputs()
    sites = ["residual_*", "mlp_*", "attention_*", "attention"]
    plain = Probe(model, sites=sites)
    with plain.step(0):
        expected = train_step(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    probe = Probe(model, sites=sites)
    with probe.step(0):
        inside = train_step(model, batch)
    assert same(inside, expected)
    assert_equal_numbers(numbers(probe), numbers(plain))


def test_selective_checkpointing_keeps_the_models_own_products() -> None:
    """It hands out what operations returned in the order of their calls: ours must not be among them."""
    family = FAMILIES["llama"]
    model, batch = family.build().train(), family.inputs()
    kept = [torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default]
    contexts = partial(create_selective_checkpoint_contexts, kept)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    expected = train_step(model, batch)
    with Probe(model, sites=["*"]).collect():
        assert same(train_step(model, batch), expected)


def test_fused_encoder_layers_are_noted_and_measured() -> None:
    model, ids = FusedEncoder().eval(), torch.arange(20).reshape(2, 10)
    probe = Probe(model)
    with torch.no_grad():
        expected = model(ids)
        with probe.step(0):
            found = model(ids)
        assert torch.equal(model(ids), expected)
    torch.testing.assert_close(found, expected)
    assert torch.backends.mha.get_fastpath_enabled()
    assert probe.run.tree["attention"].sizes["layer"] == 2
    assert any("outputs agree to rounding" in note for note in probe.run.tree.attrs["notes"])


# -- nothing stays behind ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bloom", "mixtral"])
def test_a_forward_that_raises_is_not_recorded_and_leaves_nothing(name: str) -> None:
    family = FAMILIES[name]
    model, batch = family.build(), family.inputs()
    probe = Probe(model, snapshot_tokens=4)
    with torch.no_grad(), probe.step(0):
        model(**batch)
    before = numbers(probe)
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-2]

    def fail(*_: Any) -> None:
        raise RuntimeError("planted")

    with no_trace(model):
        hook = last.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="planted"), probe.step(1):
            model(**batch)
        hook.remove()
    assert list(probe.run.tree["step"].values) == [0]
    assert_equal_numbers(numbers(probe), before)


def test_a_pass_that_raised_inside_a_step_is_forgotten_whole() -> None:
    """A longer sequence must not leave its length behind, nor half of its sites."""
    model = FAMILIES["llama"].build()
    short, long = (FAMILIES["llama"].inputs(tokens=n, seed=n) for n in (6, 9))
    expected = probed(model, short, sites=["*"], snapshot_tokens=4)
    probe = Probe(model, sites=["*"], snapshot_tokens=4)

    def fail(*_: Any) -> None:
        raise RuntimeError("planted")

    with torch.no_grad(), probe.step(0):
        for batch in (long, short, long):
            hook = model.lm_head.register_forward_hook(fail) if batch is long else None
            if hook is None:
                model(**batch)
                continue
            with pytest.raises(RuntimeError, match="planted"):
                model(**batch)
            hook.remove()
    assert_equal_numbers(numbers(probe), expected)
    snapshot = probe.run.tree["snapshot/residual_post"]["activation"]
    with torch.no_grad():
        state = model(**short, output_hidden_states=True).hidden_states[1]
    np.testing.assert_array_equal(snapshot.sel(layer=0).values, state[0, :4].numpy())


def test_interrupted_passes_are_forgotten() -> None:
    model, batch = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    expected = probed(model, batch)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    probe = Probe(model)
    with no_trace(model), torch.no_grad(), probe.step(0):
        model(**batch)
        hook = model.model.layers[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**batch)
        hook.remove()
    assert_equal_numbers(numbers(probe), expected)


def test_steps_without_a_pass_are_refused() -> None:
    model = odd_model()
    probe = Probe(model)
    with pytest.raises(CaptureError, match="step 3: no forward pass of the probed model ran"), probe.step(3):
        odd_model()(torch.arange(8)[None])


def test_steps_that_are_not_due_touch_nothing() -> None:
    model = odd_model()
    probe = Probe(model, every=2)
    with probe.step(1) as due:
        assert not due
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# -- what is counted ---------------------------------------------------------------------------------------


def test_nan_and_inf_are_counted_located_and_left_out() -> None:
    family = FAMILIES["llama"]
    model, batch = family.build(), family.inputs()
    probe = Probe(model, sites=["mlp_hidden"])
    with torch.no_grad(), probe.step(0):
        model(**batch)
    expected = numbers(probe)

    class Spoil(nn.Module):
        """The fourth token of the second sequence gets a NaN and an Inf on its way to the down projection."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            spoilt = self.inner(x).clone()
            spoilt[1, 4, 7], spoilt[1, 4, 30] = torch.nan, torch.inf
            return spoilt

    model.model.layers[1].mlp.act_fn = Spoil(model.model.layers[1].mlp.act_fn)
    with torch.no_grad(), probe.step(1):
        model(**batch)
    found = numbers(probe)
    np.testing.assert_array_equal(found["/mlp_hidden/nonfinite_token_count"][:, 0], [0, 1])
    assert np.isnan(found["/mlp_hidden/nonfinite_first_token"][0])
    assert found["/mlp_hidden/nonfinite_first_token"][1] == 4
    assert found["/mlp_hidden/nonfinite_first_channel"][1] == 7
    np.testing.assert_array_equal(found["/mlp_hidden/token_count"][:, 0], [24, 23])
    for name, value in found.items():
        if "nonfinite" not in name and "raw/" not in name:
            assert np.isfinite(value[1]).sum() == np.isfinite(expected[name][1]).sum(), name
            np.testing.assert_array_equal(value[0], expected[name][0])


LARGE = [(torch.bfloat16, 25_800.0), (torch.bfloat16, 6e7), (torch.float16, 25_800.0), (torch.float16, 6e4)]


@pytest.mark.parametrize(("dtype", "planted"), LARGE)
def test_large_activations_in_half_precision_do_not_overflow(dtype: torch.dtype, planted: float) -> None:
    model = odd_model().to(dtype)
    with torch.no_grad():
        model.words.weight[7, 3] = planted
    ids = torch.arange(20).reshape(2, 10)
    found = probed(model, {"idx": ids}, sites=["embedding"])
    state = model.words.weight[ids].double().detach().numpy()
    magnitude = np.abs(state).reshape(2, -1).max(-1)
    np.testing.assert_allclose(found["/embedding/infinity_norm"][0, 0], magnitude.mean(), rtol=1e-6)
    kurtosis = found["/embedding/fisher_kurtosis_max"][0, 0]
    assert kurtosis == pytest.approx((16**2 - 3 * 16 + 3) / 15 - 3, rel=1e-3)  # all in one channel of 16
    finite = [k for k in found if "nonfinite_first" not in k and "raw/" not in k]
    assert all(np.isfinite(found[k][..., 0]).all() or np.isnan(found[k]).any() for k in finite)
    assert not any(np.isinf(found[k]).any() for k in finite)


def test_accumulated_batches_are_one_big_batch() -> None:
    family = FAMILIES["llama"]
    model = family.build()
    parts = [family.inputs(seed=seed, padded=seed == 2) for seed in (1, 2, 3)]
    whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    found, expected = probed(model, *parts, sites=["*"]), probed(model, whole, sites=["*"])
    assert_equal_numbers(found, expected, rtol=2e-4, atol=1e-5)


def test_sequences_of_several_lengths_merge() -> None:
    family = FAMILIES["llama"]
    model = family.build()
    lengths = (5, 12, 8)
    found = probed(
        model, *(family.inputs(tokens=n, seed=n) for n in lengths), sites=["attention", "residual_post"]
    )
    assert found["/residual_post/token_count"][0, 0] == 2 * sum(lengths)
    assert found["/attention/key_mass"].shape[-1] == 12
    assert np.isfinite(found["/attention/key_mass"]).all()
    padded = []
    for n in lengths:
        batch = family.inputs(tokens=n, seed=n)
        fill = torch.zeros(2, 12 - n, dtype=torch.long)
        padded.append({key: torch.cat([value, fill], dim=1) for key, value in batch.items()})
    expected = probed(model, *padded, sites=["attention", "residual_post"])
    for name in ("sink_rate", "key_mass", "first_token_attention", "max_logit"):
        np.testing.assert_allclose(found[f"/attention/{name}"], expected[f"/attention/{name}"], atol=1e-5)


def test_embeddings_and_positional_ids_say_the_same_tokens() -> None:
    family = FAMILIES["llama"]
    model, batch = family.build(), family.inputs(padded=True)
    options: dict[str, Any] = {"sites": ["*"], "delimiter_ids": (1, 50, 51, 52)}
    expected = probed(model, batch, **options)

    def positional(*args: Any) -> dict[str, np.ndarray]:
        probe = Probe(model, **options)
        with torch.no_grad(), probe.step(0):
            model(*args)
        return numbers(probe)

    assert_equal_numbers(positional(batch["input_ids"], batch["attention_mask"]), expected)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    found = probed(model, {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}, **options)
    counts = found["/residual_post/token_count"][0]
    np.testing.assert_array_equal(counts, [21, 2, 0, 19])  # no ids, no delimiters: the mask holds none
    np.testing.assert_allclose(found["/attention/sink_rate"], expected["/attention/sink_rate"])


def test_a_decoders_tokens_are_its_own() -> None:
    import transformers

    config = transformers.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    batch = FAMILIES["llama"].inputs(padded=True)
    decoder = {"decoder_input_ids": batch["input_ids"], "decoder_attention_mask": torch.ones(2, 12).long()}
    decoder["decoder_attention_mask"][0, -5:] = 0
    probe = Probe(model, sites=["residual_post", "attention"])
    assert any("of the stack decoder (decoder.block)" in note for note in probe.site_map.notes)
    with torch.no_grad(), probe.step(0):
        model(**batch, **decoder)
    assert numbers(probe)["/residual_post/token_count"][0, 0] == 24 - 5
    # The decoder makes its own tokens of labels: as many, none of which is padding.
    with torch.no_grad(), probe.step(1):
        model(**batch, labels=batch["input_ids"])
    assert numbers(probe)["/residual_post/token_count"][0, 0] == 24


def test_packed_documents_each_have_a_first_token() -> None:
    model, batch = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    batch["position_ids"] = torch.tensor([[*range(5), *range(7)], [*range(12)]])
    del batch["attention_mask"]
    assert probed(model, batch, sites=["residual_post"])["/residual_post/token_count"][0, 1] == 3


def test_a_layer_that_attends_twice_counts_once() -> None:
    from tests.families import Family

    family = Family("diffllama", "DiffLlamaForCausalLM", "DiffLlamaConfig", {"num_key_value_heads": 2})
    batch = family.inputs()
    twice, once = (
        probed(family.build(name), batch, sites=["attention", "query_post_rope"])
        for name in ("sdpa", "eager")
    )
    assert twice["/raw/attention/first_token_attention.count"][0, 0, 0] == 24
    for name in ("sink_rate", "first_token_attention", "key_mass", "max_logit"):
        np.testing.assert_allclose(twice[f"/attention/{name}"], once[f"/attention/{name}"], atol=1e-5)


def test_attention_written_out_takes_its_values_where_it_can() -> None:
    found = {
        name: probed(built(name), FAMILIES[name].inputs(), sites=["attention"]) for name in ("gptj", "bloom")
    }
    assert np.isfinite(found["gptj"]["/attention/value_drain"]).all()
    assert np.isnan(found["bloom"]["/attention/value_drain"]).all()
    assert "/value/token_count" not in found["gptj"]


def test_tensors_that_hold_no_token_each_are_said_to_be_absent() -> None:
    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(OddBlock(16, 2) for _ in range(2))
            self.words, self.pooled = nn.Embedding(50, 16), nn.Linear(16, 4)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids)
            for block in self.blocks:
                x = block(x)
            return self.pooled(x[:, : 11 if ids.shape[1] == 11 else 3])

    model = Pooling()
    probe = Probe(model, sites=["residual_post", "linear_input:*"])
    with torch.no_grad(), probe.step(0):
        model(torch.arange(20).reshape(2, 10))
    assert "does not hold one vector a token (2 × 10)" in probe.absent["linear_input:pooled"]
    with pytest.raises(SiteError, match=r"site 'residual_elsewhere' is not in this model; did you mean"):
        Probe(model, sites=["residual_elsewhere"])


# -- compiled models ---------------------------------------------------------------------------------------


def compiled_whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_blocks(model: nn.Module) -> nn.Module:
    for block in model.model.layers:  # type: ignore[union-attr]
        block.compile(backend="aot_eager")
    return model


@pytest.mark.parametrize(
    ("compile_model", "before"),
    [(compiled_whole, True), (compiled_in_place, True), (compiled_blocks, True), (compiled_blocks, False)],
    ids=["whole, warm", "in place, warm", "blocks, warm", "blocks, cold"],
)
def test_compiled_models_give_the_eager_numbers(
    compile_model: Callable[[nn.Module], nn.Module], before: bool
) -> None:
    family = FAMILIES["llama"]
    batch = family.inputs(padded=True)
    sites = ["residual_post", "mlp_hidden", "query_pre_rope", "attention"]
    expected = probed(family.build(), batch, sites=sites)
    model = compile_model(family.build())
    with torch.no_grad():
        if before:
            model(**batch)
        found = probed(model, batch, sites=sites)
        model(**batch)
    assert_equal_numbers(found, expected)
    torch.compiler.reset()


def test_backward_of_compiled_checkpointed_blocks_works_inside_the_step() -> None:
    family = FAMILIES["llama"]
    batch = family.inputs()
    plain = train_step(family.build().train(), batch)
    model = family.build().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled_blocks(model)
    with Probe(model).step(0):
        inside = train_step(model, batch)
    assert same(inside, plain)
    torch.compiler.reset()


@pytest.mark.parametrize("compile_model", [compiled_whole, compiled_in_place, compiled_blocks])
def test_backward_of_compiled_models_works_outside_the_step(
    compile_model: Callable[[nn.Module], nn.Module],
) -> None:
    family = FAMILIES["llama"]
    batch = family.inputs()
    _, expected, _ = train_step(family.build().train(), batch)
    inner = family.build().train()
    model = compile_model(inner)
    with Probe(model).step(0):
        loss = model(**batch)[0].float().square().mean()
    loss.backward()
    found = [p.grad for p in inner.parameters() if p.grad is not None]
    assert all(map(torch.equal, found, expected))
    torch.compiler.reset()


# -- memory and waiting ------------------------------------------------------------------------------------


class Watching(TorchDispatchMode):
    """The largest tensor that any operation made, and which operations brought a value to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.waited: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, tensor.numel())
        if any(word in str(function) for word in ("_local_scalar_dense", "nonzero", "is_nonzero", "unique")):
            self.waited.append(str(function))
        return result


@contextmanager
def watching_statistics(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watching]:
    """Watch what runs while statistics are taken. The probe keeps its work out of modes around the model."""
    watch = Watching()
    measures: list[tuple[Any, str]] = [
        (collector.Collector, "on_activation"),
        (collector.Collector, "_fold_attention"),
        (collector.Collector, "_mask_of"),
        (collector.Collector, "on_stream"),
    ]
    for owner, name in measures:
        plain = getattr(owner, name)

        def watched(*args: Any, plain: Any = plain, **kwargs: Any) -> Any:
            with watch:
                return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)
    yield watch


@pytest.mark.parametrize("name", ["llama", "mistral", "falcon_alibi", "gpt_oss"])
def test_no_statistic_makes_a_square_of_the_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, tokens = FAMILIES[name], 512
    model = family.build(max_position_embeddings=tokens)
    probe = Probe(model)
    with watching_statistics(monkeypatch) as watch, torch.no_grad(), probe.step(0):
        model(**family.inputs(tokens=tokens))
    square = 2 * 4 * tokens * tokens
    tile = 2 * 4 * attention_tile() * tokens
    assert 0 < watch.largest <= tile < square


def attention_tile() -> int:
    import inspect

    observation = attention_measuring.AttentionObservation
    return int(inspect.signature(observation.__init__).parameters["tile"].default)


@pytest.mark.parametrize("name", ["llama", "mixtral", "bert", "gpt_oss", "bloom"])
def test_nothing_waits_for_the_device_where_it_is_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is kept for hosts may look at values; with that switched off, nothing does."""
    import importlib
    import pkgutil

    import osp_diag.estimators as estimators

    for module in pkgutil.iter_modules(estimators.__path__):
        loaded = importlib.import_module(f"osp_diag.estimators.{module.name}")
        if hasattr(loaded, "runs_on_host"):
            monkeypatch.setattr(loaded, "runs_on_host", lambda *_: False)
    family = FAMILIES[name]
    model = family.build()
    probe = Probe(model, delimiter_ids=(5, 6))
    with watching_statistics(monkeypatch) as watch, torch.no_grad(), probe.collect():
        model(**family.inputs(padded=True))
    assert watch.largest > 0
    assert watch.waited == []


def test_states_stay_on_the_device_of_the_model() -> None:
    model = odd_model()
    with torch.no_grad(), Probe(model).collect() as found:
        model(torch.arange(20).reshape(2, 10))
    assert {v.device for state in found.states.values() for v in state.values()} == {
        model.words.weight.device
    }
    assert not any(v.requires_grad for state in found.states.values() for v in state.values())
