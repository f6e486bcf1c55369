"""`turboquant-gguf inspect`: files against an independent reader, sizes against llama.cpp itself, damaged files."""

import json
import os
import re
import struct
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import gguf
import pytest
from rich.console import Console

import tiny_architectures
from sequences import window_slots
from turboquant_gguf.core import units
from turboquant_gguf.errors import TurboquantError
from turboquant_gguf.llamacpp import cachefacts, ggufile, native, server
from turboquant_gguf.llamacpp.cachetypes import CacheTypes, UnknownTypeError
from turboquant_gguf.llamacpp.modelmemory import F16, MOST_TOKENS, STEP, ModelMemory, RefusedError
from turboquant_gguf.measure import inspection, inspectiontables

COMMAND = (sys.executable, "-m", "turboquant_gguf.cli", "inspect")
MIB, GIB = 1 << 20, 1 << 30
TYPES = inspection.DEFAULT_TYPES
WITH_CACHE = [name for name in tiny_architectures.ARCHITECTURES if name not in ("mamba", "bert")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    """A model of each architecture."""
    folder = tmp_path_factory.mktemp("tiny")
    return {name: tiny_architectures.write(folder / f"{name}.gguf", name) for name in tiny_architectures.ARCHITECTURES}


def run(*arguments: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def sentences(text: str) -> str:
    return " ".join(text.split())


# ---- reading files


def test_reads_what_an_independent_reader_reads(smollm2):
    """gguf, llama.cpp's own package, has a reader in pure Python."""
    reader = gguf.GGUFReader(smollm2)
    with ggufile.GGUFModel(smollm2) as model:
        keys = [key for key in reader.fields if not key.startswith("GGUF.")]
        assert list(model.metadata) == keys
        for key in keys:
            value = model.metadata[key]
            assert (list(value) if isinstance(value, ggufile.Array) else value) == reader.fields[key].contents(), key
        assert [(t.name, t.shape, t.type, t.size) for t in model.tensors] == [
            (t.name, tuple(map(int, t.shape)), t.tensor_type.name.replace("_K", "_k").lower(), int(t.n_bytes))
            for t in reader.tensors
        ]


def test_arrays_are_sequences_until_the_file_is_closed(smollm2):
    with ggufile.GGUFModel(smollm2) as model:
        tokens, types = (model.metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
        assert (tokens.type, types.type, len(tokens), len(types)) == ("str", "i32", 49152, 49152)
        assert tokens[-1] == tokens[49151] == tokens[49150:][1]
        with pytest.raises(IndexError):
            tokens[49152]
    for array in (tokens, types):
        with pytest.raises(ValueError, match="is closed"):
            array[0]


def file_of(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    keys: bytes = b"",
    n_keys: int = 0,
    type: int = 0,
    length: int = 64,
    data: bytes = bytes(256),
) -> bytes:
    """A GGUF of one tensor, `x`, of `length` values and ggml type `type`, built by hand as the format says."""
    head = magic + struct.pack("<IQQ", version, 1, n_keys) + keys
    tensor = struct.pack("<Q", 1) + b"x" + struct.pack("<IqIQ", 1, length, type, 0)
    return (head + tensor).ljust(-(-len(head + tensor) // 32) * 32, b"\0") + data


KEY = struct.pack("<Q", 1) + b"k" + struct.pack("<I", 8)  # a key of type string, before its value


def test_a_file_built_by_hand_is_read(tmp_path):
    path = tmp_path / "small.gguf"
    path.write_bytes(file_of(keys=KEY + struct.pack("<Q", 2) + b"hi", n_keys=1))
    with ggufile.GGUFFile(path) as file:
        assert dict(file.metadata) == {"k": "hi"}
        assert file.tensors == (ggufile.Tensor("x", (64,), "f32", 256),)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not a GGUF file"),
        (b"GGUF", "is damaged or incomplete"),
        (file_of(magic=b"GGML"), "is not a GGUF file (it begins with b'GGML'"),
        (file_of(version=1), "is a GGUF of version 1, which llama.cpp has given up"),
        (file_of(version=4), "is a GGUF of a version newer than the llama.cpp in this package"),
        (file_of(version=3 << 24), "of the other byte order"),
        (file_of(type=999), "has a tensor 'x' of a type unknown here. It is newer than the llama.cpp in this package"),
        (file_of(type=60), "is damaged or incomplete (tensor 'x' of type 60"),  # between upstream's types and ours
        (file_of(type=120, length=65), "is damaged or incomplete (tensor 'x' of type 120 (turbo2) has 65 elements"),
        (file_of(length=-1), "is damaged or incomplete (tensor 'x' dimension 0 has invalid number of elements"),
        (file_of(length=1 << 62), "is damaged or incomplete"),
        (file_of(data=bytes(255)), "is incomplete: it holds 319 bytes, and the data of x would end at byte 320."),
        (file_of(keys=KEY + struct.pack("<Q", 1 << 60), n_keys=1), "is damaged or incomplete (string length"),
        (file_of(keys=KEY, n_keys=1 << 60), "is damaged or incomplete (number of key value pairs"),
        (file_of()[:40], "is damaged or incomplete"),
    ],
)
def test_damaged_files(content, said, tmp_path, capfd):
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with pytest.raises(TurboquantError) as error:
        inspection.inspect(file=path)
    assert said in str(error.value)
    assert capfd.readouterr() == ("", "")  # ggml's own words are in the message, or nowhere


def test_every_truncation_is_noticed(tiny, tmp_path):
    content = tiny["llama"].read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [*range(0, 4000, 7), *range(4000, len(content) - 1, 50021), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(TurboquantError, match="incomplete|damaged|is not a GGUF"):
            ggufile.GGUFFile(path)


# ---- split files


@pytest.fixture
def parts(tmp_path) -> list[Path]:
    """A model in three parts."""
    tiny_architectures.write(tmp_path / "model.gguf", "llama", parts=12)
    found = sorted(tmp_path.glob("*.gguf"))
    assert [path.name for path in found] == [f"model-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    return found


@pytest.mark.parametrize("part", [0, 1, 2])
def test_any_part_stands_for_the_whole_model(parts, tiny, part):
    split, whole = inspection.inspect(file=parts[part], memory=GIB), inspection.inspect(file=tiny["llama"], memory=GIB)
    assert split.files == [path.name for path in parts]
    assert split.file_bytes == sum(path.stat().st_size for path in parts)
    assert (split.tensors, split.parameters, split.caches) == (whole.tensors, whole.parameters, whole.caches)


def test_a_missing_part(parts):
    parts[1].unlink()
    with pytest.raises(
        TurboquantError, match="one of 3 parts, and 1 of them, such as model-00002-of-00003.gguf, cannot"
    ):
        inspection.inspect(file=parts[2])


def test_a_renamed_part(parts):
    with pytest.raises(TurboquantError, match="give it back the one that ends in -00002-of-00003.gguf"):
        inspection.inspect(file=parts[1].rename(parts[1].with_name("second.gguf")))


def test_parts_that_changed_names(parts):
    parts[1].unlink()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(TurboquantError, match="model-00002-of-00003.gguf is not part 2 of its model"):
        inspection.inspect(file=parts[0])


def test_a_truncated_part(parts):
    parts[1].write_bytes(parts[1].read_bytes()[:-100])
    with pytest.raises(TurboquantError, match="model-00002-of-00003.gguf is incomplete"):
        inspection.inspect(file=parts[0])


# ---- sizes, against llama.cpp


@pytest.mark.parametrize("architecture", WITH_CACHE)
def test_derived_sizes_are_the_measured_ones(tiny, architecture):
    """Every pair of types, at lengths within the sliding window, where memory grows linearly, and between."""
    with ModelMemory(tiny[architecture]) as memory:
        pairs = [CacheTypes(k, v) for k in (*TYPES, "bf16", "f32") for v in (*TYPES, "bf16", "f32")]
        assert memory.together == (architecture == "deepseek2")
        for types in pairs:
            if memory.together and types.k != types.v:
                assert "keeps keys and values as one" in memory.refusal(types)
                continue
            assert memory.refusal(types) == ""
            for context in (512, 3000, 16384, 50 * STEP + 16384, 131072 + STEP):
                assert memory.size(types, context) == memory.measure(types, context), (str(types), context)


def test_derived_sizes_of_a_real_model(smollm2):
    with ModelMemory(smollm2) as memory:
        for types in map(CacheTypes.parse, ("f16", "turbo4", "turbo4:turbo2", "q8_0:f16", "f16:turbo3")):
            assert memory.size(types, 300 * STEP) == memory.measure(types, 300 * STEP)
        # 30 layers of 3 heads of 64 values, keys and values
        assert memory.growth(CacheTypes.parse("turbo4:turbo2")).cache_per_token == 30 * 3 * (34 + 18)


def test_memory_that_grows_linearly_late(tmp_path):
    """Keys of f32 are copied as f16 for attention: beyond some length more than the feed-forward takes."""
    path = tiny_architectures.write(tmp_path / "wide.gguf", "llama", head_size=256, layers=2, feed_forward=8192)
    with ModelMemory(path) as memory:
        types = CacheTypes("f32", "f32")
        assert memory.growth(types).start > memory.growth(F16).start
        for context in (8192, 16384, 32768, 65536, 1 << 20):
            assert memory.size(types, context) == memory.measure(types, context)


@pytest.mark.parametrize("architecture", WITH_CACHE)
@pytest.mark.parametrize("megabytes", [20, 25, 40, 300])
def test_longest_context_fits_and_no_longer_one_does(tiny, architecture, megabytes):
    with ModelMemory(tiny[architecture]) as memory:
        for types in map(
            CacheTypes.parse, ("f16", "turbo3", *(() if memory.together else ("q8_0:turbo2", "turbo4:f16")))
        ):
            longest = memory.longest_context(types, megabytes * MIB)
            assert longest % STEP == 0 and longest > 0
            assert memory.measure(types, longest).total <= megabytes * MIB < memory.measure(types, longest + STEP).total


def test_no_context_fits(tiny):
    with ModelMemory(tiny["llama"]) as memory:
        least = memory.measure(F16, STEP).total
        assert memory.longest_context(F16, least) == STEP
        assert memory.longest_context(F16, least - 1) == 0


def test_windows_alone_hold_any_context(tmp_path):
    path = tiny_architectures.write(tmp_path / "windows.gguf", "gemma3", layers=5)
    report = inspection.inspect(file=path, types=("turbo4",), memory=GIB)
    (pair,) = report.caches.pairs
    assert (pair.bytes_per_token, pair.longest_context) == (0, MOST_TOKENS)
    ring = 2 * window_slots()  # bytes of a channel: f16
    assert pair.fixed_bytes == 5 * 2 * 256 * (34 * (tiny_architectures.WINDOW + 512) // 64 + ring)


def test_the_recent_window_is_counted(smollm2, monkeypatch):
    sizes = {}
    for tokens in (0, 100, 200):
        monkeypatch.setenv("TURBO_CACHE_WINDOW", str(tokens))
        with ModelMemory(smollm2) as memory:
            for name in ("turbo4", "turbo4:q8_0", "q8_0", "f16"):
                types = CacheTypes.parse(name)
                sizes[tokens, name] = memory.size(types, 4096)
                assert sizes[tokens, name] == memory.measure(types, 4096)
    token = 30 * 2 * 3 * 64 * 2  # bytes: layers, keys and values, KV heads, head size, f16
    for name in ("turbo4", "turbo4:q8_0", "q8_0"):
        assert sizes[200, name].cache - sizes[100, name].cache == 100 * token
        assert sizes[100, name].cache - sizes[0, name].cache == (100 + 4 + 64 + 1) * token
    assert sizes[200, "f16"] == sizes[0, "f16"]


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "gemma4", "lfm2"])
def test_cache_of_a_real_load(tiny, architecture):
    """What llama-bench says of the cache that it really allocates."""
    types = CacheTypes("turbo4", "q8_0")
    command = [native.tool_path("llama-bench"), "-m", tiny[architecture], "-ctk", types.k, "-ctv", types.v, "-fa", "1"]
    command += ["-p", "2048", "-n", "0", "-r", "1", "--no-warmup", "-v"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    states = re.findall(r"llama_memory_recurrent: size = +([\d.]+) MiB", done.stderr)
    with ModelMemory(tiny[architecture]) as memory:
        size = cachefacts.require(done.stderr, types).size + sum(float(state) * MIB for state in states)
        buffers = re.findall(r"compute buffer size = +([\d.]+) MiB", done.stderr)
        measured = memory.measure(types, 2048)
        assert measured.cache == pytest.approx(size, abs=0.03 * MIB)  # several sizes, each printed to 0.01 MiB
        assert measured.compute == pytest.approx(float(buffers[-1]) * MIB, abs=0.01 * MIB)


def test_all_of_a_real_server(smollm2):
    types = CacheTypes("turbo4", "turbo3")
    with server.running(smollm2, types, context=4096, extra_args=("--parallel", "1")) as running:
        log = running.log()
    with ModelMemory(smollm2) as memory:
        size = memory.measure(types, 4096)
    printed = {name: re.findall(rf"{name} buffer size = +([\d.]+) MiB", log) for name in ("model", "KV", "compute")}
    printed["KV"] += re.findall(r"recent window: .* ([\d.]+) MiB", log)
    for name, counted in (("model", size.weights), ("KV", size.cache), ("compute", size.compute)):
        assert sum(map(float, printed[name])) * MIB == pytest.approx(counted, abs=0.05 * MIB), (name, printed)


# ---- what a report says


def test_report_of_a_real_model(smollm2):
    report = inspection.inspect(file=smollm2, memory=8 * GIB)
    assert (report.kind, report.architecture, report.layers, report.trained_context) == ("model", "llama", 30, 8192)
    assert report.parameters == 134_515_008
    assert report.attention == [inspection.AttentionGroup(9, 3, 64, 64, 0, False, layers=30)]
    assert report.tokenizer == inspection.Tokenizer("gpt2", "smollm", 49152, True)
    assert {group.type: group.tensors for group in report.tensors} == {"q4_1": 210, "q8_0": 1, "f32": 61}
    assert sum(group.bytes for group in report.tensors) == report.weight_bytes < report.file_bytes
    assert sum(group.share for group in report.tensors) == pytest.approx(1)
    assert (report.turboquant, report.values_rotated, report.error, report.no_caches) == ({}, False, "", "")
    pairs = {(pair.type_k, pair.type_v): pair for pair in report.caches.pairs}
    assert len(pairs) == len(TYPES) ** 2
    turbo = pairs["turbo4", "turbo4"]
    assert turbo.smaller_than_f16 == pytest.approx(16 / 4.25)
    assert turbo.trained_bytes == 8192 * turbo.bytes_per_token + turbo.fixed_bytes
    assert turbo.fixed_bytes == 30 * 2 * 3 * 64 * 2 * window_slots(1, 8192)  # layers, both, KV heads, head size, f16
    assert turbo.times_f16 == turbo.longest_context / pairs["f16", "f16"].longest_context > 3


def test_layers_that_differ(tiny):
    report = inspection.inspect(file=tiny["gemma4"])
    shown = text_of(inspectiontables.facts(report))
    assert re.search(r"head size +256 \(4 layers\), 512 \(2 layers\)", shown)
    assert re.search(r"sliding window +1024 tokens \(4 layers\)", shown)
    assert re.search(r"layers +6, 2 of which read the keys and values of others", shown)
    assert re.search(
        r"layers +6, 2 with attention", text_of(inspectiontables.facts(inspection.inspect(file=tiny["lfm2"])))
    )


@pytest.mark.parametrize(
    ("head_size", "refused", "reason"),
    [
        (96, {"turbo4", "turbo3", "turbo2"}, "heads hold 96 values, which are not whole blocks of the cache type"),
        (80, set(TYPES) - {"f16"}, "heads hold 80 values"),
    ],
)
def test_types_that_do_not_fit_the_heads(tmp_path, head_size, refused, reason):
    path = tiny_architectures.write(tmp_path / "odd.gguf", "llama", head_size=head_size)
    report = inspection.inspect(file=path, memory=GIB)
    with ModelMemory(path) as memory, pytest.raises(RefusedError, match=reason):
        memory.size(CacheTypes("turbo4", "f16"), 4096)
    for pair in report.caches.pairs:
        if refused & {pair.type_k, pair.type_v}:
            assert reason in pair.refusal
            assert (pair.bytes_per_token, pair.longest_context) == (None, None)
        else:
            assert pair.refusal == "" and pair.longest_context > 0
    assert reason in text_of(inspectiontables.caches(report))


def test_turboquant_metadata(tmp_path):
    ours = {
        "turboquant.values.version": 1,
        "turboquant.values.transform": "hadamard",
        "turboquant.values.seeds": [7, 8],
        "turboquant.keys.version": 1,
        "turboquant.keys.sizes": list(range(100)),
    }
    path = tiny_architectures.write(tmp_path / "rotated.gguf", "llama", add=ours)
    report = inspection.inspect(file=path)
    assert report.turboquant == ours
    assert report.values_rotated and report.keys_calibrated
    shown = text_of(inspectiontables.facts(report))
    assert "values rotated in the weights, keys calibrated" in shown
    assert "turboquant.values.seeds = [7, 8]" in shown and "turboquant.keys.sizes = 100 numbers" in shown


@pytest.mark.parametrize(
    ("architecture", "said"), [("mamba", "Its state takes 38 KiB"), ("bert", "reads a whole text")]
)
def test_models_without_a_cache(tiny, architecture, said):
    report = inspection.inspect(file=tiny[architecture], memory=GIB)
    assert said in report.no_caches
    assert (report.caches, report.error) == (None, "")


@pytest.mark.parametrize(("kind", "said"), [("adapter", "a LoRA adapter"), ("mmproj", "the vision or audio part")])
def test_files_that_are_no_models(tmp_path, kind, said):
    path = tiny_architectures.write(tmp_path / "part.gguf", "llama", add={"general.type": kind})
    report = inspection.inspect(file=path)
    assert (report.kind, report.caches, report.error) == (kind, None, "")
    assert said in report.no_caches


def test_models_that_llama_cpp_does_not_load(tmp_path):
    broken = tiny_architectures.write(tmp_path / "broken.gguf", "llama", leave_out="blk.1.attn_q.weight")
    report = inspection.inspect(file=broken)
    assert "tensor 'blk.1.attn_q.weight' not found" in report.error
    assert report.trained_context == 4096  # what the file itself says is there

    newer = tmp_path / "newer.gguf"
    newer.write_bytes(broken.read_bytes().replace(b"llama", b"lmaal"))
    assert "older than the model's architecture" in inspection.inspect(file=newer).error


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("8 gib", 8 << 30), ("1.5KiB", 1536), ("2TiB", 2 << 40), ("500MB", 500_000_000), ("1e", None),
     ("3KB", 3000), ("7GB", 7 * 10**9), ("4096", 4096), ("8G", None), ("", None), ("-1GiB", None), ("0", None)],
)  # fmt: skip
def test_sizes_of_memory(text, size):
    if size is not None:
        assert units.parse_size(text) == size
    else:
        with pytest.raises(ValueError, match="Write it like 8GiB"):
            units.parse_size(text)


def test_types_are_single(smollm2):
    with pytest.raises(UnknownTypeError, match="is a pair"):
        inspection.inspect(file=smollm2, types=("turbo4:turbo3",))
    with pytest.raises(UnknownTypeError, match="did you mean turbo4"):
        inspection.inspect(file=smollm2, types=("trubo4",))


# ---- the command


def text_of(shown: object) -> str:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(shown)
    return sentences(captured.get())


def test_table(smollm2):
    shown = run(smollm2, "--memory", "8GiB")
    assert shown.returncode == 0, shown.stderr
    assert max(len(line.rstrip()) for line in shown.stdout.splitlines()) <= 80
    report = inspection.inspect(file=smollm2, memory=8 * GIB)
    rows = [line.split() for line in shown.stdout.splitlines()]
    for type in TYPES:
        pairs = [pair for pair in report.caches.pairs if pair.type_k == type]
        assert [type, *(str(pair.bytes_per_token) for pair in pairs)] in rows
        (equal,) = (pair for pair in pairs if pair.type_v == type)
        assert any(row[:1] == [type] and str(equal.longest_context) in row for row in rows)
    assert "trained for 8192 tokens" in sentences(shown.stdout)


def test_all_types_fit_80_columns(tiny):
    types = "f32,f16,bf16,q8_0,q4_0,q4_1,iq4_nl,q5_0,q5_1,turbo2,turbo3,turbo4"
    shown = run(tiny["llama"], "--memory", "8GiB", "--types", types)
    assert max(len(line.rstrip()) for line in shown.stdout.splitlines()) <= 80
    assert "…" not in shown.stdout


def test_json(smollm2):
    done = run(smollm2, "--memory", "1GiB", "--types", "turbo4,turbo3", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == asdict(inspection.inspect(file=smollm2, memory=GIB, types=("turbo4", "turbo3"))) | {
        "caches": found["caches"]  # tuples became lists
    }
    assert [(pair["type_k"], pair["type_v"]) for pair in found["caches"]["pairs"]] == [
        ("turbo4", "turbo4"), ("turbo4", "turbo3"), ("turbo3", "turbo4"), ("turbo3", "turbo3"),
    ]  # fmt: skip
    assert found["caches"]["memory"] == GIB
    assert all(pair["longest_context"] > 100_000 and pair["times_f16"] > 3 for pair in found["caches"]["pairs"])


def test_weights_that_do_not_fit(smollm2):
    shown = run(smollm2, "--memory", "64MiB")
    assert shown.returncode == 0
    assert "The weights alone take 92.1 MiB: they do not fit in 64 MiB." in sentences(shown.stdout)
    assert "Longest context" not in shown.stdout


def test_a_model_that_does_not_load_is_shown_and_fails(tmp_path):
    path = tiny_architectures.write(tmp_path / "broken.gguf", "llama", leave_out="output_norm.weight")
    failed = run(path)
    assert failed.returncode == 1
    assert "tiny llama" in failed.stdout
    assert "'output_norm.weight' not found" in sentences(failed.stderr)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["absent.gguf"], 1, "There is no model file absent.gguf."),
        (["."], 1, "There is no model file ."),
        ([__file__], 1, "is not a GGUF file"),
        (["absent.gguf", "--memory", "8G"], 2, "'8G' is not a size of memory. Write it like 8GiB"),
        (["absent.gguf", "--types", "trubo4"], 2, "There is no cache type 'trubo4': did you mean turbo4?"),
        (["absent.gguf", "--types", "turbo4:turbo3"], 2, "'turbo4:turbo3' is a pair."),
        ([], 2, "Missing argument 'FILE'"),
    ],
)
def test_errors_are_sentences(arguments, code, said):
    failed = run(*arguments)
    assert (failed.returncode, failed.stdout) == (code, "")
    assert said in sentences(failed.stderr)
    assert "Traceback" not in failed.stderr
