"""A GGUF file parsed once, against transformers and gguf's own reader left alone."""

from __future__ import annotations

import gc
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from prunescope.models.gguf_reading import parsed_once
from prunescope.models.loading import load_model

WIDTH, INNER, BLOCKS = 32, 64, 2


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, Q8_0 and float32, with strings, numbers and truth values of every length in its header."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    words = ["<|end|>", *bytes_to_unicode().values(), "\u0120a", "\u0120\u00e9"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3] + [1] * (len(words) - 1))
    writer.add_token_merges(["\u0120 a", "\u0120 \u00e9"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    generator = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        values = generator.normal(size=shape).astype(np.float32)
        packed = len(shape) > 1 and name.startswith("blk")
        kind = gguf.GGMLQuantizationType.Q8_0 if packed else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)

    add("token_embd", len(words), WIDTH)
    add("output_norm", WIDTH)
    for i in range(BLOCKS):
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{i}.{name}", WIDTH)
        for name, rows in (("attn_q", WIDTH), ("attn_k", WIDTH // 2), ("attn_v", WIDTH // 2), ("attn_output", WIDTH), ("ffn_gate", INNER), ("ffn_up", INNER)):  # fmt: skip
            add(f"blk.{i}.{name}", rows, WIDTH)
        add(f"blk.{i}.ffn_down", WIDTH, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_is_read_is_what_transformers_reads(file: Path) -> None:
    """Config, weights bit by bit, tokenizer and its text; would catch names of another module, a string cut, a value of another type."""
    ours = load_model(file, device="cpu", dtype="float32")
    how = {"gguf_file": file.name}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.float32, quantization_config=transformers.GgufConfig(dequantize=True), **how
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **how)
    expected = theirs.state_dict()
    assert set(ours.model.state_dict()) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in ours.model.state_dict().items())
    assert ours.model.config.to_dict() == theirs.config.to_dict()
    assert ours.tokenizer.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert ours.tokenizer(" a \u00e9 b")["input_ids"] == tokenizer(" a \u00e9 b")["input_ids"]


def test_every_field_is_what_the_plain_reader_finds(file: Path) -> None:
    """Part by part with its type, and a file that changed is read anew; would catch another byte order, and a header kept too long."""
    plain, whole = gguf.GGUFReader(file), file.read_bytes()
    with parsed_once():
        found = gguf.GGUFReader(file)
        assert gguf.GGUFReader(str(file)) is found
        assert list(found.fields) == list(plain.fields)
        for name, field in plain.fields.items():
            mine = found.fields[name]
            assert (mine.offset, mine.data, mine.types) == (field.offset, field.data, field.types)
            assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(mine.parts, field.parts, strict=True))  # fmt: skip
        for a, b in zip(found.tensors, plain.tensors, strict=True):
            assert a.name == b.name and a.tensor_type == b.tensor_type and np.array_equal(a.data, b.data)
        other = file.with_name("other.gguf")
        other.write_bytes(whole)
        first = gguf.GGUFReader(other)
        other.write_bytes(whole + b"\0" * 32)
        assert gguf.GGUFReader(other) is not first
    assert type(gguf.GGUFReader(file)) is gguf.GGUFReader


def test_a_cut_file_fails_as_it_does_in_the_plain_reader(file: Path, tmp_path: Path) -> None:
    """In the middle of a token; would catch a reader that takes what lies beyond the end for zeros."""
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:1500])
    with pytest.raises(ValueError, match=r"\w") as plain:
        gguf.GGUFReader(cut)
    with parsed_once(), pytest.raises(ValueError, match=r"\w") as ours:
        gguf.GGUFReader(cut)
    assert str(ours.value) == str(plain.value)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_rests_while_a_file_is_read(enabled: bool) -> None:
    """And is afterwards what it was, after an error too. Would catch a process whose cycles are never freed, or one that is collected against its will."""
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with suppress(ZeroDivisionError), parsed_once():
            assert not gc.isenabled()
            raise ZeroDivisionError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
