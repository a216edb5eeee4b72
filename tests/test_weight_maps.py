"""Maps of |W| in a run: exact where they say so, spikes kept, patterns refused before the forward pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import osp_diag
from osp_diag.capture.weight_maps import MAP_SIDE, weight_maps
from osp_diag.cli.main import main
from osp_diag.errors import StoreError, UsageError
from osp_diag.sites import find_sites
from tests.tiny_checkpoints import bert, byte_tokenizer, gpt2, llama, save


def wide():
    """A Llama whose down projections are wider than a map, with one planted weight each."""
    import transformers

    torch.manual_seed(1)
    sizes = {"hidden_size": 160, "intermediate_size": 300, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=64)).eval()
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            block.mlp.down_proj.weight[17 + layer, 203] = -5.0 - layer
    return model


def test_a_planted_weight_keeps_its_height_and_its_place():
    model = wide()
    maps, problems = weight_maps(model, find_sites(model), ["mlp.down_proj"])
    assert (list(maps), problems) == (["mlp.down_proj"], [])
    found = maps["mlp.down_proj"]
    assert found["weight"].dims == ("layer", "output_cell", "input_cell")
    assert found["weight"].shape == (4, MAP_SIDE, MAP_SIDE)
    for layer in range(4):
        matrix = model.model.layers[layer].mlp.down_proj.weight.detach().abs().numpy()
        one = found.sel(layer=layer)
        np.testing.assert_array_equal(one["row_maximum"], matrix.max(1))
        np.testing.assert_array_equal(one["column_maximum"], matrix.max(0))
        assert one["weight"].max() == 5 + layer
        row, column = np.unravel_index(int(one["weight"].values.argmax()), (MAP_SIDE, MAP_SIDE))
        starts = one["first_output_channel"].values, one["first_input_channel"].values
        assert starts[0][row] <= 17 + layer < starts[0][row + 1]
        assert starts[1][column] <= 203 < starts[1][column + 1]


def test_by_default_what_writes_into_the_stream_in_first_middle_and_last_block():
    model = wide()
    maps, _ = weight_maps(model, find_sites(model))
    assert {name: dataset["layer"].values.tolist() for name, dataset in maps.items()} == {
        "mlp.down_proj": [0, 1, 3],
        "self_attn.o_proj": [0, 1, 3],
    }


def test_patterns_name_modules_as_a_whole_within_the_block_or_at_the_end():
    model = llama(layers=3)
    sites = find_sites(model)

    def chosen(*patterns: str) -> dict[str, list[int]]:
        maps, _ = weight_maps(model, sites, patterns)
        return {name: dataset["layer"].values.tolist() for name, dataset in maps.items()}

    assert chosen("model.layers.1.mlp.*_proj") == {f"mlp.{n}_proj": [1] for n in ("down", "gate", "up")}
    assert chosen("o_proj") == {"self_attn.o_proj": [0, 1, 2]}
    assert chosen("self_attn.[qk]_proj") == {f"self_attn.{n}_proj": [0, 1, 2] for n in "kq"}
    assert chosen() == {}


def test_a_conv1d_is_turned_so_that_rows_are_outputs():
    model = gpt2()
    found = weight_maps(model, find_sites(model), ["mlp.c_fc"])[0]["mlp.c_fc"]
    matrix = model.transformer.h[0].mlp.c_fc.weight.detach().abs().numpy()  # (input, output)
    assert found.sizes["output_channel"] == matrix.shape[1]
    np.testing.assert_array_equal(found["weight"].sel(layer=0), matrix.T)


def test_not_a_number_is_left_out():
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, :] = float("nan")
        model.model.layers[0].mlp.down_proj.weight[4, 5] = float("inf")
    found = weight_maps(model, find_sites(model), ["down_proj"])[0]["mlp.down_proj"].sel(layer=0)
    assert np.isnan(found["row_maximum"].values[3])
    assert np.isfinite(found["row_maximum"].drop_sel(output_channel=3)).all()
    assert np.isfinite(found["column_maximum"]).all()


def test_a_packed_weight_is_noted_and_not_drawn():
    model = llama()
    model.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(
        torch.zeros(16, 24, dtype=torch.int8), requires_grad=False
    )
    sites = find_sites(llama())
    maps, problems = weight_maps(model, sites, ["down_proj"])
    assert maps["mlp.down_proj"]["layer"].values.tolist() == [0]
    assert problems == ["no map of model.layers.1.mlp.down_proj: its weight is quantised (int8)"]


def test_the_run_holds_them_on_disk_and_they_are_no_sites(tmp_path):
    save(llama(layers=3), tmp_path / "model")
    from osp_diag.checkpoints import open_checkpoint
    from osp_diag.probing.checkpoint import probe_checkpoint
    from osp_diag.tokens import make_batches

    checkpoint = open_checkpoint(tmp_path / "model", device="cpu")
    batches = make_batches(ids=np.arange(32).reshape(2, 16))
    run = probe_checkpoint(checkpoint, batches, out=tmp_path / "run.zarr")
    assert run.weight_maps == ["mlp.down_proj", "self_attn.o_proj"]
    assert not [site for site in run.sites if "weight_map" in site]
    found = run.weight_map("mlp.down_proj")
    assert found["layer"].values.tolist() == [0, 1, 2]
    matrix = checkpoint.model.model.layers[1].mlp.down_proj.weight.detach().abs().numpy()
    np.testing.assert_array_equal(found["weight"].sel(layer=1), matrix)
    assert found["row_maximum"].attrs["definition"] == "max_j |W_ij| of output channel i"
    with pytest.raises(StoreError, match=r"no map of the weights 'mlp\.up_proj'; did you mean mlp"):
        run.weight_map("mlp.up_proj")
    some = probe_checkpoint(checkpoint, batches, sites=["residual_post"])
    assert some.weight_maps == []
    assert probe_checkpoint(checkpoint, batches, weights=()).weight_maps == []


def test_a_pattern_that_matches_nothing_is_refused_before_the_forward_pass(tmp_path, capsys):
    passes: list[int] = []
    model = llama()
    model.register_forward_pre_hook(lambda _, given, named: passes.append(1), with_kwargs=True)
    text = tmp_path / "text.txt"
    text.write_text("words " * 50)
    wanted = ["o_proj", "mlp.down_prj"]
    with pytest.raises(UsageError, match=r"weights='mlp\.down_prj' matches no projection .*mlp\.down_proj"):
        osp_diag.probe(model, text=text, tokens=64, tokenizer=byte_tokenizer(), weights=wanted)
    assert len(passes) == 1  # the one that finds the sites
    save(model, tmp_path / "model", byte_tokenizer())
    words = ["--weights", "dwn", "--text", str(text), "--out", str(tmp_path / "run.zarr")]
    assert main(["probe", str(tmp_path / "model"), *words]) == 2
    assert "weights='dwn' matches no projection" in capsys.readouterr().err
    assert not (tmp_path / "run.zarr").exists()


def test_an_encoder_has_them_too():
    model = bert()
    maps, _ = weight_maps(model, find_sites(model))
    assert all(dataset["layer"].values.tolist() == [0, 1] for dataset in maps.values())
    assert len(maps) == 2
