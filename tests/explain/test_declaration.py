"""Declarations are read strictly: what is wrong is named with what would be right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import kvpack.declaration
from kvpack.declaration import load_topology, read_parallelism, read_topology
from kvpack.errors import LayoutError, OptionsError
from kvpack.parallel import Parallelism
from kvpack.shapes import ENGINE_LAYOUTS, MODELS, EngineLayout

BOTH = {"shape": "qwen3-235b", "prefill": {}, "decode": {}}


def docstring_example() -> str:
    """Return the first file in the module's documentation, with the second's tables after it."""
    documentation = kvpack.declaration.__doc__ or ""
    blocks = re.findall(r"::\n\n((?:    .*\n|\n)+)", documentation)
    return "\n".join(re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in blocks)


def test_the_documented_file_means_what_it_says(tmp_path: Path) -> None:
    named, declared = docstring_example().split("\n[[shape]]", 1)
    file = tmp_path / "topology.toml"
    file.write_text(named, encoding="utf-8")
    topology = load_topology(file)
    assert topology.shape is MODELS["qwen3-235b"]
    assert (topology.dtype, topology.tokens, topology.first) == ("fp8", 8192, 0)
    assert not topology.stream_layers
    assert topology.prefill.parallelism == Parallelism(tp=4, pp=2, layers=(50, 44))
    assert topology.prefill.layout is ENGINE_LAYOUTS["hnd"]
    assert topology.decode.parallelism == Parallelism(tp=16, attention_dp=True)
    assert topology.decode.layout == EngineLayout(
        "block kv head token dim", "block kv head token dim", "block token dim"
    )
    assert topology.prefill.block_tokens == topology.decode.block_tokens == 32

    file.write_text("[[shape]]" + declared, encoding="utf-8")
    rows, state = load_topology(file).shape.kinds
    assert (rows.names, list(rows.layers), rows.heads) == (("k", "v"), list(range(24)), 8)
    assert (rows.row_elements, rows.dtype_bytes, rows.window) == (128, None, 1024)
    assert (rows.only, rows.state) == ("decode", False)
    assert (state.layers, state.row_bytes(2), state.state) == ((1, 3, 5), 65536, True)


def test_opaque_rows_and_layer_ids_are_taken() -> None:
    rows = {"names": ["kv"], "layers": [1, 3, 5], "bytes": 656}
    (kind,) = read_topology({**BOTH, "shape": [rows]}).shape.kinds
    assert (kind.layers, kind.heads, kind.row_bytes(2)) == ((1, 3, 5), None, 656)


def test_a_side_has_the_block_size_that_is_said_nearest_to_it() -> None:
    def blocks(table: dict[str, Any]) -> tuple[int, int]:
        topology = read_topology({**BOTH, **table})
        return topology.prefill.block_tokens, topology.decode.block_tokens

    assert blocks({}) == (16, 16)
    assert blocks({"prefill": {"layout": "trtllm"}, "decode": {"layout": "sglang"}}) == (32, 1)
    assert blocks({"block": 64, "decode": {"layout": "sglang"}}) == (64, 64)
    assert blocks({"block": 64, "decode": {"layout": "sglang", "block": 8}}) == (64, 8)


@pytest.mark.parametrize(
    ("text", "side"),
    [
        ("tp=4", Parallelism(tp=4)),
        ("tp=16,attention_dp", Parallelism(tp=16, attention_dp=True)),
        ("tp=16, attention_dp=false", Parallelism(tp=16)),
        ("pp=2,layers=30+31,numbering=vllm", Parallelism(pp=2, layers=(30, 31), numbering="vllm")),
        ("cp=2,interleave=8,dp=3,tp=4,dcp=2", Parallelism(4, cp=2, dp=3, dcp=2, interleave=8)),
    ],
)
def test_option_strings_mean_the_same_as_tables(text: str, side: Parallelism) -> None:
    def read(string: str) -> Parallelism:
        table = {"shape": "qwen3-235b", "prefill": read_parallelism(string)}
        return read_topology(table, strict=False).prefill.parallelism

    assert read(text) == side
    assert read(str(side)) == side


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4", "'4' in parallelism '4' is not one of tp, pp, cp, dp, dcp, attention_dp, layers"),
        ("tp4", "write it as tp=4,pp=2,layers=30+31 or tp=16,attention_dp"),
        ("tp=", "'tp=' in parallelism"),
        ("ep=8", "'ep=8' in parallelism"),
        ("tp=4,,pp=2", "'' in parallelism"),
        ("tp=4,tp=8", "tp stands twice in parallelism 'tp=4,tp=8'"),
    ],
)
def test_malformed_option_strings_are_refused(text: str, message: str) -> None:
    with pytest.raises(OptionsError, match=re.escape(message)):
        read_parallelism(text)


KIND = {"names": ["k", "v"], "layers": 4, "heads": 2, "dim": 64}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"tokenz": 3}, "unknown key 'tokenz' in the declaration; there are shape, dtype, first"),
        ({"prefill": {"ep": 8}}, "unknown key 'ep' in [prefill]; there are tp, pp, cp, dp"),
        ({"prefill": {"tp": "4"}}, "[prefill]: Expected `int`, got `str` - at `$.tp`"),
        ({"decode": {"tp": 0}}, "[decode]: tp=0 must be at least 1"),
        ({"decode": {"layout": "lmcache"}}, "decode layout 'lmcache' is not one of nhd, hnd, vllm"),
        ({"decode": {"block": 0}}, "decode block of 0 tokens must hold one"),
        ({"shape": "gpt-2"}, "shape='gpt-2' is not one of llama-3.1-8b, llama-3.3-70b"),
        ({"dtype": "int4"}, "dtype='int4' is not one of fp8, bf16, fp16, fp32"),
        ({"tokens": 1.5}, "the declaration: Expected `int`, got `float` - at `$.tokens`"),
        ({"shape": [{**KIND, "head": 2}]}, "unknown key 'head' in [[shape]]; there are names"),
        ({"shape": [{**KIND, "layers": [3, 1]}]}, "a number of layers or ascending layer ids"),
        ({"shape": [{**KIND, "layers": 0}]}, "a number of layers or ascending layer ids"),
        ({"shape": [{**KIND, "names": []}]}, "give at least one name"),
        ({"shape": [{**KIND, "bytes": 64}]}, "needs either dim (elements of a row) or bytes"),
        ({"shape": [{**KIND, "heads": 0}]}, "heads=0 must be at least 1"),
        ({"shape": [{**KIND, "window": -1}]}, "window=-1 must be at least 1"),
        ({"shape": [{**KIND, "state": True, "window": 4}]}, "leave out window=4"),
        ({"shape": [{**KIND, "only": "both"}]}, "Invalid enum value 'both' - at `$.only`"),
        ({"shape": [{**KIND, "only": "decode"}]}, "[[shape]] has nothing on both sides"),
        ({"shape": []}, "[[shape]] declares nothing"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(table: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionsError, match=re.escape(message)):
        read_topology({**BOTH, **table})


def test_a_model_is_needed() -> None:
    with pytest.raises(OptionsError, match="Object missing required field `shape`"):
        read_topology({})


def test_positions_must_not_be_empty() -> None:
    for first in (64, -1):
        with pytest.raises(OptionsError, match=rf"first={first} is outside \[0, 64\)"):
            read_topology({**BOTH, "tokens": 64, "first": first})


def test_layouts_that_a_topology_cannot_size_are_refused() -> None:
    for dims, message in (
        ("block head token", "'block head token' cannot be given a size; write it with dim"),
        ("block page head token kv dim", "cannot be given a size; write it with dim and any of"),
        ("block block head token dim", "axis 'block' stands more than once"),
    ):
        topology = read_topology({**BOTH, "prefill": {"layout": dims}})
        with pytest.raises(LayoutError, match=message):
            topology.cache_layout(topology.prefill, topology.prefill.parallelism.rank(0))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    with pytest.raises(OptionsError, match=re.escape(f"cannot read {missing}: No such file")):
        load_topology(missing)
    broken = tmp_path / "broken.toml"
    broken.write_text("shape = \n", encoding="utf-8")
    with pytest.raises(OptionsError, match=re.escape(f"{broken} is not TOML: ")):
        load_topology(broken)
    broken.write_bytes(b"shape = '\xff'")
    with pytest.raises(OptionsError, match=re.escape(f"{broken} is not TOML: ")):
        load_topology(broken)
    broken.write_text("shape = 'gpt-2'\n", encoding="utf-8")
    with pytest.raises(OptionsError, match=re.escape(f"{broken}: shape='gpt-2' is not one of")):
        load_topology(broken)
